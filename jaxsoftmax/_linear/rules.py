"""The derivative rules of cross-entropy behind a linear layer.

Logits are computed in chunks, used and forgotten. As for cross-entropy on logits, there
are two functions, lifted to every derivative mode:

- `statistics`: a few numbers per token, by chunks of tokens. The backward keeps the
  layer's arguments and these numbers. It computes the logits again, by chunks of the
  vocabulary: the gradient of a chunk of weights is then one product over all tokens,
  written once, and the array that is added up is the gradient of `x`, which is small.
- `weighted_sum`: the sum over tokens of losses with weights that are known before. Its
  forward, where a gradient is wanted, computes that too, from logits that are there:
  three products of this size instead of four. It keeps the gradient of the logits, in
  the arguments' dtype, of as many tokens as the budget allows, and then takes both
  products with it at once. Beyond that many tokens, the gradient of the weights is
  added up in float32.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxsoftmax._compat import trace
from jaxsoftmax._core.autodiff import forward_mode, lift_definition, lift_gradients
from jaxsoftmax._linear.chunks import (
    ClassChunks,
    FilledClasses,
    TokenChunks,
    over_chunks,
    over_chunks_into,
    over_pieces,
)
from jaxsoftmax._linear.layer import (
    BIAS,
    LABELS,
    WEIGHTS,
    Gradients,
    Layer,
    X,
    gradients,
    linear,
    per_class,
    sum_over_tokens,
    targets,
    weights_of_rows,
)
from jaxsoftmax._rows import loss_terms, row_loss, several_labels, sharded, xla_loss
from jaxsoftmax._rows.row_loss import Statistics
from jaxsoftmax._rows.scaling import finite, multiply


def _narrow(layer: Layer, wanted: tuple[int, ...]) -> Layer:
    return dataclasses.replace(layer, wanted=wanted)


# --- statistics of tokens -------------------------------------------------------------

# With each token's label; and, where there are class weights, with these in its place.
_Numbers = list[Statistics]


def _filled(
    layer: Layer,
    filling: FilledClasses,
    weights: jax.Array,
    bias: jax.Array | None,
    tokens: int,
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """Padded weights in the operands' dtype, padded bias, and a mask of the classes."""
    return (
        filling.fill(weights.astype(layer.operands), layer.vocab_axis),
        None if bias is None else filling.fill(bias, 0),
        None if filling.full else per_class(filling.is_class(), tokens),
    )


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
    plan = layer.plan(x, weights)
    filling = plan.filled
    soft = labels if row_loss.is_dense(labels) else None
    one_label = soft is None and not several_labels.several(labels, x)
    chunks, classes = plan.forward if one_label else plan.whole_rows
    forward = str(chunks) if classes.count == 1 else f"{chunks} by {classes}"
    by = " by ".join(map(str, plan.recomputed))
    layer = layer.with_chunks(f"{forward}; backward {by}")
    if classes.count > 1:
        arrays = _ClassArrays(weights, bias, class_weights, None)
        return _statistics_by_classes(layer, chunks, classes, x, labels, scale, arrays)
    if soft is None:
        labels = filling.place(labels)
    weights, bias, where = _filled(layer, filling, weights, bias, x.ndim - 1)
    if class_weights is not None:
        class_weights = filling.fill(class_weights, 0)

    def reduce_chunk(i: Any, x: jax.Array, labels: Any, scale: Any) -> _Numbers:
        logits = linear(layer, x, weights, bias, scale)
        if soft is not None:
            labels = filling.fill(chunks.take(i, soft), x.ndim - 1)
        compared = targets(layer, logits, labels, class_weights)
        return [
            loss_terms.row_statistics(call, logits, where, target)
            for call, target in compared
        ]

    split = (
        jnp.arange(chunks.count, dtype=np.int32),
        chunks.split(x),
        None if soft is not None else chunks.split(labels, row_loss.IGNORED),
        None if scale is None else chunks.split(scale),
    )
    return jax.tree.map(chunks.join, over_chunks(reduce_chunk, split))


