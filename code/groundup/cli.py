"""The `groundup` command: list, fetch, run, train, sample, bench, rebuild.

Here: what each subcommand prints and its exit status (0 done, 1 failed, 2 asked for
something that does not exist, 130 interrupted). Left out: everything that the
commands do; see `pages`, `bench`, `foundations.assets` and, for `train` and `sample`,
`train_cli`.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro

from groundup import bench as benchmarks
from groundup.foundations import assets
from groundup.pages import Page, PageError, book_pages, find_page, run_page

FAILED, USAGE, INTERRUPTED = 1, 2, 130
app = tyro.extras.SubcommandApp()
# What tyro reads from a parameter. An empty hint hides a default that says nothing.
_quiet = partial(tyro.conf.arg, help_behavior_hint="")
Names = Annotated[tyro.conf.Positional[tuple[str, ...]], _quiet(metavar="[NAME ...]")]
PageName = Annotated[tyro.conf.Positional[str], _quiet(metavar="[PAGE]")]
OneName = Annotated[tyro.conf.Positional[str], _quiet(metavar="[NAME]")]
Flag = Annotated[tyro.conf.FlagCreatePairsOff[bool], _quiet()]
All = Annotated[tyro.conf.FlagCreatePairsOff[bool], _quiet(name="all")]
Folder = Annotated[Path, tyro.conf.arg(metavar="FOLDER")]
File = Annotated[Path | None, _quiet(metavar="FILE")]


class UsageError(Exception):
    """The command line asks for something that does not exist."""


@app.command(name="list")
def list_() -> int:
    """Show the pages and the data files, and which of these are in the cache."""
    try:
        pages = [(p.number, _name(p), p.title) for p in book_pages()]
        _table("Pages (`groundup run PAGE`)", ("no.", "page", "title"), pages)
    except PageError as error:  # the package without the book
        print(f"Pages: {error}")
    rows = [
        (
            asset.name,
            "ready" if assets.is_cached(asset.name) else "missing",
            f"{asset.n_bytes / 1e6:.1f}",
            asset.licence,
            asset.about,
        )
        for asset in assets.ASSETS.values()
    ]
    print()
    head = ("name", "state", "MB", "licence", "what")
    _table("Data files (`groundup fetch NAME`)", head, rows)
    print(f"\nThe cache is {assets.cache_folder()} (GROUNDUP_CACHE).")
    return 0


@app.command
def fetch(
    names: Names = (),
    *,
    every: All = False,
    verify: Flag = False,
) -> int:
    """Download data files into the cache; without a name, those that the book needs.

    Args:
        names: Assets, as `groundup list` shows them.
        every: Fetch every asset.
        verify: Compare the SHA-256 of cached files too; fetch damaged ones again.
    """
    if every and names:
        raise UsageError("name the assets or say --all, not both")
    wanted = tuple(assets.ASSETS) if every else names or assets.BOOK_ASSETS
    with _usage():
        before = {name: assets.is_cached(name, digests=verify) for name in wanted}
    failed = 0
    for name in wanted:
        try:
            folder = assets.fetch(name, verify=verify)
        except assets.AssetError as error:
            _complain(str(error))
            failed += 1
            continue
        done = "verified" if verify else "in the cache"
        print(f"{name}: {done if before[name] else 'fetched'}, {folder}")
    return FAILED if failed else 0


@app.command
def run(
    page: PageName = "",
    *,
    every: All = False,
    out: Folder = Path("out"),
) -> int:
    """Run the code of a page as a plain script and save its figures.

    Args:
        page: 1.3, transformer/single_head or single_head: any of these.
        every: Run every page, each in a fresh process.
        out: Figures go to FOLDER/PART/PAGE/, with --all also what the page prints.
    """
    if every == bool(page):
        raise UsageError("say which page to run (see `groundup list`), or --all")
    if every:
        return _run_all(out)
    with _usage():
        found = find_page(page)
    for path in run_page(found, out).figures:
        print(f"figure: {path}")
    return 0


@app.command
def train() -> int:
    """Train a small model, on Shakespeare or on a text of your own."""
    raise AssertionError("main hands this command to train_cli")


@app.command
def sample() -> int:
    """Let a model that `groundup train` left write."""
    raise AssertionError("main hands this command to train_cli")


@app.command
def bench(
    name: OneName = "",
    *,
    quick: Flag = False,
    table: File = None,
) -> int:
    """Measure our code against a reference; without a name, all that there is.

    Args:
        name: One benchmark.
        quick: Take seconds rather than minutes; the ratios then mean little.
        table: Put the results into the table of this Markdown file.
    """
    known = benchmarks.discover()
    if name:
        with _usage():
            chosen = {name: benchmarks.find(name, known)}
    elif known:
        chosen = known
    else:
        print("No benchmark is registered yet; each part of the book adds its own.")
        return 0
    missed, results = 0, {}
    for title, measure in chosen.items():
        results[title] = measure(quick)
        for claim in results[title]:
            print(claim.line(title) + ("" if claim.holds else "  MISSED"), flush=True)
            missed += not claim.holds
    if table is not None:
        from groundup.foundations.environment import describe_machine

        facts = ", ".join(f"{k} {v}" for k, v in describe_machine().items())
        with _usage():
            benchmarks.write_table(table, results, f"Measured on: {facts}.")
    return FAILED if missed and not quick else 0


@app.command
def rebuild(
    name: OneName = "",
    *,
    device: str = "cpu",
    preset: str = "small",
) -> int:
    """Record a result of the book anew; without a name, show what is recorded.

    Args:
        name: One recording.
        device: Where it is computed.
        preset: Which of its configs: small is the one that the book shows.
    """
    from groundup import artifacts  # needs torch, which takes seconds to import
    from groundup.makers import configure, discover

    known = discover()
    if not name:
        rows = [(n, ", ".join(r.presets), _state(n)) for n, r in sorted(known.items())]
        _table("Recordings", ("name", "presets", "where it comes from"), rows)
        return 0
    with _usage():
        recipe = benchmarks.find(name, known, "artifact")
        config = configure(name, recipe, preset, device)
    try:
        print(artifacts.record(name, recipe.make, config).provenance)
    except artifacts.ArtifactError as error:
        _complain(str(error))
        return FAILED
    return 0


def _state(name: str) -> str:
    from groundup import artifacts

    try:
        return artifacts.provenance(name)
    except artifacts.ArtifactError as error:
        return str(error)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status.

    Args:
        arguments: what follows `groundup`; by default, the process's own.
    """
    about = "Read, run and measure the code of LLMs from the Ground Up."
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if arguments and arguments[0] in ("train", "sample"):
            status = _with_torch(*arguments)
        else:
            status = app.cli(prog="groundup", description=about, args=arguments)
        sys.stdout.flush()  # a reader that went away is noticed here
        return status
    except UsageError as error:
        _complain(str(error))
        return USAGE
    except (PageError, assets.AssetError) as error:
        _complain(str(error))
        return FAILED
    except KeyboardInterrupt as stopped:
        _complain(str(stopped) or "interrupted")
        return INTERRUPTED
    except BrokenPipeError:  # `groundup list | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


