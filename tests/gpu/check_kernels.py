"""Checks the GPU kernels against the long-double oracle, on the GPU at hand.

    python tests/gpu/check_kernels.py [--implementation mosaic_gpu triton] [--quick]

Exits with 1 if anything is wrong, or if an implementation refuses everything. A shape
that an implementation refuses is no failure: it is counted, with the reason. Also
``--implementation xla --smoke`` on a machine with no GPU, which tests this program.

What is checked of every case of "lengths", "masks" and "ragged", beside the values:

- Poison. Each output is written into a donated buffer of 0xFF bytes (NaN), so what a
  kernel leaves out is seen. That XLA did use the donated buffer is read from its
  address; how often it did is reported.
- Guard bands. Operands and outputs are allocated in turn with buffers of 0xFF that
  stay alive. What a kernel reads there is NaN, and shows in the values; that it wrote
  nothing there is read back. That the guards are neighbours is the allocator's choice:
  it, too, is read from the addresses and reported. Between an array's end and the next
  multiple of 256 bytes there is no guard. What kernels hand to each other inside a
  program (the row maximum) is not guarded.
- Repetition. Three runs, on other memory, agree in every bit.

Accesses out of bounds, to the byte, and races in shared memory are what NVIDIA's
sanitizer finds. ``--sanitize`` runs a few cases of each kind with an allocator that the
sanitizer can see into (one cudaMalloc a buffer), without CUDA graphs or autotuning:

    compute-sanitizer --tool memcheck --target-processes application-only \\
        --error-exitcode 3 python tests/gpu/check_kernels.py --sanitize
    compute-sanitizer --tool racecheck --target-processes application-only \\
        --error-exitcode 3 python tests/gpu/check_kernels.py --sanitize

What blocks of a cluster send each other, racecheck may not follow. The group "exchange"
is for that: a million rows that several blocks share, each compared with XLA's.

Bars are those of tests/test_softmax.py: values within 1 ulp in 16 bits and 8 in
float32; gradients, relative to the row's largest, 1e-6 in float32 (4e-6 for log_softmax
and for rows above 4096), 8e-3 in bfloat16, 1e-3 in float16; where a row's operands are
of two dtypes, the wider bar. Long rows are compared on a sample, first and last
included.
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import functools
import importlib
import itertools
import math
import os
import pathlib
import sys
import time
import warnings

if "--sanitize" in sys.argv:  # read when JAX starts
    os.environ["XLA_PYTHON_CLIENT_ALLOCATOR"] = "platform"
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "")
        + " --xla_gpu_autotune_level=0 --xla_gpu_enable_command_buffer="
    )

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from support import oracle

import jaxsoftmax

OPS = ("softmax", "log_softmax")
DTYPES = ("bfloat16", "float16", "float32")
VALUE_BAR = {"float32": 8, "bfloat16": 1, "float16": 1}
GRADIENT_BAR = {"float32": 1e-6, "bfloat16": 8e-3, "float16": 1e-3}
SHORT = [1, 2, 3, 5, 7, 8, 10, 16, 31, 32, 33, 50, 64, 100]
PRIMES = [1009, 8191, 30529, 65537, 131071]
LONG = [1000, 11264, 19456, 30522, 32000, 50257, 524288, 1048576]
START = time.perf_counter()


def say(*words):
    print(f"[{time.perf_counter() - START:6.1f} s]", *words, flush=True)


class Skip(Exception):
    """A case that cannot run here, with the reason."""


# --- what was found -------------------------------------------------------------------


@dataclasses.dataclass
class Report:
    outcomes: dict = dataclasses.field(
        default_factory=lambda: collections.defaultdict(collections.Counter)
    )
    refusals: collections.Counter = dataclasses.field(
        default_factory=collections.Counter
    )
    failures: list = dataclasses.field(default_factory=list)
    skipped: list = dataclasses.field(default_factory=list)
    worst: dict = dataclasses.field(default_factory=dict)
    memory: collections.Counter = dataclasses.field(default_factory=collections.Counter)

    def record(self, case, outcome, why=""):
        self.outcomes[case.implementation, case.group][outcome] += 1
        if outcome == "refused":
            self.refusals[case.implementation, why] += 1
        elif outcome == "skipped":
            self.skipped.append(f"{case}: {why}")
        elif outcome == "failed":
            self.failures.append(f"{case}: {why}")
            say("FAILED", self.failures[-1])

    def measured(self, case, what, dtype, error, bar):
        """Keeps the worst error; one above its bar is a failure of the case."""
        key = case.implementation, case.op, what, str(jnp.dtype(dtype)), bar
        self.worst[key] = max(self.worst.get(key, 0.0), error)
        assert error <= bar, f"{what}: error {error:.2e} above {bar:.0e}"

    def refused_everything(self):
        totals = collections.defaultdict(collections.Counter)
        for (implementation, _), counts in self.outcomes.items():
            totals[implementation].update(counts)
        return [name for name, counts in totals.items() if not counts["passed"]]

    def print(self):
        columns = ("passed", "failed", "refused", "skipped")
        print(f"\n{'':34}" + "".join(f"{c:>9}" for c in columns))
        for key, counts in self.outcomes.items():
            print(f"{' '.join(key):34}" + "".join(f"{counts[c]:9}" for c in columns))
        print(f"\n{'worst error':60}{'bar':>10}")
        for key, error in sorted(self.worst.items()):
            print(f"{' '.join(key[:-1]):48}{error:12.2e}{key[-1]:10.0e}")
        print("\nGuards and poison, in arrays:")
        for what in ("outputs", "outputs in poisoned memory"):
            print(f"  {what}: {self.memory[what]}")
        for what in ("arrays", "arrays between two guards"):
            print(f"  {what}: {self.memory[what]}")
        for title, lines in (
            ("Refused", [f"{n} x {i}: {w}" for (i, w), n in self.refusals.items()]),
            ("Skipped", self.skipped),
            ("FAILED", self.failures),
        ):
            if lines:
                print(f"\n{title}:", *lines, sep="\n  ")
        for name in self.refused_everything():
            print(f"\nFAILED: {name} passed no case")


# --- cases ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """A program to compile and what to check of it.

    `check(compiled, case, report)` raises what is wrong; `lower(case)` gives one or
    several lowered programs in a list.
    """

    implementation: str
    group: str
    op: str
    detail: str
    lower: object
    check: object

    def __str__(self):
        return f"{self.implementation} {self.group} {self.op} {self.detail}"


def describe(error):
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"


def guarded(report, case, function):
    """The function's result; None, and the outcome in the report, if it raised."""
    try:
        return function()
    except NotImplementedError as error:
        report.record(case, "refused", " ".join(str(error).split())[:240])
    except Skip as error:
        report.record(case, "skipped", str(error))
    except Exception as error:  # the other cases are still worth running
        report.record(case, "failed", describe(error))
    return None


