"""What is done around cuDNN's kernels, with a formula in their place.

The formula takes the kernels' arguments, and has their faults: a gradient from exp(s -
lse), with an lse that is one float32.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.attention_cases import arrays

from jaxsoftmax._attend import cudnn, xla
from jaxsoftmax._attend.call import Config, Inputs, Result
from jaxsoftmax._compat import cudnn as _compat

T, S = 16, 24


def logits(call):
    query, key, _, bias, _, key_lengths, scale, causal, window = call
    group = query.shape[2] // key.shape[2]
    k = jnp.repeat(key, group, 2).astype(jnp.float32)
    s = scale * jnp.einsum("btnh,bsnh->bnts", query.astype(jnp.float32), k)
    if bias is not None:
        s = s + bias.astype(jnp.float32)
    place = jnp.arange(s.shape[3])[None, :] - jnp.arange(s.shape[2])[:, None]
    shown = jnp.ones(place.shape, bool)
    if causal:
        shown &= place <= 0
    if window is not None:
        shown &= place > -window
    shown = jnp.broadcast_to(shown, s.shape)
    if key_lengths is not None:
        at = jnp.arange(s.shape[3])
        shown &= (at[None, :] < key_lengths[:, None])[:, None, None, :]
    return jnp.where(shown, s, jnp.finfo("float32").min)


def value_of(query, value):
    return jnp.repeat(value, query.shape[2] // value.shape[2], 2).astype(jnp.float32)


def attention(call, keeps_lse):
    s = logits(call)
    top = jnp.max(s, -1, keepdims=True)
    e = jnp.exp(s - top)
    total = jnp.sum(e, -1, keepdims=True)
    out = jnp.einsum("bnts,bsnh->btnh", e / total, value_of(call.query, call.value))
    return out.astype(call.query.dtype), (top + jnp.log(total))[..., 0]


def gradient(call, lse, out, d_out, wants_bias):
    q, k, value, bias, *_ = call

    def weighted(q, k, v, b):
        s = logits(call._replace(query=q, key=k, bias=b))
        p = jnp.exp(s - lse[..., None])
        d_p = jnp.einsum("btnh,bsnh->bnts", d_out, value_of(q, value))
        center = jnp.sum(d_out * out.astype(jnp.float32), -1)
        d_s = jax.lax.stop_gradient(p * (d_p - jnp.swapaxes(center, 1, 2)[..., None]))
        weighted_value = jnp.einsum("bnts,bsnh->btnh", p, value_of(q, v))
        return jnp.sum(s * d_s), jnp.sum(jax.lax.stop_gradient(p) * 0) + weighted_value

    d_out = d_out.astype(jnp.float32)
    logits_gradient = jax.grad(lambda q, k, b: weighted(q, k, value, b)[0], (0, 1, 2))
    zero = jnp.zeros((1, 1, 1, 1), q.dtype)
    d_q, d_k, d_b = logits_gradient(q, k, zero if bias is None else bias)
    _, pull = jax.vjp(lambda v: weighted(q, k, v, bias)[1], value)
    return d_q, d_k, pull(d_out)[0], d_b if wants_bias else None


@pytest.fixture(autouse=True)
def formulas(monkeypatch):
    monkeypatch.setattr(_compat, "cudnn_attention", attention)
    monkeypatch.setattr(_compat, "cudnn_attention_gradient", gradient)


def left_padding(number, rng):
    """A bias of keys, of which the first 6 are padding, as a number says."""
    bias = np.where(np.arange(S) < 6, number, 0) + 0 * rng.normal(size=(2, 1, 1, S))
    return jnp.array(bias, "bfloat16")


def lowest(rng):
    """In some rows all are the lowest number; in others they differ by some 8."""
    bias = rng.normal(size=(1, 4, T, S))
    bias[:, :, ::3] = float(jnp.finfo("bfloat16").min)
    bias[:, :, 1::3] = -1024 - 8 * rng.integers(0, 3, size=bias[:, :, 1::3].shape)
    bias[:, 1, 4] = -np.inf
    return jnp.array(bias, "bfloat16")


CASES = {
    "causal": ({"bias": lambda rng: left_padding(-1e9, rng)}, {"causal": True}),
    "lowest": ({"bias": lowest}, {}),
    "mask": (
        {
            "bias": lambda rng: left_padding(-1e9, rng),
            "mask": lambda rng: jnp.array(np.arange(S) < 6).reshape(1, 1, 1, S),
        },
        {},
    ),
    "lengths": (
        {
            "bias": lowest,
            "key_lengths": lambda rng: jnp.array([S, 7], jnp.int32),
        },
        {},
    ),
    "window": ({"mask": lambda rng: jnp.array(rng.random((1, 1, T, S)) < 0.5)}, {}),
}


@pytest.mark.parametrize("case", list(CASES))
def test_as_blockwise(nans_allowed, rng, case):
    """Logits that share a large number too: values, lse and gradients."""
    given, static = CASES[case]
    floats = arrays(rng, T, S, 4, 2, dtype="bfloat16")
    x = Inputs(**floats, **{name: make(rng) for name, make in given.items()})
    wanted = ("query", "key", "value", "bias")[: 3 + (x.bias is not None)]
    # Beside 1e9 the products are lost where it is not taken out: here they are small.
    config = Config(0.3 if x.bias is None else 1e-6, wanted=wanted, **static)
    g = jnp.array(rng.normal(size=x.query.shape), "bfloat16")

    @jax.jit
    def run(x):
        found = []
        for module in (cudnn, xla):
            result = module.attention(config, x)
            nothing = jnp.zeros_like(result.lse)
            cotangent = Result(g, jnp.zeros_like(g), nothing, nothing)
            gradients = module.attention_gradient(config, x, result, cotangent)
            found.append((result.out, result.lse, result.lse_low, gradients))
        return found

    (out, lse, low, d), (want, want_lse, want_low, d_want) = jax.tree.map(
        lambda a: np.asarray(a, np.float64), run(x)
    )
    np.testing.assert_allclose(out, want, atol=2e-2, rtol=2e-2)
    np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(want_lse))
    finite = np.isfinite(want_lse)
    if case != "lengths":
        difference = lse[finite] - want_lse[finite] + (low - want_low)[finite]
        np.testing.assert_allclose(difference, 0, atol=1e-4)
        for name, gradient in d_want.items():
            bar = 2e-2 * np.abs(gradient).max()
            np.testing.assert_allclose(d[name], gradient, atol=bar, err_msg=name)
