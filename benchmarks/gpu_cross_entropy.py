"""Times cross-entropy over a large vocabulary on a GPU: value and gradient.

    python benchmarks/gpu_cross_entropy.py --json F.json --markdown F.md --png F.png
    python benchmarks/gpu_cross_entropy.py --render F.json --markdown F.md --png F.png

Every contender computes the mean loss of rows of logits and its gradient. Ours:

- ``mean``: reduction="mean", the gradient from the pass that computes the loss;
- ``per example``: reduction="none", then the mean: a pass, then XLA's backward;
- ``xla``: reduction="mean" with implementation="xla"; ``triton`` likewise.

Others: optax on the logits as they are, and on a copy in float32 (what is written for
accuracy); torch's cross_entropy, eager and compiled; Liger's, where it is installed.
With ``options`` (soft cap 30, label smoothing 0.1, z-loss 1e-4) ours run against the
same in jax.numpy, on logits upcast to float32. ``forward``: the loss alone.

GB/s counts two passes, a read and a write (``forward``: one read). The copy is an
elementwise kernel of JAX. Memory is what is needed beyond the logits and the gradient:
XLA's own figure for the compiled program, torch's peak. Time: the sum of a call's
kernels, from CUPTI (torch: CUDA events), the median of some calls. Errors are of 4 rows
against float64: the gradient relative to the row's largest.
"""

import argparse
import functools
import json
import os
import statistics
import sys
import time

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import gpu_report
import gpu_softmax as bench
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxsoftmax

SHAPES = [(8192, 32768), (8192, 131072), (4096, 151936), (8192, 50257)]
SMOKE = [(64, 256), (32, 1000)]
OPTIONS = {"logit_softcap": 30.0, "label_smoothing": 0.1, "z_loss": 1e-4}
ours = jaxsoftmax.softmax_cross_entropy_with_integer_labels
CHECKED = [0, 1, -2, -1]


def say(*words):
    print(
        f"[{time.perf_counter() - START:6.1f} s]", *words, file=sys.stderr, flush=True
    )


START = time.perf_counter()


def mean(**options):
    return lambda x, y: ours(x, y, reduction="mean", **options)


def optax_mean(x, y):
    return optax.softmax_cross_entropy_with_integer_labels(x, y).mean()


def upcast(f):
    return lambda x, y: f(x.astype(jnp.float32), y)


def in_jnp(x, y):
    """With `OPTIONS`, as it is usually written."""
    cap, smoothing, z = OPTIONS.values()
    x = cap * jnp.tanh(x.astype(jnp.float32) / cap)
    log_p = jax.nn.log_softmax(x)
    nll = -jnp.take_along_axis(log_p, y[:, None], -1)[:, 0]
    lse = jax.nn.logsumexp(x, axis=-1)
    spread = -jnp.mean(log_p, axis=-1)
    return jnp.mean((1 - smoothing) * nll + smoothing * spread + z * lse**2)


def jax_contenders(n):
    """name -> (function of logits and labels, whether the gradient is taken)."""
    found = {
        "mean": (mean(), True),
        "per example": (lambda x, y: ours(x, y).mean(), True),
        "xla": (mean(implementation="xla"), True),
        "triton": (mean(implementation="triton"), True),
        "optax": (optax_mean, True),
        "optax, upcast": (upcast(optax_mean), True),
        "forward": (mean(), False),
        "optax, forward": (optax_mean, False),
        "options": (mean(**OPTIONS), True),
        "options in jax.numpy": (in_jnp, True),
    }
    return found


def wanted(x, y, count):
    """Loss of some rows and their gradient of the mean, in float64."""
    x, y = np.asarray(x, np.float64), np.asarray(y)
    m = x.max(-1, keepdims=True)
    e = np.exp(x - m)
    p = e / e.sum(-1, keepdims=True)
    p[np.arange(len(y)), y] -= 1
    return p / count


def gradient_error(dx, want):
    got = np.asarray(jnp.asarray(dx).astype(jnp.float32), np.float64)
    largest = np.abs(want).max(-1)
    return float((np.abs(got - want).max(-1) / largest).max())


