"""The Mosaic GPU kernels on a machine that has no GPU.

Interpreted: JAX runs a kernel's blocks and warpgroups as threads, with numbers as on
the CPU, and looks for races between them. It cannot interpret a reference into another
block of a cluster: plans of several blocks are only lowered, here, and run by
``make check-gpu-rows``. Nor does it know of warps: what the four of a warpgroup
exchange is not looked at.

Lowered for CUDA: the plans of the table, as far as JAX's own lowering goes.

The bars are those of test_softmax.py.
"""

import dataclasses
import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import oracle
from support.compilation import exact_jit

import jaxsoftmax
from jaxsoftmax._compat import mosaic_gpu as _compat
from jaxsoftmax._compat.mosaic_gpu_cluster import ClusterVectors
from jaxsoftmax._core import dispatch
from jaxsoftmax._core.device import Device
from jaxsoftmax._core.partitioning import Across
from jaxsoftmax._rows import (
    mosaic_gpu,
    mosaic_gpu_ops,
    mosaic_gpu_plans,
    mosaic_gpu_problem,
    mosaic_gpu_strip_plans,
    mosaic_gpu_strips,
    row_loss,
    sharded,
    xla,
    xla_loss,
)
from jaxsoftmax._rows.call import FUNCTION_OF_STATE, ROWS, RowCall
from jaxsoftmax._rows.mosaic_gpu_plans import Plan
from jaxsoftmax._rows.row_loss import IGNORED, INVALID, Options

pytestmark = pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="for machines without a GPU"
)
usable = pytest.mark.skipif(
    _compat.mosaic_gpu_reason() is not None, reason=str(_compat.mosaic_gpu_reason())
)


stripped = pytest.mark.skipif(
    _compat.mosaic_strips_reason() is not None,
    reason=str(_compat.mosaic_strips_reason()),
)


def interpreted(test):
    """On the newest jax: the oldest has no interpreter."""
    no_interpreter = pytest.mark.skipif(
        jax.__version_info__ < (0, 11), reason="before 0.11 jax has no GPU interpreter"
    )
    return pytest.mark.versions(no_interpreter(test))


H100 = Device("cuda", "NVIDIA H100 80GB HBM3", (9, 0))
# Of the largest entry of the cotangent: below, a mean that was rounded to float64 shows
# in float32's digits.
LEAST_FROM_STATE = 1e-9
GRADIENT_BAR = {"float32": 1e-6, "bfloat16": 8e-3, "float16": 1e-3}
READS_ONE = ["softmax", "log_softmax"]  # array; the others read two
# And how many numbers per row.
READS_TWO = {
    "softmax_derivative": 0,
    "log_softmax_pushforward": 1,
    "log_softmax_pullback": 2,
}
OPS = READS_ONE + list(READS_TWO)
WITH_GRADIENT = "cross_entropy_with_gradient"
MASKABLE = [op for op in OPS if op != "softmax_derivative"]
# The same from the kernel of the state, as for rows that devices share: here one device
# has all shares.
FROM_STATES = ["from state: " + op for op in OPS]
# Rows side by side: the same arrays, turned.
IN_STRIPS = ["in strips: " + op for op in OPS]
HIDDEN = {"log_softmax": -np.inf}  # what a masked entry becomes, if not 0
# Of the logits and of the probabilities.
DTYPES = [
    ("float32", "float32"),
    ("bfloat16", "bfloat16"),
    ("float16", "float16"),
    ("float32", "bfloat16"),
]
struct = jax.ShapeDtypeStruct


# --- what goes in and what should come out --------------------------------------------


def function_of(op):
    return op.rpartition(": ")[2]


def result_dtype(op, dtype, out):
    """A cotangent of the logits has their dtype."""
    backward = op in ("softmax_derivative", "log_softmax_pullback", WITH_GRADIENT)
    return np.dtype(dtype if backward else out)


def arguments(op, x, where, t, scale, out):
    """The arrays of a call; `t` is a tangent or a cotangent."""
    if op == "softmax_derivative":
        p = oracle.softmax(x, -1, where, scale)
        p = p if where is None else np.where(where, p, 0)
        return jnp.array(p.astype(np.float64), out), t
    if op in READS_ONE:
        return x, where
    call = RowCall("log_sum_exp_state", (-1,), scale, np.dtype(np.float32))
    state = xla.log_sum_exp_state(x, where, call)
    return x, where, *state[: READS_TWO[op]], t


def wanted(op, arrays, scale):
    """From the arrays that the kernel gets, in long double."""
    if op == "softmax_derivative":
        return oracle.softmax_derivative(*arrays, scale)
    x, where, *_, t = (*arrays, None) if op in READS_ONE else arrays
    if op in READS_ONE:
        y = getattr(oracle, op)(x, -1, where, scale)
        return y if where is None else np.where(where, y, HIDDEN.get(op, 0.0))
    if op == "log_softmax_pullback":
        return oracle.log_softmax_vjp(x, t, -1, where, scale)
    valid = ~np.isneginf(oracle._logits(x, where, scale))
    p = np.where(valid, oracle.softmax(x, -1, where, scale), 0)
    t = np.where(valid, oracle._wide(t), 0)
    return np.where(valid, np.longdouble(scale) * oracle.less_mean(p, t), 0)


def check(op, got, want, dtype, bar=None, least=0.0):
    """NaN, 0 and -inf where they should be and nowhere else, the rest within bars.

    `dtype` is the coarsest that took part.
    """
    got = oracle._wide(got)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    exact = (want == 0) | np.isneginf(want)
    np.testing.assert_array_equal(got[exact], want[exact])
    ordinary = np.isfinite(want) & ~exact
    if op in READS_ONE:
        limit = 8 if dtype == "float32" else 1
        flushed = want.shape[-1]
        assert oracle.ulps(got[ordinary], want[ordinary], dtype, flushed) <= limit
        small = ordinary & (np.abs(want) < float(jnp.finfo(dtype).tiny))
        assert (np.abs(got - want)[small] <= float(jnp.finfo(dtype).tiny)).all()
    else:
        bar = bar or GRADIENT_BAR[dtype]
        assert oracle.row_error(got, want, dtype, least=least) <= bar


def run(op, arrays, scale, dtype, plan):
    structs = tuple(None if a is None else struct(a.shape, a.dtype) for a in arrays)
    call = RowCall(op, (-1,), scale, np.dtype(dtype), arrays=structs)
    return mosaic_gpu.run(call, arrays, plan)


def turned(a):
    return None if a is None else jnp.swapaxes(a, -2, -1)


def run_in_strips(op, arrays, scale, dtype, plan):
    arrays = [turned(a) for a in arrays]
    structs = tuple(None if a is None else struct(a.shape, a.dtype) for a in arrays)
    call = RowCall(op, (-2,), scale, np.dtype(dtype), arrays=structs)
    return jax.tree.map(turned, mosaic_gpu.run(call, arrays, plan))


class Alone(Across):
    """No device has another share."""

    def sum(self, x):
        return x

    max = sum


def run_from_state(op, arrays, scale, dtype, plan):
    return sharded.run(
        RowCall(op, (-1,), scale, np.dtype(dtype)),
        arrays,
        state=lambda name, *arrays: run(name, arrays, scale, dtype, plan),
        across=Alone("devices"),
        inside=None,
    )


@pytest.fixture
def interpret(capsys, nans_allowed):
    """Runs a kernel in the interpreter, which must find no race; gives the result.

    The result of log_softmax; its second, the row maximum, is compared here, exactly.
    """

    def interpret(op, arrays, *, scale=1.0, dtype, plan=None, races=True, times=1):
        from jax.experimental.pallas import mosaic_gpu as plgpu

        runs = run_from_state if op in FROM_STATES else run
        runs = run_in_strips if op in IN_STRIPS else runs
        op = function_of(op)
        given = [a for a in arrays if a is not None]

        def call(*given):
            rest = iter(given)
            full = [None if a is None else next(rest) for a in arrays]
            return runs(op, full, scale, dtype, plan)

        parameters = plgpu.InterpretGPUParams(detect_races=races)
        with plgpu.force_gpu_interpret_mode(parameters):
            compiled = jax.jit(call).lower(*given).compile()
            results = [jax.tree.leaves(compiled(*given)) for _ in range(times)]
            results = [[np.asarray(a) for a in each] for each in results]
        # 0.11 prints what it finds, later versions raise.
        assert "RACE" not in capsys.readouterr().out
        for other in results[1:]:
            for a, b in zip(results[0], other, strict=True):
                np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8))
        if op == "log_softmax":
            x, where = arrays
            shown = x if where is None else jnp.where(where, x, -jnp.inf)
            row_max = np.asarray(shown, np.float32).max(-1, keepdims=True)
            np.testing.assert_array_equal(results[0][1], row_max)
            assert results[0][1].dtype == np.float32
        assert results[0][0].dtype == dtype
        return results[0][0]

    with np.errstate(all="ignore"):
        yield interpret


def coarsest(*dtypes):
    return max(dtypes, key=lambda dtype: float(jnp.finfo(dtype).eps))


def plan_of(place, warpgroups, dtype):
    """A plan with two tiles (or chunks), or seven; and the shape that it divides."""
    vector = 16 // np.dtype(dtype).itemsize
    if place == "rows":
        return Plan("rows", 8, vector, tiles=2), (32, 16 * vector)
    if place == "kept":
        plan = Plan("shared", 32, vector, 1, warpgroups, 7, kept=2)
        return plan, (8, 28 * warpgroups * plan.width)
    if place == "chunks":
        plan = Plan("shared", 32, vector, 1, warpgroups, 2, kept=1)
        return plan, (8, 16 * warpgroups * plan.width)
    plan = Plan(place, 32, vector, 1, warpgroups, 1 if place == "stream" else 2)
    return plan, (8, 8 * warpgroups * plan.width)


# --- interpreted ----------------------------------------------------------------------

# Elsewhere than in "rows", float32 with two warpgroups, one of the others with one.
ONE_WARPGROUP = {
    "registers": DTYPES[1],
    "shared": DTYPES[3],
    "stream": DTYPES[2],
    "kept": DTYPES[1],
}
CASES = [
    *(("rows", 1, *dtypes) for dtypes in DTYPES),
    *((place, 1, *dtypes) for place, dtypes in ONE_WARPGROUP.items()),
    *((place, 2, *DTYPES[0]) for place in ("registers", "shared", "stream", "chunks")),
]


def every_plan(cases):
    """Each op with each case that there is of it: "stream" of states alone."""
    return [
        (how, *case)
        for how in OPS + FROM_STATES
        for case in cases
        if case[0] == "rows" or (case[0] == "stream") == (how in FROM_STATES)
    ]


