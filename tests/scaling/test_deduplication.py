"""Duplicates against sets, against datasketch, and against binomial chance."""

import math
import os
import subprocess
import sys
from itertools import combinations
from random import Random

import numpy as np
import pytest
from datasketch import MinHash, MinHashLSH
from hypothesis import given, settings
from hypothesis import strategies as st

from groundup.scaling.deduplication import (
    best_bands,
    candidate_pairs,
    estimate,
    exact_duplicates,
    jaccard,
    kept,
    lsh_probability,
    minhash,
    near_duplicates,
    normalise,
    shingles,
    signatures,
)
from groundup.scaling.tinytales import TalesConfig, tales

TEXTS = [tale.text for tale in tales(TalesConfig(), n=80)]
small_sets = st.frozensets(st.sampled_from("abcdefgh"), max_size=8)


def test_normalising_by_hand():
    assert normalise("To be, or  NOT to be!") == "to be or not to be"
    assert normalise("\n--- !") == ""
    assert normalise("Über 3.5") == "über 3 5"


def test_exact_groups_by_hand():
    texts = ["A b.", "c", "a  B!", "", "C?", "...", "d", "a, b"]
    assert exact_duplicates(texts) == [[0, 2, 7], [1, 4], [3, 5]]
    assert exact_duplicates([]) == []


def test_shingles_by_hand():
    assert shingles("To be or not.", 2) == {"to be", "be or", "or not"}
    assert shingles("To be", 3) == {"to be"}
    assert shingles("...", 3) == frozenset()
    with pytest.raises(ValueError, match="n must be at least 1; got 0"):
        shingles("a", 0)


@given(a=small_sets, b=small_sets)
def test_jaccard_properties(a, b):
    assert jaccard(a, b) == jaccard(b, a)
    assert (jaccard(a, b) == 1) == (a == b)
    both, either = sum(x in b for x in a), len({*a, *b})
    assert jaccard(a, b) == (both / either if either else 1)


@pytest.mark.parametrize(
    ("shared", "own"), [(1, 9), (10, 10), (45, 5), (30, 0), (0, 7)]
)
def test_shared_minima_are_as_frequent_as_the_overlap(shared, own):
    """Each minimum is a coin with P = J. Five sigma: one failure in 350,000 runs."""
    a = frozenset(f"s{i}" for i in range(shared)) | {f"a{i}" for i in range(own)}
    b = frozenset(f"s{i}" for i in range(shared)) | {f"b{i}" for i in range(own)}
    n, true = 20_000, shared / (shared + 2 * own)
    found = float(estimate(minhash(a, n), minhash(b, n)))
    assert abs(found - true) <= 5 * math.sqrt(true * (1 - true) / n)
    assert jaccard(a, b) == pytest.approx(true)


def test_every_member_is_equally_likely_to_be_the_smallest():
    """The reason for the equality: chi-squared over 10 members, far tail 1e-9."""
    members = [f"w{i}" for i in range(10)]
    single = np.stack([minhash([m], 20_000) for m in members])
    first = single.argmin(axis=0)
    assert (minhash(members, 20_000) == single.min(axis=0)).all()
    counts = np.bincount(first, minlength=10)
    assert ((counts - 2000) ** 2 / 2000).sum() < 60


def test_estimates_agree_with_datasketch():
    """Two estimators of one overlap: their difference has sqrt(2 s (1-s) / P)."""
    for a, b in [(0, 1), (2, 3), (4, 4)]:
        sets = [shingles(TEXTS[a], 1), shingles(TEXTS[b], 1)]
        theirs = []
        for words in sets:
            sketch = MinHash(num_perm=4096, seed=3)
            for word in sorted(words):
                sketch.update(word.encode())
            theirs.append(sketch)
        ours = float(estimate(*(minhash(words, 4096) for words in sets)))
        s = jaccard(*sets)
        error = math.sqrt(2 * s * (1 - s) / 4096)
        assert abs(ours - theirs[0].jaccard(theirs[1])) <= 5 * error


def test_bands_propose_the_pairs_that_datasketch_proposes():
    """The same minima in its index give the same candidates."""
    minima = signatures([*TEXTS, *(t.replace("a ", "one ") for t in TEXTS)], n=1)
    minima &= np.uint64(0xFFFFFFFF)  # its values have 32 bits
    n_bands, n_rows = 16, 8
    index = MinHashLSH(num_perm=128, params=(n_bands, n_rows))
    sketches = [MinHash(128, hashvalues=row, scheme="legacy") for row in minima]
    theirs = set()
    for i, sketch in enumerate(sketches):
        theirs |= {(j, i) for j in index.query(sketch)}
        index.insert(i, sketch)
    ours = candidate_pairs(minima, n_bands, n_rows)
    assert ours == theirs
    assert len(ours) > 50


