"""Errors of attention and its gradients, against NumPy in float64.

    python benchmarks/accuracy_attention.py      # a table in Markdown

256 positions, 4 heads of depth 64. The inputs are Gaussian; "offset" adds 10 to the
values, "large" multiplies the queries, and with them the logits, by 4. Exact is what
belongs to the inputs as they are in their dtype. An error is the worst of all rows (a
query, or a key, of a head): its largest |error| over its largest |exact entry|. Runs on
the CPU, in less than a minute.
"""

import os
import pathlib
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import report

import jaxsoftmax

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests"))

from support import attention_oracle

LENGTH, HEADS, DEPTH = 256, 4, 64
CONTENDERS = {
    "jax.nn": jax.nn.dot_product_attention,
    "ours": jaxsoftmax.dot_product_attention,
}
CASES = {  # what is added to the values, what multiplies the queries
    "Gaussian": (0, 1),
    "offset": (10, 1),
    "large": (0, 4),
    "both": (10, 4),
}


def errors(attention, q, k, v, d_out):
    out, pull = jax.vjp(attention, q, k, v)
    got = (out, *pull(d_out))
    exact = attention_oracle.forward(q, k, v)
    want = (exact.out, *exact.vjp(d_out).values())
    for x, y in zip(got, want, strict=True):
        error = np.abs(np.asarray(x, np.float64) - y).max(axis=-1)
        yield (error / np.abs(y).max(axis=-1)).max()


def main():
    print(f"jax {jax.__version__}\n")
    names = ("result", "of `query`", "of `key`", "of `value`")
    header = ["", *(f"{name}, {which}" for name in names for which in CONTENDERS)]
    rows = []
    for dtype in (jnp.float32, jnp.bfloat16):
        for case, (offset, factor) in CASES.items():
            rng = np.random.default_rng(0)
            shape = (4, 1, LENGTH, HEADS, DEPTH)
            q, k, v, d_out = rng.normal(size=shape)
            q, v = factor * q, offset + v
            arrays = [jnp.asarray(x, dtype) for x in (q, k, v, d_out)]
            found = [errors(f, *arrays) for f in CONTENDERS.values()]
            cells = [f"{x:.1e}" for pair in zip(*found, strict=True) for x in pair]
            rows.append([f"{dtype.__name__}: {case}", *cells])
    print(report.text_table(header, rows, ["---"] * len(header)))


if __name__ == "__main__":
    main()
