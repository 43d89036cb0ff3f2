"""The trainer's benchmark runs, and both sides of it learn the same."""

from groundup.scaling import bench_trainer


def test_quick_run_states_its_two_claims(capsys):
    overhead, resume = bench_trainer.trainer(quick=True)
    assert 0 < overhead.ratio < 2
    assert overhead.target == 1 / 1.03
    assert resume.target == 1.0
    assert "bare loop" in capsys.readouterr().out
