"""The GPT against GPT-2 with the same weights, and its first weights against theory."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from groundup.training.gpt import GPT, TINY, GPTConfig, initialise, load_gpt2
from groundup.transformer.block import fuse

SMALL = GPTConfig(n_vocab=61, context=12, d_model=32, n_layers=2, n_heads=4)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def gpt2(**changes):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 61, "n_positions": 12, "n_embd": 32, "n_layer": 2}
    sizes |= {"bos_token_id": 0, "eos_token_id": 0}
    config = transformers.GPT2Config(**{**sizes, "n_head": 4, **changes})
    model = transformers.GPT2LMHeadModel(config).double().eval()
    with torch.no_grad():  # larger than its own start, so that every part shows
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def loaded(theirs, config=SMALL):
    ours = GPT(config).double().eval()
    load_gpt2(ours, theirs.state_dict())
    return ours


@pytest.mark.parametrize("fused", [True, False])
def test_logits_equal_gpt2s(fused):
    theirs = gpt2()
    ours = fuse(loaded(theirs), fused)
    ids = torch.randint(61, (3, 12))
    torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-10, atol=1e-10)


def test_gradients_equal_gpt2s():
    theirs = gpt2()
    ours = loaded(theirs)
    ids, targets = torch.randint(61, (2, 9)), torch.randint(61, (18,))
    F.cross_entropy(theirs(ids).logits.flatten(0, 1), targets).backward()
    F.cross_entropy(ours(ids).flatten(0, 1), targets).backward()
    body = theirs.transformer
    pairs = [
        (ours.embed.weight, body.wte.weight.grad),
        (ours.positions.table, body.wpe.weight.grad),
        (
            ours.blocks[0].attention.sublayer.qkv.weight,
            body.h[0].attn.c_attn.weight.grad.T,
        ),
        (ours.final_norm.bias, body.ln_f.bias.grad),
    ]
    for mine, expected in pairs:
        torch.testing.assert_close(mine.grad, expected, rtol=1e-9, atol=1e-12)


def test_the_head_is_the_embedding_before_and_after_loading():
    ours = loaded(gpt2())
    assert "head" not in " ".join(ours.state_dict())
    ids = torch.randint(61, (1, 5))
    before = ours(ids)
    with torch.no_grad():
        ours.embed.weight[60] += 1.0  # a token that does not occur in ids
    moved = (ours(ids) != before).any((0, 1))
    assert 60 not in ids
    assert moved.nonzero().flatten().tolist() == [60]


@pytest.mark.parametrize(
    "config", [GPTConfig(), TINY, GPTConfig(d_model=384, n_layers=6, n_heads=6)]
)
def test_loss_at_initialisation_is_that_of_a_uniform_guess(config):
    ids = torch.randint(256, (8, 65))
    logits = GPT(config)(ids[:, :-1]).flatten(0, 1)
    loss = F.cross_entropy(logits, ids[:, 1:].flatten()).item()
    assert abs(loss - math.log(256)) < 0.1


def test_initialisation_has_the_spread_of_gpt2():
    """Five sigma: the standard deviation of n draws is off by std / sqrt(2 n)."""
    model = GPT(GPTConfig(d_model=96, n_layers=3, n_heads=4, init_std=0.03))
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            expected = 0.0 if name.endswith("bias") else 1.0
            assert (parameter == expected).all(), name
            continue
        writes = name.endswith(("proj.weight", "down.weight"))
        std = 0.03 / 6**0.5 if writes else 0.03  # 2 N = 6 branches
        found = parameter.std().item()
        assert abs(found - std) < 5 * std / (2 * parameter.numel()) ** 0.5, name


def test_branches_add_up_to_the_size_of_one_whatever_the_depth():
    """The stream's variance after 2 N independent branches, each divided by 2 N."""

    def grown(n_layers):
        model = GPT(GPTConfig(d_model=64, n_layers=n_layers, n_heads=4))
        x = torch.randn(4, 32, 64)
        y = x
        for block in model.blocks:
            y = block(y)
        return (y - x).square().mean().item()

    assert grown(16) / grown(1) < 2  # without the scaling: 16


