"""The recipe of a training run, and how often the run is looked at.

Here: two frozen configs. Left out: what they mean to a run; see `trainer`.
"""

from dataclasses import dataclass, field

from groundup.scaling.optimizers import OPTIMIZERS
from groundup.scaling.schedules import Schedule
from groundup.training.loop import DTYPES


@dataclass(frozen=True)
class TrainerConfig:
    """How a model is trained. All that decides the result stands here.

    Raises:
        ValueError: a field is out of its range.
    """

    schedule: Schedule = field(default_factory=lambda: Schedule(200, warmup=20))
    batch: int = 16  # windows an update, over all processes
    context: int = 64  # tokens in a window
    micro_batches: int = 1  # pieces in which a process reads its share of a batch
    optimizer: str = "adamw"  # adamw; muon: with AdamW for embedding, head and vectors
    lr: float = 3e-3  # highest rate, of both optimizers
    weight_decay: float = 0.1  # of matrices
    clip: float = 1.0  # largest norm of the whole gradient
    dtype: str = "float32"  # of the matrix products: float32 or bfloat16
    seed: int = 0  # of the batches

    def __post_init__(self) -> None:
        for name in ("batch", "context", "micro_batches"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be at least 1; got {getattr(self, name)}"
                )
        if self.batch % self.micro_batches:
            raise ValueError(
                f"micro_batches must divide batch={self.batch}; "
                f"got {self.micro_batches}"
            )
        for name in ("lr", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive; got {getattr(self, name)}")
        if self.weight_decay < 0:
            raise ValueError(
                f"weight_decay must not be negative; got {self.weight_decay}"
            )
        for name, known in (("optimizer", OPTIMIZERS), ("dtype", tuple(DTYPES))):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} must be one of {', '.join(known)}; "
                    f"got {getattr(self, name)!r}"
                )


@dataclass(frozen=True)
class Watch:
    """How often a run is looked at and saved. None of it changes the result.

    Raises:
        ValueError: a field is out of its range.
    """

    eval_every: int = 50  # updates between two validations
    eval_windows: int | None = 256  # validation windows used each time; None: all
    save_every: int = 100  # updates between two checkpoints
    keep: int = 2  # checkpoints kept

    def __post_init__(self) -> None:
        for name in ("eval_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be at least 1; got {getattr(self, name)}"
                )
