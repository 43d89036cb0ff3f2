"""Attention in NumPy against pencil, loops and torch."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from groundup.transformer.attention_by_hand import (
    attention,
    attention_loops,
    causal_mask,
    softmax,
    softmax_jacobian,
    three_tokens,
)

E1, E2, E3 = math.exp(-1), math.exp(-2), math.exp(-3)


def random_qkv(seed, n_queries=5, n_keys=7, d=3, d_value=2):
    rng = np.random.default_rng(seed)
    return (
        rng.standard_normal((n_queries, d)),
        rng.standard_normal((n_keys, d)),
        rng.standard_normal((n_keys, d_value)),
    )


def torch_attention(q, k, v, mask=None, scale=None):
    tensors = (torch.from_numpy(a) for a in (q, k, v))
    mask = None if mask is None else torch.from_numpy(mask)
    return F.scaled_dot_product_attention(*tensors, mask, scale=scale).numpy()


# --- the example, with a pencil -------------------------------------------------


def test_example_by_hand():
    """Each score is a product of four small numbers; sqrt(4) = 2 divides them.

    Row "Brutus": q = (0, 3, 1, -1); keys are (2, 0, 2, 2), (0, 2, 0, 0) and
    (2, 0, 4, 0): products 2 - 2 = 0, 6, 4, halved 0, 3, 2. Minus the largest:
    -3, 0, -1.
    """
    q, k, v = three_tokens().qkv()
    assert (q @ k.T / 2 == [[0, 3, 2], [2, 0, 1], [2, 3, 4]]).all()
    output, weights = attention(q, k, v)
    brutus = np.array([E3, 1, E1]) / (E3 + 1 + E1)
    killed = np.array([1, E2, E1]) / (1 + E2 + E1)
    caesar = np.array([E2, E1, 1]) / (1 + E2 + E1)
    np.testing.assert_allclose(weights, [brutus, killed, caesar], rtol=0, atol=1e-15)
    a, b, c = killed  # values (1, 1), (3, 4), (5, 1)
    np.testing.assert_allclose(
        output[1], [a + 3 * b + 5 * c, a + 4 * b + c], rtol=0, atol=1e-14
    )


def test_example_by_hand_under_the_causal_mask():
    """Brutus sees himself alone: weight 1, output his value (1, 1).

    "killed" sees scores 2 and 0: weights 1 and exp(-2) over their sum. The last
    row sees everything, as without a mask.
    """
    q, k, v = three_tokens().qkv()
    output, weights = attention(q, k, v, causal_mask(3))
    total = 1 + E2
    np.testing.assert_allclose(
        weights[:2], [[1, 0, 0], [1 / total, E2 / total, 0]], rtol=0, atol=1e-15
    )
    np.testing.assert_array_equal(output[0], [1, 1])
    np.testing.assert_array_equal(weights[2], attention(q, k, v)[1][2])


# --- oracles --------------------------------------------------------------------


@given(
    seed=st.integers(0, 2**31), masked=st.booleans(), scale=st.sampled_from([None, 2.0])
)
def test_same_as_torch_and_as_the_loops(seed, masked, scale):
    q, k, v = random_qkv(seed)
    mask = np.random.default_rng(seed).random((5, 7)) < 0.4 if masked else None
    output, weights = attention(q, k, v, mask, scale)
    np.testing.assert_allclose(
        output, torch_attention(q, k, v, mask, scale), rtol=0, atol=1e-12
    )
    by_loops = attention_loops(q, k, v, mask, scale)
    np.testing.assert_allclose(output, by_loops[0], rtol=0, atol=1e-12)
    np.testing.assert_allclose(weights, by_loops[1], rtol=0, atol=1e-12)


def test_leading_axes_are_a_batch():
    q, k, v = (
        np.stack(arrays) for arrays in zip(random_qkv(0), random_qkv(1), strict=True)
    )
    output, weights = attention(q, k, v)
    for b in (0, 1):
        expected = attention(q[b], k[b], v[b])
        np.testing.assert_allclose(output[b], expected[0], rtol=0, atol=1e-14)
        np.testing.assert_allclose(weights[b], expected[1], rtol=0, atol=1e-14)
    np.testing.assert_allclose(output, torch_attention(q, k, v), rtol=0, atol=1e-12)


@given(st.lists(st.floats(-50, 50), min_size=1, max_size=9))
def test_softmax_same_as_torch(numbers):
    x = np.array(numbers)
    expected = torch.from_numpy(x).softmax(0).numpy()
    np.testing.assert_allclose(softmax(x), expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_softmax_along_any_axis(axis):
    x = np.random.default_rng(0).standard_normal((3, 4))
    expected = torch.from_numpy(x).softmax(axis).numpy()
    np.testing.assert_allclose(softmax(x, axis=axis), expected, rtol=1e-13)


# --- the mask -------------------------------------------------------------------


def test_causal_mask_by_hand():
    T, F_ = True, False
    assert (causal_mask(3) == [[T, F_, F_], [T, T, F_], [T, T, T]]).all()
    assert causal_mask(3).dtype == bool


@given(seed=st.integers(0, 2**31), t=st.integers(0, 5))
def test_the_future_moves_nothing(seed, t):
    """Change queries, keys and values after t: rows 0 to t stay, bit for bit."""
    q, k, v = random_qkv(seed, 6, 6)
    before = attention(q, k, v, causal_mask(6))
    q[t + 1 :] -= 3.0
    k[t + 1 :] += 100.0
    v[t + 1 :] *= -7.0
    after = attention(q, k, v, causal_mask(6))
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(new[: t + 1], old[: t + 1])


def test_the_past_and_the_present_do_move_it():
    """The mask must not hide what may be seen: row t depends on every s <= t."""
    q, k, v = random_qkv(0, 4, 4)
    for s in range(4):
        moved = k.copy()
        moved[s] += 1.0
        change = (
            attention(q, moved, v, causal_mask(4))[0]
            - attention(q, k, v, causal_mask(4))[0]
        )
        # Row s = 0 of one key alone keeps its weight of 1.
        assert (np.abs(change[max(s, 1) :]).max(1) > 1e-6).all()


def test_row_that_may_attend_to_nothing():
    q, k, v = random_qkv(0)
    mask = np.ones((5, 7), dtype=bool)
    mask[2] = False
    output, weights = attention(q, k, v, mask)
    assert (output[2] == 0).all()
    assert (weights[2] == 0).all()
    others = [0, 1, 3, 4]
    np.testing.assert_array_equal(output[others], attention(q, k, v)[0][others])
    np.testing.assert_array_equal(torch_attention(q, k, v, mask)[2], output[2])
    np.testing.assert_array_equal(attention_loops(q, k, v, mask)[0][2], output[2])


def test_what_torch_does_with_such_a_row():
    """The page says so: 0 from one function of the library, NaN from another, and
    the NaN reaches the parameters although the loss does not read its row."""
    assert torch.full((3,), -torch.inf).softmax(0).isnan().all()
    torch.manual_seed(0)
    layer = torch.nn.MultiheadAttention(4, 1, batch_first=True)
    x = torch.randn(1, 3, 4)
    blocked = torch.ones(3, 3, dtype=torch.bool).triu(0)  # True = may NOT attend
    with_weights = layer(x, x, x, attn_mask=blocked)[0]
    without = layer(x, x, x, attn_mask=blocked, need_weights=False)[0]
    assert with_weights[0, 0].isnan().all()
    torch.testing.assert_close(without[0, 0], layer.out_proj.bias)
    for output, reached in ((without, False), (with_weights, True)):
        layer.zero_grad()
        output[0, 1:].sum().backward()
        assert layer.in_proj_weight.grad.isnan().any() == reached


def test_masking_after_the_softmax_leaks_and_renormalising_it_divides_by_zero():
    q, k, v = three_tokens().qkv()
    keep = causal_mask(3)
    moved = k.copy()
    moved[2] += 1.0
    before, after = (attention(q, key, v)[1] * keep for key in (k, moved))
    assert np.abs(after[:2] - before[:2]).max() > 0.1
    # Allowed score -800, forbidden score 0: exp(-800) is 0 in float64.
    far = softmax(np.array([-800.0, 0.0])) * [True, False]
    assert far.sum() == 0
    assert softmax(np.array([-800.0, -np.inf]))[0] == 1


def test_mask_of_numbers_is_refused():
    q, k, v = three_tokens().qkv()
    with pytest.raises(ValueError, match="mask must be boolean"):
        attention(q, k, v, np.tril(np.ones((3, 3))))


# --- edges of the softmax -------------------------------------------------------


def test_softmax_of_huge_numbers():
    np.testing.assert_array_equal(softmax(np.array([1000.0, 0.0, -1000.0])), [1, 0, 0])
    np.testing.assert_allclose(
        softmax(np.array([1e5, 1e5 - 1])), [1 / (1 + E1), E1 / (1 + E1)], rtol=1e-12
    )
    np.testing.assert_array_equal(softmax(np.full(4, -1e6)), [0.25] * 4)


def test_softmax_of_half_precision():
    """exp(12) exceeds float16; the result is that of the same numbers in float64."""
    x = np.array([12.0, 11.0, -3.0], dtype=np.float16)
    assert softmax(x).dtype == np.float64
    np.testing.assert_array_equal(softmax(x), softmax(x.astype(np.float64)))


def test_softmax_of_one_of_none_and_of_minus_infinity():
    np.testing.assert_array_equal(softmax(np.array([-3.0])), [1])
    assert softmax(np.empty((2, 0))).shape == (2, 0)
    np.testing.assert_array_equal(softmax(np.array([-np.inf, 5.0])), [0, 1])
    np.testing.assert_array_equal(softmax(np.full(3, -np.inf)), [0, 0, 0])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_softmax_refuses_what_has_no_softmax(bad):
    with pytest.raises(ValueError, match="finite or -inf"):
        softmax(np.array([0.0, bad]))


# --- properties -----------------------------------------------------------------


@given(seed=st.integers(0, 2**31), shift=st.floats(-1e3, 1e3))
def test_adding_a_constant_to_the_scores_changes_nothing(seed, shift):
    x = np.random.default_rng(seed).standard_normal(6)
    np.testing.assert_allclose(softmax(x + shift), softmax(x), rtol=1e-10)


@given(seed=st.integers(0, 2**31), size=st.floats(0.1, 100.0))
def test_output_is_a_convex_combination(seed, size):
    """Weights are a distribution, so no projection of the output leaves the range
    of the values' projections (that is what being in the hull means)."""
    q, k, v = random_qkv(seed)
    output, weights = attention(size * q, k, v)
    assert (weights >= 0).all()
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-12)
    directions = np.random.default_rng(seed).standard_normal((2, 20))
    assert ((output @ directions).max(0) <= (v @ directions).max(0) + 1e-12).all()
    assert ((output @ directions).min(0) >= (v @ directions).min(0) - 1e-12).all()


