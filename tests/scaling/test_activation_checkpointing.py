"""Blocks that forget: the same gradients to the bit, and fewer bytes, counted."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from groundup.foundations.environment import saved_bytes
from groundup.modern.decoder import Decoder, DecoderConfig
from groundup.modern.kv_cache import KVCache
from groundup.scaling.activation_checkpointing import checkpoint_blocks, recompute
from groundup.scaling.mixed_precision import accumulate, autocast

SIZES = DecoderConfig(n_vocab=19, d_model=16, n_layers=3, n_heads=2, d_ff=24)


def decoder(seed=0):
    torch.manual_seed(seed)
    return Decoder(SIZES)


def pieces(n=2):
    generator = torch.Generator().manual_seed(1)
    return [
        tuple(torch.randint(19, (2, 3, 8), generator=generator).unbind())
        for _ in range(n)
    ]


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_gradients_are_the_same_bit_for_bit(dtype):
    plain = decoder()
    forgetful = checkpoint_blocks(copy.deepcopy(plain))
    losses = [accumulate(m, pieces(), dtype=dtype) for m in (plain, forgetful)]
    assert losses[0] == losses[1]
    expected, found = gradients(plain), gradients(forgetful)
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        assert torch.equal(found[name], grad), name
        assert grad.abs().sum() > 0


def test_the_backward_pass_may_run_inside_autocast():
    """The second call then finds the weights that autocast has cast for the first."""
    (x, y), grads = pieces(1)[0], []
    for model in (decoder(), checkpoint_blocks(decoder())):
        with autocast("bfloat16"):
            logits = model(x).float().flatten(0, 1)
            nn.functional.cross_entropy(logits, y.flatten()).backward()
        grads.append(gradients(model))
    for name, grad in grads[0].items():
        assert torch.equal(grads[1][name], grad), name


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 6)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        return x + self.down(self.dropout(self.up(x).relu()))


def test_dropout_drops_the_same_units_again():
    """Three layers; the generator goes on as if nothing had been called twice."""
    torch.manual_seed(0)
    layers, x = nn.Sequential(*(Noisy() for _ in range(3))), torch.randn(4, 6)

    def run(call):
        torch.manual_seed(7)
        layers.zero_grad()
        y = x.clone().requires_grad_()
        h = y
        for layer in layers:
            h = call(layer, h)
        h.square().sum().backward()
        grads = [y.grad, *(p.grad.clone() for p in layers.parameters())]
        return h.detach(), grads, torch.rand(3)

    plain = run(lambda layer, h: layer(h))
    ours = run(lambda layer, h: recompute(layer, h, layer.parameters()))
    theirs = run(lambda layer, h: checkpoint(layer, h, use_reentrant=False))
    for other in (ours, theirs):
        assert torch.equal(other[0], plain[0])
        assert torch.equal(other[2], plain[2])
        assert all(map(torch.equal, other[1], plain[1]))
    torch.manual_seed(8)
    assert not torch.equal(layers(x), plain[0])  # other units, another result


def test_gradcheck():
    torch.manual_seed(0)
    layer, x = Noisy().double().eval(), torch.randn(2, 6, dtype=torch.float64)
    parameters = list(layer.parameters())
    assert torch.autograd.gradcheck(
        lambda x, *_: recompute(layer, x, parameters),
        (x.requires_grad_(), *parameters),
    )


def test_keeps_the_input_of_each_block_and_nothing_else():
    """By hand: B T C floats of 4 bytes a block; the rest is the head's, as before."""
    plain, (x, _) = decoder(), pieces(1)[0]
    forgetful = checkpoint_blocks(copy.deepcopy(plain))
    before, after = (
        saved_bytes(lambda m=m: m(x), m.parameters()) for m in (plain, forgetful)
    )
    bare = copy.deepcopy(plain)
    bare.blocks = nn.ModuleList()
    around = saved_bytes(lambda: bare(x), bare.parameters())
    each = 4 * x.numel() * SIZES.d_model
    # The ids, the final norm and the head, which the bare model has as well.
    assert after == around + SIZES.n_layers * each
    assert before > 3 * after


def test_each_block_is_called_twice():
    model, calls = checkpoint_blocks(decoder()), []
    for i, block in enumerate(model.blocks):
        block.attention.register_forward_hook(lambda *_, i=i: calls.append(i))
    accumulate(model, pieces(1))
    assert calls == [0, 1, 2, 2, 1, 0]


def test_names_copies_and_generation_are_as_before():
    plain = decoder()
    model = checkpoint_blocks(copy.deepcopy(plain))
    assert list(model.state_dict()) == list(plain.state_dict())
    assert isinstance(model.blocks[0], type(plain.blocks[0]))
    other = copy.deepcopy(model)  # reads its own weights, not those it came from
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    ids = pieces(1)[0][0]
    assert torch.equal(other(ids), plain(ids))
    with torch.no_grad():
        assert torch.equal(other(ids), plain(ids))  # the kernels of this mode, too
        cache = KVCache(SIZES, n_slots=8, batch=3)
        steps = [other(ids[:, t : t + 1], cache=cache) for t in range(8)]
        torch.testing.assert_close(torch.cat(steps, 1), plain(ids), atol=1e-5, rtol=0)


def test_wrapped_in_ddp(tmp_path):
    """One process: DDP waits for the gradient of each parameter, and gets it once."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        plain, grads = decoder(), []
        for model in (plain, checkpoint_blocks(copy.deepcopy(plain))):
            wrapped = nn.parallel.DistributedDataParallel(model)
            accumulate(wrapped, pieces(), quiet=wrapped.no_sync)
            grads.append(gradients(model))
        for name, grad in grads[0].items():
            assert torch.equal(grads[1][name], grad), name
    finally:
        torch.distributed.destroy_process_group()


def test_frozen_parameters_get_no_gradient():
    model = checkpoint_blocks(decoder())
    for p in model.blocks[1].parameters():
        p.requires_grad_(False)
    accumulate(model, pieces(1))
    assert all(p.grad is None for p in model.blocks[1].parameters())
    assert all(p.grad is not None for p in model.blocks[0].parameters())


def test_weights_changed_before_the_backward_pass_are_noticed():
    model, (x, _) = checkpoint_blocks(decoder()), pieces(1)[0]
    loss = model(x).sum()
    with torch.no_grad():
        model.blocks[0].attention.proj.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_refuses_a_model_without_blocks_and_a_second_time():
    with pytest.raises(ValueError, match="must have `blocks`; a Linear"):
        checkpoint_blocks(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="already"):
        checkpoint_blocks(checkpoint_blocks(decoder()))
