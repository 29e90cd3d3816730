"""Times attention on a GPU, in bfloat16: forward, gradient and forward mode.

    python benchmarks/gpu_attention.py --json F.json --markdown F.md --png F.png
    python benchmarks/gpu_attention.py --render F.json --markdown F.md --png F.png

As with gpu_softmax.py, `--export FOLDER` lowers what is ours in Mosaic GPU elsewhere,
for `--exported FOLDER`.

B x T = 32768 tokens and N x D = 2048 at every length T and head size D. ``forward``:
the output alone. ``gradient``: value and gradients of sum(out g) with respect to query,
key and value. ``jvp``: the output and its tangent, of tangents of all three. Ours:

- ``default``: implementation=None, which is cuDNN's attention where that can run;
- ``triton``: implementation="triton";
- ``mosaic_gpu``: implementation="mosaic_gpu";
- ``xla``: implementation="xla", the blockwise form.

Others: jax.nn.dot_product_attention as XLA (T x T logits) and as cuDNN; torch's
scaled_dot_product_attention with its flash and its cuDNN backend; of these, forward
mode has jax.nn's as XLA alone. What cuDNN does not take (a soft cap, sinks, dropout,
float32), and a bias with one number for each key, ours runs against the same in
jax.numpy, which has T x T logits, at the lengths and sizes of `OTHER_LENGTHS` and
`OTHER_SIZES`.

TFLOP/s counts the fewest products: 4 B N T T D operations forward, 3.5 times as many
with the backward, 3 times with the tangent, half of each where causal. Memory is what
is needed beyond arguments and results: XLA's own figure for the compiled program,
torch's peak.
Time: JAX on the host's clock, several calls blocked on once; torch by CUDA events
around several calls; the median of 5 such. Errors, for T up to 4096, are of some rows
of out (forward), of query's gradient and of the tangent against float64, relative to
the row's largest entry; the worst.

What would have more than 60 GB of T x T arrays, or of memory when compiled, is not run.
JAX programs are compiled in threads, some cells at a time, while nothing is timed.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import itertools
import os

# One pool for JAX, or the largest arrays would not fit between earlier ones; the rest
# is for torch.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "true")
if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:  # the older name
    os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.85")

import harness
import jax
import jax.numpy as jnp
import numpy as np
import report

import jaxsoftmax
from jaxsoftmax._compat import trace

TOKENS, WIDTH = 32768, 2048
# The most wanted first.
LENGTHS = [4096, 8192, 16384, 2048, 32768, 1024]
SIZES = [64, 128, 256]
MASKS = ["causal", "full"]
PASSES = ["gradient", "forward", "jvp"]
# Times what the forward takes: of operations.
OPERATIONS = {"forward": 1.0, "gradient": 3.5, "jvp": 3.0}
# Arrays like the query: arguments, and results of a gradient or of forward mode.
ARGUMENTS = {"forward": 4, "gradient": 4, "jvp": 6}
RESULTS = {"forward": 1, "gradient": 3, "jvp": 2}
OTHERS = ["soft cap", "sinks", "dropout", "key bias", "float32"]
OTHER_LENGTHS, OTHER_SIZES = [4096, 8192], [64, 128]
SOFT_CAP = 30.0
DROPOUT_RATE, DROPOUT_KEY = 0.1, np.array([0, 1], np.uint32)
# Of these, what is ours in Mosaic GPU.
OURS_ALONE = [
    *((other, "default") for other in ("soft cap", "sinks", "dropout")),
    ("key bias", "mosaic_gpu"),
]
# What is compared with the blocks in jax.numpy; of others, with Triton too.
NAMES_OF = {
    "dropout": ("mosaic_gpu", "xla"),
    "key bias": ("mosaic_gpu", "cudnn", "xla"),
}
LONGEST_CHECKED = 4096
MOST_BYTES = 60e9
# Programs that are compiled before any of them is timed: those of so many cells.
TOGETHER = 8
COLORS = {
    "default": "#c1272d",
    "mosaic_gpu": "#9467bd",
    "triton": "#e377c2",
    "xla": "#f28e2b",
    "cudnn": "#0b3d91",
    "jax.nn, xla": "#6fa8dc",
    "jax.nn, cudnn": "#1f4e9e",
    "torch, flash": "#8fce00",
    "torch, cudnn": "#3d8b37",
    "in jax.numpy": "#8c8c8c",
}
TORCH_BACKENDS = {"torch, flash": "FLASH_ATTENTION", "torch, cudnn": "CUDNN_ATTENTION"}
IN_JNP = "in jax.numpy"
WITH_LOGITS = ("jax.nn, xla", IN_JNP)


@dataclasses.dataclass(frozen=True)
class Cell:
    """What is timed; `other`, if any, is one of `OTHERS`."""

    shape: tuple[int, int, int, int]
    causal: bool
    direction: str
    other: str | None = None

    @property
    def length(self):
        return self.shape[1]

    @property
    def dtype(self):
        return "float32" if self.other == "float32" else "bfloat16"

    @property
    def flops(self):
        batch, length, heads, size = self.shape
        forward = 4.0 * batch * heads * length * length * size
        return forward * OPERATIONS[self.direction] / (2 if self.causal else 1)

    @property
    def logits_bytes(self):
        """Of float32 logits; with derivatives, of their cotangents or tangents too."""
        batch, length, heads, _ = self.shape
        arrays = 1 if self.direction == "forward" else 2
        return 4.0 * batch * heads * length * length * arrays

    @property
    def record(self):
        return {
            **{"shape": list(self.shape), "causal": self.causal, "dtype": self.dtype},
            **{"direction": self.direction, "other": self.other, "flops": self.flops},
            "results": {},
        }

    def __str__(self):
        batch, length, heads, size = self.shape
        words = [self.other or "", "causal" if self.causal else "full", self.direction]
        return f"T {length} D {size} B {batch} N {heads} {' '.join(words).strip()}"


def cells(args):
    """The most wanted first; what is in the table of other cases, among them."""
    tokens, width = (256, 32) if args.smoke else (TOKENS, WIDTH)

    def several(lengths, sizes, other=None):
        def lateness(key):
            length, size, mask = key
            return (size == 256, length not in (4096, 8192), mask != "causal")

        keys = sorted(itertools.product(lengths, sizes, args.masks), key=lateness)
        pairs = itertools.product(keys, args.directions)
        for (t, d, mask), direction in pairs:
            shape = tokens // t, t, width // d, d
            yield Cell(shape, mask == "causal", direction, other)

    found = list(several(args.lengths, args.sizes)) if args.plain else []
    lengths, sizes = (
        [n for n in given if args.smoke or n in those]
        for given, those in [
            (args.lengths, OTHER_LENGTHS),
            (args.sizes, OTHER_SIZES),
        ]
    )
    others = [c for other in args.others for c in several(lengths, sizes, other)]
    first = 8 * len(args.directions)
    return [*found[:first], *others, *found[first:]]


# --- the contenders -------------------------------------------------------------------


def in_jnp(cell):
    """As it is usually written: T x T logits in float32."""
    options = options_of(cell)
    cap, sinks = options.get("logits_soft_cap"), options.get("sinks")
    bias, rate = options.get("bias"), options.get("dropout_rate")

    def attend(q, k, v):
        s = jnp.einsum("btnd,bsnd->bnts", q, k, preferred_element_type=jnp.float32)
        s = s * q.shape[-1] ** -0.5
        if cap is not None:
            s = cap * jnp.tanh(s / cap)
        if bias is not None:
            s = s + bias.astype(s.dtype)
        if cell.causal:
            s = jnp.where(jnp.tril(jnp.ones(s.shape[-2:], bool)), s, -jnp.inf)
        if sinks is not None:
            column = jnp.broadcast_to(sinks[:, None, None], (*s.shape[:-1], 1))
            p = jax.nn.softmax(jnp.concatenate([s, column], -1))[..., :-1]
        else:
            p = jax.nn.softmax(s)
        if rate is not None:
            keep = jax.random.bernoulli(DROPOUT_KEY, np.float32(1 - rate), p.shape)
            p = jnp.where(keep, p / (1 - rate), 0.0)
        return jnp.einsum("bnts,bsnd->btnd", p.astype(v.dtype), v)

    return attend


def options_of(cell):
    batch, length, heads, _ = cell.shape
    bias = np.linspace(-1, 1, length, dtype=np.float32).astype(cell.dtype)
    return {
        "soft cap": {"logits_soft_cap": SOFT_CAP},
        "sinks": {"sinks": np.linspace(-1, 1, heads, dtype=np.float32)},
        "dropout": {"dropout_rate": DROPOUT_RATE, "dropout_key": DROPOUT_KEY},
        "key bias": {"bias": np.broadcast_to(bias, (batch, 1, 1, length))},
    }.get(cell.other, {})


def jax_contenders(cell):
    """name -> function of query, key and value."""
    of = functools.partial
    ours = of(
        jaxsoftmax.dot_product_attention, is_causal=cell.causal, **options_of(cell)
    )
    if cell.other is not None:
        names = NAMES_OF.get(cell.other, ("triton", "xla"))
        named = {name: of(ours, implementation=name) for name in names}
        return {"default": ours, **named, IN_JNP: in_jnp(cell)}
    theirs = of(jax.nn.dot_product_attention, is_causal=cell.causal)
    found = {
        "default": ours,
        "triton": of(ours, implementation="triton"),
        "mosaic_gpu": of(ours, implementation="mosaic_gpu"),
        "xla": of(ours, implementation="xla"),
        "jax.nn, xla": of(theirs, implementation="xla"),
    }
    if cell.direction != "jvp":  # which it refuses
        found["jax.nn, cudnn"] = of(theirs, implementation="cudnn")
    return found


def program_of(f, direction):
    """A jitted function of query, key and value, and of g, or of their tangents.

    The forward has no use for g.
    """
    if direction == "forward":
        return jax.jit(lambda q, k, v, g: f(q, k, v), keep_unused=True)
    if direction == "jvp":
        return jax.jit(lambda *x: jax.jvp(f, x[:3], x[3:]))

    def loss(q, k, v, g):
        return jnp.sum(f(q, k, v).astype(jnp.float32) * g.astype(jnp.float32))

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))


def checked(cell, result):
    """What is compared: out, query's gradient, or the tangent of out."""
    if cell.direction == "forward":
        return result
    return result[1][0] if cell.direction == "gradient" else result[1]


