"""A training run on disk: what to train, what a run leaves, and a model read back.

Here: the presets of `groundup train`, a folder with config, metrics, weights and
samples, written as a whole or not at all, and the model that such a folder holds. Left
out: stopping and resuming (the checkpoints of Part 4).

A run folder holds `config.json`, `metrics.jsonl` (a line an update, and a line a
validation), `model.safetensors` (the weights with the lowest validation loss) and
`samples.txt`.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
from safetensors.torch import load_file, save_model
from torch import nn

from groundup.foundations.fitting import byte_tensor
from groundup.modern.decoder import Decoder, DecoderConfig
from groundup.modern.kv_cache import generate as generate_cached
from groundup.modern.variants import RECIPE, SMALL
from groundup.training.batching import Corpus, shakespeare_split
from groundup.training.byte_level import ByteTokenizer, Tokenizer, require_digest
from groundup.training.gpt import GPT, TINY, GPTConfig
from groundup.training.loop import TINY_RUN, History, TrainConfig, train
from groundup.training.sampling import SamplingConfig, generate, sample

VALIDATION_SHARE = 0.1  # of a text of one's own: its end
SAMPLE_PROMPT, SAMPLE_LENGTH = "\n", 200  # what samples.txt begins with; bytes


@dataclass(frozen=True)
class GPTRun:
    """Train the GPT of Part 2: learned positions, LayerNorm, GELU."""

    model: GPTConfig = field(default_factory=lambda: TINY)
    train: TrainConfig = field(default_factory=lambda: TINY_RUN)


@dataclass(frozen=True)
class DecoderRun:
    """Train the decoder of Part 3: rotary positions, RMSNorm, SwiGLU."""

    model: DecoderConfig = field(default_factory=lambda: SMALL)
    train: TrainConfig = field(default_factory=lambda: RECIPE)


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
    run: Run, out: Path, text: str | None = None, *, progress: bool = True
) -> History:
    """Train as run says and leave a run folder.

    Args:
        run: model and recipe.
        out: the folder; it must not exist.
        text: what to train on; None: Shakespeare, split by play.
        progress: draw a bar.

    Raises:
        ValueError: text is too short, or the recipe's window is longer than
            the model's.
        FileExistsError: out exists already; nothing is overwritten.
    """
    if out.exists():
        raise FileExistsError(f"out={out} exists already; name another folder")
    if isinstance(run, GPTRun) and run.train.context > run.model.context:
        raise ValueError(
            f"train.context must be at most model.context={run.model.context}; "
            f"got {run.train.context}"
        )
    if text is None:
        corpus, validation, _ = shakespeare_split()
    else:
        corpus, validation = own_text(text, run.train.context)
    torch.manual_seed(run.train.seed)
    model = build(run)
    history = train(model, corpus, run.train, validation, progress=progress)
    if history.best_state is not None:
        model.load_state_dict(history.best_state)
    _write(out, run, model, history)
    return history


def build(run: Run) -> nn.Module:
    """Return an untrained model, drawn from torch's global generator."""
    return FAMILIES[_family(run)][1](run.model)


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
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} is not a run folder: it has no {name}")
    stored = json.loads((folder / "config.json").read_text("utf-8"))
    weights = load_file(folder / "model.safetensors")
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
            f"{folder / 'model.safetensors'} does not fit config.json: {name} must "
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
    kind = FAMILIES[family][0]
    parts = {}
    for part, default in vars(kind()).items():
        known = {f.name for f in fields(default)}
        if unknown := sorted(set(stored[part]) - known):
            raise ValueError(
                f"{part}.{unknown[0]} is no field of {type(default).__name__}; "
                f"there are: {', '.join(sorted(known))}"
            )
        parts[part] = type(default)(**stored[part])
    return kind(**parts)


def _family(run: Run) -> str:
    return next(name for name, (kind, _) in FAMILIES.items() if isinstance(run, kind))


def _write(out: Path, run: Run, model: nn.Module, history: History) -> None:
    """Fill a folder beside its place, then rename it there."""
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.tmp-", dir=out.parent))
    try:
        config = {"family": _family(run), **asdict(run)}
        config |= {"tokenizer": ByteTokenizer().digest, "torch": torch.__version__}
        (staging / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        updates = zip(history.losses, history.grad_norms, strict=True)
        rows = [
            {"step": i, "loss": loss, "grad_norm": norm}
            for i, (loss, norm) in enumerate(updates, 1)
        ]
        rows += [{"step": i, "validation": v} for i, v in history.validation.items()]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (staging / "metrics.jsonl").write_text(lines)
        save_model(model, str(staging / "model.safetensors"))
        text = continue_text(model, SAMPLE_PROMPT, SAMPLE_LENGTH, SamplingConfig())
        (staging / "samples.txt").write_text(text, "utf-8")
        staging.chmod(0o755)  # mkdtemp's folders are for their owner alone
        os.rename(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
