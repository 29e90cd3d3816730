"""Checks the cross-entropy kernels against the long-double oracle, on the GPU at hand.

    python tests/gpu/check_cross_entropy.py [--implementation mosaic_gpu triton xla]

Exits with 1 if anything is wrong, or if an implementation refuses everything. Every
case is a batch of rows of all kinds: Gaussian, with an offset of 1e4, with a dominant
label and a dominant other entry, all -inf, -inf on the label and off it, ignored rows
of NaN, a label out of range. Checked are the loss and the gradient of the weighted sum
(one pass; that in the memory of the logits is the same), those of each example (a pass
forward, XLA's backward), entropy and its gradient, and dense labels.

Bars: losses within 8 eps of float32, relative to 1 and to how far the label is below
the maximum; gradients, relative to the row's largest, 4e-6 in float32, 8e-3 in
bfloat16, 1e-3 in float16. A soft cap c is rounded where it is computed: 4 eps c more.
"""

import argparse
import collections
import concurrent.futures
import functools
import itertools
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from support import oracle

import jaxsoftmax

EPS = float(np.finfo(np.float32).eps)
GRADIENT_BAR = {"float32": 4e-6, "bfloat16": 8e-3, "float16": 1e-3}
ALIGNED = [128, 1024, 16384, 32768, 65536, 128256, 131072, 151936, 262144, 524288]
RAGGED = [1, 7, 1000, 1152, 3200, 5760, 30522, 50257]  # or not by a block
OPTIONS = {
    "plain": {},
    "all": {
        "label_smoothing": 0.1,
        "z_loss": 1e-3,
        "logits_soft_cap": 30.0,
        "scale": 0.7,
    },
    "scale": {"scale": 2.0, "z_loss": 1e-4},
    "smoothing": {"label_smoothing": 0.1},
    "cap": {"logits_soft_cap": 30.0},
}
ROWS = 16
IGNORED = -100
START = time.perf_counter()


