"""A search over shapes, axes, masks, scales and values, against the oracle."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from support import oracle

from jaxsoftmax import log_softmax, logsumexp, softmax

# Large finite logits, ties, -inf: all that a row may hold but NaN and +inf.
LOGITS = st.one_of(
    st.floats(-1e4, 1e4, width=32),
    st.sampled_from([0.0, 1.0, -np.inf, 3e38, -3e38]),
)
FUNCTIONS = {
    softmax: (oracle.softmax, oracle.softmax_vjp),
    log_softmax: (oracle.log_softmax, oracle.log_softmax_vjp),
}


@st.composite
def calls(draw):
    shape = draw(hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=5))
    x = draw(hnp.arrays(np.float32, shape, elements=LOGITS))
    g = draw(hnp.arrays(np.float32, shape, elements=st.floats(-100, 100, width=32)))
    ndim = len(shape)
    axes = st.sets(st.integers(0, ndim - 1)).map(tuple)
    axis = draw(st.one_of(st.none(), st.integers(-ndim, ndim - 1), axes))
    mask_shape = tuple(draw(st.sampled_from([1, n])) for n in shape)
    where = draw(st.one_of(st.none(), hnp.arrays(bool, mask_shape)))
    return x, g, axis, where


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(calls(), st.sampled_from(list(FUNCTIONS)))
def test_against_oracle(call, f):
    x, g, axis, where = call
    value, gradient = FUNCTIONS[f]
    with np.errstate(all="ignore"):
        want, want_dx = value(x, axis, where), gradient(x, g, axis, where)
    y, pull = jax.vjp(functools.partial(f, axis=axis, where=where), jnp.array(x))
    dx = pull(jnp.array(g))[0]
    finite = np.isfinite(want)
    # The oracle keeps what float32 cannot: y beyond its range is -inf there too.
    in_range = finite & (np.abs(want) < 3e38)
    got = np.asarray(y, np.float64)
    np.testing.assert_array_equal(got[~finite], want[~finite].astype(float))
    np.testing.assert_allclose(
        got[in_range], want[in_range].astype(float), rtol=2e-6, atol=1e-37
    )
    bound = 2e-6 * float(np.abs(g).sum(initial=0)) + 1e-37
    np.testing.assert_allclose(dx, want_dx.astype(float), rtol=2e-6, atol=bound)
    if f is softmax and x.size and axis != ():
        axes = axis if axis is not None else tuple(range(x.ndim))
        sums = got.sum(axis=axes)
        assert ((np.abs(sums - 1) < 1e-5) | (sums == 0)).all()


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(calls(), st.booleans())
def test_logsumexp_against_oracle(call, signed):
    """Where `signed`, with the numbers of a cotangent as weights."""
    x, b, axis, where = call
    # XLA takes subnormal numbers for 0.
    b = np.where(np.abs(b) < np.finfo(b.dtype).tiny, 0, b) if signed else None
    want = oracle.logsumexp(x, axis, where, b)
    f = functools.partial(logsumexp, axis=axis, where=where, return_sign=True)
    y, pull, sign = jax.vjp(lambda x: f(x, b=b), jnp.array(x), has_aux=True)
    (dx,) = pull(jnp.ones_like(y))
    # What cancels to the last digits may have either sign, or be 0.
    sure = (want.condition < 1e4) | np.isneginf(want.value)
    np.testing.assert_array_equal(np.asarray(sign)[sure], want.sign[sure])
    got, value = np.asarray(y, np.float64), want.value.astype(float)
    np.testing.assert_array_equal(np.isneginf(got)[sure], np.isneginf(value)[sure])
    some = sure & np.isfinite(value)
    condition = want.condition[some].astype(float)
    bound = 2e-6 * (np.abs(value[some]) + condition)
    assert (np.abs(got[some] - value[some]) <= bound).all()
    shape = np.max(x, axis=axis, keepdims=True, initial=0).shape
    rows = np.broadcast_to(sure.reshape(shape), x.shape)
    condition = np.broadcast_to(want.condition.reshape(shape), x.shape)
    error = np.abs(np.asarray(dx) - want.weighted.astype(float))[rows]
    size = np.abs(want.weighted)[rows].astype(float)
    bound = 1e-4 * size + 2e-6 * (np.nan_to_num(condition[rows].astype(float)) + 1)
    assert (error <= bound).all()


@hypothesis.settings(max_examples=30, deadline=None, derandomize=True)
@hypothesis.given(
    hnp.arrays(np.float32, 6, elements=st.floats(-50, 50, width=32)),
    hnp.arrays(np.float32, 6, elements=st.floats(-50, 50, width=32)),
    hnp.arrays(np.float32, 6, elements=st.floats(-50, 50, width=32)),
)
def test_jvp_is_the_transpose_of_vjp(x, t, g):
    """<g, J t> = <J^T g, t>, for both functions."""
    for f in FUNCTIONS:
        _, push = jax.jvp(f, (x,), (t,))
        _, pull = jax.vjp(f, x)
        left = np.vdot(np.float64(g), np.float64(push))
        right = np.vdot(np.float64(pull(g)[0]), np.float64(t))
        size = np.abs(g).sum() * np.abs(t).sum() + 1e-30
        assert abs(left - right) <= 1e-6 * size