def run(cases, report, jobs):
    """Lowers the cases in turn; compiles ahead in threads; checks in order."""
    pool = concurrent.futures.ThreadPoolExecutor(jobs)
    waiting = collections.deque()

    def finish():
        case, futures = waiting.popleft()

        def check():
            case.check([future.result() for future in futures], case, report)
            return True

        if guarded(report, case, check):
            report.record(case, "passed")

    group = None
    for case in cases:
        if (case.implementation, case.group) != group:
            group = case.implementation, case.group
            say(*group)
        lowered = guarded(report, case, functools.partial(case.lower, case))
        if lowered is not None:
            waiting.append((case, [pool.submit(low.compile) for low in lowered]))
        if len(waiting) > 2 * jobs:
            finish()
    while waiting:
        finish()


# --- memory: poison and guard bands ---------------------------------------------------


def ones(nbytes):
    return np.full(nbytes, 0xFF, np.uint8)


def put(array):
    return jax.device_put(array, may_alias=False)


def poison(shape, dtype):
    dtype = jnp.dtype(dtype)
    return ones(math.prod(shape) * dtype.itemsize).view(dtype).reshape(shape)


@dataclasses.dataclass
class Arena:
    """Arrays on the device, each between two guards where the allocator allows it."""

    arrays: list
    guards: list

    @staticmethod
    def of(arrays):
        guards, placed = [], []
        for array in arrays:
            size = min(max(array.nbytes, 4096), 2**20)
            if not guards:
                guards.append(put(ones(size)))
            placed.append(put(array))
            guards.append(put(ones(size)))
        return Arena(placed, guards)

    def count(self, report):
        starts = {g.unsafe_buffer_pointer() for g in self.guards}
        ends = {g.unsafe_buffer_pointer() + g.nbytes for g in self.guards}
        report.memory["arrays"] += len(self.arrays)
        for array in self.arrays:
            start = array.unsafe_buffer_pointer()
            after = start + array.nbytes
            before = any(start - 256 < end <= start for end in ends)
            follows = any(after <= begin < after + 256 for begin in starts)
            report.memory["arrays between two guards"] += before and follows

    def check(self):
        for guard in self.guards:
            assert (np.asarray(guard) == 0xFF).all(), "wrote out of bounds"


def run_in_arena(compiled, outputs, operands, report):
    """Runs once; results as numpy arrays. `outputs` are poison to write them over."""
    arena = Arena.of([*outputs, *operands])
    arena.count(report)
    donated = {a.unsafe_buffer_pointer() for a in arena.arrays[: len(outputs)]}
    results = compiled(*arena.arrays)
    used = donated & {r.unsafe_buffer_pointer() for r in results}
    report.memory["outputs"] += len(outputs)
    report.memory["outputs in poisoned memory"] += len(used)
    values = [np.asarray(r) for r in results]
    arena.check()
    return values


# --- the vjp of one call: value and gradient ------------------------------------------


@dataclasses.dataclass(frozen=True)
class Call:
    """Shapes, dtypes and options of a call, and how to make its operands."""

    shape: tuple
    dtype: str
    axis: object = -1
    where: tuple | None = None  # its shape
    scale: float | None = None
    out: str | None = None
    repeats: int = 3
    spread: float = 3.0
    hidden: float | None = None  # what stands behind the mask

    @property
    def out_dtype(self):
        return self.out or self.dtype

    def __str__(self):
        options = {"where": self.where, "scale": self.scale, "out": self.out}
        words = [f"{k}={v}" for k, v in options.items() if v is not None]
        shape = "x".join(map(str, self.shape))
        return " ".join([shape, self.dtype, f"axis={self.axis}", *words])


