"""From plays to batches: a split by document, windows, targets shifted by one.

Here: a corpus of documents that knows where each ends, random windows for training,
fixed windows for evaluation, a split that never divides a document, and two measures
of what leaked from one part into another: shared n-grams, and the loss of a guesser
that can only copy. Left out: packing documents of different lengths (Part 6), loading
data in the background.

Page: book/2-training/batching.md.
Axes: `N` tokens of a text, `M` n-grams, `W` windows, `B` batch, `T` context.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from groundup.foundations.fitting import N_BYTES, byte_tensor
from groundup.foundations.shakespeare import plays

# Plays that no model of this book is trained on.
VALIDATION_PLAYS = ("Twelfth Night",)
TEST_PLAYS = ("Macbeth",)

HASH_FACTOR = 0x5851F42D4C957F2D  # odd, of mixed bits (Knuth's MMIX generator)
PRIOR = 0.01  # added to each count of a pair, so that none is impossible


@dataclass(frozen=True)
class Corpus:
    """Documents end to end; a window lies inside one of them.

    Args:
        tokens: ids of all documents, one after the other.
        ends: where each document ends, rising; the last is len(tokens).

    Raises:
        ValueError: ends do not rise to len(tokens).
    """

    tokens: Int[Tensor, "N"]
    ends: tuple[int, ...]

    def __post_init__(self) -> None:
        edges = (0, *self.ends)
        rising = all(a < b for a, b in pairwise(edges))
        if not self.ends or not rising or self.ends[-1] != len(self.tokens):
            raise ValueError(
                f"ends must rise from above 0 to {len(self.tokens)}, the number of "
                f"tokens; got {self.ends}"
            )

    @classmethod
    def of(cls, documents: Sequence[Int[Tensor, "_"]]) -> "Corpus":
        """Lay documents end to end.

        Raises:
            ValueError: there is none, or one is empty.
        """
        if not documents or any(len(d) == 0 for d in documents):
            raise ValueError(
                f"documents must not be empty; got lengths "
                f"{[len(d) for d in documents]}"
            )
        lengths = torch.tensor([len(d) for d in documents])
        return cls(torch.cat(list(documents)), tuple(lengths.cumsum(0).tolist()))

    def __len__(self) -> int:
        return len(self.tokens)

    def sample(
        self, batch: int, context: int, generator: torch.Generator
    ) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
        """Draw windows, every start equally likely; targets are shifted by one.

        Raises:
            ValueError: no document holds context + 1 tokens.
        """
        before, n_starts = self._starts(context)
        drawn = torch.randint(int(n_starts.sum()), (batch,), generator=generator)
        after = n_starts.cumsum(0)
        document = torch.searchsorted(after, drawn, right=True)
        within = drawn - (after - n_starts)[document]
        return self._cut(before[document] + within, context)

    def windows(self, context: int) -> tuple[Int[Tensor, "W T"], Int[Tensor, "W T"]]:
        """Return fixed windows without overlap, document by document.

        What is left over at the end of a document is not in any window.

        Raises:
            ValueError: no document holds context + 1 tokens.
        """
        pairs = zip(*(t.tolist() for t in self._starts(context)), strict=True)
        return self._cut(
            torch.cat([torch.arange(a, a + n, context) for a, n in pairs]), context
        )

    def _starts(self, context: int) -> tuple[Tensor, Tensor]:
        """Where each document begins, and how many windows can start in it."""
        ends = torch.tensor(self.ends)
        begins = torch.cat((torch.zeros(1, dtype=ends.dtype), ends[:-1]))
        n_starts = (ends - begins - context).clamp(min=0)
        if context < 1 or not n_starts.any():
            raise ValueError(
                f"context must be at least 1 and below the longest document's "
                f"{int((ends - begins).max())} tokens; got {context}"
            )
        return begins, n_starts

    def _cut(self, starts: Tensor, context: int) -> tuple[Tensor, Tensor]:
        windows = self.tokens[starts[:, None] + torch.arange(context + 1)]
        return windows[:, :-1], windows[:, 1:]


class Split(NamedTuple):
    """Three corpora without a document in common."""

    train: Corpus
    validation: Corpus
    test: Corpus


def split_documents(
    documents: Mapping[str, str],
    validation: Sequence[str],
    test: Sequence[str],
) -> Split:
    """Put whole documents, by name, into validation and test; the rest is for training.

    Raises:
        ValueError: a name is unknown or appears twice, or a part would be empty.
    """
    held_out = [*validation, *test]
    unknown = [name for name in held_out if name not in documents]
    if unknown or len(set(held_out)) < len(held_out):
        raise ValueError(
            f"validation and test must name different documents of "
            f"{sorted(documents)}; got {held_out}"
        )
    names = ([n for n in documents if n not in held_out], list(validation), list(test))
    return Split(
        *(Corpus.of([byte_tensor(documents[n]) for n in part]) for part in names)
    )


@cache
def shakespeare_split() -> Split:
    """Return the plays, as bytes: 36 to train on, one to validate, one to test.

    Raises:
        AssetError: the plays are not in the cache and cannot be downloaded.
    """
    return split_documents(plays(), VALIDATION_PLAYS, TEST_PLAYS)


def epoch(
    corpus: Corpus, batch: int, context: int, generator: torch.Generator
) -> Iterator[tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]]:
    """Yield the fixed windows of corpus in random order, each once.

    The last batch is smaller where batch does not divide their number.

    Raises:
        ValueError: batch is not positive, or no document holds context + 1 tokens.
    """
    if batch < 1:
        raise ValueError(f"batch must be at least 1; got {batch}")
    x, y = corpus.windows(context)
    for chosen in torch.randperm(len(x), generator=generator).split(batch):
        yield x[chosen], y[chosen]


def expected_coverage(n_windows: int, n_drawn: int) -> float:
    """Return the share of n_windows seen after n_drawn draws with replacement.

    1 - (1 - 1/n)^m, close to 1 - exp(-m/n): 63 % after as many draws as windows.
    """
    return 1 - (1 - 1 / n_windows) ** n_drawn


def ngram_hashes(tokens: Int[Tensor, "*rows N"], n: int) -> Int[Tensor, "*rows M"]:
    """Return a 64-bit hash of every n tokens in a row; M = N - n + 1, or 0.

    The polynomial with the tokens as coefficients, at HASH_FACTOR. Equal n-grams have
    equal hashes; that two different ones among the five million of the plays share a
    hash has, as for random numbers, a probability of about one in a million.

    Raises:
        ValueError: n is not positive.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1; got {n}")
    length = tokens.shape[-1] - n + 1
    if length < 1:
        return tokens.new_empty((*tokens.shape[:-1], 0))
    hashes = torch.zeros_like(tokens[..., :length])
    for k in range(n):  # int64 wraps around: arithmetic modulo 2^64
        hashes = (hashes + tokens[..., k : k + length] + 1) * HASH_FACTOR
    return hashes


