"""Layer norm and residual against torch, hand computation and their own promises."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from groundup.transformer.feedforward import FeedForward
from groundup.transformer.residual_norm import (
    LayerNorm,
    Residual,
    layer_norm,
    layer_norm_backward,
    standardise,
)

TIGHT = {"rtol": 1e-12, "atol": 1e-12}


def double(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_by_hand():
    """Mean 4, deviations -3 -1 0 1 3, variance 20 / 5 = 4, standard deviation 2.

    The unbiased variance would be 20 / 4 = 5.
    """
    row = torch.tensor([1.0, 3, 4, 5, 7], dtype=torch.float64)
    expected = torch.tensor([-1.5, -0.5, 0, 0.5, 1.5], dtype=torch.float64)
    torch.testing.assert_close(layer_norm(row, eps=0.0), expected, **TIGHT)
    weight, bias = torch.full_like(row, 2.0), torch.full_like(row, 10.0)
    torch.testing.assert_close(
        layer_norm(row, weight, bias, eps=0.0), 2 * expected + 10, **TIGHT
    )


@pytest.mark.parametrize("eps", [0.0, 5.0, 12.0])
def test_standardise_returns_the_factor_that_it_used(eps):
    """Variance 4: 1 / sqrt(4), 1 / sqrt(9), 1 / sqrt(16)."""
    row = torch.tensor([1.0, 3, 4, 5, 7], dtype=torch.float64)
    x_hat, inverse_std = standardise(row, eps)
    expected = {0.0: 1 / 2, 5.0: 1 / 3, 12.0: 1 / 4}[eps]
    assert inverse_std.item() == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(x_hat, (row - 4) * expected, **TIGHT)


def test_eps_is_inside_the_root_by_hand():
    """Variance 1e-6, eps 3e-6: 1e-3 / sqrt(4e-6) = 1/2. Outside the root: 0.997."""
    row = torch.tensor([-1e-3, 1e-3], dtype=torch.float64)
    expected = torch.tensor([-0.5, 0.5], dtype=torch.float64)
    torch.testing.assert_close(layer_norm(row, eps=3e-6), expected, **TIGHT)


@given(
    rows=st.integers(1, 4),
    width=st.integers(2, 33),
    log_scale=st.integers(-6, 6),
    offset=st.floats(-100, 100),
    eps=st.sampled_from([1e-12, 1e-5, 1e-2]),
    seed=st.integers(0, 2**31),
)
def test_equals_torch_at_every_scale(rows, width, log_scale, offset, eps, seed):
    """Scales from 1e-6, where eps rules, to 1e6, where it vanishes."""
    x = double(rows, width, seed=seed) * 10.0**log_scale + offset
    weight, bias = double(width, seed=seed + 1), double(width, seed=seed + 2)
    torch.testing.assert_close(
        layer_norm(x, weight, bias, eps),
        F.layer_norm(x, (width,), weight, bias, eps),
        rtol=1e-7,  # rounding of an offset of 100 at a scale of 1e-6
        atol=1e-7,
    )


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1000.0])
def test_module_equals_torch_with_gradients(scale):
    ours, theirs = LayerNorm(9).double(), nn.LayerNorm(9).double()
    with torch.no_grad():
        for mine, their in zip(ours.parameters(), theirs.parameters(), strict=True):
            mine.copy_(their.normal_())
    x = (scale * double(2, 3, 9)).requires_grad_()
    y = x.detach().clone().requires_grad_()
    pull = double(2, 3, 9, seed=1)
    (ours(x) * pull).sum().backward()
    (theirs(y) * pull).sum().backward()
    torch.testing.assert_close(ours(x), theirs(y), **TIGHT)
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, **TIGHT)
    torch.testing.assert_close(ours.bias.grad, theirs.bias.grad, **TIGHT)


def test_gradcheck():
    x, weight, bias = double(3, 5), double(5, seed=1), double(5, seed=2)
    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    assert torch.autograd.gradcheck(layer_norm, inputs)


@given(
    width=st.integers(2, 20),
    log_scale=st.integers(-4, 4),
    seed=st.integers(0, 2**31),
    use_weight=st.booleans(),
)
def test_closed_form_backward_is_autograd(width, log_scale, seed, use_weight):
    x = (double(3, width, seed=seed) * 10.0**log_scale).requires_grad_()
    weight = double(width, seed=seed + 1) if use_weight else None
    grad = double(3, width, seed=seed + 2)
    (expected,) = torch.autograd.grad(layer_norm(x, weight), x, grad)
    got = layer_norm_backward(grad, x.detach(), weight)
    # At width 2 the gradient cancels to nothing, so compare with its terms.
    terms = grad.abs().max().item() * 10.0**-log_scale
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-11 * terms)


@given(width=st.integers(3, 20), seed=st.integers(0, 2**31))
def test_backward_is_a_projection(width, seed):
    """Without eps the gradient has no mean and no part along x; twice is once."""
    x = double(width, seed=seed)
    grad = layer_norm_backward(double(width, seed=seed + 1), x, eps=0.0)
    size = grad.norm().item() + 1e-12
    assert abs(grad.sum().item()) < 1e-9 * size * width
    assert abs((grad @ x).item()) < 1e-9 * size * x.norm().item()
    std = x.std(correction=0)
    again = layer_norm_backward(grad * std, x, eps=0.0)
    torch.testing.assert_close(again, grad, rtol=1e-8, atol=1e-10 * size)


@given(
    shift=st.floats(-1e3, 1e3),
    scale=st.floats(1e-3, 1e3),
    sign=st.sampled_from([-1.0, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_shift_and_scale_do_not_matter(shift, scale, sign, seed):
    """LN(a x + b; a^2 eps) = sign(a) LN(x; eps): exact, eps included."""
    x, eps, a = double(7, seed=seed), 1e-5, sign * scale
    torch.testing.assert_close(
        layer_norm(a * x + shift, eps=a * a * eps),
        sign * layer_norm(x, eps=eps),
        rtol=1e-6,
        atol=1e-6,
    )


@given(width=st.integers(1, 64), seed=st.integers(0, 2**31))
def test_rows_come_out_with_mean_0_and_the_variance_that_eps_leaves(width, seed):
    """Variance v becomes v / (v + eps)."""
    x, eps = double(width, seed=seed), 1e-5
    y = layer_norm(x, eps=eps)
    v = x.var(correction=0).item()
    assert y.mean().item() == pytest.approx(0, abs=1e-12)
    assert y.var(correction=0).item() == pytest.approx(v / (v + eps), rel=1e-9)


@pytest.mark.parametrize("value", [0.0, 0.1, -7.0, 1e4])
def test_a_constant_row_gives_the_bias_and_a_finite_gradient(value):
    x = torch.full((2, 6), value, requires_grad=True)
    bias = torch.arange(6.0)
    y = layer_norm(x, None, bias)
    torch.testing.assert_close(y, bias.expand(2, 6), rtol=0, atol=1e-6)
    (y * torch.arange(6.0)).sum().backward()
    largest = 6.0 / math.sqrt(1e-5)  # 1 / sqrt(eps) times the incoming gradient
    assert x.grad.abs().max() < largest


def test_a_row_of_one_number_gives_the_bias():
    torch.testing.assert_close(layer_norm(torch.tensor([[5.0]])), torch.zeros(1, 1))
    assert layer_norm(torch.empty(0, 4)).shape == (0, 4)


def test_a_large_mean_does_not_cancel():
    """E[x^2] - E[x]^2 would be off by 8 here; the mean rounds at 1e-3."""
    x = 1e4 + double(4, 256)
    y = layer_norm(x.float())
    torch.testing.assert_close(
        y.double(), layer_norm(x.float().double()), rtol=0, atol=2e-3
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1000.0])
def test_half_precision_is_the_rounded_result(dtype, scale):
    """At 1000 the squares overflow float16; the statistics must be wider."""
    x = (scale * double(5, 64)).to(dtype)
    weight, bias = double(64, seed=1).to(dtype), double(64, seed=2).to(dtype)
    y = layer_norm(x, weight, bias)
    assert y.dtype == dtype
    exact = layer_norm(x.double(), weight.double(), bias.double())
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), exact, rtol=unit, atol=1e-5)
    theirs = F.layer_norm(x, (64,), weight, bias)
    torch.testing.assert_close(y, theirs, rtol=unit, atol=unit)


def test_parameters_start_as_the_identity():
    x = torch.randn(3, 8)
    torch.testing.assert_close(LayerNorm(8)(x), layer_norm(x), rtol=0, atol=0)


def test_refuses_bad_arguments():
    with pytest.raises(ValueError, match="eps must be at least 0; got -1"):
        layer_norm(torch.zeros(2), eps=-1.0)
    with pytest.raises(ValueError, match="eps must be at least 0"):
        LayerNorm(4, eps=-1e-5)
    with pytest.raises(ValueError, match="d_model must be a positive integer; got 0"):
        LayerNorm(0)
    with pytest.raises(ValueError, match=r"norm must be one of .*; got 'sandwich'"):
        Residual(nn.Identity(), 4, norm="sandwich")


@pytest.mark.parametrize("residual", [True, False])
def test_the_orders_by_hand(residual):
    """Sublayer 2x + 1 on the row (1, 3), whose normalised form is (-1, 1)."""

    class Affine(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * x + 1

    x = torch.tensor([1.0, 3.0], dtype=torch.float64)
    keep = x if residual else 0 * x
    expected = {
        "pre": keep + torch.tensor([-1.0, 3.0]),  # 2 (-1, 1) + 1
        "none": keep + torch.tensor([3.0, 7.0]),
        "post": torch.tensor([-1.0, 1.0], dtype=torch.float64),
    }
    for norm, value in expected.items():
        layer = Residual(Affine(), 2, norm=norm, residual=residual).double()
        torch.testing.assert_close(layer(x), value.double(), rtol=0, atol=1e-4)


class SelfAttention(nn.Module):
    """torch's attention with one argument, to be a sublayer."""

    def __init__(self, inner: nn.MultiheadAttention) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_equals_torch_encoder_layer(norm):
    """Two wrapped sublayers are nn.TransformerEncoderLayer, norm_first or not."""
    torch.manual_seed(0)
    oracle = nn.TransformerEncoderLayer(
        8, 2, 20, dropout=0.0, activation="gelu", batch_first=True,
        norm_first=norm == "pre", dtype=torch.float64,
    )  # fmt: skip
    mlp = FeedForward(8, 20, activation="gelu")
    mlp.up, mlp.down = oracle.linear1, oracle.linear2
    first = Residual(SelfAttention(oracle.self_attn), 8, norm=norm)
    second = Residual(mlp, 8, norm=norm)
    with torch.no_grad():
        for ours, theirs in ((first, oracle.norm1), (second, oracle.norm2)):
            ours.norm = ours.norm.double()
            ours.norm.weight.copy_(theirs.weight.normal_())
            ours.norm.bias.copy_(theirs.bias.normal_())
    x = double(2, 5, 8)
    torch.testing.assert_close(second(first(x)), oracle(x), **TIGHT)


