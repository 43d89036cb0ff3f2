"""The trainer: Part 2's loop when nothing is asked for, and the same after any stop."""

import os
import signal
from dataclasses import asdict, replace

import pytest
import torch
from torch import nn

from groundup.scaling import checkpointing
from groundup.scaling.recipe import TrainerConfig, Watch
from groundup.scaling.runs import recipe
from groundup.scaling.schedules import Schedule
from groundup.scaling.trainer import Trainer, fit
from groundup.training.batching import Corpus
from groundup.training.gpt import GPT, GPTConfig
from groundup.training.loop import TrainConfig, train
from groundup.training.loss import IGNORE

SHORT = TrainConfig(steps=6, batch=4, context=8, warmup=2, eval_every=2)
CONFIG = recipe(SHORT)
WATCH = Watch(eval_every=2, save_every=1)
DROPPING = GPTConfig(
    n_vocab=32, context=8, d_model=16, n_layers=1, n_heads=2, dropout=0.2
)


def corpus(seed):
    generator = torch.Generator().manual_seed(seed)
    return Corpus.of([torch.randint(32, (400,), generator=generator)])


TRAIN, HELD_OUT = corpus(0), corpus(1)


def model():
    """Fresh, and with it the generator that dropout draws from."""
    torch.manual_seed(7)
    return GPT(DROPPING)


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Notes:
    """A tracker that remembers."""

    def __init__(self):
        self.config, self.rows, self.closed = None, [], False

    def start(self, config):
        self.config = config

    def log(self, step, values):
        self.rows.append((step, dict(values)))

    def close(self):
        self.closed = True


def test_it_is_the_loop_of_part_2_bit_for_bit():
    """For so few tokens their sum does not round; `test_bench_trainer` has more."""
    ours, theirs = model(), model()
    torch.manual_seed(3)
    found = fit(ours, TRAIN, CONFIG, validation=HELD_OUT, watch=WATCH)
    torch.manual_seed(3)
    expected = train(theirs, TRAIN, SHORT, HELD_OUT)
    assert found.losses == expected.losses
    assert found.grad_norms == expected.grad_norms
    assert found.validation == expected.validation
    assert found.best_step == expected.best_step
    assert equal(ours.parameters(), theirs.parameters())
    assert same(found.best_state, expected.best_state)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("stop", [1, 3, 5])
def test_stopped_and_resumed_is_uninterrupted_bit_for_bit(optimizer, stop, tmp_path):
    """With dropout: the generators' states have to be right, too."""
    config = replace(CONFIG, optimizer=optimizer)
    whole, first, second = model(), model(), model()
    torch.manual_seed(3)
    expected = fit(whole, TRAIN, config, validation=HELD_OUT, watch=WATCH)
    more = {"validation": HELD_OUT, "watch": WATCH, "folder": tmp_path}
    torch.manual_seed(3)
    half = fit(first, TRAIN, config, stop_at=stop, **more)
    assert half.losses == expected.losses[:stop]
    torch.manual_seed(99)  # a new process knows nothing of the old one's generator
    found = fit(second, TRAIN, config, **more)
    assert found.losses == expected.losses
    assert found.validation == expected.validation
    assert equal(second.parameters(), whole.parameters())
    assert same(found.best_state, expected.best_state)


def test_a_finished_run_is_read_and_not_trained_on(tmp_path):
    first, second = model(), model()
    done = fit(first, TRAIN, CONFIG, folder=tmp_path)
    again = fit(second, TRAIN, CONFIG, folder=tmp_path)
    assert again.losses == done.losses
    assert equal(first.parameters(), second.parameters())


def test_micro_batches_are_the_big_batch():
    losses = []
    for pieces in (1, 2, 4):
        torch.manual_seed(7)
        double = GPT(replace(DROPPING, dropout=0.0)).double()
        config = replace(CONFIG, micro_batches=pieces)
        losses.append(fit(double, TRAIN, config).losses)
    assert losses[0] == pytest.approx(losses[1], abs=1e-12)
    assert losses[0] == pytest.approx(losses[2], abs=1e-12)


class Uneven:
    """Half of the rows count in one position only."""

    def sample(self, batch, context, generator):
        x, y = TRAIN.sample(batch, context, generator)
        y = y.clone()
        y[: batch // 2, 1:] = IGNORE
        return x, y


def test_the_loss_is_the_mean_over_the_targets_that_count():
    torch.manual_seed(7)
    double = GPT(replace(DROPPING, dropout=0.0)).double()
    x, y = Uneven().sample(4, 8, torch.Generator().manual_seed(CONFIG.seed))
    losses = nn.functional.cross_entropy(
        double(x).transpose(1, 2), y, ignore_index=IGNORE, reduction="none"
    )
    by_hand = losses.sum().item() / (2 * 1 + 2 * 8)
    config = replace(CONFIG, micro_batches=2)
    assert fit(double, Uneven(), config, stop_at=1).losses == pytest.approx([by_hand])


def signals_itself(number):
    """A model that gets a signal in its third forward pass."""
    sick, calls = model(), []
    real = sick.forward

    def forward(*args):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), number)
        return real(*args)

    sick.forward = forward
    return sick


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_update_saves_and_can_be_resumed(number, tmp_path):
    rare = Watch(save_every=100)
    torch.manual_seed(3)
    expected = fit(model(), TRAIN, CONFIG).losses
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt, match=r"after update 3 of 6; saved in"):
        fit(signals_itself(number), TRAIN, CONFIG, folder=tmp_path, watch=rare)
    assert signal.getsignal(number) == before
    assert checkpointing.load(checkpointing.latest(tmp_path)).step == 3
    assert len(fit(model(), TRAIN, CONFIG, folder=tmp_path, watch=rare).losses) == 6
    assert len(expected) == 6


