"""The Mosaic GPU kernels of attention on a machine that has no GPU.

In Pallas' interpreter, which runs warpgroups and their barriers on the CPU and looks
for races, against the oracle. Compiled for Hopper: that registers are enough, and that
products run while exponentials are computed. What is refused needs no kernel.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import random as jex_random
from support.attention_kernels import (
    EVERYTHING,
    check_pushed,
    check_result,
    inputs,
    oracle_of,
    wide,
)

import jaxsoftmax
from jaxsoftmax._attend import mosaic_gpu as kernels
from jaxsoftmax._attend import mosaic_gpu_dropout
from jaxsoftmax._attend.call import FLOATS, AttentionCall, Config, Inputs, Result
from jaxsoftmax._attend.xla import words_of_product
from jaxsoftmax._compat import mosaic_gpu as _compat
from jaxsoftmax._compat import mosaic_gpu_registers as registers
from jaxsoftmax._core.device import Device
from jaxsoftmax._core.mosaic_gpu_tanh import HalfTanh


def struct(shape, dtype):
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


HOPPER = Device("cuda", "NVIDIA H100 80GB HBM3", (9, 0))
# Small arrays have several blocks and tiles.
SMALL = {"block_n": 64}

CASES = {  # B, T, S, N, K, H, Hv; dtype; options
    "plain": ((1, 64, 64, 1, 1, 16, 16), "bfloat16", {"equal": True}),
    "high soft cap": ((1, 64, 130, 1, 1, 16, 16), "bfloat16", {"softcap": 20.0}),
    "soft cap": (
        (2, 140, 260, 2, 1, 16, 16),
        "bfloat16",
        {"softcap": 2.0, "window": (150, 40), "segments": True, "block_n": 128},
    ),
    "soft cap and mask": (
        (2, 70, 140, 2, 2, 16, 32),
        "bfloat16",
        {
            **{"softcap": 50.0, "mask": (1, 0, 1, 1), "block_n": 128},
            **{"query_lengths": True, "key_lengths": True},
        },
    ),
    "lengths": ((2, 64, 130, 1, 1, 16, 16), "bfloat16", {"key_lengths": True}),
    "causal": ((1, 130, 200, 2, 1, 32, 16), "bfloat16", {"causal": True}),
    "float16": ((2, 70, 130, 1, 1, 16, 64), "float16", {"softcap": 1.5}),
    "window": (
        (2, 200, 200, 1, 1, 16, 16),
        "bfloat16",
        {"window": (70, 3), "query_lengths": True, "key_lengths": True, "sinks": True},
    ),
    "offsets": (
        (2, 64, 140, 2, 2, 16, 16),
        "bfloat16",
        {"causal": True, "window": (64, 0), "offsets": [60, -8], "segments": True},
    ),
    "mask": (
        (2, 100, 140, 4, 2, 16, 16),
        "bfloat16",
        {"mask": (1, 0, 1, 1), "sinks": True, "causal": True},
    ),
    "mask of heads": (
        (2, 140, 70, 2, 2, 16, 16),
        "float16",
        {"mask": (0, 1, 1, 1), "softcap": 2.0, "query_lengths": True},
    ),
    "mask of keys": ((2, 64, 140, 2, 1, 16, 16), "bfloat16", {"mask": (1, 0, 0, 1)}),
    "mask of queries": (
        (2, 140, 64, 2, 1, 16, 16),
        "bfloat16",
        {"mask": (1, 1, 1, 0), "window": (30, 30)},
    ),
    "mask of entries": ((2, 64, 64, 2, 1, 16, 16), "bfloat16", {"mask": (1, 1, 0, 0)}),
    "bias": (
        (2, 100, 140, 4, 2, 16, 16),
        "bfloat16",
        {"bias": (1, 1, 1, 1), "shared": -1e9, "key_lengths": True, "sinks": True},
    ),
    "bias of heads": (
        (3, 70, 200, 2, 1, 16, 32),
        "bfloat16",
        {"bias": (0, 1, 1, 1), "bias_dtype": "float32", "window": (70, 3)},
    ),
    "bias of entries": (
        (2, 64, 140, 2, 2, 16, 16),
        "float16",
        {"bias": (1, 0, 1, 1), "softcap": 1.5, "mask": (0, 1, 1, 1)},
    ),
    "bias of keys": (
        (2, 70, 140, 4, 2, 16, 16),
        "bfloat16",
        {"bias": (1, 1, 0, 1), "causal": True, "offsets": [60, -8]},
    ),
    "bias of queries": (
        (2, 140, 70, 2, 1, 16, 16),
        "bfloat16",
        {"bias": (0, 1, 1, 0), "segments": True, "bias_dtype": "float32"},
    ),
    "bias of keys alone": (
        (2, 70, 140, 2, 1, 16, 32),
        "bfloat16",
        {
            "bias": (0, 1, 0, 1),
            "softcap": 2.0,
            "key_lengths": True,
            "wanted": ("bias",),
        },
    ),
    "bias of queries alone": (
        (2, 140, 70, 2, 2, 16, 16),
        "float16",
        {"bias": (1, 0, 1, 0), "query_lengths": True, "wanted": ("bias", "value")},
    ),
    "bias of keys, and values": (
        (1, 70, 140, 2, 2, 16, 32),
        "bfloat16",
        {"bias": (1, 1, 0, 1), "mask": (1, 0, 1, 1), "wanted": ("value", "bias")},
    ),
    "one bias": ((2, 64, 70, 4, 2, 16, 16), "bfloat16", {"bias": (1, 1, 0, 0)}),
    "bias and no gradient of it": (
        (1, 70, 70, 2, 1, 32, 16),
        "bfloat16",
        {"bias": (0, 0, 1, 1), "wanted": ("key", "value"), "causal": True},
    ),
    "bias alone": (
        (1, 64, 70, 2, 1, 16, 16),
        "bfloat16",
        {"bias": (1, 1, 1, 1), "softcap": 20.0, "wanted": ("bias",)},
    ),
    "values alone": ((1, 64, 70, 2, 1, 16, 32), "bfloat16", {"wanted": ("value",)}),
    "keys alone": ((1, 64, 70, 2, 1, 32, 16), "bfloat16", {"wanted": ("key",)}),
    "dropout": (
        (2, 140, 100, 4, 2, 16, 16),
        "bfloat16",
        {"dropout_rate": 0.3, "causal": True, "sinks": True, "bias": (0, 1, 1, 1)},
    ),
    "dropout of heads": (
        (2, 70, 140, 2, 1, 16, 32),
        "float16",
        {
            **{"dropout_rate": 0.1, "dropout_dims": (False, True), "softcap": 2.0},
            **{"mask": (1, 0, 1, 1), "window": (40, 9), "key_lengths": True},
        },
    ),
    "dropout of all": (
        (2, 70, 70, 2, 2, 32, 16),
        "bfloat16",
        {"dropout_rate": 0.6, "dropout_dims": (False, False), "segments": True},
    ),
    "everything": (
        (2, 100, 80, 2, 1, 16, 32),
        "float16",
        EVERYTHING,
    ),
}


# Which have two consumer warpgroups.
TWO = ("causal", "window", "mask", "bias", "bias of heads", "bias of keys", "dropout")
QUICK = ("lengths", "causal", "window", "everything", "mask", "bias", "bias of keys")
QUICK += ("dropout", "soft cap", "soft cap and mask")


def with_interpreter(test):
    """On the newest jax: the oldest has no interpreter."""
    no_interpreter = pytest.mark.skipif(
        jax.__version_info__ < (0, 11), reason="before 0.11 jax has no GPU interpreter"
    )
    return pytest.mark.versions(no_interpreter(test))


# The weights of keys beyond the last are infinite where lse is low. Nothing reads what
# is added up with them.
of_hidden = pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")


def interpreted(config, x, g, plan, capsys):
    """The result, and the gradients for cotangents of out and lse."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def run(x, g):
        result = kernels.attention(config, x, **plan)
        g = Result(*g[:1], None, *g[1:], None)
        return result, kernels.attention_gradient(config, x, result, g, **plan)

    with (
        plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)),
        np.errstate(all="ignore"),
        jax.debug_nans(False),
    ):
        found = jax.jit(run)(x, g)
    assert "RACE" not in capsys.readouterr().out
    return found


