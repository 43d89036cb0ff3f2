"""The ring against the cache that forgets nothing, with the same window."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from groundup.modern.attention_sinks import ReindexedAttention, farthest
from groundup.modern.decoder import Attention, Decoder, DecoderConfig
from groundup.modern.kv_cache import KVCache, generate, left_pad
from groundup.modern.rolling_cache import RollingCache, ring_slots
from groundup.modern.sliding_window import NOTHING
from groundup.modern.variants import swap

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
WINDOW = dataclasses.replace(SINKS, n_sinks=0)
ONE = dataclasses.replace(SINKS, window=1, n_sinks=1)
CONFIGS = pytest.mark.parametrize("config", [SINKS, WINDOW, ONE])
EXACT = {"rtol": 0, "atol": 1e-12}


def decoder(config=SINKS, seed=0):
    torch.manual_seed(seed)
    model = Decoder(config).double().eval()
    with torch.no_grad():
        model.head.weight.normal_()
    return model


def ring(model, batch=1, **options):
    return RollingCache(model.config, batch=batch, dtype=torch.float64, **options)


@torch.no_grad()
def in_chunks(model, ids, sizes, cache, positions=None):
    parts = ids.split(sizes, 1)
    where = [None] * len(parts) if positions is None else positions.split(sizes, 1)
    return torch.cat([model(p, w, cache) for p, w in zip(parts, where, strict=True)], 1)


CHUNKS = st.lists(st.integers(1, 12), min_size=1, max_size=24).filter(
    lambda sizes: sum(sizes) <= 24
)


@CONFIGS
@settings(max_examples=30, deadline=None)
@given(sizes=CHUNKS, seed=st.integers(0, 2**31))
def test_ring_is_unbounded_is_uncached_in_any_chunks(config, sizes, seed):
    """At every position, to more than three times window and sinks."""
    model = decoder(config, seed % 5)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(40, (2, sum(sizes)), generator=generator)
    found = in_chunks(model, ids, sizes, ring(model, 2))
    unbounded = KVCache(config, sum(sizes), batch=2, dtype=torch.float64)
    expected = in_chunks(model, ids, sizes, unbounded)
    torch.testing.assert_close(found, expected, **EXACT)
    with torch.no_grad():
        torch.testing.assert_close(found, model(ids), **EXACT)


@CONFIGS
@settings(max_examples=30, deadline=None)
@given(sizes=CHUNKS)
def test_length_is_at_most_window_and_sinks(config, sizes):
    model, read = decoder(config), 0
    cache = ring(model)
    before = cache.n_bytes
    for n in sizes:
        in_chunks(model, torch.zeros(1, n, dtype=torch.long), [n], cache)
        read += n
        held = min(read, config.window + config.n_sinks)
        assert cache.n_held.tolist() == [held]
        assert cache.length == held
        inside = cache.positions[0, : cache.length]
        newest = range(max(config.n_sinks, read - config.window), read)
        expected = {*range(min(read, config.n_sinks)), *newest}
        assert set(inside.tolist()) == expected
    assert cache.n_bytes == before


def test_slots_by_hand():
    """Window 4 after 2 sinks: the ring has the slots 2 to 5."""
    t = torch.arange(8)[None]
    one_by_one = [ring_slots(t[:, i : i + 1], t[:, i : i + 1], 4, 2) for i in range(8)]
    assert torch.cat(one_by_one, 1).tolist() == [[0, 1, 2, 3, 4, 5, 2, 3]]
    # All at once, tokens 2 and 3 are gone before they could be read again: slot 6.
    at_once = ring_slots(t, torch.tensor([[7]]), 4, 2)
    assert at_once.tolist() == [[0, 1, 6, 6, 4, 5, 2, 3]]
    padded = torch.tensor([[NOTHING, 0, 1]])
    assert ring_slots(padded, torch.tensor([[1]]), 4, 2).tolist() == [[6, 0, 1]]


@CONFIGS
@pytest.mark.parametrize("sizes", [[26], [1] * 26, [4] * 6 + [2], [13, 1, 12]])
def test_rows_of_different_length_are_as_if_alone(config, sizes):
    model = decoder(config)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(40, (n,), generator=generator) for n in (26, 1, 9, 17)]
    ids, positions = left_pad(prompts)
    logits = in_chunks(model, ids, sizes, ring(model, 4), positions)
    with torch.no_grad():
        for row, prompt in enumerate(prompts):
            alone = model(prompt[None])[0]
            torch.testing.assert_close(logits[row, -len(prompt) :], alone, **EXACT)


@CONFIGS
@pytest.mark.parametrize("chunk", [None, 1, 3])
def test_generates_what_the_unbounded_cache_does(config, chunk):
    model, prompts = decoder(config), [[3], [5, 8, 13, 21, 34, 2, 7, 9], [1, 2, 3, 4]]
    expected = generate(model, prompts, 30, cache=False)
    found = generate(model, prompts, 30, cache=ring(model, 3), chunk=chunk)
    assert found == expected
    stop = [expected[1][5]]
    stopped = generate(model, prompts, 30, cache=False, stop=stop)
    assert generate(model, prompts, 30, cache=ring(model, 3), stop=stop) == stopped


@pytest.mark.parametrize("chunk", [1, 4, 11])
def test_a_changed_token_never_moves_the_past(chunk):
    model = decoder()
    ids = torch.randint(40, (1, 22))
    sizes = [chunk] * (22 // chunk) + [22 % chunk] * (22 % chunk > 0)
    for changed in (0, 6, 13, 21):
        other = ids.clone()
        other[0, changed] = (ids[0, changed] + 1) % 40
        a, b = (in_chunks(model, x, sizes, ring(model)) for x in (ids, other))
        assert torch.equal(a[:, :changed], b[:, :changed])
        assert (a[:, changed] - b[:, changed]).abs().max() > 0.1


def test_positions_survive_the_wrap():
    cache = RollingCache(SINKS, batch=2)
    cache.extend(torch.arange(100)[None].expand(2, -1))
    assert cache.next_positions(2).tolist() == [[100, 101]] * 2
    held = cache.extend(torch.tensor([[100], [NOTHING]]))  # the second row has ended
    assert held[0].tolist() == [0, 1, 97, 98, 99, 100, 96]
    assert held[1].tolist() == [0, 1, 97, 98, 99, 95, 96]
    assert cache.next_positions(1).tolist() == [[101], [100]]


def test_one_token_is_not_copied():
    cache = RollingCache(SINKS)
    for t in range(20):
        held = cache.extend(torch.tensor([[t]]))
        k, _ = cache.put(0, torch.full((1, 2, 1, 4), 1.0 * t), torch.ones(1, 2, 1, 4))
        assert k.data_ptr() == cache.keys[0].data_ptr()
        torch.testing.assert_close(k[0, 0, :, 0], held[0].float())  # same order


def test_a_chunk_longer_than_the_ring_sees_the_old_keys():
    """The first query of the chunk needs the window before it."""
    cache = RollingCache(WINDOW)
    cache.extend(torch.arange(7)[None])
    cache.put(0, *[torch.arange(7.0).view(1, 1, 7, 1).expand(1, 2, 7, 4)] * 2)
    held = cache.extend(torch.arange(7, 19)[None])
    new = torch.arange(7.0, 19.0).view(1, 1, 12, 1).expand(1, 2, 12, 4)
    k, _ = cache.put(0, new, new)
    assert held[0].tolist() == k[0, 0, :, 0].tolist()
    assert sorted(held[0].tolist()) == list(range(2, 19))


@pytest.mark.parametrize("positions", [[[3, 3]], [[4, 3]], [[2, 3]], [[2]], [[-1, 2]]])
def test_positions_must_rise(positions):
    cache = RollingCache(SINKS)
    cache.extend(torch.tensor([[0, 1, 2]]))
    with pytest.raises(ValueError, match=r"positions must rise.*after \[2\]"):
        cache.extend(torch.tensor(positions))
    assert cache.next_positions(1).tolist() == [[3]]


def test_a_model_without_a_window_is_refused():
    with pytest.raises(ValueError, match="set a window, or use a KVCache"):
        RollingCache(dataclasses.replace(SINKS, window=None, n_sinks=0))


# Positions counted inside the cache: another function, with an oracle of its own.


def reindexed(model):
    return swap(model, Attention, lambda old: ReindexedAttention.of(old, model.config))


@pytest.mark.parametrize("config", [SINKS, ONE, WINDOW])
def test_reindexed_ring_equals_reindexed_attention(config):
    """One by one after any chunks that fit; three times around."""
    model, ids = decoder(config), torch.randint(40, (2, 24))
    room = farthest(config.window, config.n_sinks) + 1
    for first in ([1] * room, [room], [1, room - 1] if room > 1 else [1]):
        sizes = [*first, *[1] * (24 - room)]
        cached = in_chunks(model, ids, sizes, ring(model, 2, reindexed=True))
        with torch.no_grad():
            expected = reindexed(decoder(config))(ids)
        torch.testing.assert_close(cached, expected, rtol=0, atol=1e-6)
    absolute = in_chunks(model, ids, [1] * 24, ring(model, 2))
    moved = (absolute - cached).abs().amax((0, 2))
    assert moved[:room].max() < 1e-6
    if config.n_sinks and config.window > 1:
        assert moved[room:].min() > 1e-3


def test_reindexed_rows_of_different_length():
    """One row's ring is full long before the other has read its sinks."""
    model = decoder()
    long, short = torch.randint(40, (20,)), torch.randint(40, (4,))
    ids, positions = left_pad([long, short])
    found = in_chunks(model, ids, [1] * 20, ring(model, 2, reindexed=True), positions)
    with torch.no_grad():
        whole = reindexed(decoder())(long[None])[0]
        torch.testing.assert_close(found[0], whole, rtol=0, atol=1e-6)
        torch.testing.assert_close(
            found[1, -4:], model(short[None])[0], rtol=0, atol=1e-6
        )