def rows_of_every_kind(rng, shape, dtype, out):
    """Ordinary rows, and the kinds that a formula alone gets wrong."""
    x, t = 3 * rng.normal(size=shape), rng.normal(size=shape)
    x[1], t[1] = -np.inf, np.nan  # empty: 0, whatever the cotangent
    x[2, 1::3] = -np.inf
    t[2, 1::3], t[2, 1] = np.nan, np.inf
    x[3, 5] = np.nan
    x[4, -1] = np.inf
    x[5] = float(jnp.finfo(dtype).min)  # uniform: a finite number is no mask
    x[6, 7] = 40
    x[7, :-3] = -np.inf  # all shares but one are empty
    return jnp.array(x, dtype), jnp.array(t, out)


@usable
@interpreted
@pytest.mark.parametrize(
    ("how", "place", "warpgroups", "dtype", "out"), every_plan(CASES)
)
@pytest.mark.pairwise(1)
def test_rows_of_every_kind(interpret, rng, how, place, warpgroups, dtype, out):
    op = function_of(how)
    plan, shape = plan_of(place, warpgroups, dtype)
    x, t = rows_of_every_kind(rng, shape, dtype, out)
    arrays = arguments(op, x, None, t, 1.0, out)
    result = result_dtype(op, dtype, out)
    got = interpret(how, arrays, dtype=result, plan=plan)
    want = wanted(op, arrays, 1.0)
    # That the case has what it is for.
    assert np.isnan(want[3:5]).all()
    assert (want[1] == HIDDEN.get(op, 0.0)).all()
    least = LEAST_FROM_STATE * 6 if how in FROM_STATES else 0.0  # t: 6 at most
    check(op, got, want, coarsest(dtype, out), least=least)


# Shares that overlap; both that have an entry write it, the same value. To the detector
# that is a race, where they are two warpgroups or two blocks: it is off for these.
OVERLAPS = {
    "rows": (Plan("rows", 8, 4, tiles=2), (19, 64), False),
    "registers": (Plan("registers", 32, 4, 1, 2, 2), (8, 13 * 128), False),
    "shared": (Plan("shared", 32, 4, 1, 2, 2), (8, 13 * 128), False),
    # The last warpgroup owns two and a quarter of seven tiles; none of two.
    "uneven": (Plan("shared", 32, 4, 1, 2, 7), (8, 37 * 128), False),
    "idle": (Plan("shared", 32, 4, 1, 4, 2), (8, 23 * 128), False),
    # Two units a warp, of rows of an odd number of such units.
    "halves": (Plan("shared", 16, 4, 1, 2, 3), (8, 37 * 64), False),
    # Its last two tiles are in registers, of five and a quarter that it owns.
    "kept": (Plan("shared", 32, 4, 1, 2, 7, kept=2), (8, 49 * 128), False),
    "chunks": (Plan("shared", 32, 4, 1, 1, 2), (8, 13 * 128), True),
    "stream": (Plan("stream", 32, 4, 1, 1, 2), (8, 13 * 128), True),
    "stream of halves": (Plan("stream", 16, 4, 1, 1, 2), (8, 21 * 64), True),
}


