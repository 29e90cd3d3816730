"""Several labels per row, and labels that are weights behind a linear layer.

Log-probabilities of alternatives, and losses that weigh several labels, or all classes:
each in its values, gradients and derivatives of these. Tolerances are those of
`support.loss_cases`; in float64, of the plain form, 1e-9.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import oracle
from support.loss_cases import (
    EPS,
    amplification,
    assert_rows_close,
    assert_within,
    cost_bar,
    gradient_bar,
)

from jaxsoftmax import (
    linear_softmax_cross_entropy,
    linear_token_logprobs_and_entropy,
    softmax_cross_entropy,
    softmax_cross_entropy_with_integer_labels,
    token_logprobs_and_entropy,
)
from jaxsoftmax._linear import plan

CAP, COUNT, CLASSES = 5.0, 4, 7
CLOSE = {"rtol": 1e-9, "atol": 1e-9}
slow = pytest.mark.slow


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Few tokens in pieces, as many are."""
    monkeypatch.setattr(plan, "_LEAST_PIECE", 4)


def rows_and_labels(rng, dtype, softcap):
    """Rows of every kind: plain, dominated, with two maxima, shifted, with -inf, empty.

    Among the labels of a row: the largest entry, the same one twice, an absent one.
    """
    x = 3 * rng.normal(size=(16, CLASSES))
    labels = rng.integers(CLASSES, size=(16, COUNT))
    labels[4:8, 2] = labels[4:8, 0]
    top = np.linspace(6, 40 if softcap is None else 4 * softcap, 6)
    x[range(4, 10), labels[4:10, 0]] = top
    x[10, [1, 2]], labels[10, :2] = 30, (1, 2)
    if softcap is None:
        x[11:13] += 1e4
    x[range(13, 15), labels[13:15, 1]] = -np.inf
    x[15] = -np.inf
    return jnp.array(x, dtype), labels.astype(np.int32)


@functools.partial(jax.jit, static_argnames="static")
def logprobs_and_loss(x, labels, g, static):
    """Log-probabilities and their gradient; a loss with weights g and its gradient."""
    options = dict(static)
    f = lambda x: token_logprobs_and_entropy(x, labels, **options).logprobs
    y, pull = jax.vjp(f, x)

    def loss(x):
        return softmax_cross_entropy_with_integer_labels(
            x, labels, label_weights=g, **options
        )

    value, pull_loss = jax.vjp(loss, x)
    return y, pull(g)[0], value, pull_loss(jnp.ones_like(value))[0]


