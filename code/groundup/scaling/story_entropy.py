"""How much a tale says: entropy in closed form, and the surprise of every byte.

Here: the expected information and length of a tale by recursion over the grammar, the
floor that follows for any model, the probability of a text, and the true probability
of each byte given all before it. Left out: the entropy of text whose grammar is not
known (page 2.6).

Sources: Shannon (1948), section 6; Soule (1974) for the recursion over grammars, here
with a memory; Jelinek and Lafferty (1991) for the probability of prefixes, here by
listing states. Page: book/4-scaling/synthetic_data.md.
Axes: `N` bytes.
"""

import math
from collections.abc import Mapping
from functools import cache
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from groundup.scaling.tale_grammar import Choice, Grammar, Name, Stack, push
from groundup.scaling.tinytales import TalesConfig, grammar

END = "\n\n"


class Expected(NamedTuple):
    """What a tale holds on average."""

    nats: float  # entropy of a tale
    n_bytes: float

    @property
    def nats_per_byte(self) -> float:
        """The floor: no model of an endless row of tales can lose less on average."""
        return self.nats / self.n_bytes

    @property
    def bits_per_byte(self) -> float:
        """The floor in bits."""
        return self.nats_per_byte / math.log(2)


def expected(config: TalesConfig) -> Expected:
    """Return entropy and mean length of a tale, exactly.

    The choice of the domain counts as well: H = H(w) + sum of w_d H_d.
    """
    totals = {d: _of_domain(d, level) for d, level in config.levels.items()}
    weights = config.weights
    return Expected(
        sum(w * (totals[d].nats - math.log(w)) for d, w in weights.items()),
        sum(w * totals[d].n_bytes for d, w in weights.items()),
    )


@cache
def _of_domain(domain: str, difficulty: int) -> Expected:
    return expected_of(grammar(domain, difficulty))


def expected_of(rules: Grammar) -> Expected:
    """Return entropy and mean length of the texts of a grammar, by recursion.

    What is still to be said is a stack of parts. A word adds its length; a choice adds
    `-p ln p` and `p` times what follows, for each of its options. A state is a stack
    with those bound values that still matter to it; each is worked out once.
    """
    free = _mean_lengths(rules)
    needs = _needs(rules, free)
    known: dict[tuple, Expected] = {}

    def of(stack: Stack, plot: Mapping[str, str]) -> Expected:
        nats, n_bytes = 0.0, 0.0
        while stack is not None and not isinstance(stack[0], Choice):
            part, stack = stack
            if isinstance(part, str):
                n_bytes += len(part)
            elif (name := part.name.lower()) in free:
                n_bytes += free[name]
            else:
                n_bytes += len(rules.value(part.name, plot))
        if stack is None:
            return Expected(nats, n_bytes)
        wanted, rest = set(), stack
        while rest is not None:
            part, rest = rest
            wanted |= needs.get(part, frozenset())
        key = stack, tuple((k, v) for k, v in sorted(plot.items()) if k in wanted)
        if key not in known:
            part, rest = stack
            sums = [0.0, 0.0]
            for option in rules.branch(part.rule, plot)[1]:
                p = math.exp(option.logp)
                after = of(push(option.parts, rest), {**plot, **option.binds})
                sums[0] += p * (after.nats - option.logp)
                sums[1] += p * after.n_bytes
            known[key] = Expected(*sums)
        return Expected(nats + known[key].nats, n_bytes + known[key].n_bytes)

    return of(rules.start, {})


