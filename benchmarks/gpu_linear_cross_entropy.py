"""Times linear + cross-entropy on a GPU: the mean loss and its gradients.

    python benchmarks/gpu_linear_cross_entropy.py --json F.json --markdown F.md
    python benchmarks/gpu_linear_cross_entropy.py --render F.json --markdown F.md

Every contender computes the mean cross-entropy of ``x @ weights`` for bfloat16 `x`
[T, H] and `weights`, and the gradients of both. Ours:

- ``default``: reduction="mean", the gradients from the pass that computes the loss;
- ``memory first``: the same with a memory_budget of 0.45 GB;
- ``per example``: reduction="none", then the mean; ``frozen weights``: no gradient of
  the weights; ``forward``: the loss alone.

Others: the dense form in JAX, with logits in bfloat16 and in float32; torch's, eager
and compiled; those of Liger Kernel and of Apple's cut_cross_entropy, where they are
installed.

TFLOP/s counts the products that a contender needs at least: three of 2 T H V each, two
with frozen weights, one for the loss alone. Memory is what is needed beyond the
arguments and the gradients: XLA's own figure for the compiled program, torch's peak.
Time: that of a call on the host until its result is there (torch: CUDA events), the
median of some calls; ``kernels``: the sum of a call's kernels, from CUPTI. Errors are
against float64, of the gradients of 4 tokens and of 64 classes, relative to the largest
entry of each row or column; the worst.
"""

import functools
import statistics

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import report

import jaxsoftmax

# (T, H, V)
SHAPES = [(8192, 4096, 128256), (16384, 2048, 151936), (2048, 8192, 32000)]
SMOKE = [(64, 32, 1000)]
MEMORY_FIRST = 450_000_000
TOKENS = [0, 1, -2, -1]
CLASSES = 64
ours = jaxsoftmax.linear_softmax_cross_entropy


def mean(**options):
    return lambda x, w, y: ours(x, y, w, reduction="mean", **options)


def dense(dtype):
    def loss(x, w, y):
        logits = jnp.dot(x, w, preferred_element_type=dtype)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    return loss


def jax_contenders():
    """name -> (function of x, weights and labels, arguments that have a gradient)."""
    return {
        "default": (mean(), (0, 1)),
        "memory first": (mean(memory_budget=MEMORY_FIRST), (0, 1)),
        "per example": (lambda x, w, y: ours(x, y, w).mean(), (0, 1)),
        "frozen weights": (mean(), (0,)),
        "forward": (mean(), ()),
        "dense": (dense(jnp.bfloat16), (0, 1)),
        "dense, float32 logits": (dense(jnp.float32), (0, 1)),
    }


def oracle(x, w, y, classes):
    """The gradients of some tokens and of some classes, in float64."""
    count = x.shape[0]
    tokens = np.array(TOKENS)

    def chunk_gradient(rows):
        x, y = rows
        logits = x.astype(jnp.float64) @ w.astype(jnp.float64)
        lse = jax.nn.logsumexp(logits, -1, keepdims=True)
        p = jnp.exp(logits[:, classes] - lse)
        return (p - (y[:, None] == classes)) / count

    def whole(x, w, y):
        size = min(256, count)
        rows = (x.reshape(-1, size, x.shape[1]), y.reshape(-1, size))
        d = jax.lax.map(chunk_gradient, rows).reshape(count, -1)
        dw = x.astype(jnp.float64).T @ d
        p = jax.nn.softmax(x[tokens].astype(jnp.float64) @ w.astype(jnp.float64))
        d = p.at[np.arange(len(TOKENS)), y[tokens]].add(-1) / count
        return d @ w.astype(jnp.float64).T, dw

    with jax.enable_x64(True):
        dx, dw = jax.jit(whole)(x, w, y)
        return np.asarray(dx), np.asarray(dw)


def error(dx, dw, want):
    """The worst, relative to a token's or a class's largest entry."""
    found = [harness.row_error(dx, want[0])]
    if dw is not None:
        found.append(harness.row_error(dw.T, want[1].T))
    return max(found)


def run_jax(f, places, arrays, classes, want, clock):
    def look(dx, dw=None):
        some = dx[jnp.array(TOKENS)].astype(jnp.float32)
        return error(some, None if dw is None else dw[:, classes], want)

    call, found = harness.run_loss(f, places, arrays, look)
    calls = [call] * 7
    times, kernels = harness.host_ms(calls)[0], clock(calls)[0]
    return found | {
        "ms": statistics.median(times),
        "kernels_ms": statistics.median(kernels),
    }


def torch_contenders(torch):
    functional = torch.nn.functional

    def eager(x, w, y):
        return functional.cross_entropy(x @ w.T, y)

    found = {"torch": eager, "torch.compile": torch.compile(eager)}
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()
        found["Liger"] = lambda x, w, y: liger(w, x, y)
    except ImportError as absent:
        harness.say(f"without Liger: {absent}")
    try:
        from cut_cross_entropy import linear_cross_entropy

        found["cut_cross_entropy"] = linear_cross_entropy
    except ImportError as absent:
        harness.say(f"without cut_cross_entropy: {absent}")
    return found


