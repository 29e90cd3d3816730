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
# # Softmax, losses and attention over many devices, simulated
#
# After this notebook you will be able to
#
# - split a softmax, a loss or attention over devices, over the batch or along the rows
#   themselves, with automatic axes, explicit axes or `jax.shard_map`;
# - read from a compiled program what moves between the devices, and how many bytes;
# - write a language model's last layer whose vocabulary is split (tensor parallel),
#   also together with a split batch (data parallel);
# - choose a way to split attention, by heads or by positions;
# - say what to expect on real GPUs, from what was measured on two.
#
# It runs in one to two minutes on two CPU cores, and needs
# `pip install "jaxsoftmax[examples]"`. The devices are simulated: a CPU takes the part
# of eight. That shows what moves between devices, and that results are right. How long
# it takes, it does not show.

# %%
import collections
import json
import math
import os
import pathlib
import re

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxsoftmax import (
    dot_product_attention,
    explain,
    linear_softmax_cross_entropy,
    log_softmax,
    merge_attention,
    softmax,
    softmax_cross_entropy_with_integer_labels,
)

# Before the first use of a device:
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

QUICK = "NOTEBOOK_QUICK" in os.environ  # fewer programs, to test the notebook
OURS, OTHERS = "#f2a900", "#1b3a6b"
print(f"jax {jax.__version__}, {jax.device_count()} devices")

# %% [markdown]
# ## Who holds what
#
# The devices form a mesh of 4 x 2. An array's `PartitionSpec` names, for each of its
# dimensions, the axis of the mesh that it is split over. Here for logits of 64 rows and
# 1024 classes:

# %%
mesh = jax.make_mesh((4, 2), ("data", "vocab"), axis_types=(AxisType.Auto,) * 2)
LAYOUTS = {
    "rows split: whole rows": P("data"),
    "classes split: shared rows": P(None, "vocab"),
    "both": P("data", "vocab"),
    "classes over all devices": P(None, ("data", "vocab")),
}
ROWS, CLASSES = 64, 1024
rng = np.random.default_rng(0)
logits, cotangent = rng.normal(size=(2, ROWS, CLASSES)).astype(np.float32)
labels = rng.integers(0, CLASSES, ROWS).astype(np.int32)


def put(spec, array, mesh=mesh):
    return jax.device_put(array, NamedSharding(mesh, spec))


# %%
def draw_shares(axes, array):
    """A rectangle for each share, with the numbers of the devices that hold it."""
    holders = collections.defaultdict(list)
    for shard in array.addressable_shards:
        spans = tuple(
            index.indices(n)[:2]
            for index, n in zip(shard.index, array.shape, strict=True)
        )
        holders[spans].append(shard.device.id)
    for i, (((top, bottom), (left, right)), devices) in enumerate(holders.items()):
        size = (right - left, bottom - top)
        color = plt.get_cmap("Pastel1")(i)
        axes.add_patch(plt.Rectangle((left, top), *size, facecolor=color, ec="white"))
        middle = ((left + right) / 2, (top + bottom) / 2)
        text = ("\n" if size[0] < size[1] * 8 else ", ").join(map(str, devices))
        axes.annotate(text, middle, ha="center", va="center", fontsize=9)
    axes.set(xlim=(0, array.shape[1]), ylim=(array.shape[0], 0))


figure, axes = plt.subplots(1, 4, figsize=(11, 3), sharey=True, layout="constrained")
for each, (name, spec) in zip(axes, LAYOUTS.items(), strict=True):
    draw_shares(each, put(spec, logits))
    each.set_title(f"{name}\n{spec}", fontsize=9)
    each.set_xlabel("classes")
axes[0].set_ylabel("rows")
figure.suptitle("Which devices hold which part of the logits")
plt.show()

# %% [markdown]
# ## What moves
#
# Operations that move data between devices have names of their own in a compiled
# program. These are found here, with the bytes of their results on one device, and how
# often they are done where they stand in a loop.

