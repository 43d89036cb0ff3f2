"""Where the numbers of a run go: three methods, and four places behind them.

Here: a file of JSON lines, TensorBoard's event files, Weights & Biases, and several at
once. All of them take up a run that was killed and goes on from a checkpoint. Left out:
histograms, images, and which numbers are worth keeping (`vital_signs`).

A step is what the caller says it is; here it has only to rise. Page:
book/4-scaling/tracking.md.
"""

import json
import math
import os
import re
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch.utils.tensorboard import SummaryWriter

FLUSH_SECONDS = 5  # that a killed run may lose of its event file


@runtime_checkable
class Tracker(Protocol):
    """What a training loop needs to know about logging.

    `contextlib.closing(tracker)` closes it however the run ends.
    """

    def start(self, config: Mapping[str, Any]) -> None:
        """Note what is about to run. Once, before the first `log`."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Note numbers of a step. Infinite ones and NaN are numbers as well.

        Steps never fall. The first step after `start` may lie before the end of what
        an earlier run left in the same place; what it left from there on is replaced.
        """

    def close(self) -> None:
        """Finish writing. Nothing may be logged after it."""


class JsonLines:
    """A file of one JSON object a line, out of the process as soon as it is logged.

    The config is a line `{"config": ...}`, a step `{"step": 7, "loss": 2.5}`. JSON has
    no NaN and no infinity: they are the strings "NaN", "Infinity" and "-Infinity",
    which `float` reads.

    Args:
        path: the file; made with its folder, or continued.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._file = None
        self._step: int | None = None

    def start(self, config: Mapping[str, Any]) -> None:
        """Open the file, without what a killed run wrote of its last line."""
        if self._file is not None:
            raise RuntimeError(f"{self.path}: start was called before close")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            text = self.path.read_bytes()
            whole = text[: text.rfind(b"\n") + 1]
            if whole != text:
                _replace(self.path, whole)
        self._file = self.path.open("a", encoding="utf-8")
        self._step = None
        self._write({"config": dict(config)})

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append a line and flush it."""
        _require_started(self._file, str(self.path))
        if self._step is None:
            self._cut(step)
        _require_not_falling(self._step, step)
        self._step = step
        self._write({"step": step} | {k: float(v) for k, v in values.items()})

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, record: dict) -> None:
        self._file.write(json.dumps(_plain(record), allow_nan=False) + "\n")
        self._file.flush()

    def _cut(self, step: int) -> None:
        """Take out the lines of this step and of later ones."""
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [
            line for line in lines if _parse(self.path, line).get("step", -1) < step
        ]
        if len(kept) < len(lines):
            self._file.close()
            _replace(self.path, "".join(kept).encode())
            self._file = self.path.open("a", encoding="utf-8")


def read_json_lines(path: Path) -> dict[str, dict[int, float]]:
    """Return what `JsonLines` wrote, as one curve for each name: value by step.

    Raises:
        ValueError: a line is not a JSON object; says which.

    Example: `read_json_lines(path)["loss"][7]` is the loss of step 7.
    """
    curves: dict[str, dict[int, float]] = {}
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        record = _parse(Path(path), line)
        step = record.pop("step", None)
        if step is not None:
            for name, value in record.items():
                curves.setdefault(name, {})[step] = float(value)
    return curves


