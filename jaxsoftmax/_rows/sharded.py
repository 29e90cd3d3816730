"""Rows that several devices share: softmax and its derivatives on a share of a row.

Each device reduces its share to a few numbers a row, the *state*, with a function that
every kernel module has. All-reduces merge the states, and from what comes out each
device computes its share of the result, in jax.numpy. No entry of a row leaves its
device. What is moved, for each row:

| function                | all-reduces                                           |
| ----------------------- | ----------------------------------------------------- |
| softmax                 | the maximum; the sum; the index, where that is kept   |
| log_softmax             | the maximum; the sum in two parts                     |
| softmax_derivative      | the sum of P and of P t, as a pair of float64         |
| softmax_derivative_anew | what softmax moves, and its derivative                |
| log_softmax_pushforward | the same of ``exp(x - max)`` and t                    |
| log_softmax_pullback    | the sum of g in two parts                             |
| log_sum_exp             | the maximum; the sum in two parts                     |
| weighted_log_sum_exp    | the same                                              |
| cross_entropy           | the maximum; the sum in two parts and the others      |
| cross_entropy_pullback  | nothing                                               |
| label_logits            | the logits of the labels                              |
| with_labels             | nothing                                               |

Semantics are those of `_rows.xla`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxsoftmax._core.partitioning import Across
from jaxsoftmax._rows import log_sum_exp, row_loss, xla, xla_loss
from jaxsoftmax._rows.call import RowCall, function_of

# (name of the state, *arrays) -> its numbers
State = Callable[..., Any]


# --- merging states -------------------------------------------------------------------


def _known(row_max: jax.Array, total: jax.Array) -> jax.Array:
    """The maximum, NaN in a row of NaN: an all-reduce may pass NaN by in a maximum."""
    return jnp.where(jnp.isnan(total) & (row_max < jnp.inf), total, row_max)


@dataclasses.dataclass(frozen=True)
class _Below:
    """How far the maximum of a share is below the row's.

    Attributes:
      row_max: The row's maximum.
      distance: ``scale (row_max - mine)``.
      factor: exp of minus that.
    """

    row_max: jax.Array
    distance: jax.Array
    factor: jax.Array


def _below(row_max: jax.Array, across: "Across | _Stacked", scale: float) -> _Below:
    whole = across.max(row_max)
    distance = (xla.finite_row_max(whole) - xla.finite_row_max(row_max)) * scale
    return _Below(whole, distance, jnp.exp(-distance))


def merge_sums(
    state: tuple[jax.Array, jax.Array], across: Across, scale: float
) -> tuple[jax.Array, jax.Array]:
    """The row's maximum and ``sum(exp(scale (x - max)))``; -inf and 0 if it is empty.

    Args:
      state: Of `log_sum_exp_state`.
      across: Who has the other shares.
      scale: Multiplies the logits.
    """
    row_max, excess = state
    below = _below(row_max, across, scale)
    total = across.sum((1 + excess) * below.factor)
    return _known(below.row_max, total), total


def _excess_parts(excess: jax.Array, below: _Below) -> tuple[jax.Array, jax.Array]:
    """What shares add up to a row's sum less the maximum's own 1, to its last digit.

    A share's sum is ``f (1 + excess)`` of the row's, with f = exp(share's maximum -
    row's). Its 1 is added up apart: w is 1 for the share that has the row's maximum and
    0 for one far below it, so that the 1 of the maximum is taken off exactly. The
    excess is the sum of the first parts, and of the second ones, less 1.
    """
    f, w = below.factor, jnp.maximum(1 - below.distance, 0)
    return f * excess + (f - w), w


def merge_excess(
    state: tuple[jax.Array, jax.Array], across: Across, scale: float
) -> tuple[jax.Array, jax.Array]:
    """As `merge_sums`, but the sum less the maximum's own 1: see `_excess_parts`."""
    row_max, excess = state
    below = _below(row_max, across, scale)
    others, ones = across.sums(*_excess_parts(excess, below))
    total = others + (ones - 1)
    return _known(below.row_max, total), total


class _Stacked:
    """As `Across`, of shares that lie along the first axis of their arrays."""

    def max(self, x: jax.Array) -> jax.Array:
        return jnp.max(x, 0, keepdims=True)

    def sums(self, *numbers: jax.Array) -> list[jax.Array]:
        return [jnp.sum(x, 0, keepdims=True) for x in numbers]


def merge_stacked(
    state: row_loss.State, labels: jax.Array, unit: float
) -> row_loss.State:
    """The state of whole rows, given those of shares along the first axis.

    `labels` too are those of the shares: indices in each, or `row_loss.ELSEWHERE`.
    """
    merged = _merge_states(state, labels, _Stacked(), unit)
    return jax.tree.map(lambda a: jnp.squeeze(a, 0), merged)


def _merge_states(
    state: row_loss.State, labels: jax.Array, across: Across | _Stacked, unit: float
) -> row_loss.State:
    """The state of whole rows for cross-entropy: two all-reduces.

    What is below the maximum of a share is further below the row's.
    """
    below = _below(state.row_max, across, unit)
    # A share without entries adds nothing, however far its maximum is below.
    distance = jnp.where(state.row_max == -jnp.inf, 0, below.distance)
    # It may be too large for a float: to be multiplied by what may be 0.
    finite = jnp.minimum(distance, jnp.finfo(distance.dtype).max)
    total = 1 + state.excess
    if state.label_sum is None:
        below_label = state.below_label + jnp.where(labels < 0, 0, distance)
    else:
        below_label = state.below_label + state.label_sum * finite
    parts = [*_excess_parts(state.excess, below), below_label]
    if state.label_sum is not None:
        parts.append(state.label_sum)
    if state.below_sum is not None:
        assert state.entries is not None
        parts += [state.below_sum + state.entries * distance, state.entries]
    if state.below_weighted is not None:
        share = below.factor * state.below_weighted
        parts.append(share + (below.factor * total) * finite)
    others, ones, *rest = across.sums(*parts)
    excess = others + (ones - 1)
    merged = iter(rest)
    rest = [None if number is None else next(merged) for number in state[2:]]
    return row_loss.State(_known(below.row_max, excess), excess, *rest)


def _merge_means(
    state: tuple[jax.Array, jax.Array, jax.Array], across: Across
) -> tuple[jax.Array, jax.Array]:
    """The mean in two parts, a float next to it and the rest.

    In float64, which holds the product of two float32 exactly. So what the mean loses
    is 1e-16 of the largest pivot, and entries less the mean below 1e-9 of it have
    fewer digits than float32 has. One all-reduce of a pair.
    """
    working = state[0].dtype
    with jax.enable_x64(True):
        s, pivot, u = (lax.convert_element_type(x, np.float64) for x in state)
        total, weighted = across.sums(s, s * pivot + u)
        mean = weighted / jnp.where(total == 0, np.float64(1), total)
        info = jnp.finfo(working)
        # XLA removes a conversion there and back on a GPU:
        # https://github.com/openxla/xla/issues/41605.
        near = lax.reduce_precision(mean, info.nexp, info.nmant)
        rest = lax.convert_element_type(mean - near, working)
        return lax.convert_element_type(near, working), rest


# --- the functions --------------------------------------------------------------------


def _softmax(
    state: State,
    across: Across,
    x: jax.Array,
    where: jax.Array | None,
    call: RowCall,
) -> list[jax.Array]:
    row_max, total = merge_sums(
        state("log_sum_exp_state", x, where), across, call.scale
    )
    below = xla.scaled_below(x, where, row_max, call.scale)
    p = jnp.exp(below) * xla.inverse(total)
    if where is not None:
        p = jnp.where(where, p, 0)
    p = p.astype(call.dtype)
    if call.op == "softmax":
        return [p]
    index = xla.index_of_largest(below, call.axis, across.starts, across.sizes)
    return [p, across.max(index)]


def _log_softmax(
    state: State,
    across: Across,
    x: jax.Array,
    where: jax.Array | None,
    call: RowCall,
) -> list[jax.Array]:
    row_max, excess = merge_excess(
        state("log_sum_exp_state", x, where), across, call.scale
    )
    y = xla.log_probabilities(x, where, row_max, excess, call)
    outs = [y.astype(call.dtype), row_max, excess]
    return outs[:1] if call.op == "log_softmax_alone" else outs


def _softmax_derivative(
    state: State,
    across: Across,
    p: jax.Array,
    t: jax.Array,
    index: jax.Array | None = None,
    *,
    call: RowCall,
) -> list[jax.Array]:
    numbers = state("softmax_derivative_state", p, t, index)
    near, rest = _merge_means(numbers, across)
    p, t = p.astype(near.dtype), t.astype(near.dtype)
    dx = p * (((t - near) - rest) * call.scale)
    return [jnp.where(p == 0, 0, dx).astype(call.dtype)]


def _softmax_derivative_anew(
    state: State,
    across: Across,
    x: jax.Array,
    where: jax.Array | None,
    t: jax.Array,
    call: RowCall,
) -> list[jax.Array]:
    dtype = xla.working_dtype(x.dtype, t.dtype, call.dtype)
    of_softmax = dataclasses.replace(call, op="softmax", dtype=dtype)
    (p,) = _softmax(state, across, x, where, call=of_softmax)
    return _softmax_derivative(state, across, p, t, call=call)


def _log_softmax_pushforward(
    state: State,
    across: Across,
    x: jax.Array,
    where: jax.Array | None,
    row_max: jax.Array,
    t: jax.Array,
    call: RowCall,
) -> list[jax.Array]:
    numbers = state("log_softmax_pushforward_state", x, where, row_max, t)
    near, rest = _merge_means(numbers, across)
    x, t = xla.masked_logits(x, where, near.dtype), t.astype(near.dtype)
    y = ((t - near) - rest) * call.scale
    return [jnp.where(x == -jnp.inf, 0, y).astype(call.dtype)]


def _log_softmax_pullback(
    state: State,
    across: Across,
    x: jax.Array,
    where: jax.Array | None,
    row_max: jax.Array,
    excess: jax.Array,
    g: jax.Array,
    call: RowCall,
) -> list[jax.Array]:
    arrays = (x, where, row_max, excess, g)
    sums = tuple(across.sums(*state("log_softmax_pullback_state", *arrays)))
    return [xla.pulled_back(*arrays, sums, call)]


def _log_sum_exp(
    state: State,
    across: Across,
    x: jax.Array,
    where: jax.Array | None,
    call: RowCall,
) -> list[jax.Array]:
    numbers = state("log_sum_exp_state", x, where)
    return list(merge_excess(numbers, across, call.scale))


def _weighted_log_sum_exp(
    state: State,
    across: Across,
    x: jax.Array,
    where: jax.Array | None,
    b: jax.Array,
    call: RowCall,
) -> list[jax.Array]:
    mine = log_sum_exp.weighted_shift(x, where, b, call)
    shift = across.max(mine)
    parts = log_sum_exp.weighted_sums(x, where, b, shift, call.axis)
    rest, ones = across.sums(*parts)
    return [_known(shift, rest), rest, ones]


def _own_labels(
    labels: jax.Array, across: Across, x: jax.Array, call: RowCall
) -> jax.Array:
    """Indices in a device's share `x` of the rows; ELSEWHERE if not in it."""
    if row_loss.is_dense(labels):
        return labels
    shape = [x.shape[a] for a in call.axis]
    mine = labels >= 0
    digits = row_loss.unravel(jnp.maximum(labels, 0), across.sizes)
    places = [d - start for d, start in zip(digits, across.starts, strict=True)]
    for place, size in zip(places, shape, strict=True):
        mine = mine & (place >= 0) & (place < size)
    own = row_loss.ravel(places, shape)
    return jnp.where(mine, own, jnp.where(labels < 0, labels, row_loss.ELSEWHERE))


def _whole_state(
    state: State,
    across: Across,
    x: jax.Array,
    where: jax.Array | None,
    labels: jax.Array,
    call: RowCall,
) -> tuple[row_loss.State, jax.Array]:
    """The state of whole rows, and labels as indices in this device's share."""
    own = _own_labels(labels, across, x, call)
    numbers = state("cross_entropy", x, where, own)
    share = row_loss.state(numbers, call.loss, dense=row_loss.is_dense(own))
    return _merge_states(share, own, across, call.unit), own


def _cross_entropy(
    state: State,
    across: Across,
    x: jax.Array,
    where: jax.Array | None,
    labels: jax.Array,
    call: RowCall,
) -> list[jax.Array]:
    arrays = (x, where, labels)
    whole, _ = _whole_state(state, across, *arrays, call)
    return jax.tree.leaves(whole)


def _cross_entropy_with_gradient(
    state: State,
    across: Across,
    x: jax.Array,
    where: jax.Array | None,
    labels: jax.Array,
    label_weight: jax.Array,
    weight: jax.Array,
    call: RowCall,
) -> list[jax.Array]:
    arrays = (x, where, labels)
    whole, own = _whole_state(state, across, *arrays, call)
    dx = xla_loss.gradient(
        x,
        where,
        own,
        row_loss.statistics(whole, own, call.loss),
        label_weight,
        weight,
        call,
    )
    return [dx, *jax.tree.leaves(whole)]


def _cross_entropy_pullback(
    state: State,
    across: Across,
    x: jax.Array,
    where: jax.Array | None,
    labels: jax.Array,
    *given: jax.Array,
    call: RowCall,
) -> list[jax.Array]:
    own = _own_labels(labels, across, x, call)
    return [xla_loss.cross_entropy_pullback(x, where, own, *given, call=call)]


def _label_logits(
    state: State,
    across: Across,
    x: jax.Array,
    where: jax.Array | None,
    labels: jax.Array,
    call: RowCall,
) -> list[jax.Array]:
    own = _own_labels(labels, across, x, call)
    logits = xla_loss.label_logits(x, where, own, call)
    return [across.sum(jnp.where(own < 0, 0, logits))]


def _with_labels(
    state: State,
    across: Across,
    x: jax.Array,
    where: jax.Array | None,
    labels: jax.Array,
    values: jax.Array,
    call: RowCall,
) -> list[jax.Array]:
    own = _own_labels(labels, across, x, call)
    return [xla_loss.with_labels(x, None, own, values, call)]


_FUNCTIONS: dict[str, Callable[..., list[jax.Array]]] = {
    "softmax": _softmax,
    "softmax_with_index": _softmax,
    "log_softmax": _log_softmax,
    "log_softmax_alone": _log_softmax,
    "softmax_derivative": _softmax_derivative,
    "softmax_derivative_anew": _softmax_derivative_anew,
    "log_softmax_pushforward": _log_softmax_pushforward,
    "log_softmax_pullback": _log_softmax_pullback,
    "log_sum_exp": _log_sum_exp,
    "log_sum_exp_state": _log_sum_exp,
    "weighted_log_sum_exp": _weighted_log_sum_exp,
    "cross_entropy": _cross_entropy,
    "cross_entropy_with_gradient": _cross_entropy_with_gradient,
    "cross_entropy_pullback": _cross_entropy_pullback,
    "label_logits": _label_logits,
    "with_labels": _with_labels,
}


def run(
    call: RowCall,
    arrays: Sequence[jax.Array | None],
    *,
    state: State,
    across: Across,
    inside: jax.Array | None,
) -> list[jax.Array]:
    """A function of rows, on shares of them.

    Args:
      call: Which function, and how.
      arrays: Its arguments, this device's share of each.
      state: Computes the state of a share, by its name.
      across: Who has the other shares.
      inside: False at entries that are no part of the row, where it does not divide;
        None if it does. It broadcasts to the arrays.

    Returns:
      What the function returns, in a list.
    """
    if inside is not None:
        first, *others = arrays
        if call.op == "softmax_derivative":
            assert first is not None
            arrays = (jnp.where(inside, first, jnp.zeros_like(first)), *others)
        else:
            where, *others = others
            arrays = (first, inside if where is None else where & inside, *others)
    if function_of(call.op).startswith("log_softmax_p") and arrays[2] is None:
        x, where, *numbers, t = arrays
        whole = merge_excess(state("log_sum_exp_state", x, where), across, call.scale)
        arrays = (x, where, *whole[: len(numbers)], t)
    return _FUNCTIONS[call.op](state, across, *arrays, call=call)
