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
# # Where gradients are lost to cancellation, and the form that keeps them
#
# After this notebook you will be able to
#
# - tell the two cases in which the gradient of softmax, $dS = P \circ (dP - D)$ with
#   $D = \sum P \circ dP$, loses its digits in floating point, and why;
# - follow on one row, digit by digit, how `jaxsoftmax.softmax` keeps them;
# - measure the error of any softmax gradient against an oracle that does not cancel;
# - recognise the same loss in cross-entropy and in attention;
# - decide whether it matters to you, and what it costs.
#
# The formula itself is derived in [identity.ipynb](identity.ipynb). This notebook runs
# in less than half a minute on two CPU cores, and needs
# `pip install "jaxsoftmax[examples]"`.

# %%
import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import jaxsoftmax

print(f"jax {jax.__version__} on {jax.default_backend()}")

# %% [markdown]
# ## An oracle that does not cancel
#
# The oracle must not have the fault that it is to measure. $D$ is the mean of $dP$
# under $P$, so $dP - D$ does not change when a constant is added to $dP$. Take as the
# constant what $dP$ has at the entry with the largest $P$, entry $k$:
#
# $$r_i = dP_i - dP_k, \qquad dS_i = P_i \, \Big(r_i - \sum_j P_j r_j\Big).$$
#
# $r_k$ is exactly 0. Where entry $k$ dominates, the sum has only small terms, and
# $dS_k = -P_k \sum_j P_j r_j$ keeps its digits. In NumPy's float64, from the inputs as
# they were rounded to their dtype:


# %%
def float64(x):
    return np.asarray(x).astype(np.float64)


def exact_parts(x, g):
    """P, and `g` less that of the entry with the largest P, in float64."""
    x, g = float64(x), float64(g)
    k = x.argmax(axis=-1, keepdims=True)
    e = np.exp(x - np.take_along_axis(x, k, axis=-1))
    r = g - np.take_along_axis(g, k, axis=-1)
    return e / e.sum(axis=-1, keepdims=True), r


def exact_gradient(x, g):
    p, r = exact_parts(x, g)
    return p * (r - np.sum(p * r, axis=-1, keepdims=True))


# %% [markdown]
# The **error of a row** is the largest error in it over the largest entry of the row's
# exact gradient. At 1, the error is as large as the gradient.

# %% [markdown]
# ## First case: one entry dominates
#
# A row of four logits, whose first has the probability $1 - 2 \cdot 10^{-7}$, and its
# cotangent:

# %%
x = np.float32([16, 0, -1, -1])
g = np.float32([0.7, -0.5, 0.1, 1.3])
p, r = exact_parts(x, g)
mean = np.sum(p * r)  # of g less g[0]; the exact D is g[0] + mean

print(f"1 - P[0]           {p[1:].sum():.4e}")
print(f"g[0]               {g[0]:.10f}")
print(f"exact D            {g[0] + mean:.10f}")
print(f"exact g[0] - D     {-mean:.4e}")
print(f"float32 about g[0] come in steps of {np.spacing(g[0]):.4e}")

# %% [markdown]
# $D$ is nearly $g_0$: it differs in the seventh digit, by 2.3 steps of float32. A $D$
# in float32 is a whole number of steps away, so $g_0 - D$ can be 1.2e-07 or 1.8e-07,
# but not 1.35e-07. Rounded $P$ and sums can cost another step. All these errors are
# small beside $D$, and as large as what the subtraction leaves.
#
# The other entries have an accurate $g_i - D$ and a tiny $P_i$: their gradients are as
# small as that of the first, which is their sum with the other sign. So the whole row
# has small gradients, and the error of its first entry is an error of the row.
#
# ### The way out: first take out what the cotangent is at the largest P
#
# The oracle's constant serves in float32 as well. $r_k$ is exactly 0, the sum has small
# terms alone, and nothing is left to cancel:
#
# $$r = dP - dP_k, \qquad D = \sum P \circ r \,\Big/ \sum P, \qquad
# dS = P \circ (r - D).$$
#
# It is one pass over the row, as the plain formula is. The division is for a $P$ that
# was rounded to 16 bits, which sums to 1 only within 2e-3. In NumPy's float32:


# %%
def compare_centers(x, g):
    want, p = exact_gradient(x, g), np.asarray(jaxsoftmax.softmax(x))
    lines = [
        "taken out first                D   gradient at entry 0   error of the row"
    ]
    centers = {"nothing": np.float32(0), "g at the largest P": g[p.argmax()]}
    for name, center in centers.items():
        r = g - center
        mean = np.sum(p * r, dtype=np.float32) / np.sum(p, dtype=np.float32)
        dx = p * (r - mean)
        error = np.abs(dx - want).max() / np.abs(want).max()
        lines.append(f"{name:18} {mean:15.8e} {dx[0]:19.8e} {error:18.1e}")
    print(*lines, f"exact {want[0]:48.8e}", sep="\n")


compare_centers(x, g)

# %% [markdown]
# With nothing taken out it is the plain formula: its gradient is a step of float32 or
# two, and wrong by half of itself. `jaxsoftmax.softmax` takes out what the cotangent is
# at the largest P on every platform, in kernels and where devices share rows:
# [Derivatives](../docs/derivatives.md#what-is-done-instead).

# %% [markdown]
# ## Second case: the cotangent has an offset
#
# The Jacobian maps constants to 0: only how the cotangents differ matters. But $D$ is
# rounded relative to their size.

# %%
g = 1000 + np.float32([0.25, -0.5, 1])
print(f"float32 about g[0] come in steps of {np.spacing(g[0]):.4e}\n")
compare_centers(np.float32([1, 2, 3]), g)

# %% [markdown]
# ## Four contenders

# %%
PLAIN, NN, FLAG, OURS = (
    "P (dP - D) in jax.numpy",
    "jax.nn",
    "jax.nn, custom_jvp",
    "jaxsoftmax",
)
STYLES = {
    OURS: {"color": "#f2a900", "linewidth": 4.0},
    PLAIN: {"color": "#9a9a9a", "linewidth": 3.0},
    NN: {"color": "#1b3a6b", "linewidth": 1.6},
    FLAG: {"color": "#c0504d", "linewidth": 1.2, "linestyle": "--"},
}


@jax.jit
def plain_gradient(x, g):
    e = jnp.exp(x - jnp.max(x, axis=-1, keepdims=True))
    p = e / jnp.sum(e, axis=-1, keepdims=True)
    return p * (g - jnp.sum(p * g, axis=-1, keepdims=True))


def gradient_of(f):
    return jax.jit(lambda x, g: jax.vjp(f, x)[1](g)[0])


def flagged_softmax(x):
    """With the flag on while it is traced; it is off by default."""
    before = jax.config.jax_softmax_custom_jvp
    jax.config.update("jax_softmax_custom_jvp", True)
    try:
        return jax.nn.softmax(x)
    finally:
        jax.config.update("jax_softmax_custom_jvp", before)


CONTENDERS = {
    PLAIN: plain_gradient,
    NN: gradient_of(jax.nn.softmax),
    FLAG: gradient_of(flagged_softmax),
    OURS: gradient_of(jaxsoftmax.softmax),
}

# %% [markdown]
# The inputs are 512 rows of 128. Logits are Gaussian times a *scale*; cotangents are
# Gaussian about an *offset*. Their standard deviation is 1, or four times eps times the
# offset where that is more: what the dtype of the cotangent rounds off is lost before
# any softmax sees it, and is not the subject here. (In bfloat16 eps is 0.0078, so from
# an offset of 32 on the spread grows with the offset.)
#
# Rows whose exact gradient is too small for the dtype are not counted: below the
# smallest normal number over eps and, in bfloat16, below 1e-9 of the cotangents, which
# a $P$ of 16 bits does not resolve.

# %%
ROWS, COLUMNS = 512, 128


def inputs(dtype, scale, offset):
    rng = np.random.default_rng(0)
    x, g = rng.normal(size=(2, ROWS, COLUMNS))
    spread = max(1, 4 * float(jnp.finfo(dtype).eps) * offset)
    return jnp.asarray(scale * x, dtype), jnp.asarray(offset + spread * g, dtype)


