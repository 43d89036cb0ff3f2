"""The fast recipe: everything that brings a small model to a given loss sooner.

Here: a recipe with a field for each of its ingredients, the bare loop that trains with
it, and two recipes that were tuned: for the shortest time to a known loss, and for a
minute. Left out: checkpoints, logs and resuming (the trainer); compiling, which takes
longer than these runs.

Page: book/4-scaling/schedules.md.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Protocol, runtime_checkable

import torch
from torch import nn
from torch.nn import functional as F

from groundup.foundations.fitting import byte_tensor
from groundup.foundations.shakespeare import plays
from groundup.modern.decoder import Decoder, DecoderConfig
from groundup.scaling.gram_tables import GramDecoder, RowAdagrad
from groundup.scaling.muon import Muon, muon_groups
from groundup.scaling.optimizers import Together
from groundup.scaling.schedules import Schedule, share
from groundup.training.adamw import AdamW, Group, decay_groups
from groundup.training.batching import Corpus
from groundup.training.loop import DTYPES, window_losses

TABLES = "tables"  # the name of a GramDecoder's tables among its parameters
DECAY = 0.1  # of matrices but the tables
TRAINING_SHARE = 0.9  # of the joined plays; the rest is for validation


@cache
def joined_plays() -> tuple[Corpus, Corpus]:
    """Return all plays as one text of bytes: the first 90 %, and the rest.

    Unlike `shakespeare_split` this cuts a play in two, as the recipe that the
    benchmark compares with does.
    """
    ids = byte_tensor("\n".join(plays().values()))
    cut = int(TRAINING_SHARE * len(ids))
    return Corpus.of([ids[:cut]]), Corpus.of([ids[cut:]])


@dataclass(frozen=True)
class Recipe:
    """A model and how it is trained; each field is an ingredient.

    Raises:
        ValueError: optimizer or dtype is unknown, or a rate or size is not positive.
    """

    sizes: DecoderConfig
    schedule: Schedule
    orders: tuple[int, ...] = ()  # of the n-gram tables; (): none
    n_rows: int = 2**15  # of each table
    quiet: bool = False  # what branches and head write starts at 0
    optimizer: str = "muon"  # or adamw
    lr: float = 0.02  # AdamW's highest rate
    muon_lr: float = 0.02  # Muon's, by the rule "rms"
    table_lr: float = 0.3  # RowAdagrad's
    batch: int = 48  # windows an update
    context: int = 64  # tokens in a window
    dtype: str = "bfloat16"  # of the matrix products

    def __post_init__(self) -> None:
        if self.optimizer not in ("adamw", "muon"):
            raise ValueError(f"optimizer must be adamw or muon; got {self.optimizer!r}")
        if self.dtype not in DTYPES:
            raise ValueError(
                f"dtype must be one of {sorted(DTYPES)}; got {self.dtype!r}"
            )
        for name in ("n_rows", "lr", "muon_lr", "table_lr", "batch", "context"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive; got {getattr(self, name)}")

    @property
    def n_tokens(self) -> int:
        """Tokens that all updates together read."""
        return self.schedule.steps * self.batch * self.context


def build(recipe: Recipe) -> Decoder:
    """Return the untrained model, from torch's global generator."""
    if recipe.orders:
        model = GramDecoder(recipe.sizes, recipe.orders, recipe.n_rows)
    else:
        model = Decoder(recipe.sizes)
    if recipe.quiet:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(("proj.weight", "down.weight", "head.weight")):
                    parameter.zero_()
    return model


