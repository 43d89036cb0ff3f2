"""`groundup bench bpe`: training and encoding against `tokenizers` and the textbook.

Here: training against the package `tokenizers`, fed in its fastest way, and against
the algorithm that reads the whole text for each merge; encoding against
`encode_batch`, fed in its fastest way. Ours has one thread and a fresh memory, theirs
two threads. Left out: other texts; real vocabularies.
"""

import json
import time
from collections.abc import Callable
from statistics import median
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from groundup.bench import Claim, register
from groundup.foundations.shakespeare import plays, text
from groundup.scaling.bpe import (
    N_BYTES,
    count_words,
    learn_by_rescanning,
    learn_merges,
)
from groundup.scaling.bpe_files import from_stand_ins
from groundup.scaling.bpe_split import Splitter
from groundup.scaling.bpe_tokenizer import BPETokenizer

N_VOCAB, SMALL_VOCAB, SMALL_BYTES = 4096, 1024, 100_000
TRAIN_TARGET, RESCAN_TARGET, ENCODE_TARGET = 0.4, 100.0, 1.2
CUT = "gpt-2"  # the one that `tokenizers` has built in, and so its fastest


@register("bpe")
def bpe(quick: bool) -> list[Claim]:
    """Time in interleaved rounds: 5, or 1 on a tenth of the text.

    Raises:
        AssertionError: merges or ids differ from those of the reference.
    """
    documents = list(plays().values())[: 4 if quick else None]
    whole, rounds = text()[: sum(map(len, documents))], 1 if quick else 5
    train = _train(documents, whole, rounds)
    rescan = _rescan(whole[: SMALL_BYTES // 10 if quick else SMALL_BYTES])
    encode = _encode(documents, whole, rounds)
    return [train, rescan, encode]


def hugging_face(feed: list[str], n_vocab: int) -> Tokenizer:
    """Return a tokenizer that the package `tokenizers` has trained on feed."""
    theirs = Tokenizer(models.BPE())
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=n_vocab,
        special_tokens=[],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    theirs.train_from_iterator(feed, trainer)
    return theirs


def their_merges(theirs: Tokenizer) -> list[tuple[bytes, bytes]]:
    """Return the merges of a byte-level tokenizer of `tokenizers` as bytes."""
    merges = json.loads(theirs.to_str())["model"]["merges"]
    return [(from_stand_ins(a), from_stand_ins(b)) for a, b in merges]


def _train(documents: list[str], whole: str, rounds: int) -> Claim:
    def ours() -> list[tuple[bytes, bytes]]:
        words = count_words(documents, CUT)
        return learn_merges(words, N_VOCAB - N_BYTES, ties="huggingface")

    merges, theirs = ours(), hugging_face(documents, N_VOCAB)
    assert merges == their_merges(theirs), "merges differ from those of tokenizers"
    forms = {"ours": ours} | {
        f"tokenizers, {name}": lambda feed=feed: hugging_face(feed, N_VOCAB)
        for name, feed in _feeds(documents, whole).items()
    }
    took = _rounds(forms, rounds)
    _print(f"training to {N_VOCAB:,} entries", took, len(whole))
    mine = took.pop("ours")
    best = min(took, key=took.__getitem__)
    detail = f"{mine:.2f} against {took[best]:.2f} s ({best})"
    return Claim("train-vs-tokenizers", took[best] / mine, TRAIN_TARGET, detail)


def _rescan(part: str) -> Claim:
    """Both from text to merges; the slow one once, the fast one 5 times."""
    n_merges = SMALL_VOCAB - N_BYTES

    def fast() -> list[tuple[bytes, bytes]]:
        return learn_merges(count_words([part], CUT), n_merges)

    def slow() -> list[tuple[bytes, bytes]]:
        return learn_by_rescanning(map(str.encode, Splitter(CUT)(part)), n_merges)

    seconds, merges = _timed(slow)
    assert merges == fast(), "the two ways learn other merges"
    mine = median(_timed(fast)[0] for _ in range(5))
    took = {"ours": mine, "rescanning": seconds}
    _print(f"training to {SMALL_VOCAB:,} entries", took, len(part))
    detail = f"{1e3 * mine:.0f} ms against {seconds:.1f} s"
    return Claim("train-vs-rescanning", seconds / mine, RESCAN_TARGET, detail)


def _encode(documents: list[str], whole: str, rounds: int) -> Claim:
    words = count_words(documents, CUT)
    merges = learn_merges(words, N_VOCAB - N_BYTES, ties="huggingface")
    ours = BPETokenizer.of_merges(merges, CUT)
    stored = hugging_face(documents, N_VOCAB).to_str()
    theirs = Tokenizer.from_str(stored)
    for document in documents[:3]:
        ids, reference = ours.encode(document), theirs.encode(document)
        mine = [ours.to_bytes(ids[i : i + 1]) for i in range(len(ids))]
        assert mine == list(map(from_stand_ins, reference.tokens)), "tokens differ"
    forms: dict[str, Callable[[], Any]] = {
        "ours": lambda: BPETokenizer(ours.tokens, CUT).encode(whole)
    }
    for name, feed in _feeds(documents, whole).items():
        for method in ("encode_batch", "encode_batch_fast"):
            forms[f"tokenizers, {method}, {name}"] = lambda feed=feed, method=method: (
                getattr(Tokenizer.from_str(stored), method)(feed)
            )
    took = _rounds(forms, rounds)
    _print("encoding", took, len(whole))
    mine = took.pop("ours")
    speed = {name: len(whole) / 1e6 / seconds for name, seconds in took.items()}
    plain = {name: v for name, v in speed.items() if "encode_batch," in name}
    best, fastest = max(plain.values()), max(speed.values())
    rate = len(whole) / 1e6 / mine
    detail = f"{rate:.1f} against {best:.1f} MB/s ({fastest:.1f} without offsets)"
    return Claim("encode-vs-encode_batch", rate / best, ENCODE_TARGET, detail)


def _feeds(documents: list[str], whole: str) -> dict[str, list[str]]:
    """The same text in several sizes of piece: which is fastest is theirs to show."""
    return {"plays": documents, "speeches": whole.split("\n\n")} | {
        f"pieces of {size // 1024} KiB": [
            whole[i : i + size] for i in range(0, len(whole), size)
        ]
        for size in (8 * 1024, 64 * 1024)
    }


def _rounds(forms: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Return the median seconds of each form, in interleaved rounds."""
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(rounds):
        for name, form in forms.items():
            times[name].append(_timed(form)[0])
    return {name: median(seconds) for name, seconds in times.items()}


def _timed(form: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = form()
    return time.perf_counter() - start, result


def _print(what: str, took: dict[str, float], n_bytes: int) -> None:
    print(f"{what}, {n_bytes / 1e6:.2f} MB")
    for name, seconds in took.items():
        print(f"{name:48}{seconds:9.3f} s{n_bytes / 1e6 / seconds:9.2f} MB/s")
