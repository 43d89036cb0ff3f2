"""A grammar with memory: text as a chain of choices, forwards and backwards.

Here: rules whose options may remember a word and repeat it later, drawing a text,
finding the choices behind a given text, the probability of every prefix byte by byte,
and the nearest derivation of a text that breaks the rules, with what it breaks. Left
out: what is said (`tale_domains`, `tale_stories`) and how much (`story_entropy`).

A template holds words, `<rule>` for a choice to be made there, and `{name}` for what
an earlier choice has bound to that name (`{Name}`: the same, with a capital). All
texts are ASCII: one character is one byte. Page: book/4-scaling/synthetic_data.md.
"""

import heapq
import math
import re
from bisect import bisect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate, count
from random import Random
from typing import NamedTuple

PART = re.compile(r"<(\w+)>|\{(\w+)\}")
MOST_STEPS = 20_000  # of the search for the nearest derivation


@dataclass(frozen=True)
class Option:
    """One way to go on: a template, how likely it is, and what it binds.

    The names are bound before the template is filled in.
    """

    text: str
    weight: float | int = 1.0
    binds: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Rule:
    """A choice. With `by`, the value bound to that name says between which options."""

    options: Mapping[str, tuple[Option, ...]]
    by: str | None = None


@dataclass(frozen=True)
class Computed:
    """A name whose value follows from the bound ones, as a sum from its terms."""

    value: Callable[[Mapping[str, str]], str]
    mean_bytes: float  # expected length
    pattern: str  # regular expression that any value matches


def one_of(*options: str | Option) -> Rule:
    """Return a choice between options; plain strings have weight 1."""
    return Rule({"": _options(options)})


def by(name: str, **options: str | tuple[str | Option, ...]) -> Rule:
    """Return a choice whose options depend on what is bound to name."""
    return Rule(
        {
            key: _options(found if isinstance(found, tuple) else (found,))
            for key, found in options.items()
        },
        name,
    )


def _options(options: tuple[str | Option, ...]) -> tuple[Option, ...]:
    return tuple(Option(o) if isinstance(o, str) else o for o in options)


class Name(NamedTuple):
    """A part of a template that repeats what is bound to a name."""

    name: str


class Choice(NamedTuple):
    """A part of a template where a rule is applied."""

    rule: str


Part = str | Name | Choice
Stack = tuple | None  # (part, rest), what is still to be written


class Compiled(NamedTuple):
    """An option, ready for use."""

    logp: float
    parts: tuple[Part, ...]
    binds: Mapping[str, str]


class Derivation(NamedTuple):
    """The choices behind a text: their log-probability, in nats, and what they bind."""

    logp: float
    plot: dict[str, str]


class Nearest(NamedTuple):
    """How well a text fits the grammar when memory may fail.

    `faults` says where a word is repeated wrongly or a rule was used that the plot
    forbids. With `plot` None the text leaves the grammar at byte `reach`.
    """

    plot: dict[str, str] | None
    faults: tuple[str, ...]
    reach: int


