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
import itertools
import math
import re

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from support import hlo, opaque, oracle
from support.compilation import exact_jit
from support.loss_cases import (
    EPS,
    amplification,
    assert_within,
    cost_bar,
    covering,
    eps_of,
    name_of,
)

from jaxsoftmax import (
    TokenStatistics,
    linear_softmax_cross_entropy,
    linear_token_logprobs_and_entropy,
    softmax_cross_entropy_with_integer_labels,
    token_logprobs_and_entropy,
)
from jaxsoftmax._linear import plan

CAP = 5.0
TOKENS, HIDDEN, VOCABULARY = (3, 5), 6, 300
HIGHEST = {"precision": "highest"}  # float32 products, on a GPU too


@pytest.fixture(autouse=True)
def small_pieces(request, monkeypatch):
    """Few tokens in pieces, as many are; but not where memory is measured."""
    if request.cls is not TestMemory:
        monkeypatch.setattr(plan, "_LEAST_PIECE", 4)


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


_vjp_quick = jax.jit(_vjp, static_argnames=("f", "static"))


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
    "logits_soft_cap": (None, CAP),
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
    weights_dtype = "float32" if o["dtype"] == "mixed" else o["dtype"]
    floats = {
        "x": jnp.array(x.reshape(*tokens, hidden), dtype),
        "weights": jnp.array(w if o["vocab_axis"] else w.T, weights_dtype),
    }
    if o["bias"] is not None:
        b = rng.normal(size=vocabulary)
        if o["bias"] == "-inf" and vocabulary > 1:
            absent = rng.random(size=vocabulary) < 0.1
            absent[labels] = False
            b[absent] = -np.inf
        floats["bias"] = jnp.array(
            b, weights_dtype if o["bias"] == "finite" else "float32"
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
        o[k] for k in ("label_smoothing", "z_loss", "logits_soft_cap")
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
        g = np.where(np.arange(g.size).reshape(tokens) == 2, np.float32(0), g)
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
    logits_size = (hidden + 2) * size * np.abs(scale)
    amplified = amplified + 2 * np.where(valid, logits_size, 0).max(-1)
    amplified = amplified.astype(np.float64)
    shown = np.ones(tokens, bool) if where is None else where
    counted = (shown & (labels != -100)).ravel()
    shown = shown.ravel()
    cw = wide(floats.get("class_weights", np.ones(vocabulary)))
    on = np.arange(vocabulary) == labels.reshape(-1, 1)
    entries = valid.sum(-1, keepdims=True)
    label_part, spread = (1 - smoothing) * on, smoothing / entries * valid
    before = label_part + spread
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
        assert_within(lse.ravel(), np.where(counted, of.lse, 0), lse_bar)
        d_lse = np.where(counted, wide(g_lse).ravel(), 0)
    else:
        d_lse = np.zeros(len(x))

    # The gradient of the logits, and what may be wrong in each entry.
    each = np.where(counted, wide(g).ravel(), 0) / np.longdouble(count)
    parts = [oracle.cross_entropy_vjp(of, label_part * cw, each, d_lse, z_loss)]
    parts += [oracle.cross_entropy_vjp(of, spread * cw, each)]
    dz = np.where(valid, sum(parts) * scale, 0)
    lse_size = 2 * z_loss * (np.abs(of.lse) + lse_bar) * np.abs(each) + np.abs(d_lse)
    entry = (label_part * cw).sum(-1, keepdims=True) * np.where(on, of.others, of.p)
    entry = entry + (spread * cw).sum(-1, keepdims=True) * of.p + spread * cw
    entry = np.abs(each)[:, None] * entry + lse_size[:, None] * of.p
    entry = entry * np.abs(of.slope * scale)
    halves = np.abs(dz)
    if smoothing and o["class_weights"]:
        halves = halves + sum(np.abs(part * scale) for part in parts)
    if isinstance(o["scale"], str) or (number or 0) < 0:
        halves = 2 * halves  # multiplied after it is rounded
    error = (8 + amplified[:, None]) * EPS * entry + halves * eps_of(operands) / 2
    error = np.where(valid & (entry != 0), error + lost_of(operands), 0)

    def assert_gradient(name, want, error_bound, size, count):
        """Sums of `count` terms, of the size `size`, with the error `error_bound`."""
        dtype = floats[name].dtype.name
        assert (d[name].dtype, d[name].shape) == (floats[name].dtype, want.shape)
        bound = error_bound + (2 + np.sqrt(count)) * EPS * size
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
    silent = ((each == 0) & (d_lse == 0)).reshape(tokens)
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
    *("vocab_axis", "ignore_index", "label_smoothing", "z_loss", "logits_soft_cap"),
    *("reduction", "return_lse", "implementation"),
)


@pytest.mark.parametrize("case", covering(FACTORS, 2), ids=name_of)
@pytest.mark.pairwise(1)
def test_any_two_options(implementation, rng, case):
    check_options({**case, "implementation": implementation}, rng)


@pytest.mark.parametrize(
    ("tokens", "hidden", "vocabulary", "case"),
    [
        ((7,), 3, 1, {"label_smoothing": 0.1, "z_loss": 0.01, "bias": "finite"}),
        ((7,), 3, 1, {"reduction": "mean", "bias": "finite", "scale": "each"}),
        ((2, 9), 4, 5, {"reduction": "mean", "label_smoothing": 0.1, "bias": "-inf"}),
        ((3, 3, 3), 1, 5, {"class_weights": True, "scale": -0.7, "return_lse": True}),
        ((), 4, 5, {"bias": "finite", "memory_budget": "least"}),
        ((13,), 8, 1101, {"bias": "-inf", "class_weights": True, "scale": "one"}),
        ((13,), 8, 5000, {"reduction": "mean", "bias": "-inf"}),
        ((13,), 8, 5000, {"dtype": "bfloat16", "memory_budget": "least"}),
        ((5,), 4, 50257, {"reduction": "mean", "memory_budget": "least"}),
        ((5,), 4, 50257, {"bias": "finite", "label_smoothing": 0.1, "vocab_axis": 0}),
        ((3,), 4, 151936, {"memory_budget": "least", "bias": "-inf"}),
        ((3,), 4, 151936, {"dtype": "bfloat16", "reduction": "sum", "z_loss": 1e-4}),
    ],
)
@pytest.mark.pairwise(1)
def test_vocabularies(implementation, rng, tokens, hidden, vocabulary, case):
    case = {"vocab_axis": 1, **case, "implementation": implementation}
    check_options(case, rng, tokens, hidden, vocabulary)


