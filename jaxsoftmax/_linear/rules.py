"""The derivative rules of cross-entropy behind a linear layer.

Logits are computed in chunks, used and forgotten. As for cross-entropy on logits, there
are two functions, lifted to every derivative mode:

- `statistics`: a few numbers of each token, by chunks of tokens. The backward keeps
  the layer's arguments and these numbers. It computes the logits again, by chunks of
  the vocabulary: the gradient of a chunk of weights is then one product over all
  tokens, written once, and what is added up is the gradient of `x`, which is small.
- `weighted_sum`: the sum over tokens of losses with weights that are known before. Its
  forward, where a gradient is wanted, computes that too, from logits that are there:
  three products of this size instead of four. It keeps the gradient of the logits, in
  the arguments' dtype, of as many tokens as the budget allows, and then takes both
  products with it at once. Beyond that many tokens, the gradient of the weights is
  added up in float32.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxsoftmax import _compat
from jaxsoftmax._core.autodiff import forward_mode, lift_definition, lift_gradients
from jaxsoftmax._core.shapes import is_known
from jaxsoftmax._linear.chunks import (
    ClassChunks,
    FilledClasses,
    TokenChunks,
    class_chunks,
    filled_classes,
    over_chunks,
    over_pieces,
    token_chunks,
)
from jaxsoftmax._rows import loss_terms, row_loss, xla, xla_loss
from jaxsoftmax._rows.call import RowCall
from jaxsoftmax._rows.row_loss import Options, Statistics
from jaxsoftmax._rows.scaling import finite, multiply

# Of the budget, how much the float32 logits of one chunk take where their gradient is
# kept for more tokens: one part of so many.
_PARTS = 4
# Into how many pieces, of which one call of a kernel reduces each, these fall: what the
# call writes is copied to where the gradients of all are.
_PIECES = 8
# Where logits are computed again, the smallest piece of tokens.
_LEAST_PIECE = 256
# Rows of a multiple of this are those that kernels and matrix products are made for.
# Longer rows are filled up, with classes that have no part, which costs a copy of the
# weights.
_ALIGNED = 128
_LEAST_FILLED = 1024


@dataclasses.dataclass(frozen=True)
class Layer:
    """The static part of a call.

    Attributes:
      rows: Of the functions of rows; `dtype` is that of the products' operands.
      vocab_first: Whether weights are [V, H], not [H, V].
      precision: Of the products.
      budget: Bytes that logits and their gradient may take.
      wanted: Which of x, weights and bias have a gradient, by their places; others
        may be among them.
    """

    rows: RowCall
    vocab_first: bool
    precision: Any
    budget: int
    wanted: tuple[int, ...] = (0, 1, 2)

    @property
    def working(self) -> np.dtype:
        """The dtype of logits and of sums."""
        return xla.working_dtype(self.rows.dtype)

    @property
    def hidden_axis(self) -> int:
        """Of weights whose vocabulary is folded, or not."""
        return -1 if self.vocab_first else 0

    @property
    def vocab_axis(self) -> int:
        """The first axis of the vocabulary."""
        return 0 if self.vocab_first else 1

    def vocabulary(self, weights: jax.Array) -> int:
        return weights.shape[self.vocab_axis]

    def of_classes(self, classes: int, *, weighted: bool = False) -> RowCall:
        """The config for logits whose last `classes` dimensions are the vocabulary."""
        config = dataclasses.replace(self.rows, axis=tuple(range(-classes, 0)))
        if not weighted:
            return config
        options = Options(softcap=config.loss.softcap, spread=True)
        return dataclasses.replace(config, options=options)


_X, _WEIGHTS, _BIAS = range(3)


def _narrow(layer: Layer, wanted: tuple[int, ...]) -> Layer:
    return dataclasses.replace(layer, wanted=wanted)


# --- products -------------------------------------------------------------------------


def _product(
    layer: Layer,
    a: jax.Array,
    b: jax.Array,
    over: tuple[Sequence[int], Sequence[int]],
    dtype: Any,
) -> jax.Array:
    """The product of `a` and `b`, summed over pairs of dimensions, in float32."""
    operands = (a.astype(layer.rows.dtype), b.astype(layer.rows.dtype))
    dims = (tuple(over[0]), tuple(over[1]))
    narrow = np.dtype(dtype).itemsize == 1  # which no product need be able to write
    y = lax.dot_general(
        *operands,
        (dims, ((), ())),
        precision=layer.precision,
        preferred_element_type=layer.working if narrow else dtype,
    )
    return y.astype(dtype)


def _classes(weights: jax.Array) -> int:
    """How many dimensions the vocabulary has."""
    return weights.ndim - 1


def linear(
    layer: Layer, x: jax.Array, weights: jax.Array, bias: jax.Array | None
) -> jax.Array:
    """``x W + b`` in float32: [*tokens, *classes]."""
    hidden = range(weights.ndim)[layer.hidden_axis]
    y = _product(layer, x, weights, ([x.ndim - 1], [hidden]), layer.working)
    if bias is None:
        return y
    wide = bias.astype(layer.working)
    wide = wide.reshape((1,) * (y.ndim - wide.ndim) + wide.shape)
    # Of a class that has no part, whatever its weights are.
    return jnp.where(wide == -jnp.inf, -jnp.inf, y + wide)


def _gradient_of_x(
    layer: Layer, dlogits: jax.Array, weights: jax.Array, dtype: Any
) -> jax.Array:
    count = _classes(weights)
    classes = range(dlogits.ndim - count, dlogits.ndim)
    first = layer.vocab_axis
    over = (classes, range(first, first + count))
    return _product(layer, dlogits, weights, over, dtype)


def _gradient_of_weights(
    layer: Layer, x: jax.Array, dlogits: jax.Array, dtype: Any
) -> jax.Array:
    tokens = range(x.ndim - 1)
    a, b = (dlogits, x) if layer.vocab_first else (x, dlogits)
    return _product(layer, a, b, (tokens, tokens), dtype)


def _sum_over_tokens(array: jax.Array, tokens: int, dtype: Any) -> jax.Array:
    """Over the first `tokens` dimensions, in float32 at least."""
    wide = xla.working_dtype(dtype)
    return jnp.sum(array, axis=tuple(range(tokens)), dtype=wide).astype(dtype)


def _of_tokens(array: jax.Array, classes: int) -> jax.Array:
    """A number a token, [*tokens, 1], to broadcast over `classes` dimensions."""
    return array.reshape(*array.shape, *(1,) * (classes - 1))


def _for_tokens(array: jax.Array, tokens: int) -> jax.Array:
    """A number a class to broadcast over `tokens` dimensions."""
    return array.reshape((1,) * tokens + array.shape)


# --- statistics of tokens -------------------------------------------------------------


class _Numbers(NamedTuple):
    """Statistics of tokens, [*tokens, 1] each.

    Attributes:
      of_label: With the token's label.
      of_classes: With the class weights in a label's place; None if there are none.
    """

    of_label: Statistics
    of_classes: Statistics | None


def _filling(layer: Layer, weights: jax.Array) -> FilledClasses:
    """How rows are filled up to a multiple of `_ALIGNED`, if they are."""
    size = layer.vocabulary(weights)
    return filled_classes(size, _ALIGNED if size >= _LEAST_FILLED else 1)


def _filled(
    layer: Layer,
    weights: jax.Array,
    bias: jax.Array | None,
    class_weights: jax.Array | None,
    tokens: int,
) -> tuple[jax.Array, jax.Array | None, jax.Array | None, jax.Array | None]:
    """Weights and the like filled up, and a mask of the classes."""
    filling = _filling(layer, weights)
    if filling.full:
        return weights, bias, class_weights, None
    return (
        filling.fill(weights, layer.vocab_axis),
        None if bias is None else filling.fill(bias, 0),
        None if class_weights is None else filling.fill(class_weights, 0),
        _for_tokens(filling.given(), tokens),
    )


def _rows_at_a_time(layer: Layer, vocabulary: int) -> int:
    """Tokens of a chunk whose logits take the whole budget."""
    return max(1, layer.budget // (vocabulary * layer.working.itemsize))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _statistics_rule(
    layer: Layer,
    x: jax.Array,
    weights: jax.Array,
    bias: jax.Array | None,
    scale: jax.Array | None,
    class_weights: jax.Array | None,
    labels: jax.Array,
) -> _Numbers:
    *tokens, _ = x.shape
    chunks = token_chunks(tokens, _rows_at_a_time(layer, layer.vocabulary(weights)))
    labels = _filling(layer, weights).place(labels)
    weights, bias, class_weights, where = _filled(
        layer, weights.astype(layer.rows.dtype), bias, class_weights, len(tokens)
    )

    def of_chunk(x: jax.Array, labels: jax.Array, scale: Any) -> _Numbers:
        logits = linear(layer, x, weights, bias)
        if scale is not None:
            logits = multiply(logits, scale, None)
        of_label = loss_terms.row_statistics(layer.of_classes(1), logits, where, labels)
        if class_weights is None:
            return _Numbers(of_label, None)
        each = _for_tokens(class_weights, len(tokens))
        each = jnp.broadcast_to(each, logits.shape)
        config = layer.of_classes(1, weighted=True)
        return _Numbers(
            of_label, loss_terms.row_statistics(config, logits, where, each)
        )

    split = (
        chunks.split(x),
        chunks.split(labels, row_loss.IGNORED),
        None if scale is None else chunks.split(scale),
    )
    return jax.tree.map(chunks.join, over_chunks(of_chunk, split))


def _statistics_forward(layer: Layer, *arrays: Any) -> tuple[_Numbers, Any]:
    numbers = statistics(layer, *arrays)
    return numbers, (*arrays, numbers)


def _labels_of_chunk(labels: jax.Array, chunks: ClassChunks, chunk: Any) -> jax.Array:
    """Indices in a chunk of the vocabulary."""
    if chunks.count == 1:
        return labels
    part, place = labels // chunks.length, labels % chunks.length
    place = place - chunks.start(chunk)
    inside = (place >= 0) & (place < chunks.width)
    index = jnp.where(inside, part * chunks.width + place, row_loss.ELSEWHERE)
    return jnp.where(labels < 0, labels, index)


class _OfClasses(NamedTuple):
    """What a chunk of classes has: weights, and a number each of bias and weight."""

    weights: jax.Array
    bias: jax.Array | None
    class_weights: jax.Array | None


def _recomputed_split(
    layer: Layer, tokens: Sequence[int], weights: jax.Array
) -> tuple[TokenChunks, ClassChunks]:
    """Chunks for the pass that computes logits again.

    Of a chunk of classes the gradients of all tokens' logits are there; their float32
    logits are those of a chunk of tokens. If it is not known how many tokens there are,
    these are all, and a chunk has as many classes as `x` has features: each array is as
    large as `x`.
    """
    vocabulary = layer.vocabulary(weights)
    if not is_known(tokens):
        one = TokenChunks(tuple(tokens), tuple(tokens), (1,) * len(tokens))
        return one, class_chunks(vocabulary, weights.shape[layer.hidden_axis])
    count = math.prod(tokens)
    itemsize, of_working = layer.rows.dtype.itemsize, layer.working.itemsize
    rows = count
    if count * vocabulary * (itemsize + of_working) > layer.budget:
        rows = max(-(-count // _PARTS), _LEAST_PIECE)
    pieces = token_chunks(tokens, rows)
    of_class = count * itemsize + math.prod(pieces.sizes) * of_working
    return pieces, class_chunks(vocabulary, layer.budget // of_class)


def _gradients_of_chunk(
    layer: Layer, chunks: ClassChunks, chunk: Any, rows: Any, classes: _OfClasses
) -> tuple[Any, Any]:
    """What a chunk of classes adds to the gradients of tokens, and those of classes.

    Args:
      layer: The layer.
      chunks: Of the classes.
      chunk: Which of them.
      rows: x, labels, scale, numbers and cotangents of tokens, [pieces, *piece, ...].
      classes: Of the chunk.
    """
    x, *_ = rows
    weights, bias, class_weights = classes
    rank = x.ndim - 2
    expand = functools.partial(_of_tokens, classes=2)
    where = None
    if not chunks.even:
        where = _for_tokens(chunks.counted(chunk).reshape(1, -1), rank)

    def of_piece(x: Any, labels: Any, scale: Any, numbers: Any, cotangents: Any) -> Any:
        numbers, cotangents, scale = jax.tree.map(expand, (numbers, cotangents, scale))
        raw = linear(layer, x, weights, bias)
        logits = raw if scale is None else multiply(raw, scale, None)
        index = expand(_labels_of_chunk(labels, chunks, chunk))
        d, _ = xla_loss.cross_entropy_pullback(
            (logits, where, index, numbers.of_label),
            cotangents.of_label,
            layer.of_classes(2),
        )
        dclass_weights = dscale = None
        if class_weights is not None:
            each = _for_tokens(class_weights, rank)
            more, deach = xla_loss.cross_entropy_pullback(
                (logits, where, each, numbers.of_classes),
                cotangents.of_classes,
                layer.of_classes(2, weighted=True),
            )
            d = d + more
            assert deach is not None
            dclass_weights = _sum_over_tokens(deach, rank, deach.dtype)
        if scale is not None:
            wide = d.astype(layer.working)
            # As in `multiply`: of a gradient of 0, not 0 inf.
            dscale = jnp.sum(wide * finite(raw), -1)
            dscale = jnp.sum(dscale, -1, keepdims=True)
            d = (wide * finite(scale)).astype(d.dtype)
        return d, dscale, dclass_weights

    one_chunk = jax.tree.map(lambda a: a[None], rows)
    found = over_pieces(lambda *rows: rows, of_piece, one_chunk)
    d, dscale, dclass_weights = jax.tree.map(lambda a: a[0], found)
    dx = dweights = dbias = None
    if _X in layer.wanted:
        dx = _gradient_of_x(layer, d, weights, layer.working)
    if _WEIGHTS in layer.wanted:
        dweights = _gradient_of_weights(layer, x, d, weights.dtype)
    if bias is not None and _BIAS in layer.wanted:
        dbias = _sum_over_tokens(d, rank + 1, bias.dtype)
    if dclass_weights is not None:
        dclass_weights = jnp.sum(dclass_weights, 0)
    return (dx, dscale), (dweights, dbias, dclass_weights)


def _statistics_backward(
    layer: Layer, residuals: Any, cotangents: _Numbers
) -> tuple[Any, ...]:
    x, weights, bias, scale, class_weights, labels, numbers = residuals
    *tokens, _ = x.shape
    pieces, chunks = _recomputed_split(layer, tokens, weights)
    # Whatever is in a token without a gradient, it has no part in that of the weights.
    alive = xla_loss.with_cotangent(cotangents)
    x, scale, numbers = row_loss.only(alive, (x, scale, numbers))
    rows = (
        pieces.split(x),
        pieces.split(labels, row_loss.IGNORED),
        *jax.tree.map(pieces.split, (scale, numbers, cotangents)),
    )

    def each(f: Callable[..., jax.Array], *of_classes: Any) -> list[Any]:
        """Of the arrays of classes that are there: f(*arrays, their axis)."""
        axes = (layer.vocab_axis, 0, 0)
        groups = zip(*of_classes, axes, strict=True)
        return [None if group[0] is None else f(*group) for group in groups]

    folded = _OfClasses(*each(chunks.fold, (weights, bias, class_weights)))

    # Computed again where a derivative of this is taken: no logits are kept for it.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def of_chunk(chunk: Any, rows: Any, classes: _OfClasses) -> tuple[Any, Any]:
        return _gradients_of_chunk(layer, chunks, chunk, rows, classes)

    def step(carry: Any, chunk: Any) -> tuple[Any, None]:
        totals, wholes = carry
        slice_, put = (functools.partial(f, chunk) for f in (chunks.slice, chunks.put))
        sums, parts = of_chunk(chunk, rows, _OfClasses(*each(slice_, folded)))
        wholes = tuple(each(put, wholes, parts))
        return (jax.tree.map(jnp.add, totals, sums), wholes), None

    if chunks.count == 1:
        totals, wholes = of_chunk(np.int32(0), rows, folded)
    else:
        like = (rows, weights)
        dx = dscale = None
        if _X in layer.wanted:
            dx = _compat.zeros(rows[0].shape, layer.working, like)
        if scale is not None:
            dscale = _compat.zeros(rows[2].shape, layer.working, like)
        wanted = (
            folded.weights if _WEIGHTS in layer.wanted else None,
            folded.bias if _BIAS in layer.wanted else None,
            folded.class_weights,
        )
        wholes = jax.tree.map(
            lambda a: _compat.unwritten(a.shape, a.dtype, like), wanted
        )
        every = jnp.arange(chunks.count, dtype=np.int32)
        (totals, wholes), _ = lax.scan(step, ((dx, dscale), wholes), every)
    dx, dscale = jax.tree.map(pieces.join, totals)
    dweights, dbias, dclass_weights = each(chunks.unfold, wholes)
    if dx is not None:
        dx = dx.astype(x.dtype)
    return dx, dweights, dbias, dscale, dclass_weights, None


def _backward_definition(
    layer: Layer, residuals: Any, cotangents: _Numbers
) -> tuple[Any, ...]:
    """A token without a gradient has no part in another derivative either."""
    dx, *others, dscale, dclass_weights, _ = _statistics_backward(
        layer, residuals, cotangents
    )
    alive = xla_loss.with_cotangent(cotangents)
    dx, dscale = row_loss.only(alive, (dx, dscale))
    return dx, *others, dscale, dclass_weights, None


def _pushforward_definition(
    layer: Layer, residuals: Any, tangents: tuple[Any, ...]
) -> _Numbers:
    """Whatever is in a token without a loss, it has no part in another derivative."""
    x, weights, bias, scale, class_weights, labels, numbers = residuals
    x_dot, weights_dot, bias_dot, scale_dot, class_weights_dot, _ = tangents
    of_tokens = (x, scale, numbers, x_dot, scale_dot)
    of_tokens = row_loss.only(labels != row_loss.IGNORED, of_tokens)
    x, scale, numbers, x_dot, scale_dot = of_tokens
    residuals = (x, weights, bias, scale, class_weights, labels, numbers)
    tangents = (x_dot, weights_dot, bias_dot, scale_dot, class_weights_dot, None)
    return _statistics_pushforward(layer, residuals, tangents)


def _statistics_pushforward(
    layer: Layer, residuals: Any, tangents: tuple[Any, ...]
) -> _Numbers:
    x, weights, bias, scale, class_weights, labels, numbers = residuals
    x_dot, weights_dot, bias_dot, scale_dot, class_weights_dot, _ = tangents
    *tokens, _ = x.shape
    # Logits and their tangents.
    most = _rows_at_a_time(layer, 2 * layer.vocabulary(weights))
    chunks = token_chunks(tokens, most)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def of_chunk(
        x: Any, x_dot: Any, labels: Any, numbers: Any, scale: Any, scale_dot: Any
    ) -> _Numbers:
        logits = linear(layer, x, weights, bias)
        dot = jnp.zeros_like(logits)
        if x_dot is not None:
            dot = dot + linear(layer, x_dot, weights, None)
        if weights_dot is not None:
            dot = dot + linear(layer, x, weights_dot, None)
        if bias_dot is not None:
            dot = dot + _for_tokens(bias_dot.astype(dot.dtype), len(tokens))
        if scale is not None:
            dot = dot * finite(scale)
            if scale_dot is not None:
                dot = dot + finite(logits) * scale_dot
            logits = multiply(logits, scale, None)
        of_label = xla_loss.cross_entropy_pushforward(
            (logits, None, labels, numbers.of_label),
            dot,
            None,
            layer.of_classes(1),
        )
        if class_weights is None:
            return _Numbers(of_label, None)
        # As in the forward: its statistics are a number for each token.
        each = _for_tokens(class_weights, len(tokens))
        each = jnp.broadcast_to(each, logits.shape)
        each_dot = class_weights_dot
        if each_dot is not None:
            each_dot = _for_tokens(each_dot, len(tokens))
            each_dot = jnp.broadcast_to(each_dot, logits.shape)
        of_classes = xla_loss.cross_entropy_pushforward(
            (logits, None, each, numbers.of_classes),
            dot,
            each_dot,
            layer.of_classes(1, weighted=True),
        )
        return _Numbers(of_label, of_classes)

    split = jax.tree.map(chunks.split, (x, x_dot))
    split += (chunks.split(labels, row_loss.IGNORED),)
    split += jax.tree.map(chunks.split, (numbers, scale, scale_dot))
    return jax.tree.map(chunks.join, over_chunks(of_chunk, split))


_statistics_rule.defvjp(_statistics_forward, _statistics_backward)
statistics = forward_mode(
    _statistics_rule,
    _statistics_pushforward,
    pushforward_definition=_pushforward_definition,
    pullback_definition=_backward_definition,
    narrow=_narrow,
)


# --- the gradient of a weighted sum, from the pass that computes it -------------------


class _Gradients(NamedTuple):
    """Of a weighted sum; None where none is wanted."""

    x: jax.Array | None
    weights: jax.Array | None
    bias: jax.Array | None


@dataclasses.dataclass(frozen=True)
class _Split:
    """How the tokens are split where the forward computes gradients.

    Attributes:
      pieces: The smallest chunks: what one call of a kernel reduces.
      groups: Of tokens whose logits' gradient is there at a time.
      chunks: Of a group: tokens whose logits are there at a time.
    """

    pieces: TokenChunks
    groups: int
    chunks: int

    def split(self, array: jax.Array, fill: Any = 0) -> jax.Array:
        """``[*tokens, ...] -> [groups, chunks, pieces of a chunk, *piece, ...]``."""
        array = self.pieces.split(array, fill)
        return array.reshape(self.groups, self.chunks, -1, *array.shape[1:])

    def join(self, array: jax.Array) -> jax.Array:
        """The inverse."""
        return self.pieces.join(array.reshape(-1, *array.shape[3:]))


def _gradient_split(layer: Layer, tokens: Sequence[int], vocabulary: int) -> _Split:
    count = math.prod(tokens)
    rows = max(1, _rows_at_a_time(layer, vocabulary) // _PARTS)
    if _WEIGHTS in layer.wanted:
        left = layer.budget - min(rows, count) * vocabulary * layer.working.itemsize
        group = max(1, left // (vocabulary * layer.rows.dtype.itemsize))
        groups = -(-count // group)
        rows = min(rows, -(-count // groups))
    else:
        groups = -(-count // rows)
    pieces = token_chunks(tokens, max(1, rows // _PIECES))

    def divisor(n: int, least: int) -> int:
        """The smallest of `n` that is not below `least`, or `n`."""
        return next((d for d in range(least, n) if n % d == 0), n)

    groups = divisor(pieces.count, groups)
    of_group = pieces.count // groups
    size = math.prod(pieces.sizes)
    return _Split(pieces, groups, divisor(of_group, -(-of_group * size // rows)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _with_gradients_rule(
    layer: Layer,
    x: jax.Array,
    weights: jax.Array,
    bias: jax.Array | None,
    labels: jax.Array,
    label_weight: jax.Array,
    weight: jax.Array,
) -> tuple[_Gradients, Statistics]:
    *tokens, _ = x.shape
    rank = len(tokens)
    vocabulary = layer.vocabulary(weights)
    filling = _filling(layer, weights)
    labels = filling.place(labels)
    operands = layer.rows.dtype
    of_x = layer.working if x.dtype.itemsize == 1 else operands
    split = _gradient_split(layer, tokens, vocabulary)
    w, b, _, where = _filled(layer, weights.astype(operands), bias, None, rank)
    config = layer.of_classes(1)
    wants_weights = _WEIGHTS in layer.wanted
    wants_bias = bias is not None and _BIAS in layer.wanted

    def logits_of_chunk(x: jax.Array, *rows: jax.Array) -> tuple[jax.Array, ...]:
        return linear(layer, x, w, b), *rows

    def of_group_in(
        dtype: Any, group: Any, dtypes: tuple[Any, Any]
    ) -> tuple[_Gradients, Statistics]:
        """Products with the gradient of the logits in `dtype`."""
        rows = dataclasses.replace(layer.rows, dtype=dtype)
        products = dataclasses.replace(layer, rows=rows)

        def of_piece(*rows: jax.Array) -> tuple[jax.Array, Statistics]:
            logits, labels, label_weight, weight = rows
            arrays = (logits, where, labels, label_weight, weight)
            d, numbers = loss_terms.row_statistics_and_gradient(config, *arrays)
            return d.astype(dtype), numbers

        d, numbers = over_pieces(logits_of_chunk, of_piece, group)
        dx = dweights = dbias = None
        if _X in layer.wanted:
            dx = _gradient_of_x(products, d, w, of_x)
        if wants_weights:
            dweights = _gradient_of_weights(products, group[0], d, dtypes[0])
        if wants_bias:
            dbias = _sum_over_tokens(d, rank + 2, dtypes[1])
        return _Gradients(dx, dweights, dbias), numbers

    def of_group(group: Any, dtypes: tuple[Any, Any]) -> tuple[_Gradients, Statistics]:
        if operands == layer.working:
            return of_group_in(operands, group, dtypes)
        # XLA for CPU multiplies a float32 copy of what is in 16 bits; and to write a
        # piece of that, it converts all of it, to float32 and back.
        return lax.platform_dependent(
            group,
            cpu=lambda group: of_group_in(layer.working, group, dtypes),
            default=lambda group: of_group_in(operands, group, dtypes),
        )

    # Whatever is in a token that has no loss, it has no part in the weights' gradient.
    used = (label_weight != 0) | (weight != 0)
    arrays = (
        split.split(jnp.where(used, x, jnp.zeros_like(x))),
        split.split(labels, row_loss.IGNORED),
        split.split(label_weight),
        split.split(weight),
    )
    if split.groups == 1:
        dtypes = (weights.dtype, None if bias is None else bias.dtype)
        grads, numbers = of_group(jax.tree.map(lambda a: a[0], arrays), dtypes)
        dx, dweights, dbias = grads
        dx, numbers = jax.tree.map(lambda a: a[None], (dx, numbers))
    else:

        def step(sums: Any, group: Any) -> tuple[Any, Any]:
            grads, numbers = of_group(group, (layer.working, layer.working))
            added = jax.tree.map(jnp.add, sums, (grads.weights, grads.bias))
            return added, (grads.x, numbers)

        start = (w if wants_weights else None, b if wants_bias else None)
        start = jax.tree.map(
            lambda a: _compat.zeros(a.shape, layer.working, arrays, w), start
        )
        (dweights, dbias), (dx, numbers) = lax.scan(step, start, arrays)
    if dx is not None:
        dx = split.join(dx).astype(x.dtype)
    if dweights is not None:
        dweights = filling.strip(dweights, layer.vocab_axis).astype(weights.dtype)
    if dbias is not None:
        assert bias is not None
        dbias = filling.strip(dbias, 0).astype(bias.dtype)
    return _Gradients(dx, dweights, dbias), jax.tree.map(split.join, numbers)


def _with_gradients_definition(
    layer: Layer, *arrays: Any
) -> tuple[_Gradients, Statistics]:
    *of_layer, labels, label_weight, weight = arrays
    wanted = [i for i in (_X, _WEIGHTS, _BIAS) if i in layer.wanted]

    def of_wanted(*floats: jax.Array) -> Statistics:
        given = list(of_layer)
        for i, a in zip(wanted, floats, strict=True):
            given[i] = a
        return statistics(layer, *given, None, None, labels).of_label

    numbers, pull = jax.vjp(of_wanted, *(of_layer[i] for i in wanted))
    cotangents = xla_loss.cotangents_of_sum(
        row_loss.only((label_weight != 0) | (weight != 0), numbers),
        label_weight,
        weight,
        layer.rows,
    )
    found = dict(zip(wanted, pull(cotangents), strict=True))
    grads = _Gradients(*(found.get(i) for i in (_X, _WEIGHTS, _BIAS)))
    return grads, numbers


_with_gradients = lift_definition(_with_gradients_rule, _with_gradients_definition)


# --- a weighted sum of losses: keeps its gradients ------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weighted_sum_rule(layer: Layer, *arrays: Any) -> jax.Array:
    x, weights, bias, labels, label_weight, weight = arrays
    numbers = statistics(layer, x, weights, bias, None, None, labels)
    return loss_terms.weighted_terms(
        layer.rows, numbers.of_label, label_weight, weight
    )[0]


def _weighted_sum_forward(layer: Layer, *arrays: Any) -> tuple[jax.Array, Any]:
    grads, numbers = _with_gradients(layer, *arrays)
    total, nll, term = loss_terms.weighted_terms(layer.rows, numbers, *arrays[-2:])
    return total, (*grads, None, nll, term)


weighted_sum = lift_gradients(_weighted_sum_rule, _weighted_sum_forward, narrow=_narrow)


def gradients_fit(layer: Layer, tokens: int, weights: jax.Array) -> bool:
    """Whether the budget has room for the gradients that `weighted_sum` computes.

    For that of the logits of all tokens; or, where it is added up over groups of them,
    the float32 one of the weights. Not if it is not known how many tokens there are.
    """
    if not is_known([tokens]):
        return False
    of_all = tokens * layer.vocabulary(weights) * layer.rows.dtype.itemsize
    of_weights = weights.size * layer.working.itemsize
    return layer.budget >= min(of_all * (1 + 1 / _PARTS), of_weights)
