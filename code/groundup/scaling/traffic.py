"""What processes send each other: collectives counted, and their bytes.

Here: a context that notes every collective call of this process, and how many bytes a
ring sends for one. Left out: how long they take, and what a network does with them.

Source: Patarasuk and Yuan (2009), section 3, for the ring. Page:
book/4-scaling/distributed.md.
"""

from collections import Counter

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# What torch calls them, and what we do.
KINDS = {
    "allreduce_": "all-reduce",
    "_allgather_base_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "broadcast_": "broadcast",
}


class Traffic(TorchDispatchMode):
    """Count the collectives of this process while the block runs.

    `calls` holds how many there were of each kind, `payload` the bytes of their whole
    tensors: what is reduced or broadcast, and what an all-gather returns. Collectives
    that are not in `KINDS` are counted under torch's name for them.

    Example: `with Traffic() as traffic: loss.backward()`, then
    `traffic.calls["all-reduce"]`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.payload: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Note the call if it is a collective, and let it pass."""
        if function.namespace == "c10d":
            name = function.overloadpacket.__name__
            kind = KINDS.get(name, name)
            tensors = [a for a in tree_leaves(args) if isinstance(a, Tensor)]
            sizes = [t.numel() * t.element_size() for t in tensors]
            self.calls[kind] += 1
            # Of a gather or a scatter, the whole tensor is the largest argument.
            self.payload[kind] += max(sizes, default=0)
        return function(*args, **(kwargs or {}))


def ring_bytes(kind: str, payload: float | int, size: int) -> float:
    """Return the bytes that each of `size` processes in a ring sends for a collective.

    An all-gather hands the own part, payload / size, to the neighbour and then passes
    on what arrives, size - 1 times in all. A reduce-scatter is the same with sums. An
    all-reduce is the one after the other.

    Args:
        kind: all-gather, reduce-scatter or all-reduce.
        payload: bytes of the whole tensor.
        size: processes.

    Raises:
        ValueError: kind is another one, or size is not positive.

    Example: an all-reduce of 100 bytes by 4 processes: each sends 150.
    """
    times = {"all-gather": 1, "reduce-scatter": 1, "all-reduce": 2}
    if kind not in times:
        raise ValueError(f"kind must be one of {', '.join(times)}; got {kind!r}")
    if size < 1:
        raise ValueError(f"size must be at least 1; got {size}")
    return times[kind] * (size - 1) / size * payload
