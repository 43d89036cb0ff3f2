"""Who may attend to whom, by position: causal, windowed, with attention sinks.

Here: one mask from the positions of queries and keys, which serves training, prefill
and decoding with any cache. Left out: positions counted inside the cache
(`attention_sinks`), a cache that forgets (`rolling_cache`).

Source: Beltagy et al. (2020), section 3.1 (the window); Xiao et al. (2024), section 3
(the sinks). Page: book/3-modern/sliding_window.md.
Axes: `B` batch, `T` queries, `S` keys. True = may attend.
"""

from jaxtyping import Bool, Int
from torch import Tensor

NOTHING = -1  # position of a padded token, or of a slot that holds none


def check_window(window: int | None, n_sinks: int) -> None:
    """Refuse a window that does not hold the query itself, or a negative number.

    Raises:
        ValueError: window is below 1, or n_sinks is negative.
    """
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, the query itself; got {window}")
    if n_sinks < 0:
        raise ValueError(f"n_sinks must not be negative; got {n_sinks}")


def window_mask(
    positions: Int[Tensor, "B T"],
    key_positions: Int[Tensor, "B S"],
    window: int | None = None,
    n_sinks: int = 0,
) -> Bool[Tensor, "B T S"]:
    """Let a query see itself and what came before, at most `window` keys back.

    The window counts the query's own key, as in Mistral: window = 1 sees itself alone.
    FlashAttention counts the keys before it: its `window_size=(window - 1, 0)`.
    Sinks are the tokens at positions 0 to n_sinks - 1; every later query sees them.
    Keys at position `NOTHING` are seen by nobody, and queries there see nothing.

    Args:
        positions: of the queries, in tokens, a row each.
        key_positions: of the keys, in any order.
        window: keys in reach; None: all.
        n_sinks: tokens at the start that stay in reach.

    Raises:
        ValueError: window is below 1, or n_sinks is negative.

    Example: the query at 5 with window = 2 and n_sinks = 1 sees 0, 4 and 5.
    """
    check_window(window, n_sinks)
    q, k = positions[:, :, None], key_positions[:, None, :]
    mask = (k > NOTHING) & (k <= q)
    if window is not None:
        mask &= (q - k < window) | (k < n_sinks)
    return mask
