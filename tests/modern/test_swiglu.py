"""SwiGLU and its relatives against transformers, torch, hand arithmetic and claims."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from groundup.modern.decoder import DecoderConfig
from groundup.modern.swiglu import (
    MULTIPLE,
    ZOO,
    SwiGLU,
    ZooLayer,
    gated_width,
    identity,
    silu,
    squared_relu,
)
from groundup.transformer.block import fuse

GATED = [name for name, (_, gated) in ZOO.items() if gated]
PLAIN = [name for name in ZOO if name not in GATED]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# ------------------------------------------------------------------- by hand


def test_two_numbers():
    """silu(2) = 2 / (1 + e^-2) = 1.7616; silu(-2) = -2 / (1 + e^2) = -0.2384.

    They sum to 2: the logistic functions of x and -x sum to 1.
    """
    x = torch.tensor([2.0, -2.0], dtype=torch.float64)
    expected = [2 / (1 + math.exp(-2)), -2 / (1 + math.exp(2))]
    assert silu(x).tolist() == pytest.approx(expected, rel=1e-12)
    assert silu(x)[0].item() == pytest.approx(1.7616, abs=5e-5)
    assert squared_relu(torch.tensor([3.0, -3.0])).tolist() == [9.0, 0.0]
    assert identity(x) is x


@pytest.mark.parametrize("fused", [False, True])
def test_the_layer_by_hand(fused):
    """x = 2: gates 2 and -2, values 3 * 2 and 3 * 2, read out with weights 1 and 10.

    silu(2) * 6 + 10 * silu(-2) * 6 = 10.570 - 14.304 = -3.735. Gate and up swapped
    would be silu(6) * 2 - 10 * silu(6) * 2 = -107.7.
    """
    layer = fuse(SwiGLU(1, 2), fused)
    with torch.no_grad():
        layer.gate_up.weight.copy_(torch.tensor([[1.0], [-1.0], [3.0], [3.0]]))
        layer.down.weight.copy_(torch.tensor([[1.0, 10.0]]))
    expected = 6 * 2 / (1 + math.exp(-2)) - 60 * 2 / (1 + math.exp(2))
    assert layer(torch.tensor([2.0])).item() == pytest.approx(expected, rel=1e-5)
    assert expected == pytest.approx(-3.735, abs=1e-3)


def test_widths():
    """8/3 of 384 is 1024; of 64 it is 170.7, and the next multiple of 16 is 176."""
    assert (gated_width(384), gated_width(64), gated_width(3)) == (1024, 176, 16)
    assert SwiGLU(384).gate_up.weight.shape == (2048, 384)
    assert DecoderConfig(d_model=64).width == 176


@given(d_model=st.integers(1, 5000))
def test_a_gated_layer_holds_what_a_plain_one_of_four_times_the_width_does(d_model):
    width = gated_width(d_model)
    assert width % MULTIPLE == 0
    assert (
        8 * d_model**2 <= 3 * d_model * width < 3 * d_model * MULTIPLE + 8 * d_model**2
    )


# ------------------------------------------------------------------- oracles


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("fused", [False, True])
def test_equals_llamas_mlp(scale, fused):
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    from transformers import LlamaConfig

    config = LlamaConfig(hidden_size=12, intermediate_size=20, num_attention_heads=2)
    theirs = modeling.LlamaMLP(config).double()
    ours = fuse(SwiGLU(12, 20).double(), fused)
    with torch.no_grad():
        both = torch.cat((theirs.gate_proj.weight, theirs.up_proj.weight))
        ours.gate_up.weight.copy_(both)
        ours.down.weight.copy_(theirs.down_proj.weight)
    x = (scale * torch.randn(2, 5, 12, dtype=torch.float64)).requires_grad_()
    mine, expected = ours(x), theirs(x)
    bound = 1e-12 * (1 + expected.abs().max().item())
    torch.testing.assert_close(mine, expected, rtol=1e-11, atol=bound)
    up = torch.randn_like(x)
    wanted = [theirs.gate_proj.weight, theirs.up_proj.weight, theirs.down_proj.weight]
    gate_grad, up_grad, down_grad = torch.autograd.grad(
        expected, wanted, up, retain_graph=True
    )
    found = torch.autograd.grad(
        mine, (ours.gate_up.weight, ours.down.weight, x), up, retain_graph=True
    )
    (x_grad,) = torch.autograd.grad(expected, x, up)
    both = (torch.cat((gate_grad, up_grad)), down_grad, x_grad)
    for one, other in zip(found, both, strict=True):
        bound = 1e-12 * (1 + other.abs().max().item())
        torch.testing.assert_close(one, other, rtol=1e-10, atol=bound)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_silu_equals_torch(dtype):
    x = torch.tensor([0.0, 1e-4, -1.278, 5, -5, 50, -50, 6e4, -6e4]).to(dtype)
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(silu(x), F.silu(x), rtol=4 * unit, atol=unit)
    assert silu(x)[-1] == 0


@pytest.mark.parametrize("name", PLAIN)
def test_plain_members_against_the_formula(name):
    layer = ZooLayer(name, 6, 8).double()
    x = torch.randn(4, 6, dtype=torch.float64)
    before = x @ layer.first.weight.T
    after = {
        "relu": before.clamp(min=0),
        "gelu": before * torch.distributions.Normal(0, 1).cdf(before),
        "silu": before / (1 + torch.exp(-before)),
        "relu2": torch.where(before > 0, before**2, 0.0),
    }[name]
    torch.testing.assert_close(layer(x), after @ layer.down.weight.T)
    assert layer.hidden(x).shape == (4, 12)


@pytest.mark.parametrize("name", GATED)
def test_gated_members_against_the_formula(name):
    layer = ZooLayer(name, 6, 8).double()
    x = torch.randn(4, 6, dtype=torch.float64)
    gate, up = x @ layer.first.weight[:8].T, x @ layer.first.weight[8:].T
    opened = {
        "bilinear": gate,
        "reglu": gate.clamp(min=0),
        "geglu": gate * torch.distributions.Normal(0, 1).cdf(gate),
        "swiglu": gate / (1 + torch.exp(-gate)),
    }[name]
    torch.testing.assert_close(layer(x), (opened * up) @ layer.down.weight.T)


def test_the_zoos_swiglu_is_the_decoders():
    ours, zoo = SwiGLU(16), ZooLayer("swiglu", 16)
    zoo.load_state_dict(
        {"first.weight": ours.gate_up.weight, "down.weight": ours.down.weight}
    )
    x = torch.randn(3, 5, 16)
    torch.testing.assert_close(ours(x), zoo(x))


# ---------------------------------------------------------------- properties


@pytest.mark.parametrize("d_model", [16, 64, 384])
def test_all_members_hold_the_same_number_of_parameters(d_model):
    counts = {
        name: sum(p.numel() for p in ZooLayer(name, d_model).parameters())
        for name in ZOO
    }
    assert set(counts.values()) == {3 * d_model * gated_width(d_model)}
    assert sum(p.numel() for p in SwiGLU(d_model).parameters()) in counts.values()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), scale=st.floats(0.1, 10))
def test_degrees(seed, scale):
    """Scaling the input by s scales ReLU by s, and its square and products by s²."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 8, dtype=torch.float64, generator=generator)
    for name, degree in (("relu", 1), ("relu2", 2), ("bilinear", 2), ("reglu", 2)):
        layer = ZooLayer(name, 8).double()
        torch.testing.assert_close(layer(scale * x), scale**degree * layer(x))


