"""Writes the tables of docs/performance.md and the first of README from measurements.

    python benchmarks/performance_page.py             # writes the tables into the page
    python benchmarks/performance_page.py --check     # fails if they disagree

Measures nothing and needs no jax: it reads docs/*.json, which the programs gpu_*.py and
cpu_softmax.py in this folder have written.

A `Comparison` is one program of ours and the same program of others, over some shapes.
A ratio is the time of ours over that of another: below 1, ours is faster.
"""

import dataclasses
import itertools
import json
import math
import pathlib
import statistics
import sys
from collections.abc import Callable, Iterable
from typing import Any

import report

DOCS = pathlib.Path(__file__).parents[1] / "docs"
PAGE = DOCS / "performance.md"
README = DOCS.parent / "README.md"
# A ratio that is printed as 1.00 is not called slower.
SLOWER = 1.01
MUCH_SLOWER = 1.05
# Where ours is slower at all of more shapes than these, they are not listed.
MOST_LISTED = 8
PYTORCH = ("torch", "Liger", "cut_cross_entropy")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One program of ours against others.

    Attributes:
      program: What is computed, and how ours was called.
      others: The contenders, in the order of the columns.
      ours: For each shape, by what it is called, the time of ours.
      theirs: For each shape the contenders' times; one may be missing.
    """

    program: str
    others: tuple[str, ...]
    ours: dict[str, float]
    theirs: dict[str, dict[str, float]]

    def ratios(self, names: Iterable[str]) -> dict[str, tuple[float, str]]:
        """For each shape, ours over the fastest of `names`, and which that is."""
        found = {}
        for shape, time in self.ours.items():
            theirs = {n: t for n, t in self.theirs[shape].items() if n in names}
            if theirs:
                fastest = min(theirs, key=lambda name: theirs[name])
                found[shape] = (time / theirs[fastest], fastest)
        return found

    @property
    def frameworks(self) -> dict[str, list[str]]:
        """The others by what they are written in."""
        found: dict[str, list[str]] = {"JAX": [], "PyTorch": []}
        for name in self.others:
            found["PyTorch" if name.startswith(PYTORCH) else "JAX"].append(name)
        return found


def compare(
    program: str,
    ours: str,
    others: Iterable[str],
    cells: Iterable[dict],
    label: Callable[[dict], str],
    *,
    time: str = "ms",
) -> Comparison:
    """A comparison of results in `cells`, those in which ours has a figure."""
    others = tuple(others)
    mine, theirs = {}, {}
    for cell in cells:
        found = {n: r[time] for n, r in cell["results"].items() if time in r}
        if ours in found:
            mine[label(cell)] = found[ours]
            theirs[label(cell)] = {n: found[n] for n in others if n in found}
    present = tuple(n for n in others if any(n in t for t in theirs.values()))
    return Comparison(program, present, mine, theirs)


# --- what is written of comparisons ---------------------------------------------------


def spread(ratios: Iterable[float]) -> str:
    """The median, and the range where there are several."""
    ratios = list(ratios)
    if not ratios:
        return ""
    middle = f"{statistics.median(ratios):.2f}"
    if len(ratios) == 1:
        return middle
    return f"{middle} ({min(ratios):.2f} - {max(ratios):.2f})"


def is_slower(ratio: float) -> bool:
    return round(ratio, 2) >= SLOWER


def count_slower(found: dict[str, tuple[float, str]]) -> str:
    if not found:
        return ""
    return f"{sum(is_slower(r) for r, _ in found.values())} of {len(found)}"


def ratio_table(comparisons: list[Comparison]) -> str:
    """A row per program, a column per contender: the median and the range."""
    names = list(dict.fromkeys(n for c in comparisons for n in c.others))
    rows = []
    for c in comparisons:
        cells = [spread(r for r, _ in c.ratios([n]).values()) for n in names]
        rows.append([c.program, len(c.ours), *cells])
    return report.text_table(["ours", "shapes", *(f"/ {n}" for n in names)], rows)


def slower_rows(c: Comparison, names: list[str], where: str) -> list[list[str]]:
    """Where ours is slower than the fastest of the contenders in one framework."""
    found = c.ratios(names)
    slower = {shape: pair for shape, pair in found.items() if is_slower(pair[0])}
    if len(slower) == len(found) > MOST_LISTED:
        least, *_, most = sorted(ratio for ratio, _ in found.values())
        fastest = " or ".join(dict.fromkeys(name for _, name in found.values()))
        everywhere = f"all {len(found)} shapes: {least:.2f} - {most:.2f}"
        return [[c.program, where, fastest, everywhere]]
    by_name: dict[str, list[str]] = {}
    for shape, (ratio, name) in slower.items():
        by_name.setdefault(name, []).append(f"{shape}: {ratio:.2f}")
    return [[c.program, where, n, "; ".join(cases)] for n, cases in by_name.items()]


def slower_table(comparisons: list[Comparison]) -> str:
    rows = [
        row
        for c in comparisons
        for where, names in c.frameworks.items()
        for row in slower_rows(c, names, where)
    ]
    if not rows:
        return "Ours is slower than the fastest contender at none of these shapes."
    header = ["slower", "than the fastest in", "which is", "times as long"]
    return report.text_table(header, rows, ["---"] * 4)


# --- the measurements -----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Family:
    """A section of the page.

    Attributes:
      heading: Of the section, which has a block of that name.
      device: In a word.
      about: What was measured on, in a sentence.
      comparisons: Of the section's tables.
      in_short: Of the table at the top of the page: ours by default.
      listed: Of the list of what is slower, if not `comparisons`.
    """

    heading: str
    device: str
    about: str
    comparisons: list[Comparison]
    in_short: list[Comparison]
    listed: list[Comparison] | None = None

    def block(self) -> str:
        listed = self.comparisons if self.listed is None else self.listed
        tables = (ratio_table(self.comparisons), slower_table(listed))
        return "\n\n".join([self.about, *tables])


def load(name: str) -> dict:
    return json.loads((DOCS / f"{name}.json").read_text())


def about(result: dict) -> str:
    """Device and versions, as the measurement has them."""
    return (
        f"{result['device']}, driver {result['driver']}; {report.versions(result)}; "
        f"clock: {result['clock']}."
    )


def card(result: dict) -> str:
    """The device's name in short: H200."""
    return result["device"].removeprefix("NVIDIA ").split()[0]


