"""Attention in NumPy, small enough to follow with a pencil.

Here: the softmax and its Jacobian, the causal mask, scaled dot-product attention
twice (as loops, then as matrix products), and the three-token example that later
pages refer to. Left out: parameters, gradients through the whole layer, several
heads; `single_head` and `multi_head` have them.

Source: Vaswani et al. (2017), section 3.2.1, eq. 1.
Page: book/1-transformer/attention_by_hand.md.
Axes: `...` any leading axes, `T` queries, `S` keys, `C` model width, `D` head size
of queries and keys (the paper's d_k), `Dv` head size of values. All arrays are
float64. Masks are boolean and True means "may attend".
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Shaped


class Example(NamedTuple):
    """Three tokens and the maps that make queries, keys and values of them.

    Attributes:
        tokens: the words.
        x: one row a token; columns: is a name, is a deed, rank, armed.
        w_q: what a word with a feature asks for.
        w_k: what a word with a feature answers to.
        w_v: what a word with a feature hands over.
    """

    tokens: tuple[str, ...]
    x: Float[np.ndarray, "T C"]
    w_q: Float[np.ndarray, "C D"]
    w_k: Float[np.ndarray, "C D"]
    w_v: Float[np.ndarray, "C Dv"]

    def qkv(
        self,
    ) -> tuple[
        Float[np.ndarray, "T D"], Float[np.ndarray, "T D"], Float[np.ndarray, "T Dv"]
    ]:
        """Return queries, keys and values of the three tokens."""
        return self.x @ self.w_q, self.x @ self.w_k, self.x @ self.w_v


def three_tokens() -> Example:
    """Return the example of the page: fresh arrays, free to be changed.

    T = 3, C = D = 4 and Dv = 2. The scaled scores are the whole numbers
    [[0, 3, 2], [2, 0, 1], [2, 3, 4]].
    """
    return Example(
        tokens=("Brutus", "killed", "Caesar"),
        x=np.array([[1.0, 0, 1, 1], [0, 1, 0, 0], [1, 0, 2, 0]]),
        w_q=np.array([[0.0, 3, 0, 0], [1, 0, 0, 1], [0, 0, 1, 0], [0, 0, 0, -1]]),
        w_k=2.0 * np.eye(4),
        w_v=np.array([[1.0, 1], [3, 4], [2, 0], [-2, 0]]),
    )


def softmax(x: Float[np.ndarray, "..."], axis: int = -1) -> Float[np.ndarray, "..."]:
    """Return exp(x) divided by its sum along axis, without overflow.

    The largest entry is subtracted first, so that the largest exponential is 1.
    Where all entries are -inf (nothing may be attended to) the result is 0, not
    0/0.

    Args:
        x: finite numbers or -inf, of any float type.
        axis: the axis that sums to one.

    Returns:
        Same shape, float64, entries in [0, 1].

    Raises:
        ValueError: x holds NaN or +inf.

    Example: `softmax(np.log([1.0, 3.0]))` is [0.25, 0.75].
    """
    x = np.asarray(x, dtype=np.float64)
    if np.isnan(x).any() or np.isposinf(x).any():
        raise ValueError("x must be finite or -inf; got NaN or +inf")
    top = x.max(axis=axis, keepdims=True, initial=-np.inf)
    exps = np.exp(x - np.where(np.isneginf(top), 0.0, top))
    total = exps.sum(axis=axis, keepdims=True)
    return exps / np.where(total == 0.0, 1.0, total)


def softmax_jacobian(
    weights: Float[np.ndarray, "... S"],
) -> Float[np.ndarray, "... S S"]:
    """Return the derivatives of a softmax, given its output.

    Args:
        weights: softmax along the last axis.

    Returns:
        Entry (i, j) is d weight_i / d score_j = w_i ((i = j) - w_j): symmetric,
        with rows that sum to zero.
    """
    diagonal = weights[..., None] * np.eye(weights.shape[-1])
    return diagonal - weights[..., :, None] * weights[..., None, :]


def causal_mask(n_tokens: int) -> Bool[np.ndarray, "T T"]:
    """Return the mask in which token t may attend to tokens 0 to t.

    Example: `causal_mask(2)` is [[True, False], [True, True]].
    """
    return np.tril(np.ones((n_tokens, n_tokens), dtype=bool))


def attention_loops(
    q: Float[np.ndarray, "T D"],
    k: Float[np.ndarray, "S D"],
    v: Float[np.ndarray, "S Dv"],
    mask: Bool[np.ndarray, "T S"] | None = None,
    scale: float | None = None,
) -> tuple[Float[np.ndarray, "T Dv"], Float[np.ndarray, "T S"]]:
    """Compute the same as `attention`, one number at a time.

    To read, and to test `attention` against; arguments and result as there.
    """
    scale = q.shape[1] ** -0.5 if scale is None else scale
    output = np.zeros((len(q), v.shape[1]))
    weights = np.zeros((len(q), len(k)))
    for t in range(len(q)):
        allowed = [s for s in range(len(k)) if mask is None or mask[t, s]]
        if not allowed:
            continue  # nothing to average: weights 0, output 0
        scores = {}
        for s in allowed:
            product = 0.0
            for d in range(q.shape[1]):
                product += q[t, d] * k[s, d]
            scores[s] = product * scale
        top = max(scores.values())
        total = sum(np.exp(score - top) for score in scores.values())
        for s in allowed:
            weights[t, s] = np.exp(scores[s] - top) / total
            for d in range(v.shape[1]):
                output[t, d] += weights[t, s] * v[s, d]
    return output, weights


def attention(
    q: Float[np.ndarray, "... T D"],
    k: Float[np.ndarray, "... S D"],
    v: Float[np.ndarray, "... S Dv"],
    mask: Shaped[np.ndarray, "..."] | None = None,
    scale: float | None = None,
) -> tuple[Float[np.ndarray, "... T Dv"], Float[np.ndarray, "... T S"]]:
    """Average the values, weighted by the softmax of the scaled scores.

    Args:
        q, k, v: queries, keys and values.
        mask: True = may attend; broadcast to the scores. None lets all see all.
        scale: factor on the scores, 1/sqrt(D) where it is left out.

    Returns:
        Output and weights. A query that may attend to nothing gets weights 0 and
        output 0.

    Raises:
        ValueError: the mask is not boolean. (A mask of 0 and 1 would be read as
            numbers to add by other libraries; we do not guess.)

    Example: `attention(*three_tokens().qkv())`.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = scale * (q @ np.swapaxes(k, -1, -2))
    if mask is not None:
        if mask.dtype != bool:
            raise ValueError(
                f"mask must be boolean, True = may attend; got dtype {mask.dtype}"
            )
        scores = np.where(mask, scores, -np.inf)
    weights = softmax(scores, axis=-1)
    return weights @ v, weights
