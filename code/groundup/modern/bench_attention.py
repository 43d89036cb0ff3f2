"""`groundup bench attention`: sparse attention against torch's fastest dense kernel.

Here: a local window and a block-sparse layout, compared with dense attention under the
same mask, and then timed against dense causal attention, which skips what lies above
the diagonal. Left out: the backward pass, and a GPU.
"""

import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional as F

from groundup.bench import Claim, register
from groundup.modern.sliding_window import window_mask
from groundup.modern.sparse_attention import (
    block_layout,
    block_sparse_attention,
    block_sparse_mask,
    density,
    local_attention,
)

N_HEADS, D_HEAD, WINDOW, BLOCK, SHARE = 4, 64, 256, 256, 1 / 8
THREADS, TOLERANCE = 2, 1e-5
LOCAL_TARGET, BLOCK_SPARSE_TARGET = 5.0, 4.0


@register("attention")
def attention(quick: bool) -> list[Claim]:
    """Time forward passes; 8,192 tokens in 9 rounds, or 2,048 in 3.

    Raises:
        AssertionError: an output is not that of dense attention with the same mask.
    """
    n_tokens, rounds = (2048, 3) if quick else (8192, 9)
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        with torch.no_grad():
            times = _times(n_tokens, rounds)
    finally:
        torch.set_num_threads(threads)
    dense, local, blocks = (median(t) for t in times)
    return [
        Claim(
            name, dense / took, target, f"{1e3 * took:.0f} against {1e3 * dense:.0f} ms"
        )
        for name, took, target in (
            ("local-vs-dense", local, LOCAL_TARGET),
            ("block-sparse-vs-dense", blocks, BLOCK_SPARSE_TARGET),
        )
    ]


def _times(n_tokens: int, rounds: int) -> list[list[float]]:
    """Return the seconds of dense, local and block-sparse attention, by round."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, N_HEADS, n_tokens, D_HEAD)
    q, k, v = (torch.randn(shape, generator=generator) for _ in range(3))
    layout = block_layout(n_tokens // BLOCK, local=2, share=SHARE)
    at = torch.arange(n_tokens)[None]
    forms: dict[str, Callable[[], Tensor]] = {
        "dense causal (torch)": lambda: F.scaled_dot_product_attention(
            q, k, v, is_causal=True
        ),
        f"local, window {WINDOW}": lambda: local_attention(q, k, v, WINDOW),
        f"block-sparse, {density(layout):.3f} of the blocks": (
            lambda: block_sparse_attention(q, k, v, layout, BLOCK)
        ),
    }
    masks = (
        torch.ones(n_tokens, n_tokens, dtype=torch.bool).tril(),
        window_mask(at, at, WINDOW)[0],
        block_sparse_mask(layout, BLOCK, n_tokens),
    )
    errors = []
    for form, mask in zip(forms.values(), masks, strict=True):
        out, expected = form(), F.scaled_dot_product_attention(q, k, v, mask)
        torch.testing.assert_close(out, expected, rtol=0, atol=TOLERANCE)
        errors.append((out - expected).abs().max().item())
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(rounds):
        for name, form in forms.items():
            start = time.perf_counter()
            form()
            times[name].append(time.perf_counter() - start)
    _print(times, [m.double().mean().item() for m in masks], errors, shape)
    return list(times.values())


def _print(
    times: dict[str, list[float]],
    shares: list[float],
    errors: list[float],
    shape: tuple[int, ...],
) -> None:
    """Print a line a form; spread is (slowest - fastest) / median."""
    dense = median(next(iter(times.values())))
    print(
        f"forward, (B, H, T, D) = {shape}, float32, {THREADS} threads, "
        f"{len(next(iter(times.values())))} interleaved rounds"
    )
    print(
        f"{'':36}{'pairs seen':>11}{'error':>9}{'median ms':>11}{'spread':>8}"
        f"{'speed':>8}"
    )
    for (name, seconds), share, error in zip(
        times.items(), shares, errors, strict=True
    ):
        middle = median(seconds)
        spread = (max(seconds) - min(seconds)) / middle
        print(
            f"{name:36}{share:11.1%}{error:9.0e}{1e3 * middle:11.1f}{spread:8.0%}"
            f"{dense / middle:8.2f}"
        )
