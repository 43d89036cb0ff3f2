"""SwiGLU: a feed-forward layer whose hidden units are opened by a gate.

Here: SiLU, the gated product and the layer. Left out: fused kernels.

Source: Shazeer (2020), eqs. 5 and 6. Page: book/3-modern/swiglu.md.
Axes: `...` any leading axes (batch, position), `C` d_model, `F` d_ff.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

MULTIPLE = 16  # d_ff is rounded up to one, for the matrix kernels


def silu(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """x times the logistic function of x; also called swish. Any shape and dtype."""
    return x * torch.sigmoid(x)


def gated_width(d_model: int) -> int:
    """Return the d_ff at which three matrices hold what two of width 4 C hold: 8 C / 3.

    Rounded up to a multiple of `MULTIPLE`. Example: `gated_width(384)` is 1024.
    """
    return -(-8 * d_model // (3 * MULTIPLE)) * MULTIPLE


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), the same at every position, without bias.

    `gate_up` holds both maps, the gate's rows first: one product instead of two.

    Args:
        d_model: C.
        d_ff: F; `gated_width(d_model)` if None.

    Raises:
        ValueError: a width is below 1.
    """

    fused = False  # True: torch's kernel for SiLU

    def __init__(self, d_model: int, d_ff: int | None = None) -> None:
        super().__init__()
        d_ff = gated_width(d_model) if d_ff is None else d_ff
        for name, size in (("d_model", d_model), ("d_ff", d_ff)):
            if size < 1:
                raise ValueError(f"{name} must be a positive integer; got {size}")
        self.gate_up = nn.Linear(d_model, 2 * d_ff, bias=False)
        self.down = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Float[Tensor, "... C"]) -> Float[Tensor, "... C"]:
        """Map each token's vector by itself."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down((F.silu if self.fused else silu)(gate) * up)
