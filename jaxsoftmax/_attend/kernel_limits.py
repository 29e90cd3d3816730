"""What the kernels of attention take: sizes, scales, precisions of products."""

from typing import Any

import jax
import numpy as np

from jaxsoftmax._attend.call import Config, Inputs

_LARGEST_HEAD = 256
# Outside, the scale, or its quotient by the cap, to the base 2 is no normal float32.
_SCALES = (1e-25, 1e30)


def refusal_of_sizes(x: Inputs, multiple: int) -> str | None:
    """Why a kernel takes no arrays of these shapes, or None.

    Args:
      x: The arrays.
      multiple: What sizes of heads are multiples of.
    """
    if 0 in (*x.query.shape, *x.key.shape, *x.value.shape):
        return "an empty array"
    for size in (x.query.shape[-1], x.value.shape[-1]):
        if size % multiple or size > _LARGEST_HEAD:
            return (
                f"takes head sizes up to {_LARGEST_HEAD} that are multiples of "
                f"{multiple}, not {size}"
            )
    return None


def refusal_of_numbers(config: Config, dtype: Any) -> str | None:
    """Why a kernel cannot compute with a precision, a scale or a soft cap, or None."""
    if product_precision(dtype, config) is None:
        return f"has no precision {_requested_precision(config)}"
    least, most = _SCALES
    if not least <= config.scale <= most:
        return f"a scale of {config.scale} is outside {least} .. {most}"
    cap = config.softcap
    if cap is not None and not (
        least <= cap <= most and least <= config.scale / cap <= most
    ):
        return f"a soft cap of {cap}, or the scale by it, is outside {least} .. {most}"
    return None


def _requested_precision(config: Config) -> Any:
    if config.precision is None:
        return getattr(jax.config, "jax_default_matmul_precision", None)
    return config.precision


# What XLA does on a GPU: float32 in full where the highest precision is asked for.
_PRECISIONS = {
    "default": "tf32",
    "fastest": "tf32",
    "bfloat16": "tf32",
    "high": "tf32",
    "bfloat16_3x": "tf32",
    "tensorfloat32": "tf32",
    "tf32_tf32_f32": "tf32",
    "tf32_tf32_f32_x3": "tf32x3",
    "highest": "ieee",
    "float32": "ieee",
    "f32_f32_f32": "ieee",
}
# Products of 16 bits are exact and summed in float32: no name asks for more.
_PRECISIONS_OF_16_BITS = (*_PRECISIONS, "bf16_bf16_f32", "f16_f16_f32")


def product_precision(dtype: Any, config: Config) -> str | None:
    """Triton's name for the precision of matrix products; None if it has none."""
    requested = _requested_precision(config)
    pair = requested if isinstance(requested, tuple | list) else (requested,)
    names = [
        "default" if one is None else str(getattr(one, "name", one)).lower()
        for one in pair
    ]
    if np.dtype(dtype).itemsize == 2:
        return "tf32" if all(name in _PRECISIONS_OF_16_BITS for name in names) else None
    found = [_PRECISIONS.get(name) for name in names]
    order = (None, "ieee", "tf32x3", "tf32")
    return min(found, key=order.index)
