"""Softmax and its derivatives in jax.numpy: runs wherever jax does.

Every function takes rows as they lie in the array, and a `RowCall`, which says what is
reduced, what multiplies the logits and what the result's dtype is. Leading batch
dimensions may be added; an array that is the same for the whole batch may have size 1
there. `where` is None or a bool array that broadcasts to `x` and has its rank.

How the rows are computed:

- Arithmetic is float32, or float64 where an operand or the result is float64. There is
  one rounding, at the end.
- Conditions are written as arithmetic where that is possible (``max(row_max, lowest)``
  instead of a select), because XLA for CPU fuses a whole row program only without
  selects: a select in the forward or the backward costs up to 2x there.
- ``x - row_max`` loses the low bits of `x`, an error of up to |x - row_max| eps in P.
  Where the result is wide enough to show it, the lost part is computed too (Knuth's
  TwoSum) and enters as ``exp(d + err) = exp(d) (1 + err)``.
- The derivatives take the mean out of the cotangent several times; see `_passes`.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxsoftmax._core.shapes import is_known
from jaxsoftmax._rows.call import RowCall
from jaxsoftmax._rows.row_layout import Axes


def _passes(dtype: np.dtype) -> int:
    """How often the mean is taken out of a cotangent, for probabilities of `dtype`.

    One pass is the textbook formula. Each further pass removes what rounding left of
    the mean by a factor of about |1 - sum(P)| + eps. In float32 two passes leave errors
    of 5e-3 where a dominant entry and an offset of 1000 meet, and three leave 4e-7.
    Probabilities rounded to 16 bits sum to 1 only within 2e-3: one pass more. (Dividing
    by their sum does the same; on CPU it costs more, 1.6x at N = 16384.)
    """
    return 3 if jnp.finfo(dtype).bits >= 32 else 4


def working_dtype(*dtypes: np.dtype) -> np.dtype:
    """float64 where any of `dtypes` is, float32 otherwise."""
    return np.dtype(np.float64 if any(d == np.float64 for d in dtypes) else np.float32)


def rowwise_sum(x: jax.Array, axis: Axes) -> jax.Array:
    """One number per row; what is reduced keeps size 1."""
    return jnp.sum(x, axis=axis, keepdims=True)


def rowwise_max(x: jax.Array, axis: Axes) -> jax.Array:
    """One number per row, -inf for an empty one; what is reduced keeps size 1."""
    return jnp.max(x, axis=axis, keepdims=True, initial=-jnp.inf)


def masked_logits(x: jax.Array, where: jax.Array | None, dtype: np.dtype) -> jax.Array:
    """The logits in the working dtype, -inf where masked."""
    x = x.astype(dtype)
    return x if where is None else jnp.where(where, x, -jnp.inf)


def finite_row_max(row_max: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The row maximum to subtract, and what marks a row with nothing in it.

    For such a row the maximum is -inf: a finite one is subtracted instead (else
    ``-inf - -inf`` is NaN), and the mark, +inf where it is otherwise 0, is added to the
    sum that the row is divided by.
    """
    finite = jnp.maximum(row_max, jnp.finfo(row_max.dtype).min)
    return finite, finite - row_max


def exponentials(
    x: jax.Array, row_max: jax.Array, scale: float, *, compensated: bool
) -> jax.Array:
    """``exp(scale (x - row_max))``, `row_max` finite or from a row that is NaN."""
    # Below this scale the bound would have to lie beyond the largest float.
    if not compensated or scale < 1e-20:
        return jnp.exp((x - row_max) * scale)
    # -inf would make the error NaN. At the bound exp is 0 already; it is above -inf, so
    # beside a maximum that is the lowest float itself -inf counts as that float.
    info = jnp.finfo(x.dtype)
    steps = 8 * float(info.eps) * jnp.abs(row_max)
    below = (1024.0 if info.bits == 64 else 128.0) / scale + steps
    x = jnp.maximum(x, jnp.maximum(row_max - below, info.min))
    d = x - row_max
    minus_max = d - x
    error = (x - (d - minus_max)) - (row_max + minus_max)
    # Not e + e * error: that product would underflow for a small e.
    return jnp.exp(d * scale) * (1 + error * scale)


