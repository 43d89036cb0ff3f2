"""Finding, reading and running pages, on a small book made here."""

import ast
import os
import subprocess
import sys

import pytest

from groundup import pages
from groundup.pages import PageError, book_pages, cells, find_page, run_page

PAGE = """\
---
file_format: mystnb
kernelspec:
  name: python3
  display_name: Python 3
---

(sec-{stem})=
# {title}

Prose.

```{{code-cell}} ipython3
---
tags: [hide-input]
mystnb:
  figure:
    name: fig-line
    caption: A line.
---
import matplotlib.pyplot as plt

plt.plot([1, 2])
plt.show()
```

```{{code-cell}} ipython3
:tags: [remove-cell]

from myst_nb import glue
glue("number", 3, display=False)
x = 20
```

```{{code-cell}} ipython3
print("printed")
x + 1
```
"""


@pytest.fixture
def root(tmp_path):
    for part, stem, title in (
        ("0-foundations", "backprop", "0.3 Gradients"),
        ("1-transformer", "block", "1.7 The block"),
        ("1-transformer", "single_head", "1.3 One head"),
        ("8-ppo", "loop", "8.4 The loop"),
        ("9-grpo", "loop", "9.5 The loop"),
        ("labs", "anatomy", "A Anatomy"),
    ):
        path = tmp_path / "book" / part / f"{stem}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(PAGE.format(stem=stem, title=title))
    (tmp_path / "book/1-transformer/index.md").write_text("# No cells\n")
    return tmp_path


def add_cell(page, source):
    page.path.write_text(
        page.path.read_text() + f"\n```{{code-cell}} ipython3\n{source}\n```\n"
    )


def test_pages_come_in_reading_order_without_plain_ones(root):
    names = [f"{page.number} {page.part}/{page.stem}" for page in book_pages(root)]
    assert names == [
        "0.3 0-foundations/backprop",
        "1.3 1-transformer/single_head",
        "1.7 1-transformer/block",
        "8.4 8-ppo/loop",
        "9.5 9-grpo/loop",
        "A labs/anatomy",
    ]


@pytest.mark.parametrize(
    "name",
    ["1.3", "single_head", "transformer/single_head", "1-transformer/single_head.md"],
)
def test_a_page_answers_to_each_of_its_names(root, name):
    page = find_page(name, book_pages(root))
    assert (page.title, page.docname) == ("One head", "book/1-transformer/single_head")


def test_a_name_that_two_pages_have_is_refused(root):
    with pytest.raises(ValueError, match="could be any of: ppo/loop, grpo/loop"):
        find_page("loop", book_pages(root))
    assert find_page("ppo/loop", book_pages(root)).number == "8.4"


def test_an_unknown_name_gets_a_hint(root):
    with pytest.raises(ValueError, match=r"'singlehead'; did you mean single_head"):
        find_page("singlehead", book_pages(root))


def test_without_a_book_the_error_says_what_to_do(tmp_path):
    with pytest.raises(PageError, match="run from a clone"):
        book_pages(tmp_path)


def test_cells_know_their_lines_figures_and_tags(root):
    page = find_page("1.3", book_pages(root))
    lines = page.path.read_text().splitlines()
    found = cells(page)
    assert [cell.figure for cell in found] == ["fig-line", None, None]
    assert [cell.tags for cell in found] == [("hide-input",), ("remove-cell",), ()]
    for cell in found:
        assert lines[cell.line - 1] == cell.source.splitlines()[0]


def test_a_run_prints_like_a_notebook_and_saves_figures(root, tmp_path, capsys):
    result = run_page(find_page("1.3", book_pages(root)), tmp_path / "out")
    assert capsys.readouterr().out == "printed\n21\n"
    figure = tmp_path / "out/1-transformer/single_head/fig-line.svg"
    assert result.figures == [figure]
    assert "<svg" in figure.read_text()


def test_unnamed_and_unshown_figures_are_saved_too(root, tmp_path):
    page = find_page("1.3", book_pages(root))
    add_cell(page, "for n in (1, 2):\n    plt.figure(); plt.plot([n])")
    names = [path.name for path in run_page(page, tmp_path).figures]
    assert names == ["fig-line.svg", "cell-04.svg", "cell-04-2.svg"]


def test_a_trailing_semicolon_is_silent(root, tmp_path, capsys):
    page = find_page("1.3", book_pages(root))
    add_cell(page, "x;")
    run_page(page, tmp_path)
    assert capsys.readouterr().out == "printed\n21\n"


@pytest.mark.parametrize(
    ("source", "line", "what"),
    [
        ("y = 1\ny / 0", 1, "ZeroDivisionError: division by zero"),
        ("def f():\n    return undefined\n\nf()", 1, "NameError"),
        ("import math\nmath.sqrt(-1)", 1, "ValueError"),
        ("a = 1\nb = (", 1, "SyntaxError"),
    ],
)
def test_a_failing_cell_is_named_by_file_and_line(root, tmp_path, source, line, what):
    page = find_page("1.3", book_pages(root))
    add_cell(page, source)
    first = cells(page)[-1].line
    with pytest.raises(PageError) as caught:
        run_page(page, tmp_path)
    where = f"book/1-transformer/single_head.md:{first + line}: {what}"
    assert str(caught.value).startswith(where)


