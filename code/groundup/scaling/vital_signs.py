"""Vital signs of a run: numbers that say more than its loss.

Here: lengths of gradients and of updates, by part of the model; units that never speak;
a check that no logit depends on a later token; tokens a second; memory. Left out: where
the numbers go (`tracking`), and runs on which they are seen (`sick_runs`).

Page: book/4-scaling/tracking.md.
Axes: `...` any leading axes (batch, position), `B` batch, `T` positions, `F` hidden
units.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from groundup.provenance import peak_bytes

# The first one that a name contains decides; "attention_norm" is a norm.
PARTS = ("embed", "norm", "attention", "feedforward", "head")
Group = Callable[[str], str] | None  # from a tensor's name to its group; None: one, all


def part_of(name: str) -> str:
    """Return which of `PARTS` a parameter of that name belongs to, or "other".

    Example: `part_of("blocks.0.attention.qkv.weight")` is "attention".
    """
    return next((part for part in PARTS if part in name), "other")


def lengths(tensors: Mapping[str, Tensor], group: Group = None) -> dict[str, float]:
    """Return the Euclidean length of all tensors of a group, laid end to end.

    Args:
        tensors: by name.
        group: gives the group of a name; None: all are one, called "all".

    Example: `lengths({"a": tensor([3.0]), "b": tensor([4.0])})` is `{"all": 5.0}`.
    """
    parts: dict[str, list[float]] = {}
    for name, tensor in tensors.items():
        length = torch.linalg.vector_norm(tensor.detach().float()).item()
        parts.setdefault(group(name) if group else "all", []).append(length)
    return {name: math.hypot(*found) for name, found in parts.items()}


def gradient_lengths(model: nn.Module, group: Group = None) -> dict[str, float]:
    """Return the length of the gradient of each group; parameters without one have 0.

    Call it before clipping, or see the clipped ones.
    """
    grads = {
        name: torch.zeros(1) if p.grad is None else p.grad
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    return lengths(grads, group)


def copy_of(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of the parameters by name, to measure an update against."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def update_ratios(
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    group: Group = None,
) -> dict[str, float]:
    """Return, for each group, the length of what changed over the length it had.

    A ratio of 0.001 means: a thousand such updates in one direction replace it.

    Args:
        before: as from `copy_of`.
        after: the same names; `dict(model.named_parameters())` will do.
        group: as for `lengths`.

    Returns:
        Ratios; of a group that was all zeros, infinity (or NaN, if it still is).
    """
    moved = lengths({n: after[n].detach() - old for n, old in before.items()}, group)
    had = lengths(before, group)
    return {
        name: length / had[name] if had[name] else length * math.inf
        for name, length in moved.items()
    }


def silent_share(hidden: Float[Tensor, "... F"]) -> float:
    """Return the share of the hidden units that are at most 0 for every token.

    Behind a ReLU such a unit passes nothing on and gets no gradient. With few tokens,
    rare units are counted as silent; with smooth activations, the number says little.
    A unit that is NaN is not silent.
    """
    silent = (hidden.detach() <= 0).reshape(-1, hidden.shape[-1]).all(0)
    return silent.float().mean().item()


@contextmanager
def reads(model: nn.Module, name: str) -> Iterator[dict[str, Tensor]]:
    """Keep what submodules of that last name read, while the context is open.

    The inputs of `down` are the hidden units of a feed-forward layer.

    Raises:
        ValueError: there is no such submodule.

    Example: `with reads(model, "down") as hidden: model(x)`, then `hidden` maps
    "blocks.0.feedforward.down" to a tensor (B, T, F); the last call counts.
    """
    found = {n: m for n, m in model.named_modules() if n.split(".")[-1] == name}
    if not found:
        raise ValueError(f"model has no submodule called {name!r}")
    seen: dict[str, Tensor] = {}

    def keep(path: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple) -> None:
            seen[path] = inputs[0].detach()

        return hook

    hooks = [m.register_forward_pre_hook(keep(n)) for n, m in found.items()]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def future_influence(model: nn.Module, ids: Int[Tensor, "B T"]) -> float:
    """Return the largest change of a logit when a token after it is another.

    The second half of every row is replaced, each token by the next id (the last by
    0). For a model that predicts it must be 0, up to rounding.

    Args:
        model: maps ids (B, T) to logits (B, T, V). Use evaluation mode.
        ids: tokens, at least two in a row.

    Raises:
        ValueError: a row has one token.
    """
    if ids.shape[1] < 2:
        raise ValueError(f"ids must have at least 2 tokens a row; got {ids.shape[1]}")
    half = ids.shape[1] // 2
    before, changed = model(ids), ids.clone()
    changed[:, half:] = (changed[:, half:] + 1) % before.shape[-1]
    return (model(changed) - before)[:, :half].abs().max().item()


class Throughput:
    """Tokens a second over the last few updates.

    Args:
        over: updates that the rate is taken over.
        clock: gives seconds.
    """

    def __init__(
        self, over: int = 10, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        if over < 1:
            raise ValueError(f"over must be at least 1; got {over}")
        self.clock = clock
        self._marks = deque([(clock(), 0)], maxlen=over + 1)

    def update(self, n_tokens: int) -> float:
        """Count the tokens of an update that has just ended; return the rate."""
        self._marks.append((self.clock(), self._marks[-1][1] + n_tokens))
        (start, first), (end, last) = self._marks[0], self._marks[-1]
        return (last - first) / (end - start) if end > start else math.inf


def peak_memory(device: str = "cpu") -> int:
    """Return the most bytes held so far: by this process, or by torch on a GPU."""
    return peak_bytes({"kind": torch.device(device).type, "name": device})
