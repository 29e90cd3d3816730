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
# # jit, vmap, jvp, hessian: every transform
#
# After this notebook you will be able to
#
# - use `softmax`, the losses and attention under `jit`, `vmap` and `scan`, with masks
#   that are mapped or shared;
# - take derivatives in every mode (`grad`, `jvp`, `jacfwd`, `jacrev`, `hessian`,
#   `linearize`), and check them against the plain formula in float64;
# - find the largest curvature of a loss, and train with Newton's method, by
#   Hessian-vector products that never form the Hessian;
# - say what is kept for the backward, and choose what `jax.checkpoint` keeps;
# - explain why a `jax.custom_vjp` alone would not do.
#
# It runs in about a minute on two CPU cores, and needs
# `pip install "jaxsoftmax[examples]"`. The data are scikit-learn's digits, which come
# with the package.

# %%
import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits

import jaxsoftmax
from jaxsoftmax import dot_product_attention, softmax

jax.config.update("jax_enable_x64", True)  # for the comparisons in float64
EPS = float(jnp.finfo(jnp.float32).eps)
OURS, JAX_NN, GRAY = "#f2a900", "#1b3a6b", "gray"  # colours
rng = np.random.default_rng(0)


def normal(*shape, dtype=np.float32):
    return jnp.asarray(rng.normal(size=shape), dtype)


print(f"jax {jax.__version__} on {jax.default_backend()}")

# %% [markdown]
# All comparisons are of this kind: the largest difference, relative to the largest
# entry of what is expected, has to stay below a tolerance, 20 eps of float32 unless
# something else is said.


# %%
def difference(found, expected):
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    assert found.shape == expected.shape
    return np.abs(found - expected).max() / np.abs(expected).max()


def check(what, found, expected, tolerance=20 * EPS):
    apart = difference(found, expected)
    print(f"{what}: relative difference {apart:.0e}")
    assert apart < tolerance


# %% [markdown]
# ## jit: one trace for equal shapes
#
# Python runs only while a function is traced, so a side effect counts the traces. The
# masks and scales that are arrays may change their values without a new trace.

# %%
traces = []


@jax.jit
def probabilities(x, mask, scale):
    traces.append(x.shape)
    return softmax(x, where=mask, scale=scale)


for length, scale in ((8, 1.0), (8, 0.5), (6, 1.0), (8, 2.0)):
    mask = jnp.asarray(rng.random(length) < 0.7)
    probabilities(normal(4, length), mask, jnp.float32(scale))
print("traces of 4 calls:", traces)
assert traces == [(4, 8), (4, 6)]

# %% [markdown]
# ## vmap: over rows, masks, and twice over attention
#
# `vmap` over rows is the same as the batch dimensions that every function takes:

# %%
x = normal(5, 8)
masks = jnp.asarray(rng.random((5, 8)) < 0.7).at[:, 0].set(True)


def masked(x, mask):
    return softmax(x, where=mask)


check("rows", jax.vmap(softmax)(x), softmax(x))
for what, in_axes, arguments in (
    ("rows, one mask for all", (0, None), (x, masks[0])),
    ("one row, a mask each", (None, 0), (x[0], masks)),
    ("rows and masks", (0, 0), (x, masks)),
    ("columns and masks", (1, None), (x.T, masks[0])),
):
    mapped = jax.vmap(masked, in_axes)(*arguments)
    rows = arguments[0].T if in_axes[0] == 1 else arguments[0]
    check(what, mapped, masked(jnp.broadcast_to(rows, x.shape), arguments[1]))

# %% [markdown]
# Attention twice: 3 sequences, and for each of them 4 sets of queries that read the
# same keys and values. The inner `vmap` maps queries only, so that keys are not copied;
# the mask belongs to the sequence.

# %%
query, key, value = normal(3, 4, 6, 2, 8), normal(3, 7, 2, 8), normal(3, 7, 2, 8)
allowed = jnp.asarray(rng.random((3, 1, 1, 7)) < 0.7).at[..., 0].set(True)


def attend(query, key, value, mask):  # [T, N, H], [S, N, H], [S, N, H], [1, 1, S]
    return dot_product_attention(query, key, value, mask=mask)


