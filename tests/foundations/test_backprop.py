"""Gradients by hand against torch.autograd, central differences and arithmetic."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from groundup.foundations.backprop import (
    ACTIVATIONS,
    WEIGHT_STD,
    XOR_INPUTS,
    XOR_TARGETS,
    Activation,
    Layer,
    MLPConfig,
    backward,
    check_gradients,
    dead_units,
    forward,
    initialise,
    logistic_loss,
    loss_and_gradients,
    numeric_gradient,
    relative_error,
    sigmoid,
    train,
)

TANH, RELU, GELU = ACTIVATIONS["tanh"], ACTIVATIONS["relu"], ACTIVATIONS["gelu"]
TORCH = {"tanh": torch.tanh, "relu": torch.relu, "gelu": F.gelu}
patient = settings(deadline=None, max_examples=50)
# What is left of XOR when three points share one prediction: 3/4 of the entropy of
# one in three.
POOLED_THREE = 0.75 * (math.log(3) - 2 / 3 * math.log(2))


def in_torch(layers, x, targets, name):
    """Loss and gradients of the same network from autograd, in the same dtype."""
    leaves = [
        torch.tensor(a, requires_grad=True)
        for layer in layers
        for a in (layer.weight, layer.bias)
    ]
    h = torch.tensor(x)
    for k in range(0, len(leaves), 2):
        h = h @ leaves[k].mT + leaves[k + 1]
        h = TORCH[name](h) if k + 2 < len(leaves) else h
    loss = F.binary_cross_entropy_with_logits(h, torch.tensor(targets))
    loss.backward()
    return loss.item(), [leaf.grad.numpy() for leaf in leaves]


def flat(layers):
    return [a for layer in layers for a in (layer.weight, layer.bias)]


def random_task(widths, seed, n=7, dtype=np.float64):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, widths[0])).astype(dtype)
    return x, rng.integers(0, 2, (n, 1)).astype(dtype)


def with_biases(layers, seed):
    """The same layers with random biases, so that no unit sits on a kink."""
    rng = np.random.default_rng(seed)
    return [Layer(la.weight, rng.standard_normal(la.bias.shape)) for la in layers]


# ---- forward and backward


def test_two_layers_by_hand():
    """x = (1, 2) through ReLU units with z = (1·1 + 2·1, 2·1 - 2·2) = (3, -2).

    h = (3, 0), output 3·2 + 0·5 - 1 = 5. With gradient 1 at the output: dW2 = h,
    db2 = 1, dh = (2, 5), dz = (2, 0) behind the slopes (1, 0), dW1 = dz^T x.
    """
    layers = [
        Layer(np.array([[1.0, 1.0], [2.0, -2.0]]), np.zeros((1, 2))),
        Layer(np.array([[2.0, 5.0]]), np.array([[-1.0]])),
    ]
    out, saved = forward(layers, np.array([[1.0, 2.0]]), RELU)
    assert out.tolist() == [[5.0]]
    first, second = backward(layers, saved, np.array([[1.0]]), RELU)
    assert second.weight.tolist() == [[3.0, 0.0]]
    assert second.bias.tolist() == [[1.0]]
    assert first.weight.tolist() == [[2.0, 4.0], [0.0, 0.0]]
    assert first.bias.tolist() == [[2.0, 0.0]]


@patient
@given(
    widths=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    name=st.sampled_from(sorted(ACTIVATIONS)),
    init=st.sampled_from(["xavier", "he", "huge"]),
    seed=st.integers(0, 2**31),
)
def test_same_gradients_as_autograd(widths, name, init, seed):
    config = MLPConfig((*widths, 1), name, init)
    layers = with_biases(initialise(config, seed), seed)
    x, targets = random_task(config.widths, seed)
    loss, grads = loss_and_gradients(layers, x, targets, ACTIVATIONS[name])
    expected_loss, expected = in_torch(layers, x, targets, name)
    assert abs(loss - expected_loss) < 1e-12 * max(1.0, expected_loss)
    for ours, theirs in zip(flat(grads), expected, strict=True):
        scale = max(1.0, np.abs(theirs).max())
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12 * scale)


@patient
@given(name=st.sampled_from(sorted(ACTIVATIONS)), seed=st.integers(0, 2**31))
def test_networks_side_by_side_are_those_networks_alone(name, seed):
    config = MLPConfig((3, 5, 4, 1), name)
    seeds = [seed, seed + 1, seed + 2]
    x, targets = random_task(config.widths, seed)
    losses, grads = loss_and_gradients(
        initialise(config, seeds), x, targets, ACTIVATIONS[name]
    )
    for k, s in enumerate(seeds):
        loss, alone = loss_and_gradients(
            initialise(config, s), x, targets, ACTIVATIONS[name]
        )
        assert abs(losses[k] - loss) < 1e-13
        for together, single in zip(flat(grads), flat(alone), strict=True):
            np.testing.assert_allclose(together[k], single, rtol=0, atol=1e-13)


def test_gradient_of_a_batch_is_the_mean_over_its_examples():
    config = MLPConfig((3, 4, 1))
    x, targets = random_task(config.widths, 0)
    layers = initialise(config, 0)
    _, whole = loss_and_gradients(layers, x, targets, TANH)
    single = [
        flat(loss_and_gradients(layers, x[i : i + 1], targets[i : i + 1], TANH)[1])
        for i in range(len(x))
    ]
    for k, g in enumerate(flat(whole)):
        mean = np.mean([s[k] for s in single], axis=0)
        np.testing.assert_allclose(g, mean, rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_float32_stays_float32_and_near_float64(name):
    config = MLPConfig((3, 8, 8, 1), name)
    x, targets = random_task(config.widths, 1)
    _, exact = loss_and_gradients(initialise(config, 1), x, targets, ACTIVATIONS[name])
    layers = initialise(config, 1, np.float32)
    loss, grads = loss_and_gradients(
        layers, x.astype("f4"), targets.astype("f4"), ACTIVATIONS[name]
    )
    assert loss.dtype == np.float32
    for g, e in zip(flat(grads), flat(exact), strict=True):
        assert g.dtype == np.float32
        assert relative_error(g.astype(np.float64), e) < 1e-5


# ---- activation functions and loss


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activation_and_slope_as_in_torch(name):
    z = np.concatenate([np.linspace(-8, 8, 201), [0.0, -1000.0, 1000.0]])
    leaf = torch.tensor(z, requires_grad=True)
    value = TORCH[name](leaf)
    value.sum().backward()
    ours = ACTIVATIONS[name]
    np.testing.assert_allclose(ours.value(z), value.detach(), rtol=0, atol=1e-12)
    np.testing.assert_allclose(ours.slope(z), leaf.grad, rtol=0, atol=1e-12)


def test_activations_by_hand():
    """Phi(0) = 1/2, so GELU(0) = 0 with slope 1/2; ReLU has slope 0 at its kink."""
    zero = np.array([0.0])
    assert [a.value(zero)[0] for a in (TANH, RELU, GELU)] == [0, 0, 0]
    assert [a.slope(zero)[0] for a in (TANH, RELU, GELU)] == [1, 0, 0.5]


@patient
@given(
    logits=st.lists(st.floats(-50, 50), min_size=1, max_size=6),
    scale=st.sampled_from([1.0, 1000.0]),
    seed=st.integers(0, 2**31),
)
def test_loss_as_in_torch(logits, scale, seed):
    z = scale * np.array(logits)[:, None]
    y = np.random.default_rng(seed).integers(0, 2, z.shape).astype(float)
    leaf = torch.tensor(z, requires_grad=True)
    expected = F.binary_cross_entropy_with_logits(leaf, torch.tensor(y))
    expected.backward()
    loss, delta = logistic_loss(z, y)
    np.testing.assert_allclose(loss, expected.item(), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(delta, leaf.grad, rtol=0, atol=1e-12)


def test_loss_by_hand():
    """At logit 0 the prediction is 1/2: loss ln 2, gradient (1/2 - y) / 2."""
    loss, delta = logistic_loss(np.zeros((2, 1)), np.array([[0.0], [1.0]]))
    assert abs(loss - math.log(2)) < 1e-15
    assert delta.tolist() == [[0.25], [-0.25]]


def test_sigmoid_neither_overflows_nor_leaves_its_range():
    p = sigmoid(np.array([-1000.0, -1.0, 0.0, 1.0, 1000.0]))
    assert p[[0, 2, 4]].tolist() == [0.0, 0.5, 1.0]
    assert abs(p[1] + p[3] - 1) < 1e-15
    assert abs(p[3] - 1 / (1 + math.exp(-1))) < 1e-15


# ---- numerical gradients


@patient
@given(x=st.floats(-2, 2), h=st.floats(1e-3, 0.5))
def test_central_difference_of_a_cube_is_off_by_h_squared(x, h):
    """((x+h)^3 - (x-h)^3) / 2h = 3x^2 + h^2, and the truncation error is all of h^2."""
    g = numeric_gradient(lambda v: (v**3).sum(), np.array([x]), h)
    assert abs(g[0] - (3 * x**2 + h**2)) < 1e-11


def test_central_difference_treats_each_entry_alone_and_leaves_x_as_it_is():
    a = np.arange(6.0).reshape(2, 3)
    x = np.ones((2, 3))
    before = x.copy()
    g = numeric_gradient(lambda v: (a * v).sum(), x, 1e-3)
    np.testing.assert_allclose(g, a, rtol=0, atol=1e-11)
    assert np.array_equal(x, before)


def test_step_taken_not_step_asked_for():
    """Near 1e4, float32 numbers lie 2^-10 apart, so a step of 1.1e-3 is rounded.

    The step taken is 2^-9 on a line of slope 1, and the answer is exactly 1;
    dividing by 2h would give 0.89.
    """
    g = numeric_gradient(lambda v: v.sum(), np.array([1e4], dtype=np.float32), 1.1e-3)
    assert g.tolist() == [1.0]


@pytest.mark.parametrize("h", [0.0, -1e-5, float("nan")])
def test_refuses_a_step_that_is_not_positive(h):
    with pytest.raises(ValueError, match="h must be a positive step"):
        numeric_gradient(lambda v: v.sum(), np.ones(1), h)


def test_refuses_a_step_that_rounding_swallows():
    with pytest.raises(ValueError, match="large enough to change x"):
        numeric_gradient(lambda v: v.sum(), np.array([1e3]), 1e-14)


def test_relative_error_by_hand():
    a = np.array([3.0, 4.0])  # norm 5
    assert relative_error(a, a) == 0
    assert relative_error(a, a / 2) == 0.5
    assert relative_error(a, -a) == 2
    assert relative_error(a, np.zeros(2)) == 1
    assert relative_error(np.zeros(2), np.zeros(2)) == 0
    assert abs(relative_error(a, np.array([-4.0, 3.0])) - math.sqrt(2)) < 1e-15


@patient
@given(seed=st.integers(0, 2**31), scale=st.floats(1e-6, 1e6))
def test_relative_error_ignores_the_unit_and_the_order(seed, scale):
    a, b = np.random.default_rng(seed).standard_normal((2, 5))
    error = relative_error(a, b)
    assert 0 < error <= 2
    assert relative_error(b, a) == error
    assert abs(relative_error(scale * a, scale * b) - error) < 1e-12


# ---- the gradient check and what it finds


def missing_half(layers, x, targets, activation):
    loss, grads = loss_and_gradients(layers, x, targets, activation)
    return loss, [Layer(grads[0].weight / 2, grads[0].bias), *grads[1:]]


def missing_slope(layers, x, targets, activation):
    flat_slope = Activation(activation.value, np.ones_like)
    return loss_and_gradients(layers, x, targets, flat_slope)


def wrong_transpose(layers, x, targets, activation):
    logits, saved = forward(layers, x, activation)
    loss, delta = logistic_loss(logits, targets)
    turned = [layers[0], Layer(layers[1].weight.mT, layers[1].bias), layers[2]]
    return loss, backward(turned, saved, delta, activation)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
@pytest.mark.parametrize("seed", range(3))
def test_the_right_derivation_passes(name, seed):
    config = MLPConfig((2, 8, 8, 1), name)
    layers = with_biases(initialise(config, seed), seed)
    x, targets = random_task(config.widths, seed)
    errors = check_gradients(layers, x, targets, ACTIVATIONS[name])
    assert sorted(errors) == ["W1", "W2", "W3", "b1", "b2", "b3"]
    assert max(errors.values()) < 1e-6


def test_the_check_finds_the_bug_and_its_layer():
    """|g - g/2| / |g| = 1/2, exactly where half is missing, and nowhere else."""
    layers, at = initialise(MLPConfig((2, 8, 8, 1)), 0), (XOR_INPUTS, XOR_TARGETS, TANH)
    errors = check_gradients(layers, *at, gradients=missing_half)
    assert abs(errors.pop("W1") - 0.5) < 1e-6
    assert max(errors.values()) < 1e-6
    for wrong in (missing_slope, wrong_transpose):
        errors = check_gradients(layers, *at, gradients=wrong)
        assert errors["W1"] > 0.1
        assert errors["W3"] < 1e-6  # the bugs act below the last layer only


def test_pitfall_the_loss_falls_so_the_gradient_is_right():
    """Two wrong derivations solve XOR from all of ten seeds."""
    layers = initialise(MLPConfig((2, 8, 8, 1)), range(10))
    for wrong in (missing_half, wrong_transpose):
        _, losses = train(
            layers, XOR_INPUTS, XOR_TARGETS, TANH, steps=500, lr=0.3, gradients=wrong
        )
        assert losses[-1].max() < 0.1
        one = [Layer(la.weight[0], la.bias[0]) for la in layers]
        errors = check_gradients(one, XOR_INPUTS, XOR_TARGETS, TANH, gradients=wrong)
        assert max(errors.values()) > 0.4


def test_without_the_slope_xor_stays_where_it_is():
    layers = initialise(MLPConfig((2, 8, 8, 1)), range(10))
    _, losses = train(
        layers,
        XOR_INPUTS,
        XOR_TARGETS,
        TANH,
        steps=500,
        lr=0.3,
        gradients=missing_slope,
    )
    assert losses[-1].min() > 0.5


def test_pitfall_a_check_at_the_kink_of_relu_fails_for_a_right_gradient():
    """With zero biases the input (0, 0) puts every unit at z = 0 exactly.

    The central difference averages the slopes 0 and 1 there, the convention (ours
    and torch's) says 0. The derivation is right; the point is badly chosen.
    """
    layers = initialise(MLPConfig((2, 4, 1), "relu"), 0)
    errors = check_gradients(layers, XOR_INPUTS, XOR_TARGETS, RELU)
    assert errors["b1"] > 0.1
    _, ours = loss_and_gradients(layers, XOR_INPUTS, XOR_TARGETS, RELU)
    _, theirs = in_torch(layers, XOR_INPUTS, XOR_TARGETS, "relu")
    np.testing.assert_allclose(ours[0].bias, theirs[1], rtol=0, atol=1e-12)
    moved = with_biases(layers, 0)
    assert max(check_gradients(moved, XOR_INPUTS, XOR_TARGETS, RELU).values()) < 1e-6


# ---- initialisation


@pytest.mark.parametrize("init", ["tiny", "huge", "xavier", "he"])
def test_spread_of_the_weights_within_five_sigma(init):
    """The relative error of a sample deviation is 1/sqrt(2n) for normal numbers.

    False alarm once in 1.7 million runs of a fresh seed; the seed is fixed.
    """
    n_in, n_out = 300, 500
    layer = initialise(MLPConfig((n_in, n_out), init=init), 3)[0]
    expected = {
        "tiny": 0.01,
        "huge": 1.0,
        "xavier": (2 / 800) ** 0.5,
        "he": nn_gain("relu") / n_in**0.5,
    }[init]
    n = n_in * n_out
    assert abs(layer.weight.std() / expected - 1) < 5 / (2 * n) ** 0.5
    assert abs(layer.weight.mean()) < 5 * expected / n**0.5
    assert not layer.bias.any()


def nn_gain(name):
    return torch.nn.init.calculate_gain(name)


def test_a_seed_means_the_same_network_alone_and_in_company():
    config = MLPConfig((2, 3, 1))
    together, alone = initialise(config, [5, 6]), initialise(config, 6)
    for many, one in zip(flat(together), flat(alone), strict=True):
        assert np.array_equal(many[1], one)
        assert many.shape == (2, *one.shape)
    single = initialise(config, 6, np.float32)[0].weight
    assert single.dtype == np.float32
    assert np.array_equal(single, alone[0].weight.astype(np.float32))


def test_the_same_seed_for_data_and_weights_does_not_tie_them():
    """Correlation of 10,000 pairs within five sigma; one stream would give 1."""
    data = np.random.default_rng(0).standard_normal((100, 100))
    weight = initialise(MLPConfig((100, 100), init="huge"), 0)[0].weight
    assert abs(np.corrcoef(data.ravel(), weight.ravel())[0, 1]) < 0.05


def test_he_keeps_the_scale_of_a_deep_relu_network_and_xavier_halves_its_square():
    """Per layer E[h^2] stays (He) or halves (Xavier): 2^-4 after eight layers, in rms.

    The spread between networks is 5/n a layer in ln E[h^2], here 0.16 in ln rms, so a
    factor 1.8 is 3.7 sigma: a fresh seed would fail once in 4,000 runs.
    """
    x = np.random.default_rng(0).standard_normal((200, 400))
    for init, expected in (("he", 1.0), ("xavier", 2**-4)):
        layers = initialise(MLPConfig((400,) * 9 + (1,), "relu", init), 0)
        _, saved = forward(layers, x, RELU)
        rms = np.sqrt((saved[-1].inputs ** 2).mean())
        assert 1 / 1.8 < rms / expected < 1.8


def test_from_zeros_nothing_ever_moves():
    """Every gradient but that of the last bias has a factor 0; XOR is balanced."""
    layers = initialise(MLPConfig((2, 4, 1), init="zeros"), 0)
    trained, losses = train(layers, XOR_INPUTS, XOR_TARGETS, TANH, steps=50, lr=1.0)
    assert not any(a.any() for a in flat(trained))
    assert np.array_equal(losses, np.full(50, losses[0]))
    assert abs(losses[0] - math.log(2)) < 1e-15


@patient
@given(seed=st.integers(0, 2**31), name=st.sampled_from(sorted(ACTIVATIONS)))
def test_equal_units_get_equal_gradients(seed, name):
    """Two hidden units that start equal cannot part."""
    layers = initialise(MLPConfig((2, 1, 1), name), seed)
    twins = [
        Layer(np.repeat(layers[0].weight, 4, axis=0), np.zeros((1, 4))),
        Layer(np.repeat(layers[1].weight, 4, axis=1), np.zeros((1, 1))),
    ]
    trained, _ = train(
        twins, XOR_INPUTS, XOR_TARGETS, ACTIVATIONS[name], steps=20, lr=0.5
    )
    assert np.ptp(trained[0].weight, axis=0).max() < 1e-12
    assert np.ptp(trained[1].weight) < 1e-12


# ---- XOR


@patient
@given(w=st.tuples(st.floats(-30, 30), st.floats(-30, 30)), b=st.floats(-30, 30))
def test_no_linear_model_gets_below_ln_2(w, b):
    logits = XOR_INPUTS @ np.array(w)[:, None] + b
    assert logistic_loss(logits, XOR_TARGETS)[0] >= math.log(2) - 1e-12


@patient
@given(
    w=st.tuples(st.floats(-30, 30), st.floats(-30, 30)),
    b=st.floats(-30, 30),
    v=st.floats(-30, 30),
    c=st.floats(-30, 30),
)
def test_no_single_monotone_unit_gets_below_three_pooled_points(w, b, v, c):
    pre = XOR_INPUTS @ np.array(w)[:, None] + b
    for unit in (TANH, RELU):
        loss, _ = logistic_loss(v * unit.value(pre) + c, XOR_TARGETS)
        assert loss >= POOLED_THREE - 1e-12


def test_one_gelu_unit_is_enough_because_it_is_not_monotone():
    """z = -4, -1, -1, 2: GELU = 0.00, -0.16, -0.16, 1.95, so the ones lie lowest."""
    layers = [
        Layer(np.array([[3.0, 3.0]]), np.array([[-4.0]])),
        Layer(np.array([[-50.0]]), np.array([[-4.0]])),
    ]
    logits, _ = forward(layers, XOR_INPUTS, GELU)
    assert ((logits > 0) == (XOR_TARGETS > 0)).all()


def test_tanh_network_learns_xor_from_all_of_twenty_seeds():
    layers = initialise(MLPConfig((2, 8, 1)), range(20))
    _, losses = train(layers, XOR_INPUTS, XOR_TARGETS, TANH, steps=500, lr=1.0)
    assert losses.shape == (500, 20)
    assert losses[-1].max() < 0.1 < losses[0].min()


def test_training_is_sgd_of_torch_step_for_step():
    config = MLPConfig((2, 4, 1))
    layers = initialise(config, 0)
    before = [a.copy() for a in flat(layers)]
    trained, losses = train(layers, XOR_INPUTS, XOR_TARGETS, TANH, steps=30, lr=0.7)
    for a, b in zip(flat(layers), before, strict=True):
        assert np.array_equal(a, b)  # the start is left as it was
    theirs = [torch.tensor(a, requires_grad=True) for a in flat(layers)]
    optimizer = torch.optim.SGD(theirs, lr=0.7)
    for step in range(30):
        h = torch.tanh(torch.tensor(XOR_INPUTS) @ theirs[0].mT + theirs[1])
        logits = h @ theirs[2].mT + theirs[3]
        loss = F.binary_cross_entropy_with_logits(logits, torch.tensor(XOR_TARGETS))
        assert abs(losses[step] - loss.item()) < 1e-12
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for ours, leaf in zip(flat(trained), theirs, strict=True):
        np.testing.assert_allclose(ours, leaf.detach(), rtol=0, atol=1e-12)


def test_dead_units_by_hand():
    """Column 0 is never positive, column 1 once, column 2 sits at the kink."""
    pre = np.array([[-1.0, -1.0, 0.0], [-2.0, 0.5, 0.0]])
    assert dead_units(pre, RELU).tolist() == [True, False, True]
    assert dead_units(pre, GELU).tolist() == [False, False, False]


def test_a_dead_unit_gets_no_gradient():
    layers = initialise(MLPConfig((2, 16, 1), "relu"), 0)
    _, saved = forward(layers, XOR_INPUTS, RELU)
    dead = dead_units(saved[0].pre, RELU)
    _, grads = loss_and_gradients(layers, XOR_INPUTS, XOR_TARGETS, RELU)
    assert dead.any()
    assert not dead.all()
    assert not grads[0].weight[dead].any()
    assert (grads[0].weight[~dead] != 0).any(1).all()


def test_a_quarter_of_the_relu_units_is_born_dead_on_xor():
    """Dead if both weights are negative: probability 1/4. Five sigma of 20,000."""
    layers = initialise(MLPConfig((2, 20_000, 1), "relu"), 0)
    _, saved = forward(layers, XOR_INPUTS, RELU)
    share = dead_units(saved[0].pre, RELU).mean()
    assert abs(share - 0.25) < 5 * (0.25 * 0.75 / 20_000) ** 0.5


# ---- config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"widths": (2,)}, "widths must name"),
        ({"widths": (2, 0, 1)}, "widths must name"),
        ({"activation": "sigmoid"}, "activation must be one of"),
        ({"init": "Xavier"}, "init must be one of"),
    ],
)
def test_config_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        MLPConfig(**fields)


def test_every_start_has_the_widths_of_the_config():
    for init in WEIGHT_STD:
        config = MLPConfig((3, 5, 2, 1), init=init)
        shapes = [layer.weight.shape for layer in initialise(config, 0)]
        assert shapes == [(n_out, n_in) for n_in, n_out in pairwise(config.widths)]


def test_float64_checks_a_million_times_sharper_than_float32():
    """The best central difference is off by about eps^(2/3): 4e-11 against 2e-5."""
    best = {}
    for dtype, steps in ((np.float64, (1e-6, 1e-5, 1e-4)), (np.float32, (1e-3, 1e-2))):
        net = initialise(MLPConfig((2, 4, 1)), 0, dtype)
        x, y = XOR_INPUTS.astype(dtype), XOR_TARGETS.astype(dtype)
        best[dtype] = min(check_gradients(net, x, y, TANH, h=h)["W1"] for h in steps)
    assert best[np.float64] < 1e-8
    assert best[np.float32] > 1e-6
