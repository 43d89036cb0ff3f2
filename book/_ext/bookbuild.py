"""The Sphinx extension of the book; each concern has a module beside this one.

* `execution`: pages run in parallel, are cached, go stale, and fail loudly.
* `listing`: tested source on the page.
* `figures`: drawings inside the page, numbers that carry the section.
* `notebooks`: every page as a notebook.
"""

import os
import re
import shutil
from pathlib import Path

from docutils import nodes

import execution
import figures
import listing
import notebooks
from groundup.foundations.assets import ASSETS, fetch

MATHJAX = "_static/mathjax"  # below the root of the site


def use_own_repository(app, config) -> None:
    """In a GitHub workflow, let every link point at that repository."""
    repository = os.environ.get("GITHUB_REPOSITORY")
    if repository is None:
        return
    owner, name = repository.split("/")
    url = f"https://github.com/{repository}"
    config.html_theme_options["repository_url"] = url
    config.extlinks["src"] = (f"{url}/blob/main/%s", "%s")
    config.html_baseurl = f"https://{owner}.github.io/{name}/"
    config.notfound_urls_prefix = f"/{name}/"
    config.book_colab = (
        f"https://colab.research.google.com/github/{repository}/blob/gh-pages"
    )


def drop_thebe(app, config) -> None:
    """Jupyter Book always loads sphinx-thebe, whose script fails on every page."""
    for listeners in app.events.listeners.values():
        listeners[:] = [
            listener
            for listener in listeners
            if getattr(listener.handler, "__module__", "") != "sphinx_thebe"
            or listener.handler.__name__
            not in ("init_thebe_core", "update_thebe_context")
        ]


def copy_mathjax(app, exception) -> None:
    """Serve MathJax from the site itself, with word of whose it is."""
    target = Path(app.outdir, MATHJAX)
    if exception is None and app.builder.name == "html" and not target.exists():
        shutil.copytree(fetch("mathjax"), target)
        asset = ASSETS["mathjax"]
        notice = f"{asset.about}\nLicence: {asset.licence}\nSource: {asset.source}\n"
        (target / "NOTICE").write_text(notice, encoding="utf-8")


def keep_percent_with_number(app, doctree, docname) -> None:
    """No line of prose ends between a number and its percent sign."""
    code = (nodes.FixedTextElement, nodes.literal, nodes.math)
    for text in list(doctree.findall(nodes.Text)):
        kept = re.sub(r"(?<=\d) %", "\N{NO-BREAK SPACE}%", text)
        if kept != text and not isinstance(text.parent, code):
            text.parent.replace(text, nodes.Text(kept))


def setup(app):
    """Register everything with Sphinx."""
    app.add_directive("listing", listing.Listing)
    app.add_config_value("book_colab", "", "html")
    app.add_config_value("book_notebook_setup", "", "html")
    app.connect("config-inited", drop_thebe, priority=1)
    app.connect("config-inited", use_own_repository, priority=1)
    app.connect("env-get-outdated", execution.add_stale)
    app.connect("env-before-read-docs", execution.execute_missing)
    app.connect("source-read", execution.stamp_source)
    app.connect("doctree-resolved", keep_percent_with_number)
    app.connect("write-started", figures.number_by_section)
    app.connect("html-page-context", figures.inline_svgs)
    app.connect("html-page-context", notebooks.add_buttons, priority=900)
    app.connect("build-finished", notebooks.publish)
    app.connect("build-finished", copy_mathjax)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
