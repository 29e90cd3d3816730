"""Cross-entropy on logits: the public functions and their derivative rules.

Two functions of rows stand below them, both lifted to every derivative mode:

- `_statistics`: the loss of each row and a few numbers more. The backward keeps the
  logits as they came, the labels and these numbers, and reads the logits once more.
- `_weighted_sum`: the sum over rows of losses with weights that are known before. Its
  forward, where a gradient is wanted, computes that too, in the pass that reads the
  logits; the backward keeps that gradient alone and multiplies it by a scalar.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxsoftmax._core import checks, dispatch
from jaxsoftmax._core.autodiff import forward_mode, lift_definition, lift_gradients
from jaxsoftmax._core.checks import Axis
from jaxsoftmax._rows import loss_terms, row_loss, xla, xla_loss
from jaxsoftmax._rows.call import ROWS, RowCall
from jaxsoftmax._rows.loss_terms import Loss, Rows, TokenStatistics
from jaxsoftmax._rows.row_loss import Options, Statistics
from jaxsoftmax._softmax import finite, multiply

# --- statistics of rows: keeps the logits, the labels and the statistics --------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _statistics_rule(
    call: RowCall,
    x: jax.Array,
    where: jax.Array | None,
    labels: jax.Array,
    counted: jax.Array | None,
) -> Statistics:
    """`counted`: rows whose statistics are used, None for all."""
    return loss_terms.row_statistics(call, x, where, labels)


def _statistics_forward(call: RowCall, *arrays: Any) -> tuple[Statistics, Any]:
    numbers = _statistics(call, *arrays)
    *of_entries, counted = arrays
    return numbers, ((*of_entries, numbers), counted)


def _statistics_backward(
    call: RowCall, residuals: Any, cotangents: Statistics
) -> tuple[Any, ...]:
    dx, dlabels = xla_loss.cross_entropy_pullback(residuals[0], cotangents, call)
    return dx, None, dlabels, None


def _backward_definition(
    call: RowCall, residuals: Any, cotangents: Statistics
) -> tuple[Any, ...]:
    """Of rows without a cotangent, whatever is in them, no derivative either."""
    of_rows, counted = residuals
    alive = xla_loss.with_cotangent(cotangents)
    of_rows = xla_loss.of_rows(alive, of_rows)
    return _statistics_backward(call, (of_rows, counted), cotangents)


def _statistics_pushforward(
    call: RowCall, residuals: Any, tangents: tuple[Any, ...]
) -> Statistics:
    x_dot, _, labels_dot, _ = tangents
    return xla_loss.cross_entropy_pushforward(residuals[0], x_dot, labels_dot, call)


def _pushforward_definition(
    call: RowCall, residuals: Any, tangents: tuple[Any, ...]
) -> Statistics:
    """Likewise of rows whose statistics are not used."""
    of_rows, counted = residuals
    of_rows = xla_loss.of_rows(counted, of_rows)
    tangents = row_loss.only(counted, tangents)
    return _statistics_pushforward(call, (of_rows, counted), tangents)


_statistics_rule.defvjp(_statistics_forward, _statistics_backward)
_statistics = forward_mode(
    _statistics_rule,
    _statistics_pushforward,
    pushforward_definition=_pushforward_definition,
    pullback_definition=_backward_definition,
)


# --- the same with the gradient of a weighted sum -------------------------------------


def _with_gradient_definition(
    call: RowCall,
    x: jax.Array,
    where: jax.Array | None,
    labels: jax.Array,
    label_weight: jax.Array,
    weight: jax.Array,
) -> tuple[jax.Array, Statistics]:
    counted = (label_weight != 0) | (weight != 0)
    numbers, pull = jax.vjp(lambda x: _statistics(call, x, where, labels, counted), x)
    cotangents = xla_loss.cotangents_of_sum(
        row_loss.only(counted, numbers),
        label_weight,
        weight,
        call,
    )
    return pull(cotangents)[0], numbers


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _with_gradient_rule(
    call: RowCall,
    x: jax.Array,
    where: jax.Array | None,
    labels: jax.Array,
    label_weight: jax.Array,
    weight: jax.Array,
) -> tuple[jax.Array, Statistics]:
    arrays = (x, where, labels, label_weight, weight)
    return loss_terms.row_statistics_and_gradient(call, *arrays)


_with_gradient = lift_definition(_with_gradient_rule, _with_gradient_definition)


# --- a weighted sum of losses: keeps its gradient -------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weighted_sum_rule(
    call: RowCall,
    x: jax.Array,
    where: jax.Array | None,
    labels: jax.Array,
    label_weight: jax.Array,
    weight: jax.Array,
) -> jax.Array:
    counted = (label_weight != 0) | (weight != 0)
    numbers = _statistics(call, x, where, labels, counted)
    return loss_terms.weighted_terms(call, numbers, label_weight, weight)[0]


def _weighted_sum_forward(
    call: RowCall,
    x: jax.Array,
    where: jax.Array | None,
    labels: jax.Array,
    label_weight: jax.Array,
    weight: jax.Array,
) -> tuple[jax.Array, Any]:
    dx, numbers = _with_gradient(call, x, where, labels, label_weight, weight)
    total, nll, term = loss_terms.weighted_terms(call, numbers, label_weight, weight)
    return total, (dx, None, None, nll, term)


_weighted_sum = lift_gradients(_weighted_sum_rule, _weighted_sum_forward)


# --- what the public functions have in common -----------------------------------------


class _Arrays(NamedTuple):
    """The arrays of a call.

    Attributes:
      x: Logits.
      where: Entries that have a part, or None for all.
      rows: What else is given of each row.
      scale: An array that multiplies the logits, or None.
    """

    x: jax.Array
    where: jax.Array | None
    rows: Rows
    scale: jax.Array | None = None


def _scaled(call: RowCall, arrays: _Arrays) -> tuple[RowCall, jax.Array]:
    """The logits, multiplied by an array if there is one, and the call for them."""
    x = arrays.x
    if arrays.scale is not None:
        where = arrays.where
        counted = arrays.rows.counted
        if counted is not None:
            where = counted if where is None else where & counted
        x = multiply(x, arrays.scale, where)
    return dataclasses.replace(call, dtype=x.dtype), x


def _weighted_spread(
    call: RowCall,
    x: jax.Array,
    where: jax.Array | None,
    numbers: Statistics,
    rows: Rows,
) -> jax.Array:
    """The mean over a row's entries of ``-class_weights log P``."""
    counted = rows.counted

    # Keeps the logits as they came and reads them again.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def spread(x: jax.Array, numbers: Statistics, weights: jax.Array) -> jax.Array:
        x = x if counted is None else jnp.where(counted, x, jnp.zeros_like(x))
        entries = xla_loss.entries(x, where, numbers.row_max, call)
        # What weighs nothing costs nothing, however far below it is.
        below = row_loss.within_range(entries.below)
        weights = jnp.where(entries.here, weights, 0)
        cost = weights * (row_loss.log_sum(numbers) + below)
        cost = xla.rowwise_sum(cost, call.axis)
        count = xla.rowwise_sum(entries.here.astype(cost.dtype), call.axis)
        return cost / jnp.maximum(count, 1)

    assert rows.class_weights is not None
    return spread(x, numbers, rows.class_weights)


