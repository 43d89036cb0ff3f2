"""Rotary position embeddings: queries and keys turned by their position.

Here: frequencies and tables, the rotation in the two layouts that published weights
use, and the permutation between them, for vectors and for the rows of a projection.
Left out: rotating a part of the head only (GPT-J, GPT-NeoX), and the rescalings that
treat each frequency differently (YaRN, Llama 3.1). ALiBi is in `alibi`.

Source: Su et al. (2024), sections 3.2 and 3.4.2, equation 34; position interpolation:
Chen et al. (2023), section 2.3. Page: book/3-modern/rope.md.
Axes: `B` batch, `H` heads, `T` positions, `D` head size, `C` model width, `half` =
D / 2 planes, `...` any leading axes.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

THETA = 10_000.0  # Su et al. (2024), section 3.2.2; the base of the sinusoid


def rope_frequencies(d_head: int, theta: float = THETA) -> Float[Tensor, "half"]:
    """Return how far each plane turns from one token to the next: theta^(-2i / D).

    Args:
        d_head: D, even.
        theta: base. The slowest plane turns once in less than 2π theta tokens.

    Returns:
        D / 2 frequencies in radians per token, fastest (1) first, in float64.

    Raises:
        ValueError: d_head is not a positive even number, or theta is not positive.

    Example: `rope_frequencies(4)` is [1, 0.01].
    """
    if d_head < 2 or d_head % 2:
        raise ValueError(
            f"d_head must be a positive even number, since each frequency turns two "
            f"coordinates; got {d_head}"
        )
    if not theta > 0:
        raise ValueError(f"theta must be positive; got {theta}")
    exponents = torch.arange(0, d_head, 2, dtype=torch.float64) / d_head
    return theta**-exponents


def rope_tables(
    positions: Int[Tensor, "... T"],
    d_head: int,
    theta: float = THETA,
    dtype: torch.dtype = torch.float32,
    *,
    scale: float = 1.0,
) -> tuple[Float[Tensor, "... T half"], Float[Tensor, "... T half"]]:
    """Return cosine and sine of every angle: position / scale times frequency.

    Args:
        positions: in tokens, any order; (T,) for all rows alike or (B, T), a row each.
        d_head: D, even.
        theta: base, as in `rope_frequencies`.
        dtype: of the result; angles are computed in float64 in any case, since an
            angle of many turns loses its fraction of a turn to rounding.
        scale: position interpolation: a factor of 8 squeezes 512 positions into the
            range of 64.

    Raises:
        ValueError: scale is not positive, or as in `rope_frequencies`.

    Example: a head axis for positions a row: `rope_tables(positions[:, None], D)`.
    """
    if not scale > 0:
        raise ValueError(f"scale must be positive; got {scale}")
    frequencies = rope_frequencies(d_head, theta).to(positions.device)
    angles = positions.double()[..., None] / scale * frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(
    x: Float[Tensor, "... T D"],
    cos: Float[Tensor, "... T half"],
    sin: Float[Tensor, "... T half"],
) -> Float[Tensor, "... T D"]:
    """Turn queries or keys by their angles; plane i is (x[i], x[i + D/2]).

    The half-split layout, of Hugging Face's Llama and of GPT-NeoX. The other one is
    `rotate_interleaved`.

    Args:
        x: queries or keys.
        cos: from `rope_tables`; leading axes broadcast against those of x. A constant:
            no gradient reaches it.
        sin: likewise.

    Returns:
        x rotated, in x's dtype. The arithmetic runs in the wider dtype of x and the
        tables: with float32 tables a bfloat16 x is rounded once, at the end.

    Raises:
        ValueError: the tables do not have half as many columns as x.

    Example: D = 2 and an angle of π/2: (1, 0) becomes (0, 1).
    """
    _check_halves(x, cos)
    turn = _Turn.apply if torch.is_grad_enabled() else _Turn.forward
    return turn(x, cos, sin)


class _Turn(torch.autograd.Function):
    """The rotation of `rotate`; its gradient is the rotation back.

    Told so, autograd keeps the tables alone and not the products.
    """

    @staticmethod
    def forward(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b = x.to(torch.promote_types(x.dtype, cos.dtype)).chunk(2, dim=-1)
        first = (a * cos).addcmul_(b, sin, value=-1)
        return torch.cat((first, (a * sin).addcmul_(b, cos)), dim=-1).to(x.dtype)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _Turn.apply(grad, cos, -sin), None, None


def rotate_interleaved(
    x: Float[Tensor, "... T D"],
    cos: Float[Tensor, "... T half"],
    sin: Float[Tensor, "... T half"],
) -> Float[Tensor, "... T D"]:
    """Turn queries or keys by their angles; plane i is (x[2i], x[2i + 1]).

    The interleaved layout: of the paper, of Meta's Llama checkpoints and of Llama
    weights in GGUF files. Arguments, result and errors as in `rotate`.
    """
    _check_halves(x, cos)
    a, b = x[..., 0::2], x[..., 1::2]
    turned = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1)
    return turned.flatten(-2).to(x.dtype)


def _check_halves(x: Tensor, cos: Tensor) -> None:
    if x.shape[-1] != 2 * cos.shape[-1]:
        raise ValueError(
            f"x must have twice as many columns as the tables; got {x.shape[-1]} and "
            f"{cos.shape[-1]}"
        )


def half_split_order(d_head: int) -> Int[Tensor, "D"]:
    """Return the order that brings interleaved coordinates into the half-split layout.

    `rotate(x[..., order], cos, sin)` is `rotate_interleaved(x, cos, sin)[..., order]`.

    Raises:
        ValueError: d_head is not a positive even number.

    Example: `half_split_order(6)` is [0, 2, 4, 1, 3, 5].
    """
    if d_head < 2 or d_head % 2:
        raise ValueError(f"d_head must be a positive even number; got {d_head}")
    return torch.arange(d_head).view(-1, 2).T.flatten()


def half_split_rows(
    projection: Float[Tensor, "rows ..."], n_heads: int
) -> Float[Tensor, "rows ..."]:
    """Bring a query or key projection from the interleaved to the half-split layout.

    Args:
        projection: weight (n_heads * D, C) or bias (n_heads * D,), head 0 first.
        n_heads: heads in it: H for queries, G for keys.

    Returns:
        The same rows, reordered within each head. Scores computed with `rotate` are
        then those that the original gave with `rotate_interleaved`.

    Raises:
        ValueError: the rows do not divide into n_heads heads of even size.
    """
    return _reorder(projection, n_heads, half_split_order)


def interleaved_rows(
    projection: Float[Tensor, "rows ..."], n_heads: int
) -> Float[Tensor, "rows ..."]:
    """Bring a projection back to the interleaved layout: undoes `half_split_rows`."""
    return _reorder(projection, n_heads, lambda d: half_split_order(d).argsort())


def _reorder(projection: Tensor, n_heads: int, order_of) -> Tensor:
    n_rows = projection.shape[0]
    if n_heads < 1 or n_rows % (2 * n_heads):
        raise ValueError(
            f"n_heads must divide the {n_rows} rows into heads of even size; got "
            f"{n_heads}"
        )
    d_head = n_rows // n_heads
    heads = projection.unflatten(0, (n_heads, d_head))
    return heads[:, order_of(d_head).to(projection.device)].flatten(0, 1)
