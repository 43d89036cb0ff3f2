"""Benchmark of the trainer: what it costs beside the bare loop, and to be resumed.

Here: Part 2's loop and the trainer with checkpoints, JSON lines and TensorBoard, on the
same model, batches and recipe, in turns; and the time from a checkpoint on the disk to
a model that is ready for its next update. Left out: several processes.
"""

import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from groundup.bench import Claim, register
from groundup.modern.decoder import Decoder, DecoderConfig
from groundup.scaling.recipe import Watch
from groundup.scaling.runs import recipe
from groundup.scaling.tracking import JsonLines, TensorBoard
from groundup.scaling.trainer import fit
from groundup.training.batching import shakespeare_split
from groundup.training.loop import TrainConfig, train

MODEL = DecoderConfig(d_model=128, n_layers=4, n_heads=4, tied=False)
RECIPE = TrainConfig(steps=100, batch=12, context=64)
MOST_OVERHEAD, MOST_SECONDS = 0.03, 1.0  # what the claims allow


def _model() -> Decoder:
    torch.manual_seed(0)
    return Decoder(MODEL)


def _bare(config: TrainConfig) -> float:
    model, corpus = _model(), shakespeare_split().train
    start = time.perf_counter()
    train(model, corpus, config)
    return time.perf_counter() - start


def _trainer(config: TrainConfig) -> tuple[float, float]:
    """Return the seconds of a run in a folder, and those of a resume at its end."""
    model, corpus = _model(), shakespeare_split().train
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        trackers = (JsonLines(folder / "metrics.jsonl"), TensorBoard(folder / "board"))
        start = time.perf_counter()
        # A checkpoint a run of 100 updates, as in `Watch`: its cost is in the figure.
        fit(
            model,
            corpus,
            recipe(config),
            watch=Watch(save_every=100),
            folder=folder / "checkpoints",
            trackers=trackers,
        )
        ran = time.perf_counter() - start
        again = _model()
        start = time.perf_counter()
        fit(again, corpus, recipe(config), folder=folder / "checkpoints")
        return ran, time.perf_counter() - start


@register("trainer")
def trainer(quick: bool) -> list[Claim]:
    """Compare the trainer with the bare loop, in turns; print both."""
    rounds, config = (2, replace(RECIPE, steps=10, warmup=2)) if quick else (9, RECIPE)
    bare, ran, resumed = [], [], []
    for _ in range(rounds):
        bare.append(_bare(config))
        seconds, resume = _trainer(config)
        ran.append(seconds)
        resumed.append(resume)
    # Pairs of neighbours in time: a slow minute slows both.
    ratio = statistics.median(b / r for b, r in zip(bare, ran, strict=True))
    resume = statistics.median(resumed)
    print(f"{config.steps} updates   bare loop {statistics.median(bare):7.2f} s")
    print(f"{'':13}   trainer   {statistics.median(ran):7.2f} s")
    print(f"{'':13}   resume    {resume:7.3f} s")
    return [
        Claim(
            "speed over the bare loop's",
            ratio,
            1 / (1 + MOST_OVERHEAD),
            f"{100 * (1 / ratio - 1):.1f} % overhead with checkpoint and trackers",
        ),
        Claim(
            "a second over the time to resume",
            MOST_SECONDS / resume,
            1.0,
            f"{1000 * resume:.0f} ms",
        ),
    ]
