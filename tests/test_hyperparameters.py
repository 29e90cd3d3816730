"""Numbers of a loss in every form that they come in: arrays, variables, traced ones."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.loss_cases import EPS

from jaxsoftmax import (
    linear_softmax_cross_entropy,
    linear_token_logprobs_and_entropy,
    log_softmax,
    softmax,
    softmax_cross_entropy,
    softmax_cross_entropy_with_integer_labels,
    token_logprobs_and_entropy,
)

RNG = np.random.default_rng(0)
LOGITS = jnp.asarray(RNG.normal(size=(3, 4, 7)), "float32")
LABELS = jnp.asarray(RNG.integers(0, 7, (3, 4)), "int32")
CLASSES = jnp.asarray(RNG.dirichlet(np.ones(7), (3, 4)), "float32")
X = jnp.asarray(RNG.normal(size=(3, 4, 5)), "float32")
LAYER = jnp.asarray(RNG.normal(size=(5, 7)), "float32")
OF_CLASSES = jnp.asarray(RNG.uniform(size=7), "float32")

LOSSES = {
    "integer": (
        lambda x, **options: softmax_cross_entropy_with_integer_labels(
            x, LABELS, **options
        ),
        LOGITS,
    ),
    "dense": (
        lambda x, **options: softmax_cross_entropy(x, CLASSES, **options),
        LOGITS,
    ),
    "linear": (
        lambda x, **options: linear_softmax_cross_entropy(x, LABELS, LAYER, **options),
        X,
    ),
}
NUMBERS = (
    np.float64(0.25),
    np.float16(0.25),
    np.array(0.25, jnp.bfloat16)[()],
    np.array(0.25, np.float32),
    jnp.float32(0.25),
    nnx.Param(jnp.float32(0.25)),
    nnx.Param(0.25),
)


@pytest.fixture(params=LOSSES)
def loss(request):
    return LOSSES[request.param]


def close(got, want, rtol=16 * EPS):
    """Within the rounding of a few sums, of the largest entry too."""
    bar = rtol * np.max(np.abs(want), initial=1e-3)
    np.testing.assert_allclose(got, want, rtol=rtol, atol=bar)


@pytest.mark.parametrize("option", ["label_smoothing", "z_loss", "logits_soft_cap"])
def test_an_array_of_one_number_is_that_number(loss, option):
    f, x = loss
    want = f(x, **{option: 0.25})
    for number in NUMBERS:
        np.testing.assert_array_equal(f(x, **{option: number}), want)


def test_scale_in_every_form(loss):
    f, x = loss
    for number in NUMBERS:
        close(f(x, scale=number), f(x, scale=0.25))


def test_scale_of_the_other_functions():
    functions = (
        softmax,
        log_softmax,
        lambda x, scale: token_logprobs_and_entropy(x, LABELS, scale=scale),
        lambda _, scale: linear_token_logprobs_and_entropy(
            X, LABELS, LAYER, scale=scale
        ),
    )
    for f in functions:
        for number in NUMBERS:
            jax.tree.map(close, f(LOGITS, scale=number), f(LOGITS, scale=0.25))


def test_variables_as_arrays():
    """What a library keeps arrays in."""
    v = nnx.Param
    options = {"reduction": "sum", "class_weights": OF_CLASSES, "bias": OF_CLASSES}
    got = linear_softmax_cross_entropy(
        v(X),
        v(LABELS),
        v(LAYER),
        bias=v(OF_CLASSES),
        class_weights=v(OF_CLASSES),
        where=v(LABELS > 1),
        reduction="sum",
        scale=v(OF_CLASSES[:4]),
    )
    want = linear_softmax_cross_entropy(
        X, LABELS, LAYER, where=LABELS > 1, scale=OF_CLASSES[:4], **options
    )
    assert got == want
    rows = v(OF_CLASSES.reshape(1, 1, 7))
    got = softmax(v(LOGITS), where=v(LOGITS > 0), scale=rows)
    want = softmax(LOGITS, where=LOGITS > 0, scale=OF_CLASSES.reshape(1, 1, 7))
    np.testing.assert_array_equal(got, want)


def total(f, weights, reduction, x, smoothing, z_loss):
    options = {} if weights is None else {"class_weights": weights}
    found = f(
        x, label_smoothing=smoothing, z_loss=z_loss, reduction=reduction, **options
    )
    return jnp.sum(found)


@pytest.mark.parametrize("weights", [None, OF_CLASSES], ids=["", "class_weights"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.pairwise(1)
def test_traced(loss, weights, reduction):
    """One program for all values: the loss, and its gradient in each argument.

    The loss is linear in both numbers, so that differences are derivatives.
    """
    f, x = loss
    of = partial(total, f, weights, reduction)
    traces = []

    def counted(*args):
        traces.append(None)
        return of(*args)

    traced = jax.jit(jax.value_and_grad(counted, (0, 1, 2)))
    known = jax.jit(jax.value_and_grad(of), static_argnums=(1, 2))
    slopes = [
        (known(x, 0.5, 0.25)[0] - known(x, 0.0, 0.25)[0]) * 2,
        (known(x, 0.5, 0.25)[0] - known(x, 0.5, 0.0)[0]) * 4,
    ]
    for smoothing, z_loss in ((0.5, 0.25), (0.0, 0.25), (0.5, 0.0)):
        value, (dx, *d_numbers) = traced(x, smoothing, z_loss)
        want, want_dx = known(x, smoothing, z_loss)
        close(value, want)
        close(dx, want_dx)
        size = 4 * np.abs(want)  # of what the differences are of
        np.testing.assert_allclose(d_numbers, slopes, atol=16 * EPS * (1 + size))
    assert len(traces) == 1


def test_vmap_over_numbers(loss):
    f, x = loss
    of = partial(total, f, None, "mean")
    numbers = jnp.array([0.0, 0.1, 0.3]), jnp.array([0.2, 0.0, 0.1])
    mapped = jax.vmap(jax.value_and_grad(of), (None, 0, 0))
    value, dx = jax.jit(mapped)(x, *numbers)
    known = jax.jit(jax.value_and_grad(of), static_argnums=(1, 2))
    for i, each in enumerate(zip(*numbers, strict=True)):
        want, want_dx = known(x, *map(float, each))
        close(value[i], want)
        close(dx[i], want_dx)


def test_scales_of_one_program(loss):
    f, x = loss
    scales = jnp.array([0.5, 2.0])
    gradient = jax.grad(lambda x, scale: jnp.sum(f(x, scale=scale)))
    got = jax.jit(jax.vmap(gradient, (None, 0)))(x, scales)
    for each, scale in zip(got, (0.5, 2.0), strict=True):
        close(each, gradient(x, scale))


@pytest.mark.parametrize("name", ["integer", "linear"])
def test_a_traced_0_leaves_a_term_out(name):
    """One that is infinite too: the mean over classes of -log P, lse squared."""
    lowest = jnp.zeros(7).at[:3].set(jnp.finfo("float32").min)
    labels = jnp.full((2,), 5)
    if name == "integer":
        x = jnp.stack([lowest, jnp.full(7, 2e19)])
        f = partial(softmax_cross_entropy_with_integer_labels, labels=labels)
    else:
        x = jnp.array([[1.0, 0.0], [0.0, 1.0]])
        layer = jnp.stack([lowest, jnp.full(7, 2e19)])
        f = partial(linear_softmax_cross_entropy, labels=labels, weights=layer)

    def of(x, smoothing, z_loss):
        return jnp.sum(f(x, label_smoothing=smoothing, z_loss=z_loss))

    value, grads = jax.jit(jax.value_and_grad(of, (0, 1, 2)))(x, 0.0, 0.0)
    want, dx = jax.value_and_grad(of)(x, 0.0, 0.0)
    np.testing.assert_array_equal(value, want)
    np.testing.assert_array_equal(grads[0], dx)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
