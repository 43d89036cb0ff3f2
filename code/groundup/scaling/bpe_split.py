"""Pre-tokens: the pieces into which a text is cut before any pair is merged.

Here: the patterns of published tokenizers under the names of their models, cutting,
and where a text may be cut in two without changing a pre-token. Left out:
normalisation (Qwen's own code brings a text to the form NFC first; ours never changes
a text), and scripts without spaces, which these patterns leave in one piece.

Sources: Radford et al. (2019), section 2.2, for the reason; each pattern has its own.
Page: book/4-scaling/bpe.md.
"""

import re

import regex

# openai/gpt-2, encoder.py: contractions, then words, numbers and signs, each with the
# space before it, then spaces. A run of spaces leaves its last one to the next word.
_GPT_2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# openai/tiktoken, openai_public.py, cl100k_base: at most three digits together, any
# sign before a word, line breaks by themselves or at the end of signs.
_GPT_4 = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
# QwenLM/Qwen, tokenization_qwen.py: as GPT-4's first version, each digit by itself.
_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# SmolLM2's tokenizer.json cuts twice, first around every digit, then as GPT-2. In one
# pattern: a digit ends a run of spaces as the end of the text does.
_SMOLLM = (
    r"'(?:[sdmt]|ll|ve|re)|\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
)
PATTERNS = {"gpt-2": _GPT_2, "gpt-4": _GPT_4, "qwen": _QWEN, "smollm": _SMOLLM}
# More text can change the last pre-tokens: a quote before "re", spaces before a line
# break, a word that goes on. With the patterns above never more than three.
N_OPEN = 3


class Splitter:
    """One way to cut text into pre-tokens; joined, they are the text again.

    Args:
        cut: a key of `PATTERNS`, or a regular expression of the package `regex`.

    Raises:
        ValueError: cut is neither.
    """

    def __init__(self, cut: str) -> None:
        self.pattern = PATTERNS.get(cut, cut)
        self.is_known = self.pattern in PATTERNS.values()
        try:
            compiled = regex.compile(self.pattern)
        except regex.error as error:
            raise ValueError(
                f"cut must be one of {sorted(PATTERNS)} or a regular expression; "
                f"got {cut!r}: {error}"
            ) from error
        if compiled.groups:
            raise ValueError(
                f"cut must not capture groups (write (?:...)); got {cut!r}"
            )
        self._find = compiled.findall
        # For ASCII Python's own engine will do, and is twice as fast.
        ascii_too = self.is_known and re.compile(_in_ascii(self.pattern), re.ASCII)
        self._find_ascii = ascii_too.findall if ascii_too else self._find

    def __call__(self, text: str) -> list[str]:
        """Return the pre-tokens of text.

        Raises:
            ValueError: text holds half of a surrogate pair, which is no character, or
                a pattern of your own leaves a part of it out.

        Example: `Splitter("gpt-2")("It's 10 km")` is `["It", "'s", " 10", " km"]`.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"text must consist of characters; got the surrogate "
                f"U+{ord(text[error.start]):04X} at position {error.start}, half of a "
                f"pair of UTF-16 that was cut apart before it came here"
            ) from error
        pieces = (self._find_ascii if text.isascii() else self._find)(text)
        if not self.is_known and sum(map(len, pieces)) != len(text):
            raise ValueError(f"cut leaves a part of the text out: {self.pattern!r}")
        return pieces

    def settled(self, text: str) -> int:
        """Return where to cut the beginning of a longer text, 0 if nowhere.

        `self(text[:n]) + self(text[n:] + more)` is `self(text + more)` for any `more`.

        Raises:
            ValueError: the pattern is not one of `PATTERNS`; how far another looks
                ahead is not known.
        """
        if not self.is_known:
            raise ValueError(
                f"only the patterns {sorted(PATTERNS)} can be applied piece by piece; "
                f"this one is {self.pattern!r}"
            )
        # No pre-token holds a space after something else, so a space there begins one.
        at = text.rfind(" ", 1)
        if at > 0 and not text[at - 1].isspace():
            return at
        pieces = self(text)[:-N_OPEN]
        while pieces and pieces[-1][-1].isspace():  # how a run of spaces is cut
            pieces.pop()  # depends on what follows it
        return sum(map(len, pieces))


def _in_ascii(pattern: str) -> str:
    """Return a pattern for `re` that does the same to a text in ASCII."""

    def in_brackets(found: re.Match) -> str:
        return found[0].replace(r"\p{L}", "A-Za-z").replace(r"\p{N}", "0-9")

    pattern = re.sub(r"\[[^]]*\]", in_brackets, pattern)
    return pattern.replace(r"\p{L}", "[A-Za-z]").replace(r"\p{N}", "[0-9]")
