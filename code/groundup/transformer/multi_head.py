"""Many heads: split, attend, concatenate, project.

Here: the change of layout that turns one wide projection into H heads and back,
causal multi-head self-attention built on it, a small attention-only byte model
to look at trained heads, and three numbers that describe a head's weights. Left
out: dropout, a cache of keys and values, and sharing keys and values between
heads (grouped-query attention); the last two are Part 3.

Source: Vaswani et al. (2017), section 3.2.2. Page:
book/1-transformer/multi_head.md.
Axes: `B` batch, `T` positions (queries), `S` keys, `H` heads, `D` = C / H head
size, `C` model width, `V` bytes (256), `...` any leading axes.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from groundup.foundations.fitting import N_BYTES
from groundup.transformer.positions import SinusoidalPositions
from groundup.transformer.single_head import attention, causal_mask


def split_heads(x: Float[Tensor, "B T C"], n_heads: int) -> Float[Tensor, "B H T D"]:
    """Give head h the columns h*D to (h+1)*D of every position.

    Raises:
        ValueError: the width is not a multiple of n_heads.

    Example: a row [0, 1, 2, 3] and two heads: head 0 gets [0, 1], head 1 [2, 3].
    """
    n_batch, n_positions, width = x.shape
    if n_heads < 1 or width % n_heads:
        raise ValueError(
            f"n_heads must divide the width {width} and be positive; got {n_heads}"
        )
    # B T C -> B T H D -> B H T D
    return x.view(n_batch, n_positions, n_heads, -1).transpose(1, 2)


def merge_heads(x: Float[Tensor, "B H T D"]) -> Float[Tensor, "B T C"]:
    """Put the heads side by side again: the inverse of `split_heads`."""
    # B H T D -> B T H D -> B T C; the transpose must come first
    return x.transpose(1, 2).flatten(2)


class MultiHeadAttention(nn.Module):
    """Self-attention with H heads of size C / H and an output projection.

    The rows of `qkv.weight` are queries, keys, values, each with head 0 first:
    the layout of `nn.MultiheadAttention.in_proj_weight` and, transposed, of
    GPT-2's `c_attn`.

    Args:
        d_model: C, width of input and output.
        n_heads: H.
        bias: whether the two linear maps have one.
        causal: False lets every position see the whole sequence.

    Raises:
        ValueError: n_heads does not divide d_model.
    """

    fused = False  # True: torch's kernel, which never forms the weights

    def __init__(
        self, d_model: int, n_heads: int, *, bias: bool = True, causal: bool = True
    ) -> None:
        super().__init__()
        if n_heads < 1 or d_model % n_heads:
            raise ValueError(
                f"n_heads must be positive and divide d_model={d_model}; got {n_heads}"
            )
        self.n_heads = n_heads
        self.causal = causal
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=bias)
        self.proj = nn.Linear(d_model, d_model, bias=bias)

    def forward(
        self,
        x: Float[Tensor, "B T C"],
        *,
        mask: Bool[Tensor, "..."] | None = None,
        keep_heads: Bool[Tensor, "H"] | None = None,
    ) -> Float[Tensor, "B T C"]:
        """Return what the heads found, mixed by the projection.

        Args:
            x: the sequences.
            mask: (T, T) or (B, T, T), True = may attend, in place of the causal one.
            keep_heads: False removes a head: its output is 0 before `proj`.
        """
        if self.fused:
            mask = None if mask is None else mask.unsqueeze(-3)  # the same in all heads
            causal = self.causal and mask is None
            out = F.scaled_dot_product_attention(
                *self._project(x), mask, is_causal=causal
            )
        else:
            out, _ = self._attend(x, mask)
        if keep_heads is not None:
            out = out * keep_heads.to(out)[:, None, None]
        return self.proj(merge_heads(out))

    def weights(self, x: Float[Tensor, "B T C"]) -> Float[Tensor, "B H T T"]:
        """Return the weights alone: entry (b, h, t, s), what t takes from s."""
        return self._attend(x)[1]

    def _project(self, x: Tensor) -> list[Tensor]:
        return [split_heads(part, self.n_heads) for part in self.qkv(x).chunk(3, -1)]

    def _attend(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if mask is not None:
            mask = mask.unsqueeze(-3)  # the same in all heads
        elif self.causal:
            mask = causal_mask(x.shape[1], device=x.device)
        return attention(*self._project(x), mask)


class AttentionOnly(nn.Module):
    """A byte model of attention layers alone: x + attention(norm(x)), L times.

    Embedding and sinusoidal positions below, a norm and a linear map to logits
    above. No feed-forward layer: whatever it predicts, the heads found. For the
    page's experiments; the norm and the residual are the subject of page 1.6.

    Args:
        d_model: C.
        n_heads: H, the same in each layer.
        n_layers: L.
    """

    def __init__(self, d_model: int, n_heads: int, n_layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(N_BYTES, d_model)
        self.positions = SinusoidalPositions(d_model)
        self.norms = nn.ModuleList(nn.LayerNorm(d_model) for _ in range(n_layers))
        self.layers = nn.ModuleList(
            MultiHeadAttention(d_model, n_heads) for _ in range(n_layers)
        )
        self.final_norm = nn.LayerNorm(d_model)
        self.unembed = nn.Linear(d_model, N_BYTES)

    def forward(
        self,
        ids: Int[Tensor, "B T"],
        *,
        keep_heads: Bool[Tensor, "L H"] | None = None,
    ) -> Float[Tensor, "B T V"]:
        """Return the logits of the next byte, with some heads removed or none."""
        x = self.positions(self.embed(ids))
        for i, (norm, layer) in enumerate(zip(self.norms, self.layers, strict=True)):
            keep = None if keep_heads is None else keep_heads[i]
            x = x + layer(norm(x), keep_heads=keep)
        return self.unembed(self.final_norm(x))

    def weights(self, ids: Int[Tensor, "B T"]) -> Float[Tensor, "B L H T T"]:
        """Return the weights of every head in every layer on these bytes."""
        x = self.positions(self.embed(ids))
        found = []
        for norm, layer in zip(self.norms, self.layers, strict=True):
            found.append(layer.weights(norm(x)))
            x = x + layer(norm(x))
        return torch.stack(found, dim=1)


def js_distance(weights: Float[Tensor, "... H T S"]) -> Float[Tensor, "... H H"]:
    """Compare heads pairwise: the Jensen-Shannon distance of their rows.

    For two rows p and q with mean m, the divergence is the average of
    KL(p || m) and KL(q || m) in bits; the distance is its square root, a metric
    (Endres and Schindelin, 2003). It is averaged over the rows: 0 where two
    heads read the same positions, 1 where no row of one overlaps the other's.
    """
    p, q = weights.unsqueeze(-3), weights.unsqueeze(-4)  # ... H H T S
    gain = row_entropy((p + q) / 2) - (row_entropy(p) + row_entropy(q)) / 2
    return gain.clamp(min=0.0).sqrt().mean(dim=-1)


def row_entropy(weights: Float[Tensor, "... T S"]) -> Float[Tensor, "... T"]:
    """Return the entropy of each row in bits; 0 log 0 counts as 0."""
    return torch.special.entr(weights).sum(dim=-1) / torch.log(
        torch.tensor(2.0, dtype=weights.dtype)
    )


def lookback(weights: Float[Tensor, "... T S"]) -> Float[Tensor, "... T"]:
    """Return how far each query looks back on average, in positions.

    The last query stands at the last key, as in `causal_mask`.
    """
    n_queries, n_keys = weights.shape[-2:]
    t = torch.arange(n_keys - n_queries, n_keys, device=weights.device)
    s = torch.arange(n_keys, device=weights.device)
    return (weights * (t[:, None] - s)).sum(dim=-1)
