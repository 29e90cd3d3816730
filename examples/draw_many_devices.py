"""Draws docs/many_devices.png: what each device does and what moves between them."""

import pathlib

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, Rectangle

COLORS = ["#9ecae1", "#fdd0a2", "#c7e9c0", "#dadaeb"]
HEIGHT, WIDTH = 8, 8


def grid(ax, x, y, rows, columns, color, text):
    ax.add_patch(Rectangle((x, y), columns, rows, facecolor=color, edgecolor="none"))
    for i in range(rows + 1):
        ax.plot([x, x + columns], [y + i, y + i], color="white", lw=0.6)
    for j in range(columns + 1):
        ax.plot([x + j, x + j], [y, y + rows], color="white", lw=0.6)
    ax.text(x + columns / 2, y + rows / 2, text, ha="center", va="center", fontsize=9)


def arrow(ax, start, end):
    style = {"arrowstyle": "-|>", "mutation_scale": 11, "color": "#444444"}
    ax.add_patch(FancyArrowPatch(start, end, **style))


def frame(ax, title):
    ax.set_title(title, fontsize=11)
    ax.set_xlim(-1, 21)
    ax.set_ylim(-2.6, 9.4)
    ax.set_aspect("equal")
    ax.axis("off")


def batch(ax):
    frame(ax, "Split over the batch: nothing moves")
    for k, color in enumerate(COLORS):
        y = HEIGHT - 2 * (k + 1)
        grid(ax, 0, y, 2, WIDTH, color, f"device {k}: rows of x")
        arrow(ax, (8.4, y + 1), (11.6, y + 1))
        grid(ax, 12, y, 2, WIDTH, color, "rows of P")
    ax.text(10, 8.5, "kernel", ha="center", fontsize=9)


def rows(ax):
    frame(ax, "Rows split: a few numbers per row are all-reduced")
    for k, color in enumerate(COLORS):
        grid(ax, 2 * k, 0, HEIGHT, 2, color, f"x\n{k}")
        grid(ax, 12 + 2 * k, 0, HEIGHT, 2, color, f"P\n{k}")
    ax.text(10, 5.6, "max, sum\nof each share", ha="center", va="center", fontsize=8.5)
    arrow(ax, (8.3, 4), (11.7, 4))
    ax.text(
        10,
        2.6,
        "all-reduce\n4 + 4 bytes\nper row",
        ha="center",
        va="center",
        fontsize=8.5,
    )
    ax.text(
        10,
        -1.6,
        "Each device reads its share for its state, and again for its part of P.",
        ha="center",
        fontsize=8.5,
    )


def main():
    fig, axes = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
    batch(axes[0])
    rows(axes[1])
    docs = pathlib.Path(__file__).resolve().parents[1] / "docs"
    fig.savefig(docs / "many_devices.png", dpi=120)


if __name__ == "__main__":
    main()