# --- against the loss of logits -------------------------------------------------------


def logits_of(x, weights, bias=None, vocab_axis=1):
    """[..., V] in float32 at least."""
    over = ((x.ndim - 1,), (0 if vocab_axis else 1,))
    z = jax.lax.dot_general(
        *(x, weights, (over, ((), ()))),
        precision="highest",
        preferred_element_type=np.float64 if x.dtype == np.float64 else np.float32,
    )
    return z if bias is None else z + jnp.broadcast_to(bias.astype(z.dtype), z.shape)


def on_logits(f):
    """`f` of logits as a function of what they are made of."""

    def call(
        x, labels, weights, bias=None, vocab_axis=1, where=None, scale=None, **options
    ):
        options = {k: v for k, v in options.items() if k not in ONLY_HERE}
        z = logits_of(x, weights, bias, vocab_axis)
        if isinstance(scale, jax.Array) and scale.ndim:
            scale = scale[..., None]
        elif isinstance(scale, jax.Array):
            scale = scale.reshape((1,) * z.ndim)
        return f(z, labels, where=where, scale=scale, **options)

    return call


ONLY_HERE = ("memory_budget", "precision")
dense_loss = on_logits(softmax_cross_entropy_with_integer_labels)
dense_tokens = on_logits(token_logprobs_and_entropy)
EPS_64 = float(np.finfo(np.float64).eps)
# Of logits of up to 60, which have an error of an eps of that, and of sums of 300: in
# float64 no more than a millionth of what would be seen as wrong.
CLOSE = {"rtol": 1e4 * EPS_64, "atol": 1e4 * EPS_64}


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


GRID = {k: v for k, v in FACTORS.items() if k != "dtype"}


@pytest.mark.parametrize("case", covering(GRID, 2), ids=name_of)
@pytest.mark.pairwise(1, rare=1)
def test_against_the_loss_of_logits(rng, x64, case):
    """The option grid in float64, with all gradients."""
    o = {**case, "dtype": "float64"}
    floats, labels, where = case_arrays(o, rng, TOKENS, HIDDEN, VOCABULARY)
    floats = {k: jnp.array(v, jnp.float64) for k, v in floats.items()}
    static = {k: v for k, v in o.items() if k in STATIC}
    if not isinstance(o["scale"], str):
        static["scale"] = o["scale"]
    if o["memory_budget"] == "least":
        static["memory_budget"] = least_budget(
            floats["x"], labels, floats["weights"], vocab_axis=o["vocab_axis"]
        )
    g = jnp.array(rng.normal(size=() if o["reduction"] != "none" else TOKENS))
    if o["return_lse"]:
        g = (g, jnp.array(rng.normal(size=TOKENS)))
    got, want = (
        vjp(floats, labels, g, where, f, **static)
        for f in (linear_softmax_cross_entropy, dense_loss)
    )
    chex.assert_trees_all_close(got, want, **CLOSE)


_vjp_as_users = exact_jit(_vjp, static_argnames=("f", "static"))


def vjp_in_bf16(f, floats, labels, g, **static):
    return _vjp_as_users(f, tuple(static.items()), labels, None, floats, g)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("budget", ["default", "least"])
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.pairwise(1)
def test_bf16_gradients_are_as_exact_as_of_float32_logits(reduction, budget, seed):
    """But for one more rounding, of each entry of the gradient of the logits.

    The dense form multiplies that in float32; ours is bfloat16 before it, as a product
    on tensor cores has it. The worst error of each gradient is above the dense form's
    by no more than half an eps of the root of the sum of squares of an entry's terms,
    as independent roundings add up; and the root mean square error less than twice it.
    """
    rng = np.random.default_rng(seed)
    tokens, hidden, vocabulary = 96, 32, 1000
    floats = {
        "x": normal(rng, (tokens, hidden), "bfloat16"),
        "weights": normal(rng, (hidden, vocabulary), "bfloat16", 2 / np.sqrt(hidden)),
        "bias": normal(rng, vocabulary, "bfloat16"),
    }
    labels = labels_of(rng, tokens, vocabulary)
    g = np.float32(1) if reduction == "mean" else np.float32(rng.normal(size=tokens))
    static = {"reduction": reduction}
    if budget == "least":
        static["memory_budget"] = least_budget(floats["x"], labels, floats["weights"])
    _, ours = vjp_in_bf16(linear_softmax_cross_entropy, floats, labels, g, **static)
    _, dense = vjp_in_bf16(dense_loss, floats, labels, g, **static)
    x, w, logits, _ = wide_layer(floats, 1)
    of = oracle.rows(logits)
    each = g if reduction == "none" else np.full(tokens, g / tokens)
    dz = oracle.cross_entropy_vjp(of, oracle.label_weights(of, labels), each)
    want = {
        "x": (dz @ w.T, dz**2 @ w.T**2),
        "weights": (x.T @ dz, x.T**2 @ dz**2),
        "bias": (dz.sum(0), (dz**2).sum(0)),
    }
    for k, (exact, squares) in want.items():
        ours_error, dense_error = (
            np.abs(np.asarray(d[k], np.float64) - exact) for d in (ours, dense)
        )
        more = eps_of("bfloat16") / 2 * np.sqrt(squares.max())
        assert ours_error.max() <= dense_error.max() + more, k
        assert (ours_error**2).mean() <= 4 * (dense_error**2).mean(), k


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 0.01}])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.pairwise(1)
def test_statistics_by_chunks_of_classes(rng, options, weighted):
    """As those of whole rows, with a label in every class of the last chunks.

    These overlap: 1300 is no multiple of their width.
    """
    tokens, vocabulary = 96, 1300
    floats = layer(rng, (tokens,), 8, vocabulary)
    if weighted:
        floats["class_weights"] = np.float32(rng.uniform(0.5, 2, size=vocabulary))
    labels = np.int32(vocabulary - 1 - 8 * np.arange(tokens))
    budget = 4 * tokens * 600
    shape = ((tokens,), 8, vocabulary, floats["x"].dtype, floats["x"].dtype, budget)
    _, classes = plan.LinearPlan(*shape).forward
    assert classes.count > 1
    assert not classes.even
    g = np.float32(rng.normal(size=tokens))
    got = vjp(floats, labels, g, memory_budget=budget, **options)
    want = vjp(floats, labels, g, memory_budget=2**30, **options)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=32 * EPS, atol=32 * EPS * np.abs(b).max())


