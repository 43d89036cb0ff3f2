"""The pieces of the Sphinx extension that decide what a reader sees."""

import re
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import nbformat
import pytest
from docutils import nodes
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from sphinx.errors import ExtensionError

import bookbuild
import execution
import figures
import listing
import notebooks
from groundup.plotting import INK, use_book_style

ROOT = Path(__file__).resolve().parents[2]

PAGE = """\
---
file_format: mystnb
kernelspec:
  name: python3
  display_name: Python 3
---

# A page
"""


# Stamping


def test_stamp_keeps_every_line_and_names_the_fingerprint():
    stamped = execution.stamp(PAGE, ROOT / "book/x.md", ROOT)
    before, after = PAGE.splitlines(), stamped.splitlines()
    changed = [
        i
        for i, pair in enumerate(zip(before, after, strict=True))
        if len(set(pair)) > 1
    ]
    assert changed == [4]
    assert re.fullmatch(r"  display_name: Python 3 \([0-9a-f]{12}\)", after[4])


def test_stamp_leaves_plain_pages_alone():
    assert execution.stamp("# Plain\n", ROOT / "book/x.md", ROOT) == "# Plain\n"


def test_a_page_that_cannot_carry_the_fingerprint_is_refused():
    page = PAGE.replace("Python 3", "My kernel")
    with pytest.raises(ExtensionError, match="display_name: Python 3"):
        execution.stamp(page, ROOT / "book/x.md", ROOT)


@pytest.fixture
def clone(tmp_path):
    """A page that names an artifact, and the artifact."""
    page = tmp_path / "book/x.md"
    folder = tmp_path / "book/artifacts/ladder"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    page.write_text(PAGE + "\n```{code-cell} ipython3\nload('ladder')\n```\n")
    return page, folder


def test_a_page_that_recorded_is_kept_under_the_fingerprint_it_has_then(
    clone, monkeypatch
):
    page, folder = clone
    root = page.parents[1]
    for flag, anew in (("", False), ("other", False), ("ladder", True), ("all", True)):
        monkeypatch.setenv("GROUNDUP_REBUILD", flag)
        notebook = execution.read_stamped(page, root)
        before = notebook.metadata.kernelspec.display_name
        (folder / "values.json").write_text(f"while running with {flag}")
        execution.stamp_anew(notebook, page, root)
        now = execution.read_stamped(page, root).metadata.kernelspec.display_name
        assert now != before
        assert notebook.metadata.kernelspec.display_name == (now if anew else before)


def test_a_build_that_records_waits_for_its_cells(monkeypatch):
    monkeypatch.delenv("GROUNDUP_REBUILD", raising=False)
    assert execution.seconds_per_cell() == execution.SECONDS_PER_CELL
    monkeypatch.setenv("GROUNDUP_REBUILD", "ladder")
    assert execution.seconds_per_cell() is None


# Figures


def drawing():
    use_book_style()
    fig, ax = plt.subplots()
    ax.plot([0, 1], [0, 1], marker="o")
    ax.set_xlabel("steps")
    out = StringIO()
    fig.savefig(out, format="svg")
    plt.close(fig)
    return out.getvalue()


def inline(svg, prefix="f1-", **attributes):
    return figures.inline(
        svg, attributes, prefix=prefix, link=lambda name: f"../{name}.html"
    )


def test_ink_becomes_the_colour_of_the_page():
    svg = drawing()
    assert INK in svg
    out = inline(svg)
    assert INK not in out
    assert "currentColor" in out


def test_every_reference_finds_its_target_and_ids_do_not_clash():
    out = inline(drawing())
    targets = set(re.findall(r'\sid="([^"]+)"', out))
    references = set(re.findall(r'(?:url\(#|href="#)([^")]+)', out))
    assert references
    assert references <= targets
    other = set(re.findall(r'\sid="([^"]+)"', inline(drawing(), prefix="f2-")))
    assert not targets & other


