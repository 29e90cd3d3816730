"""Times cross-entropy over a large vocabulary on a GPU: value and gradient.

    python benchmarks/gpu_cross_entropy.py --json F.json --markdown F.md --png F.png
    python benchmarks/gpu_cross_entropy.py --render F.json --markdown F.md --png F.png

As with gpu_softmax.py, `--export FOLDER` lowers what is ours elsewhere, for
`--exported FOLDER`.

Every contender computes the mean loss of rows of logits and its gradient. Ours:

- ``mean``: reduction="mean", the gradient from the pass that computes the loss;
- ``per example``: reduction="none", then the mean: a pass, then the backward;
- ``xla``, ``triton``: reduction="mean" with this implementation.

Others: optax on the logits as they are, and on a copy in float32 (what is written for
accuracy); torch's cross_entropy, eager and compiled; Liger's, where it is installed.
``class weights``, and ``where``, three of four examples, are ``mean`` with these, and
``smoothing, z-loss`` and ``soft cap`` with the options of that name. With ``options``
(soft cap 30, label smoothing 0.1, z-loss 1e-4), and of ``token statistics``, a sum of
log-probabilities and entropies with its gradient, ours run against the same in
jax.numpy, on logits upcast to float32. ``forward``: the loss alone. In float16 ours run
against optax alone.

GB/s counts two passes, a read and a write, and one read more where each row has a
cotangent of its own (``per example``, ``token statistics``; and all in float16, where a
gradient that is rounded before it is scaled would underflow); ``forward``: one read.
The copy is an elementwise kernel of JAX, of as many bytes in float32. Memory is what is
needed beyond the logits and the gradient: XLA's own figure for the compiled program,
torch's peak. Time: the sum of a call's kernels, from CUPTI (torch: CUDA events), the
median of some calls. Errors are of 4 rows against float64: the gradient relative to the
row's largest.
"""

import concurrent.futures
import functools
import itertools
import statistics

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import report
from support import oracle

import jaxsoftmax

SHAPES = [(8192, 32768), (8192, 131072), (4096, 151936), (4096, 201088), (8192, 50257)]
SMOKE = [(64, 256), (32, 1000)]
OPTIONS = {"logits_soft_cap": 30.0, "label_smoothing": 0.1, "z_loss": 1e-4}
ours = jaxsoftmax.softmax_cross_entropy_with_integer_labels
CHECKED = [0, 1, -2, -1]
CHECKED_CONTENDERS = ["mean", "per example", "xla", "triton", "optax", "optax, upcast"]


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


def statistics_in_jnp(x, y):
    log_p = jax.nn.log_softmax(x.astype(jnp.float32))
    entropy = -jnp.sum(jnp.exp(log_p) * log_p, -1)
    return objective(jnp.take_along_axis(log_p, y[:, None], -1)[:, 0], entropy)


def statistics_of_ours(x, y):
    return objective(*jaxsoftmax.token_logprobs_and_entropy(x, y)[:2])


def objective(logprobs, entropy):
    advantages = jnp.cos(jnp.arange(logprobs.size, dtype=jnp.float32))
    return jnp.mean(logprobs * advantages + 0.01 * entropy)


OURS = ["mean", "per example", "forward", "class weights", "where"]
OURS += ["smoothing, z-loss", "soft cap", "options", "token statistics"]
WITH_COTANGENTS = ["per example", "token statistics", "... in jax.numpy"]


def jax_contenders(n, dtype):
    """name -> (function of logits and labels, whether the gradient is taken)."""
    weights = np.linspace(0.5, 1.5, n, dtype=np.float32)
    found = {
        "mean": (mean(), True),
        "per example": (lambda x, y: ours(x, y).mean(), True),
        "xla": (mean(implementation="xla"), True),
        "triton": (mean(implementation="triton"), True),
        "optax": (optax_mean, True),
        "optax, upcast": (upcast(optax_mean), True),
        "forward": (mean(), False),
        "optax, forward": (optax_mean, False),
        "class weights": (mean(class_weights=weights), True),
        "where": (lambda x, y: mean(where=jnp.arange(len(y)) % 4 != 0)(x, y), True),
        "smoothing, z-loss": (mean(label_smoothing=0.1, z_loss=1e-4), True),
        "soft cap": (mean(logits_soft_cap=30.0), True),
        "options": (mean(**OPTIONS), True),
        "options in jax.numpy": (in_jnp, True),
        "token statistics": (statistics_of_ours, True),
        "... in jax.numpy": (statistics_in_jnp, True),
    }
    if dtype == "float16":
        kept = (*OURS, "optax", "optax, forward")
        found = {name: each for name, each in found.items() if name in kept}
    return found


