"""Byte-pair encoding: a vocabulary learned by joining the most frequent pair.

Here: counting pre-tokens, learning merges with counts that are kept up to date, two
rules for ties, and the rescanning algorithm that it must agree with. Left out: how
text is cut into pre-tokens (`bpe_split`) and the tokenizer (`bpe_tokenizer`).

Sources: Gage (1994) for the compression; Sennrich et al. (2016), algorithm 1, for the
subwords. Page: book/4-scaling/bpe.md. Axes: none of its own.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from heapq import heapify, heappop, heappush
from itertools import chain, pairwise

from groundup.scaling.bpe_split import Splitter

Pair = tuple[int, int]
N_BYTES = 256
BYTES = tuple(bytes([b]) for b in range(N_BYTES))
# GPT-2 writes each byte as a printable character: those that print stand for
# themselves, the others for the characters from 256 on (openai/gpt-2, encoder.py).
PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))
_STAND_IN_ORDER = sorted(range(N_BYTES), key=lambda b: (b not in PRINTABLE, b))


def _greatest(number: int, token: bytes) -> str:
    """A key that falls where byte strings rise; the last sign ranks ends last."""
    return "".join(chr(255 - b) for b in token) + chr(256)


def _hugging_face(number: int, token: bytes) -> int:
    """The number that the package `tokenizers` gives to a token in training."""
    return _STAND_IN_ORDER.index(number) if number < N_BYTES else number


# Of several pairs that are equally frequent, the one with the smallest keys is joined.
TIES: dict[str, Callable[[int, bytes], int | str]] = {
    "greatest": _greatest,  # the greatest pair of byte strings
    "huggingface": _hugging_face,  # the pair whose parts were learned first
}


def count_words(texts: Iterable[str], cut: str = "gpt-4") -> dict[bytes, int]:
    """Return how often each pre-token occurs; no pre-token spans two texts.

    Args:
        texts: documents.
        cut: as of `Splitter`.

    Raises:
        ValueError: a text holds half of a surrogate pair, or cut is unknown.
    """
    split, words = Splitter(cut), Counter()
    for text in texts:
        words.update(split(text))
    return {word.encode(): n for word, n in words.items()}


def learn_merges(
    words: Mapping[bytes, int], n_merges: int, *, ties: str = "greatest"
) -> list[tuple[bytes, bytes]]:
    """Return the merges in the order in which they are learned.

    Each joins the adjacent pair of tokens that is most frequent inside the words.
    There are fewer than n_merges if every word has become one token.

    Args:
        words: pre-tokens and how often each occurs, as of `count_words`.
        n_merges: entries to learn beyond the 256 bytes.
        ties: a key of `TIES`.

    Raises:
        ValueError: ties is unknown, or n_merges negative.

    Example: `learn_merges({b"low": 5, b"lot": 2}, 2)` is
    `[(b"l", b"o"), (b"lo", b"w")]`.
    """
    key = _tie_rule(ties, n_merges)
    tokens = list(BYTES)
    keys = [key(i, token) for i, token in enumerate(tokens)]
    spelled, times = [list(word) for word in words], list(words.values())
    counts, where = _count_pairs(spelled, times)
    # The most frequent pair is on top. An entry is not touched when its count falls:
    # it is put right when it comes up.
    heap = [(-n, keys[a], keys[b], (a, b)) for (a, b), n in counts.items()]
    heapify(heap)
    merges: list[tuple[bytes, bytes]] = []
    while heap and len(merges) < n_merges:
        believed, *order, pair = heappop(heap)
        if counts[pair] != -believed:
            if counts[pair]:
                heappush(heap, (-counts[pair], *order, pair))
            continue
        a, b = pair
        merges.append((tokens[a], tokens[b]))
        new = len(tokens)
        tokens.append(tokens[a] + tokens[b])
        keys.append(key(new, tokens[new]))
        changes: defaultdict[Pair, int] = defaultdict(int)
        for i in where.pop(pair):
            spelled[i] = _join(spelled[i], times[i], pair, new, changes)
            for found in pairwise(spelled[i]):
                if new in found:
                    where[found].add(i)
        for found, change in changes.items():
            counts[found] += change
            if new in found and counts[found]:  # only new pairs become more frequent
                order = keys[found[0]], keys[found[1]]
                heappush(heap, (-counts[found], *order, found))
        del counts[pair]
    return merges


def _join(
    old: list[int], n: int, pair: Pair, new: int, changes: dict[Pair, int]
) -> list[int]:
    """Return a word with pair replaced by new, and enter what that does to counts."""
    a, b = pair
    joined: list[int] = []
    i, last = 0, len(old) - 1
    while i <= last:
        if old[i] != a or i == last or old[i + 1] != b:
            joined.append(old[i])
            i += 1
            continue
        if joined:
            changes[joined[-1], a] -= n
            changes[joined[-1], new] += n
        i += 2
        if i <= last:
            changes[b, old[i]] -= n
            changes[new, old[i]] += n
        joined.append(new)
    return joined


def _count_pairs(
    spelled: Sequence[list[int]], times: Sequence[int]
) -> tuple[dict[Pair, int], dict[Pair, set[int]]]:
    """Return how often each pair occurs, and the words that it occurs in."""
    counts: defaultdict[Pair, int] = defaultdict(int)
    where: defaultdict[Pair, set[int]] = defaultdict(set)
    for i, (word, n) in enumerate(zip(spelled, times, strict=True)):
        for pair in pairwise(word):
            counts[pair] += n
            where[pair].add(i)
    return counts, where


def _tie_rule(ties: str, n_merges: int) -> Callable[[int, bytes], int | str]:
    if ties not in TIES:
        raise ValueError(f"ties must be one of {sorted(TIES)}; got {ties!r}")
    if n_merges < 0:
        raise ValueError(f"n_merges must not be negative; got {n_merges}")
    return TIES[ties]


def learn_by_rescanning(
    pieces: Iterable[bytes], n_merges: int, *, ties: str = "greatest"
) -> list[tuple[bytes, bytes]]:
    """Return the same merges as `learn_merges`, by reading the whole text for each.

    Args:
        pieces: the pre-tokens of the text, repeated as often as they occur.
        n_merges: entries to learn beyond the 256 bytes.
        ties: a key of `TIES`.
    """
    key = _tie_rule(ties, n_merges)
    tokens = list(BYTES)
    text, merges = [list(piece) for piece in pieces], []
    for new in range(N_BYTES, N_BYTES + n_merges):
        counts = Counter(chain.from_iterable(map(pairwise, text)))
        if not counts:
            break
        most = max(counts.values())
        best = [pair for pair, n in counts.items() if n == most]
        a, b = min(best, key=lambda pair: [key(i, tokens[i]) for i in pair])
        merges.append((tokens[a], tokens[b]))
        tokens.append(tokens[a] + tokens[b])
        text = [_replace(piece, (a, b), new) for piece in text]
    return merges


def _replace(old: list[int], pair: Pair, new: int) -> list[int]:
    a, b = pair
    replaced, i, last = [], 0, len(old) - 1
    while i <= last:
        if old[i] == a and i < last and old[i + 1] == b:
            replaced.append(new)
            i += 2
        else:
            replaced.append(old[i])
            i += 1
    return replaced
