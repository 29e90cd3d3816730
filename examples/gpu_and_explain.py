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
# # Which kernel runs, and how fast
#
# After this notebook you will be able to
#
# - see which implementation every call of a program runs with, in a whole training step
#   too, and why nothing faster does;
# - ask the same for a GPU that you do not have;
# - name the implementation that must run, and get an error, or a warning, where it
#   cannot;
# - read the measured speeds on a GPU: where jaxsoftmax is faster than others, and where
#   it is slower;
# - measure on your own GPU.
#
# It runs in half a minute on two CPU cores, and needs
# `pip install "jaxsoftmax[examples]"`. No GPU is needed: nothing here is timed, and the
# figures that are drawn come with the project, in `docs/gpu_*.json`.

# %%
import functools
import json
import math
import pathlib
import re
import statistics
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax
from flax import nnx
from jax import export
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxsoftmax import (
    PerformanceWarning,
    dot_product_attention,
    explain,
    explain_for,
    softmax,
    softmax_cross_entropy_with_integer_labels,
)
from jaxsoftmax.flax import attention_fn

print(f"jax {jax.__version__} on {jax.default_backend()}")

# %% [markdown]
# ## What runs here
#
# `explain` traces a function and lowers it, for the platform that it would run on.
# Nothing is compiled or executed, so a shape and a dtype are enough for an array.

# %%
logits = jax.ShapeDtypeStruct((4096, 8192), jnp.bfloat16)
explain(softmax, logits)


# %% [markdown]
# Of a gradient it lists the backward's calls too. The arrays are those that a call
# gets: here the probabilities that the forward kept, and the cotangent.


# %%
def loss(x):
    return jnp.sum(softmax(x).astype(jnp.float32) ** 2)


explain(jax.grad(loss), logits)

# %% [markdown]
# Attention has implementations of its own. Its gradient is one call, which makes the
# weights again.

# %%
heads = jax.ShapeDtypeStruct((2, 1024, 8, 64), jnp.bfloat16)


def attention_loss(q, k, v, **options):
    out = dot_product_attention(q, k, v, is_causal=True, **options)
    return jnp.sum(out.astype(jnp.float32))


gradients_of_attention = jax.grad(attention_loss, (0, 1, 2))
explain(gradients_of_attention, heads, heads, heads)

# %% [markdown]
# ## A whole training step
#
# `fn` may be any function that JAX can trace. Here it is a step of a Flax NNX model,
# with its optimizer, computing in bfloat16.


# %%
class Model(nnx.Module):
    def __init__(self, rngs, words=4096, width=256, dtype=jnp.bfloat16):
        self.embed = nnx.Embed(words, width, dtype=dtype, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            4, width, dtype=dtype, attention_fn=attention_fn, decode=False, rngs=rngs
        )
        self.head = nnx.Linear(width, words, dtype=dtype, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        return self.head(x + self.attention(x))


def mean_loss(model, tokens, labels):
    return softmax_cross_entropy_with_integer_labels(
        model(tokens), labels, reduction="mean"
    )


@nnx.jit
def step(model, optimizer, tokens, labels):
    value, gradient = nnx.value_and_grad(mean_loss)(model, tokens, labels)
    optimizer.update(model, gradient)
    return value


def step_and_state(model, optimizer, tokens, labels):
    value = step(model, optimizer, tokens, labels)
    return value, nnx.state((model, optimizer))


model = Model(nnx.Rngs(0))
optimizer = nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.Param)
tokens = jax.ShapeDtypeStruct((8, 128), jnp.int32)
training = (step_and_state, model, optimizer, tokens, tokens)
explain(*training)

# %% [markdown]
# Only what the results depend on is listed. An NNX step changes its model in place and
# returns the loss alone. Explained as it is, the backward of the attention is missing,
# as no result needs it:

# %%
explain(step, model, optimizer, tokens, tokens)

# %% [markdown]
# So give `explain` a function that returns the state, as above.
#
# ## What would run on a GPU
#
# `explain_for(platform, device_kind)` answers for a device that this process need not
# have. The second argument is what the device calls itself: the `device_kind` of a
# `jax.Device`.

