"""Execute pages in parallel, and know which of them are stale.

One cache serves the build and nbmake. Its key is a page's cells plus its
kernelspec; the fingerprint of everything else the outputs depend on
(`groundup.pages.digest`) is written into the kernelspec's display name when the
page is read, so a changed module or artifact means a page that is not in the cache.
"""

import os
import re
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import nbformat
from filelock import FileLock
from jupyter_cache import get_cache
from jupyter_cache.base import CacheBundleIn
from jupyter_cache.executors.utils import single_nb_execution
from myst_nb.core.read import is_myst_markdown_notebook
from sphinx.errors import ExtensionError
from sphinx.util import logging

from groundup import pages

log = logging.getLogger(__name__)

CACHE = "_build/.jupyter_cache"  # below the root of the book
SECONDS_PER_CELL = 300
DISPLAY_NAME = re.compile(r"^  display_name: Python 3$", re.M)
ANSI = re.compile(r"\x1b\[[0-9;]*m")
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def stamp(text: str, path: Path, root: Path) -> str:
    """Write the fingerprint into the page's kernelspec; keeps every line number.

    Raises:
        ExtensionError: the front matter has no `display_name: Python 3` to carry it.
    """
    if not is_myst_markdown_notebook(text):
        return text
    digest = pages.digest(pages.read_notebook(path, text), root)
    stamped, count = DISPLAY_NAME.subn(
        f"  display_name: Python 3 ({digest})", text, count=1
    )
    if not count:
        raise ExtensionError(
            f"{path}: the front matter needs a kernelspec with the lines "
            "'  name: python3' and '  display_name: Python 3'"
        )
    return stamped


def read_stamped(path: Path, root: Path):
    """Return the page as an unexecuted notebook with its fingerprint; or None."""
    text = path.read_text(encoding="utf-8")
    if not is_myst_markdown_notebook(text):
        return None
    return pages.read_notebook(path, stamp(text, path, root))


def seconds_per_cell() -> int | None:
    """Return how long a cell may take; for ever (None) while recording."""
    return None if os.environ.get(pages.REBUILD_FLAG) else SECONDS_PER_CELL


def stamp_anew(notebook, path: Path, root: Path) -> None:
    """Give an executed page that recorded an artifact the fingerprint it has now."""
    if any(map(pages.rebuild_asked, pages.artifacts_of(notebook, root))):
        notebook.metadata.kernelspec = read_stamped(path, root).metadata.kernelspec


def shown_error(notebook) -> tuple[int, dict] | None:
    """Return index and output of the first traceback on the page, or None.

    A repr or a figure that fails while it is displayed leaves a traceback among the
    outputs, but Jupyter counts the cell as a success. Here it is a failure.
    """
    for index, cell in enumerate(notebook.cells):
        if "raises-exception" in cell.metadata.get("tags", []):
            continue
        for output in cell.get("outputs", []):
            if output.output_type == "error":
                return index, output
    return None


def explain(notebook, path: Path, root: Path, error: Exception | None) -> str:
    """Say `file.md:line: what`, then the failing cell and its traceback."""
    where = path.relative_to(root)
    found = shown_error(notebook)
    if found is None:
        return f"{where}: {error}"
    index, output = found
    line = notebook.metadata["source_map"][index] + 1
    trace = ANSI.sub("", "\n".join(output.traceback))
    source = notebook.cells[index].source
    return f"{where}:{line}: {output.ename}: {output.evalue}\n{source}\n{trace}"


