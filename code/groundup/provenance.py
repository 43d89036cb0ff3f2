"""What a recording says about itself: code, device, memory, commit.

Here: a digest of the code that decides a recording's numbers, what computes on this
machine, the peak of memory, and the sentence that a page prints. Left out: recordings
themselves (`artifacts`).

Which code counts? The maker's own module, and the modules that it names: those that
decide the numbers, such as the model and the loop. All that is imported, followed to
its end, would be nearly the whole package, and a better error message in a helper far
below would ask for hours of training again. Of those modules comments, docstrings and
layout do not count. A change below them that does move the numbers goes unnoticed, and
versions of libraries are noted, not compared.
"""

import ast
import hashlib
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from groundup.pages import ROOT, module_file


def code_digests(make: Callable, uses: tuple[str, ...] = ()) -> dict[str, str]:
    """Return a digest for the module of make and for each that it is said to use.

    Comments, docstrings and layout do not change it.

    Raises:
        ValueError: one of them is no module of this package (a page's own function).
    """
    names = {make.__module__, *getattr(make, "uses", ()), *uses}
    digests = {}
    for name in sorted(names):
        path = module_file(name)
        if path is None:
            raise ValueError(
                f"{name!r} is no module of groundup: a maker and what it uses must be "
                "in the package, so that its code can be compared"
            )
        digests[name] = short_sha(_essence(ast.parse(path.read_text("utf-8"))))
    return digests


def describe_device(device: str = "cpu") -> dict[str, Any]:
    """Return kind, name and number of cores (of a GPU: 1) of what computes."""
    kind = torch.device(device).type
    if kind == "cuda":
        return {"kind": kind, "name": torch.cuda.get_device_name(device), "cores": 1}
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else 0
    name = found[1].strip() if found else platform.processor() or platform.machine()
    affinity = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    return {"kind": kind, "name": name, "cores": len(affinity(0))}


def short_sha(text: str) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def peak_bytes(device: Mapping[str, Any]) -> int:
    """Return the most memory that this process has had; on a GPU, that torch had."""
    if device["kind"] == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def commit() -> str:
    """Return the commit, with a word if the package differs from it."""

    def git(*arguments: str) -> str:
        line = ["git", "-C", str(ROOT), *arguments]
        run = subprocess.run(line, capture_output=True, text=True, check=False)
        return run.stdout.strip() if run.returncode == 0 else ""

    if shutil.which("git") is None or not (head := git("rev-parse", "--short", "HEAD")):
        return "unknown"
    return head + (" with changes" if git("status", "--porcelain", "code") else "")


def sentence(manifest: Mapping[str, Any]) -> str:
    """Say where a recording was made, how long it took, when and from what code."""
    device, seconds = manifest["device"], manifest["seconds"]
    took = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
    n = device["cores"]
    cores = "a GPU" if device["kind"] == "cuda" else f"{n} CPU core" + "s" * (n != 1)
    return (
        f"Recorded on {cores} ({device['name']}) in {took}, with at most "
        f"{manifest['peak_bytes'] / 1e9:.1f} GB, on {manifest['date'][:10]} with torch "
        f"{manifest['libraries']['torch']} at commit {manifest['commit']}."
    )


def _essence(node: Any) -> str:
    """Write a syntax tree without docstrings, the same in every version of Python."""
    if isinstance(node, list):
        return "[" + ",".join(map(_essence, node)) + "]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = dict(ast.iter_fields(node))
    body = fields.get("body")
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    if isinstance(node, documented) and ast.get_docstring(node, False) is not None:
        fields["body"] = body[1:]
    kept = (f"{k}={_essence(v)}" for k, v in fields.items() if v not in (None, []))
    return f"{type(node).__name__}({','.join(kept)})"
