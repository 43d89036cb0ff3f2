"""Bytes as tokens against Python's codec, and embeddings against autograd."""

import codecs
import math
import unicodedata
from functools import cache

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from groundup.foundations.shakespeare import plays
from groundup.training.byte_level import (
    ARTICLE_1,
    ByteTokenizer,
    Tokenizer,
    contrast,
    cosine_similarity,
    embedding_gradient,
    permuted_contrasts,
    require_digest,
    unfinished,
    utf8,
)

TOKENIZER = ByteTokenizer()
any_text = st.text(st.characters(exclude_categories=["Cs"]))


def test_utf8_equals_pythons():
    """Every character up to 11FFF, every 101st above, and the last."""
    above = [*range(0xE000, 0x12000), *range(0x12000, 0x110000, 101), 0x10FFFF]
    for code_points in (range(0xD800), above):
        ours = bytes(b for c in code_points for b in utf8(c))
        assert ours == "".join(map(chr, code_points)).encode()


def test_utf8_by_hand():
    """é is number 233 = 1110 1001: the last six bits 101001, before them 00011."""
    assert utf8(233) == [0b110_00011, 0b10_101001]


@pytest.mark.parametrize("code_point", [-1, 0xD800, 0xDFFF, 0x110000])
def test_utf8_refuses_what_is_no_character(code_point):
    with pytest.raises(ValueError, match="code_point must be a character"):
        utf8(code_point)


@given(text=any_text)
@example(text="")
@example(text="\x00 \U0010ffff ﷽ e\u0301 é \r\n")
def test_any_text_round_trips(text):
    ids = TOKENIZER.encode(text)
    assert ids.tolist() == list(text.encode())
    assert TOKENIZER.decode(ids) == text
    assert len(ids) == 0 or int(ids.max()) < TOKENIZER.n_vocab


@given(data=st.binary())
def test_any_bytes_round_trip_as_bytes(data):
    ids = torch.tensor(list(data), dtype=torch.int64)
    assert TOKENIZER.to_bytes(ids) == data
    text = TOKENIZER.decode(ids)
    again = TOKENIZER.decode(TOKENIZER.encode(text))
    assert again == text  # what the replacement lost is lost once
    assert ("\ufffd" in text) >= (text.encode() != data)


def test_every_play_round_trips():
    for text in plays().values():
        assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("61 F1 80 80 E1 80 C2 62 80 63 80 BF 64", "a???b?c??d"),
        ("E1 80 E2 F0 91 92 F1 BF 41", "????A"),
    ],
)
def test_replacement_follows_the_unicode_standard(data, expected):
    """The examples of its section 3.9 (versions 6 and 15); ? stands for U+FFFD."""
    ids = torch.tensor(list(bytes.fromhex(data)))
    assert TOKENIZER.decode(ids) == expected.replace("?", "\ufffd")


@given(text=any_text, cut=st.integers(0, 20), context=st.integers(1, 12))
def test_a_window_spoils_at_most_its_two_ends(text, cut, context):
    """A character cut on the left leaves up to 3 marks, one on the right at most 1."""
    data = text.replace("\ufffd", "").encode()
    window = data[cut : cut + context]
    decoded = TOKENIZER.decode(torch.tensor(list(window), dtype=torch.int64))
    assert decoded.strip("\ufffd") in text.replace("\ufffd", "")
    left = decoded[:3].count("\ufffd")
    assert decoded.count("\ufffd") <= left + 1


@cache
def beginnings():
    """Every first part of a character that needs another byte, by enumeration."""
    step = {2: 1, 3: 1, 4: 64}  # of four bytes, the last alone varies within 64
    found = set()
    for start, stop, n in ((0x80, 0x800, 2), (0x800, 0x10000, 3), (65536, 0x110000, 4)):
        for c in range(start, stop, step[n]):
            if not 0xD800 <= c < 0xE000:
                found |= {chr(c).encode()[:k] for k in range(1, n)}
    return found


@settings(max_examples=500)
@given(data=st.binary(max_size=8) | any_text.map(lambda s: s.encode()[:-1]))
@example(data=b"\xf0\x9f\x98")
@example(data=b"\xed\xa0")  # would begin a surrogate: no byte can complete it
@example(data=b"\xe0\x80")  # would be an overlong form
@example(data=b"\xf5")
def test_unfinished_finds_every_beginning_of_a_character(data):
    expected = [n for n in (1, 2, 3) if data[-n:] in beginnings() and n <= len(data)]
    assert unfinished(data) == (expected[0] if expected else 0)


