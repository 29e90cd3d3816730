"""jax's tools for debugging: no jit, checks for NaN and inf, chex.fake_jit."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.public_calls import CALLS, KINDS, LABELS, QUERY, WEIGHTS, X, each_call

import jaxsoftmax

# Sums of up to a hundred products of numbers near 1, and up to two derivatives.
TOLERANCE = 64 * np.finfo(np.float32).eps

MODES = {
    "value": lambda f, x: f(x),
    "grad": lambda f, x: jax.grad(lambda x: jnp.sum(jnp.sin(f(x))))(x),
    "jvp": lambda f, x: jax.jvp(f, (x,), (jnp.ones_like(x),)),
    "jit": lambda f, x: jax.jit(f)(x),
    "vmap of grad": lambda f, x: jax.vmap(jax.grad(lambda x: jnp.sum(jnp.sin(f(x)))))(
        jnp.stack([x, 2 * x])
    ),
    "hvp": lambda f, x: jax.jvp(
        jax.grad(lambda x: jnp.sum(jnp.sin(f(x)))), (x,), (jnp.cos(x),)
    )[1],
}
# One of each kind of rule in every mode, the others in one.
EVERY_MODE = ["softmax where", "cross_entropy mean", "attention"]
CASES = [(name, "grad") for name in CALLS if name not in EVERY_MODE]
CASES += [(name, mode) for name in EVERY_MODE for mode in MODES]


@pytest.mark.parametrize(("name", "mode"), CASES)
@pytest.mark.pairwise(1)
def test_without_jit(name, mode):
    call = CALLS[name]
    x = jnp.asarray(call.x)
    expected = jax.jit(MODES[mode], static_argnums=0)(call.theirs, x)
    with jax.disable_jit():
        found = MODES[mode](call.ours, x)
    chex.assert_trees_all_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.versions
@pytest.mark.parametrize("name", EVERY_MODE)
def test_fake_jit(name):
    call = CALLS[name]
    x = jnp.asarray(call.x)
    with chex.fake_jit():
        found = jax.jit(MODES["grad"], static_argnums=0)(call.ours, x)
    expected = jax.jit(MODES["grad"], static_argnums=0)(call.theirs, x)
    chex.assert_trees_all_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.fixture
def no_caches():
    """Else jax itself may miss a NaN.

    So it does after a jvp of jax.nn.log_softmax, with jit and then without.
    """
    jax.clear_caches()


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        pytest.param(name, mode, marks=[pytest.mark.slow] * (name not in KINDS))
        for name, mode in CASES
        if mode in ("value", "grad", "jvp") and name != "merge_attention"
    ],
)
def test_nan_is_reported(name, mode, no_caches):
    call = CALLS[name]
    x = jnp.asarray(call.x).at[1].set(jnp.inf)
    with pytest.raises(FloatingPointError, match="nan"):
        MODES[mode](call.ours, x)


@pytest.mark.parametrize("implementation", ["xla", "opaque"])
def test_nan_of_an_implementation_is_reported(implementation, no_caches):
    x = jnp.asarray(X).at[1].set(jnp.inf)
    with pytest.raises(FloatingPointError, match="nan"):
        jaxsoftmax.softmax(x, implementation=implementation)


@pytest.mark.versions
@pytest.mark.parametrize("name", EVERY_MODE)
def test_nan_is_reported_without_jit(name, no_caches):
    call = CALLS[name]
    x = jnp.asarray(call.x).at[1].set(jnp.inf)
    with jax.disable_jit(), pytest.raises(FloatingPointError, match="nan"):
        call.ours(x)


@each_call()
def test_no_alarm_where_all_is_finite(name):
    call = CALLS[name]
    with jax.debug_infs(True):
        MODES["grad"](call.ours, jnp.asarray(call.x))


@pytest.mark.versions
class TestInfs:
    """With jax_debug_infs, an alarm where a result has an inf, and only there."""

    @pytest.fixture(autouse=True)
    def debug_infs(self):
        with jax.debug_infs(True):
            yield

    def absent(self, x, place):
        """`x` with -inf, made in numpy: jax reports its own constants."""
        x = np.array(x)
        x[place] = -np.inf
        return jax.device_put(x)

    def test_softmax_of_what_is_absent(self):
        x = self.absent(X, (0, 2))
        chex.assert_tree_all_finite(jaxsoftmax.softmax(x))
        MODES["grad"](jaxsoftmax.softmax, x)

    def test_log_softmax_as_jax_nn(self):
        x = self.absent(X, (0, 2))
        for f in (jax.nn.log_softmax, jaxsoftmax.log_softmax):
            with pytest.raises(FloatingPointError, match="inf"):
                f(x)

    @pytest.mark.parametrize("why", ["mask", "static offset", "offset"])
    def test_query_without_keys(self, why):
        offset = -2 if why == "static offset" else np.array([-2])
        options = {"is_causal": True, "query_offset": offset}
        if why == "mask":
            options = {"mask": jnp.ones((1, 4, 4), bool).at[0, 1].set(False)}

        def f(q):
            return jaxsoftmax.dot_product_attention(q, q, q, **options)

        assert not f(jnp.asarray(QUERY))[1].any()
        jax.grad(lambda q: jnp.sum(f(q)))(jnp.asarray(QUERY))
        jax.jvp(f, (jnp.asarray(QUERY),), (jnp.asarray(QUERY),))

    def test_log_sum_exp_of_a_query_without_keys(self):
        mask = jnp.zeros((1, 4, 4), bool)
        q = jnp.asarray(QUERY)
        with pytest.raises(FloatingPointError, match="inf"):
            jaxsoftmax.dot_product_attention(q, q, q, mask=mask, return_residual=True)

    @pytest.mark.parametrize("reduction", ["none", "mean"])
    def test_classes_that_are_absent(self, reduction):
        x = self.absent(X, (slice(None), 3))

        def loss(x):
            return jnp.sum(
                jaxsoftmax.softmax_cross_entropy_with_integer_labels(
                    x, LABELS, label_smoothing=0.1, reduction=reduction
                )
            )

        jax.value_and_grad(loss)(x)

    def test_linear_with_a_class_that_is_absent(self):
        bias = self.absent(np.zeros(5, "f4"), 3)

        def loss(weights):
            return jaxsoftmax.linear_softmax_cross_entropy(
                X[:, :3], LABELS, weights, bias=bias, reduction="mean"
            )

        jax.value_and_grad(loss)(jnp.asarray(WEIGHTS))