def softmax(
    x: jax.Array,
    where: jax.Array | None,
    call: RowCall,
) -> jax.Array:
    """``P = exp(scale (x - max)) / sum``: zeros where masked and in empty rows."""
    working = working_dtype(x.dtype, call.dtype)
    x = masked_logits(x, where, working)
    row_max, empty = finite_row_max(rowwise_max(x, call.axis))
    e = exponentials(x, row_max, call.scale, compensated=call.dtype == working)
    if where is not None:
        e = jnp.where(where, e, 0)
    p = e / (rowwise_sum(e, call.axis) + empty)
    if where is not None:
        p = jnp.where(where, p, 0)  # in a NaN row the masked entries are still 0
    return p.astype(call.dtype)


def _centered(
    p: jax.Array,
    t: jax.Array,
    axis: Axes,
    passes: int,
    inverse_sum: jax.Array | float = 1.0,
) -> jax.Array:
    """`t` less its mean under `p`, which sums to ``1 / inverse_sum``.

    ``t - sum(p t)`` alone cancels where one entry of `p` dominates or `t` has a large
    common part: what is left is rounding. The map takes constants to 0, so repeating it
    changes nothing but removes the error that the pass before it made.
    """
    for _ in range(passes):
        t = t - rowwise_sum(p * t, axis) * inverse_sum
    return t


def softmax_derivative_definition(
    p: jax.Array, t: jax.Array, call: RowCall
) -> jax.Array:
    """``scale P (t - sum(P t))``; differentiable in `p` and `t`.

    The Jacobian of softmax is symmetric, so this serves forward and reverse mode.
    Entries where P is 0 give 0 and do not touch the row, whatever `t` is there.
    """
    working = working_dtype(p.dtype, t.dtype, call.dtype)
    passes = _passes(p.dtype)
    p, t = p.astype(working), t.astype(working)
    absent = p == 0
    # 0 in an empty row, whose inverse must not be infinite.
    inverse_sum = 1 / jnp.maximum(
        rowwise_sum(p, call.axis), float(jnp.finfo(p.dtype).tiny)
    )
    centered = _centered(p, jnp.where(absent, 0, t), call.axis, passes, inverse_sum)
    # The second select is for the masked entries of a NaN row.
    return jnp.where(absent, 0, p * (centered * call.scale)).astype(call.dtype)


def softmax_derivative(p: jax.Array, t: jax.Array, call: RowCall) -> jax.Array:
    """As `softmax_derivative_definition`; in the form that suits the platform."""
    selecting = functools.partial(softmax_derivative_definition, call=call)
    p, t = jnp.broadcast_arrays(p, t)
    # In 8 bits P may sum to 2 as well: only divided by that do the passes converge.
    narrow = p.dtype.itemsize == 1
    if not is_known(p.shape) or p.size == 0 or p.ndim == 0 or narrow:
        return selecting(p, t)
    guarded = _guarded_derivative(selecting, call)
    return lax.platform_dependent(p, t, cpu=guarded, default=selecting)


