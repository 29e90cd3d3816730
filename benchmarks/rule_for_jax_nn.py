"""Digits and times of three rules for softmax's derivative, and kernels on two cards.

    python benchmarks/rule_for_jax_nn.py --json FILE --markdown docs/rule_for_jax_nn.md
    python benchmarks/rule_for_jax_nn.py --render CPU GPU --markdown ...

The rules are those of docs/rule_for_jax_nn.md, which is rendered with what its blocks
have been replaced by. Kernels are counted where jax runs on a CPU and the dependency
group `for-gpu` is installed.
"""

import functools
import itertools
import pathlib
import statistics

import harness
import jax
import jax.numpy as jnp
import numpy as np
import report
from jax import lax
from support import for_gpu, oracle

PAGE = pathlib.Path(__file__).parents[1] / "docs/rule_for_jax_nn.md"
# What is about the cotangents, and whether the first half of each row is one number.
COTANGENTS = {"about 0": (0, False), "1000": (1000, False), "1000, equal": (1000, True)}
PROGRAM = ["dtype", "length", "program"]
PARTS = {
    "digits": ["dtype", "scale", "cotangents"],
    "kernels": PROGRAM,
    "times": PROGRAM,
}


def derivative(p, g, axis):
    largest = p == jnp.max(p, axis, keepdims=True)
    c = jnp.max(jnp.where(largest, g, -jnp.inf), axis, keepdims=True)
    t = g - lax.stop_gradient(c)
    mean = jnp.sum(p * t, axis, keepdims=True) / jnp.sum(p, axis, keepdims=True)
    return p * (t - mean)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def centered(x, axis=-1):
    e = jnp.exp(x - jnp.max(x, axis, keepdims=True))
    return e / jnp.sum(e, axis, keepdims=True)


centered.defvjp(
    lambda x, axis: (centered(x, axis),) * 2,
    lambda axis, p, g: (derivative(p, g, axis),),
)
RULES = {"`jax.nn`": jax.nn.softmax, "flag": jax.nn.softmax, "centered": centered}


def by_rule(figure, *args):
    for name, f in RULES.items():
        with jax.softmax_custom_jvp(name == "flag"):
            yield figure(lambda x, f=f: f(x), *args)


def one_program(f):
    return jax.jit(lambda x, g: jax.vjp(f, x)[1](g)[0])


def error(f, x, g):
    """Of the worst row, given P as the forward returns it, which is one for all."""
    want = oracle.softmax_derivative(jax.jit(centered)(x), g)
    least = 1e-3 if x.dtype == jnp.float16 else 1e-30
    return oracle.row_error(one_program(f)(x, g), want, x.dtype, least=least)


def digits(args, where):
    dtypes = ("float32", "bfloat16", "float16")
    for dtype, scale, kind in itertools.product(dtypes, (1, 20, 60), COTANGENTS):
        x, g = np.random.default_rng(0).normal(
            size=(2, 64 if args.smoke else 2048, 128)
        )
        offset, equal = COTANGENTS[kind]
        g[:, :64] = g[:, :1] if equal else g[:, :64]
        arrays = jnp.array(scale * x, dtype), jnp.array(offset + g, dtype)
        yield where, dtype, scale, kind, *(f"{e:.1e}" for e in by_rule(error, *arrays))


def programs(f, x, figure):
    keep, backward = harness.vjp_alone(f)
    kept = keep.eval_shape(x)
    both = figure(one_program(f), x, x)
    return figure(jax.jit(f), x), figure(backward, kept, x), both


def each_program(entries, figure):
    for dtype, n in itertools.product(("float32", "bfloat16"), (128, 1024, 4096)):
        x = jax.ShapeDtypeStruct((entries // n, n), dtype)
        found = zip(*by_rule(programs, x, figure), strict=True)
        names = ("forward", "backward", "both in one")
        yield from zip(itertools.repeat((dtype, n)), names, found)


def kernels(args, where):
    on_cpu = jax.default_backend() == "cpu"
    for card in for_gpu.CARDS if on_cpu and for_gpu.installed() else ():
        figure = functools.partial(for_gpu.compiled, card=card)
        for case, name, found in each_program(2**14 if args.smoke else 2**22, figure):
            yield card, *case, name, *(len(each.kernels) for each in found)


def ready(f, *shapes):
    fill = lambda s: jax.random.uniform(jax.random.key(0), s.shape).astype(s.dtype)
    return functools.partial(f.lower(*shapes).compile(), *jax.tree.map(fill, shapes))


def times(args, where):
    """Milliseconds of the first rule, medians; the others relative to it."""
    on_gpu = jax.default_backend() == "gpu"
    entries = 2**14 if args.smoke else 2**27 if on_gpu else 2**23
    clock = harness.cupti_ms if on_gpu and not args.smoke else harness.host_ms
    for case, name, calls in each_program(entries, ready):
        ms = {call: [] for call in calls}
        jax.block_until_ready([call() for call in calls])
        for call in harness.turns(ms, 1 if args.smoke else args.rounds):
            ms[call] += clock([call])[0]
        first, *others = map(statistics.median, ms.values())
        ratios = (f"{other / first:.2f}" for other in others)
        yield where, *case, name, f"{first:.3g}", *ratios


def measure(args):
    _, result = harness.start(args, "CUPTI, on a CPU the host's")
    on_cpu = jax.default_backend() == "cpu"
    where = harness.processor() if on_cpu else result["device"]
    for part in args.parts:
        rows = {"digits": digits, "kernels": kernels, "times": times}[part](args, where)
        for row in rows:
            harness.say(part, *row)
            result["cells"].append({"part": part, "row": row})
            harness.write(args.json, result)
    return result


def markdown(result):
    about = f"Made by `{result['command']}`; {report.versions(result)}."
    blocks = {}
    for part, header in PARTS.items():
        rows = [cell["row"] for cell in result["cells"] if cell["part"] == part]
        header = ["on", *header, *RULES]
        if rows:
            blocks[part] = "\n".join([about, "", *report.table(header, rows)])
    return report.replaced(PAGE.read_text(), blocks)


def add_arguments(parser):
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--rounds", type=int, default=15)


if __name__ == "__main__":
    harness.main(__doc__, harness.Program(measure, markdown, None, add_arguments))