# %%
H100 = "NVIDIA H100 80GB HBM3"
on_h100 = explain_for("cuda", H100)
on_h100(*training)

# %% [markdown]
# Below a call stand the reasons why a faster implementation does not run: these are
# what one can change. Three for an H100 follow: rows whose length the kernels do not
# take, float32 where cuDNN takes 16 bits, and a soft cap, which cuDNN does not have.

# %%
on_h100(softmax, jax.ShapeDtypeStruct((4096, 50257), jnp.bfloat16))

# %%
on_h100(attention_loss, *[jax.ShapeDtypeStruct(heads.shape, jnp.float32)] * 3)

# %%
on_h100(attention_loss, heads, heads, heads, logits_soft_cap=30.0)

# %% [markdown]
# Here jax-triton is not installed, and each time that is one of the reasons. `"triton"`
# takes all three; `pip install "jaxsoftmax[cuda12]"` (or `[cuda13]`) brings it, as for
# the measurements of `triton` and `default` further down.
#
# Each explanation has the same in `choices`, for programs. So one can make a table, of
# several devices:

# %%
CALLS = {
    "softmax": (softmax, logits),
    "its gradient": (jax.grad(loss), logits),
    "rows of 50257": (softmax, jax.ShapeDtypeStruct((4096, 50257), jnp.bfloat16)),
    "attention": (gradients_of_attention, heads, heads, heads),
}
DEVICES = [
    ("cuda", H100),
    ("cuda", "NVIDIA A100-SXM4-80GB"),
    ("cuda", "Tesla T4"),
    ("rocm", "AMD Instinct MI300X"),
    ("tpu", "TPU v5e"),
    ("cpu", None),
]


def implementations(device, call):
    choices = explain_for(*device)(*call).choices
    return ", ".join(dict.fromkeys(choice.implementation for choice in choices))


def table(rows, widths):
    """Rows of texts in columns; the first is set left, the others right."""
    first, *others = widths
    for left, *cells in rows:
        cells = [f"{cell:>{w}}" for cell, w in zip(cells, others, strict=True)]
        yield "".join([f"{left:{first}}", *cells])


rows = [["", *CALLS]]
for platform, kind in DEVICES:
    found = (implementations((platform, kind), call) for call in CALLS.values())
    rows.append([kind or platform, *found])
print("\n".join(table(rows, (23, 15, 15, 15, 15))))

# %% [markdown]
# With jax-triton, `triton` would stand for `xla` in the rows of the H100 and the A100.
# The figures further down are of an H100 and an H200; for the other devices the table
# says only what would be chosen. For the reasons, print the explanation:

# %%
explain_for("cuda", "Tesla T4")(softmax, logits)

# %% [markdown]
# ### On several GPUs
#
# Each device runs what takes its share. With explicit axes the shares are known when
# the program is lowered: here each of 8 GPUs has 1024 rows of 4096, a fourth of the
# rows and half of each. Then a call reduces its share to a state of a few numbers, as
# the names say. [many_devices.ipynb](many_devices.ipynb) is about this.

# %%
mesh = AbstractMesh((4, 2), ("data", "vocab"), axis_types=(AxisType.Explicit,) * 2)
spread = NamedSharding(mesh, P("data", "vocab"))
shared = jax.ShapeDtypeStruct((4096, 8192), jnp.bfloat16, sharding=spread)
on_h100(jax.grad(loss), shared)

# %% [markdown]
# ## Asking for an implementation
#
# | `implementation` | what runs |
# | --- | --- |
# | `None`, the default | what was measured to be the fastest, of those that can |
# | a name | this one, or an error with the reason |
# | names in a sequence | the first that can, or an error with every reason |
#
# The error comes where the program is lowered, so a program that names a GPU's kernel
# can be traced on a CPU.

# %%
x = jnp.zeros((8, 128))


