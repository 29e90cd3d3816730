"""Runs the Triton kernels of attention in Triton's interpreter, against the oracle.

    cd tests; python -m support.triton_attention_interpreter DTYPE... [--every]

With `--every` all cases, one half in float32 and the other in another dtype; else a
share of them. As triton_rows_interpreter.py, whose memory watched to the byte it uses:
what is read must be of an operand, and every entry of a result be written once. For
tests/attend/test_triton.py. Prints what is wrong and exits with 1, or prints how many
cases were run.
"""

import dataclasses
import functools
import itertools
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from jaxsoftmax._attend import triton as kernels
from jaxsoftmax._attend import xla
from jaxsoftmax._attend.call import FLOATS, Config, Inputs, Result
from jaxsoftmax._compat import triton as _compat
from support import attention_kernels
from support import triton_rows_interpreter as watched
from support.attention_kernels import check_pushed, check_result, inputs, oracle_of

# Through the module that sets the environment before it imports triton.
interpreter, tl = watched.interpreter, watched.triton.language

TOLERANCE = {"float32": 5e-5, "bfloat16": 3e-2, "float16": 3e-3}


class Watch(watched.Watch):
    def own_rows(self, memory, entries):
        pass


def run(kernel, grid, shapes, constants, arrays):
    C = constants["C"]
    arrays = [np.asarray(a) for a in arrays]
    operands = [watched.Memory(a.shape, a.dtype, a) for a in arrays]
    outputs = [watched.Memory(r.shape, r.dtype) for r in shapes]
    watch = Watch(operands, outputs, C)
    builder = interpreter.interpreter_builder
    kinds = {"create_masked_load": watch.load, "create_masked_store": watch.store}
    for method, check in kinds.items():
        original = getattr(type(builder), method).__get__(builder)
        setattr(builder, method, functools.partial(check, original))
    try:
        with np.errstate(all="ignore"):
            programs = watched.Watched(kernel.rewrite(), kernel.arg_names, grid)
            programs(*operands, *outputs, **constants)
    finally:
        for method in kinds:
            delattr(builder, method)
    wanted = [True] * len(outputs)
    if "keys" in kernel.__name__:
        wanted = [C.wants_key, C.wants_value]
    for k, output in enumerate(outputs):
        times = int(wanted[k])
        assert (output.writes == times).all(), f"result {k}: {output.writes} writes"
    for memory in (*operands, *outputs):
        start = memory.begin - memory._buffer.ctypes.data
        around = np.delete(memory._buffer, slice(start, start + memory.nbytes))
        assert (around == 0xFF).all(), "wrote out of bounds"
    return [o.values.copy() for o in outputs]


def interpret(*arrays, kernel, results, grid, **options):
    """In place of `triton_call`."""
    constants = {k: v for k, v in options.items() if k in kernel.arg_names}

    def call(*arrays):
        return tuple(run(kernel, grid, results, constants, arrays))

    return jax.pure_callback(call, tuple(results), *arrays)


# --- cases ----------------------------------------------------------------------------


def planner(block_m, block_n):
    return lambda *_: kernels.Plan(block_m, block_n, 4, 1)


def planned(plans, function, *arguments):
    """What a function of `kernels` returns with other plans."""
    with mock.patch.object(kernels, "plan", plans):
        return function(*arguments)


def compare(name, got, want, dtype):
    assert got.dtype == want.dtype, name
    assert got.shape == want.shape, name
    tolerance = TOLERANCE["float32" if name == "lse" else dtype]
    got, want = (np.asarray(a, np.float64) for a in (got, want))
    np.testing.assert_array_equal(np.isneginf(got), np.isneginf(want), err_msg=name)
    finite = np.isfinite(want)
    size = np.abs(want[finite])
    error = np.abs(got[finite] - want[finite])
    bar = tolerance * np.maximum(size, max(size.mean() if size.size else 0, 0.1))
    assert (error <= bar).all(), f"{name}: {(error / bar).max()} of the tolerance"


