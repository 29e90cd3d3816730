"""Every derivative mode under every transform, against jax.nn on tame input.

The implementation "opaque" refuses differentiation, so what passes here passes by the
rules of this library alone.
"""

import functools
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads
from support import opaque

from jaxsoftmax import (
    log_softmax,
    logsumexp,
    softmax,
    softmax_cross_entropy,
    softmax_cross_entropy_with_integer_labels,
    token_logprobs_and_entropy,
)
from jaxsoftmax._logsumexp import LOG_SUM_EXP_NAME
from jaxsoftmax._rows.call import RowCall
from jaxsoftmax._rows.row_loss import Options
from jaxsoftmax._softmax import PROBABILITIES_NAME, ROW_MAX_NAME

SHAPE = (8, 6)


@functools.cache
def weights(n):
    """For 8 rows of `n`: the cases below serve rows of any length."""
    return np.random.default_rng(1).normal(size=(8, n)).astype(np.float32)


WEIGHTS = weights(SHAPE[1])
TANGENT = np.random.default_rng(2).normal(size=SHAPE).astype(np.float32)


def scalar(f):
    """A loss that is not linear in f, so that no second derivative drops out."""
    return lambda x: jnp.sum(jnp.sin(f(x)) * weights(x.shape[-1])[: x.shape[0]])


def row_scalar(f):
    """The same of one row, with one row's weights."""
    return lambda x: jnp.sum(jnp.sin(f(x)) * weights(x.shape[-1])[0])


def hvp(loss, x, v):
    return jax.jvp(jax.grad(loss), (x,), (v,))[1]


def reverse_over_reverse(loss, x, v):
    return jax.grad(lambda x: jnp.vdot(jax.grad(loss)(x), v))(x)


def forward_over_forward(f, x, v):
    return jax.jvp(lambda x: jax.jvp(f, (x,), (v,))[1], (x,), (v,))[1]


def reverse_over_forward(f, x, v):
    return jax.grad(lambda x: jnp.sum(jnp.cos(jax.jvp(f, (x,), (v,))[1])))(x)


def third(loss, x, v):
    return jax.jvp(lambda x: hvp(loss, x, v), (x,), (v,))[1]


def linearized(f, x, v):
    y, push = jax.linearize(f, x)
    (pulled,) = jax.linear_transpose(push, x)(y)
    return y, push(v), pulled


# name -> (f, x, v) -> what is compared; x and v are 8 rows.
MODES = {
    "value": lambda f, x, v: f(x),
    "jvp": lambda f, x, v: jax.jvp(f, (x,), (v,)),
    "vjp": lambda f, x, v: jax.vjp(f, x)[1](v),
    "linearize": linearized,
    "jacfwd": lambda f, x, v: jax.jacfwd(f)(x),
    "jacrev": lambda f, x, v: jax.jacrev(f)(x),
    "hessian": lambda f, x, v: jax.hessian(scalar(f))(x),
    "fwd_rev": lambda f, x, v: hvp(scalar(f), x, v),
    "rev_rev": lambda f, x, v: reverse_over_reverse(scalar(f), x, v),
    "fwd_fwd": forward_over_forward,
    "rev_fwd": reverse_over_forward,
    "third": lambda f, x, v: third(scalar(f), x, v),
}


def vmapped(mode):
    """One row's mode, mapped over the first axis, the last, and with a shared row."""

    def run(f, x, v):
        each = functools.partial(mode, f)
        rows = jax.vmap(each)(x, v)
        last = jax.vmap(each, in_axes=-1, out_axes=-1)(x.T, v.T)
        one = jax.vmap(each, in_axes=(None, 0))(x[0], v)
        other = jax.vmap(each, in_axes=(0, None))(x, v[0])
        return rows, last, one, other

    return run


ROW_MODES = {
    **{name: MODES[name] for name in ("jvp", "vjp", "linearize", "jacfwd", "jacrev")},
    "hessian": lambda f, x, v: jax.hessian(row_scalar(f))(x),
    "fwd_rev": lambda f, x, v: hvp(row_scalar(f), x, v),
    "rev_rev": lambda f, x, v: reverse_over_reverse(row_scalar(f), x, v),
    "fwd_fwd": forward_over_forward,
    "rev_fwd": reverse_over_forward,
}


