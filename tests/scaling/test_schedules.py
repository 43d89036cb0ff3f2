"""Schedules against transformers' two, Part 2's loop, and tables by hand."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import get_cosine_schedule_with_warmup, get_wsd_schedule

from groundup.scaling.schedules import SHAPES, Schedule, range_test, share
from groundup.training.loop import TrainConfig, learning_rate

schedules = st.builds(
    lambda steps, warm, shape, decay, end: Schedule(
        steps, round(warm * steps), shape, decay, end
    ),
    st.integers(1, 400),
    st.floats(0, 1),
    st.sampled_from(SHAPES),
    st.floats(0.01, 1),
    st.floats(0, 1),
)


def table(schedule, n_more=0):
    return [share(step, schedule) for step in range(schedule.steps + n_more)]


def factor(make, step, **options):
    """What transformers multiplies the rate of update `step` (from 0) by."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    scheduler = make(torch.optim.SGD([parameter], lr=1.0), **options)
    return scheduler.lr_lambdas[0](step)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # rises by 1/4 up to update 3, stays
        (Schedule(6, 4, "constant"), [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]),
        # from update 2 down to 0.1 at update 5: thirds of 0.9
        (Schedule(6, 2, "linear", end=0.1), [0.5, 1, 1, 0.7, 0.4, 0.1, 0.1, 0.1]),
        # half a cosine over four updates: cos 0, 60, 120, 180 degrees
        (Schedule(5, 1, "cosine"), [1, 1, 0.75, 0.25, 0, 0, 0]),
        # decay 0.4 of 10 updates: the last four go down by quarters
        (
            Schedule(10, 2, "wsd", decay=0.4),
            [0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0, 0, 0],
        ),
        (Schedule(1, 0, "cosine"), [1, 1, 1]),  # no room to fall
        (Schedule(1, 1, "linear"), [1, 1, 1]),
        (Schedule(2, 0, "linear"), [1, 0, 0, 0]),
        (Schedule(3, 2, "cosine"), [0.5, 1, 1, 1]),  # room for the highest rate only
    ],
)
def test_tables_by_hand(schedule, expected):
    n_more = len(expected) - schedule.steps
    assert table(schedule, n_more) == pytest.approx(expected, abs=1e-15)


@given(schedule=schedules)
@settings(max_examples=200)
def test_promises(schedule):
    """First update, rise, fall, the last update to the bit, and constant after it."""
    rates = table(schedule, n_more=3)
    warm, last = schedule.warmup, schedule.steps - 1
    if warm:
        assert rates[0] == 1 / warm
        assert rates[warm - 1] == 1
    assert all(a < b for a, b in pairwise(rates[:warm]))
    after = rates[max(0, warm - 1) :]
    assert all(a >= b for a, b in pairwise(after))
    falls = schedule.shape != "constant" and warm < last
    assert rates[last] == (schedule.end if falls else 1)
    assert rates[last:] == [rates[last]] * 4
    assert share(10**9, schedule) == rates[last]
    assert all(0 <= rate <= 1 for rate in rates)
    if warm <= last:
        assert max(rates) == 1


@given(
    steps=st.integers(1, 500),
    warm=st.floats(0, 1),
    end=st.floats(0, 1),
    step=st.integers(0, 600),
)
def test_cosine_is_that_of_part_2(steps, warm, end, step):
    warmup = round(warm * steps)
    config = TrainConfig(steps=steps, warmup=warmup, lr=3e-3, lr_end=end)
    ours = 3e-3 * share(step, Schedule(steps, warmup, "cosine", end=end))
    assert ours == pytest.approx(learning_rate(step, config), rel=1e-12, abs=1e-18)


@given(steps=st.integers(3, 200), warm=st.floats(0, 1), step=st.integers(0, 250))
@settings(max_examples=60)
def test_cosine_equals_transformers_after_two_shifts(steps, warm, step):
    """They begin the warm-up at 0 and end one update later.

    So their run of steps - 1 updates has our rates: an update later in the warm-up,
    at the same place after it. Past the end theirs would rise again.
    """
    warmup = min(round(warm * steps), steps - 2)
    ours = share(step, Schedule(steps, warmup, "cosine"))
    there = min(step, steps - 1) + (step < warmup)
    theirs = factor(
        get_cosine_schedule_with_warmup,
        there,
        num_warmup_steps=warmup,
        num_training_steps=steps - 1,
    )
    assert ours == pytest.approx(theirs, abs=1e-12)


