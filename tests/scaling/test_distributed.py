"""Two processes against one, and what they send against the ring by hand."""

import json
import math
import sys

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from groundup.modern.decoder import Decoder, DecoderConfig
from groundup.modern.variants import small_decoder
from groundup.scaling import distributed, distributed_runs
from groundup.scaling.distributed import World, current_world, process_group, rows, wrap
from groundup.scaling.distributed_runs import SMALLER, Training, answers, torchrun
from groundup.scaling.sharded_checkpoint import latest_shards, load_shards
from groundup.scaling.traffic import ring_bytes
from groundup.training import adamw
from groundup.training.batching import Corpus, shakespeare_split
from groundup.training.loss import IGNORE

TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def alone(monkeypatch):
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)


# What the two processes of `two_processes.py` found.


def test_two_processes_equal_one(two_processes):
    """Losses, norms and, after ten clipped updates, weights and moments.

    With 2 and with 4 pieces of a batch whose second half has more counted targets; for
    a tied head too. In float32 sums are rounded in another order, and Adam divides by
    gradients that may be small: differences up to 2e-5 were seen.
    """
    same = two_processes.results[0]["same"]
    assert len(same) == 2 * 4 + 2 + 2 * 2
    for key, (loss, weights) in same.items():
        most = 1e-12 if "float64" in key else 1e-3
        assert loss < most, key
        assert weights < most, key
    assert two_processes.results[1]["same"].keys() == same.keys()


def test_each_process_knows_itself_and_leaves_after_an_error(two_processes):
    for rank, found in enumerate(two_processes.results):
        assert found["world"] == [rank, 2]
        assert found["inner"], "a group inside a group is the same group"
        assert found["total"] == 11  # 10^0 + 10^1
        assert found["error"] == "to be left by an error"
        assert found["destroyed"]


def test_clipping_by_the_norm_of_all_shards(two_processes):
    first, second = (found["clip"] for found in two_processes.results)
    one = first["none"]["norm"]
    for found in (first, second):
        for how in ("none", "ddp", "fsdp"):
            assert found[how]["norm"] == pytest.approx(one, rel=1e-12)
            assert found[how]["loose"] == pytest.approx(one, rel=1e-12)
            assert found[how]["error"] < 1e-15
    # The pitfall of the page: Part 2's clip sees the shards of its own process. The
    # squares of the two norms add up to the square of the right one.
    seen = [found["fsdp"]["part 2"] for found in (first, second)]
    assert max(seen) < 0.95 * one
    assert abs(seen[0] - seen[1]) > 0.05 * one
    assert math.hypot(*seen) == pytest.approx(one, rel=1e-9)


def test_collectives_and_their_bytes(two_processes):
    """Four micro-batches, by hand, for 43,168 parameters of 4 bytes.

    DDP sends the gradient once, or with every micro-batch, and the loss (8 bytes).
    FSDP gathers the root and the two blocks for each forward pass and the blocks once
    more for each backward pass; it scatters the gradients of three groups once, or
    each time, and sums the loss and the squares of the norm.
    """
    for found in two_processes.results:
        traffic = found["traffic"]
        p, blocks = traffic["ddp"]["parameters"], 4 * traffic["ddp"]["blocks"]
        assert p == 4 * sum(t.numel() for t in Decoder(SMALLER).parameters())
        assert traffic["ddp quiet"] == [{"all-reduce": 2}, {"all-reduce": p + 8}]
        assert traffic["ddp loud"] == [{"all-reduce": 5}, {"all-reduce": 4 * p + 8}]
        for name, times in (("quiet", 1), ("loud", 4)):
            calls, payload = traffic[f"fsdp {name}"]
            gathers = {"all-gather": 4 * (3 + 2), "all-reduce": 2}
            assert calls == {**gathers, "reduce-scatter": 3 * times}
            assert payload == {
                "all-gather": 4 * (p + blocks),
                "reduce-scatter": times * p,
                "all-reduce": 16,
            }


def test_what_a_process_holds(two_processes):
    """DDP: everything, with two moments a parameter. FSDP: half (all rows are even)."""
    for found in two_processes.results:
        ddp, fsdp = found["traffic"]["ddp"], found["traffic"]["fsdp"]
        p = ddp["parameters"]
        assert [ddp["gradients"], ddp["moments"]] == [p, 2 * p]
        for part in ("parameters", "gradients", "moments"):
            assert 2 * fsdp[part] == ddp[part]