@given(text=any_text)
def test_unfinished_equals_pythons_incremental_decoder(text):
    """Byte by byte, as a generating model writes."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    for n, byte in enumerate(text.encode(), 1):
        decoder.decode(bytes([byte]))
        assert unfinished(text.encode()[:n]) == len(decoder.getstate()[0])


def test_refuses_half_a_surrogate_pair():
    with pytest.raises(ValueError, match="surrogates not allowed"):
        TOKENIZER.encode("\ud83d")


@pytest.mark.parametrize("wrong", [-1, 256])
def test_refuses_ids_that_are_no_bytes(wrong):
    with pytest.raises(ValueError, match=rf"ids must be in \[0, 256\); got {wrong}"):
        TOKENIZER.decode(torch.tensor([65, wrong]))


def test_the_digest_names_the_rule_and_refuses_another():
    assert isinstance(TOKENIZER, Tokenizer)
    # Stored in checkpoints: it must never change.
    assert TOKENIZER.digest.startswith("473f9a4b")
    require_digest(TOKENIZER, ByteTokenizer().digest)

    class Reversed(ByteTokenizer):
        digest = "0" * 64

    with pytest.raises(ValueError, match=r"digest 000000000000… .* got 473f9a4b"):
        require_digest(TOKENIZER, Reversed().digest)


def test_the_sentences_are_one_sentence_each_in_normal_form():
    for text in ARTICLE_1.values():
        assert unicodedata.normalize("NFC", text) == text
        assert not set(text) & set("\n\ufffd")


@given(seed=st.integers(0, 2**31), n=st.integers(0, 12))
def test_gradient_of_the_table_equals_autograds(seed, n):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(6, (n,), generator=generator)
    upstream = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    table = torch.zeros(6, 3, dtype=torch.float64, requires_grad=True)
    F.embedding(ids, table).backward(upstream)
    ours = embedding_gradient(ids, upstream, 6)
    torch.testing.assert_close(ours, table.grad, rtol=1e-12, atol=1e-12)
    unseen = torch.bincount(ids, minlength=6) == 0
    assert (ours[unseen] == 0).all()
    one_hot = F.one_hot(ids, 6).double()
    torch.testing.assert_close(ours, one_hot.T @ upstream, rtol=1e-12, atol=1e-12)


def test_gradient_adds_up_where_a_token_repeats():
    """By hand: token 2 at positions 0 and 2 gets 1 + 4, token 0 gets 2."""
    upstream = torch.tensor([[1.0], [2.0], [4.0]])
    got = embedding_gradient(torch.tensor([2, 0, 2]), upstream, 4)
    assert got.tolist() == [[2.0], [0.0], [5.0], [0.0]]


@given(seed=st.integers(0, 2**31), scale=st.sampled_from([1e-6, 1.0, 1e6]))
def test_cosine_equals_torchs(seed, scale):
    rows = scale * torch.randn(
        5, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    expected = F.cosine_similarity(rows[:, None], rows[None], dim=-1)
    torch.testing.assert_close(cosine_similarity(rows), expected)


def test_cosine_refuses_a_row_without_direction():
    with pytest.raises(ValueError, match="row 1 is"):
        cosine_similarity(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))


def test_contrast_by_hand():
    """Rows at 0, 60, 90 and 150 degrees in pairs: cos 60 inside each pair.

    Across: cos 90 = 0, cos 150, cos 30, cos 90: they cancel to 0.
    """
    angles = torch.tensor([0.0, 60.0, 90.0, 150.0], dtype=torch.float64).deg2rad()
    rows = torch.stack((angles.cos(), angles.sin()), 1)
    got = contrast(cosine_similarity(rows), torch.tensor([0, 0, 1, 1]))
    torch.testing.assert_close(got, torch.full((2,), 0.5, dtype=torch.float64))


@given(seed=st.integers(0, 2**31))
def test_contrast_equals_a_loop_over_pairs(seed):
    generator = torch.Generator().manual_seed(seed)
    similarity = torch.randn(9, 9, generator=generator, dtype=torch.float64)
    similarity = similarity + similarity.T
    groups = torch.tensor([0, 0, 1, 1, 1, 2, 2, 0, 1])
    got = contrast(similarity, groups)
    for g in range(3):
        inside, outside = [], []
        for i in range(9):
            for j in range(9):
                if groups[i] == g and i != j:
                    (inside if groups[j] == g else outside).append(similarity[i, j])
        expected = sum(inside) / len(inside) - sum(outside) / len(outside)
        torch.testing.assert_close(got[g], expected)


def test_permutations_centre_on_zero_and_keep_the_sizes():
    """Mean of 4,000 permutations within 5 sigma: fails once in 1.7 million seeds."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(20, 4, generator=generator, dtype=torch.float64)
    groups = torch.tensor([0] * 5 + [1] * 15)
    found = permuted_contrasts(cosine_similarity(rows), groups, 4000, generator)
    assert found.shape == (4000, 2)
    sigma = found.std(0) / math.sqrt(4000)
    assert (found.mean(0).abs() < 5 * sigma).all()
    assert (found.std(0) > 0).all()


@pytest.mark.parametrize("groups", [[0, 0, 0], [0, 0, 1], [0, 0, 2]])
def test_contrast_refuses_groups_that_cannot_be_compared(groups):
    with pytest.raises(ValueError, match="groups must be two or more"):
        contrast(torch.eye(3), torch.tensor(groups))