def optimizer_of(model: Decoder, recipe: Recipe) -> Together:
    """Return the optimizers of all of model's parameters, with their highest rates."""
    tables = {n: p for n, p in model.named_parameters() if n == TABLES}
    for table in tables.values():
        table.requires_grad_(False)  # so that the others do not list it
    if recipe.optimizer == "muon":
        hidden, rest = muon_groups(model, DECAY)
        parts = [(Muon(hidden), recipe.muon_lr), (AdamW(rest), recipe.lr)]
    else:
        parts = [(AdamW(decay_groups(model, DECAY)), recipe.lr)]
    for table in tables.values():
        table.requires_grad_(True)
    if tables:
        parts.append((RowAdagrad([Group(tables, 0.0)]), recipe.table_lr))
    return Together(*parts)


@runtime_checkable
class Steps(Protocol):
    """An optimizer that is told which share of its highest rate to use."""

    def step(self, share: float) -> None:
        """Update every parameter that has a gradient."""

    def zero_grad(self) -> None:
        """Forget all gradients."""


@dataclass(frozen=True)
class Run:
    """A trained model and what it took."""

    model: nn.Module
    seconds: float  # from nothing to the trained model
    n_updates: int


def bare_loop(
    make: Callable[[], tuple[nn.Module, Steps]],
    recipe: Recipe,
    corpus: Corpus,
    seed: int,
    seconds: float | None = None,
) -> Run:
    """Build a model and train it; the clock starts before it is built.

    Args:
        make: returns the model and its optimizer, from torch's global generator.
        recipe: of it, schedule, batch, context and dtype are used.
        corpus: what batches are drawn from.
        seed: of torch's global generator, and of the batches.
        seconds: train for so long, building included, whatever number of updates that
            is. The schedule then follows the clock: its steps are equal parts of the
            time. None: train for the schedule's steps.
    """
    start = time.perf_counter()
    torch.manual_seed(seed)
    model, optimizer = make()
    generator = torch.Generator().manual_seed(seed)
    autocast = torch.autocast("cpu", DTYPES[recipe.dtype], recipe.dtype != "float32")
    n_updates, step = 0, 0
    while step < recipe.schedule.steps:
        x, y = corpus.sample(recipe.batch, recipe.context, generator)
        with autocast:
            logits = model(x)
        F.cross_entropy(logits.flatten(0, 1).float(), y.flatten()).backward()
        optimizer.step(share(step, recipe.schedule))
        optimizer.zero_grad()
        step = n_updates = n_updates + 1
        if seconds is not None:
            passed = (time.perf_counter() - start) / seconds
            step = int(passed * recipe.schedule.steps)
    return Run(model, time.perf_counter() - start, n_updates)


def speedrun(
    recipe: Recipe, corpus: Corpus, seed: int, seconds: float | None = None
) -> Run:
    """Train a fresh model by a recipe; arguments as for `bare_loop`."""

    def make() -> tuple[nn.Module, Steps]:
        model = build(recipe)
        return model, optimizer_of(model, recipe)

    return bare_loop(make, recipe, corpus, seed, seconds)


def held_out_loss(
    model: nn.Module, corpus: Corpus, context: int = 64, every: int = 1
) -> float:
    """Return the mean loss over windows of corpus, in nats per byte, in float32.

    Args:
        model: maps ids to logits.
        corpus: text that it was not trained on.
        context: tokens in a window; windows do not overlap.
        every: take one window in so many.
    """
    x, y = (part[::every] for part in corpus.windows(context))
    return window_losses(model, x, y).mean().item()


# Both were tuned on the last tenth of the training part, never on the validation part.
FAST = Recipe(  # to the loss of the known recipe: a second or two
    DecoderConfig(d_model=64, n_layers=1, n_heads=2, tied=False),
    Schedule(40, shape="wsd", decay=0.4),
    orders=(2, 3, 4, 5),
    muon_lr=0.03,
)
MINUTE = Recipe(  # the lowest loss after 60 seconds of two cores
    DecoderConfig(d_model=128, n_layers=2, n_heads=4, tied=False),
    Schedule(1500, shape="wsd", decay=0.5),
    orders=(2, 3, 4, 5),
    n_rows=2**16,
    lr=0.01,
    table_lr=0.15,
    batch=32,
)
