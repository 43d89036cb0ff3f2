"""Noise, mixtures, curves, and a bound on luck."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from groundup.foundations.fitting import byte_tensor
from groundup.modern.decoder import Decoder, DecoderConfig
from groundup.scaling.recipe import TrainerConfig
from groundup.scaling.schedules import Schedule
from groundup.scaling.story_entropy import expected, surprisals
from groundup.scaling.synthetic_data import (
    Mixture,
    leak_evidence,
    learning_curves,
    noisy_text,
    per_tale,
    seeds,
    shuffled_words,
    tale_losses,
)
from groundup.scaling.tinytales import TalesConfig, tales, text_of
from groundup.scaling.trainer import fit
from groundup.training.batching import Corpus
from groundup.training.loop import window_losses

TINY = DecoderConfig(d_model=8, n_layers=1, n_heads=1, tied=False)


def test_words_are_sorted_by_their_numbers():
    assert shuffled_words("to be or not.\n\n", [3, 1, 2, 0]) == "not. be or to\n\n"
    with pytest.raises(ValueError, match="zip"):
        shuffled_words("to be\n\n", [1])


def test_noise_damages_its_share_and_more_noise_damages_more():
    """Five sigma: one failure in 1.7 million."""
    config, n = TalesConfig(), 400
    clean = [t.text for t in tales(config, n=n)]
    assert noisy_text(config, 0.0, n) == "".join(clean)
    damaged = {}
    for share in (0.3, 0.7, 1.0):
        texts = [t + "\n\n" for t in noisy_text(config, share, n).split("\n\n")[:-1]]
        assert [sorted(t.split()) for t in texts] == [sorted(t.split()) for t in clean]
        damaged[share] = {
            i for i, (a, b) in enumerate(zip(texts, clean, strict=True)) if a != b
        }
        sigma = math.sqrt(n * share * (1 - share))
        assert abs(len(damaged[share]) - n * share) <= 5 * sigma
    assert damaged[0.3] < damaged[0.7] < damaged[1.0]
    for share in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"share must lie in \[0, 1\]"):
            noisy_text(config, share, 1)


def test_a_mixture_draws_each_corpus_by_its_share_and_keeps_targets_shifted():
    """Five sigma: one failure in 1.7 million."""
    ones, twos = Corpus.of([torch.arange(50)]), Corpus.of([1000 + torch.arange(70)])
    mixture = Mixture((ones, twos), (3.0, 1.0))
    x, y = mixture.sample(8000, 4, torch.Generator().manual_seed(0))
    assert torch.equal(y, x + 1)
    share = (x[:, 0] < 1000).double().mean().item()
    assert abs(share - 0.75) < 5 * math.sqrt(0.75 * 0.25 / 8000)
    for corpus in (ones, twos):
        starts = set((corpus.tokens[: len(corpus) - 4]).tolist())
        inside = torch.isin(x[:, 0], corpus.tokens)
        assert set(x[inside, 0].tolist()) == starts
    again, _ = mixture.sample(8000, 4, torch.Generator().manual_seed(0))
    assert torch.equal(again, x)


@pytest.mark.parametrize("shares", [(), (1.0,), (1.0, 0.0), (1.0, -1.0)])
def test_refuses_shares_that_do_not_fit(shares):
    corpus = Corpus.of([torch.arange(9)])
    with pytest.raises(ValueError, match="shares must be"):
        Mixture((corpus, corpus), shares)


def test_curves_are_those_of_the_trainer():
    """Reading on the way changes nothing: the end equals that of `fit`, bit for bit."""
    text = byte_tensor(text_of(TalesConfig(), n=20))
    corpus = Corpus.of([text])
    recipe = TrainerConfig(Schedule(6, warmup=2), batch=2, context=16, seed=4)
    windows = tuple(part[:5] for part in corpus.windows(16))
    torch.manual_seed(0)
    model = Decoder(TINY)
    start = window_losses(model, *windows).mean().item()
    found = learning_curves(model, corpus, recipe, {"a": windows}, (0, 3, 6, 9))
    torch.manual_seed(0)
    other = Decoder(TINY)
    fit(other, corpus, recipe)
    assert found["a"][0] == start
    assert found["a"][-1] == window_losses(other, *windows).mean().item()
    assert len(found["a"]) == 3


def test_seeds_are_stacked():
    found = seeds(lambda seed: {"a": [seed, 2.0 * seed]}, n=3)
    assert found["a"].tolist() == [[0, 0], [1, 2], [2, 4]]


class Uniform(nn.Module):
    """Gives every byte the same probability."""

    def forward(self, ids):
        return torch.zeros(*ids.shape, 256)


class Recites(nn.Module):
    """Knows one text by heart and writes it, whatever it is given."""

    def __init__(self, text):
        super().__init__()
        self.text = text.encode()

    def forward(self, ids):
        logits = torch.zeros(*ids.shape, 256)
        for row, window in zip(logits, ids.tolist(), strict=True):
            at = self.text.find(bytes(window))
            follows = byte_tensor(self.text[at + 1 : at + 1 + len(window)].decode())
            row[torch.arange(len(follows)), follows] = 20.0
        return logits


def test_losses_are_one_a_byte_in_the_order_of_the_tales():
    config = TalesConfig(domains=("sums",), difficulty=3)
    texts = [t.text for t in tales(config, n=8)]
    losses = tale_losses(Uniform(), texts, 16)
    assert len(losses) == len("".join(texts))
    torch.testing.assert_close(losses, torch.full_like(losses, math.log(256)))
    found = per_tale(losses, texts)
    expected_ = torch.tensor([len(t) * math.log(256) for t in texts])
    torch.testing.assert_close(found, expected_)


def test_a_model_that_has_read_the_text_gives_itself_away():
    config = TalesConfig(domains=("sums",), difficulty=3)
    texts = [t.text for t in tales(config, "validation", 10)]
    losses = tale_losses(Recites("\n" + "".join(texts)), texts, 16)
    evidence = leak_evidence(losses, config, texts)
    assert evidence == pytest.approx(10 * expected(config).nats, abs=0.1)
    assert leak_evidence(tale_losses(Uniform(), texts, 16), config, texts) < -500


def test_the_truth_has_no_evidence_against_it():
    config = TalesConfig()
    texts = [t.text for t in tales(config, n=5)]
    losses = surprisals(config, "".join(texts))
    assert leak_evidence(losses, config, texts) == pytest.approx(0, abs=1e-9)


@settings(max_examples=20)
@given(seed=st.integers(0, 2**20), d=st.floats(0.1, 2.0))
def test_luck_is_bounded(seed, d):
    """P(ln q/p >= d) <= exp(-d), by exact sums over a random pair of distributions."""
    rng = np.random.default_rng(seed)
    p, q = rng.dirichlet(np.full(30, 0.3), size=2) + 1e-12
    lucky = p[np.log(q / p) >= d].sum()
    assert lucky <= math.exp(-d) * 1.0001
