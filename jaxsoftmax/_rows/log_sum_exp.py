"""Sums of weighted exponentials, and the derivatives of log-sum-exp, in jax.numpy.

Without weights b a kernel is that of `xla.log_sum_exp_state`. With weights of any sign
the sum is here, for XLA alone. Conventions are those of `_rows.xla`; b has the rank of
x and, in each dimension, its size or 1.

A sum is kept as ``total exp(shift)``, the shift a number near the largest term's
logarithm: the row maximum without weights. Its own rounding cancels.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxsoftmax._core.shapes import is_known, row_shape, row_size
from jaxsoftmax._rows.call import RowCall
from jaxsoftmax._rows.row_layout import Axes
from jaxsoftmax._rows.row_loss import in_vectors
from jaxsoftmax._rows.xla import (
    finite_row_max,
    log_of_excess,
    log_sum_exp_state,
    masked_logits,
    or_general,
    row_max_of,
    rowwise_max,
    rowwise_sum,
    scaled_below,
    working_dtype,
)

# The longest rows over which XLA for CPUs reduces two arrays at a time fast.
_SHORT_ROW = 32


def log_sum_exp(
    x: jax.Array, where: jax.Array | None, call: RowCall, *, definition: bool = False
) -> tuple[jax.Array, jax.Array]:
    """The row maximum and the excess of `log_sum_exp_state`, of whole rows.

    The excess has the digits that log-sum-exp shows. So on a CPU one reduction of the
    exponentials does, as long as no row has a maximum and a logarithm both near 0.
    """

    def state(x: jax.Array, where: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        return log_sum_exp_state(x, where, call)

    def on_cpu(x: jax.Array, where: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        row_max = row_max_of(x, where, call)
        e = jnp.exp(scaled_below(x, where, row_max, call.scale))
        if is_known(e.shape) and row_size(e.shape, call.axis) <= _SHORT_ROW:
            return row_max, _short_excess(e, call.axis)
        excess = rowwise_sum(e, call.axis) - 1
        near_zero = jnp.min(in_vectors(_size, row_max, excess)) < 0.5
        return row_max, or_general(excess, near_zero, lambda: state(x, where)[1])

    if definition or x.size == 0:
        return state(x, where)
    return lax.platform_dependent(x, where, cpu=on_cpu, default=state)


def _size(row_max: jax.Array, excess: jax.Array) -> jax.Array:
    """Of a row below a half, where maximum and logarithm are both near 0."""
    return jnp.maximum(excess, jnp.abs(row_max) - 0.5)


def _short_excess(e: jax.Array, axis: Axes) -> jax.Array:
    ones = jnp.floor(e)
    zero = np.zeros((), e.dtype)
    rest, count = lax.reduce(
        (e - ones, ones),
        (zero, zero),
        lambda a, b: (a[0] + b[0], a[1] + b[1]),
        [e.ndim + a for a in axis],
    )
    return lax.reshape(rest + (count - 1), row_shape(e.shape, axis))


class Terms(NamedTuple):
    """The terms of a sum, relative to ``exp(shift)``.

    Attributes:
      each: ``exp(x - shift)``, the derivative for the weight; 0 of what is absent.
      weighted: ``b exp(x - shift)``, the derivative for x.
      present: False where there is no entry: masked, or -inf.
    """

    each: jax.Array
    weighted: jax.Array
    present: jax.Array

    def over(self, total: jax.Array) -> "Terms":
        """Shares of the sum; 0 of a sum that is 0: of an empty row, or cancelled."""
        inverse = in_vectors(_inverse, total)
        return Terms(self.each * inverse, self.weighted * inverse, self.present)


def _inverse(total: jax.Array) -> jax.Array:
    zero = total == 0
    return jnp.where(zero, 0, 1 / jnp.where(zero, 1, total))


def terms(
    x: jax.Array, where: jax.Array | None, b: jax.Array | None, shift: jax.Array
) -> Terms:
    """The `Terms` of rows whose shift is known.

    An entry whose weight is 0 has no part in the shift. If its exponential is then no
    finite number, it counts as absent.
    """
    logits = masked_logits(x, where, shift.dtype)
    present = logits != -jnp.inf
    above = logits - finite_row_max(shift)
    if b is None:
        e = jnp.exp(above)
        return Terms(e, e, present)
    b = jnp.where(present, b.astype(shift.dtype), 0)
    largest = math.log(float(jnp.finfo(shift.dtype).max)) - 1
    above = jnp.where((b == 0) & ~(above < largest), -jnp.inf, above)
    # Its square may be too small for a float where the product with b is not.
    root = jnp.exp(above / 2)
    return Terms(root * root, (b * root) * root, present)


def weighted_shift(
    x: jax.Array, where: jax.Array | None, b: jax.Array, call: RowCall
) -> jax.Array:
    """The largest ``x + log|b|`` of each row; -inf where all terms are 0."""
    working = working_dtype(x.dtype, b.dtype, call.dtype)
    logits = masked_logits(x, where, working)
    size = jnp.abs(b.astype(working))
    none = (size == 0) | (logits == -jnp.inf)
    logs = logits + jnp.log(jnp.where(none, 1, size))
    return rowwise_max(jnp.where(none, -jnp.inf, logs), call.axis)


def weighted_sums(
    x: jax.Array, where: jax.Array | None, b: jax.Array, shift: jax.Array, axis: Axes
) -> tuple[jax.Array, jax.Array]:
    """The sum of the terms in two parts: what is beside the nearest integers, and them.

    So a sum that one term of 1 or -1 dominates keeps the digits of the others.
    """
    weighted = terms(x, where, b, shift).weighted
    ones = jnp.round(weighted)
    return rowwise_sum(weighted - ones, axis), rowwise_sum(ones, axis)


def weighted_log_sum_exp(
    x: jax.Array, where: jax.Array | None, b: jax.Array, call: RowCall
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The shift of each row, and the sum in the two parts of `weighted_sums`."""
    shift = weighted_shift(x, where, b, call)
    return shift, *weighted_sums(x, where, b, shift, call.axis)


