"""Counting models against loops over dictionaries and against themselves."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from groundup.foundations.fitting import byte_tensor
from groundup.training.batching import Corpus
from groundup.training.ngram import NGram, Table, fit_ngrams, gram_codes

few = settings(max_examples=25, deadline=None)
letters = st.text(alphabet="ab ", min_size=1, max_size=12)


def loop_probability(texts, history, byte, strengths):
    """The same model with dictionaries and recursion, straight from the formula."""
    p = 1 / 256
    for n in range(1, len(strengths) + 1):
        if len(history) < n - 1:
            break
        context = history[len(history) - n + 1 :]
        followers = Counter(
            t[i + n - 1]
            for t in texts
            for i in range(len(t) - n + 1)
            if t[i : i + n - 1] == context
        )
        k = strengths[n - 1]
        p = (followers[byte] + k * p) / (sum(followers.values()) + k)
    return p


def test_codes_by_hand():
    ids = torch.tensor([1, 2, 3])
    assert gram_codes(ids, 2).tolist() == [258, 515]
    assert gram_codes(ids, 4).tolist() == []
    largest = gram_codes(torch.full((7,), 255), 7)
    assert largest.tolist() == [256**7 - 1]  # no overflow, no sign


def test_a_table_counts_what_it_holds_and_nothing_else():
    table = Table(torch.tensor([3, 9]), torch.tensor([5, 2]))
    assert table.look_up(torch.tensor([9, 3, 0, 4, 10])).tolist() == [2, 5, 0, 0, 0]
    empty = Table(
        torch.tensor([], dtype=torch.long), torch.tensor([], dtype=torch.long)
    )
    assert empty.look_up(torch.tensor([7])).tolist() == [0]


def test_bigram_by_hand():
    """In "aab", a is 2 of 3: p1(a) = (2 + 1/256) / 4. After a: a once, b once."""
    model = NGram.of(Corpus.of([byte_tensor("aab")]), [1.0, 1.0])
    p1 = (2 + 1 / 256) / 4
    p2 = (1 + p1) / (2 + 1)
    losses = model.losses(byte_tensor("aa"))
    expected = torch.tensor([-math.log(p1), -math.log(p2)], dtype=torch.float64)
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=0)


@few
@given(
    texts=st.lists(letters, min_size=1, max_size=3),
    read=st.text(alphabet="abc ", min_size=1, max_size=8),
    strengths=st.lists(st.floats(0.1, 20), min_size=1, max_size=4),
)
def test_equals_a_loop_over_dictionaries(texts, read, strengths):
    model = NGram.of(Corpus.of([byte_tensor(t) for t in texts]), strengths)
    found = model.losses(byte_tensor(read))
    expected = torch.tensor(
        [
            -math.log(loop_probability(texts, read[:i], read[i], strengths))
            for i in range(len(read))
        ],
        dtype=torch.float64,
    )
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@few
@given(
    texts=st.lists(letters, min_size=1, max_size=4),
    history=st.text(alphabet="abc ", max_size=6),
    order=st.integers(1, 5),
)
def test_probabilities_sum_to_one(texts, history, order):
    """Also after the last bytes of a document, which no byte follows."""
    model = NGram.of(Corpus.of([byte_tensor(t) for t in texts]), [0.7] * order)
    for h in (history, texts[0], history + texts[-1]):
        p = model.distribution(byte_tensor(h) if h else torch.tensor([], dtype=int))
        assert p.min() > 0
        torch.testing.assert_close(p.sum().item(), 1.0, rtol=1e-12, atol=0)


def test_losses_and_distribution_agree():
    model = NGram.of(Corpus.of([byte_tensor("to be or not to be")]), [1.0, 2.0, 3.0])
    ids = byte_tensor("to be not")
    losses = model.losses(ids)
    for t in range(len(ids)):
        p = model.distribution(ids[:t])[ids[t]]
        torch.testing.assert_close(losses[t], -p.log())


def test_no_gram_spans_two_documents():
    """ "ab" occurs only across the border; a model of both never saw it."""
    apart = NGram.of(Corpus.of([byte_tensor("xa"), byte_tensor("bx")]), [1.0, 1.0])
    assert apart.grams[1].look_up(gram_codes(byte_tensor("ab"), 2)).item() == 0
    p = apart.distribution(byte_tensor("a"))
    torch.testing.assert_close(p, apart.distribution(torch.tensor([], dtype=int)))


def test_more_context_helps_where_it_decides():
    corpus = Corpus.of([byte_tensor("abcacb" * 200)] * 2)
    # after a comes b or c in turn: only two bytes back tell which
    models = fit_ngrams(corpus, 3)
    losses = [m.losses(byte_tensor("abcacb" * 50)).mean().item() for m in models]
    assert losses[0] > losses[1] + 0.2 > losses[2] + 0.4


def test_strengths_are_chosen_on_the_last_training_document():
    """A text like the rest wants weak smoothing, one of other bytes wants strong."""
    same = Corpus.of([byte_tensor("ab" * 300), byte_tensor("ab" * 300)])
    other = Corpus.of([byte_tensor("ab" * 300), byte_tensor("xyz" * 300)])
    assert fit_ngrams(same, 1)[0].strengths == (0.5,)
    assert fit_ngrams(other, 1)[0].strengths == (64.0,)
    counted = fit_ngrams(other, 1)[0].grams[0]  # and then everything is counted
    assert counted.look_up(byte_tensor("x")).item() == 300


def test_refusals():
    corpus = Corpus.of([byte_tensor("abc")])
    with pytest.raises(ValueError, match=r"order must lie in 1..7; got 8"):
        gram_codes(torch.tensor([1]), 8)
    with pytest.raises(ValueError, match=r"strengths must be positive"):
        NGram.of(corpus, [1.0, 0.0])
    with pytest.raises(ValueError, match=r"at least two documents"):
        fit_ngrams(corpus, 2)
