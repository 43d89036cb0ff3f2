"""Saved by some processes, read by others: nothing is lost, nothing is mixed up."""

import json
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from groundup.scaling.sharded_checkpoint import (
    Shards,
    latest_shards,
    load_shards,
    local_rows,
    save_shards,
)

NAMES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@contextmanager
def process(rank, size):
    """One of size processes that talk to nobody: enough to cut tensors."""
    values = (str(rank), str(size), "127.0.0.1", "1")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in zip(NAMES, values, strict=True):
            patch.setenv(name, value)
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
        try:
            yield init_device_mesh("cpu", (size,))
        finally:
            dist.destroy_process_group()


def cut(tensor, mesh):
    return distribute_tensor(tensor, mesh, [Shard(0)], src_data_rank=None)


def save(folder, step, tensors, size, *, sharded=True, keep=2):
    for rank in range(size):
        with process(rank, size) as mesh:
            state = {
                n: cut(t, mesh) if sharded and t.dim() else t
                for n, t in tensors.items()
            }
            save_shards(folder, step, state, {"step": step}, keep=keep)


def some(n_rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "matrix": torch.randn(n_rows, 3, generator=generator),
        "vector": torch.randn(n_rows + 1, generator=generator).double(),
        "count": torch.tensor(seed),
    }


@settings(max_examples=40)
@given(
    n_rows=st.integers(0, 9),
    writers=st.integers(1, 4),
    readers=st.integers(1, 4),
    sharded=st.booleans(),
)
def test_any_number_writes_and_any_number_reads(
    tmp_path_factory, n_rows, writers, readers, sharded
):
    folder = tmp_path_factory.mktemp("run")
    tensors = some(n_rows, seed=3)
    save(folder, 7, tensors, writers, sharded=sharded)
    for rank in range(readers):
        with process(rank, readers) as mesh:
            found = latest_shards(folder)
            assert (found.step, len(found.paths)) == (7, writers)
            into = {
                n: cut(torch.full_like(t, 8), mesh) if t.dim() else torch.tensor(-1)
                for n, t in tensors.items()
            }
            assert load_shards(found, into) == {"step": 7}
            for name, tensor in tensors.items():
                start, own = local_rows(into[name])
                expected = tensor
                if tensor.dim():
                    expected = cut(tensor, mesh).to_local()
                    assert torch.equal(tensor[start : start + len(own)], own)
                assert torch.equal(own, expected)


def test_rows_by_hand():
    """Seven rows for three processes: three, three and one."""
    for rank, expected in enumerate(([0, 1, 2], [3, 4, 5], [6])):
        with process(rank, 3) as mesh:
            start, own = local_rows(cut(torch.arange(7), mesh))
            assert own.tolist() == expected
            assert start == expected[0]
            whole = distribute_tensor(
                torch.zeros(2, 6), mesh, [Shard(1)], src_data_rank=None
            )
            with pytest.raises(ValueError, match="cut along their rows once"):
                local_rows(whole)
            same = distribute_tensor(
                torch.zeros(2), mesh, [Replicate()], src_data_rank=None
            )
            with pytest.raises(ValueError, match="cut along their rows once"):
                local_rows(same)


def test_two_real_processes_saved_and_one_reads(two_processes):
    whole = torch.load(two_processes.folder / "whole.pt")
    found = latest_shards(two_processes.folder / "by two")
    assert (found.step, len(found.paths)) == (3, 2)
    into = {name: torch.full_like(t, -7) for name, t in whole.items()}
    assert load_shards(found, into) == {"by": "two"}
    for name, tensor in whole.items():
        assert torch.equal(into[name], tensor), name
    held = [path.joinpath("tensors.safetensors").stat().st_size for path in found.paths]
    full = sum(t.numel() * t.element_size() for t in whole.values())
    assert max(held) < 0.6 * full, "each file holds its half"


def test_one_saved_and_two_real_processes_read(two_processes):
    expected = sum(t.double().sum().item() for t in two_processes.one.values())
    for found, rows in zip(two_processes.results, ([0, 26], [26, 25]), strict=True):
        assert found["checkpoints"]["by one"] == pytest.approx(expected, rel=1e-12)
        assert found["checkpoints"]["rows"] == rows


def test_two_go_on_where_they_were(two_processes):
    for found in two_processes.results:
        assert found["checkpoints"]["resumed"] == 0, "to the last bit"
        assert found["checkpoints"]["meta"] == {"by": "two"}


def test_a_step_counts_when_all_have_it(tmp_path):
    assert latest_shards(tmp_path) is None
    save(tmp_path, 10, some(4, 1), 2)
    with process(0, 2) as mesh:  # killed before the second one saved
        save_shards(tmp_path, 20, {"matrix": cut(some(4)["matrix"], mesh)}, {}, keep=2)
    assert latest_shards(tmp_path).step == 10
    save(tmp_path, 20, some(4, 2), 2)
    save(tmp_path, 30, some(4, 3), 2)
    assert latest_shards(tmp_path).step == 30
    kept = {path.name for path in tmp_path.glob("rank-*/step-*")}
    assert kept == {"step-000020", "step-000030"}
    save(tmp_path, 40, some(4, 4), 1)  # the run goes on in one process
    assert latest_shards(tmp_path).paths == (tmp_path / "rank-0-of-1/step-000040",)
    (tmp_path / "rank-0-of-3").mkdir()
    assert latest_shards(tmp_path).step == 40


def test_refuses_what_does_not_fit(tmp_path):
    tensors = some(5)
    save(tmp_path, 1, tensors, 2)
    found = latest_shards(tmp_path)
    for change, message in (
        ({"matrix": torch.zeros(5, 2)}, r"must have shape \(5, 3\); got \(5, 2\)"),
        ({"matrix": torch.zeros(5, 3).double()}, "must be torch.float32, as saved"),
        ({"other": torch.zeros(1)}, "other was not saved"),
    ):
        with pytest.raises(ValueError, match=message):
            load_shards(found, {**tensors, **change})
    less = {name: t for name, t in tensors.items() if name != "count"}
    with pytest.raises(ValueError, match="count is missing"):
        load_shards(found, less)
    half = Shards(1, found.paths[:1])
    with pytest.raises(ValueError, match="hold all rows; of matrix 2 are lacking"):
        load_shards(half, tensors)
    with pytest.raises(ValueError, match="keep must be at least 2"):
        save_shards(tmp_path, 2, tensors, {}, keep=1)


def test_refuses_a_damaged_shard(tmp_path):
    tensors = some(6)
    save(tmp_path, 1, tensors, 2)
    file = tmp_path / "rank-1-of-2/step-000001/tensors.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        load_shards(latest_shards(tmp_path), tensors)


def test_nothing_but_safetensors_and_json(tmp_path):
    save(tmp_path, 1, some(3), 2)
    files = [p for p in tmp_path.rglob("*") if p.is_file() and p.name != ".lock"]
    assert {p.name for p in files} == {"tensors.safetensors", "meta.json"}
    for path in files:
        if path.suffix == ".json":
            json.loads(path.read_text())