@pytest.mark.parametrize("norm", ["pre", "none"])
def test_the_derivative_contains_the_identity(norm):
    """d(x + f)/dx = I + df/dx; without the residual the I is gone."""
    x, mlp = double(4), FeedForward(4).double()
    jacobian = torch.autograd.functional.jacobian
    with_x = jacobian(Residual(mlp, 4, norm=norm).double(), x)
    without = jacobian(Residual(mlp, 4, norm=norm, residual=False).double(), x)
    torch.testing.assert_close(
        with_x - without, torch.eye(4, dtype=torch.float64), **TIGHT
    )


def test_a_silent_branch_is_the_identity():
    mlp, x = FeedForward(6), torch.randn(3, 6)
    nn.init.zeros_(mlp.down.weight)
    nn.init.zeros_(mlp.down.bias)
    for norm in ("pre", "none"):
        assert torch.equal(Residual(mlp, 6, norm=norm)(x), x)
        assert not Residual(mlp, 6, norm=norm, residual=False)(x).any()


def test_pre_norm_never_rescales_the_stream_and_post_norm_always_does():
    torch.manual_seed(1)
    x = 50 * torch.randn(4, 16)
    mlp = FeedForward(16)
    pre, post = (Residual(mlp, 16, norm=norm) for norm in ("pre", "post"))
    assert (pre(x) - x).norm() < 0.1 * x.norm()
    torch.testing.assert_close(
        post(x).norm(dim=-1), torch.full((4,), 4.0), rtol=1e-3, atol=0
    )


def test_options_reach_the_sublayer():
    class Scaled(nn.Module):
        def forward(self, x: torch.Tensor, *, by: float) -> torch.Tensor:
            return by * x

    x = torch.randn(2, 3)
    layer = Residual(Scaled(), 3, norm="none")
    torch.testing.assert_close(layer(x, by=2.0), 3 * x)


def test_only_a_norm_brings_parameters():
    mlp = FeedForward(4)
    inside = sum(p.numel() for p in mlp.parameters())
    for norm, extra in (("pre", 8), ("post", 8), ("none", 0)):
        layer = Residual(mlp, 4, norm=norm)
        assert sum(p.numel() for p in layer.parameters()) == inside + extra
