"""Write the tables and pictures of docs/training.md from docs/training.json.

The JSON is made by examples/training_evidence.py on a GPU. Nothing is trained here.

    python benchmarks/training_page.py            # writes the page and its pictures
    python benchmarks/training_page.py --check    # only compares the page

Needs matplotlib, but for `--check`.
"""

import json
import pathlib
import statistics
import sys

import report

DOCS = pathlib.Path(__file__).parent.parent / "docs"
PAGE = DOCS / "training.md"
COLORS = {
    "jaxsoftmax": "#f2a900",
    "jaxsoftmax, fused": "#c8102e",
    "jax.nn": "#1b3a6b",
    "jax.nn, flag": "#6fa8dc",
    "jax.nn, reversed": "#7f7f7f",
}
FUSED = {"jaxsoftmax, fused"}
PANELS = [
    (dtype, setting)
    for dtype in ("float32", "bfloat16")
    for setting in ("usual", "large logits")
]


class Results:
    """What docs/training.json has."""

    def __init__(self, path):
        self.file = json.loads(path.read_text())
        self.runs = self.file["runs"]

    def of(self, dtype, setting, contender):
        """The runs, by seed."""
        wanted = (dtype, setting, contender)
        return {
            run["seed"]: run
            for run in self.runs
            if (run["dtype"], run["setting"], run["contender"]) == wanted
        }


# --- tables ---------------------------------------------------------------------------


def last(run, name):
    return run["looks"][-1][name]


def median_of(runs, name):
    """Over the looks after the first step, and over the seeds."""
    return statistics.median(
        look[name] for run in runs.values() for look in run["looks"][1:]
    )


def losses(results, dtype, setting):
    """The loss at the end; means are of the seeds that every contender has."""
    by_name = {
        name: {
            seed: last(run, "test_loss")
            for seed, run in results.of(dtype, setting, name).items()
        }
        for name in COLORS
    }
    seeds = sorted({run["seed"] for run in results.runs})
    common = [seed for seed in seeds if all(seed in v for v in by_name.values())]
    rows = []
    for name, values in by_name.items():
        cells = [f"{values[seed]:.4f}" if seed in values else "" for seed in seeds]
        mean = statistics.mean(values[seed] for seed in common)
        rows.append([name, *cells, f"{mean:.4f}"])
    which = ", ".join(map(str, common))
    header = ["", *(f"seed {seed}" for seed in seeds), f"mean of seeds {which}"]
    return report.text_table(header, rows)


def errors(results, dtype, setting):
    rows = []
    for name in COLORS:
        runs = results.of(dtype, setting, name)
        largest = [last(run, "largest_logit") for run in runs.values()]
        norms = [run["largest_gradient_norm"] for run in runs.values()]
        # What is fused has no softmax of its own to be looked at.
        softmax_columns = ["", ""]
        if name not in FUSED:
            softmax_columns = [
                f"{median_of(runs, 'softmax_error'):.1e}",
                f"{100 * median_of(runs, 'rows_off'):.1f} %",
            ]
        rows.append(
            [
                name,
                *softmax_columns,
                f"{median_of(runs, 'query_key_error'):.1e}",
                f"{median_of(runs, 'gradient_error'):.1e}",
                f"{min(largest):,.0f} - {max(largest):,.0f}",
                f"{max(norms):.1f}",
            ]
        )
    header = [
        *("", "dS of the softmaxes", "rows off by > 1 %", "query and key weights"),
        *("all parameters", "largest logit at the end", "largest gradient norm"),
    ]
    return report.text_table(header, rows)


def conditions(results):
    file = results.file
    shape, text = file["shape"], file["text"]
    versions = ", ".join(f"{name} {v}" for name, v in file["versions"].items())
    devices = ", ".join(sorted({run["device"] for run in results.runs}))
    finite = all(run["finite"] for run in results.runs)
    rows = [
        ["runs", f"{len(results.runs)}, of {file['steps']:,} steps each"],
        ["all losses and gradient norms finite", "yes" if finite else "no"],
        ["device", devices],
        ["versions", versions],
        [
            "text",
            f"{text['files']} files: {text['train_tokens']:,} tokens to train on, "
            f"{text['test_tokens']:,} to test",
        ],
        [
            "model",
            f"{shape['blocks']} blocks of width {shape['width']}, "
            f"{shape['width'] // shape['depth']} heads of {shape['depth']}, "
            f"{shape['vocabulary']:,} tokens in the vocabulary",
        ],
        ["batch", f"{shape['batch']} rows of {shape['length']} tokens"],
        *(
            [
                f"setting: {name}",
                f"peak learning rate {s['peak']:g}; first query and key weights times "
                f"{s['factor']:g}",
            ]
            for name, s in file["settings"].items()
        ),
    ]
    return report.text_table(rows[0], rows[1:], ["---", "---"])