@usable
@interpreted
@pytest.mark.parametrize(
    ("op", "case"),
    [
        *itertools.product(OPS + FROM_STATES, ["rows"]),
        *itertools.product(FROM_STATES, ["stream", "stream of halves"]),
        *itertools.product(READS_ONE, ["registers"]),
        *itertools.product(OPS, ["shared", "uneven", "idle", "halves"]),
        *itertools.product(["log_softmax", "softmax_derivative"], ["kept", "chunks"]),
    ],
)
@pytest.mark.pairwise(1)
def test_shares_that_overlap(interpret, rng, op, case):
    """An entry of two shares counts once; or rows that do not fill their blocks."""
    how, op = op, function_of(op)
    plan, shape, races = OVERLAPS[case]
    x, t = rows_of_every_kind(rng, shape, "float32", "float32")
    # A row's maximum among what two shares have.
    x = x.at[5].set(0).at[5, shape[1] // 2].set(2).at[0, -1].set(9)
    arrays = arguments(op, x, None, t, 1.0, "float32")
    got = interpret(how, arrays, dtype=np.float32, plan=plan, races=races)
    least = LEAST_FROM_STATE * 6 if how in FROM_STATES else 0.0
    # Of halves a lane adds up twice as many terms in a row: the bar of the checks on a
    # GPU, for sums of terms of both signs.
    bar = 4e-6 if "halves" in case else None
    check(op, got, wanted(op, arrays, 1.0), "float32", bar, least)


@usable
@interpreted
@pytest.mark.parametrize("place", ["registers", "shared"])
@pytest.mark.parametrize("op", [*READS_ONE, WITH_GRADIENT])
@pytest.mark.pairwise(1, rare=1)
def test_a_dominant_entry_that_two_shares_write(rng, op, place):
    """Far above all that the second counts: it must write what the first does.

    Which one is last is by chance, so there are many rows.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    plan, shape = Plan(place, 32, 4, 1, 2, 2), (64, 13 * 128)
    x = rng.normal(size=shape)
    x[:, 5 * 128 + 3] = 1e4
    x = jnp.array(x, "float32")
    call = call_of(op, shape, "float32", "float32")
    label, one = jnp.full((64, 1), 5), jnp.ones((64, 1))
    arrays = (x, None, *((label, one, one) if op == WITH_GRADIENT else ()))
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        got = jax.tree.leaves(
            jax.jit(lambda *a: mosaic_gpu.run(call, a, plan))(*arrays)
        )
    want = xla_loss.run(call, arrays)
    np.testing.assert_allclose(*(jax.tree.leaves(y)[0] for y in (got, want)), rtol=1e-6)


# Plan, (outer, rows side by side, entries per row), dtypes; what overlaps is written
# twice, to the detector a race.
STRIPS = {
    "shared": (Plan("shared", 4, 8, 1, 1, 2), (1, 64, 64), DTYPES[1], True),
    "shared, two dtypes": (Plan("shared", 4, 4, 1, 1, 2), (1, 16, 64), DTYPES[3], True),
    "shared, narrow": (Plan("shared", 2, 4, 1, 1, 2), (2, 8, 128), DTYPES[0], True),
    "shared, wide": (Plan("shared", 16, 4, 1, 1, 2), (1, 64, 16), DTYPES[0], True),
    "strips overlap": (Plan("shared", 4, 4, 1, 1, 2), (1, 40, 64), DTYPES[0], False),
    "kept": (Plan("shared", 4, 8, 1, 1, 7, kept=2), (1, 32, 224), DTYPES[1], True),
    "shared, 8 bytes": (Plan("shared", 16, 4, 1, 1, 2), (1, 64, 16), DTYPES[1], True),
    "chunks": (Plan("shared", 4, 8, 1, 1, 2, kept=1), (1, 32, 128), DTYPES[2], True),
    "chunks, overlap": (Plan("shared", 4, 4, 1, 1, 2), (1, 16, 104), DTYPES[0], True),
}


@usable
@interpreted
@pytest.mark.parametrize("case", list(STRIPS))
@pytest.mark.parametrize("how", IN_STRIPS)
@pytest.mark.pairwise(1)
def test_rows_side_by_side(interpret, rng, how, case):
    """Along an axis that is not the last: rows of every kind, among others."""
    op = function_of(how)
    plan, shape, (dtype, out), races = STRIPS[case]
    x, t = rows_of_every_kind(rng, (shape[0] * shape[1], shape[2]), dtype, out)
    x, t = x.reshape(shape), t.reshape(shape)
    arrays = arguments(op, x, None, t, 1.0, out)
    result = result_dtype(op, dtype, out)
    got = interpret(how, arrays, dtype=result, plan=plan, races=races)
    check(op, got, wanted(op, arrays, 1.0), coarsest(dtype, out))


class Silent(ClusterVectors):
    """Blocks that tell each other nothing: in each, the others have no entries."""

    def __init__(self, refs, blocks):
        _, self.slots = refs
        self.rank, self.blocks = jax.lax.axis_index("piece"), blocks

    def exchange(self, numbers):
        """As the neutral state is: a maximum of -inf, or a sum of 0."""
        for i in range(numbers.shape[0]):
            own = numbers[i]
            for place in range(self.blocks):
                neutral = jnp.full_like(own, self.neutral[i])
                self.slots[i, place] = jnp.where(place == self.rank, own, neutral)


@usable
@interpreted
@pytest.mark.parametrize(("units", "kept"), [(13, 0), (9, 0), (16, 0), (13, 1)])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.pairwise(1)
def test_what_a_block_has_of_a_strip(interpret, rng, op, units, kept, monkeypatch):
    """Its own entries alone: each block as if there were no others."""
    exponential = mosaic_gpu_ops.Exponential(1.0, True)
    monkeypatch.setattr(
        Silent, "neutral", mosaic_gpu_ops.OPS[op](exponential).neutral, False
    )
    monkeypatch.setattr(mosaic_gpu_strips, "ClusterVectors", Silent)
    shape, first = (1, 16, 8 * units), slice(0, 64)
    x, t = 3 * rng.normal(size=shape), rng.normal(size=shape)
    x[..., 1] = 20  # the row maximum is a result of the first block
    arrays = [jnp.array(x, "float32"), None, jnp.array(t, "float32"), 1.0, "float32"]
    arrays = arguments(op, *arrays)
    plan = Plan("shared", 4, 4, 2, 1, 2, kept=kept)
    got = interpret(
        "in strips: " + op, arrays, dtype=np.float32, plan=plan, races=False
    )
    # What both blocks have both write, relative to what each has.
    both = slice(8 * (units - 8), 64)
    for part in (slice(0, both.start), slice(64, None)):
        share = first if part.stop else slice(64, None)
        own = [a if a is None or a.shape[-1] == 1 else a[..., share] for a in arrays]
        want = wanted(op, own, 1.0)
        if op == "log_softmax_pullback":  # the sum of the whole row is given
            x, _, row_max, excess, t = (
                a if a is None else oracle._wide(a) for a in own
            )
            p = np.exp(x - row_max) / (1 + excess)
            want = t - p * t.sum(-1, keepdims=True)
        check(op, got[..., part], want[..., : part.stop], "float32")


@usable
@interpreted
@pytest.mark.parametrize("mask_shape", [(2, 16, 64), (1, 16, 64), (2, 1, 64)])
@pytest.mark.parametrize("op", MASKABLE)
@pytest.mark.pairwise(1)
def test_masks_of_rows_side_by_side(interpret, rng, op, mask_shape):
    plan, shape = Plan("shared", 4, 4, 1, 1, 2), (2, 16, 64)
    where = rng.random(mask_shape) < 0.7
    full = np.broadcast_to(where, shape)
    x, t = 3 * rng.normal(size=shape), rng.normal(size=shape)
    behind = np.resize([np.nan, np.inf, -np.inf, 3e38], shape)
    x, t = np.where(full, x, behind), np.where(full, t, behind[..., ::-1])
    arrays = [jnp.array(x, "float32"), where, jnp.array(t, "float32"), 1, 0]
    arrays = arguments(op, *arrays)
    got = interpret("in strips: " + op, arrays, dtype=np.float32, plan=plan)
    want = wanted(op, arrays, 1.0)
    assert (want[~full] == HIDDEN.get(op, 0.0)).all()
    check(op, got, want, "float32")


# Rows that start and end between vectors: plan, length. Of less than a tile, of whole
# vectors, of several tiles, of two warpgroups of which one has nothing.
RAGGED = [
    (Plan("warps", 32, 4, tiles=1, ragged=True), 43),
    (Plan("warps", 32, 8, tiles=3, ragged=True), 600),
    (Plan("warps", 32, 8, tiles=1, ragged=True), 249),
    (Plan("warps", 32, 4, tiles=2, ragged=True), 203),
    (Plan("shared", 32, 4, 1, 2, 1, ragged=True), 1001),
    (Plan("shared", 32, 8, 1, 1, 1, ragged=True), 1017),
    (Plan("shared", 32, 8, 1, 2, 1, ragged=True), 900),
]
RAGGED_DTYPES = {4: DTYPES[0::3], 8: DTYPES[1:3]}


@usable
@interpreted
@pytest.mark.parametrize("case", range(len(RAGGED)))
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.pairwise(1)
def test_ragged_rows_of_every_kind(interpret, rng, op, wide, case):
    plan, length = RAGGED[case]
    dtype, out = RAGGED_DTYPES[plan.vector][wide]
    rows = 9  # which no block divides
    x, t = rows_of_every_kind(rng, (rows, length), dtype, out)
    arrays = arguments(op, x, None, t, 1.0, out)
    result = result_dtype(op, dtype, out)
    got = interpret(op, arrays, dtype=result, plan=plan, races=False)
    check(op, got, wanted(op, arrays, 1.0), coarsest(dtype, out))


# Shape, shape of the mask, plan (else that of the table), place, and the dtype if not
# float32: in 16 bits masks that many rows share are read in another form.
MASKS = {
    "16 bits": ((4, 8, 128), (1, 8, 128), None, "rows", "bfloat16"),
    "16 bits, one row a batch": ((2, 8, 256), (2, 1, 256), None, "rows", "float16"),
    "16 bits, shared": (
        (2, 2, 2, 4096),
        (2, 1, 1, 4096),
        Plan("shared", 32, 8, 1, 2, 2),
        "shared",
        "bfloat16",
    ),
    "rows of the mask follow each other": ((3, 8, 128), (1, 8, 128), None, "rows"),
    "one row a batch": ((3, 8, 128), (3, 1, 128), None, "rows"),
    "all batches share it": ((3, 8, 256), (1, 8, 256), None, "rows"),
    "16 bits, all batches share it": (
        (2, 16, 256),
        (1, 16, 256),
        None,
        "rows",
        "bfloat16",
    ),
    "heads share it": ((2, 3, 4, 128), (2, 1, 4, 128), None, "rows"),
    # A block of several rows would meet two rows of the mask.
    "odd batches": ((4, 3, 512), (4, 1, 512), None, "registers"),
    "shared": (
        (2, 2, 3, 2048),
        (2, 1, 3, 2048),
        Plan("shared", 32, 4, 1, 2, 2),
        "shared",
    ),
    "shared by all, in shared memory": (
        (3, 3, 2048),
        (1, 3, 2048),
        Plan("shared", 32, 4, 1, 2, 2),
        "shared",
    ),
    "ragged, shared by all": (
        (2, 4, 203),
        (1, 4, 203),
        Plan("warps", 32, 4, tiles=2, ragged=True),
        "warps",
    ),
    "chunks": ((5, 2048), (5, 2048), Plan("shared", 32, 4, 1, 2, 1), "shared"),
    "kept": ((5, 3584), (5, 3584), Plan("shared", 32, 4, 1, 1, 7, kept=2), "shared"),
    "ragged": (
        (2, 4, 203),
        (2, 1, 203),
        Plan("warps", 32, 4, tiles=2, ragged=True),
        "warps",
    ),
    "ragged, shared": (
        (2, 2, 3, 1001),
        (2, 1, 3, 1001),
        Plan("shared", 32, 4, 1, 2, 1, ragged=True),
        "shared",
    ),
}


@usable
@interpreted
@pytest.mark.parametrize("case", list(MASKS))
@pytest.mark.parametrize("op", MASKABLE)
@pytest.mark.pairwise(1)
def test_masks(interpret, rng, op, case):
    """Whatever is behind the mask, in rows of numbers, of NaN and of nothing."""
    shape, mask_shape, plan, place, *dtypes = MASKS[case]
    dtype = np.dtype(jnp.dtype(dtypes[0] if dtypes else "float32"))
    where = rng.random(mask_shape) < 0.7
    where.reshape(-1, shape[-1])[1:2] = False
    full = np.broadcast_to(where, shape)
    x, t = 3 * rng.normal(size=shape), rng.normal(size=shape)
    behind = np.resize([np.nan, np.inf, -np.inf, 3e38], shape)
    x, t = np.where(full, x, behind), np.where(full, t, behind[..., ::-1])
    last = (-1,) * (len(shape) - 1)
    x[last][np.argmax(full[last])] = np.nan
    arrays = arguments(op, jnp.array(x, dtype), where, jnp.array(t, dtype), 1, 0)
    structs = tuple(struct(a.shape, a.dtype) for a in arrays)
    call = RowCall(op, (-1,), 1.0, dtype, arrays=structs)
    problem = mosaic_gpu.problem_of(call, plan)
    assert (problem.plan.place, problem.mask is None) == (place, False)
    got = interpret(op, arrays, dtype=dtype, plan=plan)
    want = wanted(op, arrays, 1.0)
    assert (want[~full] == HIDDEN.get(op, 0.0)).all()
    assert np.isnan(want[last][full[last]]).all()
    check(op, got, want, dtype.name)


SHARED_MASKS = [
    "all batches share it",
    "16 bits, all batches share it",
    "shared by all, in shared memory",
    "ragged, shared by all",
]


@usable
@interpreted
@pytest.mark.parametrize("case", SHARED_MASKS)
@pytest.mark.parametrize("op", MASKABLE)
@pytest.mark.pairwise(1)
def test_rows_that_share_a_mask_in_turn(interpret, rng, monkeypatch, op, case):
    """In another order: each is computed once."""
    monkeypatch.setattr(mosaic_gpu_problem, "_CACHED", 0)
    test_masks(interpret, rng, op, case)


@usable
@pytest.mark.parametrize(
    ("shape", "mask_shape", "changes"),
    [
        ((2, 4, 8, 256), (1, 1, 8, 256), True),
        ((2, 4, 8, 256), (1, 4, 8, 256), True),
        ((2, 4, 8, 256), (2, 1, 8, 256), False),
        ((1, 4, 8, 256), (1, 4, 8, 256), False),
        ((2, 3, 1000), (1, 3, 1000), False),  # a block would have rows of two
    ],
)
def test_order_of_rows(monkeypatch, shape, mask_shape, changes):
    call = call_of("softmax", shape, "float32", "float32")
    arrays = (call.arrays[0], struct(mask_shape, "bool"))
    problem = mosaic_gpu.problem_of(dataclasses.replace(call, arrays=arrays))
    block = problem.block if problem.plan.place in ("rows", "warps") else 1
    blocks = problem.rows // block

    def order():
        return [int(problem.first_row(jnp.int32(k), block)) for k in range(blocks)]

    in_turn = [k * block for k in range(blocks)]
    assert order() == in_turn  # little lies between them
    for turn in (2 * block, block):
        cached = turn * shape[-1] * 4
        monkeypatch.setattr(mosaic_gpu_problem, "_CACHED", cached)
        assert sorted(order()) == in_turn
        follows = [b == a + block for a, b in itertools.pairwise(order())]
        assert all(follows[:: turn // block]) == (turn > block or not changes)
    assert (order() != in_turn) == changes
    if changes:
        masks = [int(problem.mask_row(jnp.int32(row))) for row in order()[:2]]
        assert masks[0] == masks[1]


@pytest.mark.parametrize(
    ("plan", "length", "staged"),
    [
        (Plan("shared", 32, 4, 16, 4, 16), 2**19, True),
        (Plan("shared", 32, 4, 16, 4, 32, kept=8), 2**20, False),  # no room
        (Plan("shared", 32, 4, 16, 4, 8), 2**19, False),  # read twice
        (Plan("registers", 32, 4, 16, 4, 16), 2**19, False),
    ],
)
def test_where_a_mask_is_staged(plan, length, staged):
    call = call_of("softmax", (8, length), "float32", "float32")
    arrays = (call.arrays[0], struct((1, length), "bool"))
    problem = mosaic_gpu.problem_of(dataclasses.replace(call, arrays=arrays), plan)
    assert problem.mask_staged == staged


@usable
@interpreted
@pytest.mark.parametrize("case", ["masked", "overlap"])
@pytest.mark.parametrize("op", MASKABLE)
@pytest.mark.pairwise(1)
def test_rows_of_the_lowest_float(interpret, rng, op, case):
    """A finite number is no mask, however low, and what is masked does not count."""
    plan, shape, where = None, (4, 128), np.arange(128)[None] < 64
    if case == "overlap":
        plan, shape, where = OVERLAPS["registers"][0], (1, 13 * 128), None
    x = jnp.full(shape, jnp.finfo(jnp.float32).min)
    t = jnp.array(rng.normal(size=shape), "float32")
    arrays = arguments(op, x, where, t, 1.0, "float32")
    got = interpret(op, arrays, dtype=np.float32, plan=plan, races=False)
    check(op, got, wanted(op, arrays, 1.0), "float32")


@usable
@interpreted
@pytest.mark.parametrize("shown", [True, False])
@pytest.mark.parametrize("how", OPS + FROM_STATES)
@pytest.mark.pairwise(1)
def test_mask_of_one_value(interpret, rng, how, shown):
    op = function_of(how)
    if op not in MASKABLE:
        pytest.skip("takes no mask")
    x, t = (jnp.array(a, "float32") for a in rng.normal(size=(2, 8, 128)))
    arrays = arguments(op, x, np.full((1, 1), shown), t, 1.0, "float32")
    got = interpret(how, arrays, dtype=np.float32)
    if shown:
        check(op, got, wanted(op, arrays, 1.0), "float32")
    else:
        np.testing.assert_array_equal(got, HIDDEN.get(op, 0.0))


@usable
@interpreted
@pytest.mark.parametrize(
    ("dtype", "out", "scale"),
    [(*DTYPES[0], 0.3), (*DTYPES[0], 7.0), (*DTYPES[3], 0.3)],
)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.pairwise(1, rare=1)
def test_scale(interpret, rng, op, dtype, out, scale):
    plan, shape = plan_of("rows", 1, dtype)
    x, t = rows_of_every_kind(rng, shape, dtype, out)
    arrays = arguments(op, x, None, t, scale, out)
    result = result_dtype(op, dtype, out)
    got = interpret(op, arrays, scale=scale, dtype=result, plan=plan)
    want = wanted(op, arrays, scale)
    if coarsest(dtype, out) != "float32":
        check(op, got, want, coarsest(dtype, out))
        return
    # scale (x - max) is rounded: relative to P, half an ulp of up to 300.
    rounding = 300 * float(jnp.finfo(jnp.float32).eps)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    if op in READS_ONE:
        np.testing.assert_allclose(got, want.astype(float), rtol=rounding, atol=1e-30)
    else:
        np.testing.assert_array_equal(got[1], 0)
        assert oracle.row_error(got, want, "float32") <= rounding


STRESS = [
    ("rows", 1, "float32"),
    ("shared", 2, "float32"),
    ("stream", 1, "bfloat16"),
    ("kept", 1, "bfloat16"),
    ("rows", 1, "float16"),
]


@usable
@interpreted
@pytest.mark.parametrize(("how", "place", "warpgroups", "dtype"), every_plan(STRESS))
@pytest.mark.pairwise(1)
def test_stress(interpret, rng, how, place, warpgroups, dtype):
    """Dominant entries and common parts of the cotangent, alone and together.

    Each row of its own: how far its logits are spread, and what its cotangent is.
    """
    op = function_of(how)
    plan, shape = plan_of(place, warpgroups, dtype)
    x = np.resize([1, 20, 60, 1, 20, 60, 1], (shape[0], 1)) * rng.normal(size=shape)
    # One entry more and more dominant: 1 - P from 1e-1 to below what float32 resolves.
    some = x[3::4]
    some[:] = rng.normal(size=some.shape)
    some[:, 7] = np.linspace(5, 40, len(some))
    x = jnp.array(x, dtype)
    spread = max(1.0, 32e3 * float(jnp.finfo(dtype).eps))
    t = np.where(np.arange(shape[0])[:, None] % 2, 1000.0, 0.0)
    if op == "log_softmax_pullback":  # one-hot, as a cross-entropy's
        one_hot = jax.nn.one_hot(jnp.argmax(x, -1), shape[1])
        t = np.where(t, one_hot, rng.normal(size=shape))
    else:
        t = t + np.where(t, spread, 1.0) * rng.normal(size=shape)
    t = jnp.array(t, dtype)
    arrays = arguments(op, x, None, t, 1.0, dtype)
    got = interpret(how, arrays, dtype=np.dtype(dtype), plan=plan)
    bar, least = None, 0.0
    if dtype != "float32" or how in FROM_STATES:
        least = LEAST_FROM_STATE * float(jnp.abs(t).max())
    if dtype == "float32" and op == "log_softmax_pullback":
        bar = 4e-6  # the sum of the cotangents, in float32
    check(op, got, wanted(op, arrays, 1.0), dtype, bar, least)


@usable
@interpreted
@pytest.mark.parametrize("op", ["log_softmax", "softmax_derivative"])
def test_the_same_bits_each_time(interpret, rng, op):
    plan, shape = plan_of("registers", 2, "float32")
    x, t = rows_of_every_kind(rng, shape, "float32", "float32")
    arrays = arguments(op, x, None, t, 1.0, "float32")
    interpret(op, arrays, dtype=np.float32, plan=plan, times=2)


# --- cross-entropy, against its form in jax.numpy -------------------------------------


ROWS_4, ROWS_8 = (Plan("rows", 8, vector, tiles=2) for vector in (4, 8))


def long_4(place, warpgroups, tiles):
    return Plan(place, 32, 4, 1, warpgroups, tiles)


def long_8(place, warpgroups, tiles):
    return dataclasses.replace(long_4(place, warpgroups, tiles), vector=8)


EVERY = Options(softcap=3.0, uniform_nll=True, label_smoothing=0.2, z_loss=0.1)
CAPPED = Options(softcap=30.0)
ENTROPY = Options(uniform_nll=True, entropy=True)


def losses(rng, shape, dtype, masked, dense):
    """Logits, mask and labels of rows of every kind; the last has no weight."""
    x = 4 * rng.normal(size=shape)
    y = rng.integers(0, shape[1], (shape[0], 1))
    x[0, 3], y[0] = -np.inf, 3
    x[1] = -np.inf
    x[2, 7], y[2] = 60, 7
    y[3], y[4] = IGNORED, INVALID
    # In 16 bits one for all rows, which is read in another form.
    of_mask = shape if dtype == "float32" else (1, shape[1])
    where = jnp.array(rng.random(of_mask) < 0.7) if masked else None
    weights = rng.random((2, shape[0], 1))
    weights[:, 5:6] = 0
    x[5, 1] = np.nan
    if dense:
        return jnp.array(x, dtype), where, jnp.array(rng.random(shape), dtype)
    numbers = (jnp.array(w, jnp.float32) for w in weights)
    return jnp.array(x, dtype), where, jnp.array(y, jnp.int32), *numbers


@usable
@interpreted
@pytest.mark.parametrize(
    ("op", "plan", "length", "dtype", "options", "masked"),
    [
        (WITH_GRADIENT, ROWS_4, 64, "float32", EVERY, True),
        (WITH_GRADIENT, ROWS_8, 128, "bfloat16", Options(), False),
        (WITH_GRADIENT, long_4("registers", 1, 2), 1024, "float32", Options(), False),
        (WITH_GRADIENT, long_8("registers", 2, 1), 1792, "bfloat16", EVERY, True),
        (WITH_GRADIENT, long_4("shared", 2, 1), 1024, "float32", EVERY, False),
        (WITH_GRADIENT, long_4("shared", 1, 1), 896, "float32", EVERY, True),
        (WITH_GRADIENT, long_4("shared", 2, 1), 1024, "bfloat16", CAPPED, True),
        (WITH_GRADIENT, long_8("shared", 1, 1), 1792, "bfloat16", CAPPED, False),
        (WITH_GRADIENT, long_4("shared", 1, 1), 896, "float32", CAPPED, False),
        (WITH_GRADIENT, RAGGED[0][0], 43, "float32", EVERY, True),
        (WITH_GRADIENT, RAGGED[2][0], 249, "bfloat16", Options(), False),
        (WITH_GRADIENT, RAGGED[4][0], 1001, "float32", EVERY, True),
        ("cross_entropy", long_8("stream", 1, 1), 1792, "bfloat16", ENTROPY, True),
        ("cross_entropy", ROWS_4, 64, "float32", ENTROPY, False),
        ("cross_entropy", RAGGED[2][0], 249, "bfloat16", Options(), False),
        ("cross_entropy", RAGGED[4][0], 1001, "float32", ENTROPY, True),
        ("dense", long_4("shared", 1, 1), 896, "float32", EVERY, True),
    ],
    ids=lambda value: getattr(value, "place", str(value)[:12]),
)
def test_cross_entropy(rng, nans_allowed, op, plan, length, dtype, options, masked):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    rows = 32 if plan.place == "rows" else 6
    arrays = losses(rng, (rows, length), dtype, masked, op == "dense")
    op = "cross_entropy" if op == "dense" else op
    arrays = arrays if op == WITH_GRADIENT else arrays[:3]
    structs = tuple(None if a is None else struct(a.shape, a.dtype) for a in arrays)
    call = RowCall(op, (-1,), 0.7, np.dtype(dtype), options, arrays=structs)
    rounding = 4 * float(np.finfo(np.float32).eps) * (options.softcap or 0)
    # Shares that overlap write the same twice, which counts as a race.
    parameters = plgpu.InterpretGPUParams(detect_races=False)
    with plgpu.force_gpu_interpret_mode(parameters):
        got = jax.jit(lambda *a: mosaic_gpu.run(call, a, plan))(*arrays)
    want = xla_loss.run(call, arrays)
    got, want = (
        [np.asarray(a, np.float64) for a in jax.tree.leaves(t)] for t in (got, want)
    )
    if op == WITH_GRADIENT:
        dx, wanted = got.pop(0), want.pop(0)
        assert (dx[5] == 0).all()  # of a row of no weight, NaN or not
        np.testing.assert_array_equal(np.isnan(dx).any(-1), np.isnan(wanted).any(-1))
        finite = ~np.isnan(wanted).any(-1)
        error = oracle.row_error(dx[finite], wanted[finite], dtype)
        assert error <= GRADIENT_BAR[dtype] + rounding
    proper = [0, 1, 2, 3, *range(6, rows)]  # not of the rows of NaN
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(
            a[proper], b[proper], rtol=4e-6 + rounding, atol=1e-6 + rounding
        )


PULLBACK = "cross_entropy_pullback"
EVERY_TERM = Options(softcap=3.0, uniform_nll=True, entropy=True)


def pulled_back(rng, shape, dtype, masked, options, scale):
    """The arguments of a pullback, of rows of every kind; the last has no cotangent."""
    x, where, labels, *_ = losses(rng, shape, dtype, masked, dense=False)
    x = x.at[0, 9].set(-jnp.inf)  # not at its label
    loss = dataclasses.replace(options, label_smoothing=0.1 * options.uniform_nll)
    call = RowCall("cross_entropy", (-1,), scale, x.dtype, loss)
    state = xla_loss.run(call, (x, where, labels))
    numbers = row_loss.statistics(state, labels, loss)
    cts = jax.tree.map(lambda a: np.float32(rng.normal(size=a.shape)), numbers)
    cts = jax.tree.map(lambda a: jnp.where(np.arange(len(a))[:, None] == 5, 0, a), cts)
    given = xla_loss.pullback_numbers(numbers, labels, cts)
    call = xla_loss.for_pullback(call, given)
    arrays = (x, where, labels, *given.given())
    structs = tuple(None if a is None else struct(a.shape, a.dtype) for a in arrays)
    return dataclasses.replace(call, arrays=structs), arrays


@usable
@interpreted
@pytest.mark.parametrize(
    ("plan", "length", "dtype", "options", "masked", "scale"),
    [
        (ROWS_4, 64, "float32", EVERY_TERM, True, 0.7),
        (ROWS_8, 128, "bfloat16", Options(), False, 0.7),
        (long_8("stream", 1, 1), 2816, "bfloat16", EVERY_TERM, True, 0.7),
        (long_8("stream", 2, 1), 3840, "float16", Options(entropy=True), False, 5.0),
        (long_8("stream", 1, 1), 2816, "bfloat16", CAPPED, False, 0.7),
        (long_4("stream", 1, 2), 1536, "float32", EVERY_TERM, False, 0.7),
        (RAGGED[2][0], 249, "bfloat16", EVERY_TERM, True, 0.7),
        (RAGGED[4][0], 1001, "float32", Options(entropy=True), False, 5.0),
    ],
    ids=lambda value: getattr(value, "place", str(value)[:12]),
)
def test_cross_entropy_pullback(
    rng, nans_allowed, plan, length, dtype, options, masked, scale
):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    rows = 32 if plan.place == "rows" else 6
    call, arrays = pulled_back(rng, (rows, length), dtype, masked, options, scale)
    # Shares that overlap write the same twice, which counts as a race.
    parameters = plgpu.InterpretGPUParams(detect_races=False)
    with plgpu.force_gpu_interpret_mode(parameters):
        got = jax.jit(lambda *a: mosaic_gpu.run(call, a, plan))(*arrays)
    assert got.dtype == dtype
    got, want = (np.asarray(a, np.float64) for a in (got, xla_loss.run(call, arrays)))
    assert (got[5] == 0).all()  # of a row of no cotangent, NaN or not
    np.testing.assert_array_equal(np.isnan(got).any(-1), np.isnan(want).any(-1))
    finite = ~np.isnan(want).any(-1)
    assert oracle.row_error(got[finite], want[finite], dtype) <= GRADIENT_BAR[dtype]


@usable
@interpreted
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_cap_leaves_the_digits_of_what_a_dominant_label_does(
    rng, nans_allowed, dtype
):
    """That is less than the rounding of a capped value, which not all see alike."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    x = 3 * rng.normal(size=(24, 1024))
    x[:, 5] = np.linspace(40, 100, 24)
    x, labels = jnp.array(x, dtype), jnp.full((24, 1), 5)
    options = dataclasses.replace(CAPPED, entropy=True)
    structs = (struct(x.shape, dtype), None, struct(labels.shape, jnp.int32))
    call = RowCall("cross_entropy", (-1,), 1.0, x.dtype, options, arrays=structs)
    of = oracle.rows(np.asarray(x, np.float64), None, 1.0, 30.0)
    state = xla_loss.run(call, (x, None, labels))
    numbers = row_loss.statistics(state, labels, options)
    cts = jax.tree.map(jnp.zeros_like, numbers)._replace(entropy=jnp.ones((24, 1)))
    given = xla_loss.pullback_numbers(numbers, labels, cts)
    back = xla_loss.for_pullback(call, given)
    arrays = (x, None, labels, *given.given())
    structs = tuple(None if a is None else struct(a.shape, a.dtype) for a in arrays)
    back = dataclasses.replace(back, arrays=structs)
    plan = Plan("stream", 32, 4 if dtype == "float32" else 8, 1, 1, 1)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        found, alone = (
            jax.jit(lambda *a, c=c: mosaic_gpu.run(c, (a[0], None, a[1]), plan))(
                x, labels
            )
            for c in (call, dataclasses.replace(call, options=CAPPED))
        )
        dx = jax.jit(lambda x, *a: mosaic_gpu.run(back, (x, None, labels, *a), plan))(
            x, *given.given()
        )
    # The exponentials of differences of two values, each to 2 eps of the cap.
    bar = 8 * float(np.finfo(np.float32).eps) * 30
    (_, excess, *_, below_weighted), (_, only, *_) = (
        [np.asarray(a, np.float64) for a in state] for state in (found, alone)
    )
    others = np.delete(np.asarray(of.below, np.float64), 5, axis=-1)
    e = np.exp(-others)
    for sums in (excess, only):
        np.testing.assert_allclose(sums[:, 0], e.sum(-1), rtol=bar)
    np.testing.assert_allclose(below_weighted[:, 0], (e * others).sum(-1), rtol=bar)
    want = oracle.entropy_vjp(of, np.ones(24))
    assert oracle.row_error(dx, want, dtype) <= GRADIENT_BAR[dtype] + bar


@pytest.mark.parametrize("length", [1024, 50257, 131072, 151936])
def test_cross_entropy_pullback_lowers(rng, length):
    """By default in 16 bits; in float32, and where rows are few, XLA's form."""

    def call(dtype, rows):
        x, number = struct((rows, length), dtype), struct((rows, 1), jnp.float32)
        index = struct(number.shape, jnp.int32)
        arrays = (x, None, index, *[number] * 6)
        return RowCall(PULLBACK, (-1,), 0.7, x.dtype, EVERY_TERM, arrays=arrays)

    lowers(call(jnp.bfloat16, 2048))
    for dtype, rows, want in [
        (jnp.bfloat16, 2048, "mosaic_gpu"),
        (jnp.float32, 2048, "xla"),
        (jnp.bfloat16, 4, "xla"),
    ]:
        choice = dispatch.choose(None, call(dtype, rows), H100, family=ROWS)
        assert choice.implementation == want
        assert choice.is_faster == (want == "xla")


@usable
@pytest.mark.parametrize(
    ("kind", "asked", "want"),
    [
        (H100.kind, None, "mosaic_gpu"),
        (H100.kind, "mosaic_gpu", "mosaic_gpu"),
        (H100.kind, "triton", "xla"),
        (H100.kind, "xla", "xla"),
        ("NVIDIA A100-SXM4-80GB", None, "xla"),
    ],
)
def test_what_computes_the_gradient_of_each_example(kind, asked, want):
    def loss(x, labels):
        f = jaxsoftmax.softmax_cross_entropy_with_integer_labels
        return jnp.sum(f(x, labels, implementation=asked) ** 2)

    arrays = struct((256, 32768), jnp.bfloat16), struct((256,), jnp.int32)
    found = jaxsoftmax.explain_for("cuda", kind)(jax.grad(loss), *arrays).choices
    [choice] = [each for each in found if each.call.op == PULLBACK]
    assert choice.implementation == want
    # So that nothing warns of it.
    assert choice.is_faster == (asked is None and want == "xla")


@usable
@interpreted
@pytest.mark.parametrize("op", ["cross_entropy", "dense", WITH_GRADIENT])
@pytest.mark.parametrize(
    ("plan", "length"), [(ROWS_4, 64), (long_4("shared", 1, 1), 896)], ids=str
)
def test_further_below_than_a_float_can_say(nans_allowed, op, plan, length):
    """Infinitely far is no NaN where P or a weight is 0."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    x = np.zeros((32, length), np.float32)
    x[:, length // 2 :] = np.finfo(np.float32).min
    x[1], x[1, 0] = -3e38, 3e38
    x[2] = -3e38
    labels = np.zeros((32, 1), np.int32)
    weights = np.ones((32, 1), np.float32)
    options = Options(entropy=True)
    if op == WITH_GRADIENT:
        options = Options(uniform_nll=True, label_smoothing=0.1, z_loss=1e-3)
    arrays = (x, None, labels, weights, weights)
    if op == "dense":
        op, labels = "cross_entropy", np.eye(1, length, dtype=np.float32)
        arrays = (x, None, np.broadcast_to(labels, x.shape))
    arrays = arrays if op == WITH_GRADIENT else arrays[:3]
    arrays = tuple(None if a is None else jnp.array(a) for a in arrays)
    structs = tuple(None if a is None else struct(a.shape, a.dtype) for a in arrays)
    call = RowCall(op, (-1,), 3.0, np.dtype(np.float32), options, arrays=structs)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=False)):
        got = jax.jit(lambda *a: mosaic_gpu.run(call, a, plan))(*arrays)
    want = xla_loss.run(call, arrays)
    for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        assert not np.isnan(b).any()
        np.testing.assert_allclose(a, b, rtol=4e-6, atol=1e-6)


# Of each way to split a row, shares that overlap among them; and what is refused: rows
# that two blocks have, and rows that are read twice.
IN_PLACE = {
    "rows": (ROWS_4, (32, 64), EVERY, True),
    "rows of two blocks": (ROWS_4, (40, 64), EVERY, False),
    "registers": (long_4("registers", 1, 2), (6, 1024), Options(), True),
    "registers overlap": (long_4("registers", 2, 2), (6, 1664), EVERY, True),
    "shared overlap": (long_4("shared", 2, 2), (6, 1664), Options(), True),
    "ragged": (RAGGED[0][0], (16, 43), EVERY, True),
    "ragged, two blocks": (RAGGED[0][0], (17, 43), EVERY, False),
    "ragged, shared": (RAGGED[4][0], (6, 1001), Options(), True),
    "shared in chunks": (long_4("shared", 1, 1), (6, 896), EVERY, False),
    "registers in chunks": (long_4("registers", 1, 1), (6, 896), EVERY, False),
}


def in_place(call):
    options = dataclasses.replace(call.options, in_place=True)
    return dataclasses.replace(call, options=options)


@usable
@interpreted
@pytest.mark.parametrize("case", list(IN_PLACE))
def test_in_place_is_the_same(rng, nans_allowed, case):
    """With and without a mask, and of logits that are looked at later.

    Bit by bit; but of the gradient, what two shares write may differ by its rounding.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    plan, shape, options, possible = IN_PLACE[case]
    arrays = losses(rng, shape, "float32", options is EVERY, dense=False)
    structs = tuple(None if a is None else struct(a.shape, a.dtype) for a in arrays)
    call = RowCall(
        WITH_GRADIENT, (-1,), 0.7, np.dtype("float32"), options, arrays=structs
    )
    assert mosaic_gpu.problem_of(in_place(call), plan).in_place == possible
    if not possible:  # it is the same program
        return
    found = []
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        for each in (call, in_place(call)):
            run = exact_jit(lambda *a, c=each: (mosaic_gpu.run(c, a, plan), a[0] * 1))
            found.append(jax.tree.leaves(run(*arrays)))
    assert len(found[0][0]) == shape[0]
    if "overlap" in case:
        dx, over = (np.asarray(each.pop(0), np.float64) for each in found)
        np.testing.assert_array_equal(np.isnan(dx), np.isnan(over))
        rows = ~np.isnan(dx).any(-1)
        assert (
            oracle.row_error(over[rows], dx[rows], "float32") <= GRADIENT_BAR["float32"]
        )
    for plain, over in zip(*found, strict=True):
        np.testing.assert_array_equal(plain, over)


@usable
@interpreted
@pytest.mark.parametrize("case", ["rows of two blocks", "registers", "shared overlap"])
def test_into_an_array_of_many(rng, nans_allowed, case):
    """The gradient is at its place, and what is beside it stays."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    plan, shape, options, _ = IN_PLACE[case]
    arrays = losses(rng, shape, "float32", options is EVERY, dense=False)
    structs = tuple(None if a is None else struct(a.shape, a.dtype) for a in arrays)
    call = RowCall(
        WITH_GRADIENT, (-1,), 0.7, np.dtype("float32"), options, arrays=structs
    )
    whole = jnp.full((3, *shape), 7.0)

    @exact_jit
    def run(whole, place, *arrays):
        return mosaic_gpu.run(call, arrays, plan, (whole, place))

    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=False)):
        dx, *numbers = exact_jit(lambda *a: mosaic_gpu.run(call, a, plan))(*arrays)
        got, *others = run(whole, jnp.int32(1), *arrays)
    np.testing.assert_array_equal(got[jnp.array([0, 2])], 7)
    if "overlap" in case:  # which of two shares wrote last
        np.testing.assert_allclose(got[1], dx, rtol=GRADIENT_BAR["float32"], atol=1e-9)
    else:
        np.testing.assert_array_equal(got[1], dx)
    jax.tree.map(np.testing.assert_array_equal, others, numbers)


@usable
@pytest.mark.parametrize(
    ("length", "labels"),
    [
        *((1024, "index"), (16384, "weights"), (131072, "weights")),
        *(
            pytest.param(*rare, marks=pytest.mark.slow)
            for rare in ((1024, "weights"), (16384, "index"), (131072, "index"))
        ),
    ],
)
def test_cross_entropy_lowers(length, labels):
    x, number = struct((64, length), jnp.bfloat16), struct((64, 1), jnp.float32)
    index, mask = struct((64, 1), jnp.int32), struct((1, length), jnp.bool_)
    options = dataclasses.replace(EVERY, entropy=True)
    row_arrays = (x, mask, index if labels == "index" else x)
    lowers(RowCall("cross_entropy", (-1,), 1.0, x.dtype, options, arrays=row_arrays))
    if labels == "index":
        arrays = (x, mask, index, number, number)
        lowers(RowCall(WITH_GRADIENT, (-1,), 1.0, x.dtype, EVERY, arrays=arrays))


# --- lowered for CUDA -----------------------------------------------------------------


def call_of(op, shape, dtype, out, where=None, axis=(-1,)):
    x = struct(shape, dtype)
    if op == WITH_GRADIENT:
        number = struct((*shape[:-1], 1), jnp.float32)
        labels = struct(number.shape, jnp.int32)
        arrays = (x, None, labels, number, number)
        return RowCall(op, axis, 1.0, np.dtype(dtype), Options(), arrays=arrays)
    if op == "softmax_derivative":
        arrays = (struct(shape, out),) * 2
    else:
        rows = [1 if i - len(shape) in axis else n for i, n in enumerate(shape)]
        numbers = [struct(tuple(rows), jnp.float32)] * READS_TWO.get(op, 0)
        rest = (*numbers, struct(shape, out))
        mask = None if where is None else struct(where, jnp.bool_)
        arrays = (x, mask, *(rest if op in READS_TWO else ()))
    return RowCall(op, axis, 1.0, result_dtype(op, dtype, out), arrays=arrays)


def lower(call, plan=None):
    """The text of a program for an H100, kernel and all."""
    given = [a for a in call.arrays if a is not None]

    def function(*given):
        rest = iter(given)
        return mosaic_gpu.run(
            call, [None if a is None else next(rest) for a in call.arrays], plan
        )

    return lower_for_h100(function, *given)


def lower_for_h100(function, *given):
    device = jax.sharding.AbstractDevice(
        device_kind=H100.kind, num_cores=None, platform="gpu"
    )
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(function).trace(*given)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


def lowers(call, plan=None):
    assert plan or mosaic_gpu.refusal(call, H100) is None
    text = lower(call, plan)
    assert "mosaic_gpu" in text
    return text


def aliases(text):
    """Of each kernel: which of its operands a result has the memory of."""
    kernels = [line for line in text.splitlines() if "@mosaic_gpu" in line]
    pattern = r"output_operand_alias<.*?operand_index = (\d+)"
    return [re.findall(pattern, line) for line in kernels]


@usable
@pytest.mark.parametrize(
    ("shape", "dtype", "possible"),
    [
        ((64, 128), "bfloat16", True),
        ((63, 128), "bfloat16", False),  # two blocks would have a row
        pytest.param((64, 1024), "float32", True, marks=pytest.mark.slow),
        pytest.param((66, 1024), "float32", False, marks=pytest.mark.slow),
        ((3, 12800), "bfloat16", True),  # in registers, shares overlap
        pytest.param((3, 65536), "float32", True, marks=pytest.mark.slow),
        pytest.param((3, 131072), "bfloat16", True, marks=pytest.mark.slow),
        # Read twice.
        pytest.param((3, 1048576), "bfloat16", False, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_in_place_lowers(shape, dtype, possible):
    """The gradient has the logits' memory; and the label's logit is read before."""
    call = call_of(WITH_GRADIENT, shape, dtype, dtype)
    text = lowers(in_place(call))
    assert aliases(text) == [["0"] if possible else []]
    assert ("optimization_barrier" in text) == possible
    if possible:
        before, after = text.split("@mosaic_gpu")
        assert "stablehlo.gather" in before.split("optimization_barrier")[0]
        assert "stablehlo.gather" not in after
    plain = lowers(call)
    assert aliases(plain) == [[]]
    assert "optimization_barrier" not in plain


@usable
@pytest.mark.parametrize("shape", [(40, 128), (3, 12800), (3, 131072)], ids=str)
def test_into_an_array_of_many_lowers(shape):
    """The result has the memory of that array, the kernel's first operand."""
    call = call_of(WITH_GRADIENT, shape, "float32", "float32")
    call = dataclasses.replace(call, dtype=np.dtype(jnp.bfloat16))
    whole = struct((4, *shape), jnp.bfloat16)
    given = (whole, struct((), jnp.int32), *(a for a in call.arrays if a is not None))

    def run(whole, place, x, *rows):
        return mosaic_gpu.run(call, (x, None, *rows), into=(whole, place))

    text = lower_for_h100(run, *given)
    assert aliases(text) == [["0"]]


def overwriting(**options):
    return functools.partial(
        jaxsoftmax.softmax_cross_entropy_with_integer_labels,
        implementation="mosaic_gpu",
        **{"overwrite_logits": True, "reduction": "mean", **options},
    )


def a_layer(loss, gradient=True):
    """The loss of ``h @ w``, and what a training step needs."""

    def value(h, w, labels):
        return jnp.sum(loss(h @ w, labels))

    return jax.value_and_grad(value, (0, 1)) if gradient else value


LAYER = (
    struct((64, 256), jnp.bfloat16),
    struct((256, 8192), jnp.bfloat16),
    struct((64,), jnp.int32),
)


@usable
@pytest.mark.parametrize(
    ("options", "gradient", "want"),
    [
        ({}, True, ["0"]),
        ({"reduction": "sum", "scale": np.float32(0.5), "z_loss": 0.1}, True, ["0"]),
        ({"overwrite_logits": False}, True, []),
        ({}, False, []),
        ({"reduction": "none"}, True, []),
        ({"return_lse": False, "label_smoothing": 0.1}, True, ["0"]),
    ],
    ids=str,
)
def test_logits_are_overwritten_where_asked(options, gradient, want):
    text = lower_for_h100(a_layer(overwriting(**options), gradient), *LAYER)
    found, *pullback = aliases(text)
    assert found == want
    assert not any(pullback)


@usable
@pytest.mark.versions
def test_logits_are_overwritten_under_transforms():
    """In one kernel for a whole batch, in each share of a map, and in a checkpoint."""
    step = a_layer(overwriting())
    batched = [struct((4, *a.shape), a.dtype) for a in LAYER]
    assert aliases(lower_for_h100(jax.vmap(step), *batched)) == [["0"]]
    again = a_layer(jax.checkpoint(overwriting()))
    assert ["0"] in aliases(lower_for_h100(again, *LAYER))
    device = jax.sharding.AbstractDevice(
        device_kind=H100.kind, num_cores=None, platform="gpu"
    )
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.sharding.AbstractMesh((8,), ("data",), auto, abstract_device=device)
    rows, all_ = jax.P("data"), jax.P()
    mapped = jax.shard_map(
        lambda *args: jax.tree.map(lambda y: y[None], step(*args)),
        mesh=mesh,
        in_specs=(rows, all_, rows),
        out_specs=rows,
        check_vma=False,
    )
    many = [struct((512, 256), jnp.bfloat16), LAYER[1], struct((512,), jnp.int32)]
    traced = jax.jit(mapped).trace(*many)
    assert aliases(traced.lower(lowering_platforms=("cuda",)).as_text()) == [["0"]]


@usable
def test_explain_shows_what_differs():
    """Nothing where no gradient is computed in the pass of the loss."""

    def both(h, w, labels):
        each = [
            a_layer(overwriting(overwrite_logits=over), gradient)
            for over in (False, True)
            for gradient in (False, True)
        ]
        return [f(h, w, labels) for f in each]

    choices = jaxsoftmax.explain_for("cuda", H100.kind)(both, *LAYER).choices
    found = [(choice.call.op, choice.call.options.in_place) for choice in choices]
    assert sorted(found) == [
        ("cross_entropy", False),
        (WITH_GRADIENT, False),
        (WITH_GRADIENT, True),
    ]


BUSY, MASKED = mosaic_gpu_plans._BUSY, mosaic_gpu_plans._MASKED
KINDS = list(mosaic_gpu_plans._SPLITS)
LENGTHS = (16, 128, 512, 1024, 1152, 2048, 4096, 8192, 16384, 32768, 65536, 128256)
LENGTHS += (131072, 151936, 262144, 1048576)


def op_of(name):
    """That of a kind."""
    return name.removeprefix(BUSY).removeprefix(MASKED)


def plan_for(kind, length, rows=64):
    name, wide = kind
    return mosaic_gpu_plans.plan(
        op=op_of(name),
        rows=rows,
        length=length,
        itemsize=4 if wide else 2,
        mask=((rows, 1),) if name.startswith(MASKED) else None,
        busy=name.startswith(BUSY),
    )


def entry(plan):
    """What a plan is made from: its line of the table."""
    return plan.place, plan.blocks, plan.warpgroups


def every_entry():
    """(op, length, dtypes): each line of the table once for one array and for two."""
    seen = set()
    for op, wide in KINDS:
        dtypes = (DTYPES[0], DTYPES[3]) if wide else DTYPES[1:3]
        for length in LENGTHS:
            line = (op in READS_TWO, wide, *entry(plan_for((op, wide), length)))
            if line not in seen:
                seen.add(line)
                yield op, length, *dtypes[len(seen) % 2]


@usable
@pytest.mark.slow
@pytest.mark.parametrize(("op", "length", "dtype", "out"), list(every_entry()))
@pytest.mark.pairwise(1)
def test_every_entry_of_the_table_lowers(op, length, dtype, out):
    call = call_of(op_of(op), (64, length), dtype, out)
    if op.startswith(BUSY):
        call = dataclasses.replace(call, options=Options(softcap=30.0))
    if op.startswith(MASKED):
        arrays = (*call.arrays, struct((64, length), "bool"))
        call = dataclasses.replace(call, arrays=arrays)
    lowers(call)


@usable
# 1152 takes loads of half the bytes, from 16 bits.
@pytest.mark.parametrize("length", [128, 1152])
@pytest.mark.parametrize(("dtype", "out"), DTYPES)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.pairwise(1)
@pytest.mark.versions
def test_every_operation_and_dtype_lowers(op, dtype, out, length):
    lowers(call_of(op, (64, length), dtype, out))


@usable
@pytest.mark.versions
@pytest.mark.parametrize("length", [1501, 50257])
@pytest.mark.parametrize(("dtype", "out"), DTYPES)
@pytest.mark.parametrize("op", [*OPS, WITH_GRADIENT])
@pytest.mark.pairwise(1)
def test_ragged_rows_lower(op, dtype, out, length):
    if op == WITH_GRADIENT:
        out = dtype
    lowers(call_of(op, (64, length), dtype, out))


@usable
@pytest.mark.versions
# In a warp, in a block, in a block in chunks, in a cluster in chunks.
@pytest.mark.parametrize("length", [128, 1024, 16384, 1048576])
@pytest.mark.parametrize("op", list(FUNCTION_OF_STATE))
@pytest.mark.pairwise(1)
def test_every_state_lowers(op, length):
    call = call_of(FUNCTION_OF_STATE[op], (64, length), "bfloat16", "bfloat16")
    lowers(dataclasses.replace(call, op=op))


@usable
@pytest.mark.versions
@pytest.mark.parametrize(
    ("length", "where"),
    [
        (128, (2, 1, 8, 1)),
        (128, (2, 1, 1, 1)),
        (8192, (2, 3, 8, 1)),
        (8192, (1, 3, 1, 1)),
        (1501, (2, 1, 8, 1)),
        (9999, (1, 3, 1, 1)),
    ],
)
@pytest.mark.parametrize("op", ["log_softmax", "log_softmax_pullback"])
@pytest.mark.pairwise(1)
def test_lowers_with_masks(op, length, where):
    where = (*where[:3], length)
    lowers(call_of(op, (2, 3, 8, length), "bfloat16", "bfloat16", where))


@usable
@pytest.mark.parametrize("f", [jaxsoftmax.softmax, jaxsoftmax.log_softmax])
def test_lowers_under_x64(f):
    """As a user calls it: what is inside of the kernel has 32 bits all the same."""
    x, where = struct((64, 4096), jnp.float32), np.arange(4096)[None] % 3 > 0
    f = functools.partial(f, where=where, implementation="mosaic_gpu")
    with jax.enable_x64(True):
        gradient = jax.grad(lambda x: jnp.sum(jnp.sin(f(x))))
        choices = jaxsoftmax.explain_for("cuda", H100.kind)(gradient, x).choices
    assert [choice.implementation for choice in choices] == ["mosaic_gpu"] * 2


@usable
@pytest.mark.parametrize("axis", [-1, -2])
def test_log_softmax_alone_writes_no_numbers(axis):
    """The maximum and the sum of a row are results for the derivative's sake."""
    if axis == -2 and _compat.mosaic_strips_reason() is not None:
        pytest.skip("no kernel of rows side by side")
    x = struct((256, 512), jnp.bfloat16)
    f = functools.partial(
        jaxsoftmax.log_softmax, axis=axis, implementation="mosaic_gpu"
    )

    def kept(x):
        return jax.vjp(f, x)

    numbers = f"tensor<{256 if axis == -1 else '1x512'}xf32>"
    kernels = [
        [line for line in lower_for_h100(g, x).splitlines() if "@mosaic_gpu" in line]
        for g in (f, kept)
    ]
    assert [len(lines) for lines in kernels] == [1, 1]
    assert [lines[0].count(numbers) for lines in kernels] == [0, 2]


@usable
@pytest.mark.parametrize("axis", [-1, (-2, -1), -2])
def test_log_softmax_whose_result_is_unused_is_not_written(axis):
    """Of a gradient alone; but kernels have no state of rows side by side."""
    if axis == -2 and _compat.mosaic_strips_reason() is not None:
        pytest.skip("no kernel of rows side by side")
    x = struct((8, 256, 512), jnp.bfloat16)

    def pulled(x, g):
        f = functools.partial(
            jaxsoftmax.log_softmax, axis=axis, implementation="mosaic_gpu"
        )
        return jax.vjp(f, x)[1](g)

    text = lower_for_h100(pulled, x, x)
    calls = [line for line in text.splitlines() if "@mosaic_gpu" in line]
    assert len(calls) == 2
    result = calls[0].rpartition("->")[2]
    assert ("bf16" in result) == (axis == -2), result


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("rows", [1, 4096])
def test_states_have_plans_where_log_softmax_has(rows, itemsize):
    """Else a result that is unused would matter to which implementation runs."""
    for length in (*range(8, 4000, 4), *range(4001, 600_000, 997), *LENGTHS):
        plans = [
            mosaic_gpu_plans.plan(
                op=op, rows=rows, length=length, itemsize=itemsize, mask=None
            )
            for op in ("log_softmax", "log_sum_exp_state")
        ]
        assert isinstance(plans[0], str) or not isinstance(plans[1], str), plans


@usable
@interpreted
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("lanes", [4, 32])
@pytest.mark.pairwise(1)
def test_log_softmax_of_many_tiles(interpret, rng, dtype, lanes):
    """Lanes with 4 tiles and with 8, of which 16 bits are kept."""
    plan = Plan("rows", lanes, 8, tiles=4 if lanes == 4 else 8)
    shape = 4 * 32 // lanes * 2, lanes * 8 * plan.tiles
    x, _ = rows_of_every_kind(rng, shape, dtype, dtype)
    got = interpret("log_softmax", (x, None), dtype=np.dtype(dtype), plan=plan)
    check("log_softmax", got, oracle.log_softmax(x), dtype)


# --- workarounds: what fails today, so that they are taken out when it no longer does -


@usable
@pytest.mark.versions
@pytest.mark.parametrize(
    ("f", "dtype", "error"),
    [
        (jnp.log1p, "float32", "Unimplemented primitive .* log1p"),
        (lambda x: jnp.where(x, 1.0, 0.0), "bool", "must be a multiple of bytes"),
    ],
    ids=["log1p", "loads of bools"],
)
def test_not_in_mosaic(f, dtype, error):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    layout = mosaic_gpu_problem.tile_layout(Plan("registers", 32, 4))

    def body(x, y):
        y[...] = plgpu.layout_cast(f(_compat.mosaic_load(x.at[...], layout)), layout)

    warpgroup = plgpu.LoweringSemantics.Warpgroup
    kernel = plgpu.kernel(
        body,
        out_type=struct((4, 128), "float32"),
        compiler_params=plgpu.CompilerParams(lowering_semantics=warpgroup),
    )
    with pytest.raises((NotImplementedError, ValueError), match=error):
        lower_for_h100(kernel, struct((4, 128), dtype))


@usable
def test_layouts_are_found():
    """Before jax 0.11, only with a cast of each number that is broadcast to a tile."""
    call = call_of(WITH_GRADIENT, (8, 13 * 128), "float32", "float32")
    x, _, *rest = call.arrays
    arrays = (x, struct((1, x.shape[1]), "bool"), *rest)
    lowers(dataclasses.replace(call, arrays=arrays), long_4("shared", 2, 2))


@usable
@pytest.mark.parametrize("op", OPS)
def test_a_larger_share_is_no_longer_program(op):
    """The tiles are a loop: all at once, kernels took up to 15 s to compile."""

    def program(tiles):
        call = call_of(op, (8, 8 * 4 * tiles * 128), "float32", "float32")
        given = [a for a in call.arrays if a is not None]

        def run(*given):
            rest = iter(given)
            arrays = [None if a is None else next(rest) for a in call.arrays]
            return mosaic_gpu.run(call, arrays, Plan("shared", 32, 4, 8, 1, tiles))

        return str(jax.make_jaxpr(run)(*given)).count("\n")

    assert program(8) == program(16)


# --- the table ------------------------------------------------------------------------


def entries_held(itemsize, split):
    _, blocks, warpgroups, tiles, *_ = split
    return blocks * warpgroups * tiles * 4 * 32 * 16 // itemsize


@pytest.mark.parametrize(
    ("op", "bytes_of_a_lane", "lanes"),
    [
        ("softmax", 8, 32),
        ("softmax_derivative", 8, 32),
        ("log_softmax_pullback", 16, 16),
        (WITH_GRADIENT, 8, 32),
        (mosaic_gpu_plans.ELEMENTWISE, 16, 16),
        ("log_sum_exp_state", 8, 32),
    ],
)
def test_plans_of_odd_multiples_of_128(op, bytes_of_a_lane, lanes):
    """In 16 bits, where 32 lanes with 16 bytes each would be twice as many entries."""
    plan = plan_for((op, False), 151936)
    assert (2 * plan.vector, plan.lanes) == (bytes_of_a_lane, lanes)


def test_weights_as_labels_are_of_whole_tiles():
    """Of rows of any length there is no kernel for them."""
    for length in range(1152, 16384, 128):
        x = struct((64, length), "bfloat16")
        call = RowCall(
            "cross_entropy", (-1,), 1.0, np.dtype("bfloat16"), Options(), (x, None, x)
        )
        problem = mosaic_gpu.problem_of(call)
        assert not isinstance(problem, str), problem
        assert not problem.plan.ragged, length


@pytest.mark.parametrize("kind", KINDS)
def test_one_block_has_a_row_of_any_length(kind):
    """Not a cluster of two, with little for each."""
    block = 4 * 32 * 4 * (1 if kind[1] else 2)  # entries of a tile that has one row
    for length in range(128, 16 * block, 128):
        plan = plan_for(kind, length)
        if length % block and not isinstance(plan, str):
            assert plan.blocks == 1, (length, plan)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 3, 64])
