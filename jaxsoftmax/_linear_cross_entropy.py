"""Cross-entropy behind a linear layer: the public functions.

Chunks and derivatives are in `_linear.rules`, `jax.vmap` and meshes in
`_linear.linear_call`.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxsoftmax import _cross_entropy
from jaxsoftmax._core import checks, dispatch
from jaxsoftmax._linear import linear_call
from jaxsoftmax._linear.layer import Layer, linear
from jaxsoftmax._linear.plan import default_budget, least_budget
from jaxsoftmax._linear.rules import statistics, weighted_sum
from jaxsoftmax._rows import loss_terms, row_loss, xla
from jaxsoftmax._rows.call import ROWS, RowCall
from jaxsoftmax._rows.loss_terms import Loss, Rows, TokenStatistics
from jaxsoftmax._rows.row_loss import Options, Statistics
from jaxsoftmax._rows.scaling import multiply

# --- what the public functions have in common -----------------------------------------


class _Arrays(NamedTuple):
    """The arrays of a call.

    Attributes:
      x: [*tokens, H].
      weights: [H, V] or [V, H].
      bias: [V], or None.
      scale: [*tokens, 1], or None.
      rows: What each token has besides x; the class weights are [V].
    """

    x: jax.Array
    weights: jax.Array
    bias: jax.Array | None
    scale: jax.Array | None
    rows: Rows


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _run(loss: Loss, layer: Layer, vmapped_dims: int, arrays: _Arrays) -> Any:
    """The loss; not summed over the first `vmapped_dims` dimensions of tokens."""
    if vmapped_dims and loss.reduction != "none":
        return _reduce_each(loss, layer, vmapped_dims, arrays)
    x, weights, bias, scale, rows = arrays
    if (
        loss_terms.in_one_pass(loss, rows, layer.operands)
        and scale is None
        and layer.plan(x, weights).gradients_fit
    ):
        row_weights = loss_terms.reduce_weights(loss, rows, layer.working)
        return weighted_sum(layer, x, weights, bias, rows.labels, *row_weights)
    smoothing = _smoothing_weights(loss, bias, rows)
    numbers, *weighted = statistics(
        layer, x, weights, bias, scale, smoothing, rows.labels
    )

    def weighted_uniform_nll(_: Statistics) -> jax.Array:
        (found,) = weighted
        nll = row_loss.only(rows.counted, found.nll)
        return nll / jnp.maximum(found.entries, 1)

    return loss_terms.from_statistics(loss, rows, numbers, weighted_uniform_nll)


def _smoothing_weights(
    loss: Loss, bias: jax.Array | None, rows: Rows
) -> jax.Array | None:
    """The class weights if labels are smoothed by them; 0 where a class has no part."""
    weights = rows.class_weights
    if weights is None or not loss_terms.smooths(loss, rows):
        return None
    return weights if bias is None else jnp.where(bias == -jnp.inf, 0, weights)


def _reduce_each(loss: Loss, layer: Layer, vmapped_dims: int, arrays: _Arrays) -> Any:
    """Per-token losses, reduced here.

    Under vmap the cotangent of each entry is unknown in the forward.
    """
    per_token = dataclasses.replace(loss, reduction="none")
    found = _run(per_token, layer, vmapped_dims, arrays)
    each, lse = found if loss.return_lse else (found, None)
    value = jnp.sum(each, axis=tuple(range(vmapped_dims, each.ndim)))
    if loss.reduction == "mean":
        valid = arrays.rows.counted
        assert valid is not None
        count = jnp.sum(valid, axis=tuple(range(vmapped_dims, valid.ndim)))
        value = value / jnp.maximum(count.astype(value.dtype), 1)
    return (value, lse) if loss.return_lse else value


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run_token_statistics(
    layer: Layer, vmapped_dims: int, arrays: _Arrays
) -> TokenStatistics:
    x, weights, bias, scale, rows = arrays
    (numbers,) = statistics(layer, x, weights, bias, scale, None, rows.labels)
    return loss_terms.token_statistics(layer.rows, rows, numbers)


def _call(run: Any, config: tuple[Any, ...], arrays: _Arrays) -> list[jax.Array]:
    """The leaves of ``run(*config, 0, arrays)``, as one operation."""
    x, weights, bias, scale, rows = arrays
    tokens = (x, scale, rows.examples, rows.labels)
    layer = (weights, bias, rows.class_weights, rows.label_smoothing, rows.z_loss)
    return linear_call.call(_run_call, (run, config), tokens, layer)


def _run_call(static: Any, vmapped_dims: int, tokens: Any, layer: Any) -> Any:
    run, config = static
    x, scale, examples, labels = tokens
    weights, bias, class_weights, *coefficients = layer
    if examples is not None:
        labels = jnp.where(examples, labels, row_loss.IGNORED)
    label_weights = None
    if class_weights is not None:
        label_weights = loss_terms.weights_of_labels(class_weights, labels)
    rows = Rows(None, labels, class_weights, label_weights, *coefficients)
    return run(*config, vmapped_dims, _Arrays(x, weights, bias, scale, rows))


def _prepare(
    x: ArrayLike,
    labels: ArrayLike,
    weights: ArrayLike,
    *,
    bias: ArrayLike | None,
    vocab_axis: int,
    where: ArrayLike | None,
    ignore_index: int | None,
    logits_soft_cap: ArrayLike | None,
    scale: ArrayLike | None,
    precision: jax.lax.PrecisionLike,
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
    class_weights = checks.check_class_weights(class_weights, (vocabulary,))
    if class_weights is not None:
        class_weights = class_weights.astype(working)
    examples = checks.check_examples(where, tokens)
    smoothing, traced_smoothing = checks.coefficient(
        "label_smoothing", label_smoothing, "[0, 1)"
    )
    z_number, traced_z = checks.coefficient("z_loss", z_loss, ">= 0")
    options = Options(
        softcap=checks.check_softcap(logits_soft_cap),
        uniform_nll=class_weights is None
        and (bool(smoothing) or traced_smoothing is not None),
        entropy=entropy,
        label_smoothing=smoothing,
        z_loss=z_number,
    )
    budget = checks.check_memory_budget(
        memory_budget,
        least=least_budget(labels.size, vocabulary, operands, working),
        default=default_budget(weights.size),
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
    rows = Rows(examples, labels, class_weights, None, traced_smoothing, traced_z)
    return loss, layer, _Arrays(x, weights, bias, factor, rows)


def _operand(array: jax.Array) -> np.dtype:
    """The dtype of `array` in a product: bfloat16 for dtypes of 8 bits and fewer.

    The gradient of logits, rounded to 8 bits, would be 0 where many tokens share it.
    """
    return np.dtype(jnp.bfloat16 if array.dtype.itemsize == 1 else array.dtype)


def _logits(layer: Layer, arrays: _Arrays) -> jax.Array:
    """All at once, for shapes in which there are none or nothing is summed."""
    logits = linear(layer, arrays.x, arrays.weights, arrays.bias)
    return logits if arrays.scale is None else multiply(logits, arrays.scale, None)


def _is_empty(arrays: _Arrays) -> bool:
    return 0 in (*arrays.x.shape, *arrays.weights.shape)


# --- the public functions -------------------------------------------------------------


class _LinearOptions(_cross_entropy.LossOptions, total=False):
    bias: ArrayLike | None
    vocab_axis: int
    where: ArrayLike | None
    ignore_index: int | None
    precision: jax.lax.PrecisionLike
    memory_budget: int | None


@overload
def linear_softmax_cross_entropy(
    x: ArrayLike,
    labels: ArrayLike,
    weights: ArrayLike,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[_LinearOptions],
) -> jax.Array: ...


@overload
def linear_softmax_cross_entropy(
    x: ArrayLike,
    labels: ArrayLike,
    weights: ArrayLike,
    *,
    return_lse: Literal[True],
    **options: Unpack[_LinearOptions],
) -> tuple[jax.Array, jax.Array]: ...


@overload
def linear_softmax_cross_entropy(
    x: ArrayLike,
    labels: ArrayLike,
    weights: ArrayLike,
    *,
    return_lse: bool,
    **options: Unpack[_LinearOptions],
) -> jax.Array | tuple[jax.Array, jax.Array]: ...


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
    logits_soft_cap: ArrayLike | None = None,
    scale: ArrayLike | None = None,
    class_weights: ArrayLike | None = None,
    reduction: str = "none",
    return_lse: bool = False,
    precision: jax.lax.PrecisionLike = None,
    memory_budget: int | None = None,
    implementation: str | Sequence[str] | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    r"""Cross-entropy of ``x @ weights + bias``, without storing these logits.

    The same as::

        softmax_cross_entropy_with_integer_labels(x @ weights + bias, labels, ...)

    with float32 logits, whatever the dtype of `x` and `weights`, and the options of
    that function. The logits are computed in chunks of tokens or classes and forgotten;
    what the backward keeps, and the memory it takes, do not grow as tokens x classes:

    - ``reduction="none"``: keeps the arguments and a few numbers per token, and
      computes the logits a second time: with the two gradients, four matrix products.
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
      z_loss: As there.
      logits_soft_cap: As there.
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
        logits_soft_cap=logits_soft_cap,
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
            logits_soft_cap=logits_soft_cap,
            class_weights=class_weights,
            reduction=reduction,
            return_lse=return_lse,
            implementation=implementation,
        )
    found = _call(_run, (loss, layer), arrays)
    return (found[0], found[1]) if return_lse else found[0]


def linear_token_logprobs_and_entropy(
    x: ArrayLike,
    labels: ArrayLike,
    weights: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    vocab_axis: int = 1,
    where: ArrayLike | None = None,
    ignore_index: int | None = None,
    logits_soft_cap: ArrayLike | None = None,
    scale: ArrayLike | None = None,
    precision: jax.lax.PrecisionLike = None,
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
      logits_soft_cap: As there.
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
        logits_soft_cap=logits_soft_cap,
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
            logits_soft_cap=logits_soft_cap,
            implementation=implementation,
        )
    return TokenStatistics(*_call(_run_token_statistics, (layer,), arrays))
