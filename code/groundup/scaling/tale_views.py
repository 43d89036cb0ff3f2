"""Tasks made of tales: instructions, answers and preferences, each with a gold check.

Here: prompts with their answers, pairs of a good and a worse answer with the reason,
and a checker that knows the right answer from the prompt alone. Left out: chat
templates and tokens (Part 6), learned rewards (Part 7).

The checker reads text as data and never runs it. Page:
book/4-scaling/synthetic_data.md.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from random import Random

from groundup.scaling.tale_domains import run_program
from groundup.scaling.tinytales import Tale, TalesConfig, draw, grammar, random_for

END = "\n\n"
LEVELS = (1, 2, 3)
FULL = 188  # bytes of a short story, on average: less is a fragment
WRITE = re.compile(
    r"Write a tale about (?P<hero>\w+), a (?P<trait>\w+) (?P<kin>\w+) "
    r"who wants a (?P<colour>\w+) (?P<thing>\w+)\."
)
SUM = re.compile(r"What is (\d+) \+ (\d+)\?")
PRINTS = "What does this print?\n"
ASK = "\n\nQuestion: "
QUESTIONS = {  # kind: (domain, question, answer), filled in from the plot
    "wish": ("stories", "What did {hero} want?", "a {colour} {thing}"),
    "who": ("stories", "Who wanted a {colour} {thing}?", "{hero}"),
    "met": ("stories", "Which animal did {hero} meet?", "a {helper}"),
    "helped": ("stories", "Did {hero} help?", "{yes}"),
    "got": ("stories", "Did {hero} get the {colour} {thing}?", "{yes}"),
    "where": ("dialogues", "Where is the {colour} {thing}?", "{spot}"),
    "whose": ("dialogues", "Whose is the {colour} {thing}?", "{first}'s"),
    "knows": ("dialogues", "Who knows where it is?", "{second}"),
}


@dataclass(frozen=True)
class Task:
    """A prompt and an answer that is right."""

    prompt: str
    answer: str
    domain: str
    kind: str  # write, add, run, or a key of QUESTIONS


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt; `reason` says what is wrong with the rejected one."""

    prompt: str
    chosen: str
    rejected: str
    reason: str


@dataclass(frozen=True)
class Verdict:
    """What the checker thinks of an answer.

    A score of 1 means right. A tale that is grammatical but breaks k promises, to its
    own beginning or to the prompt, scores 1/2 + 1/(2 + 2k); one that leaves the grammar
    or stops early scores half the share of it, or of FULL bytes, that is good. Short
    answers score 0 or 1.
    """

    score: float
    faults: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether the answer is right."""
        return not self.faults


def task(config: TalesConfig, index: int, split: str = "train") -> Task:
    """Return task number index: the same, however many are drawn."""
    tale = draw(config, index, split)
    rng = random_for(config, "task", split, index)
    if tale.domain == "sums":
        terms, total = tale.text.rstrip(".\n").split(" = ")
        return Task(f"What is {terms}?", total, "sums", "add")
    if tale.domain == "programs":
        source, output = tale.text.rstrip("\n").split("\n> ")
        return Task(PRINTS + source, output, "programs", "run")
    kinds = [kind for kind, (domain, *_) in QUESTIONS.items() if domain == tale.domain]
    text, plot = tale.text.removesuffix(END), tale.plot
    if tale.domain == "stories" and rng.random() < 0.5:
        prompt = (
            "Write a tale about {hero}, a {trait} {kin} who wants a {colour} {thing}."
        )
        return Task(prompt.format_map(plot), text, "stories", "write")
    kind = kinds[int(rng.random() * len(kinds))]
    question, answer = (part.format_map(_facts(plot)) for part in QUESTIONS[kind][1:])
    return Task(text + ASK + question, answer, tale.domain, kind)


def instructions(config: TalesConfig, n: int, split: str = "train") -> list[Task]:
    """Return the first n tasks of a split."""
    return [task(config, index, split) for index in range(n)]


def _facts(plot: Mapping[str, str]) -> dict[str, str]:
    return {**plot, "yes": "yes" if plot.get("deed") == "helped" else "no"}


def gold(prompt: str) -> str | None:
    """Return the only right answer to a prompt; None if it asks for a tale.

    It is worked out from the prompt: no answer is stored.

    Raises:
        ValueError: prompt is none that `task` could have written.
    """
    if WRITE.fullmatch(prompt):
        return None
    if found := SUM.fullmatch(prompt):
        return str(int(found[1]) + int(found[2]))
    if prompt.startswith(PRINTS):
        return run_program(prompt.removeprefix(PRINTS))
    text, asked, question = prompt.partition(ASK)
    for domain, form, answer in QUESTIONS.values() if asked else ():
        for level in LEVELS:
            for found in grammar(domain, level).derivations(text + END):
                facts = _facts(found.plot)
                if form.format_map(facts) == question:
                    return answer.format_map(facts)
    raise ValueError(f"prompt must be one of the tasks of TinyTales; got {prompt!r}")


def check(prompt: str, answer: str) -> Verdict:
    """Judge an answer; white space at its ends and one full stop after it are free.

    Raises:
        ValueError: prompt is none that `task` could have written.
    """
    right, given = gold(prompt), answer.strip()
    if right is None:
        return judge_tale(given, WRITE.fullmatch(prompt).groupdict())
    if given.removesuffix(".") == right:
        return Verdict(1.0, ())
    return Verdict(0.0, (f"the answer is {right!r}; got {answer[:60]!r}",))


def judge_tale(text: str, wanted: Mapping[str, str] | None = None) -> Verdict:
    """Judge a story of any difficulty, by itself and by what was wanted of its plot."""
    text = text.strip()
    if not text:
        return Verdict(0.0, ("the answer is empty",))
    readings = [grammar("stories", level).nearest(text + END) for level in LEVELS]
    whole = [reading for reading in readings if reading.plot is not None]
    if not whole:
        reach = min(max(reading.reach for reading in readings), len(text))
        seen = f"leaves the grammar at byte {reach}: {text[reach : reach + 20]!r}"
        return Verdict(reach / max(len(text), FULL) / 2, (seen,))
    best = min(whole, key=lambda reading: len(reading.faults))
    faults = best.faults + tuple(
        f"{name} should be {value!r}; it is {best.plot[name]!r}"
        for name, value in (wanted or {}).items()
        if best.plot[name] != value
    )
    return Verdict((1 + 1 / (1 + len(faults))) / 2, faults)


def preferences(config: TalesConfig, n: int, split: str = "train") -> list[Pair]:
    """Return the first n pairs of a split; the chosen answer is the task's own."""
    pairs = []
    for index in range(n):
        rng = random_for(config, "pair", split, index)
        asked = task(config, index, split)
        worse, reason = _worse(asked, draw(config, index, split), config, rng)
        pairs.append(Pair(asked.prompt, asked.answer, worse, reason))
    return pairs


