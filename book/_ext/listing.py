"""`{listing} package.module.object`: tested source, with caption and links.

Takes every option of literalinclude. Finds the file, numbers the lines as in the
file, names the listing `lst-package-module-object`, and links the object's entry in
the API reference and its lines in the repository.
"""

from pathlib import Path

from sphinx.directives.code import LiteralInclude
from sphinx.pycode import ModuleAnalyzer

from groundup import pages


def locate(dotted: str, root: Path) -> tuple[Path, str]:
    """Return file and name in it of package.module.object or ....Class.method.

    Raises:
        LookupError: no module of the package holds it.
    """
    module, _, name = dotted.rpartition(".")
    while module:
        path = pages.module_file(module, root)
        if path is not None and path.name != "__init__.py":
            if name in _tags(path):
                return path, name
            break
        module, _, outer = module.rpartition(".")
        name = f"{outer}.{name}"
    raise LookupError(f"no module of {pages.PACKAGE} holds {dotted}")


def source_of(dotted: str, root: Path) -> str:
    """Return the source text of package.module.object."""
    path, name = locate(dotted, root)
    first, last = span(path, name)
    return "\n".join(path.read_text(encoding="utf-8").splitlines()[first - 1 : last])


def span(path: Path, name: str) -> tuple[int, int]:
    """Return the first and the last line of name in path."""
    _, first, last = _tags(path)[name]
    return first, last


def _tags(path: Path) -> dict:
    return ModuleAnalyzer.for_file(str(path), path.stem).find_tags()


class Listing(LiteralInclude):
    """The directive."""

    def run(self):
        """Fill in the options of literalinclude, then leave the work to it."""
        dotted, root = self.arguments[0], Path(self.env.srcdir)
        try:
            path, name = locate(dotted, root)
        except LookupError as error:
            raise self.error(str(error)) from error
        file = path.relative_to(root).as_posix()
        first, last = span(path, name)
        self.options.setdefault("name", "lst-" + dotted.replace(".", "-"))
        self.options.setdefault("language", "python")
        self.options.setdefault("lineno-match", None)
        self.options.setdefault(
            "caption",
            f"{{py:obj}}`{name} <{dotted}>` in "
            f"{{src}}`{file} <{file}#L{first}-L{last}>`",
        )
        self.options["pyobject"] = name
        self.arguments[0] = f"/{file}"
        return super().run()
