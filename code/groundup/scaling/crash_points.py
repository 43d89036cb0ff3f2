"""Every moment at which a kill can interrupt a save, one after another.

Here: a call before each operation with which `checkpointing.save` changes the disk, and
photographs of a folder at all these moments. Left out: cuts of the power, after which
the disk may hold less than the running system showed.

Source: Pillai et al. (2014), section 4, who let a tool look for such moments. Page:
book/4-scaling/checkpointing.md.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from groundup.scaling import checkpointing


@contextmanager
def before_each(act: Callable[[str], None]) -> Iterator[None]:
    """Call act before each operation that changes the disk, and in the midst of some.

    act gets what comes next: "mkdir NAME", "write NAME", "sync NAME", "rename NAME",
    "unlink NAME" or "rmdir NAME", and "half of NAME" when half of a file is written. It
    may raise: then the operation fails. What act itself does to the disk is not told.
    For one thread.
    """
    acting = False

    def tell(what: str) -> None:
        nonlocal acting
        if not acting:
            acting = True
            try:
                act(what)
            finally:
                acting = False

    def told(owner: object, name: str) -> object:
        real = getattr(owner, name)

        def operation(path: str | Path, *args: object, **kwargs: object) -> object:
            if name != "mkdir" or not Path(path).exists():
                tell(f"{name} {Path(path).name}")
            return real(path, *args, **kwargs)

        return mock.patch.object(owner, name, operation)

    def torn(owner: object, name: str, place: int) -> object:
        real = getattr(owner, name)

        def write(*args: object) -> object:
            path = Path(args[place])
            tell(f"write {path.name}")
            result = real(*args)
            whole = path.read_bytes()
            path.write_bytes(whole[: len(whole) // 2])
            tell(f"half of {path.name}")
            path.write_bytes(whole)
            return result

        return mock.patch.object(owner, name, write)

    with (
        told(os, "mkdir"),
        told(os, "rename"),
        told(os, "unlink"),
        told(os, "rmdir"),
        told(checkpointing, "sync"),
        torn(checkpointing, "save_file", 1),
        torn(Path, "write_text", 0),
    ):
        yield


def photographs(folder: Path, album: Path, action: Callable[[], object]) -> list[str]:
    """Run action; copy folder to album/000, album/001, … before each operation.

    Returns:
        What came next at each photograph; the last one, "end", is of afterwards.
    """
    moments = []

    def photograph(what: str) -> None:
        shutil.copytree(folder, album / f"{len(moments):03d}")
        moments.append(what)

    with before_each(photograph):
        action()
    photograph("end")
    return moments