def cotangents(rng, x, dtype):
    out, lse = (*x.query.shape[:3], x.value.shape[-1]), x.query.shape[:3]
    g = [rng.standard_normal(out).astype(dtype), rng.standard_normal(lse)]
    return [jnp.array(g[0], dtype), jnp.array(g[1], "float32")]


@with_interpreter
@of_hidden
@pytest.mark.parametrize(
    "case",
    [
        case if case in QUICK else pytest.param(case, marks=pytest.mark.slow)
        for case in CASES
    ],
)
def test_interpreted(case, capsys):
    shape, dtype, options = CASES[case]
    rng = np.random.default_rng(0)
    x = inputs(rng, shape, dtype, options)
    if "equal" in options:
        x = x._replace(value=jnp.broadcast_to(x.value[:, :1], x.value.shape))
    names = ("causal", "window", "softcap", "dropout_rate", "dropout_dims")
    static = {name: options[name] for name in names if name in options}
    wanted = tuple(name for name in FLOATS if getattr(x, name) is not None)
    wanted = options.get("wanted", wanted)
    config = Config(
        shape[5] ** -0.5, uses_max_logits=case == "causal", wanted=wanted, **static
    )
    plan = SMALL | {"warpgroups": 1 + (case in TWO), "turns": case in TWO}
    plan |= {"block_n": options["block_n"]} if "block_n" in options else {}

    g = cotangents(rng, x, dtype)
    got, gradients = interpreted(config, x, g, plan, capsys)
    assert set(gradients) == set(wanted)
    if "equal" in options:  # their mean is the same, whatever the weights
        same = jnp.broadcast_to(x.value[:, :1], got.out.shape)
        np.testing.assert_array_equal(got.out, same)
        np.testing.assert_allclose(got.low, 0, atol=1e-6)
    check_result(config, x, got, dtype, Result(g[0], None, g[1], None), gradients)


