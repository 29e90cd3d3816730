"""Cross-entropy in jax.numpy: runs wherever jax does.

`cross_entropy` reduces rows to a few numbers, `cross_entropy_with_gradient` computes
the gradient too, for weights of the rows that are known before. Both are what every
kernel module has. The derivatives of `cross_entropy` are for all of them: given the
numbers of a row, a gradient has nothing left to reduce (but for labels that are
weights), and XLA makes one kernel of it that reads the logits and writes the gradient;
so does `mosaic_gpu`, of `cross_entropy_pullback`.

Conventions and numerics are those of `_rows.xla`; labels and the numbers of a row
those of `_rows.row_loss`.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsoftmax._core.device import Device
from jaxsoftmax._rows import row_loss, xla
from jaxsoftmax._rows.call import RowCall
from jaxsoftmax._rows.log_sum_exp import log_sum_exp, weighted_log_sum_exp
from jaxsoftmax._rows.row_layout import Axes
from jaxsoftmax._rows.row_loss import State, Statistics
from jaxsoftmax._rows.xla import (
    finite_row_max,
    masked_logits,
    rowwise_max,
    rowwise_sum,
    working_dtype,
)


def cross_entropy(
    x: jax.Array,
    where: jax.Array | None,
    labels: jax.Array,
    call: RowCall,
    *,
    definition: bool = False,
) -> State:
    """The state of each row, or of a device's share of it.

    `labels` are int32, one per row, negative for none; or floats of the shape of `x`.
    The call's dtype is that of a gradient which this is for: it says what digits it
    shows. With `definition` by sums alone, which XLA partitions on every mesh.
    """
    label_logit = None
    if not definition and not row_loss.is_dense(labels):
        working = working_dtype(x.dtype, call.dtype)
        label_logit = row_loss.label_logit(x, where, labels, call.axis, working)
    return _state(entries(x, where, None, call), where, labels, label_logit, call)


def _shown(labels: jax.Array, where: jax.Array | None, dtype: np.dtype) -> jax.Array:
    """Labels that are weights, 0 where masked."""
    t = labels.astype(dtype)
    return t if where is None else jnp.where(where, t, 0)


@dataclasses.dataclass(frozen=True)
class Entries:
    """What is needed of each entry of a row.

    Attributes:
      row_max: The row's largest value: see `_rows.row_loss`.
      v: The entry's value, -inf where it is masked.
      below: ``unit (max - v)``, +inf of what is absent.
      e: ``exp(-below)``.
      present: False where there is no entry: masked, or -inf.
      slope: dz / dx.
    """

    row_max: jax.Array
    v: jax.Array
    below: jax.Array
    e: jax.Array
    present: jax.Array
    slope: jax.Array | float

    @property
    def e_below(self) -> jax.Array:
        """``e below``, 0 where `below` is infinite, though the entry may be present."""
        return self.e * jnp.where(self.below == jnp.inf, 0, self.below)


def entries(
    x: jax.Array, where: jax.Array | None, row_max: jax.Array | None, call: RowCall
) -> Entries:
    """The entries of rows whose maxima are known, or None and found here."""
    working = working_dtype(x.dtype, call.dtype) if row_max is None else row_max.dtype
    logits = masked_logits(x, where, working)
    v = row_loss.values(logits, call.scale, call.loss)
    if row_max is None:
        # Of the logits in their own dtype, if that may have a -inf: XLA for CPU would
        # store them converted (tests/core/test_workarounds.py).
        own = x.dtype if x.dtype.itemsize > 1 else working
        row_max = rowwise_max(masked_logits(x, where, own), call.axis).astype(working)
        row_max = row_loss.values(row_max, call.scale, call.loss)  # keeps the order
    finite = finite_row_max(row_max)
    above = row_loss.above_max(v, finite, call.loss) * call.unit
    e = jnp.exp(above)
    # Of what is -inf, exp is 0 as it is, but for a row of NaN.
    e = e if where is None else jnp.where(where, e, 0)
    slope = row_loss.slope(logits, call.scale, call.loss)
    return Entries(row_max, v, -above, e, v != -jnp.inf, slope)


def _state(
    entry: Entries,
    where: jax.Array | None,
    labels: jax.Array,
    label_logit: jax.Array | None,
    call: RowCall,
) -> State:
    """The state of rows; by sums alone where the labels' logits are not given."""
    row_max, e, axis = entry.row_max, entry.e, call.axis
    label_sum = below_sum = count = below_weighted = None
    # A label, or weight, on an entry that is absent costs infinitely much.
    cost = jnp.where(entry.present, entry.below, jnp.inf)
    if row_loss.is_dense(labels):
        t = _shown(labels, where, e.dtype)
        label_sum = rowwise_sum(t, axis)
        below_label = rowwise_sum(jnp.where(t == 0, 0, t * cost), axis)
    elif label_logit is None:
        hit = row_loss.column(e.shape, axis) == labels
        below_label = rowwise_sum(jnp.where(hit, cost, 0), axis)
    else:
        below_label = row_loss.in_vectors(
            functools.partial(
                row_loss.below_label, scale=call.scale, options=call.loss
            ),
            label_logit,
            labels,
            row_max,
        )
    if label_logit is None or call.loss.entropy or call.loss.labels_apart:
        # At the maximum, where e is 1, its floor; and nothing elsewhere.
        ones = jnp.floor(e)
        excess = rowwise_sum(e - ones, axis) + (rowwise_sum(ones, axis) - 1)
    else:
        # One sum, to its last digit where it counts: where the label is the maximum.
        hit = row_loss.column(e.shape, axis) == labels
        others = rowwise_sum(jnp.where(hit, 0, e), axis)
        excess = row_loss.in_vectors(_with_label, others, labels, below_label)
    if call.loss.uniform_nll:
        below_sum = rowwise_sum(jnp.where(entry.present, entry.below, 0), axis)
        count = rowwise_sum(entry.present.astype(e.dtype), axis)
    if call.loss.entropy:
        below_weighted = rowwise_sum(entry.e_below, axis)
    return State(
        row_max, excess, below_label, label_sum, below_sum, count, below_weighted
    )


