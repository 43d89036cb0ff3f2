"""Figures that belong to the page: inlined SVG, and numbers that carry the section.

An SVG behind <img> cannot see the page's colours or hold links. Inlined, its ink
follows the theme, and the boxes of a drawing can link to pages (`doc:` addresses).
"""

import html
import re
from itertools import count
from pathlib import Path

from groundup.plotting import INK

IMAGE = re.compile(r'<img\b[^>]*?\bsrc="([^"]+\.svg)"[^>]*?>')
ATTRIBUTE = re.compile(r'([\w-]+)="([^"]*)"')
ROOT_TAG = re.compile(r"<svg\b[^>]*>")
NOISE = re.compile(
    r"<\?xml.*?\?>|<!DOCTYPE.*?>|<!--.*?-->|<metadata>.*?</metadata>", re.S
)
IDENTIFIER = re.compile(r'\sid="([^"]+)"')
REFERENCE = re.compile(r'(?:url\(#|href="#)([^")]+)')
# Attributes of the root that the page sets itself.
REPLACED = ("width", "height", "style", "class", "id", "role", "version")
SECTION = re.compile(r"^([0-9A-G](?:\.\d+)?)\s")


def inline_svgs(app, pagename, templatename, context, doctree) -> None:
    """Replace each SVG image of a page by its drawing."""
    if "body" not in context:
        return
    files = {name: source for source, name in app.builder.images.items()}
    serial = count(1)

    def link(docname: str) -> str:
        return context["pathto"](docname)

    def replace(match: re.Match) -> str:
        source = files.get(match[1].rpartition("/")[2])
        if source is None:  # the logo, or a picture from elsewhere
            return match[0]
        attributes = dict(ATTRIBUTE.findall(match[0]))
        text = Path(app.srcdir, source).read_text(encoding="utf-8")
        app.builder.images.pop(source, None)  # no copy beside the page is needed
        return inline(text, attributes, prefix=f"f{next(serial)}-", link=link)

    context["body"] = IMAGE.sub(replace, context["body"])


def inline(svg: str, attributes: dict[str, str], *, prefix: str, link) -> str:
    """Return an SVG document as an element for an HTML page.

    Args:
        svg: the document; mid-grey ink becomes the colour of the text around.
        attributes: of the <img> it replaces; alt becomes the label, style is kept.
        prefix: put before every id, so that two drawings on a page cannot clash.
        link: turns the docname of a `doc:` address into a relative address.
    """
    body = NOISE.sub("", svg).replace(INK, "currentColor")
    used = set(REFERENCE.findall(body))
    body = IDENTIFIER.sub(
        lambda m: f' id="{prefix}{m[1]}"' if m[1] in used else "", body
    )
    body = re.sub(r'(url\(#|href="#)', rf"\g<1>{prefix}", body)
    body = re.sub(r'href="doc:([^"]+)"', lambda m: f'href="{link(m[1])}"', body)
    root = dict(ATTRIBUTE.findall(ROOT_TAG.search(body)[0]))
    style = attributes.get("style") or (
        f"width: {root['width']}" if "width" in root else "width: 100%"
    )
    alt = html.unescape(attributes.get("alt", ""))
    # An image is one thing to a screen reader; a drawing with links is a group.
    role = "group" if "<a " in body else "img"
    kept = " ".join(
        f'{key}="{value}"' for key, value in root.items() if key not in REPLACED
    )
    head = (
        f'<svg class="figure-svg" role="{role}" aria-label="{html.escape(alt)}" '
        f'style="{style}" {kept}>'
    )
    return ROOT_TAG.sub(lambda m: head, body, count=1).strip()


def number_by_section(app, builder) -> None:
    """Number figures, listings, equations and exercises within their page.

    The third figure of page 1.2 is Fig. 1.2.3, whatever stands on other pages. The
    section is the number that the page's title begins with. For the event
    `write-started`: Sphinx keeps the plain numbers, and checks consistency only where a
    source has changed, but pages are also written anew when the old ones are gone.
    """
    env = builder.env
    for docname, kinds in env.toc_fignumbers.items():
        section = SECTION.match(env.titles[docname].astext() + " ")
        if section is None:
            continue
        parts = tuple(section[1].split("."))
        for numbers in kinds.values():
            in_order = sorted(numbers, key=numbers.get)
            for index, node_id in enumerate(in_order, start=1):
                numbers[node_id] = (*parts, index)
