"""`groundup train` and `groundup sample`, as a shell calls them."""

import pytest

from groundup import cli

TINY = [
    "--model.d-model=16",
    "--model.n-layers=1",
    "--model.n-heads=2",
    "--train.schedule.steps=2",
    "--train.batch=2",
    "--train.context=8",
    "--train.schedule.warmup=1",
]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "own.txt"
    path.write_text("Ein Männlein steht im Walde, ganz still und stumm. " * 20)
    return path


@pytest.mark.parametrize("preset", ["gpt-tiny", "modern-tiny"])
def test_train_then_sample(preset, text, tmp_path, capsys):
    out = tmp_path / "run"
    command = ["train", preset, "--text", str(text), "--out", str(out), *TINY]
    assert cli.main(command) == 0
    said = capsys.readouterr().out
    assert "trained 2 updates" in said
    assert str(out) in said
    options = ["--prompt", "Ein", "--n-new", "5", "--temperature", "0.5"]
    assert cli.main(["sample", str(out), *options]) == 0
    assert capsys.readouterr().out.startswith("Ein")


def test_a_text_that_is_too_short_is_a_usage_error(tmp_path, capsys):
    short = tmp_path / "short.txt"
    short.write_text("To be")
    out = tmp_path / "run"
    command = ["train", "gpt-tiny", "--text", str(short), "--out", str(out)]
    assert cli.main(command) == cli.USAGE
    assert "text holds 5 bytes" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.d-modell", "32"], "--model.d-modell"),
        (["--model.n-heads", "3"], "n_heads must"),
        (["--train.lr", "-1"], "lr must be positive"),
    ],
)
def test_a_bad_field_is_refused(options, message, tmp_path, capsys):
    command = ["train", "modern-tiny", "--out", str(tmp_path / "run"), *options]
    with pytest.raises(SystemExit) as stopped:
        cli.main(command)
    assert stopped.value.code == cli.USAGE
    assert message in "".join(capsys.readouterr())
    assert not (tmp_path / "run").exists()


def test_an_existing_folder_and_a_missing_run_are_usage_errors(tmp_path, capsys):
    assert cli.main(["train", "gpt-tiny", "--out", str(tmp_path)]) == cli.USAGE
    assert "exists already" in capsys.readouterr().err
    assert cli.main(["sample", str(tmp_path / "none")]) == cli.USAGE
    assert "is not a run folder" in capsys.readouterr().err


def test_the_help_of_the_group_lists_both(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    said = capsys.readouterr().out
    assert "train" in said
    assert "sample" in said
