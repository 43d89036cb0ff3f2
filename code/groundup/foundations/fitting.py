"""A short fit of a small model to bytes, for pages that need a trained one.

Here: bytes as a tensor, random windows with targets shifted by one, the fewest
lines of training that give a usable small model, and its loss on other text. Left
out: splits, intervals, checkpoints, accumulation: all that Part 2 explains.

Pages: 1.1, 1.4, 1.5, 1.7. Axes: `N` bytes of text, `B` batch, `T` context.
"""

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn import functional as F

N_BYTES = 256
WARMUP_SHARE = 0.1  # of the steps; the rate then falls linearly to zero


def byte_tensor(text: str) -> Int[Tensor, "N"]:
    """Return the UTF-8 bytes of text as int64 ids in [0, 256).

    Example: `byte_tensor("To be")` is `tensor([84, 111, 32, 98, 101])`.
    """
    return torch.from_numpy(np.frombuffer(text.encode(), np.uint8).astype(np.int64))


def sample_windows(
    data: Int[Tensor, "N"], *, batch: int, context: int, generator: torch.Generator
) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
    """Draw windows uniformly; the targets are the inputs shifted by one.

    Every start from 0 to N - context - 1 is equally likely.

    Args:
        data: token ids.
        batch: windows to draw.
        context: tokens in a window.
        generator: source of the starts.

    Raises:
        ValueError: data is too short for one window and its last target.
    """
    n_starts = len(data) - context
    if n_starts < 1:
        raise ValueError(
            f"data holds {len(data)} tokens; a window of context={context} "
            f"and its target need at least {context + 1}"
        )
    starts = torch.randint(n_starts, (batch, 1), generator=generator)
    windows = data[starts + torch.arange(context + 1)]
    return windows[:, :-1], windows[:, 1:]


def fit(
    model: nn.Module,
    data: Int[Tensor, "N"],
    *,
    steps: int,
    batch: int,
    context: int,
    lr: float,
    seed: int,
) -> list[float]:
    """Train model in place to predict the next byte; return the loss of each step.

    Adam, with a linear warm-up and a linear decay to zero. The model is left in
    training mode.

    Args:
        model: maps ids (B, T) to logits (B, T, V).
        data: token ids to draw windows from.
        steps: parameter updates.
        batch: windows an update.
        context: tokens in a window.
        lr: highest learning rate.
        seed: decides which windows are drawn, and nothing else.

    Returns:
        Cross-entropy in nats per token, before each update.
    """
    generator = torch.Generator().manual_seed(seed)
    # fused: one call for all parameters; small models would spend the time on calls
    optimizer = torch.optim.Adam(
        model.parameters(), lr=lr, betas=(0.9, 0.99), fused=True
    )
    warmup = max(1, round(WARMUP_SHARE * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup)),
    )
    losses = []
    model.train()
    for _ in range(steps):
        x, y = sample_windows(data, batch=batch, context=context, generator=generator)
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def held_out_loss(model: nn.Module, data: Int[Tensor, "N"], *, context: int) -> float:
    """Return the mean cross-entropy over data, cut into windows end to end.

    What is left over after the last whole window is not counted. The model is left
    in the mode in which it was found.

    Args:
        model: maps ids (B, T) to logits (B, T, V).
        data: token ids that were not trained on.
        context: tokens in a window.

    Returns:
        Nats per token.

    Raises:
        ValueError: data is too short for one window and its last target.
    """
    n_windows = (len(data) - 1) // context
    if n_windows < 1:
        raise ValueError(
            f"data holds {len(data)} tokens; a window of context={context} "
            f"and its target need at least {context + 1}"
        )
    x = data[: n_windows * context].view(n_windows, context)
    y = data[1 : n_windows * context + 1].view(n_windows, context)
    training = model.training
    model.eval()
    total = sum(
        F.cross_entropy(model(ids).flatten(0, 1), targets.flatten(), reduction="sum")
        for ids, targets in zip(x.split(64), y.split(64), strict=True)
    )
    model.train(training)
    return float(total) / y.numel()
