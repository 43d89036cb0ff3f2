"""Tables of n-grams beside a decoder's embedding, and an optimizer for such tables.

Here: the row of each n-gram by hashing, a decoder that adds the rows' vectors to its
tokens', and Adagrad that works on the used rows only. Left out: choosing which n-grams
get a row of their own.

Source: Weinberger et al. (2009), section 2, for hashed features; Duchi et al. (2011),
section 1.1, for Adagrad, here with one scale a row. Page: book/4-scaling/schedules.md.
Axes: `B` batch, `T` context, `C` d_model, `O` orders.
"""

from collections.abc import Iterable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from groundup.modern.decoder import Decoder, DecoderConfig
from groundup.training.adamw import Group
from groundup.training.batching import HASH_FACTOR

TINY = 1e-30  # least sum of squares that is divided by


def gram_rows(
    ids: Int[Tensor, "B T"], orders: tuple[int, ...], n_rows: int
) -> Int[Tensor, "B T O"]:
    """Return the row of each position's last n tokens, in a table for each order n.

    The n-gram's polynomial hash, its upper half, modulo the table's rows; the tables
    lie one after the other. Two n-grams may share a row. Before the start of the text
    stand tokens of their own.

    Args:
        ids: tokens; a position's n-grams end with its own token.
        orders: the n of each table.
        n_rows: rows of each table.
    """
    hashes, of_order, length = torch.zeros_like(ids), [], ids.shape[1]
    for back in range(max(orders)):  # 0 stands before the start, tokens from 1
        before = F.pad(ids + 1, (back, 0))[:, :length]
        hashes = (hashes + before) * HASH_FACTOR  # modulo 2^64
        of_order.append(hashes)
    chosen = torch.stack([of_order[n - 1] for n in orders], dim=-1)
    tables = torch.arange(len(orders), device=ids.device) * n_rows
    return (chosen >> 32) % n_rows + tables


class GramDecoder(Decoder):
    """A decoder whose embedding also looks up the last few tokens together.

    A position starts with its token's vector plus one vector for each order, from the
    row of its n-gram. The tables start at 0. Their gradient is sparse: the rows that a
    batch used.

    Args:
        config: as for `Decoder`.
        orders: the n-grams, say (2, 3).
        n_rows: rows of each table.

    Raises:
        ValueError: there is no order, one is below 2 or appears twice, or n_rows is
            not positive.
    """

    def __init__(
        self, config: DecoderConfig, orders: tuple[int, ...], n_rows: int
    ) -> None:
        if not orders or min(orders) < 2 or len(set(orders)) < len(orders):
            raise ValueError(f"orders must be different, each 2 or more; got {orders}")
        if n_rows < 1:
            raise ValueError(f"n_rows must be at least 1; got {n_rows}")
        super().__init__(config)
        self.orders, self.n_rows = orders, n_rows
        self.tables = nn.Parameter(torch.zeros(len(orders) * n_rows, config.d_model))

    def embed_tokens(
        self, ids: Int[Tensor, "B T"], positions: Int[Tensor, "B T"]
    ) -> Float[Tensor, "B T C"]:
        """Return token and n-grams together; a row's first token has none before it."""
        rows = gram_rows(ids, self.orders, self.n_rows).flatten(0, 1)
        grams = F.embedding_bag(rows, self.tables, mode="sum", sparse=True)
        return self.embed(ids) + grams.view(*ids.shape, -1)


class RowAdagrad:
    """Adagrad with one scale for each row of a table, and work for the used rows only.

    A row moves by lr times its gradient, over the root of the sum of all mean squares
    that its gradients had so far: a row seldom seen takes large steps. Rows without a
    gradient stay, whatever the size of the table. Its first step has a root mean
    square of lr.

    Args:
        groups: tables with sparse gradients; their decay must be 0.

    Raises:
        ValueError: a weight decay is not 0.
    """

    def __init__(self, groups: Iterable[Group]) -> None:
        self.groups = list(groups)
        if any(group.weight_decay for group in self.groups):
            raise ValueError("weight_decay must be 0 for tables of which rows are used")
        tables = [item for g in self.groups for item in g.parameters.items()]
        self.state = {name: (p.new_zeros(len(p)),) for name, p in tables}
        self.n_steps = dict.fromkeys(self.state, 0)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update every table that has a gradient, at learning rate lr."""
        for group in self.groups:
            for name, table in group.parameters.items():
                if table.grad is None:
                    continue
                self.n_steps[name] += 1
                grad = table.grad.coalesce()
                (rows,), grad = grad.indices(), grad.values()
                (squares,) = self.state[name]
                squares.index_add_(0, rows, grad.square().mean(1))
                scale = squares[rows].clamp(min=TINY).rsqrt_()
                table.index_add_(0, rows, grad * scale[:, None], alpha=-lr)