MOVING = {  # one of `CASES`, and other options: what moves, if not all that may
    "of all": ("causal", {}),
    "of all, with a cap": ("high soft cap", {"softcap": 2.0}),
    "of all, in float16": ("float16", {}),
    "of all, with everything": ("everything", {}),
    "of all, with a mask": ("mask", {}),
    "of all, with a window": ("window", {}),
    "of all, with offsets": ("offsets", {}),
    "of all, with a bias": ("bias", {"shared": 0}),
    "of all, with a bias of heads": ("bias of heads", {}),
    "of all, with a bias of keys": ("bias of keys", {}),
    "of all, with a bias of queries": ("bias of queries", {}),
    "of all, with a bias and a cap": ("bias of entries", {}),
    "of a bias": ("bias", {"moving": ("bias",), "shared": 0, "offset_dot": 300}),
    "of a bias that is one": ("one bias", {"moving": ("bias", "value")}),
    "of a bias with a cap": ("bias alone", {"moving": ("bias",)}),
    "of values": ("lengths", {"moving": ("value",)}),
    "of queries": ("plain", {"moving": ("query",)}),
    "of keys and sinks": ("mask", {"moving": ("key", "sinks"), "offset_dot": 1000}),
    "of sinks": ("window", {"moving": ("sinks",)}),
    "of sinks and values": ("window", {"moving": ("sinks", "value")}),
    "of keys and values": (
        "mask of keys",
        {"moving": ("key", "value"), "offset_dot": -100},
    ),
    "with values alike": ("causal", {"moving": ("query",), "value_offset": 100}),
    "by tiles of 32": ("mask", {"plan": {"block_n": 32}}),
    "by tiles of 32, with a bias": ("bias of heads", {"plan": {"block_n": 32}}),
}
QUICK_MOVING = (
    "of all",
    "of all, with everything",
    "of all, with a mask",
    "of all, with a bias",
    "of a bias",
    "of values",
    "of queries",
    "of keys and sinks",
    "of sinks",
    "by tiles of 32",
)


