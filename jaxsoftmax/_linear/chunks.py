"""Splits tokens into chunks, so that a loop meets some of them at a time.

A chunk has tokens of every part of each batch dimension: of a dimension of C n tokens
the i-th chunk of n has those at i, n + i, 2 n + i, ... Where the dimension is sharded
over devices, each has its share of every chunk: nothing moves.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxsoftmax import _compat
from jaxsoftmax._core.shapes import is_known


@dataclasses.dataclass(frozen=True)
class TokenChunks:
    """How the dimensions of tokens are split.

    Attributes:
      shape: Of the tokens.
      sizes: Of a chunk.
      counts: How many chunks there are along each dimension.
    """

    shape: tuple[int, ...]
    sizes: tuple[int, ...]
    counts: tuple[int, ...]

    @property
    def count(self) -> int:
        return math.prod(self.counts)

    def split(self, array: jax.Array, fill: Any = 0) -> jax.Array:
        """``[*shape, ...] -> [count, *sizes, ...]``, `fill` where there is no token."""
        rank = len(self.shape)
        rest = array.shape[rank:]
        pairs = list(zip(self.sizes, self.counts, strict=True))
        missing = [c * n - size for (c, n), size in zip(pairs, self.shape, strict=True)]
        if any(m != 0 for m in missing):
            widths = [*((0, m) for m in missing), *((0, 0) for _ in rest)]
            array = jnp.pad(array, widths, constant_values=fill)
        if self.count == 1:
            return array[None]
        array = array.reshape(*(n for pair in pairs for n in pair), *rest)
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


# Beyond so many tokens a chunk of any size has a multiple of eight.
_SMALL = 64
# Devices that share a dimension, of which each has its part of every chunk.
_SHARES = (16, 8, 4, 2, 1)


def token_chunks(shape: Sequence[int], most: int) -> TokenChunks:
    """Chunks of about `most` tokens, and no more unless that is below one a dimension.

    The longest dimension is split first, evenly where some number of chunks up to twice
    as many as are needed divides it. A chunk that 16 devices cannot share evenly, while
    they could share the dimension, is taken only where the others are that small too;
    then one that 8 cannot, and so on.

    Where a size is symbolic, none of this can be asked; then the last dimension is
    split last.
    """
    if not is_known(shape):
        return _symbolic_chunks(tuple(shape), most)
    sizes, counts = list(shape), [1] * len(shape)
    longest_first = sorted(range(len(shape)), key=lambda d: -shape[d])
    for shares in _SHARES:
        for d in longest_first:
            needed = -(-math.prod(sizes) // most)
            if needed <= 1:
                break
            count = _even_count(sizes[d], needed, math.gcd(shape[d], shares))
            sizes[d], counts[d] = sizes[d] // count, counts[d] * count
    for d in longest_first:
        needed = -(-math.prod(sizes) // most)
        if needed <= 1:
            break
        # No number of chunks is near that divides it.
        count = min(shape[d], counts[d] * needed)
        size = -(-shape[d] // count)
        if shape[d] % count and size > _SMALL:
            size = size // 8 * 8
        sizes[d], counts[d] = size, -(-shape[d] // size)
    return TokenChunks(tuple(shape), tuple(sizes), tuple(counts))


def _symbolic_chunks(shape: tuple[int, ...], most: int) -> TokenChunks:
    """Chunks of about `most` tokens, below twice that; of equal sizes but for the last.

    In operations for which it can be seen that no size is 0, as symbolic ones have to.
    """
    sizes: list[int] = []
    for length in reversed(shape):
        needed = -(-length * math.prod(sizes) // most)
        sizes.insert(0, -(-length // needed))
    counts = [-(-n // size) for n, size in zip(shape, sizes, strict=True)]
    return TokenChunks(shape, tuple(sizes), tuple(counts))


def _even_count(length: int, needed: int, shares: int) -> int:
    """How many chunks of equal sizes, multiples of `shares`, to split into.

    From `needed` to twice as many, or else fewer.
    """
    multiples = length // shares
    least = min(multiples, needed)
    for count in range(least, min(multiples, 2 * least) + 1):
        if multiples % count == 0:
            return count
    return next(n for n in range(least, 0, -1) if multiples % n == 0)


def over_chunks(body: Callable[..., Any], arrays: Any) -> Any:
    """The results of ``body(*chunk)`` for each chunk, along their first dimension."""
    if jax.tree.leaves(arrays)[0].shape[0] == 1:
        out = body(*jax.tree.map(lambda a: a[0], arrays))
        return jax.tree.map(lambda a: a[None], out)
    packing = _Packing(body)
    packed = lax.scan(lambda _, chunk: (None, packing(*chunk)), None, arrays)[1]
    return packing.unpack(packed)


def over_pieces(
    prepare: Callable[..., Any], body: Callable[..., Any], arrays: Any
) -> Any:
    """The results of ``body(*piece)`` for each piece of ``prepare(*chunk)``.

    Each is written to where all are, once. `over_chunks` within `over_chunks` would
    write a chunk's apart and copy them.

    Args:
      prepare: From arrays without their first dimension to as many, likewise.
      body: From these, without their first dimension.
      arrays: [chunks, pieces, ...] each.
    """
    chunks, pieces = jax.tree.leaves(arrays)[0].shape[:2]
    if chunks == pieces == 1:
        ready = prepare(*jax.tree.map(lambda a: a[0], arrays))
        out = body(*jax.tree.map(lambda a: a[0], ready))
        return jax.tree.map(lambda a: a[None, None], out)
    packing = _Packing(body)

    def of_chunk(i: Any, written: Any) -> Any:
        ready = prepare(*jax.tree.map(functools.partial(_at, i), arrays))

        def of_piece(j: Any, written: Any) -> Any:
            out = packing(*jax.tree.map(functools.partial(_at, j), ready))
            return jax.tree.map(functools.partial(_put, i, j), written, out)

        return lax.fori_loop(0, pieces, of_piece, written)

    def first(arrays: Any) -> Any:
        ready = prepare(*jax.tree.map(lambda a: a[0], arrays))
        return packing(*jax.tree.map(lambda a: a[0], ready))

    written = jax.tree.map(
        lambda s: _compat.unwritten((chunks, pieces, *s.shape), s.dtype, arrays),
        jax.eval_shape(first, arrays),
    )
    return packing.unpack(lax.fori_loop(0, chunks, of_chunk, written))


def _at(i: Any, array: jax.Array) -> jax.Array:
    return lax.dynamic_index_in_dim(array, i, keepdims=False)


def _put(i: Any, j: Any, whole: jax.Array, part: jax.Array) -> jax.Array:
    at = (i, j, *(jnp.zeros_like(i) for _ in part.shape))
    return lax.dynamic_update_slice(whole, part[None, None], at)


class _Packing:
    """A function whose results of one number a row come as one array, side by side.

    Those, that is, of the shape and dtype that the first of them has.

    Else XLA for GPUs may run a kernel twice whose results are stored as they are and
    used for something else.
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
        """The results as the function had them, of a call or of many."""
        apart, beside = (iter(arrays) for arrays in packed)
        columns = iter([c for a in beside for c in jnp.split(a, a.shape[-1], -1)])
        leaves = [next(columns) if one else next(apart) for one in self.single]
        return jax.tree.unflatten(self.structure, leaves)


