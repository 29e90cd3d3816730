"""What the backward keeps, and what a compiled gradient needs besides."""

import functools
import re
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.compilation import exact_jit
from support.residuals import kept

import jaxsoftmax._rows
from jaxsoftmax import (
    log_softmax,
    logsumexp,
    softmax,
    softmax_cross_entropy,
    softmax_cross_entropy_with_integer_labels,
    token_logprobs_and_entropy,
)
from jaxsoftmax._rows import row_loss, triton
from jaxsoftmax._rows.call import RowCall


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.pairwise
def test_softmax_keeps_its_output(implementation, rng, dtype, masked, jit):
    x = jnp.array(rng.normal(size=(64, 128)), dtype)
    where = jnp.array(rng.random(size=(1, 128)) < 0.8) if masked else None
    f = functools.partial(softmax, where=where, implementation=implementation)
    y, leaves = kept(jax.jit(f) if jit else f, x)
    assert [(p.shape, p.dtype) for p in leaves.values()] == [(x.shape, x.dtype)]
    assert y.unsafe_buffer_pointer() in leaves  # P is stored once


def test_float32_logits_to_bf16_keep_two_bytes_an_entry(implementation, rng):
    x = jnp.array(rng.normal(size=(64, 128)), jnp.float32)
    f = functools.partial(
        softmax, dtype=jnp.bfloat16, scale=0.125, implementation=implementation
    )
    _, leaves = kept(f, x)
    assert sum(p.nbytes for p in leaves.values()) == 2 * x.size


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("masked", [False, True])
def test_log_softmax_keeps_x_and_two_numbers_a_row(implementation, rng, dtype, masked):
    x = jnp.array(rng.normal(size=(64, 128)), dtype)
    where = jnp.array(rng.random(size=(1, 128)) < 0.8) if masked else None
    f = functools.partial(log_softmax, where=where, implementation=implementation)
    _, leaves = kept(f, x)
    assert leaves.pop(x.unsafe_buffer_pointer()).shape == x.shape  # x, not a copy
    if masked:
        assert leaves.pop(where.unsafe_buffer_pointer()).shape == where.shape
    numbers = [((64, 1), jnp.float32)] * 2
    assert [(r.shape, r.dtype) for r in leaves.values()] == numbers


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("masked", "weighted"), [(False, False), (True, False), (1, 1)]
)
def test_logsumexp_keeps_its_arguments_and_two_numbers_a_row(
    implementation, rng, dtype, masked, weighted
):
    x = jnp.array(rng.normal(size=(64, 128)), dtype)
    where = jnp.array(rng.random(size=(1, 128)) < 0.8) if masked else None
    b = jnp.array(rng.normal(size=(64, 128)), dtype) if weighted else None
    options = {"where": where, "implementation": implementation, "return_sign": True}
    if weighted:
        _, leaves = kept(lambda x, b: logsumexp(x, -1, b, **options), x, b)
    else:
        _, leaves = kept(lambda x: logsumexp(x, -1, **options), x)
    for given in (x, where, b):
        if given is not None:
            assert leaves.pop(given.unsafe_buffer_pointer()).shape == given.shape
    assert [(r.shape, r.dtype) for r in leaves.values()] == [((64, 1), jnp.float32)] * 2


def test_array_as_scale_keeps_x_as_it_came(implementation, rng):
    """A bf16 x stays bf16: no copy of it in float32."""
    x = jnp.array(rng.normal(size=(64, 128)), jnp.bfloat16)
    scale = jnp.float32(0.7)
    f = lambda x, scale: softmax(x, scale=scale, implementation=implementation)
    _, leaves = kept(f, x, scale)
    kept_bytes = 2 * 2 * x.size + scale.nbytes
    assert sum(p.nbytes for p in leaves.values()) == kept_bytes


def attention_gradient(f, dtype, layers):
    """The compiled gradient of layers of softmax(h h^T / 8) h, T = 1024, width 64."""

    def loss(h):
        for _ in range(layers):
            h = h + f(jnp.einsum("qd,kd->qk", h, h) / 8) @ h
        return jnp.sum(h.astype(jnp.float32) ** 2)

    h = jax.ShapeDtypeStruct((1024, 64), dtype)
    return exact_jit(jax.grad(loss)).lower(h).compile()