def pushed(config, x, tangents, plan, capsys):
    """The result, and the tangents of it."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def run(x, tangents):
        result = kernels.attention(config, x, **SMALL)
        return result, kernels.attention_pushforward(
            config, x, result, tangents, **plan
        )

    with (
        plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)),
        np.errstate(all="ignore"),
        jax.debug_nans(False),
    ):
        found = jax.jit(run)(x, tangents)
    assert "RACE" not in capsys.readouterr().out
    return found


@with_interpreter
@of_hidden
@pytest.mark.parametrize(
    "case",
    [
        case if case in QUICK_MOVING else pytest.param(case, marks=pytest.mark.slow)
        for case in MOVING
    ],
)
def test_forward_mode(case, capsys):
    like, changed = MOVING[case]
    shape, dtype, options = CASES[like]
    options = {**options, **changed}
    rng = np.random.default_rng(0)
    x = inputs(rng, shape, dtype, options)
    names = ("causal", "window", "softcap")
    static = {name: options[name] for name in names if name in options}
    moving = tuple(name for name in FLOATS if getattr(x, name) is not None)
    moving = options.get("moving", moving)
    config = Config(shape[5] ** -0.5, wanted=moving, **static)

    def tangent(name):
        array = getattr(x, name)
        moved = options.get("offset_dot", 0) + rng.standard_normal(array.shape)
        return jnp.array(moved, array.dtype)

    tangents = {name: tangent(name) for name in moving}
    dots = Inputs(*[None] * len(Inputs._fields))._replace(**tangents)
    plan = {"warpgroups": 1 + (like in TWO), **options.get("plan", {})}
    _, got = pushed(config, x, dots, SMALL | plan, capsys)
    check_pushed(oracle_of(config, x), dtype, got, tangents)
    assert not got.lse_low.any()


@with_interpreter
@pytest.mark.parametrize("block_n", [64, 128])
def test_logits_at_the_soft_cap(block_n, capsys):
    """Without a maximum: logits as far apart as a cap lets them, or all at its ends."""
    shape, softcap = (1, 64, 140, 1, 1, 16, 16), 50.0
    x = inputs(np.random.default_rng(0), shape, "bfloat16", {})
    sizes = jnp.where(jnp.arange(64) % 2 == 0, 400.0, -400.0).reshape(1, -1, 1, 1)
    ends = jnp.ones_like(x.key).at[:, 100:].multiply(-1)
    for key in (jnp.ones_like(x.key), ends):
        given = x._replace(query=(sizes * jnp.ones_like(x.query)), key=key)
        given = given._replace(query=given.query.astype("bfloat16"))
        config = Config(0.25, softcap=softcap, wanted=("query", "key", "value"))
        assert kernels.program("forward", config, given).bounded
        g = cotangents(np.random.default_rng(1), given, "bfloat16")
        plan = {"block_n": block_n, "warpgroups": 1}
        got, gradients = interpreted(config, given, g, plan, capsys)
        cotangent = Result(g[0], None, g[1], None)
        check_result(config, given, got, "bfloat16", cotangent, gradients)


@pytest.mark.parametrize(
    ("changed", "options"),
    [
        ({"softcap": None}, {}),
        ({"softcap": 60.0}, {}),
        ({"dropout_rate": 0.1}, {"dropout_rate": 0.1}),
        ({"uses_max_logits": True}, {}),
        ({}, {"sinks": True}),
        ({}, {"bias": (1, 1, 1, 1)}),
        ({}, {"dtype": "float16"}),
    ],
)
def test_what_needs_a_maximum(changed, options):
    shape, dtype = (1, 64, 64, 1, 1, 16, 16), options.get("dtype", "bfloat16")
    x = inputs(np.random.default_rng(0), shape, dtype, options)
    config = Config(0.25, **{"softcap": 50.0} | changed)
    assert not kernels.program("forward", config, x).bounded


@pytest.mark.parametrize(
    ("size", "options", "warpgroups"),
    [
        (64, {}, 3),
        (128, {}, 2),
        (64, {"softcap": 20.0}, 2),
        (64, {"mask": (1, 1, 1, 1)}, 2),
        (64, {"segments": True}, 2),
        (64, {"dropout_rate": 0.1}, 2),
    ],
)
def test_warpgroups_of_the_gradient_of_keys(size, options, warpgroups):
    shape = (1, 64, 64, 1, 1, size, size)
    x = inputs(np.random.default_rng(0), shape, "bfloat16", options)
    names = ("softcap", "dropout_rate")
    config = Config(0.25, **{n: options[n] for n in names if n in options})
    assert kernels.program("key_gradient", config, x).warpgroups == warpgroups


@with_interpreter
def test_output_alone():
    """What is for derivatives is neither computed nor written."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    shape, dtype, options = CASES["window"]
    x = inputs(np.random.default_rng(0), shape, dtype, options)

    def run(uses_lse):
        config = Config(0.25, window=options["window"], uses_lse=uses_lse)
        plan = SMALL | {"warpgroups": 1, "turns": False}
        return kernels.attention(config, x, **plan)

    with (
        plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()),
        np.errstate(all="ignore"),
        jax.debug_nans(False),
    ):
        alone, all_of = (jax.jit(run, static_argnums=0)(n) for n in (False, True))
    np.testing.assert_array_equal(alone.out, all_of.out)
    assert np.any(all_of.lse)
    assert not np.any(alone.lse)


