"""`groundup bench train-step`: one update against transformers'.

Here: the time of an update of our GPT and our Decoder beside transformers' models of
the same sizes, in both dtypes, and the share of what the matrix products alone could
reach. Left out: what is learned (`bench_loss`), generation (`bench_decode`).
"""

import math
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from groundup.bench import Claim, register
from groundup.foundations.environment import matmul_rates
from groundup.modern.decoder import Decoder, DecoderConfig
from groundup.training.batching import shakespeare_split
from groundup.training.gpt import GPT, GPTConfig
from groundup.training.loop import DTYPES

LAYERS, WIDTH, HEADS, CONTEXT, BATCH = 6, 384, 6, 256, 16
PEAK_SIZE = 2048  # of the matrices whose product states the machine's peak
REFERENCES = {"GPT": "GPT-2 of transformers", "Decoder": "Llama of transformers"}
COMPILED = ", compiled"
# What torch.compile looks for.
COMPILER = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")


def _models() -> dict[str, tuple[nn.Module, Callable[[Tensor], Tensor]]]:
    """Four models of the same sizes, and how each turns ids into logits."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    sizes = {"n_layers": LAYERS, "d_model": WIDTH, "n_heads": HEADS}
    gpt, decoder = (
        GPT(GPTConfig(context=CONTEXT, **sizes)),
        Decoder(DecoderConfig(**sizes)),
    )
    gpt2 = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=gpt.config.n_vocab,
            n_positions=CONTEXT,
            n_embd=WIDTH,
            n_layer=LAYERS,
            n_head=HEADS,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=decoder.config.n_vocab,
            hidden_size=WIDTH,
            intermediate_size=decoder.config.width,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            tie_word_embeddings=True,
            max_position_embeddings=CONTEXT,
        )
    )
    return {
        "GPT": (gpt, gpt),
        REFERENCES["GPT"]: (gpt2, lambda x: gpt2(x, use_cache=False).logits),
        "Decoder": (decoder, decoder),
        REFERENCES["Decoder"]: (llama, lambda x: llama(x, use_cache=False).logits),
    }


def compiled(
    model: nn.Module, backend: str | Callable[..., Callable] = "inductor"
) -> Callable[[Tensor], Tensor]:
    """Return model compiled, but for the tables of a decoder's rotations.

    Fused into what uses them, their angles would be computed anew for every number.
    """
    if isinstance(model, Decoder):
        model.rotation = torch.compiler.disable(model.rotation)
    return torch.compile(model, backend=backend)


def step_flops(model: nn.Module) -> int:
    """Return the FLOPs of one update: 6 a matrix entry and token, and the scores.

    Only matrices that multiply are counted (a tied embedding once, as the head), and of
    the scores the half that a causal mask leaves.
    """
    blocks = sum(p.numel() for p in model.blocks.parameters() if p.dim() == 2)
    entries = blocks + model.embed.weight.numel()
    tokens = BATCH * CONTEXT
    return tokens * (6 * entries + 6 * LAYERS * CONTEXT * WIDTH)


@register("train-step")
def train_step(quick: bool) -> list[Claim]:
    """Time one update of each model in each dtype, in turns.

    Ours run as they are and, unless quick, compiled, which takes a C++ compiler and
    some ten seconds each. A claim takes the faster of the two.
    """
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    x, y = shakespeare_split().train.sample(BATCH, CONTEXT, generator)
    models = _models()
    if not shutil.which(COMPILER):
        print(f"nothing is compiled: there is no {COMPILER}")
    elif not quick:
        for name in REFERENCES:
            model, _ = models[name]
            models[name + COMPILED] = model, compiled(model)

    def stepper(name: str, dtype: str) -> Callable[[], None]:
        model, logits = models[name]
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

        def step() -> None:
            with torch.autocast("cpu", DTYPES[dtype], enabled=dtype != "float32"):
                out = logits(x)
            F.cross_entropy(out.flatten(0, 1).float(), y.flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    sides = {(n, d): stepper(n, d) for n in models for d in DTYPES}
    seconds: dict[tuple[str, str], list[float]] = {side: [] for side in sides}
    rates: dict[str, list[float]] = {dtype: [] for dtype in DTYPES}
    for step in sides.values():
        step()  # the first one allocates and compiles
    for _ in range(1 if quick else 9):
        for side, step in sides.items():
            start = time.perf_counter()
            step()
            seconds[side].append(time.perf_counter() - start)
        for dtype in DTYPES:
            rate = matmul_rates(DTYPES[dtype], [PEAK_SIZE], budget=1.0)
            rates[dtype].append(rate[PEAK_SIZE])
    took = {side: statistics.median(each) for side, each in seconds.items()}
    peak = {dtype: statistics.median(each) for dtype, each in rates.items()}

    tokens = BATCH * CONTEXT
    print(f"{torch.get_num_threads()} threads; matmul peak (median):", end=" ")
    print(", ".join(f"{d} {r / 1e9:.0f} GFLOP/s" for d, r in peak.items()))
    print(f"{'model':<24}{'dtype':<10}{'ms':>7}{'tokens/s':>10}{'of peak':>9}")
    flops = {name: step_flops(models[name][0]) for name in REFERENCES}
    for (name, dtype), each in took.items():
        share = flops["GPT" if "GPT" in name else "Decoder"] / each / peak[dtype]
        print(
            f"{name:<24}{dtype:<10}{each * 1e3:>7.0f}{tokens / each:>10.0f}"
            f"{share:>9.2f}"
        )

    claims = []
    for ours, theirs in REFERENCES.items():
        low, high = took[theirs, "bfloat16"], took[theirs, "float32"]
        least = {dtype: flops[ours] / peak[dtype] for dtype in DTYPES}
        for what, dtype, numerator, target in (
            ("bf16 / their bf16", "bfloat16", low, 1.1),
            ("bf16 / their fp32", "bfloat16", high, 3.5),
            ("fp32 / their fp32", "float32", high, 1.0),
            ("bf16 share of peak", "bfloat16", least["bfloat16"], 0.45),
            ("fp32 share of peak", "float32", least["float32"], 0.75),
        ):
            plain = took[ours, dtype]
            fastest = min(plain, took.get((ours + COMPILED, dtype), math.inf))
            detail = f"compiled; {numerator / plain:.3g} as it is"
            claims.append(
                Claim(
                    f"{ours} {what}",
                    numerator / fastest,
                    target,
                    detail if fastest < plain else "",
                )
            )
    return claims
