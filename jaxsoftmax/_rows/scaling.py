"""Logits multiplied by an array, which has a derivative of its own."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxsoftmax._rows import row_loss


def finite(x: jax.Array) -> jax.Array:
    """`x`, 0 where it is infinite or NaN."""
    return jnp.where(jnp.isfinite(x), x, 0)


@jax.custom_jvp
def _times(x: jax.Array, scale: jax.Array) -> jax.Array:
    """``scale x``, at most the largest float where `x` is finite; NaN if scale is not.

    As with a scale that is a number: a finite logit is present whatever multiplies it.
    """
    product = x * jnp.where(jnp.isfinite(scale), scale, jnp.nan)
    return jnp.where(jnp.isfinite(x), row_loss.within_range(product), product)


@_times.defjvp
def _times_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    """The product's, not that of its bound. Of a row without a cotangent 0, not NaN."""
    (x, scale), (x_dot, scale_dot) = primals, tangents
    return _times(x, scale), x_dot * finite(scale) + finite(x) * scale_dot


# Keeps x as it came instead of a copy of it in float32.
@functools.partial(jax.checkpoint, prevent_cse=False)
def multiply(x: jax.Array, scale: jax.Array, where: jax.Array | None) -> jax.Array:
    """``scale x`` in the working dtype; masked entries have no part in its gradient.

    Where `x` is -inf or masked the product stays -inf whatever the scale, so that
    neither ``0 * inf`` nor what stands behind the mask reaches the gradient of `scale`.
    """
    valid = x != -jnp.inf
    if where is not None:
        valid = valid & where
    wide = jnp.float64 if jnp.float64 in (x.dtype, scale.dtype) else jnp.float32
    product = _times(jnp.where(valid, x, 0).astype(wide), scale.astype(wide))
    return jnp.where(valid, product, -jnp.inf)