def through_checkpoint(policy=None):
    def run(f, x, v):
        loss = jax.checkpoint(scalar(f), policy=policy)
        return jax.grad(loss)(x), hvp(loss, x, v), reverse_over_reverse(loss, x, v)

    return run


def through_scan(f, x, v):
    """f in the body of a scan, differentiated from outside and inside."""

    def outside(x):
        return jax.lax.scan(lambda c, w: (f(c + w), jnp.sum(c)), x, v[:, None, :])[0]

    def body(c, w):
        return c + jax.grad(scalar(f))(c * w), None

    inside = jax.lax.scan(body, x, v[:, None, :])[0]
    return jax.grad(scalar(outside))(x), hvp(scalar(outside), x, v), inside


def through_control_flow(f, x, v):
    def loss(x):
        y = jax.lax.cond(x[0, 0] < 9, scalar(f), jnp.sum, x)
        return y + jax.lax.fori_loop(0, 3, lambda i, c: f(c), x)[0, 0]

    return jax.grad(loss)(x), hvp(loss, x, v)


def through_map(f, x, v):
    return jax.lax.map(jax.grad(row_scalar(f)), x)


def through_two_vmaps(f, x, v):
    gradient = lambda x, v: (jax.grad(row_scalar(f))(x), hvp(row_scalar(f), x, v))
    return jax.vmap(jax.vmap(gradient))(x.reshape(2, 4, -1), v.reshape(2, 4, -1))


def through_pmap(f, x, v):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        each = jax.pmap(
            lambda x, v: (jax.grad(row_scalar(f))(x), hvp(row_scalar(f), x, v))
        )
        return jax.device_get(each(x, v))


def through_shard_map(check_vma, axes):
    def run(f, x, v):
        sizes = (4, 2) if jax.device_count() >= 8 else (1, 1)
        mesh = jax.make_mesh(
            sizes, ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2
        )
        spec = P(axes)

        def each(x, v):
            loss = lambda x: jnp.sum(jnp.sin(f(x)) * v)
            return jax.jvp(f, (x,), (v,)), jax.grad(loss)(x), hvp(loss, x, v)

        inside = jax.shard_map(
            each, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=check_vma
        )
        mapped = jax.shard_map(
            f, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=check_vma
        )
        outside = lambda x: jnp.sum(jnp.sin(mapped(x)) * weights(x.shape[-1]))
        return inside(x, v), jax.grad(outside)(x), hvp(outside, x, v)

    return run


def keep(*names):
    return through_checkpoint(jax.checkpoint_policies.save_only_these_names(*names))


CASES = {
    **MODES,
    **{f"vmap_{name}": vmapped(mode) for name, mode in ROW_MODES.items()},
    "checkpoint": through_checkpoint(),
    "checkpoint_names": keep(PROBABILITIES_NAME, ROW_MAX_NAME),
    "checkpoint_nothing": through_checkpoint(jax.checkpoint_policies.nothing_saveable),
    "checkpoint_dots": through_checkpoint(jax.checkpoint_policies.dots_saveable),
    "scan": through_scan,
    "control_flow": through_control_flow,
    "map": through_map,
    "vmap_twice": through_two_vmaps,
    "pmap": through_pmap,
    "shard_map": through_shard_map(True, "a"),
    "shard_map_two_axes": through_shard_map(True, ("a", "b")),
    "shard_map_unchecked": through_shard_map(False, "a"),
}


@pytest.fixture(params=["softmax", "log_softmax"])
def pair(request):
    """The function of this library and of jax.nn."""
    ours = {"softmax": softmax, "log_softmax": log_softmax}[request.param]
    return ours, getattr(jax.nn, request.param)


def check_case(pair, implementation, rng, case):
    ours, reference = pair
    ours = functools.partial(ours, implementation=implementation)
    x = jnp.array(rng.normal(size=SHAPE), jnp.float32)
    v = jnp.array(TANGENT)

    def both(x, v):
        return CASES[case](ours, x, v), CASES[case](reference, x, v)

    got, want = (both if case == "pmap" else jax.jit(both))(x, v)
    chex.assert_trees_all_close(got, want, atol=5e-6, rtol=2e-5)


