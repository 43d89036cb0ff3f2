"""Many processes, one model: who reads which rows, and who holds which parameters.

Here: the process group that torchrun's environment describes, the rows of a batch that
a process takes, a model whose copies are kept equal (DDP) or whose parameters are cut
into shards (FSDP2), sums and norms over all processes, and the way from shards to whole
tensors and back. Left out: tensor, pipeline and expert parallelism (`parallel_cost`
says what they would take), checkpoints (`sharded_checkpoint`).

Sources: Li et al. (2020) for DDP; Rajbhandari et al. (2020) for the shards. Page:
book/4-scaling/distributed.md.
"""

import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from groundup.training import adamw

WAYS = ("none", "ddp", "fsdp")
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # set by torchrun
LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"


@dataclass(frozen=True)
class World:
    """Which process this is, and of how many.

    Raises:
        ValueError: rank is not in 0..size - 1.
    """

    rank: int = 0
    size: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank must lie in 0..size={self.size}; got {self.rank}")

    @property
    def first(self) -> bool:
        """Whether this is the process that prints and writes for all."""
        return self.rank == 0


def current_world() -> World:
    """Read the world from torchrun's environment; without it, a single process.

    Raises:
        ValueError: some of torchrun's variables are set and others are missing.
    """
    missing = [name for name in VARIABLES if name not in os.environ]
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        return World()
    if missing:
        raise ValueError(
            f"the environment must hold {', '.join(VARIABLES)} or neither RANK nor "
            f"WORLD_SIZE; missing: {', '.join(missing)} (start with torchrun)"
        )
    return World(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))


@contextmanager
def process_group(device: str = "cpu") -> Iterator[World]:
    """Join the other processes, and leave them again whatever happens.

    A single process without torchrun joins nobody. Inside another `process_group`
    nothing is done.

    Args:
        device: "cpu" talks through gloo, "cuda" through NCCL, each process on the GPU
            of its local rank. It is where the tensors are that will be sent.

    Raises:
        ValueError: device is neither, or the environment is incomplete.
    """
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda; got {device!r}")
    world = current_world()
    if dist.is_initialized() or "RANK" not in os.environ:
        yield world
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    elif os.environ["MASTER_ADDR"] in ("localhost", "127.0.0.1"):
        # gloo looks for the address of the machine's own name, which may not exist.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK)
    dist.init_process_group("gloo" if device == "cpu" else "nccl")
    try:
        yield world
    finally:
        dist.destroy_process_group()


def rows(batch: int, world: World) -> slice:
    """Return which rows of a batch a process takes: equally many for all.

    Raises:
        ValueError: the rows do not divide among the processes.

    Example: of 8 rows, rank 1 of 2 takes rows 4 to 7.
    """
    if batch < 1 or batch % world.size:
        raise ValueError(
            f"batch must be a positive multiple of the {world.size} processes; "
            f"got {batch}"
        )
    share = batch // world.size
    return slice(world.rank * share, (world.rank + 1) * share)