def outcome(asked):
    try:
        softmax(x, implementation=asked)
    except (NotImplementedError, ValueError) as error:
        return f"{asked!r}: {type(error).__name__}\n    {error}"
    return f"{asked!r}: runs"


several = (None, "xla", ("mosaic_gpu", "xla"), "mosaic_gpu", "cuda")
print("\n".join(map(outcome, several)))

# %% [markdown]
# `explain` makes no error of it. It says what would happen:

# %%
explain(softmax, x, implementation=("mosaic_gpu", "triton"))

# %% [markdown]
# ## Programs for a GPU, made on a CPU
#
# JAX lowers a program for a platform without having it. What it is lowered to shows the
# kernels by name. Which GPU it is for, the abstract mesh says (`AbstractDevice` takes
# this form since JAX 0.10.2).

# %%
gpu = AbstractDevice(device_kind=H100, num_cores=None, platform="gpu")
for_h100 = AbstractMesh((), (), abstract_device=gpu)


def lowered_for_h100(f, *args):
    with jax.sharding.use_abstract_mesh(for_h100):
        return jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def kernels(text):
    """Names in the text, which has each kernel's code in it: some many times."""
    return sorted(set(re.findall(r"jaxsoftmax_\w+_mosaic_gpu", text)))


text = lowered_for_h100(jax.grad(loss), logits)
print(kernels(text))
print(text.count("stablehlo.custom_call @mosaic_gpu"), "kernel calls")

# %% [markdown]
# `jax.export` makes such programs to be stored. One for two platforms has what is best
# for each.

# %%
with jax.sharding.use_abstract_mesh(for_h100):
    exported = export.export(jax.jit(softmax), platforms=("cpu", "cuda"))(logits)
print(exported.platforms, kernels(exported.mlir_module()))
here = exported.call(jnp.zeros(logits.shape, logits.dtype))
print(f"run on {jax.default_backend()}: {here.dtype}{list(here.shape)}")

# %% [markdown]
# That is softmax and the losses. Attention is lowered to cuDNN or Triton only in a
# process that has the GPU. Elsewhere it is `jax.numpy`, with a warning, or an error if
# one of the two is asked for by name. `explain_for` says what would run if the program
# were lowered on the GPU's own machine.

# %%
try:
    with_cudnn = functools.partial(attention_loss, implementation="cudnn")
    lowered_for_h100(with_cudnn, heads, heads, heads)
except NotImplementedError as error:
    print(error)
print(implementations(("cuda", H100), (attention_loss, heads, heads, heads)))

# %% [markdown]
# ## Warnings
#
# On a GPU, a call with `implementation=None` that no kernel takes runs as XLA, and
# gives a `PerformanceWarning` with the reasons. Here is one for an H100; the kernels of
# `"mosaic_gpu"` take no rows below 1,000 bytes whose length is no multiple of 128.

# %%
rows_of_300 = jax.ShapeDtypeStruct((8192, 300), jnp.bfloat16)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    lowered_for_h100(softmax, rows_of_300)
    lowered_for_h100(jax.grad(loss), rows_of_300)
for each in caught:
    print(f"{each.category.__name__}: {each.message}")

# %% [markdown]
# It comes once in a process for each reason: the gradient has the same one, and says
# nothing. There are three things to do about it.
#
# Stop there, with the filter in a test suite for example (in pytest:
# `filterwarnings = ["error::jaxsoftmax.PerformanceWarning"]`):

# %%
with warnings.catch_warnings():
    warnings.simplefilter("error", PerformanceWarning)
    try:
        lowered_for_h100(softmax, jax.ShapeDtypeStruct((8192, 301), jnp.bfloat16))
    except PerformanceWarning as error:
        print(f"stopped: {str(error)[:90]}...")

# %% [markdown]
# Or ask for kernels alone, whatever the filter of warnings is:

# %%
try:
    lowered_for_h100(
        lambda x: softmax(x, implementation=("mosaic_gpu", "triton")), rows_of_300
    )
except NotImplementedError as error:
    print(f"stopped: {str(error)[:90]}...")

# %% [markdown]
# Or say that XLA is what is wanted, for one call, or silence it for all:

