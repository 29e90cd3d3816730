"""Checks what the softmax family is called with; every error names the argument."""

import dataclasses
import math
import numbers
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

Axis = int | Sequence[int] | None


@dataclasses.dataclass(frozen=True)
class RowConfig:
    """The static part of a call.

    Attributes:
      axis: What is reduced, as negative ints: leading dimensions may be added.
      scale: Multiplies the logits; above 0.
      in_dtype: The dtype of the logits and of their gradient.
      dtype: The dtype of the result.
      implementation: What to try, in this order; None for the best that can run.
    """

    axis: tuple[int, ...]
    scale: float
    in_dtype: np.dtype
    dtype: np.dtype
    implementation: tuple[str, ...] | None


def as_array(x: ArrayLike) -> jax.Array:
    """`x` itself where it is an array.

    While differentiating without jit, jnp.asarray copies even what is an array already,
    and the copy is kept for the backward pass.
    """
    return x if isinstance(x, jax.Array) else jnp.asarray(x)


def check_logits(x: ArrayLike) -> jax.Array:
    """`x` as a float array: integers become the float that jnp.exp makes of them."""
    x = as_array(x)
    if jnp.issubdtype(x.dtype, jnp.integer):
        return x.astype(jax.eval_shape(jnp.exp, x).dtype)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"x must have a real dtype (floating or integer), got {x.dtype}"
        )
    return x


def check_axis(axis: Axis, shape: tuple[int, ...]) -> tuple[int, ...]:
    """`axis` as a sorted tuple of negative ints."""
    ndim = len(shape)
    if axis is None:
        return tuple(range(-ndim, 0))
    try:
        axes = tuple(
            operator.index(a) for a in (axis if isinstance(axis, Sequence) else [axis])
        )
    except TypeError:
        raise TypeError(
            f"axis must be an int, a tuple of ints or None, got {axis!r}"
        ) from None
    for a in axes:
        if not -ndim <= a < ndim:
            raise ValueError(
                f"axis {a} is out of range for x of shape {shape}, which has {ndim} "
                f"dimensions: expected {-ndim} <= axis < {ndim}"
            )
    negative = tuple(sorted(a if a < 0 else a - ndim for a in axes))
    if len(set(negative)) != len(negative):
        raise ValueError(
            f"axis={axis!r} names a dimension of x, of shape {shape}, more than once"
        )
    return negative


def check_where(where: ArrayLike | None, shape: tuple[int, ...]) -> jax.Array | None:
    """`where` as a bool array of x's rank, not expanded."""
    if where is None:
        return None
    where = as_array(where)
    if where.dtype != np.bool_:
        raise TypeError(
            f"where must be a bool array (True: use the entry), got dtype "
            f"{where.dtype}; for a 0/1 mask pass where=mask.astype(bool)"
        )
    _check_broadcasts("where", where.shape, shape)
    return where.reshape((1,) * (len(shape) - where.ndim) + where.shape)


def check_scale(
    scale: ArrayLike | None, x: jax.Array
) -> tuple[float, jax.Array | None]:
    """`scale` as a number above 0 for the kernels and, else, an array of x's rank."""
    if scale is None:
        return 1.0, None
    if isinstance(scale, np.ndarray) and scale.ndim == 0:
        scale = scale[()]
    if isinstance(scale, numbers.Real) and not isinstance(scale, bool | np.bool_):
        if not math.isfinite(scale):
            raise ValueError(f"scale must be finite, got {scale}")
        if scale > 0:
            return float(scale), None
        # The kernels subtract the largest x, so theirs must be positive.
        scale = np.asarray(scale, np.float64 if x.dtype == np.float64 else np.float32)
    if not isinstance(scale, jax.Array | np.ndarray):
        raise TypeError(
            f"scale must be a real number or an array, got {type(scale).__name__}"
        )
    array = as_array(scale)
    if not (
        jnp.issubdtype(array.dtype, jnp.floating)
        or jnp.issubdtype(array.dtype, jnp.integer)
    ):
        raise TypeError(
            f"scale must have a real dtype (floating or integer), got {array.dtype}"
        )
    _check_broadcasts("scale", array.shape, x.shape)
    return 1.0, array.reshape((1,) * (x.ndim - array.ndim) + array.shape)


def check_dtype(dtype: DTypeLike | None, in_dtype: np.dtype) -> np.dtype:
    """The result's dtype: `dtype`, or the logits' own."""
    if dtype is None:
        return in_dtype
    try:
        wanted = np.dtype(jnp.dtype(dtype))
    except TypeError:
        raise TypeError(f"dtype must be a floating dtype, got {dtype!r}") from None
    if not jnp.issubdtype(wanted, jnp.floating):
        raise TypeError(f"dtype must be a floating dtype, got {wanted}")
    if jax.dtypes.canonicalize_dtype(wanted) != wanted:
        raise ValueError(
            f"dtype={wanted} needs 64-bit mode: set jax.config.update"
            "('jax_enable_x64', True)"
        )
    return wanted


def _check_broadcasts(name: str, shape: tuple[int, ...], to: tuple[int, ...]) -> None:
    try:
        fits = np.broadcast_shapes(shape, to) == to
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"{name} of shape {shape} does not broadcast to x's shape {to}"
        )