def check_shared(config, x, got, dtype, g, gradients):
    """Against `xla`: the rounding of logits of that size is no error.

    Both add a bias and a product in float32, which the oracle does not.
    """
    want = xla.attention(config, x)
    compare("lse", got.lse, want.lse, dtype)
    if config.uses_max_logits:
        compare("max_logits", got.max_logits, want.max_logits, "float32")
    compare("out", got.out, want.out, dtype)
    finite = np.isfinite(want.lse)
    high, low = (np.asarray(a - b) for a, b in zip(got[2:4], want[2:4], strict=True))
    error = np.abs(high[finite] + low[finite])
    assert (error <= TOLERANCE["float32"]).all(), f"lse and low: {error.max()}"
    right = xla.attention_gradient(config, x, got, g)
    for name in right:
        compare(f"gradient of {name}", gradients[name], right[name], dtype)


def check_tangents(rng, config, x, result, dtype, options, plans):
    """Of those that move; large numbers that all keys share, or all values, too."""
    given = [n for n in FLOATS if getattr(x, n) is not None]
    moving = tuple(options.get("moving", given))

    def tangent(name):
        shape = getattr(x, name).shape
        return jnp.array(options.get("offset_dot", 0) + rng.standard_normal(shape))

    config = dataclasses.replace(config, wanted=moving)
    dtypes = {name: getattr(x, name).dtype for name in moving}
    tangents = {name: tangent(name).astype(dtypes[name]) for name in moving}
    absent = Inputs(*[None] * len(Inputs._fields))
    push = kernels.attention_pushforward
    dots = absent._replace(**tangents)
    found = planned(plans, push, config, x, result, dots)
    if "shared" in options:
        want = xla.attention_pushforward(config, x, result, dots)
        compare("tangent of lse", found.lse, want.lse, dtype)
        compare("tangent of out", found.out, want.out, dtype)
        return
    check_pushed(oracle_of(config, x), dtype, found, tangents)


def check(shape, dtype, options, plans, seed, *, tangents):
    rng = np.random.default_rng(seed)
    x = inputs(rng, shape, dtype, options)
    names = ("causal", "window", "softcap", "offset")
    static = {k: options[k] for k in names if k in options}
    wanted = [n for n in FLOATS if n != "bias" and getattr(x, n) is not None]
    wanted = tuple(options.get("wanted", wanted))
    config = Config(
        scale=options.get("scale", shape[5] ** -0.5),
        wanted=wanted,
        uses_lse=options.get("uses_lse", True),
        uses_max_logits=seed % 2 == 0,
        **static,
    )
    got = planned(plans, kernels.attention, config, x)
    g = Result(
        jnp.array(rng.standard_normal(got.out.shape), dtype),
        None if got.low is None else jnp.zeros_like(got.low),
        jnp.array(rng.standard_normal(got.lse.shape), "float32"),
        jnp.zeros_like(got.lse_low),
    )
    gradients = {}
    if wanted:
        gradients = planned(plans, kernels.attention_gradient, config, x, got, g)
    assert set(gradients) == set(wanted)
    against = check_shared if "shared" in options else check_result
    against(config, x, got, dtype, g, gradients)
    if tangents or "moving" in options:
        check_tangents(rng, config, x, got, dtype, options, plans)


