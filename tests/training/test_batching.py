"""Windows by enumeration, splits by partition, leaks against plain Python sets."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from groundup.foundations.fitting import byte_tensor, sample_windows
from groundup.foundations.shakespeare import plays
from groundup.training.batching import (
    PRIOR,
    TEST_PLAYS,
    VALIDATION_PLAYS,
    Corpus,
    copying_losses,
    epoch,
    expected_coverage,
    ngram_hashes,
    shakespeare_split,
    shared_ngrams,
    split_documents,
)

lengths = st.lists(st.integers(1, 12), min_size=1, max_size=5)
small_texts = st.lists(
    st.text("ab", min_size=1, max_size=20).map(byte_tensor), min_size=1, max_size=3
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def marked(sizes):
    """Documents whose tokens tell where they stand: document 2, place 5 is 2005."""
    return Corpus.of([1000 * d + torch.arange(n) for d, n in enumerate(sizes)])


def every_window(sizes, context):
    """All legal inputs, by two loops."""
    return [
        [1000 * d + start + i for i in range(context)]
        for d, n in enumerate(sizes)
        for start in range(n - context)
    ]


@given(sizes=lengths, context=st.integers(1, 6), seed=st.integers(0, 2**31))
def test_windows_lie_inside_a_document_and_targets_follow(sizes, context, seed):
    if not any(n > context for n in sizes):
        with pytest.raises(ValueError, match=f"got {context}"):
            marked(sizes).sample(1, context, seeded(seed))
        return
    x, y = marked(sizes).sample(50, context, seeded(seed))
    assert torch.equal(y, x + 1)
    assert {tuple(row) for row in x.tolist()} <= {
        tuple(row) for row in every_window(sizes, context)
    }


@pytest.mark.parametrize("sizes", [[5, 3, 7, 1], [4], [9, 4, 4], [1, 2, 8]])
def test_every_window_is_reachable_and_equally_likely(sizes):
    """Five sigma over at most 7 windows: one failure in 250,000 correct samplers."""
    n, context = 40_000, 3
    legal = every_window(sizes, context)
    x, y = marked(sizes).sample(n, context, seeded(1))
    counts = Counter(tuple(row) for row in x.tolist())
    assert set(counts) == {tuple(row) for row in legal}
    p = 1 / len(legal)
    sigma = math.sqrt(n * p * (1 - p))
    assert all(abs(count - n * p) <= 5 * sigma for count in counts.values())
    for d, size in enumerate(sizes):  # the last token of a document is a target
        assert (1000 * d + size - 1 in y) == (size > context)
        assert (1000 * d in x) == (size > context)


def test_one_document_is_sampled_as_in_part_1():
    data = torch.arange(40)
    x, y = Corpus.of([data]).sample(20, 6, seeded(3))
    expected = sample_windows(data, batch=20, context=6, generator=seeded(3))
    assert torch.equal(x, expected[0])
    assert torch.equal(y, expected[1])


@given(sizes=lengths, context=st.integers(1, 6))
def test_fixed_windows_cover_each_document_once(sizes, context):
    if not any(n > context for n in sizes):
        return
    x, y = marked(sizes).windows(context)
    expected = [
        [1000 * d + start + i for i in range(context)]
        for d, n in enumerate(sizes)
        for start in range(0, n - context, context)
    ]
    assert x.tolist() == expected
    assert torch.equal(y, x + 1)
    covered = [
        1000 * d + i
        for d, n in enumerate(sizes)
        for i in range(1, (n - 1) // context * context + 1)
    ]
    assert y.flatten().tolist() == covered


@given(batch=st.integers(1, 9), seed=st.integers(0, 2**31))
def test_an_epoch_is_every_fixed_window_once(batch, seed):
    corpus = marked([11, 2, 9])
    x, _ = corpus.windows(2)
    batches = list(epoch(corpus, batch, 2, seeded(seed)))
    assert all(torch.equal(b, a + 1) for a, b in batches)
    assert [len(a) for a, _ in batches[:-1]] == [batch] * (len(batches) - 1)
    drawn = torch.cat([a for a, _ in batches])
    assert torch.equal(drawn[drawn[:, 0].argsort()], x)
    again = torch.cat([a for a, _ in epoch(corpus, batch, 2, seeded(seed))])
    assert torch.equal(again, drawn)


def test_epochs_differ_in_order():
    corpus = marked([200])
    first, second = (
        torch.cat([x for x, _ in epoch(corpus, 8, 2, seeded(s))]) for s in (0, 1)
    )
    assert not torch.equal(first, second)
    assert not torch.equal(first, corpus.windows(2)[0])


@pytest.mark.parametrize("ends", [(), (3,), (2, 2, 5), (0, 5), (3, 5, 6)])
def test_refuses_ends_that_do_not_rise_to_the_end(ends):
    with pytest.raises(ValueError, match="ends must rise from above 0 to 5"):
        Corpus(torch.arange(5), ends)


def test_refuses_empty_documents_contexts_and_batches():
    with pytest.raises(ValueError, match=r"documents must not be empty; got .*2, 0"):
        Corpus.of([torch.arange(2), torch.arange(0)])
    with pytest.raises(ValueError, match="documents must not be empty"):
        Corpus.of([])
    for context in (0, 4):
        with pytest.raises(ValueError, match=f"document's 4 tokens; got {context}"):
            marked([4, 2]).windows(context)
    with pytest.raises(ValueError, match="batch must be at least 1; got 0"):
        next(epoch(marked([4]), 0, 2, seeded()))


def test_split_is_a_partition_by_name():
    documents = {name: name * 3 for name in "abcde"}
    split = split_documents(documents, ["b"], ["d", "a"])
    texts = [bytes(part.tokens.tolist()).decode() for part in split]
    assert texts == ["ccceee", "bbb", "dddaaa"]
    assert split.train.ends == (3, 6)


@pytest.mark.parametrize(
    ("validation", "test", "message"),
    [
        (["x"], ["a"], "must name different documents"),
        (["a"], ["a"], "must name different documents"),
        (["a", "b"], ["c"], "documents must not be empty"),
        ([], ["a"], "documents must not be empty"),
    ],
)
def test_refuses_splits_that_leak_or_leave_nothing(validation, test, message):
    with pytest.raises(ValueError, match=message):
        split_documents(dict.fromkeys("abc", "text"), validation, test)


def test_the_plays_are_split_by_play():
    split, shelf = shakespeare_split(), plays()
    parts = [
        {
            bytes(part.tokens[a:b].tolist()).decode()
            for a, b in zip((0, *part.ends), part.ends, strict=False)
        }
        for part in split
    ]
    assert parts[1] == {shelf[name] for name in VALIDATION_PLAYS}
    assert parts[2] == {shelf[name] for name in TEST_PLAYS}
    assert parts[0] | parts[1] | parts[2] == set(shelf.values())
    assert sum(map(len, parts)) == len(shelf)


def test_coverage_by_hand_and_by_simulation():
    """Two windows, two draws: both seen with probability 1/2, so 3/4 on average."""
    assert expected_coverage(2, 2) == 0.75
    assert expected_coverage(1, 1) == 1
    assert expected_coverage(5, 0) == 0
    assert expected_coverage(10**6, 10**6) == pytest.approx(1 - math.exp(-1), abs=1e-6)
    drawn = torch.randint(50, (4000, 80), generator=seeded())
    seen = torch.nn.functional.one_hot(drawn, 50).amax(1).double().mean(1)
    sigma = (seen.std() / math.sqrt(4000)).item()  # five sigma: one in 1.7 million
    assert abs(seen.mean().item() - expected_coverage(50, 80)) < 5 * sigma


@given(text=st.text("ab", max_size=40), n=st.integers(1, 6))
def test_hashes_are_equal_where_the_n_grams_are(text, n):
    hashes = ngram_hashes(byte_tensor(text), n).tolist()
    grams = [text[i : i + n] for i in range(len(text) - n + 1)]
    assert len(hashes) == len(grams)
    for i, gram in enumerate(grams):
        assert [h == hashes[i] for h in hashes] == [g == gram for g in grams]


@pytest.mark.parametrize("n", [2, 50])
def test_no_collision_in_a_play(n):
    text = plays()["Twelfth Night"]
    hashes = ngram_hashes(byte_tensor(text), n)
    grams = {text[i : i + n] for i in range(len(text) - n + 1)}
    assert len(hashes.unique()) == len(grams)


def test_hashes_stay_inside_a_row():
    rows = torch.randint(3, (4, 7), generator=seeded())
    whole = ngram_hashes(rows, 3)
    assert whole.shape == (4, 5)
    for row, expected in zip(rows, whole, strict=True):
        assert torch.equal(ngram_hashes(row, 3), expected)


@settings(max_examples=60)
@given(train=small_texts, held_out=small_texts, n=st.integers(1, 5))
def test_shared_ngrams_equal_a_set(train, held_out, n):
    def grams(texts):
        return [
            tuple(text[i : i + n].tolist())
            for text in texts
            for i in range(len(text) - n + 1)
        ]

    known, asked = set(grams(train)), grams(held_out)
    if not asked:
        with pytest.raises(ValueError, match=f"n={n} tokens"):
            shared_ngrams(train, held_out, n)
        return
    expected = sum(gram in known for gram in asked) / len(asked)
    assert shared_ngrams(train, held_out, n) == pytest.approx(expected)


@settings(max_examples=60)
@given(
    train=small_texts,
    held_out=small_texts,
    memory=st.integers(1, 4),
    trust=st.floats(0, 0.99),
)
def test_copying_losses_equal_a_dictionary(train, held_out, memory, trust):
    pairs, first = {}, {}
    for text in (t.tolist() for t in train):
        for i in range(memory, len(text)):
            key = text[i - 1], text[i]
            pairs[key] = pairs.get(key, PRIOR) + 1
            first.setdefault(tuple(text[i - memory : i]), text[i])
    if not first:
        with pytest.raises(ValueError, match=f"more than memory={memory} tokens"):
            copying_losses(train, held_out, memory=memory, trust=trust)
        return
    expected = []
    for text in (t.tolist() for t in held_out):
        for i in range(memory, len(text)):
            row = sum(pairs.get((text[i - 1], b), PRIOR) for b in range(256))
            p = pairs.get((text[i - 1], text[i]), PRIOR) / row
            context = tuple(text[i - memory : i])
            if context in first:
                p = (1 - trust) * p + trust * (first[context] == text[i])
            expected.append(-math.log(p))
    got = copying_losses(train, held_out, memory=memory, trust=trust)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64))


def test_the_copying_guesser_is_a_distribution():
    """Its probabilities of the 256 bytes after one context sum to one."""
    train = [byte_tensor("to be or not to be")]
    for context in ("to b", "xxxx", "not "):
        rows = byte_tensor(context).expand(256, -1)
        held_out = torch.cat((rows, torch.arange(256)[:, None]), 1)
        p = (-copying_losses(train, [held_out], memory=4)).exp()
        assert p.sum().item() == pytest.approx(1)


def test_a_copied_text_costs_what_the_trust_leaves():
    text = byte_tensor(plays()["Twelfth Night"][:3000])
    paid = copying_losses([text], [text], memory=30, trust=0.9)
    assert paid.max().item() <= -math.log(0.9)


@pytest.mark.parametrize("trust", [-0.1, 1.0, math.nan])
def test_refuses_a_trust_that_is_no_share(trust):
    with pytest.raises(ValueError, match=r"trust must be in \[0, 1\)"):
        copying_losses([torch.arange(9)], [torch.arange(9)], memory=2, trust=trust)


def test_refuses_n_grams_of_nothing():
    with pytest.raises(ValueError, match="n must be at least 1; got 0"):
        ngram_hashes(torch.arange(3), 0)


def test_shifting_is_the_whole_difference_between_input_and_target():
    """By hand, "To be": after T comes o, after "To" a space."""
    x, y = Corpus.of([byte_tensor("To be")]).windows(4)
    assert bytes(x[0].tolist()) == b"To b"
    assert bytes(y[0].tolist()) == b"o be"