def _with_label(others: jax.Array, label: jax.Array, below: jax.Array) -> jax.Array:
    """``sum(e) - 1``, given the sum of the others."""
    return others + jnp.where(label < 0, -1, jnp.expm1(-below))


def label_logits(
    x: jax.Array,
    where: jax.Array | None,
    labels: jax.Array,
    call: RowCall,
    *,
    definition: bool = False,
) -> jax.Array:
    """The logits of several labels of each row: [*rows, K].

    `labels` are indices, [*rows, K]; the logits and the mask have size 1 along K. With
    `definition` by sums alone. Of a negative label any number.
    """
    dtype = working_dtype(x.dtype, call.dtype)
    if not definition:
        return row_loss.label_logit(x, where, labels, call.axis, dtype)
    hit = row_loss.column(x.shape, call.axis) == labels
    return rowwise_sum(jnp.where(hit, masked_logits(x, where, dtype), 0), call.axis)


def with_labels(
    x: jax.Array,
    where: None,
    labels: jax.Array,
    values: jax.Array,
    call: RowCall,
    *,
    definition: bool = False,
) -> jax.Array:
    """`x` with other values at the labels of each row, where these are not negative.

    Labels that are not negative differ within a row. Shapes are those of
    `label_logits`.
    """
    if not definition:
        return row_loss.set_at_label(x, labels, values, call.axis)
    hit = row_loss.column(x.shape, call.axis) == labels
    value = jnp.sum(jnp.where(hit, values.astype(x.dtype), 0), -1, keepdims=True)
    # Not a select of the two: on a mesh with explicit axes they lie in different ways.
    return jnp.where(jnp.any(hit, -1, keepdims=True), 0, x) + value


def cross_entropy_with_gradient(
    x: jax.Array,
    where: jax.Array | None,
    labels: jax.Array,
    label_weight: jax.Array,
    weight: jax.Array,
    call: RowCall,
    *,
    definition: bool = False,
) -> tuple[jax.Array, State]:
    """The gradient of a weighted sum over rows, and their states.

    Of ``label_weight nll + weight (z_loss lse^2 + label_smoothing uniform_nll)``,
    summed; a row of two weights that are 0 has gradient 0, whatever is in it, and the
    state that it has with others. Labels are indices, the weights float32 (float64 for
    float64), one per row.
    """
    state = cross_entropy(x, where, labels, call, definition=definition)
    numbers = row_loss.statistics(state, labels, call.loss)
    dx = gradient(x, where, labels, numbers, label_weight, weight, call)
    return dx, state


