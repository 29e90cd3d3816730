"""A loss behind a linear layer as one operation, as transforms and meshes meet it.

Beneath it are functions with rules of their own, which a transform or a mesh would meet
one by one. Here is what is better decided for all of the loss:

- `jax.vmap` over tokens, not over the layer: the mapped axis becomes one more dimension
  of tokens, whose losses are kept apart. Rules that are mapped themselves would compute
  a gradient of the layer's weights for each entry, only for these to be added up.
- A mesh with explicit axes: within, these are left to XLA. How results lie is known.
- Inside `jax.shard_map`: all arrays vary over the axes that any varies over, so that
  the gradient of what all devices have is added up over these.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import jax

from jaxsoftmax import _compat
from jaxsoftmax._core import partitioning, standard_primitives
from jaxsoftmax._core.autodiff import moving_floats

Arrays = list[jax.Array]


@dataclasses.dataclass(frozen=True)
class _Spec:
    """The parameter of the ``linear_loss`` primitive: all of a call but its arrays.

    Attributes:
      function: As `call` takes it.
      config: Likewise.
      of_tokens, of_layer: The structures of these arguments.
      kept: How many mapped axes there are.
    """

    function: Callable[..., Any]
    config: Hashable
    of_tokens: Any
    of_layer: Any
    kept: int = 0

    def split(self, arrays: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """Separates what is of tokens from what is of the layer."""
        count = self.of_tokens.num_leaves
        return list(arrays[:count]), list(arrays[count:])

    def run(self, *arrays: jax.Array) -> Arrays:
        of_tokens, of_layer = self.split(arrays)
        return jax.tree.leaves(
            self.function(
                self.config,
                self.kept,
                jax.tree.unflatten(self.of_tokens, of_tokens),
                jax.tree.unflatten(self.of_layer, of_layer),
            )
        )


@functools.partial(jax.jit, static_argnums=0)
def _evaluate(spec: _Spec, *arrays: jax.Array) -> Arrays:
    def entries(arrays: Sequence[jax.Array]) -> Iterator[list[Any]]:
        # Each result has the first of the tokens' dimensions, all of them or some.
        return itertools.repeat(_spread_of_tokens(spec, arrays))

    return partitioning.left_to_compiler(spec.run, arrays, entries)


def _spread_of_tokens(spec: _Spec, arrays: Sequence[Any]) -> list[Any]:
    """Over which axes each dimension of tokens is spread: by the first that is."""
    specs = [jax.typeof(x).sharding.spec for x in spec.split(arrays)[0]]
    entries: list[Any] = []
    used = set[Any]()
    # Their last dimension is no token's.
    for each in list(itertools.zip_longest(*specs))[: arrays[0].ndim - 1]:
        entry = next((entry for entry in each if entry is not None), None)
        names = set(entry) if isinstance(entry, tuple) else {entry}
        entries.append(None if names & used else entry)
        used |= names - {None}
    return entries


linear_loss_p = _compat.new_primitive("linear_loss", _evaluate)


def _jvp(
    primals: Sequence[Any], tangents: Sequence[Any], *, spec: _Spec
) -> tuple[Arrays, list[Any]]:
    """Of what the call stands for; arrays without a tangent stay so."""
    moving = moving_floats(primals, tangents)
    if not moving:
        outs = linear_loss_p.bind(*primals, spec=spec)
        return outs, [_compat.zero_tangent(out) for out in outs]

    def of_moving(arrays: dict[int, jax.Array]) -> Arrays:
        return _evaluate(spec, *(arrays.get(i, x) for i, x in enumerate(primals)))

    given = {i: primals[i] for i in moving}
    return jax.jvp(of_moving, (given,), (moving,))


def _batch(
    arrays: Sequence[Any], axes: Sequence[int | None], *, spec: _Spec
) -> tuple[Arrays, list[int]]:
    _, axes_of_layer = spec.split(axes)
    if any(axis is not None for axis in axes_of_layer):
        # As many layers: each has a gradient of its own.
        outs = jax.vmap(functools.partial(_evaluate, spec), in_axes=tuple(axes))(
            *arrays
        )
        return outs, [0] * len(outs)
    size = next(
        x.shape[axis] for x, axis in zip(arrays, axes, strict=True) if axis is not None
    )
    mesh_axis = _compat.mapped_mesh_axis(arrays, axes)
    of_tokens, of_layer = spec.split(arrays)
    axes_of_tokens, _ = spec.split(axes)
    moved = [
        _compat.move_batch_axis_to_front(x, axis, size, mesh_axis)
        for x, axis in zip(of_tokens, axes_of_tokens, strict=True)
    ]
    kept = dataclasses.replace(spec, kept=spec.kept + 1)
    outs = linear_loss_p.bind(*moved, *of_layer, spec=kept)
    return outs, [0] * len(outs)


_compat.set_rules(linear_loss_p, jvp=_jvp, batch=_batch)


def call(
    function: Callable[..., Any], config: Hashable, of_tokens: Any, of_layer: Any
) -> Arrays:
    """A loss, in every transform.

    Args:
      function: ``(config, kept, of_tokens, of_layer) -> a tree of arrays``, each with
        the first dimensions of tokens, all or some. Losses of different entries along
        the first `kept` dimensions are not added up. Of functions that have a
        derivative.
      config: Static, hashable.
      of_tokens: A tree of arrays that have the dimensions of tokens and one more.
      of_layer: A tree of arrays that all tokens share.

    Returns:
      The arrays in ``function(config, 0, of_tokens, of_layer)``.
    """
    leaves, tree_of_tokens = jax.tree.flatten(of_tokens)
    others, tree_of_layer = jax.tree.flatten(of_layer)
    spec = _Spec(function, config, tree_of_tokens, tree_of_layer)
    if standard_primitives.are_needed():
        return spec.run(*leaves, *others)
    return list(linear_loss_p.bind(*leaves, *others, spec=spec))
