"""The short pass for one token against the decoder's own, in every kind of cache."""

import pytest
import torch
from torch import nn

from groundup.modern import one_row
from groundup.modern.alibi import AlibiDecoder
from groundup.modern.decoder import Decoder, DecoderConfig
from groundup.modern.kv_cache import KVCache, generate
from groundup.modern.one_row import OneRowDecoder, product_seconds
from groundup.modern.quantised_cache import QuantisedCache
from groundup.modern.rmsnorm import RMSNorm
from groundup.modern.rolling_cache import RollingCache
from groundup.modern.variants import small_decoder, swap

SMALL = {"n_vocab": 40, "d_model": 16, "n_layers": 3, "n_heads": 4, "tied": False}
CHANGES = {
    "plain": {},
    "grouped": {"n_kv_heads": 2},
    "one group": {"n_kv_heads": 1},
    "tied": {"tied": True},
    "biases": {"qkv_bias": True, "n_kv_heads": 2},
    "window": {"window": 4},
    "sinks": {"window": 4, "n_sinks": 2},
    "base and eps": {"rope_theta": 50.0, "norm_eps": 0.1},
}
each_change = pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES.keys())
each_product = pytest.mark.parametrize("by_vector", [True, False])
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9]])
EXACT = {"rtol": 0, "atol": 1e-12}


def decoder(**changes):
    torch.manual_seed(0)
    model = Decoder(DecoderConfig(**{**SMALL, **changes})).double().eval()
    with torch.no_grad():  # nothing may be 0 or 1 where a factor could be forgotten
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.normal_(1.0, 0.5)
        model.head.weight.normal_()
    return model


@torch.no_grad()
def read(model, cache, first=3):
    """The logits of IDS: a prompt of the first tokens, then one after the other."""
    parts = [IDS[:, :first], *IDS[:, first:].split(1, 1)]
    return torch.cat([model(part, None, cache) for part in parts], 1)


@each_change
@each_product
def test_equals_the_decoder_at_every_position(changes, by_vector):
    model = decoder(**changes)
    cache = KVCache(model.config, IDS.shape[1], dtype=torch.float64)
    found = read(OneRowDecoder(model, by_vector=by_vector), cache)
    with torch.no_grad():
        torch.testing.assert_close(found, model(IDS), **EXACT)


@each_product
def test_takes_the_short_way_and_the_product_asked_for(monkeypatch, by_vector):
    """Else the comparison would be one of the decoder with itself."""
    model = decoder()
    short = OneRowDecoder(model, by_vector=by_vector)
    cache = KVCache(model.config, IDS.shape[1], dtype=torch.float64)
    with torch.no_grad():
        short(IDS[:, :3], None, cache)
        monkeypatch.setattr(Decoder, "forward", None)
        monkeypatch.setattr(torch, "addmm" if by_vector else "addmv", None)
        assert short(IDS[:, 3:4], None, cache, n_last=1).shape == (1, 1, 40)
        with pytest.raises(TypeError):
            short(IDS[:, :3], None, cache)


@pytest.mark.parametrize("kind", ["rolling", "reindexed", "quantised"])
def test_any_cache(kind):
    model = decoder(window=4, n_sinks=1)

    def cache():
        if kind == "quantised":
            make = lambda sizes, dtype: KVCache(sizes, 13, dtype=dtype)  # noqa: E731
            return QuantisedCache(make, model.config, torch.float64)
        reindexed = kind == "reindexed"
        return RollingCache(model.config, dtype=torch.float64, reindexed=reindexed)

    expected = read(model, cache())
    torch.testing.assert_close(read(OneRowDecoder(model), cache()), expected, **EXACT)


def test_positions_of_ones_own():
    model = decoder()
    caches = [KVCache(model.config, 4, dtype=torch.float64) for _ in range(2)]
    with torch.no_grad():
        for token, where in zip(IDS.T[:, None], (7, 11, 30), strict=False):
            at = torch.tensor([[where]])
            expected = model(token, at, caches[0])
            found = OneRowDecoder(model)(token, at, caches[1])
            torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.parametrize("prompts", [[[3, 1, 4]], [[3, 1, 4], [1, 5]]])
def test_generates_what_the_decoder_does(prompts):
    model = decoder(n_kv_heads=2)
    assert generate(OneRowDecoder(model), prompts, 12) == generate(model, prompts, 12)


@pytest.mark.parametrize("cached", [True, False])
def test_gradients_are_those_of_the_decoder(cached):
    model = decoder()
    short = OneRowDecoder(model)
    ids = IDS[:, :1]
    cache = KVCache(model.config, 1, dtype=torch.float64) if cached else None
    short(ids, None, cache).square().sum().backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(ids).square().sum().backward()
    torch.testing.assert_close(found, [p.grad for p in model.parameters()])


def test_shares_the_parameters():
    model = decoder()
    parameters = list(OneRowDecoder(model).parameters())
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (AlibiDecoder(DecoderConfig(**SMALL)), "AlibiDecoder"),
        (swap(small_decoder(), RMSNorm, lambda old: nn.LayerNorm(64)), "LayerNorm"),
    ],
)
def test_refuses_what_it_does_not_know(model, name):
    with pytest.raises(TypeError, match=f"plain Decoder.*got one with.*{name}"):
        OneRowDecoder(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_scale_of_a_norm_is_not_rounded_to_half(dtype):
    """16 numbers of 40,000: their length, 160,000, is beyond float16's 65,504."""
    x = torch.full((16,), 40_000.0, dtype=dtype)
    norm = RMSNorm(16, eps=0.0).to(dtype)
    row, scale = one_row._normed(norm, x)
    assert torch.equal(row, x)
    assert scale == pytest.approx(1 / x[0].item(), rel=1e-6)
    x = torch.arange(1.0, 17.0, dtype=dtype)  # a mean square of 93.5
    assert one_row._normed(norm, x)[1] == pytest.approx(93.5**-0.5, rel=1e-6)


def test_half_precision_is_as_near_the_truth():
    """The float32 logits are the truth for both passes in bfloat16."""
    truth = read(decoder().float(), KVCache(DecoderConfig(**SMALL), 13))
    half = decoder().bfloat16()
    errors = []
    for model in (half, OneRowDecoder(half)):
        cache = KVCache(half.config, 13, dtype=torch.bfloat16)
        errors.append((read(model, cache) - truth).square().mean().sqrt())
    assert errors[1] < 1.3 * errors[0]
    assert errors[1] > 0


@each_product
def test_every_matrix_is_timed_once(monkeypatch, by_vector):
    """Four matrices in each of three blocks, and the head."""
    found = []

    def seconds(call):
        found.extend(call())
        return 3.0

    monkeypatch.setattr(one_row, "median_seconds", seconds)
    model = decoder(n_kv_heads=2)
    assert product_seconds(model, by_vector=by_vector) == 3.0
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    assert len(found) == 4 * 3 + 1
    for product, weight in zip(found, weights, strict=True):
        assert product.dim() == (
            1 if by_vector else 2
        )  # a vector, or a matrix of a row
        torch.testing.assert_close(product.flatten(), weight.sum(1), **EXACT)


@pytest.mark.parametrize("faster", [True, False])
def test_takes_the_faster_product(monkeypatch, faster):
    def seconds(model, *, by_vector):
        return 1.0 if by_vector == faster else 2.0

    monkeypatch.setattr(one_row, "product_seconds", seconds)
    assert OneRowDecoder(decoder()).by_vector == faster