def gradient(
    x: jax.Array,
    where: jax.Array | None,
    labels: jax.Array,
    numbers: Statistics,
    label_weight: jax.Array,
    weight: jax.Array,
    call: RowCall,
) -> jax.Array:
    """The gradient that `cross_entropy_with_gradient` computes."""
    cotangents = cotangents_of_sum(numbers, label_weight, weight, call)
    given = pullback_numbers(numbers, labels, cotangents)
    return cross_entropy_pullback(
        x, where, labels, *given.given(), call=for_pullback(call, given)
    )


def cotangents_of_sum(
    numbers: Statistics,
    label_weight: jax.Array,
    weight: jax.Array,
    call: RowCall,
) -> Statistics:
    """Of the statistics of rows, for the sum that `cross_entropy_with_gradient` has."""
    excess_ct = jnp.zeros_like(weight)
    if call.loss.z_loss:
        lse = row_loss.log_sum_exp(numbers, call.unit)
        lse_ct = weight * (2 * call.loss.z_loss) * lse * row_loss.inverse_sum(numbers)
        # Not a product with 0, which is NaN in a row of NaN and in an empty one.
        none = (weight == 0) & ~(jnp.abs(lse) < jnp.inf) | row_loss.is_empty(numbers)
        excess_ct = jnp.where(none, 0, lse_ct)
    return Statistics(
        row_max=jnp.zeros_like(weight),
        excess=excess_ct,
        nll=label_weight,
        uniform_nll=weight * call.loss.label_smoothing
        if call.loss.uniform_nll
        else None,
        entries=jnp.zeros_like(weight) if call.loss.uniform_nll else None,
    )


# --- derivatives of the statistics of rows --------------------------------------------

Residuals = tuple[jax.Array, jax.Array | None, jax.Array, Statistics]


def only_rows(rows: jax.Array | None, residuals: Residuals) -> Residuals:
    """For derivatives of what follows: what is left out is constant, and no NaN.

    So that no NaN meets a 0. In what follows itself a select at its end does for all,
    and exponentials are those of the forward.
    """
    x, where, labels, numbers = residuals
    x = row_loss.only(rows, jnp.where(x == -jnp.inf, jnp.full_like(x, -jnp.inf), x))
    if row_loss.is_dense(labels):
        labels = row_loss.only(rows, labels)
    return x, where, labels, row_loss.only(rows, numbers)


def with_cotangent(cotangents: Any) -> jax.Array:
    """Rows of which there is one that is not 0."""
    alive = [ct != 0 for ct in jax.tree.leaves(cotangents)]
    rank = min(each.ndim for each in alive)
    return functools.reduce(
        # Of several labels of a row, which are in one more dimension, any.
        jnp.logical_or,
        [each if each.ndim == rank else jnp.any(each, -1) for each in alive],
    )


def for_pullback(call: RowCall, numbers: "PullbackNumbers") -> RowCall:
    """The call of `cross_entropy_pullback` with these numbers."""
    options = row_loss.Options(
        call.loss.softcap,
        uniform_nll=numbers.constant is not None,
        entropy=numbers.per_e_below is not None,
    )
    return dataclasses.replace(call, op="cross_entropy_pullback", options=options)


