"""The loop against torch's optimizer, a table of rates, and its own promises."""

import copy
import dataclasses
import io
import math
from contextlib import redirect_stderr
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from groundup.training.batching import Corpus
from groundup.training.gpt import GPT, TINY, GPTConfig
from groundup.training.loop import (
    TINY_RUN,
    TrainConfig,
    in_mode,
    learning_rate,
    train,
    window_losses,
)

SIZES = GPTConfig(n_vocab=11, context=8, d_model=16, n_layers=1, n_heads=2)
RUN = TrainConfig(
    steps=6, batch=3, context=8, lr=1e-2, warmup=2, eval_every=4, eval_windows=5
)


def gpt(seed=0, **changes):
    torch.manual_seed(seed)
    return GPT(dataclasses.replace(SIZES, **changes))


def corpus(seed=0, n=200):
    generator = torch.Generator().manual_seed(seed)
    return Corpus.of([torch.randint(11, (n,), generator=generator)])


def test_rates_by_hand():
    """Four updates up to 1, then half a cosine from 1 to 0.2 over four more.

    At a third and two thirds of the way (1 + cos) / 2 is 3/4 and 1/4: 0.2 + 0.8 · 3/4.
    """
    config = TrainConfig(steps=8, lr=1.0, lr_end=0.2, warmup=4)
    found = [learning_rate(step, config) for step in range(11)]
    expected = [0.25, 0.5, 0.75, 1.0, 1.0, 0.8, 0.4, 0.2, 0.2, 0.2, 0.2]
    assert found == pytest.approx(expected, abs=1e-15)


@given(
    steps=st.integers(1, 300),
    share=st.floats(0, 1),
    lr=st.floats(1e-6, 1.0),
    lr_end=st.floats(0, 1),
)
@settings(max_examples=100, deadline=None)
def test_rates_rise_fall_and_stay(steps, share, lr, lr_end):
    warmup = int(share * steps)
    config = TrainConfig(steps=steps, lr=lr, lr_end=lr_end, warmup=warmup)
    rates = [learning_rate(step, config) for step in range(steps + 50)]
    assert all(0 <= rate <= lr * (1 + 1e-12) for rate in rates)
    assert all(a < b for a, b in pairwise(rates[:warmup]))
    assert all(a >= b - 1e-15 for a, b in pairwise(rates[warmup:]))
    last = lr * lr_end if steps - warmup > 1 else lr
    assert rates[steps - 1] == pytest.approx(last, abs=1e-15)
    assert set(rates[steps:]) == {rates[steps - 1]}  # constant after the end


