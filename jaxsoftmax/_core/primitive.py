"""Primitives that stand for calls under several vmaps."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Self

import jax

Arrays = list[jax.Array]
Axes = Sequence[int | None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vmapped:
    """A primitive's parameter that keeps the vmaps around a call.

    Attributes:
      batch_axes: An entry per vmap, innermost first: the axis that each array is mapped
        over, or None.
    """

    batch_axes: tuple[tuple[int | None, ...], ...] = ()

    def under_vmap(self, axes: Axes) -> Self:
        """The same under one more vmap."""
        return dataclasses.replace(self, batch_axes=(*self.batch_axes, tuple(axes)))

    def vmapped(self, f: Callable[..., Any]) -> Callable[..., Any]:
        """A function of the arrays of one call, under all vmaps."""
        for axes in self.batch_axes:
            f = jax.vmap(f, in_axes=axes)
        return f

    def unmapped(self, arrays: Sequence[Any]) -> tuple[list[tuple[int, ...]], Any]:
        """The arrays' shapes in one of the calls, and how many calls there are."""
        shapes, size = [tuple(x.shape) for x in arrays], 1
        # The outermost vmap is the last, and its axis is taken off first.
        for axes in reversed(self.batch_axes):
            pairs = list(zip(shapes, axes, strict=True))
            size *= next(shape[axis] for shape, axis in pairs if axis is not None)
            shapes = [
                shape if axis is None else (*shape[:axis], *shape[axis + 1 :])
                for shape, axis in pairs
            ]
        return shapes, size


def batch_by_vmap(primitive: Any) -> Callable[..., tuple[Arrays, list[int]]]:
    """The batching rule of a primitive whose parameter is a `Vmapped`."""

    def batch(
        arrays: Sequence[Any], axes: Axes, *, spec: Vmapped
    ) -> tuple[Arrays, list[int]]:
        outs = primitive.bind(*arrays, spec=spec.under_vmap(axes))
        return outs, [0] * len(outs)

    return batch


def batch_size(arrays: Sequence[Any], axes: Axes) -> int:
    """The size of the axis that some arrays are mapped over."""
    pairs = zip(arrays, axes, strict=True)
    return next(x.shape[axis] for x, axis in pairs if axis is not None)
