"""The built site as a reader's browser sees it: every page, in Chromium.

Needs `_build/html` and a Chromium on the path; skips without, unless
GROUNDUP_REQUIRE_BROWSER=1. Each page is loaded once, in the light theme and then in
the dark one, and what is seen there is kept; the tests look at different sides of it.
GROUNDUP_SITE names another built site.
"""

import os
import re
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

import nbformat
import pytest

pytestmark = pytest.mark.browser

ROOT = Path(__file__).resolve().parents[2]
SITE = Path(os.environ.get("GROUNDUP_SITE", ROOT / "_build" / "html"))
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
DESKTOP = {"width": 1400, "height": 900}
PHONE = {"width": 390, "height": 844}
GENERATED = ("search", "genindex", "py-modindex", "404")  # pages with no source


def built_pages() -> list[str]:
    """Names of the pages of the site; index.html only leads to the landing page."""
    return sorted(
        name
        for file in SITE.rglob("*.html")
        if not (name := file.relative_to(SITE).with_suffix("").as_posix()).startswith(
            "_"
        )
        and name != "index"
    )


PAGES = built_pages()
NOTEBOOKS = [page for page in PAGES if (SITE / f"_notebooks/{page}.ipynb").exists()]
each_page = pytest.mark.parametrize("page", PAGES or ["(not built)"])
each_notebook = pytest.mark.parametrize("page", NOTEBOOKS or ["(not built)"])


# What a page is asked for once it has come to rest, as one object.
LOOK = r"""() => {
  const typeset = [...document.querySelectorAll(".math")];
  const walker = document.createTreeWalker(
    document.querySelector("main"), NodeFilter.SHOW_TEXT);
  let prose = "";
  while (walker.nextNode()) {
    if (!walker.currentNode.parentElement.closest("mjx-container, pre, code, script"))
      prose += walker.currentNode.data;
  }
  const label = e =>
    (e.getAttribute("alt") ?? e.getAttribute("aria-label") ?? "").trim();
  return {
    title: document.title,
    headings: document.querySelectorAll("article h1, .bd-search-container h1").length,
    bare: [...document.querySelectorAll("article img, svg.figure-svg")]
      .filter(e => label(e).length < (e.tagName === "IMG" ? 1 : 20))
      .map(e => e.outerHTML.slice(0, 120)),
    figures: document.querySelectorAll("svg.figure-svg").length,
    untypeset: typeset.filter(e => !e.querySelector("mjx-container"))
      .map(e => e.textContent.slice(0, 80)),
    math_errors: [...document.querySelectorAll("mjx-merror")].map(e => e.textContent),
    raw_tex: prose.match(
      /\$\$|\\\(|\\\[|\\begin\{|\{(?:ref|term|eq|cite|glue|numref)/)?.[0],
    links: [...document.querySelectorAll("a")].map(a =>
      a.getAttribute("href") ?? a.getAttribute("xlink:href")).filter(Boolean),
    notebook: document.querySelector("a.btn-download-notebook-button")?.href,
  };
}"""
# Wide content hides in closed boxes: open them all.
OPEN_ALL = """() => {
  for (const d of document.querySelectorAll("main details")) d.open = true;
  for (const b of document.querySelectorAll(".admonition.toggle-hidden"))
    b.classList.remove("toggle-hidden");
}"""
TOO_WIDE = """() => [...document.querySelectorAll("article *")]
  .filter(e => e.getBoundingClientRect().right > innerWidth + 1
    && !e.closest("pre, table, mjx-container, .pst-scrollable-table-container"))
  .slice(0, 5).map(e => e.outerHTML.slice(0, 120))"""
NEXT_FRAMES = """() =>
  new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"""
# Ratio of contrast, as WCAG defines it, of a figure's ink with the page behind it.
INK_CONTRAST = """() => {
  const luminance = css => {
    const [r, g, b] = css.match(/[\\d.]+/g).slice(0, 3).map(Number).map(v => v / 255)
      .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = luminance(getComputedStyle(document.body).backgroundColor);
  return [...document.querySelectorAll("svg.figure-svg")].map(e => {
    const ink = luminance(getComputedStyle(e).color);
    return (Math.max(ink, ground) + 0.05) / (Math.min(ink, ground) + 0.05);
  });
}"""


class Handler(SimpleHTTPRequestHandler):
    """Serves the site below its prefix, with its own page for what is missing."""

    prefix = "/"

    def translate_path(self, path: str) -> str:
        if not path.startswith(self.prefix):
            return str(Path(self.directory, "outside-the-site"))
        return super().translate_path("/" + path.removeprefix(self.prefix))

    def send_error(self, code, message=None, explain=None):
        missing = SITE / "404.html"
        accepts_html = "text/html" in self.headers.get("Accept", "")
        if code != 404 or not accepts_html or not missing.exists():
            return super().send_error(code, message, explain)
        body = missing.read_bytes()
        self.send_response(404)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        """Say nothing."""


