"""jaxsoftmax.flax.attention_fn in Flax's modules, against Flax's own attention."""

import contextlib
import functools
import inspect
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import hlo

import jaxsoftmax
import jaxsoftmax.flax
from jaxsoftmax._attend import xla
from jaxsoftmax.flax import attention_fn

pytest.importorskip("flax")
from flax import linen, nnx

BATCH, LENGTH, HEADS, DEPTH = 2, 5, 6, 3
FEATURES = HEADS * DEPTH


@contextlib.contextmanager
def flax_rules():
    """Lets Flax promote: its own code mixes dtypes and ranks, which tests forbid."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


# functools.wraps: linen reads the signature, and must see that of attention_fn.
@functools.wraps(attention_fn)
def ours(*args, **kwargs):
    """attention_fn under the strict rules again, where Flax's code runs without."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        return attention_fn(*args, **kwargs)


def normal(seed, *shape, dtype=jnp.float32):
    # NumPy: what is not compiled does not have to be waited for.
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(dtype))


def qkv(*, key_heads=HEADS, key_length=LENGTH, batch=(BATCH,), dtype=jnp.float32):
    return (
        normal(0, *batch, LENGTH, HEADS, DEPTH, dtype=dtype),
        normal(1, *batch, key_length, key_heads, DEPTH, dtype=dtype),
        normal(2, *batch, key_length, key_heads, DEPTH, dtype=dtype),
    )


def one_hot_values(key_heads=HEADS, dtype=jnp.float32):
    """Values with which the output is the attention weights themselves."""
    value = np.eye(LENGTH)[:, None, :].repeat(key_heads, axis=1)
    return jnp.asarray(value[None].repeat(BATCH, axis=0).astype(dtype))


def call(fn, *arrays, **options):
    """`fn` compiled as one program, which is faster than its operations one by one."""
    traced = {k: v for k, v in options.items() if isinstance(v, jax.Array)}
    static = {k: v for k, v in options.items() if k not in traced}
    return jax.jit(functools.partial(fn, **static))(*arrays, **traced)


attend = functools.partial(call, attention_fn)


def random_mask(*shape):
    """A boolean mask in which every query may attend to key 0."""
    mask = np.random.default_rng(3).random(shape) < 0.5
    mask[..., 0] = True
    return jnp.asarray(mask)


def make_mask(kind):
    """The masks the module tests go through; Flax's makers return float32."""
    if kind == "none":
        return None
    if kind == "bool":
        return random_mask(BATCH, HEADS, LENGTH, LENGTH)
    if kind == "padding":
        valid = jnp.asarray([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], jnp.float32)
        with flax_rules():
            return linen.make_attention_mask(jnp.ones((BATCH, LENGTH)), valid)
    assert kind == "causal"
    return linen.make_causal_mask(jnp.ones((BATCH, LENGTH)))


def close(got, want, tolerance=1e-5):
    """Differs by no more than `tolerance` times the largest entry of `want`.

    Of a tree, the largest entry of all arrays: the gradient of the bias of the keys,
    for one, is rounding alone, since a softmax does not change when logits shift.
    """
    assert jax.tree.structure(got) == jax.tree.structure(want)
    pairs = list(zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True))
    limit = tolerance * max(np.abs(np.asarray(y, np.float64)).max() for _, y in pairs)
    for x, y in pairs:
        assert x.dtype == y.dtype
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        np.testing.assert_allclose(x, y, rtol=0, atol=limit)


def filled(tree):
    """Arrays of the shapes in `tree`, drawn by NumPy; integers (counters) are 0."""
    rng = np.random.default_rng(6)

    def fill(x):
        if jnp.issubdtype(x.dtype, jnp.integer):
            return jnp.zeros(x.shape, x.dtype)
        return jnp.asarray(0.5 * rng.normal(size=x.shape).astype(x.dtype))

    return jax.tree.map(fill, tree)