class PageCache:
    """The executed pages, for threads and processes at once.

    jupyter-cache creates its tables and stores notebooks without a lock; two workers
    that meet an empty cache would race.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._lock = FileLock(f"{path}.lock")
        with self._lock:
            self._cache().list_cache_records()

    def _cache(self):
        return get_cache(str(self._path))

    def has(self, notebook) -> bool:
        """Whether these cells were executed before with this fingerprint."""
        with self._lock:
            try:
                self._cache().match_cache_notebook(notebook)
            except KeyError:
                return False
        return True

    def store(self, notebook, path: Path, seconds: float) -> None:
        """Keep an executed page."""
        notebook = nbformat.from_dict(notebook)
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)
        bundle = CacheBundleIn(notebook, str(path), data={"execution_seconds": seconds})
        with self._lock:
            self._cache().cache_notebook_bundle(
                bundle, check_validity=False, overwrite=True
            )

    def executed(self, notebook):
        """Return the notebook with its outputs, and the seconds they took."""
        with self._lock:
            key, merged = self._cache().merge_match_into_notebook(notebook)
            data = self._cache().get_cache_record(key).data
        return merged, data["execution_seconds"]


def prepare_kernels(jobs: int) -> None:
    """Set the environment of `jobs` kernels that run side by side.

    Each gets its share of the cores; and libraries that draw progress bars do not
    ask every page for a widget that no book can show.
    """
    share = str(max(1, (os.cpu_count() or 1) // jobs))
    for variable in THREAD_VARIABLES:
        os.environ.setdefault(variable, share)
    os.environ.setdefault("PYTHONWARNINGS", "ignore:IProgress not found")


def add_stale(app, env, added, changed, removed) -> list[str]:
    """Sphinx asks which further pages to read: those with another fingerprint."""
    root, stale = Path(app.srcdir), []
    for name in env.found_docs - added - changed - removed:
        path = Path(env.doc2path(name))
        notebook = read_stamped(path, root) if path.suffix == ".md" else None
        if notebook is not None:
            before = (env.metadata.get(name, {}).get("kernelspec") or {}).get(
                "display_name"
            )
            if notebook.metadata.kernelspec.display_name != before:
                stale.append(name)
    return stale


def stamp_source(app, docname, source) -> None:
    """Stamp a page as Sphinx reads it."""
    path = Path(app.env.doc2path(docname))
    if path.suffix == ".md":
        source[0] = stamp(source[0], path, Path(app.srcdir))


def execute_missing(app, env, docnames) -> None:
    """Execute every page about to be read that the cache lacks, some at a time.

    Raises:
        ExtensionError: pages failed; each was reported as file.md:line before. Nothing
            of the build is kept then, so the next build fails as well.
    """
    root = Path(app.srcdir)
    cache = PageCache(root / CACHE)
    todo = []
    for name in docnames:
        path = Path(env.doc2path(name))
        notebook = read_stamped(path, root) if path.suffix == ".md" else None
        if notebook is None or all(c.cell_type != "code" for c in notebook.cells):
            continue
        if not cache.has(notebook):
            todo.append((path, notebook))
    if not todo:
        return
    jobs = min(os.cpu_count() or 1, len(todo))
    prepare_kernels(jobs)

    def execute(path, notebook):
        return single_nb_execution(
            notebook,
            cwd=str(path.parent),
            timeout=seconds_per_cell(),
            allow_errors=False,
            extra_arguments=["--log-level=40"],
        )

    log.info("executing %d page(s), %d at a time", len(todo), jobs)
    start, failed = time.monotonic(), []
    with ThreadPoolExecutor(jobs) as pool:
        running = {pool.submit(execute, *job): job for job in todo}
        for done in as_completed(running):
            path, notebook = running[done]
            outcome = done.result()
            if outcome.err is None and shown_error(notebook) is None:
                stamp_anew(notebook, path, root)
                cache.store(notebook, path, outcome.time)
                log.info("%6.1f s  %s", outcome.time, path.relative_to(root))
            else:
                failed.append(str(path.relative_to(root)))
                log.error("%s", explain(notebook, path, root, outcome.err))
    log.info("executed %d page(s) in %.1f s", len(todo), time.monotonic() - start)
    if failed:
        raise ExtensionError(
            f"{len(failed)} page(s) failed: {', '.join(sorted(failed))}"
        )