@given(seed=st.integers(0, 2**31))
def test_permuted_tokens_give_permuted_outputs(seed):
    q, k, v = random_qkv(seed, 6, 6)
    order = np.random.default_rng(seed).permutation(6)
    permuted = attention(q[order], k[order], v[order])
    output, weights = attention(q, k, v)
    np.testing.assert_allclose(permuted[0], output[order], rtol=0, atol=1e-13)
    np.testing.assert_allclose(
        permuted[1], weights[order][:, order], rtol=0, atol=1e-13
    )


def test_default_scale_is_one_over_the_root_of_d():
    """With q = k = sqrt(D) e_0 beside an orthogonal key, the score is sqrt(D)."""
    for d in (4, 16, 64):
        key = np.zeros((2, d))
        key[0, 0] = key[1, 1] = d**0.5
        weights = attention(key[:1], key, np.eye(2))[1]
        expected = 1 / (1 + math.exp(-(d**0.5)))
        assert weights[0, 0] == pytest.approx(expected, rel=1e-12)


def test_scores_keep_unit_variance():
    """Variance of q.k / sqrt(D) over n = 20,000 independent pairs. The estimate has
    variance (2 + 6/D)/n, so 5 sigma is below 0.067: one false alarm in 1.7 million
    seeds."""
    rng = np.random.default_rng(0)
    for d in (4, 16, 64):
        q, k = rng.standard_normal((2, 20_000, d))
        assert abs(((q * k).sum(1) / d**0.5).var() - 1) < 0.067


