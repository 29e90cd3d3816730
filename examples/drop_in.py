# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # jaxsoftmax in Flax Linen, Flax NNX and Equinox
#
# After this notebook you will be able to
#
# - give `flax.linen.MultiHeadDotProductAttention` and `flax.nnx.MultiHeadAttention` our
#   attention by one argument, and write the Equinox layer that has it;
# - use masks, dropout and the attention weights themselves with it;
# - replace optax's loss, and `softmax` and `log_softmax` of `jax.nn`, by one import;
# - check that outputs, gradients and training are those of the original;
# - say what differs: rows in which nothing is allowed, labels that are no class.
#
# It runs in about a minute on two CPU cores, and needs
# `pip install "jaxsoftmax[examples]"`. The data are scikit-learn's digits, which come
# with the package.

# %%
import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import linen, nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import jaxsoftmax
from jaxsoftmax.flax import attention_fn

QUICK = "NOTEBOOK_QUICK" in os.environ  # fewer steps, to test the notebook
STEPS = 30 if QUICK else 300
OURS, ORIGINAL = "jaxsoftmax", "original"
STYLES = {
    OURS: {"color": "#f2a900", "linewidth": 4.0},
    ORIGINAL: {"color": "#1b3a6b", "linewidth": 1.2, "linestyle": "--"},
}
print(f"jax {jax.__version__} on {jax.default_backend()}")

# %% [markdown]
# ## Digits as sequences with a mask
#
# An image has 8 by 8 pixels. It becomes a sequence of 16 patches of 2 by 2. A patch
# without ink is treated like padding: no patch may attend to it, and it has no part in
# the mean over patches. So every image has a mask of its own.

# %%
SIDE, PATCH, CLASSES = 8, 2, 10
BATCH, SEED = 128, 0
PER_SIDE = SIDE // PATCH
PATCHES = PER_SIDE**2


def patches_of(images):
    """[images, 8, 8] -> [images, 16, 4], row by row of patches."""
    cut = images.reshape(-1, PER_SIDE, PATCH, PER_SIDE, PATCH).swapaxes(2, 3)
    return cut.reshape(-1, PATCHES, PATCH**2)


images, labels = load_digits(return_X_y=True)
images = (images / 16).astype(np.float32).reshape(-1, SIDE, SIDE)
train_images, test_images, train_labels, test_labels = train_test_split(
    images, labels, test_size=3 * BATCH, random_state=0, stratify=labels
)


def batch_of(images, labels):
    patches = patches_of(images)
    return {"patches": patches, "present": patches.any(axis=-1), "labels": labels}


def rows_of(batch, rows):
    return {name: x[rows] for name, x in batch.items()}


train, test = batch_of(train_images, train_labels), batch_of(test_images, test_labels)
print(f"{len(train_labels)} images to train on, {len(test_labels)} to test")
print(f"{1 - train['present'].mean():.0%} of the patches have no ink")

# %% [markdown]
# ## The loss: one import
#
# `softmax_cross_entropy_with_integer_labels` has the name, the leading parameters and
# the result of optax's function. Options that are otherwise added by hand are
# arguments, here `reduction="mean"`
# ([Cross-entropy](../docs/cross_entropy.md)).