def by_shape(cell: dict) -> str:
    return " x ".join(f"{n:,}" for n in cell["shape"])


def by_length(cell: dict) -> str:
    return f"N = {cell['n']:,}"


def quoted(ours: str) -> str:
    """How ours was asked for: by default, or by the name of an implementation."""
    return ours if ours == "default" else f'`"{ours}"`'


SOFTMAX = {
    "softmax": "softmax, forward",
    "softmax_backward": "softmax, backward",
    "log_softmax": "log_softmax, forward",
    "log_softmax_backward": "log_softmax, backward",
}


def softmax() -> Family:
    """Forward and backward alone, by the name of what runs, and both in one program."""
    result = load("gpu_softmax")
    others = ("jax.nn", "jax.nn custom_jvp", "torch")

    def compared(op: str, title: str, ours: str, group: str = "rows") -> Comparison:
        of_op = {"op": op, "dtype": "bfloat16", "group": group}
        cells = [c for c in result["cells"] if of_op.items() <= c.items()]
        label = by_length if group == "rows" else by_shape
        return compare(f"{title}, {quoted(ours)}", ours, others, cells, label)

    best = [compared(op, title, "mosaic_gpu") for op, title in SOFTMAX.items()]
    best += [
        compared(op, f"{title}, axis 1", "default", "axis")
        for op, title in SOFTMAX.items()
    ]
    best.append(
        compared("gradient", "`grad(sum(softmax(x) * w))`, one program", "default")
    )
    named = [
        compared(op, t, ours) for ours in ("triton", "xla") for op, t in SOFTMAX.items()
    ]
    return Family("Softmax on a GPU", card(result), about(result), best + named, best)


