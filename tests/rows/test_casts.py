"""Logits that are a cast of 16 bits: on a GPU they are read as they were before it.

What is traced is what a process with a GPU would trace.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import for_gpu

from jaxsoftmax import (
    explain,
    log_softmax,
    logsumexp,
    softmax_cross_entropy_with_integer_labels,
    token_logprobs_and_entropy,
)
from jaxsoftmax._compat import trace

WIDE = jnp.float32
SHAPE = 6, 40
LABELS = np.arange(6)


@pytest.fixture(autouse=True, scope="module")
def gpu_by_default():
    with for_gpu.gpu_by_default():
        yield


@pytest.fixture
def x(rng):
    return jnp.array(rng.normal(size=SHAPE), jnp.bfloat16)


# --- what is seen of a cast -----------------------------------------------------------

TRANSFORMS = {
    "jit": lambda f: f,
    "grad": jax.grad,
    "value_and_grad": jax.value_and_grad,
    "jvp": lambda f: lambda x: jax.jvp(f, (x,), (x,)),
    "hessian": jax.hessian,
    "vmap": lambda f: lambda x: jax.vmap(f)(x[None]),
    "vmap of grad": lambda f: lambda x: jax.vmap(jax.grad(f))(x[None]),
    "checkpoint": lambda f: jax.grad(jax.checkpoint(f)),
    "scan": lambda f: lambda x: jax.lax.scan(lambda _, x: (0, f(x)), 0, x[None]),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_dtype_before_cast(x, transform):
    found = []

    def f(x):
        y = (2 * x).astype(WIDE)
        moved = y[:, :-1], y.reshape(-1, 8), y.T[None], jnp.broadcast_to(y, (2, 6, 40))
        found.append([trace.dtype_before_cast(each) for each in (y, *moved)])
        found.append([trace.dtype_before_cast(each) for each in (2 * y, x)])
        return y.sum()

    jax.jit(TRANSFORMS[transform](f))(x)
    assert found[0] == [np.dtype(jnp.bfloat16)] * 5
    assert found[1] == [None] * 2


def test_dtype_before_cast_of_what_is_not_traced(x):
    assert trace.dtype_before_cast(x.astype(WIDE)) is None
    assert trace.dtype_before_cast(np.zeros(3)) is None


# --- what is done with it -------------------------------------------------------------


def mean_loss(y, **options):
    return softmax_cross_entropy_with_integer_labels(
        y, LABELS, reduction="mean", **options
    )


def mean_logprob(y, **options):
    return jnp.mean(token_logprobs_and_entropy(y, LABELS, **options).logprobs)


def first_logprob(y, **options):
    return jnp.mean(log_softmax(y, **options)[:, 0])


def z_loss(y, **options):
    return jnp.mean(logsumexp(y, -1, **options) ** 2)


FUNCTIONS = [mean_loss, mean_logprob, first_logprob, z_loss]
over_functions = pytest.mark.parametrize("function", FUNCTIONS)


def logits_dtypes(f, *arrays):
    """Of the logits of all calls of kernels in the gradient."""
    calls = [choice.call for choice in explain(jax.grad(f), *arrays).choices]
    assert calls
    return {call.arrays[0].dtype.name for call in calls}


@over_functions
def test_cast_is_undone(x, function):
    assert logits_dtypes(lambda x: function(x.astype(WIDE)), x) == {"bfloat16"}
    in_float16 = x.astype("float16")
    assert logits_dtypes(lambda x: function(x.astype(WIDE)), in_float16) == {"float16"}


@over_functions
def test_results_are_those_of_the_cast(x, function):
    """In their dtypes, and to the digits that a sum in another order leaves."""
    wide = x.astype(WIDE)
    want = jax.value_and_grad(function)(wide)
    got = jax.jit(jax.value_and_grad(lambda x: function(x.astype(WIDE))))(x)
    assert (got[0].dtype, got[1].dtype) == (WIDE, jnp.bfloat16)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
    np.testing.assert_allclose(got[1].astype(WIDE), want[1], rtol=2**-8, atol=1e-9)


def test_cast_is_left(x):
    """Where XLA runs, where it is of a product, and to another dtype than float32."""
    by_xla = lambda x: mean_loss(x.astype(WIDE), implementation="xla")
    scaled = lambda x, scale: mean_loss(x.astype(WIDE), scale=scale)
    assert logits_dtypes(by_xla, x) == {"float32"}
    assert logits_dtypes(scaled, x, jnp.float32(0.3)) == {"float32"}
    assert logits_dtypes(lambda x: mean_loss(3 * x.astype(WIDE)), x) == {"float32"}
    assert logits_dtypes(lambda x: mean_loss(x.astype("float16")), x) == {"float16"}