OLD_XLA = pytest.mark.skipif(
    jax.__version_info__ < (0, 10, 2), reason="its XLA fuses less of the bf16 backward"
)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=OLD_XLA)])
def test_attention_needs_no_more_memory_than_with_jax_nn(dtype):
    """But for five arrays in float32 of the one backward that runs at a time."""
    temp = [
        attention_gradient(f, dtype, layers=8).memory_analysis().temp_size_in_bytes
        for f in (softmax, jax.nn.softmax)
    ]
    assert temp[0] <= temp[1] + 5 * 4 * 1024**2


def test_kept_bytes_of_attention(rng):
    """P in bf16 serves the backward of softmax and of P @ v: it is kept once."""
    q, k, v = (jnp.array(rng.normal(size=(256, 32)), jnp.bfloat16) for _ in range(3))

    def attention(f, q, k, v):
        logits = jnp.einsum("qd,kd->qk", q, k, preferred_element_type=jnp.float32)
        return jnp.einsum("qk,kd->qd", f(logits), v)

    def nbytes(f):
        _, leaves = kept(jax.jit(functools.partial(attention, f)), q, k, v)
        return sum(x.nbytes for x in leaves.values())

    ours = nbytes(functools.partial(softmax, dtype=jnp.bfloat16))
    reference = nbytes(lambda logits: jax.nn.softmax(logits).astype(jnp.bfloat16))
    inputs = 3 * q.nbytes
    assert ours == 2 * 256 * 256 + inputs
    assert reference >= 6 * 256 * 256


def loss_of(x, labels, **options):
    return softmax_cross_entropy_with_integer_labels(
        x, labels, ignore_index=-100, label_smoothing=0.1, z_loss=1e-4, **options
    )


def logits_and_labels(rng, dtype, shape=(64, 512)):
    x = jnp.array(rng.normal(size=shape), dtype)
    return x, jnp.array(rng.integers(shape[1], size=shape[0]), jnp.int32)


def others(leaves):
    """Shapes and dtypes of the arrays that are kept, numbers a row apart."""
    rows = 64
    small = [v for v in leaves.values() if v.size <= rows]
    assert {v.dtype.name for v in small} <= {"float32", "int32", "bool"}
    return [(v.shape, v.dtype) for v in leaves.values() if v.size > rows]


@pytest.mark.parametrize(("dtype", "jit"), [("float32", False), ("bfloat16", True)])
@pytest.mark.parametrize("kind", ["loss", "tokens", "loss and lse"])
@pytest.mark.pairwise
def test_cross_entropy_keeps_the_logits_and_numbers_a_row(
    implementation, rng, dtype, jit, kind
):
    x, labels = logits_and_labels(rng, dtype)
    if kind == "tokens":
        f = functools.partial(token_logprobs_and_entropy, labels=labels)
    else:
        f = functools.partial(loss_of, labels=labels, return_lse=kind == "loss and lse")
    f = functools.partial(f, implementation=implementation)
    _, leaves = kept(jax.jit(f) if jit else f, x)
    assert leaves.pop(x.unsafe_buffer_pointer()).shape == x.shape  # x, not a copy
    assert others(leaves) == []
    assert sum(v.dtype == jnp.int32 for v in leaves.values()) == 1  # the labels
    assert sum(v.nbytes for v in leaves.values()) <= 128 * len(x)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.pairwise
def test_reduced_cross_entropy_keeps_its_gradient_alone(
    implementation, rng, dtype, jit
):
    x, labels = logits_and_labels(rng, dtype)
    f = functools.partial(
        loss_of, labels=labels, reduction="mean", implementation=implementation
    )
    _, leaves = kept(jax.jit(f) if jit else f, x)
    assert x.unsafe_buffer_pointer() not in leaves
    assert others(leaves) == [(x.shape, x.dtype)]


def test_reduced_cross_entropy_of_float16_keeps_the_logits(implementation, rng):
    """Its gradient would be subnormal before a loss scale multiplies it."""
    x, labels = logits_and_labels(rng, "float16")
    f = functools.partial(
        loss_of, labels=labels, reduction="mean", implementation=implementation
    )
    _, leaves = kept(f, x)
    assert leaves.pop(x.unsafe_buffer_pointer()).shape == x.shape
    assert others(leaves) == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dense_cross_entropy_keeps_logits_and_labels(implementation, rng, dtype):
    x, _ = logits_and_labels(rng, dtype)
    labels = jnp.array(rng.random(size=x.shape), dtype)
    f = functools.partial(softmax_cross_entropy, implementation=implementation)
    _, leaves = kept(f, x, labels)
    for v in (x, labels):
        assert leaves.pop(v.unsafe_buffer_pointer()).shape == v.shape
    assert others(leaves) == []


