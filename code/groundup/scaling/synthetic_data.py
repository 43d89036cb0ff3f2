"""Experiments on data: noise, mixtures, and the loss beside a floor that is known.

Here: tales with damaged words, batches from several corpora in fixed shares, training
that is read on several held-out texts, and the test that tells a leak from luck. Left
out: the language itself (`tinytales`), its entropy (`story_entropy`), finding
duplicates (`deduplication`).

Source: Ville (1939) for the bound behind `leak_evidence`. Page:
book/4-scaling/synthetic_data.md.
Axes: `B` batch, `T` context, `N` bytes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from groundup.foundations.fitting import byte_tensor
from groundup.scaling.recipe import TrainerConfig
from groundup.scaling.story_entropy import END, surprisals
from groundup.scaling.tinytales import TalesConfig, random_for, tales
from groundup.scaling.trainer import Source, Trainer
from groundup.training.batching import Corpus
from groundup.training.evaluation import corpus_losses
from groundup.training.loop import in_mode, window_losses


def shuffled_words(text: str, order: Sequence[float | int]) -> str:
    """Put the words of a tale in another order; its end stays.

    Args:
        text: a tale.
        order: a number for each word; the words are sorted by it.
    """
    words = text.removesuffix(END).split(" ")
    pairs = sorted(zip(order, range(len(words)), words, strict=True))
    return " ".join(word for _, _, word in pairs) + END


def noisy_text(config: TalesConfig, share: float, n: int | None = None) -> str:
    """Return the training tales as one text, a share of them with shuffled words.

    Which tales are damaged, and how, is decided tale by tale: with a larger share the
    same tales are damaged, and more.

    Raises:
        ValueError: share is not in [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must lie in [0, 1]; got {share}")
    texts = []
    for index, tale in enumerate(tales(config, "train", n)):
        rng = random_for(config, "noise", index)
        text = tale.text
        if rng.random() < share:
            n_words = len(text.removesuffix(END).split(" "))
            text = shuffled_words(text, [rng.random() for _ in range(n_words)])
        texts.append(text)
    return "".join(texts)


@dataclass(frozen=True)
class Mixture:
    """Batches from several corpora: each window comes from one, by its share.

    Raises:
        ValueError: there are no corpora, or their shares are not positive.
    """

    corpora: tuple[Corpus, ...]
    shares: tuple[float | int, ...]

    def __post_init__(self) -> None:
        if len(self.corpora) != len(self.shares) or not self.corpora:
            raise ValueError(
                f"shares must be one for each of {len(self.corpora)} corpora; "
                f"got {self.shares}"
            )
        if not all(share > 0 for share in self.shares):
            raise ValueError(f"shares must be positive; got {self.shares}")

    def sample(
        self, batch: int, context: int, generator: torch.Generator
    ) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
        """Draw windows; row by row the corpus is drawn, then the place."""
        shares = torch.tensor(self.shares, dtype=torch.float64)
        chosen = torch.multinomial(shares, batch, True, generator=generator)
        x = torch.empty(batch, context, dtype=torch.long)
        y = torch.empty_like(x)
        for k, corpus in enumerate(self.corpora):
            rows = chosen == k
            if rows.any():
                x[rows], y[rows] = corpus.sample(int(rows.sum()), context, generator)
        return x, y


def learning_curves(
    model: nn.Module,
    source: Source,
    config: TrainerConfig,
    held_out: Mapping[str, tuple[Int[Tensor, "W T"], Int[Tensor, "W T"]]],
    at: Sequence[int],
) -> dict[str, list[float]]:
    """Train model in place and read its loss on several texts on the way.

    Args:
        model: maps ids (B, T) to logits (B, T, V).
        source: draws the batches.
        config: the recipe.
        held_out: fixed windows by name.
        at: numbers of updates after which to read; those beyond the last are left out.

    Returns:
        By name the losses, in nats per token, in the order of `at`.
    """
    trainer = Trainer(model, source, config)
    curves: dict[str, list[float]] = {name: [] for name in held_out}
    with in_mode(model, training=True):
        for step in range(config.schedule.steps + 1):
            if step in at:
                for name, (x, y) in held_out.items():
                    curves[name].append(window_losses(model, x, y).mean().item())
            if step < config.schedule.steps:
                trainer.update()
    return curves


def tale_losses(
    model: nn.Module, texts: Sequence[str], context: int
) -> Float[Tensor, "N"]:
    """Return the loss of every byte of a row of tales, in nats.

    Windows move on by a quarter, so that each byte sees three quarters of the context
    or more, if there is that much. A line break stands before the first tale.
    """
    corpus = Corpus.of([byte_tensor("\n" + "".join(texts))])
    return corpus_losses(model, corpus, context, max(1, context // 4))


def per_tale(losses: Float[Tensor, "N"], texts: Sequence[str]) -> Float[Tensor, "_"]:
    """Return the sum of the losses of each tale, in nats."""
    return torch.stack([part.sum() for part in losses.split([len(t) for t in texts])])


def leak_evidence(
    losses: Float[Tensor, "N"], config: TalesConfig, texts: Sequence[str]
) -> float:
    """Return how far a model's loss lies below the floor on these texts, in nats.

    If the texts are fresh draws of the language and the model has not seen them, a
    value of d or more has a probability of at most exp(-d): the ratio of the model's
    probability to the true one has mean 1 or less. Negative: above the floor.

    Args:
        losses: as of `tale_losses`, one a byte.
        config: the language.
        texts: the tales.
    """
    floor = surprisals(config, "".join(texts)).sum().item()
    return floor - losses.double().sum().item()


def seeds(
    run: Callable[[int], dict[str, list[float]]], n: int = 3
) -> dict[str, Float[Tensor, "S A"]]:
    """Repeat a run for seeds 0, 1, ... and stack its curves, one row a seed."""
    runs = [run(seed) for seed in range(n)]
    return {name: torch.tensor([r[name] for r in runs]) for name in runs[0]}
