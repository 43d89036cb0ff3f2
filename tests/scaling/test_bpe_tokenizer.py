"""Encoding and decoding: by hand, against tiktoken, and what must be refused.

`GROUNDUP_FUZZ=100000 pytest tests/scaling/test_bpe_tokenizer.py -k fuzz` compares
that many random strings with tiktoken; the suite takes 2,000.
"""

import os
import random
import unicodedata

import pytest
import tiktoken
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from groundup.foundations.assets import fetch
from groundup.foundations.shakespeare import plays
from groundup.scaling.bpe import BYTES
from groundup.scaling.bpe_files import QWEN_SPECIAL, from_ranks
from groundup.scaling.bpe_merge import merge, merge_tree
from groundup.scaling.bpe_split import PATTERNS
from groundup.scaling.bpe_tokenizer import END_OF_TEXT, REMEMBERED, BPETokenizer
from groundup.training.byte_level import ByteTokenizer, Tokenizer, require_digest

N_FUZZ = int(os.environ.get("GROUNDUP_FUZZ", "2000"))
SNIPPETS = (
    *("'s", "'LL", "’s", "ſ", "İ", "½", "²", "ⅷ", "٣", "12", "1234567", "e\u0301"),
    *(" ", "  ", "\n", "\n\n", "\r\n", "\t", "   \n", "\u00a0", "\u2028", "\u3000"),
    *(
        "the",
        " The",
        "!",
        "...",
        "😀",
        "👩\u200d👩\u200d👧",
        END_OF_TEXT,
        "\x00",
        "\x1c",
    ),
)
# Scripts, signs and the rest, from which runs of characters are drawn.
BLOCKS = (
    *((0x20, 0x7F), (0, 0x20), (0x80, 0x250), (0x300, 0x530), (0x590, 0x700)),
    *((0x900, 0xE80), (0x1E00, 0x2070), (0x2070, 0x2C00), (0x3000, 0x3100)),
    *((0x4E00, 0x9FFF), (0xAC00, 0xD7A4), (0xE000, 0xF900), (0x1F300, 0x1FB00)),
    *((0, 0xD800), (0xE000, 0x110000)),
)


@pytest.fixture(scope="module")
def learned():
    texts = [plays()["Hamlet"], "Größe, 大きさ, आकार 12 345\n" * 3]
    return BPETokenizer.learn(texts, 1200)


@pytest.fixture(scope="module")
def qwen():
    path = fetch("qwen-vocab") / "qwen.tiktoken"
    return from_ranks(path, "qwen", QWEN_SPECIAL)


def fuzz(rng):
    """A string of snippets, runs of one script and lines of Shakespeare.

    Characters that Python's tables do not know are left out: whether they are
    letters depends on how new the tables of an engine are.
    """
    text = ""
    for _ in range(rng.randrange(12)):
        kind = rng.random()
        if kind < 0.5:
            text += rng.choice(SNIPPETS)
        elif kind < 0.9:
            low, high = rng.choice(BLOCKS)
            text += "".join(
                chr(rng.randrange(low, high)) for _ in range(rng.randrange(7))
            )
        else:
            start = rng.randrange(100_000)
            text += plays()["Hamlet"][start : start + rng.randrange(40)]
    return "".join(c for c in text if unicodedata.category(c) not in ("Cn", "Cs"))


def test_by_hand():
    """l+o, lo+w, then e+r: "lower" is low, er; "lol" is lo, l."""
    merges = [(b"l", b"o"), (b"lo", b"w"), (b"e", b"r")]
    tokenizer = BPETokenizer.of_merges(merges, special=("<end>",))
    assert tokenizer.encode("lower").tolist() == [257, 258]
    assert tokenizer.encode("lol").tolist() == [256, 108]
    assert tokenizer.pieces("lol") == ["lo", "l"]
    assert tokenizer.n_vocab == 260
    assert tokenizer.decode(torch.tensor([257, 258, 259])) == "lower<end>"
    assert merge_tree(b"low", tokenizer.tokens) == ((b"l", b"o"), b"w")


def test_without_merges_it_is_the_byte_tokenizer():
    tokenizer, text = BPETokenizer.of_merges([]), "né 大"
    assert torch.equal(tokenizer.encode(text), ByteTokenizer().encode(text))


@pytest.mark.parametrize("cut", sorted(PATTERNS))
def test_fuzz_equals_tiktoken_given_the_same_ranks(learned, cut):
    ours = BPETokenizer(
        learned.tokens | {END_OF_TEXT.encode(): learned.n_vocab - 1}, cut
    )
    theirs = tiktoken.Encoding(
        cut, pat_str=PATTERNS[cut], mergeable_ranks=ours.tokens, special_tokens={}
    )
    rng = random.Random(cut)
    for _ in range(N_FUZZ):
        text = fuzz(rng)
        ids = ours.encode(text)
        assert ids.tolist() == theirs.encode_ordinary(text), text
        assert ours.decode(ids) == text


def test_fuzz_qwen_equals_tiktoken(qwen):
    theirs = tiktoken.Encoding(
        "qwen",
        pat_str=PATTERNS["qwen"],
        mergeable_ranks=qwen.tokens,
        special_tokens=qwen.special,
    )
    rng = random.Random(0)
    for _ in range(N_FUZZ):
        text = fuzz(rng)
        assert qwen.encode(text).tolist() == theirs.encode_ordinary(text), text
        everything = theirs.encode(text, allowed_special="all")
        assert qwen.encode(text, allow="all").tolist() == everything, text


@given(text=st.text())
def test_any_text_comes_back(learned, text):
    assert learned.decode(learned.encode(text)) == text
    assert learned.decode(learned.encode(text, allow="all")) == text
    if text.isascii():
        assert "".join(learned.pieces(text)) == text