shared_keys = jax.vmap(attend, in_axes=(0, None, None, None))
nested = jax.vmap(shared_keys)(query, key, value, allowed)
one_by_one = np.stack(
    [
        [attend(q, key[i], value[i], allowed[i]) for q in query[i]]
        for i in range(len(query))
    ]
)
print("queries", query.shape, "keys", key.shape, "result", nested.shape)
check("nested vmap of attention", nested, one_by_one)

# %% [markdown]
# ## Every mode of differentiation
#
# Four functions of a matrix of 4 rows in float32, and next to each the plain formula,
# which needs no care with numbers of this size. Each is compared with what JAX derives
# from the formula in float64. The tolerance is 1e-5.

# %%
labels = jnp.array([0, 2, 1, 1])
present = jnp.array([True, True, True, False, True])


def plain_softmax(x):
    powers = jnp.where(present, jnp.exp(x), 0)
    return powers / jnp.sum(powers, axis=-1, keepdims=True)


def plain_log_softmax(x):
    return x - jnp.log(jnp.sum(jnp.exp(x), axis=-1, keepdims=True))


def plain_loss(x):
    return -jnp.mean(plain_log_softmax(x)[jnp.arange(len(labels)), labels])


def plain_attention(x):  # self-attention, one head, causal
    powers = jnp.tril(jnp.exp(x @ x.T / np.sqrt(x.shape[-1])))
    return powers / jnp.sum(powers, axis=-1, keepdims=True) @ x


def our_attention(x):
    heads = x[:, None]  # [T, N, H]
    return dot_product_attention(heads, heads, heads, is_causal=True)[:, 0]


def our_loss(x):
    return jaxsoftmax.softmax_cross_entropy_with_integer_labels(
        x, labels, reduction="mean"
    )


functions = {
    "softmax, where": (lambda x: softmax(x, where=present), plain_softmax),
    "log_softmax": (jaxsoftmax.log_softmax, plain_log_softmax),
    "cross-entropy": (our_loss, plain_loss),
    "attention": (our_attention, plain_attention),
}

# %% [markdown]
# A scalar is made of each by a sum of squares, so that the Hessian has the second
# derivative of the function in it. A Hessian-vector product is `jax.jvp` of `jax.grad`,
# forward over reverse, or the gradient of a product with the gradient.


# %%
def scalar(f):
    return lambda x: jnp.sum(f(x) ** 2)


def reverse_over_reverse(f, x, tangent):
    return jax.grad(lambda x: jnp.vdot(jax.grad(scalar(f))(x), tangent))(x)


MODES = {  # of a function, x and a tangent like x
    "value": lambda f, x, t: f(x),
    "jvp": lambda f, x, t: jax.jvp(f, (x,), (t,))[1],
    "jacfwd": lambda f, x, t: jax.jacfwd(f)(x),
    "jacrev": lambda f, x, t: jax.jacrev(f)(x),
    "grad": lambda f, x, t: jax.grad(scalar(f))(x),
    "hessian": lambda f, x, t: jax.hessian(scalar(f))(x),
    "jvp of grad": lambda f, x, t: jax.jvp(jax.grad(scalar(f)), (x,), (t,))[1],
    "grad of grad": reverse_over_reverse,
}


def in_every_mode(f, *arguments):
    run = jax.jit(lambda x, t: {name: mode(f, x, t) for name, mode in MODES.items()})
    return run(*arguments)


x, tangent = normal(2, 4, 5)
errors = {}
for name, (ours, plain) in functions.items():
    found = in_every_mode(ours, x, tangent)
    expected = in_every_mode(plain, *(y.astype(np.float64) for y in (x, tangent)))
    assert all(y.dtype == np.float32 for y in found.values())
    errors[name] = {mode: difference(found[mode], expected[mode]) for mode in MODES}

print(f"{'':14}", *(f"{name:>14}" for name in functions))
for mode in MODES:
    print(f"{mode:14}", *(f"{errors[name][mode]:14.0e}" for name in functions))
assert max(max(column.values()) for column in errors.values()) < 1e-5

# %% [markdown]
# ## Why a custom_vjp alone would not do
#
# The backward of softmax needs nothing but the result P. `jax.custom_vjp` can say so.
# But it fixes the reverse mode only, and JAX then refuses the forward mode, and with it
# `jacfwd`, `hessian` and `linearize`:


