"""Publish every page as a notebook that stands alone, for download and for Colab.

A page's Markdown is full of directives and roles that only Sphinx understands. Here
it becomes plain Markdown: listings are expanded, references become links into the
published site, glued values and citations become text, captions become cells.
"""

import os
import re
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell
from sphinx.errors import ExtensionError

import execution
import listing

FOLDER = "_notebooks"  # below the root of the site
FENCE = re.compile(
    r"^(?P<fence>`{3,}|:{3,})\{(?P<name>[\w:.-]+)\}[ \t]*(?P<argument>[^\n]*)\n"
    r"(?P<body>.*?)^(?P=fence)[ \t]*$",
    re.S | re.M,
)
OPTIONS = re.compile(r"\A(?::[\w-]+:[^\n]*\n)+")
ROLE = re.compile(r"\{(?P<role>[\w:+-]+)\}`(?P<text>[^`]+)`")
EXPLICIT = re.compile(r"(?P<label>.*?)\s*<(?P<target>[^<>]+)>$", re.S)
EQUATION_LABEL = re.compile(r"^(\$\$)[ \t]*\(([\w:-]+)\)[ \t]*$", re.M)
GLUE_IMPORT = re.compile(r"^from myst_nb import glue\n?", re.M)
GLUED = "application/papermill.record/text/plain"
WORDS = {"figure": "Fig.", "code-block": "Listing", "table": "Table"}
SILENT = {"bibliography", "solution-end", "tableofcontents", "toctree", "raw"}


class PlainMarkdown:
    """Turns the MyST of one page into Markdown that any notebook shows."""

    def __init__(self, app, docname: str, glued: dict[str, str]) -> None:
        self.app, self.docname, self.glued = app, docname, glued
        self.root = Path(app.srcdir)
        self.site = app.config.html_baseurl.rstrip("/")

    def convert(self, text: str) -> str:
        """Return text without labels, comments, directives and roles."""
        text = re.sub(r"^\([\w:.-]+\)=\n", "", text, flags=re.M)
        text = re.sub(r"^%.*\n", "", text, flags=re.M)
        text = EQUATION_LABEL.sub(self._tag, text)
        text = FENCE.sub(self._directive, text)
        return ROLE.sub(self._role, text)

    def _tag(self, match: re.Match) -> str:
        return f"{match[1]}\n\n*({self._number('displaymath', match[2])})*"

    def _directive(self, match: re.Match) -> str:
        name, argument, body = match["name"], match["argument"].strip(), match["body"]
        found = OPTIONS.match(body)
        options = dict(re.findall(r":([\w-]+):[ \t]*(.*)", found[0])) if found else {}
        body = body[found.end() :] if found else body
        if name in SILENT:
            return ""
        if name == "listing":
            path, _ = listing.locate(argument, self.root)
            source = listing.source_of(argument, self.root)
            file = path.relative_to(self.root).as_posix()
            return f"From `{file}`:\n\n```python\n{source}\n```"
        if name == "math":
            return f"$$\n{body.strip()}\n$$"
        if name == "figure":
            # The drawing itself stands in the site; say what it shows.
            url = f"{self.site}/{self.docname}.html"
            alt = options.get("alt", "figure")
            return f"[{alt}]({url})\n\n*{self.convert(body).strip()}*"
        head = argument or name.replace("-", " ").capitalize()
        if name in ("exercise", "exercise-start"):
            head = f"Exercise: {argument}"
        if name in ("solution", "solution-start"):
            head = "Solution"
        quoted = f"**{head}**\n\n{self.convert(body).strip()}".rstrip()
        return "\n".join(f"> {line}".rstrip() for line in quoted.splitlines())

    def _role(self, match: re.Match) -> str:
        role, text = match["role"], match["text"]
        explicit = EXPLICIT.match(text)
        label, target = (
            (explicit["label"], explicit["target"]) if explicit else (None, text)
        )
        if role.startswith("glue"):
            return self.glued.get(text, text)
        if role.startswith("cite"):
            return "[" + "; ".join(self._citation(k) for k in text.split(",")) + "]"
        if role == "math":
            return f"${text}$"
        if role == "src":
            return f"`{label or target}`"
        url, title = self._target(role, target)
        shown = label or title
        return f"[{shown}]({url})" if url else shown

    def _citation(self, key: str) -> str:
        entries = self.app.env.get_domain("cite").bibdata.data.entries
        entry = entries[key.strip()]
        names = [" ".join(p.last_names) for p in entry.persons["author"]]
        who = names[0] if len(names) == 1 else f"{names[0]} et al."
        if len(names) == 2:
            who = " and ".join(names)
        return f"{who}, {entry.fields['year']}"

    def _target(self, role: str, target: str) -> tuple[str | None, str]:
        """Address in the published site, and title, of what a role points at."""
        env = self.app.env
        standard = env.get_domain("std")
        page = anchor = None
        title = target
        if role == "doc":
            folder = os.path.dirname(self.docname)
            page = os.path.normpath(os.path.join(folder, target))
            title = env.titles[page].astext()
        elif role == "eq":
            equation = env.get_domain("math").equations.get(target)
            page, anchor = (equation[0] if equation else None), f"equation-{target}"
            title = f"({self._number('displaymath', target)})"
        elif role == "term":
            page, anchor = standard.objects.get(("term", target.lower()), (None, None))
        elif role.startswith("py:"):
            found = env.get_domain("py").objects.get(target.lstrip("~."))
            page, anchor = (found.docname, found.node_id) if found else (None, None)
            title = f"`{target.lstrip('~.')}`"
        elif target in standard.labels:
            page, anchor, title = standard.labels[target]
        elif target in standard.anonlabels:
            page, anchor = standard.anonlabels[target]
        if role == "numref" and page:
            for kind, word in WORDS.items():
                number = env.toc_fignumbers.get(page, {}).get(kind, {}).get(anchor)
                if number:
                    title = f"{word} {'.'.join(map(str, number))}"
        url = f"{self.site}/{page}.html#{anchor or ''}".rstrip("#") if page else None
        return url, title

    def _number(self, kind: str, label: str) -> str:
        for numbers in self.app.env.toc_fignumbers.values():
            number = numbers.get(kind, {}).get(f"equation-{label}")
            if number:
                return ".".join(map(str, number))
        return label