class PullbackNumbers(NamedTuple):
    """The numbers of a row of which its gradient is made: see `pullback_numbers`.

    Attributes:
      row_max: As in `State`.
      at_label: dz at the label, but for the last two terms.
      per_e: What multiplies e elsewhere.
      constant: What every entry is less, or None.
      per_e_below: What multiplies ``e (below - below_mean)``, or None.
      below_mean: As in `Statistics`, or None.
    """

    row_max: jax.Array
    at_label: jax.Array
    per_e: jax.Array
    constant: jax.Array | None = None
    per_e_below: jax.Array | None = None
    below_mean: jax.Array | None = None

    def given(self) -> list[jax.Array]:
        """Those that are there."""
        return [number for number in self if number is not None]

    @staticmethod
    def of(given: Sequence[jax.Array], options: row_loss.Options) -> "PullbackNumbers":
        """Of `given`, where the options say which are there."""
        rest = iter(given)
        return PullbackNumbers(
            next(rest),
            next(rest),
            next(rest),
            next(rest) if options.uniform_nll else None,
            next(rest) if options.entropy else None,
            next(rest) if options.entropy else None,
        )


def pullback_numbers(
    numbers: Statistics, labels: jax.Array | None, cotangents: Statistics
) -> PullbackNumbers:
    """What follows from statistics and their cotangents, of rows, for each row.

    For an index y, and e = exp(z - max) with the sum s:

        dz = e (excess_ct + uniform_ct / s) - uniform_ct / count
           + entropy_ct (e / s) (below - u) + nll_ct (e / s - [y])

    where ``e / s - 1`` at y is ``expm1(-nll)``: what a dominant label leaves keeps its
    digits. Without `labels`, the terms of nll are left out. In a row whose cotangents
    are 0, all terms are 0.
    """
    inverse = row_loss.in_vectors(row_loss.inverse_sum, numbers)
    per_e, entropy_ct = cotangents.excess, cotangents.entropy
    constant = per_e_below = None
    mean_ct = cotangents.below_mean
    if entropy_ct is not None and mean_ct is not None:
        # That is the entropy less the log-sum. A 0 may be that of a row of NaN.
        entropy_ct = entropy_ct + mean_ct
        per_e = per_e - jnp.where(mean_ct == 0, 0, mean_ct * inverse)
    alive = (cotangents.nll != 0) | (per_e != 0)
    if cotangents.uniform_nll is not None:
        assert numbers.entries is not None
        per_e = per_e + cotangents.uniform_nll * inverse
        constant = cotangents.uniform_nll / jnp.maximum(numbers.entries, 1)
        alive = alive | (cotangents.uniform_nll != 0)
    if entropy_ct is not None:
        per_e_below = entropy_ct * inverse
        alive = alive | (entropy_ct != 0)
    at_label = per_e
    if labels is not None:
        at_label, per_e = row_loss.in_vectors(
            _label_and_others, numbers, labels, cotangents.nll, per_e
        )
    terms: Any = (at_label, per_e, constant, per_e_below)
    terms = jax.tree.map(lambda number: jnp.where(alive, number, 0), terms)
    at_label, per_e, constant, per_e_below = terms
    below_mean = None if per_e_below is None else numbers.below_mean
    return PullbackNumbers(
        numbers.row_max, at_label, per_e, constant, per_e_below, below_mean
    )


def cross_entropy_pullback(
    x: jax.Array,
    where: jax.Array | None,
    labels: jax.Array,
    *given: jax.Array,
    call: RowCall,
) -> jax.Array:
    """The cotangent of logits, given `PullbackNumbers`; labels are indices."""
    numbers = PullbackNumbers.of(given, call.loss)
    entry = entries(x, where, numbers.row_max, call)
    hit = row_loss.column(entry.e.shape, call.axis) == labels
    # Of the others as in the forward: in one program XLA computes them once.
    others = numbers.per_e * jnp.where(hit, 0, entry.e)
    dz = jnp.where(hit, numbers.at_label, others)
    return _dx(entry, dz, numbers, call, masked=where is not None)


def _dx(
    entry: Entries,
    dz: jax.Array,
    numbers: PullbackNumbers,
    call: RowCall,
    *,
    masked: bool,
) -> jax.Array:
    """From the terms of e and of labels to dx; 0 in rows whose numbers are all 0."""
    terms = (numbers.at_label, numbers.per_e, numbers.constant, numbers.per_e_below)
    alive = with_cotangent(terms)
    if numbers.constant is not None:
        dz = dz - numbers.constant
    if numbers.per_e_below is not None:
        assert numbers.below_mean is not None
        from_mean = entry.e_below - entry.e * numbers.below_mean
        dz = dz + numbers.per_e_below * from_mean
    if masked or numbers.constant is not None:
        alive = alive & entry.present
    return jnp.where(alive, dz * entry.slope, 0).astype(call.dtype)