# %%
@jax.custom_vjp
def reverse_only(x):
    return jax.nn.softmax(x)


def forward(x):
    p = jax.nn.softmax(x)
    return p, p


def backward(p, g):
    return (p * (g - jnp.sum(p * g, axis=-1, keepdims=True)),)


reverse_only.defvjp(forward, backward)
row, tangent = normal(5), normal(5)
pull = jax.vjp(reverse_only, row)[1]
check(
    "custom_vjp, reverse mode", pull(tangent)[0], jax.vjp(softmax, row)[1](tangent)[0]
)
try:
    jax.jvp(reverse_only, (row,), (tangent,))
except TypeError as error:
    print("TypeError:", str(error).splitlines()[0])
found = jax.jvp(softmax, (row,), (tangent,))[1]
check("ours, forward mode", found, jax.jvp(jax.nn.softmax, (row,), (tangent,))[1])

# %% [markdown]
# How ours does both with one rule:
# [Derivatives](../docs/derivatives.md#every-mode-from-one-rule).
#
# ## linearize: many tangents, one forward
#
# `jax.linearize` computes P once, and returns a linear function that uses it for any
# number of tangents. With the unit vectors it gives the Jacobian, diag(P) - P P^T.

# %%
p, pushforward = jax.linearize(softmax, row)
jacobian = jax.vmap(pushforward)(jnp.eye(5, dtype=np.float32))
check("Jacobian of five tangents", jacobian, jnp.diag(p) - jnp.outer(p, p))

# %% [markdown]
# ## What jax.vjp keeps
#
# For the backward of `softmax`, P in the dtype of the result; with a mask too. On TPUs
# also 4 bytes per row: which entry is the largest. `jax.nn` keeps more with a mask
# ([Comparison](../docs/compare_with_jax_nn.md)).


# %%
def kept_bytes(f, x):
    return sum(array.nbytes for array in jax.tree.leaves(jax.vjp(f, x)[1]))


wide = normal(64, 1024)
mask = jnp.asarray(rng.random((64, 1024)) < 0.7)
print(f"{'bytes per entry':28}{'softmax':>10}{'jax.nn':>10}")
for what, f, theirs in (
    ("float32", softmax, jax.nn.softmax),
    (
        "float32, where",
        functools.partial(softmax, where=mask),
        functools.partial(jax.nn.softmax, where=mask),
    ),
    (
        "float32, result in bfloat16",
        functools.partial(softmax, dtype=jnp.bfloat16),
        lambda x: jax.nn.softmax(x).astype(jnp.bfloat16),
    ),
):
    kept = [kept_bytes(function, wide) / wide.size for function in (f, theirs)]
    print(f"{what:28}", *(f"{bytes_:9.2f}" for bytes_ in kept))
assert kept[0] == 2

# %% [markdown]
# ## Hessian-vector products: the largest curvature of a loss
#
# Softmax regression on the digits: 64 pixels and a constant, 10 classes, so 650
# parameters, with a small penalty on their squares. The Hessian would be 650 x 650
# numbers. A product with it needs no Hessian, and costs a small multiple of a gradient.

# %%
images, digits = load_digits(return_X_y=True)
pixels = np.concatenate([images / 16, np.ones((len(images), 1))], axis=1)
pixels, digits = jnp.asarray(pixels, np.float32), jnp.asarray(digits)
CLASSES, PENALTY = 10, 1e-3


def regression_loss(cross_entropy, w):
    logits = pixels @ w
    return cross_entropy(logits, digits) + PENALTY / 2 * jnp.sum(w**2)


def jax_nn_cross_entropy(logits, labels):
    log_p = jax.nn.log_softmax(logits)
    return -jnp.mean(jnp.take_along_axis(log_p, labels[:, None], axis=-1))


loss = functools.partial(
    regression_loss,
    functools.partial(
        jaxsoftmax.softmax_cross_entropy_with_integer_labels, reduction="mean"
    ),
)
jax_nn_loss = functools.partial(regression_loss, jax_nn_cross_entropy)


def hvp(loss, w, v):
    return jax.jvp(jax.grad(loss), (w,), (v,))[1]