def _statistics_by_classes(
    layer: Layer,
    chunks: TokenChunks,
    classes: ClassChunks,
    x: jax.Array,
    labels: jax.Array,
    scale: jax.Array | None,
    arrays: "_ClassArrays",
) -> _Numbers:
    """The statistics from those of chunks of the vocabulary."""
    folded = _map_classes(layer, chunks, classes.fold, arrays)
    split = (
        chunks.split(x),
        chunks.split(labels, row_loss.IGNORED),
        None if scale is None else chunks.split(scale),
    )

    def reduce_classes(chunk: jax.Array) -> Any:
        slice_ = functools.partial(classes.slice, chunk)
        weights, bias, class_weights, _ = _map_classes(layer, chunks, slice_, folded)
        assert weights is not None
        where = None
        if not classes.even:
            where = jnp.tile(classes.owned(chunk), (classes.folds, 1))
            where = per_class(where, x.ndim - 1)

        def reduce_tokens(x: jax.Array, labels: jax.Array, scale: Any) -> Any:
            scale = None if scale is None else scale[..., None]
            logits = linear(layer, x, weights, bias, scale)
            index = _labels_of_chunk(labels, classes, chunk)
            compared = targets(layer, logits, index[..., None], class_weights, 2)
            states = [
                loss_terms.row_state(call, logits, where, target)
                for call, target in compared
            ]
            return jax.tree.map(lambda a: jnp.squeeze(a, -1), states), index

        return over_chunks(reduce_tokens, split)

    every = jnp.arange(classes.count, dtype=np.int32)
    states, index = over_chunks(reduce_classes, (every,))
    call = layer.row_call(1)
    found = []
    for state in states:
        merged = sharded.merge_stacked(state, index, call.unit)
        like = split[1] if merged.label_sum is None else merged.label_sum
        options = row_loss.Options(
            softcap=call.loss.softcap,
            uniform_nll=state.entries is not None,
            entropy=state.below_weighted is not None,
        )
        found.append(row_loss.statistics(merged, like, options))
    return jax.tree.map(chunks.join, found)


def _statistics_forward(layer: Layer, *arrays: Any) -> tuple[_Numbers, Any]:
    numbers = statistics(layer, *arrays)
    return numbers, (*arrays, numbers)


# --- their pullback: logits are computed again, by chunks of the vocabulary -----------


class _ClassArrays(NamedTuple):
    """Arrays with the vocabulary among their dimensions, or one chunk of it.

    `labels` are those that are weights, [*tokens, ...].
    """

    weights: jax.Array | None
    bias: jax.Array | None
    class_weights: jax.Array | None
    labels: jax.Array | None


def _map_classes(
    layer: Layer,
    pieces: TokenChunks,
    f: Callable[..., jax.Array],
    *arrays: _ClassArrays,
) -> _ClassArrays:
    """``f(*arrays, their vocabulary's axis)`` of each array that is there."""
    axes = (layer.vocab_axis, 0, 0, len(pieces.shape))
    groups = zip(*arrays, axes, strict=True)
    return _ClassArrays(*(None if group[0] is None else f(*group) for group in groups))


def _labels_of_chunk(labels: jax.Array, chunks: ClassChunks, chunk: Any) -> jax.Array:
    """Indices in a chunk of the vocabulary, of the classes that it owns."""
    if chunks.count == 1:
        return labels
    part, place = labels // chunks.length, labels % chunks.length
    inside = (place >= chunks.start(chunk)) & (place < chunks.start(chunk + 1))
    place = place - chunks.start(chunk)
    index = jnp.where(inside, part * chunks.width + place, row_loss.ELSEWHERE)
    return jnp.where(labels < 0, labels, index)


class _TokenArrays(NamedTuple):
    """Arrays with the tokens among their dimensions, [pieces, *piece, ...] each.

    `labels` are those that are indices.
    """

    x: jax.Array
    labels: jax.Array | None
    scale: jax.Array | None
    numbers: _Numbers
    cotangents: _Numbers


