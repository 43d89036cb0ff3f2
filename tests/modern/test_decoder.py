"""The decoder against its own clear form, its promises, and damage that must show.

Equality with transformers' Llama, Mistral and Qwen2 is in `test_weights`.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from groundup.modern.decoder import Decoder, DecoderConfig
from groundup.modern.gqa import grouped_attention_clear
from groundup.modern.kv_cache import KVCache
from groundup.modern.rope import rope_tables, rotate
from groundup.modern.sliding_window import window_mask
from groundup.transformer.block import fuse
from groundup.transformer.multi_head import merge_heads

SMALL = {"n_vocab": 31, "d_model": 24, "n_layers": 2, "n_heads": 3, "n_kv_heads": 1}


def decoder(**changes):
    """Small, in float64, with every parameter at a size that shows."""
    torch.manual_seed(0)
    model = Decoder(DecoderConfig(**{**SMALL, **changes})).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def by_hand(model, ids):
    """Every formula written out once more, with masks and copies in full."""
    config = model.config
    positions = torch.arange(ids.shape[1])
    cos, sin = rope_tables(positions, config.d_head, config.rope_theta, torch.float64)
    mask = window_mask(positions[None], positions[None], config.window, config.n_sinks)

    def norm(x, module):
        return module.weight * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    x = model.embed.weight[ids]
    c, kv, d = config.d_model, config.kv_heads * config.d_head, config.d_head
    for block in model.blocks:
        qkv = F.linear(
            norm(x, block.attention_norm),
            block.attention.qkv.weight,
            block.attention.qkv.bias,
        )
        q, k, v = (
            part.unflatten(-1, (-1, d)).transpose(1, 2)
            for part in qkv.split((c, kv, kv), -1)
        )
        out = grouped_attention_clear(
            rotate(q, cos, sin), rotate(k, cos, sin), v, mask[:, None]
        )
        x = x + merge_heads(out) @ block.attention.proj.weight.T
        gate_up = norm(x, block.feedforward_norm) @ block.feedforward.gate_up.weight.T
        gate, up = gate_up.split(config.width, -1)
        hidden = gate * torch.sigmoid(gate) * up
        x = x + hidden @ block.feedforward.down.weight.T
    return norm(x, model.final_norm) @ model.head.weight.T


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_kv_heads": 3, "qkv_bias": True, "tied": False},
        {"rope_theta": 50.0, "d_ff": 10},
        {"n_heads": 4, "n_kv_heads": 2},
        {"window": 3},
        {"window": 3, "n_sinks": 2},
    ],
)
def test_equals_the_formulas_written_out(changes, fused):
    model = fuse(decoder(**changes), fused)
    ids = torch.randint(31, (2, 11))
    expected = by_hand(model, ids)
    torch.testing.assert_close(model(ids), expected, rtol=1e-9, atol=1e-9)
    expected.square().sum().backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    model(ids).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, wanted[name], rtol=1e-7, atol=1e-7, msg=name
        )


@pytest.mark.parametrize("tied", [True, False])
def test_loss_at_initialisation_is_ln_v(tied):
    torch.manual_seed(0)
    model = Decoder(DecoderConfig(n_vocab=256, tied=tied))
    ids, targets = torch.randint(256, (2, 8, 64))
    loss = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())
    assert abs(loss.item() - math.log(256)) < 0.1


def test_a_stack_of_any_depth_starts_with_a_stream_of_one_size():
    """Branches that write are scaled by 1 / sqrt(2 N): all of them write as one."""
    sizes = []
    for n_layers in (2, 16):
        torch.manual_seed(0)
        model = Decoder(DecoderConfig(n_layers=n_layers, tied=False))
        last = model.stream(torch.randint(256, (4, 32)))[-1]
        sizes.append(last.square().mean().sqrt().item())
    assert sizes[1] == pytest.approx(sizes[0], rel=0.15)
    assert 1 < sizes[0] < 1.5  # the embedding has size 1


@settings(max_examples=25, deadline=None)
@given(
    position=st.integers(0, 11),
    window=st.sampled_from([None, 1, 4]),
    n_sinks=st.integers(0, 2),
    seed=st.integers(0, 2**31),
)
def test_a_changed_token_never_moves_the_past(position, window, n_sinks, seed):
    model = decoder(window=window, n_sinks=n_sinks if window else 0)
    ids = torch.randint(31, (1, 12), generator=torch.Generator().manual_seed(seed))
    changed = ids.clone()
    changed[0, position] = (ids[0, position] + 1) % 31
    moved = (model(ids) != model(changed)).any(-1)[0]
    assert not moved[:position].any()
    assert moved[position]
    if window is None:
        assert moved[position:].all()


def test_a_window_reaches_as_far_as_its_blocks():
    """Two blocks of window 3: token 0 is heard up to 2 (3 - 1) = 4, not at 5."""
    model = decoder(window=3)
    ids = torch.randint(31, (1, 9))
    changed = ids.clone()
    changed[0, 0] = (ids[0, 0] + 1) % 31
    moved = (model(ids) - model(changed)).abs().amax(-1)[0] > 1e-9
    assert moved.tolist() == [True] * 5 + [False] * 4


def test_only_distances_count():
    model = decoder()
    ids = torch.randint(31, (2, 7))
    far = torch.arange(7).expand(2, -1) + torch.tensor([[0], [900]])
    torch.testing.assert_close(model(ids, far), model(ids), rtol=1e-7, atol=1e-7)


def test_padding_is_seen_by_nobody():
    model = decoder()
    ids = torch.randint(31, (1, 5))
    padded = torch.cat((torch.tensor([[9, 9]]), ids), 1)
    positions = torch.tensor([[-1, -1, 0, 1, 2, 3, 4]])
    torch.testing.assert_close(model(padded, positions)[:, 2:], model(ids))


@pytest.mark.parametrize("changes", [{}, {"window": 3, "n_sinks": 1}])
def test_a_cache_in_pieces_gives_the_same_logits(changes):
    model = decoder(**changes)
    ids = torch.randint(31, (2, 12))
    cache = KVCache(model.config, 12, batch=2, dtype=torch.float64)
    with torch.no_grad():
        pieces = [model(part, None, cache) for part in ids.split((5, 1, 1, 3, 2), 1)]
        torch.testing.assert_close(torch.cat(pieces, 1), model(ids))


def test_n_last_leaves_out_logits_and_changes_none():
    model = decoder()
    ids = torch.randint(31, (2, 6))
    torch.testing.assert_close(model(ids, n_last=2), model(ids)[:, -2:])
    assert model(ids, n_last=0).shape == (2, 0, 31)


def test_half_precision_is_close_and_finite():
    model = decoder(n_kv_heads=3)
    ids = torch.randint(31, (2, 9))
    expected = model(ids)
    half = model.bfloat16()(ids).double()
    # bfloat16 keeps 8 bits; after two blocks a few per cent of the logits' size
    assert (half - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("part", ["final_norm", "attention_norm", "feedforward_norm"])
def test_a_missing_norm_shows(part):
    model = decoder()
    ids = torch.randint(31, (2, 9))
    expected = by_hand(model, ids)
    places = [model] if part == "final_norm" else model.blocks
    for place in places:
        setattr(place, part, torch.nn.Identity())
    assert (model(ids) - expected).abs().max() > 0.1


@pytest.mark.parametrize("tied", [True, False])
def test_tied_is_one_matrix(tied):
    model = Decoder(DecoderConfig(**{**SMALL, "tied": tied}))
    assert (model.head.weight is model.embed.weight) == tied
    n_weights = sum(p.numel() for p in model.parameters())
    c, v, f, kv = 24, 31, model.config.width, 8
    block = c * (c + 2 * kv) + c * c + 3 * c * f + 2 * c
    assert n_weights == 2 * block + c + v * c * (1 if tied else 2)


def test_every_parameter_learns():
    model = decoder(qkv_bias=True, tied=False)
    ids = torch.randint(31, (4, 9))
    F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
    silent = [n for n, p in model.named_parameters() if not p.grad.abs().max() > 0]
    assert silent == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_vocab": 0}, "n_vocab must be a positive integer; got 0"),
        ({"n_kv_heads": 0}, "n_kv_heads must be a positive integer; got 0"),
        ({"d_ff": -1}, "d_ff must be a positive integer; got -1"),
        ({"n_heads": 5}, "n_heads must divide d_model=24 into heads of even size"),
        ({"n_heads": 8}, "heads of even size; got 8"),
        ({"n_heads": 4, "n_kv_heads": 3}, "n_kv_heads must divide n_heads=4; got 3"),
        ({"window": 0}, "window must be at least 1; got 0"),
        ({"n_sinks": 1}, "n_sinks must not be negative, and needs a window"),
        ({"window": 4, "n_sinks": -1}, "got n_sinks=-1, window=4"),
    ],
)
def test_config_names_the_bad_field(fields, message):
    with pytest.raises(ValueError, match=message):
        DecoderConfig(**{**SMALL, **fields})