@settings(max_examples=40)
@given(rows=st.lists(st.lists(st.integers(0, 2), min_size=6, max_size=6), max_size=7))
def test_candidates_by_definition(rows):
    minima = np.array(rows, dtype=np.uint64).reshape(-1, 6)
    expected = {
        (i, j)
        for i, j in combinations(range(len(rows)), 2)
        if any(rows[i][k : k + 2] == rows[j][k : k + 2] for k in (0, 2, 4))
    }
    assert candidate_pairs(minima, 3, 2) == expected


def test_the_curve_by_hand_and_by_drawing():
    """s = 1/2, two bands of two: 1 - (3/4)^2 = 7/16. Five sigma over 1,500 seeds."""
    assert lsh_probability(0.5, 2, 2) == pytest.approx(7 / 16)
    assert lsh_probability(0.0, 9, 3) == 0
    assert lsh_probability(1.0, 9, 3) == 1
    n, a, b = 1500, list("ab"), list("bcd")  # J = 1/4; 6 bands of 2
    minima = np.stack(
        [np.stack([minhash(s, 12, seed) for s in (a, b)]) for seed in range(n)]
    )
    found = np.mean([bool(candidate_pairs(m, 6, 2)) for m in minima])
    p = float(lsh_probability(0.25, 6, 2))
    assert abs(found - p) < 5 * math.sqrt(p * (1 - p) / n)


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.8, 0.95])
def test_bands_are_cut_for_their_threshold(threshold):
    n_bands, n_rows = best_bands(threshold)
    assert n_bands * n_rows <= 128
    assert 0.2 < lsh_probability(threshold, n_bands, n_rows) < 0.8


def edited(text, rng, n):
    words = text.split(" ")
    for place in rng.sample(range(len(words)), n):
        words[place] = "else"
    return " ".join(words)


def test_planted_duplicates_are_found():
    rng = Random(0)
    texts = TEXTS + [t.upper() for t in TEXTS[:10]]
    texts += [edited(t, rng, 1) for t in TEXTS[10:40]]
    planted = {(i, 80 + i) for i in range(40)}
    assert exact_duplicates(texts) == [[i, 80 + i] for i in range(10)]
    found = set(near_duplicates(texts, 0.6))
    assert found == planted
    assert kept(len(texts), found) == list(range(80))


def test_no_pair_is_reported_below_the_threshold():
    for threshold in (0.2, 0.4):
        found = near_duplicates(TEXTS, threshold, n=1)
        sets = [shingles(text, 1) for text in TEXTS]
        similar = {
            (i, j)
            for i, j in combinations(range(len(TEXTS)), 2)
            if jaccard(sets[i], sets[j]) >= threshold
        }
        assert set(found) <= similar
        assert len(found) > 0.8 * len(similar)
    assert near_duplicates([], 0.5) == []
    assert near_duplicates(["a"], 0.5) == []


def test_links_pass_on():
    assert kept(6, [(0, 1), (3, 2), (2, 1), (4, 5)]) == [0, 4]
    assert kept(3, []) == [0, 1, 2]
    assert kept(0, []) == []


@settings(max_examples=40)
@given(pairs=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=15))
def test_one_of_each_connected_group_is_kept(pairs):
    groups = [{i} for i in range(10)]
    for i, j in pairs:
        merged = next(g for g in groups if i in g) | next(g for g in groups if j in g)
        groups = [g for g in groups if not g & merged] + [merged]
    assert kept(10, pairs) == sorted(min(group) for group in groups)


def test_minima_are_the_same_in_every_process():
    code = (
        "from groundup.scaling.deduplication import minhash, shingles; "
        "print(minhash(shingles('to be or not to be'), 3).tolist())"
    )
    found = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert found[0] == found[1]
    assert found[0].strip() == str(minhash(shingles("to be or not to be"), 3).tolist())


def test_empty_texts_have_the_largest_minima_and_no_rows_no_signatures():
    assert (minhash([], 4) == np.uint64(2**64 - 1)).all()
    assert signatures([]).shape == (0, 128)
    assert signatures(["", "..."]).shape == (2, 128)


@pytest.mark.parametrize(("n_bands", "n_rows"), [(0, 4), (33, 4), (4, 0), (1, 129)])
def test_refuses_bands_that_do_not_fit(n_bands, n_rows):
    with pytest.raises(ValueError, match=r"n_bands \* n_rows must lie in"):
        candidate_pairs(signatures(TEXTS[:2]), n_bands, n_rows)


@pytest.mark.parametrize("threshold", [0.0, 1.0, -1.0, math.nan])
def test_refuses_thresholds_that_are_no_overlap(threshold):
    with pytest.raises(ValueError, match="threshold must lie in"):
        best_bands(threshold)
