"""Weak scaling of softmax over several GPUs: each GPU's work stays as it is.

    python benchmarks/gpu_sharding.py --json FILE --markdown FILE --png FILE

Whole rows: `--elements` entries per GPU, split over the batch; nothing moves between
the devices. The figure is the rate of a GPU as a fraction of that of one GPU which
works alone, in the same run.

Shared rows: rows of 262,144 and 1,048,576 entries, each split over all GPUs; compared
with what XLA makes of jax.nn.softmax, whose maximum and sums it reduces over the
devices in the same way.

Times are the host's, of `--iterations` calls that are queued one after the other, so
that starting a call takes no time as long as the device is busy. Contenders take turns;
medians over `--rounds`. GB/s per GPU counts the fewest bytes: the forward reads x and
writes P, the backward reads P and g and writes dx.

With ``--render FILE`` nothing is measured: the report of that JSON file is written.
``--smoke`` runs tiny cases on simulated CPU devices, which tests this program.
"""

import functools
import os
import platform
import statistics
import sys

if "--smoke" in sys.argv:  # read when JAX starts
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
    )

import harness
import jax
import jax.numpy as jnp
import numpy as np
import report
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support import hlo

import jaxsoftmax

WHOLE = [1024, 4096, 32768]
SHARED = [262144, 1048576]
FUNCTIONS = {
    "jaxsoftmax": jaxsoftmax.softmax,
    "jaxsoftmax, xla": functools.partial(jaxsoftmax.softmax, implementation="xla"),
    "jax.nn": jax.nn.softmax,
    "jax.nn custom_jvp": jax.nn.softmax,
}
PASSES = {"forward": 2, "backward": 3, "forward and backward": 5}
# Worst difference of a gradient from that of float32 operands on one device, relative
# to the row's largest: that all compute the same.
SAME = 0.05


def compile_(name, what, x, g):
    """A compiled program, and its arguments."""
    jax.config.update("jax_softmax_custom_jvp", name == "jax.nn custom_jvp")
    f = FUNCTIONS[name]
    if what == "backward":
        # What the forward keeps lies where that puts it.
        keep, backward = harness.vjp_alone(f)
        kept = keep(x)
        return backward.lower(kept, g).compile(), (kept, g)

    def both(x, g):
        y, pull = jax.vjp(f, x)
        return y, pull(g)[0]

    if what == "forward":
        return jax.jit(f).lower(x).compile(), (x,)
    return jax.jit(both).lower(x, g).compile(), (x, g)


def operands(shape, dtype, sharding):
    """Random arrays, made where they lie."""

    @functools.partial(jax.jit, out_shardings=sharding)
    def make(seed):
        key = jax.random.key(seed)
        return jax.random.normal(key, shape, jnp.float32).astype(dtype)

    return make(0), make(1)


def measured(programs, args):
    """Median ms of each of {name: (program, args)}, which take turns."""
    times = {name: [] for name in programs}
    for _ in range(args.rounds):
        for name, (run, given) in programs.items():
            call = functools.partial(run, *given)
            jax.block_until_ready(call())
            times[name] += harness.wall_us(args.iterations, call)
    return {name: statistics.median(us) / 1e3 for name, us in times.items()}


def same(result, reference, rows):
    """Whether the gradients of some rows agree."""
    got, want = (np.asarray(each[1][:rows], np.float32) for each in (result, reference))
    return harness.row_error(got, want) <= SAME


def gbps(cell, ms):
    return PASSES[cell["what"]] * cell["bytes_a_gpu"] / ms / 1e6


def cell_of(args, count, n, dtype, what, split):
    return {
        **{"split": split, "n": n, "dtype": dtype, "what": what, "devices": count},
        "bytes_a_gpu": args.elements * jnp.dtype(dtype).itemsize,
    }


def whole_rows(args, n, dtype, what):
    """All GPUs together against one of them alone."""
    count = jax.device_count()
    mesh = jax.make_mesh((count,), ("d",), axis_types=(AxisType.Auto,))
    rows = args.elements // n
    alone = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    one = operands((rows, n), dtype, alone)
    many = operands((count * rows, n), dtype, NamedSharding(mesh, P("d")))
    programs, moved = {}, {}
    for name in args.contenders:
        programs[f"{name}, one GPU"] = compile_(name, what, *one)
        programs[name] = compile_(name, what, *many)
        moved[name] = hlo.total(hlo.collectives(programs[name][0]))
    ms = measured(programs, args)
    cell = cell_of(args, count, n, dtype, what, "whole rows")
    cell["results"] = {
        name: {
            "ms": ms[name],
            "gbps": gbps(cell, ms[name]),
            "one_gpu_ms": ms[f"{name}, one GPU"],
            "one_gpu_ratio": ms[f"{name}, one GPU"] / ms[name],
            "moved": moved[name],
        }
        for name in args.contenders
    }
    return cell


