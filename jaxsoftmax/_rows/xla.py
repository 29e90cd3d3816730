"""Softmax and its derivatives in jax.numpy: runs wherever jax does.

Every function takes rows as they lie in the array, and a `RowCall`, which says what is
reduced, what multiplies the logits and what the result's dtype is. Leading batch
dimensions may be added; an array that is the same for the whole batch may have size 1
there. `where` is None or a bool array that broadcasts to `x` and has its rank.

Arithmetic is float32, or float64 where an operand or the result is float64, with one
rounding at the end. ``x - row_max`` is rounded too: the relative error of P is up to
``2 + |x - max| / 2`` eps.

XLA for GPUs makes one kernel of each function, where rows are last in memory and of up
to 16,384 entries. It does so for a chain of reductions over the same rows, elementwise
operations between them, where nothing per row is an argument: on a GPU log_softmax's
pullback takes the maximum anew. What is cast, scaled or masked before and after is part
of it. Of other rows each reduction that depends on another reads the arrays anew, so
that there the derivatives have as few as they can.

XLA for CPUs makes one program of such a chain (from jax 0.12, with YNNPACK) if it is of
arithmetic alone: sums, products, quotients, minima, maxima, exponentials, roundings. A
comparison or a select ends it, as do operations on numbers per row where there are less
than 4,096 of them. So on a CPU what is absent is not looked for: see `or_general`.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxsoftmax._core.shapes import is_known, row_size
from jaxsoftmax._rows.call import RowCall
from jaxsoftmax._rows.row_layout import Axes, last_in_memory, merge_dims

# Beyond it not every index is a float32.
_LARGEST_INDEX = 2**24
# The longest rows of which XLA for GPUs makes one kernel.
_LONGEST_FUSED = 16384


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


def row_max_of(x: jax.Array, where: jax.Array | None, call: RowCall) -> jax.Array:
    """The largest logit of each row, in the working dtype; -inf of an empty row."""
    working = working_dtype(x.dtype, call.dtype)
    return rowwise_max(masked_logits(x, where, working), call.axis)


def finite_row_max(row_max: jax.Array) -> jax.Array:
    """The row maximum to subtract: in an empty row ``-inf - -inf`` would be NaN."""
    return jnp.maximum(row_max, jnp.finfo(row_max.dtype).min)


def scaled_below(
    x: jax.Array, where: jax.Array | None, row_max: jax.Array, scale: float
) -> jax.Array:
    """``scale (x - row_max)``; -inf where masked."""
    below = masked_logits(x, where, row_max.dtype) - finite_row_max(row_max)
    if scale == 1:
        return below
    below = below * scale
    # Of -inf times 0, and of the product's derivatives in `jet`, nothing remains.
    return below if where is None else jnp.where(where, below, -jnp.inf)


def inverse(total: jax.Array) -> jax.Array:
    """``1 / total``, finite in an empty row, whose sum is 0."""
    return 1 / jnp.maximum(total, float(jnp.finfo(total.dtype).tiny))


def can_have_index(shape: tuple[int, ...], axis: Axes) -> bool:
    """Whether `softmax_with_index` has one: rows without a gap, and not too long."""
    if not axis or axis != tuple(range(axis[0], axis[-1] + 1)) or not is_known(shape):
        return False
    return row_size(shape, axis) <= _LARGEST_INDEX


def index_of_largest(
    below: jax.Array, axis: Axes, starts: Sequence[Any], sizes: Sequence[int]
) -> jax.Array:
    """The place in its row, as float32, of an entry that is next to the largest.

    What is found has at least 0.6 of the largest entry's probability, which is all that
    `softmax_derivative` needs. So `below` need not be 0 to the last digit: XLA may
    compute the logits anew beside each reduction, and with other roundings. In
    arithmetic, because XLA for CPUs is slow at selects and at argmax.

    Args:
      below: ``scale (x - max)``, all of it or a device's share.
      axis: What is reduced.
      starts: Where the share begins, per dimension that is reduced.
      sizes: Those of the whole row.
    """
    index: Any = 0.0
    for a, start, size in zip(axis, starts, sizes, strict=True):
        place = lax.broadcasted_iota(np.float32, below.shape, below.ndim + a)
        index = index * float(size) + (place + jnp.asarray(start, np.float32))
    near = jnp.floor(jnp.maximum(below.astype(np.float32) + 1.5, 0))
    return rowwise_max(near * index, axis)


def softmax(
    x: jax.Array, where: jax.Array | None, call: RowCall, *, definition: bool = False
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """``P = exp(scale (x - max)) / sum``: zeros where masked and in empty rows.

    Returns:
      P; for the operation ``softmax_with_index`` also where in its row the largest
      entry is, float32, of size 1 in the dimensions that are reduced.
    """
    if call.op == "softmax_with_index":
        p, below = _probabilities(x, where, call)
        sizes = [x.shape[a] for a in call.axis]
        return p, index_of_largest(below, call.axis, [0] * len(sizes), sizes)

    def on_gpu(x: jax.Array, where: jax.Array | None) -> jax.Array:
        if where is None:
            return _rounded(plain(x, None))
        whole = jnp.broadcast_to(x, jnp.broadcast_shapes(x.shape, where.shape))
        p, _ = _probabilities(*_merged(whole, where, call))
        return _rounded(p).reshape(whole.shape)

    def plain(x: jax.Array, where: jax.Array | None) -> jax.Array:
        return _probabilities(x, where, call)[0]

    if definition or x.size == 0:
        return plain(x, where)
    return lax.platform_dependent(x, where, cuda=on_gpu, rocm=on_gpu, default=plain)


def _probabilities(
    x: jax.Array, where: jax.Array | None, call: RowCall
) -> tuple[jax.Array, jax.Array]:
    """P, and ``scale (x - max)``."""
    below = scaled_below(x, where, row_max_of(x, where, call), call.scale)
    e = jnp.exp(below)
    p = e * inverse(rowwise_sum(e, call.axis))
    if where is not None:
        p = jnp.where(where, p, 0)  # in a NaN row the masked entries are still 0
    return p.astype(call.dtype), below


def _rounded(p: jax.Array) -> jax.Array:
    """P, which is not negative, so that XLA for GPUs sees no conversion in 16 bits.

    It would keep a float32 P, before it was rounded, for what converts it back, and
    convert it in one kernel more.
    """
    if p.dtype.itemsize != 2:
        return p
    bits = lax.bitcast_convert_type(p, np.int16)
    return lax.bitcast_convert_type(bits & np.int16(np.iinfo(np.int16).max), p.dtype)


def _merged(
    x: jax.Array, where: jax.Array, call: RowCall
) -> tuple[jax.Array, jax.Array, RowCall]:
    """Rows whose dimensions are one with their neighbours where the mask permits it.

    Else XLA for GPUs takes into one block rows that have the mask in common, from
    several dimensions: three times more slowly.
    """
    if not is_known(x.shape) or where.size == 1:
        return x, where, call
    dims = merge_dims(x.shape, call.axis, where.shape)
    axis = tuple(i - len(dims) for i, dim in enumerate(dims) if dim.reduced)
    sizes = [dim.size if dim.masked else 1 for dim in dims]
    merged = dataclasses.replace(call, axis=axis)
    return x.reshape([dim.size for dim in dims]), where.reshape(sizes), merged


def _at_least(e: jax.Array, total: jax.Array) -> jax.Array:
    """The total of what is not negative, per entry; and no less than the least float.

    Which it is of each entry: XLA does not see that this is a number per row.
    """
    return jnp.maximum(total, jnp.maximum(e, float(jnp.finfo(e.dtype).tiny)))


def fused_on_gpu(shape: tuple[int, ...], axis: Axes) -> bool:
    """Whether XLA for GPUs makes one kernel of a function of rows.

    Not with a dimension of 1 behind them.
    """
    last = not axis or axis[-1] == -1
    return (
        last
        and _last_in_memory(shape, axis)
        and row_size(shape, axis) <= _LONGEST_FUSED
    )


def _last_in_memory(shape: tuple[int, ...], axis: Axes) -> bool:
    return is_known(shape) and last_in_memory(merge_dims(shape, axis, None))


def or_general(
    out: jax.Array, special: jax.Array | bool, general: Callable[[], jax.Array]
) -> jax.Array:
    """`out`; ``general()`` where it has NaN or infinity, or the rows are `special`.

    The latter is not computed else. A loop, because XLA would copy what a branch of
    `lax.cond` passes on; that ends after one turn for XLA to see, which would copy
    what the next one needs.
    """
    total = jnp.sum(out, dtype=working_dtype(out.dtype))
    return lax.while_loop(
        lambda state: state[0],
        lambda state: (state[0] & False, general()),
        (~jnp.isfinite(total) | special, out),
    )[1]


def _at_largest(w: jax.Array, t: jax.Array, axis: Axes) -> jax.Array:
    """The value of `t` at the largest weight, or next to it; of several the largest.

    Next to it will do, as in `index_of_largest`: XLA may compute the weights anew
    beside each reduction, and of large logits with quite other roundings.
    """
    largest = w * 1.5 >= rowwise_max(w, axis)
    return rowwise_max(jnp.where(largest, t, -jnp.inf), axis)


def _mean_state(
    w: jax.Array, t: jax.Array, axis: Axes
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``s = sum(w)``, a pivot c, and ``sum(w (t - c))``: the mean is c + u / s.

    The pivot is the value of `t` at the largest weight. Where that dominates the row,
    the mean differs from it by what the other entries contribute, which so keeps its
    digits.
    """
    pivot = _at_largest(w, t, axis)
    return rowwise_sum(w, axis), pivot, rowwise_sum(w * (t - pivot), axis)


