"""The primitive ``linear_loss``: transforms and meshes that are handled once.

The functions beneath it have rules of their own. Three things are decided here, for the
whole loss, instead of in each of these rules:

- `jax.vmap` over tokens, not over the layer: the mapped axis becomes one more dimension
  of tokens, over which no loss is summed. Rules that are mapped themselves would
  compute a gradient of the layer's weights for each entry, only to add these up.
- Meshes with explicit axes: inside, XLA lays out arrays; results follow the tokens.
- Inside `jax.shard_map`: all arrays vary over the axes that any varies over, so that
  the gradient of what all devices have is added up over these.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxsoftmax._core import partitioning, primitive
from jaxsoftmax._core.autodiff import jvp_of_some, moving_floats
from jaxsoftmax._core.primitive import Arrays, Axes
from jaxsoftmax._linear.layer import Layer
from jaxsoftmax._linear.rules import statistics, weighted_sum
from jaxsoftmax._rows import loss_terms, row_loss, several_labels
from jaxsoftmax._rows.loss_terms import Loss, Rows
from jaxsoftmax._rows.row_loss import Statistics


@dataclasses.dataclass(frozen=True)
class _Spec:
    """The parameter of the ``linear_loss`` primitive: all of a call but its arrays.

    Attributes:
      loss, layer: The static part.
      tree: The structure of the arrays of tokens and of those that all tokens share.
      count: The number of the former, which come first.
      vmapped_dims: The number of mapped axes: as many dimensions of tokens, the first
        ones, over which no loss is summed.
    """

    loss: Loss
    layer: Layer
    tree: Any
    count: int
    vmapped_dims: int = 0

    def run(self, *arrays: jax.Array) -> Arrays:
        return jax.tree.leaves(_run(self, *jax.tree.unflatten(self.tree, arrays)))


@functools.partial(jax.jit, static_argnums=0)
def _run(spec: _Spec, tokens: Any, shared: Any) -> Any:
    """The results; the arguments are those of `call`."""
    loss, layer = spec.loss, spec.layer
    x, scale, examples, labels, sample_weights, own_weights = tokens
    weights, bias, class_weights, *coefficients = shared
    label_weights = None
    if row_loss.is_dense(labels):
        # No token's label says that it has no part, NaN or not.
        x = row_loss.only(examples, x)
        if class_weights is not None:
            labels = loss_terms.times_class_weights(labels, class_weights, examples)
    else:
        if examples is not None:
            behind = range(examples.ndim, labels.ndim)
            counted = jnp.expand_dims(examples, tuple(behind))
            labels = jnp.where(counted, labels, row_loss.IGNORED)
        if class_weights is not None:
            label_weights = loss_terms.weights_of_labels(class_weights, labels)
        examples = None
        if several_labels.several(labels, x):
            examples, label_weights = loss_terms.several_of_rows(
                labels, None, label_weights, own_weights
            )
    per_token = (label_weights, sample_weights)
    rows = Rows(examples, labels, class_weights, *per_token, *coefficients)
    if (
        # Under vmap the cotangent of each entry is unknown in the forward.
        spec.vmapped_dims == 0
        and loss_terms.in_one_pass(loss, rows, layer.operands)
        and scale is None
        and layer.plan(x, weights).gradients_fit
    ):
        row_weights = loss_terms.reduce_weights(loss, rows, layer.working)
        used = None if sample_weights is None else rows.counted
        value, numbers = weighted_sum(
            layer, x, weights, bias, labels, *row_weights, used
        )
        numbers = row_loss.only(rows.counted, numbers)
        return loss_terms.with_aux(loss, rows, numbers, value)
    smoothing = class_weights if loss_terms.smooths(loss, rows) else None
    if smoothing is not None and bias is not None:
        smoothing = jnp.where(bias == -jnp.inf, 0, smoothing)  # it has no part
    numbers, *weighted = statistics(layer, x, weights, bias, scale, smoothing, labels)
    if loss.call.loss.entropy:
        return loss_terms.token_statistics(loss.call, rows, numbers)

    rows, numbers = loss_terms.with_one_cost(rows, numbers)

    def uniform_nll(_: Statistics) -> jax.Array:
        (found,) = weighted
        nll = row_loss.only(rows.counted, found.nll)
        return nll / jnp.maximum(found.entries, 1)

    return loss_terms.from_statistics(
        loss, rows, numbers, uniform_nll, spec.vmapped_dims
    )


@functools.partial(jax.jit, static_argnums=0)
def _evaluate(spec: _Spec, *arrays: jax.Array) -> Arrays:
    def entries(arrays: Sequence[jax.Array]) -> Iterator[list[Any]]:
        # The dimensions of each result are the first ones of tokens, or all of them.
        return itertools.repeat(_token_spec(spec, arrays))

    return partitioning.left_to_compiler(spec.run, arrays, entries)


def _token_spec(spec: _Spec, arrays: Sequence[Any]) -> list[Any]:
    """The mesh axes of each dimension of tokens, from the first array that has any."""
    specs = [jax.typeof(x).sharding.spec for x in arrays[: spec.count]]
    entries: list[Any] = []
    used = set[Any]()
    # The last dimension of these arrays is not one of tokens.
    for each in list(itertools.zip_longest(*specs))[: arrays[0].ndim - 1]:
        entry = next((entry for entry in each if entry is not None), None)
        names = set(entry) if isinstance(entry, tuple) else {entry}
        entries.append(None if names & used else entry)
        used |= names - {None}
    return entries


linear_loss_p = primitive.new_primitive("linear_loss", _evaluate)


def _jvp(
    primals: Sequence[Any], tangents: Sequence[Any], *, spec: _Spec
) -> tuple[Arrays, Arrays]:
    """That of the function; arrays without a tangent stay without one."""
    moving = moving_floats(primals, tangents)
    return jvp_of_some(functools.partial(_evaluate, spec), primals, moving)


def _batch(
    arrays: Sequence[Any], axes: Axes, *, spec: _Spec
) -> tuple[Arrays, list[int]]:
    count = spec.count
    if any(axis is not None for axis in axes[count:]):
        # Each entry has a layer, and a gradient, of its own.
        mapped = jax.vmap(functools.partial(_evaluate, spec), in_axes=tuple(axes))
        outs = mapped(*arrays)
    else:
        moved = primitive.mapped_at(0, arrays[:count], axes[:count], arrays, axes)
        spec = dataclasses.replace(spec, vmapped_dims=spec.vmapped_dims + 1)
        outs = linear_loss_p.bind(*moved, *arrays[count:], spec=spec)
    return outs, [0] * len(outs)


primitive.set_rules(linear_loss_p, jvp=_jvp, batch=_batch)


def call(loss: Loss, layer: Layer, tokens: Any, shared: Any) -> Arrays:
    """A loss, in every transform: the leaves of its results.

    `tokens` are x, scale, examples, labels, sample weights and the weights of several
    labels: ``[*tokens, 1]`` but for x, several labels and labels that are weights, or
    None.
    `shared` is what all tokens share: weights, bias, class weights, and those of label
    smoothing and z-loss that are traced.
    """
    arrays, tree = jax.tree.flatten((tokens, shared))
    spec = _Spec(loss, layer, tree, len(jax.tree.leaves(tokens)))
    if primitive.standard_primitives_needed():
        return spec.run(*arrays)
    return list(linear_loss_p.bind(*arrays, spec=spec))