def dense_pullback(
    residuals: Residuals,
    cotangents: Statistics,
    call: RowCall,
    *,
    whole_rows: bool,
) -> tuple[jax.Array, jax.Array]:
    """The cotangents of logits and of labels that are weights of the entries.

    What is left of labels keeps its digits in whole rows, not in parts of them.
    """
    x, where, labels, numbers = residuals
    entry = entries(x, where, numbers.row_max, call)
    c = cotangents.nll
    row = pullback_numbers(numbers, None, cotangents)
    assert numbers.label_sum is not None
    p = entry.e * row_loss.in_vectors(row_loss.inverse_sum, numbers)
    dz = numbers.label_sum * p - _shown(labels, where, p.dtype)
    if whole_rows:
        dz = xla.corrected(dz, p, call.axis)
    dz = row.per_e * entry.e + c * dz
    # What a weight costs: infinitely much on an entry that is absent.
    cost = jnp.where(entry.present, row_loss.log_sum(numbers) + entry.below, jnp.inf)
    dlabels = jnp.where(c != 0, c * cost, 0)
    if cotangents.label_sum is not None:
        dlabels = dlabels + cotangents.label_sum
    if where is not None:
        dlabels = jnp.where(where, dlabels, 0)
    dx = _dx(entry, dz, row._replace(at_label=c), call, masked=True)
    return dx, dlabels.astype(labels.dtype)


