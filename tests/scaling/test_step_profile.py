"""Sums of a profile, and Amdahl's law against a schedule of two parts."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from groundup.scaling.step_profile import (
    KINDS,
    REST,
    amdahl,
    seconds_in_turn,
    time_by_kind,
)


def event(key, us):
    return SimpleNamespace(key=key, self_cpu_time_total=us)


def test_calls_take_turns_and_the_first_round_does_not_count():
    """A clock that the calls move: a by 9, 1, 2, 30 seconds, b always by 4."""
    now, order, steps = [0.0], [], iter([9.0, 1.0, 2.0, 30.0])

    def a():
        order.append("a")
        now[0] += next(steps)

    def b():
        order.append("b")
        now[0] += 4.0

    found = seconds_in_turn({"a": a, "b": b}, repeats=3, timer=lambda: now[0])
    assert found == {"a": 2.0, "b": 4.0}
    assert order == ["a", "b"] * 4
    with pytest.raises(ValueError, match="repeats must be at least 1; got 0"):
        seconds_in_turn({}, repeats=0)


def test_kinds_by_hand():
    events = [
        event("aten::mm", 3000.0),
        event("aten::bmm", 500.0),
        event("aten::copy_", 250.0),
        event("aten::mul", 125.0),
        event("aten::_softmax", 1000.0),
        event("MmBackward0", 75.0),
    ]
    assert time_by_kind(events) == {
        "products": 3.5,
        "attention": 1.0,
        "copies and casts": 0.25,
        REST: 0.2,
    }
    assert time_by_kind([]) == dict.fromkeys([*KINDS, REST], 0.0)


def test_kinds_of_a_real_profile_sum_to_the_whole():
    a = torch.randn(64, 64, requires_grad=True)
    with torch.profiler.profile() as profile:
        ((a @ a).relu() + a).softmax(-1).sum().backward()
    events = profile.key_averages()
    found = time_by_kind(events)
    whole = sum(e.self_cpu_time_total for e in events) / 1000
    assert sum(found.values()) == pytest.approx(whole)
    assert all(found[kind] > 0 for kind in ("products", "attention", REST))


@settings(max_examples=50)
@given(share=st.floats(0, 1), ratio=st.floats(0.01, 1000))
def test_amdahl_is_the_time_of_two_parts(share, ratio):
    seconds = 10.0
    slow, fast = seconds * (1 - share), seconds * share / ratio
    assert amdahl(share, ratio) == pytest.approx(seconds / (slow + fast))


def test_amdahl_by_hand_and_at_its_edges():
    assert amdahl(0.5, 4.0) == pytest.approx(1.6)  # 1/2 + 1/8 = 5/8
    assert amdahl(0.0, 1000.0) == 1.0
    assert amdahl(1.0, 6.5) == pytest.approx(6.5)
    assert amdahl(0.5, 1e12) == pytest.approx(2.0)


@pytest.mark.parametrize(("share", "ratio"), [(-0.1, 2.0), (1.1, 2.0), (0.5, 0.0)])
def test_amdahl_refuses_what_is_no_share_or_no_ratio(share, ratio):
    with pytest.raises(ValueError, match=r"share must lie in \[0, 1\]"):
        amdahl(share, ratio)
