"""Counting models: what the last few bytes say about the next, without training.

Here: n-grams of any order up to seven as sorted tables, smoothed by interpolation (each
order leans on the one below by as much as its strength says), and the strengths chosen
on held-out training text. Left out: Kneser-Ney's corrected lower orders, counts that
keep growing while the text is read.

Source: MacKay and Bauman Peto (1995) for the smoothing. Page:
book/2-training/evaluation.md.
Axes: `N` tokens of a text, `M` grams, `V` vocabulary (256).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from groundup.foundations.fitting import N_BYTES
from groundup.training.batching import Corpus

MAX_ORDER = 7  # seven bytes fit into an int64 with its sign
STRENGTHS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)  # tried for each order


def gram_codes(ids: Int[Tensor, "N"], order: int) -> Int[Tensor, "M"]:
    """Write every `order` neighbouring bytes as one integer in base 256.

    Example: `gram_codes(tensor([1, 2, 3]), 2)` is `[1 * 256 + 2, 2 * 256 + 3]`.

    Raises:
        ValueError: order is not in 1..7.
    """
    if not 1 <= order <= MAX_ORDER:
        raise ValueError(f"order must lie in 1..{MAX_ORDER}; got {order}")
    n_grams = max(0, len(ids) - order + 1)
    codes = torch.zeros(n_grams, dtype=torch.int64)
    for i in range(order):
        codes = codes * N_BYTES + ids[i : i + n_grams]
    return codes


@dataclass(frozen=True)
class Table:
    """Counts by code, in rising order of the codes."""

    codes: Int[Tensor, "M"]
    counts: Int[Tensor, "M"]

    def look_up(self, codes: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
        """Return the counts of codes, 0 for those that never occurred."""
        if len(self.codes) == 0:
            return torch.zeros_like(codes)
        place = torch.searchsorted(self.codes, codes).clamp(max=len(self.codes) - 1)
        return torch.where(self.codes[place] == codes, self.counts[place], 0)


@dataclass(frozen=True)
class NGram:
    """A model of the next byte that has counted, and interpolates between orders.

    With c the count of a context followed by x and n that of the context, order by
    order from 1/256 up: p(x) = (c + k p_below(x)) / (n + k), where k is the strength.
    A context that was never seen leaves p_below as it is.

    Args:
        grams: counts of 1, 2, ... bytes.
        contexts: counts of the same grams without their last byte.
        strengths: k of each order, in counts.
    """

    grams: tuple[Table, ...]
    contexts: tuple[Table, ...]
    strengths: tuple[float, ...]

    @classmethod
    def of(cls, corpus: Corpus, strengths: Sequence[float]) -> "NGram":
        """Count corpus; the order is the number of strengths. No gram spans documents.

        Raises:
            ValueError: a strength is not positive, or their number is not in 1..7.
        """
        if not all(k > 0 for k in strengths) or not strengths:
            raise ValueError(f"strengths must be positive; got {tuple(strengths)}")
        documents = corpus.tokens.tensor_split(corpus.ends[:-1])
        grams, contexts = [], []
        for order in range(1, len(strengths) + 1):
            codes = torch.cat([gram_codes(d, order) for d in documents])
            # numpy's sort of integers is several times faster than torch's
            ordered = torch.from_numpy(np.sort(codes.numpy()))
            grams.append(Table(*ordered.unique_consecutive(return_counts=True)))
            # From the grams, not from the shorter ones: a document's last bytes are
            # no context, and the probabilities would not sum to 1.
            ordered = ordered // N_BYTES
            contexts.append(Table(*ordered.unique_consecutive(return_counts=True)))
        return cls(tuple(grams), tuple(contexts), tuple(map(float, strengths)))

    def losses(self, ids: Int[Tensor, "N"]) -> Float[Tensor, "N"]:
        """Return -ln p of each byte of one document given those before it, in nats.

        The first bytes have short contexts and use the lower orders alone.
        """
        p = torch.full(ids.shape, 1 / N_BYTES, dtype=torch.float64)
        for order in range(1, len(self.strengths) + 1):
            codes = gram_codes(ids, order)
            p[order - 1 :] = self._mix(order, codes, p[order - 1 :])
        return -p.log()

    def distribution(self, history: Int[Tensor, "_"]) -> Float[Tensor, "V"]:
        """Return the probability of every next byte after history."""
        p = torch.full((N_BYTES,), 1 / N_BYTES, dtype=torch.float64)
        for order in range(1, min(len(self.strengths), len(history) + 1) + 1):
            codes = torch.arange(N_BYTES)
            if order > 1:
                codes = codes + N_BYTES * gram_codes(history[1 - order :], order - 1)
            p = self._mix(order, codes, p)
        return p

    def _mix(self, order: int, codes: Tensor, below: Tensor) -> Tensor:
        strength = self.strengths[order - 1]
        seen = self.grams[order - 1].look_up(codes).double()
        total = self.contexts[order - 1].look_up(codes // N_BYTES).double()
        return (seen + strength * below) / (total + strength)


def fit_ngrams(train: Corpus, order: int) -> list[NGram]:
    """Return counting models of order 1, 2, ... `order`, with their strengths chosen.

    The last document of train is set aside to choose the strengths, from the lowest
    order up; then everything is counted.

    Args:
        train: two documents or more.
        order: of the longest model, in bytes, its last one included.

    Raises:
        ValueError: train has one document only, or order is not in 1..7.
    """
    if len(train.ends) < 2:
        raise ValueError("train must hold at least two documents; got one")
    documents = train.tokens.tensor_split(train.ends[:-1])
    model = NGram.of(Corpus.of(documents[:-1]), [1.0] * order)
    chosen: list[float] = []
    for _ in range(order):
        trials = [replace(model, strengths=(*chosen, k)) for k in STRENGTHS]
        found = [trial.losses(documents[-1]).mean() for trial in trials]
        chosen.append(STRENGTHS[int(torch.stack(found).argmin())])
    model = NGram.of(train, chosen)
    return [replace(model, strengths=tuple(chosen[:n])) for n in range(1, order + 1)]
