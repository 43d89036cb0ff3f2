"""Windows that count every token once, and intervals that hold what they promise."""

import bz2
import gzip
import lzma

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from groundup.training.batching import Corpus, shakespeare_split
from groundup.training.evaluation import (
    bootstrap_interval,
    compressed_bits,
    corpus_losses,
    covering_windows,
)
from groundup.training.gpt import GPT, GPTConfig

few = settings(max_examples=40, deadline=None)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@st.composite
def corpora(draw):
    """Documents whose tokens are all different, so that each can be told apart."""
    context = draw(st.integers(1, 6))
    lengths = draw(st.lists(st.integers(context + 1, 25), min_size=1, max_size=3))
    starts = torch.tensor([0, *lengths]).cumsum(0)
    documents = [
        torch.arange(a, a + n) for a, n in zip(starts.tolist(), lengths, strict=False)
    ]
    return documents, context, draw(st.integers(1, context))


def test_twelve_tokens_by_hand():
    """T = 4: starts 0, 4 and, pushed back, 7, which counts what is left: 9, 10, 11."""
    x, y, counted = covering_windows(Corpus.of([torch.arange(12)]), 4)
    assert x[:, 0].tolist() == [0, 4, 7]
    assert y[counted].tolist() == list(range(1, 12))
    assert counted.tolist()[2] == [False, True, True, True]


@few
@given(case=corpora())
def test_every_token_but_the_first_is_counted_once_and_in_order(case):
    documents, context, stride = case
    x, y, counted = covering_windows(Corpus.of(documents), context, stride)
    expected = torch.cat([d[1:] for d in documents])
    assert torch.equal(y[counted], expected)  # once, in order, none left out
    assert torch.equal(y[:, :-1], x[:, 1:])  # the shift by one


@few
@given(case=corpora())
def test_no_window_crosses_a_border(case):
    documents, context, stride = case
    x, y, _ = covering_windows(Corpus.of(documents), context, stride)
    for inputs, targets in zip(x, y, strict=True):
        whole = torch.cat((inputs[:1], targets))
        assert any(torch.isin(whole, d).all() for d in documents)


@few
@given(case=corpora())
def test_a_stride_is_a_running_start(case):
    """Past the first window each counted token sees at least T - stride before it."""
    documents, context, stride = case
    _, y, counted = covering_windows(Corpus.of(documents), context, stride)
    before = torch.arange(1, context + 1).expand_as(y)
    for document in documents:
        mine = torch.isin(y, document) & counted
        start = document[0]
        late = mine & (y - start > context)
        assert (before[late] > context - stride).all()


