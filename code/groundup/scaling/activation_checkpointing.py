"""Activation checkpointing: forget what the forward pass made, and make it again.

Here: a call whose backward pass repeats its forward pass, with the same random numbers
and the same autocast, and a decoder whose blocks do so. Left out: the choice of which
blocks (all of them), keeping the activations elsewhere.

Source: Chen et al. (2016), section 4. Page: book/4-scaling/mixed_precision.md.
Axes: `B` batch, `T` context, `C` model width.
"""

from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn


class _Recompute(torch.autograd.Function):
    """call(x), whose backward pass calls again; parameters are what it reads."""

    @staticmethod
    def forward(ctx, call, x, *parameters):
        device = x.device.type
        ctx.call, ctx.random = call, torch.get_rng_state()
        ctx.autocast = {
            "device_type": device,
            "dtype": torch.get_autocast_dtype(device),
            "enabled": torch.is_autocast_enabled(device),
        }
        ctx.save_for_backward(x, *parameters)
        # A Function runs without autograd, where some kernels differ in the last bit:
        # so with it, but every tensor that it would keep is dropped at once.
        drop = torch.autograd.graph.saved_tensors_hooks(lambda _: None, lambda _: None)
        with torch.enable_grad(), torch.autocast(**ctx.autocast), drop:
            return call(x.detach().requires_grad_()).detach()

    @staticmethod
    def backward(ctx, grad):
        x, *parameters = ctx.saved_tensors
        x = x.detach().requires_grad_()
        with (
            torch.random.fork_rng(devices=[]),
            torch.enable_grad(),
            torch.autocast(**ctx.autocast),
        ):
            torch.set_rng_state(ctx.random)
            y = ctx.call(x)
        grads = torch.autograd.grad(y, (x, *parameters), grad, allow_unused=True)
        return None, *grads


def recompute(
    call: Callable[[Tensor], Tensor],
    x: Float[Tensor, "*shape"],
    parameters: Iterable[Tensor],
) -> Float[Tensor, "..."]:
    """Return call(x), keeping of it only x; its backward pass calls again.

    The second call sees the same random numbers of torch's global generator of the CPU
    and the same autocast, so that the gradients are the same bit for bit.

    Args:
        call: what to compute. Must do the same each time.
        x: what it is given; gets a gradient, as far as it requires one.
        parameters: whatever else that call reads and that needs a gradient; any such
            tensor that is missing here gets none.
    """
    return _Recompute.apply(call, x, *parameters)


class Recomputed:
    """Mixed into the class of a block: in training it keeps its input only."""

    def forward(
        self, x: Float[Tensor, "B T C"], *args: object, **kwargs: object
    ) -> Float[Tensor, "B T C"]:
        """Return what the block returns."""
        if not torch.is_grad_enabled():  # nothing to forget
            return super().forward(x, *args, **kwargs)
        plain = super().forward
        parameters = [p for p in self.parameters() if p.requires_grad]
        return recompute(lambda x: plain(x, *args, **kwargs), x, parameters)


def checkpoint_blocks(model: nn.Module) -> nn.Module:
    """Let every block of model.blocks keep its input only; return model, changed.

    The names of the parameters stay, and so do all gradients, bit for bit. Do this
    before wrapping for several processes.

    Raises:
        ValueError: model has no blocks, or this was done before.
    """
    blocks = getattr(model, "blocks", ())
    if not len(blocks):
        raise ValueError(
            f"model must have `blocks`; a {type(model).__name__} has no such"
        )
    for block in blocks:
        kind = type(block)
        if issubclass(kind, Recomputed):
            raise ValueError("model keeps the inputs of its blocks only already")
        # A class of its own, not a wrapper: names in the state and copies stay right.
        block.__class__ = type(f"Recomputed{kind.__name__}", (Recomputed, kind), {})
    return model