def test_gradient_of_weights_is_added_up_in_float32(rng):
    """Over groups of tokens: rounded to bfloat16 once, whatever the number of groups.

    As sums in float32 differ by a few of its eps, a rounding falls to the other side in
    about one entry of a thousand.
    """
    tokens, vocabulary = 96, 4000
    floats = {
        "x": normal(rng, (tokens, 4), "bfloat16"),
        "weights": normal(rng, (4, vocabulary), "bfloat16"),
    }
    labels = labels_of(rng, tokens, vocabulary)
    least = least_budget(floats["x"], labels, floats["weights"])
    assert least < tokens * vocabulary * 2 / 8  # of the gradient: groups are many
    static = {"reduction": "sum"}
    g = np.float32(1)
    _, want = vjp_in_bf16(linear_softmax_cross_entropy, floats, labels, g, **static)
    static["memory_budget"] = least
    _, got = vjp_in_bf16(linear_softmax_cross_entropy, floats, labels, g, **static)
    got, want = (np.asarray(d["weights"], np.float32) for d in (got, want))
    np.testing.assert_allclose(got, want, rtol=eps_of("bfloat16"), atol=EPS)
    assert np.mean(got != want) < 0.01


# --- semantics ------------------------------------------------------------------------


@pytest.fixture(params=["default", "least"])
def budget(request):
    return request.param


def budgeted(floats, labels, budget, **options):
    if budget == "default":
        return {}
    x, weights = floats["x"], floats["weights"]
    return {"memory_budget": least_budget(x, labels, weights, **options)}


def layer(rng, tokens=TOKENS, hidden=HIDDEN, vocabulary=VOCABULARY):
    return {
        "x": normal(rng, (*tokens, hidden)),
        "weights": normal(rng, (hidden, vocabulary)),
        "bias": normal(rng, vocabulary),
    }


def cotangent(rng, reduction, tokens=TOKENS):
    if reduction == "none":
        return rng.normal(size=tokens).astype(np.float32)
    return np.float32(1.7)


OPTIONS = {"label_smoothing": 0.1, "z_loss": 0.01}


class TestTokensWithoutALoss:
    """Ignored or masked: whatever is in them, it is not seen."""

    @pytest.fixture(params=["none", "sum", "mean"])
    def run(self, request, implementation, rng, budget):
        """(x, labels, where) -> value, gradients; the same program for all."""
        self.floats, self.labels = layer(rng), labels_of(rng)
        if request.param == "none":
            self.floats["scale"] = np.float32(rng.uniform(0.5, 1, size=TOKENS))
        self.each = request.param == "none"
        g = cotangent(rng, request.param)

        def call(x, labels, where):
            return vjp(
                {**self.floats, "x": jnp.array(x)},
                labels,
                g,
                where,
                ignore_index=-100,
                reduction=request.param,
                implementation=implementation,
                **OPTIONS,
                **budgeted(self.floats, self.labels, budget),
            )

        return call

    @pytest.mark.pairwise(1)
    def test_all(self, run, rng, nans_allowed):
        """One test, that all may share what is compiled."""
        self.whatever_is_in_them(run, rng)
        self.no_token_is_left(run)
        self.label_that_is_no_class(run)
        self.nan_with_a_loss(run)

    def whatever_is_in_them(self, run, rng):
        x, labels = np.array(self.floats["x"]), self.labels
        out, every = rng.random(size=TOKENS) < 0.4, np.ones(TOKENS, bool)
        bad = x.copy()
        kinds = np.float32([np.nan, np.inf, -np.inf, 1e38])
        bad[out] = np.resize(kinds, out.sum())[:, None]
        ignored = np.where(out, np.int32(-100), labels)
        want = run(x, ignored, every)
        chex.assert_tree_all_finite(want)
        no_class = np.where(out, np.int32(1000), labels)
        for given in ((ignored, every), (labels, ~out), (no_class, ~out)):
            y, d = run(bad, *given)
            chex.assert_trees_all_equal((y, d), want)
            if self.each:
                assert (np.asarray(y)[out] == 0).all()
                assert (np.asarray(d["scale"])[out] == 0).all()
            assert (np.asarray(d["x"])[out] == 0).all()

    def no_token_is_left(self, run):
        x = self.floats["x"].at[0, 1].set(jnp.nan)
        every = np.ones(TOKENS, bool)
        ignored = np.full_like(self.labels, -100)
        for given in ((ignored, every), (self.labels, ~every)):
            found = run(x, *given)
            chex.assert_trees_all_equal(found, jax.tree.map(np.zeros_like, found))

    def label_that_is_no_class(self, run):
        """NaN in its token, never a number; and so the gradients that it is part of."""
        labels, bad = self.labels.copy(), np.zeros(TOKENS, bool)
        for at, label in {(0, 0): -1, (0, 3): 300, (1, 2): -3, (2, 4): 2**30}.items():
            labels[at], bad[at] = label, True
        y, d = run(self.floats["x"], labels, ~np.zeros(TOKENS, bool))
        np.testing.assert_array_equal(np.isnan(y), bad if self.each else True)
        np.testing.assert_array_equal(np.isnan(d["x"]).all(-1), bad)
        assert np.isfinite(np.asarray(d["x"])[~bad]).all()
        assert np.isnan(d["weights"]).all()
        assert np.isnan(d["bias"]).all()

    def nan_with_a_loss(self, run):
        """Of the gradient of x it reaches its own token only."""
        x = self.floats["x"].at[1, 2, 3].set(jnp.nan)
        bad = np.zeros(TOKENS, bool)
        bad[1, 2] = True
        y, d = run(x, self.labels, ~np.zeros(TOKENS, bool))
        np.testing.assert_array_equal(np.isnan(y), bad if self.each else True)
        np.testing.assert_array_equal(np.isnan(d["x"]).any(-1), bad)
        assert np.isnan(d["weights"]).all()