@functools.partial(jax.jit, static_argnums=0)
def _run(loss: Loss, arrays: _Arrays) -> Any:
    call, x = _scaled(loss.call, arrays)
    where, rows = arrays.where, arrays.rows
    if loss_terms.in_one_pass(loss, rows, x.dtype):
        weights = loss_terms.reduce_weights(loss, rows, xla.working_dtype(x.dtype))
        return _weighted_sum(call, x, where, rows.labels, *weights)

    def weighted_spread(numbers: Statistics) -> jax.Array:
        return _weighted_spread(call, x, where, numbers, rows)

    numbers = _statistics(call, x, where, rows.labels, rows.counted)
    loss = dataclasses.replace(loss, call=call)
    return loss_terms.from_statistics(loss, rows, numbers, weighted_spread)


def _prepare(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: Axis,
    where: ArrayLike | None,
    *,
    dense: bool,
    ignore_index: int | None = None,
    label_smoothing: ArrayLike = 0.0,
    z_loss: ArrayLike = 0.0,
    logit_softcap: ArrayLike | None = None,
    scale: ArrayLike | None = None,
    class_weights: ArrayLike | None = None,
    reduction: str = "none",
    return_lse: bool = False,
    entropy: bool = False,
    overwrite_logits: bool = False,
    implementation: str | Sequence[str] | None,
) -> tuple[Loss, _Arrays]:
    """Checks the arguments; returns the static part and the arrays."""
    asked = dispatch.resolve(implementation, ROWS)
    x = checks.check_float_logits(logits)
    axes, order = checks.check_axis_in_order(axis, x.shape, "logits")
    sizes = tuple(x.shape[a] for a in order)
    if dense:
        labels, shape = checks.check_dense_labels(labels, x, axes)
    else:
        labels, shape = checks.check_labels(labels, x.shape, axes)
        ignore_index = checks.check_ignore_index(ignore_index, labels.dtype)
        labels = loss_terms.indices(labels, ignore_index, sizes, order)
    x = checks.broadcast(x, shape)
    where, examples = checks.check_where_or_examples(where, x.shape, axes)
    number, array = checks.check_scale(scale, x, "the logits' shape")
    smoothing, of_smoothing = checks.check_label_smoothing(label_smoothing)
    z_number, of_z = checks.check_z_loss(z_loss)
    weights = checks.check_class_weights(class_weights, sizes)
    of_labels = None
    if weights is not None:
        weights = weights.astype(xla.working_dtype(x.dtype))
        weights = _of_rank(weights, x.ndim, sizes, order)
        if dense:
            wide = labels.astype(xla.working_dtype(labels.dtype, weights.dtype))
            for shown in (where, examples):
                if shown is not None:
                    wide = jnp.where(shown, wide, 0)
            # Of a label that is 0 or masked, no derivative: its cost may be infinite.
            fixed = jax.lax.stop_gradient(finite(weights))
            labels = wide * jnp.where(wide != 0, weights, fixed).astype(wide.dtype)
        else:
            of_labels = loss_terms.weights_of_labels(weights.reshape(-1), labels)
    rows = Rows(examples, labels, weights, of_labels, of_smoothing, of_z)
    options = Options(
        softcap=checks.check_softcap(logit_softcap),
        spread=weights is None and (bool(smoothing) or of_smoothing is not None),
        entropy=entropy,
        label_smoothing=smoothing,
        z_loss=z_number,
        in_place=checks.check_flag("overwrite_logits", overwrite_logits),
    )
    loss = Loss(
        RowCall("cross_entropy", axes, number, x.dtype, options, implementation=asked),
        checks.check_reduction(reduction),
        checks.check_flag("return_lse", return_lse),
    )
    return loss, _Arrays(x, where, rows, array)


