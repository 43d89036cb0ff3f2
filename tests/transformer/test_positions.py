"""Positions against the paper's formula, hand values and transformers."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from groundup.transformer.positions import (
    LEARNED_STD,
    ByteReader,
    LearnedPositions,
    SinusoidalPositions,
    shift_rotation,
    sinusoid_table,
    wavelengths,
)

EXACT = {"rtol": 0, "atol": 1e-12}


def table64(n, d, base=10_000.0, **kwargs):
    return sinusoid_table(n, d, base, dtype=torch.float64, **kwargs)


def by_the_formula(n_positions, d_model, base=10_000.0):
    """Vaswani et al. (2017), section 3.5, one entry at a time."""
    table = torch.zeros(n_positions, d_model, dtype=torch.float64)
    for pos in range(n_positions):
        for i in range(d_model // 2):
            angle = pos / base ** (2 * i / d_model)
            table[pos, 2 * i] = math.sin(angle)
            table[pos, 2 * i + 1] = math.cos(angle)
    return table


# --- the table ------------------------------------------------------------------


def test_table_by_hand():
    """C = 4, base 10,000: the planes turn by 1 and by 1/100 radian a token.

    Row 0 is (0, 1, 0, 1). Row 1 is (sin 1, cos 1, sin 0.01, cos 0.01), which is
    (0.84147, 0.54030, 0.0099998, 0.99995); row 3 has sin 3 = 0.14112.
    """
    table = table64(4, 4)
    assert table[0].tolist() == [0, 1, 0, 1]
    expected = torch.tensor([0.84147, 0.54030, 0.0099998, 0.99995]).double()
    torch.testing.assert_close(table[1], expected, rtol=0, atol=5e-6)
    assert table[3, 0].item() == pytest.approx(0.14112, abs=5e-6)
    assert table[3, 3].item() == pytest.approx(math.cos(0.03), abs=1e-15)


@given(
    n=st.integers(0, 20),
    half=st.integers(1, 16),
    base=st.sampled_from([10.0, 10_000.0, 500_000.0]),
)
def test_table_is_the_formula(n, half, base):
    torch.testing.assert_close(
        table64(n, 2 * half, base), by_the_formula(n, 2 * half, base), **EXACT
    )


def test_same_as_transformers():
    """XLM fills its table by the paper's layout; in float32."""
    xlm = pytest.importorskip("transformers.models.xlm.modeling_xlm")
    theirs = torch.empty(100, 24)
    xlm.create_sinusoidal_embeddings(100, 24, theirs)
    torch.testing.assert_close(sinusoid_table(100, 24), theirs, rtol=0, atol=1e-6)


def test_same_as_the_exponential_form():
    """The form of many tutorials: frequencies exp(-ln(base) 2i / C)."""
    t = torch.arange(50, dtype=torch.float64)[:, None]
    frequency = torch.exp(torch.arange(0, 16, 2).double() * (-math.log(10_000.0) / 16))
    table = torch.zeros(50, 16, dtype=torch.float64)
    table[:, 0::2] = torch.sin(t * frequency)
    table[:, 1::2] = torch.cos(t * frequency)
    torch.testing.assert_close(table64(50, 16), table, **EXACT)


def test_another_table_goes_by_the_same_name():
    """Sines first, exponent i / (C/2 - 1): same shape, and a permutation of columns
    does not repair it, since the frequencies differ too."""
    t = torch.arange(50, dtype=torch.float64)[:, None]
    ladder = torch.exp(-math.log(10_000.0) * torch.arange(8).double() / 7)
    halves = torch.cat([torch.sin(t * ladder), torch.cos(t * ladder)], dim=1)
    ours = table64(50, 16)
    sorted_columns = torch.cat([ours[:, 0::2], ours[:, 1::2]], dim=1)
    assert (halves - ours).abs().max() > 1
    assert (halves - sorted_columns).abs().max() > 1


def test_rows_far_out_are_accurate():
    """Position 2^24 + 1 does not exist in float32; the angles are in float64."""
    t = 2**24 + 1
    assert torch.tensor(t, dtype=torch.float32).item() != t
    far = sinusoid_table(1, 4, start=t)
    assert far[0, 0].item() == pytest.approx(math.sin(t), abs=1e-6)
    assert far[0, 3].item() == pytest.approx(math.cos(t / 100), abs=1e-6)


