"""Checkpoints that many processes write together and any number reads.

Here: each process saves the rows that it holds as a checkpoint of its own, in a folder
`rank-0-of-2` and so on, whole or not at all and with digests; the newest step that all
of them have; and reading it back into tensors that are cut in another way or not at
all. No file runs code; the index of `torch.distributed.checkpoint` is a pickle. Left
out: shards on disks that not all processes can read.

Page: book/4-scaling/distributed.md.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from groundup.scaling import checkpointing
from groundup.scaling.distributed import current_world

PLACE = re.compile(r"rank-(\d+)-of-(\d+)")


@dataclass(frozen=True)
class Shards:
    """A step that was saved by all of its processes."""

    step: int  # updates done
    paths: tuple[Path, ...]  # a checkpoint each, by rank


def local_rows(tensor: Tensor) -> tuple[int, Tensor]:
    """Return what this process holds: its first row, and its rows.

    Of a plain tensor that is all of it, from row 0.

    Raises:
        ValueError: the tensor is cut otherwise than along its rows, once.
    """
    if not isinstance(tensor, DTensor):
        return 0, tensor
    if tensor.placements != (Shard(0),):
        raise ValueError(
            f"tensors must be cut along their rows once; got {tensor.placements}"
        )
    size, rank = tensor.device_mesh.size(), tensor.device_mesh.get_local_rank()
    most = -(-tensor.shape[0] // size)  # the last processes may get fewer, or none
    return min(rank * most, tensor.shape[0]), tensor.to_local()


def save_shards(
    folder: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    *,
    keep: int = 2,
) -> Path:
    """Write what this process holds of tensors; all processes must call it.

    When it returns, all have written. Killed at any moment, the run has the step before
    in every process's folder, as long as keep is at least 2.

    Args:
        folder: of the run, seen by all processes.
        step: updates done.
        tensors: the same names in all processes. Of plain tensors, which are the same
            in all processes, those of rank 0 are written.
        meta: anything JSON can hold, the same in all processes.
        keep: steps that are left; see `checkpointing.save`.

    Returns:
        The checkpoint of this process.

    Raises:
        ValueError: step or keep is out of range, or a tensor is not cut along its rows.
    """
    if keep < 2:
        raise ValueError(
            f"keep must be at least 2, for a run killed between two processes' saves; "
            f"got {keep}"
        )
    world = current_world()
    pieces, own = {}, {}
    for name, tensor in tensors.items():
        start, rows = local_rows(tensor)
        pieces[name] = {"shape": list(tensor.shape), "start": start}
        if world.first or isinstance(tensor, DTensor):
            own[name] = rows
    path = checkpointing.save(
        Path(folder) / f"rank-{world.rank}-of-{world.size}",
        step,
        own,
        {"pieces": pieces, "meta": dict(meta)},
        keep=keep,
    )
    if dist.is_initialized():
        dist.barrier()
    return path


def latest_shards(folder: Path) -> Shards | None:
    """Return the newest step that all of its processes have saved, or None.

    Those saved by another number of processes count too. Only names are looked at;
    `load_shards` refuses a damaged file.
    """
    sets: dict[int, dict[int, Path]] = {}
    for path in Path(folder).glob("rank-*-of-*"):
        if found := PLACE.fullmatch(path.name):
            sets.setdefault(int(found[2]), {})[int(found[1])] = path
    best = None
    for size, places in sets.items():
        if len(places) < size:
            continue
        steps = [{p.name for p in places[r].glob("step-*")} for r in range(size)]
        for name in set.intersection(*steps):
            digits = name.removeprefix("step-")
            if digits.isdigit() and (best is None or int(digits) > best.step):
                paths = tuple(places[rank] / name for rank in range(size))
                best = Shards(int(digits), paths)
    return best


@torch.no_grad()
def load_shards(shards: Shards, into: Mapping[str, Tensor]) -> dict[str, Any]:
    """Fill tensors in place with what was saved; return the meta.

    Each process fills the rows it holds, whoever saved them. It has one file in memory
    at a time, begins with the one that has most of its rows, and reads no more than it
    needs.

    Args:
        shards: as `latest_shards` finds them.
        into: the saved names; plain tensors, or cut along their rows.

    Raises:
        ValueError: a file is damaged, a name is missing or unknown, a shape or a dtype
            differs, or some rows are in no file. Part of into may be filled then.
    """
    wanted = {name: local_rows(tensor) for name, tensor in into.items()}
    missing = {name: len(t) if t.dim() else 1 for name, (_, t) in wanted.items()}
    world, n_files = current_world(), len(shards.paths)
    likely = world.rank * n_files // world.size
    meta: dict[str, Any] = {}
    for rank in dict.fromkeys((likely, 0, *range(n_files))):  # 0 has what is not cut
        saved = checkpointing.load(shards.paths[rank])
        pieces, meta = saved.meta["pieces"], saved.meta["meta"]
        _require_same(into, pieces)
        for name, rows in saved.tensors.items():
            first, own = wanted[name]
            if own.dtype != rows.dtype:
                raise ValueError(
                    f"into[{name!r}] must be {rows.dtype}, as saved; got {own.dtype}"
                )
            if not own.dim():
                own.copy_(rows)
                missing[name] = 0
                continue
            shift = pieces[name]["start"] - first
            begin, end = max(shift, 0), min(shift + len(rows), len(own))
            if begin < end:
                own[begin:end] = rows[begin - shift : end - shift]
                missing[name] -= end - begin
        if not any(missing.values()):
            return meta
    name = next(name for name, n in missing.items() if n)
    raise ValueError(
        f"shards must hold all rows; of {name} {missing[name]} are lacking"
    )


def _require_same(into: Mapping[str, Tensor], pieces: Mapping[str, Any]) -> None:
    if pieces.keys() != into.keys():
        name = min(pieces.keys() ^ into.keys())
        where = "is missing" if name in pieces else "was not saved"
        raise ValueError(f"into must have the names that were saved; {name} {where}")
    for name, piece in pieces.items():
        if list(into[name].shape) != piece["shape"]:
            raise ValueError(
                f"into[{name!r}] must have shape {tuple(piece['shape'])}; "
                f"got {tuple(into[name].shape)}"
            )
