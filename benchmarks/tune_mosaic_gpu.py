"""Measures the plans that the table in jaxsoftmax/_rows/mosaic_gpu_plans.py chooses from.

    python benchmarks/tune_mosaic_gpu.py --json F.json --markdown F.md
    python benchmarks/tune_mosaic_gpu.py --render F.json --markdown F.md

For each row length, operation and dtype, the Mosaic GPU kernel is compiled with every
candidate plan (`candidates`) and run on 2^27 entries. Time is that of the device, from
CUPTI, the median of some calls. GB/s counts the fewest bytes: forward one read and one
write, backward two reads and one write; the backward kernels get what the forward keeps
as operands. The rate to compare with is that of a negation of as many entries, measured
before each cell. A few rows of every candidate's result are checked against numpy in
float64; a candidate that is wrong has no rate.

The report puts the plan that `mosaic_gpu_plans.plan` gives now beside the best one measured; so
the figures of an older run can be rendered against a changed table. The table itself is
written by hand.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import importlib
import itertools
import json
import platform
import statistics
import sys
import time

import gpu_softmax
import harness
import jax
import jax.numpy as jnp
import numpy as np
import report

import jaxsoftmax
from jaxsoftmax._rows import mosaic_gpu, mosaic_gpu_plans, xla
from jaxsoftmax._rows.call import RowCall

NS = [1024, 4096, 8192, 16384, 32768, 65536, 131072, 262144, 1048576]
# The names of benchmarks/gpu_softmax.py, and the kernels'.
KERNELS = {
    "softmax": "softmax",
    "softmax_backward": "softmax_derivative",
    "log_softmax": "log_softmax",
    "log_softmax_backward": "log_softmax_pullback",
}


# --- candidates -----------------------------------------------------------------------


def table_plan(case):
    """What `_plans` has for rows of a case; a str says why nothing."""
    rows, n = case.shape
    return mosaic_gpu_plans.plan(
        op=KERNELS[case.op],
        rows=rows,
        length=n,
        itemsize=jnp.dtype(case.dtype).itemsize,
        mask=None,
    )


def candidates(case):
    """The plans to measure, the table's own first.

    A lane loads 16 bytes at once, or as much as divides the row among 32 lanes. The
    rest follows from how the row is split:

    - "rows": as many lanes of a warp, up to 32, as divide the row; up to 8 tiles.
    - "registers", "shared": 1 to 16 blocks by 1 or 2 warpgroups, and as few tiles as
      hold the row: 1 to 8 in registers, 4 to 16 in shared memory. One tile only where
      there is no cluster, and two warpgroups only in clusters of 4 or more: elsewhere
      more or smaller blocks do the same.
    - "stream", only where none of these holds the row: 8 or 16 blocks, 1 or 2
      warpgroups, 2 to 8 tiles at a time.
    """
    rows, n = case.shape
    table = table_plan(case)
    if isinstance(table, str):
        return []
    vector = 16 // jnp.dtype(case.dtype).itemsize
    found = [table, *short_candidates(rows, n, vector)]
    while n % (32 * vector):
        vector //= 2
        if not vector:
            return list(dict.fromkeys(found))
    long = list(long_candidates(n // (32 * vector), vector))
    if not long and table.place == "stream":
        long = [
            mosaic_gpu_plans.Plan("stream", 32, vector, *split)
            for split in itertools.product((8, 16), (1, 2), (2, 4, 8))
        ]
    return list(dict.fromkeys([*found, *long]))


def short_candidates(rows, n, vector):
    lanes = 32
    while lanes >= 2 and n % (lanes * vector):
        lanes //= 2
    tiles = n // (lanes * vector)
    if lanes >= 2 and tiles <= 8 and rows >= 4 * 32 // lanes:
        yield mosaic_gpu_plans.Plan("rows", lanes, vector, tiles=tiles)


def long_candidates(units, vector):
    for blocks, warpgroups in itertools.product((1, 2, 4, 8, 16), (1, 2)):
        tiles = -(-units // (4 * blocks * warpgroups))
        if 4 * tiles > units or (warpgroups == 2 and blocks < 4):
            continue
        split = vector, blocks, warpgroups, tiles
        if tiles <= 8 and (tiles > 1 or blocks == 1):
            yield mosaic_gpu_plans.Plan("registers", 32, *split)
        if 4 <= tiles <= 16:
            yield mosaic_gpu_plans.Plan("shared", 32, *split)


# --- a candidate's program, and what it should give -----------------------------------


@functools.partial(jax.jit, static_argnums=(0, 3))
def operands(op, x, g, shape):
    """The kernel's arguments, None for the mask."""
    x, g = x.reshape(shape), g.reshape(shape)
    if op == "softmax_backward":
        p = xla.softmax(x, None, axis=(-1,), scale=1.0, dtype=np.dtype(x.dtype))
        return p, g
    if op == "log_softmax_backward":
        return x, None, x.max(-1, keepdims=True).astype(jnp.float32), g
    return x, None


