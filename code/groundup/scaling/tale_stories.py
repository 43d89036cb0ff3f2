"""The stories of TinyTales: a wish, a meeting, a deed, and what comes of it.

Here: the words and rules of three difficulties. A story promises on its first line
what its last line must keep: who wished, for what, who was met in which trouble, and
whether help was given. Left out: how a grammar works (`tale_grammar`).

Page: book/4-scaling/synthetic_data.md.
"""

from groundup.scaling.tale_grammar import Grammar, Option, Rule, by, one_of

GIRLS = ("Mia", "Anna", "Lucy", "Rosa", "Ella", "Nina", "Clara", "Vera", "Ida")
GIRLS += ("Joan", "Ruth", "Greta", "Emma", "Jane", "Sofia")
BOYS = ("Tom", "Ben", "Max", "Paul", "Finn", "Oscar", "Leo", "Hugo", "Karl", "Will")
BOYS += ("Peter", "Jack", "Sam", "Noah", "David")
WARM, COLD = ("kind", "gentle", "friendly"), ("proud", "selfish", "lazy")
LOOKS = ("little", "big", "grey", "shy", "tired", "brown")
ANIMALS = ("fox", "mouse", "crow", "goat", "frog", "bear", "duck", "hare", "pig")
ANIMALS += ("hen", "cat", "wolf")
COLOURS = ("red", "blue", "green", "yellow", "white", "black", "silver", "golden")
# trouble: (how it looks, what helps, what is left if nobody helps)
TROUBLES = {
    "net": ("caught in a net", "cut the net", "was still in the net"),
    "thorn": ("with a thorn in its foot", "pulled out the thorn", "still limped"),
    "cage": ("shut in a cage", "opened the cage", "stayed in the cage"),
    "mud": ("stuck in the mud", "dug it out of the mud", "sank into the mud"),
    "branch": ("under a fallen branch", "lifted the branch", "lay under the branch"),
    "fog": ("lost in the fog", "showed it the way home", "never found its way"),
}
# thing: (why it is wanted, what is done with it)
THINGS = {
    "kite": ("the wind blew every day", "flew it over the fields"),
    "boat": ("the pond was near", "sailed it on the pond"),
    "drum": ("the house was too quiet", "played it for all to hear"),
    "coat": ("the winter was long", "wore it until spring"),
    "bell": ("it would ring so clearly", "rang it every morning"),
    "sledge": ("the hill was white with snow", "rode it down the hill"),
    "book": ("the evenings were long", "read it from end to end"),
    "lamp": ("the nights were dark", "lit it every night"),
}
# place: (what lies in the way, how it is passed)
PLACES = {
    "sea": ("by the sea", "a wide bay", "rowed across"),
    "wood": ("near a dark wood", "a thick hedge", "crept through"),
    "hills": ("in the hills", "a steep slope", "climbed up slowly"),
    "farm": ("on a small farm", "a muddy field", "walked around it"),
    "river": ("beside a river", "a broken bridge", "swam to the other side"),
}


def _hero() -> Rule:
    she = {"kin": "girl", "he": "she", "him": "her"}
    he = {"kin": "boy", "he": "he", "him": "him"}
    return one_of(
        *(
            Option("{kin} named {hero}", 1.0, {"hero": name, **words})
            for names, words in ((GIRLS, she), (BOYS, he))
            for name in names
        )
    )


COMMON = {
    "trait": one_of(
        *(Option(word, 1.0, {"trait": word, "heart": "warm"}) for word in WARM),
        *(Option(word, 1.0, {"trait": word, "heart": "cold"}) for word in COLD),
    ),
    "hero": _hero(),
    "object": one_of("a <colour> <thing>"),
    "colour": one_of(*(Option(c, 1.0, {"colour": c}) for c in COLOURS)),
    "thing": one_of(*(Option(t, 1.0, {"thing": t}) for t in THINGS)),
    "reason": by("thing", **{t: why for t, (why, _) in THINGS.items()}),
    "use": by("thing", **{t: use for t, (_, use) in THINGS.items()}),
    "helper": one_of("a <look> <animal>"),
    "look": one_of(*LOOKS),
    "animal": one_of(*(Option(a, 1.0, {"helper": a}) for a in ANIMALS)),
    "trouble": one_of(
        *(Option(look, 1.0, {"trouble": t}) for t, (look, _, _) in TROUBLES.items())
    ),
    "remedy": by("trouble", **{t: remedy for t, (_, remedy, _) in TROUBLES.items()}),
    "left": by("trouble", **{t: left for t, (_, _, left) in TROUBLES.items()}),
    "deed": by(
        "heart",
        warm=(
            Option("<helped>", 9.0, {"deed": "helped"}),
            Option("<passed>", 1.0, {"deed": "passed"}),
        ),
        cold=(
            Option("<helped>", 1.0, {"deed": "helped"}),
            Option("<passed>", 4.0, {"deed": "passed"}),
        ),
    ),
    "place": one_of(
        *(Option(where, 1.0, {"place": p}) for p, (where, _, _) in PLACES.items())
    ),
    "barrier": by("place", **{p: barrier for p, (_, barrier, _) in PLACES.items()}),
    "way": by("place", **{p: way for p, (_, _, way) in PLACES.items()}),
}

