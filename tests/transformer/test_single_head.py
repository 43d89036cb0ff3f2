"""One head against torch, a worked example, and the promise not to see ahead."""

import math

import jaxtyping
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right

from groundup.transformer.single_head import (
    Head,
    HeadModel,
    attention,
    causal_mask,
    influence,
)

EXACT = {"rtol": 0.0, "atol": 0.0}


def draw(seed, n_queries, n_keys, d=4, dv=3, lead=(2,)):
    g = torch.Generator().manual_seed(seed)
    shapes = ((n_queries, d), (n_keys, d), (n_keys, dv))
    return [
        torch.randn(*lead, *s, generator=g, dtype=torch.float64, requires_grad=True)
        for s in shapes
    ]


def masks(n_queries, n_keys):
    """Every kind of mask on the page, each row with at least one True."""
    g = torch.Generator().manual_seed(7)
    chance = torch.rand(2, n_queries, n_keys, generator=g) < 0.4
    chance[..., 0] = True
    lengths = torch.tensor([n_keys, max(1, n_keys - 2)])
    return {
        "none": None,
        "causal": causal_mask(n_queries, n_keys),
        "padding": (torch.arange(n_keys) < lengths[:, None])[:, None, :],
        "random, one a sequence": chance,
        "causal and padding": causal_mask(n_queries, n_keys)
        & (torch.arange(n_keys) < lengths[:, None])[:, None, :],
    }


# ---------------------------------------------------------------- the mask


def test_mask_by_hand():
    """Two queries at the end of three keys stand at keys 1 and 2."""
    expected = [[True, True, False], [True, True, True]]
    assert causal_mask(2, 3).tolist() == expected
    assert causal_mask(1).tolist() == [[True]]
    assert causal_mask(1, 4).all()


@given(st.integers(1, 12), st.integers(0, 12))
def test_mask_is_defined_by_its_inequality(n_queries, extra):
    mask = causal_mask(n_queries, n_queries + extra)
    for t in range(n_queries):
        for s in range(n_queries + extra):
            assert mask[t, s].item() == (s <= t + extra)


def test_rows_of_the_square_mask_are_the_masks_of_decoding():
    """What prefill shows to query t is what decoding step t shows."""
    whole = causal_mask(6)
    for t in range(6):
        assert torch.equal(whole[t, : t + 1], causal_mask(1, t + 1)[0])


@pytest.mark.parametrize(("n_queries", "n_keys"), [(0, 3), (4, 3), (-1, None)])
def test_refuses_a_query_without_a_key(n_queries, n_keys):
    with pytest.raises(ValueError, match=rf"n_queries={n_queries}, n_keys="):
        causal_mask(n_queries, n_keys)


def test_is_causal_of_torch_is_aligned_at_the_upper_left():
    """The pitfall: one new query over six cached keys is shown the first alone."""
    q, k, v = draw(0, 1, 6)
    theirs = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(theirs, v[:, :1])
    ours, _ = attention(q, k, v, causal_mask(1, 6))
    assert (ours - theirs).abs().max() > 0.1
    right = F.scaled_dot_product_attention(q, k, v, attn_mask=causal_lower_right(1, 6))
    torch.testing.assert_close(ours, right, rtol=0, atol=1e-12)


# ---------------------------------------------------------------- the function


def test_attention_by_hand():
    """D = 4, so the scale is 1/2; q.k = 2 ln 3 for the second key, 0 for the first.

    Query 0 sees key 0 alone: weight 1. Query 1 has scores 0 and ln 3, that is
    weights 1/(1 + 3) and 3/(1 + 3), and output 1/4 * 4 + 3/4 * 8 = 7. Without the
    scale the weights would be 1/10 and 9/10; without the mask query 0 would
    return 7 too.
    """
    ln3 = math.log(3)
    q = torch.tensor([[2.0, 0, 0, 0], [2.0, 0, 0, 0]], dtype=torch.float64)
    k = torch.tensor([[0.0, 5, 0, 0], [ln3, 0, 5, 0]], dtype=torch.float64)
    v = torch.tensor([[4.0], [8.0]], dtype=torch.float64)
    out, weights = attention(q, k, v, causal_mask(2))
    expected = torch.tensor([[1.0, 0], [0.25, 0.75]], dtype=torch.float64)
    torch.testing.assert_close(weights, expected)
    torch.testing.assert_close(out, torch.tensor([[4.0], [7.0]], dtype=torch.float64))
    _, loud = attention(q, k, v, scale=1.0)
    torch.testing.assert_close(loud[1, 1].item(), 0.9)