def _gradients_of_chunk(
    layer: Layer,
    pieces: TokenChunks,
    chunks: ClassChunks,
    chunk: Any,
    tokens: _TokenArrays,
    classes: _ClassArrays,
) -> tuple[tuple[Any, Any], _ClassArrays]:
    """The terms of the gradients of x and scale; the gradients of a chunk's arrays."""
    weights, bias, class_weights, soft = classes
    assert weights is not None
    rank = tokens.x.ndim - 2
    where = None
    if not chunks.even:
        where = per_class(chunks.owned(chunk).reshape(1, -1), rank)

    def expand(a: jax.Array) -> jax.Array:
        """[*tokens, 1, ...], to broadcast over both dimensions of the vocabulary."""
        return jnp.expand_dims(a, rank)

    def pull_piece(i: Any, *piece: Any) -> tuple[jax.Array, Any, Any, Any]:
        x, labels, *rest = piece
        scale, numbers, cotangents = jax.tree.map(expand, rest)
        raw = linear(layer, x, weights, bias)
        logits = raw if scale is None else multiply(raw, scale, None)
        if soft is None:
            labels = expand(_labels_of_chunk(labels, chunks, chunk))
        else:
            labels = pieces.take(i, soft)
        compared = targets(layer, logits, labels, class_weights, classes=2)
        pulled = [
            several_labels.pullback(
                call, (logits, where, target, each), ct, whole_rows=False
            )
            for (call, target), each, ct in zip(
                compared, numbers, cotangents, strict=True
            )
        ]
        d = functools.reduce(jnp.add, (dlogits for dlogits, _ in pulled))
        dscale = dclass_weights = None
        dlabels = pulled[0][1] if LABELS in layer.wanted else None
        if class_weights is not None:
            dclass_weights = pulled[-1][1]
            assert dclass_weights is not None
            dtype = dclass_weights.dtype
            dclass_weights = sum_over_tokens(dclass_weights, rank, dtype)
        if scale is not None:
            wide = d.astype(layer.working)
            # As in `multiply`: of a gradient of 0, not 0 inf.
            dscale = jnp.sum(wide * finite(raw), -1)
            dscale = jnp.sum(dscale, -1, keepdims=True)
            d = (wide * finite(scale)).astype(d.dtype)
        return d, dscale, dclass_weights, dlabels

    every = jnp.arange(pieces.count, dtype=np.int32)
    d, dscale, dclass_weights, dlabels = over_pieces(pull_piece, (every, *tokens))
    dtypes = (layer.working, weights.dtype, None if bias is None else bias.dtype)
    dx, dweights, dbias = gradients(layer, tokens.x, weights, bias, d, dtypes)
    if dclass_weights is not None:
        dclass_weights = jnp.sum(dclass_weights, 0)
    if dlabels is not None:
        dlabels = pieces.join(dlabels)
    return (dx, dscale), _ClassArrays(dweights, dbias, dclass_weights, dlabels)


def _over_class_chunks(
    layer: Layer,
    pieces: TokenChunks,
    chunks: ClassChunks,
    tokens: _TokenArrays,
    classes: _ClassArrays,
) -> tuple[tuple[Any, Any], _ClassArrays]:
    """The gradients of x and scale, and those of the arrays of the vocabulary."""
    map_classes = functools.partial(_map_classes, layer, pieces)
    folded = map_classes(chunks.fold, classes)

    # Computed again where a derivative of this is taken: no logits are kept for it.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def pull_chunk(chunk: Any, tokens: _TokenArrays, classes: _ClassArrays) -> Any:
        return _gradients_of_chunk(layer, pieces, chunks, chunk, tokens, classes)

    def step(carry: Any, chunk: Any) -> tuple[Any, None]:
        totals, wholes = carry
        slice_, put = (functools.partial(f, chunk) for f in (chunks.slice, chunks.put))
        terms, parts = pull_chunk(chunk, tokens, map_classes(slice_, folded))
        wholes = map_classes(put, wholes, parts)
        return (jax.tree.map(jnp.add, totals, terms), wholes), None

    if chunks.count == 1:
        totals, wholes = pull_chunk(np.int32(0), tokens, folded)
    else:
        like = (tokens, classes.weights)
        totals = (tokens.x if X in layer.wanted else None, tokens.scale)
        wholes = _ClassArrays(
            folded.weights if WEIGHTS in layer.wanted else None,
            folded.bias if BIAS in layer.wanted else None,
            folded.class_weights,
            folded.labels if LABELS in layer.wanted else None,
        )
        start = (
            jax.tree.map(lambda a: trace.zeros(a.shape, layer.working, like), totals),
            jax.tree.map(lambda a: trace.unwritten(a.shape, a.dtype, like), wholes),
        )
        every = jnp.arange(chunks.count, dtype=np.int32)
        (totals, wholes), _ = lax.scan(step, start, every)
    return totals, map_classes(chunks.unfold, wholes)


