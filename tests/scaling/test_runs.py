"""Run folders: what is written is what is read, whole or not at all."""

import json
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from groundup.modern.decoder import DecoderConfig
from groundup.scaling import runs
from groundup.scaling.recipe import TrainerConfig, Watch
from groundup.scaling.runs import (
    DecoderRun,
    GPTRun,
    build,
    continue_text,
    load_run,
    own_text,
    read_config,
    recipe,
    train_run,
)
from groundup.scaling.schedules import Schedule, share
from groundup.scaling.tracking import read_json_lines
from groundup.training.gpt import GPTConfig
from groundup.training.loop import TINY_RUN, learning_rate
from groundup.training.sampling import SamplingConfig

TEXT = "the cat sat on the mat. " * 40  # 960 bytes
SHORT = TrainerConfig(Schedule(3, warmup=1), batch=2, context=8)
OFTEN = Watch(eval_every=2, eval_windows=None, save_every=1)
SIZES = {"d_model": 16, "n_layers": 1, "n_heads": 2}
RUNS = {
    "gpt": GPTRun(GPTConfig(context=8, **SIZES), SHORT, OFTEN),
    "modern": DecoderRun(DecoderConfig(tied=False, **SIZES), SHORT, OFTEN),
    "modern, tied": DecoderRun(DecoderConfig(tied=True, **SIZES), SHORT, OFTEN),
}


@pytest.fixture(params=RUNS)
def run(request):
    return RUNS[request.param]


@pytest.fixture
def folder(run, tmp_path):
    train_run(run, tmp_path / "run", TEXT, progress=False)
    return tmp_path / "run"


def test_the_folder_holds_config_metrics_weights_and_a_sample(run, folder):
    files = ["config.json", "metrics.jsonl", "model.safetensors", "samples.txt"]
    names = sorted([*files, "checkpoints", "tensorboard"])
    assert sorted(path.name for path in folder.iterdir()) == names
    curves = read_json_lines(folder / "metrics.jsonl")
    assert list(curves["loss"]) == list(curves["grad_norm"]) == [1, 2, 3]
    assert list(curves["validation_loss"]) == [2, 3]
    assert read_config(json.loads((folder / "config.json").read_text())) == run
    assert len((folder / "samples.txt").read_text()) > 20


def test_the_model_that_is_read_is_the_one_with_the_lowest_validation_loss(
    run, tmp_path
):
    history = train_run(run, tmp_path / "run", TEXT, progress=False)
    model = load_run(tmp_path / "run")
    assert not model.training
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, history.best_state[name], rtol=0, atol=0)


def test_the_same_run_twice_gives_the_same_files(run, tmp_path):
    for name in ("a", "b"):
        train_run(run, tmp_path / name, TEXT, progress=False)
    a, b = tmp_path / "a", tmp_path / "b"
    for file in ("config.json", "model.safetensors", "samples.txt"):
        assert (a / file).read_bytes() == (b / file).read_bytes(), file
    curves = [read_json_lines(folder / "metrics.jsonl") for folder in (a, b)]
    assert curves[0]["loss"] == curves[1]["loss"]


