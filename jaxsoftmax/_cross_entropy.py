"""Cross-entropy on logits: the public functions."""

from collections.abc import Sequence
from typing import Literal, TypedDict, Unpack, overload

import jax
from jax.typing import ArrayLike

from jaxsoftmax._core.checks import Axis
from jaxsoftmax._rows.cross_entropy import evaluate
from jaxsoftmax._rows.loss_terms import Arguments, LossAux, TokenStatistics

# With `return_lse` and `return_aux` lse and what is logged come after the loss.
LossResult = (
    jax.Array
    | tuple[jax.Array, jax.Array]
    | tuple[jax.Array, LossAux]
    | tuple[jax.Array, jax.Array, LossAux]
)


class LossOptions(TypedDict, total=False):
    """The options of every loss but those that decide the result's type."""

    label_smoothing: ArrayLike
    z_loss: ArrayLike
    logits_soft_cap: ArrayLike | None
    scale: ArrayLike | None
    class_weights: ArrayLike | None
    sample_weights: ArrayLike | None
    reduction: str
    implementation: str | Sequence[str] | None


class _IntegerOptions(LossOptions, total=False):
    ignore_index: int | None
    label_weights: ArrayLike | None
    overwrite_logits: bool


@overload
def softmax_cross_entropy_with_integer_labels(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    *,
    return_lse: Literal[False] = False,
    return_aux: Literal[False] = False,
    **options: Unpack[_IntegerOptions],
) -> jax.Array: ...


@overload
def softmax_cross_entropy_with_integer_labels(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    *,
    return_lse: Literal[True],
    return_aux: Literal[False] = False,
    **options: Unpack[_IntegerOptions],
) -> tuple[jax.Array, jax.Array]: ...


@overload
def softmax_cross_entropy_with_integer_labels(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    *,
    return_lse: Literal[False] = False,
    return_aux: Literal[True],
    **options: Unpack[_IntegerOptions],
) -> tuple[jax.Array, LossAux]: ...


@overload
def softmax_cross_entropy_with_integer_labels(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    *,
    return_lse: Literal[True],
    return_aux: Literal[True],
    **options: Unpack[_IntegerOptions],
) -> tuple[jax.Array, jax.Array, LossAux]: ...


@overload
def softmax_cross_entropy_with_integer_labels(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    *,
    return_lse: bool,
    return_aux: Literal[False] = False,
    **options: Unpack[_IntegerOptions],
) -> jax.Array | tuple[jax.Array, jax.Array]: ...


@overload
def softmax_cross_entropy_with_integer_labels(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    *,
    return_lse: bool = False,
    return_aux: bool = False,
    **options: Unpack[_IntegerOptions],
) -> LossResult: ...