def numpy_attention(query, key, value, bias=None, mask=None):
    """Attention in float64; a row of no keys has weights of zero."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    repeats = query.shape[-2] // key.shape[-2]
    key, value = (np.repeat(x, repeats, axis=-2) for x in (key, value))
    logits = np.einsum("...qhd,...khd->...hqk", query, key) / np.sqrt(query.shape[-1])
    if bias is not None:
        logits = logits + np.asarray(bias, np.float64)
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    if mask is not None:
        powers = np.where(mask, powers, 0.0)
    total = powers.sum(axis=-1, keepdims=True)
    weights = powers / np.where(total == 0.0, 1.0, total)
    return np.einsum("...hqk,...khd->...qhd", weights, value)


# --- in flax.linen.MultiHeadDotProductAttention ---------------------------------------


def linen_layer(fn, **fields):
    layer = linen.MultiHeadDotProductAttention(HEADS, attention_fn=fn, **fields)
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(0)}
    x = normal(4, BATCH, LENGTH, FEATURES)
    with flax_rules():
        variables = jax.eval_shape(layer.init, keys, x)
    return layer, {"params": filled(variables["params"])}, x


def run_linen(fn, *, mask=None, rng=None, **fields):
    """Output and gradients of parameters and inputs of the linen module."""
    layer, params, x = linen_layer(fn, **fields)
    weights = normal(5, *x.shape)

    def loss(params, x):
        out = layer.apply(params, x, mask=mask, dropout_rng=rng)
        return jnp.sum(out.astype(jnp.float32) * weights), out

    with flax_rules():
        grads, out = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, x)
    return out, grads


@pytest.mark.parametrize("kind", ["none", "bool", "padding", "causal"])
def test_linen_module_agrees_with_flax(kind):
    mask = make_mask(kind)
    want = run_linen(linen.dot_product_attention, mask=mask)
    close(run_linen(ours, mask=mask), want)


@pytest.mark.parametrize("broadcast", [True, False])
def test_linen_dropout_agrees_with_flax(broadcast):
    dropout = {
        "rng": jax.random.key(7),
        "dropout_rate": 0.4,
        "broadcast_dropout": broadcast,
        "deterministic": False,
    }
    want = run_linen(linen.dot_product_attention, **dropout)
    close(run_linen(ours, **dropout), want)


@pytest.mark.parametrize("force_fp32", [False, True])
def test_linen_bfloat16_agrees_with_flax(force_fp32):
    fields = {"dtype": jnp.bfloat16, "force_fp32_for_softmax": force_fp32}
    out, grads = run_linen(ours, **fields)
    want_out, want_grads = run_linen(linen.dot_product_attention, **fields)
    close(out, want_out, tolerance=0.02)
    close(grads, want_grads, tolerance=0.05)


def test_linen_sows_what_flax_sows():
    def sown(fn):
        layer, params, x = linen_layer(fn)
        apply = functools.partial(layer.apply, mutable=["intermediates"])
        with flax_rules():
            return call(apply, params, x, sow_weights=True)[1]

    got = sown(ours)
    (weights,) = got["intermediates"]["attention_weights"]
    assert weights.shape == (BATCH, HEADS, LENGTH, LENGTH)
    close(got, sown(linen.dot_product_attention))


def test_linen_decode_agrees_with_flax():
    def decode(fn):
        layer, params, x = linen_layer(fn, decode=True)
        with flax_rules():
            cache = jax.eval_shape(layer.init, jax.random.key(0), x)["cache"]
            apply = jax.jit(functools.partial(layer.apply, mutable=["cache"]))
            state, outs = {"cache": filled(cache)}, []
            for i in range(LENGTH):
                out, state = apply({**params, **state}, x[:, i : i + 1])
                outs.append(np.asarray(out))
        return np.concatenate(outs, axis=1)

    close(decode(ours), decode(linen.dot_product_attention))


# --- in flax.nnx.MultiHeadAttention ---------------------------------------------------


def nnx_layer(fn, **fields):
    def layer():
        return nnx.MultiHeadAttention(
            HEADS, FEATURES, attention_fn=fn, rngs=nnx.Rngs(0), **fields
        )

    with flax_rules():
        graph, state = nnx.split(nnx.eval_shape(layer))
    return nnx.merge(graph, filled(state))


def run_nnx(fn, *, seed=None, options=None, **fields):
    """Output and gradients of parameters and inputs of the NNX module."""
    x = normal(4, BATCH, LENGTH, FEATURES)
    weights = normal(5, *x.shape)

    def loss(layer, x):
        rngs = None if seed is None else nnx.Rngs(seed)
        out = layer(x, rngs=rngs, **(options or {}))
        return jnp.sum(out.astype(jnp.float32) * weights), out

    layer = nnx_layer(fn, decode=False, keep_rngs=False, **fields)
    with flax_rules():
        grad = nnx.grad(loss, argnums=(0, 1), has_aux=True)
        (grads, x_grad), out = nnx.jit(grad)(layer, x)
    return out, nnx.to_pure_dict(grads), x_grad


@pytest.mark.parametrize(
    ("kind", "is_causal", "key_heads"),
    [
        ("none", False, HEADS),
        ("causal", False, HEADS),
        ("padding", True, HEADS),
        ("bool", False, 2),
        ("none", True, 1),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("bool", False, HEADS),
                ("padding", False, HEADS),
                ("none", True, HEADS),
                ("bool", True, 2),
            )
        ),
    ],
)
def test_nnx_module_agrees_with_flax(kind, is_causal, key_heads):
    options = {"mask": make_mask(kind), "is_causal": is_causal}
    got = run_nnx(ours, options=options, num_kv_heads=key_heads)
    want = run_nnx(nnx.dot_product_attention, options=options, num_kv_heads=key_heads)
    close(got, want)


@pytest.mark.parametrize(("broadcast", "key_heads"), [(True, HEADS), (False, 2)])
def test_nnx_dropout_agrees_with_flax(broadcast, key_heads):
    fields = {
        "seed": 7,
        "dropout_rate": 0.4,
        "deterministic": False,
        "broadcast_dropout": broadcast,
        "num_kv_heads": key_heads,
    }
    want = run_nnx(nnx.dot_product_attention, **fields)
    close(run_nnx(ours, **fields), want)


def test_nnx_bfloat16_agrees_with_flax():
    out, *grads = run_nnx(ours, dtype=jnp.bfloat16)
    want_out, *want_grads = run_nnx(nnx.dot_product_attention, dtype=jnp.bfloat16)
    close(out, want_out, tolerance=0.02)
    close(grads, want_grads, tolerance=0.05)


@pytest.mark.parametrize("key_heads", [HEADS, 2])
def test_nnx_sows_what_flax_sows(key_heads):
    x = normal(4, BATCH, LENGTH, FEATURES)

    def sown(fn):
        layer = nnx_layer(fn, num_kv_heads=key_heads, decode=False)
        forward = nnx.capture(layer, nnx.Intermediate)
        with flax_rules():
            _, state = forward(x, sow_weights=True)
        (weights,) = nnx.to_pure_dict(state)["attention_weights"]
        return weights

    got = sown(ours)
    assert got.shape == (BATCH, HEADS, LENGTH, LENGTH)
    close(got, sown(nnx.dot_product_attention))


@pytest.mark.parametrize("key_heads", [HEADS, 2])
def test_nnx_decode_agrees_with_flax(key_heads):
    x = normal(4, BATCH, LENGTH, FEATURES)

    def decode(fn):
        layer = nnx_layer(fn, num_kv_heads=key_heads, decode=True)
        step = nnx.jit(lambda layer, token: layer(token))
        with flax_rules():
            layer.init_cache(x.shape)
            outs = [np.asarray(step(layer, x[:, i : i + 1])) for i in range(LENGTH)]
        return np.concatenate(outs, axis=1)

    close(decode(ours), decode(nnx.dot_product_attention))


# --- what the modules pass, by name ---------------------------------------------------


def test_signature_has_every_argument_of_linen():
    """Linen drops in silence what an attention_fn does not name."""
    parameters = inspect.signature(attention_fn).parameters
    passed = inspect.signature(linen.dot_product_attention).parameters
    assert set(passed) <= set(parameters)
    for name, parameter in passed.items():
        assert parameters[name].default == parameter.default, name
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters.values())


def test_signature_has_every_argument_that_nnx_passes():
    passed = {}

    def spy(query, key, value, **kwargs):
        passed.update(kwargs)
        return query

    with flax_rules():
        nnx_layer(spy, decode=False)(normal(4, BATCH, LENGTH, FEATURES))
    assert {"mask", "dropout_rng", "module", "is_causal"} <= set(passed)
    assert set(passed) <= set(inspect.signature(attention_fn).parameters)


# --- the function itself --------------------------------------------------------------


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
@pytest.mark.parametrize("key_heads", [HEADS, 2, 1])
@pytest.mark.pairwise(1)
def test_values_against_numpy(batch, key_heads):
    arrays = qkv(batch=batch, key_heads=key_heads, key_length=7)
    bias = normal(8, HEADS, LENGTH, 7)
    mask = random_mask(*batch, 1, LENGTH, 7)
    for options in ({}, {"bias": bias, "mask": mask}):
        got = attend(*arrays, **options)
        assert got.shape == (*batch, LENGTH, HEADS, DEPTH)
        close(got, numpy_attention(*arrays, **options).astype(np.float32))


def test_depth_of_values_may_differ():
    query, key, _ = qkv()
    value = normal(2, BATCH, LENGTH, HEADS, DEPTH + 4)
    got = attend(query, key, value)
    close(got, numpy_attention(query, key, value).astype(np.float32))


@pytest.mark.parametrize("key_heads", [HEADS, 2])
def test_bias_and_its_gradient_agree_with_flax(key_heads):
    arrays = qkv(key_heads=key_heads)
    bias = normal(8, 1, HEADS, LENGTH, LENGTH)
    weights = normal(5, BATCH, 1, HEADS, 1)

    def run(fn):
        def f(arrays, bias):
            return jnp.sum(fn(*arrays, bias=bias) * weights)

        return call(jax.value_and_grad(f, argnums=(0, 1)), arrays, bias)

    with flax_rules():
        close(run(ours), run(nnx.dot_product_attention))


@pytest.mark.parametrize(
    ("dtype", "shape", "key_heads"),
    [
        (jnp.bool_, (5,), HEADS),
        (jnp.bool_, (HEADS, 1, 5), 2),
        (jnp.bool_, (1, 5, 5), 2),
        (jnp.float32, (2, 1, 5, 5), HEADS),
        (jnp.float32, (2, HEADS, 5, 5), 2),
        (jnp.bfloat16, (2, 1, 1, 5), HEADS),
        (jnp.int32, (1, 1, 1, 5), 2),
    ],
)
def test_masks_of_any_dtype_and_shape(dtype, shape, key_heads):
    arrays = qkv(key_heads=key_heads)
    mask = random_mask(*shape)
    got = attend(*arrays, mask=mask.astype(dtype))
    close(got, numpy_attention(*arrays, mask=mask).astype(np.float32))


@pytest.mark.parametrize(
    ("shape", "key_heads", "expected", "grouped"),
    [
        ((BATCH, 1, 1, LENGTH), HEADS, (BATCH, 1, 1, LENGTH), (BATCH, 1, 1, LENGTH)),
        ((LENGTH,), HEADS, (1, 1, 1, LENGTH), (1, 1, 1, LENGTH)),
        ((BATCH, 1, 1, LENGTH), 2, (BATCH, 1, 1, LENGTH), (BATCH, 1, 1, 1, LENGTH)),
        ((HEADS, 1, LENGTH), 2, (1, HEADS, 1, LENGTH), (1, 2, HEADS // 2, 1, LENGTH)),
    ],
)
def test_mask_is_not_expanded(monkeypatch, shape, key_heads, expected, grouped):
    seen = []

    def spy_on(name, mask_of):
        function = getattr(jaxsoftmax.flax, name)

        def spy(*args, **options):
            seen.append(mask_of(*args, **options).shape)
            return function(*args, **options)

        monkeypatch.setattr(jaxsoftmax.flax, name, spy)

    spy_on("attend", lambda config, inputs: inputs.mask)
    spy_on("softmax", lambda logits, *, where, **options: where)
    arrays, mask = qkv(key_heads=key_heads, dtype=jnp.bfloat16), random_mask(*shape)
    attend(*arrays, mask=mask)
    attend(*arrays, mask=mask, force_fp32_for_softmax=True)
    assert seen == [expected, grouped]


@pytest.mark.parametrize("lead", [(2, 1, 3), (1, 2, 1), (1, 1, 1)])
def test_bias_and_mask_of_some_batch_axes(lead):
    arrays = qkv(batch=(2, 2, 3), key_heads=2)
    mask = random_mask(*lead, 1, LENGTH, LENGTH)
    bias = normal(8, *lead, HEADS, 1, LENGTH)

    def loss(arrays, bias, **options):
        out = attention_fn(*arrays, bias=bias, mask=mask, **options)
        return jnp.sum(out * jnp.cos(out)), out

    def run(**options):
        grad = jax.grad(functools.partial(loss, **options), (0, 1), has_aux=True)
        return jax.jit(grad)(arrays, bias)

    got = run()
    want = numpy_attention(*arrays, bias=bias, mask=mask).astype(np.float32)
    close(got[1], want)
    close(got, run(**EINSUMS))


def test_is_causal_is_combined_with_the_mask():
    arrays = qkv(key_length=7)
    mask = random_mask(BATCH, 1, LENGTH, 7)
    both = np.tril(np.ones((LENGTH, 7), bool)) & np.asarray(mask)
    got = attend(*arrays, mask=mask, is_causal=True)
    close(got, numpy_attention(*arrays, mask=both).astype(np.float32))


NOT_OF_FLAX = [
    {"scale": 0.7},
    {"logits_soft_cap": 0.5},
    {"local_window_size": 1},
    {"local_window_size": (2, 0), "is_causal": True},
    {"scale": 2, "logits_soft_cap": 1.5, "local_window_size": (0, 3)},
    {"is_causal": True, "query_offset": 2},
    {"local_window_size": (1, 2), "query_offset": np.array([3, -1])},
]


@pytest.mark.parametrize("options", NOT_OF_FLAX)
def test_options_that_flax_does_not_have(options):
    arrays, bias = qkv(key_heads=2, key_length=7), normal(8, HEADS, 1, 7)
    bias = bias.at[0, 0, 2].set(-jnp.inf)

    def run(**more):
        def f(arrays, bias):
            out = attention_fn(*arrays, bias=bias, **options, **more)
            return jnp.sum(jnp.sin(out)), out

        return jax.jit(jax.grad(f, (0, 1), has_aux=True))(arrays, bias)

    got = run()
    close(got, run(**EINSUMS))
    query, key, value = (np.asarray(x, np.float64) for x in arrays)
    key, value = (np.repeat(x, HEADS // 2, axis=-2) for x in (key, value))
    scale = options.get("scale", DEPTH**-0.5)
    logits = np.einsum("bqhd,bkhd->bhqk", query, key) * scale + np.asarray(bias)
    cap = options.get("logits_soft_cap")
    if cap is not None:
        logits = np.where(logits == -np.inf, logits, cap * np.tanh(logits / cap))
    offset = np.reshape(options.get("query_offset", 0), (-1, 1, 1, 1))
    ahead = np.arange(7)[None, :] - np.arange(LENGTH)[:, None] - offset
    left, right = np.broadcast_to(options.get("local_window_size", 7), 2)
    allowed = (-left <= ahead) & (ahead <= right)
    if options.get("is_causal"):
        allowed &= ahead <= 0
    weights = np.where(allowed, np.exp(logits), 0)
    weights /= weights.sum(-1, keepdims=True)
    want = np.einsum("bhqk,bkhd->bqhd", weights, value)
    close(got[1], want.astype(np.float32))


def test_decode_with_a_window():
    """A module that decodes has the index of its cache, and does not pass it."""

    def decode(window):
        place = []

        def fn(*args, **kwargs):
            more = {"local_window_size": window, "query_offset": place[-1]}
            return ours(*args, **kwargs, **(more if window else {}))

        layer = nnx_layer(fn, decode=True)
        x = normal(4, BATCH, LENGTH, FEATURES)
        outs = []
        with flax_rules():
            layer.init_cache(x.shape)
            for i in range(LENGTH):
                place.append(layer.cache_index[...])
                outs.append(layer(x[:, i : i + 1]))
        return jnp.concatenate(outs, 1)

    layer = nnx_layer(functools.partial(ours, local_window_size=(2, 0)), decode=False)
    with flax_rules():
        want = layer(normal(4, BATCH, LENGTH, FEATURES))
    close(decode((2, 0)), want)
    assert np.abs(decode(None) - want).max() > 1e-3


def test_partial_gives_linen_a_causal_mask():
    want = run_linen(linen.dot_product_attention, mask=make_mask("causal"))
    close(run_linen(functools.partial(ours, is_causal=True)), want)


def test_nnx_passes_is_causal_over_that_of_a_partial():
    causal = functools.partial(ours, is_causal=True)
    close(run_nnx(causal), run_nnx(nnx.dot_product_attention))
    options = {"is_causal": True}
    got = run_nnx(ours, options=options)
    close(got, run_nnx(nnx.dot_product_attention, options=options))


def test_rows_without_keys_give_zeros_and_finite_gradients():
    arrays = qkv()
    mask = np.ones((BATCH, 1, LENGTH, LENGTH), bool)
    mask[0, 0, 2] = False

    @jax.jit
    def out_and_grads(arrays, mask):
        def f(arrays):
            out = attention_fn(*arrays, mask=mask)
            return out.sum(), out

        grads, out = jax.grad(f, has_aux=True)(arrays)
        return (out, *grads)

    out, *grads = map(np.asarray, out_and_grads(arrays, mask))
    close(out, numpy_attention(*arrays, mask=mask).astype(np.float32))
    assert (out[0, 2] == 0).all()
    assert all(np.isfinite(g).all() for g in grads)
    assert (grads[0][0, 2] == 0).all()
    assert (grads[0][0, 1] != 0).all()

    out, *grads = map(np.asarray, out_and_grads(arrays, np.zeros_like(mask)))
    assert all((x == 0).all() for x in (out, *grads))


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.pairwise(1)
def test_half_precision_is_float32_inside(dtype, stored):
    query, key, _ = qkv(dtype=dtype)
    value = one_hot_values(dtype=dtype)
    got = attend(query, key, value, **(EINSUMS if stored else {}))
    assert got.dtype == dtype
    # Weights that are stored are rounded, and that is all. Else exponentials are, which
    # their sum has too, and the result.
    roundings = 1 if stored else 3
    half_ulp = float(jnp.finfo(dtype).eps) / 2
    want = numpy_attention(query, key, value)
    got = np.asarray(got, np.float64)
    np.testing.assert_allclose(got, want, rtol=1.01 * roundings * half_ulp, atol=1e-7)


def test_force_fp32_leaves_weights_and_result_in_float32():
    arrays = qkv(dtype=jnp.bfloat16)
    got = attend(*arrays, force_fp32_for_softmax=True)
    close(got, numpy_attention(*arrays).astype(np.float32))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, "bfloat16"])
def test_dtype_is_that_of_computation_and_result(dtype):
    arrays = qkv()
    got = attend(*arrays, dtype=dtype)
    assert got.dtype == jnp.bfloat16
    close(got, attend(*(x.astype(jnp.bfloat16) for x in arrays)), tolerance=0)


@pytest.mark.parametrize(("broadcast", "key_heads"), [(True, 2), (False, HEADS)])
def test_dropout_drops_the_weights_flax_drops(broadcast, key_heads):
    arrays = (*qkv(key_heads=key_heads)[:2], one_hot_values(key_heads))
    options = {
        "dropout_rng": jax.random.key(9),
        "dropout_rate": 0.5,
        "broadcast_dropout": broadcast,
    }
    with flax_rules():
        got = call(ours, *arrays, **options)
        want = call(nnx.dot_product_attention, *arrays, **options)
    dropped = np.asarray(got) == 0
    np.testing.assert_array_equal(dropped, np.asarray(want) == 0)
    assert 0.2 < dropped.mean() < 0.8
    close(got, want)


def test_dropout_of_weights_that_are_needed_agrees_with_flax():
    """With einsums of the caller's the weights are an array, and dropped here."""
    arrays = qkv()
    options = {
        "dropout_rng": jax.random.key(9),
        "dropout_rate": 0.3,
        "deterministic": False,
    }
    want = linen.dot_product_attention(*arrays, **options)
    close(attention_fn(*arrays, **options, **EINSUMS), want)


