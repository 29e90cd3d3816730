"""Attention in `jax.export`, with sizes that are symbolic."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from support.attention_cases import attention

import jaxsoftmax
from jaxsoftmax.flax import attention_fn

pytestmark = pytest.mark.versions

# Of a batch of any size; of any lengths; and of some blocks of queries.
SIZES = {"batch": ("b", 9, 12), "lengths": ("b", "t", "s"), "keys": (2, 37, "s")}


def arguments(b, t, s, make):
    """By name; `make` of a shape and a dtype."""
    shapes = {
        "query": ((b, t, 4, 8), "float32"),
        "key": ((b, s, 2, 8), "float32"),
        "value": ((b, s, 2, 8), "float32"),
        "bias": ((4, t, s), "float32"),
        "scale": ((b, 1, t, 1), "float32"),
        "mask": ((b, 1, 1, s), "bool"),
        "query_seq_lengths": ((b,), "int32"),
        "key_value_seq_lengths": ((b,), "int32"),
        "q_segment_ids": ((b, t), "int32"),
        "kv_segment_ids": ((b, s), "int32"),
        "query_offset": ((b,), "int32"),
    }
    return {name: make(*each) for name, each in shapes.items()}


def program(x):
    """The value with every option and its gradients."""
    names = ("query", "key", "value")
    floats = {name: x[name] for name in (*names, "bias", "scale")}
    others = {name: a for name, a in x.items() if name not in floats}
    options = {"is_causal": True, "local_window_size": (70, 3), "logits_soft_cap": 9.0}
    dropout = {"dropout_rate": 0.2, "dropout_key": jax.random.key(0)}

    def f(floats):
        return attention(**floats, **others, **options, **dropout)

    out, pull = jax.vjp(f, floats)
    return out, pull(out)[0]


def merged(x):
    """Two parts of keys merged, and a gradient, as in Flax."""
    plain = [x[name] for name in ("query", "key", "value")]
    a = jaxsoftmax.dot_product_attention(*plain, return_residual=True)
    loss = lambda q: jnp.sum(attention_fn(q, *plain[1:], x["bias"], x["mask"]))
    return jaxsoftmax.merge_attention(*a, *a), jax.grad(loss)(plain[0])


@pytest.mark.parametrize(
    ("program", "kind"), [(program, kind) for kind in SIZES] + [(merged, "lengths")]
)
def test_exported(small_blocks, rng, program, kind):
    """One program for all sizes, which gives what a call of the sizes gives."""
    names = [n for n in SIZES[kind] if isinstance(n, str)]
    symbols = dict(zip(names, export.symbolic_shape(",".join(names)), strict=True))
    sizes = [symbols.get(n, n) for n in SIZES[kind]]
    exported = export.export(jax.jit(program))(
        arguments(*sizes, lambda *a: jax.ShapeDtypeStruct(*a))
    )

    def concrete(shape, dtype):
        if dtype == "int32":
            return jnp.array(rng.integers(1, 9, size=shape), dtype)
        return jnp.array(rng.normal(size=shape) + (dtype == "bool"), dtype)

    given = {"b": 3, "t": 5, "s": 150}
    x = arguments(*(given.get(n, n) for n in SIZES[kind]), concrete)
    got, want = jax.jit(exported.call)(x), jax.jit(program)(x)
    for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_what_must_be_known():
    (n,) = export.symbolic_shape("n")
    x = jax.ShapeDtypeStruct((2, 9, n, 8), "float32")
    with pytest.raises(ValueError, match=r"the heads of query.*must be known"):
        export.export(jax.jit(jaxsoftmax.dot_product_attention))(x, x, x)
