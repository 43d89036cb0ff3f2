"""The small set-up of Part 3: what a seed decides, and what a swap exchanges."""

import math

import pytest
import torch
from torch import nn

from groundup.foundations.assets import is_cached
from groundup.modern.rmsnorm import RMSNorm
from groundup.modern.swiglu import SwiGLU
from groundup.modern.variants import RECIPE, SMALL, small_decoder, swap, train_seeds
from groundup.training.loop import TrainConfig


def test_swap_replaces_every_module_of_a_kind_and_no_other():
    model = small_decoder()
    before = {n: m for n, m in model.named_modules() if not isinstance(m, RMSNorm)}
    widths = []

    def make(old):
        widths.append(len(old.weight))
        return nn.LayerNorm(SMALL.d_model)

    assert swap(model, RMSNorm, make) is model
    assert widths == [SMALL.d_model] * (2 * SMALL.n_layers + 1)
    kinds = [type(m) for m in model.modules()]
    assert RMSNorm not in kinds
    assert kinds.count(nn.LayerNorm) == 2 * SMALL.n_layers + 1
    for name, module in before.items():
        assert model.get_submodule(name) is module


def test_swap_refuses_a_kind_that_is_not_there():
    with pytest.raises(ValueError, match="model holds no Conv1d"):
        swap(small_decoder(), nn.Conv1d, lambda old: old)


def test_small_decoder_changes_the_fields_named_and_no_other():
    changed = small_decoder(n_kv_heads=2).config
    assert changed.n_kv_heads == 2
    assert {**vars(changed), "n_kv_heads": None} == vars(SMALL)
    model = small_decoder()
    assert isinstance(model.blocks[0].feedforward, SwiGLU)


@pytest.mark.skipif(not is_cached("shakespeare"), reason="`groundup fetch shakespeare`")
def test_a_seed_decides_weights_and_batches():
    fields = {"steps": 3, "batch": 2, "context": 256, "eval_every": 3, "warmup": 1}
    recipe = TrainConfig(**{**vars(RECIPE), **fields, "eval_windows": 4})

    def same_weights():
        torch.manual_seed(5)
        return small_decoder()

    batches = [run.losses for run in train_seeds(same_weights, recipe, seeds=(0, 1))]
    assert batches[0] != batches[1]
    runs = train_seeds(small_decoder, recipe, seeds=(0, 1, 0))
    assert runs[0].losses == runs[2].losses
    assert runs[0].final == runs[2].final
    assert runs[0].losses[0] != runs[1].losses[0]
    weights = [run.model.embed.weight for run in runs]
    assert torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], weights[1])
    for run in runs:
        assert list(run.validation) == [3]
        assert len(run.losses) == 3
        assert 3 < run.final < run.losses[0]  # ln 256 = 5.5 at the start; it learned


def test_without_final_windows_there_is_no_final_loss():
    short = TrainConfig(steps=1, batch=2, context=8, warmup=0, eval_windows=2)
    (run,) = train_seeds(small_decoder, short, seeds=(0,), n_final=0)
    assert math.isnan(run.final)
    assert len(run.losses) == 1
