"""The pages of the book as Python sees them: find one, read its cells, run it.

Here: names for pages (`1.3`, `transformer/single_head`, `single_head`), their code
cells with line numbers, what a page's outputs depend on, and a runner that executes
a page as a script. Left out: the kernel, the cache and the HTML; those belong to the
build of the book (`book/_ext`).
"""

import ast
import difflib
import hashlib
import os
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "groundup"
TITLE = re.compile(r"^# (?:([0-9A-G](?:\.\d+)?) )?(.+)$", re.M)
REBUILD_FLAG = "GROUNDUP_REBUILD"  # names of artifacts with commas between, or all
ARTIFACTS = "book/artifacts"  # where the recorded results lie


class PageError(Exception):
    """A page could not be read, or one of its cells failed."""


@dataclass(frozen=True)
class Page:
    """A page with code cells; its name on the command line is any of three."""

    path: Path
    number: str  # "1.3"; empty where the title carries none
    title: str

    @property
    def part(self) -> str:
        """Folder of the page, "1-transformer"."""
        return self.path.parent.name

    @property
    def stem(self) -> str:
        """File name without its ending, "single_head"."""
        return self.path.stem

    @property
    def docname(self) -> str:
        """The path below the folder that holds book/, without its ending."""
        return f"book/{self.part}/{self.stem}"

    @property
    def names(self) -> tuple[str, ...]:
        """What find_page accepts: number, part/stem with and without digit, stem."""
        plain = self.part.partition("-")[2] or self.part
        names = (f"{plain}/{self.stem}", f"{self.part}/{self.stem}", self.stem)
        return (self.number, *names) if self.number else names


@dataclass(frozen=True)
class Cell:
    """A code cell: its source, the line of the page where that starts, its figure."""

    source: str
    line: int
    figure: str | None = None
    tags: tuple[str, ...] = ()


@dataclass
class RunResult:
    """What a run left behind."""

    figures: list[Path] = field(default_factory=list)


def book_pages(root: Path = ROOT) -> list[Page]:
    """Every page of the book that has code cells, in the order of their numbers.

    Raises:
        PageError: there is no book/ under root (the package was installed alone).
    """
    if not (root / "book").is_dir():
        raise PageError(
            f"no book/ folder in {root}: the pages are not part of the installed "
            "package; run from a clone of the repository (pip install -e .)"
        )
    pages = []
    for path in sorted((root / "book").glob("*/*.md")):
        text = path.read_text(encoding="utf-8")
        if "\n```{code-cell}" in text:
            number, title = TITLE.search(text).groups()
            pages.append(Page(path, number or "", title))
    return sorted(pages, key=lambda page: (page.part, _as_numbers(page.number)))