# %%
def optax_loss(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


our_loss = functools.partial(
    jaxsoftmax.softmax_cross_entropy_with_integer_labels, reduction="mean"
)

# %% [markdown]
# For each framework there will be two contenders, which differ in the attention. Each
# has the same parameters, a function that makes the model of them, and one that gives
# the logits of a batch. With the two losses they are compared here: logits, loss and
# gradients may differ by rounding errors of float32. The tolerance is 1e-5, relative to
# the largest entry of the logits and of the gradient.

# %%
TOLERANCE = 1e-5


class Contender(NamedTuple):
    parameters: Any
    model: Callable  # of the parameters
    logits: Callable  # of the model and a batch
    cross_entropy: Callable  # of logits and labels

    def loss(self, parameters, batch):
        logits = self.logits(self.model(parameters), batch)
        return self.cross_entropy(logits, batch["labels"]), logits

    def jitted(self):
        return jax.jit(jax.value_and_grad(self.loss, has_aux=True))


def relative_difference(ours, original):
    """Largest difference of two trees, over the largest entry of the second."""
    ours, original = (
        [np.asarray(x) for x in jax.tree.leaves(t)] for t in (ours, original)
    )
    apart = max(np.abs(a - b).max() for a, b in zip(ours, original, strict=True))
    return apart / max(np.abs(b).max() for b in original)


def check(what, ours, original, tolerance=TOLERANCE):
    difference = relative_difference(ours, original)
    print(f"{what}: relative difference {difference:.0e}")
    assert difference < tolerance


def compare(ours, original, batch):
    """Functions of parameters and batch, for the two: (loss, logits), gradient."""
    assert relative_difference(ours.parameters, original.parameters) == 0
    functions = {OURS: ours.jitted(), ORIGINAL: original.jitted()}
    (loss, logits), gradient = functions[OURS](ours.parameters, batch)
    wanted, wanted_gradient = functions[ORIGINAL](original.parameters, batch)
    check("logits", logits, wanted[1])
    check("loss", loss, wanted[0])
    check("gradients", gradient, wanted_gradient)
    return functions


some = rows_of(train, slice(BATCH))

# %% [markdown]
# Parameters of all three frameworks are trees of arrays, so one loop trains them all.
# The same seed gives the same batches.

# %%
optimizer = optax.adam(3e-3)


@jax.jit
def update(parameters, state, gradient):
    updates, state = optimizer.update(gradient, state)
    return optax.apply_updates(parameters, updates), state


def train_from(parameters, value_and_gradient):
    state, losses = optimizer.init(parameters), np.zeros(STEPS)
    rng = np.random.default_rng(SEED)
    for i in range(STEPS):
        chosen = rng.choice(len(train_labels), BATCH, replace=False)
        (losses[i], _), gradient = value_and_gradient(
            parameters, rows_of(train, chosen)
        )
        parameters, state = update(parameters, state, gradient)
    return parameters, losses


def right_of_test(parameters, value_and_gradient):
    """In batches of BATCH images, for which the function is compiled."""
    batches = (rows_of(test, slice(i, i + BATCH)) for i in range(0, 3 * BATCH, BATCH))
    logits = [value_and_gradient(parameters, batch)[0][1] for batch in batches]
    return np.mean(np.argmax(np.concatenate(logits), axis=-1) == test["labels"])


trained, curves = {}, {}


def train_both(name, ours, original, functions):
    """Trains both, and keeps our model and both curves."""
    _, wanted = train_from(original.parameters, functions[ORIGINAL])
    parameters, losses = train_from(ours.parameters, functions[OURS])
    trained[name] = ours.model(parameters)
    curves[name] = {OURS: losses, ORIGINAL: wanted}
    difference = np.abs(losses - wanted).max()
    print(f"losses from {losses[0]:.4f} to {losses[-1]:.4f}")
    print(f"largest difference to the original's: {difference:.0e}")
    print(f"{right_of_test(parameters, functions[OURS]):.1%} of the test images right")
    assert difference < 1e-2


# %% [markdown]
# ## Flax Linen
#
# The attention is an argument of `linen.MultiHeadDotProductAttention`. Here it is an
# attribute of the model, so that the same model can have either.

# %%
WIDTH, HEADS = 32, 4


def mean_over(x, present):
    return jnp.mean(x, axis=-2, where=present[..., None])


class LinenClassifier(linen.Module):
    attention_fn: Callable

    @linen.compact
    def __call__(self, patches, present, sow_weights=False):
        x = linen.Dense(WIDTH)(patches)
        x += self.param("positions", linen.initializers.normal(0.5), x.shape[-2:])
        x += linen.MultiHeadDotProductAttention(HEADS, attention_fn=self.attention_fn)(
            linen.LayerNorm()(x),
            mask=present[:, None, None, :],  # [batch, heads, queries, keys]
            sow_weights=sow_weights,
        )
        return linen.Dense(CLASSES)(mean_over(jax.nn.gelu(x), present))


@jax.jit
def linen_parameters(key):  # do not depend on the attention
    model = LinenClassifier(linen.dot_product_attention)
    return model.init(key, some["patches"], some["present"])


start = linen_parameters(jax.random.key(SEED))


def linen_contender(attention, cross_entropy):
    model = LinenClassifier(attention)

    def bound(parameters):
        return model.bind(parameters, mutable=["intermediates"])

    def logits(model, batch):
        return model(batch["patches"], batch["present"])

    return Contender(start, bound, logits, cross_entropy)


ours = linen_contender(attention_fn, our_loss)
original = linen_contender(linen.dot_product_attention, optax_loss)
functions = compare(ours, original, some)

# %%
train_both("Flax Linen", ours, original, functions)

# %% [markdown]
# With dropout, the same key drops the same weights as in Flax:

# %%
rng = np.random.default_rng(1)
x = rng.normal(size=(2, 6, WIDTH)).astype(np.float32)


variables = {"params": start["params"]["MultiHeadDotProductAttention_0"]}


def linen_dropped(attention):
    layer = linen.MultiHeadDotProductAttention(
        HEADS, dropout_rate=0.5, deterministic=False, attention_fn=attention
    )
    return layer.apply(variables, x, rngs={"dropout": jax.random.key(3)})


check(
    "Linen, dropout",
    linen_dropped(attention_fn),
    linen_dropped(linen.dot_product_attention),
)

# %% [markdown]
# ## Flax NNX
#
# The argument has the same name in `nnx.MultiHeadAttention`. `nnx.split` takes the
# parameters out of the model, and `nnx.merge` puts them back.


# %%
class NnxClassifier(nnx.Module):
    def __init__(self, attention, rngs):
        self.embed = nnx.Linear(PATCH**2, WIDTH, rngs=rngs)
        positions = jax.random.normal(rngs.params(), (PATCHES, WIDTH))
        self.positions = nnx.Param(0.5 * positions)
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            HEADS, WIDTH, attention_fn=attention, decode=False, rngs=rngs
        )
        self.classify = nnx.Linear(WIDTH, CLASSES, rngs=rngs)

    def __call__(self, patches, present, sow_weights=False):
        x = self.embed(patches) + self.positions[...]
        mask = present[:, None, None, :]
        x += self.attention(self.norm(x), mask=mask, sow_weights=sow_weights)
        return self.classify(mean_over(jax.nn.gelu(x), present))


