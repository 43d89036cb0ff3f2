"""Floating-point formats by hand: what a pattern of bits means, and how to round.

Here: the five formats that training uses, decoding, rounding to nearest with ties to
even, subnormals and overflow included, the gap between neighbours, and stochastic
rounding. All results are float64, which holds every number of these formats exactly.
Left out: formats whose blocks share a scale (Part 9), other directions of rounding.

Sources: Goldberg (1991), section 1, for the ideas; Micikevicius et al. (2022), table 1,
for the two of 8 bits. Page: book/4-scaling/mixed_precision.md.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Format:
    """A sign, an exponent and a fraction.

    Raises:
        ValueError: a part has no bits.
    """

    name: str
    n_exponent: int  # bits
    n_fraction: int  # bits
    infinite: bool = True  # False: no infinity, and only all ones is not a number

    def __post_init__(self) -> None:
        for name in ("n_exponent", "n_fraction"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be at least 1; got {getattr(self, name)}"
                )

    @property
    def n_bits(self) -> int:
        """Of a number."""
        return 1 + self.n_exponent + self.n_fraction

    @property
    def bias(self) -> int:
        """What is subtracted from the stored exponent."""
        return 2 ** (self.n_exponent - 1) - 1

    @property
    def smallest_normal(self) -> float:
        """Below it numbers lose significant bits, one by one."""
        return math.ldexp(1.0, 1 - self.bias)

    @property
    def smallest(self) -> float:
        """The smallest number above 0."""
        return math.ldexp(self.smallest_normal, -self.n_fraction)

    @property
    def largest(self) -> float:
        """The largest finite number."""
        if self.infinite:  # the highest exponent is for infinity and NaN
            return math.ldexp(2 - 2.0**-self.n_fraction, self.bias)
        return math.ldexp(2 - 2 * 2.0**-self.n_fraction, self.bias + 1)


FLOAT32 = Format("float32", 8, 23)
BFLOAT16 = Format("bfloat16", 8, 7)
FLOAT16 = Format("float16", 5, 10)
FLOAT8_E5M2 = Format("float8_e5m2", 5, 2)
FLOAT8_E4M3 = Format("float8_e4m3fn", 4, 3, infinite=False)
FORMATS = (FLOAT32, BFLOAT16, FLOAT16, FLOAT8_E5M2, FLOAT8_E4M3)


def decode(bits: Int[Tensor, "*shape"], fmt: Format) -> Float[Tensor, "*shape"]:
    """Return the numbers that patterns of bits stand for (eq. 2 of the page).

    Args:
        bits: integers in [0, 2^n_bits): sign, exponent, fraction, highest bit first.
        fmt: how many bits each has.

    Raises:
        ValueError: a pattern has other bits.

    Example: 0b0_10000_1000000000 in float16 is 2 * 1.5 = 3.
    """
    if ((bits < 0) | (bits >= 2**fmt.n_bits)).any():
        raise ValueError(f"bits must lie in [0, 2^{fmt.n_bits}) for {fmt.name}")
    sign = 1.0 - 2.0 * (bits >> (fmt.n_bits - 1))
    stored = bits >> fmt.n_fraction & (2**fmt.n_exponent - 1)
    fraction = (bits & (2**fmt.n_fraction - 1)).double() / 2**fmt.n_fraction
    # Exponent 0: the leading 1 is missing, and the power is that of exponent 1.
    lead = (stored > 0).double()
    value = (lead + fraction) * _power(stored.clamp(min=1) - fmt.bias)
    top = stored == 2**fmt.n_exponent - 1
    if fmt.infinite:
        value[top] = math.inf
        value[top & (fraction > 0)] = math.nan
    else:
        value[top & (fraction == 1 - 2.0**-fmt.n_fraction)] = math.nan
    return sign * value


def gap(x: Float[Tensor, "*shape"], fmt: Format) -> Float[Tensor, "*shape"]:
    """Return the distance from `|x|` up to the next number, for finite x in range.

    It doubles at every power of two, and is the smallest number below the smallest
    normal one. Example: 2^-7 at 1 and 2^-6 at 2 in bfloat16.
    """
    lowest = 1 - fmt.bias
    _, exponent = torch.frexp(x.double())  # |x| in [2^(e-1), 2^e); 0 for 0
    exponent = (exponent - 1).masked_fill(x == 0, lowest).clamp(min=lowest)
    return _power(exponent - fmt.n_fraction)


def round_to(x: Float[Tensor, "*shape"], fmt: Format) -> Float[Tensor, "*shape"]:
    """Return the nearest number of the format; of two equally near ones, the even one.

    What rounds to beyond the largest becomes infinite, or the largest where the format
    has no infinity (as in torch 2.13; others, and earlier versions, return NaN).

    Example: 1 + 2^-8 is a tie in bfloat16 and becomes 1; 1 + 3 * 2^-8 becomes 1 + 2^-6.
    """
    x = x.double()
    step = gap(x.nan_to_num(), fmt)
    rounded = torch.round(x / step) * step  # torch.round takes ties to even
    limit = math.inf if fmt.infinite else fmt.largest
    outside = rounded.abs() > fmt.largest  # never for NaN
    return torch.where(outside, torch.full_like(x, limit).copysign(x), rounded)


def round_randomly(
    x: Float[Tensor, "*shape"], fmt: Format, generator: torch.Generator
) -> Float[Tensor, "*shape"]:
    """Round down or up at random, so that the mean of the result is x.

    The share of the gap that x lies above its lower neighbour is the probability of
    going up. For finite x in range. Source: Gupta et al. (2015), section 3.

    Example: 1 + 2^-9 in bfloat16 becomes 1 + 2^-7 one time in four, else 1.
    """
    step = gap(x, fmt)
    chance = torch.rand(x.shape, dtype=torch.float64, generator=generator)
    return torch.floor(x.double() / step + chance) * step


def _power(exponent: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """2^exponent, exactly: the bits of a float64."""
    return ((exponent.long() + 1023) << 52).view(torch.float64)
