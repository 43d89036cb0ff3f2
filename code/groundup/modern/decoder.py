"""The modern decoder: the one model of Parts 3 to 9.

Here: RMSNorm before each branch, rotary positions, grouped queries, SwiGLU, an optional
window with sinks, and a cache of any kind. Left out: loading published weights
(`weights`), generation (`kv_cache`).

Source: Touvron et al. (2023), section 2.2 (Llama); Yang et al. (2024), section 2.2
(Qwen2: biases of queries, keys and values). Page: book/3-modern/decoder.md.
Axes: `B` batch, `T` queries, `S` keys, `H` query heads, `G` key/value heads, `D` head
size, `C` d_model, `F` d_ff, `V` vocabulary, `N` blocks.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from groundup.foundations.fitting import N_BYTES
from groundup.modern.gqa import grouped_attention
from groundup.modern.kv_cache import Cache
from groundup.modern.rmsnorm import EPS, RMSNorm
from groundup.modern.rope import THETA, rope_tables, rotate
from groundup.modern.sliding_window import window_mask
from groundup.modern.swiglu import SwiGLU, gated_width
from groundup.transformer.block import fuse
from groundup.transformer.multi_head import merge_heads

HEAD_STD = 0.02
Rotation = tuple[Tensor, Tensor]  # cosine and sine, (B, 1, T, D / 2)


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and switches of a decoder.

    Raises:
        ValueError: a size is not positive, heads do not divide, the head size is odd,
            or the window has no place for what it must hold.
    """

    n_vocab: int = N_BYTES  # V, tokens
    d_model: int = 128  # C
    n_layers: int = 4  # N
    n_heads: int = 4  # H, query heads of size C / H
    n_kv_heads: int | None = None  # G; None: H
    d_ff: int | None = None  # F; None: swiglu.gated_width(C)
    rope_theta: float = THETA
    norm_eps: float = EPS
    qkv_bias: bool = False  # Qwen2: True
    tied: bool = True  # the head is the embedding
    window: int | None = None  # keys in reach, the query's own included; None: all
    n_sinks: int = 0  # first tokens that stay in reach

    def __post_init__(self) -> None:
        sizes = ("n_vocab", "d_model", "n_layers", "n_heads", "kv_heads", "width")
        for name in sizes:
            if getattr(self, name) < 1:
                field = {"kv_heads": "n_kv_heads", "width": "d_ff"}.get(name, name)
                raise ValueError(
                    f"{field} must be a positive integer; got {getattr(self, name)}"
                )
        if self.d_model % (2 * self.n_heads):
            raise ValueError(
                f"n_heads must divide d_model={self.d_model} into heads of even size; "
                f"got {self.n_heads}"
            )
        if self.n_heads % self.kv_heads:
            raise ValueError(
                f"n_kv_heads must divide n_heads={self.n_heads}; got {self.n_kv_heads}"
            )
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be at least 1; got {self.window}")
        if self.n_sinks < 0 or (self.n_sinks and self.window is None):
            raise ValueError(
                f"n_sinks must not be negative, and needs a window; got "
                f"n_sinks={self.n_sinks}, window={self.window}"
            )

    @property
    def kv_heads(self) -> int:
        """G, with the default filled in."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def d_head(self) -> int:
        """D."""
        return self.d_model // self.n_heads

    @property
    def width(self) -> int:
        """F, with the default filled in."""
        return gated_width(self.d_model) if self.d_ff is None else self.d_ff


class Attention(nn.Module):
    """Grouped queries with rotated queries and keys.

    The rows of `qkv.weight` are all query heads, then key heads, then value heads.

    Args:
        config: sizes.
        layer: which entry of a cache is this layer's.
    """

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.n_heads, self.n_groups = config.n_heads, config.kv_heads
        self.layer = layer
        rows = (self.n_heads + 2 * self.n_groups) * config.d_head
        self.qkv = nn.Linear(config.d_model, rows, bias=config.qkv_bias)
        self.proj = nn.Linear(config.d_model, config.d_model, bias=False)

    def project(
        self, x: Float[Tensor, "B T C"], rotation: Rotation
    ) -> tuple[
        Float[Tensor, "B H T D"], Float[Tensor, "B G T D"], Float[Tensor, "..."]
    ]:
        """Return rotated queries, rotated keys, and values."""
        n_rotated = self.n_heads + self.n_groups
        heads = self.qkv(x).unflatten(-1, (n_rotated + self.n_groups, -1))
        heads = heads.transpose(1, 2)  # B T heads D -> B heads T D
        to_rotate, v = heads.split((n_rotated, self.n_groups), dim=1)
        q, k = rotate(to_rotate, *rotation).split((self.n_heads, self.n_groups), dim=1)
        return q, k, v

    def forward(
        self,
        x: Float[Tensor, "B T C"],
        rotation: Rotation,
        mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "B T C"]:
        """Attend; without a mask every query sees the keys up to its own."""
        q, k, v = self.project(x, rotation)
        if cache is not None:
            k, v = cache.put(self.layer, k, v)
        return self.proj(merge_heads(self.attend(q, k, v, mask)))

    def attend(
        self,
        q: Float[Tensor, "B H T D"],
        k: Float[Tensor, "B G S D"],
        v: Float[Tensor, "B G S D"],
        mask: Tensor | None,
    ) -> Float[Tensor, "B H T D"]:
        """Mix the values; a variant may do it in another way here."""
        return grouped_attention(q, k, v, mask, causal=mask is None and q.shape[2] > 1)


class DecoderBlock(nn.Module):
    """x + attention(norm(x)), then x + feedforward(norm(x))."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = Attention(config, layer)
        self.feedforward_norm = RMSNorm(config.d_model, config.norm_eps)
        self.feedforward = SwiGLU(config.d_model, config.width)

    def forward(
        self,
        x: Float[Tensor, "B T C"],
        rotation: Rotation,
        mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "B T C"]:
        """Return the residual stream after the block."""
        x = x + self.attention(self.attention_norm(x), rotation, mask, cache)
        return x + self.feedforward(self.feedforward_norm(x))


