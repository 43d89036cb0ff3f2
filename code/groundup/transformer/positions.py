"""Positions: numbers added to the embeddings so that attention can tell order.

Here: the sinusoidal table, its wavelengths, the rotation that moves it along, a
learned table, and a small byte reader that takes either (or neither). Left out:
positions that act inside the attention (RoPE, ALiBi: Part 3).

Sources: Vaswani et al. (2017), section 3.5, for the sinusoid; Gehring et al.
(2017), section 3.1, for the learned table. Page: book/1-transformer/positions.md.
Axes: `...` any leading axes, `B` batch, `T` positions, `C` model width, `V` bytes.
Positions count from 0.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from groundup.foundations.fitting import N_BYTES

BASE = 10_000.0  # Vaswani et al. (2017), section 3.5
LEARNED_STD = 0.02  # initial spread of a learned row, as in GPT-2


def wavelengths(d_model: int, base: float = BASE) -> Float[Tensor, "half"]:
    """Return how many tokens each plane of the sinusoid needs for one turn.

    Plane i holds columns 2i and 2i + 1; its wavelength is 2π base^(2i / C).

    Args:
        d_model: C, even.
        base: the slowest wavelength stays below 2π base.

    Returns:
        C / 2 wavelengths in tokens, shortest (2π) first, in float64.

    Raises:
        ValueError: d_model is not a positive even number, or base is not positive.
    """
    if d_model < 2 or d_model % 2:
        raise ValueError(
            f"d_model must be a positive even number, since each frequency fills "
            f"a sine and a cosine column; got {d_model}"
        )
    if not base > 0:
        raise ValueError(f"base must be positive; got {base}")
    exponents = torch.arange(0, d_model, 2, dtype=torch.float64) / d_model
    return 2 * torch.pi * base**exponents


def sinusoid_table(
    n_positions: int,
    d_model: int,
    base: float = BASE,
    *,
    start: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "T C"]:
    """Return the sinusoidal positions: sin and cos of t / base^(2i / C).

    The paper's layout: column 2i is the sine and column 2i + 1 the cosine of the
    same angle. Other libraries put all sines first, and some use an exponent of
    i / (C/2 - 1): the same name, another table.

    Args:
        n_positions: T, rows to make.
        d_model: C, even.
        base: sets the longest wavelength, see `wavelengths`.
        start: position of the first row.
        dtype: of the result; angles are computed in float64 in any case, since
            float32 cannot hold a large angle to a small fraction of a turn.

    Raises:
        ValueError: n_positions or start is negative, or as in `wavelengths`.

    Example: `sinusoid_table(2, 2)` is [[0, 1], [sin 1, cos 1]].
    """
    for name, value in (("n_positions", n_positions), ("start", start)):
        if value < 0:
            raise ValueError(f"{name} must not be negative; got {value}")
    t = torch.arange(start, start + n_positions, dtype=torch.float64)
    angles = t[:, None] * (2 * torch.pi / wavelengths(d_model, base))
    pairs = torch.stack((angles.sin(), angles.cos()), dim=-1)  # (T, C/2, 2)
    return pairs.flatten(1).to(dtype)


def shift_rotation(
    shift: int, d_model: int, base: float = BASE
) -> Float[Tensor, "C C"]:
    """Return R with `sinusoid_table(...)[t + shift] = R @ sinusoid_table(...)[t]`.

    R is block diagonal: plane i turns by shift / base^(2i / C), whatever t is.
    A negative shift gives the inverse, which is the transpose.

    Args:
        shift: tokens, of either sign.
        d_model: C, even.
        base: as for the table.

    Returns:
        An orthogonal matrix in float64.

    Raises:
        ValueError: as in `wavelengths`.
    """
    turn = shift * 2 * torch.pi / wavelengths(d_model, base)
    cos, sin = turn.cos(), turn.sin()
    blocks = torch.stack((cos, sin, -sin, cos), dim=-1).view(-1, 2, 2)
    return torch.block_diag(*blocks)


class SinusoidalPositions(nn.Module):
    """Add the sinusoidal table; it has no parameters and no last row.

    Args:
        d_model: C, even.
        base: sets the wavelengths.

    Raises:
        ValueError: as in `wavelengths`.
    """

    def __init__(self, d_model: int, base: float = BASE) -> None:
        super().__init__()
        wavelengths(d_model, base)  # refuse bad sizes before the first call
        self.d_model = d_model
        self.base = base
        # Grows on demand. Not a buffer: a checkpoint need not hold a formula.
        self._rows = sinusoid_table(0, d_model, base, dtype=torch.float64)

    def forward(
        self, x: Float[Tensor, "B T C"], start: int = 0
    ) -> Float[Tensor, "..."]:
        """Return x plus rows start to start + T of the table, in x's dtype.

        Raises:
            ValueError: start is negative.
        """
        if start < 0:
            raise ValueError(f"start must not be negative; got {start}")
        end = start + x.shape[1]
        if end > len(self._rows):
            self._rows = sinusoid_table(
                2 * end, self.d_model, self.base, dtype=torch.float64
            )
        return x + self._rows[start:end].to(x)


class LearnedPositions(nn.Module):
    """Add a trained row for each position; beyond the last row there is nothing.

    Args:
        n_positions: rows of the table, the longest sequence it can take.
        d_model: C.

    Raises:
        ValueError: a size is not positive.
    """

    def __init__(self, n_positions: int, d_model: int) -> None:
        super().__init__()
        for name, value in (("n_positions", n_positions), ("d_model", d_model)):
            if value < 1:
                raise ValueError(f"{name} must be positive; got {value}")
        self.table = nn.Parameter(torch.randn(n_positions, d_model) * LEARNED_STD)

    def forward(
        self, x: Float[Tensor, "B T C"], start: int = 0
    ) -> Float[Tensor, "..."]:
        """Return x plus rows start to start + T of the table.

        Raises:
            ValueError: the sequence ends beyond the last row.
        """
        end = start + x.shape[1]
        if start < 0 or end > len(self.table):
            raise ValueError(
                f"positions {start} to {end - 1} were asked for, but the table has "
                f"rows 0 to {len(self.table) - 1}: shorten the sequence, or build "
                f"LearnedPositions with n_positions of at least {end} and train it"
            )
        return x + self.table[start:end].to(x.dtype)


class ByteReader(nn.Module):
    """A next-byte model with one causal layer, for the experiments of the page.

    The layer is torch's own; pages 1.2 to 1.7 build one from nothing.

    Args:
        positions: module that maps x (B, T, C) to x with positions; None leaves
            the positions out.
        d_model: C.
        n_heads: H, divides d_model.
        embed_std: initial spread of the embedding. What counts is its ratio to the
            positions': the sinusoid has a root mean square of 0.71, learned rows
            start at LEARNED_STD.
    """

    def __init__(
        self,
        positions: nn.Module | None,
        d_model: int = 64,
        n_heads: int = 2,
        embed_std: float = 1.0,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(N_BYTES, d_model)
        nn.init.normal_(self.embed.weight, std=embed_std)
        self.positions = positions
        self.layer = nn.TransformerEncoderLayer(
            d_model,
            n_heads,
            dim_feedforward=4 * d_model,
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.norm = nn.LayerNorm(d_model)
        self.unembed = nn.Linear(d_model, N_BYTES)

    def forward(
        self, ids: Int[Tensor, "B T"], start: int = 0
    ) -> Float[Tensor, "B T V"]:
        """Return logits of the next byte; the first byte stands at position start."""
        x = self.embed(ids)
        if self.positions is not None:
            x = self.positions(x, start)
        future = nn.Transformer.generate_square_subsequent_mask(
            ids.shape[1], device=ids.device
        )
        return self.unembed(self.norm(self.layer(x, future, is_causal=True)))