# %%
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    rows_of_1002 = jax.ShapeDtypeStruct((4096, 1002), jnp.bfloat16)
    lowered_for_h100(lambda x: softmax(x, implementation="xla"), rows_of_1002)
    warnings.simplefilter("ignore", PerformanceWarning)
    lowered_for_h100(softmax, rows_of_1002)
print(f"{len(caught)} warnings")

# %% [markdown]
# ## For a report of a bug
#
# `python -m jaxsoftmax` prints versions, devices and what can run. The line about
# Python and the system is left out here.

# %%
report = subprocess.run(
    [sys.executable, "-m", "jaxsoftmax"], capture_output=True, text=True, check=True
)
lines = report.stdout.splitlines()
print("\n".join(line for line in lines if not line.startswith("Python ")))

# %% [markdown]
# ## How fast
#
# From here on nothing is computed but ratios: the figures are those of
# `docs/gpu_*.json`, one run of each benchmark, on the device and with the versions that
# the titles and the next lines name.

# %%
folder = pathlib.Path.cwd()
DOCS = next(
    each / "docs"
    for each in (folder, *folder.parents)
    if (each / "docs" / "gpu_softmax.json").exists()
)
NAMES = ("softmax", "cross_entropy", "linear_cross_entropy", "attention")
measured = {name: json.loads((DOCS / f"gpu_{name}.json").read_text()) for name in NAMES}


def made_with(name):
    """The device, and the versions of what was timed."""
    data = measured[name]
    packages = ("jax", "jaxsoftmax", "jax_triton", "torch")
    versions = ", ".join(f"{each} {data['versions'][each]}" for each in packages)
    return f"{data['device']}; {versions}"


about = (
    f"{name}: {made_with(name)}\n    driver {data['driver']}; {data['clock']}"
    for name, data in measured.items()
)
print("\n".join(about))

# %%
OURS, ALSO_OURS, XLA = "#f2a900", "#c77700", "#e5c07b"
JAX, TORCH = "#1b3a6b", "#7a7a7a"
STYLES = {
    "mosaic_gpu": {"color": OURS, "marker": "o", "linewidth": 3},
    "default": {"color": OURS, "marker": "o", "linewidth": 3},
    "triton": {"color": ALSO_OURS, "marker": "s", "linewidth": 2},
    "xla": {"color": XLA, "marker": "^", "linewidth": 2},
    "jax.nn": {"color": JAX, "marker": "o", "linewidth": 1.4},
    "jax.nn, xla": {"color": JAX, "marker": "o", "linewidth": 1.4},
    "jax.nn custom_jvp": {"color": JAX, "marker": "x", "linestyle": "--"},
    "jax.nn, cudnn": {"color": JAX, "marker": "x", "linestyle": "--"},
    "torch": {"color": TORCH, "marker": "v", "linewidth": 1.4},
    "torch, flash": {"color": TORCH, "marker": "v", "linewidth": 1.4},
    "torch, cudnn": {"color": TORCH, "marker": "x", "linestyle": "--"},
}
OF_OURS = {"mosaic_gpu", "default", "triton", "xla"}


def draw(axes, cells, place, height):
    """A line for each contender; `height` is of its result in a cell, or None."""
    for name, style in STYLES.items():
        points = sorted(
            (place(cell), height(cell, cell["results"][name]))
            for cell in cells
            if name in cell["results"] and "ms" in cell["results"][name]
        )
        if points:
            label = f"ours: {name}" if name in OF_OURS else name
            axes.plot(*zip(*points, strict=True), label=label, markersize=5, **style)
    axes.grid(alpha=0.3)


def at_lengths(axes, lengths):
    axes.set_xscale("log", base=2)
    axes.minorticks_off()
    labels = [f"{n // 1024}k" if n >= 1024 else str(n) for n in lengths]
    axes.set_xticks(lengths, labels)


