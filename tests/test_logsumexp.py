"""logsumexp: values and gradients against the oracle, weights, edge rows, dtypes.

Tolerances, in eps of what is computed with (float32 for 16 bits). A term's relative
error is 2 and half of its distance to the largest, as that of a probability; sums and
logarithms add 4. A value's error is relative to the logarithm of the sum, to which the
maximum is added: half an ulp of the result. A result of 16 bits is rounded once: one
eps of it. With terms of both signs errors are multiplied by ``sum(|terms|) / |sum|``.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import opaque, oracle
from support.compilation import exact_jit

import jaxsoftmax
from jaxsoftmax import log_softmax, logsumexp

DTYPES = ["float32", "bfloat16", "float16"]
AXES = [
    ((), None, "float32"),
    ((1,), -1, "bfloat16"),
    ((7,), None, "float16"),
    ((5, 33), -1, "float32"),
    ((5, 33), -1, "bfloat16"),
    ((33, 5), 0, "float16"),
    ((3, 4, 17), 1, "bfloat16"),
    ((3, 4, 17), (0, 2), "float32"),
    ((3, 4, 17), None, "float16"),
    ((2, 3, 4, 5), (-1, 1), "float32"),
    ((2, 3, 4, 5), (), "float32"),
    ((3, 200), -1, "float32"),
]

STATIC = ("axis", "keepdims", "implementation")


def _vjp(x, g, b=None, where=None, **static):
    """Value, sign, and the cotangents of x and b."""
    arrays = (x,) if b is None else (x, b)

    def f(*arrays):
        x, *weights = arrays
        return logsumexp(x, b=(*weights, None)[0], where=where, **static)

    y, pull = jax.vjp(f, *arrays)
    _, sign = f_with_sign(x, b, where, **static)
    return y, sign, pull(g)


def _signed_vjp(x, g, b, where=None, **static):
    def f(x, b):
        return f_with_sign(x, b, where, **static)

    y, pull, sign = jax.vjp(f, x, b, has_aux=True)
    return y, sign, pull(g)


def f_with_sign(x, b, where, **static):
    return logsumexp(x, b=b, where=where, return_sign=True, **static)


vjp = jax.jit(_vjp, static_argnames=STATIC)
exact_vjp = exact_jit(_vjp, static_argnames=STATIC)
signed_vjp = jax.jit(_signed_vjp, static_argnames=STATIC)


def eps(dtype):
    return float(jnp.finfo(dtype).eps)


def working(dtype):
    """eps of what is computed with."""
    return min(eps(dtype), eps(jnp.float32))


def assert_value(y, want, dtype, top=None):
    """Within the bounds above."""
    y, value = oracle._wide(y), want.value
    np.testing.assert_array_equal(np.isneginf(y), np.isneginf(value))
    some = np.isfinite(value)
    second = np.where(np.isfinite(want.second), want.second, 0)
    # Its logarithm of the sum is next to the maximum, which is not rounded.
    log_sum = np.abs(value - top) if top is not None else np.abs(value) + 1
    units = working(dtype) * want.condition * (6 + second / 2)
    bound = eps(dtype) * np.abs(value[some]) + (units * log_sum)[some]
    assert (np.abs(y[some] - value[some]) <= bound).all()


def assert_gradient(dx, share, g, want, dtype, axis=None):
    """Each entry relative to itself, but for what is no normal number."""
    axes = tuple(range(share.ndim)) if axis is None else axis
    rows = np.sum(share, axis=axes, keepdims=True).shape
    condition = np.where(np.isfinite(want.condition), want.condition, 1).reshape(rows)
    expected = share * oracle._wide(g).reshape(rows)
    size = np.clip(np.abs(share), 1e-45, 1)
    units = eps(dtype) + working(dtype) * condition * (8 - np.log(size) / 2)
    least = float(jnp.finfo(dtype).smallest_subnormal) + 1e-37
    error = np.abs(oracle._wide(dx) - expected)
    assert (error <= units * np.abs(expected) + least).all()
    assert (np.asarray(dx)[share == 0] == 0).all()


class TestAgainstOracle:
    """The same class for every implementation."""

    @pytest.mark.parametrize(("shape", "axis", "dtype"), AXES)
    @pytest.mark.parametrize("masked", [False, True])
    @pytest.mark.parametrize("keepdims", [False, True])
    @pytest.mark.pairwise(1)
    def test_shapes_axes_masks(
        self, implementation, rng, shape, axis, dtype, masked, keepdims
    ):
        x = jnp.array(3 * rng.normal(size=shape), dtype)
        where = rng.random(size=shape[-1:]) < 0.7 if masked else None
        want = oracle.logsumexp(x, axis, where)
        reduced = jnp.max(x, axis=axis, keepdims=keepdims)
        g = jnp.array(rng.normal(size=reduced.shape), dtype)
        y, sign, (dx,) = exact_vjp(
            x,
            g,
            axis=axis,
            where=where,
            keepdims=keepdims,
            implementation=implementation,
        )
        assert (y.dtype, y.shape) == (sign.dtype, sign.shape) == (x.dtype, g.shape)
        assert (dx.dtype, dx.shape) == (x.dtype, shape)
        np.testing.assert_array_equal(sign.ravel(), want.sign.ravel())
        assert_value(y.reshape(want.value.shape), want, dtype)
        assert_gradient(dx, want.weighted, g, want, dtype, axis)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("n", [2, 10, 128, 1000])
    @pytest.mark.parametrize("scale", [1, 20, 60])
    @pytest.mark.pairwise(2, rare=2)
    def test_rows_of_any_scale(self, implementation, rng, dtype, n, scale):
        x = jnp.array(scale * rng.normal(size=(4096 // n + 8, n)), dtype)
        g = jnp.array(rng.normal(size=len(x)), dtype)
        y, _, (dx,) = exact_vjp(x, g, axis=-1, implementation=implementation)
        want = oracle.logsumexp(x, -1)
        top = oracle._wide(x).max(-1)
        assert_value(y, want, dtype, top)
        assert_gradient(dx, want.weighted, g, want, dtype, -1)

    @pytest.mark.parametrize("n", [8, 100])
    @pytest.mark.parametrize("top", [0.0, 0.25, -4.0, 700.0])
    @pytest.mark.parametrize("weighted", [False, True])
    @pytest.mark.pairwise(2)
    def test_one_dominant_entry(self, implementation, rng, n, top, weighted):
        """The others are from 1e-2 to 1e-16 of the sum: the value keeps their digits.

        So do the weights' terms: 1 is the dominant one's.
        """
        x = rng.normal(size=(64, n)) - np.linspace(5, 35, 64)[:, None] + top
        x[:, 3] = top
        x = jnp.array(x, jnp.float32)
        b = None
        if weighted:
            b = rng.uniform(-1, 1, size=x.shape)
            b[:, 3] = -1
            b = jnp.array(b, jnp.float32)
        g = jnp.array(rng.normal(size=64), jnp.float32)
        run = exact_vjp if b is None else signed_vjp
        y, sign, pulled = run(x, g, b, axis=-1, implementation=implementation)
        want = oracle.logsumexp(x, -1, b=b)
        assert (sign == (-1 if weighted else 1)).all()
        # Of what is beside the dominant term.
        others = 1 - np.abs(want.weighted[:, 3]) if top else np.abs(want.value)
        spread = np.abs(want.weighted).sum(-1) - np.abs(want.weighted[:, 3])
        relative = spread / others
        bound = 20 * eps("float32") * np.where(np.isfinite(relative), relative, 1)
        error = np.abs(oracle._wide(y) - want.value)
        assert (error <= bound * others + eps("float32") * np.abs(want.value)).all()
        assert_gradient(pulled[0], want.weighted, g, want, "float32", -1)

    def test_shift_of_x(self, implementation, rng):
        """The gradient does not change where the shifted logits are exact."""
        x = jnp.array(rng.integers(-50, 50, size=(8, 33)) / 8, jnp.float32)
        g = jnp.ones(8)
        run = functools.partial(vjp, axis=-1, implementation=implementation)
        _, _, dx = run(x, g)
        y, _, moved = run(x + 1024, g)
        np.testing.assert_array_equal(moved, dx)
        np.testing.assert_allclose(y, run(x, g)[0] + 1024, rtol=eps("float32"))

    def test_large_sums_in_f16(self, implementation, rng):
        """The sum of exponentials, 131072, is beyond float16's largest number."""
        x = jnp.full((2, 131072), 3.0, jnp.float16)
        y = logsumexp(x, -1, implementation=implementation)
        np.testing.assert_array_equal(y, np.float16(3 + 17 * np.log(2)))

    @pytest.mark.parametrize("weighted", [False, True])
    def test_float64(self, implementation, rng, weighted):
        with jax.enable_x64(True):
            x = jnp.array(20 * rng.normal(size=(64, 100)))
            b = jnp.array(rng.normal(size=x.shape)) if weighted else None
            g = jnp.array(rng.normal(size=64))
            run = exact_vjp if b is None else signed_vjp
            y, sign, (dx, *db) = run(x, g, b, axis=-1, implementation=implementation)
            assert y.dtype == sign.dtype == dx.dtype == np.float64
            want = oracle.logsumexp(x, -1, b=b)
            assert_value(y, want, np.float64)
            assert_gradient(dx, want.weighted, g, want, np.float64, -1)
            for found in db:
                assert_gradient(found, want.each, g, want, np.float64, -1)

    @pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
    def test_float8(self, implementation, rng, dtype):
        x = jnp.array(rng.normal(size=(8, 6)), dtype)
        y = logsumexp(x, -1, implementation=implementation)
        want = oracle.logsumexp(x, -1).value.astype(np.float32)
        assert y.dtype == x.dtype
        chex.assert_trees_all_equal(
            y.astype(jnp.float32), jnp.array(want).astype(dtype).astype(jnp.float32)
        )

    def test_is_what_log_softmax_subtracts(self, implementation, rng):
        x = jnp.array(rng.normal(size=(8, 33)), jnp.float32)
        y = logsumexp(x, -1, keepdims=True, implementation=implementation)
        np.testing.assert_allclose(
            log_softmax(x, implementation=implementation), x - y, rtol=2e-6, atol=5e-7
        )

    @pytest.mark.parametrize("weighted", [False, True])
    def test_hessian_of_dominated_rows(self, implementation, rng, weighted):
        """``diag(P) - P P^T``: without weights, as softmax's derivative, no digit less.

        With weights each entry is relative to its share.
        """
        x = 10 * rng.normal(size=(32, 20))
        t = 100 + rng.normal(size=x.shape)
        x, t = jnp.array(x, jnp.float32), jnp.array(t, jnp.float32)
        b = jnp.array(rng.uniform(0.5, 2, size=20), jnp.float32) if weighted else None

        @exact_jit
        def product(x, t):
            f = lambda x: logsumexp(x, -1, b, implementation=implementation).sum()
            return jax.jvp(jax.grad(f), (x,), (t,))[1]

        p = oracle.logsumexp(x, -1, b=b).weighted
        want = p * oracle.less_mean(p, oracle._wide(t))
        if weighted:
            error = np.abs(oracle._wide(product(x, t)) - want)
            bound = 32 * eps("float32") * p * (100 + np.abs(np.log(p)))
            assert (error <= bound + 1e-36).all()
        else:
            assert oracle.row_error(product(x, t), want, jnp.float32) <= 4e-6


