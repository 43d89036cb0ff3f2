"""Windows and blocks that skip work against dense attention with the same mask."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from groundup.modern import bench_attention
from groundup.modern.decoder import Decoder, DecoderConfig
from groundup.modern.gqa import grouped_attention_clear
from groundup.modern.kv_cache import KVCache
from groundup.modern.sliding_window import window_mask
from groundup.modern.sparse_attention import (
    LocalDecoder,
    block_layout,
    block_sparse_attention,
    block_sparse_mask,
    density,
    local_attention,
)
from groundup.transformer.single_head import causal_mask, influence

EXACT = {"rtol": 0, "atol": 1e-12}
SIZES = DecoderConfig(
    n_vocab=32, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, window=5
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def heads(n_tokens, batch=2, n_heads=2, n_groups=2, size=4):
    return [
        torch.randn(batch, h, n_tokens, size, dtype=torch.float64)
        for h in (n_heads, n_groups, n_groups)
    ]


def dense_window(n_tokens, window):
    """Written with two loops, for nobody to share a mistake with."""
    rows = [[t - window < s <= t for s in range(n_tokens)] for t in range(n_tokens)]
    return torch.tensor(rows)


def random_layout(n, seed, share=0.5):
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(n, n, generator=generator) < share).tril()


# --- by hand ----------------------------------------------------------------------


def test_window_of_two_by_hand():
    """Keys of 0: each token averages its own value and the one before.

    Values 2, 4, 8, 16, 32: 2, 3, 6, 12, 24.
    """
    v = torch.tensor([2.0, 4.0, 8.0, 16.0, 32.0]).view(1, 1, 5, 1).double()
    for block in (1, 2, 3, 64):
        out = local_attention(torch.randn_like(v), 0 * v, v, 2, block)
        assert out.flatten().tolist() == pytest.approx([2, 3, 6, 12, 24], abs=1e-12)


def test_blocks_by_hand():
    """Five tokens in blocks of two: 0 1 | 2 3 | 4. The last block reads the first.

    Keys of 0, values 2, 4, 8, 16, 32. Block 0 reads itself: 2, (2+4)/2 = 3. Block 1
    reads both: (2+4+8)/3 and (2+4+8+16)/4. Block 2 reads block 0 only: (2+4)/2 = 3.
    """
    layout = torch.tensor(
        [[True, False, False], [True, True, False], [True, False, False]]
    )
    v = torch.tensor([2.0, 4.0, 8.0, 16.0, 32.0]).view(1, 1, 5, 1).double()
    out = block_sparse_attention(torch.randn_like(v), 0 * v, v, layout, 2)
    assert out.flatten().tolist() == pytest.approx([2, 3, 14 / 3, 7.5, 3], abs=1e-12)
    expected = [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 0],
    ]
    assert block_sparse_mask(layout, 2, 5).int().tolist() == expected
    assert density(layout) == pytest.approx(4 / 6)


def test_layouts_by_hand():
    """Four blocks. Own and previous; own and the first; all that is the past."""
    near = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    assert block_layout(4, local=2).int().tolist() == near
    first = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1]]
    assert block_layout(4, first=1).int().tolist() == first
    assert torch.equal(block_layout(4, share=1.0), causal_mask(4))


@settings(max_examples=50, deadline=None)
@given(
    n_blocks=st.integers(1, 20),
    local=st.integers(0, 3),
    share=st.floats(0, 1),
    seed=st.integers(0, 100),
)
def test_layouts_reach_their_share_and_never_the_future(n_blocks, local, share, seed):
    layout = block_layout(n_blocks, local=local, share=share, seed=seed)
    assert not layout.triu(1).any()
    fixed = block_layout(n_blocks, local=local)
    assert (layout | ~fixed).all()
    one_block = 1 / (n_blocks * (n_blocks + 1) / 2)
    assert density(layout) >= share - 1e-12
    assert density(layout) <= max(share, density(fixed)) + one_block


# --- the same as dense attention under the same mask --------------------------------


@settings(max_examples=120, deadline=None)
@given(
    n_tokens=st.integers(1, 40),
    window=st.integers(1, 50),
    block=st.integers(1, 12),
    n_groups=st.integers(1, 2),
    per_group=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_local_equals_dense(n_tokens, window, block, n_groups, per_group, seed):
    torch.manual_seed(seed)
    q, k, v = heads(n_tokens, n_heads=n_groups * per_group, n_groups=n_groups)
    mask = dense_window(n_tokens, window)
    expected = grouped_attention_clear(q, k, v, mask)
    out = local_attention(q, k, v, window, block)
    torch.testing.assert_close(out, expected, **EXACT)
    at = torch.arange(n_tokens)[None]
    assert torch.equal(window_mask(at, at, window)[0], mask)


@settings(max_examples=80, deadline=None)
@given(
    n_tokens=st.integers(1, 40),
    block=st.integers(1, 12),
    share=st.sampled_from([0.0, 0.3, 0.7, 1.0]),
    per_group=st.integers(1, 2),
    seed=st.integers(0, 2**31),
)
def test_block_sparse_equals_dense(n_tokens, block, share, per_group, seed):
    torch.manual_seed(seed)
    q, k, v = heads(n_tokens, n_heads=2 * per_group)
    layout = random_layout(-(-n_tokens // block), seed, share)
    mask = block_sparse_mask(layout, block, n_tokens)
    for t in range(n_tokens):  # the layout, token by token
        for s in range(n_tokens):
            assert mask[t, s] == (s <= t and layout[t // block, s // block])
    expected = grouped_attention_clear(q, k, v, mask)  # 0 where nothing is listed
    out = block_sparse_attention(q, k, v, layout, block)
    torch.testing.assert_close(out, expected, **EXACT)


@settings(max_examples=25, deadline=None)
@given(
    n_tokens=st.integers(2, 24),
    window=st.integers(1, 12),
    block=st.integers(1, 8),
    seed=st.integers(0, 2**31),
)
def test_gradients_equal_those_of_dense_attention(n_tokens, window, block, seed):
    torch.manual_seed(seed)
    inputs = [x.requires_grad_() for x in heads(n_tokens, n_heads=4)]
    layout = random_layout(-(-n_tokens // block), seed)
    layout.fill_diagonal_(True)
    weight = torch.randn(2, 4, n_tokens, 4, dtype=torch.float64)
    for sparse, mask in (
        (local_attention(*inputs, window, block), dense_window(n_tokens, window)),
        (
            block_sparse_attention(*inputs, layout, block),
            block_sparse_mask(layout, block, n_tokens),
        ),
    ):
        dense = grouped_attention_clear(*inputs, mask)
        for a, b in zip(
            torch.autograd.grad((sparse * weight).sum(), inputs),
            torch.autograd.grad((dense * weight).sum(), inputs),
            strict=True,
        ):
            torch.testing.assert_close(a, b)


def test_equals_torchs_flex_attention():
    flex = pytest.importorskip("torch.nn.attention.flex_attention")
    q, k, v = (x.float() for x in heads(48, n_heads=2))

    def in_window(batch, head, query, key):
        return (key <= query) & (query - key < 9)

    block_mask = flex.create_block_mask(in_window, None, None, 48, 48, device="cpu")
    with warnings.catch_warnings():  # that it is not compiled
        warnings.simplefilter("ignore")
        expected = flex.flex_attention(q, k, v, block_mask=block_mask)
    out = local_attention(q, k, v, 9, 4)
    torch.testing.assert_close(out, expected, rtol=0, atol=2e-6)


# --- who can move whom ------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 4, 8, 9, 30])
def test_only_the_window_moves_a_token(window):
    """Above: the future never does. Below: neither does what lies outside."""

    def layer(x):
        x = x[:, None]
        return local_attention(x, x, x, window, block=4)[:, 0]

    x, other = torch.randn(2, 19, 4, dtype=torch.float64)
    assert torch.equal(influence(layer, x, other) != 0, dense_window(19, window))


def test_only_listed_blocks_move_a_token():
    layout = random_layout(5, seed=3)
    layout.fill_diagonal_(True)

    def layer(x):
        x = x[:, None]
        return block_sparse_attention(x, x, x, layout, 4)[:, 0]

    x, other = torch.randn(2, 19, 4, dtype=torch.float64)
    assert torch.equal(
        influence(layer, x, other) != 0, block_sparse_mask(layout, 4, 19)
    )


def test_a_full_layout_is_causal_attention():
    q, k, v = heads(21)
    layout = causal_mask(6)
    assert torch.equal(block_sparse_mask(layout, 4, 21), causal_mask(21))
    assert density(layout) == 1
    out = block_sparse_attention(q, k, v, layout, 4)
    dense = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(out, dense, **EXACT)


def test_an_empty_row_gives_zero_and_no_gradient():
    q, k, v = (x.requires_grad_() for x in heads(8))
    layout = torch.tensor([[True, False], [False, False]])
    out = block_sparse_attention(q, k, v, layout, 4)
    assert (out[:, :, 4:] == 0).all()
    out.sum().backward()
    assert q.grad.isfinite().all()
    assert (v.grad[:, :, 4:] == 0).all()


def test_scores_in_the_hundreds_and_half_precision():
    q, k, v = heads(30)
    mask = dense_window(30, 7)
    out = local_attention(1000 * q, k, v, 7, 4)
    torch.testing.assert_close(
        out, grouped_attention_clear(1000 * q, k, v, mask), **EXACT
    )
    half = local_attention(*(x.bfloat16() for x in (q, k, v)), 7, 4)
    assert half.dtype == torch.bfloat16
    dense = grouped_attention_clear(q, k, v, mask)
    torch.testing.assert_close(half.double(), dense, rtol=0, atol=0.03)


# --- that the work is skipped -----------------------------------------------------


class Largest(TorchDispatchMode):
    """Keep the size of the largest result of any operation, in bytes."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.size = max(self.size, tensor.untyped_storage().nbytes())
        return out


