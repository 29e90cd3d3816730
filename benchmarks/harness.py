"""What the benchmarks have in common: clocks, turns, versions, JSON, the command line.

A program's `measure` gives a result that JSON can hold, and writes it after each case;
its `markdown` and `draw` make its page and picture, now or later (`--render`).
"""

import argparse
import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import importlib
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

# Torch and JAX share the memory of the device.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import jax
import jax.numpy as jnp
import numpy as np

import jaxsoftmax

# The oracles of the tests, for the programs that import this module.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "tests"))

START = time.perf_counter()


def say(*words):
    print(f"[{time.perf_counter() - START:6.1f} s]", *words, flush=True)


# --- clocks ---------------------------------------------------------------------------


def cupti_ms(calls):
    """Milliseconds of each call: the sum over its kernels; and how many kernels.

    As `jax.experimental.mosaic.gpu.profiler.Cupti(finalize=False)` does for one call
    repeated; here the calls have buffers of their own.
    """
    jax.block_until_ready(calls[0]())
    timings = kernel_timings(calls)
    if not timings or len(timings) % len(calls):
        raise RuntimeError(f"CUPTI saw {len(timings)} kernels in {len(calls)} calls")
    each = len(timings) // len(calls)
    return [
        sum(ms for _, ms in timings[i : i + each]) for i in range(0, len(timings), each)
    ], each


def kernels_ms(call):
    """The milliseconds of a call by kernel, and how often each ran: {name: [ms, n]}."""
    found = {}
    for name, ms in kernel_timings([call]):
        total, times = found.get(name, (0.0, 0))
        found[name] = [total + ms, times + 1]
    return dict(sorted(found.items(), key=lambda item: -item[1][0]))


def kernel_timings(calls):
    """(name, milliseconds) of each kernel of the calls, by CUPTI."""
    from jax.experimental.mosaic.gpu import profiler

    extension = profiler.mosaic_gpu_lib._mosaic_gpu_ext
    extension._cupti_init()
    try:
        jax.block_until_ready([call() for call in calls])
    finally:
        timings = extension._cupti_get_timings(False)
    return timings


def host_ms(calls):
    """Stands in for the device's clocks where there is no GPU."""
    return [1e3 * seconds(call) for call in calls], None


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


def wall_us(calls, call):
    start = time.perf_counter()
    for _ in range(calls):
        out = call()
    jax.block_until_ready(out)
    return [1e6 * (time.perf_counter() - start) / calls]


def wall_ms(call, most=20):
    """Of a call of JAX among several that are blocked on once; the median of 5 such."""
    once = wall_us(1, call)[0] / 1e3
    calls = max(1, min(most, int(60 / once)))
    rounds = 5 if once < 1e3 else 2
    return statistics.median(wall_us(calls, call)[0] / 1e3 for _ in range(rounds))


def seconds(call):
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def turns(names, rounds):
    """The names once a round, in alternating order."""
    for i in range(rounds):
        yield from list(names) if i % 2 else reversed(list(names))


def in_turn(calls, rounds, least=0.0):
    """The seconds of each call, by name.

    A turn is one call, or as many as take `least` seconds, of which it is the mean.
    """
    counts = dict.fromkeys(calls, 1)
    for name, call in calls.items():
        seconds(call)
        if least:
            counts[name] = max(1, int(least / seconds(call)))
    times = {name: [] for name in calls}
    for name in turns(calls, rounds):
        (us,) = wall_us(counts[name], calls[name])
        times[name].append(us / 1e6)
    return times


# --- torch ----------------------------------------------------------------------------


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


def time_torch(torch, call, nbytes, look, calls=1):
    """Times a call of torch, and measures what memory it needs beyond its results.

    Args:
      torch: The module.
      call: What is timed.
      nbytes: Of its results.
      look: From the first results, before they are dropped, to figures about them.
      calls: How many there are between two events, once the first has been seen.
    """
    restore_triton_cache()
    start = time.perf_counter()
    results = call()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    found = look(results)
    del results
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before - nbytes
    times = []
    for _ in range(5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(calls):
            call()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / calls)
    return found | {
        "compile_s": round(seconds, 2),
        "ms": statistics.median(times),
        "extra_bytes": int(max(extra, 0)),
    }


def run_torch(torch, f, inputs, labels, error):
    """Times the loss and its gradients, and measures what memory they need beyond.

    Args:
      torch: The module.
      f: The loss of inputs and labels.
      inputs: What has a gradient.
      labels: The labels.
      error: From the inputs, whose gradients are there, to the error of these.
    """

    def call():
        for x in inputs:
            x.grad = None
        loss = f(*inputs, labels)
        loss.backward()
        return loss

    def look(loss):
        found = {"loss": float(loss.detach()), "error": error(*inputs)}
        for x in inputs:
            x.grad = None
        return found

    gradients = sum(x.numel() * x.element_size() for x in inputs)
    return time_torch(torch, call, gradients, look)


