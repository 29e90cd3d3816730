"""The mask of dropout in the Mosaic GPU kernels of attention: that of `_attend.xla`.

An entry is kept by what threefry makes of the key and of its place, so that each kernel
computes the bits anew, and none are written. The functions are of integers of 32 bits
without a sign, whole tiles or a part of one in registers, and have operators alone.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxsoftmax._compat import mosaic_gpu_registers as registers

# Of Threefry-2x32 (Salmon and others, Parallel random numbers, 2011), as JAX has it.
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


def threefry(key: Sequence[Any], high: Any, low: Any) -> tuple[Any, Any]:
    """The two words for a place, in 20 rounds."""
    first, second = key
    words = (first, second, first ^ second ^ _PARITY)
    high, low = high + first, low + second
    for i in range(5):
        for rotation in _ROTATIONS[i % 2]:
            high = high + low
            low = ((low << rotation) | (low >> (32 - rotation))) ^ high
        high = high + words[(i + 1) % 3]
        low = low + (words[(i + 2) % 3] + (i + 1))
    return high, low


def largest_kept(rate: float) -> np.uint32:
    """The largest bits that keep an entry: `jax.random.bernoulli` with 1 - rate.

    Their upper 23 make a number in [0, 1) that it compares.
    """
    kept = math.ceil(float(np.float32(1 - rate)) * 2**23)
    return np.uint32(kept * 2**9 - 1)


def advanced(place: Sequence[Any], by: Any) -> list[Any]:
    """A place, its lower word and if need be its upper one, and a number later."""
    low, *upper = place
    after = low + by
    # The carry, which is 1 or 0.
    return [after, *(x + (((low & by) | ((low | by) & ~after)) >> 31) for x in upper)]


def kept_words(
    place: Sequence[Any], step: int, scalars: Sequence[Any], columns: int
) -> Any:
    """The words of what is kept of a tile, as `registers.bits` has them.

    Args:
      place: Of the entries of the first eight columns, the lower words, and the upper
        if they may differ from 0.
      step: How much later those of the next eight columns are.
      scalars: The two words of the key, and `largest_kept`.
      columns: How many the tile has.
    """
    words = len(place)

    def is_kept(numbers: Sequence[Any]) -> Any:
        low, *upper = numbers[:words]
        *key, largest, _ = numbers[words:]
        one, other = threefry(key, upper[0] if upper else low ^ low, low)
        return (one ^ other) <= largest

    def advance(numbers: Sequence[Any]) -> list[Any]:
        return [*advanced(numbers[:words], numbers[-1]), *numbers[words:]]

    first = [*place, *scalars, np.uint32(step)]
    return registers.bits(is_kept, advance, first, columns)