@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.pairwise
def test_mode(pair, implementation, rng, mode):
    check_case(pair, implementation, rng, mode)


@pytest.mark.parametrize("case", [case for case in CASES if case not in MODES])
@pytest.mark.pairwise(1)
def test_transform(pair, implementation, rng, case):
    if case == "pmap" and jax.device_count() < 8:
        pytest.skip("one device a row, and there are fewer")
    check_case(pair, implementation, rng, case)


@pytest.mark.parametrize("mode", ["value", "jvp", "vjp", "fwd_rev"])
@pytest.mark.pairwise(1)
def test_without_jit(pair, implementation, rng, mode):
    ours, reference = pair
    ours = functools.partial(ours, implementation=implementation)
    x = jnp.array(rng.normal(size=SHAPE), jnp.float32)
    got, want = (MODES[mode](f, x, jnp.array(TANGENT)) for f in (ours, reference))
    chex.assert_trees_all_close(got, want, atol=5e-6, rtol=2e-5)


@pytest.mark.versions
@pytest.mark.parametrize("case", ["fwd_rev", "vmap_vjp", "checkpoint", "scan"])
@pytest.mark.pairwise(1, rare=1)
def test_no_leaked_tracers(pair, leak_checks, case):
    ours, _ = pair
    jax.jit(functools.partial(CASES[case], ours)).lower(TANGENT, TANGENT)


@pytest.mark.parametrize("mode", ["vjp", "jvp", "fwd_rev", "rev_fwd"])
@pytest.mark.pairwise(1)
def test_masked_and_scaled(pair, implementation, rng, mode):
    ours, reference = pair
    x = jnp.array(rng.normal(size=SHAPE), jnp.float32)
    where = jnp.array([[True, True, False, True, True, False]])
    shown = jnp.where(jnp.broadcast_to(where, SHAPE), 1.0, 0.0)

    def f(x):
        y = ours(x, where=where, scale=0.7, implementation=implementation)
        return jnp.where(shown == 1, y, 0)

    def r(x):
        return jnp.where(shown == 1, reference(0.7 * x, where=where), 0)

    both = jax.jit(lambda x, v: [MODES[mode](g, x, v) for g in (f, r)])
    got, want = both(x, jnp.array(TANGENT))
    chex.assert_trees_all_close(got, want, atol=5e-6, rtol=2e-5)


@pytest.mark.parametrize("axis", [0, (0, 2), None])
@pytest.mark.pairwise(1)
def test_vmap_over_other_axes(pair, implementation, rng, axis):
    """The reduced axes stay the example's own, wherever the mapped axis stands."""
    ours, reference = pair
    x = jnp.array(rng.normal(size=(3, 4, 5, 6)), jnp.float32)
    where = jnp.array(rng.random(size=(4, 1, 6)) < 0.8)

    def gradient(f, x, where):
        with_mask = lambda x: f(x, axis=axis, where=where)
        finite = lambda x: jnp.where(jnp.broadcast_to(where, x.shape), with_mask(x), 0)
        return jax.grad(lambda x: jnp.sum(jnp.sin(finite(x))))(x)

    ours = functools.partial(ours, implementation=implementation)
    both = lambda x, where: [gradient(f, x, where) for f in (ours, reference)]
    for in_axes in ((0, None), (3, 2)):
        data = x if in_axes[0] == 0 else jnp.moveaxis(x, 0, 3)
        mask = where if in_axes[1] is None else jnp.stack([where, ~where, where], 2)
        got, want = jax.jit(jax.vmap(both, in_axes))(data, mask)
        chex.assert_trees_all_close(got, want, atol=5e-6, rtol=2e-5)


@pytest.mark.versions
@pytest.mark.parametrize("name", [None, PROBABILITIES_NAME, ROW_MAX_NAME])
def test_what_checkpoint_computes_again(pair, rng, name):
    """With the kept array named in the policy, the backward runs no forward."""
    ours, _ = pair
    policy = name and jax.checkpoint_policies.save_only_these_names(name)
    loss = jax.checkpoint(
        lambda x: jnp.sum(ours(x, implementation="opaque") * WEIGHTS), policy=policy
    )
    text = str(jax.make_jaxpr(jax.grad(loss))(jnp.array(TANGENT)))
    own = PROBABILITIES_NAME if ours is softmax else ROW_MAX_NAME
    assert text.count("= lifted_call[") == (1 if name == own else 2)


