"""Times softmax and log_softmax on a GPU against jax.nn, torch and a plain copy.

    python benchmarks/gpu_softmax.py --json F.json --markdown F.md --png F.png
    python benchmarks/gpu_softmax.py --render F.json --markdown F.md --png F.png

Lowering our kernels takes longer than compiling and timing them. `--export FOLDER`, on
any machine with the same jax and the package flatbuffers, does that for an H200;
`--exported FOLDER` beside the same other arguments then takes what is there.

All contenders of a case take turns, in one process. What is timed:

- softmax, log_softmax: the forward alone, rows of N among 2^27 entries;
- softmax_backward, log_softmax_backward: the vjp alone, given what the forward kept;
- gradient: jit(grad(sum(softmax(x) w))), forward and backward in one program;
- the same over an axis that is not last, and under a broadcast mask;
- small problems, down to 8 rows of 16: the gradient by the host's clock, many calls
  blocked on once, and by the device's.

Clocks. JAX: the sum of the durations of a call's kernels, from CUPTI. Torch: CUDA
events around ten calls in a row, which for 2^27 entries leaves out all but 1 % of the
launches. Buffers smaller than the L2 cache are rotated, and each result of a round has
memory of its own.

GB/s counts the fewest bytes: forward one read and one write, backward two reads and one
write; a mask is not counted. The copy, to compare with, is an elementwise kernel of
JAX, a negation of as many entries in float32. A few rows of every timed result are
checked against numpy in float64.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import math
import statistics
import time

import harness
import jax
import jax.numpy as jnp
import numpy as np
import report
from support import oracle

import jaxsoftmax

ALIGNED = [2**k for k in range(7, 19)] + [2**20]
# Multiples of 128, but of no power of two above; the long ones are vocabularies.
OTHERS = [640, 1152, 3200, 5760, 11264, 32000, 50304, 128256, 151936, 201088]
RAGGED = [1000, 1500, 30522, 50257]
DTYPES = ["bfloat16", "float32", "float16"]
OPS = {
    "softmax": 2,
    "softmax_backward": 3,
    "log_softmax": 2,
    "log_softmax_backward": 3,
    "gradient": 3,
}
OURS = {"mosaic_gpu": "mosaic_gpu", "triton": "triton", "xla": "xla", "default": None}
CONTENDERS = [
    *OURS,
    *("jax.nn", "jax.nn custom_jvp", "torch", "torch.compile", "copy"),
]
# Compiling is what takes time: these contenders do not need every case.
XLA_NS = [1024, 16384, 65536, 50257]
TORCH_COMPILE_NS = [1024, 8192, 65536]
JAX_NN_LOG_NS = [128, 1024, 1152, 4096, 16384, 32768, 65536, 262144, 1048576, 50257]
# Entries of a row along an axis that is not last, and rows side by side.
AXES = [(8192, 16384), (1024, 2048), (64, 64), (1024, 1), (1024, 16), (1024, 256)]
AXES += [(1024, 65536), (1500, 2048), (16384, 256), (65536, 64)]
SMALL = [(8, 16), (8, 1024), (64, 128), (128, 512), (512, 1024), (1024, 4096)]
SMALL += [(4096, 1024)]
TITLES = {
    "softmax": "softmax, forward",
    "softmax_backward": "softmax, backward",
    "log_softmax": "log_softmax, forward",
    "log_softmax_backward": "log_softmax, backward",
    "gradient": "jit(grad(sum(softmax(x) w)))",
}
COLORS = {
    "mosaic_gpu": "#c1272d",
    "triton": "#f28e2b",
    "default": "#c1272d",
    "xla": "#8c564b",
    "jax.nn": "#1f4e9e",
    "jax.nn custom_jvp": "#6fa8dc",
    "torch": "#3d8b37",
    "torch.compile": "#8fce00",
}
# Worst row error of the checked rows, relative to the row's largest entry: as in the
# tests for what is ours; for the others only what shows that they compute the same.
BAR = {"float32": 4e-6, "bfloat16": 8e-3, "float16": 1e-3}
OTHERS_BAR = 0.3
ERRORS = (
    "Largest error of the rows that were checked against float64, relative to the "
    "row's largest entry"
)


@dataclasses.dataclass(frozen=True)
class Case:
    """What is computed; `group` says which table it belongs to."""

    op: str
    dtype: str
    shape: tuple
    axis: int = -1
    mask: str | None = None
    group: str = "rows"

    @property
    def n(self):
        return self.shape[self.axis]

    @property
    def bytes(self):
        return OPS[self.op] * math.prod(self.shape) * jnp.dtype(self.dtype).itemsize

    @property
    def function(self):
        return "log_softmax" if self.op.startswith("log_softmax") else "softmax"

    def __str__(self):
        shape = "x".join(map(str, self.shape))
        return f"{self.op} {self.dtype} {shape} axis {self.axis} {self.mask or ''}"


# --- data -----------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=1)
def cut(flat, shape, start):
    size = math.prod(shape)
    return jax.lax.dynamic_slice(flat, (start,), (size,)).reshape(shape)


def make_mask(kind, shape):
    """Causal: (1, 1, T, T). Padding: (B, 1, 1, T), examples of different lengths."""
    if kind is None:
        return None
    batch, _, queries, keys = shape
    if kind == "causal":
        return jnp.tril(jnp.ones((queries, keys), bool))[None, None]
    lengths = keys - np.arange(batch) * (keys // (2 * batch))
    return jnp.array(np.arange(keys) < lengths[:, None])[:, None, None]


@dataclasses.dataclass
class Data:
    """The operands of a case, as often as it takes to be far above the L2 cache."""

    xs: list
    gs: list
    where: jax.Array | None

    @staticmethod
    def of(case, flat_x, flat_g):
        size = math.prod(case.shape)
        starts = range(0, max(flat_x.size // size, 1) * size, size)
        xs, gs = (
            [cut(flat, case.shape, s) for s in starts] for flat in (flat_x, flat_g)
        )
        return jax.block_until_ready(Data(xs, gs, make_mask(case.mask, case.shape)))


jax.tree_util.register_dataclass(Data, ["xs", "gs", "where"], [])


# --- the contenders that are JAX programs ---------------------------------------------


def jax_calls(compiling, case, data):
    """One call for each buffer. A second program, if any, makes the first operand."""
    run, *keep = compiling.programs()
    if case.op == "gradient":
        args = [(x, g, data.where) for x, g in zip(data.xs, data.gs, strict=True)]
    elif not keep:
        args = [(x, data.where) for x in data.xs]
    else:
        kept = (keep[0](x, data.where) for x in data.xs)
        args = list(zip(kept, data.gs, strict=True))
    return [functools.partial(run, *a) for a in args]


def jax_function(name, case):
    """(x, where) -> y, and the setting to trace it under."""
    if name in OURS:
        f = getattr(jaxsoftmax, case.function)
        f = functools.partial(f, implementation=OURS[name])
    else:
        f = getattr(jax.nn, case.function)
    return lambda x, where: f(x, axis=case.axis, where=where)


def gradient_of(f):
    def loss(x, w, where=None):
        return jnp.sum((f(x, where) * w).astype(jnp.float32))

    return jax.jit(jax.grad(loss))


def programs(name, case, x, g, where):
    """The function that is timed, jitted, and its arguments.

    For a backward, also those of what it is given.
    """
    f = jax_function(name, case)
    if case.op == "gradient":
        return [(gradient_of(f), (x, g, where))]
    if case.op.endswith("_backward"):
        # What it keeps is an operand, made by a program of its own.
        keep, backward = harness.vjp_alone(f)
        kept = keep.eval_shape(x, where)
        return [(backward, (kept, g)), (keep, (x, where))]
    return [(jax.jit(f), (x, where))]


def lower(name, case, data, folder=None):
    """The programs, lowered here or read from where `export` wrote them."""
    if folder is not None:
        lowered = harness.read_exported(harness.exported_path(folder, name, case))
        if lowered:
            return lowered
    with jax.softmax_custom_jvp(name == "jax.nn custom_jvp"):
        found = programs(name, case, data.xs[0], data.gs[0], data.where)
        return [f.lower(*args) for f, args in found]


def export(args):
    """Writes the programs that are ours: theirs take little time to lower."""
    settle(args)
    for case in itertools.chain.from_iterable(blocks(args)):
        x = jax.ShapeDtypeStruct(case.shape, case.dtype)
        where = jax.eval_shape(lambda case=case: make_mask(case.mask, case.shape))
        for name in OURS:
            if name not in args.contenders or not wanted(name, case, args, None):
                continue
            try:
                with harness.gpu_that_is_not_there():
                    found = programs(name, case, x, x, where)
                    harness.export(
                        harness.exported_path(args.export, name, case), found
                    )
            except NotImplementedError as error:
                harness.say(name, case, error)


# --- the contenders that are torch programs -------------------------------------------


def torch_function(case, torch):
    """(x, g) -> result."""
    forward = getattr(torch, case.function)
    if case.op == "gradient":
        return lambda x, w: (forward(x, case.axis) * w).float().sum()
    if case.op.endswith("_backward"):
        aten = getattr(torch.ops.aten, f"_{case.function}_backward_data")
        return lambda y, g: aten(g, y, case.axis, y.dtype)
    return lambda x, g: forward(x, case.axis)


def torch_calls(name, case, data, torch):
    """One call for each buffer; the arrays of JAX are used where they lie."""
    f = torch_function(case, torch)
    if name == "torch.compile":
        torch._dynamo.reset()
        f = torch.compile(f, dynamic=False, fullgraph=True)
    xs, gs = ([torch.from_dlpack(a) for a in arrays] for arrays in (data.xs, data.gs))
    if case.op.endswith("_backward"):
        xs = [getattr(torch, case.function)(x, case.axis) for x in xs]
    calls = [functools.partial(f, x, g) for x, g in zip(xs, gs, strict=True)]
    if case.op != "gradient":
        return calls
    for x in xs:
        x.requires_grad_(True)
    return [
        lambda call=call, x=x: torch.autograd.grad(call(), x)[0]
        for call, x in zip(calls, xs, strict=True)
    ]


# --- the check of what is timed -------------------------------------------------------


@functools.partial(jax.jit, static_argnums=1)
def some_rows(x, axis, indices):
    return jnp.moveaxis(x, axis, -1).reshape(-1, x.shape[axis])[indices]


def check_rows(case):
    rows = math.prod(case.shape) // case.n
    return np.unique([0, rows // 3, rows - 1]).astype(np.int32)


def expected(case, data):
    """Some rows, in float64 at least; 0 where log_softmax is -inf."""
    take = functools.partial(some_rows, axis=case.axis, indices=check_rows(case))
    where = data.where
    if where is not None:
        where = np.asarray(take(jnp.broadcast_to(where, case.shape)))
    x, g = take(data.xs[0]), take(data.gs[0])
    if case.op in ("softmax", "log_softmax"):
        want = getattr(oracle, case.op)(x, where=where)
    else:
        want = getattr(oracle, f"{case.function}_vjp")(x, g, where=where)
    return np.where(np.isneginf(want), 0, want)


def row_error(case, got, want):
    if isinstance(got, jax.Array):
        got = np.asarray(some_rows(got, case.axis, check_rows(case)))
    else:
        rows = got.detach().movedim(case.axis, -1).reshape(-1, case.n)
        got = rows[check_rows(case).tolist()].double().cpu().numpy()
    got = np.where(np.isneginf(got.astype(np.float64)), 0, got.astype(np.float64))
    largest = np.abs(want).max(-1)
    # A row of one entry, the first of a causal mask, has a gradient of 0.
    largest = np.maximum(largest, 1e-3 * largest.max())
    error = np.abs(got - want).max(-1) / largest
    return float(error.max())  # NaN stays NaN


# --- a run ----------------------------------------------------------------------------


def wanted(name, case, args, torch):
    """Whether a contender has a part in a case."""
    torch_like = name.startswith("torch")
    if torch_like and (torch is None or case.mask):
        return False
    if name == "copy":
        return True
    if name == "default" and case.op != "gradient" and case.group != "axis":
        return False
    if name == "jax.nn custom_jvp" and case.op not in ("softmax_backward", "gradient"):
        return False
    if args.exact:
        return True
    if name in ("mosaic_gpu", "triton", "xla") and case.op == "gradient":
        return False
    if name in ("triton", "xla", "jax.nn custom_jvp") and case.op != "gradient":
        return args.smoke or (case.group == "rows" and case.n in XLA_NS)
    if name == "torch.compile":
        some = case.dtype == "bfloat16" and case.op in ("softmax", "softmax_backward")
        return some and case.group == "rows" and case.n in TORCH_COMPILE_NS
    if name.startswith(("jax.nn", "torch")) and case.dtype == "float16":
        return case.op == "gradient" and name == "jax.nn" and case.n in JAX_NN_LOG_NS
    if name == "jax.nn" and case.function == "log_softmax":
        return case.group != "rows" or case.n in JAX_NN_LOG_NS
    return True


def attempt(results, name, function, *args):
    """The function's result; else None, and why in `results`."""
    try:
        return function(*args)
    except NotImplementedError as error:
        results[name] = {"refused": " ".join(str(error).split())[:300]}
    except Exception as error:  # one contender's failure must not end the run
        results[name] = {"failed": harness.first_line(error)}
        harness.say("   ", name, results[name])
    return None


