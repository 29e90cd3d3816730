"""softmax and log_softmax: values and gradients against the oracle, edge rows, dtypes.

Tolerances. Forward: 1 ulp of the output's dtype for bf16 and f16 (one rounding is half
of one); 4 for float32 and float64, whose exp and sums round at every step, besides what
`oracle.ulps` says of ``x - max``. Gradient of P as it is kept, worst row error: f32
1e-6 (8 eps), bf16 8e-3 and f16 1e-3 (1 eps); log_softmax's, which is computed from the
logits, relative to `oracle.log_softmax_vjp_terms`.
"""

import functools
import itertools
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import opaque, oracle
from support.compilation import exact_jit

from jaxsoftmax import log_softmax, naive, softmax
from jaxsoftmax._rows import xla_loss

GRADIENT_BAR = {"float32": 1e-6, "bfloat16": 8e-3, "float16": 1e-3}
FUNCTIONS = {
    "softmax": (softmax, oracle.softmax, oracle.softmax_vjp),
    "log_softmax": (log_softmax, oracle.log_softmax, oracle.log_softmax_vjp),
}
# What a row's largest gradient must be above to count.
LEAST = {"float32": 1e-30, "bfloat16": 1e-30, "float16": 1e-3}
DTYPES = ["float32", "bfloat16", "float16"]


@pytest.fixture(params=list(FUNCTIONS))
def functions(request):
    return FUNCTIONS[request.param]


def _vjp(f, x, g, where=None, **static):
    """Value and cotangent."""
    y, pull = jax.vjp(lambda x: f(x, where=where, **static), x)
    return y, pull(g)[0]


STATIC = ("f", "axis", "scale", "dtype", "implementation")
vjp = jax.jit(_vjp, static_argnames=STATIC)
exact_vjp = exact_jit(_vjp, static_argnames=STATIC)


@functools.partial(jax.jit, static_argnums=(0, 3))
def both_modes(f, x, t, implementation):
    """Value, cotangent and tangent."""
    f = functools.partial(f, implementation=implementation)
    y, pull = jax.vjp(f, x)
    return y, pull(t)[0], jax.jvp(f, (x,), (t,))[1]


def cotangent(rng, shape, dtype, offset=0.0):
    """Gaussian about `offset`, wide enough that `dtype` can tell its values apart."""
    spread = max(1.0, 32 * float(jnp.finfo(dtype).eps) * offset)
    return jnp.array(offset + spread * rng.normal(size=shape), dtype)


