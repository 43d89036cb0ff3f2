"""The block against GPT-2's and torch's, and the stack against its own promises."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from groundup.foundations.fitting import byte_tensor, fit
from groundup.transformer.block import (
    Block,
    BlockConfig,
    MiniFormer,
    fuse,
    load_gpt2_block,
    reach,
)

SMALL = BlockConfig(d_model=16, n_heads=4)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def gpt2_block(width=32, heads=4):
    modeling = pytest.importorskip("transformers.models.gpt2.modeling_gpt2")
    from transformers import GPT2Config

    config = GPT2Config(n_embd=width, n_head=heads, attn_implementation="eager")
    block = modeling.GPT2Block(config, layer_idx=0).double().eval()
    with torch.no_grad():  # larger than GPT-2's own start, so that every part shows
        for parameter in block.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return block


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e3])
def test_equals_gpt2_with_the_same_weights(scale):
    theirs = gpt2_block()
    ours = Block(BlockConfig(d_model=32, n_heads=4)).double()
    load_gpt2_block(ours, theirs.state_dict())
    x = scale * torch.randn(3, 11, 32, dtype=torch.float64)
    future = torch.full((11, 11), -torch.inf, dtype=torch.float64).triu(1)
    expected = theirs(x, attention_mask=future[None, None])
    expected = expected[0] if isinstance(expected, tuple) else expected
    torch.testing.assert_close(ours(x), expected, rtol=1e-10, atol=1e-10 * scale)


def test_gradients_equal_gpt2s():
    theirs = gpt2_block()
    ours = Block(BlockConfig(d_model=32, n_heads=4)).double()
    load_gpt2_block(ours, theirs.state_dict())
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    future = torch.full((5, 5), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    out = theirs(x, attention_mask=future)
    (out[0] if isinstance(out, tuple) else out).square().sum().backward()
    ours(x).square().sum().backward()
    qkv = ours.attention.sublayer.qkv.weight.grad
    torch.testing.assert_close(qkv, theirs.attn.c_attn.weight.grad.T)
    up = ours.feedforward.sublayer.up.weight.grad
    torch.testing.assert_close(up, theirs.mlp.c_fc.weight.grad.T)


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_equals_torchs_encoder_layer(norm):
    theirs = nn.TransformerEncoderLayer(
        16,
        4,
        64,
        dropout=0.0,
        activation="gelu",
        batch_first=True,
        norm_first=norm == "pre",
    ).double()
    config = BlockConfig(d_model=16, n_heads=4, activation="gelu", norm=norm)
    ours = Block(config).double()
    ours.load_state_dict(
        {
            "attention.norm.weight": theirs.norm1.weight,
            "attention.norm.bias": theirs.norm1.bias,
            "attention.sublayer.qkv.weight": theirs.self_attn.in_proj_weight,
            "attention.sublayer.qkv.bias": theirs.self_attn.in_proj_bias,
            "attention.sublayer.proj.weight": theirs.self_attn.out_proj.weight,
            "attention.sublayer.proj.bias": theirs.self_attn.out_proj.bias,
            "feedforward.norm.weight": theirs.norm2.weight,
            "feedforward.norm.bias": theirs.norm2.bias,
            "feedforward.sublayer.up.weight": theirs.linear1.weight,
            "feedforward.sublayer.up.bias": theirs.linear1.bias,
            "feedforward.sublayer.down.weight": theirs.linear2.weight,
            "feedforward.sublayer.down.bias": theirs.linear2.bias,
        }
    )
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    future = nn.Transformer.generate_square_subsequent_mask(7, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x, future), rtol=1e-10, atol=1e-10)


def test_without_both_sublayers_a_block_is_the_identity():
    block = Block(dataclasses.replace(SMALL, attention=False, feedforward=False))
    x = torch.randn(2, 3, 16)
    assert torch.equal(block(x), x)


def test_without_attention_no_position_hears_another():
    block = Block(dataclasses.replace(SMALL, attention=False))
    x = torch.randn(1, 6, 16)
    changed = x.clone()
    changed[0, 2] += 1.0
    moved = (block(x) != block(changed)).any(-1)[0]
    assert moved.tolist() == [False, False, True, False, False, False]


@given(
    position=st.integers(0, 11),
    n_layers=st.integers(1, 3),
    norm=st.sampled_from(["pre", "post", "none"]),
    seed=st.integers(0, 2**31),
)
def test_a_changed_byte_never_moves_the_past(position, n_layers, norm, seed):
    torch.manual_seed(seed)
    model = MiniFormer(dataclasses.replace(SMALL, norm=norm), n_layers)
    ids = torch.randint(256, (12,))
    change = reach(model, ids, position, (int(ids[position]) + 1) % 256)
    assert (change[:, :position] == 0).all()
    assert (change[1:, position:] > 0).all()  # and reaches all that follows at once
    assert (change[0, position + 1 :] == 0).all()  # but not before the first block


def test_logits_are_read_from_the_normalised_last_state():
    model = MiniFormer(SMALL, 2)
    ids = torch.randint(256, (2, 9))
    last = nn.functional.layer_norm(model.stream(ids)[-1], (16,))
    torch.testing.assert_close(model(ids), model.unembed(last))


def test_zero_blocks_leave_a_bigram_model():
    """Without positions and blocks, a byte's logits depend on that byte alone."""
    model = MiniFormer(SMALL, 0, positions=False)
    logits = model(torch.tensor([[7, 9, 7]]))[0]
    torch.testing.assert_close(logits[0], logits[2], rtol=0, atol=0)


