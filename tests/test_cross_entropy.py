"""Cross-entropy and token statistics: against oracle and optax, edge rows, errors."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import oracle
from support.compilation import exact_jit
from support.loss_cases import (
    EPS,
    TINY,
    amplification,
    assert_rows_close,
    assert_within,
    cost_bar,
    covering,
    eps_of,
    gradient_bar,
    name_of,
)

from jaxsoftmax import (
    softmax_cross_entropy,
    softmax_cross_entropy_with_integer_labels,
    token_logprobs_and_entropy,
)

DTYPES = ["float32", "bfloat16", "float16"]
CAP = 5.0


def _vjp(f, static, labels, where, floats, g):
    def call(floats):
        arguments = {"labels": labels, **floats}
        return f(arguments.pop("logits"), where=where, **arguments, **dict(static))

    y, pull = jax.vjp(call, floats)
    return y, pull(g)[0]


_vjp_quick = jax.jit(_vjp, static_argnames=("f", "static"))
_vjp_as_users = exact_jit(_vjp, static_argnames=("f", "static"))


def vjp(f, x, labels, g, where=None, arrays=None, compiled=_vjp_quick, **static):
    """Value, and the cotangent of each float array by its name."""
    floats = {"logits": x, **(arrays or {})}
    if f is softmax_cross_entropy and jnp.issubdtype(labels.dtype, jnp.floating):
        floats["labels"], labels = labels, None
    return compiled(f, tuple(static.items()), labels, where, floats, g)


exact_vjp = functools.partial(vjp, compiled=_vjp_as_users)


# --- the options ----------------------------------------------------------------------

FACTORS = {
    "dtype": DTYPES,
    "dense": (False, True),
    "where": (None, "classes", "examples"),
    "ignore_index": (None, -100),
    "label_smoothing": (0.0, 0.1),
    "z_loss": (0.0, 0.01),
    "logits_soft_cap": (None, CAP),
    "scale": (None, 0.3, "array"),
    "class_weights": (False, True),
    "reduction": ("none", "sum", "mean"),
    "return_lse": (False, True),
}


def logits_and_labels(rng, dtype, softcap):
    """Rows of 7 of every kind: plain, dominated, shifted, huge, with -inf, empty."""
    x = 3 * rng.normal(size=(18, 7))
    labels = rng.integers(7, size=18)
    top = 40 if softcap is None else 4 * softcap
    x[range(4, 9), labels[4:9]] = np.linspace(6, top, 5)
    x[range(9, 11), (labels[9:11] + 1) % 7] = 15
    if softcap is None:
        x[11:13] += 1e4
        x[13:15] *= 3e3
    x[range(15, 17), (labels[15:17] + 3) % 7] = -np.inf
    x[17] = -np.inf
    return jnp.array(x, dtype), labels


def check_options(case, implementation, rng):
    """Values, and the gradient of all arrays."""
    o = dict(case)
    dtype, dense, kind = o.pop("dtype"), o.pop("dense"), o.pop("where")
    softcap, smoothing, z_loss = (
        o[k] for k in ("logits_soft_cap", "label_smoothing", "z_loss")
    )
    x, labels = logits_and_labels(rng, dtype, softcap)
    rows, n = x.shape
    classes = np.array(rng.random(size=(rows, n)) < 0.8)
    classes[np.arange(rows), labels] = True
    examples = rng.random(size=rows) < 0.8
    where = {None: None, "classes": classes, "examples": examples}[kind]
    mask = classes if kind == "classes" else None
    counted = examples if kind == "examples" else np.ones(rows, bool)
    arrays = {}
    if o.pop("class_weights"):
        arrays["class_weights"] = rng.uniform(0.5, 2, size=n).astype(np.float32)
    if o["scale"] == "array":
        arrays["scale"] = rng.uniform(0.5, 1, size=(rows, 1)).astype(np.float32)
        del o["scale"]
    if dense:
        f, labels = softmax_cross_entropy, rng.random(size=(rows, n))
        labels = np.where(np.isneginf(np.asarray(x, np.float32)), 0, labels)
        labels = labels.astype(np.float32)
        del o["ignore_index"]
    else:
        f, labels = softmax_cross_entropy_with_integer_labels, labels.astype(np.int32)
        if o["ignore_index"] is not None:
            labels[[1, 6]] = o["ignore_index"]
            counted = counted & (labels != o["ignore_index"])
    g_lse = rng.normal(size=rows).astype(np.float32)
    g = np.float32(1.7)
    if o["reduction"] == "none":
        g = rng.normal(size=rows).astype(np.float32)
        g[2] = 0
    returns_lse = o["return_lse"]
    y, d = vjp(
        f,
        x,
        labels,
        (g, g_lse) if returns_lse else g,
        where,
        arrays,
        implementation=implementation,
        **o,
    )

    scale = arrays.get("scale", o.get("scale"))
    of = oracle.rows(x, mask, 1 if scale is None else scale, softcap)
    before = oracle.label_weights(of, labels, smoothing, mask)
    w = arrays.get("class_weights", np.ones(n)).astype(np.longdouble)
    t = before * w
    amplified = amplification(np.asarray(x, np.float64), scale, softcap)
    costs = cost_bar(of.cost, amplified[:, None])
    finite = np.where(np.isneginf(of.lse), 0, of.lse)
    lse_bar = EPS * (8 * np.maximum(np.abs(finite), 1) + amplified)
    want = np.where(counted, oracle.cross_entropy(of, t, z_loss), 0)
    bar = oracle.weighted_cost(t, costs).sum(-1)
    bar = bar + 2 * z_loss * np.abs(finite) * lse_bar + 2 * EPS * want
    count = max(counted.sum(), 1) if o["reduction"] == "mean" else 1
    if o["reduction"] != "none":
        want, bar = want.sum() / count, (bar.sum() + 2 * EPS * want.sum()) / count
    value, lse = y if returns_lse else (y, None)
    assert (value.dtype, value.shape) == (jnp.float32, want.shape)
    assert_within(value, want, bar)
    if returns_lse:
        assert (lse.dtype, lse.shape) == (jnp.float32, (rows,))
        assert_within(lse, np.where(counted, of.lse, 0), lse_bar)
        g_lse = np.where(counted, g_lse, 0)
    else:
        g_lse = np.zeros(rows)

    each = np.where(counted, g, 0) / np.longdouble(count)
    dx = oracle.cross_entropy_vjp(of, t, each, g_lse, z_loss)
    assert (d["logits"].dtype, d["logits"].shape) == (x.dtype, x.shape)
    twice = dtype == "bfloat16" and o["reduction"] != "none"
    roundings = 1 + twice
    if smoothing and "class_weights" in arrays:
        roundings = 3  # the sum of two terms
    bars = gradient_bar(dtype, roundings, amplified)
    assert_rows_close(d["logits"], dx, bars, dtype)
    assert (np.asarray(d["logits"])[~of.valid] == 0).all()
    assert (np.asarray(d["logits"])[(each == 0) & (g_lse == 0)] == 0).all()
    weight = np.abs(each)[:, None]
    if dense:
        part = weight * (1 - smoothing) * w * of.valid
        want = each[:, None] * (1 - smoothing) * w * np.where(of.valid, of.cost, 0)
        absent = ~of.valid if mask is None else ~of.valid & mask
        absent &= weight != 0  # a weight there would cost +inf
        assert_within(
            np.where(absent, 0, d["labels"]), want, part * costs + 4 * EPS * abs(want)
        )
        assert np.isinf(np.asarray(d["labels"])[absent]).all()
    if "class_weights" in arrays:
        want = each[:, None] * oracle.weighted_cost(before, of.cost)
        bound = (weight * before * costs + 4 * EPS * np.abs(want)).sum(0)
        assert_within(d["class_weights"], np.where(of.valid, want, 0).sum(0), bound)
    if "scale" in arrays:
        at = np.where(of.valid, np.asarray(x, np.float64), 0) / arrays["scale"]
        bound = gradient_bar("float32", 1, amplified) * np.abs(dx).max(-1)
        assert_within(
            d["scale"][:, 0], (dx * at).sum(-1), bound * np.abs(at).sum(-1) + 1e-37
        )


@pytest.mark.parametrize("case", covering(FACTORS, 3), ids=name_of)
@pytest.mark.pairwise(1)
def test_any_three_options(rng, case):
    check_options(case, "xla", rng)


@pytest.mark.parametrize("case", covering(FACTORS, 2), ids=name_of)
@pytest.mark.pairwise(1)
def test_any_two_options(rng, case):
    """Where the rules see nothing of the kernels but their results."""
    check_options(case, "opaque", rng)


def normal(rng, shape, dtype="float32", scale=3.0):
    return jnp.array(scale * rng.normal(size=shape), dtype)


def weighted(rng, rows):
    return rng.normal(size=rows).astype(np.float32)


class TestPrecision:
    """Where the plain formulas lose digits."""

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    @pytest.mark.pairwise(1)
    def test_mean_is_as_exact_as_none(self, implementation, rng, dtype):
        """Cotangents that are no power of two; a loss scale in float16.

        There P / rows is subnormal, unless it is multiplied before it is rounded.
        """
        x = normal(rng, (256, 10), dtype)
        labels = rng.integers(10, size=256).astype(np.int32)
        of = oracle.rows(x)
        t = oracle.label_weights(of, labels)
        scales = (2**15, 30001.0) if dtype == "float16" else (1 / 3, 1.7, 30001.0)
        f = softmax_cross_entropy_with_integer_labels
        for g in np.float32(scales):
            each = np.full(256, g / 256, np.float32)
            want = oracle.cross_entropy_vjp(of, t, each)
            for reduction, ct in (("none", each), ("mean", g)):
                static = {"reduction": reduction, "implementation": implementation}
                _, d = exact_vjp(f, x, labels, ct, **static)
                # In bfloat16 a finished gradient is scaled once more.
                roundings = 1 + (dtype == "bfloat16" and reduction != "none")
                bar = gradient_bar(dtype, roundings)
                assert oracle.row_error(d["logits"], want, dtype) <= bar, (g, reduction)

    @pytest.mark.parametrize("reduction", ["none", "sum"])
    @pytest.mark.parametrize("dense", [False, True])
    @pytest.mark.pairwise(1)
    def test_label_that_dominates(self, implementation, rng, reduction, dense):
        """1 - P of it from 1e-1 down to 1e-16; the row sums to 0 as P does to 1."""
        x = rng.normal(size=(64, 20))
        labels = rng.integers(20, size=64).astype(np.int32)
        x[np.arange(64), labels] = np.linspace(5, 40, 64)
        x = jnp.array(x, jnp.float32)
        g = weighted(rng, 64) if reduction == "none" else np.float32(1.7)
        f, given = softmax_cross_entropy_with_integer_labels, labels
        if dense:
            f, given = softmax_cross_entropy, np.eye(20, dtype=np.float32)[labels]
        static = {"reduction": reduction, "implementation": implementation}
        y, d = exact_vjp(f, x, given, g, **static)
        of = oracle.rows(x)
        t = oracle.label_weights(of, labels)
        want, bar = oracle.cross_entropy(of, t), 8 * EPS * oracle.cross_entropy(of, t)
        if reduction == "sum":
            want, bar = want.sum(), bar.sum()
        assert_within(y, want, bar)
        dx = np.asarray(d["logits"], np.float64)
        want = oracle.cross_entropy_vjp(of, t, np.broadcast_to(g, 64))
        assert oracle.row_error(dx, want, np.float32) <= gradient_bar("float32")
        np.testing.assert_array_less(np.abs(dx.sum(-1)), 8 * EPS * np.abs(dx).max(-1))

    def test_common_offset(self, implementation, rng):
        """Bitwise no change where the shifted logits are exact, but for lse."""
        x = jnp.array(rng.integers(-50, 50, size=(8, 33)) / 8, jnp.float32)
        labels = rng.integers(33, size=8).astype(np.int32)
        g = (weighted(rng, 8), np.zeros(8, np.float32))
        run = functools.partial(
            exact_vjp,
            softmax_cross_entropy_with_integer_labels,
            labels=labels,
            g=g,
            label_smoothing=0.1,
            return_lse=True,
            implementation=implementation,
        )
        (loss, lse), d = run(x)
        (moved, moved_lse), d_moved = run(x + 8192)
        chex.assert_trees_all_equal((moved, d_moved), (loss, d))
        np.testing.assert_allclose(moved_lse, lse + 8192, rtol=2 * EPS)

    def test_saturated_cap(self, implementation, rng):
        """1 - tanh^2 is below eps of 1 - 1: logits of up to four times the cap."""
        x = jnp.array(rng.uniform(-4, 4, size=(32, 9)) * CAP, jnp.float32)
        x = x.at[:, 0].set(4 * CAP).at[:, 1].set(-4 * CAP)
        labels = rng.integers(9, size=32).astype(np.int32)
        labels[:8], labels[8:16] = 0, 1
        g = weighted(rng, 32)
        static = {"logits_soft_cap": CAP, "implementation": implementation}
        f = softmax_cross_entropy_with_integer_labels
        dx = exact_vjp(f, x, labels, g, **static)[1]["logits"]
        of = oracle.rows(x, softcap=CAP)
        want = oracle.cross_entropy_vjp(of, oracle.label_weights(of, labels), g)
        # Of each entry: P is known to 8 CAP eps, and a slope of 8 is.
        bar = gradient_bar("float32", 1, 8 * CAP + 8)
        on = np.eye(9, dtype=bool)[labels]
        part = np.abs(g)[:, None] * of.slope * np.where(on, of.others, of.p)
        assert (np.abs(np.asarray(dx, np.float64) - want) <= bar * part).all()

    @pytest.mark.parametrize(
        ("dense", "reduction"), [(False, "none"), (False, "mean"), (True, "none")]
    )
    @pytest.mark.pairwise(1)
    def test_float64(self, implementation, rng, dense, reduction):
        with jax.enable_x64(True):
            x = jnp.array(5 * rng.normal(size=(16, 9)))
            labels = rng.integers(9, size=16)
            x = x.at[jnp.arange(16), labels].add(jnp.linspace(0.0, 30.0, 16))
            f, given = softmax_cross_entropy_with_integer_labels, labels
            if dense:
                f, given = softmax_cross_entropy, rng.random(size=x.shape)
            g = rng.normal(size=16) if reduction == "none" else np.float64(1.7)
            static = {"reduction": reduction, "implementation": implementation}
            y, d = exact_vjp(f, x, given, g, z_loss=0.01, **static)
            of = oracle.rows(x)
            t = oracle.label_weights(of, given)
            want = oracle.cross_entropy(of, t, 0.01)
            each = g if reduction == "none" else np.full(16, g / 16)
            want = want if reduction == "none" else want.mean()
            assert (y.dtype, d["logits"].dtype) == (np.float64, np.float64)
            np.testing.assert_allclose(y, want.astype(float), rtol=16 * eps_of("f8"))
            dx = oracle.cross_entropy_vjp(of, t, each, 0, 0.01)
            error = oracle.row_error(d["logits"], dx, np.float64)
            assert error <= 16 * eps_of("f8")

    @pytest.mark.parametrize(
        ("n", "dtype", "reduction"),
        [
            (50257, "float32", "mean"),
            (128256, "bfloat16", "none"),
            (151936, "float32", "none"),
            (262144, "bfloat16", "mean"),
        ],
    )
    @pytest.mark.pairwise(1)
    def test_vocabularies(self, implementation, rng, n, dtype, reduction):
        x = normal(rng, (3, n), dtype).at[2, n - 1].set(40)
        labels = np.array([17, n - 2, n - 1], np.int32)
        g = weighted(rng, 3) if reduction == "none" else np.float32(1.7)
        static = {"reduction": reduction, "implementation": implementation}
        f = softmax_cross_entropy_with_integer_labels
        y, d = exact_vjp(f, x, labels, g, z_loss=1e-4, **static)
        of = oracle.rows(x)
        t = oracle.label_weights(of, labels)
        want = oracle.cross_entropy(of, t, 1e-4)
        each = g if reduction == "none" else np.full(3, g / 3)
        want = want if reduction == "none" else want.mean()
        # The rounding of n additions in an order that is not known.
        sum_error = np.sqrt(n)
        np.testing.assert_allclose(y, want.astype(float), rtol=(8 + sum_error) * EPS)
        dx = oracle.cross_entropy_vjp(of, t, each, 0, 1e-4)
        twice = dtype == "bfloat16" and reduction == "mean"
        bar = gradient_bar(dtype, 1 + twice, sum_error)
        assert oracle.row_error(d["logits"], dx, dtype) <= bar


class TestAgainstOptax:
    """Drop-in: values and gradients, for the same positional arguments."""

    @pytest.mark.parametrize(
        ("shape", "axis", "masked"),
        [
            ((7, 5), 0, "classes"),
            ((2, 3, 4), 1, "examples"),
            ((2, 3, 4, 5), (2, 3), "examples"),
            ((2, 3, 4, 5), (3, 2), "classes"),
            ((2, 3, 4, 5), (3, -4, 1), None),
        ],
    )
    @pytest.mark.parametrize("dense", [False, True])
    @pytest.mark.pairwise(1)
    def test_axes_and_masks(self, implementation, rng, shape, axis, masked, dense):
        axes = {a % len(shape) for a in ((axis,) if isinstance(axis, int) else axis)}
        batch = tuple(n for i, n in enumerate(shape) if i not in axes)
        n = int(np.prod([shape[a] for a in axes]))
        x = normal(rng, shape)
        name = "softmax_cross_entropy"
        if dense:
            labels = rng.random(size=shape).astype(np.float32)
        else:
            name += "_with_integer_labels"
            labels = jnp.array(rng.integers(n, size=batch), jnp.int32)
        where = None
        if masked is not None:
            # Of classes one that every label may be of: both define a finite loss.
            where = rng.random(size=batch if masked == "examples" else shape) < 0.7
            where = jnp.array(where)
        g = rng.normal(size=batch).astype(np.float32)
        ours = {
            "softmax_cross_entropy": softmax_cross_entropy,
            "softmax_cross_entropy_with_integer_labels": (
                softmax_cross_entropy_with_integer_labels
            ),
        }[name]
        ours = functools.partial(ours, implementation=implementation)

        @jax.jit
        def both(x, labels, where):
            def of(f):
                y, pull = jax.vjp(lambda x: f(x, labels, axis, where), x)
                return y, pull(g)[0]

            with jax.numpy_rank_promotion("allow"):
                reference = of(getattr(optax.losses, name))
            return of(ours), reference

        with jax.debug_nans(False):  # optax's own NaN in an empty row
            (y, dx), (want, want_dx) = both(x, labels, where)
        chosen = np.isfinite(np.asarray(y)) & np.isfinite(np.asarray(want))
        if masked == "classes" and not dense:
            # A label that is masked costs +inf; optax subtracts its logit all the same.
            assert np.isin(np.asarray(y)[~chosen], np.inf).all()
        else:
            assert np.isfinite(np.asarray(y)).all()
        np.testing.assert_allclose(
            np.asarray(y)[chosen], np.asarray(want)[chosen], rtol=16 * EPS, atol=8 * EPS
        )
        at = np.expand_dims(chosen, tuple(sorted(axes)))
        at = at & np.isfinite(np.asarray(want_dx))
        assert at.any()
        total = n if dense else 1  # of the labels, at most: what P is multiplied by
        np.testing.assert_allclose(
            np.where(at, dx, 0), np.where(at, want_dx, 0), atol=16 * total * EPS
        )

    @pytest.mark.parametrize(
        ("shape", "labels_shape", "axis"),
        [
            ((2, 3), (1,), -1),
            ((1, 3), (2,), -1),
            ((2, 1, 3), (1, 4), -1),
            ((3, 1, 2), (5, 1), 0),
            ((3,), (2, 3), -1),
            ((1, 3), (2, 1), -1),
            ((2, 1, 3), (4, 2, 5, 3), -1),
        ],
    )
    def test_labels_and_logits_broadcast(self, rng, shape, labels_shape, axis):
        """Indices as many dimensions as rows have; not the classes of the logits."""
        x, g = normal(rng, shape), 0.5
        name = "softmax_cross_entropy"
        if len(labels_shape) < len(shape):
            name += "_with_integer_labels"
            labels = jnp.array(rng.integers(3, size=labels_shape), jnp.int32)
        else:
            labels = rng.random(size=labels_shape).astype(np.float32)

        @functools.partial(jax.jit, static_argnums=0)
        def of(f, x):
            y, pull = jax.vjp(lambda x: f(x, labels, axis), x)
            return y, pull(jnp.full_like(y, g))[0]

        with jax.numpy_rank_promotion("allow"):
            want, want_dx = of(getattr(optax.losses, name), x)
        y, dx = of(globals()[name], x)
        np.testing.assert_allclose(y, want, rtol=16 * EPS)
        np.testing.assert_allclose(dx, want_dx, atol=64 * EPS)
        # A row of labels that are shared is counted as often as it is used.
        mean = globals()[name](x, labels, axis, reduction="mean")
        np.testing.assert_allclose(mean, np.mean(want), rtol=16 * EPS)

    def test_all_axes(self, implementation, rng):
        x = normal(rng, (3, 4))
        t = rng.random(size=(3, 4)).astype(np.float32)
        want = optax.losses.softmax_cross_entropy(x, t, None)
        got = softmax_cross_entropy(x, t, None, implementation=implementation)
        np.testing.assert_allclose(got, want, rtol=8 * EPS)
        flat = softmax_cross_entropy_with_integer_labels
        got = flat(x, 7, None, implementation=implementation)
        want = flat(x.reshape(-1), jnp.int32(7), implementation=implementation)
        np.testing.assert_array_equal(got, want)

    @pytest.mark.parametrize("dense", [False, True])
    def test_class_weights_are_in_the_order_of_the_axes(self, rng, dense):
        x = normal(rng, (2, 3, 4))
        w = rng.uniform(0.5, 2, size=8).astype(np.float32)
        flat = x.transpose(1, 2, 0).reshape(3, 8)
        if dense:
            f, labels = softmax_cross_entropy, rng.random(size=x.shape)
            labels = labels.astype(np.float32)
            flat_labels = labels.transpose(1, 2, 0).reshape(3, 8)
        else:
            f = softmax_cross_entropy_with_integer_labels
            labels = flat_labels = np.array([0, 3, 6], np.int32)
        options = {"label_smoothing": 0.2, "class_weights": w}
        got = f(x, labels, (2, 0), **options)
        np.testing.assert_allclose(got, f(flat, flat_labels, **options), rtol=8 * EPS)


# Options that take every path of the code; the last two have arrays.
PATHS = {
    "plain": {},
    "all numbers": {"label_smoothing": 0.1, "z_loss": 0.01, "logits_soft_cap": CAP},
    "class weights": {"class_weights": np.float32([0.0, 2.0, 0.5, 1.0, 1.5])},
    "all arrays": {
        "class_weights": np.float32([1.5, 2.0, 0.5, 1.0, 0.7]),
        "label_smoothing": 0.1,
        "scale": np.float32(0.7),
        "logits_soft_cap": CAP,
    },
}


@pytest.fixture(params=list(PATHS))
def path(request):
    return PATHS[request.param]


def split(options):
    """Arrays and static options."""
    arrays = {
        k: v for k, v in options.items() if isinstance(v, np.ndarray | np.generic)
    }
    return arrays, {k: v for k, v in options.items() if k not in arrays}


@functools.partial(jax.jit, static_argnames="static")
def _reductions(static, arrays, x, labels, examples):
    f = functools.partial(
        softmax_cross_entropy_with_integer_labels, where=examples, **dict(static)
    )
    found = {}
    for reduction in ("none", "mean"):
        call = lambda x, arrays: f(x, labels, reduction=reduction, **arrays)  # noqa: B023
        y, pull = jax.vjp(call, x, arrays)
        g = 0.7 * jnp.arange(1.0, 1.0 + y.size).reshape(y.shape)
        found[reduction] = (y, *pull(g))
    return found


class TestPaths:
    """Examples without a loss, or with none that is defined, among others."""

    @pytest.fixture
    def run(self, path, implementation):
        """(x, labels, examples) -> {reduction: (value, dx, arrays' gradients)}."""
        arrays, static = split(path)
        static |= {"ignore_index": -100, "implementation": implementation}
        return functools.partial(_reductions, tuple(static.items()), arrays)

    labels = np.array([1, 2, 0, 3, 4, 1], np.int32)
    every = np.ones(6, bool)

    @pytest.mark.pairwise(1)
    def test_all(self, run, rng, nans_allowed):
        """One test, that all may share what is compiled."""
        self.no_part_in_anything(run, rng)
        self.no_example_at_all(run, rng)
        self.all_minus_inf(run, rng)
        self.no_class(run, rng)

    def no_part_in_anything(self, run, rng):
        """Ignored or masked: as if they were not there, whatever is in them."""
        x = normal(rng, (6, 5))
        out = np.array([False, True, False, True, True, False])
        bad = x.at[1].set(jnp.nan).at[3, 2].set(jnp.inf).at[4].set(-jnp.inf)
        want = run(x, self.labels, ~out)
        for got in (
            run(bad, np.where(out, np.int32(-100), self.labels), self.every),
            run(bad, np.where(out, np.int32(99), self.labels), ~out),
        ):
            chex.assert_trees_all_close(got, want, rtol=16 * EPS, atol=8 * EPS)
            assert (got["none"][0][out] == 0).all()
            for _, dx, _ in got.values():
                assert (dx[out] == 0).all()

    def no_example_at_all(self, run, rng):
        x = normal(rng, (6, 5)).at[1].set(jnp.nan)
        for got in (
            run(x, np.full(6, -100, np.int32), self.every),
            run(x, self.labels, ~self.every),
        ):
            chex.assert_trees_all_equal(got, jax.tree.map(np.zeros_like, got))

    def all_minus_inf(self, run, rng):
        """Loss and gradient 0, but counted by the mean."""
        x = normal(rng, (6, 5))
        empty = np.array([False, True, False, False, True, False])
        got = run(x.at[1].set(-jnp.inf).at[4].set(-jnp.inf), self.labels, self.every)
        want = run(x, self.labels, ~empty)
        want["mean"] = jax.tree.map(lambda v: v * (4 / 6), want["mean"])
        chex.assert_trees_all_close(got, want, rtol=16 * EPS, atol=8 * EPS)
        assert (got["none"][0][empty] == 0).all()
        for _, dx, _ in got.values():
            assert (dx[empty] == 0).all()

    def no_class(self, run, rng):
        """NaN, in the gradient of that example alone; a mask hides it."""
        x = normal(rng, (6, 5))
        labels = np.where(np.arange(6) == 1, np.int32(17), self.labels)
        got = run(x, labels, self.every)
        want = run(x, self.labels, self.every)
        one = np.arange(6) == 1
        np.testing.assert_array_equal(np.isnan(got["none"][0]), one)
        assert np.isnan(got["mean"][0])
        for reduction, (_, dx, _) in got.items():
            np.testing.assert_array_equal(np.isnan(dx).all(-1), one)
            chex.assert_trees_all_close(
                dx[~one], want[reduction][1][~one], rtol=16 * EPS, atol=8 * EPS
            )
        chex.assert_tree_all_finite(run(x, labels, ~one))


class TestOverwriteLogits:
    """Where the gradient is written is no matter of what it is."""

    @pytest.mark.parametrize(
        ("shape", "options"),
        [
            (
                (32, 64),
                {"label_smoothing": 0.1, "z_loss": 0.01, "logits_soft_cap": CAP},
            ),
            ((31, 64), {"class_weights": np.linspace(0, 2, 64, dtype=np.float32)}),
            ((6, 4096), {"scale": np.float32(0.7), "ignore_index": 1}),
            ((6, 7000), {"scale": 0.7, "reduction": "sum"}),
            ((6, 64), {"reduction": "none"}),
        ],
        ids=lambda value: str(value) if isinstance(value, tuple) else next(iter(value)),
    )
    @pytest.mark.pairwise(1)
    def test_same(self, implementation, rng, shape, options):
        """Also where the logits have a use after."""
        x = normal(rng, shape, "bfloat16")
        labels = rng.integers(shape[1], size=shape[0]).astype(np.int32)
        options = {"reduction": "mean", "implementation": implementation, **options}

        @jax.jit
        def run(x):
            def found(over, used_later):
                f = functools.partial(
                    softmax_cross_entropy_with_integer_labels,
                    labels=labels,
                    overwrite_logits=over,
                    **options,
                )
                logits = x * (2.0 + used_later)
                value_and_grad = jax.value_and_grad(lambda x: jnp.sum(f(x)))
                return value_and_grad(logits), logits - 1 if used_later else None

            return [[found(over, later) for later in (0, 1)] for over in (False, True)]

        want, got = run(x)
        chex.assert_trees_all_close(got, want, rtol=eps_of("bfloat16"))

    @pytest.mark.parametrize("reduction", ["none", "mean"])
    def test_nothing_changes_on_the_cpu(self, rng, reduction):
        x, labels = normal(rng, (6, 64)), np.arange(6, dtype=np.int32)

        def text(over):
            f = functools.partial(
                softmax_cross_entropy_with_integer_labels,
                reduction=reduction,
                overwrite_logits=over,
            )
            gradient = jax.grad(lambda x: jnp.sum(f(x, labels)))
            traced = jax.jit(gradient).trace(x)
            return traced.lower(lowering_platforms=("cpu",)).as_text()

        assert text(True) == text(False)


class TestEdgeRows:
    """Semantics where the formula alone would give NaN."""

    def test_empty_rows(self, implementation, rng):
        """All -inf, or all masked, with lse and with labels that are weights."""
        x = normal(rng, (4, 5)).at[1].set(-jnp.inf)
        empty = np.array([False, True, False, True])
        where = np.ones((4, 5), bool)
        where[3] = False
        g = np.ones(4, np.float32)
        for f, labels in (
            (softmax_cross_entropy_with_integer_labels, np.arange(4)),
            (softmax_cross_entropy, np.ones((4, 5), np.float32)),
        ):
            (loss, lse), d = vjp(
                f,
                x,
                labels.astype(np.float32 if labels.ndim == 2 else np.int32),
                (g, g),
                where,
                return_lse=True,
                z_loss=0.1,
                implementation=implementation,
            )
            assert (loss[empty] == 0).all()
            assert (lse[empty] == -np.inf).all()
            assert (d["logits"][empty] == 0).all()
            assert (np.asarray(loss)[~empty] > 0).all()

    @pytest.mark.parametrize("reduction", ["none", "mean"])
    def test_row_of_minus_inf_without_a_mask(self, implementation, rng, reduction):
        """Its lse is -inf, and so is the slope of the square of that."""
        x = normal(rng, (3, 5)).at[1].set(-jnp.inf)
        labels = np.arange(3, dtype=np.int32)
        g = np.float32(1) if reduction == "mean" else np.ones(3, np.float32)
        static = {"reduction": reduction, "implementation": implementation}
        f = softmax_cross_entropy_with_integer_labels
        _, d = vjp(f, x, labels, g, z_loss=0.1, **static)
        assert (d["logits"][1] == 0).all()
        assert (np.asarray(d["logits"])[[0, 2]] != 0).all()

    def test_lse_of_a_masked_nan(self, implementation, rng, nans_allowed):
        x = normal(rng, (4, 5)).at[1, 2].set(jnp.nan)
        labels, g = np.arange(4, dtype=np.int32), weighted(rng, 4)
        shown = np.array([True, False, True, True])
        (loss, lse), d = vjp(
            softmax_cross_entropy_with_integer_labels,
            x,
            labels,
            (g, g),
            shown,
            return_lse=True,
            z_loss=0.1,
            implementation=implementation,
        )
        assert (loss[1], lse[1]) == (0, 0)
        assert (d["logits"][1] == 0).all()
        chex.assert_tree_all_finite((loss, lse, d))

    @pytest.mark.parametrize(("reduction", "cap"), [("none", None), ("sum", CAP)])
    @pytest.mark.pairwise(1)
    def test_minus_inf(self, implementation, rng, reduction, cap):
        """Off the label no part in the row, as if masked; on it, a loss of +inf."""
        x = normal(rng, (3, 6)).at[:, 2].set(-jnp.inf)
        labels = np.array([0, 2, 5], np.int32)
        where = np.arange(6) != 2
        g = weighted(rng, 3) if reduction == "none" else np.float32(1.7)
        f = softmax_cross_entropy_with_integer_labels
        static = {"reduction": reduction, "implementation": implementation}
        y, d = vjp(f, x, labels, g, logits_soft_cap=cap, **static)
        hidden = x.at[:, 2].set(7)
        y_masked, d_masked = vjp(
            f, hidden, labels, g, where[None], logits_soft_cap=cap, **static
        )
        of = oracle.rows(x, softcap=cap)
        t = oracle.label_weights(of, labels)
        want = oracle.cross_entropy(of, t)
        want = want if reduction == "none" else want.sum()
        dx = oracle.cross_entropy_vjp(of, t, np.broadcast_to(g, 3))
        assert np.isinf(want).any()
        for value, gradient in ((y, d), (y_masked, d_masked)):
            assert_within(value, want, (16 + 8 * (cap or 0)) * EPS * (1 + np.abs(want)))
            assert (np.asarray(gradient["logits"])[:, 2] == 0).all()
            bar = gradient_bar("float32", 1, 8 * (cap or 0))
            assert oracle.row_error(gradient["logits"], dx, np.float32) <= bar

    @pytest.mark.parametrize("kind", ["integer", "dense", "tokens"])
    @pytest.mark.pairwise(1)
    def test_nan_and_inf_stay_in_their_example(
        self, implementation, rng, kind, nans_allowed
    ):
        x = normal(rng, (4, 5))
        labels = np.array([1, 2, 0, 3], np.int32)
        where = np.ones((4, 5), bool)
        where[:, 4] = False
        g, static = weighted(rng, 4), {"implementation": implementation}
        if kind == "tokens":
            f = token_logprobs_and_entropy
            g = type(f(x, labels))(g, g, g)
        elif kind == "integer":
            f = softmax_cross_entropy_with_integer_labels
            static |= {"label_smoothing": 0.1, "z_loss": 0.1}
        else:
            f, labels = softmax_cross_entropy, np.eye(5, dtype=np.float32)[labels]
        clean, d = vjp(f, x, labels, g, where, **static)
        for bad in (np.nan, np.inf):
            # On the label in one example, off it in another, masked in a third.
            poisoned = x.at[1, 2].set(bad).at[2, 3].set(bad).at[3, 4].set(bad)
            y, d_bad = vjp(f, poisoned, labels, g, where, **static)
            for value, want in zip(*map(jax.tree.leaves, (y, clean)), strict=True):
                assert not np.isfinite(np.asarray(value)[1:3]).any()
                np.testing.assert_allclose(value[::3], want[::3], rtol=4 * EPS)
            loss = y[0] if kind == "tokens" else y
            assert np.isnan(np.asarray(loss)[1:3]).all()
            dx, want = np.asarray(d_bad["logits"]), d["logits"]
            assert np.isnan(dx[1:3, :4]).all()
            np.testing.assert_allclose(dx[::3], want[::3], rtol=8 * EPS, atol=8 * EPS)
            assert (dx[:, 4] == 0).all()

    @pytest.mark.parametrize(
        ("dtype", "n", "bad"),
        [
            ("int32", 5, (-1, 5, 2**31 - 1, -(2**31), -2, -3, -100)),
            ("int8", 300, (-1, -128)),
        ],
    )
    @pytest.mark.pairwise(1)
    def test_labels_that_are_no_class(
        self, implementation, rng, dtype, n, bad, nans_allowed
    ):
        """NaN in their example, unless nothing asks for it."""
        x = normal(rng, (len(bad) + 3, n))
        labels = np.array([0, *bad, n - 1 if n < 127 else 127, bad[0]], dtype)
        valid = np.array([True, *(False for _ in bad), True, False])
        asked = np.arange(len(labels)) < len(labels) - 1
        g = np.where(asked, weighted(rng, len(labels)), 0).astype(np.float32)
        f = softmax_cross_entropy_with_integer_labels
        static = {"label_smoothing": 0.1, "implementation": implementation}
        y, d = vjp(f, x, labels, g, **static)
        np.testing.assert_array_equal(np.isnan(y), ~valid)
        dx = np.asarray(d["logits"])
        assert np.isnan(dx[~valid & asked]).all()
        assert (dx[~asked] == 0).all()
        of = oracle.rows(x[valid])
        t = oracle.label_weights(of, labels[valid], 0.1)
        np.testing.assert_allclose(
            y[valid], oracle.cross_entropy(of, t).astype(float), rtol=16 * EPS
        )
        want = oracle.cross_entropy_vjp(of, t, g[valid])
        assert oracle.row_error(dx[valid], want, np.float32) <= gradient_bar("float32")
        y = token_logprobs_and_entropy(x, labels, implementation=implementation)
        np.testing.assert_array_equal(np.isnan(y.logprobs), ~valid)

    @pytest.mark.parametrize(
        ("dtype", "bad"),
        [
            ("uint8", (5, 255)),
            ("uint32", (5, 2**32 - 1, 2**31)),
            ("int16", (-3, 32767)),
        ],
    )
    def test_no_class_in_other_dtypes(self, rng, dtype, bad, nans_allowed):
        x = normal(rng, (len(bad) + 1, 5))
        y = softmax_cross_entropy_with_integer_labels(x, np.array([*bad, 4], dtype))
        np.testing.assert_array_equal(np.isnan(y), [True] * len(bad) + [False])

    @pytest.mark.parametrize(
        ("dtype", "index"), [("int32", 2), ("uint8", 255), ("int8", -1), ("uint32", 3)]
    )
    def test_ignore_index_that_could_be_a_class(self, rng, dtype, index):
        x = normal(rng, (4, 300))
        labels = np.array([1, index, 0, index], dtype)
        f = softmax_cross_entropy_with_integer_labels
        static = {"ignore_index": index}
        g = np.float32(1.7)
        y, d = vjp(f, x, labels, g, reduction="mean", **static)
        of = oracle.rows(x[::2])
        t = oracle.label_weights(of, np.array([1, 0]))
        want = oracle.cross_entropy(of, t).mean().astype(float)
        np.testing.assert_allclose(y, want, rtol=16 * EPS)
        np.testing.assert_array_equal(d["logits"][1::2], 0)
        dx = oracle.cross_entropy_vjp(of, t, np.full(2, g / 2))
        error = oracle.row_error(d["logits"][::2], dx, np.float32)
        assert error <= gradient_bar("float32", 1, np.sqrt(300))

    @pytest.mark.parametrize("dtype", ["uint8", "int8"])
    def test_more_classes_than_labels_can_name(self, rng, dtype):
        x = normal(rng, (3, 300))
        labels = np.array([0, 100, np.iinfo(dtype).max], dtype)
        f = softmax_cross_entropy_with_integer_labels
        got = f(x, labels)
        want = f(x, labels.astype(np.int32))
        np.testing.assert_array_equal(got, want)
        assert np.isfinite(got).all()

    def test_one_class(self, implementation, rng):
        """The loss is 0, or z_loss alone; with no gradient but of that."""
        x, labels = normal(rng, (3, 1)), np.zeros(3, np.int32)
        g, static = weighted(rng, 3), {"implementation": implementation}
        f = softmax_cross_entropy_with_integer_labels
        for z_loss in (0.0, 0.01):
            y, d = vjp(f, x, labels, g, label_smoothing=0.1, z_loss=z_loss, **static)
            want = z_loss * np.asarray(x)[:, 0] ** 2
            np.testing.assert_allclose(y, want, rtol=4 * EPS)
            want = 2 * z_loss * g[:, None] * np.asarray(x)
            np.testing.assert_allclose(d["logits"], want, rtol=8 * EPS, atol=EPS / 4)

    @pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 0, 4)])
    def test_arrays_without_elements(self, shape, nans_allowed):
        """No class is a label: NaN, but for the examples that are ignored."""
        f = softmax_cross_entropy_with_integer_labels
        x, rows = jnp.zeros(shape), shape[:-1]
        labels = np.full(rows, -1, np.int32)
        for reduction in ("none", "mean"):
            g = np.ones(rows if reduction == "none" else (), np.float32)
            y, d = vjp(f, x, labels, g, reduction=reduction, ignore_index=-1)
            assert y.shape == g.shape
            assert not np.any(y)
            assert d["logits"].shape == shape
        assert np.isnan(f(x, labels)).all()
        np.testing.assert_array_equal(softmax_cross_entropy(x, x), np.zeros(rows))
        found = token_logprobs_and_entropy(x, labels, ignore_index=-1)
        assert all(v.shape == rows for v in found)
        np.testing.assert_array_equal(found.lse, np.zeros(rows))
        found = token_logprobs_and_entropy(x, labels)
        np.testing.assert_array_equal(found.lse, np.full(rows, -np.inf))


