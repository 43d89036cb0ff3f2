"""The command line: what it prints, where, and the exit status.

Most tests call `main` in this process. Where a process of its own matters (fresh
pages, Ctrl-C, `python -m groundup`), a copy of the package beside a three-page book
is run.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from groundup import artifacts, bench, cli, makers
from groundup.bench import Claim
from groundup.foundations import assets
from groundup.foundations.assets import Asset
from groundup.foundations.wheels import CarrierError, Wheel
from groundup.pages import PageError, book_pages

PAGE = """\
---
file_format: mystnb
kernelspec:
  name: python3
  display_name: Python 3
---

# {number} {title}

```{{code-cell}} ipython3
{code}
```
"""
DRAWS = """\
import matplotlib.pyplot as plt
plt.plot([0, 1])
plt.show()
print("drawn")"""


class Drawer(Wheel):
    """A carrier without pip: writes one file, or fails as told."""

    def obtain(self, folder: Path, scratch: Path) -> None:
        if self.root == "fails":
            raise CarrierError("the drawer is locked")
        (folder / "file.txt").write_text("text")


def toy(name: str, root: str = "works") -> Asset:
    carrier = Drawer(f"{name}==1", "0" * 64, 4, root, ("file.txt",))
    return Asset(name, f"about {name}", "ours", "https://example.org", 1, 4, carrier)


@pytest.fixture
def drawer(tmp_path, monkeypatch):
    """Three assets that need no network, two of them the book's."""
    monkeypatch.setenv("GROUNDUP_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("GROUNDUP_OFFLINE", raising=False)
    registry = {name: toy(name) for name in ("text", "script", "weights")}
    monkeypatch.setattr(assets, "ASSETS", registry)
    monkeypatch.setattr(assets, "BOOK_ASSETS", ("text", "script"))
    return registry


@pytest.fixture
def book(tmp_path):
    """A clone of the repository with three pages, the second of which fails."""
    root = tmp_path / "a clone"
    source = Path(assets.__file__).parents[1]
    inside = [path.name for path in source.glob("*.py")]
    inside += [f"foundations/{name}.py" for name in ("__init__", "assets", "wheels")]
    for name in inside:
        target = root / "code" / "groundup" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / name, target)
    pages = {
        "1-first/draws": ("1.1", "A page that draws", DRAWS),
        "1-first/fails": ("1.2", "A page that fails", "x = 1\nx / 0"),
        "2-second/draws_too": ("2.1", "Another that draws", DRAWS),
    }
    for name, (number, title, code) in pages.items():
        path = root / "book" / f"{name}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(PAGE.format(number=number, title=title, code=code))
    return root