def test_initialise_draws_anew_in_place():
    model = GPT(SMALL)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    scales = {n for n, p in model.named_parameters() if n.endswith("norm.weight")}
    initialise(model, 2)
    kept = {n for n, p in model.named_parameters() if (p == 7.0).any()}
    assert kept == scales


@given(position=st.integers(0, 11), seed=st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_a_changed_token_never_moves_the_past(position, seed):
    torch.manual_seed(seed)
    model = GPT(SMALL).double()
    ids = torch.randint(61, (1, 12))
    changed = ids.clone()
    changed[0, position] = (ids[0, position] + 1) % 61
    moved = (model(ids) - model(changed)).abs().amax(-1)[0] > 1e-12
    assert moved.tolist() == [t >= position for t in range(12)]


def test_a_mask_replaces_the_causal_one():
    model = GPT(SMALL).double()
    ids = torch.randint(61, (2, 12))
    causal = torch.ones(12, 12, dtype=torch.bool).tril()
    torch.testing.assert_close(model(ids, causal), model(ids))
    changed = ids.clone()
    changed[:, -1] = (ids[:, -1] + 1) % 61
    everything = torch.ones(12, 12, dtype=torch.bool)
    first = model(changed, everything)[:, 0] - model(ids, everything)[:, 0]
    assert first.abs().max() > 1e-9  # now the first position sees the last
    per_row = torch.stack((causal, everything))
    torch.testing.assert_close(model(ids, per_row)[0], model(ids)[0])
    torch.testing.assert_close(model(ids, per_row)[1], model(ids, everything)[1])


def test_logits_are_the_hidden_state_read_by_the_embedding():
    model = GPT(SMALL)
    ids = torch.randint(61, (2, 5))
    torch.testing.assert_close(model(ids), model.hidden(ids) @ model.embed.weight.T)


def test_dropout_acts_in_training_mode_only_and_in_every_place():
    model = GPT(GPTConfig(context=12, d_model=32, n_heads=4, dropout=0.5))
    places = [m for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    assert len(places) == 1 + 2 * 4
    ids = torch.randint(256, (2, 12))
    assert not torch.equal(model(ids), model(ids))
    model.eval()
    assert torch.equal(model(ids), model(ids))
    for place in places:
        place.train()
        assert not torch.equal(model(ids), model(ids)), "each place by itself"
        place.eval()


def test_refuses_a_sequence_longer_than_its_context():
    with pytest.raises(ValueError, match="positions 0 to 12 were asked for"):
        GPT(SMALL)(torch.zeros(1, 13, dtype=torch.long))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_vocab": 0}, "n_vocab must be a positive integer; got 0"),
        ({"context": 0}, "context must be a positive integer; got 0"),
        ({"n_layers": 0}, "n_layers must be a positive integer; got 0"),
        ({"d_model": 30}, "n_heads must divide d_model=30; got 4"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\); got 1.0"),
        ({"init_std": 0.0}, "init_std must be positive; got 0.0"),
    ],
)
def test_config_names_the_bad_field(fields, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**fields)


def test_loading_refuses_what_is_not_this_gpt2():
    ours = GPT(SMALL).double()
    state = gpt2().state_dict()
    rest = {k: v for k, v in state.items() if k != "transformer.ln_f.bias"}
    with pytest.raises(ValueError, match=r"missing \['ln_f.bias'\]"):
        load_gpt2(ours, rest)
    with pytest.raises(ValueError, match=r"unknown \['extra'\]"):
        load_gpt2(ours, {**state, "extra": torch.zeros(1)})
    with pytest.raises(ValueError, match="head of its own"):
        load_gpt2(ours, {**state, "lm_head.weight": state["lm_head.weight"] + 1})
    with pytest.raises(ValueError, match=r"GPT-2 of 2 blocks; unknown \['h.2."):
        load_gpt2(ours, gpt2(n_layer=3).state_dict())
    with pytest.raises(RuntimeError, match=r"size mismatch for embed\.weight"):
        load_gpt2(ours, gpt2(vocab_size=60).state_dict())
    with pytest.raises(ValueError, match="missing"):
        load_gpt2(ours, {})
