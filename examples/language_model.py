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
# # A language model whose loss does not store its logits
#
# After this notebook you will be able to
#
# - replace the last layer and the cross-entropy of a Flax NNX language model with
#   `jaxsoftmax.linear_softmax_cross_entropy`, padding included;
# - check that training goes as with optax on the logits;
# - see from compiled programs, without running them, how much memory either way takes
#   for a vocabulary of your size;
# - get the log-probability and the entropy of every token from
#   `jaxsoftmax.linear_token_logprobs_and_entropy`.
#
# It runs in one to two minutes on two CPU cores, and needs
# `pip install "jaxsoftmax[examples]"`. The text that it learns is the help that comes
# with Python, so nothing is downloaded.

# %%
import functools
import os
import re
from collections import Counter
from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx

from jaxsoftmax import linear_softmax_cross_entropy, linear_token_logprobs_and_entropy
from jaxsoftmax.flax import attention_fn

QUICK = "NOTEBOOK_QUICK" in os.environ  # fewer steps, to test the notebook
STEPS = 20 if QUICK else 300
OURS, DENSE = "jaxsoftmax", "optax on logits"
STYLES = {
    OURS: {"color": "#f2a900", "linewidth": 4.0},
    DENSE: {"color": "#1b3a6b", "linewidth": 1.2, "linestyle": "--"},
}
print(f"jax {jax.__version__} on {jax.default_backend()}")

# %% [markdown]
# ## Text to tokens
#
# A token is a word, a number, a punctuation mark or a run of the same, or a run of line
# breaks. The 4,095 most frequent get a number each; number 0 stands for all others.

# %%
VOCABULARY = 4096
TOKEN = re.compile(r"[A-Za-z_]+|[0-9]+|\n+|([^\w\s])\1*")


def tokens_of(text):
    return [match.group() for match in TOKEN.finditer(text)]


texts = [tokens_of(topics[name]) for name in sorted(topics)]
counts = Counter(token for text in texts for token in text)
words = ["<other>", *(word for word, _ in counts.most_common(VOCABULARY - 1))]
index = {word: i for i, word in enumerate(words)}

# %% [markdown]
# Each text is cut into rows of 65 tokens: 64 to read, and the same shifted by one to
# predict. Its last row is filled up with -1, which the loss will ignore. Every tenth
# text is kept for the test.

# %%
LENGTH, PADDING = 64, -1


def rows_of(text):
    """[rows, LENGTH + 1]; a row begins with the last token of the one before."""
    numbers = np.array([index.get(token, 0) for token in text])
    count = -(-(len(numbers) - 1) // LENGTH)
    rows = np.full((count, LENGTH + 1), PADDING, np.int32)
    for i, row in enumerate(rows):
        part = numbers[i * LENGTH :][: LENGTH + 1]
        row[: len(part)] = part
    return rows


test = np.concatenate([rows_of(text) for text in texts[::10]])
train = np.concatenate([rows_of(text) for i, text in enumerate(texts) if i % 10])
print(f"{len(train)} rows to train on, {len(test)} to test")
print(f"{np.mean(train == PADDING):.1%} of the training rows is padding")

# %% [markdown]
# ## The model
#
# A transformer that returns hidden states, one vector of 128 numbers per token. It has
# no last layer: the matrix from hidden states to logits is a parameter of its own,
# `head`. `jaxsoftmax.flax.attention_fn` computes the attention.

# %%
WIDTH, HEADS, BLOCKS = 128, 4, 2
CAUSAL = nnx.make_causal_mask(jnp.ones((1, LENGTH), bool), dtype=bool)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm_1 = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            HEADS, WIDTH, attention_fn=attention_fn, decode=False, rngs=rngs
        )
        self.norm_2 = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.widen = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.narrow = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm_1(x), mask=CAUSAL)
        return x + self.narrow(jax.nn.gelu(self.widen(self.norm_2(x))))


class LanguageModel(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.positions = nnx.Embed(LENGTH, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(BLOCKS)])
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        head = jax.random.normal(rngs.params(), (WIDTH, VOCABULARY))
        self.head = nnx.Param(head / WIDTH**0.5)

    def __call__(self, tokens):
        """Hidden states [batch, LENGTH, WIDTH]."""
        x = self.embed(tokens) + self.positions(jnp.arange(LENGTH))
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


# %% [markdown]
# No hidden state may depend on a later token, or the model would read what it is to
# predict. Other tokens in the second half leave the first half as it was:

