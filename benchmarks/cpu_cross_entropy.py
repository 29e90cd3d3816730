"""Times cross-entropy on the CPU against optax: value and gradient of the mean.

    python benchmarks/cpu_cross_entropy.py > docs/cpu_cross_entropy.md

All contenders of a line take turns; a figure is the median over the rounds of the time,
relative to that of optax on logits upcast to float32, in the same round. Kept: what the
vjp keeps, in bytes an entry, the logits included where they are kept.
"""

import argparse
import functools
import os

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxsoftmax

ours = jaxsoftmax.softmax_cross_entropy_with_integer_labels
reference = optax.softmax_cross_entropy_with_integer_labels
SHAPES = [(16384, 128), (2048, 1000), (64, 32000), (64, 50257), (16, 151936)]
LOSSES = {
    "mean": lambda x, y: ours(x, y, reduction="mean"),
    "per example": lambda x, y: ours(x, y).mean(),
    "optax": lambda x, y: reference(x, y).mean(),
    "optax, upcast": lambda x, y: reference(x.astype(jnp.float32), y).mean(),
}


def kept_bytes(f, x, y):
    _, pull = jax.vjp(functools.partial(f, y=y), x)
    leaves = {leaf.unsafe_buffer_pointer(): leaf for leaf in jax.tree.leaves(pull)}
    return sum(leaf.nbytes for leaf in leaves.values()) / x.size


def measure(dtype, shape, rounds):
    rng = np.random.default_rng(0)
    x = jnp.array(rng.normal(size=shape), dtype)
    y = jnp.array(rng.integers(0, shape[1], shape[0]))
    calls = {
        name: functools.partial(jax.jit(jax.value_and_grad(f)), x, y)
        for name, f in LOSSES.items()
    }
    times = harness.in_turn(calls, rounds)
    base = times["optax, upcast"]
    found = {"ms": harness.median_ms(base)}
    for name, each in times.items():
        kept = kept_bytes(LOSSES[name], x, y)
        found[name] = (harness.median_ratio(each, base), kept)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=31)
    args = parser.parse_args()
    before = os.getloadavg()
    print("# Cross-entropy on the CPU\n")
    print(
        f"Made by `python benchmarks/cpu_cross_entropy.py`, {harness.versions()}. "
        "Value and gradient of the mean loss, time relative to optax on logits upcast "
        "to float32; in brackets, bytes an entry that the backward keeps.\n"
    )
    print("| logits | optax, upcast, ms |", " | ".join(LOSSES), "|")
    print("| --- | --: |" + " --: |" * len(LOSSES))
    for dtype in ("float32", "bfloat16"):
        for shape in SHAPES:
            found = measure(dtype, shape, args.rounds)
            cells = [f"{r:.2f} ({k:.2f})" for r, k in (found[n] for n in LOSSES)]
            label = f"{dtype}, {shape[0]} x {shape[1]}"
            print(
                f"| {label} | {found['ms']:.2f} |", " | ".join(cells), "|", flush=True
            )
    print(f"\n{harness.load(before)}")


if __name__ == "__main__":
    main()
