"""Checks attention against the float64 oracle, on the GPU at hand.

    python tests/gpu/check_attention.py [--implementation NAME...] [--smoke]
    for k in 0 1 2 3; do python tests/gpu/check_attention.py --part $k 4 & done; wait

Exits with 1 if anything is wrong, or if cuDNN refuses what it should take. Every case
is a call with its gradients (of bias and sinks too), without and with the log-sum-exp
and a cotangent of it. Where cuDNN is asked for, the log-sum-exp is a value alone: it
may refuse a cotangent. `default` is implementation=None. Then forward mode (of `triton`
that alone), Hessian-vector products, vmap, merge_attention, what cuDNN has to refuse,
and what explain says. Each program of cuDNN is searched for its calls: one forward, one
backward. ``--smoke`` runs small cases on any device; what cuDNN refuses there is no
failure.

Bars: errors of out and of gradients are relative to the largest entry of the row, or to
1/20 of the array's where that is larger: 1.5e-2 and 1e-1 in bfloat16, 2e-3 and 1.2e-2
in float16, 1e-5 and 4e-5 in float32 (of gradients in 16 bits that is 25 times eps / 2:
cuDNN has D from an output that is rounded, and rows have small gradients). The
log-sum-exp is within 1e-3 (1e-5 in float32), relative to 1 or to itself. A query with
nothing to attend to has an output and a gradient of exactly 0, and -inf. Products of
Hessians with vectors are given twice the bar of gradients. The blockwise form is also
held to the oracle's bounds, entry by entry.
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import functools
import os
import pathlib
import re
import sys
import time
import warnings

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# Threads compile while others run: a program must not be captured as a graph meanwhile.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_gpu_enable_command_buffer="
)

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from support import attention_oracle as oracle

import jaxsoftmax
from jaxsoftmax.flax import attention_fn

BARS = {  # of out, of gradients, of lse
    "bfloat16": (1.5e-2, 1e-1, 1e-3),
    "float16": (2e-3, 1.2e-2, 1e-3),
    "float32": (1e-5, 4e-5, 1e-5),
}
ASKED = {
    "cudnn": "cudnn",
    "mosaic_gpu": "mosaic_gpu",
    "default": None,
    "triton": "triton",
    "xla": "xla",
}
START = time.perf_counter()
attention = jaxsoftmax.dot_product_attention


def say(*words):
    print(f"[{time.perf_counter() - START:5.1f} s]", *words, flush=True)


# --- cases ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of query, key and value, by the letters of the documentation."""

    b: int = 2
    t: int = 256
    s: int = 256
    n: int = 4
    k: int = 4
    h: int = 64
    v: int = 64

    @property
    def logits(self):
        return self.b, self.n, self.t, self.s

    def smaller(self):
        quarter = {f: -(-getattr(self, f) // 4) for f in ("t", "s", "h", "v")}
        return dataclasses.replace(self, **quarter)


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of call.

    Attributes:
      make: From the generator, the sizes and the dtype to arrays with a gradient,
        other arrays, and static options.
      cudnn: Whether cuDNN has to take it: "takes", "may" or "refuses".
    """

    make: object
    sizes: Sizes = Sizes()
    cudnn: str = "takes"


def static(**options):
    return lambda rng, z, dtype: ({}, {}, options)


def with_bias(*axes, dtype=None, **options):
    """A bias of [B, N, T, S] with 1 in the place of all but the named axes."""

    def make(rng, z, of):
        sizes = zip("bnts", z.logits, strict=True)
        shape = tuple(size if name in axes else 1 for name, size in sizes)
        return {"bias": jnp.array(rng.normal(size=shape), dtype or of)}, {}, options

    return make


def with_mask(*axes, empty=False, **options):
    """Half of the entries; with `empty` some queries have none."""

    def make(rng, z, dtype):
        sizes = zip("bnts", z.logits, strict=True)
        shape = tuple(size if name in axes else 1 for name, size in sizes)
        mask = rng.random(shape) < 0.5
        mask[..., 0] = True
        if empty:
            mask[:, :, ::7] = False
            mask[-1] = False
        return {}, {"mask": jnp.array(mask)}, options

    return make


def with_lengths(queries=True, keys=True, empty=False, **options):
    def make(rng, z, dtype):
        others = {}
        if queries:
            lengths = [z.t - z.t // 3, z.t][: z.b]
            others["query_seq_lengths"] = jnp.array(lengths, jnp.int32)
        if keys:
            lengths = [z.s // 2 + 3, 0 if empty else z.s - 5][: z.b]
            others["key_value_seq_lengths"] = jnp.array(lengths, jnp.int32)
        return {}, others, options

    return make


def with_offsets(**options):
    def make(rng, z, dtype):
        return {}, {"query_offset": jnp.array([30, -20][: z.b], jnp.int32)}, options

    return make


def with_padding(number):
    """A bias that is a large number for the first keys: some queries see no others."""

    def make(rng, z, dtype):
        bias = np.where(np.arange(z.s) < z.s // 4, number or jnp.finfo(dtype).min, 0)
        bias = jnp.broadcast_to(jnp.array(bias, dtype), (z.b, 1, z.t, z.s))
        # Beside it the products are lost where it is not taken out: here they are
        # small.
        query = 2.0**-20 * rng.normal(size=(z.b, z.t, z.n, z.h))
        floats = {"query": jnp.array(query, dtype), "bias": bias}
        return floats, {}, {"is_causal": True}

    return make


def with_sinks(rng, z, dtype):
    sinks = jnp.array(rng.normal(size=z.n), jnp.float32)
    return {"sinks": sinks}, {}, {"is_causal": True}


def with_segments(rng, z, dtype):
    ids = np.sort(rng.integers(0, 3, (z.b, z.t)), axis=-1)
    others = dict.fromkeys(("q_segment_ids", "kv_segment_ids"), jnp.array(ids))
    return {}, others, {"is_causal": True}


def with_dropout(rng, z, dtype):
    others = {"dropout_key": jax.random.key_data(jax.random.key(7))}
    return {}, others, {"dropout_rate": 0.3}


def kept_of(floats, key, rate):
    """[B, N, T, S]: what dropout keeps."""
    batch, queries, heads, _ = floats["query"].shape
    shape = batch, heads, queries, floats["key"].shape[1]
    key = jax.random.wrap_key_data(key)
    return jax.random.bernoulli(key, np.float32(1 - rate), shape)


def kinds():
    causal = static(is_causal=True)
    of = functools.partial
    window = of(static, is_causal=True)
    long = Sizes(b=1, t=2048, s=2048, n=2, k=2)
    return {
        "plain": Kind(static()),
        "causal": Kind(causal),
        "scale": Kind(static(scale=0.3, is_causal=True)),
        "size 128": Kind(causal, Sizes(h=128, v=128)),
        "size 256": Kind(causal, Sizes(h=256, v=256)),
        "grouped heads": Kind(causal, Sizes(n=8, k=2)),
        "mask": Kind(with_mask("b", "t", "s")),
        "mask, all axes, causal": Kind(with_mask("b", "n", "t", "s", is_causal=True)),
        "empty rows": Kind(with_mask("b", "n", "t", "s", empty=True)),
        "lengths": Kind(with_lengths()),
        "lengths, causal": Kind(with_lengths(is_causal=True)),
        "lengths of keys": Kind(with_lengths(queries=False)),
        "no keys": Kind(with_lengths(queries=False, empty=True)),
        "window, causal": Kind(window(local_window_size=(40, 0))),
        "bias": Kind(with_bias("b", "n", "t", "s")),
        "bias a head": Kind(with_bias("n", "t", "s", is_causal=True)),
        "bias and mask": Kind(both(with_bias("n", "t", "s"), with_mask("b", "t", "s"))),
        "left padding of -1e9": Kind(with_padding(-1e9)),
        "left padding of the lowest number": Kind(with_padding(None)),
        "long, causal": Kind(causal, long),
        "bias of keys": Kind(with_bias("b", "s"), cudnn="may"),
        "bias in float32": Kind(
            with_bias("n", "t", "s", dtype=jnp.float32), cudnn="may"
        ),
        "window": Kind(static(local_window_size=(40, 25)), cudnn="may"),
        "offset": Kind(static(is_causal=True, query_offset=40), cudnn="refuses"),
        "offsets": Kind(
            with_offsets(is_causal=True, local_window_size=(50, 0)), cudnn="refuses"
        ),
        "more keys": Kind(static(), Sizes(t=128), cudnn="may"),
        "odd lengths": Kind(causal, Sizes(t=251, s=251), cudnn="may"),
        "long window": Kind(window(local_window_size=300), long, "may"),
        "long, odd": Kind(static(), Sizes(b=1, t=1100, s=1350, n=2, k=2), "may"),
        "wide values": Kind(causal, Sizes(v=128), "may"),
        "soft cap": Kind(static(logits_soft_cap=5.0, is_causal=True), cudnn="refuses"),
        "high soft cap": Kind(static(logits_soft_cap=50.0), long, cudnn="refuses"),
        "sinks": Kind(with_sinks, cudnn="refuses"),
        "segments": Kind(with_segments, cudnn="refuses"),
        "dropout": Kind(both(with_dropout, causal), cudnn="refuses"),
        "dropout, grouped heads": Kind(
            both(with_dropout, with_sinks), Sizes(n=8, k=2, t=200), cudnn="refuses"
        ),
        "dropout, size 128": Kind(
            both(with_dropout, window(local_window_size=(40, 0))),
            *(Sizes(h=128, v=128), "refuses"),
        ),
        "dropout, size 256": Kind(with_dropout, Sizes(h=256, v=256), "refuses"),
        "dropout, long": Kind(both(with_dropout, causal), long, "refuses"),
        "dropout, mask, bias, soft cap": Kind(
            both(
                *(with_dropout, with_mask("b", "t", "s", empty=True)),
                *(with_bias("n", "t", "s"), static(logits_soft_cap=5.0)),
            ),
            cudnn="refuses",
        ),
        "dropout, bias of keys": Kind(
            both(with_dropout, with_bias("b", "s")), cudnn="refuses"
        ),
    }


def both(*makers):
    def make(rng, z, dtype):
        found = ({}, {}, {})
        for maker in makers:
            for all_of, more in zip(found, maker(rng, z, dtype), strict=True):
                all_of.update(more)
        return found

    return make


KINDS = kinds()
# The others run in bfloat16 alone.
IN_FLOAT16 = (
    "plain",
    "causal",
    "mask",
    "empty rows",
    "bias",
    "lengths",
    "long, causal",
)
IN_FLOAT32 = ("plain", "causal", "empty rows", "long, odd", "sinks", "soft cap")
OF_DEFAULT = ("causal", "empty rows", "bias a head", "soft cap", "sinks", "segments")
OF_DEFAULT += ("offset", "offsets")
OF_JVP = (*OF_DEFAULT, "plain", "size 128", "size 256", "grouped heads", "mask", "bias")
OF_JVP += ("lengths, causal", "no keys", "window", "more keys", "wide values")
OF_DEFAULT += ("dropout",)


@dataclasses.dataclass(frozen=True)
class Problem:
    """A call's arguments, and the cotangents of its results."""

    floats: dict
    others: dict
    static: dict
    g: tuple

    @staticmethod
    def of(kind, dtype, small):
        z = kind.sizes.smaller() if small else kind.sizes
        rng = np.random.default_rng(0)

        def normal(*shape, dtype=dtype):
            return jnp.array(rng.normal(size=shape), dtype)

        floats = {
            "query": normal(z.b, z.t, z.n, z.h),
            "key": normal(z.b, z.s, z.k, z.h),
            "value": normal(z.b, z.s, z.k, z.v),
        }
        more, others, options = kind.make(rng, z, dtype)
        g = normal(z.b, z.t, z.n, z.v), normal(z.b, z.t, z.n, dtype="float32")
        return Problem(floats | more, others, options, g)

    @functools.cached_property
    def oracle(self):
        return self.oracle_of(self.floats)

    def oracle_of(self, floats):
        others = dict(self.others)
        if "dropout_key" in others:
            rate, key = self.static["dropout_rate"], others.pop("dropout_key")
            others["keep"] = kept_of(floats, key, rate)
        return oracle.forward(**floats, **others, **self.static)

    def call(self, asked, **options):
        """The function of the arrays that have a gradient."""

        def f(floats):
            arguments = {**floats, **self.others, **self.static, **options}
            return attention(**arguments, implementation=asked)

        return f


# --- errors ---------------------------------------------------------------------------


def wide(x):
    return np.asarray(x).astype(np.float64)


def row_error(got, want):
    """The worst of all rows; NaN is inf."""
    got, want = wide(got), wide(want)
    largest = np.abs(want).max(-1, keepdims=True)
    floor = 0.05 * largest.max(initial=0)
    error = np.abs(got - want) / np.maximum(np.maximum(largest, floor), 1e-30)
    worst = error.max(initial=0)
    return np.inf if np.isnan(worst) else float(worst)


def lse_error(got, want):
    got, want = wide(got), wide(want)
    if not np.array_equal(np.isneginf(got), np.isneginf(want)):
        return np.inf
    got, want = (np.where(np.isneginf(want), 0, x) for x in (got, want))
    worst = (np.abs(got - want) / np.maximum(1, np.abs(want))).max()
    return np.inf if np.isnan(worst) else float(worst)


def not_zero(of, *arrays):
    """The largest entry where a query has nothing to attend to."""
    empty = np.isneginf(of.lse)
    largest = [np.abs(wide(x)[empty]).max(initial=0) for x in arrays]
    return np.inf if np.isnan(largest).any() else float(max(largest))


def parts_of_bound(got, want, bound):
    """The worst entry's error, in parts of what the oracle allows."""
    dtype = jnp.asarray(got).dtype.name
    got, want = wide(got), wide(want)
    finite = np.isfinite(want)
    bound = bound + float(jnp.finfo(dtype).eps) / 2 * np.abs(want)
    bound = bound + oracle.least_of(dtype)
    error = np.abs(got[finite] - want[finite])
    worst = (error / bound[finite]).max(initial=0)
    return np.inf if np.isnan(worst) else float(worst)


def custom_calls(compiled):
    """How many calls of cuDNN's attention a program has: forward, backward."""
    names = re.findall(r'custom_call_target="__cudnn\$fmha(\w+)"', compiled.as_text())
    backward = sum("Backward" in name for name in names)
    return len(names) - backward, backward


# --- a call and its gradients ---------------------------------------------------------


def check(name, implementation, dtype, results, small):
    """(what, error, bar) of one case.

    `results` are "out", with gradients; "out, lse", likewise; or "values of out, lse".
    """
    problem = Problem.of(KINDS[name], dtype, small)
    residual, gradients = "lse" in results, "values" not in results
    # Not in TF32.
    precision = "highest" if dtype == "float32" else None
    f = problem.call(
        ASKED[implementation], return_residual=residual, precision=precision
    )

    def run(floats, g):
        if not gradients:
            return f(floats), None
        y, pull = jax.vjp(f, floats)
        return y, pull(g)[0]

    g = problem.g if residual else problem.g[0]
    compiled = jax.jit(run, keep_unused=True).lower(problem.floats, g).compile()
    y, d = compiled(problem.floats, g)
    of = problem.oracle
    out_bar, gradient_bar, lse_bar = BARS[dtype]
    out, lse = y if residual else (y, None)
    found = [("out", row_error(out, of.out), out_bar)]
    bound = of.bounds(dtype)
    parts = [parts_of_bound(out, of.out, bound["out"])]
    if residual:
        found.append(("lse", lse_error(lse, of.lse), lse_bar))
        parts.append(parts_of_bound(lse, of.lse, bound["lse"]))
    if gradients:
        g = problem.g if residual else (problem.g[0], None)
        want, bound = of.vjp(*g), of.bounds(dtype, *g)
        for k in problem.floats:
            error = row_error(d[k], want[k])
            found.append((f"gradient of {k}", error, gradient_bar))
            parts.append(parts_of_bound(d[k], want[k], bound[k]))
    zeros = [out, d["query"]] if gradients else [out]
    found.append(("exact zeros", not_zero(of, *zeros), 0.0))
    if implementation == "xla":
        found.append(("of the oracle's bounds", max(parts), 1.0))
    if implementation == "cudnn":
        calls, right = custom_calls(compiled), (1, 1 if gradients else 0)
        wrong = 0.0 if calls == right else np.inf
        found.append((f"calls of cuDNN {calls}", wrong, 0.0))
    return found


# --- the other transformations --------------------------------------------------------


def tangents_of(problem):
    rng = np.random.default_rng(1)
    floats = problem.floats.items()
    return {k: jnp.array(rng.normal(size=x.shape), x.dtype) for k, x in floats}


def check_jvp(name, implementation, dtype, small, moving=None):
    """In all arguments, or in those that move."""
    problem = Problem.of(KINDS[name], dtype, small)
    precision = "highest" if dtype == "float32" else None
    options = {"return_residual": True, "precision": precision}
    f = problem.call(ASKED[implementation], **options)
    tangents = {k: t for k, t in tangents_of(problem).items() if k in (moving or [k])}

    @jax.jit
    def run(x, t):
        moved = {k: x[k] for k in t}
        return jax.jvp(lambda moved: f(x | moved), (moved,), (t,))

    (out, lse), (d_out, d_lse) = run(problem.floats, tangents)
    of = problem.oracle
    want_out, want_lse = of.jvp(**tangents)
    out_bar, bar, lse_bar = BARS[dtype]
    scale = 1 + float(np.abs(want_lse).max())
    found = [
        ("out", row_error(out, of.out), out_bar),
        ("lse", lse_error(lse, of.lse), lse_bar),
        ("tangent of out", row_error(d_out, want_out), bar),
        ("tangent of lse", float(np.abs(wide(d_lse) - want_lse).max()) / scale, bar),
        ("exact zeros", not_zero(of, d_out, d_lse[..., None]), 0.0),
    ]
    if implementation != "default":  # cuDNN keeps the output as it is rounded
        out_bound, lse_bound = of.jvp_bounds(dtype, **tangents)
        parts = [
            parts_of_bound(d_out, want_out, out_bound),
            parts_of_bound(d_lse, want_lse, lse_bound),
        ]
        found.append(("tangents, of the oracle's bounds", max(parts), 1.0))
    if implementation in ("triton", "mosaic_gpu"):
        explanation = jaxsoftmax.explain(run, problem.floats, tangents)
        others = {c.implementation for c in explanation.choices} - {implementation}
        found.append((f"runs by others {others or ''}", float(len(others)), 0.0))
    return found


def check_hessian(name, dtype, small):
    """A Hessian-vector product of sum(out g), against a difference of gradients."""
    problem = Problem.of(KINDS[name], dtype, small)
    f, tangents, g = problem.call(None), tangents_of(problem), problem.g[0]

    def loss(floats):
        return jnp.sum(f(floats).astype(jnp.float32) * g.astype(jnp.float32))

    product = jax.jit(lambda x, t: jax.jvp(jax.grad(loss), (x,), (t,))[1])
    got = product(problem.floats, tangents)
    step = 1e-5

    def gradients(sign):
        items = problem.floats.items()
        moved = {k: wide(x) + sign * step * wide(tangents[k]) for k, x in items}
        return problem.oracle_of(moved).vjp(g)

    after, before = gradients(1), gradients(-1)
    found = []
    for name in problem.floats:
        want = (after[name] - before[name]) / (2 * step)
        error = row_error(got[name], want)
        found.append((f"product for {name}", error, 2 * BARS[dtype][1]))
    return found


def check_vmap(implementation, dtype, small):
    """Over query, key and value, then over queries alone."""
    problem = Problem.of(KINDS["causal"], dtype, small)
    f, g = problem.call(ASKED[implementation]), problem.g[0]
    stacked = {k: jnp.stack([x, x[::-1], -x]) for k, x in problem.floats.items()}
    found = []
    for names in (("query", "key", "value"), ("query",)):
        floats = {k: stacked[k] if k in names else problem.floats[k] for k in stacked}
        axes = {k: 0 if k in names else None for k in floats}

        def run(floats, axes=axes):
            def one(floats):
                y, pull = jax.vjp(f, floats)
                return y, pull(g)[0]

            return jax.vmap(one, in_axes=(axes,))(floats)

        with warnings.catch_warnings():  # no kernel is left to XLA
            warnings.simplefilter("error", jaxsoftmax.PerformanceWarning)
            out, d = jax.jit(run)(floats)
        for i in range(3):
            own = {k: x[i] if k in names else x for k, x in floats.items()}
            of = problem.oracle_of(own)
            found.append(("out", row_error(out[i], of.out), BARS[dtype][0]))
            for k, want in of.vjp(g).items():
                error = row_error(d[k][i], want)
                found.append((f"gradient of {k}", error, BARS[dtype][1]))
    return found


def check_entries_of_dropout(implementation, dtype):
    """That exactly those which bernoulli keeps are kept; also of mapped keys.

    With an identity for the values, out is 0 where a weight was dropped.
    """
    b, n, t, s, rate = 2, 3, 200, 256, 0.25
    query, key = (jnp.zeros((b, x, n, 16), dtype) for x in (t, s))
    value = jnp.broadcast_to(jnp.eye(s, dtype=dtype)[:, None], (b, s, n, s))
    floats = {"query": query, "key": key, "value": value}

    def f(words):
        options = {"dropout_rate": rate, "implementation": ASKED[implementation]}
        return attention(**floats, dropout_key=words, **options)

    words = jax.random.key_data(jax.random.split(jax.random.key(3)))
    kept = jax.vmap(lambda each: kept_of(floats, each, rate))(words)
    outs = {"one key": (jax.jit(f)(words[0]), kept[0])}
    outs["mapped keys"] = jax.jit(jax.vmap(f))(words), kept
    return [
        (
            f"wrong entries, {name}",
            float(jnp.sum((jnp.swapaxes(out, -3, -2) != 0) ^ want)),
            0.0,
        )
        for name, (out, want) in outs.items()
    ]


def check_one_mask_of_dropout(implementation, dtype):
    """That of all batch entries and heads, through Flax's signature."""
    b, n, t, s, h, rate = 2, 4, 200, 256, 64, 0.4
    rng = np.random.default_rng(0)
    shapes = {"query": (b, t, n, h), "key": (b, s, n, h), "value": (b, s, n, h)}
    floats = {k: jnp.array(rng.normal(size=x), dtype) for k, x in shapes.items()}
    g = jnp.array(rng.normal(size=(b, t, n, h)), dtype)
    words = jax.random.key_data(jax.random.key(5))

    @jax.jit
    def run(floats):
        f = lambda floats: attention_fn(
            **floats,
            dropout_rng=jax.random.wrap_key_data(words),
            dropout_rate=rate,
            broadcast_dropout=True,
            deterministic=False,
            implementation=ASKED[implementation],
        )
        out, pull = jax.vjp(f, floats)
        return out, pull(g)[0]

    out, d = run(floats)
    one = {k: x[:1, :, :1] for k, x in floats.items()}
    keep = np.broadcast_to(kept_of(one, words, rate), (b, n, t, s))
    of = oracle.forward(**floats, keep=keep, dropout_rate=rate)
    out_bar, bar, _ = BARS[dtype]
    found = [("out", row_error(out, of.out), out_bar)]
    for k, want in of.vjp(g).items():
        found.append((f"gradient of {k}", row_error(d[k], want), bar))
    return found


def check_merge(implementation, dtype, small):
    """Attention to two parts of the keys, merged, against attention to all."""
    problem = Problem.of(KINDS["plain"], dtype, small)
    half = problem.floats["key"].shape[1] // 2

    def merged(floats):
        results = []
        for part in (slice(None, half), slice(half, None)):
            own = floats | {k: floats[k][:, part] for k in ("key", "value")}
            f = problem.call(ASKED[implementation], return_residual=True)
            results += f(own)
        return jaxsoftmax.merge_attention(*results)

    @jax.jit
    def run(floats):
        y, pull = jax.vjp(merged, floats)
        return y, pull(problem.g)[0]

    (out, lse), d = run(problem.floats)
    of = problem.oracle
    out_bar, bar, lse_bar = BARS[dtype]
    found = [
        ("out", row_error(out, of.out), 2 * out_bar),
        ("lse", lse_error(lse, of.lse), lse_bar),
    ]
    for k, want in of.vjp(*problem.g).items():
        found.append((f"gradient of {k}", row_error(d[k], want), 2 * bar))
    return found


def lower(problem, asked):
    def loss(floats):
        return jnp.sum(problem.call(asked)(floats).astype(jnp.float32))

    return jax.jit(jax.grad(loss)).lower(problem.floats)


def check_refusal(name, dtype, small):
    problem = Problem.of(KINDS[name], dtype, small)
    try:
        lower(problem, "cudnn")
    except NotImplementedError as refusal:
        say(f"cudnn refuses {name} in {dtype}: {' '.join(str(refusal).split())[:200]}")
        return [("refusal", 0.0, 0.0)]
    return [("refusal: none came", np.inf, 0.0)]


def check_dropout_refusal(small):
    problem = Problem.of(KINDS["plain"], "bfloat16", small)
    options = {"dropout_rate": 0.1, "dropout_key": jax.random.key(0)}
    problem = dataclasses.replace(problem, static=problem.static | options)
    try:
        lower(problem, "cudnn")
    except NotImplementedError as refusal:
        say(f"cudnn refuses dropout: {' '.join(str(refusal).split())[:200]}")
        return [("refusal", 0.0, 0.0)]
    return [("refusal: none came", np.inf, 0.0)]


def check_default_calls(small):
    """What None compiles to: cuDNN's two calls, on an NVIDIA GPU."""
    found = []
    for name in ("causal", "bias a head", "lengths"):
        problem = Problem.of(KINDS[name], "bfloat16", small)
        calls = custom_calls(lower(problem, None).compile())
        right = calls == (1, 1) if has_cudnn() else calls == (0, 0)
        found.append((f"calls of cuDNN {calls}", 0.0 if right else np.inf, 0.0))
    return found


def check_explain(name, small):
    """That explain says what runs under None, and why cuDNN does not."""
    kind = KINDS[name]
    problem = Problem.of(kind, "bfloat16", small)

    def run(floats):
        return jax.vjp(problem.call(None), floats)[1](problem.g[0])

    explanation = jaxsoftmax.explain(run, problem.floats)
    say(f"explain, {name}:\n{explanation}")
    runs = {choice.implementation for choice in explanation.choices}
    cudnn = has_cudnn() and kind.cudnn == "takes"
    right = runs in ([{"cudnn"}] if cudnn else [{"mosaic_gpu"}, {"xla"}])
    found = [("runs", 0.0 if right else np.inf, 0.0)]
    if has_cudnn() and not cudnn:
        told = [dict(choice.refusals).get("cudnn") for choice in explanation.choices]
        found.append(("reasons", 0.0 if told and all(told) else np.inf, 0.0))
    return found


@functools.cache
def has_cudnn():
    return jax.default_backend() in ("gpu", "cuda")


# --- the program ----------------------------------------------------------------------


def dtypes_of(name, implementation):
    found = ["bfloat16"]
    if name in IN_FLOAT16 and implementation != "default":
        found.append("float16")
    if name in IN_FLOAT32 and implementation == "xla":
        found.append("float32")
    return found


def jvps():
    """(kind, dtype, what moves, or None for all) of the checks of forward mode."""
    for name in OF_JVP:
        yield name, "bfloat16", None
    for name in IN_FLOAT16:
        yield name, "float16", None
    for name in ("causal", "empty rows", "sinks", "soft cap"):
        yield name, "float32", None
    for moving in (("query",), ("key",), ("value",), ("sinks",), ("key", "value")):
        yield "sinks", "bfloat16", moving
    for moving in (("bias",), ("query", "bias")):
        yield "bias a head", "bfloat16", moving


def results_of(name, implementation, dtype):
    """Without lse always: it is what most programs are."""
    if implementation != "cudnn":
        return ("out", "out, lse") if dtype == "bfloat16" else ("out, lse",)
    found = ["out"]
    if dtype == "bfloat16":
        found.append("values of out, lse")
        if name == "causal":
            found.append("out, lse")
    return found


def jobs(args):
    """(implementation, title, whether cuDNN may refuse, function) of every check."""
    of, small = functools.partial, args.smoke
    for implementation in args.implementation:
        if implementation != "cudnn":  # it has none
            for name, dtype, moving in jvps():
                if implementation == "mosaic_gpu" and dtype == "float32":
                    continue
                run = of(check_jvp, name, implementation, dtype, small, moving)
                title = f"{dtype}, {name}, jvp of {', '.join(moving or ['all'])}"
                yield implementation, title, False, run
        if implementation == "triton":
            continue
        for name, kind in KINDS.items():
            if implementation == "default" and name not in OF_DEFAULT:
                continue
            if implementation == "cudnn" and kind.cudnn == "refuses":
                continue
            for dtype in dtypes_of(name, implementation):
                for results in results_of(name, implementation, dtype):
                    may = implementation == "cudnn" and (
                        kind.cudnn == "may" or results == "out, lse"
                    )
                    run = of(check, name, implementation, dtype, results, small)
                    yield implementation, f"{dtype}, {name}: {results}", may, run
        for dtype in ("bfloat16", "float16"):
            run = of(check_vmap, implementation, dtype, small)
            yield implementation, f"{dtype}, vmap", False, run
        if implementation != "cudnn":
            for check_of in (check_entries_of_dropout, check_one_mask_of_dropout):
                title = check_of.__name__.removeprefix("check_").replace("_", " ")
                run = of(check_of, implementation, "bfloat16")
                yield implementation, f"bfloat16, {title}", False, run
        # Its gradient is one of lse too.
        run = of(check_merge, implementation, "bfloat16", small)
        may = implementation == "cudnn"
        yield implementation, "bfloat16, merge_attention", may, run
    if "default" in args.implementation:
        for dtype in ("bfloat16", "float16"):
            for name in ("causal", "bias a head", "mask"):
                run = of(check_hessian, name, dtype, small)
                yield "default", f"{dtype}, {name}, Hessian", False, run
        names = ("causal", "bias a head", "lengths", "soft cap", "segments", "dropout")
        for name in names:
            yield "default", f"explain, {name}", False, of(check_explain, name, small)
        yield "default", "programs of None", False, of(check_default_calls, small)
    if "cudnn" in args.implementation:
        for name, dtype in [
            *((k, "bfloat16") for k in KINDS if KINDS[k].cudnn == "refuses"),
            ("causal", "float32"),
        ]:
            run = of(check_refusal, name, dtype, small)
            yield "cudnn", f"{dtype}, {name}, refused", False, run
        yield "cudnn", "dropout, refused", False, of(check_dropout_refusal, small)


class Report:
    """Counts outcomes; keeps the worst errors and every failure."""

    def __init__(self):
        self.outcomes = collections.defaultdict(collections.Counter)
        self.worst = {}
        self.failures = []
        self.refused = collections.defaultdict(list)

    def passed(self, implementation, title, found):
        dtype = title.split(",")[0]
        for what, error, bar in found:
            key = implementation, dtype, what
            if bar:
                self.worst[key] = max(self.worst.get(key, (0, bar)), (error, bar))
        bad = [
            f"{what} {e:.1e} above {bar:.1e}" for what, e, bar in found if not e <= bar
        ]
        if bad:
            self.failed(implementation, title, "; ".join(bad))
            return
        self.outcomes[implementation]["passed"] += 1
        nearest = max(found, key=lambda each: each[1] / each[2] if each[2] else 0)
        say(f"{implementation} {title}: passed, {nearest[0]} {nearest[1]:.1e}")

    def failed(self, implementation, title, why):
        self.outcomes[implementation]["failed"] += 1
        self.failures.append(f"{implementation} {title}: {why}")
        say("FAILED", self.failures[-1])

    def refusal(self, implementation, title, why):
        self.outcomes[implementation]["refused"] += 1
        self.refused[implementation, " ".join(why.split())[:300]].append(title)
        say(f"{implementation} {title}: refused")

    def print(self):
        print("\nworst error, and its bar")
        for key, (error, bar) in sorted(self.worst.items()):
            implementation, dtype, what = key
            print(f"  {implementation:8} {dtype:9} {what:24} {error:.1e}  {bar:.1e}")
        for (implementation, why), titles in self.refused.items():
            print(f"{implementation} refused {'; '.join(titles)}: {why}")
        for failure in self.failures:
            print("FAILED", failure)
        for implementation, counts in self.outcomes.items():
            print(f"{implementation} on {jax.devices()[0].device_kind}: {dict(counts)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--implementation", nargs="+", default=list(ASKED), choices=list(ASKED))
    add("--only", help="checks whose title has this in it")
    add("--budget", type=float, default=1e9, help="seconds")
    add("--part", type=int, nargs=2, metavar=("K", "N"), help="each Nth, from the Kth")
    add("--jobs", type=int, default=16)
    add("--smoke", action="store_true", help="small, on any device")
    args = parser.parse_args()
    say(f"jax {jax.__version__} on {jax.devices()[0].device_kind}")
    report = Report()

    def one(implementation, title, may_refuse, run):
        if time.perf_counter() - START > args.budget:
            return "left out", None
        try:
            return "run", run()
        except NotImplementedError as refusal:
            if may_refuse or (args.smoke and not has_cudnn()):
                return "refused", str(refusal)
            return "failed", f"refused: {' '.join(str(refusal).split())[:400]}"
        except Exception as broken:
            text = " ".join(str(broken).split())
            return "failed", f"{type(broken).__name__}: {text[:300]} .. {text[-300:]}"

    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        wanted = [job for job in jobs(args) if not args.only or args.only in job[1]]
        if args.part:
            first, every = args.part
            wanted = wanted[first::every]
        started = {pool.submit(one, *job): job for job in wanted}
        for done in concurrent.futures.as_completed(started):
            implementation, title, *_ = started[done]
            outcome, found = done.result()
            if outcome == "run":
                report.passed(implementation, title, found)
            elif outcome == "failed":
                report.failed(implementation, title, found)
            elif outcome == "refused":
                report.refusal(implementation, title, found)
            else:
                report.outcomes[implementation]["left out"] += 1
    report.print()
    for implementation in args.implementation:
        outcomes = report.outcomes[implementation]
        ran = outcomes["passed"] or (args.smoke and outcomes["refused"])
        if not (ran or args.only or outcomes["failed"]):
            report.failures.append(f"{implementation}: nothing was run")
            print("FAILED", report.failures[-1])
    seconds = time.perf_counter() - START
    print(f"{seconds:.0f} s, {len(report.failures)} failures")
    sys.exit(bool(report.failures))


if __name__ == "__main__":
    main()
