"""RMSNorm: the scale of LayerNorm without its mean.

Here: the function, its gradient in closed form, and the module. Left out: partial
RMSNorm, which takes the statistics from a part of the row.

Source: Zhang and Sennrich (2019), section 4, eq. 4. Page: book/3-modern/rmsnorm.md.
Axes: `...` any leading axes (batch, position), `C` d_model.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from groundup.transformer.residual_norm import widened

EPS = 1e-5  # Llama 2 and 3, SmolLM2; Qwen2 has 1e-6, which is also T5's


def rms_norm(
    x: Float[Tensor, "... C"],
    weight: Float[Tensor, "C"] | None = None,
    eps: float = EPS,
) -> Float[Tensor, "... C"]:
    """Divide each row by its root mean square, then scale each column.

    eps is added to the mean square, inside the root. In half precision everything is
    computed in float32 and rounded once, at the end, to x's dtype; transformers' Llama
    rounds before it multiplies by the weight, and again after. Example: x = [3, 4],
    eps = 0 has a mean square of 12.5 and gives [0.849, 1.131].

    Raises:
        ValueError: eps is negative.
    """
    if eps < 0:
        raise ValueError(f"eps must be at least 0; got {eps}")
    wide = widened(x)
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (y if weight is None else y * weight).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    """`rms_norm` with its gradient in closed form, for speed on a CPU.

    Keeps x and one number a row for the way back. A second derivative is refused;
    `rms_norm` has it.

    Raises:
        RuntimeError: backward with create_graph=True.
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        wide = widened(x)
        square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
        inverse = square.div_(x.shape[-1]).add_(eps).rsqrt_()
        return (wide * inverse * weight).to(x.dtype), inverse

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(inputs[0], inputs[1], output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None]:
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError(
                "the fast RMSNorm has no second derivative; call fuse(model, False)"
            )
        x, weight, inverse = ctx.saved_tensors
        wide, grad, scale = widened(x), widened(grad), widened(weight)
        product = grad * wide
        weight_grad = product.reshape(-1, x.shape[-1]).T @ inverse.flatten()
        # the part along x could only change its length, which the norm forgets
        along = (product @ scale).unsqueeze(-1) * inverse**3 / x.shape[-1]
        x_grad = (grad * scale).mul_(inverse).addcmul_(wide, along, value=-1)
        return x_grad.to(x.dtype), weight_grad.to(weight.dtype), None


class RMSNorm(nn.Module):
    """`rms_norm` with a learned scale that starts at 1.

    Args:
        d_model: width C of the rows.
        eps: see `rms_norm`.

    Raises:
        ValueError: d_model is below 1 or eps is negative.
    """

    fused = False  # True: the closed-form gradient; without gradients, torch's kernel

    def __init__(self, d_model: int, eps: float = EPS) -> None:
        super().__init__()
        if d_model < 1:
            raise ValueError(f"d_model must be a positive integer; got {d_model}")
        if eps < 0:
            raise ValueError(f"eps must be at least 0; got {eps}")
        self.weight = nn.Parameter(torch.ones(d_model))
        self.eps = eps

    def forward(self, x: Float[Tensor, "... C"]) -> Float[Tensor, "... C"]:
        """Normalise along the last axis."""
        if self.fused and torch.is_grad_enabled():
            return _RMSNorm.apply(x, self.weight, self.eps)[0]
        if self.fused:
            return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)
        return rms_norm(x, self.weight, self.eps)