def run_jax(name, f, differentiate, x, y, want, clock):
    program = jax.jit(jax.value_and_grad(f) if differentiate else f)
    start = time.perf_counter()
    compiled = program.lower(x, y).compile()
    seconds = time.perf_counter() - start
    result = compiled(x, y)
    cell = {"compile_s": round(seconds, 2)}
    if differentiate:
        cell["loss"] = float(result[0])
        if not name.startswith("options"):
            rows = result[1][jnp.array(CHECKED)]
            cell["error"] = gradient_error(rows, want)
    else:
        cell["loss"] = float(result)
    del result
    times, kernels = clock([functools.partial(compiled, x, y)] * 7)
    extra = compiled.memory_analysis().temp_size_in_bytes
    return cell | {
        "ms": statistics.median(times),
        "kernels": kernels,
        "extra_bytes": int(extra),
    }


def torch_contenders(torch):
    functional = torch.nn.functional

    def eager(x, y):
        return functional.cross_entropy(x, y)

    found = {"torch": eager, "torch.compile": torch.compile(eager)}
    try:
        from liger_kernel.transformers import LigerCrossEntropyLoss

        found["Liger"] = LigerCrossEntropyLoss()
    except ImportError:
        pass
    return found


def run_torch(torch, f, x, y, want):
    bench.restore_triton_cache()
    x = torch.from_dlpack(x).detach().clone().requires_grad_(True)
    y = torch.from_dlpack(y).long()

    def call():
        x.grad = None
        loss = f(x, y)
        loss.backward()
        return loss

    start = time.perf_counter()
    loss = call()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    want_rows = x.grad[CHECKED].float().cpu().numpy()
    error = gradient_error(want_rows, want)
    x.grad = None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    nbytes = x.numel() * x.element_size()
    extra = torch.cuda.max_memory_allocated() - before - nbytes
    times = []
    for _ in range(5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return {
        "compile_s": round(seconds, 2),
        "loss": float(loss.detach()),
        "error": error,
        "ms": statistics.median(times),
        "kernels": None,
        "extra_bytes": int(max(extra, 0)),
    }


def measure(args):
    torch = None if args.smoke else bench.find_torch()
    clock = bench.host_ms if args.smoke else bench.cupti_ms
    cells = []
    result = {
        "device": jax.devices()[0].device_kind,
        "driver": bench.nvidia_smi("driver_version"),
        "versions": bench.versions() | {"optax": optax.__version__},
        "command": " ".join(["python", *sys.argv]),
        "clock": "host" if args.smoke else "CUPTI (JAX), CUDA events (torch)",
        "cells": cells,
    }
    for dtype in args.dtype:
        for rows, n in SMOKE if args.smoke else SHAPES:
            x = bench.normal(0, rows * n, dtype).reshape(rows, n)
            y = jax.random.randint(jax.random.key(1), (rows,), 0, n)
            negate = functools.partial(jax.jit(jnp.negative), x)
            copy_ms = statistics.median(clock([negate] * 7)[0])
            some = jnp.array(CHECKED)
            want = wanted(x[some].astype(jnp.float32), y[some], rows)
            cell = {
                "shape": [rows, n],
                "dtype": dtype,
                "nbytes": x.nbytes,
                "copy_ms": copy_ms,
                "results": {},
            }
            cells.append(cell)
            runs = {
                name: functools.partial(run_jax, name, *each, x, y, want, clock)
                for name, each in jax_contenders(n).items()
            }
            if torch is not None:
                for name, f in torch_contenders(torch).items():
                    runs[name] = functools.partial(run_torch, torch, f, x, y, want)
            for name, run in runs.items():
                if time.perf_counter() - START > args.budget:
                    cell["results"][name] = {"not_run": "out of time"}
                    continue
                try:
                    cell["results"][name] = run()
                except Exception as error:
                    reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
                    cell["results"][name] = {"not_run": reason[:300]}
                say(dtype, rows, n, name, cell["results"][name])
                bench.write(args.json, result)
            del x
            if torch is not None:
                torch.cuda.empty_cache()
    return result


# --- what is written ------------------------------------------------------------------


def megabytes(nbytes):
    return f"{nbytes / 1e6:,.0f} MB" if nbytes >= 1e6 else f"{nbytes / 1e6:.2f} MB"


def row(name, found, cell):
    if "not_run" in found:
        return [name, "not run: " + found["not_run"].split("(")[0][:60], *[""] * 5]
    passes = 1 if "forward" in name else 2
    rate = passes * cell["nbytes"] / found["ms"] / 1e6
    copy = 2 * cell["nbytes"] / cell["copy_ms"] / 1e6
    error = found.get("error")
    return [
        name,
        f"{found['ms']:.3f}",
        f"{rate:,.0f}",
        f"{rate / copy:.2f}",
        str(found["kernels"] or ""),
        megabytes(found["extra_bytes"]),
        "" if error is None else f"{error:.1e}",
    ]


HEADER = ["", "ms", "GB/s", "of copy", "kernels", "memory beyond", "gradient's error"]


def markdown(result):
    versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items() if v)
    lines = [
        f"# Cross-entropy on {result['device']}",
        "",
        f"Made by `{result['command']}`; {versions}; driver {result['driver']}; clock: "
        f"{result['clock']}. What is timed, and how, says the program's docstring. "
        "The first four rows are ours.",
        "",
        *result.get("notes", []),
    ]
    for cell in result["cells"]:
        rows, n = cell["shape"]
        copy = 2 * cell["nbytes"] / cell["copy_ms"] / 1e6
        lines += [
            f"## {rows:,} x {n:,}, {cell['dtype']}",
            "",
            f"Logits of {cell['nbytes'] / 1e9:.2f} GB; copy {cell['copy_ms']:.3f} ms, "
            f"{copy:,.0f} GB/s.",
            "",
            *gpu_report.table(
                HEADER, [row(name, r, cell) for name, r in cell["results"].items()]
            ),
            "",
        ]
    return "\n".join(lines)