@pytest.mark.versions
@pytest.mark.parametrize("policy", [None, "everything_saveable", "nothing_saveable"])
@pytest.mark.pairwise(1)
def test_derivatives_of_a_forward_whose_result_is_unused(
    pair, implementation, rng, policy
):
    """jax.checkpoint computes again what is left, and that has a derivative too."""
    x, v = jnp.array(rng.normal(size=SHAPE), jnp.float32), jnp.array(TANGENT)
    policy = policy and getattr(jax.checkpoint_policies, policy)

    def derivatives(f):
        f = jax.checkpoint(f, policy=policy)
        gradient = jax.grad(lambda x: jnp.sum(f(x) * WEIGHTS))
        again = jax.grad(lambda x: jnp.vdot(gradient(x), v))
        return gradient(x), again(x), jax.jvp(gradient, (x,), (v,))[1]

    ours, reference = pair
    got = derivatives(functools.partial(ours, implementation=implementation))
    chex.assert_trees_all_close(got, derivatives(reference), atol=5e-6, rtol=2e-5)


@pytest.mark.parametrize("name", [None, LOG_SUM_EXP_NAME])
def test_what_checkpoint_computes_again_of_logsumexp(name):
    policy = name and jax.checkpoint_policies.save_only_these_names(name)
    loss = jax.checkpoint(lambda x: jnp.sum(2 * logsumexp(x, -1)), policy=policy)
    text = str(jax.make_jaxpr(jax.grad(loss))(jnp.array(TANGENT)))
    assert text.count("= lifted_call[") == (1 if name else 2)


def test_opaque_refuses_differentiation():
    """The stand-in is opaque: without the rules it would not differentiate."""
    call = RowCall("softmax", (-1,), 1.0, np.dtype(np.float32))
    with pytest.raises(AssertionError, match="differentiated a kernel"):
        jax.grad(lambda x: opaque.run(call, (x, None))[0])(jnp.ones(3))


@pytest.mark.pairwise(1, rare=1)
def test_numerical_gradients(pair, implementation, rng):
    """Finite differences in float64, to second order, both modes."""
    ours, _ = pair
    with jax.enable_x64(True):
        x = jnp.array(rng.normal(size=(3, 5)))
        where = jnp.array([True, True, True, False, True])

        def f(x):
            y = ours(x, where=where, implementation=implementation)
            return jnp.where(jnp.broadcast_to(where, x.shape), y, 0)

        modes = ("fwd", "rev")
        check_grads(jax.jit(f), (x,), order=2, modes=modes, atol=1e-6, rtol=1e-6)


def test_jacobian_is_symmetric(implementation, rng):
    x = jnp.array(rng.normal(size=9), jnp.float32)
    f = functools.partial(softmax, implementation=implementation)
    both = jax.jit(lambda x: (jax.jacfwd(f)(x), jax.jacrev(f)(x)))
    for jacobian in both(x):
        np.testing.assert_allclose(jacobian, jacobian.T, atol=2e-8)


# --- cross-entropy --------------------------------------------------------------------

LABELS = np.array([3, 0, 5, -100, 1, 1, 4, 2], np.int32)
OPTIONS = {
    "label_smoothing": 0.1,
    "z_loss": 0.05,
    "logits_soft_cap": 2.0,
    "scale": 0.7,
}


def reference_statistics(x, labels, scale=1.0, softcap=None):
    """log P, that of the labels, the entropy and lse, as they are usually written."""
    z = scale * x
    z = z if softcap is None else softcap * jnp.tanh(z / softcap)
    log_p = jax.nn.log_softmax(z)
    picked = jnp.sum(jax.nn.one_hot(labels, x.shape[-1]) * log_p, -1)
    entropy = -jnp.sum(jnp.exp(log_p) * log_p, -1)
    return log_p, picked, entropy, jax.nn.logsumexp(z, -1)