start = jnp.zeros((pixels.shape[1], CLASSES), np.float32)
for what, f, arguments in (
    ("gradient", jax.grad(loss), (start,)),
    ("product", functools.partial(hvp, loss), (start, start)),
):
    compiled = jax.jit(f).lower(*arguments).compile()
    print(f"{what}: {compiled.cost_analysis()['flops'] / 1e6:.1f} Mflop")

# %% [markdown]
# Power iteration: apply the Hessian again and again, and the vector turns to the
# direction of the largest curvature. As a check, all eigenvalues of the full Hessian.

# %%
ITERATIONS = 60


@functools.partial(jax.jit, static_argnums=0)
def power_iteration(loss, w, v):
    def step(v, _):
        product = hvp(loss, w, v)
        return product / jnp.linalg.norm(product), jnp.vdot(v, product)

    return jax.lax.scan(step, v / jnp.linalg.norm(v), length=ITERATIONS)[1]


curvatures = power_iteration(loss, start, normal(*start.shape))
hessian = jax.jit(jax.hessian(loss))(start).reshape(start.size, start.size)
eigenvalues = np.linalg.eigvalsh(np.asarray(hessian, np.float64))
largest = float(curvatures[-1])
print(f"power iteration: {largest:.6f}")
print(f"all eigenvalues: largest {eigenvalues[-1]:.6f}, smallest {eigenvalues[0]:.6f}")
check("largest curvature", largest, eigenvalues[-1], tolerance=1e-4)

# %% [markdown]
# ## Newton's method by Hessian-vector products
#
# A Newton step solves H d = -gradient. Conjugate gradients do it with products alone,
# 20 for each step here. Gradient descent gets the step length 1 / (largest curvature),
# which the last section has found. Both are counted by the gradients and products that
# they compute, though a product costs more than a gradient, as printed above. Newton's
# method runs with our loss and with one of `jax.nn`.

# %%
PRODUCTS = 20
NEWTON_STEPS = 10


@functools.partial(jax.jit, static_argnums=0)
def newton(loss, w):
    def step(w, _):
        gradient = jax.grad(loss)(w)
        direction, _ = jax.scipy.sparse.linalg.cg(
            functools.partial(hvp, loss, w), -gradient, tol=0, maxiter=PRODUCTS
        )
        return w + direction, jnp.linalg.norm(gradient)

    return jax.lax.scan(step, w, length=NEWTON_STEPS)


@functools.partial(jax.jit, static_argnums=0)
def descend(loss, w):
    def step(w, _):
        gradient = jax.grad(loss)(w)
        return w - gradient / largest, jnp.linalg.norm(gradient)

    return jax.lax.scan(step, w, length=NEWTON_STEPS * (PRODUCTS + 2))


solution, our_norms = newton(loss, start)
jax_nn_solution, jax_nn_norms = newton(jax_nn_loss, start)
descended, descent_norms = descend(loss, start)
print(f"loss, Newton {loss(solution):.5f}, gradient descent {loss(descended):.5f}")
print("gradient norms, ours:  ", *(f"{norm:.1e}" for norm in our_norms))
print("gradient norms, jax.nn:", *(f"{norm:.1e}" for norm in jax_nn_norms))
check("solution, ours and jax.nn", solution, jax_nn_solution, tolerance=1e-3)

# %%
figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
# cg computes one product more, for the residual at its start.
computed = np.arange(NEWTON_STEPS) * (PRODUCTS + 2)
axes.plot(
    descent_norms, color=GRAY, linewidth=1.5, label="gradient descent, jaxsoftmax"
)
axes.plot(
    computed, our_norms, "o-", color=OURS, linewidth=4, label="Newton, jaxsoftmax"
)
axes.plot(
    computed, jax_nn_norms, "--", color=JAX_NN, linewidth=1.2, label="Newton, jax.nn"
)
axes.set(
    title="Softmax regression on the digits, 650 parameters, float32",
    xlabel="gradients and Hessian-vector products computed",
    ylabel="norm of the gradient",
    yscale="log",
)
axes.grid(alpha=0.3)
axes.legend()
plt.show()

# %% [markdown]
# ## scan over layers
#
# With the weights of all layers in one array, `jax.lax.scan` traces and compiles one
# layer. Value, gradient and Hessian-vector product are those of the loop in Python.

