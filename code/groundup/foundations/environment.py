"""What a machine gives: a device, repeatable numbers, a rate, a number of bytes.

Here: the choice of a device, seeds, a stopwatch, the work and the bytes of a
Transformer block, predicted and counted, a profile as a short table. `PlainBlock`
is a stand-in that lets each operation be timed; Part 1 builds the block. Left out:
several devices, and the peak of an allocator. A toolbox, hence its many names.

Sources: Williams et al. (2009) for the roofline; Korthikanti et al. (2023), eq. 2,
without dropout, for the activations; Micikevicius et al. (2018), section 3.1, for
updates that round away. Page: book/0-foundations/environment.md.
Axes: `B` batch, `T` tokens, `C` model width.
"""

import math
import os
import random
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from platform import machine, processor

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

FLOAT32 = 4  # bytes
# FLOPs an element, by our count: exp and erf are one FLOP each.
NORM, MASK, SOFTMAX, GELU, ADD = 7, 1, 5, 5, 1


def pick_device(name: str = "auto") -> torch.device:
    """Return the device called name; "auto" prefers CUDA, then MPS, then the CPU.

    Raises:
        ValueError: torch sees no such device here. There is no silent fallback.
    """
    n_cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    present = ["cuda", *(f"cuda:{i}" for i in range(n_cuda))] if n_cuda else []
    present += ["mps", "cpu"] if torch.backends.mps.is_available() else ["cpu"]
    if name not in ["auto", *present]:
        raise ValueError(
            f"name must be 'auto' or a device that torch {torch.__version__} sees here"
            f" ({', '.join(present)}); got {name!r}: check the driver and this torch"
        )
    return torch.device(present[0] if name == "auto" else name)


def describe_machine() -> dict[str, str]:
    """Return what decides speed here: processor, cores, threads, memory, torch."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1] for line in lines if line.startswith("model name")]
    affinity = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    n_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "processor": (names[0] if names else processor() or machine()).strip(),
        "vector instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": str(len(affinity(0))),
        "threads in use": str(torch.get_num_threads()),
        "memory": f"{n_bytes / 2**30:.0f} GiB",
        "device": str(pick_device()),
        "torch": torch.__version__,
    }


def seed_everything(seed: int) -> None:
    """Restart the global generators of random, NumPy and torch (all its devices).

    Generators made by hand, such as `numpy.random.default_rng()`, are not global.

    Raises:
        ValueError: seed is not in [0, 2^32), the range that all three accept.
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be an integer in [0, 2**32); got {seed}")
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (the global stream is the one to restart)
    torch.manual_seed(seed)


def median_seconds(
    call: Callable[[], object],
    *,
    repeats: int = 5,
    budget: float = 0.5,
    device: torch.device | str = "cpu",
    timer: Callable[[], float] = time.perf_counter,
) -> float:
    """Return the median time of call in seconds, after one call that is not counted.

    Args:
        call: what to time.
        repeats: timed calls, at least 1.
        budget: seconds after which no further timed call starts.
        device: where call works. A GPU answers before its work is done, so the
            clock is read only after the device has finished.
        timer: the clock, in seconds.
    """
    kind = torch.device(device).type
    seconds: list[float] = []  # the first is the warm-up
    while len(seconds) < 2 or (len(seconds) <= repeats and sum(seconds[1:]) < budget):
        start = timer()
        call()
        if kind != "cpu":
            getattr(torch, kind).synchronize()
        seconds.append(timer() - start)
    return statistics.median(seconds[1:])


def matmul_rates(
    dtype: torch.dtype,
    sizes: Iterable[int],
    *,
    budget: float = 1.0,
    device: torch.device | str = "cpu",
    timer: Callable[[], float] = time.perf_counter,
) -> dict[int, float]:
    """Return FLOP/s of the product of two n by n matrices, for each n of sizes.

    Stops before a size whose warm-up and one timed call would take more than budget
    seconds, by n^3 from the size before.
    """
    rates: dict[int, float] = {}
    seconds, last = 0.0, 1
    for n in sizes:
        if 2 * seconds * (n / last) ** 3 > budget:
            break
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        seconds = median_seconds(
            lambda a=a, b=b: a @ b, budget=budget / 4, device=device, timer=timer
        )
        rates[n], last = 2 * n**3 / seconds, n
    return rates


