"""Recordings: kept whole, given back verified, and known to be stale when they are."""

import hashlib
import json
import os
import time
from datetime import UTC, datetime
from functools import partial

import pytest
import torch

from groundup import artifacts, makers, pages, provenance
from groundup.artifacts import ArtifactError, get, load, record, remember, stale

CONFIG = {"steps": 3, "rates": [0.1, 0.2], "name": "ada"}
MODULE = '"""A maker."""\n\n\ndef make(config):\n    return {"x": config["steps"]}\n'


def make(config):
    """A maker as a part would have it: one value of each kind."""
    return {
        "weights": torch.arange(6.0).view(2, 3).T,  # not contiguous
        "half": torch.tensor([1.5, -2.25], dtype=torch.bfloat16),
        "count": torch.tensor(7),
        "table": [{"n": config["steps"], "loss": 1.25}, None],
        "map.png": b"\x89PNG\x00",
    }


@pytest.fixture(autouse=True)
def clone(tmp_path, monkeypatch):
    """A clone with two modules; `make` above passes for a function of the first."""
    root = tmp_path / "clone"
    for name in ("maker", "base", "other"):
        path = root / f"code/groundup/{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(MODULE)
    (root / "book").mkdir()
    find = partial(pages.module_file, root=root)
    monkeypatch.setattr(provenance, "module_file", find)
    monkeypatch.setattr(make, "__module__", "groundup.maker")
    monkeypatch.setattr(makers, "MAKERS", {})
    monkeypatch.setattr(artifacts, "MAKERS", makers.MAKERS)
    monkeypatch.setattr(artifacts.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.delenv(pages.REBUILD_FLAG, raising=False)
    return root


@pytest.fixture
def folder(clone):
    return clone / "book/artifacts"


def maker(function):
    function.__module__ = "groundup.maker"
    return function


# What comes back


def test_values_come_back_as_they_were_made(folder):
    made, recorded = make(CONFIG), record("one", make, CONFIG, folder)
    for read in (recorded, load("one", folder), get("one", make, CONFIG, folder)):
        assert set(read.values) == set(made)
        for key in ("weights", "half", "count"):
            assert read[key].dtype == made[key].dtype
            assert torch.equal(read[key], made[key])
        assert read["table"] == made["table"]
        assert read["map.png"] == made["map.png"]
        assert read.stale is None


def test_tensors_that_share_memory_are_kept_apart(folder):
    base = torch.arange(4.0)
    share = maker(lambda config: {"all": base, "part": base[:2]})
    read = record("one", share, {}, folder)
    assert torch.equal(read["part"], base[:2])
    assert torch.equal(read["all"], base)


def test_the_manifest_says_what_was_run_and_where(folder):
    slow = maker(lambda config: time.sleep(0.05) or {"a": 1, "b": torch.zeros(2)})
    before = datetime.now(UTC).replace(microsecond=0)
    manifest = record("one", slow, CONFIG, folder).manifest
    assert manifest["config"] == CONFIG
    files = {p.name: p.read_bytes() for p in (folder / "one").iterdir()}
    assert json.loads(files.pop("manifest.json")) == manifest
    shas = {
        name: hashlib.sha256(content).hexdigest() for name, content in files.items()
    }
    assert manifest["files"] == shas
    assert set(shas) == {"a.json", "tensors.safetensors"}
    assert before <= datetime.fromisoformat(manifest["date"]) <= datetime.now(UTC)
    assert 0.05 <= manifest["seconds"] < 5
    assert manifest["peak_bytes"] > 50_000_000  # torch alone takes more
    assert manifest["device"]["kind"] == "cpu"
    assert manifest["device"]["cores"] == len(os.sched_getaffinity(0))
    assert manifest["libraries"]["torch"] == torch.__version__
    assert list(manifest["code"]) == ["groundup.maker"]


@pytest.mark.parametrize("file", ["tensors.safetensors", "table.json", "map.png"])
@pytest.mark.parametrize("damage", ["one bit", "cut", "gone"])
def test_a_damaged_file_is_refused_and_named(folder, file, damage):
    record("one", make, CONFIG, folder)
    path = folder / "one" / file
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content if damage == "one bit" else content[:-1])
    if damage == "gone":
        path.unlink()
    what = "missing" if damage == "gone" else "damaged"
    with pytest.raises(ArtifactError, match=f"{file} is {what}.*groundup rebuild one"):
        load("one", folder)


def test_a_damaged_manifest_is_refused_and_named(folder):
    record("one", make, CONFIG, folder)
    path = folder / "one/manifest.json"
    path.write_text(path.read_text()[:40])
    with pytest.raises(ArtifactError, match=r"manifest\.json is damaged"):
        load("one", folder)