def blocks(results):
    found = {"conditions": conditions(results)}
    for dtype, setting in PANELS:
        found[f"loss, {dtype}, {setting}"] = losses(results, dtype, setting)
        found[f"errors, {dtype}, {setting}"] = errors(results, dtype, setting)
    return found


# --- pictures -------------------------------------------------------------------------


def curve(run, name, file):
    """Steps and values of one run: of its looks, or of the means over steps."""
    if name in run:
        means = run[name]
        size = file["means_of"]
        return [size * (i + 0.5) for i in range(len(means))], means
    looks = run["looks"][1:]
    return [look["step"] for look in looks], [look[name] for look in looks]


def draw_runs(ax, results, panel, name):
    """A line for each run of a panel, its colour the contender's."""
    for contender, color in COLORS.items():
        if name == "softmax_error" and contender in FUSED:
            continue
        ours = contender.startswith("jaxsoftmax")
        for i, run in enumerate(results.of(*panel, contender).values()):
            ax.plot(
                *curve(run, name, results.file),
                color=color,
                label=None if i else contender,
                linewidth=1.6 if ours else 0.9,
                linestyle="-" if ours else "--",
                alpha=0.8,
            )


def draw(results, columns, path):
    """A row for each of PANELS, a column for each (name in the JSON, title, scale)."""
    plt = report.pyplot()
    figure, axes = plt.subplots(
        *(len(PANELS), len(columns)),
        figsize=(11, 2.7 * len(PANELS) + 0.6),
        sharex=True,
        layout="constrained",
    )
    for line, panel in zip(axes, PANELS, strict=True):
        for ax, (name, _, scale) in zip(line, columns, strict=True):
            draw_runs(ax, results, panel, name)
            ax.set_yscale(scale)
            ax.grid(alpha=0.3)
        line[0].set_ylabel(", ".join(panel), fontsize=11)
    for top, bottom, (_, title, _) in zip(axes[0], axes[-1], columns, strict=True):
        top.set_title(title, fontsize=10)
        bottom.set_xlabel("training step")
    handles, labels = axes[0][-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    figure.savefig(path, dpi=90)
    plt.close(figure)


def draw_last(results, path):
    """The loss at the end of every run."""
    plt = report.pyplot()
    figure, axes = plt.subplots(
        2, 2, figsize=(11, 5.6), layout="constrained", sharey=True
    )
    for ax, (dtype, setting) in zip(axes.flat, PANELS, strict=True):
        for y, (contender, color) in enumerate(COLORS.items()):
            for seed, run in results.of(dtype, setting, contender).items():
                x = last(run, "test_loss")
                ax.plot(x, y, "os^Dv"[seed], color=color, alpha=0.8)
        ax.set_title(f"{dtype}, {setting}", fontsize=11)
        ax.set_xlabel("test loss at the end (nats per token)")
        ax.grid(alpha=0.3, axis="x")
    axes[0, 0].set_yticks(range(len(COLORS)), COLORS)
    axes[0, 0].set_ylim(len(COLORS) - 0.5, -0.5)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def pictures(results):
    progress = [
        ("test_loss", "test loss (nats per token)", "linear"),
        ("gradient_norm", "norm of the gradient (mean of 25 steps)", "log"),
        ("largest_logit", "largest attention logit", "log"),
    ]
    draw(results, progress, DOCS / "training.png")
    wrong = [
        ("softmax_error", "relative error of dS, all softmaxes", "log"),
        ("query_key_error", "relative error, gradient of query and key weights", "log"),
    ]
    draw(results, wrong, DOCS / "training_errors.png")
    draw_last(results, DOCS / "training_last.png")


def main():
    args = report.options("Write the figures of docs/training.md.", PAGE)
    results = Results(DOCS / "training.json")
    if not args.check:
        pictures(results)
    return report.finish(args.page, blocks(results), check=args.check)


if __name__ == "__main__":
    sys.exit(main())