def test_plans_hold_their_rows_and_fit_the_gpu(kind, rows):
    (op, wide), splits = kind, mosaic_gpu_plans._SPLITS[kind]
    arrays, itemsize = 2 if op in READS_TWO else 1, 4 if wide else 2
    short = range(16, 4096, 16)
    for length in (*LENGTHS, *short, *range(128, 2**18 + 2**14, 128)):
        plan = plan_for(kind, length, rows)
        block = 4 * 32 * 16 // itemsize  # entries of a tile that has one row
        if isinstance(plan, str):
            assert length % block, plan
            assert length * itemsize < 3000, (length, plan)
            continue
        if plan.ragged:
            most = 32 if kind == ("log_softmax_pullback", False) else 16
            assert length % 128 or (length % block and length < most * block), plan
            continue
        assert plan.vector * itemsize in (8, 16), plan
        assert length % plan.width == 0, plan
        units = length // plan.width
        assert plan.blocks <= 16, plan  # the largest cluster
        assert 128 * plan.warpgroups <= 1024, plan
        if plan.place == "rows":
            assert plan.tiles == units, plan
            assert plan.height <= rows, plan
            continue
        share = plan.height * plan.tiles
        assert units >= share, plan  # or the last one would begin before its row
        parts = plan.blocks * plan.warpgroups
        shares = -(-units // (parts * share)) * parts  # of all chunks
        owned_by_last = units - (shares - 1) * share
        assert not plan.kept or owned_by_last > plan.kept * plan.height, plan
        if plan.place == "shared":
            staged = share - plan.kept * plan.height
            block = arrays * plan.warpgroups * staged * plan.width * itemsize
            exchanged = 5 * 1024  # each reference begins at a multiple of 1024 bytes
            assert block + exchanged <= 227 * 1024, plan
        most = max(map(entries_held, itertools.repeat(itemsize), splits))
        assert (parts * share < units) == (length > most), plan
        if plan.place == "registers" and length > 4096:
            assert parts * share == units, plan  # nothing is computed twice


STRIP_SHAPES = [(1, 8192, 16384), (4, 1000, 40), (4, 65536, 64), (16, 512, 8)]


@stripped
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("shape", STRIP_SHAPES, ids=str)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.pairwise(1)
def test_strips_lower(op, shape, dtype):
    lowers(call_of(op, shape, dtype, dtype, axis=(-2,)))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_strips_are_split(op, itemsize):
    """For all shapes: what a plan must be for its kernel to be right."""
    arrays = 2 if op in READS_TWO else 1
    sizes = [8, 16, 24, 32, 40, 64, 1000, 2048, 16384]
    for length, inner in itertools.product((*range(1, 80), *LENGTHS, 2**20), sizes):
        plan = mosaic_gpu_strip_plans.plan(
            op=op, length=length, inner=inner, itemsize=itemsize, narrowest=itemsize
        )
        if isinstance(plan, str):
            continue
        unit = 32 // plan.lanes
        assert plan.width <= inner, plan
        assert plan.width * itemsize % 16 == 0, plan
        assert length % unit == 0, plan
        units, share = length // unit, 4 * plan.tiles
        assert plan.blocks <= 16, plan
        assert units >= share, plan
        assert share <= 256, plan  # of a copy
        shares = -(-units // (plan.blocks * share)) * plan.blocks  # of all chunks
        owned_by_last = units - (shares - 1) * share
        assert not plan.kept or owned_by_last > plan.kept * 4, plan
        staged = (share - 4 * plan.kept) * 32 * plan.vector * itemsize * arrays
        assert staged + 16 * 1024 <= 227 * 1024, plan


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 3, 64])
def test_plans_of_ragged_rows_hold_them_and_fit_the_gpu(kind, rows):
    arrays, itemsize = 2 if kind[0] in READS_TWO else 1, 4 if kind[1] else 2
    lengths = [n for n in LENGTHS[1:] for n in (n - 1, n + 1, n + 60)]
    for length in (513, 1000, 1500, 30522, 50257, *lengths):
        plan = plan_for(kind, length, rows)
        if isinstance(plan, str):
            assert length > 2**18 + 1 or length * itemsize < 3000, (length, plan)
            continue
        assert plan.ragged, length
        assert plan.vector * itemsize == 16, plan
        tile = plan.width * (plan.height if plan.place == "shared" else 1)
        held = plan.blocks * plan.warpgroups * plan.tiles * tile
        # Wherever it starts among the 16 bytes of an array of 16 bits.
        assert held >= length + 8 - math.gcd(8, length), plan
        assert plan.place == "shared" or plan.height <= rows, plan
        entries = plan.warpgroups * plan.tiles * plan.width * plan.height
        assert arrays * entries * itemsize + 5 * 1024 <= 227 * 1024, plan
        assert plan.blocks <= 16, plan
        assert 128 * plan.warpgroups <= 1024, plan