def nnx_contender(attention, cross_entropy):
    graph, parameters = nnx.split(NnxClassifier(attention, nnx.Rngs(SEED)))

    def logits(model, batch):
        return model(batch["patches"], batch["present"])

    return Contender(
        parameters, functools.partial(nnx.merge, graph), logits, cross_entropy
    )


ours = nnx_contender(attention_fn, our_loss)
original = nnx_contender(nnx.dot_product_attention, optax_loss)
functions = compare(ours, original, some)

# %%
train_both("Flax NNX", ours, original, functions)


# %%
def nnx_dropped(attention):
    layer = nnx.MultiHeadAttention(
        HEADS,
        WIDTH,
        dropout_rate=0.5,
        deterministic=False,
        attention_fn=attention,
        decode=False,
        rngs=nnx.Rngs(params=2, dropout=3),
    )
    return layer(x)


check("NNX, dropout", nnx_dropped(attention_fn), nnx_dropped(nnx.dot_product_attention))

# %% [markdown]
# ## Equinox
#
# `eqx.nn.MultiheadAttention` has no argument for the attention: it calls a function of
# its own. A subclass that replaces `__call__` keeps the constructor, the parameters and
# their names, so that it can be exchanged for the original in a model, and reads its
# checkpoints. Equinox layers take one example without a batch. So does
# `dot_product_attention`: [length, heads, depth].


# %%
class Attention(eqx.nn.MultiheadAttention):
    def __call__(
        self,
        query,  # [queries, query_size]
        key_,  # [keys, key_size]
        value,  # [keys, value_size]
        mask=None,  # broadcasts to [heads, queries, keys]
        *,
        key=None,
        inference=None,
        process_heads=None,
    ):
        def project(linear, x):
            return jax.vmap(linear)(x).reshape(len(x), self.num_heads, -1)

        heads = (
            project(self.query_proj, query),
            project(self.key_proj, key_),
            project(self.value_proj, value),
        )
        if process_heads is not None:
            heads = process_heads(*heads)
        inference = self.dropout.inference if inference is None else inference
        rate = 0.0 if inference else self.dropout.p
        out = self.attend(*heads, mask=mask, dropout_rate=rate, dropout_key=key)
        return jax.vmap(self.output_proj)(out.reshape(len(query), -1))

    def attend(self, *heads, **options):
        return jaxsoftmax.dot_product_attention(*heads, **options)


