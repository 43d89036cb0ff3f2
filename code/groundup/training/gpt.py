"""GPT: the stack of Part 1 with what a model needs that is trained for long.

Here: learned positions, a head tied to the embedding, dropout, GPT-2's initialisation,
torch's kernels in place of the hand-written ones, and GPT-2's weights loaded by name.
Left out: generation (`sampling`), training (`loop`), dropout of attention weights.

Source: Radford et al. (2019), section 2.3: the norms before each branch, one more at
the end, residual branches scaled by 1/sqrt(number of branches) at initialisation.
Press and Wolf (2017): the tied head. Page: book/2-training/loop.md.
Axes: `B` batch, `T` positions, `C` d_model, `V` vocabulary, `N` blocks.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from groundup.foundations.fitting import N_BYTES
from groundup.transformer.block import Block, BlockConfig, fuse, load_gpt2_block
from groundup.transformer.positions import LearnedPositions
from groundup.transformer.residual_norm import LayerNorm

INIT_STD = 0.02  # Radford et al. (2018), section 4.1, for a width of 768


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of a GPT.

    Raises:
        ValueError: a size or init_std is not positive, n_heads does not divide d_model,
            or dropout is outside [0, 1).
    """

    n_vocab: int = N_BYTES  # V, tokens
    context: int = 128  # longest sequence, in tokens
    d_model: int = 128  # C
    n_layers: int = 4  # N
    n_heads: int = 4  # H, heads of size C / H
    dropout: float = 0.0  # of the embedding and of each branch, in training mode
    bias: bool = True  # in the linear maps
    init_std: float = INIT_STD  # spread of the first weights, see `initialise`

    def __post_init__(self) -> None:
        for name in ("n_vocab", "context", "n_layers"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be a positive integer; got {getattr(self, name)}"
                )
        if not self.init_std > 0:
            raise ValueError(f"init_std must be positive; got {self.init_std}")
        self.block  # its own checks  # noqa: B018

    @property
    def block(self) -> BlockConfig:
        """What each block is made of."""
        return BlockConfig(
            d_model=self.d_model,
            n_heads=self.n_heads,
            bias=self.bias,
            dropout=self.dropout,
        )


# The GPT that Part 2 trains, in about a quarter of a minute with `loop.TINY_RUN`. At
# width 64 the weights must start larger than at 768 to be heard.
TINY = GPTConfig(context=64, d_model=64, n_layers=2, n_heads=4, init_std=0.04)


class GPT(nn.Module):
    """Token and position, N blocks, a norm, and logits by the embedding itself.

    Computes with torch's kernels; `fuse(model, False)` brings back the hand-written
    ones, which give the same numbers up to rounding.

    Args:
        config: sizes.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.n_vocab, config.d_model)
        self.positions = LearnedPositions(config.context, config.d_model)
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.blocks = nn.ModuleList(Block(config.block) for _ in range(config.n_layers))
        self.final_norm = LayerNorm(config.d_model)
        initialise(self, config.n_layers, config.init_std)
        fuse(self)

    def forward(
        self, ids: Int[Tensor, "B T"], mask: Bool[Tensor, "..."] | None = None
    ) -> Float[Tensor, "B T V"]:
        """Return the logits of the next token at every position.

        Args:
            ids: tokens, at most `context` of them.
            mask: (T, T) or (B, T, T), True = may attend, in place of the causal one.

        Raises:
            ValueError: the sequence is longer than the context.
        """
        return F.linear(self.hidden(ids, mask), self.embed.weight)

    def hidden(
        self, ids: Int[Tensor, "B T"], mask: Bool[Tensor, "..."] | None = None
    ) -> Float[Tensor, "B T C"]:
        """Return the residual stream after the final norm."""
        x = self.dropout(self.positions(self.embed(ids)))
        for block in self.blocks:
            x = block(x, mask)
        return self.final_norm(x)


@torch.no_grad()
def initialise(model: nn.Module, n_layers: int, std: float = INIT_STD) -> None:
    """Draw the weights of model anew as GPT-2 does.

    Matrices and embeddings from N(0, std²), biases 0; what a branch writes to the
    residual stream (`proj`, `down`) is divided by sqrt(2 N) for N = n_layers blocks, so
    that the sum of all 2 N branches has the size of one. Scales of norms are left at 1.
    """
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            writes = name.endswith(("proj.weight", "down.weight"))
            parameter.normal_(0.0, std / (2 * n_layers) ** 0.5 if writes else std)
        elif name.endswith("bias"):
            parameter.zero_()


def load_gpt2(model: GPT, state: Mapping[str, Tensor]) -> None:
    """Copy the weights of a GPT-2 into ours, by name and strictly.

    Args:
        model: with bias and the same sizes.
        state: as in `GPT2LMHeadModel.state_dict()` of transformers; its `lm_head` is
            the embedding and must be equal to it.

    Raises:
        ValueError: state lacks a tensor, or has one that GPT-2 does not have, or its
            head is not tied.
        RuntimeError: a tensor has another shape (raised by torch, which names it).
    """
    rest = {name.removeprefix("transformer."): t for name, t in state.items()}
    embedding = rest.get("wte.weight")
    head = rest.pop("lm_head.weight", embedding)
    if embedding is not None and not torch.equal(head, embedding):
        raise ValueError(
            "state holds a head of its own; GPT's is tied to the embedding"
        )
    for i, block in enumerate(model.blocks):
        prefix = f"h.{i}."
        names = [name for name in rest if name.startswith(prefix)]
        load_gpt2_block(block, {n.removeprefix(prefix): rest.pop(n) for n in names})
    places = {
        "wte.weight": "embed.weight",
        "wpe.weight": "positions.table",
        "ln_f.weight": "final_norm.weight",
        "ln_f.bias": "final_norm.bias",
    }
    if rest.keys() != places.keys():
        raise ValueError(
            f"state must hold a GPT-2 of {len(model.blocks)} blocks; unknown "
            f"{sorted(rest.keys() - places.keys())}, missing "
            f"{sorted(places.keys() - rest.keys())}"
        )
    ours = {places[name]: tensor for name, tensor in rest.items()}
    model.load_state_dict(ours, strict=False)  # the blocks have theirs already