def _fold(array: jax.Array, axis: int, folds: int) -> jax.Array:
    """``[..., V, ...] -> [..., folds, V / folds, ...]``; `axis` is not negative."""
    shape = array.shape
    parts = (folds, shape[axis] // folds)
    return array.reshape(*shape[:axis], *parts, *shape[axis + 1 :])


def _unfold(array: jax.Array, axis: int) -> jax.Array:
    """The inverse of `_fold`."""
    shape = array.shape
    size = shape[axis] * shape[axis + 1]
    return array.reshape(*shape[:axis], size, *shape[axis + 2 :])


@dataclasses.dataclass(frozen=True)
class ClassChunks:
    """How the vocabulary is split: into `count` slices of each of `folds` equal parts.

    A vocabulary that devices share is split by them into such parts: then each has its
    share of every chunk. The last slice starts early where `width` does not divide.

    Attributes:
      folds: How many parts there are.
      length: Of a part.
      width: Of a slice.
    """

    folds: int
    length: int
    width: int

    @property
    def count(self) -> int:
        return -(-self.length // self.width)

    @property
    def even(self) -> bool:
        """Whether no class is in two chunks."""
        return self.length % self.width == 0

    def start(self, chunk: Any) -> Any:
        """Of a chunk, in each part; of the one after the last, the part's length."""
        start = jnp.minimum(chunk * self.width, self.length - self.width)
        return jnp.where(chunk < self.count, start, self.length)

    def counted(self, chunk: Any) -> jax.Array:
        """Which classes of a slice are not in the next chunk too."""
        at = self.start(chunk) + jnp.arange(self.width, dtype=np.int32)
        return at < self.start(chunk + 1)

    def fold(self, array: jax.Array, axis: int) -> jax.Array:
        """``[..., V, ...] -> [..., folds, length, ...]``; `axis` is not negative."""
        return _fold(array, axis, self.folds)

    def unfold(self, array: jax.Array, axis: int) -> jax.Array:
        """The inverse of `fold`."""
        return _unfold(array, axis)

    def slice(self, chunk: Any, array: jax.Array, axis: int) -> jax.Array:
        """A chunk of a folded array, whose parts are along `axis`."""
        if self.count == 1:
            return array
        start = self.start(chunk)
        return lax.dynamic_slice_in_dim(array, start, self.width, axis + 1)

    def put(
        self, chunk: Any, array: jax.Array, part: jax.Array, axis: int
    ) -> jax.Array:
        """A folded array with a chunk of it replaced."""
        if self.count == 1:
            return part
        start = self.start(chunk)
        return lax.dynamic_update_slice_in_dim(array, part, start, axis + 1)


# So many devices may share a vocabulary without that one moves it.
_MOST_FOLDS = 16
_LEAST_WIDTH = 128  # classes of a chunk, and what their number is a multiple of


@dataclasses.dataclass(frozen=True)
class FilledClasses:
    """How a vocabulary is filled up: each of `folds` equal parts, at its end.

    So that of a vocabulary that devices share nothing moves.

    Attributes:
      folds: How many parts there are.
      length: Of a part.
      filled: Its length then.
    """

    folds: int
    length: int
    filled: int

    @property
    def full(self) -> bool:
        """Whether nothing is missing."""
        return self.length == self.filled

    def fill(self, array: jax.Array, axis: int) -> jax.Array:
        """With zeros; `axis` is not negative."""
        parts = _fold(array, axis, self.folds)
        widths = [(0, 0)] * parts.ndim
        widths[axis + 1] = (0, self.filled - self.length)
        return _unfold(jnp.pad(parts, widths), axis)

    def strip(self, array: jax.Array, axis: int) -> jax.Array:
        """The inverse of `fill`."""
        parts = _fold(array, axis, self.folds)
        return _unfold(lax.slice_in_dim(parts, 0, self.length, axis=axis + 1), axis)

    def place(self, labels: jax.Array) -> jax.Array:
        """Where classes are then; what is negative stays."""
        if self.full or self.folds == 1:
            return labels
        part, place = labels // self.length, labels % self.length
        return jnp.where(labels < 0, labels, part * self.filled + place)

    def given(self) -> jax.Array:
        """Which classes were there before."""
        return jnp.arange(self.folds * self.filled) % self.filled < self.length


def filled_classes(vocabulary: int, multiple: int) -> FilledClasses:
    """Filled up to a multiple of `multiple`."""
    folds = math.gcd(vocabulary, _MOST_FOLDS, multiple)
    length, step = vocabulary // folds, multiple // folds
    return FilledClasses(folds, length, -(-length // step) * step)


def least_chunk(vocabulary: int) -> int:
    """How many classes the smallest chunk has."""
    return min(vocabulary, _LEAST_WIDTH)


def class_chunks(vocabulary: int, most: int) -> ClassChunks:
    """Chunks of about `most` classes, and no more unless that is below the least."""
    folds = math.gcd(vocabulary, _MOST_FOLDS)
    length = vocabulary // folds
    step = _LEAST_WIDTH // math.gcd(folds, _LEAST_WIDTH)
    most = max(most // folds // step, 1) * step
    if most >= length:
        return ClassChunks(folds, length, length)
    count = -(-length // most)
    width = -(-length // count)
    width = min(-(-width // step) * step, length)
    return ClassChunks(folds, length, width)
