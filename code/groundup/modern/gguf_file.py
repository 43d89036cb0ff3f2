"""GGUF: one file with metadata, vocabulary and quantised weights.

Here: metadata as a plain dict, weights as float32 under Hugging Face's names and in its
layout of the heads. Left out: other architectures than Llama, the arithmetic of the
quantisation (the part on inference takes it apart), writing such files.

Source: the GGUF specification (github.com/ggml-org/ggml, docs/gguf.md); the package
`gguf` of the same authors unpacks the blocks. Page: book/3-modern/decoder.md.
Axes: none of its own.
"""

import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from groundup.modern.rope import half_split_rows

# GGUF's name of a tensor -> Hugging Face's; {} is the number of the block.
NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "blk.{}.attn_norm.weight": "model.layers.{}.input_layernorm.weight",
    "blk.{}.attn_q.weight": "model.layers.{}.self_attn.q_proj.weight",
    "blk.{}.attn_k.weight": "model.layers.{}.self_attn.k_proj.weight",
    "blk.{}.attn_v.weight": "model.layers.{}.self_attn.v_proj.weight",
    "blk.{}.attn_output.weight": "model.layers.{}.self_attn.o_proj.weight",
    "blk.{}.ffn_norm.weight": "model.layers.{}.post_attention_layernorm.weight",
    "blk.{}.ffn_gate.weight": "model.layers.{}.mlp.gate_proj.weight",
    "blk.{}.ffn_up.weight": "model.layers.{}.mlp.up_proj.weight",
    "blk.{}.ffn_down.weight": "model.layers.{}.mlp.down_proj.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


class _Reader(gguf.GGUFReader):
    """The package's reader on a plain array: slices of a memmap take twice as long."""

    @property
    def data(self) -> np.ndarray:
        return self._data

    @data.setter
    def data(self, mapped: np.memmap) -> None:
        self._data = mapped.view(np.ndarray)


class GGUFFile:
    """A GGUF file of a Llama: its metadata at once, its weights when asked for.

    Args:
        path: of the file.

    Raises:
        ValueError: the file is not GGUF, or of another architecture.
    """

    def __init__(self, path: Path) -> None:
        self._reader = _Reader(path)
        self.path = path
        self.metadata: dict[str, Any] = {
            key: _contents(field) for key, field in self._reader.fields.items()
        }
        kind = self.metadata.get("general.architecture")
        if kind != "llama":
            raise ValueError(
                f"general.architecture of {path.name} must be 'llama'; got {kind!r}"
            )

    def config(self) -> dict[str, Any]:
        """Return the sizes under the names of Hugging Face's `config.json`."""
        get = self.metadata.__getitem__
        return {
            "model_type": "llama",
            "hidden_act": "silu",
            "vocab_size": len(get("tokenizer.ggml.tokens")),
            "hidden_size": get("llama.embedding_length"),
            "num_hidden_layers": get("llama.block_count"),
            "num_attention_heads": get("llama.attention.head_count"),
            "num_key_value_heads": get("llama.attention.head_count_kv"),
            "intermediate_size": get("llama.feed_forward_length"),
            "rope_theta": get("llama.rope.freq_base"),
            # Stored in float32; the shortest decimal that gives it is what was meant.
            "rms_norm_eps": float(
                str(np.float32(get("llama.attention.layer_norm_rms_epsilon")))
            ),
            "tie_word_embeddings": all(
                tensor.name != "output.weight" for tensor in self._reader.tensors
            ),
        }

    def state(self) -> dict[str, Tensor]:
        """Return the weights in float32, under Hugging Face's names.

        The rows of the query and key projections are brought from the interleaved
        layout of the file to that of `rope.rotate`.

        Raises:
            ValueError: a tensor has a name that a Llama does not have.
        """
        sizes = self.config()
        heads = {
            "attn_q": sizes["num_attention_heads"],
            "attn_k": sizes["num_key_value_heads"],
        }
        state = {}
        for tensor in self._reader.tensors:
            pattern = re.sub(r"(?<=^blk\.)\d+", "{}", tensor.name)
            if pattern not in NAMES:
                raise ValueError(
                    f"{self.path.name} holds {tensor.name!r}, which a Llama does not"
                )
            weights = torch.from_numpy(
                np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
            ).float()
            part = tensor.name.split(".")[-2]
            if part in heads:
                weights = half_split_rows(weights, heads[part])
            state[NAMES[pattern].format(*re.findall(r"\d+", tensor.name))] = weights
        return state


def _contents(field: gguf.ReaderField) -> Any:
    """`field.contents()`, ten times faster for the lists of a vocabulary."""
    if field.types[:1] != [gguf.GGUFValueType.ARRAY]:
        return field.contents()
    if field.types[-1] == gguf.GGUFValueType.STRING:
        return [field.parts[i].tobytes().decode("utf-8") for i in field.data]
    return [field.parts[i][0].item() for i in field.data]