def test_without_a_folder_ctrl_c_is_what_it_always_is():
    with pytest.raises(KeyboardInterrupt) as stopped:
        fit(signals_itself(signal.SIGINT), TRAIN, CONFIG)
    assert "saved" not in str(stopped.value)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"lr": 0.5}, r"lr=0.003; got 0.5"),
        ({"schedule": Schedule(7, warmup=2)}, "schedule="),
        ({"seed": 1}, "seed=0; got 1"),
    ],
)
def test_another_recipe_is_refused_by_field(change, named, tmp_path):
    fit(model(), TRAIN, CONFIG, folder=tmp_path, stop_at=1)
    with pytest.raises(ValueError, match=named):
        fit(model(), TRAIN, replace(CONFIG, **change), folder=tmp_path)


def test_another_tokenizer_or_model_is_refused(tmp_path):
    fit(model(), TRAIN, CONFIG, folder=tmp_path, stop_at=1, tokenizer="bytes")
    with pytest.raises(ValueError, match="the tokenizer 'bytes'; got 'words'"):
        fit(model(), TRAIN, CONFIG, folder=tmp_path, tokenizer="words")
    wider = GPT(replace(DROPPING, d_model=32))
    before = [p.clone() for p in wider.parameters()]
    with pytest.raises(ValueError, match="must have shape"):
        fit(wider, TRAIN, CONFIG, folder=tmp_path, tokenizer="bytes")
    assert equal(before, wider.parameters())


def test_a_loss_that_is_not_finite_stops_before_the_update():
    sick = model()
    trainer = Trainer(sick, TRAIN, CONFIG)
    trainer.update()
    with torch.no_grad():
        sick.final_norm.weight.fill_(float("nan"))
    before = [p.clone() for p in sick.parameters()]
    with pytest.raises(FloatingPointError, match="update 1: loss nan"):
        trainer.update()
    for old, new in zip(before, sick.parameters(), strict=True):
        torch.testing.assert_close(old, new, rtol=0, atol=0, equal_nan=True)
    assert trainer.step == 1


def test_trackers_get_the_config_and_every_update(tmp_path):
    notes = Notes()
    history = fit(
        model(), TRAIN, CONFIG, validation=HELD_OUT, watch=WATCH, trackers=(notes,)
    )
    assert notes.config == {**asdict(CONFIG), "how": "none", "processes": 1}
    losses = [(step, row["loss"]) for step, row in notes.rows if "loss" in row]
    assert losses == list(enumerate(history.losses, 1))
    held_out = {
        s: r["validation_loss"] for s, r in notes.rows if "validation_loss" in r
    }
    assert held_out == history.validation
    assert [row["rate"] for _, row in notes.rows if "rate" in row][:2] == [
        CONFIG.lr / 2,
        CONFIG.lr,
    ]
    assert notes.closed


def test_trackers_are_closed_when_a_run_fails():
    notes, broken = Notes(), Corpus.of([torch.arange(4)])
    with pytest.raises(ValueError, match="context"):
        fit(model(), broken, CONFIG, trackers=(notes,))
    assert notes.closed


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_left_as_it_was_found_and_dropout_was_on(training):
    usual, found = model(), model().train(training)
    torch.manual_seed(3)
    expected = fit(usual, TRAIN, CONFIG)
    torch.manual_seed(3)
    history = fit(found, TRAIN, CONFIG, validation=HELD_OUT, watch=WATCH)
    assert all(module.training == training for module in found.modules())
    assert history.losses == expected.losses


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("batch", 0, "batch must be at least 1; got 0"),
        ("micro_batches", 3, "micro_batches must divide batch=16; got 3"),
        ("lr", 0.0, "lr must be positive; got 0.0"),
        ("weight_decay", -0.1, "weight_decay must not be negative; got -0.1"),
        ("optimizer", "sgd", "optimizer must be one of adamw, muon; got 'sgd'"),
        ("dtype", "half", "dtype must be one of float32, bfloat16; got 'half'"),
    ],
)
def test_a_bad_field_is_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        TrainerConfig(**{field: value})


def test_watch_refuses_nothing_to_keep():
    with pytest.raises(ValueError, match="keep must be at least 1; got 0"):
        Watch(keep=0)