SHORT = {
    "tale": one_of("<opening><meeting><deed><ending>\n\n"),
    "opening": one_of(
        "A <trait> <hero> wanted <object>. ",
        "Once a <trait> <hero> wanted <object>. ",
        "There was a <trait> <hero> who wanted <object>. ",
    ),
    "meeting": one_of(
        "{He} met <helper> <trouble>. ",
        "One day {he} saw <helper> <trouble>. ",
    ),
    "helped": one_of(
        "{Hero} stopped and <remedy>. ",
        "{He} went to it and <remedy>. ",
    ),
    "passed": one_of("{Hero} only laughed. ", "{He} did nothing. "),
    "ending": by(
        "deed",
        helped=(
            "The {helper} gave {him} the {colour} {thing}, and {hero} <use>.",
            "So the {helper} brought the {colour} {thing}, and {hero} <use>.",
        ),
        passed=(
            "{Hero} never got the {colour} {thing}, and the {helper} <left>.",
            "The {helper} <left>, and {hero} had no {colour} {thing}.",
        ),
    ),
}

LONG = {
    "tale": one_of("<opening><wish><journey><meeting><deed><turn><ending>\n\n"),
    "opening": one_of(
        "Once upon a time there was a <trait> <hero>, who lived <place>. ",
        "A <trait> <hero> lived <place>. ",
        "Long ago a <trait> <hero> lived <place>. ",
    ),
    "wish": one_of(
        "{He} wanted <object>, because <reason>. ",
        "{Hero} wished for <object>. ",
        "More than anything {he} wanted <object>. ",
    ),
    "journey": one_of(
        "One morning {hero} set out to find one. ",
        "So {he} went out to look for one. ",
    ),
    "meeting": one_of(
        "On the way {he} met <helper> <trouble>. <plea>",
        "After an hour {he} came upon <helper> <trouble>. <plea>",
        "Behind a stone {he} found <helper> <trouble>. <plea>",
    ),
    "plea": one_of(
        '"Please help me," said the {helper}. ',
        '"Help!" cried the {helper}. ',
        "The {helper} looked at {him}. ",
    ),
    "helped": one_of(
        "{Hero} stopped at once and <remedy>. ",
        "{He} was in a hurry, but {he} <remedy>. ",
        '"Of course," said {hero}, and <remedy>. ',
    ),
    "passed": one_of(
        "{Hero} only laughed. ",
        "{He} was in a hurry and did not stop. ",
        '"Not today," said {hero}. ',
    ),
    "turn": by(
        "deed",
        helped=(
            '"I know where there is a {colour} {thing}," said the {helper}. ',
            'The {helper} was glad. "You wish for a {colour} {thing}," it said. '
            '"Come." ',
        ),
        passed=(
            "{Hero} searched all day, but there was no {colour} {thing}. ",
            "{He} asked everyone for a {colour} {thing}, and nobody had one. ",
        ),
    ),
    "ending": by(
        "deed",
        helped=(
            "That evening {hero} went home with the {colour} {thing} and <use>.",
            "It gave {him} the {colour} {thing}, because {he} had helped, and "
            "{hero} <use>.",
        ),
        passed=(
            "That evening {hero} went home without the {colour} {thing}, and the "
            "{helper} "
            "<left>.",
            "So {hero} never got the {colour} {thing}. If only {he} had helped "
            "the {helper}!",
        ),
    ),
}

LONGEST = {
    **LONG,
    "tale": one_of("<opening><wish><journey><road><meeting><deed><turn><ending>\n\n"),
    "road": one_of(
        "Soon {he} stood before <barrier> and <way>. ",
        "There was <barrier> in the way, but {hero} <way>. ",
    ),
    "ending": by(
        "deed",
        helped=(
            "That evening {hero} went home with the {colour} {thing} and <use>. "
            "<moral>",
            "It gave {him} the {colour} {thing}, because {he} had helped, and "
            "{hero} <use>. "
            "<moral>",
        ),
        passed=(
            "That evening {hero} went home without the {colour} {thing}, and the "
            "{helper} "
            "<left>. <remorse>",
            "So {hero} never got the {colour} {thing}. <remorse>",
        ),
    ),
    "moral": one_of(
        "The {helper} and the {trait} {kin} stayed friends.",
        "And when {he} met the {helper} again, {he} thanked it.",
    ),
    "remorse": one_of(
        "If only {he} had helped the {helper}!",
        "The next day {he} went back and <remedy>.",
        "Then {he} thought of the {helper}, and the {trait} {kin} was sorry.",
    ),
}


def stories(difficulty: int) -> Grammar:
    """Return the grammar of stories of about 150, 350 or 500 bytes (1, 2, 3).

    Raises:
        ValueError: difficulty is not 1, 2 or 3.
    """
    if difficulty not in (1, 2, 3):
        raise ValueError(f"difficulty of stories must be 1, 2 or 3; got {difficulty}")
    own = (SHORT, LONG, LONGEST)[difficulty - 1]
    return Grammar({**COMMON, **own}, "tale")
