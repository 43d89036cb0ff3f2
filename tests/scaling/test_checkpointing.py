"""Checkpoints: exact, whole or absent, and refused when a bit has changed."""

import contextlib
import hashlib
import json
import os
import resource
import shutil
import threading
import time
import warnings
from itertools import pairwise

import pytest
import torch
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from groundup.scaling.checkpointing import latest, load, save
from groundup.scaling.crash_points import before_each, photographs
from groundup.training.byte_level import ByteTokenizer

DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)
shapes = st.lists(st.integers(0, 5), max_size=3)


def state(value, n=50):
    return {"w": torch.full((n,), float(value)), "n": torch.tensor(value)}


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def read_latest(folder):
    path = latest(folder)
    return None if path is None else load(path)


@settings(max_examples=100)
@given(
    kinds=st.lists(st.tuples(st.sampled_from(DTYPES), shapes), max_size=5),
    seed=st.integers(0, 2**31),
)
def test_every_bit_of_every_dtype_comes_back(tmp_path_factory, kinds, seed):
    """Random bits, so NaNs with a payload, infinities and -0 are among them."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for i, (dtype, shape) in enumerate(kinds):
        drawn = torch.randint(256, (*shape, dtype.itemsize), generator=generator)
        drawn = drawn.to(torch.uint8)
        if dtype == torch.bool:
            drawn %= 2
        tensors[f"t{i}"] = drawn.view(dtype).squeeze(-1)
    path = save(tmp_path_factory.mktemp("run"), 3, tensors, {"seed": seed})
    found = load(path)
    assert found.step == 3
    assert found.meta == {"seed": seed}
    assert found.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        back = found.tensors[name]
        assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(bits(back), bits(tensor))


def test_the_files_by_hand(tmp_path):
    """Other programs read them: safetensors, JSON and sha256sum are the oracles."""
    path = save(tmp_path / "new" / "run", 120, state(7), {"lr": 0.1})
    assert path == tmp_path / "new" / "run" / "step-000120"
    assert {p.name for p in path.iterdir()} == {"tensors.safetensors", "meta.json"}
    theirs = load_file(path / "tensors.safetensors")
    assert torch.equal(theirs["w"], state(7)["w"])
    raw = (path / "tensors.safetensors").read_bytes()
    record = json.loads((path / "meta.json").read_text())
    digest = record.pop("digest")
    assert record == {
        "format": 1,
        "step": 120,
        "same": {},
        "bytes": len(raw),
        "sha256": hashlib.sha256(raw).hexdigest(),
        "meta": {"lr": 0.1},
    }
    text = json.dumps(record, sort_keys=True).encode()
    assert digest == hashlib.sha256(text).hexdigest()


@given(
    value=st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False)
        | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=10,
    )
)
@settings(max_examples=50)
def test_meta_comes_back(tmp_path_factory, value):
    path = save(tmp_path_factory.mktemp("run"), 0, {}, {"value": value})
    assert load(path).meta == {"value": value}


def test_meta_comes_back_as_json_does(tmp_path):
    """And its digest is that of what comes back, or it could not be read."""
    meta = {"betas": (0.9, 0.99), "validation": {10: 2.5}, "best": float("inf")}
    found = load(save(tmp_path, 0, {}, meta)).meta
    assert found == {
        "betas": [0.9, 0.99],
        "validation": {"10": 2.5},
        "best": float("inf"),
    }


def test_a_tied_tensor_is_stored_once_and_comes_back_tied(tmp_path):
    table = torch.nn.Parameter(torch.randn(100, 10))
    tied = save(tmp_path / "tied", 1, {"embed": table, "head": table}, {})
    once = save(tmp_path / "once", 1, {"embed": table}, {})
    sizes = [(p / "tensors.safetensors").stat().st_size for p in (tied, once)]
    assert sizes[0] == sizes[1] < 2 * 4000
    found = load(tied).tensors
    assert found["head"] is found["embed"]
    assert torch.equal(found["head"], table)


def test_views_come_back_as_tensors_of_their_own(tmp_path):
    x = torch.arange(12.0).view(3, 4)
    views = {
        "whole": x,
        "transposed": x.T,
        "flat": x.view(-1),
        "rows": x[:2],
        "column": x[:, 1],
        "overlap": x[1:],
        "expanded": x[0, 0].expand(5),
        "as bits": x.view(torch.int32),
        "empty": x[:0],
        "also empty": x[:0],
    }
    found = load(save(tmp_path, 1, views, {})).tensors
    for name, view in views.items():
        assert torch.equal(found[name], view)
        assert found[name].dtype == view.dtype
    found["whole"].zero_()
    assert torch.equal(found["rows"], views["rows"])


def test_loaded_tensors_do_not_hold_on_to_the_file(tmp_path):
    """Mapped memory that changes with the file would be a trap (and a crash)."""
    path = save(tmp_path, 1, state(1, n=5000), {})
    found = load(path)
    with (path / "tensors.safetensors").open("r+b") as file:
        file.write(b"\0" * 20_000)
    assert torch.equal(found.tensors["w"], state(1, n=5000)["w"])
    assert all(t.data_ptr() % 64 == 0 for t in found.tensors.values())


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_last_ones_are_kept(tmp_path, keep):
    for step in (8, 9, 10, 11, 1_000_000):
        save(tmp_path, step, state(step), {}, keep=keep)
    kept = sorted(int(p.name[5:]) for p in tmp_path.glob("step-*"))
    assert kept == [8, 9, 10, 11, 1_000_000][-keep:]
    assert latest(tmp_path) == tmp_path / "step-1000000"
    for step in kept:
        assert load(tmp_path / f"step-{step:06d}").tensors["n"] == step


def test_a_run_that_was_taken_back_keeps_its_future_until_it_comes_there(tmp_path):
    for step in (10, 20, 30):
        save(tmp_path, step, state(step), {}, keep=3)
    shutil.rmtree(tmp_path / "step-000020")
    save(tmp_path, 15, state(15), {}, keep=1)  # not at once removed as "older than 30"
    assert {p.name for p in tmp_path.glob("step-*")} == {"step-000015", "step-000030"}
    save(tmp_path, 30, state(-30), {}, keep=1)
    assert {p.name for p in tmp_path.glob("step-*")} == {"step-000030"}
    assert load(latest(tmp_path)).tensors["n"] == -30


def test_damaged_ones_do_not_count_as_kept(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step, state(step), {}, keep=3)
    (tmp_path / "step-000002" / "meta.json").write_text("{")
    save(tmp_path, 4, state(4), {}, keep=3)
    assert {p.name[-1] for p in tmp_path.glob("step-*")} == {"1", "3", "4"}


# --- Killed anywhere: the disk as it is before every single operation ---


@pytest.mark.parametrize(
    ("steps", "keep"), [([], 2), ([1], 1), ([1, 2], 2), ([1, 2, 9], 2), ([1, 9], 1)]
)
def test_killed_anywhere_there_is_the_old_or_the_new(tmp_path, steps, keep):
    """Step 9 is saved, in some cases over another 9; at no moment is there neither."""
    folder = tmp_path / "run"
    folder.mkdir()
    for step in steps:
        save(folder, step, state(step), {}, keep=9)
    new = {"w": torch.full((50,), 99.0), "n": torch.tensor(99)}
    album = tmp_path / "album"
    moments = photographs(folder, album, lambda: save(folder, 9, new, {}, keep=keep))
    assert {"half of tensors.safetensors", "half of meta.json"} <= set(moments)
    found = []
    for i, moment in enumerate(moments):
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # nothing incomplete is in a place
            left = read_latest(album / f"{i:03d}")
        value = None if left is None else left.tensors["n"].item()
        assert value in (steps[-1] if steps else None, 99), moment
        if left is not None:
            assert (left.tensors["w"] == value).all()
        found.append(value)
    assert found[0] == (steps[-1] if steps else None)
    assert found[-1] == 99
    changes = sum(a != b for a, b in pairwise(found))
    assert changes == 1  # once new, always new
    # and whatever a dead process left behind, the next one clears away
    for i in range(len(moments)):
        again = album / f"{i:03d}"
        path = save(again, 10, state(10), {}, keep=1)
        assert [p.name for p in again.iterdir() if p.is_dir()] == [path.name]


class Interrupted(BaseException):
    """As KeyboardInterrupt: not caught by `except Exception`."""


@pytest.mark.parametrize("error", [OSError(28, "No space left"), Interrupted()])
def test_interrupted_anywhere_nothing_half_written_is_left(tmp_path, error):
    for n in range(100):
        folder = tmp_path / f"run-{n}"
        save(folder, 1, state(1), {})
        save(folder, 2, state(2), {})
        seen = []

        def fail(what, n=n, seen=seen):
            seen.append(what)
            if len(seen) == n + 1:
                raise error

        with (
            before_each(fail),
            contextlib.suppress(type(error)),
        ):
            save(folder, 3, state(3), {})
        if len(seen) <= n:
            break
        names = {p.name for p in folder.glob("*") if p.is_dir()}
        assert {"step-000002"} < names
        partly = {name for name in names if name.startswith(".part")}
        # An interruption while old ones are removed leaves those for the next time.
        assert not partly or (partly == {".part-step-000001"} and len(names) == 3)
        assert read_latest(folder).tensors["n"].item() in (2, 3)
        assert load(save(folder, 3, state(3), {})).tensors["n"] == 3
        assert len([p for p in folder.glob("*") if p.is_dir()]) == 2
    assert n == 14  # as many operations as `test_the_order_of_a_save` names


def test_a_disk_that_is_really_full(tmp_path):
    """The system refuses to let a file grow beyond 10,000 bytes."""
    save(tmp_path, 1, state(1), {})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(OSError, match=r"tensors.safetensors could not be written"):
            save(tmp_path, 2, state(2, n=5000), {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert {p.name for p in tmp_path.iterdir()} == {".lock", "step-000001"}
    assert load(latest(tmp_path)).step == 1


def test_a_folder_that_cannot_be_written_to(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError):  # noqa: PT011, its text is the system's
        save(tmp_path / "file" / "run", 1, state(1), {})
    save(tmp_path / "run", 1, state(1), {})

    def refuse(*_, **__):
        raise PermissionError(30, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(os, "mkdir", refuse)
        with pytest.raises(PermissionError, match="Read-only"):
            save(tmp_path / "run", 2, state(2), {})
    assert load(latest(tmp_path / "run")).step == 1


def test_the_order_of_a_save(tmp_path):
    """By hand: files and their folder are flushed, renamed, flushed; then one goes.

    Also what `before_each` promises: every operation, and nothing else.
    """
    save(tmp_path, 1, state(1), {}, keep=1)
    done = []
    with before_each(done.append):
        save(tmp_path, 2, state(2), {}, keep=1)
    assert done[:10] == [
        "mkdir .part-step-000002",
        "write tensors.safetensors",
        "half of tensors.safetensors",
        "write meta.json",
        "half of meta.json",
        "sync tensors.safetensors",
        "sync meta.json",
        "sync .part-step-000002",
        "rename .part-step-000002",
        f"sync {tmp_path.name}",
    ]
    assert done[10] == "rename step-000001"
    assert sorted(done[11:13]) == ["unlink meta.json", "unlink tensors.safetensors"]
    assert done[13:] == ["rmdir .part-step-000001"]


def test_sync_flushes(monkeypatch, tmp_path):
    """What is called sync above reaches `fsync`, for the very file."""
    flushed, real = [], os.fsync

    def fsync(handle):
        flushed.append(os.fstat(handle).st_ino)
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    path = save(tmp_path, 1, state(1), {})
    names = (path / "tensors.safetensors", path / "meta.json", path, tmp_path)
    assert flushed == [name.stat().st_ino for name in names]


def test_photographs_show_the_folder_before_each_operation(tmp_path):
    folder, album = tmp_path / "run", tmp_path / "album"
    folder.mkdir()
    (folder / "old").write_text("12")

    def action():
        (folder / "new").write_text("1234")
        os.unlink(folder / "old")

    moments = photographs(folder, album, action)
    assert moments == ["write new", "half of new", "unlink old", "end"]
    found = [
        {path.name: path.read_text() for path in (album / f"{i:03d}").iterdir()}
        for i in range(4)
    ]
    assert found == [
        {"old": "12"},
        {"old": "12", "new": "12"},
        {"old": "12", "new": "1234"},
        {"new": "1234"},
    ]
    assert (folder / "new").read_text() == "1234"


def test_one_writer_at_a_time(tmp_path):
    """What a living process is writing is neither removed nor disturbed."""
    save(tmp_path, 1, state(1), {})
    part = tmp_path / ".part-step-000002"
    with FileLock(tmp_path / ".lock"):
        part.mkdir()
        other = threading.Thread(target=save, args=(tmp_path, 3, state(3), {}))
        other.start()
        time.sleep(0.2)
        assert part.exists()
        assert not (tmp_path / "step-000003").exists()
        assert load(latest(tmp_path)).step == 1  # readers do not wait
    other.join()
    assert not part.exists()
    assert load(latest(tmp_path)).step == 3


# --- Damage ---


@settings(max_examples=80)
@given(data=st.data(), name=st.sampled_from(["tensors.safetensors", "meta.json"]))
def test_one_changed_bit_is_refused_and_passed_over(tmp_path_factory, data, name):
    folder = tmp_path_factory.mktemp("run")
    save(folder, 1, state(1), {"note": "é"})
    path = save(folder, 2, state(2), {"note": "é"})
    raw = bytearray((path / name).read_bytes())
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= 1 << data.draw(st.integers(0, 7))
    if name == "meta.json" and _same_json(raw, (path / name).read_bytes()):
        return  # space became another white space
    (path / name).write_bytes(raw)
    with pytest.raises(ValueError, match=r"step-000002"):
        load(path)
    with pytest.warns(UserWarning, match=r"passed over: .*step-000002"):
        assert latest(folder) == folder / "step-000001"


def _same_json(a, b):
    try:
        return json.loads(bytes(a)) == json.loads(bytes(b))
    except ValueError:
        return False


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tensors.safetensors", lambda raw: raw[:-1], "must hold .* bytes; got"),
        ("tensors.safetensors", lambda raw: raw + b"\0", "must hold .* bytes; got"),
        ("tensors.safetensors", lambda raw: b"", "must hold .* bytes; got 0"),
        ("tensors.safetensors", lambda raw: raw[:-1] + b"\7", "must have the SHA-256"),
        ("meta.json", lambda raw: raw[:-3], "meta.json is damaged"),
        ("meta.json", lambda raw: b"", "meta.json is damaged"),
        ("meta.json", lambda raw: b"[1]", "meta.json is damaged"),
        ("meta.json", lambda raw: b"\xff", "meta.json is damaged"),
        (
            "meta.json",
            lambda raw: raw.replace(b'"step": 2', b'"step": 3'),
            "is damaged",
        ),
        (
            "meta.json",
            lambda raw: raw.replace(b'"format": 1', b'"format": 2'),
            "must have the format 1, which this version of groundup reads; got 2",
        ),
        ("meta.json", lambda raw: b"{}", "must have the format 1, .*; got None"),
    ],
)
def test_damage_is_named(tmp_path, file, content, message):
    save(tmp_path, 1, state(1), {})
    path = save(tmp_path, 2, state(2), {})
    raw = (path / file).read_bytes()
    (path / file).write_bytes(content(raw))
    with pytest.raises(ValueError, match=message):
        load(path)
    with pytest.warns(UserWarning, match=message):
        assert latest(tmp_path) == tmp_path / "step-000001"


@pytest.mark.parametrize("missing", ["tensors.safetensors", "meta.json"])
def test_what_is_missing_is_named(tmp_path, missing):
    path = save(tmp_path, 2, state(2), {})
    (path / missing).unlink()
    with pytest.raises(FileNotFoundError, match=f"no complete .* it has no {missing}"):
        load(path)
    with pytest.warns(UserWarning, match=f"it has no {missing}"):
        assert latest(tmp_path) is None
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        load(tmp_path / "step-000003")


def test_latest_of_nothing_is_none_and_other_things_are_left_alone(tmp_path):
    assert latest(tmp_path / "not there") is None
    assert latest(tmp_path) is None
    (tmp_path / "step-final").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "step-000009.bak").mkdir()
    path = save(tmp_path, 1, state(1), {}, keep=1)
    assert latest(tmp_path) == path
    save(tmp_path, 2, state(2), {}, keep=1)
    kept = {p.name for p in tmp_path.iterdir()} - {".lock"}
    assert kept == {"step-final", "notes.txt", "step-000009.bak", "step-000002"}


def test_a_checkpoint_may_be_copied_under_another_name(tmp_path):
    path = save(tmp_path / "run", 5, state(5), {})
    shutil.copytree(path, tmp_path / "best")
    assert load(tmp_path / "best").step == 5


def test_the_tokenizer_has_to_be_the_one_it_was_trained_with(tmp_path):
    ours = ByteTokenizer()
    path = save(tmp_path, 1, state(1), {"tokenizer": ours.digest})
    assert load(path, tokenizer=ours).step == 1

    class Other(ByteTokenizer):
        digest = "0" * 64

    with pytest.raises(ValueError, match="tokenizer must have the digest"):
        load(path, tokenizer=Other())
    silent = save(tmp_path, 2, state(2), {})
    assert load(silent).step == 2
    with pytest.raises(ValueError, match="does not say which tokenizer"):
        load(silent, tokenizer=ours)


@pytest.mark.parametrize(("step", "keep"), [(-1, 2), (0, 0), (3, -1)])
def test_refuses_steps_and_numbers_that_make_no_sense(tmp_path, step, keep):
    with pytest.raises(ValueError, match=f"got {step} and {keep}"):
        save(tmp_path / "run", step, state(1), {}, keep=keep)
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_stored_is_refused_and_leaves_nothing(tmp_path):
    save(tmp_path, 1, state(1), {})
    with pytest.raises(TypeError, match="not JSON serializable"):
        save(tmp_path, 2, state(2), {"model": object()})
    assert {p.name for p in tmp_path.iterdir()} == {".lock", "step-000001"}
