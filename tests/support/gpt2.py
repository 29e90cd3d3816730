"""A GPT-2 to train, by its softmax or attention and its loss.

For the tests of compiled programs and benchmarks/gpu_training_step.py. Parameters are
float32, products bfloat16.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax

import jaxsoftmax

LOW = jnp.bfloat16
OPTIMIZER = optax.adamw(3e-4)


@dataclasses.dataclass(frozen=True)
class Size:
    batch: int
    length: int
    width: int
    heads: int
    layers: int
    vocabulary: int

    def __str__(self):
        return (
            f"B = {self.batch}, T = {self.length}, {self.layers} x {self.width}, "
            f"V = {self.vocabulary:,}"
        )


def normal(*shapes):
    """An array of normal numbers of each shape."""
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [
        0.02 * jax.random.normal(key, shape)
        for key, shape in zip(keys, shapes, strict=True)
    ]


def parameters(size):
    d = size.width
    names = ("qkv", "out", "up", "down")
    of_layer = ((d, 3 * d), (d, d), (d, 4 * d), (4 * d, d))
    tokens, positions, last, *layers = normal(
        (size.vocabulary, d),
        (size.length, d),
        (d, size.vocabulary),
        *of_layer * size.layers,
    )
    layers = [
        dict(zip(names, layers[i : i + 4], strict=True))
        for i in range(0, len(layers), 4)
    ]
    return {"tokens": tokens, "positions": positions, "last": last, "layers": layers}


def normalized(x):
    wide = x.astype(jnp.float32)
    wide = wide - jnp.mean(wide, -1, keepdims=True)
    variance = jnp.mean(wide * wide, -1, keepdims=True)
    return (wide * jax.lax.rsqrt(variance + 1e-5)).astype(LOW)


def hidden(params, tokens, attention, size):
    """[B T, width]: what the last layer is given."""
    x = (params["tokens"][tokens] + params["positions"][None]).astype(LOW)
    for layer in jax.tree.map(lambda a: a.astype(LOW), params["layers"]):
        shape = (size.batch, size.length, 3, size.heads, -1)
        q, k, v = jnp.moveaxis((normalized(x) @ layer["qkv"]).reshape(shape), 2, 0)
        x = x + attention(q, k, v).reshape(x.shape) @ layer["out"]
        x = x + jax.nn.gelu(normalized(x) @ layer["up"]) @ layer["down"]
    return normalized(x).reshape(-1, size.width)


def mean_loss(size, attention, loss):
    """The loss of parameters and tokens."""

    def run(params, tokens):
        x = hidden(params, tokens, attention, size)
        return loss(x, params["last"], jnp.roll(tokens, -1, 1).reshape(-1))

    return run


def step(loss):
    """Loss, gradient and the update by AdamW, over parameters and state."""

    @functools.partial(jax.jit, donate_argnums=0)
    @jax.numpy_dtype_promotion("standard")  # which optax needs
    def run(state, batch):
        params, optimizer_state = state
        value, gradient = jax.value_and_grad(loss)(params, batch)
        updates, optimizer_state = OPTIMIZER.update(gradient, optimizer_state, params)
        return (optax.apply_updates(params, updates), optimizer_state), value

    return run


# --- attention, written with einsums --------------------------------------------------


def by_einsum(softmax, logits_dtype=jnp.float32):
    """Attention of a softmax of logits and a causal mask, which gives bfloat16."""

    def attention(q, k, v):
        mask = jnp.tril(jnp.ones((q.shape[1], k.shape[1]), bool))
        logits = jnp.einsum("btnd,bsnd->bnts", q, k).astype(logits_dtype)
        weights = softmax(logits, mask, q.shape[-1] ** -0.5)
        return jnp.einsum("bnts,bsnd->btnd", weights, v)

    return attention


def jax_nn(logits, mask, scale):
    logits = jnp.where(mask, logits * scale, jnp.finfo(logits.dtype).min)
    return jax.nn.softmax(logits).astype(LOW)


def cast(logits, mask, scale):
    return jaxsoftmax.softmax(logits * scale, where=mask).astype(LOW)


def in_bfloat16(logits, mask, scale):
    return jaxsoftmax.softmax(logits * scale, where=mask, dtype=LOW)


def scaled(logits, mask, scale):
    return jaxsoftmax.softmax(logits, where=mask, scale=scale)


# --- losses of the last layer ---------------------------------------------------------


def optax_loss(x, weights, labels, dtype=LOW):
    logits = (x @ weights.astype(LOW)).astype(dtype)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def our_loss(x, weights, labels, dtype=LOW):
    logits = (x @ weights.astype(LOW)).astype(dtype)
    return jaxsoftmax.softmax_cross_entropy_with_integer_labels(
        logits, labels, reduction="mean"
    )
