"""Measures what tables in the library choose from: plans of kernels, sizes of blocks.

    python benchmarks/tune.py rows --json F.json --markdown docs/tune_mosaic_gpu.md
    python benchmarks/tune.py strips --json F.json --markdown F.md
    python benchmarks/tune.py losses --json F.json --markdown docs/tune_cross_entropy.md
    python benchmarks/tune.py states --json F.json --markdown docs/tune_states.md
    python benchmarks/tune.py attention --json F.json --markdown F.md

Plans are those of the Mosaic GPU kernels in jaxsoftmax/_rows/mosaic_gpu_plans.py, whose
tables are written by hand. Every kernel is compiled with every candidate plan. Time is
that of the device, from CUPTI, the median of some calls; the rate to compare with is
that of a negation of as many entries, measured before each case.

- rows: softmax, log_softmax and their derivatives. GB/s counts the fewest bytes:
  forward one read and one write, backward two reads and one write; the backward kernels
  get what the forward keeps as operands. A few rows of every result are checked against
  numpy in float64; a candidate that is wrong has no rate. The page marks the plan that
  the table gives now, also of older figures (`--render F.json`).
- strips: the same of rows that lie side by side, `--inner` of them.
- both: as with gpu_softmax.py, `--export FOLDER` lowers the plans elsewhere, for
  `--exported FOLDER`; a program takes a second to lower, and a GPU's time is short.
- losses: cross-entropy with its gradient, where one kernel reads a row of logits and
  writes its gradient: GB/s of one read and one write, with the small kernels that look
  up a label's logit before and after. The loss alone has the plans of states. Values
  are checked by tests/gpu/check_cross_entropy.py.
- states: the few numbers that a device computes of its share of a row that several
  devices have. The kernel reads its arrays once and writes next to nothing: GB/s that
  are read. Values are checked by tests/gpu/check_sharding.py.
- attention: `implementation="xla"`, traced with other sizes of the blocks in
  jaxsoftmax/_attend/xla.py, and once as they are there. What is timed, and how, is as
  in gpu_attention.py.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import math
import statistics
from unittest import mock

import gpu_attention
import gpu_softmax
import harness
import jax
import jax.numpy as jnp
import numpy as np
import report
from support import oracle

import jaxsoftmax
from jaxsoftmax._attend import xla as xla_attention
from jaxsoftmax._rows import (
    mosaic_gpu,
    mosaic_gpu_plans,
    mosaic_gpu_strip_plans,
    xla,
    xla_loss,
)
from jaxsoftmax._rows.call import RowCall, function_of
from jaxsoftmax._rows.mosaic_gpu_plans import Plan
from jaxsoftmax._rows.row_loss import Options

# --- a run of plans -------------------------------------------------------------------


def call_of(op, arrays, dtype, options=None, axis=-1):
    structs = tuple(
        None if a is None else jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays
    )
    dtype = np.dtype(jnp.dtype(dtype))
    return RowCall(op, (axis,), 1.0, dtype, options, arrays=structs)


def program(call, plan, smoke):
    """The kernel with a plan; in a smoke test, what XLA has in its place."""

    def run(*arrays):
        if smoke:
            return xla_loss.run(call, arrays)
        return mosaic_gpu.run(call, arrays, plan)

    return jax.jit(run)


def plan_text(plan):
    if plan.place == "rows":
        return f"rows, {plan.lanes} lanes, {plan.tiles}"
    kept = f", {plan.kept} kept" if plan.kept else ""
    lanes = f", {plan.lanes} lanes by {plan.vector}" if plan.lanes < 32 else ""
    split = f"{plan.blocks} x {plan.warpgroups} x {plan.tiles}"
    return f"{plan.place}{lanes}, {split}{kept}"


def table_plan(op, shape, dtype, inner=None):
    """What the table has for rows, or strips of them; a str says why nothing."""
    rows, n = shape
    itemsize = jnp.dtype(dtype).itemsize
    if inner is not None:
        sizes = {"itemsize": itemsize, "narrowest": itemsize}
        return mosaic_gpu_strip_plans.plan(op=op, length=n, inner=inner, **sizes)
    return mosaic_gpu_plans.plan(
        op=op, rows=rows, length=n, itemsize=itemsize, mask=None
    )


def exported_path(folder, plan, keys):
    return harness.exported_path(folder, *keys.values(), plan_text(plan))


class Tuner:
    """The result of a run, and what adds cases to it."""

    def __init__(self, args):
        if args.smoke:
            args.elements, args.ns = 2**17, args.smoke_ns
        self.args = args
        # Of programs that are lowered elsewhere, where the program of plans has that.
        self.export = getattr(args, "export", None)
        self.exported = getattr(args, "exported", None)
        self.pool = concurrent.futures.ThreadPoolExecutor(args.jobs)
        clock = "host" if args.smoke else "CUPTI"
        sizes = {"elements": args.elements, "iterations": args.iterations}
        self.result = harness.described([], clock) | sizes | {"not_run": []}
        harness.say(*(self.result[key] for key in ("device", "driver", "versions")))

    def no_time(self, *case):
        """Whether there is none left; what is left out for that is noted."""
        late = harness.out_of_time(self.args)
        if late:
            self.result["not_run"].append(" ".join(map(str, case)))
        return late

    def rate(self, call, nbytes):
        """Milliseconds, the median of some calls, and GB/s."""
        clock = harness.device_ms(self.args)
        ms = statistics.median(clock([call] * self.args.iterations)[0])
        return ms, round(nbytes / ms / 1e6, 1)

    def normal(self, dtype):
        """Two flat arrays; what they are like, where nothing is run."""
        if self.export:
            return [jax.ShapeDtypeStruct((self.args.elements,), dtype)] * 2
        return [harness.normal(seed, self.args.elements, dtype) for seed in (0, 1)]

    def export_plans(self, plans, call, arrays, keys):
        for plan in plans:
            path = exported_path(self.export, plan, keys)
            try:
                with harness.gpu_that_is_not_there():
                    harness.export(path, [(program(call, plan, False), arrays)])
            except Exception as error:  # which is one where it is measured, too
                harness.say(path.name, harness.first_line(error))
        harness.say(*keys.values(), f"{len(plans)} plans")

    def lower(self, call, plan, arrays, keys):
        if self.exported:
            return harness.read_exported(exported_path(self.exported, plan, keys))
        return [program(call, plan, self.args.smoke).lower(*arrays)]

    def add(self, **cell):
        self.result["cells"].append(cell)
        harness.write(self.args.json, self.result)
        return cell

    def case(self, plans, call, arrays, nbytes, check=None, **keys):
        """All plans of a case: lowered in turn, compiled in threads meanwhile."""
        negate = functools.partial(jax.jit(jnp.negative), arrays[0])
        copy = self.rate(negate, 2 * arrays[0].nbytes)[1]
        cell = self.add(**keys, copy_gbps=copy, candidates=[])
        lowered = functools.partial(harness.Compiling, self.pool, self.lower, call)
        started = {p: lowered(p, arrays, keys) for p in plans}
        for plan, compiling in started.items():
            if self.no_time(*keys.values(), plan_text(plan)):
                continue
            found = {"plan": dataclasses.asdict(plan)}
            try:
                run = functools.partial(compiling.programs()[0], *arrays)
                found["compile_s"] = round(compiling.seconds, 2)
                wrong = None
                if check is not None:
                    found["row_error"], wrong = check(run())
                if wrong is None:
                    found["ms"], found["gbps"] = self.rate(run, nbytes)
                else:
                    found["failed"] = wrong
            except Exception as error:  # the others are still worth measuring
                found["failed"] = harness.first_line(error)
            rate = found.get("gbps", found.get("failed"))
            harness.say(*keys.values(), f"{plan_text(plan)}: {rate}")
            cell["candidates"].append(found)
            harness.write(self.args.json, self.result)


def failures(result):
    """The plans that are wrong, or do not run."""
    return [
        f"{cell['dtype']} {cell['n']} {found['plan']}: {found['failed']}"
        for cell in result["cells"]
        for found in cell.get("candidates", [])
        if "failed" in found
    ]


# --- the page of plans ----------------------------------------------------------------


def plans_page(title, note, result):
    """For each dtype and length a table: a row per plan, a column per kernel, GB/s."""
    made_by = result.get("made_by", f"`{result.get('command')}`")
    lines = [
        f"# {title} on {result['device']}",
        "",
        f"Made by {made_by}, {report.versions(result)}; "
        f"{result['elements']:,} entries. {note} A plan: where a share of a row is "
        "kept, blocks of a cluster x warpgroups of a block x tiles; or for short rows "
        "lanes of a warp, and tiles. A star is at the plan that "
        "`jaxsoftmax/_rows/mosaic_gpu_plans.py` has now.",
        "",
    ]
    groups = {}
    for cell in result["cells"]:
        key = cell["dtype"], cell["n"], cell.get("inner", 0)
        groups.setdefault(key, []).append(cell)
    for (dtype, n, inner), cells in sorted(groups.items()):
        beside = f", {inner:,} side by side" if inner else ""
        columns = [plan_rates(cell, result["elements"]) for cell in cells]
        plans = dict.fromkeys(plan for each in columns for plan in each)
        names = sorted(plans, key=lambda plan: plan == "copy")
        rows = [[plan, *(each.get(plan, "") for each in columns)] for plan in names]
        lines += [f"## {dtype}, rows of {n:,}{beside}", ""]
        lines += report.table(["plan", *(cell["column"] for cell in cells)], rows)
    remarks = list(result.get("remarks", []))
    remarks += [f"Not run, for want of time: {case}." for case in result["not_run"]]
    return "\n".join([*lines, *(f"- {remark}" for remark in remarks)]).rstrip() + "\n"


def plan_rates(cell, elements):
    """By plan, as it is written: GB/s, with a star at the plan in the table."""
    n, op = cell["n"], cell["column"]
    if "refused" in cell:
        return {"none": cell["refused"]}
    table = None
    if op in KERNELS:
        shape, inner = (elements // n, n), cell.get("inner")
        table = table_plan(KERNELS[op], shape, cell["dtype"], inner)
    found = {}
    for each in cell["candidates"]:
        plan = Plan(**each["plan"])
        rate = f"{each['gbps']:,.0f}" if "gbps" in each else each["failed"][:40]
        found[plan_text(plan)] = rate + ("*" if plan == table else "")
    return found | {"copy": f"{cell['copy_gbps']:,.0f}"}


# --- rows -----------------------------------------------------------------------------

NS = [1024, 4096, 8192, 16384, 32768, 65536, 131072, 262144, 1048576]
# The names of benchmarks/gpu_softmax.py, and the kernels'.
KERNELS = {
    "softmax": "softmax",
    "softmax_backward": "softmax_derivative",
    "log_softmax": "log_softmax",
    "log_softmax_backward": "log_softmax_pullback",
}


def candidates(table, shape, dtype):
    """The plans to measure, the table's own first.

    A lane loads 16 bytes at once, or as much as divides the row among 32 lanes. The
    rest follows from how the row is split:

    - "rows": as many lanes of a warp, up to 32, as divide the row; and fewer, at least
      4, of up to 4 tiles. Up to 8 tiles.
    - "registers", "shared": 1 to 16 blocks by 1, 2 or 4 warpgroups, and as few tiles as
      hold the row: 1 to 8 in registers, 4 to 16 in shared memory. One tile only where
      there is no cluster; four warpgroups only in clusters of 16. And any number of
      blocks where few of these powers of two have little of the row in common. Of 8
      blocks or more and of 8 tiles or more, with 2, 4 or 6 of them in registers too.
    - "shared", only where none of these holds the row: 16 blocks, 1 to 4 warpgroups,
      4 to 16 tiles at a time, of them none or three eighths in registers.

    Of a row whose length is no multiple of 128: "warps", to 128 entries per lane, and
    those of "shared" that hold it wherever it starts.
    """
    rows, n = shape
    vector = 16 // jnp.dtype(dtype).itemsize
    found, whole_vector = [table, *short_candidates(rows, n, vector)], vector
    while n % (32 * vector):
        vector //= 2
        if not vector:
            found += ragged_candidates(rows, n, whole_vector)
            return list(dict.fromkeys(found))
    more_tiles = whole_vector // vector
    long = list(long_candidates(n // (32 * vector), vector, more_tiles))
    if not long:
        long = list(chunk_candidates(n // (32 * vector), vector))
    return list(dict.fromkeys([*found, *long]))


def short_candidates(rows, n, vector):
    lanes = 32
    while lanes >= 2 and n % (lanes * vector):
        lanes //= 2
    fewer = [k for k in (4, 8, 16) if k < lanes and n <= 4 * k * vector]
    for each in (lanes, *fewer):
        tiles = n // (each * vector)
        if each >= 2 and tiles <= 8 and rows >= 4 * 32 // each:
            yield Plan("rows", each, vector, tiles=tiles)


def ragged_candidates(rows, n, vector):
    units = -(-(n + 8) // (32 * vector))
    if rows >= 4 and units * vector <= 128:
        yield Plan("warps", 32, vector, tiles=units, ragged=True)
    for plan in long_candidates(units, vector, 1):
        if plan.place == "shared":
            yield dataclasses.replace(plan, ragged=True)


def long_candidates(units, vector, more_tiles):
    """Several times as many tiles where a load is of so much less than 16 bytes."""
    powers = (1, 2, 4, 8, 16)
    for blocks, warpgroups in itertools.product(range(1, 17), (1, 2, 4)):
        parts = 4 * blocks * warpgroups
        tiles = -(-units // parts)
        if 4 * tiles > units or (warpgroups == 4 and blocks < 16):
            continue
        if blocks not in powers and parts * tiles - units > 0.02 * units:
            continue
        split = vector, blocks, warpgroups, tiles
        if tiles <= 8 * more_tiles and (tiles > 1 or blocks == 1):
            yield Plan("registers", 32, *split)
        if 4 <= tiles <= 16 * more_tiles:
            yield Plan("shared", 32, *split)
            for kept in (2, 4, 6):
                plan = Plan("shared", 32, *split, kept=kept)
                enough = mosaic_gpu_plans.owned_by_last(plan, units, 4) > 4 * kept
                if blocks >= 8 and tiles >= 8 and enough:
                    yield plan


def chunk_candidates(units, vector):
    for split in itertools.product((16,), (1, 2, 4), (4, 8, 16)):
        plan = Plan("shared", 32, vector, *split)
        if math.prod(split[1:]) <= 32:  # in shared memory, also two arrays
            yield plan
        plan = dataclasses.replace(plan, kept=plan.tiles * 3 // 8)
        if mosaic_gpu_plans.owned_by_last(plan, units, 4) > 4 * plan.kept:
            yield plan


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def operands(op, x, g, shape, axis):
    """The kernel's arguments, None for the mask."""
    x, g = x.reshape(shape), g.reshape(shape)
    if op == "softmax_backward":
        return jaxsoftmax.softmax(x, axis, implementation="xla"), g
    if op == "log_softmax_backward":
        call = RowCall("log_sum_exp_state", (axis,), 1.0, np.dtype(np.float32))
        return x, None, *xla.log_sum_exp_state(x, None, call), g
    return x, None


