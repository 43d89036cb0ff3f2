"""Trackers read back: by their own readers, by json, and through a stub of wandb."""

import json
import math
import sys
import types
from contextlib import closing

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from groundup.modern.decoder import Decoder, DecoderConfig
from groundup.scaling.recipe import TrainerConfig, Watch
from groundup.scaling.schedules import Schedule
from groundup.scaling.tracking import (
    JsonLines,
    TensorBoard,
    Trackers,
    WandB,
    read_json_lines,
)
from groundup.scaling.trainer import fit
from groundup.training.batching import Corpus

NOT_FINITE = {"up": math.inf, "down": -math.inf, "none": math.nan}


def write(tracker, points, config=None):
    """Log one value a step, under the name loss."""
    with closing(tracker):
        tracker.start(config or {})
        for step, value in points:
            tracker.log(step, {"loss": value})


def events(folder):
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    return found.Reload()


def scalars(folder, name):
    return [(e.step, e.value) for e in events(folder).Scalars(name)]


# JSON lines


def test_json_lines_by_hand(tmp_path):
    path = tmp_path / "made" / "run.jsonl"
    with closing(JsonLines(path)) as tracker:
        tracker.start({"lr": 0.5, "sizes": (1, 2), "clip": math.inf, "at": tmp_path})
        tracker.log(0, {"loss": 5.5})
        tracker.log(3, {"loss": 2.25, "norm": math.nan})
    assert path.read_text() == (
        '{"config": {"lr": 0.5, "sizes": [1, 2], "clip": "Infinity", '
        f'"at": "{tmp_path}"}}}}\n'
        '{"step": 0, "loss": 5.5}\n'
        '{"step": 3, "loss": 2.25, "norm": "NaN"}\n'
    )
    curves = read_json_lines(path)
    assert curves["loss"] == {0: 5.5, 3: 2.25}
    assert math.isnan(curves["norm"][3])


def test_a_line_is_on_disk_as_soon_as_it_is_logged(tmp_path):
    tracker = JsonLines(tmp_path / "run.jsonl")
    tracker.start({})
    for step in range(3):
        tracker.log(step, {"loss": 1.0})
        assert list(read_json_lines(tmp_path / "run.jsonl")["loss"])[-1] == step
    tracker.close()