def function(case, call):
    f = getattr(jaxsoftmax, case.op)
    return functools.partial(
        f,
        axis=call.axis,
        scale=call.scale,
        dtype=call.out,
        implementation=case.implementation,
    )


def lower_vjp(call, case):
    f = function(case, call)

    def program(y, dx, x, g, where=None):
        del y, dx  # donated: their memory is the results'
        y, pull = jax.vjp(lambda x: f(x, where=where), x)
        return y, pull(g)[0]

    spec = jax.ShapeDtypeStruct
    y, x = spec(call.shape, call.out_dtype), spec(call.shape, call.dtype)
    masks = [] if call.where is None else [spec(call.where, bool)]
    jitted = jax.jit(program, donate_argnums=(0, 1), keep_unused=True)
    return [jitted.lower(y, x, x, y, *masks)]


def make_where(shape, rng):
    """Seven in ten; of a mask of whole rows, every other row."""
    if shape[-1] == 1:
        return (np.arange(math.prod(shape)) % 2 == 0).reshape(shape)
    where = rng.random(size=shape) < 0.7
    if where.ndim > 1:  # a row with nothing in it
        where.reshape(-1, shape[-1])[-1] = False
    return where


def operands(call, seed=0):
    """(x, g, where) without anything hidden behind the mask."""
    rng = np.random.default_rng(seed)
    x = (call.spread * rng.standard_normal(call.shape, np.float32)).astype(
        jnp.dtype(call.dtype)
    )
    g = rng.standard_normal(call.shape, np.float32).astype(jnp.dtype(call.out_dtype))
    return x, g, None if call.where is None else make_where(call.where, rng)


def hide(array, where, value):
    if value is None or where is None:
        return array
    return np.where(where, array, array.dtype.type(value))


