"""From logits to a token: temperature, top-k, top-p, min-p, and text token by token.

Here: the four settings as functions on logits, their order, one drawn token for each
row, and text from a model without a cache. Left out: a cache of keys and values (Part
3), penalties for repetition, beam search.

Source: Fan et al. (2018), section 5.4 (top-k); Holtzman et al. (2020), section 3.1
(top-p); Nguyen et al. (2025), section 3 (min-p). Page: book/2-training/sampling.md.
Axes: `...` any leading axes, `V` vocabulary, `B` batch, `T` tokens so far.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from groundup.training.loop import in_mode


@dataclass(frozen=True)
class SamplingConfig:
    """How a token is chosen; None switches a filter off.

    Raises:
        ValueError: a field is out of its range.
    """

    temperature: float = 1.0  # divides the logits; 0 takes the most probable token
    top_k: int | None = None  # tokens kept
    top_p: float | None = None  # probability kept, in (0, 1]
    min_p: float | None = None  # least share of the highest probability, in (0, 1]

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(
                f"temperature must be finite and not negative; got {self.temperature}"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1 or None; got {self.top_k}")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{name} must lie in (0, 1] or be None; got {value}")


GREEDY = SamplingConfig(temperature=0.0)


def apply_temperature(
    logits: Float[Tensor, "... V"], temperature: float
) -> Float[Tensor, "... V"]:
    """Return logits / temperature, shifted so that the highest is 0.

    The shift changes no probability, and no temperature can make the result overflow.
    At temperature 0 only the highest logit is left, the first of them under ties.

    Raises:
        ValueError: temperature is negative, infinite or not a number.

    Example: logits (ln 4, 0) at temperature 0.5 have odds of 16 to 1.
    """
    SamplingConfig(temperature=temperature)
    if temperature == 0:
        return _keep(logits, _first(logits.argmax(-1, keepdim=True), logits))
    return (logits - logits.amax(-1, keepdim=True)) / temperature


def keep_top_k(logits: Float[Tensor, "... V"], k: int) -> Float[Tensor, "... V"]:
    """Set all but the k highest logits to -inf; the first stay under ties.

    A vocabulary of k or fewer is kept whole. Transformers keeps every token that is
    tied with the k-th, so that more than k may stay.

    Raises:
        ValueError: k is below 1.

    Example: logits (1, 3, 3, 3) and k = 2 leave the second and the third token.
    """
    SamplingConfig(top_k=k)
    order = logits.argsort(dim=-1, descending=True, stable=True)
    return _keep(logits, _first(order[..., :k], logits))


def keep_top_p(logits: Float[Tensor, "... V"], p: float) -> Float[Tensor, "... V"]:
    """Set all logits to -inf but the fewest highest whose probability reaches p.

    The token that crosses p stays. Sums are taken in float64: in half precision the
    sum of a long tail does not grow any more. Under ties the first stay.

    Raises:
        ValueError: p is outside (0, 1].

    Example: probabilities (0.1, 0.5, 0.4) and p = 0.6 leave the last two.
    """
    SamplingConfig(top_p=p)
    if p == 1:
        return logits  # rounding in the sum must not cut off the tail
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    mass = ordered.double().softmax(-1).cumsum(-1)
    before = F.pad(mass[..., :-1], (1, 0))  # of all that are more probable
    return _keep(logits, torch.zeros_like(logits).bool().scatter(-1, order, before < p))


def keep_min_p(logits: Float[Tensor, "... V"], p: float) -> Float[Tensor, "... V"]:
    """Set the logits of all tokens below p times the highest probability to -inf.

    Raises:
        ValueError: p is outside (0, 1].

    Example: probabilities (0.6, 0.3, 0.1) and p = 0.5 leave the first two.
    """
    SamplingConfig(min_p=p)
    return _keep(logits, logits >= logits.amax(-1, keepdim=True) + math.log(p))


def filter_logits(
    logits: Float[Tensor, "... V"], config: SamplingConfig
) -> Float[Tensor, "... V"]:
    """Apply temperature, top-k, top-p and min-p, in this order.

    The order of transformers. It matters: top-p and min-p see the probabilities that
    the temperature has made, and top-p those that are left by top-k.
    """
    logits = apply_temperature(logits, config.temperature)
    if config.top_k is not None:
        logits = keep_top_k(logits, config.top_k)
    if config.top_p is not None:
        logits = keep_top_p(logits, config.top_p)
    if config.min_p is not None:
        logits = keep_min_p(logits, config.min_p)
    return logits


def sample(
    logits: Float[Tensor, "... V"],
    config: SamplingConfig,
    generator: torch.Generator | None = None,
) -> Int[Tensor, "..."]:
    """Draw one token for each row.

    Args:
        logits: as the model gives them; -inf forbids a token.
        config: temperature and filters.
        generator: source of chance; torch's global one if None. At temperature 0
            nothing is drawn from it.

    Raises:
        ValueError: a row has a logit that is NaN or +inf, or no token left.
    """
    highest = logits.amax(-1)
    if not highest.isfinite().all():
        raise ValueError(
            "logits must be finite or -inf, with a finite one in each row; the highest "
            f"of a row is {highest[~highest.isfinite()][0].item()}"
        )
    if config.temperature == 0:
        return logits.argmax(-1)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    probabilities = filter_logits(wide, config).softmax(-1)
    drawn = torch.multinomial(
        probabilities.reshape(-1, logits.shape[-1]), 1, generator=generator
    )
    return drawn.view(logits.shape[:-1])


@torch.no_grad()
def generate(
    model: nn.Module,
    prompt_ids: Int[Tensor, "B T"],
    n_new: int,
    config: SamplingConfig,
    generator: torch.Generator | None = None,
) -> Int[Tensor, "B N"]:
    """Continue prompts of equal length, one token at a time, without a cache.

    Each new token costs a pass over everything before it, or over the last
    `model.config.context` tokens where the model has such a limit. The model is in
    evaluation mode meanwhile, and every part of it is left in the mode it was found in.

    Args:
        model: maps ids (B, T) to logits (B, T, V).
        prompt_ids: at least one token a row.
        n_new: tokens to add.
        config: how each is chosen.
        generator: source of chance.

    Returns:
        The prompts with n_new tokens behind each.

    Raises:
        ValueError: the prompt is empty, n_new is negative, or as in `sample`.
    """
    if prompt_ids.shape[1] < 1:
        raise ValueError("prompt_ids must hold at least one token a row; got none")
    if n_new < 0:
        raise ValueError(f"n_new must not be negative; got {n_new}")
    context = getattr(getattr(model, "config", None), "context", None)
    ids = prompt_ids
    with in_mode(model, training=False):
        for _ in range(n_new):
            shown = ids if context is None else ids[:, -context:]
            new = sample(model(shown)[:, -1], config, generator)
            ids = torch.cat((ids, new[:, None]), dim=1)
    return ids


def _first(order: Int[Tensor, "... K"], logits: Tensor) -> Bool[Tensor, "... V"]:
    """True at the places that order lists."""
    return torch.zeros_like(logits).bool().scatter(-1, order, True)


def _keep(logits: Tensor, keep: Bool[Tensor, "... V"]) -> Tensor:
    return logits.masked_fill(~keep, -math.inf)