def test_a_cell_may_announce_its_exception(root, tmp_path, capsys):
    page = find_page("1.3", book_pages(root))
    add_cell(page, ":tags: [raises-exception]\n\n1 / 0")
    run_page(page, tmp_path)
    assert capsys.readouterr().out.endswith("ZeroDivisionError: division by zero\n")


@pytest.fixture
def package(tmp_path):
    """page -> groundup.a -> groundup.sub.b (relative) ; groundup.c is not imported."""
    files = {
        "__init__.py": "",
        "a.py": "from groundup.sub import b\n",
        "c.py": "C = 1\n",
        "sub/__init__.py": "",
        "sub/b.py": "from .d import VALUE\n",
        "sub/d.py": "VALUE = 1\n",
    }
    for name, source in files.items():
        path = tmp_path / "code/groundup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    page = tmp_path / "page.md"
    page.write_text(
        PAGE.format(stem="x", title="X").replace("x + 1", "import groundup.a")
    )
    return pages.read_notebook(page), tmp_path


def test_dependencies_follow_imports_of_the_package(package):
    notebook, root = package
    found = [
        p.relative_to(root / "code/groundup").as_posix()
        for p in pages.dependencies(notebook, root)
    ]
    assert found == ["__init__.py", "a.py", "sub/__init__.py", "sub/b.py", "sub/d.py"]


def test_digest_changes_with_what_is_imported_and_only_then(package, monkeypatch):
    notebook, root = package
    before = pages.digest(notebook, root)
    (root / "code/groundup/c.py").write_text("C = 2\n")
    assert pages.digest(notebook, root) == before
    (root / "code/groundup/sub/d.py").write_text("VALUE = 22\n")
    changed = pages.digest(notebook, root)
    assert changed != before
    (root / "requirements.txt").write_text("torch==2\n")
    assert pages.digest(notebook, root) != changed
    (root / "requirements.txt").unlink()
    assert pages.digest(notebook, root) == changed
    monkeypatch.setenv(pages.REBUILD_FLAG, "all")  # it shows nothing that is recorded
    assert pages.digest(notebook, root) == changed


def plant_artifact(root, name):
    folder = root / pages.ARTIFACTS / name
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    (folder / "values.json").write_text("1")
    return folder


@pytest.mark.parametrize("place", ["the page", "a module"])
def test_a_page_depends_on_the_artifacts_that_it_names(package, monkeypatch, place):
    notebook, root = package
    if place == "the page":
        notebook.cells[-1].source += '\nartifacts.get("ladder", make, {})'
    else:
        (root / "code/groundup/sub/d.py").write_text('NAME = "ladder"\n')
    before = pages.digest(notebook, root)
    other = plant_artifact(root, "ladders")
    assert pages.digest(notebook, root) == before
    folder = plant_artifact(root, "ladder")
    first = pages.digest(notebook, root)
    assert first != before
    assert pages.artifacts_of(notebook, root) == {"ladder"}
    assert set(folder.iterdir()) <= set(pages.dependencies(notebook, root))
    (other / "values.json").write_text("2")
    assert pages.digest(notebook, root) == first
    (folder / "values.json").write_text("2")
    second = pages.digest(notebook, root)
    assert second != first
    for flag, same in (("ladders", True), ("x, ladder", False), ("all", False)):
        monkeypatch.setenv(pages.REBUILD_FLAG, flag)
        assert (pages.digest(notebook, root) == second) == same


def test_a_recording_in_the_making_is_none(package):
    notebook, root = package
    notebook.cells[-1].source += '\nget("ladder"), get(".ladder.tmp-1")'
    plant_artifact(root, ".ladder.tmp-1")
    (root / pages.ARTIFACTS / "ladder").mkdir()
    assert pages.artifacts_of(notebook, root) == set()


def test_an_import_that_is_added_counts_at_once(package):
    """One process may see two versions of a module; what it parsed must not stay."""
    notebook, root = package
    assert root / "code/groundup/c.py" not in pages.dependencies(notebook, root)
    base = root / "code/groundup/sub/d.py"
    base.write_text("from groundup import c\n\nVALUE = 3\n")
    os.utime(base, ns=(0, base.stat().st_mtime_ns + 1))
    assert root / "code/groundup/c.py" in pages.dependencies(notebook, root)


def test_imports_inside_functions_and_relative_ones_count():
    source = (
        "def f():\n    import groundup.x.y\n"
        "from ..part import module\nfrom . import near\nimport numpy\n"
    )
    found = pages._imported(ast.parse(source), package="groundup.one")
    assert {"groundup.x.y", "groundup.part.module", "groundup.one.near"} <= found
    assert not any(name.startswith("numpy") for name in found)


def test_the_real_dependencies_of_a_real_import():
    """Follow the interpreter itself: what importing the module really loads."""
    code = (
        "import sys, groundup.transformer.block\n"
        "print(*sorted(m for m in sys.modules if m.split('.')[0] == 'groundup'))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    loaded = {pages.module_file(name) for name in run.stdout.split()}
    notebook = pages.read_notebook(
        pages.ROOT / "x.md",
        "```{code-cell} ipython3\nimport groundup.transformer.block\n```\n",
    )
    followed = set(pages.dependencies(notebook))
    assert loaded <= followed
