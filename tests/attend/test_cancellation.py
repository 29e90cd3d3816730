"""Derivatives where ``dP - D`` cancels, against NumPy in long double.

One key has nearly all of a row; the values, and so dP, share a large number; half of
them are equal. Logits are sums of small integers and multiples of 1/256: exact, so that
what is measured is the derivatives' own error.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import attention_oracle as oracle
from support.attention_cases import arrays, attention
from support.compilation import exact_jit

QUERIES, HEADS, SIZE, VALUE_SIZE, SCALE = 24, 2, 4, 8, 0.75
EPS = float(np.finfo(np.float32).eps)


def wide(x):
    return np.asarray(x).astype(np.float64).astype(np.longdouble)


def case(rng, keys, dtype, scale, offset, equal):
    """Arguments of a call, and what derivatives are of: by name."""
    bias = np.round(256 * scale * rng.normal(size=(1, HEADS, QUERIES, keys))) / 256
    moved = {
        "value": offset + rng.normal(size=(1, keys, 1, VALUE_SIZE)),
        "d_bias": offset + rng.normal(size=bias.shape),
    }
    if equal:
        moved["value"][:, : keys // 2 + 1] = moved["value"][:, :1]
        moved["d_bias"][..., : keys // 2 + 1] = moved["d_bias"][..., :1]
    floats = {
        "query": rng.integers(-2, 3, size=(1, QUERIES, HEADS, SIZE)),
        "key": rng.integers(-2, 3, size=(1, keys, 1, SIZE)),
        "value": moved["value"],
    }
    floats = {name: jnp.array(x, dtype) for name, x in floats.items()}
    floats["bias"] = jnp.array(bias, jnp.float32)
    d_out = jnp.array(rng.normal(size=(1, QUERIES, HEADS, VALUE_SIZE)), dtype)
    tangents = {
        "bias": jnp.array(moved["d_bias"], jnp.float32),
        "query": jnp.array(offset + rng.normal(size=floats["query"].shape), dtype),
    }
    return floats, d_out, tangents


def derivatives(floats, d_out, tangents):
    f = functools.partial(attention, scale=SCALE, implementation="xla")
    _, pull = jax.vjp(lambda x: f(**x), floats)
    found = dict(pull(d_out)[0])
    for name, tangent in tangents.items():
        moved = lambda x, name=name: f(**{**floats, name: x}, return_residual=True)
        _, pushed = jax.jvp(moved, (floats[name],), (tangent,))
        found[f"out of {name}"], found[f"lse of {name}"] = pushed
    return found


exact_derivatives = exact_jit(derivatives)


def heads_first(x):
    return np.swapaxes(wide(x)[0], 0, 1)


def expected(floats, d_out, tangents, dtype):
    """By name: the derivatives, and what rounding alone may have made of them.

    A sum has an error of 8 eps of its terms, and P one of (8 + |s - lse|) eps, of which
    the second is that of s - lse as it is rounded. `half`: P and dS are rounded before
    they are multiplied.
    """
    half = 0.0 if dtype == "float32" else float(jnp.finfo(dtype).eps) / 2
    q, g = heads_first(floats["query"]), heads_first(d_out)
    k, v = wide(floats["key"])[0, :, 0], wide(floats["value"])[0, :, 0]
    s = SCALE * q @ k.T + wide(floats["bias"])[0]
    top = s.max(-1, keepdims=True)
    p = np.exp(s - top)
    total = p.sum(-1, keepdims=True)
    p, distance = p / total, np.abs(s - top - np.log(total))
    at = p.argmax(-1)

    def centered(t, t_error):
        """P (t - mean), given t less what it is at the largest P, and errors in eps."""
        mean = (p * t).sum(-1, keepdims=True)
        size = np.abs(t) + np.abs(mean)
        spread = (p * (t_error + (8 + distance) * np.abs(t))).sum(-1, keepdims=True)
        error = EPS * p * ((8 + distance) * size + t_error + spread)
        # P, and P t, that are subnormal in float32 count as 0.
        error += 2.0**-126 * (1 + np.abs(t)).sum(-1, keepdims=True)
        return p * (t - mean), error, mean, EPS * spread

    # Exactly 0 for values that are equal.
    from_top = v - v[at][:, :, None]
    t = (g[:, :, None] * from_top).sum(-1)
    moved = np.abs(v - v.mean(0))
    t_error = 8 * (np.abs(g)[:, :, None] * (moved + moved[at][:, :, None])).sum(-1)
    t_error = np.where((from_top == 0).all(-1), 0, t_error)
    ds, ds_error, *_ = centered(t, t_error)
    score_error = ds_error + (8 * EPS + half) * np.abs(ds)
    score_error += oracle.least_of(dtype)
    p_error = p * (EPS * (8 + distance) + half) + oracle.least_of(dtype)
    sums = lambda x, y: np.einsum("nts,nth->sh", x, y)
    found = {
        "bias": (ds, ds_error),
        "query": (SCALE * ds @ k, SCALE * score_error @ np.abs(k)),
        "key": (SCALE * sums(ds, q), SCALE * sums(score_error, np.abs(q))),
        "value": (sums(p, g), sums(p_error, np.abs(g))),
    }
    for name, tangent in tangents.items():
        if name == "bias":
            t = wide(tangent)[0]
            size = 0 * t
        else:
            t = SCALE * heads_first(tangent) @ k.T
            size = SCALE * np.abs(heads_first(tangent)) @ np.abs(k).T
        pivot = np.take_along_axis(t, at[..., None], -1)
        pivot_size = np.take_along_axis(size, at[..., None], -1)
        error = np.where(t == pivot, 0, 8 * (size + pivot_size))
        rates, rates_error, mean, mean_error = centered(t - pivot, error)
        out = (rates[..., None] * from_top).sum(-2)
        out_error = (rates_error + 8 * EPS * np.abs(rates)) @ moved
        found[f"out of {name}"] = out, out_error
        lse = (pivot + mean)[..., 0]
        lse_error = mean_error + 8 * EPS * (np.abs(pivot) + np.abs(mean) + pivot_size)
        found[f"lse of {name}"] = lse, lse_error[..., 0]
    return found


def as_found(name, x):
    """As `expected` has them: by head, without the batch."""
    if name in ("key", "value"):
        return wide(x)[0, :, 0]
    return wide(x)[0] if name == "bias" else heads_first(x)


def check(rng, dtype, keys):
    for scale, offset, equal in itertools.product(
        (1, 20, 60), (0, 1000, -300), (False, True)
    ):
        floats, d_out, tangents = case(rng, keys, dtype, scale, offset, equal)
        got = exact_derivatives(floats, d_out, tangents)
        for name, (want, bound) in expected(floats, d_out, tangents, dtype).items():
            result = got[name].dtype
            bound = bound + float(jnp.finfo(result).eps) / 2 * np.abs(want)
            bound += oracle.least_of(result.name)
            worst = (np.abs(as_found(name, got[name]) - want) / bound).max()
            assert worst <= 1, f"{name}: {worst} of {scale=} {offset=} {equal=}"


@pytest.mark.parametrize("keys", [2, 10, 128])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dominated_rows_and_offsets(rng, dtype, keys):
    """Rows that are whole in a block: the mean is that of the block's own dP."""
    check(rng, dtype, keys)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_in_several_blocks(small_blocks, rng, dtype):
    """With the mean from a pass before, merged about the pivots of the blocks."""
    check(rng, dtype, 49)


