"""A ladder of small models: the runs behind the scaling laws.

Here: the sizes, the rule for their learning rate, one run of a size and a budget, and
the maker of the recording `scaling_ladder`. Left out: the laws that are fitted to the
losses (`scaling_laws`). What is here decides the recording's numbers, so that a change
asks for all its runs anew.

Each budget of bytes has a run of its own with the schedule "wsd": a constant rate, then
a straight fall to 0 over the last fifth. Runs of one size and seed are alike up to
where the shorter begins to fall. They share this trunk: a budget goes on from where
the budget of half its length began to fall.

Source: Hägele et al. (2024), section 3, for runs that share their trunk; Yang et al.
(2021) for a rate that falls as one over the width. Page:
book/4-scaling/scaling_laws.md.
"""

import time
from collections.abc import Mapping
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from groundup.artifacts import remember
from groundup.makers import Config, register
from groundup.modern.decoder import Decoder, DecoderConfig
from groundup.scaling.schedules import Schedule, share
from groundup.training.adamw import AdamW, clip_gradients, decay_groups
from groundup.training.batching import shakespeare_split
from groundup.training.loop import DTYPES, in_mode, window_losses

USES = ("groundup.modern.decoder", "groundup.training.adamw")
BATCH, CONTEXT = 16, 64  # windows an update, bytes a window
PER_UPDATE = BATCH * CONTEXT  # bytes
WARMUP, WEIGHT_DECAY, CLIP = 32, 0.1, 1.0
FIRST = 2**17  # bytes of the smallest budget: 128 updates

Size = tuple[int, int, int]  # d_model, n_layers, n_heads
SIZES: tuple[Size, ...] = (
    (16, 2, 2),
    (24, 2, 2),
    (32, 2, 2),
    (48, 3, 3),
    (64, 4, 4),
    (96, 4, 4),
    (128, 5, 4),
)
HELD_OUT: Size = (192, 5, 6)  # predicted before it is trained
# What is trained: each size, seed, factor to its learning rate, and number format on
# the first n_budgets budgets; each budget is twice the one before.
CONFIG = {
    "runs": [
        {"sizes": [list(size) for size in SIZES[:-1]], "n_budgets": 6},
        {"sizes": [list(SIZES[-1])], "n_budgets": 5},
        {"sizes": [list(HELD_OUT)], "n_budgets": 4},
        {"sizes": [list(s) for s in SIZES[:4]], "seeds": [1, 2], "n_budgets": 4},
        {
            "sizes": [list(SIZES[i]) for i in (0, 3, 6)],
            "factors": [0.25, 0.5, 2.0, 4.0],
            "n_budgets": 2,
        },
        {"sizes": [list(SIZES[3])], "dtypes": ["float32"], "n_budgets": 4},
    ]
}


def rate_for(d_model: int) -> float:
    """Return the highest learning rate for a width, the rule of the page: 1 / (3 C)."""
    return 1 / (3 * d_model)


def decoder_config(size: Size) -> DecoderConfig:
    """Return the config of a model of that size, with a head of its own."""
    d_model, n_layers, n_heads = size
    return DecoderConfig(
        d_model=d_model, n_layers=n_layers, n_heads=n_heads, tied=False
    )


def count_parameters(model: Decoder) -> tuple[int, int]:
    """Return the parameters outside of embedding and head, and those of these two."""
    of_the_tables = model.embed.weight.numel() + model.head.weight.numel()
    return sum(p.numel() for p in model.parameters()) - of_the_tables, of_the_tables