def prepare(block, data, names, pool, folder):
    """Lowers the JAX programs of the cases in turn, and compiles them in threads."""
    started = {
        (case, name): harness.Compiling(pool, lower, name, case, data, folder)
        for case in block
        for name in names[case]
        if not name.startswith(("torch", "copy"))
    }
    for compiling in started.values():
        compiling.wait()
    return started


def checked(case, name, calls, want, results):
    """The calls, if the first one's result is right."""
    error = row_error(case, calls[0](), want)
    bar = BAR[case.dtype] if name in OURS else OTHERS_BAR
    results[name] = {"row_error": error}
    if not error <= bar:
        results[name]["failed"] = f"row error {error:.1e} above {bar:.0e}"
        harness.say("   ", name, case, results[name]["failed"])
        return None
    return calls


class Timer:
    """The clocks of a run, and the copies that are timed along with everything."""

    def __init__(self, args, torch):
        self.args, self.torch = args, torch
        self.device_ms = harness.device_ms(args)
        x = harness.normal(0, args.elements, "float32")
        self.copy = functools.partial(jax.jit(jnp.negative), x)

    def __call__(self, name, calls):
        if name.startswith("torch"):
            return harness.event_ms(self.torch, calls)
        return self.device_ms(calls * -(-self.args.iterations // len(calls)))

    def turns(self, calls, results):
        """All samples of each contender, in milliseconds, the contenders in turn."""
        samples = {name: [] for name in calls}
        for name in harness.turns(calls, self.args.rounds):
            if "failed" in results.get(name, {}):
                continue
            measured = attempt(results, name, self, name, calls[name])
            if measured is not None:
                samples[name] += measured[0]
                results.setdefault(name, {})["kernels"] = measured[1]
        for name, ms in samples.items():
            if ms and "failed" not in results[name]:
                results[name] |= {"ms": statistics.median(ms), "samples": len(ms)}
                results[name] |= {"least_ms": min(ms), "most_ms": max(ms)}

    def case(self, case, data, programs, names, results):
        want, calls = expected(case, data), {}
        for name in names:
            if name == "copy":
                calls[name] = [self.copy]
                continue
            compiling = programs.pop((case, name), None)
            if compiling is None:
                made = attempt(results, name, torch_calls, name, case, data, self.torch)
            else:
                made = attempt(results, name, jax_calls, compiling, case, data)
            if made is not None:
                made = attempt(results, name, checked, case, name, made, want, results)
                if compiling is not None:
                    results[name]["compile_s"] = round(compiling.seconds, 3)
            calls[name] = made
        self.turns({name: c for name, c in calls.items() if c}, results)


def finish(case, results, args):
    for name, result in results.items():
        if "ms" in result:
            nbytes = 2 * 4 * args.elements if name == "copy" else case.bytes
            result["gbps"] = round(nbytes / result["ms"] / 1e6, 1)
    words = (f"{n} {r['gbps']:.0f}" for n, r in results.items() if "gbps" in r)
    refused = [n for n, r in results.items() if "refused" in r]
    harness.say(
        f"{case}:", ", ".join(words), f"; refused: {refused}" if refused else ""
    )
    return {
        **{"op": case.op, "dtype": case.dtype, "shape": case.shape, "n": case.n},
        **{"axis": case.axis, "mask": case.mask, "group": case.group},
        "results": results,
    }


def blocks(args):
    """Cases that share their operands, the most wanted ones first."""
    total = args.elements
    t = max(16, min(2048, math.isqrt(total // 32)))
    others = [
        *(
            ("axis", (max(1, total // (n * inner)), n, inner), 1, None)
            for n, inner in ([(8, 16)] if args.smoke else AXES)
        ),
        ("mask", (4, max(1, total // (4 * t * t)), t, t), -1, "causal"),
        ("mask", (4, max(1, total // (4 * t * t)), t, t), -1, "padding"),
    ]
    others = [o for o in others if o[0] in args.groups]
    rows = [("rows", (max(1, total // n), n), -1, None) for n in args.ns]
    rows = rows if "rows" in args.groups else []
    for i, dtype in enumerate(args.dtypes):
        for group, shape, axis, mask in [*rows, *(others if i < 2 else [])]:
            yield [
                Case(op, dtype, shape, axis, mask, group)
                for op in args.ops
                if group == "rows" or op != "gradient"
                if mask is None or op != "softmax_backward"  # takes no mask
            ]


def run_blocks(args, torch, save):
    pool = concurrent.futures.ThreadPoolExecutor(args.jobs)
    timer, flat, not_run = Timer(args, torch), {}, []
    for block in blocks(args):
        if not block:
            continue
        if harness.out_of_time(args):
            not_run += map(str, block)
            continue
        dtype = block[0].dtype
        if dtype not in flat:
            flat = {dtype: [harness.normal(s, args.elements, dtype) for s in (0, 1)]}
        data = Data.of(block[0], *flat[dtype])
        names = {
            case: [n for n in args.contenders if wanted(n, case, args, torch)]
            for case in block
        }
        programs = prepare(block, data, names, pool, args.exported)
        for case in block:
            found = {}
            timer.case(case, data, programs, names[case], found)
            save(finish(case, found, args))
        del data
    if not_run:
        harness.say(f"not run, for the budget of {args.budget} s: {not_run}")
    return not_run


# --- small problems -------------------------------------------------------------------


@dataclasses.dataclass
class Small:
    """A problem that launches dominate: jit(grad(...)) called as a user calls it."""

    shape: tuple
    dtype: str
    calls: dict
    results: dict

    @staticmethod
    def of(shape, dtype, args):
        x, w = (
            cut(harness.normal(s, math.prod(shape), dtype), shape, 0) for s in (0, 1)
        )
        case, results, calls = Case("gradient", dtype, shape), {}, {}
        want = expected(case, Data([x], [w], None))
        for name in ("default", "mosaic_gpu", "triton", "jax.nn"):
            call = functools.partial(gradient_of(jax_function(name, case)), x, w)
            if name in args.contenders and attempt(
                results, name, checked, case, name, [call], want, results
            ):
                calls[name] = call
        return Small(shape, dtype, calls, results)

    def time(self, key, rounds, clock):
        """Medians in microseconds, the contenders in turn."""
        times = {name: [] for name in self.calls}
        for name in harness.turns(times, rounds):
            times[name] += attempt(self.results, name, clock, self.calls[name]) or []
        for name, us in times.items():
            if us:
                self.results[name][key] = statistics.median(us)
        found = ((n, r[key]) for n, r in self.results.items() if key in r)
        words = ", ".join(f"{name} {us:.1f}" for name, us in found)
        harness.say(f"small {self.shape} {self.dtype}, {key}: {words}")


def run_small(args, save):
    """The host's clock first, for all: CUPTI, once started, may cost the host time."""
    shapes = SMALL[:2] if args.quick or args.smoke else SMALL
    problems = [Small.of(s, d, args) for d in args.dtypes[:2] for s in shapes]
    for problem in problems:
        clock = functools.partial(harness.wall_us, args.small_calls)
        problem.time("wall_us", args.rounds + 2, clock)
    device_ms = harness.device_ms(args)
    for problem in problems:
        clock = lambda call: [1e3 * ms for ms in device_ms([call] * 20)[0]]
        problem.time("device_us", args.rounds, clock)
        shape, dtype = problem.shape, problem.dtype
        save({"shape": shape, "dtype": dtype, "results": problem.results})


# --- the report -----------------------------------------------------------------------


def merge(results):
    """As `harness.merged`; but each cell is compared with the copy of its own run."""
    for result in results:
        for cell in result["cells"]:
            cell.setdefault("copy_gbps", copy_rate(result))
    return harness.merged(results, "small")


def copy_rate(result):
    """GB/s of the copy, the median over all cases of the run; None without."""
    copies = [cell["results"].get("copy", {}) for cell in result["cells"]]
    rates = [copy["gbps"] for copy in copies if "gbps" in copy]
    return statistics.median(rates) if rates else None


def contenders(cells):
    """Those with a figure or a failure, in the order of the colours."""
    seen = {
        name
        for cell in cells
        for name, found in cell["results"].items()
        if "ms" in found or "failed" in found or "wall_us" in found
    }
    return [name for name in COLORS if name in seen]


def entry(cell, name, rate):
    """The fraction of the copy rate; what took place where there is none."""
    found = cell["results"].get(name, {})
    if "failed" in found:
        return "failed"
    if "refused" in found:
        return "refused"
    rate = cell.get("copy_gbps", rate)
    if "gbps" not in found or not rate:
        return ""
    return f"{found['gbps'] / rate:.2f}"


def label(cell):
    dtype = cell["dtype"]
    if cell["group"] == "rows":
        return f"{dtype}, N = {cell['n']:,}"
    shape = " x ".join(map(str, cell["shape"]))
    return f"{dtype}, {shape}, " + (
        f"{cell['mask']} mask" if cell["mask"] else f"axis {cell['axis']}"
    )


def section(title, text, header, rows):
    if not rows:
        return []
    return [f"## {title}", "", text, "", *report.table(header, rows)]


def speed_tables(result, rate):
    """One per operation: the contenders in columns."""
    lines = []
    for op in TITLES:
        cells = [c for c in result["cells"] if c["op"] == op]
        names = contenders(cells)
        if not cells or op == "gradient":
            continue
        rows = [[label(c), *(entry(c, n, rate) for n in names)] for c in cells]
        text = "GB/s as a fraction of the copy rate."
        lines += section(TITLES[op], text, ["", *names], rows)
    return lines


def ratio(results, key, name="default", other="jax.nn"):
    """How many times as fast as jax.nn."""
    if key in results.get(name, {}) and key in results.get(other, {}):
        return f"{results[other][key] / results[name][key]:.2f}"
    return ""


def gradient_table(result):
    cells = [c for c in result["cells"] if c["op"] == "gradient"]
    names = contenders(cells)

    def milliseconds(cell, name):
        found = cell["results"].get(name, {})
        return f"{found['ms']:.3f}" if "ms" in found else entry(cell, name, None)

    rows = [
        [label(c), *(milliseconds(c, n) for n in names), ratio(c["results"], "ms")]
        for c in cells
    ]
    text = (
        "Milliseconds; `default` is jaxsoftmax with `implementation=None`; the last "
        "column is how many times as fast as jax.nn it is."
    )
    header = ["", *names, "speed, default : jax.nn"]
    return section(TITLES["gradient"], text, header, rows)


def small_table(result):
    names = contenders(result["small"])

    def microseconds(found):
        if "wall_us" not in found:
            return "refused" if "refused" in found else "failed" if found else ""
        device = found.get("device_us")
        return f"{found['wall_us']:.1f} ({device:.1f})" if device else "?"

    rows = [
        [
            f"{c['dtype']}, {' x '.join(map(str, c['shape']))}",
            *(microseconds(c["results"].get(n, {})) for n in names),
            ratio(c["results"], "wall_us"),
            ratio(c["results"], "device_us"),
        ]
        for c in result["small"]
    ]
    text = (
        f"{TITLES['gradient']}, microseconds per call by the host's clock, many calls "
        "blocked on once, and in brackets on the device. The last columns are how many "
        "times as fast as jax.nn the default is, by each clock."
    )
    header = ["", *names, "speed, host", "speed, device"]
    return section("Small problems", text, header, rows)


def compile_table(result):
    seconds = {}
    for cell in result["cells"]:
        for name, found in cell["results"].items():
            if "compile_s" in found and "failed" not in found:
                seconds.setdefault(name, []).append(found["compile_s"])
    rows = [
        [name, str(len(s)), f"{sorted(s)[len(s) // 2]:.2f}", f"{max(s):.2f}"]
        for name, s in seconds.items()
    ]
    text = (
        "Seconds to trace, lower and compile one program of one operation. Several are "
        "compiled at a time, so these are upper bounds."
    )
    header = ["", "programs", "median", "longest"]
    return section("Compile time", text, header, rows)


def remarks(result):
    """Why a contender has no figure, and how wrong the others are, once a reason."""
    cells = [*result["cells"], *result["small"]]
    reasons = harness.counted(cells, ("refused", "failed"))
    lines = [
        f"- {name} {kind} {count} case{'s' if count > 1 else ''}: {reason}"
        for (name, kind, reason), count in reasons.items()
    ]
    lines += [f"- {note}" for note in result.get("notes", [])]
    # "op dtype shape axis -1 mask": a line per dtype, the shapes of any operation.
    shapes = {}
    for case in result.get("not_run", []):
        _, dtype, shape = case.strip().split(maxsplit=2)
        shapes.setdefault(dtype, {})[shape.replace(" axis -1", "")] = None
    for dtype, them in shapes.items():
        lines.append(f"- not run, for want of time: {dtype} {', '.join(them)}")
    return ["## Cases without a figure", "", *lines, ""] if lines else []


def errors_table(result):
    worst = {}
    for cell in result["cells"]:
        for name, found in cell["results"].items():
            if "row_error" in found:
                key = name, cell["dtype"]
                worst[key] = max(worst.get(key, 0), found["row_error"])
    rows = [[f"{n}, {d}", f"{error:.1e}"] for (n, d), error in sorted(worst.items())]
    return section("Errors", f"{ERRORS}, over all operations.", ["", "error"], rows)


def markdown(result):
    rate = copy_rate(result)
    copy = f"{rate:,.0f} GB/s" if rate else "not measured"
    lines = [
        f"# Speed of softmax on {result['device']}",
        "",
        f"Made by `{result['command']}`. Driver {result['driver']}; "
        f"{report.versions(result)}.",
        f"{result['elements']:,} entries per case; medians over {result['rounds']} "
        f"rounds in which the contenders took turns. Clock: {result['clock']}.",
        f"Copy rate: {copy}. GB/s counts the fewest bytes: forward "
        "one read and one write, backward two reads and one write.",
        "",
        *speed_tables(result, rate),
        *gradient_table(result),
        *small_table(result),
        *compile_table(result),
        *errors_table(result),
        *remarks(result),
    ]
    return "\n".join(lines).rstrip() + "\n"


# --- the picture ----------------------------------------------------------------------


def draw_panel(axes, cells, rate):
    """Powers of two joined by a line; ragged lengths as hollow marks."""
    for name in contenders(cells):
        points = sorted(
            (cell["n"], cell["results"][name]["gbps"])
            for cell in cells
            if "gbps" in cell["results"].get(name, {})
        )
        aligned = [p for p in points if p[0] & (p[0] - 1) == 0]
        ragged = [p for p in points if p[0] & (p[0] - 1)]
        ours = name in ("mosaic_gpu", "triton", "default")
        style = {"color": COLORS[name], "zorder": 3 if ours else 2}
        if aligned:
            width = 2.2 if ours else 1.3
            axes.plot(*zip(*aligned, strict=True), "o-", ms=4, lw=width, **style)
        if ragged:
            axes.plot(*zip(*ragged, strict=True), "o", ms=6, mfc="white", **style)
    if rate:
        axes.axhline(rate, color="black", lw=1, ls="--", zorder=1)
        at = axes.get_yaxis_transform()
        axes.text(
            *(0.99, rate * 1.035, f"copy {rate:,.0f}"),
            **{"transform": at, "fontsize": 9, "ha": "right"},
        )


def finish_panel(axes, ticks, top):
    report.power_axis(axes, ticks)
    axes.set_xlim(ticks[0] / 1.4, ticks[-1] * 1.4)
    axes.set_ylim(0, top * 1.12)
    axes.set_axisbelow(True)


def draw(result, path):
    """GB/s over N: a row of panels per operation, a column per dtype."""
    pyplot = report.pyplot()
    from matplotlib.lines import Line2D

    cells = [c for c in result["cells"] if c["group"] == "rows"]
    cells = [c for c in cells if c["op"] != "gradient"]
    ops = [op for op in TITLES if any(c["op"] == op for c in cells)]
    dtypes = list(dict.fromkeys(c["dtype"] for c in cells))
    if not ops:
        return
    rate = copy_rate(result)
    size = (12, 0.9 + 2.7 * len(ops))
    figure, grid = pyplot.subplots(
        *(len(ops), len(dtypes)), figsize=size, sharex=True, sharey=True, squeeze=False
    )
    ns = sorted({c["n"] for c in cells if c["n"] & (c["n"] - 1) == 0})
    ns = ns or sorted({c["n"] for c in cells})
    ticks = ns if len(dtypes) == 1 or len(ns) < 7 else ns[::2]
    figures = [f["gbps"] for c in cells for f in c["results"].values() if "gbps" in f]
    top = max([rate or 0, *figures], default=1)
    for row, op in zip(grid, ops, strict=True):
        for axes, dtype in zip(row, dtypes, strict=True):
            panel = [c for c in cells if (c["op"], c["dtype"]) == (op, dtype)]
            if panel:
                draw_panel(axes, panel, rate)
            finish_panel(axes, ticks, top)
            axes.set_title(f"{TITLES[op]}, {dtype}", fontsize=11, loc="left")
        row[0].set_ylabel("GB/s")
    for axes in grid[-1]:
        axes.set_xlabel("N, entries per row")
    names = contenders(cells)
    line = functools.partial(Line2D, [], [], marker="o")
    handles = [line(color=COLORS[n], ms=4, label=n) for n in names]
    hollow = {"mfc": "white", "mec": "0.3", "ls": "", "label": "N not a power of 2"}
    handles.append(line(**hollow))
    place = {"x": 0.01, "y": 0.995, "ha": "left"}
    figure.suptitle(f"Softmax on {result['device']}", fontsize=13, **place)
    style = {"ncols": len(handles), "frameon": False, "fontsize": 10}
    place = {"loc": "upper left", "bbox_to_anchor": (0, 1 - 0.25 / size[1])}
    figure.legend(handles=handles, **place, **style)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.6 / size[1]))
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


# --- the program ----------------------------------------------------------------------


def settle(args):
    args.exact = args.contenders != CONTENDERS
    if args.quick:
        args.dtypes, args.ns = args.dtypes[:1], [1024, 8192, 65536, 50257]
        args.contenders = [c for c in args.contenders if c != "torch.compile"]
    if args.smoke:
        args.elements, args.small_calls = 2**13, 3
        args.ns = [64, 100, 1024]
        args.contenders = [c for c in args.contenders if not c.startswith("torch")]


def measure(args):
    settle(args)
    torch, result = harness.start(args, "CUPTI (JAX), CUDA events (torch)")
    result |= {key: getattr(args, key) for key in ("elements", "rounds", "iterations")}
    result |= {"small": [], "not_run": []}

    def save(cell, to="cells"):
        result[to].append(cell)
        harness.write(args.json, result)

    if "small" in args.groups:
        run_small(args, functools.partial(save, to="small"))
    result["not_run"] = run_blocks(args, torch, save)
    result["seconds"] = round(time.perf_counter() - harness.START, 1)
    harness.write(args.json, result)
    return result


def failures(result):
    return [
        (cell["shape"], cell["dtype"], name, found["failed"])
        for cell in result["cells"] + result["small"]
        for name, found in cell["results"].items()
        if "failed" in found and name in OURS
    ]


def add_arguments(parser):
    add = parser.add_argument
    add("--dtypes", nargs="+", default=DTYPES, choices=DTYPES)
    add("--ns", nargs="+", type=int, default=ALIGNED + OTHERS + RAGGED)
    add("--ops", nargs="+", default=list(OPS), choices=list(OPS))
    add(
        *("--contenders",),
        **{"nargs": "+", "default": CONTENDERS, "choices": CONTENDERS},
        help="exactly these, in every case; by default the slow ones have fewer",
    )
    groups = ["rows", "axis", "mask", "small"]
    add("--groups", nargs="+", default=groups, choices=groups)
    add("--elements", type=int, default=2**27, help="of each operand")
    add("--rounds", type=int, default=3)
    add("--iterations", type=int, default=5, help="calls of a contender a round")
    add("--small-calls", type=int, default=300)
    add("--jobs", type=int, default=8, help="threads that compile")
    add("--quick", action="store_true", help="bfloat16, four Ns, a tenth of the time")
    parser.set_defaults(budget=480)


if __name__ == "__main__":
    harness.main(
        __doc__,
        harness.Program(
            measure, markdown, draw, add_arguments, merge, failures, export
        ),
    )
