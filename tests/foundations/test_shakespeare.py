"""The cleaned plays: the markup is gone and every word is still there."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from groundup.foundations.assets import is_cached
from groundup.foundations.shakespeare import clean, plays, text

SCENE = """\
# Hamlet

## ACT I

### SCENE II. A room of state in the castle.~

_Flourish. Enter KING CLAUDIUS, HAMLET, and
Attendants_

**KING CLAUDIUS**~
But now, my cousin Hamlet, and my son,\\--~

**HAMLET**~
_\\[Aside]_~
A little more than kin, and less than kind.



_Exeunt_
""".replace("~", "  ")  # Markdown's line break: two blanks


def test_a_scene_by_hand():
    assert clean(SCENE) == (
        "Hamlet\n\nACT I\n\nSCENE II. A room of state in the castle.\n\n"
        "[Flourish. Enter KING CLAUDIUS, HAMLET, and Attendants]\n\n"
        "KING CLAUDIUS:\nBut now, my cousin Hamlet, and my son,--\n\n"
        "HAMLET:\n[Aside]\nA little more than kin, and less than kind.\n\n"
        "[Exeunt]\n"
    )


@pytest.mark.parametrize(
    ("markup", "plain"),
    [
        ("_Exit_", "[Exit]"),
        ("*Exit Lodowick.*", "[Exit Lodowick.]"),
        ("*Enter King Edward, and \nArtois.*", "[Enter King Edward, and Artois.]"),
        ("__\\[Awaking]_  ", "[Awaking]"),
        ("*[Drawing his.]*", "[Drawing his.]"),
        ("[Within]_  \nWho's there?", "[Within]\nWho's there?"),
        ("_Burthen _\\[dispersedly, within_", "[Burthen dispersedly, within]"),
        (
            "Twice being _\\[by the people]_\nchosen",
            "Twice being [by the people]\nchosen",
        ),
        ("And either _\\[ ]_ the devil", "And either [ ] the devil"),
        ("2\\. Then, two Judges.", "2. Then, two Judges."),
        ("\\--Whose wrongs", "--Whose wrongs"),
        ("with child,' &amp; c.", "with child,' & c."),
        ("chaste— ...", "chaste-- ..."),
        ("**First Citizen**  \nSpeak.", "First Citizen:\nSpeak."),
        ("**GREY & SCROOP**", "GREY & SCROOP:"),
        ("#### ACT IV", "ACT IV"),
        ("one  \ntwo", "one\ntwo"),
        ("", ""),
    ],
)
def test_each_kind_of_markup_in_the_edition(markup, plain):
    assert clean(markup) == plain + "\n"


def test_a_direction_ends_at_its_own_mark():
    """Pitfall: a greedy pattern swallows the speech between two directions."""
    markup = "_Enter BRUTUS_\n\n**BRUTUS**  \nWhat means this?\n\n_Exit_"
    assert clean(markup) == "[Enter BRUTUS]\n\nBRUTUS:\nWhat means this?\n\n[Exit]\n"


WORDS = st.lists(st.text("abcdeXYZ'", min_size=1), min_size=1, max_size=6).map(" ".join)


@given(speaker=WORDS, direction=WORDS, lines=st.lists(WORDS, min_size=1, max_size=4))
def test_words_survive_in_order(speaker, direction, lines):
    markup = f"**{speaker}**  \n_\\[{direction}]_  \n" + "  \n".join(lines)
    plain = clean(markup)
    assert plain.split("\n") == [f"{speaker}:", f"[{direction}]", *lines, ""]
    assert clean(plain) == plain  # plain text has nothing left to take off


real = pytest.mark.skipif(
    not is_cached("shakespeare"),
    reason="the plays are not cached here (`groundup fetch shakespeare`)",
)


@real
def test_there_are_38_plays_in_alphabetical_order():
    titles = list(plays())
    assert len(titles) == 38
    assert titles == sorted(titles)
    for title in ("Hamlet", "Measure for Measure", "Henry IV, Part 1", "Edward III"):
        assert title in titles
    for title, play in plays().items():
        assert play.startswith(f"{title}\n\nACT I\n\n") or "PROLOGUE" in play.upper()
        assert 80_000 < len(play) < 180_000


@real
@pytest.mark.parametrize(
    ("title", "speakers"),
    [
        ("Hamlet", ["HAMLET", "OPHELIA", "HORATIO", "Ghost"]),
        ("Macbeth", ["MACBETH", "LADY MACBETH", "First Witch"]),
        ("Coriolanus", ["First Citizen", "MENENIUS"]),
        ("Edward III", ["KING EDWARD", "COUNTESS"]),
    ],
)
def test_speakers_stand_alone_before_a_colon(title, speakers):
    for speaker in speakers:
        assert plays()[title].count(f"\n\n{speaker}:\n") > 5


@real
def test_famous_lines_are_whole():
    assert (
        "\nHAMLET:\nTo be, or not to be: that is the question:\n"
        "Whether 'tis nobler in the mind to suffer\n"
    ) in plays()["Hamlet"]
    assert "\n[Exit, pursued by a bear]\n" in plays()["A Winter's Tale"]


@real
def test_no_markup_is_left():
    for title, play in plays().items():
        for line in play.split("\n"):
            assert not re.search(r"[*_\\#`<>]|&amp;|^\s|\s$|[^ ]\s{2,}", line), title
        assert "\n\n\n" not in play
        inside = re.sub(r"\[[^][\n]*\]", "", play)  # brackets pair up within a line
        assert not set(inside) & set("[]")


@real
def test_the_text_is_ascii_so_that_a_character_is_a_byte():
    assert text().isascii()
    assert len(text().encode()) == len(text())
    assert 4_900_000 < len(text()) < 5_100_000
    assert len(set(text())) == 79


@real
def test_the_text_is_the_plays_between_two_blank_lines():
    assert text().split("\n\n\n") == [
        *(play.rstrip("\n") for play in list(plays().values())[:-1]),
        list(plays().values())[-1],
    ]


@real
def test_every_letter_of_the_edition_is_kept():
    """Markup has no letters, but for the entity of the ampersand."""
    from groundup.foundations.assets import fetch

    for path in fetch("shakespeare", offline=True).glob("*/*.md"):
        markup = path.read_text("utf-8")
        before = re.sub(r"[^A-Za-z0-9]", "", markup.replace("&amp;", "&"))
        assert re.sub(r"[^A-Za-z0-9]", "", clean(markup)) == before, path
