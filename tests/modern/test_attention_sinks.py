"""Weights on the first tokens, and positions counted inside the cache, by loops."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from groundup.modern.attention_sinks import (
    ReindexedAttention,
    farthest,
    first_token_weights,
    reindexed_attention,
)
from groundup.modern.decoder import Attention, Decoder, DecoderConfig
from groundup.modern.rope import rope_tables, rotate
from groundup.modern.variants import swap

SINKS = DecoderConfig(
    n_vocab=40,
    d_model=16,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    tied=False,
    window=5,
    n_sinks=2,
)


def reindexed(model):
    return swap(model, Attention, lambda old: ReindexedAttention.of(old, model.config))


def decoder(config=SINKS, seed=0):
    torch.manual_seed(seed)
    model = Decoder(config).double()
    with torch.no_grad():
        model.head.weight.normal_()
    return model


def streaming_llm(q, k, v, window, n_sinks, theta):
    """The cache of the paper, with a loop: unrotated keys, indices counted anew."""
    n_heads, n_groups = q.shape[1], k.shape[1]
    out = torch.empty_like(q)
    for t in range(q.shape[2]):
        held = [s for s in range(t + 1) if s < n_sinks or t - s < window]
        index = torch.arange(len(held))
        tables = rope_tables(index, q.shape[-1], theta, q.dtype)
        last = rope_tables(index[-1:], q.shape[-1], theta, q.dtype)
        for b in range(q.shape[0]):
            for h in range(n_heads):
                group = h // (n_heads // n_groups)
                keys = rotate(k[b, group, held], *tables)
                scores = keys @ rotate(q[b, h, t : t + 1], *last)[0]
                weights = (scores / q.shape[-1] ** 0.5).softmax(0)
                out[b, h, t] = weights @ v[b, group, held]
    return out


@pytest.mark.parametrize(("window", "n_sinks"), [(5, 2), (1, 1), (4, 0), (30, 3)])
def test_equals_the_loop_of_streaming_llm(window, n_sinks):
    torch.manual_seed(0)
    q = torch.randn(2, 4, 23, 8, dtype=torch.float64)
    k, v = torch.randn(2, 2, 2, 23, 8, dtype=torch.float64)
    tables = rope_tables(torch.arange(23), 8, 1e4, torch.float64)
    found = reindexed_attention(
        rotate(q, *tables), rotate(k, *tables), v, window, n_sinks, 1e4
    )
    expected = streaming_llm(q, k, v, window, n_sinks, 1e4)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_theta_matters():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 12, 8, dtype=torch.float64)
    a, b = (reindexed_attention(q, k, v, 4, 2, theta) for theta in (1e4, 1e5))
    assert (a - b).abs().max() > 1e-3


def test_farthest_by_hand():
    """Two sinks and a window of five: indices 0 to 6."""
    assert farthest(5, 2) == 6
    assert farthest(1, 0) == 0


def test_until_the_cache_is_full_both_are_the_same_function():
    model, ids = decoder(), torch.randint(40, (2, 20))
    with torch.no_grad():
        absolute = model(ids)
        moved = (reindexed(model)(ids) - absolute).abs().amax((0, 2))
    last = farthest(5, 2)
    assert moved[: last + 1].max() < 1e-6
    assert moved[last + 1 :].min() > 1e-3


def test_without_sinks_both_are_the_same_function():
    config = dataclasses.replace(SINKS, n_sinks=0)
    model, ids = decoder(config), torch.randint(40, (2, 20))
    with torch.no_grad():
        absolute = model(ids)
        torch.testing.assert_close(reindexed(model)(ids), absolute, rtol=0, atol=1e-6)


@given(changed=st.integers(0, 19))
def test_a_changed_token_never_moves_the_past(changed):
    model = reindexed(decoder())
    ids = torch.randint(40, (1, 20))
    other = ids.clone()
    other[0, changed] = (ids[0, changed] + 1) % 40
    with torch.no_grad():
        moved = (model(ids) - model(other)).abs().amax(-1)[0]
    assert (moved[:changed] == 0).all()
    assert moved[changed] > 0


def test_gradients_pass():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 7, 4, dtype=torch.float64).unbind(0)
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(
        lambda *x: reindexed_attention(*x, 3, 1, 1e4), inputs
    )


def test_weights_on_the_first_tokens_by_their_sum():
    """Weights on all tokens are 1; on one, the rest of what the others get."""
    model, ids = decoder(), torch.randint(40, (2, 12))
    everything = first_token_weights(model, ids, 12)
    torch.testing.assert_close(everything, torch.ones_like(everything))
    one = first_token_weights(model, ids)
    assert one.shape == (2, 2, 4, 12)
    torch.testing.assert_close(one[..., 0], torch.ones(2, 2, 4))  # none but itself
    assert (one[..., 1:] < 1).all()


def test_no_weight_beyond_the_window():
    model = decoder(dataclasses.replace(SINKS, n_sinks=0))
    found = first_token_weights(model, torch.randint(40, (1, 12)))
    assert (found[..., :5] > 0).all()
    assert (found[..., 5:] == 0).all()


def test_weights_equal_transformers():
    transformers = pytest.importorskip("transformers")
    from groundup.modern.weights import load_hf

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        attn_implementation="eager",
    )
    theirs = transformers.LlamaForCausalLM(config).eval()
    ours = load_hf(theirs, config.to_dict())
    ids = torch.randint(40, (2, 15))
    with torch.no_grad():
        weights = torch.stack(theirs(ids, output_attentions=True).attentions)
    found = first_token_weights(ours, ids, 2)
    torch.testing.assert_close(found, weights[..., :2].sum(-1), rtol=0, atol=1e-5)
