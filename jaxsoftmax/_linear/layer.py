"""A linear layer before a loss: its products, and what is reduced of its logits.

Tokens and the vocabulary may each have several dimensions here, as chunks have.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxsoftmax._linear.plan import LinearPlan
from jaxsoftmax._rows import xla
from jaxsoftmax._rows.call import RowCall
from jaxsoftmax._rows.row_loss import Options
from jaxsoftmax._rows.scaling import multiply

# The places of the arguments that may have a gradient, and of labels, which have one
# where they are weights.
X, WEIGHTS, BIAS = range(3)
LABELS = 5


@dataclasses.dataclass(frozen=True)
class Layer:
    """The static part of a call.

    Attributes:
      rows: The call that reduces rows; its dtype is that of the products' operands.
      vocab_first: Whether weights are [V, H], not [H, V].
      precision: The precision of the products.
      budget: Bytes that logits and their gradient may take.
      wanted: Places of the arguments that have a gradient; those of x, weights, bias
        and labels count.
    """

    rows: RowCall
    vocab_first: bool
    precision: jax.lax.PrecisionLike
    budget: int
    wanted: tuple[int, ...] = (X, WEIGHTS, BIAS)

    @property
    def operands(self) -> np.dtype:
        """The dtype of the products' operands, and of the logits' gradient."""
        return self.rows.dtype

    @property
    def working(self) -> np.dtype:
        """The dtype of logits and of sums."""
        return xla.working_dtype(self.operands)

    @property
    def hidden_axis(self) -> int:
        """The axis of the features in weights, whose vocabulary may be folded."""
        return -1 if self.vocab_first else 0

    @property
    def vocab_axis(self) -> int:
        """The first axis of the vocabulary in weights."""
        return 0 if self.vocab_first else 1

    def with_operands(self, dtype: np.dtype) -> "Layer":
        """The same layer with products of operands in `dtype`."""
        return dataclasses.replace(
            self, rows=dataclasses.replace(self.rows, dtype=dtype)
        )

    def plan(self, x: jax.Array, weights: jax.Array) -> LinearPlan:
        """The chunks for ``x W``."""
        return LinearPlan(
            x.shape[:-1],
            weights.shape[self.hidden_axis],
            weights.shape[self.vocab_axis],
            self.operands,
            self.working,
            self.budget,
            WEIGHTS in self.wanted,
        )

    def with_chunks(self, chunks: str) -> "Layer":
        """The same layer; `explain` says `chunks` of its calls."""
        return dataclasses.replace(
            self, rows=dataclasses.replace(self.rows, chunks=chunks)
        )

    def row_call(self, classes: int) -> RowCall:
        """The call for logits whose last `classes` dimensions are the vocabulary."""
        return dataclasses.replace(self.rows, axis=tuple(range(-classes, 0)))


# --- products -------------------------------------------------------------------------


def _product(
    layer: Layer,
    a: jax.Array,
    b: jax.Array,
    over: tuple[Sequence[int], Sequence[int]],
    dtype: Any,
) -> jax.Array:
    """The product of `a` and `b`, summed over pairs of dimensions, in float32."""
    operands = (a.astype(layer.operands), b.astype(layer.operands))
    dims = (tuple(over[0]), tuple(over[1]))
    narrow = np.dtype(dtype).itemsize == 1  # which no product need be able to write
    y = lax.dot_general(
        *operands,
        (dims, ((), ())),
        precision=layer.precision,
        preferred_element_type=layer.working if narrow else dtype,
    )
    return y.astype(dtype)


def linear(
    layer: Layer,
    x: jax.Array,
    weights: jax.Array,
    bias: jax.Array | None,
    scale: jax.Array | None = None,
) -> jax.Array:
    """``scale (x W + b)`` in float32: [*tokens, *classes]."""
    hidden = range(weights.ndim)[layer.hidden_axis]
    y = _product(layer, x, weights, ([x.ndim - 1], [hidden]), layer.working)
    if bias is not None:
        wide = per_class(bias.astype(layer.working), y.ndim - bias.ndim)
        # A class whose bias is -inf has no part, whatever its weights are.
        y = jnp.where(wide == -jnp.inf, -jnp.inf, y + wide)
    return y if scale is None else multiply(y, scale, None)


class Gradients(NamedTuple):
    """The gradients of a layer's arguments; None where none is wanted."""

    x: jax.Array | None
    weights: jax.Array | None
    bias: jax.Array | None


def gradients(
    layer: Layer,
    x: jax.Array,
    weights: jax.Array,
    bias: jax.Array | None,
    dlogits: jax.Array,
    dtypes: Sequence[Any],
) -> Gradients:
    """The products with the gradient of the logits, each in its dtype."""
    dx = dweights = dbias = None
    tokens = x.ndim - 1
    if X in layer.wanted:
        classes, first = range(tokens, dlogits.ndim), layer.vocab_axis
        over = (classes, range(first, first + len(classes)))
        dx = _product(layer, dlogits, weights, over, dtypes[X])
    if WEIGHTS in layer.wanted:
        a, b = (dlogits, x) if layer.vocab_first else (x, dlogits)
        over = (range(tokens), range(tokens))
        dweights = _product(layer, a, b, over, dtypes[WEIGHTS])
    if bias is not None and BIAS in layer.wanted:
        dbias = sum_over_tokens(dlogits, tokens, dtypes[BIAS])
    return Gradients(dx, dweights, dbias)


def sum_over_tokens(array: jax.Array, tokens: int, dtype: Any) -> jax.Array:
    """The sum over the first `tokens` dimensions, in float32 at least."""
    wide = xla.working_dtype(dtype)
    return jnp.sum(array, axis=tuple(range(tokens)), dtype=wide).astype(dtype)


def per_class(array: jax.Array, tokens: int) -> jax.Array:
    """[*classes], to broadcast over `tokens` dimensions."""
    return array.reshape((1,) * tokens + array.shape)


# --- what is reduced of logits --------------------------------------------------------


def targets(
    layer: Layer,
    logits: jax.Array,
    labels: jax.Array,
    class_weights: jax.Array | None,
    classes: int = 1,
) -> list[tuple[RowCall, jax.Array]]:
    """What rows of logits are compared with, and the calls that reduce them.

    That is the label of each row, [*tokens, 1, ...], several, or a weight for each
    class; and, if there are any, the class weights in its place. The latter give the
    mean over a row of ``-class_weights log P``: what labels with class weights are
    smoothed by. The vocabulary has so many dimensions as `classes` says.
    """
    call = layer.row_call(classes)
    found = [(call, labels)]
    if class_weights is not None:
        options = Options(softcap=call.loss.softcap, uniform_nll=True)
        call = dataclasses.replace(call, options=options)
        found.append((call, weights_of_rows(class_weights, logits)))
    return found


def weights_of_rows(class_weights: jax.Array, logits: jax.Array) -> jax.Array:
    """Class weights of the logits' shape: their statistics are numbers per token."""
    each = per_class(class_weights, logits.ndim - class_weights.ndim)
    return jnp.broadcast_to(each, logits.shape)