def reference_loss(x, labels, reduction="none"):
    log_p, picked, _, lse = reference_statistics(x, labels, 0.7, 2.0)
    loss = -0.9 * picked - 0.1 * jnp.mean(log_p, -1) + 0.05 * lse**2
    counted = labels != -100
    loss = jnp.where(counted, loss, 0)
    if reduction == "none":
        return loss
    return jnp.sum(loss) / jnp.maximum(jnp.sum(counted.astype(loss.dtype)), 1)


def cross_entropy(reduction, **options):
    ours = functools.partial(
        softmax_cross_entropy_with_integer_labels,
        ignore_index=-100,
        reduction=reduction,
        **OPTIONS,
        **options,
    )
    return ours, functools.partial(reference_loss, reduction=reduction)


def token_statistics():
    def ours(x, labels, **options):
        y = token_logprobs_and_entropy(
            x, labels, ignore_index=-100, scale=0.7, **options
        )
        return y.logprobs + 2 * y.entropy - 0.5 * y.lse

    def reference(x, labels):
        _, picked, entropy, lse = reference_statistics(x, labels, 0.7)
        # Of a token that is left out all three are 0.
        return jnp.where(labels == -100, 0, picked + 2 * entropy - 0.5 * lse)

    return ours, reference


def alternatives():
    """Two labels per row, the same one or different."""

    def ours(x, labels, **options):
        several = jnp.stack([labels, jnp.where(labels == 2, labels, 1)], -1)
        y = token_logprobs_and_entropy(x, several, ignore_index=-100, **options)
        return y.logprobs[..., 0] - 3 * y.logprobs[..., 1] + y.entropy

    def reference(x, labels):
        one, two = (
            reference_statistics(x, each, 1.0)
            for each in (labels, jnp.where(labels == 2, labels, jnp.ones_like(labels)))
        )
        first = jnp.where(labels == -100, 0, one[1])
        return first - 3 * two[1] + two[2]

    return ours, reference


def signed_sum(f):
    """With weights of both signs, and one that is 0."""
    b = np.array([1.5, -0.5, 0.0, 2.0, 1.0, -0.25], np.float32)

    def call(x, labels, **options):
        weights = jnp.asarray(b.reshape((1,) * (x.ndim - 1) + b.shape))
        return f(x, -1, weights, return_sign=True, **options)[0]

    return call


LOSSES = {
    "logsumexp": tuple(
        lambda x, labels, f=f, **options: f(x, -1, **options)
        for f in (logsumexp, jax.nn.logsumexp)
    ),
    "signed": (signed_sum(logsumexp), signed_sum(jax.nn.logsumexp)),
    "none": cross_entropy("none"),
    "mean": cross_entropy("mean"),
    "in place": cross_entropy("mean", overwrite_logits=True),
    "tokens": token_statistics(),
    "alternatives": alternatives(),
}


def bounded_call(f, labels=LABELS):
    """A bounded function of x's shape, as the cases above take it."""

    def call(x):
        result = f(x, jnp.asarray(labels[: len(x)] if x.ndim == 2 else labels[0]))
        return jnp.sin(x) / (1 + (result[..., None] if result.ndim else result) ** 2)

    return call


def pair_of(name, implementation):
    ours, reference = LOSSES[name]
    return functools.partial(ours, implementation=implementation), reference