def _statistics_backward(
    layer: Layer, residuals: Any, cotangents: _Numbers
) -> tuple[Any, ...]:
    x, weights, bias, scale, class_weights, labels, numbers = residuals
    pieces, chunks = layer.plan(x, weights).recomputed
    # A token without a gradient has no part in that of the weights, NaN or not.
    alive = xla_loss.with_cotangent(cotangents)
    x, scale, numbers = row_loss.only(alive, (x, scale, numbers))
    soft = labels if row_loss.is_dense(labels) else None
    tokens = _TokenArrays(
        pieces.split(x),
        None if soft is not None else pieces.split(labels, row_loss.IGNORED),
        *jax.tree.map(pieces.split, (scale, numbers, cotangents)),
    )
    classes = _ClassArrays(weights, bias, class_weights, soft)
    totals, (dweights, dbias, dclass_weights, dlabels) = _over_class_chunks(
        layer, pieces, chunks, tokens, classes
    )
    dx, dscale = jax.tree.map(pieces.join, totals)
    if dx is not None:
        dx = dx.astype(x.dtype)
    return dx, dweights, dbias, dscale, dclass_weights, dlabels


def _differentiable(layer: Layer) -> Layer:
    """The layer whose pullback and pushforward jax can differentiate."""
    return dataclasses.replace(layer, rows=several_labels.definition_of(layer.rows))


def _only_tokens(valid: jax.Array | None, arrays: Sequence[Any]) -> tuple[Any, ...]:
    """The arguments, their gradients or tangents, with 0 for other tokens."""
    x, weights, bias, scale, *rest = arrays
    x, scale = row_loss.only(valid, (x, scale))
    return x, weights, bias, scale, *rest


def _backward_definition(
    layer: Layer, residuals: Any, cotangents: _Numbers
) -> tuple[Any, ...]:
    """A token without a gradient has no part in another derivative either."""
    found = _statistics_backward(_differentiable(layer), residuals, cotangents)
    return _only_tokens(xla_loss.with_cotangent(cotangents), found)


# --- and their pushforward: logits and tangents, by chunks of tokens ------------------


def _statistics_pushforward(
    layer: Layer, residuals: Any, tangents: tuple[Any, ...]
) -> _Numbers:
    x, weights, bias, scale, class_weights, labels, numbers = residuals
    x_dot, weights_dot, bias_dot, scale_dot, class_weights_dot, labels_dot = tangents
    chunks = layer.plan(x, weights).pushforward
    soft = labels if row_loss.is_dense(labels) else None

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def push_chunk(
        i: Any,
        x: Any,
        x_dot: Any,
        labels: Any,
        numbers: Any,
        scale: Any,
        scale_dot: Any,
    ) -> _Numbers:
        logits = linear(layer, x, weights, bias)
        dot = jnp.zeros_like(logits)
        if x_dot is not None:
            dot = dot + linear(layer, x_dot, weights, None)
        if weights_dot is not None:
            dot = dot + linear(layer, x, weights_dot, None)
        if bias_dot is not None:
            dot = dot + per_class(bias_dot.astype(dot.dtype), x.ndim - 1)
        if scale is not None:
            dot = dot * finite(scale)
            if scale_dot is not None:
                dot = dot + finite(logits) * scale_dot
            logits = multiply(logits, scale, None)
        if soft is not None:
            labels = chunks.take(i, soft)
        compared = targets(layer, logits, labels, class_weights)
        dots = [None, class_weights_dot]
        if labels_dot is not None:
            dots[0] = chunks.take(i, labels_dot)
        if class_weights_dot is not None:
            dots[1] = weights_of_rows(class_weights_dot, logits)
        return [
            several_labels.pushforward(
                call, (logits, None, target, each), dot, target_dot
            )
            for (call, target), each, target_dot in zip(
                compared, numbers, dots, strict=False
            )
        ]

    split = (jnp.arange(chunks.count, dtype=np.int32),)
    split += jax.tree.map(chunks.split, (x, x_dot))
    split += (None if soft is not None else chunks.split(labels, row_loss.IGNORED),)
    split += jax.tree.map(chunks.split, (numbers, scale, scale_dot))
    return jax.tree.map(chunks.join, over_chunks(push_chunk, split))