def _as_numbers(number: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", number)]


def find_page(name: str, pages: list[Page] | None = None) -> Page:
    """Return the page called name: its number, part/stem, or a stem only it has.

    Raises:
        ValueError: no page or several pages have that name; says which are near.
    """
    pages = book_pages() if pages is None else pages
    found = [page for page in pages if name.removesuffix(".md") in page.names]
    if len(found) == 1:
        return found[0]
    if found:
        several = ", ".join(page.names[-3] for page in found)
        raise ValueError(f"page {name!r} could be any of: {several}")
    known = [n for page in pages for n in page.names]
    near = difflib.get_close_matches(name, known, n=3)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    raise ValueError(f"no page is called {name!r}{hint} (see `groundup list`)")


def read_notebook(path: Path, text: str | None = None):
    """Parse a MyST page into a notebook node whose metadata holds a source_map."""
    from myst_nb.core.read import read_myst_markdown_notebook

    text = path.read_text(encoding="utf-8") if text is None else text
    return read_myst_markdown_notebook(text, add_source_map=True, path=path)


def cells(page: Page) -> list[Cell]:
    """Return the code cells of page, in order."""
    lines = page.path.read_text(encoding="utf-8").splitlines()
    notebook = read_notebook(page.path)
    found = []
    for cell, start in zip(
        notebook.cells, notebook.metadata["source_map"], strict=True
    ):
        if cell.cell_type != "code":
            continue
        body = cell.source.splitlines()
        line = next(
            (i for i in range(start, len(lines)) if lines[i : i + len(body)] == body),
            start,
        )
        figure = cell.metadata.get("mystnb", {}).get("figure", {}).get("name")
        tags = tuple(cell.metadata.get("tags", ()))
        found.append(Cell(cell.source, line + 1, figure, tags))
    return found


def run_page(page: Page, out: Path) -> RunResult:
    """Execute the cells of page in this process, as a script would.

    Prints what the cells print, and the value of a cell's last line as a notebook
    does. Each figure is written to out/PART/STEM/ as an SVG under its own name.

    Raises:
        PageError: a cell failed; the message starts with file.md:line and ends with
            the traceback.
    """
    import matplotlib

    matplotlib.use("agg")
    folder = out / page.part / page.stem
    result = RunResult()
    namespace = {"__name__": "__main__", "__file__": str(page.path)}
    # Glued values go into the prose of the book; a script has no prose.
    with mock.patch("myst_nb.glue", return_value=None):
        for index, cell in enumerate(cells(page)):
            name = cell.figure or f"cell-{index + 1:02d}"
            with _saving_figures(folder, name, result.figures):
                _execute(cell, page, namespace)
    return result


@contextmanager
def _saving_figures(folder: Path, name: str, saved: list[Path]) -> Iterator[None]:
    """Write and close the open figures where the cell shows them, or at its end."""
    import matplotlib.pyplot as plt

    count = 0

    def save(*args, **kwargs) -> None:
        nonlocal count
        for number in plt.get_fignums():
            count += 1
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / (f"{name}.svg" if count == 1 else f"{name}-{count}.svg")
            plt.figure(number).savefig(path, metadata={"Date": None})
            plt.close(number)
            saved.append(path)

    with mock.patch.object(plt, "show", save):
        yield
    save()


def _execute(cell: Cell, page: Page, namespace: dict) -> None:
    """Run one cell; line numbers in tracebacks are those of the page."""
    try:
        tree = ast.parse("\n" * (cell.line - 1) + cell.source, str(page.path))
        last = tree.body[-1] if tree.body else None
        quiet = cell.source.rstrip().endswith(";")
        if isinstance(last, ast.Expr) and not quiet:
            tree.body.pop()
            exec(compile(tree, str(page.path), "exec"), namespace)
            value = eval(
                compile(ast.Expression(last.value), str(page.path), "eval"), namespace
            )
            if value is not None:
                print(repr(value))
        else:
            exec(compile(tree, str(page.path), "exec"), namespace)
    except Exception as error:
        if "raises-exception" in cell.tags:
            print(f"{type(error).__name__}: {error}")
            return
        own = [
            frame.lineno
            for frame in traceback.extract_tb(error.__traceback__)
            if frame.filename == str(page.path)
        ]
        line = own[-1] if own else getattr(error, "lineno", None) or cell.line
        where = f"{page.path.relative_to(page.path.parents[2])}:{line}"
        raise PageError(
            f"{where}: {type(error).__name__}: {error}\n{traceback.format_exc()}"
        ) from error


def dependencies(notebook, root: Path = ROOT) -> list[Path]:
    """Files outside a page that its outputs depend on.

    The package's modules that its cells import, followed through their own imports
    (only import statements count), the files of its artifacts, and requirements.txt.
    """
    modules, names = _follow(notebook, root)
    inside = [p for n in names for p in (root / ARTIFACTS / n).iterdir() if p.is_file()]
    pinned = root / "requirements.txt"
    return sorted({*modules, *inside, *([pinned] if pinned.exists() else [])})


def artifacts_of(notebook, root: Path = ROOT) -> set[str]:
    """Names of the recorded artifacts that a page may show.

    Those whose name stands as a string in its cells or in a module that they import;
    a name put together at run time is not seen.
    """
    return _follow(notebook, root)[1]


def rebuild_asked(name: str) -> bool:
    """Whether this build is to record the artifact called name anew."""
    asked = {part.strip() for part in os.environ.get(REBUILD_FLAG, "").split(",")}
    return not asked.isdisjoint({name, "all"})


def digest(notebook, root: Path = ROOT) -> str:
    """Fingerprint of everything outside a page that its outputs depend on."""
    asked = sorted(filter(rebuild_asked, artifacts_of(notebook, root)))
    total = hashlib.sha256(",".join(asked).encode())
    for path in dependencies(notebook, root):
        total.update(path.relative_to(root).as_posix().encode() + b"\0")
        total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()[:12]


def _follow(notebook, root: Path) -> tuple[set[Path], set[str]]:
    """Return the modules that a page imports, and the artifacts that they name."""
    todo: set[str] = set()
    strings: set[str] = set()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            try:
                tree = ast.parse(cell.source)
            except SyntaxError:
                continue  # the run will say so, with the line
            todo |= _imported(tree, package="")
            strings |= _strings(tree)
    seen: dict[str, Path] = {}
    while todo:
        name = todo.pop()
        path = module_file(name, root)
        if name in seen or path is None:
            continue
        seen[name] = path
        imports, texts = _module_facts(path, path.stat().st_mtime_ns, root)
        todo |= imports - seen.keys()
        strings |= texts
    recorded = {p.parent.name for p in (root / ARTIFACTS).glob("[!.]*/manifest.json")}
    return set(seen.values()), recorded & strings


def module_file(name: str, root: Path = ROOT) -> Path | None:
    """Return the file of the package's module called name, or None."""
    base = root.joinpath("code", *name.split("."))
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.is_file():
            return path
    return None


@lru_cache(maxsize=1024)
def _module_facts(
    path: Path, changed_at: int, root: Path
) -> tuple[frozenset[str], frozenset[str]]:
    """Return what a module imports, and the strings in it."""
    package = ".".join(path.relative_to(root / "code").parent.parts)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return frozenset(_imported(tree, package)), frozenset(_strings(tree))


def _strings(tree: ast.AST) -> set[str]:
    constants = (n.value for n in ast.walk(tree) if isinstance(n, ast.Constant))
    return {value for value in constants if isinstance(value, str)}


def _imported(tree: ast.AST, package: str) -> set[str]:
    """Names of the package's modules that tree may import (some name no module)."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                kept = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*kept, base] if base else kept)
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    parts = [name.split(".") for name in names]
    # `import a.b.c` runs a, a.b and a.b.c
    return {
        ".".join(p[: i + 1]) for p in parts if p[0] == PACKAGE for i in range(len(p))
    }