# %%
COLLECTIVE = re.compile(
    r"= (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)"
    r"(?:-start)?\("
)
ARRAY = re.compile(r"\b[a-z]+(\d+)\[([\d,]*)\]")
FUNCTION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) .*\{$", re.MULTILINE)
LOOP = re.compile(r'body=%?([\w.-]+).*"known_trip_count":\{"n":"(\d+)"\}')


def bytes_of(result):
    """Of an array or several, as in "(f32[64,1], f32[])"."""
    return sum(
        int(bits) // 8 * math.prod(int(n) for n in dims.split(",") if n)
        for bits, dims in ARRAY.findall(result)
    )


def moved(program):
    """(kind, bytes, rounds) of each; rounds of loops within loops are not known."""
    text = program.as_text()
    rounds = {body: int(n) for body, n in LOOP.findall(text)}
    _, *parts = FUNCTION.split(text)
    return [
        (kind, bytes_of(result), rounds.get(name, 1))
        for name, body in zip(parts[::2], parts[1::2], strict=True)
        for result, kind in COLLECTIVE.findall(body)
    ]


def summary(found):
    """How many of each kind, and their bytes."""
    counts, sizes = collections.Counter(), collections.Counter()
    for kind, size, rounds in found:
        counts[kind] += rounds
        sizes[kind] += rounds * size
    texts = [f"{counts[kind]} {kind}, {sizes[kind]:,} bytes" for kind in counts]
    return "; ".join(texts) or "nothing"


def error_of(got, want):
    """The largest, relative to the largest entry."""
    got, want = np.asarray(got), np.asarray(want)
    return np.max(np.abs(got - want)) / np.max(np.abs(want))


def compiled(f, *args):
    return jax.jit(f).lower(*args).compile()


def table(rows, widths):
    """Rows of texts in columns; the first is set left, the others right."""
    first, *others = widths
    lines = []
    for left, *cells in rows:
        cells = [f"{cell:>{w}}" for cell, w in zip(cells, others, strict=True)]
        lines.append("".join([f"{left:{first}}", *cells]))
    return "\n".join(lines)


# %% [markdown]
# Values and gradients (with their forward) of `softmax` and `log_softmax`, beside those
# of `jax.nn` as XLA partitions them. Bytes are for each row of which a device has all
# or a part.


# %%
def value(f):
    return lambda x, g: f(x)


def gradient(f):
    return lambda x, g: jax.vjp(f, x)[1](g)[0]


PROGRAMS = {
    "softmax": value(softmax),
    "jax.nn.softmax": value(jax.nn.softmax),
    "softmax, gradient": gradient(softmax),
    "jax.nn.softmax, gradient": gradient(jax.nn.softmax),
    "log_softmax, gradient": gradient(log_softmax),
    "jax.nn.log_softmax, gradient": gradient(jax.nn.log_softmax),
}


def movements(spec):
    rows = NamedSharding(mesh, spec).shard_shape(logits.shape)[0]
    for name, f in PROGRAMS.items():
        program = compiled(f, put(spec, logits), put(spec, cotangent))
        found = moved(program)
        kinds = " ".join(sorted({kind for kind, *_ in found})) or "nothing"
        size = sum(size * rounds for _, size, rounds in found)
        yield name, kinds, str(len(found)), f"{size / rows:g}"


lines = []
for name, spec in list(LAYOUTS.items())[: 2 if QUICK else None]:
    heading = (name, "what moves", "how many", "bytes per row")
    lines.append(table([heading, *movements(spec)], (32, 12, 10, 15)))
print("\n\n".join(lines))

# %% [markdown]
# - Split over the batch, nothing moves, ours or jax.nn's: each device has whole rows.
# - Along the rows, each device reduces its share to its maximum and its sum, and
#   all-reduces merge them: 4 bytes per row each. No entry of a row leaves its device.
#   XLA partitions `jax.nn` in the same way: no gather there either.
# - Gradients move more than those of jax.nn: one pair of float64 per row (16 bytes) for
#   softmax, where jax.nn moves one float32. The mean of the cotangent is taken out
#   before the products are summed, and that keeps digits
#   ([derivatives.md](../docs/derivatives.md)). Beside a row of 1024 entries, both are
#   small.
#
# The difference is in what a GPU runs: there each device's part is a kernel. XLA cannot
# look into a kernel, and would gather whole arrays to feed it, unless it is told how to
# split the call. jaxsoftmax tells it.

# %% [markdown]
# ## Three ways to say it
#
# With automatic axes XLA decides how every array lies, beginning from the arguments.
# With explicit axes the layout is a part of each array's type, and `explain` shows the
# shares. In `jax.shard_map` a function is written for one device's share: there a row
# must be whole, or its softmax is that of the share.

# %%
explicit = jax.make_mesh((4, 2), ("data", "vocab"), axis_types=(AxisType.Explicit,) * 2)


def loss(x):
    return jnp.sum(jnp.sin(log_softmax(x)))


def with_automatic_axes(x):
    return jax.jit(jax.grad(loss)), put(P("data", "vocab"), x)


def with_explicit_axes(x):
    return jax.jit(jax.grad(loss)), put(P("data", "vocab"), x, explicit)


def in_shard_map(x):
    share = P(("data", "vocab"))
    mapped = jax.shard_map(jax.grad(loss), mesh=mesh, in_specs=share, out_specs=share)
    return jax.jit(mapped), put(share, x)


def in_half_a_shard_map(x):
    """Over "data" by hand; "vocab" is left to XLA."""
    mapped = jax.shard_map(
        jax.grad(loss),
        mesh=mesh,
        in_specs=P("data"),
        out_specs=P("data"),
        axis_names={"data"},
    )
    return jax.jit(mapped), put(P("data", "vocab"), x)


want = jax.jit(jax.grad(loss))(logits)
lines = []
for way in (with_automatic_axes, with_explicit_axes, in_shard_map, in_half_a_shard_map):
    f, x = way(logits)
    got = f(x)
    assert error_of(got, want) < 1e-6
    moves = summary(moved(f.lower(x).compile()))
    lines.append(f"{way.__name__:20} {got.sharding.spec!s:28} {moves}")
print("\n".join(lines))

# %% [markdown]
# All four agree with one device (to 1e-6, which is asserted), and results lie as
# arguments do. Where axes are explicit, the calls that each device runs are known
# before anything is compiled:

# %%
explain(jax.grad(loss), put(P("data", "vocab"), logits, explicit))

# %% [markdown]
# ## The same results as on one device
#
# Where rows are shared, sums are taken in another order, so the last digits may differ.
# Here the largest differences of values, gradients and Hessian-vector products of a
# loss, in float32.


# %%
def hessian_vector_product(f):
    def product(x, v):
        return jax.jvp(jax.grad(lambda x: jnp.sum(jnp.sin(f(x)))), (x,), (v,))[1]

    return product


rows = [("", "value", "gradient", "Hessian-vector")]
SHARED = dict(list(LAYOUTS.items())[1 : 2 if QUICK else 3])
for f in (log_softmax,) if QUICK else (softmax, log_softmax):
    modes = [value(f), gradient(f), hessian_vector_product(f)]
    expected = [np.asarray(jax.jit(mode)(logits, cotangent)) for mode in modes]
    for name, spec in SHARED.items():
        inputs = put(spec, logits), put(spec, cotangent)
        found = [np.asarray(jax.jit(mode)(*inputs)) for mode in modes]
        errors = [error_of(a, b) for a, b in zip(found, expected, strict=True)]
        assert max(errors) < 2e-6
        rows.append((f"{f.__name__}, {name}", *(f"{e:.1e}" for e in errors)))
print("relative to the largest entry")
print(table(rows, (42, 10, 10, 16)))

# %% [markdown]
# ## A vocabulary that devices share
#
# The last layer of a language model is its largest matrix: width x words. Tensor
# parallelism gives each device some of its columns, so that it computes the logits of
# its words alone, and the loss has to be taken over rows that devices share. The loss
# is called as ever: how the arrays lie is enough.
#
# Here 256 tokens of width 64 and 4096 words, on 4 x 2 devices: tokens are split over 4,
# the vocabulary over 2.

# %%
TOKENS, WIDTH, WORDS = 256, 64, 4096
hidden = rng.normal(size=(TOKENS, WIDTH)).astype(np.float32)
weights = (rng.normal(size=(WIDTH, WORDS)) / WIDTH**0.5).astype(np.float32)
words = rng.integers(0, WORDS, TOKENS).astype(np.int32)
words[::8] = -1  # padding


def by_logits(hidden, weights, labels):
    return softmax_cross_entropy_with_integer_labels(
        hidden @ weights, labels, ignore_index=-1, reduction="mean"
    )


def by_optax(hidden, weights, labels):
    losses = optax.softmax_cross_entropy_with_integer_labels(
        hidden @ weights, jnp.maximum(labels, 0)
    )
    counted = labels >= 0
    return jnp.sum(losses * counted) / jnp.sum(counted)


def in_one_call(hidden, weights, labels):
    return linear_softmax_cross_entropy(
        hidden, labels, weights, ignore_index=-1, reduction="mean"
    )


HEADS = {
    "optax on logits": by_optax,
    "jaxsoftmax on logits": by_logits,
    "jaxsoftmax, hidden states and weights": in_one_call,
}
PARALLEL = {
    "data": (P("data"), P(), P("data")),
    "tensor": (P(), P(None, "vocab"), P()),
    "data and tensor": (P("data"), P(None, "vocab"), P("data")),
}


def placed(specs, mesh=mesh):
    arrays = (hidden, weights, words)
    return [put(spec, x, mesh) for spec, x in zip(specs, arrays, strict=True)]


def step(loss):
    return jax.value_and_grad(loss, (0, 1))


one_device = jax.jit(step(by_logits))(hidden, weights, words)
lines = []
for name, specs in list(PARALLEL.items())[-1 if QUICK else 0 :]:
    lines.append(name)
    arguments = placed(specs)
    for head, loss_of_head in HEADS.items():
        program = compiled(step(loss_of_head), *arguments)
        errors = jax.tree.map(error_of, program(*arguments), one_device)
        assert max(jax.tree.leaves(errors)) < 1e-5
        found = moved(program)
        sizes = " + ".join(
            f"{rounds} x {size:,}" if rounds > 1 else f"{size:,}"
            for _, size, rounds in found
        )
        kinds = ", ".join(sorted({kind for kind, *_ in found}))
        lines.append(f"    {head:38} {kinds}: {sizes} bytes")
print("\n".join(lines))

# %% [markdown]
# Losses and both gradients agree with one device, and no program gathers anything. To
# read the bytes of the last lines, "data and tensor":
#
# - a device has 64 tokens and half of the words;
# - 524,288 bytes are the gradient of its half of the weights, 64 x 2048 numbers in
#   float32, added up over the four devices that have other tokens; 4 bytes are a loss
#   or a count;
# - 16,384 bytes are the gradient of 64 hidden states, 64 wide, added up over the two
#   that have other words;
# - a maximum is 4 bytes per token, 256; three numbers are 12, 768. optax moves two.
#   `linear_softmax_cross_entropy` has its tokens in 8 groups, one after the other, and
#   moves the same in 8 parts.
#
# The gradients are what data and tensor parallelism cost whatever the loss is.

# %% [markdown]
# ## Bytes on a device
#
# What a device needs can be read off compiled programs, which are not run: arguments,
# results and temporary arrays. Here for 4096 tokens of width 512 and 32,768 words, loss
# and both gradients, in float32.

# %%
BIG = (4096, 512, 32768)
COUNTS = (1, 8) if QUICK else (1, 2, 4, 8)
SPLITS = {"words": PARALLEL["tensor"]}
if not QUICK:
    SPLITS = {"tokens": PARALLEL["data"], **SPLITS}


def mib_on_a_device(loss, split, count):
    shape = (count, 1) if split == "tokens" else (1, count)
    smaller = jax.make_mesh(
        shape,
        ("data", "vocab"),
        axis_types=(AxisType.Auto,) * 2,
        devices=jax.devices()[:count],
    )
    tokens, width, vocabulary = BIG
    shapes = ((tokens, width), (width, vocabulary), (tokens,))
    arguments = [
        jax.ShapeDtypeStruct(
            shape,
            jnp.int32 if len(shape) == 1 else jnp.float32,
            sharding=NamedSharding(smaller, spec),
        )
        for shape, spec in zip(shapes, SPLITS[split], strict=True)
    ]
    memory = compiled(step(loss), *arguments).memory_analysis()
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
    ) / 2**20