# Of weights: positive, of both signs, some 0.
WEIGHTS = {
    "positive": lambda rng, shape: rng.uniform(0.1, 3, size=shape),
    "signed": lambda rng, shape: rng.normal(size=shape),
    "some 0": lambda rng, shape: rng.normal(size=shape) * (rng.random(shape) < 0.6),
}


class TestWeights:
    @pytest.mark.parametrize("kind", WEIGHTS)
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("axis", [-1, 0, (0, 2), None])
    @pytest.mark.parametrize("masked", [False, True])
    @pytest.mark.pairwise(1)
    def test_against_oracle(self, rng, kind, dtype, axis, masked):
        x = jnp.array(2 * rng.normal(size=(3, 4, 9)), dtype)
        b = jnp.array(WEIGHTS[kind](rng, x.shape), dtype)
        where = jnp.array(rng.random(size=(4, 1)) < 0.7) if masked else None
        g = jnp.array(rng.normal(size=jnp.max(x, axis=axis).shape), dtype)
        y, sign, (dx, db) = signed_vjp(x, g, b, where, axis=axis)
        assert y.dtype == sign.dtype == dx.dtype == db.dtype == x.dtype
        want = oracle.logsumexp(x, axis, where, b)
        np.testing.assert_array_equal(sign, want.sign)
        assert_value(y, want, dtype)
        assert_gradient(dx, want.weighted, g, want, dtype, axis)
        assert_gradient(db, want.each, g, want, dtype, axis)

    @pytest.mark.parametrize("shape", [(), (9,), (4, 1), (3, 1, 9), (1, 1, 1)])
    def test_gradient_of_weights_that_broadcast(self, rng, shape):
        x = jnp.array(rng.normal(size=(3, 4, 9)), jnp.float32)
        b = jnp.array(rng.normal(size=shape), jnp.float32)
        g = jnp.array(rng.normal(size=(3, 4)), jnp.float32)
        with jax.numpy_rank_promotion("allow"):
            full = jnp.broadcast_to(b, x.shape)
        y, sign, (dx, db) = signed_vjp(x, g, b, axis=-1)
        want_y, want_sign, (want_dx, every) = signed_vjp(x, g, full, axis=-1)
        chex.assert_trees_all_equal((y, sign, dx), (want_y, want_sign, want_dx))
        shape = (1,) * (3 - b.ndim) + b.shape
        summed = tuple(i for i in range(3) if shape[i] == 1)
        want = np.sum(np.asarray(every, np.float64), summed).reshape(b.shape)
        size = np.sum(np.abs(every), summed).reshape(b.shape)
        assert (np.abs(db - want) <= 16 * eps("float32") * size).all()

    def test_weights_larger_than_x(self, rng):
        x = jnp.array(rng.normal(size=(1, 5)), jnp.float32)
        b = jnp.array(rng.normal(size=(3, 5)), jnp.float32)
        want = oracle.logsumexp(np.broadcast_to(x, (3, 5)), -1, b=b)
        y, sign, (dx, _) = signed_vjp(x, jnp.ones(3), b, axis=-1)
        np.testing.assert_array_equal(sign, want.sign)
        assert_value(y, want, "float32")
        np.testing.assert_allclose(
            dx, want.weighted.sum(0, keepdims=True).astype(float), rtol=2e-5
        )

    @pytest.mark.parametrize("size", [1e-30, 1e30])
    def test_weights_of_any_size(self, rng, size):
        """Neither sum nor product leaves the range of floats."""
        x = jnp.array([[90.0, 0.0, -90.0, -80.0]], jnp.float32)
        b = jnp.array([[1 / size, 1.0, -size, size]], jnp.float32)
        y, sign, (dx, db) = signed_vjp(x, jnp.ones(1), b, axis=-1)
        want = oracle.logsumexp(x, -1, b=b)
        np.testing.assert_array_equal(sign, want.sign)
        np.testing.assert_allclose(y, want.value.astype(float), rtol=1e-6)
        np.testing.assert_allclose(
            dx, want.weighted.astype(float), rtol=2e-5, atol=1e-37
        )
        np.testing.assert_allclose(db, want.each.astype(float), rtol=2e-5, atol=1e-37)

    @pytest.mark.parametrize("hidden", [np.nan, np.inf, -np.inf, 3e38, 100.0, -3.0])
    def test_what_has_the_weight_0(self, hidden):
        """No influence but on its own weight's gradient, where that is a number."""
        x = np.array([0.5, hidden, -0.25], np.float32)
        b = jnp.array([1.0, 0.0, -2.0], jnp.float32)
        y, sign, (dx, db) = signed_vjp(x, jnp.float32(1), b)
        want = oracle.logsumexp(x[::2], b=b[::2])
        assert float(sign) == want.sign
        np.testing.assert_allclose(y, float(want.value), rtol=1e-6)
        np.testing.assert_allclose(dx[::2], want.weighted.astype(float), rtol=2e-6)
        np.testing.assert_allclose(db[::2], want.each.astype(float), rtol=2e-6)
        assert dx[1] == 0
        counts = abs(hidden) < 80
        share = np.exp(hidden - float(want.value)) * float(want.sign) if counts else 0.0
        np.testing.assert_allclose(db[1], share, rtol=2e-6)

    def test_terms_that_cancel(self):
        """log 0 and sign 0. The derivative is infinite there: the gradient is 0."""
        x = jnp.array([[1.0, 1.0, 2.0], [1.0, 2.0, 3.0]], jnp.float32)
        b = jnp.array([[3.0, -3.0, 0.0], [1.0, 1.0, -1.0]], jnp.float32)
        y, sign, (dx, db) = signed_vjp(x, jnp.ones(2), b, axis=-1)
        assert (y[0], sign[0]) == (-jnp.inf, 0)
        assert sign[1] == -1
        for gradient in (dx, db):
            assert (gradient[0] == 0).all()
            assert (gradient[1] != 0).all()

    def test_negative_sums_without_a_sign(self, nans_allowed):
        """NaN with gradient 0, as in jax.nn."""
        x = jnp.array([[0.0, 1.0], [0.0, 1.0]], jnp.float32)
        b = jnp.array([[1.0, -1.0], [1.0, 1.0]], jnp.float32)
        y, pull = jax.vjp(lambda x, b: logsumexp(x, -1, b), x, b)
        assert np.isnan(y[0])
        assert np.isfinite(y[1])
        for gradient in pull(jnp.ones(2)):
            assert (gradient[0] == 0).all()
            assert (gradient[1] != 0).all()

    @pytest.mark.parametrize(
        ("x", "b", "expected"),
        [
            ("bfloat16", "float32", "float32"),
            ("float32", "bfloat16", "float32"),
            ("bfloat16", "float16", "float32"),
            ("bfloat16", "int32", "bfloat16"),
            ("float16", "bool", "float16"),
            ("int8", "float32", "float32"),
            ("int32", "int32", "float32"),
        ],
    )
    def test_dtype(self, x, b, expected):
        """As jax.nn, but under strict promotion too; gradients as the arguments."""
        x, b = jnp.ones((2, 3), x), jnp.ones(3, b)
        y, sign = logsumexp(x, -1, b, return_sign=True)
        assert y.dtype == sign.dtype == expected
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            assert jax.nn.logsumexp(x, -1, b).dtype == expected
        moving = [
            i for i, a in enumerate((x, b)) if jnp.issubdtype(a.dtype, jnp.inexact)
        ]
        if moving:
            loss = lambda x, b: logsumexp(x, b=b).astype(jnp.float32)
            for i, gradient in zip(moving, jax.grad(loss, moving)(x, b), strict=True):
                assert gradient.dtype == (x, b)[i].dtype

    @pytest.mark.parametrize("b", [2, 2.0, np.float32(2), True, [1.0, 2.0, 3.0]])
    def test_numbers_as_weights(self, b):
        x = jnp.array([0.5, 1.0, 1.5], jnp.bfloat16)
        y = logsumexp(x, b=b)
        plain = isinstance(b, int | float)
        assert y.dtype == (jnp.bfloat16 if plain else jnp.float32)
        want = oracle.logsumexp(x, b=np.asarray(b, float)).value
        np.testing.assert_allclose(
            np.float64(y), float(want), rtol=float(jnp.finfo(y.dtype).eps)
        )


