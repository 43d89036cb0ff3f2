"""The feed-forward layer against torch, GPT-2's MLP, loops and hand computation."""

import math
from statistics import NormalDist

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from groundup.transformer.feedforward import (
    ACTIVATIONS,
    Add,
    FeedForward,
    WindowEmbedding,
    block_cost,
    gelu,
    gelu_slope,
    gelu_tanh,
)

GRID = torch.linspace(-12, 12, 4801, dtype=torch.float64)
# The two variants differ by 4.7e-4 at most, so 1e-12 tells them apart.
EXACTLY = {"rtol": 0, "atol": 1e-12}


def test_both_variants_equal_torch():
    torch.testing.assert_close(gelu(GRID), F.gelu(GRID), **EXACTLY)
    torch.testing.assert_close(
        gelu_tanh(GRID), F.gelu(GRID, approximate="tanh"), **EXACTLY
    )


def test_the_variants_are_different_functions():
    """By how much and where: 4.7e-4 at |x| = 2.7, never more."""
    gap = (gelu_tanh(GRID) - gelu(GRID)).abs()
    assert gap.max().item() == pytest.approx(4.73e-4, abs=1e-6)
    assert GRID[gap.argmax()].abs().item() == pytest.approx(2.70, abs=0.02)


def test_by_hand_at_one():
    """Phi(1) = 0.841345; sqrt(2/pi) * 1.044715 = 0.833562, whose tanh is 0.682384."""
    one = torch.tensor([1.0], dtype=torch.float64)
    assert gelu(one).item() == pytest.approx(0.841345, abs=1e-6)
    assert gelu_tanh(one).item() == pytest.approx((1 + 0.682384) / 2, abs=1e-6)


@given(x=st.floats(-30, 30))
def test_gelu_is_x_times_the_normal_cdf(x):
    got = gelu(torch.tensor([x], dtype=torch.float64)).item()
    assert got == pytest.approx(x * NormalDist().cdf(x), abs=1e-14)


@pytest.mark.parametrize("function", [gelu, gelu_tanh])
@given(x=st.floats(-1e6, 1e6))
def test_reflection(function, x):
    """The gates of x and -x add up to 1, so f(x) - f(-x) = x."""
    pair = function(torch.tensor([x, -x], dtype=torch.float64))
    assert (pair[0] - pair[1]).item() == pytest.approx(x, rel=1e-12, abs=1e-12)


def test_gelu_is_the_mean_of_a_random_gate():
    """E[x 1(Z < x)] = x Phi(x), in 5 sigma: one false alarm in 1.7 million runs."""
    n = 200_000
    z = torch.randn(n, generator=torch.Generator().manual_seed(0)).double()
    for x in (-1.5, -0.3, 0.7, 2.0):
        gate = NormalDist().cdf(x)
        sigma = abs(x) * math.sqrt(gate * (1 - gate) / n)
        mean = (x * (z < x)).double().mean().item()
        assert abs(mean - gelu(torch.tensor([x])).item()) < 5 * sigma


@pytest.mark.parametrize("function", [gelu, gelu_tanh])
def test_gradients_of_both_variants(function):
    x = torch.linspace(-6, 6, 41, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, x)
    mode = {gelu: "none", gelu_tanh: "tanh"}[function]
    (ours,) = torch.autograd.grad(function(x).sum(), x)
    (theirs,) = torch.autograd.grad(F.gelu(x, approximate=mode).sum(), x)
    torch.testing.assert_close(ours, theirs, **EXACTLY)


def test_slope_is_the_derivative_and_has_known_landmarks():
    """Slope 1/2 at 0, sqrt(2/pi)/e above 1 at sqrt 2 (its maximum), 0 at -0.7518."""
    x = GRID.clone().requires_grad_()
    (expected,) = torch.autograd.grad(gelu(x).sum(), x)
    torch.testing.assert_close(gelu_slope(GRID), expected, **EXACTLY)
    landmarks = torch.tensor([0.0, math.sqrt(2), -0.751791], dtype=torch.float64)
    zero, top, bottom = gelu_slope(landmarks).tolist()
    assert zero == 0.5
    assert top == pytest.approx(gelu_slope(GRID).max().item(), abs=1e-5)
    assert bottom == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("function", [gelu, gelu_tanh])
