"""The trainer of Parts 4 to 9: Part 2's loop, made long, large and restartable.

Here: the recipe, one update of a batch that may be cut into micro-batches and spread
over processes, what is saved so that a killed run goes on bit for bit, and the loop
with validation, checkpoints, trackers and a clean way to stop. Left out: each of these
pieces; see `mixed_precision`, `schedules`, `checkpointing`, `tracking` and
`distributed`.

Pages: book/4-scaling/checkpointing.md, book/4-scaling/distributed.md.
Axes: `B` batch, `T` context.
"""

import math
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor, nn
from tqdm import tqdm

from groundup.scaling import checkpointing, distributed
from groundup.scaling.mixed_precision import accumulate
from groundup.scaling.optimizers import make_optimizer
from groundup.scaling.random_state import random_state, restore_random_state
from groundup.scaling.recipe import TrainerConfig, Watch
from groundup.scaling.schedules import share
from groundup.scaling.stopping import stop_asked
from groundup.scaling.tracking import Tracker, Trackers
from groundup.training.batching import Corpus
from groundup.training.loop import History, in_mode, window_losses
from groundup.training.loss import IGNORE


@runtime_checkable
class Source(Protocol):
    """Where batches come from; `Corpus` is one."""

    def sample(
        self, batch: int, context: int, generator: torch.Generator
    ) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
        """Draw windows and their targets; targets that are IGNORE do not count."""


