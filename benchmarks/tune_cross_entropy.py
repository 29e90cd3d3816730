"""Measures plans for cross-entropy and its gradient, as Mosaic GPU kernels.

    python benchmarks/tune_cross_entropy.py > docs/tune_cross_entropy.md

One kernel reads a row of logits and writes its gradient. The lines for
"cross_entropy_with_gradient" in jaxsoftmax/_rows/mosaic_gpu_plans.py follow from what this
program measured; that for the loss alone, "cross_entropy", is the one for states.

Every plan is run on `--elements` logits; the time is that of the device, from CUPTI,
the median of some calls, with the small kernels that look up a label's logit before and
after. Values are checked by tests/gpu/check_cross_entropy.py.
"""

import argparse
import concurrent.futures
import functools
import statistics

import harness
import jax
import jax.numpy as jnp
import report

from jaxsoftmax._rows import mosaic_gpu, mosaic_gpu_plans
from jaxsoftmax._rows.call import RowCall
from jaxsoftmax._rows.row_loss import Options

# (place, blocks of a cluster, warpgroups of a block, tiles of a warpgroup at most)
REGISTERS, SHARED, STREAM = "registers", "shared", "stream"
MOST_SHARED_BYTES = 200_000
SPLITS = {
    16384: [
        (REGISTERS, 2, 1, 8),
        (REGISTERS, 4, 1, 8),
        (SHARED, 1, 1, 16),
        (SHARED, 1, 2, 16),
        (SHARED, 2, 1, 16),
    ],
    32000: [
        (SHARED, 1, 2, 16),
        (SHARED, 2, 1, 16),
        (SHARED, 2, 2, 8),
        (SHARED, 3, 1, 11),
        (SHARED, 4, 1, 8),
    ],
    32768: [
        (REGISTERS, 2, 2, 8),
        (REGISTERS, 8, 1, 8),
        (SHARED, 1, 4, 16),
        (SHARED, 2, 1, 16),
        (SHARED, 4, 1, 16),
    ],
    65536: [
        (REGISTERS, 4, 2, 8),
        (SHARED, 1, 4, 16),
        (SHARED, 2, 4, 16),
        (SHARED, 4, 2, 8),
        (SHARED, 4, 2, 16),
        (SHARED, 4, 4, 8),
    ],
    131072: [
        (REGISTERS, 8, 2, 8),
        (SHARED, 2, 4, 16),
        (SHARED, 4, 4, 16),
        (SHARED, 8, 2, 8),
        (SHARED, 8, 2, 16),
        (SHARED, 8, 4, 8),
        (SHARED, 16, 2, 8),
    ],
    128256: [
        (SHARED, 4, 4, 8),
        (SHARED, 6, 2, 11),
        (SHARED, 6, 3, 7),
        (SHARED, 7, 2, 9),
        (SHARED, 8, 2, 8),
        (SHARED, 16, 1, 8),
    ],
    151936: [
        (SHARED, 4, 4, 19),
        (SHARED, 4, 5, 15),
        (SHARED, 5, 4, 15),
        (SHARED, 8, 2, 19),
        (SHARED, 8, 3, 13),
        (SHARED, 10, 2, 15),
        (SHARED, 12, 2, 13),
    ],
    262144: [
        (SHARED, 4, 4, 16),
        (SHARED, 8, 2, 16),
        (SHARED, 8, 4, 16),
        (SHARED, 16, 2, 16),
    ],
}


def plan_of(split, n, itemsize):
    """The plan with so many tiles as the row needs, or None if it does not hold it."""
    place, blocks, warpgroups, most = split
    vector = 16 // itemsize
    while n % (32 * vector):
        vector //= 2
    units = n // (32 * vector)
    tiles = most if place == STREAM else -(-units // (4 * blocks * warpgroups))
    if tiles > most or units < 4 * tiles:
        return None
    share = 4 * warpgroups * tiles * 32 * vector * itemsize
    if place == SHARED and share > MOST_SHARED_BYTES:
        return None
    return mosaic_gpu_plans.Plan(place, 32, vector, blocks, warpgroups, tiles)


def lower(x, options, plan):
    rows, n = x.shape
    labels = jnp.arange(rows, dtype=jnp.int32)[:, None] % n
    weight = jnp.full((rows, 1), 1 / rows, jnp.float32)
    arrays = (x, None, labels, weight, weight)
    structs = tuple(
        None if a is None else jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays
    )
    op = "cross_entropy_with_gradient"
    call = RowCall(op, (-1,), 1.0, x.dtype, options, arrays=structs)

    def run(x, *rest):
        return mosaic_gpu.run(call, (x, None, *rest), plan)

    given = (x, *arrays[2:])
    return jax.jit(run).lower(*given), given


def median_ms(call):
    return statistics.median(harness.cupti_ms([call] * 5)[0])


def plan_text(plan):
    return f"{plan.place}, {plan.blocks} x {plan.warpgroups} x {plan.tiles}"


def plans_of(n, itemsize, options):
    found = (plan_of(split, n, itemsize) for split in SPLITS[n])
    plans = dict.fromkeys(plan for plan in found if plan is not None)
    if options.softcap is None:
        return list(plans)
    # In registers, what is computed twice would be kept, too.
    return [plan for plan in plans if plan.place == SHARED]


def rates(x, options, pool):
    """GB/s by plan, or the name of an error."""
    plans = plans_of(x.shape[1], x.dtype.itemsize, options)
    lowered = [(plan, *lower(x, options, plan)) for plan in plans]
    started = [(plan, pool.submit(low.compile), given) for plan, low, given in lowered]
    result = {}
    for plan, program, given in started:
        try:
            ms = median_ms(functools.partial(program.result(), *given))
        except Exception as error:
            result[plan] = type(error).__name__
        else:
            result[plan] = 2 * x.nbytes / ms / 1e6
    return result


def cell(rate):
    return f"{rate:,.0f}" if isinstance(rate, float) else rate or ""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--elements", type=int, default=2**29)
    parser.add_argument("--jobs", type=int, default=12, help="threads that compile")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(SPLITS))
    args = parser.parse_args()
    pool = concurrent.futures.ThreadPoolExecutor(args.jobs)
    every = {
        "plain": Options(),
        "softcap, smoothing, z-loss": Options(
            softcap=30.0, spread=True, label_smoothing=0.1, z_loss=1e-4
        ),
    }
    device = jax.devices()[0].device_kind
    print(f"# Plans of cross-entropy with its gradient on {device}\n")
    print(
        f"Made by `python benchmarks/tune_cross_entropy.py`, jax {jax.__version__}, "
        f"{args.elements:,} logits. GB/s of one read and one write. A plan: where a "
        "share of a row is kept, blocks of a cluster x warpgroups of a block x tiles.\n"
    )
    for n in args.lengths:
        for dtype in ("bfloat16", "float32"):
            x = harness.normal(0, args.elements // n * n, dtype).reshape(-1, n)
            ms = median_ms(functools.partial(jax.jit(jnp.negative), x))
            found = {name: rates(x, options, pool) for name, options in every.items()}
            rows = [
                [plan_text(plan), *(cell(each.get(plan)) for each in found.values())]
                for plan in found["plain"]
            ]
            rows.append(["copy", f"{2 * x.nbytes / ms / 1e6:,.0f}", ""])
            print(f"## {dtype}, rows of {n:,}\n")
            print("\n".join(report.table(["plan", *every], rows)) + "\n", flush=True)
            del x


if __name__ == "__main__":
    main()