def _pushforward_definition(
    layer: Layer, residuals: Any, tangents: tuple[Any, ...]
) -> _Numbers:
    """A token without a loss has no part in another derivative, NaN or not."""
    *arrays, labels, numbers = residuals
    valid = None
    if not row_loss.is_dense(labels):
        valid = labels != row_loss.IGNORED
        if several_labels.several(labels, arrays[0]):
            valid = jnp.any(valid, -1)
    arrays = _only_tokens(valid, arrays)
    residuals = (*arrays, labels, row_loss.only(valid, numbers))
    tangents = _only_tokens(valid, tangents)
    return _statistics_pushforward(_differentiable(layer), residuals, tangents)


_statistics_rule.defvjp(_statistics_forward, _statistics_backward)
statistics = forward_mode(
    _statistics_rule,
    _statistics_pushforward,
    pushforward_definition=_pushforward_definition,
    pullback_definition=_backward_definition,
    narrow=_narrow,
)


# --- the gradient of a weighted sum, from the pass that computes it -------------------


class _PaddedLayer(NamedTuple):
    """A layer for groups of tokens.

    Attributes:
      layer: The static part.
      weights, bias: The padded arrays.
      where: The classes that are no padding, or None for all.
      dtypes: Those of the gradients of x, weights and bias.
    """

    layer: Layer
    weights: jax.Array
    bias: jax.Array | None
    where: jax.Array | None
    dtypes: tuple[Any, Any, Any]


def _gradients_of_group(
    padded: _PaddedLayer, group: tuple[jax.Array, ...]
) -> tuple[Gradients, Statistics]:
    """The gradients of a group of tokens, and their statistics.

    The group is x, labels, label weights and weights, [chunks, *chunk, ...] each.
    """
    layer = padded.layer
    if layer.operands == layer.working:
        return _gradients_in(layer.operands, padded, group)
    # XLA for CPU multiplies a float32 copy of what is in 16 bits; and to write a piece
    # of that, before jax 0.11, it converts all of it, to float32 and back
    # (tests/core/test_workarounds.py).
    return lax.platform_dependent(
        group,
        cpu=lambda group: _gradients_in(layer.working, padded, group),
        default=lambda group: _gradients_in(layer.operands, padded, group),
    )


def _gradients_in(
    dtype: np.dtype, padded: _PaddedLayer, group: tuple[jax.Array, ...]
) -> tuple[Gradients, Statistics]:
    """`_gradients_of_group`; the gradient of the logits is in `dtype`."""
    layer, weights, bias, where, dtypes = padded
    call = layer.row_call(1)

    def reduce_chunk(
        into: tuple[jax.Array, jax.Array] | None, x: jax.Array, *rows: jax.Array
    ) -> tuple[jax.Array, Statistics]:
        logits = linear(layer, x, weights, bias)
        return loss_terms.row_statistics_and_gradient(
            call, logits, where, *rows, into=into
        )

    tokens = group[0].shape[:-1]
    if tokens[0] == 1:
        found = reduce_chunk(None, *(a[0] for a in group))
        d, numbers = jax.tree.map(lambda a: a[None], found)
        d = d.astype(dtype)
    else:
        shape = (*tokens, weights.shape[layer.vocab_axis])
        d, numbers = over_chunks_into(
            lambda whole, place, *chunk: reduce_chunk((whole, place), *chunk),
            trace.unwritten(shape, dtype, (group, weights)),
            group,
        )
    products = layer.with_operands(dtype)
    return gradients(products, group[0], weights, bias, d, dtypes), numbers