@pytest.mark.parametrize("kind", list(mosaic_gpu_plans._RAGGED_SPLITS))
def test_every_line_for_ragged_rows_is_used(kind):
    for split in mosaic_gpu_plans._RAGGED_SPLITS[kind]:
        plan = plan_for(kind, entries_held(4 if kind[1] else 2, split) - 9)
        assert split[:3] == entry(plan)


@pytest.mark.parametrize("wide", [True, False])
def test_every_line_for_states_of_ragged_rows_is_used(wide):
    for split in mosaic_gpu_plans._RAGGED_STATES:
        length = entries_held(4 if wide else 2, split) - 9
        for op, arrays in (("cross_entropy", 1), ("softmax_derivative_state", 2)):
            plan = plan_for((op, wide), length)
            room = 227 // (2 * arrays)  # for so many tiles of 2 KiB
            if split.warpgroups * (split.tiles + 1) < room:
                assert split[:3] == entry(plan)
                assert plan.warpgroups * plan.tiles < room
            else:
                assert "more than a cluster holds" in plan


@usable
@pytest.mark.parametrize(
    ("dtype", "out", "length", "align"),
    [
        ("bfloat16", "bfloat16", 50257, 64),
        ("bfloat16", "bfloat16", 1000, 32),  # 1056 entries would need a fifth tile
        ("float32", "float32", 1529, 8),
        ("float32", "bfloat16", 1501, 32),
    ],
)
def test_windows_begin_at_lines_where_there_is_room(dtype, out, length, align):
    problem = mosaic_gpu.problem_of(call_of("softmax", (64, length), dtype, out))
    assert problem.ragged.align == align


