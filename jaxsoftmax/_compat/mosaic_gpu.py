"""What Pallas Mosaic GPU kernels need and what differs between versions of jax.

`jax.experimental` makes no promise of stability. Checked with jax 0.10.2, 0.11.2 and
0.12.0.1; 0.10.0 cannot run such kernels. Pallas is imported when it is first used: it
is slow to import, and some builds of jaxlib lack what it needs.
"""

import functools
import importlib
import inspect
from typing import Any

import jax

from jaxsoftmax._compat.trace import run_over_first


def pallas() -> Any:
    """The module jax.experimental.pallas."""
    return importlib.import_module("jax.experimental.pallas")


def mosaic_gpu() -> Any:
    """The module jax.experimental.pallas.mosaic_gpu."""
    return importlib.import_module("jax.experimental.pallas.mosaic_gpu")


@functools.cache
def mosaic_gpu_reason() -> str | None:
    """Why Mosaic GPU kernels cannot be made with this jax, or None if they can."""
    if jax.__version_info__ < (0, 10, 2):
        # It takes neither `out_type` nor the layouts that the kernels need.
        return f"needs jax 0.10.2 or newer, this is {jax.__version__}"
    try:
        mosaic_gpu()
    except Exception as error:  # whatever a build without it raises
        return (
            f"importing Pallas Mosaic GPU failed with {type(error).__name__}: {error}"
        )
    return None


@functools.cache
def _mosaic_load_needs_index() -> bool:
    index = inspect.signature(mosaic_gpu().load).parameters.get("idx")
    return index is not None and index.default is inspect.Parameter.empty


def mosaic_load(ref: Any, layout: Any) -> jax.Array:
    """Loads all of `ref` in `layout`. Until 0.11 an index must be given, later not."""
    index = (Ellipsis,) if _mosaic_load_needs_index() else ()
    return mosaic_gpu().load(ref, *index, layout=layout, optimized=False)


def mosaic_store(ref: Any, value: jax.Array) -> None:
    """Stores all of `ref`. From 0.12 on, a store that is not coalesced must say so."""
    plgpu = mosaic_gpu()
    if hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value


def mosaic_over_first(kernel: Any, *operands: jax.Array) -> tuple[jax.Array, ...]:
    """`run_over_first` of what `plgpu.kernel` makes.

    Before 0.11 a reference does not get through the batching rule that is around it.
    """
    if jax.__version_info__ < (0, 11):
        kernel = inspect.unwrap(kernel)
    return run_over_first(kernel, *operands)
