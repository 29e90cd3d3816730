"""Times a training step of a GPT-2 on a GPU, by its softmax, attention and loss.

    python benchmarks/gpu_training_step.py --json F.json --markdown F.md
    python benchmarks/gpu_training_step.py --render F.json --markdown F.md
    python benchmarks/gpu_training_step.py --without-gpu H200

A step is the loss, its gradient and the update by AdamW, in one jit that donates
parameters and optimizer state. Parameters are float32, products bfloat16. Attention is
written with einsums and a softmax, or one call; the logits of the last layer are
bfloat16, or float32 where a contender says so.

Time: the median of steps after the first ones, by the host's clock, which waits for
each. Memory: XLA's own figure of what the compiled step needs beside its arguments.
With ``--without-gpu`` nothing runs: temporary bytes and kernels of the step, compiled
for a card that is not there (the dependency group `for-gpu`).
"""

import concurrent.futures
import dataclasses
import functools
import statistics

import harness
import jax
import jax.numpy as jnp
import optax
import report
from support import for_gpu

import jaxsoftmax
from jaxsoftmax._core.device import assumed_device

CARD_NAMES = {"H200": "NVIDIA H200", "A100": "NVIDIA A100-SXM4-80GB"}
LOW = jnp.bfloat16


@dataclasses.dataclass(frozen=True)
class Size:
    batch: int
    length: int
    width: int
    heads: int
    layers: int
    vocabulary: int

    def __str__(self):
        return (
            f"B = {self.batch}, T = {self.length}, {self.layers} x {self.width}, "
            f"V = {self.vocabulary:,}"
        )


SIZES = [Size(16, 1024, 768, 12, 12, v) for v in (50304, 50257, 128256)]
SIZES += [Size(4, 2048, 2048, 16, 12, 50304)]
SMOKE = [Size(2, 16, 32, 2, 2, 101)]


# --- the model ------------------------------------------------------------------------


def parameters(size):
    keys = iter(jax.random.split(jax.random.key(0), 3 + 4 * size.layers))
    d = size.width

    def normal(*shape):
        return 0.02 * jax.random.normal(next(keys), shape)

    return {
        "tokens": normal(size.vocabulary, d),
        "positions": normal(size.length, d),
        "layers": [
            {
                "qkv": normal(d, 3 * d),
                "out": normal(d, d),
                "up": normal(d, 4 * d),
                "down": normal(4 * d, d),
            }
            for _ in range(size.layers)
        ],
        "last": normal(d, size.vocabulary),
    }


def normalized(x):
    wide = x.astype(jnp.float32)
    wide = wide - jnp.mean(wide, -1, keepdims=True)
    variance = jnp.mean(wide * wide, -1, keepdims=True)
    return (wide * jax.lax.rsqrt(variance + 1e-5)).astype(LOW)


def hidden(params, tokens, attention, size):
    """[B T, width]: what the last layer is given."""
    x = (params["tokens"][tokens] + params["positions"]).astype(LOW)
    for layer in jax.tree.map(lambda a: a.astype(LOW), params["layers"]):
        shape = (size.batch, size.length, 3, size.heads, -1)
        q, k, v = jnp.moveaxis((normalized(x) @ layer["qkv"]).reshape(shape), 2, 0)
        x = x + attention(q, k, v).reshape(x.shape) @ layer["out"]
        x = x + jax.nn.gelu(normalized(x) @ layer["up"]) @ layer["down"]
    return normalized(x).reshape(-1, size.width)


# --- what is compared -----------------------------------------------------------------


def by_einsum(softmax, logits_dtype):
    """Attention of a softmax of logits and a causal mask, which gives bfloat16."""

    def attention(q, k, v):
        mask = jnp.tril(jnp.ones((q.shape[1], k.shape[1]), bool))
        logits = jnp.einsum("btnd,bsnd->bnts", q, k).astype(logits_dtype)
        weights = softmax(logits * q.shape[-1] ** -0.5, mask)
        return jnp.einsum("bnts,bsnd->btnd", weights, v)

    return attention


def jax_nn(logits, mask):
    logits = jnp.where(mask, logits, jnp.finfo(logits.dtype).min)
    return jax.nn.softmax(logits).astype(LOW)


def ours_cast(logits, mask):
    return jaxsoftmax.softmax(logits, where=mask).astype(LOW)


def ours_in_bfloat16(logits, mask):
    return jaxsoftmax.softmax(logits, where=mask, dtype=LOW)


def optax_loss(dtype):
    def loss(x, weights, labels):
        logits = (x @ weights.astype(LOW)).astype(dtype)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return loss


def our_loss(x, weights, labels):
    return jaxsoftmax.softmax_cross_entropy_with_integer_labels(
        x @ weights.astype(LOW), labels, reduction="mean"
    )


def our_linear_loss(x, weights, labels):
    return jaxsoftmax.linear_softmax_cross_entropy(
        x, labels, weights.astype(LOW), reduction="mean"
    )


def attention_of_jax(implementation):
    return functools.partial(
        jax.nn.dot_product_attention, is_causal=True, implementation=implementation
    )


