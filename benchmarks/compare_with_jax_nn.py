"""Compare jaxsoftmax with jax.nn: kept bytes, compiled memory, accuracy, semantics.

Prints one Markdown page, and writes it to a file with `--output`:

    python benchmarks/compare_with_jax_nn.py
    python benchmarks/compare_with_jax_nn.py --output docs/compare_with_jax_nn.md

Needs the source tree: the oracle is that of the tests. Runs on the CPU, in less than a
minute on two cores; all inputs are drawn with fixed seeds. It measures no time: see
cpu_softmax.py for that.
"""

import argparse
import contextlib
import dataclasses
import functools
import os
import pathlib
import platform
from collections.abc import Callable, Iterable, Iterator
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import harness
import jax
import jax.numpy as jnp
import numpy as np
import report
from support import oracle

import jaxsoftmax
from jaxsoftmax import naive

ROWS, COLUMNS = 1024, 1024  # of the logits whose kept bytes are counted
LENGTH, DEPTH, LAYERS = 1024, 64, 8  # of the attention that is compiled
ERROR_SHAPES = [(512, 128), (16, 4096)]
LOGIT_SCALES = [1, 20, 60]
OFFSET = 1000
# Least size of a counted row in 16-bit dtypes, relative to the cotangent.
LEAST = 1e-9


# --- the contenders -------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Contender:
    """A softmax and a log_softmax, called as f(x, where=None, dtype=None)."""

    name: str
    softmax: Callable[..., jax.Array]
    log_softmax: Callable[..., jax.Array]
    custom_jvp: bool = False

    def active(self) -> contextlib.AbstractContextManager[Any]:
        return jax.softmax_custom_jvp(self.custom_jvp)


def nn_softmax(x, where=None, dtype=None):
    return jax.nn.softmax(x, where=where).astype(dtype or x.dtype)


def nn_log_softmax(x, where=None, dtype=None):
    return jax.nn.log_softmax(x, where=where).astype(dtype or x.dtype)


DEFAULT = Contender("jax.nn", nn_softmax, nn_log_softmax)
CUSTOM_JVP = Contender("jax.nn, custom_jvp", nn_softmax, nn_log_softmax, True)
OURS = Contender("jaxsoftmax", jaxsoftmax.softmax, jaxsoftmax.log_softmax)
CONTENDERS = [DEFAULT, CUSTOM_JVP, OURS]


def table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    header = list(header)
    return report.text_table(header, rows, ["---"] * len(header))


def processor() -> str:
    return f"{harness.processor()} ({platform.machine()})"


# --- bytes that the backward keeps ----------------------------------------------------


def kept_bytes(f: Callable[..., jax.Array], x: jax.Array, *others: jax.Array) -> str:
    """Bytes per entry of x in what jax.vjp keeps, `others` left out.

    What of it is x itself, and what is the same number everywhere, is told.
    """
    pull = jax.jit(lambda *args: jax.vjp(f, *args)[1])(x, *others)
    leaves = {a.unsafe_buffer_pointer(): a for a in jax.tree.leaves(pull)}.values()
    kept = [a for a in leaves if not any(same(a, other) for other in others)]
    total = sum(a.nbytes for a in kept) / x.size
    constant = sum(a.nbytes for a in kept if is_constant(a)) / x.size
    own = sum(a.nbytes for a in kept if same(a, x)) / x.size
    notes = [f"x: {own:.2f}"] * bool(own)
    notes += [f"constants: {constant:.2f}"] * bool(constant)
    return f"{total:.2f}" + (f" ({', '.join(notes)})" if notes else "")


def same(a: jax.Array, b: jax.Array) -> bool:
    """Equal in every bit: jax.jit returns an argument as a copy."""
    return a.dtype == b.dtype and np.array_equal(a, b)


def is_constant(x: jax.Array) -> bool:
    return bool((x == x.reshape(-1)[0]).all())


def kept_cases(c: Contender) -> Iterator[tuple[str, str]]:
    rng = np.random.default_rng(0)
    logits = jnp.array(rng.normal(size=(ROWS, COLUMNS)), jnp.float32)
    where = jnp.array(rng.random(size=logits.shape) < 0.9)

    def softmax_cases(f, x, v, name):
        yield f"softmax, {name}", kept_bytes(f, x)
        masked = functools.partial(f, where=where)
        yield f"softmax with `where`, {name}", kept_bytes(masked, x)
        with_v = lambda x, v: f(x) @ v
        yield f"softmax and `P @ v`, {name}", kept_bytes(with_v, x, v)

    for dtype in (jnp.float32, jnp.bfloat16):
        x, name = logits.astype(dtype), jnp.dtype(dtype).name
        v = jnp.array(rng.normal(size=(COLUMNS, DEPTH)), dtype)
        yield from softmax_cases(c.softmax, x, v, name)
        yield f"log_softmax, {name}", kept_bytes(c.log_softmax, x)
        masked = functools.partial(c.log_softmax, where=where)
        yield f"log_softmax with `where`, {name}", kept_bytes(masked, x)
    mixed = functools.partial(c.softmax, dtype=jnp.bfloat16)
    yield from softmax_cases(mixed, logits, v, "float32 logits to bfloat16 P")


