"""Interpreters of jaxprs other than jax's own transforms: jet, checkify, Pallas."""

import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify, jet
from jax.experimental import pallas as pl
from support.public_calls import CALLS, X, each_call

import jaxsoftmax


class TestJet:
    """Taylor series, up to the third order."""

    @pytest.fixture(autouse=True)
    def promotion(self):
        # The rules of jet itself multiply arrays by integers.
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            yield

    def check(self, ours, theirs, x):
        x = jnp.asarray(x)
        series = ([jnp.cos(x), jnp.sin(3 * x), x],)
        both = jax.jit(lambda x, s: [jet.jet(f, (x,), s) for f in (theirs, ours)])
        expected, found = map(jax.tree.leaves, both(x, series))
        # Terms of both signs, of about 1.
        atol = (
            64 * np.finfo(x.dtype).eps * max(1, *(jnp.abs(a).max() for a in expected))
        )
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=atol)

    @each_call()
    def test_value(self, name):
        call = CALLS[name]
        self.check(call.ours, call.theirs, call.x)

    @pytest.mark.versions
    @pytest.mark.parametrize("name", ["softmax", "cross_entropy mean", "attention"])
    def test_gradient(self, name):
        def gradient(f):
            return jax.grad(lambda x: jnp.sum(jnp.sin(f(x))))

        call = CALLS[name]
        self.check(gradient(call.ours), gradient(call.theirs), call.x)

    def test_under_jit_and_vmap(self):
        def second(f):
            def along(x, v):
                return jet.jet(f, (x,), ([v, jnp.zeros_like(x)],))[1][1]

            return jax.jit(jax.vmap(along))

        v = jnp.cos(X)
        expected = second(jax.nn.log_softmax)(X, v)
        found = second(jaxsoftmax.log_softmax)(X, v)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)

    def test_attention_in_blocks(self, small_blocks):
        def ours(q):
            return jaxsoftmax.dot_product_attention(q, q, q, is_causal=True)

        def theirs(q):
            return jax.nn.dot_product_attention(q, q, q, is_causal=True)

        x = np.random.default_rng(0).normal(size=(1, 40, 1, 4))
        self.check(ours, theirs, x.astype(np.float32))


def primitives(jaxpr):
    """The names in a jaxpr and in all that are within it."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    found = {eqn.primitive.name for eqn in jaxpr.eqns}
    for eqn in jaxpr.eqns:
        for value in jax.tree.leaves(list(eqn.params.values())):
            if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
                found |= primitives(value)
    return found


class TestStandardPrimitives:
    OWN = frozenset(
        [
            *("lifted_call", "linear_map", "linear_loss"),
            *("kernel_call", "kernel_call_into"),
        ]
    )

    @each_call()
    def test_value_and_gradient(self, name):
        call = CALLS[name]
        x = jnp.asarray(call.x)

        def program(f):
            return lambda x: (
                f(x),
                jax.grad(lambda x: jnp.sum(jnp.sin(f(x))))(x),
            )

        assert self.OWN & primitives(jax.make_jaxpr(program(call.ours))(x)) or (
            name == "merge_attention"
        )
        with jaxsoftmax.standard_primitives():
            assert not self.OWN & primitives(jax.make_jaxpr(program(call.ours))(x))
            found = jax.jit(program(call.ours))(x)
        expected = jax.jit(program(call.theirs))(x)
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


class TestCheckify:
    @each_call("merge_attention")
    def test_nan_is_reported(self, name, nans_allowed):
        call = CALLS[name]
        check = checkify.checkify(call.ours, errors=checkify.float_checks)
        x = jnp.asarray(call.x)
        error, _ = jax.jit(check)(x)
        assert error.get() is None
        error, _ = jax.jit(check)(x.at[1].set(jnp.inf))
        assert "nan" in error.get()

    def test_nan_in_a_gradient_is_reported(self, nans_allowed):
        def gradient(x):
            # An infinite cotangent of what has P > 0.
            return jax.vjp(jaxsoftmax.softmax, x)[1](jnp.full_like(x, jnp.inf))

        check = checkify.checkify(gradient, errors=checkify.float_checks)
        error, _ = check(jnp.asarray(X))
        assert "nan" in error.get()

    @each_call()
    def test_no_alarm(self, name):
        """Of what is left out, or of a class that is absent."""
        call = CALLS[name]
        check = checkify.checkify(
            jax.grad(lambda x: jnp.sum(jnp.sin(call.ours(x)))),
            errors=checkify.float_checks | checkify.index_checks,
        )
        error, _ = jax.jit(check)(jnp.asarray(call.x))
        assert error.get() is None

    def test_no_alarm_for_masked_nan(self):
        check = checkify.checkify(
            lambda x: jaxsoftmax.softmax(x, where=jnp.arange(5) < 3),
            errors=checkify.float_checks,
        )
        error, _ = check(jnp.asarray(X).at[:, 4].set(jnp.inf))
        assert error.get() is None


ROWS = np.random.default_rng(0).normal(size=(8, 128)).astype(np.float32)

KERNELS = {
    "softmax": jaxsoftmax.softmax,
    "log_softmax": jaxsoftmax.log_softmax,
    "softmax of axis 0": lambda x: jaxsoftmax.softmax(x, axis=0),
    "scale": lambda x: jaxsoftmax.softmax(x, scale=0.5),
    "jit": jax.jit(jaxsoftmax.softmax),
    "vjp": lambda x: jax.vjp(jaxsoftmax.softmax, x)[1](jnp.cos(x))[0],
    "log vjp": lambda x: jax.vjp(jaxsoftmax.log_softmax, x)[1](jnp.cos(x))[0],
    "jvp": lambda x: jax.jvp(jaxsoftmax.softmax, (x,), (jnp.cos(x),))[1],
}


@pytest.mark.versions
class TestPallas:
    """In the body of a Pallas kernel: as plain operations."""

    def call(self, f, **kwargs):
        def kernel(x_ref, out_ref):
            out_ref[...] = f(x_ref[...])

        return pl.pallas_call(
            kernel, out_shape=jax.ShapeDtypeStruct(ROWS.shape, ROWS.dtype), **kwargs
        )

    @pytest.mark.parametrize("name", KERNELS)
    def test_lowers_for_tpu(self, name):
        f = KERNELS[name]
        f(ROWS)  # what is traced outside of a kernel must not be met inside
        traced = jax.jit(self.call(f)).trace(ROWS)
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
        assert "tpu_custom_call" in text

    @pytest.mark.parametrize("name", KERNELS)
    def test_interpreted(self, name):
        f = KERNELS[name]
        found = self.call(f, interpret=True)(ROWS)
        np.testing.assert_allclose(found, f(ROWS), rtol=1e-5, atol=1e-6)

    def test_while_another_thread_imports_pallas(self, monkeypatch):
        """Its modules are there before what they define."""
        name = "jax._src.pallas.core"
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        np.testing.assert_array_equal(jaxsoftmax.softmax(ROWS), jax.nn.softmax(ROWS))

    def test_a_kernel_by_name_is_refused(self):
        with pytest.raises(NotImplementedError, match="inside a Pallas kernel"):
            self.call(
                lambda x: jaxsoftmax.softmax(x, implementation="mosaic_gpu"),
                interpret=True,
            )(ROWS)
