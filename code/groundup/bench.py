"""The benchmarks of the book: a registry, and how a result is stated.

Here: `register`, which a part's module `bench` uses, `discover`, which imports those
modules, and the table of results in a Markdown file. Left out: the
benchmarks themselves. Each lives beside what it measures, runs our code and the
reference interleaved on the same inputs, and returns its claims; `groundup bench`
prints them.
"""

import importlib
import importlib.util
import pkgutil
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar


@dataclass(frozen=True)
class Claim:
    """A measured ratio and what it was to reach, both without unit.

    A ratio is stated so that more is better: speed over the reference's speed.
    """

    what: str
    ratio: float
    target: float
    detail: str = ""  # the figures behind the ratio, for the table of the README

    @property
    def holds(self) -> bool:
        """Whether the target is reached (a NaN reaches nothing)."""
        return self.ratio >= self.target

    def line(self, name: str) -> str:
        """Return the line that `groundup bench` prints for it."""
        return f"{name} {self.what} ratio {self.ratio:.3g} target {self.target:.3g}"


# Takes `quick` (a smoke run of seconds, whose ratios mean little).
Benchmark = Callable[[bool], list[Claim]]
T = TypeVar("T")
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
    import_from_parts("bench", package)
    return BENCHMARKS


def import_from_parts(module: str, package: str = "groundup") -> None:
    """Import the module of that name from every part that has one."""
    folders = importlib.import_module(package).__path__
    for part in pkgutil.iter_modules(folders, f"{package}."):
        if part.ispkg and importlib.util.find_spec(f"{part.name}.{module}"):
            importlib.import_module(f"{part.name}.{module}")


def find(name: str, registry: Mapping[str, T], what: str = "benchmark") -> T:
    """Return the entry of a registry called name; what says what its entries are.

    Raises:
        ValueError: there is none; says which there are.
    """
    if name not in registry:
        known = ", ".join(sorted(registry)) or "none yet"
        raise ValueError(f"no {what} is called {name!r}; there are: {known}")
    return registry[name]


START, END = "<!-- bench -->", "<!-- /bench -->"  # around the table in a Markdown file
HEAD = "| benchmark | claim | ratio | target | |\n|---|---|--:|--:|---|"


def write_table(
    path: Path, results: Mapping[str, Sequence[Claim]], machine: str
) -> None:
    """Put results into the table of a Markdown file; rows of other benchmarks stay.

    Args:
        path: a file with the lines `<!-- bench -->` and `<!-- /bench -->`.
        results: the claims of each benchmark that was run.
        machine: what they were measured on, written below the table.

    Raises:
        ValueError: the file lacks the two lines.
    """
    text = path.read_text(encoding="utf-8")
    found = re.search(f"{START}\n(.*?){END}", text, re.S)
    if found is None:
        raise ValueError(f"{path} must hold the lines {START} and {END}")
    rows = [line for line in found[1].splitlines() if line.startswith("| `")]
    rows = [row for row in rows if row.split("`")[1] not in results]
    for name, claims in results.items():
        for claim in claims:
            ratio = f"{claim.ratio:.3g}" if claim.holds else f"**{claim.ratio:.3g}**"
            cells = (
                f"`{name}`",
                claim.what,
                ratio,
                f"{claim.target:.3g}",
                claim.detail,
            )
            rows.append("| " + " | ".join(cells) + " |")
    table = "\n".join([HEAD, *sorted(rows, key=lambda row: row.split("`")[1])])
    block = f"{START}\n{table}\n\nBold: target missed. {machine}\n{END}"
    whole = text[: found.start()] + block + text[found.end() :]
    path.write_text(whole, encoding="utf-8")