def _of_rank(
    weights: jax.Array, ndim: int, sizes: tuple[int, ...], order: tuple[int, ...]
) -> jax.Array:
    """Class weights, flat in the order of `axis`, as an array of the logits' rank."""
    ascending = sorted(order)
    by_axis = weights.reshape(sizes).transpose([order.index(a) for a in ascending])
    full = [1] * ndim
    for a, n in zip(ascending, by_axis.shape, strict=True):
        full[a] = n
    return by_axis.reshape(full)


# --- the public functions -------------------------------------------------------------


def softmax_cross_entropy_with_integer_labels(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    *,
    ignore_index: int | None = None,
    label_smoothing: ArrayLike = 0.0,
    z_loss: ArrayLike = 0.0,
    logit_softcap: ArrayLike | None = None,
    scale: ArrayLike | None = None,
    class_weights: ArrayLike | None = None,
    reduction: str = "none",
    return_lse: bool = False,
    overwrite_logits: bool = False,
    implementation: str | Sequence[str] | None = None,
) -> Any:
    r"""Cross-entropy of softmax with labels that are class indices.

    With the leading parameters, shapes and results of optax's function of this name::

        loss = -log P[label] = lse - z[label],   lse = log(sum(exp(z)))
        z = scale logits,  or  c tanh(scale logits / c)  with c = logit_softcap

    and with everything that is usually added to it, s being `label_smoothing`, w the
    class weights and n the number of classes that have a part::

        (1 - s) w[label] (-log P[label]) + s / n sum(w (-log P)) + z_loss lse^2

    The gradient of a row is ``P - onehot(label)``, computed without the cancellation
    at a label that dominates. Arithmetic is float32 inside, and so is the loss
    whatever the dtype of the logits (float64 for float64).

    What the backward keeps is the logits as they came, and a few numbers a row. With
    ``reduction="sum"`` or ``"mean"`` it is the finished gradient instead, which is
    computed in the pass that computes the loss and multiplied by a scalar later; on a
    GPU that is the fastest form. Every derivative mode works.

    Args:
      logits: Of any shape; a floating dtype. An entry of -inf has no part in its row.
      labels: Integers, of the shape of `logits` without `axis`; as in optax, either may
        have size 1 where the other is larger. A label that is no class, other than
        `ignore_index`, makes the loss of its example NaN, and its gradient.
      axis: Where the classes are: an int, or a tuple, over which a label is a flat
        index; or None for all of `logits`.
      where: Bool mask of classes that broadcasts to `logits`, with as many dimensions;
        False classes have no part in their row. Or of examples, of the shape of
        `labels`; False examples have the loss 0 and are not counted.
      ignore_index: Examples with this label have the loss 0 and the gradient 0,
        whatever their logits, and are not counted; -100 for example. Default: none.
      label_smoothing: A number in [0, 1): how much of a label's weight is spread evenly
        over the classes that have a part. It may be traced, and is then differentiable:
        one program serves all values. The range of a traced one is not checked, and the
        gradient takes a second pass over the logits whatever the `reduction`.
      z_loss: A number of at least 0, traced or not, likewise; multiplies the square of
        the log-sum-exp.
      logit_softcap: A number above 0: bounds the logits, after `scale`, by tanh. It is
        part of the program, and not traced.
      scale: Multiplies the logits first (an inverse temperature): a finite number, or
        a real array, traced or not, that broadcasts to them, which is differentiable.
      class_weights: Real array with an entry for each class.
      reduction: ``"none"`` for the loss of each example, ``"sum"``, or ``"mean"`` over
        the examples that are counted (whatever their class weights; 0 if there are
        none).
      return_lse: Return the pair (loss, lse), both differentiable.
      overwrite_logits: Compute the gradient in the memory of the logits, where a kernel
        computes both in one pass (`reduction` ``"sum"`` or ``"mean"``, on a GPU). Right
        in any case: where the logits are used elsewhere, XLA copies them first, which
        costs time; so ask for it only where they are not. With ``"none"``, and
        where XLA computes the gradient, it changes nothing: XLA decides.
      implementation: As for `softmax`.

    Returns:
      The loss, float32, of the shape of `labels`, or a scalar. With `return_lse` also
      lse, of the shape of `labels`; 0 of an example that is not counted.

      A masked or -inf entry has the gradient 0; as a label it costs +inf. An example
      whose classes are all masked or -inf has the loss 0 and lse -inf. NaN, and +inf
      without a soft cap, among the logits of an example make its loss NaN.

    Raises:
      TypeError: an argument of a wrong type or dtype: labels that are not integers,
        logits that are not floating, a `where` that is not bool.
      ValueError: shapes that do not match, or a number out of its range, such as an
        `ignore_index` that the dtype of `labels` cannot hold.
      NotImplementedError: as `softmax`.

    References:
      z-loss: de Brebisson and Vincent, arXiv:1604.08859; Chowdhery et al., PaLM,
      arXiv:2204.02311, section 5. Label smoothing: Szegedy et al., arXiv:1512.00567.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxsoftmax import softmax_cross_entropy_with_integer_labels
      >>> logits = jnp.array([[1.2, -0.8, -0.5], [0.9, -1.2, 1.1], [0.0, 0.0, 0.0]])
      >>> labels = jnp.array([0, 1, -100])
      >>> loss = softmax_cross_entropy_with_integer_labels
      >>> mean = lambda x: loss(x, labels, ignore_index=-100, reduction="mean")
      >>> with jnp.printoptions(precision=4, suppress=True):
      ...     print(loss(logits, labels, ignore_index=-100))
      ...     print(jax.grad(mean)(logits))
      [0.2761 2.9518 0.    ]
      [[-0.1206  0.0513  0.0693]
       [ 0.2133 -0.4739  0.2606]
       [ 0.      0.      0.    ]]
    """
    return _run(
        *_prepare(
            logits,
            labels,
            axis,
            where,
            dense=False,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            logit_softcap=logit_softcap,
            scale=scale,
            class_weights=class_weights,
            reduction=reduction,
            return_lse=return_lse,
            overwrite_logits=overwrite_logits,
            implementation=implementation,
        )
    )