@settings(max_examples=60)
@given(values=st.lists(st.floats(width=64), min_size=1, max_size=8))
def test_json_lines_keep_every_float_and_are_strict_json(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("runs") / "run.jsonl"
    write(JsonLines(path), list(enumerate(values)))

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    back = [read_json_lines(path)["loss"][step] for step in range(len(values))]
    assert repr(back) == repr(values)  # NaN is NaN, -0.0 is not 0.0


resumes = st.lists(
    st.tuples(st.integers(0, 9), st.integers(1, 6)), min_size=1, max_size=4
)


@settings(max_examples=60)
@given(sessions=resumes)
def test_a_resumed_run_has_no_step_twice(tmp_path_factory, sessions):
    """Against a dictionary from which each session first takes what lies after it."""
    path = tmp_path_factory.mktemp("runs") / "run.jsonl"
    expected, value = {}, 0.0
    for first, length in sessions:
        expected = {s: v for s, v in expected.items() if s < first}
        points = [(first + i, value + i) for i in range(length)]
        expected |= dict(points)
        write(JsonLines(path), points, {"session": first})
        value += length
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    steps = [line["step"] for line in lines if "step" in line]
    assert steps == sorted(set(steps))
    assert read_json_lines(path)["loss"] == expected
    assert sum("config" in line for line in lines) == len(sessions)


def test_half_a_line_of_a_killed_run_is_dropped(tmp_path):
    path = tmp_path / "run.jsonl"
    write(JsonLines(path), [(0, 5.0), (1, 4.0)])
    path.write_text(path.read_text() + '{"step": 2, "lo')
    write(JsonLines(path), [(2, 3.0)])
    assert read_json_lines(path) == {"loss": {0: 5.0, 1: 4.0, 2: 3.0}}


@pytest.mark.parametrize("line", ["{", "[1]", "7", ""])
def test_a_damaged_line_is_named(tmp_path, line):
    path = tmp_path / "run.jsonl"
    path.write_text(f'{{"step": 0, "loss": 1.0}}\n{line}\n')
    with pytest.raises(ValueError, match=r"run\.jsonl: not a JSON object"):
        read_json_lines(path)


# TensorBoard


def test_event_files_hold_values_steps_and_config(tmp_path):
    values = {0: 5.545, 10: 3.25, 20: 2.5}
    with closing(TensorBoard(tmp_path)) as tracker:
        tracker.start({"lr": 0.01, "note": "a | b\nc"})
        for step, value in values.items():
            tracker.log(step, {"train/loss": value, "rate": value / 5})
    found = events(tmp_path)
    assert found.Tags()["scalars"] == ["train/loss", "rate"]
    assert [e.step for e in found.Scalars("train/loss")] == list(values)
    assert [e.value for e in found.Scalars("rate")] == [
        torch.tensor(v / 5).item() for v in values.values()
    ]
    text = found.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert text.splitlines() == [
        "| name | value |",
        "|:--|:--|",
        "| lr | 0.01 |",
        "| note | a \\| b c |",
    ]


def test_event_files_sort_by_name_as_they_were_written(tmp_path):
    # A name ends with a counter that is not padded: within a second, 10 is before 9.
    for _ in range(2):
        write(TensorBoard(tmp_path), [(0, 1.0)])
    seconds = [path.name.split(".")[3] for path in tmp_path.iterdir()]
    assert len(set(seconds)) == 2


def test_event_files_of_a_resumed_run_forget_the_steps_that_are_repeated(tmp_path):
    write(TensorBoard(tmp_path), [(s, 1.0) for s in range(8)])
    write(TensorBoard(tmp_path), [(s, 2.0) for s in range(5, 10)])
    assert scalars(tmp_path, "loss") == [
        *((s, 1.0) for s in range(5)),
        *((s, 2.0) for s in range(5, 10)),
    ]


def test_a_config_without_a_step_is_written_too(tmp_path):
    write(TensorBoard(tmp_path), [], {"lr": 0.1})
    assert events(tmp_path).Tags()["tensors"] == ["config/text_summary"]


# Weights & Biases


class StubRun:
    def __init__(self, calls):
        self.calls = calls

    def log(self, values, step):
        self.calls.append(("log", values, step))

    def finish(self):
        self.calls.append(("finish",))


@pytest.fixture
def wandb_calls(monkeypatch):
    calls, module = [], types.ModuleType("wandb")

    def init(**arguments):
        calls.append(("init", arguments))
        return StubRun(calls)

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return calls


def test_wandb_is_called_as_its_documentation_says(wandb_calls):
    write(WandB("plays", run_id="seven"), [(0, 5.0), (4, 2.0)], {"lr": 0.1})
    assert wandb_calls == [
        (
            "init",
            {
                "project": "plays",
                "id": "seven",
                "resume": "allow",
                "config": {"lr": 0.1},
            },
        ),
        ("log", {"loss": 5.0}, 0),
        ("log", {"loss": 2.0}, 4),
        ("finish",),
    ]


def test_without_wandb_the_message_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # import then raises
    with pytest.raises(ImportError, match=r"pip install groundup\[wandb\]"):
        WandB("plays")


# What all have in common

KINDS = {
    "lines": lambda folder: JsonLines(folder / "run.jsonl"),
    "tensorboard": lambda folder: TensorBoard(folder / "events"),
    "wandb": lambda folder: WandB("plays"),
}
each_kind = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)


@each_kind
def test_refuses_the_wrong_order(make, tmp_path, wandb_calls):
    tracker = make(tmp_path)
    with pytest.raises(RuntimeError, match="call start before log"):
        tracker.log(0, {"loss": 1.0})
    tracker.start({})
    with pytest.raises(RuntimeError, match="start was called before close"):
        tracker.start({})
    tracker.log(3, {"loss": 1.0})
    tracker.log(3, {"validation": 1.0})  # a second call for a step
    for step in (2, -1):
        with pytest.raises(ValueError, match=f"got {step} after 3"):
            tracker.log(step, {"loss": 1.0})
    tracker.close()
    tracker.close()  # does no harm
    with pytest.raises(RuntimeError, match="log before close"):
        tracker.log(4, {"loss": 1.0})


