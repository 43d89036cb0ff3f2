"""Held-out loss done right: every byte once, and how sure we are of the mean.

Here: windows that together count each token of a text exactly once, with or without a
running start; the losses of those tokens in order; an interval for their mean that
respects neighbours being alike; what a compressor makes of the same bytes. Left out:
questions with right and wrong answers (Part 9).

Sources: Efron (1979) for the bootstrap; Künsch (1989) for blocks of dependent data,
here without overlap. The counting models to compare with are in `ngram`. Page:
book/2-training/evaluation.md.
Axes: `N` tokens, `W` windows, `T` context.
"""

import bz2
import lzma
import zlib
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from groundup.training.batching import Corpus
from groundup.training.loop import window_losses

COMPRESSORS = {
    "gzip": lambda data: zlib.compress(data, 9),  # looks back 32 KiB
    "bzip2": lambda data: bz2.compress(data, 9),  # sorts blocks of 900 kB
    "xz": lambda data: lzma.compress(data, preset=6),  # looks back 8 MiB
}
DRAWS_AT_ONCE = 2**21  # of the bootstrap, to bound its memory


class Windows(NamedTuple):
    """Inputs, targets, and which of the targets count."""

    x: Int[Tensor, "W T"]
    y: Int[Tensor, "W T"]
    counted: Bool[Tensor, "W T"]


def covering_windows(
    corpus: Corpus, context: int, stride: int | None = None
) -> Windows:
    """Cut each document into windows that count every token but its first once.

    A document's first window counts all its targets. Each later one starts `stride`
    further on and counts those that no window has counted yet, at its end. The last is
    pushed back so that it ends with the document.

    Args:
        corpus: what is read.
        context: T, tokens in a window.
        stride: tokens between two starts, from 1 (every token but the first few sees
            T - 1 before it) to T, the default (no window counts part of another).

    Returns:
        Windows, document by document, left to right.

    Raises:
        ValueError: stride is not in 1..context, or a document is shorter than
            context + 1.
    """
    stride = context if stride is None else stride
    if not 1 <= stride <= context:
        raise ValueError(f"stride must lie in 1..context={context}; got {stride}")
    documents = corpus.tokens.tensor_split(corpus.ends[:-1])
    shortest = min(len(document) for document in documents)
    if shortest <= context:
        raise ValueError(
            f"context must be below the shortest document's {shortest} tokens, or "
            f"some would not be counted; got {context}"
        )
    cut, counted, within = [], [], torch.arange(context)
    for document in documents:
        last = len(document) - 1 - context  # start of the last window
        starts = torch.tensor([*range(0, last, stride), last])
        ends = starts + context
        done = torch.cat((torch.zeros(1, dtype=ends.dtype), ends[:-1]))
        cut.append(document[starts[:, None] + torch.arange(context + 1)])
        counted.append(starts[:, None] + within >= done[:, None])
    windows = torch.cat(cut)
    return Windows(windows[:, :-1], windows[:, 1:], torch.cat(counted))


def corpus_losses(
    model: nn.Module, corpus: Corpus, context: int, stride: int | None = None
) -> Float[Tensor, "N"]:
    """Return the loss of every token but each document's first, in order, in nats.

    The model is left in the mode it was found in.

    Args:
        model: maps ids (B, T) to logits (B, T, V).
        corpus, context, stride: as in `covering_windows`. A stride of T / k costs k
            times as much.
    """
    x, y, counted = covering_windows(corpus, context, stride)
    return window_losses(model, x, y)[counted]


@dataclass(frozen=True)
class Interval:
    """A mean and the interval that should hold the true one."""

    mean: float
    low: float
    high: float

    @property
    def width(self) -> float:
        """From end to end."""
        return self.high - self.low

    def scaled(self, factor: float) -> "Interval":
        """Return the interval in another unit."""
        return Interval(self.mean * factor, self.low * factor, self.high * factor)


def bootstrap_interval(
    losses: Float[Tensor, "N"],
    block: int,
    *,
    generator: torch.Generator,
    level: float = 0.95,
    n_resamples: int = 2000,
) -> Interval:
    """Estimate how far the mean of losses may be from that of more such text.

    Blocks of neighbours are drawn with replacement, as many as there are, and the mean
    is taken over their tokens; the interval holds the middle `level` of these means.
    Blocks must be long enough that two of them tell little about each other, and many
    (thirty or more): one of a single block has width 0.

    Args:
        losses: of neighbouring tokens, in order. A difference of two models' losses on
            the same tokens gives the interval of their difference.
        block: tokens in a block; the last one may be shorter.
        generator: of the draws.
        level: share of the means that the interval holds.
        n_resamples: means drawn.

    Raises:
        ValueError: there are no losses, block is not positive, or level is not in
            (0, 1).
    """
    if len(losses) == 0:
        raise ValueError("losses must hold at least one token; got none")
    if block < 1:
        raise ValueError(f"block must be at least 1; got {block}")
    if not 0 < level < 1:
        raise ValueError(f"level must lie in (0, 1); got {level}")
    blocks = losses.double().split(block)
    sums = torch.stack([b.sum() for b in blocks])
    sizes = torch.tensor([len(b) for b in blocks], dtype=torch.float64)
    at_once = max(1, DRAWS_AT_ONCE // len(blocks))
    means = []
    for start in range(0, n_resamples, at_once):
        shape = min(at_once, n_resamples - start), len(blocks)
        drawn = torch.randint(len(blocks), shape, generator=generator)
        means.append(sums[drawn].sum(1) / sizes[drawn].sum(1))
    tail = (1 - level) / 2
    low, high = torch.cat(means).quantile(
        torch.tensor([tail, 1 - tail], dtype=torch.float64)
    )
    return Interval(float(losses.double().mean()), float(low), float(high))


def compressed_bits(data: bytes, method: str, after: bytes = b"") -> float:
    """Return the bits that a compressor needs for each byte of data.

    Args:
        data: what is paid for.
        method: a key of `COMPRESSORS`.
        after: text that the compressor has seen before, not paid for: the size of both
            together less that of `after`. It helps as far as the method looks back.

    Raises:
        ValueError: data is empty, or method is unknown.
    """
    if not data:
        raise ValueError("data must hold at least one byte; got none")
    if method not in COMPRESSORS:
        raise ValueError(f"method must be one of {sorted(COMPRESSORS)}; got {method!r}")
    size = COMPRESSORS[method]
    seen = len(size(after)) if after else 0
    return 8 * (len(size(after + data)) - seen) / len(data)