# What differs between the two implementations is seen by a few cases.
LOSS_CASES = {
    ("logsumexp", "opaque"): (
        *("value", "jvp", "vjp", "linearize", "hessian", "fwd_rev", "rev_rev"),
        *("fwd_fwd", "rev_fwd", "third", "vmap_vjp", "vmap_fwd_rev", "vmap_twice"),
        *("checkpoint", "checkpoint_nothing", "scan", "control_flow", "map"),
        *("shard_map", "shard_map_two_axes"),
    ),
    ("logsumexp", "xla"): ("value", "jvp", "vjp", "fwd_rev", "rev_rev"),
    ("signed", "xla"): (
        *("value", "jvp", "vjp", "linearize", "hessian", "fwd_rev", "rev_rev"),
        *("fwd_fwd", "third", "vmap_vjp", "checkpoint", "scan", "shard_map"),
    ),
    ("none", "opaque"): (
        *("value", "jvp", "vjp", "linearize", "hessian", "fwd_rev", "rev_rev"),
        *("fwd_fwd", "third", "vmap_vjp", "vmap_fwd_rev"),
        *("checkpoint", "scan", "control_flow"),
    ),
    ("mean", "opaque"): (
        *("jvp", "vjp", "linearize", "fwd_rev", "rev_rev", "rev_fwd"),
        "vmap_vjp",
    ),
    ("in place", "opaque"): ("jvp", "vjp", "rev_rev", "vmap_vjp"),
    ("tokens", "opaque"): ("jvp", "vjp", "fwd_rev", "rev_rev", "vmap_vjp"),
    ("alternatives", "opaque"): (
        *("jvp", "vjp", "fwd_rev", "rev_rev", "hessian", "third", "vmap_vjp"),
        *("vmap_fwd_rev", "checkpoint", "scan", "shard_map"),
    ),
    ("none", "xla"): ("jvp", "vjp", "rev_rev"),
    ("mean", "xla"): ("value", "vjp", "fwd_rev", "vmap_vjp"),
    ("tokens", "xla"): ("jvp", "vjp"),
}


# What is made of other cases; of softmax make test has them.
RARE_CASES = ("hessian", "third", "vmap_fwd_rev", "control_flow")


@pytest.mark.parametrize(
    ("name", "implementation", "case"),
    [
        pytest.param(*key, case, marks=[pytest.mark.slow] * (case in RARE_CASES))
        for key, cases in LOSS_CASES.items()
        for case in cases
    ],
)
@pytest.mark.pairwise(1)
def test_transform_of_cross_entropy(name, implementation, rng, case):
    x = jnp.array(rng.normal(size=SHAPE), jnp.float32)

    @jax.jit
    def both(x, v):
        pair = pair_of(name, implementation)
        return tuple(CASES[case](bounded_call(f), x, v) for f in pair)

    got, want = both(x, jnp.array(TANGENT))
    chex.assert_trees_all_close(got, want, atol=2e-5, rtol=5e-5)


@pytest.mark.parametrize("name", ["none", "mean"])
@pytest.mark.parametrize("in_axes", [(0, None), (None, 0), (2, 1)])
@pytest.mark.pairwise(1)
def test_vmap_of_labels_and_logits(name, rng, in_axes):
    """Either, or both; with an ignored label among them."""
    x = jnp.array(rng.normal(size=(3, 8, 6)), jnp.float32)
    labels = jnp.array([np.roll(LABELS, i) for i in range(3)])
    x = x[0] if in_axes[0] is None else jnp.moveaxis(x, 0, in_axes[0])
    labels = labels[0] if in_axes[1] is None else jnp.moveaxis(labels, 0, in_axes[1])

    def both(x, labels):
        def of(f):
            y, pull = jax.vjp(lambda x: f(x, labels), x)
            return y, pull(jnp.cos(y))

        return tuple(map(of, pair_of(name, "opaque")))

    got, want = jax.jit(jax.vmap(both, in_axes))(x, labels)
    chex.assert_trees_all_close(got, want, atol=5e-6, rtol=2e-5)


@pytest.mark.parametrize("implementation", ["xla", "opaque"])
@pytest.mark.parametrize("in_axes", [(0, None), (None, 0)])
@pytest.mark.pairwise(1)
def test_vmap_of_labels_that_are_weights(implementation, rng, in_axes):
    """What is of one of the two alone has the whole batch too."""
    shape = (3, *SHAPE)
    x, labels = (
        jnp.array(rng.random(size=SHAPE if axis is None else shape), jnp.float32)
        for axis in in_axes
    )
    f = functools.partial(softmax_cross_entropy, implementation=implementation)

    def reference(x, labels):
        return -jnp.sum(labels * jax.nn.log_softmax(x), -1)

    def derivatives(f, *arrays):
        pulled = jax.vjp(f, *arrays)[1](jnp.arange(1.0, 9.0))
        return pulled, jax.jvp(f, arrays, arrays)

    both = lambda *arrays: [derivatives(g, *arrays) for g in (f, reference)]
    got, want = jax.jit(jax.vmap(both, in_axes))(x, labels)
    chex.assert_trees_all_close(got, want, atol=2e-5, rtol=2e-5)


