"""How the Mosaic GPU kernels split rows along an axis that is not last.

The table, measured on an H200 (docs/tune_strips.md): see `mosaic_gpu_strips`.
benchmarks/tune.py measures the candidates.
"""

import dataclasses

from jaxsoftmax._rows.call import FUNCTION_OF_STATE
from jaxsoftmax._rows.mosaic_gpu_plans import (
    Plan,
    arrays_read,
    function_of_rows,
    keeping,
    read_twice,
)

# (bytes of a segment, the most bytes of a strip of that width), of one array and of
# two, by whether the widest is float32: the first that holds the rows is taken. What a
# segment's width costs, where rows are far from each other in memory: a bare copy of
# 8192 rows of 16384 in the order of strips is at 0.66 of the copy rate by 64 bytes, at
# 0.82 by 128, at 0.91 by 256 (docs/tune_strips.md). In 16 bits, two arrays of a wide
# strip are more work than the warps of two blocks do beside the copies.
_NARROW = (64, 2**20)
_SEGMENTS: dict[tuple[int, bool], tuple[tuple[int, int], ...]] = {
    (1, True): ((256, 2**17), (128, 2**21), _NARROW),
    (1, False): ((128, 2**20), _NARROW),
    (2, True): ((256, 2**17), (128, 2**20), _NARROW),
    (2, False): ((128, 2**18), _NARROW),
}
# Blocks, and the most bytes of a share, of one array and of all of two. Sixteen blocks
# wait for each other longer than eight: they have what is left.
_BLOCKS = (
    (1, 2**15, 2**16),
    (2, 2**15, 2**16),
    (4, 2**15, 2**16),
    (8, 2**16, 2**16),
    (16, 2**17, 2**17),
)
# Of a share of so many bytes, of all arrays, a quarter is in registers.
_KEEPS_FROM = 2**16
# Longer ones are read twice: bytes of a segment, and of a chunk that a block has, of
# all arrays.
_CHUNK = (128, 2**16)


def plan(
    *, op: str, length: int, inner: int, itemsize: int, narrowest: int
) -> Plan | str:
    """The plan for rows of `length` of which `inner` lie side by side, or why none.

    Args:
      op: The operation.
      length: Entries per row.
      inner: How many rows lie side by side.
      itemsize: Bytes per entry of the widest array.
      narrowest: Of the narrowest.
    """
    if op in FUNCTION_OF_STATE:
        return "a state of rows that are not last in memory"
    if inner * narrowest % 16:
        return f"{inner} rows side by side, which are no multiple of 16 bytes"
    # In 16 bits by 8 bytes a lane, which leaves it fewer columns to reduce; but 1024
    # rows of 16 were at 0.90 of the copy rate by 16 bytes, at 0.84 by 8.
    vector = 4 if inner >= 32 else 16 // itemsize
    if 2 * vector > inner:  # lanes of a warp that lie side by side
        vector //= 2
    fits = [
        lanes
        for lanes in (2, 4, 8, 16)
        if lanes * vector <= inner
        and lanes * vector * narrowest % 16 == 0
        and length % (32 // lanes) == 0
        and length >= 4 * (32 // lanes)
    ]
    if not fits:
        return f"{inner} rows side by side of {length} entries"

    def shape(segment: int) -> tuple[Plan, int]:
        """The widest strip of up to so many bytes, and its units."""
        enough = (x for x in fits if x * vector * itemsize >= segment)
        lanes = next(enough, fits[-1])
        return Plan("shared", lanes, vector), length // (32 // lanes)

    arrays = arrays_read(function_of_rows(op))
    tile = 4 * 32 * vector * itemsize
    for segment, largest in _SEGMENTS[arrays, itemsize == 4]:
        strip, units = shape(segment)
        if units * 32 * vector * itemsize > largest:
            continue
        for blocks, *shares in _BLOCKS:
            tiles = -(-units // (4 * blocks))
            share = arrays * tiles * tile
            if share <= shares[arrays - 1] and units >= 4 * tiles:
                keeps = share >= _KEEPS_FROM
                split = dataclasses.replace(strip, blocks=blocks, tiles=tiles)
                return keeping(split, units, 4, tiles // 4 if keeps else 0)
    segment, share = _CHUNK
    strip, units = shape(segment)
    most = share // (arrays * tile)
    return read_twice(strip, units, 4, [(16, 1, most, k) for k in (most // 4, 0)])


def entries(strip: Plan, length: int) -> int:
    """Entries of a row that the blocks of a strip have; those of two count twice."""
    chunk = 4 * (32 // strip.lanes) * strip.blocks * strip.tiles
    return -(-length // chunk) * chunk
