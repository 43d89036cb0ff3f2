"""Grouped-query attention: several query heads read the same keys and values.

Here: attention with fewer key/value heads than query heads, in a clear and in a fast
form; the conversion of a trained decoder to fewer key/value heads; what a cache of
them holds. Left out: the projections (`decoder`), and the cache itself (`kv_cache`).

Source: Ainslie et al. (2023), sections 2.1 (conversion) and 2.2 (groups); Shazeer
(2019) for one key/value head. Page: book/3-modern/gqa.md.
Axes: `B` batch, `T` queries, `S` keys, `H` query heads, `G` key/value heads, `D` head
size, `C` d_model. Query head h reads key/value head h // (H / G).
"""

import dataclasses
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from groundup.modern.kv_cache import Sizes
from groundup.transformer.single_head import attention

Pooling = Literal["mean", "first", "random"]
WRITTEN_OUT = 512  # queries; the weights of more take too much memory


def repeat_groups(
    x: Float[Tensor, "B G S D"], n_heads: int
) -> Float[Tensor, "B H S D"]:
    """Give every query head its own copy: head g H/G to (g + 1) H/G - 1 get group g.

    Raises:
        ValueError: G does not divide n_heads.
    """
    if n_heads < 1 or n_heads % x.shape[1]:
        raise ValueError(
            f"n_heads must be a multiple of the {x.shape[1]} key/value heads; "
            f"got {n_heads}"
        )
    return x.repeat_interleave(n_heads // x.shape[1], dim=1)


def grouped_attention_clear(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G S D"],
    v: Float[Tensor, "B G S D"],
    mask: Bool[Tensor, "..."] | None = None,
) -> Float[Tensor, "B H T D"]:
    """Attend with shared keys and values: copy them, then `attention` (section 2.2)."""
    n_heads = q.shape[1]
    return attention(q, repeat_groups(k, n_heads), repeat_groups(v, n_heads), mask)[0]


def grouped_attention(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G S D"],
    v: Float[Tensor, "B G S D"],
    mask: Bool[Tensor, "..."] | Float[Tensor, "..."] | None = None,
    *,
    causal: bool = False,
) -> Float[Tensor, "B H T D"]:
    """Attend with shared keys and values, by torch's kernel; no key is copied.

    One case is written out instead: training in bfloat16 on a CPU with up to
    `WRITTEN_OUT` queries, where torch's kernel is slow on the way back.

    Args:
        q, k, v: queries, and the keys and values of the groups.
        mask: (B, 1 or H, T, S); True = may attend, or numbers that are added to the
            scores. A query that may attend to nothing gets 0.
        causal: every query sees the keys up to its own; T = S, and no mask.

    Raises:
        ValueError: G does not divide H, or causal has a mask or T differs from S.
    """
    n_heads, n_groups, n_queries = q.shape[1], k.shape[1], q.shape[2]
    if n_heads % n_groups:
        raise ValueError(
            f"n_heads must be a multiple of the {n_groups} key/value heads; "
            f"got {n_heads}"
        )
    if causal and (mask is not None or n_queries != k.shape[2]):
        raise ValueError(
            f"causal must go without a mask and with as many keys as queries; got "
            f"{n_queries} queries, {k.shape[2]} keys"
            + (", and a mask" if mask is not None else "")
        )
    shared = n_heads > n_groups
    if shared and n_queries == 1 and (mask is None or mask.shape[1] == 1):
        # Decoding: the queries of a group are rows that share keys and mask.
        rows = q.reshape(q.shape[0], n_groups, n_heads // n_groups, -1)
        return F.scaled_dot_product_attention(rows, k, v, mask).reshape(q.shape)
    trains_in_half = q.dtype == torch.bfloat16 and q.requires_grad
    short = n_queries <= WRITTEN_OUT and q.device.type == "cpu"
    if causal and trains_in_half and short and not shared:
        return _written_out(q, k, v)
    return F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=causal, enable_gqa=shared
    )


def _written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention as two products and a softmax; keeps the T x T weights."""
    n_queries, d_head = q.shape[-2:]
    future = q.new_full((n_queries, n_queries), -torch.inf).triu(1)
    q, k, rows = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    start = future.expand(len(q), -1, -1)
    scores = torch.baddbmm(start, q, k.mT, alpha=d_head**-0.5)
    return (scores.softmax(-1).to(v.dtype) @ rows).view(v.shape)


def pool_heads(
    heads: Float[Tensor, "H ..."], n_groups: int, pooling: Pooling = "mean"
) -> Float[Tensor, "G ..."]:
    """Make one head of every H / G neighbours: their mean, or the first of them.

    Args:
        heads: what belongs to each head, a head a row: weights (H, D, C) or biases.
        n_groups: G.
        pooling: mean or first.

    Raises:
        ValueError: n_groups does not divide H, or pooling is neither.

    Example: heads of 1, 3, 5, 9 and two groups give 2, 7 (mean) or 1, 5 (first).
    """
    if n_groups < 1 or len(heads) % n_groups:
        raise ValueError(
            f"n_groups must divide the {len(heads)} key/value heads; got {n_groups}"
        )
    groups = heads.unflatten(0, (n_groups, -1))
    if pooling == "mean":
        return groups.mean(1)
    if pooling == "first":
        return groups[:, 0]
    raise ValueError(f"pooling must be mean or first; got {pooling!r}")


@torch.no_grad()
def to_grouped(model: nn.Module, n_groups: int, pooling: Pooling = "mean") -> nn.Module:
    """Return a copy of a decoder with fewer key/value heads (section 2.1).

    Keys and values of every layer, biases too, are pooled; all else is copied. The
    rotation of RoPE is the same for all heads and linear, so pooling the weights pools
    the rotated keys.

    Args:
        model: a `decoder.Decoder`; it is left as it is.
        n_groups: G of the copy.
        pooling: mean; first, of each group; or random: as in a fresh decoder, drawn
            from torch's global generator.

    Raises:
        ValueError: n_groups does not divide the model's key/value heads.
    """
    sizes = model.config
    if n_groups < 1 or sizes.kv_heads % n_groups:
        raise ValueError(
            f"n_groups must divide the {sizes.kv_heads} key/value heads; got {n_groups}"
        )
    copy = type(model)(dataclasses.replace(sizes, n_kv_heads=n_groups))
    copy = copy.to(next(model.parameters())).train(model.training)
    fresh, state = copy.state_dict(), model.state_dict()
    for name in [n for n in state if ".qkv." in n]:
        heads = state[name].unflatten(0, (-1, sizes.d_head))
        q, k, v = heads.split([sizes.n_heads, sizes.kv_heads, sizes.kv_heads])
        if pooling == "random":
            new = fresh[name].unflatten(0, (-1, sizes.d_head))[sizes.n_heads :]
        else:
            new = torch.cat([pool_heads(h, n_groups, pooling) for h in (k, v)])
        state[name] = torch.cat((q, new)).flatten(0, 1)
    copy.load_state_dict(state)
    return copy


def cache_bytes(sizes: Sizes, n_tokens: int, bytes_per_number: int = 2) -> int:
    """Count the bytes that the keys and values of n_tokens take, in all layers.

    Args:
        sizes: of the model, a `DecoderConfig`.
        n_tokens: held, of one row.
        bytes_per_number: 2 for bfloat16, 4 for float32.

    Example: 30 layers of 3 key/value heads of size 64: 23,040 bytes a token.
    """
    numbers = 2 * sizes.n_layers * sizes.kv_heads * sizes.d_head  # keys and values
    return numbers * n_tokens * bytes_per_number