def test_reindexed_sinks_do_not_drift():
    """After 3,000 turns a sink is its first self, turned once."""
    from groundup.modern.rope import rope_tables, rotate

    cache = RollingCache(SINKS, reindexed=True)
    sink = torch.randn(1, 2, 2, 4)
    cache.extend(torch.tensor([[0, 1]]))
    cache.put(0, sink, sink)
    for t in range(2, 3000):
        cache.extend(torch.tensor([[t]]))
        k, v = cache.put(0, torch.ones(1, 2, 1, 4), torch.ones(1, 2, 1, 4))
    moved = torch.full((2,), 2999 - farthest(5, 2))
    tables = rope_tables(moved, 4, SINKS.rope_theta)
    torch.testing.assert_close(k[:, :, :2], rotate(sink, *tables), rtol=0, atol=1e-6)
    assert torch.equal(v[:, :, :2], sink)


def test_a_full_reindexed_cache_takes_one_token_at_a_time():
    cache = RollingCache(SINKS, reindexed=True)
    cache.extend(torch.arange(7)[None])  # indices 0 to 6: just full
    with pytest.raises(ValueError, match="only up to position 6; feed the rest one"):
        cache.extend(torch.tensor([[7, 8]]))
    assert cache.next_positions(1).tolist() == [[7]]  # nothing was damaged
    cache.extend(torch.tensor([[7]]))
