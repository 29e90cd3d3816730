"""What is done around cuDNN's kernels, with a formula in their place.

The formula takes the kernels' arguments, and has their faults: a gradient from exp(s -
lse), with an lse that is one float32. What the kernels themselves are told is read from
programs that are lowered for a GPU that is not there.
"""

import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.attention_cases import arrays

import jaxsoftmax
from jaxsoftmax._attend import cudnn, xla
from jaxsoftmax._attend.call import Config, Inputs, Result
from jaxsoftmax._compat import cudnn as _compat
from jaxsoftmax._compat import trace
from jaxsoftmax._core import kernel_call
from jaxsoftmax._core.device import Device

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


@pytest.fixture
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
@pytest.mark.usefixtures("formulas", "nans_allowed")
def test_as_blockwise(rng, case):
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


# Which of two entries has arrays of its own; the last is not of the whole batch.
MAPPED = [
    ("query", "value"),
    ("key", "bias"),
    ("value", "key_lengths", "mask"),
    ("query", "key", "value", "mask"),
]


@pytest.mark.usefixtures("formulas")
def test_vmap(rng):
    """Of some arrays only: values and gradients as one after the other."""

    def inputs():
        return Inputs(
            **arrays(rng, 4, 6, 2, 1, dtype="bfloat16"),
            bias=jnp.array(rng.normal(size=(1, 2, 4, 6)), "bfloat16"),
            mask=jnp.array(rng.random((1, 1, 4, 6)) < 0.7),
            key_lengths=jnp.array(rng.integers(1, 6, size=2), jnp.int32),
        )

    def run(x):
        result = cudnn.attention(config, x)
        nothing = jnp.zeros_like(result.lse)
        cotangent = Result(g, jnp.zeros_like(g), nothing, nothing)
        return result.out, cudnn.attention_gradient(config, x, result, cotangent)

    config = Config(0.3, wanted=("query", "key", "value", "bias"))
    x, y = inputs(), inputs()
    g = jnp.array(rng.normal(size=x.query.shape), "bfloat16")
    each = jax.jit(run)
    for names in MAPPED:
        one, other = (x._replace(**{n: getattr(z, n) for n in names}) for z in (x, y))
        both = {n: jnp.stack([getattr(x, n), getattr(y, n)], 1) for n in names}
        axes = Inputs(**dict.fromkeys(Inputs._fields))._replace(
            **dict.fromkeys(names, 1)
        )
        got = jax.jit(jax.vmap(run, in_axes=(axes,)))(x._replace(**both))
        want = jax.tree.map(lambda *z: jnp.stack(z), each(one), each(other))
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            b = np.asarray(b, np.float64)
            bar = 2**-6 * np.abs(b).max()
            np.testing.assert_allclose(np.asarray(a, np.float64), b, atol=bar)


@pytest.fixture
def hopper(monkeypatch):
    """Programs are lowered for a GPU that cuDNN runs on."""
    device = Device("cuda", "NVIDIA H100 80GB HBM3", (9, 0))
    monkeypatch.setattr(trace, "has_platform", lambda platform: True)
    monkeypatch.setattr(kernel_call, "target_device", lambda *_: device)
    theirs = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(theirs, "check_cudnn_version", lambda: 91002)


def lowered(f, *shapes):
    """The program with cuDNN's calls, of a loss and its gradient."""

    def loss(*floats):
        return jnp.sum(f(*floats).astype(jnp.float32))

    given = [jax.ShapeDtypeStruct(shape, "bfloat16") for shape in shapes]
    traced = jax.jit(jax.grad(loss, tuple(range(len(given))))).trace(*given)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


def test_max_logits(formulas, rng):
    """In a pass of their own, beside the kernel."""
    x = Inputs(*arrays(rng, T, S, 4, 2).values())
    config = Config(0.3, causal=True, uses_max_logits=True)
    want = xla.attention(config, x)
    np.testing.assert_array_equal(
        cudnn.attention(config, x).max_logits, want.max_logits
    )


@pytest.mark.versions
@pytest.mark.usefixtures("hopper")
def test_queries_at_an_offset():
    """Their kernels count places from 0."""
    given = [jax.ShapeDtypeStruct((2, T, 4, 64), "bfloat16")] * 3
    offsets = jax.ShapeDtypeStruct((2,), "int32")

    def chosen(offset, **options):
        f = lambda q, k, v, offset: jaxsoftmax.dot_product_attention(
            q, k, v, query_offset=offset, **options
        )
        explained = jaxsoftmax.explain_for("cuda", "NVIDIA H100 80GB HBM3")
        return explained(f, *given, offset).choices[0]

    choice = chosen(offsets, is_causal=True)
    assert dict(choice.refusals)["cudnn"] == "has no query_offset"
    assert chosen(offsets).implementation == "cudnn"


@pytest.mark.versions
@pytest.mark.usefixtures("hopper")
def test_window():
    """Forward and gradient are told how many keys up to its own a query sees."""

    def f(q, k, v):
        options = {"local_window_size": (5, 0), "implementation": "cudnn"}
        return jaxsoftmax.dot_product_attention(q, k, v, **options)

    program = lowered(f, *[(2, T, 4, 64)] * 3)
    assert re.findall(r"sliding_window_length\\22: (\d+)", program) == ["6", "6"]


@pytest.mark.versions
@pytest.mark.usefixtures("hopper")
def test_max_logits_and_batches_leave_the_kernels():
    """One call of each, of all of the batch."""

    def f(q, k, v):
        options = {"is_causal": True, "implementation": "cudnn"}
        return jaxsoftmax.dot_product_attention(
            q, k, v, **options, return_max_logits=True
        )[0]

    program = lowered(f, *[(2, 3, T, 4, 64)] * 3)
    assert len(re.findall(r"@__cudnn\$fmha", program)) == 2
    assert f"tensor<6x{T}x4x64xbf16>" in program


@pytest.mark.versions
@pytest.mark.usefixtures("hopper")
def test_vmap_is_one_call():
    """Of a key that is not mapped, and over the second axis of the others."""

    def f(q, k, v):
        return jaxsoftmax.dot_product_attention(q, k, v, implementation="cudnn")

    many, one = (2, 3, T, 4, 64), (2, T, 4, 64)
    program = lowered(jax.vmap(f, (1, None, 1)), many, one, many)
    assert len(re.findall(r"@__cudnn\$fmha", program)) == 2
    assert f"tensor<6x{T}x4x64xbf16>" in program
