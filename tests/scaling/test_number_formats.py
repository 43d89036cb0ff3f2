"""Formats by hand against torch: every 16-bit pattern, every tie, random bits."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from groundup.scaling.number_formats import (
    BFLOAT16,
    FLOAT8_E4M3,
    FLOAT8_E5M2,
    FLOAT16,
    FLOAT32,
    FORMATS,
    Format,
    decode,
    gap,
    round_randomly,
    round_to,
)

TORCH = {fmt: getattr(torch, fmt.name) for fmt in FORMATS}
INTEGERS = {8: torch.int8, 16: torch.int16, 32: torch.int32}
SMALL = [fmt for fmt in FORMATS if fmt.n_bits <= 16]
each_format = pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
each_small = pytest.mark.parametrize("fmt", SMALL, ids=lambda f: f.name)


def bits_of(x):
    """A tensor's own bits, as integers that are not negative."""
    n_bits = 8 * x.element_size()
    return x.view(INTEGERS[n_bits]).long() & (2**n_bits - 1)


def torch_numbers(bits, fmt):
    """What torch reads in patterns of bits."""
    signed = torch.where(bits >= 2 ** (fmt.n_bits - 1), bits - 2**fmt.n_bits, bits)
    return signed.to(INTEGERS[fmt.n_bits]).view(TORCH[fmt]).double()


