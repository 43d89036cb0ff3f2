"""Duplicates: the same text again, and nearly the same text again.

Here: texts that are equal after normalisation; sets of shingles and their overlap;
MinHash, whose share of equal entries estimates that overlap; the bands that find
similar pairs without looking at all pairs; groups, and what to keep of each. Left out:
duplicated passages inside different texts (suffix arrays), similar meanings.

Sources: Broder (1997) for shingles and minima, Indyk and Motwani (1998) for bands.
The library `datasketch` does the same for large collections; the tests compare. Page:
book/4-scaling/synthetic_data.md.
Axes: `N` texts, `P` hash functions, `M` shingles.
"""

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Float, UInt64

SHINGLE = 3  # words
N_HASHES = 128
# The finaliser of splitmix64 (Steele et al., 2014): mixes all bits of a number.
MIX_1, MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def normalise(text: str) -> str:
    """Return text in lower case, words and numbers alone, one space between.

    Example: `normalise("To be, or  NOT to be!")` is `"to be or not to be"`.
    """
    return " ".join(re.findall(r"\w+", text.lower()))


def exact_duplicates(texts: Sequence[str]) -> list[list[int]]:
    """Return the groups of two or more texts that are equal once normalised."""
    groups: dict[bytes, list[int]] = defaultdict(list)
    for index, text in enumerate(texts):
        groups[hashlib.sha256(normalise(text).encode()).digest()].append(index)
    return [group for group in groups.values() if len(group) > 1]


def shingles(text: str, n: int = SHINGLE) -> frozenset[str]:
    """Return the set of n words in a row of the normalised text.

    A text of fewer words is one shingle; an empty one has none.

    Raises:
        ValueError: n is not positive.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1; got {n}")
    words = normalise(text).split()
    n_shingles = max(len(words) - n + 1, min(len(words), 1))
    return frozenset(" ".join(words[i : i + n]) for i in range(n_shingles))


def jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    """Return the share of the union that lies in both; 1 if both are empty."""
    return len(a & b) / len(a | b) if a or b else 1.0


def shingle_hashes(words: Iterable[str]) -> UInt64[np.ndarray, "M"]:
    """Return 64 bits for each shingle: the same in every process, unlike `hash`."""
    digests = b"".join(
        hashlib.blake2b(w.encode(), digest_size=8).digest() for w in sorted(words)
    )
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64)


def minhash(
    words: Iterable[str], n_hashes: int = N_HASHES, seed: int = 0
) -> UInt64[np.ndarray, "P"]:
    """Return the smallest value of each of n_hashes hash functions over a set.

    Hash function k mixes a shingle's 64 bits with the k-th random number. Two sets have
    the same smallest value with a probability that is their Jaccard similarity: all
    members of the union are equally likely to be the smallest, and it is shared if it
    lies in both. An empty set has the largest number everywhere.
    """
    hashes = shingle_hashes(words)
    keys = np.random.default_rng(seed).integers(2**64, size=n_hashes, dtype=np.uint64)
    x = hashes[None, :] ^ keys[:, None]
    x = (x ^ (x >> np.uint64(30))) * MIX_1  # uint64 wraps around
    x = (x ^ (x >> np.uint64(27))) * MIX_2
    x ^= x >> np.uint64(31)
    return x.min(axis=1, initial=np.uint64(2**64 - 1))


def signatures(
    texts: Sequence[str], n: int = SHINGLE, n_hashes: int = N_HASHES, seed: int = 0
) -> UInt64[np.ndarray, "N P"]:
    """Return the minima of the shingles of every text."""
    rows = [minhash(shingles(text, n), n_hashes, seed) for text in texts]
    return np.stack(rows) if rows else np.empty((0, n_hashes), np.uint64)


def estimate(
    a: UInt64[np.ndarray, "*rows P"], b: UInt64[np.ndarray, "*rows P"]
) -> Float[np.ndarray, "*rows"]:
    """Return the share of equal minima: the Jaccard similarity, up to chance.

    Unbiased, with a standard deviation of sqrt(s (1 - s) / P) at similarity s.
    """
    return np.asarray((a == b).mean(axis=-1))


def lsh_probability(
    similarity: Float[np.ndarray, "*shape"] | float, n_bands: int, n_rows: int
) -> Float[np.ndarray, "*shape"]:
    """Return 1 - (1 - s^r)^b: how likely a pair agrees in all rows of some band."""
    return np.asarray(1 - (1 - np.asarray(similarity) ** n_rows) ** n_bands)


def candidate_pairs(
    minima: UInt64[np.ndarray, "N P"], n_bands: int, n_rows: int
) -> set[tuple[int, int]]:
    """Return the pairs (i < j) that agree in all n_rows minima of at least one band.

    Texts are put into one box for each band; only those that share a box are paired.

    Raises:
        ValueError: the bands need more minima than there are.
    """
    if not 0 < n_bands * n_rows <= minima.shape[1]:
        raise ValueError(
            f"n_bands * n_rows must lie in 1..{minima.shape[1]}; "
            f"got {n_bands} * {n_rows}"
        )
    pairs: set[tuple[int, int]] = set()
    for band in range(n_bands):
        boxes: dict[bytes, list[int]] = defaultdict(list)
        columns = minima[:, band * n_rows : (band + 1) * n_rows]
        for index, row in enumerate(np.ascontiguousarray(columns)):
            boxes[row.tobytes()].append(index)
        for box in boxes.values():
            pairs.update((i, j) for k, j in enumerate(box) for i in box[:k])
    return pairs


def best_bands(threshold: float, n_hashes: int = N_HASHES) -> tuple[int, int]:
    """Return (n_bands, n_rows) whose curve is one half closest to threshold.

    Raises:
        ValueError: threshold is not in (0, 1).
    """
    if not 0 < threshold < 1:
        raise ValueError(f"threshold must lie in (0, 1); got {threshold}")

    def middle(n_rows: int) -> float:
        return (1 - 0.5 ** (1 / (n_hashes // n_rows))) ** (1 / n_rows)

    n_rows = min(range(1, n_hashes + 1), key=lambda r: abs(middle(r) - threshold))
    return n_hashes // n_rows, n_rows


def near_duplicates(
    texts: Sequence[str], threshold: float, *, n: int = SHINGLE, seed: int = 0
) -> list[tuple[int, int]]:
    """Return the pairs (i < j) of texts whose shingles overlap by threshold or more.

    Bands propose pairs from somewhat below the threshold on; the exact overlap decides.
    So no pair is wrong, and a few may be missed.

    Raises:
        ValueError: threshold is not in (0, 1).
    """
    bands = best_bands(max(threshold - 0.1, threshold / 2))
    sets = [shingles(text, n) for text in texts]
    proposed = candidate_pairs(signatures(texts, n, seed=seed), *bands)
    return sorted(p for p in proposed if jaccard(*(sets[i] for i in p)) >= threshold)


def kept(n_texts: int, pairs: Iterable[tuple[int, int]]) -> list[int]:
    """Return which texts to keep: of those that are linked by pairs, the first.

    Links pass on: if a is like b and b like c, one of the three is kept.
    """
    leader = list(range(n_texts))

    def find(i: int) -> int:
        while leader[i] != i:
            leader[i] = leader[leader[i]]
            i = leader[i]
        return i

    for i, j in pairs:
        low, high = sorted((find(i), find(j)))
        leader[high] = low
    return [i for i in range(n_texts) if find(i) == i]