class TensorBoard:
    """Event files for `tensorboard --logdir FOLDER`, a curve for each name.

    Names with a slash (`train/loss`) are drawn in a section of their own. The config
    is a table under the tab Text. Values are stored in 32 bits, and are on disk a few
    seconds after they were logged.

    Args:
        folder: one run; tensorboard draws the folders below its own as runs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self._writer: SummaryWriter | None = None
        self._config: Mapping[str, Any] | None = None
        self._step: int | None = None

    def start(self, config: Mapping[str, Any]) -> None:
        """Remember the config; the file is opened by the first `log`."""
        if self._config is not None:
            raise RuntimeError(f"{self.folder}: start was called before close")
        self._config, self._step = dict(config), None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Add a point to the curve of each name."""
        _require_started(self._config, str(self.folder))
        _require_not_falling(self._step, step)
        if self._writer is None:  # readers forget what older files hold from here on
            self._open(step)
        self._step = step
        for name, value in values.items():
            self._writer.add_scalar(name, float(value), step)

    def close(self) -> None:
        """Write what is left, and close the file."""
        if self._config is not None and self._writer is None:
            self._open(None)
        if self._writer is not None:
            self._writer.close()
        self._writer = self._config = None

    def _open(self, step: int | None) -> None:
        # Readers sort the files by name: the second, then the process. Two files of one
        # second would be read in any order, so this one waits for the next.
        while any(self.folder.glob(f"events.out.tfevents.{int(time.time())}.*")):
            time.sleep(0.05)
        self._writer = SummaryWriter(
            str(self.folder), purge_step=step, flush_secs=FLUSH_SECONDS
        )
        rows = [f"| {k} | {_cell(v)} |" for k, v in self._config.items()]
        table = "\n".join(["| name | value |", "|:--|:--|", *rows])
        self._writer.add_text("config", table, step)


class WandB:
    """A run on Weights & Biases, through the package `wandb`.

    The service keeps the first value that it gets for a step and drops a later one,
    with a warning. So where a resumed run repeats steps, the curve shows the repeated
    ones as the killed run logged them.

    Args:
        project: name of the project, made if it does not exist.
        run_id: the run to continue; a new one if None, or if there is none of that id.

    Raises:
        ImportError: the package is not installed.
    """

    def __init__(self, project: str, *, run_id: str | None = None) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ImportError(
                "WandB needs the package wandb, which groundup does not install by "
                "itself: pip install groundup[wandb]"
            ) from error
        self._wandb = wandb
        self.project, self.run_id = project, run_id
        self._run: Any = None
        self._step: int | None = None

    def start(self, config: Mapping[str, Any]) -> None:
        """Begin the run, or continue the one of this id."""
        if self._run is not None:
            raise RuntimeError(f"{self.project}: start was called before close")
        self._run = self._wandb.init(
            project=self.project, id=self.run_id, resume="allow", config=dict(config)
        )
        self._step = None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send the numbers of a step."""
        _require_started(self._run, self.project)
        _require_not_falling(self._step, step)
        self._step = step
        self._run.log({name: float(v) for name, v in values.items()}, step=step)

    def close(self) -> None:
        """Mark the run as finished, once all is sent."""
        if self._run is not None:
            self._run.finish()
            self._run = None


class Trackers:
    """Several trackers as one.

    All are closed, also when one of them fails; the error is raised after that.
    """

    def __init__(self, *many: Tracker) -> None:
        self.many = many

    def start(self, config: Mapping[str, Any]) -> None:
        """Start each."""
        for tracker in self.many:
            tracker.start(config)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log to each."""
        for tracker in self.many:
            tracker.log(step, values)

    def close(self) -> None:
        """Close each, the last one first."""
        with ExitStack() as stack:
            for tracker in self.many:
                stack.callback(tracker.close)


def _require_started(state: object, where: str) -> None:
    if state is None:
        raise RuntimeError(f"{where}: call start before log, and log before close")


def _require_not_falling(last: int | None, step: int) -> None:
    if step < 0 or (last is not None and step < last):
        raise ValueError(f"step must not be negative or fall; got {step} after {last}")


def _plain(value: object) -> object:
    """What JSON can hold: strings for infinities and NaN, and for unknown types."""
    if isinstance(value, Mapping):
        return {str(name): _plain(v) for name, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return json.dumps(value)  # NaN, Infinity, -Infinity
    return value if isinstance(value, str | int | float | None) else str(value)


def _cell(value: object) -> str:
    return re.sub(r"\s+", " ", str(value)).replace("|", "\\|")


def _parse(path: Path, line: str) -> dict:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        record = None
    if not isinstance(record, dict):
        raise ValueError(f"{path}: not a JSON object: {line.strip()[:80]!r}")
    return record


def _replace(path: Path, text: bytes) -> None:
    """Put text in the place of a file, as a whole or not at all."""
    new = path.with_name(path.name + ".new")
    with new.open("wb") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
