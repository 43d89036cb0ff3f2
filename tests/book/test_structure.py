"""What every page and the book as a whole must keep to."""

import ast
import code as standard_library_code
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from groundup.pages import ROOT, book_pages, cells

PAGES = book_pages()
MAX_CELL_LINES, MAX_COLUMNS = 15, 88


def ids(page):
    return f"{page.part}/{page.stem}"


def toc_entries(node):
    if isinstance(node, dict):
        found = [node["file"]] if "file" in node else []
        return found + [e for value in node.values() for e in toc_entries(value)]
    return (
        [e for item in node for e in toc_entries(item)]
        if isinstance(node, list)
        else []
    )


def test_the_standard_librarys_code_is_not_shadowed():
    assert not (ROOT / "code" / "__init__.py").exists()
    assert hasattr(standard_library_code, "InteractiveConsole")


def test_every_page_is_in_the_contents_and_the_other_way_round():
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    listed = {toc["root"], *toc_entries(toc["parts"])}
    written = {
        path.relative_to(ROOT).with_suffix("").as_posix()
        for path in (ROOT / "book").rglob("*.md")
        if "_" not in path.relative_to(ROOT / "book").parts[0][:1]
    }
    assert listed == written


def test_numbers_of_pages_rise_within_a_part():
    numbers = [page.number for page in PAGES if page.number]
    assert len(numbers) == len(set(numbers))
    for page in PAGES:
        if page.number and page.part[0].isdigit():
            assert page.number.split(".")[0] == page.part[0]


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_cells_fit_the_page(page):
    for cell in cells(page):
        lines = cell.source.splitlines()
        place = f"line {cell.line}"
        assert max(map(len, lines), default=0) <= MAX_COLUMNS, place
        if not {"hide-input", "remove-input", "remove-cell"} & set(cell.tags):
            assert len(list(filter(str.strip, lines))) <= MAX_CELL_LINES, place


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_every_figure_has_a_name_a_caption_and_an_alternative(page):
    text = page.path.read_text(encoding="utf-8")
    for cell in cells(page):
        if "plt.show()" in cell.source:
            assert cell.figure is not None, f"line {cell.line}"
    assert len(re.findall(r"^    alt: ", text, re.M)) >= len(
        [cell for cell in cells(page) if cell.figure]
    )


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_glued_values_are_glued_and_used(page):
    text = page.path.read_text(encoding="utf-8")
    used = set(re.findall(r"\{glue:text\}`([^`]+)`", text))
    glued = set()
    for cell in cells(page):
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "glue":
                name = node.args[0]
                if isinstance(name, ast.Constant):
                    glued.add(name.value)
                    assert "remove-cell" in cell.tags, f"line {cell.line}"
                else:  # an f-string in a loop: its constant parts must match
                    pattern = "".join(
                        re.escape(p.value) if isinstance(p, ast.Constant) else ".+"
                        for p in name.values
                    )
                    glued |= {u for u in used if re.fullmatch(pattern, u)}
    assert glued == used


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_exercises_have_solutions(page):
    text = page.path.read_text(encoding="utf-8")
    exercises = set(re.findall(r"^:label: (ex-[\w-]+)$", text, re.M))
    solved = set(re.findall(r"\{solution(?:-start)?\} (ex-[\w-]+)", text))
    assert exercises == solved


def test_no_tracked_file_is_large():
    """Recorded artifacts aside, nothing over 500 kB belongs in the repository."""
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split("\n")
    large = [
        name
        for name in filter(None, tracked)
        if not name.startswith("book/artifacts/")
        and Path(ROOT, name).exists()
        and Path(ROOT, name).stat().st_size > 500_000
    ]
    assert large == []