def test_full_stride_does_not_overlap_on_the_real_play():
    play = shakespeare_split().validation
    _, y, counted = covering_windows(play, 64)
    assert counted.sum().item() == len(play) - 1
    assert counted[:-1].all()  # only the last window shares tokens with another
    assert len(y) == -(-(len(play) - 1) // 64)
    assert torch.equal(y[counted], play.tokens[1:])


class Copycat(nn.Module):
    """Predicts the token at hand with certainty e / (e + V - 1)."""

    def forward(self, ids):
        return nn.functional.one_hot(ids, 256).float()


def test_losses_stand_in_the_order_of_the_text():
    """A model that repeats: low loss exactly where the text repeats itself."""
    text = torch.tensor([5, 5, 7, 7, 7, 9, 5, 5, 1, 1, 2])
    losses = corpus_losses(Copycat(), Corpus.of([text]), 4)
    repeated = (text[1:] == text[:-1]).tolist()
    assert (losses < losses.mean()).tolist() == repeated


def test_equals_one_pass_over_a_text_of_one_window():
    torch.manual_seed(0)
    model = GPT(GPTConfig(context=16, d_model=16, n_layers=1, n_heads=2))
    text = torch.randint(256, (17,))
    expected = nn.functional.cross_entropy(model(text[None, :-1])[0], text[1:])
    losses = corpus_losses(model, Corpus.of([text]), 16)
    torch.testing.assert_close(losses.mean(), expected)


def test_stride_one_gives_each_token_all_the_context_that_fits():
    torch.manual_seed(0)
    model = GPT(GPTConfig(context=4, d_model=16, n_layers=1, n_heads=2, init_std=0.2))
    text = torch.randint(256, (11,))
    losses = corpus_losses(model, Corpus.of([text]), 4, stride=1)
    with torch.no_grad():
        expected = [
            nn.functional.cross_entropy(
                model(text[None, max(0, t - 4) : t])[0, -1], text[t]
            )
            for t in range(1, 11)
        ]
    torch.testing.assert_close(losses, torch.stack(expected))


def test_the_mode_is_left_as_it_was():
    model = GPT(GPTConfig(context=4, d_model=16, n_layers=1, n_heads=2, dropout=0.5))
    corpus = Corpus.of([torch.arange(30)])
    model.train()
    first = corpus_losses(model, corpus, 4)
    assert model.training
    assert torch.equal(first, corpus_losses(model, corpus, 4))


def test_bootstrap_of_two_blocks_by_enumeration():
    """Blocks with means 0 and 1: a resample has mean 0, 1/2 or 1 with 1/4, 1/2, 1/4."""
    losses = torch.tensor([0.0, 0.0, 1.0, 1.0])
    wide = bootstrap_interval(losses, 2, generator=generator())
    assert (wide.mean, wide.low, wide.high) == (0.5, 0.0, 1.0)
    narrow = bootstrap_interval(losses, 2, generator=generator(), level=0.3)
    assert (narrow.low, narrow.high) == (0.5, 0.5)


def test_a_short_last_block_weighs_by_its_tokens():
    """The mean is that of the tokens; only both blocks together give it exactly."""
    losses = torch.tensor([1.0, 1.0, 1.0, 5.0])
    found = bootstrap_interval(losses, 3, generator=generator())
    assert (found.mean, found.low, found.high) == (2.0, 1.0, 5.0)
    # half of the resamples hold both blocks: (3 + 5) / (3 + 1), not (1 + 5) / 2
    middle = bootstrap_interval(losses, 3, generator=generator(), level=0.3)
    assert (middle.low, middle.high) == (2.0, 2.0)


def test_width_of_independent_losses_is_that_of_the_normal_law():
    losses = torch.randn(4000, generator=generator())
    found = bootstrap_interval(losses, 1, generator=generator(1), n_resamples=4000)
    expected = 2 * 1.96 * losses.std().item() / 4000**0.5
    assert abs(found.width / expected - 1) < 0.08  # five sigma of 4,000 resamples


def coverage(block, n_texts=300):
    """Scenes of 16 tokens with their own mean; the true mean is 0."""
    g = generator(block)
    held = 0
    for _ in range(n_texts):
        scenes = torch.randn(80, 1, generator=g) / 2
        losses = (scenes + torch.randn(80, 16, generator=g)).flatten()
        found = bootstrap_interval(losses, block, generator=g, n_resamples=200)
        held += found.low <= 0 <= found.high
    return held / n_texts


def test_blocks_as_long_as_the_correlation_hold_the_truth():
    """Expected 0.94 (80 blocks): below 0.87 once in 10⁶ runs, as binomial."""
    assert coverage(16) > 0.87


def test_tokens_taken_as_independent_do_not():
    """Expected 0.67: the interval is sqrt(1 + 15 / 5) = 2 times too narrow."""
    assert 0.53 < coverage(1) < 0.81  # five sigma


def test_overlapping_windows_narrow_the_interval():
    """Each token counted four times looks like four times the text."""
    losses = torch.randn(6400, generator=generator())
    once = losses.view(-1, 16).mean(1)
    overlapping = losses.unfold(0, 16, 4).mean(1)
    honest = bootstrap_interval(once, 1, generator=generator())
    false = bootstrap_interval(overlapping, 1, generator=generator())
    assert 1.6 < honest.width / false.width < 2.5


def test_scaled_interval():
    found = bootstrap_interval(torch.arange(8.0), 1, generator=generator()).scaled(2.0)
    assert found.mean == 7.0
    assert found.low < 7 < found.high
    assert found.width == found.high - found.low


def test_compressed_sizes_are_those_of_the_standard_formats():
    """Each library's own file format, whose frames differ by a few bytes."""
    text = bytes(shakespeare_split().validation.tokens[:20_000].tolist())
    for method, size in (
        ("gzip", len(gzip.compress(text, 9))),
        ("bzip2", len(bz2.compress(text))),
        ("xz", len(lzma.compress(text))),
    ):
        found = compressed_bits(text, method) * len(text) / 8
        assert abs(found - size) <= 16


def test_text_that_was_seen_costs_next_to_nothing_within_the_window():
    text = bytes(torch.randint(256, (8000,), generator=generator()).tolist())
    filler = bytes(torch.randint(256, (40_000,), generator=generator(1)).tolist())
    for method in ("gzip", "xz"):
        assert compressed_bits(text, method) > 7.9  # noise does not compress
        assert compressed_bits(text, method, after=text) < 1
    # 40,000 bytes later gzip has forgotten the text, xz has not
    assert compressed_bits(text, "gzip", after=text + filler) > 7.9
    assert compressed_bits(text, "xz", after=text + filler) < 1


def test_refusals():
    corpus = Corpus.of([torch.arange(9), torch.arange(5)])
    with pytest.raises(ValueError, match=r"stride must lie in 1..context=4; got 5"):
        covering_windows(corpus, 4, 5)
    with pytest.raises(ValueError, match=r"below the shortest document's 5 tokens"):
        covering_windows(corpus, 5)
    with pytest.raises(ValueError, match="losses must hold"):
        bootstrap_interval(torch.tensor([]), 1, generator=generator())
    with pytest.raises(ValueError, match="block must be at least 1; got 0"):
        bootstrap_interval(torch.ones(3), 0, generator=generator())
    with pytest.raises(ValueError, match="level must lie in"):
        bootstrap_interval(torch.ones(3), 1, generator=generator(), level=1.0)
    with pytest.raises(ValueError, match="data must hold"):
        compressed_bits(b"", "gzip")
    with pytest.raises(ValueError, match="method must be one of"):
        compressed_bits(b"a", "zip")
