"""What Pallas Mosaic GPU kernels need and what differs between versions of jax.

`jax.experimental` makes no promise of stability. Checked with jax 0.10.2, 0.11.2 and
0.12.0.1; 0.10.0 cannot run such kernels. Pallas is imported when it is first used: it
is slow to import, and some builds of jaxlib lack what it needs.
"""

import functools
import importlib
import importlib.metadata
import inspect
from typing import Any

import jax
import numpy as np

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
def ptxas_reason() -> str | None:
    """Why the assembler that is installed is not to be used for attention, or None.

    That of CUDA 12.8.0 to 12.9.0 miscompiles kernels with masks of this kind: so says
    jax.experimental.pallas.ops.gpu.attention_mgpu, of the same version.
    """
    try:
        version = importlib.metadata.version("nvidia-cuda-nvcc-cu12")
    except importlib.metadata.PackageNotFoundError:
        return None
    parts = tuple(int(part) for part in version.split(".") if part.isdigit())
    if (12, 8) <= parts < (12, 9, 86):
        return f"ptxas of CUDA {version} miscompiles it: install 12.9.86 or newer"
    return None


def mosaic_strips_reason() -> str | None:
    """Why no kernel of rows side by side can be made with this jax, or None."""
    if jax.__version_info__ < (0, 11):
        # Its layout inference searches for minutes, and finds nothing for some plans.
        return f"rows side by side need jax 0.11 or newer, this is {jax.__version__}"
    return None


@functools.cache
def _mosaic_load_needs_index() -> bool:
    index = inspect.signature(mosaic_gpu().load).parameters.get("idx")
    return index is not None and index.default is inspect.Parameter.empty


def mosaic_load(ref: Any, layout: Any, *, optimized: bool = False) -> jax.Array:
    """Loads all of `ref` in `layout`. Until 0.11 an index must be given, later not."""
    index = (Ellipsis,) if _mosaic_load_needs_index() else ()
    return mosaic_gpu().load(ref, *index, layout=layout, optimized=optimized)


def mosaic_store(ref: Any, value: jax.Array) -> None:
    """Stores all of `ref`. From 0.12 on, a store that is not coalesced must say so."""
    plgpu = mosaic_gpu()
    if hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value


def is_interpreted() -> bool:
    """Whether what is traced is for Pallas' interpreter."""
    config = importlib.import_module("jax._src.config")
    return config.pallas_tpu_interpret_mode_context_manager.value is not None


class Accumulator:
    """Registers of a warpgroup that products are added to (wgmma).

    Pallas' interpreter neither stores to such registers nor multiplies what is in
    registers: there, shared memory stands for both.

    Args:
      ref: The registers, `plgpu.ACC`, or for the interpreter shared memory in float32.
      staging: For the interpreter: where factors in registers are put.
    """

    def __init__(self, ref: Any, staging: Any = None) -> None:
        self.ref, self.staging = ref, staging

    def load(self, running: int = 0) -> jax.Array:
        """What is in it, when but the last `running` products are done."""
        if is_interpreted():
            return self.ref[...]
        primitives = importlib.import_module("jax._src.pallas.mosaic_gpu.primitives")
        value = primitives.wgmma_accumulator_load(self.ref, wait_n=running)
        # Nothing that is computed of it may move before the wait.
        return jax.lax.optimization_barrier(value)

    def wait(self) -> None:
        """Waits until all products are done."""
        if not is_interpreted():
            mosaic_gpu().wgmma_wait(0)

    def store(self, value: jax.Array) -> None:
        """Replaces what is in it; no product may be under way."""
        self.ref[...] = value

    def clear(self) -> None:
        """Sets it to 0."""
        plgpu = mosaic_gpu()
        zeros = jax.numpy.zeros(self.ref.shape, self.ref.dtype)
        self.store(plgpu.layout_cast(zeros, plgpu.Layout.WGMMA))

    def add_product(self, a: Any, b: Any) -> None:
        """Starts to add `a` @ `b`: `a` in registers or shared memory, `b` there."""
        plgpu = mosaic_gpu()
        if not is_interpreted():
            plgpu.wgmma(self.ref, a, b)
            return
        if isinstance(a, jax.Array):
            self.staging[...] = a
            plgpu.commit_smem()
            a = self.staging

        def product(acc: Any) -> jax.Array:
            plgpu.wgmma(acc, a, b)
            return acc[...]

        shape = tuple(self.ref.shape)
        found = pallas().run_scoped(product, plgpu.ACC(shape, np.dtype(np.float32)))
        self.ref[...] += found


def mosaic_over_first(kernel: Any, *operands: jax.Array) -> tuple[jax.Array, ...]:
    """`run_over_first` of what `plgpu.kernel` makes.

    Before 0.11 a reference does not get through the batching rule that is around it.
    """
    if jax.__version_info__ < (0, 11):
        kernel = inspect.unwrap(kernel)
    return run_over_first(kernel, *operands)
