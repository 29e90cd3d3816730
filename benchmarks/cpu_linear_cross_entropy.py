"""Times linear + cross-entropy on the CPU against the dense form.

    python benchmarks/cpu_linear_cross_entropy.py > docs/cpu_linear_cross_entropy.md

Value and gradients of the mean loss with respect to the hidden states and the weights,
in one jitted program. All contenders of a line take turns; a figure is the median over
the rounds of the time, relative to that of the dense form, in the same round. Memory is
what XLA reports as temporary (`memory_analysis().temp_size_in_bytes`): arguments and
gradients are not counted.
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

ours = jaxsoftmax.linear_softmax_cross_entropy
reference = optax.softmax_cross_entropy_with_integer_labels
MIB = 2**20
# T, H, V
SHAPES = [
    (1024, 256, 32000),
    (512, 512, 50257),
    (512, 256, 128256),
    (1024, 128, 151936),
]
SMALL = "budget 64 MiB"
UPCAST = "dense, float32 logits"
LOSSES = {
    "dense": lambda x, y, w: reference(x @ w, y).mean(),
    UPCAST: lambda x, y, w: reference((x @ w).astype(jnp.float32), y).mean(),
    "default": functools.partial(ours, reduction="mean"),
    SMALL: functools.partial(ours, reduction="mean", memory_budget=64 * MIB),
    "per example": lambda x, y, w: ours(x, y, w).mean(),
}


def measure(dtype, shape, rounds):
    tokens, hidden, vocabulary = shape
    rng = np.random.default_rng(0)
    x = jnp.array(rng.normal(size=(tokens, hidden)), dtype)
    w = jnp.array(rng.normal(size=(hidden, vocabulary)) / np.sqrt(hidden), dtype)
    y = jnp.array(rng.integers(0, vocabulary, tokens))
    calls, memory = {}, {}
    for name, f in LOSSES.items():
        if name == UPCAST and dtype == "float32":
            continue  # the same
        compiled = jax.jit(jax.value_and_grad(f, (0, 2))).lower(x, y, w).compile()
        memory[name] = compiled.memory_analysis().temp_size_in_bytes
        calls[name] = functools.partial(compiled, x, y, w)
    times = harness.in_turn(calls, rounds)
    base = times["dense"]
    ratios = {name: harness.median_ratio(each, base) for name, each in times.items()}
    return harness.median_ms(base), ratios, memory


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    args = parser.parse_args()
    before = os.getloadavg()
    print("# Linear + cross-entropy on the CPU\n")
    print(
        f"Made by `python benchmarks/cpu_linear_cross_entropy.py`, "
        f"{harness.versions()}. Value and gradients of the mean loss of T tokens "
        "behind weights [H, V]: time relative to the dense form, optax on `x @ "
        "weights`; in brackets, MiB that XLA reports as temporary.\n"
    )
    print("| T, H, V | dense, ms |", " | ".join(LOSSES), "|")
    print("| --- | --: |" + " --: |" * len(LOSSES))
    for dtype in args.dtypes:
        for shape in SHAPES:
            ms, ratios, memory = measure(dtype, shape, args.rounds)
            cells = [
                f"{ratios[n]:.2f} ({memory[n] / MIB:,.0f})" if n in ratios else ""
                for n in LOSSES
            ]
            label = f"{dtype}: " + ", ".join(f"{n:,}" for n in shape)
            print(f"| {label} | {ms:,.0f} |", " | ".join(cells), "|", flush=True)
    print(f"\n{harness.load(before)}")


if __name__ == "__main__":
    main()
