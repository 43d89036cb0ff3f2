"""Counts against what torch counts, times against prices that are known."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from groundup.foundations.environment import saved_bytes
from groundup.modern.decoder import Decoder, DecoderConfig
from groundup.scaling.forecast import (
    TimeLaw,
    fit_time,
    n_parameters,
    update_flops,
    update_memory,
)
from groundup.scaling.ladder import HELD_OUT, SIZES, count_parameters, decoder_config
from groundup.training.adamw import AdamW, decay_groups

configs = st.builds(
    lambda heads, d_head, layers, vocab, d_ff: DecoderConfig(
        n_vocab=vocab,
        d_model=heads * d_head,
        n_layers=layers,
        n_heads=heads,
        d_ff=d_ff,
        tied=False,
    ),
    heads=st.integers(2, 4),
    d_head=st.sampled_from([2, 4, 6]),
    layers=st.integers(1, 3),
    vocab=st.integers(2, 40),
    d_ff=st.integers(1, 30),
)


def step(config, batch, context):
    """A loss as a function of a fresh model, ids and targets."""
    model = Decoder(config)
    x, y = torch.randint(config.n_vocab, (2, batch, context)).unbind()
    x, y = x.clone(), y.clone()
    return model, lambda: F.cross_entropy(model(x).flatten(0, 1), y.flatten())


def test_parameters_by_hand():
    """C = 4, F = 5, V = 3: 48 + 16 + 60 + 8 in the block, 4 at the end; 12 a table."""
    config = DecoderConfig(n_vocab=3, d_model=4, n_layers=1, n_heads=2, d_ff=5)
    assert n_parameters(config) == (132 + 4, 12)


@settings(max_examples=20)
@given(config=configs, tied=st.booleans(), bias=st.booleans())
def test_parameters_are_those_of_the_model(config, tied, bias):
    changed = DecoderConfig(**{**vars(config), "tied": tied, "qkv_bias": bias})
    assert sum(n_parameters(changed)) == sum(
        p.numel() for p in Decoder(changed).parameters()
    )


@pytest.mark.parametrize("size", [*SIZES, HELD_OUT])
def test_parameters_of_the_ladder(size):
    config = decoder_config(size)
    assert n_parameters(config) == count_parameters(Decoder(config))


@settings(max_examples=20)
@given(config=configs, batch=st.integers(1, 3), context=st.integers(2, 9))
def test_flops_are_those_that_torch_counts(config, batch, context):
    """But for attention, a fused kernel: scores and mixture, three times each."""
    _, loss = step(config, batch, context)
    with FlopCounterMode(display=False) as counter:
        loss().backward()
    counts = {op.__name__: n for op, n in counter.get_flop_counts()["Global"].items()}
    products = sum(n for op, n in counts.items() if "attention" not in op)
    heads = 12 * config.n_layers * batch * context**2 * config.d_model
    assert update_flops(config, batch, context) == products + heads


@settings(max_examples=20)
@given(config=configs, batch=st.integers(2, 4), context=st.integers(2, 9))
def test_activations_are_those_that_autograd_keeps(config, batch, context):
    model, loss = step(config, batch, context)
    kept = saved_bytes(loss, model.parameters())
    assert update_memory(config, batch, context)["activations"] == kept


def test_state_is_that_of_the_optimizer():
    config = decoder_config(SIZES[0])
    model, loss = step(config, 2, 8)
    optimizer = AdamW(decay_groups(model, 0.1))
    loss().backward()
    optimizer.step(1e-3)
    counted = {
        "parameters": sum(p.nbytes for p in model.parameters()),
        "gradients": sum(p.grad.nbytes for p in model.parameters()),
        "optimizer": sum(t.nbytes for pair in optimizer.state.values() for t in pair),
    }
    memory = update_memory(config, 2, 8)
    assert {key: memory[key] for key in counted} == counted


@pytest.mark.parametrize(
    "change", [{"tied": True}, {"qkv_bias": True}, {"n_kv_heads": 1}]
)
def test_refuses_a_decoder_that_it_cannot_count(change):
    config = DecoderConfig(**{**vars(decoder_config((16, 1, 2))), **change})
    with pytest.raises(ValueError, match="untied decoder without biases"):
        update_memory(config, 2, 8)


def test_known_prices_are_found():
    true = TimeLaw(per_block=1e-3, per_byte=2e-10, per_flop=1e-11)
    known = [decoder_config(size) for size in SIZES]
    seconds = [true.seconds(config, 16, 64) for config in known]
    found = fit_time(known, seconds, batch=16, context=64)
    assert vars(found) == pytest.approx(vars(true), rel=1e-6)
    larger = decoder_config(HELD_OUT)
    assert found.seconds(larger, 16, 64) == pytest.approx(true.seconds(larger, 16, 64))


def test_no_price_is_negative_and_three_models_are_needed():
    known = [decoder_config(size) for size in SIZES]
    falling = [1 / (1 + i) for i in range(len(known))]
    assert min(vars(fit_time(known, falling, batch=16, context=64)).values()) >= 0
    with pytest.raises(ValueError, match="three models; got 2"):
        fit_time(known[:2], falling[:2], batch=16, context=64)
