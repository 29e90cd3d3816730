"""Times softmax and log_softmax on a GPU against jax.nn, torch and a plain copy.

    python benchmarks/gpu_softmax.py --json F.json --markdown F.md --png F.png
    python benchmarks/gpu_softmax.py --render F.json --markdown F.md --png F.png

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
write; a mask is not counted. The copy, to compare with, is the better of an elementwise
JAX kernel (a negation) and torch's `copy_`. A few rows of every timed result are
checked against numpy in float64.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import importlib
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time

# Torch and JAX share the memory of the device.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import gpu_report
import jax
import jax.numpy as jnp
import numpy as np

import jaxsoftmax

ALIGNED = [128, 512, 1024, 4096, 8192, 16384, 32768, 65536, 131072, 262144, 1048576]
RAGGED = [1000, 30522, 50257]
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
    *("jax.nn", "jax.nn custom_jvp", "torch", "torch.compile", "copy", "torch copy"),
]
# Compiling is what takes time: these contenders do not need every case.
XLA_NS = [1024, 16384, 65536]
TORCH_COMPILE_NS = [1024, 8192, 65536]
JAX_NN_LOG_NS = [128, 1024, 4096, 16384, 32768, 65536, 262144, 50257]
SMALL = [(8, 16), (8, 1024), (64, 128), (128, 512), (512, 1024), (1024, 4096)]
SMALL += [(4096, 1024)]
# Worst row error of the checked rows, relative to the row's largest entry: as in the
# tests for what is ours; for the others only what shows that they compute the same.
BAR = {"float32": 4e-6, "bfloat16": 8e-3, "float16": 1e-3}
OTHERS_BAR = 0.3
START = time.perf_counter()


def say(*words):
    print(f"[{time.perf_counter() - START:6.1f} s]", *words, flush=True)


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


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def normal(seed, size, dtype):
    return jax.random.normal(jax.random.key(seed), (size,), jnp.float32).astype(dtype)


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


@dataclasses.dataclass
class Program:
    """A lowered program, and the one that makes its first operand, if there is one."""

    run: object
    keep: object = None
    seconds: float = 0.0

    def compile(self):
        start = time.perf_counter()
        self.run = self.run.compile()
        self.seconds += time.perf_counter() - start
        if self.keep is not None:
            self.keep = self.keep.compile()
        return self

    def calls(self, case, data):
        """One call for each buffer."""
        if case.op == "gradient":
            args = [(x, g, data.where) for x, g in zip(data.xs, data.gs, strict=True)]
        elif self.keep is None:
            args = [(x, data.where) for x in data.xs]
        else:
            kept = (self.keep(x, data.where) for x in data.xs)
            args = list(zip(kept, data.gs, strict=True))
        return [functools.partial(self.run, *a) for a in args]


def jax_function(name, case):
    """(x, where) -> y, and the setting to trace it under."""
    if name in OURS:
        f = getattr(jaxsoftmax, case.function)
        f = functools.partial(f, implementation=OURS[name])
    else:
        f = getattr(jax.nn, case.function)
    return lambda x, where: f(x, axis=case.axis, where=where)


def lower_backward(f, x, g, where):
    """The vjp alone. What it keeps is an operand, made by a program of its own."""
    trees = []

    def keep(x, where):
        leaves, tree = jax.tree.flatten(jax.vjp(lambda x: f(x, where), x)[1])
        trees.append(tree)
        return leaves

    def backward(kept, g):
        return jax.tree.unflatten(trees[0], kept)(g)[0]

    keep = jax.jit(keep)
    kept = keep.eval_shape(x, where)
    return Program(jax.jit(backward).lower(kept, g), keep.lower(x, where))


def gradient_of(f):
    def loss(x, w, where=None):
        return jnp.sum((f(x, where) * w).astype(jnp.float32))

    return jax.jit(jax.grad(loss))


def lower(name, case, data):
    f, x, g = jax_function(name, case), data.xs[0], data.gs[0]
    start = time.perf_counter()
    with jax.softmax_custom_jvp(name == "jax.nn custom_jvp"):
        if case.op == "gradient":
            program = Program(gradient_of(f).lower(x, g, data.where))
        elif case.op.endswith("_backward"):
            program = lower_backward(f, x, g, data.where)
        else:
            program = Program(jax.jit(f).lower(x, data.where))
    program.seconds = time.perf_counter() - start
    return program


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
    if name == "torch copy":
        return [functools.partial(torch.empty_like(x).copy_, x) for x in xs]
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


def find_torch():
    try:
        torch = importlib.import_module("torch")
    except Exception as error:  # a broken installation is not this program's subject
        say(f"without torch: {error}")
        return None
    return torch if torch.cuda.is_available() else None


TRITON_CACHE = os.environ.get("TRITON_CACHE_DIR")


def restore_triton_cache():
    """For torch.compile: importing jax-triton leaves Triton without a cache folder."""
    os.environ.pop("TRITON_CACHE_DIR", None)
    if TRITON_CACHE is not None:
        os.environ["TRITON_CACHE_DIR"] = TRITON_CACHE


# --- clocks ---------------------------------------------------------------------------


def cupti_ms(calls):
    """Milliseconds of each call: the sum over its kernels; and how many kernels.

    As `jax.experimental.mosaic.gpu.profiler.Cupti(finalize=False)` does for one call
    repeated; here the calls have buffers of their own.
    """
    from jax.experimental.mosaic.gpu import profiler

    extension = profiler.mosaic_gpu_lib._mosaic_gpu_ext
    jax.block_until_ready(calls[0]())
    extension._cupti_init()
    try:
        jax.block_until_ready([call() for call in calls])
    finally:
        timings = extension._cupti_get_timings(False)
    if not timings or len(timings) % len(calls):
        raise RuntimeError(f"CUPTI saw {len(timings)} kernels in {len(calls)} calls")
    each = len(timings) // len(calls)
    return [
        sum(ms for _, ms in timings[i : i + each]) for i in range(0, len(timings), each)
    ], each


def host_ms(calls):
    """Stands in for the device's clocks where there is no GPU."""
    times = []
    for call in calls:
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(1e3 * (time.perf_counter() - start))
    return times, None


