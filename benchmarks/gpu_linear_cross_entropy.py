"""Times linear + cross-entropy on a GPU: the mean loss and its gradients.

    python benchmarks/gpu_linear_cross_entropy.py --json F.json --markdown F.md
    python benchmarks/gpu_linear_cross_entropy.py --cases 0 1 --json F.json
    python benchmarks/gpu_linear_cross_entropy.py --render F.json --markdown F.md

XLA tries its products on the device while it compiles: a second or two per program, and
ten where a product takes as long as those of the last case. A run may have some of the
cases, by their places, and several are rendered as one.

Every contender computes the mean cross-entropy of ``x @ weights`` for `x` [T, H] and
`weights`, bfloat16 where nothing else is said, and the gradients of both. Ours:

- ``default``: reduction="mean", the gradients from the pass that computes the loss;
- ``memory first``: the same with a memory_budget of 64 MiB;
- ``per example``: reduction="none", then the mean; ``frozen weights``: no gradient of
  the weights; ``forward``: the loss alone.

Others: the dense form in JAX, with optax's loss on logits in bfloat16 and in float32,
and with this library's loss on logits; torch's, eager and compiled; those of Liger
Kernel and of Apple's cut_cross_entropy, where they are installed.

A second table is of log-probabilities and entropy of many tokens, as for reinforcement
learning: `linear_token_logprobs_and_entropy` against log_softmax of dense logits, the
values alone and with the gradients of a sum.

TFLOP/s counts the products that a contender needs at least: three of 2 T H V each, two
with frozen weights, one for the values alone. Memory is what is needed beyond the
arguments and the gradients: XLA's own figure for the compiled program, torch's peak.
Time: by the host's clock, of calls that follow each other for a tenth of a second, in
turn with the others'; the median of the turns (torch: CUDA events). Products in a row
reach the card's power limit, and it lowers its clock: ``first, ms`` is a call after a
pause. Errors are against float32 products of the highest precision, of the gradients of
4 tokens and of 64 classes, relative to the largest entry of each row or column; the
worst. They are looked at where there are more than a few contenders, and in float32.
"""

import concurrent.futures
import dataclasses
import functools
import statistics
import time

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import report

import jaxsoftmax

