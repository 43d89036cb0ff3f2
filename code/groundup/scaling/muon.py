"""Muon: every update of a matrix moves all of its directions equally far.

Here: the Newton-Schulz iteration that makes a matrix nearly orthogonal, for many at
once; the optimizer, with Nesterov momentum; the split of a model's parameters between
Muon and AdamW. Matrices that are spread over processes are gathered by each of them.
Left out: sharing that work out.

Source: Jordan et al. (2024) for the method, its coefficients and the rule "spectral";
Liu et al. (2025), eq. 4, for the rule "rms" and the decay. Page:
book/4-scaling/schedules.md.
Axes: `N` matrices, `R` rows (outputs), `K` columns (inputs).
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from groundup.training.adamw import Group

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan et al. (2024)
N_ITERATIONS = 5  # the same
MOMENTUM = 0.95  # the same
TINY = 1e-7  # least norm that is divided by
ADAMW_RMS = 0.2  # root mean square of AdamW's usual updates; Liu et al. (2025), eq. 4
HIDDEN = "blocks."  # how the names of a model's hidden matrices begin


def orthogonalise(
    matrices: Float[Tensor, "*N R K"],
    n_iterations: int = N_ITERATIONS,
    dtype: torch.dtype = torch.bfloat16,
) -> Float[Tensor, "*N R K"]:
    """Bring every singular value near 1 and leave the directions as they are.

    A matrix U S V^T goes towards U V^T, its polar factor, by X <- aX + (bA + cA²)X with
    A = X X^T: an odd polynomial of each singular value. The coefficients rise steeply
    at 0 and do not converge: singular values from about 0.01 of the norm upwards end
    between 0.68 and 1.14, and not at 1. Zeros stay zeros.

    Args:
        matrices: any number of one shape.
        n_iterations: more bring smaller singular values up.
        dtype: of the products and of the result.
    """
    a, b, c = COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices  # A gets the smaller side
    x = x.to(dtype).reshape(-1, *x.shape[-2:])
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=TINY)
    for _ in range(n_iterations):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    x = x.mT if tall else x
    return x.reshape(matrices.shape)


def update_scale(n_rows: int, n_columns: int, rule: str = "rms") -> float:
    """Return the factor between the learning rate and an orthogonal update.

    "spectral": sqrt(max(1, rows / columns)); an input of unit root mean square changes
    the output by about the rate, whatever the shape. "rms": 0.2 sqrt(max(rows,
    columns)); the entries of the update have a root mean square of 0.2 times the rate,
    as AdamW's tend to have, so that both can share a rate.

    Raises:
        ValueError: rule is neither.
    """
    if rule == "spectral":
        return math.sqrt(max(1.0, n_rows / n_columns))
    if rule == "rms":
        return ADAMW_RMS * math.sqrt(max(n_rows, n_columns))
    raise ValueError(f"rule must be spectral or rms; got {rule!r}")


@dataclass(frozen=True)
class MatrixGroup(Group):
    """Matrices that share a weight decay, and which of them are several in one.

    `rows` gives for such a name the rows of each part, in their order. Each part is
    orthogonalised by itself.
    """

    rows: dict[str, list[int]] = field(default_factory=dict)


class Muon:
    """Momentum, orthogonalised, for groups of matrices; one learning rate a step.

    Equal to `torch.optim.Muon` for matrices that are not in parts. A parameter of more
    than two axes is a stack of matrices.

    Args:
        groups: as from `muon_groups`; a plain `Group` has no matrix in parts.
        momentum: share of the running mean that is kept at a step.
        rule: see `update_scale`.
        n_iterations, dtype: see `orthogonalise`.

    Raises:
        ValueError: momentum is outside [0, 1), the rule is unknown, a parameter is not
            a matrix, or the parts of one do not add up.
    """

    def __init__(
        self,
        groups: Iterable[Group],
        *,
        momentum: float = MOMENTUM,
        rule: str = "rms",
        n_iterations: int = N_ITERATIONS,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must lie in [0, 1); got {momentum}")
        update_scale(1, 1, rule)
        self.groups = list(groups)
        self.momentum, self.rule = momentum, rule
        self.n_iterations, self.dtype = n_iterations, dtype
        self.rows: dict[str, list[int]] = {}
        self.state: dict[str, tuple[Tensor, ...]] = {}
        for group in self.groups:
            rows = getattr(group, "rows", {})
            for name, p in group.parameters.items():
                if p.dim() < 2:
                    raise ValueError(f"{name} must be a matrix; got shape {p.shape}")
                self.rows[name] = rows.get(name, [p.shape[-2]])
                if sum(self.rows[name]) != p.shape[-2]:
                    raise ValueError(
                        f"rows of {name} must add up to {p.shape[-2]}; got {rows[name]}"
                    )
                self.state[name] = (torch.zeros_like(p),)
        self.n_steps = dict.fromkeys(self.state, 0)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update every parameter that has a gradient, at learning rate lr."""
        # All parts of one shape, lying or standing, go through the iteration together.
        alike: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        moves: list[tuple[DTensor, Tensor]] = []  # of parameters cut into shards
        for group in self.groups:
            for name, p in group.parameters.items():
                if p.grad is None:
                    continue
                self.n_steps[name] += 1
                (mean,) = self.state[name]
                mean.lerp_(p.grad, 1 - self.momentum)
                ahead = p.grad.lerp(mean, self.momentum)  # Nesterov: once more
                if group.weight_decay:
                    p.mul_(1 - lr * group.weight_decay)
                whole = p
                if isinstance(p, DTensor):
                    ahead = ahead.full_tensor()  # a shard says nothing of directions
                    whole = torch.zeros_like(ahead)
                    moves.append((p, whole))
                parts = (t.split(self.rows[name], dim=-2) for t in (whole, ahead))
                for target, update in zip(*parts, strict=True):
                    short, long = sorted(update.shape[-2:])
                    alike[short, long].append((target, update))
        for (short, long), pairs in alike.items():
            lying = [u if u.shape[-1] == long else u.mT for _, u in pairs]
            stack = torch.cat([u.reshape(-1, short, long) for u in lying])
            stack = orthogonalise(stack, self.n_iterations, self.dtype)
            done = stack.split([u[..., 0, 0].numel() for u in lying])
            for (target, update), x in zip(pairs, done, strict=True):
                x = x if update.shape[-1] == long else x.mT
                scale = update_scale(*update.shape[-2:], self.rule)
                target.add_(x.reshape(target.shape), alpha=-lr * scale)
        for p, move in moves:
            mesh, cuts = p.device_mesh, p.placements
            p.add_(distribute_tensor(move, mesh, cuts, src_data_rank=None))

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for group in self.groups:
            for parameter in group.parameters.values():
                parameter.grad = None