@pytest.mark.parametrize("kind", KINDS)
def test_every_line_of_the_table_is_used(kind):
    for split in mosaic_gpu_plans._SPLITS[kind]:
        most = entries_held(4 if kind[1] else 2, split)
        plans = [plan_for(kind, length) for length in (most, most * 15 // 16)]
        assert split[:3] in map(entry, plans) or plans[0].place == "rows", most


@pytest.mark.parametrize(
    ("itemsize", "length", "places"),
    [(4, 2048, ("registers", "shared")), (2, 8192, ("registers", "shared"))],
)
def test_less_of_a_masked_row_is_in_registers(itemsize, length, places):
    """Of log_softmax, beyond the first line of its own table."""
    plans = [
        mosaic_gpu_plans.plan(
            op="log_softmax", rows=64, length=length, itemsize=itemsize, mask=mask
        )
        for mask in (None, ((8, 0), (8, 1)))
    ]
    assert tuple(plan.place for plan in plans) == places


def test_lanes_of_one_warp_have_a_short_row():
    for kind in KINDS:
        op, wide = kind
        most = mosaic_gpu_plans.most_short_tiles(op_of(op), wide)
        vector = 4 if kind[1] else 8
        assert plan_for(kind, 2 * vector).lanes == 2
        assert plan_for(kind, 32 * vector * most).place == "rows"
        assert plan_for(kind, 32 * vector * 2 * most).place != "rows"


# --- refusals -------------------------------------------------------------------------

X = (64, 4096)
WEIGHTED = struct((64, 1000), "float32")
REFUSALS = {
    "float64": (call_of("softmax", X, "float64", "float64"), "float64 has no kernel"),
    "float64 out": (call_of("softmax", X, "float32", "float64"), "float64 has no"),
    "float8": (
        call_of("softmax", X, "float8_e4m3fn", "bfloat16"),
        "float8_e4m3fn has no kernel",
    ),
    "length": (
        call_of("softmax", (64, 600001), "float32", "float32"),
        "rows of 600001 entries, no multiple of 128, are more than a cluster holds",
    ),
    "short ragged rows": (
        call_of("softmax", (64, 201), "float32", "float32"),
        "rows of 201 entries are too short",
    ),
    "weights as labels": (
        RowCall(
            "cross_entropy",
            (-1,),
            1.0,
            np.dtype("float32"),
            Options(),
            arrays=(WEIGHTED, None, WEIGHTED),
        ),
        "weights of 1000 entries as labels, no multiple of 128",
    ),
    "few short rows": (
        call_of("softmax", (1, 128), "float32", "float32"),
        "1 rows of 128 entries are too short",
    ),
    "several axes": (
        call_of("softmax", (2, 64, 128), "float32", "float32", axis=(-3, -1)),
        "what is reduced, or masked, is in several places in memory",
    ),
    "unaligned strips": (
        call_of("softmax", (64, 1002), "float32", "float32", axis=(-2,)),
        "1002 rows side by side, which are no multiple of 16 bytes",
    ),
    "odd rows in narrow strips": (
        call_of("softmax", (63, 32), "float32", "float32", axis=(-2,)),
        "32 rows side by side of 63 entries",
    ),
    "mask along no part of rows side by side": (
        call_of("softmax", (8, 64, 128), "float32", "float32", (8, 1, 1), (-2,)),
        "where varies along no part of a row",
    ),
    "state of rows side by side": (
        RowCall(
            "log_sum_exp_state",
            (-2,),
            1.0,
            np.dtype("float32"),
            arrays=(struct(X, jnp.float32), None),
        ),
        "a state of rows that are not last in memory",
    ),
    "mask along part of a row": (
        call_of("softmax", (8, 4, 128), "float32", "float32", (8, 1, 128), (-2, -1)),
        "where varies along part of a row",
    ),
    "mask along no part of a row": (
        call_of("softmax", (8, 4, 128), "float32", "float32", (8, 4, 1)),
        "or along no part of it",
    ),
    "empty": (call_of("softmax", (0, 128), "float32", "float32"), "an empty array"),
}


@usable
@pytest.mark.parametrize("case", list(REFUSALS))
def test_refused_calls(case):
    call, reason = REFUSALS[case]
    assert reason in mosaic_gpu.refusal(call, H100)
    with pytest.raises(NotImplementedError, match="mosaic_gpu: "):
        mosaic_gpu.run(call, [None, None])


@usable
@pytest.mark.parametrize(
    ("device", "reason"),
    [
        (Device("cpu"), "needs an NVIDIA GPU, the platform is cpu"),
        (Device("rocm", "MI300"), "needs an NVIDIA GPU, the platform is rocm"),
        (Device("cuda"), "the GPU's compute capability is not known"),
        (Device("cuda", "A100", (8, 0)), "9.0 or newer, the GPU has 8.0"),
        (Device("cuda", "L4", (8, 9)), "9.0 or newer, the GPU has 8.9"),
        (H100, None),
        (Device("cuda", "B200", (10, 0)), None),
    ],
)
def test_refused_devices(device, reason):
    call = call_of("softmax", X, "float32", "float32")
    got = mosaic_gpu.refusal(call, device)
    assert got is None if reason is None else reason in got


@pytest.mark.skipif(
    jax.__version_info__ >= (0, 10, 2), reason="from 0.10.2 on there are kernels"
)
def test_refused_versions():
    call = call_of("softmax", X, "float32", "float32")
    assert "needs jax 0.10.2 or newer" in mosaic_gpu.refusal(call, H100)


@pytest.mark.parametrize("f", [jaxsoftmax.softmax, jaxsoftmax.log_softmax])
def test_asked_for_where_it_cannot_run(f):
    with pytest.raises(NotImplementedError) as info:
        f(jnp.ones((64, 4096)), implementation="mosaic_gpu")
    message = str(info.value)
    assert "implementation='mosaic_gpu' cannot run" in message
    assert "needs an NVIDIA GPU, the platform is cpu" in message
    assert "These can: ['xla'" in message


@usable
@pytest.mark.parametrize("f", [jaxsoftmax.softmax, jaxsoftmax.log_softmax])
def test_chosen_for_a_gpu(f):
    """The value's kernel and the gradient's, each after it was tried."""
    gradient = jax.grad(lambda x: jnp.sum(jnp.sin(f(x))))
    explain = functools.partial(jaxsoftmax.explain_for("cuda", H100.kind), gradient)
    choices = explain(struct((8192, 4096), jnp.bfloat16)).choices
    assert [choice.implementation for choice in choices] == ["mosaic_gpu"] * 2
    assert not any(choice.refusals for choice in choices)
