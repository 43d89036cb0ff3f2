"""Three objectives for one model: causal, masked and prefix language modelling.

Here: the mask of a prefix, the corruption of a masked model, batches of the three
objectives as (inputs, labels, mask), the loss on what is labelled and nothing else, and
one measure for all: the loss of a hole of neighbouring bytes, given what stands left of
it or on both sides. Left out: spans as single sentinels, and text put in another order.

Sources: Devlin et al. (2019), section 3.1, task 1, for masking; Raffel et al. (2020),
section 3.2.1, for the masks. Page: book/2-training/objectives.md.
Axes: `B` batch, `T` context, `V` vocabulary, `L` length of a hole.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from groundup.foundations.fitting import N_BYTES
from groundup.training.adamw import AdamW, clip_gradients, decay_groups
from groundup.training.batching import Corpus
from groundup.training.gpt import GPT, GPTConfig
from groundup.training.loop import TrainConfig, learning_rate
from groundup.training.loss import IGNORE
from groundup.transformer.positions import sinusoid_table
from groundup.transformer.single_head import causal_mask

OBJECTIVES = ("causal", "masked", "prefix")
MASK_ID = N_BYTES  # the first id that is no byte
N_VOCAB = N_BYTES + 1
SMALL = GPTConfig(
    n_vocab=N_VOCAB, context=16, d_model=64, n_layers=1, n_heads=4, init_std=0.085
)
RECIPE = TrainConfig(
    steps=320,
    batch=64,
    context=16,
    lr=1e-2,
    lr_end=0.0,
    warmup=100,
    weight_decay=0.01,
)


class Example(NamedTuple):
    """What a model is shown and what it is asked."""

    inputs: Int[Tensor, "B T"]
    labels: Int[Tensor, "B T"]  # IGNORE where nothing is asked
    mask: Bool[Tensor, "..."]  # (T, T) or (B, T, T), True = may attend


def prefix_mask(lengths: Int[Tensor, "B"], context: int) -> Bool[Tensor, "B T T"]:
    """Let the first `lengths` positions see each other, and the rest what is before.

    Every query sees the whole prefix and all positions up to its own: the causal mask
    with a square of `lengths` by `lengths` opened in its upper left corner.

    Raises:
        ValueError: a length is not in 0..context.
    """
    if ((lengths < 0) | (lengths > context)).any():
        raise ValueError(f"lengths must lie in 0..{context}; got {lengths.tolist()}")
    in_prefix = torch.arange(context) < lengths[:, None]
    return causal_mask(context) | in_prefix[:, None, :]


def corrupt(
    ids: Int[Tensor, "B T"],
    rate: float,
    generator: torch.Generator,
    *,
    random: float = 0.0,
    keep: float = 0.0,
) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
    """Hide each token with probability rate; ask for the hidden ones only.

    Args:
        ids: bytes.
        rate: share of the positions that are chosen, in (0, 1).
        generator: of all draws.
        random: share of the chosen that become a byte drawn uniformly.
        keep: share of the chosen that stay as they are; the rest becomes MASK_ID.
            BERT has 0.1 for both.

    Returns:
        The inputs, and the labels: the original token where it was chosen, IGNORE
        elsewhere.

    Raises:
        ValueError: rate is not in (0, 1), or the shares are negative or above 1
            together.
    """
    if not 0 < rate < 1:
        raise ValueError(f"rate must lie in (0, 1); got {rate}")
    if min(random, keep) < 0 or random + keep > 1:
        raise ValueError(
            f"random and keep must be shares of the chosen; got {random} and {keep}"
        )
    chosen = torch.rand(ids.shape, generator=generator) < rate
    lot = torch.rand(ids.shape, generator=generator)
    other = torch.randint(N_BYTES, ids.shape, generator=generator)
    shown = torch.where(lot < random, other, MASK_ID)
    shown = torch.where(lot >= 1 - keep, ids, shown)
    return torch.where(chosen, shown, ids), torch.where(chosen, ids, IGNORE)


def example(
    objective: str,
    x: Int[Tensor, "B T"],
    y: Int[Tensor, "B T"],
    generator: torch.Generator,
    *,
    rate: float = 0.3,
) -> Example:
    """Make one batch of an objective from windows x and the same shifted by one, y.

    causal: the next token everywhere. masked: the hidden tokens, `rate` of all, from
    both sides. prefix: the next token from the end of a prefix on, whose length is
    drawn uniformly from 1..T - 1.

    Raises:
        ValueError: the objective is unknown, or as in `corrupt`.
    """
    context = x.shape[1]
    if objective == "causal":
        return Example(x, y, causal_mask(context))
    if objective == "masked":
        inputs, labels = corrupt(x, rate, generator)
        return Example(inputs, labels, torch.ones(context, context, dtype=torch.bool))
    if objective == "prefix":
        lengths = torch.randint(1, context, (len(x),), generator=generator)
        asked = torch.arange(context) >= lengths[:, None] - 1
        labels = torch.where(asked, y, IGNORE)
        return Example(x, labels, prefix_mask(lengths, context))
    raise ValueError(f"objective must be one of {OBJECTIVES}; got {objective!r}")


def objective_loss(model: GPT, batch: Example) -> Float[Tensor, ""]:
    """Return the mean loss of the labelled positions, in nats per label.

    Logits are computed for these positions alone. A batch without labels has loss 0.
    """
    asked = batch.labels != IGNORE
    hidden = model.hidden(batch.inputs, batch.mask)[asked]
    total = F.cross_entropy(
        F.linear(hidden, model.embed.weight), batch.labels[asked], reduction="sum"
    )
    return total / asked.sum().clamp(min=1)


def small_gpt(seed: int, config: GPTConfig = SMALL) -> GPT:
    """Return a fresh model that is quick to find its neighbours.

    A masked model finds them by position and by nothing else, which from random
    positions takes longer than all of the training here. So the learned positions start
    as faint sinusoids, and the embedding with rows of length 1.
    """
    torch.manual_seed(seed)
    model = GPT(config)
    with torch.no_grad():
        model.embed.weight.normal_(0.0, config.d_model**-0.5)
        table = sinusoid_table(config.context, config.d_model)
        model.positions.table.copy_(0.2 * table)
    return model


def train_objective(
    model: GPT,
    corpus: Corpus,
    objective: str,
    config: TrainConfig = RECIPE,
    *,
    make: Callable[..., Example] = example,
    **options: float,
) -> list[float]:
    """Train model in place; return the loss of each update's batch, in nats per label.

    All objectives draw the same windows for the same seed and send equally many tokens
    through the blocks.

    Args:
        model: reads MASK_ID if the objective is masked.
        corpus: what the windows are drawn from.
        objective: one of OBJECTIVES.
        config: the recipe; its seed decides windows and what is hidden.
        make: called as `example`, to change what a batch shows or asks.
        **options: for make.

    Raises:
        ValueError: as in `example`.
    """
    optimizer = AdamW(decay_groups(model, config.weight_decay))
    windows = torch.Generator().manual_seed(config.seed)
    draws = torch.Generator().manual_seed(config.seed)
    losses = []
    model.train()
    for step in range(config.steps):
        x, y = corpus.sample(config.batch, config.context, windows)
        loss = objective_loss(model, make(objective, x, y, draws, **options))
        loss.backward()
        clip_gradients(model.parameters(), config.clip)
        optimizer.step(learning_rate(step, config))
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def hole_logits(
    model: nn.Module, objective: str, ids: Int[Tensor, "B T"], start: int, end: int
) -> Float[Tensor, "B V"]:
    """Return the logits of the byte at `start`, where start to end - 1 is a hole.

    A masked model sees both sides of the hole, with MASK_ID in it; the others see what
    is left of it. No model sees a byte of the hole. Ids that are no byte get -inf.

    Raises:
        ValueError: the hole is empty or not within 1..T, or the objective is unknown.
    """
    if not 1 <= start < end <= ids.shape[1]:
        raise ValueError(
            f"the hole must lie within 1..{ids.shape[1]}; got {start} to {end}"
        )
    if objective not in OBJECTIVES:
        raise ValueError(f"objective must be one of {OBJECTIVES}; got {objective!r}")
    if objective == "masked":
        shown = ids.clone()
        shown[:, start:end] = MASK_ID
        place = start
    else:
        shown, place = ids[:, :start], start - 1
    n = shown.shape[1]
    two_sided = objective != "causal"
    mask = torch.ones(n, n, dtype=torch.bool) if two_sided else causal_mask(n)
    logits = model(shown, mask)[:, place]
    no_byte = torch.arange(logits.shape[-1]) >= N_BYTES
    return logits.masked_fill(no_byte, -torch.inf)


def hole_losses(
    model: nn.Module, objective: str, ids: Int[Tensor, "B T"], start: int, length: int
) -> Float[Tensor, "B L"]:
    """Return -ln p of each byte of a hole, left to right, in nats.

    After each byte the true one is put in its place, so that the sum over the hole is
    -ln of the probability that the model gives to the whole of it. A hole that reaches
    the end of ids has no right side: that is continuing.
    """
    end = start + length
    return torch.stack(
        [
            F.cross_entropy(
                hole_logits(model, objective, ids, t, end), ids[:, t], reduction="none"
            )
            for t in range(start, end)
        ],
        dim=1,
    )


@torch.no_grad()
def fill(
    model: nn.Module, objective: str, ids: Int[Tensor, "B T"], start: int, length: int
) -> Int[Tensor, "B T"]:
    """Return ids with the hole filled by the likeliest byte, one after another."""
    filled, end = ids.clone(), start + length
    for t in range(start, end):
        filled[:, t] = hole_logits(model, objective, filled, t, end).argmax(-1)
    return filled