def small() -> Family:
    """Problems that take microseconds, by two clocks."""
    result = load("gpu_softmax")

    def compared(time: str, clock: str, dtype: str) -> Comparison:
        cells = [c for c in result["small"] if c["dtype"] == dtype]
        title = f"`grad(sum(softmax(x) * w))`, {dtype}, {clock} clock"
        return compare(title, "default", ["jax.nn"], cells, by_shape, time=time)

    host, device = (
        [compared(*clock, dtype) for dtype in ("bfloat16", "float32")]
        for clock in (("wall_us", "host's"), ("device_us", "device's"))
    )
    more = [
        c["results"]["default"]["wall_us"] - c["results"]["jax.nn"]["wall_us"]
        for c in result["small"]
    ]
    microseconds = (
        f"By the host's clock a call takes {min(more):.1f} to {max(more):.1f} "
        f"microseconds more than with jax.nn (median {statistics.median(more):.1f})."
    )
    return Family(
        *("Small problems", card(result), f"{about(result)} {microseconds}"),
        *(host + device, host),
    )


CROSS_ENTROPY = {
    "mean": 'gradient of the mean, `reduction="mean"`',
    "per example": 'gradient of the mean, `reduction="none"`',
    "xla": 'gradient of the mean, `"xla"`',
    "forward": "value alone",
    "options": "soft cap, smoothing and z-loss, gradient",
}


def cross_entropy() -> Family:
    result = load("gpu_cross_entropy")
    usual = ["optax", "optax, upcast", "torch", "torch.compile", "Liger"]
    others = {"forward": ["optax, forward"], "options": ["options in jax.numpy"]}

    def compared(ours: str, dtype: str) -> Comparison:
        cells = [c for c in result["cells"] if c["dtype"] == dtype]
        title = f"{CROSS_ENTROPY[ours]}, {dtype}"
        return compare(title, ours, others.get(ours, usual), cells, by_shape)

    found = [compared(o, d) for o in CROSS_ENTROPY for d in ("bfloat16", "float32")]
    return Family("Cross-entropy", card(result), about(result), found, found[:2])


LINEAR = {
    "default": "gradients of the mean, default",
    "memory first": "... with a small `memory_budget`",
    "per example": '... `reduction="none"`',
}


def linear() -> Family:
    result = load("gpu_linear_cross_entropy")
    others = [
        *("dense", "dense, our loss", "dense, float32 logits"),
        *("torch", "torch.compile", "Liger", "cut_cross_entropy"),
    ]

    def label(cell: dict) -> str:
        tokens, hidden, classes = cell["shape"]
        dtype = ", float32" if cell.get("dtype") == "float32" else ""
        return f"T = {tokens:,}, H = {hidden:,}, V = {classes:,}{dtype}"

    found = [compare(t, o, others, result["cells"], label) for o, t in LINEAR.items()]
    heading = "Linear layer and cross-entropy"
    return Family(heading, card(result), about(result), found, found[:1])


HEAD_SIZES = (64, 128, 256)
DIRECTIONS = ("gradient", "forward")
CUDNN = ("jax.nn, cudnn", "torch, cudnn")
NOT_CUDNN = ("jax.nn, xla", "torch, flash")


def attention() -> Family:
    """What cuDNN takes, which is what runs by default.

    The others, asked for by name, are for what it does not take: the list of what is
    slower compares them with what is not cuDNN.
    """
    result = load("gpu_attention")
    every = CUDNN + NOT_CUDNN

    def compared(ours: str, others: tuple[str, ...], direction: str, *sizes: int):
        one_size = len(sizes) == 1
        cells = [
            c
            for c in result["cells"]
            if not c["other"] and c["direction"] == direction and c["shape"][3] in sizes
        ]
        cells.sort(key=lambda c: (not c["causal"], c["shape"][1]))

        def label(cell: dict) -> str:
            head = "" if one_size else f"H = {cell['shape'][3]}, "
            kind = "causal, " if cell["causal"] else ""
            return f"{head}{kind}T = {cell['shape'][1]:,}"

        head = f"H = {sizes[0]}" if one_size else "every H"
        program = f"{direction}, {head}, {quoted(ours)}"
        return compare(program, ours, others, cells, label)

    def compare_each(others: tuple[str, ...], *names: str) -> list[Comparison]:
        cases = itertools.product(names, DIRECTIONS, HEAD_SIZES)
        found = [
            compared(ours, others, direction, size) for ours, direction, size in cases
        ]
        return [each for each in found if each.ours]

    # PyTorch's flash is slower than its cuDNN, which was not timed at every shape.
    fastest = tuple(name for name in every if name != "torch, flash")
    named = ("mosaic_gpu", "triton", "xla")
    return Family(
        *(
            "Attention",
            card(result),
            about(result),
            compare_each(every, "default", *named),
        ),
        in_short=[compared("default", fastest, d, *HEAD_SIZES) for d in DIRECTIONS],
        listed=compare_each(fastest, "default") + compare_each(NOT_CUDNN, *named),
    )


