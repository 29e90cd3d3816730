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
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import jax

from jaxsoftmax._core import partitioning, primitive
from jaxsoftmax._core.autodiff import jvp_of_some, moving_floats
from jaxsoftmax._core.primitive import Arrays, Axes


@dataclasses.dataclass(frozen=True)
class _Spec:
    """The parameter of the ``linear_loss`` primitive: all of a call but its arrays.

    Attributes:
      function, config: As `call` takes them.
      tokens, layer: The structures of these arguments.
      vmapped_dims: The number of mapped axes.
    """

    function: Callable[..., Any]
    config: Hashable
    tokens: Any
    layer: Any
    vmapped_dims: int = 0

    def split(self, arrays: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """The entries for arrays of tokens, and those for arrays of the layer."""
        count = self.tokens.num_leaves
        return list(arrays[:count]), list(arrays[count:])

    def run(self, *arrays: jax.Array) -> Arrays:
        tokens, layer = self.split(arrays)
        return jax.tree.leaves(
            self.function(
                self.config,
                self.vmapped_dims,
                jax.tree.unflatten(self.tokens, tokens),
                jax.tree.unflatten(self.layer, layer),
            )
        )


@functools.partial(jax.jit, static_argnums=0)
def _evaluate(spec: _Spec, *arrays: jax.Array) -> Arrays:
    def entries(arrays: Sequence[jax.Array]) -> Iterator[list[Any]]:
        # The dimensions of each result are the first ones of tokens, or all of them.
        return itertools.repeat(_token_spec(spec, arrays))

    return partitioning.left_to_compiler(spec.run, arrays, entries)


def _token_spec(spec: _Spec, arrays: Sequence[Any]) -> list[Any]:
    """The mesh axes of each dimension of tokens, from the first array that has any."""
    specs = [jax.typeof(x).sharding.spec for x in spec.split(arrays)[0]]
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
    token_axes, layer_axes = spec.split(axes)
    if any(axis is not None for axis in layer_axes):
        # Each entry has a layer, and a gradient, of its own.
        outs = jax.vmap(functools.partial(_evaluate, spec), in_axes=tuple(axes))(
            *arrays
        )
        return outs, [0] * len(outs)
    tokens, layer = spec.split(arrays)
    moved = primitive.mapped_at_front(tokens, token_axes, arrays, axes)
    mapped = dataclasses.replace(spec, vmapped_dims=spec.vmapped_dims + 1)
    outs = linear_loss_p.bind(*moved, *layer, spec=mapped)
    return outs, [0] * len(outs)


primitive.set_rules(linear_loss_p, jvp=_jvp, batch=_batch)


def call(
    function: Callable[..., Any], config: Hashable, tokens: Any, layer: Any
) -> Arrays:
    """A loss, in every transform.

    Args:
      function: ``(config, vmapped_dims, tokens, layer) -> a tree of arrays``, which is
        differentiable. The dimensions of each result are the first ones of tokens, or
        all of them; over the first `vmapped_dims` dimensions no loss is summed.
      config: Static, hashable.
      tokens: A tree of arrays that have the dimensions of tokens and one more.
      layer: A tree of arrays that all tokens share.

    Returns:
      The leaves of ``function(config, 0, tokens, layer)``.
    """
    token_arrays, token_tree = jax.tree.flatten(tokens)
    layer_arrays, layer_tree = jax.tree.flatten(layer)
    spec = _Spec(function, config, token_tree, layer_tree)
    if primitive.standard_primitives_needed():
        return spec.run(*token_arrays, *layer_arrays)
    return list(linear_loss_p.bind(*token_arrays, *layer_arrays, spec=spec))
