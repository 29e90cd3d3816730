"""Cross-entropy on logits: arguments, derivative rules, and what losses are made of.

Two functions of rows stand below them, both lifted to every derivative mode:

- `_statistics`: the loss of each row and a few numbers more. The backward keeps the
  logits as they came, the labels and these numbers, and reads the logits once more.
- `_weighted_sum`: the sum over rows of losses with weights that are known before. Its
  forward, where a gradient is wanted, computes that too, in the pass that reads the
  logits; the backward keeps that gradient alone and multiplies it by a scalar.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxsoftmax._core import checks
from jaxsoftmax._core.autodiff import forward_mode, lift_definition, lift_gradients
from jaxsoftmax._core.checks import Axis
from jaxsoftmax._rows import loss_terms, row_loss, several_labels, xla, xla_loss
from jaxsoftmax._rows.call import RowCall
from jaxsoftmax._rows.kernel_call import before_cast
from jaxsoftmax._rows.loss_terms import Arguments, Loss, Rows
from jaxsoftmax._rows.row_loss import Statistics
from jaxsoftmax._rows.scaling import multiply

# --- statistics of rows: keeps the logits, the labels and the statistics --------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _statistics_rule(
    call: RowCall,
    x: jax.Array,
    where: jax.Array | None,
    labels: jax.Array,
    used: jax.Array | None,
) -> Statistics:
    """`used`: rows whose statistics are used, None for all."""
    return loss_terms.row_statistics(call, x, where, labels)


def _statistics_forward(call: RowCall, *arrays: Any) -> tuple[Statistics, Any]:
    numbers = _statistics(call, *arrays)
    *entries, used = arrays
    return numbers, ((*entries, numbers), used)


def _statistics_backward(
    call: RowCall, residuals: Any, cotangents: Statistics
) -> tuple[Any, ...]:
    dx, dlabels = several_labels.pullback(call, residuals[0], cotangents)
    return dx, None, dlabels, None


def _backward_definition(
    call: RowCall, residuals: Any, cotangents: Statistics
) -> tuple[Any, ...]:
    """Of rows without a cotangent, whatever is in them, no derivative either."""
    row_residuals, _ = residuals
    alive = xla_loss.with_cotangent(cotangents)
    row_residuals = xla_loss.only_rows(alive, row_residuals)
    call = several_labels.definition_of(call)
    dx, dlabels = several_labels.pullback(call, row_residuals, cotangents)
    return dx, None, dlabels, None


def _statistics_pushforward(
    call: RowCall, residuals: Any, tangents: tuple[Any, ...]
) -> Statistics:
    x_dot, _, labels_dot, _ = tangents
    return several_labels.pushforward(call, residuals[0], x_dot, labels_dot)


def _pushforward_definition(
    call: RowCall, residuals: Any, tangents: tuple[Any, ...]
) -> Statistics:
    """Likewise of rows whose statistics are not used."""
    row_residuals, used = residuals
    row_residuals = xla_loss.only_rows(used, row_residuals)
    tangents = row_loss.only(used, tangents)
    call = several_labels.definition_of(call)
    return _statistics_pushforward(call, (row_residuals, used), tangents)


_statistics_rule.defvjp(_statistics_forward, _statistics_backward)
_statistics = forward_mode(
    _statistics_rule,
    _statistics_pushforward,
    pushforward_definition=_pushforward_definition,
    pullback_definition=_backward_definition,
)


# --- the same with the gradient of a weighted sum -------------------------------------
#
# The arrays are logits, a mask or None, labels that are indices; two weights per row,
# of the loss with the label and of the other terms; and which rows are used.


def _with_gradient_call(call: RowCall, *arrays: Any) -> tuple[jax.Array, Statistics]:
    return loss_terms.row_statistics_and_gradient(call, *arrays[:-1])


def _with_gradient_definition(
    call: RowCall, *arrays: Any
) -> tuple[jax.Array, Statistics]:
    x, where, labels, label_weight, weight, used = arrays
    numbers, pull = jax.vjp(lambda x: _statistics(call, x, where, labels, used), x)
    cotangents = xla_loss.cotangents_of_sum(
        row_loss.only(used, numbers), label_weight, weight, call
    )
    return pull(cotangents)[0], numbers


_with_gradient = lift_definition(_with_gradient_call, _with_gradient_definition)


# --- a weighted sum of losses: keeps its gradient -------------------------------------
#
# The arrays are those above, but rows may be None: used are then those with a weight
# that is not 0. For a derivative by the weights the others are, too.


def _used(label_weight: Any, weight: Any, used: jax.Array | None) -> jax.Array:
    return row_loss.used_rows(label_weight, weight) if used is None else used


def _weighted_sum_loss(call: RowCall, *arrays: Any) -> tuple[jax.Array, Statistics]:
    x, where, labels, label_weight, weight, _ = arrays
    used = _used(*arrays[-3:])
    numbers = _statistics(call, x, where, labels, used)
    total, *_ = loss_terms.weighted_terms(call, numbers, label_weight, weight, used)
    return total, numbers


def _weighted_sum_forward(call: RowCall, *arrays: Any) -> tuple[Any, Any]:
    label_weight, weight, _ = arrays[-3:]
    used = _used(*arrays[-3:])
    dx, numbers = _with_gradient(call, *arrays[:-1], used)
    total, nll, term = loss_terms.weighted_terms(
        call, numbers, label_weight, weight, used
    )
    return (total, numbers), (dx, None, None, nll, term, None)


_weighted_sum = lift_gradients(_weighted_sum_loss, _weighted_sum_forward)


# --- what the public functions have in common -----------------------------------------


# Keeps the logits as they came and reads them again.
@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=(0,))
def _weighted_uniform_nll(
    call: RowCall,
    x: jax.Array,
    where: jax.Array | None,
    used: jax.Array | None,
    class_weights: jax.Array,
    numbers: Statistics,
) -> jax.Array:
    """The mean over a row's entries of ``-class_weights log P``."""
    x = row_loss.only(used, x)
    entries = xla_loss.entries(x, where, numbers.row_max, call)
    # What weighs nothing costs nothing, however far below it is.
    below = row_loss.within_range(entries.below)
    weights = jnp.where(entries.present, class_weights, 0)
    cost = weights * (row_loss.log_sum(numbers) + below)
    cost = xla.rowwise_sum(cost, call.axis)
    count = xla.rowwise_sum(entries.present.astype(cost.dtype), call.axis)
    return cost / jnp.maximum(count, 1)


