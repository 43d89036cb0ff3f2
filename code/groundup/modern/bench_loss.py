"""`groundup bench loss`: the Decoder against the GPT, for a minute and by tokens.

Here: both trained on the same plays with Part 2's loop and its plain AdamW, each with
its own best batch and learning rate, three seeds. Left out: the time of an update
(`bench_train_step`).
"""

import math
import statistics
import time
from dataclasses import dataclass, replace

import torch
from torch import nn

from groundup.bench import Claim, register
from groundup.modern.decoder import Decoder, DecoderConfig
from groundup.training.batching import Split, shakespeare_split
from groundup.training.gpt import GPT, GPTConfig
from groundup.training.loop import TrainConfig, train, window_losses

SIZES = {"d_model": 192, "n_layers": 4, "n_heads": 6}
RECIPE = TrainConfig(
    context=128, lr_end=0.0, dtype="bfloat16", eval_every=20, eval_windows=64
)
# Of batches of 8 and 16 with at least three rates each, one seed: what was best for the
# GPT in a minute, and for the Decoder on half the tokens that the GPT reads in one.
TUNED = {"GPT": {"batch": 16, "lr": 5e-3}, "Decoder": {"batch": 8, "lr": 2e-3}}
SECONDS = 60.0  # of training, a run
SEEDS = (0, 1, 2)


def model_of(name: str) -> nn.Module:
    """Return a fresh GPT or Decoder of the sizes `SIZES`."""
    if name == "GPT":
        return GPT(GPTConfig(context=RECIPE.context, **SIZES))
    return Decoder(DecoderConfig(tied=False, **SIZES))


def config_of(name: str, steps: int, seed: int = 0) -> TrainConfig:
    """Return a model's recipe with a whole schedule over so many updates."""
    schedule = {"steps": steps, "warmup": min(100, steps // 10)}
    return replace(RECIPE, seed=seed, **schedule, **TUNED[name])


@dataclass(frozen=True)
class Side:
    """A model, for how many updates, and what came of it: a number a seed, in nats."""

    name: str
    steps: int
    curves: list[dict[int, float]]  # validation on the way, by updates
    finals: list[float]  # over the whole validation play

    @property
    def mean(self) -> float:
        """Of the final losses."""
        return statistics.mean(self.finals)

    @property
    def tokens(self) -> int:
        """Trained on, in one run."""
        return self.steps * TUNED[self.name]["batch"] * RECIPE.context


def steps_in(seconds: float, name: str, split: Split) -> int:
    """Estimate how many updates fit, validation included, from a few of them."""
    model, few = model_of(name), 2 * RECIPE.eval_every
    train(model, split.train, config_of(name, 2))
    start = time.perf_counter()
    train(model, split.train, config_of(name, few), split.validation)
    return max(few, round(seconds * few / (time.perf_counter() - start)))


def spread(nats: list[float]) -> str:
    """Return mean and range in bits, of losses in nats per byte."""
    bits = [loss / math.log(2) for loss in nats]
    return f"{statistics.mean(bits):.3f} ({min(bits):.3f} to {max(bits):.3f})"


def tokens_to(goal: float, side: Side) -> float:
    """Return after how many tokens the median seed is first at goal; inf: never."""
    reached = [
        next((step for step, loss in sorted(curve.items()) if loss <= goal), math.inf)
        for curve in side.curves
    ]
    return statistics.median(reached) / side.steps * side.tokens


@register("loss")
def loss(quick: bool) -> list[Claim]:
    """Train both for the same time, and the Decoder on half the GPT's tokens too.

    Three seeds each, in turns. The losses on the way are read inside the time.
    """
    split = shakespeare_split()
    x, y = split.validation.windows(RECIPE.context)
    seconds = 4.0 if quick else SECONDS
    gpt, decoder = (
        Side(name, steps_in(seconds, name, split), [], []) for name in TUNED
    )
    half = Side("Decoder", gpt.tokens * decoder.steps // (2 * decoder.tokens), [], [])
    sides = {"GPT": gpt, "Decoder": decoder, "Decoder, half": half}
    print(f"{'model':<14}{'seed':>5}{'updates':>9}{'seconds':>9}{'bits per byte':>15}")
    for seed in SEEDS:
        for name, side in sides.items():
            torch.manual_seed(seed)
            model, config = model_of(side.name), config_of(side.name, side.steps, seed)
            start = time.perf_counter()
            history = train(model, split.train, config, split.validation)
            took = time.perf_counter() - start
            side.curves.append(history.validation)
            side.finals.append(window_losses(model, x, y).mean().item())
            bits = side.finals[-1] / math.log(2)
            print(
                f"{name:<14}{seed:>5}{side.steps:>9}{took:>9.1f}{bits:>15.3f}",
                flush=True,
            )
    goal = statistics.mean(curve[gpt.steps] for curve in gpt.curves)
    return [
        Claim(
            "GPT / Decoder bits per byte in equal time",
            gpt.mean / decoder.mean,
            1.0,
            "; ".join(f"{name} {spread(side.finals)}" for name, side in sides.items()),
        ),
        Claim(
            "GPT / Decoder bits per byte, the Decoder on half the tokens",
            gpt.mean / half.mean,
            1.0,
        ),
        Claim(
            "GPT / Decoder tokens to the GPT's loss",
            gpt.tokens / tokens_to(goal, half),
            2.0,
        ),
    ]