def shared_rows(args, n, dtype, what):
    """Each row on all GPUs."""
    count = jax.device_count()
    mesh = jax.make_mesh((count,), ("d",), axis_types=(AxisType.Auto,))
    rows = max(count * args.elements // n, 1)
    x, g = operands((rows, n), dtype, NamedSharding(mesh, P(None, "d")))
    programs, moved, temp = {}, {}, {}
    for name in args.contenders:
        run, _ = programs[name] = compile_(name, what, x, g)
        moved[name] = hlo.total(hlo.collectives(run))
        temp[name] = run.memory_analysis().temp_size_in_bytes
    agree = dict.fromkeys(programs, True)
    if what == "forward and backward":
        reference = programs["jax.nn"][0](x, g)
        agree = {
            name: same(run(*given), reference, 4)
            for name, (run, given) in programs.items()
        }
        del reference
    ms = measured(programs, args)
    cell = cell_of(args, count, n, dtype, what, "shared rows")
    cell["rows"] = rows
    cell["results"] = {
        name: {
            "ms": ms[name],
            "gbps": gbps(cell, ms[name]),
            "speed_of_jax_nn": ms["jax.nn"] / ms[name],
            "moved": moved[name],
            "temp_bytes": temp[name],
            "agrees": agree[name],
        }
        for name in args.contenders
    }
    return cell


def measure(args):
    if args.smoke:
        args.elements, args.rounds, args.iterations = 2**14, 1, 1
        args.whole, args.shared, args.dtypes = [128], [4096], ["float32"]
    result = {"about": about(), "cells": []}
    harness.say(result["about"])
    for dtype in args.dtypes:
        for what in PASSES:
            cases = [(whole_rows, n) for n in args.whole]
            cases += [(shared_rows, n) for n in args.shared]
            for case, n in cases:
                if harness.out_of_time(args):
                    harness.say("out of time before", case.__name__, n, dtype, what)
                    continue
                cell = case(args, n, dtype, what)
                result["cells"].append(cell)
                figures = {k: figure(cell, r) for k, r in cell["results"].items()}
                harness.say(cell["split"], n, dtype, what, figures)
                harness.write(args.json, result)
    return result


def about():
    return {
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "jax": jax.__version__,
        "jaxsoftmax": jaxsoftmax.__version__,
        "python": platform.python_version(),
        "command": harness.command(),
    }


def failures(result):
    return [
        f"{name}, N = {cell['n']}: differs from jax.nn's"
        for cell in result["cells"]
        for name, found in cell["results"].items()
        if not found.get("agrees", True)
    ]


# --- the report -----------------------------------------------------------------------

TITLES = {
    "whole rows": "GB/s per GPU; in brackets, of the rate of one GPU alone.",
    "shared rows": "GB/s per GPU; in brackets, times as fast as jax.nn.",
}


def figure(cell, found):
    key = "one_gpu_ratio" if cell["split"] == "whole rows" else "speed_of_jax_nn"
    return f"{found['gbps']:,.0f} ({found[key]:.2f})"


def moved(cell, found):
    nbytes = sum(found["moved"].values()) / cell["rows"]
    return f"{nbytes:.0f} B, {found['temp_bytes'] / 1e6:,.0f} MB"


def table(cells, show):
    names = list(cells[0]["results"])
    rows = [
        [
            f"{cell['what']}, {cell['dtype']}, N = {cell['n']:,}",
            *(show(cell, cell["results"][name]) for name in names),
        ]
        for cell in cells
    ]
    return report.table(["", *names], rows, space=" ")


def markdown(result):
    info = result["about"]
    lines = [
        f"# Speed of softmax on {info['devices']} {info['device']}",
        "",
        f"Made by `{info['command']}`. Python {info['python']}, "
        f"jaxsoftmax {info['jaxsoftmax']}, jax {info['jax']}.",
        "GB/s per GPU, of the bytes that must be read and written: forward one read "
        "and one write, backward two reads and one write. Host's clock, queued calls.",
        "",
    ]
    for split, title in TITLES.items():
        cells = [cell for cell in result["cells"] if cell["split"] == split]
        if not cells:
            continue
        lines += [f"## {split.capitalize()}", "", title, "", *table(cells, figure)]
        if split == "shared rows":
            title = "Bytes per row that all-reduces move, and temporary MB per GPU:"
            lines += [title, ""]
            lines += table(cells, moved)
    return "\n".join(lines)


def draw(result, path):
    plt = report.pyplot()

    cells = [c for c in result["cells"] if c["what"] == "forward and backward"]
    labels = [f"{c['split']}\n{c['dtype']}\nN = {c['n']:,}" for c in cells]
    names = list(cells[0]["results"])
    colors = ["#c1272d", "#8c564b", "#1f4e9e", "#6fa8dc"]
    fig, ax = plt.subplots(figsize=(1.4 * len(cells) + 2, 4.2), layout="constrained")
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        places = np.arange(len(cells)) + (i - (len(names) - 1) / 2) * width
        heights = [c["results"][name]["gbps"] for c in cells]
        ax.bar(places, heights, width, label=name, color=colors[i % len(colors)])
    ax.set_xticks(range(len(cells)), labels, fontsize=8)
    ax.set_ylabel("GB/s per GPU")
    info = result["about"]
    ax.set_title(
        f"softmax, forward and backward, on {info['devices']} x {info['device']}",
        fontsize=10,
    )
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16)}
    ax.legend(fontsize=8, frameon=False, ncols=len(names), **place)
    ax.spines[["top", "right"]].set_visible(False)
    fig.savefig(path, dpi=120)


def add_arguments(parser):
    add = parser.add_argument
    add("--elements", type=int, default=2**27, help="entries of an array on a GPU")
    add("--dtypes", nargs="+", default=["bfloat16", "float32"])
    add("--whole", nargs="*", type=int, default=WHOLE, help="N of whole rows")
    add("--shared", nargs="*", type=int, default=SHARED, help="N of shared rows")
    add("--contenders", nargs="+", default=list(FUNCTIONS), choices=list(FUNCTIONS))
    add("--rounds", type=int, default=5)
    add("--iterations", type=int, default=20, help="calls of a contender a round")
    parser.set_defaults(budget=480)


if __name__ == "__main__":
    harness.main(
        __doc__,
        harness.Program(measure, markdown, draw, add_arguments, failures=failures),
    )
