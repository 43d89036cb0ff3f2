"""Eight bits: the quantiser against torch's and loops, the cache against its kind."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from groundup.modern.decoder import Decoder, DecoderConfig
from groundup.modern.kv_cache import KVCache, bytes_per_token, generate, left_pad
from groundup.modern.quantised_cache import QuantisedCache, dequantise, quantise
from groundup.modern.rolling_cache import RollingCache

SINKS = DecoderConfig(
    n_vocab=40,
    d_model=16,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    tied=False,
    window=5,
    n_sinks=2,
)


def decoder(config=SINKS, seed=0):
    torch.manual_seed(seed)
    model = Decoder(config).double().eval()
    with torch.no_grad():
        model.head.weight.normal_()
    return model


def in_codes(model, kind, batch=1):
    def make(sizes, dtype):
        if kind == "ring":
            return RollingCache(sizes, batch=batch, dtype=dtype)
        return KVCache(sizes, 60, batch=batch, dtype=dtype)

    return QuantisedCache(make, model.config, torch.float64)


def test_by_hand():
    """1.27 / 127 = 0.01; -0.5 is -50 of it, 0.004 is 0.4 of it and becomes 0."""
    codes, scale = quantise(torch.tensor([[1.27, -0.5, 0.004], [0.0, 0.0, 0.0]]))
    assert codes.tolist() == [[127, -50, 0], [0, 0, 0]]
    torch.testing.assert_close(scale, torch.tensor([[0.01], [0.0]]))
    back = dequantise(codes, scale, torch.float32)
    torch.testing.assert_close(back[0], torch.tensor([1.27, -0.5, 0.0]))
    assert (back[1] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_a_numpy_loop(dtype):
    torch.manual_seed(0)
    x = (torch.randn(2, 3, 5, 8) * 10.0 ** torch.randint(-6, 6, (2, 3, 5, 1))).to(dtype)
    codes, scale = quantise(x)
    for index in np.ndindex(2, 3, 5):
        row = x[index].float().numpy()
        step = np.float32(np.abs(row).max() / np.float32(127))
        expected = np.rint(row / step).astype(np.int8)
        assert scale[index].item() == step
        assert (codes[index].numpy() == expected).all()


def test_equals_torchs_quantiser():
    torch.manual_seed(0)
    x = torch.randn(64, 16)
    codes, scale = quantise(x)
    for row, code, step in zip(x, codes, scale[:, 0], strict=True):
        theirs = torch.fake_quantize_per_tensor_affine(row, step.item(), 0, -127, 127)
        ours = dequantise(code, step[None], torch.float32)
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


@given(
    seed=st.integers(0, 2**31),
    exponent=st.integers(-30, 30),
    heavy=st.booleans(),
    bits=st.integers(2, 8),
)
def test_error_is_at_most_half_a_scale(seed, exponent, heavy, bits):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(6, 8, generator=generator, dtype=torch.float64) * 10.0**exponent
    if heavy:
        x[:, 0] *= 1000
    codes, scale = quantise(x, bits)
    error = (dequantise(codes, scale, torch.float64) - x).abs()
    assert (error <= scale * (0.5 + 1e-9)).all()
    assert codes.abs().amax(-1).eq(2 ** (bits - 1) - 1).all()  # the range is used
    assert torch.equal(quantise(-x, bits)[0], -codes)


@pytest.mark.parametrize("bits", [1, 9])
def test_refuses_bits_that_are_none(bits):
    with pytest.raises(ValueError, match=rf"bits must lie in 2\.\.8; got {bits}"):
        quantise(torch.ones(3), bits)


def test_fewer_bits_are_passed_on():
    model, ids = decoder(), torch.randint(40, (1, 12))
    with torch.no_grad():
        exact = model(ids)
        errors = []
        for bits in (8, 4, 2):
            cache = QuantisedCache(
                lambda s, d: RollingCache(s, dtype=d), SINKS, torch.float64, bits
            )
            errors.append((model(ids, cache=cache) - exact).abs().mean().item())
    assert errors[0] < errors[1] / 4 < errors[2] / 8


@pytest.mark.parametrize("kind", ["ring", "unbounded"])
@settings(max_examples=20, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 12), min_size=2, max_size=24).filter(
        lambda s: sum(s) <= 24
    )
)
def test_chunks_do_not_matter(kind, sizes):
    """Every token is read as it was rounded, its own query included."""
    model = decoder()
    ids = torch.randint(40, (1, sum(sizes)))
    whole, parts = in_codes(model, kind), in_codes(model, kind)
    with torch.no_grad():
        expected = model(ids, cache=whole)
        found = torch.cat([model(x, cache=parts) for x in ids.split(sizes, 1)], 1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_equals_attention_over_rounded_keys_and_values(monkeypatch):
    """The oracle rounds k and v where they are made, and has no cache."""
    from groundup.modern import decoder as module

    model, ids = decoder(), torch.randint(40, (2, 20))
    with torch.no_grad():
        found = torch.cat(
            [
                model(x, cache=c)
                for c in [in_codes(model, "ring", 2)]
                for x in ids.split(3, 1)
            ],
            1,
        )
        exact = model(ids)
    plain = module.grouped_attention

    def rounded(q, k, v, mask=None, *, causal=False):
        def through(x):
            step = x.abs().amax(-1, keepdim=True) / 127
            return (x / step).round() * step

        return plain(q, through(k), through(v), mask, causal=causal)

    monkeypatch.setattr(module, "grouped_attention", rounded)
    with torch.no_grad():
        torch.testing.assert_close(model(ids), found, rtol=0, atol=1e-10)
    error = (found - exact).abs().max()
    assert 1e-5 < error < 0.05 * exact.abs().max()  # rounded, and not by much


def test_generates_in_batches_like_one_by_one():
    model, prompts = decoder(), [[3], [5, 8, 13, 21, 34, 2, 7, 9], [1, 2, 3, 4]]
    found = generate(model, prompts, 20, cache=in_codes(model, "ring", 3))
    for prompt, row in zip(prompts, found, strict=True):
        assert generate(model, [prompt], 20, cache=in_codes(model, "ring")) == [row]


def test_memory_by_hand():
    """D = 64 numbers cost 64 codes and a scale of 4 bytes: 68 in place of 256."""
    sizes = dataclasses.replace(SINKS, d_model=256, n_heads=4, window=None, n_sinks=0)
    cache = QuantisedCache(lambda s, d: KVCache(s, 100, dtype=d), sizes)
    assert cache.n_bytes == 100 * bytes_per_token(sizes) * 68 // 256


def test_padding_and_next_positions_pass_through():
    cache = in_codes(decoder(), "ring", 2)
    cache.extend(left_pad([[1, 2, 3], [4]])[1])
    assert cache.next_positions(1).tolist() == [[3], [1]]


def test_a_reindexed_ring_is_refused():
    with pytest.raises(ValueError, match="codes cannot be turned"):
        QuantisedCache(
            lambda s, d: RollingCache(s, dtype=d, reindexed=True), decoder().config
        )