SHAPES = [  # B, T, S, N, K, H, Hv
    (2, 17, 64, 2, 2, 16, 16),
    (1, 64, 64, 2, 1, 64, 64),
    (3, 17, 17, 4, 2, 8, 8),
    (1, 130, 64, 2, 2, 8, 24),
    (2, 1, 64, 2, 1, 72, 72),
    (2, 64, 130, 2, 2, 16, 8),
    (2, 64, 1, 2, 2, 8, 8),
    (1, 130, 130, 1, 1, 16, 16),
]
QUICK_SHAPES = [
    (1, 33, 17, 2, 1, 8, 8),
    (2, 17, 40, 1, 1, 16, 24),
    (1, 20, 17, 2, 2, 24, 8),
    (2, 1, 33, 1, 1, 8, 8),
]
EVERY = (1, 1, 1, 1)
LOWEST = float(jnp.finfo("float32").min)
EVERYTHING = attention_kernels.EVERYTHING | {
    "bias": (1, 1, 0, 1),
    "mask": (0, 1, 1, 1),
}
OPTIONS = [
    {},
    {"causal": True},
    {"softcap": 1.5},
    {"sinks": True},
    {"segments": True},
    {"key_lengths": True},
    {"query_lengths": True, "key_lengths": True, "sinks": True},
    {"window": (5, 0)},
    {"window": (20, 3)},
    {"window": (0, 40), "causal": True},
    {"window": (1000, 2), "query_lengths": True},
    {"causal": True, "offset": 23},
    {"causal": True, "offset": -9, "key_lengths": True},
    {"window": (5, 0), "offset": 40, "query_lengths": True},
    {"window": (3, 9), "offset": -50},
    {"causal": True, "offsets": [11]},
    {"causal": True, "window": (20, 0), "offsets": [30, -8, 200]},
    {"window": (4, 60), "offsets": [-17, 5, 9], "query_lengths": True},
    {"bias": EVERY},
    {"bias": (0, 1, 0, 1), "softcap": 2.0, "bias_dtype": "float32"},
    {"bias": EVERY, "bias_dtype": "float32", "shared": -1e9, "sinks": True},
    {"bias": (1, 1, 1, 0), "bias_dtype": "float32", "shared": LOWEST, "causal": True},
    {"mask": EVERY, "sinks": True},
    {"mask": (1, 0, 1, 1), "causal": True},
    {"causal": True, "softcap": 1.0, "sinks": True, "segments": True},
    EVERYTHING,
    {"causal": True, "wanted": ("value",)},
    {"softcap": 1.0, "wanted": ("key",)},
    {"wanted": ("query",), "scale": 2.0},
    {"wanted": (), "uses_lse": False, "key_lengths": True},
    {"wanted": (), "moving": ("value",), "causal": True},
    {"wanted": (), "moving": ("query",), "query_lengths": True},
    {"wanted": (), "moving": ("sinks", "value"), "sinks": True, "key_lengths": True},
    {"wanted": (), "moving": ("key", "sinks"), "sinks": True, "offset_dot": 1000},
    {"wanted": (), "moving": ("bias",), "bias": (1, 0, 1, 1), "offset_dot": 300},
    {"wanted": (), "moving": ("query",), "causal": True, "value_offset": 100},
    {"wanted": (), "moving": ("key", "value"), "mask": EVERY, "offset_dot": -100},
]
PLANS = [(16, 16), (16, 64), (64, 16), (128, 128)]


