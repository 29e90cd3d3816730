"""How the rows of a kernel call lie in memory: what every kernel module starts from."""

import dataclasses
import itertools
import math
from collections.abc import Sequence

Axes = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Dim:
    """A dimension of an array as a kernel sees it: neighbours of one kind are merged.

    Attributes:
      size: At least 2.
      reduced: Whether a row extends along it.
      masked: Whether `where` varies along it; False too where there is no mask.
    """

    size: int
    reduced: bool
    masked: bool


def merge_dims(
    shape: Sequence[int], axis: Axes, where_shape: Sequence[int] | None
) -> tuple[Dim, ...]:
    """The fewest dimensions that still tell rows, columns and the mask apart.

    Args:
      shape: Shape of a contiguous array without empty dimensions.
      axis: The reduced dimensions, as negative ints.
      where_shape: Shape of the mask, of the same rank and broadcasting to `shape`; or
        None.

    Returns:
      The dimensions, outermost first. An array of one entry has none.

    Example:
      >>> for dim in merge_dims((2, 3, 4, 5), (-1,), (2, 1, 1, 5)):
      ...     print(dim)
      Dim(size=2, reduced=False, masked=True)
      Dim(size=12, reduced=False, masked=False)
      Dim(size=5, reduced=True, masked=True)
    """
    dims: list[Dim] = []
    for i, size in enumerate(shape):
        if size == 1:
            continue
        reduced = i - len(shape) in axis
        masked = where_shape is not None and where_shape[i] != 1
        last = dims[-1] if dims else None
        if last and (last.reduced, last.masked) == (reduced, masked):
            dims[-1] = dataclasses.replace(last, size=last.size * size)
        else:
            dims.append(Dim(size, reduced, masked))
    return tuple(dims)


def last_in_memory(dims: Sequence[Dim]) -> bool:
    """Whether a row's entries follow each other."""
    return not any(a.reduced and not b.reduced for a, b in itertools.pairwise(dims))


def strides(dims: Sequence[Dim], *, mask: bool = False) -> tuple[int, ...]:
    """Strides in entries of the array or of the mask, 0 where that is broadcast."""
    result: list[int] = []
    step = 1
    for dim in reversed(dims):
        if mask and not dim.masked:
            result.append(0)
            continue
        result.append(step)
        step *= dim.size
    return tuple(reversed(result))


def count(dims: Sequence[Dim], *, reduced: bool) -> int:
    """Entries per row or, if not `reduced`, the number of rows."""
    return math.prod(dim.size for dim in dims if dim.reduced == reduced)
