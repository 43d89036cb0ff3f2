"""The window against loops, Mistral, and full attention with an explicit mask."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from groundup.modern.decoder import Decoder, DecoderConfig
from groundup.modern.gqa import repeat_groups
from groundup.modern.sliding_window import NOTHING, window_mask

SMALL = DecoderConfig(
    n_vocab=40, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, tied=False
)
EXACT = {"rtol": 0, "atol": 1e-12}


def decoder(config, seed=0):
    torch.manual_seed(seed)
    model = Decoder(config).double()
    with torch.no_grad():
        model.head.weight.normal_()
    return model


@given(
    q=st.lists(st.integers(NOTHING, 12), min_size=1, max_size=6),
    k=st.lists(st.integers(NOTHING, 12), min_size=1, max_size=9),
    window=st.none() | st.integers(1, 8),
    n_sinks=st.integers(0, 4),
)
def test_every_pair_by_the_definition(q, k, window, n_sinks):
    found = window_mask(torch.tensor([q]), torch.tensor([k]), window, n_sinks)[0]
    for i, here in enumerate(q):
        for j, there in enumerate(k):
            exists = there != NOTHING and here != NOTHING
            near = window is None or here - there <= window - 1 or there < n_sinks
            assert found[i, j] == (exists and there <= here and near)


def test_by_hand():
    """Window 3 counts the query's own key; the sink is seen from everywhere."""
    t = torch.arange(6)[None]
    rows = ["x.....", "xx....", "xxx...", "xxxx..", "x.xxx.", "x..xxx"]
    expected = torch.tensor([[letter == "x" for letter in row] for row in rows])
    assert torch.equal(window_mask(t, t, 3, 1)[0], expected)
    alone = window_mask(t, t, 1)[0]
    assert torch.equal(alone, torch.eye(6, dtype=torch.bool))


def test_number_of_keys_in_reach():
    """min(t + 1, window + sinks), the query's own included."""
    t = torch.arange(30)[None]
    for window, n_sinks in ((1, 0), (4, 0), (4, 3), (30, 2)):
        counts = window_mask(t, t, window, n_sinks)[0].sum(-1)
        assert counts.tolist() == [min(i + 1, window + n_sinks) for i in range(30)]


def test_order_of_the_keys_is_free_and_rows_are_their_own():
    positions = torch.tensor([[4, 5], [9, NOTHING]])
    keys = torch.tensor([[5, 0, 3, NOTHING, 4], [7, 8, 1, 9, 0]])
    found = window_mask(positions, keys, 2, 1)
    assert found[0].tolist() == [
        [False, True, True, False, True],
        [True, True, False, False, True],
    ]
    assert found[1].tolist() == [[False, True, False, True, True], [False] * 5]


@pytest.mark.parametrize(
    ("window", "n_sinks", "message"),
    [
        (0, 0, "window must be at least 1, the query itself; got 0"),
        (3, -1, "n_sinks must not be negative; got -1"),
    ],
)
def test_refuses(window, n_sinks, message):
    t = torch.arange(3)[None]
    with pytest.raises(ValueError, match=message):
        window_mask(t, t, window, n_sinks)


@pytest.mark.parametrize("window", [1, 3, 8, 50])
def test_equals_mistral_with_its_window(window):
    transformers = pytest.importorskip("transformers")
    from groundup.modern.weights import load_hf

    torch.manual_seed(0)
    config = transformers.MistralConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=window,
        initializer_range=0.3,
        attn_implementation="eager",
    )
    theirs = transformers.MistralForCausalLM(config).eval()
    ours = load_hf(theirs, config.to_dict())
    assert ours.config.window == window
    ids = torch.randint(40, (2, 30))
    with torch.no_grad():
        expected = theirs(ids).logits
        torch.testing.assert_close(ours(ids), expected, rtol=0, atol=1e-4)
        ours.config = dataclasses.replace(ours.config, window=window + 1)
        off_by_one = (ours(ids) - expected).abs().max()
    assert off_by_one > 0.01 or window >= 30


@pytest.mark.parametrize(("window", "n_sinks"), [(3, 0), (3, 2), (1, 1), (40, 0)])
def test_equals_full_attention_with_an_explicit_mask(window, n_sinks, monkeypatch):
    """The oracle writes its mask with loops and hands it to torch as numbers."""
    from groundup.modern import decoder as module

    config = dataclasses.replace(SMALL, window=window, n_sinks=n_sinks)
    model = decoder(config)
    ids = torch.randint(40, (2, 24))
    with torch.no_grad():
        found = model(ids)
    allowed = torch.full((24, 24), -torch.inf, dtype=torch.float64)
    for t in range(24):
        for s in range(t + 1):
            if t - s < window or s < n_sinks:
                allowed[t, s] = 0.0

    def explicit(q, k, v, mask=None, *, causal=False):
        k, v = repeat_groups(k, q.shape[1]), repeat_groups(v, q.shape[1])
        return F.scaled_dot_product_attention(q, k, v, allowed)

    monkeypatch.setattr(module, "grouped_attention", explicit)
    with torch.no_grad():
        torch.testing.assert_close(model(ids), found, **EXACT)


@given(
    changed=st.integers(0, 23),
    window=st.none() | st.integers(1, 9),
    n_sinks=st.integers(0, 3),
)
def test_a_changed_token_never_moves_the_past(changed, window, n_sinks):
    config = dataclasses.replace(
        SMALL, window=window, n_sinks=n_sinks if window is not None else 0
    )
    model = decoder(config)
    ids = torch.randint(40, (1, 24))
    other = ids.clone()
    other[0, changed] = (ids[0, changed] + 1) % 40
    with torch.no_grad():
        moved = (model(ids) - model(other)).abs().amax(-1)[0]
    assert (moved[:changed] == 0).all()
    assert moved[changed] > 0


@pytest.mark.parametrize("n_layers", [1, 2, 3])
def test_reach_grows_by_a_window_a_layer(n_layers):
    """N layers of window W see N (W - 1) tokens back, and no further."""
    model = decoder(dataclasses.replace(SMALL, n_layers=n_layers, window=4))
    ids = torch.randint(40, (1, 24))
    other = ids.clone()
    other[0, 5] = (ids[0, 5] + 1) % 40
    with torch.no_grad():
        moved = (model(ids) - model(other)).abs().amax(-1)[0] > 0
    assert moved.nonzero()[:, 0].tolist() == list(range(5, 5 + 3 * n_layers + 1))


def test_sinks_reach_every_query_in_one_layer():
    model = decoder(dataclasses.replace(SMALL, n_layers=1, window=4, n_sinks=2))
    ids = torch.randint(40, (1, 24))
    for changed, reached in ((1, range(1, 24)), (2, range(2, 6))):
        other = ids.clone()
        other[0, changed] = (ids[0, changed] + 1) % 40
        with torch.no_grad():
            moved = (model(ids) - model(other)).abs().amax(-1)[0] > 0
        assert moved.nonzero()[:, 0].tolist() == list(reached)