class TestAgainstOracle:
    """The same class for every implementation."""

    @pytest.mark.parametrize(
        ("shape", "axis", "dtype"),
        [
            ((), None, "float32"),
            ((1,), -1, "bfloat16"),
            ((7,), 0, "float16"),
            ((5, 33), -1, "float32"),
            ((5, 33), -1, "bfloat16"),
            ((5, 33), -1, "float16"),
            ((33, 5), 0, "float32"),
            ((3, 4, 17), 1, "bfloat16"),
            ((3, 4, 17), (0, 2), "float32"),
            ((3, 4, 17), None, "float16"),
            ((2, 3, 4, 5), (-1, 1), "float32"),
            ((2, 3, 4, 5), (), "float32"),
        ],
    )
    @pytest.mark.parametrize("masked", [False, True])
    @pytest.mark.pairwise(1)
    def test_shapes_axes_masks(
        self, functions, implementation, rng, shape, axis, dtype, masked
    ):
        f, value, gradient = functions
        x = jnp.array(3 * rng.normal(size=shape), dtype)
        g = cotangent(rng, shape, dtype)
        where = rng.random(size=shape[-1:]) < 0.7 if masked else None
        y, dx = exact_vjp(
            f, x, g, axis=axis, where=where, implementation=implementation
        )
        assert (y.dtype, y.shape, dx.dtype, dx.shape) == (x.dtype, shape) * 2
        want = value(x, axis, where)
        finite = np.isfinite(want)
        chex.assert_trees_all_equal(
            np.asarray(y)[~finite], want[~finite].astype(y.dtype)
        )
        limit = 4 if dtype == "float32" else 1
        assert oracle.ulps(np.asarray(y)[finite], want[finite], dtype) <= limit
        want_dx = gradient(x, g, axis, where)
        scale = np.abs(want_dx).max(initial=0)
        error = np.abs(np.asarray(dx, np.float64) - want_dx).max(initial=0)
        assert error <= GRADIENT_BAR[dtype] * scale + 1e-7

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("n", [2, 10, 128, 1000])
    @pytest.mark.pairwise(3, rare=3)
    def test_dominated_rows_and_offsets(self, functions, implementation, rng, dtype, n):
        """Every row whose gradient can be represented, of P as it is kept.

        Logits of any scale, cotangents with an offset, equal in half of the row.
        """
        f, value, gradient = functions
        shape, bar = (4096 // n + 8, n), GRADIENT_BAR[dtype]
        for scale, offset, equal in itertools.product(
            (1, 20, 60), (0, 1000, -300), (False, True)
        ):
            x = jnp.array(scale * rng.normal(size=shape), dtype)
            g = offset + rng.normal(size=shape)
            if equal:
                g[:, : n // 2 + 1] = g[:, :1]
            g = jnp.array(g, dtype)
            y, dx, y_dot = both_modes(f, x, g, implementation)
            case = f"{scale=} {offset=} {equal=}"
            limit = 4 if dtype == "float32" else 1
            assert oracle.ulps(y, value(x), dtype, flushed=n) <= limit, case
            if f is softmax:
                dx_want = y_dot_want = oracle.softmax_derivative(y, g)
            else:
                y_dot_want = oracle.less_mean(oracle.softmax(x), oracle._wide(g))
                dx_want = gradient(x, g)
            for got, want in ((dx, dx_want), (y_dot, y_dot_want)):
                size, units = np.abs(want).max(-1), 0.0
                rows = (size > LEAST[dtype]) & (size < float(jnp.finfo(dtype).max))
                if f is log_softmax and want is dx_want:
                    size, distance = oracle.log_softmax_vjp_terms(x, g)
                    units = float(jnp.finfo(jnp.float32).eps) / 2 * distance
                error = np.abs(oracle._wide(got) - want).max(-1)
                assert (error <= (bar + units) * size)[rows].all(), case

    def test_one_dominant_entry(self, functions, implementation, rng):
        """1 - P from 1e-1 down to 1e-16: most of the range is below float32's eps."""
        f, value, gradient = functions
        x = rng.normal(size=(64, 100))
        x[:, 7] = np.linspace(5, 40, 64)
        x = jnp.array(x, jnp.float32)
        for offset in (0, 1000):
            g = cotangent(rng, x.shape, jnp.float32, offset)
            y, dx = exact_vjp(f, x, g, implementation=implementation)
            assert oracle.ulps(y, value(x), jnp.float32) <= 4
            want = gradient(x, g)
            if f is softmax:
                want = oracle.softmax_derivative(y, g)
            bar = 1e-6 if f is softmax else 1e-5  # P of the others: 40 / 2 eps
            assert oracle.row_error(dx, want, jnp.float32) <= bar

    def test_constant_rows_of_131072_in_f16(self, functions, implementation, rng):
        """The sum of exponentials, 131072, is beyond float16's largest number."""
        f, value, gradient = functions
        x = jnp.full((2, 131072), 3.0, jnp.float16)
        g = cotangent(rng, x.shape, jnp.float16)
        y, dx = exact_vjp(f, x, g, implementation=implementation)
        np.testing.assert_array_equal(np.asarray(y, np.float64), np.float16(value(x)))
        # P is 2^-17, exact but subnormal, and so is its gradient: half a step of it.
        np.testing.assert_allclose(
            np.asarray(dx, np.float64), gradient(x, g), rtol=5e-4, atol=2.0**-25
        )

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.pairwise(1)
    def test_float32_logits_to_another_dtype(
        self, functions, implementation, rng, dtype
    ):
        f, value, gradient = functions
        x = jnp.array(5 * rng.normal(size=(8, 50)), jnp.float32)
        g = cotangent(rng, x.shape, dtype)
        y, dx = exact_vjp(f, x, g, dtype=dtype, implementation=implementation)
        assert (y.dtype, dx.dtype) == (jnp.dtype(dtype), jnp.float32)
        assert oracle.ulps(y, value(x), dtype) <= (4 if dtype == "float32" else 1)
        assert oracle.row_error(dx, gradient(x, g), dtype) <= GRADIENT_BAR[dtype]

    @pytest.mark.parametrize("scale", [0.125, 0.3, 7, -2.5, 0])
    @pytest.mark.pairwise(1)
    def test_number_as_scale(self, functions, implementation, rng, scale):
        f, value, gradient = functions
        x = jnp.array(5 * rng.normal(size=(8, 50)), jnp.float32)
        x = x.at[0, 3].set(-jnp.inf)
        g = cotangent(rng, x.shape, jnp.float32)
        y, dx = vjp(f, x, g, scale=scale, implementation=implementation)
        where = x != -jnp.inf
        want = value(jnp.where(where, x, 0), where=where, scale=scale)
        finite = np.isfinite(want)
        # scale (x - max) is rounded: relative to P, half an ulp of up to 300.
        rounding = 300 * float(jnp.finfo(jnp.float32).eps)
        np.testing.assert_allclose(
            np.asarray(y)[finite], want[finite].astype(float), rtol=rounding, atol=1e-30
        )
        want = gradient(jnp.where(where, x, 0), g, where=where, scale=scale)
        if scale:
            assert oracle.row_error(dx, want, jnp.float32) <= rounding
        else:
            np.testing.assert_array_equal(dx, 0)

    @pytest.mark.parametrize("shape", [(), (4, 1, 1), (6, 9), (1, 9)])
    @pytest.mark.pairwise
    def test_array_as_scale(self, functions, implementation, rng, shape):
        """Differentiable; one scale a head, a query, a key."""
        f, _, _ = functions
        x = jnp.array(rng.normal(size=(4, 6, 9)), jnp.float32)
        scale = jnp.array(rng.uniform(0.5, 2, size=shape), jnp.float32)
        w = jnp.array(rng.normal(size=x.shape), jnp.float32)

        def ours(x, scale):
            return jnp.sum(w * f(x, scale=scale, implementation=implementation))

        def reference(x, scale):
            nn = getattr(jax.nn, f.__name__)
            return jnp.sum(w * nn(x * jnp.broadcast_to(scale, x.shape)))

        slopes = [jax.value_and_grad(g, (0, 1)) for g in (ours, reference)]
        got, want = jax.jit(lambda *arrays: [g(*arrays) for g in slopes])(x, scale)
        chex.assert_trees_all_close(got, want, rtol=2e-6, atol=2e-6)

    def test_array_scale_and_hidden_entries(
        self, functions, implementation, nans_allowed
    ):
        """What stands behind a mask, and -inf, have no part in the scale's gradient."""
        f, _, _ = functions
        x = jnp.array([[1.0, 2.0, 3.0, -jnp.inf], [1.0, 2.0, 3.0, 0.5]])
        hidden = x.at[:, 1].set(jnp.nan)
        where = jnp.array([[True, False, True, True]])

        def loss(scale, x):
            y = f(x, where=where, scale=scale, implementation=implementation)
            return jnp.sum(jnp.where(where & (x != -jnp.inf), y, 0) ** 2)

        scale = jnp.float32(0.7)
        want = jax.grad(loss)(scale, x)
        assert np.isfinite(want)
        np.testing.assert_array_equal(jax.grad(loss)(scale, hidden), want)

    def test_float64(self, functions, implementation, rng):
        f, value, gradient = functions
        with jax.enable_x64(True):
            x = jnp.array(20 * rng.normal(size=(64, 100)))
            g = jnp.array(1000 + rng.normal(size=x.shape))
            y, dx = exact_vjp(f, x, g, implementation=implementation)
            assert (y.dtype, dx.dtype) == (np.float64, np.float64)
            assert oracle.ulps(y, value(x), np.float64) <= 4
            assert oracle.row_error(dx, gradient(x, g), np.float64) <= 1e-14

    @pytest.mark.parametrize("scale", [2.0, jnp.float32(2), np.full((4, 1), 2.0)])
    def test_finite_logits_are_present_under_any_scale(self, implementation, scale):
        """What is beyond the range of floats is a number, and has a gradient."""
        x = jnp.full((4, 4), jnp.finfo(jnp.float32).min).at[1, 0].set(0)
        if isinstance(scale, np.ndarray):
            scale = jnp.array(scale, jnp.float32)
        g = jnp.eye(4)
        f = functools.partial(softmax, scale=scale, implementation=implementation)
        y, pull = jax.vjp(f, x)
        want = np.full((4, 4), 0.25)
        want[1] = [1, 0, 0, 0]
        np.testing.assert_array_equal(y, want)
        np.testing.assert_allclose(
            pull(g)[0], 2 * want * (g - (want * g).sum(-1, keepdims=True)), atol=1e-6
        )

    @pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
    def test_float8(self, functions, implementation, rng, dtype):
        f, value, _ = functions
        x = jnp.array(rng.normal(size=(8, 6)), dtype)
        y = f(x, implementation=implementation)
        assert y.dtype == x.dtype
        want = jnp.array(value(x).astype(np.float32)).astype(dtype)
        np.testing.assert_array_equal(
            np.asarray(y, np.float32), np.asarray(want, np.float32)
        )

    @pytest.mark.parametrize("dtype", ["int8", "int32", "uint8"])
    def test_integers(self, functions, implementation, dtype):
        f, value, _ = functions
        x = jnp.array([[1, 2, 5], [0, 0, 9]], dtype)
        y = f(x, implementation=implementation)
        assert y.dtype == jnp.float32
        assert oracle.ulps(y, value(x), jnp.float32) <= 4

    @pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 3), (2, 0, 4)])
    @pytest.mark.parametrize("axis", [-1, 0, None])
    @pytest.mark.pairwise
    def test_empty_arrays(self, functions, implementation, shape, axis):
        f, _, _ = functions
        x = jnp.zeros(shape)
        y, dx = vjp(f, x, x, axis=axis, implementation=implementation)
        assert y.shape == dx.shape == shape


