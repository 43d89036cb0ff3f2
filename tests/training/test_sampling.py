"""Sampling against the warpers of transformers, by hand, and by frequency."""

import dataclasses
import math
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from groundup.training.gpt import GPT, GPTConfig
from groundup.training.sampling import (
    GREEDY,
    SamplingConfig,
    apply_temperature,
    filter_logits,
    generate,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    sample,
)

INF = math.inf
SMALL = GPTConfig(n_vocab=13, context=6, d_model=16, n_layers=1, n_heads=2)


def logits_of(*probabilities):
    return torch.tensor(probabilities, dtype=torch.float64).log()


def kept(logits):
    return logits.isfinite().nonzero().flatten().tolist()


def warper(name, *args):
    process = pytest.importorskip("transformers.generation.logits_process")
    return lambda logits: getattr(process, name)(*args)(None, logits)


@cache
def tiny_gpt2():
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 2, "n_embd": 2, "n_layer": 1, "n_head": 1}
    ends = {"bos_token_id": 0, "eos_token_id": 1}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **ends))


def random_logits(seed, kind, n_vocab=40):
    """No ties, but hard: flat, peaked, of huge scale, with tokens forbidden."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, n_vocab, generator=generator, dtype=torch.float64)
    if kind == "flat":
        return x * 1e-3
    if kind == "peaked":
        return x * 30
    if kind == "huge":
        return x * 1e5
    if kind == "forbidden":
        return x.masked_fill(torch.rand(x.shape, generator=generator) < 0.5, -INF)
    return x


kinds = st.sampled_from(["plain", "flat", "peaked", "huge", "forbidden"])
seeds = st.integers(0, 2**31)


@given(seed=seeds, kind=kinds, temperature=st.floats(0.05, 20))
@settings(max_examples=40, deadline=None)
def test_temperature_equals_transformers(seed, kind, temperature):
    x = random_logits(seed, kind)
    ours = apply_temperature(x, temperature)
    theirs = warper("TemperatureLogitsWarper", temperature)(x)
    # ours are shifted so that the highest is 0: the same probabilities
    shifted = theirs - theirs.amax(-1, keepdim=True)
    torch.testing.assert_close(ours, shifted, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ours.softmax(-1), theirs.softmax(-1))


@given(seed=seeds, kind=kinds, k=st.integers(1, 45))
@settings(max_examples=40, deadline=None)
def test_top_k_equals_transformers_without_ties(seed, kind, k):
    x = random_logits(seed, kind)
    assert torch.equal(keep_top_k(x, k), warper("TopKLogitsWarper", k)(x))


@given(seed=seeds, kind=kinds, p=st.floats(0.01, 0.999))
@settings(max_examples=40, deadline=None)
def test_top_p_equals_transformers_without_ties(seed, kind, p):
    x = random_logits(seed, kind)
    assert torch.equal(keep_top_p(x, p), warper("TopPLogitsWarper", p)(x))


@given(seed=seeds, kind=kinds, p=st.floats(0.001, 1.0))
@settings(max_examples=40, deadline=None)
def test_min_p_equals_transformers(seed, kind, p):
    x = random_logits(seed, kind)
    assert torch.equal(keep_min_p(x, p), warper("MinPLogitsWarper", p)(x))


@given(
    seed=seeds,
    kind=kinds,
    temperature=st.floats(0.2, 5),
    k=st.integers(1, 45),
    p=st.floats(0.05, 0.99),
    least=st.floats(0.01, 0.9),
)
@settings(max_examples=40, deadline=None)
def test_all_together_have_the_order_of_transformers(
    seed, kind, temperature, k, p, least
):
    transformers = pytest.importorskip("transformers")
    x = random_logits(seed, kind)
    settings_ = transformers.GenerationConfig(
        do_sample=True, temperature=temperature, top_k=k, top_p=p, min_p=least
    )
    processors = tiny_gpt2()._get_logits_processor(settings_, input_ids_seq_length=1)
    theirs = processors(torch.zeros(3, 1, dtype=torch.long), x)
    ours = filter_logits(x, SamplingConfig(temperature, k, p, least))
    torch.testing.assert_close(ours.softmax(-1), theirs.softmax(-1))
    assert torch.equal(ours.isfinite(), theirs.isfinite())


def test_the_order_matters_by_hand():
    """At temperature 1/2 the odds 4 : 2 : 1 become 16 : 4 : 1.

    Top-p 0.75 then keeps the first alone (16/21 = 0.76). Before the temperature it
    keeps two, since 4/7 = 0.57 is not enough.
    """
    x = logits_of(4 / 7, 2 / 7, 1 / 7)
    assert kept(filter_logits(x, SamplingConfig(0.5, top_p=0.75))) == [0]
    assert kept(apply_temperature(keep_top_p(x, 0.75), 0.5)) == [0, 1]
    # Top-p sees what top-k has left: of 4 : 2, two thirds are in the first.
    assert kept(filter_logits(x, SamplingConfig(top_k=2, top_p=0.6))) == [0]
    assert kept(keep_top_k(keep_top_p(x, 0.6), 2)) == [0, 1]


def test_temperature_by_hand():
    """Odds of 4 to 1 become 4² = 16 to 1 at 1/2, and √4 = 2 to 1 at 2."""
    x = logits_of(0.8, 0.2)
    torch.testing.assert_close(
        apply_temperature(x, 0.5).softmax(-1).log(), logits_of(16 / 17, 1 / 17)
    )
    torch.testing.assert_close(
        apply_temperature(x, 2.0).softmax(-1).log(), logits_of(2 / 3, 1 / 3)
    )


def test_temperature_0_is_argmax_and_the_limit_of_small_ones():
    x = random_logits(0, "plain")
    zero = apply_temperature(x, 0.0).softmax(-1)
    assert torch.equal(zero.argmax(-1), x.argmax(-1))
    assert ((zero == 0) | (zero == 1)).all()
    torch.testing.assert_close(apply_temperature(x, 1e-4).softmax(-1), zero)
    tied = torch.tensor([1.0, 3.0, 3.0])
    assert kept(apply_temperature(tied, 0.0)) == [1]  # the first; the limit is 1/2, 1/2
    assert sample(tied, GREEDY) == 1


def test_top_k_keeps_exactly_k_under_ties_where_transformers_keeps_all():
    tied = torch.tensor([[1.0, 3.0, 3.0, 3.0, 2.0]])
    assert kept(keep_top_k(tied, 2)[0]) == [1, 2]
    assert kept(warper("TopKLogitsWarper", 2)(tied)[0]) == [1, 2, 3]
    assert kept(keep_top_k(torch.zeros(50_000), 7)) == [0, 1, 2, 3, 4, 5, 6]


def test_top_p_by_hand():
    """0.5, 0.25, 0.125, 0.125: sums 0.5, 0.75, 0.875, 1, all exact in binary."""
    x = logits_of(0.125, 0.5, 0.25, 0.125)
    assert kept(keep_top_p(x, 0.4)) == [1]
    assert kept(keep_top_p(x, 0.5)) == [1]  # reached by the first alone
    assert kept(keep_top_p(x, 0.51)) == [1, 2]  # the crossing token stays
    assert kept(keep_top_p(x, 0.75)) == [1, 2]
    assert kept(keep_top_p(x, 0.8)) == [0, 1, 2]  # of the two equal ones the first
    assert kept(keep_top_p(x, 1.0)) == [0, 1, 2, 3]
    # The first has all the mass up to rounding, and 1.0 still means everything.
    assert kept(keep_top_p(torch.tensor([0.0, -50.0, -60.0]), 1.0)) == [0, 1, 2]


@given(seed=seeds, kind=kinds, p=st.floats(0.01, 0.999))
@settings(max_examples=60, deadline=None)
def test_the_nucleus_is_the_smallest_set_that_reaches_p(seed, kind, p):
    x = random_logits(seed, kind)
    probabilities = x.softmax(-1)
    inside = keep_top_p(x, p).isfinite()
    for row, keep in zip(probabilities, inside, strict=True):
        mass, least = row[keep].sum().item(), row[keep].min().item()
        assert mass >= p - 1e-12
        assert mass - least < p + 1e-12  # without its least token it falls short
        assert (row[~keep] <= least).all()


def test_top_p_sums_a_long_tail_even_in_half_precision():
    """100,000 equal tokens and p = 0.9: 90,000 stay.

    In bfloat16 a running sum of 1e-5 stops growing at 0.004 already.
    """
    x = torch.zeros(100_000, dtype=torch.bfloat16)
    assert abs(len(kept(keep_top_p(x, 0.9))) - 90_000) <= 1
    assert len(kept(keep_top_p(x, 1.0))) == 100_000


def test_min_p_by_hand_and_at_its_ends():
    x = logits_of(0.1, 0.6, 0.3)
    assert kept(keep_min_p(x, 0.49)) == [1, 2]
    assert kept(keep_min_p(x, 0.51)) == [1]
    assert kept(keep_min_p(x, 0.1)) == [0, 1, 2]
    assert kept(keep_min_p(torch.tensor([2.0, 2.0, 1.0]), 1.0)) == [0, 1]


@given(
    seed=seeds,
    kind=kinds,
    config=st.builds(
        SamplingConfig,
        temperature=st.one_of(st.just(0.0), st.floats(1e-3, 100)),
        top_k=st.one_of(st.none(), st.integers(1, 50)),
        top_p=st.one_of(st.none(), st.floats(1e-6, 1.0)),
        min_p=st.one_of(st.none(), st.floats(1e-6, 1.0)),
    ),
)
@settings(max_examples=80, deadline=None)
def test_whatever_the_setting_the_best_token_stays_and_no_forbidden_one(
    seed, kind, config
):
    x = random_logits(seed, kind)
    out = filter_logits(x, config)
    best = x.argmax(-1, keepdim=True)
    assert out.gather(-1, best).isfinite().all()
    assert (out[x == -INF] == -INF).all()
    assert not out.softmax(-1).isnan().any()
    drawn = sample(x, config, torch.Generator().manual_seed(seed))
    assert out.gather(-1, drawn[:, None]).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_no_temperature_overflows(dtype):
    x = torch.tensor([60_000.0, 59_000.0, -60_000.0], dtype=dtype)
    for temperature in (1e-30, 1e-3, 1e3):
        probabilities = apply_temperature(x.float(), temperature).softmax(-1)
        assert not probabilities.isnan().any()
        drawn = sample(x, SamplingConfig(temperature, top_p=0.9, min_p=0.1))
        assert drawn in (0, 1)


def test_frequencies_match_the_probabilities():
    """Pearson's chi-square over 200,000 draws; fails by chance once in a million.

    The quantile of 4 degrees of freedom at 1e-6 is 33.38.
    """
    n, x = 200_000, torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5])
    config = SamplingConfig(temperature=1.7)
    drawn = sample(x.expand(n, 5), config, torch.Generator().manual_seed(0))
    counts = torch.bincount(drawn, minlength=5).double()
    expected = n * (x.double() / 1.7).softmax(-1)
    assert ((counts - expected) ** 2 / expected).sum() < 33.38


def test_a_token_outside_the_filters_is_never_drawn():
    x = torch.tensor([0.0, 1.0, 2.0, 3.0]).expand(50_000, 4)
    drawn = sample(x, SamplingConfig(top_k=2), torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == {2, 3}


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_one_token_a_row_for_any_leading_axes(shape):
    """One token has nearly all the mass, another one in each row."""
    rows = torch.arange(math.prod(shape)).view(shape) % 7
    x = 100.0 * nn.functional.one_hot(rows, 7)
    for config in (GREEDY, SamplingConfig()):
        assert torch.equal(sample(x, config), rows)


def test_draws_are_decided_by_the_generator_and_greedy_draws_nothing():
    x = torch.randn(20, 50, generator=torch.Generator().manual_seed(0))
    one, two = (torch.Generator().manual_seed(3) for _ in range(2))
    first = sample(x, SamplingConfig(), one)
    assert torch.equal(first, sample(x, SamplingConfig(), two))
    before = one.get_state()
    assert torch.equal(sample(x, GREEDY, one), x.argmax(-1))
    assert torch.equal(one.get_state(), before)


@pytest.mark.parametrize("bad", [[math.nan, 0.0], [INF, 0.0], [-INF, -INF]])
@pytest.mark.parametrize("config", [GREEDY, SamplingConfig()])
def test_refuses_logits_that_are_no_distribution(bad, config):
    with pytest.raises(ValueError, match="logits must be finite or -inf"):
        sample(torch.tensor([[0.0, 1.0], bad]), config)


def gpt(**changes):
    torch.manual_seed(0)
    return GPT(dataclasses.replace(SMALL, init_std=0.5, **changes))


def test_greedy_generation_equals_a_loop_by_hand():
    """Ten tokens with a context of six: the last six are shown, no more."""
    model = gpt()
    ids = [[1, 2], [3, 4], [5, 6]]
    expected = [list(row) for row in ids]
    for row in expected:
        for _ in range(10):
            row.append(model(torch.tensor([row[-6:]]))[0, -1].argmax().item())
    assert generate(model, torch.tensor(ids), 10, GREEDY).tolist() == expected


class Sum(nn.Module):
    """Predicts the sum of what it is shown, modulo 13; refuses more than six tokens."""

    config = SMALL

    def forward(self, ids):
        assert ids.shape[1] <= 6
        return 10.0 * nn.functional.one_hot(ids.cumsum(1) % 13, 13)


@given(row=st.lists(st.integers(0, 12), min_size=1, max_size=9))
@settings(max_examples=30, deadline=None)
def test_the_model_is_shown_the_last_tokens_of_its_context(row):
    expected = list(row)
    for _ in range(10):
        expected.append(sum(expected[-6:]) % 13)
    assert generate(Sum(), torch.tensor([row]), 10, GREEDY).tolist() == [expected]


def test_generation_equals_transformers_greedy():
    transformers = pytest.importorskip("transformers")
    from groundup.training.gpt import load_gpt2

    config = transformers.GPT2Config(
        vocab_size=13,
        n_positions=24,
        n_embd=16,
        n_layer=1,
        n_head=2,
        initializer_range=0.5,
        bos_token_id=None,
        eos_token_id=None,
    )
    theirs = transformers.GPT2LMHeadModel(config).eval()
    ours = gpt(context=24)
    load_gpt2(ours, theirs.state_dict())
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    expected = theirs.generate(
        ids,
        max_new_tokens=20,
        do_sample=False,
        pad_token_id=0,
        attention_mask=torch.ones_like(ids),
    )
    assert torch.equal(generate(ours, ids, 20, GREEDY), expected)


@pytest.mark.parametrize("training", [True, False])
def test_generation_leaves_the_mode_and_ignores_dropout(training):
    plain, model = gpt(), gpt(dropout=0.5).train(training)
    ids = torch.tensor([[1, 2]])
    found = generate(model, ids, 12, GREEDY)
    assert {m.training for m in model.modules()} == {training}
    assert torch.equal(found, generate(plain, ids, 12, GREEDY))


def test_generation_puts_the_mode_back_after_an_error():
    model = gpt(dropout=0.5)
    with torch.no_grad():
        model.embed.weight.fill_(math.nan)
    with pytest.raises(ValueError, match="logits must be finite"):
        generate(model, torch.tensor([[1]]), 1, GREEDY)
    assert all(m.training for m in model.modules())


def test_training_goes_on_unchanged_after_a_sample():
    """The planted bug of this page: dropout left off, or chance used up."""
    outputs = []
    for sampled in (False, True):
        model = gpt(dropout=0.5)
        if sampled:
            own = torch.Generator().manual_seed(1)
            generate(model, torch.tensor([[1, 2]]), 5, SamplingConfig(), own)
        torch.manual_seed(5)
        outputs.append(model(torch.tensor([[1, 2, 3]])))
    assert torch.equal(*outputs)


def test_generation_makes_no_graph_and_can_add_nothing():
    ids = torch.tensor([[1, 2]])
    assert torch.equal(generate(gpt(), ids, 0, GREEDY), ids)


def test_a_model_without_a_limit_sees_everything():
    class Length(nn.Module):
        """Predicts the number of tokens that it is shown."""

        def forward(self, ids):
            logits = torch.zeros(*ids.shape, 50)
            logits[..., ids.shape[1]] = 1.0
            return logits

    ids = generate(Length(), torch.tensor([[0, 0, 0]]), 20, GREEDY)
    assert ids[0, 3:].tolist() == list(range(3, 23))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SamplingConfig(temperature=-0.1), "temperature must be finite and no"),
        (lambda: SamplingConfig(temperature=math.nan), "temperature must .* got nan"),
        (lambda: SamplingConfig(temperature=INF), "temperature must .* got inf"),
        (lambda: SamplingConfig(top_k=0), "top_k must be at least 1 or None; got 0"),
        (
            lambda: SamplingConfig(top_p=0.0),
            r"top_p must lie in \(0, 1\] or .* got 0.0",
        ),
        (
            lambda: SamplingConfig(top_p=1.1),
            r"top_p must lie in \(0, 1\] or .* got 1.1",
        ),
        (lambda: SamplingConfig(min_p=-0.1), r"min_p must lie in \(0, 1\]"),
        (lambda: apply_temperature(torch.zeros(2), -1.0), "temperature must be finite"),
        (lambda: keep_top_k(torch.zeros(2), 0), "top_k must be at least 1"),
        (lambda: keep_top_p(torch.zeros(2), 0.0), "top_p must lie in"),
        (lambda: keep_min_p(torch.zeros(2), 2.0), "min_p must lie in"),
        (
            lambda: generate(gpt(), torch.zeros(1, 0, dtype=torch.long), 1, GREEDY),
            "prompt_ids must hold at least one token",
        ),
        (
            lambda: generate(gpt(), torch.tensor([[1]]), -1, GREEDY),
            "n_new must not be negative; got -1",
        ),
    ],
)
def test_refusals_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()