class Decoder(nn.Module):
    """Embedding, N blocks, a norm, and logits.

    Computes with torch's kernels; `fuse(model, False)` brings back the hand-written
    ones.

    Args:
        config: sizes and switches.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.n_vocab, config.d_model)
        self.blocks = nn.ModuleList(
            DecoderBlock(config, i) for i in range(config.n_layers)
        )
        self.final_norm = RMSNorm(config.d_model, config.norm_eps)
        self.head = nn.Linear(config.d_model, config.n_vocab, bias=False)
        if config.tied:
            self.head.weight = self.embed.weight
        self.initialise()
        fuse(self)

    @torch.no_grad()
    def initialise(self) -> None:
        """Draw the weights anew, for any width.

        Matrices keep the size of what they read: N(0, 1 / inputs). What a branch writes
        to the residual stream (`proj`, `down`) is divided by sqrt(2 N), so that all 2 N
        branches together write as much as one. The head is small, so that the loss
        starts at ln V.
        """
        for block in self.blocks:
            for name, parameter in block.named_parameters():
                if name.endswith("bias"):
                    parameter.zero_()
                elif parameter.dim() == 2:
                    writes = name.endswith(("proj.weight", "down.weight"))
                    scale = 2 * self.config.n_layers if writes else 1
                    parameter.normal_(0.0, (scale * parameter.shape[1]) ** -0.5)
        self.embed.weight.normal_(0.0, 1.0)
        self.head.weight.normal_(0.0, HEAD_STD)  # a tied embedding gets this one

    def forward(
        self,
        ids: Int[Tensor, "B T"],
        positions: Int[Tensor, "B T"] | None = None,
        cache: Cache | None = None,
        *,
        n_last: int | None = None,
    ) -> Float[Tensor, "B T1 V"]:
        """Return the logits of the next token at every position.

        Args:
            ids: tokens.
            positions: of the tokens, a row each; -1 marks padding, which nobody sees.
                None: one after the other, from 0 or from where the cache ends.
            cache: keys and values of earlier tokens; takes those of these tokens too.
            n_last: positions at the end whose logits are wanted; None: all. A prompt
                needs those of its last token alone, and the head is a large matrix.
        """
        x = self.stream(ids, positions, cache)[-1]
        x = x if n_last is None else x[:, x.shape[1] - n_last :]
        return self.head(self.final_norm(x))

    def stream(
        self,
        ids: Int[Tensor, "B T"],
        positions: Int[Tensor, "B T"] | None = None,
        cache: Cache | None = None,
    ) -> list[Float[Tensor, "B T C"]]:
        """Return the residual stream before the first block and after each."""
        plain = positions is None and cache is None
        if positions is None:
            n_new = ids.shape[1]
            positions = (
                cache.next_positions(n_new)
                if cache is not None
                else torch.arange(n_new, device=ids.device).expand(ids.shape)
            )
        keys = positions if cache is None else cache.extend(positions)
        mask = self.mask(positions, keys, plain=plain)
        rotation = self.rotation(positions)
        states = [self.embed_tokens(ids, positions)]
        for block in self.blocks:
            states.append(block(states[-1], rotation, mask, cache))
        return states

    def embed_tokens(
        self, ids: Int[Tensor, "B T"], positions: Int[Tensor, "B T"]
    ) -> Float[Tensor, "B T C"]:
        """Return what enters the first block; a variant may add positions here."""
        return self.embed(ids)

    def rotation(self, positions: Int[Tensor, "B T"]) -> Rotation:
        """Return cosine and sine for the queries and keys at these positions."""
        config = self.config
        double = self.embed.weight.dtype == torch.float64
        dtype = torch.float64 if double else torch.float32
        return rope_tables(positions[:, None], config.d_head, config.rope_theta, dtype)

    def mask(
        self,
        positions: Int[Tensor, "B T"],
        key_positions: Int[Tensor, "B S"],
        *,
        plain: bool,
    ) -> Bool[Tensor, "B 1 T S"] | Float[Tensor, "..."] | None:
        """Return who may attend to whom; None: each query to the keys up to its own.

        A single query without a mask sees every key.

        Args:
            positions: of the queries.
            key_positions: of the keys.
            plain: positions are 0, 1, 2, ... in every row, and queries are the keys.
        """
        config = self.config
        if plain and config.window is None:
            return None
        seen = window_mask(positions, key_positions, config.window, config.n_sinks)
        # One query that sees all there is, as mostly in decoding, needs no mask.
        return None if seen.shape[1] == 1 and seen.all() else seen[:, None]
