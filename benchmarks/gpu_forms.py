"""Times softmax and log_softmax on a GPU in the programs that they stand in.

    python benchmarks/gpu_forms.py --json F.json --markdown F.md
    python benchmarks/gpu_forms.py --render F.json --markdown F.md

Which form of a call is the default (`jaxsoftmax/_rows/defaults.py`) follows from these
figures; which of ours that is, the page says. Contenders: "xla", the first kernel that
takes the call, and jax.nn with its flag `jax_softmax_custom_jvp` off and on; and over
the first axis the default, whose backward may have another form than its forward.
Programs:

- forward: the function alone;
- backward: the vjp alone, given what the forward kept;
- one program: forward and backward, nothing between them;
- products: ``softmax(a @ b) @ c`` with 64 features, bfloat16 in the products, and the
  gradients of a, b and c: forward and backward stand apart; over the first axis
  ``softmax(a @ b, 0).T @ c``;
- float32 products: the same with products in float32;
- labels: the mean of one entry per row of ``log_softmax(a @ b)``, and the gradients of
  a and b;
- labels, gradients: these alone, without the mean.

In "products" and "labels" the logits of a float32 function are the product's, cast.

Time: the sum of the durations of a call's kernels, from CUPTI, the median of 6 calls;
contenders of a cell one after the other. A ratio is to the faster jax.nn.
"""

import collections
import concurrent.futures
import functools
import math
import statistics

import harness
import jax
import jax.numpy as jnp
import report

import jaxsoftmax
from jaxsoftmax._rows.call import ROWS, RowCall

FUNCTIONS = ("softmax", "log_softmax")
# By the dtype of the products.
PRODUCTS = {"products": "bfloat16", "float32 products": "float32"}
LABELS = {"labels": jax.value_and_grad, "labels, gradients": jax.grad}
PROGRAMS = ("forward", "backward", "one program", *PRODUCTS, *LABELS)
# Those where a function stands between others.
AMONG_OTHERS = dict.fromkeys(PRODUCTS, "softmax") | dict.fromkeys(LABELS, "log_softmax")
ELEMENTS = [2**27, 2**22, 2**18]
LENGTHS = [8, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 1500, 50257]
OURS = {"xla": "xla", "kernel": ("mosaic_gpu", "triton")}
CONTENDERS = (*OURS, "default", "jax.nn", "jax.nn custom_jvp")
FEATURES = 64
CALLS = 6


def function(name, contender, axis):
    if contender.startswith("jax.nn"):
        return functools.partial(getattr(jax.nn, name), axis=axis)
    f, asked = getattr(jaxsoftmax, name), OURS.get(contender)
    return functools.partial(f, axis=axis, implementation=asked)


def loss_of_products(f, dtype, axis):
    def loss(a, b, c):
        weights = f((a @ b).astype(dtype)).astype(c.dtype)
        weights = weights.T if axis == 0 else weights
        return jnp.sum((weights @ c).astype(jnp.float32) ** 2)

    return loss


def loss_of_labels(f, dtype):
    def loss(a, b, labels):
        y = f((a @ b).astype(dtype)).astype(jnp.float32)
        return -jnp.mean(jnp.take_along_axis(y, labels, -1))

    return loss


def operands(dtype, *shapes):
    return [
        harness.normal(seed, rows * columns, dtype).reshape(rows, columns) / 8
        for seed, (rows, columns) in enumerate(shapes)
    ]


def products(f, x, axis, dtype):
    """The program, and its operands."""
    rows, columns = x.shape
    shapes = (rows, FEATURES), (FEATURES, columns), (x.shape[axis], FEATURES)
    loss = loss_of_products(f, x.dtype, axis)
    return jax.jit(jax.grad(loss, (0, 1, 2))), operands(dtype, *shapes)


def labels(f, x, derivative):
    rows, n = x.shape
    a, b = operands("bfloat16", (rows, FEATURES), (FEATURES, n))
    each = (jnp.arange(rows, dtype=jnp.int32) % n)[:, None]
    loss = loss_of_labels(f, x.dtype)
    return jax.jit(derivative(loss, (0, 1))), (a, b, each)


def lower(program, f, x, g, axis):
    """The program that is timed, lowered, and a function that makes its operands."""
    if program == "forward":
        return jax.jit(lambda x: f(x)).lower(x), lambda: (x,)
    if program == "one program":
        both = jax.jit(lambda x, g: jax.vjp(f, x)[1](g)[0])
        return both.lower(x, g), lambda: (x, g)
    if program in AMONG_OTHERS:
        if program in PRODUCTS:
            run, arguments = products(f, x, axis, PRODUCTS[program])
        else:
            run, arguments = labels(f, x, LABELS[program])
        return run.lower(*arguments), lambda: arguments
    keep, backward = harness.vjp_alone(f)
    kept = keep.eval_shape(x)
    keeping = keep.lower(x)  # here, where jax.nn's flag is set
    return backward.lower(kept, g), lambda: (keeping.compile()(x), g)