class EquinoxClassifier(eqx.Module):
    embed: eqx.nn.Linear
    positions: jax.Array
    norm: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention
    classify: eqx.nn.Linear

    def __init__(self, attention, key):
        keys = jax.random.split(key, 4)
        self.embed = eqx.nn.Linear(PATCH**2, WIDTH, key=keys[0])
        self.positions = 0.5 * jax.random.normal(keys[1], (PATCHES, WIDTH))
        self.norm = eqx.nn.LayerNorm(WIDTH)
        self.attention = attention(HEADS, WIDTH, key=keys[2])
        self.classify = eqx.nn.Linear(WIDTH, CLASSES, key=keys[3])

    def attention_input(self, patches):
        return jax.vmap(self.embed)(patches) + self.positions

    def __call__(self, patches, present):
        x = self.attention_input(patches)
        y = jax.vmap(self.norm)(x)
        mask = jnp.broadcast_to(present, (PATCHES, PATCHES))  # Equinox wants it whole
        x += self.attention(y, y, y, mask)
        return self.classify(mean_over(jax.nn.gelu(x), present))


# %% [markdown]
# `eqx.partition` takes the parameters out of the model, and `eqx.combine` puts them
# back. The batch is Equinox's way: `jax.vmap`, here over images and masks.


# %%
def equinox_contender(attention, cross_entropy):
    model = EquinoxClassifier(attention, jax.random.key(SEED))
    parameters, rest = eqx.partition(model, eqx.is_inexact_array)

    def combined(parameters):
        return eqx.combine(parameters, rest)

    def logits(model, batch):
        return jax.vmap(model)(batch["patches"], batch["present"])

    return Contender(parameters, combined, logits, cross_entropy)


ours = equinox_contender(Attention, our_loss)
original = equinox_contender(eqx.nn.MultiheadAttention, optax_loss)
functions = compare(ours, original, some)

# %%
train_both("Equinox", ours, original, functions)

# %% [markdown]
# Dropout: jaxsoftmax draws for all heads from one key, while Equinox splits the key and
# draws for each head. So other weights are dropped, with the same probability. Where
# the dropped weights must be Equinox's, map over the heads, as Equinox does:


# %%
class AttentionByHead(Attention):
    def attend(self, *heads, mask, dropout_rate, dropout_key):
        def one_head(query, key_, value, key):
            heads = (x[:, None] for x in (query, key_, value))
            options = {"dropout_rate": dropout_rate, "dropout_key": key}
            return super(AttentionByHead, self).attend(*heads, mask=mask, **options)

        keys = jax.random.split(dropout_key, self.num_heads)
        out = jax.vmap(one_head, in_axes=(1, 1, 1, 0), out_axes=1)(*heads, keys)
        return jnp.squeeze(out, axis=2)


@functools.partial(jax.jit, static_argnums=0)
def equinox_dropped(attention, key):
    layer = attention(HEADS, WIDTH, dropout_p=0.5, key=jax.random.key(2))
    return layer(x[0], x[0], x[0], key=key)


by_head, wanted = (
    equinox_dropped(attention, jax.random.key(3))
    for attention in (AttentionByHead, eqx.nn.MultiheadAttention)
)
check("Equinox, dropout by head", by_head, wanted)

# %% [markdown]
# ## Three times the same curve

# %%
window = 10
figure, axes = plt.subplots(
    1, len(curves), figsize=(10, 3.2), sharey=True, layout="constrained"
)
for axis, (name, losses) in zip(axes, curves.items(), strict=True):
    for which, style in STYLES.items():
        means = np.convolve(losses[which], np.full(window, 1 / window), mode="valid")
        axis.plot(window + np.arange(len(means)), means, label=which, **style)
    axis.set(title=name, xlabel="training step", yscale="log")
    axis.grid(alpha=0.3, which="both")
axes[0].set_ylabel(f"cross-entropy (nats),\nmean of {window} steps")
axes[0].legend()
plt.show()

# %% [markdown]
# ## The weights themselves
#
# Our attention does not store its weights. Asked for with `sow_weights=True`, they are
# computed whole, with `jaxsoftmax.softmax`, and sown where Flax sows them. Equinox sows
# nothing: there they are a softmax of the layer's own projections. Here they are those
# of one image, [heads, queries, keys].

