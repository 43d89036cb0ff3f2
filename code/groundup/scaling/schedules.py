"""Learning-rate schedules: what share of the highest rate an update gets.

Here: linear warm-up followed by one of four shapes, as exact tables, and the range
test that looks for the highest rate. Left out: restarts, and schedules that watch the
loss.

Source: Loshchilov and Hutter (2017), eq. 5 (cosine); Hu et al. (2024), section 4
(warm-up, stable, decay); Smith (2017), section 3.3 (range test). Page:
book/4-scaling/schedules.md.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

SHAPES = ("constant", "linear", "cosine", "wsd")


@dataclass(frozen=True)
class Schedule:
    """The course of the learning rate over a run.

    Raises:
        ValueError: a field is out of its range.
    """

    steps: int  # updates of the run
    warmup: int = 0  # updates until the highest rate; the first has 1 / warmup of it
    shape: str = "cosine"  # one of SHAPES, after the warm-up
    decay: float = 0.2  # wsd: share of the steps that the rate falls for
    end: float = 0.0  # rate of the last update, as a share of the highest

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1; got {self.steps}")
        if not 0 <= self.warmup <= self.steps:
            raise ValueError(
                f"warmup must lie in 0..steps={self.steps}; got {self.warmup}"
            )
        if self.shape not in SHAPES:
            raise ValueError(f"shape must be one of {SHAPES}; got {self.shape!r}")
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay must lie in (0, 1]; got {self.decay}")
        if not 0 <= self.end <= 1:
            raise ValueError(f"end must lie in [0, 1]; got {self.end}")

    @property
    def n_falling(self) -> int:
        """Updates from the last with the highest rate to the last of the run."""
        after_warmup = max(1, self.steps - 1 - self.warmup)
        if self.shape == "wsd":
            return min(max(1, round(self.decay * self.steps)), after_warmup)
        return after_warmup


def share(step: int, schedule: Schedule) -> float:
    """Return the rate of update number step, counted from 0, over the highest rate.

    It rises in a straight line; the first update has 1 / warmup and the update before
    number `warmup` has 1. It then stays (constant), falls at once (linear, cosine) or
    stays and falls in a straight line over the last share `decay` of the steps (wsd).
    The last update has `end`, and so has any after it. Where a run ends with its
    warm-up, or one update later, there is no room to fall and the last has 1.

    Other libraries begin the warm-up at 0, so that their first update changes nothing,
    and reach the end one update after the last.

    Raises:
        ValueError: step is negative.

    Example: four updates, linear, no warm-up: 1, 2/3, 1/3, 0.
    """
    if step < 0:
        raise ValueError(f"step must not be negative; got {step}")
    last = schedule.steps - 1
    step = min(step, last)
    if step < schedule.warmup:
        return (step + 1) / schedule.warmup
    if schedule.shape == "constant" or schedule.warmup >= last:
        return 1.0
    done = max(0.0, 1 - (last - step) / schedule.n_falling)
    left = (
        (1 + math.cos(math.pi * done)) / 2 if schedule.shape == "cosine" else 1 - done
    )
    return schedule.end + (1 - schedule.end) * left


def range_test(
    update: Callable[[float], float],
    low: float,
    high: float,
    n_updates: int,
    *,
    give_up: float = 2.0,
) -> tuple[list[float], list[float]]:
    """Train with a rate that grows by a constant factor, and watch where it breaks.

    Args:
        update: does one update at the rate it is given; returns the loss before it.
        low, high: first and last rate.
        n_updates: rates tried, both ends included.
        give_up: stop once the loss exceeds the lowest so far by this factor, or is
            not finite.

    Returns:
        The rates that were tried, and the loss that each update started from.

    Raises:
        ValueError: the rates do not rise from above 0, there are fewer than two, or
            give_up is not above 1.
    """
    if not 0 < low < high:
        raise ValueError(f"low and high must rise from above 0; got {low}, {high}")
    if n_updates < 2:
        raise ValueError(f"n_updates must be at least 2; got {n_updates}")
    if not give_up > 1:
        raise ValueError(f"give_up must be above 1; got {give_up}")
    rates: list[float] = []
    losses: list[float] = []
    for i in range(n_updates):
        rates.append(low * (high / low) ** (i / (n_updates - 1)))
        losses.append(update(rates[-1]))
        if not losses[-1] <= give_up * min(losses):  # NaN too
            break
    return rates, losses
