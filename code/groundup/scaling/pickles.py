"""The one door for pickled files, with its danger in its name.

Here: reading a file that may run code, for those who say so. Left out: searching such
files for harm, which cannot be done reliably.

Page: book/4-scaling/checkpointing.md.
"""

import pickle
from pathlib import Path
from typing import Any

import torch

PICKLED = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")


def load_untrusted_pickle(
    path: Path, *, i_trust_this_file_to_run_code: bool = False
) -> Any:
    """Read a .pt, .pth, .bin, .ckpt or .pkl file: run what its author wrote.

    Args:
        path: the file.
        i_trust_this_file_to_run_code: True only for a file that you made, or whose
            maker may run programs as you on this machine.

    Returns:
        Whatever it holds; tensors on the CPU.

    Raises:
        ValueError: the danger was not accepted, or the ending is none of these.
    """
    path = Path(path)
    if path.suffix not in PICKLED:
        raise ValueError(f"path must end in one of {PICKLED}; got {path.name!r}")
    if not i_trust_this_file_to_run_code:
        raise ValueError(
            f"{path.name} is pickled: reading it can run any program. Ask for "
            f"safetensors, or read plain tensors with torch.load(path, "
            f"weights_only=True); only for a file that may run programs as you, pass "
            f"i_trust_this_file_to_run_code=True"
        )
    if path.suffix in (".pkl", ".pickle"):
        with path.open("rb") as file:
            return pickle.load(file)
    return torch.load(path, map_location="cpu", weights_only=False)