def kept_section() -> str:
    columns = {}
    for c in CONTENDERS:
        with c.active():
            columns[c.name] = dict(kept_cases(c))
    rows = [
        (case, *(columns[c.name][case] for c in CONTENDERS))
        for case in columns[OURS.name]
    ]
    return f"""## Bytes kept for the backward

Bytes per entry of x, for {ROWS} rows of {COLUMNS}. Counted are the arrays in the leaves
of the function that `jax.vjp` returns, out of `jax.jit`: each buffer once, row vectors
and the mask (of the shape of x, one byte per entry) included. In parentheses: what of
the sum is x itself, which the caller may hold anyway, and what is arrays of one number
everywhere. Such constants take memory where the backward is a program of its own; where
XLA compiles forward and backward together, it can make them anew instead.

`P @ v` is differentiated in x and v, and v is not counted. The product keeps P; where
the softmax keeps that same array, it is counted once. For float32 logits to bfloat16 P,
jax.nn is called as `jax.nn.softmax(x).astype(jnp.bfloat16)` and jaxsoftmax as
`softmax(x, dtype=jnp.bfloat16)`.

{table(["", *(c.name for c in CONTENDERS)], rows)}
"""


# --- temporary memory of a compiled gradient ------------------------------------------


def temporary_bytes(c: Contender, dtype: Any, masked: bool, layers: int) -> int:
    """Of the gradient of a loss through layers of self-attention."""
    logits_dtype = jnp.float32 if dtype == jnp.bfloat16 else dtype

    def loss(h):
        for _ in range(layers):
            logits = jnp.einsum("qd,kd->qk", h, h, preferred_element_type=logits_dtype)
            where = jnp.tril(jnp.ones(logits.shape, bool)) if masked else None
            p = c.softmax(logits * DEPTH**-0.5, where=where, dtype=dtype)
            h = h + p @ h
        return jnp.sum(h.astype(jnp.float32) ** 2)

    array = jax.ShapeDtypeStruct((LENGTH, DEPTH), dtype)
    compiled = jax.jit(jax.grad(loss)).lower(array).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def temporary_section() -> str:
    rows = []
    for layers in (1, LAYERS):
        for dtype in (jnp.float32, jnp.bfloat16):
            for masked in (False, True):
                row = [layers, jnp.dtype(dtype).name, "causal" if masked else "none"]
                for c in CONTENDERS:
                    with c.active():
                        size = temporary_bytes(c, dtype, masked, layers)
                    row.append(f"{size / 2**20:.1f}")
                rows.append(row)
    return f"""## Temporary memory of a compiled gradient

MiB that XLA reserves for temporaries (`temp_size_in_bytes` of `memory_analysis()`) in
the compiled gradient, on the CPU, of a loss through layers of self-attention,
`h = h + softmax(h @ h.T / 8) @ h`: one head, {LENGTH} positions of depth {DEPTH}.
The logits are float32, {LENGTH**2 * 4 / 2**20:.0f} MiB per layer; P has the dtype of h.
With one layer, the scratch space of the backward counts as much as what is kept for it.
With {LAYERS}, what is kept is most of it.

{table(["layers", "h", "mask", *(c.name for c in CONTENDERS)], rows)}
"""


# --- accuracy -------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(0, 1))
def pull_back(c: Contender, name: str, x: jax.Array, g: jax.Array) -> jax.Array:
    return jax.vjp(getattr(c, name), x)[1](g)[0]


def cotangent(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any, kind: str):
    """Gaussian, or about `OFFSET` and wide enough for `dtype` to tell it apart."""
    offset = OFFSET if kind == f"offset {OFFSET}" else 0
    spread = max(1.0, 32 * float(jnp.finfo(dtype).eps) * offset)
    return jnp.array(offset + spread * rng.normal(size=shape), dtype)


def counted_rows(want: np.ndarray, dtype: Any, least: float) -> int:
    """How many rows `oracle.row_error` counts."""
    info = jnp.finfo(dtype)
    largest = np.abs(np.asarray(want)).max(-1)
    smallest = max(float(info.tiny) / float(info.eps), least)
    return int(((largest >= smallest) & (largest < float(info.max))).sum())


