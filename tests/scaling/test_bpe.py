"""Learning merges: by hand, against rescanning, against the package tokenizers."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from groundup.foundations.shakespeare import plays
from groundup.scaling.bench_bpe import _feeds, hugging_face, their_merges
from groundup.scaling.bpe import (
    N_BYTES,
    TIES,
    count_words,
    learn_by_rescanning,
    learn_merges,
)

# Few letters and short words: ties, runs of one letter and overlaps all the time.
counted = st.dictionaries(
    st.text("aab", min_size=1, max_size=9).map(str.encode),
    st.integers(1, 9),
    max_size=6,
)


def test_by_hand():
    """low x5, lot x2, new x3: lo 7 times, then low 5, then the ties ne and ew, 3.

    Of the pairs (n, e) and (e, w) the greatest is (n, e); `tokenizers` numbers e
    before n and takes (e, w).
    """
    words = {b"low": 5, b"lot": 2, b"new": 3}
    first = [(b"l", b"o"), (b"lo", b"w")]
    assert learn_merges(words, 4) == [*first, (b"n", b"e"), (b"ne", b"w")]
    assert learn_merges(words, 4, ties="huggingface") == [
        *first,
        (b"e", b"w"),
        (b"n", b"ew"),
    ]


def test_a_longer_byte_string_is_greater_than_its_beginning():
    """(a, ab) against (a, a) and (ab, x) against (a, z): bytes decide, then length."""
    key = TIES["greatest"]
    ordered = sorted([b"a", b"ab", b"b", b"\xff", b"\xff\xff", b"aa"], reverse=True)
    assert sorted(ordered, key=lambda token: key(0, token)) == ordered


def test_overlapping_pairs_are_joined_from_the_left():
    """aaaaa holds (a, a) four times and becomes aa aa a."""
    assert learn_merges({b"aaaaa": 1}, 9) == [
        (b"a", b"a"),
        (b"aa", b"aa"),
        (b"aaaa", b"a"),
    ]


@pytest.mark.parametrize("ties", TIES)
@settings(max_examples=150)
@given(words=counted)
def test_counts_kept_up_to_date_are_those_of_a_rescan(ties, words):
    pieces = [word for word, n in words.items() for _ in range(n)]
    expected = learn_by_rescanning(pieces, 30, ties=ties)
    assert learn_merges(words, 30, ties=ties) == expected


@given(words=counted)
def test_no_token_is_made_twice(words):
    made = [a + b for a, b in learn_merges(words, 50)]
    assert len(set(made)) == len(made)


@settings(max_examples=40)
@given(words=counted, n=st.integers(0, 12))
def test_fewer_merges_are_the_beginning_of_more(words, n):
    assert learn_merges(words, n) == learn_merges(words, 20)[:n]


def test_learning_ends_when_every_word_is_one_token():
    assert learn_merges({b"ab": 1, b"c": 4}, 100) == [(b"a", b"b")]
    assert learn_merges({}, 100) == []
    assert learn_merges({b"ab": 1}, 0) == []


def test_same_merges_as_tokenizers_on_all_plays():
    """4,096 entries, merge for merge."""
    documents = list(plays().values())
    ours = learn_merges(
        count_words(documents, "gpt-2"), 4096 - N_BYTES, ties="huggingface"
    )
    assert ours == their_merges(hugging_face(documents, 4096))
    assert len(ours) == 4096 - N_BYTES


@settings(max_examples=60)
@given(texts=st.lists(st.text("abé \n'1字"), max_size=4))
def test_same_merges_as_tokenizers_to_the_last(texts):
    ours = learn_merges(count_words(texts, "gpt-2"), 400, ties="huggingface")
    assert ours == their_merges(hugging_face(texts, 656))


def test_words_are_counted_inside_documents():
    assert count_words(["a b", " b"], "gpt-2") == {b"a": 1, b" b": 2}
    assert count_words([]) == {}


@pytest.mark.parametrize("learn", [learn_merges, learn_by_rescanning])
def test_refusals(learn):
    with pytest.raises(ValueError, match=r"ties must be one of .*'greatest'"):
        learn({b"ab": 1}, 1, ties="random")
    with pytest.raises(ValueError, match="n_merges must not be negative; got -1"):
        learn({b"ab": 1}, -1)


def test_rescanning_by_hand():
    pieces = list(Counter({b"low": 2, b"lot": 1}).elements())
    assert learn_by_rescanning(pieces, 2) == [(b"l", b"o"), (b"lo", b"w")]


def test_the_benchmark_feeds_the_same_text_in_every_size():
    documents = ["a\n\nb" * 5000, "c d"]
    whole = "\n\n".join(documents)
    assert "".join(_feeds(documents, whole)["pieces of 8 KiB"]) == whole
    for name, feed in _feeds(documents, whole).items():
        joined = "".join(feed).replace("\n", "")
        assert joined == whole.replace("\n", ""), name