class TestEdges:
    @pytest.mark.parametrize("reduction", ["none", "sum"])
    @pytest.mark.pairwise(1)
    def test_label_that_dominates(self, implementation, rng, reduction, budget):
        """1 - P of it from 1e-1 down to 1e-16, with its digits."""
        count = 24
        w = np.eye(6, VOCABULARY, dtype=np.float32)
        labels = np.arange(count, dtype=np.int32) % 6
        x = np.float32(np.linspace(8, 42, count))[:, None] * w[:, labels].T
        floats = {"x": jnp.array(x), "weights": jnp.array(w)}
        g = cotangent(rng, reduction, count)
        static = {"reduction": reduction, "implementation": implementation}
        static |= budgeted(floats, labels, budget)
        y, d = vjp(floats, labels, g, **static)
        of = oracle.rows(x @ w)  # exact
        t = oracle.label_weights(of, labels)
        want = oracle.cross_entropy(of, t)
        bar = (8 + np.sqrt(VOCABULARY)) * EPS
        dz = oracle.cross_entropy_vjp(of, t, np.broadcast_to(g, count))
        dx = dz @ w.T
        if reduction == "sum":
            want = want.sum()
        assert_within(y, want, bar * want)
        # Each entry is one of dz.
        assert_within(d["x"], dx, bar * np.abs(dx))

    def test_large_logits(self, implementation, rng, budget):
        """Of 1e4: the loss is what it is without what all classes have in common."""
        floats, labels = layer(rng), labels_of(rng)
        whole = jnp.array(rng.integers(-8, 8, size=floats["x"].shape), jnp.float32)
        w = jnp.array(rng.integers(-8, 8, size=floats["weights"].shape), jnp.float32)
        x = jnp.concatenate([whole / 8, jnp.full((*TOKENS, 1), 128.0)], -1)
        w = jnp.concatenate([w / 8, jnp.full((1, VOCABULARY), 80.0)], 0)
        static = {"implementation": implementation, "return_lse": True}
        g = (cotangent(rng, "none"), np.zeros(TOKENS, np.float32))
        floats = {"x": x, "weights": w}
        at = budgeted(floats, labels, budget)
        (y, lse), d = vjp(floats, labels, g, **static, **at)
        floats = {"x": x[..., :-1], "weights": w[:-1]}
        (want, want_lse), want_d = vjp(floats, labels, g, **static)
        np.testing.assert_allclose(y, want, rtol=32 * EPS)
        np.testing.assert_allclose(lse, want_lse + 128 * 80, rtol=4 * EPS)
        got = d["x"][..., :-1], d["weights"][:-1]
        bar = {"rtol": 64 * EPS, "atol": 64 * EPS}
        chex.assert_trees_all_close(got, (want_d["x"], want_d["weights"]), **bar)

    def test_label_of_a_class_without_part(self, implementation, rng):
        """Its cost is +inf, as that of a label whose logit is -inf."""
        floats, labels = layer(rng), labels_of(rng)
        labels[labels == 7] = 8
        labels[1, 1] = 7
        floats["bias"] = floats["bias"].at[7].set(-jnp.inf)
        g = cotangent(rng, "none")
        y, d = vjp(floats, labels, g, implementation=implementation)
        want, want_d = vjp(floats, labels, g, f=dense_loss)
        assert np.isposinf(y[1, 1])
        assert np.isposinf(y).sum() == 1
        chex.assert_trees_all_close(y, want, rtol=32 * EPS)
        bar = {"rtol": 128 * EPS, "atol": 128 * EPS}
        chex.assert_trees_all_close(d, want_d, **bar)
        assert d["bias"][7] == 0

    @pytest.mark.parametrize("reduction", ["none", "mean"])
    @pytest.mark.parametrize(
        ("tokens", "hidden", "vocabulary"),
        [((0,), 3, 5), ((2, 0), 3, 5), ((3,), 0, 5), ((3,), 2, 0), ((), 3, 5)],
    )
    @pytest.mark.pairwise(1)
    @pytest.mark.parametrize("scale", [-0.5, 2.0])
    def test_arrays_without_elements(
        self, rng, tokens, hidden, vocabulary, reduction, scale
    ):
        """The same as of logits."""
        floats = layer(rng, tokens, hidden, vocabulary)
        labels = np.full(tokens, -1, np.int32)
        if vocabulary:
            labels = labels_of(rng, tokens, vocabulary)
        g = cotangent(rng, reduction, tokens)
        static = {"reduction": reduction, "ignore_index": -1, "scale": scale}
        got, want = (
            vjp(floats, labels, np.asarray(g, np.float32), f=f, **static)
            for f in (linear_softmax_cross_entropy, dense_loss)
        )
        chex.assert_trees_all_equal_shapes_and_dtypes(got, want)
        chex.assert_trees_all_close(got, want, rtol=16 * EPS, atol=16 * EPS)

    def test_numpy_and_lists(self, rng):
        x, w = rng.normal(size=3).astype(np.float32), np.eye(3, 4, dtype=np.float32)
        got = linear_softmax_cross_entropy(x, 2, w, bias=np.zeros(4, np.float32))
        want = softmax_cross_entropy_with_integer_labels(jnp.array(x @ w), 2)
        np.testing.assert_allclose(got, want, rtol=8 * EPS)
        np.testing.assert_array_equal(
            got, linear_softmax_cross_entropy(x, 2, w.T, vocab_axis=-2)
        )

    @pytest.mark.parametrize("scale", [-0.7, "array"])
    @pytest.mark.pairwise(1)
    def test_minus_inf_whatever_the_scale(self, implementation, rng, scale, budget):
        """A class without a part has none if the scale is 0 or below, either."""
        floats, labels = layer(rng), labels_of(rng) % 200
        floats["bias"] = floats["bias"].at[200:].set(-jnp.inf)
        static = {"implementation": implementation}
        if scale == "array":
            floats["scale"] = np.float32(rng.normal(size=TOKENS))
            floats["scale"][1] = 0
        else:
            static["scale"] = scale
        g = cotangent(rng, "none")
        y, d = vjp(floats, labels, g, **static, **budgeted(floats, labels, budget))
        shown = {**floats, "weights": floats["weights"][:, :200]}
        shown["bias"] = floats["bias"][:200]
        want, want_d = vjp(shown, labels, g, **static)
        np.testing.assert_allclose(y, want, rtol=64 * EPS)
        bar = {"rtol": 256 * EPS, "atol": 256 * EPS}
        for k in want_d:
            got = d[k][..., :200] if k in ("weights", "bias") else d[k]
            np.testing.assert_allclose(got, want_d[k], **bar)
        assert (np.asarray(d["weights"])[:, 200:] == 0).all()