def command(root: Path, *arguments: str) -> dict:
    """What subprocess needs to run groundup in the copy at root."""
    environment = os.environ | {
        "PYTHONPATH": str(root / "code"),
        "GROUNDUP_CACHE": str(root / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    line = [sys.executable, "-m", "groundup", *arguments]
    return {"args": line, "env": environment, "cwd": root, "text": True}


# list


def test_list_shows_pages_and_assets_with_their_state(
    drawer, book, monkeypatch, capsys
):
    monkeypatch.setattr(cli, "book_pages", lambda: book_pages(book))
    assets.fetch("script")
    assert cli.main(["list"]) == 0
    shown = re.sub(" +", " ", capsys.readouterr().out)
    assert " 1.2 1-first/fails A page that fails\n" in shown
    assert shown.index("1.1 ") < shown.index("1.2 ") < shown.index("2.1 ")
    assert " script ready 0.0 ours about script\n" in shown
    assert " weights missing 0.0 ours about weights\n" in shown
    assert str(assets.cache_folder()) in shown


def test_list_without_the_book_still_lists_the_assets(drawer, monkeypatch, capsys):
    def nowhere():
        raise PageError("no book/ folder here")

    monkeypatch.setattr(cli, "book_pages", nowhere)
    assert cli.main(["list"]) == 0
    shown = capsys.readouterr().out
    assert "no book/ folder here" in shown
    assert "weights" in shown


# fetch


@pytest.mark.parametrize(
    ("arguments", "fetched"),
    [
        ([], {"text", "script"}),
        (["weights"], {"weights"}),
        (["weights", "text"], {"weights", "text"}),
        (["--all"], {"text", "script", "weights"}),
    ],
)
def test_fetch_takes_names_all_or_what_the_book_needs(
    drawer, capsys, arguments, fetched
):
    assert cli.main(["fetch", *arguments]) == 0
    assert {name for name in drawer if assets.is_cached(name)} == fetched
    shown = capsys.readouterr()
    assert shown.out.count(": fetched, ") == len(fetched)
    assert shown.err == ""
    assert cli.main(["fetch", *arguments]) == 0
    assert capsys.readouterr().out.count(": in the cache, ") == len(fetched)


def test_fetch_verify_reads_the_digests_and_repairs(drawer, capsys):
    assert cli.main(["fetch"]) == 0
    path = assets.fetch("text") / "file.txt"
    path.write_text("tent")  # the same size
    capsys.readouterr()
    assert cli.main(["fetch"]) == 0
    assert path.read_text() == "tent"
    assert "text: in the cache" in capsys.readouterr().out
    assert cli.main(["fetch", "--verify"]) == 0
    assert path.read_text() == "text"
    shown = capsys.readouterr().out
    assert "text: fetched" in shown
    assert "script: verified" in shown


def test_fetch_goes_on_after_a_failure_and_says_so(drawer, capsys):
    drawer["script"] = toy("script", "fails")
    assert cli.main(["fetch", "text", "script", "weights"]) == 1
    assert assets.is_cached("weights")
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert "'script'" in shown
    assert "the drawer is locked" in shown
    assert "`groundup fetch script`" in shown


def test_fetch_offline_is_a_failure_with_the_remedy(drawer, monkeypatch, capsys):
    monkeypatch.setenv("GROUNDUP_OFFLINE", "1")
    assert cli.main(["fetch", "text"]) == 1
    assert "GROUNDUP_OFFLINE" in capsys.readouterr().err


# What cannot be done: one line, status 2, no traceback


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fetch", "text", "hamlet"], r"no asset 'hamlet'; .*script, text, weights"),
        (["fetch", "--all", "text"], "not both"),
        (["run"], r"`groundup list`\), or --all"),
        (["run", "1.1", "--all"], "--all"),
        (["run", "drows"], r"no page is called 'drows'; did you mean .*draws"),
        (["bench", "nothing"], "no benchmark is called 'nothing'; .*none yet"),
    ],
)
def test_wrong_requests(drawer, book, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(bench, "discover", lambda: {})
    pages = book_pages(book)
    find = cli.find_page
    monkeypatch.setattr(cli, "find_page", lambda name: find(name, pages))
    assert cli.main(arguments) == 2
    shown = capsys.readouterr()
    assert re.fullmatch(f"groundup: .*{message}.*\n", shown.err)
    assert shown.out == ""
    assert not assets.is_cached("text")


@pytest.mark.parametrize("arguments", [[], ["frobnicate"], ["run", "--frobnicate"]])
def test_a_line_that_cannot_be_parsed(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert "groundup" in capsys.readouterr().err


@pytest.mark.parametrize(
    "subcommand", ["list", "fetch", "run", "train", "sample", "bench", "rebuild"]
)
def test_help_explains_each_subcommand(capsys, subcommand):
    with pytest.raises(SystemExit) as stopped:
        cli.main([subcommand, "--help"])
    assert stopped.value.code == 0
    assert f"usage: groundup {subcommand}" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert f"• {subcommand}" in capsys.readouterr().out


def test_an_error_of_ours_is_not_taken_for_one_of_the_reader(monkeypatch):
    """A ValueError inside a benchmark is a bug: it keeps its traceback."""

    def broken(quick):
        raise ValueError("a bug")

    monkeypatch.setattr(bench, "discover", lambda: {"broken": broken})
    with pytest.raises(ValueError, match="a bug"):
        cli.main(["bench", "broken"])


# bench


def test_an_empty_registry_says_so(monkeypatch, capsys):
    monkeypatch.setattr(bench, "discover", lambda: {})
    assert cli.main(["bench"]) == 0
    assert "No benchmark is registered yet" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "status", "lines"),
    [
        (["bench"], 1, ["a x ratio 2 target 1", "b y ratio 1 target 2  MISSED"]),
        (["bench", "a"], 0, ["a x ratio 2 target 1"]),
        (["bench", "b"], 1, ["b y ratio 1 target 2  MISSED"]),
        (["bench", "b", "--quick"], 0, ["b y ratio 1 target 2  MISSED"]),
    ],
)
def test_bench_prints_a_line_a_claim(monkeypatch, capsys, arguments, status, lines):
    quick = []
    registry = {
        "a": lambda q: [quick.append(q), Claim("x", 2.0, 1.0)][1:],
        "b": lambda q: [quick.append(q), Claim("y", 1.0, 2.0)][1:],
    }
    monkeypatch.setattr(bench, "discover", lambda: registry)
    assert cli.main(arguments) == status
    assert capsys.readouterr().out.splitlines() == lines
    assert set(quick) == {"--quick" in arguments}