# --- runs -----------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def normal(seed, size, dtype):
    return jax.random.normal(jax.random.key(seed), (size,), jnp.float32).astype(dtype)


def vjp_alone(f):
    """Two programs: what the vjp of f keeps, and the backward given that.

    The first is to be run, or asked for its shapes, before the second.
    """
    trees = []

    def keep(x, *others):
        leaves, tree = jax.tree.flatten(jax.vjp(lambda x: f(x, *others), x)[1])
        trees.append(tree)
        return leaves

    def backward(kept, g):
        return jax.tree.unflatten(trees[0], kept)(g)[0]

    return jax.jit(keep), jax.jit(backward)


def row_error(got, want):
    """The worst of the rows, relative to a row's largest exact entry."""
    error = np.abs(np.asarray(got, np.float64) - want).max(-1) / np.abs(want).max(-1)
    return float(error.max())  # NaN stays NaN


def first_line(error):
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


class NotTried(Exception):
    """Why a contender was not run at all."""


def reason(problem):
    """One line."""
    text = first_line(problem)
    if "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower():
        return f"out of memory ({text})"
    return str(problem) if isinstance(problem, NotTried) else text


def out_of_time(args):
    return time.perf_counter() - START > args.budget


def counted(cells, kinds):
    """How often each (contender, kind, reason) is why there is no figure."""
    return collections.Counter(
        (name, kind, found[kind])
        for cell in cells
        for name, found in cell["results"].items()
        for kind in kinds
        if kind in found
    )


def start(args, clock):
    """Torch, if it is a contender; and a result without cells."""
    torch = None if args.smoke else find_torch()
    result = described([], "host" if args.smoke else clock)
    say(*(result[key] for key in ("device", "driver", "versions")))
    return torch, result


def device_ms(args):
    return host_ms if args.smoke else cupti_ms


def run_all(runs, cell, result, args, torch, name):
    """Runs each contender as long as there is time, and writes what is known then."""
    for contender, run in runs.items():
        if out_of_time(args):
            cell["results"][contender] = {"not_run": "out of time"}
            continue
        try:
            cell["results"][contender] = run()
        except Exception as problem:
            cell["results"][contender] = {"not_run": reason(problem)}
        say(name, contender, cell["results"][contender])
        write(args.json, result)
        if torch is not None:
            torch.cuda.empty_cache()


class Compiling:
    """Programs that are lowered here, and compiled in a thread of a pool.

    What is raised meanwhile is raised where the programs are asked for. `options` are
    the compiler's; `seconds` those of all that is lowered, and of compiling the first.
    """

    def __init__(self, pool, lower, *args, options=None):
        self.problem, self.seconds, self.options = None, 0.0, options
        start = time.perf_counter()
        try:
            self.lowered = lower(*args)
        except Exception as problem:
            self.problem = problem
            return
        self.seconds = time.perf_counter() - start
        self.future = pool.submit(self.compile)

    def compile(self):
        first, *others = self.lowered
        start = time.perf_counter()
        found = [first.compile(self.options)]
        self.seconds += time.perf_counter() - start
        return [*found, *(each.compile(self.options) for each in others)]

    def wait(self):
        if self.problem is None:
            concurrent.futures.wait([self.future])

    def programs(self):
        if self.problem is not None:
            raise self.problem
        try:
            return self.future.result()
        except Exception as problem:
            # Of memory that others took in the meantime, while they were compiled.
            if "RESOURCE_EXHAUSTED" not in str(problem):
                raise
            return self.compile()


# --- programs that are lowered where there is no GPU ----------------------------------

# What jax.export does not promise to keep between versions: both sides have the same.
CUSTOM_CALLS = ("mosaic_gpu_v2", "triton_kernel_call")


@contextlib.contextmanager
def gpu_that_is_not_there(kind="NVIDIA H200", cores=132):
    """What is traced under it is traced for that GPU, on any machine."""
    device = jax.sharding.AbstractDevice(
        device_kind=kind, num_cores=cores, platform="gpu"
    )
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        yield


def exported_path(folder, *words):
    """Where the programs of a contender and a case are."""
    text = " ".join(map(str, words)).strip()
    return pathlib.Path(folder, text.replace(" ", "_"))


def export(path, programs):
    """Writes programs, pairs of a jitted function and its arguments, for a GPU."""
    from jax import export

    checks = [export.DisabledSafetyCheck.custom_call(name) for name in CUSTOM_CALLS]
    to_file = functools.partial(
        export.export, platforms=("cuda",), disabled_checks=checks
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    for i, (f, args) in enumerate(programs):
        path.with_suffix(f".{i}").write_bytes(to_file(f)(*args).serialize())


def read_exported(path):
    """The programs that `export` wrote, lowered: most of the work has been done."""
    from jax import export

    start_mosaic_gpu()
    lowered = []
    while (file := path.with_suffix(f".{len(lowered)}")).exists():
        exported = export.deserialize(bytearray(file.read_bytes()))
        shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in exported.in_avals]
        args, _ = jax.tree.unflatten(exported.in_tree, shapes)
        lowered.append(jax.jit(exported.call).lower(*args))
    return lowered