def standalone(app, docname: str, executed) -> nbformat.NotebookNode:
    """Return an executed page as a notebook that needs nothing but the package.

    Raises:
        ExtensionError: a cell that is not hidden glues a value; outside the book there
            is nothing to glue it into.
    """
    glued = {
        output.metadata["scrapbook"]["name"]: output.data[GLUED].strip("'\"")
        for cell in executed.cells
        for output in cell.get("outputs", [])
        if GLUED in output.get("data", {})
    }
    plain = PlainMarkdown(app, docname, glued)
    cells = [new_code_cell(app.config.book_notebook_setup)]
    for cell in executed.cells:
        if "remove-cell" in cell.metadata.get("tags", []):
            continue
        if cell.cell_type == "markdown":
            cells.append(new_markdown_cell(plain.convert(cell.source)))
            continue
        source = GLUE_IMPORT.sub("", cell.source)
        if re.search(r"\bglue\(", source):
            raise ExtensionError(
                f"{docname}: a cell that is shown calls glue(); glue in a cell tagged "
                f"remove-cell:\n{source}"
            )
        outputs = [o for o in cell.outputs if GLUED not in o.get("data", {})]
        cells.append(
            new_code_cell(source, outputs=outputs, execution_count=cell.execution_count)
        )
        figure = cell.metadata.get("mystnb", {}).get("figure", {})
        if figure.get("caption"):
            _, title = plain._target("numref", figure["name"])
            caption = plain.convert(figure["caption"]).strip()
            cells.append(new_markdown_cell(f"**{title}** {caption}"))
    for index, cell in enumerate(cells):
        cell["id"] = f"cell-{index}"
    notebook = nbformat.v4.new_notebook(
        cells=cells,
        metadata={
            "kernelspec": {
                "name": "python3",
                "display_name": "Python 3",
                "language": "python",
            },
            "language_info": {"name": "python"},
        },
    )
    nbformat.validate(notebook)
    return notebook


def publish(app, exception) -> None:
    """When the site is built: write _notebooks/<page>.ipynb for each executed page."""
    if exception or app.builder.name != "html":
        return
    root = Path(app.srcdir)
    cache = execution.PageCache(root / execution.CACHE)
    for docname in pages_with_cells(app):
        page = Path(app.env.doc2path(docname))
        executed, _ = cache.executed(execution.read_stamped(page, root))
        path = Path(app.outdir, FOLDER, f"{docname}.ipynb")
        path.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(standalone(app, docname, executed), path)


def pages_with_cells(app) -> list[str]:
    """Docnames of the executed pages."""
    return sorted(n for n, meta in app.env.metadata.items() if "kernelspec" in meta)


def add_buttons(app, pagename, templatename, context, doctree) -> None:
    """Offer the published notebook for download, and to open in Colab."""
    if "kernelspec" not in app.env.metadata.get(pagename, {}):
        return
    buttons = context.get("header_buttons", [])
    for group in buttons:
        if group.get("label") == "download-buttons":
            group["buttons"].insert(
                0,
                {
                    "type": "link",
                    "url": context["pathto"](f"{FOLDER}/{pagename}.ipynb", 1),
                    "text": ".ipynb",
                    "icon": "fas fa-code",
                    "tooltip": "Download this page as a notebook, with its outputs",
                    "label": "download-notebook-button",
                },
            )
    buttons.insert(
        0,
        {
            "type": "link",
            "url": f"{app.config.book_colab}/{FOLDER}/{pagename}.ipynb",
            "icon": "fas fa-rocket",
            "tooltip": "Open this page in Colab",
            "label": "colab-button",
        },
    )