class Training:
    """A model in training, and all that its next update depends on.

    Args:
        size: of the model.
        seed: of weights and batches.
        lr: highest learning rate.
        dtype: of the matrix products: float32 or bfloat16.
    """

    def __init__(self, size: Size, seed: int, lr: float, dtype: str) -> None:
        torch.manual_seed(seed)
        self.model = Decoder(decoder_config(size))
        self.optimizer = AdamW(decay_groups(self.model, WEIGHT_DECAY))
        self.generator = torch.Generator().manual_seed(seed)
        self.lr, self.dtype = lr, dtype
        self.step = 0  # updates done
        self.seconds: list[float] = []  # of each update

    def go_on(self, until: int, schedule: Schedule) -> None:
        """Update at the rates of schedule until so many updates are done."""
        corpus = shakespeare_split().train
        autocast = torch.autocast("cpu", DTYPES[self.dtype], self.dtype != "float32")
        with in_mode(self.model, training=True):
            while self.step < until:
                start = time.perf_counter()
                x, y = corpus.sample(BATCH, CONTEXT, self.generator)
                with autocast:
                    logits = self.model(x)
                loss = F.cross_entropy(logits.flatten(0, 1).float(), y.flatten())
                self.optimizer.zero_grad()
                loss.backward()
                clip_gradients(self.model.parameters(), CLIP)
                self.optimizer.step(self.lr * share(self.step, schedule))
                self.step += 1
                self.seconds.append(time.perf_counter() - start)

    def loss(self) -> float:
        """Return the loss over the whole validation play, in nats per byte."""
        windows = shakespeare_split().validation.windows(CONTEXT)
        return window_losses(self.model, *windows).mean().item()

    def tensors(self) -> dict[str, Tensor]:
        """Return the state for `load`."""
        found = {"generator": self.generator.get_state()}
        for i, (name, p) in enumerate(self.model.named_parameters()):
            mean, square = self.optimizer.state[name]
            found |= {f"parameter_{i}": p, f"mean_{i}": mean, f"square_{i}": square}
        return {name: tensor.detach().clone() for name, tensor in found.items()}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Any], step: int) -> None:
        """Go back to the state that `tensors` returned after so many updates."""
        self.generator.set_state(tensors["generator"])
        for i, (name, p) in enumerate(self.model.named_parameters()):
            for kind, own in zip(
                ("parameter", "mean", "square"),
                (p, *self.optimizer.state[name]),
                strict=True,
            ):
                own.copy_(tensors[f"{kind}_{i}"])
            self.optimizer.n_steps[name] = step
        self.step = step


def schedule_for(n_bytes: int) -> Schedule:
    """Return the schedule of a run that reads so many bytes."""
    return Schedule(n_bytes // PER_UPDATE, warmup=WARMUP, shape="wsd")


def run(config: Config) -> dict[str, Any]:
    """Train one size on one budget: a piece of the recording.

    Args:
        config: size, seed, lr, dtype, and n_bytes, the budget. A budget above `FIRST`
            goes on from the run of half of it.

    Returns:
        A table `result` with the final loss, the loss where the rate began to fall, and
        the seconds of an update (median); and the state there, as tensors.
    """
    size, n_bytes = tuple(config["size"]), config["n_bytes"]
    training = Training(size, config["seed"], config["lr"], config["dtype"])
    if n_bytes > FIRST:
        half = remember(run, {**config, "n_bytes": n_bytes // 2}, USES)
        training.load(half.values, half["result"]["constant_updates"])
    schedule = schedule_for(n_bytes)
    constant_updates = schedule.steps - schedule.n_falling
    training.go_on(constant_updates, schedule)
    state, constant_loss = training.tensors(), training.loss()
    training.go_on(schedule.steps, schedule)
    n_parameters, n_outside = count_parameters(training.model)
    result = {
        **config,
        "n_parameters": n_parameters,  # without embedding and head
        "n_outside": n_outside,  # embedding and head
        "loss": training.loss(),  # nats per byte
        "constant_updates": constant_updates,
        "constant_loss": constant_loss,
        "update_seconds": median(training.seconds),
    }
    return {"result": result, **state}


def plan(config: Config) -> list[dict[str, Any]]:
    """Return the configs for `run`, each once, in an order in which none waits."""
    jobs = [
        {"size": size, "seed": seed, "lr": lr, "dtype": dtype, "n_bytes": FIRST * 2**i}
        for row in config["runs"]
        for size in row["sizes"]
        for dtype in row.get("dtypes", ["bfloat16"])
        for lr in [f * rate_for(size[0]) for f in row.get("factors", [1.0])]
        for seed in row.get("seeds", [0])
        for i in range(row["n_budgets"])
    ]
    return [job for i, job in enumerate(jobs) if job not in jobs[:i]]


@register("scaling_ladder", uses=USES, small=CONFIG)
def ladder(config: Config) -> dict[str, Any]:
    """Return the table `runs`: what `run` says of each run of the plan."""
    return {"runs": [remember(run, job, USES)["result"] for job in plan(config)]}
