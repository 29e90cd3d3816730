"""The textbook formulas, and the worked example with its signs right."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsoftmax import log_softmax, naive, softmax


@pytest.mark.parametrize("dP", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (2, -3, 5)])
def test_worked_example(implementation, dP):
    """P = (0.1, 0.5, 0.4), dP = (a, b, c)."""
    a, b, c = dP
    want = [
        0.09 * a - 0.05 * b - 0.04 * c,
        -0.05 * a + 0.25 * b - 0.2 * c,
        -0.04 * a - 0.2 * b + 0.24 * c,
    ]
    p = jnp.array([0.1, 0.5, 0.4])
    g = jnp.array(dP, jnp.float32)
    np.testing.assert_allclose(naive.softmax_vjp(p, g), want, atol=1e-6)
    f = lambda x: softmax(x, implementation=implementation)
    y, pull = jax.vjp(f, jnp.log(p))
    np.testing.assert_allclose(y, p, atol=1e-7)
    np.testing.assert_allclose(pull(g)[0], want, atol=1e-6)


def test_jacobian_is_the_derivative(rng):
    x = jnp.array(rng.normal(size=(2, 5)), jnp.float32)
    p = naive.softmax(x)
    want = jax.vmap(jax.jacrev(naive.softmax))(x)
    np.testing.assert_allclose(naive.softmax_jacobian(p), want, atol=1e-7)
    np.testing.assert_allclose(jnp.sum(naive.softmax_jacobian(p), -1), 0, atol=1e-7)


def test_vjp_is_the_identity_of_this_library(rng):
    x, g = jnp.array(rng.normal(size=(2, 4, 5)), jnp.float32)
    p = naive.softmax(x)
    want = p * (g - jnp.sum(p * g, axis=-1, keepdims=True))
    np.testing.assert_allclose(naive.softmax_vjp(p, g), want, atol=1e-7)


def test_values(rng):
    x = jnp.array(rng.normal(size=(2, 5)), jnp.float32)
    np.testing.assert_allclose(naive.softmax(x), softmax(x), rtol=1e-6)
    np.testing.assert_allclose(naive.log_softmax(x), log_softmax(x), rtol=1e-6)
