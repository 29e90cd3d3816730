"""Checks programs for several devices, on the GPUs at hand, against the oracle.

    python tests/gpu/check_sharding.py [--quick] [--smoke]

Exits with 1 if anything is wrong. ``--smoke`` runs small cases on simulated CPU
devices, which tests this program.

First, on one GPU, the kernels of the states of shares: the functions are computed from
them as for rows that devices share, with one device that has all. Then, on all GPUs,
values and gradients of arrays that are split over the batch or over the rows, with
automatic and with explicit axes; each compiled program is searched for what it moves
between the devices. Then attention with a soft cap and sinks, split over the batch or
over the heads, against the same on one device: results relative to the largest, within
1e-5 in float32 and 2e-2 in bfloat16.

Bars are those of tests/core/test_partitioning.py: values within 8 ulp in float32 and 1
in bfloat16; gradients, relative to the row's largest, 1e-6 in float32 (4e-6 for
log_softmax and rows above 4096) and 8e-3 in bfloat16. Gradients below 1e-9 of the
cotangent are not counted: a mean that devices share is rounded to float64.
"""

import argparse
import collections
import functools
import os
import pathlib
import sys
import time

if "--smoke" in sys.argv:  # read when JAX starts
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    )

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from support import hlo, oracle

from jaxsoftmax import dot_product_attention, explain, log_softmax, softmax
from jaxsoftmax._core import dispatch
from jaxsoftmax._core.device import target_device
from jaxsoftmax._core.partitioning import Across
from jaxsoftmax._rows import sharded
from jaxsoftmax._rows.call import ROWS, RowCall

FUNCTIONS = {"softmax": softmax, "log_softmax": log_softmax}
LENGTHS = [128, 1000, 1152, 4096, 16384, 50257, 65536, 131072, 262144, 1048576]
KERNELS = ["mosaic_gpu", "triton"]
VALUE_BAR = {"float32": 8, "bfloat16": 1}
GRADIENT_BAR = {"float32": 1e-6, "bfloat16": 8e-3}
START = time.perf_counter()


class Report:
    """Counts outcomes by title; keeps the worst errors and every failure."""

    def __init__(self, budget):
        self.budget = budget
        self.outcomes = collections.defaultdict(collections.Counter)
        self.worst = {}
        self.refused = collections.Counter()
        self.failures = []

    def run(self, title, case, function):
        if time.perf_counter() - START > self.budget:
            self.outcomes[title]["not run"] += 1
            return
        try:
            errors = function()
        except NotImplementedError as error:
            self.outcomes[title]["refused"] += 1
            self.refused[title, " ".join(str(error).split())[:160]] += 1
            return
        except Exception as error:  # the other cases are still worth running
            text = " ".join(str(error).split())
            self.fail(
                title, case, f"{type(error).__name__}: {text[:200]} .. {text[-300:]}"
            )
            return
        over = [
            f"{what} {e:.2e} > {bar:.0e}" for what, e, bar in errors if not e <= bar
        ]
        for what, error, _ in errors:
            key = title, what, case[1]
            self.worst[key] = max(self.worst.get(key, 0.0), error)
        if over:
            self.fail(title, case, "; ".join(over))
        else:
            self.outcomes[title]["passed"] += 1

    def fail(self, title, case, why):
        self.outcomes[title]["failed"] += 1
        self.failures.append(f"{title} {case}: {why}")
        print(
            f"[{time.perf_counter() - START:5.0f} s] FAILED",
            self.failures[-1],
            flush=True,
        )

    def print(self):
        columns = ("passed", "failed", "refused", "not run")
        print(f"\n{'':52}" + "".join(f"{c:>8}" for c in columns))
        for title, counts in self.outcomes.items():
            row = "".join(f"{counts[c]:8}" for c in columns)
            print(f"{title:52}{row}")
        print("\nworst error")
        for key, error in sorted(self.worst.items()):
            print(f"  {' '.join(key):70}{error:10.2e}")
        for (title, why), n in self.refused.items():
            print(f"refused {n} x {title}: {why}")
        for failure in self.failures:
            print("FAILED", failure)


# --- operands and what should come out ------------------------------------------------


