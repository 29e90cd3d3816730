"""Tables and a picture of what benchmarks/gpu_softmax.py measured; needs no GPU."""

import json

TITLES = {
    "softmax": "softmax, forward",
    "softmax_backward": "softmax, backward",
    "log_softmax": "log_softmax, forward",
    "log_softmax_backward": "log_softmax, backward",
    "gradient": "jit(grad(sum(softmax(x) w)))",
}
COPIES = ("copy", "torch copy")
COLORS = {
    "mosaic_gpu": "#c1272d",
    "triton": "#f28e2b",
    "default": "#c1272d",
    "xla": "#8c564b",
    "jax.nn": "#1f4e9e",
    "jax.nn custom_jvp": "#6fa8dc",
    "torch": "#3d8b37",
    "torch.compile": "#8fce00",
}


def merge(paths):
    """The results of several runs, described as the first of them is."""
    results = []
    for path in paths:
        with open(path) as file:
            results.append(json.load(file))
    merged = dict(results[0])
    for result in results:
        # Each cell is compared with the copy of its own run.
        rates = copy_rates(result)
        for cell in result["cells"]:
            cell["copy_gbps"] = rates.get(cell["dtype"])
    for key in ("cells", "small"):
        merged[key] = [cell for result in results for cell in result[key]]
    merged["command"] = "; ".join(result["command"] for result in results)
    return merged