class TestEdgeRows:
    """Semantics where the formula alone would give NaN."""

    @pytest.mark.parametrize("hidden", [0.0, np.nan, np.inf, -np.inf, 3e38])
    @pytest.mark.parametrize("weighted", [False, True])
    @pytest.mark.pairwise(1)
    def test_masked_entries(self, implementation, rng, hidden, weighted):
        where = jnp.array([True, True, False, True, False, True])
        x = jnp.array(rng.normal(size=(3, 6)), jnp.float32)
        b = jnp.array(rng.uniform(1, 2, size=(3, 6)), jnp.float32)
        g = jnp.array(rng.normal(size=3), jnp.float32)
        bad = [np.where(where, a, np.float32(hidden)) for a in (x, b)]
        run = functools.partial(vjp, axis=-1, implementation=implementation)
        if not weighted:
            b = bad[1] = None
        got, want = (run(*each, where) for each in ((bad[0], g, bad[1]), (x, g, b)))
        chex.assert_trees_all_equal(got, want)
        for gradient in got[2]:
            assert (np.asarray(gradient)[:, ~np.asarray(where)] == 0).all()

    @pytest.mark.parametrize("weighted", [False, True])
    @pytest.mark.parametrize("n", [5, 300])
    @pytest.mark.parametrize("how", ["where", "-inf", "both"])
    @pytest.mark.pairwise
    def test_row_with_nothing_in_it(self, implementation, rng, n, how, weighted):
        x = jnp.array(rng.normal(size=(3, n)), jnp.float32)
        b = jnp.array(rng.uniform(1, 2, size=(3, n)), jnp.float32)
        where = None
        if how != "-inf":
            where = jnp.ones((3, n), bool).at[1].set(False)
        if how != "where":
            x = x.at[1].set(-jnp.inf)
        g = np.array([1.0, np.nan, 1.0], np.float32)
        y, sign, pulled = vjp(
            x,
            g,
            b if weighted else None,
            where,
            axis=-1,
            implementation=implementation,
        )
        assert (y[1], sign[1]) == (-jnp.inf, 0)
        assert np.isfinite(y[::2]).all()
        for gradient in pulled:
            assert (gradient[1] == 0).all()
            assert np.isfinite(gradient).all()

    @pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 3), (2, 0, 4)])
    @pytest.mark.parametrize("axis", [-1, 0, None])
    @pytest.mark.parametrize("weighted", [False, True])
    @pytest.mark.pairwise
    def test_empty_arrays(self, implementation, shape, axis, weighted):
        x = jnp.zeros(shape)
        b = jnp.ones(shape) if weighted else None
        y = logsumexp(x, axis, b, implementation=implementation)
        want = jax.nn.logsumexp(x, axis, b)
        chex.assert_trees_all_equal(y, want)
        dx = jax.grad(lambda x: logsumexp(x, axis, b).sum())(x)
        assert dx.shape == shape

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    @pytest.mark.parametrize("weighted", [False, True])
    @pytest.mark.parametrize("n", [5, 300])
    @pytest.mark.pairwise
    def test_nan_and_inf_stay_in_their_row(
        self, implementation, rng, bad, weighted, n, nans_allowed
    ):
        x = jnp.array(rng.normal(size=(3, n)), jnp.float32)
        b = jnp.array(rng.uniform(1, 2, size=(3, n)), jnp.float32)
        b = b if weighted else None
        where = jnp.arange(n) < n - 1
        run = functools.partial(vjp, axis=-1, implementation=implementation)
        x = x.at[1, 2].set(bad)
        y, sign, pulled = run(x, jnp.ones(3), b, where)
        assert np.isnan([y[1], sign[1]]).all()
        assert np.isfinite(y[::2]).all()
        for gradient in pulled:
            assert np.isnan(gradient[1, :-1]).all()
            assert (gradient[:, -1] == 0).all()
            assert np.isfinite(gradient[::2]).all()
        # A row that is not used has the gradient 0.
        _, _, pulled = run(x, jnp.array([1.0, 0.0, 1.0]), b, where)
        for gradient in pulled:
            assert (gradient[1] == 0).all()
            assert np.isfinite(gradient).all()

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_weights_that_are_no_numbers(self, bad, nans_allowed):
        x = jnp.zeros((2, 3))
        b = jnp.ones((2, 3)).at[0, 1].set(bad)
        y, sign = logsumexp(x, -1, b, return_sign=True)
        assert np.isnan([y[0], sign[0]]).all()
        assert np.isfinite([y[1], sign[1]]).all()

    def test_lowest_floats_are_present(self, implementation):
        """Finite logits are no mask, however low."""
        x = jnp.full((2, 4), jnp.finfo(jnp.float32).min)
        y, _, (dx,) = vjp(x, jnp.ones(2), axis=-1, implementation=implementation)
        assert (y == jnp.finfo(jnp.float32).min).all()
        np.testing.assert_allclose(dx, 0.25, rtol=3e-7)

    @pytest.mark.parametrize("axis", [-1, 0])
    def test_a_mask_larger_than_x(self, implementation, rng, axis):
        x = jnp.array(rng.normal(size=(1, 5)), jnp.float32)
        where = rng.random(size=(3, 5)) < 0.7
        full = np.broadcast_to(np.asarray(x), where.shape)
        want = oracle.logsumexp(full, axis, where)
        g = jnp.ones(want.value.shape)
        y, _, (dx,) = vjp(x, g, where=where, axis=axis, implementation=implementation)
        assert_value(y, want, "float32")
        np.testing.assert_allclose(
            dx, want.weighted.sum(0, keepdims=True).astype(float), rtol=2e-6
        )