def test_half_precision_stays_finite_and_close(function, dtype):
    """At 1000 the cube overflows float16; value and slope must not notice."""
    x = torch.tensor([-1000.0, -300, -60, -2, 0, 2, 60, 300, 1000], dtype=dtype)
    x.requires_grad_()
    y = function(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    wide = x.detach().double().requires_grad_()
    exact = function(wide)
    (exact_slope,) = torch.autograd.grad(exact.sum(), wide)
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), exact, rtol=unit, atol=4 * unit)
    torch.testing.assert_close(slope.double(), exact_slope, rtol=unit, atol=8 * unit)


@pytest.mark.parametrize(
    ("ours", "theirs"), [("gelu_tanh", "gelu_new"), ("gelu", "gelu"), ("relu", "relu")]
)
def test_equals_gpt2_mlp_with_the_same_weights(ours, theirs):
    """Values and gradients, float64. Conv1D stores (in, out): transposed."""
    gpt2 = pytest.importorskip("transformers.models.gpt2.modeling_gpt2")
    from transformers import GPT2Config

    config = GPT2Config(n_embd=12, activation_function=theirs, resid_pdrop=0.0)
    oracle = gpt2.GPT2MLP(48, config).double()
    layer = FeedForward(12, activation=ours).double()
    with torch.no_grad():
        for mine, their in ((layer.up, oracle.c_fc), (layer.down, oracle.c_proj)):
            their.bias.normal_()
            mine.weight.copy_(their.weight.T)
            mine.bias.copy_(their.bias)
    x = 3 * torch.randn(2, 5, 12, dtype=torch.float64)
    torch.testing.assert_close(layer(x), oracle(x), **EXACTLY)
    layer(x).square().sum().backward()
    oracle(x).square().sum().backward()
    torch.testing.assert_close(
        layer.up.weight.grad, oracle.c_fc.weight.grad.T, rtol=1e-12, atol=1e-12
    )


@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 7),
    seed=st.integers(0, 2**31),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
)
def test_a_token_moves_only_itself(batch, length, seed, activation):
    """To the last bit: no output but the perturbed token's may change."""
    torch.manual_seed(seed)
    layer = FeedForward(6, activation=activation)
    x = torch.randn(batch, length, 6)
    touched = x.clone()
    row, position = seed % batch, seed % length
    touched[row, position] += 1.0
    moved = (layer(x) != layer(touched)).any(-1)
    assert moved[row, position]
    assert moved.sum() == 1


def test_a_permutation_of_tokens_passes_through():
    torch.manual_seed(0)
    layer, x = FeedForward(8).double(), torch.randn(1, 9, 8, dtype=torch.float64)
    order = torch.randperm(9)
    torch.testing.assert_close(layer(x[:, order]), layer(x)[:, order], **EXACTLY)


def test_output_is_a_sum_of_values_weighted_by_hidden_units():
    """The key-value reading, as a loop over units (Geva et al. 2021, eq. 2)."""
    torch.manual_seed(1)
    layer, x = FeedForward(5, 7).double(), torch.randn(5, dtype=torch.float64)
    total = layer.down.bias.clone()
    for unit in range(7):
        key, value = layer.up.weight[unit], layer.down.weight[:, unit]
        match = key @ x + layer.up.bias[unit]
        total = total + gelu_tanh(match[None]) * value
    torch.testing.assert_close(layer(x), total, **EXACTLY)


def test_hidden_is_what_down_reads():
    torch.manual_seed(2)
    layer, x = FeedForward(4, 3, activation="relu"), torch.randn(2, 4)
    expected = F.relu(F.linear(x, layer.up.weight, layer.up.bias))
    torch.testing.assert_close(layer.hidden(x), expected, rtol=0, atol=0)
    assert layer.hidden(x).shape == (2, 3)


def test_without_the_non_linearity_it_is_one_matrix():
    torch.manual_seed(3)
    layer = FeedForward(6, activation="identity").double()
    matrix = layer.down.weight @ layer.up.weight
    offset = layer.down.weight @ layer.up.bias + layer.down.bias
    x = torch.randn(4, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(x), x @ matrix.T + offset, **EXACTLY)
    bent = FeedForward(6).double()
    bent.load_state_dict(layer.state_dict())
    assert (bent(x) - layer(x)).abs().max() > 0.01


def test_one_token_no_batch_and_an_empty_sequence():
    layer, x = FeedForward(4), torch.randn(3, 4)
    torch.testing.assert_close(layer(x[1]), layer(x)[1])
    assert layer(torch.empty(2, 0, 4)).shape == (2, 0, 4)


