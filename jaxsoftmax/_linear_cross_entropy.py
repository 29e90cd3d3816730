"""Cross-entropy behind a linear layer, without the logits of all tokens at a time.

Logits are computed in chunks, used and forgotten. As for cross-entropy on logits, two
functions stand below the public ones, lifted to every derivative mode:

- `_statistics`: a few numbers of each token, by chunks of tokens. The backward keeps
  the layer's arguments and these numbers. It computes the logits again, by chunks of
  the vocabulary: the gradient of a chunk of weights is then one product over all
  tokens, written once, and what is added up is the gradient of `x`, which is small.
- `_weighted_sum`: the sum over tokens of losses with weights that are known before. Its
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
from jax.typing import ArrayLike

from jaxsoftmax import _arguments, _compat, _cross_entropy, _dispatch, _losses
from jaxsoftmax._autodiff import forward_mode
from jaxsoftmax._losses import Loss, LossConfig, Rows, TokenStatistics
from jaxsoftmax._softmax import multiply
from jaxsoftmax._token_chunks import (
    ClassChunks,
    FilledClasses,
    TokenChunks,
    class_chunks,
    filled_classes,
    least_chunk,
    over_chunks,
    over_pieces,
    token_chunks,
)
from jaxsoftmax.kernels import _loss, xla, xla_cross_entropy
from jaxsoftmax.kernels._loss import Options, Statistics

# By default logits and their gradient may take as much as so many bytes for each entry
# of the weights (two copies in float32), or this much if that is more.
_BUDGET_PER_WEIGHT = 8
_LEAST_BUDGET = 2**28
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
class _Layer:
    """The static part of a call.

    Attributes:
      rows: Of the functions of rows; `in_dtype` is that of the products' operands.
      vocab_first: Whether weights are [V, H], not [H, V].
      precision: Of the products.
      budget: Bytes that logits and their gradient may take.
      wanted: Which of the arguments have a gradient, by their places.
    """

    rows: LossConfig
    vocab_first: bool
    precision: Any
    budget: int
    wanted: tuple[int, ...] = (0, 1, 2, 3, 4)

    @property
    def working(self) -> np.dtype:
        """The dtype of logits and of sums."""
        return xla.working_dtype(self.rows.in_dtype)

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

    def of_classes(self, classes: int, *, weighted: bool = False) -> LossConfig:
        """The config for logits whose last `classes` dimensions are the vocabulary."""
        config = dataclasses.replace(self.rows, axis=tuple(range(-classes, 0)))
        if not weighted:
            return config
        options = Options(softcap=config.options.softcap, spread=True)
        return dataclasses.replace(config, options=options)


_X, _WEIGHTS, _BIAS, _SCALE, _CLASS_WEIGHTS = range(5)


def _narrow(layer: _Layer, wanted: tuple[int, ...]) -> _Layer:
    return dataclasses.replace(layer, wanted=wanted)


# --- products -------------------------------------------------------------------------


def _product(
    layer: _Layer,
    a: jax.Array,
    b: jax.Array,
    over: tuple[Sequence[int], Sequence[int]],
    dtype: Any,
) -> jax.Array:
    """The product of `a` and `b`, summed over pairs of dimensions, in float32."""
    operands = (a.astype(layer.rows.in_dtype), b.astype(layer.rows.in_dtype))
    dims = (tuple(over[0]), tuple(over[1]))
    return lax.dot_general(
        *operands,
        (dims, ((), ())),
        precision=layer.precision,
        preferred_element_type=dtype,
    )


def _classes(weights: jax.Array) -> int:
    """How many dimensions the vocabulary has."""
    return weights.ndim - 1


def _linear(
    layer: _Layer, x: jax.Array, weights: jax.Array, bias: jax.Array | None
) -> jax.Array:
    """``x W + b`` in float32: [*tokens, *classes]."""
    hidden = range(weights.ndim)[layer.hidden_axis]
    y = _product(layer, x, weights, ([x.ndim - 1], [hidden]), layer.working)
    if bias is None:
        return y
    wide = bias.astype(layer.working)
    return y + wide.reshape((1,) * (y.ndim - wide.ndim) + wide.shape)


def _gradient_of_x(
    layer: _Layer, dlogits: jax.Array, weights: jax.Array, dtype: Any
) -> jax.Array:
    count = _classes(weights)
    classes = range(dlogits.ndim - count, dlogits.ndim)
    first = layer.vocab_axis
    over = (classes, range(first, first + count))
    return _product(layer, dlogits, weights, over, dtype)


def _gradient_of_weights(
    layer: _Layer, x: jax.Array, dlogits: jax.Array, dtype: Any
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


def _filling(layer: _Layer, weights: jax.Array) -> FilledClasses:
    """How rows are filled up to a multiple of `_ALIGNED`, if they are."""
    size = layer.vocabulary(weights)
    return filled_classes(size, _ALIGNED if size >= _LEAST_FILLED else 1)


def _filled(
    layer: _Layer,
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


def _rows_at_a_time(layer: _Layer, vocabulary: int) -> int:
    """Tokens of a chunk whose logits take the whole budget."""
    return max(1, layer.budget // (vocabulary * layer.working.itemsize))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _statistics_rule(
    layer: _Layer,
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
        layer, weights.astype(layer.rows.in_dtype), bias, class_weights, len(tokens)
    )

    def of_chunk(x: jax.Array, labels: jax.Array, scale: Any) -> _Numbers:
        logits = _linear(layer, x, weights, bias)
        if scale is not None:
            logits = multiply(logits, scale, None)
        of_label = _losses.statistics(layer.of_classes(1), logits, where, labels)
        if class_weights is None:
            return _Numbers(of_label, None)
        each = _for_tokens(class_weights, len(tokens))
        each = jnp.broadcast_to(each, logits.shape)
        config = layer.of_classes(1, weighted=True)
        return _Numbers(of_label, _losses.statistics(config, logits, where, each))

    split = (
        chunks.split(x),
        chunks.split(labels, _loss.IGNORED),
        None if scale is None else chunks.split(scale),
    )
    return jax.tree.map(chunks.join, over_chunks(of_chunk, split))


def _statistics_forward(layer: _Layer, *arrays: Any) -> tuple[_Numbers, Any]:
    numbers = _statistics(layer, *arrays)
    return numbers, (*arrays, numbers)


def _labels_of_chunk(labels: jax.Array, chunks: ClassChunks, chunk: Any) -> jax.Array:
    """Indices in a chunk of the vocabulary."""
    if chunks.count == 1:
        return labels
    part, place = labels // chunks.length, labels % chunks.length
    place = place - chunks.start(chunk)
    inside = (place >= 0) & (place < chunks.width)
    index = jnp.where(inside, part * chunks.width + place, _loss.ELSEWHERE)
    return jnp.where(labels < 0, labels, index)


class _OfClasses(NamedTuple):
    """What a chunk of classes has: weights, and a number each of bias and weight."""

    weights: jax.Array
    bias: jax.Array | None
    class_weights: jax.Array | None


def _recomputed_split(
    layer: _Layer, tokens: Sequence[int], vocabulary: int
) -> tuple[TokenChunks, ClassChunks]:
    """Chunks for the pass that computes logits again.

    Of a chunk of classes the gradients of all tokens' logits are there; their float32
    logits are those of a chunk of tokens.
    """
    count = max(1, math.prod(tokens))
    pieces = token_chunks(tokens, max(-(-count // _PARTS), _LEAST_PIECE))
    itemsize = layer.rows.in_dtype.itemsize
    of_class = count * itemsize + math.prod(pieces.sizes) * layer.working.itemsize
    return pieces, class_chunks(vocabulary, layer.budget // of_class)


def _gradients_of_chunk(
    layer: _Layer, chunks: ClassChunks, chunk: Any, rows: Any, classes: _OfClasses
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
        raw = _linear(layer, x, weights, bias)
        logits = raw if scale is None else multiply(raw, scale, None)
        index = expand(_labels_of_chunk(labels, chunks, chunk))
        d, _ = xla_cross_entropy.cross_entropy_pullback(
            (logits, where, index, numbers.of_label),
            cotangents.of_label,
            **layer.of_classes(2).static,
        )
        dclass_weights = dscale = None
        if class_weights is not None:
            each = _for_tokens(class_weights, rank)
            more, deach = xla_cross_entropy.cross_entropy_pullback(
                (logits, where, each, numbers.of_classes),
                cotangents.of_classes,
                **layer.of_classes(2, weighted=True).static,
            )
            d = d + more
            assert deach is not None
            dclass_weights = _sum_over_tokens(deach, rank, deach.dtype)
        if scale is not None:
            wide = d.astype(layer.working)
            # Of a class with the bias -inf, whose gradient is 0, not 0 inf.
            finite = jnp.where(raw == -jnp.inf, 0, raw)
            dscale = jnp.sum(jnp.where(d == 0, 0, wide * finite), -1)
            dscale = jnp.sum(dscale, -1, keepdims=True)
            d = (wide * scale).astype(d.dtype)
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
    layer: _Layer, residuals: Any, cotangents: _Numbers
) -> tuple[Any, ...]:
    x, weights, bias, scale, class_weights, labels, numbers = residuals
    *tokens, _ = x.shape
    pieces, chunks = _recomputed_split(layer, tokens, layer.vocabulary(weights))
    # Whatever is in a token without a gradient, it has no part in that of the weights.
    alive = functools.reduce(
        jnp.logical_or, [ct != 0 for ct in jax.tree.leaves(cotangents)]
    )
    rows = (
        pieces.split(jnp.where(alive, x, jnp.zeros_like(x))),
        pieces.split(labels, _loss.IGNORED),
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


def _statistics_pushforward(
    layer: _Layer, residuals: Any, tangents: tuple[Any, ...]
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
        logits = _linear(layer, x, weights, bias)
        dot = jnp.zeros_like(logits)
        if x_dot is not None:
            dot = dot + _linear(layer, x_dot, weights, None)
        if weights_dot is not None:
            dot = dot + _linear(layer, x, weights_dot, None)
        if bias_dot is not None:
            dot = dot + _for_tokens(bias_dot.astype(dot.dtype), len(tokens))
        if scale is not None:
            dot = dot * scale
            if scale_dot is not None:
                dot = dot + jnp.where(logits == -jnp.inf, 0, logits) * scale_dot
            logits = multiply(logits, scale, None)
        of_label = xla_cross_entropy.cross_entropy_pushforward(
            (logits, None, labels, numbers.of_label),
            dot,
            None,
            **layer.of_classes(1).static,
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
        of_classes = xla_cross_entropy.cross_entropy_pushforward(
            (logits, None, each, numbers.of_classes),
            dot,
            each_dot,
            **layer.of_classes(1, weighted=True).static,
        )
        return _Numbers(of_label, of_classes)

    split = jax.tree.map(chunks.split, (x, x_dot))
    split += (chunks.split(labels, _loss.IGNORED),)
    split += jax.tree.map(chunks.split, (numbers, scale, scale_dot))
    return jax.tree.map(chunks.join, over_chunks(of_chunk, split))


_statistics_rule.defvjp(_statistics_forward, _statistics_backward)
_statistics = forward_mode(_statistics_rule, _statistics_pushforward, narrow=_narrow)


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


def _gradient_split(layer: _Layer, tokens: Sequence[int], vocabulary: int) -> _Split:
    count = math.prod(tokens)
    rows = max(1, _rows_at_a_time(layer, vocabulary) // _PARTS)
    if _WEIGHTS in layer.wanted:
        left = layer.budget - min(rows, count) * vocabulary * layer.working.itemsize
        group = max(1, left // (vocabulary * layer.rows.in_dtype.itemsize))
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
    layer: _Layer,
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
    operands = layer.rows.in_dtype
    split = _gradient_split(layer, tokens, vocabulary)
    w, b, _, where = _filled(layer, weights.astype(operands), bias, None, rank)
    config = layer.of_classes(1)
    wants_weights = _WEIGHTS in layer.wanted
    wants_bias = bias is not None and _BIAS in layer.wanted

    def of_piece(*rows: jax.Array) -> tuple[jax.Array, Statistics]:
        logits, labels, label_weight, weight = rows
        arrays = (logits, where, labels, label_weight, weight)
        return _losses.statistics_and_gradient(config, *arrays)

    def logits_of_chunk(x: jax.Array, *rows: jax.Array) -> tuple[jax.Array, ...]:
        return _linear(layer, x, w, b), *rows

    def of_group(group: Any, dtypes: tuple[Any, Any]) -> tuple[_Gradients, Statistics]:
        d, numbers = over_pieces(logits_of_chunk, of_piece, group)
        dx = dweights = dbias = None
        if _X in layer.wanted:
            dx = _gradient_of_x(layer, d, w, operands)
        if wants_weights:
            dweights = _gradient_of_weights(layer, group[0], d, dtypes[0])
        if wants_bias:
            dbias = _sum_over_tokens(d, rank + 2, dtypes[1])
        return _Gradients(dx, dweights, dbias), numbers

    # Whatever is in a token that has no loss, it has no part in the weights' gradient.
    used = (label_weight != 0) | (weight != 0)
    arrays = (
        split.split(jnp.where(used, x, jnp.zeros_like(x))),
        split.split(labels, _loss.IGNORED),
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
    layer: _Layer, *arrays: Any
) -> tuple[_Gradients, Statistics]:
    x, weights, bias, labels, label_weight, weight = arrays
    given = (x, weights, bias, None, None, labels)
    numbers = _statistics(layer, *given)
    of_label = xla_cross_entropy.cotangents_of_sum(
        numbers.of_label,
        label_weight,
        weight,
        scale=layer.rows.scale,
        options=layer.rows.options,
    )
    dx, dweights, dbias, *_ = _statistics_backward(
        layer, (*given, numbers), _Numbers(of_label, None)
    )
    return _Gradients(dx, dweights, dbias), numbers.of_label


def _with_gradients_forward(layer: _Layer, *arrays: Any) -> tuple[Any, Any]:
    return _with_gradients(layer, *arrays), arrays


_LABELS = 3  # their place among the arguments: the only ones that have no derivative


def _of_floats(layer: _Layer, arrays: Any) -> tuple[Any, list[Any]]:
    """`_with_gradients_definition` as a function of what has a derivative."""
    floats = list(arrays)
    labels = floats.pop(_LABELS)

    def function(*floats: Any) -> Any:
        every = [*floats[:_LABELS], labels, *floats[_LABELS:]]
        return _with_gradients_definition(layer, *every)

    return function, floats


def _with_gradients_backward(
    layer: _Layer, residuals: Any, cotangents: Any
) -> tuple[Any, ...]:
    function, floats = _of_floats(layer, residuals)
    found = list(jax.vjp(function, *floats)[1](cotangents))
    found.insert(_LABELS, None)
    return tuple(found)


def _with_gradients_pushforward(
    layer: _Layer, residuals: Any, tangents: tuple[Any, ...]
) -> Any:
    function, floats = _of_floats(layer, residuals)
    dots = list(tangents)
    dots.pop(_LABELS)
    given = [
        jnp.zeros_like(x) if t is None and x is not None else t
        for x, t in zip(floats, dots, strict=True)
    ]
    return jax.jvp(function, tuple(floats), tuple(given))[1]


_with_gradients_rule.defvjp(_with_gradients_forward, _with_gradients_backward)
_with_gradients = forward_mode(_with_gradients_rule, _with_gradients_pushforward)


# --- a weighted sum of losses: keeps its gradients ------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weighted_sum_rule(layer: _Layer, *arrays: Any) -> jax.Array:
    x, weights, bias, labels, label_weight, weight = arrays
    numbers = _statistics(layer, x, weights, bias, None, None, labels)
    return _losses.weighted_terms(layer.rows, numbers.of_label, label_weight, weight)[0]


def _weighted_sum_forward(layer: _Layer, *arrays: Any) -> tuple[jax.Array, Any]:
    grads, numbers = _with_gradients(layer, *arrays)
    total, nll, term = _losses.weighted_terms(layer.rows, numbers, *arrays[-2:])
    return total, (grads, nll, term)


def _weighted_sum_backward(
    layer: _Layer, residuals: Any, g: jax.Array
) -> tuple[Any, ...]:
    grads, nll, term = residuals

    def times(a: jax.Array) -> jax.Array:
        return (a.astype(g.dtype) * g).astype(a.dtype)

    return *jax.tree.map(times, tuple(grads)), None, g * nll, g * term


def _weighted_sum_pushforward(
    layer: _Layer, residuals: Any, tangents: tuple[Any, ...]
) -> jax.Array:
    grads, nll, term = residuals
    dots = list(tangents)
    dots.pop(_LABELS)
    y_dot = jnp.zeros((), nll.dtype)
    for gradient, t in zip((*grads, nll, term), dots, strict=True):
        if t is not None:
            both = (gradient.astype(nll.dtype), t.astype(nll.dtype))
            y_dot = y_dot + jnp.sum(both[0] * both[1])
    return y_dot


_weighted_sum_rule.defvjp(_weighted_sum_forward, _weighted_sum_backward)
_weighted_sum = forward_mode(
    _weighted_sum_rule, _weighted_sum_pushforward, narrow=_narrow
)


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


def _gradient_fits(layer: _Layer, arrays: _Arrays) -> bool:
    """Whether the budget has room for the gradient that the forward computes.

    For that of the logits of all tokens; or, where it is added up over groups of them,
    the float32 one of the weights.
    """
    vocabulary = layer.vocabulary(arrays.weights)
    of_all = arrays.rows.labels.size * vocabulary * layer.rows.in_dtype.itemsize
    of_weights = arrays.weights.size * layer.working.itemsize
    return layer.budget >= min(of_all * (1 + 1 / _PARTS), of_weights)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(loss: Loss, layer: _Layer, arrays: _Arrays) -> Any:
    x, weights, bias, scale, rows = arrays
    if (
        _losses.in_one_pass(loss, rows, layer.rows.in_dtype)
        and scale is None
        and _gradient_fits(layer, arrays)
    ):
        of_rows = _losses.reduce_weights(loss, rows, layer.working)
        layer = dataclasses.replace(layer, rows=_losses.of_sum(loss, layer.rows))
        return _weighted_sum(layer, x, weights, bias, rows.labels, *of_rows)
    smoothed = None
    if loss.label_smoothing and rows.class_weights is not None:
        smoothed = rows.class_weights
        if bias is not None:
            # What has no part in a row costs nothing.
            smoothed = jnp.where(bias == -jnp.inf, 0, smoothed)
    numbers = _statistics(layer, x, weights, bias, scale, smoothed, rows.labels)

    def weighted_spread(_: Statistics) -> jax.Array:
        found = numbers.of_classes
        assert found is not None
        assert found.entries is not None
        of_counted = _losses.only(rows.counted, found.nll)
        return of_counted / jnp.maximum(found.entries, 1)

    return _losses.from_statistics(loss, rows, numbers.of_label, weighted_spread)


@functools.partial(jax.jit, static_argnums=0)
def _run_token_statistics(layer: _Layer, arrays: _Arrays) -> TokenStatistics:
    x, weights, bias, scale, rows = arrays
    numbers = _statistics(layer, x, weights, bias, scale, None, rows.labels)
    return _losses.token_statistics(layer.rows, rows, numbers.of_label)


def _prepare(
    x: ArrayLike,
    labels: ArrayLike,
    weights: ArrayLike,
    *,
    bias: ArrayLike | None,
    vocab_axis: int,
    where: ArrayLike | None,
    ignore_index: int | None,
    logit_softcap: float | None,
    scale: ArrayLike | None,
    precision: Any,
    memory_budget: int | None,
    implementation: str | Sequence[str] | None,
    class_weights: ArrayLike | None = None,
    spread: bool = False,
    entropy: bool = False,
) -> tuple[_Layer, _Arrays]:
    """Checks the arguments; returns the static part and the arrays."""
    asked = _dispatch.resolve(implementation)
    x, weights, vocab_first = _arguments.check_layer(x, weights, vocab_axis)
    vocabulary = weights.shape[0 if vocab_first else 1]
    bias = _arguments.check_bias(bias, vocabulary)
    tokens = x.shape[:-1]
    operands = jnp.promote_types(x.dtype, weights.dtype)
    working = xla.working_dtype(operands)
    labels = _arguments.check_labels(labels, (*tokens, vocabulary), (-1,))
    ignore_index = _arguments.check_ignore_index(ignore_index, labels.dtype)
    labels = _losses.indices(labels, ignore_index, (vocabulary,), (-1,))
    like = jax.ShapeDtypeStruct(tokens, working)
    number, factor = _arguments.check_scale(scale, like, "the labels' shape")
    if factor is not None:
        factor = jnp.broadcast_to(factor.astype(working), tokens)[..., None]
    of_classes = _arguments.check_class_weights(class_weights, (vocabulary,))
    of_labels = None
    if of_classes is not None:
        of_classes = of_classes.astype(working)
        of_labels = _losses.weights_of_labels(of_classes, labels)
    examples = _arguments.check_examples(where, tokens)
    options = Options(
        softcap=_arguments.check_softcap(logit_softcap),
        spread=spread and of_classes is None,
        entropy=entropy,
    )
    budget = _arguments.check_memory_budget(
        memory_budget,
        least=_least_budget(labels.size, vocabulary, operands),
        default=max(_BUDGET_PER_WEIGHT * weights.size, _LEAST_BUDGET),
    )
    layer = _Layer(
        LossConfig((-1,), number, operands, working, asked, options),
        vocab_first,
        precision,
        budget,
    )
    rows = Rows(examples, labels, of_classes, of_labels)
    return layer, _Arrays(x, weights, bias, factor, rows)


def _least_budget(tokens: int, vocabulary: int, operands: np.dtype) -> int:
    """Bytes of the logits of a token, or of the smallest chunk of all tokens' if more.

    Of the latter there is the gradient too.
    """
    itemsize = xla.working_dtype(operands).itemsize
    of_chunk = tokens * least_chunk(vocabulary) * (itemsize + operands.itemsize)
    return max(vocabulary * itemsize, of_chunk)


def _logits(layer: _Layer, arrays: _Arrays) -> jax.Array:
    """All at once, for shapes in which there are none or nothing is summed."""
    logits = _linear(layer, arrays.x, arrays.weights, arrays.bias)
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
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    logit_softcap: float | None = None,
    scale: ArrayLike | None = None,
    class_weights: ArrayLike | None = None,
    reduction: str = "none",
    return_lse: bool = False,
    precision: Any = None,
    memory_budget: int | None = None,
    implementation: str | Sequence[str] | None = None,
) -> Any:
    r"""Cross-entropy of ``x @ weights + bias``, without storing these logits.

        softmax_cross_entropy_with_integer_labels(x @ weights + bias, labels, ...)

    with float32 logits, whatever the dtype of `x` and `weights`, and the options of
    that function. The logits are computed in chunks of tokens or classes and forgotten;
    what the backward keeps, and what it takes, does not grow with tokens times classes:

    - ``reduction="none"``: keeps the arguments and a few numbers a token, and computes
      the logits a second time. With the two gradients these are four matrix products.
    - ``reduction="sum"`` or ``"mean"``: the forward computes the gradients too and the
      backward multiplies them by a scalar. Three products; unless `memory_budget` is
      too little for that, or the call has `return_lse`, an array as `scale`, both
      `class_weights` and `label_smoothing`, or operands in float16.

    Where no gradient is taken, only the loss is computed; where that of `x` or of
    `weights` is not wanted, its product is left out. Every derivative mode works, in
    chunks too.

    Args:
      x: Floating, [..., H]: the hidden states of tokens.
      labels: Integers, [...]; as for `softmax_cross_entropy_with_integer_labels`.
      weights: Floating, [H, V]. The products are of the dtype that `x` and `weights`
        promote to, with sums in float32.
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
      scale: Multiplies the logits first (an inverse temperature): a finite Python
        number, or a real array that broadcasts to `labels`, which is differentiable.
      class_weights: Real array, [V].
      reduction: ``"none"``, ``"sum"``, or ``"mean"`` over the tokens that are counted.
      return_lse: Return the pair (loss, lse), both differentiable.
      precision: Of the matrix products, as for `jax.numpy.matmul`.
      memory_budget: Bytes that logits and their gradient may take at a time, beyond the
        gradients of the arguments. Default: 8 bytes for each entry of `weights`, and
        256 MiB at least. Where it is below 4 bytes for each entry of `weights`, and all
        tokens' logits in their dtype take more too, the gradient of `weights` is not
        added up in float32 but written in parts, for a fourth product.
      implementation: As for `softmax`: of the kernels that reduce a chunk's logits.

    Returns:
      The loss, float32: of the shape of `labels`, or a scalar. With `return_lse` also
      lse, of the shape of `labels`. The gradient of each argument has its dtype.

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
    layer, arrays = _prepare(
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
        spread=bool(_arguments.check_label_smoothing(label_smoothing)),
    )
    loss = Loss(
        layer.rows,
        float(label_smoothing),
        _arguments.check_z_loss(z_loss),
        _arguments.check_reduction(reduction),
        bool(return_lse),
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
    return _run(loss, layer, arrays)


def linear_token_logprobs_and_entropy(
    x: ArrayLike,
    labels: ArrayLike,
    weights: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    vocab_axis: int = 1,
    where: ArrayLike | None = None,
    ignore_index: int | None = None,
    logit_softcap: float | None = None,
    scale: ArrayLike | None = None,
    precision: Any = None,
    memory_budget: int | None = None,
    implementation: str | Sequence[str] | None = None,
) -> TokenStatistics:
    r"""Log-probabilities of labels and entropy, without storing the logits.

        token_logprobs_and_entropy(x @ weights + bias, labels, ...)

    computed as `linear_softmax_cross_entropy` does with ``reduction="none"``.

    Args:
      x: Floating, [..., H].
      labels: Integers, [...]; as for `token_logprobs_and_entropy`.
      weights: Floating, [H, V].
      bias: Floating, [V].
      vocab_axis: 0 where `weights` are [V, H].
      where: Bool mask of tokens that broadcasts to `labels`. Tokens that are masked
        have the log-probability and the entropy 0, and lse -inf.
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
      [-0.3409 -1.65  ]
      [0.7929 0.9762]
    """
    layer, arrays = _prepare(
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
    return _run_token_statistics(layer, arrays)
