"""RoPE against complex numbers, transformers, llama.cpp's layout and its promises."""

import cmath
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from groundup.modern.rope import (
    half_split_order,
    half_split_rows,
    interleaved_rows,
    rope_frequencies,
    rope_tables,
    rotate,
    rotate_interleaved,
)

EXACT = {"rtol": 0, "atol": 1e-12}
LAYOUTS = pytest.mark.parametrize("turn", [rotate, rotate_interleaved])


def tables64(positions, d_head, theta=10_000.0, **kwargs):
    positions = torch.as_tensor(positions)
    return rope_tables(positions, d_head, theta, torch.float64, **kwargs)


def randn64(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


# --- by hand ----------------------------------------------------------------------


def test_frequencies_by_hand():
    """D = 4: 1 and 10000^(-1/2) = 0.01. With base 16 and D = 8: 1, 1/2, 1/4, 1/8."""
    assert rope_frequencies(4).tolist() == pytest.approx([1.0, 0.01], abs=1e-15)
    assert rope_frequencies(8, 16.0).tolist() == pytest.approx([1, 0.5, 0.25, 0.125])


def test_quarter_turn_by_hand():
    """D = 2 turns by one radian a token, so give the angle a quarter turn directly:
    (3, 4) -> (-4, 3). For D = 4 the planes are (x0, x2), (x1, x3) or (x0, x1),
    (x2, x3); a quarter turn in the first and none in the second."""
    cos, sin = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])
    x = torch.tensor([[3.0, 5.0, 4.0, 6.0]])
    assert rotate(x, cos, sin).tolist() == [[-4.0, 5.0, 3.0, 6.0]]
    assert rotate_interleaved(x, cos, sin).tolist() == [[-5.0, 3.0, 4.0, 6.0]]
    one = rotate(torch.tensor([[3.0, 4.0]]), cos[:, :1], sin[:, :1])
    assert one.tolist() == [[-4.0, 3.0]]


def test_score_by_hand():
    """q = k = (1, 0), D = 2: the score of positions m and n is cos(m - n).

    At 5 and 3: (cos 5, sin 5) . (cos 3, sin 3) = cos 2 = -0.41615.
    """
    x = torch.tensor([[1.0, 0.0]]).double()
    q, k = rotate(x, *tables64([5], 2)), rotate(x, *tables64([3], 2))
    assert (q @ k.T).item() == pytest.approx(-0.41615, abs=5e-6)


# --- oracles ----------------------------------------------------------------------


@LAYOUTS
@given(seed=st.integers(0, 99), half=st.integers(1, 8), theta=st.floats(2.0, 1e6))
@settings(max_examples=25)
def test_rotation_is_a_complex_product(turn, seed, half, theta):
    """Plane i as a complex number, times e^(i m w): one number at a time."""
    x, positions = randn64(5, 2 * half, seed=seed), [0, 1, 2, 30, 999]
    out = turn(x, *tables64(positions, 2 * half, theta))
    for t, m in enumerate(positions):
        for i in range(half):
            first, second = (i, i + half) if turn is rotate else (2 * i, 2 * i + 1)
            z = complex(x[t, first], x[t, second])
            z *= cmath.exp(1j * m * theta ** (-2 * i / (2 * half)))
            assert abs(z.real - out[t, first].item()) < 1e-10
            assert abs(z.imag - out[t, second].item()) < 1e-10


def llama_rotary(theta, d_head=16, **parameters):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=4 * d_head,
        num_attention_heads=4,
        rope_parameters={"rope_theta": theta, "rope_type": "default", **parameters},
    )
    return llama.LlamaRotaryEmbedding(config), llama.apply_rotary_pos_emb


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
def test_same_as_transformers(theta):
    """Two bases, positions a row; in float32, whose angles up to 60 radians are good to
    4e-6 in transformers (ours come from float64)."""
    q, k = randn64(2, 4, 7, 16).float(), randn64(2, 2, 7, 16, seed=1).float()
    positions = torch.stack((torch.arange(7), torch.arange(53, 60)))
    embedding, apply = llama_rotary(theta)
    theirs = apply(q, k, *embedding(q, positions))
    cos, sin = rope_tables(positions[:, None], 16, theta)
    ours = rotate(q, cos, sin), rotate(k, cos, sin)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