def expected(case, arrays):
    """Some rows in float64 at least, from the operands as they are rounded."""
    some = gpu_softmax.check_rows(case)
    first = gpu_softmax.some_rows(arrays[0], case.axis, some)
    if not case.op.endswith("_backward"):
        return getattr(oracle, case.op)(first)
    g = gpu_softmax.some_rows(arrays[-1], case.axis, some)
    softmax = case.op == "softmax_backward"
    return (oracle.softmax_derivative if softmax else oracle.log_softmax_vjp)(first, g)


def failed_check(case, arrays, want, got):
    """The worst row error, and what is wrong with the result, if anything is."""
    wrong = None
    if case.op == "log_softmax":
        got, row_max, _ = got
        if not (row_max == arrays[0].max(case.axis, keepdims=True)).all():
            wrong = "a row's maximum is wrong"
    error = gpu_softmax.row_error(case, got, want)
    bar = gpu_softmax.BAR[case.dtype]
    if not error <= bar:
        wrong = f"row error {error:.1e} above {bar:.0e}"
    return error, wrong


def measure_rows(args):
    tuner = Tuner(args)
    for dtype in args.dtypes:
        flat = tuner.normal(dtype)
        for n, op in itertools.product(args.ns, args.ops):
            keys = {"column": op, "dtype": dtype, "n": n}
            if tuner.no_time(*keys.values()):
                continue
            case = gpu_softmax.Case(op, dtype, (args.elements // n, n))
            table = table_plan(KERNELS[op], case.shape, dtype)
            plans = functools.partial(candidates, table, case.shape, dtype)
            measure_case(tuner, case, flat, table, plans, **keys)
    return tuner.result


def measure_case(tuner, case, flat, table, plans, **keys):
    """The plans of one case, if the table has one; its operands made of what it needs.

    `plans` is a function.
    """
    if isinstance(table, str):
        tuner.add(**keys, candidates=[], refused=table)
        return
    whole = math.prod(case.shape)

    def make(*flat):
        some = (a[:whole] for a in flat)
        return operands(case.op, *some, case.shape, case.axis)

    arrays = (functools.partial(jax.eval_shape, make) if tuner.export else make)(*flat)
    call = call_of(KERNELS[case.op], arrays, case.dtype, axis=case.axis)
    if tuner.export:
        tuner.export_plans(plans(), call, arrays, keys)
        return
    check = functools.partial(failed_check, case, arrays, expected(case, arrays))
    tuner.case(plans(), call, arrays, case.bytes, check, **keys)


# --- strips ---------------------------------------------------------------------------


STRIP_NS, INNER = [64, 256, 1024, 2048, 4096, 8192, 16384, 65536], [64, 2048, 16384]


def strip_candidates(table, n, inner, itemsize):
    """The plans to measure, the table's own first.

    Segments of 64 to 256 bytes, of which a lane loads 8 or 16 at once; 1 to 16 blocks
    with 16 to 64 KiB of an array each, of which none or a quarter is in registers. Of
    longer rows, 16 blocks with chunks of 32 or 64 KiB each.
    """
    found = [table]
    for segment, at_once in itertools.product((64, 128, 256), (8, 16)):
        lanes, vector = segment // at_once, at_once // itemsize
        unit = 32 // lanes
        if vector < 4 or lanes > 16 or lanes * vector > inner or n % unit:
            continue
        units, tile = n // unit, 128 * at_once
        for blocks in (1, 2, 4, 8, 16):
            tiles = -(-units // (4 * blocks))
            sizes = [tiles] if 2**14 <= tiles * tile <= 2**16 else []
            if blocks == 16 and tiles * tile > 2**16:
                sizes = [2**15 // tile, 2**16 // tile]
            for each, quarter in itertools.product(sizes, (False, True)):
                kept = each // 4 if quarter else 0
                plan = Plan("shared", lanes, vector, blocks, 1, each, kept=kept)
                owned = mosaic_gpu_plans.owned_by_last(plan, units, 4)
                if 4 * each <= units and (not kept or owned > 4 * kept):
                    found.append(plan)
    return list(dict.fromkeys(found))


def measure_strips(args):
    tuner = Tuner(args)
    for dtype in args.dtypes:
        flat = tuner.normal(dtype)
        for n, inner, op in itertools.product(args.ns, args.inner, args.ops):
            keys = {"column": op, "dtype": dtype, "n": n, "inner": inner}
            if n * inner > args.elements or tuner.no_time(*keys.values()):
                continue
            shape = (args.elements // (n * inner), n, inner)
            case = gpu_softmax.Case(op, dtype, shape, axis=-2)
            table = table_plan(KERNELS[op], (shape[0], n), dtype, inner)
            itemsize = jnp.dtype(dtype).itemsize
            plans = functools.partial(strip_candidates, table, n, inner, itemsize)
            measure_case(tuner, case, flat, table, plans, **keys)
    return tuner.result


# --- losses ---------------------------------------------------------------------------

MOST_SHARED_BYTES = 200_000
# By length, in registers and in shared memory: blocks of a cluster, warpgroups of a
# block, tiles of a warpgroup at most.
SPLITS = {
    16384: ([(2, 1, 8), (4, 1, 8)], [(1, 1, 16), (1, 2, 16), (2, 1, 16)]),
    32000: ([], [(1, 2, 16), (2, 1, 16), (2, 2, 8), (3, 1, 11), (4, 1, 8)]),
    32768: ([(2, 2, 8), (8, 1, 8)], [(1, 4, 16), (2, 1, 16), (4, 1, 16)]),
    65536: ([(4, 2, 8)], [(1, 4, 16), (2, 4, 16), (4, 2, 8), (4, 2, 16), (4, 4, 8)]),
    131072: (
        [(8, 2, 8)],
        [(2, 4, 16), (4, 4, 16), (8, 2, 8), (8, 2, 16), (8, 4, 8), (16, 2, 8)],
    ),
    128256: ([], [(4, 4, 8), (6, 2, 11), (6, 3, 7), (7, 2, 9), (8, 2, 8), (16, 1, 8)]),
    151936: (
        [],
        [
            *((4, 4, 19), (4, 5, 15), (5, 4, 15)),
            *((8, 2, 19), (8, 3, 13), (10, 2, 15), (12, 2, 13)),
        ],
    ),
    262144: ([], [(4, 4, 16), (8, 2, 16), (8, 4, 16), (16, 2, 16)]),
}
LOSSES = {
    "plain": Options(),
    "softcap, smoothing, z-loss": Options(
        softcap=30.0, uniform_nll=True, label_smoothing=0.1, z_loss=1e-4
    ),
}


def loss_plan(place, split, n, itemsize):
    """The plan with so many tiles as the row needs, or None if it does not hold it."""
    blocks, warpgroups, most = split
    vector = 16 // itemsize
    while n % (32 * vector):
        vector //= 2
    units = n // (32 * vector)
    tiles = -(-units // (4 * blocks * warpgroups))
    share = 4 * warpgroups * tiles * 32 * vector * itemsize
    if tiles > most or units < 4 * tiles:
        return None
    if place == "shared" and share > MOST_SHARED_BYTES:
        return None
    return Plan(place, 32, vector, blocks, warpgroups, tiles)


def loss_plans(n, itemsize, options):
    # In registers, what is computed twice with a cap would be kept, too.
    places = ("shared",) if options.softcap is not None else ("registers", "shared")
    found = (
        loss_plan(place, split, n, itemsize)
        for place, splits in zip(("registers", "shared"), SPLITS[n], strict=True)
        if place in places
        for split in splits
    )
    return list(dict.fromkeys(plan for plan in found if plan is not None))


def measure_losses(args):
    tuner, op = Tuner(args), "cross_entropy_with_gradient"
    for n, dtype in itertools.product(args.ns, args.dtypes):
        rows = args.elements // n
        x = harness.normal(0, rows * n, dtype).reshape(rows, n)
        labels = jnp.arange(rows, dtype=jnp.int32)[:, None] % n
        weight = jnp.full((rows, 1), 1 / rows, jnp.float32)
        arrays = (x, None, labels, weight, weight)
        for name, options in LOSSES.items():
            if tuner.no_time(dtype, n, name):
                continue
            call = call_of(op, arrays, dtype, options)
            plans = loss_plans(n, x.dtype.itemsize, options)
            keys = {"dtype": dtype, "n": n, "column": name}
            tuner.case(plans, call, arrays, 2 * x.nbytes, **keys)
        del x, arrays
    return tuner.result


# --- states ---------------------------------------------------------------------------

STATES = ("log_sum_exp_state", "softmax_derivative_state")
# (blocks of a cluster, warpgroups of a block, tiles of a warpgroup at a time)
STREAMS = [
    *((1, 1, 4), (1, 1, 8), (1, 2, 4), (1, 2, 8), (1, 4, 4)),
    *((2, 2, 4), (4, 1, 8), (4, 2, 4), (8, 1, 4)),
]


def measure_states(args):
    """The plan of the function that a state is for, which keeps the row, and others."""
    tuner = Tuner(args)
    for dtype in args.dtypes:
        x, g = (harness.normal(seed, args.elements, dtype) for seed in (0, 1))
        for n, op in itertools.product(args.ns, STATES):
            if tuner.no_time(dtype, n, op):
                continue
            shape = (args.elements // n, n)
            arrays = (x.reshape(shape), None)
            if op == "softmax_derivative_state":
                arrays = (jnp.abs(x).reshape(shape), g.reshape(shape))
            vector = 16 // x.dtype.itemsize
            plans = [table_plan(function_of(op), shape, dtype)]
            plans += [Plan("stream", 32, vector, *split) for split in STREAMS]
            nbytes = sum(a.nbytes for a in arrays if a is not None)
            keys = {"dtype": dtype, "n": n, "column": op}
            tuner.case(plans, call_of(op, arrays, dtype), arrays, nbytes, **keys)
    return tuner.result


# --- attention ------------------------------------------------------------------------

BLOCKS = [256, 512, 1024, 2048, 4096]
# (B, T, N, D)
SHAPES = [(4, 4096, 16, 64), (2, 8192, 16, 128)]


def block_programs(cell, sizes, pool):
    """(query block, key block) -> program, and the pair that the module chooses.

    They are traced in turn, as the sizes are global.
    """
    attend = functools.partial(
        *(jaxsoftmax.dot_product_attention,),
        **{"implementation": "xla", "is_causal": cell.causal},
    )
    choose, chosen = xla_attention._block_sizes, [(0, 0)]

    def recorded(*arguments, **options):
        # The last is what it is lowered with: shapes may be found with other sizes.
        chosen.append(choose(*arguments, **options))
        return chosen[-1]

    def up_to(pair):
        """As the module has it, but for the limits."""
        even = xla_attention._even_blocks
        return lambda entries, rows, *lengths, **_: tuple(map(even, lengths, pair))

    def traced(block_sizes):
        with mock.patch.object(xla_attention, "_block_sizes", block_sizes):
            jax.clear_caches()  # or it would be the program of other sizes
            return harness.Compiling(pool, gpu_attention.lower, attend, cell)

    own = traced(recorded)
    now = chosen[-1]
    found = {now: own}
    for pair in itertools.product([b for b in sizes if b <= cell.length], repeat=2):
        if pair not in found:
            found[pair] = traced(up_to(pair))
    jax.clear_caches()
    return found, now


def measure_attention(args):
    """The most wanted cells first."""
    shapes = [(2, 64, 2, 16)] if args.smoke else SHAPES
    sizes = [16, 32, 64] if args.smoke else args.blocks
    pool = concurrent.futures.ThreadPoolExecutor(args.jobs)
    result = harness.described([], "host")
    for mask, direction, shape in itertools.product(
        args.masks, args.directions, shapes
    ):
        cell = gpu_attention.Cell(shape, mask == "causal", direction)
        if harness.out_of_time(args):
            harness.say(f"{cell}: left out, for want of time")
            continue
        started, now = block_programs(cell, sizes, pool)
        harness.say(f"{cell}: traced {len(started)} programs")
        for program in started.values():
            program.wait()
        harness.say(f"{cell}: compiled")
        arrays = [x.reshape(cell.shape) for x in gpu_attention.flat_inputs(cell)]
        record = cell.record | {"title": str(cell), "now": now}
        result["cells"].append(record)
        runs = {
            f"{pair[0]} x {pair[1]}": functools.partial(
                gpu_attention.run_jax, cell, program, arrays, None
            )
            for pair, program in started.items()
        }
        harness.run_all(runs, record, result, args, None, str(cell))
    return result


def blocks_text(cell, pair):
    found = cell["results"].get(f"{pair[0]} x {pair[1]}")
    if found is None or "not_run" in found:
        return (found or {}).get("not_run", "").split(" (")[0][:40]
    rate = cell["flops"] / found["ms"] / 1e9
    memory = report.megabytes(found["extra_bytes"])
    return f"{found['ms']:.2f} ms, {rate:,.0f}, {memory}"


def attention_page(result):
    lines = [
        f"# Sizes of the blocks of attention on {result['device']}",
        "",
        f"Made by `{result['command']}`, {report.versions(result)}; bfloat16. Rows: "
        "queries of a block; columns: its keys. ms, TFLOP/s, memory beyond.",
        "",
    ]
    for cell in result["cells"]:
        pairs = [tuple(map(int, name.split(" x "))) for name in cell["results"]]
        queries, keys = (sorted({pair[i] for pair in pairs}) for i in (0, 1))
        rows = [[f"{q:,}", *(blocks_text(cell, (q, k)) for k in keys)] for q in queries]
        lines += [f"## {cell['title']}", ""]
        lines += report.table(["queries x keys", *(f"{k:,}" for k in keys)], rows)
        ms = {name: f["ms"] for name, f in cell["results"].items() if "ms" in f}
        now = " x ".join(map(str, cell["now"]))
        if ms:
            best = min(ms, key=ms.get)
            lines.append(f"Best: {best}, {ms[best]:.2f} ms.")
        if now in ms:
            lines.append(f"As in the module: {now}, {ms[now]:.2f} ms.")
        lines.append("")
    return "\n".join(lines)


# --- the program ----------------------------------------------------------------------


def plan_arguments(parser, elements, ns, smoke_ns):
    add, dtypes = parser.add_argument, gpu_softmax.DTYPES
    add("--dtypes", nargs="+", default=dtypes[:2], choices=dtypes)
    add("--ns", nargs="+", type=int, default=ns, help="lengths of the rows")
    add("--elements", type=int, default=elements, help="of each operand")
    add("--iterations", type=int, default=5, help="calls of which to take the median")
    add("--jobs", type=int, default=8, help="threads that compile")
    parser.set_defaults(smoke_ns=smoke_ns)


def rows_arguments(parser, **arguments):
    plan_arguments(parser, **arguments)
    ops = list(KERNELS)
    parser.add_argument("--ops", nargs="+", default=ops, choices=ops)
    parser.set_defaults(budget=540)


def strips_arguments(parser, **arguments):
    rows_arguments(parser, **arguments)
    about = "rows side by side"
    parser.add_argument("--inner", nargs="+", type=int, default=INNER, help=about)


def attention_arguments(parser):
    add, masks, passes = parser.add_argument, gpu_attention.MASKS, gpu_attention.PASSES
    add("--blocks", nargs="+", type=int, default=BLOCKS)
    add("--masks", nargs="+", default=masks, choices=masks)
    add("--directions", nargs="+", default=passes, choices=passes)
    add("--jobs", type=int, default=16, help="threads that compile")


def plans_program(measure, title, note, add=plan_arguments, exports=False, **arguments):
    return harness.Program(
        measure,
        functools.partial(plans_page, title, note),
        add_arguments=functools.partial(add, **arguments),
        failures=failures,
        about=title,
        export=measure if exports else None,
    )


PROGRAMS = {
    "rows": plans_program(
        *(measure_rows, "Plans of softmax, log_softmax and their derivatives"),
        "GB/s of the fewest bytes: forward one read and one write, backward two reads "
        "and one write.",
        *(rows_arguments, True),
        **{"elements": 2**27, "ns": NS, "smoke_ns": [100, 1024, 4096, 30592]},
    ),
    "strips": plans_program(
        *(measure_strips, "Plans of strips"),
        "GB/s of the fewest bytes, as of rows. Lanes of a warp that lie side by side, "
        "by as many entries each.",
        *(strips_arguments, True),
        **{"elements": 2**27, "ns": STRIP_NS, "smoke_ns": [64, 256]},
    ),
    "losses": plans_program(
        *(measure_losses, "Plans of cross-entropy with its gradient"),
        "GB/s of one read and one write.",
        **{"elements": 2**29, "ns": list(SPLITS), "smoke_ns": [16384]},
    ),
    "states": plans_program(
        *(measure_states, "Plans of the states of shares"),
        "GB/s that are read.",
        **{"elements": 2**27, "ns": [16384, 131072, 524288], "smoke_ns": [16384]},
    ),
    "attention": harness.Program(
        *(measure_attention, attention_page),
        add_arguments=attention_arguments,
        about="Sizes of the blocks of attention in jax.numpy",
    ),
}


if __name__ == "__main__":
    harness.main(__doc__, PROGRAMS)