# What a masked entry becomes.
MASKED = {"softmax": 0.0, "log_softmax": -np.inf}


class TestEdgeRows:
    """Semantics where the formula alone would give NaN."""

    @pytest.mark.parametrize("hidden", [0.0, np.nan, np.inf, -np.inf, 3e38])
    @pytest.mark.pairwise(1)
    def test_masked_entries(self, functions, implementation, rng, hidden):
        """Value and gradient are exact there, and independent of what is hidden."""
        f, value, gradient = functions
        where = jnp.array([True, True, False, True, False, True])
        x = jnp.array(rng.normal(size=(3, 6)), jnp.float32)
        g = jnp.array(rng.normal(size=(3, 6)), jnp.float32)
        want_y, want_dx = value(x, where=where), gradient(x, g, where=where)
        x, g = (np.where(where, a, np.float32(hidden)) for a in (x, g))
        y, dx = vjp(f, x, g, where=where, implementation=implementation)
        off = ~np.asarray(where)
        assert (np.asarray(y)[:, off] == MASKED[f.__name__]).all()
        assert (np.asarray(dx)[:, off] == 0).all()
        on = ~off
        assert oracle.ulps(np.asarray(y)[:, on], want_y[:, on], np.float32) <= 4
        assert oracle.row_error(dx, want_dx, np.float32) <= 1e-6

    @pytest.mark.parametrize("shape", [(4, 6), (200, 6), (2, 100, 6)])
    @pytest.mark.parametrize("behind", [np.nan, np.inf, -np.inf, 0.0])
    @pytest.mark.pairwise(1)
    def test_minus_inf_entries(self, functions, implementation, rng, shape, behind):
        """As masked ones, with NaN and inf in the cotangent there."""
        f, _, gradient = functions
        x = jnp.array(rng.normal(size=shape), jnp.float32).at[..., 2].set(-jnp.inf)
        g = jnp.array(rng.normal(size=shape), jnp.float32)
        want = gradient(x, g)
        g = np.array(g)
        g[..., 2] = behind
        y, dx = vjp(f, x, g, implementation=implementation)
        assert (np.asarray(y)[..., 2] == MASKED[f.__name__]).all()
        assert (np.asarray(dx)[..., 2] == 0).all()
        assert oracle.row_error(dx, want, np.float32) <= 1e-6

    @pytest.mark.parametrize("behind", [np.nan, np.inf])
    def test_poison_stays_behind_the_mask_in_forward_mode(
        self, functions, implementation, rng, behind
    ):
        f, _, _ = functions
        x = jnp.array(rng.normal(size=(4, 6)), jnp.float32).at[:, 2].set(-jnp.inf)
        t = jnp.array(rng.normal(size=(4, 6)), jnp.float32)
        run = jax.jit(
            lambda t: jax.jvp(lambda x: f(x, implementation=implementation), (x,), (t,))
        )
        clean = run(t.at[:, 2].set(0))[1]
        poisoned = np.array(t)
        poisoned[:, 2] = behind
        np.testing.assert_allclose(run(poisoned)[1], clean, rtol=2e-6, atol=1e-8)
        assert (np.asarray(clean)[:, 2] == 0).all()

    @pytest.mark.parametrize("axis", [-1, 0])
    def test_a_mask_larger_than_x(self, functions, implementation, rng, axis):
        """x is broadcast first, as in jax.nn."""
        f, value, gradient = functions
        x = jnp.array(rng.normal(size=(1, 5)), jnp.float32)
        where = rng.random(size=(3, 5)) < 0.7
        g = jnp.array(rng.normal(size=where.shape), jnp.float32)
        y, dx = vjp(f, x, g, axis=axis, where=where, implementation=implementation)
        full = np.broadcast_to(np.asarray(x), where.shape)
        want = value(full, axis, where)
        np.testing.assert_allclose(np.asarray(y)[where], want[where], rtol=1e-6)
        assert (np.asarray(y)[~where] == MASKED[f.__name__]).all()
        want_dx = np.asarray(gradient(full, g, axis, where)).sum(0, keepdims=True)
        np.testing.assert_allclose(dx, want_dx, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("how", ["where", "-inf"])
    def test_row_with_nothing_in_it(self, functions, implementation, rng, how):
        f, _, _ = functions
        x = jnp.array(rng.normal(size=(3, 5)), jnp.float32)
        g = jnp.array(rng.normal(size=(3, 5)), jnp.float32)
        where = None
        if how == "where":
            where = jnp.ones((3, 5), bool).at[1].set(False)
        else:
            x = x.at[1].set(-jnp.inf)
        y, dx = vjp(f, x, g, where=where, implementation=implementation)
        assert (np.asarray(y)[1] == MASKED[f.__name__]).all()
        assert (np.asarray(dx)[1] == 0).all()
        assert np.isfinite(np.asarray(dx)).all()

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    @pytest.mark.parametrize("masked", [False, True])
    def test_nan_and_inf_stay_in_their_row(
        self, functions, implementation, rng, bad, masked, nans_allowed
    ):
        f, _, _ = functions
        x = jnp.array(rng.normal(size=(3, 5)), jnp.float32)
        g = jnp.array(rng.normal(size=(3, 5)), jnp.float32)
        where = jnp.array([True, True, True, True, False]) if masked else None
        kwargs = {"where": where, "implementation": implementation}
        want_y, want_dx = vjp(f, x, g, **kwargs)
        y, dx = vjp(f, x.at[1, 2].set(bad), g, **kwargs)
        on = 4 if masked else 5
        assert np.isnan(np.asarray(y)[1, :on]).all()
        assert np.isnan(np.asarray(dx)[1, :on]).all()
        assert (np.asarray(y)[1, on:] == MASKED[f.__name__]).all()
        assert (np.asarray(dx)[1, on:] == 0).all()
        for row in (0, 2):
            np.testing.assert_array_equal(y[row], want_y[row])
            np.testing.assert_allclose(dx[row], want_dx[row], rtol=1e-6)

    def test_row_of_the_lowest_floats_is_uniform(self, functions, implementation):
        """Finite logits are no mask, however low: the usual big negative number."""
        f, value, _ = functions
        x = jnp.full((2, 4), jnp.finfo(jnp.float32).min)
        np.testing.assert_allclose(
            f(x, implementation=implementation), value(x), rtol=3e-7
        )

    def test_masked_row_of_the_lowest_floats(self, functions, implementation, rng):
        """What is masked does not count as the lowest float that is beside it."""
        f, value, gradient = functions
        where = np.arange(8)[None] < 3
        x = jnp.full((2, 8), jnp.finfo(jnp.float32).min)
        g = jnp.array(rng.normal(size=(2, 8)), jnp.float32)
        y, dx = vjp(f, x, g, where=where, implementation=implementation)
        want = value(x, where=where)[:, :3]
        np.testing.assert_allclose(y[:, :3], want.astype(float), rtol=3e-7)
        assert oracle.row_error(dx, gradient(x, g, where=where), np.float32) <= 1e-6

    def test_logits_of_the_same_program(self, functions, implementation, rng):
        """XLA may compute x * w anew, and rounded otherwise, wherever it is used."""
        f, value, gradient = functions
        x, g = (jnp.array(rng.normal(size=(8, 128)), jnp.float32) for _ in range(2))
        w = jnp.array(rng.normal(size=(1, 128)), jnp.float32)

        @jax.jit
        def run(x, g):
            y, pull = jax.vjp(lambda x: f(x * w, implementation=implementation), x)
            return y, pull(g)[0]

        y, dx = run(x, g)
        product = np.asarray(x, np.float64) * np.asarray(w, np.float64)
        np.testing.assert_allclose(y, value(product).astype(float), rtol=2e-6)
        want = np.asarray(w, np.float64) * gradient(product, g)
        np.testing.assert_allclose(dx, want.astype(float), rtol=2e-5, atol=2e-6)

    def test_shift_of_x(self, functions, implementation, rng):
        """Bitwise no change where the shifted logits are exact."""
        f, _, _ = functions
        x = jnp.array(rng.integers(-50, 50, size=(8, 33)) / 8, jnp.float32)
        shifted = f(x + 1024, implementation=implementation)
        np.testing.assert_array_equal(shifted, f(x, implementation=implementation))

    def test_offset_of_the_cotangent(self, implementation, rng):
        """A constant added to softmax's cotangent changes nothing beyond rounding."""
        x = jnp.array(rng.normal(size=(8, 32)), jnp.float32)
        g = jnp.array(rng.integers(-50, 50, size=(8, 32)) / 8, jnp.float32)
        _, dx = exact_vjp(softmax, x, g, implementation=implementation)
        _, moved = exact_vjp(softmax, x, g + 4096, implementation=implementation)
        np.testing.assert_allclose(moved, dx, atol=1e-6 * np.abs(dx).max())

    def test_rows_sum_to_one_and_gradients_to_zero(self, implementation, rng):
        x = jnp.array(10 * rng.normal(size=(64, 333)), jnp.float32)
        g = jnp.array(rng.normal(size=x.shape), jnp.float32)
        p, dx = exact_vjp(softmax, x, g, implementation=implementation)
        np.testing.assert_allclose(np.asarray(p, np.float64).sum(-1), 1, atol=1e-6)
        sums = np.asarray(dx, np.float64).sum(-1) / np.abs(dx).max(-1)
        np.testing.assert_allclose(sums, 0, atol=1e-6)


class TestAgainstNaive:
    """The request this library began with: jacrev of the naive formula."""

    @pytest.mark.parametrize("name", ["softmax", "log_softmax"])
    def test_jacobian(self, implementation, rng, name):
        x = jnp.array(rng.normal(size=12), jnp.float32)
        f = {"softmax": softmax, "log_softmax": log_softmax}[name]
        f = functools.partial(f, implementation=implementation)
        want = jax.jit(jax.jacrev(getattr(naive, name)))(x)
        for got in jax.jit(lambda x: (jax.jacrev(f)(x), jax.jacfwd(f)(x)))(x):
            chex.assert_trees_all_close(got, want, atol=2e-7, rtol=0)

    def test_jacobian_is_diag_minus_outer(self, implementation, rng):
        x = jnp.array(rng.normal(size=12), jnp.float32)
        got = jax.jacrev(lambda x: softmax(x, implementation=implementation))(x)
        want = naive.softmax_jacobian(softmax(x))
        chex.assert_trees_all_close(got, want, atol=1e-7, rtol=0)
        np.testing.assert_allclose(got, got.T, atol=1e-8)


class TestAgainstJaxNN:
    """Drop-in: the same values for the same positional arguments."""

    @pytest.mark.parametrize("axis", [-1, 0, (0, 1), None, (), (2, 0)])
    @pytest.mark.parametrize("masked", [False, True])
    @pytest.mark.pairwise(1)
    def test_values(self, functions, implementation, rng, axis, masked):
        f, _, _ = functions
        x = jnp.array(rng.normal(size=(3, 4, 5)), jnp.float32)
        where = jnp.array(rng.random(size=(3, 1, 5)) < 0.8) if masked else None
        with jax.debug_nans(False):  # jax.nn's own NaN in an empty log_softmax row
            want = getattr(jax.nn, f.__name__)(x, axis, where)
        got = f(x, axis, where, implementation=implementation)
        some = jnp.isfinite(want)
        np.testing.assert_allclose(got[some], want[some], rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("x64", [False, True])
    @pytest.mark.parametrize("dtype", ["int8", "int32", "bfloat16", "float16"])
    @pytest.mark.pairwise
    def test_dtype(self, functions, dtype, x64):
        f, _, _ = functions
        with jax.enable_x64(x64), jax.numpy_dtype_promotion("standard"):
            x = jnp.ones((3,), dtype)
            with warnings.catch_warnings():  # jax.nn's: -inf cast to an int
                warnings.simplefilter("ignore", RuntimeWarning)
                want = getattr(jax.nn, f.__name__)(x)
            assert f(x).dtype == want.dtype

    def test_numpy_and_scalars(self, functions):
        f, _, _ = functions
        want = f(jnp.array([1.0, 2.0]))
        np.testing.assert_array_equal(f(np.array([1.0, 2.0], np.float32)), want)
        assert float(f(3.0, axis=None)) == (1 if f is softmax else 0)


@pytest.mark.parametrize("kwargs", [{}, {"scale": 0.5}, {"where": True}])
def test_no_recompilation(functions, kwargs):
    f, _, _ = functions

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(x):
        return jax.grad(lambda x: f(x, **kwargs)[0, 0])(x)

    chex.clear_trace_counter()
    for i in range(3):
        step(jnp.full((2, 3), float(i)))


def test_no_recompilation_when_called_eagerly(functions, monkeypatch):
    """Outside jit too: the static part of a call is hashed by value."""
    f, _, _ = functions
    traces = []

    def run(call, arrays):
        traces.append(call.op)
        return xla_loss.run(call, arrays)

    monkeypatch.setattr(opaque, "run", run)
    x = jnp.ones((2, 3))
    counts = []
    for _ in range(3):
        jax.grad(lambda x: f(x, scale=0.5, implementation="opaque")[0, 0])(x)
        counts.append(len(traces))
    assert counts[0] > 0
    assert counts[1:] == counts[:1] * 2
