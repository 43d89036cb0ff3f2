"""`groundup bench decode`: SmolLM2-135M, one token after the other.

Here: 64 tokens after a prompt of 22, greedy, by our decoder and by transformers'
`generate`, with one row and with 16; in float32 the tokens must be equal. Left out:
compiled models, integers, a GPU.
"""

import copy
import time
from collections.abc import Callable
from statistics import median

import torch

from groundup.bench import Claim, register
from groundup.foundations.environment import median_seconds
from groundup.modern.kv_cache import generate
from groundup.modern.one_row import OneRowDecoder, product_seconds
from groundup.modern.weights import hf_config, load_smollm2, to_hf

PROMPT = (
    "The history of the city begins long before the first stone of its walls was laid"
    ", when the river still ran wide between the hills and nobody had counted"
)
N_PROMPT, N_NEW, ROWS, THREADS = 22, 64, 16, 2
ONE_ROW_TARGET, HALF_TARGET, ROWS_TARGET = 1.1, 2.3, 1.3
READ_BYTES = 2**28  # far more than any cache holds


@register("decode")
def decode(quick: bool) -> list[Claim]:
    """Time 64 tokens, 5 rounds of one row and 3 of 16; or 8 tokens, 2 and 1.

    Raises:
        AssertionError: our float32 tokens are not those of transformers.
    """
    n_new, rounds = (8, (2, 1)) if quick else (N_NEW, (5, 3))
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        forms, n_bytes, alone = _forms(n_new)
        times = {b: _times(forms, b, n) for b, n in zip((1, ROWS), rounds, strict=True)}
        data = torch.ones(READ_BYTES // 4)
        bandwidth = READ_BYTES / median_seconds(data.sum)
    finally:
        torch.set_num_threads(threads)
    print(f"a sum reads {bandwidth / 1e9:.1f} GB/s; a pass reads all weights once")
    print("rows  model                  tokens/s  ratio  share of that bandwidth")
    for b, found in times.items():
        for name, seconds in found.items():
            share = n_new / seconds * n_bytes[name.split()[1]] / bandwidth
            ratio = found["transformers float32"] / seconds
            print(
                f"{b:4}  {name:22} {b * n_new / seconds:8.1f} {ratio:6.2f}  {share:.0%}"
            )

    claims = []
    for b, dtype, target in (
        (1, "float32", ONE_ROW_TARGET),
        (1, "bfloat16", HALF_TARGET),
        (ROWS, "bfloat16", ROWS_TARGET),
    ):
        theirs, ours = (times[b][n] for n in ("transformers float32", f"ours {dtype}"))
        what = f"{dtype}-rows-{b}-vs-transformers-float32"
        detail = (
            f"{1e3 * ours / n_new:.1f} against {1e3 * theirs / n_new:.1f} ms a step"
        )
        if b == 1:
            detail += f"; our products alone {1e3 * alone[dtype]:.1f} ms"
        claims.append(Claim(what, theirs / ours, target, detail))
    return claims


def _forms(
    n_new: int,
) -> tuple[dict[str, Callable[[int], object]], dict[str, int], dict[str, float]]:
    """Return what is timed, by rows; by dtype, the weights' bytes and their seconds.

    The seconds are those of our products with one row alone, for one token.
    """
    import transformers  # slow to import, and only needed here

    ours, tokenizer = load_smollm2()
    config = transformers.LlamaConfig(**hf_config(ours))
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.load_state_dict(to_hf(ours), strict=False)  # its head is tied already
    models = {"float32": (ours, theirs)}
    models["bfloat16"] = tuple(copy.deepcopy(m).bfloat16() for m in (ours, theirs))
    prompt = tokenizer.encode(PROMPT)[:N_PROMPT]
    greedy = transformers.GenerationConfig(
        max_new_tokens=n_new,
        min_new_tokens=n_new,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    forms: dict[str, Callable[[int], object]] = {}
    alone = {}
    for dtype, (mine, other) in models.items():
        mine = OneRowDecoder(mine)
        alone[dtype] = product_seconds(mine.decoder, by_vector=mine.by_vector)
        print(f"ours {dtype}: by torch.{'addmv' if mine.by_vector else 'addmm'}")
        forms[f"transformers {dtype}"] = lambda b, m=other: m.generate(
            torch.tensor([prompt] * b), generation_config=greedy
        )[:, N_PROMPT:].tolist()
        forms[f"ours {dtype}"] = lambda b, m=mine: generate(m, [prompt] * b, n_new)
    if forms["ours float32"](1) != forms["transformers float32"](1):
        raise AssertionError("ours float32 and transformers chose different tokens")
    n_bytes = {
        dtype: sum(p.nbytes for p in m.parameters()) for dtype, (m, _) in models.items()
    }
    return forms, n_bytes, alone


def _times(
    forms: dict[str, Callable[[int], object]], n_rows: int, rounds: int
) -> dict[str, float]:
    """Return the median seconds of each, taken in turn, after one turn to warm up."""
    found: dict[str, list[float]] = {name: [] for name in forms}
    for turn in range(rounds + 1):
        for name, form in forms.items():
            start = time.perf_counter()
            form(n_rows)
            if turn:
                found[name].append(time.perf_counter() - start)
    return {name: median(seconds) for name, seconds in found.items()}