def from_excess(
    row_max: jax.Array, excess: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-sum-exp, the shift and the total, given `log_sum_exp`."""
    # In an empty row, whose excess is -1, the logarithm must not be -inf.
    return row_max + log_of_excess(excess), row_max, 1 + excess


def from_parts(
    shift: jax.Array, rest: jax.Array, ones: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``log|S|``, the shift and the total, given `weighted_log_sum_exp`."""
    total = rest + ones
    sign = jnp.sign(total)
    # Near 0 the 1 that is taken off would cost the digits.
    small = jnp.abs(total) < 0.5
    excess = jnp.where(small, 0, sign * rest + (sign * ones - 1))
    near_zero = jnp.log(jnp.where(small, jnp.abs(total), 1))
    log_total = jnp.where(small, near_zero, jnp.log1p(excess))
    return shift + log_total, shift, total


def pullback(
    shares: Terms, b: jax.Array | None, g: jax.Array, call: RowCall
) -> tuple[jax.Array, jax.Array | None]:
    """The cotangents of x and b, given each term's share of the sum.

    A row whose cotangent is 0 has the gradient 0, whatever is in it.
    """
    g = g.astype(shares.each.dtype)
    used = shares.present & (g != 0)
    dx = jnp.where(used, shares.weighted * g, 0).astype(call.dtype)
    if b is None:
        return dx, None
    db = jnp.where(used, shares.each * g, 0)
    shared = [i for i, n in enumerate(b.shape) if n != db.shape[i]]
    return dx, jnp.sum(db, axis=shared, keepdims=True).astype(b.dtype)


def pushforward(
    shares: Terms, x_dot: jax.Array | None, b_dot: jax.Array | None, call: RowCall
) -> jax.Array:
    """The tangent of log-sum-exp, given each term's share of the sum."""
    found = jnp.zeros_like(shares.each)
    for share, t in ((shares.weighted, x_dot), (shares.each, b_dot)):
        if t is not None:
            t = jnp.where(shares.present, t.astype(share.dtype), 0)
            found = found + share * t
    return rowwise_sum(found, call.axis).astype(call.dtype)