def counted(want, g):
    """Which rows of the exact gradient the dtype of `g` can hold."""
    info = jnp.finfo(g.dtype)
    smallest = float(info.tiny) / float(info.eps)
    if info.bits == 16:
        smallest = max(smallest, 1e-9 * np.abs(float64(g)).max())
    return np.abs(want).max(axis=-1) >= smallest


def row_errors(gradient, x, g):
    want = exact_gradient(x, g)
    rows = counted(want, g)
    error = np.abs(float64(gradient(x, g)) - want).max(axis=-1)
    return error[rows] / np.abs(want).max(axis=-1)[rows]


# %% [markdown]
# ## All rows, sorted
#
# Three draws in float32. In the first, nothing dominates and nothing is added.

# %%
CASES = {
    "plain Gaussian": (1, 0),
    "logits of scale 20": (20, 0),
    "cotangents about 1000": (1, 1000),
}
found = {
    case: {
        name: row_errors(f, *inputs(jnp.float32, *of)) for name, f in CONTENDERS.items()
    }
    for case, of in CASES.items()
}

figure, panels = plt.subplots(1, 3, figsize=(11, 4), sharey=True, layout="constrained")
for axes, (case, errors) in zip(panels, found.items(), strict=True):
    for name, style in STYLES.items():
        rank = 100 * (np.arange(len(errors[name])) + 0.5) / len(errors[name])
        axes.plot(rank, np.sort(errors[name]), label=name, **style)
    axes.set(title=case, xlabel="rows, sorted by error (%)", yscale="log")
    axes.axhline(1, color="gray", linewidth=1, linestyle=":")
    axes.grid(alpha=0.3)
panels[0].set_ylabel("error of the row, float32")
panels[0].annotate("as large as the gradient", (2, 1.4), color="gray")
panels[0].legend(loc="center left")
plt.show()

lines = [[f"{'worst row':>25}", *(f"{case:>22}" for case in CASES)]]
for name in CONTENDERS:
    worst = (f"{found[case][name].max():22.1e}" for case in CASES)
    lines.append([f"{name:>25}", *worst])
print("\n".join(map(" ".join, lines)))

# %% [markdown]
# **For plain Gaussian rows the errors are equal**: all four are within a few roundings
# of float32, and there is nothing to gain. With logits of scale 20 the plain formula
# has lost everything in its worst rows, and nothing in its best: it depends on the row.
# With an offset, no row is spared.

# %%
EPS = {dtype: float(jnp.finfo(dtype).eps) for dtype in (jnp.float32, jnp.bfloat16)}
gaussian = found["plain Gaussian"].values()
assert max(errors.max() for errors in gaussian) < 8 * EPS[jnp.float32]
assert max(errors[OURS].max() for errors in found.values()) < 8 * EPS[jnp.float32]

# %% [markdown]
# ## Error against the scale of the logits
#
# Solid, or long dashes: the worst of the 512 rows. Dotted, in the same colour: the
# median row.

# %%
SCALES = [1, 2, 3, 5, 8, 13, 20, 35, 60]
OFFSETS = [0, 1, 10, 100, 1e3, 1e4, 1e5]


def sweep(points):
    """Row errors, worst and median, of every contender at (scale, offset) pairs."""
    result = {}
    for dtype in EPS:
        for name, f in CONTENDERS.items():
            errors = [row_errors(f, *inputs(dtype, *point)) for point in points]
            result[dtype, name] = np.array([(e.max(), np.median(e)) for e in errors])
    return result


def draw(found, at, xlabel):
    """Two panels, with the places `at` at equal distances."""
    _, panels = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for axes, dtype in zip(panels, EPS, strict=True):
        for name, style in STYLES.items():
            worst, median = found[dtype, name].T
            axes.plot(worst, label=name, **style)
            axes.plot(median, **(style | {"linestyle": ":"}))
        axes.set(title=jnp.dtype(dtype).name, xlabel=xlabel, yscale="log")
        axes.set_xticks(range(len(at)), [f"{x:,.0f}" for x in at])
        axes.axhline(1, color="gray", linewidth=1, linestyle=":")
        axes.axhline(EPS[dtype], color="gray", linewidth=1, linestyle="-.", label="eps")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("error of the row")
    panels[1].legend(loc="lower center")
    plt.show()


