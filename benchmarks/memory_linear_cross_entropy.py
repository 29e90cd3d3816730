"""Temporary memory of linear + cross-entropy against the size of the vocabulary.

    python benchmarks/memory_linear_cross_entropy.py      # two tables in Markdown

What XLA says of each compiled program (`memory_analysis().temp_size_in_bytes`): the
mean loss of 8192 tokens behind weights [1024, V], and the gradients of both. Nothing is
executed, so the arrays need not fit. Arguments and results are not counted: `x`,
`weights`, and the two gradients. Runs on the CPU, in less than a minute.

It is an error if ours takes more than `bound` of its budget says.
"""

import functools
import os
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import optax

import jaxsoftmax

TOKENS, HIDDEN = 8192, 1024
VOCABULARIES = [1024, 4096, 16384, 32768, 50257, 65536, 131072]
MIB = 2**20
SMALL = 64 * MIB  # a memory_budget
ours = jaxsoftmax.linear_softmax_cross_entropy


def dense(x, labels, weights):
    logits = (x @ weights).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


DENSE = "dense, optax"
CONTENDERS = {
    DENSE: dense,
    '`"mean"`': functools.partial(ours, reduction="mean"),
    '`"mean"`, budget 64 MiB': functools.partial(
        ours, reduction="mean", memory_budget=SMALL
    ),
    '`"none"`': lambda *arrays: ours(*arrays).mean(),
}


def temporary_bytes(loss, vocabulary, dtype):
    x = jax.ShapeDtypeStruct((TOKENS, HIDDEN), dtype)
    labels = jax.ShapeDtypeStruct((TOKENS,), jnp.int32)
    weights = jax.ShapeDtypeStruct((HIDDEN, vocabulary), dtype)
    step = jax.jit(jax.value_and_grad(loss, (0, 2)))
    compiled = step.lower(x, labels, weights).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def bound(name, vocabulary, dtype):
    """The most that ours may take on the CPU.

    XLA writes the exponentials of a chunk's logits next to these, so the budget counts
    twice. Three arrays of hidden states: `x` by chunks, and two of its gradient. Of
    weights there are copies where they are filled up to a multiple of 128 classes, and
    in bfloat16 the float32 gradient and float32 copies of the products' operands.
    """
    budget = SMALL if "64" in name else max(8 * HIDDEN * vocabulary, 256 * MIB)
    copies = (3 if vocabulary % 128 else 0) + (3 if dtype == "bfloat16" else 0)
    return 2 * budget + 4 * (3 * TOKENS * HIDDEN + copies * HIDDEN * vocabulary)


def main():
    print(f"jax {jax.__version__}; MiB; {TOKENS} tokens, H = {HIDDEN}")
    too_much = []
    for dtype in ("float32", "bfloat16"):
        print(f"\n| V, {dtype} | logits in float32 |", " | ".join(CONTENDERS), "|")
        print("| --- " * (2 + len(CONTENDERS)) + "|")
        for vocabulary in VOCABULARIES:
            found = {
                name: temporary_bytes(loss, vocabulary, dtype)
                for name, loss in CONTENDERS.items()
            }
            logits = 4 * TOKENS * vocabulary
            sizes = (logits, *found.values())
            cells = " | ".join(f"{size / MIB:,.0f}" for size in sizes)
            print(f"| {vocabulary:,} | {cells} |", flush=True)
            too_much += [
                f"{name}, {vocabulary} classes, {dtype}: {size / MIB:.0f} MiB"
                for name, size in found.items()
                if name != DENSE and size > bound(name, vocabulary, dtype)
            ]
    for what in too_much:
        print(f"error: too much: {what}", file=sys.stderr)
    return 1 if too_much else 0


if __name__ == "__main__":
    sys.exit(main())