def legend_below(figure, axes, columns=4):
    """One for all panels, with every name that any of them has."""
    found = {}
    for each in axes:
        found |= dict(zip(*reversed(each.get_legend_handles_labels()), strict=True))
    figure.legend(
        found.values(), found.keys(), loc="outside lower center", ncols=columns
    )


# %% [markdown]
# ### Softmax: memory sets the limit
#
# A softmax can be no faster than reading its operands and writing its result once. So
# the measure is bytes that must be read and written, each second, as a fraction of the
# rate at which the card copies memory, which the benchmark measures beside it.

# %%
cells = [
    cell
    for cell in measured["softmax"]["cells"]
    if (cell["dtype"], cell["group"]) == ("bfloat16", "rows")
]
copy_rate = statistics.median(cell["results"]["copy"]["gbps"] for cell in cells)
lengths = [n for n in sorted({cell["n"] for cell in cells}) if n & (n - 1) == 0]
PANELS = {
    "softmax": "softmax, forward",
    "softmax_backward": "softmax, backward",
    "log_softmax": "log_softmax, forward",
    "log_softmax_backward": "log_softmax, backward",
}
figure, axes = plt.subplots(
    2, 2, figsize=(9.5, 7), sharex=True, sharey=True, layout="constrained"
)
for each, (op, title) in zip(axes.flat, PANELS.items(), strict=True):
    op_cells = [cell for cell in cells if cell["op"] == op and cell["n"] in lengths]
    draw(each, op_cells, lambda c: c["n"], lambda c, result: result["gbps"] / copy_rate)
    each.axhline(1, color="black", linewidth=0.8)
    at_lengths(each, lengths[::2])
    each.set(title=title, ylim=(0, 1.15))
for each in axes[1]:
    each.set_xlabel("entries in a row")
for each in axes[:, 0]:
    each.set_ylabel("rate, as a fraction of a copy's")
figure.suptitle(
    f"bfloat16, {measured['softmax']['elements']:,} entries; a copy: "
    f"{copy_rate:,.0f} GB/s\n{made_with('softmax')}",
    fontsize=10,
)
legend_below(figure, axes.flat, columns=3)
plt.show()

# %% [markdown]
# [gpu_softmax.md](../docs/gpu_softmax.md) has the lengths between, of any kind, other
# dtypes and other axes. Rows of 1,048,576 entries are read twice.
#
# Slower than others, by these figures: forward, than jax.nn for rows of 128 entries,
# `log_softmax` by 18 %. `xla` on a GPU is at best as fast as jax.nn, and mostly slower.
#
# What the panels do not show is fusion. A call of a kernel is one pass over memory, and
# XLA cannot merge it with what stands around it. In a program of a softmax alone,
# `jit(grad(sum(softmax(x) * w)))`, jax.nn with the flag `jax_softmax_custom_jvp`
# becomes one kernel for short rows, as the file says, and is faster than our two:

# %%
programs = [cell for cell in cells if cell["op"] == "gradient"]
figure, axes = plt.subplots(figsize=(7, 4.4), layout="constrained")
draw(axes, programs, lambda cell: cell["n"], lambda cell, result: result["ms"])
at_lengths(axes, [cell["n"] for cell in programs])
axes.set(
    title="jit(grad(sum(softmax(x) * w))), bfloat16\n" + made_with("softmax"),
    xlabel="entries in a row",
    ylabel="ms",
    yscale="log",
)
axes.title.set_fontsize(9)
axes.set_yticks([0.2, 0.3, 0.5, 1, 2], ["0.2", "0.3", "0.5", "1", "2"])
axes.minorticks_off()
axes.legend(loc="center", bbox_to_anchor=(0.5, 0.67), ncols=2)
plt.show()
shortest = programs[0]["results"]
kernel_counts = {
    name: shortest[name]["kernels"]
    for name in ("default", "jax.nn", "jax.nn custom_jvp")
}
print(f"kernels in the program, rows of {programs[0]['n']}: {kernel_counts}")

# %% [markdown]
# ### Cross-entropy
#
# Value and gradient of the mean loss, from logits in bfloat16. "per example" is with
# `reduction="none"`, and the mean taken after it: one more pass. The limit is counted
# as above: one read and one write of the logits.

