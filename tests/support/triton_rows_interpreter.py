"""Runs the Triton kernels in Triton's interpreter, and watches what memory they touch.

    cd tests; python -m support.triton_rows_interpreter [--step=N] OP/DTYPE...

Every N-th case of each, from the op's own place on: with 1 all of them. A process of
its own: whether triton compiles or interprets is decided when it is imported. For
tests/rows/test_triton.py, which says what is checked. Prints what is wrong and exits
with 1, or prints how many cases were run.

Memory is watched to the byte. Every array lies in a buffer of 0xFF (NaN), at a multiple
of 16 bytes. An entry that a program reads or writes must be of an array that it is
given, and of arrays of the logits' shape be one of the program's own rows; whatever is
written must be written once.
"""

import argparse
import dataclasses
import functools
import itertools
import os
import sys
import traceback
import types

os.environ["TRITON_INTERPRET"] = "1"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
import triton
from triton.runtime import interpreter

from jaxsoftmax._compat import triton as _compat
from jaxsoftmax._rows import row_loss, triton_source, xla, xla_loss
from jaxsoftmax._rows import triton as kernels
from jaxsoftmax._rows.call import RowCall
from jaxsoftmax._rows.row_loss import IGNORED, INVALID, Options

MARGIN = 64
ROWS = 11  # of an odd length these start at every residue
TOLERANCE = {"float32": 2e-5, "bfloat16": 1e-2, "float16": 2e-3}


class Memory:
    """An array between margins of 0xFF, as a pointer to it."""

    def __init__(self, shape, dtype, values=None):
        self.shape, self.dtype = shape, np.dtype(dtype)
        self.nbytes = int(np.prod(shape)) * self.dtype.itemsize
        self._buffer = np.full(self.nbytes + 2 * MARGIN + 16, 0xFF, np.uint8)
        start = MARGIN + (-self._buffer.ctypes.data - MARGIN) % 16
        self.begin = self._buffer.ctypes.data + start
        self.values = (
            self._buffer[start : start + self.nbytes].view(self.dtype).reshape(shape)
        )
        self.writes = np.zeros(self.values.size, np.int64)
        if values is not None:
            self.values[...] = values

    def data_ptr(self):
        return self.begin


class Watched(interpreter.GridExecutor):
    """Runs the programs of a grid on `Memory`."""

    def _init_args_hst(self, args_dev, kwargs):
        return args_dev, kwargs

    def _restore_args_dev(self, *_):
        pass