@pytest.mark.parametrize(
    ("broadcast", "make_key"), [(True, jax.random.key), (False, jax.random.PRNGKey)]
)
def test_dropout_over_several_blocks_agrees_with_flax(monkeypatch, broadcast, make_key):
    monkeypatch.setattr(xla, "QUERY_BLOCK", 128)
    monkeypatch.setattr(xla, "KEY_BLOCK", 128)
    query, key, value = (normal(i, 200 + 70 * i, 2, DEPTH) for i in (0, 1, 1))
    options = {
        "mask": random_mask(2, 1, 270),
        "dropout_rng": make_key(9),
        "dropout_rate": 0.3,
        "broadcast_dropout": broadcast,
    }

    def run(fn):
        def f(*arrays):
            return jnp.sum(jnp.sin(fn(*arrays, **options)))

        return jax.jit(jax.value_and_grad(f, (0, 1, 2)))(query, key, value)

    with flax_rules():
        close(run(ours), run(nnx.dot_product_attention))


def test_deterministic_drops_nothing():
    arrays = qkv()
    options = {"dropout_rng": jax.random.key(9), "dropout_rate": 0.5}
    got = attend(*arrays, **options, deterministic=True)
    close(got, attend(*arrays), tolerance=0)


@pytest.mark.parametrize("key_heads", [HEADS, 2])
def test_custom_einsums_are_used(key_heads):
    arrays = qkv(key_heads=key_heads)

    def doubled(equation, a, b):
        return 2 * jnp.einsum(equation, a, b)

    got = attend(
        *arrays, qk_attn_weights_einsum=doubled, attn_weights_value_einsum=doubled
    )
    want = 2 * numpy_attention(2 * np.asarray(arrays[0]), *arrays[1:])
    close(got, want.astype(np.float32))