class TestAgainstJaxNN:
    """Drop-in: the same values for the same positional arguments."""

    @pytest.mark.parametrize("axis", [-1, 0, (0, 1), None, (), (2, 0)])
    @pytest.mark.parametrize("masked", [False, True])
    @pytest.mark.parametrize("weighted", [False, True])
    @pytest.mark.parametrize("keepdims", [False, True])
    @pytest.mark.parametrize("signed", [False, True])
    @pytest.mark.pairwise(1)
    def test_values(self, rng, axis, masked, weighted, keepdims, signed):
        x = jnp.array(rng.normal(size=(3, 4, 5)), jnp.float32)
        where = jnp.array(rng.random(size=(3, 1, 5)) < 0.8) if masked else None
        b = jnp.array(rng.uniform(0.5, 2, size=x.shape), jnp.float32)
        args = (x, axis, b if weighted else None, keepdims, signed, where)
        want, got = (f(*args) for f in (jax.nn.logsumexp, logsumexp))
        chex.assert_trees_all_equal_shapes_and_dtypes(got, want)
        chex.assert_trees_all_close(got, want, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("x64", [False, True])
    @pytest.mark.parametrize("dtype", ["int8", "int32", "uint8", "bfloat16", "float16"])
    @pytest.mark.pairwise
    def test_dtype(self, dtype, x64):
        with jax.enable_x64(x64), jax.numpy_dtype_promotion("standard"):
            x = jnp.ones((3,), dtype)
            assert logsumexp(x).dtype == jax.nn.logsumexp(x).dtype


@pytest.mark.parametrize("weighted", [False, True])
def test_no_recompilation_when_called_eagerly(monkeypatch, weighted):
    traces = []

    def run(call, arrays, run=opaque.run):
        traces.append(call.op)
        return run(call, arrays)

    monkeypatch.setattr(opaque, "run", run)
    x = jnp.ones((2, 3))
    b = x if weighted else None
    counts = []
    for _ in range(3):
        f = functools.partial(logsumexp, axis=-1, b=b, implementation="opaque")
        jax.grad(lambda x, f=f: f(x)[0])(x)
        counts.append(len(traces))
    assert counts[0] > 0
    assert counts[1:] == counts[:1] * 2


def test_explain():
    """One call in the forward: the gradient is XLA's, and fused with what is around."""
    x = jax.ShapeDtypeStruct((64, 4096), jnp.bfloat16)
    explain = jaxsoftmax.explain_for("cuda", "NVIDIA H100 80GB HBM3")
    (choice,) = explain(jax.grad(lambda x: logsumexp(x).astype(jnp.float32)), x).choices
    assert choice.call.op == "log_sum_exp_state"
    (choice,) = explain(logsumexp, x, -1, x).choices
    assert (choice.call.op, choice.implementation) == ("weighted_log_sum_exp", "xla")
    assert all("weights" in reason for _, reason in choice.refusals)
    assert choice.is_faster  # no warning: there is nothing that it falls back from