def lower(case, plan, arrays, smoke):
    """The kernel with a plan; in a smoke test, what XLA has in its place."""
    kernel = KERNELS[case.op]
    structs = tuple(
        None if a is None else jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays
    )
    call = RowCall(kernel, (-1,), 1.0, np.dtype(jnp.dtype(case.dtype)), arrays=structs)

    def run(*arrays):
        if smoke:
            options = {"axis": (-1,), "scale": 1.0, "dtype": call.dtype}
            return getattr(xla, kernel)(*arrays, **options)
        return mosaic_gpu.run(call, arrays, plan)

    start = time.perf_counter()
    program = gpu_softmax.Program(jax.jit(run).lower(*arrays))
    program.seconds = time.perf_counter() - start
    return program


def expected(case, arrays):
    """Some rows in float64, from the operands as they are rounded."""

    def rows(array):
        taken = gpu_softmax.some_rows(array, -1, gpu_softmax.check_rows(case))
        return np.asarray(taken).astype(np.float64)

    if not case.op.endswith("_backward"):
        return gpu_softmax.reference(case.op, rows(arrays[0]), None, True)
    first, g = rows(arrays[0]), rows(arrays[-1])
    if case.op == "softmax_backward":
        mean = (first * g).sum(-1, keepdims=True) / first.sum(-1, keepdims=True)
        return first * (g - mean)
    return gpu_softmax.reference(case.op, first, g, True)


# --- a run ----------------------------------------------------------------------------


def failed_check(case, arrays, got, want):
    """The worst row error, and what is wrong with the result, if anything is."""
    wrong = None
    if case.op == "log_softmax":
        got, row_max = got
        if not (row_max == arrays[0].max(-1, keepdims=True)).all():
            wrong = "a row's maximum is wrong"
    error = gpu_softmax.row_error(case, got, want)
    bar = gpu_softmax.BAR[case.dtype]
    if not error <= bar:
        wrong = f"row error {error:.1e} above {bar:.0e}"
    return error, wrong