@with_interpreter
@of_hidden
@jax.debug_nans(False)
@pytest.mark.parametrize("softcap", [None, pytest.param(2.0, marks=pytest.mark.slow)])
def test_what_is_hidden_has_no_influence(softcap, capsys):
    """A bias where it is masked, or beyond lengths; queries that see nothing."""
    rng = np.random.default_rng(0)
    options = {"mask": (1, 0, 1, 1), "bias": (0, 1, 1, 1)}
    x = inputs(rng, (1, 70, 140, 2, 1, 16, 16), "bfloat16", options)
    mask = x.mask.at[:, :, 3].set(False)
    x = x._replace(
        mask=mask,
        bias=x.bias.at[:, :, 5].set(-jnp.inf),
        query_lengths=jnp.array([66], "int32"),
        key_lengths=jnp.array([130], "int32"),
    )
    hidden = np.broadcast_to(~mask, x.bias.shape).copy()
    hidden[:, :, 66:] = hidden[..., 130:] = True
    config = Config(0.25, softcap=softcap, wanted=("query", "key", "value", "bias"))
    g = cotangents(rng, x, "bfloat16")
    found = []
    for bad in (0.0, jnp.nan):
        given = x._replace(
            query=x.query.at[:, jnp.array([3, 5, 66, 67, 68, 69])].set(bad),
            bias=jnp.where(hidden, jnp.array(bad, x.bias.dtype), x.bias),
        )
        found.append(interpreted(config, given, g, SMALL | {"warpgroups": 1}, capsys))
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_array_equal(a, b)


@with_interpreter
@of_hidden
@jax.debug_nans(False)
@pytest.mark.parametrize("lengths", [False, True])
def test_tangents_of_what_is_hidden_have_no_influence(lengths, capsys):
    """Beyond lengths, where a bias is hidden, of queries that see nothing."""
    rng = np.random.default_rng(0)
    options = {"mask": (1, 0, 1, 1), "bias": (0, 1, 1, 1), "sinks": lengths}
    x = inputs(rng, (1, 70, 140, 2, 1, 16, 16), "bfloat16", options)
    mask = x.mask.at[:, :, 3].set(False)
    x = x._replace(mask=mask)
    hidden = np.broadcast_to(~mask, x.bias.shape).copy()
    queries, keys = jnp.array([3]), jnp.array([], "int32")
    if lengths:
        x = x._replace(
            query_lengths=jnp.array([66], "int32"),
            key_lengths=jnp.array([130], "int32"),
        )
        hidden[:, :, 66:] = hidden[..., 130:] = True
        queries, keys = jnp.array([3, 66, 67, 68, 69]), jnp.arange(130, 140)
    moving = tuple(n for n in FLOATS if getattr(x, n) is not None)
    config = Config(0.25, wanted=moving)
    absent = Inputs(*[None] * len(Inputs._fields))
    dots = absent._replace(**{name: jnp.tanh(getattr(x, name)) for name in moving})
    plan, found = SMALL | {"warpgroups": 1}, []
    for bad in (0.0, jnp.nan):
        bad_dots = dots._replace(
            query=dots.query.at[:, queries].set(bad),
            key=dots.key.at[:, keys].set(bad),
            value=dots.value.at[:, keys].set(bad),
            bias=jnp.where(hidden, jnp.array(bad, x.bias.dtype), dots.bias),
        )
        given = x._replace(query=x.query.at[:, queries].set(bad))
        found.append(pushed(config, given, bad_dots, plan, capsys)[1])
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_array_equal(a, b)
        assert np.isfinite(a).all()


@with_interpreter
@of_hidden
@jax.debug_nans(False)
def test_queries_of_no_segment_have_no_influence(capsys):
    rng = np.random.default_rng(0)
    x = inputs(rng, (1, 64, 64, 1, 1, 16, 16), "bfloat16", {"segments": True})
    x = x._replace(query_segments=x.query_segments.at[:, 5].set(9))
    config = Config(0.25, wanted=("query", "key", "value"))
    g = cotangents(rng, x, "bfloat16")
    found = []
    for bad in (0.0, jnp.nan):
        given = x._replace(query=x.query.at[:, 5].set(bad))
        bad_g = [g[0].at[:, 5].set(bad), g[1]]
        plan = SMALL | {"warpgroups": 1, "turns": False}
        found.append(interpreted(config, given, bad_g, plan, capsys))
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_array_equal(a, b)