def _with_gradients_forward(
    layer: Layer,
    x: jax.Array,
    weights: jax.Array,
    bias: jax.Array | None,
    labels: jax.Array,
    label_weight: jax.Array,
    weight: jax.Array,
    used: jax.Array,
) -> tuple[Gradients, Statistics]:
    plan = layer.plan(x, weights)
    filling, split = plan.filled, plan.gradient
    layer = layer.with_chunks(str(split))
    one_group = split.groups == 1
    padded = _PaddedLayer(
        layer,
        *_filled(layer, filling, weights, bias, x.ndim - 1),
        dtypes=(
            layer.working if x.dtype.itemsize == 1 else layer.operands,
            weights.dtype if one_group else layer.working,
            bias.dtype if one_group and bias is not None else layer.working,
        ),
    )
    # A token that has no loss has no part in the weights' gradient, NaN or not.
    arrays = (
        split.split(row_loss.only(used, x)),
        split.split(filling.place(labels), row_loss.IGNORED),
        split.split(label_weight),
        split.split(weight),
    )
    if one_group:
        group = jax.tree.map(lambda a: a[0], arrays)
        (dx, dweights, dbias), numbers = _gradients_of_group(padded, group)
        dx, numbers = jax.tree.map(lambda a: a[None], (dx, numbers))
    else:

        def step(sums: Any, group: Any) -> tuple[Any, Any]:
            grads, numbers = _gradients_of_group(padded, group)
            added = jax.tree.map(jnp.add, sums, (grads.weights, grads.bias))
            return added, (grads.x, numbers)

        summed = (
            padded.weights if WEIGHTS in layer.wanted else None,
            padded.bias if BIAS in layer.wanted else None,
        )
        like = (arrays, padded.weights)
        start = jax.tree.map(
            lambda a: trace.zeros(a.shape, layer.working, like), summed
        )
        (dweights, dbias), (dx, numbers) = lax.scan(step, start, arrays)
    if dx is not None:
        dx = split.join(dx).astype(x.dtype)
    if dweights is not None:
        dweights = filling.strip(dweights, layer.vocab_axis).astype(weights.dtype)
    if dbias is not None:
        assert bias is not None
        dbias = filling.strip(dbias, 0).astype(bias.dtype)
    return Gradients(dx, dweights, dbias), jax.tree.map(split.join, numbers)


def _with_gradients_definition(
    layer: Layer, *arrays: Any
) -> tuple[Gradients, Statistics]:
    *layer_arrays, labels, label_weight, weight, used = arrays
    wanted = {i: a for i, a in enumerate(layer_arrays) if i in layer.wanted}

    def label_statistics(wanted: dict[int, jax.Array]) -> Statistics:
        given = [wanted.get(i, a) for i, a in enumerate(layer_arrays)]
        (numbers,) = statistics(layer, *given, None, None, labels)
        return numbers

    numbers, pull = jax.vjp(label_statistics, wanted)
    cotangents = xla_loss.cotangents_of_sum(
        row_loss.only(used, numbers), label_weight, weight, layer.rows
    )
    (found,) = pull(cotangents)
    return Gradients(*(found.get(i) for i in (X, WEIGHTS, BIAS))), numbers


_with_gradients = lift_definition(_with_gradients_forward, _with_gradients_definition)


# --- a weighted sum of losses: keeps its gradients ------------------------------------


def _used(
    x: jax.Array, label_weight: jax.Array, weight: jax.Array, used: jax.Array | None
) -> jax.Array:
    """The tokens that have a part: those with a weight that is not 0.

    And of those that are `used`, for a derivative by the weights, those that are finite
    where the weights are 0.
    """
    weighted = row_loss.used_rows(label_weight, weight)
    if used is None:
        return weighted
    return weighted | (used & jnp.all(jnp.isfinite(x), -1, keepdims=True))


def _weighted_sum_loss(layer: Layer, *arrays: Any) -> tuple[jax.Array, Statistics]:
    x, weights, bias, labels, label_weight, weight, used = arrays
    used = _used(x, label_weight, weight, used)
    (numbers,) = statistics(layer, x, weights, bias, None, None, labels)
    total, *_ = loss_terms.weighted_terms(
        layer.rows, numbers, label_weight, weight, used
    )
    return total, numbers


def _weighted_sum_forward(layer: Layer, *arrays: Any) -> tuple[Any, Any]:
    x, *_, label_weight, weight, used = arrays
    used = _used(x, label_weight, weight, used)
    grads, numbers = _with_gradients(layer, *arrays[:-1], used)
    total, nll, term = loss_terms.weighted_terms(
        layer.rows, numbers, label_weight, weight, used
    )
    return (total, numbers), (*grads, None, nll, term, None)


weighted_sum = lift_gradients(_weighted_sum_loss, _weighted_sum_forward, narrow=_narrow)