# --- the Jacobian ---------------------------------------------------------------


def test_jacobian_by_hand():
    """w = (1/4, 3/4): diagonal w(1 - w) = 3/16, off it -3/16."""
    expected = np.array([[3, -3], [-3, 3]]) / 16
    np.testing.assert_allclose(
        softmax_jacobian(np.array([0.25, 0.75])), expected, rtol=1e-15
    )


@given(seed=st.integers(0, 2**31))
def test_jacobian_against_differences_and_autograd(seed):
    x = np.random.default_rng(seed).standard_normal(5)
    jacobian = softmax_jacobian(softmax(x))
    h = 1e-5
    for j in range(5):
        step = h * np.eye(5)[j]
        column = (softmax(x + step) - softmax(x - step)) / (2 * h)
        np.testing.assert_allclose(jacobian[:, j], column, rtol=0, atol=1e-9)
    expected = torch.autograd.functional.jacobian(
        lambda s: s.softmax(0), torch.from_numpy(x)
    )
    np.testing.assert_allclose(jacobian, expected.numpy(), rtol=0, atol=1e-14)
    np.testing.assert_allclose(jacobian.sum(1), 0, atol=1e-15)


def test_jacobian_takes_leading_axes_and_dies_where_one_weight_is_one():
    weights = np.stack([np.full(4, 0.25), np.eye(4)[1]])
    both = softmax_jacobian(weights)
    np.testing.assert_array_equal(both[0], softmax_jacobian(weights[0]))
    np.testing.assert_array_equal(both[1], np.zeros((4, 4)))
