"""Cross-entropy behind a linear layer: against the oracle and the same on logits.

What is new here is where logits come from, so the bars are those of cross-entropy, of
each entry, and what the products add:

- Of the logits: an error of H + 2 eps of ``|x| |W| + |b|``, as a sum of H products and
  a bias has. What P is wrong by is twice the largest of a row, times the scale.
- Of the gradients: what is wrong in each entry of the logits' gradient, multiplied by
  the size of what it is multiplied by; the root of the number of terms of a sum, in
  eps, as their order is not known; and a rounding to the dtype, or two where a finished
  gradient is multiplied by a scalar.
"""

import functools
import math
import re

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import strategies as st
from loss_cases import (
    EPS,
    TINY,
    amplification,
    assert_within,
    cost_bar,
    covering,
    eps_of,
    name_of,
    quick_jit,
)

from jaxsoftmax import (
    linear_softmax_cross_entropy,
    linear_token_logprobs_and_entropy,
    softmax_cross_entropy_with_integer_labels,
    token_logprobs_and_entropy,
)

CAP = 5.0
TOKENS, HIDDEN, VOCABULARY = (3, 5), 6, 300
HIGHEST = {"precision": "highest"}  # float32 products, on a GPU too


def normal(rng, shape, dtype="float32", scale=1.0):
    return jnp.array(scale * rng.normal(size=shape), dtype)


def labels_of(rng, tokens=TOKENS, vocabulary=VOCABULARY):
    return rng.integers(vocabulary, size=tokens).astype(np.int32)


def least_budget(x, labels, weights, **options):
    """In bytes, as the error says that comes of less."""
    with pytest.raises(ValueError, match="memory_budget=1 ") as error:
        linear_softmax_cross_entropy(x, labels, weights, memory_budget=1, **options)
    return int(re.search(r"at least (\d+) bytes", str(error.value))[1])


def _vjp(f, static, labels, where, floats, g):
    def call(floats):
        rest = dict(floats)
        x, weights = rest.pop("x"), rest.pop("weights")
        return f(x, labels, weights, where=where, **rest, **dict(static))

    y, pull = jax.vjp(call, floats)
    return y, pull(g)[0]


_vjp_quick = quick_jit(_vjp, static_argnames=("f", "static"))


def vjp(floats, labels, g, where=None, f=linear_softmax_cross_entropy, **static):
    """Value, and the cotangent of each float array by its name."""
    static = {**HIGHEST, **static}
    return _vjp_quick(f, tuple(static.items()), labels, where, floats, g)


# --- the options ----------------------------------------------------------------------

FACTORS = {
    "dtype": ("float32", "bfloat16", "float16", "mixed"),
    "vocab_axis": (0, 1),
    "bias": (None, "finite", "-inf"),
    "where": (False, True),
    "ignore_index": (None, -100),
    "label_smoothing": (0.0, 0.1),
    "z_loss": (0.0, 0.01),
    "logit_softcap": (None, CAP),
    "scale": (None, 0.3, -0.7, "one", "each"),
    "class_weights": (False, True),
    "reduction": ("none", "sum", "mean"),
    "return_lse": (False, True),
    "memory_budget": ("default", "least"),
}
# Where nothing is said of it.
PLAIN = {k: v[0] for k, v in FACTORS.items()}


def case_arrays(o, rng, tokens, hidden, vocabulary):
    """The float arrays, labels and mask of a case; tokens of every kind."""
    x = rng.normal(size=(math.prod(tokens), hidden))
    w = rng.normal(size=(hidden, vocabulary))
    labels = rng.integers(vocabulary, size=len(x))
    # Of some tokens the logit of the label is large, and of some that of another class.
    for t in range(0, len(x) - 1, 2):
        v = labels[t] if t % 4 else (labels[t] + 1) % vocabulary
        x[t] = (2 + 2 * t) * w[:, v] / np.square(w[:, v]).sum()
    dtype = "bfloat16" if o["dtype"] == "mixed" else o["dtype"]
    of_weights = "float32" if o["dtype"] == "mixed" else o["dtype"]
    floats = {
        "x": jnp.array(x.reshape(*tokens, hidden), dtype),
        "weights": jnp.array(w if o["vocab_axis"] else w.T, of_weights),
    }
    if o["bias"] is not None:
        b = rng.normal(size=vocabulary)
        if o["bias"] == "-inf" and vocabulary > 1:
            absent = rng.random(size=vocabulary) < 0.1
            absent[labels] = False
            b[absent] = -np.inf
        floats["bias"] = jnp.array(
            b, of_weights if o["bias"] == "finite" else "float32"
        )
    if o["class_weights"]:
        floats["class_weights"] = np.float32(rng.uniform(0.5, 2, size=vocabulary))
    if isinstance(o["scale"], str):
        shape = () if o["scale"] == "one" else tokens
        floats["scale"] = np.asarray(rng.uniform(0.5, 1, size=shape), np.float32)
    labels = labels.astype(np.int32).reshape(tokens)
    if o["ignore_index"] is not None:
        labels.flat[[1, len(x) - 1]] = o["ignore_index"]
    where = rng.random(size=tokens) < 0.8 if o["where"] else None
    return floats, labels, where