def wrap(model: nn.Module, how: str) -> nn.Module:
    """Prepare a model for training by all processes; call what is returned.

    All begin with the parameters of rank 0. The backward pass leaves in `.grad` the
    *mean* over the processes of their gradients. So that it is the gradient of the mean
    over all counted targets, each process divides its summed loss by (targets of all
    processes) / size.

    Args:
        model: the parameters of a module `model.blocks`, where there is one, are
            gathered block by block.
        how: "none" leaves the model as it is; "ddp" keeps a copy in each process and
            sums their gradients; "fsdp" cuts each parameter along its rows, in place,
            and puts it together when it is needed. Its parameters are then DTensors, of
            which each process holds a part. A tied matrix is cut once.

    Returns:
        model itself, or for "ddp" a module around it that shares its parameters.

    Raises:
        ValueError: how is unknown, or asks for a process group and there is none.
    """
    if how not in WAYS:
        raise ValueError(f"how must be one of {', '.join(WAYS)}; got {how!r}")
    if how == "none":
        return model
    if not dist.is_initialized():
        raise ValueError(
            f"how={how!r} needs a process group: start with torchrun, inside "
            "process_group()"
        )
    if how == "ddp":
        return DistributedDataParallel(model)
    device = next(model.parameters()).device.type
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for tensor in (*model.parameters(), *model.buffers()):
        dist.broadcast(tensor.detach(), src=0)  # FSDP2 takes what each process has
    for block in getattr(model, "blocks", ()):
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def quiet(model: nn.Module) -> Callable[[], AbstractContextManager[None]]:
    """Return a context in which a wrapped model adds up gradients and sends none.

    For every micro-batch but the last. Under FSDP each process keeps the gradient of
    the whole model meanwhile: fewer messages, more memory.
    """
    if isinstance(model, DistributedDataParallel):
        return model.no_sync
    if not isinstance(model, FSDPModule):
        return nullcontext

    @contextmanager
    def without_sending() -> Iterator[None]:
        model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)

    return without_sending


def total(value: float) -> float:
    """Return the sum of value over all processes, to each of them."""
    if not dist.is_initialized():
        return value
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    tensor = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    return tensor.item()


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], most: float) -> float:
    """Clip by the norm of the whole gradient, wherever its parts are.

    `training.adamw.clip_gradients` would read the norm of this process's shards, and
    each process would scale its shards by a factor of its own.

    Args:
        parameters: plain, the same in all processes, or shards.
        most: largest norm that is let through.

    Returns:
        The norm before clipping, the same in all processes.

    Raises:
        ValueError: most is not positive, or a gradient is cut in a way that `wrap`
            does not cut.
    """
    parameters = list(parameters)
    grads = [p.grad for p in parameters if p.grad is not None]
    shards = [g for g in grads if isinstance(g, DTensor)]
    if not shards:
        return adamw.clip_gradients(parameters, most)
    if not most > 0:
        raise ValueError(f"most must be positive; got {most}")
    if any(not isinstance(p, Shard) for g in shards for p in g.placements):
        raise ValueError(f"gradients must be cut by wrap; got {shards[0].placements}")
    parts = [g.to_local() for g in shards]
    plain = [g for g in grads if not isinstance(g, DTensor)]
    squares = total(sum(part.norm().item() ** 2 for part in parts))
    norm = math.hypot(math.sqrt(squares), *(g.norm().item() for g in plain))
    if norm > most:
        for part in (*parts, *plain):
            part.mul_(most / norm)
    return norm


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor with all of its shards; a plain tensor as it is.

    All processes must call it, in the same order.
    """
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def put_whole(target: Tensor, source: Tensor) -> None:
    """Copy a whole tensor into target, of which this process may hold a shard only.

    Raises:
        ValueError: the shapes differ.
    """
    if target.shape != source.shape:
        raise ValueError(
            f"source must have shape {tuple(target.shape)}; got {tuple(source.shape)}"
        )
    if isinstance(target, DTensor):
        mesh, cuts = target.device_mesh, target.placements
        source = distribute_tensor(source, mesh, cuts, src_data_rank=None)
    target.copy_(source)


def load_whole(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a state dict of whole tensors into a model that may be cut into shards.

    Raises:
        ValueError: a name is missing or unknown, or a shape differs; then nothing is
            changed.
    """
    own = model.state_dict()
    if own.keys() != state.keys():
        name = min(own.keys() ^ state.keys())
        where = "is missing" if name in own else "is unknown"
        raise ValueError(f"state must be that of this model; {name} {where}")
    for name, target in own.items():
        if target.shape != state[name].shape:
            raise ValueError(
                f"state[{name!r}] must have shape {tuple(target.shape)}; "
                f"got {tuple(state[name].shape)}"
            )
    for name, target in own.items():
        put_whole(target, state[name])
