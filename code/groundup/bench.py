"""The benchmarks of the book: a registry, and how a result is stated.

Here: `register`, which a part's module `bench` uses, and `discover`, which imports
those modules. Left out: the benchmarks themselves. Each lives beside what it
measures, runs our code and the reference interleaved on the same inputs, and
returns its claims; `groundup bench` prints them.
"""

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Claim:
    """A measured ratio and what it was to reach, both without unit.

    A ratio is stated so that more is better: speed over the reference's speed.
    """

    what: str
    ratio: float
    target: float

    @property
    def holds(self) -> bool:
        """Whether the target is reached (a NaN reaches nothing)."""
        return self.ratio >= self.target

    def line(self, name: str) -> str:
        """Return the line that `groundup bench` prints for it."""
        return f"{name} {self.what} ratio {self.ratio:.3g} target {self.target:.3g}"


# Takes `quick` (a smoke run of seconds, whose ratios mean little).
Benchmark = Callable[[bool], list[Claim]]
BENCHMARKS: dict[str, Benchmark] = {}


def register(name: str) -> Callable[[Benchmark], Benchmark]:
    """Enter the decorated function into the registry under name.

    Raises:
        ValueError: another function has that name already.

    Example: `@register("attention")` above `def attention(quick): ...`.
    """

    def enter(benchmark: Benchmark) -> Benchmark:
        if name in BENCHMARKS:
            raise ValueError(f"benchmark {name!r} is registered twice")
        BENCHMARKS[name] = benchmark
        return benchmark

    return enter


def discover(package: str = "groundup") -> dict[str, Benchmark]:
    """Import the module `bench` of every part that has one; return the registry."""
    folders = importlib.import_module(package).__path__
    for part in pkgutil.iter_modules(folders, f"{package}."):
        if part.ispkg and importlib.util.find_spec(f"{part.name}.bench"):
            importlib.import_module(f"{part.name}.bench")
    return BENCHMARKS


def find(name: str, benchmarks: dict[str, Benchmark]) -> Benchmark:
    """Return the benchmark called name.

    Raises:
        ValueError: there is none; says which there are.
    """
    if name not in benchmarks:
        known = ", ".join(sorted(benchmarks)) or "none yet"
        raise ValueError(f"no benchmark is called {name!r}; there are: {known}")
    return benchmarks[name]