@dataclass(repr=False)
class Seen:
    """What loading a page showed."""

    requests: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    look: dict = field(default_factory=dict)
    phone: tuple[int, int] = (0, 0)  # width of the content, width of the window
    too_wide: list[str] = field(default_factory=list)
    ink: list[list[float]] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)


class Browser:
    """One Chromium and one server for all pages."""

    def __init__(self, context, base: str, axe) -> None:
        self.context, self.base, self.axe = context, base, axe
        self.pages: dict[str, Seen] = {}

    def see(self, page: str) -> Seen:
        """Load page, or return what was seen before."""
        if page not in self.pages:
            self.pages[page] = self._load(f"{self.base}{page}.html")
        return self.pages[page]

    def open(self, seen: Seen, url: str):
        """A tab on url that writes down what happens; the caller closes it."""
        tab = self.context.new_page()
        tab.set_viewport_size(DESKTOP)
        tab.on("request", lambda r: seen.requests.append(r.url))
        tab.on(
            "response",
            lambda r: r.status >= 400 and seen.failed.append(f"{r.status} {r.url}"),
        )
        tab.on("requestfailed", lambda r: seen.failed.append(f"{r.failure} {r.url}"))
        tab.on(
            "console",
            lambda m: (
                m.type in ("error", "warning")
                and seen.messages.append(f"{m.type}: {m.text}")
            ),
        )
        tab.on("pageerror", lambda e: seen.messages.append(f"exception: {e}"))
        tab.goto(url)
        tab.evaluate("() => window.MathJax?.startup?.promise")
        return tab

    def _load(self, url: str) -> Seen:
        seen = Seen()
        tab = self.open(seen, url)
        seen.look = tab.evaluate(LOOK)
        # What was asked for until here is the page's own; axe loads nothing (preload).
        for theme in ("light", "dark"):
            tab.emulate_media(color_scheme=theme)
            tab.wait_for_function(
                "theme => document.documentElement.dataset.theme === theme", arg=theme
            )
            tab.evaluate(NEXT_FRAMES)
            tab.wait_for_function("document.getAnimations().length === 0")
            seen.ink.append(tab.evaluate(INK_CONTRAST))
            # Only colours differ from one theme to the other.
            rules = {} if theme == "light" else {"runOnly": ["color-contrast"]}
            options = {"resultTypes": ["violations"], "preload": False} | rules
            for violation in self.axe.run(tab, options=options).response["violations"]:
                if violation["impact"] in ("serious", "critical"):
                    nodes = [node["html"][:160] for node in violation["nodes"][:4]]
                    seen.violations.append(
                        f"{theme}: {violation['id']} ({violation['impact']}), "
                        f"{len(violation['nodes'])} times: " + " | ".join(nodes)
                    )
        tab.set_viewport_size(PHONE)
        tab.evaluate(OPEN_ALL)
        tab.evaluate(NEXT_FRAMES)
        seen.phone = tuple(
            tab.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        )
        seen.too_wide = tab.evaluate(TOO_WIDE)
        tab.close()
        return seen


def unavailable(reason: str):
    """Skip, or fail where the checks are required."""
    if os.environ.get("GROUNDUP_REQUIRE_BROWSER") == "1":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def browser(tmp_path_factory) -> Iterator[Browser]:
    if not PAGES:
        unavailable(f"the site is not built: no page in {SITE} (make book)")
    executable = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if executable is None:
        unavailable(f"no browser: none of {', '.join(CHROMIUM)} is on the path")
    try:
        from axe_playwright_python.sync_playwright import Axe
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        unavailable(f"{error} (pip install -e '.[dev]')")
    # The missing page names its files from the root of the host, with the prefix.
    missing = (SITE / "404.html").read_text(encoding="utf-8")
    prefix = re.search(r'href="(/[^"]*?)_static/', missing)[1]
    handler = partial(type("Site", (Handler,), {"prefix": prefix}), directory=SITE)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with sync_playwright() as playwright:
        # Playwright gives each launch an empty profile of its own.
        chromium = playwright.chromium.launch(executable_path=executable, args=FLAGS)
        context = chromium.new_context(
            viewport=DESKTOP,
            color_scheme="light",
            reduced_motion="reduce",  # colours and boxes change at once
        )
        context.set_default_timeout(120_000)  # for a busy machine
        yield Browser(context, f"http://127.0.0.1:{server.server_port}{prefix}", Axe())
        chromium.close()
    server.shutdown()
    server.server_close()


@each_page
def test_asks_no_other_host(browser, page):
    elsewhere = [
        url
        for url in browser.see(page).requests
        if not url.startswith((browser.base, "data:", "blob:"))
    ]
    assert not elsewhere


@each_page
def test_everything_it_asks_for_is_there(browser, page):
    assert browser.see(page).failed == []


@each_page
def test_console_is_silent(browser, page):
    assert browser.see(page).messages == []