@pytest.mark.parametrize("read", [load, artifacts.provenance])
def test_what_was_never_recorded_names_the_remedy(folder, read):
    with pytest.raises(ArtifactError, match=r"no recording 'two'.*rebuild two"):
        read("two", folder)


# Whole or not at all


@maker
def fails(config):
    raise ZeroDivisionError


@pytest.mark.parametrize(
    ("function", "error"),
    [
        (fails, ZeroDivisionError),
        (maker(lambda config: {"a": 1, "b": {1, 2}}), ValueError),
        (maker(lambda config: {"a": 1, "Not A Name": 1}), ValueError),
        (maker(lambda config: {"manifest": 1}), ValueError),
        (maker(lambda config: {"../out.png": b""}), ValueError),
        (maker(lambda config: {"noending": b""}), ValueError),
        (maker(lambda config: {"table.json": b""}), ValueError),
    ],
)
def test_a_recording_that_fails_leaves_the_old_one(folder, function, error):
    record("one", make, CONFIG, folder)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(error):
        record("one", function, {}, folder)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    assert [p.name for p in folder.iterdir()] == ["one"]


@pytest.mark.parametrize("nth", [1, 2])
def test_an_interruption_at_a_rename_leaves_the_old_one(folder, monkeypatch, nth):
    record("one", make, CONFIG, folder)
    rename, calls = artifacts.Path.rename, []

    def interrupted(path, target):
        calls.append(path)
        if len(calls) == nth:
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(artifacts.Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        record("one", make, {"steps": 9}, folder)
    assert load("one", folder).manifest["config"] == CONFIG
    assert [p.name for p in folder.iterdir()] == ["one"]


def test_a_new_recording_replaces_all_of_the_old_one(folder):
    record("one", make, CONFIG, folder)
    read = record("one", maker(lambda config: {"a": 1}), {}, folder)
    assert read.values == {"a": 1}
    names = sorted(p.name for p in (folder / "one").iterdir())
    assert names == ["a.json", "manifest.json"]


def test_refuses_a_bad_name_a_pages_function_and_a_package_without_book(
    folder, tmp_path
):
    with pytest.raises(ValueError, match=r"'\.\./x'"):
        record("../x", make, CONFIG, folder)
    with pytest.raises(
        ValueError, match=r"'\S*test_artifacts' is no module of groundup"
    ):
        record("one", lambda config: {}, {}, folder)
    with pytest.raises(ArtifactError, match="record in a clone"):
        record("one", make, CONFIG, tmp_path / "nowhere" / "artifacts")


def test_nothing_is_recorded_as_from_a_gpu_that_did_nothing(folder, monkeypatch):
    gpu = {"kind": "cuda", "name": "H100", "cores": 1}
    monkeypatch.setattr(artifacts, "describe_device", lambda device: gpu)
    with pytest.raises(ArtifactError, match="make computed nothing on H100"):
        record("one", make, CONFIG | {"device": "cuda"}, folder)
    assert not folder.exists()


# Stale or not


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (CONFIG, None),
        (CONFIG | {"rates": (0.1, 0.2)}, None),  # JSON knows no tuples
        (CONFIG | {"device": "cuda"}, None),
        (CONFIG | {"steps": 4}, "its config had steps: 3, not 4"),
        (CONFIG | {"batch": None}, "its config had batch: absent, not None"),
        ({"steps": 3}, "its config had name: ada, not absent"),
    ],
)
def test_another_config_makes_stale_another_device_does_not(folder, config, reason):
    record("one", make, CONFIG, folder)
    assert stale("one", make, config, folder) == reason
    assert get("one", make, config, folder).stale == reason


@pytest.mark.parametrize(
    ("name", "source", "is_stale"),
    [
        ("maker", MODULE.replace("steps", "epochs"), True),
        ("maker", MODULE.replace("A maker.", "Another text."), False),
        ("maker", MODULE.replace('"x": ', '\n        # why\n        "x":\n '), False),
        ("base", MODULE.replace('"x"', '"y"'), True),  # named in `uses`
        ("other", MODULE.replace('"x"', '"y"'), False),
    ],
)
def test_changed_code_makes_stale_comments_do_not(
    folder, clone, monkeypatch, name, source, is_stale
):
    monkeypatch.setattr(make, "uses", ("groundup.base",), raising=False)
    record("one", make, CONFIG, folder)
    (clone / f"code/groundup/{name}.py").write_text(source)
    reason = stale("one", make, CONFIG, folder)
    expected = f"the code of groundup.{name} has changed since"
    assert reason == (expected if is_stale else None)


def test_what_else_a_maker_is_said_to_use_makes_stale(folder, clone, monkeypatch):
    record("one", make, CONFIG, folder)
    monkeypatch.setattr(make, "uses", ("groundup.base",), raising=False)
    assert "groundup.base" in stale("one", make, CONFIG, folder)