@pytest.mark.parametrize(("n_queries", "n_keys"), [(5, 5), (1, 1), (1, 6), (3, 7)])
@pytest.mark.parametrize("kind", masks(2, 2))
def test_same_as_torch_forward_and_backward(kind, n_queries, n_keys):
    q, k, v = draw(1, n_queries, n_keys)
    mask = masks(n_queries, n_keys)[kind]
    ours, weights = attention(q, k, v, mask)
    theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    if mask is not None:
        assert (weights[~mask.expand_as(weights)] == 0).all()
    g = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2)).double()
    for a, b in zip(
        torch.autograd.grad(ours, (q, k, v), g),
        torch.autograd.grad(theirs, (q, k, v), g),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@given(seed=st.integers(0, 2**31), n=st.integers(1, 8), c=st.floats(-5, 5))
def test_a_row_is_a_weighted_mean_that_ignores_a_shift_of_all_keys(seed, n, c):
    """q.(k + c) adds the same number to every score of a row."""
    q, k, v = draw(seed, n, n)
    out, weights = attention(q, k, v, causal_mask(n))
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    low, high = v.cummin(-2).values, v.cummax(-2).values
    assert (out >= low - 1e-9).all()
    assert (out <= high + 1e-9).all()
    _, shifted = attention(q, k + c, v, causal_mask(n))
    torch.testing.assert_close(shifted, weights)


@given(seed=st.integers(0, 2**31), n=st.integers(1, 9))
def test_row_by_row_equals_all_at_once(seed, n):
    """Row t needs query t and the keys up to t, nothing else."""
    q, k, v = draw(seed, n, n)
    whole, _ = attention(q, k, v, causal_mask(n))
    for t in range(n):
        row, _ = attention(q[:, t : t + 1], k[:, : t + 1], v[:, : t + 1])
        torch.testing.assert_close(row, whole[:, t : t + 1], rtol=0, atol=1e-12)


@given(seed=st.integers(0, 2**31), n=st.integers(2, 9), data=st.data())
def test_the_past_does_not_move_to_the_last_bit(seed, n, data):
    t = data.draw(st.integers(0, n - 2))
    q, k, v = (x.detach() for x in draw(seed, n, n))
    before, _ = attention(q, k, v, causal_mask(n))
    for x in (q, k, v):
        x[:, t + 1 :] = 1e3 * torch.randn(x[:, t + 1 :].shape).double()
    after, _ = attention(q, k, v, causal_mask(n))
    torch.testing.assert_close(after[:, : t + 1], before[:, : t + 1], **EXACT)
    assert not torch.equal(after[:, t + 1 :], before[:, t + 1 :])


def test_gradcheck_also_with_a_row_that_sees_nothing():
    q, k, v = draw(3, 4, 4)
    mask = causal_mask(4)
    mask[2] = False
    assert torch.autograd.gradcheck(lambda *x: attention(*x, mask), (q, k, v))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_row_that_sees_nothing_gives_zeros_and_no_nan(dtype):
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in draw(4, 3, 3))
    mask = torch.tensor([[True, False, False], [False] * 3, [True] * 3])
    out, weights = attention(q, k, v, mask)
    assert (out[:, 1] == 0).all()
    assert (weights[:, 1] == 0).all()
    out.sum().backward()
    assert (q.grad[:, 1] == 0).all()
    for x in (q, k, v):
        assert x.grad.isfinite().all()
    nothing, _ = attention(q, k, v, torch.zeros(3, 3, dtype=torch.bool))
    assert (nothing == 0).all()


def test_a_row_that_sees_nothing_passes_no_nan_on_the_way_either():
    """Torch's anomaly detection raises at the first NaN inside the backward pass.

    The counterexample hides a NaN between two fills: results are right, and the
    detector that one turns on to find another NaN stops here.
    """
    q, k, v = draw(4, 3, 3)
    mask = torch.tensor([[True, False, False], [False] * 3, [True] * 3])
    with torch.autograd.set_detect_anomaly(True):
        attention(q, k, v, mask)[0].sum().backward()
        late = (q @ k.mT).masked_fill(~mask, -torch.inf).softmax(-1)
        late = late.masked_fill(~mask.any(-1, keepdim=True), 0.0)
        with (
            pytest.warns(UserWarning, match="Error detected"),
            pytest.raises(RuntimeError, match="nan values"),
        ):
            late.sum().backward()


