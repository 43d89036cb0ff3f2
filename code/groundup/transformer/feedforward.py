"""The feed-forward layer: two matrices with a GELU between them, applied per token.

Here: exact GELU and its tanh approximation, the exact slope, the layer with the
activations it is compared with, what a block costs in parameters and FLOPs, and two
small pieces from which the page builds models to train.
Left out: gated layers such as SwiGLU (Part 3), dropout, fused kernels.

Source: Vaswani et al. (2017), section 3.3 (the layer); Hendrycks and Gimpel
(2016), section 2 (GELU and its approximation); Bengio et al. (2003), section 2 (a
window of embeddings). Page: book/1-transformer/feedforward.md.
Axes: `...` any leading axes (batch, position), `B` batch, `T` positions, `C` d_model,
`F` d_ff, `S` keys, `W` bytes in a window.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from groundup.foundations.fitting import N_BYTES

EXPANSION = 4  # d_ff / d_model: 2048 / 512 in Vaswani et al. (2017), section 3.3
TANH_CUBIC = 0.044715  # Hendrycks and Gimpel (2016), section 2
TANH_SATURATED = 10.0  # beyond it the tanh below is 1 to the last float64 bit


def gelu(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Multiply x by the probability that a standard normal number is below x.

    Any shape and float dtype; the result has the same. This is `F.gelu` with
    `approximate="none"`. Example: gelu(1) = 1 * Phi(1) = 0.8413.
    """
    return 0.5 * x * (1.0 + torch.erf(x / math.sqrt(2.0)))


def gelu_tanh(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """GELU with a tanh in place of the error function, as in GPT-2.

    Any shape and float dtype; the result has the same. This is `F.gelu` with
    `approximate="tanh"`, and `gelu_new` in transformers. It differs from `gelu` by
    up to 5e-4. Example: gelu_tanh(1) = 0.8412.
    """
    # Clamped, because the cube of 50 overflows float16 and its slope becomes NaN.
    z = x.clamp(-TANH_SATURATED, TANH_SATURATED)
    inner = math.sqrt(2.0 / math.pi) * (z + TANH_CUBIC * z**3)
    return 0.5 * x * (1.0 + torch.tanh(inner))


def gelu_slope(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """The derivative of `gelu`, Phi(x) + x phi(x); phi is the normal density.

    Any shape and float dtype; the result has the same. Example: gelu_slope(0) = 1/2.
    """
    density = torch.exp(-0.5 * x * x) / math.sqrt(2.0 * math.pi)
    return 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))) + x * density


def _identity(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    return x


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_tanh": gelu_tanh,
    "gelu": gelu,
    "relu": torch.relu,
    "identity": _identity,  # for the ablation: the layer without its non-linearity
}
# The same functions in one pass over x each, by torch.
FUSED: dict[str, Callable[[Tensor], Tensor]] = {
    **ACTIVATIONS,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
}


def block_cost(d_model: int, d_ff: int, n_keys: int) -> dict[str, dict[str, int]]:
    """Count what one Transformer block holds and computes, biases left out.

    Multi-head attention has four (C, C) matrices whatever the number of heads; the
    feed-forward layer has C x F and F x C. A multiply and an add are two FLOPs.

    Args:
        d_model: width C of the residual stream.
        d_ff: hidden width F of the feed-forward layer.
        n_keys: keys S that one query attends to.

    Returns:
        For "projections", "scores" (scores and weighted values) and "feedforward":
        {"parameters": count, "flops": FLOPs per token, forward only}.

    Raises:
        ValueError: a size is not a positive integer.
    """
    for name, size in (("d_model", d_model), ("d_ff", d_ff), ("n_keys", n_keys)):
        if size < 1:
            raise ValueError(f"{name} must be a positive integer; got {size}")
    projections, feedforward = 4 * d_model * d_model, 2 * d_model * d_ff
    return {
        "projections": {"parameters": projections, "flops": 2 * projections},
        "scores": {"parameters": 0, "flops": 4 * n_keys * d_model},
        "feedforward": {"parameters": feedforward, "flops": 2 * feedforward},
    }


class FeedForward(nn.Module):
    """down(activation(up(x))), the same function at every position.

    Args:
        d_model: width C of a token's vector.
        d_ff: hidden width F; `EXPANSION * d_model` if None.
        activation: a key of `ACTIVATIONS`.
        bias: whether both linear maps have one (GPT-2: yes; Llama: no).

    Raises:
        ValueError: a width is below 1, or the activation is unknown.
    """

    fused = False  # True: torch's kernels for the activation

    def __init__(
        self,
        d_model: int,
        d_ff: int | None = None,
        *,
        activation: str = "gelu_tanh",
        bias: bool = True,
    ) -> None:
        super().__init__()
        d_ff = EXPANSION * d_model if d_ff is None else d_ff
        for name, size in (("d_model", d_model), ("d_ff", d_ff)):
            if size < 1:
                raise ValueError(f"{name} must be a positive integer; got {size}")
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"activation must be one of {sorted(ACTIVATIONS)}; got {activation!r}"
            )
        self.up = nn.Linear(d_model, d_ff, bias=bias)
        self.down = nn.Linear(d_ff, d_model, bias=bias)
        self.activation = activation

    def hidden(self, x: Float[Tensor, "... C"]) -> Float[Tensor, "... F"]:
        """The activations between the two maps: one number per hidden unit."""
        functions = FUSED if self.fused else ACTIVATIONS
        return functions[self.activation](self.up(x))

    def forward(self, x: Float[Tensor, "... C"]) -> Float[Tensor, "... C"]:
        """Map each token's vector by itself; no token sees another."""
        return self.down(self.hidden(x))


class Add(nn.Sequential):
    """x + layers(x), for layers applied one after another (page 1.6 is about it)."""

    def forward(self, x: Float[Tensor, "... C"]) -> Float[Tensor, "... C"]:
        """Return the input plus what the layers make of it."""
        return x + super().forward(x)


class WindowEmbedding(nn.Module):
    """Each position's last W bytes, embedded and laid side by side.

    The cheapest way to give a token a past without attention. The oldest byte comes
    first and the position's own byte last; before the text starts there is byte 0.

    Args:
        d_byte: length of one byte's vector; the result has C = window * d_byte.
        window: W, in bytes.

    Raises:
        ValueError: a size is below 1.
    """

    def __init__(self, d_byte: int, window: int) -> None:
        super().__init__()
        for name, size in (("d_byte", d_byte), ("window", window)):
            if size < 1:
                raise ValueError(f"{name} must be a positive integer; got {size}")
        self.embed = nn.Embedding(N_BYTES, d_byte)
        self.window = window

    def forward(self, ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T C"]:
        """Embed the window that ends at each position, its own byte included."""
        windows = F.pad(ids, (self.window - 1, 0)).unfold(1, self.window, 1)
        return self.embed(windows).flatten(start_dim=2)  # B T W d -> B T (W d)
