"""Settings for the whole suite: strict, on the CPU, with 8 simulated devices.

With JAX_PLATFORMS=cuda,cpu the same tests run on a GPU, over the kernels too.
"""

import gc
import os

from support import compilation

# Before jax starts: devices to shard over, no accelerator unless asked for, and code
# that is quick to compile.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        *compilation.quick_flags(),
    ]
)

import jax
import numpy as np
import pytest
from support import opaque, pairwise

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_nans", True)
# Of each operation's place one frame is enough: no test reads more.
jax.config.update("jax_include_full_tracebacks_in_locations", False)
# Tracing makes many objects and little garbage.
gc.set_threshold(100_000, 20, 100)

opaque.register()


@pytest.fixture(params=["xla", *opaque.KERNELS])
def implementation(request: pytest.FixtureRequest) -> str:
    """Every implementation that can run here; all pass the same tests."""
    return request.param


def _values(parameters):
    """Of a case, by name; those of a parameter that is a dict of options each."""
    options = [v for v in parameters.values() if isinstance(v, dict)]
    alone = {k: v for k, v in parameters.items() if not isinstance(v, dict)}
    return {k: repr(v) for each in (alone, *options) for k, v in each.items()}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Thins the products that are marked `pairwise`.

    What repeats combinations of `strength` values is slow; of that, what repeats those
    of one value more, or of `rare`, is not run.
    """
    products, dropped = {}, set()
    for item in items:
        if item.get_closest_marker("pairwise"):
            products.setdefault(item.nodeid.split("[")[0], []).append(item)
    for cases in products.values():
        values = [_values(c.callspec.params) for c in cases]
        marker = cases[0].get_closest_marker("pairwise")
        strength = marker.args[0] if marker.args else 2
        slow = pairwise.repeated(values, strength)
        for i in slow:
            cases[i].add_marker("slow")
        chosen = set(range(len(cases))).difference(slow)
        rare = marker.kwargs.get("rare", strength + 1)
        dropped |= {cases[i] for i in pairwise.repeated(values, rare, chosen)}
    if dropped:
        config.hook.pytest_deselected(items=list(dropped))
        items[:] = [item for item in items if item not in dropped]


def pytest_collection_finish():
    """What there is by now stays: it need not be gone through for garbage again."""
    gc.freeze()


def pytest_unconfigure():
    """Else nanobind reports as leaked, at the exit, what was never collected."""
    gc.unfreeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item):
    """A kernel may refuse a call: skipped, with the reason that it gives."""
    try:
        return (yield)
    except NotImplementedError as refusal:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        if parameters.get("implementation") not in opaque.GPU_KERNELS:
            raise
        pytest.skip(f"refused: {refusal}")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def kernels_first(monkeypatch):
    """On a GPU a kernel is the default for every array, however small."""
    from jaxsoftmax._rows import defaults

    monkeypatch.setattr(defaults, "reason_for_xla", lambda call: None)
    monkeypatch.setattr(defaults, "reason_against", lambda name, call: None)


@pytest.fixture
def small_blocks(monkeypatch):
    """Attention in blocks of 16: arrays that are quick to compute have several.

    What is compiled is kept by shape: tests with the blocks as they are need others.
    """
    from jaxsoftmax._attend import xla

    monkeypatch.setattr(xla, "QUERY_BLOCK", 16)
    monkeypatch.setattr(xla, "KEY_BLOCK", 16)


@pytest.fixture
def nans_allowed():
    """For the tests whose subject is a NaN that should come out."""
    with jax.debug_nans(False):
        yield


@pytest.fixture
def leak_checks():
    """Fails on a tracer that outlives its trace.

    Not for the whole suite: with these checks jax caches no trace, and the transforms
    alone take longer than the limit of a run. It collects garbage at each trace: of
    what there is before, none.
    """
    gc.freeze()
    with jax.checking_leaks():
        yield
