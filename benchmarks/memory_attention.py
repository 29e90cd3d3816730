"""Temporary memory of attention against the length of the sequence.

    python benchmarks/memory_attention.py      # two tables in Markdown

What XLA says of each compiled program (`memory_analysis().temp_size_in_bytes`): causal
attention of 1 sequence, 8 heads of depth 64, and its three gradients. Nothing is
executed, so the arrays need not fit. Arguments and results are not counted: `query`,
`key`, `value` and the cotangent; the result or, of the gradient, the three gradients.
Runs on the CPU, in less than a minute.

It is an error if ours takes more than `bound` says.
"""

import functools
import os
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp

import jaxsoftmax

HEADS, DEPTH = 8, 64
LENGTHS = [1024, 2048, 4096, 8192, 16384, 32768]
MIB = 2**20
BLOCK = 2**20  # logits of all heads, at most, on a CPU

JAX_NN, OURS = "jax.nn", "jaxsoftmax"
CONTENDERS = {
    JAX_NN: functools.partial(jax.nn.dot_product_attention, implementation="xla"),
    OURS: functools.partial(jaxsoftmax.dot_product_attention, implementation="xla"),
}


def forward(attention, query, key, value, cotangent):
    return attention(query, key, value, is_causal=True)


def gradient(attention, query, key, value, cotangent):
    f = functools.partial(attention, is_causal=True)
    return jax.vjp(f, query, key, value)[1](cotangent)


PROGRAMS = {"forward": forward, "gradient": gradient}


def temporary_bytes(program, attention, length, dtype):
    x = jax.ShapeDtypeStruct((1, length, HEADS, DEPTH), dtype)
    run = jax.jit(functools.partial(program, attention))
    compiled = run.lower(x, x, x, x).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def bound(length):
    """The most that ours may take on the CPU: some arrays like `query`, some blocks."""
    return 4 * (12 * HEADS * length * DEPTH + 6 * BLOCK)


def main():
    print(f"jax {jax.__version__}; MiB; causal, {HEADS} heads of depth {DEPTH}")
    too_much = []
    for dtype in (jnp.float32, jnp.bfloat16):
        columns = [(p, c) for p in PROGRAMS for c in CONTENDERS]
        names = " | ".join(", ".join(column) for column in columns)
        print(f"\n| T, {dtype.__name__} | `query` | weights in float32 | {names} |")
        print("| --- " * (3 + len(columns)) + "|")
        for length in LENGTHS:
            found = [
                temporary_bytes(PROGRAMS[p], CONTENDERS[c], length, dtype)
                for p, c in columns
            ]
            itemsize = jnp.dtype(dtype).itemsize
            known = [itemsize * HEADS * length * DEPTH, 4 * HEADS * length**2]
            cells = " | ".join(f"{size / MIB:,.0f}" for size in known + found)
            print(f"| {length:,} | {cells} |", flush=True)
            too_much += [
                f"{program}, {length} positions, {dtype.__name__}: {size / MIB:.0f} MiB"
                for (program, name), size in zip(columns, found, strict=True)
                if name == OURS and size > bound(length)
            ]
    for what in too_much:
        print(f"error: too much: {what}", file=sys.stderr)
    return 1 if too_much else 0


if __name__ == "__main__":
    sys.exit(main())
