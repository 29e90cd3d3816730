"""Times training steps on a GPU, by their softmax, attention and loss.

    python benchmarks/gpu_training_step.py --json F.json --markdown F.md --png F.png
    python benchmarks/gpu_training_step.py --render F.json --markdown F.md --png F.png
    python benchmarks/gpu_training_step.py --without-gpu H200

A step is the loss, its gradient and the update by AdamW, in one jit that donates
parameters and optimizer state. Parameters are float32, products bfloat16. The model is
a GPT-2, in pure JAX, where attention is written with einsums and a softmax, or one
call; and in Flax NNX, whose attention modules take `attention_fn`. Small cases are the
router of a mixture of experts and a classifier. The logits of the last layer are
bfloat16, or float32 where a contender says so.

Time: the median of steps after the first ones, by the host's clock, which waits for
each (of a small case, for every tenth). Memory: XLA's own figure of what the compiled
step needs beside its arguments. Kernels: of one step, by CUPTI.
With ``--without-gpu`` nothing runs: temporary bytes and kernels of the step, compiled
for a card that is not there (the dependency group `for-gpu`).
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import statistics
from collections.abc import Callable

import harness
import jax
import jax.numpy as jnp
import numpy as np
import report
from support import for_gpu, gpt2
from support.gpt2 import Size, by_einsum, normal, optax_loss, our_loss

import jaxsoftmax
from jaxsoftmax.flax import attention_fn

LOW = gpt2.LOW
OPTIMIZER = gpt2.OPTIMIZER
UPDATES = 4  # after which losses are compared


@dataclasses.dataclass(frozen=True)
class Case:
    """What is trained, by each contender.

    Attributes:
      name: As in the tables.
      contenders: By name, the loss of parameters and a batch.
      parameters: Makes the parameters.
      batch: Makes a batch.
      block: How many steps are waited for at once.
      baseline: The contender that ratios are to.
    """

    name: str
    contenders: dict[str, Callable]
    parameters: Callable
    batch: Callable
    block: int = 1
    baseline: str = ""


# --- a GPT-2 --------------------------------------------------------------------------


SIZES = [Size(16, 1024, 768, 12, 12, v) for v in (50304, 50257, 128256)]
SIZES += [Size(4, 2048, 2048, 16, 12, 50304)]
SMOKE = Size(2, 16, 32, 2, 1, 101)


def tokens_of(size):
    shape = size.batch, size.length
    return jax.random.randint(jax.random.key(1), shape, 0, size.vocabulary)


# --- the same in Flax NNX -------------------------------------------------------------


def nnx_model(size, attention):
    """The definition of the model, its parameters, and what else it has."""
    from flax import nnx

    linear = functools.partial(nnx.Linear, use_bias=False, dtype=LOW)
    norm = functools.partial(
        nnx.LayerNorm, dtype=LOW, use_bias=False, use_scale=False, epsilon=1e-5
    )
    d = size.width

    class Block(nnx.Module):
        def __init__(self, rngs):
            self.norms = nnx.List([norm(d, rngs=rngs) for _ in range(2)])
            self.attention = nnx.MultiHeadAttention(
                size.heads,
                d,
                dtype=LOW,
                use_bias=False,
                decode=False,
                attention_fn=attention,
                rngs=rngs,
            )
            self.up = linear(d, 4 * d, rngs=rngs)
            self.down = linear(4 * d, d, rngs=rngs)

        def __call__(self, x):
            x = x + self.attention(self.norms[0](x), is_causal=True)
            return x + self.down(jax.nn.gelu(self.up(self.norms[1](x))))

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.tokens = nnx.Embed(size.vocabulary, d, dtype=LOW, rngs=rngs)
            self.positions = nnx.Embed(size.length, d, dtype=LOW, rngs=rngs)
            self.blocks = nnx.List([Block(rngs) for _ in range(size.layers)])
            self.norm = norm(d, rngs=rngs)
            self.last = linear(d, size.vocabulary, rngs=rngs)

        def hidden(self, tokens):
            x = self.tokens(tokens) + self.positions(jnp.arange(size.length))
            for block in self.blocks:
                x = block(x)
            return self.norm(x).reshape(-1, d)

    return nnx.split(Model(nnx.Rngs(0)), nnx.Param, ...)


def nnx_parameters(size):
    """Normal numbers: XLA compiles the initialisation of all layers for minutes."""
    from flax import nnx

    _, parameters, _ = jax.eval_shape(
        functools.partial(nnx_model, size, nnx.dot_product_attention)
    )
    leaves, tree = jax.tree.flatten(parameters)
    return jax.tree.unflatten(tree, normal(*(leaf.shape for leaf in leaves)))


def in_nnx(size, attention, loss):
    from flax import nnx

    definition, _, others = jax.eval_shape(lambda: nnx_model(size, attention))

    def mean_loss(params, tokens):
        model = nnx.merge(definition, params, others)
        labels = jnp.roll(tokens, -1, 1).reshape(-1)
        return loss(model.hidden(tokens), model.last.kernel[...], labels)

    return mean_loss


# --- attention and losses that are compared -------------------------------------------


def our_linear_loss(x, weights, labels):
    return jaxsoftmax.linear_softmax_cross_entropy(
        x, labels, weights.astype(LOW), reduction="mean"
    )


def attention_of_jax(implementation):
    return functools.partial(
        jax.nn.dot_product_attention, is_causal=True, implementation=implementation
    )


our_attention = functools.partial(jaxsoftmax.dot_product_attention, is_causal=True)
IN_JAX = {
    "jax.nn.softmax, f32; optax": (by_einsum(gpt2.jax_nn), optax_loss),
    "jax.nn.softmax, bf16; optax": (by_einsum(gpt2.jax_nn, LOW), optax_loss),
    "softmax, f32, cast; loss": (by_einsum(gpt2.cast), our_loss),
    "softmax, f32, dtype=bf16; loss": (
        by_einsum(gpt2.in_bfloat16),
        our_loss,
    ),
    "softmax, bf16, scale=; loss": (by_einsum(gpt2.scaled, LOW), our_loss),
    'jax.nn attention "xla"; optax, f32': (
        attention_of_jax("xla"),
        functools.partial(optax_loss, dtype=jnp.float32),
    ),
    'jax.nn attention "cudnn"; optax, f32': (
        attention_of_jax("cudnn"),
        functools.partial(optax_loss, dtype=jnp.float32),
    ),
    "attention; loss": (our_attention, our_loss),
    "attention; loss, f32": (
        our_attention,
        functools.partial(our_loss, dtype=jnp.float32),
    ),
    "attention; linear loss": (our_attention, our_linear_loss),
}
# Of the larger sizes: what jax.nn and optax have, and the forms of ours to choose from.
FEWER = (
    "jax.nn.softmax, f32; optax",
    "softmax, f32, dtype=bf16; loss",
    'jax.nn attention "cudnn"; optax, f32',
    "attention; loss",
    "attention; linear loss",
)
# What a reader may want to see kernel by kernel.
LISTED = 16
SIDE_BY_SIDE = ("jax.nn.softmax, f32; optax", "softmax, f32, dtype=bf16; loss")


def gpt_case(size, names=tuple(IN_JAX)):
    return Case(
        str(size),
        {name: gpt2.mean_loss(size, *IN_JAX[name]) for name in names},
        functools.partial(gpt2.parameters, size),
        functools.partial(tokens_of, size),
        baseline="jax.nn.softmax, f32; optax",
    )


def nnx_case(size):
    from flax import nnx

    its, ours = nnx.dot_product_attention, attention_fn
    return Case(
        f"Flax NNX, {size}",
        {
            "its attention; optax": in_nnx(size, its, optax_loss),
            "attention_fn; loss": in_nnx(size, ours, our_loss),
            "attention_fn; linear loss": in_nnx(size, ours, our_linear_loss),
        },
        functools.partial(nnx_parameters, size),
        functools.partial(tokens_of, size),
        baseline="its attention; optax",
    )


# --- small cases ----------------------------------------------------------------------


def router_case(tokens, width, experts):
    """Top 8 of the experts, each a vector, and the loss that balances their load."""

    def loss(softmax, params, x):
        p = softmax((x @ params["router"].astype(LOW)).astype(jnp.float32))
        gates, chosen = jax.lax.top_k(p, min(8, experts))
        gates = gates / jnp.sum(gates, -1, keepdims=True)
        out = jnp.einsum("tk,tkd->td", gates.astype(LOW), params["experts"][chosen])
        load = jnp.zeros(experts).at[chosen.reshape(-1)].add(1 / chosen.size)
        return jnp.mean(jnp.square(out.astype(jnp.float32))) + 0.01 * experts * jnp.sum(
            load * jnp.mean(p, 0)
        )

    def parameters():
        router, vectors = normal((width, experts), (experts, width))
        return {"router": router, "experts": vectors}

    softmaxes = {"jax.nn": jax.nn.softmax, "jaxsoftmax": jaxsoftmax.softmax}
    return Case(
        f"router, {tokens:,} tokens, {experts} experts",
        {name: functools.partial(loss, f) for name, f in softmaxes.items()},
        parameters,
        lambda: jax.random.normal(jax.random.key(1), (tokens, width), LOW),
        block=10,
        baseline="jax.nn",
    )


def classifier_case(examples, width, classes):
    def batch():
        keys = jax.random.split(jax.random.key(1))
        x = jax.random.normal(keys[0], (examples, width), LOW)
        return x, jax.random.randint(keys[1], (examples,), 0, classes)

    def logits(params, x):
        return (jax.nn.relu(x @ params["in"].astype(LOW)) @ params["out"]).astype(
            jnp.float32
        )

    def by_log_softmax(log_softmax, params, batch):
        x, labels = batch
        y = log_softmax(logits(params, x))
        return -jnp.mean(jnp.take_along_axis(y, labels[:, None], -1))

    def by_loss(params, batch):
        x, labels = batch
        return jaxsoftmax.softmax_cross_entropy_with_integer_labels(
            logits(params, x), labels, reduction="mean"
        )

    def parameters():
        first, last = normal((width, width), (width, classes))
        return {"in": first, "out": last}

    return Case(
        f"classifier, {examples:,} x {classes:,}",
        {
            "jax.nn.log_softmax": functools.partial(by_log_softmax, jax.nn.log_softmax),
            "log_softmax": functools.partial(by_log_softmax, jaxsoftmax.log_softmax),
            "loss": by_loss,
        },
        parameters,
        batch,
        block=10,
        baseline="jax.nn.log_softmax",
    )


def all_cases(smoke):
    if smoke:
        return [
            gpt_case(SMOKE),
            nnx_case(SMOKE),
            router_case(64, 16, 8),
            classifier_case(16, 16, 10),
        ]
    return [
        *map(gpt_case, SIZES[:2]),
        nnx_case(SIZES[0]),
        router_case(16384, 768, 64),
        router_case(16384, 2048, 256),
        classifier_case(4096, 2048, 1000),
        classifier_case(65536, 256, 18),
        *(gpt_case(size, FEWER) for size in SIZES[2:]),
    ]


# --- measuring ------------------------------------------------------------------------


def jitted(case, contender):
    """The step, of a state and a batch, and their shapes."""
    step = gpt2.step(case.contenders[contender])
    params = jax.eval_shape(case.parameters)
    state = params, jax.eval_shape(OPTIMIZER.init, params)
    return step, (state, jax.eval_shape(case.batch))


def lowered(case, contender):
    step, shapes = jitted(case, contender)
    return [step.lower(*shapes)]


def run(compiling, case, name, steps):
    """Milliseconds of a step, its temporary memory, its kernels, and all losses."""
    (compiled,) = compiling[case.name, name].programs()
    params = jax.jit(case.parameters)()
    state, batch = (params, jax.jit(OPTIMIZER.init)(params)), jax.jit(case.batch)()
    losses, seconds = [], []
    for _ in range(steps):
        found = []

        def block(state=state, found=found):
            for _ in range(case.block):
                state, loss = compiled(state, batch)
                found.append(loss)
            found.append(state)
            return found

        seconds.append(harness.seconds(block) / case.block)
        *block_losses, state = found
        losses += map(float, block_losses)
    result = {
        "ms": 1e3 * statistics.median(seconds[steps // 4 :]),
        "temp_gb": compiled.memory_analysis().temp_size_in_bytes / 1e9,
        "compile_s": round(compiling[case.name, name].seconds, 1),
        "losses": losses[:: case.block],
    }
    if jax.default_backend() == "gpu":
        kernels = harness.kernels_ms(lambda: compiled(state, batch))
        count = sum(times for _, times in kernels.values())
        result["kernels"] = kernels if name in SIDE_BY_SIDE else count
    return result


def without_gpu(case, contender, card):
    step, shapes = jitted(case, contender)
    with for_gpu.gpu_by_default():
        found = for_gpu.compiled(step, *shapes, card=card)
    return {"temp_gb": found.temp_bytes / 1e9, "kernels": len(found.kernels)}


def measure(args):
    _, result = harness.start(args, "the host's")
    if args.without_gpu:
        result["device"] = f"{args.without_gpu}, compiled for and not run"
    cases = all_cases(args.smoke)[: args.cases]
    compiling = {}
    if not args.without_gpu:
        pool = concurrent.futures.ThreadPoolExecutor(args.jobs)
        compiling = {
            (case.name, name): harness.Compiling(pool, lowered, case, name)
            for case in cases
            for name in case.contenders
        }
    for program in compiling.values():
        program.wait()  # what compiles is not timed beside
    harness.say(len(compiling), "programs are compiled")
    for case in cases:
        cell = {"case": case.name, "baseline": case.baseline, "results": {}}
        result["cells"].append(cell)
        if args.without_gpu:
            runs = {
                name: functools.partial(without_gpu, case, name, args.without_gpu)
                for name in case.contenders
            }
        else:
            steps = 4 if args.smoke else args.steps
            runs = {
                name: functools.partial(run, compiling, case, name, steps)
                for name in case.contenders
            }
        harness.run_all(runs, cell, result, args, None, case.name)
    return result


def early_loss(found):
    """After so many updates; None where nothing ran."""
    losses = found.get("losses")
    return losses[min(UPDATES, len(losses) - 1)] if losses else None


def failures(result):
    """Contenders that did not run, but for cuDNN's; and that trained otherwise.

    In the first steps: a model that has learned its one batch depends on each rounding.
    """
    for cell in result["cells"]:
        want = early_loss(cell["results"].get(cell["baseline"], {}))
        for name, found in cell["results"].items():
            if "not_run" in found:
                if "cudnn" not in name:
                    yield f"{cell['case']}, {name}: {found['not_run']}"
            elif "losses" in found:
                got = early_loss(found)
                if want is None or not abs(got - want) <= 0.02 * abs(want):
                    yield f"{cell['case']}, {name}: a loss is {got}, not {want}"


# --- the page and the picture ---------------------------------------------------------


def kernels_of(found):
    kernels = found.get("kernels")
    if isinstance(kernels, dict):
        return sum(times for _, times in kernels.values())
    return kernels


def ratio(found, base, key):
    if key not in found or key not in base or not base[key]:
        return ""
    return f"{found[key] / base[key]:.2f}"


def side_by_side(results):
    """The kernels that take longest of two contenders, in two columns."""
    columns = []
    for name in SIDE_BY_SIDE:
        kernels = results.get(name, {}).get("kernels")
        if not isinstance(kernels, dict):
            return []
        columns.append(
            [
                (f"`{kernel[:44]}`", str(times), f"{ms:.2f}")
                for kernel, (ms, times) in list(kernels.items())[:LISTED]
            ]
        )
    rows = [
        [*left, *right]
        for left, right in itertools.zip_longest(*columns, fillvalue=("", "", ""))
    ]
    first, second = SIDE_BY_SIDE
    header = [first, "runs", "ms", second, "runs", "ms"]
    title = f"The {LISTED} kernels that take longest, milliseconds of a step:"
    return [title, "", *report.table(header, rows), ""]


def markdown(result):
    note = (
        "Ratios are to the first of a table. The loss is that after "
        f"{UPDATES} updates, in the dtype that the loss has."
    )
    lines = report.heading("A training step", result, note)
    for cell in result["cells"]:
        base = cell["results"].get(cell["baseline"], {})
        rows = []
        for name, found in cell["results"].items():
            figures = [found.get("ms"), found.get("temp_gb"), kernels_of(found)]
            figures.append(early_loss(found))
            ms, temp, kernels, loss = ("" if f is None else f"{f:.4g}" for f in figures)
            times = ratio(found, base, "ms"), ratio(found, base, "temp_gb")
            why = found.get("not_run", "")
            rows.append([name, ms, times[0], temp, times[1], kernels, loss, why])
        header = ["", "ms", "ratio", "temporary GB", "ratio", "kernels", "loss"]
        header.append("not run")
        lines += [f"## {cell['case']}", "", *report.table(header, rows), ""]
        lines += side_by_side(cell["results"])
    return "\n".join(lines)


def draw(result, path):
    """Time and temporary memory of each contender, a pair of panels a case."""
    plt = report.pyplot()
    cells = [
        c for c in result["cells"] if any("ms" in f for f in c["results"].values())
    ]
    heights = [len(cell["results"]) for cell in cells]
    figure, panels = plt.subplots(
        len(cells),
        2,
        figsize=(9, 0.32 * sum(heights) + 0.7 * len(cells)),
        height_ratios=heights,
        layout="constrained",
        squeeze=False,
    )
    for (left, right), cell in zip(panels, cells, strict=True):
        names = list(cell["results"])[::-1]
        colours = ["0.6" if "jax.nn" in n or "optax" in n else "C0" for n in names]
        places = np.arange(len(names))
        for axes, key, label in (
            (left, "ms", "ms per step"),
            (right, "temp_gb", "temporary GB"),
        ):
            values = [cell["results"][name].get(key, 0) for name in names]
            bars = axes.barh(places, values, color=colours)
            axes.bar_label(bars, [f"{v:.3g}" if v else "" for v in values], fontsize=7)
            axes.set_xlabel(label, fontsize=8)
            axes.tick_params(labelsize=8)
            axes.margins(x=0.12)
            axes.spines[["top", "right"]].set_visible(False)
        left.set_yticks(places, names)
        right.set_yticks(places, [""] * len(names))
        left.set_title(cell["case"], fontsize=9, loc="left")
    figure.suptitle(f"A training step on {result['device']}", fontsize=10)
    figure.savefig(path, dpi=110)


def add_arguments(parser):
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--cases", type=int, help="so many of them")
    parser.add_argument("--jobs", type=int, default=8)
    parser.add_argument("--without-gpu", choices=list(for_gpu.CARDS), metavar="CARD")


if __name__ == "__main__":
    harness.main(
        __doc__,
        harness.Program(
            measure,
            markdown,
            draw,
            add_arguments,
            failures=lambda result: list(failures(result)),
        ),
    )
