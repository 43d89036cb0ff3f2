"""`torchrun -m groundup train` with two processes against `train_run` with one."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from groundup.modern.decoder import Decoder, DecoderConfig
from groundup.scaling.distributed_runs import torchrun
from groundup.scaling.recipe import TrainerConfig, Watch
from groundup.scaling.runs import DecoderRun, load_run, train_run
from groundup.scaling.schedules import Schedule
from groundup.scaling.tracking import read_json_lines
from groundup.scaling.trainer import Trainer
from groundup.training.batching import Corpus

TEXT = "It is the east, and Juliet is the sun. Arise, fair sun. " * 30
RUN = DecoderRun(
    DecoderConfig(d_model=32, n_layers=2, n_heads=2, tied=True),
    TrainerConfig(Schedule(6, warmup=2), batch=8, context=16, micro_batches=2, lr=1e-2),
    Watch(eval_every=3, eval_windows=8, save_every=3),
)


def options(run):
    """The shell's options for every field of RUN that is not the preset's."""
    sizes, recipe, watch = run.model, run.train, run.watch
    given = {
        "model.d-model": sizes.d_model,
        "model.n-layers": sizes.n_layers,
        "model.n-heads": sizes.n_heads,
        "train.schedule.steps": recipe.schedule.steps,
        "train.schedule.warmup": recipe.schedule.warmup,
        "train.schedule.shape": recipe.schedule.shape,
        "train.schedule.end": recipe.schedule.end,
        "train.batch": recipe.batch,
        "train.context": recipe.context,
        "train.micro-batches": recipe.micro_batches,
        "train.optimizer": recipe.optimizer,
        "train.lr": recipe.lr,
        "watch.eval-every": watch.eval_every,
        "watch.eval-windows": watch.eval_windows,
        "watch.save-every": watch.save_every,
    }
    words = [str(word) for k, v in given.items() for word in (f"--{k}", v)]
    return [*words, "--model.tied"]


@pytest.mark.parametrize(
    ("how", "optimizer", "tolerance"),
    # Muon orthogonalises in bfloat16, where the last bit is 1/256.
    [("ddp", "adamw", 1e-4), ("fsdp", "muon", 1e-2)],
)
def test_two_processes_train_as_one(how, optimizer, tolerance, tmp_path):
    """The losses, the best weights, and a run that one process takes over halfway."""
    run = replace(RUN, train=replace(RUN.train, optimizer=optimizer))
    text = tmp_path / "text.txt"
    text.write_text(TEXT, "utf-8")
    two, one = tmp_path / "two", tmp_path / "one"
    command = ["train", "modern-tiny", "--text", str(text), "--out", str(two)]
    said = torchrun("groundup", *command, "--how", how, *options(run))
    assert said.count("trained 6 updates") == 1, "one process speaks for all"
    history = train_run(run, one, TEXT, progress=False)
    assert json.loads((two / "config.json").read_text()) == json.loads(
        (one / "config.json").read_text()
    )

    curves = read_json_lines(two / "metrics.jsonl")
    assert list(curves["loss"]) == list(range(1, 7))
    assert list(curves["loss"].values()) == pytest.approx(history.losses, abs=tolerance)
    assert list(curves["grad_norm"].values()) == pytest.approx(
        history.grad_norms, abs=10 * tolerance
    )
    assert curves["validation_loss"] == pytest.approx(history.validation, abs=tolerance)
    weights = [load_file(folder / "model.safetensors") for folder in (one, two)]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(
            weights[1][name], tensor, rtol=0, atol=10 * tolerance
        )
    load_run(two)

    # As if the two had been killed after update 3: what came later is taken away.
    for path in ("checkpoints/step-000006", "checkpoints/best/step-000006"):
        shutil.rmtree(two / path, ignore_errors=True)
    (two / "model.safetensors").unlink()
    taken_over = train_run(run, two, TEXT, progress=False)
    assert taken_over.losses[:3] == list(curves["loss"].values())[:3]
    assert taken_over.losses == pytest.approx(history.losses, abs=tolerance)


def test_refuses_processes_that_would_not_talk(monkeypatch):
    """Two that share a batch and not their gradients train two models."""
    values = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    corpus = Corpus.of([torch.arange(100)])
    with pytest.raises(ValueError, match="how must be ddp or fsdp for 2 processes"):
        Trainer(Decoder(RUN.model), corpus, RUN.train)
