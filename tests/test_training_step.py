"""Pieces of a training step, and a step, compiled for GPUs that are not there.

Run by `make test-for-gpu`, as tests/rows/test_kernel_counts.py. Each program is beside
the same one with jax.nn and optax: kernels, copies and temporary bytes. The bars are
what holds for jax 0.10.2, 0.11.2 and 0.12.0.1.
"""

import functools
import math

import jax
import jax.numpy as jnp
import optax
import pytest
from support import for_gpu

import jaxsoftmax

pytestmark = [
    for_gpu.needed,
    # For an A100 without jax-triton.
    pytest.mark.filterwarnings("ignore::jaxsoftmax.PerformanceWarning"),
]

LOW = jnp.bfloat16
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


def jax_nn(logits, mask):
    logits = jnp.where(mask, logits, jnp.finfo(logits.dtype).min)
    return jax.nn.softmax(logits).astype(LOW)


def cast(logits, mask):
    return jaxsoftmax.softmax(logits, where=mask).astype(LOW)


def in_bfloat16(logits, mask):
    return jaxsoftmax.softmax(logits, where=mask, dtype=LOW)


over_ours = pytest.mark.parametrize("ours", [cast, in_bfloat16])


def attention(softmax, q, k, v):
    mask = jnp.tril(jnp.ones((q.shape[1], k.shape[1]), bool))
    logits = jnp.einsum("btnd,bsnd->bnts", q, k).astype(jnp.float32)
    weights = softmax(logits * q.shape[-1] ** -0.5, mask)
    return jnp.einsum("bnts,bsnd->btnd", weights, v)


def attention_layers(softmax, shape, layers):
    """The result of one after the other, and the gradients of q, k and v."""

    def forward(q, k, v):
        for _ in range(layers):
            q = attention(softmax, q, k, v)
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


def optax_loss(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def our_loss(logits, labels):
    return jaxsoftmax.softmax_cross_entropy_with_integer_labels(
        logits, labels, reduction="mean"
    )


TOKENS, WIDTH = 4096, 256


def last_layer(loss, vocabulary, dtype):
    """Its value, and the gradients of the hidden states and the weights."""

    def value(x, weights, labels):
        return loss((x @ weights).astype(dtype), labels)

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
    entries = TOKENS * vocabulary
    more = 0
    if vocabulary == 50304 and dtype == "float32" and card == "H200":
        more = 4 * entries  # the kernel's logits and gradient are in memory
    assert_within(ours, theirs, rows=TOKENS, more_bytes=more)


# --- a step ---------------------------------------------------------------------------

BATCH, LENGTH, HEADS, VOCABULARY = 4, 512, 4, 8192
SHAPES = {
    "tokens": (VOCABULARY, WIDTH),
    "positions": (LENGTH, WIDTH),
    "qkv": (WIDTH, 3 * WIDTH),
    "out": (WIDTH, WIDTH),
    "up": (WIDTH, 4 * WIDTH),
    "down": (4 * WIDTH, WIDTH),
    "last": (WIDTH, VOCABULARY),
}


def normalized(x):
    wide = x.astype(jnp.float32)
    wide = wide - jnp.mean(wide, -1, keepdims=True)
    return (wide * jax.lax.rsqrt(jnp.var(wide, -1, keepdims=True) + 1e-5)).astype(LOW)


def mean_loss(params, tokens, softmax, loss):
    """A GPT-2 of one layer, with products in bfloat16."""
    params = jax.tree.map(lambda x: x.astype(LOW), params)
    x = params["tokens"][tokens] + params["positions"][None]
    qkv = (normalized(x) @ params["qkv"]).reshape(BATCH, LENGTH, 3, HEADS, -1)
    mixed = attention(softmax, *jnp.moveaxis(qkv, 2, 0))
    x = x + mixed.reshape(x.shape) @ params["out"]
    x = x + jax.nn.gelu(normalized(x) @ params["up"]) @ params["down"]
    logits = normalized(x).reshape(-1, WIDTH) @ params["last"]
    return loss(logits, jnp.roll(tokens, -1, 1).reshape(-1))


def step(softmax, loss):
    """Loss, gradient and the update by AdamW, over parameters and state."""
    optimizer = optax.adamw(3e-4)

    @jax.numpy_dtype_promotion("standard")  # which optax needs
    def run(params, state, tokens):
        value, gradient = jax.value_and_grad(mean_loss)(params, tokens, softmax, loss)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    params = {name: array(shape, jnp.float32) for name, shape in SHAPES.items()}
    state = jax.eval_shape(optimizer.init, params)
    tokens = array((BATCH, LENGTH), jnp.int32)
    return jax.jit(run, donate_argnums=(0, 1)), (params, state, tokens)


@over_cards
def test_step(card):
    """On an A100 one byte more for each entry of the attention's logits."""
    ours = compiled(step, in_bfloat16, our_loss, card=card)
    theirs = compiled(step, jax_nn, optax_loss, card=card)
    entries = BATCH * HEADS * LENGTH**2
    rows = BATCH * HEADS * LENGTH + BATCH * LENGTH
    more = entries if card == "A100" else 0
    assert_within(ours, theirs, rows=rows, more_bytes=more)
