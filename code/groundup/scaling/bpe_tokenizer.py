"""A tokenizer made of learned tokens: text to ids and back.

Here: encoding with a memory for pre-tokens, decoding, special tokens that no text can
produce unless they are asked for, a vocabulary learned from texts. Left out: files
(`bpe_files`), normalisation, merges left out at random while training.

Source: Radford et al. (2019), section 2.2, for bytes as the alphabet.
Page: book/4-scaling/bpe.md. Axes: `N` tokens.
"""

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from itertools import chain

import numpy as np
import regex
import torch
from jaxtyping import Int
from torch import Tensor

from groundup.scaling.bpe import BYTES, N_BYTES, count_words, learn_merges
from groundup.scaling.bpe_merge import merge
from groundup.scaling.bpe_split import PATTERNS, Splitter

END_OF_TEXT = "<|endoftext|>"  # between documents, as GPT-2 has it
# Pre-tokens that are remembered; longer ones than this many characters never are.
REMEMBERED, REMEMBERED_LENGTH = 1 << 17, 64


class BPETokenizer:
    """Byte-pair encoding with given tokens; fulfils `training.byte_level.Tokenizer`.

    Args:
        tokens: the bytes of each token, and its id. Smaller ids are merged first.
        cut: how text becomes pre-tokens, as of `Splitter`.
        special: names of tokens that stand for themselves, and their ids.

    Raises:
        ValueError: the ids are not 0, 1, 2, ..., each once, or a token is empty.
    """

    def __init__(
        self,
        tokens: Mapping[bytes, int],
        cut: str = "gpt-4",
        special: Mapping[str, int] | None = None,
    ) -> None:
        self._split, self.special = Splitter(cut), dict(special or {})
        ids = sorted([*tokens.values(), *self.special.values()])
        if ids != list(range(len(ids))) or b"" in tokens or "" in self.special:
            raise ValueError(
                f"tokens and special must have the ids 0 to {len(ids) - 1}, each once, "
                f"and none may be empty; got {_first_wrong(ids)}"
            )
        self._rank = dict(tokens)
        self._bytes = {i: token for token, i in tokens.items()}
        self._bytes |= {i: name.encode() for name, i in self.special.items()}
        self._known = _Memory(self)

    @classmethod
    def learn(
        cls,
        texts: Iterable[str],
        n_vocab: int,
        *,
        cut: str = "gpt-4",
        ties: str = "greatest",
        special: Collection[str] = (END_OF_TEXT,),
    ) -> "BPETokenizer":
        """Learn a vocabulary from texts: the bytes, then merges, then special tokens.

        `n_vocab` of the result may be smaller: it counts what was found to learn.

        Args:
            texts: documents; no token spans two.
            n_vocab: entries to learn at most, bytes and special tokens included.
            cut: as of `Splitter`.
            ties: a key of `bpe.TIES`.
            special: names of special tokens; they get the last ids.

        Raises:
            ValueError: n_vocab has no room for the bytes and the special tokens.
        """
        n_merges = n_vocab - N_BYTES - len(special)
        if n_merges < 0:
            raise ValueError(
                f"n_vocab must be at least {n_vocab - n_merges}, for the bytes and "
                f"{len(special)} special tokens; got {n_vocab}"
            )
        merges = learn_merges(count_words(texts, cut), n_merges, ties=ties)
        return cls.of_merges(merges, cut, special)

    @classmethod
    def of_merges(
        cls,
        merges: Iterable[tuple[bytes, bytes]],
        cut: str = "gpt-4",
        special: Collection[str] = (),
    ) -> "BPETokenizer":
        """Number the bytes, then what the merges make, then the special tokens."""
        tokens = [*BYTES, *(a + b for a, b in merges)]
        names = {name: len(tokens) + i for i, name in enumerate(special)}
        return cls({token: i for i, token in enumerate(tokens)}, cut, names)

    @property
    def n_vocab(self) -> int:
        """V: ids are in [0, V), and each of them stands for something."""
        return len(self._bytes)

    @property
    def tokens(self) -> dict[bytes, int]:
        """The ordinary tokens and their ids, in the order in which they are merged."""
        return dict(sorted(self._rank.items(), key=lambda item: item[1]))

    @property
    def cut(self) -> str:
        """The name of the pattern that cuts text, or the pattern if it has none."""
        names = {pattern: name for name, pattern in PATTERNS.items()}
        return names.get(self._split.pattern, self._split.pattern)

    @property
    def digest(self) -> str:
        """SHA-256 in hexadecimal of the pattern, the tokens and the special tokens."""
        parts = [self._split.pattern, [t.hex() for t in self.tokens], self.special]
        # Sorted: the order in which special tokens were named changes no id.
        text = json.dumps(parts, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def encode(self, text: str, *, allow: Collection[str] = ()) -> Int[Tensor, "N"]:
        """Return the ids of text.

        A special token's name inside text is text like any other, so that nobody can
        smuggle one in, unless the caller allows it.

        Args:
            text: any characters.
            allow: names that become special tokens; "all" for all of them.

        Raises:
            ValueError: text holds half of a surrogate pair, or a byte for which there
                is no token; allow names something that is no special token.
        """
        allow = self.special if allow == "all" else allow
        if unknown := set(allow) - self.special.keys():
            raise ValueError(
                f"allow must name special tokens, {sorted(self.special)}; "
                f"got {sorted(unknown)[0]!r}"
            )
        ids: list[int] = []
        # Every second part is a name; of two that begin alike, the longer one counts.
        names = "|".join(map(regex.escape, sorted(allow, key=len, reverse=True)))
        parts = regex.split(f"({names})", text) if names else [text]
        for i, part in enumerate(parts):
            if i % 2:
                ids.append(self.special[part])
            else:
                words = map(self._known.__getitem__, self._split(part))
                ids.extend(chain.from_iterable(words))
        # By way of NumPy, which reads a list seven times as fast as torch does.
        return torch.from_numpy(np.array(ids, dtype=np.int64))

    def settled(self, text: str) -> int:
        """Return how many characters of text can be encoded before more of it comes.

        See `Splitter.settled`.
        """
        return self._split.settled(text)

    def to_bytes(self, ids: Int[Tensor, "N"]) -> bytes:
        """Return the bytes of ids, a special token's name for a special token.

        Raises:
            ValueError: an id is outside [0, V).
        """
        try:
            return b"".join(map(self._bytes.__getitem__, ids.tolist()))
        except KeyError as error:
            raise ValueError(
                f"ids must be in [0, {self.n_vocab}); got {error.args[0]}"
            ) from None

    def decode(self, ids: Int[Tensor, "N"]) -> str:
        """Return the text of ids, with U+FFFD where their bytes are no text.

        `decode(encode(text))` is text, with any `allow`. Some sequences of ids are no
        text: they break off inside a character.

        Raises:
            ValueError: an id is outside [0, V).
        """
        return self.to_bytes(ids).decode(errors="replace")

    def pieces(self, text: str) -> list[str]:
        """Return what each token of text stands for, to look at.

        Bytes that are only a part of a character are shown as U+FFFD.
        """
        return [
            self._bytes[i].decode(errors="replace") for i in self.encode(text).tolist()
        ]


class _Memory(dict[str, list[int]]):
    """Ids of pre-tokens; one that is not in it is encoded when it is asked for."""

    def __init__(self, tokenizer: BPETokenizer) -> None:
        self._rank = tokenizer._rank

    def __missing__(self, word: str) -> list[int]:
        ids = merge(word.encode(), self._rank)
        if len(word) <= REMEMBERED_LENGTH:
            if len(self) >= REMEMBERED:
                self.clear()
            self[word] = ids
        return ids


def _first_wrong(ids: list[int]) -> str:
    for expected, found in enumerate(ids):
        if expected != found:
            return f"{found} where {expected} was to come"
    return "an empty token"
