"""Kernels of programs compiled for GPUs that are not there, and memory besides.

Run by `make test-for-gpu`, which installs what that needs; skipped without it. What is
asserted holds for jax 0.10.2, 0.11.2 and 0.12.0.1. A program is added to `PROGRAMS`:
from a function of logits and their shape to what is jitted and the shapes of its
arguments.
"""

import functools

import jax
import jax.numpy as jnp
import pytest
from support import for_gpu

import jaxsoftmax

pytestmark = for_gpu.needed

ENTRIES = 2**22  # beyond it a kernel is the default
FUNCTIONS = ["softmax", "log_softmax"]
DTYPES = ["float32", "bfloat16"]
over_all = pytest.mark.parametrize("card", for_gpu.CARDS)
over_functions = pytest.mark.parametrize("name", FUNCTIONS)
over_dtypes = pytest.mark.parametrize("dtype", DTYPES)


@pytest.fixture(autouse=True, scope="module")
def gpu_by_default():
    with for_gpu.gpu_by_default():
        yield


def logits(dtype, length):
    return jax.ShapeDtypeStruct((ENTRIES // length, length), dtype)


def function(name, masked=False):
    """The function as XLA, of the logits and, where masked, a mask of their shape."""
    f = functools.partial(getattr(jaxsoftmax, name), implementation="xla")
    return (lambda x, where: f(x, where=where)) if masked else f


# --- the programs ---------------------------------------------------------------------


def forward(f, x, *others):
    return f, (x, *others)


def backward(f, x, *others):
    """The vjp alone, given what the forward kept."""
    kept, tree = [], None

    def keep(x, *others):
        nonlocal tree
        kept, tree = jax.tree.flatten(jax.vjp(lambda x: f(x, *others), x)[1])
        return kept

    kept = jax.eval_shape(keep, x, *others)
    return lambda kept, g: jax.tree.unflatten(tree, kept)(g)[0], (kept, x)


def one_program(f, x, *others):
    """Forward and backward, with nothing between them."""
    pulled = lambda x, g, *others: jax.vjp(lambda x: f(x, *others), x)[1](g)[0]
    return pulled, (x, x, *others)


def value_and_gradient(f, x, *others):
    """P, or its logarithm, is a result besides."""

    def run(x, g, *others):
        y, pull = jax.vjp(lambda x: f(x, *others), x)
        return y, pull(g)[0]

    return run, (x, x, *others)


def between_products(f, x, *others):
    """The gradients of ``f(a @ b) @ c``, in bfloat16 but for the logits."""
    rows, length = x.shape

    def loss(a, b, c, *others):
        weights = f((a @ b).astype(x.dtype), *others).astype(jnp.bfloat16)
        return jnp.sum((weights @ c).astype(jnp.float32) ** 2)

    shapes = (rows, 64), (64, length), (length, 64)
    operands = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)
    return jax.grad(loss, (0, 1, 2)), (*operands, *others)


def labels_chosen(f, x):
    """The mean of one entry per row, and its gradients, of logits of a product."""
    rows, length = x.shape

    def loss(a, b, labels):
        logits = jnp.matmul(a, b, preferred_element_type=x.dtype)
        chosen = jnp.take_along_axis(f(logits), labels[:, None], -1)
        return -jnp.mean(chosen.astype(jnp.float32))

    a, b = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((rows, 64), (64, length)))
    run = jax.value_and_grad(loss, (0, 1))
    return run, (a, b, jax.ShapeDtypeStruct((rows,), jnp.int32))


PROGRAMS = {
    "forward": forward,
    "backward": backward,
    "one program": one_program,
    "value and gradient": value_and_gradient,
    "between products": between_products,
    "labels chosen": labels_chosen,
}
ALONE = ["forward", "backward", "one program"]
over_programs = pytest.mark.parametrize("program", ALONE)


def compiled(program, card, f, *shapes):
    run, arguments = PROGRAMS[program](f, *shapes)
    return for_gpu.compiled(run, *arguments, card=card)


# --- what they are compiled to --------------------------------------------------------


@over_all
@over_functions
@over_programs
@over_dtypes
@pytest.mark.parametrize("length", [128, 1024, 4096, 16384])
@pytest.mark.pairwise
def test_xla_makes_one_kernel(card, name, program, dtype, length):
    found = compiled(program, card, function(name), logits(dtype, length))
    assert len(found.kernels) == 1
    assert found.temp_bytes == 0


