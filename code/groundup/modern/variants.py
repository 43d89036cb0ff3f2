"""One small training set-up, and ways to change a single part of its decoder.

Every page of Part 3 ends by putting its part into this set-up: a decoder of two
blocks, the same batches, three seeds. Here: sizes and recipe, the runs over seeds, and
the exchange of every module of one kind. Left out: anything about a particular part.

Axes: none of its own.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from groundup.modern.decoder import Decoder, DecoderConfig
from groundup.training.batching import shakespeare_split
from groundup.training.loop import TrainConfig, train, window_losses

SMALL = DecoderConfig(d_model=64, n_layers=2, n_heads=4, tied=False)
RECIPE = TrainConfig(
    steps=200, batch=8, context=64, lr=1e-2, warmup=20, eval_every=50, eval_windows=256
)
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Run:
    """A trained model and its losses, in nats per byte."""

    model: nn.Module
    losses: list[float]  # of each update's batch
    validation: dict[int, float]  # by updates done
    final: float  # over the validation play, or the part that was asked for


def train_seeds(
    make: Callable[[], nn.Module],
    recipe: TrainConfig = RECIPE,
    seeds: tuple[int, ...] = SEEDS,
    n_final: int | None = None,
) -> list[Run]:
    """Train one model a seed on the plays; the seed decides weights and batches.

    Args:
        make: builds the model, from torch's global generator.
        recipe: its own seed is replaced.
        seeds: one run each.
        n_final: windows of the validation play, from its start, that the final loss
            is taken over; None: all, 0: none (the loss is then NaN).
    """
    split = shakespeare_split()
    runs = []
    for seed in seeds:
        torch.manual_seed(seed)
        model = make()
        config = TrainConfig(**{**vars(recipe), "seed": seed})
        history = train(model, split.train, config, split.validation)
        x, y = split.validation.windows(recipe.context)
        final = math.nan
        if n_final != 0:
            final = window_losses(model, x[:n_final], y[:n_final]).mean().item()
        runs.append(Run(model, history.losses, history.validation, final))
    return runs


def swap(
    model: nn.Module, kind: type[nn.Module], make: Callable[[nn.Module], nn.Module]
) -> nn.Module:
    """Replace every submodule of a kind by what make returns for it; return model.

    Raises:
        ValueError: model holds no such submodule.

    Example: `swap(Decoder(SMALL), RMSNorm, lambda old: nn.LayerNorm(64))`.
    """
    found = [(m, n, c) for m in model.modules() for n, c in m.named_children()]
    found = [(m, n, c) for m, n, c in found if isinstance(c, kind)]
    if not found:
        raise ValueError(f"model holds no {kind.__name__}")
    for parent, name, child in found:
        setattr(parent, name, make(child))
    return model


def small_decoder(**changes) -> Decoder:
    """Return a fresh decoder of the sizes `SMALL`, with some fields changed."""
    return Decoder(DecoderConfig(**{**vars(SMALL), **changes}))