def test_all_begin_with_rank_0s_parameters(two_processes):
    for found in two_processes.results:
        assert found["starts"] == {"ddp": 0, "fsdp": 0}
        assert found["loading"] == [0, 0]


def test_experiments_of_the_page_equal_a_single_process(two_processes):
    runs = two_processes.results[0]["runs"]
    split = shakespeare_split()
    for name in ("float64", "float32"):
        one = Training.begin(dtype=getattr(torch, name))
        expected = one.losses(answers(split.train, 2, 0))
        for how in ("ddp", "fsdp"):
            got = runs["same"][f"{how} {name}"]
            assert got == pytest.approx(expected, rel=1e-12 if "64" in name else 1e-5)
    shards = latest_shards(two_processes.folder / "page")
    one = Training.begin(seed=1, dtype=torch.float32)
    assert load_shards(shards, one.model.state_dict()) == {"how": "fsdp"}
    windows = [
        part[:128] for part in split.validation.windows(distributed_runs.CONTEXT)
    ]
    assert one.held_out(windows) == pytest.approx(runs["saved"], rel=1e-6)
    for mistake, (run,) in runs["mistakes"].items():
        one = Training.begin(seed=0, dtype=torch.float32)
        batches = answers(split.train, 2, 0)
        if mistake == "same rows":
            batches = [(x[:8], y[:8]) for x, y in batches]
        losses = one.losses(batches)
        if mistake == "local mean":  # from the first update on
            assert abs(run["losses"][1] - losses[1]) > 1e-3
        else:
            assert run["losses"] == pytest.approx(losses, rel=1e-5)


# In this process alone.


def test_the_world_is_read_from_torchruns_environment(alone, monkeypatch):
    assert current_world() == World(0, 1)
    assert current_world().first
    monkeypatch.setenv("MASTER_ADDR", "localhost")  # may be left from elsewhere
    assert current_world() == World(0, 1)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="missing: MASTER_PORT"):
        current_world()
    monkeypatch.setenv("MASTER_PORT", "1")
    assert current_world() == World(1, 2)
    assert not current_world().first


@pytest.mark.parametrize(("rank", "size"), [(2, 2), (-1, 2), (0, 0)])
def test_refuses_a_rank_outside_the_world(rank, size):
    with pytest.raises(ValueError, match=f"rank must lie in 0..size={size}; got"):
        World(rank, size)


def test_one_process_joins_nobody(alone):
    with process_group() as world:
        assert world == World(0, 1)
        assert not dist.is_initialized()
    assert distributed.total(2.5) == 2.5
    with (
        pytest.raises(ValueError, match="device must be cpu or cuda; got 'mps'"),
        process_group("mps"),
    ):
        pass


@given(size=st.integers(1, 8), share=st.integers(1, 5))
def test_rows_are_a_partition_in_order(size, share):
    batch = list(range(size * share))
    parts = [batch[rows(len(batch), World(rank, size))] for rank in range(size)]
    assert [row for part in parts for row in part] == batch
    assert {len(part) for part in parts} == {share}


@pytest.mark.parametrize("batch", [0, 3, 9])
def test_refuses_rows_that_do_not_divide(batch):
    with pytest.raises(
        ValueError, match=f"positive multiple of the 2 processes; got {batch}"
    ):
        rows(batch, World(0, 2))


def test_wrap_without_a_group(alone):
    model = small_decoder()
    assert wrap(model, "none") is model
    assert distributed.quiet(model)().__enter__() is None
    for how in ("ddp", "fsdp"):
        with pytest.raises(ValueError, match=f"how='{how}' needs a process group"):
            wrap(model, how)
    with pytest.raises(ValueError, match="how must be one of none, ddp, fsdp"):
        wrap(model, "zero")


def test_plain_tensors_pass_through():
    a, b = nn.Linear(3, 2), nn.Linear(3, 2)
    assert distributed.whole(a.weight) is a.weight
    distributed.load_whole(a, b.state_dict())
    assert torch.equal(a.weight, b.weight)
    x = torch.randn(5, 3)
    for model, clip in ((a, distributed.clip_gradients), (b, adamw.clip_gradients)):
        model(x).square().sum().backward()
        model.norm = clip(model.parameters(), 0.1)
    assert a.norm == b.norm
    assert torch.equal(a.weight.grad, b.weight.grad)


