"""ALiBi: no positions at all, but a penalty on the scores that grows with distance.

Here: the slopes of the heads, the bias that is added to the scores before the softmax,
and decoders whose positions are ALiBi's, a table's, RoPE's at another pace, or none,
for comparisons. Left out: the learned biases by distance of T5 and Shaw et al. (2018).

Source: Press et al. (2022), section 3; head counts that are not powers of two: the
authors' code. Page: book/3-modern/rope.md.
Axes: `B` batch, `H` heads, `T` queries, `S` keys, `C` d_model, `D` head size, `P` rows
of a table, `...` any leading axes.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from groundup.modern.decoder import Decoder, DecoderConfig
from groundup.modern.rope import rope_tables
from groundup.modern.sliding_window import window_mask

LAST_EXPONENT = 8  # the gentlest slope of a power of two of heads is 2^-8


def alibi_slopes(n_heads: int) -> Float[Tensor, "H"]:
    """Return the penalty per token of distance, a slope for each head.

    For H a power of two the slopes are 2^(-8/H), 2^(-16/H), ..., 2^-8. Otherwise those
    of the next lower power of two, P, come first, and then every other slope of 2P,
    from the steepest, as many as are missing.

    Returns:
        Slopes in nats per token, in float64.

    Raises:
        ValueError: n_heads is not positive.

    Example: `alibi_slopes(3)` is [1/16, 1/256, 1/4].
    """
    if n_heads < 1:
        raise ValueError(f"n_heads must be positive; got {n_heads}")
    lower = 1 << (n_heads.bit_length() - 1)

    def of_power(n: int) -> Tensor:
        i = torch.arange(1, n + 1, dtype=torch.float64)
        return 2.0 ** (-LAST_EXPONENT * i / n)

    return torch.cat((of_power(lower), of_power(2 * lower)[0::2][: n_heads - lower]))


def alibi_bias(
    slopes: Float[Tensor, "H"],
    positions: Int[Tensor, "... T"],
    key_positions: Int[Tensor, "... S"],
) -> Float[Tensor, "... H T S"]:
    """Return what ALiBi adds to the scores: minus slope times the distance.

    It hides nothing: a causal mask is still needed. Libraries often add slope times
    the key's position instead; under a causal mask the two differ by a constant in
    each row, which the softmax ignores.

    Args:
        slopes: nats per token, as from `alibi_slopes`.
        positions: of the queries, in tokens.
        key_positions: of the keys, in tokens.

    Returns:
        Zero or less, in nats, in the dtype of slopes.

    Example: slope 1/2, query at 3: keys 0 to 3 get -1.5, -1, -0.5 and 0.
    """
    distance = (positions[..., :, None] - key_positions[..., None, :]).abs()
    return -slopes[:, None, None] * distance[..., None, :, :]


class UnrotatedDecoder(Decoder):
    """A decoder without positions: every query and key is turned by the angle zero.

    Only the causal mask tells it anything about order. Costs what a `Decoder` costs.
    """

    def rotation(
        self, positions: Int[Tensor, "B T"]
    ) -> tuple[Float[Tensor, "B 1 T half"], Float[Tensor, "B 1 T half"]]:
        """Return the tables of position 0."""
        return super().rotation(torch.zeros_like(positions))


class AlibiDecoder(UnrotatedDecoder):
    """A decoder whose scores are biased by distance, as in `alibi_bias`."""

    def mask(
        self,
        positions: Int[Tensor, "B T"],
        key_positions: Int[Tensor, "B S"],
        *,
        plain: bool,
    ) -> Float[Tensor, "B H T S"]:
        """Return the bias, with minus infinity where a query must not look."""
        config = self.config
        slopes = alibi_slopes(config.n_heads).to(self.embed.weight)
        bias = alibi_bias(slopes, positions, key_positions)
        sees = window_mask(positions, key_positions, config.window, config.n_sinks)
        return bias.masked_fill(~sees[:, None], -torch.inf)


class TableDecoder(UnrotatedDecoder):
    """A decoder that adds a row of a table to each token, by its position.

    Args:
        config: sizes and switches.
        table: a row for each position.
        trained: whether the table is a parameter; if not, it is not stored either.

    Raises:
        ValueError: the table is not d_model wide.
    """

    def __init__(
        self, config: DecoderConfig, table: Float[Tensor, "P C"], *, trained: bool
    ) -> None:
        super().__init__(config)
        if table.shape[1] != config.d_model:
            raise ValueError(
                f"table must have d_model={config.d_model} columns; got "
                f"{table.shape[1]}"
            )
        if trained:
            self.table = nn.Parameter(table.clone())
        else:
            self.register_buffer("table", table.clone(), persistent=False)

    def embed_tokens(
        self, ids: Int[Tensor, "B T"], positions: Int[Tensor, "B T"]
    ) -> Float[Tensor, "B T C"]:
        """Return embeddings plus rows.

        Raises:
            ValueError: a position has no row.
        """
        if positions.max() >= len(self.table):
            raise ValueError(
                f"positions go up to {int(positions.max())}, but the table has rows 0 "
                f"to {len(self.table) - 1}"
            )
        return self.embed(ids) + self.table[positions.clamp(min=0)]  # padding: any row


class StretchedDecoder(Decoder):
    """A decoder with RoPE whose positions are divided by `scale`, 1 at first.

    Set `scale` on a trained model for position interpolation (Chen et al., 2023).
    """

    scale = 1.0

    def rotation(
        self, positions: Int[Tensor, "B T"]
    ) -> tuple[Float[Tensor, "B 1 T half"], Float[Tensor, "B 1 T half"]]:
        """Return the tables of the squeezed positions."""
        config = self.config
        return rope_tables(
            positions[:, None], config.d_head, config.rope_theta, scale=self.scale
        )
