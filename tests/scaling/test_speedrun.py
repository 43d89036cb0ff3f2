"""The fast recipe: hashes by integers, Adagrad by torch's, the loop by Part 2's."""

import math
from dataclasses import fields, replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from groundup.foundations.shakespeare import plays
from groundup.modern.decoder import Decoder, DecoderConfig
from groundup.scaling import speedrun as module
from groundup.scaling.bench_speedrun import speedup
from groundup.scaling.gram_tables import GramDecoder, RowAdagrad, gram_rows
from groundup.scaling.schedules import Schedule, share
from groundup.scaling.speedrun import (
    FAST,
    MINUTE,
    Recipe,
    bare_loop,
    build,
    held_out_loss,
    joined_plays,
    optimizer_of,
    speedrun,
)
from groundup.scaling.speedrun_ladder import (
    CONFIG,
    GPT2,
    KNOWN,
    ClippedAdamW,
    beside,
    in_tokens,
    known_recipe,
    measure,
    rungs,
)
from groundup.training.adamw import AdamW, Group, clip_gradients, decay_groups
from groundup.training.batching import HASH_FACTOR, Corpus
from groundup.training.loop import TrainConfig, train

TINY = DecoderConfig(n_vocab=11, d_model=8, n_layers=2, n_heads=2, tied=False)
SHORT = Recipe(TINY, Schedule(6, shape="wsd"), batch=3, context=5, dtype="float32")
TEXT = Corpus.of(
    [torch.randint(11, (400,), generator=torch.Generator().manual_seed(0))]
)


def sparse(rows, values, shape):
    """A gradient of some rows of a table; each row may be listed more than once."""
    return torch.sparse_coo_tensor(rows, values, shape, check_invariants=True)


def rows_by_integers(ids, orders, n_rows):
    """The hash with Python's integers, reduced modulo 2^64 as signed numbers."""
    table = torch.zeros(*ids.shape, len(orders), dtype=torch.long)
    for b, row in enumerate(ids.tolist()):
        for t in range(len(row)):
            for place, order in enumerate(orders):
                h = 0
                for back in range(order):
                    token = row[t - back] + 1 if t >= back else 0
                    h = (h + token) * HASH_FACTOR % 2**64
                signed = h - 2**64 if h >= 2**63 else h
                table[b, t, place] = (signed >> 32) % n_rows + place * n_rows
    return table


