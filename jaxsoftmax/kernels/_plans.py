"""How the Mosaic GPU kernels split rows: the one table, measured on an H200.

Nothing is tuned at run time: the plan follows from the length of a row, the number of
arrays and their dtype.

What the measurements say: a block of one warpgroup is best as long as a cluster of them
holds the row, since smaller blocks fit more closely on a multiprocessor. Two arrays of
float32 tiles need so many registers that few blocks fit; from shared memory each pass
converts them again, which costs less. One array in 16 bits is best left in registers.
Beyond 8 blocks the cluster's own cost grows, and larger shares win over more blocks.
"""

import dataclasses
from typing import Literal

Place = Literal["rows", "registers", "shared", "stream"]


@dataclasses.dataclass(frozen=True)
class Plan:
    """How the work of a kernel is split; see `kernels.mosaic_gpu`.

    Attributes:
      place: Where a share is between its two uses.
      lanes: How many lanes of a warp have a row; 32 where warps or more have one.
      vector: How many entries a lane loads at once.
      blocks: Of the cluster that has a row.
      warpgroups: Of a block.
      tiles: Of a warpgroup (while streaming: at a time).
    """

    place: Place
    lanes: int
    vector: int
    blocks: int = 1
    warpgroups: int = 1
    tiles: int = 1

    @property
    def width(self) -> int:
        """Entries of a row in a tile."""
        return self.lanes * self.vector


# Of (blocks, warpgroups, tiles), by how many arrays are read and whether the widest is
# float32: the first that holds the row is taken.
_Split = tuple[Place, int, int, int]
_SPLITS: dict[tuple[int, bool], tuple[_Split, ...]] = {
    (1, False): (
        ("registers", 1, 1, 8),
        ("registers", 2, 1, 8),
        ("registers", 4, 1, 8),
        ("registers", 8, 1, 8),
        ("registers", 8, 2, 8),
        ("registers", 16, 2, 8),
    ),
    (1, True): (
        ("registers", 1, 1, 8),
        ("registers", 2, 1, 8),
        ("registers", 4, 1, 8),
        ("registers", 8, 1, 8),
        ("shared", 8, 1, 16),
        ("shared", 16, 1, 16),
        ("shared", 16, 2, 16),
    ),
    (2, False): (
        ("registers", 1, 1, 2),
        ("shared", 1, 1, 8),
        ("shared", 2, 1, 8),
        ("shared", 4, 1, 8),
        ("shared", 8, 1, 8),
        ("shared", 16, 1, 8),
        ("shared", 8, 2, 16),
    ),
    (2, True): (
        ("registers", 1, 1, 2),
        ("shared", 1, 1, 8),
        ("shared", 2, 1, 8),
        ("shared", 2, 1, 16),
        ("shared", 8, 1, 8),
        ("shared", 8, 1, 16),
        ("shared", 16, 1, 16),
        ("shared", 16, 2, 16),
    ),
}
# Longer rows are read twice, by clusters of (blocks, warpgroups), so many tiles a time.
_STREAM = (16, 2, 4)
# Tiles that a row may have where lanes of one warp have it.
_SHORT = {(1, False): 4, (1, True): 8, (2, False): 4, (2, True): 4}


def plan(
    *,
    arrays: int,
    rows: int,
    length: int,
    itemsize: int,
    mask: tuple[tuple[int, int], ...] | None,
) -> Plan | str:
    """The plan for rows of `length`, or why there is none.

    Args:
      arrays: How many arrays are read, without the mask.
      rows: How many rows there are.
      length: Entries of a row.
      itemsize: Bytes of an entry of the widest array.
      mask: Of the rows' dimensions, outermost first: size, and stride in rows of the
        mask; None without one.
    """
    kind = (arrays, itemsize == 4)
    vector = 16 // itemsize
    short = _short_plan(kind, rows, length, vector, mask)
    if short is not None:
        return short
    if length % 128:
        return f"rows of {length} entries, which is not a multiple of 128"
    # Half the bytes a load where only that divides the row.
    while length % (32 * vector):
        vector //= 2
    units = length // (32 * vector)
    if units < 4:
        return f"{rows} rows of {length} entries: fewer than a block has"
    return _long_plan(kind, units, vector)


def _short_plan(
    kind: tuple[int, bool],
    rows: int,
    length: int,
    vector: int,
    mask: tuple[tuple[int, int], ...] | None,
) -> Plan | None:
    lanes = 32
    while lanes >= 2 and length % (lanes * vector):
        lanes //= 2
    tiles = length // (lanes * vector)
    if lanes < 2 or tiles > _SHORT[kind]:
        return None
    block = 4 * 32 // lanes
    # A block has rows of one mask row, or of as many that follow each other.
    if rows < block or (mask is not None and mask[-1][0] % block):
        return None
    return Plan("rows", lanes, vector, tiles=tiles)


def _long_plan(kind: tuple[int, bool], units: int, vector: int) -> Plan:
    for place, blocks, warpgroups, most in _SPLITS[kind]:
        tiles = -(-units // (4 * blocks * warpgroups))
        if tiles <= most and units >= 4 * tiles:
            return Plan(place, 32, vector, blocks, warpgroups, tiles)
    blocks, warpgroups, tiles = _STREAM
    return Plan("stream", 32, vector, blocks, warpgroups, tiles)