# %%
shown = 5
one = batch_of(test_images[shown : shown + 1], test_labels[shown : shown + 1])


def linen_weights(model):
    model(one["patches"], one["present"], sow_weights=True)
    layers = model.variables["intermediates"]
    return layers["MultiHeadDotProductAttention_0"]["attention_weights"][0][0]


def nnx_weights(model):
    model(one["patches"], one["present"], sow_weights=True)
    sown = nnx.pop(model, nnx.Intermediate)
    return sown["attention"]["attention_weights"][0][0]


def equinox_weights(model):
    patches, present = one["patches"][0], one["present"][0]
    y = jax.vmap(model.norm)(model.attention_input(patches))
    layer = model.attention
    query, key = (
        jax.vmap(linear)(y).reshape(PATCHES, HEADS, -1)
        for linear in (layer.query_proj, layer.key_proj)
    )
    logits = jnp.einsum("qhd,khd->hqk", query, key)
    return jaxsoftmax.softmax(logits, where=present, scale=query.shape[-1] ** -0.5)


weights_of = (linen_weights, nnx_weights, equinox_weights)
inked = one["present"][0]
received = {}
for find, (name, model) in zip(weights_of, trained.items(), strict=True):
    weights = find(model)
    received[name] = np.mean(weights, axis=(0, 1), where=inked[:, None])
    assert np.allclose(np.sum(weights, axis=-1), 1, atol=1e-6)
    assert np.all(received[name][~inked] == 0)

figure, axes = plt.subplots(1, 4, figsize=(10, 2.6), layout="constrained")
extent = (0, SIDE, SIDE, 0)  # pixels
axes[0].imshow(test_images[shown], cmap="gray_r", extent=extent)
axes[0].set(title="Test image", ylabel="pixel")
largest = max(weights.max() for weights in received.values())
rows, columns = np.nonzero(~inked.reshape(PER_SIDE, PER_SIDE))
for axis, (name, weights) in zip(axes[1:], received.items(), strict=True):
    heat = axis.imshow(
        weights.reshape(PER_SIDE, PER_SIDE),
        cmap="Oranges",
        vmin=0,
        vmax=largest,
        extent=extent,
    )
    axis.plot(PATCH * columns + 1, PATCH * rows + 1, "x", color="gray")
    axis.set(title=name)
for axis in axes:
    axis.set(xlabel="pixel", xticks=range(0, 9, PATCH), yticks=range(0, 9, PATCH))
figure.colorbar(heat, ax=axes[1:], label="mean weight of the patch")
plt.show()

# %% [markdown]
# The mean is over heads and over the patches with ink. Patches without ink, crossed,
# get exactly 0. The pictures differ because each framework draws its own parameters.
#
# ## softmax and log_softmax: one import
#
# `jaxsoftmax.softmax` and `log_softmax` have the arguments of `jax.nn`'s: the array,
# `axis` and `where`. Here on logits like those of an attention, with the masks of the
# digits, and a Gaussian cotangent.

# %%
logits, cotangent = rng.normal(size=(2, 128, PATCHES, PATCHES)).astype(np.float32)
mask = some["present"][:, None, :]


@functools.partial(jax.jit, static_argnums=0)
def value_and_pullback(function):
    value, pull = jax.vjp(lambda x: function(x, axis=-1, where=mask), logits)
    finite = jnp.where(mask, value, 0)  # log_softmax has -inf where the mask is False
    return finite, pull(jnp.where(mask, cotangent, 0))


for ours, original in (
    (jaxsoftmax.softmax, jax.nn.softmax),
    (jaxsoftmax.log_softmax, jax.nn.log_softmax),
):
    pairs = zip(value_and_pullback(ours), value_and_pullback(original), strict=True)
    for what, pair in zip(("value", "gradient"), pairs, strict=True):
        check(f"{original.__name__}, {what}", *pair)

# %% [markdown]
# ## Policy gradients: log-probabilities and entropy in one call
#
# A policy gradient needs the log-probability of the action that was taken and the
# entropy of the policy. With `jax.nn` that is a `log_softmax`, a gather and a sum over
# exponentials; `token_logprobs_and_entropy` gives both. Here the actions are drawn from
# the policy, and the reward is 1 where the action is the digit.