sizes = {
    (split, head): [mib_on_a_device(loss, split, count) for count in COUNTS]
    for split in SPLITS
    for head, loss in HEADS.items()
}

# %%
STYLES = {
    "jaxsoftmax on logits": {"color": OURS, "linewidth": 4, "marker": "o"},
    "optax on logits": {"color": OTHERS, "linestyle": "--", "marker": "."},
    "jaxsoftmax, hidden states and weights": {"color": "#c0504d", "marker": "s"},
}
figure, axes = plt.subplots(
    1, len(SPLITS), figsize=(9.5, 4), sharey=True, squeeze=False, layout="constrained"
)
axes = axes[0]
for each, split in zip(axes, SPLITS, strict=True):
    for head, style in STYLES.items():
        each.plot(COUNTS, sizes[split, head], label=head, **style)
    first = sizes[split, "optax on logits"][0]
    each.plot(
        COUNTS, [first / n for n in COUNTS], ":", color="gray", label="1 / devices"
    )
    each.set_xscale("log", base=2)
    each.set_yscale("log", base=2)
    each.set_xticks(COUNTS, COUNTS)
    marks = [2**k for k in range(6, 12)]
    each.set_yticks(marks, [f"{mark:,}" for mark in marks])
    each.minorticks_off()
    each.set(title=f"{split} split", xlabel="devices")
    each.grid(alpha=0.3)
