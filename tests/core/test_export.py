"""`jax.export` with symbolic sizes: one program that is right at every size."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import ShapeDtypeStruct, export

from jaxsoftmax import (
    PerformanceWarning,
    linear_softmax_cross_entropy,
    linear_token_logprobs_and_entropy,
    log_softmax,
    logsumexp,
    softmax,
    softmax_cross_entropy,
    softmax_cross_entropy_with_integer_labels,
    token_logprobs_and_entropy,
)
from jaxsoftmax._core import dispatch
from jaxsoftmax._linear.plan import token_chunks

# Of dimensions b, t and v; hidden ones, and the vocabulary of a linear layer, are
# known. That has two chunks in the backward.
HIDDEN, VOCABULARY = 5, 320
SIZES = ({"b": 1, "t": 3, "v": 5}, {"b": 4, "t": 11, "v": 9})

LOGITS = ("float32", ("b", "t", "v"))
MASK = ("bool", ("b", "t", "v"))
LABELS = ("int32", ("b", "t"))
EXAMPLES = ("bool", ("b", "t"))
OF_ROWS = ("float32", ("b", "t", 1))
OF_CLASSES = ("float32", ("v",))
X = ("float32", ("b", "t", HIDDEN))
WEIGHTS = ("float32", (HIDDEN, VOCABULARY))
TABLE = ("float32", (VOCABULARY, HIDDEN))
BIAS = ("float32", (VOCABULARY,))
OF_TOKENS = ("float32", ("b", "t"))

# So few bytes hold the logits of 15 tokens.
BUDGET = 15 * VOCABULARY * 4


def finite(y, where):
    return jnp.where(where, y, 0)


def all_options(x, labels, where, **options):
    return softmax_cross_entropy_with_integer_labels(
        x,
        labels,
        where=where,
        ignore_index=0,
        label_smoothing=0.1,
        z_loss=0.1,
        logits_soft_cap=5.0,
        **options,
    )


def linear_with_options(x, labels, weights, bias, scale, budget=None):
    return linear_softmax_cross_entropy(
        x,
        labels,
        weights,
        bias=bias,
        scale=scale,
        ignore_index=0,
        class_weights=jnp.square(bias),
        label_smoothing=0.1,
        reduction="sum",
        memory_budget=budget,
    )


CASES = {
    "softmax": (
        lambda x, where, scale: softmax(x, where=where, scale=scale),
        (LOGITS, MASK, OF_ROWS),
    ),
    "log_softmax": (
        lambda x, where, scale: finite(
            log_softmax(x, where=where, scale=scale, axis=(0, 2)), where
        ),
        (LOGITS, MASK, OF_ROWS),
    ),
    "logsumexp": (
        lambda x, where: logsumexp(x, (0, 2), where=where),
        (LOGITS, MASK),
    ),
    "logsumexp, weights": (
        lambda x, b, where: logsumexp(x, -1, b, return_sign=True, where=where),
        (LOGITS, OF_ROWS, MASK),
    ),
    "integer, axes": (
        lambda x, labels: softmax_cross_entropy_with_integer_labels(
            x, labels, axis=(2, 1)
        ),
        (LOGITS, ("int32", ("b",))),
    ),
    "integer, options": (all_options, (LOGITS, LABELS, MASK)),
    "integer, mean": (
        lambda x, labels, examples: all_options(x, labels, examples, reduction="mean"),
        (LOGITS, LABELS, EXAMPLES),
    ),
    "integer, weights": (
        lambda x, labels, scale, weights: softmax_cross_entropy_with_integer_labels(
            x,
            labels,
            scale=scale,
            class_weights=weights,
            label_smoothing=0.1,
            return_lse=True,
        ),
        (LOGITS, LABELS, OF_ROWS, OF_CLASSES),
    ),
    "dense": (
        lambda x, labels: softmax_cross_entropy(
            x, labels, label_smoothing=0.1, reduction="mean"
        ),
        (LOGITS, LOGITS),
    ),
    "statistics": (
        lambda x, labels, where: token_logprobs_and_entropy(
            x, labels, where=where, scale=0.5
        ),
        (LOGITS, LABELS, MASK),
    ),
    "linear, mean": (
        lambda x, labels, weights, bias: linear_softmax_cross_entropy(
            x, labels, weights, bias=bias, z_loss=0.1, reduction="mean"
        ),
        (X, LABELS, WEIGHTS, BIAS),
    ),
    "linear statistics": (
        lambda x, labels, weights: linear_token_logprobs_and_entropy(
            x, labels, weights, vocab_axis=0
        ),
        (X, LABELS, TABLE),
    ),
}


def with_gradients(f, kinds):
    """What `f` gives, and the gradients of a sum of its sines."""

    def total(*arrays):
        outs = f(*arrays)
        leaves = jax.tree.leaves(outs)
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in leaves), outs

    places = tuple(i for i, (dtype, _) in enumerate(kinds) if dtype == "float32")
    return jax.value_and_grad(total, places, has_aux=True)


def structs(kinds):
    dims = dict(zip("btv", export.symbolic_shape("b, t, v"), strict=True))
    return [
        ShapeDtypeStruct([dims.get(n, n) for n in shape], dtype)
        for dtype, shape in kinds
    ]


def arrays_of(kinds, sizes, rng):
    arrays = []
    for dtype, names in kinds:
        shape = [sizes.get(n, n) for n in names]
        values = (
            rng.integers(0, 5, shape) if dtype == "int32" else rng.normal(size=shape)
        )
        if dtype == "bool":
            values[..., :5] = 1  # else labels would be masked, which costs +inf
        arrays.append(jnp.asarray(values > 0 if dtype == "bool" else values, dtype))
    return arrays


def assert_right(f, kinds, rng, *, expected=None):
    """The exported function, at each size, gives what `expected`, or itself, gives."""
    exported = export.export(jax.jit(f))(*structs(kinds))
    for sizes in SIZES:
        arrays = arrays_of(kinds, sizes, rng)
        both = jax.jit(lambda *a: (exported.call(*a), (expected or f)(*a)))
        got, want = both(*arrays)
        close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
        jax.tree.map(close, got, want)


OTHER_VERSIONS = ("softmax", "integer, mean", "linear, mean")
RARE = ("integer, axes", "integer, weights", "linear statistics")


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            case,
            marks=[pytest.mark.versions] * (case in OTHER_VERSIONS)
            + [pytest.mark.slow] * (case in RARE),
        )
        for case in CASES
    ],
)
def test_values_and_gradients(case, rng):
    f, kinds = CASES[case]
    assert_right(with_gradients(f, kinds), kinds, rng)


@pytest.mark.versions
def test_chunks_of_tokens(rng):
    """As many as it takes at each size, where the budget is for few tokens."""
    kinds = (X, LABELS, WEIGHTS, BIAS, OF_TOKENS)
    small = with_gradients(partial(linear_with_options, budget=BUDGET), kinds)
    expected = with_gradients(linear_with_options, kinds)
    assert_right(small, kinds, rng, expected=expected)


def test_forward_mode(rng):
    def tangent(x, labels, weights, *, budget):
        f = partial(linear_softmax_cross_entropy, memory_budget=budget)
        return jax.jvp(lambda x: f(x, labels, weights), (x,), (jnp.cos(x),))[1]

    small, expected = (partial(tangent, budget=b) for b in (BUDGET, None))
    assert_right(small, (X, LABELS, WEIGHTS), rng, expected=expected)


@pytest.mark.versions
@pytest.mark.parametrize("case", OTHER_VERSIONS)
def test_every_platform(case, monkeypatch):
    monkeypatch.setattr(dispatch, "_warned_of", set())
    f, kinds = CASES[case]
    exported = export.export(
        jax.jit(with_gradients(f, kinds)), platforms=("cpu", "cuda", "rocm", "tpu")
    )
    with pytest.warns(PerformanceWarning, match="symbolic"):
        exported(*structs(kinds))


def test_memory_of_linear_is_bounded():
    """Below that of all logits, though not known is how many there are."""
    hidden, vocabulary, tokens = 8, 2048, 4096
    gradient = jax.grad(
        lambda x, weights, labels: linear_softmax_cross_entropy(
            x, labels, weights, reduction="sum", memory_budget=2**21
        ),
        (0, 1),
    )
    (n,) = export.symbolic_shape("n")

    def of(count):
        shapes = (((count, hidden), "float32"), ((hidden, vocabulary), "float32"))
        return [ShapeDtypeStruct(*s) for s in (*shapes, ((count,), "int32"))]

    exported = export.export(jax.jit(gradient))(*of(n))
    compiled = jax.jit(exported.call).lower(*of(tokens)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < tokens * vocabulary * 4 / 2


def test_sizes_that_must_be_known():
    n, v = export.symbolic_shape("n, v")
    specs = [
        ShapeDtypeStruct((n, 3), "float32"),
        ShapeDtypeStruct((n,), "int32"),
        ShapeDtypeStruct((3, v), "float32"),
    ]
    message = r"weights of shape \(3, v\) must have sizes that are known when tracing"
    with pytest.raises(ValueError, match=message):
        export.export(jax.jit(linear_softmax_cross_entropy))(*specs)


@pytest.mark.versions
@pytest.mark.parametrize("dims", ["b, t", "12, t"])
def test_symbolic_token_chunks(dims):
    shape = export.symbolic_shape(dims)

    def f(x):
        chunks = token_chunks(x.shape[:2], 8)
        split = chunks.split(x)
        return chunks.join(split), jnp.zeros(chunks.sizes), split

    exported = export.export(jax.jit(f))(ShapeDtypeStruct((*shape, 1), "float32"))
    for b, t in ((1, 1), (20, 3), (2, 9)):
        sizes = [
            n if isinstance(n, int) else m for n, m in zip(shape, (b, t), strict=True)
        ]
        x = 1 + jnp.arange(float(np.prod(sizes))).reshape(*sizes, 1)
        joined, chunk, split = exported.call(x)
        np.testing.assert_array_equal(joined, x)
        assert chunk.size < 2 * 8
        np.testing.assert_array_equal(np.sort(split[split > 0]), x.ravel())