@each_kind
def test_numbers_that_are_not_finite_are_logged(make, tmp_path, wandb_calls):
    tracker = make(tmp_path)
    with closing(tracker):
        tracker.start({"limit": math.inf})
        tracker.log(2, NOT_FINITE)
    if isinstance(tracker, JsonLines):
        found = {n: c[2] for n, c in read_json_lines(tracker.path).items()}
    elif isinstance(tracker, TensorBoard):
        found = {n: scalars(tracker.folder, n)[0][1] for n in NOT_FINITE}
    else:
        found = wandb_calls[1][1]
    assert repr(found) == repr(NOT_FINITE)


def test_two_values_of_a_step_are_both_kept(tmp_path):
    with closing(
        Trackers(*(KINDS[k](tmp_path) for k in ("lines", "tensorboard")))
    ) as t:
        t.start({})
        t.log(5, {"loss": 2.0})
        t.log(5, {"validation": 3.0})
    curves = read_json_lines(tmp_path / "run.jsonl")
    assert curves == {"loss": {5: 2.0}, "validation": {5: 3.0}}
    assert scalars(tmp_path / "events", "loss") == [(5, 2.0)]
    assert scalars(tmp_path / "events", "validation") == [(5, 3.0)]


class Recorder:
    def __init__(self, name, calls, fails=False):
        self.name, self.calls, self.fails = name, calls, fails

    def start(self, config):
        self.calls.append((self.name, "start", config))

    def log(self, step, values):
        self.calls.append((self.name, step, values))

    def close(self):
        self.calls.append((self.name, "close"))
        if self.fails:
            raise OSError(f"{self.name}: disk full")


def test_several_trackers_hear_the_same():
    calls = []
    write(Trackers(Recorder("a", calls), Recorder("b", calls)), [(1, 2.0)], {"lr": 1})
    assert calls == [
        ("a", "start", {"lr": 1}),
        ("b", "start", {"lr": 1}),
        ("a", 1, {"loss": 2.0}),
        ("b", 1, {"loss": 2.0}),
        ("b", "close"),
        ("a", "close"),
    ]
    write(Trackers(), [(1, 2.0)])  # none at all is fine


def test_all_are_closed_when_one_fails():
    calls = []
    many = [Recorder("a", calls), Recorder("b", calls, fails=True)]
    with pytest.raises(OSError, match="b: disk full"):
        Trackers(*many).close()
    assert calls == [("b", "close"), ("a", "close")]


class Breaks(Recorder):
    """A disk that is full from the sixth update on."""

    def log(self, step, values):
        if step > 5:
            raise OSError("disk full")


def test_the_trainer_resumed_logs_every_update_once(tmp_path):
    """Killed after update 5, resumed from the checkpoint of 3; as if never killed."""
    config = TrainerConfig(Schedule(8, warmup=2), batch=2, context=6)
    corpus = Corpus.of([torch.arange(50) % 7])

    def run(path, folder, *more):
        torch.manual_seed(0)
        model = Decoder(DecoderConfig(n_vocab=7, d_model=8, n_layers=1, n_heads=1))
        many = (*more, JsonLines(path), TensorBoard(path.with_suffix("")))
        watch = Watch(save_every=3)
        fit(model, corpus, config, watch=watch, folder=folder, trackers=many)

    killed, whole = tmp_path / "killed.jsonl", tmp_path / "whole.jsonl"
    with pytest.raises(OSError, match="disk full"):
        run(killed, tmp_path / "a", Breaks("breaks", []))
    assert list(read_json_lines(killed)["loss"]) == [1, 2, 3, 4, 5]
    run(killed, tmp_path / "a")
    run(whole, tmp_path / "b")
    for name in ("loss", "grad_norm", "rate"):
        expected = read_json_lines(whole)[name]
        assert list(expected) == list(range(1, 9))
        assert read_json_lines(killed)[name] == expected
        points = scalars(killed.with_suffix(""), name)
        assert points == scalars(whole.with_suffix(""), name)