def operands(rows, n, dtype, seed=0):
    """Logits of several spreads, some -inf, one row empty; a cotangent for them."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, n), np.float32) * np.resize([1, 4, 20], (rows, 1))
    x[0, :: max(n // 7, 1)] = -np.inf
    x[rows // 2] = -np.inf
    g = rng.standard_normal((rows, n), np.float32)
    g += np.resize([0.0, 1000.0, 0.0, 10.0], (rows, 1))
    return (jnp.array(a, dtype) for a in (x, g))


def errors(name, dtype, x, g, y, dx):
    """(what, error, bar) of a value and a gradient, on a sample of rows."""
    wanted = min(len(x), 12, max(2, 2**19 // x.shape[-1]))
    rows = np.unique(np.linspace(0, len(x) - 1, wanted).astype(int))
    rows = np.union1d(rows, [0, len(x) // 2])
    assert not np.asarray(dx, np.float64)[len(x) // 2].any(), "an empty row's gradient"
    x, g, y, dx = (np.asarray(a)[rows] for a in (x, g, y, dx))
    with np.errstate(all="ignore"):
        value = getattr(oracle, name)(x)
        counted = np.isfinite(value) & (value != 0)
        found = oracle.ulps(y[counted], value[counted], dtype, flushed=x.shape[-1])
        exact = np.asarray(y, np.float64)[~counted]
        assert (exact == value[~counted].astype(np.float64)).all(), "absent entries"
        if name == "softmax":
            want = oracle.softmax_derivative(y, g)
        else:
            want = oracle.log_softmax_vjp(x, g)
        assert np.isfinite(np.asarray(dx, np.float64)).all(), "a gradient is not finite"
        least = 1e-9 * float(np.abs(np.asarray(g, np.float64)).max())
        error = oracle.row_error(dx, want, dtype, least=least)
    bar = GRADIENT_BAR[dtype]
    if dtype == "float32" and (name == "log_softmax" or x.shape[-1] > 4096):
        bar = 4e-6
    return [("value, ulp", found, VALUE_BAR[dtype]), ("gradient", error, bar)]


# --- the states of shares, on one device ----------------------------------------------


class Alone(Across):
    """No device has another share."""

    def sum(self, x):
        return x

    max = sum


def refuse(kernel, call):
    """Raises what the implementation would refuse this call for."""
    reason = dispatch.refusal(kernel, call, target_device("cuda"), ROWS)
    if reason is not None:
        raise NotImplementedError(reason)


def from_states(kernel, name, dtype, x, g):
    """Value, gradient and tangent, each from the state that the kernel gives."""

    def state(op, *arrays):
        structs = tuple(
            None if a is None else jax.ShapeDtypeStruct(a.shape, a.dtype)
            for a in arrays
        )
        call = RowCall(op, (-1,), 1.0, np.dtype(dtype), arrays=structs)
        if kernel != "xla":
            refuse(kernel, call)
        return dispatch.get(kernel, ROWS).run(call, arrays)

    def run(op, *arrays):
        return sharded.run(
            RowCall(op, (-1,), 1.0, np.dtype(dtype)),
            arrays,
            state=state,
            across=Alone("devices"),
            inside=None,
        )

    @jax.jit
    def program(x, g):
        if name == "softmax":
            (p,) = run("softmax", x, None)
            return p, *run("softmax_derivative", p, g)
        y, row_max, excess = run("log_softmax", x, None)
        return (
            y,
            *run("log_softmax_pullback", x, None, row_max, excess, g),
            *run("log_softmax_pushforward", x, None, row_max, g),
        )

    y, dx, *_ = program(x, g)
    return y, dx


def check_states(report, kernels, lengths):
    for kernel in kernels:
        for n in lengths:
            for dtype in ("float32", "bfloat16"):
                x, g = operands(64 if n < 2**16 else 6, n, dtype)
                for name in FUNCTIONS:

                    def case(name=name, x=x, g=g, dtype=dtype, kernel=kernel):
                        y, dx = from_states(kernel, name, dtype, x, g)
                        return errors(name, dtype, x, g, y, dx)

                    report.run(f"states, {kernel}, {name}", (n, dtype), case)


# --- on all devices -------------------------------------------------------------------

# Bytes a row: of the forward, and of the derivative.
MOVED = {"softmax": (8, 16), "log_softmax": (12, 8)}


def is_anew(call):
    """Whether a derivative computes from the logits what the forward had, again."""
    return call.op == "softmax_derivative_anew" or call.alone


def on_devices(mesh, spec, implementation, name, dtype, x, g):
    f = functools.partial(FUNCTIONS[name], implementation=implementation)

    def both(x, g):
        y, pull = jax.vjp(f, x)
        return y, pull(g)[0]

    args = [jax.device_put(a, NamedSharding(mesh, spec)) for a in (x, g)]
    with jax.set_mesh(mesh):
        program = jax.jit(both).lower(*args).compile()
        y, dx = program(*args)
    found = hlo.total(hlo.collectives(program))
    rows = NamedSharding(mesh, spec).shard_shape(x.shape)[0]
    shared = len(spec) > 1
    forward, derivative = MOVED[name]
    # Whatever the mesh: of one device the calls are of whole arrays.
    anew = any(is_anew(choice.call) for choice in explain(both, x, g).choices)
    a_row = forward + derivative + (forward if anew else 0)
    moved = {"all-reduce": rows * a_row} if shared else {}
    assert found == moved, f"moves {found}, expected {moved}"
    assert y.sharding.is_equivalent_to(args[0].sharding, 2), "results lie elsewhere"
    return errors(name, dtype, x, g, y, dx)


def check_devices(report, implementations, lengths):
    count = jax.device_count()
    specs = [P("d"), P(None, "d")]
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((count,), ("d",), axis_types=(kind,))
        for spec in specs:
            for implementation in implementations:
                title = f"{count} devices, {kind.name}, {spec}, {implementation}"
                for n in lengths:
                    if n % count and len(spec) > 1:
                        continue  # arrays are not cut into unequal shares
                    for dtype in ("float32", "bfloat16"):
                        x, g = operands(16 if n < 2**16 else 4 * count, n, dtype)
                        for name in FUNCTIONS:
                            case = functools.partial(
                                *(on_devices, mesh, spec, implementation),
                                *(name, dtype, x, g),
                            )
                            report.run(title, (n, dtype), case)


ATTENTION_BAR = {"float32": 1e-5, "bfloat16": 2e-2}


def attention_on_devices(mesh, axis, implementation, dtype):
    """`axis` of [B, T, N, H] is split."""
    count = mesh.size
    rng = np.random.default_rng(0)

    def normal(heads):
        return jnp.array(rng.normal(size=(2 * count, 256, heads, 64)), dtype)

    floats = {"query": normal(4 * count), "key": normal(count), "value": normal(count)}
    floats["sinks"] = jnp.array(rng.normal(size=4 * count), jnp.float32)
    options = {"is_causal": True, "logits_soft_cap": 5.0, "precision": "highest"}

    @jax.jit
    def both(floats):
        def f(floats):
            return dot_product_attention(
                **floats, **options, implementation=implementation
            )

        out, pull = jax.vjp(f, floats)
        return out, pull(jnp.cos(out))[0]

    want = jax.device_get(both(floats))
    spec = P(*[None] * axis, "d")
    specs = dict.fromkeys(floats, spec) | {"sinks": P(*["d"] * (axis == 2))}
    args = {
        name: jax.device_put(x, NamedSharding(mesh, specs[name]))
        for name, x in floats.items()
    }
    with jax.set_mesh(mesh):
        program = both.lower(args).compile()
        got = program(args)
    found = hlo.total(hlo.collectives(program))
    # The sinks' gradient is a sum over the batch.
    moved = {"all-reduce": 4 * 4 * count} if axis == 0 else {}
    assert found == moved, f"moves {found}, expected {moved}"
    assert got[0].sharding.is_equivalent_to(args["query"].sharding, 4), "lies elsewhere"
    worst = []
    for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        worst.append(np.abs(a - b).max() / np.abs(b).max())
    return [("of the largest", max(worst), ATTENTION_BAR[dtype])]


def check_attention(report, implementations):
    count = jax.device_count()
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((count,), ("d",), axis_types=(kind,))
        for implementation, dtype in implementations:
            for axis, name in ((0, "batch"), (2, "heads")):
                title = f"{count} devices, {kind.name}, {name}, {implementation}"
                case = functools.partial(
                    attention_on_devices, mesh, axis, implementation, dtype
                )
                report.run(f"attention, {title}", (256, dtype), case)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer lengths")
    parser.add_argument("--smoke", action="store_true", help="on simulated devices")
    parser.add_argument(
        "--budget", type=float, default=3600, help="starts nothing new after (s)"
    )
    args = parser.parse_args()
    print(jax.device_count(), jax.devices()[0].device_kind, "jax", jax.__version__)
    report = Report(args.budget)
    if args.smoke:
        check_states(report, ["xla"], [128, 1000])
        check_devices(report, ["xla", None], [128, 1000])
        check_attention(report, [("xla", "float32"), (None, "bfloat16")])
    else:
        lengths = [128, 1152, 16384, 131072] if args.quick else LENGTHS
        check_states(report, KERNELS, lengths)
        device_lengths = [1000, 32768] if args.quick else [1000, *LENGTHS[3:]]
        check_devices(report, [None, "xla", "triton"], device_lengths)
        kernels = [("mosaic_gpu", "bfloat16"), ("triton", "bfloat16")]
        check_attention(report, [*kernels, ("triton", "float32"), (None, "bfloat16")])
    report.print()
    passed = sum(counts["passed"] for counts in report.outcomes.values())
    print(f"\n{passed} passed, {time.perf_counter() - START:.0f} s")
    sys.exit(bool(report.failures) or not passed)


if __name__ == "__main__":
    main()
