"""The cache against reading everything again, and generation against both."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from groundup.modern.decoder import Decoder, DecoderConfig
from groundup.modern.kv_cache import (
    KVCache,
    bytes_per_token,
    generate,
    left_pad,
)
from groundup.modern.sliding_window import NOTHING

SMALL = DecoderConfig(
    n_vocab=40, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, tied=False
)
WINDOW = dataclasses.replace(SMALL, window=5)
SINKS = dataclasses.replace(SMALL, window=5, n_sinks=2)
CONFIGS = pytest.mark.parametrize("config", [SMALL, WINDOW, SINKS])
EXACT = {"rtol": 0, "atol": 1e-12}


def decoder(config=SMALL, seed=0):
    torch.manual_seed(seed)
    model = Decoder(config).double().eval()
    with torch.no_grad():  # a head that decides, so that a wrong cache shows
        model.head.weight.normal_()
    return model


def cache_for(model, n_slots, batch=1):
    return KVCache(model.config, n_slots, batch=batch, dtype=torch.float64)


@torch.no_grad()
def in_chunks(model, ids, sizes, cache, positions=None):
    """All logits of ids, read in pieces of these sizes."""
    parts = ids.split(sizes, 1)
    where = [None] * len(parts) if positions is None else positions.split(sizes, 1)
    return torch.cat([model(p, w, cache) for p, w in zip(parts, where, strict=True)], 1)


@CONFIGS
@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=16).filter(
        lambda s: sum(s) <= 21
    ),
    seed=st.integers(0, 2**31),
)
def test_cached_is_uncached_in_any_chunks_at_every_position(config, sizes, seed):
    """To three times the window and its sinks: 21 tokens."""
    model = decoder(config, seed % 7)
    ids = torch.randint(
        40, (2, sum(sizes)), generator=torch.Generator().manual_seed(seed)
    )
    cache = cache_for(model, sum(sizes), 2)
    with torch.no_grad():
        expected = model(ids)
    torch.testing.assert_close(in_chunks(model, ids, sizes, cache), expected, **EXACT)
    assert cache.length == sum(sizes)


@CONFIGS
@pytest.mark.parametrize("chunk", [1, 3, 8])
def test_prefill_with_a_cache_is_causal(config, chunk):
    """Changing token 7 moves no logits before it, and moves those at it."""
    model = decoder(config)
    ids = torch.randint(40, (1, 12))
    changed = ids.clone()
    changed[0, 7] = (ids[0, 7] + 1) % 40
    before, after = (
        in_chunks(
            model, x, [chunk] * (12 // chunk) + [12 % chunk], cache_for(model, 12)
        )
        if 12 % chunk
        else in_chunks(model, x, [chunk] * (12 // chunk), cache_for(model, 12))
        for x in (ids, changed)
    )
    assert torch.equal(before[:, :7], after[:, :7])
    assert (before[:, 7] - after[:, 7]).abs().max() > 0.1


@CONFIGS
@pytest.mark.parametrize("sizes", [[7], [2, 5], [1] * 7, [4, 1, 2]])
def test_rows_of_different_length_are_as_if_alone(config, sizes):
    """Left padding, in chunks: some hold nothing but padding for the short row."""
    model = decoder(config)
    prompts = [[3], [5, 8, 13, 21, 34, 2, 7], [1, 2, 3, 4]]
    ids, positions = left_pad(prompts)
    cache = cache_for(model, 7, 3)
    logits = in_chunks(model, ids, sizes, cache, positions)
    with torch.no_grad():
        for row, prompt in enumerate(prompts):
            alone = model(torch.tensor([prompt]))[0]
            torch.testing.assert_close(logits[row, -len(prompt) :], alone, **EXACT)
            uncached = model(ids, positions)[row, -len(prompt) :]
            torch.testing.assert_close(uncached, alone, **EXACT)


def test_the_id_of_padding_changes_nothing():
    model = decoder()
    ids, positions = left_pad([[3], [5, 8, 13]])
    other = torch.where(positions == NOTHING, 39, ids)
    with torch.no_grad():
        a, b = model(ids, positions), model(other, positions)
    real = positions > NOTHING
    assert torch.equal(a[real], b[real])


def test_left_pad_by_hand():
    ids, positions = left_pad([[7, 8, 9], torch.tensor([4])])
    assert ids.tolist() == [[7, 8, 9], [0, 0, 4]]
    assert positions.tolist() == [[0, 1, 2], [NOTHING, NOTHING, 0]]


@pytest.mark.parametrize("prompts", [[], [[]], [[1], []]])
def test_an_empty_prompt_is_refused(prompts):
    with pytest.raises(ValueError, match="at least one token; got lengths"):
        left_pad(prompts)
    with pytest.raises(ValueError, match="at least one token; got lengths"):
        generate(decoder(), prompts, 2)


def test_a_full_cache_refuses_and_says_what_to_do():
    model = decoder()
    cache = cache_for(model, 4)
    model(torch.tensor([[1, 2, 3]]), cache=cache)
    with pytest.raises(ValueError, match=r"holds 3 tokens and cannot take 2.*larger"):
        model(torch.tensor([[1, 2]]), cache=cache)
    model(torch.tensor([[1]]), cache=cache)  # one still fits: nothing was damaged
    assert cache.length == 4


def test_a_cache_of_another_batch_is_refused():
    model = decoder()
    for batch, prompts in ((1, [[1], [2]]), (3, [[1], [2]])):
        message = f"batch={batch} rows and got 2: make one for 2"
        with pytest.raises(ValueError, match=message):
            cache_for(model, 4, batch).extend(torch.tensor(prompts))


def test_next_positions_continue_every_row():
    cache = KVCache(SMALL, 8, batch=2)
    assert cache.next_positions(2).tolist() == [[0, 1], [0, 1]]
    cache.extend(left_pad([[1, 2, 3], [4]])[1])
    assert cache.next_positions(2).tolist() == [[3, 4], [1, 2]]
    cache.extend(torch.tensor([[3], [NOTHING]]))  # a row that has ended
    assert cache.next_positions(1).tolist() == [[4], [1]]


def test_bytes_by_hand():
    """R1-Distill-Qwen-1.5B: 2 * 28 * 2 * 128 * 2 = 28,672 bytes a token."""
    sizes = DecoderConfig(
        d_model=12 * 128, n_layers=28, n_heads=12, n_kv_heads=2, n_vocab=10
    )
    assert bytes_per_token(sizes, torch.bfloat16) == 28_672
    cache = KVCache(SMALL, 10, batch=3)
    assert (
        cache.n_bytes == 3 * 10 * bytes_per_token(SMALL) == 3 * 10 * 2 * 2 * 2 * 4 * 4
    )


def test_put_returns_views_and_not_copies():
    cache = KVCache(SMALL, 4)
    cache.extend(torch.tensor([[0]]))
    k, v = cache.put(0, torch.ones(1, 2, 1, 4), torch.ones(1, 2, 1, 4))
    assert k.data_ptr() == cache.keys[0].data_ptr()
    assert v.data_ptr() == cache.values[0].data_ptr()


# Generation


PROMPTS = [[3], [5, 8, 13, 21, 34, 2, 7], [1, 2, 3, 4]]


def one_by_one(model, prompt, n_new, choose=lambda logits: int(logits.argmax())):
    """The oracle: no cache, no batch, no padding."""
    ids = list(prompt)
    for _ in range(n_new):
        with torch.no_grad():
            ids.append(choose(model(torch.tensor([ids]))[0, -1].float()))
    return ids[len(prompt) :]


@CONFIGS
@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("chunk", [None, 1, 3])
def test_generates_what_a_loop_without_cache_or_batch_does(config, cache, chunk):
    model = decoder(config)
    expected = [one_by_one(model, prompt, 20) for prompt in PROMPTS]
    found = generate(model, PROMPTS, 20, cache=cache, chunk=chunk)
    assert found == expected
    assert len({tuple(row) for row in found}) == 3  # not three times the same


def test_equals_transformers_generate():
    transformers = pytest.importorskip("transformers")
    from groundup.modern.weights import load_hf

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.5,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    theirs = transformers.LlamaForCausalLM(config).eval()
    ours = load_hf(theirs, config.to_dict())
    ids, positions = left_pad(PROMPTS)
    out = theirs.generate(
        ids,
        attention_mask=(positions > NOTHING).long(),
        max_new_tokens=12,
        do_sample=False,
    )
    assert generate(ours, PROMPTS, 12) == out[:, ids.shape[1] :].tolist()


@pytest.mark.parametrize("cache", [True, False])
def test_finished_rows_stop_and_leave_the_others_alone(cache):
    model = decoder()
    free = generate(model, PROMPTS, 20)
    stop = free[1][4]  # what the second row says at its fifth token, if not before
    expected = [row[: row.index(stop) + 1] if stop in row else row for row in free]
    assert len({len(row) for row in expected}) > 1
    assert generate(model, PROMPTS, 20, stop=[stop], cache=cache) == expected


def test_a_finished_row_is_not_read_on():
    """Its cache ends where it stopped: the stop token was chosen, and never read."""
    model = decoder()
    free = generate(model, PROMPTS, 20)
    stop = free[1][4]
    cache = cache_for(model, 40, 3)
    rows = generate(model, PROMPTS, 20, stop=[stop], cache=cache)
    read = [len(p) + len(row) - 1 for p, row in zip(PROMPTS, rows, strict=True)]
    assert cache.next_positions(1)[:, 0].tolist() == read
    assert len(set(read)) > 1


def test_reads_no_more_when_all_have_stopped():
    model, calls = decoder(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    first = generate(model, [[5]], 1)[0][0]
    calls.clear()
    assert generate(model, [[5]], 20, stop={first}) == [[first]]
    assert len(calls) == 1


def test_sampled_text_is_the_same_with_and_without_cache():
    model = decoder()

    def sampler(seed):
        generator = torch.Generator().manual_seed(seed)
        return lambda x: torch.multinomial(x.softmax(-1), 1, generator=generator)[:, 0]

    a = generate(model, PROMPTS, 20, sampler(0), cache=False)
    assert a == generate(model, PROMPTS, 20, sampler(0))
    assert a != generate(model, PROMPTS, 20, sampler(1))


def test_a_cache_that_holds_text_is_continued():
    model = decoder()
    whole = [[5, 8, 13, 21], [7, 3, 1, 9]]
    cache = cache_for(model, 30, 2)
    with torch.no_grad():
        model(torch.tensor(whole)[:, :2], cache=cache)
    rest = generate(model, [row[2:] for row in whole], 10, cache=cache)
    assert rest == generate(model, whole, 10)


@pytest.mark.parametrize("training", [True, False])
def test_every_module_keeps_its_mode(training):
    model = decoder().train(training)
    model.blocks[0].eval()  # a frozen part inside a model in training
    before = [m.training for m in model.modules()]
    seen = []
    model.blocks[1].register_forward_hook(lambda m, *_: seen.append(m.training))
    generate(model, [[1]], 2)
    assert [m.training for m in model.modules()] == before
    assert not any(seen)


def test_the_mode_is_restored_after_an_error():
    model = decoder().train()
    with pytest.raises(RuntimeError, match="broken"):
        generate(model, [[1]], 2, _broken)
    assert all(m.training for m in model.modules())


def _broken(logits):
    raise RuntimeError("broken")


def test_no_new_tokens_and_bad_numbers():
    model = decoder()
    assert generate(model, [[1], [2, 3]], 0) == [[], []]
    with pytest.raises(ValueError, match=r"n_new must not be negative.*got -1"):
        generate(model, [[1]], -1)
    with pytest.raises(ValueError, match="chunk at least 1; got 2 and 0"):
        generate(model, [[1]], 2, chunk=0)


def test_n_last_gives_the_last_logits():
    model = decoder()
    ids = torch.randint(40, (2, 6))
    full = model(ids)
    torch.testing.assert_close(model(ids, n_last=2), full[:, -2:], **EXACT)
    assert model(ids, n_last=6).shape == full.shape


# What the page breaks


def test_without_a_causal_mask_one_token_at_a_time_is_still_right():
    """The pitfall: everything held lies in the past, so no mask is needed."""
    model = decoder()
    ids = torch.randint(40, (1, 10))
    with torch.no_grad():
        expected = model(ids)
        model.mask = lambda q, k, *, plain: (k > NOTHING)[:, None, None].expand(
            -1, 1, q.shape[1], -1
        )
        alone = in_chunks(model, ids, [1] * 10, cache_for(model, 10))
        torch.testing.assert_close(alone, expected, **EXACT)
        chunks = in_chunks(model, ids, [5] * 2, cache_for(model, 10))
    assert (chunks - expected).abs().amax((0, 2))[[0, 5]].min() > 0.1


def test_torchs_is_causal_is_aligned_at_the_upper_left():
    q, k = torch.randn(1, 1, 1, 4), torch.randn(1, 1, 6, 4)
    out = F.scaled_dot_product_attention(q, k, k, is_causal=True)
    torch.testing.assert_close(out[0, 0, 0], k[0, 0, 0])  # the first key alone


def test_half_precision_agrees_with_itself():
    """Rounded to bfloat16, cached and uncached differ by rounding only."""
    model = decoder().bfloat16()
    ids = torch.randint(40, (1, 15))
    cache = KVCache(SMALL, 15, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = model(ids).float()
    found = in_chunks(model, ids, [4, 1, 10], cache).float()
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()
