"""Each illness shows its symptom, and watching changes nothing."""

import dataclasses
import math
from collections import Counter

import pytest
import torch
from torch import nn

from groundup.modern.variants import RECIPE
from groundup.scaling.sick_runs import (
    BASE64,
    HEALTHY,
    HELD_OUT_EVERY,
    ILLNESSES,
    STEPS,
    SeesAll,
    attachments,
    observe,
    small_relu_decoder,
    through_float16,
    watched_run,
)
from groundup.scaling.tracking import JsonLines, read_json_lines
from groundup.scaling.vital_signs import future_influence
from groundup.training.batching import shakespeare_split
from groundup.training.loop import train

# Updates that a symptom needs to show.
NEEDED = {"rate too high": 30, "no warm-up": 3, "dead units": 8, "fp16 overflow": 65}
SIGNS = {
    "loss", "silent", "rate", "tokens_per_s", "memory", "held_out", "gradient/all",
    "update/all", "gradient/embed", "gradient/norm", "gradient/attention",
    "gradient/feedforward", "gradient/head",
}  # fmt: skip


@pytest.fixture(scope="module")
def watch(tmp_path_factory):
    """Run a condition once and return its curves, as lists over the updates."""
    seen = {}

    def run(name):
        if name not in seen:
            path = tmp_path_factory.mktemp("runs") / "run.jsonl"
            condition = ILLNESSES.get(name, HEALTHY)
            steps = NEEDED.get(name, STEPS)
            model = watched_run(condition, 1, JsonLines(path), steps=steps)
            curves = read_json_lines(path)
            seen[name] = model, {k: list(v.values()) for k, v in curves.items()}
        return seen[name]

    return run


def mean(values):
    return sum(values) / len(values)


def test_watching_does_not_change_a_run(watch):
    """Bit for bit the losses, norms and held-out loss of Part 2's loop."""
    torch.manual_seed(1)
    model, split = small_relu_decoder(), shakespeare_split()
    config = dataclasses.replace(RECIPE, steps=STEPS, seed=1)
    history = train(model, split.train, config)
    watched, curves = watch("healthy")
    assert curves["loss"] == history.losses
    assert curves["gradient/all"] == history.grad_norms
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, watched.get_parameter(name)), name


def test_all_signs_are_logged(watch):
    _, curves = watch("healthy")
    assert set(curves) == SIGNS
    assert {len(v) for k, v in curves.items() if k != "held_out"} == {STEPS}
    assert len(curves["held_out"]) == STEPS // HELD_OUT_EVERY + 1
    parts = [
        v[0] for k, v in curves.items() if k.startswith("gradient/") and "all" not in k
    ]
    assert math.hypot(*parts) == pytest.approx(curves["gradient/all"][0], rel=1e-5)


def test_healthy(watch):
    model, curves = watch("healthy")
    assert curves["loss"][0] == pytest.approx(math.log(256), abs=0.1)
    assert 2.2 < mean(curves["loss"][-5:]) < 2.8
    assert max(curves["loss"][1:]) < curves["loss"][0] + 0.05
    assert max(curves["silent"]) < 0.3
    assert max(curves["update/all"]) < 0.02
    ids = shakespeare_split().validation.windows(64)[0][:4]
    assert future_influence(model.eval(), ids) < 1e-3


def test_rate_too_high(watch):
    curves, healthy = watch("rate too high")[1], watch("healthy")[1]
    assert mean(curves["update/all"]) > 4 * mean(healthy["update/all"][:30])
    assert max(curves["update/all"]) > 0.05


def test_no_warm_up(watch):
    curves, healthy = watch("no warm-up")[1], watch("healthy")[1]
    first = curves["update/all"][0] / healthy["update/all"][0]
    assert first == pytest.approx(
        RECIPE.warmup, rel=0.02
    )  # the rate is, and Adam's step


def test_dead_units(watch):
    curves, healthy = watch("dead units")[1], watch("healthy")[1]
    assert min(curves["silent"]) > 0.95
    assert curves["gradient/feedforward"][0] < healthy["gradient/feedforward"][0] / 2
    assert curves["loss"][-1] < curves["loss"][0]