@pytest.mark.parametrize("options", [{}, {"force_fp32_for_softmax": True}])
def test_precision_reaches_every_product(options):
    arrays = qkv(dtype=jnp.bfloat16)

    def loss(*arrays):
        return jnp.sum(attention_fn(*arrays, precision="highest", **options))

    text = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(*arrays).as_text()
    products = [x for x in text.splitlines() if "stablehlo.dot_general" in x]
    assert len(products) >= 6
    assert all("precision = [HIGHEST, HIGHEST]" in x for x in products)


# Given einsums need the weights, which then are stored.
EINSUMS = {
    "qk_attn_weights_einsum": functools.partial(
        jnp.einsum, preferred_element_type=jnp.float32
    ),
    "attn_weights_value_einsum": jnp.einsum,
}


def kept(f, *inputs):
    """Shape and dtype of what the backward pass keeps but the inputs and scalars."""

    def residuals(*inputs):
        arrays = {id(x): x for x in jax.tree.leaves(jax.vjp(f, *inputs)[1]) if x.ndim}
        return [x for x in arrays.values() if not any(x is y for y in inputs)]

    return sorted((x.shape, x.dtype.name) for x in jax.eval_shape(residuals, *inputs))


@pytest.mark.parametrize("key_heads", [HEADS, 2])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("options", [{}, {"is_causal": True, "dropout_rate": 0.5}])
@pytest.mark.pairwise(1)
def test_backward_keeps_no_array_of_weights(key_heads, dtype, options):
    arrays = qkv(dtype=dtype, key_heads=key_heads)
    options = {"dropout_rng": jax.random.key(0), **options}
    got = kept(functools.partial(attention_fn, **options), *arrays)
    got = [entry for entry in got if "key<" not in entry[1] and entry[0] != (2,)]
    out = ((BATCH, LENGTH, HEADS, DEPTH), dtype.dtype.name)
    rounding = [out] if dtype == jnp.bfloat16 else []  # what rounding took off `out`
    lse = ((BATCH, LENGTH, HEADS), "float32")  # and what rounding took off it
    assert got == sorted([*rounding, out, lse, lse])