def test_default_width_and_bias():
    assert FeedForward(10).up.weight.shape == (40, 10)
    assert {name for name, _ in FeedForward(4, bias=False).named_parameters()} == {
        "up.weight",
        "down.weight",
    }


@given(
    d_model=st.integers(1, 12).map(lambda n: 4 * n),
    d_ff=st.integers(1, 60),
    n_keys=st.integers(1, 30),
)
def test_cost_against_counted_parameters_and_flops(d_model, d_ff, n_keys):
    """One query over n_keys keys, through real matrix products that torch counts."""
    cost = block_cost(d_model, d_ff, n_keys)
    layer = FeedForward(d_model, d_ff, bias=False)
    assert cost["feedforward"]["parameters"] == sum(
        p.numel() for p in layer.parameters()
    )
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(1, d_model))
    assert cost["feedforward"]["flops"] == counter.get_total_flops()

    attention = torch.nn.MultiheadAttention(d_model, 4, bias=False)
    assert cost["projections"]["parameters"] == sum(
        p.numel() for p in attention.parameters()
    )
    q, keys = torch.randn(1, d_model), torch.randn(n_keys, d_model)
    with FlopCounterMode(display=False) as counter:
        for weight in (*attention.in_proj_weight.chunk(3), attention.out_proj.weight):
            q @ weight.T  # query, key, value, output of the one token
    assert cost["projections"]["flops"] == counter.get_total_flops()
    heads = [t.view(-1, 4, d_model // 4).transpose(0, 1) for t in (q, keys)]
    with FlopCounterMode(display=False) as counter:
        (heads[0] @ heads[1].mT).softmax(-1) @ heads[1]
    assert cost["scores"]["flops"] == counter.get_total_flops()


@pytest.mark.parametrize("bad", [{"d_model": 0}, {"d_ff": -1}, {"n_keys": 0}])
def test_cost_refuses_sizes_below_one(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))} must be a positive"):
        block_cost(**({"d_model": 2, "d_ff": 2, "n_keys": 2} | bad))


def test_layer_refuses_bad_arguments():
    with pytest.raises(ValueError, match="d_model must be a positive"):
        FeedForward(0)
    with pytest.raises(ValueError, match="d_ff must be a positive"):
        FeedForward(4, 0)
    with pytest.raises(ValueError, match=r"one of .*'gelu_tanh'.*; got 'swish'"):
        FeedForward(4, activation="swish")


def test_add_is_the_input_plus_the_layers_in_order():
    double, plus_one = FeedForward(1, 1, activation="identity"), torch.nn.Linear(1, 1)
    with torch.no_grad():
        for linear, weight, bias in (
            (double.up, 2.0, 0.0),
            (double.down, 1.0, 0.0),
            (plus_one, 1.0, 1.0),
        ):
            linear.weight.fill_(weight)
            linear.bias.fill_(bias)
    x = torch.tensor([[3.0]])
    assert Add(double, plus_one)(x).item() == 3 + (2 * 3 + 1)
    assert Add(plus_one, double)(x).item() == 3 + 2 * (3 + 1)


def test_window_by_hand():
    """Bytes 5 6 7 in windows of two: (0 5), (5 6), (6 7), the newest last."""
    layer = WindowEmbedding(1, 2)
    with torch.no_grad():
        layer.embed.weight.copy_(torch.arange(256.0)[:, None])
    got = layer(torch.tensor([[5, 6, 7]]))
    assert got.tolist() == [[[0.0, 5.0], [5.0, 6.0], [6.0, 7.0]]]


@given(
    window=st.integers(1, 6),
    length=st.integers(1, 8),
    seed=st.integers(0, 2**31),
)
def test_window_sees_the_last_w_bytes_and_no_others(window, length, seed):
    """A changed byte moves its own position and the next W - 1, none before."""
    torch.manual_seed(seed)
    layer, ids = WindowEmbedding(2, window), torch.randint(255, (1, length))
    at = seed % length
    touched = ids.clone()
    touched[0, at] += 1
    moved = (layer(ids) != layer(touched)).any(-1)[0]
    assert moved.nonzero().flatten().tolist() == [
        t for t in range(length) if at <= t < at + window
    ]


def test_window_refuses_sizes_below_one():
    with pytest.raises(ValueError, match="window must be a positive integer; got 0"):
        WindowEmbedding(4, 0)
    with pytest.raises(ValueError, match="d_byte must be a positive"):
        WindowEmbedding(0, 4)
