"""The training loop, with no Trainer: forty lines that a reader can hold.

Here: the learning rate of each step, a mode that is put back, the loss of fixed
windows, and the loop that ties batches, AdamW, clipping, validation and the best
checkpoint together. Left out: accumulation, checkpoints on disk and resuming (the
trainer of Part 4).

Source: Loshchilov and Hutter (2017), eq. 5, for the cosine; Pascanu et al. (2013),
algorithm 1, for clipping. Page: book/2-training/loop.md.
Axes: `B` batch, `T` context, `V` vocabulary, `W` windows.
"""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from groundup.training.adamw import AdamW, clip_gradients, decay_groups
from groundup.training.batching import Corpus

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WINDOWS_AT_ONCE = 64  # of an evaluation


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained.

    Raises:
        ValueError: a field is out of its range.
    """

    steps: int = 200  # parameter updates
    batch: int = 16  # windows an update
    context: int = 64  # tokens in a window
    lr: float = 3e-3  # highest learning rate
    lr_end: float = 0.1  # the last rate, as a share of lr
    warmup: int = 20  # updates until the highest rate
    weight_decay: float = 0.1  # of matrices
    clip: float = 1.0  # largest norm of the whole gradient
    eval_every: int = 50  # updates between two validations
    eval_windows: int | None = 256  # validation windows used each time; None: all
    dtype: str = "float32"  # of the matrix products: float32 or bfloat16
    seed: int = 0  # of the batches

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "context", "eval_every"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be at least 1; got {getattr(self, name)}"
                )
        for name in ("lr", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive; got {getattr(self, name)}")
        if not 0 <= self.lr_end <= 1:
            raise ValueError(f"lr_end must lie in [0, 1]; got {self.lr_end}")
        if not 0 <= self.warmup <= self.steps:
            raise ValueError(
                f"warmup must lie in 0..steps={self.steps}; got {self.warmup}"
            )
        if self.weight_decay < 0:
            raise ValueError(
                f"weight_decay must not be negative; got {self.weight_decay}"
            )
        if self.dtype not in DTYPES:
            raise ValueError(
                f"dtype must be one of {sorted(DTYPES)}; got {self.dtype!r}"
            )


# For `gpt.TINY`: about 14 seconds of one core.
TINY_RUN = TrainConfig(
    steps=900, batch=16, lr=1.5e-2, lr_end=0.0, warmup=180, eval_every=150
)


@dataclass
class History:
    """What a run leaves behind; losses in nats per token."""

    losses: list[float] = field(default_factory=list)  # of each update's batch
    grad_norms: list[float] = field(default_factory=list)  # before clipping
    validation: dict[int, float] = field(default_factory=dict)  # by updates done
    best_step: int | None = None
    best_state: dict[str, Tensor] | None = None

    @property
    def best_loss(self) -> float:
        """The lowest validation loss (NaN without validation)."""
        return min(self.validation.values(), default=math.nan)

    def validated(self, step: int, loss: float, model: nn.Module) -> None:
        """Note a validation loss; keep a copy of the weights if it is the lowest."""
        if not self.validation or loss < self.best_loss:
            self.best_step = step
            self.best_state = copy.deepcopy(model.state_dict())
        self.validation[step] = loss


def learning_rate(step: int, config: TrainConfig) -> float:
    """Return the rate of update number step, counted from 0.

    Linear warm-up whose first update has lr / warmup, then half a cosine from lr to
    lr * lr_end at the last update; constant after it. Other libraries begin the warm-up
    at 0 and reach the end one update after the last.
    """
    step = min(step, config.steps - 1)
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - 1 - config.warmup)
    falling = (1 + math.cos(math.pi * done)) / 2
    return config.lr * (config.lr_end + (1 - config.lr_end) * falling)


@contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Put model in a mode, and every part of it back in its own, whatever happens.

    Example: `with in_mode(model, training=False): ...` evaluates without dropout.
    """
    modes = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@torch.no_grad()
def window_losses(
    model: nn.Module, x: Int[Tensor, "W T"], y: Int[Tensor, "W T"]
) -> Float[Tensor, "W T"]:
    """Return the loss of every token of fixed windows, in nats.

    The model is in evaluation mode meanwhile and is left in the mode it was found in.
    """
    parts = zip(x.split(WINDOWS_AT_ONCE), y.split(WINDOWS_AT_ONCE), strict=True)
    with in_mode(model, training=False):
        losses = [
            F.cross_entropy(model(ids).transpose(1, 2), targets, reduction="none")
            for ids, targets in parts
        ]
    return torch.cat(losses)


def train(
    model: nn.Module,
    corpus: Corpus,
    config: TrainConfig,
    validation: Corpus | None = None,
    *,
    progress: bool = False,
) -> History:
    """Train model in place to predict the next token.

    Args:
        model: maps ids (B, T) to logits (B, T, V). In training mode meanwhile; left in
            the mode it was found in.
        corpus: what batches are drawn from.
        config: the recipe; its seed decides the batches, and nothing else.
        validation: fixed windows of it are read every `eval_every` updates and after
            the last; the weights with the lowest loss are kept in the history.
        progress: draw a bar.

    Raises:
        ValueError: a corpus has no document as long as the context.
        FloatingPointError: a loss or a gradient is infinite or not a number.
    """
    optimizer = AdamW(decay_groups(model, config.weight_decay))
    generator = torch.Generator().manual_seed(config.seed)
    autocast = torch.autocast("cpu", DTYPES[config.dtype], config.dtype != "float32")
    if validation is not None:
        windows = validation.windows(config.context)
        held_out = [part[: config.eval_windows] for part in windows]
    history = History()
    with in_mode(model, training=True):
        for step in (bar := tqdm(range(config.steps), disable=not progress)):
            x, y = corpus.sample(config.batch, config.context, generator)
            with autocast:
                logits = model(x)
            loss = F.cross_entropy(logits.flatten(0, 1).float(), y.flatten())
            optimizer.zero_grad()
            loss.backward()
            norm = clip_gradients(model.parameters(), config.clip)
            history.losses.append(loss.item())
            history.grad_norms.append(norm)
            if not math.isfinite(loss.item() + norm):
                raise FloatingPointError(
                    f"update {step}: loss {loss.item()}, norm of the gradient {norm}"
                )
            optimizer.step(learning_rate(step, config))
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            done = step + 1
            due = done % config.eval_every == 0 or done == config.steps
            if validation is not None and due:
                found = window_losses(model, *held_out).mean().item()
                history.validated(done, found, model)
    return history
