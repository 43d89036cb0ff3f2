"""AdamW and clipping against torch's own and against one step by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from groundup.training.adamw import (
    AdamW,
    Group,
    adamw_update,
    clip_gradients,
    decay_groups,
)
from groundup.training.gpt import GPT, GPTConfig

SMALL = GPTConfig(context=8, d_model=16, n_layers=2, n_heads=2)


def one(value):
    return torch.tensor([value], dtype=torch.float64)


def test_first_step_by_hand():
    """w = 2, g = 0.5, lr 0.1, decay 0.1, betas (0.9, 0.99), no eps.

    Decay: 2 (1 - 0.01) = 1.98. Averages: 0.05 and 0.0025, corrected by 0.1 and 0.01
    to 0.5 and 0.25, so the step is 0.1 · 0.5 / √0.25 = 0.1: w = 1.88.
    """
    w, mean, square = one(2.0), one(0.0), one(0.0)
    adamw_update(w, one(0.5), mean, square, step=1, lr=0.1, eps=0.0, weight_decay=0.1)
    torch.testing.assert_close(mean, one(0.05))
    torch.testing.assert_close(square, one(0.0025))
    torch.testing.assert_close(w, one(1.88), rtol=0, atol=1e-15)


def test_second_step_by_hand():
    """Then g = -0.5: averages 0.045 - 0.05 = -0.005 and 0.002475 + 0.0025 = 0.004975.

    Corrected by 1 - 0.81 = 0.19 and 1 - 0.9801 = 0.0199: -0.026316 and 0.25.
    """
    w, mean, square = one(1.88), one(0.05), one(0.0025)
    adamw_update(w, one(-0.5), mean, square, step=2, lr=0.1, eps=0.0)
    torch.testing.assert_close(w, one(1.88 + 0.1 * (0.005 / 0.19) / 0.5))


@given(
    grad=st.floats(1e-3, 1e3),
    sign=st.sampled_from([-1.0, 1.0]),
    lr=st.floats(1e-5, 1.0),
)
@settings(max_examples=50, deadline=None)
def test_first_step_has_the_size_of_the_rate(grad, sign, lr):
    """Whatever the gradient's size; eps is below it by a factor of 1e5 or more."""
    w = one(0.0)
    adamw_update(w, one(sign * grad), one(0.0), one(0.0), step=1, lr=lr)
    torch.testing.assert_close(w, one(-sign * lr), rtol=2e-5, atol=0)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)]
)
@pytest.mark.parametrize("eps", [1e-8, 1e-2])
def test_equals_torch_for_200_steps_with_decay_groups(dtype, tolerance, eps):
    torch.manual_seed(0)
    ours = GPT(SMALL).to(dtype)
    theirs = GPT(SMALL).to(dtype)
    theirs.load_state_dict(ours.state_dict())
    optimizer = AdamW(decay_groups(ours, 0.3), eps=eps)
    decay = [p for p in theirs.parameters() if p.dim() >= 2]
    rest = [p for p in theirs.parameters() if p.dim() < 2]
    oracle = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.3}, {"params": rest, "weight_decay": 0.0}],
        betas=(0.9, 0.99),
        eps=eps,
    )
    generator = torch.Generator().manual_seed(1)
    for step in range(200):
        lr = 1e-2 * (step + 1) / 200
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            a.grad = torch.randn(a.shape, generator=generator).to(dtype)
            a.grad *= 10.0 ** (step % 5 - 2)  # over four orders of magnitude
            b.grad = a.grad.clone()
        optimizer.step(lr)
        for group in oracle.param_groups:
            group["lr"] = lr
        oracle.step()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(
            a, b, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_a_parameter_without_gradient_waits_as_in_torch():
    """It gets its gradient from step 5 on, and then its first correction."""
    ours, theirs = nn.Parameter(one(1.0)), nn.Parameter(one(1.0))
    optimizer = AdamW([Group({"w": ours}, 0.1)])
    oracle = torch.optim.AdamW([theirs], betas=(0.9, 0.99), lr=0.1, weight_decay=0.1)
    for step in range(8):
        if step >= 5:
            ours.grad, theirs.grad = one(0.3), one(0.3)
        optimizer.step(0.1)
        oracle.step()
        torch.testing.assert_close(ours.data, theirs.data)
    assert optimizer.n_steps == {"w": 3}


def test_decay_does_not_pass_through_the_averages():
    """Decoupled: with a gradient of 0 the weight shrinks by lr · decay, no more."""
    w, mean, square = one(2.0), one(0.0), one(0.0)
    adamw_update(w, one(0.0), mean, square, step=1, lr=0.1, weight_decay=0.5)
    torch.testing.assert_close(w, one(1.9))
    assert mean.item() == square.item() == 0.0


def test_matrices_decay_and_nothing_else():
    groups = decay_groups(GPT(SMALL), 0.1)
    assert [g.weight_decay for g in groups] == [0.1, 0.0]
    kinds = [{name.split(".")[-2:][0] for name in g.parameters} for g in groups]
    assert kinds[0] == {"embed", "positions", "qkv", "proj", "up", "down"}
    assert kinds[1] == {"norm", "final_norm", "qkv", "proj", "up", "down"}
    assert all("norm" not in name for name in groups[0].parameters)
    assert all(not name.endswith("bias") for name in groups[0].parameters)
    names = [*groups[0].parameters, *groups[1].parameters]
    assert sorted(names) == sorted(n for n, _ in GPT(SMALL).named_parameters())


def test_groups_leave_out_what_is_frozen_and_list_tied_once():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    model[0].bias.requires_grad_(False)
    matrices, rest = decay_groups(model, 0.1)
    assert list(matrices.parameters) == ["0.weight"]
    assert list(rest.parameters) == ["1.bias"]


@given(
    most=st.floats(1e-3, 1e3),
    scale=st.sampled_from([1e-6, 1e-2, 1.0, 1e2, 1e6]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_clipping_equals_torchs(most, scale, seed):
    """torch divides by the norm + 1e-6, we by the norm: equal up to 1e-6 / most."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, 4), (5,), (1, 1, 2)]
    ours = [nn.Parameter(torch.zeros(s, dtype=torch.float64)) for s in shapes]
    theirs = [nn.Parameter(torch.zeros(s, dtype=torch.float64)) for s in shapes]
    for a, b in zip(ours, theirs, strict=True):
        a.grad = scale * torch.randn(a.shape, generator=generator, dtype=torch.float64)
        b.grad = a.grad.clone()
    norm = clip_gradients([*ours, nn.Parameter(torch.zeros(2))], most)
    expected = torch.nn.utils.clip_grad_norm_(theirs, most)
    assert norm == pytest.approx(expected.item(), rel=1e-12)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1.1e-6 / most, atol=1e-12)
    after = math.hypot(*(p.grad.norm().item() for p in ours))
    assert after == pytest.approx(min(norm, most), rel=1e-12)


def test_clipping_by_hand():
    """A gradient (3, 4) over two parameters has norm 5; clipped to 1: (0.6, 0.8)."""
    a, b = nn.Parameter(one(0.0)), nn.Parameter(one(0.0))
    a.grad, b.grad = one(3.0), one(4.0)
    assert clip_gradients([a, b], 1.0) == 5.0
    torch.testing.assert_close(
        torch.cat((a.grad, b.grad)), torch.tensor([0.6, 0.8]).double()
    )
    assert clip_gradients([a, b], 1.5) == pytest.approx(1.0)
    torch.testing.assert_close(a.grad, one(0.6))  # below the limit: left alone


def test_clipping_without_gradients_and_with_a_bad_one():
    parameter = nn.Parameter(one(0.0))
    assert clip_gradients([parameter], 1.0) == 0.0
    parameter.grad = one(math.nan)
    assert math.isnan(clip_gradients([parameter], 1.0))


def test_zero_grad_forgets():
    model = GPT(SMALL)
    model(torch.zeros(1, 3, dtype=torch.long)).sum().backward()
    AdamW(decay_groups(model, 0.0)).zero_grad()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: decay_groups(nn.Linear(2, 2), -0.1), "weight_decay must not be neg"),
        (lambda: clip_gradients([], 0.0), "most must be positive; got 0.0"),
        (lambda: clip_gradients([], math.nan), "most must be positive; got nan"),
        (lambda: AdamW([], betas=(0.9, 1.0)), r"betas must lie in \[0, 1\); got"),
        (lambda: AdamW([], eps=-1.0), "eps must not be negative; got -1.0"),
    ],
)
def test_refusals_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()