def muon_groups(
    model: nn.Module, weight_decay: float
) -> tuple[list[MatrixGroup], list[Group]]:
    """Share a model out: hidden matrices to Muon, all else to AdamW.

    Hidden are the matrices in the blocks (their names begin with `HIDDEN`). Embedding
    and head are tables with a row for each token, and vectors have no directions to
    level: they go to AdamW, where matrices decay and the rest does not. The projection
    `qkv` of a decoder is three matrices, `gate_up` two. What requires no gradient is
    left out.

    Raises:
        ValueError: weight_decay is negative, or model has no hidden matrix.
    """
    if weight_decay < 0:
        raise ValueError(f"weight_decay must not be negative; got {weight_decay}")
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    matrices = {n: p for n, p in trained.items() if p.dim() >= 2}
    hidden = {n: p for n, p in matrices.items() if n.startswith(HIDDEN)}
    if not hidden:
        raise ValueError(f"model must have a matrix whose name begins with {HIDDEN!r}")
    tables = {n: p for n, p in matrices.items() if n not in hidden}
    vectors = {n: p for n, p in trained.items() if n not in matrices}
    return (
        [MatrixGroup(hidden, weight_decay, _fused_rows(hidden))],
        [Group(tables, weight_decay), Group(vectors, 0.0)],
    )


def _fused_rows(hidden: dict[str, nn.Parameter]) -> dict[str, list[int]]:
    """Rows of the parts of the projections that our models store as one matrix."""
    rows = {}
    for name, p in hidden.items():
        kind, (n_rows, n_columns) = name.split(".")[-2], p.shape[-2:]
        if kind == "qkv":  # as many rows of queries as columns; keys and values share
            n_shared = (n_rows - n_columns) // 2
            rows[name] = [n_columns, n_shared, n_shared]
        elif kind == "gate_up":
            rows[name] = [n_rows // 2] * 2
    return rows