def test_base_is_not_ignored():
    """The two bases differ where it matters, so the test above can tell them apart."""
    x = randn64(1, 1, 7, 16).float()
    positions = torch.arange(53, 60)[None]
    wrong, _ = rope_tables(positions[:, None], 16, 10_000.0)
    embedding, _ = llama_rotary(500_000.0)
    theirs = embedding(x, positions)[0][:, None, :, :8]
    assert (wrong - theirs).abs().max() > 0.1


def test_interpolation_same_as_transformers():
    """rope_type "linear" with a factor is position interpolation."""
    llama_rotary(10_000.0)  # skips without transformers
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        rope_parameters={"rope_theta": 1e4, "rope_type": "linear", "factor": 8.0},
    )
    theirs = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(512)[None])
    ours = rope_tables(torch.arange(512), 16, scale=8.0)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b[0, :, :8], rtol=0, atol=1e-5)


def test_rows_of_gguf_files():
    """llama.cpp stores Llama's q and k rows so that its own interleaved rotation fits:
    reshape (heads, 2, D/2), swap the last two. Our function undoes it."""
    weight = randn64(3 * 8, 5)
    stored = weight.view(3, 2, 4, 5).transpose(1, 2).reshape(24, 5)
    assert torch.equal(half_split_rows(stored, 3), weight)
    assert torch.equal(interleaved_rows(weight, 3), stored)
    assert not torch.equal(half_split_rows(stored, 1), weight)  # heads matter


# --- what it promises -------------------------------------------------------------


@LAYOUTS
@given(
    m=st.integers(0, 10_000),
    n=st.integers(0, 10_000),
    by=st.integers(-5_000, 100_000),
    theta=st.sampled_from([10_000.0, 500_000.0]),
)
@settings(max_examples=50)
def test_scores_depend_on_the_distance_only(turn, m, n, by, theta):
    """In float64 angles up to 1e5 radians are exact to 1e-11; |q| |k| < 40."""
    by = max(by, -m, -n)
    q, k = randn64(1, 12), randn64(1, 12, seed=1)
    scores = [
        turn(q, *tables64([m + s], 12, theta))
        @ turn(k, *tables64([n + s], 12, theta)).T
        for s in (0, by)
    ]
    torch.testing.assert_close(*scores, rtol=0, atol=1e-9)


def test_distance_identity_to_twelve_digits():
    """Moderate positions, as shown on the page; and another distance differs."""
    q, k = randn64(1, 64), randn64(1, 64, seed=1)

    def score(m, n):
        return (rotate(q, *tables64([m], 64)) @ rotate(k, *tables64([n], 64)).T).item()

    assert score(7, 3) == pytest.approx(score(1007, 1003), abs=1e-12)
    assert abs(score(7, 3) - score(7, 4)) > 0.1
    assert abs(score(7, 3) - score(3, 7)) > 0.1  # the sign of the distance counts


@LAYOUTS
@given(position=st.integers(0, 2**40), seed=st.integers(0, 99))
@settings(max_examples=25)
def test_lengths_stay(turn, position, seed):
    x = randn64(1, 10, seed=seed)
    out = turn(x, *tables64([position], 10))
    torch.testing.assert_close(out.norm(), x.norm(), **EXACT)


@LAYOUTS
def test_position_zero_changes_nothing(turn):
    x = randn64(1, 6)
    assert torch.equal(turn(x, *tables64([0], 6)), x)


@LAYOUTS
@given(a=st.integers(0, 999), b=st.integers(0, 999))
@settings(max_examples=25)
def test_rotations_add_up(turn, a, b):
    x = randn64(1, 8)
    twice = turn(turn(x, *tables64([a], 8)), *tables64([b], 8))
    torch.testing.assert_close(twice, turn(x, *tables64([a + b], 8)), **EXACT)