# --- derivative modes and transforms --------------------------------------------------

# Options that take every path: gradients in the forward, of all tokens at once or in
# groups; computed again, at once or in chunks; with all that has a derivative.
PATHS = {
    "one pass": {"reduction": "mean", "hidden": 3, **OPTIONS},
    "one pass in groups": {"reduction": "sum", "hidden": 3, "budget": "least"},
    "sum in chunks": {"reduction": "mean", "hidden": 16, "budget": "least", **OPTIONS},
    "none in chunks": {
        "return_lse": True,
        "hidden": 3,
        "budget": "least",
        "logits_soft_cap": CAP,
        "label_smoothing": 0.1,
        "scale": True,
        "class_weights": True,
    },
    "none": {"hidden": 3, "scale": True, "z_loss": 0.01},
}


class Problem:
    """Losses of three microbatches of tokens, ours and that of logits, in float64."""

    def __init__(self, path, implementation):
        options = dict(PATHS[path])
        rng = np.random.default_rng(0)
        floats = {
            k: jnp.array(v, jnp.float64)
            for k, v in layer(rng, hidden=options.pop("hidden")).items()
        }
        floats["bias"] = floats["bias"].at[jnp.array([3, 200])].set(-jnp.inf)
        self.labels = labels_of(rng)
        self.labels[self.labels == 3] = 4
        self.labels[self.labels == 200] = 201
        self.labels[0, 2] = -100
        if options.pop("scale", False):
            floats["scale"] = jnp.array(rng.uniform(0.5, 1, size=TOKENS))
        if options.pop("class_weights", False):
            floats["class_weights"] = jnp.array(rng.uniform(0.5, 2, size=VOCABULARY))
        budget = options.pop("budget", "default")
        options |= {"ignore_index": -100, **HIGHEST}
        own = budgeted(floats, self.labels, budget)
        self.floats = floats
        # Random ones: XLA for CPU is wrong about products with constant tangents.
        self.dots = {k: jnp.array(rng.normal(size=v.shape)) for k, v in floats.items()}
        self.functions = [
            functools.partial(
                linear_softmax_cross_entropy,
                implementation=implementation,
                **options,
                **own,
            ),
            functools.partial(dense_loss, **options),
        ]

    def call(self, f, floats, labels=None):
        rest = dict(floats)
        labels = self.labels if labels is None else labels
        return f(rest.pop("x"), labels, rest.pop("weights"), **rest)

    def losses(self):
        """Of each function a scalar that is linear in nothing."""
        for f in self.functions:

            def scalar(floats, labels=None, f=f):
                leaves = jax.tree.leaves(self.call(f, floats, labels))
                return sum(jnp.sum(jnp.sin(a + i)) for i, a in enumerate(leaves))

            yield scalar

    def check(self, of, *args):
        """``of(loss, floats, dots, ...)`` of both."""
        got, want = (
            jax.jit(functools.partial(of, loss))(self.floats, self.dots, *args)
            for loss in self.losses()
        )
        chex.assert_tree_all_finite(got)
        chex.assert_trees_all_close(got, want, **CLOSE)


def tree_vdot(a, b):
    return sum(jnp.vdot(a[k], b[k]) for k in a)


def forward_over_reverse(f, x, v):
    return jax.jvp(jax.grad(f), (x,), (v,))


def reverse_over_reverse(f, x, v):
    return jax.grad(lambda x: tree_vdot(jax.grad(f)(x), v))(x)


def reverse_over_forward(f, x, v):
    return jax.grad(lambda x: jnp.cos(jax.jvp(f, (x,), (v,))[1]))(x)


def linearized(f, x, v):
    y, push = jax.linearize(f, x)
    (pulled,) = jax.linear_transpose(push, x)(y)
    return y, push(v), pulled


DERIVATIVES = {
    "jvp": lambda f, x, v: jax.jvp(f, (x,), (v,)),
    "linearize": linearized,
    "forward over reverse": forward_over_reverse,
    "reverse over reverse": reverse_over_reverse,
    "reverse over forward": reverse_over_forward,
    "forward over forward": lambda f, x, v: jax.jvp(
        lambda x: jax.jvp(f, (x,), (v,))[1], (x,), (v,)
    ),
}
SLOW = pytest.mark.slow
# What each path has a rule for; the general one has all of the above.
TWO_DERIVATIVES = ("jvp", "reverse over reverse")


@pytest.mark.parametrize(
    ("path", "mode"),
    [
        *itertools.product(
            [path for path in PATHS if path != "none in chunks"], TWO_DERIVATIVES
        ),
        *(("none in chunks", mode) for mode in DERIVATIVES),
        *(("one pass", mode) for mode in ("linearize", "forward over reverse")),
        ("sum in chunks", "reverse over forward"),
    ],
)
@pytest.mark.pairwise(1)
def test_derivative(x64, path, mode):
    Problem(path, "xla").check(DERIVATIVES[mode])


@pytest.mark.parametrize(
    ("path", "mode"),
    [
        ("none in chunks", "jvp"),
        pytest.param("one pass in groups", "reverse over reverse", marks=SLOW),
    ],
)
@pytest.mark.parametrize("implementation", opaque.KERNELS)
def test_derivative_of_kernels(implementation, x64, path, mode):
    """Which refuse to be differentiated."""
    Problem(path, implementation).check(DERIVATIVES[mode])


@pytest.mark.parametrize("jacobian", [jax.jacfwd, jax.jacrev])
@pytest.mark.parametrize("path", ["none", "none in chunks"])
@pytest.mark.pairwise(1)
def test_jacobian(x64, path, jacobian):
    problem = Problem(path, "xla")
    got, want = (
        jax.jit(jacobian(functools.partial(problem.call, f)))(problem.floats)
        for f in problem.functions
    )
    chex.assert_trees_all_close(got, want, **CLOSE)


BATCHED = ("x", "scale")  # what each microbatch has of its own


def batch(problem, names):
    """Three microbatches: arrays of these names, and labels, along a first axis."""
    rng = np.random.default_rng(1)
    floats = {
        k: jnp.stack([v * factor for factor in rng.uniform(0.5, 1, size=3)])
        if k in names
        else v
        for k, v in problem.floats.items()
    }
    labels = np.stack([problem.labels, problem.labels[::-1], problem.labels])
    axes = {k: 0 if k in names else None for k in floats}
    return floats, labels, axes


