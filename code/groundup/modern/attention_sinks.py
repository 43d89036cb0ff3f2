"""Attention sinks: how much goes to the first tokens, and from what distance.

Here: the weight on the first tokens in every head, and attention in which positions are
counted inside the cache, as StreamingLLM does it, for a whole text at once. Left out:
the mask (`sliding_window`), the same token by token (`rolling_cache`).

Source: Xiao et al. (2024), sections 3.1 and 3.2.
Page: book/3-modern/sliding_window.md.
Axes: `B` batch, `T` tokens, `C` d_model, `H` query heads, `G` key/value heads, `D` head
size, `N` blocks.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from groundup.modern.decoder import Attention, Decoder, DecoderConfig, Rotation
from groundup.modern.gqa import repeat_groups
from groundup.modern.kv_cache import Cache
from groundup.modern.rope import rope_tables, rotate
from groundup.modern.sliding_window import window_mask
from groundup.transformer.multi_head import merge_heads
from groundup.transformer.single_head import attention


@torch.no_grad()
def first_token_weights(
    model: Decoder, ids: Int[Tensor, "B T"], n_first: int = 1
) -> Float[Tensor, "N B H T"]:
    """Return what every query of every head gives to the first n_first tokens.

    Args:
        model: its window and sinks are respected.
        ids: a text a row, from its beginning.
        n_first: tokens whose weights are added up.
    """
    positions = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
    rotation = model.rotation(positions)
    mask = window_mask(positions, positions, model.config.window, model.config.n_sinks)
    found = []
    for block, x in zip(model.blocks, model.stream(ids), strict=False):
        q, k, v = block.attention.project(block.attention_norm(x), rotation)
        k, v = (repeat_groups(y, q.shape[1]).float() for y in (k, v))
        weights = attention(q.float(), k, v, mask[:, None])[1]
        found.append(weights[..., :n_first].sum(-1))
    return torch.stack(found)


def farthest(window: int, n_sinks: int) -> int:
    """Return the index of the newest token in a full cache: window + n_sinks - 1.

    With positions counted inside the cache, no query stands beyond it. Until the cache
    is full, index and position are the same.
    """
    return window + n_sinks - 1


def reindexed_attention(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G T D"],
    v: Float[Tensor, "B G T D"],
    window: int,
    n_sinks: int,
    theta: float,
) -> Float[Tensor, "B H T D"]:
    """Attend as if each query stood in a cache of its own, counted from 0.

    The keys in the window keep their distances, since they are neighbours in the text
    and in the cache. What changes is the distance to the sinks: it stops growing when
    the cache is full. So a query is turned back to `farthest` where it meets a sink.

    Args:
        q, k: of the tokens 0 to T - 1, rotated by their positions.
        v: values.
        window: keys in reach, the query's own included.
        n_sinks: first tokens that stay in reach.
        theta: base of the rotation.

    Raises:
        ValueError: window is below 1, or n_sinks is negative.
    """
    positions = torch.arange(q.shape[2], device=q.device)
    mask = window_mask(positions[None], positions[None], window, n_sinks)
    back = positions.clamp(max=farthest(window, n_sinks)) - positions
    wide = torch.promote_types(q.dtype, torch.float32)
    turned = rotate(q, *rope_tables(back, q.shape[-1], theta, wide))
    k, v = repeat_groups(k, q.shape[1]), repeat_groups(v, q.shape[1])
    scores = q @ k.transpose(-1, -2)
    scores[..., :n_sinks] = turned @ k[:, :, :n_sinks].transpose(-1, -2)
    scores = (scores.to(wide) * q.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1).to(v.dtype) @ v


class ReindexedAttention(Attention):
    """Attention whose positions are counted inside the cache, without one.

    Exchange it for the attention of a decoder with `variants.swap`; with a cache it
    leaves the counting to `rolling_cache.RollingCache`.

    Args:
        config: of the decoder, with a window.
        layer: as in `Attention`.
    """

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.config = config

    @classmethod
    def of(cls, old: Attention, config: DecoderConfig) -> "ReindexedAttention":
        """Return one with the very weights of old."""
        new = cls(config, old.layer)
        new.qkv, new.proj = old.qkv, old.proj
        return new

    def forward(
        self,
        x: Float[Tensor, "B T C"],
        rotation: Rotation,
        mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "B T C"]:
        """Attend; x holds a text from its beginning."""
        if cache is not None:
            return super().forward(x, rotation, mask, cache)
        config = self.config
        out = reindexed_attention(
            *self.project(x, rotation), config.window, config.n_sinks, config.rope_theta
        )
        return self.proj(merge_heads(out))
