"""The KV cache: keys and values of what was read, kept for what comes.

Here: the cache of fixed capacity, whose interface all caches share, and generation with
or without one. Left out: caches of constant size for endless text (`rolling_cache`),
how a token is chosen (`training.sampling`).

A forward pass calls `extend` once with the positions of its tokens and gets back the
positions of all keys it may look at; then each layer calls `put` with its new keys and
values and gets back those keys and values, in the same order. Who may see what follows
from the positions alone (`sliding_window.window_mask`), so rows of a batch may have
prompts of different lengths.

Page: book/3-modern/kv_cache.md.
Axes: `B` batch, `T` new tokens, `S` keys, `G` key/value heads, `D` head size, `V`
vocabulary.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor, nn

from groundup.modern.sliding_window import NOTHING
from groundup.training.loop import in_mode


@runtime_checkable
class Sizes(Protocol):
    """What a cache asks of a model's config."""

    n_layers: int
    kv_heads: int
    d_head: int


@runtime_checkable
class Cache(Protocol):
    """What a model and `generate` ask of a cache."""

    def next_positions(self, n_new: int) -> Int[Tensor, "B T"]:
        """Return the positions of the n_new tokens that follow what is held."""

    def extend(self, positions: Int[Tensor, "B T"]) -> Int[Tensor, "B S"]:
        """Make room for tokens at these positions; return those of all keys."""

    def put(
        self, layer: int, k: Num[Tensor, "B G T D"], v: Num[Tensor, "B G T D"]
    ) -> tuple[Num[Tensor, "B G S D"], Num[Tensor, "B G S D"]]:
        """Take the new keys and values of a layer; return all that may be seen."""


def bytes_per_token(sizes: Sizes, dtype: torch.dtype = torch.float32) -> int:
    """Return what one token of one row costs: a key and a value, a head and a layer.

    Example: 28 layers, 2 key/value heads of size 128, bfloat16: 28,672 bytes.
    """
    return 2 * sizes.n_layers * sizes.kv_heads * sizes.d_head * dtype.itemsize