@dataclasses.dataclass
class Tuner:
    args: argparse.Namespace
    result: dict

    def clock(self, call):
        """Milliseconds, the median of some calls."""
        clock = harness.host_ms if self.args.smoke else harness.cupti_ms
        return statistics.median(clock([call] * self.args.iterations)[0])

    def out_of_time(self):
        return time.perf_counter() - harness.START > self.args.budget

    def save(self):
        harness.write(self.args.json, self.result)

    def measure(self, case, plan, program, arrays, want):
        found = {"plan": dataclasses.asdict(plan)}
        try:
            program = program().result()
            found["compile_s"] = round(program.seconds, 2)
            call = functools.partial(program.run, *arrays)
            found["row_error"], wrong = failed_check(case, arrays, call(), want)
            if wrong is None:
                ms = self.clock(call)
                found |= {"ms": ms, "gbps": round(case.bytes / ms / 1e6, 1)}
            else:
                found["failed"] = wrong
        except Exception as error:  # the other candidates are still worth measuring
            found["failed"] = harness.first_line(error)
        rate = found.get("gbps", found.get("failed"))
        harness.say(f"{case.op} {case.dtype} {case.n}: {plan_text(plan)}: {rate}")
        return found

    def cell(self, case, x, g, pool):
        """All candidates of a case: lowered in turn, compiled in threads meanwhile."""
        if self.out_of_time():
            self.result["not_run"].append(f"{case.op} {case.dtype} {case.n}")
            return
        cell = {"op": case.op, "dtype": case.dtype, "n": case.n, "candidates": []}
        self.result["cells"].append(cell)
        plans = candidates(case)
        if not plans:
            cell["refused"] = table_plan(case)
            self.save()
            return
        arrays = operands(case.op, x, g, case.shape)
        want = expected(case, arrays)
        negate = functools.partial(jax.jit(jnp.negative), x)
        cell["copy_gbps"] = round(2 * x.nbytes / self.clock(negate) / 1e6, 1)

        def start(plan):
            program = lower(case, plan, arrays, self.args.smoke)
            return pool.submit(program.compile)

        # A candidate is lowered here, and fails where it is measured.
        started = [(plan, attempt(start, plan)) for plan in plans]
        for plan, program in started:
            if self.out_of_time():
                text = f"{case.op} {case.dtype} {case.n} {plan_text(plan)}"
                self.result["not_run"].append(text)
                continue
            found = self.measure(case, plan, program, arrays, want)
            cell["candidates"].append(found)
            self.save()

    def run(self):
        size = self.args.elements
        pool = concurrent.futures.ThreadPoolExecutor(self.args.jobs)
        for dtype in self.args.dtypes:
            x, g = (harness.normal(seed, size, dtype) for seed in (0, 1))
            for n, op in itertools.product(self.args.ns, self.args.ops):
                case = gpu_softmax.Case(op, dtype, (size // n, n))
                whole = size // n * n
                self.cell(case, x[:whole], g[:whole], pool)
            self.save()
        pool.shutdown(cancel_futures=True)


def attempt(function, *args):
    """A function that gives the result, or raises what was raised here."""
    try:
        result = function(*args)
    except Exception as error:
        raised = error  # the name in the clause does not outlive it

        def fail():
            raise raised

        return fail
    return lambda: result


def versions():
    found = {"python": platform.python_version(), "jaxsoftmax": jaxsoftmax.__version__}
    for name in ("jax", "jaxlib"):
        found[name] = importlib.import_module(name).__version__
    return found


def measure(args):
    result = {
        "device": jax.devices()[0].device_kind,
        "driver": harness.nvidia_smi("driver_version"),
        "versions": versions(),
        "made_by": f"`{' '.join(['python', *sys.argv])}`",
        "elements": args.elements,
        "iterations": args.iterations,
        "clock": "host" if args.smoke else "CUPTI",
        "checked": True,
        "remarks": [],
        "cells": [],
        "not_run": [],
    }
    harness.say(f"{result['device']}, driver {result['driver']}, {result['versions']}")
    tuner = Tuner(args, result)
    tuner.run()
    result["seconds"] = round(time.perf_counter() - harness.START, 1)
    tuner.save()
    return result


# --- the report -----------------------------------------------------------------------


def plan_text(plan):
    if plan.place == "rows":
        return f"rows, {plan.lanes} lanes, {plan.tiles}"
    text = f"{plan.place}, {plan.blocks} x {plan.warpgroups} x {plan.tiles}"
    return text if plan.vector in (4, 8) else f"{text}, {plan.vector} at once"


def row(cell, elements):
    """Of a cell: the plan in the table, the best one measured, and their rates."""
    if "refused" in cell:
        return [f"{cell['n']:,}", f"none: {cell['refused']}", *[""] * 6]
    shape = (elements // cell["n"], cell["n"])
    table = table_plan(gpu_softmax.Case(cell["op"], cell["dtype"], shape))
    rates = {
        mosaic_gpu_plans.Plan(**found["plan"]): found["gbps"]
        for found in cell["candidates"]
        if "gbps" in found
    }

    def entries(plan):
        if plan not in rates:
            return ["not measured", ""]
        return [f"{rates[plan]:,.0f}", f"{rates[plan] / cell['copy_gbps']:.2f}"]

    name = table if isinstance(table, str) else plan_text(table)
    best = max(rates, key=rates.get, default=None)
    both = [name, *entries(table), plan_text(best) if best else "", *entries(best)]
    ratio = f"{rates[table] / rates[best]:.2f}" if table in rates else ""
    return [f"{cell['n']:,}", *both, ratio]


def tables(result):
    header = ["N", "plan in the table", "GB/s", "of copy"]
    header += ["best measured", "GB/s", "of copy", "table : best"]
    groups = {}
    for cell in result["cells"]:
        groups.setdefault((cell["dtype"], cell["op"]), []).append(cell)
    lines = []
    for (dtype, op), cells in groups.items():
        cells = sorted(cells, key=lambda cell: cell["n"])
        copies = [cell["copy_gbps"] for cell in cells if "copy_gbps" in cell]
        lines += [f"## {gpu_softmax.TITLES[op]}, {dtype}", ""]
        if copies:
            low, high = f"{min(copies):,.0f}", f"{max(copies):,.0f}"
            lines += [f"Copy: {low if low == high else f'{low} to {high}'} GB/s.", ""]
        lines += report.table(header, [row(c, result["elements"]) for c in cells])
    return lines


def remarks(result):
    lines = list(result["remarks"])
    for cell in result["cells"]:
        for found in cell["candidates"]:
            if "failed" in found:
                plan = plan_text(mosaic_gpu_plans.Plan(**found["plan"]))
                where = f"{cell['op']} {cell['dtype']} {cell['n']} {plan}"
                lines.append(f"Failed: {where}: {found['failed']}")
    if result["not_run"]:
        lines.append(f"Not run, for want of time: {'; '.join(result['not_run'])}.")
    missing = [
        d for d in gpu_softmax.DTYPES if d not in {c["dtype"] for c in result["cells"]}
    ]
    if missing:
        lines.append(f"Not measured: {', '.join(missing)}.")
    if not any(cell["n"] & (cell["n"] - 1) for cell in result["cells"]):
        lines.append("Not measured: lengths that are not powers of 2.")
    lines.append("Not measured: masks, other GPUs than the one named above.")
    return ["## Remarks", "", *(f"- {line}" for line in lines), ""]


def checks_text(result):
    errors = {}
    for cell in result["cells"]:
        for found in cell["candidates"]:
            if "row_error" in found:
                worst = errors.get(cell["dtype"], 0.0)
                errors[cell["dtype"]] = max(worst, found["row_error"])
    if not result["checked"]:
        return "The results were not checked in this run."
    found = ", ".join(f"{dtype} {error:.1e}" for dtype, error in errors.items())
    return (
        "Largest error of the rows that were checked against float64, relative to the "
        f"row's largest entry: {found or 'none was'}."
    )


def markdown(result):
    found = ", ".join(f"{k} {v}" for k, v in result["versions"].items() if v)
    driver = f"Driver {result['driver']}; " if result["driver"] else ""
    lines = [
        f"# Plans of the Mosaic GPU kernels on {result['device']}",
        "",
        f"Made by {result['made_by']}. {driver}{found}.",
        f"{result['elements']:,} entries a case; medians of {result['iterations']} "
        f"calls. Clock: {result['clock']}. GB/s counts the fewest bytes: forward one "
        "read and one write, backward two reads and one write. " + checks_text(result),
        "",
        "A plan is written as place, blocks of a cluster x warpgroups of a block x "
        "tiles of a warpgroup, or for short rows as lanes of a warp and tiles; see "
        "`jaxsoftmax/_rows/mosaic_gpu_plans.py`. The plan in the table is what that file has "
        "for the row now. Best is only among the plans that were measured.",
        "",
        *tables(result),
        *remarks(result),
    ]
    return "\n".join(lines).rstrip() + "\n"


# --- the program ----------------------------------------------------------------------


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add(
        "--dtypes",
        nargs="+",
        default=gpu_softmax.DTYPES[:2],
        choices=gpu_softmax.DTYPES,
    )
    add("--ns", nargs="+", type=int, default=NS)
    add("--ops", nargs="+", default=list(KERNELS), choices=list(KERNELS))
    add("--elements", type=int, default=2**27, help="of each operand")
    add("--iterations", type=int, default=5, help="calls of which to take the median")
    add("--jobs", type=int, default=8, help="threads that compile")
    add("--budget", type=float, default=540, help="starts nothing new after (s)")
    add("--smoke", action="store_true", help="XLA in the kernels' place: no GPU needed")
    add("--json", help="write the figures here, after every candidate")
    add("--markdown", help="write the tables here")
    add("--render", help="measure nothing: the report of this JSON file")
    args = parser.parse_args()
    if args.smoke:
        args.elements, args.ns = 2**17, [100, 1024, 4096, 30592]
    return args


def main():
    args = parse()
    if args.render:
        with open(args.render) as file:
            result = json.load(file)
    else:
        result = measure(args)
    text = markdown(result)
    if args.markdown:
        with open(args.markdown, "w") as file:
            file.write(text)
    else:
        print(text)
    found = [f for cell in result["cells"] for f in cell["candidates"]]
    return 1 if not args.render and any("failed" in f for f in found) else 0


if __name__ == "__main__":
    sys.exit(main())
