"""Every floating dtype, through every function: float32 inside, rounded at the end."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from support import oracle
from support.compilation import exact_jit
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

NARROW = [name for name in dir(ml_dtypes) if name.startswith("float")]
# Of fewer bits XLA for CPU rounds wrongly in some versions, or has no conversion.
DTYPES = [n for n in NARROW if n.startswith("float8") and n != "float8_e8m0fnu"]
# With infinities and without; the others differ in digits alone.
COMMON = ("float8_e5m2", "float8_e4m3fn")
LABELS = np.array([0, 3, 2, 1], np.int32)
WHERE = np.array([[True, True, True, True, False]])


def values(rng, shape, dtype):
    """Numbers of the dtype; skips one that jax has no arrays of."""
    try:
        return jnp.array(rng.normal(size=shape).astype(getattr(ml_dtypes, dtype)))
    except jax.errors.JaxRuntimeError as error:
        pytest.skip(f"refused: {error}")


def wide(tree):
    return jax.tree.map(lambda a: a.astype(np.float32), tree)


def assert_rounded(got, want, dtype, slack=0.0):
    """Within a rounding of what is right; where that is out of range, what it becomes.

    With `slack` anything is taken there, and that much more elsewhere.
    """
    info = jnp.finfo(dtype)
    assert got.dtype == dtype
    got, want = np.asarray(wide(got)), np.asarray(want, np.float32)
    inside = np.abs(want) <= float(info.max)
    error = np.abs(got[inside] - want[inside])
    bound = float(info.eps) * np.abs(want[inside]) + float(info.smallest_subnormal)
    assert (error <= bound + slack).all(), (got, want)
    if not slack:
        beyond = np.asarray(wide(jnp.array(want).astype(dtype)))
        np.testing.assert_array_equal(got[~inside], beyond[~inside])


def _everything(x, t, w, b, g):
    """Values and gradients of all functions, by name."""
    labels, where = LABELS, WHERE
    options = {"where": where, "label_smoothing": 0.1, "z_loss": 0.01}
    integer_loss = softmax_cross_entropy_with_integer_labels
    linear = linear_softmax_cross_entropy
    calls = {
        "softmax": (lambda x: softmax(x, where=where), x),
        "log_softmax": (lambda x: log_softmax(x, where=where), x),
        "integer": (lambda x: integer_loss(x, labels, **options), x),
        "dense": (lambda x, t: softmax_cross_entropy(x, t, **options), x, t),
        "tokens": (lambda x: token_logprobs_and_entropy(x, labels, where=where), x),
        # Each gradient is a small part of the whole, and not lost in a loss scale.
        "mean": (lambda x: 64 * integer_loss(x, labels, reduction="mean"), x),
        "linear": (lambda *a: linear(a[0], labels, a[1], bias=a[2]), t, w, b),
        "linear mean": (lambda x, w: 64 * linear(x, labels, w, reduction="mean"), t, w),
        "linear tokens": (
            lambda x, w: linear_token_logprobs_and_entropy(x, labels, w),
            t,
            w,
        ),
    }
    found, one = {}, jnp.ones(())
    for name, (f, *arrays) in calls.items():
        y, pull = jax.vjp(f, *arrays)
        ct = g if name in ("softmax", "log_softmax") else g[:, 0]
        ct = jax.tree.map(lambda y, ct=ct: (ct if y.ndim else one).astype(y.dtype), y)
        found[name] = y, pull(ct)
    return found


everything, exactly_everything = jax.jit(_everything), exact_jit(_everything)


@pytest.mark.parametrize(
    "dtype",
    [pytest.param(n, marks=[pytest.mark.slow] * (n not in COMMON)) for n in DTYPES],
)
def test_every_function(rng, nans_allowed, dtype):
    x, t = values(rng, (4, 5), dtype), jnp.abs(values(rng, (4, 5), dtype))
    w, b = values(rng, (5, 5), dtype), values(rng, 5, dtype)
    g = values(rng, (4, 5), dtype)
    # To this dtype XLA for CPU rounds wrongly in code that is quick to compile.
    run = exactly_everything if dtype == "float8_e4m3fnuz" else everything
    got = run(x, t, w, b, wide(g))
    want = everything(*wide((x, t, w, b, g)))
    (p, (dx,)), (y, (dy,)) = got.pop("softmax"), got.pop("log_softmax")
    assert_rounded(p, oracle.softmax(wide(x), -1, WHERE), x.dtype)
    # Of P in few digits, which may not sum to 1, the gradient still sums to 0.
    assert_rounded(dx, oracle.softmax_derivative(wide(p), wide(g)), x.dtype)
    assert_rounded(y, oracle.log_softmax(wide(x), -1, WHERE), x.dtype)
    assert_rounded(dy, oracle.log_softmax_vjp(wide(x), wide(g), -1, WHERE), x.dtype)
    for name, (y, d) in got.items():
        wanted, wanted_d = want[name]
        for a, c in zip(*map(jax.tree.leaves, (y, wanted)), strict=True):
            np.testing.assert_allclose(a, c, rtol=16 * EPS, atol=EPS)
        for a, c in zip(d, wanted_d, strict=True):
            # The gradient of the logits in bfloat16, in a sum of 5 products.
            slack = 5 * 64 * 2**-9 * ("linear" in name)
            assert_rounded(a, c, x.dtype, slack)


def test_mixed(rng):
    """8 bits beside others: jax itself promotes none of these."""
    x, w = values(rng, (4, 3), "float8_e4m3fn"), values(rng, (3, 5), "float8_e5m2")
    want = linear_softmax_cross_entropy(wide(x), LABELS, wide(w))
    with jax.numpy_dtype_promotion("standard"):
        for weights in (w, w.astype(np.float32)):
            got = linear_softmax_cross_entropy(x, LABELS, weights)
            np.testing.assert_allclose(got, want, rtol=16 * EPS)


def test_many_classes(rng):
    """P is between two subnormal numbers: the sum of what it becomes is far from 1."""
    x = jnp.zeros((2, 700), jnp.float8_e4m3fn)
    g = jnp.array(rng.normal(size=(2, 700)), x.dtype)
    p, pull = jax.vjp(softmax, x)
    assert abs(float(jnp.sum(wide(p)[0])) - 1) > 0.3
    want = oracle.softmax_derivative(wide(p), wide(g))
    assert_rounded(pull(g)[0], want, x.dtype)


UNSIGNED = {
    "x": lambda a: softmax(a),
    "logits": lambda a: softmax_cross_entropy_with_integer_labels(a, LABELS),
    "labels": lambda a: softmax_cross_entropy(jnp.ones((4, 5)), a),
    "weights": lambda a: linear_softmax_cross_entropy(jnp.ones((4, 4)), LABELS, a),
    "bias": lambda a: linear_softmax_cross_entropy(
        jnp.ones((4, 3)), LABELS, jnp.ones((3, 5)), bias=a[0]
    ),
    "class_weights": lambda a: softmax_cross_entropy(
        jnp.ones((4, 5)), jnp.ones((4, 5)), class_weights=a[0]
    ),
    "scale": lambda a: log_softmax(jnp.ones((4, 5)), scale=a),
    "dtype": lambda a: softmax(jnp.ones(3), dtype=a.dtype),
}


@pytest.mark.parametrize("name", UNSIGNED)
def test_no_zero(name):
    a = jnp.ones((4, 5), jnp.float8_e8m0fnu)
    message = f"^{name} must have a floating dtype that holds 0 .* got float8_e8m0fnu"
    with pytest.raises(TypeError, match=message):
        UNSIGNED[name](a)


@pytest.mark.parametrize("dtype", NARROW)
def test_dtypes_that_jax_has_no_arrays_of(dtype):
    """They are refused by name; the others are not."""
    array = np.ones(3, getattr(ml_dtypes, dtype))
    try:
        jnp.asarray(array)
    except jax.errors.JaxRuntimeError:
        with pytest.raises(TypeError, match=f"x must be .* dtype {dtype}"):
            softmax(array)
        with pytest.raises(TypeError, match=f"dtype={dtype}: this jax has no arrays"):
            softmax(jnp.ones(3), dtype=array.dtype)