@pytest.mark.parametrize("is_causal", [False, True])
def test_backward_keeps_one_array_of_weights_where_they_are_needed(is_causal):
    arrays = qkv(dtype=jnp.bfloat16)
    f = functools.partial(attention_fn, is_causal=is_causal, **EINSUMS)
    assert kept(f, *arrays) == [((BATCH, HEADS, LENGTH, LENGTH), "bfloat16")]


def test_backward_keeps_one_array_of_grouped_weights_where_they_are_needed():
    arrays = qkv(dtype=jnp.bfloat16, key_heads=2)
    bias = normal(8, LENGTH)
    got = kept(functools.partial(attention_fn, bias=bias, **EINSUMS), *arrays)
    query = ((BATCH, LENGTH, 2, HEADS // 2, DEPTH), "bfloat16")
    rows = (BATCH, 2, HEADS // 2, LENGTH)
    assert got == [((*rows, LENGTH), "bfloat16"), query]


def test_backward_without_jit_keeps_no_copies_of_the_inputs():
    arrays = qkv()
    kept = {id(x): x for x in jax.tree.leaves(jax.vjp(attention_fn, *arrays)[1])}
    assert all(id(x) in kept for x in arrays)
    more = [x.shape for i, x in kept.items() if x.ndim and i not in map(id, arrays)]
    lse = (BATCH, LENGTH, HEADS)
    assert sorted(more) == [lse, lse, (*lse, DEPTH)]


@pytest.mark.parametrize("options", [{}, {"dropout_rate": 0.1}])
def test_no_array_of_queries_and_keys_in_a_module(options):
    length = 4096  # a block has up to 2**20 entries on a CPU
    layer = linen.MultiHeadDotProductAttention(
        1,
        attention_fn=functools.partial(ours, is_causal=True),
        deterministic=False,
        **options,
    )
    x = jax.ShapeDtypeStruct((1, length, 4), jnp.float32)
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}

    def loss(params, x):
        return jnp.sum(layer.apply(params, x, rngs=keys))

    with flax_rules():
        params = jax.eval_shape(layer.init, keys, x)
        traced = jax.jit(jax.grad(loss, (0, 1))).trace(params, x)
        lowered = traced.lower(lowering_platforms=("cpu",))
    assert hlo.largest(lowered) <= length**2 // 8


def test_vmap():
    arrays = qkv()
    mask = random_mask(BATCH, HEADS, LENGTH, LENGTH)
    mapped = jax.vmap(lambda q, k, v, m: attention_fn(q, k, v, mask=m))
    close(call(mapped, *arrays, mask), attend(*arrays, mask=mask))


def test_runs_without_jit_on_numpy_arrays():
    arrays = [np.asarray(x) for x in qkv()]
    mask = np.tril(np.ones((LENGTH, LENGTH), np.float32))
    close(attention_fn(*arrays, mask=mask), attend(*arrays, is_causal=True))


def test_works_without_flax():
    code = (
        "import sys; sys.modules['flax'] = None\n"
        "import jax.numpy as jnp, jaxsoftmax.flax\n"
        "x = jnp.ones((3, 2, 4))\n"
        "assert (jaxsoftmax.flax.attention_fn(x, x, x) == 1).all()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- memory ---------------------------------------------------------------------------


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="blocks have other sizes")
@pytest.mark.parametrize(
    ("batch", "length"), [(2, 256), pytest.param(8, 128, marks=pytest.mark.slow)]
)
def test_short_sequences_with_dropout_need_no_more(batch, length):
    """All logits, 2^20 here, are of no more than a block; bits are drawn for each."""
    qkv = (jax.ShapeDtypeStruct((batch, length, 8, 64), jnp.bfloat16),) * 3
    mask = jax.ShapeDtypeStruct((batch, 1, length, length), bool)
    key = jax.eval_shape(lambda: jax.random.key(0))

    def temp_bytes(attention):
        def loss(qkv, mask, key):
            out = attention(
                *qkv,
                mask=mask,
                broadcast_dropout=False,
                dropout_rng=key,
                dropout_rate=0.1,
            )
            return jnp.sum(jnp.sin(out.astype(jnp.float32)))

        compiled = jax.jit(jax.grad(loss)).lower(qkv, mask, key).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    ours = functools.partial(attention_fn, implementation="xla")
    assert temp_bytes(ours) <= temp_bytes(linen.dot_product_attention)
