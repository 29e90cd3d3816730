"""Train a small language model many times, with one softmax and with another.

The model is a decoder of 5.3 million parameters in Flax NNX. Its text is the source
code of Python's standard library, so nothing is downloaded. Every contender is trained
from the same parameters on the same batches, with several seeds, in float32 and in
bfloat16, and in two settings: as usual, and with attention logits of large scale. Along
the way the derivative of each run is compared with the same model's in float64.

    python examples/training_evidence.py --quick          # a minute on a CPU
    python examples/training_evidence.py --json FILE      # wants a GPU
    python examples/training_evidence.py --json FILE --contenders jax.nn --seeds 3

`--json FILE` adds to the runs that FILE has already, so that parts can be made apart.
`benchmarks/training_page.py` makes the pictures and tables of docs/training.md from it.
Needs `pip install "jaxsoftmax[examples]"`.
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
import itertools
import json
import pathlib
import platform
import re
import sys
import sysconfig
from collections.abc import Callable, Iterator
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jaxsoftmax

# --- text -----------------------------------------------------------------------------

# A word, a number, a line break with the indentation after it, spaces, or a run of one
# punctuation mark.
TOKEN = re.compile(r"[A-Za-z_]+|[0-9]+|\n *|([^\w\s])\1*| +")
NOT_TEXT = {"site-packages", "test", "tests", "idle_test", "__pycache__"}
TEST_EVERY = 20  # one file in this many is kept for validation


@dataclasses.dataclass(frozen=True)
class Text:
    """Numbers of tokens, one file after another."""

    train: np.ndarray
    test: np.ndarray
    files: int


def standard_library() -> list[str]:
    """The source files of the standard library, without its tests."""
    folder = pathlib.Path(sysconfig.get_paths()["stdlib"])
    paths = (path.relative_to(folder) for path in sorted(folder.rglob("*.py")))
    return [
        (folder / path).read_text(encoding="utf-8", errors="replace")
        for path in paths
        if not NOT_TEXT & set(path.parts)
    ]


def tokenized(sources: list[str], vocabulary: int) -> Text:
    """The most frequent tokens get a number each; 0 stands for all others."""
    files = [[match.group() for match in TOKEN.finditer(s)] for s in sources]
    counts = collections.Counter(token for file in files for token in file)
    frequent = counts.most_common(vocabulary - 1)
    index = {token: i for i, (token, _) in enumerate(frequent, start=1)}
    numbers = [np.array([index.get(t, 0) for t in file], np.int32) for file in files]
    train = [file for i, file in enumerate(numbers) if i % TEST_EVERY]
    return Text(
        np.concatenate(train), np.concatenate(numbers[::TEST_EVERY]), len(files)
    )


# --- contenders -----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Contender:
    """What a run computes its softmaxes with.

    Attributes:
      softmax: Of the attention logits.
      loss: Mean cross-entropy of hidden states [B, T, W], labels [B, T], head [W, V].
      attention: In place of the matrix products and `softmax`, where given.
      custom_jvp: The flag jax_softmax_custom_jvp.
      reverse: Put the rows of every batch in the opposite order: the same mathematics,
        rounded elsewhere.
    """

    name: str
    softmax: Callable[..., jax.Array]
    loss: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    attention: Callable[..., jax.Array] | None = None
    custom_jvp: bool = False
    reverse: bool = False

    @contextlib.contextmanager
    def flag(self) -> Iterator[None]:
        """The flag as this contender wants it, where its functions are traced."""
        before = jax.config.jax_softmax_custom_jvp
        jax.config.update("jax_softmax_custom_jvp", self.custom_jvp)
        try:
            yield
        finally:
            jax.config.update("jax_softmax_custom_jvp", before)


def optax_loss(hidden: jax.Array, labels: jax.Array, head: jax.Array) -> jax.Array:
    logits = hidden @ head
    if logits.dtype == jnp.bfloat16:
        logits = logits.astype(jnp.float32)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.mean(loss)


def our_loss(hidden: jax.Array, labels: jax.Array, head: jax.Array) -> jax.Array:
    return jaxsoftmax.softmax_cross_entropy_with_integer_labels(
        hidden @ head, labels, reduction="mean"
    )


def our_linear_loss(hidden: jax.Array, labels: jax.Array, head: jax.Array) -> jax.Array:
    return jaxsoftmax.linear_softmax_cross_entropy(
        hidden, labels, head, reduction="mean"
    )


CONTENDERS = [
    Contender("jaxsoftmax", jaxsoftmax.softmax, our_loss),
    Contender(
        "jaxsoftmax, fused",
        jaxsoftmax.softmax,
        our_linear_loss,
        attention=functools.partial(jaxsoftmax.dot_product_attention, is_causal=True),
    ),
    Contender("jax.nn", jax.nn.softmax, optax_loss),
    Contender("jax.nn, flag", jax.nn.softmax, optax_loss, custom_jvp=True),
    Contender("jax.nn, reversed", jax.nn.softmax, optax_loss, reverse=True),
]
BY_NAME = {contender.name: contender for contender in CONTENDERS}


# --- model ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of the model and of its batches."""

    vocabulary: int = 4096
    length: int = 256
    width: int = 256
    depth: int = 64  # of a head
    blocks: int = 4
    batch: int = 16
    test_batches: int = 16
    probe_rows: int = 4  # rows of the batch whose derivative is compared

    @property
    def heads(self) -> int:
        return self.width // self.depth


