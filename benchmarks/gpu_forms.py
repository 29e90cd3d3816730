"""Times softmax and log_softmax on a GPU in the programs that they stand in.

    python benchmarks/gpu_forms.py --json F.json --markdown F.md
    python benchmarks/gpu_forms.py --render F.json --markdown F.md

Which form of a call is the default (`jaxsoftmax/_rows/defaults.py`) follows from these
figures; which of ours that is, the page says. Contenders: "xla", the first kernel that
takes the call, and jax.nn with its flag `jax_softmax_custom_jvp` off and on. Programs:

- forward: the function alone;
- backward: the vjp alone, given what the forward kept;
- one program: forward and backward, nothing between them;
- products: ``softmax(a @ b) @ c`` with 64 features, bfloat16 in the products, and the
  gradients of a, b and c: forward and backward stand apart;
- labels: the mean of one entry per row of ``log_softmax(a @ b)``, and the gradients of
  a and b.

In the last two the logits of a float32 function are the product's, cast.

Time: the sum of the durations of a call's kernels, from CUPTI, the median of 6 calls;
contenders of a cell one after the other. A ratio is to the faster jax.nn.
"""

import concurrent.futures
import functools
import statistics

import harness
import jax
import jax.numpy as jnp
import report

import jaxsoftmax
from jaxsoftmax._rows.call import ROWS, RowCall

FUNCTIONS = ("softmax", "log_softmax")
PROGRAMS = ("forward", "backward", "one program", "products", "labels")
# Those where a function stands between others.
AMONG_OTHERS = {"products": "softmax", "labels": "log_softmax"}
ELEMENTS = [2**27, 2**22, 2**18]
LENGTHS = [8, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 1500, 50257]
OURS = {"xla": "xla", "kernel": ("mosaic_gpu", "triton")}
CONTENDERS = (*OURS, "jax.nn", "jax.nn custom_jvp")
FEATURES = 64
CALLS = 6


def function(name, contender):
    if contender in OURS:
        f = getattr(jaxsoftmax, name)
        return functools.partial(f, implementation=OURS[contender])
    return getattr(jax.nn, name)


def loss_of_products(f, dtype):
    def loss(a, b, c):
        weights = f((a @ b).astype(dtype)).astype(jnp.bfloat16)
        return jnp.sum((weights @ c).astype(jnp.float32) ** 2)

    return loss


def loss_of_labels(f, dtype):
    def loss(a, b, labels):
        y = f((a @ b).astype(dtype)).astype(jnp.float32)
        return -jnp.mean(jnp.take_along_axis(y, labels, -1))

    return loss


def operands(*shapes):
    return [
        harness.normal(seed, rows * columns, "bfloat16").reshape(rows, columns) / 8
        for seed, (rows, columns) in enumerate(shapes)
    ]


def products(f, x):
    """The program, and its operands."""
    rows, n = x.shape
    a, b, c = operands((rows, FEATURES), (FEATURES, n), (n, FEATURES))
    return jax.jit(jax.grad(loss_of_products(f, x.dtype), (0, 1, 2))), (a, b, c)


def labels(f, x):
    rows, n = x.shape
    a, b = operands((rows, FEATURES), (FEATURES, n))
    each = (jnp.arange(rows, dtype=jnp.int32) % n)[:, None]
    return jax.jit(jax.grad(loss_of_labels(f, x.dtype), (0, 1))), (a, b, each)


def lower(program, f, x, g):
    """The program that is timed, lowered, and a function that makes its operands."""
    if program == "forward":
        return jax.jit(lambda x: f(x)).lower(x), lambda: (x,)
    if program == "one program":
        both = jax.jit(lambda x, g: jax.vjp(f, x)[1](g)[0])
        return both.lower(x, g), lambda: (x, g)
    if program in AMONG_OTHERS:
        run, arguments = (products if program == "products" else labels)(f, x)
        return run.lower(*arguments), lambda: arguments
    keep, backward = harness.vjp_alone(f)
    kept = keep.eval_shape(x)
    keeping = keep.lower(x)  # here, where jax.nn's flag is set
    return backward.lower(kept, g), lambda: (keeping.compile()(x), g)


def cells_of(x, programs):
    for name in FUNCTIONS:
        for program in programs:
            among_others = AMONG_OTHERS.get(program)
            if among_others is None or (among_others == name and x.shape[0] >= 16):
                yield {
                    **{"function": name, "program": program},
                    **{"dtype": x.dtype.name, "shape": list(x.shape), "results": {}},
                }


