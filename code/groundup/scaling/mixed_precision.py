"""Mixed precision and accumulation: one update from many small batches.

Here: the gradient of a batch that is read in pieces, exact for pieces with unequal
numbers of counted tokens, its products in float32, bfloat16 or float16, and the scale
that keeps gradients inside float16. Left out: the optimizer and its schedule
(`trainer`), which of several processes reads which rows (`distributed`), the formats
themselves (`number_formats`), forgetting activations (`activation_checkpointing`).

Source: Micikevicius et al. (2018), section 3. Page: book/4-scaling/mixed_precision.md.
Axes: `B` batch, `T` context, `V` vocabulary.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn import functional as F

from groundup.training import loop
from groundup.training.loss import IGNORE

DTYPES = {**loop.DTYPES, "float16": torch.float16}


def autocast(dtype: str) -> torch.autocast:
    """Return the context in which matrix products are done in dtype, on the CPU.

    Parameters keep their own dtype; "float32" leaves the products in it too.

    Raises:
        ValueError: dtype is not a key of DTYPES.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {sorted(DTYPES)}; got {dtype!r}")
    return torch.autocast("cpu", DTYPES[dtype], enabled=dtype != "float32")


def accumulate(
    model: nn.Module,
    micro_batches: Sequence[tuple[Int[Tensor, "_ _"], Int[Tensor, "_ _"]]],
    *,
    dtype: str = "float32",
    n_tokens: int | float | None = None,
    scale: float = 1.0,
    quiet: Callable[[], AbstractContextManager] = nullcontext,
) -> float:
    """Add to each .grad the gradient of the mean loss over all micro-batches together.

    Every counted target weighs the same, in whichever micro-batch it stands: each
    backward pass is of a sum, divided by the number of all. Targets that are IGNORE are
    not counted.

    Args:
        model: maps ids (B, T) to logits (B, T, V); may be wrapped in
            `DistributedDataParallel`.
        micro_batches: pairs of ids and targets, (B, T) each, of any sizes.
        dtype: of the matrix products. The loss is in float32, or wider.
        n_tokens: divide by this instead of the counted targets of micro_batches: for a
            batch that is spread over processes. DDP averages gradients over them, so
            there it is the number of counted targets of all, divided by the processes.
        scale: multiply the loss by this before each backward pass, and so every
            gradient; see `LossScaler`.
        quiet: entered around every micro-batch but the last, `ddp.no_sync` to send the
            gradients once.

    Returns:
        The sum of the losses divided by the same number: nats per token.

    Raises:
        ValueError: there is no micro-batch; no target is counted and n_tokens is not
            given, or n_tokens is not positive; dtype is unknown.
    """
    if not micro_batches:
        raise ValueError("micro_batches must hold at least one; got none")
    if n_tokens is None:
        n_tokens = sum(int((y != IGNORE).sum()) for _, y in micro_batches)
        if not n_tokens:
            raise ValueError(
                f"micro_batches must hold a target that counts; all are {IGNORE}"
            )
    if not n_tokens > 0:
        raise ValueError(f"n_tokens must be positive; got {n_tokens}")
    total, last = 0.0, len(micro_batches) - 1
    for i, (x, y) in enumerate(micro_batches):
        with quiet() if i < last else nullcontext():
            with autocast(dtype):
                logits = model(x)
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
            loss = F.cross_entropy(
                wide.flatten(0, 1), y.flatten(), ignore_index=IGNORE, reduction="sum"
            )
            (loss * (scale / n_tokens)).backward()
        total += loss.item()
    return total / n_tokens


@dataclass
class LossScaler:
    """A factor on the loss, as large as the gradients allow; as `torch.amp.GradScaler`.

    Multiply the loss by `scale`, then call `unscale` once an update.

    Raises:
        ValueError: scale or growth_interval is not positive.
    """

    scale: float = 2.0**16
    growth_interval: int = 2000  # good updates in a row until the scale is doubled
    n_good: int = 0  # good updates since the scale last changed

    def __post_init__(self) -> None:
        if not (self.scale > 0 and self.growth_interval > 0):
            raise ValueError(
                f"scale and growth_interval must be positive; got {self.scale} and "
                f"{self.growth_interval}"
            )

    @torch.no_grad()
    def unscale(self, parameters: Iterable[nn.Parameter]) -> bool:
        """Divide the gradients by the scale, then choose the scale of the next update.

        It is halved after a gradient that is not finite, and doubled after
        growth_interval updates without one, as long as float32 holds it.

        Returns:
            Whether all gradients are finite. If not, skip the update.
        """
        grads = [p.grad for p in parameters if p.grad is not None]
        for grad in grads:
            grad.div_(self.scale)
        finite = all(bool(grad.isfinite().all()) for grad in grads)
        self.n_good = self.n_good + 1 if finite else 0
        if not finite:
            self.scale /= 2
        elif self.n_good == self.growth_interval:
            self.n_good = 0
            if 2 * self.scale <= torch.finfo(torch.float32).max:
                self.scale *= 2
        return finite