@dataclass(frozen=True)
class Work:
    """What an operation does at least: flops FLOPs, and bytes moved to and fro."""

    flops: int
    bytes: int

    @property
    def intensity(self) -> float:
        """FLOP/byte."""
        return self.flops / self.bytes


def matmul_work(m: int, k: int, n: int, *, batch: int = 1, itemsize: int = 4) -> Work:
    """Return the work of batch products (m, k) times (k, n).

    2mkn FLOPs; each matrix moves once. Example: m = k = n = 2: 16 FLOPs, 48 bytes.
    """
    return Work(2 * batch * m * k * n, batch * itemsize * (m * k + k * n + m * n))


def roofline(intensity: float, *, peak: float, bandwidth: float) -> float:
    """Return the bound in FLOP/s at FLOP/byte, from FLOP/s and bytes/s (eq. 1)."""
    return min(peak, bandwidth * intensity)


@dataclass(frozen=True)
class BlockShape:
    """Sizes of a pre-norm Transformer block and of its input (B, T, C)."""

    batch: int  # sequences
    context: int  # tokens a sequence
    d_model: int
    n_heads: int
    d_ff: int

    def __post_init__(self) -> None:
        """Refuse sizes that no block can have."""
        for field in fields(self):
            if (value := getattr(self, field.name)) < 1:
                raise ValueError(f"{field.name} must be at least 1; got {value}")
        if self.d_model % self.n_heads:
            raise ValueError(
                f"n_heads must divide d_model={self.d_model}; got {self.n_heads}"
            )

    def work(self, itemsize: int = FLOAT32) -> dict[str, Work]:
        """Return the work of each operation of a forward pass.

        Biases, norm parameters and the mask itself are left out; "norm" and "add"
        happen twice and stand here once.
        """
        rows, c, t = self.batch * self.context, self.d_model, self.context
        heads, d = self.batch * self.n_heads, self.d_model // self.n_heads
        matmul = partial(matmul_work, itemsize=itemsize)

        def each(flops: int, elements: int, moves: int) -> Work:
            return Work(flops * elements, itemsize * moves * elements)

        return {
            "norm": each(NORM, rows * c, 2),
            "qkv": matmul(rows, c, 3 * c),
            "scores": matmul(t, d, t, batch=heads),
            "mask": each(MASK, heads * t * t, 2),
            "softmax": each(SOFTMAX, heads * t * t, 2),
            "mix": matmul(t, t, d, batch=heads),
            "project": matmul(rows, c, c),
            "up": matmul(rows, c, self.d_ff),
            "GELU": each(GELU, rows * self.d_ff, 2),
            "down": matmul(rows, self.d_ff, c),
            "add": each(ADD, rows * c, 3),
        }

    def memory(self, *, fused: bool = False) -> dict[str, int]:
        """Return the bytes of a float32 training step with Adam (eq. 3 of the page).

        Activations are what the forward pass keeps for the backward pass; fused
        attention keeps one number a query instead of its row of weights. Exact
        where batch, context and n_heads are at least 2: torch then copies q, k, v.
        """
        rows, c, t = self.batch * self.context, self.d_model, self.context
        parameters = 4 * c * c + 2 * c * self.d_ff + 9 * c + self.d_ff
        queries, mask = self.n_heads * rows, t * t  # the mask is boolean: bytes
        attention = FLOAT32 * queries if fused else FLOAT32 * queries * t + mask
        kept = 8 * rows * c + 2 * rows * self.d_ff + 4 * rows  # last: two norms
        return {
            "parameters": FLOAT32 * parameters,
            "gradients": FLOAT32 * parameters,
            "optimizer": FLOAT32 * (2 * parameters + 12),  # 12 tensors count steps
            "activations": FLOAT32 * kept + attention,
        }


