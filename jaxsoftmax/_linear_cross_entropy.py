"""Cross-entropy behind a linear layer: the public functions.

Chunks and derivatives are in `_linear.rules`, `jax.vmap` and meshes in
`_linear.linear_call`.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxsoftmax._core import checks
from jaxsoftmax._cross_entropy import LossOptions, LossResult
from jaxsoftmax._linear import linear_call
from jaxsoftmax._linear.layer import Layer, linear
from jaxsoftmax._linear.plan import default_budget, least_budget
from jaxsoftmax._rows import cross_entropy, loss_terms, xla
from jaxsoftmax._rows.loss_terms import Arguments, LossAux, TokenStatistics

# --- what the public functions have in common -----------------------------------------


def _evaluate(
    x: ArrayLike,
    labels: ArrayLike,
    weights: ArrayLike,
    bias: ArrayLike | None,
    vocab_axis: int,
    precision: jax.lax.PrecisionLike,
    memory_budget: int | None,
    given: Arguments,
) -> Any:
    """The result of a public function, given its arguments, which are checked here."""
    x, weights, vocab_first = checks.check_layer(x, weights, vocab_axis)
    vocabulary = weights.shape[0 if vocab_first else 1]
    bias = checks.per_class("bias", bias, vocabulary, "weights", checks.floating)
    operands = jnp.promote_types(_operand(x), _operand(weights))
    working = xla.working_dtype(operands)
    logits_shape = (*x.shape[:-1], vocabulary)
    labels = given_labels = checks.as_array(labels, "labels")
    own_weights = None
    dense = loss_terms.weigh_classes(labels, x.ndim, given)
    if dense or given.label_weights is not None:
        loss_terms.check_for_weights(given)
    if dense:
        like = jax.ShapeDtypeStruct(logits_shape, working)
        labels, logits_shape = checks.check_dense_labels(labels, like, (-1,))
    else:
        several = given.has_several(labels, x.ndim - 1)
        of = f"x of shape {x.shape}"
        labels, logits_shape = checks.check_labels(
            labels, logits_shape, (-1,), of, several=several
        )
        labels = loss_terms.indices(labels, given.ignore_index, (vocabulary,), (-1,))
        own_weights = checks.check_label_weights(given.label_weights, labels, (-1,))
    tokens = logits_shape[:-1]
    x = checks.broadcast(x, (*tokens, x.shape[-1]))
    like = jax.ShapeDtypeStruct(tokens, working)
    number, scale = checks.check_scale(given.scale, like, "the labels' shape")
    if scale is not None:
        scale = jnp.broadcast_to(scale.astype(working), tokens)[..., None]
    class_weights = checks.per_class(
        "class_weights", given.class_weights, vocabulary, "the logits"
    )
    if class_weights is not None:
        class_weights = class_weights.astype(working)
    examples = checks.check_examples(given.where, tokens)
    sample_weights = checks.check_sample_weights(
        given.sample_weights, logits_shape, (-1,)
    )
    if sample_weights is not None:
        sample_weights = sample_weights.astype(working)
    loss, *coefficients = loss_terms.check_loss(given, (-1,), number, operands)
    budget = checks.check_memory_budget(
        memory_budget,
        least=least_budget(math.prod(tokens), vocabulary, operands, working),
        default=default_budget(weights.size, given.reduction),
    )
    layer = Layer(loss.call, vocab_first, checks.check_precision(precision), budget)
    if 0 in (*x.shape, *weights.shape):
        # There are no logits, or nothing is summed: no chunks are made of them.
        logits = linear(layer, x, weights, bias, scale)
        given = given._replace(scale=number, where=examples)
        return cross_entropy.evaluate(logits, given_labels, -1, given, dense)
    found = linear_call.call(
        loss,
        layer,
        tokens=(x, scale, examples, labels, sample_weights, own_weights),
        shared=(weights, bias, class_weights, *coefficients),
    )
    if given.entropy:
        return TokenStatistics(*found)
    value, *others = found
    results = (value, others.pop(0)) if loss.return_lse else (value,)
    if loss.return_aux:
        results = (*results, LossAux(*others))
    return results if len(results) > 1 else value


def _operand(array: jax.Array) -> np.dtype:
    """The dtype of `array` in a product: bfloat16 for dtypes of 8 bits and fewer.

    The gradient of logits, rounded to 8 bits, would be 0 where many tokens share it.
    """
    return np.dtype(jnp.bfloat16 if array.dtype.itemsize == 1 else array.dtype)


# --- the public functions -------------------------------------------------------------


class _LinearOptions(LossOptions, total=False):
    bias: ArrayLike | None
    vocab_axis: int
    where: ArrayLike | None
    ignore_index: int | None
    label_weights: ArrayLike | None
    precision: jax.lax.PrecisionLike
    memory_budget: int | None


@overload
def linear_softmax_cross_entropy(
    x: ArrayLike,
    labels: ArrayLike,
    weights: ArrayLike,
    *,
    return_lse: Literal[False] = False,
    return_aux: Literal[False] = False,
    **options: Unpack[_LinearOptions],
) -> jax.Array: ...


@overload
def linear_softmax_cross_entropy(
    x: ArrayLike,
    labels: ArrayLike,
    weights: ArrayLike,
    *,
    return_lse: Literal[True],
    return_aux: Literal[False] = False,
    **options: Unpack[_LinearOptions],
) -> tuple[jax.Array, jax.Array]: ...


@overload
def linear_softmax_cross_entropy(
    x: ArrayLike,
    labels: ArrayLike,
    weights: ArrayLike,
    *,
    return_lse: Literal[False] = False,
    return_aux: Literal[True],
    **options: Unpack[_LinearOptions],
) -> tuple[jax.Array, LossAux]: ...


@overload
def linear_softmax_cross_entropy(
    x: ArrayLike,
    labels: ArrayLike,
    weights: ArrayLike,
    *,
    return_lse: Literal[True],
    return_aux: Literal[True],
    **options: Unpack[_LinearOptions],
) -> tuple[jax.Array, jax.Array, LossAux]: ...


@overload
def linear_softmax_cross_entropy(
    x: ArrayLike,
    labels: ArrayLike,
    weights: ArrayLike,
    *,
    return_lse: bool,
    return_aux: Literal[False] = False,
    **options: Unpack[_LinearOptions],
) -> jax.Array | tuple[jax.Array, jax.Array]: ...


@overload
def linear_softmax_cross_entropy(
    x: ArrayLike,
    labels: ArrayLike,
    weights: ArrayLike,
    *,
    return_lse: bool = False,
    return_aux: bool = False,
    **options: Unpack[_LinearOptions],
) -> LossResult: ...


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
    sample_weights: ArrayLike | None = None,
    label_weights: ArrayLike | None = None,
    reduction: str = "none",
    return_lse: bool = False,
    return_aux: bool = False,
    precision: jax.lax.PrecisionLike = None,
    memory_budget: int | None = None,
    implementation: str | Sequence[str] | None = None,
) -> LossResult:
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
      `label_weights`, a weight for each class as `labels`, operands in float16, or a
      number of tokens that is symbolic (`jax.export`).

    Where no gradient is taken, only the loss is computed; where that of `x` or of
    `weights` is not wanted, its product is left out. Every derivative mode works, in
    chunks too.

    Args:
      x: Floating, [..., H]: the hidden states of tokens.
      labels: Integers, [...]; as for `softmax_cross_entropy_with_integer_labels`. Or
        floating, [..., V]: a weight for each class, as `softmax_cross_entropy` takes
        them. They are read in chunks too, and their gradient, where it is wanted, is
        of their shape.
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
      sample_weights: As for `softmax_cross_entropy_with_integer_labels`: of tokens.
      label_weights: As there: `labels` are then integers, [..., K].
      reduction: ``"none"``, ``"sum"``, ``"mean"`` or ``"weighted_mean"``, as there.
      return_lse: Return the pair (loss, lse), both differentiable.
      return_aux: Return a `LossAux` last, from the same pass, as there.
      precision: Of the matrix products, as for `jax.numpy.matmul`.
      memory_budget: Bytes that logits and their gradient may take at a time, beyond the
        gradients of the arguments. Default: 8 bytes for each entry of `weights`, and
        256 MiB at least, with a reduction 640; on a GPU, with a reduction, 10 bytes and
        2 GiB. Where it is below 4 bytes for each entry of `weights`, and all tokens'
        logits in their dtype take more too, the gradient of `weights` is not added up
        in float32 but written in parts, for a fourth product. With a
        symbolic number of tokens it bounds the forward alone: the backward takes about
        what `x` takes in float32.
      implementation: As for `softmax`: of the kernels that reduce a chunk's logits.

    Returns:
      The loss, float32, of the shape of `labels`, or a scalar. With `return_lse` also
      lse, of the shape of `labels`; 0 of a token that is not counted. With `return_aux`
      also a `LossAux`. The gradient of each argument has its dtype.

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
    return _evaluate(
        x,
        labels,
        weights,
        bias,
        vocab_axis,
        precision,
        memory_budget,
        Arguments(
            where,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            logits_soft_cap=logits_soft_cap,
            scale=scale,
            class_weights=class_weights,
            sample_weights=sample_weights,
            label_weights=label_weights,
            reduction=reduction,
            return_lse=return_lse,
            return_aux=return_aux,
            implementation=implementation,
        ),
    )


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
      labels: Integers, [...], or several for each token, [..., K]; as for
        `token_logprobs_and_entropy`.
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
      A `TokenStatistics`, float32, as there; all differentiable.

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
    return _evaluate(
        x,
        labels,
        weights,
        bias,
        vocab_axis,
        precision,
        memory_budget,
        Arguments(
            where,
            ignore_index=ignore_index,
            logits_soft_cap=logits_soft_cap,
            scale=scale,
            implementation=implementation,
            entropy=True,
        ),
    )
