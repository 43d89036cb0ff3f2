"""The makers of recorded results: a registry, filled by the parts.

Here: `register`, which a maker's module uses, and `discover`, which imports the module
`recordings` of every part; that module imports those that register. Left out: running
a maker and keeping what it returns (`artifacts`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from groundup.bench import import_from_parts

Config = Mapping[str, Any]  # what JSON can hold
Maker = Callable[[Config], Mapping[str, Any]]


@dataclass(frozen=True)
class Recipe:
    """What the registry holds: a maker and the configs to run it with, by preset."""

    make: Maker
    presets: Mapping[str, Config]


MAKERS: dict[str, Recipe] = {}


def register(
    name: str, *, uses: tuple[str, ...] = (), **presets: Config
) -> Callable[[Maker], Maker]:
    """Enter the decorated maker into the registry under name.

    Args:
        name: of the recording.
        uses: further modules whose code decides the numbers.
        presets: configs; `small` is the one that the book shows. A config with the
            field `device` says that its maker obeys it.

    Raises:
        ValueError: another maker has that name, or there is no preset `small`.

    Example: `@register("ladder", uses=("groundup.modern.decoder",), small=CONFIG)`.
    """
    if "small" not in presets:
        raise ValueError(f"artifact {name!r} needs a preset called small")

    def enter(make: Maker) -> Maker:
        if name in MAKERS:
            raise ValueError(f"artifact {name!r} is registered twice")
        make.uses = uses
        MAKERS[name] = Recipe(make, presets)
        return make

    return enter


def discover(package: str = "groundup") -> dict[str, Recipe]:
    """Import `recordings` of every part that has such a module; return the registry."""
    import_from_parts("recordings", package)
    return MAKERS


def configure(name: str, recipe: Recipe, preset: str, device: str) -> Config:
    """Return the config of a preset, for a device.

    Raises:
        ValueError: there is no such preset, torch sees no such device here, or the
            maker works on the CPU alone. Nothing is recorded as from a device that
            it was not computed on.
    """
    if preset not in recipe.presets:
        known = ", ".join(recipe.presets)
        raise ValueError(f"{name} has no preset {preset!r}; there are: {known}")
    config = dict(recipe.presets[preset])
    if device != config.get("device", "cpu"):
        if "device" not in config:
            raise ValueError(f"{name} is computed on the CPU alone; got {device!r}")
        import torch

        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(
                f"device {device!r} does not work here: {error}"
            ) from error
        config["device"] = device
    return config
