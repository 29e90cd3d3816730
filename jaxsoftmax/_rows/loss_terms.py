"""From the statistics of rows to a loss: what every cross-entropy has in common.

The rows are those of logits; where they come from is no matter here. Arrays of one
number per row have a dimension of size 1 for each that is reduced.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxsoftmax._core import checks, dispatch
from jaxsoftmax._rows import row_loss, several_labels, xla
from jaxsoftmax._rows.call import ROWS, RowCall
from jaxsoftmax._rows.kernel_call import call_rows, call_rows_into
from jaxsoftmax._rows.row_loss import Options, State, Statistics
from jaxsoftmax._rows.scaling import finite

# --- from the arguments to the call ---------------------------------------------------


class Arguments(NamedTuple):
    """What a loss on logits and one behind a linear layer are given alike, unchecked.

    `entropy` says that the result is `TokenStatistics`; the others are the user's.
    """

    where: ArrayLike | None
    ignore_index: int | None = None
    label_smoothing: ArrayLike = 0.0
    z_loss: ArrayLike = 0.0
    logits_soft_cap: ArrayLike | None = None
    scale: ArrayLike | None = None
    class_weights: ArrayLike | None = None
    sample_weights: ArrayLike | None = None
    label_weights: ArrayLike | None = None
    reduction: str = "none"
    return_lse: bool = False
    return_aux: bool = False
    overwrite_logits: bool = False
    implementation: str | Sequence[str] | None = None
    entropy: bool = False

    def has_several(self, labels: ArrayLike, rows_ndim: int) -> bool:
        """Whether rows, of so many dimensions, have several labels each.

        With weights for these, or by one more dimension where each has a result.
        """
        more = np.ndim(checks.unwrapped(labels)) > rows_ndim
        return self.label_weights is not None or (self.entropy and more)


@dataclasses.dataclass(frozen=True)
class Loss:
    """What is computed of rows, and what is done with it.

    Attributes:
      call: Of the kernel that reduces rows, ``"cross_entropy"``. Its options have
        `label_smoothing` and `z_loss`, 0 where `Rows` has them.
      reduction: "none", "sum", "mean" or "weighted_mean".
      return_lse: Whether the log-sum-exp is a result too.
      return_aux: Whether `LossAux` is.
    """

    call: RowCall
    reduction: str
    return_lse: bool
    return_aux: bool


def weigh_classes(labels: jax.Array, ndim: int, given: Arguments) -> bool:
    """Whether labels of a linear loss are a weight for each class.

    They are of a floating dtype and have `ndim` dimensions. What has fewer is refused
    as an index.
    """
    wide = jnp.issubdtype(labels.dtype, jnp.floating) and labels.ndim >= ndim
    if not wide or given.entropy or given.label_weights is not None:
        return False
    if given.ignore_index is not None:
        raise ValueError(
            "ignore_index is for labels that are class indices; with a weight for each "
            "class pass a mask of tokens as where"
        )
    return True


def check_for_weights(given: Arguments) -> None:
    """Raises where the mean needs labels that are one index each."""
    if given.reduction == "weighted_mean":
        raise ValueError(
            "reduction='weighted_mean' divides by the class weights of the labels, "
            "which must be one class index for each row: pass 'mean'"
        )


def check_loss(
    given: Arguments, axis: tuple[int, ...], scale: float, dtype: np.dtype
) -> tuple[Loss, jax.Array | None, jax.Array | None]:
    """The loss, and those of label smoothing and z-loss that are traced."""
    smoothing, traced_smoothing = checks.coefficient(
        "label_smoothing", given.label_smoothing, "[0, 1)"
    )
    z_loss, traced_z_loss = checks.coefficient("z_loss", given.z_loss, ">= 0")
    smooths = bool(smoothing) or traced_smoothing is not None
    options = Options(
        softcap=checks.check_softcap(given.logits_soft_cap),
        uniform_nll=smooths and given.class_weights is None,
        entropy=given.entropy,
        label_smoothing=smoothing,
        z_loss=z_loss,
        in_place=checks.check_flag("overwrite_logits", given.overwrite_logits),
    )
    asked = dispatch.resolve(given.implementation, ROWS)
    loss = Loss(
        RowCall("cross_entropy", axis, scale, dtype, options, implementation=asked),
        checks.check_reduction(given.reduction),
        checks.check_flag("return_lse", given.return_lse),
        checks.check_flag("return_aux", given.return_aux),
    )
    return loss, traced_smoothing, traced_z_loss


# --- calls of kernels -----------------------------------------------------------------


def row_state(
    call: RowCall, x: jax.Array, where: jax.Array | None, labels: jax.Array
) -> State:
    """The state of rows of logits, or of a share of them: one call of a kernel."""
    call = dataclasses.replace(call, options=call.loss.without_gradient)
    numbers = call_rows(call, x, where, labels)
    return row_loss.state(numbers, call.loss, dense=row_loss.is_dense(labels))


def row_statistics(
    call: RowCall, x: jax.Array, where: jax.Array | None, labels: jax.Array
) -> Statistics:
    """The statistics of rows of logits: one call of a kernel."""
    call = dataclasses.replace(call, options=call.loss.without_gradient)
    if several_labels.several(labels, x):
        options = dataclasses.replace(call.loss, labels_apart=True)
        apart = dataclasses.replace(call, options=options)
        none = several_labels.without_labels(labels)
        numbers = row_statistics(apart, x, where, none)
        return several_labels.with_costs(apart, x, where, labels, numbers)
    state = row_state(call, x, where, labels)
    return row_loss.statistics(state, labels, call.loss)


def row_statistics_and_gradient(
    call: RowCall, *arrays: Any, into: tuple[jax.Array, jax.Array] | None = None
) -> tuple[jax.Array, Statistics]:
    """The gradient of a weighted sum, and the statistics: one call of a kernel.

    The arrays are logits, a mask or None, labels, and two weights per row. `into` is an
    array of many gradients and the place of this one: that array, with it, comes back.
    """
    both = dataclasses.replace(call, op="cross_entropy_with_gradient")
    if into is None:
        dx, *numbers = call_rows(both, *arrays)
    else:
        dx, *numbers = call_rows_into(*into, both, *arrays)
    state = row_loss.state(numbers, call.loss, dense=False)
    return dx, row_loss.statistics(state, arrays[2], call.loss)


class Rows(NamedTuple):
    """What is given of each row, besides its logits.

    Attributes:
      examples: Rows that have a loss, or None for all.
      labels: Indices, `row_loss.IGNORED` and `row_loss.INVALID` among them; or weights.
        Several indices per row are in one more dimension; `examples` are then those
        that have a label, and given.
      class_weights: Of the rank of the logits, or None.
      label_weights: The class weight of each row's label, or None. Of several labels,
        what each weighs, that included.
      sample_weights: What each row's loss is multiplied by, or None.
      label_smoothing, z_loss: Of all rows, an array of one number where it is not known
        while tracing; else None.
    """

    examples: jax.Array | None
    labels: jax.Array
    class_weights: jax.Array | None = None
    label_weights: jax.Array | None = None
    sample_weights: jax.Array | None = None
    label_smoothing: jax.Array | None = None
    z_loss: jax.Array | None = None

    @property
    def one_label(self) -> bool:
        """Whether each row has one label, which is an index."""
        several = self.examples is not None and self.labels.ndim > self.examples.ndim
        return not several and not row_loss.is_dense(self.labels)

    @property
    def counted(self) -> jax.Array | None:
        """Which rows have a loss; None for all."""
        if not self.one_label:
            return self.examples
        labelled = self.labels != row_loss.IGNORED
        return labelled if self.examples is None else self.examples & labelled


def smooths(loss: Loss, rows: Rows) -> bool:
    """Whether labels are smoothed: by a number, or by one that may be 0."""
    return bool(loss.call.loss.label_smoothing) or rows.label_smoothing is not None


def _times(coefficient: Any, x: jax.Array) -> jax.Array:
    """The product; 0 where an array of one number turns out to be 0, x infinite or not.

    As of a number that is known to be 0, of which there is no term.
    """
    if isinstance(coefficient, float):
        return coefficient * x
    coefficient = coefficient.astype(x.dtype)
    return coefficient * jnp.where((coefficient == 0) & jnp.isinf(x), 0, x)


def _cost(weight: jax.Array, cost: jax.Array) -> jax.Array:
    """`cost`, where the weight is 0 only if it is finite: its derivative there."""
    return jnp.where((weight == 0) & ~(jnp.abs(cost) < jnp.inf), 0, cost)


def _finite_log_sum_exp(numbers: Statistics, unit: float) -> jax.Array:
    """Of an empty row 0, as is the rest of its loss."""
    empty = row_loss.is_empty(numbers)
    return jnp.where(empty, 0, row_loss.log_sum_exp(numbers, unit))


# --- a sum of losses with weights that are known before -------------------------------


def in_one_pass(loss: Loss, rows: Rows, dtype: Any) -> bool:
    """Whether the forward computes the gradient too, which the logits have in `dtype`.

    If what multiplies the gradient of each row is known there, but for a scalar. Not in
    float16 and narrower dtypes, in which P / rows is too small a number before a loss
    scale multiplies it.
    """
    return (
        loss.reduction != "none"
        and not loss.return_lse
        and rows.one_label
        and rows.label_smoothing is None
        and rows.z_loss is None
        and (rows.class_weights is None or not loss.call.loss.label_smoothing)
        and jnp.finfo(dtype).nexp >= jnp.finfo(np.float32).nexp
    )


def _counted_weights(rows: Rows, like: jax.Array) -> jax.Array:
    """The sample weights, 0 of rows that are not counted; with the shape of `like`."""
    given = rows.sample_weights
    weights = jnp.ones_like(like) if given is None else given.astype(like.dtype)
    return row_loss.only(rows.counted, weights)


def _mean_divisor(
    loss: Loss, rows: Rows, weights: jax.Array, summed: tuple[int, ...]
) -> jax.Array:
    """What a mean divides by, given the sample weights: 1 where none is counted.

    The count; or, where there are such weights, their sum, for "weighted_mean" each
    times the class weight of its label.
    """
    by_label = loss.reduction == "weighted_mean" and rows.label_weights is not None
    if rows.sample_weights is None and not by_label:
        counted = rows.counted
        every = math.prod(weights.shape[i] for i in summed)
        count = every if counted is None else jnp.sum(counted, summed)
        return jnp.maximum(jnp.asarray(count, weights.dtype), 1)
    if by_label:
        weights = weights * row_loss.only(rows.counted, rows.label_weights)
    none = jnp.all(weights == 0, summed)
    return jnp.where(none, 1, jnp.sum(weights, summed))


def reduce_weights(loss: Loss, rows: Rows, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """What a row's loss and the rest of it are multiplied by in the sum over rows."""
    counted, options = rows.counted, loss.call.loss
    assert counted is not None
    weight = _counted_weights(rows, counted.astype(dtype))
    if loss.reduction != "sum":
        every = tuple(range(weight.ndim))
        weight = weight / _mean_divisor(loss, rows, weight, every)
    label_weight = (1 - options.label_smoothing) * weight
    if rows.label_weights is not None:
        label_weight = label_weight * row_loss.only(counted, rows.label_weights)
    if not options.label_smoothing and not options.z_loss:
        weight = label_weight  # there is no rest: what weighs nothing is left out
    return label_weight, weight


