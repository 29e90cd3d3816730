"""What the benchmarks of losses on the CPU have in common."""

import os
import platform
import statistics
import time

import jax
import optax


def seconds(call):
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def in_turn(calls, rounds):
    """The seconds of each call, by name: in every round each is called once."""
    for call in calls.values():
        seconds(call)
    times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(seconds(call))
    return times


def median_ms(times):
    return 1e3 * statistics.median(times)


def median_ratio(times, base):
    """Of the times in the same round."""
    return statistics.median(a / b for a, b in zip(times, base, strict=True))


def versions():
    return (
        f"jax {jax.__version__}, optax {optax.__version__}, {os.cpu_count()} cores, "
        f"{platform.machine()}"
    )


def load(before):
    """A line on what else the machine did, given `os.getloadavg()` of before."""
    pair = f"{before[0]:.1f} before, {os.getloadavg()[0]:.1f} after"
    return f"Load average of the machine: {pair}."