FULL = Shape()
QUICK = Shape(
    vocabulary=512,
    length=32,
    width=64,
    depth=32,
    blocks=2,
    batch=4,
    test_batches=2,
    probe_rows=2,
)


class Attention(nnx.Module):
    """Causal self-attention; nothing normalizes queries and keys."""

    def __init__(self, shape: Shape, contender: Contender, dtype, rngs: nnx.Rngs):
        self.shape = shape
        self.contender = contender
        self.inputs = nnx.Linear(
            shape.width, 3 * shape.width, use_bias=False, dtype=dtype, rngs=rngs
        )
        self.output = nnx.Linear(
            shape.width, shape.width, use_bias=False, dtype=dtype, rngs=rngs
        )

    def __call__(self, x: jax.Array, tap: jax.Array | None, seen: list) -> jax.Array:
        """`tap` is added to the probabilities; the logits are put into `seen`."""
        shape = self.shape
        query, key, value = jnp.split(self.inputs(x), 3, axis=-1)
        query, key, value = (
            a.reshape(*a.shape[:2], shape.heads, shape.depth)
            for a in (query, key, value)
        )
        if self.contender.attention is not None and tap is None:
            out = self.contender.attention(query, key, value)
        else:
            logits = jnp.einsum("bthd,bshd->bhts", query, key) / shape.depth**0.5
            seen.append(logits)
            causal = jnp.tri(x.shape[1], dtype=bool)
            p = self.contender.softmax(logits, axis=-1, where=causal)
            p = p if tap is None else p + tap
            out = jnp.einsum("bhts,bshd->bthd", p, value)
        return self.output(out.reshape(x.shape))


class Block(nnx.Module):
    def __init__(self, shape: Shape, contender: Contender, dtype, rngs: nnx.Rngs):
        width = shape.width
        self.norm_1 = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
        self.attention = Attention(shape, contender, dtype, rngs)
        self.norm_2 = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
        self.widen = nnx.Linear(width, 4 * width, dtype=dtype, rngs=rngs)
        self.narrow = nnx.Linear(4 * width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, tap: jax.Array | None, seen: list) -> jax.Array:
        x = x + self.attention(self.norm_1(x), tap, seen)
        return x + self.narrow(jax.nn.gelu(self.widen(self.norm_2(x))))