# %%
BARS = {
    "mean": ("ours: default", OURS),
    "triton": ("ours: triton", ALSO_OURS),
    "xla": ("ours: xla", XLA),
    "per example": ("ours: per example", "#fbe3a6"),
    "optax": ("optax", JAX),
    "optax, upcast": ("optax on a float32 copy", "#6f8fc4"),
    "torch.compile": ("torch.compile", TORCH),
    "torch": ("torch", "#a5a5a5"),
    "Liger": ("Liger", "#c9c9c9"),
}


def size(shape):
    return " x ".join(f"{n:,}" for n in shape)


def bars(axes, cells, looks, height):
    """A group for each cell; `height` is of a cell and a contender's result."""
    width = 0.8 / len(looks)
    for i, (name, (label, color)) in enumerate(looks.items()):
        places = [j + (i - len(looks) / 2 + 0.5) * width for j in range(len(cells))]
        found = [(cell, cell["results"].get(name)) for cell in cells]
        heights = [height(cell, of) if of else math.nan for cell, of in found]
        axes.bar(places, heights, width, color=color, label=label)
    axes.set_xticks(range(len(cells)), [size(cell["shape"]) for cell in cells])
    axes.grid(alpha=0.3, axis="y")


cells = [c for c in measured["cross_entropy"]["cells"] if c["dtype"] == "bfloat16"]
figure, axes = plt.subplots(figsize=(9.5, 4.6), layout="constrained")
bars(axes, cells, BARS, lambda cell, result: cell["copy_ms"] / result["ms"])
axes.axhline(1, color="black", linewidth=0.8)
axes.set(xlabel="rows x classes", ylabel="rate, as a fraction of a copy's")
axes.set_title(
    f"Cross-entropy and its gradient, bfloat16\n{made_with('cross_entropy')}",
    fontsize=10,
)
legend_below(figure, [axes], columns=5)
plt.show()

# %% [markdown]
# 50,257 is no multiple of 128: when this was measured, `mosaic_gpu` had no kernel for
# such rows, and the default was `triton`.
#
# ### Behind a linear layer
#
# Here matrix products set the limit, and logits cost memory: what is needed beyond
# arguments and gradients. "memory first" is ours with a `memory_budget` of 64 MiB.

# %%
WITH_LINEAR = {
    "default": ("ours: default", OURS),
    "memory first": ("ours: memory first", ALSO_OURS),
    "dense": ("optax, bfloat16 logits", JAX),
    "dense, float32 logits": ("optax, float32 logits", "#6f8fc4"),
    "torch.compile": ("torch.compile", TORCH),
    "torch": ("torch", "#a5a5a5"),
}
cells = measured["linear_cross_entropy"]["cells"]
cells = [cell for cell in cells if "memory first" in cell["results"]]
figure, axes = plt.subplots(2, 1, figsize=(9.5, 7), sharex=True, layout="constrained")
bars(
    axes[0],
    cells,
    WITH_LINEAR,
    lambda cell, result: 6 * math.prod(cell["shape"]) / result["ms"] / 1e9,
)
bars(axes[1], cells, WITH_LINEAR, lambda cell, result: result["extra_bytes"] / 1e6)
axes[0].set(ylabel="TFLOP/s (more is better)")
axes[1].set(
    xlabel="tokens x width x classes",
    ylabel="memory beyond, MB (less is better)",
    yscale="log",
)
figure.suptitle(
    f"Loss and gradients, bfloat16\n{made_with('linear_cross_entropy')}", fontsize=10
)
legend_below(figure, axes, columns=4)
plt.show()

# %% [markdown]
# Accuracy differs too. As a multiple of ours, by default:

# %%
rows = [["tokens x width x classes", "", "ms", "memory", "gradients' error"]]
for cell in cells:
    ours = cell["results"]["default"]
    for name in ("memory first", "dense", "torch.compile"):
        if name not in cell["results"]:
            continue
        result = cell["results"][name]
        multiples = (result[key] / ours[key] for key in ("ms", "extra_bytes", "error"))
        rows.append([size(cell["shape"]), name, *(f"{each:.2f}" for each in multiples)])
