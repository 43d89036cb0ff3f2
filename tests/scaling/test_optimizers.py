"""Optimizers under one rate: each gets its own, and their state is kept whole."""

import pytest
import torch

from groundup.modern.variants import small_decoder
from groundup.scaling.muon import Muon
from groundup.scaling.optimizers import Together, make_optimizer
from groundup.training.adamw import AdamW, Group, decay_groups


def decoder(seed=0):
    torch.manual_seed(seed)
    return small_decoder(n_vocab=11, d_model=8, n_heads=2, tied=False)


def fill_gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_adamw_alone_is_part_2s():
    ours, theirs = decoder(), decoder()
    one = make_optimizer(ours, "adamw", 0.01, 0.1)
    other = AdamW(decay_groups(theirs, 0.1))
    for step, share in enumerate((0.5, 1.0, 0.25)):
        fill_gradients(ours, step)
        fill_gradients(theirs, step)
        one.step(share)
        other.step(share * 0.01)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


def test_muon_gets_the_hidden_matrices_and_adamw_the_rest():
    model = decoder()
    (muon, _), (adamw, _) = make_optimizer(model, "muon", 0.01, 0.1).parts
    assert isinstance(muon, Muon)
    assert isinstance(adamw, AdamW)
    assert (
        muon.state.keys() | adamw.state.keys() == dict(model.named_parameters()).keys()
    )
    assert not muon.state.keys() & adamw.state.keys()
    assert "embed.weight" in adamw.state
    assert "blocks.0.attention.qkv.weight" in muon.state


def test_each_part_gets_its_own_rate():
    """AdamW's first step is the rate against the sign: 0.5 * 0.1 and 0.5 * 0.4."""
    a, b = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    a.grad = b.grad = torch.ones(1)
    parts = [
        (AdamW([Group({n: p}, 0.0)]), lr) for n, p, lr in (("a", a, 0.1), ("b", b, 0.4))
    ]
    optimizer = Together(*parts)
    optimizer.step(0.5)
    assert [a.item(), b.item()] == pytest.approx([-0.05, -0.2])
    optimizer.zero_grad()
    assert a.grad is None
    assert b.grad is None


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_state_that_is_loaded_goes_on_as_the_one_that_was_saved(kind):
    model, copy = decoder(), decoder()
    optimizer = make_optimizer(model, kind, 0.01, 0.1)
    for step in range(3):
        fill_gradients(model, step)
        optimizer.step(1.0)
    copy.load_state_dict(model.state_dict())
    other = make_optimizer(copy, kind, 0.01, 0.1)
    other.load({name: t.clone() for name, t in optimizer.tensors().items()})
    for step in (3, 4):
        for m, o in ((model, optimizer), (copy, other)):
            fill_gradients(m, step)
            o.step(1.0)
    for a, b in zip(model.parameters(), copy.parameters(), strict=True):
        assert torch.equal(a, b)
    for name, tensor in optimizer.tensors().items():
        assert torch.equal(tensor, other.tensors()[name]), name


def test_a_foreign_state_is_refused_and_changes_nothing():
    optimizer = make_optimizer(decoder(), "adamw", 0.01, 0.1)
    before = {name: t.clone() for name, t in optimizer.tensors().items()}
    missing = dict(list(before.items())[1:])
    with pytest.raises(ValueError, match="is missing"):
        optimizer.load(missing)
    with pytest.raises(ValueError, match=r"ghost/0 is unknown"):
        optimizer.load({**before, "ghost/0": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"must have shape .* got \(3,\)"):
        optimizer.load({**before, "embed.weight/0": torch.zeros(3)})
    for name, tensor in optimizer.tensors().items():
        assert torch.equal(tensor, before[name])


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="kind must be one of adamw, muon; got 'sgd'"):
        make_optimizer(decoder(), "sgd", 0.01, 0.1)
