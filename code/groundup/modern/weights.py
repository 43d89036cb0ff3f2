"""Published weights in our decoder, and ours in a folder that others can read.

Here: the names and layouts of Hugging Face's Llama, Mistral and Qwen2, strictly, from a
state dict, a folder or the GGUF file of SmolLM2, and back to a folder. Left out: other
families, weights in several pieces for several devices, training states (Part 4).

Source: the classes `LlamaForCausalLM` and `Qwen2ForCausalLM` of transformers define
the names. Page: book/3-modern/decoder.md.
Axes: `C` d_model, `F` d_ff, `V` vocabulary.
"""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from groundup.foundations.assets import fetch
from groundup.modern.decoder import Decoder, DecoderConfig
from groundup.modern.gguf_file import GGUFFile
from groundup.modern.rope import THETA
from groundup.modern.tokenizer import ChatTokenizer

HEAD = "lm_head.weight"
SHOWN = 6  # names in an error message


def config_of(theirs: Mapping[str, Any]) -> DecoderConfig:
    """Translate the content of a `config.json`.

    Raises:
        ValueError: it describes something that our decoder does not compute.
    """
    heads, width = theirs["num_attention_heads"], theirs["hidden_size"]
    rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    kind = theirs["model_type"]
    wanted = {
        "model_type": (kind, ("llama", "mistral", "qwen2")),
        "hidden_act": (theirs.get("hidden_act", "silu"), ("silu",)),
        "head_dim": (theirs.get("head_dim") or width // heads, (width // heads,)),
        "rope_type": (rope.get("rope_type", "default"), ("default",)),
        "attention_bias": (theirs.get("attention_bias", False), (False,)),
        "mlp_bias": (theirs.get("mlp_bias", False), (False,)),
        "use_sliding_window": (theirs.get("use_sliding_window", False), (False,)),
    }
    for field, (found, possible) in wanted.items():
        if found not in possible:
            raise ValueError(f"{field} must be one of {possible}; got {found!r}")
    return DecoderConfig(
        n_vocab=theirs["vocab_size"],
        d_model=width,
        n_layers=theirs["num_hidden_layers"],
        n_heads=heads,
        n_kv_heads=theirs.get("num_key_value_heads") or heads,
        d_ff=theirs["intermediate_size"],
        rope_theta=float(rope.get("rope_theta") or theirs.get("rope_theta") or THETA),
        norm_eps=theirs["rms_norm_eps"],
        qkv_bias=kind == "qwen2",
        tied=theirs.get("tie_word_embeddings", False),
        window=theirs.get("sliding_window") if kind == "mistral" else None,
    )


def places(config: DecoderConfig) -> dict[str, dict[str, tuple[int, ...]]]:
    """Return, for each of our parameters, theirs that it holds one below the other.

    Theirs come with their shapes; the order is that of the rows.
    """
    c, f, v = config.d_model, config.width, config.n_vocab
    kv = config.kv_heads * config.d_head
    rows = {"q": c, "k": kv, "v": kv}
    found = {
        "embed.weight": {"model.embed_tokens.weight": (v, c)},
        "final_norm.weight": {"model.norm.weight": (c,)},
    }
    if not config.tied:
        found["head.weight"] = {HEAD: (v, c)}
    for i in range(config.n_layers):
        a, b = f"blocks.{i}.", f"model.layers.{i}."
        qkv = {n: f"{b}self_attn.{n}_proj" for n in rows}
        found |= {
            f"{a}attention_norm.weight": {f"{b}input_layernorm.weight": (c,)},
            f"{a}attention.qkv.weight": {
                f"{qkv[n]}.weight": (r, c) for n, r in rows.items()
            },
            f"{a}attention.proj.weight": {f"{b}self_attn.o_proj.weight": (c, c)},
            f"{a}feedforward_norm.weight": {
                f"{b}post_attention_layernorm.weight": (c,)
            },
            f"{a}feedforward.gate_up.weight": {
                f"{b}mlp.{n}_proj.weight": (f, c) for n in ("gate", "up")
            },
            f"{a}feedforward.down.weight": {f"{b}mlp.down_proj.weight": (c, f)},
        }
        if config.qkv_bias:
            found[f"{a}attention.qkv.bias"] = {
                f"{qkv[n]}.bias": (r,) for n, r in rows.items()
            }
    return found


def load_hf(
    source: nn.Module | Mapping[str, Tensor],
    config: Mapping[str, Any] | DecoderConfig,
    dtype: torch.dtype | None = None,
) -> Decoder:
    """Return a decoder with the weights of a Llama, Mistral or Qwen2, copied.

    Args:
        source: `LlamaForCausalLM` or a relative, or its state dict.
        config: `model.config.to_dict()`, the content of `config.json`, or ours.
        dtype: of the weights; None: as they are.

    Raises:
        ValueError: a name is missing or unknown, a tensor has another shape, a tied
            head differs from the embedding, or as in `config_of`.

    Example: `load_hf(model, model.config.to_dict())`.
    """
    if not isinstance(config, DecoderConfig):
        config = config_of(config)
    state = dict(source.state_dict() if isinstance(source, nn.Module) else source)
    _check(state, config)
    with torch.device("meta"):  # no memory, no random numbers
        decoder = Decoder(config)
    ours = {
        name: torch.cat([state[n] for n in parts]).to(dtype)
        for name, parts in places(config).items()
    }
    if config.tied:
        ours["head.weight"] = ours["embed.weight"]
    decoder.load_state_dict(ours, assign=True)
    if config.tied:
        decoder.head.weight = decoder.embed.weight
    return decoder.eval()


def _check(state: Mapping[str, Tensor], config: DecoderConfig) -> None:
    expected = {n: s for parts in places(config).values() for n, s in parts.items()}
    tied = {HEAD} if config.tied else set()
    missing, unknown = expected.keys() - state.keys(), state.keys() - expected.keys()
    if missing or unknown - tied:
        raise ValueError(
            f"the weights must have the {len(expected)} names of config; missing "
            f"{_some(missing)}, unknown {_some(unknown - tied)}"
        )
    for name, shape in expected.items():
        if tuple(state[name].shape) != shape:
            raise ValueError(
                f"{name} must have the shape {shape}; got {tuple(state[name].shape)}"
            )
    embedding = state["model.embed_tokens.weight"]
    if config.tied and not torch.equal(state.get(HEAD, embedding), embedding):
        raise ValueError(f"config says tied, but {HEAD} differs from the embedding")


def _some(names: set[str]) -> str:
    first = sorted(names)[:SHOWN]
    more = len(names) - len(first)
    return f"{first}" + (f" and {more} more" if more else "")


def load_folder(folder: Path, dtype: torch.dtype | None = None) -> Decoder:
    """Return the decoder of a Hugging Face folder: config.json and safetensors.

    Raises:
        FileNotFoundError: one of the two is not there.
        ValueError: as in `load_hf`.
    """
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no *.safetensors")
    config = json.loads((Path(folder) / "config.json").read_text("utf-8"))
    state = {n: t for file in files for n, t in load_file(file).items()}
    return load_hf(state, config, dtype)


def to_hf(decoder: Decoder) -> dict[str, Tensor]:
    """Return the weights under Hugging Face's names, not copied; undoes `load_hf`."""
    mine = decoder.state_dict()
    state = {}
    for name, parts in places(decoder.config).items():
        sizes = [shape[0] for shape in parts.values()]
        state |= zip(parts, mine[name].split(sizes), strict=True)
    return state


def save_hf(decoder: Decoder, folder: Path, *, context: int = 8192) -> None:
    """Write config.json and model.safetensors, which transformers reads.

    The folder appears whole or not at all.

    Args:
        decoder: without sinks; with a window (Mistral) or biases (Qwen2), not both.
        folder: must not exist, or be empty.
        context: what config.json says of the longest text; changes no number.

    Raises:
        FileExistsError: there is something in folder.
        ValueError: transformers has no class for this decoder.
    """
    config, folder = decoder.config, Path(folder)
    if config.n_sinks or (config.window is not None and config.qkv_bias):
        raise ValueError(
            "no class of transformers has sinks, or a window and biases in every layer;"
            f" got n_sinks={config.n_sinks}, window={config.window}, "
            f"qkv_bias={config.qkv_bias}"
        )
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty: remove it, or choose another")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as t:
        new = Path(t) / "new"
        new.mkdir()
        state = {name: part.contiguous() for name, part in to_hf(decoder).items()}
        save_file(state, new / "model.safetensors", {"format": "pt"})
        text = json.dumps(hf_config(decoder, context), indent=1)
        (new / "config.json").write_text(f"{text}\n", "utf-8")
        os.replace(new, folder)


def hf_config(decoder: Decoder, context: int = 8192) -> dict[str, Any]:
    """Return what `config.json` says of decoder; undoes `config_of`."""
    config = decoder.config
    kind, name = "llama", "LlamaForCausalLM"
    if config.qkv_bias:
        kind, name = "qwen2", "Qwen2ForCausalLM"
    elif config.window is not None:
        kind, name = "mistral", "MistralForCausalLM"
    theirs = {
        "architectures": [name],
        "model_type": kind,
        "hidden_act": "silu",
        "vocab_size": config.n_vocab,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.kv_heads,
        "intermediate_size": config.width,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "max_position_embeddings": context,
        "dtype": str(decoder.embed.weight.dtype).removeprefix("torch."),
    }
    return theirs | ({"sliding_window": config.window} if kind == "mistral" else {})


def load_smollm2(dtype: torch.dtype = torch.float32) -> tuple[Decoder, ChatTokenizer]:
    """Return SmolLM2-135M-Instruct and its tokenizer, from the asset `smollm2-135m`.

    The file holds the matrices in four bits and the embedding in eight; they come out
    as numbers of dtype that a quantised model would compute with.

    Args:
        dtype: of the weights.

    Raises:
        AssetError: the file is not in the cache and cannot be downloaded.
    """
    (path,) = fetch("smollm2-135m").glob("*.gguf")
    file = GGUFFile(path)
    decoder = load_hf(file.state(), file.config(), dtype)
    return decoder, ChatTokenizer.from_gguf(file.metadata)
