"""Vocabularies in files, and files as tokens.

Here: saving and loading a tokenizer, the vocabularies of SmolLM2 (GGUF) and Qwen (a
list of ranks), and the ids of a file of any size in constant memory. Left out: other
formats; text inside a file that is to become special tokens.

Page: book/4-scaling/bpe.md. Axes: `N` tokens.
"""

import json
import os
from base64 import b64decode, b64encode
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxtyping import Int
from torch import Tensor

from groundup.modern.tokenizer import CONTROL
from groundup.scaling.bpe import PRINTABLE
from groundup.scaling.bpe_tokenizer import END_OF_TEXT, BPETokenizer

FORMAT = "groundup-bpe-1"
CHUNK = 1 << 18  # characters of a file in memory
# The character that stands for a byte in the files of GPT-2's successors.
_OTHERS = (b for b in range(256) if b not in PRINTABLE)
_STAND_INS = {chr(b): b for b in PRINTABLE} | {
    chr(256 + i): b for i, b in enumerate(_OTHERS)
}
# Qwen/Qwen2.5-1.5B, tokenizer_config.json: special tokens in the order of their ids.
QWEN_SPECIAL = (
    END_OF_TEXT,
    "<|im_start|>",
    "<|im_end|>",
)


def from_stand_ins(token: str) -> bytes:
    """Return the bytes of a token as GPT-2 and its successors write it in files.

    Example: `from_stand_ins("Ġthe")` is `b" the"`.
    """
    return bytes(map(_STAND_INS.__getitem__, token))


def save(tokenizer: BPETokenizer, path: Path) -> None:
    """Write all that makes the tokenizer to a JSON file, or replace the file."""
    contents = {
        "format": FORMAT,
        "digest": tokenizer.digest,
        "cut": tokenizer.cut,
        "special": tokenizer.special,
        "tokens": [b64encode(token).decode() for token in tokenizer.tokens],
    }
    beside = path.with_name(f"{path.name}.{os.getpid()}.part")
    beside.write_text(json.dumps(contents, indent=0), encoding="utf-8")
    beside.replace(path)


def load(path: Path) -> BPETokenizer:
    """Return the tokenizer that `save` wrote: the same ids for every text.

    Raises:
        ValueError: the file is of another format, or was changed since.
    """
    contents = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(contents, dict) or contents.get("format") != FORMAT:
        raise ValueError(f"{path.name} must be of the format {FORMAT!r}")
    tokens = [b64decode(token) for token in contents["tokens"]]
    special = contents["special"]
    tokenizer = BPETokenizer(_numbered(tokens, special), contents["cut"], special)
    if tokenizer.digest != contents["digest"]:
        raise ValueError(
            f"{path.name} was changed since it was saved: its digest is not the one "
            f"that it states"
        )
    return tokenizer


def from_gguf(metadata: Mapping[str, Any]) -> BPETokenizer:
    """Return the tokenizer of a GGUF file, from what stands under `tokenizer`.

    Ids are those of the file, whose order must be that of its merges.

    Args:
        metadata: as of `modern.gguf_file.GGUFFile`.

    Raises:
        ValueError: it is not byte-level BPE, or its order is another.
    """
    get = {
        name: metadata[f"tokenizer.ggml.{name}"]
        for name in ("model", "pre", "tokens", "merges", "token_type")
    }
    if get["model"] != "gpt2":
        raise ValueError(f"model must be byte-level BPE, 'gpt2'; got {get['model']!r}")
    kinds = zip(get["tokens"], get["token_type"], strict=True)
    special = {t: i for i, (t, kind) in enumerate(kinds) if kind == CONTROL}
    spelled = {t: i for i, t in enumerate(get["tokens"]) if t not in special}
    made = [merge.replace(" ", "") for merge in get["merges"]]
    if made != [token for token in spelled if len(token) > 1]:
        raise ValueError("tokens must stand in the order of the merges that make them")
    tokens = {from_stand_ins(token): i for token, i in spelled.items()}
    return BPETokenizer(tokens, get["pre"], special)


def from_ranks(path: Path, cut: str, special: Collection[str] = ()) -> BPETokenizer:
    """Return the tokenizer of a list of ranks as the package tiktoken reads it.

    A line holds a token in base64 and its rank, which is its id.

    Args:
        path: of the list.
        cut: as of `Splitter`.
        special: names of special tokens; they get the ids after the last rank.

    Raises:
        ValueError: a line is something else, or ranks are missing.

    Example: `from_ranks(fetch("qwen-vocab") / "qwen.tiktoken", "qwen", QWEN_SPECIAL)`.
    """
    tokens = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        match line.split():
            case [token, rank] if rank.isdigit():
                tokens[b64decode(token)] = int(rank)
            case _:
                raise ValueError(
                    f"line {number} of {path.name} is no token with a rank"
                )
    names = {name: len(tokens) + i for i, name in enumerate(special)}
    return BPETokenizer(tokens, cut, names)


def encode_file(
    tokenizer: BPETokenizer, path: Path, *, chunk: int = CHUNK
) -> Iterator[Int[Tensor, "N"]]:
    """Yield the ids of a file piece by piece; joined, they are those of its text.

    Memory is for one chunk and the longest pre-token, whatever the size of the file.

    Args:
        tokenizer: cuts by one of `bpe_split.PATTERNS`.
        path: of a file in UTF-8.
        chunk: characters to read at a time.

    Raises:
        ValueError: the file is not UTF-8, or the tokenizer cuts by another pattern.
    """
    waiting = ""
    with path.open(encoding="utf-8", newline="") as file:  # "\r\n" stays as it is
        while more := file.read(chunk):
            waiting += more
            if n := tokenizer.settled(waiting):
                yield tokenizer.encode(waiting[:n])
                waiting = waiting[n:]
    if waiting:
        yield tokenizer.encode(waiting)


def _numbered(
    tokens: Collection[bytes], special: Mapping[str, int]
) -> dict[bytes, int]:
    """Give the tokens, in their order, the ids that no special token has."""
    taken = set(special.values())
    free = (i for i in range(len(tokens) + len(taken)) if i not in taken)
    return dict(zip(tokens, free, strict=False))