def test_the_sinusoid_turns_the_same_way():
    """Columns (cos, sin) of the sinusoid at t are those at 0 rotated to t."""
    from groundup.transformer.positions import sinusoid_table

    table = sinusoid_table(50, 8, dtype=torch.float64)
    pairs = table.view(50, 4, 2).flip(-1).flatten(1)  # (sin, cos) -> (cos, sin)
    start = pairs[:1].expand(50, 8)
    turned = rotate_interleaved(start, *tables64(range(50), 8))
    torch.testing.assert_close(turned, pairs, **EXACT)


@pytest.mark.parametrize("d_head", [2, 6, 8, 64])
def test_layouts_agree_up_to_the_permutation(d_head):
    order = half_split_order(d_head)
    x = randn64(2, 3, 5, d_head)
    cos, sin = tables64(range(7, 12), d_head)
    ours = rotate(x[..., order], cos, sin)
    theirs = rotate_interleaved(x, cos, sin)[..., order]
    torch.testing.assert_close(ours, theirs, **EXACT)
    if d_head > 2:
        assert (rotate(x, cos, sin) - rotate_interleaved(x, cos, sin)).abs().max() > 0.5
    assert sorted(order.tolist()) == list(range(d_head))


@given(heads=st.integers(1, 6), shared=st.sampled_from([1, 2]), half=st.integers(1, 5))
@settings(max_examples=25)
def test_reordered_projections_give_the_same_scores(heads, shared, half):
    """Weights and biases between the layouts; H query heads, H or H/2 key heads."""
    n_kv, d, c = max(1, heads // shared), 2 * half, 7
    x = randn64(1, 4, c)
    cos, sin = tables64([0, 1, 5, 9], d)

    def heads_of(weight, bias, n):
        return (x @ weight.T + bias).view(1, 4, n, d).transpose(1, 2)

    def scores(q, k, turn):
        q, k = turn(q, cos, sin), turn(k, cos, sin)
        return q[:, :n_kv] @ k.transpose(2, 3)

    wq, wk = randn64(heads * d, c, seed=1), randn64(n_kv * d, c, seed=2)
    bq, bk = randn64(heads * d, seed=3), randn64(n_kv * d, seed=4)
    there = scores(heads_of(wq, bq, heads), heads_of(wk, bk, n_kv), rotate_interleaved)
    q = heads_of(half_split_rows(wq, heads), half_split_rows(bq, heads), heads)
    k = heads_of(half_split_rows(wk, n_kv), half_split_rows(bk, n_kv), n_kv)
    torch.testing.assert_close(scores(q, k, rotate), there, **EXACT)
    assert torch.equal(interleaved_rows(half_split_rows(wq, heads), heads), wq)


def test_one_token_cannot_tell_the_layouts_apart():
    """The page's pitfall: position 0 is not turned, a one-token test proves nothing."""
    x = randn64(1, 8)
    cos, sin = tables64([0], 8)
    assert torch.equal(rotate(x, cos, sin), rotate_interleaved(x, cos, sin))


# --- positions, scale -------------------------------------------------------------


@LAYOUTS
def test_positions_a_row(turn):
    """Two sequences at different places = each on its own; order and gaps allowed."""
    x = randn64(2, 3, 4, 6)  # B H T D
    positions = torch.tensor([[0, 1, 2, 3], [900, 7, 7, 2]])
    together = turn(x, *tables64(positions[:, None], 6))
    for b in range(2):
        alone = turn(x[b], *tables64(positions[b], 6))
        torch.testing.assert_close(together[b], alone, **EXACT)
    one = turn(x[1, :, 1:2], *tables64([7], 6))
    torch.testing.assert_close(together[1, :, 1:2], one, **EXACT)


def test_scale_squeezes_positions():
    stretched = tables64(range(0, 64, 8), 16, scale=8.0)
    for squeezed, plain in zip(stretched, tables64(range(8), 16), strict=True):
        torch.testing.assert_close(squeezed, plain, **EXACT)


def test_first_plane_never_sees_the_base():
    """theta^0 = 1: changing the base cannot slow the fastest plane, scaling can."""
    positions = torch.arange(512)
    near, _ = tables64(positions, 16, 10_000.0)
    far, _ = tables64(positions, 16, 1e8)
    squeezed, _ = tables64(positions, 16, scale=8.0)
    assert torch.equal(near[:, 0], far[:, 0])
    assert (near[:, 0] - squeezed[:, 0]).abs().max() > 1


# --- precision --------------------------------------------------------------------


def test_large_positions_are_accurate():
    """Position 2^24 + 1 does not exist in float32; the angle is taken in float64."""
    t = 2**24 + 1
    assert torch.tensor(t, dtype=torch.float32).item() != t
    cos, sin = rope_tables(torch.tensor([t]), 4)
    assert cos[0, 0].item() == pytest.approx(math.cos(t), abs=1e-6)
    assert sin[0, 1].item() == pytest.approx(math.sin(t / 100), abs=1e-6)


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)]
)
@LAYOUTS
def test_half_precision_is_rounded_once(turn, dtype, bound):
    """bfloat16 stores 8 significant bits: rounding once errs by at most 2^-8 / (1 +
    2^-8) of a number, also at position 100,000. Tables in bfloat16 would err more."""
    x = randn64(3, 2000, 64).to(dtype)
    positions = torch.arange(98_000, 100_000)
    exact = turn(x.double(), *tables64(positions, 64))
    out = turn(x, *rope_tables(positions, 64))
    assert out.dtype == dtype
    error = (out.double() - exact).abs()
    assert (error <= exact.abs() * bound + 1e-6).all()
    tables = rope_tables(positions, 64, dtype=dtype)
    coarse = (turn(x, *tables).double() - exact).abs()
    assert (coarse > exact.abs() * bound + 1e-6).any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@LAYOUTS