def wanted(x, y, count):
    """The gradient of some rows, of the mean, in float64 at least."""
    p = oracle.softmax(x)
    p[np.arange(len(y)), np.asarray(y)] -= 1
    return p / count


def program_of(f, differentiate):
    return jax.jit(jax.value_and_grad(f) if differentiate else f)


def structs(rows, n, dtype):
    return jax.ShapeDtypeStruct((rows, n), dtype), jax.ShapeDtypeStruct(
        (rows,), "int32"
    )


def export(args):
    """Writes the programs that are ours by default."""
    for dtype, (rows, n) in itertools.product(args.dtype, shapes(args)):
        found = jax_contenders(n, dtype)
        for name in OURS:
            path = harness.exported_path(args.export, name, rows, n, dtype)
            with harness.gpu_that_is_not_there():
                program = program_of(*found[name]), structs(rows, n, dtype)
                harness.export(path, [program])


def shapes(args):
    return SMOKE if args.smoke else SHAPES


def prepare(rows, n, dtype, args, pool):
    """name -> program."""
    found = {}
    for name, (f, differentiate) in jax_contenders(n, dtype).items():
        if args.exported and name in OURS:
            path = harness.exported_path(args.exported, name, rows, n, dtype)
            lower = functools.partial(harness.read_exported, path)
        else:
            program, arguments = program_of(f, differentiate), structs(rows, n, dtype)
            lower = functools.partial(lambda p, a: [p.lower(*a)], program, arguments)
        found[name] = harness.Compiling(pool, lower)
    return found


def run_jax(name, compiling, differentiate, x, y, want, clock):
    [compiled] = compiling.programs()
    found = {"compile_s": round(compiling.seconds, 2)}
    result = compiled(x, y)
    found["loss"] = float(result[0] if differentiate else result)
    if differentiate and name in CHECKED_CONTENDERS:
        rows = result[1][jnp.array(CHECKED)].astype(jnp.float32)
        found["error"] = harness.row_error(rows, want)
    del result
    found["extra_bytes"] = int(compiled.memory_analysis().temp_size_in_bytes)
    times, kernels = clock([functools.partial(compiled, x, y)] * 7)
    return found | {"ms": statistics.median(times), "kernels": kernels}


def torch_contenders(torch):
    functional = torch.nn.functional

    eager = functional.cross_entropy
    found = {"torch": eager, "torch.compile": torch.compile(eager)}
    try:
        from liger_kernel.transformers import LigerCrossEntropyLoss

        found["Liger"] = LigerCrossEntropyLoss()
    except ImportError:
        pass
    return found


def run_torch(torch, f, x, y, want):
    x = torch.from_dlpack(x).detach().clone().requires_grad_(True)
    y = torch.from_dlpack(y).long()

    def error(x):
        return harness.row_error(x.grad[CHECKED].float().cpu().numpy(), want)

    return harness.run_torch(torch, f, [x], y, error) | {"kernels": None}


