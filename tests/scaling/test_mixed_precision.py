"""Micro-batches against the big batch, the loss scale against torch's GradScaler."""

import math
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from groundup.modern.decoder import Decoder, DecoderConfig
from groundup.scaling.mixed_precision import LossScaler, accumulate, autocast
from groundup.training.loss import IGNORE

TINY = DecoderConfig(n_vocab=11, d_model=8, n_layers=2, n_heads=2, d_ff=12)


def tiny(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return Decoder(TINY).to(dtype)


def batch(rows, columns, ignored, seed):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randint(11, (2, rows, columns), generator=generator)
    hidden = torch.rand(rows, columns, generator=generator) < ignored
    return x, y.masked_fill(hidden, IGNORE)


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters()}


def big_batch(model, x, y):
    """torch's own mean over the counted targets, in one pass."""
    model.zero_grad()
    logits = model(x).flatten(0, 1)
    loss = F.cross_entropy(logits, y.flatten(), ignore_index=IGNORE)
    loss.backward()
    return loss.item(), gradients(model)


def assert_same(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, **tolerance)


@settings(max_examples=25)
@given(
    cuts=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    ignored=st.sampled_from([0.0, 0.3, 0.9]),
    seed=st.integers(0, 2**31),
)
def test_micro_batches_give_the_gradient_of_the_big_batch(cuts, ignored, seed):
    """In float64, to 1e-12: with 90 % ignored some micro-batches count nothing."""
    x, y = batch(sum(cuts), 5, ignored, seed)
    y[0, 0] = 3  # one target counts for certain
    model = tiny()
    loss, expected = big_batch(model, x, y)
    model.zero_grad()
    found = accumulate(model, list(zip(x.split(cuts), y.split(cuts), strict=True)))
    assert found == pytest.approx(loss, abs=1e-12)
    assert_same(gradients(model), expected, rtol=0, atol=1e-12)


def test_sequences_of_unequal_length():
    """A micro-batch of 2 x 7 and one of 3 x 2: 20 losses, each with weight 1/20."""
    pieces = [batch(2, 7, 0.0, 1), batch(3, 2, 0.0, 2)]
    model = tiny()
    sums = [
        F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum")
        for x, y in pieces
    ]
    mean = sum(sums) / 20
    mean.backward()
    expected = gradients(model)
    model.zero_grad()
    assert accumulate(model, pieces) == pytest.approx(mean.item(), abs=1e-12)
    assert_same(gradients(model), expected, rtol=0, atol=1e-12)


class Table(nn.Module):
    """A model without context: row x of a table holds the logits after x."""

    def __init__(self, n_vocab):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(n_vocab, n_vocab, dtype=torch.float64))

    def forward(self, ids):
        return self.logits[ids]


