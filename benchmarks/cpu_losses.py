"""Times cross-entropy on the CPU: of logits, and of a linear layer that makes them.

    python benchmarks/cpu_losses.py logits --markdown docs/cpu_cross_entropy.md
    python benchmarks/cpu_losses.py linear --markdown docs/cpu_linear_cross_entropy.md

Value and gradients of the mean loss, in one jitted program. All contenders of a line
take turns; a figure is the median over the rounds of the time, relative to that of a
base in the same round.

- logits: against optax; the base is optax on logits upcast to float32. Kept: what the
  vjp keeps, in bytes an entry, the logits included where they are kept.
- linear: gradients with respect to the hidden states and the weights; the base is the
  dense form, optax on `x @ weights`. Memory is what XLA reports as temporary
  (`memory_analysis().temp_size_in_bytes`): arguments and gradients are not counted.
"""

import functools
import os
import platform

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import report

import jaxsoftmax

ours = jaxsoftmax.softmax_cross_entropy_with_integer_labels
linear = jaxsoftmax.linear_softmax_cross_entropy
reference = optax.softmax_cross_entropy_with_integer_labels
MIB = 2**20
DTYPES = ["float32", "bfloat16"]


def run(result, args, label, losses, base, arrays, moving, number):
    """A line: times of the contenders, and a number of each."""
    programs = {
        name: jax.jit(jax.value_and_grad(f, moving)).lower(*arrays).compile()
        for name, f in losses.items()
    }
    calls = {name: functools.partial(p, *arrays) for name, p in programs.items()}
    times = harness.in_turn(calls, 1 if args.smoke else args.rounds)
    results = {
        name: [
            harness.median_ratio(times[name], times[base]),
            number(losses[name], program),
        ]
        for name, program in programs.items()
    }
    cell = {"label": label, "ms": harness.median_ms(times[base]), "results": results}
    harness.say(cell)
    result["cells"].append(cell)
    harness.write(args.json, result)


def described():
    machine = f"{os.cpu_count()} cores, {platform.machine()}"
    versions = f"jax {jax.__version__}, optax {optax.__version__}, {machine}"
    return {"command": harness.command(), "versions": versions, "cells": []}


# --- of logits ------------------------------------------------------------------------

SHAPES = [(16384, 128), (2048, 1000), (64, 32000), (64, 50257), (16, 151936)]
LOSSES = {
    "mean": lambda x, y: ours(x, y, reduction="mean"),
    "per example": lambda x, y: ours(x, y).mean(),
    "optax": lambda x, y: reference(x, y).mean(),
    "optax, upcast": lambda x, y: reference(x.astype(jnp.float32), y).mean(),
}


def measure_logits(args):
    result, before = described(), os.getloadavg()
    for dtype in args.dtypes:
        for shape in SHAPES[:1] if args.smoke else SHAPES:
            rng = np.random.default_rng(0)
            x = jnp.array(rng.normal(size=shape), dtype)
            y = jnp.array(rng.integers(0, shape[1], shape[0]))

            def kept(f, program, x=x, y=y):
                _, pull = jax.vjp(functools.partial(f, y=y), x)
                leaves = jax.tree.leaves(pull)
                each = {leaf.unsafe_buffer_pointer(): leaf for leaf in leaves}
                return sum(leaf.nbytes for leaf in each.values()) / x.size

            label = f"{dtype}, {shape[0]} x {shape[1]}"
            run(result, args, label, LOSSES, "optax, upcast", (x, y), 0, kept)
    return result | {"load": harness.load(before)}


# --- of a linear layer ----------------------------------------------------------------

# T, H, V
LINEAR_SHAPES = [
    *((1024, 256, 32000), (512, 512, 50257)),
    *((512, 256, 128256), (1024, 128, 151936)),
]
UPCAST = "dense, float32 logits"
LINEAR = {
    "dense": lambda x, y, w: reference(x @ w, y).mean(),
    UPCAST: lambda x, y, w: reference((x @ w).astype(jnp.float32), y).mean(),
    "default": functools.partial(linear, reduction="mean"),
    "budget 64 MiB": functools.partial(
        linear, reduction="mean", memory_budget=64 * MIB
    ),
    "per example": lambda x, y, w: linear(x, y, w).mean(),
}


def measure_linear(args):
    result, before = described(), os.getloadavg()
    for dtype in args.dtypes:
        same = {UPCAST} if dtype == "float32" else ()  # as "dense"
        losses = {name: f for name, f in LINEAR.items() if name not in same}
        for shape in [(64, 32, 1000)] if args.smoke else LINEAR_SHAPES:
            tokens, hidden, classes = shape
            rng = np.random.default_rng(0)
            x = jnp.array(rng.normal(size=(tokens, hidden)), dtype)
            w = jnp.array(rng.normal(size=(hidden, classes)) / hidden**0.5, dtype)
            y = jnp.array(rng.integers(0, classes, tokens))

            def temporary(f, program):
                return program.memory_analysis().temp_size_in_bytes / MIB

            label = f"{dtype}: " + ", ".join(f"{n:,}" for n in shape)
            run(result, args, label, losses, "dense", (x, y, w), (0, 2), temporary)
    return result | {"load": harness.load(before)}


# --- the page -------------------------------------------------------------------------


def markdown(title, header, losses, digits, note, result):
    rows = []
    for cell in result["cells"]:
        found = (cell["results"].get(name) for name in losses)
        figures = (f"{r[0]:.2f} ({r[1]:,.{digits}f})" if r else "" for r in found)
        rows.append([cell["label"], f"{cell['ms']:,.{digits}f}", *figures])
    lines = [
        f"# {title} on the CPU",
        "",
        f"Made by `{result['command']}`, {result['versions']}. {note}",
        "",
        *report.table([*header, *losses], rows, space=" "),
        result["load"],
    ]
    return "\n".join(lines) + "\n"


def program(measure, rounds, title, *page):
    def add_arguments(parser):
        parser.add_argument("--rounds", type=int, default=rounds)
        parser.add_argument("--dtypes", nargs="+", default=DTYPES)

    page = functools.partial(markdown, title, *page)
    return harness.Program(measure, page, add_arguments=add_arguments, about=title)


if __name__ == "__main__":
    harness.main(
        __doc__,
        {
            "logits": program(
                *(measure_logits, 31, "Cross-entropy"),
                *(["logits", "optax, upcast, ms"], LOSSES, 2),
                "Value and gradient of the mean loss, time relative to optax on logits "
                "upcast to float32; in brackets, bytes an entry that are kept for it.",
            ),
            "linear": program(
                *(measure_linear, 7, "Linear + cross-entropy"),
                *(["T, H, V", "dense, ms"], LINEAR, 0),
                "Value and gradients of the mean loss of T tokens behind weights [H, "
                "V]: time relative to the dense form, optax on `x @ weights`; in "
                "brackets, MiB that XLA reports as temporary.",
            ),
        },
    )
