"""Pickled files: refused until the danger is named, and dangerous when it is."""

import pickle

import pytest
import torch

from groundup.scaling.pickles import PICKLED, load_untrusted_pickle


class Touch:
    """Unpickling it makes a file: any call with any arguments would do."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("ending", PICKLED)
def test_refuses_and_runs_nothing(tmp_path, ending):
    path, witness = tmp_path / f"model{ending}", tmp_path / "witness"
    path.write_bytes(pickle.dumps(Touch(witness)))
    with pytest.raises(ValueError, match="i_trust_this_file_to_run_code=True"):
        load_untrusted_pickle(path)
    assert not witness.exists()


def test_with_the_flag_it_runs_what_the_file_says(tmp_path):
    path, witness = tmp_path / "model.pkl", tmp_path / "witness"
    path.write_bytes(pickle.dumps(Touch(witness)))
    load_untrusted_pickle(path, i_trust_this_file_to_run_code=True).close()
    assert witness.exists()


@pytest.mark.parametrize("ending", [".pt", ".pth", ".bin", ".ckpt"])
def test_with_the_flag_it_reads_what_torch_wrote(tmp_path, ending):
    path = tmp_path / f"model{ending}"
    state = {"w": torch.randn(3), "config": {"width": 3}, "set": {1, 2}}
    torch.save(state, path)
    found = load_untrusted_pickle(path, i_trust_this_file_to_run_code=True)
    assert torch.equal(found.pop("w"), state.pop("w"))
    assert found == state


def test_only_the_flag_itself_opens_it(tmp_path):
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps(1))
    with pytest.raises(TypeError):
        load_untrusted_pickle(path, True)  # not by position


@pytest.mark.parametrize("name", ["model.safetensors", "model", "model.npz"])
def test_refuses_endings_that_are_not_pickled(tmp_path, name):
    with pytest.raises(ValueError, match=f"must end in one of .*got '{name}'"):
        load_untrusted_pickle(tmp_path / name, i_trust_this_file_to_run_code=True)