def test_by_hand_one_target_against_three():
    """All logits 0, V = 2: each loss ln 2, each gradient ±1/2 over the 4 tokens.

    Piece 1 counts one target, 0, after token 0; piece 2 counts three, all 1, after
    token 1 (its last is ignored). Row 0: (1/2 - 1, 1/2) / 4 = (-1/8, 1/8). Row 1: three
    times (1/2, 1/2 - 1) / 4 = (3/8, -3/8). The mean of the pieces' means would be
    (-1/4, 1/4) and (1/4, -1/4).
    """
    model = Table(2)
    pieces = [
        (torch.tensor([[0]]), torch.tensor([[0]])),
        (torch.tensor([[1, 1, 1, 1]]), torch.tensor([[1, 1, 1, IGNORE]])),
    ]
    assert accumulate(model, pieces) == pytest.approx(math.log(2), abs=1e-15)
    expected = torch.tensor([[-1.0, 1.0], [3.0, -3.0]], dtype=torch.float64) / 8
    torch.testing.assert_close(model.logits.grad, expected, rtol=0, atol=1e-15)
    accumulate(model, pieces)  # adds
    torch.testing.assert_close(model.logits.grad, 2 * expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_products_in_sixteen_bits_parameters_and_gradients_in_float32(dtype):
    x, y = batch(4, 6, 0.3, 5)
    model = tiny(dtype=torch.float32)
    loss, expected = big_batch(model, x, y)
    model.zero_grad()
    pieces = list(zip(x.split([1, 3]), y.split([1, 3]), strict=True))
    found = accumulate(model, pieces, dtype=dtype)
    assert found != loss
    assert found == pytest.approx(loss, abs=0.02)
    for name, grad in gradients(model).items():
        assert grad.dtype == torch.float32
        assert (grad - expected[name]).norm() < 0.05 * expected[name].norm() + 1e-4


def test_quiet_is_entered_for_all_but_the_last():
    events = []

    @contextmanager
    def quiet():
        events.append("in")
        yield
        events.append("out")

    class Noted(Table):
        def forward(self, ids):
            events.append(f"forward {len(ids)}")
            return super().forward(ids)

    model = Noted(11)
    model.logits.register_hook(lambda grad: events.append("backward"))
    pieces = [batch(rows, 2, 0.0, rows) for rows in (3, 2, 1)]
    accumulate(model, pieces, quiet=quiet)
    quietly = [["in", f"forward {rows}", "backward", "out"] for rows in (3, 2)]
    assert events == [*quietly[0], *quietly[1], "forward 1", "backward"]


def test_wrapped_in_ddp(tmp_path):
    """One process: DDP's hooks and buckets run, and the gradients are the same."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        x, y = batch(6, 4, 0.4, 9)
        model = tiny()
        loss, expected = big_batch(model, x, y)
        model.zero_grad()
        wrapped = nn.parallel.DistributedDataParallel(model)
        n = int((y != IGNORE).sum())
        pieces = list(zip(x.split([1, 2, 3]), y.split([1, 2, 3]), strict=True))
        found = accumulate(wrapped, pieces, n_tokens=n, quiet=wrapped.no_sync)
        assert found == pytest.approx(loss, abs=1e-12)
        assert_same(gradients(model), expected, rtol=0, atol=1e-12)
    finally:
        torch.distributed.destroy_process_group()


def test_two_halves_of_a_batch_average_to_the_whole():
    """What DDP does with two processes: the mean of the two gradients.

    The second half counts no target; with the common n_tokens that is no error.
    """
    x, y = batch(4, 5, 0.2, 3)
    y[2:] = IGNORE
    model = tiny()
    loss, expected = big_batch(model, x, y)
    n, losses, grads = int((y != IGNORE).sum()) / 2, [], []
    for part in (slice(0, 2), slice(2, 4)):
        model.zero_grad()
        losses.append(accumulate(model, [(x[part], y[part])], n_tokens=n))
        grads.append(gradients(model))
    assert sum(losses) / 2 == pytest.approx(loss, abs=1e-12)
    mean = {name: (grads[0][name] + grads[1][name]) / 2 for name in expected}
    assert_same(mean, expected, rtol=0, atol=1e-12)


def test_accumulate_refuses_what_has_no_mean():
    model, (x, y) = Table(11), batch(2, 3, 0.0, 0)
    nothing = torch.full_like(y, IGNORE)
    with pytest.raises(ValueError, match="at least one; got none"):
        accumulate(model, [])
    with pytest.raises(ValueError, match="a target that counts"):
        accumulate(model, [(x, nothing), (x, nothing)])
    with pytest.raises(ValueError, match="n_tokens must be positive; got 0"):
        accumulate(model, [(x, y)], n_tokens=0)
    with pytest.raises(ValueError, match=r"dtype must be one of .*; got 'float8'"):
        accumulate(model, [(x, y)], dtype="float8")
    assert model.logits.grad is None


def test_scale_multiplies_the_gradients_and_not_the_loss():
    pieces = [batch(2, 3, 0.0, 0), batch(1, 5, 0.2, 1)]
    model = tiny()
    loss = accumulate(model, pieces)
    expected = {name: 64 * grad for name, grad in gradients(model).items()}
    model.zero_grad()
    assert accumulate(model, pieces, scale=64.0) == loss
    assert_same(gradients(model), expected, rtol=0, atol=0)


def test_autocast_leaves_parameters_and_float32_alone():
    layer, x = nn.Linear(3, 2), torch.randn(4, 3)
    for dtype, expected in (
        ("float32", torch.float32),
        ("bfloat16", torch.bfloat16),
        ("float16", torch.float16),
    ):
        with autocast(dtype):
            y = layer(x)
        assert y.dtype == expected
        assert layer.weight.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16), autocast("float32"):
        assert layer(x).dtype == torch.float32  # switches an outer one off


@settings(max_examples=40)
@given(
    finite=st.lists(st.sampled_from([True, True, True, False]), max_size=25),
    interval=st.integers(1, 4),
    start=st.sampled_from([1.0, 2.0**16, 2.0**126]),
)
def test_scales_and_updates_are_those_of_gradscaler(finite, interval, start):
    """Gradients of 3 w / 8, and now and then an infinite one; scale, w, all steps."""
    theirs = torch.amp.GradScaler("cpu", init_scale=start, growth_interval=interval)
    ours = LossScaler(start, interval)
    w_theirs, w_ours = (nn.Parameter(torch.tensor([0.5, -2.0])) for _ in range(2))
    sgd = torch.optim.SGD([w_theirs], lr=0.1)
    for good in finite:
        factor = 1.0 if good else math.inf
        sgd.zero_grad()
        # The last factor keeps the scaled gradient inside float32.
        tiny_gradient = 0.375 * 2.0**-20
        theirs.scale((w_theirs.square() * (tiny_gradient * factor)).sum()).backward()
        theirs.step(sgd)
        theirs.update()
        w_ours.grad = None
        loss = (w_ours.square() * (tiny_gradient * factor)).sum()
        (loss * ours.scale).backward()
        if ours.unscale([w_ours]):
            with torch.no_grad():
                w_ours -= 0.1 * w_ours.grad
        assert ours.scale == theirs.get_scale()
        assert torch.equal(w_ours, w_theirs)


def test_scale_by_hand():
    """Interval 2 from 8: good, good -> 16; bad -> 8; good, bad -> 4; two good -> 8."""
    scaler, w = LossScaler(8.0, 2), nn.Parameter(torch.zeros(2))
    seen = []
    for largest in (1.0, 1.0, math.inf, 1.0, math.nan, 1.0, 1.0):
        w.grad = torch.tensor([1.0, largest]) * scaler.scale
        seen.append((scaler.unscale([w]), scaler.scale))
        assert w.grad[0] == 1.0
    assert [ok for ok, _ in seen] == [True, True, False, True, False, True, True]
    assert [scale for _, scale in seen] == [8, 16, 8, 8, 4, 4, 8]


def test_scaler_passes_over_parameters_without_a_gradient():
    scaler = LossScaler(4.0, 1)
    assert scaler.unscale([nn.Parameter(torch.zeros(2))])
    assert scaler.scale == 8.0


@pytest.mark.parametrize("fields", [(0.0, 10), (-1.0, 10), (2.0, 0)])
def test_scaler_refuses(fields):
    with pytest.raises(ValueError, match="must be positive"):
        LossScaler(*fields)