def test_what_is_hidden_is_no_part_of_the_mean(rng):
    """Values past the lengths are taken for 0, which does not have the offset."""
    floats, d_out, _ = case(rng, 37, "float32", 1, 1000, equal=False)
    lengths = {"key_value_seq_lengths": np.array([10], np.int32)}
    f = lambda x: attention(**x, **lengths, scale=SCALE, implementation="xla")
    d = exact_jit(lambda x, g: jax.vjp(f, x)[1](g)[0])(floats, d_out)
    want = oracle.forward(**floats, **lengths, scale=SCALE).vjp(d_out)
    for name in floats:
        error = np.abs(np.asarray(d[name], np.float64) - want[name]).max()
        assert error <= 16 * EPS * np.abs(want[name]).max(), name


@pytest.mark.parametrize("moving", [("sinks",), ("sinks", "value"), ("sinks", "query")])
def test_tangents_of_sinks(small_blocks, rng, moving):
    """Far below the logits, among them and above: a share of the mean, or all of it."""
    floats = arrays(rng, 21, 37, 4, 2)
    floats["sinks"] = jnp.array([0, 3, -50, 60], jnp.float32)
    tangents = {
        name: jnp.array(rng.normal(size=floats[name].shape), jnp.float32)
        for name in moving
    }
    f = lambda x: attention(**{**floats, **x}, return_residual=True)
    push = jax.jit(lambda x, t: jax.jvp(f, (x,), (t,))[1])
    got = push({name: floats[name] for name in moving}, tangents)
    for x, want in zip(got, oracle.forward(**floats).jvp(**tangents), strict=True):
        np.testing.assert_allclose(x, want, atol=16 * EPS)