def lower(f, cell):
    x = jax.ShapeDtypeStruct(cell.shape, jnp.dtype(cell.dtype))
    return [program_of(f, cell.direction).lower(*[x] * ARGUMENTS[cell.direction])]


def is_exported(cell, name):
    """Whether a program is in Mosaic GPU alone."""
    return name == "mosaic_gpu" or (cell.other, name) in OURS_ALONE


def export(args):
    """Writes the programs whose lowering takes longest."""
    for cell in cells(args):
        x = jax.ShapeDtypeStruct(cell.shape, jnp.dtype(cell.dtype))
        for name, f in jax_contenders(cell).items():
            if not is_exported(cell, name):
                continue
            with harness.gpu_that_is_not_there():
                arguments = [x] * ARGUMENTS[cell.direction]
                program = program_of(f, cell.direction), arguments
                harness.export(
                    harness.exported_path(args.export, name, cell), [program]
                )


def prepare(cell, args, pool):
    """name -> program, or why there is none."""
    found = {}
    for name, f in jax_contenders(cell).items():
        if args.contenders and name not in args.contenders:
            continue
        if name in WITH_LOGITS and cell.logits_bytes > MOST_BYTES:
            found[name] = f"{cell.logits_bytes / 1e9:.0f} GB of logits"
        else:
            here = functools.partial(lower, f, cell)
            if args.exported and is_exported(cell, name):
                path = harness.exported_path(args.exported, name, cell)
                here = functools.partial(harness.read_exported, path)
            found[name] = harness.Compiling(pool, here)
    return found


