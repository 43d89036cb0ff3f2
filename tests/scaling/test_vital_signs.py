"""Vital signs against torch's own norms, hand examples and models made to misbehave."""

import math
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from groundup.modern.decoder import Decoder, DecoderConfig
from groundup.modern.variants import small_decoder
from groundup.scaling.vital_signs import (
    PARTS,
    Throughput,
    copy_of,
    future_influence,
    gradient_lengths,
    lengths,
    part_of,
    peak_memory,
    reads,
    silent_share,
    update_ratios,
)
from groundup.transformer.block import BlockConfig, MiniFormer
from groundup.transformer.feedforward import FeedForward

TINY = DecoderConfig(d_model=16, n_layers=2, n_heads=2, tied=False)


def with_gradients(seed=0):
    torch.manual_seed(seed)
    model = Decoder(TINY)
    ids = torch.randint(256, (2, 9))
    F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
    return model


# Lengths


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("embed.weight", "embed"),
        ("blocks.0.attention_norm.weight", "norm"),
        ("blocks.11.attention.qkv.weight", "attention"),
        ("blocks.0.feedforward_norm.weight", "norm"),
        ("blocks.1.feedforward.down.weight", "feedforward"),
        ("final_norm.weight", "norm"),
        ("head.weight", "head"),
        ("value.bias", "other"),
    ],
)
def test_part_of_a_name(name, part):
    assert part_of(name) == part


def test_every_parameter_of_the_decoder_has_a_part():
    names = [name for name, _ in small_decoder(qkv_bias=True).named_parameters()]
    assert {part_of(name) for name in names} == set(PARTS)


def test_lengths_by_hand():
    """3 and 4 together have length 5; with a 12 of another group beside them."""
    tensors = {"a.x": torch.tensor([3.0]), "a.y": torch.tensor([[4.0]])}
    tensors["b.x"] = torch.tensor([0.0, -12.0])
    assert lengths(tensors) == {"all": 13.0}
    assert lengths(tensors, lambda name: name[0]) == {"a": 5.0, "b": 12.0}
    assert lengths({}) == {}


@settings(max_examples=40)
@given(
    sizes=st.lists(st.integers(0, 5), min_size=1, max_size=6), seed=st.integers(0, 99)
)
def test_lengths_are_those_of_the_tensors_end_to_end(sizes, seed):
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"{i % 3}.{i}": torch.randn(n, 2, generator=generator, dtype=torch.float64)
        for i, n in enumerate(sizes)
    }
    found = lengths(tensors, lambda name: name[0])
    for group, length in found.items():
        own = [t.flatten() for name, t in tensors.items() if name[0] == group]
        assert length == pytest.approx(torch.cat(own).norm().item(), rel=1e-6)
    assert math.hypot(*found.values()) == pytest.approx(lengths(tensors)["all"])


def test_half_precision_does_not_overflow():
    """Ten entries of 30,000: the square of one is beyond float16, the length is not."""
    found = lengths({"x": torch.full((10,), 3e4, dtype=torch.float16)})
    assert found["all"] == pytest.approx(3e4 * 10**0.5, rel=1e-6)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_lengths_that_are_not_finite_are_told(bad):
    found = lengths({"a": torch.tensor([bad, 1.0]), "b": torch.ones(4)}, str)
    assert repr(found) == repr({"a": abs(bad), "b": 2.0})


def test_gradient_lengths_equal_torchs_total_norm():
    model = with_gradients()
    grads = [p.grad for p in model.parameters()]
    total = torch.nn.utils.get_total_norm(grads).item()
    assert gradient_lengths(model)["all"] == pytest.approx(total, rel=1e-6)
    parts = gradient_lengths(model, part_of)
    assert set(parts) == set(PARTS)
    head = model.head.weight.grad.norm().item()
    assert parts["head"] == pytest.approx(head, rel=1e-6)
    assert math.hypot(*parts.values()) == pytest.approx(total, rel=1e-6)


def test_a_part_without_a_gradient_has_length_0():
    model = with_gradients()
    model.head.weight.grad = None
    model.embed.weight.requires_grad_(False)
    parts = gradient_lengths(model, part_of)
    assert parts["head"] == 0.0
    assert "embed" not in parts


# Updates


def test_update_ratio_of_gradient_descent():
    """w <- w - lr g moves by lr |g|: the ratio is lr |g| / |w|, group by group."""
    model, lr = with_gradients(), 0.03
    expected = {
        part: lr * length / lengths(copy_of(model), part_of)[part]
        for part, length in gradient_lengths(model, part_of).items()
    }
    before = copy_of(model)
    torch.optim.SGD(model.parameters(), lr=lr).step()
    found = update_ratios(before, dict(model.named_parameters()), part_of)
    assert found == pytest.approx(expected, rel=1e-4)


def test_update_ratios_by_hand_and_at_zero():
    before = {"a": torch.tensor([3.0, 4.0]), "b": torch.zeros(2), "c": torch.zeros(1)}
    after = {"a": torch.tensor([3.0, 4.5]), "b": torch.ones(2), "c": torch.zeros(1)}
    found = update_ratios(before, after, str)
    assert found["a"] == pytest.approx(0.1)
    assert found["b"] == math.inf
    assert math.isnan(found["c"])


