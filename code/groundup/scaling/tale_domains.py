"""The other domains of TinyTales: dialogues, sums and tiny programs.

Here: their grammars at several difficulties, the arithmetic behind a sum, and the
evaluator of the tiny language, which reads a program as data: no text is ever run as
Python. Left out: the stories (`tale_stories`), and tasks made of all of them
(`tale_views`).

Page: book/4-scaling/synthetic_data.md.
"""

import re
from collections.abc import Mapping

from groundup.scaling.tale_grammar import Computed, Grammar, Option, Rule, by, one_of
from groundup.scaling.tale_stories import BOYS, COLOURS, GIRLS, THINGS

HOURS = 10  # the tiny language counts modulo ten: every value is one digit
VARIABLES = "abcdefgh"
OPERATIONS = {
    "+": lambda x, y: (x + y) % HOURS,
    "-": lambda x, y: (x - y) % HOURS,
    "*": lambda x, y: (x * y) % HOURS,
}
LINE = re.compile(r"([a-h]) = ([a-h]|\d)(?: ([-+*]) ([a-h]|\d))?")
PRINT = re.compile(r"print ([a-h])")
SPOTS = (
    "under the bed",
    "behind the door",
    "in the kitchen",
    "on the roof",
    "beside the stove",
    "at the window",
)
TIMES = ("at noon", "at six", "after lunch", "before dark", "in an hour", "on Sunday")
MEETING_PLACES = ("at the mill", "by the well", "in the yard", "near the bridge")


def dialogues(difficulty: int) -> Grammar:
    """Return the grammar of talks between two people, of 3, 5 or 7 turns (1, 2, 3).

    Raises:
        ValueError: difficulty is not 1, 2 or 3.
    """
    if difficulty not in (1, 2, 3):
        raise ValueError(f"difficulty of dialogues must be 1, 2, 3; got {difficulty}")
    turns = ("<ask><answer><thanks>", "<what><will>", "<when><then>")
    rules = {
        "talk": one_of("".join(turns[:difficulty]) + "\n"),
        "speaker": one_of(*(Option(name, 1.0, {"first": name}) for name in GIRLS)),
        "other": one_of(*(Option(name, 1.0, {"second": name}) for name in BOYS)),
        "object": one_of("<colour> <thing>"),
        "colour": one_of(*(Option(c, 1.0, {"colour": c}) for c in COLOURS)),
        "thing": one_of(*(Option(t, 1.0, {"thing": t}) for t in THINGS)),
        "use": by("thing", **{t: _now(use) for t, (_, use) in THINGS.items()}),
        "spot": one_of(*(Option(s, 1.0, {"spot": s}) for s in SPOTS)),
        "time": one_of(*(Option(t, 1.0, {"time": t}) for t in TIMES)),
        "there": one_of(*(Option(p, 1.0, {"there": p}) for p in MEETING_PLACES)),
        "ask": one_of(
            "<speaker>: Where is my <object>, <other>?\n",
            "<speaker>: <other>, have you seen my <object>?\n",
        ),
        "answer": one_of(
            "{second}: It is <spot>, {first}.\n",
            "{second}: I saw your {colour} {thing} <spot>.\n",
        ),
        "thanks": one_of(
            "{first}: Thank you, I will look {spot}.\n",
            "{first}: So the {colour} {thing} is {spot}! Thank you, {second}.\n",
        ),
        "what": one_of(
            "{second}: What will you do with it?\n",
            "{second}: Why do you need the {colour} {thing}, {first}?\n",
        ),
        "will": one_of(
            "{first}: I want to <use>.\n",
            "{first}: To <use>, {second}.\n",
        ),
        "when": one_of(
            "{second}: Then let us meet <there> <time>, {first}.\n",
            "{second}: May I come too? I am free <time>, <there>.\n",
        ),
        "then": one_of(
            "{first}: Yes, {time} {there}.\n",
            "{first}: I will bring the {colour} {thing} {there} {time}.\n",
        ),
    }
    return Grammar(rules, "talk")


def _now(use: str) -> str:
    """Turn what was done with a thing into what will be done: "flew it" -> "fly it"."""
    past, rest = use.split(" ", 1)
    verbs = {
        "flew": "fly",
        "sailed": "sail",
        "played": "play",
        "wore": "wear",
        "rang": "ring",
        "rode": "ride",
        "read": "read",
        "lit": "light",
    }
    return f"{verbs[past]} {rest}"


