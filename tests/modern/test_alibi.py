"""ALiBi against hand values, MPT's and BLOOM's code and a loop; decoders with it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from groundup.modern.alibi import (
    AlibiDecoder,
    StretchedDecoder,
    TableDecoder,
    UnrotatedDecoder,
    alibi_bias,
    alibi_slopes,
)
from groundup.modern.decoder import Decoder, DecoderConfig
from groundup.modern.kv_cache import KVCache
from groundup.transformer.positions import sinusoid_table


def test_slopes_by_hand():
    """H = 8: 2^-1 to 2^-8. H = 4: every second of them, 2^-2, 2^-4, 2^-6, 2^-8.
    H = 6: those of 4, then 2^-1 and 2^-3 of the 8."""
    assert alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    assert alibi_slopes(4).tolist() == [2.0**-i for i in (2, 4, 6, 8)]
    assert alibi_slopes(6).tolist() == [2.0**-i for i in (2, 4, 6, 8, 1, 3)]
    assert alibi_slopes(1).tolist() == [2.0**-8]


@pytest.mark.parametrize("n_heads", [1, 2, 3, 4, 5, 7, 8, 12, 16, 20, 25, 32, 71])
def test_slopes_same_as_bloom(n_heads):
    """BLOOM took the authors' rule; its bias for a key at position 1 is the slope."""
    bloom = pytest.importorskip("transformers.models.bloom.modeling_bloom")
    theirs = bloom.build_alibi_tensor(torch.ones(1, 2), n_heads, torch.float32)
    torch.testing.assert_close(
        alibi_slopes(n_heads).float(), theirs[:, 0, 1], rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("n_heads", [1, 2, 4, 6, 12])
def test_weights_same_as_mpt(n_heads):
    """MPT adds slope times key position: under a causal mask, the same weights."""
    mpt = pytest.importorskip("transformers.models.mpt.modeling_mpt")
    theirs = mpt.build_mpt_alibi_tensor(n_heads, 9).double()  # (H, 1, S)
    t = torch.arange(9)
    ours = alibi_bias(alibi_slopes(n_heads), t, t)
    scores = torch.randn(n_heads, 9, 9, dtype=torch.float64)
    hidden = t[:, None] < t
    weights = [
        (scores + bias).masked_fill(hidden, -torch.inf).softmax(-1)
        for bias in (ours, theirs)
    ]
    torch.testing.assert_close(*weights, rtol=0, atol=1e-6)


def test_bias_by_hand():
    """Slopes 1/2 and 1/4, query at 3, keys at 0 to 3."""
    bias = alibi_bias(torch.tensor([0.5, 0.25]), torch.tensor([3]), torch.arange(4))
    assert bias.tolist() == [[[-1.5, -1.0, -0.5, 0.0]], [[-0.75, -0.5, -0.25, 0.0]]]


@given(
    seed=st.integers(0, 99),
    t=st.integers(0, 5),
    s=st.integers(0, 6),
    h=st.integers(1, 4),
)
@settings(max_examples=30)
def test_bias_is_the_loop(seed, t, s, h):
    generator = torch.Generator().manual_seed(seed)
    positions = torch.randint(1000, (2, t), generator=generator)
    keys = torch.randint(1000, (2, s), generator=generator)
    slopes = alibi_slopes(h)
    bias = alibi_bias(slopes, positions, keys)
    assert bias.shape == (2, h, t, s)
    for b in range(2):
        for i in range(t):
            for j in range(s):
                apart = abs(positions[b, i].item() - keys[b, j].item())
                assert bias[b, :, i, j].tolist() == (-slopes * apart).tolist()


@given(by=st.integers(0, 10**6))
@settings(max_examples=20)
def test_bias_depends_on_the_distance_only(by):
    t = torch.arange(7)
    slopes = alibi_slopes(3)
    assert torch.equal(alibi_bias(slopes, t + by, t + by), alibi_bias(slopes, t, t))


def test_bias_has_the_dtype_of_the_slopes():
    t = torch.arange(3)
    assert alibi_bias(alibi_slopes(2).float(), t, t).dtype == torch.float32


def test_refuses_no_heads():
    with pytest.raises(ValueError, match="n_heads must be positive; got 0"):
        alibi_slopes(0)


# --- decoders with other positions ------------------------------------------------

CONFIG = DecoderConfig(n_vocab=11, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2)


def randint(*shape, seed=0):
    return torch.randint(11, shape, generator=torch.Generator().manual_seed(seed))


def table():
    return sinusoid_table(40, 16, dtype=torch.float64)


MAKERS = {
    "none": lambda: UnrotatedDecoder(CONFIG),
    "alibi": lambda: AlibiDecoder(CONFIG),
    "table": lambda: TableDecoder(CONFIG, table(), trained=False),
    "stretched": lambda: StretchedDecoder(CONFIG),
}


def build(kind):
    """In float64, with weights large enough for attention to matter."""
    torch.manual_seed(0)
    model = MAKERS[kind]().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.3)
    return model