def softmax_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    *,
    label_smoothing: ArrayLike = 0.0,
    z_loss: ArrayLike = 0.0,
    logit_softcap: ArrayLike | None = None,
    scale: ArrayLike | None = None,
    class_weights: ArrayLike | None = None,
    reduction: str = "none",
    return_lse: bool = False,
    implementation: str | Sequence[str] | None = None,
) -> Any:
    r"""Cross-entropy of softmax with labels that are a weight for each class.

    With the leading parameters, shapes and results of optax's function of this name::

        loss = sum(-labels log P)

    and the options of `softmax_cross_entropy_with_integer_labels`, but for
    `ignore_index`: a mask of examples is given as `where`, of the batch's shape. The
    gradient is ``sum(labels) P - labels`` and, for the labels, ``-log P``. The labels
    need not sum to 1: smoothing takes ``(1 - s) labels + s / n``.

    Args:
      logits: Of any shape; a floating dtype. An entry of -inf has no part in its row.
      labels: Real, of the shape of `logits` or one that broadcasts to it. Or one that
        `logits` broadcast to, but for their classes: as in optax, these are then shared
        by examples. A weight on an entry that is -inf, but not masked, costs +inf.
      axis: As for `softmax_cross_entropy_with_integer_labels`, as are all that follow.
      where: Bool mask of classes, or of examples.
      label_smoothing: A number in [0, 1), traced or not.
      z_loss: A number of at least 0, traced or not.
      logit_softcap: A number above 0, or None.
      scale: A number or an array that multiplies the logits first.
      class_weights: Real array with an entry for each class.
      reduction: ``"none"``, ``"sum"`` or ``"mean"``.
      return_lse: Return the pair (loss, lse).
      implementation: As for `softmax`.

    Returns:
      The loss, float32, of the shape of `logits` without `axis`, or a scalar. With
      `return_lse` also lse, of that shape; 0 of an example that is masked.

    Raises:
      TypeError, ValueError, NotImplementedError: as for
        `softmax_cross_entropy_with_integer_labels`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxsoftmax import softmax_cross_entropy
      >>> logits = jnp.array([1.2, -0.8, -0.5])
      >>> labels = jnp.array([0.9, 0.1, 0.0])
      >>> with jnp.printoptions(precision=4):
      ...     print(softmax_cross_entropy(logits, labels))
      ...     print(jax.grad(softmax_cross_entropy)(logits, labels))
      0.4761297
      [-0.1413  0.0027  0.1386]
    """
    return _run(
        *_prepare(
            logits,
            labels,
            axis,
            where,
            dense=True,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            logit_softcap=logit_softcap,
            scale=scale,
            class_weights=class_weights,
            reduction=reduction,
            return_lse=return_lse,
            implementation=implementation,
        )
    )


