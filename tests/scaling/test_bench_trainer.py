"""The trainer's benchmark runs, and both sides of it learn the same."""

from dataclasses import replace

import pytest

from groundup.scaling import bench_trainer


def test_quick_run_states_its_two_claims(capsys):
    overhead, resume = bench_trainer.trainer(quick=True)
    assert 0 < overhead.ratio < 2
    assert overhead.target == 1 / 1.03
    assert resume.target == 1.0
    assert "bare loop" in capsys.readouterr().out


def test_both_sides_and_the_resumed_run_learn_the_same(monkeypatch):
    found = []

    def spy(name):
        real = getattr(bench_trainer, name)

        def watched(*args, **options):
            history = real(*args, **options)
            found.append(history.losses)
            return history

        monkeypatch.setattr(bench_trainer, name, watched)

    spy("train")
    spy("fit")
    config = replace(bench_trainer.RECIPE, steps=3, warmup=1)
    bench_trainer._bare(config)
    bench_trainer._trainer(config)
    bare, ran, resumed = found
    assert ran == resumed
    # A sum divided by its count, or a mean: the last bits may differ.
    assert ran == pytest.approx(bare, rel=1e-5)
    assert len(bare) == 3
