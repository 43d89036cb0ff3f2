"""The runs of the ladder: rates, shared trunks, the plan, the recording."""

import json

import pytest
import torch

from groundup import artifacts
from groundup.foundations.assets import is_cached
from groundup.modern.decoder import Decoder
from groundup.scaling import ladder
from groundup.scaling.ladder import (
    CONFIG,
    FIRST,
    HELD_OUT,
    PER_UPDATE,
    SIZES,
    Training,
    count_parameters,
    decoder_config,
    plan,
    rate_for,
    run,
    schedule_for,
)
from groundup.scaling.schedules import Schedule, share
from groundup.training.loop import TrainConfig, train

needs_plays = pytest.mark.skipif(
    not is_cached("shakespeare"), reason="needs `groundup fetch shakespeare`"
)
JOB = {"size": [8, 1, 2], "seed": 3, "lr": 0.02, "dtype": "float32"}


@pytest.fixture
def short(monkeypatch, tmp_path):
    """Budgets from eight updates on, and pieces in a folder of their own."""
    monkeypatch.setattr(ladder, "FIRST", 8 * PER_UPDATE)
    monkeypatch.setattr(ladder, "WARMUP", 3)
    monkeypatch.setattr(artifacts.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(Training, "loss", lambda self: checksum(self.model))


def checksum(model):
    with torch.no_grad():
        return float(sum(p.double().square().sum() for p in model.parameters()))


def test_the_ladder_has_sizes_over_two_decades():
    counts = [count_parameters(Decoder(decoder_config(size)))[0] for size in SIZES]
    assert counts == sorted(counts)
    assert len(counts) >= 6
    assert counts[-1] / counts[0] > 100
    assert count_parameters(Decoder(decoder_config(HELD_OUT)))[0] > 2 * counts[-1]


def test_parameters_by_hand():
    """C = 4, F = 16, one block: 64 + 192 in matrices, 3 norms of 4; tables 2 x 1024."""
    assert count_parameters(Decoder(decoder_config((4, 1, 2)))) == (64 + 192 + 12, 2048)


def test_the_rate_halves_when_the_width_doubles():
    assert rate_for(100) == pytest.approx(1 / 300)
    assert rate_for(64) == rate_for(32) / 2


def test_the_rate_of_a_budget_falls_over_its_last_fifth():
    """128 updates: 32 rise, 102 in all until the rate falls, round(25.6) = 26 fall."""
    schedule = schedule_for(2**17)
    assert (schedule.steps, schedule.n_falling) == (128, 26)
    shares = [share(step, schedule) for step in range(128)]
    assert shares[31:102] == [1.0] * 71
    assert 1 > shares[102] > shares[126] > shares[127] == 0


@needs_plays
def test_the_update_is_that_of_the_loop_of_part_2():
    """Same seed, same batches, same warm-up: the same weights, bit for bit."""
    training = Training((8, 1, 2), 3, 0.02, "float32")
    training.go_on(10, Schedule(10, warmup=4))
    torch.manual_seed(3)
    model = Decoder(decoder_config((8, 1, 2)))
    config = TrainConfig(steps=10, batch=16, lr=0.02, lr_end=0.0, warmup=4, seed=3)
    train(model, ladder.shakespeare_split().train, config)
    for ours, theirs in zip(
        training.model.parameters(), model.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs)


@needs_plays
@pytest.mark.parametrize("doublings", [1, 2])
def test_a_budget_that_shares_a_trunk_is_the_run_from_scratch(short, doublings):
    n_bytes = ladder.FIRST * 2**doublings
    found = run({**JOB, "n_bytes": n_bytes})
    alone = Training((8, 1, 2), 3, 0.02, "float32")
    schedule = schedule_for(n_bytes)
    alone.go_on(schedule.steps - schedule.n_falling, schedule)
    assert found["result"]["constant_updates"] == alone.step
    assert found["result"]["constant_loss"] == checksum(alone.model)
    alone.go_on(schedule.steps, schedule)
    assert found["result"]["loss"] == checksum(alone.model)


@needs_plays
def test_a_result_says_what_was_trained(short):
    job = {**JOB, "n_bytes": ladder.FIRST}
    result = run(job)["result"]
    assert {key: result[key] for key in job} == job
    assert (result["n_parameters"], result["n_outside"]) == count_parameters(
        Decoder(decoder_config((8, 1, 2)))
    )
    assert result["update_seconds"] > 0
    json.dumps(result)


def test_the_plan_by_hand():
    row = {"sizes": [[16, 2, 2]], "seeds": [0, 1], "n_budgets": 2}
    sweep = {"sizes": [[16, 2, 2]], "factors": [1.0, 2.0], "n_budgets": 1}
    jobs = plan({"runs": [row, sweep]})
    keys = [(j["seed"], j["lr"] * 48, j["n_bytes"] // FIRST) for j in jobs]
    expected = [(0, 1, 1), (0, 1, 2), (1, 1, 1), (1, 1, 2), (0, 2, 1)]
    assert keys == [pytest.approx(key) for key in expected]


def test_the_plan_of_the_recording_needs_nothing_that_comes_later():
    done = []
    for job in plan(CONFIG):
        half = {**job, "n_bytes": job["n_bytes"] // 2}
        assert job["n_bytes"] == FIRST or half in done
        done.append(job)
    assert json.loads(json.dumps(CONFIG)) == CONFIG


def test_the_recording_holds_a_result_for_each_run_of_the_plan():
    runs = artifacts.load("scaling_ladder")["runs"]
    keys = ("size", "seed", "lr", "dtype", "n_bytes")
    assert [{key: run[key] for key in keys} for run in runs] == [
        {key: job[key] for key in keys} for job in plan(CONFIG)
    ]