def softmax_cross_entropy_with_integer_labels(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    *,
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
    overwrite_logits: bool = False,
    implementation: str | Sequence[str] | None = None,
) -> LossResult:
    r"""Cross-entropy of softmax with labels that are class indices.

    With the leading parameters, shapes and results of optax's function of this name::

        loss = -log P[label] = lse - z[label],   lse = log(sum(exp(z)))
        z = scale logits,  or  c tanh(scale logits / c)  with c = logits_soft_cap

    and with everything that is usually added to it, s being `label_smoothing`, w the
    class weights and n the number of classes that have a part::

        (1 - s) w[label] (-log P[label]) + s / n sum(w (-log P)) + z_loss lse^2

    The gradient of a row is ``P - onehot(label)``, computed without the cancellation
    at a label that dominates. Arithmetic is float32 inside, and so is the loss
    whatever the dtype of the logits (float64 for float64).

    What the backward keeps is the logits as they came, and a few numbers per row. With
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
      logits_soft_cap: A number above 0: bounds the logits, after `scale`, by tanh. Part
        of the program, not traced.
      scale: Multiplies the logits first (an inverse temperature): a finite number, or
        a real array, traced or not, that broadcasts to them, which is differentiable.
      class_weights: Real array with an entry for each class.
      sample_weights: Real array that broadcasts to the losses, which it multiplies;
        differentiable, also where it is 0. An example of weight 0 has the gradient 0,
        whatever its logits. Of any sign, and used as they are.
      label_weights: Real array that broadcasts to the labels, which are then [..., K]:
        several for each example, whose loss is the sum of their costs times these
        weights; differentiable. So from the K largest probabilities of another model.
        A label may occur more than once; one that is `ignore_index` costs nothing, and
        an example all of whose labels are that is not counted. The gradient takes a
        second pass over the logits whatever the `reduction`.
      reduction: ``"none"`` for the loss of each example, ``"sum"``, or ``"mean"`` over
        the examples that are counted: the sum over theirs of `sample_weights`, or over
        their number, whatever the class weights (0 if there are none). Or
        ``"weighted_mean"``, over the sum of `sample_weights` times the class weights of
        the labels: PyTorch's mean.
      return_lse: Return the pair (loss, lse), both differentiable.
      return_aux: Return a `LossAux` last, for logging: sums, the accuracy and lse,
        without derivatives, from the same pass.
      overwrite_logits: Compute the gradient in the memory of the logits, where a kernel
        computes both in one pass (`reduction` ``"sum"`` or ``"mean"``, on a GPU). Right
        in any case: where the logits are used elsewhere, XLA copies them first, which
        costs time; so ask for it only where they are not. With ``"none"``, and
        where XLA computes the gradient, it changes nothing: XLA decides.
      implementation: As for `softmax`.

    Returns:
      The loss, float32, of the shape of `labels`, or a scalar. With `return_lse` also
      lse, of the shape of `labels`; 0 of an example that is not counted. With
      `return_aux` also a `LossAux`.

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
    return evaluate(
        logits,
        labels,
        axis,
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
            overwrite_logits=overwrite_logits,
            implementation=implementation,
        ),
    )


@overload
def softmax_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    *,
    return_lse: Literal[False] = False,
    return_aux: Literal[False] = False,
    **options: Unpack[LossOptions],
) -> jax.Array: ...


@overload
def softmax_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    *,
    return_lse: Literal[True],
    return_aux: Literal[False] = False,
    **options: Unpack[LossOptions],
) -> tuple[jax.Array, jax.Array]: ...


@overload
def softmax_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    *,
    return_lse: Literal[False] = False,
    return_aux: Literal[True],
    **options: Unpack[LossOptions],
) -> tuple[jax.Array, LossAux]: ...


@overload
def softmax_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    *,
    return_lse: Literal[True],
    return_aux: Literal[True],
    **options: Unpack[LossOptions],
) -> tuple[jax.Array, jax.Array, LossAux]: ...


@overload
def softmax_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    *,
    return_lse: bool,
    return_aux: Literal[False] = False,
    **options: Unpack[LossOptions],
) -> jax.Array | tuple[jax.Array, jax.Array]: ...


@overload
def softmax_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    *,
    return_lse: bool = False,
    return_aux: bool = False,
    **options: Unpack[LossOptions],
) -> LossResult: ...


def softmax_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    *,
    label_smoothing: ArrayLike = 0.0,
    z_loss: ArrayLike = 0.0,
    logits_soft_cap: ArrayLike | None = None,
    scale: ArrayLike | None = None,
    class_weights: ArrayLike | None = None,
    sample_weights: ArrayLike | None = None,
    reduction: str = "none",
    return_lse: bool = False,
    return_aux: bool = False,
    implementation: str | Sequence[str] | None = None,
) -> LossResult:
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
      logits_soft_cap: A number above 0, or None.
      scale: A number or an array that multiplies the logits first.
      class_weights: Real array with an entry for each class.
      sample_weights: Real array that broadcasts to the losses.
      reduction: ``"none"``, ``"sum"`` or ``"mean"``.
      return_lse: Return the pair (loss, lse).
      return_aux: Return a `LossAux` last, without `correct`.
      implementation: As for `softmax`.

    Returns:
      The loss, float32, of the shape of `logits` without `axis`, or a scalar. With
      `return_lse` also lse, of that shape; 0 of an example that is masked. With
      `return_aux` also a `LossAux`.

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
    return evaluate(
        logits,
        labels,
        axis,
        Arguments(
            where,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            logits_soft_cap=logits_soft_cap,
            scale=scale,
            class_weights=class_weights,
            sample_weights=sample_weights,
            reduction=reduction,
            return_lse=return_lse,
            return_aux=return_aux,
            implementation=implementation,
        ),
        dense=True,
    )


def token_logprobs_and_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    *,
    ignore_index: int | None = None,
    logits_soft_cap: ArrayLike | None = None,
    scale: ArrayLike | None = None,
    implementation: str | Sequence[str] | None = None,
) -> TokenStatistics:
    r"""Log-probability of each label, entropy and log-sum-exp, from one pass.

    What policy-gradient fine-tuning of a language model needs of its logits: the
    log-probabilities of the tokens that were sampled, at the temperature ``1 / scale``,
    and the entropy of what they were sampled from. All three are differentiable in
    every mode; the backward keeps the logits as they came, and a few numbers per row::

        d logprob = onehot(label) - P
        d entropy = -P (log P + entropy)
        d lse = P

    Args:
      logits: Of any shape; a floating dtype. An entry of -inf has no part in its row.
      labels: Integers, of the shape of `logits` without `axis`; or with one dimension
        more, the last: several for each example, in any order, as those of alternative
        tokens. A label that is no class, other than `ignore_index`, has the
        log-probability NaN.
      axis: As for `softmax_cross_entropy_with_integer_labels`.
      where: Bool mask of examples, as there. Masked examples are left out: all three
        are 0, with gradient 0.
      ignore_index: Examples with this label are left out, whatever their logits. Of
        several labels, those that are this have the log-probability 0 and no gradient,
        and an example is left out all of whose labels are.
      logits_soft_cap: As for `softmax_cross_entropy_with_integer_labels`.
      scale: The inverse temperature, as there.
      implementation: As for `softmax`.

    Returns:
      A `TokenStatistics`, float32 (float64 for float64); `logprobs` of the shape of the
      labels, `entropy` and `lse` of that of `logits` without `axis`. An example whose
      classes are all masked or -inf has the log-probability and the entropy 0, and lse
      -inf.

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
      >>> alternatives = jnp.array([[0, 2, 1], [1, 0, 2]])
      >>> with jnp.printoptions(precision=4):
      ...     print(token_logprobs_and_entropy(logits, alternatives).logprobs)
      [[-0.2761 -1.9761 -2.2761]
       [-2.9518 -0.8518 -0.6518]]
    """
    return evaluate(
        logits,
        labels,
        axis,
        Arguments(
            where,
            ignore_index=ignore_index,
            logits_soft_cap=logits_soft_cap,
            scale=scale,
            entropy=True,
            implementation=implementation,
        ),
    )