MEMORY_FIRST = 2**26
# Turns of so many seconds, and the pause before what is timed on its own.
ROUNDS, TURN, PAUSE = 6, 0.12, 0.2
TOKENS = [0, 1, -2, -1]
CLASSES = 64
ours = jaxsoftmax.linear_softmax_cross_entropy


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes, and which contenders there are for them; all if None is said."""

    shape: tuple[int, int, int]  # T, H, V
    contenders: tuple[str, ...] | None = None
    dtype: str = "bfloat16"

    @property
    def exact(self):
        return self.contenders != FEW or self.dtype == "float32"


DENSE = ("dense", "dense, our loss")
FEW = ("default", *DENSE)
SOME = ("default", "memory first", "per example", *DENSE)
CASES = [
    Case((8192, 4096, 128256)),
    Case((16384, 2048, 151936), SOME),
    Case((2048, 8192, 32000), SOME),
    Case((2048, 4096, 128256), FEW),
    Case((32768, 4096, 128256), FEW),
    Case((8192, 2048, 128256), FEW),
    Case((8192, 4096, 151936), FEW),
    Case((8192, 4096, 50257), FEW),
    Case((16384, 768, 50304), FEW),
    Case((8192, 4096, 50304), FEW, "float32"),
]
SMOKE = [Case((64, 32, 1000)), Case((64, 32, 1000), FEW, "float32")]
# Of log-probabilities and entropy.
MANY = (65536, 2048, 151936)
MANY_SMOKE = (64, 32, 1000)


def mean(**options):
    return lambda x, w, y: ours(x, y, w, reduction="mean", **options)


def dense(dtype=None):
    def loss(x, w, y):
        logits = jnp.dot(x, w, preferred_element_type=dtype)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    return loss


def dense_ours(x, w, y):
    return jaxsoftmax.softmax_cross_entropy_with_integer_labels(
        x @ w, y, reduction="mean"
    )


def contenders():
    """name -> (function of x, weights and labels, arguments that have a gradient)."""
    return {
        "default": (mean(), (0, 1)),
        "memory first": (mean(memory_budget=MEMORY_FIRST), (0, 1)),
        "per example": (lambda x, w, y: ours(x, y, w).mean(), (0, 1)),
        "frozen weights": (mean(), (0,)),
        "forward": (mean(), ()),
        "dense": (dense(), (0, 1)),
        "dense, our loss": (dense_ours, (0, 1)),
        "dense, float32 logits": (dense(jnp.float32), (0, 1)),
    }


def by_log_softmax(x, w, y):
    logp = jax.nn.log_softmax((x @ w).astype(jnp.float32))
    entropy = -jnp.sum(jnp.exp(logp) * logp, -1)
    return jnp.take_along_axis(logp, y[:, None], -1)[:, 0], entropy


def by_ours(x, w, y):
    return jaxsoftmax.linear_token_logprobs_and_entropy(x, y, w)[:2]


def by_dense_ours(x, w, y):
    return jaxsoftmax.token_logprobs_and_entropy(x @ w, y)[:2]


def many_contenders():
    """As `contenders`, of functions that give log-probabilities and entropy."""

    def objective(f, x, w, y):
        logprobs, entropy = f(x, w, y)
        advantages = jnp.cos(jnp.arange(y.size, dtype=jnp.float32))
        return jnp.mean(logprobs * advantages + 0.01 * entropy)

    found = {}
    for name, f in (
        ("ours", by_ours),
        ("log_softmax", by_log_softmax),
        ("dense, our function", by_dense_ours),
    ):
        found[f"{name}, values"] = (functools.partial(objective, f), ())
        found[f"{name}, gradients"] = (functools.partial(objective, f), (0, 1))
    return found


# --- what is exact --------------------------------------------------------------------


def oracle(x, w, y):
    """The gradients of some tokens and of some classes."""
    count = x.shape[0]
    tokens = np.array(TOKENS)
    classes = jnp.array(places(w.shape[1]))
    x, w = x.astype(jnp.float32), w.astype(jnp.float32)
    dot = functools.partial(jnp.dot, precision="highest")

    def chunk_gradient(rows):
        x, y = rows
        logits = dot(x, w)
        lse = jax.nn.logsumexp(logits, -1, keepdims=True)
        p = jnp.exp(logits[:, classes] - lse)
        return (p - (y[:, None] == classes)) / count

    size = min(1024, count)
    rows = (x.reshape(-1, size, x.shape[1]), y.reshape(-1, size))
    d = jax.lax.map(chunk_gradient, rows).reshape(count, -1)
    p = jax.nn.softmax(dot(x[tokens], w))
    of_tokens = p.at[np.arange(len(TOKENS)), y[tokens]].add(-1) / count
    return dot(of_tokens, w.T), dot(x.T, d)


def places(vocabulary):
    """The classes whose gradients are compared."""
    return np.arange(min(CLASSES, vocabulary)) * (vocabulary // CLASSES)


def error(dx, dw, want):
    """The worst, relative to a token's or a class's largest entry."""
    want = [np.asarray(each, np.float64) for each in want]
    found = [harness.row_error(dx, want[0])]
    if dw is not None:
        found.append(harness.row_error(dw.T, want[1].T))
    return max(found)


def look(results, want):
    """The error of the gradients among the results of a program."""
    dx, *dw = results
    dx = dx[jnp.array(TOKENS)].astype(jnp.float32)
    at = places(dw[0].shape[1]) if dw else None
    return error(dx, dw[0][:, at].astype(jnp.float32) if dw else None, want)


# --- runs -----------------------------------------------------------------------------


def structs(case):
    tokens, hidden, vocabulary = case.shape
    like = jax.ShapeDtypeStruct
    return (
        like((tokens, hidden), case.dtype),
        like((hidden, vocabulary), case.dtype),
        like((tokens,), jnp.int32),
    )


def inputs(case):
    tokens, hidden, vocabulary = case.shape
    x = harness.normal(0, tokens * hidden, case.dtype).reshape(tokens, hidden)
    w = harness.normal(1, hidden * vocabulary, case.dtype).reshape(hidden, vocabulary)
    # Logits of scale 3 or so.
    w = jax.jit(lambda w: (w * (3 / hidden**0.5)).astype(w.dtype))(w)
    y = jax.random.randint(jax.random.key(2), (tokens,), 0, vocabulary)
    return x, w, y


def compiling(pool, case, f, moving=(), **options):
    def lower():
        g = jax.value_and_grad(f, moving) if moving else f
        return [jax.jit(g).lower(*structs(case))]

    return harness.Compiling(pool, lower, options=options)


def first_ms(call):
    """Of calls after a pause, for the time before the card lowers its clock."""
    once = harness.seconds(call)
    time.sleep(PAUSE)
    return harness.wall_us(max(1, int(TURN / 4 / once)), call)[0] / 1e3


def run(programs, moving, arrays, want):
    """What is known of the programs of a case, by name."""
    found, calls = {}, {}
    for name, each in programs.items():
        try:
            (compiled,) = each.programs()
            result = jax.block_until_ready(compiled(*arrays))
        except Exception as problem:
            found[name] = {"not_run": harness.reason(problem)}
            continue
        extra = compiled.memory_analysis().temp_size_in_bytes
        value = result[0] if moving[name] else result
        found[name] = {
            "compile_s": round(each.seconds, 2),
            "loss": float(value),
            "extra_bytes": int(extra),
        }
        if moving[name] and want is not None:
            found[name]["error"] = look(result[1], want)
        del result
        calls[name] = functools.partial(compiled, *arrays)
    for name, seconds in harness.in_turn(calls, ROUNDS, TURN).items():
        found[name]["ms"] = 1e3 * statistics.median(seconds)
    for name, call in calls.items():
        found[name]["first_ms"] = first_ms(call)
        harness.say(name, found[name])
    return found


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


def run_torch(torch, f, arrays, want):
    x, w, y = (torch.from_dlpack(a) for a in arrays)
    x = x.detach().clone().requires_grad_(True)
    # torch's layers have [V, H].
    w = w.T.contiguous().detach().requires_grad_(True)
    at = torch.tensor(places(w.shape[0]))

    def gradient_errors(x, w):
        dx, dw = x.grad[TOKENS], w.grad[at].T
        return error(dx.float().cpu().numpy(), dw.float().cpu().numpy(), want)

    found = harness.run_torch(torch, f, [x, w], y.long(), gradient_errors)
    return found | {"first_ms": None}


def measure(args):
    torch, result = harness.start(args, "host (JAX), CUDA events (torch)")
    result["many"] = []
    pool = concurrent.futures.ThreadPoolExecutor()
    cases = SMOKE if args.smoke else CASES
    chosen = range(len(cases) + 1) if args.cases is None else args.cases
    todo = [(cases[i], contenders(), "cells") for i in chosen if i < len(cases)]
    if len(cases) in chosen:
        many = Case(MANY_SMOKE if args.smoke else MANY, FEW)
        todo.append((many, many_contenders(), "many"))
    for case, found, key in todo:
        kept = key == "many" or case.contenders is None
        names = [n for n in found if kept or n in case.contenders]
        programs = {n: compiling(pool, case, *found[n]) for n in names}
        exact = None
        if case.exact:
            # Products that run once: none is chosen by trying.
            exact = compiling(pool, case, oracle, xla_gpu_autotune_level=0)
        for each in (*programs.values(), *([exact] if exact else [])):
            each.wait()  # what else runs meanwhile would be timed, too
        harness.say("compiled", case)
        cell = {"shape": list(case.shape), "dtype": case.dtype, "results": {}}
        result[key].append(cell)
        arrays = inputs(case)
        want = exact.programs()[0](*arrays) if exact else None
        moving = {name: places for name, (_, places) in found.items()}
        cell["results"] = run(programs, moving, arrays, want)
        if torch is not None and case.contenders is None:
            runs = {
                name: functools.partial(run_torch, torch, f, arrays, want)
                for name, f in torch_contenders(torch).items()
            }
            harness.run_all(runs, cell, result, args, torch, case)
        harness.write(args.json, result)
        del programs, exact, arrays, want
    return result


# --- what is written ------------------------------------------------------------------


def products(name):
    alone = name == "forward" or name.endswith("values")
    return 1 if alone else 2 if name == "frozen weights" else 3


def row(name, found, shape):
    if "not_run" in found:
        return report.not_run(name, found, len(HEADER))
    flops = products(name) * 2 * np.prod(shape, dtype=np.float64)
    worst = found.get("error")
    return [
        name,
        f"{found['ms']:.1f}",
        f"{flops / found['ms'] / 1e9:,.0f}",
        f"{found['first_ms']:.1f}" if found["first_ms"] else "",
        report.megabytes(found["extra_bytes"]),
        "" if worst is None else f"{worst:.1e}",
    ]


HEADER = ["", "ms", "TFLOP/s", "first, ms", "memory beyond", "gradients' error"]


def sizes(cell):
    tokens, hidden, vocabulary = cell["shape"]
    dtype = ", float32" if cell["dtype"] == "float32" else ""
    return f"T = {tokens:,}, H = {hidden:,}, V = {vocabulary:,}{dtype}"


def markdown(result):
    note = "The rows before those of the dense form are ours."
    lines = report.heading("Linear + cross-entropy", result, note)
    lines += ratios(result)
    for cell in (*result["cells"], *result["many"]):
        tokens, hidden, vocabulary = cell["shape"]
        itemsize = np.dtype(cell["dtype"] if cell["dtype"] == "float32" else "int16")
        gradients = itemsize.itemsize * hidden * (tokens + vocabulary)
        logits = itemsize.itemsize * tokens * vocabulary
        of = ", log-probabilities and entropy" if cell in result["many"] else ""
        lines += [
            f"## {sizes(cell)}{of}",
            "",
            f"The gradients are {report.megabytes(gradients)}; logits in this dtype "
            f"would be {report.megabytes(logits)}.",
            "",
            *report.table(
                HEADER,
                [row(name, r, cell["shape"]) for name, r in cell["results"].items()],
            ),
            "",
        ]
    return "\n".join(lines)


def ratios(result):
    """The default against the dense form, with optax's loss and with ours."""
    rows = []
    for cell in result["cells"]:
        found = cell["results"]
        if any("ms" not in found.get(name, {}) for name in FEW):
            continue
        mine = found["default"]
        rows.append([sizes(cell)])
        for name in DENSE:
            each = found[name]
            rows[-1] += [
                f"{mine['ms'] / each['ms']:.3f}",
                f"{mine['first_ms'] / each['first_ms']:.3f}",
            ]
        rows[-1].append(f"{mine['extra_bytes'] / found['dense']['extra_bytes']:.2f}")
    header = ["", "/ dense", "first", "/ dense, our loss", "first", "memory"]
    if not rows:
        return []
    return ["## The default over the dense form", "", *report.table(header, rows), ""]


def draw(result, path):
    """Time against memory: one panel a shape, one point a contender."""
    plt = report.pyplot()

    cells = [cell for cell in result["cells"] if "memory first" in cell["results"]]
    cells = [cell for cell in cells if cell["dtype"] != "float32"]
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
        axes.set_title(sizes(cell), fontsize=9)
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
    parser.add_argument(
        "--cases", nargs="+", type=int, help="some of them; the last has many tokens"
    )


def merge(results):
    return harness.merged(results, "many")


if __name__ == "__main__":
    harness.main(
        __doc__, harness.Program(measure, markdown, draw, add_arguments, merge)
    )