axes[0].set_ylabel("MiB on a device")
axes[-1].legend(fontsize=8)
figure.suptitle("Loss and gradients: arguments, results and temporary arrays")
plt.show()
print(f"MiB on a device of {COUNTS}")
rows = [
    (f"{split} split: {head}", *(f"{mib:,.0f}" for mib in sizes_in_mib))
    for (split, head), sizes_in_mib in sizes.items()
]
print(table(rows, (54, *(7 for _ in COUNTS))))
assert sizes["words", "jaxsoftmax on logits"][-1] < first / 4

# %% [markdown]
# With tokens split, every device has all weights and their gradient, 64 MiB each. More
# devices do not make these smaller, so on 8 it makes no difference here that
# `linear_softmax_cross_entropy` stores no logits. With words split, weights are shared
# too, and only hidden states and their gradient are whole on each device. On logits,
# ours takes what optax takes. The budget for chunks of logits is for the devices
# together: [many_devices.md](../docs/many_devices.md).

# %% [markdown]
# ## Attention
#
# Split over the batch or the heads, attention moves nothing. Split over positions, each
# query needs the keys of all devices: with automatic axes, `query`, `key` and `value`
# are gathered. Or the shares of `key` and `value` go round a ring of devices, and each
# device merges what it gets from each: `merge_attention` puts together two results for
# parts of the keys, with their log-sum-exps.