def optax_loss(x, labels, reduction):
    loss = optax.losses.softmax_cross_entropy_with_integer_labels
    y = loss(x.astype(jnp.float32), labels)
    return y if reduction == "none" else jnp.mean(y)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_cross_entropy_keeps_less_than_optax(rng, dtype, reduction):
    """Besides the logits, which are alive anyway where a layer made them."""
    x, labels = logits_and_labels(rng, dtype)

    def nbytes(f):
        _, leaves = kept(lambda x: f(x, labels, reduction=reduction), x)
        leaves.pop(x.unsafe_buffer_pointer(), None)
        return sum(v.nbytes for v in leaves.values())

    numbers = 64 * 32  # eight numbers a row
    gradient = x.nbytes if reduction == "mean" else 0
    assert nbytes(softmax_cross_entropy_with_integer_labels) <= gradient + numbers
    assert nbytes(optax_loss) >= 4 * x.size


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_cross_entropy_needs_no_more_memory_than_optax(reduction):
    x = jax.ShapeDtypeStruct((256, 8192), "bfloat16")
    labels = jax.ShapeDtypeStruct((256,), "int32")

    def temp(f):
        loss = lambda x, labels: jnp.sum(f(x, labels, reduction=reduction))
        compiled = exact_jit(jax.value_and_grad(loss)).lower(x, labels).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    numbers = 64 * x.shape[0]  # bytes of what is one a row
    assert temp(softmax_cross_entropy_with_integer_labels) <= temp(optax_loss) + numbers


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_forward_and_backward_share_the_exponentials(reduction):
    """In one program XLA for CPU stores them once, and then the gradient."""

    def loss(x, labels):
        f = softmax_cross_entropy_with_integer_labels
        return f(x, labels, reduction=reduction).mean()

    x = jax.ShapeDtypeStruct((64, 512), jnp.float32)
    labels = jax.ShapeDtypeStruct((64,), jnp.int32)
    program = exact_jit(jax.value_and_grad(loss)).lower(x, labels).compile()
    _, entry = program.as_text().split("ENTRY")
    assert len(re.findall(r"= f32\[64,512\]\S* fusion\(", entry)) <= 2


def test_nothing_is_kept_without_differentiation():
    """The plain forward of log_softmax returns y alone, though its rule keeps more."""
    x = jnp.ones((8, 16))
    jaxpr = jax.make_jaxpr(log_softmax)(x)
    assert len(jaxpr.out_avals) == 1
    np.testing.assert_allclose(np.exp(log_softmax(x)).sum(-1), 1, rtol=1e-6)


def kept_by_trace(f, x):
    """Of the traced vjp: what is kept, and whether it is the input or the output."""

    def vjp(x):
        y, pull = jax.vjp(f, x)
        return y, jax.tree.leaves(pull)

    jaxpr = jax.make_jaxpr(vjp)(x).jaxpr
    y, *leaves = jaxpr.outvars
    names = {id(jaxpr.invars[0]): "x", id(y): "y"}
    return [(names.get(id(v)), v.aval.shape, v.aval.dtype) for v in leaves]


def test_kept_where_a_tpu_is_the_default(monkeypatch):
    """P, and a float32 per row: where its largest entry is."""
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    x = jax.ShapeDtypeStruct((63, 4096), jnp.bfloat16)  # of no other test: jit caches
    index = (None, (63, 1), jnp.dtype("float32"))
    assert kept_by_trace(softmax, x) == [("y", x.shape, x.dtype), index]