def errors(name: str, kinds: list[str]) -> Iterator[list[str]]:
    gradient = getattr(oracle, f"{name}_vjp")
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        for shape in ERROR_SHAPES:
            rng = np.random.default_rng(0)
            for kind in kinds:
                for scale in LOGIT_SCALES:
                    x = jnp.array(scale * rng.normal(size=shape), dtype)
                    if kind == "one-hot":
                        g = jax.nn.one_hot(jnp.argmax(x, -1), shape[-1], dtype=dtype)
                    else:
                        g = cotangent(rng, shape, dtype, kind)
                    want = gradient(x, g)
                    sixteen_bit = jnp.finfo(dtype).bits == 16
                    least = LEAST * float(jnp.abs(g).max()) if sixteen_bit else 0.0
                    yield [
                        jnp.dtype(dtype).name,
                        f"{shape[0]} x {shape[1]}",
                        f"{scale}",
                        kind,
                        f"{counted_rows(want, dtype, least)}",
                        *error_cells(name, x, g, want, dtype, least),
                    ]


def error_cells(name, x, g, want, dtype, least) -> Iterator[str]:
    for c in CONTENDERS:
        if not counted_rows(want, dtype, least):
            yield "-"
            continue
        with c.active():
            got = pull_back(c, name, x, g)
        yield f"{oracle.row_error(got, want, dtype, least=least):.1e}"


def error_section() -> str:
    header = ["dtype", "rows", "logits", "cotangent", "counted"]
    header += [c.name for c in CONTENDERS]
    softmax_rows = list(errors("softmax", ["gaussian", f"offset {OFFSET}"]))
    log_softmax_rows = [
        row[:-2] + row[-1:]  # the flag has no part in log_softmax
        for row in errors("log_softmax", ["gaussian", "one-hot"])
    ]
    log_header = header[:-2] + header[-1:]
    return f"""## Error of the gradient

Worst row error: the largest error in a row over the largest entry of that row's true
gradient, for the worst row. 1 means that the error is as large as the gradient. Such
rows are mostly those that one entry dominates: their true gradient is small, and an
error of eps times the cotangent, small too, is all of it. The true gradient is that of
a numpy oracle in long double (64-bit mantissa on x86). All get the same inputs, rounded
to the dtype, and are compiled with `jax.jit`.

"logits" is the standard deviation of Gaussian logits. The cotangent is Gaussian, or
Gaussian about {OFFSET} with a standard deviation of 1 or, if larger, 32 eps times
{OFFSET}. "counted" is the number of rows that the worst is taken of: those whose
largest true entry is finite and at least tiny/eps of the dtype, so that all that
matters of the row is a normal number. In bfloat16 and float16 it must also be at least
{LEAST:.0e} of the largest cotangent: below, a 16-bit P does not resolve the gradient
(see [derivatives](derivatives.md)). "-": there is no such row.

### softmax

{table(header, softmax_rows)}

### log_softmax

The one-hot cotangent is 1 at the largest logit, as a cross-entropy's is for a label
that the model is sure of.

{table(log_header, log_softmax_rows)}
"""


# --- transformations ------------------------------------------------------------------


def transformations() -> dict[str, Callable[..., Any]]:
    """Each takes a function of a vector and evaluates one transformation of it."""
    x = jnp.array([0.3, -1.2, 2.0, 0.7], jnp.float32)
    t = jnp.array([1.0, 0.5, -0.25, 2.0], jnp.float32)
    batch = jnp.stack([x, t])

    def loss(f):
        return lambda x: jnp.sum(t * f(x) ** 2)

    return {
        "`grad`": lambda f: jax.grad(loss(f))(x),
        "`jvp`": lambda f: jax.jvp(f, (x,), (t,)),
        "`linearize`": lambda f: jax.linearize(f, x)[1](t),
        "`jacrev`": lambda f: jax.jacrev(f)(x),
        "`jacfwd`": lambda f: jax.jacfwd(f)(x),
        "`hessian`": lambda f: jax.hessian(loss(f))(x),
        "reverse over reverse": lambda f: jax.jacrev(jax.grad(loss(f)))(x),
        "third derivative": lambda f: jax.jacfwd(jax.hessian(loss(f)))(x),
        "`vmap` of `grad`": lambda f: jax.vmap(jax.grad(loss(f)))(batch),
        "`grad` of `checkpoint`": lambda f: jax.grad(jax.checkpoint(loss(f)))(x),
        "`jacfwd` of `scan`": lambda f: jax.jacfwd(
            lambda x: jax.lax.scan(lambda s, _: (f(s + x), None), x, length=3)[0]
        )(x),
    }


