"""What the tests of attention's kernels have in common: inputs, and a check."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxsoftmax._attend.call import Inputs
from support import attention_oracle as oracle
from support.attention_cases import assert_within

EVERYTHING = {  # that is no array of pairs
    "causal": True,
    "window": (30, 7),
    "softcap": 1.0,
    "sinks": True,
    "segments": True,
    "query_lengths": True,
    "key_lengths": True,
}


def inputs(rng, shape, dtype, options):
    """Of [B, T, S, N, K, H, Hv]."""
    b, t, s, n, k, h, hv = shape
    pair_shape = (b, n, t, s)

    def normal(*shape):
        return jnp.array(rng.standard_normal(shape), dtype)

    q, k_, v = normal(b, t, n, h), normal(b, s, k, h), normal(b, s, k, hv)
    x = Inputs(q, k_, v + jnp.array(options.get("value_offset", 0), dtype))
    given = {}
    if "bias" in options:
        pairs = zip(options["bias"], pair_shape, strict=True)
        bias = rng.standard_normal([n if full else 1 for full, n in pairs])
        # A large number that all logits of a query share, in every other row.
        bias[..., ::2, :] += options.get("shared", 0)
        bias[rng.random(bias.shape) < 0.1] = -np.inf
        given["bias"] = jnp.array(bias, options.get("bias_dtype", dtype))
    if "mask" in options:
        pairs = zip(options["mask"], pair_shape, strict=True)
        size = [n if full else 1 for full, n in pairs]
        given["mask"] = jnp.array(rng.random(size) < 0.7)
    if options.get("sinks"):
        sinks = rng.standard_normal(n)
        sinks[0] = -np.inf
        given["sinks"] = jnp.array(sinks, "float32")
    if options.get("query_lengths"):
        given["query_lengths"] = jnp.array(rng.integers(0, t + 2, b), "int32")
    if options.get("key_lengths"):
        given["key_lengths"] = jnp.array([0, s // 2 + 1, s][:b][::-1], "int32")
    if options.get("segments"):
        given["query_segments"] = jnp.array(np.sort(rng.integers(0, 3, (b, t))))
        given["key_segments"] = jnp.array(np.sort(rng.integers(0, 3, (b, s))))
    if "offsets" in options:
        given["query_offset"] = jnp.array(options["offsets"][:b], "int32")
    if options.get("dropout_rate"):
        given["dropout_key"] = jax.random.key_data(jax.random.key(3))
    return x._replace(**given)


def kept_of(config, x):
    """Which entries dropout keeps, as `jax.random.bernoulli` has them, or None."""
    if not config.dropout_rate:
        return None
    batch, queries, heads, _ = x.query.shape
    lead = (
        n if own else 1 for n, own in zip((batch, heads), config.dropout_dims, strict=1)
    )
    pairs = queries, x.key.shape[1]
    key = jax.random.wrap_key_data(x.dropout_key)
    kept = jax.random.bernoulli(
        key, np.float32(1 - config.dropout_rate), (*lead, *pairs)
    )
    return jnp.broadcast_to(kept, (batch, heads, *pairs))


def oracle_of(config, x):
    return oracle.forward(
        x.query,
        x.key,
        x.value,
        x.bias,
        x.mask,
        scale=config.scale,
        is_causal=config.causal,
        local_window_size=config.window,
        logits_soft_cap=config.softcap,
        sinks=x.sinks,
        query_seq_lengths=x.query_lengths,
        key_value_seq_lengths=x.key_lengths,
        q_segment_ids=x.query_segments,
        kv_segment_ids=x.key_segments,
        query_offset=config.offset if x.query_offset is None else x.query_offset,
        keep=kept_of(config, x),
        dropout_rate=config.dropout_rate,
    )


def check_result(config, x, got, dtype, g, gradients):
    """Against the oracle, within its bounds."""
    of = oracle_of(config, x)
    bounds = of.bounds(dtype)
    assert_within(got.out, of.out, bounds["out"], "out")
    if config.uses_max_logits:
        largest = np.max(of.s, (2, 3))
        np.testing.assert_allclose(got.max_logits, largest, rtol=1e-5, atol=1e-5)
    if config.keeps:
        assert_within(got.lse, of.lse, bounds["lse"], "lse")
    if dtype != "float32":
        # Rounded twice: `low` has a relative error of half an eps too.
        twice = (float(jnp.finfo(dtype).eps) / 2) ** 2 * np.abs(of.out)
        several_keys = ((of.p > 0).sum(-1) > 1).any()  # of one key, out is its value
        assert got.low.any() or not several_keys, "no low digits"
        assert_within(wide(got), of.out, bounds["out"] + twice, "out and low")
    want, bounds = of.vjp(g.out, g.lse), of.bounds(dtype, g.out, g.lse)
    for name, gradient in gradients.items():
        assert_within(gradient, want[name], bounds[name], f"gradient of {name}")


def check_pushed(of, dtype, found, tangents):
    """The tangents of a result, against those of the oracle, within its bounds."""
    want, bounds = of.jvp(**tangents), of.jvp_bounds(dtype, **tangents)
    got = found.out, found.lse
    for name, *each in zip(("out", "lse"), got, want, bounds, strict=True):
        assert_within(*each, f"tangent of {name}")
    if dtype != "float32":
        twice = (float(jnp.finfo(dtype).eps) / 2) ** 2 * np.abs(want[0])
        assert_within(wide(found), want[0], bounds[0] + twice, "tangent and low")


def wide(result):
    low = 0 if result.low is None else result.low.astype(np.float32)
    return result.out.astype(np.float32) + low