# %%
BATCH, LENGTH, N_HEADS, DEPTH = 1, 256 if QUICK else 1024, 8, 32
SHAPE = (BATCH, LENGTH, N_HEADS, DEPTH)
q, k, v = rng.normal(size=(3, *SHAPE)).astype(np.float32)
line = jax.make_mesh((8,), ("ring",), axis_types=(AxisType.Auto,))


def ring_attention(q, k, v):
    """Within shard_map: the keys of every device, one share at a time."""
    devices = lax.axis_size("ring")
    ring = [(i, (i + 1) % devices) for i in range(devices)]

    def attend(k, v):
        return dot_product_attention(q, k, v, return_residual=True)

    def stop(state, _):
        out, lse, k, v = state
        k, v = (lax.ppermute(x, "ring", ring) for x in (k, v))
        return (*merge_attention(out, lse, *attend(k, v)), k, v), None

    (out, *_), _ = lax.scan(stop, (*attend(k, v), k, v), length=devices - 1)
    return out


by_position, by_head = P(None, "ring"), P(None, None, "ring")
ring = jax.shard_map(
    ring_attention, mesh=line, in_specs=(by_position,) * 3, out_specs=by_position
)
WAYS = {
    "heads split": (dot_product_attention, by_head),
    "positions split, automatic axes": (dot_product_attention, by_position),
    "positions split, ring": (ring, by_position),
}


def gradients(attention):
    def loss(q, k, v):
        return jnp.sum(jnp.sin(attention(q, k, v)))

    return jax.grad(loss, (0, 1, 2))


def both(attention, *args):
    """The compiled programs of the value and of the gradients."""
    return compiled(attention, *args), compiled(gradients(attention), *args)


whole = [program(q, k, v) for program in both(dot_product_attention, q, k, v)]
lines = []
for name, (attention, spec) in list(WAYS.items())[-1 if QUICK else 0 :]:
    arguments = [put(spec, x, line) for x in (q, k, v)]
    forward, backward = both(attention, *arguments)
    found = [forward(*arguments), backward(*arguments)]
    errors = jax.tree.map(error_of, found, whole)
    assert max(jax.tree.leaves(errors)) < 2e-5
    lines.append(name)
    for what, program in (("forward", forward), ("gradient", backward)):
        temporary = program.memory_analysis().temp_size_in_bytes / 2**20
        moves = summary(moved(program))
        lines.append(f"    {what}: {moves}; temporary memory {temporary:.1f} MiB")