class Grammar:
    """Rules, where they start, and the names that are computed.

    Raises:
        ValueError: a template names a rule that is not there, or a weight is not
            positive.
    """

    def __init__(
        self,
        rules: Mapping[str, Rule],
        start: str,
        computed: Mapping[str, Computed] | None = None,
    ) -> None:
        self.rules, self.computed = dict(rules), dict(computed or {})
        self.start: Stack = (Choice(start), None)
        self.values: dict[str, list[str]] = {}  # all that can be bound to a name
        self._compiled: dict[str, dict[str, tuple[list[float], list[Compiled]]]] = {}
        for name, rule in rules.items():
            self._compiled[name] = {k: self._ready(o) for k, o in rule.options.items()}
        for option in self.options():
            for part in option.parts:
                if isinstance(part, Choice) and part.rule not in self.rules:
                    raise ValueError(f"there is no rule {part.rule!r}")

    def _ready(self, options: tuple[Option, ...]) -> tuple[list[float], list[Compiled]]:
        total = sum(o.weight for o in options)
        if not options or not all(o.weight > 0 for o in options):
            raise ValueError(f"weights must be positive; got {options}")
        compiled = []
        for o in options:
            parts: list[Part] = []
            end = 0
            for found in PART.finditer(o.text):
                parts.append(o.text[end : found.start()])
                rule, name = found.groups()
                parts.append(Choice(rule) if rule else Name(name))
                end = found.end()
            parts.append(o.text[end:])
            kept = tuple(p for p in parts if p != "")
            compiled.append(Compiled(math.log(o.weight / total), kept, o.binds))
            for name, value in o.binds.items():
                if value not in self.values.setdefault(name, []):
                    self.values[name].append(value)
        return list(accumulate(o.weight / total for o in options)), compiled

    def options(self) -> Iterator[Compiled]:
        """Yield every option of every rule."""
        for branches in self._compiled.values():
            for _, options in branches.values():
                yield from options

    def branch(
        self, rule: str, plot: Mapping[str, str]
    ) -> tuple[list[float], list[Compiled]]:
        """Return the options of a rule under a plot, with their rising shares."""
        key = self.rules[rule].by
        return self._compiled[rule]["" if key is None else plot[key]]

    def branches(self, rule: str) -> Mapping[str, tuple[list[float], list[Compiled]]]:
        """Return the options of a rule for every value of the name it depends on."""
        return self._compiled[rule]

    def value(self, name: str, plot: Mapping[str, str]) -> str:
        """Return what `{name}` stands for."""
        if name in plot:
            return plot[name]
        if name in self.computed:
            return self.computed[name].value(plot)
        word = plot[name.lower()]
        return word[0].upper() + word[1:]

    def sample(
        self,
        rng: Random,
        rule: str | None = None,
        plot: Mapping[str, str] | None = None,
    ) -> tuple[str, dict[str, str]]:
        """Draw a text and the plot behind it; uses `rng.random` alone.

        Args:
            rng: source of chance.
            rule: where to start; None: a whole text.
            plot: what is bound already.
        """
        plot = dict(plot or {})
        said: list[str] = []
        stack = self.start if rule is None else (Choice(rule), None)
        while stack is not None:
            part, stack = stack
            if isinstance(part, str):
                said.append(part)
            elif isinstance(part, Name):
                said.append(self.value(part.name, plot))
            else:
                shares, options = self.branch(part.rule, plot)
                place = min(bisect(shares, rng.random()), len(options) - 1)
                plot.update(options[place].binds)
                stack = push(options[place].parts, stack)
        return "".join(said), plot

    def derivations(
        self,
        text: str,
        rule: str | None = None,
        plot: Mapping[str, str] | None = None,
    ) -> list[Derivation]:
        """Return every way to write text: none if it is not in the language.

        Args:
            text: what was written.
            rule: where to start; None: a whole text.
            plot: what is bound already.
        """
        found = []
        start = self.start if rule is None else (Choice(rule), None)
        states: list[tuple[int, float, Stack, dict]] = [(0, 0.0, start, plot or {})]
        while states:
            at, logp, stack, plot = states.pop()
            while stack is not None and not isinstance(stack[0], Choice):
                part, stack = stack
                word = part if isinstance(part, str) else self.value(part.name, plot)
                if not text.startswith(word, at):
                    break
                at += len(word)
            else:
                if stack is None:
                    if at == len(text):
                        found.append(Derivation(logp, plot))
                    continue
                part, rest = stack
                for option in self.branch(part.rule, plot)[1]:
                    after = {**plot, **option.binds}
                    stack = push(option.parts, rest)
                    states.append((at, logp + option.logp, stack, after))
        return found

    def nearest(self, text: str) -> Nearest:
        """Return the derivation of text with the fewest broken promises.

        Every `{name}` may be any value of that name and every choice may be taken from
        any branch; each that is not what the plot says is a fault.
        """
        tie, reach = count(), 0
        queue: list[tuple] = [(0, 0, next(tie), self.start, {}, ())]
        while queue and next(tie) < MOST_STEPS:
            _, at, _, stack, plot, faults = heapq.heappop(queue)
            at = -at
            reach = max(reach, at)
            if stack is None:
                if at == len(text):
                    return Nearest(plot, faults, at)
                continue
            part, rest = stack
            for step, after, new, fault in self._loosely(part, plot, text, at):
                more = faults if fault is None else (*faults, fault)
                entry = (len(more), -at - step, next(tie), push(new, rest), after, more)
                heapq.heappush(queue, entry)
            if isinstance(part, str):
                agrees = next(
                    (i for i, c in enumerate(part) if text[at + i : at + i + 1] != c),
                    len(part),
                )
                reach = max(reach, at + agrees)
        return Nearest(None, (), reach)

    def _loosely(
        self, part: Part, plot: dict, text: str, at: int
    ) -> Iterator[tuple[int, dict, tuple, str | None]]:
        """Yield (bytes read, plot, parts to push, fault) for each way past a part."""
        if isinstance(part, str):
            if text.startswith(part, at):
                yield len(part), plot, (), None
        elif isinstance(part, Name):
            meant = self.value(part.name, plot)
            words = {meant, *self._possible(part.name, text, at)}
            for word in sorted(words):
                if text.startswith(word, at):
                    fault = f"{part.name.lower()} is {meant!r}; the text says {word!r}"
                    yield len(word), plot, (), None if word == meant else fault
        else:
            key = self.rules[part.rule].by
            for value, (_, options) in self.branches(part.rule).items():
                fault = None
                if key is not None and plot[key] != value:
                    fault = f"{key} is {plot[key]!r}; the text goes on as for {value!r}"
                for option in options:
                    yield 0, {**plot, **option.binds}, option.parts, fault

    def _possible(self, name: str, text: str, at: int) -> list[str]:
        if name in self.computed:
            found = re.compile(self.computed[name].pattern).match(text, at)
            return [found[0]] if found else []
        if name in self.values:
            return self.values[name]
        return [word[0].upper() + word[1:] for word in self.values[name.lower()]]


def push(parts: tuple[Part, ...], stack: Stack) -> Stack:
    """Return stack with parts on top, the first uppermost."""
    for part in reversed(parts):
        stack = (part, stack)
    return stack