def shared_ngrams(
    train: Sequence[Int[Tensor, "..."]],
    held_out: Sequence[Int[Tensor, "..."]],
    n: int,
) -> float:
    """Return the share of the n-grams of held_out that occur in train as well.

    Args:
        train: texts, or windows as the rows of a matrix. N-grams lie inside one.
        held_out: the same.
        n: tokens.

    Raises:
        ValueError: n is not positive, or held_out has no text of n tokens.
    """
    known, asked = (
        torch.cat([ngram_hashes(text, n).flatten() for text in texts])
        for texts in (train, held_out)
    )
    if len(asked) == 0:
        raise ValueError(f"held_out must have a text of n={n} tokens or more")
    return torch.isin(asked, known).double().mean().item()


def copying_losses(
    train: Sequence[Int[Tensor, "..."]],
    held_out: Sequence[Int[Tensor, "..."]],
    *,
    memory: int,
    trust: float = 0.9,
) -> Float[Tensor, "M"]:
    """Return what a guesser pays that remembers its training text and nothing else.

    It looks for the last `memory` tokens in the training text. Where they stand (at
    the first place, if at several) it gives the token that followed the probability
    `trust`; the rest, or all if they stand nowhere, goes to a table of pairs.

    Args:
        train: texts of bytes, or windows as the rows of a matrix.
        held_out: the same.
        memory: tokens, 1 or more.
        trust: in [0, 1).

    Returns:
        Nats, for every token of held_out that has `memory` tokens before it.

    Raises:
        ValueError: memory is not positive, trust is outside [0, 1), or no text of
            train has more than `memory` tokens.
    """
    if not 0 <= trust < 1:
        raise ValueError(f"trust must be in [0, 1); got {trust}")

    def cut(texts: Sequence[Tensor]) -> tuple[Tensor, ...]:
        parts = [
            (
                ngram_hashes(text[..., :-1], memory).flatten(),
                text[..., memory - 1 : -1].flatten(),
                text[..., memory:].flatten(),
            )
            for text in texts
        ]
        return tuple(torch.cat(part) for part in zip(*parts, strict=True))

    (known, before, after), (asked, last, target) = cut(train), cut(held_out)
    if len(known) == 0:
        raise ValueError(f"train must have a text of more than memory={memory} tokens")
    pairs = torch.bincount(before * N_BYTES + after, minlength=N_BYTES**2)
    pairs = pairs.view(N_BYTES, N_BYTES).double() + PRIOR
    p = (pairs / pairs.sum(1, keepdim=True))[last, target]
    known, order = known.sort(stable=True)
    place = torch.searchsorted(known, asked).clamp(max=len(known) - 1)
    found = known[place] == asked
    hit = after[order[place]] == target
    return -torch.where(found, trust * hit + (1 - trust) * p, p).log()