def batch(n, dtype, seed):
    """Logits and labels of rows of every kind; the last three rows have no gradient."""
    rng = np.random.default_rng(seed)
    x = 3 * rng.normal(size=(ROWS, n))
    y = rng.integers(0, n, ROWS)
    x[1] += 1e4 if dtype != "float16" else 1e3
    x[2, y[2]] = 60
    x[3, (y[3] + 1) % n] = 60
    x[4, : n // 2] = -np.inf
    x[5] = -np.inf
    x[6, y[6]] = -np.inf
    x = np.array(jnp.array(x, dtype))
    x[-3], y[-3] = np.nan, IGNORED
    y[-2] = IGNORED
    y[-1] = n
    return jnp.array(x), jnp.array(y, jnp.int32)


def masks(n, seed):
    rng = np.random.default_rng(seed)
    return {"": None, "where": jnp.array(rng.random((1, n)) < 0.7)}


def error(got, want):
    """Largest error; NaN and infinities must be where they should be."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    finite = np.isfinite(want)
    same = np.array_equal(got[~finite], want[~finite], equal_nan=True)
    return float(np.abs(got - want)[finite].max(initial=0)) if same else np.inf


def row_error(got, want, dtype):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    if not np.array_equal(np.isnan(got), np.isnan(want)):
        return np.inf
    zero = want == 0
    if (np.abs(got[zero]) > 0).any():
        return np.inf
    info = jnp.finfo(dtype)
    largest = np.nanmax(np.abs(want), axis=-1, initial=0)
    counted = largest >= float(info.tiny) / float(info.eps)
    worst = np.nanmax(np.abs(got - want), axis=-1, initial=0)[counted]
    return float((worst / largest[counted]).max(initial=0))


def check(implementation, dtype, n, options, mask):
    """(what, error, bar) of one case."""
    kwargs = dict(OPTIONS[options], implementation=implementation)
    x, y = batch(n, dtype, n)
    where = masks(n, n)[mask]
    scale, cap = kwargs.get("scale", 1.0), kwargs.get("logits_soft_cap")
    clean = np.nan_to_num(np.asarray(x, np.float64), nan=0.0, neginf=-np.inf)
    of = oracle.rows(clean, where, scale, cap)
    counted = np.asarray(y) != IGNORED
    inside = np.where(counted & (np.asarray(y) < n), np.asarray(y), 0)
    smoothing, z = kwargs.get("label_smoothing", 0.0), kwargs.get("z_loss", 0.0)
    t = oracle.label_weights(of, inside, smoothing)
    want = oracle.cross_entropy(of, t, z)
    g = np.random.default_rng(1).normal(size=ROWS).astype(np.float32)
    g[-1] = 0  # a label out of range: no gradient where no loss is looked at

    def gradient(g):
        dx = oracle.cross_entropy_vjp(of, t, g, 0.0, z)
        # Of +inf there is none to speak of, but at the other entries.
        return np.where(counted[:, None], dx, 0)

    loss_bar = 8 * EPS * np.maximum(1, np.nanmax(np.where(np.isfinite(want), want, 0)))
    loss_bar += 4 * EPS * (cap or 0) * (1 + 2 * z * 50)
    bar = GRADIENT_BAR[dtype] + 4 * EPS * (cap or 0)
    f = functools.partial(
        jaxsoftmax.softmax_cross_entropy_with_integer_labels,
        where=where,
        ignore_index=IGNORED,
        **kwargs,
    )
    found = []
    want_none = np.where(counted, want, 0).astype(np.float64)
    want_none[-1] = np.nan

    @jax.jit
    def each(x, y, g):
        loss, pull = jax.vjp(lambda x: f(x, y), x)
        return loss, pull(g)[0]

    loss, dx = each(x, y, jnp.array(g))
    found.append(("loss", error(loss, want_none), loss_bar))
    found.append(("gradient", row_error(dx, gradient(g), dtype), bar))
    # In one pass, without the examples whose loss is infinite or NaN.
    keep = np.isfinite(want_none)
    one_pass = jax.jit(jax.value_and_grad(lambda x, y: f(x, y, reduction="mean")))
    loss, dx = one_pass(x[keep], y[keep])
    count = counted[keep].sum()
    mean = want_none[keep].sum() / count
    found.append(("mean", error(loss, mean), loss_bar))
    found.append(
        ("one pass", row_error(dx, gradient(np.ones(ROWS) / count)[keep], dtype), bar)
    )
    total = functools.partial(f, labels=y, reduction="sum")
    dx = jax.jit(jax.grad(total))(x)
    overwriting = jax.grad(functools.partial(total, overwrite_logits=True))
    # Of logits that are used later, and then of those that are not.
    for over in (jax.jit(overwriting), jax.jit(overwriting, donate_argnums=0)):
        found.append(("in place", row_error(over(x + 0), dx, dtype), bar))
    got = np.asarray(dx[-1], np.float64)
    shown = np.ones(n, bool) if where is None else np.asarray(where)[0]
    found.append(("NaN label", 0.0 if np.isnan(got[shown]).all() else np.inf, 0.0))
    if options == "all" or n <= 1024:
        found += check_dense(kwargs, x, clean, where, dtype, bar, loss_bar)
        found += check_entropy(kwargs, x, y, where, of, dtype, bar, loss_bar)
    return found


def check_dense(kwargs, x, clean, where, dtype, bar, loss_bar):
    rng = np.random.default_rng(2)
    keep = [0, 1, 2, 3, 7, 8]  # without -inf, on which a weight costs +inf
    labels = jnp.array(rng.random((len(keep), x.shape[1])) / x.shape[1], dtype)
    f = functools.partial(jaxsoftmax.softmax_cross_entropy, where=where, **kwargs)
    cap = kwargs.get("logits_soft_cap")
    of = oracle.rows(clean[keep], where, kwargs.get("scale", 1.0), cap)
    smoothing, z = kwargs.get("label_smoothing", 0.0), kwargs.get("z_loss", 0.0)
    t = oracle.label_weights(of, labels, smoothing, where)
    loss, pull = jax.vjp(jax.jit(lambda x: f(x, labels)), x[jnp.array(keep)])
    (dx,) = pull(jnp.ones_like(loss))
    want = oracle.cross_entropy_vjp(of, t, np.ones(len(keep)), 0.0, z)
    # Sums of n terms of both signs: rounded sqrt(n) times, at most.
    few = 1 + x.shape[1] ** 0.5 / 16
    return [
        ("dense loss", error(loss, oracle.cross_entropy(of, t, z)), loss_bar * few),
        ("dense gradient", row_error(dx, want, dtype), bar * few),
    ]


def check_entropy(kwargs, x, y, where, of, dtype, bar, loss_bar):
    names = ("scale", "logits_soft_cap", "implementation")
    chosen = {k: v for k, v in kwargs.items() if k in names}
    f = functools.partial(
        jaxsoftmax.token_logprobs_and_entropy,
        where=where,
        ignore_index=IGNORED,
        **chosen,
    )
    keep = jnp.arange(ROWS - 3)
    y = y[keep]
    got = jax.jit(f)(x[keep], y)
    part = oracle.Rows(*(a[: ROWS - 3] for a in of))
    found = [
        ("entropy", error(got.entropy, oracle.entropy(part)), loss_bar),
        ("lse", error(got.lse, part.lse), 2 * EPS * 1e4 + loss_bar),
    ]
    g = np.ones(ROWS - 3)
    dx = jax.jit(jax.grad(lambda x: jnp.sum(f(x, y).entropy)))(x[keep])
    found.append(
        (
            "entropy's gradient",
            row_error(dx, oracle.entropy_vjp(part, g), dtype),
            4 * bar,
        )
    )
    return found


def cases(args):
    for implementation in args.implementation:
        lengths = args.lengths or (ALIGNED + RAGGED)
        for n, dtype in itertools.product(lengths, args.dtype):
            names = list(OPTIONS) if n <= 1024 else ["plain", "cap", "all"]
            for options in names:
                yield implementation, dtype, n, options, ""
            if 7 < n < 20000:
                yield implementation, dtype, n, "plain", "where"
                yield implementation, dtype, n, "all", "where"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--implementation", nargs="+", default=["mosaic_gpu", "triton"])
    parser.add_argument(
        "--dtype", nargs="+", default=["bfloat16", "float32", "float16"]
    )
    parser.add_argument("--lengths", nargs="+", type=int)
    parser.add_argument("--budget", type=float, default=1e9, help="seconds")
    parser.add_argument("--jobs", type=int, default=8)
    args = parser.parse_args()
    counts, failures, refusals = collections.Counter(), [], collections.Counter()
    worst = {}

    def one(case):
        if time.perf_counter() - START > args.budget:
            return case, "left out", []
        try:
            return case, "run", check(*case)
        except NotImplementedError as refusal:
            return case, "refused", [str(refusal)]
        except Exception as broken:
            return case, "failed", [f"{type(broken).__name__}: {str(broken)[:300]}"]

    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        started = [pool.submit(one, case) for case in cases(args)]
        for done in concurrent.futures.as_completed(started):
            case, outcome, found = done.result()
            name = " ".join(map(str, case))
            if outcome == "run":
                bad = [(what, e, bar) for what, e, bar in found if not e <= bar]
                for what, e, bar in found:
                    key = case[0], what, case[1]
                    worst[key] = max(worst.get(key, 0), e / bar if bar else e)
                outcome = "failed" if bad else "passed"
                print(
                    f"[{time.perf_counter() - START:5.0f} s] {name}: {outcome}",
                    flush=True,
                )
                for what, e, bar in bad:
                    failures.append(f"{name}: {what} {e:.2e} above {bar:.2e}")
                    print("FAILED", failures[-1], flush=True)
            elif outcome == "refused":
                reason = found[0].split("(")[1].split(")")[0]
                refusals[case[0], reason] += 1
            elif outcome == "failed":
                failures.append(f"{name}: {found[0]}")
                print("FAILED", failures[-1], flush=True)
            counts[case[0], outcome] += 1
    for (implementation, reason), count in refusals.most_common():
        print(f"{implementation} refused {count}: {reason}")
    print("\nworst error, in parts of its bar")
    for (implementation, what, dtype), part in sorted(worst.items()):
        print(f"  {implementation:12} {dtype:9} {what:20} {part:.2f}")
    for implementation in args.implementation:
        of = {o: c for (i, o), c in counts.items() if i == implementation}
        print(f"{implementation} on {jax.devices()[0].device_kind}: {of}")
        if not of.get("passed"):
            failures.append(f"{implementation}: nothing was run")
    print(f"{time.perf_counter() - START:.0f} s, {len(failures)} failures")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