def check_mapped(dtype):
    """A mapped axis, of some of the arrays, twice."""
    rng = np.random.default_rng(0)
    given = {"bias": (1, 1, 0, 1), "mask": (0, 1, 1, 1), "causal": True}
    options = {**given, "sinks": True, "key_lengths": True, "segments": True}
    x = inputs(rng, (1, 17, 20, 2, 1, 8, 8), dtype, options)
    config = Config(0.5, causal=True, wanted=("query", "key", "value", "sinks"))
    dots = Inputs(*[None] * len(Inputs._fields))._replace(
        **{name: jnp.tanh(getattr(x, name)) for name in config.wanted}
    )

    def several(a, axis, n):
        scales = jnp.arange(1, n + 1).astype(a.dtype)
        return jnp.stack([a * s for s in scales], axis)

    def f(query, sinks, value, bias, key_lengths):
        inner = x._replace(
            query=query, sinks=sinks, value=value, bias=bias, key_lengths=key_lengths
        )
        plans = planner(16, 16)
        result = planned(plans, kernels.attention, config, inner)
        low = None if result.low is None else 0 * result.low
        g = Result(result.out, low, result.lse * 0 + 1, result.lse * 0)
        gradient = kernels.attention_gradient
        gradients = planned(plans, gradient, config, inner, result, g)
        push = kernels.attention_pushforward
        pushed = planned(plans, push, config, inner, result, dots)
        return inner, result, g, gradients, pushed

    inner = jax.vmap(f, in_axes=(1, 0, None, None, None))
    outer = jax.vmap(inner, in_axes=(None, None, 0, 0, 0))
    each = outer(
        several(x.query, 1, 2),
        several(x.sinks, 0, 2),
        several(x.value, 0, 2),
        several(x.bias, 0, 2),
        jnp.stack([x.key_lengths, x.key_lengths // 2]),
    )
    for place in np.ndindex(2, 2):
        one = jax.tree.map(lambda a, place=place: a[place], each)
        inner, result, g, gradients, pushed = one
        check_result(config, inner, result, dtype, g, gradients)
        tangents = {name: getattr(dots, name) for name in config.wanted}
        check_pushed(oracle_of(config, inner), dtype, pushed, tangents)


def patch_tensor(original):
    """Where numpy no longer takes an array of one entry for a number."""

    def patch(tensor, *scope):
        original(tensor, *scope)
        tensor.__index__ = lambda self: self.handle.data.item()

    return patch


def patch_dot(original):
    """Which takes the bits of bfloat16 for numbers."""

    def wide(handle):
        if handle.dtype != tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def dot(self, a, b, *rest):
        return original(self, wide(a), wide(b), *rest)

    return dot


def patch_cast(original):
    """Which cuts float32 off to bfloat16, where a GPU rounds."""

    def cast(self, source, dtype):
        kinds = (source.dtype.scalar, dtype.scalar)
        if kinds != (tl.float32, tl.bfloat16):
            return original(self, source, dtype)
        bits = source.data.astype(jnp.bfloat16).view(np.uint16)
        return interpreter.TensorHandle(bits, dtype.scalar)

    return cast


def cases(dtype, every):
    """Shape, options, plan and seed of each.

    Without `every` a third of the options, another one for each dtype, in few programs,
    and tangents of half of them: a program takes about 0.05 s. With it every other one,
    float32 those that other dtypes do not have; each dtype has all shapes and all
    plans.
    """
    if not every:
        shapes = itertools.cycle(QUICK_SHAPES)
        found = [(next(shapes), o, (16, 16), k) for k, o in enumerate(OPTIONS)]
        return found[list(TOLERANCE).index(dtype) :: len(TOLERANCE)]
    shapes, plans = itertools.cycle(SHAPES), itertools.cycle(PLANS)
    found = [(next(shapes), o, next(plans)) for o in OPTIONS]
    found += [(shape, EVERYTHING, (16, 32)) for shape in SHAPES]
    found += [(shape, {"causal": True}, (32, 16)) for shape in SHAPES]
    first = list(TOLERANCE).index(dtype) > 0
    return [
        (*case, k)
        for k, case in enumerate(found)
        if (k + k // len(SHAPES)) % 2 == first
    ]


def main():
    every = "--every" in sys.argv
    dtypes = [name for name in sys.argv[1:] if name != "--every"]
    _compat.triton_call = interpret
    interpreter._patch_lang_tensor = patch_tensor(interpreter._patch_lang_tensor)
    builder = interpreter.InterpreterBuilder
    builder.cast_impl = patch_cast(builder.cast_impl)
    builder.create_dot = patch_dot(builder.create_dot)
    watched.be_quick()

    def run():
        count = 0
        for dtype in dtypes:
            for shape, options, plan, seed in cases(dtype, every):
                try:
                    plans, tangents = planner(*plan), every or seed % 2 > 0
                    check(shape, dtype, options, plans, seed, tangents=tangents)
                except Exception as error:
                    raise AssertionError(f"{shape} {dtype} {options} {plan}") from error
                count += 1
        if every or "float32" in dtypes:  # the programs are those of one more dimension
            check_mapped(dtypes[0])
            count += 1
        return count

    return watched.report(run)


if __name__ == "__main__":
    sys.exit(main())
