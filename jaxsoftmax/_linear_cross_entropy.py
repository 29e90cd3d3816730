"""Cross-entropy behind a linear layer: the public functions.

What is computed in chunks, and how its derivatives are, is in `_linear_rules`; how
transforms and meshes meet a call, in `_linear_call`.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxsoftmax import _cross_entropy
from jaxsoftmax._core import checks, dispatch
from jaxsoftmax._core.shapes import is_known
from jaxsoftmax._linear import linear_call
from jaxsoftmax._linear.chunks import least_chunk
from jaxsoftmax._linear.rules import (
    Layer,
    gradients_fit,
    linear,
    statistics,
    weighted_sum,
)
from jaxsoftmax._rows import loss_terms, row_loss, xla
from jaxsoftmax._rows.call import ROWS, RowCall
from jaxsoftmax._rows.loss_terms import Loss, Rows, TokenStatistics
from jaxsoftmax._rows.row_loss import Options, Statistics
from jaxsoftmax._rows.scaling import multiply

# By default logits and their gradient may take as much as so many bytes for each entry
# of the weights (two copies in float32), or this much if that is more.
_BUDGET_PER_WEIGHT = 8
_LEAST_BUDGET = 2**28

# --- what the public functions have in common -----------------------------------------


class _Arrays(NamedTuple):
    """The arrays of a call.

    Attributes:
      x: [*tokens, H].
      weights: [H, V] or [V, H].
      bias: [V], or None.
      scale: [*tokens, 1], or None.
      rows: What is given of each token; its class weights are [V].
    """

    x: jax.Array
    weights: jax.Array
    bias: jax.Array | None
    scale: jax.Array | None
    rows: Rows


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _run(loss: Loss, layer: Layer, kept: int, arrays: _Arrays) -> Any:
    """The loss; not summed over the first `kept` dimensions of tokens."""
    if kept and loss.reduction != "none":
        return _run_kept_apart(loss, layer, kept, arrays)
    x, weights, bias, scale, rows = arrays
    if (
        loss_terms.in_one_pass(loss, rows, layer.rows.dtype)
        and scale is None
        and gradients_fit(layer, rows.labels.size, weights)
    ):
        of_rows = loss_terms.reduce_weights(loss, rows, layer.working)
        return weighted_sum(layer, x, weights, bias, rows.labels, *of_rows)
    smoothed = None
    if loss_terms.smooths(loss, rows) and rows.class_weights is not None:
        smoothed = rows.class_weights
        if bias is not None:
            # What has no part in a row costs nothing.
            smoothed = jnp.where(bias == -jnp.inf, 0, smoothed)
    numbers = statistics(layer, x, weights, bias, scale, smoothed, rows.labels)

    def weighted_spread(_: Statistics) -> jax.Array:
        found = numbers.of_classes
        assert found is not None
        assert found.entries is not None
        of_counted = row_loss.only(rows.counted, found.nll)
        return of_counted / jnp.maximum(found.entries, 1)

    return loss_terms.from_statistics(loss, rows, numbers.of_label, weighted_spread)


def _run_kept_apart(loss: Loss, layer: Layer, kept: int, arrays: _Arrays) -> Any:
    """By what tokens lose: what their gradients are multiplied by is not known yet."""
    of_each = dataclasses.replace(loss, reduction="none")
    found = _run(of_each, layer, kept, arrays)
    each, lse = found if loss.return_lse else (found, None)
    value = jnp.sum(each, axis=tuple(range(kept, each.ndim)))
    if loss.reduction == "mean":
        counted = arrays.rows.counted
        assert counted is not None
        count = jnp.sum(counted, axis=tuple(range(kept, counted.ndim)))
        value = value / jnp.maximum(count.astype(value.dtype), 1)
    return (value, lse) if loss.return_lse else value


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run_token_statistics(layer: Layer, kept: int, arrays: _Arrays) -> TokenStatistics:
    x, weights, bias, scale, rows = arrays
    numbers = statistics(layer, x, weights, bias, scale, None, rows.labels)
    return loss_terms.token_statistics(layer.rows, rows, numbers.of_label)


def _call(run: Any, config: tuple[Any, ...], arrays: _Arrays) -> list[jax.Array]:
    """What is in ``run(*config, 0, arrays)``, as one operation."""
    x, weights, bias, scale, rows = arrays
    of_tokens = (x, scale, rows.examples, rows.labels)
    of_layer = (weights, bias, rows.class_weights, rows.label_smoothing, rows.z_loss)
    static = (run, config)
    return linear_call.call(_run_call, static, of_tokens, of_layer)


def _run_call(static: Any, kept: int, of_tokens: Any, of_layer: Any) -> Any:
    (run, config), (weights, bias, class_weights, *coefficients) = static, of_layer
    x, scale, examples, labels = of_tokens
    if examples is not None:
        labels = jnp.where(examples, labels, row_loss.IGNORED)
    of_labels = None
    if class_weights is not None:
        of_labels = loss_terms.weights_of_labels(class_weights, labels)
    rows = Rows(None, labels, class_weights, of_labels, *coefficients)
    return run(*config, kept, _Arrays(x, weights, bias, scale, rows))


def _prepare(
    x: ArrayLike,
    labels: ArrayLike,
    weights: ArrayLike,
    *,
    bias: ArrayLike | None,
    vocab_axis: int,
    where: ArrayLike | None,
    ignore_index: int | None,
    logit_softcap: ArrayLike | None,
    scale: ArrayLike | None,
    precision: Any,
    memory_budget: int | None,
    implementation: str | Sequence[str] | None,
    class_weights: ArrayLike | None = None,
    label_smoothing: ArrayLike = 0.0,
    z_loss: ArrayLike = 0.0,
    reduction: str = "none",
    return_lse: bool = False,
    entropy: bool = False,
) -> tuple[Loss, Layer, _Arrays]:
    """Checks the arguments; returns the static parts and the arrays."""
    asked = dispatch.resolve(implementation, ROWS)
    x, weights, vocab_first = checks.check_layer(x, weights, vocab_axis)
    vocabulary = weights.shape[0 if vocab_first else 1]
    bias = checks.check_bias(bias, vocabulary)
    operands = jnp.promote_types(_operand(x), _operand(weights))
    working = xla.working_dtype(operands)
    labels, logits = checks.check_labels(
        labels, (*x.shape[:-1], vocabulary), (-1,), of=f"x of shape {x.shape}"
    )
    tokens = logits[:-1]
    x = checks.broadcast(x, (*tokens, x.shape[-1]))
    ignore_index = checks.check_ignore_index(ignore_index, labels.dtype)
    ignored = None if ignore_index is None else labels == ignore_index
    labels = loss_terms.indices(labels, ignored, (vocabulary,), (-1,))
    like = jax.ShapeDtypeStruct(tokens, working)
    number, factor = checks.check_scale(scale, like, "the labels' shape")
    if factor is not None:
        factor = jnp.broadcast_to(factor.astype(working), tokens)[..., None]
    of_classes = checks.check_class_weights(class_weights, (vocabulary,))
    if of_classes is not None:
        of_classes = of_classes.astype(working)
    examples = checks.check_examples(where, tokens)
    smoothing, of_smoothing = checks.coefficient("label_smoothing", label_smoothing, "[0, 1)")
    z_number, of_z = checks.coefficient("z_loss", z_loss, ">= 0")
    options = Options(
        softcap=checks.check_softcap(logit_softcap),
        spread=of_classes is None and (bool(smoothing) or of_smoothing is not None),
        entropy=entropy,
        label_smoothing=smoothing,
        z_loss=z_number,
    )
    budget = checks.check_memory_budget(
        memory_budget,
        least=_least_budget(labels.size, vocabulary, operands),
        default=max(_BUDGET_PER_WEIGHT * weights.size, _LEAST_BUDGET),
    )
    layer = Layer(
        RowCall(
            "cross_entropy", (-1,), number, operands, options, implementation=asked
        ),
        vocab_first,
        checks.check_precision(precision),
        budget,
    )
    loss = Loss(
        layer.rows,
        checks.check_reduction(reduction),
        checks.check_flag("return_lse", return_lse),
    )
    rows = Rows(examples, labels, of_classes, None, of_smoothing, of_z)
    return loss, layer, _Arrays(x, weights, bias, factor, rows)


def _operand(array: jax.Array) -> np.dtype:
    """What a product takes of `array`: of 8 bits and fewer bfloat16, which holds them.

    The gradient of logits, rounded to 8 bits, would be 0 where many tokens share it.
    """
    return np.dtype(jnp.bfloat16 if array.dtype.itemsize == 1 else array.dtype)


def _least_budget(tokens: int, vocabulary: int, operands: np.dtype) -> int:
    """Bytes of the logits of a token, or of the smallest chunk of all tokens' if more.

    Of the latter there is the gradient too. Where it is not known how many tokens there
    are, those of a token.
    """
    itemsize = xla.working_dtype(operands).itemsize
    of_token = vocabulary * itemsize
    if not is_known([tokens]):
        return of_token
    of_chunk = tokens * least_chunk(vocabulary) * (itemsize + operands.itemsize)
    return max(of_token, of_chunk)


def _logits(layer: Layer, arrays: _Arrays) -> jax.Array:
    """All at once, for shapes in which there are none or nothing is summed."""
    logits = linear(layer, arrays.x, arrays.weights, arrays.bias)
    return logits if arrays.scale is None else multiply(logits, arrays.scale, None)


def _is_empty(arrays: _Arrays) -> bool:
    return 0 in (*arrays.x.shape, *arrays.weights.shape)


# --- the public functions -------------------------------------------------------------


def linear_softmax_cross_entropy(
    x: ArrayLike,
    labels: ArrayLike,
    weights: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    vocab_axis: int = 1,
    where: ArrayLike | None = None,
    ignore_index: int | None = None,
    label_smoothing: ArrayLike = 0.0,
    z_loss: ArrayLike = 0.0,
    logit_softcap: ArrayLike | None = None,
    scale: ArrayLike | None = None,
    class_weights: ArrayLike | None = None,
    reduction: str = "none",
    return_lse: bool = False,
    precision: Any = None,
    memory_budget: int | None = None,
    implementation: str | Sequence[str] | None = None,
) -> Any:
    r"""Cross-entropy of ``x @ weights + bias``, without storing these logits.

    The same as::

        softmax_cross_entropy_with_integer_labels(x @ weights + bias, labels, ...)

    with float32 logits, whatever the dtype of `x` and `weights`, and the options of
    that function. The logits are computed in chunks of tokens or classes and forgotten;
    what the backward keeps, and what it takes, does not grow with tokens times classes:

    - ``reduction="none"``: keeps the arguments and a few numbers a token, and computes
      the logits a second time. With the two gradients these are four matrix products.
    - ``reduction="sum"`` or ``"mean"``: the forward computes the gradients too and the
      backward multiplies them by a scalar. Three products; unless `memory_budget` is
      too little for that, or the call has `return_lse`, an array as `scale`, both
      `class_weights` and `label_smoothing`, one of this and `z_loss` that is traced,
      operands in float16, or a number of tokens that is symbolic (`jax.export`).

    Where no gradient is taken, only the loss is computed; where that of `x` or of
    `weights` is not wanted, its product is left out. Every derivative mode works, in
    chunks too.

    Args:
      x: Floating, [..., H]: the hidden states of tokens.
      labels: Integers, [...]; as for `softmax_cross_entropy_with_integer_labels`.
      weights: Floating, [H, V]. The products are of the dtype that `x` and `weights`
        promote to, with sums in float32; those of 8 bits are taken as bfloat16.
      bias: Floating, [V], added in float32. A class whose bias is -inf has no part:
        so a padded vocabulary is masked.
      vocab_axis: 0 where `weights` are [V, H], as an embedding table is.
      where: Bool mask of tokens that broadcasts to `labels`; False tokens have the loss
        0 and are not counted.
      ignore_index: Tokens with this label have the loss 0 and the gradient 0, whatever
        `x` is there, and are not counted; -100 for example. Default: none.
      label_smoothing: As for `softmax_cross_entropy_with_integer_labels`.
      z_loss: Likewise.
      logit_softcap: Likewise.
      scale: Multiplies the logits first (an inverse temperature): a finite number, or a
        real array, traced or not, that broadcasts to `labels`, which is differentiable.
      class_weights: Real array, [V].
      reduction: ``"none"``, ``"sum"``, or ``"mean"`` over the tokens that are counted.
      return_lse: Return the pair (loss, lse), both differentiable.
      precision: Of the matrix products, as for `jax.numpy.matmul`.
      memory_budget: Bytes that logits and their gradient may take at a time, beyond the
        gradients of the arguments. Default: 8 bytes for each entry of `weights`, and
        256 MiB at least. Where it is below 4 bytes for each entry of `weights`, and
        all tokens' logits in their dtype take more too, the gradient of `weights` is
        not added up in float32 but written in parts, for a fourth product. With a
        symbolic number of tokens it bounds the forward alone: the backward takes about
        what `x` takes in float32.
      implementation: As for `softmax`: of the kernels that reduce a chunk's logits.

    Returns:
      The loss, float32, of the shape of `labels`, or a scalar. With `return_lse` also
      lse, of the shape of `labels`; 0 of a token that is not counted. The gradient of
      each argument has its dtype.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: shapes that do not match, a number out of its range, or a
        `memory_budget` that does not hold one row of logits.
      NotImplementedError: as `softmax`.

    References:
      Gradients in the forward pass: Hsu et al., Liger Kernel, arXiv:2410.10989.
      Chunks of the vocabulary: Wijmans et al., Cut Your Losses in Large-Vocabulary
      Language Models, arXiv:2411.09009.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxsoftmax import linear_softmax_cross_entropy
      >>> x = jnp.array([[1.0, 0.5], [0.0, -1.0]])
      >>> weights = jnp.array([[1.2, -0.8, -0.5], [0.3, 0.9, -0.1]])
      >>> loss = lambda w: linear_softmax_cross_entropy(
      ...     x, jnp.array([0, 1]), w, reduction="mean"
      ... )
      >>> value, gradient = jax.value_and_grad(loss)(weights)
      >>> with jnp.printoptions(precision=4, suppress=True):
      ...     print(value)
      ...     print(gradient)
      0.9994688
      [[-0.1247  0.0686  0.0561]
       [-0.2268  0.444  -0.2172]]
    """
    loss, layer, arrays = _prepare(
        x,
        labels,
        weights,
        bias=bias,
        vocab_axis=vocab_axis,
        where=where,
        ignore_index=ignore_index,
        logit_softcap=logit_softcap,
        scale=scale,
        precision=precision,
        memory_budget=memory_budget,
        implementation=implementation,
        class_weights=class_weights,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        reduction=reduction,
        return_lse=return_lse,
    )
    if _is_empty(arrays):
        return _cross_entropy.softmax_cross_entropy_with_integer_labels(
            _logits(layer, arrays),
            labels,
            where=where,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            logit_softcap=logit_softcap,
            class_weights=class_weights,
            reduction=reduction,
            return_lse=return_lse,
            implementation=implementation,
        )
    found = _call(_run, (loss, layer), arrays)
    return tuple(found) if return_lse else found[0]


def linear_token_logprobs_and_entropy(
    x: ArrayLike,
    labels: ArrayLike,
    weights: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    vocab_axis: int = 1,
    where: ArrayLike | None = None,
    ignore_index: int | None = None,
    logit_softcap: ArrayLike | None = None,
    scale: ArrayLike | None = None,
    precision: Any = None,
    memory_budget: int | None = None,
    implementation: str | Sequence[str] | None = None,
) -> TokenStatistics:
    r"""Log-probabilities of labels and entropy, without storing the logits.

    The same as::

        token_logprobs_and_entropy(x @ weights + bias, labels, ...)

    computed as `linear_softmax_cross_entropy` does with ``reduction="none"``.

    Args:
      x: Floating, [..., H].
      labels: Integers, [...]; as for `token_logprobs_and_entropy`.
      weights: Floating, [H, V].
      bias: Floating, [V].
      vocab_axis: 0 where `weights` are [V, H].
      where: Bool mask of tokens that broadcasts to `labels`. Tokens that are masked
        are left out: all three are 0, with gradient 0.
      ignore_index: As for `token_logprobs_and_entropy`.
      logit_softcap: Likewise.
      scale: As for `linear_softmax_cross_entropy`, as are all that follow; the inverse
        temperature.
      precision: Of the matrix products.
      memory_budget: Bytes that logits and their gradient may take at a time.
      implementation: As for `softmax`.

    Returns:
      A `TokenStatistics`, float32, each of the shape of `labels`; all differentiable.

    Raises:
      TypeError, ValueError, NotImplementedError: as for `linear_softmax_cross_entropy`.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoftmax import linear_token_logprobs_and_entropy
      >>> x = jnp.array([[1.0, 0.5], [0.0, -1.0]])
      >>> weights = jnp.array([[1.2, -0.8, -0.5], [0.3, 0.9, -0.1]])
      >>> found = linear_token_logprobs_and_entropy(x, jnp.array([0, 1]), weights)
      >>> with jnp.printoptions(precision=4):
      ...     print(found.logprobs)
      ...     print(found.entropy)
      [-0.2869 -1.7121]
      [0.7333 1.0241]
    """
    _, layer, arrays = _prepare(
        x,
        labels,
        weights,
        bias=bias,
        vocab_axis=vocab_axis,
        where=where,
        ignore_index=ignore_index,
        logit_softcap=logit_softcap,
        scale=scale,
        precision=precision,
        memory_budget=memory_budget,
        implementation=implementation,
        entropy=True,
    )
    if _is_empty(arrays):
        return _cross_entropy.token_logprobs_and_entropy(
            _logits(layer, arrays),
            labels,
            where=where,
            ignore_index=ignore_index,
            logit_softcap=logit_softcap,
            implementation=implementation,
        )
    return TokenStatistics(*_call(_run_token_statistics, (layer,), arrays))
