"""Grouped queries against torch, transformers and hand-made heads; the conversion."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from groundup.modern.decoder import Decoder, DecoderConfig
from groundup.modern.gqa import (
    cache_bytes,
    grouped_attention,
    grouped_attention_clear,
    pool_heads,
    repeat_groups,
    to_grouped,
)
from groundup.modern.sliding_window import window_mask
from groundup.training.loop import TrainConfig, train
from groundup.transformer.single_head import attention

EXACT = {"rtol": 0, "atol": 1e-12}
SIZES = DecoderConfig(n_vocab=32, d_model=32, n_layers=2, n_heads=4, qkv_bias=True)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def randn64(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def heads(batch=2, n_heads=4, n_groups=2, queries=5, keys=5, size=6):
    return (
        randn64(batch, n_heads, queries, size),
        randn64(batch, n_groups, keys, size),
        randn64(batch, n_groups, keys, size),
    )


def decoder(**changes):
    """A decoder whose biases are not zero, so that they are missed where forgotten."""
    model = Decoder(DecoderConfig(**{**vars(SIZES), **changes})).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return model


# --- by hand ----------------------------------------------------------------------


def test_which_query_reads_which_group_by_hand():
    """Keys of 0: every query averages its group's values, whatever it asks.

    Four query heads and two groups: heads 0 and 1 read group 0, heads 2 and 3 group 1.
    Values are 10 and 30 in group 0, -10 and -50 in group 1: means 20, 20, -30, -30.
    Tiled groups would give 20, -30, 20, -30.
    """
    q, k = randn64(1, 4, 1, 3), torch.zeros(1, 2, 2, 3, dtype=torch.float64)
    v = torch.tensor([[10.0, 30.0], [-10.0, -50.0]], dtype=torch.float64)
    v = v[None, :, :, None].expand(1, 2, 2, 3)
    for attend in (grouped_attention, grouped_attention_clear):
        out = attend(q, k, v)
        assert out[0, :, 0, 0].tolist() == pytest.approx([20, 20, -30, -30], abs=1e-12)
    two = grouped_attention(q.expand(1, 4, 2, 3), k, v)  # and with more than one query
    assert two[0, :, 1, 0].tolist() == pytest.approx([20, 20, -30, -30], abs=1e-12)


def test_groups_are_repeated_and_not_tiled():
    x = torch.arange(3.0).view(1, 3, 1, 1)
    assert repeat_groups(x, 6)[0, :, 0, 0].tolist() == [0, 0, 1, 1, 2, 2]


def test_pooling_by_hand():
    """Heads 1, 3, 5, 9 in two groups: means 2 and 7, first heads 1 and 5."""
    four = torch.tensor([1.0, 3.0, 5.0, 9.0])[:, None].expand(4, 2)
    assert pool_heads(four, 2)[:, 0].tolist() == [2, 7]
    assert pool_heads(four, 2, "first")[:, 1].tolist() == [1, 5]
    assert pool_heads(four, 1)[:, 0].tolist() == [4.5]
    assert torch.equal(pool_heads(four, 4), four)


def test_bytes_by_hand():
    """SmolLM2-135M: 2 x 30 layers x 3 heads x 64 numbers x 2 bytes = 23,040 a token.

    R1-Distill-Qwen-1.5B: 2 x 28 x 2 x 128 x 2 = 28,672; with its 12 query heads as key
    heads, six times as much.
    """
    smol = DecoderConfig(d_model=576, n_layers=30, n_heads=9, n_kv_heads=3)
    qwen = DecoderConfig(d_model=1536, n_layers=28, n_heads=12, n_kv_heads=2)
    full = DecoderConfig(d_model=1536, n_layers=28, n_heads=12)
    assert cache_bytes(smol, 1) == 23_040
    assert cache_bytes(smol, 10, 4) == 460_800
    assert cache_bytes(qwen, 1) == 28_672
    assert cache_bytes(full, 1) == 6 * 28_672


# --- oracles ----------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 3),
    n_groups=st.integers(1, 4),
    per_group=st.integers(1, 4),
    queries=st.integers(1, 7),
    more_keys=st.integers(0, 6),
    kind=st.sampled_from(["none", "shared", "each row", "each head", "numbers"]),
    seed=st.integers(0, 2**31),
)
def test_equals_copies_and_torchs_kernel(
    batch, n_groups, per_group, queries, more_keys, kind, seed
):
    torch.manual_seed(seed)
    n_heads, keys = n_groups * per_group, queries + more_keys
    q, k, v = heads(batch, n_heads, n_groups, queries, keys)
    shape = {"shared": (1, 1), "each row": (batch, 1), "each head": (batch, n_heads)}
    mask = None
    if kind == "numbers":
        mask = randn64(1, 1, queries, keys)
    elif kind != "none":
        mask = torch.rand(*shape[kind], queries, keys) < 0.6
        mask[..., 0] = True
    ours = grouped_attention(q, k, v, mask)
    theirs = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    torch.testing.assert_close(ours, theirs, **EXACT)
    if kind != "numbers":
        torch.testing.assert_close(ours, grouped_attention_clear(q, k, v, mask))


def test_equals_llamas_attention():
    """Weights by name into transformers' LlamaAttention: four queries, two groups."""
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="eager",
    )
    theirs = modeling.LlamaAttention(config, layer_idx=0).double().eval()
    model = decoder(n_kv_heads=2, qkv_bias=False)
    ours = model.blocks[0].attention
    weight = torch.cat(
        [m.weight for m in (theirs.q_proj, theirs.k_proj, theirs.v_proj)]
    )
    with torch.no_grad():
        ours.qkv.weight.copy_(weight)
        ours.proj.weight.copy_(theirs.o_proj.weight)
    x, positions = randn64(2, 9, 32), torch.arange(9).expand(2, 9)
    tables = modeling.LlamaRotaryEmbedding(config)(x, positions)
    future = torch.full((9, 9), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    expected = theirs(x, tables, future)[0]
    rotation = tuple(t.double() for t in model.rotation(positions))
    torch.testing.assert_close(ours(x, rotation), expected, rtol=0, atol=1e-6)
    by_mask = ours(x, rotation, window_mask(positions, positions)[:, None])
    torch.testing.assert_close(by_mask, ours(x, rotation), **EXACT)


def test_repeat_equals_transformers():
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    x = randn64(2, 3, 4, 5)
    assert torch.equal(repeat_groups(x, 12), modeling.repeat_kv(x, 4))


@pytest.mark.parametrize("n_groups", [1, 2, 4])
@pytest.mark.parametrize("queries", [1, 5])
def test_gradients_equal_those_through_copies(n_groups, queries):
    inputs = [x.requires_grad_() for x in heads(n_groups=n_groups, queries=queries)]
    mask = torch.rand(2, 1, queries, 5) < 0.7
    mask[..., 0] = True
    for options in ((mask,), (None,)):
        fast = grouped_attention(*inputs, *options)
        clear = grouped_attention_clear(*inputs, *options)
        weight = torch.randn_like(fast)
        for a, b in zip(
            torch.autograd.grad((fast * weight).sum(), inputs),
            torch.autograd.grad((clear * weight).sum(), inputs),
            strict=True,
        ):
            torch.testing.assert_close(a, b)


# --- edges ------------------------------------------------------------------------


def test_as_many_groups_as_heads_is_multi_head_attention_to_the_bit():
    q, k, v = heads(n_groups=4)
    expected = attention(q, k, v)[0]
    assert torch.equal(grouped_attention_clear(q, k, v), expected)
    kernel = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.equal(grouped_attention(q, k, v, causal=True), kernel)


@pytest.mark.parametrize("queries", [1, 5])
def test_one_group_is_multi_query_attention(queries):
    """All heads at once, as rows of one head: Shazeer's form."""
    q, k, v = heads(n_groups=1, queries=queries)
    rows = attention(q.flatten(1, 2), k[:, 0], v[:, 0])[0].view(q.shape)
    torch.testing.assert_close(grouped_attention(q, k, v), rows, **EXACT)


def test_causal_equals_the_causal_mask():
    q, k, v = heads()
    at = torch.arange(5).expand(2, 5)
    expected = grouped_attention_clear(q, k, v, window_mask(at, at)[:, None])
    ours = grouped_attention(q, k, v, causal=True)
    torch.testing.assert_close(ours, expected, **EXACT)


@pytest.mark.parametrize("queries", [1, 5])
def test_a_query_without_keys_gets_zero(queries):
    q, k, v = heads(queries=queries)
    mask = torch.ones(2, 1, queries, 5, dtype=torch.bool)
    mask[1, :, 0] = False
    out = grouped_attention(q, k, v, mask)
    assert (out[1, :, 0] == 0).all()
    torch.testing.assert_close(out, grouped_attention_clear(q, k, v, mask))


def test_scores_in_the_hundreds_stay_finite_and_exact():
    q, k, v = heads(queries=1)
    out = grouped_attention(1000 * q, k, v)
    torch.testing.assert_close(out, grouped_attention_clear(1000 * q, k, v), **EXACT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(dtype):
    q, k, v = heads(queries=1, keys=40)
    out = grouped_attention(q.to(dtype), k.to(dtype), v.to(dtype))
    assert out.dtype == dtype
    expected = grouped_attention_clear(q, k, v)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=0.03)


class Largest(TorchDispatchMode):
    """Keep the size of the largest new result of any operation, in bytes."""

    def __init__(self, *known):
        super().__init__()
        self.known, self.size = {t.data_ptr() for t in known}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.numel():
                new = tensor.untyped_storage().data_ptr() not in self.known
                size = tensor.untyped_storage().nbytes()
                self.size = max(self.size, size if new else 0)
        return out


@pytest.mark.parametrize("n_groups", [1, 2])
def test_decoding_copies_no_key(n_groups):
    """One query against 2 MB of keys a group: nothing new takes a tenth of one."""
    q = torch.randn(1, 8, 1, 64)
    k, v = torch.randn(2, 1, n_groups, 8192, 64).unbind()
    mask = torch.ones(1, 1, 1, 8192, dtype=torch.bool)
    # Keys and values are two halves of one storage, which starts where the keys do.
    with Largest(q, k) as watch:
        grouped_attention(q, k, v, mask)
    assert 0 < watch.size < 0.1 * 4 * 8192 * 64


# --- the conversion ---------------------------------------------------------------


def with_repeated_heads(model):
    """Write a grouped decoder as one whose every query head has its own keys."""
    sizes = model.config
    config = DecoderConfig(**{**vars(sizes), "n_kv_heads": sizes.n_heads})
    wide, state = Decoder(config).double().eval(), model.state_dict()
    for name in [n for n in state if ".qkv." in n]:
        rows = state[name].unflatten(0, (-1, sizes.d_head))
        q, k, v = rows.split([sizes.n_heads, sizes.kv_heads, sizes.kv_heads])
        times = sizes.n_heads // sizes.kv_heads
        k, v = (x.repeat_interleave(times, 0) for x in (k, v))
        state[name] = torch.cat((q, k, v)).flatten(0, 1)
    wide.load_state_dict(state)
    return wide


@pytest.mark.parametrize("pooling", ["mean", "first"])
@pytest.mark.parametrize("n_groups", [1, 2])
def test_equal_heads_are_pooled_without_loss(pooling, n_groups):
    """Pooling undoes repeating: the same weights, and the same logits before and after.

    Tiled groups, pooled columns, forgotten biases or values fail here.
    """
    grouped = decoder(n_kv_heads=n_groups)
    wide = with_repeated_heads(grouped)
    ids = torch.randint(32, (2, 11))
    torch.testing.assert_close(wide(ids), grouped(ids), **EXACT)
    back = to_grouped(wide, n_groups, pooling)
    assert back.config == grouped.config
    for name, tensor in grouped.state_dict().items():
        torch.testing.assert_close(back.state_dict()[name], tensor, **EXACT)


def test_pooled_weights_give_pooled_keys_after_the_rotation():
    model = decoder()
    back = to_grouped(model, 2)
    x, rotation = randn64(2, 7, 32), model.rotation(torch.arange(7)[None])
    rotation = tuple(t.double() for t in rotation)
    q, k, v = model.blocks[1].attention.project(x, rotation)
    q2, k2, v2 = back.blocks[1].attention.project(x, rotation)
    torch.testing.assert_close(q2, q, **EXACT)
    torch.testing.assert_close(k2, k.unflatten(1, (2, 2)).mean(2), **EXACT)
    torch.testing.assert_close(v2, v.unflatten(1, (2, 2)).mean(2), **EXACT)


def test_conversion_in_two_steps_is_conversion_in_one():
    model = decoder()
    twice = to_grouped(to_grouped(model, 2), 1).state_dict()
    for name, tensor in to_grouped(model, 1).state_dict().items():
        torch.testing.assert_close(twice[name], tensor, **EXACT)


def test_as_many_groups_as_before_changes_nothing():
    model = decoder()
    same = to_grouped(model, 4)
    ids = torch.randint(32, (1, 6))
    assert torch.equal(same(ids), model(ids))
    assert same is not model
    shared = {p.data_ptr() for p in model.parameters()}
    assert shared.isdisjoint(p.data_ptr() for p in same.parameters())


def test_the_original_its_mode_and_its_dtype_are_kept():
    model = decoder()
    before = copy.deepcopy(model.state_dict())
    assert not to_grouped(model, 1).training
    assert to_grouped(model.train(), 1).training
    assert to_grouped(model, 1).embed.weight.dtype == torch.float64
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_random_pooling_keeps_the_queries_and_draws_the_rest():
    model = decoder()
    torch.manual_seed(5)
    first = to_grouped(model, 2, "random").blocks[0].attention.qkv.weight
    second = to_grouped(model, 2, "random").blocks[0].attention.qkv.weight
    queries = model.blocks[0].attention.qkv.weight[:32]
    assert torch.equal(first[:32], queries)
    assert torch.equal(second[:32], queries)
    assert (first[32:] != second[32:]).all()


@pytest.mark.parametrize("tied", [True, False])
def test_a_converted_decoder_learns(tied):
    """Uptraining lowers the loss, on a text whose every byte follows from the last."""
    from groundup.training.batching import Corpus

    corpus = Corpus.of([torch.arange(600) % 7])
    model = Decoder(DecoderConfig(**{**vars(SIZES), "tied": tied}))
    recipe = TrainConfig(steps=12, batch=4, context=16, lr=1e-2, warmup=0)
    train(model, corpus, recipe)
    history = train(to_grouped(model, 1), corpus, recipe)
    assert history.losses[-1] < 0.5 * history.losses[0]


# --- refusals ---------------------------------------------------------------------


def test_refusals():
    q, k, v = heads(n_heads=4, n_groups=3)
    with pytest.raises(ValueError, match="multiple of the 3 key/value heads; got 4"):
        grouped_attention(q, k, v)
    with pytest.raises(ValueError, match="multiple of the 3 key/value heads; got 0"):
        repeat_groups(k, 0)
    q, k, v = heads(queries=2)
    with pytest.raises(ValueError, match="got 2 queries, 5 keys"):
        grouped_attention(q, k, v, causal=True)
    q, k, v = heads()
    with pytest.raises(ValueError, match="and a mask"):
        grouped_attention(q, k, v, torch.ones(1, 1, 5, 5).bool(), causal=True)
    for bad in (0, 3, 8):
        with pytest.raises(ValueError, match=f"n_groups must divide.*got {bad}"):
            pool_heads(torch.ones(4, 2), bad)
        with pytest.raises(ValueError, match=f"n_groups must divide.*got {bad}"):
            to_grouped(decoder(), bad)


# --- training in bfloat16 ---------------------------------------------------------


def short_and_long(n_queries):
    """Output and gradients in bfloat16, and in float64 on the same rounded numbers."""
    half = [x.bfloat16() for x in heads(n_groups=4, queries=n_queries, keys=n_queries)]
    up = torch.randn(half[0].shape).bfloat16()
    found = []
    for dtype in (torch.bfloat16, torch.float64):
        q, k, v = (x.to(dtype).requires_grad_() for x in half)
        out = grouped_attention(q, k, v, causal=True)
        found.append((out, *torch.autograd.grad(out, (q, k, v), up.to(dtype))))
    return found


@pytest.mark.parametrize("n_queries", [1, 2, 37])
def test_the_form_for_training_in_half_is_attention(n_queries):
    """bfloat16 has 8 significant bits: an error of a few times 2^-8 of the size."""
    for half, exact in zip(*short_and_long(n_queries), strict=True):
        assert half.dtype == torch.bfloat16
        error = (half.double() - exact).abs().max() / exact.abs().max().clamp(min=1)
        assert error < 0.03


def test_the_form_for_training_in_half_is_causal_and_scaled():
    """One large key in the future moves nothing; scores are divided by sqrt(D)."""
    q, k, v = (x.bfloat16() for x in heads(n_groups=4))
    before = grouped_attention(q.requires_grad_(), k, v, causal=True)
    k[:, :, -1], v[:, :, -1] = 100.0, -100.0
    after = grouped_attention(q, k, v, causal=True)
    torch.testing.assert_close(after[:, :, :-1], before[:, :, :-1], rtol=0, atol=0)
    scores = (q[:, :, 1:2].double() * k[:, :, :2].double()).sum(-1) / 6**0.5
    by_hand = scores.softmax(-1)[..., None].mul(v[:, :, :2].double()).sum(-2)
    torch.testing.assert_close(after[:, :, 1].double(), by_hand, rtol=0.03, atol=0.03)
