"""Optimizers that one share of their highest rates moves together.

Here: AdamW for everything, or Muon for the matrices between embedding and head with
AdamW for the rest, behind one `step(share)`, and their state as named tensors. Left
out: the updates themselves; see `training.adamw` and `scaling.muon`.

Page: book/4-scaling/schedules.md.
"""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from groundup.scaling.distributed import put_whole
from groundup.scaling.muon import Muon, muon_groups
from groundup.training.adamw import AdamW, Group, decay_groups

OPTIMIZERS = ("adamw", "muon")


@runtime_checkable
class Optimizer(Protocol):
    """What `AdamW` and `Muon` have in common."""

    groups: list[Group]
    state: dict[str, tuple[Tensor, ...]]
    n_steps: dict[str, int]

    def step(self, lr: float) -> None:
        """Update every parameter that has a gradient, at learning rate lr."""


class Together:
    """Several optimizers, each with its highest rate.

    Args:
        parts: an optimizer and its highest rate, one pair each; no two train a
            parameter of the same name.
    """

    def __init__(self, *parts: tuple[Optimizer, float]) -> None:
        self.parts = parts

    def step(self, share: float) -> None:
        """Update with `share` of each highest rate."""
        for optimizer, lr in self.parts:
            optimizer.step(share * lr)

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for optimizer, _ in self.parts:
            for group in optimizer.groups:
                for parameter in group.parameters.values():
                    parameter.grad = None

    def tensors(self) -> dict[str, Tensor]:
        """Return the state: NAME/0, NAME/1, … and NAME/steps for a parameter NAME.

        The tensors are the optimizers' own, not copies.
        """
        found = {}
        for optimizer, _ in self.parts:
            for name, parts in optimizer.state.items():
                found |= {f"{name}/{i}": part for i, part in enumerate(parts)}
                found[f"{name}/steps"] = torch.tensor(optimizer.n_steps[name])
        return found

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over a state that `tensors` gave.

        Raises:
            ValueError: a name is missing or unknown, or a shape differs; then nothing
                is changed.
        """
        own = self.tensors()
        if tensors.keys() != own.keys():
            name = min(tensors.keys() ^ own.keys())
            where = "is missing" if name in own else "is unknown"
            raise ValueError(
                f"tensors must be the state of this optimizer; {name} {where}"
            )
        for name, tensor in own.items():
            if tensor.shape != tensors[name].shape:
                raise ValueError(
                    f"tensors[{name!r}] must have shape {tuple(tensor.shape)}; "
                    f"got {tuple(tensors[name].shape)}"
                )
        for optimizer, _ in self.parts:
            for name, parts in optimizer.state.items():
                for i, part in enumerate(parts):
                    put_whole(part, tensors[f"{name}/{i}"])
                optimizer.n_steps[name] = int(tensors[f"{name}/steps"])


def make_optimizer(
    model: nn.Module, kind: str, lr: float, weight_decay: float
) -> Together:
    """Return the optimizer called kind for all parameters that require a gradient.

    Args:
        model: what is trained.
        kind: "adamw", or "muon" (with AdamW for embedding, head and vectors).
        lr: the highest rate, also where two share it: Muon's updates are scaled to the
            size of AdamW's.
        weight_decay: of matrices.

    Raises:
        ValueError: kind is neither.
    """
    if kind == "adamw":
        return Together((AdamW(decay_groups(model, weight_decay)), lr))
    if kind == "muon":
        hidden, rest = muon_groups(model, weight_decay)
        return Together((Muon(hidden), lr), (AdamW(rest), lr))
    raise ValueError(f"kind must be one of {', '.join(OPTIMIZERS)}; got {kind!r}")