def _mean_lengths(rules: Grammar) -> dict[str, float]:
    """The mean length of each name that no choice depends on.

    Such a name is bound by one rule, in any case and in every option, and so is every
    other name of that rule; what it is says nothing about what else happens.
    """
    selecting = {rule.by for rule in rules.rules.values()}
    binders: dict[str, list[str]] = {}
    for rule_name in rules.rules:
        names = {
            name
            for _, options in rules.branches(rule_name).values()
            for option in options
            for name in option.binds
        }
        for name in names:
            binders.setdefault(name, []).append(rule_name)
    free = {name: c.mean_bytes for name, c in rules.computed.items()}
    for name, (first, *others) in binders.items():
        options = [o for _, found in rules.branches(first).values() for o in found]
        if (
            others
            or rules.rules[first].by
            or any(set(o.binds) & selecting for o in options)
        ):
            continue
        if all(name in o.binds for o in options):
            free[name] = sum(math.exp(o.logp) * len(o.binds[name]) for o in options)
    return free


def _needs(rules: Grammar, free: Mapping[str, float]) -> dict:
    """For each part, the names whose values decide what it says or does."""
    needs: dict = {Choice(name): frozenset() for name in rules.rules}
    for option in rules.options():
        for part in option.parts:
            if isinstance(part, Name) and part.name.lower() not in free:
                needs[part] = frozenset({part.name.lower()})
    while True:  # until nothing is added: rules may use each other
        before = dict(needs)
        for name, rule in rules.rules.items():
            parts = [
                part
                for _, options in rules.branches(name).values()
                for option in options
                for part in option.parts
            ]
            found = frozenset() if rule.by is None else frozenset({rule.by})
            needs[Choice(name)] = found.union(*(needs.get(p, ()) for p in parts))
        if needs == before:
            return needs


def log_p(config: TalesConfig, text: str) -> float:
    """Return the log-probability of one tale in nats; -inf outside the language."""
    terms = [
        math.log(weight) + found.logp
        for domain, weight in config.weights.items()
        for found in grammar(domain, config.levels[domain]).derivations(text)
    ]
    if not terms:
        return -math.inf
    largest = max(terms)
    return largest + math.log(sum(math.exp(t - largest) for t in terms))


def surprisals(config: TalesConfig, text: str) -> Float[Tensor, "N"]:
    """Return -ln p of every byte of a row of tales given all before it, in nats.

    They sum to `-log_p` for each tale. Inside a tale all states are kept that could
    have written what was read; the probability of a byte is the share of theirs that
    goes on with it.

    Raises:
        ValueError: text is not a row of whole tales of the language.
    """
    losses = []
    for tale in text.split(END)[:-1]:
        losses += _tale_surprisals(config, tale + END)
    if not text.endswith(END) or len(losses) != len(text):
        raise ValueError(
            "text must be a row of whole tales, each ended by a blank line"
        )
    return torch.tensor(losses, dtype=torch.float64)


def _tale_surprisals(config: TalesConfig, tale: str) -> list[float]:
    states = []  # grammar, probability, text that must come next, stack, plot
    for domain, weight in config.weights.items():
        rules = grammar(domain, config.levels[domain])
        states += _ready(rules, weight, "", rules.start, {})
    losses = []
    for at, letter in enumerate(tale):
        on = []
        for rules, p, pending, stack, plot in states:
            if pending[:1] == letter:
                on += _ready(rules, p, pending[1:], stack, plot)
        if not on:
            raise ValueError(
                f"text leaves the language at byte {at} of {tale[:60]!r}..."
            )
        now = sum(state[1] for state in on)
        losses.append(max(0.0, -math.log(now)))
        states = [(g, p / now, word, stack, plot) for g, p, word, stack, plot in on]
    return losses


def _ready(rules: Grammar, p: float, pending: str, stack: Stack, plot: dict) -> list:
    """Go on until every state has its next byte, branching at choices."""
    if pending or stack is None:
        return [(rules, p, pending, stack, plot)]
    part, rest = stack
    if isinstance(part, str):
        return _ready(rules, p, part, rest, plot)
    if isinstance(part, Name):
        return _ready(rules, p, rules.value(part.name, plot), rest, plot)
    states = []
    for option in rules.branch(part.rule, plot)[1]:
        after, stack = {**plot, **option.binds}, push(option.parts, rest)
        states += _ready(rules, p * math.exp(option.logp), "", stack, after)
    return states
