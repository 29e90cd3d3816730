"""Train a small transformer on scikit-learn's digits, twice, and compare.

The images (8 by 8 pixels) are cut into 16 patches of 2 by 2. A Flax NNX
transformer reads the patches and a class token, and a linear layer reads the class
token. The same network is trained twice, from the same parameters, on the same
batches:

* with jaxsoftmax: `jaxsoftmax.flax.attention_fn` in `nnx.MultiHeadAttention`, and
  `jaxsoftmax.softmax_cross_entropy_with_integer_labels` as the loss;
* with jax.nn: an attention written with `jax.nn.softmax`, and optax's loss of that
  name, on logits in float32.

The tables at the end have the accuracy of both, the bytes that both keep for the
backward pass, and how far the derivative of both is from one in float64. A picture
has the two loss curves, and what the class token of the first network attends to in
one test image.

    python examples/train_digits.py                  # about a minute on two cores
    python examples/train_digits.py --quick          # fewer steps
    python examples/train_digits.py --dtype bfloat16

It needs flax, optax, scikit-learn, rich and matplotlib:

    pip install "jaxsoftmax[examples]"
"""

import argparse
import dataclasses
import functools
import json
import math
import pathlib
import sys
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")  # writes files, needs no display

import matplotlib.pyplot as plt
import numpy as np
import optax
import rich.console
import rich.progress
import rich.table
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import jaxsoftmax
from jaxsoftmax.flax import attention_fn

SIDE, PATCH = 8, 2  # pixels
PATCHES_PER_SIDE = SIDE // PATCH
PATCHES = PATCHES_PER_SIDE**2
CLASSES = 10

WIDTH, HEADS, BLOCKS, DROPOUT = 64, 4, 2, 0.1
BATCH, PEAK_LEARNING_RATE, WEIGHT_DECAY = 128, 3e-3, 0.01
PIXEL_NOISE = 0.1  # standard deviation; pixels are 0 to 1

STEPS, REQUIRED_ACCURACY = 400, 0.95
QUICK_STEPS, QUICK_REQUIRED_ACCURACY = 60, 0.75

STRESS = 20  # factor on the logits for the second test of the derivative
LOSS_WINDOW = 10  # steps that a point of the curves is the mean of
EXTENT = (0, SIDE, SIDE, 0)  # pictures in pixels, the first row at the top
OFF = 0.01  # error from which on a row counts as off; bfloat16 rounds by 0.4 %
SMALLEST_ROW = 1e-30  # float32 ends at 1e-38: smaller derivatives are not compared


# --- the two ways to do it ------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Variant:
    """The functions that one of the two networks is made of."""

    name: str
    attention: Callable[..., jax.Array]
    softmax: Callable[[jax.Array], jax.Array]
    loss: Callable[[jax.Array, jax.Array], jax.Array]  # of logits and labels, a scalar


def jax_nn_attention(query, key, value, **unused):
    """Attention with `jax.nn.softmax`, in float32 whatever the inputs are.

    `unused` are the mask, dropout and so on that nnx.MultiHeadAttention passes: this
    network has none of them.
    """
    logits = jnp.einsum(
        "...qhd,...khd->...hqk", query, key, preferred_element_type=jnp.float32
    )
    weights = jax.nn.softmax(logits / math.sqrt(query.shape[-1]))
    return jnp.einsum("...hqk,...khd->...qhd", weights.astype(value.dtype), value)


def optax_loss(logits, labels):
    """The mean loss in float32, whatever the logits are."""
    return optax.softmax_cross_entropy_with_integer_labels(
        logits.astype(jnp.float32), labels
    ).mean()


OURS = Variant(
    name="jaxsoftmax",
    attention=attention_fn,
    softmax=jaxsoftmax.softmax,
    loss=functools.partial(
        jaxsoftmax.softmax_cross_entropy_with_integer_labels, reduction="mean"
    ),
)
JAX_NN = Variant(
    name="jax.nn",
    attention=jax_nn_attention,
    softmax=jax.nn.softmax,
    loss=optax_loss,
)


# --- data -----------------------------------------------------------------------------


def split_digits() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Training images, test images, training labels, test labels; always the same."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16.0).astype(np.float32).reshape(-1, SIDE, SIDE)
    return train_test_split(
        images, labels, test_size=360, random_state=0, stratify=labels
    )