def test_start_skips_rows():
    torch.testing.assert_close(
        table64(5, 6, start=7), table64(12, 6)[7:], rtol=0, atol=0
    )


def test_wavelengths_by_hand():
    """C = 4: 2π and 2π √10,000 = 200π tokens; the longest stays below 2π base."""
    assert wavelengths(4).tolist() == pytest.approx([2 * math.pi, 200 * math.pi])
    assert wavelengths(64)[-1] < 2 * math.pi * 10_000
    # A plane whose wavelength is a whole number of tokens repeats exactly.
    base = (8 / (2 * math.pi)) ** 2  # second of two wavelengths: 2π √base = 8
    table = table64(24, 4, base)[:, 2:]
    torch.testing.assert_close(table[:16], table[8:], **EXACT)


# --- what it promises -----------------------------------------------------------


@given(t=st.integers(0, 500), shift=st.integers(-200, 200), half=st.integers(1, 12))
def test_a_shift_is_a_rotation(t, shift, half):
    t = max(t, -shift)
    before, after = (table64(1, 2 * half, start=p)[0] for p in (t, t + shift))
    rotation = shift_rotation(shift, 2 * half)
    torch.testing.assert_close(rotation @ before, after, rtol=0, atol=1e-11)


def test_rotation_by_hand():
    """One plane, a shift of one: [[cos 1, sin 1], [-sin 1, cos 1]] on (sin, cos)."""
    c, s = math.cos(1), math.sin(1)
    expected = torch.tensor([[c, s], [-s, c]], dtype=torch.float64)
    torch.testing.assert_close(shift_rotation(1, 2), expected, rtol=0, atol=1e-15)


@given(a=st.integers(-99, 99), b=st.integers(-99, 99))
def test_rotations_add_up(a, b):
    """R(a) R(b) = R(a + b), R(-a) is the transpose, lengths stay."""
    ra, rb = shift_rotation(a, 8), shift_rotation(b, 8)
    torch.testing.assert_close(ra @ rb, shift_rotation(a + b, 8), **EXACT)
    torch.testing.assert_close(shift_rotation(-a, 8), ra.T, **EXACT)
    torch.testing.assert_close(ra @ ra.T, torch.eye(8, dtype=torch.float64), **EXACT)


@given(m=st.integers(0, 300), n=st.integers(0, 300), by=st.integers(0, 300))
def test_similarity_depends_on_the_distance_only(m, n, by):
    table = table64(601, 16)
    torch.testing.assert_close(
        table[m] @ table[n], table[m + by] @ table[n + by], **EXACT
    )


def test_similarity_is_a_sum_of_cosines():
    """p_m . p_n = sum_i cos((m - n) w_i): C/2 on the diagonal."""
    table = table64(40, 6)
    frequency = 2 * math.pi / wavelengths(6)
    expected = torch.cos(torch.arange(40)[:, None] * frequency).sum(1)
    torch.testing.assert_close(table @ table[0], expected, **EXACT)
    assert (table @ table[0])[0].item() == pytest.approx(3)


# --- the modules ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_sinusoidal_module_adds_the_table(dtype):
    x = torch.randn(2, 9, 6).to(dtype)
    layer = SinusoidalPositions(6)
    expected = x + by_the_formula(9, 6).to(dtype)
    tolerance = {torch.float64: 1e-15, torch.float32: 1e-6, torch.bfloat16: 0.0}[dtype]
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=tolerance)
    assert list(layer.parameters()) == []
    assert layer.state_dict() == {}


def test_sinusoidal_module_grows_and_can_start_anywhere():
    layer = SinusoidalPositions(4)
    for start, n in ((0, 1), (3, 5), (900, 2), (0, 40), (1, 1)):
        expected = by_the_formula(start + n, 4)[start:]
        zeros = torch.zeros(1, n, 4, dtype=torch.float64)
        torch.testing.assert_close(layer(zeros, start)[0], expected, **EXACT)


