"""Writes the tables of docs/memory.md: what functions keep, and what programs need.

    python benchmarks/memory_model.py            # writes the tables into the page
    python benchmarks/memory_model.py --check    # compares what is kept, writes nothing
    python benchmarks/memory_model.py --growth   # prints tables for other pages

Kept are the arrays in the leaves of the function that `jax.vjp` returns. They are found
by tracing, so the figures are exact and nothing is allocated. What programs need is
XLA's `memory_analysis().temp_size_in_bytes`; nothing is executed for that either. Runs
on the CPU, in about two minutes; `--check`, which compiles nothing, in a few seconds.
With another version of jax than the page's it compares only what this library keeps.

Growth is what programs need by the length of a sequence (docs/attention.md) and by the
size of a vocabulary (docs/linear_cross_entropy.md), less than a minute. Arguments and
results are not counted. Bounds on it are in tests/.
"""

import contextlib
import dataclasses
import functools
import math
import os
import pathlib
import sys
from collections.abc import Callable, Iterable
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import compare_with_jax_nn as nn
import jax
import jax.numpy as jnp
import optax
import report

import jaxsoftmax

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "memory.md"
MIB = 2**20
DTYPES = ("float32", "bfloat16")
OURS = "jaxsoftmax"
Struct = jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True)
class Case:
    """A call by one contender.

    Attributes:
      call: What is called, in words.
      by: Whose function it is.
      function: Of the arrays, in the order of `arrays`.
      arrays: Shapes and dtypes by the arguments' names.
      moving: How many of them, the first, it is differentiated in.
      active: What holds while it is traced.
    """

    call: str
    by: str
    function: Callable[..., Any]
    arrays: dict[str, Struct]
    moving: int = 1
    active: Callable[[], Any] = contextlib.nullcontext

    @property
    def dtype(self) -> str:
        return next(iter(self.arrays.values())).dtype.name

    def vjp(self, *arrays: Any) -> tuple[Any, Any]:
        moving, others = arrays[: self.moving], arrays[self.moving :]
        return jax.vjp(lambda *moving: self.function(*moving, *others), *moving)


# --- what is kept ---------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Kept:
    """The arrays that a pullback holds on to: arguments by name, results, the rest."""

    arguments: dict[str, Any]
    results: list[Any]
    rest: list[Any]


def kept(case: Case) -> Kept:
    def leaves(*arrays: Any) -> tuple[list[Any], list[Any]]:
        y, pull = case.vjp(*arrays)
        return jax.tree.leaves(y), jax.tree.leaves(pull)

    structs = list(case.arrays.values())
    with case.active():
        closed, (results, _) = jax.make_jaxpr(leaves, return_shape=True)(*structs)
    jaxpr = closed.jaxpr
    names = {id(v): n for v, n in zip(jaxpr.invars, case.arrays, strict=True)}
    outs = {id(v) for v in jaxpr.outvars[: len(results)]}
    found = Kept({}, [], [])
    for v in {id(v): v for v in jaxpr.outvars[len(results) :]}.values():
        if id(v) in names:
            found.arguments[names[id(v)]] = v.aval
        else:
            (found.results if id(v) in outs else found.rest).append(v.aval)
    return found


def nbytes(arrays: Iterable[Any]) -> int:
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in arrays)


def formula(arrays: Iterable[Any], units: dict[str, int]) -> str:
    """Bytes as a sum over products of sizes: "4 T n + 8 T". Every array must be one."""
    names = {size: name for name, size in units.items()}
    factors = dict.fromkeys(units, 0)
    for a in arrays:
        factors[names[math.prod(a.shape)]] += a.dtype.itemsize
    terms = [
        name if factor == 1 and name else f"{factor} {name}".strip()
        for name, factor in factors.items()
        if factor
    ]
    return " + ".join(terms)


def kept_row(case: Case, units: dict[str, int]) -> list[str]:
    found = kept(case)
    arguments = formula(found.arguments.values(), units)
    names = ", ".join(f"`{name}`" for name in found.arguments)
    new = nbytes(found.results) + nbytes(found.rest)
    return [
        *(case.call, case.dtype, case.by),
        f"{names}: {arguments}" if arguments else "",
        *(formula(found.results, units), formula(found.rest, units)),
        f"{new / MIB:,.1f}",
    ]


