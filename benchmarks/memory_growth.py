"""Temporary memory of compiled programs against a length that it could grow with.

    python benchmarks/memory_growth.py attention      # two tables in Markdown
    python benchmarks/memory_growth.py linear

What XLA says of each compiled program (`memory_analysis().temp_size_in_bytes`). Nothing
is executed, so the arrays need not fit. Runs on the CPU, in less than a minute.

- attention: causal attention of 1 sequence, 8 heads of depth 64, and its three
  gradients. Arguments and results are not counted: `query`, `key`, `value` and the
  cotangent; the result or, of the gradient, the three gradients.
- linear: the mean cross-entropy of 8192 tokens behind weights [1024, V], and the
  gradients of both. Not counted: `x`, `weights`, and the two gradients.

It is an error if ours takes more than `attention_bound` or `linear_bound` says.
"""

import functools
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import harness
import jax
import jax.numpy as jnp
import optax
import report

import jaxsoftmax

MIB = 2**20
DTYPES = ("float32", "bfloat16")


def temporary_bytes(function, *structs):
    compiled = jax.jit(function).lower(*structs).compile()
    return compiled.memory_analysis().temp_size_in_bytes


# --- attention ------------------------------------------------------------------------

HEADS, DEPTH = 8, 64
LENGTHS = [1024, 2048, 4096, 8192, 16384, 32768]
BLOCK = 2**20  # logits of all heads, at most, on a CPU
JAX_NN, OURS = "jax.nn", "jaxsoftmax"
ATTENTION = {
    JAX_NN: functools.partial(jax.nn.dot_product_attention, implementation="xla"),
    OURS: functools.partial(jaxsoftmax.dot_product_attention, implementation="xla"),
}


def forward(attention, query, key, value, cotangent):
    return attention(query, key, value, is_causal=True)


def gradient(attention, query, key, value, cotangent):
    f = functools.partial(attention, is_causal=True)
    return jax.vjp(f, query, key, value)[1](cotangent)


PROGRAMS = {"forward": forward, "gradient": gradient}


def attention_bytes(program, attention, length, dtype):
    x = jax.ShapeDtypeStruct((1, length, HEADS, DEPTH), dtype)
    return temporary_bytes(functools.partial(program, attention), x, x, x, x)


def attention_bound(column, length, dtype):
    """The most that ours may take on the CPU: some arrays like `query`, some blocks."""
    if OURS not in column:
        return None
    return 4 * (12 * HEADS * length * DEPTH + 6 * BLOCK)


def attention_sizes(length, dtype):
    known = {
        "`query`": jnp.dtype(dtype).itemsize * HEADS * length * DEPTH,
        "weights in float32": 4 * HEADS * length**2,
    }
    return known | {
        f"{program}, {name}": attention_bytes(f, attention, length, dtype)
        for program, f in PROGRAMS.items()
        for name, attention in ATTENTION.items()
    }


# --- a linear layer and its loss ------------------------------------------------------

TOKENS, HIDDEN = 8192, 1024
VOCABULARIES = [1024, 4096, 16384, 32768, 50257, 65536, 131072]
SMALL = 64 * MIB  # a memory_budget
ours = jaxsoftmax.linear_softmax_cross_entropy


def dense(x, labels, weights):
    logits = (x @ weights).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


DENSE = "dense, optax"
BUDGET = '`"mean"`, budget 64 MiB'
LINEAR = {
    DENSE: dense,
    '`"mean"`': functools.partial(ours, reduction="mean"),
    BUDGET: functools.partial(ours, reduction="mean", memory_budget=SMALL),
    '`"none"`': lambda *arrays: ours(*arrays).mean(),
}


def linear_bytes(loss, vocabulary, dtype):
    x = jax.ShapeDtypeStruct((TOKENS, HIDDEN), dtype)
    labels = jax.ShapeDtypeStruct((TOKENS,), jnp.int32)
    weights = jax.ShapeDtypeStruct((HIDDEN, vocabulary), dtype)
    return temporary_bytes(jax.value_and_grad(loss, (0, 2)), x, labels, weights)


def linear_bound(column, vocabulary, dtype):
    """The most that ours may take on the CPU.

    XLA writes the exponentials of a chunk's logits next to these, so the budget counts
    twice. Three arrays of hidden states: `x` by chunks, and two of its gradient. Of
    weights there are copies where they are filled up to a multiple of 128 classes, and
    in bfloat16 the float32 gradient and float32 copies of the products' operands.
    """
    if column == DENSE or column not in LINEAR:
        return None
    budget = SMALL if column == BUDGET else max(8 * HIDDEN * vocabulary, 256 * MIB)
    copies = (3 if vocabulary % 128 else 0) + (3 if dtype == "bfloat16" else 0)
    return 2 * budget + 4 * (3 * TOKENS * HIDDEN + copies * HIDDEN * vocabulary)


def linear_sizes(vocabulary, dtype):
    return {"logits in float32": 4 * TOKENS * vocabulary} | {
        name: linear_bytes(loss, vocabulary, dtype) for name, loss in LINEAR.items()
    }


# --- the program ----------------------------------------------------------------------


def measure(sizes_of, bound, lengths, args):
    cells = []
    for dtype in DTYPES:
        for length in lengths[:1] if args.smoke else lengths:
            sizes = sizes_of(length, dtype)
            bounds = {name: bound(name, length, dtype) for name in sizes}
            cell = {"dtype": dtype, "length": length, "sizes": sizes, "bounds": bounds}
            cells.append(cell)
            harness.say(dtype, length)
    return {"jax": jax.__version__, "cells": cells}


def markdown(letter, note, result):
    lines = [f"jax {result['jax']}; MiB; {note}", ""]
    for dtype in DTYPES:
        cells = [cell for cell in result["cells"] if cell["dtype"] == dtype]
        header = [f"{letter}, {dtype}", *cells[0]["sizes"]]
        rows = [
            [f"{c['length']:,}", *(f"{n / MIB:,.0f}" for n in c["sizes"].values())]
            for c in cells
        ]
        lines += report.table(header, rows, ["---"] * len(header), " ")
    return "\n".join(lines)


def failures(result):
    return [
        f"too much: {name}, {cell['length']}, {cell['dtype']}: {size / MIB:.0f} MiB"
        for cell in result["cells"]
        for name, size in cell["sizes"].items()
        if size > (cell["bounds"][name] or size)
    ]


def program(about, letter, note, *measured):
    return harness.Program(
        functools.partial(measure, *measured),
        functools.partial(markdown, letter, note),
        **{"failures": failures, "about": about},
    )


if __name__ == "__main__":
    harness.main(
        __doc__,
        {
            "attention": program(
                *("Attention, by the length T of the sequence", "T"),
                f"causal, {HEADS} heads of depth {DEPTH}",
                *(attention_sizes, attention_bound, LENGTHS),
            ),
            "linear": program(
                *("Linear + cross-entropy, by the size V of the vocabulary", "V"),
                f"{TOKENS} tokens, H = {HIDDEN}",
                *(linear_sizes, linear_bound, VOCABULARIES),
            ),
        },
    )
