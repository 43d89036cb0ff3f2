"""The Transformer block, and a stack of them that predicts the next byte.

Here: the block (attention, then a feed-forward layer, each with its norm and its
residual), every part of which can be switched off; GPT-2's weights loaded into it;
the stack. Left out: dropout, learned positions, tied embeddings and the initialisation
of a model that is meant to be trained for long (Part 2).

Source: Vaswani et al. (2017), section 3.1, figure 1; Radford et al. (2019), section
2.3 (norms moved to the input of each sub-block, one more at the end). Page:
book/1-transformer/block.md.
Axes: `B` batch, `T` positions, `C` d_model, `V` bytes (256), `N` blocks.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from groundup.foundations.fitting import N_BYTES
from groundup.transformer.feedforward import ACTIVATIONS, EXPANSION, FeedForward
from groundup.transformer.multi_head import MultiHeadAttention
from groundup.transformer.positions import SinusoidalPositions
from groundup.transformer.residual_norm import PLACEMENTS, LayerNorm, Residual


@dataclass(frozen=True)
class BlockConfig:
    """What a block is made of; the last four fields are there to be switched off.

    Raises:
        ValueError: a size is not positive, n_heads does not divide d_model, a name is
            unknown, or dropout is outside [0, 1).
    """

    d_model: int = 64  # C, width of the residual stream
    n_heads: int = 4  # H, heads of size C / H
    d_ff: int | None = None  # F, hidden width; None: four times d_model
    activation: str = "gelu_tanh"  # a key of feedforward.ACTIVATIONS
    bias: bool = True  # in the linear maps
    dropout: float = 0.0  # share of each branch's output zeroed in training mode
    norm: str = "pre"  # one of residual_norm.PLACEMENTS
    residual: bool = True
    attention: bool = True
    feedforward: bool = True

    def __post_init__(self) -> None:
        for name in ("d_model", "n_heads", "width"):
            if getattr(self, name) < 1:
                field = "d_ff" if name == "width" else name
                raise ValueError(
                    f"{field} must be a positive integer; got {getattr(self, name)}"
                )
        if self.d_model % self.n_heads:
            raise ValueError(
                f"n_heads must divide d_model={self.d_model}; got {self.n_heads}"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must lie in [0, 1); got {self.dropout}")
        for name, allowed in (("activation", ACTIVATIONS), ("norm", PLACEMENTS)):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} must be one of {sorted(allowed)}; "
                    f"got {getattr(self, name)!r}"
                )

    @property
    def width(self) -> int:
        """F, with the default filled in."""
        return EXPANSION * self.d_model if self.d_ff is None else self.d_ff


class Block(nn.Module):
    """Attention moves information between positions, then each position thinks.

    Pre-norm: y = x + attention(norm(x)), then y + feedforward(norm(y)).

    Args:
        config: sizes, placement of the norms, and what is switched off.
    """

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()

        def wrap(sublayer: nn.Module) -> Residual:
            return Residual(
                sublayer,
                config.d_model,
                norm=config.norm,
                residual=config.residual,
                dropout=config.dropout,
            )

        self.attention = self.feedforward = nn.Identity()
        if config.attention:
            self.attention = wrap(
                MultiHeadAttention(config.d_model, config.n_heads, bias=config.bias)
            )
        if config.feedforward:
            self.feedforward = wrap(
                FeedForward(
                    config.d_model,
                    config.width,
                    activation=config.activation,
                    bias=config.bias,
                )
            )

    def forward(
        self, x: Float[Tensor, "B T C"], mask: Bool[Tensor, "..."] | None = None
    ) -> Float[Tensor, "B T C"]:
        """Return the residual stream after the block; mask as in attention's."""
        options = {} if mask is None else {"mask": mask}
        return self.feedforward(self.attention(x, **options))


def fuse(model: nn.Module, on: bool = True) -> nn.Module:
    """Let the hand-written parts of model compute with torch's kernels; return model.

    Attention, LayerNorm and the activations hold a switch `fused`. The function is the
    same up to rounding; a step of training takes about half the time.
    """
    for module in model.modules():
        if hasattr(module, "fused"):
            module.fused = on
    return model