class Watch:
    """Checks every access of the programs of one call."""

    def __init__(self, operands, results, C):
        self.operands, self.results, self.C = operands, results, C
        self.vectors = 0

    def entries(self, memories, pointers, mask):
        """The memory that pointers are into, and which entries of it are touched."""
        at = np.broadcast_to(pointers, np.broadcast_shapes(pointers.shape, mask.shape))
        at = at[np.broadcast_to(mask, at.shape)].astype(np.int64)
        if not at.size:
            return None, at
        for memory in memories:
            inside = (at >= memory.begin) & (at < memory.begin + memory.nbytes)
            if inside.all():
                entries = (at - memory.begin) // memory.dtype.itemsize
                self.own_rows(memory, entries)
                return memory, entries
        raise AssertionError("out of bounds")

    def own_rows(self, memory, entries):
        if memory.shape != self.operands[0].shape or self.C.axis != 1:
            return
        rows = np.unique(entries // self.C.n) // self.C.rows
        program = interpreter.interpreter_builder.grid_idx[0]
        assert (rows == program).all(), f"program {program} is in the rows of {rows}"

    def load(self, original, pointers, mask, *rest):
        self.entries(self.operands, pointers.data, mask.data)
        return original(pointers, mask, *rest)

    def store(self, original, pointers, value, mask, *rest):
        memory, entries = self.entries(self.results, pointers.data, mask.data)
        if memory is not None:
            np.add.at(memory.writes, entries, 1)
        return original(pointers, value, mask, *rest)


def be_quick():
    """Without what takes the interpreter most of its time and changes no result.

    It patches the language in each call, not once a function; computes whether integers
    overflow, which only a debug build looks at; and makes a table of all dtypes to look
    one up.
    """
    patched, dtypes = set(), {}
    patch_lang, numpy_dtype = interpreter._patch_lang, interpreter._get_np_dtype

    def patch_once(f):
        if f not in patched:
            patched.add(f)
            patch_lang(f)
        return types.SimpleNamespace(restore=lambda: None)

    def known_dtype(kind):
        name = kind.scalar.name
        if name not in dtypes:
            dtypes[name] = numpy_dtype(kind)
        return dtypes[name]

    interpreter._patch_lang = patch_once
    interpreter._get_np_dtype = known_dtype
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def on_tensor(f):
    """What has no body until it is compiled."""

    def call(x):
        handle = interpreter.TensorHandle(f(x.handle.data), x.handle.dtype)
        return triton.language.tensor(handle, x.type)

    return call


PARTS = set()  # what the tiles of the calls so far were of, and how many there were


def interpret(*arrays, kernel, results, grid, in_place, C, **launch):
    """In place of `_compat.triton_call`."""
    assert not in_place  # nothing here asks for it
    del launch  # how it is compiled
    PARTS.add((C.part, C.tiles > 1))
    operands = [Memory(a.shape, a.dtype, np.asarray(a)) for a in arrays]
    shapes, tree = jax.tree.flatten(results)
    outputs = [Memory(r.shape, r.dtype) for r in shapes]
    watch = Watch(operands, outputs, C)
    builder = interpreter.interpreter_builder
    kinds = {"create_masked_load": watch.load, "create_masked_store": watch.store}
    for method, check in kinds.items():
        original = getattr(type(builder), method).__get__(builder)
        setattr(builder, method, functools.partial(check, original))
    try:
        with np.errstate(all="ignore"):
            Watched(kernel.rewrite(), kernel.arg_names, grid)(*operands, *outputs, C=C)
    finally:
        for method in kinds:
            delattr(builder, method)
    for k, output in enumerate(outputs):
        assert (output.writes == 1).all(), f"result {k}: written {output.writes} times"
    for memory in (*operands, *outputs):
        start = memory.begin - memory._buffer.ctypes.data
        around = np.delete(memory._buffer, slice(start, start + memory.nbytes))
        assert (around == 0xFF).all(), "wrote out of bounds"
    return jax.tree.unflatten(tree, [jnp.array(o.values) for o in outputs])


# --- cases ----------------------------------------------------------------------------


def logits(shape, dtype, rng):
    """Rows of all kinds, those of NaN and infinities next to ordinary ones."""
    n = shape[-1]
    x = 3 * rng.standard_normal(shape, np.float32).reshape(-1, n)
    x[1::8] = np.nan
    x[2::8, rng.integers(n)] = 40  # dominant
    x[3::8, 0] = np.inf
    x[4::8, -1] = 30  # dominant, at an edge
    x[5::8] = -np.inf
    x[6::8, : n // 2] = -np.inf
    x[7::8, -1] = np.nan
    if dtype != "float16":
        # Two that are further apart than a float can say.
        x[0, n // 2 :] = -3e38
        x[0, 0] = 3e38
    return jnp.array(x.reshape(shape), dtype)


def masks(shape, rng):
    """None, and masks of every way to broadcast; one row has no entry."""
    full = rng.random(shape) < 0.7
    full.reshape(-1, shape[-1])[8] = False
    each = [full[..., :1], full[:1], full] if len(shape) == 2 else [full[:1], full]
    return [None, *map(jnp.array, each)]


def per_row(x):
    return (*x.shape[:-1], 1)


def labels(x, rng):
    shape = per_row(x)
    found = rng.integers(0, x.shape[-1], shape).astype(np.int32)
    flat = found.reshape(-1)
    flat[[0, 2, 4]] = 0, x.shape[-1] - 1, x.shape[-1] - 1
    flat[[8, 9, 10]] = IGNORED, INVALID, IGNORED
    return jnp.array(found)


def arguments(op, x, where, rng, scale):
    """Positional arguments of the function `op`, each a list of alternatives."""
    t = jnp.array(rng.standard_normal(x.shape, np.float32), x.dtype)
    if op.startswith("softmax_derivative"):
        p = xla.softmax(x, where, RowCall("softmax", (-1,), 1.0, x.dtype))
        wide = jnp.array(t, np.float32)
        yield from ((p, t), (p, jnp.where(p == 0, jnp.inf, wide)))
    elif op in ("softmax", "log_softmax", "log_sum_exp_state"):
        yield x, where
    elif op.startswith("log_softmax"):
        state = xla.log_sum_exp_state(x, where, RowCall(op, (-1,), scale, x.dtype))
        state = state if "pullback" in op else state[:1]
        yield x, where, *state, t
        yield x, where, *state, jnp.array(t, np.float32)
    elif op == "cross_entropy":
        yield x, where, labels(x, rng)
        dense = jnp.abs(t) * (t > 0)
        yield x, where, dense
        yield x, where, jnp.array(dense, np.float32)
    else:
        weights = rng.standard_normal((2, *per_row(x)), np.float32)
        weights.reshape(2, -1)[:, [1, 9]] = 0
        yield x, where, labels(x, rng), *map(jnp.array, weights)


def options(op):
    if not op.startswith("cross_entropy"):
        return [{}]
    every = Options(
        softcap=5.0,
        uniform_nll=True,
        entropy=op == "cross_entropy",
        label_smoothing=0.1,
        z_loss=1e-3,
    )
    return [{"options": Options()}, {"options": every}]


def results(op, dtype):
    """Dtypes of results: the logits' and, where it may differ, another."""
    fixed = op == "cross_entropy" or op.endswith("_state")
    others = [] if fixed else ["float32" if dtype != "float32" else "bfloat16"]
    return [dtype, *others]


def numbers(op, result, given, static):
    """What a result comes to, without what may be anything in a row of NaN."""
    if op.startswith("cross_entropy"):
        state, options = jax.tree.leaves(result), static["options"]
        dx = state.pop(0) if op == "cross_entropy_with_gradient" else None
        state = row_loss.state(state, options, dense=row_loss.is_dense(given[2]))
        found = row_loss.statistics(state, given[2], options)
        unit = row_loss.unit(static["scale"], options)
        lse = row_loss.log_sum_exp(state, unit)
        return dx, found.nll, found.uniform_nll, found.entropy, lse
    if op == "log_softmax_pullback_state":  # the maximum's part and the rest
        result = (jnp.where(jnp.isnan(given[3]), jnp.nan, sum(result)),)
    elif op in ("softmax_derivative_state", "log_softmax_pushforward_state"):
        result = result[0], result[1] + result[2] / jnp.maximum(result[0], 1e-30)
    if op == "log_softmax" or op.endswith("_state"):
        last = result[0] if op == "log_softmax" else sum(result)
        bad = jnp.any(jnp.isnan(last), -1, keepdims=True)
        return tuple(jnp.where(bad, jnp.nan, a) for a in result)
    return result


def compare(got, want, dtype):
    """NaN and infinities where they should be, and values close."""
    for mine, right in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        tolerance = TOLERANCE[dtype if mine.dtype != np.float32 else "float32"]
        mine, right = (np.asarray(a, np.float64) for a in (mine, right))
        size = np.abs(right, where=np.isfinite(right), out=np.zeros(right.shape))
        bar = tolerance * np.maximum(size.max(-1, initial=1e-3, keepdims=True), size)
        np.testing.assert_array_equal(np.isnan(mine), np.isnan(right))
        np.testing.assert_array_equal(np.isposinf(mine), np.isposinf(right))
        np.testing.assert_array_equal(np.isneginf(mine), np.isneginf(right))
        finite = np.isfinite(right)
        wrong = np.abs(mine - right, where=finite, out=np.zeros(right.shape)) > bar
        assert not wrong.any(), f"{wrong.sum()} wrong: {mine[wrong]}, {right[wrong]}"


def forms(n):
    """One tile, several, and one that holds the vectors but not the row."""
    whole = 1 << (n - 1).bit_length()
    yield from (
        kernels.Form(1, whole, 1),
        kernels.Form(1, max(8, whole // 8), 2, stages=3),
    )
    if n - 1 == whole // 2:
        yield kernels.Form(1, whole // 2, 1)
    if n > 100:
        yield kernels.Form(1, whole, 1, edges=False)
        yield kernels.Form(1, whole // 4, 1, edges=False)


# No factor in common with what cases are products of: together, the ops go through all
# shapes, masks, dtypes and forms.
STEP = 31
SHAPES = [(ROWS, 17), (3, 4, 30), (ROWS, 33), (ROWS, 100), (ROWS, 261)]


def cases(op, dtype):
    """Arguments, static ones, the result's dtype, a form, and words for them."""
    for seed, shape in enumerate(SHAPES):
        rng = np.random.default_rng(seed)
        x = logits(shape, dtype, rng)
        none = op.startswith("softmax_derivative")
        for k, where in enumerate([None] if none else masks(shape, rng)):
            every = itertools.chain.from_iterable(
                itertools.product(
                    arguments(op, x, where, rng, scale),
                    results(op, dtype),
                    options(op),
                    (scale,),
                )
                for scale in (1.0, 0.7)
            )
            some = itertools.islice(every, (seed + k) % 4, None, 4)
            for given, out, extra, scale in some:
                static = {"axis": (-1,), "scale": scale, "dtype": jnp.dtype(out)}
                static |= extra
                mask = None if where is None else where.shape
                dtypes = [None if a is None else str(a.dtype) for a in given]
                for form in forms(shape[-1]):
                    words = f"{op} {shape} {dtypes} to {out}, mask {mask}, {extra}"
                    yield given, static, out, form, words


def check(op, dtype, step, first):
    """Every `step`-th case from `first` on; how many they were."""
    count = 0
    some = itertools.islice(cases(op, dtype), first % step, None, step)
    for given, static, out, form, words in some:
        try:
            call = RowCall(op, **static, arrays=given)
            want = numbers(op, xla_loss.run(call, given), given, static)
            compare(
                numbers(op, kernels.run(call, given, form), given, static), want, out
            )
        except Exception as error:
            raise AssertionError(f"{words}, {form}") from error
        count += 1
    return count


def check_precision():
    """Of float32, entry by entry: also what is small next to the row's largest."""
    scale = 0.7
    # Of differences that are exact.
    x = np.linspace(-(10**5), 10**4, ROWS * 33).round().astype(np.float32) / 1024
    x = x.reshape(33, ROWS).T
    z = scale * x.astype(np.float64)
    e = np.exp(z - z.max(-1, keepdims=True))
    assert_precise("softmax", scale, x, e / e.sum(-1, keepdims=True))


def check_dominant_entries():
    """Likewise the pullback at an entry of which the probability is near 1."""
    x = 1024 * np.random.default_rng(0).standard_normal((ROWS, 33))
    x = x.round().astype(np.float32) / 1024
    x[:, 7] = 17
    top = np.arange(33) == 7
    e = np.exp(x.astype(np.float64) - 17)
    others = np.where(top, 0, e)
    rest = others.sum(-1, keepdims=True)
    want = np.where(top, rest, -others) / (1 + rest)
    one_hot = np.broadcast_to(top, x.shape).astype(np.float32)
    state = x[:, 7:8], rest.astype(np.float32)
    assert_precise("log_softmax_pullback", 1.0, x, want, *state, one_hot)


def check_rows_side_by_side():
    """Along an axis that is not the last: a program has neighbouring rows."""
    rng = np.random.default_rng(0)
    x = jnp.array(rng.standard_normal((3, 30, 5)), np.float32)
    for op, where in (("softmax", None), ("log_softmax", rng.random((30, 5)) < 0.7)):
        arrays = (x, None if where is None else jnp.array(where)[None])
        call = RowCall(op, (-2,), 0.7, np.dtype("float32"), arrays=arrays)
        compare(kernels.run(call, arrays), xla_loss.run(call, arrays), "float32")


def assert_precise(op, scale, x, want, *others):
    arrays = (x, None, *others)
    call = RowCall(op, (-1,), scale, np.dtype("float32"), arrays=arrays)
    got = kernels.run(call, (jnp.array(x), None, *map(jnp.array, others)))
    error = (np.abs(np.asarray(got, np.float64) - want) / np.abs(want)).max()
    eps = np.finfo("float32").eps
    assert error <= 4 * eps, f"{op}: an entry is off by {error / eps:.1f} eps"


def report(run):
    """Prints how many cases were run, or what is wrong; the exit status."""
    try:
        count = run()
    except Exception:
        traceback.print_exc()
        return 1
    print(count, "cases")
    return 0


def main():
    _compat.triton_call = interpret
    triton_source.libdevice = types.SimpleNamespace(
        **{f.__name__: on_tensor(f) for f in (np.log1p, np.expm1, np.tanh)}
    )
    be_quick()
    parser = argparse.ArgumentParser()
    parser.add_argument("--step", type=int, default=STEP)
    parser.add_argument("names", nargs="+")
    given = parser.parse_args()
    names = given.names

    def run():
        count = sum(
            check(*name.split("/"), given.step, k) for k, name in enumerate(names)
        )
        if "softmax/float32" in names:
            check_precision()
            check_dominant_entries()
            check_rows_side_by_side()
        tiles = itertools.product(("all", "vectors"), (False, True))
        assert set(tiles) <= PARTS, f"only {PARTS} were run"
        return count

    return report(run)


if __name__ == "__main__":
    sys.exit(main())