class TestDenseLabels:
    """What labels that are weights may be."""

    @pytest.mark.parametrize("dtype", ["bool", "int32", "bfloat16"])
    def test_one_hot(self, rng, dtype):
        """The same as the index, in whatever dtype it comes; with class weights."""
        x = normal(rng, (6, 5), "bfloat16")
        labels = rng.integers(5, size=6).astype(np.int32)
        one_hot = jnp.array(np.eye(5)[labels], dtype)
        arrays = {"class_weights": rng.uniform(0.5, 2, size=5).astype(np.float32)}
        g = weighted(rng, 6)
        y, d = vjp(softmax_cross_entropy, x, one_hot, g, arrays=arrays)
        f = softmax_cross_entropy_with_integer_labels
        want, want_d = vjp(f, x, labels, g, arrays=arrays)
        np.testing.assert_allclose(y, want, rtol=16 * EPS)
        of = oracle.rows(x)
        t = oracle.label_weights(of, labels) * arrays["class_weights"]
        dx = oracle.cross_entropy_vjp(of, t, g)
        bar = gradient_bar("bfloat16")
        assert oracle.row_error(d["logits"], dx, "bfloat16") <= bar
        np.testing.assert_allclose(
            d["class_weights"], want_d["class_weights"], rtol=32 * EPS
        )

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("n", [2, 10, 128])
    @pytest.mark.pairwise
    def test_gradient_where_labels_and_rows_agree(self, implementation, rng, dtype, n):
        """Relative to its terms: of a dominant entry, those of the others."""
        for x_scale, t_scale in itertools.product((1, 20, 60), repeat=2):
            logits = rng.normal(size=(32, n))
            x = jnp.array(x_scale * logits, dtype)
            t = jax.nn.softmax(jnp.array(t_scale * logits, jnp.float32))
            static = {"implementation": implementation}
            _, d = vjp(softmax_cross_entropy, x, t, np.ones(32), **static)
            p = oracle.softmax(np.asarray(x))
            t = np.asarray(t, np.longdouble)
            dominant = p > 0.5
            want = t.sum(-1, keepdims=True) * p - t
            others = np.where(dominant, 0, want).sum(-1, keepdims=True)
            want = np.where(dominant, -others, want)
            weights = np.where(dominant, 0, p + t)
            terms = np.maximum(weights.max(-1), weights.sum(-1))
            # P's own error is up to eps (2 + |x - max| / 2): here up to 200 eps.
            bar = {"float32": 100 * EPS, "bfloat16": 2.0**-8}[dtype]
            error = np.abs(np.asarray(d["logits"], np.longdouble) - want).max(-1)
            assert (error <= bar * terms + 1e-37).all()

    def test_weight_on_minus_inf(self, implementation, rng):
        """It costs +inf, of a row alone; no weight there costs nothing."""
        x = normal(rng, (3, 5)).at[:, 2].set(-jnp.inf)
        t = rng.random(size=(3, 5)).astype(np.float32)
        t[:2, 2] = 0
        g, static = weighted(rng, 3), {"implementation": implementation}
        y, d = vjp(softmax_cross_entropy, x, t, g, label_smoothing=0.1, **static)
        of = oracle.rows(x)
        weights = oracle.label_weights(of, t, 0.1)
        want = oracle.cross_entropy(of, weights)
        assert np.isinf(want[2])
        assert_within(y, want, 16 * EPS * (1 + want))
        dx = oracle.cross_entropy_vjp(of, weights, g)
        error = oracle.row_error(d["logits"], dx, np.float32)
        assert error <= gradient_bar("float32")
        assert (np.asarray(d["logits"])[:, 2] == 0).all()

    def test_nan_behind_the_mask(self, implementation, rng, nans_allowed):
        x = normal(rng, (3, 5))
        t = rng.random(size=(3, 5)).astype(np.float32)
        w = {"class_weights": rng.uniform(0.5, 2, size=5).astype(np.float32)}
        where = np.array([[True, False, True, True, True]])
        g = weighted(rng, 3)
        run = functools.partial(
            vjp,
            softmax_cross_entropy,
            g=g,
            where=where,
            label_smoothing=0.1,
            implementation=implementation,
        )
        for arrays in ({}, w):
            want = run(x, t, arrays=arrays)
            hidden = np.where(where, t, np.nan).astype(np.float32)
            got = run(x.at[:, 1].set(jnp.nan), hidden, arrays=arrays)
            chex.assert_trees_all_equal(got, want)
            assert (np.asarray(got[1]["labels"])[:, 1] == 0).all()

    def test_nan_label_stays_in_its_example(self, implementation, rng, nans_allowed):
        x = normal(rng, (3, 5))
        t = rng.random(size=(3, 5)).astype(np.float32)
        g, static = weighted(rng, 3), {"implementation": implementation}
        want, want_d = vjp(softmax_cross_entropy, x, t, g, **static)
        t[1, 2] = np.nan
        y, d = vjp(softmax_cross_entropy, x, t, g, **static)
        np.testing.assert_array_equal(np.isnan(y), [False, True, False])
        np.testing.assert_array_equal(y[::2], want[::2])
        np.testing.assert_array_equal(d["logits"][::2], want_d["logits"][::2])

    def test_broadcast(self, rng):
        """Labels of fewer dimensions serve every row, and sum their gradient."""
        x = normal(rng, (3, 4, 5))
        t = rng.random(size=(4, 1)).astype(np.float32)
        g = rng.normal(size=(3, 4)).astype(np.float32)
        y, d = vjp(softmax_cross_entropy, x, t, g)
        full = np.broadcast_to(t, x.shape)
        want, want_d = vjp(softmax_cross_entropy, x, full, g)
        np.testing.assert_array_equal(y, want)
        np.testing.assert_allclose(
            d["labels"],
            np.asarray(want_d["labels"]).sum((0, 2))[:, None],
            rtol=64 * EPS,
            atol=64 * EPS,
        )


