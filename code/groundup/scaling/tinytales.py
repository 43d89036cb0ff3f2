"""TinyTales: any number of small texts of four kinds, from a language known exactly.

Here: the configuration, the drawing of tale number i without the tales before it, and
texts and corpora made of them. Left out: the rules themselves (`tale_stories`,
`tale_domains`), their entropy (`story_entropy`), and tasks with answers (`tale_views`).

Every tale ends with a blank line and holds no other. Page:
book/4-scaling/synthetic_data.md.
"""

import hashlib
from bisect import bisect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from random import Random

from groundup.foundations.fitting import byte_tensor
from groundup.scaling.tale_domains import dialogues, programs, sums
from groundup.scaling.tale_grammar import Grammar
from groundup.scaling.tale_stories import stories
from groundup.training.batching import Corpus, Split

DOMAINS = {
    "stories": stories,
    "dialogues": dialogues,
    "sums": sums,
    "programs": programs,
}
SPLITS = ("train", "validation", "test")
SHARES = (80, 90, 100)  # of a hundred texts, when texts are split by their hash
MOST_TRIES = 10_000


@dataclass(frozen=True)
class TalesConfig:
    """Which tales, how hard, and how many.

    Raises:
        ValueError: a field is out of its range.
    """

    domains: tuple[str, ...] = ("stories",)
    shares: tuple[float | int, ...] | None = (
        None  # of the tales, by domain; None: equal
    )
    # Stories, dialogues: 1 to 3; digits of sums; lines of programs. Or one a domain.
    difficulty: int | tuple[int, ...] = 1
    seed: int = 0  # another seed, other tales
    n_train: int = 2000  # tales
    n_validation: int = 200
    n_test: int = 200
    disjoint: bool = False  # no text in two splits: the hash of a text decides

    def __post_init__(self) -> None:
        names = self.domains
        unknown = not names or len(set(names)) < len(names) or set(names) - set(DOMAINS)
        if unknown:
            raise ValueError(
                f"domains must be different ones of {sorted(DOMAINS)}; got {names}"
            )
        shares = self.shares
        if shares is not None and (
            len(shares) != len(names) or not all(s > 0 for s in shares)
        ):
            raise ValueError(
                f"shares must be a positive number for each of {names}; got {shares}"
            )
        for name in ("n_train", "n_validation", "n_test"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be at least 1; got {getattr(self, name)}"
                )
        if isinstance(self.difficulty, tuple) and len(self.difficulty) != len(names):
            raise ValueError(
                f"difficulty must be one number, or one for each of {names}; "
                f"got {self.difficulty}"
            )
        for name, level in self.levels.items():
            grammar(name, level)

    @property
    def levels(self) -> dict[str, int]:
        """The difficulty of each domain."""
        level = self.difficulty
        levels = level if isinstance(level, tuple) else (level,) * len(self.domains)
        return dict(zip(self.domains, levels, strict=True))

    @property
    def weights(self) -> dict[str, float]:
        """The probability of each domain."""
        shares = self.shares or (1.0,) * len(self.domains)
        return {d: s / sum(shares) for d, s in zip(self.domains, shares, strict=True)}

    def count(self, split: str) -> int:
        """Return the number of tales in a split.

        Raises:
            ValueError: there is no such split.
        """
        if split not in SPLITS:
            raise ValueError(f"split must be one of {SPLITS}; got {split!r}")
        return getattr(self, f"n_{split}")


@dataclass(frozen=True)
class Tale:
    """A text, and the choices behind it by name."""

    domain: str
    text: str
    plot: Mapping[str, str]


@cache
def grammar(domain: str, difficulty: int) -> Grammar:
    """Return the grammar of a domain.

    Raises:
        ValueError: there is no such domain, or it has no such difficulty.
    """
    if domain not in DOMAINS:
        raise ValueError(f"domain must be one of {sorted(DOMAINS)}; got {domain!r}")
    return DOMAINS[domain](difficulty)


def random_for(config: TalesConfig, *words: object) -> Random:
    """Return a random generator for one purpose; the sizes of config play no part."""
    key = (config.seed, config.levels, config.weights, *words)
    return Random(_hash(repr(key)))


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def split_of(text: str) -> str:
    """Return the split that a text belongs to when config.disjoint is set."""
    return SPLITS[bisect(SHARES, _hash(text) % 100)]


def draw(config: TalesConfig, index: int, split: str = "train") -> Tale:
    """Return tale number index of a split: always the same, however many are drawn.

    Raises:
        ValueError: index is negative, there is no such split, or, with
            `config.disjoint`, no text of this language belongs to the split.
    """
    config.count(split)
    if index < 0:
        raise ValueError(f"index must not be negative; got {index}")
    rng = random_for(config, split, index)
    for _ in range(MOST_TRIES):
        rising = list(accumulate(config.weights.values()))
        place = min(bisect(rising, rng.random()), len(rising) - 1)
        domain = config.domains[place]
        text, plot = grammar(domain, config.levels[domain]).sample(rng)
        if not config.disjoint or split_of(text) == split:
            return Tale(domain, text, plot)
    raise ValueError(f"found no text of the split {split!r} in {MOST_TRIES} tries")


def tales(
    config: TalesConfig, split: str = "train", n: int | None = None
) -> list[Tale]:
    """Return the first n tales of a split (None: as many as config says)."""
    n = config.count(split) if n is None else n
    return [draw(config, index, split) for index in range(n)]


def text_of(config: TalesConfig, split: str = "train", n: int | None = None) -> str:
    """Return the first n tales of a split as one text."""
    return "".join(tale.text for tale in tales(config, split, n))


def tales_split(config: TalesConfig) -> Split:
    """Return the three splits as byte corpora, each one document.

    A window may begin in one tale and end in the next; the blank line between them
    is part of the language.
    """
    return Split(*(Corpus.of([byte_tensor(text_of(config, s))]) for s in SPLITS))


def read(config: TalesConfig, text: str) -> Tale | None:
    """Find the tale behind a text; None if it is not in the language of config."""
    for domain, level in config.levels.items():
        for found in grammar(domain, level).derivations(text):
            return Tale(domain, text, found.plot)
    return None