# %%
half = LENGTH // 2
once = jnp.zeros((1, LENGTH), jnp.int32)
before, after = map(LanguageModel(nnx.Rngs(0)), (once, once.at[:, half:].set(1)))
print("first half:", jnp.max(jnp.abs(after - before)[:, :half]))
print("second half:", jnp.max(jnp.abs(after - before)[:, half:]))
assert jnp.array_equal(before[:, :half], after[:, :half])

# %% [markdown]
# ## Two losses
#
# The usual one computes the logits, [batch, length, vocabulary], and takes care of the
# padding by hand. The other gets the hidden states and the matrix, and never has logits
# of more tokens at a time than its memory budget allows.


# %%
def inputs_and_labels(rows):
    inputs, labels = rows[:, :-1], rows[:, 1:]
    return jnp.maximum(inputs, 0), labels  # an embedding has no row -1


def dense_loss(model, rows):
    inputs, labels = inputs_and_labels(rows)
    logits = model(inputs) @ model.head[...]
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits, jnp.maximum(labels, 0)
    )
    counted = labels != PADDING
    return jnp.sum(losses * counted) / jnp.sum(counted)


def our_loss(model, rows):
    inputs, labels = inputs_and_labels(rows)
    return linear_softmax_cross_entropy(
        model(inputs),
        labels,
        model.head[...],
        ignore_index=PADDING,
        reduction="mean",
    )


# %% [markdown]
# ## Training, twice
#
# The same seeds give the same parameters and the same batches, 16 rows each.

# %%
BATCH, SEED = 16, 0