def finite(tree):
    """A tangent for arrays of which some entries are -inf."""
    return jax.tree.map(lambda a: jnp.where(jnp.isinf(a), 0, a), tree)


def vmap_of_grad(f, floats, labels, axes):
    return jax.vmap(jax.value_and_grad(f), in_axes=(axes, 0))(floats, labels)


def grad_of_vmap(f, floats, labels, axes):
    g = lambda floats: jnp.sum(jax.vmap(f, in_axes=(axes, 0))(floats, labels))
    return jax.value_and_grad(g)(floats)


def vmap_of_jvp(f, floats, labels, axes):
    one_jvp = lambda x, labels: jax.jvp(lambda x: f(x, labels), (x,), (finite(x),))
    return jax.vmap(one_jvp, in_axes=(axes, 0))(floats, labels)


def over_scan(f, floats, labels, axes):
    def total(floats):
        mine = {k: v for k, v in floats.items() if axes[k] == 0}

        def step(total, each):
            mapped, labels = each
            return total + f({**floats, **mapped}, labels), None

        return jax.lax.scan(step, jnp.zeros(()), (mine, labels))[0]

    return jax.value_and_grad(total)(floats)


def over_checkpoint(f, floats, labels, axes):
    return over_scan(jax.checkpoint(f), floats, labels, axes)


def hvp_over_scan(f, floats, labels, axes):
    of = lambda floats: over_scan(f, floats, labels, axes)[1]
    return jax.jvp(of, (floats,), (finite(floats),))[1]


TRANSFORMS = {
    f.__name__: f
    for f in (vmap_of_grad, grad_of_vmap, vmap_of_jvp, over_scan, over_checkpoint)
}


def check_transform(problem, transform, names):
    floats, labels, axes = batch(problem, names)
    got, want = (
        jax.jit(lambda floats, labels, f=f: transform(f, floats, labels, axes))(
            floats, labels
        )
        for f in problem.losses()
    )
    chex.assert_tree_all_finite(got)
    chex.assert_trees_all_close(got, want, **CLOSE)


@pytest.mark.parametrize("path", ["one pass in groups", "sum in chunks"])
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.pairwise(1)
def test_transform(x64, path, name):
    check_transform(Problem(path, "xla"), TRANSFORMS[name], BATCHED)


@pytest.mark.parametrize(
    ("path", "transform"),
    [
        ("none in chunks", vmap_of_grad),
        pytest.param("none in chunks", over_scan, marks=SLOW),
        pytest.param("one pass in groups", hvp_over_scan, marks=SLOW),
    ],
)
@pytest.mark.parametrize("implementation", opaque.KERNELS)
def test_transform_of_kernels(implementation, x64, path, transform):
    check_transform(Problem(path, implementation), transform, BATCHED)


@pytest.mark.parametrize("path", ["one pass", "none in chunks"])
@pytest.mark.parametrize("transform", [vmap_of_grad, grad_of_vmap, vmap_of_jvp])
@pytest.mark.pairwise(1)
def test_vmap_over_weights(x64, path, transform):
    """Each model with tokens of its own."""
    names = ("x", "scale", "weights", "bias")
    check_transform(Problem(path, "xla"), transform, names)


# --- products and memory --------------------------------------------------------------

SPEC = jax.ShapeDtypeStruct


def program(mode, tokens, hidden, vocabulary, dtype="float32", **options):
    """Lowered, of float arrays that are arguments, tangents too."""
    f = functools.partial(linear_softmax_cross_entropy, **options)
    x, w = SPEC((tokens, hidden), dtype), SPEC((hidden, vocabulary), dtype)

    def loss(x, w, labels):
        return jnp.sum(f(x, labels, w))

    def run(x, w, x_dot, w_dot, labels):
        g = lambda x, w: loss(x, w, labels)
        both = jax.grad(g, (0, 1))
        dots = (x_dot, w_dot)
        if mode == "value":
            return g(x, w)
        if mode == "gradient":
            return jax.value_and_grad(g, (0, 1))(x, w)
        if mode == "of x":
            return jax.value_and_grad(g)(x, w)
        if mode == "of weights":
            return jax.value_and_grad(g, 1)(x, w)
        if mode == "jvp":
            return jax.jvp(g, (x, w), dots)
        if mode == "hvp":
            return jax.jvp(both, (x, w), dots)
        if mode == "reverse over reverse":
            products = lambda x, w: sum(map(jnp.vdot, both(x, w), dots))
            return jax.grad(products, (0, 1))(x, w)
        if mode == "reverse over forward":
            return jax.grad(lambda x, w: jax.jvp(g, (x, w), dots)[1], (0, 1))(x, w)
        assert mode == "scan"

        def total(x, w):
            def step(total, each):
                return total + loss(each[0], w, each[1]), None

            batches = jnp.stack([x, 2 * x, 3 * x]), jnp.stack([labels] * 3)
            return jax.lax.scan(step, jnp.zeros(()), batches)[0]

        return jax.grad(total, (0, 1))(x, w)

    return exact_jit(run).lower(x, w, x, w, SPEC((tokens,), "int32"))


MODES = (
    *("value", "gradient", "of x", "of weights", "jvp", "hvp", "scan"),
    *("reverse over reverse", "reverse over forward"),
)


class TestProducts:
    """As many as there must be: counted in the program before XLA sees it."""

    @pytest.mark.parametrize(
        ("mode", "one_pass", "recomputed"),
        [
            ("value", 1, 1),
            ("gradient", 3, 4),
            ("of x", 2, 3),
            ("of weights", 2, 3),
            ("scan", 3, 4),
            ("jvp", 3, 4),
        ],
    )
    @pytest.mark.parametrize("budget", [None, 64 * 128 * 8])
    @pytest.mark.pairwise(1)
    def test_count(self, mode, one_pass, recomputed, budget):
        shape = (64, 4, 1024)
        for reduction, count in (("mean", one_pass), ("none", recomputed)):
            options = {"reduction": reduction, "memory_budget": budget}
            lowered = program(mode, *shape, **options)
            assert hlo.products(lowered) == count, reduction

    def test_mean_with_little_memory(self):
        """Less than the gradient of weights in float32: a product more."""
        options = {"reduction": "mean", "memory_budget": 64 * 128 * 8}
        assert hlo.products(program("gradient", 64, 32, 1024, **options)) == 4
        assert hlo.products(program("gradient", 64, 16, 1024, **options)) == 3


