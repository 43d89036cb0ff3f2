"""Sparse attention that skips the work: a local window, and listed blocks.

Here: attention in which each query reads its window only, and attention over the
blocks of keys that a layout lists, both without ever computing a score that the mask
would throw away; the dense mask of a layout, for comparison; and a decoder that reads
long texts by its window. Left out: sinks (`sliding_window`), decoding with a cache, in
which a window already costs what it holds (`rolling_cache`), learned layouts.

Source: Child et al. (2019), section 4; Beltagy et al. (2020), section 3.1; Zaheer et
al. (2020), section 2 and appendix D (blocks). Page: book/3-modern/sparse_attention.md.
Axes: `B` batch, `T` tokens, `H` query heads, `G` key/value heads, `D` head size, `C`
d_model, `N` blocks of tokens. Masks and layouts are boolean, True = may attend.
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from groundup.modern.decoder import Attention, Decoder, DecoderConfig
from groundup.modern.gqa import grouped_attention
from groundup.modern.sliding_window import window_mask
from groundup.transformer.single_head import causal_mask

LOCAL_BLOCK = 64  # tokens; at a window of 256, 16 to 64 take the same time, 256 more


def local_attention(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G T D"],
    v: Float[Tensor, "B G T D"],
    window: int,
    block: int = LOCAL_BLOCK,
) -> Float[Tensor, "B H T D"]:
    """Let each token attend to itself and the window - 1 tokens before it.

    Time and memory grow with T (window + block). Each block of queries gets the keys
    of its own block and of as many before it as the window reaches into: a view on k
    whose pieces overlap, so that one call of torch's kernel serves all blocks, and all
    share one small mask. The queries at the start, whose keys would begin before the
    text, and what is left over of T, are an attention of their own.

    Args:
        q, k, v: queries, and the keys and values of the groups.
        window: keys in reach, the query's own included.
        block: queries that share a piece of keys; changes the time, not the result.

    Raises:
        ValueError: window or block is below 1.
    """
    if window < 1 or block < 1:
        raise ValueError(
            f"window and block must be at least 1; got window={window}, block={block}"
        )
    n_tokens, n_groups = q.shape[2], k.shape[1]
    before = -(-(window - 1) // block) * block  # keys in front of each block's own
    n_blocks = max(0, n_tokens // block - before // block)
    start = n_tokens - n_blocks * block
    at = torch.arange(max(start, before + block), device=q.device)[None]
    first = [x[:, :, :start] for x in (q, k, v)]
    mask = window_mask(at[:, :start], at[:, :start], window)
    out = grouped_attention(*first, mask[:, None])
    if not n_blocks:
        return out
    at = at[:, : before + block]
    mask = window_mask(at[:, before:], at, window)[0]
    pieces = [
        x[:, :, start - before :]
        .flatten(0, 1)
        .unfold(1, before + block, block)  # BG blocks D keys
        .transpose(2, 3)
        for x in (k, v)
    ]
    # Blocks take the place of heads; the queries of a group are further rows.
    rows = q[:, :, start:].unflatten(1, (n_groups, -1)).unflatten(3, (n_blocks, block))
    per_group = rows.shape[2]
    rows = rows.transpose(2, 3).reshape(-1, n_blocks, per_group * block, q.shape[-1])
    local = F.scaled_dot_product_attention(rows, *pieces, mask.repeat(per_group, 1))
    local = local.view(len(q), n_groups, n_blocks, per_group, block, -1)
    local = local.transpose(2, 3).reshape(*q.shape[:2], n_blocks * block, -1)
    return torch.cat((out, local), dim=2)


def block_sparse_mask(
    layout: Bool[Tensor, "N N"], block: int, n_tokens: int
) -> Bool[Tensor, "T T"]:
    """Write a layout out as a causal mask over tokens, for comparison.

    Args:
        layout: which block of queries (row) reads which block of keys.
        block: tokens in a block; the last may be shorter.
        n_tokens: T.

    Raises:
        ValueError: N is not the number of blocks in T, or a block lies in the future.
    """
    _check_layout(layout, block, n_tokens)
    wide = layout.repeat_interleave(block, 0).repeat_interleave(block, 1)
    return wide[:n_tokens, :n_tokens] & causal_mask(n_tokens, device=layout.device)


def block_sparse_attention(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G T D"],
    v: Float[Tensor, "B G T D"],
    layout: Bool[Tensor, "N N"],
    block: int,
) -> Float[Tensor, "B H T D"]:
    """Let each block of queries attend to the blocks of keys listed for it.

    Causal: inside its own block a query sees what came before it. The work is that of
    the listed blocks; one call of torch's kernel for each block of queries, so a block
    should not be small. A query that may attend to nothing gets 0.

    Args:
        q, k, v: queries, and the keys and values of the groups.
        layout: which block of queries (row) reads which block of keys.
        block: tokens in a block; the last may be shorter.

    Raises:
        ValueError: as `block_sparse_mask`.
    """
    _check_layout(layout, block, q.shape[2])
    out = []
    for i, (queries, row) in enumerate(
        zip(q.split(block, dim=2), layout.tolist(), strict=True)
    ):
        listed = [j for j, reads in enumerate(row) if reads]
        if not listed:
            out.append(torch.zeros_like(queries))
            continue
        keys, values = (
            torch.cat([x[:, :, j * block : (j + 1) * block] for j in listed], dim=2)
            for x in (k, v)
        )
        mask = None
        if listed[-1] == i:  # everything before the last block is the past
            size = queries.shape[2]
            mask = torch.ones(
                1, 1, size, keys.shape[2], dtype=torch.bool, device=q.device
            )
            mask[..., -size:] = causal_mask(size, device=q.device)
        out.append(grouped_attention(queries, keys, values, mask))
    return torch.cat(out, dim=2)


def block_layout(
    n_blocks: int,
    *,
    local: int = 1,
    first: int = 0,
    share: float = 0.0,
    seed: int = 0,
) -> Bool[Tensor, "N N"]:
    """List the nearest blocks, the first ones, and then any of the past at random.

    Args:
        n_blocks: N.
        local: blocks that end with the query's own; 1 is its own alone.
        first: blocks at the start of the text that all later ones read.
        share: random blocks are added until this share of the causal blocks is listed.
        seed: of the random blocks.

    Raises:
        ValueError: share is not in [0, 1].
    """
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"share must lie in [0, 1]; got {share}")
    at = torch.arange(n_blocks)
    back = at[:, None] - at
    past = back >= 0
    layout = past & ((back < local) | (at < first))
    left = (past & ~layout).nonzero()
    n_random = max(0, math.ceil(share * int(past.sum())) - int(layout.sum()))
    order = torch.randperm(len(left), generator=torch.Generator().manual_seed(seed))
    layout[tuple(left[order[:n_random]].T)] = True
    return layout


def density(layout: Bool[Tensor, "N N"]) -> float:
    """Return the share of the causal blocks, N (N + 1) / 2, that a layout lists."""
    n = len(layout)
    return layout.sum().item() / (n * (n + 1) / 2)


def _check_layout(layout: Tensor, block: int, n_tokens: int) -> None:
    if block < 1 or len(layout) != -(-n_tokens // block):
        raise ValueError(
            f"layout must have a row for each block of {block} of the {n_tokens} "
            f"tokens; got {len(layout)}"
        )
    if layout.triu(1).any():
        raise ValueError(
            "layout must not list blocks of the future, above the diagonal; got "
            f"{layout.triu(1).nonzero().tolist()[:3]}"
        )


class LocalAttention(Attention):
    """The decoder's attention, whole texts by `local_attention`.

    With a mask or a cache it does what `Attention` does.
    """

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.window = config.window

    def attend(
        self,
        q: Float[Tensor, "B H T D"],
        k: Float[Tensor, "B G S D"],
        v: Float[Tensor, "B G S D"],
        mask: Tensor | None,
    ) -> Float[Tensor, "B H T D"]:
        """Without a mask every query sees its window."""
        if mask is not None or q.shape[2] != k.shape[2]:
            return super().attend(q, k, v, mask)
        return local_attention(q, k, v, self.window)


class LocalDecoder(Decoder):
    """A decoder with a window, which computes whole texts without the window's mask.

    The same parameters under the same names, and the same logits up to rounding.

    Raises:
        ValueError: config has no window, or sinks.
    """

    def __init__(self, config: DecoderConfig) -> None:
        if config.window is None or config.n_sinks:
            raise ValueError(
                "config must have a window and no sinks; got "
                f"window={config.window}, n_sinks={config.n_sinks}"
            )
        super().__init__(config)
        for layer, block in enumerate(self.blocks):
            local = LocalAttention(config, layer)
            local.load_state_dict(block.attention.state_dict())
            block.attention = local

    def mask(
        self,
        positions: Int[Tensor, "B T"],
        key_positions: Int[Tensor, "B S"],
        *,
        plain: bool,
    ) -> Bool[Tensor, "B 1 T S"] | Float[Tensor, "..."] | None:
        """Return no mask for whole texts, else the decoder's."""
        if plain:
            return None
        return super().mask(positions, key_positions, plain=plain)