class Decoder(nnx.Module):
    """Parameters are float32 (float64 for the oracle); `dtype` is that of the rest."""

    def __init__(self, shape: Shape, contender: Contender, dtype, rngs: nnx.Rngs):
        self.shape = shape
        self.contender = contender
        self.dtype = dtype
        self.embed = nnx.Embed(shape.vocabulary, shape.width, dtype=dtype, rngs=rngs)
        self.positions = nnx.Embed(shape.length, shape.width, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List(
            [Block(shape, contender, dtype, rngs) for _ in range(shape.blocks)]
        )
        self.norm = nnx.LayerNorm(shape.width, dtype=dtype, rngs=rngs)
        head = jax.random.normal(rngs.params(), (shape.width, shape.vocabulary))
        self.head = nnx.Param(head / shape.width**0.5)

    def loss(self, rows: jax.Array, taps: Any = None, seen: Any = None) -> jax.Array:
        """Mean cross-entropy of rows [B, length + 1]."""
        tokens, labels = rows[:, :-1], rows[:, 1:]
        seen = [] if seen is None else seen
        x = self.embed(tokens) + self.positions(jnp.arange(tokens.shape[1]))
        for i, block in enumerate(self.blocks):
            x = block(x, None if taps is None else taps[i], seen)
        head = self.head[...].astype(self.dtype)
        return self.contender.loss(self.norm(x), labels, head)


# --- training -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Setting:
    """How a run trains.

    Attributes:
      peak: Peak learning rate of AdamW, between a warm-up and a cosine decay.
      factor: Of the first query and key weights; the first logits grow by its square.
    """

    peak: float
    factor: float


SETTINGS = {
    "usual": Setting(peak=1e-3, factor=1.0),
    "large logits": Setting(peak=3e-3, factor=5.0),
}
WEIGHT_DECAY = 0.1
CHUNK = 250  # steps of one compiled loop, after which the run is looked at


def random_rows(tokens: jax.Array, key: jax.Array, count: int, length: int):
    """[count, length + 1] tokens from random places."""
    starts = jax.random.randint(key, (count,), 0, len(tokens) - length)
    return tokens[starts[:, None] + jnp.arange(length + 1)]


def with_large_logits(params: Any, shape: Shape, factor: float) -> Any:
    """`params` with all query and key weights times `factor`."""
    columns = jnp.where(jnp.arange(3 * shape.width) < 2 * shape.width, factor, 1.0)

    def scaled(path, leaf):
        names = [getattr(part, "key", None) for part in path]
        return leaf * columns if "inputs" in names else leaf

    return jax.tree_util.tree_map_with_path(scaled, params)


class Trainer:
    """The compiled functions of one contender in one dtype, for every setting."""

    def __init__(self, contender: Contender, dtype: str, shape: Shape, steps: int):
        self.contender, self.shape, self.steps = contender, shape, steps
        self.dtype = jnp.dtype(dtype)

        def make(seed):
            rngs = nnx.Rngs(jax.random.key(seed))
            return Decoder(shape, contender, self.dtype, rngs)

        self.make_params = jax.jit(lambda seed: nnx.state(make(seed)))
        self.graph = nnx.graphdef(nnx.eval_shape(lambda: make(0)))
        self.adam = optax.scale_by_adam(b2=0.95)
        self.chunk = jax.jit(self._chunk, donate_argnums=0)
        self.validate = jax.jit(self._validate)
        self.gradients = jax.jit(self._gradients)
        # By itself: XLA may hand the softmax of one program logits that are not
        # rounded to bfloat16, where they are computed in it.
        self.derivative = jax.jit(self._derivative)

    def loss(self, params: Any, rows: jax.Array, **recorded: Any) -> jax.Array:
        return nnx.merge(self.graph, params).loss(rows, **recorded)

    def start(self, seed: int, setting: Setting) -> Any:
        params = self.make_params(seed)
        params = with_large_logits(params, self.shape, setting.factor)
        return params, self.adam.init(params), jnp.zeros((), jnp.int32)

    def rows_of_step(self, tokens: jax.Array, seed: jax.Array, step: jax.Array):
        key = jax.random.fold_in(jax.random.key(seed), step)
        rows = random_rows(tokens, key, self.shape.batch, self.shape.length)
        return rows[::-1] if self.contender.reverse else rows

    def learning_rate(self, step: jax.Array) -> jax.Array:
        """As a share of the peak."""
        warmup = self.steps // 20
        schedule = optax.warmup_cosine_decay_schedule(0.0, 1.0, warmup, self.steps, 0.1)
        return schedule(step + 1)

    def _step(self, tokens, seed, peak, carry, _):
        params, adam, step = carry
        rows = self.rows_of_step(tokens, seed, step)
        loss, gradient = jax.value_and_grad(self.loss)(params, rows)
        updates, adam = self.adam.update(gradient, adam)
        rate = peak * self.learning_rate(step)
        params = jax.tree.map(
            lambda p, u: p - rate * (u + WEIGHT_DECAY * p), params, updates
        )
        return (params, adam, step + 1), (loss, optax.tree.norm(gradient))

    def _chunk(self, carry, tokens, seed, peak):
        step = functools.partial(self._step, tokens, seed, peak)
        return jax.lax.scan(step, carry, length=min(CHUNK, self.steps))

    def _validate(self, params, tokens):
        """Mean loss of the same rows every time."""
        keys = jax.random.split(jax.random.key(0), self.shape.test_batches)
        rows = functools.partial(
            random_rows, tokens, count=self.shape.batch, length=self.shape.length
        )
        return jnp.mean(jax.lax.map(lambda key: self.loss(params, rows(key)), keys))

    def _gradients(self, params, rows):
        """Gradient of all parameters, and of every softmax its logits and cotangent."""
        gradient = jax.grad(self.loss)(params, rows)
        square = (len(rows), self.shape.heads, self.shape.length, self.shape.length)
        taps = [jnp.zeros(square, self.dtype) for _ in range(self.shape.blocks)]

        def tapped(taps):
            seen = []
            return self.loss(params, rows, taps=taps, seen=seen), seen

        cotangents, logits = jax.grad(tapped, has_aux=True)(taps)
        return gradient, jnp.stack(logits), jnp.stack(cotangents)

    def _derivative(self, logits, cotangent):
        """What the derivative of this contender's softmax makes of the cotangent."""
        causal = jnp.tri(self.shape.length, dtype=bool)
        softmax = functools.partial(self.contender.softmax, axis=-1, where=causal)
        return jax.vjp(softmax, logits)[1](cotangent)[0]

    def probe(self, params, rows):
        """Gradient of all parameters, and at every softmax S, dP and dS.

        S [blocks, B, heads, T, T] are the attention logits, dP the cotangent of their
        softmax as this contender computes it, dS what its derivative makes of the two.
        """
        gradient, logits, cotangent = self.gradients(params, rows)
        return gradient, (logits, cotangent, self.derivative(logits, cotangent))


# --- comparison with float64 ----------------------------------------------------------

SMALLEST_ROW = 1e-30  # rows of no larger exact derivative are left out
OFF = 0.01  # a row is off whose error is above this share of its largest entry


def exact_derivative(logits: jax.Array, cotangent: jax.Array) -> tuple:
    """P and dS of causal logits [..., T, T].

    Differences are taken to the cotangent of the row's largest probability, so that a
    row which one probability dominates keeps its digits.
    """
    causal = jnp.tri(logits.shape[-1], dtype=bool)
    p = jax.nn.softmax(jnp.where(causal, logits, -jnp.inf), axis=-1)
    top = jnp.argmax(p, axis=-1, keepdims=True)
    g = cotangent - jnp.take_along_axis(cotangent, top, axis=-1)
    return p, p * (g - jnp.sum(p * g, axis=-1, keepdims=True))


@jax.jit
def softmax_errors(logits, cotangent, derivative) -> dict[str, jax.Array]:
    """How far dS [blocks, B, heads, T, T] is from exact; how large the logits are."""
    p, exact = exact_derivative(logits, cotangent)
    error = jnp.abs(derivative - exact)
    norm = jnp.linalg.norm
    size = jnp.max(jnp.abs(exact), axis=-1)
    worst = jnp.max(error, axis=-1) / jnp.maximum(size, SMALLEST_ROW)
    counted = size > SMALLEST_ROW
    causal = jnp.tri(logits.shape[-1], dtype=bool)
    return {
        "softmax_error": norm(error.ravel()) / norm(exact.ravel()),
        "rows_off": jnp.sum(counted & (worst > OFF)) / jnp.sum(counted),
        "largest_logit": jnp.max(jnp.where(causal, jnp.abs(logits), 0.0)),
        "mean_largest_probability": jnp.mean(jnp.max(p, axis=-1)),
        "rows_dominated": jnp.mean(jnp.max(p, axis=-1) > 0.999),
    }


def flat(tree: Any, wanted: str = "") -> jax.Array:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    chosen = [x for path, x in leaves if wanted in jax.tree_util.keystr(path)]
    return jnp.concatenate([x.ravel() for x in chosen])


class Oracle:
    """The gradient of the same model in float64, of plain jax.nn and optax."""

    def __init__(self, shape: Shape):
        with jax.enable_x64(True):
            self.trainer = Trainer(BY_NAME["jax.nn"], "float64", shape, steps=20)
            self.gradient = jax.jit(jax.grad(self.trainer.loss))

    def compare(self, params, rows, gradient, at_softmax) -> dict[str, float]:
        with jax.enable_x64(True), jax.default_matmul_precision("highest"):
            wide = functools.partial(jax.tree.map, lambda x: x.astype(jnp.float64))
            exact, gradient = self.gradient(wide(params), rows), wide(gradient)
            result = softmax_errors(*wide(at_softmax))
            for name, wanted in (("gradient_error", ""), ("query_key_error", "inputs")):
                right = flat(exact, wanted)
                difference = flat(gradient, wanted) - right
                result[name] = jnp.linalg.norm(difference) / jnp.linalg.norm(right)
            return {name: float(value) for name, value in result.items()}


# --- runs -----------------------------------------------------------------------------

WHICH = ("contender", "dtype", "setting", "seed")
MEANS_OF = 25  # steps: what is written of every step's loss and gradient norm


def means(values: list[np.ndarray]) -> list[float]:
    all_values = np.concatenate(values)
    size = min(MEANS_OF, len(all_values))
    return [float(f"{x:.5g}") for x in all_values.reshape(-1, size).mean(axis=1)]


def train(
    trainer: Trainer, oracle: Oracle, text: Any, setting: Setting, seed: int
) -> dict:
    """One run, looked at before the first step and after every `CHUNK` steps."""
    shape, steps = trainer.shape, trainer.steps
    carry = trainer.start(seed, setting)
    losses, norms, looks = [], [], []
    for done in range(0, steps + 1, min(CHUNK, steps)):
        params = carry[0]
        rows = random_rows(
            text.test, jax.random.key(done), shape.probe_rows, shape.length
        )
        look = {"step": done, "test_loss": float(trainer.validate(params, text.test))}
        look |= oracle.compare(params, rows, *trainer.probe(params, rows))
        looks.append({name: float(f"{value:.6g}") for name, value in look.items()})
        if done < steps:
            carry, (loss, norm) = trainer.chunk(carry, text.train, seed, setting.peak)
            losses.append(np.asarray(loss))
            norms.append(np.asarray(norm))
    return {
        "device": jax.devices()[0].device_kind,
        "looks": looks,
        "train_loss": means(losses),
        "gradient_norm": means(norms),
        "largest_gradient_norm": float(max(map(np.max, norms))),
        "finite": bool(all(np.isfinite(x).all() for x in losses + norms)),
    }


def describe(text: Text, shape: Shape, steps: int) -> dict:
    return {
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "flax": flax.__version__,
            "optax": optax.__version__,
            "jaxsoftmax": jaxsoftmax.__version__,
        },
        "text": {
            "files": text.files,
            "train_tokens": len(text.train),
            "test_tokens": len(text.test),
        },
        "shape": dataclasses.asdict(shape),
        "settings": {name: dataclasses.asdict(s) for name, s in SETTINGS.items()},
        "steps": steps,
        "chunk": min(CHUNK, steps),
        "means_of": MEANS_OF,
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a small language model with one softmax and with another."
    )
    parser.add_argument("--quick", action="store_true", help="a tiny model, few steps")
    parser.add_argument("--steps", type=int, default=3000, help="default: %(default)s")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    dtypes = ["float32", "bfloat16"]
    parser.add_argument("--dtypes", nargs="+", choices=dtypes, default=dtypes)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS))
    parser.add_argument("--contenders", nargs="+", default=list(BY_NAME))
    parser.add_argument("--json", type=pathlib.Path, help="add the runs to this file")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.steps, arguments.seeds = 20, arguments.seeds[:1]
    if arguments.steps > CHUNK and arguments.steps % CHUNK:
        parser.error(f"--steps must be a multiple of {CHUNK}, got {arguments.steps}")
    for given, known in (
        (arguments.settings, SETTINGS),
        (arguments.contenders, BY_NAME),
    ):
        if unknown := [name for name in given if name not in known]:
            parser.error(f"unknown: {unknown[0]!r}; known are {', '.join(known)}")
    return arguments