@each_page
def test_nothing_sticks_out_on_a_phone(browser, page):
    seen = browser.see(page)
    content, window = seen.phone
    assert window == PHONE["width"]
    assert content <= window, f"{content} px wide: {seen.too_wide}"
    assert not seen.too_wide


@each_page
def test_has_one_title(browser, page):
    look = browser.see(page).look
    assert look["headings"] == 1
    assert look["title"]


@each_page
def test_pictures_say_what_they_show(browser, page):
    assert not browser.see(page).look["bare"]


@each_page
def test_maths_is_typeset(browser, page):
    look = browser.see(page).look
    assert not look["untypeset"]
    assert not look["math_errors"]
    assert look["raw_tex"] is None, "markup is left in the text"


@each_page
def test_readable_for_all(browser, page):
    violations = browser.see(page).violations
    assert violations == [], "\n".join(violations)


@each_page
def test_ink_of_figures_follows_the_theme(browser, page):
    light, dark = browser.see(page).ink
    assert len(light) == len(dark) == browser.see(page).look["figures"]
    assert all(ratio >= 7 for ratio in light + dark), (light, dark)


@each_page
def test_links_lead_somewhere(browser, page):
    here = f"{browser.base}{page}.html"
    broken = []
    for link in browser.see(page).look["links"]:
        url, anchor = urldefrag(urljoin(here, link))
        if not url.startswith(browser.base):
            assert urlsplit(url).scheme in ("https", "mailto"), link
            continue
        name = unquote(urlsplit(url.removeprefix(browser.base)).path) or "index.html"
        if not (SITE / name).is_file() or (anchor and unquote(anchor) not in ids(name)):
            broken.append(link)
    assert not broken


@cache
def ids(name: str) -> set[str]:
    """The places in a page that a link can point at."""
    text = (SITE / name).read_text(encoding="utf-8")
    return set(re.findall(r'\sid="([^"]+)"', text))


@each_notebook
def test_offers_its_notebook(browser, page):
    url = browser.see(page).look["notebook"]
    assert url == f"{browser.base}_notebooks/{page}.ipynb"
    notebook = nbformat.read(SITE / f"_notebooks/{page}.ipynb", as_version=4)
    nbformat.validate(notebook)
    outputs = [
        output
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
    ]
    assert outputs
    assert all(output.output_type != "error" for output in outputs)


def test_every_page_with_code_has_a_notebook(browser):
    with_code = [
        page
        for page in PAGES
        if page not in GENERATED
        and 'class="cell ' in (SITE / f"{page}.html").read_text(encoding="utf-8")
    ]
    assert with_code == NOTEBOOKS


def test_no_page_names_the_machine_that_built_it(browser):
    named = [page for page in PAGES if str(ROOT) in (SITE / f"{page}.html").read_text()]
    assert not named


def test_the_root_leads_to_the_landing_page(browser):
    tab = browser.context.new_page()
    tab.goto(browser.base, wait_until="commit")
    tab.wait_for_url("**/book/intro.html")
    assert tab.title().startswith("LLMs from the Ground Up")
    tab.close()


def test_a_missing_page_is_answered_by_our_own(browser):
    seen = Seen()
    tab = browser.open(seen, f"{browser.base}no/such/page.html")
    assert "not found" in tab.inner_text("article h1").lower()
    assert tab.locator("nav.bd-links a").count() > 10
    tab.close()
    assert seen.failed == [f"404 {browser.base}no/such/page.html"]


def test_the_map_leads_to_every_part(browser):
    seen = Seen()
    tab = browser.open(seen, f"{browser.base}book/intro.html")
    links = tab.eval_on_selector_all(
        "svg.figure-svg a",
        "all => all.map(a => a.getAttribute('href') ?? a.getAttribute('xlink:href'))",
    )
    tab.close()
    parts = {path.parent.name for path in (ROOT / "book").glob("*/index.md")}
    assert len(parts) == 11
    assert parts <= {link.split("/")[0] for link in links}


def test_search_finds_a_word(browser):
    seen = Seen()
    tab = browser.open(seen, f"{browser.base}search.html?q=softmax")
    tab.wait_for_selector("#search-results li a")
    assert "Glossary" in tab.inner_text("#search-results")
    tab.close()
    assert not seen.failed


def test_a_solution_opens_from_the_keyboard(browser):
    page = next(
        (
            p
            for p in PAGES
            if 'class="solution' in (SITE / f"{p}.html").read_text("utf-8")
        ),
        None,
    )
    if page is None:
        pytest.skip("no page of this site has a solution")
    tab = browser.open(Seen(), f"{browser.base}{page}.html")
    solution = tab.locator(".admonition.solution").first
    assert "toggle-hidden" in solution.get_attribute("class")
    solution.locator("button.toggle-button").press("Enter")
    tab.wait_for_function(
        "!document.querySelector('.admonition.solution.toggle-hidden')"
        " || !document.querySelector('.admonition.solution')"
        ".classList.contains('toggle-hidden')"
    )
    tab.close()