@with_interpreter
def test_a_large_number_that_logits_share(capsys):
    """Derivatives are those without it, with what lse has beside it."""
    rng = np.random.default_rng(0)
    x = inputs(rng, (1, 64, 64, 1, 1, 16, 16), "bfloat16", {})
    # Products of a query are equal, and small: beside the number they are lost.
    x = x._replace(key=jnp.ones_like(x.key))
    config = Config(2.0**-8, wanted=("query", "key", "value", "bias"))
    g = cotangents(rng, x, "bfloat16")
    absent = Inputs(*[None] * len(Inputs._fields))
    dots = absent._replace(query=x.query, key=x.query, value=x.value)
    of_heads = dataclasses.replace(config, wanted=("query", "key", "value"))
    plan, found, tangents = SMALL | {"warpgroups": 1}, [], []
    for number in (0.0, float(jnp.finfo("bfloat16").min)):
        x = x._replace(bias=jnp.full((1, 1, 64, 64), number, jnp.float32))
        found.append(interpreted(config, x, g, plan, capsys)[1])
        tangents.append(pushed(of_heads, x, dots, plan, capsys)[1])
    for want, got in zip(*((wide(a), a.lse) for a in tangents), strict=True):
        np.testing.assert_allclose(got, want, atol=2.0**-8 * np.abs(want).max())
    for name in config.wanted:
        want, got = (np.asarray(gradients[name], np.float32) for gradients in found)
        bar = 2.0**-8 * max(np.abs(want).max(), config.scale)
        np.testing.assert_allclose(got, want, atol=bar, err_msg=name)


@with_interpreter
@pytest.mark.parametrize(
    ("factor", "cap"), [(0.125 / 30, 30.0), (0.3 / 7, 7.0), (99, 0.01), (2.0**9, 1e27)]
)
def test_half_tanh(factor, cap):
    """Where all numbers are small, and where one is not; and in exponents."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    tanh = HalfTanh(factor)
    x = np.linspace(-0.37, 0.37, 64 * 32, dtype=np.float32).reshape(64, 32)
    x /= np.float32(factor)
    assert np.max(x) ** 2 < tanh.power
    if cap == 30:
        assert tanh.power == (16 / 0.125) ** 2
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        for tile in (x, 100 * x):
            want = np.tanh(np.float64(tile) * factor)
            for got in (tanh.of(tile), tanh.of_rows(tile)):
                np.testing.assert_allclose(2 * got, want, atol=4e-7)
            if tanh.folds(2 * cap):
                powers = tanh.powers(tile, 2 * cap, np.full_like(tile, cap))
                largest = 4e-7 * max(cap, 1)
                np.testing.assert_allclose(
                    np.log2(powers), cap * (want - 1), atol=largest
                )
    assert tanh.folds(2 * cap) == (cap < 1e27)


@with_interpreter
@pytest.mark.parametrize("by_keys", [True, False])
def test_places_of_dropout_beyond_32_bits(by_keys):
    """Where a tile has places on both sides of 2^32, along its columns or rows."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    keys, rate = 70_000, 0.3
    row, key = divmod(2**32, keys)
    query = np.arange(row - 5, row + 59, dtype=np.uint32)
    key = np.arange(key - 20, key + 44, dtype=np.uint32)
    index = query.astype(np.uint64)[:, None] * keys + key
    if not by_keys:
        index = index.T
    words = jax.random.key_data(jax.random.key(3))
    high, low = ((index >> n).astype(np.uint32) for n in (np.uint64(32), np.uint64(0)))
    assert len(np.unique(high)) == 2
    want = jex_random.threefry2x32_p.bind(*jnp.broadcast_arrays(*words, high, low))
    uniform = np.asarray((want[0] ^ want[1]) >> 9).astype(np.float32) * 2.0**-23

    starts = [jnp.broadcast_to(a, (64, 64)) for a in (query[:, None], key)]
    starts = [(a if by_keys else a.T)[:, :8] for a in starts]
    place = [*words_of_product(starts[0], keys)][::-1]
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        found = mosaic_gpu_dropout.kept_words(
            mosaic_gpu_dropout.advanced(place, starts[1]),
            8 if by_keys else 8 * keys,
            [*words, mosaic_gpu_dropout.largest_kept(rate)],
            64,
        )
        kept = registers.where_bits(found, jnp.ones((64, 64)), 0.0)
    np.testing.assert_array_equal(kept != 0, uniform < np.float32(1 - rate))


