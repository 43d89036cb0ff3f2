"""Recorded results: what takes too long to compute while the book is built.

Here: `record`, which runs a maker and keeps what it returns under book/artifacts/NAME,
`load` and `get`, which give it back verified, whether a recording still belongs to the
code (`stale`), and pieces of long recordings that survive an interruption (`remember`).
Left out: the registry (`makers`), what a recording says about itself (`provenance`),
and the makers themselves, which live in the part that shows them.

A maker is a function of a module. It takes a config (a mapping that JSON can hold) and
returns a mapping of tensors (kept in tensors.safetensors), tables (KEY.json: whatever
JSON can hold) and files (bytes under a name with an ending, such as `map.png`). What
decides its numbers is in its config and its code, never in the environment.
"""

import hashlib
import json
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from groundup.makers import MAKERS, Config, Maker
from groundup.pages import ARTIFACTS, ROOT, rebuild_asked
from groundup.provenance import (
    code_digests,
    commit,
    describe_device,
    peak_bytes,
    sentence,
    short_sha,
)

FOLDER = ROOT / ARTIFACTS
MAX_BYTES, MAX_TOTAL_BYTES = 16_000_000, 60_000_000  # of a recording, of all
MANIFEST, TENSORS = "manifest.json", "tensors.safetensors"
KEY, FILE = re.compile(r"[a-z][a-z0-9_]*"), re.compile(r"[\w-]+\.\w+")
LIBRARIES = ("torch", "numpy", "safetensors")


class ArtifactError(RuntimeError):
    """A recording is missing, damaged or not what it says; names the remedy."""


@dataclass(frozen=True)
class Artifact:
    """A recording, read and verified; `artifact["losses"]` is one of its values."""

    name: str
    manifest: Mapping[str, Any]
    values: Mapping[str, Any]  # tensors, tables and files (bytes) by key
    stale: str | None = None  # why it no longer belongs to the code or the config

    def __getitem__(self, key: str) -> Any:
        return self.values[key]

    @property
    def provenance(self) -> str:
        """Where it comes from, in a sentence; if it is stale, a second says so."""
        told = sentence(self.manifest)
        if self.stale:
            told += (
                f" Note: this recording is stale, {self.stale}; "
                f"`groundup rebuild {self.name}` makes it anew."
            )
        return told