def _mean_state_at_once(
    w: jax.Array, t: jax.Array, axis: Axes
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`_mean_state` by one reduction; without derivatives.

    Of two parts the pivot is that of the one with more weight, so that in the end it is
    the value of `t` at a weight of more than half, if there is one.
    """

    def merge(a: Sequence[jax.Array], b: Sequence[jax.Array]) -> Sequence[jax.Array]:
        (s_a, pivot_a, u_a), (s_b, pivot_b, u_b) = a, b
        first = s_a >= s_b
        pivot = jnp.where(first, pivot_a, pivot_b)
        distance = jnp.where(first, pivot_b, pivot_a) - pivot
        return s_a + s_b, pivot, u_a + u_b + jnp.minimum(s_a, s_b) * distance

    zero = np.zeros((), w.dtype)
    dims = [a % w.ndim for a in axis]
    state = lax.reduce((w, t, jnp.zeros_like(t)), (zero, zero, zero), merge, dims)
    s, pivot, u = (jnp.expand_dims(x, axis) for x in state)
    return s, pivot, u


def _at_index(t: jax.Array, index: jax.Array, axis: Axes) -> jax.Array:
    """The entry of each row at the place `index`; `axis` without a gap."""
    first, last = t.ndim + axis[0], t.ndim + axis[-1] + 1
    rows = t.reshape(*t.shape[:first], -1, *t.shape[last:])
    place = index.astype(np.int32).reshape(*index.shape[:first], 1, *index.shape[last:])
    place = jnp.broadcast_to(place, (*rows.shape[:first], 1, *rows.shape[first + 1 :]))
    entry = jnp.take_along_axis(rows, place, first, mode="clip")
    return entry.reshape(*t.shape[:first], *[1] * len(axis), *t.shape[last:])


def softmax_derivative(
    p: jax.Array,
    t: jax.Array,
    index: jax.Array | None = None,
    *,
    call: RowCall,
    definition: bool = False,
) -> jax.Array:
    """``scale P (t - sum(P t))``; differentiable in `p` and `t` with `definition`.

    The Jacobian of softmax is symmetric, so this serves forward and reverse mode. It
    takes constants to 0, so a constant may be taken out of `t` first: the value at the
    largest P. Where that entry dominates its row, what it leaves is exactly 0 there and
    the mean a sum of small terms: nothing cancels. (A P rounded to 16 bits sums to 1
    only within 2e-3: the mean is divided by the sum.)

    The value is found by maxima, on a GPU in one kernel; of rows too long for that, by
    the reduction that adds up as well. On a TPU it is the one at `index`, if there is
    one: the maxima would double the time, by the compiler's estimate.

    Entries where P is 0 give 0 and do not touch the row, whatever `t` is there.
    """
    working = working_dtype(p.dtype, t.dtype, call.dtype)
    shape = jnp.broadcast_shapes(p.shape, t.shape)

    def whole(x: jax.Array) -> jax.Array:
        return jnp.broadcast_to(x, shape).astype(working)

    def centered(
        p: jax.Array,
        t: jax.Array,
        center: jax.Array,
        *,
        sums: tuple[jax.Array, jax.Array] | None = None,
        products_anew: bool = False,
    ) -> jax.Array:
        t = t - center
        products = jnp.where(p == 0, 0, p * t)
        if sums is None:
            sums = rowwise_sum(p, call.axis), rowwise_sum(products, call.axis)
        total, moment = sums
        mean = moment * inverse(total)
        if products_anew:
            out = p * ((t - mean) * call.scale)
        else:
            # What is absent is 0 in a NaN row too.
            mean = jnp.where(jnp.isnan(total), 0, mean)
            out = (products - p * mean) * call.scale
        if definition or products_anew:
            out = jnp.where(p == 0, 0, out)
        return out.astype(call.dtype)

    def selecting(p: jax.Array, t: jax.Array) -> jax.Array:
        p, t = whole(p), whole(t)
        if definition:  # nor may its own derivatives meet what stands there
            t = jnp.where(p == 0, 0, t)
        center = _at_largest(p, t, call.axis)
        return centered(p, t, lax.stop_gradient(center))

    def on_gpu(p: jax.Array, t: jax.Array) -> jax.Array:
        # Over other axes XLA would store the arrays converted.
        if not _last_in_memory(shape, call.axis) or fused_on_gpu(shape, call.axis):
            return selecting(p, t)
        p, t = whole(p), whole(t)
        present = jnp.where(p == 0, 0, t)
        total, center, moment = _mean_state_at_once(p, present, call.axis)
        return centered(p, t, center, sums=(total, moment))

    def gathering(p: jax.Array, t: jax.Array) -> jax.Array:
        assert index is not None
        # In its own dtype: XLA would store `t` converted.
        center = _at_index(jnp.broadcast_to(t, shape), index, call.axis)
        # Its P may have been rounded to 0; then NaN there is nothing to the row.
        center = jnp.where(jnp.isfinite(center), center.astype(working), 0)
        # XLA for TPUs would store the products, in float32.
        return centered(whole(p), whole(t), center, products_anew=True)

    def in_arithmetic(p: jax.Array, t: jax.Array) -> jax.Array:
        p, t = whole(p), whole(t)
        # 0 at the largest P, elsewhere -inf: any distance overflows so.
        scaled = p * 2.0**100
        distance = scaled - rowwise_max(scaled, call.axis)
        far = distance * float(jnp.finfo(working).max)
        t = t - rowwise_max(t + far, call.axis)
        total = rowwise_sum(p, call.axis)
        out = p * (t * total - rowwise_sum(p * t, call.axis)) / _at_least(p, total)
        return (out * call.scale).astype(call.dtype)

    def on_cpu(p: jax.Array, t: jax.Array) -> jax.Array:
        # Else XLA keeps a P of 16 bits in float32 too, before it was rounded.
        p = lax.optimization_barrier(p)
        return or_general(in_arithmetic(p, t), False, lambda: selecting(p, t))

    if definition or math.prod(shape) == 0:
        return selecting(p, t)
    return lax.platform_dependent(
        p,
        t,
        cpu=on_cpu,
        cuda=on_gpu,
        rocm=on_gpu,
        tpu=selecting if index is None else gathering,
        default=selecting,
    )


def softmax_derivative_anew(
    x: jax.Array, where: jax.Array | None, t: jax.Array, *, call: RowCall
) -> jax.Array:
    """`softmax_derivative`, of P that is computed anew from the logits.

    What its largest entry comes from, and that all are 1 in sum, is known: two
    reductions less than of a P that is given.
    """
    dtype = call.dtype
    call = dataclasses.replace(call, dtype=working_dtype(x.dtype, t.dtype, dtype))
    shapes = [a.shape for a in (x, where, t) if a is not None]
    whole = jnp.broadcast_shapes(*shapes)
    if where is not None:
        x, t = (jnp.broadcast_to(a, whole) for a in (x, t))
        x, where, call = _merged(x, where, call)
        t = t.reshape(x.shape)
    p, below = _probabilities(x, where, call)
    t = t.astype(p.dtype)
    # One that is next to the largest will do, as in `index_of_largest`: it is found
    # even if XLA computes the logits anew beside each reduction.
    t = t - rowwise_max(jnp.where(below >= -0.5, t, -jnp.inf), call.axis)
    mean = rowwise_sum(jnp.where(p == 0, 0, p * t), call.axis)
    # What is absent is 0 in a NaN row too.
    dx = jnp.where(p == 0, 0, p * ((t - mean) * call.scale))
    return dx.astype(dtype).reshape(whole)


def log_softmax(
    x: jax.Array, where: jax.Array | None, call: RowCall
) -> jax.Array | tuple[jax.Array, jax.Array, jax.Array]:
    """``y = d - log(sum(exp(d)))`` with ``d = scale (x - max)``.

    The maximum itself contributes 1 to the sum. It is left out and added by log1p, so
    that a confident row's largest entry is not rounded to 0.

    Returns:
      y, -inf where masked and in empty rows; but for the operation
      ``log_softmax_alone`` also the state of the row, see `log_sum_exp_state`.
    """
    top, excess = log_sum_exp_state(x, where, call)
    y = log_probabilities(x, where, top, excess, call).astype(call.dtype)
    return y if call.op == "log_softmax_alone" else (y, top, excess)


def log_of_excess(excess: jax.Array) -> jax.Array:
    """``log(1 + excess)``; finite in an empty row, whose excess is -1."""
    return jnp.log1p(jnp.maximum(excess, -0.5))


def log_probabilities(
    x: jax.Array,
    where: jax.Array | None,
    row_max: jax.Array,
    excess: jax.Array,
    call: RowCall,
) -> jax.Array:
    """The logarithms, given the state of whole rows, see `log_sum_exp_state`."""
    y = scaled_below(x, where, row_max, call.scale) - log_of_excess(excess)
    return y if where is None else jnp.where(where, y, -jnp.inf)  # in a NaN row too


def log_softmax_pushforward(
    x: jax.Array,
    where: jax.Array | None,
    row_max: jax.Array | None,
    t: jax.Array,
    call: RowCall,
) -> jax.Array:
    """``scale (t - sum(P t))``; 0 where masked or -inf. See `softmax_derivative`."""
    if row_max is None:
        row_max = row_max_of(x, where, call)
    e, t, valid = _present(x, where, row_max, t, call.scale)
    center = lax.stop_gradient(_at_largest(e, t, call.axis))
    t = jnp.where(valid, t - center, 0)
    mean = rowwise_sum(e * t, call.axis) * inverse(rowwise_sum(e, call.axis))
    return jnp.where(valid, (t - mean) * call.scale, 0).astype(call.dtype)


def corrected(dx: jax.Array, p: jax.Array, axis: Axes) -> jax.Array:
    """A gradient whose exact sum over a row is 0, of which P is the probabilities.

    What rounding leaves of the sum the entry has lost, if there is one, that has more
    than half of the probability.
    """
    return dx - jnp.round(p) * rowwise_sum(dx, axis)


def log_softmax_pullback(
    x: jax.Array,
    where: jax.Array | None,
    row_max: jax.Array | None,
    excess: jax.Array | None,
    g: jax.Array,
    call: RowCall,
    *,
    definition: bool = False,
) -> jax.Array:
    """``scale (g - P sum(g))``; 0 where masked or -inf.

    Of a dominant entry, where g and P sum(g) are nearly the same, either from sums that
    leave it out, see `pulled_back`; or, one reduction after the other, `corrected`: on
    a GPU where that is one kernel.
    """

    def from_sums(
        x: jax.Array, row_max: jax.Array, excess: jax.Array, g: jax.Array
    ) -> jax.Array:
        sums = log_softmax_pullback_state(x, where, row_max, excess, g, call)
        return pulled_back(x, where, row_max, excess, g, sums, call)

    def in_turn(p: jax.Array, g: jax.Array) -> jax.Array:
        return corrected(g - p * rowwise_sum(g, call.axis), p, call.axis) * call.scale

    def on_gpu(x: jax.Array, g: jax.Array) -> jax.Array:
        row_max = row_max_of(x, where, call)
        # -0, and its absolute value: XLA would read the 0 of each entry from memory,
        # where a cotangent is scattered into zeros.
        e, g, valid = _present(x, where, row_max, g, call.scale, absent=-0.0)
        dx = in_turn(e * inverse(rowwise_sum(e, call.axis)), g)
        return jnp.where(valid, dx, jnp.abs(g)).astype(call.dtype)

    def on_cpu(
        x: jax.Array, row_max: jax.Array, excess: jax.Array, g: jax.Array
    ) -> jax.Array:
        if where is not None or x.size == 0:
            return from_sums(x, row_max, excess, g)
        e = jnp.exp(scaled_below(x, None, row_max, call.scale))
        dx = in_turn(e * inverse(1 + excess), g.astype(e.dtype)).astype(call.dtype)
        absent = jnp.min(x) == -jnp.inf
        return or_general(dx, absent, lambda: from_sums(x, row_max, excess, g))

    if row_max is None or excess is None:
        return on_gpu(x, g)
    if definition:
        # Derivatives with respect to x go through the excess.
        return from_sums(x, row_max, _excess_above(x, where, row_max, call), g)

    def gpu(
        x: jax.Array, row_max: jax.Array, excess: jax.Array, g: jax.Array
    ) -> jax.Array:
        if fused_on_gpu(g.shape, call.axis):
            return on_gpu(x, g)
        return from_sums(x, row_max, excess, g)

    return lax.platform_dependent(
        *(x, row_max, excess, g), cuda=gpu, rocm=gpu, cpu=on_cpu, default=from_sums
    )


def pulled_back(
    x: jax.Array,
    where: jax.Array | None,
    row_max: jax.Array,
    excess: jax.Array,
    g: jax.Array,
    sums: Sequence[jax.Array],
    call: RowCall,
) -> jax.Array:
    """What `log_softmax_pullback` returns, given the sums of whole rows.

    As ``g (1 - P) - P (sum(g) - g)``, both differences from sums that leave the maximum
    out: of a dominant entry they keep their digits, and the sums are known together.
    """
    g_at_max, g_rest = sums
    e, g, valid = _present(x, where, row_max, g, call.scale)
    others = g_rest + (g_at_max - g)
    dx = g * ((1 - e) + excess) - e * others
    return jnp.where(valid, dx * (call.scale * inverse(1 + excess)), 0).astype(
        call.dtype
    )


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
    row_max = row_max_of(x, where, call)
    e = jnp.exp(scaled_below(x, where, row_max, call.scale))
    # Without the entries at the maximum, whose exponentials are 1, of which the whole
    # sum says the number.
    rest = rowwise_sum(e - jnp.floor(e), call.axis)
    count = jnp.round(rowwise_sum(e, call.axis) - rest)
    return row_max, rest + (count - 1)


def softmax_derivative_state(
    p: jax.Array, t: jax.Array, index: jax.Array | None = None, *, call: RowCall
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
    absent: float = 0.0,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The exponentials, `t` with 0 for what is absent, and what is not."""
    valid = masked_logits(x, where, row_max.dtype) != -jnp.inf
    below = scaled_below(x, where, row_max, scale)
    t = jnp.where(valid, t.astype(row_max.dtype), absent)
    return jnp.exp(below), t, valid


def log_softmax_pushforward_state(
    x: jax.Array,
    where: jax.Array | None,
    row_max: jax.Array,
    t: jax.Array,
    call: RowCall,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The state of the mean of `t` under ``exp(scale (x - row_max))``."""
    e, t, _ = _present(x, where, row_max, t, call.scale)
    return _mean_state(e, t, call.axis)


def _near_max(
    x: jax.Array, where: jax.Array | None, row_max: jax.Array, call: RowCall
) -> jax.Array:
    """1 at the row maximum, 0 far from it.

    Continuous, because XLA may compute x anew beside each sum:
    https://github.com/openxla/xla/pull/44738.
    """
    return jnp.maximum(1 + scaled_below(x, where, row_max, call.scale), 0)


def log_softmax_pullback_state(
    x: jax.Array,
    where: jax.Array | None,
    row_max: jax.Array,
    excess: jax.Array,
    g: jax.Array,
    call: RowCall,
) -> tuple[jax.Array, jax.Array]:
    """The sum of g in two parts: at the row maximum, and the rest."""
    del excess  # that of the whole row
    _, g, _ = _present(x, where, row_max, g, call.scale)
    a = _near_max(x, where, row_max, call)
    return rowwise_sum(a * g, call.axis), rowwise_sum((1 - a) * g, call.axis)


def _excess_above(
    x: jax.Array, where: jax.Array | None, row_max: jax.Array, call: RowCall
) -> jax.Array:
    """``sum(exp(scale (x - row_max))) - 1``, with its derivatives."""
    e = jnp.exp(scaled_below(x, where, row_max, call.scale))
    a = _near_max(x, where, row_max, call)
    return rowwise_sum(e - a, call.axis) + (rowwise_sum(a, call.axis) - 1)
