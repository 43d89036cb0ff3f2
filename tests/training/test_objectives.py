"""Objectives: masks, corruption, and what no model may see."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from groundup.foundations.fitting import byte_tensor
from groundup.training.batching import Corpus
from groundup.training.gpt import GPT, GPTConfig
from groundup.training.loss import IGNORE
from groundup.training.objectives import (
    MASK_ID,
    N_VOCAB,
    OBJECTIVES,
    RECIPE,
    SMALL,
    Example,
    corrupt,
    example,
    fill,
    hole_logits,
    hole_losses,
    objective_loss,
    prefix_mask,
    small_gpt,
    train_objective,
)
from groundup.transformer.single_head import causal_mask

few = settings(max_examples=30, deadline=None)
TINY = GPTConfig(
    n_vocab=N_VOCAB, context=8, d_model=16, n_layers=2, n_heads=2, init_std=0.3
)
objectives = pytest.mark.parametrize("objective", OBJECTIVES)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def windows(n=4, context=8, seed=0):
    both = torch.randint(256, (n, context + 1), generator=generator(seed))
    return both[:, :-1], both[:, 1:]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return GPT(TINY)


@few
@given(lengths=st.lists(st.integers(0, 7), min_size=1, max_size=4))
def test_prefix_mask_equals_loops(lengths):
    mask = prefix_mask(torch.tensor(lengths), 7)
    for b, n in enumerate(lengths):
        for t in range(7):
            for s in range(7):
                assert mask[b, t, s] == (s <= t or (t < n and s < n))


def test_prefix_mask_by_hand():
    mask = prefix_mask(torch.tensor([2]), 3)[0]
    assert mask.int().tolist() == [[1, 1, 0], [1, 1, 0], [1, 1, 1]]


@few
@given(n=st.integers(0, 9))
def test_prefix_mask_is_causal_outside_and_full_inside(n):
    mask = prefix_mask(torch.tensor([n]), 9)[0]
    assert mask[:n, :n].all()
    assert torch.equal(mask[n:], causal_mask(9)[n:])
    assert not mask[:n, n:].any()


def test_corruption_equals_a_numpy_loop():
    """The same draws, byte by byte."""
    ids = windows(6, 50)[0]
    inputs, labels = corrupt(ids, 0.4, generator(3), random=0.2, keep=0.3)
    g = generator(3)
    chosen = torch.rand(ids.shape, generator=g).numpy() < 0.4
    lot = torch.rand(ids.shape, generator=g).numpy()
    other = torch.randint(256, ids.shape, generator=g).numpy()
    for place in np.ndindex(*ids.shape):
        original = ids[place].item()
        if not chosen[place]:
            expected, label = original, IGNORE
        elif lot[place] < 0.2:
            expected, label = other[place], original
        elif lot[place] >= 0.7:
            expected, label = original, original
        else:
            expected, label = MASK_ID, original
        assert (inputs[place], labels[place]) == (expected, label)


def test_shares_equal_berts_within_five_sigma():
    """Each of four shares fails once in 1.7 million runs."""
    ids = windows(1, 400_000)[0]
    inputs, labels = corrupt(ids, 0.15, generator(), random=0.1, keep=0.1)
    chosen = labels != IGNORE
    n = int(chosen.sum())

    def near(count, total, p):
        return abs(count - total * p) < 5 * (total * p * (1 - p)) ** 0.5

    as_is = inputs == ids
    assert near(n, ids.numel(), 0.15)
    assert near(int((inputs == MASK_ID).sum()), n, 0.8)
    assert near(int((as_is & chosen).sum()), n, 0.1 + 0.1 / 256)
    changed = chosen & ~as_is & (inputs != MASK_ID)
    assert near(int(changed.sum()), n, 0.1 * 255 / 256)


def test_same_statistics_as_the_collator_of_transformers():
    """Two samples of 320,000; differences within five sigma of each share."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models

    vocab = {f"<{i}>": i for i in range(N_VOCAB)}
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocab, unk_token="<0>")),
        mask_token=f"<{MASK_ID}>",
        pad_token="<0>",
    )
    collate = transformers.DataCollatorForLanguageModeling(fast, mlm_probability=0.15)
    torch.manual_seed(0)
    ids = 1 + windows(1, 320_000)[0] % 255  # 0 pads, and is never chosen there
    theirs, asked = collate.torch_mask_tokens(
        ids.clone(), special_tokens_mask=torch.zeros_like(ids)
    )
    ours, labels = corrupt(ids, 0.15, generator(), random=0.1, keep=0.1)
    for mine, other in (
        (labels != IGNORE, asked != -100),
        (ours == MASK_ID, theirs == MASK_ID),
        ((labels != IGNORE) & (ours == ids), (asked != -100) & (theirs == ids)),
    ):
        p, q = mine.double().mean().item(), other.double().mean().item()
        assert abs(p - q) < 5 * (2 * p / ids.numel()) ** 0.5
    assert torch.equal(asked[asked != -100], ids[asked != -100])