def test_a_page_is_told_that_its_recording_is_stale(folder):
    record("one", make, CONFIG, folder)
    plain = artifacts.provenance("one", folder)
    assert "stale" not in plain
    makers.register("one", small=CONFIG | {"steps": 4})(make)
    told = artifacts.provenance("one", folder)
    note = " Note: this recording is stale, its config had steps: 3, not 4; "
    assert told == plain + note + "`groundup rebuild one` makes it anew."


def test_a_recording_of_any_preset_belongs_to_the_code(folder):
    makers.register("one", small=CONFIG | {"steps": 1}, full=CONFIG)(make)
    record("one", make, CONFIG, folder)
    assert load("one", folder).stale is None
    assert get("one", make, CONFIG | {"steps": 1}, folder).stale is not None


@pytest.mark.parametrize(
    ("flag", "again"),
    [
        ("", False),
        ("two", False),
        ("onerous", False),
        ("one", True),
        ("two, one", True),
        ("all", True),
    ],
)
def test_the_build_records_anew_what_it_is_asked_to(folder, monkeypatch, flag, again):
    first = record("one", maker(lambda config: {"a": 1}), {}, folder)
    monkeypatch.setenv(pages.REBUILD_FLAG, flag)
    second = get("one", maker(lambda config: {"a": 2}), {}, folder)
    assert second["a"] == (2 if again else 1)
    assert first["a"] == 1


# Pieces


def test_an_interrupted_recording_goes_on_where_it_was(folder):
    runs, patience = [], [2]

    @maker
    def piece(config):
        if len(runs) == patience[0]:
            raise KeyboardInterrupt
        runs.append(config["size"])
        time.sleep(0.05)
        return {"square": config["size"] ** 2}

    @maker
    def whole(config):
        return {"squares": [remember(piece, {"size": n})["square"] for n in range(4)]}

    with pytest.raises(KeyboardInterrupt):
        record("one", whole, {}, folder)
    patience[0] = 99
    for _ in range(2):
        read = record("one", whole, {}, folder)
        assert runs == [0, 1, 2, 3]
        assert read["squares"] == [0, 1, 4, 9]
        # All four pieces count, not the two or none that this call made.
        assert 0.2 <= read.manifest["seconds"] <= 0.4
        assert len(read.manifest["pieces"]) == 4


def test_a_piece_of_two_pieces_counts_once(folder):
    @maker
    def piece(config):
        before = remember(piece, {"n": config["n"] - 1})["sum"] if config["n"] else 0
        time.sleep(0.05)
        return {"sum": before + config["n"]}

    @maker
    def whole(config):
        time.sleep(0.05)
        return {"sums": [remember(piece, {"n": n})["sum"] for n in range(4)]}

    read = record("one", whole, {}, folder)
    assert read["sums"] == [0, 1, 3, 6]
    assert 0.25 <= read.manifest["seconds"] <= 0.45  # not 4 + 3 + 2 + 1 naps


def test_a_piece_is_made_again_when_code_or_config_change(clone):
    runs = []

    @maker
    def piece(config):
        runs.append(config["n"])
        return {"n": config["n"]}

    ask = partial(remember, piece, uses=("groundup.base",))
    assert [ask({"n": n})["n"] for n in (1, 2, 1)] == [1, 2, 1]
    assert runs == [1, 2]
    (clone / "code/groundup/base.py").write_text("CHANGED = True\n")
    ask({"n": 1})
    assert runs == [1, 2, 1]


# The book's own

RECORDED = [p.parent for p in sorted(artifacts.FOLDER.glob("*/manifest.json"))]


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.name)
def test_each_recording_of_the_book_is_whole_and_not_stale(path, monkeypatch):
    monkeypatch.undo()  # the real package, the real registry
    recipe = makers.discover().get(path.name)
    assert recipe is not None, "no part registers a maker for it"
    read = load(path.name)
    assert read.stale is None
    assert {p.name for p in path.iterdir()} == {
        *read.manifest["files"],
        "manifest.json",
    }
    assert sum(p.stat().st_size for p in path.iterdir()) <= artifacts.MAX_BYTES


def test_the_recordings_together_are_small_and_nothing_else_lies_there():
    found = [p for p in artifacts.FOLDER.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in found) <= artifacts.MAX_TOTAL_BYTES
    assert {p.parent for p in found} <= set(RECORDED)


@pytest.mark.parametrize("page", pages.book_pages(), ids=lambda page: page.stem)
def test_a_page_that_shows_a_recording_says_where_it_comes_from(page):
    sources = "\n".join(cell.source for cell in pages.cells(page))
    if pages.artifacts_of(pages.read_notebook(page.path)) and "artifacts" in sources:
        assert "provenance" in sources
