"""The loss of a language model, from logits to bits per byte.

Here: cross-entropy by hand with a stable log-sum-exp, its gradient, the two ways to
average it over sequences of unequal length, its conversions, the entropy that a
guesser without context reaches, and a check that tells labels that are shifted by
the wrong number of places. Left out: label smoothing and class weights; the
interval of a measured loss (page 2.6).

Sources: Shannon (1948), sections 6 and 7, for entropy; Jelinek et al. (1977) for
perplexity. Page: book/2-training/loss.md.
Axes: `B` batch, `T` context, `N` tokens, `V` vocabulary.
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

IGNORE = -100  # a target that is not counted; torch's default


def log_sum_exp(x: Float[Tensor, "*batch V"]) -> Float[Tensor, "*batch"]:
    """Return ln of the sum of exp(x) over the last axis, without overflow.

    The largest entry is taken out first: ln sum exp(x) = m + ln sum exp(x - m).
    A row of -inf gives -inf.
    """
    largest = x.amax(-1, keepdim=True)
    safe = largest.masked_fill(largest.isinf(), 0)  # inf - inf would be NaN
    return (x - safe).exp().sum(-1).log() + safe[..., 0]


def token_losses(
    logits: Float[Tensor, "*batch V"], targets: Int[Tensor, "*batch"]
) -> Float[Tensor, "*batch"]:
    """Return -ln softmax(logits)[target] for each position, in nats.

    Computed in float32 or wider, whatever the dtype of the logits: with 8 bits of
    fraction, a loss of 2 would be known to 1 % only. A position whose target is
    IGNORE gets 0.

    Raises:
        ValueError: a target is neither IGNORE nor in [0, V).
    """
    n_vocab = logits.shape[-1]
    ignored = targets == IGNORE
    if ((targets < 0) & ~ignored | (targets >= n_vocab)).any():
        bad = targets[(targets < 0) & ~ignored | (targets >= n_vocab)][0]
        raise ValueError(
            f"targets must be in [0, {n_vocab}) or {IGNORE}; got {int(bad)}"
        )
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    picked = wide.gather(-1, targets.masked_fill(ignored, 0)[..., None])[..., 0]
    return (log_sum_exp(wide) - picked).masked_fill(ignored, 0)


def cross_entropy(
    logits: Float[Tensor, "*batch V"], targets: Int[Tensor, "*batch"]
) -> Float[Tensor, ""]:
    """Return the mean of `token_losses` over the targets that count.

    Raises:
        ValueError: as `token_losses`, or every target is ignored.
    """
    return token_mean(token_losses(logits, targets), targets != IGNORE)


def cross_entropy_gradient(
    logits: Float[Tensor, "*batch V"], targets: Int[Tensor, "*batch"]
) -> Float[Tensor, "*batch V"]:
    """Return the gradient of `cross_entropy` by hand: (softmax - one-hot) / n.

    n is the number of targets that count; the rows of the others are zero.

    Raises:
        ValueError: every target is ignored.
    """
    counted = targets != IGNORE
    n = _positive(counted.sum(), "targets must not all be ignored")
    hit = torch.nn.functional.one_hot(
        targets.masked_fill(~counted, 0), logits.shape[-1]
    )
    return (logits.softmax(-1) - hit) * counted[..., None] / n


def token_mean(
    losses: Float[Tensor, "*batch"], counted: Bool[Tensor, "*batch"]
) -> Float[Tensor, ""]:
    """Return the mean over all counted tokens: every token weighs the same.

    Raises:
        ValueError: no token is counted.
    """
    n = _positive(counted.sum(), "counted must hold at least one True")
    return losses.masked_fill(~counted, 0).sum() / n


def sequence_mean(
    losses: Float[Tensor, "B T"], counted: Bool[Tensor, "B T"]
) -> Float[Tensor, ""]:
    """Return the mean of the sequences' own means: every sequence weighs the same.

    A token of a short sequence then weighs more than one of a long sequence.

    Raises:
        ValueError: a sequence has no counted token.
    """
    n = _positive(counted.sum(-1), "counted must hold a True in every row")
    return (losses.masked_fill(~counted, 0).sum(-1) / n).mean()


def perplexity(nats: float) -> float:
    """Return exp(nats): the number of equally likely tokens with the same loss."""
    return math.exp(nats)


def bits_per_byte(nats_per_token: float, n_tokens: int, n_bytes: int) -> float:
    """Return the loss in bits for each byte of the text, whatever a token is.

    Args:
        nats_per_token: mean loss.
        n_tokens: tokens that the mean is over.
        n_bytes: bytes of UTF-8 that these tokens stand for.

    Raises:
        ValueError: a count is not positive.
    """
    if n_tokens < 1 or n_bytes < 1:
        raise ValueError(
            f"n_tokens and n_bytes must be positive; got {n_tokens} and {n_bytes}"
        )
    return nats_per_token * n_tokens / n_bytes / math.log(2)


def unigram_entropy(ids: Int[Tensor, "N"]) -> float:
    """Return the entropy of the frequencies of ids, in nats per token.

    It is the loss, on these ids, of the best guesser that ignores the context.

    Raises:
        ValueError: there are no ids.
    """
    if len(ids) == 0:
        raise ValueError("ids must hold at least one token; got none")
    p = torch.bincount(ids).double() / len(ids)
    return float(torch.special.entr(p).sum())


def shifted_loss(
    logits: Float[Tensor, "B T V"], ids: Int[Tensor, "B T"], shift: int
) -> Float[Tensor, ""]:
    """Return the loss if the logits at t are read as a prediction of ids[t + shift].

    With shift = 1 this is the loss of a language model whose labels are its inputs.
    Compared over shifts, it tells what a model was trained to predict.

    Raises:
        ValueError: shift is negative, or leaves no position.
    """
    n_positions = ids.shape[1]
    if not 0 <= shift < n_positions:
        raise ValueError(f"shift must be in [0, {n_positions}); got {shift}")
    return cross_entropy(logits[:, : n_positions - shift], ids[:, shift:])


def _positive(n: Tensor, message: str) -> Tensor:
    if (n == 0).any():
        raise ValueError(f"{message}; got none")
    return n