def test_leaked_labels(watch):
    model, curves = watch("leaked labels")
    assert mean(curves["loss"][-5:]) < 1.2
    assert curves["held_out"][-1] < 1.2
    ids = shakespeare_split().validation.windows(64)[0][:4]
    assert future_influence(model.eval(), ids) > 1


def test_bad_shard(watch):
    curves, healthy = watch("bad shard")[1], watch("healthy")[1]
    first, end = ILLNESSES["bad shard"].bad_steps
    assert curves["loss"][:first] == healthy["loss"][:first]
    assert curves["loss"][first] > curves["loss"][first - 1] + 2
    assert min(curves["loss"][first:end]) > math.log(64) - 0.1  # the floor of base64
    assert curves["gradient/all"][first] > 2 * curves["gradient/all"][first - 1]
    assert curves["loss"][-1] < curves["loss"][first] - 3


def test_fp16_overflow(watch):
    """The gradient is infinite one update before the loss is not a number."""
    curves = watch("fp16 overflow")[1]
    bad = [i for i, v in enumerate(curves["loss"]) if not math.isfinite(v)]
    last = bad[0] - 1
    assert curves["gradient/all"][last] == math.inf
    assert all(math.isfinite(v) for v in curves["gradient/all"][:last])
    assert bad == list(range(last + 1, NEEDED["fp16 overflow"]))
    assert math.isnan(curves["held_out"][-1])


# The parts


def test_observe_has_a_row_for_each_seed(tmp_path):
    signs, model = observe(HEALTHY, tmp_path, seeds=(1, 3), steps=2)
    for row, seed in enumerate((1, 3)):
        path = tmp_path / "again.jsonl"
        again = watched_run(HEALTHY, seed, JsonLines(path), steps=2)
        for sign, curve in read_json_lines(path).items():
            if sign not in ("tokens_per_s", "memory"):
                assert signs[sign][row].tolist() == list(curve.values()), sign
        path.unlink()
    assert signs["held_out"].shape == (2, 2)
    assert torch.equal(model.head.weight, again.head.weight)


def test_through_float16_by_hand():
    """65,504 is float16's largest number; below 2^-25 everything rounds to 0."""
    layer = nn.Linear(4, 1, bias=False)
    gradient = torch.tensor([[1.0, 2.0**-26, 0.3, 0.0]])
    for scale, expected in (
        (1.0, [1.0, 0.0, torch.tensor(0.3).half().item(), 0.0]),
        (2.0**15, [1.0, 2.0**-26, torch.tensor(0.3).half().item(), 0.0]),
        (2.0**16, [math.inf, 2.0**-26, torch.tensor(0.3).half().item(), 0.0]),
    ):
        layer.weight.grad = gradient.clone()
        through_float16(layer, scale)
        assert layer.weight.grad.tolist() == [expected]
    layer.weight.grad = None
    through_float16(layer, 2.0)
    assert layer.weight.grad is None


def test_attachments_are_even_base64():
    """Five sigma for each of 64 counts: one failure in 27,000 correct runs."""
    x, y = attachments(400, 64, torch.Generator().manual_seed(0))
    assert torch.equal(x[:, 1:], y[:, :-1])
    counts = Counter(bytes(y.flatten().tolist()))
    assert set(counts) == set(BASE64)
    n, p = y.numel(), 1 / 64
    sigma = math.sqrt(n * p * (1 - p))
    assert all(abs(count - n * p) < 5 * sigma for count in counts.values())


def test_the_model_of_a_condition():
    model = small_relu_decoder(ILLNESSES["dead units"])
    biases = [p for n, p in model.named_parameters() if n.endswith("up.bias")]
    assert len(biases) == 2
    assert all((b == -3).all() for b in biases)
    leaky = small_relu_decoder(ILLNESSES["leaked labels"])
    assert isinstance(leaky, SeesAll)
    ids = torch.randint(256, (2, 10))
    assert future_influence(leaky, ids) > 1e-3 > 1e-4 > future_influence(model, ids)