class TestLogprobs:
    @pytest.mark.parametrize(
        ("dtype", "options"),
        [
            ("float32", {}),
            pytest.param("bfloat16", {"scale": 0.3}, marks=slow),
            ("float32", {"logits_soft_cap": CAP}),
        ],
        ids=str,
    )
    def test_against_oracle(self, implementation, rng, dtype, options):
        """What a dominant label leaves has its digits, beside others and twice."""
        scale, cap = options.get("scale"), options.get("logits_soft_cap")
        x, labels = rows_and_labels(rng, dtype, cap)
        g = rng.normal(size=labels.shape).astype(np.float32)
        # Beside a dominant label no other one, or of a small cotangent.
        g[:, 1:] *= np.where(np.arange(16) % 2, 1e-8, 0)[:, None]
        static = (*options.items(), ("implementation", implementation))
        y, d, value, d_loss = logprobs_and_loss(x, labels, g, static)
        of = oracle.rows(x, None, scale or 1.0, cap)
        amplified = amplification(np.asarray(x, np.float64), scale, cap)
        each = [oracle.label_weights(of, label) for label in labels.T]
        cost = np.stack([oracle.cross_entropy(of, t) for t in each], -1)
        assert (y.dtype, y.shape) == (jnp.float32, labels.shape)
        bar = cost_bar(cost, amplified[:, None])
        assert_within(-y, cost, bar)
        total = oracle.weighted_cost(g, cost).sum(-1)
        assert_within(value, total, (bar * abs(g)).sum(-1) + 8 * EPS * abs(total))
        t = sum(t * weight[:, None] for t, weight in zip(each, g.T, strict=True))
        # A label that is absent has no gradient, whatever it costs.
        want = -oracle.cross_entropy_vjp(of, t, np.ones(16))
        bar = gradient_bar(dtype, 1, amplified)
        assert_rows_close(d, want, bar + 8 * EPS, dtype)
        assert_rows_close(d_loss, -want, bar + 8 * EPS, dtype)

    def test_what_is_left_out(self, rng, nans_allowed):
        """Labels that are ignored, or are no class; rows without a label, or masked."""
        x = jnp.array(rng.normal(size=(5, CLASSES)), jnp.float32).at[2:4].set(jnp.nan)
        labels = rng.integers(CLASSES, size=(5, COUNT)).astype(np.int32)
        labels[0, 1], labels[1, 2], labels[2] = -100, CLASSES, -100
        where = np.array([True, True, True, False, True])
        f = functools.partial(
            token_logprobs_and_entropy, ignore_index=-100, where=where
        )
        y, pull = jax.vjp(lambda x: f(x, labels), x)
        (d,) = pull(jax.tree.map(jnp.ones_like, y))
        assert [v.shape for v in y] == [(5, COUNT), (5,), (5,)]
        assert y.logprobs[0, 1] == 0
        np.testing.assert_array_equal(
            np.isnan(y.logprobs), np.arange(20).reshape(5, 4) == 6
        )
        for value in y:
            assert (np.asarray(value)[2:4] == 0).all()
        assert (np.asarray(d)[2:4] == 0).all()
        np.testing.assert_array_equal(np.isnan(d).any(-1), np.arange(5) == 1)
        kept = labels[0, [0, 2, 3]]
        one = lambda x: f(x, np.tile(kept, (5, 1)))
        clean, pull = jax.vjp(one, x)
        np.testing.assert_array_equal(y.logprobs[0, [0, 2, 3]], clean.logprobs[0])
        np.testing.assert_allclose(
            d[0], pull(jax.tree.map(jnp.ones_like, clean))[0][0], atol=4 * EPS
        )

    @pytest.mark.parametrize("axis", [0, (2, 0)], ids=str)
    def test_axes(self, rng, axis):
        """The labels' own dimension is the last, wherever the classes are."""
        x = jnp.array(rng.normal(size=(3, 4, 5)), jnp.float32)
        shape = (4, 5) if axis == 0 else (4,)
        labels = rng.integers(3 if axis == 0 else 15, size=(*shape, 2))
        labels = labels.astype(np.int32)
        where = np.array(rng.random(size=x.shape) < 0.9)
        f = functools.partial(token_logprobs_and_entropy, axis=axis, where=where)
        total = lambda x: jnp.sum(jnp.exp(f(x, labels).logprobs))
        one = lambda x: sum(
            jnp.sum(jnp.exp(f(x, labels[..., k]).logprobs)) for k in range(2)
        )
        chex.assert_trees_all_close(
            f(x, labels).logprobs[..., 1], f(x, labels[..., 1]).logprobs, rtol=4 * EPS
        )
        got, want = jax.jit(lambda x: (jax.grad(total)(x), jax.grad(one)(x)))(x)
        chex.assert_trees_all_close(got, want, atol=16 * EPS)

    def test_no_array_of_labels_times_classes(self):
        """Of a gradient: labels of a row are compared with one another, not more."""

        def temp_bytes(count):
            f = lambda x, labels: jnp.sum(
                token_logprobs_and_entropy(x, labels).logprobs
            )
            arrays = (
                jax.ShapeDtypeStruct((256, 4096), jnp.float32),
                jax.ShapeDtypeStruct((256, count), jnp.int32),
            )
            compiled = jax.jit(jax.grad(f)).lower(*arrays).compile()
            return compiled.memory_analysis().temp_size_in_bytes

        assert temp_bytes(32) <= temp_bytes(1) + 3 * 256 * 32 * 32 * 4


# --- losses ---------------------------------------------------------------------------

TOKENS, HIDDEN, VOCABULARY = (3, 5), 4, 300
OPTIONS = {"label_smoothing": 0.1, "z_loss": 0.01, "reduction": "mean"}
# The least, for classes in several chunks; and one chunk.
BUDGETS = {"least": 3 * 5 * 128 * 16, "default": None}


