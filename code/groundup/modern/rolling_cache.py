"""The rolling cache: an endless text in a constant number of slots.

Here: a ring buffer that keeps the first tokens and the last `window`, with absolute
positions, or with positions counted inside the cache. Left out: eight-bit storage
(`quantised_cache`).

Slot s < n_sinks holds the token at position s. The token at a later position p lies in
slot n_sinks + (p - n_sinks) mod window, where the token at p - window lay: it goes when
it leaves the window, and nothing is moved.

Source: Jiang et al. (2023), section 2 (the ring); Xiao et al. (2024), section 3.2
(sinks, positions inside the cache). Page: book/3-modern/rolling_cache.md.
Axes: `B` batch, `T` new tokens, `S` keys, `G` key/value heads, `D` head size.
"""

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Int, Num
from torch import Tensor

from groundup.modern.attention_sinks import farthest
from groundup.modern.kv_cache import KVCache, Sizes, check_rows
from groundup.modern.rope import rope_tables, rotate
from groundup.modern.sliding_window import NOTHING


@runtime_checkable
class WindowSizes(Sizes, Protocol):
    """What a rolling cache asks of a model's config."""

    window: int | None
    n_sinks: int
    rope_theta: float


def ring_slots(
    positions: Int[Tensor, "B T"],
    last: Int[Tensor, "B 1"],
    window: int,
    n_sinks: int = 0,
) -> Int[Tensor, "B T"]:
    """Return the slot of every token, once the token at `last` is read.

    Tokens that are out of the window by then, and padding, get slot n_sinks + window,
    which nobody reads.

    Args:
        positions: of the tokens.
        last: greatest position of each row.
        window: tokens kept, besides the sinks.
        n_sinks: first tokens that stay.

    Example: window 4 and 2 sinks put the tokens 0 to 7 into 0, 1, 2, 3, 4, 5, 2, 3.
    """
    ring = n_sinks + (positions - n_sinks) % window
    kept = (positions > NOTHING) & (last - positions < window)
    slots = torch.where(kept, ring, n_sinks + window)
    sink = (positions > NOTHING) & (positions < n_sinks)
    return torch.where(sink, positions, slots)


class RollingCache(KVCache):
    """The sinks and the last `window` tokens of each row, whatever was read before.

    Args:
        sizes: of the model, a `DecoderConfig` with a window.
        batch: rows.
        dtype: of keys and values.
        device: where they are kept.
        reindexed: count positions inside the cache (`attention_sinks.farthest`): the
            sinks then stay at the distance that they have when it becomes full. False:
            positions are those in the text.

    Raises:
        ValueError: the model has no window, so nothing may be forgotten.
    """

    def __init__(
        self,
        sizes: WindowSizes,
        *,
        batch: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        reindexed: bool = False,
    ) -> None:
        if sizes.window is None:
            raise ValueError(
                "sizes.window is None: the model looks at every token, and a rolling "
                "cache forgets; set a window, or use a KVCache"
            )
        self.window, self.n_sinks = sizes.window, sizes.n_sinks
        room = {"batch": batch, "dtype": dtype, "device": device}
        # One slot more than is read: it takes what is not kept.
        super().__init__(sizes, self.n_sinks + self.window + 1, **room)
        self.last = torch.full((batch, 1), NOTHING, device=device)
        self.theta = sizes.rope_theta if reindexed and self.n_sinks else None
        self.sinks = [  # their keys as they came
            torch.zeros_like(k[:, :, : self.n_sinks])
            for k in (self.keys if self.theta else ())
        ]

    @property
    def n_bytes(self) -> int:
        """Memory of keys and values, used or not."""
        return super().n_bytes + sum(k.nbytes for k in self.sinks)

    @property
    def n_held(self) -> Int[Tensor, "B"]:
        """Tokens held in each row: all, at most n_sinks + window."""
        return (self.last[:, 0] + 1).clamp(max=self.n_sinks + self.window)

    def next_positions(self, n_new: int) -> Int[Tensor, "B T"]:
        """Return the positions of the n_new tokens that follow what was read."""
        return self.last + 1 + torch.arange(n_new, device=self.last.device)

    def extend(self, positions: Int[Tensor, "B T"]) -> Int[Tensor, "B S"]:
        """Take tokens at these positions; return those of all keys that `put` returns.

        A single token overwrites the one that leaves the window for it. Of several, the
        first still need what the last push out: they get what was held, and themselves.

        Raises:
            ValueError: of another number of rows; not rising in a row; or several at
                once into a full reindexed cache, where each sees the sinks elsewhere.
        """
        check_rows(self.positions, positions)
        seen = torch.cat((self.last, positions), 1).cummax(1).values
        if ((positions > NOTHING) & (positions <= seen[:, :-1])).any():
            raise ValueError(
                f"positions must rise in every row, after {self.last[:, 0].tolist()}; "
                f"got {positions.tolist()}"
            )
        full, several = self.n_sinks + self.window, positions.shape[1] > 1
        last = seen[:, -1:]
        if self.theta:
            self._turn_sinks(positions, last)
        rows = torch.arange(len(positions), device=positions.device)[:, None]
        self._new = rows, ring_slots(positions, last, self.window, self.n_sinks)
        self._n_old = self.length
        held = self.positions[:, : self.length]
        found = torch.cat((held, positions), 1) if several else None
        self.positions[self._new] = positions
        self.positions[:, full] = NOTHING
        self.last, self.length = last, min(int(last.max()) + 1, full)
        return found if several else self.positions[:, : self.length]

    def _turn_sinks(self, positions: Tensor, last: Tensor) -> None:
        """Prepare how far the sinks are moved, a row each, and which are new."""
        most = farthest(self.window, self.n_sinks)
        shift = (last - most).clamp(min=0)
        if positions.shape[1] > 1 and shift.any():
            raise ValueError(
                f"a reindexed cache of {self.n_sinks} sinks and window={self.window} "
                f"takes several tokens at once only up to position {most}; feed the "
                f"rest one by one"
            )
        wide = torch.promote_types(self.keys[0].dtype, torch.float32)
        shift = shift.expand(-1, self.n_sinks)[:, None]  # for all heads
        self._turn = rope_tables(shift, self.keys[0].shape[-1], self.theta, wide)
        self._new_sinks = (positions > NOTHING) & (positions < self.n_sinks)

    def put(
        self, layer: int, k: Num[Tensor, "B G T D"], v: Num[Tensor, "B G T D"]
    ) -> tuple[Num[Tensor, "B G S D"], Num[Tensor, "B G S D"]]:
        """Keep what stays; return what the new tokens may see, one token's uncopied."""
        found = []
        for kept, new in ((self.keys[layer], k), (self.values[layer], v)):
            if k.shape[2] > 1:
                found.append(torch.cat((kept[:, :, : self._n_old], new), 2))
            rows, slots = self._new
            kept[rows, :, slots] = new.transpose(1, 2)
            if k.shape[2] == 1:
                found.append(kept[:, :, : self.length])
        if self.theta:
            sinks = self.sinks[layer]
            row, column = self._new_sinks.nonzero(as_tuple=True)
            sinks[row, :, self._new[1][row, column]] = k[row, :, column]
            self.keys[layer][:, :, : self.n_sinks] = rotate(sinks, *self._turn)
        return found[0], found[1]
