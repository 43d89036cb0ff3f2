r"""The plays of Shakespeare as plain text: what most models of this book train on.

Here: the asset `shakespeare` (38 plays, the 37 of the canon and Edward III) with
its Markdown taken off. The words are all kept: headings, speakers, stage
directions and speeches, in their order. A play then looks like this:

    Hamlet

    ACT I

    SCENE I. Elsinore. A platform before the castle.

    [FRANCISCO at his post. Enter to him BERNARDO]

    BERNARDO:
    Who's there?

A speaker stands on a line of its own before a colon, as in the Tiny Shakespeare
file. Stage directions stand in square brackets, each on one line, and so do a few
words that editors supplied (`[ ]` where they had none). A blank line separates
speeches. The text is ASCII, so a character is a byte: letters, digits, the newline,
the space and some punctuation (dashes are written `--`). Slips of the edition, such
as "sha$l", stay. Left out: tokenizing, and the split into training and validation
text (Part 2).

The plays are in the public domain; the Markdown edition is by Sean Stewart, MIT.
"""

import html
import re
from functools import cache

from groundup.foundations.assets import fetch

# Titles that the edition lacks or spells unlike the others.
_TITLES = {
    "measure-for-measure": "Measure for Measure",
    "henry-iv-part-1": "Henry IV, Part 1",
}
_HEADING = re.compile(r"^#+ +(.*)$", re.M)
_SPEAKER = re.compile(r"^\*\*([^*\n]+)\*\*$", re.M)
# Whole lines, up to the first that closes: _Exit_, *Exit.*, _\[Aside]_; two plays
# have lost the opening mark of some: [Aside]_
_DIRECTION = re.compile(r"^(?:[_*]+|(?=\[[^]\n]*\]_$))(.+?(?:\n.+?)*?)[_*]+$", re.M)
# Inside a line: a word that the editors supplied, or "[ ]" where they had none.
_BRACKET = re.compile(r"_+\\\[([^]\n]*)\]_+")
_ESCAPE = re.compile(r"\\([!-/:-@\[-`{-~])")


def clean(markdown: str) -> str:
    """Take the markup off one play and keep every word.

    Example: `**HAMLET**` over `_\\[Aside]_` over `A little more than kin` gives
    `HAMLET:`, `[Aside]`, `A little more than kin`.
    """
    text = html.unescape(markdown).replace("—", "--")
    text = re.sub(r"[ \t]+$", "", text, flags=re.M)
    text = _HEADING.sub(r"\1", text)
    text = _SPEAKER.sub(r"\1:", text)
    text = _BRACKET.sub(r"[\1]", text)
    text = _DIRECTION.sub(_direction, text)
    text = _ESCAPE.sub(r"\1", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _direction(found: re.Match) -> str:
    words = re.sub(r"[_*\\\[\]]", "", found[1]).split()
    return f"[{' '.join(words)}]"


@cache
def plays() -> dict[str, str]:
    """Return the cleaned plays by title, in alphabetical order.

    Raises:
        AssetError: the plays are not in the cache and cannot be downloaded.

    Example: `plays()["Hamlet"]`, about 180,000 characters.
    """
    found = {}
    for path in fetch("shakespeare").glob("*/*.md"):
        markdown = path.read_text("utf-8")
        if path.stem in _TITLES:
            body = re.sub(r"\A# .*\n", "", markdown)
            markdown = f"# {_TITLES[path.stem]}\n\n{body}"
        text = clean(markdown)
        found[text.partition("\n")[0]] = text
    return dict(sorted(found.items()))


@cache
def text() -> str:
    """Return all plays as one string of about five million ASCII characters.

    They follow each other in the order of `plays`, two blank lines between them.
    """
    return "\n\n".join(plays().values())