def test_a_copy_does_not_follow_the_model():
    model = nn.Linear(2, 1)
    before = copy_of(model)
    with torch.no_grad():
        model.weight += 1
    change = model.weight - before["weight"]
    torch.testing.assert_close(change.detach(), torch.ones(1, 2))


# Units


def test_silent_share_by_hand():
    """Of four units, the second and the third are never above 0."""
    hidden = torch.tensor([[1.0, 0.0, -2.0, 0.0], [0.0, 0.0, -1.0, 3.0]])
    assert silent_share(hidden) == 0.5
    assert silent_share(hidden[None].expand(5, 2, 4)) == 0.5
    assert silent_share(hidden[0]) == 0.75  # one token: it counts more as silent
    assert silent_share(torch.tensor([[math.nan, -math.inf]])) == 0.5


def test_silent_units_are_those_without_a_gradient():
    torch.manual_seed(1)
    layer = FeedForward(6, 40, activation="relu")
    with torch.no_grad():
        layer.up.bias.sub_(torch.linspace(0, 3, 40))
    x = torch.randn(8, 5, 6)
    with reads(layer, "down") as hidden:
        layer(x).square().sum().backward()
    torch.testing.assert_close(hidden["down"], layer.hidden(x).detach())
    still = (layer.up.weight.grad == 0).all(1)
    assert 0 < silent_share(hidden["down"]) < 1
    assert silent_share(hidden["down"]) == pytest.approx(still.float().mean().item())


def test_reads_keeps_the_last_call_and_leaves_no_hook():
    model = small_decoder()
    first, last = torch.zeros(1, 3).long(), torch.ones(2, 5).long()
    with reads(model, "down") as hidden:
        model(first)
        model(last)
    assert set(hidden) == {"blocks.0.feedforward.down", "blocks.1.feedforward.down"}
    kept = {name: tensor.clone() for name, tensor in hidden.items()}
    assert all(tensor.shape[:2] == (2, 5) for tensor in kept.values())
    model(first)
    assert all(torch.equal(hidden[name], tensor) for name, tensor in kept.items())
    with pytest.raises(RuntimeError, match="stop"), reads(model, "down"):
        raise RuntimeError("stop")
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_reads_refuses_a_name_that_no_module_has():
    with (
        pytest.raises(ValueError, match="no submodule called 'dwn'"),
        reads(small_decoder(), "dwn"),
    ):
        pass


# The future


class Peeks(nn.Module):
    """Logits that depend on the token `ahead` places later, and on nothing else."""

    def __init__(self, ahead):
        super().__init__()
        self.ahead = ahead

    def forward(self, ids):
        return F.one_hot(ids.roll(-self.ahead, 1), 5).float()


@pytest.mark.parametrize(("ahead", "found"), [(0, 0.0), (-1, 0.0), (1, 1.0), (3, 1.0)])
def test_future_influence_by_hand(ahead, found):
    """The first half of six tokens; looking back from position 0 meets the end."""
    ids = torch.tensor([[0, 1, 2, 3, 4, 4]])
    if ahead < 0:  # roll wraps around; cut the row so that only the past is left

        class Before(nn.Module):
            def forward(self, ids):
                return F.one_hot(F.pad(ids, (1, 0))[:, :-1], 5).float()

        assert future_influence(Before(), ids) == found
    else:
        assert future_influence(Peeks(ahead), ids) == found


@pytest.mark.parametrize("window", [None, 3])
def test_a_causal_decoder_has_no_future(window):
    torch.manual_seed(0)
    model = small_decoder(window=window).eval()
    assert future_influence(model, torch.randint(256, (3, 12))) < 1e-5


def test_a_causal_stack_of_part_1_has_no_future():
    model = MiniFormer(BlockConfig(d_model=16, n_heads=2), 2).eval()
    assert future_influence(model, torch.randint(256, (2, 7))) < 1e-5


def test_one_token_has_no_future_to_change():
    with pytest.raises(ValueError, match="at least 2 tokens a row; got 1"):
        future_influence(small_decoder(), torch.zeros(2, 1).long())


# Speed and memory


def test_throughput_by_hand():
    """Reads of the clock: 0, 1, 3, 3.5 s. Over 2 updates: 200 tokens in 2.5 s."""
    times = iter([0.0, 1.0, 3.0, 3.5])
    speed = Throughput(over=2, clock=lambda: next(times))
    assert speed.update(50) == 50.0
    assert speed.update(100) == 50.0
    assert speed.update(100) == 80.0


def test_a_clock_that_stands_still():
    assert Throughput(clock=lambda: 7.0).update(10) == math.inf
    with pytest.raises(ValueError, match="over must be at least 1; got 0"):
        Throughput(over=0)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_the_kernels_and_grows():
    before = peak_memory()
    n = before // 4 + 10_000_000  # more than was ever held, in float32
    block = torch.ones(n)
    assert peak_memory() >= before + 10_000_000
    status = Path("/proc/self/status").read_text()
    line = next(x for x in status.splitlines() if x.startswith("VmHWM"))
    assert peak_memory() == pytest.approx(1024 * int(line.split()[1]), rel=0.02)
    del block