def _with_torch(command: str, *arguments: str) -> int:
    """Run `train` or `sample`; what they refuse is a wrong use of the command line."""
    from groundup import train_cli

    options = (tyro.conf.CascadeSubcommandArgs,)
    try:
        return tyro.cli(
            getattr(train_cli, command),
            prog=f"groundup {command}",
            args=arguments,
            config=options,
        )
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error


def _run_all(out: Path) -> int:
    """Run each page by a command of its own and say how it went."""
    pages = book_pages()
    failures = []
    started = time.perf_counter()
    for page in pages:
        folder = out / page.part / page.stem
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / "output.txt"
        print(f"{page.number:>4}  {_name(page):<32}", end="", flush=True)
        start = time.perf_counter()
        command = [sys.executable, "-m", "groundup", "run", _name(page)]
        with log.open("w", encoding="utf-8") as file:
            done = subprocess.run(
                [*command, "--out", str(out)],
                stdout=file,
                stderr=subprocess.PIPE,
                text=True,
                check=False,
            )
        took = time.perf_counter() - start
        print(
            f"{'ok' if done.returncode == 0 else 'FAILED':<7}{took:6.1f} s", flush=True
        )
        if done.returncode:
            failures.append(done.stderr.strip().removeprefix("groundup: "))
    for message in failures:
        _complain(message)
    took = time.perf_counter() - started
    print(
        f"{len(pages) - len(failures)} of {len(pages)} pages ran in {took:.0f} s; "
        f"figures and outputs are in {out}"
    )
    return FAILED if failures else 0


def _name(page: Page) -> str:
    return f"{page.part}/{page.stem}"


@contextmanager
def _usage() -> Iterator[None]:
    """Around the look-up of names from the command line, and nothing else."""
    try:
        yield
    except ValueError as error:
        raise UsageError(str(error)) from error


def _complain(message: str) -> None:
    print(f"groundup: {message}", file=sys.stderr)


def _table(title: str, head: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """Print left-aligned columns under their heads."""
    print(title)
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  " + "  ".join(cells).rstrip())