def test_result_has_the_dtype_of_x(turn, dtype):
    x = torch.ones(1, 4, dtype=dtype)
    assert turn(x, *tables64([3], 4)).dtype == dtype
    assert turn(x, *rope_tables(torch.tensor([3]), 4)).dtype == dtype


# --- gradients --------------------------------------------------------------------


@LAYOUTS
def test_gradient(turn):
    cos, sin = tables64([0, 3, 11], 6)
    x = randn64(2, 3, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: turn(v, cos, sin), x)
    assert torch.autograd.gradgradcheck(lambda v: turn(v, cos, sin), x)


@LAYOUTS
def test_gradient_is_rotated_back(turn):
    """The Jacobian is orthogonal: its transpose is the rotation by the negative."""
    cos, sin = tables64([2, 5], 8)
    x, upstream = randn64(2, 8).requires_grad_(), randn64(2, 8, seed=1)
    (grad,) = torch.autograd.grad(turn(x, cos, sin), x, upstream)
    torch.testing.assert_close(grad, turn(upstream, cos, -sin), **EXACT)


# --- refusals and edges -----------------------------------------------------------


def test_no_tokens():
    assert rotate(torch.zeros(2, 0, 4), *rope_tables(torch.arange(0), 4)).shape == (
        2,
        0,
        4,
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rope_frequencies(5), "positive even number"),
        (lambda: rope_frequencies(0), "positive even number"),
        (lambda: rope_frequencies(4, 0.0), "theta must be positive"),
        (lambda: rope_frequencies(4, float("nan")), "theta must be positive"),
        (lambda: rope_tables(torch.arange(3), 7), "positive even number"),
        (lambda: rope_tables(torch.arange(3), 4, scale=0.0), "scale must be positive"),
        (lambda: half_split_order(3), "positive even number"),
        (lambda: half_split_rows(torch.zeros(6, 2), 2), "heads of even size"),
        (lambda: half_split_rows(torch.zeros(6, 2), 0), "n_heads"),
        (lambda: interleaved_rows(torch.zeros(8), 3), "n_heads must divide the 8"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@LAYOUTS
@pytest.mark.parametrize("width", [3, 5, 6])
def test_refuses_tables_of_another_head_size(turn, width):
    cos, sin = rope_tables(torch.arange(2), 4)
    with pytest.raises(ValueError, match=f"got {width} and 2"):
        turn(torch.zeros(2, width), cos, sin)