def test_alt_text_becomes_the_label():
    out = inline(drawing(), alt="a &lt; b")
    head = re.match(r"<svg[^>]*>", out)[0]
    assert 'role="img"' in head
    assert 'aria-label="a &lt; b"' in head
    assert "width:" in head
    assert " height=" not in head


def test_links_of_a_drawing_lead_to_pages():
    out = inline('<svg viewBox="0 0 1 1"><a href="doc:book/x"><text>x</text></a></svg>')
    assert '<a href="../book/x.html">' in out
    assert 'role="group"' in out


def test_a_drawing_keeps_the_styling_of_its_root():
    out = inline('<svg viewBox="0 0 9 9" width="9" text-anchor="middle"><g/></svg>')
    assert 'text-anchor="middle"' in out
    assert 'viewBox="0 0 9 9"' in out
    assert ' width="9"' not in out


def numbered(title, **kinds):
    env = SimpleNamespace(
        toc_fignumbers={"page": kinds},
        titles={"page": SimpleNamespace(astext=lambda: title)},
    )
    figures.number_by_section(None, SimpleNamespace(env=env))
    return env.toc_fignumbers["page"]


def test_numbers_carry_the_section_and_start_anew():
    found = numbered("1.2 Attention", figure={"b": (8,), "a": (7,)}, table={"t": (3,)})
    assert found == {
        "figure": {"a": ("1", "2", 1), "b": ("1", "2", 2)},
        "table": {"t": ("1", "2", 1)},
    }
    assert numbered("B Interpretability", figure={"a": (9,)})["figure"]["a"] == ("B", 1)


def test_numbers_of_unnumbered_pages_stay():
    assert numbered("Basics", figure={"a": (7,)}) == {"figure": {"a": (7,)}}


def test_a_percent_sign_stays_with_its_number():
    prose, code = nodes.paragraph("", "from 5 % to 0.4 %, % alone"), "x = 7 % 3"
    page = nodes.section("", prose, nodes.literal_block("", code))
    bookbuild.keep_percent_with_number(None, page, "page")
    space = "\N{NO-BREAK SPACE}"
    assert prose.astext() == f"from 5{space}% to 0.4{space}%, % alone"
    assert page[1].astext() == code


# Listings


def test_listing_finds_functions_classes_and_methods():
    path, name = listing.locate("groundup.transformer.single_head.Head.forward", ROOT)
    assert (path.name, name) == ("single_head.py", "Head.forward")
    source = listing.source_of("groundup.transformer.single_head.causal_mask", ROOT)
    assert source.startswith("def causal_mask(")
    assert source.rstrip().endswith("return ones.tril(n_keys - n_queries)")


@pytest.mark.parametrize(
    "name", ["groundup.nothing.f", "groundup.plotting.nothing", "torch.nn.Linear"]
)
def test_listing_of_what_is_not_there_fails(name):
    with pytest.raises(LookupError, match=f"no module of groundup holds {name}"):
        listing.locate(name, ROOT)


# Notebooks


@pytest.fixture
def app():
    entry = SimpleNamespace(
        persons={
            "author": [
                SimpleNamespace(last_names=[n])
                for n in ("Vaswani", "Shazeer", "Parmar")
            ]
        },
        fields={"year": "2017"},
    )
    pair = SimpleNamespace(
        persons={
            "author": [SimpleNamespace(last_names=[n]) for n in ("Hendrycks", "Gimpel")]
        },
        fields={"year": "2016"},
    )
    domains = {
        "std": SimpleNamespace(
            labels={"sec-x": ("book/x", "sec-x", "1.1 X")},
            anonlabels={"fig-x": ("book/x", "fig-x")},
            objects={("term", "softmax"): ("book/glossary", "term-softmax")},
        ),
        "math": SimpleNamespace(equations={"eq-x": ("book/x", 1)}),
        "py": SimpleNamespace(objects={}),
        "cite": SimpleNamespace(
            bibdata=SimpleNamespace(
                data=SimpleNamespace(entries={"v": entry, "h": pair})
            )
        ),
    }
    env = SimpleNamespace(
        get_domain=domains.__getitem__,
        titles={"book/x": SimpleNamespace(astext=lambda: "1.1 X")},
        toc_fignumbers={
            "book/x": {
                "figure": {"fig-x": ("1", "1", 2)},
                "displaymath": {"equation-eq-x": ("1", "1", 3)},
            }
        },
    )
    config = SimpleNamespace(
        html_baseurl="https://example.org/", book_notebook_setup="import groundup"
    )
    return SimpleNamespace(env=env, srcdir=str(ROOT), config=config)