print("\n".join(table(rows, (26, 14, 8, 8, 18))))

# %% [markdown]
# The dense form in bfloat16 and torch.compile take 1.00 to 1.04 of our time, and are
# less accurate. With 2,048 tokens nothing is saved by chunks.
#
# ### Attention
#
# By default cuDNN's kernels run where they can: the same that `jax.nn` runs if it is
# asked for cuDNN. What cuDNN does not take runs in Mosaic GPU on Hopper, or else in
# Triton. Times of torch are by CUDA events, the others' by the host.

# %%
STYLES["mosaic_gpu"] |= {"marker": "D", "linestyle": ":"}  # beside the default
cells = [
    cell
    for cell in measured["attention"]["cells"]
    if cell["other"] is None and cell["causal"] and cell["direction"] == "gradient"
]
depths = sorted({cell["shape"][3] for cell in cells})
lengths = sorted({cell["shape"][1] for cell in cells})
figure, axes = plt.subplots(
    1, len(depths), figsize=(10.5, 4.4), sharey=True, layout="constrained"
)
for each, depth in zip(axes, depths, strict=True):
    draw(
        each,
        [cell for cell in cells if cell["shape"][3] == depth],
        lambda cell: cell["shape"][1],
        lambda cell, result: cell["flops"] / result["ms"] / 1e9,
    )
    at_lengths(each, lengths)
    each.set(title=f"depth of a head: {depth}", xlabel="positions")
axes[0].set(ylabel="TFLOP/s", ylim=(0, None))
figure.suptitle(
    f"Causal attention and its gradients, bfloat16\n{made_with('attention')}",
    fontsize=10,
)
legend_below(figure, axes, columns=4)
plt.show()

# %% [markdown]
# ## Where it is slower
#
# Every case that was measured, as one number: our time, by default, over that of the
# best of the others. Where the default has no figure, it is that of `mosaic_gpu`, which
# would run, or of `triton` if that has none either. Right of 1, others are faster.
#
# Of softmax in float32 the default over the last axis up to 16,384 entries is XLA's
# form, and so it is of the forward over other axes: alone slower than the kernels, but
# it fuses casts. (The derivative over other axes runs in strips since this was
# measured.)

# %%
ratios = {}  # of a program: (ratio, case, ours, the best of the others)


def compare(program, case, found):
    """Notes one case; `found` has milliseconds by name."""
    ours = [name for name in ("default", "mosaic_gpu", "triton") if name in found]
    others = {k: v for k, v in found.items() if k not in OF_OURS and "copy" not in k}
    if ours and others:
        best = min(others, key=others.get)
        entry = (found[ours[0]] / others[best], case, ours[0], best)
        ratios.setdefault(program, []).append(entry)


def times(results, names=None):
    """Milliseconds; of `names`, or all."""
    kept = {k: v for k, v in results.items() if names is None or k in names}
    return {k: result["ms"] for k, result in kept.items() if "ms" in result}


for cell in measured["softmax"]["cells"]:
    program = PANELS.get(cell["op"], "softmax, grad of a sum")
    case = f"rows of {cell['n']:,}, {cell['dtype']}"
    if cell["axis"] != -1:
        case = f"axis {cell['axis']} of {size(cell['shape'])}, {cell['dtype']}"
    compare(program, case, times(cell["results"]))
for cell in measured["softmax"]["small"]:
    found = {
        name: result["device_us"] / 1e3
        for name, result in cell["results"].items()
        if "device_us" in result
    }
    compare("... of small arrays", f"{size(cell['shape'])}, {cell['dtype']}", found)
for cell in measured["cross_entropy"]["cells"]:
    case, results = f"{size(cell['shape'])}, {cell['dtype']}", cell["results"]
    for ours, program, others in (
        ("mean", "cross-entropy", set(BARS) - {"mean", "per example", *OF_OURS}),
        ("forward", "... forward", {"optax, forward"}),
        ("options", "... with options", {"options in jax.numpy"}),
    ):
        found = {"default": results[ours]["ms"], **times(results, others)}
        compare(program, case, found)