# %%
LAYERS, LENGTH, HEADS, DEPTH = 3, 256, 4, 16
WIDTH = HEADS * DEPTH
weights = normal(LAYERS, 4, WIDTH, WIDTH) / (2 * WIDTH**0.5)
x, tangent = normal(LENGTH, WIDTH), normal(*weights.shape)


def layer(x, weights):  # [LENGTH, WIDTH], [4, WIDTH, WIDTH]
    heads = (x @ weights[:3]).reshape(3, LENGTH, HEADS, DEPTH)
    attended = dot_product_attention(*heads, is_causal=True)
    return x + attended.reshape(LENGTH, WIDTH) @ weights[3]


def by_scan(layer, weights):
    return jax.lax.scan(lambda x, w: (layer(x, w), None), x, weights)[0]


def by_loop(layer, weights):
    return functools.reduce(layer, weights, x)


def mean_square(layers, layer, weights):
    return jnp.mean(layers(layer, weights) ** 2)


def counted(traces):
    def run(x, weights):
        traces.append(x.shape)
        return layer(x, weights)

    return run


results = []
for layers in (by_scan, by_loop):
    traces = []
    f = jax.value_and_grad(functools.partial(mean_square, layers, counted(traces)))
    product = jax.jit(lambda w, t, f=f: jax.jvp(f, (w,), (t,)))
    (value, gradient), (_, hessian_product) = product(weights, tangent)
    results.append((value, gradient, hessian_product))
    print(f"{layers.__name__}, {LAYERS} layers: traced {len(traces)}x")
for what, *pair in zip(("value", "gradient", "product"), *results, strict=True):
    check(what, *pair)

# %% [markdown]
# ## jax.checkpoint: what to keep, what to compute again
#
# What attention keeps has a name that the policies of `jax.checkpoint` know,
# `"jaxsoftmax_attention"`: the result and the lse. A policy that saves it keeps these,
# and computes the projections again, but not the attention. `softmax` and
# `log_softmax` have names too
# ([Semantics](../docs/semantics.md#names-for-jaxcheckpoint)).
#
# Here for 32 layers. Counted are the arrays that `jax.vjp` of the scan keeps, the
# weights left out, and what the compiled gradient takes: temporary memory, and floating
# point operations of one layer, forward and backward.

# %%
names = jax.checkpoint_policies.save_only_these_names
# In a scan XLA cannot merge the two computations, so nothing has to prevent it.
checkpoint = functools.partial(jax.checkpoint, prevent_cse=False)
layer_of = {
    "no checkpoint": layer,
    "keep the attention": checkpoint(layer, policy=names("jaxsoftmax_attention")),
    "keep the input": checkpoint(layer),
}
deep = normal(32, 4, WIDTH, WIDTH) / (4 * WIDTH**0.5)
gradients = {}
print(f"{'':20}{'kept, MiB':>12}{'temporary, MiB':>16}{'Mflop':>8}")
for what, one in layer_of.items():
    f = functools.partial(mean_square, by_scan, one)
    kept = kept_bytes(f, deep) - deep.nbytes
    compiled = jax.jit(jax.grad(f)).lower(deep).compile()
    gradients[what] = compiled(deep)
    temporary = compiled.memory_analysis().temp_size_in_bytes
    mflop = compiled.cost_analysis()["flops"] / 1e6
    print(f"{what:20}{kept / 2**20:12.1f}{temporary / 2**20:16.1f}{mflop:8.1f}")
for what, gradient in gradients.items():
    check(what, gradient, gradients["no checkpoint"])

# %% [markdown]
# ## In short
#
# | transform | what to know |
# | --- | --- |
# | `jit` | one trace for each shape and dtype; masks and array scales are data |
# | `vmap` | arrays and masks may each be mapped or shared, also twice |
# | `grad`, `vjp`, `jacrev` | run the declared backward, a kernel on a GPU |
# | `jvp`, `linearize`, `jacfwd` | work, from the same rule |
# | `hessian`, `jvp` of `grad`, `grad` of `grad` | work |
# | `checkpoint` | policies may name what the backward keeps |
# | `scan` | one layer is traced and compiled |
#
# For arrays that many devices share, under `jit` and `shard_map`:
# [Using many devices](../docs/many_devices.md).
