"""One row by either kernel: the same product."""

import pytest
import torch

from groundup.modern.one_row import OneRowLinear, choose_products
from groundup.modern.variants import small_decoder


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(6,), (1, 6), (1, 1, 6), (2, 3, 6), (0, 6)])
@pytest.mark.parametrize("by_vector", [True, False])
def test_equals_torchs_linear(bias, shape, by_vector):
    torch.manual_seed(0)
    ours = OneRowLinear(6, 4, bias=bias).double()
    ours.by_vector = by_vector
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    expected = torch.nn.functional.linear(x, ours.weight, ours.bias)
    torch.testing.assert_close(ours(x), expected)
    wanted = torch.autograd.grad(expected.square().sum(), (x, ours.weight))
    found = torch.autograd.grad(ours(x).square().sum(), (x, ours.weight))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("by_vector", [True, False, None])
def test_a_model_keeps_its_parameters_and_its_logits(by_vector):
    model = small_decoder(qkv_bias=True).eval()
    parameters = list(model.parameters())
    expected = model(torch.tensor([[7]]))
    chosen = choose_products(model, by_vector=by_vector)
    assert by_vector is None or chosen == by_vector
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert model.head.by_vector == chosen
    torch.testing.assert_close(model(torch.tensor([[7]])), expected)
    assert model(torch.tensor([[7, 8]])).shape == (1, 2, 256)


def test_bfloat16_sums_in_float32():
    """By hand: 1 + 512 times 2^-9 is 2; a sum held in bfloat16 would stay at 1."""
    row = OneRowLinear(513, 1, bias=False).bfloat16()
    row.by_vector = True
    with torch.no_grad():
        row.weight.fill_(2**-9)
        row.weight[0, 0] = 1
        assert row(torch.ones(1, 513).bfloat16()).item() == pytest.approx(2, rel=0.01)
