"""Grammars against enumeration: texts, their choices, and the nearest derivation."""

import math
from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from groundup.scaling.tale_grammar import (
    Choice,
    Computed,
    Grammar,
    Name,
    Option,
    Rule,
    by,
    one_of,
    push,
)

TOY = Grammar(
    {
        "tale": one_of("The <animal> <deed>. Run, {animal}!"),
        "animal": one_of(
            Option("fox", 2, {"animal": "fox"}),
            Option("hen", 1, {"animal": "hen"}),
            Option("owl", 1, {"animal": "owl"}),
        ),
        "deed": by("animal", fox="sat", hen=("sat", "hid"), owl=("flew", "hid")),
    },
    "tale",
)
TEXTS = {  # by hand: 1/2, and four times 1/4 * 1/2
    "The fox sat. Run, fox!": 0.5,
    "The hen sat. Run, hen!": 0.125,
    "The hen hid. Run, hen!": 0.125,
    "The owl flew. Run, owl!": 0.125,
    "The owl hid. Run, owl!": 0.125,
}


def test_the_toy_has_the_texts_and_probabilities_of_the_page():
    for text, p in TEXTS.items():
        (found,) = TOY.derivations(text)
        assert math.exp(found.logp) == pytest.approx(p)
        assert found.plot == {"animal": text[4:7]}


def test_draws_have_these_frequencies():
    """Five sigma for five texts: one failure in 350,000 correct samplers."""
    n, rng = 20_000, Random(0)
    counts = Counter(TOY.sample(rng)[0] for _ in range(n))
    assert set(counts) == set(TEXTS)
    for text, p in TEXTS.items():
        assert abs(counts[text] - n * p) < 5 * math.sqrt(n * p * (1 - p))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "The fox sat.",
        "The fox hid. Run, fox!",
        "The hen sat. Run, owl!",
        "The fox sat. Run, fox! ",
        "the fox sat. Run, fox!",
    ],
)
def test_other_texts_have_no_derivation(text):
    assert TOY.derivations(text) == []


def test_ambiguous_grammars_show_every_derivation():
    """Two ways to write "aab": a + ab and aa + b, of probability 1/4 each."""
    rules = {"s": one_of("<x><y>"), "x": one_of("a", "aa"), "y": one_of("ab", "b")}
    found = Grammar(rules, "s").derivations("aab")
    assert [math.exp(d.logp) for d in found] == pytest.approx([0.25, 0.25])


def test_names_are_bound_before_the_template_and_capitalised_on_demand():
    rules = {"s": one_of(Option("{Who} is {who}.", 1.0, {"who": "she"}))}
    assert Grammar(rules, "s").sample(Random(0)) == ("She is she.", {"who": "she"})


def test_a_part_can_be_written_and_read_under_a_plot():
    text, plot = TOY.sample(Random(0), "deed", {"animal": "fox"})
    assert (text, plot) == ("sat", {"animal": "fox"})
    assert len(TOY.derivations("hid", "deed", {"animal": "owl"})) == 1
    assert TOY.derivations("sat", "deed", {"animal": "owl"}) == []


def test_nearest_names_every_broken_promise():
    slip = TOY.nearest("The hen sat. Run, owl!")
    assert slip.plot == {"animal": "hen"}
    assert slip.faults == ("animal is 'hen'; the text says 'owl'",)
    wrong = TOY.nearest("The fox hid. Run, hen!")
    assert len(wrong.faults) == 2
    assert any("goes on as for" in fault for fault in wrong.faults)


@pytest.mark.parametrize(
    ("text", "reach"),
    [
        ("", 0),
        ("X", 0),
        ("The fox sat", 11),
        ("The cat sat. Run, cat!", 4),
        ("The fox sat. Run, fox! The fox", 22),
    ],
)
def test_nearest_says_how_far_a_text_can_be_followed(text, reach):
    assert TOY.nearest(text) == (None, (), reach)


def test_computed_names_follow_from_the_others_and_are_read_by_their_pattern():
    digits = [Option(str(i), 1.0, {"x": str(i)}) for i in range(1, 4)]
    double = Computed(lambda plot: str(2 * int(plot["x"])), 1.0, r"\d+")
    rules = Grammar(
        {"s": one_of("2 * <x> = {y}."), "x": one_of(*digits)}, "s", {"y": double}
    )
    assert len(rules.derivations("2 * 3 = 6.")) == 1
    assert rules.derivations("2 * 3 = 7.") == []
    assert rules.nearest("2 * 3 = 77.").faults == ("y is '6'; the text says '77'",)


@settings(max_examples=50)
@given(seed=st.integers(0, 2**32), weights=st.lists(st.integers(1, 9), min_size=2))
def test_any_draw_is_read_back_without_a_fault(seed, weights):
    rules = Grammar(
        {
            "s": one_of("<n> <n> <n>, {n}."),
            "n": one_of(
                *(Option(f"<m>{i};", w, {"n": str(i)}) for i, w in enumerate(weights))
            ),
            "m": one_of("", "+"),
        },
        "s",
    )
    text, plot = rules.sample(Random(seed))
    assert [d.plot for d in rules.derivations(text)] == [plot]
    assert rules.nearest(text) == (plot, (), len(text))


def test_refuses_unknown_rules_and_weights_that_are_not_positive():
    with pytest.raises(ValueError, match="there is no rule 'y'"):
        Grammar({"x": one_of("<y>")}, "x")
    for options in ((), (Option("a", 0.0),), (Option("a"), Option("b", -1.0))):
        with pytest.raises(ValueError, match="weights must be positive"):
            Grammar({"x": Rule({"": options})}, "x")


def test_push_puts_the_first_part_on_top():
    assert push(("a", Name("b")), (Choice("c"), None)) == (
        "a",
        (Name("b"), (Choice("c"), None)),
    )
