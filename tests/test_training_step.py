"""Pieces of a training step, and a step, compiled for GPUs that are not there.

Run by `make test-for-gpu`, as tests/rows/test_kernel_counts.py. Each program is beside
the same one with jax.nn and optax: kernels, copies and temporary bytes. The bars are
what holds for jax 0.10.2, 0.11.2 and 0.12.0.1.
"""

import functools
import math

import jax
import jax.numpy as jnp
import pytest
from support import for_gpu, gpt2
from support.gpt2 import (
    LOW,
    Size,
    by_einsum,
    cast,
    in_bfloat16,
    jax_nn,
    optax_loss,
    our_loss,
)

pytestmark = [
    for_gpu.needed,
    # For an A100 without jax-triton.
    pytest.mark.filterwarnings("ignore::jaxsoftmax.PerformanceWarning"),
]

PER_ROW = 64  # bytes that programs may differ by for each row
# Of Mosaic kernels alone: ptxas is not told of every card.
over_cards = pytest.mark.parametrize("card", ["A100", "H200"])


@pytest.fixture(autouse=True, scope="module")
def gpu_by_default():
    with for_gpu.gpu_by_default():
        yield


def array(shape, dtype=LOW):
    return jax.ShapeDtypeStruct(shape, dtype)


@functools.cache
def compiled(program, *options, card):
    """`program` returns a function and the shapes of its arguments."""
    f, shapes = program(*options)
    return for_gpu.compiled(f, *shapes, card=card)


def other_kernels(program):
    return [kernel for kernel in program.kernels if not kernel.is_product]


def copies(program):
    return [kernel for kernel in program.kernels if kernel.is_copy]


def assert_within(ours, theirs, *, rows, more_bytes=0):
    """No more kernels besides products, no more copies, no more memory."""
    assert len(other_kernels(ours)) <= len(other_kernels(theirs))
    assert len(copies(ours)) <= len(copies(theirs))
    assert ours.temp_bytes <= theirs.temp_bytes + more_bytes + PER_ROW * rows


# --- attention, written with einsums --------------------------------------------------


over_ours = pytest.mark.parametrize("ours", [cast, in_bfloat16])


def attention_layers(softmax, shape, layers):
    """The result of one after the other, and the gradients of q, k and v."""

    def forward(q, k, v):
        for _ in range(layers):
            q = by_einsum(softmax)(q, k, v)
        return q

    def run(q, k, v, g):
        out, pull = jax.vjp(forward, q, k, v)
        return out, pull(g)

    return run, [array(shape)] * 4


def check_attention(card, ours, shape, layers, *, more_bytes=0):
    batch, length, heads, _ = shape
    found, theirs = (
        compiled(attention_layers, softmax, shape, layers, card=card)
        for softmax in (ours, jax_nn)
    )
    rows = batch * heads * length
    assert_within(found, theirs, rows=rows, more_bytes=more_bytes)
    assert not [k for k in copies(found) if k.entries >= rows * length]


@pytest.mark.parametrize("card", for_gpu.CARDS)
@over_ours
def test_small_attention_layer(card, ours):
    check_attention(card, ours, (2, 256, 4, 64), 1)


@pytest.mark.parametrize("card", ["H200", "B200"])
@over_ours
def test_attention_layers_of_gpt2(card, ours):
    """With jax.nn logits and P of the first are kept while the second runs.

    Copies of q, k and v in the order of products live shorter or longer.
    """
    shape = (16, 1024, 12, 64)
    more = 3 * 2 * math.prod(shape)
    if ours is in_bfloat16:
        more -= 2 * 16 * 12 * 1024**2
    check_attention(card, ours, shape, 2, more_bytes=more)


# --- the last layer and its loss ------------------------------------------------------


TOKENS, WIDTH = 4096, 256


def last_layer(loss, vocabulary, dtype):
    """Its value, and the gradients of the hidden states and the weights."""

    def value(x, weights, labels):
        return loss(x, weights, labels, jnp.dtype(dtype))

    shapes = array((TOKENS, WIDTH)), array((WIDTH, vocabulary))
    return jax.value_and_grad(value, (0, 1)), (*shapes, array((TOKENS,), jnp.int32))


@over_cards
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("vocabulary", [50304, 50257])
def test_last_layer(card, dtype, vocabulary):
    ours, theirs = (
        compiled(last_layer, loss, vocabulary, dtype, card=card)
        for loss in (our_loss, optax_loss)
    )
    assert_within(ours, theirs, rows=TOKENS)


@pytest.mark.parametrize("vocabulary", [50304, 50257])
def test_cast_before_the_loss_costs_nothing(vocabulary):
    cast, none = (
        compiled(last_layer, our_loss, vocabulary, dtype, card="H200")
        for dtype in ("float32", "bfloat16")
    )
    assert cast == none


# --- a step ---------------------------------------------------------------------------

SIZE = Size(batch=4, length=512, width=WIDTH, heads=4, layers=1, vocabulary=8192)


def step(softmax, loss):
    params = jax.eval_shape(functools.partial(gpt2.parameters, SIZE))
    state = params, jax.eval_shape(gpt2.OPTIMIZER.init, params)
    tokens = array((SIZE.batch, SIZE.length), jnp.int32)
    mean_loss = gpt2.mean_loss(SIZE, by_einsum(softmax), loss)
    return gpt2.step(mean_loss), (state, tokens)


@over_cards
def test_step(card):
    """On an A100 one byte more for each entry of the attention's logits."""
    ours = compiled(step, in_bfloat16, our_loss, card=card)
    theirs = compiled(step, jax_nn, optax_loss, card=card)
    tokens = SIZE.batch * SIZE.length
    rows = tokens * SIZE.heads + tokens
    entries = tokens * SIZE.heads * SIZE.length
    more = entries if card == "A100" else 0
    assert_within(ours, theirs, rows=rows, more_bytes=more)
