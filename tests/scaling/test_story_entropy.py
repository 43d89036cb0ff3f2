"""Entropy against exhaustive sums, closed forms, and drawing."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from groundup.scaling.story_entropy import (
    expected,
    expected_of,
    log_p,
    surprisals,
)
from groundup.scaling.tale_grammar import Choice, Grammar, Name, Option, by, one_of
from groundup.scaling.tinytales import DOMAINS, TalesConfig, draw, grammar, tales

EVERY = TalesConfig(domains=tuple(DOMAINS), difficulty=(2, 1, 2, 3))


def every_text(rules):
    """All texts of a grammar with their probabilities, by plain recursion."""

    def go(parts, plot):
        if not parts:
            yield "", 1.0
            return
        part, *rest = parts
        if isinstance(part, Choice):
            for option in rules.branch(part.rule, plot)[1]:
                after = {**plot, **option.binds}
                for text, p in go([*option.parts, *rest], after):
                    yield text, p * math.exp(option.logp)
        else:
            word = rules.value(part.name, plot) if isinstance(part, Name) else part
            for text, p in go(rest, plot):
                yield word + text, p

    yield from go([rules.start[0]], {})


@pytest.mark.parametrize(
    ("domain", "difficulty", "n"),
    # 11 * 11 atoms with one variable, 3 operations, 10 first values, 2 to print
    [("sums", 1, 81), ("sums", 2, 8100), ("programs", 2, 10 * 121 * 3 * 2)],
)
def test_small_grammars_by_exhaustion(domain, difficulty, n):
    config = TalesConfig(domains=(domain,), difficulty=difficulty)
    found = dict(every_text(grammar(domain, difficulty)))
    p = np.array(list(found.values()))
    assert len(found) == n
    assert p.sum() == pytest.approx(1)
    exact = expected(config)
    assert exact.nats == pytest.approx(-(p * np.log(p)).sum())
    lengths = np.array([len(text) for text in found])
    assert exact.n_bytes == pytest.approx((p * lengths).sum())
    for text, q in itertools.islice(found.items(), 0, None, 53):
        assert log_p(config, text) == pytest.approx(math.log(q))
    if domain == "sums":
        total = sum(math.exp(log_p(config, text)) for text in found)
        assert total == pytest.approx(1)


def test_the_page_s_two_bits():
    rules = {
        "tale": one_of("The <animal> <deed>. Run, {animal}!"),
        "animal": one_of(
            Option("fox", 2, {"animal": "fox"}),
            Option("hen", 1, {"animal": "hen"}),
            Option("owl", 1, {"animal": "owl"}),
        ),
        "deed": by("animal", fox="sat", hen=("sat", "hid"), owl=("flew", "hid")),
    }
    exact = expected_of(Grammar(rules, "tale"))
    assert exact.nats == pytest.approx(2 * math.log(2))
    # "The fox sat. Run, fox!" has 22 bytes; "flew" is one longer, in 1 of 8
    assert exact.n_bytes == pytest.approx(22 + 1 / 8)


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 5), min_size=2, max_size=4),
    weights=st.lists(st.integers(1, 9), min_size=4, max_size=4),
    data=st.data(),
)
def test_random_grammars_with_memory_by_exhaustion(lengths, weights, data):
    """A name that later choices depend on, and one that is only repeated."""
    keys = [str(i) for i in range(len(lengths))]
    branch = {
        key: tuple(
            Option(word, data.draw(st.integers(1, 4)))
            for word in ("x", "yy", "zzz")[: data.draw(st.integers(1, 3))]
        )
        for key in keys
    }
    rules = Grammar(
        {
            "s": one_of("<free>;<key>;<word>;{free}{Free}", Option("<key>!<word>", 2)),
            "free": one_of(
                Option("{free}", weights[0], {"free": "a"}),
                Option("{free}", weights[1], {"free": "bcd"}),
            ),
            "key": one_of(
                *(
                    Option("k" * n + key, w, {"key": key})
                    for key, n, w in zip(keys, lengths, weights, strict=False)
                )
            ),
            "word": by("key", **branch),
        },
        "s",
    )
    found = list(every_text(rules))
    p = np.array([q for _, q in found])
    exact = expected_of(rules)
    assert exact.nats == pytest.approx(-(p * np.log(p)).sum())
    assert exact.n_bytes == pytest.approx(sum(q * len(t) for t, q in found))


@pytest.mark.parametrize("domain", sorted(DOMAINS))
@pytest.mark.parametrize("difficulty", [1, 2, 3])
def test_drawn_tales_have_the_entropy_and_the_length(domain, difficulty):
    """Five sigma for 24 means: one failure in 70,000 runs of a correct program."""
    config = TalesConfig(domains=(domain,), difficulty=difficulty, seed=3)
    exact, n = expected(config), 400
    texts = [tale.text for tale in tales(config, n=n)]
    for found, mean in (
        ([-log_p(config, text) for text in texts], exact.nats),
        ([len(text) for text in texts], exact.n_bytes),
    ):
        error = np.std(found) / math.sqrt(n)
        assert abs(np.mean(found) - mean) <= 5 * error + 1e-9


@pytest.mark.parametrize("digits", [1, 2, 3, 4, 5])
def test_sums_in_closed_form(digits):
    exact = expected(TalesConfig(domains=("sums",), difficulty=digits))
    assert exact.nats == pytest.approx(2 * math.log(9 * 10 ** (digits - 1)))
    if digits < 4:
        terms = np.arange(10 ** (digits - 1), 10**digits)
        longer = (terms[:, None] + terms >= 10**digits).mean()
        assert exact.n_bytes == pytest.approx(3 * digits + longer + 9)


def test_the_choice_of_the_domain_counts():
    config = TalesConfig(
        domains=("sums", "programs"), difficulty=(2, 3), shares=(3.0, 1.0)
    )
    parts = [
        expected(TalesConfig(domains=(d,), difficulty=level))
        for d, level in config.levels.items()
    ]
    choice = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    exact = expected(config)
    mean = 0.75 * parts[0].nats + 0.25 * parts[1].nats
    assert exact.nats == pytest.approx(choice + mean)
    assert exact.n_bytes == pytest.approx(
        0.75 * parts[0].n_bytes + 0.25 * parts[1].n_bytes
    )
    text = draw(config, 0).text
    alone = TalesConfig(domains=("sums",), difficulty=2)
    assert read_share(config, alone, text) == pytest.approx(0.75)


def read_share(both, alone, text):
    for domain, level in both.levels.items():
        alone = TalesConfig(domains=(domain,), difficulty=level)
        if log_p(alone, text) > -math.inf:
            p = math.exp(log_p(both, text) - log_p(alone, text))
            return p if domain == "sums" else 1 - p
    raise AssertionError


@settings(max_examples=60)
@given(index=st.integers(0, 10**9))
def test_surprisals_of_a_tale_sum_to_its_probability(index):
    text = draw(EVERY, index).text
    found = surprisals(EVERY, text)
    assert len(found) == len(text)
    assert (found >= 0).all()
    assert found.sum().item() == pytest.approx(-log_p(EVERY, text))


def test_surprisals_of_a_row_are_those_of_its_tales():
    texts = [tale.text for tale in tales(EVERY, n=6)]
    whole = surprisals(EVERY, "".join(texts))
    parts = torch.cat([surprisals(EVERY, text) for text in texts])
    torch.testing.assert_close(whole, parts, rtol=0, atol=0)


def test_surprisals_equal_shares_of_all_texts_that_begin_alike():
    """The definition: p(next | before) from all 8,100 sums of two digits."""
    config = TalesConfig(domains=("sums",), difficulty=2)
    every = dict(every_text(grammar("sums", 2)))
    text = "47 + 85 = 132.\n\n"
    for at, found in enumerate(surprisals(config, text).tolist()):
        before = sum(p for t, p in every.items() if t.startswith(text[:at]))
        after = sum(p for t, p in every.items() if t.startswith(text[: at + 1]))
        assert found == pytest.approx(-math.log(after / before), abs=1e-9)


def test_what_is_remembered_is_free():
    """After the choices, nothing: by hand for a sum, 1/9 then 1/10, twice."""
    config = TalesConfig(domains=("sums",), difficulty=2)
    bits = surprisals(config, "47 + 85 = 132.\n\n")
    expected_ = [math.log(9), math.log(10), 0, 0, 0, math.log(9), math.log(10)]
    assert bits.tolist() == pytest.approx(expected_ + [0.0] * 9, abs=1e-9)


@pytest.mark.parametrize(
    "text", ["1 + 1 = 3.\n\n", "1 + 1 = 2.", "1 + 1 = 2.\n", "1 + 1 = 2.\n\nx", "\n\n"]
)
def test_refuses_text_outside_the_language(text):
    config = TalesConfig(domains=("sums",))
    assert log_p(config, text) == -math.inf
    with pytest.raises(ValueError, match=r"text (leaves|must be a row)"):
        surprisals(config, text)


def test_two_equal_ways_to_write_a_text_are_added():
    """ "aab" is a + ab and aa + b, 1/4 each; "ab" and "aaab" have one way."""
    config = TalesConfig()
    rules = {"s": one_of("<x><y>"), "x": one_of("a", "aa"), "y": one_of("ab", "b")}
    found = Grammar(rules, "s").derivations("aab")
    assert sum(math.exp(d.logp) for d in found) == pytest.approx(0.5)
    assert log_p(config, "aab") == -math.inf