def weighted_terms(
    call: RowCall,
    numbers: Statistics,
    label_weight: jax.Array,
    weight: jax.Array,
    used: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The weighted sum, and what each of a row's weights multiplies.

    That is 0 in rows that are not `used`, whatever is in them, and where it is not
    finite and the weight is 0.
    """
    options = call.loss
    # Mask before the log-sum-exp: a NaN in a masked row would otherwise turn its
    # zero gradient into NaN.
    numbers = row_loss.only(used, numbers)
    nll = _cost(label_weight, numbers.nll)
    term = jnp.zeros_like(weight)
    if options.z_loss:
        lse = _finite_log_sum_exp(numbers, call.unit)
        term = term + options.z_loss * lse**2
    if numbers.uniform_nll is not None:
        term = term + options.label_smoothing * numbers.uniform_nll
    term = _cost(weight, term)
    return jnp.sum(label_weight * nll + weight * term), nll, term


# --- the loss of each row -------------------------------------------------------------


class LossAux(NamedTuple):
    """What is logged beside a loss, of ``return_aux=True``; none of it has a gradient.

    Sums over the examples that are counted, each times its sample weight: so that those
    of several batches can be added up. Under `jax.vmap` one for each entry.

    Attributes:
      weight: The sum of the sample weights: without these, how many are counted.
      cross_entropy: The sum of the losses without the z-loss.
      z_loss: The sum of ``z_loss lse^2``.
      correct: The sum over examples whose label has the largest logit, also where
        others have it too; None where labels are weights, or have them.
      lse: ``log(sum(exp(z)))`` of each example, of the shape of the losses; 0 where it
        is not counted.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoftmax import softmax_cross_entropy_with_integer_labels
      >>> logits = jnp.array([[1.0, 3.0], [2.0, 0.0]])
      >>> loss, aux = softmax_cross_entropy_with_integer_labels(
      ...     logits, jnp.array([1, 1]), reduction="mean", z_loss=1e-4, return_aux=True
      ... )
      >>> print(f"{aux.accuracy:.2f} {aux.z_loss / aux.weight:.6f}")
      0.50 0.000715
    """

    weight: jax.Array
    cross_entropy: jax.Array
    z_loss: jax.Array
    correct: jax.Array | None
    lse: jax.Array

    @property
    def accuracy(self) -> jax.Array:
        """``correct / weight``."""
        if self.correct is None:
            raise ValueError(
                "accuracy is of labels that are class indices, one for each example"
            )
        return self.correct / self.weight


def _row_losses(
    loss: Loss,
    rows: Rows,
    numbers: Statistics,
    weighted_uniform_nll: Callable[[Statistics], jax.Array],
) -> tuple[jax.Array, jax.Array | None]:
    """The loss of each row without the z-loss, and that, or None if there is none."""
    call, options = loss.call, loss.call.loss
    counted = rows.counted
    nll = numbers.nll
    if rows.label_weights is not None:
        weight = row_loss.only(counted, rows.label_weights)
        nll = weight * _cost(weight, nll)
    if smooths(loss, rows):
        smoothing: Any = options.label_smoothing
        if rows.label_smoothing is not None:
            smoothing = rows.label_smoothing.astype(nll.dtype)
        uniform_nll = numbers.uniform_nll
        if rows.class_weights is not None:
            uniform_nll = weighted_uniform_nll(numbers)
        assert uniform_nll is not None
        nll = (1 - smoothing) * nll + _times(
            smoothing, row_loss.only(counted, uniform_nll)
        )
    if not options.z_loss and rows.z_loss is None:
        return nll, None
    z_loss: Any = options.z_loss if rows.z_loss is None else rows.z_loss
    lse_or_zero = _finite_log_sum_exp(numbers, call.unit)
    # Not jnp.square, in whose derivative 2 lse may overflow.
    squared = row_loss.apart_from_nan(lambda lse: lse * lse, lse_or_zero)
    return nll, _times(z_loss, squared)


def from_statistics(
    loss: Loss,
    rows: Rows,
    numbers: Statistics,
    weighted_uniform_nll: Callable[[Statistics], jax.Array],
    vmapped_dims: int = 0,
) -> Any:
    """The results of the public functions; no sum over the first `vmapped_dims`.

    `weighted_uniform_nll` computes from the numbers, which are 0 in rows without a
    loss, the mean over a row's entries of ``-class_weights log P``. Called where the
    loss has it.
    """
    counted = rows.counted
    numbers = row_loss.only(counted, numbers)
    parts = _row_losses(loss, rows, numbers, weighted_uniform_nll)
    total = parts[0] if parts[1] is None else parts[0] + parts[1]
    summed = tuple(range(vmapped_dims, total.ndim))
    weights = _counted_weights(rows, total)
    if rows.sample_weights is not None:
        total = weights * _cost(weights, total)
    if loss.reduction == "none":
        value = jnp.squeeze(total, loss.call.axis)
    else:
        value = jnp.sum(total, summed)
        if loss.reduction != "sum":
            value = value / _mean_divisor(loss, rows, weights, summed)
    return with_aux(loss, rows, numbers, value, parts, vmapped_dims)


def with_aux(
    loss: Loss,
    rows: Rows,
    numbers: Statistics,
    value: jax.Array,
    parts: tuple[jax.Array, jax.Array | None] | None = None,
    vmapped_dims: int = 0,
) -> Any:
    """The loss, with lse and what is logged if they are asked for.

    `numbers` are 0 in rows that are not counted. `parts` are those of each row's loss;
    None if they are not known.
    """
    if not loss.return_lse and not loss.return_aux:
        return value
    lse = jnp.squeeze(row_loss.log_sum_exp(numbers, loss.call.unit), loss.call.axis)
    found = (value, lse) if loss.return_lse else (value,)
    if not loss.return_aux:
        return found
    if parts is None:
        parts = _row_losses(loss, rows, numbers, lambda numbers: numbers.nll)
    weights = _counted_weights(rows, parts[0])
    summed = tuple(range(vmapped_dims, weights.ndim))

    def weighted(x: jax.Array) -> jax.Array:
        return jnp.sum(weights * _cost(weights, x), summed)

    correct = None
    if rows.one_label:
        # The label's distance from the largest is what the loss has more than log-sum.
        hit = numbers.nll <= row_loss.log_sum(numbers)
        correct = weighted((hit & (rows.labels >= 0)).astype(weights.dtype))
    z_loss = jnp.zeros_like(weights) if parts[1] is None else parts[1]
    aux = LossAux(
        jnp.sum(weights, summed), weighted(parts[0]), weighted(z_loss), correct, lse
    )
    return *found, jax.tree.map(jax.lax.stop_gradient, aux)


class TokenStatistics(NamedTuple):
    """What `token_logprobs_and_entropy` returns; each has the shape of the examples.

    All three are 0 of an example that is left out, by `where` or `ignore_index`.

    Attributes:
      logprobs: ``log P[label]``; with K labels per example of the shape [..., K], as
        these.
      entropy: ``-sum(P log P)``, in nats.
      lse: ``log(sum(exp(z)))``.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoftmax import token_logprobs_and_entropy
      >>> logits, label = jnp.zeros(4), jnp.array(2)
      >>> logprob, entropy, lse = token_logprobs_and_entropy(logits, label)
      >>> print(f"{logprob:.4f} {entropy:.4f} {lse:.4f}")
      -1.3863 1.3863 1.3863
    """

    logprobs: jax.Array
    entropy: jax.Array
    lse: jax.Array


def token_statistics(call: RowCall, rows: Rows, numbers: Statistics) -> TokenStatistics:
    """Of rows whose entropy is among their numbers."""
    numbers = row_loss.only(rows.counted, numbers)
    assert numbers.entropy is not None
    logprobs = -numbers.nll
    if not rows.one_label:
        logprobs = jnp.where(rows.labels == row_loss.IGNORED, 0, logprobs)
    found = TokenStatistics(
        row_loss.only(rows.counted, logprobs),
        numbers.entropy,
        row_loss.log_sum_exp(numbers, call.unit),
    )
    return TokenStatistics(*(_without_axis(x, call, numbers) for x in found))


def _without_axis(x: jax.Array, call: RowCall, numbers: Statistics) -> jax.Array:
    """Numbers per row, or per label, without the dimensions that are reduced."""
    behind = x.ndim - numbers.row_max.ndim
    return jnp.squeeze(x, tuple(a - behind for a in call.axis))


# --- labels ---------------------------------------------------------------------------


def indices(
    labels: jax.Array,
    ignore_index: int | None,
    sizes: tuple[int, ...],
    order: tuple[int, ...],
) -> jax.Array:
    """Labels as kernels take them: int32, flat over the axes in increasing order.

    They are given as flat indices over the axes in the user's `order`, in which the
    logits have these `sizes`.
    """
    ignore_index = checks.check_ignore_index(ignore_index, labels.dtype)
    wide = labels if labels.dtype.itemsize >= 4 else labels.astype(np.int32)
    count = math.prod(sizes)
    valid = (wide >= 0) & (wide < count)
    index = jnp.where(valid, wide, 0).astype(np.int32)
    ascending = sorted(order)
    if list(order) != ascending:
        digits = row_loss.unravel(index, sizes)
        places = [order.index(a) for a in ascending]
        index = row_loss.ravel([digits[i] for i in places], [sizes[i] for i in places])
    index = jnp.where(valid, index, row_loss.INVALID)
    if ignore_index is not None:
        index = jnp.where(labels == ignore_index, row_loss.IGNORED, index)
    return index


def weights_of_labels(weights: jax.Array, labels: jax.Array) -> jax.Array:
    """The class weight of each row's label: of one that is no class, 1."""
    label_weights = jnp.take(weights, labels, mode="clip")
    return jnp.where(labels == row_loss.INVALID, 1, label_weights)


def times_class_weights(
    labels: jax.Array, weights: jax.Array, *masks: jax.Array | None
) -> jax.Array:
    """Labels that are weights, times those of the classes; 0 where masked."""
    wide = labels.astype(xla.working_dtype(labels.dtype, weights.dtype))
    for mask in masks:
        if mask is not None:
            wide = jnp.where(mask, wide, 0)
    # Of a label that is 0 or masked, no derivative: its cost may be infinite.
    fixed = jax.lax.stop_gradient(finite(weights))
    return wide * jnp.where(wide != 0, weights, fixed).astype(wide.dtype)


# --- several labels per row -----------------------------------------------------------


def several_of_rows(
    labels: jax.Array,
    examples: jax.Array | None,
    class_weights: jax.Array | None,
    given: jax.Array | None,
) -> tuple[jax.Array, jax.Array | None]:
    """The examples that have a label, and what labels weigh: what `Rows` has of both.

    The weights are those that are `given` times those of the labels' classes.
    """
    # Where there are none at all, no example is left out for what its labels are.
    labelled = jnp.any(labels != row_loss.IGNORED, -1) | (labels.shape[-1] == 0)
    examples = labelled if examples is None else examples & labelled
    if given is None or class_weights is None:
        return examples, given
    return examples, given.astype(class_weights.dtype) * class_weights


def with_one_cost(rows: Rows, numbers: Statistics) -> tuple[Rows, Statistics]:
    """Rows with several labels as rows whose loss is the weighted sum of the costs."""
    if rows.one_label or row_loss.is_dense(rows.labels):
        return rows, numbers
    assert rows.label_weights is not None
    numbers = row_loss.only(rows.counted, numbers)
    weights = row_loss.only(rows.counted, rows.label_weights.astype(numbers.nll.dtype))
    ignored = rows.labels == row_loss.IGNORED
    weights = jnp.where(ignored, 0, weights)
    nll = jnp.sum(weights * _cost(weights, numbers.nll), -1)
    return rows._replace(label_weights=None), numbers._replace(nll=nll)
