"""A training run on disk: what to train, what a run leaves, and a model read back.

Here: the presets of `groundup train`, a folder with config, metrics, checkpoints,
weights and a sample that a killed run goes on from, and the model that such a folder
holds. Left out: training itself; see `trainer`.

A run folder holds `config.json`, `metrics.jsonl`, `tensorboard/` and `checkpoints/`
from the start, and `model.safetensors` (the weights with the lowest validation loss)
and `samples.txt` once the run is over.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_model
from torch import nn

from groundup.foundations.fitting import byte_tensor
from groundup.modern.decoder import Decoder, DecoderConfig
from groundup.modern.kv_cache import generate as generate_cached
from groundup.modern.variants import RECIPE, SMALL
from groundup.scaling import distributed
from groundup.scaling.recipe import TrainerConfig, Watch
from groundup.scaling.schedules import Schedule
from groundup.scaling.tracking import JsonLines, TensorBoard
from groundup.scaling.trainer import fit
from groundup.training.batching import Corpus, shakespeare_split
from groundup.training.byte_level import ByteTokenizer, Tokenizer, require_digest
from groundup.training.gpt import GPT, TINY, GPTConfig
from groundup.training.loop import TINY_RUN, History, TrainConfig
from groundup.training.sampling import SamplingConfig, generate, sample

VALIDATION_SHARE = 0.1  # of a text of one's own: its end
SAMPLE_PROMPT, SAMPLE_LENGTH = "\n", 200  # what samples.txt begins with; bytes
CONFIG, WEIGHTS = "config.json", "model.safetensors"
T = TypeVar("T")


def recipe(short: TrainConfig) -> TrainerConfig:
    """Return the recipe of Part 2's loop as one of the trainer."""
    schedule = Schedule(short.steps, warmup=short.warmup, end=short.lr_end)
    same = {f.name for f in fields(TrainerConfig)} & {f.name for f in fields(short)}
    return TrainerConfig(schedule, **{name: getattr(short, name) for name in same})


@dataclass(frozen=True)
class GPTRun:
    """Train the GPT of Part 2: learned positions, LayerNorm, GELU."""

    model: GPTConfig = field(default_factory=lambda: TINY)
    train: TrainerConfig = field(default_factory=lambda: recipe(TINY_RUN))
    watch: Watch = field(default_factory=Watch)


@dataclass(frozen=True)
class DecoderRun:
    """Train the decoder of Part 3: rotary positions, RMSNorm, SwiGLU."""

    model: DecoderConfig = field(default_factory=lambda: SMALL)
    train: TrainerConfig = field(default_factory=lambda: recipe(RECIPE))
    watch: Watch = field(default_factory=Watch)


Run = GPTRun | DecoderRun
PRESETS: dict[str, Run] = {"gpt-tiny": GPTRun(), "modern-tiny": DecoderRun()}
FAMILIES: dict[str, tuple[type, type]] = {
    "gpt": (GPTRun, GPT),
    "modern": (DecoderRun, Decoder),
}


def own_text(text: str, context: int) -> tuple[Corpus, Corpus]:
    """Cut one text into a corpus for training and, its end, one for validation.

    Raises:
        ValueError: text is too short for a window and its target in either.
    """
    data = byte_tensor(text)
    cut = len(data) - round(VALIDATION_SHARE * len(data))
    least = round((context + 1) / VALIDATION_SHARE)
    if len(data) - cut < context + 1:
        raise ValueError(
            f"text holds {len(data)} bytes; windows of context={context} need at least "
            f"{least}, since {VALIDATION_SHARE:.0%} are kept for validation"
        )
    return Corpus.of([data[:cut]]), Corpus.of([data[cut:]])


def train_run(
    run: Run,
    out: Path,
    text: str | None = None,
    *,
    how: str = "none",
    progress: bool = True,
) -> History:
    """Train as run says, in a run folder; go on with it if it was begun there.

    Args:
        run: model and recipe.
        out: the folder; new, or of the same run, stopped or killed.
        text: what to train on; None: Shakespeare, split by play.
        how: "none", or "ddp" or "fsdp" under torchrun.
        progress: draw a bar.

    Raises:
        ValueError: text is too short, the recipe's window is longer than the model's,
            or out was begun with another config; says which field.
        FileExistsError: out holds a finished run, or something else; nothing is
            overwritten.
        KeyboardInterrupt: stopped; the same call goes on.
    """
    if isinstance(run, GPTRun) and run.train.context > run.model.context:
        raise ValueError(
            f"train.context must be at most model.context={run.model.context}; "
            f"got {run.train.context}"
        )
    if text is None:
        corpus, validation, _ = shakespeare_split()
    else:
        corpus, validation = own_text(text, run.train.context)
    tokenizer = ByteTokenizer().digest
    first = distributed.current_world().first
    if first:
        _begin(out, _stored(run, text))
    distributed.total(0.0)  # nobody trains before the folder is there
    torch.manual_seed(run.train.seed)
    model = build(run)
    history = fit(
        model,
        corpus,
        run.train,
        validation=validation,
        watch=run.watch,
        folder=out / "checkpoints",
        tokenizer=tokenizer,
        trackers=(JsonLines(out / "metrics.jsonl"), TensorBoard(out / "tensorboard")),
        how=how,
        progress=progress,
    )
    if first:
        trained = build(run)
        trained.load_state_dict(history.best_state)
        _finish(out, trained)
    return history