# %%
logits = 2 * rng.normal(size=(len(train["labels"]), CLASSES)).astype(np.float32)
actions = np.argmax(logits + rng.gumbel(size=logits.shape), axis=-1)
advantage = np.where(actions == train["labels"], 0.9, -0.1)


def our_policy_loss(logits):
    found = jaxsoftmax.token_logprobs_and_entropy(logits, actions)
    return -jnp.mean(advantage * found.logprobs + 0.01 * found.entropy)


def usual_policy_loss(logits):
    log_p = jax.nn.log_softmax(logits)
    chosen = jnp.take_along_axis(log_p, actions[:, None], axis=-1)[:, 0]
    entropy = -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
    return -jnp.mean(advantage * chosen + 0.01 * entropy)


found, wanted = (
    jax.jit(jax.value_and_grad(loss))(logits)
    for loss in (our_policy_loss, usual_policy_loss)
)
for what, *pair in zip(("loss", "gradient"), found, wanted, strict=True):
    check(f"policy, {what}", *pair)

# %% [markdown]
# ## What differs
#
# Where something is allowed in every row and every label is a class, all of the above
# agrees. These do not:

# %%
empty = jnp.full(3, -jnp.inf)
print("softmax of a row of -inf")
print("  jax.nn    ", jax.nn.softmax(empty))
print("  jaxsoftmax", jaxsoftmax.softmax(empty))

ones = jnp.ones((1, 2, 1, 1))  # batch, length, heads, depth
nothing = jnp.zeros((1, 1, 2, 2), bool)
print("attention whose mask allows nothing, all values 1")
for name, attention in (
    ("Linen     ", linen.dot_product_attention),
    ("NNX       ", nnx.dot_product_attention),
    ("jaxsoftmax", attention_fn),
):
    print(f"  {name}", attention(ones, ones, ones, mask=nothing).ravel())

minus_one = jnp.array([-1])
print("loss of the label -1")
print("  optax     ", optax_loss(jnp.arange(3.0)[None], minus_one))
print("  jaxsoftmax", our_loss(jnp.arange(3.0)[None], minus_one))
print(
    "  ... with ignore_index=-1", our_loss(jnp.ones((1, 3)), minus_one, ignore_index=-1)
)

try:
    jaxsoftmax.softmax(jnp.ones(3), where=jnp.ones(3))
except TypeError as error:
    print(error)

# %% [markdown]
# A query that may attend to nothing gets zeros, and has no part in any gradient; in
# Flax and Equinox it gets a mean of values. That matters for a mask of padding that
# leaves out queries as well as keys, as `flax.linen.make_attention_mask` makes it, if
# something reads the outputs at the padding. All differences:
# [from jax.nn](../docs/differences_jax_nn.md),
# [from optax](../docs/differences_optax.md), [from Flax](../docs/differences_flax.md).
#
# ## What you replace, and by what
#
# | framework | you have | you write |
# | --- | --- | --- |
# | Linen | `linen.MultiHeadDotProductAttention(...)` | `attention_fn=attention_fn` |
# | | a causal mask | the same, or `partial(attention_fn, is_causal=True)` |
# | NNX | `nnx.MultiHeadAttention(...)` | `attention_fn=attention_fn` |
# | | `layer(x, is_causal=True)` | the same |
# | both | `mask`, `dropout_rate`, `sow_weights` | the same |
# | Equinox | `eqx.nn.MultiheadAttention(...)` | `Attention(...)` as above |
# | any | `jax.nn.dot_product_attention` | `dot_product_attention` |
# | | `jax.nn.softmax`, `jax.nn.log_softmax` | `softmax`, `log_softmax` |
# | | `optax.softmax_cross_entropy` | `softmax_cross_entropy` |
# | | optax's with integer labels | `softmax_cross_entropy_with_integer_labels` |
# | | `log_softmax`, a gather, an entropy | `token_logprobs_and_entropy` |
# | | a last linear layer and its loss | `linear_softmax_cross_entropy` |
#
# What is in the last column is imported from `jaxsoftmax`, and `attention_fn` from
# `jaxsoftmax.flax`. `softmax` of `flax.linen` and `flax.nnx` is that of `jax.nn`.
#
# [Attention](../docs/attention.md) has the options that the originals do not have: a
# soft cap, windows, lengths, packed sequences, sinks. The last line is the subject of
# [language_model.ipynb](language_model.ipynb).
