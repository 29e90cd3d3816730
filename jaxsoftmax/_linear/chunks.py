"""Arrays cut into chunks of tokens and of classes, and loops over them.

Chunk i of n along a dimension of tokens has the tokens i, n + i, 2 n + i, ...: if the
dimension is sharded, each device has its share of every chunk, and nothing moves. A
vocabulary is cut into equal parts first, and a chunk has a slice of each.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxsoftmax._compat import trace
from jaxsoftmax._rows.row_loss import unravel


@dataclasses.dataclass(frozen=True)
class TokenChunks:
    """Chunks of tokens.

    Attributes:
      shape: The dimensions of the tokens.
      sizes: Those of a chunk.
      counts: The number of chunks along each dimension.
    """

    shape: tuple[int, ...]
    sizes: tuple[int, ...]
    counts: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.count} x {math.prod(self.sizes)} tokens"

    @property
    def count(self) -> int:
        return math.prod(self.counts)

    def _cut(self, array: jax.Array, fill: Any) -> jax.Array:
        """``[*shape, ...] -> [size, count, size, count, ..., ...]``."""
        rest = array.shape[len(self.shape) :]
        pairs = list(zip(self.sizes, self.counts, strict=True))
        missing = [c * n - size for (c, n), size in zip(pairs, self.shape, strict=True)]
        if any(m != 0 for m in missing):
            widths = [*((0, m) for m in missing), *((0, 0) for _ in rest)]
            array = jnp.pad(array, widths, constant_values=fill)
        return array.reshape(*(n for pair in pairs for n in pair), *rest)

    def take(self, chunk: Any, array: jax.Array) -> jax.Array:
        """One chunk of ``[*shape, ...]``: `split` would copy an array that is large."""
        if self.count == 1:
            return array
        array = self._cut(array, 0)
        for d, place in reversed(list(enumerate(unravel(chunk, self.counts)))):
            array = lax.dynamic_index_in_dim(array, place, 2 * d + 1, keepdims=False)
        return array

    def split(self, array: jax.Array, fill: Any = 0) -> jax.Array:
        """``[*shape, ...] -> [count, *sizes, ...]``, `fill` where there is no token."""
        rank = len(self.shape)
        rest = array.shape[rank:]
        array = self._cut(array, fill)
        if self.count == 1:
            return array.reshape(1, *self.sizes, *rest)
        order = [*range(1, 2 * rank, 2), *range(0, 2 * rank, 2)]
        array = array.transpose(*order, *range(2 * rank, array.ndim))
        return array.reshape(self.count, *self.sizes, *rest)

    def join(self, array: jax.Array) -> jax.Array:
        """``[count, *sizes, ...] -> [*shape, ...]``."""
        rank = len(self.shape)
        rest = array.shape[rank + 1 :]
        array = array.reshape(*self.counts, *self.sizes, *rest)
        order = [i for d in range(rank) for i in (rank + d, d)]
        array = array.transpose(*order, *range(2 * rank, array.ndim))
        full = [c * n for c, n in zip(self.sizes, self.counts, strict=True)]
        array = array.reshape(*full, *rest)
        return array[tuple(slice(n) for n in self.shape)]


@dataclasses.dataclass(frozen=True)
class TokenGroups:
    """Chunks of tokens in groups, where the forward computes gradients.

    Attributes:
      chunks: The logits are in memory for one at a time.
      groups: The number of groups. The logits' gradient is in memory for one at a time.
    """

    chunks: TokenChunks
    groups: int

    def __str__(self) -> str:
        size = math.prod(self.chunks.sizes)
        counts = f"{self.groups} x {self.chunks.count // self.groups}"
        return f"{counts} x {size} tokens (groups x chunks)"

    def split(self, array: jax.Array, fill: Any = 0) -> jax.Array:
        """``[*tokens, ...] -> [groups, chunks of a group, *chunk, ...]``."""
        array = self.chunks.split(array, fill)
        return array.reshape(self.groups, -1, *array.shape[1:])

    def join(self, array: jax.Array) -> jax.Array:
        """The inverse of `split`."""
        return self.chunks.join(array.reshape(-1, *array.shape[2:]))


def over_chunks(body: Callable[..., Any], arrays: Any) -> Any:
    """The results of ``body(*chunk)`` for each chunk, along their first dimension."""
    if jax.tree.leaves(arrays)[0].shape[0] == 1:
        out = body(*jax.tree.map(lambda a: a[0], arrays))
        return jax.tree.map(lambda a: a[None], out)
    packing = _Packing(body)
    packed = lax.scan(lambda _, chunk: (None, packing(*chunk)), None, arrays)[1]
    return packing.unpack(packed)


def over_pieces(body: Callable[..., Any], arrays: Any) -> Any:
    """As `over_chunks`, but nothing fills the arrays of the results before."""
    count = jax.tree.leaves(arrays)[0].shape[0]
    if count == 1:
        return over_chunks(body, arrays)
    packing = _Packing(body)

    def add_piece(i: Any, written: Any) -> Any:
        out = packing(*jax.tree.map(functools.partial(_at, i), arrays))
        return jax.tree.map(functools.partial(_put, i), written, out)

    def first(arrays: Any) -> Any:
        return packing(*jax.tree.map(lambda a: a[0], arrays))

    written = jax.tree.map(
        lambda s: trace.unwritten((count, *s.shape), s.dtype, arrays),
        jax.eval_shape(first, arrays),
    )
    return packing.unpack(lax.fori_loop(0, count, add_piece, written))


def over_chunks_into(
    body: Callable[..., tuple[jax.Array, Any]], whole: jax.Array, arrays: Any
) -> tuple[jax.Array, Any]:
    """As `over_chunks`, where the body writes one of its results itself.

    ``body(whole, i, *chunk)`` gives `whole` with that of chunk i, and the others.
    """
    packing = _Packing(lambda others: others)

    def step(whole: jax.Array, each: Any) -> tuple[jax.Array, Any]:
        place, chunk = each
        whole, others = body(whole, place, *chunk)
        return whole, packing(others)

    count = jax.tree.leaves(arrays)[0].shape[0]
    every = jnp.arange(count, dtype=np.int32)
    whole, packed = lax.scan(step, whole, (every, arrays))
    return whole, packing.unpack(packed)


def _at(i: Any, array: jax.Array) -> jax.Array:
    return lax.dynamic_index_in_dim(array, i, keepdims=False)


def _put(i: Any, whole: jax.Array, part: jax.Array) -> jax.Array:
    return lax.dynamic_update_index_in_dim(whole, part, i, 0)


class _Packing:
    """A function whose results with one number per row are columns of one array.

    Only results of the first such result's shape and dtype are packed.

    Works around XLA:GPU duplicating a kernel whose output is both stored by a
    `dynamic_update_slice` and used elsewhere: https://github.com/openxla/xla/pull/45799.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any) -> tuple[list[jax.Array], list[jax.Array]]:
        leaves, self.structure = jax.tree.flatten(self.function(*args))
        kinds = [(a.shape, a.dtype) for a in leaves]
        first = next((kind for kind in kinds if kind[0][-1:] == (1,)), None)
        self.single = [kind == first for kind in kinds]
        apart = [a for a, one in zip(leaves, self.single, strict=True) if not one]
        beside = [a for a, one in zip(leaves, self.single, strict=True) if one]
        return apart, [jnp.concatenate(beside, -1)] if beside else []

    def unpack(self, packed: Any) -> Any:
        """The function's results, from one call or from many calls stacked."""
        apart, beside = (iter(arrays) for arrays in packed)
        columns = iter([c for a in beside for c in jnp.split(a, a.shape[-1], -1)])
        leaves = [next(columns) if one else next(apart) for one in self.single]
        return jax.tree.unflatten(self.structure, leaves)