@few
@given(rate=st.floats(0.05, 0.95), seed=st.integers(0, 2**31))
def test_a_hidden_byte_leaves_no_trace_in_the_input(rate, seed):
    ids = windows(3, 20, seed % 7)[0]
    inputs, labels = corrupt(ids, rate, generator(seed))
    hidden = labels != IGNORE
    other = torch.where(hidden, (ids + 1) % 256, ids)
    changed, asked = corrupt(other, rate, generator(seed))
    assert torch.equal(inputs, changed)
    assert torch.equal(asked != IGNORE, hidden)
    assert (inputs[hidden] == MASK_ID).all()
    assert torch.equal(labels[hidden], ids[hidden])
    assert torch.equal(inputs[~hidden], ids[~hidden])


@objectives
def test_no_position_sees_what_it_is_asked_for(objective, model):
    """Change one byte of the text: no logit that is asked for this byte moves."""
    model = model.double()
    x, y = windows(4)
    whole = torch.cat((x, y[:, -1:]), 1)
    before = example(objective, x, y, generator(1), rate=0.4)
    shift = 0 if objective == "masked" else 1
    logits = model(before.inputs, before.mask)
    for t in range(9):
        changed = whole.clone()
        changed[:, t] = (changed[:, t] + 1) % 256
        after = example(
            objective, changed[:, :-1], changed[:, 1:], generator(1), rate=0.4
        )
        at = t - shift
        if not 0 <= at < 8:
            continue
        asked = before.labels[:, at] != IGNORE
        moved = model(after.inputs, after.mask)[asked, at] - logits[asked, at]
        assert moved.abs().sum() == 0


def test_what_each_objective_asks():
    x, y = windows(64)
    causal = example("causal", x, y, generator())
    assert torch.equal(causal.labels, y)
    masked = example("masked", x, y, generator(), rate=0.4)
    assert masked.mask.all()
    assert 0.3 < (masked.labels != IGNORE).double().mean() < 0.5
    prefix = example("prefix", x, y, generator())
    n_asked = (prefix.labels != IGNORE).sum(1)
    assert set(n_asked.tolist()) <= set(range(2, 9))  # T - n + 1, n in 1..7
    lengths = 9 - n_asked
    assert torch.equal(prefix.mask, prefix_mask(lengths, 8))
    for row, n in zip(prefix.labels, lengths.tolist(), strict=True):
        assert (row[: n - 1] == IGNORE).all()
        assert (row[n - 1 :] != IGNORE).all()


def test_prefix_lengths_are_uniform():
    """Each of 7 lengths within five sigma of 1/7."""
    x, y = windows(7000)
    n = 9 - (example("prefix", x, y, generator()).labels != IGNORE).sum(1)
    counts = torch.bincount(n, minlength=8)[1:]
    assert (counts - 1000).abs().max() < 5 * (7000 / 7 * 6 / 7) ** 0.5


@objectives
def test_loss_equals_torchs_with_ignored_labels(objective, model):
    batch = example(objective, *windows(5), generator())
    logits = model(batch.inputs, batch.mask)
    expected = F.cross_entropy(
        logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE
    )
    torch.testing.assert_close(objective_loss(model, batch), expected)


def test_loss_ignores_what_is_visible(model):
    x, _ = windows(2)
    labels = torch.full_like(x, IGNORE)
    labels[0, 3] = 7
    full = torch.ones(8, 8, dtype=torch.bool)
    logits = model(x, full)
    loss = objective_loss(model, Example(x, labels, full))
    torch.testing.assert_close(loss, -logits[0, 3].log_softmax(-1)[7])
    nothing = Example(x, torch.full_like(x, IGNORE), full)
    assert objective_loss(model, nothing).item() == 0


@objectives
@pytest.mark.parametrize("at_end", [False, True])
def test_no_byte_of_the_hole_is_seen(objective, at_end, model):
    ids = windows(3)[0]
    start, end = (5, 8) if at_end else (3, 6)
    other = ids.clone()
    other[:, start:end] = (other[:, start:end] + 7) % 256
    first = hole_logits(model, objective, ids, start, end)
    assert torch.equal(first, hole_logits(model, objective, other, start, end))
    assert (first[:, 256:] == -math.inf).all()  # the mask is never an answer