def run_torch(torch, f, arrays, classes, want):
    x, w, y = (torch.from_dlpack(a) for a in arrays)
    x = x.detach().clone().requires_grad_(True)
    # torch's layers have [V, H].
    w = w.T.contiguous().detach().requires_grad_(True)
    places = torch.tensor(np.array(classes))

    def gradient_errors(x, w):
        dx, dw = x.grad[TOKENS], w.grad[places].T
        return error(dx.float().cpu().numpy(), dw.float().cpu().numpy(), want)

    found = harness.run_torch(torch, f, [x, w], y.long(), gradient_errors)
    return found | {"kernels_ms": None}


def inputs(shape):
    tokens, hidden, vocabulary = shape
    x = harness.normal(0, tokens * hidden, "bfloat16").reshape(tokens, hidden)
    w = harness.normal(1, hidden * vocabulary, "bfloat16").reshape(hidden, vocabulary)
    # Logits of scale 3 or so.
    w = jax.jit(lambda w: (w * (3 / hidden**0.5)).astype(w.dtype))(w)
    y = jax.random.randint(jax.random.key(2), (tokens,), 0, vocabulary)
    return x, w, y


def measure(args):
    torch, result = harness.start(args, "host (JAX), CUDA events (torch)")
    clock = harness.device_ms(args)
    for shape in SMOKE if args.smoke else SHAPES:
        arrays = inputs(shape)
        vocabulary = shape[2]
        classes = jnp.arange(CLASSES) * (vocabulary // CLASSES)
        want = oracle(*arrays, classes)
        harness.say(shape, "oracle")
        cell = {"shape": list(shape), "results": {}}
        result["cells"].append(cell)
        runs = {
            name: functools.partial(run_jax, *each, arrays, classes, want, clock)
            for name, each in jax_contenders().items()
        }
        if torch is not None:
            for name, f in torch_contenders(torch).items():
                rest = (f, arrays, classes, want)
                runs[name] = functools.partial(run_torch, torch, *rest)
        if args.contenders:
            runs = {name: runs[name] for name in runs if name in args.contenders}
        harness.run_all(runs, cell, result, args, torch, shape)
        del arrays, runs
    return result


# --- what is written ------------------------------------------------------------------


def products(name):
    return {"forward": 1, "frozen weights": 2}.get(name, 3)


def row(name, found, shape):
    if "not_run" in found:
        return report.not_run(name, found, len(HEADER))
    flops = products(name) * 2 * np.prod(shape, dtype=np.float64)
    worst = found.get("error")
    return [
        name,
        f"{found['ms']:.1f}",
        f"{flops / found['ms'] / 1e9:,.0f}",
        f"{found['kernels_ms']:.1f}" if found["kernels_ms"] else "",
        report.megabytes(found["extra_bytes"]),
        "" if worst is None else f"{worst:.1e}",
    ]


HEADER = ["", "ms", "TFLOP/s", "kernels, ms", "memory beyond", "gradients' error"]


def markdown(result):
    lines = report.heading(
        "Linear + cross-entropy", result, "The first five rows are ours."
    )
    for cell in result["cells"]:
        tokens, hidden, vocabulary = cell["shape"]
        gradients = 2 * hidden * (tokens + vocabulary)
        lines += [
            f"## T = {tokens:,}, H = {hidden:,}, V = {vocabulary:,}",
            "",
            f"The gradients are {report.megabytes(gradients)}; bfloat16 logits would "
            f"be {report.megabytes(2 * tokens * vocabulary)}.",
            "",
            *report.table(
                HEADER,
                [row(name, r, cell["shape"]) for name, r in cell["results"].items()],
            ),
            "",
        ]
    return "\n".join(lines)


def draw(result, path):
    """Time against memory: one panel a shape, one point a contender."""
    plt = report.pyplot()

    cells = result["cells"]
    figure, panels = plt.subplots(
        1, len(cells), figsize=(3.6 * len(cells) + 2, 4), layout="constrained"
    )
    mine = ("default", "memory first", "per example")
    names = [name for name in cells[0]["results"] if products(name) == 3]
    for axes, cell in zip(np.atleast_1d(panels), cells, strict=True):
        for name, marker in zip(names, "osDvP^<>X", strict=False):
            found = cell["results"].get(name, {})
            if "ms" not in found:
                continue
            colour = "C0" if name in mine else "0.5"
            point = (found["extra_bytes"] / 1e9, found["ms"])
            axes.plot(*point, marker, color=colour, ms=7, alpha=0.8, label=name)
        tokens, hidden, vocabulary = cell["shape"]
        axes.set_title(f"T {tokens}, H {hidden}, V {vocabulary}", fontsize=9)
        axes.set_xlabel("GB beyond the gradients")
        axes.margins(x=0.1)
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
    first = np.atleast_1d(panels)[0]
    first.set_ylabel("ms, loss and gradients (less is better)")
    handles, labels = first.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8)
    figure.suptitle(f"Linear + cross-entropy on {result['device']}", fontsize=10)
    figure.savefig(path, dpi=110)


def add_arguments(parser):
    parser.add_argument("--contenders", nargs="+", help="some of them, by name")


if __name__ == "__main__":
    harness.main(__doc__, harness.Program(measure, markdown, draw, add_arguments))
