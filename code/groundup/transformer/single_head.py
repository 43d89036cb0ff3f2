"""One causal head: masked attention on tensors, and the layer around it.

Here: the causal mask, scaled dot-product attention under any boolean mask, a
head with its three projections, a byte model that is one head and nothing else,
and a measurement of which input can move which output. Left out: several heads
(`multi_head`), dropout on the weights, a cache of keys and values (Part 3).

Source: Vaswani et al. (2017), section 3.2.1, eq. 1, and section 3.2.3 for the
mask. Page: book/1-transformer/single_head.md.
Axes: `...` any leading axes, `B` batch, `T` queries, `S` keys, `D` head size of
queries and keys, `Dv` head size of values, `C` model width, `V` bytes (256).
Masks are boolean and True means "may attend".
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from groundup.foundations.fitting import N_BYTES
from groundup.transformer.positions import SinusoidalPositions


def causal_mask(
    n_queries: int,
    n_keys: int | None = None,
    device: torch.device | str | None = None,
) -> Bool[Tensor, "T S"]:
    """Let each query see its own key and every earlier one.

    Aligned at the lower right: the last query stands at the last key and sees
    everything, which is what decoding with a cache needs. The `is_causal` flag
    of `F.scaled_dot_product_attention` is aligned at the upper left instead;
    the two agree only where T = S.

    Args:
        n_queries: T, in tokens.
        n_keys: S, in tokens; T where it is left out.
        device: where the mask is made.

    Returns:
        Entry (t, s) is True where s <= t + S - T.

    Raises:
        ValueError: T is not in 1..S. A query beyond the keys would see nothing.

    Example: `causal_mask(2, 3)` is [[True, True, False], [True, True, True]].
    """
    n_keys = n_queries if n_keys is None else n_keys
    if not 1 <= n_queries <= n_keys:
        raise ValueError(
            f"n_queries must lie in 1..n_keys, so that every query has a key of "
            f"its own; got n_queries={n_queries}, n_keys={n_keys}"
        )
    ones = torch.ones(n_queries, n_keys, dtype=torch.bool, device=device)
    return ones.tril(n_keys - n_queries)


def attention(
    q: Float[Tensor, "... T D"],
    k: Float[Tensor, "... S D"],
    v: Float[Tensor, "... S Dv"],
    mask: Bool[Tensor, "..."] | None = None,
    scale: float | None = None,
) -> tuple[Float[Tensor, "... T Dv"], Float[Tensor, "... T S"]]:
    """Average the values, weighted by the softmax of the scaled scores (eq. 1).

    Scores and softmax are computed in at least float32; output and weights come
    back in the dtype of the values. A query that may attend to nothing gets
    weights 0 and output 0, and passes no gradient: never NaN.

    Args:
        q, k, v: queries, keys and values.
        mask: True = may attend; broadcast to the scores. None lets all see all.
        scale: factor on the scores, 1/sqrt(D) where it is left out.

    Returns:
        The output and the weights.

    Raises:
        ValueError: the mask is not boolean, or does not broadcast to (..., T, S).
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = (q.to(wide) * scale) @ k.to(wide).transpose(-2, -1)
    if mask is None:
        weights = scores.softmax(dim=-1)
    else:
        _check_mask(mask, scores)
        empty = ~mask.any(dim=-1, keepdim=True)
        # the softmax of a row of -inf is NaN, forward and backward: open such a
        # row before it and take its weights away after it, so that none arises
        scores = scores.masked_fill(~(mask | empty), -torch.inf)
        weights = scores.softmax(dim=-1).masked_fill(empty, 0.0)
    weights = weights.to(v.dtype)
    return weights @ v, weights


def _check_mask(mask: Tensor, scores: Tensor) -> None:
    if mask.dtype != torch.bool:
        raise ValueError(
            f"mask must be boolean, True = may attend; got dtype {mask.dtype}"
        )
    pairs = zip(reversed(mask.shape), reversed(scores.shape), strict=False)
    if mask.dim() > scores.dim() or any(m not in (1, s) for m, s in pairs):
        raise ValueError(
            f"mask must broadcast to the scores {tuple(scores.shape)}; "
            f"got shape {tuple(mask.shape)}"
        )


class Head(nn.Module):
    """One head of attention of a sequence to itself.

    Three linear maps without bias make queries, keys and values from the same
    input; `attention` does the rest.

    Args:
        d_model: C, width of the input.
        d_head: D, width of queries, keys, values and output.
        causal: False lets every position see the whole sequence.

    Raises:
        ValueError: a width is not positive.
    """

    def __init__(self, d_model: int, d_head: int, *, causal: bool = True) -> None:
        super().__init__()
        for name, value in (("d_model", d_model), ("d_head", d_head)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")
        self.causal = causal
        self.query = nn.Linear(d_model, d_head, bias=False)
        self.key = nn.Linear(d_model, d_head, bias=False)
        self.value = nn.Linear(d_model, d_head, bias=False)

    def forward(self, x: Float[Tensor, "B T C"]) -> Float[Tensor, "B T D"]:
        """Return, for each position, its weighted average of the values."""
        return self._attend(x)[0]

    def weights(self, x: Float[Tensor, "B T C"]) -> Float[Tensor, "B T T"]:
        """Return the weights alone: entry (b, t, s) is how much t takes from s."""
        return self._attend(x)[1]

    def _attend(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mask = causal_mask(x.shape[1], device=x.device) if self.causal else None
        return attention(self.query(x), self.key(x), self.value(x), mask)


class HeadModel(nn.Module):
    """A byte model that is one head and nothing else: no residual, no MLP.

    Bytes reach the logits through the head alone, so its weights say all there
    is to say about where an answer came from. For the page's experiments.

    Args:
        d_model: C, width of embedding and positions.
        d_head: D.
        causal: passed on to the head; it can be changed later, as `head.causal`.
    """

    def __init__(self, d_model: int, d_head: int, *, causal: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(N_BYTES, d_model)
        self.positions = SinusoidalPositions(d_model)
        self.head = Head(d_model, d_head, causal=causal)
        self.unembed = nn.Linear(d_head, N_BYTES)

    def forward(self, ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T V"]:
        """Return the logits of the next byte (or of whatever it is trained on)."""
        return self.unembed(self.head(self.positions(self.embed(ids))))

    def weights(self, ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T T"]:
        """Return the weights of the head on these bytes."""
        return self.head.weights(self.positions(self.embed(ids)))


def influence(
    layer: Callable[[Tensor], Tensor],
    x: Float[Tensor, "T C"],
    other: Float[Tensor, "T C"],
) -> Float[Tensor, "T T"]:
    """Measure which input position can move which output position.

    Copy s of the sequence has x[s] replaced by other[s]; all copies go through
    the layer in one batch, beside as many untouched ones (the same shapes, so
    that what does not move is equal to the last bit).

    Args:
        layer: maps (B, T, C) to (B, T, any).
        x: the sequence.
        other: the replacements.

    Returns:
        Entry (t, s): the norm of the change of output t when input s changes.
        The causality test is that all entries with s > t are exactly 0.
    """
    n = x.shape[0]
    copies = x.expand(n, *x.shape)
    here = torch.eye(n, dtype=torch.bool, device=x.device).unsqueeze(-1)  # s, t, 1
    changed = torch.where(here, other, copies)
    with torch.no_grad():
        moved = layer(changed) - layer(copies.contiguous())
    return moved.norm(dim=-1).T
