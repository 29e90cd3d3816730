"""Cross-entropy of rows in jax.numpy, given a few numbers of each row.

A row of logits x, multiplied by a scale and, with a soft cap c, capped, is

    z = scale x    or    z = c tanh(scale x / c)

Everything is computed from *values* v with ``z = unit v``: those of x itself and
``unit = scale``, so that x enters unrounded; or, with a cap, v = z and unit = 1. The
numbers of a row are relative to its maximum m: ``below = unit (m - v)`` is never
negative, and e = exp(-below).

Labels are either the flat index of an entry in its row (integers, one per row) or a
weight for each entry (floats, of the shape of x). In kernels an index below 0 stands
for no label: `IGNORED`, `INVALID`, whose loss is NaN, or `ELSEWHERE`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxsoftmax._rows.row_layout import Axes

IGNORED = -1
INVALID = -2
ELSEWHERE = -3  # in another device's share of the row


@dataclasses.dataclass(frozen=True)
class Options:
    """What is computed of a row, besides the cross-entropy with its label.

    Attributes:
      softcap: The c of ``c tanh(scale x / c)``; None without a cap.
      uniform_nll: The mean of -log P over the row, i.e. the loss against a uniform
        label: the label-smoothing term.
      entropy: That of P.
      label_smoothing: The part of the label's weight that is spread over the row.
      z_loss: Multiplies the square of the log-sum-exp.
      in_place: Of `cross_entropy_with_gradient`: a kernel writes the gradient where the
        logits are, if it can. The result is the same.
      labels_apart: Rows have several labels, which the kernel is not given: the excess
        has its digits whichever of the entries is one of them.
    """

    softcap: float | None = None
    uniform_nll: bool = False
    entropy: bool = False
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    in_place: bool = False
    labels_apart: bool = False

    @property
    def without_gradient(self) -> "Options":
        """What of them matters where no gradient is computed."""
        return Options(
            self.softcap,
            self.uniform_nll,
            self.entropy,
            labels_apart=self.labels_apart,
        )

    @property
    def numbers(self) -> int:
        """How many numbers a row `State` has, where labels are indices."""
        return 3 + 2 * self.uniform_nll + self.entropy


class State(NamedTuple):
    """What a kernel reduces a row, or a share of one, to. Each has the rows' shape.

    Attributes:
      row_max: The largest value m, -inf of an empty row.
      excess: ``sum(e) - 1``, the maximum's own 1 left out; -1 of an empty row.
      below_label: `below` at the label, +inf where that is no entry of the row, 0
        without a label; ``sum(labels below)`` where labels are weights.
      label_sum: ``sum(labels)`` where they are weights, else None.
      below_sum: ``sum(below)``, or None.
      entries: How many entries the row has, or None.
      below_weighted: ``sum(e below)``, or None.
    """

    row_max: jax.Array
    excess: jax.Array
    below_label: jax.Array
    label_sum: jax.Array | None = None
    below_sum: jax.Array | None = None
    entries: jax.Array | None = None
    below_weighted: jax.Array | None = None


class Statistics(NamedTuple):
    """What follows from a row's `State`.

    `row_max` and `entries` have no derivative.

    Attributes:
      row_max, excess, entries, label_sum: As in `State`.
      nll: ``sum(-labels log P)``: of an index, -log P of that entry; of several, [K],
        in one more dimension.
      uniform_nll: The mean of -log P over the entries, or None.
      entropy: ``-sum(P log P)``, or None.
      below_mean: ``sum(P below)``, or None. The derivative of the entropy is of it:
        from entropy and log-sum it would cancel, in a row of two equal maxima.
    """

    row_max: jax.Array
    excess: jax.Array
    nll: jax.Array
    label_sum: jax.Array | None = None
    uniform_nll: jax.Array | None = None
    entries: jax.Array | None = None
    entropy: jax.Array | None = None
    below_mean: jax.Array | None = None


def state(numbers: Sequence[jax.Array], options: Options, *, dense: bool) -> State:
    """The `State` of the numbers that a kernel call returns, in their order."""
    row_max, excess, below_label, *rest = numbers
    given = iter(rest)
    return State(
        row_max,
        excess,
        below_label,
        next(given) if dense else None,
        next(given) if options.uniform_nll else None,
        next(given) if options.uniform_nll else None,
        next(given) if options.entropy else None,
    )


def in_vectors(f: Callable[..., Any], *numbers: Any) -> Any:
    """``f(*numbers)``, elementwise, of trees of numbers per row.

    XLA for CPU computes arrays [n, 1] one entry after the other, [n] in vectors
    (tests/core/test_workarounds.py).
    """
    if not all(map(_is_column, jax.tree.leaves(numbers))):
        return f(*numbers)
    flat = jax.tree.map(lambda x: lax.squeeze(x, [x.ndim - 1]), numbers)
    return jax.tree.map(lambda x: lax.expand_dims(x, [x.ndim]), f(*flat))


def _is_column(x: jax.Array) -> bool:
    if x.ndim < 2 or x.shape[-1] != 1:
        return False
    # A mesh with explicit axes may split that dimension, over one device.
    return jax.typeof(x).sharding.spec[-1] is None


def nan_where(invalid: jax.Array, x: jax.Array) -> jax.Array:
    """`x`, and NaN where `invalid`.

    Computed: where nothing is invalid, jax_debug_nans without jit would take a constant
    for the NaN that it looks for (https://github.com/jax-ml/jax/issues/18680).
    """
    return x + 0 / (~invalid).astype(x.dtype)


def is_dense(labels: Any) -> bool:
    """Whether labels are weights of the entries, not indices."""
    return bool(jnp.issubdtype(labels.dtype, jnp.floating))


def is_empty(numbers: State | Statistics) -> jax.Array:
    """Whether a row has no entry, by its excess, which is -1."""
    return numbers.excess < -0.5


def only(rows: jax.Array | None, arrays: Any) -> Any:
    """A tree of arrays with 0 in other rows, without a derivative there, NaN or not.

    `rows` is None for all. What arrays have for each of several labels is in a
    dimension behind those of `rows`.
    """
    if rows is None:
        return arrays

    def used(a: jax.Array) -> jax.Array:
        behind = range(rows.ndim, a.ndim)
        # Not zeros_like: on a mesh with explicit axes they might lie in another way.
        return jnp.where(jnp.expand_dims(rows, tuple(behind)), a, 0)

    return jax.tree.map(used, arrays)


def used_rows(label_weight: jax.Array, weight: jax.Array) -> jax.Array:
    """Whether a row has any part in a weighted sum of losses."""
    return (label_weight != 0) | (weight != 0)


def within_range(x: jax.Array) -> jax.Array:
    """`x`, the largest or the lowest float where it is infinite."""
    # In full: jax.experimental.jet fails at a bound without dimensions
    # (tests/core/test_workarounds.py).
    most = jnp.full_like(x, jnp.finfo(x.dtype).max)
    return jnp.minimum(jnp.maximum(x, -most), most)


def apart_from_nan(f: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """``f(x)``, NaN with the derivative 1 where `x` is NaN.

    For a number of a row: with a cotangent of 0 the gradient is 0 then, and with
    another one the derivatives of the row, which are NaN, are not left out.
    """
    is_nan = jnp.isnan(x)
    return jnp.where(is_nan, x, f(jnp.where(is_nan, 0, x)))


def log_sum(numbers: State | Statistics) -> jax.Array:
    """``log(sum(e))``, 0 of an empty row."""
    excess = jnp.where(is_empty(numbers), 0, numbers.excess)
    return apart_from_nan(jnp.log1p, excess)


def inverse_sum(numbers: State | Statistics) -> jax.Array:
    """``1 / sum(e)``, 1 of an empty row."""
    return 1 / (1 + jnp.where(is_empty(numbers), 0, numbers.excess))


def log_sum_exp(numbers: State | Statistics, unit: float) -> jax.Array:
    """``log(sum(exp(z)))``, -inf of an empty row; of another a finite number."""
    empty = is_empty(numbers)
    row_max = jnp.where(empty, 0, numbers.row_max)
    # An infinite one would be NaN in the gradient of its square, where P is 0.
    z = within_range(row_max * unit)
    return jnp.where(empty, -jnp.inf, z + log_sum(numbers))


def statistics(state: State, labels: jax.Array, options: Options) -> Statistics:
    """What follows from the state of whole rows; 0 of an empty row."""
    indices = () if is_dense(labels) else (labels,)
    return in_vectors(functools.partial(_statistics, options), state, *indices)


def _statistics(
    options: Options, state: State, labels: jax.Array | None = None
) -> Statistics:
    """`statistics`; `labels` are indices, or None where they are weights."""
    empty, log_z = is_empty(state), log_sum(state)
    uniform_nll = entropy = below_mean = None
    if labels is None:
        assert state.label_sum is not None
        nll = state.label_sum * log_z + state.below_label
    else:
        nll = jnp.where(labels == IGNORED, 0, log_z + state.below_label)
    nll = jnp.where(empty, 0, nll)
    if labels is not None:
        nll = nan_where(labels == INVALID, nll)
    if options.uniform_nll:
        assert state.below_sum is not None
        assert state.entries is not None
        uniform_nll = log_z + state.below_sum / jnp.maximum(state.entries, 1)
        uniform_nll = jnp.where(empty, 0, uniform_nll)
    if options.entropy:
        assert state.below_weighted is not None
        below_mean = state.below_weighted * inverse_sum(state)
        entropy = jnp.where(empty, 0, log_z + below_mean)
    return Statistics(
        state.row_max,
        state.excess,
        nll,
        state.label_sum,
        uniform_nll,
        state.entries,
        entropy,
        below_mean,
    )


def int32(size: Any) -> Any:
    """A size that arrays of int32 are computed with; as an array where symbolic."""
    known = isinstance(size, int | np.integer)
    return np.int32(size) if known else jnp.asarray(size, np.int32)


# --- entries of a row -----------------------------------------------------------------


def unit(scale: float, options: Options) -> float:
    """What multiplies a value: ``z = unit v``."""
    return scale if options.softcap is None else 1.0


def values(x: jax.Array, scale: float, options: Options) -> jax.Array:
    """The values of logits in the working dtype; -inf stays what it is."""
    if options.softcap is None:
        return x
    capped = options.softcap * jnp.tanh(x * (scale / options.softcap))
    return jnp.where(x == -jnp.inf, -jnp.inf, capped)


def above_max(v: jax.Array, row_max: jax.Array, options: Options) -> jax.Array:
    """``v - row_max``, without what is rounding; with the derivative of both."""
    above = v - row_max
    if options.softcap is None:
        return above
    return above - lax.stop_gradient(rounding_of_cap(above, options.softcap))


def rounding_of_cap(above: jax.Array, softcap: float) -> jax.Array:
    """All of a value less the maximum where that may be a cap's rounding, or 0.

    The two are rounded each by itself, in other operations. Of the entry that has the
    maximum the difference must be 0: the others' exponentials may be as small as its
    rounding, and the gradient with them.
    """
    least = -4 * float(jnp.finfo(above.dtype).eps) * softcap
    return jnp.where(above > least, above, 0)


def slope(x: jax.Array, scale: float, options: Options) -> jax.Array | float:
    """``dz / dx``. With a cap, 1 - tanh^2 without its cancellation near 1."""
    if options.softcap is None:
        return scale
    q = jnp.exp(-2 * jnp.abs(x * (scale / options.softcap)))
    return scale * 4 * q / ((1 + q) * (1 + q))


def column(shape: Sequence[int], axis: Axes) -> jax.Array:
    """The flat index of each entry in its row, of size 1 along the other dimensions."""
    full = tuple(n if i - len(shape) in axis else 1 for i, n in enumerate(shape))
    index = jnp.zeros(full, np.int32)
    for i, a in enumerate(axis):
        step = int32(math.prod(shape[a] for a in axis[i + 1 :]))
        index = index + lax.broadcasted_iota(np.int32, full, len(shape) + a) * step
    return index


def at_label(
    x: jax.Array, label: jax.Array, axis: Axes, sizes: Sequence[int]
) -> jax.Array:
    """The entry of each row at the flat index `label`; of a negative one, any entry.

    The logits have these `sizes` along `axis`; `x` has size 1 where it is the same for
    all.
    """
    if 0 in sizes:
        return jnp.zeros(label.shape, x.dtype)  # no index is valid
    index = _index(x.shape, label, axis, sizes)
    picked = x.at[index].get(mode="promise_in_bounds")
    return jnp.broadcast_to(picked, jnp.broadcast_shapes(picked.shape, label.shape))


def set_at_label(
    x: jax.Array,
    label: jax.Array,
    value: jax.Array,
    axis: Axes,
    place: jax.Array | None = None,
) -> jax.Array:
    """`x` with an entry of each row replaced, where `label` is not negative.

    Of the rows ``x[place]``, if that is given.
    """
    shape = x.shape if place is None else x.shape[1:]
    *index, last = _index(shape, label, axis, [shape[a] for a in axis])
    if place is not None:
        index.insert(0, place)
    # Where there is none, an index that is out of bounds: nothing is written there. Not
    # the same for several labels: indices are said to be unique.
    beyond = lax.broadcasted_iota(np.int32, label.shape, label.ndim - 1)
    last = jnp.where(label < 0, int32(x.shape[-1]) + beyond, last)
    return x.at[(*index, last)].set(
        value.astype(x.dtype), mode="drop", unique_indices=True
    )


def _index(
    shape: Sequence[int], label: jax.Array, axis: Axes, sizes: Sequence[int]
) -> tuple[Any, ...]:
    """Of the entry of each row at the flat index `label`; 0 where that is negative."""
    digits = unravel(jnp.maximum(label, 0), sizes)
    index: list[Any] = []
    for i, n in enumerate(shape):
        a = i - len(shape)
        if n == 1:
            index.append(jnp.zeros((1,) * len(shape), np.int32))
        elif a in axis:
            index.append(digits[axis.index(a)])
        else:
            along = tuple(n if j == i else 1 for j in range(len(shape)))
            index.append(lax.broadcasted_iota(np.int32, along, i))
    return tuple(index)


def label_logit(
    x: jax.Array, where: jax.Array | None, label: jax.Array, axis: Axes, dtype: Any
) -> jax.Array:
    """The logit of each row's label, -inf where that is masked."""
    sizes = [x.shape[a] for a in axis]
    logit = at_label(x, label, axis, sizes).astype(dtype)
    if where is None:
        return logit
    return jnp.where(at_label(where, label, axis, sizes), logit, -jnp.inf)


def below_label(
    logit: jax.Array,
    label: jax.Array,
    row_max: jax.Array,
    scale: float,
    options: Options,
) -> jax.Array:
    """`State.below_label` of the label's logit."""
    finite = jnp.maximum(row_max, jnp.finfo(row_max.dtype).min)
    above = above_max(values(logit, scale, options), finite, options)
    below = -above * unit(scale, options)
    return jnp.where(label < 0, 0, below)


def label_weight(weight: jax.Array, label: jax.Array) -> jax.Array:
    """What the loss of a label counts: 0 where ignored, NaN where invalid but not 0."""
    weight = jnp.where(label == IGNORED, 0, weight)
    return nan_where((label == INVALID) & (weight != 0), weight)


def other_weights(
    state: State, weight: jax.Array, scale: float, options: Options
) -> tuple[jax.Array, jax.Array]:
    """Of the terms without the label: what multiplies P, what every entry is less."""
    p_weight = constant = jnp.zeros_like(weight)
    if options.z_loss:
        p_weight = (
            weight * (2 * options.z_loss) * log_sum_exp(state, unit(scale, options))
        )
    if state.entries is not None:
        smoothed = weight * options.label_smoothing
        p_weight = p_weight + smoothed
        constant = smoothed / jnp.maximum(state.entries, 1)
    return p_weight, constant


def label_gradient(
    logit: jax.Array,
    label: jax.Array,
    state: State,
    label_weight: jax.Array,
    weight: jax.Array,
    scale: float,
    options: Options,
) -> jax.Array:
    """The gradient of `cross_entropy_with_gradient` at a row's label.

    ``P - 1`` as ``expm1(-nll)``: what a dominant label leaves keeps its digits.
    """
    numbers = statistics(state, label, options)
    p_weight, constant = other_weights(state, weight, scale, options)
    p = jnp.exp(-state.below_label) * inverse_sum(state)
    dz = (label_weight * jnp.expm1(-numbers.nll) - constant) + p_weight * p
    return jnp.where(logit == -jnp.inf, 0, dz * slope(logit, scale, options))


def unravel(index: jax.Array, sizes: Sequence[int]) -> list[jax.Array]:
    """The place along each dimension of an entry, given its flat index."""
    digits: list[jax.Array] = []
    for size in reversed(sizes):
        digits.append(index % int32(size))
        index = index // int32(size)
    return digits[::-1]


def ravel(places: Sequence[jax.Array], sizes: Sequence[int]) -> jax.Array:
    """The flat index of an entry, given its place along each dimension."""
    index = jnp.int32(0)
    for place, size in zip(places, sizes, strict=True):
        index = index * int32(size) + place
    return index