def event_ms(torch, calls):
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    repeated = [calls[i % len(calls)] for i in range(10)]
    repeated[0]()
    torch.cuda.synchronize()
    start.record()
    kept = [call() for call in repeated]  # or all would write to the same memory
    end.record()
    torch.cuda.synchronize()
    del kept
    return [start.elapsed_time(end) / len(repeated)], None


# --- the check of what is timed -------------------------------------------------------


@functools.partial(jax.jit, static_argnums=1)
def some_rows(x, axis, indices):
    return jnp.moveaxis(x, axis, -1).reshape(-1, x.shape[axis])[indices]


def reference(op, x, g, where):
    """In float64, of rows; -inf where masked."""
    x = np.where(where, x, -np.inf)
    d = x - x.max(-1, keepdims=True)
    e = np.exp(d)
    p = e / e.sum(-1, keepdims=True)
    if op == "softmax":
        return p
    if op == "log_softmax":
        return np.where(where, d - np.log(e.sum(-1, keepdims=True)), 0)
    if op == "log_softmax_backward":
        g = np.where(where, g, 0)
        return g - p * g.sum(-1, keepdims=True)
    return p * (g - (p * g).sum(-1, keepdims=True))


def check_rows(case):
    rows = math.prod(case.shape) // case.n
    return np.unique([0, rows // 3, rows - 1]).astype(np.int32)


def expected(case, data):
    take = functools.partial(some_rows, axis=case.axis, indices=check_rows(case))
    x, g = (np.asarray(take(a[0])).astype(np.float64) for a in (data.xs, data.gs))
    if data.where is None:
        return reference(case.op, x, g, True)
    where = np.asarray(take(jnp.broadcast_to(data.where, case.shape)))
    return reference(case.op, x, g, where)


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
    if name in ("copy", "torch copy"):
        return name == "copy" or case.group == "rows"
    if name == "default" and case.op != "gradient":
        return False
    if name == "jax.nn custom_jvp" and case.op not in ("softmax_backward", "gradient"):
        return False
    if args.exact:
        return True
    if name in ("mosaic_gpu", "triton", "xla") and case.op == "gradient":
        return False
    if name == "xla":
        return args.smoke or (case.group == "rows" and case.n in XLA_NS)
    if name == "torch.compile":
        return (
            case.n in TORCH_COMPILE_NS
            and case.dtype == "bfloat16"
            and case.group == "rows"
            and case.op in ("softmax", "softmax_backward")
        )
    if name.startswith(("jax.nn", "torch")) and case.dtype == "float16":
        return case.op == "gradient" and name == "jax.nn" and case.n in JAX_NN_LOG_NS
    if name == "jax.nn" and case.function == "log_softmax":
        return case.group != "rows" or case.n in JAX_NN_LOG_NS
    return True


def first_line(error):
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def attempt(results, name, function, *args):
    """The function's result; else None, and why in `results`."""
    try:
        return function(*args)
    except NotImplementedError as error:
        results[name] = {"refused": " ".join(str(error).split())[:300]}
    except Exception as error:  # one contender's failure must not end the run
        results[name] = {"failed": first_line(error)}
        say("   ", name, results[name])
    return None


def prepare(block, data, names, pool):
    """Lowers the JAX programs of the cases in turn, and compiles them in threads."""
    pending, results = {}, {case: {} for case in block}
    for case in block:
        for name in names[case]:
            if name.startswith(("torch", "copy")):
                continue
            program = attempt(results[case], name, lower, name, case, data)
            if program is not None:
                pending[case, name] = program, pool.submit(program.compile)
    programs = {}
    for (case, name), (program, future) in pending.items():
        if attempt(results[case], name, future.result) is not None:
            programs[case, name] = program
    return programs, results


def checked(case, name, calls, want, results):
    """The calls, if the first one's result is right."""
    error = row_error(case, calls[0](), want)
    bar = BAR[case.dtype] if name in OURS else OTHERS_BAR
    results[name] = {"row_error": error}
    if not error <= bar:
        results[name]["failed"] = f"row error {error:.1e} above {bar:.0e}"
        say("   ", name, case, results[name]["failed"])
        return None
    return calls


class Timer:
    """The clocks of a run, and the copies that are timed along with everything."""

    def __init__(self, args, torch):
        self.args, self.torch = args, torch
        self.device_ms = host_ms if args.smoke else cupti_ms
        self.negate = jax.jit(jnp.negative)

    def __call__(self, name, calls):
        if name.startswith("torch"):
            return event_ms(self.torch, calls)
        return self.device_ms(calls * -(-self.args.iterations // len(calls)))

    def turns(self, calls, results):
        """All samples of each contender, in milliseconds, the contenders in turn."""
        samples = {name: [] for name in calls}
        for i in range(self.args.rounds):
            for name in list(calls) if i % 2 else list(reversed(calls)):
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

    def case(self, case, data, flat, programs, names, results):
        want, calls = expected(case, data), {}
        for name in names:
            if name == "copy":
                calls[name] = [functools.partial(self.negate, flat)]
            elif name.startswith("torch"):
                made = attempt(results, name, torch_calls, name, case, data, self.torch)
                calls[name] = made
                if made is not None and name != "torch copy":
                    calls[name] = attempt(
                        results, name, checked, case, name, made, want, results
                    )
            elif (case, name) in programs:
                program = programs.pop((case, name))
                made = attempt(results, name, program.calls, case, data)
                calls[name] = made and attempt(
                    results, name, checked, case, name, made, want, results
                )
                if name in results:
                    results[name]["compile_s"] = round(program.seconds, 3)
        self.turns({name: c for name, c in calls.items() if c}, results)


def copy_bytes(case, name, flat):
    """Of a contender's call; a JAX copy is of all 2^27 entries, whatever the rows."""
    size = flat.size if name == "copy" else math.prod(case.shape)
    return 2 * size * flat.dtype.itemsize


def finish(case, results, flat):
    for name, result in results.items():
        if "ms" in result:
            copies = name in ("copy", "torch copy")
            count = copy_bytes(case, name, flat) if copies else case.bytes
            result["gbps"] = round(count / result["ms"] / 1e6, 1)
    words = (f"{n} {r['gbps']:.0f}" for n, r in results.items() if "gbps" in r)
    refused = [n for n, r in results.items() if "refused" in r]
    say(f"{case}:", ", ".join(words), f"; refused: {refused}" if refused else "")
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
        ("axis", (4096, 4096) if not args.smoke else (32, 64), 0, None),
        ("axis", (64, 1024, 512) if not args.smoke else (4, 8, 16), 1, None),
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
        if time.perf_counter() - START > args.budget:
            not_run += map(str, block)
            continue
        dtype = block[0].dtype
        if dtype not in flat:
            flat = {dtype: [normal(s, args.elements, dtype) for s in (0, 1)]}
        data = Data.of(block[0], *flat[dtype])
        names = {
            case: [n for n in args.contenders if wanted(n, case, args, torch)]
            for case in block
        }
        programs, results = prepare(block, data, names, pool)
        for case in block:
            found = results[case]
            timer.case(case, data, flat[dtype][0], programs, names[case], found)
            save(finish(case, found, flat[dtype][0]))
        del data
    if not_run:
        say(f"not run, for the budget of {args.budget} s: {not_run}")
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
        x, w = (cut(normal(s, math.prod(shape), dtype), shape, 0) for s in (0, 1))
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
        for i in range(rounds):
            for name in list(times) if i % 2 else list(reversed(times)):
                times[name] += (
                    attempt(self.results, name, clock, self.calls[name]) or []
                )
        for name, us in times.items():
            if us:
                self.results[name][key] = statistics.median(us)
        found = ((n, r[key]) for n, r in self.results.items() if key in r)
        words = ", ".join(f"{name} {us:.1f}" for name, us in found)
        say(f"small {self.shape} {self.dtype}, {key}: {words}")

    def record(self):
        return {"shape": self.shape, "dtype": self.dtype, "results": self.results}


def wall_us(calls, call):
    start = time.perf_counter()
    for _ in range(calls):
        out = call()
    jax.block_until_ready(out)
    return [1e6 * (time.perf_counter() - start) / calls]


def device_us(clock, call):
    return [1e3 * ms for ms in clock([call] * 20)[0]]


def run_small(args, save):
    """The host's clock first, for all: CUPTI, once started, may cost the host time."""
    shapes = SMALL[:2] if args.quick or args.smoke else SMALL
    problems = [Small.of(s, d, args) for d in args.dtypes[:2] for s in shapes]
    for problem in problems:
        clock = functools.partial(wall_us, args.small_calls)
        problem.time("wall_us", args.rounds + 2, clock)
    clock = functools.partial(device_us, host_ms if args.smoke else cupti_ms)
    for problem in problems:
        problem.time("device_us", args.rounds, clock)
        save(problem.record())


# --- the program ----------------------------------------------------------------------


def nvidia_smi(field):
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]
    try:
        out = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return out.stdout.strip().splitlines()[0]


def versions():
    found = {"python": platform.python_version(), "jaxsoftmax": jaxsoftmax.__version__}
    for name in ("jax", "jaxlib", "torch", "triton", "jax_triton"):
        try:
            found[name] = importlib.import_module(name).__version__
        except Exception:  # absent, or refuses to be imported here
            found[name] = None
    return found


def describe(args):
    return {
        "device": jax.devices()[0].device_kind,
        "driver": nvidia_smi("driver_version"),
        "versions": versions(),
        "command": " ".join(["python", *sys.argv]),
        "elements": args.elements,
        "rounds": args.rounds,
        "iterations": args.iterations,
        "clock": "host" if args.smoke else "CUPTI (JAX), CUDA events (torch)",
        "cells": [],
        "small": [],
        "not_run": [],
    }


def write(path, result):
    """Replaces the file as a whole: a run that is cut short leaves the last one."""
    if path:
        with open(path + ".part", "w") as file:
            json.dump(result, file, indent=1)
            file.write("\n")
        os.replace(path + ".part", path)


def measure(args):
    torch = None if args.smoke else find_torch()
    result = describe(args)
    say(f"{result['device']}, driver {result['driver']}, {result['versions']}")

    def save(cell, to="cells"):
        result[to].append(cell)
        write(args.json, result)

    if "small" in args.groups:
        run_small(args, functools.partial(save, to="small"))
    result["not_run"] = run_blocks(args, torch, save)
    result["seconds"] = round(time.perf_counter() - START, 1)
    write(args.json, result)
    return result


def failures(result):
    return [
        (cell["shape"], cell["dtype"], name, found["failed"])
        for cell in result["cells"] + result["small"]
        for name, found in cell["results"].items()
        if "failed" in found and name in OURS
    ]


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--dtypes", nargs="+", default=DTYPES, choices=DTYPES)
    add("--ns", nargs="+", type=int, default=ALIGNED + RAGGED)
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
    add("--budget", type=float, default=480, help="starts nothing new after (s)")
    add("--quick", action="store_true", help="bfloat16, four Ns, a tenth of the time")
    add("--smoke", action="store_true", help="tiny, on the host's clock: no GPU needed")
    add("--json", help="write the figures here, after every case")
    add("--markdown", help="write the tables here")
    add("--png", help="draw GB/s over N here; needs matplotlib")
    add("--render", nargs="+", help="measure nothing: the report of these JSON files")
    return parser.parse_args()


def settings():
    args = parse()
    args.exact = args.contenders != CONTENDERS
    if args.quick:
        args.dtypes, args.ns = args.dtypes[:1], [1024, 8192, 65536, 50257]
        args.contenders = [c for c in args.contenders if c != "torch.compile"]
    if args.smoke:
        args.elements, args.small_calls = 2**13, 3
        args.ns = [64, 100, 1024]
        args.contenders = [c for c in args.contenders if not c.startswith("torch")]
    return args


def main():
    args = settings()
    result = gpu_report.merge(args.render) if args.render else measure(args)
    table = gpu_report.markdown(result)
    if args.markdown:
        with open(args.markdown, "w") as file:
            file.write(table)
    if args.png:
        gpu_report.draw(result, args.png)
    if args.render:
        return 0
    print(table)
    failed = failures(result)
    for failure in failed:
        print("FAILED:", *failure)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