class TestClassWeights:
    @pytest.mark.parametrize(
        ("reduction", "smoothing"), [("none", 0.2), ("mean", 0.0), ("mean", 0.2)]
    )
    @pytest.mark.pairwise(1)
    def test_formula(self, implementation, rng, reduction, smoothing):
        """torch's, but for the mean: over examples, not over their weights."""
        x = normal(rng, (4, 5))
        labels = np.array([1, 0, 4, 2], np.int32)
        w = np.float32([0.5, 2, 0, 1, 3])
        log_p = oracle.log_softmax(x)
        nll = -log_p[np.arange(4), labels]
        want = (1 - smoothing) * w[labels] * nll + smoothing / 5 * (w * -log_p).sum(-1)
        want = want if reduction == "none" else want.mean()
        got = softmax_cross_entropy_with_integer_labels(
            x,
            labels,
            class_weights=w,
            label_smoothing=smoothing,
            reduction=reduction,
            implementation=implementation,
        )
        np.testing.assert_allclose(got, want.astype(float), rtol=16 * EPS)

    @pytest.mark.parametrize("dtype", ["int32", "bfloat16"])
    def test_dtypes(self, rng, dtype):
        x, labels = normal(rng, (4, 5)), np.array([1, 0, 4, 2], np.int32)
        w = jnp.array([1, 2, 0, 1, 3], dtype)
        f = softmax_cross_entropy_with_integer_labels
        got, want = (f(x, labels, class_weights=v) for v in (w, w.astype(jnp.float32)))
        assert got.dtype == jnp.float32
        np.testing.assert_array_equal(got, want)