def runs_in(path: pathlib.Path, results: dict) -> list[dict]:
    """The runs that the file has; an error if they are not of this model and text."""
    stored = json.loads(path.read_text())
    for name in ("shape", "settings", "steps", "text"):
        if stored[name] != results[name]:
            raise SystemExit(
                f"error: the runs in {path} have {name} {stored[name]}, those that are "
                f"asked for {results[name]}: give another file"
            )
    return stored["runs"]


def runs_of(arguments: argparse.Namespace, done: list[dict]) -> Iterator[tuple]:
    """Contender, dtype, setting and seed of what is asked for and not done yet."""
    known = {tuple(run[name] for name in WHICH) for run in done}
    for seed, *others in itertools.product(
        arguments.seeds, arguments.contenders, arguments.dtypes, arguments.settings
    ):
        which = (*others, seed)
        if which not in known:
            yield which


def report(run: dict) -> str:
    last = run["looks"][-1]
    return (
        f"{run['contender']:18}{run['dtype']:9}{run['setting']:13}seed {run['seed']}: "
        f"test loss {last['test_loss']:.4f}; errors: softmax "
        f"{last['softmax_error']:.1e}, gradient {last['gradient_error']:.1e}; largest "
        f"logit {last['largest_logit']:.0f}, gradient norm "
        f"{run['largest_gradient_norm']:.3g}"
    )


