"""`sample_weights` of the losses, and `return_aux`: what is logged beside them."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import oracle
from support.loss_cases import (
    EPS,
    assert_rows_close,
    assert_within,
    cost_bar,
    gradient_bar,
)

from jaxsoftmax import (
    LossAux,
    explain,
    linear_softmax_cross_entropy,
    softmax_cross_entropy,
    softmax_cross_entropy_with_integer_labels,
)

ROWS, CLASSES, HIDDEN = 24, 40, 8
IGNORED = -1
REDUCTIONS = ["none", "sum", "mean", "weighted_mean"]
OPTIONS = {
    "plain": {},
    "z-loss": {"z_loss": 0.01},
    "class weights": {"class_weights": np.linspace(0.5, 2, CLASSES).astype("f4")},
    "smoothing": {"label_smoothing": 0.1},
    "smoothing and class weights": {
        "label_smoothing": 0.1,
        "class_weights": np.linspace(0.5, 2, CLASSES).astype("f4"),
    },
}
over_options = pytest.mark.parametrize("options", OPTIONS)
over_reductions = pytest.mark.parametrize("reduction", REDUCTIONS)


def case(rng):
    x = (3 * rng.normal(size=(ROWS, CLASSES))).astype(np.float32)
    labels = rng.integers(CLASSES, size=ROWS).astype(np.int32)
    labels[5] = IGNORED
    weights = rng.uniform(0.2, 3, size=ROWS).astype(np.float32)
    weights[[2, 7]], weights[11] = 0, -0.5
    return x, labels, weights


def wanted(x, labels, weights, reduction, options):
    """The losses, what multiplies each, the value, and the gradients of both."""
    of = oracle.rows(x)
    smoothing = options.get("label_smoothing", 0.0)
    classes = np.longdouble(options.get("class_weights", np.ones(CLASSES)))
    t = oracle.label_weights(of, labels, smoothing) * classes
    z_loss = options.get("z_loss", 0.0)
    counted = labels != IGNORED
    losses = np.where(counted, oracle.cross_entropy(of, t, z_loss), 0)
    w = np.where(counted, np.longdouble(weights), 0)
    divisor = {
        "mean": w.sum(),
        "weighted_mean": (w * classes[np.maximum(labels, 0)]).sum(),
    }.get(reduction, np.longdouble(1))
    each = w / divisor
    dx = oracle.cross_entropy_vjp(of, t, each, 0.0, z_loss)
    value = each * losses
    dw = losses / divisor
    if reduction != "none":
        value = value.sum()
    if reduction == "mean":
        dw = dw - counted * value / divisor
    elif reduction == "weighted_mean":
        dw = dw - counted * classes[np.maximum(labels, 0)] * value / divisor
    return losses, each, value, dx, dw


@over_options
@over_reductions
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.pairwise
def test_against_oracle(rng, dtype, reduction, options):
    x, labels, weights = case(rng)
    x, options = jnp.asarray(x, dtype), OPTIONS[options]
    losses, each, value, dx, dw = wanted(
        np.asarray(x, np.float32), labels, weights, reduction, options
    )
    f = functools.partial(
        softmax_cross_entropy_with_integer_labels,
        labels=labels,
        ignore_index=IGNORED,
        reduction=reduction,
        **options,
    )
    got, pull = jax.vjp(lambda x, w: f(x, sample_weights=w), x, weights)
    got_dx, got_dw = pull(jnp.ones_like(got))
    bars = 4 * cost_bar(losses, 0)
    reduced = (np.abs(each) * bars).sum() + 4 * EPS * np.abs(each * losses).sum()
    bar = np.abs(each) * bars if reduction == "none" else reduced
    assert (got.dtype, got.shape) == (jnp.float32, value.shape)
    assert_within(got, value, bar)
    assert got_dx.dtype == dtype
    assert_rows_close(got_dx, dx, gradient_bar(dtype, 2) + 8 * EPS, dtype)
    assert not np.asarray(got_dx)[each == 0].any()
    size = np.abs(each).max() / np.abs(weights).max() * (bars + 8 * EPS * losses)
    assert_within(got_dw, dw, size + 8 * EPS * (1 + np.abs(value).max()) + reduced)


@over_options
@over_reductions
@pytest.mark.pairwise(1)
def test_linear_loss_is_that_of_its_logits(rng, reduction, options):
    _, labels, weights = case(rng)
    x = rng.normal(size=(ROWS, HIDDEN)).astype(np.float32)
    layer = rng.normal(size=(HIDDEN, CLASSES)).astype(np.float32)
    shared = {"ignore_index": IGNORED, "reduction": reduction, **OPTIONS[options]}

    def ours(x, layer, w):
        y = linear_softmax_cross_entropy(
            x, labels, layer, sample_weights=w, precision="highest", **shared
        )
        return jnp.sum(y)

    def of_logits(x, layer, w):
        logits = jnp.matmul(x, layer, precision="highest")
        y = softmax_cross_entropy_with_integer_labels(
            logits, labels, sample_weights=w, **shared
        )
        return jnp.sum(y)

    got, want = (
        jax.value_and_grad(f, (0, 1, 2))(x, layer, weights) for f in (ours, of_logits)
    )
    chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-5)


def plain(x, labels, weights, reduction, z_loss):
    y = jax.nn.log_softmax(x)
    nll = -jnp.take_along_axis(y, labels[:, None], -1)[:, 0]
    lse = jax.scipy.special.logsumexp(x, axis=-1)
    losses = weights * (nll + z_loss * lse**2)
    return losses.sum() / (weights.sum() if reduction == "mean" else 1)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("linear", [False, True])
def test_second_derivatives_also_where_a_weight_is_0(rng, linear, reduction):
    """Learning to weight examples starts there."""
    with jax.enable_x64(True):
        weights = jnp.array([0.0, 1.0, -0.3, 0.0, 2.0])
        labels = jnp.array([2, 0, 1, 1, 3])
        x = jnp.array(rng.normal(size=(5, 4)))
        layer = jnp.array(rng.normal(size=(4, 6)))
        options = {"reduction": reduction, "z_loss": 0.1}

        def ours(x, w):
            if linear:
                return linear_softmax_cross_entropy(
                    x, labels, layer, sample_weights=w, **options
                )
            return softmax_cross_entropy_with_integer_labels(
                x @ layer, labels, sample_weights=w, **options
            )

        def theirs(x, w):
            return plain(x @ layer, labels, w, reduction, 0.1)

        @jax.jit
        def derivatives(x, weights):
            dots = jnp.ones_like(x), jnp.cos(weights)
            return [
                (
                    *(d(f, (0, 1))(x, weights) for d in (jax.grad, jax.hessian)),
                    jax.jvp(f, (x, weights), dots),
                )
                for f in (ours, theirs)
            ]

        got, want = derivatives(x, weights)
        chex.assert_trees_all_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("linear", [False, True])
def test_what_weighs_0_has_no_part(rng, nans_allowed, linear, reduction, z_loss):
    """Whatever its logits are."""
    _, labels, weights = case(rng)
    x = rng.normal(size=(ROWS, HIDDEN if linear else CLASSES)).astype(np.float32)
    layer = rng.normal(size=(HIDDEN, CLASSES)).astype(np.float32)

    def f(x, layer):
        options = {"ignore_index": IGNORED, "reduction": reduction, "z_loss": z_loss}
        options["sample_weights"] = weights
        if linear:
            return jnp.sum(linear_softmax_cross_entropy(x, labels, layer, **options))
        y = softmax_cross_entropy_with_integer_labels(x, labels, **options)
        return jnp.sum(y) + jnp.sum(layer)

    want = jax.value_and_grad(f, (0, 1))(x, layer)
    poisoned = x.copy()
    poisoned[2], poisoned[7, 1] = np.nan, np.inf
    got = jax.value_and_grad(f, (0, 1))(poisoned, layer)
    chex.assert_trees_all_close(got, want, rtol=2e-6, atol=1e-7)


def test_mean_of_nothing():
    x, labels = jnp.ones((3, 4)), jnp.zeros(3, int)
    f = functools.partial(
        softmax_cross_entropy_with_integer_labels, labels=labels, reduction="mean"
    )
    value, gradient = jax.value_and_grad(lambda x: f(x, sample_weights=0 * x[:, 0]))(x)
    assert value == 0
    assert not gradient.any()


def test_weights_broadcast_to_the_losses(rng):
    x = jnp.array(rng.normal(size=(2, 3, 5)), jnp.float32)
    labels, row = jnp.zeros((2, 3), int), jnp.array([1.0, 0.0, 2.0])
    f = softmax_cross_entropy_with_integer_labels
    want = f(x, labels) * row[None]
    np.testing.assert_array_equal(f(x, labels, sample_weights=row), want)
    moved = f(jnp.moveaxis(x, -1, 0), labels, 0, sample_weights=row)
    np.testing.assert_allclose(moved, want, rtol=1e-6)
    dense = softmax_cross_entropy(x, jnp.eye(5)[labels], sample_weights=row)
    np.testing.assert_allclose(dense, want, rtol=1e-6)


def test_one_pass_with_weights():
    """One kernel of value and gradient; kept are that gradient and numbers per row."""
    x, labels = jnp.zeros((8, 64), jnp.bfloat16), jnp.zeros(8, int)

    def f(x, w):
        return softmax_cross_entropy_with_integer_labels(
            x, labels, sample_weights=w, reduction="mean"
        )

    choices = explain(jax.grad(f, (0, 1)), x, jnp.ones(8)).choices
    assert {choice.call.op for choice in choices} == {"cross_entropy_with_gradient"}
    kept = jax.tree.leaves(jax.vjp(f, x, jnp.ones(8))[1])
    large = [a for a in kept if a.size >= x.size]
    assert [a.dtype for a in large] == [jnp.bfloat16]
    assert sum(a.nbytes for a in kept) <= large[0].nbytes + 8 * 64


# --- what is logged -------------------------------------------------------------------


@over_options
@over_reductions
@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.pairwise
def test_aux(rng, linear, reduction, options):
    _, labels, weights = case(rng)
    h = rng.normal(size=(ROWS, HIDDEN)).astype(np.float32)
    layer = rng.normal(size=(HIDDEN, CLASSES)).astype(np.float32)
    x = np.asarray(jnp.matmul(h, layer, precision="highest"))
    labels[:8] = x[:8].argmax(-1)
    labels[5] = IGNORED
    options = OPTIONS[options]
    shared = {"sample_weights": weights, "reduction": reduction, "return_aux": True}
    shared |= {"ignore_index": IGNORED, **options}

    def f(h, layer, **more):
        if linear:
            more["precision"] = "highest"
            return linear_softmax_cross_entropy(h, labels, layer, **shared, **more)
        logits = jnp.matmul(h, layer, precision="highest")
        return softmax_cross_entropy_with_integer_labels(
            logits, labels, **shared, **more
        )

    value, lse, aux = jax.jit(functools.partial(f, return_lse=True))(h, layer)
    assert isinstance(aux, LossAux)
    z_loss = options.get("z_loss", 0.0)
    without = {k: v for k, v in options.items() if k != "z_loss"}
    losses, *_ = wanted(x, labels, weights, "none", without)
    of = oracle.rows(x)
    w = np.where(labels == IGNORED, 0, weights).astype(np.longdouble)
    correct = (w * (x.argmax(-1) == labels)).sum()
    bar = {"rtol": 3e-6}
    np.testing.assert_allclose(aux.weight, w.sum(), **bar)
    np.testing.assert_allclose(aux.cross_entropy, (w * losses).sum(), **bar)
    np.testing.assert_allclose(aux.z_loss, (w * z_loss * of.lse**2).sum(), **bar)
    np.testing.assert_allclose(aux.correct, correct, **bar)
    np.testing.assert_allclose(aux.accuracy, correct / w.sum(), **bar)
    want_lse = np.where(labels == IGNORED, 0, of.lse)
    np.testing.assert_allclose(aux.lse, want_lse, rtol=3e-6)
    np.testing.assert_array_equal(aux.lse, lse)
    if reduction == "sum":
        np.testing.assert_allclose(value, aux.cross_entropy + aux.z_loss, **bar)
    alone, found = f(h, layer)
    chex.assert_trees_all_close(found, aux, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(alone, value, rtol=1e-6)


@pytest.mark.parametrize("linear", [False, True])
def test_aux_has_no_derivative_and_costs_no_pass(rng, linear):
    _, labels, weights = case(rng)
    x = rng.normal(size=(ROWS, HIDDEN if linear else CLASSES)).astype(np.float32)
    layer = jnp.array(rng.normal(size=(HIDDEN, CLASSES)), jnp.float32)

    def f(x, return_aux):
        options = {"ignore_index": IGNORED, "reduction": "mean", "z_loss": 0.1}
        options |= {"sample_weights": weights, "return_aux": return_aux}
        if linear:
            return linear_softmax_cross_entropy(x, labels, layer, **options)
        return softmax_cross_entropy_with_integer_labels(x, labels, **options)

    with_aux = functools.partial(f, return_aux=True)
    without = functools.partial(f, return_aux=False)
    (value, _), gradient = jax.value_and_grad(with_aux, has_aux=True)(x)
    want = jax.value_and_grad(without)(x)
    np.testing.assert_array_equal(value, want[0])
    np.testing.assert_array_equal(gradient, want[1])
    of_sums = jax.grad(lambda x: sum(map(jnp.sum, with_aux(x)[1])))(x)
    assert not of_sums.any()
    _, (_, dots) = jax.jvp(with_aux, (x,), (jnp.ones_like(x),))
    assert not any(dot.any() for dot in dots)
    calls = [
        [choice.call for choice in explain(jax.grad(g), x).choices]
        for g in (lambda x: with_aux(x)[0], without)
    ]
    assert calls[0] == calls[1]


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("linear", [False, True])
def test_aux_under_vmap(rng, linear, reduction):
    x = rng.normal(size=(3, 4, HIDDEN if linear else CLASSES)).astype(np.float32)
    labels = rng.integers(CLASSES, size=(3, 4))
    layer = jnp.array(rng.normal(size=(HIDDEN, CLASSES)), jnp.float32)

    def f(x, labels):
        options = {"reduction": reduction, "return_aux": True, "z_loss": 0.1}
        if linear:
            return linear_softmax_cross_entropy(x, labels, layer, **options)
        return softmax_cross_entropy_with_integer_labels(x, labels, **options)

    got = jax.vmap(f)(x, labels)
    want = [f(*each) for each in zip(x, labels, strict=True)]
    want = jax.tree.map(lambda *each: jnp.stack(each), *want)
    chex.assert_trees_all_close(got, want, rtol=2e-6)


def test_aux_of_dense_labels(rng):
    x = rng.normal(size=(4, 5)).astype(np.float32)
    t = rng.uniform(size=(4, 5)).astype(np.float32)
    f = functools.partial(softmax_cross_entropy, x, t)
    value, aux = f(reduction="sum", return_aux=True)
    np.testing.assert_allclose(value, aux.cross_entropy, rtol=1e-6)
    assert aux.weight == 4
    assert aux.correct is None
    with pytest.raises(
        ValueError, match="accuracy is of labels that are class indices"
    ):
        _ = aux.accuracy


def test_weighted_mean_of_dense_labels():
    with pytest.raises(ValueError, match="reduction='weighted_mean' divides by"):
        softmax_cross_entropy(jnp.ones(3), jnp.ones(3), reduction="weighted_mean")
