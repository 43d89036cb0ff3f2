"""What a recording says about itself."""

import ast
import os
import subprocess
import sys

import pytest
import torch

from groundup import provenance
from groundup.provenance import code_digests, commit, describe_device, sentence

SOURCE = '''\
"""Module."""
X: int = 0


class A:
    """Class."""

    def f(self, a=(), *, b=None):
        """Function."""
        if a == "text":
            return f"{b!r} {{}}"
        return None
'''


def essence(source):
    return provenance._essence(ast.parse(source))


@pytest.mark.parametrize(
    "same",
    [
        SOURCE.replace("Module.", "Other words."),
        SOURCE.replace("Class.", ""),
        SOURCE.replace('        """Function."""\n', ""),
        SOURCE.replace("X: int = 0", "# why\nX: int = (\n    0\n)"),
        SOURCE.replace('"text"', "'text'"),
    ],
)
def test_words_and_layout_do_not_count(same):
    assert same != SOURCE
    assert essence(same) == essence(SOURCE)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("= 0", "= 1"),
        ("= 0", "= False"),
        ("= 0", "= 0.0"),
        ("= 0", "= None"),
        ("X: int = 0", "X = 0"),
        ("a=()", "a=[]"),
        ("*, b", "b"),
        ("==", "!="),
        ('"text"', '"tent"'),
        ("!r", "!s"),
        ("return None", "return"),
        ("class A", "class A(B)"),
        ("    def f", "    @g\n    def f"),
        ('        if a == "text"', '        a\n        if a == "text"'),
    ],
)
def test_every_change_of_code_counts(old, new):
    changed = SOURCE.replace(old, new, 1)
    assert changed != SOURCE
    assert essence(changed) != essence(SOURCE)


def test_the_digest_is_the_same_in_every_python():
    """Worked out once, here in full: Python 3.13 writes `ast.dump` otherwise."""
    assert essence("def f(a):\n    'doc'\n    return -a\n") == (
        "Module(body=[FunctionDef(name='f',args=arguments(args=[arg(arg='a')]),"
        "body=[Return(value=UnaryOp(op=USub(),operand=Name(id='a',ctx=Load())))])])"
    )


def test_digests_are_those_of_the_makers_module_and_of_what_it_names():
    def make(config): ...

    make.__module__ = "groundup.bench"
    assert set(code_digests(make)) == {"groundup.bench"}
    make.uses = ("groundup.pages",)
    digests = code_digests(make, ("groundup.foundations.fitting",))
    assert list(digests) == [
        "groundup.bench",
        "groundup.foundations.fitting",
        "groundup.pages",
    ]
    assert len(set(digests.values())) == 3
    with pytest.raises(ValueError, match=r"'groundup\.nothing' is no module"):
        code_digests(make, ("groundup.nothing",))


def test_the_device_is_this_one():
    device = describe_device()
    assert device["kind"] == "cpu"
    assert device["cores"] == len(os.sched_getaffinity(0))
    with open("/proc/cpuinfo") as info:
        assert device["name"] in info.read()


def test_a_gpu_is_named_by_torch(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card {device}")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3)
    device = describe_device("cuda:1")
    assert device == {"kind": "cuda", "name": "card cuda:1", "cores": 1}
    assert provenance.peak_bytes(device) == 3


PEAKS = """
import torch
from groundup.provenance import describe_device, peak_bytes
before = peak_bytes(describe_device())
ballast = torch.ones(2 * before, dtype=torch.uint8)
del ballast
print(before, peak_bytes(describe_device()))
"""


def test_the_peak_counts_what_was_freed():
    """In a process of its own: in this one the peak of all tests before it counts."""
    done = subprocess.run(
        [sys.executable, "-c", PEAKS], capture_output=True, text=True, check=True
    )
    before, after = map(int, done.stdout.split())
    assert 2 * before < after < 4 * before


def test_the_commit_says_whether_the_code_differs_from_it(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert commit() == "unknown"

    def git(*arguments):
        who = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        line = ["git", "-C", str(tmp_path), *who, *arguments]
        done = subprocess.run(line, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    git("init", "-q")
    (tmp_path / "code").mkdir()
    (tmp_path / "code/a.py").write_text("a = 1\n")
    git("add", ".")
    git("commit", "-q", "-m", "one")
    head = git("rev-parse", "--short", "HEAD")
    assert commit() == head
    (tmp_path / "page.md").write_text("not code\n")
    assert commit() == head
    (tmp_path / "code/a.py").write_text("a = 2\n")
    assert commit() == f"{head} with changes"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "on 2 CPU cores (Core X) in 12 min, with at most 1.5 GB,"),
        ({"seconds": 3.4}, "in 3 s,"),
        ({"device": {"kind": "cpu", "name": "Y", "cores": 1}}, "on 1 CPU core (Y) in"),
        ({"device": {"kind": "cuda", "name": "Z", "cores": 1}}, "on a GPU (Z) in"),
    ],
)
def test_the_sentence(changes, words):
    manifest = {
        "device": {"kind": "cpu", "name": "Core X", "cores": 2},
        "seconds": 719.0,
        "peak_bytes": 1_450_000_001,
        "date": "2026-11-25T02:00:00+00:00",
        "libraries": {"torch": "2.13.0"},
        "commit": "abc1234",
    }
    told = sentence(manifest | changes)
    assert words in told
    assert told.endswith(" on 2026-11-25 with torch 2.13.0 at commit abc1234.")