class TestScale:
    @pytest.mark.parametrize(
        ("shape", "reduction"), [((), "mean"), ((6, 1), "mean"), ((5,), "none")]
    )
    @pytest.mark.pairwise(1)
    def test_learned(self, implementation, rng, shape, reduction):
        """One temperature, one an example, one a class; with their gradients."""
        x = normal(rng, (6, 5), scale=1.0)
        labels = rng.integers(5, size=6).astype(np.int32)
        scale = rng.uniform(0.5, 2, size=shape).astype(np.float32)
        g = weighted(rng, 6) if reduction == "none" else np.float32(1.7)
        static = {"reduction": reduction, "implementation": implementation}
        f = softmax_cross_entropy_with_integer_labels
        y, d = vjp(f, x, labels, g, arrays={"scale": scale}, **static)
        each = g if reduction == "none" else np.full(6, g / 6)
        of = oracle.rows(x, scale=scale)
        t = oracle.label_weights(of, labels)
        loss = oracle.cross_entropy(of, t)
        loss = loss if reduction == "none" else loss.mean()
        np.testing.assert_allclose(y, loss.astype(float), rtol=32 * EPS, atol=8 * EPS)
        dz = oracle.cross_entropy_vjp(of, t, each) / of.slope
        assert_rows_close(d["logits"], dz * of.slope, 32 * EPS, "float32")
        want = dz * np.asarray(x)
        bound = np.abs(want)
        if shape != (6, 1):
            want, bound = want.sum(0), bound.sum(0)
        if shape != (5,):
            want, bound = want.sum(-1), bound.sum(-1)
        assert_within(d["scale"].reshape(want.shape), want, 32 * EPS * bound)

    @pytest.mark.parametrize("scale", [2, np.float32(0.3), -1.5, 0])
    def test_number_is_as_an_array(self, rng, scale):
        x, labels = normal(rng, (6, 5)), rng.integers(5, size=6).astype(np.int32)
        g = weighted(rng, 6)
        f = softmax_cross_entropy_with_integer_labels
        y, d = vjp(f, x, labels, g, scale=scale)
        arrays = {"scale": np.full((1, 1), scale, np.float32)}
        want, want_d = vjp(f, x, labels, g, arrays=arrays)
        np.testing.assert_allclose(y, want, rtol=64 * EPS)
        np.testing.assert_allclose(
            d["logits"], want_d["logits"], rtol=64 * EPS, atol=32 * EPS
        )