def attention_options() -> Family:
    """What cuDNN does not take."""
    result = load("gpu_attention")

    def compared(ours: str, direction: str) -> Comparison:
        others = (c for c in result["cells"] if c["other"])
        cells = [c for c in others if c["direction"] == direction]
        program = f"{direction}, {quoted(ours)}"
        return compare(program, ours, ["in jax.numpy"], cells, label)

    def label(cell: dict) -> str:
        size, length = cell["shape"][3], cell["shape"][1]
        kind = "causal, " if cell["causal"] else ""
        return f"{cell['other']}, H = {size}, {kind}T = {length:,}"

    best, named = ([compared(o, d) for d in DIRECTIONS] for o in ("default", "xla"))
    heading = "Attention that cuDNN does not take"
    return Family(heading, card(result), about(result), best + named, best)


def two_gpus() -> Family:
    result = load("gpu_sharding")
    others = ["jax.nn", "jax.nn custom_jvp"]

    def label(cell: dict) -> str:
        return f"N = {cell['n']:,}, {cell['dtype']}"

    splits, passes = ("whole rows", "shared rows"), ("forward", "backward")
    passes += ("forward and backward",)

    def compared(ours: str, name: str) -> list[Comparison]:
        found = []
        for case in itertools.product(splits, passes):
            cells = [c for c in result["cells"] if (c["split"], c["what"]) == case]
            program = f"{case[1]}, {case[0]}, {quoted(name)}"
            found.append(compare(program, ours, others, cells, label))
        return found

    best, named = compared("jaxsoftmax", "default"), compared("jaxsoftmax, xla", "xla")
    what = result["about"]
    text = (
        f"{what['devices']} {what['device']}; jax {what['jax']}, "
        f"jaxsoftmax {what['jaxsoftmax']}, python {what['python']}."
    )
    return Family("Softmax on two GPUs", "2 H100", text, best + named, best)


def cpu() -> Family:
    """Programs on the CPU, brought into the form of the other pages."""
    result = load("cpu_softmax")
    cells = [
        row | {"results": {name: {"ms": 1e3 * s} for name, s in row["seconds"].items()}}
        for row in result["rows"]
    ]

    def kind(cell: dict[str, Any]) -> tuple[str, str, str]:
        return cell["function"], cell["program"], cell["dtype"]

    def compared(name: tuple[str, str, str]) -> Comparison:
        chosen = [c for c in cells if kind(c) == name]
        return compare(", ".join(name), "ours", ["jax.nn"], chosen, by_shape)

    found = [compared(name) for name in sorted(set(map(kind, cells)))]
    text = (
        f"{result['cores']} cores; jax {result['jax']}, python {result['python']}; "
        f"medians of {result['repetitions']} repetitions."
    )
    return Family("Softmax on the CPU", "CPU", text, found, found)


def forms() -> Family:
    """What runs by default in the programs that a softmax stands in."""
    result = load("gpu_forms")
    cells = result["cells"]
    for cell in cells:
        cell["results"]["default"] = cell["results"][cell["default"]]

    def name(cell: dict[str, Any]) -> str:
        size = "large" if math.prod(cell["shape"]) > 2**24 else "small"
        return ", ".join(
            [cell["function"], cell["program"], cell["dtype"], size + " arrays"]
        )

    found = [
        compare(
            each,
            "default",
            ["jax.nn", "jax.nn custom_jvp"],
            [cell for cell in cells if name(cell) == each],
            by_shape,
            time="us",
        )
        for each in sorted(set(map(name, cells)))
    ]
    return Family("Forms on a GPU", card(result), about(result), found, [])


