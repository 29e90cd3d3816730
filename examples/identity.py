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
# # The gradient of softmax needs one number per row, not a matrix
#
# After this notebook you will be able to
#
# - derive the gradient $dS = P \circ (dP - D)$, with one number $D$ a row, from the
#   $n \times n$ Jacobian of softmax, and check it;
# - see, without running anything, what a backward keeps and how much temporary memory
#   its compiled gradient takes, for rows of any length;
# - write the backward of `log_softmax`, cross-entropy and attention with the same
#   identity;
# - test a softmax gradient of your own by three properties of the Jacobian.
#
# It runs in less than half a minute on two CPU cores, and needs
# `pip install "jaxsoftmax[examples]"`.

# %%
import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import jaxsoftmax
from jaxsoftmax import naive

print(f"jax {jax.__version__} on {jax.default_backend()}")

# %% [markdown]
# ## The Jacobian of a row
#
# For one row of $n$ logits $S$,
#
# $$P_i = \frac{e^{S_i}}{Z}, \qquad Z = \sum_k e^{S_k}.$$
#
# The derivative of $e^{S_i}$ with respect to $S_j$ is $e^{S_i}$ if $i = j$, and 0
# otherwise; that of $Z$ is $e^{S_j}$. The quotient rule gives
#
# $$\frac{\partial P_i}{\partial S_j}
# = \frac{e^{S_i}}{Z} [i = j] - \frac{e^{S_i}}{Z} \, \frac{e^{S_j}}{Z}
# = P_i [i = j] - P_i P_j,$$
#
# where $[i = j]$ is 1 if $i = j$, and 0 otherwise. As a matrix,
#
# $$J = \operatorname{diag}(P) - P P^T.$$
#
# `naive.softmax_jacobian` is this formula. JAX finds the same matrix by itself: with
# `jax.jacrev` of `naive.softmax`, which is the exponential over its sum and no more.

# %%
p = jnp.array([0.1, 0.5, 0.4])
logits = jnp.log(p)
jacobian = naive.softmax_jacobian(p)
with jnp.printoptions(precision=2):
    print(jacobian)

EPS = float(jnp.finfo(jnp.float32).eps)


