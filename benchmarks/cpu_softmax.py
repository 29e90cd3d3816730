"""Times jaxsoftmax against jax.nn on this CPU, the two in turn, in one run.

    python benchmarks/cpu_softmax.py [--quick] [--json FILE] [--markdown FILE]

For softmax and log_softmax, each shape and dtype: the forward; the vjp alone (what the
backward of a larger program runs); the gradient of ``sum(f(x) * w)`` in one program;
and the gradient of ``f(q k^T) v``. Reported are medians over the repetitions and the
ratio of medians, ours over jax.nn's. Below 1 is faster than jax.nn.
"""

import functools
import itertools
import os
import platform
import statistics

import harness
import jax
import jax.numpy as jnp
import numpy as np
import report

import jaxsoftmax

SHAPES = [(65536, 128), (8192, 1024), (4096, 2048), (2048, 4096)]
SHAPES += [(512, 16384), (64, 131072)]
HEADS = [(256, 128, 64), (16, 512, 64), (8, 1024, 64), (2, 2048, 64)]
FUNCTIONS = ("softmax", "log_softmax")
CONTENDERS = {"ours": jaxsoftmax, "jax.nn": jax.nn}


def random(shape, dtype, seed):
    return jnp.array(np.random.default_rng(seed).normal(size=shape), dtype)


def forward(f, shape, dtype):
    return functools.partial(jax.jit(f), random(shape, dtype, 0))


def vjp_alone(f, shape, dtype):
    keep, backward = harness.vjp_alone(f)
    kept = keep(random(shape, dtype, 0))
    return functools.partial(backward, kept, random(shape, dtype, 1))


def one_program(f, shape, dtype):
    def loss(x, w):
        return jnp.sum((f(x) * w).astype(jnp.float32))

    run = jax.jit(jax.grad(loss))
    return functools.partial(run, random(shape, dtype, 0), random(shape, dtype, 1))


def products(f, shape, dtype):
    def loss(q, k, v, w):
        p = f(jnp.einsum("hqd,hkd->hqk", q, k) / 8)
        return jnp.sum((jnp.einsum("hqk,hkd->hqd", p, v) * w).astype(jnp.float32))

    run = jax.jit(jax.grad(loss, (0, 1, 2)))
    return functools.partial(run, *(random(shape, dtype, seed) for seed in range(4)))


PROGRAMS = {
    "forward": (forward, SHAPES),
    "vjp alone": (vjp_alone, SHAPES),
    "grad of sum(f(x) w)": (one_program, SHAPES),
    "grad of f(q k^T) v": (products, HEADS),
}


def measure(args):
    rows = []
    result = {
        "jax": jax.__version__,
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
        "processor": harness.processor(),
        "cores": os.cpu_count(),
        "repetitions": 1 if args.smoke else args.repetitions,
        "rows": rows,
    }
    for (program, (make, shapes)), name in itertools.product(
        PROGRAMS.items(), FUNCTIONS
    ):
        for shape in shapes[-1:] if args.quick or args.smoke else shapes:
            for dtype in ("float32", "bfloat16"):
                calls = {
                    contender: make(getattr(module, name), shape, dtype)
                    for contender, module in CONTENDERS.items()
                }
                times = harness.in_turn(calls, result["repetitions"])
                seconds = {n: statistics.median(each) for n, each in times.items()}
                ratio = seconds["ours"] / seconds["jax.nn"]
                rows.append(
                    {"program": program, "function": name, "shape": shape}
                    | {"dtype": dtype, "seconds": seconds, "ratio": ratio}
                )
                words = (f"{program:19} {name:11}", f"{shape!s:16} {dtype:8}")
                harness.say(*words, f"{ratio:5.2f}")
                harness.write(args.json, result)
    return result


def markdown(result):
    header = ["program", "f", "shape", "dtype", "ours ms", "jax.nn ms", "ratio"]
    rows = []
    for row in result["rows"]:
        shape = " x ".join(str(n) for n in row["shape"])
        ours, theirs = (f"{1e3 * row['seconds'][n]:.2f}" for n in CONTENDERS)
        figures = [ours, theirs, f"{row['ratio']:.2f}"]
        rows.append([row["program"], row["function"], shape, row["dtype"], *figures])
    lines = [
        "# Time on the CPU",
        "",
        "Made by `python benchmarks/cpu_softmax.py --repetitions "
        f"{result['repetitions']} --markdown docs/cpu_softmax.md`.",
        f"{result['processor']}, jax {result['jax']}, {result['cores']} cores, "
        f"{result['repetitions']} repetitions; medians in ms; "
        "ratio: ours over jax.nn's (below 1: faster).",
        "",
        *report.table(header, rows, ["---"] * len(header)),
    ]
    return "\n".join(lines)


def add_arguments(parser):
    parser.add_argument("--quick", action="store_true", help="one shape per program")
    parser.add_argument("--repetitions", type=int, default=15)


if __name__ == "__main__":
    harness.main(
        __doc__, harness.Program(measure, markdown, add_arguments=add_arguments)
    )
