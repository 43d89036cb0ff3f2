"""AdamW by hand: momentum, a scale for each parameter, decay beside the gradient.

Here: one update as a function on tensors, an optimizer that keeps its state, the split
of a model's parameters into those that decay and those that do not, and clipping by the
norm of the whole gradient. Left out: AMSGrad, sparse gradients, fused kernels.

Source: Kingma and Ba (2015), algorithm 1; Loshchilov and Hutter (2019), algorithm 2
(decay decoupled from the gradient, as `torch.optim.AdamW`: lr times the decay). Page:
book/2-training/loop.md.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

BETAS = (0.9, 0.99)  # the second one below Adam's 0.999: small models, short runs
EPS = 1e-8  # Kingma and Ba (2015), algorithm 1


@torch.no_grad()
def adamw_update(
    parameter: Float[Tensor, "*shape"],
    grad: Float[Tensor, "*shape"],
    mean: Float[Tensor, "*shape"],
    square: Float[Tensor, "*shape"],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float] = BETAS,
    eps: float = EPS,
    weight_decay: float = 0.0,
) -> None:
    """Update parameter, mean and square in place.

    Args:
        parameter: what is trained.
        grad: its gradient.
        mean: running mean of the gradient, 0 before the first step.
        square: running mean of its square, 0 before the first step.
        step: number of this update, from 1.
        lr: learning rate.
        betas: how much of `mean` and of `square` is kept at a step.
        eps: added to the root of the square.
        weight_decay: the parameter shrinks by lr * weight_decay of itself.

    Example: the first step moves each entry by lr against the sign of its gradient.
    """
    parameter.mul_(1 - lr * weight_decay)
    mean.lerp_(grad, 1 - betas[0])
    square.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
    # Both averages started at 0 and are too small by these factors.
    lr_now, root = lr / (1 - betas[0] ** step), (1 - betas[1] ** step) ** 0.5
    parameter.addcdiv_(mean, (square.sqrt() / root).add_(eps), value=-lr_now)


@dataclass(frozen=True)
class Group:
    """Parameters that share a weight decay, by name."""

    parameters: dict[str, nn.Parameter]
    weight_decay: float


def decay_groups(model: nn.Module, weight_decay: float) -> list[Group]:
    """Let matrices decay, and nothing else.

    Vectors (biases, the scales of norms) say where and how large, and have no reason to
    be near 0. A tied matrix is listed once. Parameters that do not require a gradient
    are left out.

    Returns:
        Two groups: weight_decay for every matrix, 0 for the rest.

    Raises:
        ValueError: weight_decay is negative.
    """
    if weight_decay < 0:
        raise ValueError(f"weight_decay must not be negative; got {weight_decay}")
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return [
        Group({n: p for n, p in trained.items() if p.dim() >= 2}, weight_decay),
        Group({n: p for n, p in trained.items() if p.dim() < 2}, 0.0),
    ]


class AdamW:
    """`adamw_update` for groups of parameters; equal to `torch.optim.AdamW`.

    Args:
        groups: as from `decay_groups`.
        betas, eps: see `adamw_update`.

    Raises:
        ValueError: a beta is outside [0, 1), or eps is negative.
    """

    def __init__(
        self,
        groups: Iterable[Group],
        *,
        betas: tuple[float, float] = BETAS,
        eps: float = EPS,
    ) -> None:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must lie in [0, 1); got {betas}")
        if not eps >= 0:
            raise ValueError(f"eps must not be negative; got {eps}")
        self.groups = list(groups)
        self.betas, self.eps = betas, eps
        self.state = {
            name: (torch.zeros_like(p), torch.zeros_like(p))
            for group in self.groups
            for name, p in group.parameters.items()
        }
        # Each its own count, as in torch: one that is seldom used is corrected longer.
        self.n_steps = dict.fromkeys(self.state, 0)

    def step(self, lr: float) -> None:
        """Update every parameter that has a gradient, at learning rate lr."""
        for group in self.groups:
            for name, parameter in group.parameters.items():
                if parameter.grad is None:
                    continue
                self.n_steps[name] += 1
                adamw_update(
                    parameter,
                    parameter.grad,
                    *self.state[name],
                    step=self.n_steps[name],
                    lr=lr,
                    betas=self.betas,
                    eps=self.eps,
                    weight_decay=group.weight_decay,
                )

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for group in self.groups:
            for parameter in group.parameters.values():
                parameter.grad = None


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], most: float) -> float:
    """Scale all gradients down together where their common norm is above most.

    Args:
        parameters: those without a gradient are passed over.
        most: largest norm that is let through.

    Returns:
        The norm before clipping (0 without any gradient). A norm that is not finite is
        returned as it is, and the gradients are of no use then.

    Raises:
        ValueError: most is not positive.
    """
    if not most > 0:
        raise ValueError(f"most must be positive; got {most}")
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = math.hypot(*(g.norm().item() for g in grads))
    if norm > most:
        for grad in grads:
            grad.mul_(most / norm)
    return norm
