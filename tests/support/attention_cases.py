"""What the tests of attention have in common: arguments, and a check of everything."""

import jax
import jax.numpy as jnp
import numpy as np

import jaxsoftmax
from support import attention_oracle as oracle
from support.compilation import exact_jit

# What can run here; None may take another one on a GPU.
IMPLEMENTATIONS = ["xla", None]


def attention(**arguments):
    return jaxsoftmax.dot_product_attention(**arguments)


def _vjp(static, floats, others, g):
    options = {**others, **dict(static)}
    call = lambda floats: attention(**floats, **options, return_residual=True)
    y, pull = jax.vjp(call, floats)
    return y, pull(g)[0]


quick_vjp = jax.jit(_vjp, static_argnames="static")
exact_vjp = exact_jit(_vjp, static_argnames="static")


def arrays(rng, t, s, n=2, k=None, h=8, hv=None, batch=(2,), dtype="float32"):
    """Query, key and value by name."""
    k = n if k is None else k
    shapes = {
        "query": (*batch, t, n, h),
        "key": (*batch, s, k, h),
        "value": (*batch, s, k, h if hv is None else hv),
    }
    return {name: jnp.array(rng.normal(size=x), dtype) for name, x in shapes.items()}


def logits_shape(floats):
    """[B, N, T, S], with a 1 for no batch."""
    q, k = floats["query"], floats["key"]
    return (*q.shape[:-3], q.shape[-2], q.shape[-3], k.shape[-3])


def full_shape(floats):
    shape = logits_shape(floats)
    return shape if len(shape) == 4 else (1, *shape)


def assert_within(got, want, bound, name=""):
    """Entry by entry; beyond `bound` is half an eps for the rounding of the result."""
    dtype = jnp.asarray(got).dtype.name
    got, want = np.asarray(got).astype(np.float64), np.asarray(want)
    assert got.shape == want.shape, (name, got.shape, want.shape)
    infinite = np.isinf(want)
    np.testing.assert_array_equal(got[infinite], want[infinite], err_msg=name)
    want, got = np.where(infinite, 0, want), np.where(infinite, 0, got)
    half = float(jnp.finfo(dtype).eps) / 2
    bound = bound + half * np.abs(want) + oracle.least_of(dtype)
    error = np.abs(got - want)
    worst = (error / bound).max(initial=0)
    assert worst <= 1, (
        f"{name}: {worst} times the bound, {(error > bound).sum()} of {error.size}"
    )


def reference(floats, others, static):
    """The oracle of a call."""
    others, static = dict(others), dict(static)
    key = others.pop("dropout_key", None)
    if static.get("dropout_rate"):
        rate = static["dropout_rate"]
        others["keep"] = jax.random.bernoulli(
            key, np.float32(1 - rate), full_shape(floats)
        )
    static.pop("implementation", None)
    return oracle.forward(**floats, **others, **static)


def check(rng, floats, others=None, *, g=None, compiled=quick_vjp, **static):
    """Values and cotangents of a call against the oracle's, each within its bounds."""
    others = others or {}
    dtype = floats["query"].dtype
    wide = jnp.float64 if dtype == jnp.float64 else jnp.float32
    q = floats["query"].shape
    out_shape = (*q[:-1], floats["value"].shape[-1])
    if g is None:
        g = (rng.normal(size=out_shape), rng.normal(size=out_shape[:-1]))
        g = (jnp.array(g[0], dtype), jnp.array(g[1], wide))
    (out, lse), d = compiled(tuple(static.items()), floats, others, g)
    assert (out.dtype, out.shape) == (dtype, out_shape)
    assert (lse.dtype, lse.shape) == (wide, out_shape[:-1])
    of = reference(floats, others, static)
    bounds = of.bounds(dtype.name)
    assert_within(out, of.out, bounds["out"], "out")
    assert_within(lse, of.lse, bounds["lse"], "lse")
    assert set(d) == set(floats)
    want, bounds = of.vjp(*g), of.bounds(dtype.name, *g)
    for name, x in floats.items():
        assert d[name].dtype == x.dtype, name
        assert_within(d[name], want[name], bounds[name], f"gradient of {name}")
    return (out, lse), d


def dense(
    query,
    key,
    value,
    bias=None,
    mask=None,
    *,
    scale=None,
    is_causal=False,
    query_seq_lengths=None,
    key_value_seq_lengths=None,
    local_window_size=None,
    logits_soft_cap=None,
    sinks=None,
    q_segment_ids=None,
    kv_segment_ids=None,
    dropout_rate=0.0,
    dropout_key=None,
    query_offset=0,
):
    """Out and lse by the formula, with P as an array, for jax to differentiate."""
    group = query.shape[-2] // key.shape[-2]
    k, v = (jnp.repeat(x, group, -2) for x in (key, value))
    s = jnp.einsum("btnh,bsnh->bnts", query, k)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    s = s * (scale if np.ndim(scale) == 0 else jnp.broadcast_to(scale, s.shape))
    if bias is not None:
        s = s + jnp.broadcast_to(bias, s.shape).astype(s.dtype)
    if logits_soft_cap is not None:
        s = logits_soft_cap * jnp.tanh(s / logits_soft_cap)
    t, length = s.shape[-2:]
    each = lambda x: jnp.asarray(x).reshape(-1, 1, 1, 1)
    place = (jnp.arange(length)[None, :] - jnp.arange(t)[:, None])[None, None]
    place = place - each(query_offset).astype(place.dtype)
    shown = jnp.full(place.shape, True)
    if is_causal:
        shown &= place <= 0
    if local_window_size is not None:
        left, right = local_window_size
        shown &= (place >= -left) & (place <= right)
    shown = jnp.broadcast_to(shown, s.shape)
    if mask is not None:
        shown &= jnp.broadcast_to(mask, s.shape)
    at = lambda n, axis: jax.lax.broadcasted_iota(jnp.int32, s.shape, axis)
    if query_seq_lengths is not None:
        shown &= at(t, 2) < each(query_seq_lengths)
    if key_value_seq_lengths is not None:
        shown &= at(length, 3) < each(key_value_seq_lengths)
    if q_segment_ids is not None:
        shown &= q_segment_ids[:, None, :, None] == kv_segment_ids[:, None, None, :]
    s = jnp.where(shown, s, -jnp.inf)
    top = jnp.max(s, -1, initial=-jnp.inf)
    sink = jnp.full(top.shape, -jnp.inf, s.dtype)
    if sinks is not None:
        sink = jnp.broadcast_to(sinks[:, None].astype(s.dtype)[None], top.shape)
    top = jnp.maximum(top, sink)
    top = jax.lax.stop_gradient(jnp.where(jnp.isneginf(top), 0, top))
    e = jnp.exp(s - top[..., None])
    total = jnp.sum(e, -1) + jnp.exp(sink - top)
    empty = total == 0
    total = jnp.where(empty, 1, total)
    lse = jnp.where(empty, -jnp.inf, top + jnp.log(total))
    p = e / total[..., None]
    if dropout_rate:
        rate = np.float32(1 - dropout_rate)
        keep = jax.random.bernoulli(dropout_key, rate, p.shape)
        p = jnp.where(keep, p / (1 - dropout_rate), 0)
    out = jnp.einsum("bnts,bsnh->btnh", p, v)
    return out, jnp.swapaxes(lse, 1, 2)