def distance(a, b):
    return (a - b).abs().max().item()


@pytest.mark.parametrize("kind", MAKERS)
@torch.no_grad()
def test_decoder_is_causal_and_cached_is_uncached(kind):
    model, ids = build(kind), randint(2, 12)
    changed = ids.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 11
    whole = model(ids)
    assert distance(whole[:, :7], model(changed)[:, :7]) < 1e-12
    assert distance(whole[:, 7:], model(changed)[:, 7:]) > 1e-2
    cache = KVCache(CONFIG, 12, batch=2, dtype=torch.float64)
    pieces = [model(part, cache=cache) for part in ids.split([5, 1, 4, 2], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("kind", "moves"),
    [("none", False), ("alibi", False), ("stretched", False), ("table", True)],
)
@torch.no_grad()
def test_who_notices_a_shift_of_all_positions(kind, moves):
    model, ids = build(kind), randint(1, 9)
    shifted = torch.arange(20, 29)[None]
    gap = distance(model(ids), model(ids, shifted))
    # The tables are in float32, also in a float64 model.
    assert gap > 1e-2 if moves else gap < 1e-5


@pytest.mark.parametrize("kind", MAKERS)
@torch.no_grad()
def test_who_knows_the_order(kind):
    """One layer without positions reads a bag: only there is the order invisible."""
    torch.manual_seed(0)
    model = build(kind)
    del model.blocks[1:]
    ids = torch.tensor([[1, 2, 3, 4, 5, 6]])
    swapped = torch.tensor([[5, 2, 3, 4, 1, 6]])
    gap = distance(model(ids)[:, -1], model(swapped)[:, -1])
    assert gap < 1e-12 if kind == "none" else gap > 1e-4


@torch.no_grad()
def test_alibi_decoder_by_hand_written_attention():
    """One layer, without torch's kernels: scores, bias, softmax, written out."""
    model = build("alibi")
    block, ids = model.blocks[0], randint(1, 6)
    positions = torch.arange(6)[None]
    mask = model.mask(positions, positions, plain=True)
    assert mask[0, :, 0, 1:].isneginf().all()
    x = block.attention_norm(model.embed(ids))
    q, k, v = block.attention.project(x, model.rotation(positions))
    heads = []
    for h in range(4):
        scores = q[0, h] @ k[0, h // 2].T / 2.0  # D = 4
        for t in range(6):
            for s in range(6):
                apart = 2.0 ** (-2 * (h + 1)) * (t - s)
                scores[t, s] = scores[t, s] - apart if s <= t else -torch.inf
        heads.append(scores.softmax(-1) @ v[0, h // 2])
    expected = block.attention.proj(torch.cat(heads, -1)[None])
    out = block.attention(x, model.rotation(positions), mask)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


@torch.no_grad()
def test_alibi_decoder_keeps_the_window_and_the_clear_path():
    torch.manual_seed(0)
    model = AlibiDecoder(DecoderConfig(**{**vars(CONFIG), "window": 3, "n_sinks": 1}))
    positions = torch.arange(6)[None]
    mask = model.mask(positions, positions, plain=True)[0, 0]
    seen = [[s for s in range(6) if not mask[t, s].isneginf()] for t in range(6)]
    assert seen[5] == [0, 3, 4, 5]
    assert seen[2] == [0, 1, 2]


@torch.no_grad()
def test_table_decoder_adds_the_row_of_the_position():
    model = build("table")
    ids, positions = randint(2, 3), torch.tensor([[4, 0, 9], [39, 39, 1]])
    expected = model.embed(ids) + table()[positions]
    torch.testing.assert_close(model.embed_tokens(ids, positions), expected)
    assert "table" not in model.state_dict()
    with pytest.raises(ValueError, match="up to 40, but the table has rows 0 to 39"):
        model(randint(1, 41))


def test_learned_table_is_trained_where_it_is_used():
    torch.manual_seed(0)
    rows = torch.randn(10, 16)
    model = TableDecoder(CONFIG, rows, trained=True)
    assert torch.equal(model.table, rows)
    model(randint(2, 4)).logsumexp(-1).sum().backward()
    used = model.table.grad.abs().sum(1) > 0
    assert used.tolist() == [True] * 4 + [False] * 6
    assert "table" in model.state_dict()


def test_table_of_another_width_is_refused():
    with pytest.raises(ValueError, match="d_model=16 columns; got 15"):
        TableDecoder(CONFIG, torch.zeros(3, 15), trained=False)


@torch.no_grad()
def test_stretched_decoder_is_the_decoder_and_squeezes():
    torch.manual_seed(0)
    plain = Decoder(CONFIG)
    model = StretchedDecoder(CONFIG)
    model.load_state_dict(plain.state_dict())
    ids = randint(1, 8)
    assert torch.equal(model(ids), plain(ids))
    model.scale = 4.0
    apart = torch.arange(0, 32, 4)[None]
    torch.testing.assert_close(model(ids, apart), plain(ids), rtol=0, atol=1e-6)
    assert distance(model(ids), plain(ids)) > 1e-7