def copy_rates(result):
    """GB/s of the better copy of each dtype: medians over all cases of the run."""
    found = {}
    for cell in result["cells"]:
        for name in COPIES:
            rate = cell["results"].get(name, {}).get("gbps")
            if rate:
                found.setdefault((cell["dtype"], name), []).append(rate)
    rates = {}
    for (dtype, _), values in found.items():
        median = sorted(values)[len(values) // 2]
        rates[dtype] = max(median, rates.get(dtype, 0))
    return rates


def copy_rate(cell, rates):
    return cell.get("copy_gbps") or rates.get(cell["dtype"])


def table(header, rows):
    lines = ["| " + " | ".join(header) + " |"]
    lines.append("|" + "|".join("---" if i == 0 else "--:" for i in range(len(header))))
    lines[-1] += "|"
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return [*lines, ""]


def contenders(cells):
    """Those with a figure or a failure, in the order of the colours."""
    seen = {
        name
        for cell in cells
        for name, found in cell["results"].items()
        if "ms" in found or "failed" in found or "wall_us" in found
    }
    return [name for name in COLORS if name in seen]


def entry(cell, name, rates):
    """The fraction of the copy rate; what took place where there is none."""
    found = cell["results"].get(name, {})
    if "failed" in found:
        return "failed"
    if "refused" in found:
        return "refused"
    rate = copy_rate(cell, rates)
    if "gbps" not in found or not rate:
        return ""
    return f"{found['gbps'] / rate:.2f}"


def label(cell):
    dtype = cell["dtype"]
    if cell["group"] == "rows":
        return f"{dtype}, N = {cell['n']:,}"
    shape = " x ".join(map(str, cell["shape"]))
    return f"{dtype}, {shape}, " + (
        f"{cell['mask']} mask" if cell["mask"] else f"axis {cell['axis']}"
    )


def speed_tables(result, rates):
    """One an operation: the contenders in columns."""
    lines = []
    for op in TITLES:
        cells = [c for c in result["cells"] if c["op"] == op]
        names = contenders(cells)
        if not cells or op == "gradient":
            continue
        rows = [[label(c), *(entry(c, n, rates) for n in names)] for c in cells]
        lines += [f"## {TITLES[op]}", "", "GB/s as a fraction of the copy rate.", ""]
        lines += table(["", *names], rows)
    return lines


def ratio(results, key, name="default", other="jax.nn"):
    """How many times as fast as jax.nn."""
    if key in results.get(name, {}) and key in results.get(other, {}):
        return f"{results[other][key] / results[name][key]:.2f}"
    return ""


def gradient_table(result):
    cells = [c for c in result["cells"] if c["op"] == "gradient"]
    if not cells:
        return []
    names = contenders(cells)

    def milliseconds(cell, name):
        found = cell["results"].get(name, {})
        return f"{found['ms']:.3f}" if "ms" in found else entry(cell, name, {})

    rows = [
        [
            label(c),
            *(milliseconds(c, n) for n in names),
            ratio(c["results"], "ms"),
        ]
        for c in cells
    ]
    text = (
        "Milliseconds; `default` is jaxsoftmax with `implementation=None`; the last "
        "column is how many times as fast as jax.nn it is."
    )
    return [
        *(f"## {TITLES['gradient']}", "", text, ""),
        *table(["", *names, "speed, default : jax.nn"], rows),
    ]


def small_table(result):
    if not result["small"]:
        return []
    names = contenders(result["small"])

    def microseconds(found):
        if "wall_us" not in found:
            return "refused" if "refused" in found else "failed" if found else ""
        device = found.get("device_us")
        return f"{found['wall_us']:.1f} ({device:.1f})" if device else "?"

    rows = [
        [
            f"{c['dtype']}, {' x '.join(map(str, c['shape']))}",
            *(microseconds(c["results"].get(n, {})) for n in names),
            ratio(c["results"], "wall_us"),
            ratio(c["results"], "device_us"),
        ]
        for c in result["small"]
    ]
    text = (
        f"{TITLES['gradient']}, microseconds a call by the host's clock, many calls "
        "blocked on once, and in brackets on the device. The last columns are how many "
        "times as fast as jax.nn the default is, by each clock."
    )
    header = ["", *names, "speed, host", "speed, device"]
    return ["## Small problems", "", text, "", *table(header, rows)]


def compile_table(result):
    seconds = {}
    for cell in result["cells"]:
        for name, found in cell["results"].items():
            if "compile_s" in found and "failed" not in found:
                seconds.setdefault(name, []).append(found["compile_s"])
    if not seconds:
        return []
    rows = [
        [name, str(len(s)), f"{sorted(s)[len(s) // 2]:.2f}", f"{max(s):.2f}"]
        for name, s in seconds.items()
    ]
    text = (
        "Seconds to trace, lower and compile one program of one operation. Several are "
        "compiled at a time, so these are upper bounds."
    )
    header = ["", "programs", "median", "longest"]
    return ["## Compile time", "", text, "", *table(header, rows)]


def remarks(result):
    """Why a contender has no figure, and how wrong the others are, once a reason."""
    reasons = {}
    for cell in [*result["cells"], *result["small"]]:
        for name, found in cell["results"].items():
            for kind in ("refused", "failed"):
                if kind in found:
                    key = name, kind, found[kind]
                    reasons[key] = reasons.get(key, 0) + 1
    lines = [
        f"- {name} {kind} {count} case{'s' if count > 1 else ''}: {reason}"
        for (name, kind, reason), count in reasons.items()
    ]
    lines += [f"- {note}" for note in result.get("notes", [])]
    # "op dtype shape axis -1 mask": a line a dtype, the shapes of any operation.
    shapes = {}
    for case in result.get("not_run", []):
        _, dtype, shape = case.strip().split(maxsplit=2)
        shapes.setdefault(dtype, {})[shape.replace(" axis -1", "")] = None
    for dtype, them in shapes.items():
        lines.append(f"- not run, for want of time: {dtype} {', '.join(them)}")
    return ["## Cases without a figure", "", *lines, ""] if lines else []


def errors_table(result):
    worst = {}
    for cell in result["cells"]:
        for name, found in cell["results"].items():
            if "row_error" in found:
                key = name, cell["dtype"]
                worst[key] = max(worst.get(key, 0), found["row_error"])
    if not worst:
        return []
    rows = [[f"{n}, {d}", f"{error:.1e}"] for (n, d), error in sorted(worst.items())]
    text = (
        "Largest error of the rows that were checked against float64, relative to the "
        "row's largest entry, over all operations."
    )
    return ["## Errors", "", text, "", *table(["", "error"], rows)]


def markdown(result):
    versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items() if v)
    rates = copy_rates(result)
    copies = ", ".join(f"{dtype} {rate:,.0f} GB/s" for dtype, rate in rates.items())
    lines = [
        f"# Speed of softmax on {result['device']}",
        "",
        f"Made by `{result['command']}`. Driver {result['driver']}; {versions}.",
        f"{result['elements']:,} entries a case; medians over {result['rounds']} "
        f"rounds in which the contenders took turns. Clock: {result['clock']}.",
        f"Copy rate: {copies or 'not measured'}. GB/s counts the fewest bytes: forward "
        "one read and one write, backward two reads and one write.",
        "",
        *speed_tables(result, rates),
        *gradient_table(result),
        *small_table(result),
        *compile_table(result),
        *errors_table(result),
        *remarks(result),
    ]
    return "\n".join(lines).rstrip() + "\n"