def layer(rng):
    """x, weights, and a mask of tokens, in float64."""
    x = jnp.array(rng.normal(size=(*TOKENS, HIDDEN)))
    weights = jnp.array(rng.normal(size=(HIDDEN, VOCABULARY)))
    return x, weights, np.array(rng.random(size=TOKENS) < 0.8)


def derivatives(f, *arrays):
    """The value, the gradients, and how these change in some direction."""
    every = tuple(range(len(arrays)))
    dots = tuple(jnp.sin(5 * a) for a in arrays)
    return jax.jvp(jax.value_and_grad(f, every), arrays, dots)


def assert_same_derivatives(ours, theirs, *arrays):
    both = lambda *arrays: [derivatives(f, *arrays) for f in (ours, theirs)]
    got, want = jax.jit(both)(*arrays)
    chex.assert_trees_all_close(got, want, **CLOSE)


def scattered(labels, weights):
    """Labels and what they weigh as a weight for each class."""
    at = np.ix_(*map(range, labels.shape[:-1]))
    zeros = jnp.zeros((*labels.shape[:-1], VOCABULARY), weights.dtype)
    for k in range(labels.shape[-1]):
        each = jnp.where(labels[..., k] < 0, VOCABULARY, labels[..., k])
        zeros = zeros.at[(*at, each)].add(weights[..., k], mode="drop")
    return zeros


class TestLabelWeights:
    @pytest.mark.parametrize(
        "where",
        ["least", *(pytest.param(w, marks=slow) for w in ("logits", "default"))],
    )
    def test_as_a_weight_for_each_class(self, x64, rng, where):
        """And the gradient of the weights; labels have class weights too."""
        x, weights, mask = layer(rng)
        labels = rng.integers(VOCABULARY, size=(*TOKENS, COUNT))
        labels[0, 0, 1:3], labels[0, 1, 0], labels[0, 2] = labels[0, 0, 0], -100, -100
        own = jnp.array(rng.normal(size=labels.shape))
        options = {"z_loss": 0.01, "reduction": "mean"}
        options["class_weights"] = jnp.linspace(0.5, 2, VOCABULARY)
        given = {"where": mask, "ignore_index": -100, **options}

        def ours(x, weights, own):
            if where == "logits":
                return softmax_cross_entropy_with_integer_labels(
                    x @ weights, labels, label_weights=own, **given
                )
            return linear_softmax_cross_entropy(
                x,
                labels,
                weights,
                label_weights=own,
                memory_budget=BUDGETS[where],
                **given,
            )

        def theirs(x, weights, own):
            counted = mask & (labels != -100).any(-1)
            t = scattered(labels, own)
            return softmax_cross_entropy(x @ weights, t, where=counted, **options)

        assert_same_derivatives(ours, theirs, x, weights, own)

    def test_aux(self, rng):
        """Several labels are neither right nor wrong."""
        x = jnp.array(rng.normal(size=(3, CLASSES)), jnp.float32)
        labels = np.array([[0, 1], [2, 3], [4, 4]])
        value, aux = softmax_cross_entropy_with_integer_labels(
            x, labels, label_weights=np.float32(0.5), reduction="sum", return_aux=True
        )
        np.testing.assert_allclose(aux.cross_entropy, value, rtol=4 * EPS)
        assert aux.correct is None