class TestMemory:
    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("reduction", ["none", "mean"])
    @pytest.mark.parametrize("hidden", [4, 48])
    @pytest.mark.pairwise(1)
    def test_no_array_of_all_logits(self, mode, reduction, hidden):
        """Nor of half of them, in any derivative mode.

        The budget has room for a fourth of the logits. With 48 entries a token it has
        none for the gradient of the weights in float32.
        """
        shape = (128, hidden, 1024)
        options = {"reduction": reduction, "memory_budget": 128 * 128 * 8}
        assert hlo.largest(program(mode, *shape, **options)) < 128 * 1024 / 2

    @pytest.mark.parametrize("mode", ["value", "gradient", "hvp"])
    def test_all_logits_where_there_is_room(self, mode):
        """They are seen, then, by what looks for them above."""
        assert hlo.largest(program(mode, 128, 4, 1024)) >= 128 * 1024

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("reduction", ["none", "mean"])
    @pytest.mark.pairwise(1)
    def test_temp_bytes(self, dtype, reduction):
        """They grow with T H and with H V: not with T V, which is 32 times the budget.

        Of a chunk XLA for CPU has the logits, their exponentials and their gradient.
        Gradients and what a product has converted are float32, and a token has a few
        numbers.
        """
        tokens, hidden, vocabulary, budget = 1024, 16, 8192, 2**20
        options = {"reduction": reduction, "memory_budget": budget}
        lowered = program("gradient", tokens, hidden, vocabulary, dtype, **options)
        temp = lowered.compile().memory_analysis().temp_size_in_bytes
        layer_bytes = 2 * 4 * (tokens + vocabulary) * hidden
        assert temp <= 3 * budget + layer_bytes + 64 * tokens

    @pytest.mark.parametrize(("dtype", "jit"), [("float32", False), ("bfloat16", True)])
    @pytest.mark.parametrize("budget", [None, 2**17])
    @pytest.mark.pairwise(1)
    def test_kept(self, implementation, rng, dtype, jit, budget):
        """The arguments and a few numbers a token; or the gradients alone."""
        tokens, hidden, vocabulary = 64, 8, 512
        x = normal(rng, (tokens, hidden), dtype)
        w = normal(rng, (hidden, vocabulary), dtype)
        b = normal(rng, vocabulary, dtype)
        labels = labels_of(rng, tokens, vocabulary)
        for reduction in ("none", "mean"):
            f = functools.partial(
                linear_softmax_cross_entropy,
                labels=jnp.array(labels),
                reduction=reduction,
                memory_budget=budget,
                implementation=implementation,
                **OPTIONS,
            )
            call = lambda x, w, b, f=f: f(x, weights=w, bias=b)
            _, pull = jax.vjp(jax.jit(call) if jit else call, x, w, b)
            kept = {v.unsafe_buffer_pointer(): v for v in jax.tree.leaves(pull)}
            if reduction == "none":
                for v in (x, w, b):  # themselves, not copies
                    assert kept.pop(v.unsafe_buffer_pointer()).shape == v.shape
                assert sum(v.dtype == jnp.int32 for v in kept.values()) == 1
                assert sum(v.nbytes for v in kept.values()) <= 128 * tokens
            else:
                gradients = [v for v in kept.values() if v.dtype == x.dtype]
                shapes = sorted(v.shape for v in gradients if v.size > tokens)
                assert shapes == sorted(v.shape for v in (x, w, b))
                rest = sum(v.nbytes for v in kept.values())
                rest -= sum(v.nbytes for v in (x, w, b))
                assert rest <= 16 * tokens


# --- other functions and properties ---------------------------------------------------