class Trainer:
    """A model in training: everything that the next update depends on.

    Args:
        model: maps ids (B, T) to logits (B, T, V).
        source: draws the batches.
        config: the recipe.
        how: "none", or "ddp" or "fsdp" under torchrun.

    Raises:
        ValueError: batch does not divide among processes and micro-batches, or several
            processes would not talk.
    """

    def __init__(
        self,
        model: nn.Module,
        source: Source,
        config: TrainerConfig,
        *,
        how: str = "none",
    ) -> None:
        self.source, self.config = source, config
        self.world = distributed.current_world()
        if how == "none" and self.world.size > 1:
            raise ValueError(
                f"how must be ddp or fsdp for {self.world.size} processes; got {how!r}"
            )
        self.rows = distributed.rows(config.batch, self.world)
        n_rows = config.batch // self.world.size
        if n_rows % config.micro_batches:
            raise ValueError(
                f"micro_batches must divide the {n_rows} windows of each of "
                f"{self.world.size} processes; got {config.micro_batches}"
            )
        self.model = model
        self.wrapped = distributed.wrap(model, how)
        self.quiet = distributed.quiet(self.wrapped)
        self.optimizer = make_optimizer(
            model, config.optimizer, config.lr, config.weight_decay
        )
        self.generator = torch.Generator().manual_seed(config.seed)
        self.history = History()

    @property
    def step(self) -> int:
        """Updates done."""
        return len(self.history.losses)

    def update(self) -> None:
        """Draw a batch, take this process's rows of it, and update the parameters.

        Raises:
            FloatingPointError: the loss or the gradient is infinite or not a number;
                the parameters are those of before.
        """
        config, size = self.config, self.world.size
        x, y = self.source.sample(config.batch, config.context, self.generator)
        pieces = [t[self.rows].chunk(config.micro_batches) for t in (x, y)]
        self.optimizer.zero_grad()
        part = accumulate(
            self.wrapped,
            list(zip(*pieces, strict=True)),
            dtype=config.dtype,
            # Gradients are averaged over the processes, and shall be summed.
            n_tokens=int((y != IGNORE).sum()) / size,
            quiet=self.quiet,
        )
        loss = distributed.total(part) / size
        norm = distributed.clip_gradients(self.model.parameters(), config.clip)
        if not math.isfinite(loss + norm):
            raise FloatingPointError(
                f"update {self.step}: loss {loss}, norm of the gradient {norm}"
            )
        self.optimizer.step(share(self.step, config.schedule))
        self.history.losses.append(loss)
        self.history.grad_norms.append(norm)

    def tensors(self) -> dict[str, Tensor]:
        """Return all that the next update depends on, whole, as named tensors."""
        history = self.history
        found = {
            **{f"model/{k}": v for k, v in self.model.state_dict().items()},
            **{f"optimizer/{k}": v for k, v in self.optimizer.tensors().items()},
        }
        found = {name: distributed.whole(tensor) for name, tensor in found.items()}
        found |= random_state(data=self.generator)
        for name in ("losses", "grad_norms"):
            column = torch.tensor(getattr(history, name), dtype=torch.float64)
            found[f"history/{name}"] = column
        return found

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `tensors` returned.

        Raises:
            ValueError: a name or a shape differs from this model's.
        """

        def group(name: str) -> dict[str, Tensor]:
            start = f"{name}/"
            return {
                k.removeprefix(start): v
                for k, v in tensors.items()
                if k.startswith(start)
            }

        distributed.load_whole(self.model, group("model"))
        self.optimizer.load(group("optimizer"))
        restore_random_state(tensors, data=self.generator)
        for name, column in group("history").items():
            setattr(self.history, name, column.tolist())

    def validate(self, windows: tuple[Tensor, Tensor]) -> float:
        """Note the loss of fixed windows; keep the weights if it is the lowest yet.

        Every process reads all windows: with sharded weights none can stay behind.
        """
        loss = window_losses(self.wrapped, *windows).mean().item()
        if not self.history.validation or loss < self.history.best_loss:
            self.history.best_step = self.step
            self.history.best_state = {
                name: distributed.whole(tensor).clone()
                for name, tensor in self.model.state_dict().items()
            }
        self.history.validation[self.step] = loss
        return loss


def fit(
    model: nn.Module,
    source: Source,
    config: TrainerConfig,
    *,
    validation: Corpus | None = None,
    watch: Watch = Watch(),  # noqa: B008
    folder: Path | None = None,
    tokenizer: str = "",
    trackers: tuple[Tracker, ...] = (),
    how: str = "none",
    stop_at: int | None = None,
    progress: bool = False,
) -> History:
    """Train model in place; with a folder, go on from the newest checkpoint in it.

    Stopped by Ctrl-C or SIGTERM, a run with a folder ends the update, saves, and
    raises. A second Ctrl-C is obeyed at once.

    Args:
        model: maps ids (B, T) to logits (B, T, V). In training mode meanwhile; left in
            the mode it was found in.
        source: draws the batches.
        config: the recipe. The same recipe, model and seed give the same weights,
            however often the run is killed and resumed.
        validation: fixed windows of it are read now and then.
        watch: how often to validate and to save.
        folder: for checkpoints; the best weights go to its folder `best`.
        tokenizer: digest of what made the ids, kept in the checkpoints.
        trackers: get the config, then the numbers of every update.
        how: "none", or "ddp" or "fsdp" under torchrun.
        stop_at: updates after which to save and return; None: the schedule's end.
        progress: draw a bar.

    Returns:
        The losses of all updates, those before a resume too; best_state is whole.

    Raises:
        ValueError: a checkpoint in folder is of another recipe, model or tokenizer, or
            no document is as long as the context.
        FloatingPointError: a loss or a gradient is infinite or not a number.
        KeyboardInterrupt: the run was stopped; its message says where it was saved.
    """
    trainer = Trainer(model, source, config, how=how)
    history, first = trainer.history, trainer.world.first
    if folder is not None:
        _resume(trainer, folder, tokenizer)
    if validation is not None:
        parts = validation.windows(config.context)
        windows = tuple(part[: watch.eval_windows] for part in parts)
    n_steps = config.schedule.steps
    last = n_steps if stop_at is None else min(stop_at, n_steps)
    n_tokens = config.batch * config.context
    tracker = Trackers(*(trackers if first else ()))
    with (
        closing(tracker),
        in_mode(model, training=True),
        stop_asked(folder is not None) as asked,
        tqdm(total=n_steps, initial=trainer.step, disable=not (progress and first))
        as bar,
    ):  # fmt: skip
        tracker.start({**asdict(config), "how": how, "processes": trainer.world.size})
        while trainer.step < last:
            began = time.perf_counter()
            trainer.update()
            step, loss = trainer.step, history.losses[-1]
            seconds = time.perf_counter() - began
            values = {"loss": loss, "grad_norm": history.grad_norms[-1]}
            values["rate"] = config.lr * share(step - 1, config.schedule)
            tracker.log(step, {**values, "tokens_per_s": n_tokens / seconds})
            bar.update()
            bar.set_postfix_str(
                f"loss {loss:.3f}, {n_tokens / seconds:,.0f} tokens/s", refresh=False
            )
            stop = distributed.total(float(asked.is_set())) > 0
            over = step == last or stop
            if validation is not None and (
                step % watch.eval_every == 0 or step == n_steps
            ):
                found = trainer.validate(windows)
                tracker.log(step, {"validation_loss": found})
                if folder is not None and first and history.best_step == step:
                    checkpointing.save(
                        folder / "best",
                        step,
                        history.best_state,
                        {"validation_loss": found},
                        keep=1,
                    )
            if folder is not None and (step % watch.save_every == 0 or over):
                _save(trainer, folder, tokenizer, watch.keep)
            if stop:
                raise KeyboardInterrupt(
                    f"stopped after update {step} of {n_steps}; saved in {folder}, "
                    f"from where the same call goes on"
                )
    return history


def _save(trainer: Trainer, folder: Path, tokenizer: str, keep: int) -> None:
    """Write a checkpoint; every process takes part in gathering it."""
    tensors, history = trainer.tensors(), trainer.history
    if trainer.world.first:
        meta = {
            "config": asdict(trainer.config),
            "tokenizer": tokenizer,
            "validation": {str(k): v for k, v in history.validation.items()},
            "best_step": history.best_step,
        }
        checkpointing.save(folder, trainer.step, tensors, meta, keep=keep)


def _resume(trainer: Trainer, folder: Path, tokenizer: str) -> None:
    """Go back to the newest checkpoint, if there is one."""
    path = checkpointing.latest(folder)
    if path is None:
        return
    saved = checkpointing.load(path)
    old, new = saved.meta["config"], asdict(trainer.config)
    for name in old | new:
        if old.get(name) != new.get(name):
            raise ValueError(
                f"{path} was made with {name}={old.get(name)!r}; got "
                f"{new.get(name)!r}: go on with that, or name another folder"
            )
    if saved.meta["tokenizer"] != tokenizer:
        raise ValueError(
            f"{path} was made with the tokenizer {saved.meta['tokenizer']!r}; "
            f"got {tokenizer!r}"
        )
    trainer.load(saved.tensors)
    history = trainer.history
    history.validation = {int(k): v for k, v in saved.meta["validation"].items()}
    history.best_step = saved.meta["best_step"]
    best = checkpointing.latest(folder / "best")
    if best is not None:
        kept = checkpointing.load(best)
        history.best_state = kept.tensors if kept.step == history.best_step else None