def test_a_masked_score_loses_against_any_number():
    """Scores of -90,000 are small, and still larger than a hidden one."""
    q = torch.full((2, 1), -300.0)
    k, v = -q, torch.tensor([[1.0], [3.0]])
    out, _ = attention(q, k, v, causal_mask(2), scale=1.0)
    assert out.tolist() == [[1.0], [2.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_scores_times_a_thousand(dtype):
    """The softmax becomes a choice; nothing overflows, nothing leaks."""
    q, k, v = (x.detach().to(dtype) for x in draw(5, 6, 6))
    out, weights = attention(1000 * q, k, v, causal_mask(6))
    scores = (1000 * q).double() @ k.double().mT
    best = scores.masked_fill(~causal_mask(6), -torch.inf).argmax(-1)
    picked = torch.take_along_dim(v, best[..., None], dim=1)
    torch.testing.assert_close(out, picked, rtol=0.02, atol=0.02)
    assert (weights.triu(1) == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_scores_are_computed_in_single(dtype):
    """Error at the level of the dtype's rounding, where half scores lose a lot.

    Scores near 40: bfloat16 rounds them by up to 1/8, and e^(1/8) is 13 %.
    """
    q, k, v = (10 * x.detach() for x in draw(6, 32, 32, d=16))
    q, k, v = (x.to(dtype) for x in (q, k, v / 10))
    exact, right = attention(q.double(), k.double(), v.double())
    out, weights = attention(q, k, v)
    naive = (q @ k.mT / 4).softmax(-1)
    eps = torch.finfo(dtype).eps
    assert out.dtype == weights.dtype == dtype
    assert (weights - right).abs().max() < eps
    assert (naive - right).abs().max() > 5 * eps
    torch.testing.assert_close(out.double(), exact, rtol=4 * eps, atol=4 * eps)


def test_float16_scores_that_overflow():
    """300 * 300 = 90,000 is above 65,504: inf - inf is NaN in a naive softmax."""
    q = k = torch.full((2, 1), 300.0, dtype=torch.float16)
    v = torch.tensor([[1.0], [3.0]], dtype=torch.float16)
    assert (q @ k.mT).softmax(-1).isnan().all()
    out, _ = attention(q, k, v, scale=1.0)
    torch.testing.assert_close(out, torch.full_like(v, 2.0))


@pytest.fixture
def without_typechecks():
    """Let a wrong dtype through to our own error, as it is for a user."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.mark.usefixtures("without_typechecks")
def test_refuses_an_additive_mask():
    q, k, v = draw(8, 3, 3)
    with pytest.raises(ValueError, match=r"boolean.*float32"):
        attention(q, k, v, torch.zeros(3, 3))


@pytest.mark.parametrize("shape", [(3, 4), (4, 3), (5, 1, 3, 3), (3, 3, 3)])
def test_refuses_a_mask_of_the_wrong_shape(shape):
    q, k, v = draw(8, 3, 3)
    with pytest.raises(ValueError, match="broadcast to the scores"):
        attention(q, k, v, torch.ones(shape, dtype=torch.bool))


# ---------------------------------------------------------------- the pitfalls


def masked_too_late(q, k, v, mask):
    weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) * mask
    return weights @ v, weights


def test_a_mask_after_the_softmax_leaks_through_the_denominator():
    q, k, v = (x.detach() for x in draw(9, 4, 4))
    out, weights = masked_too_late(q, k, v, causal_mask(4))
    assert (weights.sum(-1)[:, :-1] < 0.95).all()
    k[:, 3] += 5.0  # the future of queries 0, 1 and 2, which is masked
    moved, _ = masked_too_late(q, k, v, causal_mask(4))
    assert ((moved - out)[:, :3].abs().amax((-1, -2)) > 0.01).all()


@given(seed=st.integers(0, 2**31), n=st.integers(1, 8))
def test_dividing_again_repairs_a_late_mask(seed, n):
    """sum over the allowed keys of exp: the same denominator as masking before."""
    q, k, v = draw(seed, n, n)
    _, late = masked_too_late(q, k, v, causal_mask(n))
    _, right = attention(q, k, v, causal_mask(n))
    torch.testing.assert_close(late / late.sum(-1, keepdim=True), right)


def test_a_large_negative_number_is_not_minus_infinity():
    """Where a whole row is masked, -1e4 cancels: the row sees what was hidden."""
    q, k, v = (x.detach() for x in draw(10, 3, 3))
    scores = q @ k.mT * 0.5
    hidden = (scores - 1e4).softmax(-1)
    _, open_ = attention(q, k, v)
    torch.testing.assert_close(hidden, open_, rtol=1e-6, atol=0)
    flat = torch.full_like(scores, torch.finfo(torch.float64).min).softmax(-1)
    torch.testing.assert_close(flat, torch.full_like(flat, 1 / 3))
    with pytest.raises(RuntimeError, match="overflow"):
        torch.zeros(2).half().masked_fill(torch.tensor([True, False]), -1e9)


def test_a_masked_key_still_poisons_if_its_value_is_nan():
    """0 * NaN is NaN: padding must hold numbers. The same in torch."""
    q, k, v = (x.detach() for x in draw(11, 3, 3))
    v[:, 2] = torch.nan
    out, _ = attention(q, k, v, causal_mask(3))
    assert out[:, :2].isnan().all()
    theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=causal_mask(3))
    assert theirs[:, :2].isnan().all()


# ---------------------------------------------------------------- the layers


def test_head_equals_loops_over_its_weights():
    torch.manual_seed(0)
    head, x = Head(6, 4).double(), torch.randn(2, 5, 6, dtype=torch.float64)
    wq, wk, wv = head.query.weight, head.key.weight, head.value.weight
    wq, wk, wv = wq.detach(), wk.detach(), wv.detach()
    for b in range(2):
        for t in range(5):
            scores = [(wq @ x[b, t]) @ (wk @ x[b, s]) / 2 for s in range(t + 1)]
            e = [math.exp(s) for s in scores]
            row = sum(w / sum(e) * (wv @ x[b, s]) for s, w in enumerate(e))
            torch.testing.assert_close(head(x)[b, t], row)
            torch.testing.assert_close(
                head.weights(x)[b, t, : t + 1],
                torch.tensor([w / sum(e) for w in e], dtype=torch.float64),
            )
    assert sum(p.numel() for p in head.parameters()) == 3 * 6 * 4


def test_head_that_is_not_causal_equals_torch_without_a_mask():
    torch.manual_seed(0)
    head, x = Head(6, 4, causal=False).double(), torch.randn(2, 5, 6).double()
    parts = head.query(x), head.key(x), head.value(x)
    torch.testing.assert_close(head(x), F.scaled_dot_product_attention(*parts))


@pytest.mark.parametrize(("d_model", "d_head"), [(0, 4), (4, 0)])
def test_head_refuses_a_width_that_is_not_positive(d_model, d_head):
    with pytest.raises(ValueError, match="must be at least 1"):
        Head(d_model, d_head)


@given(seed=st.integers(0, 2**31), n=st.integers(2, 12), data=st.data())
def test_no_byte_moves_a_logit_before_it(seed, n, data):
    torch.manual_seed(seed)
    model, ids = HeadModel(8, 4), torch.randint(256, (2, n))
    t = data.draw(st.integers(1, n - 1))
    changed = ids.clone()
    changed[:, t:] = (ids[:, t:] + 1) % 256
    with torch.no_grad():
        before, after = model(ids), model(changed)
    torch.testing.assert_close(after[:, :t], before[:, :t], **EXACT)
    assert not torch.equal(after[:, t:], before[:, t:])


def test_no_gradient_flows_to_the_future_and_some_to_all_of_the_past():
    torch.manual_seed(0)
    head, x = Head(6, 4), torch.randn(1, 5, 6, requires_grad=True)
    for t in range(5):
        (grad,) = torch.autograd.grad(head(x)[0, t].sum(), x)
        assert (grad[0, t + 1 :] == 0).all()
        assert (grad[0, : t + 1].abs().sum(-1) > 0).all()


def test_the_model_is_embedding_positions_head_and_map():
    torch.manual_seed(0)
    model, ids = HeadModel(8, 4), torch.randint(256, (2, 5))
    x = model.positions(model.embed(ids))
    torch.testing.assert_close(model(ids), model.unembed(model.head(x)))
    torch.testing.assert_close(model.weights(ids), model.head.weights(x))
    assert not torch.equal(x, model.embed(ids))


# ---------------------------------------------------------------- influence


def test_influence_of_a_running_sum_by_hand():
    """Output t is the sum of inputs 0..t: input s moves it by |other - x|."""
    x = torch.zeros(3, 2)
    other = torch.tensor([[3.0, 4], [0, 1], [6, 8]])  # norms 5, 1, 10
    expected = torch.tensor([[5.0, 0, 0], [5, 1, 0], [5, 1, 10]])
    found = influence(lambda h: h.cumsum(1), x, other)
    torch.testing.assert_close(found, expected, **EXACT)


def test_influence_has_the_zeros_of_the_jacobian():
    torch.manual_seed(0)
    x, other = torch.randn(2, 6, 5)
    for causal in (True, False):
        head = Head(5, 3, causal=causal)
        jacobian = torch.autograd.functional.jacobian(lambda h: head(h[None])[0], x)  # noqa: B023
        size = jacobian.abs().sum((1, 3))  # t, s
        assert torch.equal(size > 0, influence(head, x, other) > 0)
        assert (size.triu(1) == 0).all() == causal
