"""Sizes of arrays, some of which may be symbolic."""

import math
from collections.abc import Sequence


def is_known(shape: Sequence[int]) -> bool:
    """Whether no size is symbolic, as some may be in a program for `jax.export`."""
    return all(isinstance(size, int) for size in shape)


def row_shape(shape: Sequence[int], axis: Sequence[int]) -> tuple[int, ...]:
    """The shape of an array with one number per row: 1 along what is reduced."""
    return tuple(1 if i - len(shape) in axis else n for i, n in enumerate(shape))


def row_size(shape: Sequence[int], axis: Sequence[int]) -> int:
    """The number of entries per row."""
    return math.prod(shape[a] for a in axis)
