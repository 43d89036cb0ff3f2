"""One token of one row: the pass of decoding, in few operations.

A new token sends a single row through every matrix. Reading the matrices takes most of
the time, but each of the small operations between them costs some microseconds to call,
whatever it computes, and a decoder of 30 blocks calls thousands a token.

Here: a decoder with a second way through the same modules for that one case. The scale
of a norm and the addition to the residual stream are done by the products themselves,
and a rotation is one product with a small matrix. Left out: packing or compiling the
weights, integers (the part on inference).

Page: book/3-modern/decoder.md.
Axes: `B` batch, `T` new tokens, `C` d_model, `I` inputs, `O` outputs, `V` vocabulary.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from groundup.foundations.environment import median_seconds
from groundup.modern.decoder import Attention, Decoder, DecoderBlock
from groundup.modern.kv_cache import Cache
from groundup.modern.rmsnorm import RMSNorm
from groundup.modern.rope import rotate
from groundup.modern.swiglu import SwiGLU
from groundup.transformer.residual_norm import widened

KNOWN = {
    *(Decoder, DecoderBlock, Attention, SwiGLU, RMSNorm),
    *(nn.ModuleList, nn.Embedding, nn.Linear),
}


class OneRowDecoder(nn.Module):
    """A decoder that reads one new token of one row, without gradients, faster.

    Everything else it hands to the decoder. The parameters are shared, and the logits
    differ by rounding.

    Args:
        decoder: a `Decoder`; it is left as it is.
        by_vector: one row meets a matrix in torch's matrix-vector product, or else in
            the general one. Which is faster depends on processor and dtype; None: both
            are timed on all matrices.

    Raises:
        TypeError: decoder holds a module that a plain `Decoder` does not have.
    """

    def __init__(self, decoder: Decoder, *, by_vector: bool | None = None) -> None:
        super().__init__()
        strange = {type(m) for m in decoder.modules()} - KNOWN
        if strange:
            names = ", ".join(sorted(kind.__name__ for kind in strange))
            raise TypeError(
                f"decoder must be a plain Decoder, whose modules this pass knows; got "
                f"one with {names}"
            )
        self.decoder, self.config = decoder, decoder.config
        if by_vector is None:
            by_vector = min(
                (False, True),
                key=lambda way: product_seconds(decoder, by_vector=way),
            )
        self.by_vector = by_vector

    def forward(
        self,
        ids: Int[Tensor, "B T"],
        positions: Int[Tensor, "B T"] | None = None,
        cache: Cache | None = None,
        *,
        n_last: int | None = None,
    ) -> Float[Tensor, "B T1 V"]:
        """Return logits as `Decoder.forward` does, and take the same arguments."""
        one = ids.shape == (1, 1) and cache is not None and n_last in (None, 1)
        if not one or torch.is_grad_enabled():
            return self.decoder(ids, positions, cache, n_last=n_last)
        decoder, config = self.decoder, self.config
        positions = cache.next_positions(1) if positions is None else positions
        mask = decoder.mask(positions, cache.extend(positions), plain=False)
        cos, sin = decoder.rotation(positions)
        # y @ turn is y rotated: the rows of turn are the rotated unit vectors.
        unit = torch.eye(config.d_head).to(cos)[:, None]
        turn = rotate(unit, cos[0, 0], sin[0, 0])[:, 0]
        x = decoder.embed_tokens(ids, positions)[0, 0]
        for block in decoder.blocks:
            x = self._attention(block, x, turn, mask, cache)
            x = self._feedforward(block, x)
        row, scale = _normed(decoder.final_norm, x)
        return self._times(decoder.head.weight, row, scale).view(1, 1, -1)

    def _attention(
        self,
        block: DecoderBlock,
        x: Tensor,
        turn: Tensor,
        mask: Tensor | None,
        cache: Cache,
    ) -> Tensor:
        attention, d_head = block.attention, len(turn)
        n_heads, n_groups = attention.n_heads, attention.n_groups
        row, scale = _normed(block.attention_norm, x)
        qkv, bias = attention.qkv.weight, attention.qkv.bias
        heads = self._times(qkv, row, scale, bias).view(-1, d_head)
        turned = (heads[: n_heads + n_groups].to(turn.dtype) @ turn).to(x.dtype)
        q, k = turned[:n_heads], turned[n_heads:]
        v = heads[n_heads + n_groups :]
        k, v = cache.put(
            attention.layer, k.view(1, -1, 1, d_head), v.view(1, -1, 1, d_head)
        )
        mixed = attention.attend(q.view(1, n_heads, 1, d_head), k, v, mask)
        return self._times(attention.proj.weight, mixed.view(-1), plus=x)

    def _feedforward(self, block: DecoderBlock, x: Tensor) -> Tensor:
        row, scale = _normed(block.feedforward_norm, x)
        both = self._times(block.feedforward.gate_up.weight, row, scale)
        gate, up = both.view(2, -1)
        return self._times(block.feedforward.down.weight, F.silu(gate).mul_(up), plus=x)

    def _times(
        self,
        weight: Float[Tensor, "O I"],
        row: Float[Tensor, "I"],
        scale: float = 1.0,
        plus: Float[Tensor, "O"] | None = None,
    ) -> Float[Tensor, "O"]:
        """Return scale * weight @ row + plus, in one operation."""
        start, beta = (weight[:, 0], 0) if plus is None else (plus, 1)
        if self.by_vector:
            return torch.addmv(start, weight, row, beta=beta, alpha=scale)
        return torch.addmm(start, row[None], weight.T, beta=beta, alpha=scale)[0]


def _normed(norm: RMSNorm, x: Float[Tensor, "C"]) -> tuple[Float[Tensor, "C"], float]:
    """Return x times the norm's weight, and 1 / rms as the factor that is missing."""
    mean_square = torch.linalg.vector_norm(widened(x)).item() ** 2 / len(x)
    return x * norm.weight, (mean_square + norm.eps) ** -0.5


@torch.no_grad()
def product_seconds(decoder: Decoder, *, by_vector: bool) -> float:
    """Time one row through every matrix and nothing else: a token costs no less.

    Args:
        decoder: its matrices are read, one after the other.
        by_vector: as in `OneRowDecoder`.
    """
    weights = [m.weight for m in decoder.modules() if isinstance(m, nn.Linear)]
    pairs = [(w, torch.ones_like(w[0])) for w in weights]
    if by_vector:
        return median_seconds(lambda: [torch.mv(w, row) for w, row in pairs])
    return median_seconds(lambda: [row[None] @ w.T for w, row in pairs])