def test_equals_the_same_loop_with_torchs_parts():
    """The whole loop again from torch.optim, clip_grad_norm_ and LambdaLR."""
    ours, theirs = gpt().double(), gpt().double()
    history = train(ours, corpus(), dataclasses.replace(RUN, steps=20, warmup=5))
    config = dataclasses.replace(RUN, steps=20, warmup=5)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in theirs.parameters() if p.dim() >= 2]},
            {"params": [p for p in theirs.parameters() if p.dim() < 2]},
        ],
        lr=1.0,
        betas=(0.9, 0.99),
        weight_decay=0.1,
    )
    optimizer.param_groups[1]["weight_decay"] = 0.0
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate(step, config)
    )
    generator = torch.Generator().manual_seed(0)
    for step in range(20):
        x, y = corpus().sample(3, 8, generator)
        loss = F.cross_entropy(theirs(x).flatten(0, 1).float(), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(theirs.parameters(), config.clip)
        optimizer.step()
        schedule.step()
        assert history.losses[step] == pytest.approx(loss.item(), rel=1e-5)
        assert history.grad_norms[step] == pytest.approx(norm.item(), rel=1e-4)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_two_runs_give_the_same_bits_and_another_seed_other_batches():
    first, second = gpt(), gpt()
    losses = [train(m, corpus(), RUN, corpus(1)).losses for m in (first, second)]
    assert losses[0] == losses[1]
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    other = train(gpt(), corpus(), dataclasses.replace(RUN, seed=1))
    assert other.losses[0] != losses[0][0]


def test_batches_depend_on_the_seed_alone():
    """Not on the model, nor on validation in between, nor on the global generator."""
    plain = train(gpt(), corpus(), RUN)
    model = gpt()
    torch.manual_seed(99)
    validated = train(
        model, corpus(), dataclasses.replace(RUN, eval_every=1), corpus(1)
    )
    assert plain.losses == validated.losses


def test_stale_gradients_do_not_count():
    clean, stale = gpt(), gpt()
    stale(torch.zeros(1, 8, dtype=torch.long)).sum().backward()
    train(clean, corpus(), RUN)
    train(stale, corpus(), RUN)
    for a, b in zip(clean.parameters(), stale.parameters(), strict=True):
        assert torch.equal(a, b)


class Spy(nn.Module):
    """A GPT that writes down the mode of its dropout at each call."""

    def __init__(self, model):
        super().__init__()
        self.model, self.seen = model, []

    def forward(self, ids):
        modes = {m.training for m in self.model.modules() if "Drop" in type(m).__name__}
        self.seen.append(modes)
        return self.model(ids)


def test_dropout_is_on_in_training_off_in_validation_and_on_again():
    spy = Spy(gpt(dropout=0.2))
    config = dataclasses.replace(RUN, steps=4, eval_every=2)
    train(spy, corpus(), config, corpus(1))
    on, off = {True}, {False}
    assert spy.seen == [on, on, off, on, on, off]


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_left_as_it_was_found(training):
    model = gpt(dropout=0.2).train(training)
    train(model, corpus(), RUN, corpus(1))
    assert {m.training for m in model.modules()} == {training}
    window_losses(model, *corpus(1).windows(8))
    assert {m.training for m in model.modules()} == {training}


def test_a_part_that_was_frozen_in_another_mode_stays_so():
    model = gpt(dropout=0.2).train()
    model.dropout.eval()
    with in_mode(model, training=False):
        assert not any(m.training for m in model.modules())
    assert not model.dropout.training
    assert model.training
    assert model.blocks[0].attention.dropout.training


def test_the_mode_is_put_back_after_an_error():
    model = gpt().eval()
    with pytest.raises(ZeroDivisionError), in_mode(model, training=True):
        raise ZeroDivisionError
    assert not any(m.training for m in model.modules())


def test_losses_of_windows_by_hand_for_a_uniform_model():
    """All logits equal: every token costs ln V, whatever it is."""
    model = gpt()
    with torch.no_grad():
        model.embed.weight.zero_()
    x, y = corpus(n=1000).windows(8)
    assert len(x) > 64  # more than one chunk
    losses = window_losses(model, x, y)
    torch.testing.assert_close(losses, torch.full_like(losses, math.log(11)))


def test_losses_of_windows_equal_cross_entropy_at_each_place():
    model = gpt().double()
    x, y = corpus(n=1000).windows(8)
    losses = window_losses(model, x, y)
    logp = model(x).log_softmax(-1)
    expected = -logp.gather(-1, y[..., None])[..., 0]
    torch.testing.assert_close(losses, expected)
    assert not losses.requires_grad


def test_validation_and_best_weights():
    model = gpt()
    held_out = corpus(1)
    history = train(model, corpus(), RUN, held_out)
    assert list(history.validation) == [4, 6]  # every 4, and after the last
    x, y = (part[:5] for part in held_out.windows(8))
    assert history.validation[6] == window_losses(model, x, y).mean().item()
    best = min(history.validation, key=history.validation.get)
    assert history.best_step == best
    assert history.best_loss == history.validation[best]
    model.load_state_dict(history.best_state)
    assert window_losses(model, x, y).mean().item() == history.best_loss


def test_the_best_weights_are_those_of_the_lowest_loss_not_the_last():
    """Twenty random tokens, learned by heart, make other random text dearer."""
    model = gpt()
    config = dataclasses.replace(RUN, steps=60, lr=3e-2, eval_every=10)
    history = train(model, corpus(n=20), config, corpus(1))
    assert history.best_step < 60
    assert history.best_loss < history.validation[60]
    final = copy.deepcopy(model.state_dict())
    assert any(not torch.equal(final[n], history.best_state[n]) for n in final)


def test_without_validation_there_is_no_best():
    history = train(gpt(), corpus(), RUN)
    assert history.validation == {}
    assert history.best_state is None
    assert math.isnan(history.best_loss)


def test_learns_what_follows_what():
    """A cycle of 11 tokens: after a few updates the next one is certain."""
    model = gpt()
    cycle = Corpus.of([torch.arange(220) % 11])
    history = train(model, cycle, dataclasses.replace(RUN, steps=120, lr=3e-2))
    assert abs(history.losses[0] - math.log(11)) < 0.1
    assert history.losses[-1] < 0.05


def test_bfloat16_is_close_to_float32_and_leaves_the_weights_in_float32():
    model = gpt()
    rough = train(model, corpus(), dataclasses.replace(RUN, dtype="bfloat16"))
    exact = train(gpt(), corpus(), RUN)
    assert rough.losses != exact.losses
    assert rough.losses == pytest.approx(exact.losses, rel=0.02)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_loss_that_is_no_number_stops_the_run():
    model = gpt().eval()
    with torch.no_grad():
        model.embed.weight[0, 0] = math.nan
    with pytest.raises(FloatingPointError, match="update 0: loss nan"):
        train(model, corpus(), RUN)
    assert not model.training


def test_an_infinite_gradient_stops_the_run_before_the_weights_are_lost():
    model = gpt()
    model.final_norm.bias.register_hook(lambda grad: grad * math.inf)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(FloatingPointError, match=r"gradient (inf|nan)"):
        train(model, corpus(), RUN)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_progress_is_shown_on_request_only():
    for progress, expected in ((True, "6/6"), (False, "")):
        with redirect_stderr(io.StringIO()) as screen:
            train(gpt(), corpus(), RUN, progress=progress)
        assert expected in screen.getvalue()
    assert screen.getvalue() == ""


def test_the_recipe_of_the_book_fits_its_model():
    assert TINY_RUN.context == TINY.context


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 0}, "steps must be at least 1; got 0"),
        ({"batch": 0}, "batch must be at least 1; got 0"),
        ({"eval_every": 0}, "eval_every must be at least 1; got 0"),
        ({"lr": 0.0}, "lr must be positive; got 0.0"),
        ({"clip": math.nan}, "clip must be positive; got nan"),
        ({"lr_end": 1.1}, r"lr_end must lie in \[0, 1\]; got 1.1"),
        ({"steps": 5, "warmup": 6}, r"warmup must lie in 0\.\.steps=5; got 6"),
        ({"weight_decay": -1.0}, "weight_decay must not be negative; got -1.0"),
        ({"dtype": "float16"}, "dtype must be one of .*; got 'float16'"),
    ],
)
def test_config_names_the_bad_field(fields, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**fields)


def test_a_text_shorter_than_a_window_is_refused():
    with pytest.raises(ValueError, match="context must be at least 1 and below"):
        train(gpt(), corpus(n=8), RUN)