@pytest.mark.parametrize("name", ["xla", "mosaic_gpu", "triton", None])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("out", ["float32", "bfloat16"])
def test_kept_where_a_gpu_is_the_default(monkeypatch, name, dtype, out):
    """Traced, which needs none. Of softmax P, or where XLA computes it anew, x.

    Of log_softmax x, and for a kernel two float32 per row.
    """
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    x = jax.ShapeDtypeStruct((64, 2048), dtype)
    options = {"dtype": out, "implementation": name}
    kept = kept_by_trace(functools.partial(softmax, **options), x)
    as_xla = name in ("xla", None)  # by default, so small an array is XLA's
    anew = as_xla and out == "float32"
    assert kept == [
        (None, x.shape, x.dtype) if anew else ("y", x.shape, jnp.dtype(out))
    ]
    kept = kept_by_trace(functools.partial(log_softmax, **options), x)
    number = [(None, (64, 1), jnp.dtype("float32"))]
    assert sorted(kept, key=str) == [
        ("x", x.shape, x.dtype),
        *([] if as_xla else 2 * number),
    ]


# --- Triton's kernels, with a stand-in for jax-triton ---------------------------------

FIRST, SECOND = 3.0, 5.0  # what the stand-in's kernel writes


def zeros_plus(value, struct):
    return jnp.full(struct.shape, value, struct.dtype)


def triton_call_0_3(*arrays, kernel, out_shape, input_output_aliases=None, C, **launch):
    """jax-triton 0.3.1: what is aliased has a type, and a pointer of its own."""
    triton_call_0_3.seen = (arrays, input_output_aliases or {}, C.options.in_place)
    return tuple(map(zeros_plus, (FIRST, SECOND), out_shape))


def triton_call_0_4(*arrays, kernel, out_type, C, **launch):
    """jax-triton 0.4.1: a reference is written, and has no type among the results."""
    refs = [i for i, x in enumerate(arrays) if "Ref" in str(jax.typeof(x))]
    triton_call_0_4.seen = (arrays, dict.fromkeys(refs, 0), C.options.in_place)
    for i in refs:
        arrays[i][...] = zeros_plus(FIRST, jax.typeof(arrays[i]))
    values = (SECOND,) if refs else (FIRST, SECOND)
    assert len(arrays) + len(out_type) == 7  # as many as the kernel has pointers
    return tuple(map(zeros_plus, values, out_type))


@pytest.mark.parametrize("call", [triton_call_0_3, triton_call_0_4])
@pytest.mark.parametrize(
    ("shape", "axis", "dtype", "asked", "possible"),
    [
        ((64, 4096), -1, "bfloat16", True, True),
        ((64, 50257), -1, "bfloat16", True, True),
        ((64, 4096), -1, "bfloat16", False, False),
        # Warps of a program that has other rows too.
        ((64, 256), -1, "bfloat16", True, False),
        ((4096, 64), -2, "bfloat16", True, False),
        # The gradient is in another dtype, as behind a linear layer in bfloat16.
        ((64, 4096), -1, "float32", True, False),
    ],
)
def test_triton_writes_the_gradient_over_the_logits(
    monkeypatch, call, shape, axis, dtype, asked, possible
):
    """Which are the one operand that is aliased, and are no other operand."""
    stand_in = types.SimpleNamespace(triton_call=call)
    monkeypatch.setitem(sys.modules, "jax_triton", stand_in)
    source = types.SimpleNamespace(jaxsoftmax_cross_entropy_with_gradient=None)
    monkeypatch.setattr(jaxsoftmax._rows, "triton_source", source, raising=False)
    monkeypatch.setitem(sys.modules, "jaxsoftmax._rows.triton_source", source)
    row = tuple(1 if i == len(shape) + axis else n for i, n in enumerate(shape))
    x = jnp.ones(shape, dtype)
    labels, weight = jnp.zeros(row, jnp.int32), jnp.ones(row)

    @jax.jit
    def run(x, labels, weight):
        options = row_loss.Options(in_place=asked)
        arrays = (x, None, labels, weight, weight)
        call_ = RowCall(
            "cross_entropy_with_gradient",
            (axis,),
            1.0,
            jnp.dtype(jnp.bfloat16),
            options,
            arrays=arrays,
        )
        dx, row_max, *_ = triton.run(call_, arrays)
        arrays, aliases, in_place = call.seen
        assert aliases == ({0: 0} if possible else {})
        assert in_place == possible
        assert not any(other is x for other in arrays[1:])
        return dx, row_max

    dx, row_max = run(x, labels, weight)
    assert (dx.shape, dx.dtype) == (shape, jnp.bfloat16)
    np.testing.assert_array_equal(dx.astype(jnp.float32), FIRST)
    np.testing.assert_array_equal(row_max, SECOND)
