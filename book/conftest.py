"""Let nbmake run the book's MyST pages: `pytest --nbmake book`.

A page that the cache holds with the same fingerprint is not run again, and a page
that nbmake runs is stored for the build of the book.
"""

import time
from pathlib import Path
from unittest import mock

import pytest

ROOT = Path(__file__).resolve().parents[1]


def pytest_configure(config):
    """Create the cache once, in the controller, before any worker needs it."""
    if config.getoption("nbmake", False) and not hasattr(config, "workerinput"):
        import execution

        execution.PageCache(ROOT / execution.CACHE)
        execution.prepare_kernels(config.getoption("numprocesses", None) or 1)


def pytest_collect_file(file_path, parent):
    """Collect pages with code cells, if nbmake was asked for."""
    if not parent.config.getoption("nbmake", False) or file_path.suffix != ".md":
        return None
    if "\n```{code-cell}" not in file_path.read_text(encoding="utf-8"):
        return None
    return PageFile.from_parent(parent, path=file_path)


class PageFile(pytest.File):
    """A page; its one test is that it runs."""

    def collect(self):
        """Yield the run of the page."""
        yield _page_item_class().from_parent(self, filename=str(self.path))


def _page_item_class():
    """Made late: a run without --nbmake needs neither nbmake nor Sphinx."""
    from nbmake import nb_run
    from nbmake.nb_result import NotebookError
    from nbmake.pytest_items import (
        NbMakeFailureRepr,
        NotebookFailedException,
        NotebookItem,
    )

    import execution

    class PageItem(NotebookItem):
        def runtest(self):
            path = Path(self.filename)
            cache = execution.PageCache(ROOT / execution.CACHE)
            notebook = execution.read_stamped(path, ROOT)
            if cache.has(notebook):
                return
            start = time.monotonic()
            with mock.patch.object(nb_run.nbformat, "read", return_value=notebook):
                run = nb_run.NotebookRun(path, execution.seconds_per_cell())
                result = run.execute()
            shown = execution.shown_error(result.nb)
            if result.error is None and shown is not None:
                index, output = shown
                result.error = NotebookError(
                    summary=f"{output.ename}: {output.evalue}",
                    trace="\n".join(output.traceback),
                    failing_cell_index=index,
                )
            if result.error is not None:
                raise NotebookFailedException(result)
            execution.stamp_anew(result.nb, path, ROOT)
            cache.store(result.nb, path, time.monotonic() - start)

        def repr_failure(self, excinfo, style=None):
            if excinfo.type is not NotebookFailedException:
                return super().repr_failure(excinfo, style)
            result = excinfo.value.args[0]
            error = RuntimeError(result.error.summary)
            report = execution.explain(result.nb, Path(self.filename), ROOT, error)
            return NbMakeFailureRepr(report, report.splitlines()[0])

        def reportinfo(self):
            return self.path, 0, str(self.path.relative_to(ROOT))

    return PageItem