def test_an_existing_folder_is_never_touched(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious").write_text("x")
    with pytest.raises(FileExistsError, match="mine exists already"):
        train_run(RUNS["gpt"], tmp_path / "mine", TEXT, progress=False)
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["precious"]


def test_a_run_that_could_not_begin_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(runs.os, "rename", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train_run(RUNS["gpt"], tmp_path / "out" / "run", TEXT, progress=False)
    assert list((tmp_path / "out").iterdir()) == []


def interrupted(run, folder, stage):
    """Begin a run that is stopped where it would call `runs.STAGE`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, stage, Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train_run(run, folder, TEXT, progress=False)


@pytest.mark.parametrize("stage", ["save_model", "continue_text"])
def test_an_interrupted_run_goes_on_to_the_same_weights(run, stage, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train_run(run, whole, TEXT, progress=False)
    interrupted(run, broken, stage)
    with pytest.raises(FileNotFoundError, match="not finished"):
        load_run(broken)
    train_run(run, broken, TEXT, progress=False)
    for file in ("model.safetensors", "samples.txt"):
        assert (broken / file).read_bytes() == (whole / file).read_bytes()


def test_a_begun_run_goes_on_with_its_own_config_alone(tmp_path):
    run, out = RUNS["modern"], tmp_path / "run"
    interrupted(run, out, "save_model")
    other = replace(run, train=replace(SHORT, lr=0.5))
    with pytest.raises(ValueError, match=r"begun with train=.*0.003.* got .*0.5"):
        train_run(other, out, TEXT, progress=False)
    with pytest.raises(ValueError, match=r"begun with text="):
        train_run(run, out, TEXT + "more", progress=False)


def test_a_finished_run_is_not_begun_again(run, folder):
    with pytest.raises(FileExistsError, match="exists already"):
        train_run(run, folder, TEXT, progress=False)


def test_the_recipe_of_part_2_is_the_trainers():
    new = recipe(TINY_RUN)
    for step in range(0, TINY_RUN.steps + 2, 7):
        rate = new.lr * share(step, new.schedule)
        assert rate == pytest.approx(learning_rate(step, TINY_RUN), rel=1e-12)
    for name in ("batch", "context", "weight_decay", "clip", "dtype", "seed"):
        assert getattr(new, name) == getattr(TINY_RUN, name)


def test_a_text_shorter_than_a_window_is_refused_with_what_is_needed():
    """Context 8: nine bytes for validation, a tenth of the text, so 90 in all."""
    with pytest.raises(ValueError, match=r"holds 80 bytes; .*context=8 need .* 90"):
        own_text("x" * 80, 8)
    train, validation = own_text("x" * 90, 8)
    assert (len(train), len(validation)) == (81, 9)


def test_own_text_is_cut_without_overlap():
    train, validation = own_text(TEXT, 8)
    joined = torch.cat((train.tokens, validation.tokens))
    assert bytes(joined.tolist()).decode() == TEXT


def test_a_window_beyond_the_gpts_context_is_refused(tmp_path):
    run = GPTRun(GPTConfig(context=4, **SIZES), SHORT, OFTEN)
    with pytest.raises(ValueError, match=r"at most model.context=4; got 8"):
        train_run(run, tmp_path / "run", TEXT, progress=False)


def change_config(folder, change):
    path = folder / "config.json"
    stored = json.loads(path.read_text())
    change(stored)
    path.write_text(json.dumps(stored))


def test_an_unknown_field_is_refused_by_name(folder):
    change_config(folder, lambda stored: stored["model"].update(d_modell=32))
    with pytest.raises(ValueError, match=r"model.d_modell is no field .* d_model"):
        load_run(folder)


def test_an_unknown_family_is_refused(folder):
    change_config(folder, lambda stored: stored.update(family="rnn"))
    with pytest.raises(ValueError, match=r"family must be one of .*gpt.* got 'rnn'"):
        load_run(folder)


def test_another_tokenizer_is_refused(folder):
    change_config(folder, lambda stored: stored.update(tokenizer="0" * 64))
    with pytest.raises(ValueError, match=r"tokenizer must have the digest 0000"):
        load_run(folder)


def test_weights_of_another_shape_are_refused_by_name(folder):
    change_config(folder, lambda stored: stored["model"].update(d_model=32))
    with pytest.raises(ValueError, match=r"must have shape \(.*32.*; got \(.*16"):
        load_run(folder)


def test_a_missing_tensor_is_refused_by_name(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["embed.weight"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"embed.weight must have shape .* got None"):
        load_run(folder)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("config.json", "not a run folder"), ("model.safetensors", "not finished")],
)
def test_a_folder_without_a_finished_run_is_refused(folder, name, reason):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{reason}: it has no {name}"):
        load_run(folder)


def test_text_goes_on_the_same_with_the_same_seed(run):
    torch.manual_seed(0)
    model = build(run).train()
    texts = [
        continue_text(model, "to be", 12, SamplingConfig(temperature=2.0), seed)
        for seed in (0, 0, 1)
    ]
    assert texts[0] == texts[1] != texts[2]
    assert model.training
    with pytest.raises(ValueError, match="at least one byte"):
        continue_text(model, "", 3, SamplingConfig())


def test_greedy_text_is_the_models_argmax(run):
    torch.manual_seed(1)
    model = build(run)
    text = continue_text(model, "abc", 1, SamplingConfig(temperature=0.0))
    best = model(torch.tensor([list(b"abc")]))[0, -1].argmax().item()
    assert text == bytes([best]).decode(errors="replace")


def test_the_presets_are_valid_and_named_after_their_models():
    assert set(runs.PRESETS) == {"gpt-tiny", "modern-tiny"}
    assert isinstance(runs.PRESETS["gpt-tiny"], GPTRun)
    longer = replace(runs.PRESETS["modern-tiny"], train=SHORT)
    assert build(longer).config == runs.PRESETS["modern-tiny"].model
