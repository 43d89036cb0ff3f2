"""The short fit: windows by enumeration, training by closed form."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from groundup.foundations.fitting import (
    byte_tensor,
    fit,
    held_out_loss,
    sample_windows,
)


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_bytes_round_trip(text):
    assert bytes(byte_tensor(text).tolist()).decode() == text


def test_windows_are_slices_and_targets_follow():
    data = torch.arange(100)
    x, y = sample_windows(
        data, batch=50, context=7, generator=torch.Generator().manual_seed(0)
    )
    assert torch.equal(y, x + 1)  # data[i] = i, so the next token is one more
    assert torch.equal(x - x[:, :1], torch.arange(7).expand(50, 7))


def test_every_start_is_equally_likely():
    """Five sigma over 8 starts: a correct sampler fails about once in 200,000."""
    n = 80_000
    x, y = sample_windows(
        torch.arange(10), batch=n, context=2, generator=torch.Generator().manual_seed(1)
    )
    counts = torch.bincount(x[:, 0], minlength=8)
    assert len(counts) == 8
    assert y.max() == 9  # the last token is reached as a target
    sigma = (n * (1 / 8) * (7 / 8)) ** 0.5
    assert (counts - n / 8).abs().max() < 5 * sigma


def test_refuses_text_shorter_than_a_window():
    generator = torch.Generator()
    with pytest.raises(ValueError, match=r"context=5 .* at least 6"):
        sample_windows(torch.arange(5), batch=1, context=5, generator=generator)


class Bigram(nn.Module):
    """A table of logits: its best loss is known in closed form."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(256, 256)

    def forward(self, ids):
        return self.table(ids)


def test_fit_reaches_the_entropy_of_a_bigram_source():
    """After "a" follow "b" and "c" alternately: ln 2 every other byte, 0 else."""
    data = byte_tensor("abac" * 500)
    torch.manual_seed(0)
    losses = fit(Bigram(), data, steps=300, batch=32, context=16, lr=0.3, seed=0)
    assert losses[0] > 5
    tail = torch.tensor(losses[-20:]).mean().item()
    assert tail == pytest.approx(0.5 * 0.6931, abs=0.01)


def test_seed_decides_the_windows():
    data = byte_tensor("the quick brown fox jumps over the lazy dog" * 5)

    def run(seed):
        torch.manual_seed(0)
        return fit(Bigram(), data, steps=5, batch=4, context=8, lr=0.1, seed=seed)

    assert run(1) == run(1)
    assert run(1) != run(2)


@pytest.mark.parametrize("length", [9, 16, 17, 1000])
def test_held_out_loss_equals_a_loop_over_pairs(length):
    """For a bigram table, windows do not matter: every pair counts once."""
    torch.manual_seed(0)
    model = Bigram().double().eval()
    data = torch.randint(256, (length,))
    whole = (length - 1) // 8 * 8
    logp = model.table.weight.log_softmax(-1)
    expected = -sum(logp[data[i], data[i + 1]] for i in range(whole)) / whole
    assert held_out_loss(model, data, context=8) == pytest.approx(expected.item())
    assert not model.training


def test_held_out_loss_restores_the_mode_and_refuses_short_text():
    model = Bigram().train()
    held_out_loss(model, torch.arange(9), context=8)
    assert model.training
    with pytest.raises(ValueError, match=r"context=8 .* at least 9"):
        held_out_loss(model, torch.arange(8), context=8)