def test_every_parameter_learns():
    model = MiniFormer(SMALL, 2)
    logits = model(torch.randint(256, (2, 9)))
    nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.randint(256, (18,))
    ).backward()
    silent = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is None or not parameter.grad.abs().max() > 0
    ]
    assert silent == []


def test_learns_to_copy_what_a_bigram_cannot():
    """In "aXbX" with X random, the byte after X needs the byte before X."""
    generator = torch.Generator().manual_seed(0)
    marks = torch.randint(48, 58, (4000,), generator=generator)
    data = torch.stack((byte_tensor("ab" * 2000), marks), dim=1).flatten()
    model = MiniFormer(dataclasses.replace(SMALL, d_model=32), 1)
    losses = fit(model, data, steps=150, batch=16, context=16, lr=1e-2, seed=0)
    # Every other byte is one of ten, at random; the rest is certain: ln(10) / 2.
    assert sum(losses[-20:]) / 20 < math.log(10) / 2 + 0.05


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"d_model": 0}, "d_model must be a positive integer; got 0"),
        ({"d_ff": 0}, "d_ff must be a positive integer; got 0"),
        ({"n_heads": 3}, "n_heads must divide d_model=64; got 3"),
        ({"norm": "before"}, "norm must be one of .*; got 'before'"),
        ({"activation": "tanh"}, "activation must be one of .*; got 'tanh'"),
    ],
)
def test_config_names_the_bad_field(fields, message):
    with pytest.raises(ValueError, match=message):
        BlockConfig(**fields)


def test_refuses_weights_that_are_not_a_gpt2_block():
    state = gpt2_block().state_dict()
    block = Block(BlockConfig(d_model=32, n_heads=4)).double()
    with pytest.raises(ValueError, match=r"missing \['ln_1.bias'\]"):
        load_gpt2_block(block, {k: v for k, v in state.items() if k != "ln_1.bias"})
    without_norms = Block(BlockConfig(d_model=32, n_heads=4, norm="none")).double()
    with pytest.raises(ValueError, match="block must be pre-norm"):
        load_gpt2_block(without_norms, state)


def test_reach_refuses_a_change_that_is_none():
    model, ids = MiniFormer(SMALL, 1), torch.tensor([1, 2, 3])
    with pytest.raises(ValueError, match=r"byte must differ from ids\[1\]"):
        reach(model, ids, 1, 2)
    with pytest.raises(ValueError, match=r"position must lie in 0\.\.2; got 3"):
        reach(model, ids, 3, 0)


# ------------------------------------------- torch's kernels, other masks, dropout


def excite(module):
    """Weights large enough that a wrong kernel shows."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.4 * torch.randn_like(parameter))
    return module.double()


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("norm", ["pre", "post", "none"])
def test_torchs_kernels_give_the_same_outputs_and_gradients(activation, norm):
    config = dataclasses.replace(SMALL, activation=activation, norm=norm)
    block = excite(Block(config))
    x = (3 * torch.randn(2, 9, 16, dtype=torch.float64)).requires_grad_()
    clear = block(x)
    by_hand = torch.autograd.grad(clear.square().sum(), [x, *block.parameters()])
    fused = fuse(block)(x)
    by_torch = torch.autograd.grad(fused.square().sum(), [x, *block.parameters()])
    torch.testing.assert_close(fused, clear, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(by_torch, by_hand, rtol=1e-9, atol=1e-9)


def test_the_switch_can_be_taken_back():
    block = fuse(Block(SMALL))
    assert all(m.fused for m in block.modules() if hasattr(m, "fused"))
    assert fuse(block, False) is block
    assert not any(m.fused for m in block.modules() if hasattr(m, "fused"))


@pytest.mark.parametrize("fused", [False, True])
def test_a_mask_takes_the_place_of_the_causal_one(fused):
    """A mask a row: the first is causal, the second lets everything see everything."""
    block = fuse(excite(Block(SMALL)), fused)
    x = torch.randn(2, 6, 16, dtype=torch.float64)
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    out = block(x, torch.stack((causal, torch.ones_like(causal))))
    torch.testing.assert_close(out[0], block(x)[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(block(x, causal), block(x), rtol=1e-10, atol=1e-10)
    block.attention.sublayer.causal = False
    torch.testing.assert_close(out[1], block(x)[1], rtol=1e-10, atol=1e-10)
    assert (out[1] - out[0])[0].norm() > 0.1


def test_dropout_acts_on_the_branches_and_in_training_mode_only():
    """With p near 1 nearly nothing of a branch is left: the stream runs through."""
    block = Block(dataclasses.replace(SMALL, dropout=0.999))
    x = torch.randn(4, 6, 16)
    same = (block.train()(x) == x).float().mean()
    assert same > 0.97  # 0.999² untouched; fewer by chance: below 1e-6
    without = Block(SMALL)
    without.load_state_dict(block.state_dict())
    torch.testing.assert_close(block.eval()(x), without(x), rtol=0, atol=0)


@pytest.mark.parametrize("dropout", [-0.1, 1.0])
def test_dropout_outside_its_range_is_refused(dropout):
    with pytest.raises(ValueError, match=r"dropout must lie in \[0, 1\)"):
        BlockConfig(dropout=dropout)
