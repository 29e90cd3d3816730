"""Measures sizes of the blocks of attention in jax.numpy, on a GPU.

    python benchmarks/tune_attention.py > docs/tune_attention.md

Each program is that of `jaxsoftmax.dot_product_attention` with implementation="xla",
traced with other sizes of the blocks in jaxsoftmax/_attend/xla.py, and once as
they are there. What is timed, and how, is as in
benchmarks/gpu_attention.py; one table a shape, mask and direction, printed when it is
complete, and on stderr each figure when it is there.
"""

import argparse
import concurrent.futures
import functools
import time

import gpu_attention
import harness
import jax
import jax.numpy as jnp
import report

import jaxsoftmax
from jaxsoftmax._attend import xla

BLOCKS = [256, 512, 1024, 2048, 4096]
# (B, T, N, D)
SHAPES = [(4, 4096, 16, 64), (2, 8192, 16, 128)]
SMOKE = [(2, 64, 2, 16)]


def cells(args):
    """The most wanted first."""
    return [
        gpu_attention.Cell(shape, mask == "causal", direction)
        for mask in args.masks
        for direction in args.directions
        for shape in (SMOKE if args.smoke else SHAPES)
    ]


SIDES = ("query_block", "key_block")


def of_size(side, most):
    """A property of blockwise's blocks: as it is there, but for the limit."""
    length = {"query_block": "queries", "key_block": "keys"}[side]
    return property(lambda self: xla._even_blocks(getattr(self, length), most))


def programs(cell, args, pool):
    """(query block, key block) -> program, and the pair that the module chooses.

    They are traced in turn, as the sizes are global.
    """
    attend = functools.partial(
        *(jaxsoftmax.dot_product_attention,),
        **{"implementation": "xla", "is_causal": cell.causal},
    )
    sizes = [b for b in args.blocks if b <= cell.length]
    before = {side: getattr(xla._Blocks, side) for side in SIDES}
    chosen = {}

    def recorded(side):
        # The last is what it is lowered with: shapes may be found with other sizes.
        def read(self):
            chosen[side] = before[side].fget(self)
            return chosen[side]

        return property(read)

    def traced(properties):
        for side, each in zip(SIDES, properties, strict=True):
            setattr(xla._Blocks, side, each)
        jax.clear_caches()  # or it would be the program of other sizes
        return gpu_attention.Program(attend, cell, pool)

    try:
        own = traced([recorded(side) for side in SIDES])
        now = tuple(chosen.get(side, 0) for side in SIDES)
        found = {now: own}
        for pair in ((q, k) for q in sizes for k in sizes):
            if pair not in found:
                limits = zip(SIDES, pair, strict=True)
                found[pair] = traced([of_size(*limit) for limit in limits])
    finally:
        for side, each in before.items():
            setattr(xla._Blocks, side, each)
        jax.clear_caches()
    return found, now


def measure(cell, args, pool):
    """(query block, key block) -> figures, or why there are none; the module's pair."""
    started, now = programs(cell, args, pool)
    harness.say(f"{cell}: traced {len(started)} programs")
    for program in started.values():
        program.wait()
    harness.say(f"{cell}: compiled")
    arrays = [x.reshape(cell.shape) for x in gpu_attention.flat_inputs(cell)]
    found = {}
    for pair, program in started.items():
        if time.perf_counter() - harness.START > args.budget:
            found[pair] = {"not_run": "out of time"}
            continue
        try:
            found[pair] = gpu_attention.run_jax(cell, program, arrays, None)
        except Exception as problem:
            found[pair] = {"not_run": harness.reason(problem)}
        harness.say(f"{cell}: blocks {pair[0]} x {pair[1]}: {text(cell, found[pair])}")
    return found, now


def text(cell, figures):
    if "not_run" in figures:
        return figures["not_run"].split(" (")[0][:40]
    rate = cell.flops / figures["ms"] / 1e9
    memory = report.megabytes(figures["extra_bytes"])
    return f"{figures['ms']:.2f} ms, {rate:,.0f}, {memory}"


def page_of(cell, found, now):
    lines = [f"## {cell}", "", "ms, TFLOP/s, memory beyond.", ""]
    queries, keys = (list(dict.fromkeys(p[i] for p in found)) for i in (0, 1))
    queries, keys = sorted(queries), sorted(keys)
    rows = [
        [f"{q:,}", *(text(cell, found[q, k]) if (q, k) in found else "" for k in keys)]
        for q in queries
    ]
    header = ["queries x keys", *(f"{k:,}" for k in keys)]
    lines += report.table(header, rows)
    timed = {pair: each["ms"] for pair, each in found.items() if "ms" in each}
    if timed:
        best = min(timed, key=timed.get)
        lines.append(f"Best: {best[0]} x {best[1]}, {timed[best]:.2f} ms.")
    if now in timed:
        lines.append(f"As in the module: {now[0]} x {now[1]}, {timed[now]:.2f} ms.")
    return "\n".join([*lines, ""])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--blocks", nargs="+", type=int, default=BLOCKS)
    add("--masks", nargs="+", default=gpu_attention.MASKS, choices=gpu_attention.MASKS)
    add(
        "--directions",
        nargs="+",
        default=gpu_attention.PASSES,
        choices=gpu_attention.PASSES,
    )
    add("--jobs", type=int, default=16, help="threads that compile")
    add("--budget", type=float, default=1e9, help="seconds")
    add("--smoke", action="store_true", help="small, on any device")
    args = parser.parse_args()
    if args.smoke:
        args.blocks = [16, 32, 64]
    pool = concurrent.futures.ThreadPoolExecutor(args.jobs)
    device = jax.devices()[0].device_kind
    print(f"# Sizes of the blocks of attention on {device}\n")
    print(
        f"Made by `python benchmarks/tune_attention.py`, jax {jax.__version__}; "
        f"{jnp.dtype('bfloat16')}. Rows: queries of a block; columns: its keys.\n"
    )
    for cell in cells(args):
        if time.perf_counter() - harness.START > args.budget:
            harness.say(f"{cell}: left out, for want of time")
            continue
        print(page_of(cell, *measure(cell, args, pool)), flush=True)


if __name__ == "__main__":
    main()
