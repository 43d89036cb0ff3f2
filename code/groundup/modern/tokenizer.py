"""The tokenizer that comes with published weights, and its chat template.

Here: text to tokens and back, and a conversation to the text that the model was taught
to continue. The merging itself is done by the package `tokenizers`. Left out: how a
vocabulary is learned and applied (Part 4 builds it).

Page: book/3-modern/decoder.md.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

END_OF_TEXT = "<|endoftext|>"  # ends a document; a chat model may say it too
# What a file calls its way to cut text before merging. "smollm" first takes every digit
# (any Unicode number) out by itself, then cuts as GPT-2 does.
CUTS = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    ),
}
CONTROL = 3  # token_type of GGUF: stands for itself, never made by merging


class ChatTokenizer:
    """Text to ids, ids to text, messages to text.

    Args:
        core: of the package `tokenizers`.
        template: the chat template, in Jinja.
        bos: the token that the template may use as `bos_token`.
        eos: the token that ends a turn.
    """

    def __init__(self, core: Tokenizer, template: str, bos: str, eos: str) -> None:
        self.core = core
        self._special = {"bos_token": bos, "eos_token": eos}
        rooms = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        rooms.globals["raise_exception"] = _refuse
        self._template = rooms.from_string(template)

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> "ChatTokenizer":
        """Build it from what a GGUF file holds under `tokenizer`.

        Raises:
            ValueError: the file cuts text in a way that is not known here.
        """
        ggml = "tokenizer.ggml."
        cut = metadata[f"{ggml}pre"]
        if metadata[f"{ggml}model"] != "gpt2" or cut not in CUTS:
            raise ValueError(
                f"the tokenizer must be byte-level BPE (gpt2) and cut by one of "
                f"{sorted(CUTS)}; got {metadata[f'{ggml}model']!r}, {cut!r}"
            )
        tokens = metadata[f"{ggml}tokens"]
        merges = [tuple(m.split(" ")) for m in metadata[f"{ggml}merges"]]
        vocabulary = {token: i for i, token in enumerate(tokens)}
        core = Tokenizer(models.BPE(vocabulary, merges))
        core.pre_tokenizer = CUTS[cut]()
        core.decoder = decoders.ByteLevel()
        types = metadata[f"{ggml}token_type"]
        core.add_special_tokens(
            [
                AddedToken(token, normalized=False, special=True)
                for token, kind in zip(tokens, types, strict=True)
                if kind == CONTROL
            ]
        )
        bos, eos = (tokens[metadata[f"{ggml}{n}_token_id"]] for n in ("bos", "eos"))
        return cls(core, metadata["tokenizer.chat_template"], bos, eos)

    @classmethod
    def from_folder(cls, folder: Path) -> "ChatTokenizer":
        """Build it from `tokenizer.json` and `tokenizer_config.json` in folder.

        Raises:
            ValueError: there is no chat template in it.
        """
        config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
        beside = folder / "chat_template.jinja"
        template = (
            beside.read_text("utf-8")
            if beside.exists()
            else config.get("chat_template")
        )
        if not isinstance(template, str):
            raise ValueError(f"{folder} holds no chat template, or several")
        names = (config.get("bos_token"), config.get("eos_token"))
        bos, eos = (n["content"] if isinstance(n, dict) else n or "" for n in names)
        core = Tokenizer.from_file(str(folder / "tokenizer.json"))
        return cls(core, template, bos, eos)

    @property
    def n_vocab(self) -> int:
        """Tokens in the vocabulary, the special ones included."""
        return self.core.get_vocab_size()

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Tokens at which an answer is over: the end of a turn, the end of a text."""
        names = dict.fromkeys((self._special["eos_token"], END_OF_TEXT))
        ids = (self.core.token_to_id(name) for name in names)
        return tuple(i for i in ids if i is not None)

    def encode(self, text: str) -> list[int]:
        """Return the ids of text; names of special tokens in it become those tokens."""
        return self.core.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], *, special: bool = True) -> str:
        """Return the text of ids; special=False leaves the special tokens out.

        `decode(encode(text))` is text. A part of a character comes out as U+FFFD.
        """
        return self.core.decode(list(ids), skip_special_tokens=not special)

    def chat(self, messages: Sequence[Mapping[str, str]], *, ask: bool = True) -> str:
        """Return a conversation as the text that the model was trained on.

        Args:
            messages: each with "role" (system, user or assistant) and "content".
            ask: end where the assistant's answer begins.

        Example: `chat([{"role": "user", "content": "Hello"}])`.
        """
        return self._template.render(
            messages=messages, add_generation_prompt=ask, **self._special
        )


def _refuse(message: str) -> None:
    raise ValueError(f"the chat template refuses the messages: {message}")