class PlainBlock(nn.Module):
    """A causal pre-norm block, equal to torch's `TransformerEncoderLayer`.

    shape.context is the longest input; fused uses torch's one-call attention.
    """

    def __init__(self, shape: BlockShape, *, fused: bool = False) -> None:
        super().__init__()
        c, t = shape.d_model, shape.context
        self.n_heads, self.fused = shape.n_heads, fused
        self.norm1, self.norm2 = nn.LayerNorm(c), nn.LayerNorm(c)
        self.qkv, self.project = nn.Linear(c, 3 * c), nn.Linear(c, c)
        self.up, self.down = nn.Linear(c, shape.d_ff), nn.Linear(shape.d_ff, c)
        may_attend = torch.ones(t, t, dtype=torch.bool).tril()
        self.register_buffer("may_attend", may_attend, persistent=False)

    def forward(
        self,
        x: Float[Tensor, "B T C"],
        run: Callable[[str, Callable], Tensor] = lambda name, call: call(),
    ) -> Float[Tensor, "B T C"]:
        """Return x after attention and the feed-forward layer.

        run gets the name (as in `BlockShape.work`) and the call of each operation in
        turn and returns its result: a place for a stopwatch.
        """
        h = run("norm", lambda: self.norm1(x))
        qkv = run("qkv", lambda: self.qkv(h)).unflatten(-1, (3, self.n_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()  # each (B, H, T, D)
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            scores = run("scores", lambda: q @ k.mT)
            hidden = ~self.may_attend[: x.shape[1], : x.shape[1]]
            scale = q.shape[-1] ** -0.5
            s = run("mask", lambda: (scores * scale).masked_fill(hidden, -torch.inf))
            weights = run("softmax", lambda: s.softmax(-1))
            mixed = run("mix", lambda: weights @ v)
        merged = mixed.transpose(1, 2).flatten(2)  # (B, T, C)
        change = run("project", lambda: self.project(merged))
        y = run("add", lambda: x + change)
        h2 = run("norm", lambda: self.norm2(y))
        wide = run("up", lambda: self.up(h2))
        bent = run("GELU", lambda: F.gelu(wide))
        change2 = run("down", lambda: self.down(bent))
        return run("add", lambda: y + change2)


def saved_bytes(call: Callable[[], Tensor], parameters: Iterable[Tensor] = ()) -> int:
    """Return the bytes that autograd keeps for the backward pass of call's result.

    A storage counts once, however many views of it are kept; parameters do not.
    """
    known = {p.untyped_storage().data_ptr() for p in parameters}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _result = call()  # held until the sum, so that no address is used twice
    return sum(kept.values())


def step_memory(
    model: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer
) -> dict[str, int]:
    """Do a training step on the sum of the outputs; count as `BlockShape.memory`."""
    parameters = list(model.parameters())
    activations = saved_bytes(lambda: model(x), parameters)
    optimizer.zero_grad()
    model(x).sum().backward()
    optimizer.step()
    state = [v for s in optimizer.state.values() for v in s.values()]
    return {
        "parameters": sum(p.nbytes for p in parameters),
        "gradients": sum(p.grad.nbytes for p in parameters if p.grad is not None),
        "optimizer": sum(v.nbytes for v in state if isinstance(v, Tensor)),
        "activations": activations,
    }


def profile_table(events: Iterable, *, top: int = 6) -> list[tuple]:
    """Return the operations that took most time, then a row for all the others.

    events are the `key_averages()` of a torch profiler, made `with_flops`. A row is
    (name, calls, CPU milliseconds, share of the total, FLOPs); its time leaves out
    what it calls, so that the shares sum to one.
    """
    ranked = sorted(events, key=lambda e: e.self_cpu_time_total, reverse=True)
    total = sum(e.self_cpu_time_total for e in ranked) or 1
    groups = [(e.key.removeprefix("aten::"), [e]) for e in ranked[:top]]
    groups += [("others", ranked[top:])] if ranked[top:] else []
    rows = []
    for name, group in groups:
        us = sum(e.self_cpu_time_total for e in group)
        calls, flops = sum(e.count for e in group), sum(e.flops or 0 for e in group)
        rows.append((name, calls, us / 1000, us / total, flops))
    return rows


def stuck_at(update: float, dtype: torch.dtype) -> float:
    """Return the power of two that a running sum of update cannot pass (eq. 4).

    From 2^e to 2^(e+1) the numbers of a dtype lie eps 2^e apart; at 2^e what is at
    most half of that is rounded away. Example: 256 for 1 in bfloat16.

    Raises:
        ValueError: update is not positive.
    """
    if not update > 0:
        raise ValueError(f"update must be positive; got {update}")
    fraction, exponent = math.frexp(2 * update / torch.finfo(dtype).eps)
    return math.ldexp(1.0, exponent - (fraction == 0.5))
