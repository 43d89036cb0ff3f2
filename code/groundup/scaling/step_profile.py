"""Where the time of a training step goes, and what speeding up a part is worth.

Here: calls timed in turn, a profile summed by kind of operation, and Amdahl's law. Left
out: the profiler (torch's), the table of its longest entries (page 0.2).

Source: Amdahl (1967). Page: book/4-scaling/mixed_precision.md.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping

KINDS = {
    "products": {"mm", "addmm", "bmm", "baddbmm", "addbmm", "linear", "mkldnn_linear"},
    "attention": {
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention_for_cpu_backward",
        "_softmax",
        "_softmax_backward_data",
    },
    "copies and casts": {"copy_", "_to_copy", "to", "clone", "contiguous", "cat"},
}
REST = "entry by entry"


def seconds_in_turn(
    calls: Mapping[str, Callable[[], object]],
    *,
    repeats: int = 5,
    timer: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Return the median time of each call, in seconds.

    The calls take turns, so that a disturbance of the machine hits them all. A first
    round is not counted.

    Raises:
        ValueError: repeats is not positive.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1; got {repeats}")
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats + 1):
        for name, call in calls.items():
            start = timer()
            call()
            seconds[name].append(timer() - start)
    return {name: statistics.median(found[1:]) for name, found in seconds.items()}


def time_by_kind(events: Iterable) -> dict[str, float]:
    """Sum the time of operations by kind, in milliseconds.

    Args:
        events: the `key_averages()` of a torch profiler. The time of an operation
            leaves out what it calls, so that the kinds sum to the whole.

    Returns:
        A time for each of KINDS, and for the REST: norms, activations, sums, and all
        that is not a name in KINDS.
    """
    found = dict.fromkeys([*KINDS, REST], 0.0)
    for event in events:
        name = event.key.removeprefix("aten::")
        kind = next((k for k, names in KINDS.items() if name in names), REST)
        found[kind] += event.self_cpu_time_total / 1000
    return found


def amdahl(share: float, ratio: float) -> float:
    """Return how many times faster the whole is if a share of it is ratio times faster.

    1 / (1 - share + share / ratio); at most 1 / (1 - share), whatever the ratio.

    Raises:
        ValueError: share is outside [0, 1], or ratio is not positive.

    Example: half of the time made 4 times faster is worth 1 / (1/2 + 1/8) = 1.6.
    """
    if not 0 <= share <= 1 or not ratio > 0:
        raise ValueError(
            f"share must lie in [0, 1] and ratio above 0; got {share} and {ratio}"
        )
    return 1 / (1 - share + share / ratio)
