"""The benchmark of what is learned: its models, and how it reads the curves."""

import math

import pytest

from groundup.modern.bench_loss import (
    RECIPE,
    TUNED,
    Side,
    config_of,
    model_of,
    spread,
    tokens_to,
)


def test_spread_is_mean_and_range_in_bits():
    """ln 2 nats are one bit."""
    bit = 0.6931471805599453
    assert spread([bit, 2 * bit, 3 * bit]) == "2.000 (1.000 to 3.000)"


def test_both_models_are_near_in_size():
    gpt, decoder = (sum(p.numel() for p in model_of(n).parameters()) for n in TUNED)
    assert decoder == pytest.approx(gpt, rel=0.05)


@pytest.mark.parametrize("name", TUNED)
def test_each_has_its_own_recipe_and_a_whole_schedule(name):
    config = config_of(name, 40, seed=2)
    assert {"batch": config.batch, "lr": config.lr} == TUNED[name]
    assert (config.steps, config.warmup, config.lr_end, config.seed) == (40, 4, 0.0, 2)


def test_tokens_to_a_loss_by_hand():
    """The seeds are at 2.0 after 20, 10 and 30 of 30 updates: the median is 20."""
    curves = [
        {10: 2.5, 20: 2.0, 30: 1.9},
        {10: 2.0, 20: 2.1, 30: 1.8},
        {10: 2.6, 20: 2.2, 30: 1.9},
    ]
    side = Side("Decoder", 30, curves, [1.9, 1.8, 1.9])
    each = TUNED["Decoder"]["batch"] * RECIPE.context
    assert side.tokens == 30 * each
    assert tokens_to(2.0, side) == pytest.approx(20 * each)
    assert tokens_to(1.85, side) == math.inf
    assert side.mean == pytest.approx(5.6 / 3)