def test_only_the_masked_model_uses_the_right_side(model):
    ids = windows(3)[0]
    other = ids.clone()
    other[:, 6:] = (other[:, 6:] + 7) % 256
    for objective in OBJECTIVES:
        a = hole_logits(model, objective, ids, 3, 6)
        b = hole_logits(model, objective, other, 3, 6)
        assert torch.equal(a, b) == (objective != "masked")


def test_causal_hole_losses_are_those_of_one_pass(model):
    ids = windows(3)[0]
    logits = model(ids)
    logits[..., 256:] = -math.inf
    expected = F.cross_entropy(logits[:, 2:6].mT, ids[:, 3:7], reduction="none")
    found = hole_losses(model, "causal", ids, 3, 4)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@objectives
def test_a_hole_is_a_distribution_over_its_bytes(objective, model):
    ids = windows(1)[0].repeat(256, 1)
    ids[:, 4] = torch.arange(256)
    losses = hole_losses(model, objective, ids, 4, 1)
    torch.testing.assert_close((-losses).exp().sum().item(), 1.0, rtol=1e-5, atol=0)


def test_masked_hole_shows_the_truth_to_the_left_and_masks_to_the_right(model):
    ids = windows(2)[0]
    shown = ids.clone()
    shown[:, 4:6] = MASK_ID  # byte 3 is known by now, bytes 4 and 5 are not
    full = torch.ones(8, 8, dtype=torch.bool)
    logits = model(shown, full)[:, 4]
    logits[:, 256:] = -math.inf
    expected = F.cross_entropy(logits, ids[:, 4], reduction="none")
    torch.testing.assert_close(hole_losses(model, "masked", ids, 3, 3)[:, 1], expected)


@objectives
def test_fill_takes_the_likeliest_and_leaves_the_rest(objective, model):
    ids = windows(3)[0]
    filled = fill(model, objective, ids, 3, 2)
    outside = torch.ones(8, dtype=torch.bool)
    outside[3:5] = False
    assert torch.equal(filled[:, outside], ids[:, outside])
    first = hole_logits(model, objective, ids, 3, 5).argmax(-1)
    assert torch.equal(filled[:, 3], first)
    half = ids.clone()
    half[:, 3] = first
    second = hole_logits(model, objective, half, 4, 5).argmax(-1)
    assert torch.equal(filled[:, 4], second)


@objectives
def test_each_objective_learns_a_text_that_repeats(objective):
    """In "abcabc…" one neighbour on either side decides every byte."""
    corpus = Corpus.of([byte_tensor("abc" * 200)])
    config = dataclasses.replace(RECIPE, steps=120, batch=16, context=8, warmup=20)
    model = small_gpt(0, dataclasses.replace(SMALL, context=8, d_model=16))
    losses = train_objective(model, corpus, objective, config)
    assert sum(losses[-5:]) / 5 < 0.25
    x = corpus.windows(8)[0][:4]
    assert torch.equal(fill(model, objective, x, 4, 1), x)


@objectives
def test_every_objective_draws_the_same_windows_and_repeats(objective):
    corpus = Corpus.of([byte_tensor("to be or not to be " * 20)])
    config = dataclasses.replace(RECIPE, steps=2, batch=4, context=8, warmup=1)
    runs = [
        train_objective(small_gpt(1, TINY), corpus, objective, config) for _ in range(2)
    ]
    assert runs[0] == runs[1]
    x, y = corpus.sample(4, 8, generator(config.seed))
    first = example(objective, x, y, generator(config.seed))
    loss = objective_loss(small_gpt(1, TINY), first).item()
    assert runs[0][0] == pytest.approx(loss, rel=1e-6)


def test_refusals(model):
    x, y = windows(2)
    with pytest.raises(ValueError, match=r"lengths must lie in 0..3; got \[4\]"):
        prefix_mask(torch.tensor([4]), 3)
    with pytest.raises(ValueError, match=r"rate must lie in \(0, 1\); got 0.0"):
        corrupt(x, 0.0, generator())
    with pytest.raises(ValueError, match="random and keep"):
        corrupt(x, 0.5, generator(), random=0.7, keep=0.7)
    with pytest.raises(ValueError, match="objective must be one of"):
        example("both", x, y, generator())
    with pytest.raises(ValueError, match="objective must be one of"):
        hole_logits(model, "both", x, 3, 4)
    with pytest.raises(ValueError, match=r"hole must lie within 1..8; got 0 to 2"):
        hole_logits(model, "causal", x, 0, 2)
    with pytest.raises(ValueError, match=r"got 7 to 9"):
        hole_losses(model, "masked", x, 7, 2)
