"""What the benchmarks of losses on a GPU have in common: runs, clocks, tables."""

import argparse
import json
import statistics
import sys
import time

import gpu_softmax as bench
import jax
import optax

START = time.perf_counter()


def say(*words):
    print(
        f"[{time.perf_counter() - START:6.1f} s]", *words, file=sys.stderr, flush=True
    )


def megabytes(nbytes):
    return f"{nbytes / 1e6:,.0f} MB" if nbytes >= 1e6 else f"{nbytes / 1e6:.2f} MB"


def wall_ms(call, most=20):
    """Of a call of JAX among several that are blocked on once; the median of 5 such."""
    once = bench.wall_us(1, call)[0] / 1e3
    calls = max(1, min(most, int(60 / once)))
    rounds = 5 if once < 1e3 else 2
    return statistics.median(bench.wall_us(calls, call)[0] / 1e3 for _ in range(rounds))


def time_torch(torch, call, nbytes, look, calls=1):
    """Times a call of torch, and measures what memory it needs beyond its results.

    Args:
      torch: The module.
      call: What is timed.
      nbytes: Of its results.
      look: From the first results, before they are dropped, to figures about them.
      calls: How many there are between two events, once the first has been seen.
    """
    bench.restore_triton_cache()
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


def described(cells, clock):
    """A result without its cells' content: what was run, on what."""
    return {
        "device": jax.devices()[0].device_kind,
        "driver": bench.nvidia_smi("driver_version"),
        "versions": bench.versions() | {"optax": optax.__version__},
        "command": " ".join(["python", *sys.argv]),
        "clock": clock,
        "cells": cells,
    }


class NotTried(Exception):
    """Why a contender was not run at all."""


def reason(problem):
    """One line."""
    text = bench.first_line(problem)
    if "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower():
        return f"out of memory ({text})"
    return str(problem) if isinstance(problem, NotTried) else text


def run_all(runs, cell, result, args, torch, name):
    """Runs each contender as long as there is time, and writes what is known then."""
    for contender, run in runs.items():
        if time.perf_counter() - START > args.budget:
            cell["results"][contender] = {"not_run": "out of time"}
            continue
        try:
            cell["results"][contender] = run()
        except Exception as problem:
            cell["results"][contender] = {"not_run": reason(problem)}
        say(name, contender, cell["results"][contender])
        bench.write(args.json, result)
        if torch is not None:
            torch.cuda.empty_cache()


def heading(title, result, note):
    """The first lines of a page."""
    versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items() if v)
    return [
        f"# {title} on {result['device']}",
        "",
        f"Made by `{result['command']}`; {versions}; driver {result['driver']}; clock: "
        f"{result['clock']}. What is timed, and how, says the program's docstring. "
        f"{note}",
        "",
        *result.get("notes", []),
    ]


def not_run(name, found, columns):
    """A row of a table for a contender that did not run."""
    reason = "not run: " + found["not_run"].split("(")[0][:60]
    return [name, reason, *[""] * (columns - 2)]


def merged(paths):
    """The cells of several runs, described as the first of them is."""
    results = []
    for path in paths:
        with open(path) as file:
            results.append(json.load(file))
    cells = [cell for result in results for cell in result["cells"]]
    command = "; ".join(dict.fromkeys(result["command"] for result in results))
    return results[0] | {"cells": cells, "command": command}


def main(description, measure, markdown, draw, add_arguments):
    """The command line: measures, or renders what was measured before."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json")
    parser.add_argument("--markdown")
    parser.add_argument("--png")
    parser.add_argument(
        "--render", nargs="+", help="instead of measuring: the JSON files of such runs"
    )
    add_arguments(parser)
    parser.add_argument("--budget", type=float, default=1e9, help="seconds")
    parser.add_argument("--smoke", action="store_true", help="small, on any device")
    args = parser.parse_args()
    result = merged(args.render) if args.render else measure(args)
    text = markdown(result)
    if args.markdown:
        with open(args.markdown, "w") as file:
            file.write(text)
    else:
        print(text)
    if args.png:
        draw(result, args.png)