def kept_table(cases: Iterable[Case], units: dict[str, int]) -> str:
    header = ["call", "dtype", "by", "arguments", "results", "neither", "new, MiB"]
    rows = [kept_row(case, units) for case in cases]
    return report.text_table(header, rows, [*["---"] * 6, "--:"])


# --- what a program needs -------------------------------------------------------------


def needs(function: Callable[..., Any], *structs: Any) -> str:
    compiled = jax.jit(function).lower(*structs).compile()
    return mib(compiled.memory_analysis().temp_size_in_bytes)


def mib(size: int) -> str:
    return f"{size / MIB:,.0f}"


def case_needs(case: Case) -> str:
    """Of the gradients for a cotangent: forward and backward in one program."""

    def gradients(cotangent: Any, *arrays: Any) -> Any:
        return case.vjp(*arrays)[1](cotangent)

    structs = list(case.arrays.values())
    with case.active():
        cotangent = jax.eval_shape(case.function, *structs)
        return needs(gradients, cotangent, *structs)


def temporary_table(cases: Iterable[Case]) -> str:
    """A row per call and dtype, a column per contender."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for case in cases:
        row = found.setdefault((case.call, case.dtype), {})
        row[case.by] = case_needs(case)
    return by_contender(["call", "dtype"], found)


def by_contender(
    header: list[str], found: dict[tuple[str, ...], dict[str, str]]
) -> str:
    """Rows of figures by contender, ours last."""
    names = list(dict.fromkeys(name for row in found.values() for name in row))
    names.sort(key=lambda name: name == OURS)
    rows = [[*key, *(row.get(n, "") for n in names)] for key, row in found.items()]
    marks = [*["---"] * len(header), *["--:"] * len(names)]
    return report.text_table([*header, *names], rows, marks)


# --- rows: softmax, log_softmax and logsumexp -----------------------------------------

ROWS, ENTRIES = 8192, 4096
ROW_UNITS = {"T n": ROWS * ENTRIES, "T": ROWS, "n": ENTRIES, "": 1}


def row_cases() -> list[Case]:
    return [
        case
        for dtype in DTYPES
        for case in (
            *cases_of_function("softmax", dtype),
            *cases_of_function("log_softmax", dtype),
            *cases_of_logsumexp(dtype),
        )
    ]


def cases_of_logsumexp(dtype: str) -> list[Case]:
    x, mask = Struct((ROWS, ENTRIES), dtype), Struct((ROWS, ENTRIES), "bool")
    others = {
        "logsumexp": {},
        "logsumexp, `where`": {"where": mask},
        "logsumexp, weights": {"b": x},
    }
    found = []
    for call, other in others.items():
        for by, library in (("jax.nn", jax.nn), (OURS, jaxsoftmax)):
            f = functools.partial(library.logsumexp, axis=-1)
            for name in other:
                f = with_named(f, name)
            found.append(Case(call, by, f, {"x": x} | other, 1 + ("b" in other)))
    return found


def cases_of_function(function: str, dtype: str) -> list[Case]:
    x = {"x": Struct((ROWS, ENTRIES), dtype)}
    mask, number = Struct((ROWS, ENTRIES), "bool"), Struct((), "float32")
    found = []
    for c in nn.CONTENDERS:
        if function == "log_softmax" and c is nn.CUSTOM_JVP:
            continue  # the flag has no part in it
        f = getattr(c, function)
        calls = [
            (function, f, x),
            (f"{function}, `where`", with_named(f, "where"), x | {"where": mask}),
        ]
        if dtype == "float32":
            narrow = functools.partial(f, dtype=jnp.bfloat16)
            calls.append((f"{function}, result in bfloat16", narrow, x))
        found += [Case(call, c.name, g, a, active=c.active) for call, g, a in calls]
    ours = getattr(jaxsoftmax, function)
    halved = functools.partial(ours, scale=0.5)
    found.append(Case(f"{function}, a number as `scale`", OURS, halved, x))
    scaled = with_named(ours, "scale")
    call, arrays = f"{function}, an array as `scale`", x | {"scale": number}
    found.append(Case(call, OURS, scaled, arrays, 2))
    return sorted(found, key=lambda case: [c.call for c in found].index(case.call))


def with_named(f: Callable[..., Any], name: str) -> Callable[..., Any]:
    """`f` with its argument of that name as the second."""
    return lambda x, value: f(x, **{name: value})


# --- losses on logits -----------------------------------------------------------------

TOKENS, CLASSES = 8192, 32768
LABELS = 4  # of a row, where there are several
LOSS_UNITS = {
    "T V": TOKENS * CLASSES,
    "T K": TOKENS * LABELS,
    "T": TOKENS,
    "": 1,
}
OPTAX, UPCAST = "optax", "optax on a float32 copy"


def loss_cases() -> list[Case]:
    return [case for dtype in DTYPES for case in cases_of_logits(dtype)]


def cases_of_logits(dtype: str) -> list[Case]:
    logits, labels = Struct((TOKENS, CLASSES), dtype), Struct((TOKENS,), "int32")
    one = {"logits": logits, "labels": labels}
    every = {"logits": logits, "labels": logits}
    ours = jaxsoftmax.softmax_cross_entropy_with_integer_labels
    mean = functools.partial(ours, reduction="mean")
    found = []
    for reduction, wrap in (("none", lambda loss: loss), ("mean", averaged)):
        call = f'integer labels, `reduction="{reduction}"`'
        theirs = optax.softmax_cross_entropy_with_integer_labels
        mine = ours if reduction == "none" else mean
        found.append(Case(call, OURS, mine, one))
        found.append(Case(call, OPTAX, wrap(theirs), one))
        if dtype != "float32":
            found.append(Case(call, UPCAST, wrap(upcast(theirs)), one))
    weighted = one | {"sample_weights": Struct((TOKENS,), "float32")}
    for by, loss in ((OURS, our_weighted_mean), (OPTAX, their_weighted_mean)):
        found.append(Case("... with `sample_weights`", by, loss, weighted))
    overwriting = functools.partial(mean, overwrite_logits=True)
    found.append(Case("... with `overwrite_logits`", OURS, overwriting, one))
    for by, library in ((OURS, jaxsoftmax), (OPTAX, optax)):
        dense = library.softmax_cross_entropy
        found.append(Case("a weight for each class", by, dense, every))
    for by, f in ((OURS, tokens), ("jax.numpy", dense_tokens)):
        found.append(Case("logprobs and entropy", by, f, one))
    four = one | {"labels": Struct((TOKENS, LABELS), "int32")}
    for by, f in ((OURS, alternatives), ("jax.numpy", dense_alternatives)):
        found.append(Case("logprobs of K = 4 labels", by, f, four))
    return found


def our_weighted_mean(logits: Any, labels: Any, weights: Any) -> Any:
    return jaxsoftmax.softmax_cross_entropy_with_integer_labels(
        logits, labels, sample_weights=weights, reduction="mean"
    )


def their_weighted_mean(logits: Any, labels: Any, weights: Any) -> Any:
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    weights = weights.astype(losses.dtype)
    return jnp.sum(losses * weights) / jnp.sum(weights)


def averaged(loss: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arrays: loss(*arrays).mean()


def upcast(loss: Callable[..., Any]) -> Callable[..., Any]:
    return lambda logits, labels: loss(logits.astype(jnp.float32), labels)


def tokens(logits: Any, labels: Any) -> Any:
    found = jaxsoftmax.token_logprobs_and_entropy(logits, labels)
    return found.logprobs, found.entropy


def dense_tokens(logits: Any, labels: Any) -> Any:
    """As it is usually written, on a float32 copy of logits in 16 bits."""
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    chosen = jnp.take_along_axis(log_p, labels[:, None], axis=-1)[:, 0]
    return chosen, -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)


def alternatives(logits: Any, labels: Any) -> Any:
    return jaxsoftmax.token_logprobs_and_entropy(logits, labels).logprobs


def dense_alternatives(logits: Any, labels: Any) -> Any:
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    return jnp.take_along_axis(log_p, labels, axis=-1)


# --- a linear layer and its loss ------------------------------------------------------

HIDDEN = 1024
LINEAR_UNITS = {
    "T V": TOKENS * CLASSES,
    "H V": HIDDEN * CLASSES,
    "T H": TOKENS * HIDDEN,
    "T": TOKENS,
    "": 1,
}


DENSE = "dense, optax"


def dense(x: Any, labels: Any, weights: Any) -> Any:
    logits = (x @ weights).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


our_linear = functools.partial(
    jaxsoftmax.linear_softmax_cross_entropy, reduction="mean"
)
LINEAR: dict[str, Callable[..., Any]] = {
    DENSE: dense,
    '`"mean"`': our_linear,
    '`"mean"`, budget 64 MiB': functools.partial(our_linear, memory_budget=64 * MIB),
    '`"none"`': lambda *arrays: our_linear(*arrays, reduction="none").mean(),
}


def linear_arrays(dtype: str, classes: int = CLASSES) -> dict[str, Struct]:
    return {
        "x": Struct((TOKENS, HIDDEN), dtype),
        "weights": Struct((HIDDEN, classes), dtype),
        "labels": Struct((TOKENS,), "int32"),
    }


def linear_cases() -> list[Case]:
    """Those of `LINEAR`, with a loss for each token, and what is not a mean."""
    ours = jaxsoftmax.linear_softmax_cross_entropy
    losses = dict(LINEAR)
    losses['`"none"`'] = ours
    losses['`"mean"` with `sample_weights`'] = linear_weighted_mean
    losses["logprobs and entropy"] = linear_tokens
    return [case for dtype in DTYPES for case in linear_cases_of(losses, dtype)]


def linear_cases_of(losses: dict[str, Callable[..., Any]], dtype: str) -> list[Case]:
    arrays = linear_arrays(dtype)
    found = [
        Case(
            "the mean" if name == DENSE else name,
            DENSE if name == DENSE else OURS,
            functools.partial(labels_last, loss),
            arrays,
            2,
        )
        for name, loss in losses.items()
    ]
    soft = arrays | {"labels": Struct((TOKENS, CLASSES), dtype)}
    for by, loss in ((DENSE, dense_soft), (OURS, our_linear)):
        f = functools.partial(labels_last, loss)
        found.append(Case("the mean, a weight for each class", by, f, soft, 2))
    return found


def dense_soft(x: Any, labels: Any, weights: Any) -> Any:
    logits = (x @ weights).astype(jnp.float32)
    return optax.softmax_cross_entropy(logits, labels.astype(jnp.float32)).mean()


def labels_last(loss: Callable[..., Any], x: Any, weights: Any, labels: Any) -> Any:
    return loss(x, labels, weights)


def linear_weighted_mean(x: Any, labels: Any, weights: Any) -> Any:
    """The labels are the weights of tokens too."""
    return our_linear(x, labels, weights, sample_weights=labels)


def linear_tokens(x: Any, labels: Any, weights: Any) -> Any:
    found = jaxsoftmax.linear_token_logprobs_and_entropy(x, labels, weights)
    return found.logprobs, found.entropy


def linear_needs(classes: int, dtype: str) -> dict[str, str]:
    x, weights, labels = linear_arrays(dtype, classes).values()
    return {
        name: needs(jax.value_and_grad(loss, (0, 2)), x, labels, weights)
        for name, loss in LINEAR.items()
    }


def linear_temporary() -> str:
    found = {(dtype,): linear_needs(CLASSES, dtype) for dtype in DTYPES}
    return by_contender(["dtype"], found)


# --- attention ------------------------------------------------------------------------

BATCH, LENGTH = 1, 4096
HEADS, DEPTH = 8, 64
ATTENTION = {
    "jax.nn": functools.partial(jax.nn.dot_product_attention, implementation="xla"),
    OURS: functools.partial(jaxsoftmax.dot_product_attention, implementation="xla"),
}
ATTENTION_UNITS = {
    "B N T S": BATCH * HEADS * LENGTH**2,
    "B T N H": BATCH * LENGTH * HEADS * DEPTH,
    "B T N": BATCH * LENGTH * HEADS,
    "": 1,
}


def attention_cases() -> list[Case]:
    found = []
    for dtype in DTYPES:
        x = Struct((BATCH, LENGTH, HEADS, DEPTH), dtype)
        arrays = {"query": x, "key": x, "value": x}
        for name, attention in ATTENTION.items():
            f = functools.partial(attention, is_causal=True)
            found.append(Case("causal", name, f, arrays, 3))
    return found


def forward(attention: Any, query: Any, key: Any, value: Any, cotangent: Any) -> Any:
    return attention(query, key, value, is_causal=True)


def gradient(attention: Any, query: Any, key: Any, value: Any, cotangent: Any) -> Any:
    f = functools.partial(attention, is_causal=True)
    return jax.vjp(f, query, key, value)[1](cotangent)


def attention_needs(program: Any, length: int, dtype: str) -> dict[str, str]:
    x = Struct((BATCH, length, HEADS, DEPTH), dtype)
    return {
        name: needs(functools.partial(program, attention), x, x, x, x)
        for name, attention in ATTENTION.items()
    }


def attention_temporary() -> str:
    found = {
        (program.__name__, dtype): attention_needs(program, LENGTH, dtype)
        for program in (forward, gradient)
        for dtype in DTYPES
    }
    return by_contender(["program", "dtype"], found)


# --- jax.checkpoint -------------------------------------------------------------------

LAYERS = 8
WIDTH = HEADS * DEPTH
LAYER_UNITS = {
    "N T S": HEADS * LENGTH**2,
    "T D": LENGTH * WIDTH,
    "D D": WIDTH**2,
    "T N": LENGTH * HEADS,
    "": 1,
}
NAME = "jaxsoftmax_attention"
only = jax.checkpoint_policies.save_only_these_names
CHECKPOINTS: dict[str, Callable[..., Any]] = {
    "no checkpoint": lambda layer: layer,
    "`jax.checkpoint`": jax.checkpoint,
    f'... that saves `"{NAME}"`': functools.partial(jax.checkpoint, policy=only(NAME)),
}


def layer(attention: Callable[..., Any], h: Any, *weights: Any) -> Any:
    """Self-attention of one sequence: four products and a residual connection."""
    *inner, outer = weights
    qkv = (jnp.reshape(h @ w, (LENGTH, HEADS, DEPTH)) for w in inner)
    out = attention(*qkv, is_causal=True)
    return h + jnp.reshape(out, h.shape) @ outer


def layer_arrays(dtype: str, layers: int | None) -> dict[str, Struct]:
    w = Struct((*([layers] if layers else []), WIDTH, WIDTH), dtype)
    weights = dict.fromkeys(("w_q", "w_k", "w_v", "w_o"), w)
    return {"h": Struct((LENGTH, WIDTH), dtype)} | weights


def checkpoint_cases(model: Callable[..., Any], layers: int | None) -> list[Case]:
    """Of a model of one layer, or of several whose weights are stacked."""
    found = []
    for dtype in DTYPES:
        arrays = layer_arrays(dtype, layers)
        for name, wrap in CHECKPOINTS.items():
            for by, attention in ATTENTION.items():
                if NAME in name and by != OURS:
                    continue  # a name that only ours gives
                f = model(wrap(functools.partial(layer, attention)))
                found.append(Case(name, by, f, arrays, len(arrays)))
    return found


def scanned(one: Callable[..., Any]) -> Callable[..., Any]:
    """Layers in a loop: XLA for CPUs undoes jax.checkpoint where there is no loop."""

    def model(h: Any, *weights: Any) -> Any:
        return jax.lax.scan(lambda h, ws: (one(h, *ws), None), h, weights)[0]

    return model


# --- vmap -----------------------------------------------------------------------------

MAPPED = 4
VMAP_UNITS = {
    "B T n": MAPPED * ROWS * ENTRIES,
    "T n": ROWS * ENTRIES,
    "B T": MAPPED * ROWS,
    "T": ROWS,
    "n": ENTRIES,
}


def vmap_cases() -> list[Case]:
    x = Struct((MAPPED, ROWS, ENTRIES), "float32")
    mask = Struct((ROWS, ENTRIES), "bool")
    log_softmax = with_named(jaxsoftmax.log_softmax, "where")
    shared = jax.vmap(log_softmax, in_axes=(0, None))
    return [
        Case("`vmap` of softmax", OURS, jax.vmap(jaxsoftmax.softmax), {"x": x}),
        Case(
            "`vmap` of log_softmax, one `where` for all",
            *(OURS, shared, {"x": x, "where": mask}),
        ),
    ]


# --- gradients added up over parts of a batch -----------------------------------------

PARTS = (1, 4, 16)


def accumulated(loss: Callable[..., Any], parts: int) -> Callable[..., Any]:
    """Gradients of a mean over tokens, of one part of them after the other."""
    gradients = jax.value_and_grad(loss, (0, 2))

    def step(x: Any, labels: Any, weights: Any) -> Any:
        def add_part(total: Any, part: Any) -> Any:
            value, (dx, dweights) = gradients(*part, weights)
            return jax.tree.map(jnp.add, total, (value, dweights)), dx

        split = (x.reshape(parts, -1, HIDDEN), labels.reshape(parts, -1))
        start = (jnp.zeros((), "float32"), jnp.zeros_like(weights))
        total, dx = jax.lax.scan(add_part, start, split)
        return total, dx

    return step


def accumulation_temporary() -> str:
    names = {DENSE: dense, OURS: LINEAR['`"mean"`']}
    found: dict[tuple[str, ...], dict[str, str]] = {}
    for dtype in DTYPES:
        arrays = linear_arrays(dtype)
        structs = [arrays[name] for name in ("x", "labels", "weights")]
        for parts in PARTS:
            row = found.setdefault((str(parts), dtype), {})
            for name, loss in names.items():
                row[name] = needs(accumulated(loss, parts), *structs)
    return by_contender(["parts", "dtype"], found)


# --- growth ---------------------------------------------------------------------------

LENGTHS = [1024, 2048, 4096, 8192, 16384, 32768]
VOCABULARIES = [1024, 4096, 16384, 32768, 50257, 65536, 131072]


def growth() -> None:
    """Prints a table per dtype of attention, and of a linear layer and its loss."""
    for dtype in DTYPES:
        found = {}
        for n in LENGTHS:
            pairs = (
                (f.__name__, attention_needs(f, n, dtype)) for f in (forward, gradient)
            )
            row = {f"{p}, {k}": v for p, each in pairs for k, v in each.items()}
            found[(f"{n:,}",)] = {"weights": mib(4 * HEADS * n**2)} | row
        print(by_contender([f"T, {dtype}"], found), "\n")
    for dtype in DTYPES:
        found = {
            (f"{n:,}",): {"logits": mib(4 * TOKENS * n)} | linear_needs(n, dtype)
            for n in VOCABULARIES
        }
        print(by_contender([f"V, {dtype}"], found), "\n")


# --- the page -------------------------------------------------------------------------


def versions() -> str:
    return (
        f"jaxsoftmax {jaxsoftmax.__version__}, jax {jax.__version__}, optax "
        f"{optax.__version__}, on the CPU: {nn.processor()}."
    )


def kept_blocks() -> dict[str, str]:
    return {
        "kept by softmax and log_softmax": kept_table(row_cases(), ROW_UNITS),
        "kept by losses": kept_table(loss_cases(), LOSS_UNITS),
        "kept by a linear layer and its loss": kept_table(linear_cases(), LINEAR_UNITS),
        "kept by attention": kept_table(attention_cases(), ATTENTION_UNITS),
        "kept under checkpoint": kept_table(
            checkpoint_cases(lambda one: one, None), LAYER_UNITS
        ),
        "kept under vmap": kept_table(vmap_cases(), VMAP_UNITS),
    }


def temporary_blocks() -> dict[str, str]:
    return {
        "versions": versions(),
        "needed by softmax and log_softmax": temporary_table(row_cases()),
        "needed by losses": temporary_table(loss_cases()),
        "needed by a linear layer and its loss": linear_temporary(),
        "needed by attention": attention_temporary(),
        "needed under checkpoint": temporary_table(checkpoint_cases(scanned, LAYERS)),
        "needed in parts": accumulation_temporary(),
    }


def main() -> int:
    print_growth = "print tables for other pages, and nothing else"
    args = report.options(
        "Write the tables of docs/memory.md.", PAGE, growth=print_growth
    )
    if args.growth:
        growth()
        return 0
    if not args.check:
        blocks = kept_blocks() | temporary_blocks()
        return report.finish(args.page, blocks, check=False)
    measured = report.block(args.page.read_text(), "versions")
    same_jax = f" jax {jax.__version__}," in measured
    counts = None if same_jax else lambda line: f"| {OURS} |" in line
    return report.finish(args.page, kept_blocks(), check=True, counts=counts)


if __name__ == "__main__":
    sys.exit(main())