# --- the check of what is timed -------------------------------------------------------


def places(shape):
    """(example, rows, head) that are checked."""
    batch, length, heads, _ = shape
    rows = np.array([length // 7, length // 2, length - 1])
    return [(0, rows, 0), (batch - 1, rows, heads - 1)]


def kept(cell, entry, rows, head):
    """Which weights of these rows dropout keeps."""
    _, length, heads, _ = cell.shape
    row = (entry * heads + head) * length + rows.astype(np.uint64)
    place = row[:, None] * np.uint64(length) + np.arange(length, dtype=np.uint64)
    words = (place >> np.uint64(32)).astype(np.uint32), place.astype(np.uint32)
    bits = np.asarray(trace.threefry(DROPOUT_KEY, *words)) >> 9
    return bits * 2.0**-23 < np.float32(1 - DROPOUT_RATE)


def expected(cell, arrays):
    """Rows of what is `checked`, in float64."""
    options = options_of(cell)
    cap, sinks = options.get("logits_soft_cap"), options.get("sinks")
    bias, rate = options.get("bias"), options.get("dropout_rate", 0)
    found = []
    for b, rows, n in places(cell.shape):
        picked = [a[b, :, n].astype(jnp.float32) for a in arrays]
        q, k, v, *others = (np.asarray(a, np.float64) for a in picked)
        scale = q.shape[-1] ** -0.5
        s = scale * (q[rows] @ k.T)
        if cap is not None:
            s = cap * np.tanh(s / cap)
        if bias is not None:
            s = s + bias[b, 0].astype(np.float64)
        allowed = np.arange(len(k)) <= rows[:, None] if cell.causal else True
        e = np.where(allowed, np.exp(s), 0)
        p = e / (e.sum(-1, keepdims=True) + (0 if sinks is None else np.exp(sinks[n])))
        slope = 1 if cap is None else 1 - (s / cap) ** 2
        factor = kept(cell, b, rows, n) / (1 - rate) if rate else 1
        if cell.direction == "forward":
            found.append((p * factor) @ v)
        elif cell.direction == "gradient":
            dp = (others[0][rows] @ v.T) * factor
            ds = p * (dp - (p * dp).sum(-1, keepdims=True)) * slope
            found.append(scale * (ds @ k))
        else:
            dq, dk, dv = others
            ds = scale * (dq[rows] @ k.T + q[rows] @ dk.T) * slope
            ds = p * (ds - (p * ds).sum(-1, keepdims=True))
            found.append((ds * factor) @ v + (p * factor) @ dv)
    return np.stack(found)


def error_of(cell, result, want):
    """{"error": that of the checked rows}, of an array of JAX or of torch."""
    if want is None:
        return {}
    picked = []
    for b, rows, n in places(cell.shape):
        if isinstance(result, jax.Array):
            rows = result[b, jnp.array(rows), n].astype(jnp.float32)
        else:
            rows = result.detach()[b, rows.tolist(), n].float().cpu().numpy()
        picked.append(np.asarray(rows, np.float64))
    return {"error": harness.row_error(np.stack(picked), want)}


def run_jax(cell, program, arrays, want):
    if isinstance(program, str):
        raise harness.NotTried(program)
    [compiled] = program.programs()
    memory = compiled.memory_analysis()
    results = RESULTS[cell.direction]
    extra = memory.temp_size_in_bytes
    extra += max(0, memory.output_size_in_bytes - results * arrays[0].nbytes)
    if extra > MOST_BYTES:
        raise harness.NotTried(f"{extra / 1e9:.0f} GB of memory")
    result = compiled(*arrays)
    found = error_of(cell, checked(cell, result), want)
    del result
    return found | {
        "compile_s": round(program.seconds, 2),
        # Of the largest only one at a time is sure to fit.
        "ms": harness.wall_ms(
            functools.partial(compiled, *arrays), 1 if extra > 10e9 else 20
        ),
        "extra_bytes": int(extra),
    }


def run_torch(torch, cell, arrays, want, backend):
    from torch.nn import attention

    q, k, v, g = (torch.from_dlpack(a).detach().clone() for a in arrays)
    backward = cell.direction == "gradient"
    inputs = [x.requires_grad_(backward) for x in (q, k, v)]
    backend = getattr(attention.SDPBackend, backend)

    def forward():
        with attention.sdpa_kernel(backend):
            out = torch.nn.functional.scaled_dot_product_attention(
                *(x.transpose(1, 2) for x in inputs), is_causal=cell.causal
            )
        return out.transpose(1, 2)

    def gradient():
        out = forward()
        value = torch.dot(out.detach().reshape(-1), g.reshape(-1))
        return value, torch.autograd.grad(out, inputs, g)

    def look(result):
        return error_of(cell, checked(cell, result), want)

    results = RESULTS[cell.direction] * arrays[0].nbytes
    return harness.time_torch(
        *(torch, gradient if backward else forward, results, look),
        calls=10 if cell.flops < 1e13 else 3,
    )


# --- a run ----------------------------------------------------------------------------


def flat_inputs(cell):
    size = int(np.prod(cell.shape))
    seeds = range(ARGUMENTS[cell.direction])
    return [harness.normal(seed, size, cell.dtype) for seed in seeds]


def versions_of_cudnn(torch):
    try:
        from jax._src.lib import cuda_versions

        found = {"cuDNN": cuda_versions.cudnn_get_version()}
    except Exception:  # there is none
        found = {"cuDNN": None}
    if torch is not None:
        found["cuDNN of torch"] = torch.backends.cudnn.version()
    return found


def measure(args):
    if args.smoke:
        args.lengths, args.sizes = [64, 128], [8, 16]
    torch, result = harness.start(args, "host (JAX), CUDA events (torch)")
    result["versions"] |= versions_of_cudnn(torch)
    pool = concurrent.futures.ThreadPoolExecutor(args.jobs)
    wanted = cells(args)
    while wanted:
        if harness.out_of_time(args):
            break
        together, wanted = wanted[:TOGETHER], wanted[TOGETHER:]
        programs = {cell: prepare(cell, args, pool) for cell in together}
        harness.say("lowered", len(together), "cells")
        for each in programs.values():
            for program in each.values():
                if isinstance(program, harness.Compiling):
                    program.wait()
        harness.say("compiled")
        for cell in together:
            run_cell(cell, programs.pop(cell), result, args, torch)
    result["left_out"] = [str(cell) for cell in wanted]
    harness.say("left out, for want of time:", result["left_out"] or "nothing")
    harness.write(args.json, result)
    return result


def run_cell(cell, programs, result, args, torch):
    arrays = [x.reshape(cell.shape) for x in flat_inputs(cell)]
    want = expected(cell, arrays) if cell.length <= LONGEST_CHECKED else None
    runs = {
        name: functools.partial(run_jax, cell, program, arrays, want)
        for name, program in programs.items()
    }
    if torch is not None and cell.other is None and cell.direction != "jvp":
        timed = functools.partial(run_torch, torch, cell, arrays, want)
        for name, backend in TORCH_BACKENDS.items():
            if not args.contenders or name in args.contenders:
                runs[name] = functools.partial(timed, backend)
    record = cell.record
    result["cells"].append(record)
    harness.run_all(runs, record, result, args, torch, str(cell))
    figures = (
        f"{name} {rate(record, name):.0f}" for name in runs if rate(record, name)
    )
    harness.say(f"{cell}: TFLOP/s:", ", ".join(figures))


# --- what is written ------------------------------------------------------------------


def rate(cell, name):
    """TFLOP/s, or None."""
    found = cell["results"].get(name, {})
    return cell["flops"] / found["ms"] / 1e9 if "ms" in found else None


def entry(cell, name, show):
    """What `show` makes of the figures, else why there are none."""
    found = cell["results"].get(name, {})
    if "ms" in found:
        return show(found)
    if not found:
        return ""
    why = found.get("not_run", "").split(" (")[0]
    return f"({why})" if len(why) <= 25 else "(failed)"


def label(cell):
    mask = "causal" if cell["causal"] else "full"
    return f"D {cell['shape'][3]}, {mask}, T {cell['shape'][1]:,}"


def cells_of(result, direction, other=None):
    """In the order of the tables."""
    of = (direction, other)
    found = [c for c in result["cells"] if (c["direction"], c["other"]) == of]
    return sorted(found, key=lambda c: (c["shape"][3], not c["causal"], c["shape"][1]))


def names_in(cells):
    return [n for n in COLORS if any(n in cell["results"] for cell in cells)]


def grid(cells, show):
    """A row a cell, a column a contender."""
    names = names_in(cells)
    rows = [
        [label(c), *(entry(c, n, functools.partial(show, c)) for n in names)]
        for c in cells
    ]
    return report.table(["", *names], rows)


def speed(cell, found):
    return f"{found['ms']:.2f} ({cell['flops'] / found['ms'] / 1e9:,.0f})"


def memory(cell, found):
    return report.megabytes(found["extra_bytes"])


def error(cell, found):
    return f"{found['error']:.1e}" if "error" in found else ""


CHECKED = {"forward": "out", "gradient": "query's gradient", "jvp": "the tangent"}


def title(direction):
    return "Forward mode" if direction == "jvp" else direction.capitalize()


def remarks(result):
    """Why a contender has no figure, once a reason."""
    reasons = harness.counted(result["cells"], ("not_run",))
    lines = [f"- {name}, {n} x: {why}" for (name, _, why), n in reasons.items()]
    return ["## Without a figure", "", *lines, ""] if lines else []


def beside_cudnn(result):
    """What ours in Mosaic GPU reach of the rate of cuDNN without these options."""
    rows = []
    for direction in ("forward", "gradient"):
        for plain in cells_of(result, direction):
            reached = rate(plain, "jax.nn, cudnn")
            if reached is None:
                continue
            row = [f"{direction}, {label(plain)}", f"{reached:,.0f}"]
            for other, name in ((None, "mosaic_gpu"), *OURS_ALONE):
                same = [
                    rate(c, name)
                    for c in cells_of(result, direction, other)
                    if (c["shape"], c["causal"]) == (plain["shape"], plain["causal"])
                ]
                row.append(f"{same[0] / reached:.2f}" if any(same) else "")
            if any(row[2:]):
                rows.append(row)
    header = ["", "cuDNN, TFLOP/s", "mosaic_gpu", *(other for other, _ in OURS_ALONE)]
    if not rows:
        return []
    note = "Of the rate of cuDNN at the plain case of the same shape."
    return ["## Beside cuDNN", "", note, "", *report.table(header, rows)]


def markdown(result):
    note = (
        "The columns `default`, `mosaic_gpu`, `triton` and `xla` are ours. In float32 "
        "products have JAX's default precision; the soft cap is "
        f"{SOFT_CAP:g}, the rate of dropout {DROPOUT_RATE:g}."
    )
    lines = report.heading("Attention", result, note)
    lines += beside_cudnn(result)
    for other, direction in itertools.product([None, *OTHERS], PASSES):
        cells = cells_of(result, direction, other)
        if not cells:
            continue
        heading = title(direction) if other is None else f"{title(direction)}, {other}"
        lines += [f"## {heading}: ms (TFLOP/s)", "", *grid(cells, speed)]
        lines += [f"## {heading}: memory beyond", "", *grid(cells, memory)]
        checked = [c for c in cells if c["shape"][1] <= LONGEST_CHECKED]
        if checked:
            lines += [f"## {heading}: error of {CHECKED[direction]}", ""]
            lines += grid(checked, error)
    return "\n".join([*lines, *remarks(result)])


def draw(result, path):
    """TFLOP/s of the gradient over T: a column per head size, a row per mask."""
    pyplot = report.pyplot()

    cells = cells_of(result, "gradient")
    if not cells:
        return
    sizes = sorted({c["shape"][3] for c in cells})
    masks = sorted({c["causal"] for c in cells}, reverse=True)
    names = names_in(cells)
    figure, panels = pyplot.subplots(
        *(len(masks), len(sizes)),
        figsize=(3.8 * len(sizes) + 2, 3 * len(masks) + 0.6),
        **{"squeeze": False, "sharex": True, "sharey": True, "layout": "constrained"},
    )
    for row, causal in zip(panels, masks, strict=True):
        for axes, size in zip(row, sizes, strict=True):
            panel = [c for c in cells if (c["causal"], c["shape"][3]) == (causal, size)]
            for name in names:
                points = [(c["shape"][1], rate(c, name)) for c in panel]
                points = [p for p in points if p[1]]
                ours = name in ("default", "mosaic_gpu", "triton", "xla")
                axes.plot(
                    *(zip(*points, strict=True) if points else ([], [])),
                    *("o-" if ours else "s--",),
                    **{"color": COLORS[name], "label": name, "ms": 4},
                    **{"lw": 2.2 if ours else 1.3, "zorder": 3 if ours else 2},
                )
            axes.set_title(
                f"D = {size}, {'causal' if causal else 'full'}", fontsize=10, loc="left"
            )
            report.power_axis(axes, sorted({c["shape"][1] for c in cells}))
        row[0].set_ylabel("TFLOP/s (more is better)")
    for axes in panels[-1]:
        axes.set_xlabel("T")
    figures = [rate(c, name) or 0 for c in cells for name in names]
    panels[0][0].set_ylim(0, 1.05 * max([*figures, 1e-9]))  # of all: they are shared
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    figure.suptitle(
        f"Attention, forward and backward, on {result['device']}", fontsize=11
    )
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def add_arguments(parser):
    add = parser.add_argument
    contenders = list(COLORS)
    add("--contenders", nargs="+", choices=contenders, help="some of them")
    add("--lengths", nargs="+", type=int, default=LENGTHS)
    add("--sizes", nargs="+", type=int, default=SIZES, help="of a head")
    add("--masks", nargs="+", default=MASKS, choices=MASKS)
    add("--directions", nargs="+", default=PASSES, choices=PASSES)
    add("--others", nargs="*", default=OTHERS, choices=OTHERS)
    add("--plain", action=argparse.BooleanOptionalAction, default=True)
    add("--jobs", type=int, default=16, help="threads that compile")


if __name__ == "__main__":
    harness.main(
        __doc__, harness.Program(measure, markdown, draw, add_arguments, export=export)
    )
