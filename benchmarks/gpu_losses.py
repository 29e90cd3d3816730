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


def run_torch(torch, f, inputs, labels, error):
    """Times the loss and its gradients, and measures what memory they need beyond.

    Args:
      torch: The module.
      f: The loss of inputs and labels.
      inputs: What has a gradient.
      labels: The labels.
      error: From the inputs, whose gradients are there, to the error of these.
    """
    bench.restore_triton_cache()

    def call():
        for x in inputs:
            x.grad = None
        loss = f(*inputs, labels)
        loss.backward()
        return loss

    start = time.perf_counter()
    loss = call()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    found = error(*inputs)
    for x in inputs:
        x.grad = None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    gradients = sum(x.numel() * x.element_size() for x in inputs)
    extra = torch.cuda.max_memory_allocated() - before - gradients
    times = []
    for _ in range(5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return {
        "compile_s": round(seconds, 2),
        "loss": float(loss.detach()),
        "error": found,
        "ms": statistics.median(times),
        "extra_bytes": int(max(extra, 0)),
    }


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


def run_all(runs, cell, result, args, torch, name):
    """Runs each contender as long as there is time, and writes what is known then."""
    for contender, run in runs.items():
        if time.perf_counter() - START > args.budget:
            cell["results"][contender] = {"not_run": "out of time"}
            continue
        try:
            cell["results"][contender] = run()
        except Exception as problem:
            reason = f"{type(problem).__name__}: {str(problem).splitlines()[0]}"
            cell["results"][contender] = {"not_run": reason[:300]}
        say(name, contender, cell["results"][contender])
        bench.write(args.json, result)
        if torch is not None:
            torch.cuda.empty_cache()


def heading(title, result, ours):
    """The first lines of a page."""
    versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items() if v)
    return [
        f"# {title} on {result['device']}",
        "",
        f"Made by `{result['command']}`; {versions}; driver {result['driver']}; clock: "
        f"{result['clock']}. What is timed, and how, says the program's docstring. "
        f"The first {ours} rows are ours.",
        "",
        *result.get("notes", []),
    ]


def not_run(name, found, columns):
    """A row of a table for a contender that did not run."""
    reason = "not run: " + found["not_run"].split("(")[0][:60]
    return [name, reason, *[""] * (columns - 2)]


def main(description, measure, markdown, draw, add_arguments):
    """The command line: measures, or renders what was measured before."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json")
    parser.add_argument("--markdown")
    parser.add_argument("--png")
    parser.add_argument("--render", help="a JSON file, instead of measuring")
    add_arguments(parser)
    parser.add_argument("--budget", type=float, default=1e9, help="seconds")
    parser.add_argument("--smoke", action="store_true", help="small, on any device")
    args = parser.parse_args()
    if args.render:
        with open(args.render) as file:
            result = json.load(file)
    else:
        result = measure(args)
    text = markdown(result)
    if args.markdown:
        with open(args.markdown, "w") as file:
            file.write(text)
    else:
        print(text)
    if args.png:
        draw(result, args.png)
