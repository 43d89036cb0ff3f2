"""One pre-token to tokens: the learned merges, applied in the order of their ranks.

Here: the loop for words, the heap for very long ones, and the tree of merges behind a
token. Left out: cutting text into pre-tokens (`bpe_split`).

Source: Sennrich et al. (2016), section 3.2. Page: book/4-scaling/bpe.md.
"""

from collections.abc import Mapping
from heapq import heapify, heappop, heappush
from itertools import pairwise

from groundup.scaling.bpe import BYTES

Tree = bytes | tuple  # one byte, or the two trees that were joined
# From this length in bytes a heap finds the next merge faster than a look at all.
LONG = 200
NEVER = 1 << 62  # above every rank


def merge(word: bytes, rank: Mapping[bytes, int], *, long: int = LONG) -> list[int]:
    """Return the ids of one pre-token.

    While two neighbours together are a token, those of the lowest rank are joined, the
    leftmost first. A word that is a token is that token.

    Args:
        word: of any length.
        rank: the id of each token.
        long: length in bytes from which a heap is used.

    Raises:
        ValueError: there is no token for one of the bytes.
    """
    if word in rank:
        return [rank[word]]
    parts = [BYTES[b] for b in word]
    parts = _merge_long(parts, rank) if len(parts) >= long else _merge(parts, rank)
    try:
        return [rank[part] for part in parts]
    except KeyError as error:  # what was joined is a token, so this is a byte
        raise ValueError(
            f"this vocabulary has no token for the byte 0x{error.args[0].hex()}, "
            f"met in {word[:40]!r}"
        ) from None


def _merge(parts: list[bytes], rank: Mapping[bytes, int]) -> list[bytes]:
    """Look at all neighbours for each merge: n² steps, and the fastest for words."""
    get = rank.get
    ranks = [get(a + b, NEVER) for a, b in pairwise(parts)]
    while ranks and (best := min(ranks)) < NEVER:
        i = ranks.index(best)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
        del ranks[i]
        if i:
            ranks[i - 1] = get(parts[i - 1] + parts[i], NEVER)
        if i < len(ranks):
            ranks[i] = get(parts[i] + parts[i + 1], NEVER)
    return parts


def _merge_long(parts: list[bytes], rank: Mapping[bytes, int]) -> list[bytes]:
    """The same in n log n steps: a heap of pairs, and links to the neighbours."""
    n = len(parts)
    before, after = list(range(-1, n - 1)), list(range(1, n + 1))
    heap = [
        (rank[a + b], i, len(a + b))
        for i, (a, b) in enumerate(pairwise(parts))
        if a + b in rank
    ]
    heapify(heap)
    while heap:
        _, i, length = heappop(heap)
        right = after[i]
        # Out of date if one of the two has been joined to something else since.
        if not parts[i] or right >= n or len(parts[i]) + len(parts[right]) != length:
            continue
        parts[i], parts[right] = parts[i] + parts[right], b""
        after[i] = after[right]
        if after[i] < n:
            before[after[i]] = i
        for left in (before[i], i):
            if left >= 0 and after[left] < n:
                both = parts[left] + parts[after[left]]
                if both in rank:
                    heappush(heap, (rank[both], left, len(both)))
    return [part for part in parts if part]


def merge_tree(token: bytes, rank: Mapping[bytes, int]) -> Tree:
    """Return the two tokens that were joined to make this one, and so on to the bytes.

    They are what the token falls into when only lower ranks may be joined.

    Raises:
        ValueError: token is none of the vocabulary.

    Example: with the merges (l, o) and (lo, w), `b"low"` is `((b"l", b"o"), b"w")`.
    """
    if token not in rank:
        raise ValueError(f"token must be in the vocabulary; got {token!r}")
    if len(token) == 1:
        return token
    earlier = {t: n for t, n in rank.items() if n < rank[token]}
    left, right = _merge([BYTES[b] for b in token], earlier)
    return merge_tree(left, earlier), merge_tree(right, earlier)
