"""What one of two processes does; it writes what it found and asserts nothing.

Started by the fixture `two_processes` with torchrun's variables and a folder.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from groundup.modern.decoder import Decoder, DecoderConfig
from groundup.scaling import distributed, distributed_runs
from groundup.scaling.distributed import World
from groundup.scaling.mixed_precision import accumulate
from groundup.scaling.optimizers import make_optimizer
from groundup.scaling.sharded_checkpoint import (
    latest_shards,
    load_shards,
    local_rows,
    save_shards,
)
from groundup.scaling.traffic import Traffic
from groundup.training import adamw
from groundup.training.loss import IGNORE

CLIP = 0.3  # below the norms that come up


def make(seed=0, *, tied=True, dtype=torch.float64):
    """51 tokens: an odd number of rows."""
    torch.manual_seed(seed)
    sizes = DecoderConfig(n_vocab=51, d_model=32, n_layers=2, n_heads=2, tied=tied)
    return Decoder(sizes).to(dtype)


def batches(n, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(n):
        x, y = torch.randint(51, (2, 8, 10), generator=generator)
        lengths = torch.randint(1, 10, (8,), generator=generator).sort().values
        y[torch.arange(10) >= lengths[:, None]] = IGNORE  # the second half has more
        yield x, y


class Run:
    def __init__(self, how, micro=1, kind="adamw", **options):
        self.model = make(**options)
        self.wrapped = distributed.wrap(self.model, how)
        self.world = World() if how == "none" else distributed.current_world()
        self.micro = micro
        self.optimizer = make_optimizer(self.model, kind, 0.01, 0.1)
        self.seen = []

    def updates(self, n, seed=1):
        for x, y in batches(n, seed):
            self.optimizer.zero_grad()
            rows = distributed.rows(8, self.world)
            pieces = [t[rows].chunk(self.micro) for t in (x, y)]
            part = accumulate(
                self.wrapped,
                list(zip(*pieces, strict=True)),
                n_tokens=int((y != IGNORE).sum()) / self.world.size,
                quiet=distributed.quiet(self.wrapped),
            )
            if self.world.size > 1:
                part = distributed.total(part) / self.world.size
            norm = distributed.clip_gradients(self.model.parameters(), CLIP)
            self.optimizer.step(1.0)
            self.seen.append((part, norm))
        return self

    def whole(self):
        found = {**self.model.state_dict(), **self.optimizer.tensors()}
        return {name: distributed.whole(tensor) for name, tensor in found.items()}


def worst(a, b):
    return max((a[name] - b[name]).abs().max().item() for name in b)


def same_as_one():
    """Largest differences to a single process in losses and norms, and in weights."""
    found = {}
    for kind in ("adamw", "muon"):
        for name in ("float64", "float32"):
            if (kind, name) == ("muon", "float32"):
                continue
            for tied in (True, False) if name == "float64" else (True,):
                options = {"kind": kind, "tied": tied, "dtype": getattr(torch, name)}
                one = Run("none", **options).updates(10)
                weights, seen = one.whole(), torch.tensor(one.seen, dtype=torch.float64)
                for how, micro in (("ddp", 1), ("ddp", 2), ("fsdp", 1), ("fsdp", 2)):
                    if micro == 1 and (kind == "muon" or name == "float32"):
                        continue
                    two = Run(how, micro, **options).updates(10)
                    key = f"{kind} {name} tied={tied} {how} {micro}"
                    got = torch.tensor(two.seen, dtype=torch.float64)
                    apart = (got - seen).abs().max().item()
                    found[key] = [apart, worst(two.whole(), weights)]
    return found


def clipping():
    """Norms by Part 2's clip and by ours, and the gradient after it."""
    found = {}
    for how in ("none", "ddp", "fsdp"):
        model = make()
        wrapped = distributed.wrap(model, how)
        x, y = next(batches(1))
        accumulate(wrapped, [(x, y)])
        before = [distributed.whole(p.grad).clone() for p in model.parameters()]
        loose = distributed.clip_gradients(model.parameters(), 1e9)
        parts = [p.grad.clone() for p in model.parameters()]
        norm = distributed.clip_gradients(model.parameters(), CLIP)
        after = [distributed.whole(p.grad) for p in model.parameters()]
        error = max(
            (a - b * CLIP / norm).abs().max().item()
            for a, b in zip(after, before, strict=True)
        )
        for p, grad in zip(model.parameters(), parts, strict=True):
            p.grad = grad
        part_2 = adamw.clip_gradients(model.parameters(), 1e9)
        found[how] = {"norm": norm, "loose": loose, "error": error, "part 2": part_2}
    return found