# rebuild


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A registered maker, whose recordings go to a folder of their own."""

    def make(config):
        return {"steps": config["steps"]}

    make.__module__ = "groundup.bench"
    found = makers.Recipe(make, {"small": {"steps": 1}, "full": {"steps": 9}})
    monkeypatch.setattr(makers, "discover", lambda: {"one": found})
    for name in ("record", "provenance"):
        call = partial(getattr(artifacts, name), folder=tmp_path / "artifacts")
        monkeypatch.setattr(artifacts, name, call)
    return tmp_path / "artifacts"


def test_rebuild_records_a_preset_and_says_where(recipe, capsys):
    assert cli.main(["rebuild"]) == 0
    assert "no recording 'one'" in capsys.readouterr().out
    for arguments, steps in (([], 1), (["--preset", "full"], 9)):
        assert cli.main(["rebuild", "one", *arguments]) == 0
        shown = capsys.readouterr().out
        assert re.fullmatch(r"Recorded on \d+ CPU cores? .*\n", shown)
        assert artifacts.load("one", recipe)["steps"] == steps
    assert cli.main(["rebuild"]) == 0
    listed = capsys.readouterr().out
    assert re.search(r"one +small, full +Recorded on ", listed)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["two"], 2, "no artifact is called 'two'; there are: one"),
        (["one", "--preset", "huge"], 2, "no preset 'huge'"),
        (["one", "--device", "cuda"], 2, "on the CPU alone"),
    ],
)
def test_rebuild_refuses_what_there_is_not(recipe, capsys, arguments, status, message):
    assert cli.main(["rebuild", *arguments]) == status
    assert re.fullmatch(f"groundup: .*{message}.*\n", capsys.readouterr().err)
    assert not recipe.exists()


def test_rebuild_without_the_book_is_a_failure(recipe, monkeypatch, capsys):
    nowhere = recipe / "nowhere" / "artifacts"
    record = partial(artifacts.record.func, folder=nowhere)
    monkeypatch.setattr(artifacts, "record", record)
    assert cli.main(["rebuild", "one"]) == 1
    assert "record in a clone" in capsys.readouterr().err


# run, in processes of its own


def test_run_executes_a_page_and_saves_its_figure(book):
    done = subprocess.run(
        **command(book, "run", "1.1"), capture_output=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    figures = list((book / "out" / "1-first" / "draws").glob("*.svg"))
    assert len(figures) == 1
    assert figures[0].read_text().startswith("<?xml")
    assert "drawn\n" in done.stdout
    assert f"figure: {figures[0].relative_to(book)}\n" in done.stdout


def test_run_all_goes_on_after_a_failure_and_sums_up(book):
    line = command(book, "run", "--all", "--out", "gallery")
    done = subprocess.run(**line, capture_output=True, check=False)
    assert done.returncode == 1
    assert re.search(r"1\.1  1-first/draws +ok ", done.stdout)
    assert re.search(r"1\.2  1-first/fails +FAILED ", done.stdout)
    assert re.search(r"2\.1  2-second/draws_too +ok ", done.stdout)
    assert "2 of 3 pages ran" in done.stdout
    where = "book/1-first/fails.md:12: ZeroDivisionError: division by zero"
    assert done.stderr.startswith(f"groundup: {where}")
    for page in ("1-first/draws", "2-second/draws_too"):
        folder = book / "gallery" / page
        assert len(list(folder.glob("*.svg"))) == 1
        assert (folder / "output.txt").read_text().startswith("drawn\n")


def test_ctrl_c_is_one_line_and_status_130(book):
    page = book / "book" / "1-first" / "draws.md"
    code = "print('running', flush=True)\nimport time\ntime.sleep(60)"
    page.write_text(PAGE.format(number="1.1", title="A page that waits", code=code))
    line = command(book, "run", "draws")
    process = subprocess.Popen(
        **line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout.readline() == "running\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (130, "", "groundup: interrupted\n")


def test_a_reader_that_goes_away_is_no_traceback(book):
    line = command(book, "list")
    process = subprocess.Popen(**line, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(timeout=30) == 1
