"""Muon against the SVD, torch's own Muon, and one step by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from groundup.modern.decoder import Decoder, DecoderConfig
from groundup.scaling.muon import (
    COEFFICIENTS,
    MatrixGroup,
    Muon,
    muon_groups,
    orthogonalise,
    update_scale,
)
from groundup.training.adamw import Group
from groundup.training.gpt import GPT, GPTConfig

TINY = DecoderConfig(n_vocab=11, d_model=16, n_layers=2, n_heads=4, tied=False)
# Singular values that the iteration brings close to 1, and how close; see below.
REACHED, LOW, HIGH = 0.01, 0.68, 1.14


def polynomial(s):
    """What one round does to a singular value."""
    a, b, c = COEFFICIENTS
    return a * s + b * s**3 + c * s**5


def with_values(values, n_rows, n_columns, seed=0):
    """A float64 matrix with given singular values, and its polar factor."""
    generator = torch.Generator().manual_seed(seed)
    n = len(values)
    u, v = (
        torch.linalg.qr(torch.randn(k, n, generator=generator, dtype=torch.float64))[0]
        for k in (n_rows, n_columns)
    )
    return u @ torch.diag(torch.as_tensor(values).double()) @ v.T, u @ v.T


def test_singular_values_go_through_the_polynomial():
    """By hand: two values 0.6 and 0.8, of norm 1; directions stay as they are.

    One round: 3.4445 · 0.6 - 4.775 · 0.216 + 2.0315 · 0.07776 = 1.19327, and 0.8 goes
    to 0.97648.
    """
    matrix, _ = with_values([0.8, 0.6], 5, 4)
    once = orthogonalise(matrix, 1, torch.float64)
    expected, _ = with_values([0.97648192, 1.19326944], 5, 4)
    torch.testing.assert_close(once, expected, rtol=0, atol=1e-6)
    assert polynomial(0.6) == pytest.approx(1.19326944, abs=1e-8)


@given(
    shape=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    seed=st.integers(0, 2**31),
    scale=st.sampled_from([1e-4, 1.0, 1e4]),
)
@settings(max_examples=60)
def test_near_the_polar_factor_of_the_svd(shape, seed, scale):
    """Singular values from 1 % of the norm on: within 0.32 of 1, to float64's digits.

    U^T (result) V must be diagonal, with the polynomial's values on it.
    """
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(min(shape), generator=generator).double() * 0.9 + 0.1
    matrix, polar = with_values(values, *shape, seed=seed)
    result = orthogonalise(scale * matrix, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    s = s / s.norm()
    for _ in range(5):
        s = polynomial(s)
    torch.testing.assert_close(result, u @ torch.diag(s) @ vh, rtol=0, atol=1e-9)
    assert torch.linalg.matrix_norm(result - polar, 2) < 1 - LOW + 1e-9


def test_range_of_singular_values_after_five_rounds():
    """The constants of the docstring, on a fine grid of singular values."""
    s = torch.linspace(REACHED, 1, 100_001, dtype=torch.float64)
    for _ in range(5):
        s = polynomial(s)
    assert LOW < s.min() < LOW + 0.01
    assert HIGH - 0.01 < s.max() < HIGH
    small = torch.tensor(1e-3, dtype=torch.float64)
    for _ in range(5):
        small = polynomial(small)
    assert 0.3 < small < 0.5  # nearly 3.4445^5 = 485 times as large


def test_more_rounds_bring_smaller_values_up():
    matrix, polar = with_values([1.0, 1e-4], 8, 6)
    far, near = (
        torch.linalg.matrix_norm(orthogonalise(matrix, n, torch.float64) - polar, 2)
        for n in (5, 9)
    )
    assert far > 0.9
    assert near < 0.33


@pytest.mark.parametrize("shape", [(64, 64), (176, 64), (64, 176), (1, 8), (8, 1)])
def test_stacked_equals_one_by_one_and_torchs_to_the_bit(shape):
    from torch.optim._muon import _zeropower_via_newtonschulz as theirs

    generator = torch.Generator().manual_seed(0)
    stack = torch.randn(6, *shape, generator=generator)
    ours = orthogonalise(stack)
    assert ours.dtype == torch.bfloat16
    for matrix, result in zip(stack, ours, strict=True):
        # bfloat16 keeps 8 bits, 0.4 %; kernels may add up in another order
        expected = theirs(matrix, COEFFICIENTS, 5, 1e-7)
        torch.testing.assert_close(result, expected, rtol=0.05, atol=0.02)
        torch.testing.assert_close(orthogonalise(matrix), result, rtol=0.05, atol=0.02)
    nested = orthogonalise(stack.view(2, 3, *shape), dtype=torch.float32)
    flat = orthogonalise(stack, dtype=torch.float32).view(2, 3, *shape)
    torch.testing.assert_close(nested, flat)


def test_zeros_stay_zeros_and_large_and_small_are_alike():
    assert not orthogonalise(torch.zeros(3, 4, 5)).any()
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    one, huge, small = (
        orthogonalise(k * x, dtype=torch.float32) for k in (1, 1e8, 1e-4)
    )
    torch.testing.assert_close(huge, one, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(small, one, rtol=1e-3, atol=1e-4)


@given(seed=st.integers(0, 2**31))
@settings(max_examples=20)
def test_turning_the_spaces_turns_the_result(seed):
    """f(P X Q) = P f(X) Q for rotations P, Q: no coordinate is special, unlike Adam."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    p, q = (
        torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
        for n in (5, 7)
    )
    result = orthogonalise(p @ x @ q, dtype=torch.float64)
    expected = p @ orthogonalise(x, dtype=torch.float64) @ q
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("rule", "theirs"), [("spectral", "original"), ("rms", "match_rms_adamw")]
)
def test_equals_torchs_muon_over_30_steps(rule, theirs):
    """Weights of size 1, updates of 0.01 to 0.2: equal to the digits of bfloat16."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (16, 16), "b": (44, 16), "c": (16, 44), "d": (16, 16)}
    start = {n: torch.randn(s, generator=generator) for n, s in shapes.items()}
    ours, other = (
        {n: nn.Parameter(t.clone()) for n, t in start.items()} for _ in range(2)
    )
    optimizer = Muon([Group(ours, 0.3)], rule=rule)
    oracle = torch.optim.Muon(
        other.values(), lr=0.1, weight_decay=0.3, momentum=0.95, adjust_lr_fn=theirs
    )
    for step in range(30):
        for name in shapes:
            ours[name].grad = torch.randn(shapes[name], generator=generator)
            other[name].grad = ours[name].grad.clone()
        lr = 0.02 * (1 - step / 30)
        optimizer.step(lr)
        oracle.param_groups[0]["lr"] = lr
        oracle.step()
    for name in shapes:
        moved = (ours[name] - start[name]).abs().max()
        assert moved > 0.1
        torch.testing.assert_close(ours[name], other[name], rtol=0, atol=0.01)
    assert optimizer.n_steps == dict.fromkeys(shapes, 30)


def test_two_steps_by_hand():
    """A 1 × 1 matrix w = 2, momentum 0.9, lr 0.1, decay 0.5; gradients 3 and -1.

    The iteration sends any positive number to o = p⁵(1) = 0.69644 and keeps signs; the
    rule "spectral" has scale 1. Step 1: mean 0.3, ahead 0.1 · 3 + 0.9 · 0.3 = 0.57 > 0,
    w = 2 (1 - 0.05) - 0.1 o. Step 2: mean 0.27 - 0.1 = 0.17, ahead -0.1 + 0.153 > 0:
    the momentum overrules the gradient. Without Nesterov the sign would be the same;
    with a gradient of -3 it is not: mean 0.27 - 0.3 < 0.
    """
    o = 1.0
    for _ in range(5):
        o = polynomial(o)
    w = nn.Parameter(torch.tensor([[2.0]], dtype=torch.float64))
    optimizer = Muon(
        [Group({"w": w}, 0.5)], momentum=0.9, rule="spectral", dtype=torch.float64
    )
    w.grad = torch.full_like(w, 3.0)
    optimizer.step(0.1)
    assert w.item() == pytest.approx(1.9 - 0.1 * o, abs=1e-12)
    w.grad = torch.full_like(w, -1.0)
    optimizer.step(0.1)
    assert w.item() == pytest.approx((1.9 - 0.1 * o) * 0.95 - 0.1 * o, abs=1e-12)
    assert optimizer.state["w"][0].item() == pytest.approx(0.17, abs=1e-12)


def test_nesterov_looks_one_gradient_ahead():
    """Mean 0.15, then a gradient of -1: the mean stays at 0.0425 > 0, but

    ahead = 0.05 · (-1) + 0.95 · mean is below 0 already.
    """
    w = nn.Parameter(torch.zeros(1, 1, dtype=torch.float64))
    optimizer = Muon([Group({"w": w}, 0.0)], dtype=torch.float64)
    w.grad = torch.full_like(w, 1.9)
    optimizer.step(1.0)
    before = w.item()
    w.grad = torch.full_like(w, -1.0)
    optimizer.step(1.0)
    assert optimizer.state["w"][0].item() == pytest.approx(0.95 * 0.095 - 0.05)
    assert optimizer.state["w"][0].item() > 0 > before
    assert w.item() > before


def test_parts_of_a_fused_matrix_are_matrices_of_their_own():
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(12, 4, generator=generator)
    grad = torch.randn(12, 4, generator=generator)
    fused = nn.Parameter(whole.clone())
    q, k, v = (nn.Parameter(t.clone()) for t in whole.split([4, 2, 6]))
    parts = {"q": q, "k": k, "v": v}
    fused.grad = grad.clone()
    for part, piece in zip(parts.values(), grad.split([4, 2, 6]), strict=True):
        part.grad = piece.clone()
    one = Muon([MatrixGroup({"w": fused}, 0.1, {"w": [4, 2, 6]})], dtype=torch.float32)
    many = Muon([Group(parts, 0.1)], dtype=torch.float32)
    for _ in range(3):
        one.step(0.1)
        many.step(0.1)
    torch.testing.assert_close(fused.data, torch.cat([p.data for p in parts.values()]))
    apart = Muon([Group({"w": nn.Parameter(whole.clone())}, 0.1)], dtype=torch.float32)
    apart.groups[0].parameters["w"].grad = grad
    apart.step(0.1)
    assert (apart.groups[0].parameters["w"] - whole).abs().max() > 0.01


def test_a_stack_of_matrices_is_many_matrices():
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(3, 5, 4, generator=generator)
    stack = nn.Parameter(start.clone())
    single = {str(i): nn.Parameter(t.clone()) for i, t in enumerate(start)}
    stack.grad = torch.randn(3, 5, 4, generator=generator)
    for i, p in enumerate(single.values()):
        p.grad = stack.grad[i].clone()
    Muon([Group({"experts": stack}, 0.0)], dtype=torch.float32).step(0.1)
    Muon([Group(single, 0.0)], dtype=torch.float32).step(0.1)
    torch.testing.assert_close(
        stack.data, torch.stack([p.data for p in single.values()])
    )


@pytest.mark.parametrize("shape", [(64, 64), (64, 176), (176, 64), (256, 64)])
def test_rules_of_scale(shape):
    """spectral: the largest singular value times sqrt(rows / columns) or 1; rms: 0.2.

    The entries of an orthogonal R × K matrix have a mean square of 1 / max(R, K); the
    iteration's values, between 0.68 and 1.14, are 0.9 on average.
    """
    update = orthogonalise(
        torch.randn(shape, generator=torch.Generator().manual_seed(0))
    )
    rms = update.float().square().mean().sqrt() * update_scale(*shape, "rms")
    assert rms == pytest.approx(0.2 * 0.9, rel=0.1)
    spectral = update_scale(*shape, "spectral")
    assert spectral == pytest.approx(math.sqrt(max(1, shape[0] / shape[1])))


@pytest.mark.parametrize("n_kv_heads", [None, 2, 1])
def test_groups_of_a_decoder(n_kv_heads):
    model = Decoder(DecoderConfig(**{**vars(TINY), "n_kv_heads": n_kv_heads}))
    (hidden,), (tables, vectors) = muon_groups(model, 0.1)
    kinds = {name.split(".")[-2] for name in hidden.parameters}
    assert kinds == {"qkv", "proj", "gate_up", "down"}
    assert set(tables.parameters) == {"embed.weight", "head.weight"}
    assert all("norm" in name for name in vectors.parameters)
    assert (hidden.weight_decay, tables.weight_decay, vectors.weight_decay) == (
        0.1,
        0.1,
        0.0,
    )
    names = [*hidden.parameters, *tables.parameters, *vectors.parameters]
    assert sorted(names) == sorted(n for n, _ in model.named_parameters())
    kv = 4 * (n_kv_heads or 4)  # heads of size 4
    assert hidden.rows["blocks.1.attention.qkv.weight"] == [16, kv, kv]
    width = model.config.width
    assert hidden.rows["blocks.0.feedforward.gate_up.weight"] == [width, width]
    assert len(hidden.rows) == 4


def test_groups_of_the_gpt_and_of_a_tied_and_frozen_model():
    gpt = GPT(GPTConfig(context=8, d_model=16, n_layers=1, n_heads=2))
    (hidden,), (tables, vectors) = muon_groups(gpt, 0.0)
    kinds = {name.split(".")[0] for name in tables.parameters}
    assert kinds == {"embed", "positions"}
    assert all(p.dim() == 2 for p in hidden.parameters.values())
    assert all(p.dim() == 1 for p in vectors.parameters.values())
    (name,) = (n for n in hidden.parameters if ".qkv." in n)
    assert hidden.rows[name] == [16, 16, 16]
    tied = Decoder(DecoderConfig(**{**vars(TINY), "tied": True}))
    tied.blocks[0].attention.proj.weight.requires_grad_(False)
    (hidden,), (tables, _) = muon_groups(tied, 0.0)
    assert list(tables.parameters) == ["embed.weight"]
    assert "blocks.0.attention.proj.weight" not in hidden.parameters


def test_only_what_has_a_gradient_moves_and_zero_grad_forgets():
    model = Decoder(TINY)
    (hidden,), _ = muon_groups(model, 0.5)
    optimizer = Muon([hidden])
    before = {n: p.detach().clone() for n, p in hidden.parameters.items()}
    chosen = "blocks.0.attention.proj.weight"
    hidden.parameters[chosen].grad = torch.ones(16, 16)
    optimizer.step(0.1)
    for name, p in hidden.parameters.items():
        assert torch.equal(p, before[name]) == (name != chosen)
        assert optimizer.n_steps[name] == (name == chosen)
    optimizer.zero_grad()
    assert all(p.grad is None for p in hidden.parameters.values())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Muon([], momentum=1.0), r"momentum must lie in \[0, 1\); got 1.0"),
        (lambda: Muon([], rule="adam"), "rule must be spectral or rms; got 'adam'"),
        (
            lambda: Muon([Group({"b": nn.Parameter(torch.zeros(3))}, 0.0)]),
            r"b must be a matrix; got shape torch.Size\(\[3\]\)",
        ),
        (
            lambda: Muon(
                [MatrixGroup({"w": nn.Parameter(torch.zeros(3, 2))}, 0.0, {"w": [1]})]
            ),
            r"rows of w must add up to 3; got \[1\]",
        ),
        (lambda: muon_groups(Decoder(TINY), -1.0), "weight_decay must not be negative"),
        (lambda: muon_groups(nn.Linear(2, 2), 0.0), "model must have a matrix whose"),
    ],
)
def test_refusals_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()