def draw(result, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = ["mean", "per example", "optax", "optax, upcast", "torch", "torch.compile"]
    cells = result["cells"]
    figure, panels = plt.subplots(
        1, len(cells), figsize=(2.6 * len(cells) + 1, 3.8), layout="constrained"
    )
    for axes, cell in zip(np.atleast_1d(panels), cells, strict=True):
        found = {n: cell["results"].get(n, {}) for n in names}
        shown = [n for n in names if "ms" in found[n]]
        ms = [found[n]["ms"] for n in shown]
        colours = ["C0" if n in names[:2] else "0.6" for n in shown]
        bars = axes.bar(range(len(shown)), ms, color=colours)
        axes.bar_label(bars, [f"{v:.2f}" for v in ms], fontsize=8)
        axes.axhline(cell["copy_ms"], color="C3", lw=1, ls="--", label="copy")
        axes.set_xticks(range(len(shown)), shown, rotation=60, ha="right", fontsize=8)
        rows, n = cell["shape"]
        axes.set_title(f"{rows} x {n}\n{cell['dtype']}", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    first = np.atleast_1d(panels)[0]
    first.set_ylabel("ms, loss and gradient (less is better)")
    first.legend(frameon=False, fontsize=8)
    figure.suptitle(f"Cross-entropy on {result['device']}", fontsize=10)
    figure.savefig(path, dpi=130)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json")
    parser.add_argument("--markdown")
    parser.add_argument("--png")
    parser.add_argument("--render", help="a JSON file, instead of measuring")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--budget", type=float, default=1e9, help="seconds")
    parser.add_argument("--smoke", action="store_true", help="small, on any device")
    args = parser.parse_args()
    if args.render:
        with open(args.render) as file:
            result = json.load(file)
    else:
        result = measure(args)
    text = markdown(result)
    if args.markdown:
        with open(args.markdown, "w") as file:
            file.write(text)
    else:
        print(text)
    if args.png:
        draw(result, args.png)


if __name__ == "__main__":
    main()
