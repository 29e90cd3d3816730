"""Measures plans for the states of shares of rows, as Mosaic GPU kernels.

    python benchmarks/tune_states.py > docs/tune_states.md

A state is what a device computes of its share of a row that several devices have: a
few numbers a row. The kernel reads its arrays once and writes next to nothing.
`_state_plan` in jaxsoftmax/_rows/mosaic_gpu_plans.py follows from what this program measured.

Every plan is run on `--elements` entries of each array; the time is that of the device,
from CUPTI, the median of some calls. Values are checked by tests/gpu/check_sharding.py.
"""

import argparse
import concurrent.futures
import functools
import statistics

import harness
import jax
import jax.numpy as jnp
import numpy as np
import report

from jaxsoftmax._rows import mosaic_gpu, mosaic_gpu_plans
from jaxsoftmax._rows.call import RowCall

OPS = ("log_sum_exp_state", "softmax_derivative_state")
NS = [16384, 131072, 524288]
# (blocks of a cluster, warpgroups of a block, tiles of a warpgroup at a time)
SPLITS = [
    *((1, 1, 4), (1, 1, 8), (1, 2, 4), (1, 2, 8), (1, 4, 4)),
    *((2, 2, 4), (4, 1, 8), (4, 2, 4), (8, 1, 4)),
]


def operands(op, x, g, shape):
    x, g = x.reshape(shape), g.reshape(shape)
    return (x, None) if op == "log_sum_exp_state" else (jnp.abs(x), g)


def whole_function_plan(call):
    """The plan of the function that the state is for, which keeps the row."""
    x = call.arrays[0]
    function = {OPS[0]: "log_softmax", OPS[1]: "softmax_derivative"}[call.op]
    return mosaic_gpu_plans.plan(
        op=function,
        rows=x.shape[0],
        length=x.shape[1],
        itemsize=x.dtype.itemsize,
        mask=None,
    )


def lower(call, arrays, plan):
    given = [a for a in arrays if a is not None]

    def run(*given):
        return mosaic_gpu.run(call, [*given, *arrays[len(given) :]], plan)

    return functools.partial(jax.jit(run).lower(*given).compile), given


def median_ms(call):
    return statistics.median(harness.cupti_ms([call] * 5)[0])


def plan_text(plan):
    return f"{plan.place}, {plan.blocks} x {plan.warpgroups} x {plan.tiles}"


def rates(op, dtype, n, x, g, pool):
    """GB/s by plan; that of the whole function first."""
    arrays = operands(op, x, g, (x.size // n, n))
    structs = tuple(
        None if a is None else jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays
    )
    call = RowCall(op, (-1,), 1.0, np.dtype(jnp.dtype(dtype)), arrays=structs)
    vector = 16 // jnp.dtype(dtype).itemsize
    plans = [whole_function_plan(call)]
    plans += [mosaic_gpu_plans.Plan("stream", 32, vector, *split) for split in SPLITS]
    lowered = [(plan, *lower(call, arrays, plan)) for plan in plans]
    started = [(plan, pool.submit(low), given) for plan, low, given in lowered]
    found = {}
    for plan, program, given in started:
        ms = median_ms(functools.partial(program.result(), *given))
        found[plan_text(plan)] = len(given) * x.nbytes / ms / 1e6
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--elements", type=int, default=2**27)
    parser.add_argument("--jobs", type=int, default=8, help="threads that compile")
    args = parser.parse_args()
    pool = concurrent.futures.ThreadPoolExecutor(args.jobs)
    rows, copies = [], []
    for dtype in ("bfloat16", "float32"):
        x, g = (harness.normal(seed, args.elements, dtype) for seed in (0, 1))
        negate = functools.partial(jax.jit(jnp.negative), x)
        copies.append(f"{dtype} {2 * x.nbytes / median_ms(negate) / 1e6:,.0f}")
        for n in NS:
            for op in OPS:
                found = rates(op, dtype, n, x, g, pool)
                whole, *streams = found.items()
                label = f"{op}, {dtype}, {n:,}"
                cells = [f"{rate:,.0f}" for _, rate in streams]
                rows.append([label, f"{whole[0]}: {whole[1]:,.0f}", *cells])
    device = jax.devices()[0].device_kind
    print(f"# Plans of the states of shares on {device}\n")
    print(
        f"Made by `python benchmarks/tune_states.py`, jax {jax.__version__}, "
        f"{args.elements:,} entries. GB/s that are read; copy: {', '.join(copies)}. A "
        "plan: blocks of a cluster x warpgroups of a block x tiles at a time.\n"
    )
    header = [
        "",
        "plan of the whole function",
        *(" x ".join(map(str, s)) for s in SPLITS),
    ]
    print("\n".join(report.table(header, rows)))


if __name__ == "__main__":
    main()
