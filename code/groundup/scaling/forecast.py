"""What a training run will need, before it is started: memory, work, time.

Here: the bytes and the FLOPs of an update of a decoder, counted from its config, and a
law for its time, fitted to smaller models on the same machine. Left out: the loss
(`scaling_laws`), several devices (`parallel_cost`), half precision and recomputed
activations.

Source: Kaplan et al. (2020), table 1, for the FLOPs. Page:
book/4-scaling/scaling_laws.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from groundup.modern.decoder import DecoderConfig

FLOAT32 = 4  # bytes


def n_parameters(config: DecoderConfig) -> tuple[int, int]:
    """Return the parameters outside of embedding and head, and those of these two."""
    c, rows = config.d_model, (config.n_heads + 2 * config.kv_heads) * config.d_head
    attention = c * rows + c * c + (rows if config.qkv_bias else 0)
    block = attention + 3 * c * config.width + 2 * c  # last: the two norms
    tables = config.n_vocab * c
    return config.n_layers * block + c, tables if config.tied else 2 * tables


def update_flops(config: DecoderConfig, batch: int, context: int) -> int:
    """Return the FLOPs of the matrix products of an update.

    Forward 2 for each parameter of a matrix and token, backward twice that; the head
    counts, the embedding is a look-up. Scores and their use count in full, as if no
    mask spared half of them.
    """
    c = config.d_model
    norms = (2 * config.n_layers + 1) * c
    matrices = n_parameters(config)[0] - norms + config.n_vocab * c
    attention = 2 * config.n_layers * context * c
    return 6 * batch * context * (matrices + attention)


def update_memory(config: DecoderConfig, batch: int, context: int) -> dict[str, int]:
    """Return the bytes that a float32 update with AdamW holds.

    Activations are what the forward pass with torch's fused kernels and the
    cross-entropy keep for the backward pass, for an untied decoder without biases and
    with as many key/value heads as query heads. Exact for two heads or more, and at
    least two windows and two tokens: torch then copies what attention gives.

    Raises:
        ValueError: the decoder is another one.
    """
    if config.tied or config.qkv_bias or config.kv_heads != config.n_heads:
        raise ValueError(
            "activations are counted for an untied decoder without biases and groups; "
            f"got {config}"
        )
    c, tokens = config.d_model, batch * context
    # Per token and block: 11 rows of C (each norm's input and output; queries and keys,
    # rotated; values; what attention gives and what proj reads), 4 of F (gate and up,
    # SiLU of the gate, product), a number a head and one a norm.
    block = 11 * c + 4 * config.width + config.n_heads + 2
    # Once: the last norm's input, output and number; the tables of the rotation; the
    # log-probabilities; ids and targets, two numbers each. Last: the count.
    once = 2 * c + 1 + config.d_head + config.n_vocab + 4
    state = FLOAT32 * sum(n_parameters(config))
    return {
        "parameters": state,
        "gradients": state,
        "optimizer": 2 * state,
        "activations": FLOAT32 * (tokens * (config.n_layers * block + once) + 1),
    }


@dataclass(frozen=True)
class TimeLaw:
    """Seconds of an update: a price for each block, each byte kept and each FLOP."""

    per_block: float  # seconds
    per_byte: float
    per_flop: float

    def seconds(self, config: DecoderConfig, batch: int, context: int) -> float:
        """Return the seconds of an update."""
        return float(_work(config, batch, context) @ self._prices())

    def _prices(self) -> np.ndarray:
        return np.array([self.per_block, self.per_byte, self.per_flop])


def fit_time(
    configs: Sequence[DecoderConfig],
    seconds: Sequence[float],
    *,
    batch: int,
    context: int,
) -> TimeLaw:
    """Fit a time law to models that were timed, by least squares of relative errors.

    No price is negative.

    Raises:
        ValueError: there are fewer than three models.
    """
    if len(configs) < 3:
        raise ValueError(f"three prices need three models; got {len(configs)}")
    rows = np.stack([_work(c, batch, context) for c in configs])
    rows /= np.asarray(seconds)[:, None]
    scale = rows.max(0)
    prices, _ = nnls(rows / scale, np.ones(len(rows)))
    return TimeLaw(*(prices / scale).tolist())


def _work(config: DecoderConfig, batch: int, context: int) -> np.ndarray:
    """Blocks, bytes of activations, FLOPs."""
    kept = update_memory(config, batch, context)["activations"]
    flops = update_flops(config, batch, context)
    return np.array([config.n_layers, kept, flops], dtype=float)