def random_floats(n, seed):
    """float32 of random bits: all exponents, subnormals, infinities, NaN."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(2**31), 2**31, (n,), generator=generator)
    return bits.to(torch.int32).view(torch.float32)


def assert_same(found, expected):
    """Equal with NaN for NaN, and with the sign of zero."""
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    numbers = ~expected.isnan()
    assert torch.equal(found.signbit()[numbers], expected.signbit()[numbers])


@each_small
def test_every_pattern_means_what_torch_reads(fmt):
    bits = torch.arange(2**fmt.n_bits)
    assert_same(decode(bits, fmt), torch_numbers(bits, fmt))


def test_float32_patterns_mean_what_torch_reads():
    x = random_floats(200_000, 0)
    assert_same(decode(bits_of(x), FLOAT32), x.double())


@pytest.mark.parametrize(
    ("fmt", "bits", "value"),
    [
        (FLOAT16, 0b0_10000_1000000000, 3.0),  # 2^(16-15) * 1.5
        (FLOAT16, 0b1_01111_0000000001, -1 - 2**-10),
        (FLOAT16, 0b0_00000_0000000001, 2**-24),  # no leading 1: 2^-14 * 2^-10
        (FLOAT16, 0b0_00001_0000000000, 2**-14),
        (FLOAT16, 0b0_11110_1111111111, 65504.0),
        (BFLOAT16, 0b0_01111111_0000001, 1 + 2**-7),
        (BFLOAT16, 0b0_00000000_0000001, 2**-133),
        (FLOAT8_E4M3, 0b0_1111_110, 448.0),  # 2^(15-7) * 1.75: the top is not lost
        (FLOAT8_E5M2, 0b0_11111_00, math.inf),
    ],
)
def test_patterns_by_hand(fmt, bits, value):
    assert decode(torch.tensor([bits]), fmt).item() == value


@each_format
def test_limits_are_those_of_finfo(fmt):
    info = torch.finfo(TORCH[fmt])
    assert fmt.largest == info.max
    assert fmt.smallest_normal == info.smallest_normal
    assert fmt.n_bits == info.bits
    assert gap(torch.tensor(1.0), fmt).item() == info.eps
    assert round_to(torch.tensor(fmt.smallest).double(), fmt).item() == fmt.smallest
    half = torch.tensor(fmt.smallest / 2, dtype=torch.float64)
    assert round_to(half, fmt).item() == 0.0  # a tie with 0, which is even
    above = torch.nextafter(half, torch.ones((), dtype=torch.float64))
    assert round_to(above, fmt).item() == fmt.smallest


@each_small
def test_random_float32_round_as_torch_casts(fmt):
    x = random_floats(300_000, 1)
    normal = torch.randn(300_000, generator=torch.Generator().manual_seed(2))
    for values in (x, normal, 1e-6 * normal, 1e5 * normal):
        assert_same(round_to(values, fmt), values.to(TORCH[fmt]).double())


@each_small
def test_every_tie_and_its_neighbours_round_as_torch_casts(fmt):
    """Halfway between all neighbours: exact in float32, which has more bits."""
    numbers = torch_numbers(torch.arange(2 ** (fmt.n_bits - 1)), fmt)
    numbers = numbers[numbers.isfinite()]
    ties = ((numbers[1:] + numbers[:-1]) / 2).float()
    ties = ties[ties >= torch.finfo(torch.float32).smallest_normal]
    beyond = torch.tensor(fmt.largest + gap(torch.tensor(fmt.largest), fmt).item() / 2)
    ties = torch.cat((ties, beyond.float()[None]))
    up, down = (torch.nextafter(ties, torch.tensor(to)) for to in (math.inf, 0.0))
    for values in (ties, up, down, -ties, -up, -down):
        assert_same(round_to(values, fmt), values.to(TORCH[fmt]).double())


def test_float64_rounds_to_float32_as_torch_casts():
    generator = torch.Generator().manual_seed(3)
    exponent = torch.randint(-160, 140, (200_000,), generator=generator)
    x = torch.randn(200_000, dtype=torch.float64, generator=generator)
    x = torch.ldexp(x, exponent)
    ties = random_floats(1000, 4).double()
    ties = ties[ties.isfinite()]
    ties = ties + gap(ties, FLOAT32) / 2 * ties.sign()
    for values in (x, ties):
        assert_same(round_to(values, FLOAT32), values.float().double())


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (1 + 2**-8, 1.0),  # a tie: 1 has an even last bit
        (1 + 3 * 2**-8, 1 + 2**-6),  # a tie: between odd 1 + 2^-7 and even 1 + 2^-6
        (1 + 2**-8 + 2**-20, 1 + 2**-7),
        (257.0, 256.0),  # neighbours are 2 apart from 256 on
        (-0.0, -0.0),
        (math.inf, math.inf),
    ],
)
def test_bfloat16_by_hand(x, expected):
    found = round_to(torch.tensor(x, dtype=torch.float64), BFLOAT16)
    assert_same(found, torch.tensor(expected, dtype=torch.float64))


def test_one_rounding_not_two():
    """1 + 2^-8 + 2^-40 is above the tie; through float32 it is on it and goes down."""
    x = torch.tensor(1 + 2**-8 + 2**-40, dtype=torch.float64)
    assert round_to(x, BFLOAT16).item() == 1 + 2**-7
    assert x.float().bfloat16().item() == 1.0


finite = st.floats(-448, 448, allow_nan=False)


@each_format
@settings(max_examples=60)
@given(x=finite, y=finite)
def test_rounding_keeps_order_and_is_idempotent(fmt, x, y):
    low, high = (torch.tensor(v, dtype=torch.float64) for v in sorted((x, y)))
    a, b = round_to(low, fmt), round_to(high, fmt)
    assert a <= b
    assert torch.equal(round_to(a, fmt), a)
    assert (a - low).abs() <= gap(low, fmt) / 2
    assert torch.equal(round_to(-low, fmt), -a)


def test_gap_is_the_way_to_the_next_number():
    x = torch.tensor([1.0, 1.99, 2.0, 3.7, 100.0, 2.0**-14, 2.0**-20, 0.0])
    for fmt in (FLOAT16, BFLOAT16):
        start = round_to(x, fmt).to(TORCH[fmt])
        after = torch.nextafter(start, torch.full_like(start, 1e4))
        assert torch.equal(gap(start, fmt), after.double() - start.double())


def test_random_rounding_has_the_right_mean():
    """Five sigma: a correct function fails once in 1.7 million runs."""
    n, generator = 40_000, torch.Generator().manual_seed(0)
    for x in (1 + 2**-9, -3.001, 1e-3):
        found = round_randomly(torch.full((n,), x).double(), BFLOAT16, generator)
        step = gap(torch.tensor(x), BFLOAT16).item()
        low = math.floor(x / step) * step
        assert set(found.tolist()) == {low, low + step}
        p = (x - low) / step
        sigma = step * math.sqrt(p * (1 - p) / n)
        assert abs(found.mean().item() - x) < 5 * sigma


@settings(max_examples=60)
@given(x=finite, seed=st.integers(0, 2**31))
def test_random_rounding_moves_nothing_that_is_exact(x, seed):
    exact = round_to(torch.tensor(x), BFLOAT16)
    generator = torch.Generator().manual_seed(seed)
    assert torch.equal(round_randomly(exact, BFLOAT16, generator), exact)


def test_refuses_what_is_no_format_or_no_pattern():
    with pytest.raises(ValueError, match="n_fraction must be at least 1; got 0"):
        Format("float9", 8, 0)
    for bad in (-1, 256):
        with pytest.raises(ValueError, match=r"bits must lie in \[0, 2\^8\)"):
            decode(torch.tensor([bad]), FLOAT8_E4M3)