scale_errors = sweep([(scale, 0) for scale in SCALES])
draw(scale_errors, SCALES, "scale of the logits")

# %% [markdown]
# In float32 the worst of 512 rows is lost from a scale of 8 on, in bfloat16 from about
# 4. The median row of jax.nn keeps its digits longer: in float32 it has one left at 60,
# in bfloat16 it has lost the first at 20. The flag `jax_softmax_custom_jvp` changes
# what is kept, not this: its rule is the plain formula.
#
# ## Error against the offset of the cotangents

# %%
offset_errors = sweep([(1, offset) for offset in OFFSETS])
draw(offset_errors, OFFSETS, "offset of the cotangents")

for found in (scale_errors, offset_errors):
    for dtype, eps in EPS.items():
        assert found[dtype, OURS].max() < 8 * eps

# %% [markdown]
# In float32 the error grows with the offset: in the median row it is about a third of
# eps times the offset over the spread, in the worst a few times that product. In
# bfloat16 it does so up to 32, where the spread begins to grow with the offset; an
# offset of 10 takes the first digit of the worst row, and the plain formula does
# somewhat better than jax.nn.
#
# ## Why: the error is eps over what is left
#
# Every dot is a row of the draw with scale 20. If the largest probability is $1 - q$,
# the gradient of the row is about $q$ times the cotangents, and the rounding error of
# $D$ about eps times the cotangents: the line is eps over $q$.

# %%
figure, panels = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
for axes, dtype in zip(panels, EPS, strict=True):
    x, g = inputs(dtype, 20, 0)
    p, _ = exact_parts(x, g)
    rest = np.sort(p, axis=-1)[:, :-1].sum(axis=-1)[counted(exact_gradient(x, g), g)]
    for name in (NN, OURS):
        color = STYLES[name]["color"]
        axes.scatter(rest, row_errors(CONTENDERS[name], x, g), 9, color, label=name)
    line = np.array([rest.min(), rest.max()])
    axes.plot(line, EPS[dtype] / line, color="gray", linewidth=1, label="eps / q")
    axes.set(
        title=jnp.dtype(dtype).name, xlabel="q = 1 - largest probability of the row"
    )
    axes.set(xscale="log", yscale="log", ylim=(1e-8, 1e3))
    axes.grid(alpha=0.3)
panels[0].set_ylabel("error of the row")
panels[0].legend(loc="upper right")
plt.show()

# %% [markdown]
# Towards the left the error of jax.nn follows the line up to about 1, and stays there:
# the gradient of the entry that dominates came out as 0. The error of jaxsoftmax does
# not depend on $q$.
#
# ## The same in cross-entropy
#
# The gradient of a cross-entropy is $P - \mathrm{onehot}$: at the label, $-(1 - P_y)$.
# The surer the model, the closer $P_y$ is to 1. Here are rows of 128 logits, all 0 but
# the label's, which is the *margin*; the exact $1 - P_y$ is $1 / (1 + e^m / 127)$.
#
# jaxsoftmax does not subtract $P_y$ from 1. In `log_softmax` it is the sum of the other
# entries; in cross-entropy the gradient at the label is `expm1(-loss)`, with a loss
# that is $\log(1 + \text{rest})$ by `log1p`.

# %%
MARGINS = np.arange(0, 40.5, 0.5)
LABEL = jnp.zeros(len(MARGINS), jnp.int32)
LOSSES = {
    "optax": optax.softmax_cross_entropy_with_integer_labels,
    "jaxsoftmax": jaxsoftmax.softmax_cross_entropy_with_integer_labels,
}


@functools.partial(jax.jit, static_argnums=0)
def loss_and_gradient(loss, logits):
    """The loss of every row, and minus its gradient at the label."""
    losses, pull = jax.vjp(lambda logits: loss(logits, LABEL), logits)
    return losses, pull(-jnp.ones_like(losses))[0][:, 0]