@over_all
@over_functions
@over_programs
@over_dtypes
@pytest.mark.pairwise
def test_masked_rows_are_one_kernel_too(card, name, program, dtype):
    x = logits(dtype, 1024)
    where = jax.ShapeDtypeStruct(x.shape, bool)
    found = compiled(program, card, function(name, masked=True), x, where)
    assert len(found.kernels) == 1
    assert found.temp_bytes == 0


@over_all
@over_dtypes
@pytest.mark.parametrize(
    ("name", "shape", "axis"),
    [
        ("softmax", (64, 65536), -1),
        ("log_softmax", (64, 65536), -1),
        ("log_softmax", (65536, 64), 0),
        # Rows that would be one kernel, but for the dimension behind them.
        ("softmax", (4096, 1024, 1), 1),
        ("log_softmax", (4096, 1024, 1), 1),
    ],
)
@pytest.mark.pairwise
def test_derivatives_read_other_rows_twice(card, name, shape, axis, dtype):
    """One reduction, which XLA may make two kernels of, and what is computed of it."""
    f = functools.partial(getattr(jaxsoftmax, name), implementation="xla", axis=axis)
    x = jax.ShapeDtypeStruct(shape, dtype)
    found = compiled("backward", card, f, x)
    assert len(found.kernels) <= 6
    assert found.temp_bytes < 2 * ENTRIES  # of shares of rows, less than an array


@over_all
@over_functions
@over_dtypes
def test_value_and_gradient_read_the_logits_twice(card, name, dtype):
    """A P in 16 bits may be kept in float32, unrounded: else numbers per row alone."""
    x = logits(dtype, 1024)
    found = compiled("value and gradient", card, function(name), x)
    assert len(found.kernels) <= 3
    kept = (name, dtype) == ("softmax", "bfloat16")
    assert found.temp_bytes <= 4 * (x.size if kept else x.shape[0])


@over_all
@over_functions
@over_dtypes
def test_between_products_as_with_jax_nn(card, name, dtype):
    """But for one conversion of an array from or to 16 bits."""
    ours, theirs = (
        compiled("between products", card, f, logits(dtype, 1024))
        for f in (function(name), getattr(jax.nn, name))
    )
    assert len(ours.kernels) <= len(theirs.kernels) + 1
    assert ours.temp_bytes <= theirs.temp_bytes + 2 * ENTRIES


@over_all
@over_dtypes
def test_labels_chosen_as_with_jax_nn(card, dtype):
    """The logits are kept besides, of which jax.nn has what is below the maximum."""
    ours, theirs = (
        compiled("labels chosen", card, f, logits(dtype, 1024))
        for f in (function("log_softmax"), jax.nn.log_softmax)
    )
    assert len(ours.kernels) <= len(theirs.kernels)
    x = logits(dtype, 1024)
    more = x.dtype.itemsize * x.size + 64 * x.shape[0]
    assert ours.temp_bytes <= theirs.temp_bytes + more


@over_programs
@over_functions
@pytest.mark.pairwise
def test_on_hopper_a_kernel_is_the_default(name, program):
    """One of forward and one of backward; what passes between them is in memory."""
    f = lambda x: getattr(jaxsoftmax, name)(x)
    found = compiled(program, "H200", f, logits("bfloat16", 1024))
    assert len(found.kernels) == (2 if program == "one program" else 1)
    assert all("mosaic_gpu" in kernel.target for kernel in found.kernels)
    assert found.temp_bytes <= 2 * ENTRIES


@over_dtypes
def test_logsumexp_on_hopper(dtype):
    """One read of the logits, then numbers per row, and one kernel of the gradient."""
    x = logits(dtype, 1024)
    f = functools.partial(jaxsoftmax.logsumexp, axis=-1)
    found = for_gpu.compiled(f, x, card="H200")
    assert len(found.kernels) == 2
    assert sum("mosaic_gpu" in kernel.target for kernel in found.kernels) == 1
    gradient = jax.grad(lambda x: jnp.sum(f(x).astype(jnp.float32) ** 2))
    found = for_gpu.compiled(gradient, x, card="H200")
    assert len(found.kernels) == 3
    assert found.temp_bytes <= 32 * x.shape[0]
