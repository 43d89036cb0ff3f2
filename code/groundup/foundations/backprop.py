"""Backpropagation by hand: a multilayer perceptron and its gradients in NumPy.

Here: three activation functions with their slopes, five initialisations, a
forward pass that saves what the backward pass needs, the backward pass itself, a
loss, and the central differences that check all of it. Left out: mini-batches,
every optimizer but plain gradient descent, and any graph other than a chain of
layers; `torch.autograd` does that in general.

Sources: Rumelhart, Hinton and Williams (1986) for the backward pass; Glorot and
Bengio (2010), eqs. 12 and 16, and He et al. (2015), eq. 10, for the
initialisations; Hendrycks and Gimpel (2016), section 2, for GELU; Baydin et al.
(2018), section 2.1, for numerical differentiation.
Page: book/0-foundations/backprop.md.
Axes: `B` examples, `I` inputs and `O` outputs of one layer, `*nets` networks of
the same shape side by side (usually one per seed), none for a single network.
An example is a row and W is (O, I) as in torch, so a layer computes x W^T + b. The
bias is (1, O), so that it can be added whether or not there are `*nets`. Nothing
changes the dtype it is given: the same code runs in float64 and in float32.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

XOR_INPUTS = np.array([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
XOR_TARGETS = np.array([[0.0], [1.0], [1.0], [0.0]])

Array = np.ndarray


class Activation(NamedTuple):
    """A function applied to each pre-activation, with its derivative."""

    value: Callable[[Array], Array]
    slope: Callable[[Array], Array]


def _normal_cdf(z: Array) -> Array:
    erf = np.vectorize(math.erf, otypes=[np.float64])
    return ((1.0 + erf(z / math.sqrt(2.0))) / 2.0).astype(z.dtype)


def _normal_pdf(z: Array) -> Array:
    return np.exp(-(z**2) / 2.0) / math.sqrt(2.0 * math.pi)


# ReLU has no derivative at 0; the slope there is 0 by convention, as in torch.
ACTIVATIONS = {
    "tanh": Activation(np.tanh, lambda z: 1.0 - np.tanh(z) ** 2),
    "relu": Activation(lambda z: np.maximum(z, 0.0), lambda z: (z > 0).astype(z.dtype)),
    "gelu": Activation(
        lambda z: z * _normal_cdf(z), lambda z: _normal_cdf(z) + z * _normal_pdf(z)
    ),
}

# Keeps weights apart from data: `default_rng(seed)` alone would hand both the same
# numbers, and the first layer of a network would then hold its own inputs.
WEIGHT_STREAM = 1986

# Standard deviation of a weight, from the number of inputs and outputs of its layer.
WEIGHT_STD: dict[str, Callable[[int, int], float]] = {
    "zeros": lambda n_in, n_out: 0.0,
    "tiny": lambda n_in, n_out: 0.01,
    "huge": lambda n_in, n_out: 1.0,
    "xavier": lambda n_in, n_out: math.sqrt(2.0 / (n_in + n_out)),
    "he": lambda n_in, n_out: math.sqrt(2.0 / n_in),
}


@dataclass(frozen=True)
class MLPConfig:
    """Shape and start of a multilayer perceptron.

    Raises:
        ValueError: a field is not one of the values listed beside it.
    """

    widths: tuple[int, ...] = (2, 4, 1)  # units: inputs, hidden layers, outputs
    activation: str = "tanh"  # a key of ACTIVATIONS; the last layer has none
    init: str = "xavier"  # a key of WEIGHT_STD

    def __post_init__(self) -> None:
        """Check the fields."""
        if len(self.widths) < 2 or min(self.widths) < 1:
            raise ValueError(
                f"widths must name at least an input and an output width, each 1 or "
                f"more; got {self.widths}"
            )
        for field, known in (("activation", ACTIVATIONS), ("init", WEIGHT_STD)):
            if getattr(self, field) not in known:
                raise ValueError(
                    f"{field} must be one of {sorted(known)}; "
                    f"got {getattr(self, field)!r}"
                )


@dataclass(frozen=True)
class Layer:
    """Weight and bias of one layer, or their gradients: the shapes are the same."""

    weight: Float[Array, "*nets O I"]
    bias: Float[Array, "*nets 1 O"]


class Saved(NamedTuple):
    """What the forward pass keeps of one layer for the backward pass."""

    inputs: Array  # (..., B, I)
    pre: Array  # (..., B, O), before the activation function


def initialise(
    config: MLPConfig, seed: int | Sequence[int], dtype: type = np.float64
) -> list[Layer]:
    """Draw normal weights with the config's standard deviation; biases are zero.

    Glorot and Bengio draw from a uniform distribution of the same variance.

    One seed gives one network; a sequence of seeds gives as many side by side, each
    the same as it would be alone. The numbers are drawn in float64, then cast.
    """
    if isinstance(seed, Sequence):
        nets = [initialise(config, s, dtype) for s in seed]
        return [
            Layer(np.stack([n.weight for n in same]), np.stack([n.bias for n in same]))
            for same in zip(*nets, strict=True)
        ]
    rng = np.random.default_rng((WEIGHT_STREAM, seed))
    layers = []
    for n_in, n_out in zip(config.widths[:-1], config.widths[1:], strict=True):
        std = WEIGHT_STD[config.init](n_in, n_out)
        weight = std * rng.standard_normal((n_out, n_in))
        layers.append(Layer(weight.astype(dtype), np.zeros((1, n_out), dtype)))
    return layers


def forward(
    layers: list[Layer], x: Float[Array, "*#nets B I"], activation: Activation
) -> tuple[Float[Array, "*nets B O"], list[Saved]]:
    """Return the output of the last layer, and what `backward` needs.

    The activation function follows every layer but the last.
    """
    saved = []
    for layer in layers[:-1]:
        pre = x @ layer.weight.mT + layer.bias
        saved.append(Saved(x, pre))
        x = activation.value(pre)
    out = x @ layers[-1].weight.mT + layers[-1].bias
    saved.append(Saved(x, out))
    return out, saved


def backward(
    layers: list[Layer],
    saved: list[Saved],
    delta: Float[Array, "*nets B O"],
    activation: Activation,
) -> list[Layer]:
    """Return the gradient of the loss for every weight and bias.

    Takes what `forward` saved, and the gradient `delta` for the output of the last
    layer. No activation function follows that layer, so no slope is needed there.
    """
    gradients = []
    for k in reversed(range(len(layers))):
        inputs = saved[k].inputs
        gradients.append(Layer(delta.mT @ inputs, delta.sum(-2, keepdims=True)))
        if k > 0:  # on to the layer below: through W, then through the slope
            delta = delta @ layers[k].weight * activation.slope(saved[k - 1].pre)
    return gradients[::-1]


def sigmoid(z: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Return 1 / (1 + exp(-z)), without overflow for any z."""
    return (1.0 + np.tanh(z / 2.0)) / 2.0