share = q.nbytes // 8
print("\n".join(lines))
print(f"a device's share of one array: {share:,} bytes")

# %% [markdown]
# Values and gradients agree with one device in all three. In the ring each device sends
# its neighbour two shares, seven times: together nearly as many bytes as all-gathers of
# `key` and `value`, but it never has more than one share of them. The gradient, with
# its forward, sends as many bytes of gradients back.
#
# This ring is short so as to be read. Its backward is what JAX makes of the loop, and
# keeps the shares of every stop. [ring_attention.py](ring_attention.py) is the program
# to start from: it has a causal mask, and a backward pass of its own that sends the
# keys round once more and keeps nothing but each device's share (`make ring`).

# %% [markdown]
# ## On real GPUs
#
# Simulated devices say what moves, and not how long it takes. What was measured is in
# `docs/gpu_sharding.json`, on two GPUs; four and more were not.

# %%
folder = pathlib.Path.cwd()
DOCS = next(
    each / "docs"
    for each in (folder, *folder.parents)
    if (each / "docs" / "gpu_sharding.json").exists()
)
measured = json.loads((DOCS / "gpu_sharding.json").read_text())
about, cells = measured["about"], measured["cells"]
TITLE = (
    f"{about['devices']} x {about['device']}; jax {about['jax']}, "
    f"jaxsoftmax {about['jaxsoftmax']}; bfloat16"
)
CONTENDERS = {
    "jaxsoftmax": OURS,
    "jaxsoftmax, xla": "#e5c07b",
    "jax.nn": OTHERS,
    "jax.nn custom_jvp": "#6f8fc4",
}
PASSES = ("forward", "backward", "forward and backward")


def bars(axes, split):
    """GB/s per GPU for each pass and length of the rows."""
    split_cells = [
        cell
        for passes in PASSES
        for cell in cells
        if (cell["split"], cell["dtype"], cell["what"]) == (split, "bfloat16", passes)
    ]
    for i, (name, color) in enumerate(CONTENDERS.items()):
        places = [j + (i - 1.5) * 0.2 for j in range(len(split_cells))]
        rates = [cell["results"][name]["gbps"] for cell in split_cells]
        axes.bar(places, rates, 0.2, color=color, label=name)
    names = [
        f"{cell['what'].replace(' and ', ' and' + chr(10))}\n{cell['n']:,}"
        for cell in split_cells
    ]
    axes.set_xticks(range(len(split_cells)), names, fontsize=8)
    axes.set(title=split)
    axes.grid(alpha=0.3, axis="y")


figure, axes = plt.subplots(2, 1, figsize=(9.5, 7.5), sharey=True, layout="constrained")
for each, split in zip(axes, ("whole rows", "shared rows"), strict=True):
    bars(each, split)
    each.set(ylabel="GB/s per GPU")
axes[1].set_xlabel("what is computed, and entries in a row")
figure.suptitle(TITLE)
handles, names = axes[0].get_legend_handles_labels()
figure.legend(handles, names, loc="outside lower center", ncols=4)
plt.show()

# %%
lines = []
ratios = [
    cell["results"]["jaxsoftmax"]["one_gpu_ratio"]
    for cell in cells
    if cell["split"] == "whole rows"
]
lines.append(
    f"whole rows: {min(ratios):.2f} to {max(ratios):.2f} of the rate of a GPU alone"
)
for passes in PASSES:
    for name in ("jaxsoftmax", "jaxsoftmax, xla"):
        found = [
            1 / cell["results"][name]["speed_of_jax_nn"]
            for cell in cells
            if (cell["split"], cell["what"]) == ("shared rows", passes)
        ]
        lines.append(
            f"shared rows, {passes}: {name}: {min(found):.2f} to {max(found):.2f} "
            "of the time of jax.nn"
        )
print("\n".join(lines))

# %% [markdown]
# So, on these two GPUs:
#
# - Split the batch where it can be split: each GPU runs at the rate that it has alone.
# - Rows that GPUs share are read twice by ours in the forward, and by XLA three times:
#   ours are faster there, and up to 3 % slower than jax.nn with the backward.
# - `"xla"`, which runs where no kernel can, is slower than jax.nn on shared rows: see
#   with `explain` that it is not what runs
#   ([gpu_and_explain.ipynb](gpu_and_explain.ipynb)).
#
# On your own machine: `make check-gpu-sharding` compares programs for all its GPUs with
# one device, and `make bench-gpu-sharding` times them.