def margin_losses(dtype):
    logits = jnp.zeros((len(MARGINS), COLUMNS), dtype)
    logits = logits.at[:, 0].set(MARGINS.astype(dtype))
    return {name: loss_and_gradient(f, logits) for name, f in LOSSES.items()}


confident = {dtype: margin_losses(dtype) for dtype in EPS}
rest = 127 * np.exp(-MARGINS)
exact_loss, exact_at_label = np.log1p(rest), rest / (1 + rest)

figure, panels = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
styles = {"jaxsoftmax": STYLES[OURS], "optax": STYLES[NN] | {"marker": "."}}
for axes, (dtype, of) in zip(panels, confident.items(), strict=True):
    for name, style in styles.items():
        values = float64(of[name][1])
        values[values == 0] = np.nan  # a logarithmic axis has no 0
        axes.plot(MARGINS, values, label=name, **style)
    style = {"color": "black", "linewidth": 1, "linestyle": ":"}
    axes.plot(MARGINS, exact_at_label, label="exact", **style)
    lost = MARGINS[np.argmax(float64(of["optax"][1]) == 0)]
    axes.axvline(lost, color="gray", linewidth=1)
    axes.annotate(f" optax: 0 from {lost:g} on", (lost, 0.1), color="gray")
    axes.set(
        title=jnp.dtype(dtype).name, xlabel="margin of the label's logit", yscale="log"
    )
    axes.grid(alpha=0.3)
panels[0].set_ylabel("1 - P at the label,\nminus the gradient there")
panels[0].legend(loc="lower left")
plt.show()

# %% [markdown]
# With numbers, in float32. The loss is lost with its gradient: `lse - logit` is a
# difference of two numbers of the size of the margin.

# %%
columns = f"{'exact':>12}{'optax':>12}{'jaxsoftmax':>12}"
lines = [f"margin{'loss':>12}{'1 - P at the label':>42}", " " * 6 + 2 * columns]
losses, gradients = zip(*confident[jnp.float32].values(), strict=True)
for m in (10, 15, 18, 20, 30):
    i = int(np.argmax(m == MARGINS))
    cells = (column[i] for column in (exact_loss, *losses, exact_at_label, *gradients))
    lines.append(f"{m:6}" + "".join(f"{cell:12.3e}" for cell in cells))
print("\n".join(lines))

ours = float64(confident[jnp.float32]["jaxsoftmax"][1])
worst = np.abs(ours / exact_at_label - 1).max()
print(f"\nlargest relative error of jaxsoftmax in the gradient: {worst:.1e}")
assert worst < 8 * EPS[jnp.float32]

# %% [markdown]
# `log_softmax` has the same loss and, for a cotangent that is 1 at the label, the same
# gradient. At a margin of 30:

# %%
row = jnp.zeros(COLUMNS).at[0].set(30)
for name, f in {NN: jax.nn.log_softmax, OURS: jaxsoftmax.log_softmax}.items():
    value, gradient = jax.value_and_grad(lambda row, f=f: f(row)[0])(row)
    print(f"{name:>10}: log P {value:11.4e}, gradient {gradient[0]:.4e}")
assert abs(gradient[0] / exact_at_label[MARGINS == 30][0] - 1) < 8 * EPS[jnp.float32]

# %% [markdown]
# ## In attention
#
# The cotangent of the weights is $dO \, V^T$. An offset in the values $V$ is an offset
# in each row of it: the sum of $dO$ times the offset. Here 4 sequences of 128
# positions, 2 heads of depth 64, Gaussian inputs, and a number added to all values;
# with queries times 4 the weights are uneven. Errors are those of the gradient of
# `query`, in rows of 64, against NumPy in float64: the worst of 1024 rows and, dotted,
# the median. The third contender is `jaxsoftmax.softmax` between two matrix products,
# which stores all weights.

# %%
BATCH, LENGTH, HEADS, DEPTH = 4, 128, 2, 64
BETWEEN = "jaxsoftmax.softmax between products"


def between_products(q, k, v):
    logits = jnp.einsum("btnh,bsnh->bnts", q, k) / DEPTH**0.5
    return jnp.einsum("bnts,bsnh->btnh", jaxsoftmax.softmax(logits), v)