class TestTokenStatistics:
    @pytest.mark.parametrize(
        ("dtype", "options"),
        [
            ("float32", {}),
            ("float32", {"scale": 0.7, "logits_soft_cap": CAP, "bias": True}),
            ("bfloat16", {"bias": True}),
        ],
    )
    @pytest.mark.pairwise(1)
    def test_against_oracle(self, implementation, rng, dtype, options, budget):
        """Values, and the gradients of each by itself."""
        options = dict(options)
        floats, labels = layer(rng), labels_of(rng)
        if not options.pop("bias", False):
            del floats["bias"]
        floats = {k: v.astype(dtype) for k, v in floats.items()}
        static = {"implementation": implementation, **options}
        static |= budgeted(floats, labels, budget)
        scale, cap = options.get("scale", 1.0), options.get("logits_soft_cap")
        x, w, logits, size = wide_layer(floats, 1)
        of = oracle.rows(logits, None, scale, cap)
        t = oracle.label_weights(of, labels.ravel())
        amplified = amplification(logits, options.get("scale"), cap)
        amplified = amplified + np.sqrt(VOCABULARY)
        amplified = amplified + 2 * scale * (HIDDEN + 2) * size.max(-1)
        cost = oracle.cross_entropy(of, t)
        values = {
            "logprobs": (-cost, cost_bar(cost, amplified)),
            "entropy": (oracle.entropy(of), 0),
            "lse": (of.lse, EPS * (8 * np.maximum(np.abs(of.lse), 1) + amplified)),
        }
        # An entropy changes with the error of P by as much as its terms.
        entropy = values["entropy"][0]
        entropy_bar = (16 + amplified) * EPS * (entropy + (of.p * of.below).sum(-1))
        values["entropy"] = (entropy, entropy_bar)
        for k, (want, bar) in values.items():
            g = rng.normal(size=TOKENS).astype(np.float32)
            gs = {name: g if name == k else np.zeros_like(g) for name in values}
            gs = TokenStatistics(**gs)
            y, d = vjp(
                floats, labels, gs, f=linear_token_logprobs_and_entropy, **static
            )
            value = getattr(y, k)
            assert (value.dtype, value.shape) == (jnp.float32, TOKENS)
            assert_within(value.ravel(), want, bar)
            each = wide(g).ravel()
            dz = {
                "logprobs": -oracle.cross_entropy_vjp(of, t, each),
                "entropy": oracle.entropy_vjp(of, each),
                "lse": oracle.cross_entropy_vjp(of, 0 * t, 0 * each, each),
            }[k]
            terms = {
                "logprobs": np.where(t != 0, of.others, of.p),
                "entropy": of.p * (1 + of.below + entropy[:, None]),
                "lse": of.p,
            }[k]
            terms = np.abs(each)[:, None] * terms * np.abs(of.slope)
            error = (16 + amplified)[:, None] * EPS * terms
            error = error + eps_of(dtype) / 2 * np.abs(dz) + lost_of(dtype)
            sum_error = 2 + np.sqrt(VOCABULARY)
            for name, exact, bound in (
                ("x", dz @ w.T, (error + sum_error * EPS * np.abs(dz)) @ np.abs(w.T)),
                (
                    "weights",
                    x.T @ dz,
                    np.abs(x.T) @ (error + sum_error * EPS * np.abs(dz)),
                ),
            ):
                got = d[name].reshape(exact.shape)
                rounding = eps_of(dtype) / 2 * np.abs(exact) + lost_of(dtype)
                assert d[name].dtype == floats[name].dtype
                assert_within(got, exact, bound + rounding)

    def test_against_the_statistics_of_logits(self, rng, x64, budget):
        """A learned temperature; tokens that are ignored or masked; in float64."""
        floats, labels = layer(rng), labels_of(rng)
        floats = {k: jnp.array(v, jnp.float64) for k, v in floats.items()}
        floats["scale"] = jnp.array(rng.uniform(0.5, 1, size=TOKENS))
        labels[0, :2] = -100
        where = rng.random(size=TOKENS) < 0.7
        gs = TokenStatistics(*(jnp.array(rng.normal(size=TOKENS)) for _ in range(3)))
        static = {"ignore_index": -100}
        own = budgeted(floats, labels, budget)
        f = linear_token_logprobs_and_entropy
        got = vjp(floats, labels, gs, where, f, **static, **own)
        want = vjp(floats, labels, gs, where, dense_tokens, **static)
        chex.assert_trees_all_close(got, want, **CLOSE)
        left_out = ~where | (labels == -100)
        for value in got[0]:
            np.testing.assert_array_equal(value == 0, left_out)

    def test_derivatives(self, x64, rng, implementation):
        """Forward, and over reverse: of an entropy bonus, for example."""
        floats, labels = layer(rng, hidden=3), labels_of(rng)
        floats = {k: jnp.array(v, jnp.float64) for k, v in floats.items()}
        dots = {k: jnp.array(rng.normal(size=v.shape)) for k, v in floats.items()}
        own = budgeted(floats, labels, "least")
        ours = functools.partial(
            linear_token_logprobs_and_entropy, implementation=implementation, **own
        )

        def run(f):
            def loss(floats):
                y = f(floats["x"], labels, floats["weights"], bias=floats["bias"])
                return sum(jnp.sum(jnp.sin(v)) for v in y)

            return jax.jvp(jax.value_and_grad(loss), (floats,), (dots,))

        got, want = (jax.jit(functools.partial(run, f))() for f in (ours, dense_tokens))
        chex.assert_trees_all_close(got, want, **CLOSE)


@hypothesis.settings(max_examples=2, deadline=None, derandomize=True)
@hypothesis.given(
    st.data(),
    st.lists(st.integers(1, 7), min_size=0, max_size=3),
    st.integers(1, 5),
    st.integers(1, 700),
    st.sampled_from(["none", "sum", "mean"]),
)
def test_the_budget_changes_nothing(data, tokens, hidden, vocabulary, reduction):
    """But the order of sums: values and gradients, at any budget."""
    rng = np.random.default_rng(0)
    tokens = tuple(tokens)
    floats = layer(rng, tokens, hidden, vocabulary)
    labels = labels_of(rng, tokens, vocabulary).reshape(tokens)
    least = least_budget(floats["x"], labels, floats["weights"])
    most = 16 * max(1, math.prod(tokens)) * vocabulary + least
    budget = data.draw(st.integers(least, most))
    g = np.asarray(cotangent(rng, reduction, tokens), np.float32)
    static = {"reduction": reduction, **OPTIONS}
    got = vjp(floats, labels, g, memory_budget=budget, **static)
    want = vjp(floats, labels, g, memory_budget=2**30, **static)
    # Sums of up to 700 classes and 343 tokens.
    bar = {"rtol": 512 * EPS, "atol": 512 * EPS}
    chex.assert_trees_all_close(got, want, **bar)


X, W = jnp.ones((2, 3)), jnp.ones((3, 5))
LABELS = jnp.array([0, 4])


class TestArguments:
    def test_least_budget(self):
        """What the error names is enough."""
        least = least_budget(X, LABELS, W)
        linear_softmax_cross_entropy(X, LABELS, W, memory_budget=np.int64(least))
        with pytest.raises(ValueError, match=f"at least {least} bytes"):
            linear_softmax_cross_entropy(X, LABELS, W, memory_budget=least - 1)

    @pytest.mark.parametrize(
        ("tokens", "labels_shape"), [((2, 4), (1, 4)), ((1, 4), (2, 1))]
    )
    def test_tokens_and_labels_broadcast(self, rng, tokens, labels_shape):
        """As on logits."""
        x, labels = normal(rng, (*tokens, 3)), labels_of(rng, labels_shape, 5)
        for reduction in ("none", "mean"):
            got = linear_softmax_cross_entropy(x, labels, W, reduction=reduction)
            logits = jnp.matmul(x, W, precision="highest")
            want = softmax_cross_entropy_with_integer_labels(
                logits, labels, reduction=reduction
            )
            np.testing.assert_allclose(got, want, rtol=32 * EPS)

    def test_what_may_be_left_out(self):
        """A mask and a scale that broadcast to the labels."""
        x, labels = jnp.ones((2, 4, 3)), jnp.zeros((2, 4), int)
        where = jnp.array([[True], [False]])
        loss = linear_softmax_cross_entropy(
            x, labels, W, where=where, scale=jnp.ones((1, 4))
        )
        np.testing.assert_allclose(loss[0], np.log(5), rtol=4 * EPS)
        np.testing.assert_array_equal(loss[1], 0)


def test_no_recompilation():
    """Static numbers are hashed by value."""
    f = functools.partial(
        linear_softmax_cross_entropy, label_smoothing=0.1, z_loss=1e-4, reduction="mean"
    )

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(x, labels):
        return jax.grad(lambda x: f(x, labels, W))(x)

    chex.clear_trace_counter()
    for i in range(3):
        step(jnp.full((2, 3), float(i)), jnp.array([i, 0]))