@given(data=st.binary())
def test_any_bytes_decode_as_python_does(learned, data):
    ids = torch.tensor(list(data), dtype=torch.int64)
    assert learned.to_bytes(ids) == data
    assert learned.decode(ids) == data.decode(errors="replace")


def test_a_user_cannot_write_a_special_token(learned):
    text = f"a{END_OF_TEXT}b"
    end = learned.special[END_OF_TEXT]
    assert end not in learned.encode(text).tolist()
    assert learned.encode(text, allow=[END_OF_TEXT]).tolist() == [97, end, 98]
    assert torch.equal(learned.encode(text, allow="all"), torch.tensor([97, end, 98]))
    with pytest.raises(ValueError, match="allow must name special tokens"):
        learned.encode(text, allow=["<|im_start|>"])


@given(text=st.text(st.sampled_from("<|endoftext>a"), max_size=30))
def test_no_text_reaches_the_id_of_a_special_token(learned, text):
    assert learned.special[END_OF_TEXT] not in learned.encode(text).tolist()


def test_of_two_special_names_the_longer_is_found():
    tokenizer = BPETokenizer.of_merges([], special=("<a>", "<a>b"))
    assert tokenizer.encode("<a>b<a>", allow="all").tolist() == [257, 256]


@settings(max_examples=150)
@given(
    word=st.text("ab é", min_size=1, max_size=60).map(str.encode),
    seed=st.integers(0, 9),
)
def test_the_heap_joins_as_the_loop_does(word, seed):
    """Ranks at random, so that no training has made them agree."""
    rng, rank = random.Random(seed), {byte: i for i, byte in enumerate(BYTES)}
    for _ in range(40):
        token = b"".join(rng.choices(list(rank)[97:99] + list(rank)[256:], k=2))
        rank.setdefault(token, len(rank))
    assert merge(word, rank, long=0) == merge(word, rank, long=10**9)


def test_a_word_that_is_a_token_needs_no_merges():
    """abc is in the list, ab and bc are not: tiktoken finds it all the same."""
    rank = {byte: i for i, byte in enumerate(BYTES)} | {b"abc": 256}
    theirs = tiktoken.Encoding(
        "t", pat_str=PATTERNS["gpt-2"], mergeable_ranks=rank, special_tokens={}
    )
    for text in ("abc", " abc", "abcabc"):
        ids = BPETokenizer(rank, "gpt-2").encode(text).tolist()
        assert ids == theirs.encode_ordinary(text)
    assert BPETokenizer(rank, "gpt-2").encode("abc").tolist() == [256]


def test_a_long_word_takes_no_quadratic_time(learned):
    """A million letters without a space in seconds; the loop would take hours."""
    text = "to" * 500_000
    assert learned.decode(learned.encode(text)) == text


def test_every_token_is_its_own_encoding(learned):
    for token, i in learned.tokens.items():
        assert merge(token, learned.tokens) == [i]
        leaves, tree = [], [merge_tree(token, learned.tokens)]
        while tree:
            node = tree.pop()
            leaves.append(node) if isinstance(node, bytes) else tree.extend(node[::-1])
        assert b"".join(leaves) == token


def test_n_vocab_is_what_was_learned():
    small = BPETokenizer.learn(["ab ab"], 5000)
    assert small.n_vocab == 256 + 2 + 1  # ab, " ab" and the end of a text
    assert BPETokenizer.learn(["ab"], 257).n_vocab == 257
    with pytest.raises(ValueError, match="n_vocab must be at least 257"):
        BPETokenizer.learn(["ab"], 256)


def test_the_memory_is_bounded(learned):
    learned._known.update((str(i), []) for i in range(REMEMBERED))
    learned._known["one more"]
    assert len(learned._known) == 1
    learned._known["x" * 1000]
    assert "x" * 1000 not in learned._known


def test_digest_and_protocol(learned):
    assert isinstance(learned, Tokenizer)
    again = BPETokenizer(learned.tokens, "gpt-4", learned.special)
    require_digest(again, learned.digest)
    tokens = list(learned.tokens)
    tokens[-1], tokens[-2] = tokens[-2], tokens[-1]
    for other in (
        BPETokenizer(learned.tokens, "qwen", learned.special),
        BPETokenizer(learned.tokens, "gpt-4", {"<e>": learned.n_vocab - 1}),
        BPETokenizer({t: i for i, t in enumerate(tokens)}, "gpt-4", learned.special),
    ):
        with pytest.raises(ValueError, match="digest"):
            require_digest(other, learned.digest)


def test_refusals(learned):
    with pytest.raises(ValueError, match="half of a pair"):
        learned.encode("\udc80")
    for wrong in (-1, learned.n_vocab):
        with pytest.raises(ValueError, match=rf"ids must be in \[0, .*; got {wrong}"):
            learned.decode(torch.tensor([wrong]))
    with pytest.raises(ValueError, match="no token for the byte 0x62"):
        BPETokenizer({b"a": 0}).encode("ab")
    for tokens, special in (
        ({b"a": 0, b"b": 2}, {}),
        ({b"a": 0}, {"e": 0}),
        ({b"": 0}, {}),
        ({b"a": 0}, {"": 1}),
    ):
        with pytest.raises(ValueError, match="tokens and special must have the ids"):
            BPETokenizer(tokens, special=special)
    with pytest.raises(ValueError, match="token must be in the vocabulary"):
        merge_tree(b"zzzz", learned.tokens)
    assert learned.encode("").tolist() == []
    assert learned.decode(learned.encode("")) == ""