def largest_result(function):
    with Largest() as watch:
        function()
    return watch.size


def test_no_tensor_grows_with_the_square_of_the_text():
    """Eight times the text, eight times the largest tensor (and not 64 times)."""

    def largest(n_tokens):
        q, k, v = (torch.randn(1, 1, n_tokens, 8) for _ in range(3))
        layout = torch.eye(n_tokens // 64, dtype=torch.bool)
        return max(
            largest_result(lambda: local_attention(q, k, v, 32, 16)),
            largest_result(lambda: block_sparse_attention(q, k, v, layout, 64)),
        )

    assert largest(8192) <= 8.5 * largest(1024)


def test_scores_are_not_kept():
    """Torch's fused kernel is used: its scores would be five times as large as q."""
    q, k, v = (torch.randn(1, 2, 2048, 64) for _ in range(3))
    size = largest_result(lambda: local_attention(q, k, v, 256, 64))
    assert size <= 1.5 * 4 * q.numel()
    layout = block_layout(16, local=4)
    size = largest_result(lambda: block_sparse_attention(q, k, v, layout, 128))
    assert size <= 1.5 * 4 * q.numel()


def test_flops_are_those_of_the_listed_blocks():
    """Two products of 2 x queries x keys x D FLOP each, counted on the plain kernel."""
    q, k, v = (torch.randn(1, 2, 512, 8) for _ in range(3))

    def scores(function):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            function()
        return counter.get_total_flops() / (2 * 2 * 8 * 2)  # by D and two heads

    layout = random_layout(8, seed=1)
    listed = scores(lambda: block_sparse_attention(q, k, v, layout, 64))
    assert listed == layout.sum() * 64 * 64
    # 16 blocks of 32 and a window of 33: the first block alone, 15 with one before.
    local = scores(lambda: local_attention(q, k, v, window=33, block=32))
    assert local == 32 * 32 + 15 * 32 * 64


# --- in the decoder ---------------------------------------------------------------


@pytest.mark.parametrize("n_tokens", [1, 4, 5, 150])
def test_local_decoder_equals_the_masked_decoder(n_tokens):
    model = Decoder(SIZES).double()
    local = LocalDecoder(SIZES).double()
    local.load_state_dict(model.state_dict())
    ids = torch.randint(32, (2, n_tokens))
    torch.testing.assert_close(local(ids), model(ids), rtol=0, atol=1e-6)


def test_local_decoder_never_builds_the_mask():
    ids = torch.randint(32, (1, 2048))
    assert largest_result(lambda: LocalDecoder(SIZES)(ids)) < 2048**2
    assert largest_result(lambda: Decoder(SIZES)(ids)) >= 2048**2


def test_local_decoder_with_padding_and_with_a_cache():
    model = Decoder(SIZES)
    local = LocalDecoder(SIZES)
    local.load_state_dict(model.state_dict())
    ids = torch.randint(32, (2, 12))
    positions = torch.stack((torch.arange(12), torch.arange(12) - 3)).clamp(min=-1)
    torch.testing.assert_close(local(ids, positions), model(ids, positions))
    cache = KVCache(SIZES, 12, batch=2)
    parts = [local(part, cache=cache) for part in ids.split([7, 1, 4], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), local(ids), rtol=0, atol=1e-5)


def test_local_decoder_starts_like_a_decoder():
    torch.manual_seed(1)
    plain = Decoder(SIZES).state_dict()
    torch.manual_seed(1)
    for name, tensor in LocalDecoder(SIZES).state_dict().items():
        assert torch.equal(tensor, plain[name])


# --- the benchmark ----------------------------------------------------------------


def test_benchmark_compares_before_it_times(capsys, monkeypatch):
    threads = torch.get_num_threads()
    claims = bench_attention.attention(quick=True)
    assert [(c.what, c.target) for c in claims] == [
        ("local-vs-dense", 5),
        ("block-sparse-vs-dense", 4),
    ]
    assert all(claim.ratio > 0 for claim in claims)
    assert len(capsys.readouterr().out.splitlines()) == 5
    monkeypatch.setattr(bench_attention, "local_attention", lambda q, k, v, window: v)
    with pytest.raises(AssertionError, match="not close"):
        bench_attention.attention(quick=True)
    assert torch.get_num_threads() == threads


# --- refusals ---------------------------------------------------------------------


def test_refusals():
    q, k, v = heads(8)
    for window, block in ((0, 4), (4, 0)):
        with pytest.raises(ValueError, match=f"got window={window}, block={block}"):
            local_attention(q, k, v, window, block)
    with pytest.raises(ValueError, match="each block of 4 of the 8 tokens; got 3"):
        block_sparse_attention(q, k, v, causal_mask(3), 4)
    with pytest.raises(ValueError, match="each block of 4 of the 9 tokens; got 2"):
        block_sparse_mask(causal_mask(2), 4, 9)
    with pytest.raises(ValueError, match="each block of 0"):
        block_sparse_mask(causal_mask(2), 0, 8)
    ahead = torch.ones(2, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"future.*got \[\[0, 1\]\]"):
        block_sparse_attention(q, k, v, ahead, 4)
    with pytest.raises(ValueError, match=r"share must lie in \[0, 1\]; got 1.5"):
        block_layout(4, share=1.5)
    for changes in ({"window": None}, {"n_sinks": 1}):
        config = DecoderConfig(**{**vars(SIZES), **changes})
        with pytest.raises(ValueError, match="config must have a window and no sinks"):
            LocalDecoder(config)