def traffic():
    found = {}
    for how in ("ddp", "fsdp"):
        for loud in (False, True):
            run = distributed_runs.Training.begin(how, dtype=torch.float32)
            (batch,) = distributed_runs.answers(CORPUS, 1, 0)
            run.losses([batch, batch])  # DDP settles its buckets after the first
            with Traffic() as seen:
                run.update(batch, micro_batches=4, quiet=not loud)
            found[f"{how} {'loud' if loud else 'quiet'}"] = [seen.calls, seen.payload]
        blocks = sum(p.numel() for p in run.model.blocks.parameters())
        found[how] = {**run.held(), "blocks": blocks}
    return found


def starts(rank):
    """How far the parameters are from those of rank 0's seed, after wrapping."""
    found = {}
    for how in ("ddp", "fsdp"):
        model = make(seed=rank)
        distributed.wrap(model, how)
        state = {k: distributed.whole(v) for k, v in model.state_dict().items()}
        found[how] = worst(state, make(seed=0).state_dict())
    return found


def loading(rank):
    model, other = make(), make(seed=7)
    distributed.wrap(model, "fsdp")
    distributed.load_whole(model, other.state_dict())
    state = {k: distributed.whole(v) for k, v in model.state_dict().items()}
    plain = make()
    distributed.load_whole(plain, other.state_dict())
    return [worst(state, other.state_dict()), worst(plain.state_dict(), state)]


def checkpoints(folder):
    """Save halfway, go on; load, go on; the same? And what one process saved."""
    run = Run("fsdp").updates(3)
    state = {**run.model.state_dict(), **run.optimizer.tensors()}
    save_shards(folder / "by two", 3, state, {"by": "two"})
    whole = {k: v.clone() for k, v in run.whole().items()}
    if dist.get_rank() == 0:
        torch.save(whole, folder / "whole.pt")
    end = run.updates(3, seed=2).whole()
    again = Run("fsdp", seed=9)
    state = {**again.model.state_dict(), **again.optimizer.tensors()}
    meta = load_shards(latest_shards(folder / "by two"), state)
    for part in again.optimizer.parts:
        part[0].n_steps = {name: int(state[f"{name}/steps"]) for name in part[0].state}
    resumed = again.updates(3, seed=2).whole()

    model = make(seed=9, dtype=torch.float32)
    distributed.wrap(model, "fsdp")
    load_shards(latest_shards(folder / "by one"), model.state_dict())
    whole = {k: distributed.whole(v) for k, v in model.state_dict().items()}
    start, rows = local_rows(model.embed.weight)
    return {
        "meta": meta,
        "resumed": worst(resumed, end),
        "by one": sum(t.double().sum().item() for t in whole.values()),
        "rows": [start, len(rows)],
    }


def main(folder):
    found = {}
    try:
        with distributed.process_group() as world:
            found["world"] = [world.rank, world.size]
            with distributed.process_group() as inner:
                found["inner"] = inner == world
            found["total"] = distributed.total(10.0**world.rank)
            found["same"] = same_as_one()
            found["clip"] = clipping()
            found["traffic"] = traffic()
            found["starts"] = starts(world.rank)
            found["loading"] = loading(world.rank)
            found["checkpoints"] = checkpoints(folder)
            found["runs"] = distributed_runs.experiments(folder / "page", 2, 2, 1)
            raise RuntimeError("to be left by an error")
    except RuntimeError as error:
        found["error"] = str(error)
    found["destroyed"] = not dist.is_initialized()
    (folder / f"{found['world'][0]}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    CORPUS = distributed_runs.shakespeare_split().validation
    main(Path(sys.argv[1]))