def start(loss):
    """A function that trains a new model on a batch, and that model."""
    model = LanguageModel(nnx.Rngs(SEED))
    schedule = optax.warmup_cosine_decay_schedule(0, 3e-3, STEPS // 10, STEPS)
    optimizer = nnx.Optimizer(model, optax.adamw(schedule), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, rows):
        value, gradient = nnx.value_and_grad(loss)(model, rows)
        optimizer.update(model, gradient)
        return value

    return functools.partial(step, model, optimizer), model


steps, models = {}, {}
steps[OURS], models[OURS] = start(our_loss)
steps[DENSE], models[DENSE] = start(dense_loss)
losses = {name: np.zeros(STEPS) for name in steps}
rng = np.random.default_rng(SEED)
for i in range(STEPS):
    rows = train[rng.choice(len(train), BATCH, replace=False)]
    for name, step in steps.items():
        losses[name][i] = step(rows)
for name in losses:
    print(f"{name}: first loss {losses[name][0]:.4f}, last {losses[name][-1]:.4f}")

# %% [markdown]
# The losses of the first step agree to rounding errors of float32. These may grow as
# training goes on, as with any two ways to compute the same.

# %%
difference = np.abs(losses[OURS] - losses[DENSE])
print(f"difference: first step {difference[0]:.1e}, largest {difference.max():.1e}")
assert difference[0] < 1e-5
assert difference.max() < 1e-2

# %%
frequencies = np.array([counts[word] for word in words[1:]], float)
frequencies /= frequencies.sum()
entropy_of_words = -np.sum(frequencies * np.log(frequencies))

figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
window = min(10, STEPS)
for name, style in STYLES.items():
    means = np.convolve(losses[name], np.full(window, 1 / window), mode="valid")
    axes.plot(window + np.arange(len(means)), means, label=name, **style)
axes.axhline(entropy_of_words, color="gray", linewidth=1, linestyle=":")
axes.annotate(
    "what word frequencies alone give",
    (STEPS, entropy_of_words),
    xytext=(0, 4),
    textcoords="offset points",
    ha="right",
    color="gray",
)
axes.set(
    title="Same parameters at the start, same batches",
    xlabel="training step",
    ylabel=f"cross-entropy (nats),\nmean of {window} steps",
)
axes.grid(alpha=0.3)
axes.legend()
plt.show()

# %% [markdown]
# ## Memory against the vocabulary
#
# Above, the logits take 16 MiB: with 1,024 tokens and 4,096 words there is little to
# gain. The memory of larger shapes can be read off compiled programs, which are not
# run: the bytes of all temporary arrays of a loss and its gradients. Here for 8,192
# hidden states of 1,024 numbers in float32, and vocabularies up to 131,072. Arguments
# and gradients come on top, the same for all.

# %%
TOKENS, HIDDEN = 8192, 1024
sizes = [2**k for k in ((10, 13, 17) if QUICK else range(10, 18))]


def temporary_mib(loss, vocabulary):
    x = jax.ShapeDtypeStruct((TOKENS, HIDDEN), jnp.float32)
    labels = jax.ShapeDtypeStruct((TOKENS,), jnp.int32)
    weights = jax.ShapeDtypeStruct((HIDDEN, vocabulary), jnp.float32)
    step = jax.jit(jax.value_and_grad(loss, (0, 2)))
    compiled = step.lower(x, labels, weights).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 2**20


def dense(x, labels, weights):
    return optax.softmax_cross_entropy_with_integer_labels(x @ weights, labels).mean()


ours = functools.partial(linear_softmax_cross_entropy, reduction="mean")
SMALL = "jaxsoftmax, budget 64 MiB"
contenders = {
    DENSE: dense,
    OURS: ours,
    SMALL: functools.partial(ours, memory_budget=64 * 2**20),
}
memory = {
    name: [temporary_mib(loss, size) for size in sizes]
    for name, loss in contenders.items()
}
print(f"{'words':>8}", *(f"{name:>{len(name) + 4}}" for name in memory))
for i, size in enumerate(sizes):
    row = (f"{mib[i]:{len(name)},.0f} MiB" for name, mib in memory.items())
    print(f"{size:8,}", *row)
assert memory[OURS][-1] < memory[DENSE][-1] / 4

# %%
figure, axes = plt.subplots(figsize=(7, 3.8), layout="constrained")
colors = {DENSE: "#1b3a6b", OURS: "#f2a900", SMALL: "#c0504d"}
for name, color in colors.items():
    axes.plot(sizes, memory[name], marker="o", linewidth=2, color=color, label=name)
marks = [2**k for k in range(5, 14, 2)]
axes.set_xscale("log", base=2)
axes.set_yscale("log", base=2)
axes.set_xticks(sizes, [f"{size // 1024}k" for size in sizes])
axes.set_yticks(marks, [f"{mark:,}" for mark in marks])
axes.minorticks_off()
axes.set(
    title=f"Loss and gradients of {TOKENS:,} tokens, float32",
    xlabel="words in the vocabulary",
    ylabel="temporary memory (MiB)",
)
axes.grid(alpha=0.3)
axes.legend()
plt.show()

# %% [markdown]
# The logits alone take 32 MiB for each 1,024 words. By default the budget is 8 bytes
# for each entry of `weights`, or 640 MiB if that is more, on a GPU 10 bytes or 2 GiB,
# whatever the number of tokens; the rest are arrays of the size of the hidden states.
# Up to some 4,000 words all logits fit, and there is nothing to save. A smaller budget
# takes less; where it is below 4 bytes for each entry of `weights` (here from 32,768
# words on), the logits are computed a second time in the backward.

# %% [markdown]
# ## One number per token
#
# `linear_token_logprobs_and_entropy` gives the log-probability of each label and the
# entropy of the prediction, again without storing logits. Both are differentiable,
# which is what policy gradients need. Here they show where a text that the model has
# not seen surprises it. The entropy is the mean that the model expects of -log p, so a
# bar far above the line is a surprise.


# %%
@nnx.jit
def statistics(model, rows):
    inputs, labels = inputs_and_labels(rows)
    return linear_token_logprobs_and_entropy(
        model(inputs), labels, model.head[...], ignore_index=PADDING
    )


found = statistics(models[OURS], test)
count = np.sum(test[:, 1:] != PADDING)
print(f"test loss {-np.sum(found.logprobs) / count:.3f}")
print(f"mean entropy of the predictions {np.sum(found.entropy) / count:.3f}")

# %%
row, shown = 3, slice(0, 32)
labels = [words[i].replace("\n", "\\n") for i in test[row, 1:][shown]]
places = np.arange(len(labels))
figure, axes = plt.subplots(figsize=(9, 3.4), layout="constrained")
axes.bar(places, -found.logprobs[row][shown], color="#f2a900", label="-log p(token)")
axes.step(
    places, found.entropy[row][shown], where="mid", color="#1b3a6b", label="entropy"
)
axes.set_xticks(places, labels, rotation=60, ha="right", rotation_mode="anchor")
axes.set(title="From a test text, token by token", ylabel="nats")
axes.grid(alpha=0.3, axis="y")
axes.legend()
plt.show()
