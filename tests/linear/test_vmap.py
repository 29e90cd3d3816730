"""Linear + cross-entropy under vmap: right in any order, without a layer per entry."""

import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.loss_cases import plain_linear_loss as plain

from jaxsoftmax import linear_softmax_cross_entropy, linear_token_logprobs_and_entropy

# All that is of tokens is smaller than two gradients of weights.
B, T, H, V = 6, 5, 48, 40
_rng = np.random.default_rng(0)
X = _rng.normal(size=(B, T, H)).astype(np.float32)
WEIGHTS = (_rng.normal(size=(H, V)) / 4).astype(np.float32)
BIAS = _rng.normal(size=V).astype(np.float32)
LABELS = _rng.integers(0, V, (B, T)).astype(np.int32)
LABELS[0, :3] = LABELS[4] = -100  # the means are over different numbers of tokens
ARGS = (X, LABELS, WEIGHTS, BIAS)


def ours(x, labels, weights, bias, reduction):
    return linear_softmax_cross_entropy(
        x, labels, weights, bias=bias, ignore_index=-100, reduction=reduction
    )


def squares(each):
    """A sum that multiplies each by a number of its own."""
    return jnp.sum(each**2)


def layer_call(f, x, labels, weights, bias, mapped):
    """`mapped` of f as a function of x, weights and bias, and its arguments."""
    return (
        lambda x, w, b: mapped(lambda x, y: f(x, y, w, b))(x, labels),
        (x, weights, bias),
    )


def gradient_of_vmap(f, *args):
    g, arrays = layer_call(f, *args, jax.vmap)
    return jax.value_and_grad(lambda *a: squares(g(*a)), (0, 1, 2))(*arrays)


def other_axes(f, x, labels, weights, bias):
    """In another place of each."""
    mapped = lambda f: jax.vmap(f, (1, 1), -1)
    g, arrays = layer_call(f, x, labels, weights, bias, mapped)
    value, pull = jax.vjp(g, *arrays)
    return value, pull(jnp.cos(value))


def nested(f, x, labels, weights, bias):
    mapped = lambda f: jax.vmap(jax.vmap(f, (1, None)), (0, 0))
    x = jnp.stack([x, 2 * x], 2)
    g, arrays = layer_call(f, x, labels, weights, bias, mapped)
    return jax.value_and_grad(lambda *a: squares(g(*a)), (0, 1, 2))(*arrays)


def labels_alone(f, x, labels, weights, bias):
    each = lambda w: jax.vmap(lambda y: f(x[0], y, w, bias))(labels)
    return jax.value_and_grad(lambda w: squares(each(w)))(weights)


def jvp_of_vmap(f, *args):
    g, arrays = layer_call(f, *args, jax.vmap)
    return jax.jvp(g, arrays, jax.tree.map(jnp.cos, arrays))


def hvp_of_vmap(f, *args):
    g, arrays = layer_call(f, *args, jax.vmap)
    gradient = jax.grad(lambda *a: squares(g(*a)), (0, 1, 2))
    return jax.jvp(gradient, arrays, jax.tree.map(jnp.cos, arrays))[1]


def within_scan(f, x, labels, weights, bias):
    """Under checkpoint, as the last layer of a model that loops over microbatches."""
    each = jax.checkpoint(lambda x, y, w: jax.vmap(lambda x, y: f(x, y, w, bias))(x, y))

    def total(w):
        step = lambda sum, xy: (sum + squares(each(*xy, w)), None)
        halves = x.reshape(2, B // 2, T, H), labels.reshape(2, B // 2, T)
        return jax.lax.scan(step, jnp.float32(0), halves)[0]

    return jax.value_and_grad(total)(weights)


def vmap_of_gradient(f, x, labels, weights, bias):
    """A gradient of weights for each entry is what is asked for."""
    g = jax.grad(lambda w, x, y: squares(f(x, y, w, bias)))
    return jax.vmap(g, (None, 0, 0))(weights, x, labels)


def vmap_of_gradient_of_x(f, x, labels, weights, bias):
    g = jax.grad(lambda x, y: squares(f(x, y, weights, bias)))
    return jax.vmap(g)(x, labels)


def vmap_of_jvp(f, x, labels, weights, bias):
    def g(x, y):
        of = lambda x, w: f(x, y, w, bias)
        return jax.jvp(of, (x, weights), (jnp.cos(x), jnp.cos(weights)))

    return jax.vmap(g)(x, labels)


def mapped_weights(f, x, labels, weights, bias):
    """Two layers, and x of both."""
    layers = jnp.stack([weights, 2 * weights], 1)
    each = lambda w, x: jax.vmap(lambda w: f(x, labels, w, bias), 1)(w)
    return jax.value_and_grad(lambda w, x: squares(each(w, x)), (0, 1))(layers, x)


def mapped_bias_within_mapped_tokens(f, x, labels, weights, bias):
    biases = jnp.stack([bias, 2 * bias])

    def total(x, w, b):
        mapped_bias = lambda x, y: jax.vmap(lambda b: f(x, y, w, b))(b)
        return squares(jax.vmap(mapped_bias)(x, labels))

    return jax.value_and_grad(total, (0, 1, 2))(x, weights, biases)


def one_token_each(f, x, labels, weights, bias):
    """Without a dimension of tokens but the mapped one."""
    x, labels = x[:, 0], labels[:, 0]
    g, arrays = layer_call(f, x, labels, weights, bias, jax.vmap)
    return jax.value_and_grad(lambda *a: squares(g(*a)), (0, 1, 2))(*arrays)


SMALL = [
    gradient_of_vmap,
    other_axes,
    nested,
    labels_alone,
    jvp_of_vmap,
    hvp_of_vmap,
    within_scan,
    one_token_each,
    vmap_of_gradient_of_x,
]
LARGE = [
    vmap_of_gradient,
    vmap_of_jvp,
    mapped_weights,
    mapped_bias_within_mapped_tokens,
]


def largest(lowered):
    """The number of entries of the largest array in the program."""
    shapes = set(re.findall(r"tensor<((?:\d+x)+)[a-z]", lowered.as_text()))
    return max(math.prod(int(n) for n in s.split("x")[:-1]) for s in shapes)


def check(got, want, tolerance=4e-6):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max(), rtol=0)