@dataclasses.dataclass(frozen=True)
class _Parts:
    """A vocabulary in equal parts.

    Attributes:
      folds: The number of parts.
      length: The number of classes of a part.
    """

    folds: int
    length: int

    def fold(self, array: jax.Array, axis: int) -> jax.Array:
        """``[..., V, ...] -> [..., folds, V / folds, ...]``; `axis` is not negative."""
        shape = array.shape
        parts = (self.folds, shape[axis] // self.folds)
        return array.reshape(*shape[:axis], *parts, *shape[axis + 1 :])

    def unfold(self, array: jax.Array, axis: int) -> jax.Array:
        """The inverse of `fold`."""
        shape = array.shape
        size = shape[axis] * shape[axis + 1]
        return array.reshape(*shape[:axis], size, *shape[axis + 2 :])


@dataclasses.dataclass(frozen=True)
class ClassChunks(_Parts):
    """Chunks of classes: a chunk has one slice of each part.

    If the vocabulary is sharded into such parts, each device has its share of every
    chunk. The last slice overlaps the one before if `width` does not divide `length`.

    Attributes:
      width: The number of classes of a slice.
    """

    width: int

    def __str__(self) -> str:
        return f"{self.count} x {self.folds * self.width} classes"

    @property
    def count(self) -> int:
        return -(-self.length // self.width)

    @property
    def even(self) -> bool:
        """Whether no class is in two chunks."""
        return self.length % self.width == 0

    def start(self, chunk: Any) -> Any:
        """The first class of slice `chunk` in each part; `length` if past the last."""
        start = jnp.minimum(chunk * self.width, self.length - self.width)
        return jnp.where(chunk < self.count, start, self.length)

    def owned(self, chunk: Any) -> jax.Array:
        """Whether each class of a slice is not in the next slice too."""
        at = self.start(chunk) + jnp.arange(self.width, dtype=np.int32)
        return at < self.start(chunk + 1)

    def slice(self, chunk: Any, array: jax.Array, axis: int) -> jax.Array:
        """A chunk of a folded array, whose parts are along `axis`."""
        if self.count == 1:
            return array
        start = self.start(chunk)
        return lax.dynamic_slice_in_dim(array, start, self.width, axis + 1)

    def put(
        self, chunk: Any, array: jax.Array, part: jax.Array, axis: int
    ) -> jax.Array:
        """A folded array with one chunk replaced."""
        if self.count == 1:
            return part
        start = self.start(chunk)
        return lax.dynamic_update_slice_in_dim(array, part, start, axis + 1)


@dataclasses.dataclass(frozen=True)
class FilledClasses(_Parts):
    """The padding of a vocabulary.

    Each part is padded at its own end, so a vocabulary sharded over up to `folds`
    devices needs no communication.

    Attributes:
      filled: The length of a part with its padding.
    """

    filled: int

    @property
    def full(self) -> bool:
        """Whether there is no padding."""
        return self.length == self.filled

    def fill(self, array: jax.Array, axis: int) -> jax.Array:
        """The array padded with zeros; `axis` is not negative."""
        if self.full:
            return array
        parts = self.fold(array, axis)
        widths = [(0, 0)] * parts.ndim
        widths[axis + 1] = (0, self.filled - self.length)
        return self.unfold(jnp.pad(parts, widths), axis)

    def strip(self, array: jax.Array, axis: int) -> jax.Array:
        """The inverse of `fill`."""
        if self.full:
            return array
        parts = self.fold(array, axis)
        return self.unfold(lax.slice_in_dim(parts, 0, self.length, axis=axis + 1), axis)

    def place(self, labels: jax.Array) -> jax.Array:
        """Labels as indices of the padded vocabulary; negative ones stay."""
        if self.full or self.folds == 1:
            return labels
        part, place = labels // self.length, labels % self.length
        return jnp.where(labels < 0, labels, part * self.filled + place)

    def is_class(self) -> jax.Array:
        """Whether each entry of the padded vocabulary is a class, not padding."""
        return jnp.arange(self.folds * self.filled) % self.filled < self.length