for cell in measured["linear_cross_entropy"]["cells"]:
    found = times(cell["results"], set(WITH_LINEAR) - {"memory first"})
    compare("linear + cross-entropy", size(cell["shape"]), found)
for cell in measured["attention"]["cells"]:
    _, length, _, depth = cell["shape"]
    options = cell["other"] or ("causal" if cell["causal"] else "every key")
    case = f"{length:,} positions, depth {depth}, {options}"
    program = f"attention, {cell['direction']}"
    compare(program + "*" * bool(cell["other"]), case, times(cell["results"]))

# %%
figure, axes = plt.subplots(figsize=(8.5, 5), layout="constrained")
for i, entries in enumerate(ratios.values()):
    for ratio, *_ in entries:
        axes.plot(ratio, i, "o", color=OURS if ratio <= 1 else "#b03a2e", alpha=0.7)
axes.axvline(1, color="black", linewidth=0.8)
axes.set_xscale("log", base=2)
marks = [0.0625, 0.125, 0.25, 0.5, 1, 2]
axes.set_xticks(marks, [f"{mark:g}" for mark in marks])
axes.set_yticks(range(len(ratios)), ratios)
axes.invert_yaxis()
axes.set(
    title="Each case that was measured (red: others are faster)",
    xlabel="our time / that of the best of the others",
)
axes.grid(alpha=0.3, axis="x")
plt.show()

# %% [markdown]
# Attention with a star is what cuDNN does not take: a soft cap, sinks. The
# others are then `jax.numpy` alone. The mean is geometric, and each case counts alike.

# %%
rows = [["", "cases", "slower", "least", "mean", "most", "  where, and the faster one"]]
for program, entries in ratios.items():
    found = [ratio for ratio, *_ in entries]
    worst, case, _, other = max(entries)
    mean = math.exp(statistics.mean(map(math.log, found)))
    numbers = (f"{ratio:.2f}" for ratio in (min(found), mean, worst))
    where = f"  {case}: {other}" if worst > 1 else ""
    slower = sum(ratio > 1 for ratio in found)
    rows.append([program, len(found), slower, *numbers, where])
print("\n".join(table(rows, (24, 6, 8, 7, 7, 7, 0))))

# %% [markdown]
# A ratio within a few hundredths of 1 may be noise: `default` and `jax.nn, cudnn` run
# the same kernels of cuDNN, and their times differ by so much. Small arrays are by the
# device's clock; by the host's, most of a call is the time to start it.
#
# All cases in which we are slower by more than a tenth, but for small arrays:

# %%
lines = []
for program, entries in ratios.items():
    slower = sorted((entry for entry in entries if entry[0] > 1.1), reverse=True)
    if slower and program != "... of small arrays":
        lines.append(program)
        lines += [
            f"    {ratio:4.2f}  {case:40} {ours} / {best}"
            for ratio, case, ours, best in slower
        ]
print("\n".join(lines))

# %% [markdown]
# ## On your own GPU
#
# Figures are of one device and one set of versions. In a checkout, on the machine with
# the GPU, the same programs make yours. The first `make` installs what they need;
# `CUDA=cuda13` chooses the other extra.
#
# - `make check-gpu-rows` compares the kernels with an oracle on this GPU, with
#   `ARGS=--quick` some of them. `make check-gpu-losses` and `make check-gpu-attention`
#   are for the others.
# - `make bench-gpu-rows ARGS='--json F.json --png F.png'` times softmax, as above. The
#   others are `make bench-gpu-losses`, `make bench-gpu-linear` and
#   `make bench-gpu-attention`.
# - `make check-gpu-sharding` and `make bench-gpu-sharding` are for programs over all
#   GPUs of a machine.
#
# Check first, then time. Before that, `explain` says whether what you time is what you
# think: a kernel that was refused is timed as XLA.
