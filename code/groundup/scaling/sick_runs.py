"""Runs made ill on purpose, one cause at a time, with their vital signs.

Here: a small decoder with ReLU layers in the set-up of Part 3, what can be made wrong
with its training, and a loop that goes on whatever happens and logs every sign that
this page knows. Left out: the remedies.

Page: book/4-scaling/tracking.md.
Axes: `B` batch, `T` context, `R` runs.
"""

import dataclasses
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from groundup.modern.decoder import Decoder
from groundup.modern.swiglu import SwiGLU
from groundup.modern.variants import RECIPE, SEEDS, SMALL, swap
from groundup.scaling.tracking import JsonLines, Tracker, read_json_lines
from groundup.scaling.vital_signs import (
    Throughput,
    copy_of,
    gradient_lengths,
    part_of,
    peak_memory,
    reads,
    silent_share,
    update_ratios,
)
from groundup.training.adamw import AdamW, clip_gradients, decay_groups
from groundup.training.batching import shakespeare_split
from groundup.training.loop import TrainConfig, learning_rate, window_losses
from groundup.transformer.feedforward import FeedForward

STEPS = 100
HELD_OUT_EVERY, HELD_OUT_WINDOWS = 10, 16
# What a mail archive holds where someone attached a picture.
BASE64 = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
FIRST_SCALE = 2.0**16  # of the loss; where torch.amp.GradScaler starts as well


@dataclass(frozen=True)
class Condition:
    """What is wrong with a run; by default nothing."""

    rate: float = 1.0  # times the healthy learning rate
    warmup: bool = True
    hidden_bias: float = 0.0  # of the ReLU units at the start
    leak: bool = False  # attention without its causal mask
    bad_steps: tuple[int, int] = (0, 0)  # updates (from, to) that read attachments
    grow_every: int | None = None  # updates after which a float16 loss scale doubles


HEALTHY = Condition()
ILLNESSES: Mapping[str, Condition] = {
    "rate too high": Condition(rate=30.0),
    "no warm-up": Condition(warmup=False),
    "dead units": Condition(hidden_bias=-3.0),
    "leaked labels": Condition(leak=True),
    "bad shard": Condition(bad_steps=(50, 60)),
    "fp16 overflow": Condition(grow_every=10),
}


class SeesAll(Decoder):
    """A decoder without a causal mask: every query sees every key."""

    def mask(
        self,
        positions: Int[Tensor, "B T"],
        key_positions: Int[Tensor, "B S"],
        *,
        plain: bool,
    ) -> Tensor:
        """Return a mask that allows everything."""
        return torch.ones(1, 1, positions.shape[1], key_positions.shape[1]).bool()


def small_relu_decoder(condition: Condition = HEALTHY) -> Decoder:
    """Return the decoder of the page: `SMALL`, with ReLU layers four times as wide."""
    model = (SeesAll if condition.leak else Decoder)(SMALL)

    def relu_layer(old: nn.Module) -> FeedForward:
        layer = FeedForward(SMALL.d_model, activation="relu")
        nn.init.constant_(layer.up.bias, condition.hidden_bias)
        return layer

    return swap(model, SwiGLU, relu_layer)


def attachments(
    batch: int, context: int, generator: torch.Generator
) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
    """Return windows of base64, drawn evenly: nobody pays less than ln 64 nats."""
    drawn = torch.randint(64, (batch, context + 1), generator=generator)
    windows = torch.tensor(list(BASE64))[drawn]
    return windows[:, :-1], windows[:, 1:]


@torch.no_grad()
def through_float16(model: nn.Module, scale: float) -> None:
    """Make the gradients what they are after a backward pass in float16.

    The loss was multiplied by scale, so that small gradients do not become 0; what is
    above 65,504 after that is infinite. Here only the result is rounded, not what
    passes between layers.
    """
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad = (parameter.grad * scale).half().float() / scale


def watched_run(
    condition: Condition, seed: int, tracker: Tracker, *, steps: int = STEPS
) -> Decoder:
    """Train a small decoder and log its vital signs, well or ill.

    Logged at every update: loss (of the batch, before the update; nats per byte),
    gradient/PART (length before clipping) and gradient/all, update/all (over the length
    of the matrices), silent (share of ReLU units that are 0 for the whole batch), rate,
    tokens_per_s, memory (peak, bytes); now and then held_out (nats per byte).

    Args:
        condition: what is wrong.
        seed: of weights and batches.
        tracker: is started and closed here.
        steps: updates done; the schedule is always that of a run of STEPS.

    Returns:
        The model, in training mode. Nothing stops a run whose numbers are NaN.
    """
    torch.manual_seed(seed)
    model = small_relu_decoder(condition)
    warmup = RECIPE.warmup if condition.warmup else 0
    config = dataclasses.replace(
        RECIPE, steps=STEPS, lr=RECIPE.lr * condition.rate, warmup=warmup, seed=seed
    )
    optimizer = AdamW(decay_groups(model, config.weight_decay))
    generator, speed = torch.Generator().manual_seed(seed), Throughput()
    held_out = [
        part[:HELD_OUT_WINDOWS]
        for part in shakespeare_split().validation.windows(config.context)
    ]
    scale = FIRST_SCALE
    with closing(tracker), reads(model, "down") as hidden:
        tracker.start({**vars(config), "condition": vars(condition)})
        for step in range(steps):
            x, y = _batch(condition, step, config, generator)
            loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
            optimizer.zero_grad()
            loss.backward()
            if condition.grow_every is not None:
                through_float16(model, scale)
                scale *= 2 if (step + 1) % condition.grow_every == 0 else 1
            signs = {"loss": loss.item(), "silent": _silent(hidden)}
            lengths = gradient_lengths(model, part_of)
            signs |= {f"gradient/{part}": v for part, v in lengths.items()}
            signs["gradient/all"] = clip_gradients(model.parameters(), config.clip)
            before = _matrices(copy_of(model))
            signs["rate"] = learning_rate(step, config)
            optimizer.step(signs["rate"])
            after = dict(model.named_parameters())
            signs["update/all"] = update_ratios(before, after)["all"]
            signs["tokens_per_s"] = speed.update(y.numel())
            signs["memory"] = float(peak_memory())
            if step % HELD_OUT_EVERY == 0 or step == steps - 1:
                signs["held_out"] = window_losses(model, *held_out).mean().item()
            tracker.log(step, signs)
    return model


def observe(
    condition: Condition,
    folder: Path,
    *,
    seeds: tuple[int, ...] = SEEDS,
    steps: int = STEPS,
) -> tuple[dict[str, Float[np.ndarray, "R _"]], Decoder]:
    """Return each sign of R runs, a row a seed, and the model of the last run.

    Args:
        condition: what is wrong.
        folder: gets a file of JSON lines for each seed.
        seeds: one run each.
        steps: as for `watched_run`.
    """
    runs = []
    for seed in seeds:
        path = folder / f"{seed}.jsonl"
        model = watched_run(condition, seed, JsonLines(path), steps=steps)
        runs.append(read_json_lines(path))
    return {
        sign: np.array([list(run[sign].values()) for run in runs]) for sign in runs[0]
    }, model


def _batch(
    condition: Condition, step: int, config: TrainConfig, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    first, end = condition.bad_steps
    draw = attachments if first <= step < end else shakespeare_split().train.sample
    return draw(config.batch, config.context, generator)


def _matrices(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: p for name, p in parameters.items() if p.dim() >= 2}


def _silent(hidden: Mapping[str, Float[Tensor, "..."]]) -> float:
    return sum(map(silent_share, hidden.values())) / len(hidden)