def test_learned_module_adds_its_rows_and_trains_only_those():
    torch.manual_seed(0)
    layer = LearnedPositions(6, 4)
    x = torch.randn(2, 3, 4)
    assert torch.equal(layer(x, start=2), x + layer.table[2:5])
    layer(x, start=2).sum().backward()
    reached = layer.table.grad.abs().sum(1) > 0
    assert reached.tolist() == [False, False, True, True, True, False]
    assert (layer.table.grad[2:5] == 2).all()  # two sequences of the batch


def test_learned_rows_start_at_their_scale():
    """Sample deviation of 80,000 numbers: 5 sigma is 1.3 %, one false alarm in 1.7
    million seeds."""
    torch.manual_seed(0)
    std = LearnedPositions(1000, 80).table.std().item()
    assert abs(std / LEARNED_STD - 1) < 0.013


def test_learned_module_has_nothing_past_its_end():
    layer = LearnedPositions(8, 4)
    layer(torch.zeros(1, 8, 4))
    with pytest.raises(ValueError, match=r"positions 0 to 8 .* rows 0 to 7"):
        layer(torch.zeros(1, 9, 4))
    with pytest.raises(ValueError, match="positions 7 to 8"):
        layer(torch.zeros(1, 2, 4), start=7)
    with pytest.raises(ValueError, match="positions -1"):
        layer(torch.zeros(1, 2, 4), start=-1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sinusoid_table(4, 5), "even number"),
        (lambda: sinusoid_table(4, 0), "even number"),
        (lambda: sinusoid_table(-1, 4), "n_positions"),
        (lambda: sinusoid_table(1, 4, start=-1), "start"),
        (lambda: sinusoid_table(1, 4, base=0.0), "base"),
        (lambda: SinusoidalPositions(3), "even number"),
        (lambda: SinusoidalPositions(4)(torch.zeros(1, 1, 4), start=-1), "start"),
        (lambda: LearnedPositions(0, 4), "n_positions"),
        (lambda: LearnedPositions(4, 0), "d_model"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- what it is for -------------------------------------------------------------


def attend(x):
    return F.scaled_dot_product_attention(x, x, x)


@given(seed=st.integers(0, 2**31))
def test_attention_alone_cannot_tell_the_order_and_with_positions_it_can(seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 6, 8, dtype=torch.float64, generator=generator)
    order = torch.randperm(6, generator=generator)
    torch.testing.assert_close(attend(x[:, order]), attend(x)[:, order], **EXACT)
    if (order != torch.arange(6)).any():
        add = SinusoidalPositions(8)
        apart = (attend(add(x[:, order])) - attend(add(x))[:, order]).abs().max()
        assert apart > 1e-6


def test_reader_is_causal():
    torch.manual_seed(0)
    ids = torch.randint(256, (2, 12))
    changed = ids.clone()
    changed[:, 7:] = 3
    for positions in (None, SinusoidalPositions(16), LearnedPositions(12, 16)):
        model = ByteReader(positions, d_model=16, n_heads=2)
        before, after = model(ids), model(changed)
        torch.testing.assert_close(before[:, :7], after[:, :7], rtol=0, atol=1e-6)
        assert (before[:, 7:] - after[:, 7:]).abs().max() > 1e-3


def test_reader_without_positions_reads_a_bag_of_bytes():
    """One causal layer: the last logits ignore the order of what came before."""
    torch.manual_seed(0)
    ids = torch.randint(256, (1, 12))
    shuffled = torch.cat([ids[:, torch.randperm(11)], ids[:, 11:]], dim=1)
    for positions, same in ((None, True), (SinusoidalPositions(16), False)):
        model = ByteReader(positions, d_model=16, n_heads=2)
        change = (model(ids)[:, -1] - model(shuffled)[:, -1]).abs().max().item()
        assert (change < 1e-5) == same
        assert same or change > 1e-3


def test_reader_starts_where_it_is_told():
    torch.manual_seed(0)
    ids = torch.randint(256, (1, 5))
    learned = ByteReader(LearnedPositions(9, 16), d_model=16, n_heads=2)
    moved = learned(ids, start=4)
    with torch.no_grad():
        learned.positions.table[:5] = learned.positions.table[4:9].clone()
    torch.testing.assert_close(learned(ids), moved, rtol=0, atol=1e-6)
    without = ByteReader(None, d_model=16, n_heads=2)
    assert torch.equal(without(ids, start=4), without(ids))