class KVCache:
    """Room for n_slots tokens a row, filled from the left.

    Args:
        sizes: of the model, a `DecoderConfig`.
        n_slots: tokens that fit; padding takes a place too.
        batch: rows.
        dtype: of keys and values.
        device: where they are kept.
    """

    def __init__(
        self,
        sizes: Sizes,
        n_slots: int,
        *,
        batch: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        shape = (batch, sizes.kv_heads, n_slots, sizes.d_head)
        # One tensor a layer: a compiler copies a stacked one as a whole.
        self.keys = [
            torch.zeros(shape, dtype=dtype, device=device)
            for _ in range(sizes.n_layers)
        ]
        self.values = [torch.zeros_like(k) for k in self.keys]
        self.positions = torch.full((batch, n_slots), NOTHING, device=device)
        self.length = 0

    @property
    def n_slots(self) -> int:
        """Tokens that fit in a row."""
        return self.positions.shape[1]

    @property
    def n_bytes(self) -> int:
        """Memory of keys and values, used or not."""
        return sum(t.nbytes for t in (*self.keys, *self.values))

    def next_positions(self, n_new: int) -> Int[Tensor, "B T"]:
        """Return the positions of the n_new tokens that follow what is held."""
        steps = torch.arange(n_new, device=self.positions.device)
        if self.length == 0:
            return steps.expand(len(self.positions), -1)
        return self.positions[:, : self.length].amax(-1, keepdim=True) + 1 + steps

    def extend(self, positions: Int[Tensor, "B T"]) -> Int[Tensor, "B S"]:
        """Make room for tokens at these positions; return those of all keys.

        Raises:
            ValueError: they do not fit, or are of another number of rows.
        """
        check_rows(self.positions, positions)
        end = self.length + positions.shape[1]
        if end > self.n_slots:
            raise ValueError(
                f"the cache has n_slots={self.n_slots}, holds {self.length} tokens and "
                f"cannot take {positions.shape[1]} more: make a larger one"
            )
        self.positions[:, self.length : end] = positions
        self.length = end
        return self.positions[:, :end]

    def put(
        self, layer: int, k: Num[Tensor, "B G T D"], v: Num[Tensor, "B G T D"]
    ) -> tuple[Num[Tensor, "B G S D"], Num[Tensor, "B G S D"]]:
        """Keep the new keys and values of a layer; return all of them, uncopied."""
        new = slice(self.length - k.shape[2], self.length)
        self.keys[layer][:, :, new] = k
        self.values[layer][:, :, new] = v
        held = slice(0, self.length)
        return self.keys[layer][:, :, held], self.values[layer][:, :, held]


def check_rows(held: Int[Tensor, "B S"], new: Int[Tensor, "B1 T"]) -> None:
    """Refuse positions of more or fewer rows than a cache has."""
    if len(held) != len(new):
        raise ValueError(
            f"the cache has batch={len(held)} rows and got {len(new)}: make one for "
            f"{len(new)}"
        )


def left_pad(
    prompts: Sequence[Sequence[int] | Int[Tensor, "_"]],
) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
    """Lay prompts of different lengths in one batch, ends aligned.

    Returns:
        Ids, 0 where there is padding, and positions, `NOTHING` there. What id stands
        at a padded place changes nothing.

    Raises:
        ValueError: there is no prompt, or one is empty: its first token would have
            nothing to follow from.
    """
    lengths = [len(prompt) for prompt in prompts]
    if min(lengths, default=0) < 1:
        raise ValueError(
            f"every prompt must hold at least one token; got lengths {lengths}"
        )
    shape = (len(prompts), max(lengths))
    ids = torch.zeros(shape, dtype=torch.long)
    positions = torch.full(shape, NOTHING)
    for row, (prompt, n) in enumerate(zip(prompts, lengths, strict=True)):
        ids[row, -n:] = torch.as_tensor(prompt)
        positions[row, -n:] = torch.arange(n)
    return ids, positions


def greedy(logits: Float[Tensor, "B V"]) -> Int[Tensor, "B"]:
    """Choose the most probable token."""
    return logits.argmax(-1)


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int] | Int[Tensor, "_"]],
    n_new: int,
    choose: Callable[[Tensor], Tensor] = greedy,
    *,
    stop: Collection[int] = (),
    cache: Cache | bool = True,
    chunk: int | None = None,
) -> list[list[int]]:
    """Continue each prompt; the model is left in the mode it was found in.

    Args:
        model: a `Decoder`.
        prompts: ids, of any lengths.
        n_new: most tokens to add to each.
        choose: from float32 logits (B, V) to ids (B,).
        stop: a row ends with the first of these tokens that it chooses.
        cache: True makes one of the right size; False reads everything again for each
            token; a cache of one's own may already hold text, which the prompts follow.
        chunk: tokens of the prompts read at once; None: all.

    Returns:
        The new tokens of each row, the stop token included.

    Raises:
        ValueError: a prompt is empty, n_new is negative, chunk is below 1, or the cache
            is full.
    """
    if n_new < 0 or (chunk is not None and chunk < 1):
        raise ValueError(
            f"n_new must not be negative and chunk at least 1; got {n_new} and {chunk}"
        )
    weight = next(model.parameters())
    ids, positions = (t.to(weight.device) for t in left_pad(prompts))
    (batch, longest), pieces = ids.shape, chunk or ids.shape[1]
    if cache is True:
        room = {"batch": batch, "dtype": weight.dtype, "device": weight.device}
        cache = KVCache(model.config, longest + n_new, **room)
    if cache is not False:
        held = cache.next_positions(1)
        positions = torch.where(positions > NOTHING, positions + held, NOTHING)
    stops = torch.tensor(sorted(stop), device=weight.device)
    active = torch.ones(batch, dtype=torch.bool, device=weight.device)
    last = positions[:, -1]
    answers = []
    with in_mode(model, training=False):
        for _ in range(n_new):
            if cache is False:
                logits = model(ids, positions, n_last=1)
            else:  # only what the cache does not hold yet
                for part in zip(
                    ids.split(pieces, 1), positions.split(pieces, 1), strict=True
                ):
                    logits = model(*part, cache, n_last=1)
                ids, positions = ids[:, :0], positions[:, :0]
            new = torch.where(active, choose(logits[:, -1].float()), 0)
            answers.append(torch.where(active, new, NOTHING))
            active = active & ~torch.isin(new, stops)
            if not active.any():
                break
            last = last + 1
            follows = torch.where(active, last, NOTHING)  # a finished row: padding
            ids = torch.cat((ids, new[:, None]), 1)
            positions = torch.cat((positions, follows[:, None]), 1)
    rows = torch.stack(answers, 1).tolist() if answers else [[]] * batch
    return [[token for token in row if token != NOTHING] for row in rows]