ATTENTIONS = {
    NN: jax.nn.dot_product_attention,
    OURS: jaxsoftmax.dot_product_attention,
    BETWEEN: between_products,
}
VALUE_OFFSETS = [0, 1, 3, 10, 30, 100, 300]


def exact_query_gradient(q, k, v, d_out):
    q, k, v, d_out = map(float64, (q, k, v, d_out))
    logits = np.einsum("btnh,bsnh->bnts", q, k) / DEPTH**0.5
    cotangent = np.einsum("btnh,bsnh->bnts", d_out, v)
    ds = exact_gradient(logits, cotangent) / DEPTH**0.5
    return np.einsum("bnts,bsnh->btnh", ds, k)


@functools.partial(jax.jit, static_argnums=0)
def query_gradient(attention, q, k, v, d_out):
    return jax.vjp(lambda q: attention(q, k, v), q)[1](d_out)[0]


def attention_errors(dtype, factor, offset):
    """Row errors of the gradient of `query`, worst and median, by contender."""
    rng = np.random.default_rng(0)
    q, k, v, d_out = rng.normal(size=(4, BATCH, LENGTH, HEADS, DEPTH))
    arrays = [jnp.asarray(x, dtype) for x in (factor * q, k, offset + v, d_out)]
    want = exact_query_gradient(*arrays)
    for name, attention in ATTENTIONS.items():
        error = np.abs(float64(query_gradient(attention, *arrays)) - want).max(axis=-1)
        error /= np.abs(want).max(axis=-1)
        yield name, (error.max(), np.median(error))


attention_found = {}
styles = {name: STYLES[name] for name in (NN, OURS)}
styles[BETWEEN] = {"color": "#4f8a3d", "linewidth": 1.6, "linestyle": "--"}
figure, panels = plt.subplots(
    2, 2, figsize=(10, 7), sharex=True, sharey=True, layout="constrained"
)
for row, dtype in zip(panels, reversed(EPS), strict=True):
    for axes, factor in zip(row, (1, 4), strict=True):
        errors = [dict(attention_errors(dtype, factor, o)) for o in VALUE_OFFSETS]
        for name, style in styles.items():
            found_errors = np.array([found[name] for found in errors])
            attention_found[dtype, factor, name] = found_errors
            axes.plot(found_errors[:, 0], label=name, **style)
            axes.plot(found_errors[:, 1], **(style | {"linestyle": ":"}))
        queries = "Gaussian queries" if factor == 1 else f"queries times {factor}"
        axes.set(title=f"{jnp.dtype(dtype).name}, {queries}", yscale="log")
        axes.set_xticks(range(len(VALUE_OFFSETS)), VALUE_OFFSETS)
        axes.grid(alpha=0.3)
for axes in panels[:, 0]:
    axes.set_ylabel("row error, gradient of query")
for axes in panels[1]:
    axes.set_xlabel("offset of the values")
panels[0, 0].legend(loc="lower left")
plt.show()
assert attention_found[jnp.bfloat16, 1, OURS].max() < 2 * EPS[jnp.bfloat16]

# %% [markdown]
# **In bfloat16** the worst row of jax.nn has lost its first digit at an offset of 10,
# the median row at 100; with uneven weights the worst of 1024 has errors of 0.2 to 17
# from there on. All rows of jaxsoftmax stay below one eps (0.0078), in every case: its
# D is the mean of the product $dO \, V^T$ itself, about what that is at the largest
# weight. (A kernel of a GPU takes $D = \sum dO \circ O$, with the digits that $O$
# was kept with.) A softmax between two products does not help here: the product is
# rounded to bfloat16 before the softmax sees it.
#
# **In float32** the mean of the values of a head is taken out of them first, so that
# the product has the digits of what is left. The worst row of jaxsoftmax has errors of
# 1e-6, with uneven weights of 7e-6, at any offset; that of jax.nn 4e-4 and 0.5 at an
# offset of 300. [Attention](../docs/attention.md) has more figures.