CASES = [
    *itertools.product(SMALL + LARGE, ["mean", "none"]),
    (gradient_of_vmap, "sum"),
]


@pytest.mark.parametrize(
    ("mode", "reduction"),
    CASES,
    ids=lambda value: getattr(value, "__name__", value),
)
@pytest.mark.pairwise(1)
def test_values_and_memory(mode, reduction):
    f, want = (
        jax.jit(functools.partial(mode, functools.partial(g, reduction=reduction)))
        for g in (ours, plain)
    )
    lowered = f.lower(*ARGS)
    check(lowered.compile()(*ARGS), want(*ARGS))
    if mode in SMALL:
        # Of the weights there is one gradient, not one for each entry.
        assert largest(lowered) < 2 * H * V


def test_without_jit():
    f = functools.partial(gradient_of_vmap, functools.partial(ours, reduction="mean"))
    want = functools.partial(
        gradient_of_vmap, functools.partial(plain, reduction="mean")
    )
    check(f(*ARGS), jax.jit(want)(*ARGS))


@pytest.mark.versions
def test_jaxpr_of_a_mapped_mean():
    """One operation with the layer as it is, until a derivative is taken of it."""
    f = functools.partial(ours, reduction="mean")
    mapped = jax.vmap(f, (0, 0, None, None))
    jaxpr = jax.make_jaxpr(mapped)(*ARGS)
    (call,) = (e for e in jaxpr.eqns if e.primitive.name == "linear_loss")
    shapes = [x.aval.shape for x in call.invars]
    assert (H, V) in shapes
    assert [x.aval.shape for x in call.outvars] == [(B,)]
    total = lambda w: jnp.sum(mapped(X, LABELS, w, BIAS))
    jaxpr = jax.make_jaxpr(jax.grad(total))(WEIGHTS)
    sizes = [x.aval.size for e in jaxpr.eqns for x in e.outvars]
    assert max(sizes) < 2 * H * V


def everything(x, labels, weights, where, scale, class_weights):
    found = linear_softmax_cross_entropy(
        x,
        labels,
        weights,
        where=where,
        scale=scale,
        class_weights=class_weights,
        ignore_index=-100,
        label_smoothing=0.1,
        z_loss=1e-2,
        return_lse=True,
        reduction="mean",
    )
    return found, linear_token_logprobs_and_entropy(
        x, jnp.maximum(labels, 0), weights, where=where, scale=scale
    )


@pytest.mark.versions
@pytest.mark.parametrize(
    "axes", [(0, 0, None, 0, 0, None), (0, None, None, None, None, 0)], ids=str
)
def test_everything_that_a_token_may_have(axes):
    """Each entry as in a call of its own."""
    rng = np.random.default_rng(1)
    arrays = [
        X,
        LABELS,
        WEIGHTS,
        rng.random((B, T)) < 0.8,
        rng.uniform(0.5, 2, (B, T)).astype(np.float32),
        rng.uniform(0.5, 2, (B, V)).astype(np.float32),
    ]
    # What is not mapped is that of the first entry, but for the weights.
    arrays = [
        a if i is not None or a is WEIGHTS else a[0]
        for a, i in zip(arrays, axes, strict=True)
    ]
    got = jax.jit(jax.vmap(everything, axes))(*arrays)
    each = [
        jax.jit(everything)(
            *(a if i is None else a[k] for a, i in zip(arrays, axes, strict=True))
        )
        for k in range(B)
    ]
    want = jax.tree.map(lambda *entries: np.stack(entries), *each)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6, rtol=2e-6), got, want
    )


@pytest.mark.versions
def test_spmd_axis_name():
    """The name of a mesh axis for what is mapped makes no difference to values."""
    mesh = jax.make_mesh((1,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    f = functools.partial(ours, reduction="mean")
    mapped = jax.vmap(f, (0, 0, None, None), spmd_axis_name="a")
    want = jax.vmap(functools.partial(plain, reduction="mean"), (0, 0, None, None))
    with jax.set_mesh(mesh):
        got = jax.jit(mapped)(*ARGS)
    np.testing.assert_allclose(got, want(*ARGS), rtol=2e-6)