@given(
    steps=st.integers(3, 200),
    warm=st.floats(0, 1),
    decay=st.floats(0.01, 1),
    end=st.floats(0, 1),
    step=st.integers(0, 250),
)
@settings(max_examples=60)
def test_wsd_equals_transformers_after_two_shifts(steps, warm, decay, end, step):
    """Their warm-up starts at `min_lr_ratio`, which is compared only when it is 0."""
    schedule = Schedule(steps, min(round(warm * steps), steps - 2), "wsd", decay, end)
    assume(step >= schedule.warmup or end == 0)
    theirs = factor(
        get_wsd_schedule,
        step + (step < schedule.warmup),
        num_warmup_steps=schedule.warmup,
        num_decay_steps=schedule.n_falling,
        num_training_steps=steps - 1,
        decay_type="linear",
        min_lr_ratio=end,
    )
    assert share(step, schedule) == pytest.approx(theirs, abs=1e-12)


def test_transformers_first_update_changes_nothing():
    """The convention that differs: 0 there, 1/warmup here."""
    options = {"num_warmup_steps": 10, "num_training_steps": 100}
    assert factor(get_cosine_schedule_with_warmup, 0, **options) == 0.0
    assert share(0, Schedule(100, 10)) == 0.1
    assert factor(get_cosine_schedule_with_warmup, 99, **options) > 0
    assert share(99, Schedule(100, 10)) == 0


def test_wsd_with_the_longest_decay_is_linear():
    linear = Schedule(50, 5, "linear", end=0.1)
    assert table(replace(linear, shape="wsd", decay=1.0)) == table(linear)


def test_wsd_stays_the_same_when_the_run_is_made_longer():
    """Until the shorter one falls: what makes a checkpoint reusable."""
    short, long = Schedule(100, 10, "wsd"), Schedule(1000, 10, "wsd")
    assert table(short)[:80] == table(long)[:80]
    assert table(Schedule(100, 10))[20] != table(Schedule(1000, 10))[20]


class Bowl:
    """Gradient descent on w²: every rate below 1 lowers it, every other does not."""

    def __init__(self):
        self.w, self.rates = 1.0, []

    def update(self, rate):
        loss = self.w**2
        self.w -= rate * 2 * self.w
        self.rates.append(rate)
        return loss


def test_range_test_stops_beyond_the_highest_rate_that_works():
    bowl = Bowl()
    rates, losses = range_test(bowl.update, 1e-3, 1e3, 61, give_up=4.0)
    assert rates == bowl.rates
    assert losses[0] == 1.0
    assert rates == pytest.approx([10 ** (i / 10 - 3) for i in range(len(rates))])
    lowest = min(range(len(losses)), key=losses.__getitem__)
    assert rates[lowest - 1] < 1 <= rates[lowest]  # the loss before this update
    assert losses[-1] > 4 * min(losses) >= losses[-2]


def test_range_test_ends_at_high_and_at_nan():
    rates, losses = range_test(lambda rate: 1.0, 0.1, 10.0, 3)
    assert rates == pytest.approx([0.1, 1.0, 10.0])
    assert losses == [1.0] * 3
    rates, losses = range_test(_nan_later(), 1.0, 8.0, 4)
    assert len(rates) == 2
    assert math.isnan(losses[-1])


def _nan_later():
    values = iter([2.0, math.nan, 1.0])
    return lambda rate: next(values)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Schedule(0), "steps must be at least 1; got 0"),
        (lambda: Schedule(5, 6), r"warmup must lie in 0\.\.steps=5; got 6"),
        (lambda: Schedule(5, -1), r"warmup must lie in 0\.\.steps=5; got -1"),
        (lambda: Schedule(5, shape="step"), "shape must be one of .*; got 'step'"),
        (lambda: Schedule(5, decay=0.0), r"decay must lie in \(0, 1\]; got 0.0"),
        (lambda: Schedule(5, end=1.5), r"end must lie in \[0, 1\]; got 1.5"),
        (lambda: Schedule(5, end=math.nan), r"end must lie in \[0, 1\]; got nan"),
        (lambda: share(-1, Schedule(5)), "step must not be negative; got -1"),
        (lambda: range_test(float, 1.0, 1.0, 5), "low and high must rise"),
        (lambda: range_test(float, 0.0, 1.0, 5), "low and high must rise"),
        (lambda: range_test(float, 0.1, 1.0, 1), "n_updates must be at least 2"),
        (lambda: range_test(float, 0.1, 1.0, 5, give_up=1.0), "give_up must be above"),
    ],
)
def test_refusals_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()