def build(run: Run) -> nn.Module:
    """Return an untrained model, drawn from torch's global generator."""
    return next(model for kind, model in FAMILIES.values() if isinstance(run, kind))(
        run.model
    )


def continue_text(
    model: nn.Module, prompt: str, n_new: int, config: SamplingConfig, seed: int = 0
) -> str:
    """Let model go on after prompt; return what it adds.

    Raises:
        ValueError: prompt is empty, or n_new is negative.
    """
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(prompt)
    if not len(ids):
        raise ValueError("prompt must hold at least one byte; got an empty one")
    generator = torch.Generator().manual_seed(seed)
    if isinstance(model, Decoder):
        (new,) = generate_cached(
            model, [ids], n_new, lambda logits: sample(logits, config, generator)
        )
        return tokenizer.decode(torch.tensor(new, dtype=torch.long))
    whole = generate(model, ids[None], n_new, config, generator)
    return tokenizer.decode(whole[0, len(ids) :])


def load_run(folder: Path, tokenizer: Tokenizer | None = None) -> nn.Module:
    """Return the trained model of a run folder, in evaluation mode.

    Args:
        folder: as `train_run` leaves it.
        tokenizer: what its text will be encoded with; None: bytes.

    Raises:
        FileNotFoundError: folder holds no run.
        ValueError: the config has an unknown family or field, the tokenizer is another
            one, or the weights have other names or shapes than the config says.
    """
    for name, reason in ((CONFIG, "not a run folder"), (WEIGHTS, "not finished")):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} is {reason}: it has no {name}")
    stored = json.loads((folder / CONFIG).read_text("utf-8"))
    weights = load_file(folder / WEIGHTS)
    run = read_config(stored)
    require_digest(tokenizer or ByteTokenizer(), stored["tokenizer"])
    model = build(run)
    expected = dict(model.state_dict())
    if isinstance(run, DecoderRun) and run.model.tied:
        del expected["head.weight"]  # the embedding, stored once
    shapes = {name: tuple(t.shape) for name, t in weights.items()}
    wanted = {name: tuple(t.shape) for name, t in expected.items()}
    if shapes != wanted:
        name = min(n for n in shapes | wanted if shapes.get(n) != wanted.get(n))
        raise ValueError(
            f"{folder / WEIGHTS} does not fit {CONFIG}: {name} must "
            f"have shape {wanted.get(name)}; got {shapes.get(name)}"
        )
    model.load_state_dict(weights, strict=False)  # a tied head follows the embedding
    return model.eval()


def read_config(stored: Mapping) -> Run:
    """Turn the content of a config.json back into what was trained.

    Raises:
        ValueError: the family or a field is unknown, or a value is refused.
    """
    family = stored.get("family")
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {sorted(FAMILIES)}; got {family!r}")
    default = FAMILIES[family][0]()
    return _filled(default, {name: stored[name] for name in vars(default)}, "")


def _filled(default: T, stored: Mapping[str, Any], path: str) -> T:
    """Return default, a dataclass of dataclasses, with the fields that are stored."""
    known = {f.name for f in fields(default)}
    if unknown := sorted(set(stored) - known):
        raise ValueError(
            f"{path}{unknown[0]} is no field of {type(default).__name__}; "
            f"there are: {', '.join(sorted(known))}"
        )
    values = {}
    for name, value in stored.items():
        old = getattr(default, name)
        nested = is_dataclass(old)
        values[name] = _filled(old, value, f"{path}{name}.") if nested else value
    return type(default)(**values)


def _stored(run: Run, text: str | None) -> dict[str, Any]:
    """Return what config.json holds."""
    kinds = FAMILIES.items()
    return {
        "family": next(name for name, (kind, _) in kinds if isinstance(run, kind)),
        **asdict(run),
        "text": "shakespeare"
        if text is None
        else hashlib.sha256(text.encode()).hexdigest(),
        "tokenizer": ByteTokenizer().digest,
        "torch": torch.__version__,
    }


def _begin(out: Path, stored: Mapping[str, Any]) -> None:
    """Make the folder of a new run, or see that it holds this one, unfinished."""
    if (out / CONFIG).is_file() and not (out / WEIGHTS).exists():
        begun = json.loads((out / CONFIG).read_text("utf-8"))
        for name in (stored | begun).keys() - {"torch"}:
            if stored.get(name) != begun.get(name):
                raise ValueError(
                    f"out={out} was begun with {name}={begun.get(name)}; got "
                    f"{stored.get(name)}: go on with that, or name another folder"
                )
        return
    if out.exists():
        raise FileExistsError(f"out={out} exists already; name another folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.tmp-", dir=out.parent))
    try:
        (staging / CONFIG).write_text(json.dumps(stored, indent=1) + "\n")
        staging.chmod(0o755)  # mkdtemp's folders are for their owner alone
        os.rename(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _finish(out: Path, model: nn.Module) -> None:
    """Add a sample and, last, the weights: with them a run is finished."""
    words = continue_text(model, SAMPLE_PROMPT, SAMPLE_LENGTH, SamplingConfig())
    (out / "samples.txt").write_text(words, "utf-8")
    part = out / f".{WEIGHTS}.part"
    save_model(model, str(part))
    os.replace(part, out / WEIGHTS)