our_attention = functools.partial(jaxsoftmax.dot_product_attention, is_causal=True)
CONTENDERS = {
    "jax.nn.softmax, f32; optax": (by_einsum(jax_nn, jnp.float32), optax_loss(LOW)),
    "jax.nn.softmax, bf16; optax": (by_einsum(jax_nn, LOW), optax_loss(LOW)),
    "softmax, f32, cast; loss": (by_einsum(ours_cast, jnp.float32), our_loss),
    "softmax, f32, dtype=bf16; loss": (
        by_einsum(ours_in_bfloat16, jnp.float32),
        our_loss,
    ),
    "softmax, bf16; loss": (by_einsum(ours_in_bfloat16, LOW), our_loss),
    'jax.nn attention "xla"; optax, f32': (
        attention_of_jax("xla"),
        optax_loss(jnp.float32),
    ),
    'jax.nn attention "cudnn"; optax, f32': (
        attention_of_jax("cudnn"),
        optax_loss(jnp.float32),
    ),
    "attention; loss": (our_attention, our_loss),
    "attention; linear loss": (our_attention, our_linear_loss),
}
OPTIMIZER = optax.adamw(3e-4)


def jitted(contender, size):
    """The step, of a state and tokens, and their shapes."""
    attention, loss = CONTENDERS[contender]

    def step(state, tokens):
        params, optimizer_state = state

        def mean_loss(params):
            x = hidden(params, tokens, attention, size)
            return loss(x, params["last"], jnp.roll(tokens, -1, 1).reshape(-1))

        value, gradient = jax.value_and_grad(mean_loss)(params)
        updates, optimizer_state = OPTIMIZER.update(gradient, optimizer_state, params)
        return (optax.apply_updates(params, updates), optimizer_state), value

    params = jax.eval_shape(functools.partial(parameters, size))
    state = params, jax.eval_shape(OPTIMIZER.init, params)
    tokens = jax.ShapeDtypeStruct((size.batch, size.length), jnp.int32)
    return jax.jit(step, donate_argnums=0), (state, tokens)


def lowered(contender, size):
    step, shapes = jitted(contender, size)
    return step.lower(*shapes)


# --- measuring ------------------------------------------------------------------------


def run(compiling, size, steps):
    """Milliseconds of a step, its temporary memory, its kernels, and all losses."""
    (compiled,) = compiling.programs()
    params = jax.jit(parameters, static_argnums=0)(size)
    state = params, jax.jit(OPTIMIZER.init)(params)
    shape = size.batch, size.length
    tokens = jax.random.randint(jax.random.key(1), shape, 0, size.vocabulary)
    losses, seconds = [], []
    for _ in range(steps):
        held = []

        def one(state=state, held=held):
            held[:] = compiled(state, tokens)
            return held

        seconds.append(harness.seconds(one))
        state, loss = held
        losses.append(float(loss))
    found = {
        "ms": 1e3 * statistics.median(seconds[steps // 4 :]),
        "temp_gb": compiled.memory_analysis().temp_size_in_bytes / 1e9,
        "compile_s": round(compiling.seconds, 1),
        "losses": losses,
    }
    if jax.default_backend() == "gpu":
        found["kernels"] = harness.kernels_ms(lambda: compiled(state, tokens))
    return found


def without_gpu(contender, size, card):
    step, shapes = jitted(contender, size)
    with assumed_device(CARD_NAMES[card]):
        found = for_gpu.compiled(step, *shapes, card=card)
    return {"temp_gb": found.temp_bytes / 1e9, "kernels": len(found.kernels)}


def measure(args):
    _, result = harness.start(args, "the host's")
    if args.without_gpu:
        result["device"] = f"{args.without_gpu}, compiled for and not run"
    pool = concurrent.futures.ThreadPoolExecutor(args.jobs)
    for size in SMOKE if args.smoke else SIZES[: args.sizes]:
        cell = {"size": str(size), "results": {}}
        result["cells"].append(cell)
        if args.without_gpu:
            runs = {
                name: functools.partial(without_gpu, name, size, args.without_gpu)
                for name in CONTENDERS
            }
        else:
            compiling = {
                name: harness.Compiling(pool, lambda *a: [lowered(*a)], name, size)
                for name in CONTENDERS
            }
            for program in compiling.values():
                program.wait()  # what compiles is not timed beside
            steps = 4 if args.smoke else args.steps
            runs = {
                name: functools.partial(run, program, size, steps)
                for name, program in compiling.items()
            }
        harness.run_all(runs, cell, result, args, None, str(size))
    return result


def markdown(result):
    lines = report.heading("A training step", result, __doc__.splitlines()[0])
    for cell in result["cells"]:
        rows = []
        for name, found in cell["results"].items():
            kernels = found.get("kernels")
            if isinstance(kernels, dict):
                kernels = sum(times for _, times in kernels.values())
            figures = found.get("ms"), found.get("temp_gb"), kernels
            loss = found["losses"][-1] if "losses" in found else None
            words = ["" if f is None else f"{f:.4g}" for f in (*figures, loss)]
            rows.append([name, *words, found.get("not_run", "")])
        header = ["", "ms", "temporary GB", "kernels", "last loss", "not run"]
        lines += [f"## {cell['size']}", "", *report.table(header, rows), ""]
    return "\n".join(lines)


def add_arguments(parser):
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--sizes", type=int, default=len(SIZES))
    parser.add_argument("--jobs", type=int, default=8)
    parser.add_argument("--without-gpu", choices=list(for_gpu.CARDS), metavar="CARD")


if __name__ == "__main__":
    program = harness.Program(measure, markdown, None, add_arguments)
    harness.main(__doc__, program)