@given(
    orders=st.lists(st.integers(2, 5), min_size=1, max_size=3, unique=True),
    length=st.integers(1, 7),
    n_rows=st.sampled_from([1, 7, 1024]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=40)
def test_rows_equal_the_loop_and_look_back_only(orders, length, n_rows, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(256, (2, length), generator=generator)
    rows = gram_rows(ids, tuple(orders), n_rows)
    assert torch.equal(rows, rows_by_integers(ids, orders, n_rows))
    changed = ids.clone()
    changed[:, -1] = (ids[:, -1] + 1) % 256
    before = gram_rows(changed, tuple(orders), n_rows)[:, :-1]
    assert torch.equal(before, rows[:, :-1])


def test_equal_grams_share_a_row_and_others_rarely():
    """6,400 pairs of 80 tokens into 2^20 rows: 6400²/2^21 = 20 shared are expected."""
    pairs = torch.cartesian_prod(torch.arange(80), torch.arange(80))
    rows = gram_rows(pairs, (2,), 2**20)[:, 1, 0]
    shared = len(rows) - len(rows.unique())
    assert shared <= 20 + 5 * 20**0.5  # five sigma
    text = torch.tensor([[5, 1, 2, 3, 9, 1, 2, 3]])
    two, three = gram_rows(text, (2, 3), 1000).unbind(-1)
    assert two[0, 3] == two[0, 7]  # 2, 3
    assert three[0, 3] == three[0, 7]  # 1, 2, 3
    assert three[0, 2] != three[0, 6]  # 5, 1, 2 and 9, 1, 2
    assert three[0, 0] >= 1000 > two[0, 0]


def test_tables_of_zeros_change_nothing_and_others_are_added():
    torch.manual_seed(0)
    model = GramDecoder(TINY, (2, 3), 50)
    plain = Decoder(TINY)
    state = {n: t for n, t in model.state_dict().items() if n != "tables"}
    plain.load_state_dict(state)
    ids = torch.randint(11, (2, 6))
    torch.testing.assert_close(model(ids), plain(ids))
    nn.init.normal_(model.tables)
    expected = plain.embed(ids)
    for b in range(2):
        for t in range(6):
            for row in rows_by_integers(ids, (2, 3), 50)[b, t]:
                expected[b, t] = expected[b, t] + model.tables[row]
    found = model.embed_tokens(ids, torch.arange(6).expand(2, 6))
    torch.testing.assert_close(found, expected)
    late = ids.clone()
    late[:, 4] = (ids[:, 4] + 1) % 11
    torch.testing.assert_close(model(late)[:, :4], model(ids)[:, :4])
    assert not torch.allclose(model(late)[:, 4], model(ids)[:, 4])


def test_row_adagrad_by_hand():
    """A row of two; gradients (3, 4), then (0, 5), at lr 0.1.

    Mean squares 12.5 and 12.5: steps 0.1 · (3, 4) / √12.5, then 0.1 · (0, 5) / √25.
    The other row is not touched.
    """
    table = nn.Parameter(torch.zeros(2, 2, dtype=torch.float64))
    optimizer = RowAdagrad([Group({"t": table}, 0.0)])
    for grad in ([3.0, 4.0], [0.0, 5.0]):
        table.grad = sparse([[1]], [grad], (2, 2)).double()
        optimizer.step(0.1)
    root = 12.5**0.5
    expected = [[0, 0], [-0.3 / root, -0.4 / root - 0.1]]
    torch.testing.assert_close(table.data, torch.tensor(expected, dtype=torch.float64))
    assert optimizer.state["t"][0].tolist() == [0.0, 25.0]
    assert optimizer.n_steps == {"t": 2}


def test_row_adagrad_of_width_one_is_torchs():
    """A row of one number has its own scale in both; torch adds no eps here."""
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (nn.Parameter(torch.zeros(9, 1).double()) for _ in range(2))
    optimizer = RowAdagrad([Group({"t": ours}, 0.0)])
    oracle = torch.optim.Adagrad([theirs], lr=0.1, eps=0.0)
    for _ in range(20):
        rows = torch.randint(9, (1, 4), generator=generator)  # some of them twice
        values = torch.randn(4, 1, generator=generator).double()
        ours.grad = sparse(rows, values, (9, 1))
        theirs.grad = ours.grad.clone()
        optimizer.step(0.1)
        with torch.sparse.check_sparse_tensor_invariants():
            oracle.step()
    torch.testing.assert_close(ours.data, theirs.data, rtol=0, atol=1e-12)


def test_row_adagrad_waits_without_and_stays_at_a_zero_gradient():
    table = nn.Parameter(torch.ones(3, 2))
    optimizer = RowAdagrad([Group({"t": table}, 0.0)])
    optimizer.step(1.0)
    assert optimizer.n_steps == {"t": 0}
    table.grad = sparse([[0]], [[0.0, 0.0]], (3, 2))
    optimizer.step(1.0)
    assert torch.equal(table.data, torch.ones(3, 2))


def test_loop_is_that_of_part_2_to_the_bit():
    """Same model, batches, AdamW, cosine; its clipping is set too high to act."""
    schedule = Schedule(8, 3, "cosine", end=0.1)
    recipe = replace(SHORT, schedule=schedule, optimizer="adamw", lr=1e-2)
    run = speedrun(recipe, TEXT, seed=5)
    torch.manual_seed(5)
    other = Decoder(TINY)
    config = TrainConfig(
        steps=8, batch=3, context=5, lr=1e-2, warmup=3, clip=1e9, seed=5
    )
    train(other, TEXT, config)
    for (name, ours), theirs in zip(
        run.model.named_parameters(), other.parameters(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7, msg=name)
    assert run.n_updates == 8


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("orders", [(), (2, 3)])
def test_every_parameter_has_one_optimizer(optimizer, orders):
    recipe = replace(SHORT, optimizer=optimizer, orders=orders, n_rows=20)
    model = build(recipe)
    together = optimizer_of(model, recipe)
    names = [
        name
        for part, _ in together.parts
        for group in part.groups
        for name in group.parameters
    ]
    assert sorted(names) == sorted(n for n, _ in model.named_parameters())
    assert all(p.requires_grad for p in model.parameters())
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    model(torch.randint(11, (2, 5))).square().sum().backward()
    together.step(1.0)
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_quiet_outputs_start_at_zero():
    ids = torch.randint(11, (2, 5))
    model = build(replace(SHORT, quiet=True, orders=(2,), n_rows=20))
    assert not model(ids).any()
    assert not model.blocks[1].feedforward.down.weight.any()
    assert model.blocks[1].attention.qkv.weight.any()
    assert build(SHORT)(ids).any()


def test_loss_starts_at_ln_256():
    ids = torch.randint(
        256, (1, 5 * 64 + 1), generator=torch.Generator().manual_seed(0)
    )
    torch.manual_seed(0)
    assert held_out_loss(build(FAST), Corpus.of([ids[0]])) == pytest.approx(
        math.log(256), abs=0.1
    )


def test_the_seed_decides_all():
    recipe = replace(SHORT, orders=(2,), n_rows=20)
    first, again, other = (
        speedrun(recipe, TEXT, seed).model.state_dict() for seed in (0, 0, 1)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[n], other[n]) for n in first if "norm" not in n)


class Recorder:
    """An optimizer that notes which shares it was given."""

    def __init__(self):
        self.shares = []

    def step(self, share):
        self.shares.append(share)

    def zero_grad(self):
        pass


def test_the_schedule_follows_the_clock(monkeypatch):
    """A clock that moves 1 s an update: 10 s are 10 updates, of 20 steps every second.

    The schedule falls from 1 to 0 over its steps 0..19; update k starts at k seconds,
    so at step 2 k.
    """
    seconds = iter(range(100))
    monkeypatch.setattr(module.time, "perf_counter", lambda: float(next(seconds)))
    schedule = Schedule(20, shape="linear")
    recorder = Recorder()
    run = bare_loop(
        lambda: (Decoder(TINY), recorder),
        replace(SHORT, schedule=schedule),
        TEXT,
        0,
        seconds=10.0,
    )
    assert run.n_updates == 10
    assert recorder.shares == [share(2 * k, schedule) for k in range(10)]


def test_held_out_loss_of_a_uniform_model_and_of_every_second_window():
    class Marked(nn.Module):
        """Certain of token 0, with e to one against each of the three others."""

        def forward(self, ids):
            logits = torch.zeros(*ids.shape, 4)
            logits[..., 0] = 1.0
            return logits

    corpus = Corpus.of([torch.tensor([1, 0, 0, 1, 1, 0, 0, 1, 1])])  # windows of two
    log_z = math.log(math.e + 3)
    # targets: (0, 0), (1, 1), (0, 0), (1, 1)
    assert held_out_loss(Marked(), corpus, 2) == pytest.approx(log_z - 0.5)
    assert held_out_loss(Marked(), corpus, 2, every=2) == pytest.approx(log_z - 1.0)


def test_joined_plays_are_all_plays_cut_at_nine_tenths():
    train_part, validation = joined_plays()
    text = "\n".join(plays().values()).encode()
    assert bytes(train_part.tokens.tolist()) + bytes(validation.tokens.tolist()) == text
    assert len(train_part) == int(0.9 * len(text))


def test_a_rung_changes_what_it_says_and_the_last_is_the_fast_recipe():
    ladder = list(rungs().items())
    assert ladder[0] == ("known recipe", KNOWN)
    changed = [
        {f.name for f in fields(Recipe) if getattr(a, f.name) != getattr(b, f.name)}
        for (_, a), (_, b) in pairwise(ladder)
    ]
    assert changed == [
        set(),  # the model: GPT-2, then ours
        {"lr"},
        {"optimizer", "lr", "muon_lr"},
        {"dtype"},
        {"schedule"},
        {"orders"},
        {"sizes"},
        {"batch"},
    ]
    assert in_tokens(ladder[-1][1], FAST.n_tokens) == FAST
    assert FAST.n_tokens == CONFIG["n_tokens"]
    for recipe in beside().values():
        n_changed = sum(
            getattr(recipe, f.name) != getattr(FAST, f.name)
            for f in fields(Recipe)
            if f.name != "schedule"
        )
        schedule = in_tokens(recipe, FAST.n_tokens).schedule
        changed = schedule != FAST.schedule
        assert n_changed + changed == 1


def test_known_recipe_is_nanogpts_for_a_cpu():
    """Its numbers as the issue of this benchmark lists them; 12 C² a block and biases.

    4 (12 · 128² + 13 · 128) + 256 · 128 (tied) + 64 · 128 + 256 = 834,304.
    """
    assert (KNOWN.batch, KNOWN.context, KNOWN.lr) == (12, 64, 1e-3)
    assert Schedule(2000, 100, "cosine", end=0.1) == KNOWN.schedule
    model = GPT2(KNOWN.sizes, KNOWN.context)
    assert sum(p.numel() for p in model.parameters()) == 834_304
    assert model.training
    assert not [m for m in model.modules() if isinstance(m, nn.Dropout) and m.p > 0]


def test_in_tokens_keeps_the_share_of_the_warm_up():
    schedule = in_tokens(KNOWN, 160 * 768).schedule
    assert (schedule.steps, schedule.warmup) == (160, 8)


def test_clipped_adamw_is_ours():
    torch.manual_seed(0)
    ours, theirs = Decoder(TINY), Decoder(TINY)
    theirs.load_state_dict(ours.state_dict())
    mine, other = AdamW(decay_groups(ours, 0.1)), ClippedAdamW(theirs, 1e-2)
    generator = torch.Generator().manual_seed(1)
    for step in range(5):
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        clip_gradients(ours.parameters(), 1.0)
        mine.step(1e-2 * (step + 1) / 5)
        other.step((step + 1) / 5)
        other.zero_grad()
    assert all(p.grad is None for p in theirs.parameters())
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_the_recipes_learn():
    """Two seconds: the fast one, well below what the known recipe needs 80 s for.

    1.876 nats per byte; and both others get below 3.5 from ln 256 = 5.5 in few updates.
    """
    train_part, validation = joined_plays()
    run = speedrun(FAST, train_part, 7)
    assert held_out_loss(run.model, validation, every=64) < 1.876
    few = replace(MINUTE, schedule=replace(MINUTE.schedule, steps=4), batch=8)
    assert (
        held_out_loss(speedrun(few, train_part, 0).model, validation, every=128) < 3.5
    )
    known = replace(KNOWN, schedule=Schedule(12, 2), lr=1e-2)
    loss = held_out_loss(
        known_recipe(train_part, 0, recipe=known).model, validation, every=128
    )
    assert loss < 4


def test_a_measurement_tells_both_runs():
    config = {"n_tokens": 6144, "seconds": 0.3, "every": 512}
    result = measure(config | {"name": "batch × 4", "seed": 0})["result"]
    assert result["tokens"]["updates"] == 2
    assert 0.3 <= result["time"]["seconds"] < 3
    assert all(1.5 < kind["loss"] < 5.6 for kind in result.values())


@pytest.mark.parametrize(
    ("known", "ours", "expected"),
    [
        ([(80.0, 1.9), (90.0, 1.88)], [(4.0, 1.88), (5.0, 1.7)], 16.0),
        ([(80.0, 1.9), (90.0, 1.88)], [(4.0, 1.89), (5.0, 1.7)], 0.0),  # one missed
        ([(80.0, 1.9)], [(4.0, math.nan)], 0.0),
    ],
)
def test_speed_up_by_hand(known, ours, expected):
    assert speedup(known, ours) == expected


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: replace(FAST, optimizer="sgd"), "optimizer must be adamw or muon"),
        (
            lambda: replace(FAST, dtype="float8"),
            "dtype must be one of .*; got 'float8'",
        ),
        (lambda: replace(FAST, batch=0), "batch must be positive; got 0"),
        (lambda: replace(FAST, lr=math.nan), "lr must be positive; got nan"),
        (lambda: GramDecoder(TINY, (), 5), "orders must be different, each 2 or more"),
        (lambda: GramDecoder(TINY, (1, 2), 5), r"orders must be .*; got \(1, 2\)"),
        (lambda: GramDecoder(TINY, (2, 2), 5), r"orders must be .*; got \(2, 2\)"),
        (lambda: GramDecoder(TINY, (2,), 0), "n_rows must be at least 1; got 0"),
        (lambda: RowAdagrad([Group({}, 0.1)]), "weight_decay must be 0 for tables"),
    ],
)
def test_refusals_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()