# --- the picture ----------------------------------------------------------------------


def power_label(n):
    return f"{n // 2**20}M" if n >= 2**20 else f"{n // 1024}k" if n >= 1024 else str(n)


def draw_panel(axes, cells, rates):
    """Powers of two joined by a line; ragged lengths as hollow marks."""
    for name in contenders(cells):
        points = sorted(
            (cell["n"], cell["results"][name]["gbps"])
            for cell in cells
            if "gbps" in cell["results"].get(name, {})
        )
        aligned = [p for p in points if p[0] & (p[0] - 1) == 0]
        ragged = [p for p in points if p[0] & (p[0] - 1)]
        ours = name in ("mosaic_gpu", "triton", "default")
        style = {"color": COLORS[name], "zorder": 3 if ours else 2}
        if aligned:
            width = 2.2 if ours else 1.3
            axes.plot(*zip(*aligned, strict=True), "o-", ms=4, lw=width, **style)
        if ragged:
            axes.plot(*zip(*ragged, strict=True), "o", ms=6, mfc="white", **style)
    rate = copy_rate(cells[0], rates)
    if rate:
        axes.axhline(rate, color="black", lw=1, ls="--", zorder=1)
        at = axes.get_yaxis_transform()
        axes.text(
            *(0.99, rate * 1.035, f"copy {rate:,.0f}"),
            **{"transform": at, "fontsize": 9, "ha": "right"},
        )


def finish_panel(axes, ticks, top):
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [power_label(n) for n in ticks])
    axes.set_xlim(ticks[0] / 1.4, ticks[-1] * 1.4)
    axes.set_ylim(0, top * 1.12)
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def draw(result, path):
    """GB/s over N: a row of panels an operation, a column a dtype."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    cells = [
        c for c in result["cells"] if c["group"] == "rows" and c["op"] != "gradient"
    ]
    ops = [op for op in TITLES if any(c["op"] == op for c in cells)]
    dtypes = list(dict.fromkeys(c["dtype"] for c in cells))
    if not ops:
        return
    rates = copy_rates(result)
    size = (12, 0.9 + 2.7 * len(ops))
    figure, grid = pyplot.subplots(
        *(len(ops), len(dtypes)), figsize=size, sharex=True, sharey=True, squeeze=False
    )
    ns = sorted({c["n"] for c in cells if c["n"] & (c["n"] - 1) == 0})
    ns = ns or sorted({c["n"] for c in cells})
    ticks = ns if len(dtypes) == 1 or len(ns) < 7 else ns[::2]
    figures = [f["gbps"] for c in cells for f in c["results"].values() if "gbps" in f]
    top = max([*rates.values(), *figures], default=1)
    for row, op in zip(grid, ops, strict=True):
        for axes, dtype in zip(row, dtypes, strict=True):
            panel = [c for c in cells if (c["op"], c["dtype"]) == (op, dtype)]
            if panel:
                draw_panel(axes, panel, rates)
            finish_panel(axes, ticks, top)
            axes.set_title(f"{TITLES[op]}, {dtype}", fontsize=11, loc="left")
        row[0].set_ylabel("GB/s")
    for axes in grid[-1]:
        axes.set_xlabel("N, entries a row")
    names = contenders(cells)
    handles = [
        Line2D([], [], color=COLORS[n], marker="o", ms=4, label=n) for n in names
    ]
    hollow = {"mfc": "white", "mec": "0.3", "ls": "", "label": "N not a power of 2"}
    handles.append(Line2D([], [], marker="o", **hollow))
    figure.suptitle(
        f"Softmax on {result['device']}", fontsize=13, x=0.01, y=0.995, ha="left"
    )
    figure.legend(
        *(),
        **{"handles": handles, "ncols": len(handles), "frameon": False},
        **{"loc": "upper right", "fontsize": 10},
    )
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.45 / size[1]))
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