def record(name: str, make: Maker, config: Config, folder: Path = FOLDER) -> Artifact:
    """Run make(config), keep what it returns in folder/name, and return that.

    The old recording stays until the new one is whole on disk.

    Args:
        name: of the recording; its folder.
        make: a function of a module.
        config: what JSON can hold. The field `device` says where make works.
        folder: where recordings lie.

    Raises:
        ValueError: name, a key or a value is none that a recording can hold.
        ArtifactError: the folder is not there (the package was installed alone), or
            make was to use a GPU and did not.
    """
    if not KEY.fullmatch(name):
        raise ValueError(f"name must be lower-case letters, digits, _; got {name!r}")
    if not folder.parent.is_dir():
        raise ArtifactError(f"{folder.parent} is no folder: record in a clone")
    code, device = code_digests(make), describe_device(config.get("device", "cpu"))
    _OPEN.append(work := _Work())
    start = time.perf_counter()
    try:
        values = make(config)
        seconds = time.perf_counter() - start - work.elsewhere
    finally:
        _OPEN.pop()
    peak = max(peak_bytes(device), work.peak)
    if not peak:
        raise ArtifactError(f"{make.__qualname__} computed nothing on {device['name']}")
    manifest = {
        "artifact": name,
        "config": _plain(config),
        "code": code,
        "device": device,
        "libraries": {"python": platform.python_version()}
        | {library: version(library) for library in LIBRARIES},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds + sum(work.pieces.values()), 3),
        "pieces": work.pieces,
        "peak_bytes": peak,
        "commit": commit(),
    }
    folder.mkdir(exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{name}.tmp-", dir=folder))
    try:
        new = staging / "new"
        new.mkdir()
        _write(new, manifest, values)
        if (folder / name).exists():
            (folder / name).rename(staging / "old")
        new.rename(folder / name)
        _sync(folder)
    finally:
        if (staging / "old").exists() and not (folder / name).exists():
            (staging / "old").rename(folder / name)
        shutil.rmtree(staging, ignore_errors=True)
    return load(name, folder)


def load(name: str, folder: Path = FOLDER) -> Artifact:
    """Read a recording and verify it; if its maker is registered, see if it is stale.

    Raises:
        ArtifactError: there is none, or a file is missing or damaged (names it).
    """
    manifest, values = _manifest(name, folder), {}
    for file, digest in manifest["files"].items():
        path = folder / name / file
        content = path.read_bytes() if path.is_file() else None
        if content is None or hashlib.sha256(content).hexdigest() != digest:
            what = "missing" if content is None else "damaged: its SHA-256 is another"
            raise ArtifactError(
                f"{path} is {what}; get it again from the repository, "
                f"or make it anew: `groundup rebuild {name}`"
            )
        if file == TENSORS:
            values |= load_file(path)
        elif path.suffix == ".json":
            values[path.stem] = json.loads(content)
        else:
            values[file] = content
    recipe = MAKERS.get(name)
    reasons = [
        _difference(manifest, recipe.make, config)
        for config in (recipe.presets.values() if recipe else ())
    ]
    reason = None if None in reasons else next(iter(reasons), None)
    return Artifact(name, manifest, values, reason)


def get(name: str, make: Maker, config: Config, folder: Path = FOLDER) -> Artifact:
    """Return the recording, as a page does: anew if the build is asked to rebuild it.

    `GROUNDUP_REBUILD` names recordings, with commas between, or is `all`.

    Raises:
        ArtifactError: as `load`.
    """
    if rebuild_asked(name):
        return record(name, make, config, folder)
    read = load(name, folder)
    reason = _difference(read.manifest, make, config)
    return Artifact(name, read.manifest, read.values, reason)


def stale(name: str, make: Maker, config: Config, folder: Path = FOLDER) -> str | None:
    """Say what has changed since the recording: code or config; None if neither.

    Where it was recorded (`device`) is no change.

    Raises:
        ArtifactError: there is no such recording.
    """
    return _difference(_manifest(name, folder), make, config)


def provenance(name: str, folder: Path = FOLDER) -> str:
    """Say in a sentence where, when and from what a recording was made.

    Raises:
        ArtifactError: as `load`.
    """
    return load(name, folder).provenance


def remember(make: Maker, config: Config, uses: tuple[str, ...] = ()) -> Artifact:
    """Return make(config), one piece of a long recording, made once on this machine.

    A recording that is interrupted goes on where it was: pieces lie in the temporary
    folder, by code, config and machine. The time and memory that a piece took are
    counted into the recording that asks for it.

    Args:
        make: as for `record`.
        config: as for `record`.
        uses: as for `register`.
    """
    start = time.perf_counter()
    facts = [make.__qualname__, code_digests(make, uses), _plain(config)]
    facts.append(describe_device(config.get("device", "cpu")))
    key = "piece_" + short_sha(json.dumps(facts, sort_keys=True))
    folder = Path(tempfile.gettempdir(), f"groundup-pieces-{os.getuid()}")
    if not (folder / key / MANIFEST).is_file():
        record(key, make, config, folder)
    piece = load(key, folder)
    if _OPEN:
        told, work = piece.manifest, _OPEN[-1]
        own = told["seconds"] - sum(told["pieces"].values())
        work.pieces |= told["pieces"] | {key: round(own, 3)}
        work.peak = max(work.peak, told["peak_bytes"])
        work.elsewhere += time.perf_counter() - start
    return piece


@dataclass
class _Work:
    """What the pieces of an open recording took: each counts once, when it was made."""

    pieces: dict[str, float] = field(default_factory=dict)  # seconds, by name
    peak: int = 0  # bytes
    elsewhere: float = 0.0  # seconds that this call spent on pieces


_OPEN: list[_Work] = []  # the recordings in the making, from the outermost


def _manifest(name: str, folder: Path) -> dict[str, Any]:
    path = folder / name / MANIFEST
    if not path.is_file():
        raise ArtifactError(
            f"there is no recording {name!r} in {folder}; `groundup rebuild {name}` "
            "makes it"
        )
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ArtifactError(f"{path} is damaged: {error}") from error


def _write(folder: Path, manifest: dict[str, Any], values: Mapping[str, Any]) -> None:
    """Fill folder with the values' files and, last, the manifest."""
    tensors = {}
    for key, value in values.items():
        if isinstance(value, bytes):
            if not FILE.fullmatch(key) or key.endswith((".json", ".safetensors")):
                raise ValueError(f"a file needs a name like map.png; got {key!r}")
            (folder / key).write_bytes(value)
        elif not KEY.fullmatch(key) or f"{key}.json" == MANIFEST:
            raise ValueError(f"key must be a lower-case name; got {key!r}")
        elif isinstance(value, Tensor):
            tensors[key] = value.detach().cpu().contiguous().clone()
        else:
            try:
                text = json.dumps(value, indent=1) + "\n"
            except TypeError as error:
                raise ValueError(
                    f"{key} is no tensor, bytes or JSON: {error}"
                ) from error
            (folder / f"{key}.json").write_text(text, "utf-8")
    if tensors:
        save_file(tensors, folder / TENSORS)
    files = sorted(folder.iterdir())
    shas = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    text = json.dumps(manifest | {"files": shas}, indent=1) + "\n"
    (folder / MANIFEST).write_text(text, "utf-8")
    for path in (*files, folder / MANIFEST, folder):
        _sync(path)


def _sync(path: Path) -> None:
    """Have the system write a file or a folder's list of names to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _difference(manifest: Mapping, make: Maker, config: Config) -> str | None:
    now, then = code_digests(make), manifest["code"]
    changed = [name for name in sorted(now | then) if now.get(name) != then.get(name)]
    if changed:
        return f"the code of {', '.join(changed)} has changed since"
    now, then = _plain(config), manifest["config"]
    for key in sorted((now | then).keys() - {"device"}):
        if now.get(key) != then.get(key) or (key in now) != (key in then):
            was, wanted = (c.get(key, "absent") for c in (then, now))
            return f"its config had {key}: {was}, not {wanted}"
    return None


def _plain(config: Config) -> dict[str, Any]:
    return json.loads(json.dumps(config))