def wide(x):
    return np.asarray(x).astype(np.float64).astype(np.longdouble)


def wide_layer(floats, vocab_axis):
    """x, weights and logits of [tokens, ...] in long double, and the size of terms."""
    w = wide(floats["weights"])
    w = w if vocab_axis else w.T
    x = wide(floats["x"]).reshape(-1, len(w))
    b = wide(floats.get("bias", np.zeros(w.shape[1])))
    return x, w, x @ w + b, np.abs(x) @ np.abs(w) + np.abs(np.where(b == -np.inf, 0, b))


def lost_of(dtype):
    """What rounding may do to a number that is not normal."""
    info = jnp.finfo(dtype)
    # XLA takes subnormal float32 numbers for 0.
    return float(info.smallest_subnormal if dtype == "float16" else info.tiny)


def check_options(case, rng, tokens=TOKENS, hidden=HIDDEN, vocabulary=VOCABULARY):
    """Values, and the gradient of all arrays."""
    o = {**PLAIN, **case}
    floats, labels, where = case_arrays(o, rng, tokens, hidden, vocabulary)
    smoothing, z_loss, cap = (
        o[k] for k in ("label_smoothing", "z_loss", "logit_softcap")
    )
    static = {k: v for k, v in o.items() if k in STATIC}
    if not isinstance(o["scale"], str):
        static["scale"] = o["scale"]
    if o["memory_budget"] == "least":
        with jax.numpy_dtype_promotion("standard"):
            static["memory_budget"] = least_budget(
                floats["x"], labels, floats["weights"], vocab_axis=o["vocab_axis"]
            )
    g = np.float32(1.7)
    if o["reduction"] == "none":
        g = rng.normal(size=tokens).astype(np.float32)
        g.flat[2] = 0
    g_lse = rng.normal(size=tokens).astype(np.float32)
    # Mixed dtypes are for those who allow them.
    with jax.numpy_dtype_promotion("standard" if o["dtype"] == "mixed" else "strict"):
        cts = (g, g_lse) if o["return_lse"] else g
        y, d = vjp(floats, labels, cts, where, **static)
        operands = jnp.promote_types(floats["x"].dtype, floats["weights"].dtype).name

    # The loss.
    x, w, raw, size = wide_layer(floats, o["vocab_axis"])
    number = o["scale"] if not isinstance(o["scale"], str) else floats["scale"]
    scale = np.broadcast_to(wide(1.0 if number is None else number), tokens)
    scale = scale.reshape(-1, 1)
    valid = raw != -np.inf
    scaled = np.where(valid, np.where(valid, raw, 0) * scale, -np.inf)
    of = oracle.rows(scaled, softcap=cap)
    terms = np.sqrt(vocabulary)
    # A number above 0 multiplies what is below the maximum, all else the logits.
    factor = number if isinstance(number, float) and number > 0 else np.abs(scale)
    factor = None if number is None else factor
    amplified = amplification(np.where(valid, raw, 0), factor, cap) + terms
    of_logits = (hidden + 2) * size * np.abs(scale)
    amplified = amplified + 2 * np.where(valid, of_logits, 0).max(-1)
    amplified = amplified.astype(np.float64)
    shown = np.ones(tokens, bool) if where is None else where
    counted = (shown & (labels != -100)).ravel()
    shown = shown.ravel()
    cw = wide(floats.get("class_weights", np.ones(vocabulary)))
    on = np.arange(vocabulary) == labels.reshape(-1, 1)
    entries = valid.sum(-1, keepdims=True)
    of_label, of_spread = (1 - smoothing) * on, smoothing / entries * valid
    before = of_label + of_spread
    t = before * cw
    costs = cost_bar(of.cost, amplified[:, None])
    lse_bar = EPS * (8 * np.maximum(np.abs(of.lse), 1) + amplified)
    want = np.where(counted, oracle.cross_entropy(of, t, z_loss), 0)
    bar = oracle.weighted_cost(t, costs).sum(-1)
    bar = bar + 2 * z_loss * np.abs(of.lse) * lse_bar + 2 * EPS * want
    count = max(counted.sum(), 1) if o["reduction"] == "mean" else 1
    if o["reduction"] == "none":
        want, bar = want.reshape(tokens), bar.reshape(tokens)
    else:
        want, bar = want.sum() / count, (bar.sum() + 4 * EPS * want.sum()) / count
    value, lse = y if o["return_lse"] else (y, None)
    assert (value.dtype, value.shape) == (jnp.float32, want.shape)
    assert_within(value, want, bar)
    if o["return_lse"]:
        assert (lse.dtype, lse.shape) == (jnp.float32, tokens)
        assert_within(lse.ravel(), np.where(shown, of.lse, -np.inf), lse_bar)
        of_lse = np.where(shown, wide(g_lse).ravel(), 0)
    else:
        of_lse = np.zeros(len(x))

    # The gradient of the logits, and what may be wrong in each entry.
    each = np.where(counted, wide(g).ravel(), 0) / np.longdouble(count)
    parts = [oracle.cross_entropy_vjp(of, of_label * cw, each, of_lse, z_loss)]
    parts += [oracle.cross_entropy_vjp(of, of_spread * cw, each)]
    dz = np.where(valid, sum(parts) * scale, 0)
    lse_size = 2 * z_loss * (np.abs(of.lse) + lse_bar) * np.abs(each) + np.abs(of_lse)
    entry = (of_label * cw).sum(-1, keepdims=True) * np.where(on, of.others, of.p)
    entry = entry + (of_spread * cw).sum(-1, keepdims=True) * of.p + of_spread * cw
    entry = np.abs(each)[:, None] * entry + lse_size[:, None] * of.p
    entry = entry * np.abs(of.slope * scale)
    halves = np.abs(dz)
    if smoothing and o["class_weights"]:
        halves = halves + sum(np.abs(part * scale) for part in parts)
    if isinstance(o["scale"], str) or (number or 0) < 0:
        halves = 2 * halves  # multiplied after it is rounded
    error = (8 + amplified[:, None]) * EPS * entry + halves * eps_of(operands) / 2
    error = np.where(valid & (entry != 0), error + lost_of(operands), 0)

    def assert_gradient(name, want, of_error, size, count):
        """Sums of `count` terms, of the size `size`, with the error `of_error`."""
        dtype = floats[name].dtype.name
        assert (d[name].dtype, d[name].shape) == (floats[name].dtype, want.shape)
        bound = of_error + (2 + np.sqrt(count)) * EPS * size
        roundings = 2 if o["reduction"] != "none" else 1
        assert_within(
            d[name],
            want,
            bound + roundings * eps_of(dtype) / 2 * abs(want) + lost_of(dtype),
        )

    shape = floats["x"].shape
    dx = [a @ np.abs(b).T for a, b in ((error, w), (np.abs(dz), w))]
    dx = [a.reshape(shape) for a in (dz @ w.T, *dx)]
    assert_gradient("x", *dx, vocabulary)
    silent = ((each == 0) & (of_lse == 0)).reshape(tokens)
    assert (np.asarray(d["x"])[silent] == 0).all()
    dw = x.T @ dz, np.abs(x).T @ error, np.abs(x).T @ np.abs(dz)
    dw = [a if o["vocab_axis"] else a.T for a in dw]
    assert_gradient("weights", *dw, len(x))
    if "bias" in floats:
        assert_gradient("bias", dz.sum(0), error.sum(0), np.abs(dz).sum(0), len(x))
        assert (np.asarray(d["bias"])[~valid.any(0)] == 0).all()
    if "scale" in floats:
        raw = np.where(valid, raw, 0)
        want = (dz / scale * raw).sum(-1)
        size_of = (np.abs(dz / scale) * np.abs(raw)).sum(-1)
        error = (error * np.abs(raw / scale)).sum(-1)
        error += (hidden + 2) * EPS * (np.abs(dz / scale) * size).sum(-1)
        ds = [a.reshape(tokens) for a in (want, error, size_of)]
        ds = ds if o["scale"] == "each" else [a.sum() for a in ds]
        assert_gradient("scale", *ds, vocabulary * len(x))
    if "class_weights" in floats:
        want = each[:, None] * oracle.weighted_cost(before, of.cost)
        bound = (np.abs(each)[:, None] * before * costs).sum(0)
        size_of = np.abs(want).sum(0)
        assert_gradient("class_weights", want.sum(0), bound, 4 * size_of, len(x))


STATIC = (
    *("vocab_axis", "ignore_index", "label_smoothing", "z_loss", "logit_softcap"),
    *("reduction", "return_lse", "implementation"),
)


@pytest.mark.parametrize("case", covering(FACTORS, 2), ids=name_of)
def test_any_two_options(implementation, rng, case):
    check_options({**case, "implementation": implementation}, rng)