TOKENS = ("logprobs", "entropy", "lse")


@functools.partial(jax.jit, static_argnames="static")
def tokens(x, labels, gs, static, where=None):
    """All three outputs, and the gradient of each of them."""
    f = lambda x: token_logprobs_and_entropy(x, labels, where=where, **dict(static))
    y, pull = jax.vjp(f, x)
    zero = jax.tree.map(jnp.zeros_like, y)
    return y, {k: pull(zero._replace(**{k: gs}))[0] for k in TOKENS}


def want_tokens(of, labels, g):
    t = oracle.label_weights(of, labels)
    values = (-oracle.cross_entropy(of, t), oracle.entropy(of), of.lse)
    gradients = (
        -oracle.cross_entropy_vjp(of, t, g),
        oracle.entropy_vjp(of, g),
        oracle.cross_entropy_vjp(of, 0 * t, 0 * g, g),
    )
    return (dict(zip(TOKENS, each, strict=True)) for each in (values, gradients))


@functools.partial(jax.jit, static_argnums=3)
def _entropy_derivatives(x, t, labels, static):
    def entropy(x):
        return token_logprobs_and_entropy(x, labels, **dict(static)).entropy

    gradient = jax.grad(lambda x: jnp.sum(entropy(x)))(x)
    return gradient, jax.jvp(entropy, (x,), (t,))[1]