@functools.cache
def start_mosaic_gpu():
    """Lowers a kernel, with which what kernels need at run time is loaded."""
    f = functools.partial(jaxsoftmax.softmax, implementation="mosaic_gpu")
    jax.jit(f).lower(jax.ShapeDtypeStruct((8, 128), jnp.float32))


# --- what was run, on what ------------------------------------------------------------


def nvidia_smi(field):
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]
    try:
        out = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return out.stdout.strip().splitlines()[0]


def versions():
    found = {"python": platform.python_version(), "jaxsoftmax": jaxsoftmax.__version__}
    for name in ("jax", "jaxlib", "torch", "triton", "jax_triton", "optax"):
        try:
            found[name] = importlib.import_module(name).__version__
        except Exception:  # absent, or refuses to be imported here
            found[name] = None
    return found


def processor():
    """The model of the processor, as far as the platform tells."""
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def command():
    return " ".join(["python", *sys.argv])


def described(cells, clock):
    """A result without its cells' content: what was run, on what."""
    return {
        "device": jax.devices()[0].device_kind,
        "driver": nvidia_smi("driver_version"),
        "versions": versions(),
        "command": command(),
        "clock": clock,
        "cells": cells,
    }


def load(before):
    """A line on what else the machine did, given `os.getloadavg()` of before."""
    pair = f"{before[0]:.1f} before, {os.getloadavg()[0]:.1f} after"
    return f"Load average of the machine: {pair}."


def write(path, result):
    """Replaces the file as a whole: a run that is cut short leaves the last one."""
    if path:
        with open(path + ".part", "w") as file:
            json.dump(result, file, indent=1)
            file.write("\n")
        os.replace(path + ".part", path)


def read(paths):
    return [json.loads(pathlib.Path(path).read_text()) for path in paths]


def merged(results, *lists):
    """The cells of several runs, and further lists, described as the first of them."""
    first, *others = results
    if not others:
        return first
    joined = {k: [x for r in results for x in r[k]] for k in ("cells", *lists)}
    command = "; ".join(dict.fromkeys(result["command"] for result in results))
    return first | joined | {"command": command}


# --- the command line -----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Program:
    """What a command measures, and what it makes of that.

    Attributes:
      measure: From the arguments to a result that JSON can hold.
      markdown: From a result to its page.
      draw: Writes the picture of a result to a path; None where there is none.
      add_arguments: Adds the program's own arguments to a parser.
      merge: From the results of several runs to one.
      failures: From a result to what is wrong in it, in lines.
      export: From the arguments: writes the programs that `measure` can read, lowered.
      about: In a line, where a file has several.
    """

    measure: Callable
    markdown: Callable
    draw: Callable | None = None
    add_arguments: Callable = lambda parser: None
    merge: Callable = merged
    failures: Callable = lambda result: []
    export: Callable | None = None
    about: str | None = None

    def add_options(self, parser):
        add = parser.add_argument
        add("--json", help="write the figures here, after every case")
        add("--markdown", help="write the page here")
        if self.draw is not None:
            add("--png", help="draw the picture here; needs matplotlib")
        add("--render", nargs="+", help="measure nothing: the page of these JSON files")
        add("--budget", type=float, default=1e9, help="starts nothing new after (s)")
        add(
            "--smoke", action="store_true", help="tiny, on the host's clock: any device"
        )
        if self.export is not None:
            add("--export", help="measure nothing: lower for an H200 into this folder")
            add("--exported", help="the folder of a run with --export, as this one")
        self.add_arguments(parser)
        parser.set_defaults(program=self)

    def run(self, args):
        """Measures, or renders what was measured before; returns the exit status."""
        if self.export is not None and args.export:
            self.export(args)
            return 0
        result = self.merge(read(args.render)) if args.render else self.measure(args)
        write(args.json, result)
        text = self.markdown(result)
        if args.markdown:
            pathlib.Path(args.markdown).write_text(text)
        else:
            print(text)
        if self.draw is not None and args.png:
            self.draw(result, args.png)
        wrong = [] if args.render else self.failures(result)
        for failure in wrong:
            print("FAILED:", failure, file=sys.stderr)
        return 1 if wrong else 0


def main(doc, program):
    """The command line of a program, or of several by the names of their commands."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    if isinstance(program, Program):
        program.add_options(parser)
    else:
        commands = parser.add_subparsers(required=True)
        for name, each in program.items():
            each.add_options(
                commands.add_parser(name, help=each.about, description=each.about)
            )
    args = parser.parse_args()
    sys.exit(args.program.run(args))
