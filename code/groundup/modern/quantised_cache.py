"""Keys and values in eight bits: a cache of codes beside a cache of scales.

Here: rounding to integers with one scale a vector, and a cache of any kind in them.
Left out: packing fewer bits, scales a channel, weights in few bits (Part 4).

Source: Dettmers et al. (2022), section 2 (absmax quantisation), with a scale for each
token and head. Page: book/3-modern/rolling_cache.md.
Axes: `B` batch, `T` new tokens, `S` keys, `G` key/value heads, `D` head size.
"""

from collections.abc import Callable
from types import SimpleNamespace

import torch
from jaxtyping import Float, Int, Int8
from torch import Tensor

from groundup.modern.kv_cache import Cache, Sizes

BITS = 8  # codes from -127 to 127: -128 stays unused


def quantise(
    x: Float[Tensor, "... D"], bits: int = BITS
) -> tuple[Int8[Tensor, "... D"], Float[Tensor, "... 1"]]:
    """Round each vector to integers from -127 to 127, times a scale of its own.

    The scale is the vector's largest magnitude divided by 127, so the rounding error of
    a number is at most half a scale. A vector of zeros has the scale 0.

    Args:
        x: vectors along the last axis, finite.
        bits: fewer leave 2^(bits - 1) - 1 in place of 127.

    Returns:
        Codes, a byte each, and scales in float32 (float64 for a float64 x).

    Raises:
        ValueError: bits is not in 2..8.

    Example: (1.27, -0.5, 0.004) has the scale 0.01 and the codes (127, -50, 0).
    """
    if not 2 <= bits <= BITS:
        raise ValueError(f"bits must lie in 2..{BITS}; got {bits}")
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = wide.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    codes = torch.where(scale > 0, wide / scale, 0.0).round()
    return codes.to(torch.int8), scale


def dequantise(
    codes: Int8[Tensor, "... D"], scale: Float[Tensor, "... 1"], dtype: torch.dtype
) -> Float[Tensor, "... D"]:
    """Return codes times scale, in dtype."""
    return (codes * scale).to(dtype)


class QuantisedCache:
    """Any cache in eight bits: one of its kind for the codes, one for the scales.

    Args:
        make: makes a cache from sizes and dtype.
        sizes: of the model, a `DecoderConfig`.
        dtype: in which keys and values are read.
        bits: as in `quantise`.

    Raises:
        ValueError: the cache would turn its keys (a reindexed `RollingCache`), which
            cannot be done with codes.

    Example: `QuantisedCache(lambda s, d: KVCache(s, 512, dtype=d), model.config)`.
    """

    def __init__(
        self,
        make: Callable[[Sizes, torch.dtype], Cache],
        sizes: Sizes,
        dtype: torch.dtype = torch.float32,
        bits: int = BITS,
    ) -> None:
        names = ("n_layers", "kv_heads", "d_head", "window", "n_sinks", "rope_theta")
        known = {n: getattr(sizes, n) for n in names if hasattr(sizes, n)}
        self.dtype, self.bits = dtype, bits
        self.codes = make(sizes, torch.int8)
        wide = torch.promote_types(dtype, torch.float32)
        self.scales = make(SimpleNamespace(**known | {"d_head": 1}), wide)
        if getattr(self.codes, "theta", None):
            raise ValueError("a reindexed cache turns its keys; codes cannot be turned")

    @property
    def n_bytes(self) -> int:
        """Memory of codes and scales."""
        return self.codes.n_bytes + self.scales.n_bytes

    def next_positions(self, n_new: int) -> Int[Tensor, "B T"]:
        """Return the positions of the n_new tokens that follow what was read."""
        return self.codes.next_positions(n_new)

    def extend(self, positions: Int[Tensor, "B T"]) -> Int[Tensor, "B S"]:
        """Take tokens at these positions; return those of all keys."""
        self.scales.extend(positions)
        return self.codes.extend(positions)

    def put(
        self, layer: int, k: Float[Tensor, "B G T D"], v: Float[Tensor, "B G T D"]
    ) -> tuple[Float[Tensor, "B G S D"], Float[Tensor, "B G S D"]]:
        """Keep the new keys and values rounded; return all, the new ones rounded too.

        A token is thus read with the same rounding by itself and by all that follow,
        and it does not matter in which chunks a text comes.
        """
        (k, k_scale), (v, v_scale) = (quantise(x, self.bits) for x in (k, v))
        codes = self.codes.put(layer, k, v)
        scales = self.scales.put(layer, k_scale, v_scale)
        keys, values = (
            dequantise(c, s, self.dtype) for c, s in zip(codes, scales, strict=True)
        )
        return keys, values