def test_refuses_a_state_of_another_model():
    model, state = nn.Linear(3, 2), nn.Linear(3, 2).state_dict()
    before = model.weight.detach().clone()
    for bad, message in (
        ({"weight": state["weight"]}, "bias is missing"),
        ({**state, "scale": state["bias"]}, "scale is unknown"),
        ({**state, "bias": torch.zeros(3)}, r"must have shape \(2,\); got \(3,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            distributed.load_whole(model, bad)
        assert torch.equal(model.weight, before), "nothing may be loaded by halves"
    with pytest.raises(ValueError, match=r"source must have shape \(2,\)"):
        distributed.put_whole(state["bias"], torch.zeros(3))


def test_answers_get_longer_and_end_with_the_window():
    corpus = Corpus.of([torch.arange(2000)])
    for x, y in answers(corpus, 3, seed=1, batch=6):
        counted = y != IGNORE
        n = counted.sum(1)
        assert n.diff().min() >= 0
        assert n.min() >= 1
        assert torch.equal(y[counted], (x + 1)[counted])
        for row, k in zip(counted, n.tolist(), strict=True):
            assert row[-k:].all(), "the counted targets are the last ones"
    again = answers(corpus, 3, seed=1, batch=6)
    assert torch.equal(again[2][0], x)


def test_one_process_makes_the_page_s_mistakes_too():
    """Alone, a mean over the own targets and over all is the same."""
    corpus = Corpus.of([torch.randint(256, (3000,))])
    (batch,) = answers(corpus, 1, 0, batch=4)
    results = [
        Training.begin().update(batch, mistake=m) for m in distributed_runs.MISTAKES
    ]
    assert results[0] == results[1] == results[2]
    with pytest.raises(ValueError, match="mistake must be one of"):
        Training.begin().update(batch, mistake="tea")


def test_held_bytes_by_hand():
    sizes = DecoderConfig(d_model=32, n_layers=2, n_heads=2, tied=False)
    n = sum(p.numel() for p in Decoder(sizes).parameters())
    run = Training.begin()
    assert run.held() == {"parameters": 8 * n, "gradients": 0, "moments": 16 * n}


def test_torchrun_tells_what_went_wrong():
    with pytest.raises(RuntimeError, match=r"groundup\.no_such failed"):
        torchrun("groundup.no_such", processes=1)


def test_main_writes_what_was_found(tmp_path, alone, monkeypatch):
    monkeypatch.setattr(distributed_runs, "experiments", lambda to: {"to": str(to)})
    distributed_runs.main(tmp_path)
    found = json.loads((tmp_path / distributed_runs.FOUND).read_text())
    assert found == {"to": str(tmp_path)}


def ring(kind, parts, size):
    """Pass parts round a ring and count what each process sends."""
    held = [[{(r, k)} for k in range(size)] for r in range(size)]
    sent = [0] * size
    if kind != "all-gather":
        for step in range(size - 1):
            out = [(r, (r - step) % size) for r in range(size)]
            for (r, k), old in zip(out, [held[r][k] for r, k in out], strict=True):
                held[(r + 1) % size][k] = held[(r + 1) % size][k] | old
                sent[r] += parts[k]
        for r in range(size):  # every process has one part summed over all
            assert any(len(part) == size for part in held[r])
    if kind != "reduce-scatter":
        for step in range(size - 1):
            for r in range(size):
                sent[r] += parts[(r + 1 - step) % size]
    return sent


@pytest.mark.parametrize("kind", ["all-gather", "reduce-scatter", "all-reduce"])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_bytes_of_a_ring_by_passing_parts_round(kind, size):
    parts = [10] * size
    expected = ring_bytes(kind, sum(parts), size)
    assert ring(kind, parts, size) == pytest.approx([expected] * size)


def test_ring_bytes_refuses():
    assert ring_bytes("all-reduce", 100, 4) == 150
    with pytest.raises(ValueError, match="kind must be one of"):
        ring_bytes("broadcast", 1, 2)
    with pytest.raises(ValueError, match="size must be at least 1; got 0"):
        ring_bytes("all-gather", 1, 0)


def test_loopback_is_named_for_this_system():
    import socket

    names = [name for _, name in socket.if_nameindex()]
    if sys.platform in ("linux", "darwin"):
        assert distributed.LOOPBACK in names
