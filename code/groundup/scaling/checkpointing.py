"""Checkpoints: a run that may be killed anywhere goes on bit for bit.

Here: a folder per checkpoint that appears whole or not at all, the newest one that is
undamaged, and nothing that runs code. Left out: what a run has to put in (`trainer`,
`random_state`), pieces of one checkpoint on several machines (`distributed`), saving in
the background.

A folder `step-000120` holds `tensors.safetensors` and `meta.json`; the latter has the
SHA-256 of the former and of itself. Page: book/4-scaling/checkpointing.md.
"""

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from groundup.foundations.wheels import sha256, sync
from groundup.training.byte_level import Tokenizer, require_digest

FORMAT = 1  # of meta.json; a reader refuses any other
TENSORS, META = "tensors.safetensors", "meta.json"
PLACE = re.compile(r"step-(\d+)(\.old)?")
UNFINISHED = ".part-"  # begins the name of a folder that is being written or removed


@dataclass(frozen=True)
class Checkpoint:
    """What `load` finds."""

    step: int  # updates done
    tensors: dict[str, Tensor]
    meta: dict[str, Any]


def save(
    folder: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    *,
    keep: int = 2,
) -> Path:
    """Write a checkpoint; return its folder.

    Whatever interrupts it, the checkpoints before stay usable and no half-written one
    can be mistaken for one. When it returns, files and names are on the disk
    (`fsync`). A checkpoint of the same step is replaced. One writer at a time: others
    wait for the lock, which the system releases when its holder dies.

    Args:
        folder: of the run; made if it is not there.
        step: updates done.
        tensors: of any dtype that safetensors knows, on any device. A tensor under
            several names (a tied head) is stored once.
        meta: anything JSON can hold. Tuples come back as lists, keys as strings,
            floats bit for bit.
        keep: complete checkpoints that are left, this one counted; older ones are
            removed afterwards. Later ones, of a run that was taken back, are not.

    Raises:
        ValueError: step or keep is out of range.
        OSError: the disk is full, or folder cannot be written to.
    """
    if step < 0 or keep < 1:
        raise ValueError(
            f"step must be at least 0 and keep at least 1; got {step} and {keep}"
        )
    folder = Path(folder)
    if not folder.is_dir():
        folder.mkdir(parents=True)
        sync(folder.parent)
    place = folder / f"step-{step:06d}"
    with FileLock(folder / ".lock"):
        for remains in folder.glob(f"{UNFINISHED}*"):  # the lock is ours: of the dead
            shutil.rmtree(remains)
        part = folder / f"{UNFINISHED}{place.name}"
        try:
            _write(part, step, tensors, meta)
            if place.exists():
                _set_aside(place)
            os.rename(part, place)
            sync(folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        _remove_old(folder, step, keep)
    return place


def _write(
    part: Path, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]
) -> None:
    part.mkdir()
    stored, same = _once(tensors)
    try:
        save_file(stored, part / TENSORS, {"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{part / TENSORS} could not be written: {error}") from error
    record = {
        "format": FORMAT,
        "step": step,
        "same": same,  # names of a tensor that is stored under another name
        "bytes": (part / TENSORS).stat().st_size,
        "sha256": sha256(part / TENSORS),
        "meta": dict(meta),
    }
    record["digest"] = _digest(record)
    (part / META).write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    for path in (part / TENSORS, part / META, part):
        sync(path)


def _once(
    tensors: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Split into tensors that share no memory, and other names of the same tensor."""
    stored, same, first, claimed = {}, {}, {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu()
        memory = tensor.untyped_storage()
        view = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and view in first:
            same[name] = first[view]
            continue
        first[view] = name
        whole = memory.nbytes() == tensor.numel() * tensor.element_size()
        if not whole or not tensor.is_contiguous() or memory.data_ptr() in claimed:
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        claimed.add(memory.data_ptr())
        stored[name] = tensor
    return stored, same


def _digest(record: Mapping[str, Any]) -> str:
    """SHA-256 of a record's JSON, its own digest left out."""
    rest = {key: value for key, value in record.items() if key != "digest"}
    # Through JSON once: a tuple or a key that is a number is another thing after it.
    text = json.dumps(json.loads(json.dumps(rest)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _places(folder: Path) -> list[tuple[int, bool, Path]]:
    """Steps, whether it is the last save of that step, and paths; oldest first."""
    found = [(PLACE.fullmatch(path.name), path) for path in Path(folder).glob("step-*")]
    return sorted((int(m[1]), not m[2], path) for m, path in found if m)


def _set_aside(place: Path) -> None:
    """Make room at place; what was there stays usable, if it was."""
    if not _complete(place):
        _remove(place)
        return
    old = place.with_name(f"{place.name}.old")
    if old.exists():
        _remove(old)
    os.rename(place, old)


def _remove_old(folder: Path, step: int, keep: int) -> None:
    """Remove all of at most this step but the newest complete one of `keep` steps."""
    kept = set()
    for number, _, path in reversed(_places(folder)):
        if number > step:
            continue
        if number not in kept and len(kept) < keep and _complete(path):
            kept.add(number)
        else:
            _remove(path)


def _remove(path: Path) -> None:
    # Under another name first: half of a removed folder is no checkpoint.
    gone = path.with_name(f"{UNFINISHED}{path.name}")
    os.rename(path, gone)
    shutil.rmtree(gone)


def _complete(path: Path) -> bool:
    """Tell whether everything is there; the tensors themselves are not read."""
    try:
        _read_meta(path)
    except (OSError, ValueError):
        return False
    return True


def _read_meta(path: Path) -> dict[str, Any]:
    """Return the record in meta.json, checked; of the tensors only the size is."""
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is no checkpoint: there is no such folder")
    for name in (META, TENSORS):
        if not (path / name).is_file():
            raise FileNotFoundError(
                f"{path} is no complete checkpoint: it has no {name}"
            )
    damaged = f"{path / META} is damaged: take another checkpoint"
    try:
        record = json.loads((path / META).read_text("utf-8"))
    except ValueError as error:  # of JSON or of UTF-8
        raise ValueError(damaged) from error
    if not isinstance(record, dict):
        raise ValueError(damaged)
    if record.get("format") != FORMAT:
        raise ValueError(
            f"{path} must have the format {FORMAT}, which this version of groundup "
            f"reads; got {record.get('format')!r}"
        )
    if record.get("digest") != _digest(record):
        raise ValueError(damaged)
    size = (path / TENSORS).stat().st_size
    if size != record["bytes"]:
        raise ValueError(
            f"{path / TENSORS} must hold {record['bytes']:,} bytes; got {size:,}: it "
            f"is truncated, or another file: take another checkpoint"
        )
    return record


def _verify(path: Path) -> dict[str, Any]:
    """Return the record in meta.json, everything checked."""
    record = _read_meta(path)
    found = sha256(path / TENSORS)
    if found != record["sha256"]:
        raise ValueError(
            f"{path / TENSORS} must have the SHA-256 {record['sha256'][:12]}… that "
            f"{META} says; got {found[:12]}…: it is damaged: take another checkpoint"
        )
    return record


def latest(folder: Path) -> Path | None:
    """Return the newest undamaged checkpoint of a run, or None if there is none.

    One that is incomplete or damaged is passed over with a warning. Every byte is
    read.
    """
    for _, _, path in reversed(_places(folder)):
        try:
            _verify(path)
        except (OSError, ValueError) as error:
            warnings.warn(f"passed over: {error}", stacklevel=2)
        else:
            return path
    return None


def load(path: Path, *, tokenizer: Tokenizer | None = None) -> Checkpoint:
    """Read a checkpoint, and refuse it if a bit has changed.

    Args:
        path: as `save` or `latest` returns it.
        tokenizer: what the model's text will be encoded with; its digest has to be
            `meta["tokenizer"]`. None: not checked.

    Returns:
        Tensors on the CPU, with memory of their own; one that was stored under several
        names is one tensor again.

    Raises:
        FileNotFoundError: path holds no complete checkpoint.
        ValueError: it is truncated, damaged, or of another format version, or the
            tokenizer is another one.
    """
    path = Path(path)
    record = _verify(path)
    if tokenizer is not None:
        if "tokenizer" not in record["meta"]:
            raise ValueError(f"{path} does not say which tokenizer it belongs to")
        require_digest(tokenizer, record["meta"]["tokenizer"])
    # Copies: the file's own memory is mapped, and aligned to no more than a number.
    tensors = {name: t.clone() for name, t in load_file(path / TENSORS).items()}
    tensors |= {name: tensors[first] for name, first in record["same"].items()}
    return Checkpoint(record["step"], tensors, record["meta"])