def load_gpt2_block(block: Block, state: Mapping[str, Tensor]) -> None:
    """Copy the weights of one GPT-2 block into ours, by name and strictly.

    GPT-2 stores its linear maps as (in, out), the transpose of `nn.Linear`.

    Args:
        block: pre-norm, with bias and the same sizes.
        state: as in `GPT2Block.state_dict()` of transformers: ln_1, attn.c_attn, ...

    Raises:
        ValueError: state has other names than a GPT-2 block, or block has no place
            for them.
        RuntimeError: a tensor has another shape (raised by torch, which names it).
    """
    places = {
        "ln_1": "attention.norm",
        "attn.c_attn": "attention.sublayer.qkv",
        "attn.c_proj": "attention.sublayer.proj",
        "ln_2": "feedforward.norm",
        "mlp.c_fc": "feedforward.sublayer.up",
        "mlp.c_proj": "feedforward.sublayer.down",
    }
    expected = {f"{name}.{kind}" for name in places for kind in ("weight", "bias")}
    if set(state) != expected:
        raise ValueError(
            f"state must hold the {len(expected)} tensors of a GPT-2 block; missing "
            f"{sorted(expected - set(state))}, unknown {sorted(set(state) - expected)}"
        )
    ours = {}
    for name, tensor in state.items():
        theirs, _, kind = name.rpartition(".")
        ours[f"{places[theirs]}.{kind}"] = tensor.T if tensor.dim() == 2 else tensor
    if set(ours) != set(block.state_dict()):
        raise ValueError(
            "block must be pre-norm, with attention, feed-forward layer and bias; "
            f"it holds {sorted(block.state_dict())}"
        )
    block.load_state_dict(ours)


class MiniFormer(nn.Module):
    """A byte model: embedding, sinusoidal positions, N blocks, logits.

    Args:
        config: of every block.
        n_layers: N; 0 leaves a bigram model.
        positions: False leaves the order of the bytes out, for ablations.

    Raises:
        ValueError: n_layers is negative.
    """

    def __init__(
        self, config: BlockConfig, n_layers: int, *, positions: bool = True
    ) -> None:
        super().__init__()
        if n_layers < 0:
            raise ValueError(f"n_layers must not be negative; got {n_layers}")
        width = config.d_model
        self.embed = nn.Embedding(N_BYTES, width)
        self.positions = SinusoidalPositions(width) if positions else nn.Identity()
        self.blocks = nn.ModuleList(Block(config) for _ in range(n_layers))
        # Post-norm leaves the stream normalised; the others need it once more here.
        self.final_norm = LayerNorm(width) if config.norm == "pre" else nn.Identity()
        self.unembed = nn.Linear(width, N_BYTES)

    def forward(self, ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T V"]:
        """Return the logits of the next byte at every position."""
        return self.unembed(self.final_norm(self.stream(ids)[-1]))

    def stream(self, ids: Int[Tensor, "B T"]) -> Float[Tensor, "N1 B T C"]:
        """Return the residual stream before the first block and after each."""
        x = self.positions(self.embed(ids))
        states = [x]
        for block in self.blocks:
            x = block(x)
            states.append(x)
        return torch.stack(states)


def reach(
    model: MiniFormer, ids: Int[Tensor, "T"], position: int, byte: int
) -> Float[Tensor, "N1 T"]:
    """Measure how far the change of one byte travels, layer by layer.

    Args:
        model: any stack.
        ids: one sequence.
        position: of the byte that is replaced.
        byte: what replaces it.

    Returns:
        For the stream before the first block and after each: the norm of the change
        at every position, divided by the norm of the stream there.

    Raises:
        ValueError: position is outside the sequence, or the byte is the same.
    """
    if not 0 <= position < len(ids):
        raise ValueError(f"position must lie in 0..{len(ids) - 1}; got {position}")
    if ids[position] == byte:
        raise ValueError(f"byte must differ from ids[{position}]; both are {byte}")
    changed = ids.clone()
    changed[position] = byte
    with torch.no_grad():
        before, after = model.stream(torch.stack((ids, changed))).unbind(1)
    return (after - before).norm(dim=-1) / before.norm(dim=-1)
