"""Attention in every derivative mode, under every transform, in float64.

Against the formula with all probabilities as an array, which jax differentiates: what
differs by more than rounding of float64 is a wrong rule.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import hlo
from support.attention_cases import arrays, attention, dense, reference

import jaxsoftmax

T, S = 20, 24  # two blocks each, which overlap


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def inputs(rng, kind):
    """Float arrays, others, and what is static."""
    floats = arrays(rng, T, S, 4, 2, 4, 3, (2,), "float64")
    if kind == "plain":
        return floats, {}, {}
    floats["bias"] = jnp.array(rng.normal(size=(4, T, 1)))
    floats["sinks"] = jnp.array(rng.normal(size=4))
    floats["scale"] = jnp.array(rng.normal(size=(4, T, 1)))
    others = {
        "mask": jnp.array(rng.random(size=(2, 1, T, S)) < 0.8),
        "query_seq_lengths": jnp.array([T, 17], jnp.int32),
        "key_value_seq_lengths": jnp.array([18, S], jnp.int32),
        "q_segment_ids": jnp.array(np.arange(T) // 11 * np.ones((2, 1)), jnp.int32),
        "kv_segment_ids": jnp.array(np.arange(S) // 11 * np.ones((2, 1)), jnp.int32),
        "query_offset": jnp.array([2, -3], jnp.int32),
        "dropout_key": jax.random.key(4),
    }
    static = {
        "is_causal": True,
        "local_window_size": (12, 5),
        "logits_soft_cap": 2.0,
        "dropout_rate": 0.3,
    }
    return floats, others, static


def like(rng, tree):
    return jax.tree.map(lambda x: jnp.array(rng.normal(size=x.shape), x.dtype), tree)


def ours(**arguments):
    return attention(**arguments, return_residual=True)


def weights(shape):
    return jnp.array(np.random.default_rng(1).normal(size=shape))


def scalar(f):
    """A loss that is linear in neither out nor lse; of finite lse alone."""

    def loss(floats):
        out, lse = f(floats)
        finite = jnp.isfinite(lse)
        lse = jnp.where(finite, jnp.where(finite, lse, 0), 0)
        return jnp.sum(jnp.sin(out) * weights(out.shape)) + jnp.sum(jnp.cos(lse))

    return loss


def finite(y):
    return jax.tree.map(lambda x: jnp.where(jnp.isfinite(x), x, 0), y)


def hvp(loss, x, v):
    return jax.jvp(jax.grad(loss), (x,), (v,))[1]


def dot(x, y):
    return sum(
        jnp.vdot(a, b) for a, b in zip(*map(jax.tree.leaves, (x, y)), strict=True)
    )


def reverse_over_reverse(loss, x, v):
    return jax.grad(lambda x: dot(jax.grad(loss)(x), v))(x)


def forward_over_forward(f, x, v):
    return jax.jvp(lambda x: jax.jvp(f, (x,), (v,))[1], (x,), (v,))[1]


def reverse_over_forward(f, x, v):
    return jax.grad(lambda x: jnp.sum(jnp.cos(jax.jvp(f, (x,), (v,))[1][0])))(x)


def linearized(f, x, v):
    y, push = jax.linearize(f, x)
    return finite(y), push(v), jax.linear_transpose(push, x)(finite(y))


SLOW = pytest.mark.slow
MODES = {
    "jvp": lambda f, x, v: finite(jax.jvp(f, (x,), (v,))),
    "vjp": lambda f, x, v: jax.grad(scalar(f))(x),
    "linearize": linearized,
    "fwd_rev": lambda f, x, v: hvp(scalar(f), x, v),
    "rev_rev": lambda f, x, v: reverse_over_reverse(scalar(f), x, v),
    "fwd_fwd": forward_over_forward,
    "rev_fwd": reverse_over_forward,
    "third": lambda f, x, v: jax.jvp(lambda x: hvp(scalar(f), x, v), (x,), (v,))[1],
}


# Made of the others' rules.
RARE_MODES = ("rev_fwd", "third")


def both(mode, others, static, compiled=jax.jit):
    """What a mode gives with our function, and with the formula."""

    def run(x, v, others):
        return [
            mode(lambda x, f=f: f(**x, **others, **static), x, v) for f in (ours, dense)
        ]

    return lambda x, v: compiled(run)(x, v, others)


def assert_close(got, want, bar=1e-11):
    """Rounding of float64, of sums of some hundred terms of size 1."""
    chex.assert_trees_all_close(got, want, atol=bar, rtol=bar)


@pytest.mark.parametrize(
    ("kind", "mode"),
    [("all options", mode) for mode in MODES if mode not in RARE_MODES]
    + [pytest.param("all options", mode, marks=SLOW) for mode in RARE_MODES]
    + [pytest.param("plain", mode, marks=SLOW) for mode in ("jvp", "fwd_rev")],
)
def test_mode(small_blocks, rng, kind, mode):
    floats, others, static = inputs(rng, kind)
    v = like(rng, floats)
    assert_close(*both(MODES[mode], others, static)(floats, v))


@pytest.mark.versions
def test_forward_mode_against_the_oracle(small_blocks, rng):
    """And the inner-product identity with the vjp."""
    floats, others, static = inputs(rng, "all options")
    v = like(rng, floats)
    f = lambda x: ours(**x, **others, **static)

    @jax.jit
    def run(floats, v):
        y, pull = jax.vjp(f, floats)
        g = like(np.random.default_rng(3), y)
        pushed = jax.jvp(f, (floats,), (v,))[1]
        return pushed, dot(finite(pushed), g), dot(pull(g)[0], v)

    pushed, a, b = run(floats, v)
    want = reference(floats, others, static).jvp(**v)
    for x, y in zip(pushed, want, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-12)
    np.testing.assert_allclose(a, b, rtol=1e-12)


@pytest.mark.versions
def test_jacobians_and_hessian(rng):
    """Each of the two modes gives all of them."""
    floats = arrays(rng, 3, 4, 2, 1, 2, 1, (1,), "float64")
    floats["bias"] = jnp.array(rng.normal(size=(3, 4)))
    f = lambda x: ours(**x, is_causal=True)

    @jax.jit
    def run(x):
        return jax.jacfwd(f)(x), jax.jacrev(f)(x), jax.hessian(scalar(f))(x)

    forward, reverse, hessian = run(floats)
    assert_close(forward, reverse)
    of = lambda x: dense(**x, is_causal=True)
    assert_close(hessian, jax.jit(jax.hessian(scalar(of)))(floats))


def test_every_argument_alone(small_blocks, rng):
    """A gradient or a tangent of some arguments is that of all, for these."""
    floats, _, _ = inputs(rng, "all options")
    v = like(rng, floats)
    f = lambda x: ours(**x, is_causal=True, logits_soft_cap=2.0)
    names = [("query", "bias"), ("key",), ("value",), ("sinks",), ("scale",)]

    @jax.jit
    def run(floats, v):
        loss = scalar(f)
        whole = jax.grad(loss)(floats), finite(jax.jvp(f, (floats,), (v,))[1])
        parts = []
        for some in names:
            part = {name: floats[name] for name in some}
            tangents = {name: v[name] for name in some}
            at = lambda part: f({**floats, **part})
            pushed = finite(jax.jvp(at, (part,), (tangents,))[1])
            parts.append((jax.grad(scalar(at))(part), pushed))
        return whole, parts

    (gradient, pushed), parts = run(floats, v)
    for some, (d, _) in zip(names, parts, strict=True):
        assert_close(d, {name: gradient[name] for name in some})
    # A tangent is the sum of those of the arguments.
    total = jax.tree.map(lambda *x: sum(x), *(each for _, each in parts))
    assert_close(total, pushed)


def test_what_is_not_asked_for_is_not_computed():
    """Products of rows in the backward: 5 in all, fewer for some arguments."""
    struct = jax.ShapeDtypeStruct((1, 8, 2, 4), "float32")

    def count(argnums):
        loss = lambda *x: jnp.sum(jnp.sin(ours(**dict(zip(NAMES, x, strict=True)))[0]))
        lowered = jax.jit(jax.grad(loss, argnums)).lower(struct, struct, struct)
        return hlo.products(lowered)

    both, forward = count((0, 1, 2)), 2
    assert both == forward + 5
    assert count(0) == count(1) == forward + 3
    assert count(2) == forward + 2


NAMES = ("query", "key", "value")


@pytest.mark.parametrize("kind", ["plain", "all options"])
def test_max_logits_have_no_derivative(small_blocks, rng, kind):
    """In no mode; and leave those of the other results. Under vmap too."""
    floats, others, static = inputs(rng, kind)
    v = like(rng, floats)

    def f(x):
        return attention(
            **x, **others, **static, return_residual=True, return_max_logits=True
        )

    def others_alone(x):
        return ours(**x, **others, **static)

    def loss(x):
        return scalar(lambda x: f(x)[:2])(x) + jnp.sum(jnp.sin(f(x)[2]))

    @jax.jit
    def run(x, v):
        (_, _, largest), pushed = jax.jvp(f, (x,), (v,))
        got, want = [jax.grad(loss)(x)], [MODES["vjp"](others_alone, x, v)]
        if kind == "plain":
            want += [MODES[name](others_alone, x, v) for name in ("fwd_rev", "rev_rev")]
            got += [hvp(loss, x, v), reverse_over_reverse(loss, x, v)]
        some = {name: a[None] for name, a in x.items()}
        return largest, pushed[2], jax.vmap(f)(some)[2][0], got, want

    largest, pushed, mapped, got, want = run(floats, v)
    np.testing.assert_array_equal(mapped, largest)
    np.testing.assert_array_equal(pushed, 0)
    assert_close(got, want)


def test_several_batch_dimensions_in_every_mode(small_blocks, rng):
    """One is folded and one is mapped; under vmap too."""
    floats = arrays(rng, T, S, 4, 2, 4, 3, (2, 3), "float64")
    floats["bias"] = jnp.array(rng.normal(size=(2, 1, 4, T, S)))
    mask = jnp.array(rng.random(size=(3, 1, 1, S)) < 0.8)
    v = like(rng, floats)

    def in_one(x):
        full = {**x, "bias": jnp.broadcast_to(x["bias"], (2, 3, *x["bias"].shape[2:]))}
        flat = {name: a.reshape(6, *a.shape[2:]) for name, a in full.items()}
        found = dense(**flat, mask=jnp.concatenate([mask, mask]), is_causal=True)
        return jax.tree.map(lambda a: a.reshape(2, 3, *a.shape[1:]), found)

    @jax.jit
    def run(x, v):
        several = lambda x: ours(**x, mask=mask, is_causal=True)
        mapped = jax.vmap(several)
        lifted = lambda x: jax.tree.map(
            lambda a: a[0], mapped(jax.tree.map(lambda a: a[None], x))
        )
        modes = {name: MODES[name] for name in ("jvp", "vjp", "fwd_rev")}
        got, want = (
            {name: mode(f, x, v) for name, mode in modes.items()}
            for f in (several, in_one)
        )
        return got, want, {"vjp": MODES["vjp"](lifted, x, v)}

    several, want, lifted = run(floats, v)
    assert_close(several, want)
    assert_close(lifted, {"vjp": want["vjp"]})


# --- vmap -----------------------------------------------------------------------------


def stacked(f, axes, size, arguments):
    """A loop over the mapped arguments, in the place of vmap."""

    def example(i):
        return {
            name: x if axes[name] is None else np.take(np.asarray(x), i, axes[name])
            for name, x in arguments.items()
        }

    return jax.tree.map(lambda *x: np.stack(x), *(f(example(i)) for i in range(size)))


MAPPED = ("query", "key", "value", "bias")
# Each alone, each pair once with and without the third, and all.
SUBSETS = [
    *((name,) for name in MAPPED),
    *(("query", "key"), ("key", "value", "bias"), ("query", "value"), MAPPED),
]


def test_vmap_over_every_subset_of_arguments(rng):
    """Values and gradients of one block; a gradient is one of each example."""
    size = 3
    one = arrays(rng, 5, 6, 2, 1, 4, 3, (1,), "float64")
    one["bias"] = jnp.array(rng.normal(size=(2, 1, 6)))
    many = {
        name: jnp.array(rng.normal(size=(size, *x.shape))) for name, x in one.items()
    }

    def f(x):
        value = functools.partial(ours, is_causal=True)
        return value(**x), jax.grad(scalar(lambda x: value(**x)))(x)

    each = jax.jit(f)

    @jax.jit
    def run(one, many):
        results = []
        for some in SUBSETS:
            axes = {name: 0 if name in some else None for name in one}
            given = {name: (many if name in some else one)[name] for name in one}
            results.append(jax.vmap(f, in_axes=(axes,))(given))
        return results

    for some, got in zip(SUBSETS, run(one, many), strict=True):
        axes = {name: 0 if name in some else None for name in one}
        given = {name: (many if name in some else one)[name] for name in one}
        assert_close(got, stacked(each, axes, size, given))


# Which are mapped, of all arguments; and over which axis of each.
ALL_MAPPED = [
    {"query": 0, "key": 1, "mask": 0, "q_segment_ids": 0, "kv_segment_ids": 2},
    {"value": 4, "key_value_seq_lengths": 1, "sinks": 1},
    {"bias": 3, "query_seq_lengths": 0, "dropout_key": 0, "query_offset": 1},
    {"key": 2, "dropout_key": 0, "scale": 1, "key_value_seq_lengths": 0, "mask": 4},
    {"q_segment_ids": 0, "kv_segment_ids": 2, "sinks": 0},
]


@pytest.mark.parametrize(
    "mapped",
    [*ALL_MAPPED[:3], *(pytest.param(each, marks=SLOW) for each in ALL_MAPPED[3:])],
    ids=lambda x: "-".join(x),
)
def test_vmap_with_all_options(small_blocks, rng, mapped):
    """Over whatever axis, of whatever arguments; against a loop over the formula."""
    floats, others, static = inputs(rng, "all options")
    others["dropout_key"] = jax.random.key_data(others["dropout_key"])
    arguments = {**floats, **others}
    for name, axis in mapped.items():
        x = arguments[name]
        if name == "dropout_key":
            more = jax.random.key_data(jax.random.key(8))
        elif jnp.issubdtype(x.dtype, jnp.floating):
            more = jnp.array(rng.normal(size=x.shape))
        elif x.dtype == bool:
            more = jnp.array(rng.random(size=x.shape) < 0.7)
        else:
            more = jnp.maximum(x - 2, 0)
        arguments[name] = jnp.stack([x, more], axis)
    axes = {name: mapped.get(name) for name in arguments}
    split = functools.partial(value_and_gradient, tuple(floats), tuple(static.items()))
    got = jax.jit(jax.vmap(functools.partial(split, ours), in_axes=(axes,)))(arguments)
    assert_close(
        got, stacked(functools.partial(formula_result, split), axes, 2, arguments)
    )


def value_and_gradient(names, static, f, arguments):
    x = {name: a for name, a in arguments.items() if name in names}
    rest = {name: a for name, a in arguments.items() if name not in names}
    rest["dropout_key"] = jax.random.wrap_key_data(rest["dropout_key"])
    value = lambda x: f(**x, **rest, **dict(static))
    return finite(value(x)), jax.grad(scalar(value))(x)


@functools.cache
def jitted_formula(*key):
    return jax.jit(functools.partial(value_and_gradient, *key, dense))


def formula_result(split, arguments):
    return jitted_formula(*split.args)(arguments)


@pytest.mark.versions
def test_vmap_twice_and_over_heads(small_blocks, rng):
    """The batch as two mapped axes; and each head on its own."""
    floats = arrays(rng, T, S, 2, 2, 4, 3, (4,), "float64")

    def value_and_slope(x):  # the weights of the loss are one example's
        value = lambda x: ours(**x, is_causal=True)
        return value(x), jax.grad(lambda x: jnp.sum(jnp.sin(value(x)[0])))(x)

    @jax.jit
    def run(floats):
        want = value_and_slope(floats)
        grid = jax.tree.map(lambda x: x.reshape(2, 2, *x.shape[1:]), floats)
        twice = jax.vmap(jax.vmap(value_and_slope))(grid)
        twice = jax.tree.map(lambda x: x.reshape(4, *x.shape[2:]), twice)
        one_head = lambda x: value_and_slope({n: a[:, :, None] for n, a in x.items()})
        heads = jax.vmap(one_head, in_axes=2, out_axes=2)(floats)
        heads = jax.tree.map(lambda x: jnp.squeeze(x, 3), heads)
        return want, twice, heads

    want, twice, heads = run(floats)
    assert_close(twice, want)
    assert_close(heads, want)


# --- other transforms -----------------------------------------------------------------


def through_checkpoint(policy):
    def run(f, x, v):
        loss = jax.checkpoint(scalar(f), policy=policy)
        return jax.grad(loss)(x), hvp(loss, x, v)

    return run


def through_scan(f, x, v):
    """In the body of a scan, differentiated from outside and inside."""

    def body(c, w):
        q = c + jax.grad(lambda q: scalar(f)({**x, "query": q}))(c) * w
        return q, jnp.sum(f({**x, "query": q})[0])

    def outside(q):
        q, sums = jax.lax.scan(body, q, jnp.array([0.1, 0.2]))
        return jnp.sum(jnp.sin(q)) + jnp.sum(sums)

    return jax.value_and_grad(outside)(x["query"])


def through_control_flow(f, x, v):
    def loss(x):
        y = jax.lax.cond(x["query"][0, 0, 0, 0] < 99, scalar(f), lambda x: 0.0, x)
        step = lambda i, q: q + f({**x, "query": q})[0].sum(-1, keepdims=True)
        return y + jnp.sum(jnp.sin(jax.lax.fori_loop(0, 2, step, x["query"])))

    return jax.grad(loss)(x)


def lse_alone(f, x, v):
    loss = lambda x: jnp.sum(jnp.sin(finite(f(x)[1])))
    return jax.grad(loss)(x), hvp(loss, x, v)


OTHERS = {
    "checkpoint": through_checkpoint(None),
    "checkpoint_everything": through_checkpoint(
        jax.checkpoint_policies.everything_saveable
    ),
    "scan": through_scan,
    "control_flow": through_control_flow,
    "lse": lse_alone,
}


OTHER_MARKS = {
    "checkpoint_everything": SLOW,
    "control_flow": SLOW,
    "scan": pytest.mark.versions,
    "lse": pytest.mark.versions,
}


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=OTHER_MARKS.get(case, [])) for case in OTHERS],
)
def test_transform(small_blocks, rng, case):
    floats, others, static = inputs(rng, "plain")
    floats["sinks"] = jnp.array(rng.normal(size=4))
    static["is_causal"] = True
    v = like(rng, floats)
    assert_close(*both(OTHERS[case], others, static)(floats, v))


def test_without_jit(rng):
    floats = arrays(rng, 5, 6, 2, 1, 4, 3, (1,), "float64")
    f = lambda x: ours(**x, is_causal=True)
    found = jax.vjp(f, floats)
    want, pull = jax.jit(functools.partial(jax.vjp, f))(floats)
    assert_close(found[0], want)
    assert_close(found[1](want), pull(want))


@pytest.mark.versions
@pytest.mark.parametrize("mode", ["vjp", "fwd_rev"])
def test_no_leaked_tracers(small_blocks, rng, leak_checks, mode):
    floats, others, static = inputs(rng, "all options")
    f = lambda x: ours(**x, **others, **static)
    jax.eval_shape(functools.partial(MODES[mode], f), floats, like(rng, floats))


def test_merging_in_every_mode(rng):
    """Of parts of the keys: as the whole, with derivatives of both orders."""
    floats, _, _ = inputs(rng, "plain")
    v = like(rng, floats)

    def merged(x):
        cut = lambda part: {n: a if n == "query" else a[:, part] for n, a in x.items()}
        first, second = (ours(**cut(part)) for part in (slice(0, 9), slice(9, None)))
        return jaxsoftmax.merge_attention(*first, *second)

    @jax.jit
    def run(x, v):
        modes = [MODES[name] for name in ("jvp", "vjp", "fwd_rev")]
        return [
            [mode(f, x, v) for mode in modes] for f in (merged, lambda x: dense(**x))
        ]

    assert_close(*run(floats, v))


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=SLOW)])
def test_second_order_in_16_bits(small_blocks, rng, dtype):
    """Tangents of 16 bits of results in 16 bits: a few roundings, in a norm.

    In reverse over reverse the result and its low digits both have a cotangent.
    """
    floats = arrays(rng, T, S, 4, 2, 8, dtype=dtype)
    v = like(rng, floats)

    def run(f, x, v):
        loss = lambda x: jnp.sum(jnp.sin(f(**x, is_causal=True)[0].astype(jnp.float32)))
        return jax.jvp(jax.grad(loss), (x,), (v,)), reverse_over_reverse(loss, x, v)

    got = jax.jit(functools.partial(run, ours))(floats, v)
    wide = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float64), tree)
    want = jax.jit(functools.partial(run, dense))(wide(floats), wide(v))
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert x.dtype == dtype
        error = np.linalg.norm(np.asarray(x, np.float64) - y)
        assert error <= 4 * float(jnp.finfo(dtype).eps) * np.linalg.norm(y)