@functools.partial(jax.jit, static_argnums=0)
def _run(
    loss: Loss,
    x: jax.Array,
    where: jax.Array | None,
    scale: jax.Array | None,
    rows: Rows,
) -> Any:
    used = rows.counted
    if scale is not None:
        entries = where
        if used is not None:
            entries = used if where is None else where & used
        x = multiply(x, scale, entries)
    call = dataclasses.replace(loss.call, dtype=x.dtype)
    if loss_terms.in_one_pass(loss, rows, x.dtype):
        weights = loss_terms.reduce_weights(loss, rows, xla.working_dtype(x.dtype))
        needed = None if rows.sample_weights is None else used
        value, numbers = _weighted_sum(call, x, where, rows.labels, *weights, needed)
        numbers = row_loss.only(rows.counted, numbers)
        return loss_terms.with_aux(loss, rows, numbers, value)
    numbers = _statistics(call, x, where, rows.labels, used)
    if call.loss.entropy:
        return loss_terms.token_statistics(call, rows, numbers)
    uniform_nll: Any = functools.partial(
        _weighted_uniform_nll, call, x, where, used, rows.class_weights
    )
    loss = dataclasses.replace(loss, call=call)
    rows, numbers = loss_terms.with_one_cost(rows, numbers)
    return loss_terms.from_statistics(loss, rows, numbers, uniform_nll)


def evaluate(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: Axis,
    given: Arguments,
    dense: bool = False,
) -> Any:
    """The result of a public function, given its arguments, which are checked here.

    `dense` says that labels are weights of the classes.
    """
    x = checks.floating("logits", logits)
    several, own_weights = False, None
    axes, order = checks.check_axis_in_order(axis, x.shape, "logits")
    sizes = tuple(x.shape[a] for a in order)
    if dense or given.label_weights is not None:
        loss_terms.check_for_weights(given)
    if dense:
        labels, shape = checks.check_dense_labels(labels, x, axes)
    else:
        several = given.has_several(labels, x.ndim - len(axes))
        labels, shape = checks.check_labels(labels, x.shape, axes, several=several)
        labels = loss_terms.indices(labels, given.ignore_index, sizes, order)
        own_weights = checks.check_label_weights(given.label_weights, labels, axes)
    x = checks.broadcast(x, shape)
    where, examples = checks.check_where_or_examples(given.where, x.shape, axes)
    number, scale = checks.check_scale(given.scale, x, "the logits' shape")
    loss, *coefficients = loss_terms.check_loss(given, axes, number, x.dtype)
    if scale is None:
        x = before_cast(x, loss.call.implementation)
    weights = checks.per_class(
        "class_weights", given.class_weights, math.prod(sizes), "the logits"
    )
    sample_weights = checks.check_sample_weights(given.sample_weights, x.shape, axes)
    label_weights = None
    if weights is not None:
        weights = weights.astype(xla.working_dtype(x.dtype))
        weights = _to_rank(weights, x.ndim, sizes, order)
        if dense:
            labels = loss_terms.times_class_weights(labels, weights, where, examples)
        else:
            label_weights = loss_terms.weights_of_labels(weights.reshape(-1), labels)
    if several:
        examples, label_weights = loss_terms.several_of_rows(
            labels, examples, label_weights, own_weights
        )
    per_row = (label_weights, sample_weights)
    rows = Rows(examples, labels, weights, *per_row, *coefficients)
    return _run(loss, x, where, scale, rows)


def _to_rank(
    weights: jax.Array, ndim: int, sizes: tuple[int, ...], order: tuple[int, ...]
) -> jax.Array:
    """Class weights, flat in the order of `axis`, as an array of the logits' rank."""
    by_axis = weights.reshape(sizes).transpose([order.index(a) for a in sorted(order)])
    return jnp.expand_dims(by_axis, [a for a in range(-ndim, 0) if a not in order])
