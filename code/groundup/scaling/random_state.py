"""The state of every random generator of a process, as tensors for a checkpoint.

Here: torch's generator of the CPU, Python's and NumPy's global ones, and any
`torch.Generator` that a run has of its own. Left out: generators of other devices, and
`np.random.Generator`, whose `bit_generator.state` is JSON and belongs into a
checkpoint's meta.

Source: Matsumoto and Nishimura (1998) for the 624 words of a Mersenne Twister, which
all of these are. Page: book/4-scaling/checkpointing.md.
"""

import random
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


def random_state(**generators: torch.Generator) -> dict[str, Tensor]:
    """Return the states of all random generators as tensors, for `save`.

    torch's global generator of the CPU, Python's `random`, NumPy's global one, and
    those that are passed, by name. Not a `np.random.Generator`: its
    `bit_generator.state` is JSON, for `meta`.

    Example: `random_state(batches=generator)`.
    """
    version, ints, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002, the old one is the global
    assert (version, kind) == (3, "MT19937"), "no other is in use today"
    nan = float("nan")
    found = {
        "random/torch": torch.get_rng_state(),
        "random/python": torch.tensor(ints),
        "random/python/gauss": torch.tensor(
            nan if gauss is None else gauss, dtype=torch.float64
        ),
        "random/numpy": torch.tensor([*keys.tolist(), *rest[:2]]),
        "random/numpy/gauss": torch.tensor(rest[2], dtype=torch.float64),
    }
    return found | {f"random/of/{n}": g.get_state() for n, g in generators.items()}


def restore_random_state(
    tensors: Mapping[str, Tensor], **generators: torch.Generator
) -> None:
    """Put all random generators back to where `random_state` found them.

    Args:
        tensors: those of `random_state`; others among them are left alone.
        generators: the same names.

    Raises:
        ValueError: a state is missing, or one is there for which no generator is
            passed; then nothing is changed.
    """
    stored = {name for name in tensors if name.startswith("random/")}
    wanted = random_state(**generators).keys()
    if stored != wanted:
        name = min(stored ^ wanted)
        where = "is missing" if name in wanted else "has no generator to go to"
        raise ValueError(f"tensors must hold the states of generators; {name} {where}")
    torch.set_rng_state(tensors["random/torch"])
    gauss = tensors["random/python/gauss"].item()
    ints = tuple(tensors["random/python"].tolist())
    random.setstate((3, ints, None if gauss != gauss else gauss))
    *keys, place, has_gauss = tensors["random/numpy"].tolist()
    left = tensors["random/numpy/gauss"].item()
    np.random.set_state(("MT19937", keys, place, has_gauss, left))  # noqa: NPY002
    for name, generator in generators.items():
        generator.set_state(tensors[f"random/of/{name}"])
