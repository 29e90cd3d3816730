"""How the Mosaic GPU kernels split rows: the one table, measured on H200 and H100.

Nothing is tuned at run time: the plan follows from the operation, the length of a row
and the dtypes. benchmarks/tune.py measures the candidates.

What the measurements say: what a row costs is how many blocks fit on a multiprocessor,
and how long each waits for the others of its cluster. From shared memory a loop over
the tiles needs few registers, so that 32 KiB of a row per block, and three to six such
blocks, reach the roof, whatever the length. Fewer and larger blocks wait less often,
as long as two fit. In registers is one array of up to four blocks in 16 bits, and what
one block has. Where sixteen blocks have more than 48 KiB each, some tiles are in
registers, so that one block more fits.
A soft cap, and a sum over all logits, keep the gradient of cross-entropy busy for
longer: it wants larger blocks still, and fewer warpgroups of each.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from jaxsoftmax._rows.call import FUNCTION_OF_STATE, function_of
from jaxsoftmax._rows.defaults import ELEMENTWISE

Place = Literal["rows", "warps", "registers", "shared", "stream"]


@dataclasses.dataclass(frozen=True)
class Plan:
    """How the work of a kernel is split; see `_rows.mosaic_gpu`.

    Attributes:
      place: Where a share is between its two uses, or a chunk of it where it is read
        twice, or once and not kept ("stream").
      lanes: Lanes of a warp that share a row; 32 where one or more warps do.
      vector: Entries that a lane loads at once.
      blocks: Blocks of the cluster that shares a row.
      warpgroups: Warpgroups of a block.
      tiles: Tiles of a warpgroup, at a time where it has chunks.
      ragged: Whether rows start and end anywhere between vectors.
      kept: How many of the tiles are in registers, where the others are in shared
        memory.
    """

    place: Place
    lanes: int
    vector: int
    blocks: int = 1
    warpgroups: int = 1
    tiles: int = 1
    ragged: bool = False
    kept: int = 0

    @property
    def width(self) -> int:
        """Entries of a row that lanes of one warp have of a tile."""
        return self.lanes * self.vector

    @property
    def height(self) -> int:
        """How many times as many a tile has."""
        return 4 * 32 // self.lanes

    @property
    def tile(self) -> tuple[int, int]:
        return self.height, self.width


class _Split(NamedTuple):
    """How a row is split; see `Plan`.

    Attributes:
      tiles: The most, if they are of 16 bytes a lane.
      kept: The most, of whatever size they are.
      half: Whether a lane loads 8 bytes at once.
    """

    place: Place
    blocks: int
    warpgroups: int
    tiles: int
    kept: int = 0
    half: bool = False


_Splits = tuple[_Split, ...]


def _splits(*each: tuple[Any, ...]) -> _Splits:
    """Of the arguments of each, or the split itself."""
    return tuple(_Split(*split) for split in each)


_ONE_FLOAT32 = _splits(
    ("registers", 1, 1, 8),
    ("shared", 1, 1, 16),
    ("shared", 2, 1, 16),
    ("shared", 4, 1, 16),
    ("shared", 8, 1, 16),
    ("shared", 16, 1, 25),
    ("shared", 16, 2, 16),
    ("shared", 16, 2, 32, 6),
    ("shared", 16, 4, 32, 6),
)
_TWO_TO_32768 = _splits(
    ("registers", 1, 1, 2),
    ("shared", 1, 1, 8),
    ("shared", 2, 1, 8),
    ("shared", 2, 1, 16),
    ("shared", 4, 1, 16),
)
_PUSHFORWARD_FLOAT32 = _splits(
    *_TWO_TO_32768,
    ("shared", 8, 2, 8),
    ("shared", 16, 2, 8),
    ("shared", 16, 2, 16),
)
_ONE_16_BITS_FROM_32768 = _splits(
    ("shared", 2, 1, 16),
    ("shared", 4, 1, 16),
    ("shared", 8, 1, 25),
    ("shared", 16, 1, 16),
    ("shared", 16, 2, 16),
    ("shared", 8, 4, 32, 10),
)
_PUSHFORWARD_16_BITS = _splits(
    ("registers", 1, 1, 2),
    ("shared", 1, 1, 8),
    ("shared", 1, 2, 8),
    ("shared", 2, 2, 8),
    ("shared", 4, 1, 13),
    ("shared", 4, 2, 8),
    ("shared", 8, 2, 8),
    ("shared", 16, 1, 13),
    ("shared", 16, 2, 8),
)


# By the operation and whether the widest array is float32: the first that holds the row
# is taken.
_SPLITS: dict[tuple[str, bool], _Splits] = {
    ("softmax", True): _ONE_FLOAT32,
    ("log_softmax", True): _ONE_FLOAT32,
    ("softmax_derivative", True): _splits(
        *_TWO_TO_32768,
        ("shared", 8, 1, 16),
        ("shared", 16, 1, 16),
        ("shared", 16, 1, 19, 6),
        ("shared", 16, 2, 16, 6),
    ),
    ("log_softmax_pushforward", True): _PUSHFORWARD_FLOAT32,
    ("log_softmax_pullback", True): _splits(
        *_TWO_TO_32768,
        ("shared", 4, 2, 13),
        ("shared", 8, 2, 13),
        ("shared", 16, 2, 8),
        ("shared", 16, 1, 19, 6),
        ("shared", 16, 2, 16, 6),
    ),
    ("cross_entropy_with_gradient", True): _splits(
        ("registers", 1, 1, 8),
        ("registers", 2, 1, 8),
        ("shared", 1, 2, 16),
        ("shared", 1, 4, 16),
        ("shared", 4, 2, 16),
        ("shared", 8, 2, 16),
        ("shared", 16, 1, 25),
        ("shared", 16, 2, 16),
    ),
    ("cross_entropy_with_gradient", False): _splits(
        ("registers", 1, 1, 8),
        ("registers", 2, 1, 8),
        ("shared", 2, 2, 8),
        ("shared", 4, 1, 16),
        ("shared", 8, 1, 25),
        ("shared", 8, 2, 16),
        ("shared", 16, 2, 16),
    ),
    ("busy_cross_entropy_with_gradient", True): _splits(
        ("registers", 1, 1, 8),
        ("registers", 2, 1, 8),
        ("shared", 1, 2, 16),
        ("shared", 2, 2, 16),
        ("shared", 4, 2, 16),
        ("shared", 8, 2, 16),
        ("shared", 16, 1, 25),
        ("shared", 16, 2, 16),
    ),
    ("busy_cross_entropy_with_gradient", False): _splits(
        ("registers", 1, 1, 8),
        ("registers", 2, 1, 8),
        ("shared", 2, 1, 16),
        ("shared", 4, 1, 16),
        ("shared", 8, 1, 25),
        ("shared", 8, 2, 16),
        ("shared", 16, 2, 16),
    ),
    ("softmax", False): _splits(
        ("registers", 1, 1, 8),
        ("registers", 2, 1, 8),
        ("shared", 1, 1, 16),
        ("registers", 4, 1, 8),
        *_ONE_16_BITS_FROM_32768,
    ),
    ("log_softmax", False): _splits(
        ("registers", 1, 1, 8),
        ("shared", 1, 1, 15),
        ("shared", 2, 1, 8),
        *_ONE_16_BITS_FROM_32768,
    ),
    ("masked_log_softmax", True): _splits(("registers", 1, 1, 2), *_ONE_FLOAT32[1:]),
    ("masked_log_softmax", False): _splits(
        ("registers", 1, 1, 4, 0, True),
        ("shared", 1, 1, 16),
        *_ONE_16_BITS_FROM_32768,
    ),
    ("softmax_derivative", False): _splits(
        ("registers", 1, 1, 2),
        ("shared", 1, 1, 8),
        ("shared", 2, 1, 8),
        ("shared", 2, 1, 16),
        ("shared", 4, 1, 16, 2),
        ("shared", 8, 1, 10),
        ("shared", 4, 2, 13),
        ("shared", 8, 1, 19, 4),
        ("shared", 16, 1, 13, 1),
        ("shared", 16, 1, 16, 4),
        ("shared", 16, 2, 16, 3),
        ("shared", 16, 4, 16, 3),
    ),
    ("log_softmax_pushforward", False): _PUSHFORWARD_16_BITS,
    ("log_softmax_pullback", False): _splits(
        ("registers", 1, 1, 4),
        ("shared", 1, 1, 16),
        ("shared", 2, 1, 16),
        ("shared", 2, 2, 13),
        ("shared", 4, 1, 16, 8, True),
        ("shared", 4, 2, 13),
        ("shared", 8, 1, 16, 8, True),
        ("shared", 8, 1, 19, 4),
        ("shared", 16, 1, 13, 1),
        ("shared", 16, 1, 16, 8, True),
        ("shared", 16, 2, 16, 3),
        ("shared", 16, 4, 16, 6, True),
    ),
}
_BUSY, _MASKED = "busy_", "masked_"
# Of a row in registers of one block, how much may be in two shares, and be computed
# twice: of a cluster nothing (softmax of 31,744 in bfloat16: 0.73 of the copy rate, and
# 0.96 from shared memory, where a warpgroup leaves out the tiles that another owns).
_MOST_OVERLAP = 0.06
# Longer rows are read twice, in chunks of which the last one is read once: (blocks,
# warpgroups, most tiles, and how many of them are in registers, all of them or another
# split), of one array and of two, by whether the widest is float32. The larger a chunk,
# the more is read once; but fewer blocks fit on a multiprocessor (docs/tune_kept.md).
_CHUNKS: dict[tuple[int, bool], tuple[tuple[int, int, int, int], ...]] = {
    (1, True): ((16, 4, 32, 8), (16, 4, 8, 0)),
    (1, False): ((16, 4, 32, 12), (16, 4, 8, 0)),
    (2, True): ((16, 4, 16, 6), (16, 4, 8, 0)),
    (2, False): ((16, 2, 8, 0),),
}
# A state keeps no entries: its row is read once, in chunks of so many tiles, by one
# warpgroup, or by two from that length. On an H100, 0.98 to 1.07
# of the copy rate at 16384, 131072 and 524288; the clusters of whole functions 0.4 to
# 1.08 (docs/tune_states.md). One array in 16 bits by one warpgroup, 8 bytes a lane. A
# row is split over blocks only where rows are few, until there are so many blocks. The
# last chunk has entries of the one before, where they do not divide the row: of the
# numbers of tiles the first is taken that has few of them.
_STATE_TILES = (8, 7, 6, 5)
_HALF_STATE_TILES = (16, 14, 12, 10)
_STATE_TWO_WARPGROUPS = 65536
_CHUNK_BLOCKS = 264  # two for each multiprocessor
_MOST_READ_TWICE = 0.015
# Where nothing is reduced: warpgroups, and the tiles of a chunk. On an H200 the first
# was at 0.92 to 0.94 of the copy rate at 32768 and 131072, with the terms of an entropy
# too; one warpgroup at 0.88 to 0.91; four at 0.93 to 0.95, and 0.81 to 0.87 with these.
_ELEMENTWISE = ((2, 8), (2, 4), (2, 2), (2, 3), (1, 2), (1, 3), (1, 1))
# Rows that start and end between vectors, or are no whole tiles (docs/tune_ragged.md).
# The fewest bytes of a row, in its widest array; what a row costs besides its entries
# makes shorter ones slower than XLA's form.
_RAGGED_SHORTEST = {"log_softmax": 2000, "cross_entropy_with_gradient": 3000}
_RAGGED_SHORTEST_OF_OTHERS = 1000
# The most entries per lane of a row that one warp has, in shared memory; in 16 bits
# more of what computes more for each row than softmax does: 3,200 entries by a warp and
# by a block, softmax's derivative 0.96 and 0.86, log_softmax 0.93 and 0.77.
_RAGGED_WARP = 64
_RAGGED_WARP_16_BITS = {
    "softmax_derivative": 128,
    "log_softmax": 128,
    "log_softmax_pullback": 128,
    "log_softmax_pushforward": 96,
}
# Rows of whole tiles, but not of whole tiles of a block, are read as if they were none
# below so many of these: by a block, where whole tiles take a cluster of two. 2176, and
# 3200 entries in bfloat16 were at 0.95 of the copy rate, and at 0.37 to 0.58. Or by a
# cluster too: 32,000 at 0.995, and at 0.957.
_ODD_TILES = 16
_ODD_TILES_OF = {("log_softmax_pullback", False): 32}
# Splits beside those of `_SPLITS` in shared memory: of two of the same size the first.
# With two arrays in 16 bits, 50257 took 4 x 1 blocks x warpgroups 1.1 times as long as
# 2 x 2.
_RAGGED_SPLITS: dict[tuple[str, bool], _Splits] = {
    ("busy_cross_entropy_with_gradient", False): _splits(("shared", 1, 2, 25)),
    ("softmax_derivative", False): _splits(("shared", 2, 2, 13)),
    ("log_softmax_pushforward", False): _splits(
        ("shared", 1, 2, 8),
        ("shared", 2, 2, 13),
        ("shared", 4, 1, 16),
        ("shared", 8, 1, 16),
    ),
    ("log_softmax_pushforward", True): _splits(("shared", 4, 2, 13)),
}
# Of states, which write nothing: of 50257, 1.02 of the copy rate, and 0.93 split as
# log_softmax is; of 10001, 0.91 and 0.63.
_RAGGED_STATES = _splits(
    ("shared", 1, 1, 16),
    ("shared", 1, 2, 25),
    ("shared", 2, 2, 25),
    ("shared", 8, 1, 25),
    ("shared", 16, 1, 25),
    ("shared", 16, 2, 32),
)
# Of 10001 in bfloat16, two blocks were at 0.81 to 0.87 of the copy rate (softmax's
# derivative at 0.98), one at 0.95 to 1.00.
_RAGGED_SHORT = _splits(("shared", 1, 1, 16))
# Tiles of 2 KiB that the shared memory of a block holds: none are in registers.
_MOST_STAGED = 100
# Most tiles of a row that lanes of one warp share; twice as many for a single float32
# array, and for log_softmax in 16 bits, which is kept as it is read. For its state only
# in rows that no block takes, so that there is one where there is a log_softmax (1536
# entries 0.78 of the copy rate, and 0.91 by a block).
_SHORT = 4
_SHORT_STATE = 511
# Up to so many entries they share rows of whole tiles, but not of whole tiles of a
# block, by 4 entries a lane: 640, 1152 and 1280 at 0.95 to 1.02 of the copy rate. In 16
# bits, so does cross-entropy (docs/tune_cross_entropy.md).
_SHORT_ODD = 1280
_SHORT_ODD_16_BITS = {"cross_entropy": 2176, "cross_entropy_with_gradient": 3968}
_READS_ONE = ("softmax", "log_softmax", "cross_entropy_with_gradient")


def plan(
    *,
    op: str,
    rows: int,
    length: int,
    itemsize: int,
    mask: tuple[tuple[int, int], ...] | None,
    busy: bool = False,
    aligned: bool = False,
) -> Plan | str:
    """The plan for rows of `length`, or why there is none.

    Args:
      op: The operation; or its state, whose short rows are split alike.
      rows: The number of rows.
      length: Entries per row.
      itemsize: Bytes per entry of the widest array.
      mask: (size, stride in rows of the mask) of each dimension of the rows, outermost
        first; None without a mask.
      busy: Whether a loss has a soft cap, or a sum over all logits of a row.
      aligned: Whether rows of whole tiles must be read as such.
    """
    # Without a gradient, the state of cross-entropy is one of log_softmax and more.
    state = op in FUNCTION_OF_STATE or op == "cross_entropy"
    kind = (f"{_BUSY}{op}", itemsize == 4)
    if not busy or kind not in _SPLITS:
        kind = (function_of_rows(op), itemsize == 4)
    vector = 16 // itemsize
    one = arrays_read(kind[0]) == 1
    short = _short_plan(op, one, rows, length, vector, mask)
    if short is not None:
        return short
    block = 4 * 32 * vector  # entries of a tile that one warpgroup has of a row
    odd = length % block and length < _ODD_TILES_OF.get(kind, _ODD_TILES) * block
    if length % 128 or (odd and not aligned and op != ELEMENTWISE):
        return _ragged_plan(kind, state, rows, length, vector)
    whole, half = Plan("shared", 32, vector), Plan("shared", 32, 4)
    if length < block:
        return f"{rows} rows of {length} entries: fewer than a block has"
    if length % whole.width:
        # 8 bytes a lane, or two units a warp where that is faster: of 151,936 entries
        # softmax's derivative 0.98 and 0.94 of the copy rate, log_softmax's 0.93 and
        # 0.94.
        two = op == ELEMENTWISE or kind[0].startswith("log_softmax_")
        whole = Plan("shared", 16, vector) if two or (state and not one) else half
    if op == ELEMENTWISE:
        return _in_chunks(whole, rows, length, _ELEMENTWISE)
    if state and one and itemsize == 2:
        return _in_chunks(half, rows, length, [(1, t) for t in _HALF_STATE_TILES])
    if state:
        warpgroups = 2 if length >= _STATE_TWO_WARPGROUPS else 1
        splits = [(warpgroups, tiles) for tiles in _STATE_TILES]
        return _in_chunks(whole, rows, length, splits)
    if mask is not None and op == "log_softmax":
        kind = f"{_MASKED}{op}", kind[1]
    return _long_plan(kind, length, whole, half)


def function_of_rows(op: str) -> str:
    """The function whose rows are split alike."""
    if op == ELEMENTWISE:
        return "softmax"
    return "log_softmax" if op == "cross_entropy" else function_of(op)


def arrays_read(function: str) -> int:
    """How many arrays of the shape of the rows it reads."""
    name = function.removeprefix(_BUSY).removeprefix(_MASKED)
    return 1 if name in _READS_ONE else 2


def most_short_tiles(op: str, wide: bool) -> int:
    """Most tiles of a row that lanes of one warp share."""
    one = arrays_read(function_of_rows(op)) == 1
    twice = one if wide else op == "log_softmax"
    return 2 * _SHORT if twice else _SHORT


def _short_plan(
    op: str,
    one: bool,
    rows: int,
    length: int,
    vector: int,
    mask: tuple[tuple[int, int], ...] | None,
) -> Plan | None:
    wide = vector == 4
    most = most_short_tiles(op, wide)
    if function_of(op) == "log_softmax" and length <= _SHORT_STATE:
        most = 2 * _SHORT
    widest = 32
    while widest >= 2 and length % (widest * vector):
        widest //= 2
    if widest < 2 or length // (widest * vector) > most:
        odd = length % 128 == 0 and length % (128 * vector)
        longest = _SHORT_ODD if wide else _SHORT_ODD_16_BITS.get(op, _SHORT_ODD)
        if not odd or length > longest:
            return None
        widest, vector = 32, 4
    # Sums over half as many lanes cost two rows as much as those over all cost one. Two
    # rows of 128 entries in 16 bits, of two arrays, 0.99 and 1.02 by one. log_softmax
    # with a mask, of 512 and of 1024 entries in bfloat16, 0.90 and 0.96 of the copy
    # rate, and 0.87 and 0.92 by 32 lanes.
    halved = length == widest * vector and widest >= (16 if one else 32)
    if op == "log_softmax" and mask is not None and not wide and widest == 32:
        halved = length // (16 * vector) <= most
    fewer = (widest // 2,) if halved else ()
    for lanes in (*fewer, widest):
        block = 4 * 32 // lanes
        # A block has rows of one mask row, or of as many that follow each other.
        if rows >= block and (mask is None or mask[-1][0] % block == 0):
            return Plan("rows", lanes, vector, tiles=length // (lanes * vector))
    return None


def _ragged_plan(
    kind: tuple[str, bool], state: bool, rows: int, length: int, vector: int
) -> Plan | str:
    """For rows that start and end between vectors, or are no whole tiles."""
    function, wide = kind
    shortest = _RAGGED_SHORTEST.get(function, _RAGGED_SHORTEST_OF_OTHERS)
    if length * 16 // vector < shortest:
        return f"{rows} rows of {length} entries are too short"
    # Wherever a row starts in 16 bytes of an array of 16 bits.
    vectors = -(-(length + 8 - math.gcd(length, 8)) // vector)
    units = -(-vectors // 32)
    narrow = {} if wide else _RAGGED_WARP_16_BITS
    most = narrow.get(function, _RAGGED_WARP)
    if rows >= 4 and units * vector <= most:
        return Plan("warps", 32, vector, tiles=units, ragged=True)
    splits = _RAGGED_STATES
    if not state:
        whole = (s for s in _SPLITS[kind] if s.place == "shared")
        splits = (*_RAGGED_SPLITS.get(kind, ()), *_RAGGED_SHORT, *whole)
    most = _MOST_STAGED // arrays_read(function)
    for s in sorted(splits, key=lambda s: s.blocks * s.warpgroups * s.tiles):
        if s.warpgroups * s.tiles > most:
            continue
        tiles = -(-units // (4 * s.blocks * s.warpgroups))
        # One more than is written there: for a power of 2 and what is before it.
        if tiles <= s.tiles + 1:
            return Plan(s.place, 32, vector, s.blocks, s.warpgroups, tiles, ragged=True)
    return (
        f"rows of {length} entries, no multiple of 128, are more than a cluster holds"
    )


def _in_chunks(
    shape: Plan, rows: int, length: int, splits: Sequence[tuple[int, int]]
) -> Plan:
    """Chunks that are read once, of the first split that reads little twice.

    The splits are warpgroups, and tiles of each.
    """
    tile, blocks = shape.height * shape.width, 1
    while (
        blocks < 16 and rows * blocks < _CHUNK_BLOCKS and length >= 32 * tile * blocks
    ):
        blocks *= 2

    def read(split: tuple[int, int]) -> int:
        chunk = blocks * math.prod(split) * tile
        return -(-length // chunk) * chunk

    few = (s for s in splits if read(s) <= (1 + _MOST_READ_TWICE) * length)
    warpgroups, tiles = next(few, min(splits, key=read))
    tiles = min(tiles, length // tile)
    return dataclasses.replace(
        shape, place="stream", blocks=blocks, warpgroups=warpgroups, tiles=tiles
    )


def _long_plan(kind: tuple[str, bool], length: int, whole: Plan, half: Plan) -> Plan:
    """A split of a row.

    Args:
      kind: As in `_SPLITS`.
      length: Entries per row.
      whole: The plan but for the split.
      half: The same, if a lane loads 8 bytes at once.
    """
    function, wide = kind
    for anyway in (False, True):
        for split in _SPLITS[kind]:
            shape = half if split.half else whole
            units = length // shape.width
            parts = shape.height * split.blocks * split.warpgroups
            tiles = -(-units // parts)
            # As many more as they are smaller than those of the table.
            most = split.tiles * (4 if wide else 8) // shape.vector
            if tiles > most or units < shape.height * tiles:
                continue
            twice = parts * tiles - units
            few = twice <= (_MOST_OVERLAP * units if split.blocks == 1 else 0)
            if split.place == "shared" or few or anyway:
                plan = dataclasses.replace(
                    shape,
                    place=split.place,
                    blocks=split.blocks,
                    warpgroups=split.warpgroups,
                    tiles=tiles,
                )
                return keeping(plan, units, shape.height, split.kept)
    splits = _CHUNKS[arrays_read(function), wide]
    if function.endswith("cross_entropy_with_gradient"):  # measured with this alone
        splits = splits[-1:]
    return read_twice(whole, length // whole.width, whole.height, splits)


def read_twice(
    shape: Plan,
    units: int,
    height: int,
    splits: Sequence[tuple[int, int, int, int]],
) -> Plan:
    """Chunks of about the same size, of the first split that keeps all it is to keep.

    Args:
      shape: The plan but for the split.
      units: Of a row.
      height: Units of a tile.
      splits: As in `_CHUNKS`; the last one keeps none.
    """
    for blocks, warpgroups, most, kept in splits:
        parts = height * blocks * warpgroups
        tiles = -(-units // (parts * -(-units // (parts * most))))
        split = dataclasses.replace(
            shape, blocks=blocks, warpgroups=warpgroups, tiles=tiles
        )
        plan = keeping(split, units, height, kept)
        if plan.kept == kept:
            return plan
    raise AssertionError(splits)


def owned_by_last(plan: Plan, units: int, height: int) -> int:
    """Units of its last chunk that the last warpgroup of a row owns, the fewest of all.

    Negative where others own those of its chunk.

    Args:
      plan: Of rows that clusters have.
      units: Of a row.
      height: Units of a tile.
    """
    share = plan.tiles * height
    parts = plan.blocks * plan.warpgroups
    shares = -(-units // (parts * share)) * parts
    return units - (shares - 1) * share


def keeping(plan: Plan, units: int, height: int, kept: int = 0) -> Plan:
    """The plan with tiles in registers: as many as its last warpgroup owns besides one.

    Args:
      plan: As in `owned_by_last`.
      units: As there.
      height: As there.
      kept: The most tiles in registers.
    """
    most = (owned_by_last(plan, units, height) - 1) // height
    return dataclasses.replace(plan, kept=max(min(kept, most), 0))
