"""Growing a vocabulary: old logits, the bound on the loss, heads, AdamW's state."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from groundup.modern.decoder import Decoder, DecoderConfig
from groundup.scaling.vocabulary import grow_vocabulary, grown_rows
from groundup.training.adamw import AdamW, decay_groups

TINY = DecoderConfig(n_vocab=11, d_model=16, n_layers=1, n_heads=2)


def trained(tied, steps=5, seed=0, **changes):
    torch.manual_seed(seed)
    model = Decoder(DecoderConfig(**{**vars(TINY), "tied": tied, **changes})).double()
    optimizer = AdamW(decay_groups(model, 0.1))
    for _ in range(steps):
        update(model, optimizer, ids(11))
    return model, optimizer


def ids(n_vocab):
    return torch.randint(n_vocab, (3, 9))


def update(model, optimizer, x):
    optimizer.zero_grad()
    logits = model(x[:, :-1])
    F.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten()).backward()
    optimizer.step(1e-2)


def test_rows_by_hand():
    """Means of the columns (0, 2) and (2, 4) are 1 and 3; spreads are 1 and 1."""
    table = torch.tensor([[0.0, 2.0], [2.0, 4.0]])
    assert grown_rows(table, 4).tolist() == [[0, 2], [2, 4], [1, 3], [1, 3]]
    drawn = torch.randn(2, 2, generator=torch.Generator().manual_seed(1))
    noisy = grown_rows(table, 4, noise=0.5, generator=torch.Generator().manual_seed(1))
    expected = torch.tensor([1.0, 3.0]) + 0.5 * drawn
    torch.testing.assert_close(noisy[2:], expected)


def test_noise_has_the_spread_it_says():
    """20,000 draws: a spread is off by 5 sigma (2.5 %) once in 1.7 million runs."""
    table = torch.tensor([[0.0, 0.0], [2.0, 20.0]])  # spreads 1 and 10
    generator = torch.Generator().manual_seed(0)
    new = grown_rows(table, 20_002, noise=0.3, generator=generator)[2:]
    torch.testing.assert_close(new.std(0), torch.tensor([0.3, 3.0]), rtol=0.025, atol=0)


@pytest.mark.parametrize("tied", [True, False])
@settings(max_examples=10)
@given(n_new=st.integers(1, 40), seed=st.integers(0, 2**31))
def test_old_logits_stay_and_new_ones_are_their_mean(tied, n_new, seed):
    model, _ = trained(tied, steps=1, seed=seed)
    x = ids(11)
    before = model(x)
    grow_vocabulary(model, 11 + n_new)
    after = model(x)
    torch.testing.assert_close(after[..., :11], before, rtol=0, atol=1e-12)
    mean = before.mean(-1, keepdim=True).expand(*before.shape[:2], n_new)
    torch.testing.assert_close(after[..., 11:], mean, rtol=0, atol=1e-12)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("n_vocab", [12, 30])
def test_the_loss_rises_by_no_more_than_the_bound(tied, n_vocab):
    """ln(V1 / V), reached where all old tokens are equally likely."""
    model, _ = trained(tied)
    with torch.no_grad():
        model.head.weight.mul_(30)  # sure of itself: far from the bound
    x = ids(11)

    def losses():
        return F.cross_entropy(
            model(x[:, :-1]).transpose(1, 2), x[:, 1:], reduction="none"
        )

    before = losses()
    grow_vocabulary(model, n_vocab)
    rise = losses() - before
    bound = math.log(n_vocab / 11)
    assert (rise > 0).all()
    assert (rise < bound).all()
    with torch.no_grad():
        model.head.weight.zero_()  # all equally likely: the loss is ln V1
    torch.testing.assert_close(losses(), torch.full_like(rise, math.log(n_vocab)))


@pytest.mark.parametrize("tied", [True, False])
def test_a_new_model_of_the_size_could_hold_it(tied):
    model, _ = trained(tied)
    grow_vocabulary(model, 20)
    other = Decoder(DecoderConfig(**{**vars(TINY), "tied": tied, "n_vocab": 20}))
    other.double().load_state_dict(model.state_dict())
    x = ids(20)
    assert torch.equal(other(x), model(x))
    assert model.config == other.config
    assert (model.head.weight is model.embed.weight) == tied
    assert model.embed.num_embeddings == model.head.out_features == 20


def test_the_same_rows_as_transformers():
    """`mean_resizing` there adds noise of a billionth of the covariance."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=11,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            tie_word_embeddings=False,
        )
    )
    model, _ = trained(False, steps=0)
    model.float()
    with torch.no_grad():
        model.embed.weight.copy_(theirs.get_input_embeddings().weight)
        model.head.weight.copy_(theirs.get_output_embeddings().weight)
    theirs.resize_token_embeddings(14, mean_resizing=True)
    grow_vocabulary(model, 14)
    pairs = (
        (model.embed.weight, theirs.get_input_embeddings().weight),
        (model.head.weight, theirs.get_output_embeddings().weight),
    )
    for ours, expected in pairs:
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_training_goes_on_with_the_old_state_and_the_new_parameters(tied):
    model, optimizer = trained(tied)
    state = {name: [t.clone() for t in pair] for name, pair in optimizer.state.items()}
    grow_vocabulary(model, 20, [optimizer])
    assert optimizer.n_steps == dict.fromkeys(state, 5)
    for name, (mean, square) in optimizer.state.items():
        old_mean, old_square = state[name]
        rows = len(old_mean)
        assert torch.equal(mean[:rows], old_mean)
        assert torch.equal(square[:rows], old_square)
        if rows == 11 and mean.dim() == 2:
            assert not mean[11:].any()
            expected = old_square.mean(0).expand(9, -1)
            torch.testing.assert_close(square[11:], expected)
    parameters = dict(model.named_parameters())
    for group in optimizer.groups:
        for name, parameter in group.parameters.items():
            assert parameters[name] is parameter
            assert parameter.shape == optimizer.state[name][0].shape
    before = model.embed.weight.detach().clone()
    update(model, optimizer, torch.arange(20)[None])
    assert (model.embed.weight - before).abs().amax(1).min() > 0