def logistic_loss(
    logits: Float[Array, "*nets B 1"], targets: Float[Array, "B 1"]
) -> tuple[Float[Array, "*nets"], Float[Array, "*nets B 1"]]:
    """Return the mean cross-entropy of yes-or-no targets, and its gradient.

    In nats per example: ln(1 + exp(z)) - y z, with gradient (sigmoid(z) - y) / B.
    Example: a logit of 0 costs ln 2 whatever the target.
    """
    losses = np.logaddexp(0, logits) - targets * logits
    delta = (sigmoid(logits) - targets) / len(targets)
    return np.asarray(losses.mean((-2, -1))), delta


def loss_and_gradients(
    layers: list[Layer],
    x: Float[Array, "*#nets B I"],
    targets: Float[Array, "B 1"],
    activation: Activation,
) -> tuple[Float[Array, "*nets"], list[Layer]]:
    """Run forward, loss and backward."""
    logits, saved = forward(layers, x, activation)
    value, delta = logistic_loss(logits, targets)
    return value, backward(layers, saved, delta, activation)


def train(
    layers: list[Layer],
    x: Float[Array, "B I"],
    targets: Float[Array, "B 1"],
    activation: Activation,
    *,
    steps: int,
    lr: float,
    gradients: Callable = loss_and_gradients,
) -> tuple[list[Layer], Float[Array, "steps *nets"]]:
    """Take plain gradient steps on all examples at once.

    `gradients` is called as `loss_and_gradients` is, so that another derivation can
    take its place. The layers handed in stay as they are.

    Returns:
        The trained layers, and the loss in nats per example before each step.
    """
    losses = []
    for _ in range(steps):
        value, grads = gradients(layers, x, targets, activation)
        losses.append(value)
        layers = [
            Layer(p.weight - lr * g.weight, p.bias - lr * g.bias)
            for p, g in zip(layers, grads, strict=True)
        ]
    return layers, np.stack(losses)


