"""RMSNorm against torch, transformers, hand arithmetic and its own promises."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from groundup.modern.decoder import Decoder, DecoderConfig
from groundup.modern.rmsnorm import EPS, RMSNorm, _RMSNorm, rms_norm
from groundup.transformer.block import fuse
from groundup.transformer.residual_norm import layer_norm


def fast(x, weight, eps=EPS):
    return _RMSNorm.apply(x, weight, eps)[0]


FORMS = pytest.mark.parametrize("norm", [rms_norm, fast], ids=["clear", "fast"])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def fused_layer(width, dtype=torch.float64):
    layer = RMSNorm(width).to(dtype)
    nn.init.normal_(layer.weight)
    return fuse(layer)


# ------------------------------------------------------------------- by hand


@FORMS
def test_three_and_four(norm):
    """9 + 16 = 25, over 2 is 12.5: divide by 3.5355. No mean leaves the row.

    The weight comes after: 10 * 0.8485 and 1 * 1.1314. Before, it would change the
    root mean square itself: (30, 4) has 21.4 and gives (1.40, 0.19).
    """
    x, weight = torch.tensor([3.0, 4.0]), torch.tensor([10.0, 1.0])
    root = math.sqrt(12.5)
    expected = torch.tensor([30 / root, 4 / root])
    torch.testing.assert_close(norm(x, weight, 0.0), expected)


@FORMS
def test_eps_is_inside_the_root(norm):
    """A row of mean square eps is divided by sqrt(2 eps); outside, by 2 sqrt(eps)."""
    x = 1e-3 * torch.tensor([1.0, -1.0], dtype=torch.float64)
    expected = torch.tensor([1.0, -1.0], dtype=torch.float64) / math.sqrt(2)
    one = torch.ones(2, dtype=torch.float64)
    torch.testing.assert_close(norm(x, one, 1e-6), expected)


@FORMS
def test_zeros_stay_zero_and_give_a_finite_gradient(norm):
    x, weight = torch.zeros(2, 3, requires_grad=True), torch.ones(3)
    y = norm(x, weight)
    y.sum().backward()
    assert torch.equal(y, torch.zeros(2, 3))
    torch.testing.assert_close(x.grad, torch.full((2, 3), EPS**-0.5))


# ------------------------------------------------------------------- oracles


@FORMS
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 1e6])
def test_equals_torch_with_an_explicit_eps(norm, scale):
    theirs = nn.RMSNorm(48, eps=EPS, dtype=torch.float64)
    nn.init.normal_(theirs.weight)
    x = (scale * torch.randn(2, 5, 48, dtype=torch.float64)).requires_grad_()
    mine = norm(x, theirs.weight)
    torch.testing.assert_close(mine, theirs(x), rtol=1e-12, atol=1e-12)
    up, wanted = torch.randn_like(x), (x, theirs.weight)
    ours = torch.autograd.grad(mine, wanted, up)
    expected = torch.autograd.grad(theirs(x), wanted, up)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


def test_torchs_default_eps_is_another_function_on_small_rows():
    """The pitfall of the page: eps=None is 1.2e-7 in float32, not 1e-5."""
    x = 1e-3 * torch.tensor([1.0, -1.0])
    default, ours = nn.RMSNorm(2)(x), rms_norm(x)
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(default, x / math.sqrt(1e-6 + eps))
    torch.testing.assert_close(ours, x / math.sqrt(1e-6 + 1e-5))
    assert (default / ours).min() > 3


def llama_norm(width, eps):
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    layer = modeling.LlamaRMSNorm(width, eps)
    nn.init.normal_(layer.weight)
    return layer


def test_equals_llama_in_single_precision():
    theirs = llama_norm(64, 1e-6)
    x = 3 * torch.randn(2, 7, 64) + 1
    mine = rms_norm(x, theirs.weight, 1e-6)
    torch.testing.assert_close(mine, theirs(x), rtol=0, atol=1e-6)


@FORMS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounds_once_where_llama_rounds_twice(norm, dtype):
    """Llama multiplies by the weight after the downcast; we before it.

    At most one unit in the last place apart (2 eps, for rounding at a power of two),
    and ours is the value of the exact result, rounded.
    """
    theirs = llama_norm(64, EPS).to(dtype)
    x = (3 * torch.randn(32, 64)).to(dtype)
    mine, llama = norm(x, theirs.weight).double(), theirs(x).double()
    exact = rms_norm(x.double(), theirs.weight.double())
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(mine, llama, rtol=2 * unit, atol=1e-6)
    torch.testing.assert_close(mine, exact, rtol=0.51 * unit, atol=1e-6)
    assert (llama - exact).abs().mean() > 1.1 * (mine - exact).abs().mean()


# ------------------------------------------------------------ half precision


@FORMS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [300.0, 24_600.0])
def test_large_half_precision_rows_keep_their_direction(norm, dtype, size):
    """300² overflows float16: then 1 / sqrt(inf) = 0 silences the row."""
    x = torch.tensor([[size, size, -size, 1.0]], dtype=dtype)
    y = norm(x, torch.ones(4, dtype=dtype))
    assert y.dtype == dtype
    wide = rms_norm(x.double())
    torch.testing.assert_close(y.double(), wide, rtol=1e-2, atol=1e-6)
    assert y.abs().max() > 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_statistics_in_float32_give_a_mean_square_of_one(dtype):
    """In bfloat16 the statistics would be off by a few thousandths a row."""
    x = (5 * torch.randn(256, 512)).to(dtype)
    scale = rms_norm(x).float() / x.float()
    exact = x.double().square().mean(-1).rsqrt()
    off = (scale.double().mean(-1) / exact - 1).abs().max()
    assert off < 5e-4  # a mean of 512 roundings; one bfloat16 rounding: 4e-3


def test_the_fused_layer_is_wide_without_gradients_too():
    layer = fuse(RMSNorm(4).half())
    x = torch.tensor([[3000.0, 3000.0, 0.0, 0.0]]).half()
    with torch.no_grad():
        y = layer(x)
    torch.testing.assert_close(y.float()[0, :2], torch.full((2,), math.sqrt(2.0)),
                               rtol=1e-3, atol=0)  # fmt: skip


# ---------------------------------------------------------------- properties


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), power=st.floats(-3, 6), width=st.integers(1, 40))
def test_forgets_the_scale_and_returns_unit_rms(seed, power, width):
    x = torch.randn(3, width, generator=torch.Generator().manual_seed(seed)).double()
    y = rms_norm(x, eps=0.0)
    torch.testing.assert_close(rms_norm(10**power * x, eps=0.0), y)
    ones = torch.ones(3, dtype=torch.float64)
    torch.testing.assert_close(y.square().mean(-1), ones)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), shift=st.floats(-100, 100))
def test_layer_norm_is_this_after_the_mean_is_taken_off(seed, shift):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 17, dtype=torch.float64, generator=generator) + shift
    centred = x - x.mean(-1, keepdim=True)
    torch.testing.assert_close(rms_norm(centred), layer_norm(x))
    if abs(shift) > 1:  # but by itself it keeps the mean
        assert (rms_norm(x).mean(-1) * shift > 0).all()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_no_gradient_along_the_row(seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(5, 9, dtype=torch.float64, generator=generator).requires_grad_()
    weight = torch.randn(9, dtype=torch.float64, generator=generator)
    up = torch.randn(5, 9, dtype=torch.float64, generator=generator)
    for eps, share in ((0.0, 0.0), (0.5, None)):
        (grad,) = torch.autograd.grad(fast(x, weight, eps), x, up)
        along = (grad * x).sum(-1)
        mean_square = x.square().mean(-1) + eps
        straight = (up * weight * x).sum(-1) / mean_square.sqrt()
        left = eps / mean_square if share is None else 0.0  # eps lets this much by
        torch.testing.assert_close(along, left * straight, rtol=1e-9, atol=1e-9)


def test_rows_do_not_see_each_other():
    x = torch.randn(2, 3, 8)
    changed = x.clone()
    changed[1, 2] *= 7
    moved = (rms_norm(x) - rms_norm(changed + 0)).abs().amax(-1) > 1e-5
    assert not moved.any()  # not even the row itself: only its length changed
    changed[1, 2, 0] += 50
    moved = (rms_norm(x) - rms_norm(changed)).abs().amax(-1) > 1e-5
    assert moved.nonzero().tolist() == [[1, 2]]


# ----------------------------------------------------------------- gradients


@FORMS
@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (2, 1)])
def test_gradients(norm, shape):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(shape[-1], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(norm, (x, weight, 0.1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gradients_follow_the_wide_ones(dtype):
    x = (200 * torch.randn(6, 32)).to(dtype).requires_grad_()
    weight = torch.randn(32).to(dtype).requires_grad_()
    up = (100 * torch.randn(6, 32)).to(dtype)
    ours = torch.autograd.grad(fast(x, weight), (x, weight), up)
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    expected = torch.autograd.grad(rms_norm(*wide), wide, up.double())
    for mine, theirs in zip(ours, expected, strict=True):
        assert mine.dtype == dtype
        atol = 0.01 * theirs.abs().max().item()
        torch.testing.assert_close(mine.double(), theirs, rtol=0.02, atol=atol)


def test_second_derivatives_of_the_clear_form_and_refusal_by_the_fast_one():
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(rms_norm, (x, weight, 0.1))
    with pytest.raises(RuntimeError, match=r"no second derivative; call fuse\(model"):
        torch.autograd.grad(fast(x, weight).sum(), x, create_graph=True)


# -------------------------------------------------------------------- module


@pytest.mark.parametrize("shape", [(6,), (0, 6), (2, 3, 6)])
def test_the_switch_changes_nothing_but_time(shape):
    layer = fused_layer(6)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    results = []
    for fused in (True, False):
        y = fuse(layer, fused)(x)
        results.append((y, *torch.autograd.grad(y.sum(), (x, layer.weight))))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(fuse(layer)(x), results[1][0].detach())


def test_the_fast_form_keeps_one_copy_for_the_way_back():
    """x itself, the weight, and one number a row; the clear form keeps two copies."""

    def kept(norm):
        x, sizes = torch.randn(64, 32, requires_grad=True), {}
        weight = torch.ones(32, requires_grad=True)

        def pack(tensor):
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            norm(x, weight)
        return sum(sizes.values()) // 4

    assert kept(fast) == 64 * 32 + 32 + 64
    assert kept(rms_norm) >= 2 * 64 * 32


def test_the_layer_starts_at_one_and_passes_its_eps_on():
    layer = RMSNorm(5, eps=0.25)
    x = torch.randn(3, 5)
    torch.testing.assert_close(layer(x), rms_norm(x, eps=0.25))
    torch.testing.assert_close(fuse(layer)(x), rms_norm(x, eps=0.25))
    assert [p.shape for p in layer.parameters()] == [(5,)]  # no shift


@pytest.mark.parametrize("fused", [False, True])
def test_a_decoder_ignores_the_length_of_its_stream(fused):
    """The last norm forgets the scale of what the blocks have written."""
    model = fuse(Decoder(DecoderConfig(d_model=16, n_layers=1, n_heads=2)), fused)
    x = torch.randn(2, 3, 16)
    with torch.no_grad():
        logits, scaled = (model.head(model.final_norm(s * x)) for s in (1, 100))
    torch.testing.assert_close(logits, scaled, rtol=1e-3, atol=1e-5)


def test_agrees_with_torch_on_a_large_random_layer():
    layer = fused_layer(384, torch.float32)
    x = torch.randn(64, 384)
    expected = F.rms_norm(x, (384,), layer.weight, EPS)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RMSNorm(0), "d_model must be a positive integer; got 0"),
        (lambda: RMSNorm(4, -1e-5), "eps must be at least 0; got -1e-05"),
        (lambda: rms_norm(torch.ones(2), eps=-1.0), "eps must be at least 0; got -1"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()