def _guarded_derivative(
    selecting: Callable[[jax.Array, jax.Array], jax.Array],
    call: RowCall,
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """`selecting` without a select, unless the row sums turn out to need one.

    A NaN or inf in `t` where P is 0 makes its row's sum NaN, and with it every entry of
    the row, the first one included. So one entry per row tells whether to start again.
    """

    def again(p: jax.Array, t: jax.Array, out: jax.Array, if_: jax.Array) -> jax.Array:
        """Overwrites `out` with ``selecting(p, t)`` if `if_`.

        Piece by piece, in a loop of no steps otherwise: XLA reserves the memory of what
        may run, and a loop updates `out` in place where a lax.cond would copy it.
        """
        whole = -p.ndim in call.axis or not call.axis  # the first dimension is no batch
        size = len(p) if whole else -(-len(p) // 64)
        steps = -(-len(p) // size)

        def step(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            i, out = state
            at = jnp.minimum(i * size, len(p) - size)
            part = (lax.dynamic_slice_in_dim(x, at, size) for x in (p, t))
            out = lax.dynamic_update_slice_in_dim(out, selecting(*part), at, 0)
            return i + 1, out

        first = jnp.where(if_, 0, steps)
        return lax.while_loop(lambda state: state[0] < steps, step, (first, out))[1]

    def guarded(p: jax.Array, t: jax.Array) -> jax.Array:
        working = working_dtype(p.dtype, t.dtype, call.dtype)
        wide_p, wide_t = p.astype(working), t.astype(working)
        centered = _centered(wide_p, wide_t, call.axis, _passes(p.dtype))
        out = (wide_p * (centered * call.scale)).astype(call.dtype)
        first = out
        for a in call.axis:
            first = lax.slice_in_dim(first, 0, 1, axis=out.ndim + a)
        return again(p, t, out, if_=jnp.isnan(first).any())

    return guarded


def log_softmax(
    x: jax.Array,
    where: jax.Array | None,
    call: RowCall,
) -> tuple[jax.Array, jax.Array]:
    """``y = d - log(sum(exp(d)))`` with ``d = scale (x - max)``, and the row maximum.

    The maximum itself contributes 1 to the sum. It is left out and added by log1p, so
    that a confident row's largest entry is not rounded to 0.

    Returns:
      y, -inf where masked and in empty rows, and the row maximum: what the derivatives
      need besides x, in the working dtype, -inf for an empty row.
    """
    working = working_dtype(x.dtype, call.dtype)
    x = masked_logits(x, where, working)
    row_max = rowwise_max(x, call.axis)
    finite_max, empty = finite_row_max(row_max)
    below = x - finite_max
    # About exp(below) near the maximum, 0 far from it, and 1 at it: what is left out of
    # the sum and put back. Continuous, because XLA may compute x anew in the fusion of
    # each sum, and then `below` need not be exactly 0 at the maximum:
    # https://github.com/openxla/xla/pull/44738.
    at_max = jnp.maximum(1 + below * call.scale, 0)
    e = exponentials(x, finite_max, call.scale, compensated=call.dtype == working)
    if where is not None:
        e = jnp.where(where, e, 0)
    rest = rowwise_sum(e - at_max, call.axis) + (rowwise_sum(at_max, call.axis) - 1)
    y = below * call.scale - jnp.log1p(rest + empty)
    if where is not None:
        y = jnp.where(where, y, -jnp.inf)
    return y.astype(call.dtype), row_max


def _log_softmax_parts(
    x: jax.Array,
    where: jax.Array | None,
    row_max: jax.Array,
    t: jax.Array,
    axis: Axes,
    scale: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """P, `t` where there is something to differentiate (else 0), and where that is."""
    working = row_max.dtype
    x = masked_logits(x, where, working)
    valid = x != -jnp.inf
    finite_max, empty = finite_row_max(row_max)
    e = exponentials(x, finite_max, scale, compensated=True)
    if where is not None:
        e = jnp.where(where, e, 0)
    p = e / (rowwise_sum(e, axis) + empty)
    return p, jnp.where(valid, t.astype(working), 0), valid


def log_softmax_pushforward(
    x: jax.Array,
    where: jax.Array | None,
    row_max: jax.Array,
    t: jax.Array,
    call: RowCall,
) -> jax.Array:
    """``scale (t - sum(P t))``; 0 where masked or -inf."""
    p, t, valid = _log_softmax_parts(x, where, row_max, t, call.axis, call.scale)
    centered = _centered(p, t, call.axis, _passes(p.dtype))
    return jnp.where(valid, centered * call.scale, 0).astype(call.dtype)


def log_softmax_pullback(
    x: jax.Array,
    where: jax.Array | None,
    row_max: jax.Array,
    g: jax.Array,
    call: RowCall,
) -> jax.Array:
    """``scale (g - P sum(g))``; 0 where masked or -inf.

    The map takes P to 0 and leaves what sums to 0 as it is. As in `_centered`, doing it
    again removes the error of the pass before, most of 1 - P of a dominant entry.
    """
    p, g, valid = _log_softmax_parts(x, where, row_max, g, call.axis, call.scale)
    for _ in range(_passes(p.dtype)):
        g = g - p * rowwise_sum(g, call.axis)
    return jnp.where(valid, g * call.scale, 0).astype(call.dtype)


# --- the states of a share of a row ---------------------------------------------------
#
# What a device computes of the part of a row that it has, in numbers per row; those of
# several devices are merged in `_rows.sharded`. The arguments are those of the
# function that the state is for.


def log_sum_exp_state(
    x: jax.Array,
    where: jax.Array | None,
    call: RowCall,
) -> tuple[jax.Array, jax.Array]:
    """The maximum m and ``sum(exp(scale (x - m))) - 1``, the maximum's own 1 left out.

    Of an empty share -inf and -1.
    """
    x = masked_logits(x, where, working_dtype(x.dtype, call.dtype))
    row_max = rowwise_max(x, call.axis)
    finite_max, _ = finite_row_max(row_max)
    below = x - finite_max
    at_max = jnp.maximum(1 + below * call.scale, 0)  # as in `log_softmax`
    e = exponentials(x, finite_max, call.scale, compensated=call.dtype == x.dtype)
    if where is not None:
        e = jnp.where(where, e, 0)
    excess = rowwise_sum(e - at_max, call.axis) + (rowwise_sum(at_max, call.axis) - 1)
    return row_max, jnp.where(row_max == -jnp.inf, -1, excess)


def _mean_state(
    w: jax.Array, t: jax.Array, axis: Axes
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``s = sum(w)``, a pivot c, and ``sum(w (t - c))``: the mean is c + u / s.

    The pivot is the value of `t` at the largest weight. Where that dominates the row,
    the mean differs from it by what the other entries contribute, which so keeps its
    digits.
    """
    largest = w == rowwise_max(w, axis)
    pivot = rowwise_max(jnp.where(largest, t, -jnp.inf), axis)
    return rowwise_sum(w, axis), pivot, rowwise_sum(w * (t - pivot), axis)


def softmax_derivative_state(
    p: jax.Array, t: jax.Array, call: RowCall
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The state of the mean of `t` under `p`: see `_mean_state`."""
    working = working_dtype(p.dtype, t.dtype, call.dtype)
    p, t = p.astype(working), t.astype(working)
    return _mean_state(p, jnp.where(p == 0, 0, t), call.axis)


def _present(
    x: jax.Array,
    where: jax.Array | None,
    row_max: jax.Array,
    t: jax.Array,
    scale: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``x - max``, its exponentials, and `t`; both 0 where there is no entry."""
    x = masked_logits(x, where, row_max.dtype)
    finite_max, _ = finite_row_max(row_max)
    valid = x != -jnp.inf
    e = jnp.where(valid, exponentials(x, finite_max, scale, compensated=True), 0)
    return x - finite_max, e, jnp.where(valid, t.astype(row_max.dtype), 0)


def log_softmax_pushforward_state(
    x: jax.Array,
    where: jax.Array | None,
    row_max: jax.Array,
    t: jax.Array,
    call: RowCall,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The state of the mean of `t` under ``exp(scale (x - row_max))``."""
    _, e, t = _present(x, where, row_max, t, call.scale)
    return _mean_state(e, t, call.axis)


def log_softmax_pullback_state(
    x: jax.Array,
    where: jax.Array | None,
    row_max: jax.Array,
    g: jax.Array,
    call: RowCall,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Sums of the exponentials e and of g, each in two parts: at the maximum, the rest.

    ``(sum(a), sum(e - a), sum(a g), sum((1 - a) g))``, where a is 1 at the maximum and
    0 far from it; continuous, as in `log_softmax`.
    """
    below, e, g = _present(x, where, row_max, g, call.scale)
    a = jnp.maximum(1 + below * call.scale, 0)
    parts = (a, e - a, a * g, (1 - a) * g)
    at_max, rest, g_at_max, g_rest = (rowwise_sum(part, call.axis) for part in parts)
    return at_max, rest, g_at_max, g_rest