def dead_units(
    pre: Float[Array, "*nets B O"], activation: Activation
) -> Bool[Array, "*nets O"]:
    """Return True for a unit whose slope is exactly 0 on every example.

    No gradient reaches the weights of such a unit, so on these examples it stays
    as it is until the layers below it change.
    """
    return (activation.slope(pre) == 0).all(-2)


def numeric_gradient(
    f: Callable[[Array], float | Array], x: Float[Array, "*shape"], h: float
) -> Float[Array, "*shape"]:
    """Estimate the gradient of f at x by central differences, one entry at a time.

    Divides by the step that was taken, which rounding makes a little different
    from 2h. Costs two calls of f for each entry of x.

    Args:
        f: returns a number; must not change its argument.
        x: float array; the work is done in its dtype.
        h: step, in the unit of x. Near 1e-5 in float64 and 1e-2 in float32.

    Raises:
        ValueError: h is not positive, or so small that x + h rounds to x - h.
    """
    if not h > 0:
        raise ValueError(f"h must be a positive step; got {h}")
    gradient = np.empty_like(x)
    for index in np.ndindex(x.shape):
        above, below = x.copy(), x.copy()
        above[index] += h
        below[index] -= h
        step = above[index] - below[index]
        if step == 0:
            raise ValueError(
                f"h must be large enough to change x; got {h}, lost in "
                f"{x[index]} ({x.dtype}): take a larger h or float64"
            )
        gradient[index] = (f(above) - f(below)) / step
    return gradient


def relative_error(a: Float[Array, "*shape"], b: Float[Array, "*shape"]) -> float:
    """Return norm(a - b) / max(norm(a), norm(b)): 0 if equal, at most 2."""
    largest = max(np.linalg.norm(a), np.linalg.norm(b))
    return float(np.linalg.norm(a - b) / largest) if largest > 0 else 0.0


def check_gradients(
    layers: list[Layer],
    x: Float[Array, "B I"],
    targets: Float[Array, "B 1"],
    activation: Activation,
    *,
    h: float = 1e-5,
    gradients: Callable = loss_and_gradients,
) -> dict[str, float]:
    """Compare gradients with central differences, parameter by parameter.

    Takes a single network; `gradients` is the derivation under test.

    Returns:
        Relative error under W1, b1, W2, ... In float64 and away from the kinks of
        ReLU, a right derivation gives about 1e-9.
    """
    _, derived = gradients(layers, x, targets, activation)
    errors = {}
    for k, layer in enumerate(layers):
        for letter, field in (("W", "weight"), ("b", "bias")):

            def f(value: Array, k=k, layer=layer, field=field) -> Array:
                changed = [*layers]
                changed[k] = replace(layer, **{field: value})
                return logistic_loss(forward(changed, x, activation)[0], targets)[0]

            expected = numeric_gradient(f, getattr(layer, field), h)
            errors[f"{letter}{k + 1}"] = relative_error(
                getattr(derived[k], field), expected
            )
    return errors