def test_the_first_step_of_a_new_row_by_hand():
    """A row without a gradient, with decay 0.1 and rate 0.01, shrinks by 0.001.

    With one, it moves by rate * (1 - b1) g / sqrt(b2 s + (1 - b2) g^2), where s is the
    mean of the old squares and the corrections of an old count are nearly 1.
    """
    model, optimizer = trained(False)
    optimizer.n_steps = dict.fromkeys(optimizer.n_steps, 10_000)
    grow_vocabulary(model, 12, [optimizer])
    optimizer.zero_grad()
    row = model.head.weight[11].detach().clone()
    square = optimizer.state["head.weight"][1][11].clone()
    model.head.weight.grad = torch.zeros_like(model.head.weight)
    model.head.weight.grad[11, 0] = 0.02
    optimizer.step(0.01)
    expected = row * (1 - 0.01 * 0.1)
    root = (0.99 * square[0] + 0.01 * 0.02**2).sqrt()
    expected[0] -= 0.01 * 0.1 * 0.02 / (root + 1e-8)
    torch.testing.assert_close(model.head.weight[11], expected)


def test_an_optimizer_of_other_parameters_is_left_alone():
    model, _ = trained(False)
    groups = decay_groups(model.blocks, 0.1)
    other = AdamW(groups)
    before = dict(other.state)
    grow_vocabulary(model, 12, [other])
    assert other.state == before


def test_a_frozen_table_stays_frozen():
    model, _ = trained(False)
    model.embed.weight.requires_grad_(False)
    grow_vocabulary(model, 12)
    assert not model.embed.weight.requires_grad
    assert model.head.weight.requires_grad


@pytest.mark.parametrize("n_vocab", [0, 10, 11])
def test_refuses_to_shrink(n_vocab):
    model, optimizer = trained(True)
    with pytest.raises(ValueError, match=f"more than the 11 there are; got {n_vocab}"):
        grow_vocabulary(model, n_vocab, [optimizer])
    assert model.config.n_vocab == 11
    assert len(optimizer.state["embed.weight"][0]) == 11


@pytest.mark.parametrize("noise", [-0.1, math.nan])
def test_refuses_a_noise_that_is_no_spread(noise):
    with pytest.raises(ValueError, match="noise must not be negative"):
        grown_rows(torch.zeros(2, 2), 3, noise=noise)