SITE = "https://example.org/book"


@pytest.mark.parametrize(
    ("myst", "plain"),
    [
        ("(sec-x)=\n# T\n", "# T\n"),
        ("See {ref}`sec-x`.", f"See [1.1 X]({SITE}/x.html#sec-x)."),
        ("{ref}`that <sec-x>`", f"[that]({SITE}/x.html#sec-x)"),
        ("{numref}`fig-x`", f"[Fig. 1.1.2]({SITE}/x.html#fig-x)"),
        ("{eq}`eq-x`", f"[(1.1.3)]({SITE}/x.html#equation-eq-x)"),
        ("{doc}`../x`", f"[1.1 X]({SITE}/x.html)"),
        ("{term}`softmax`", f"[softmax]({SITE}/glossary.html#term-softmax)"),
        ("{cite}`v,h`", "[Vaswani et al., 2017; Hendrycks and Gimpel, 2016]"),
        ("{glue:text}`loss`", "1.23"),
        ("{src}`code/x.py`", "`code/x.py`"),
        ("{math}`x^2`", "$x^2$"),
        ("$$\nx\n$$ (eq-x)\n", "$$\nx\n$$\n\n*(1.1.3)*\n"),
        ("```{bibliography}\n```\n", "\n"),
        ("````{solution-end}\n````\n", "\n"),
        (
            "```{note}\nA {cite}`h`.\n```",
            "> **Note**\n>\n> A [Hendrycks and Gimpel, 2016].",
        ),
        (
            "```{exercise} Try\n:label: ex-x\n\nDo it.\n```",
            "> **Exercise: Try**\n>\n> Do it.",
        ),
    ],
)
def test_myst_becomes_plain_markdown(app, myst, plain):
    convert = notebooks.PlainMarkdown(app, "book/part/y", {"loss": "1.23"}).convert
    assert convert(myst) == plain


def executed():
    figure = {"figure": {"name": "fig-x", "caption": "What {cite}`h` found."}}
    scrap = new_output(
        "display_data",
        {notebooks.GLUED: "'1.23'"},
        metadata={"scrapbook": {"name": "loss"}},
    )
    picture = new_output("display_data", {"image/svg+xml": "<svg/>"})
    return new_notebook(
        cells=[
            new_markdown_cell("Loss {glue:text}`loss`."),
            new_code_cell("from myst_nb import glue\nx = 1", execution_count=1),
            new_code_cell(
                'glue("loss", "1.23", display=False)',
                metadata={"tags": ["remove-cell"]},
                outputs=[scrap],
            ),
            new_code_cell("plot()", metadata={"mystnb": figure}, outputs=[picture]),
        ]
    )


def test_notebook_stands_alone(app):
    notebook = notebooks.standalone(app, "book/x", executed())
    nbformat.validate(notebook)
    sources = [cell.source for cell in notebook.cells]
    assert sources == [
        "import groundup",
        "Loss 1.23.",
        "x = 1",
        "plot()",
        "**Fig. 1.1.2** What [Hendrycks and Gimpel, 2016] found.",
    ]
    assert notebook.cells[3].outputs[0].data["image/svg+xml"] == "<svg/>"


def test_a_shown_cell_that_glues_is_refused(app):
    page = executed()
    page.cells[3].source = 'glue("a", 1)'
    with pytest.raises(ExtensionError, match="a cell that is shown calls glue"):
        notebooks.standalone(app, "book/x", page)