def _label_and_others(
    numbers: Statistics, label: jax.Array, nll_ct: jax.Array, per_e: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Of a row: ``nll_ct (e / s - 1) + per_e e`` at the label, and the rest over e."""
    nll_ct = row_loss.label_weight(nll_ct, label)
    # Of a label that is absent, which costs +inf, and in an empty row, 0.
    present = (numbers.nll != jnp.inf) & ~row_loss.is_empty(numbers)
    nll = jnp.where(present, numbers.nll, jnp.inf)
    e = jnp.exp(row_loss.log_sum(numbers) - nll)
    p_less_one = jnp.where(present, jnp.expm1(-nll), 0)
    at_label = per_e * e + nll_ct * p_less_one
    return at_label, per_e + nll_ct * row_loss.inverse_sum(numbers)


def cross_entropy_pushforward(
    residuals: Residuals,
    x_dot: jax.Array | None,
    labels_dot: jax.Array | None,
    call: RowCall,
    *,
    at_labels: jax.Array | None = None,
) -> Statistics:
    """The tangents of the statistics of rows.

    Sums of the logits' tangents are taken relative to that at the label: what all have
    in common is exactly what changes neither P nor the loss. Of several labels, with
    the tangents `at_labels`, relative to that of the largest entry, as none but that
    may have most of P.
    """
    x, where, labels, numbers = residuals
    entry = entries(x, where, numbers.row_max, call)
    zero = jnp.zeros_like(numbers.row_max)
    dense = row_loss.is_dense(labels)
    nll_dot = excess_dot = zero
    uniform_dot = None if numbers.uniform_nll is None else zero
    entropy_dot = None if numbers.entropy is None else zero
    inverse = row_loss.inverse_sum(numbers)
    if x_dot is not None:
        e = entry.e
        z_dot = jnp.where(entry.present, x_dot.astype(e.dtype), 0) * entry.slope
        if dense or at_labels is not None:
            pivot = _at_max(entry, z_dot, call.axis)
        else:
            hit = row_loss.column(x.shape, call.axis) == labels
            pivot = rowwise_sum(jnp.where(hit, z_dot, 0), call.axis)
        apart = jnp.where(entry.present, z_dot - pivot, 0)
        mean = rowwise_sum(e * apart, call.axis) * inverse
        excess_dot = rowwise_sum(e * z_dot, call.axis)
        if dense:
            assert numbers.label_sum is not None
            t = labels.astype(e.dtype)
            nll_dot = numbers.label_sum * mean - rowwise_sum(
                jnp.where(entry.present, t * apart, 0), call.axis
            )
        elif at_labels is not None:
            nll_dot = mean[..., None] + (pivot[..., None] - at_labels)
        else:
            nll_dot = mean
        if uniform_dot is not None:
            assert numbers.entries is not None
            uniform_dot = mean - rowwise_sum(apart, call.axis) / jnp.maximum(
                numbers.entries, 1
            )
        if entropy_dot is not None:
            assert numbers.below_mean is not None
            # Relative to where nearly all of P may be, or the terms would cancel.
            center = _at_max(entry, z_dot, call.axis)
            apart = jnp.where(entry.present, z_dot - center, 0)
            from_mean = entry.e_below - e * numbers.below_mean
            entropy_dot = rowwise_sum(from_mean * apart, call.axis) * inverse
    label_sum_dot = zero if dense else None
    if dense and labels_dot is not None:
        t_dot = _shown(labels_dot, where, entry.e.dtype)
        cost = jnp.where(
            entry.present, row_loss.log_sum(numbers) + entry.below, jnp.inf
        )
        nll_dot = nll_dot + rowwise_sum(
            jnp.where(t_dot == 0, 0, t_dot * cost), call.axis
        )
        label_sum_dot = rowwise_sum(t_dot, call.axis)
    if not dense:
        if labels.ndim > nll_dot.ndim:
            nll_dot = jnp.zeros(labels.shape, nll_dot.dtype) + nll_dot[..., None]
        nll_dot = jnp.where(labels == row_loss.IGNORED, 0, nll_dot)
        nll_dot = row_loss.nan_where(labels == row_loss.INVALID, nll_dot)
    return Statistics(
        row_max=zero,
        excess=excess_dot,
        nll=nll_dot,
        label_sum=label_sum_dot,
        uniform_nll=uniform_dot,
        entries=None if numbers.entries is None else zero,
        entropy=entropy_dot,
        below_mean=None if entropy_dot is None else entropy_dot - excess_dot * inverse,
    )


def _at_max(entry: Entries, t: jax.Array, axis: Axes) -> jax.Array:
    """The value of `t` at the row's largest entry, of several the largest."""
    found = rowwise_max(jnp.where(entry.below == 0, t, -jnp.inf), axis)
    return jnp.where(jnp.isinf(found), 0, found)


# --- the implementation "xla" ---------------------------------------------------------

_FUNCTIONS: dict[str, Callable[..., Any]] = {
    f.__name__: f
    for f in (
        xla.softmax,
        xla.softmax_derivative,
        xla.softmax_derivative_anew,
        xla.log_softmax,
        xla.log_softmax_pushforward,
        xla.log_softmax_pullback,
        xla.log_sum_exp_state,
        xla.softmax_derivative_state,
        xla.log_softmax_pushforward_state,
        xla.log_softmax_pullback_state,
        log_sum_exp,
        weighted_log_sum_exp,
        cross_entropy,
        cross_entropy_with_gradient,
        cross_entropy_pullback,
        label_logits,
        with_labels,
    )
} | {"softmax_with_index": xla.softmax, "log_softmax_alone": xla.log_softmax}
# What derivatives of derivatives are taken of, where that is another form.
_DEFINITIONS = _FUNCTIONS | {
    "softmax": functools.partial(xla.softmax, definition=True),
    "softmax_derivative": functools.partial(xla.softmax_derivative, definition=True),
    "log_sum_exp": functools.partial(log_sum_exp, definition=True),
    "log_softmax_pullback": functools.partial(
        xla.log_softmax_pullback, definition=True
    ),
    "cross_entropy": functools.partial(cross_entropy, definition=True),
    "cross_entropy_with_gradient": functools.partial(
        cross_entropy_with_gradient, definition=True
    ),
    "label_logits": functools.partial(label_logits, definition=True),
    "with_labels": functools.partial(with_labels, definition=True),
}


def refusal(call: RowCall, device: Device) -> str | None:
    """It runs everything, everywhere."""
    return None


def run(call: RowCall, arrays: Sequence[Any], *, definition: bool = False) -> Any:
    """What a call computes, of its arrays."""
    functions = _DEFINITIONS if definition else _FUNCTIONS
    return functions[call.op](*arrays, call=call)
