"""Cutting text: nothing lost, the same from both engines, the same piece by piece."""

import itertools

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from groundup.scaling.bpe_split import PATTERNS, Splitter

CUTS = sorted(PATTERNS)
# What the patterns look at: contractions, digits, signs, spaces and line breaks.
texts = st.text(
    st.sampled_from("aBsdtrelv'’ \n\r\t12.!é字\u00a0\u3000\x1c½"), max_size=30
)


def test_by_hand():
    """The same line four ways: digits and signs make the difference."""
    line = "I'll pay $1234  now!\n"
    assert Splitter("gpt-2")(line) == [
        *("I", "'ll", " pay", " $", "1234", " ", " now", "!", "\n"),
    ]
    assert Splitter("gpt-4")(line) == [
        *("I", "'ll", " pay", " $", "123", "4", " ", " now", "!\n"),
    ]
    assert Splitter("qwen")(line) == [
        *("I", "'ll", " pay", " $", "1", "2", "3", "4", " ", " now", "!\n"),
    ]
    assert Splitter("smollm")(line) == [
        *("I", "'ll", " pay", " $", "1", "2", "3", "4", " ", " now", "!", "\n"),
    ]


@pytest.mark.parametrize("cut", CUTS)
@settings(max_examples=100)
@given(text=texts | st.text())
def test_nothing_is_lost_and_both_engines_agree(cut, text):
    split = Splitter(cut)
    assert "".join(split(text)) == text
    assert split(text) == regex.findall(PATTERNS[cut], text)
    plain = text.encode("ascii", "ignore").decode()
    assert split(plain) == regex.findall(PATTERNS[cut], plain)


@pytest.mark.parametrize("cut", CUTS)
@settings(max_examples=150)
@given(text=texts, more=texts)
def test_what_is_settled_stays(cut, text, more):
    split = Splitter(cut)
    n = split.settled(text)
    assert split(text[:n]) + split(text[n:] + more) == split(text + more)


@pytest.mark.parametrize("cut", CUTS)
def test_what_is_settled_stays_in_every_short_text(cut):
    """All texts of up to five of the signs that the patterns look ahead for."""
    split = Splitter(cut)
    for length in range(6):
        for text in map("".join, itertools.product("l' \n1", repeat=length)):
            n = split.settled(text)
            first, rest = split(text[:n]), text[n:]
            for more in "l' \n1":
                assert first + split(rest + more) == split(text + more), (text, more)


@pytest.mark.parametrize("cut", CUTS)
def test_something_is_settled_after_enough_text(cut):
    split = Splitter(cut)
    for text in ("to be or not", "a\nb\nc\nd\ne\n", "字。字。字。字。字。", "1a1a1a1a"):
        assert 0 < split.settled(text) < len(text)
    assert split.settled("") == split.settled("a") == split.settled("   ") == 0


@settings(max_examples=200)
@given(text=texts)
def test_one_pattern_cuts_as_the_two_steps_of_smollm(text):
    core = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    expected = [text[a:b] for _, (a, b) in core.pre_tokenize_str(text)]
    assert Splitter("smollm")(text) == expected


def test_half_of_a_surrogate_pair_is_refused():
    with pytest.raises(ValueError, match=r"surrogate U\+D83D at position 3, half"):
        Splitter("gpt-4")("so \ud83d sad")


def test_patterns_of_ones_own():
    assert Splitter(r"(?s).+")("a b\n") == ["a b\n"]
    with pytest.raises(ValueError, match="leaves a part of the text out"):
        Splitter(r"\w+")("a b")
    with pytest.raises(ValueError, match="must not capture groups"):
        Splitter(r"(a)|.")
    with pytest.raises(ValueError, match=r"one of \['gpt-2', .* or a regular"):
        Splitter("(")
    with pytest.raises(ValueError, match="can be applied piece by piece"):
        Splitter(".").settled("abc")
