"""A trained decoder gets more tokens: rows that disturb the old ones least.

Here: growing the embedding, the head and the optimizer's state together. Left out:
taking tokens away, and matching the rows of two tokenizers whose ids differ.

Source: Hewitt (2021) for the mean of the old rows and its bound. Page:
book/4-scaling/checkpointing.md.
Axes: `V` vocabulary before, `V1` after, `C` d_model.
"""

from collections.abc import Iterable
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from groundup.modern.decoder import Decoder
from groundup.training.adamw import AdamW


def grown_rows(
    table: Float[Tensor, "V C"],
    n_rows: int,
    *,
    noise: float = 0.0,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "V1 C"]:
    """Return table with further rows: the mean of its rows, plus noise.

    Args:
        table: one row a token.
        n_rows: V1, more than V.
        noise: standard deviation around the mean, as a share of the old rows' own,
            column by column.
        generator: of the noise; None: torch's global one.

    Raises:
        ValueError: n_rows is not above V, or noise is negative.

    Example: the rows [0, 2] and [2, 4] get a third, [1, 3].
    """
    n_old, width = table.shape
    if n_rows <= n_old:
        raise ValueError(
            f"n_rows must be more than the {n_old} there are; got {n_rows}"
        )
    if not noise >= 0:
        raise ValueError(f"noise must not be negative; got {noise}")
    new = table.mean(0).expand(n_rows - n_old, width)
    if noise:
        spread = noise * table.std(0, correction=0)
        drawn = torch.randn(new.shape, generator=generator, dtype=table.dtype)
        new = new + spread * drawn
    return torch.cat((table, new))


@torch.no_grad()
def grow_vocabulary(
    model: Decoder,
    n_vocab: int,
    optimizers: Iterable[AdamW] = (),
    *,
    noise: float = 0.0,
    generator: torch.Generator | None = None,
) -> None:
    """Give model and its optimizers n_vocab tokens, in place; old ids keep their rows.

    The logits of old tokens stay what they were. Without noise a new token gets the
    mean of the old logits, so the loss on old text rises by at most
    ln(n_vocab / V) nats per token.

    Embedding and head become new parameters, which the optimizers are given. In their
    state a new row has no momentum and the mean of the old squares: with squares of 0,
    and a step count that is no longer corrected for, it would move too fast.

    Args:
        model: tied or not.
        n_vocab: tokens afterwards, more than before.
        optimizers: those that train the embedding or the head, if they are to go on.
        noise: see `grown_rows`.
        generator: of the noise.

    Raises:
        ValueError: n_vocab is not above the old number, or noise is negative.
    """
    tables = {"embed.weight": model.embed, "head.weight": model.head}
    if model.config.tied:
        del tables["head.weight"]
    optimizers = list(optimizers)
    for name, layer in tables.items():
        rows = grown_rows(layer.weight, n_vocab, noise=noise, generator=generator)
        layer.weight = nn.Parameter(rows, requires_grad=layer.weight.requires_grad)
        for optimizer in optimizers:
            _grow_state(optimizer, name, layer.weight)
    if model.config.tied:
        model.head.weight = model.embed.weight
    model.embed.num_embeddings = model.head.out_features = n_vocab
    model.config = replace(model.config, n_vocab=n_vocab)


def _grow_state(optimizer: AdamW, name: str, table: nn.Parameter) -> None:
    if name not in optimizer.state:
        return
    mean, square = optimizer.state[name]
    still = mean.new_zeros(len(table) - len(mean), mean.shape[1])
    optimizer.state[name] = (
        torch.cat((mean, still)),
        grown_rows(square, len(table)),
    )
    for group in optimizer.groups:
        if name in group.parameters:
            group.parameters[name] = table
