"""Scaling laws: how the loss falls with parameters, data and compute, fitted.

Here: the law L(N, D) = E + A / N^alpha + B / D^beta with its best split of compute, its
fit by Hoffmann's third approach (Huber loss of the log-loss, L-BFGS from many starts),
bootstrap samples of it, and IsoFLOP curves with the minimum of their parabola. Left
out: the runs (`ladder`), other shapes of the law, and corrections for data that is
read more than once.

Source: Hoffmann et al. (2022), section 3.3, eqs. 2 to 4, and appendix D.3; Besiroglu et
al. (2024) for what goes wrong there; Kaplan et al. (2020), section 1.2. Page:
book/4-scaling/scaling_laws.md.
Axes: `R` runs, `M` models of an IsoFLOP curve. Arrays are NumPy's, float64.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Shaped
from numpy import ndarray as Array
from scipy.optimize import minimize

Number = int | float | Array
FLOP_PER_PARAMETER = 6  # and token: 2 forward, 4 backward (Kaplan et al., table 1)
DELTA = 1e-3  # of the Huber loss (Hoffmann et al., appendix D.3)
# Where L-BFGS starts. Exponents, then the three terms as shares of the middle loss.
EXPONENTS, SHARES = (0.2, 0.5, 1.0), (0.1, 0.3, 0.6)


@dataclass(frozen=True)
class Law:
    """L(N, D) = E + A / N^alpha + B / D^beta, in nats per token."""

    floor: float  # E, what no size and no data take away
    a: float  # A
    b: float  # B
    alpha: float
    beta: float

    def loss(self, n: Number, d: Number) -> float | Array:
        """Return the loss of n parameters trained on d tokens."""
        return self.floor + self.a * n**-self.alpha + self.b * d**-self.beta

    @property
    def share(self) -> float:
        """Exponent a of N_opt = G (C / 6)^a; that of D_opt is 1 - a."""
        return self.beta / (self.alpha + self.beta)

    def best_split(self, flops: Number) -> tuple[float | Array, float | Array]:
        """Return the parameters and tokens with the lowest loss for 6 N D = flops.

        Hoffmann et al. (2022), eq. 4: N = G (C / 6)^a, with G^(alpha + beta) =
        alpha A / (beta B).
        """
        product = flops / FLOP_PER_PARAMETER
        ratio = self.alpha * self.a / (self.beta * self.b)
        n = ratio ** (1 / (self.alpha + self.beta)) * product**self.share
        return n, product / n


# As printed, and refitted from the data of the figures of that paper.
HOFFMANN = Law(1.69, 406.4, 410.7, 0.34, 0.28)
BESIROGLU = Law(1.8172, 482.01, 2085.43, 0.3478, 0.3658)


def huber_log_loss(
    theta: Float[Array, "5"],
    n: Shaped[Array, "R"],
    d: Shaped[Array, "R"],
    loss: Float[Array, "R"],
    delta: float = DELTA,
) -> tuple[float, Float[Array, "5"]]:
    """Return the sum of Huber losses of log L - log of the law, and its gradient.

    It is summed, not averaged: an average over many runs is so small that an optimizer
    with the usual tolerance stops before it has begun (Besiroglu et al., 2024).

    Args:
        theta: log E, log A, log B, alpha, beta.
        n, d: parameters and tokens of each run.
        loss: of each run.
        delta: where the square ends and the straight part begins.
    """
    e, a, b, alpha, beta = theta
    log_n, log_d = np.log(n), np.log(d)
    terms = np.stack([np.full(len(n), e), a - alpha * log_n, b - beta * log_d])
    highest = terms.max(0)
    parts = np.exp(terms - highest)
    total = parts.sum(0)
    error = highest + np.log(total) - np.log(loss)
    size = np.abs(error)
    values = np.where(size <= delta, error**2 / 2, delta * (size - delta / 2))
    slope = np.clip(error, -delta, delta) * parts / total  # (3, R)
    gradient = [*slope.sum(1), -(slope[1] @ log_n), -(slope[2] @ log_d)]
    return float(values.sum()), np.array(gradient)


def fit_law(
    n: Shaped[Array, "R"],
    d: Shaped[Array, "R"],
    loss: Float[Array, "R"],
    *,
    starts: Sequence[Law] | None = None,
    delta: float = DELTA,
) -> Law:
    """Fit a law to runs.

    Args:
        n, d: parameters and tokens of each run.
        loss: of each run, in nats per token.
        starts: where the search begins; None: a grid of 81, scaled to the runs.
        delta: of the Huber loss.

    Raises:
        ValueError: there are fewer than five runs, or sizes and data do not vary.
    """
    if len(n) < 5 or len(set(n)) < 2 or len(set(d)) < 2:
        raise ValueError(
            "a law of five numbers needs five runs of several sizes and budgets; got "
            f"{len(n)} runs, {len(set(n))} sizes, {len(set(d))} budgets"
        )
    bounds = [(None, None)] * 3 + [(0.0, 5.0)] * 2
    options = {"maxiter": 2000, "ftol": 1e-14, "gtol": 1e-10}
    scale = 1e3  # one that the tolerances of L-BFGS can see
    best = None
    for law in _grid(n, d, loss) if starts is None else starts:
        found = minimize(
            lambda t: tuple(
                scale * part for part in huber_log_loss(t, n, d, loss, delta)
            ),
            [*np.log([law.floor, law.a, law.b]), law.alpha, law.beta],
            jac=True,
            method="L-BFGS-B",
            bounds=bounds,
            options=options,
        )
        best = found if best is None or found.fun < best.fun else best
    return Law(*np.exp(best.x[:3]).tolist(), *best.x[3:].tolist())


def _grid(n: Array, d: Array, loss: Array) -> list[Law]:
    """Laws whose terms have given shares of the middle loss at the middle run."""
    middle = float(np.median(loss))
    log_n, log_d = np.log(n).mean(), np.log(d).mean()
    return [
        Law(
            middle * (1 - share_n / 2 - share_d / 2),
            middle * share_n / 2 * np.exp(alpha * log_n),
            middle * share_d / 2 * np.exp(beta * log_d),
            alpha,
            beta,
        )
        for alpha, beta, share_n, share_d in itertools.product(
            EXPONENTS, EXPONENTS, SHARES, SHARES
        )
    ]


def bootstrap(
    best: Law,
    n: Shaped[Array, "R"],
    d: Shaped[Array, "R"],
    loss: Float[Array, "R"],
    *,
    n_samples: int = 200,
    groups: Shaped[Array, "R"] | None = None,
    seed: int = 0,
) -> list[Law]:
    """Fit laws to runs drawn with replacement; their spread is the fit's uncertainty.

    Args:
        best: the law fitted to all of them, where each search begins.
        n, d, loss: as for `fit_law`.
        n_samples: laws to return.
        groups: runs with one label are drawn together, because they are not
            independent (they share a trunk, or a size); None: each run alone. A
            drawing that no law can be fitted to is drawn again.
        seed: of the drawings.
    """
    rng = np.random.default_rng(seed)
    groups = np.arange(len(n)) if groups is None else np.asarray(groups)
    labels = np.unique(groups)
    members = [np.flatnonzero(groups == label) for label in labels]
    laws: list[Law] = []
    while len(laws) < n_samples:
        drawn = rng.integers(len(labels), size=len(labels))
        rows = np.concatenate([members[i] for i in drawn])
        if len(set(n[rows])) > 2 and len(set(d[rows])) > 2:
            laws.append(fit_law(n[rows], d[rows], loss[rows], starts=[best]))
    return laws


def at_budget(
    d: Shaped[Array, "M"], loss: Float[Array, "M"], wanted: float
) -> float | None:
    """Return one size's loss at a number of tokens between two that it was trained on.

    A straight line in log D and log L; None outside of what was trained.
    """
    if not d.min() <= wanted <= d.max():
        return None
    order = np.argsort(d)
    log_loss = np.interp(np.log(wanted), np.log(d[order]), np.log(loss[order]))
    return float(np.exp(log_loss))


def parabola_minimum(
    n: Shaped[Array, "M"], loss: Float[Array, "M"]
) -> tuple[float, float]:
    """Fit a parabola to loss over log n; return where it is lowest and how low.

    Raises:
        ValueError: there are fewer than three models, or the parabola opens downwards.
    """
    if len(n) < 3:
        raise ValueError(f"a parabola needs three models; got {len(n)}")
    log_n = np.log(n)
    centre = log_n.mean()
    curve, slope, level = np.polyfit(log_n - centre, loss, 2)
    if curve <= 0:
        raise ValueError("loss over log n has no minimum: its parabola opens downwards")
    lowest = -slope / (2 * curve)
    return float(np.exp(lowest + centre)), float(level - slope**2 / (4 * curve))
