"""Many heads against torch, against single heads, and by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from groundup.transformer.multi_head import (
    AttentionOnly,
    MultiHeadAttention,
    js_distance,
    lookback,
    merge_heads,
    row_entropy,
    split_heads,
)
from groundup.transformer.single_head import Head, causal_mask, influence

EXACT = {"rtol": 0.0, "atol": 0.0}
SIZES = [(8, 1), (8, 2), (12, 3), (8, 8)]  # C, H


def layer(d_model, n_heads, **options):
    """A layer in float64 whose biases are not zero."""
    torch.manual_seed(d_model + n_heads)
    made = MultiHeadAttention(d_model, n_heads, **options).double()
    for p in made.parameters():
        nn.init.normal_(p, std=0.5)
    return made


# ---------------------------------------------------------------- the layout


def test_split_and_merge_by_hand():
    """Two positions, four columns, two heads: head 0 owns columns 0 and 1."""
    x = torch.tensor([[[0.0, 1, 2, 3], [10, 11, 12, 13]]])
    heads = split_heads(x, 2)
    assert heads[0, 0].tolist() == [[0, 1], [10, 11]]
    assert heads[0, 1].tolist() == [[2, 3], [12, 13]]
    assert merge_heads(heads).tolist() == x.tolist()


@given(
    b=st.integers(1, 3), t=st.integers(1, 5), h=st.integers(1, 4), d=st.integers(1, 4)
)
def test_merge_undoes_split_and_heads_are_slices(b, t, h, d):
    x = torch.randn(b, t, h * d)
    heads = split_heads(x, h)
    for i in range(h):
        assert torch.equal(heads[:, i], x[..., i * d : (i + 1) * d])
    assert torch.equal(merge_heads(heads), x)
    # the way back from a layout that is not a view of x, as after attention
    assert torch.equal(merge_heads(heads.contiguous()), x)


def test_merging_without_the_transpose_mixes_positions():
    """The pitfall: the shape is right, and row 0 holds positions 0 and 1."""
    position = torch.arange(4.0)[None, :, None].expand(1, 4, 4)  # B T C
    heads = split_heads(position, 2).contiguous()
    wrong = heads.reshape(1, 4, 4)
    assert wrong.shape == position.shape
    assert wrong[0, 0].tolist() == [0, 0, 1, 1]
    assert wrong[0, 2].tolist() == [0, 0, 1, 1]
    assert merge_heads(heads)[0, 2].tolist() == [2, 2, 2, 2]


@pytest.mark.parametrize("n_heads", [0, -2, 3, 16])
def test_refuses_a_number_of_heads_that_does_not_divide(n_heads):
    with pytest.raises(ValueError, match=f"got {n_heads}"):
        split_heads(torch.zeros(1, 2, 8), n_heads)
    with pytest.raises(ValueError, match=f"d_model=8; got {n_heads}"):
        MultiHeadAttention(8, n_heads)


# ---------------------------------------------------------------- the layer


def test_layer_by_hand():
    """C = 2, two heads of size 1, so the scale is 1. x = [[1, 0], [0, 1]].

    Queries are 1 by bias. Keys of head 0 are ln 3 times column 0: ln 3 and 0, so
    position 1 weighs them 3/4 and 1/4; keys of head 1 are 0: 1/2 and 1/2. Values
    are 4 x: head 0 averages 4 and 0 to 3, head 1 averages 0 and 4 to 2. Position 0
    sees itself: 4 and 0. The projection swaps the two columns and adds 10.
    """
    made = MultiHeadAttention(2, 2).double()
    zero, one = [0.0, 0.0], [4.0, 0.0]
    weight = [zero, zero, [math.log(3), 0.0], zero, one, [0.0, 4.0]]
    state = {
        "qkv.weight": torch.tensor(weight),
        "qkv.bias": torch.tensor([1.0, 1, 0, 0, 0, 0]),
        "proj.weight": torch.tensor([[0.0, 1], [1, 0]]),
        "proj.bias": torch.tensor([10.0, 10]),
    }
    made.load_state_dict(state)
    x = torch.eye(2, dtype=torch.float64)[None]
    expected = torch.tensor([[[10.0, 14], [12, 13]]], dtype=torch.float64)
    torch.testing.assert_close(made(x), expected)
    weights = [[[[1.0, 0], [0.75, 0.25]], [[1, 0], [0.5, 0.5]]]]
    torch.testing.assert_close(made.weights(x), torch.tensor(weights).double())


@pytest.mark.parametrize(("d_model", "n_heads"), SIZES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_same_as_torch_forward_and_backward(d_model, n_heads, causal, bias):
    ours = layer(d_model, n_heads, causal=causal, bias=bias)
    theirs = nn.MultiheadAttention(d_model, n_heads, bias=bias, batch_first=True)
    theirs = theirs.double()
    with torch.no_grad():
        theirs.in_proj_weight.copy_(ours.qkv.weight)
        theirs.out_proj.weight.copy_(ours.proj.weight)
        if bias:
            theirs.in_proj_bias.copy_(ours.qkv.bias)
            theirs.out_proj.bias.copy_(ours.proj.bias)
    x = torch.randn(2, 5, d_model, dtype=torch.float64, requires_grad=True)
    hidden = ~causal_mask(5) if causal else None  # in torch True hides
    expected, weights = theirs(x, x, x, attn_mask=hidden, average_attn_weights=False)
    found = ours(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
    torch.testing.assert_close(ours.weights(x), weights, rtol=0, atol=1e-11)
    g = torch.randn_like(found)
    grads = torch.autograd.grad(found, (x, ours.qkv.weight, ours.proj.weight), g)
    oracle = torch.autograd.grad(
        expected, (x, theirs.in_proj_weight, theirs.out_proj.weight), g
    )
    for a, b in zip(grads, oracle, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("d_model", "n_heads"), SIZES)
def test_same_as_a_loop_over_single_heads(d_model, n_heads):
    many, size = layer(d_model, n_heads, bias=False), d_model // n_heads
    x = torch.randn(2, 6, d_model, dtype=torch.float64)
    blocks = many.qkv.weight.detach().view(3, n_heads, size, d_model)
    outputs = []
    for i in range(n_heads):
        head = Head(d_model, size).double()
        for part, name in enumerate(("query", "key", "value")):
            getattr(head, name).weight.data = blocks[part, i]
        outputs.append(head(x))
        torch.testing.assert_close(many.weights(x)[:, i], head.weights(x))
    joined = torch.cat(outputs, dim=-1) @ many.proj.weight.T
    torch.testing.assert_close(many(x), joined, rtol=0, atol=1e-11)


def test_parameters_do_not_depend_on_the_number_of_heads():
    for n_heads in (1, 2, 4, 16):
        made = MultiHeadAttention(16, n_heads)
        assert sum(p.numel() for p in made.parameters()) == 4 * 16 * 16 + 4 * 16


def test_scores_of_a_head_have_rank_at_most_its_size():
    made, x = layer(12, 3, bias=False), torch.randn(40, 12, dtype=torch.float64)
    q, k, _ = (split_heads(p, 3) for p in made.qkv(x[None]).chunk(3, -1))
    ranks = torch.linalg.matrix_rank(q @ k.mT)
    assert ranks.tolist() == [[4, 4, 4]]


@given(seed=st.integers(0, 2**31), n=st.integers(1, 8), data=st.data())
def test_the_past_does_not_move_to_the_last_bit(seed, n, data):
    torch.manual_seed(seed)
    made, t = MultiHeadAttention(8, 2), data.draw(st.integers(0, n - 1))
    x, changed = torch.randn(2, 1, n, 8)
    changed[:, :t] = x[:, :t]
    with torch.no_grad():
        before, after = made(x), made(changed)
    torch.testing.assert_close(after[:, :t], before[:, :t], **EXACT)
    assert not torch.equal(after[:, t], before[:, t])


def test_without_causal_everything_moves_everything():
    made, (x, other) = layer(8, 2, causal=False), torch.randn(2, 5, 8).double()
    assert (influence(made, x, other) > 0).all()


def test_exchanging_two_heads_changes_nothing():
    """Rows of qkv and columns of proj go together: heads have no order."""
    made, x = layer(12, 3), torch.randn(2, 5, 12, dtype=torch.float64)
    before = made(x)
    order = torch.tensor([2, 0, 1])
    with torch.no_grad():
        for p in (made.qkv.weight, made.qkv.bias):
            p.copy_(p.view(3, 3, 4, -1)[:, order].reshape(p.shape))
        p = made.proj.weight
        p.copy_(p.view(12, 3, 4)[:, order].reshape(p.shape))
    torch.testing.assert_close(made(x), before, rtol=0, atol=1e-12)


@pytest.mark.parametrize("removed", [0, 1, 2])
def test_removing_a_head_is_zeroing_its_columns_of_the_projection(removed):
    made, x = layer(12, 3), torch.randn(2, 5, 12, dtype=torch.float64)
    keep = torch.arange(3) != removed
    found = made(x, keep_heads=keep)
    with torch.no_grad():
        made.proj.weight[:, 4 * removed : 4 * removed + 4] = 0.0
    torch.testing.assert_close(found, made(x), rtol=0, atol=1e-12)


def test_heads_add_up():
    """Output = bias + one term a head; keeping all is the plain layer."""
    made, x = layer(12, 3), torch.randn(2, 5, 12, dtype=torch.float64)
    none, each = torch.zeros(3, dtype=torch.bool), torch.eye(3, dtype=torch.bool)
    torch.testing.assert_close(
        made(x, keep_heads=none), made.proj.bias.expand(2, 5, 12), **EXACT
    )
    terms = [made(x, keep_heads=one) - made.proj.bias for one in each]
    torch.testing.assert_close(sum(terms) + made.proj.bias, made(x))
    torch.testing.assert_close(made(x, keep_heads=~none), made(x), **EXACT)


def test_one_position_returns_its_own_value():
    made, x = layer(8, 2), torch.randn(3, 1, 8, dtype=torch.float64)
    value = made.qkv(x)[..., 16:]
    torch.testing.assert_close(made(x), made.proj(value))


def test_bfloat16_is_as_near_as_its_digits_allow():
    """Products of width 64 round to 8 bits several times: 3 % of the largest."""
    torch.manual_seed(0)
    made, x = MultiHeadAttention(64, 4), torch.randn(2, 16, 64)
    exact = made.double()(x.double())
    found = made.bfloat16()(x.bfloat16()).double()
    assert (found - exact).abs().max() < 0.03 * exact.abs().max()


# ---------------------------------------------------------------- the model


def test_model_is_its_layers_in_a_row():
    torch.manual_seed(0)
    model, ids = AttentionOnly(8, 2, 2), torch.randint(256, (2, 7))
    x, weights = model.positions(model.embed(ids)), []
    for norm, attend in zip(model.norms, model.layers, strict=True):
        weights.append(attend.weights(norm(x)))
        x = x + attend(norm(x))
    torch.testing.assert_close(model(ids), model.unembed(model.final_norm(x)))
    torch.testing.assert_close(model.weights(ids), torch.stack(weights, 1))
    assert model.weights(ids).shape == (2, 2, 2, 7, 7)


def test_model_removes_the_heads_it_is_told_to():
    torch.manual_seed(0)
    model, ids = AttentionOnly(8, 2, 2), torch.randint(256, (2, 7))
    keep = torch.tensor([[True, True], [True, False]])
    found = model(ids, keep_heads=keep)
    with torch.no_grad():
        model.layers[1].proj.weight[:, 4:] = 0.0
    torch.testing.assert_close(found, model(ids))


@given(seed=st.integers(0, 2**31), n=st.integers(2, 10), data=st.data())
def test_no_byte_moves_a_logit_before_it(seed, n, data):
    torch.manual_seed(seed)
    model, ids = AttentionOnly(8, 2, 2), torch.randint(256, (2, n))
    t = data.draw(st.integers(1, n - 1))
    changed = ids.clone()
    changed[:, t:] = (ids[:, t:] + 1) % 256
    with torch.no_grad():
        before, after = model(ids), model(changed)
    torch.testing.assert_close(after[:, :t], before[:, :t], **EXACT)
    assert not torch.equal(after[:, t:], before[:, t:])


# ---------------------------------------------------------------- three numbers


def rows(*lists):
    """Heads with one row each: H, 1, S."""
    return torch.tensor(lists, dtype=torch.float64)[:, None, :]


def test_distance_by_hand():
    """p = (1, 0), q = (1/2, 1/2): mean (3/4, 1/4) with 0.8113 bits.

    0.8113 - (0 + 1)/2 = 0.3113, the root of which is 0.5579.
    """
    found = js_distance(rows([1, 0], [0.5, 0.5], [0, 1]))
    mean = 0.75 * math.log2(4 / 3) + 0.25 * 2
    d = math.sqrt(mean - 0.5)
    expected = torch.tensor([[0, d, 1], [d, 0, d], [1, d, 0]], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)


@given(seed=st.integers(0, 2**31), n=st.integers(1, 6))
def test_distance_is_a_metric_between_0_and_1(seed, n):
    g = torch.Generator().manual_seed(seed)
    scores = 3 * torch.randn(3, n, n, generator=g, dtype=torch.float64)
    weights = scores.masked_fill(~causal_mask(n), -torch.inf).softmax(-1)
    d = js_distance(weights)
    assert torch.equal(d, d.T)
    assert d.diagonal().max() < 1e-7
    assert d.max() <= 1
    assert d[0, 1] <= d[0, 2] + d[2, 1] + 1e-9


def test_distance_equals_its_definition_by_kl_divergences():
    p, q = torch.randn(2, 5, dtype=torch.float64).softmax(-1)
    m = ((p + q) / 2).log()
    nats = (F.kl_div(m, p, reduction="sum") + F.kl_div(m, q, reduction="sum")) / 2
    found = js_distance(torch.stack((p, q))[:, None])[0, 1]
    torch.testing.assert_close(found, (nats / math.log(2)).sqrt())


def test_entropy_in_bits_by_hand():
    """Eight equal weights are 3 bits, (1/2, 1/4, 1/4) are 1.5, one key is 0."""
    eight = torch.full((1, 8), 1 / 8, dtype=torch.float64)
    torch.testing.assert_close(row_entropy(eight).item(), 3.0)
    found = row_entropy(torch.tensor([[0.5, 0.25, 0.25], [1, 0, 0]]).double())
    torch.testing.assert_close(found, torch.tensor([1.5, 0.0]).double())


def test_lookback_by_hand():
    """Itself is 0 back, the first key t back; even weights average to t / 2."""
    eye, even = torch.eye(4), causal_mask(4) / torch.arange(1, 5)[:, None]
    assert lookback(eye).tolist() == [0, 0, 0, 0]
    first = torch.zeros(4, 4)
    first[:, 0] = 1.0
    assert lookback(first).tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(lookback(even), torch.tensor([0, 0.5, 1, 1.5]))
    assert lookback(first[-1:]).tolist() == [3]  # one query at the end of 4 keys