def verdict(transform: Callable[..., Any], f: Any, want: Any) -> str:
    try:
        got = jax.jit(lambda: transform(f))()
    except Exception as error:  # whatever it is, it does not work
        return f"no: {type(error).__name__}"
    near = functools.partial(np.allclose, rtol=1e-4, atol=1e-5)
    return "yes" if jax.tree.all(jax.tree.map(near, got, want)) else "wrong"


def transformation_section() -> str:
    rows = []
    for name, transform in transformations().items():
        row = [name]
        for function in ("softmax", "log_softmax"):
            want = jax.jit(functools.partial(transform, getattr(naive, function)))()
            for c in CONTENDERS:
                if function == "log_softmax" and c is CUSTOM_JVP:
                    continue
                with c.active():
                    row.append(verdict(transform, getattr(c, function), want))
        rows.append(row)
    header = ["", *(f"softmax: {c.name}" for c in CONTENDERS)]
    header += [f"log_softmax: {c.name}" for c in (DEFAULT, OURS)]
    return f"""## Transformations

"yes": it runs and agrees with the same transformation of the textbook formula. All
are compiled as a whole with `jax.jit`.

{table(header, rows)}
"""


# --- semantics ------------------------------------------------------------------------


def row_text(x: jax.Array) -> str:
    """A row to two digits."""
    return "(" + ", ".join(f"{round(float(v), 2) + 0.0:g}" for v in x) + ")"


def edge_cases() -> dict[str, tuple[jax.Array, jax.Array, jax.Array | None]]:
    """x, the cotangent and `where` of rows that the formula alone says nothing of."""
    inf, nan = jnp.inf, jnp.nan
    g = jnp.array([1.0, 2.0, 4.0])
    plain, some = jnp.array([0.0, 0.0, 0.0]), jnp.array([True, True, False])
    return {
        "all entries -inf": (jnp.full(3, -inf), g, None),
        "all entries masked": (plain, g, jnp.zeros(3, bool)),
        "NaN behind the mask": (plain.at[2].set(nan), g, some),
        "NaN in the cotangent behind the mask": (plain, g.at[2].set(nan), some),
        "NaN in the cotangent where x is -inf": (
            plain.at[2].set(-inf),
            g.at[2].set(nan),
            None,
        ),
        "an entry is +inf": (plain.at[2].set(inf), g, None),
        "+inf, and an entry masked": (plain.at[0].set(inf), g, some),
    }


def semantics_section() -> str:
    rows = []
    for function in ("softmax", "log_softmax"):
        for name, (x, g, where) in edge_cases().items():
            row = [function, name]
            for c in (DEFAULT, OURS):
                f = functools.partial(getattr(c, function), where=where)
                with c.active():
                    y, pull = jax.vjp(f, x)
                    row += [row_text(y), row_text(pull(g)[0])]
            rows.append(row)
    dtypes = []
    for dtype in ("bfloat16", "float16", "float32", "int8", "int32"):
        x = jnp.array([1, 2, 3], dtype)
        results = [jax.nn.softmax(x).dtype.name, jaxsoftmax.softmax(x).dtype.name]
        dtypes.append((dtype, *results))
    header = ["", "row"]
    for c in (DEFAULT, OURS):
        header += [f"{c.name}: value", "gradient"]
    return f"""## Semantics

Rows of three: the value, and the gradient for the cotangent (1, 2, 4) unless the case
says otherwise. The logits are 0 except where the case says so; where some entries are
masked, it is the last one.

{table(header, rows)}

The dtype of the result, by the dtype of x:

{table(["x", DEFAULT.name, OURS.name], dtypes)}
"""


# --- the page -------------------------------------------------------------------------


def page() -> str:
    versions = (
        f"jaxsoftmax {jaxsoftmax.__version__}, jax {jax.__version__}, "
        f"Python {platform.python_version()}"
    )
    head = f"""# Comparison with jax.nn

Made by `python benchmarks/compare_with_jax_nn.py --output docs/compare_with_jax_nn.md`
with {versions},
on the CPU: {processor()}. All inputs have fixed seeds.

- **jax.nn** is `jax.nn.softmax` and `jax.nn.log_softmax` as they come.
- **jax.nn, custom_jvp** is `jax.nn.softmax` with the flag `jax_softmax_custom_jvp` on,
  which is off by default. It does not change log_softmax.
- **jaxsoftmax** is this library, with default arguments unless a row says otherwise.

None of the three forms the Jacobian of a row.
"""
    sections = (
        head,
        kept_section(),
        temporary_section(),
        error_section(),
        transformation_section(),
        semantics_section(),
    )
    return "\n".join(sections)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare jaxsoftmax with jax.nn.")
    parser.add_argument("--output", type=pathlib.Path, help="also write the page here")
    args = parser.parse_args()
    text = page()
    print(text)
    if args.output:
        args.output.write_text(text)


if __name__ == "__main__":
    main()