@pytest.mark.parametrize("rate", [1e-9, 0.1, 0.5, 1 - 2**-24, 1 - 1e-12])
def test_largest_bits_that_are_kept(rate):
    largest = int(mosaic_gpu_dropout.largest_kept(rate))
    bits = [0, largest, *([largest + 1] if largest < 2**32 - 1 else [])]
    ones = np.float32(1).view(np.uint32)
    floats = (np.array(bits, np.uint32) >> 9 | ones).view(np.float32) - np.float32(1)
    kept = floats < np.float32(1 - rate)
    assert kept.tolist() == [True, True, False][: len(bits)]


@pytest.mark.skipif(
    jax.__version_info__ < (0, 10, 2), reason="an AbstractDevice has no platform"
)
@pytest.mark.versions
@pytest.mark.parametrize("with_pairs", [False, True])
def test_lowered_for_a_gpu_that_is_not_there(with_pairs):
    """With what is mapped and what is not, and the gradients."""
    heads = struct((2, 100, 4, 80), "bfloat16")

    def f(q, k, v, lengths, bias, mask, key):
        rate = 0.0 if key is None else 0.1
        call = lambda *x: jaxsoftmax.dot_product_attention(
            *x,
            **{"key_value_seq_lengths": lengths, "mask": mask},
            **{"dropout_rate": rate, "dropout_key": key},
            implementation="mosaic_gpu",
        )
        arrays = (q, k, v) if bias is None else (q, k, v, bias)
        out, pull = jax.vjp(call, *arrays)
        return out, pull(out)

    device = jax.sharding.AbstractDevice(
        device_kind=HOPPER.kind, num_cores=None, platform="cuda"
    )
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    mapped = jax.vmap(f, in_axes=(0, None, 0, None, 0, 0, 0))
    several, lengths = heads.update(shape=(3, *heads.shape)), struct((2,), "int32")
    pairs = [None, None, None]
    if with_pairs:
        pairs = [
            struct((3, 2, 4, 100, 100), "float32"),
            struct((3, 2, 1, 1, 100), bool),
            struct((3, 2), "uint32"),
        ]
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(mapped).trace(several, heads, several, lengths, *pairs)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 3


@pytest.mark.skipif(
    jax.__version_info__ < (0, 10, 2), reason="an AbstractDevice has no platform"
)
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("option", ["soft cap", "dropout"])
def test_default_where_cudnn_does_not_go(mapped, option):
    """The kernels: for values and gradients, and tangents but of dropout."""
    heads = struct((2, 100, 4, 64), "bfloat16")
    options = {"logits_soft_cap": 30.0}
    if option == "dropout":
        options = {"dropout_rate": 0.1, "dropout_key": np.zeros(2, np.uint32)}

    def f(q, k, v):
        call = lambda *x: jaxsoftmax.dot_product_attention(*x, **options)
        out, pull = jax.vjp(call, q, k, v)
        moved = option != "dropout" and jax.jvp(call, (q, k, v), (q, k, v))
        return out, pull(out), moved

    if mapped:
        f = jax.vmap(f, in_axes=(0, None, 0))
        several = heads.update(shape=(3, *heads.shape))
        arrays = several, heads, several
    else:
        arrays = heads, heads, heads
    explanation = jaxsoftmax.explain_for("cuda", HOPPER.kind)(f, *arrays)
    count = 2 if option == "dropout" else 3
    assert [c.implementation for c in explanation.choices] == ["mosaic_gpu"] * count
    assert all(set(dict(c.refusals)) == {"cudnn"} for c in explanation.choices)


