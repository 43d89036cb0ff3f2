"""The experiments of the page on distributed training, as every process runs them.

Here: a way to start a module in several processes, updates by one or many processes
that can be compared number by number, two mistakes that can be switched on, and what a
process holds and sends. `torchrun --nproc-per-node 2 -m
groundup.scaling.distributed_runs FOLDER` runs all and leaves what it measured. Left
out: the trainer, which does the same with checkpoints.

Page: book/4-scaling/distributed.md.
Axes: `B` batch, `T` context.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from groundup.modern.decoder import Decoder, DecoderConfig
from groundup.scaling import distributed
from groundup.scaling.mixed_precision import accumulate
from groundup.scaling.sharded_checkpoint import save_shards
from groundup.scaling.traffic import Traffic
from groundup.training.adamw import AdamW, decay_groups
from groundup.training.batching import Corpus, shakespeare_split
from groundup.training.loop import window_losses
from groundup.training.loss import IGNORE

SMALLER = DecoderConfig(d_model=32, n_layers=2, n_heads=2, tied=False)
BATCH, CONTEXT, MICRO_BATCHES = 16, 32, 4
LR, WEIGHT_DECAY, CLIP = 1e-2, 0.1, 1.0
MISTAKES = ("", "local mean", "same rows")
FOUND = "found.json"
Batch = tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]


def torchrun(
    module: str, *arguments: str, processes: int = 2, seconds: float = 120
) -> str:
    """Run `torchrun -m module arguments` on this machine; return what it printed.

    Raises:
        RuntimeError: it ended with an error; the message has the end of its output.
        subprocess.TimeoutExpired: it took more than `seconds`, and was stopped.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*launcher, "--nproc-per-node", str(processes), "-m", module, *arguments],
        env={"OMP_NUM_THREADS": "1", **os.environ},
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{module} failed:\n{(done.stdout + done.stderr)[-3000:]}")
    return done.stdout


def answers(
    corpus: Corpus, n_batches: int, seed: int, batch: int = BATCH
) -> list[Batch]:
    """Draw batches in which only the end of each window counts, short ends first.

    So it is when a model is trained on answers to questions, sorted by length. With two
    processes, the first one gets few counted targets and the second one many.
    """
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(n_batches):
        x, y = corpus.sample(batch, CONTEXT, generator)
        n_counted = torch.randint(1, CONTEXT + 1, (batch,), generator=generator)
        asked = torch.arange(CONTEXT) < CONTEXT - n_counted.sort().values[:, None]
        batches.append((x, y.masked_fill(asked, IGNORE)))
    return batches


@dataclass
class Training:
    """A model, and its optimizer, in this process."""

    model: nn.Module
    wrapped: nn.Module
    optimizer: AdamW
    world: distributed.World

    @classmethod
    def begin(cls, how: str = "none", seed: int = 0, dtype=torch.float64) -> "Training":
        """Draw a small decoder and wrap it; "none" is for a single process."""
        torch.manual_seed(seed)
        model = Decoder(SMALLER).to(dtype)
        wrapped = distributed.wrap(model, how)
        world = distributed.World() if how == "none" else distributed.current_world()
        return cls(model, wrapped, AdamW(decay_groups(model, WEIGHT_DECAY)), world)

    def update(
        self,
        batch: Batch,
        *,
        micro_batches: int = 1,
        quiet: bool = True,
        mistake: str = "",
    ) -> tuple[float, float]:
        """Update on this process's rows of a batch; return its loss and gradient norm.

        Args:
            batch: of all processes.
            micro_batches: pieces in which a process reads its rows.
            quiet: send nothing before the last of them.
            mistake: "local mean": every process divides by its own counted targets.
                "same rows": every process reads those of the first.

        Raises:
            ValueError: mistake is unknown, or the batch does not divide.
        """
        if mistake not in MISTAKES:
            raise ValueError(f"mistake must be one of {MISTAKES}; got {mistake!r}")
        x, y = batch
        size, world = self.world.size, self.world
        if mistake == "same rows":
            world = distributed.World(0, size)
        n_counted = int((y != IGNORE).sum()) / size
        x, y = (t[distributed.rows(len(x), world)] for t in (x, y))
        if mistake:
            n_counted = int((y != IGNORE).sum())
        self.optimizer.zero_grad()
        pieces = zip(x.chunk(micro_batches), y.chunk(micro_batches), strict=True)
        part = accumulate(
            self.wrapped,
            list(pieces),
            n_tokens=n_counted,
            quiet=distributed.quiet(self.wrapped) if quiet else nullcontext,
        )
        loss = distributed.total(part) / size if size > 1 else part
        norm = distributed.clip_gradients(self.model.parameters(), CLIP)
        self.optimizer.step(LR)
        return loss, norm

    def losses(self, batches: Iterable[Batch], **options) -> list[float]:
        """Update once for each batch; return the losses, in nats per token."""
        return [self.update(batch, **options)[0] for batch in batches]

    def held_out(self, windows: Sequence[Tensor]) -> float:
        """Return the loss of fixed windows, in nats per token.

        Under FSDP all processes must call it.
        """
        return window_losses(self.model, *windows).mean().item()

    def held(self) -> dict[str, int]:
        """Return the bytes of parameters, gradients and moments in this process."""

        def size(tensors: Iterable[Tensor | None]) -> int:
            parts = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
            return sum(t.numel() * t.element_size() for t in parts if t is not None)

        parameters = list(self.model.parameters())
        return {
            "parameters": size(parameters),
            "gradients": size(p.grad for p in parameters),
            "moments": size(t for pair in self.optimizer.state.values() for t in pair),
        }


def experiments(
    folder: Path, n_same: int = 12, n_long: int = 40, seeds: int = 3
) -> dict:
    """Run everything that needs several processes; return the numbers.

    Args:
        folder: gets the shards of a model, saved by all processes.
        n_same: updates of the runs that are compared with a single process.
        n_long: updates of the runs with and without mistakes.
        seeds: how many of the latter.
    """
    split = shakespeare_split()
    windows = [part[:128] for part in split.validation.windows(CONTEXT)]
    batches = answers(split.train, n_same, seed=0)
    found = {"same": {}, "traffic": {}, "held": {}, "mistakes": {}}
    for how in ("ddp", "fsdp"):
        for name in ("float64", "float32"):
            run = Training.begin(how, dtype=getattr(torch, name))
            losses = run.losses(batches, micro_batches=MICRO_BATCHES)
            found["same"][f"{how} {name}"] = losses
        found["held"][how] = run.held()
        for quiet in (True, False):
            with Traffic() as traffic:
                run.update(batches[0], micro_batches=MICRO_BATCHES, quiet=quiet)
            found["traffic"][f"{how} {'quiet' if quiet else 'loud'}"] = {
                "calls": traffic.calls,
                "payload": traffic.payload,
            }
        if how == "fsdp":
            save_shards(folder, n_same, run.model.state_dict(), {"how": how})
            found["saved"] = run.held_out(windows)
    for mistake in MISTAKES:
        for seed in range(seeds):
            run = Training.begin("ddp", seed, torch.float32)
            losses = run.losses(answers(split.train, n_long, seed), mistake=mistake)
            found["mistakes"].setdefault(mistake or "none", []).append(
                {"losses": losses, "held out": run.held_out(windows)}
            )
    return found


def main(folder: Path) -> None:
    """Run the experiments in this process; the first one writes `found.json`."""
    with distributed.process_group() as world:
        found = experiments(folder)
        if world.first:
            (folder / FOUND).write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