def measure(args):
    _, result = harness.start(args, "CUPTI")
    pool = concurrent.futures.ThreadPoolExecutor(16)
    clock = harness.device_ms(args)
    for dtype in args.dtypes:
        for elements in args.elements:
            for n in args.ns:
                if harness.out_of_time(args):
                    harness.say("out of time before", dtype, elements, n)
                    return result
                shape = (max(1, elements // n), n)
                x, g = (
                    harness.normal(seed, shape[0] * n, dtype).reshape(shape)
                    for seed in (0, 1)
                )
                run_shape(list(cells_of(x, args.programs)), x, g, pool, clock)(result)
                harness.write(args.json, result)
    return result


def run_shape(cells, x, g, pool, clock):
    """Lowers the cells' programs, compiles them in threads; returns what times them."""
    jobs = []
    for cell in cells:
        for contender in CONTENDERS:
            if contender.endswith("jvp") and cell["function"] == "log_softmax":
                continue
            f = function(cell["function"], contender)
            with jax.softmax_custom_jvp(contender.endswith("jvp")):
                try:
                    lowered, operands = lower(cell["program"], f, x, g)
                except NotImplementedError as refusal:
                    cell["results"][contender] = {"not_run": harness.reason(refusal)}
                    continue
            compiled = pool.submit(lowered.compile)
            jobs.append((cell, contender, compiled, operands))

    def time(result):
        # XLA tries kernels on the device while it compiles: CUPTI would see them.
        concurrent.futures.wait([compiled for *_, compiled, _ in jobs])
        for cell, contender, compiled, operands in jobs:
            call = functools.partial(compiled.result(), *operands())
            try:
                ms, kernels = clock([call] * CALLS)
                us = round(1e3 * statistics.median(ms), 2)
                cell["results"][contender] = {"us": us, "kernels": kernels}
            except RuntimeError as problem:  # of the clock
                cell["results"][contender] = {"not_run": harness.reason(problem)}
        result["cells"] += cells
        for cell in cells:
            cell["default"] = default_of(cell)
            found = {name: r.get("us") for name, r in cell["results"].items()}
            harness.say(*(cell[k] for k in cell if k != "results"), found)

    return time


# --- what is written ------------------------------------------------------------------


def reference(cell):
    """The time of the faster jax.nn."""
    found = cell["results"]
    times = [r.get("us") for name, r in found.items() if name.startswith("jax.nn")]
    return min((us for us in times if us), default=float("nan"))


def default_of(cell):
    """Which of ours runs without ``implementation=``."""
    x = jax.ShapeDtypeStruct(cell["shape"], cell["dtype"])
    call = RowCall(cell["function"], (-1,), 1.0, x.dtype, arrays=(x,))
    return "xla" if ROWS.reason_for_xla(call) else "kernel"


def ratio(cell, contender):
    us = cell["results"].get(contender, {}).get("us")
    return None if us is None else us / reference(cell)


def size_name(cell):
    elements = cell["shape"][0] * cell["shape"][1]
    return f"2^{round(elements).bit_length() - (elements & (elements - 1) == 0)}"


def tables(result, program, function_name, dtype):
    """Lines: time of jax.nn, and each of ours as a ratio with its kernels."""
    cells = [
        c
        for c in result["cells"]
        if (c["program"], c["function"], c["dtype"]) == (program, function_name, dtype)
    ]
    rows = []
    for cell in cells:
        row = [size_name(cell), str(cell["shape"][1]), f"{reference(cell):,.1f}"]
        row.append(default_of(cell))
        for name in OURS:
            found = ratio(cell, name)
            kernels = cell["results"].get(name, {}).get("kernels")
            row.append("" if found is None else f"{found:.2f} ({kernels})")
        rows.append(row)
    return rows


def slower(result, limit=1.05):
    """Cells where the default takes more than `limit` times the faster jax.nn."""
    cells = [(ratio(c, default_of(c)) or 0, i) for i, c in enumerate(result["cells"])]
    rows = []
    for found, i in sorted(cells, reverse=True):
        if found > limit:
            cell = result["cells"][i]
            names = (cell["program"], cell["function"], cell["dtype"], size_name(cell))
            form, n = default_of(cell), str(cell["shape"][1])
            rows.append([*names, n, form, f"{found:.2f}"])
    return rows


def with_defaults(results):
    """The results of several runs as one, with what runs by default now."""
    result = harness.merged(results)
    for cell in result["cells"]:
        cell["default"] = default_of(cell)
    return result


def markdown(result):
    note = (
        "Time of jax.nn in microseconds, the faster of its two forms; ours as a ratio "
        "to it, with the number of kernels. The default is what runs without "
        "`implementation=`; `kernel` the first of `mosaic_gpu` and `triton` that takes "
        "the call."
    )
    lines = report.heading("Forms of softmax on a GPU", result, note)
    lines += [f"- {remark}" for remark in result.get("remarks", [])]
    lines += [""]
    header = ["program", "function", "dtype", "entries", "n", "default", "/ jax.nn"]
    found = slower(result)
    lines += [
        "## What is slower",
        "",
        f"{len(found)} of {len(result['cells'])} cells: the default takes more than "
        "1.05 times jax.nn's time.",
        "",
        *(report.table(header, found) if found else []),
        "",
    ]
    header = ["entries", "n", "jax.nn, us", "default", *OURS]
    for program in PROGRAMS:
        lines += [f"## {program[0].upper()}{program[1:]}", ""]
        for name in FUNCTIONS:
            for dtype in dict.fromkeys(c["dtype"] for c in result["cells"]):
                rows = tables(result, program, name, dtype)
                if rows:
                    lines += [f"### {name}, {dtype}", "", *report.table(header, rows)]
                    lines += [""]
    return "\n".join(lines)


def add_arguments(parser):
    add = parser.add_argument
    add("--dtypes", nargs="+", default=["bfloat16", "float32"])
    add("--elements", nargs="+", type=int, default=ELEMENTS)
    add("--ns", nargs="+", type=int, default=LENGTHS)
    add("--programs", nargs="+", default=list(PROGRAMS), choices=PROGRAMS)


if __name__ == "__main__":
    program = harness.Program(
        measure, markdown, None, add_arguments, merge=with_defaults
    )
    harness.main(__doc__, program)