def batches(
    images: np.ndarray, labels: np.ndarray, steps: int, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Random batches, with noise on the pixels against overfitting."""
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        chosen = rng.choice(len(images), BATCH, replace=False)
        noise = rng.normal(0.0, PIXEL_NOISE, (BATCH, SIDE, SIDE)).astype(np.float32)
        yield images[chosen] + noise, labels[chosen]


def to_patches(images: jax.Array) -> jax.Array:
    """[batch, 8, 8] -> [batch, 16, 4], row by row of patches."""
    n, p = PATCHES_PER_SIDE, PATCH
    return images.reshape(-1, n, p, n, p).swapaxes(2, 3).reshape(-1, n * n, p * p)


# --- network --------------------------------------------------------------------------


class Block(nnx.Module):
    """A transformer block: attention, then two dense layers."""

    def __init__(self, attention, dtype, rngs):
        self.norm_1 = nnx.LayerNorm(WIDTH, dtype=dtype, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            HEADS, WIDTH, attention_fn=attention, decode=False, dtype=dtype, rngs=rngs
        )
        self.norm_2 = nnx.LayerNorm(WIDTH, dtype=dtype, rngs=rngs)
        self.widen = nnx.Linear(WIDTH, 2 * WIDTH, dtype=dtype, rngs=rngs)
        self.narrow = nnx.Linear(2 * WIDTH, WIDTH, dtype=dtype, rngs=rngs)
        self.dropout = nnx.Dropout(DROPOUT, rngs=rngs)

    def __call__(self, tokens):
        tokens = tokens + self.dropout(self.attention(self.norm_1(tokens)))
        hidden = jax.nn.gelu(self.widen(self.norm_2(tokens)))
        return tokens + self.dropout(self.narrow(hidden))

    def attention_inputs(self, tokens):
        """The query, key and value that the attention gets for `tokens`."""
        normed, attention = self.norm_1(tokens), self.attention
        return attention.query(normed), attention.key(normed), attention.value(normed)


class DigitClassifier(nnx.Module):
    """Logits of the ten digits for images [batch, 8, 8]."""

    def __init__(self, variant, dtype, rngs):
        self.dtype = dtype
        self.embed_patch = nnx.Linear(PATCH**2, WIDTH, dtype=dtype, rngs=rngs)
        positions = jax.random.normal(rngs.params(), (1 + PATCHES, WIDTH))
        self.positions = nnx.Param(0.5 * positions)
        self.blocks = nnx.List(
            [Block(variant.attention, dtype, rngs) for _ in range(BLOCKS)]
        )
        self.norm = nnx.LayerNorm(WIDTH, dtype=dtype, rngs=rngs)
        self.classify = nnx.Linear(WIDTH, CLASSES, dtype=dtype, rngs=rngs)

    def embed(self, images):
        """Tokens [batch, 17, width]: the class token, then the patches."""
        patches = self.embed_patch(to_patches(images))
        class_token = jnp.zeros_like(patches[:, :1])  # its position tells it apart
        tokens = jnp.concatenate([class_token, patches], axis=1)
        return tokens + self.positions[...].astype(self.dtype)

    def __call__(self, images):
        tokens = self.embed(images)
        for block in self.blocks:
            tokens = block(tokens)
        return self.classify(self.norm(tokens[:, 0]))


def last_attention_inputs(
    model: DigitClassifier, images: np.ndarray
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Query, key and value of the last block, each [batch, 17, heads, depth]."""
    tokens = model.embed(images)
    for block in list(model.blocks)[:-1]:
        tokens = block(tokens)
    return model.blocks[-1].attention_inputs(tokens)


def attention_logits(query: jax.Array, key: jax.Array) -> jax.Array:
    """What the softmax gets, [batch, heads, 17, 17] in float32."""
    logits = jnp.einsum(
        "bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32
    )
    return logits / math.sqrt(query.shape[-1])


# --- training -------------------------------------------------------------------------


@dataclasses.dataclass
class Run:
    """A trained network and how the training went."""

    model: DigitClassifier
    losses: list[float]
    accuracy: float
    seconds: float  # without the first step, which compiles


def cross_entropy(
    variant: Variant, model: DigitClassifier, images: jax.Array, labels: jax.Array
) -> jax.Array:
    return variant.loss(model(images), labels)


def make_optimizer(model: DigitClassifier, steps: int) -> nnx.Optimizer:
    learning_rate = optax.warmup_cosine_decay_schedule(
        0.0, PEAK_LEARNING_RATE, warmup_steps=steps // 10, decay_steps=steps
    )
    adamw = optax.adamw(learning_rate, weight_decay=WEIGHT_DECAY)
    return nnx.Optimizer(model, adamw, wrt=nnx.Param)


def train(variant: Variant, data, *, steps: int, seed: int, dtype) -> Run:
    """Trains the network of one variant; same seed, same parameters and batches."""
    train_images, test_images, train_labels, test_labels = data
    model = DigitClassifier(variant, dtype, nnx.Rngs(seed))
    optimizer = make_optimizer(model, steps)

    @nnx.jit
    def step(model, optimizer, images, labels):
        loss_of = functools.partial(cross_entropy, variant)
        loss, gradient = nnx.value_and_grad(loss_of)(model, images, labels)
        optimizer.update(model, gradient)
        return loss

    losses, start = [], 0.0
    todo = batches(train_images, train_labels, steps, seed)
    bar = functools.partial(rich.progress.track, total=steps)
    for images, labels in bar(todo, description=f"{variant.name:>10}"):
        losses.append(float(step(model, optimizer, images, labels)))
        start = start or time.perf_counter()
    seconds = time.perf_counter() - start

    model.eval()  # no more dropout
    predicted = nnx.jit(lambda model, images: model(images))(model, test_images)
    accuracy = float(np.mean(np.argmax(predicted, axis=-1) == test_labels))
    return Run(model, losses, accuracy, seconds)


# --- measurements ---------------------------------------------------------------------


def kept_bytes(f: Callable[..., jax.Array], *inputs: jax.Array, count_inputs: bool):
    """Bytes of the arrays that `jax.vjp(f, *inputs)` keeps for the backward pass.

    These are the arrays JAX asks to keep. In a jitted training step XLA may store
    less, by computing some of them again.
    """
    _, backward = jax.vjp(f, *inputs)
    kept = {id(x): x for x in jax.tree.leaves(backward)}
    if not count_inputs:
        for x in inputs:
            kept.pop(id(x), None)
    return sum(x.nbytes for x in kept.values())


def exact_softmax_derivative(logits: np.ndarray, cotangent: np.ndarray) -> np.ndarray:
    """The derivative of `sum(softmax(logits) * cotangent)`, in float64.

    It is `p[i] * sum_j p[j] * (g[i] - g[j])`, which does not cancel as the usual
    `p[i] * (g[i] - sum_j p[j] * g[j])` does where one probability is almost 1. It
    takes the time of all pairs.
    """
    logits, g = (np.asarray(x, np.float64) for x in (logits, cotangent))
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    p = powers / powers.sum(axis=-1, keepdims=True)
    differences = g[..., :, None] - g[..., None, :]
    return p * np.einsum("...ij,...j->...i", differences, p)


def gradient_error(
    softmax: Callable[[jax.Array], jax.Array], logits: jax.Array
) -> dict[str, float]:
    """How far the derivative is from the exact one, row by row.

    The error of a row is its largest |error| over its largest |exact derivative|. The
    cotangent is random; exact is what belongs to the logits and the cotangent as they
    are in their dtype.
    """
    cotangent = np.random.default_rng(0).normal(size=logits.shape)
    cotangent = jnp.asarray(cotangent, logits.dtype)
    _, backward = jax.vjp(softmax, logits)
    (got,) = backward(cotangent)
    exact = exact_softmax_derivative(logits, cotangent)
    size = np.abs(exact).max(axis=-1)
    error = np.abs(np.asarray(got, np.float64) - exact).max(axis=-1)
    compared = size >= SMALLEST_ROW
    relative = error[compared] / size[compared]
    return {
        "worst": float(relative.max()),
        "share_off": float((relative > OFF).mean()),
    }


def in_float32(softmax: Callable[[jax.Array], jax.Array], logits: jax.Array):
    """Softmax with casts around it, as is usual where logits are bfloat16."""
    return softmax(logits.astype(jnp.float32)).astype(logits.dtype)


def gradient_errors(
    softmax: Callable[[jax.Array], jax.Array], logits: jax.Array
) -> dict[str, dict[str, float]]:
    """`gradient_error` of float32 and bfloat16 logits, as they are and larger."""
    cast = functools.partial(in_float32, softmax)
    result = {}
    for factor in (1, STRESS):
        wide = factor * logits
        half = wide.astype(jnp.bfloat16)
        result[f"x{factor}, float32"] = gradient_error(softmax, wide)
        result[f"x{factor}, bfloat16"] = gradient_error(softmax, half)
        result[f"x{factor}, bfloat16, cast"] = gradient_error(cast, half)
    return result


def measure(variant: Variant, run: Run, model: DigitClassifier, images) -> dict:
    """All numbers of one variant.

    Bytes and derivatives of both variants are measured on the same `model`.
    """
    query, key, value = last_attention_inputs(model, images)
    logits = attention_logits(query, key)
    class_logits = model(images)
    labels = jnp.argmax(class_logits, axis=-1)

    attention_bytes, loss_bytes = {}, {}
    for dtype in ("float32", "bfloat16"):
        inputs = [x.astype(dtype) for x in (query, key, value)]
        attention_bytes[dtype] = kept_bytes(
            variant.attention, *inputs, count_inputs=False
        )
        loss_bytes[dtype] = kept_bytes(
            functools.partial(variant.loss, labels=labels),
            class_logits.astype(dtype),
            count_inputs=True,
        )
    return {
        "test_accuracy": run.accuracy,
        "last_loss": run.losses[-1],
        "seconds": run.seconds,
        "attention_bytes": attention_bytes,
        "loss_bytes": loss_bytes,
        "gradient_error": gradient_errors(variant.softmax, logits),
    }


# --- report ---------------------------------------------------------------------------


def kib(n: int) -> str:
    return f"{n / 1024:,.1f} KiB"


def percent(x: float) -> str:
    return f"{100 * x:.1f} %"


# Label, path in the results, format.
ROWS = [
    ("Test accuracy", ("test_accuracy",), percent),
    ("Loss of the last batch", ("last_loss",), "{:.4f}".format),
    ("Training time without compilation", ("seconds",), "{:.1f} s".format),
    ("Kept for attention, float32", ("attention_bytes", "float32"), kib),
    ("Kept for attention, bfloat16", ("attention_bytes", "bfloat16"), kib),
    ("Kept for the loss, float32", ("loss_bytes", "float32"), kib),
    ("Kept for the loss, bfloat16", ("loss_bytes", "bfloat16"), kib),
]

NOTES = [
    "Kept for attention: what one attention layer keeps for the backward pass beside "
    f"query, key and value, for {BATCH} images ({HEADS} heads, {1 + PATCHES} tokens).",
    "Kept for the loss: what the loss keeps for the backward pass, class logits "
    "included, for the same images.",
]

GRADIENT_NOTES = [
    "Derivative of the softmax at the attention logits of the last block (x1, and "
    f"x{STRESS} to stress it), for a random cotangent, against NumPy in float64. The "
    "error of a row is its largest |error| over its largest |exact derivative|; shown "
    f"are the worst row and the share of rows off by more than {OFF:.0%}.",
    "cast: to float32 before the softmax and back after it. Rows of no exact "
    f"derivative above {SMALLEST_ROW:g} are left out: float32 ends at 1e-38.",
]


def look_up(result: dict, path: tuple[str, ...]):
    return functools.reduce(lambda level, name: level[name], path, result)


def print_table(console: rich.console.Console, table, notes: list[str]) -> None:
    console.print(table)
    for note in notes:
        console.print(note, style="dim", highlight=False)
    console.print()


def summary_table(results: dict[str, dict]) -> rich.table.Table:
    table = rich.table.Table("", title="Digits, trained twice")
    for name in results:
        table.add_column(name, justify="right")
    for label, path, form in ROWS:
        cells = (form(look_up(result, path)) for result in results.values())
        table.add_row(label, *cells)
    return table


def gradient_table(results: dict[str, dict]) -> rich.table.Table:
    table = rich.table.Table(title="Error of the softmax gradient")
    table.add_column("logits", no_wrap=True)
    for what in ("worst row", f"rows > {OFF:.0%}"):
        for name in results:
            table.add_column(f"{name}\n{what}", justify="right", no_wrap=True)
    errors = [result["gradient_error"] for result in results.values()]
    for label in errors[0]:
        worst = (f"{error[label]['worst']:.1e}" for error in errors)
        share = (f"{100 * error[label]['share_off']:.2f} %" for error in errors)
        table.add_row(label, *worst, *share)
    return table


def class_token_attention(
    model: DigitClassifier, image: np.ndarray
) -> tuple[float, np.ndarray]:
    """What the class token pays to itself and to the patches [4, 4], mean of heads."""
    query, key, _ = last_attention_inputs(model, image[None])
    weights = jaxsoftmax.softmax(attention_logits(query, key))
    itself, *patches = np.asarray(weights[0, :, 0]).mean(axis=0)
    return itself, np.reshape(patches, (PATCHES_PER_SIDE, PATCHES_PER_SIDE))


def draw_losses(axes, runs: dict[str, Run]) -> None:
    styles = [
        {"color": "#f2a900", "linewidth": 4.0},
        {"color": "#1b3a6b", "linewidth": 1.2, "linestyle": "--"},
    ]
    window = np.full(LOSS_WINDOW, 1 / LOSS_WINDOW)
    for (name, run), style in zip(runs.items(), styles, strict=True):
        means = np.convolve(run.losses, window, mode="valid")
        label = f"{name} ({percent(run.accuracy)} of the test images right)"
        axes.plot(LOSS_WINDOW + np.arange(len(means)), means, label=label, **style)
    axes.set(
        title="Loss: same parameters at the start, same batches",
        xlabel="training step",
        ylabel=f"cross-entropy, mean of {LOSS_WINDOW} batches (nats)",
        yscale="log",
    )
    axes.grid(alpha=0.3, which="both")
    axes.legend()


def label_pixels(axes, title: str) -> None:
    edges = range(0, SIDE + 1, PATCH)
    axes.set(title=title, xlabel="pixel", ylabel="pixel", xticks=edges, yticks=edges)


def draw_digit(axes, image: np.ndarray, label: int, predicted: int) -> None:
    axes.imshow(image, cmap="gray_r", vmin=0, vmax=1, extent=EXTENT)
    axes.grid(color="#1b3a6b", alpha=0.4)
    label_pixels(axes, f"Test image of a {label}, read as a {predicted}")


def draw_attention(axes, image: np.ndarray, itself: float, patches: np.ndarray) -> None:
    """Colour is the attention to a patch, the area of a dot the ink of a pixel."""
    heat = axes.imshow(patches, cmap="Oranges", vmin=0, extent=EXTENT)
    rows, columns = np.indices(image.shape) + 0.5
    axes.scatter(columns, rows, s=110 * image, color="black", linewidths=0)
    label_pixels(axes, f"Attention of the class token\n(to itself: {itself:.2f})")
    axes.set_xlabel("pixel (dots: ink)")
    bar = axes.figure.colorbar(heat, ax=axes)
    bar.set_label(f"softmax weight of the patch, mean of {HEADS} heads")


def save_picture(
    path: pathlib.Path, runs: dict[str, Run], image: np.ndarray, label: int
) -> None:
    model = runs[OURS.name].model
    predicted = int(np.argmax(model(image[None])[0]))
    figure = plt.figure(figsize=(14, 4.2), layout="constrained")
    ratios = [1.5, 0.95, 1.15]
    losses, digit, attention = figure.subplots(1, 3, width_ratios=ratios)
    draw_losses(losses, runs)
    draw_digit(digit, image, label, predicted)
    draw_attention(attention, image, *class_token_attention(model, image))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a digit classifier with jaxsoftmax and with jax.nn."
    )
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    parser.add_argument("--steps", type=int, help=f"training steps (default {STEPS})")
    parser.add_argument("--seed", type=int, default=0, help="of parameters and batches")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        default=pathlib.Path(__file__).with_suffix(".png"),
        help="picture to write (default: %(default)s)",
    )
    parser.add_argument("--json", type=pathlib.Path, help="write the numbers here too")
    arguments = parser.parse_args()
    if arguments.steps is None:
        arguments.steps = QUICK_STEPS if arguments.quick else STEPS
    if arguments.steps < LOSS_WINDOW:
        parser.error(f"--steps must be at least {LOSS_WINDOW}, got {arguments.steps}")
    for path in (arguments.output, arguments.json):
        if path is not None and not path.parent.is_dir():
            parser.error(f"there is no folder {path.parent} to write {path.name} to")
    return arguments


def main() -> int:
    arguments = parse_arguments()
    required = QUICK_REQUIRED_ACCURACY if arguments.quick else REQUIRED_ACCURACY
    data = split_digits()
    runs = {
        variant.name: train(
            variant,
            data,
            steps=arguments.steps,
            seed=arguments.seed,
            dtype=arguments.dtype,
        )
        for variant in (OURS, JAX_NN)
    }

    test_images, test_labels = data[1], data[3]
    trained = runs[OURS.name].model
    results = {
        variant.name: measure(variant, runs[variant.name], trained, test_images[:BATCH])
        for variant in (OURS, JAX_NN)
    }
    console = rich.console.Console()
    print_table(console, summary_table(results), NOTES)
    print_table(console, gradient_table(results), GRADIENT_NOTES)
    save_picture(arguments.output, runs, test_images[0], test_labels[0])
    console.print(f"Wrote {arguments.output}")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")

    accuracy = runs[OURS.name].accuracy
    if accuracy < required:
        console.print(f"Test accuracy {percent(accuracy)} < {percent(required)}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