def cells_of(x, axis, programs):
    for name in FUNCTIONS:
        for program in programs:
            if AMONG_OTHERS.get(program, name) != name:
                continue
            if program in AMONG_OTHERS and x.shape[0] < 16:
                continue
            if program in LABELS and axis == 0:
                continue
            if PRODUCTS.get(program) == "float32" and x.dtype != jnp.float32:
                continue
            yield {
                **{"function": name, "program": program, "axis": axis},
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
                shape = [max(1, elements // n), n]
                shape = shape[::-1] if args.axis == 0 else shape
                x, g = (
                    harness.normal(seed, math.prod(shape), dtype).reshape(shape)
                    for seed in (0, 1)
                )
                cells = list(cells_of(x, args.axis, args.programs))
                run_shape(cells, x, g, args.axis, pool, clock)(result)
                harness.write(args.json, result)
    return result


def run_shape(cells, x, g, axis, pool, clock):
    """Lowers the cells' programs, compiles them in threads; returns what times them."""
    jobs = []
    for cell in cells:
        for contender in CONTENDERS:
            if contender.endswith("jvp") and cell["function"] == "log_softmax":
                continue
            if contender == "default" and axis != 0:
                continue
            f = function(cell["function"], contender, axis)
            with jax.softmax_custom_jvp(contender.endswith("jvp")):
                try:
                    lowered, operands = lower(cell["program"], f, x, g, axis)
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
    if "default" in cell["results"]:
        return "default"
    x = jax.ShapeDtypeStruct(cell["shape"], cell["dtype"])
    call = RowCall(cell["function"], (-1,), 1.0, x.dtype, arrays=(x,))
    return "xla" if ROWS.reason_for_xla(call) else "kernel"


def ratio(cell, contender):
    us = cell["results"].get(contender, {}).get("us")
    return None if us is None else us / reference(cell)


def size_name(cell):
    elements = math.prod(cell["shape"])
    return f"2^{round(elements).bit_length() - (elements & (elements - 1) == 0)}"


def length(cell):
    """Of a row."""
    return str(cell["shape"][cell["axis"]])


def tables(cells, contenders):
    """Lines: time of jax.nn, and each of ours as a ratio with its kernels."""
    rows = []
    for cell in cells:
        row = [size_name(cell), length(cell), f"{reference(cell):,.1f}"]
        row.append(default_of(cell))
        for name in contenders:
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
            names = (cell["program"], cell["function"], cell["dtype"])
            size = (size_name(cell), str(cell["axis"]), length(cell))
            rows.append([*names, *size, default_of(cell), f"{found:.2f}"])
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
    header = ["program", "function", "dtype", "entries", "axis", "n", "default"]
    header.append("/ jax.nn")
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
    header = ["entries", "n", "jax.nn, us", "default"]
    for program in PROGRAMS:
        lines += [f"## {program[0].upper()}{program[1:]}", ""]
        found = [c for c in result["cells"] if c["program"] == program]
        groups = collections.defaultdict(list)
        for cell in found:
            groups[cell["function"], cell["axis"], cell["dtype"]].append(cell)
        for (name, axis, dtype), cells in sorted(groups.items(), key=place):
            where, contenders = "", [*OURS]
            if axis == 0:
                where, contenders = ", axis 0", [*OURS, "default"]
            rows = tables(cells, contenders)
            lines += [f"### {name}, {dtype}{where}", ""]
            lines += [*report.table([*header, *contenders], rows), ""]
    return "\n".join(lines)


def place(group):
    """Where a group of cells stands."""
    (name, axis, dtype), _ = group
    dtypes = ("bfloat16", "float32", "float16")
    return FUNCTIONS.index(name), axis, dtypes.index(dtype)


def add_arguments(parser):
    add = parser.add_argument
    add("--dtypes", nargs="+", default=["bfloat16", "float32"])
    add("--elements", nargs="+", type=int, default=ELEMENTS)
    add("--ns", nargs="+", type=int, default=LENGTHS)
    add("--axis", type=int, default=-1, choices=(-1, 0))
    add("--programs", nargs="+", default=list(PROGRAMS), choices=PROGRAMS)


if __name__ == "__main__":
    program = harness.Program(
        measure, markdown, None, add_arguments, merge=with_defaults
    )
    harness.main(__doc__, program)