@functools.partial(jax.jit, static_argnums=0)
def _run_token_statistics(loss: Loss, arrays: _Arrays) -> TokenStatistics:
    call, x = _scaled(loss.call, arrays)
    rows = arrays.rows
    numbers = _statistics(call, x, arrays.where, rows.labels, rows.counted)
    return loss_terms.token_statistics(call, rows, numbers)


def token_logprobs_and_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    *,
    ignore_index: int | None = None,
    logit_softcap: ArrayLike | None = None,
    scale: ArrayLike | None = None,
    implementation: str | Sequence[str] | None = None,
) -> TokenStatistics:
    r"""Log-probability of each label, entropy and log-sum-exp, from one pass.

    What policy-gradient fine-tuning of a language model needs of its logits: the
    log-probabilities of the tokens that were sampled, at the temperature ``1 / scale``,
    and the entropy of what they were sampled from. All three are differentiable in
    every mode; the backward keeps the logits as they came, and a few numbers a row::

        d logprob = onehot(label) - P
        d entropy = -P (log P + entropy)
        d lse = P

    Args:
      logits: Of any shape; a floating dtype. An entry of -inf has no part in its row.
      labels: Integers, of the shape of `logits` without `axis`. A label that is no
        class, other than `ignore_index`, has the log-probability NaN.
      axis: As for `softmax_cross_entropy_with_integer_labels`.
      where: Likewise. Examples that are masked are left out: all three are 0, with
        gradient 0.
      ignore_index: Examples with this label are left out, whatever their logits.
      logit_softcap: As for `softmax_cross_entropy_with_integer_labels`.
      scale: Likewise; the inverse temperature.
      implementation: As for `softmax`.

    Returns:
      A `TokenStatistics`, float32 (float64 for float64). An example whose classes are
      all masked or -inf has the log-probability and the entropy 0, and lse -inf.

    Raises:
      TypeError, ValueError, NotImplementedError: as for
        `softmax_cross_entropy_with_integer_labels`.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoftmax import token_logprobs_and_entropy
      >>> logits = jnp.array([[1.2, -0.8, -0.5], [0.9, -1.2, 1.1]])
      >>> found = token_logprobs_and_entropy(logits, jnp.array([0, 1]))
      >>> with jnp.printoptions(precision=4):
      ...     print(found.logprobs)
      ...     print(found.entropy)
      [-0.2761 -2.9518]
      [0.7171 0.8573]
    """
    return _run_token_statistics(
        *_prepare(
            logits,
            labels,
            axis,
            where,
            dense=False,
            ignore_index=ignore_index,
            logit_softcap=logit_softcap,
            scale=scale,
            entropy=True,
            implementation=implementation,
        )
    )