def sample(call, *arrays):
    """Rows to compare where all would take the oracle too long; None stays None."""
    if call.axis != -1 or not call.shape:
        return arrays
    n = call.shape[-1]
    rows = math.prod(call.shape) // n
    wanted = max(2, 2**16 // n)
    if rows <= wanted:
        return arrays
    chosen = np.unique(np.linspace(0, rows - 1, wanted).astype(int))
    return tuple(
        a if a is None else np.broadcast_to(a, call.shape).reshape(-1, n)[chosen]
        for a in arrays
    )


def check_value(case, call, report, got, want):
    dtype = call.out_dtype
    nothing = ~np.isfinite(want) | (want == 0)
    gone = np.asarray(got, np.float64)[nothing]
    np.testing.assert_array_equal(gone, want[nothing].astype(np.float64))
    got, want = got[~nothing], want[~nothing]
    bar = VALUE_BAR[dtype]
    if call.scale is not None and dtype == "float32":
        bar = 300  # scale (x - max) is rounded, relative to P by half an ulp of 300
    error = oracle.ulps(got, want, dtype, flushed=call.shape[-1])
    report.measured(case, "value, ulp", dtype, error, bar)
    info = jnp.finfo(dtype)
    below = np.abs(want) < float(info.tiny)
    step = float(info.tiny) * max(float(info.eps), 1.0 if dtype == "float32" else 0.0)
    lost = np.abs(got.astype(np.longdouble) - want)[below].max(initial=0)
    assert lost <= step, f"a subnormal value is wrong by {lost:.1e}"


def gradient_error(got, want, g, call):
    """Worst error relative to the row's largest gradient.

    A float16 P may be subnormal: its step, times the cotangent, is no error.
    """
    got = np.asarray(got, np.float64).astype(np.longdouble)
    assert np.isfinite(got).all(), "gradient not finite"
    steps = [2.0**-24 for d in (call.dtype, call.out_dtype) if d == "float16"]
    floor = sum(steps) * max(1.0, np.abs(np.asarray(g, np.float64)).max(initial=0))
    largest = np.abs(want).max(axis=call.axis, keepdims=True, initial=0)
    error = np.maximum(np.abs(got - want) - floor - 1e-37, 0)
    error = error.max(axis=call.axis, keepdims=True, initial=0)
    assert (error[largest == 0] == 0).all(), "a gradient that should be 0 is not"
    some = largest > 0
    return float((error[some] / largest[some]).max(initial=0))


def gradient_bar(case, call):
    dtypes = {call.dtype, call.out_dtype}
    bar = max(GRADIENT_BAR[d] for d in dtypes)
    if dtypes == {"float32"}:
        axes = range(len(call.shape)) if call.axis is None else np.atleast_1d(call.axis)
        n = math.prod(call.shape[a] for a in axes)
        bar = 4e-6 if case.op == "log_softmax" or n > 4096 else bar
        bar = bar if call.scale is None else 300 * float(jnp.finfo("float32").eps)
    return bar


def compare(case, call, report, data, results):
    x, g, where, y, dx = sample(call, *data, *results)
    scale = 1.0 if call.scale is None else call.scale
    value = getattr(oracle, case.op)(x, call.axis, where, scale)
    check_value(case, call, report, np.asarray(y), value)
    want = getattr(oracle, f"{case.op}_vjp")(x, g, call.axis, where, scale)
    error = gradient_error(dx, want, g, call)
    report.measured(case, "gradient", call.dtype, error, gradient_bar(case, call))


def check_vjp(call, compiled, case, report):
    data = operands(call)
    x, g, where = data
    shown = [hide(x, where, call.hidden), hide(g, where, call.hidden)]
    shown += [] if where is None else [where]
    runs = []
    for _ in range(call.repeats):
        outputs = [poison(call.shape, d) for d in (call.out_dtype, call.dtype)]
        runs.append(run_in_arena(compiled[0], outputs, shown, report))
    for again in runs[1:]:
        for a, b in zip(runs[0], again, strict=True):
            assert a.tobytes() == b.tobytes(), "another run gave other bits"
    for result in runs[0]:  # all of it; the oracle may see a sample of rows
        assert not np.isnan(result.astype(np.float32)).any(), "NaN, or not written"
    compare(case, call, report, data, runs[0])


def vjp_case(implementation, group, op, call):
    lower = functools.partial(lower_vjp, call)
    check = functools.partial(check_vjp, call)
    return Case(implementation, group, op, str(call), lower, check)


# --- groups of cases ------------------------------------------------------------------


def boundaries(implementation):
    """Where another kernel may take over, which a kernel module may name itself."""
    powers = {2**k for k in range(7, 19)}
    try:
        module = importlib.import_module(f"jaxsoftmax._rows.{implementation}")
    except Exception:  # the refusals will say why
        return powers
    return powers | set(getattr(module, "REGIME_BOUNDARIES", ()))


def rows_for(n, i):
    """1, 2 or 199 in turn; long rows are not many."""
    if n > 2**18:
        return 1 + i % 2
    return (1, 2, 199)[i % 3] if n <= 8192 else (1, 2, 5)[i % 3]


def lengths(implementation, args):
    """Boundaries in every dtype and both ops; their neighbours and others in turn."""
    edges = sorted(n for n in boundaries(implementation) if n <= args.longest)
    steps = (-128, -8, -1, 1, 8, 128)
    others = {n + s for n in edges for s in steps if n + s > 0} - set(edges)
    others |= {*SHORT, *PRIMES, *LONG}
    if args.quick:
        edges = edges[::2]
        others = {*SHORT[::3], *PRIMES[::2], *LONG, *sorted(others)[1::7]}
    for i, (n, dtype, op) in enumerate(itertools.product(edges, DTYPES, OPS)):
        if args.quick and i % 2 != (i // 6) % 2:
            continue
        call = Call((rows_for(n, i), n), dtype)
        yield vjp_case(implementation, "lengths", op, call)
    for i, n in enumerate(sorted(n for n in others if n <= args.longest)):
        call = Call((rows_for(n, i), n), DTYPES[i % 3])
        yield vjp_case(implementation, "lengths", OPS[i // 3 % 2], call)


def many_long_rows(implementation, args):
    """As many blocks, and clusters of blocks, as a GPU runs at once, and more."""
    for i, n in enumerate((16384, 32768, 65536, 131072)):
        if n <= args.longest:
            call = Call((199, n), DTYPES[i % 3], repeats=2)
            yield vjp_case(implementation, "many long rows", OPS[i % 2], call)
    # Read twice, in chunks that divide the row or do not. Not float16: such
    # probabilities are below its normal numbers.
    lengths = (2**20, 3 * 2**19 + 128, 2**21)
    dtypes = ("bfloat16", "float32", "float32", "bfloat16")
    for i, (n, dtype) in enumerate(itertools.product(lengths, dtypes)):
        if n <= args.longest:
            call = Call((19, n), dtype, repeats=2)
            yield vjp_case(implementation, "many long rows", OPS[i % 2], call)


MASKS = {
    "keys": lambda b, h, q, k: (1, 1, 1, k),
    "causal": lambda b, h, q, k: (1, 1, q, k),
    "padding": lambda b, h, q, k: (b, 1, 1, k),
    "rows": lambda b, h, q, k: (b, 1, q, 1),
    "head": lambda b, h, q, k: (1, h, 1, k),
    "batch and head": lambda b, h, q, k: (b, h, 1, k),
    "all": lambda b, h, q, k: (b, h, q, k),
}
HIDDEN = (np.nan, np.inf, -np.inf, 3e4)


def masks(implementation, args):
    """Every broadcast; NaN, inf and large numbers behind the mask, in x and in g."""
    i = 0
    lengths = (256, 50, 128, 512, 640, 1000, 1024, 1536, 2048, 4096, 8192, 16384)
    lengths += (30848, 65536, 151936, 262144)
    # Between rows with one row of the mask more than the cache holds.
    far = (2, 1, 2048, 4096), (2, 1, 2048, 8192)
    for shape in (*((2, 3, 4, n) for n in lengths), *far):
        n = shape[-1]
        names = list(MASKS) if n == 256 else ["causal", "padding"]
        for name, op in itertools.product(names, OPS):
            i += 1
            if n > args.longest or (args.quick and n != 256 and i % 2):
                continue
            call = Call(shape, DTYPES[i % 3], where=MASKS[name](*shape))
            call = dataclasses.replace(call, hidden=HIDDEN[i % 4], repeats=2)
            yield vjp_case(implementation, "masks", op, call)


def ragged(implementation, args):
    """Rows that start anywhere between vectors; masks that start elsewhere; casts."""
    rng = np.random.default_rng(0)
    sampled = (2 ** rng.uniform(9, 18, 8 if args.quick else 40)).astype(int)
    lengths = [513, 1000, 1500, 4097, 8191, 30522, 50257, 131071, 262145, *sampled]
    for i, n in enumerate(int(n) for n in lengths if n <= args.longest):
        # As many rows as start in every way, where few entries make a vector.
        rows = 9 if n <= 65536 else 3
        call = Call((rows, n), DTYPES[i % 3], repeats=2)
        yield vjp_case(implementation, "ragged", OPS[i % 2], call)
        if i % 2 and n <= 65536:
            continue
        shape = (2, 3, 2, n)
        where = [(2, 1, 1, n), (1, 3, 2, n), shape][i // 2 % 3]
        hidden = HIDDEN[i // 2 % 4]
        call = Call(shape, DTYPES[i // 2 % 3], where=where, hidden=hidden, repeats=2)
        yield vjp_case(implementation, "ragged", OPS[1 - i % 2], call)
        if n <= 65536:
            pair = ("float32", "bfloat16")[:: 1 if i % 4 else -1]
            call = Call((5, n), pair[0], out=pair[1], repeats=2)
            yield vjp_case(implementation, "ragged", OPS[i // 2 % 2], call)


AXES = [
    ((256, 512), 0, None),
    ((8, 128, 256), 1, None),
    ((8, 128, 256), 1, (8, 1, 256)),
    ((8, 128, 256), 1, (1, 128, 1)),
    ((4, 16, 8, 128), (1, 3), None),
    ((4, 16, 8, 128), (0, 2), None),
    ((64, 128), None, None),
    ((3, 50, 7), 1, None),
    ((1000, 130), 0, None),
    ((4096, 24), 0, None),
    # In strips: of one block to 16, overlapping, of two widths; read twice.
    ((8, 128, 16), 1, None),
    ((4, 64, 256), 1, (4, 64, 1)),
    ((2, 1024, 72), 1, None),
    ((2, 1024, 72), 1, (2, 1024, 72)),
    ((3, 2048, 40), 1, None),
    ((4096, 512), 0, None),
    ((8192, 96), 0, (8192, 1)),
    ((8192, 96), 0, None),
    ((16384, 64), 0, None),
    ((2, 8136, 64), 1, None),
    ((65536, 64), 0, None),
    ((65544, 64), 0, None),
    ((8192, 64), 0, None),
    ((8192, 128), 0, None),
    ((8192, 192), 0, None),
    ((2, 1500, 256), 1, None),
    ((131072, 64), 0, None),
    ((2, 3, 1024), (), None),
]


def axes(implementation, args):
    for i, (shape, axis, where) in enumerate(AXES):
        for op in OPS[i % 2 :][:1] if args.quick else OPS:
            call = Call(shape, DTYPES[i % 3], axis=axis, where=where, repeats=2)
            yield vjp_case(implementation, "axes", op, call)


def dtypes_and_scales(implementation, args):
    pairs = [("float32", "bfloat16"), ("float32", "float16")]
    pairs += [("bfloat16", "float32"), ("float16", "float32")]
    for i, (dtype, out) in enumerate(pairs):
        for n, op in itertools.product((256, 50, 16384, 65536), OPS):
            if n <= args.longest and (n == 256 or i == 0):
                call = Call((6, n), dtype, out=out, repeats=1)
                yield vjp_case(implementation, "output dtype", op, call)
    for scale, op in itertools.product((0.125, 0.3, 7.0, -2.5), OPS):
        call = Call((6, 256), "float32", scale=scale, repeats=1)
        yield vjp_case(implementation, "scale", op, call)
    for i, n in enumerate((50, 16384, 65536)):
        if n <= args.longest:
            call = Call((6, n), DTYPES[i % 3], scale=0.3, spread=9.0, repeats=1)
            yield vjp_case(implementation, "scale", OPS[i % 2], call)


# --- rows whose formula alone would give NaN ------------------------------------------


def edge_rows(implementation, args):
    for i, n in enumerate((256, 50, 1024, 1501, 16384, 50257, 65536)):
        for dtype, op in itertools.product(DTYPES, OPS):
            if n > args.longest or (n != 256 and dtype != DTYPES[i % 3]):
                continue
            call = Call((6, n), dtype)
            check = functools.partial(check_edge_rows, call)
            lower = functools.partial(lower_vjp, call)
            yield Case(implementation, "edge rows", op, str(call), lower, check)


def check_edge_rows(call, compiled, case, report):
    """Rows: plain, some -inf, all -inf, one NaN, one +inf, plain."""
    x, g, _ = operands(call)
    want_x, want_g = x.copy(), g.copy()
    x[1, ::3] = want_x[1, ::3] = -np.inf
    g[1, ::3] = np.nan
    want_g[1, ::3] = 0
    x[2] = -np.inf
    g[2, 0] = np.nan
    x[3, 7], x[4, call.shape[-1] - 1] = np.nan, np.inf
    outputs = [poison(call.shape, call.dtype) for _ in range(2)]
    y, dx = run_in_arena(compiled[0], outputs, [x, g], report)
    nothing = 0.0 if case.op == "softmax" else -np.inf
    assert (y[2].astype(np.float32) == nothing).all(), "value of an empty row"
    assert (dx[2].astype(np.float32) == 0).all(), "gradient of an empty row"
    for row in (3, 4):
        for name, array in (("value", y), ("gradient", dx)):
            assert np.isnan(array[row].astype(np.float32)).all(), f"{name}, row {row}"
    tame = [0, 1, 5]
    part = dataclasses.replace(call, shape=(3, call.shape[-1]))
    data = want_x[tame], want_g[tame], None
    compare(case, part, report, data, (y[tame], dx[tame]))


# --- cancellation ---------------------------------------------------------------------


def stress(implementation, args):
    """Dominant entries and common parts of the cotangent, alone and together."""
    for n, dtype, op in itertools.product((128, 4096, 32768, 131072), DTYPES, OPS):
        if n > args.longest or (args.quick and n in (4096, 131072)):
            continue
        call = Call((8, n), dtype)
        check = functools.partial(check_stress, call)
        lower = functools.partial(lower_vjp, call)
        yield Case(implementation, "stress", op, str(call), lower, check)


def stress_cotangent(kind, x, rng):
    if kind == "one-hot":  # as a cross-entropy's, on the largest entry
        return (np.arange(x.shape[-1]) == x.argmax(-1)[:, None]).astype(x.dtype)
    spread = max(1.0, 32 * float(jnp.finfo(x.dtype).eps) * kind)
    return (kind + spread * rng.normal(size=x.shape)).astype(x.dtype)


def check_stress(call, compiled, case, report):
    rng = np.random.default_rng(0)
    kinds = (0, 1000) if case.op == "softmax" else (0, "one-hot")
    for scale, kind in itertools.product((1, 20, 60), kinds):
        x = (scale * rng.normal(size=call.shape)).astype(jnp.dtype(call.dtype))
        g = stress_cotangent(kind, x, rng)
        outputs = [poison(call.shape, call.dtype) for _ in range(2)]
        y, dx = run_in_arena(compiled[0], outputs, [x, g], report)
        x, g, y, dx = sample(call, x, g, y, dx)
        value = getattr(oracle, case.op)(x)
        error = oracle.ulps(y, value, call.dtype, flushed=call.shape[-1])
        report.measured(
            case, "stress: value, ulp", call.dtype, error, VALUE_BAR[call.dtype]
        )
        want = getattr(oracle, f"{case.op}_vjp")(x, g)
        # A 16-bit P sums to 1 within 2e-3: what exactly equal cotangents of the
        # dominant entries leave, below 1e-9 of them, is beyond its reach.
        largest = float(np.abs(g.astype(np.float64)).max())
        least = 0.0 if call.dtype == "float32" else 1e-9 * largest
        if call.dtype == "float16":
            least = max(least, 0.07)  # below it the row's gradients are subnormal
        if (np.abs(want).max(-1) > max(least, 1e-30)).any():
            error = oracle.row_error(dx, want, call.dtype, least=least)
            bar = gradient_bar(case, call)
            report.measured(case, "stress: gradient", call.dtype, error, bar)


# --- forward mode ---------------------------------------------------------------------


def forward_mode(implementation, args):
    for i, n in enumerate((50, 256, 1024, 16384, 65536, 131072)):
        if n <= args.longest:
            for op in OPS:
                where = (1, n) if i % 2 else None
                call = Call((6, n), DTYPES[i % 3], where=where)
                check = functools.partial(check_jvp, call)
                lower = functools.partial(lower_jvp, call)
                yield Case(implementation, "forward mode", op, str(call), lower, check)


def lower_jvp(call, case):
    f = function(case, call)

    def program(x, t, where=None):
        return jax.jvp(lambda x: f(x, where=where), (x,), (t,))[1]

    spec = jax.ShapeDtypeStruct(call.shape, call.dtype)
    masks = [] if call.where is None else [jax.ShapeDtypeStruct(call.where, bool)]
    return [jax.jit(program).lower(spec, spec, *masks)]


def check_jvp(call, compiled, case, report):
    x, t, where = operands(call)
    hidden = [hide(a, where, np.nan) for a in (x, t)]
    masks = [] if where is None else [where]
    got = np.asarray(compiled[0](*map(put, [*hidden, *masks])))
    p = oracle.softmax(x, where=where)
    if case.op == "softmax":  # its Jacobian is symmetric
        want = oracle.softmax_vjp(x, t, where=where)
    else:
        wide = np.where(True if where is None else where, t.astype(np.float64), 0)
        want = wide - (p * wide).sum(-1, keepdims=True)
        want = np.where(p == 0, 0, want)
    error = gradient_error(got, want, t, call)
    report.measured(case, "forward mode", call.dtype, error, gradient_bar(case, call))


# --- more rows than a grid dimension holds, more entries than int32 counts ------------

BASE_ROWS = 4099  # a prime: no block of rows repeats in step with it


def many_rows(implementation, args):
    shapes = [(70_001, 128), (70_001, 1000), (2**31 // 128 + 1001, 128)]
    shapes += [] if args.quick else [(2**31 // 1000 + 1001, 1000)]
    for i, shape in enumerate(shapes if not args.smoke else [(5003, 20)]):
        for op in OPS if i < 2 and not args.quick else OPS[:1]:
            call = Call(shape, "bfloat16")
            check = functools.partial(check_many_rows, call)
            lower = functools.partial(lower_many_rows, call)
            yield Case(implementation, "many rows", op, str(call), lower, check)


def lower_many_rows(call, case):
    """The call, and the same on the rows that its operands are made of."""
    need = 10 * math.prod(call.shape)
    room = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", 0)
    if need > 20e9 and room < 40e9:
        raise Skip(f"needs 40 GB of device memory, there are {room / 1e9:.0f}")
    f = function(case, call)

    def program(x, g):
        y, pull = jax.vjp(f, x)
        return y, pull(g)[0]

    shapes = call.shape, (BASE_ROWS, call.shape[-1])
    specs = [jax.ShapeDtypeStruct(s, call.dtype) for s in shapes]
    return [jax.jit(program).lower(s, s) for s in specs]


@functools.partial(jax.jit, static_argnums=1)
def repeat_rows(base, rows):
    return base[jnp.arange(rows) % BASE_ROWS]


@jax.jit
def wrong_rows(got, base):
    """How many rows are not what the same row gave in the smaller call."""
    want = base[jnp.arange(len(got)) % BASE_ROWS].astype(jnp.float32)
    close = jnp.abs(got.astype(jnp.float32) - want) <= 0.02 * jnp.abs(want) + 1e-6
    return jnp.sum(~jnp.all(close, axis=-1))


def check_many_rows(call, compiled, case, report):
    base_call = dataclasses.replace(call, shape=(BASE_ROWS, call.shape[-1]))
    x, g, _ = operands(base_call)
    base_x, base_g = put(x), put(g)
    base = compiled[1](base_x, base_g)
    compare(case, base_call, report, (x, g, None), [np.asarray(b) for b in base])
    rows = call.shape[0]
    got = compiled[0](repeat_rows(base_x, rows), repeat_rows(base_g, rows))
    for name, big, small in zip(("value", "gradient"), got, base, strict=True):
        wrong = int(wrong_rows(big, small))
        assert wrong == 0, f"{name}: {wrong} of {rows} rows are wrong"


# --- what blocks send each other ------------------------------------------------------

EXCHANGE_ENTRIES = 2**27  # of one call


def exchanges(implementation, args):
    """Rows of which each block has a good part: without its numbers they are wrong."""
    if implementation != "mosaic_gpu":
        return
    rows = {16384: 2**20, 65536: 2**18, 131072: 2**17, 262144: 2**16}
    for i, (n, op) in enumerate(itertools.product(rows, OPS)):
        if n <= args.longest:
            call = Call((EXCHANGE_ENTRIES // n, n), ("float32", "bfloat16")[i // 2 % 2])
            seeds = rows[n] // call.shape[0] // (8 if args.quick else 1)
            check = functools.partial(check_exchanges, call, seeds)
            lower = functools.partial(lower_exchanges, call)
            yield Case(
                implementation, "exchange", op, f"{call} x {seeds}", lower, check
            )


def lower_exchanges(call, case):
    """From a seed: how many rows are not what XLA makes of them."""
    ours = function(case, call)
    xla = function(dataclasses.replace(case, implementation="xla"), call)
    bar = 1e-5 if call.dtype == "float32" else 2e-2

    def program(seed):
        keys = jax.random.split(jax.random.key(seed))
        x, g = (jax.random.normal(key, call.shape, call.dtype) for key in keys)
        results = []
        for f in (ours, xla):
            y, pull = jax.vjp(f, x)
            results.append([a.astype(jnp.float32) for a in (y, *pull(g))])
        wrong = jnp.zeros(call.shape[0], bool)
        for got, want in zip(*results, strict=True):
            near = jnp.abs(got - want).max(-1) <= bar * jnp.abs(want).max(-1)
            wrong |= ~near  # NaN is not
        return jnp.sum(wrong)

    return [jax.jit(program).lower(jax.ShapeDtypeStruct((), jnp.int32))]


def check_exchanges(call, seeds, compiled, case, report):
    wrong = [int(compiled[0](jnp.int32(seed))) for seed in range(seeds)]
    assert not any(wrong), f"{sum(wrong)} of {seeds * call.shape[0]} rows are wrong"


# --- every derivative mode under every transform --------------------------------------

QUICK_TRANSFORMS = (
    *("value", "jvp", "vjp", "linearize", "hessian", "rev_rev", "third"),
    *("vmap_vjp", "vmap_fwd_rev", "checkpoint", "scan", "control_flow", "shard_map"),
)


def transforms(implementation, args):
    """The matrix of tests/core/test_transforms.py, on rows that every kernel takes."""
    cases = importlib.import_module("core.test_transforms").CASES
    for (name, mode), op in itertools.product(cases.items(), OPS):
        if args.quick and (name not in QUICK_TRANSFORMS or op != OPS[0]):
            continue
        lower = functools.partial(lower_transform, name, mode, args)
        check = functools.partial(check_transform, name, args)
        yield Case(implementation, "transforms", op, name, lower, check)


def transform_operands(n):
    """Larger tangents make the case "scan" chaotic: it multiplies rounding by 1e4."""
    rng = np.random.default_rng(3)
    return [(s * rng.normal(size=(8, n))).astype(np.float32) for s in (1, 0.25)]


def lower_transform(name, mode, args, case):
    if name == "pmap":
        raise Skip("one device a row")
    ours = functools.partial(
        getattr(jaxsoftmax, case.op), implementation=case.implementation
    )
    spec = jax.ShapeDtypeStruct((8, args.transform_n), jnp.float32)
    lowered = jax.jit(functools.partial(mode, ours)).lower(spec, spec)
    return [lowered, Reference(name, mode, case.op, spec)]


@dataclasses.dataclass(frozen=True)
class Reference:
    """What jax.nn gives, compiled and run once for all implementations."""

    name: str
    mode: object
    op: str
    spec: object

    def compile(self):
        return reference_transform(self.name, self.mode, self.op, self.spec)


@functools.cache
def reference_transform(name, mode, op, spec):
    theirs = jax.jit(functools.partial(mode, getattr(jax.nn, op)))
    return jax.device_get(theirs(*transform_operands(spec.shape[-1])))


def check_transform(name, args, compiled, case, report):
    run_ours, want = compiled
    got = jax.device_get(run_ours(*map(put, transform_operands(args.transform_n))))
    got, want = jax.tree.leaves(got), jax.tree.leaves(want)
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=5e-6, rtol=2e-5)


# --- for the sanitizer ----------------------------------------------------------------


def sanitize(implementation, args):
    """One case of each kind: the sanitizer slows a kernel down a hundredfold."""
    calls = [Call((5, n), DTYPES[i % 3]) for i, n in enumerate((128, 1000, 1024, 7))]
    calls += [
        Call((3, n), DTYPES[i % 3])
        for i, n in enumerate((4096, 16384, 32768, 50257, 65536, 131072, 262144))
    ]
    calls += [Call((1, 1048576), "bfloat16"), Call((256, 512), "bfloat16", axis=0)]
    calls += [Call((n, 40), DTYPES[i], axis=0) for i, n in enumerate((8192, 1024))]
    calls += [
        Call((2, 2, 4, n), "bfloat16", where=where)
        for n in (256, 50, 16384)
        for where in ((1, 1, 4, n), (2, 1, 1, n))
    ]
    calls += [Call((4, 256), "float32", out="bfloat16", scale=0.3)]
    calls += [Call((9, 2051), "float32", out="bfloat16"), Call((5, 30529), "float16")]
    for i, call in enumerate(calls):
        call = dataclasses.replace(call, repeats=1)
        if max(call.shape) <= args.longest:
            yield vjp_case(implementation, "sanitize", OPS[i % 2], call)
            yield vjp_case(implementation, "sanitize", OPS[1 - i % 2], call)


# --- the program ----------------------------------------------------------------------

GROUPS = {
    "lengths": lengths,
    "long": many_long_rows,
    "masks": masks,
    "ragged": ragged,
    "axes": axes,
    "dtypes": dtypes_and_scales,
    "edge": edge_rows,
    "stress": stress,
    "forward": forward_mode,
    "rows": many_rows,
    "exchange": exchanges,
    "transforms": transforms,
}


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    kernels = ["mosaic_gpu", "triton"]
    add("--implementation", nargs="+", default=kernels)
    add("--groups", nargs="+", default=list(GROUPS), choices=list(GROUPS))
    add("--quick", action="store_true", help="about a third of the cases")
    add("--sanitize", action="store_true", help="few cases, for compute-sanitizer")
    add("--smoke", action="store_true", help="short rows only; no GPU needed")
    add("--longest", type=int, help="leave longer rows out")
    add("--transform-n", type=int, default=128, help="row length of the transforms")
    add("--jobs", type=int, default=8, help="threads that compile")
    args = parser.parse_args()
    if args.longest is None:
        args.longest = 1100 if args.smoke else 2**21
    return args


def selected(args):
    for implementation in args.implementation:
        if args.sanitize:
            yield from sanitize(implementation, args)
            continue
        for group in args.groups:
            yield from GROUPS[group](implementation, args)


def main():
    args = parse()
    device = jax.devices()[0]
    say(f"{device.device_kind}, jax {jax.__version__}")
    if device.platform == "cpu" and not args.smoke:
        print("there is no GPU here; --smoke --implementation xla needs none")
        return 2
    # On a CPU donated buffers are not always used; the report says how often.
    warnings.filterwarnings("ignore", message="Some donated buffers")
    report = Report()
    run(selected(args), report, args.jobs)
    report.print()
    failed = report.failures or report.refused_everything()
    say("FAILED" if failed else "passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
