"""The build of the book: what runs, what does not, and what must fail.

Each test builds a copy of the book with two planted pages, through the same command
that a reader uses.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from groundup.foundations.assets import is_cached

ROOT = Path(__file__).resolve().parents[2]

FRONT = """\
---
file_format: mystnb
kernelspec:
  name: python3
  display_name: Python 3
---

# {title}

```{{code-cell}} ipython3
import os
from pathlib import Path
with open(os.environ["RUN_LOG"], "a") as log:
    print("{title}", file=log)
```
"""
ONE = """
```{code-cell} ipython3
from groundup.foundations import planted
print("the value is", planted.value())
```
"""
TWO = """
```{code-cell} ipython3
print("page two says", 6 * 7)
```
"""
SHOWS_RECORDING = """
```{code-cell} ipython3
from groundup import artifacts
from groundup.foundations.planted_maker import make
planted = artifacts.get("planted", make, {"start": 1})
print("recorded:", planted["value"])
print(planted.provenance)
```
"""
# The lines below stand at line 18 of a page: after FRONT and a fence.
RAISES = """
```{code-cell} ipython3
1 / 0
```
"""
FAILS_WHEN_SHOWN = """
```{code-cell} ipython3
class Shy:
    def _repr_html_(self):
        raise RuntimeError("do not look at me")
Shy()
```
"""
NEEDS_ASSET = """
```{code-cell} ipython3
from groundup.foundations.assets import fetch
fetch("shakespeare")
```
"""
FIRST_LINE = FRONT.count("\n") + 3


class Book:
    """A copy of the book with two pages of our own."""

    def __init__(self, root: Path) -> None:
        self.root, self.log = root, root / "runs.log"
        ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
        for name in ("code", "book/_ext", "book/_static"):
            shutil.copytree(ROOT / name, root / name, ignore=ignore)
        for name in ("_config.yml", "pyproject.toml", "book/references.bib"):
            shutil.copy(ROOT / name, root / name)
        shutil.copy(ROOT / "book/conftest.py", root / "book/conftest.py")
        (root / "_toc.yml").write_text(
            "format: jb-book\nroot: book/intro\nchapters:\n"
            "- file: book/0-foundations/one\n- file: book/0-foundations/two\n"
            "- file: book/references\n"
        )
        (root / "book/intro.md").write_text("# Planted book\n")
        (root / "book/references.md").write_text(
            "# References\n\n```{bibliography}\n```\n"
        )
        (root / "book/0-foundations").mkdir()
        self.module(
            "planted",
            "from groundup.foundations import planted_base\n\n\n"
            "def value():\n    return planted_base.VALUE\n",
        )
        self.module("planted_base", "VALUE = 1\n")
        self.page("one", ONE)
        self.page("two", TWO)

    def module(self, name: str, source: str) -> None:
        (self.root / f"code/groundup/foundations/{name}.py").write_text(source)

    def page(self, name: str, cells: str) -> None:
        path = self.root / f"book/0-foundations/{name}.md"
        path.write_text(FRONT.format(title=name) + cells)

    def runs(self) -> list[str]:
        """Titles of the pages that were executed since the last call."""
        titles = self.log.read_text().split() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return sorted(titles)

    def html(self, name: str) -> str:
        return (self.root / f"_build/html/book/0-foundations/{name}.html").read_text()

    def build(self, **environment: str) -> subprocess.CompletedProcess:
        script = Path(sys.executable).with_name("jupyter-book")
        return self._call(str(script), "build", ".", **environment)

    def nbmake(self) -> subprocess.CompletedProcess:
        return self._call(
            *("-m", "pytest"), "--nbmake", "book", "-n", "2", "-p", "no:cacheprovider"
        )

    def _call(self, *command: str, **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, *command],
            cwd=self.root,
            env=os.environ
            | {"PYTHONPATH": str(self.root / "code"), "RUN_LOG": str(self.log)}
            | {"GROUNDUP_OFFLINE": "1"}
            | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
            check=False,
        )


@pytest.fixture
def book(tmp_path):
    if not is_cached("mathjax"):
        pytest.skip("needs the mathjax asset: run `groundup fetch` first")
    return Book(tmp_path / "a book with spaces")


def test_runs_what_changed_and_nothing_else(book):
    first = book.build()
    assert first.returncode == 0, first.stdout
    assert book.runs() == ["one", "two"]
    assert "the value is 1" in book.html("one")

    again = book.build()
    assert again.returncode == 0, again.stdout
    assert book.runs() == []

    book.module("planted_base", "VALUE = 2\n")  # page one imports what imports it
    changed = book.build()
    assert changed.returncode == 0, changed.stdout
    assert book.runs() == ["one"]
    assert "the value is 2" in book.html("one")


def test_numbers_carry_the_section_also_when_only_the_site_is_gone(book):
    path = book.root / "book/0-foundations/two.md"
    path.write_text(
        "# 0.2 Two\n\n$$\nx = 1\n$$ (eq-planted)\n\nSee {eq}`eq-planted`.\n"
    )
    for _ in range(2):
        done = book.build()
        assert done.returncode == 0, done.stdout
        assert "(0.2.1)" in book.html("two")
        shutil.rmtree(book.root / "_build/html")


def test_a_recording_is_part_of_its_page(book):
    """Made by the build that is asked to, shown by the others, told when stale."""

    def built(**environment):
        result = book.build(**environment)
        assert result.returncode == 0, result.stdout
        return book.runs(), book.html("two")

    make = "def make(config):\n    return {{'value': {}}}\n"
    book.module("planted_maker", make.format(5))
    book.page("two", SHOWS_RECORDING)
    runs, html = built(GROUNDUP_REBUILD="planted")
    assert runs == ["one", "two"]
    assert "recorded: 5" in html
    assert built(GROUNDUP_REBUILD="planted")[0] == []  # under its new fingerprint
    assert built()[0] == ["two"]

    book.module("planted_maker", make.format(6))
    runs, html = built()
    assert runs == ["two"]
    assert "recorded: 5" in html
    assert "this recording is stale" in html
    runs, html = built(GROUNDUP_REBUILD="planted,other")
    assert runs == ["two"]
    assert "recorded: 6" in html
    assert "stale" not in html

    (book.root / "book/artifacts/planted/value.json").write_text("7\n")
    result = book.build()
    assert result.returncode != 0
    assert "value.json is damaged" in result.stdout, result.stdout


def test_every_failing_cell_fails_every_build_with_file_and_line(book):
    book.page("one", RAISES)
    book.page("two", FAILS_WHEN_SHOWN)
    for attempt in ("cold", "warm"):
        result = book.build()
        assert result.returncode != 0, attempt
        place = f"book/0-foundations/one.md:{FIRST_LINE}: ZeroDivisionError"
        assert place in result.stdout, result.stdout
        place = f"book/0-foundations/two.md:{FIRST_LINE}: RuntimeError: do not look"
        assert place in result.stdout, result.stdout


def test_a_page_that_starts_to_fail_fails_a_warm_build(book):
    assert book.build().returncode == 0
    book.module("planted_base", "VALUE = 1 / 0\n")
    for attempt in ("first", "second"):
        result = book.build()
        assert result.returncode != 0, attempt
        assert "one.md:" in result.stdout
        assert "two.md:" not in result.stdout


def test_missing_asset_offline_is_named(book, tmp_path):
    book.page("one", NEEDS_ASSET)
    result = book.build(GROUNDUP_CACHE=str(tmp_path / "empty"))
    assert result.returncode != 0
    assert f"one.md:{FIRST_LINE}: AssetError" in result.stdout, result.stdout
    assert "groundup fetch shakespeare" in result.stdout


def test_nbmake_and_the_build_share_one_cache(book):
    tested = book.nbmake()
    assert tested.returncode == 0, tested.stdout
    assert book.runs() == ["one", "two"]
    built = book.build()
    assert built.returncode == 0, built.stdout
    assert book.nbmake().returncode == 0
    assert book.runs() == []


def test_nbmake_reports_file_and_line(book):
    book.page("one", RAISES)
    book.page("two", FAILS_WHEN_SHOWN)
    result = book.nbmake()
    assert result.returncode == 1, result.stdout
    for name, error in (("one", "ZeroDivisionError"), ("two", "RuntimeError")):
        place = f"book/0-foundations/{name}.md:{FIRST_LINE}: {error}"
        assert place in result.stdout, result.stdout