def test_cross_entropy_without_jit(rng):
    x, v = jnp.array(rng.normal(size=SHAPE), jnp.float32), jnp.array(TANGENT)
    got, want = (MODES["vjp"](bounded_call(f), x, v) for f in pair_of("none", "xla"))
    chex.assert_trees_all_close(got, want, atol=5e-6, rtol=2e-5)


def test_no_leaked_tracers_of_cross_entropy(leak_checks):
    ours, _ = LOSSES["mean"]
    jax.jit(functools.partial(MODES["vjp"], bounded_call(ours))).lower(TANGENT, TANGENT)


@pytest.mark.parametrize("in_axes", [(0, None, None), (None, 0, 1), (2, 1, None)])
def test_vmap_of_logits_weights_and_masks(rng, in_axes):
    """Of logsumexp: each of them, or some."""
    arrays = [
        rng.normal(size=(3, 4, 6)).astype(np.float32),
        rng.uniform(0.2, 2, size=(3, 4, 6)).astype(np.float32),
        rng.random(size=(3, 4, 6)) < 0.8,
    ]
    arrays = [
        jnp.array(a[0] if axis is None else np.moveaxis(a, 0, axis))
        for a, axis in zip(arrays, in_axes, strict=True)
    ]

    def derivatives(f, x, b, where):
        g = lambda x, b: f(x, -1, b, where=where, return_sign=True)
        total = lambda x, b: jnp.sum(jnp.sin(g(x, b)[0]))
        moved = jnp.cos(x), jnp.cos(b)
        gradient = jax.grad(total, (0, 1))
        return (
            jax.jvp(g, (x, b), moved),
            jax.jvp(gradient, (x, b), moved),
            f(x, -1, where=where),
            jax.grad(lambda x: jnp.sum(jnp.sin(f(x, -1, where=where))))(x),
        )

    both = lambda *a: [derivatives(f, *a) for f in (logsumexp, jax.nn.logsumexp)]
    got, want = jax.jit(jax.vmap(both, in_axes))(*arrays)
    chex.assert_trees_all_close(got, want, atol=5e-6, rtol=2e-5)


@pytest.mark.versions
@pytest.mark.parametrize("implementation", ["xla", "opaque"])
@pytest.mark.parametrize("signed", [False, True])
def test_derivatives_of_logsumexp(rng, implementation, signed):
    """In logits and weights to second order, with every mixed term, in float64."""
    with jax.enable_x64(True):
        x, v, b, w = jnp.array(rng.normal(size=(4, 3, 5)))
        if not signed:
            b = jnp.abs(b)
        where = jnp.array([[True, True, False, True, True]])

        def both(x, b):
            def of(f):
                g = lambda x, b: f(x, -1, b, return_sign=True, where=where)[0]
                loss = lambda x, b: jnp.sum(jnp.sin(g(x, b)))
                gradient = jax.grad(loss, (0, 1))
                product = lambda x, b: sum(
                    jnp.vdot(a, t) for a, t in zip(gradient(x, b), (v, w), strict=True)
                )
                return (
                    jax.jvp(g, (x, b), (v, w)),
                    gradient(x, b),
                    jax.jvp(gradient, (x, b), (v, w))[1],
                    jax.grad(product, (0, 1))(x, b),
                )

            ours = functools.partial(logsumexp, implementation=implementation)
            return of(ours), of(jax.nn.logsumexp)

        got, want = jax.jit(both)(x, b)
        chex.assert_trees_all_close(got, want, rtol=1e-10, atol=1e-11)
        f = lambda x, b: logsumexp(x, -1, b, return_sign=True, where=where)[0]
        modes = ("fwd", "rev")
        check_grads(jax.jit(f), (x, b), order=2, modes=modes, atol=1e-5, rtol=1e-5)


WHERE = np.array([[True, True, True, False, True]])