# Of a training step: a program of ours, and what it replaces.
EINSUMS = ("jax.nn.softmax, f32; optax", "jax.nn.softmax, bf16; optax")
FUSED = ('jax.nn attention "cudnn"; optax, f32', 'jax.nn attention "xla"; optax, f32')
STEPS = {
    "softmax, f32, cast; loss": EINSUMS,
    "softmax, f32, dtype=bf16; loss": EINSUMS,
    "softmax, bf16, scale=; loss": EINSUMS,
    "attention; loss": FUSED,
    "attention; loss, f32": FUSED,
    "attention; linear loss": FUSED,
    "attention_fn; loss": ("its attention; optax",),
    "attention_fn; linear loss": ("its attention; optax",),
    "jaxsoftmax": ("jax.nn",),
    "log_softmax": ("jax.nn.log_softmax",),
    "loss": ("jax.nn.log_softmax",),
}


def training_step() -> Family:
    """What runs by default in programs that people run."""
    result = load("gpu_training_step")
    found = [
        compare(ours, ours, others, result["cells"], lambda cell: cell["case"])
        for ours, others in STEPS.items()
    ]
    return Family("A training step", card(result), about(result), found, found[:6])


def first_step() -> str:
    """The table that README opens with: the first case, without its repetitions."""
    cell = load("gpu_training_step")["cells"][0]
    rows = [
        [name, f"{found['ms']:.1f}", f"{found['temp_gb']:.1f}"]
        for name, found in cell["results"].items()
    ]
    header = ["attention; loss of the last layer", "ms", "temporary GB"]
    return report.text_table(header, rows, ["---", "--:", "--:"])


# --- the page -------------------------------------------------------------------------


def much_slower(families: list[Family]) -> str:
    """Of all that runs by default: where it takes over 1.05 of what it replaces."""
    rows = []
    for family in families:
        for c in family.in_short or family.comparisons:
            found = c.ratios(c.frameworks["JAX"])
            slower = {shape: r for shape, (r, _) in found.items() if r > MUCH_SLOWER}
            if slower:
                worst = max(slower, key=lambda shape: slower[shape])
                link = f"[{family.heading}](#{anchor(family.heading)}): {c.program}"
                count = f"{len(slower)} of {len(found)}"
                rows.append([link, count, f"{slower[worst]:.2f}", worst])
    header = ["program", "cells", "worst", "which is"]
    return report.text_table(header, rows, ["---", "--:", "--:", "---"])


def in_short(families: list[Family]) -> str:
    """Ours by default against the fastest contender in JAX, and in PyTorch."""
    rows = []
    for family in families:
        for c in family.in_short:
            link = f"[{family.heading}](#{anchor(family.heading)})"
            row = [f"{link}: {c.program}", family.device]
            for names in c.frameworks.values():
                found = c.ratios(names)
                row += [spread(r for r, _ in found.values()), count_slower(found)]
            rows.append(row)
    header = [
        *("", "device", "/ fastest in JAX", "slower in"),
        *("/ fastest in PyTorch", "slower in"),
    ]
    return report.text_table(header, rows, ["---", "---", *["--:"] * 4])


def anchor(heading: str) -> str:
    """As GitHub and myst name a heading."""
    kept = "".join(c for c in heading.lower() if c.isalnum() or c in " -_")
    return kept.replace(" ", "-")


def blocks() -> dict[str, str]:
    families = [
        *(training_step(), softmax(), forms(), small(), cross_entropy(), linear()),
        *(attention(), attention_options(), two_gpus(), cpu()),
    ]
    tables = {"in short": in_short(families), "slower": much_slower(families)}
    return tables | {f.heading: f.block() for f in families}


def main() -> int:
    args = report.options("Write the tables of docs/performance.md.", PAGE)
    status = report.finish(args.page, blocks(), check=args.check)
    step = {"a training step": first_step()}
    return status | report.finish(README, step, check=args.check)


if __name__ == "__main__":
    sys.exit(main())