def measure(args):
    torch, result = harness.start(args, "CUPTI (JAX), CUDA events (torch)")
    clock = harness.device_ms(args)
    pool = concurrent.futures.ThreadPoolExecutor()
    for dtype, (rows, n) in itertools.product(args.dtype, shapes(args)):
        programs = prepare(rows, n, dtype, args, pool)
        for program in programs.values():
            program.wait()  # what else runs meanwhile would be timed, too
        x = harness.normal(0, rows * n, dtype).reshape(rows, n)
        y = jax.random.randint(jax.random.key(1), (rows,), 0, n)
        as_float32 = jnp.zeros(x.nbytes // 4, jnp.float32)
        negate = functools.partial(jax.jit(jnp.negative), as_float32)
        copy_ms = statistics.median(clock([negate] * 7)[0])
        del as_float32, negate
        some = jnp.array(CHECKED)
        want = wanted(x[some].astype(jnp.float32), y[some], rows)
        cell = {
            "shape": [rows, n],
            "dtype": dtype,
            "nbytes": x.nbytes,
            "copy_ms": copy_ms,
            "results": {},
        }
        result["cells"].append(cell)
        contenders = jax_contenders(n, dtype)
        runs = {
            name: functools.partial(
                run_jax, name, program, contenders[name][1], x, y, want, clock
            )
            for name, program in programs.items()
        }
        if torch is not None:
            for name, f in torch_contenders(torch).items():
                runs[name] = functools.partial(run_torch, torch, f, x, y, want)
        harness.run_all(runs, cell, result, args, torch, (dtype, rows, n))
        del x, runs, programs
    return result


# --- what is written ------------------------------------------------------------------


def row(name, found, cell):
    if "not_run" in found:
        return report.not_run(name, found, len(HEADER))
    three = name in WITH_COTANGENTS or cell["dtype"] == "float16"
    passes = 1 if "forward" in name else 3 if three else 2
    rate = passes * cell["nbytes"] / found["ms"] / 1e6
    copy = 2 * cell["nbytes"] / cell["copy_ms"] / 1e6
    error = found.get("error")
    return [
        name,
        f"{found['ms']:.3f}",
        f"{rate:,.0f}",
        f"{rate / copy:.2f}",
        str(found["kernels"] or ""),
        report.megabytes(found["extra_bytes"]),
        "" if error is None else f"{error:.1e}",
    ]


NOTE = "Ours: " + ", ".join(f"`{name}`" for name in (*OURS, "xla", "triton")) + "."
HEADER = ["", "ms", "GB/s", "of copy", "kernels", "memory beyond", "gradient's error"]


def markdown(result):
    lines = report.heading("Cross-entropy", result, NOTE)
    for cell in result["cells"]:
        rows, n = cell["shape"]
        copy = 2 * cell["nbytes"] / cell["copy_ms"] / 1e6
        lines += [
            f"## {rows:,} x {n:,}, {cell['dtype']}",
            "",
            f"Logits of {cell['nbytes'] / 1e9:.2f} GB; copy {cell['copy_ms']:.3f} ms, "
            f"{copy:,.0f} GB/s.",
            "",
            *report.table(
                HEADER, [row(name, r, cell) for name, r in cell["results"].items()]
            ),
            "",
        ]
    return "\n".join(lines)


def draw(result, path):
    """Milliseconds of each contender: a row a dtype, a column a shape."""
    plt = report.pyplot()

    names = ["mean", "per example", "optax", "optax, upcast", "torch", "torch.compile"]
    cells = [cell for cell in result["cells"] if cell["dtype"] != "float16"]
    dtypes = list(dict.fromkeys(cell["dtype"] for cell in cells))
    each = len(cells) // len(dtypes)
    figure, panels = plt.subplots(
        *(len(dtypes), each),
        figsize=(2.6 * each + 1, 3.6 * len(dtypes)),
        layout="constrained",
        squeeze=False,
    )
    for axes, cell in zip(panels.flat, cells, strict=True):
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
    for first in panels[:, 0]:
        first.set_ylabel("ms, loss and gradient (less is better)")
    panels[0, 0].legend(frameon=False, fontsize=8)
    figure.suptitle(f"Cross-entropy on {result['device']}", fontsize=10)
    figure.savefig(path, dpi=110)


def add_arguments(parser):
    parser.add_argument(
        "--dtype", nargs="+", default=["bfloat16", "float32", "float16"]
    )


if __name__ == "__main__":
    harness.main(
        __doc__, harness.Program(measure, markdown, draw, add_arguments, export=export)
    )