def worst_error(got, want):
    """The largest error of a row over the largest entry of that row."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    error = np.abs(got - want).max(axis=-1)
    return (error / np.abs(want).max(axis=-1)).max()


@functools.partial(jax.jit, static_argnums=0)
def pull_back(f, x, cotangent):
    return jax.vjp(f, x)[1](cotangent)[0]


for f in (naive.softmax, jaxsoftmax.softmax):
    assert worst_error(jax.jacrev(f)(logits), jacobian) < 8 * EPS
    assert worst_error(jax.jacfwd(f)(logits), jacobian) < 8 * EPS

# %% [markdown]
# ## From the matrix to one number
#
# Reverse mode does not ask for $J$. It asks for its product with one vector: the
# cotangent $dP$, the gradient of the loss with respect to $P$. Four small steps:
#
# 1. The gradient with respect to $S$ is $dS = J^T dP$.
# 2. $J$ is symmetric, so it is $dS = J \, dP
#    = \operatorname{diag}(P) \, dP - P P^T dP$.
# 3. A diagonal matrix times a vector is a product entry by entry,
#    $\operatorname{diag}(P) \, dP = P \circ dP$. And $P P^T dP = P \, (P^T dP)$: the
#    product in parentheses is one number. Call it
#    $$D = P^T dP = \sum_k P_k \, dP_k.$$
# 4. Take $P$ out of both terms:
#    $$\boxed{dS = P \circ (dP - D)}$$
#
# $D$ is the mean of $dP$ under the probabilities $P$. The gradient is positive where
# $dP$ is above this mean, negative where it is below, and proportional to $P$. No
# matrix is left: the backward needs $P$, $dP$ and a sum.

# %% [markdown]
# ## A worked example
#
# $P = (0.1, 0.5, 0.4)$ and $dP = (a, b, c)$. Then $D = 0.1a + 0.5b + 0.4c$, and the
# first entry is
#
# $$dS_0 = 0.1 \, (a - D) = 0.1a - 0.01a - 0.05b - 0.04c = 0.09a - 0.05b - 0.04c.$$
#
# Its coefficients are the first row of $J$. For the others, let the computer do it:
# both forms are linear in $dP$, so the three unit vectors give all coefficients.


# %%
def with_matrix(p, dp):
    return jnp.einsum("...ij,...i->...j", naive.softmax_jacobian(p), dp)


def with_one_number(p, dp):
    d = jnp.sum(p * dp, axis=-1, keepdims=True)
    return p * (dp - d)


def our_gradient(p, dp):
    return pull_back(jaxsoftmax.softmax, jnp.log(p), dp)


for form in (with_matrix, with_one_number, our_gradient):
    coefficients = jnp.stack([form(p, unit) for unit in jnp.eye(3)], axis=1)
    print(form.__name__)
    for i, row in enumerate(coefficients):
        print(f"  dS[{i}] =", " ".join(map("{:+.2f}{}".format, row, "abc")))
    assert worst_error(coefficients, jacobian) < 8 * EPS

# %% [markdown]
# The same for 256 rows of 128 Gaussian logits. `naive.softmax_vjp` is the textbook form
# with the matrix, for all rows at once: 16 MiB of Jacobians, for 128 KiB of logits.

# %%
s, dp = jax.random.normal(jax.random.key(0), (2, 256, 128))
p = naive.softmax(s)
want = pull_back(naive.softmax, s, dp)
found = {
    "naive.softmax_vjp, with the matrix": naive.softmax_vjp(p, dp),
    "P (dP - D)": with_one_number(p, dp),
    "jax.nn.softmax": pull_back(jax.nn.softmax, s, dp),
    "jaxsoftmax.softmax": pull_back(jaxsoftmax.softmax, s, dp),
}
print("worst difference of a row from jax.vjp of the plain formula:")
for name, got in found.items():
    print(f"  {worst_error(got, want):.1e}  {name}")
    assert worst_error(got, want) < 32 * EPS

# %% [markdown]
# ## Three properties
#
# **Symmetric.** $J_{ij} = -P_i P_j = J_{ji}$ off the diagonal. So the pushforward
# (`jax.jvp`) of a tangent is the pullback (`jax.vjp`) of the same vector, and one
# kernel serves both modes.
#
# **The rows of $J$ sum to zero**: $P_i - P_i \sum_j P_j = 0$. Adding a constant to all
# logits does not change $P$; and, as $J$ is symmetric, adding a constant to all of $dP$
# does not change $dS$.
#
# **The gradient sums to zero**: $\sum_i P_i \, (dP_i - D) = D - D = 0$. Logits can only
# move against each other.
#
# Each holds for any logits and any cotangent, so each is a test that needs no
# reference. A difference counts as zero up to a few roundings of what it was taken of.

# %%
f = jaxsoftmax.softmax
jacobians = jax.jit(jax.vmap(jax.jacrev(f)))(s[:16])
gradient = pull_back(f, s, dp)
pushforward = jax.jit(lambda s, t: jax.jvp(f, (s,), (t,))[1])(s, dp)

OFFSET = 1024
# In steps of 2**-13, so that the offset is added without a rounding error: what that
# would lose is lost before the softmax sees it.
steps = jnp.round(dp * 2**13) / 2**13
moved = pull_back(f, s, steps + OFFSET) - pull_back(f, s, steps)

differences = {
    "J and its transpose": (jacobians - jacobians.mT, jacobians),
    "sums of the rows of J": (jacobians.sum(-1), jacobians),
    "jvp and vjp": (pushforward - gradient, gradient),
    "sums of the gradient": (gradient.sum(-1), gradient),
    f"gradient with {OFFSET} added to dP": (moved, gradient),
}
for name, (difference, of) in differences.items():
    relative = np.abs(difference).max() / np.abs(of).max()
    print(f"{relative:7.1e}  {name}")
    assert relative < 32 * EPS

# %% [markdown]
# In floating point the last one does not come by itself: $D$ is rounded relative to
# the constant, and `P (dP - D)` as it stands loses three digits here.
# [cancellation.ipynb](cancellation.ipynb) is about that.

# %%
plain = with_one_number(p, steps + OFFSET) - with_one_number(p, steps)
for name, difference in (("P (dP - D)", plain), ("jaxsoftmax.softmax", moved)):
    print(f"{np.abs(difference).max() / np.abs(gradient).max():.1e}  {name}")

# %% [markdown]
# ## Memory against the length of a row
#
# Two numbers can be had without running anything.
#
# - **Kept**: what stays in memory from the forward to the backward. `jax.vjp` returns a
#   function whose leaves are these arrays; under `jax.eval_shape` they are shapes.
# - **Temporary**: what XLA reserves besides arguments and result for the forward and
#   the backward compiled into one program: `temp_size_in_bytes`.
#
# There are two ways to have the matrix: make it in the forward and keep it, or keep $P$
# and make it in the backward.


# %%
@jax.custom_vjp
def matrix_kept(x):
    return naive.softmax(x)


def kept_forward(x):
    p = naive.softmax(x)
    return p, naive.softmax_jacobian(p)


def kept_backward(jacobian, dp):
    return (jnp.einsum("...ij,...i->...j", jacobian, dp),)


matrix_kept.defvjp(kept_forward, kept_backward)


@jax.custom_vjp
def matrix_made(x):
    return naive.softmax(x)


def made_forward(x):
    p = naive.softmax(x)
    return p, p


def made_backward(p, dp):
    return (naive.softmax_vjp(p, dp),)


matrix_made.defvjp(made_forward, made_backward)

# %%
ROWS = 64
LENGTHS = [2**k for k in (7, 9, 11, 13, 16)]
KEPT, MADE = "matrix, kept", "matrix, made anew"
NN, OURS = "jax.nn.softmax", "jaxsoftmax.softmax"
contenders = {
    KEPT: matrix_kept,
    MADE: matrix_made,
    OURS: jaxsoftmax.softmax,
    NN: jax.nn.softmax,
}


def kept_bytes(f, x):
    arrays = jax.tree.leaves(jax.eval_shape(lambda x: jax.vjp(f, x)[1], x))
    return sum(array.size * array.dtype.itemsize for array in arrays)


def temporary_bytes(f, x):
    return pull_back.lower(f, x, x).compile().memory_analysis().temp_size_in_bytes


def bytes_a_row(of, name, n, rows=ROWS):
    x = jax.ShapeDtypeStruct((rows, n), jnp.float32)
    return of(contenders[name], x) / rows


kept, temporary = (
    {name: [bytes_a_row(of, name, n) for n in LENGTHS] for name in contenders}
    for of in (kept_bytes, temporary_bytes)
)

for title, bytes_of in (("kept", kept), ("temporary", temporary)):
    print(f"{title}, bytes per row of n")
    print(f"{'n':>7}", *(f"{name:>20}" for name in contenders))
    for i, n in enumerate(LENGTHS):
        print(f"{n:7,}", *(f"{found[i]:20,.0f}" for found in bytes_of.values()))

longest = LENGTHS[-1]
assert kept[OURS][-1] == 4 * longest
assert kept[KEPT][-1] == 4 * longest**2
assert temporary[MADE][-1] >= 4 * longest**2
assert temporary[OURS][-1] <= 9 * longest

# %%
STYLES = {
    KEPT: {"color": "#c0504d", "linewidth": 4.0, "alpha": 0.6},
    MADE: {
        "color": "#7a1f1c",
        "linewidth": 1.6,
        "linestyle": ":",
        "marker": "s",
        "markersize": 9,
        "markerfacecolor": "none",
    },
    OURS: {"color": "#f2a900", "linewidth": 5.0},
    NN: {
        "color": "#1b3a6b",
        "linewidth": 1.4,
        "linestyle": "--",
        "marker": "o",
        "markersize": 4,
    },
}
UNITS = {2**0: "1 B", 2**10: "1 KiB", 2**20: "1 MiB", 2**30: "1 GiB"}

figure, panels = plt.subplots(
    1, 2, figsize=(10, 4.2), sharey=True, layout="constrained"
)
titles = ("Kept for the backward", "Temporary, forward and backward compiled")
for axes, title, bytes_of in zip(panels, titles, (kept, temporary), strict=True):
    for name, style in STYLES.items():
        axes.plot(LENGTHS, bytes_of[name], label=name, **style)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(LENGTHS, [f"{n:,}" for n in LENGTHS])
    axes.set_yticks(list(UNITS), list(UNITS.values()))
    axes.minorticks_off()
    axes.set(title=title, xlabel="n, entries of a row")
    axes.grid(alpha=0.3)
panels[0].set_ylabel("bytes per row (float32)")
panels[0].legend()
plt.show()

# %% [markdown]
# The matrix takes $4n^2$ bytes per row, kept or made anew: 16 GiB for one row of
# 65,536. $P$ takes $4n$: 256 KiB. (On a TPU 4 bytes are kept beside it: which entry of
# the row is the largest.)
#
# `jax.nn.softmax` has no matrix either. It keeps $e^{S - \max}$ and two numbers per
# row, the same $4n$ bytes. Compiled as one program with nothing around it, its gradient
# needs hardly any temporary memory: XLA computes the exponentials again instead of
# storing them. `jaxsoftmax.softmax` stores $P$ there, and on the CPU has room for one
# array more, for a gradient in which NaN is left out where $P$ is 0:

# %%
for name in (NN, OURS):
    alone = bytes_a_row(temporary_bytes, name, longest, rows=1)
    print(f"{name:>18}, one row of {longest:,} alone: {alone:11,.0f} bytes")

# %% [markdown]
# So for a plain softmax there is nothing to gain in memory over jax.nn. With `where`,
# before a product `P @ v`, or with a 16-bit $P$ of float32 logits, jax.nn keeps more:
# [the comparison](../docs/compare_with_jax_nn.md) has all cases.

# %% [markdown]
# ## The same identity elsewhere
#
# Each cell below writes a backward with one number per row, and compares it with JAX's
# own derivative of the plain formula.
#
# ### log_softmax
#
# $Y_i = S_i - \log Z$, so $\partial Y_i / \partial S_j = [i = j] - P_j$, that is
# $J = I - \mathbf{1} P^T$. It is not symmetric: with the transpose,
#
# $$dS = J^T dY = dY - P \, (\mathbf{1}^T dY) = dY - P \sum_k dY_k.$$
#
# The one number is the sum of the cotangent. Kept is what $P$ can be made from: the
# logits, which the caller has anyway, and a number per row.

# %%
dy = dp
gradient = dy - p * jnp.sum(dy, axis=-1, keepdims=True)
for f in (naive.log_softmax, jaxsoftmax.log_softmax):
    assert worst_error(gradient, pull_back(f, s, dy)) < 32 * EPS

# %% [markdown]
# ### Cross-entropy
#
# The loss of a label $y$ is $-Y_y$. Its cotangent $dY$ is $-1$ at $y$ and 0 elsewhere,
# with the sum $-1$, so the formula above becomes
#
# $$dS = P - \mathrm{onehot}(y).$$
#
# The gradient is finished as soon as the forward has $P$. With a reduction,
# `jaxsoftmax.softmax_cross_entropy_with_integer_labels` computes value and gradient in
# one pass and keeps nothing else.

# %%
labels = jax.random.randint(jax.random.key(1), (len(s),), 0, s.shape[-1])


def plain_loss(s):
    return -jnp.sum(naive.log_softmax(s)[jnp.arange(len(s)), labels])


def our_loss(s):
    return jaxsoftmax.softmax_cross_entropy_with_integer_labels(
        s, labels, reduction="sum"
    )


gradient = p - jax.nn.one_hot(labels, s.shape[-1])
for loss in (plain_loss, our_loss):
    assert worst_error(gradient, jax.jit(jax.grad(loss))(s)) < 32 * EPS

# %% [markdown]
# ### Attention
#
# $S = Q K^T / \sqrt{d}$, $P = \operatorname{softmax}(S)$ over each query's row, and
# $O = P V$. Backwards, $dV = P^T dO$ and $dP = dO \, V^T$. What is the $D$ of query
# $i$?
#
# $$D_i = \sum_j P_{ij} \, dP_{ij} = \sum_j P_{ij} \sum_h dO_{ih} V_{jh}
# = \sum_h dO_{ih} \sum_j P_{ij} V_{jh} = \sum_h dO_{ih} \, O_{ih}.$$
#
# The sum over all keys $j$ has become a sum over the depth $h$ of the output. So $D$ is
# known before any row of $P$ is: a backward can make $P$ block by block, from the
# log-sum-exp of each query, use a block and forget it. FlashAttention
# ([arXiv:2205.14135](https://arxiv.org/abs/2205.14135)) is built on this, and so is
# `jaxsoftmax.dot_product_attention`.

# %%
LENGTH, DEPTH = 48, 16
q, k, v, d_out = jax.random.normal(jax.random.key(2), (4, LENGTH, DEPTH))


def plain_attention(q, k, v):
    return naive.softmax(q @ k.T / DEPTH**0.5) @ v


def our_attention(q, k, v):
    heads = (x[None, :, None] for x in (q, k, v))  # [batch, length, heads, depth]
    return jaxsoftmax.dot_product_attention(*heads)[0, :, 0]


def backward(q, k, v, out, d_out):
    p = naive.softmax(q @ k.T / DEPTH**0.5)
    d = jnp.sum(d_out * out, axis=-1, keepdims=True)  # one number per query
    ds = p * (d_out @ v.T - d)
    return ds @ k / DEPTH**0.5, ds.T @ q / DEPTH**0.5, p.T @ d_out


gradients = jax.jit(backward)(q, k, v, plain_attention(q, k, v), d_out)
for f in (plain_attention, our_attention):
    wanted = jax.jit(lambda *args, f=f: jax.vjp(f, *args)[1](d_out))(q, k, v)
    for name, got, want in zip("QKV", gradients, wanted, strict=True):
        print(f"d{name}, {f.__name__}: differs by {worst_error(got, want):.1e}")
        assert worst_error(got, want) < 64 * EPS

# %% [markdown]
# ## In short
#
# | function | backward | one number per row | kept |
# | --- | --- | --- | --- |
# | softmax | $P \circ (dP - D)$ | $D = \sum P \circ dP$ | $P$ |
# | log_softmax | $dY - P \sum dY$ | $\sum dY$ | logits, the row's maximum |
# | cross-entropy, summed | $P - \mathrm{onehot}$ | none | the finished gradient |
# | attention | $P \circ (dO \, V^T - D)$ | $D = \sum dO \circ O$ | $Q, K, V, O$, lse |
#
# The lse of a query is its log-sum-exp, $\log Z$. [Derivatives](../docs/derivatives.md)
# goes on from here: rounding errors, and how every derivative mode follows from one
# rule.