@settings(max_examples=40, deadline=None)
@given(gate=st.floats(-30, 30), up=st.floats(-30, 30))
def test_swapping_gate_and_up_changes_by_the_difference_of_the_logistics(gate, up):
    g, u = torch.tensor([gate, up], dtype=torch.float64)
    change = silu(u) * g - silu(g) * u
    expected = g * u * (torch.sigmoid(u) - torch.sigmoid(g))
    torch.testing.assert_close(change, expected, rtol=1e-9, atol=1e-9)


def test_silus_minimum():
    """silu'(x) = 0 at x = -1.2785, where silu is -0.2785: x = -(1 + silu(x))."""
    x = torch.linspace(-3, 0, 30_001, dtype=torch.float64)
    low, place = silu(x).min(0)
    assert x[place].item() == pytest.approx(-1.2785, abs=2e-4)
    assert low.item() == pytest.approx(-0.2785, abs=2e-4)
    assert (silu(x) - silu(-x)).tolist() == pytest.approx(x.tolist())


def test_a_token_is_mapped_by_itself():
    layer, x = SwiGLU(8), torch.randn(2, 6, 8)
    changed = x.clone()
    changed[0, 2] += 1
    moved = (layer(x) - layer(changed)).abs().amax(-1) > 1e-6
    assert moved.nonzero().tolist() == [[0, 2]]


# ----------------------------------------------------------------- gradients


@pytest.mark.parametrize("function", [silu, squared_relu])
def test_gradients_of_the_functions(function):
    x = torch.tensor([-40.0, -1.3, -0.1, 0.2, 3.0, 40.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(function, x.requires_grad_())


@pytest.mark.parametrize("name", ZOO)
def test_gradients_of_the_layers(name):
    layer = ZooLayer(name, 3, 4).double()
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)


def test_the_switch_changes_nothing():
    layer = SwiGLU(8).double()
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    found = []
    for fused in (False, True):
        y = fuse(layer, fused)(x)
        found.append((y, *torch.autograd.grad(y.square().sum(), x)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("shape", [(0, 4), (4,), (1, 1, 4)])
def test_edges(shape):
    """A sum over an empty or single row equals the row by itself."""
    layer, x = SwiGLU(4), torch.randn(shape)
    rows = [layer(row) for row in x.reshape(-1, 4)]
    expected = torch.stack(rows).reshape(shape) if rows else torch.zeros(shape)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer(torch.zeros(4)), torch.zeros(4))  # no bias


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SwiGLU(0), "d_model must be a positive integer; got 0"),
        (lambda: SwiGLU(4, 0), "d_ff must be a positive integer; got 0"),
        (lambda: ZooLayer("tanh", 4), "name must be one of .*; got 'tanh'"),
        (lambda: ZooLayer("relu", 0, 2), "d_model must be a positive integer; got 0"),
        (lambda: ZooLayer("relu", 4, 5), "d_ff must be even, for 3/2 of it; got 5"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()
