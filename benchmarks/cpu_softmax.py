"""Times jaxsoftmax against jax.nn on this CPU, the two in turn, in one run.

    python benchmarks/cpu_softmax.py [--quick] [--json FILE] [--markdown FILE]

For each shape and dtype: the forward; the vjp alone (what the backward of a larger
program runs); the gradient of ``sum(softmax(x) * w)`` in one program; and the gradient
of ``softmax(q k^T) v``. Reported are medians over the repetitions and the ratio of
medians, ours over jax.nn's. Below 1 is faster than jax.nn.
"""

import argparse
import functools
import json
import os
import platform
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

import jaxsoftmax

SHAPES = [
    (65536, 128),
    (8192, 1024),
    (4096, 2048),
    (2048, 4096),
    (512, 16384),
    (64, 131072),
]
HEADS = [(256, 128, 64), (16, 512, 64), (8, 1024, 64), (2, 2048, 64)]
CONTENDERS = {"ours": jaxsoftmax.softmax, "jax.nn": jax.nn.softmax}


def medians(calls, repetitions):
    """Median seconds of each call; the calls take turns, in alternating order."""
    for call in calls.values():
        jax.block_until_ready(call())
        jax.block_until_ready(call())
    times = {name: [] for name in calls}
    for i in range(repetitions):
        for name in list(calls) if i % 2 else reversed(calls):
            start = time.perf_counter()
            jax.block_until_ready(calls[name]())
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(ts) for name, ts in times.items()}


def random(shape, dtype, seed):
    return jnp.array(np.random.default_rng(seed).normal(size=shape), dtype)


def forward(f, shape, dtype):
    return functools.partial(jax.jit(f), random(shape, dtype, 0))


def vjp_alone(f, shape, dtype):
    _, pull = jax.vjp(jax.jit(f), random(shape, dtype, 0))
    kept, tree = jax.tree.flatten(pull)
    run = jax.jit(lambda kept, g: jax.tree.unflatten(tree, kept)(g))
    return functools.partial(run, kept, random(shape, dtype, 1))


def fused_gradient(f, shape, dtype):
    def loss(x, w):
        return jnp.sum((f(x) * w).astype(jnp.float32))

    run = jax.jit(jax.grad(loss))
    return functools.partial(run, random(shape, dtype, 0), random(shape, dtype, 1))


def attention_gradient(f, shape, dtype):
    def loss(q, k, v, w):
        p = f(jnp.einsum("hqd,hkd->hqk", q, k) / 8)
        return jnp.sum((jnp.einsum("hqk,hkd->hqd", p, v) * w).astype(jnp.float32))

    run = jax.jit(jax.grad(loss, (0, 1, 2)))
    return functools.partial(run, *(random(shape, dtype, seed) for seed in range(4)))


PROGRAMS = {
    "forward": (forward, SHAPES),
    "vjp alone": (vjp_alone, SHAPES),
    "grad of sum(softmax(x) w)": (fused_gradient, SHAPES),
    "grad of softmax(q k^T) v": (attention_gradient, HEADS),
}


def measure(repetitions, quick):
    rows = []
    for program, (make, shapes) in PROGRAMS.items():
        for shape in shapes[-1:] if quick else shapes:
            for dtype in ("float32", "bfloat16"):
                calls = {n: make(f, shape, dtype) for n, f in CONTENDERS.items()}
                seconds = medians(calls, repetitions)
                ratio = seconds["ours"] / seconds["jax.nn"]
                rows.append(
                    {"program": program, "shape": shape, "dtype": dtype}
                    | {"seconds": seconds, "ratio": ratio}
                )
                print(f"{program:28} {shape!s:16} {dtype:9} {ratio:5.2f}", flush=True)
    return rows


def cpu_name():
    """The processor's name where the system tells it."""
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":")[1] for line in file if "model name" in line]
        return names[0].strip()
    except (OSError, IndexError):
        return platform.processor() or "unknown processor"


def markdown(result):
    lines = [
        "# Time on the CPU",
        "",
        "Made by `python benchmarks/cpu_softmax.py --repetitions "
        f"{result['repetitions']} --markdown docs/cpu_softmax.md`.",
        f"{cpu_name()}, jax {result['jax']}, {result['cores']} cores, "
        f"{result['repetitions']} repetitions; medians in ms; "
        "ratio: ours over jax.nn's (below 1: faster).",
        "",
        "| program | shape | dtype | ours ms | jax.nn ms | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        shape = " x ".join(str(n) for n in row["shape"])
        ours, theirs = (1e3 * row["seconds"][n] for n in ("ours", "jax.nn"))
        lines.append(
            f"| {row['program']} | {shape} | {row['dtype']} | {ours:.2f} | "
            f"{theirs:.2f} | {row['ratio']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one shape a program")
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--json", help="write the figures here")
    parser.add_argument("--markdown", help="write the table here")
    args = parser.parse_args()
    result = {
        "jax": jax.__version__,
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "repetitions": args.repetitions,
        "rows": measure(args.repetitions, args.quick),
    }
    if args.json:
        with open(args.json, "w") as file:
            json.dump(result, file, indent=1)
            file.write("\n")
    table = markdown(result)
    if args.markdown:
        with open(args.markdown, "w") as file:
            file.write(table)
    print(table)


if __name__ == "__main__":
    main()