def sums(difficulty: int) -> Grammar:
    """Return the grammar of additions of two numbers of `difficulty` digits.

    Example: `"17 + 25 = 42.\\n\\n"` at difficulty 2. All pairs are equally likely.

    Raises:
        ValueError: difficulty is not 1 to 6.
    """
    if difficulty not in range(1, 7):
        raise ValueError(f"difficulty of sums must be 1 to 6; got {difficulty}")
    rules: dict[str, Rule] = {}
    for term in "xy":
        for place in range(difficulty):
            name = f"{term}{place}"
            digits = range(1 if place == 0 else 0, 10)
            rules[name] = one_of(*(Option(str(n), 1.0, {name: str(n)}) for n in digits))

    def term(letter: str, form: str) -> str:
        return "".join(form % f"{letter}{place}" for place in range(difficulty))

    rules["sum"] = one_of(f"{term('x', '<%s>')} + {term('y', '<%s>')} = {{total}}.\n\n")

    def total(plot: Mapping[str, str]) -> str:
        x, y = (
            int("".join(plot[f"{t}{place}"] for place in range(difficulty)))
            for t in "xy"
        )
        return str(x + y)

    low = 10 ** (difficulty - 1)  # of the 81 low^2 pairs, so many reach 10 low:
    carries = (49 * low**2 - 4 * low) / (81 * low**2)
    return Grammar(
        rules, "sum", {"total": Computed(total, difficulty + carries, r"\d+")}
    )


def programs(difficulty: int) -> Grammar:
    """Return the grammar of programs of `difficulty` assignments, a print, its output.

    Example: `"a = 7\\nb = a + 5\\nprint b\\n> 2\\n\\n"`, since numbers wrap at ten.

    Raises:
        ValueError: difficulty is not 1 to 6.
    """
    if difficulty not in range(1, 7):
        raise ValueError(f"difficulty of programs must be 1 to 6; got {difficulty}")
    rules: dict[str, Rule] = {}
    lines = []
    for i, target in enumerate(VARIABLES[:difficulty]):
        for side in "xy":
            name = f"{side}{i}"
            digits = [Option(str(n), 1.0, {name: str(n)}) for n in range(10)]
            known = [Option(v, 10 / i, {name: v}) for v in VARIABLES[:i]]
            rules[name] = one_of(*digits, *known)
        name = f"op{i}"
        rules[name] = one_of(*(Option(o, 1.0, {name: o}) for o in OPERATIONS))
        lines.append(f"{target} = <x{i}>" + (f" <op{i}> <y{i}>" if i else "") + "\n")
    shown = [Option(v, 1.0, {"shown": v}) for v in VARIABLES[:difficulty]]
    shown[-1] = Option(shown[-1].text, 3.0, shown[-1].binds)  # mostly the last
    rules["shown"] = one_of(*shown)
    rules["program"] = one_of("".join(lines) + "print <shown>\n> {output}\n\n")

    def output(plot: Mapping[str, str]) -> str:
        source = [f"a = {plot['x0']}"]
        for i, target in enumerate(VARIABLES[1:difficulty], 1):
            terms = plot[f"x{i}"], plot[f"op{i}"], plot[f"y{i}"]
            source.append(f"{target} = {' '.join(terms)}")
        return run_program("\n".join([*source, f"print {plot['shown']}"]))

    return Grammar(rules, "program", {"output": Computed(output, 1.0, r"\d")})


def run_program(source: str) -> str:
    """Return what a tiny program prints: one digit.

    Lines are `v = x` or `v = x op y`, the last one is `print v`. Variables are a to h,
    x and y are digits or variables set before, op is `+`, `-` or `*`, modulo ten.

    Raises:
        ValueError: a line is not of the language, or a variable is not set yet.
    """
    values: dict[str, int] = {}

    def look_up(atom: str) -> int:
        if atom.isdigit():
            return int(atom)
        if atom not in values:
            raise ValueError(f"variable {atom!r} is not set")
        return values[atom]

    *lines, last = source.strip("\n").split("\n")
    for line in lines:
        found = LINE.fullmatch(line)
        if found is None:
            raise ValueError(f"line must be like 'b = a + 5'; got {line!r}")
        target, x, op, y = found.groups()
        value = look_up(x)
        values[target] = value if op is None else OPERATIONS[op](value, look_up(y))
    found = PRINT.fullmatch(last)
    if found is None:
        raise ValueError(f"the last line must be like 'print b'; got {last!r}")
    return str(look_up(found[1]))
