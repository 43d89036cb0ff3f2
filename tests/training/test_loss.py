"""The loss against torch, the Transformers library and numbers worked by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from groundup.foundations.fitting import byte_tensor
from groundup.training.loss import (
    IGNORE,
    bits_per_byte,
    cross_entropy,
    cross_entropy_gradient,
    log_sum_exp,
    perplexity,
    sequence_mean,
    shifted_loss,
    token_losses,
    token_mean,
    unigram_entropy,
)

INF = math.inf
seeds = st.integers(0, 2**31)


def draw(seed, *shape, scale=1.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator)).to(dtype)


def test_by_hand():
    """Logits 0, ln 2, ln 5 give 1/8, 2/8, 5/8: the losses are ln 8, ln 4, ln 8/5."""
    logits = torch.tensor([0.0, math.log(2), math.log(5)], dtype=torch.float64)
    got = token_losses(logits.expand(3, 3), torch.arange(3))
    expected = torch.tensor([8.0, 4.0, 1.6], dtype=torch.float64).log()
    torch.testing.assert_close(got, expected)
    gradient = cross_entropy_gradient(logits[None], torch.tensor([1]))
    expected = torch.tensor([[1, 2 - 8, 5]], dtype=torch.float64) / 8
    torch.testing.assert_close(gradient, expected)


@given(seed=seeds, scale=st.sampled_from([1e-3, 1.0, 30.0, 1000.0]))
def test_equals_torch_with_gradients_and_ignored_targets(seed, scale):
    generator = torch.Generator().manual_seed(seed)
    logits = draw(seed, 3, 5, 7, scale=scale).requires_grad_()
    targets = torch.randint(7, (3, 5), generator=generator)
    targets[torch.rand(3, 5, generator=generator) < 0.3] = IGNORE
    targets[0, 0] = 2
    ours = cross_entropy(logits, targets)
    (mine,) = torch.autograd.grad(ours, logits)
    theirs = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    (expected,) = torch.autograd.grad(theirs, logits)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mine, expected, rtol=1e-10, atol=1e-12)
    by_hand = cross_entropy_gradient(logits.detach(), targets)
    torch.testing.assert_close(by_hand, expected, rtol=1e-10, atol=1e-12)
    per_token = F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), reduction="none"
    )
    torch.testing.assert_close(token_losses(logits, targets).flatten(), per_token)


def test_gradcheck():
    targets = torch.tensor([[1, IGNORE, 3], [0, 2, IGNORE]])
    logits = draw(0, 2, 3, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: cross_entropy(z, targets), logits)
    assert torch.autograd.gradcheck(log_sum_exp, logits)


@given(seed=seeds)
def test_each_gradient_row_sums_to_zero(seed):
    """Adding a constant to all logits of a row changes nothing."""
    logits = draw(seed, 4, 9, scale=10)
    targets = torch.tensor([0, 8, 3, IGNORE])
    rows = cross_entropy_gradient(logits, targets).sum(-1)
    torch.testing.assert_close(rows, torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(
        cross_entropy(logits + 123.0, targets), cross_entropy(logits, targets)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@given(seed=seeds)
@settings(max_examples=20)
def test_half_precision_is_computed_in_float32(dtype, seed):
    logits = draw(seed, 6, 300, scale=8, dtype=dtype)
    targets = torch.randint(300, (6,), generator=torch.Generator().manual_seed(seed))
    ours = cross_entropy(logits, targets)
    assert ours.dtype == torch.float32
    exact = F.cross_entropy(logits.double(), targets)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("factor", [1.0, 1000.0, 1e30])
def test_huge_logits(factor):
    """A lead of `factor` nats: loss 0 if right, the lead itself if wrong."""
    logits = torch.tensor([[factor * 100, 0.0]])
    assert cross_entropy(logits, torch.tensor([0])).item() == pytest.approx(0, abs=1e-6)
    assert cross_entropy(logits, torch.tensor([1])).item() == pytest.approx(
        factor * 100
    )


def test_infinite_logits():
    """A forbidden token costs nothing unless it is the target."""
    logits = torch.tensor([[0.0, 0.0, -INF]], dtype=torch.float64, requires_grad=True)
    loss = cross_entropy(logits, torch.tensor([0]))
    assert loss.item() == pytest.approx(math.log(2))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.tolist() == [[-0.5, 0.5, 0.0]]
    assert cross_entropy(logits.detach(), torch.tensor([2])).item() == INF
    assert log_sum_exp(torch.full((2, 3), -INF)).tolist() == [-INF, -INF]
    assert log_sum_exp(torch.tensor([1.0, INF])).item() == INF


@given(seed=seeds, scale=st.sampled_from([1.0, 1e3, 1e300]))
def test_log_sum_exp_equals_torchs(seed, scale):
    x = draw(seed, 5, 6) * scale
    torch.testing.assert_close(log_sum_exp(x), x.logsumexp(-1))


@pytest.mark.parametrize("bad", [-1, 4, -101])
def test_refuses_targets_outside_the_vocabulary(bad):
    message = rf"targets must be in \[0, 4\) or -100; got {bad}"
    with pytest.raises(ValueError, match=message):
        token_losses(torch.zeros(2, 4), torch.tensor([0, bad]))


def test_refuses_a_mean_over_nothing():
    ignored = torch.full((1, 2), IGNORE)
    with pytest.raises(ValueError, match="counted must hold at least one True"):
        cross_entropy(torch.zeros(1, 2, 4), ignored)
    with pytest.raises(ValueError, match="targets must not all be ignored"):
        cross_entropy_gradient(torch.zeros(1, 2, 4), ignored)
    with pytest.raises(ValueError, match="a True in every row"):
        sequence_mean(torch.zeros(2, 2), torch.tensor([[True, True], [False, False]]))


def test_two_means_by_hand():
    """Rows 6 | 1 1 1 : tokens (6 + 3) / 4 = 2.25, sequences (6 + 1) / 2 = 3.5."""
    losses = torch.tensor([[6.0, 99.0, 99.0], [1.0, 1.0, 1.0]])
    counted = torch.tensor([[True, False, False], [True, True, True]])
    assert token_mean(losses, counted).item() == 2.25
    assert sequence_mean(losses, counted).item() == 3.5


@given(seed=seeds, length=st.integers(1, 6))
def test_the_two_means_agree_where_lengths_are_equal(seed, length):
    losses = draw(seed, 4, 6)
    counted = torch.zeros(4, 6, dtype=torch.bool)
    counted[:, :length] = True
    torch.testing.assert_close(
        token_mean(losses, counted), sequence_mean(losses, counted)
    )


def test_what_is_not_counted_passes_no_gradient():
    losses = torch.tensor([[1.0, INF], [2.0, math.nan]], requires_grad=True)
    counted = torch.tensor([[True, False], [True, False]])
    for mean in (token_mean, sequence_mean):
        value = mean(losses, counted)
        assert value.item() == 1.5
        (gradient,) = torch.autograd.grad(value, losses)
        assert gradient.tolist() == [[0.5, 0.0], [0.5, 0.0]]


@given(n=st.integers(1, 300))
def test_a_uniform_guesser_pays_ln_v(n):
    loss = cross_entropy(torch.zeros(3, n), torch.tensor([0, n - 1, n // 2])).item()
    assert loss == pytest.approx(math.log(n), abs=1e-6)
    assert perplexity(loss) == pytest.approx(n, rel=1e-5)


def test_conversions_by_hand():
    """256 choices: 8 bits a byte; tokens of four bytes at ln 16 nats: one bit."""
    assert bits_per_byte(math.log(256), 1000, 1000) == pytest.approx(8)
    assert bits_per_byte(math.log(16), 250, 1000) == pytest.approx(1)
    assert perplexity(0.0) == 1.0


@given(seed=seeds)
def test_bits_per_byte_do_not_depend_on_where_the_text_is_cut(seed):
    """The same distribution over a text, told in bytes or in pairs of bytes."""
    losses = draw(seed, 40).abs()
    one = bits_per_byte(losses.mean().item(), 40, 40)
    pairs = losses.view(20, 2).sum(1)
    assert bits_per_byte(pairs.mean().item(), 20, 40) == pytest.approx(one)


@pytest.mark.parametrize(("tokens", "n_bytes"), [(0, 1), (1, 0), (-1, 3)])
def test_refuses_a_text_without_length(tokens, n_bytes):
    with pytest.raises(ValueError, match="must be positive"):
        bits_per_byte(1.0, tokens, n_bytes)


@given(text=st.binary(min_size=1, max_size=60))
def test_entropy_is_the_lowest_loss_of_a_constant_guess(text):
    ids = torch.tensor(list(text))
    counts = torch.bincount(ids, minlength=256).double()
    best = cross_entropy(counts.log().expand(len(ids), 256), ids).item()
    assert unigram_entropy(ids) == pytest.approx(best, abs=1e-9)
    worse = cross_entropy((counts + 0.5).log().expand(len(ids), 256), ids).item()
    assert unigram_entropy(ids) <= worse + 1e-9


def test_entropy_by_hand_and_of_nothing():
    """Half a, a quarter b and c: ln 2 + ln 2 / 2."""
    assert unigram_entropy(byte_tensor("aabc")) == pytest.approx(1.5 * math.log(2))
    assert unigram_entropy(byte_tensor("aaaa")) == 0
    with pytest.raises(ValueError, match="at least one token"):
        unigram_entropy(byte_tensor(""))


@pytest.mark.parametrize("shift", [0, 1, 2, 5])
def test_shifted_loss_finds_what_a_model_predicts(shift):
    """Logits that name the byte `shift` places ahead: loss 0 there, 50 elsewhere."""
    ids = torch.arange(12).view(2, 6)
    logits = 50.0 * F.one_hot(ids + shift, 30).double()
    for k in range(6):
        expected = 0.0 if k == shift else 50.0
        assert shifted_loss(logits, ids, k).item() == pytest.approx(expected, abs=1e-6)


def test_the_last_token_is_a_target_and_the_first_is_not():
    """A gradient reaches logits 0 to T - 2; the last target decides the last one."""
    ids = torch.tensor([[3, 1, 4, 1]])
    logits = torch.zeros(1, 4, 5, requires_grad=True)
    shifted_loss(logits, ids, 1).backward()
    hit = [int(row.argmin()) if row.any() else None for row in logits.grad[0]]
    assert hit == [1, 4, 1, None]


def test_shift_one_is_what_the_transformers_library_does_inside():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=1,
        n_head=2,
        n_embd=16,
        vocab_size=50,
        n_positions=16,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = transformers.GPT2LMHeadModel(config).double().eval()
    ids = torch.randint(50, (3, 9))
    out = model(ids, labels=ids)
    ours = shifted_loss(out.logits, ids, 1).item()
    assert ours == pytest.approx(out.loss.item(), abs=1e-5)  # theirs is in float32
    # Labels that are shifted already are shifted twice.
    moved = torch.cat((ids[:, 1:], torch.full((3, 1), IGNORE)), 1)
    twice = model(ids, labels=moved).loss.item()
    assert shifted_loss(out.logits, ids, 2).item() == pytest.approx(twice, abs=1e-5)


@pytest.mark.parametrize("shift", [-1, 4])
def test_refuses_a_shift_that_leaves_nothing(shift):
    with pytest.raises(ValueError, match=rf"shift must be in \[0, 4\); got {shift}"):
        shifted_loss(torch.zeros(1, 4, 5), torch.zeros(1, 4, dtype=torch.int64), shift)


def test_an_untrained_model_pays_about_ln_v():
    torch.manual_seed(0)
    head = nn.Linear(32, 256)
    nn.init.normal_(head.weight, std=0.02)
    loss = cross_entropy(head(torch.randn(400, 32)), torch.randint(256, (400,)))
    assert abs(loss.item() - math.log(256)) < 0.1
