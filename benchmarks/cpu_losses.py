"""Times cross-entropy on the CPU: of logits, and of a linear layer that makes them.

    python benchmarks/cpu_losses.py logits --markdown docs/cpu_cross_entropy.md
    python benchmarks/cpu_losses.py linear --markdown docs/cpu_linear_cross_entropy.md

Value and gradients of the mean loss, in one jitted program. All contenders of a line
take turns; a figure is the median over the rounds of the time, relative to that of a
base in the same round.

- logits: against optax; the base is optax on logits upcast to float32. Kept: what the
  vjp keeps, in bytes per entry, the logits included where they are kept.
- linear: gradients with respect to the hidden states and the weights; the base is the
  dense form, optax on `x @ weights`. Memory is what XLA reports as temporary
  (`memory_analysis().temp_size_in_bytes`): arguments and gradients are not counted.
"""

import functools
import itertools
import operator
import os
import platform
import statistics

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
DTYPES = ["float32", "bfloat16"]


# --- of logits ------------------------------------------------------------------------

SHAPES = [(16384, 128), (2048, 1000), (64, 32000), (64, 50257), (16, 151936)]
LOSSES = {
    "mean": lambda x, y: ours(x, y, reduction="mean"),
    "per example": lambda x, y: ours(x, y).mean(),
    "optax": lambda x, y: reference(x, y).mean(),
    "optax, upcast": lambda x, y: reference(x.astype(jnp.float32), y).mean(),
}


def logits_case(dtype, shape):
    """A label; the arrays."""
    rng = np.random.default_rng(0)
    x = jnp.array(rng.normal(size=shape), dtype)
    y = jnp.array(rng.integers(0, shape[1], shape[0]))
    return f"{dtype}, {shape[0]} x {shape[1]}", (x, y)


def kept_bytes(f, program, x, y):
    """An entry."""
    _, pull = jax.vjp(functools.partial(f, y=y), x)
    leaves = {leaf.unsafe_buffer_pointer(): leaf for leaf in jax.tree.leaves(pull)}
    return sum(leaf.nbytes for leaf in leaves.values()) / x.size


# --- of a linear layer ----------------------------------------------------------------

MIB = 2**20
# T, H, V
LINEAR_SHAPES = [
    *((1024, 256, 32000), (512, 512, 50257)),
    *((512, 256, 128256), (1024, 128, 151936)),
]
LINEAR = {
    "dense": lambda x, w, y: reference(x @ w, y).mean(),
    "dense, float32 logits": lambda x, w, y: reference(
        (x @ w).astype(jnp.float32), y
    ).mean(),
    "default": lambda x, w, y: linear(x, y, w, reduction="mean"),
    "budget 64 MiB": lambda x, w, y: linear(
        x, y, w, reduction="mean", memory_budget=64 * MIB
    ),
    "per example": lambda x, w, y: linear(x, y, w).mean(),
}


def linear_case(dtype, shape):
    tokens, hidden, classes = shape
    rng = np.random.default_rng(0)
    x = jnp.array(rng.normal(size=(tokens, hidden)), dtype)
    w = jnp.array(rng.normal(size=(hidden, classes)) / np.sqrt(hidden), dtype)
    y = jnp.array(rng.integers(0, classes, tokens))
    return f"{dtype}: " + ", ".join(f"{n:,}" for n in shape), (x, w, y)


def temporary_mib(f, program, *arrays):
    return program.memory_analysis().temp_size_in_bytes / MIB


# --- the program ----------------------------------------------------------------------


def measure(losses, base, shapes, case, number, args):
    before = os.getloadavg()
    machine = f"{os.cpu_count()} cores, {platform.machine()}"
    versions = f"jax {jax.__version__}, optax {optax.__version__}, {machine}"
    cells = []
    for dtype, shape in itertools.product(DTYPES, shapes[:1] if args.smoke else shapes):
        label, arrays = case(dtype, shape)
        step = functools.partial(jax.value_and_grad, argnums=range(len(arrays) - 1))
        programs = {
            name: jax.jit(step(f)).lower(*arrays).compile()
            for name, f in losses.items()
        }
        calls = {name: functools.partial(p, *arrays) for name, p in programs.items()}
        times = harness.in_turn(calls, 1 if args.smoke else args.rounds)
        results = {}
        for name, program in programs.items():
            ratios = map(operator.truediv, times[name], times[base])
            figure = number(losses[name], program, *arrays)
            results[name] = [statistics.median(ratios), figure]
        ms = 1e3 * statistics.median(times[base])
        cells.append({"label": label, "ms": ms, "results": results})
        harness.say(cells[-1])
    load = harness.load(before)
    command = harness.command()
    return {"command": command, "versions": versions, "cells": cells, "load": load}


def markdown(title, header, losses, digits, note, result):
    rows = []
    for cell in result["cells"]:
        found = (cell["results"][name] for name in losses)
        figures = (f"{ratio:.2f} ({number:,.{digits}f})" for ratio, number in found)
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


def program(title, header, losses, digits, note, rounds, *measured):
    return harness.Program(
        functools.partial(measure, losses, *measured),
        functools.partial(markdown, title, header, losses, digits, note),
        add_arguments=lambda parser: parser.add_argument(
            "--rounds", type=int, default=rounds
        ),
        about=title,
    )


PROGRAMS = {
    "logits": program(
        *("Cross-entropy", ["logits", "optax, upcast, ms"], LOSSES, 2),
        "Value and gradient of the mean loss, time relative to optax on logits upcast "
        "to float32; in brackets, bytes per entry that the backward keeps.",
        *(31, "optax, upcast", SHAPES, logits_case, kept_bytes),
    ),
    "linear": program(
        *("Linear + cross-entropy", ["T, H, V", "dense, ms"], LINEAR, 0),
        "Value and gradients of the mean loss of T tokens behind weights [H, V]: time "
        "relative to the dense form, optax on `x @ weights`; in brackets, MiB that XLA "
        "reports as temporary.",
        *(7, "dense", LINEAR_SHAPES, linear_case, temporary_mib),
    ),
}


if __name__ == "__main__":
    harness.main(__doc__, PROGRAMS)
