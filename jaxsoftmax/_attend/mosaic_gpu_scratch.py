"""Shared memory and barriers of the Mosaic GPU kernels of attention."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxsoftmax._attend.mosaic_gpu_program import Program
from jaxsoftmax._compat import mosaic_gpu as _compat


def swizzled(shape: tuple[int, ...], dtype: Any, most: int = 64) -> Any:
    """Shared memory of tiles that wgmma reads; `most`: columns that lie together.

    What is added up over fewer places than 64 has at most as many.
    """
    plgpu = _compat.mosaic_gpu()
    size = jnp.dtype(dtype).itemsize
    widths = (128 // size, 64 // size, 32 // size)
    columns = next(n for n in widths if shape[-1] % n == 0 and n <= most)
    transforms = (
        plgpu.TilingTransform((8, columns)),
        plgpu.SwizzleTransform(size * columns),
    )
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def barriers(p: Program, *names: str) -> dict[str, Any]:
    """Those of `Kernel.load_tiles`."""
    plgpu, n = _compat.mosaic_gpu(), p.stages
    ready = {f"{name}_ready": plgpu.Barrier(num_barriers=n) for name in names}
    free = {
        f"{name}_free": plgpu.Barrier(num_arrivals=p.warpgroups, num_barriers=n)
        for name in names
    }
    return ready | free


def bias_scratch(p: Program, name: str = "bias") -> dict[str, Any]:
    """Shared memory and barriers of `Kernel.tile_of_bias`, if there are such tiles."""
    if not p.reads_bias:
        return {}
    plgpu, found = _compat.mosaic_gpu(), barriers(p, name)
    if not p.bias_tiles:
        vectors = plgpu.SMEM((p.stages, p.tile), np.dtype(np.float32))
        return found | {f"{name}_smem": vectors}
    ready = plgpu.Barrier(num_arrivals=p.warpgroups, num_barriers=p.stages)
    tiles = swizzled((p.stages, p.warpgroups, *p.shape), p.bias_dtype)
    return found | {f"{name}_smem": tiles, f"{name}_ready": ready}


def accumulators(p: Program, **shapes: Any) -> dict[str, Any]:
    """Shared memory in the place of `Kernel.with_accumulators`, for the interpreter.

    Args:
      p: What the kernel is made for.
      **shapes: By name that of the accumulator, and of the factor in registers or None.
    """
    if not _compat.is_interpreted():
        return {}
    plgpu, found = _compat.mosaic_gpu(), {}
    for name, (shape, factor) in shapes.items():
        each = (p.warpgroups, *shape)
        found[f"{name}_sums"] = plgpu.SMEM(each, np.dtype(np.float32))
        if factor is not None:
            found[f"{name}_factor"] = swizzled((p.warpgroups, *factor), p.dtype)
    return found