def main() -> int:
    arguments = parse_arguments()
    shape = QUICK if arguments.quick else FULL
    text = tokenized(standard_library(), shape.vocabulary)
    results = describe(text, shape, arguments.steps) | {"runs": []}
    if arguments.json and arguments.json.exists():
        results["runs"] = runs_in(arguments.json, results)
    text = dataclasses.replace(
        text, train=jnp.asarray(text.train), test=jnp.asarray(text.test)
    )
    oracle = Oracle(shape)
    trainer_of = functools.cache(
        lambda name, dtype: Trainer(BY_NAME[name], dtype, shape, arguments.steps)
    )
    for which in runs_of(arguments, results["runs"]):
        name, dtype, setting, seed = which
        # Without this a GPU rounds the factors of float32 products to 10 bits, and
        # their errors hide those of a softmax.
        precision = "highest" if dtype == "float32" else None
        with BY_NAME[name].flag(), jax.default_matmul_precision(precision):
            trainer = trainer_of(name, dtype)
            run = train(trainer, oracle, text, SETTINGS[setting], seed)
        run = dict(zip(WHICH, which, strict=True)) | run
        results["runs"].append(run)
        print(report(run), flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(results) + "\n")
    return 0 if all(run["finite"] for run in results["runs"]) else 1


if __name__ == "__main__":
    sys.exit(main())