class TestTokenStatistics:
    @pytest.mark.parametrize(
        ("dtype", "options"),
        [
            ("float32", {}),
            ("bfloat16", {"scale": 0.3}),
            ("float32", {"logits_soft_cap": CAP}),
            ("float16", {"logits_soft_cap": CAP, "scale": 0.7}),
        ],
        ids=str,
    )
    @pytest.mark.pairwise(1)
    def test_against_oracle(self, implementation, rng, dtype, options):
        """Peaked rows too: an entropy down to 1e-16, with its digits."""
        scale, cap = options.get("scale", 1.0), options.get("logits_soft_cap")
        x = rng.normal(size=(64, 9))
        top = 40 if cap is None else 4 * cap
        x[np.arange(64), rng.integers(9, size=64)] += np.linspace(0, top, 64)
        x[0] = 2.0
        x[1, 3], x[2] = -np.inf, -np.inf
        x = jnp.array(x, dtype)
        labels = np.array([0, 1, *rng.integers(9, size=62)], np.int32)
        g = weighted(rng, 64)
        static = tuple({**options, "implementation": implementation}.items())
        y, d = tokens(x, labels, g, static)
        of = oracle.rows(x, None, scale, cap)
        values, gradients = want_tokens(of, labels, g)
        amplified = amplification(np.asarray(x, np.float64), options.get("scale"), cap)
        on = np.arange(9) == labels[:, None]
        finite = np.where(np.isneginf(of.lse), 0, of.lse)
        bars = {
            "logprobs": oracle.weighted_cost(
                1.0 * on, cost_bar(of.cost, amplified[:, None])
            ).sum(-1),
            # Each term P (log s + below) has the error of P and of a cost.
            "entropy": (16 + amplified) * EPS * values["entropy"],
            "lse": EPS * (8 * np.maximum(np.abs(finite), 1) + amplified),
        }
        for k in TOKENS:
            value = getattr(y, k)
            assert (value.dtype, value.shape) == (jnp.float32, (64,))
            assert_within(value, values[k], bars[k])
            assert d[k].dtype == x.dtype
            bar = gradient_bar(dtype, 1, 8 + amplified)
            rows = np.arange(64) > 2 if k == "entropy" else np.arange(64) >= 0
            assert_rows_close(d[k][rows], gradients[k][rows], bar[rows], dtype)
        # Of a uniform row the entropy is stationary: what is left is rounding of 1.
        assert np.abs(np.asarray(d["entropy"], np.float64)[0]).max() <= 8 * EPS
        np.testing.assert_array_equal(d["logprobs"][2], 0)
        np.testing.assert_array_equal(y.logprobs[2], 0)
        np.testing.assert_array_equal(d["entropy"][2], 0)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("n", [2, 10, 128, 1000])
    @pytest.mark.pairwise(1)
    def test_dominated_rows_and_offsets(self, implementation, rng, dtype, n):
        """Gradient and tangent of the entropy; two equal maxima are among the rows."""
        static = (("implementation", implementation),)
        labels = rng.integers(n, size=(4096 // n + 8,)).astype(np.int32)
        # The entries of a dominated row have the errors of their own P.
        bar, least = gradient_bar(dtype), 1e-3 if dtype == "float16" else 1e-30
        for scale, offset, equal in itertools.product(
            (1, 20, 60), (0, 1000, -300), (False, True)
        ):
            x = jnp.array(offset + scale * rng.normal(size=(len(labels), n)), dtype)
            x = x.at[:4, 0].set(x[:4].max(-1)).at[:4, 1].set(x[:4].max(-1))
            t = offset + rng.normal(size=x.shape)
            if equal:
                t[:, : n // 2 + 1] = t[:, :1]
            t = jnp.array(t, dtype)
            dx, tangent = _entropy_derivatives(x, t, labels, static)
            of, wide = oracle.rows(x), np.asarray(t).astype(np.longdouble)
            want = oracle.entropy_vjp(of, np.ones(len(labels)))
            terms = oracle.entropy_terms(of)
            lost = EPS * (8 + terms.distance)
            size = np.abs(want).max(-1)
            rows = size > least
            error = np.abs(np.asarray(dx, np.float64) - want).max(-1)
            case = f"{scale=} {offset=} {equal=}"
            bound = (bar - gradient_bar("float32")) * size + lost * terms.each.max(-1)
            assert (error <= bound)[rows].all(), case
            center = np.take_along_axis(wide, of.p.argmax(-1)[:, None], -1)
            apart = wide - center
            error = np.abs(np.asarray(tangent, np.float64) - (want * apart).sum(-1))
            each = EPS * (8 + of.below + terms.distance[:, None]) * terms.each
            bound = (each * np.abs(apart)).sum(-1)
            bound = bound + 200 * TINY * np.abs(apart).max(-1)
            assert (error <= bound).all(), case

    def test_ignored_and_masked(self, implementation, rng, nans_allowed):
        """All three are 0 in both, with gradient 0, whatever the logits are."""
        x = normal(rng, (5, 6))
        labels = np.array([1, -100, 2, 3, 0], np.int32)
        g = weighted(rng, 5)
        static = {"ignore_index": -100, "implementation": implementation}
        where = np.array([True, True, False, True, True])
        bad = x.at[2].set(jnp.nan).at[1, 0].set(jnp.inf)
        y, d = tokens(bad, labels, g, tuple(static.items()), where)
        of = oracle.rows(x)
        values, gradients = want_tokens(of, np.maximum(labels, 0), g)
        out, at = np.array([1, 2]), np.array([0, 3, 4])
        for k in TOKENS:
            np.testing.assert_allclose(
                getattr(y, k)[at], values[k][at].astype(float), rtol=16 * EPS
            )
            want = gradients[k][at]
            assert_rows_close(d[k][at], want, gradient_bar("float32", 1, 8), "float32")
            np.testing.assert_array_equal(getattr(y, k)[out], 0)
            np.testing.assert_array_equal(d[k][out], 0)

    @pytest.mark.parametrize("scale", ["number", "array"])
    @pytest.mark.pairwise(1)
    def test_further_apart_than_a_float_can_say(self, implementation, scale):
        """Infinitely far below is no NaN: P is 0 there; and lse is finite."""
        lowest = float(np.finfo(np.float32).min)
        x = [[0, 0, lowest], [3e38, -3e38, -3e38], [lowest] * 3, [3e38] * 3]
        x, labels = jnp.array(x, jnp.float32), np.zeros(4, np.int32)
        two, three = np.log([2.0, 3.0])
        number = 1 / 0.7
        static = {"implementation": implementation}
        arrays = {} if scale == "number" else {"scale": jnp.full((), number)}
        options = {"scale": number} if scale == "number" else {}

        @jax.jit
        def run(x, arrays):
            def f(x):
                return token_logprobs_and_entropy(
                    x, labels, **arrays, **options, **static
                )

            def entropy(x):
                return jnp.sum(f(x).entropy)

            tangent = jax.jvp(lambda x: f(x).entropy, (x,), (jnp.ones_like(x),))[1]
            return f(x), jax.grad(entropy)(x), tangent, jax.hessian(entropy)(x)

        y, dx, tangent, second = run(x, arrays)
        want = [two, 0, three, three]
        np.testing.assert_allclose(y.entropy, want, rtol=4 * EPS)
        np.testing.assert_allclose(y.logprobs, -y.entropy, rtol=4 * EPS)
        assert np.isfinite(y.lse).all()
        np.testing.assert_allclose(dx, 0, atol=4 * EPS)
        np.testing.assert_allclose(tangent, 0, atol=4 * EPS)
        assert np.isfinite(second).all()

    @pytest.mark.parametrize("reduction", ["none", "sum"])
    @pytest.mark.pairwise(1)
    def test_terms_of_numbers_too_large_for_a_float(self, implementation, reduction):
        """The loss may be infinite, its gradient is the right one."""
        x = jnp.array([[0, 0, -3e38], [3e38, -3e38, -3e38]], jnp.float32)
        labels, g = np.zeros(2, np.int32), np.float32(1)
        g = g if reduction == "sum" else np.ones(2, np.float32)
        static = {"reduction": reduction, "implementation": implementation}
        options = {"scale": 2.0, "label_smoothing": 0.3, "z_loss": 1e-3}
        f = softmax_cross_entropy_with_integer_labels
        y, d = vjp(f, x, labels, g, **options, **static)
        assert not np.isnan(y).any()
        lse = [np.log(2), float(np.finfo(np.float32).max)]
        p = np.array([[0.5, 0.5, 0], [1, 0, 0]])
        want = (1 + 2e-3 * np.array(lse)[:, None]) * p - [0.8, 0.1, 0.1]
        np.testing.assert_allclose(d["logits"], 2 * want, rtol=8 * EPS, atol=EPS)

    def test_temperature(self, implementation, rng):
        """A learned one, against the statistics of logits that were multiplied."""
        x, labels = normal(rng, (4, 6)), np.array([1, 0, 2, 5], np.int32)
        where = np.arange(6) != 3
        gs = [weighted(rng, 4) for _ in TOKENS]

        def ours(x, scale):
            y = token_logprobs_and_entropy(
                x, labels, where=where[None], scale=scale, implementation=implementation
            )
            return sum(jnp.vdot(a, b) for a, b in zip(gs, y, strict=True))

        def reference(x, scale):
            z = jnp.where(where[None], x * scale, -1e9)
            log_p = jax.nn.log_softmax(z)
            entropy = -jnp.sum(jnp.exp(log_p) * jnp.where(where[None], log_p, 0), -1)
            lse = jax.nn.logsumexp(z, -1)
            y = (log_p[jnp.arange(4), labels], entropy, lse)
            return sum(jnp.vdot(a, b) for a, b in zip(gs, y, strict=True))

        scale = jnp.float32(0.7)
        got, want = (
            jax.jit(jax.value_and_grad(f, (0, 1)))(x, scale) for f in (ours, reference)
        )
        chex.assert_trees_all_close(got, want, rtol=64 * EPS, atol=64 * EPS)

    def test_axes(self, implementation, rng):
        x = normal(rng, (2, 3, 4))
        labels = rng.integers(8, size=3).astype(np.int32)
        got = token_logprobs_and_entropy(
            x, labels, (2, 0), implementation=implementation
        )
        flat = x.transpose(1, 2, 0).reshape(3, 8)
        want = token_logprobs_and_entropy(flat, labels, implementation=implementation)
        chex.assert_trees_all_close(got, want, rtol=8 * EPS)


X = jnp.ones((2, 3))
INTEGERS = jnp.array([0, 2])


class TestArguments:
    @pytest.mark.parametrize("smoothing", [np.float32(0.25), np.float64(0.25)])
    def test_numbers_that_are_taken(self, smoothing):
        f = softmax_cross_entropy_with_integer_labels
        got = f(X, INTEGERS, label_smoothing=smoothing, z_loss=1, logits_soft_cap=2)
        want = f(X, INTEGERS, label_smoothing=0.25, z_loss=1.0, logits_soft_cap=2.0)
        np.testing.assert_array_equal(got, want)

    def test_numpy_and_scalars(self):
        f = softmax_cross_entropy_with_integer_labels
        got = f(np.ones(3, np.float32), 2, ignore_index=np.int64(-1))
        np.testing.assert_allclose(got, np.log(3.0), rtol=2 * EPS)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_no_recompilation(rng, reduction):
    """Static numbers are hashed by value."""
    f = functools.partial(
        softmax_cross_entropy_with_integer_labels, label_smoothing=0.1, z_loss=1e-4
    )

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(x, labels):
        return jax.grad(lambda x: jnp.sum(f(x, labels, reduction=reduction)))(x)

    chex.clear_trace_counter()
    for i in range(3):
        step(jnp.full((2, 3), float(i)), jnp.array([i, 0]))