def all_arrays(dense, reduction, smoothing):
    """Functions of logits, class weights, scale and labels; ours and a reference."""
    options = {"label_smoothing": smoothing, "z_loss": 0.05, "logits_soft_cap": 2.0}
    indices = np.array([0, 4, 1], np.int32)

    def ours(x, w, scale, labels):
        f = softmax_cross_entropy
        if not dense:
            f, labels = softmax_cross_entropy_with_integer_labels, indices
        return f(
            x,
            labels,
            where=WHERE,
            class_weights=w,
            scale=scale,
            reduction=reduction,
            implementation="opaque",
            **options,
        )

    def reference(x, w, scale, labels):
        z = jnp.where(WHERE, 2 * jnp.tanh(scale * x / 2), -jnp.inf)
        cost = jnp.where(WHERE, -jax.nn.log_softmax(z, where=WHERE), 0)
        if not dense:
            labels = jax.nn.one_hot(indices, 5, dtype=x.dtype)
        t = (1 - smoothing) * labels + smoothing / 4
        lse = jax.nn.logsumexp(z, -1)
        loss = jnp.sum(t * w[None] * cost, -1) + 0.05 * lse**2
        return loss if reduction == "none" else jnp.mean(loss)

    return ours, reference


@pytest.mark.versions
@pytest.mark.parametrize(
    ("dense", "reduction", "smoothing"),
    [(True, "none", 0.1), (False, "mean", 0.0)],
)
def test_derivatives_in_all_arrays(rng, dense, reduction, smoothing):
    """To second order, with every mixed term, in float64."""
    with jax.enable_x64(True):
        arguments, v = (
            (
                jnp.array(rng.normal(size=(3, 5))),
                jnp.array(rng.uniform(0.5, 2, size=5)),
                jnp.array(rng.uniform(0.5, 2)),
                jnp.array(rng.uniform(0.5, 2, size=(3, 5))),
            )
            for _ in range(2)
        )

        @jax.jit
        def both(arguments, v):
            def of(f):
                loss = lambda a: jnp.sum(jnp.sin(f(*a)))
                return (
                    jax.jvp(lambda a: f(*a), (arguments,), (v,)),
                    jax.grad(loss)(arguments),
                    jax.jvp(jax.grad(loss), (arguments,), (v,))[1],
                )

            return tuple(map(of, all_arrays(dense, reduction, smoothing)))

        got, want = both(arguments, v)
        chex.assert_trees_all_close(got, want, rtol=1e-11, atol=1e-12)


def test_numerical_gradients_of_cross_entropy(rng):
    """Finite differences: what the references above are right about."""
    with jax.enable_x64(True):
        f, _ = all_arrays(True, "none", 0.1)
        arguments = (
            jnp.array(rng.normal(size=(3, 5))),
            jnp.array(rng.uniform(0.5, 2, size=5)),
            jnp.array(0.7),
            jnp.array(rng.random(size=(3, 5))),
        )
        modes = ("fwd", "rev")
        check_grads(jax.jit(f), arguments, order=1, modes=modes, atol=1e-6, rtol=1e-6)


def test_opaque_cross_entropy_refuses_differentiation():
    labels, weight = jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1))

    def run(op, x, *others):
        arrays = (x, None, *others)
        structs = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), arrays)
        call = RowCall(op, (-1,), 1.0, np.dtype(np.float32), Options(), arrays=structs)
        return jnp.sum(jax.tree.leaves(opaque.run(call, arrays))[0])

    for op, *others in (
        ("cross_entropy", labels),
        ("cross_entropy_with_gradient", labels, weight, weight),
    ):
        with pytest.raises(AssertionError, match="differentiated a kernel"):
            jax.grad(lambda x, op=op, others=others: run(op, x, *others))(
                jnp.ones((1, 3))
            )


@pytest.mark.parametrize("f", [softmax, log_softmax])
def test_derivatives_of_nested_vmaps_over_other_axes(f, rng):
    """Of a call in two vmaps, of which each moves the axis that is reduced."""
    x = jnp.array(rng.normal(size=(4, 2, 3)), jnp.float32)
    over = functools.partial(jax.vmap, in_axes=-1, out_axes=-1)

    def derivatives(f, x):
        loss = lambda x: jnp.sum(jnp.sin(f(x)))
        return jax.grad(loss)(x), jax.jvp(jax.grad(loss), (x,), (jnp.cos(x),))[1]

    functions = over(over(f)), functools.partial(f, axis=0)
    got, want = jax.jit(lambda x: [derivatives(g, x) for g in functions])(x)
    chex.assert_trees_all_close(got, want, atol=1e-6)
