"""Layer normalisation and the residual connection, in either order.

Here: LayerNorm, its gradient in closed form, and a wrapper that puts a norm and a
residual round any sublayer (pre-norm, post-norm, no norm; residual on or off).
Left out: RMSNorm (Part 3), batch normalisation, initialisations that scale the
residual branch with depth (Part 2).

Source: Ba et al. (2016), section 3.1, eq. 4 (LayerNorm); He et al. (2016), eq. 1
(residual); Vaswani et al. (2017), section 3.1 (post-norm); Xiong et al. (2020),
table 1 (pre-norm). Page: book/1-transformer/residual_norm.md.
Axes: `...` any leading axes (batch, position), `C` d_model.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

EPS = 1e-5  # the default of torch.nn.LayerNorm and of GPT-2
PLACEMENTS = ("pre", "post", "none")


def standardise(
    x: Float[Tensor, "... C"], eps: float = EPS
) -> tuple[Float[Tensor, "... C"], Float[Tensor, "... 1"]]:
    """Return each row with mean 0 and variance v / (v + eps), and 1 / sqrt(v + eps).

    v is the row's biased variance: divided by C, not C - 1. The result has x's
    dtype. Example: x = [1, 3], eps = 0 gives [-1, 1] and [1].
    """
    centred = x - x.mean(-1, keepdim=True)
    # Two passes: E[x^2] - E[x]^2 would cancel when the mean is large.
    variance = centred.square().mean(-1, keepdim=True)
    inverse_std = torch.rsqrt(variance + eps)  # eps inside the root
    return centred * inverse_std, inverse_std


def widened(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Return half precision as float32, for squares of 300 overflow float16."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def layer_norm(
    x: Float[Tensor, "... C"],
    weight: Float[Tensor, "C"] | None = None,
    bias: Float[Tensor, "C"] | None = None,
    eps: float = EPS,
) -> Float[Tensor, "... C"]:
    """Give each row mean 0 and variance 1, then scale and shift each column.

    The variance is the biased one (divided by C, not C - 1) and eps is added to it
    inside the root. Statistics are taken in float32 when x is in half precision;
    the result has x's shape and dtype. This is `F.layer_norm(x, (C,), ...)`.
    Example: x = [1, 3], eps = 0 gives [-1, 1].

    Args:
        x: vectors to normalise along their last axis.
        weight: scale of each column; 1 if None.
        bias: shift of each column; 0 if None.
        eps: keeps constant rows finite; must not be negative.

    Raises:
        ValueError: eps is negative.
    """
    if eps < 0:
        raise ValueError(f"eps must be at least 0; got {eps}")
    y, _ = standardise(widened(x), eps)
    if weight is not None:
        y = y * widened(weight)
    if bias is not None:
        y = y + widened(bias)
    return y.to(x.dtype)


def layer_norm_backward(
    grad: Float[Tensor, "... C"],
    x: Float[Tensor, "... C"],
    weight: Float[Tensor, "C"] | None = None,
    eps: float = EPS,
) -> Float[Tensor, "... C"]:
    """Turn the gradient at layer_norm's output into the gradient at its input.

    With g = grad * weight and x-hat the normalised row: subtract from g its mean,
    and its part along x-hat; then divide by the row's sqrt(variance + eps). Written
    out to be read and tested; training uses autograd. Shapes as in `layer_norm`.
    """
    x_hat, inverse_std = standardise(x, eps)
    g = grad if weight is None else grad * weight
    along = (g * x_hat).mean(-1, keepdim=True)
    return inverse_std * (g - g.mean(-1, keepdim=True) - along * x_hat)


class LayerNorm(nn.Module):
    """`layer_norm` with a learned scale and shift, which start at 1 and 0.

    Args:
        d_model: width C of the rows.
        eps: see `layer_norm`.

    Raises:
        ValueError: d_model is below 1 or eps is negative.
    """

    fused = False  # True: torch's kernel, one pass over x

    def __init__(self, d_model: int, eps: float = EPS) -> None:
        super().__init__()
        if d_model < 1:
            raise ValueError(f"d_model must be a positive integer; got {d_model}")
        if eps < 0:
            raise ValueError(f"eps must be at least 0; got {eps}")
        self.weight = nn.Parameter(torch.ones(d_model))
        self.bias = nn.Parameter(torch.zeros(d_model))
        self.eps = eps

    def forward(self, x: Float[Tensor, "... C"]) -> Float[Tensor, "... C"]:
        """Normalise along the last axis."""
        if self.fused:
            return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)
        return layer_norm(x, self.weight, self.bias, self.eps)


class Residual(nn.Module):
    """Wrap a sublayer f: x + f(norm(x)), norm(x + f(x)), or x + f(x).

    Args:
        sublayer: any map from (..., C) to (..., C).
        d_model: width C.
        norm: "pre" normalises the branch's input, "post" the sum, "none" nothing.
        residual: False drops the term x, for ablations.
        dropout: share of f's output that is zeroed in training mode, in [0, 1).

    Raises:
        ValueError: norm is none of `PLACEMENTS`.
    """

    def __init__(
        self,
        sublayer: nn.Module,
        d_model: int,
        *,
        norm: str = "pre",
        residual: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if norm not in PLACEMENTS:
            raise ValueError(f"norm must be one of {PLACEMENTS}; got {norm!r}")
        self.sublayer = sublayer
        self.norm = nn.Identity() if norm == "none" else LayerNorm(d_model)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.placement = norm
        self.residual = residual

    def forward(self, x: Float[Tensor, "... C"], **options) -> Float[Tensor, "... C"]:
        """Return the wrapped sublayer's output; options go to the sublayer."""
        branch = self.norm(x) if self.placement == "pre" else x
        branch = self.dropout(self.sublayer(branch, **options))
        y = x + branch if self.residual else branch
        return self.norm(y) if self.placement == "post" else y