# %% [markdown]
# ## Row by row, or all together?
#
# A row that one entry dominates has a small gradient, and so a small error in absolute
# terms. Where the gradients of many rows are summed, as for a weight matrix, the rows
# that nothing dominates outweigh it. The error of the array as a whole, the norm of the
# error over the norm of the gradient, says how much is left of the problem:

# %%
TABLE = {
    "plain Gaussian": (1, 0),
    "scale 20": (20, 0),
    "offset 1000": (1, 1000),
    "both": (20, 1000),
    "offset 10": (1, 10),
}


def whole_error(gradient, x, g):
    want = exact_gradient(x, g)
    return np.linalg.norm(float64(gradient(x, g)) - want) / np.linalg.norm(want)


columns = f"{'jax.nn':>12}{'jaxsoftmax':>12}"
lines = [f"{'worst row':>37}{'whole array':>26}", " " * 26 + 2 * columns]
for dtype in EPS:
    for case, of in TABLE.items():
        x, g = inputs(dtype, *of)
        worst = [row_errors(CONTENDERS[name], x, g).max() for name in (NN, OURS)]
        whole = [whole_error(CONTENDERS[name], x, g) for name in (NN, OURS)]
        numbers = "".join(f"{number:12.1e}" for number in (*worst, *whole))
        lines.append(f"{jnp.dtype(dtype).name + ', ' + case:<26}{numbers}")
print("\n".join(lines))

# %% [markdown]
# ## When does it matter to you?
#
# It does **not** where all of these hold: the dtype is float32; the cotangents are
# spread about 0; and either no entry dominates its row, or only sums over many rows are
# used. Without an offset, the error of the whole array is within a factor of five of
# ours in float32, and a row whose largest probability is 0.999 has about four digits.
#
# It does where one of these holds:
#
# - **The cotangents have an offset.** Every row is hit, and so is the whole array, by
#   about eps times offset over spread: above, 7e-5 at 1000 in float32, and 0.05 at 10
#   in bfloat16. Values of attention with a common part give such cotangents, and so
#   does an expected reward $\sum P \circ R$ whose rewards have a large mean.
# - **The dtype is bfloat16, and rows are confident.** Even the whole array is then off
#   by 1.5e-2, against 2.1e-3.
# - **Small gradients are used for themselves.** All rows are confident, as late in
#   training; rows are normalised or weighted one by one; or the optimizer divides by
#   the size of the gradients, as Adam does. A label with a margin of 30 has a gradient
#   of 1.2e-11, and not 0.
# - **Gradients are checked row by row**, against finite differences in float64 for
#   instance.
#
# The rule of thumb for a row: eps over $1 - P_{max}$, or eps times offset over spread.
#
# ### What it costs
#
# Time on two cores of an AMD EPYC, against jax.nn, from
# [cpu_softmax.md](../docs/cpu_softmax.md) (jax 0.12.0.1; below 1 is faster):
#
# | program | float32 | bfloat16 |
# | --- | --- | --- |
# | forward | 0.99 - 1.08 | 0.96 - 1.71 |
# | vjp alone | 1.12 - 1.89 | 0.51 - 0.73 |
# | gradient of `softmax(q k^T) v` | 0.90 - 0.97 | 0.93 - 1.00 |
# | gradient of `sum(softmax(x) * w)`, one program | 1.52 - 2.28 | 0.67 - 1.19 |
#
# The last line is the worst case: a softmax with nothing around it. There XLA
# recomputes what jax.nn needs instead of storing it. The memory is in
# [identity.ipynb](identity.ipynb).
#
# On a GPU both XLA and the kernels make one pass over the row of it; XLA makes two
# kernels of the plain formula. From [gpu_forms.md](../docs/gpu_forms.md), on an H200,
# 134 million entries in rows of 128 to 4096: the backward of softmax takes 0.56 - 0.59
# of jax.nn's time with a kernel and 0.60 - 0.80 with `"xla"` in bfloat16, and 0.60 -
# 0.61 and 0.68 - 0.87 in float32.
#
# [The comparison](../docs/compare_with_jax_nn.md) has the errors for more shapes and
# dtypes.
