"""The call of a Triton kernel, by jax-triton.

Checked with jax-triton 0.3.1 (jax 0.10.2) and 0.4.1 (jax 0.12.0.1).
"""

import functools
import inspect
from typing import Any

import jax

from jaxsoftmax._compat.trace import run_over_first


def triton_call(
    *arrays: jax.Array,
    kernel: Any,
    results: Any,
    grid: tuple[int, ...],
    name: str,
    num_warps: int,
    enable_fp_fusion: bool,
    compute_capability: tuple[int, int] | None = None,
    in_place: bool = False,
    **constants: Any,
) -> Any:
    """Calls a Triton kernel: pointers to `arrays`, then to the results; `constants`.

    With `enable_fp_fusion` the compiler may contract a product and an addition to an
    fma. Always passed: Triton 3.9 contracts by default and warns that 3.10 will not, so
    results would change with its version.

    Without a `compute_capability` jax-triton asks the driver for that of the first GPU,
    and fails where there is none.

    With `in_place` it writes the first of several results where the first array is, and
    has no use for the pointer to that result.

    For jax-triton 0.3.1, which names the results' types `out_shape` and takes
    `enable_fp_fusion` itself, and 0.4.1, which takes it in `backend_options`, and a
    reference to what is written in place, and no type of it.
    """
    import jax_triton

    digits = None
    if compute_capability is not None:
        digits = 10 * compute_capability[0] + compute_capability[1]
    call = functools.partial(
        jax_triton.triton_call,
        kernel=kernel,
        grid=grid,
        name=name,
        num_warps=num_warps,
        compute_capability=digits,
        **constants,
    )
    fusion = {"enable_fp_fusion": enable_fp_fusion}
    if "out_type" not in inspect.signature(jax_triton.triton_call).parameters:
        aliases = {"input_output_aliases": {0: 0}} if in_place else {}
        return call(*arrays, out_shape=results, **fusion, **aliases)
    call = functools.partial(call, backend_options=fusion)
    if not in_place:
        return call(*arrays, out_type=results)
    # Any pointer stands for that to the first result.
    others = functools.partial(call, out_type=tuple(results[1:]))
    return run_over_first(others, *arrays, arrays[-1])
