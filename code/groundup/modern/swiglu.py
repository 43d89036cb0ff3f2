"""SwiGLU: a feed-forward layer whose hidden units are opened by a gate.

Here: SiLU, the gated product, the layer, and its relatives with and without a gate, to
be compared at equal parameters. Left out: fused kernels.

Source: Shazeer (2020), eqs. 5 and 6; So et al. (2021), section 3 (ReLU²). Page:
book/3-modern/swiglu.md.
Axes: `...` any leading axes (batch, position), `C` d_model, `F` d_ff.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

MULTIPLE = 16  # d_ff is rounded up to one, for the matrix kernels


def silu(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """x times the logistic function of x; also called swish. Any shape and dtype.

    Example: silu(2) = 2 / (1 + exp(-2)) = 1.762, and silu(-2) = -0.238.
    """
    return x * torch.sigmoid(x)


def squared_relu(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """The square of the positive part: 0 for x < 0, x² beyond. Any shape and dtype."""
    return torch.relu(x).square()


def identity(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """x; as a gate's function it leaves the bare product, the bilinear layer."""
    return x


def gated_width(d_model: int) -> int:
    """Return the d_ff at which three matrices hold what two of width 4 C hold: 8 C / 3.

    Rounded up to a multiple of `MULTIPLE`. Example: `gated_width(384)` is 1024.
    """
    return -(-8 * d_model // (3 * MULTIPLE)) * MULTIPLE


def _check(d_model: int, d_ff: int) -> None:
    for name, size in (("d_model", d_model), ("d_ff", d_ff)):
        if size < 1:
            raise ValueError(f"{name} must be a positive integer; got {size}")


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
        _check(d_model, d_ff)
        self.gate_up = nn.Linear(d_model, 2 * d_ff, bias=False)
        self.down = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Float[Tensor, "... C"]) -> Float[Tensor, "... C"]:
        """Map each token's vector by itself."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down((F.silu if self.fused else silu)(gate) * up)


# Function, and whether a second map is multiplied with what it returns.
ZOO: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "relu": (torch.relu, False),
    "gelu": (F.gelu, False),
    "silu": (F.silu, False),
    "relu2": (squared_relu, False),
    "bilinear": (identity, True),
    "reglu": (torch.relu, True),
    "geglu": (F.gelu, True),
    "swiglu": (F.silu, True),
}


class ZooLayer(nn.Module):
    """A member of `ZOO` as a layer with as many parameters as the others.

    Plain: down(function(first(x))). Gated: the rows of `first` are the gate's, then
    those of `up`, and the layer is down(function(gate(x)) * up(x)). No biases.

    Args:
        name: a key of `ZOO`.
        d_model: C.
        d_ff: F of the gated members, `gated_width(d_model)` if None; a plain member
            is half as wide again, so that two matrices hold what three do.

    Raises:
        ValueError: the name is unknown, a width is below 1, or d_ff is odd.
    """

    def __init__(self, name: str, d_model: int, d_ff: int | None = None) -> None:
        super().__init__()
        if name not in ZOO:
            raise ValueError(f"name must be one of {sorted(ZOO)}; got {name!r}")
        d_ff = gated_width(d_model) if d_ff is None else d_ff
        _check(d_model, d_ff)
        if d_ff % 2:
            raise ValueError(f"d_ff must be even, for 3/2 of it; got {d_ff}")
        self.function, self.gated = ZOO[name]
        width = d_ff if self.gated else 3 * d_ff // 2
        self.first = nn.Linear(d_model, 2 * d_ff if self.gated else width, bias=False)
        self.down = nn.Linear(width, d_model, bias=False)

    def hidden(self, x: Float[Tensor, "... C"]) -> Float[Tensor, "... F"]:
        """What the second matrix reads: one number a hidden unit."""
        before = self.first(x)
        if not self.gated:
            return self.function(before)
        gate, up = before.chunk(2, dim=-1)
        return self.function(gate) * up

    def forward(self, x: Float[Tensor, "... C"]) -> Float[Tensor, "... C"]:
        """Map each token's vector by itself."""
        return self.down(self.hidden(x))