def _pick(rng: Random, options: list[str]) -> str:
    return options[int(rng.random() * len(options))]


def _worse(
    asked: Task, tale: Tale, config: TalesConfig, rng: Random
) -> tuple[str, str]:
    """Return a worse answer and what is wrong with it."""
    rules = grammar(tale.domain, config.levels[tale.domain])
    right = asked.answer
    if asked.kind == "write":
        kind = _pick(rng, list(SPOILERS))
        return SPOILERS[kind](tale, rules, rng), kind
    if asked.kind == "run":
        return str((int(right) + 1 + int(rng.random() * 9)) % 10), "wrong value"
    if asked.kind == "add":
        off = _pick(rng, ["1", "10"])
        return str(int(right) + int(off)), f"off by {off}"
    if right in ("yes", "no"):
        return "no" if right == "yes" else "yes", "the contrary"
    for _ in range(1000):
        facts = _facts(rules.sample(rng)[1])
        other = QUESTIONS[asked.kind][2].format_map(facts)
        if other != right:
            return other, "from another tale"
    raise AssertionError("a question has only one answer")


def _exchanged(tale: Tale, name: str, rules, rng: Random) -> str:
    """Put another value in the last place where a name is repeated."""
    text, value = tale.text.removesuffix(END), tale.plot[name]
    other = _pick(rng, [v for v in rules.values[name] if v != value])
    *_, last = re.finditer(rf"\b{value}\b", text)
    return text[: last.start()] + other + text[last.end() :]


def _other_end(tale: Tale, rules, rng: Random) -> str:
    """Let the tale end as if the other deed had been done."""
    text, plot = tale.text.removesuffix(END), tale.plot
    for start in range(len(text)):  # the first suffix that is an ending
        if rules.derivations(text[start:], "ending", plot):
            deed = "passed" if plot["deed"] == "helped" else "helped"
            return text[:start] + rules.sample(rng, "ending", {**plot, "deed": deed})[0]
    raise AssertionError("a tale without an ending")


def _sentences(tale: Tale) -> list[str]:
    return re.split(r"(?<=[.!?\"]) (?=[A-Z\"])", tale.text.removesuffix(END))


def _twice(tale: Tale, rules, rng: Random) -> str:
    sentences = _sentences(tale)
    place = 1 + int(rng.random() * (len(sentences) - 1))
    return " ".join(sentences[:place] + sentences[place - 1 :])


def _cut(tale: Tale, rules, rng: Random) -> str:
    sentences = _sentences(tale)
    return " ".join(sentences[: 1 + int(rng.random() * (len(sentences) - 1))])


def _another(tale: Tale, rules, rng: Random) -> str:
    while True:
        text, plot = rules.sample(rng)
        if plot["hero"] != tale.plot["hero"]:
            return text.removesuffix(END)


SPOILERS = {
    "another name at the end": lambda *a: _exchanged(a[0], "hero", *a[1:]),
    "another colour at the end": lambda *a: _exchanged(a[0], "colour", *a[1:]),
    "an end that does not follow": _other_end,
    "a sentence twice": _twice,
    "stops early": _cut,
    "a tale about someone else": _another,
}