def test_with_a_mask_or_a_bias_before_cudnn():
    """But for the gradient of a bias of pairs, and where cuDNN alone can."""
    heads = struct((2, 100, 4, 64), "bfloat16")
    bias, mask = struct((2, 1, 1, 100), "bfloat16"), struct((2, 1, 1, 100), bool)
    pairs = struct((1, 4, 100, 100), "bfloat16")

    def choices(device, *wrt, bias=None, mask=None):
        def f(q, bias):
            of = jaxsoftmax.dot_product_attention
            return of(q, q, q, bias=bias, mask=mask).astype(jnp.float32).sum()

        run = jax.grad(f, wrt) if bias is not None else jax.grad(lambda q: f(q, None))
        arrays = [heads] if bias is None else [heads, bias]
        if mask is not None:
            mask = np.ones(mask.shape, bool)
        explanation = jaxsoftmax.explain_for("cuda", device)(run, *arrays)
        return [choice.implementation for choice in explanation.choices]

    kernels, cudnn = ["mosaic_gpu"] * 2, ["cudnn"] * 2
    assert choices(HOPPER.kind, 0) == cudnn
    assert choices(HOPPER.kind, 0, mask=mask) == kernels
    assert choices(HOPPER.kind, 0, bias=bias) == kernels
    assert choices(HOPPER.kind, 0, 1, bias=bias) == kernels
    assert choices(HOPPER.kind, 0, bias=pairs) == kernels
    assert choices(HOPPER.kind, 0, 1, bias=pairs) == cudnn
    assert choices("NVIDIA A100-SXM4-80GB", 0, mask=mask) == cudnn


# --- what is refused ------------------------------------------------------------------


def call_of(dtype="bfloat16", size=64, op="attention", **static):
    q = struct((2, 256, 4, size), dtype)
    given = {
        name: struct((2, 1, 256, 256), static.pop(name))
        for name in ("bias", "scale")
        if name in static
    }
    return AttentionCall(op, Config(0.1, **static), Inputs(q, q, q, **given))


@pytest.mark.parametrize(
    ("call", "device", "reason"),
    [
        (call_of(), Device("rocm"), "needs an NVIDIA GPU"),
        (call_of(), Device("cuda"), "is not known"),
        (call_of(), Device("cuda", "A100", (8, 0)), "9.0, the GPU has 8.0"),
        (call_of(), Device("cuda", "B200", (10, 0)), "9.0, the GPU has 10.0"),
        (call_of("float32"), HOPPER, "not float32"),
        (call_of(size=72), HOPPER, "multiples of 16, not 72"),
        (call_of(size=272), HOPPER, "up to 256"),
        (call_of(bias="float64"), HOPPER, "no bias of float64"),
        (call_of(scale="float32"), HOPPER, "no scale that is an array"),
        (
            call_of(op="attention_pushforward", dropout_rate=0.1),
            HOPPER,
            "no dropout in forward mode",
        ),
        (call_of(softcap=1e-35), HOPPER, "by the soft cap"),
        (call_of(softcap=1e5), HOPPER, "by the soft cap"),
        (call_of(softcap=1e-4, bias="float32"), HOPPER, "a soft cap of"),
    ],
)
def test_refused(call, device, reason):
    assert reason in kernels.refusal(call, device)


@pytest.mark.parametrize(
    ("bias", "refused"),
    [
        ((1, 8, 4096, 4096), False),
        ((1, 8, 8192, 8192), True),
        ((16, 8, 8192, 8192), False),
        ((1, 8, 8192, 1), False),
    ],
)
def test_memory_of_the_gradient_of_a_bias(bias, refused):
    """That of all pairs is for a bias that is as large, or up to 4 GiB.

    What is one number for all queries, or all keys, needs none of pairs.
    """
    batch, heads, length = 16 if bias[2] == 8192 else 2, *bias[1:3]
    q = struct((batch, length, heads, 64), "bfloat16")
    x = Inputs(q, q, q, bias=struct(bias, "float32"))
    config = Config(0.1, wanted=("query", "bias"))
    call = AttentionCall("attention_gradient", config, x)
    reason = kernels.refusal(call, HOPPER)
    assert (reason is not None) == refused
    assert reason is None or reason == "the gradient of the bias would take 32.0 GiB"
    unwanted = dataclasses.replace(config, wanted=("query",))
    assert kernels.refusal(dataclasses.replace(call, config=unwanted), HOPPER) is None


@pytest.mark.parametrize(
    ("version", "refused"),
    [("12.6.85", False), ("12.8.93", True), ("12.9.41", True), ("12.9.86", False)],
)
def test_assemblers_that_miscompile(version, refused, monkeypatch):
    monkeypatch.setattr(_compat.importlib.metadata, "version", lambda name: version)
    reason = _compat.ptxas_reason.__wrapped__()
    assert (reason is not None) == refused
    assert reason is None or version in reason
