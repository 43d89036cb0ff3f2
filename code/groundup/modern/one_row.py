"""Matrix times one row: the product of decoding, by the faster of two kernels.

With one new token every linear map reads its whole matrix for one row, so the memory
decides. Torch's general product prepares for many rows, which in bfloat16 can cost more
than the product; its matrix-vector product does not. Which is faster depends on the
processor, so it is measured.

Here: a linear map with that choice, and the choice for a whole model. Left out: packing
the weights once for all, integers (the part on inference).

Page: book/3-modern/decoder.md.
Axes: `I` inputs, `O` outputs, `...` any leading axes.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from groundup.foundations.environment import median_seconds


class OneRowLinear(nn.Linear):
    """`nn.Linear` that takes a single row by `torch.mv` where `by_vector` is set."""

    by_vector = False

    def forward(self, x: Float[Tensor, "... I"]) -> Float[Tensor, "... O"]:
        """Return x times the transposed weight, plus the bias."""
        if not self.by_vector or x.numel() != self.in_features:
            return super().forward(x)
        y = torch.mv(self.weight, x.reshape(-1))
        y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], -1)


@torch.no_grad()
def choose_products(model: nn.Module, *, by_vector: bool | None = None) -> bool:
    """Let every linear map of model use the faster product for a single row.

    The parameters stay the same objects; the results differ by rounding.

    Args:
        model: its linear maps become `OneRowLinear`.
        by_vector: decides; None: measure all of them in turn, both ways.

    Returns:
        Whether it is the matrix-vector product.
    """
    maps = [m for m in model.modules() if isinstance(m, nn.Linear)]
    for m in maps:
        m.__class__ = OneRowLinear
    if by_vector is None:
        rows = [torch.ones(1, m.in_features).to(m.weight) for m in maps]
        seconds = {}
        for way in (False, True):
            for m in maps:
                m.by_vector = way
            seconds[way] = median_seconds(
                lambda: [m(row) for m, row in zip(maps, rows, strict=True)]
            )
        by_vector = seconds[True] < seconds[False]
    for m in maps:
        m.by_vector = by_vector
    return by_vector
