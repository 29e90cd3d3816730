"""What is left out has no influence, whatever it is.

Of arrays in which something is left out, what stands there is replaced by NaN, inf and
large numbers, in tangents and cotangents too. In the value, its derivatives and the
derivatives of these nothing else changes, and what belongs to it is 0.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.loss_cases import name_of

import jaxsoftmax

ROWS, N, HIDDEN = 5, 6, 3
# The last examples and the last class are those that are left out.
OUT, LAST = np.arange(ROWS) >= ROWS - 2, np.arange(N) == N - 1
EXAMPLES = ("examples", "ignored", "cotangent", "weight")
BAD = (np.nan, np.inf, -np.inf, 3e38)
TERMS = {"label_smoothing": 0.1, "z_loss": 0.01}
CAP = {"logits_soft_cap": 5.0}

INTEGER, DENSE = "softmax_cross_entropy_with_integer_labels", "softmax_cross_entropy"
TOKENS, LINEAR = "token_logprobs_and_entropy", "linear_softmax_cross_entropy"
LINEAR_TOKENS = f"linear_{TOKENS}"

# The function, what is left out, arrays beside the logits, and other arguments.
CASES = [
    ("softmax", "classes", {"scale": (ROWS, N)}, {}),
    ("softmax", "-inf", {"scale": (ROWS, 1)}, {}),
    ("log_softmax", "classes", {"scale": (ROWS, N)}, {}),
    ("log_softmax", "-inf", {}, {"scale": 0.7}),
    ("logsumexp", "classes", {}, {"axis": -1}),
    ("logsumexp", "classes", {"b": (ROWS, N)}, {"axis": -1}),
    ("logsumexp", "-inf", {}, {"axis": -1}),
    ("logsumexp", "-inf", {"b": (ROWS, N)}, {"axis": -1}),
    ("logsumexp", "cotangent", {"b": (ROWS, 1)}, {"axis": -1}),
    (
        INTEGER,
        "examples",
        {"scale": (ROWS, 1), "class_weights": N},
        {"reduction": "sum", **TERMS},
    ),
    (INTEGER, "ignored", {}, {"reduction": "mean", **TERMS}),
    (INTEGER, "classes", {"scale": (ROWS, N), "class_weights": N}, TERMS),
    (INTEGER, "-inf", {}, {"return_lse": True, "scale": 0.7, **TERMS, **CAP}),
    (INTEGER, "cotangent", {"scale": (ROWS, 1)}, {"return_lse": True, **TERMS}),
    (INTEGER, "weight", {}, {"reduction": "mean"}),
    (DENSE, "examples", {"class_weights": N}, {"reduction": "mean", **CAP}),
    (DENSE, "classes", {"class_weights": N}, TERMS),
    (TOKENS, "ignored", {}, {}),
    (TOKENS, "-inf", {"scale": (ROWS, 1)}, CAP),
    (LINEAR, "examples", {"scale": ROWS}, {"return_lse": True, **TERMS}),
    (LINEAR, "ignored", {}, {"reduction": "mean", **TERMS}),
    (LINEAR, "bias", {"class_weights": N}, {"reduction": "sum", **TERMS}),
    (LINEAR, "cotangent", {"scale": ROWS}, {}),
    (LINEAR, "weight", {}, {"reduction": "mean"}),
    (LINEAR_TOKENS, "ignored", {"scale": ROWS}, {}),
]


@functools.partial(jax.jit, static_argnames="static")
def everything(arrays, dots, cts, fixed, static):
    """Value and derivatives, first and second ones, for the float arrays."""
    name, options, second = static

    def f(arrays):
        given = {**fixed, **arrays}
        leading = [given.pop(k) for k in ("x", "labels", "weights") if k in given]
        return getattr(jaxsoftmax, name)(*leading, **given, **dict(options))

    def gradient(arrays):
        return jax.vjp(f, arrays)[1](cts)[0]

    def gradient_sum(arrays):
        return sum(jnp.sum(jnp.sin(g)) for g in jax.tree.leaves(gradient(arrays)))

    def tangent_product(arrays):
        tangent = jax.jvp(f, (arrays,), (dots,))[1]
        pairs = zip(*map(jax.tree.leaves, (tangent, cts)), strict=True)
        return sum(jnp.vdot(a, b) for a, b in pairs)

    if not second:
        return {"gradient": gradient(arrays)}
    value, tangent = jax.jvp(f, (arrays,), (dots,))
    return {
        "value": value,
        "tangent": tangent,
        "gradient": gradient(arrays),
        "forward over reverse": jax.jvp(gradient, (arrays,), (dots,))[1],
        "reverse over reverse": jax.grad(gradient_sum)(arrays),
        "reverse over forward": jax.grad(tangent_product)(arrays),
    }


class Problem:
    """The arrays of a case, and what of them is left out.

    Attributes:
      arrays, dots, fixed: Floats, their tangents, and the others.
      kept: Arrays that say what is left out, or cannot but be as they are.
    """

    def __init__(self, name, way, shapes, rng):
        self.way, self.kept = way, set()
        labels = np.array([0, 3, 1, 2, 4], np.int32)
        self.arrays, self.fixed = {"x": rng.normal(size=(ROWS, N))}, {}
        if name.startswith("linear"):
            self.arrays["x"] = rng.normal(size=(ROWS, HIDDEN))
            self.arrays["weights"] = rng.normal(size=(HIDDEN, N))
            self.arrays["bias"] = rng.normal(size=N)
        if name == DENSE:
            self.arrays["labels"] = rng.uniform(0.1, 1, size=(ROWS, N))
        elif name not in ("softmax", "log_softmax", "logsumexp"):
            self.fixed["labels"] = labels
        for k, shape in shapes.items():
            self.arrays[k] = rng.uniform(0.5, 1, size=shape)
        if way == "examples":
            self.fixed["where"] = ~OUT
            labels[-1] = 99  # no class
        elif way == "ignored":
            labels[OUT] = -100
        elif way == "classes":
            self.fixed["where"] = ~LAST[None]
        elif way == "weight":
            self.fixed["class_weights"] = np.where(LAST, 0, 1).astype(np.float32)
            labels[OUT] = N - 1
        elif way in ("-inf", "bias"):
            name_of_array = "x" if way == "-inf" else "bias"
            self.arrays[name_of_array][..., -1] = -np.inf
            self.kept.add(name_of_array)
        floats = self.arrays.items()
        self.arrays = {k: a.astype(np.float32) for k, a in floats}
        self.dots = {k: rng.normal(size=a.shape).astype(np.float32) for k, a in floats}

    def out(self, name, shape):
        """Which entries of an array, or of a result where `name` is None."""
        if self.way in EXAMPLES:
            rows = name not in ("weights", "bias", "class_weights") and shape != ()
            found = OUT if len(shape) == 1 else OUT[:, None]
            return np.broadcast_to(found & rows if rows else False, shape)
        if self.way == "bias" and name not in ("weights", "bias", "class_weights"):
            return np.zeros(shape, bool)
        classes = shape[-1:] == (N,)
        return np.broadcast_to(LAST if classes else False, shape)

    def poisoned(self, arrays, bad, kept=()):
        def of(name, a):
            # Gradients of x are products with the weights of all classes.
            worst = 1e30 if name == "weights" else bad
            out = self.out(name, a.shape) & (name not in kept)
            return np.where(out, np.float32(worst), a)

        return {k: of(k, a) for k, a in arrays.items()}


def name_in(path):
    """Of an array in a dict; None in results."""
    return getattr(path[-1], "key", None) if path else None


@pytest.mark.parametrize(
    "case", CASES, ids=lambda c: "-".join([*c[:2], *c[2], name_of(c[3])])
)
def test_has_no_influence(rng, nans_allowed, case):
    name, way, shapes, options = case
    problem = Problem(name, way, shapes, rng)
    if way == "ignored":
        options = {**options, "ignore_index": -100}
    # A product of a row's value or tangent with 0 is for the caller to answer for.
    row_wise = way in ("cotangent", "weight")
    static = (name, tuple(options.items()), not row_wise)
    arrays, dots, fixed = problem.arrays, problem.dots, problem.fixed

    def normal(s):
        ct = rng.normal(size=s.shape).astype(np.float32)
        return np.where(OUT, 0, ct) if way == "cotangent" else ct

    def value(arrays):
        given = {**fixed, **arrays}
        leading = [given.pop(k) for k in ("x", "labels", "weights") if k in given]
        return getattr(jaxsoftmax, name)(*leading, **given, **options)

    cts = jax.tree.map(normal, jax.eval_shape(value, arrays))
    want = everything(arrays, dots, cts, fixed, static)
    for bad in BAD:
        bad_arrays = problem.poisoned(arrays, bad, problem.kept)
        bad_dots, bad_cts = dots, cts
        if not row_wise:
            bad_dots = problem.poisoned(dots, bad)
            bad_cts = jax.tree.map(
                lambda c, bad=bad: problem.poisoned({None: c}, bad)[None], cts
            )
        got = everything(bad_arrays, bad_dots, bad_cts, fixed, static)
        for mode, tree in got.items():
            wanted = jax.tree.leaves(want[mode])
            found = jax.tree_util.tree_leaves_with_path(tree)
            for (path, a), b in zip(found, wanted, strict=True):
                a, b = np.asarray(a), np.asarray(b)
                out = problem.out(name_in(path), a.shape)
                message = f"{mode}, {path}, {bad}"
                np.testing.assert_allclose(
                    a[~out], b[~out], rtol=1e-4, atol=1e-4, err_msg=message
                )
                assert np.isfinite(a[~out]).all(), message
                nothing = -np.inf if (name, mode) == ("log_softmax", "value") else 0
                assert (a[out] == nothing).all(), message