class TestSoftTargets:
    @pytest.mark.parametrize("budget", ["least", pytest.param("default", marks=slow)])
    def test_as_of_logits(self, x64, rng, budget):
        """And the gradient of the targets, their own and of the classes' weights."""
        x, weights, mask = layer(rng)
        t = jax.nn.softmax(jnp.array(3 * rng.normal(size=(*TOKENS, VOCABULARY))))
        class_weights = jnp.array(rng.uniform(0.5, 2, size=VOCABULARY))
        scale = jnp.array(rng.uniform(0.5, 1, size=TOKENS))

        def ours(x, weights, t, class_weights, scale):
            return linear_softmax_cross_entropy(
                x,
                t,
                weights,
                where=mask,
                class_weights=class_weights,
                scale=scale,
                memory_budget=BUDGETS[budget],
                **OPTIONS,
            )

        def theirs(x, weights, t, class_weights, scale):
            return softmax_cross_entropy(
                x @ weights,
                t,
                where=mask,
                class_weights=class_weights,
                scale=scale[..., None],
                **OPTIONS,
            )

        arrays = (x, weights, t, class_weights, scale)
        assert_same_derivatives(ours, theirs, *arrays)

    def test_tokens_that_are_masked(self, rng, nans_allowed):
        """Whatever they contain; and what is shared by all tokens."""
        x, weights, mask = layer(rng)
        x, weights = x.astype(jnp.float32), weights.astype(jnp.float32)
        t = jnp.array(rng.random(size=(1, 1, VOCABULARY)), jnp.float32)

        def f(x, weights):
            return linear_softmax_cross_entropy(
                x, t, weights, where=mask, reduction="sum"
            )

        bad = jnp.where(mask[..., None], x, jnp.nan)
        both = jax.jit(lambda *xs: [derivatives(f, x, weights) for x in xs])
        got, want = both(bad, x)
        (_, (dx, _)), (_, (dx_dot, _)) = got
        for found in (dx, dx_dot):
            assert not np.asarray(found)[~mask].any()
        chex.assert_trees_all_close(got[0], want[0], rtol=16 * EPS, atol=16 * EPS)
        assert all(np.isfinite(a).all() for a in jax.tree.leaves(got[1][1]))

    def test_vmap(self, x64, rng):
        x, weights, _ = layer(rng)
        t = jnp.array(rng.random(size=(*TOKENS, VOCABULARY)))

        def gradients(loss, x, weights, t):
            each = jax.vmap(loss, (0, None, 0))
            return jax.grad(lambda *a: jnp.sum(jnp.sin(each(*a))), (0, 1, 2))(
                x, weights, t
            )

        ours = lambda x, w, t: linear_softmax_cross_entropy(x, t, w, reduction="mean")
        theirs = lambda x, w, t: softmax_cross_entropy(x @ w, t, reduction="mean")
        both = lambda *a: [gradients(f, *a) for f in (ours, theirs)]
        got, want = jax.jit(both)(x, weights, t)
        chex.assert_trees_all_close(got, want, **CLOSE)

    def test_no_copy_of_the_targets(self):
        """Chunks of them are read where they are; no logits of all tokens either."""
        tokens, vocabulary = 4096, 8192

        def f(x, weights, t):
            return linear_softmax_cross_entropy(
                x, t, weights, reduction="mean", memory_budget=2**23
            )

        arrays = (
            jax.ShapeDtypeStruct((tokens, 16), jnp.float32),
            jax.ShapeDtypeStruct((16, vocabulary), jnp.float32),
            jax.ShapeDtypeStruct((tokens, vocabulary), jnp.float32),
        )
        compiled = jax.jit(jax.grad(f, (0, 1))).lower(*arrays).compile()
        temporary = compiled.memory_analysis().temp_size_in_bytes
        assert temporary <= 4 * 2**23 < tokens * vocabulary * 4 / 2


def test_linear_logprobs(x64, rng):
    """Log-probabilities of alternatives, entropy and lse, in chunks of classes."""
    x, weights, mask = layer(rng)
    labels = rng.integers(VOCABULARY, size=(*TOKENS, COUNT))
    labels[0, 0, 1:3], labels[0, 1, 0] = labels[0, 0, 0], -100
    g = jnp.array(rng.normal(size=labels.shape))
    options = {"where": mask, "ignore_index": -100, "logits_soft_cap": CAP}

    def total(found):
        return jnp.sum(g * found.logprobs) + jnp.sum(jnp.sin(found.entropy + found.lse))

    def ours(x, weights):
        return total(
            linear_token_logprobs_and_entropy(
                x, labels, weights, memory_budget=BUDGETS["least"], **options
            )
        )

    def theirs(x, weights):
        return total(token_logprobs_and_entropy(x @ weights, labels, **options))

    assert_same_derivatives(ours, theirs, x, weights)
