"""The PTX for rows that start between vectors, run in `support.ptx`.

Each row of arrays of every alignment: what comes to shared memory, what is written, and
that nothing but the row's own bytes is touched.
"""

import dataclasses

import jax
import numpy as np
import pytest
from support import ptx

from jaxsoftmax._compat import mosaic_gpu as _compat
from jaxsoftmax._compat import mosaic_gpu_vectors as vectors
from jaxsoftmax._compat.mosaic_gpu_vectors import MASK_PADDING, RaggedRows, window

pytestmark = pytest.mark.skipif(
    _compat.mosaic_gpu_reason() is not None, reason=str(_compat.mosaic_gpu_reason())
)

UINT = {2: np.uint16, 4: np.uint32}


@dataclasses.dataclass
class Ref:
    """A reference to memory."""

    memory: ptx.Memory
    dtype: np.dtype


class Machine:
    """The memory of a warpgroup, and what it runs."""

    def __init__(self):
        self.memories = []
        self.warpgroup = None

    def ref(self, array, dtype=None, **access):
        """An array in a region of its own, from a multiple of 256 bytes on."""
        address = (len(self.memories) + 1) * ptx.REGION + ptx.REGION // 2
        self.memories.append(ptx.Memory.of(address, array, **access))
        self.warpgroup = ptx.Warpgroup(self.memories)
        return Ref(self.memories[-1], np.dtype(dtype or array.dtype))

    def inline(self, ragged, text, refs, *scalars, value=None, result=None):
        """In place of `RaggedRows._inline`."""
        words = 0 if result is None else ragged.vector * result.itemsize // 4
        operands = [None] * words + [ref.memory.address for ref in refs]
        operands += [int(x) for x in scalars]
        if value is not None:
            operands += list(value.view(np.uint32).astype(object).T)
        found = self.warpgroup.run(text, operands)
        if result is not None:
            words = np.stack(found, 1).astype(np.uint32)
            return words.view(np.uint8).reshape(ptx.THREADS, ragged.vector)
        return None


@pytest.fixture
def machine(monkeypatch):
    found = Machine()
    monkeypatch.setattr(
        RaggedRows, "_inline", lambda self, *args, **kw: found.inline(self, *args, **kw)
    )
    monkeypatch.setattr(
        vectors._compat, "mosaic_gpu", lambda: type("", (), {"commit_smem": lambda: 0})
    )
    with jax.disable_jit():
        yield found


def ragged_rows(length, itemsizes, bytes_, *, shared, tiles):
    """As `_rows.mosaic_gpu` makes them, for tiles that hold the row."""
    align, vector = bytes_ // min(itemsizes), 16 // max(itemsizes)
    rows = RaggedRows(length, vector, align, shared, None)
    assert window(length, align) <= tiles * rows.step
    return rows


def places(ragged, row, tile):
    """Each thread's entries of a tile: where in its row, and the row."""
    thread = np.arange(ptx.THREADS)
    rows = np.full_like(thread, row) if ragged.shared else row + thread // 32
    lane = thread if ragged.shared else thread % 32
    first = tile * ragged.step + lane * ragged.vector
    first = first - rows * ragged.length % ragged.align
    return first[:, None] + np.arange(ragged.vector), rows


def of_rows(array, ragged, row):
    """Which bytes of an array are in the rows that the warpgroup has."""
    mine = np.zeros(array.shape, bool)
    mine[row : row + (1 if ragged.shared else 4)] = True
    return np.repeat(mine.reshape(-1), array.itemsize)


# Length, bytes of entries of each array and of the result, multiple of bytes that a
# window begins at, tiles, whether warps share a row.
CASES = [
    (251, (2,), 2, 128, 2, False),
    (251, (2, 2), 2, 16, 2, False),
    (509, (4, 4), 4, 16, 4, False),
    (130, (4,), 4, 128, 2, False),
    (300, (2, 4), 4, 32, 3, False),
    (203, (4, 2), 2, 64, 2, False),
    (203, (4,), 2, 16, 2, False),
    (248, (2, 2), 2, 64, 2, False),
    (20, (2,), 2, 128, 1, False),
    (1017, (2, 2), 2, 16, 1, True),
    (1500, (2,), 2, 128, 2, True),
    (1001, (4,), 4, 32, 2, True),
    (900, (2, 4), 2, 64, 2, True),
    (3001, (2, 2), 2, 128, 3, True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_come_whole_and_alone(machine, rng, case):
    length, itemsizes, out, bytes_, tiles, shared = case
    ragged = ragged_rows(length, (*itemsizes, out), bytes_, shared=shared, tiles=tiles)
    count = 9 if not shared else 6
    arrays = [
        rng.integers(0, 2**16, (count, length)).astype(UINT[size]) for size in itemsizes
    ]
    fills, step = (-np.inf, 0.0)[: len(arrays)], ragged.step
    for row in range(0, count - 3, 5) if not shared else range(count):
        # In two shares, of which the second may have nothing.
        half = -(-tiles // 2) if shared else tiles
        for first in range(0, tiles, half):
            refs = [machine.ref(a, f"f{a.itemsize}") for a in arrays]
            for ref, array in zip(refs, arrays, strict=True):
                ref.memory.readable[:] = of_rows(array, ragged, row)
            here = [
                np.zeros((1 if shared else 4, half * step), a.dtype) for a in arrays
            ]
            buffers = [
                machine.ref(b, f"f{b.itemsize}", readable=False, writable=True)
                for b in here
            ]
            barrier = machine.ref(np.zeros(8, np.int32), readable=False)
            ragged.stage(refs, buffers, barrier, row, first, half, fills)
            for array, buffer, fill in zip(arrays, buffers, fills, strict=True):
                assert buffer.memory.written.all()
                got = buffer.memory.data.view(array.dtype).reshape(-1, half * step)
                for k, line in enumerate(got):
                    lead = (row + k) * length % ragged.align
                    entry = np.arange(half * step) + first * step - lead
                    inside = (entry >= 0) & (entry < length)
                    filler = np.array(fill, f"f{array.itemsize}").view(array.dtype)
                    want = np.where(inside, array[row + k][entry * inside], filler)
                    np.testing.assert_array_equal(line, want)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_are_written_whole_and_alone(machine, rng, case):
    length, itemsizes, size, bytes_, tiles, shared = case
    ragged = ragged_rows(length, (*itemsizes, size), bytes_, shared=shared, tiles=tiles)
    count = 9 if not shared else 6
    want = rng.integers(0, 2**16, (count, length)).astype(UINT[size])
    out = machine.ref(np.zeros_like(want), f"f{size}", readable=False, writable=True)
    for row in range(0, count - 4, 4) if not shared else range(count):
        out.memory.writable[:] = of_rows(want, ragged, row)
        half = -(-tiles // 2) if shared else tiles
        for first in range(0, tiles, half):
            slots = np.zeros((4, 2 * ragged.vector), want.dtype)
            edges = machine.ref(slots, f"f{size}", writable=True)
            for tile in range(first, min(first + half, tiles)):
                entry, rows = places(ragged, row, tile)
                inside = (entry >= 0) & (entry < length)
                value = np.where(inside, want[rows[:, None], entry * inside], 0)
                ragged.store(out, edges, row, tile, value.astype(want.dtype))
            ragged.store_edges(out, edges, row, first, half)
    done = count if shared else (count - 1) // 4 * 4
    got = out.memory.data.view(want.dtype).reshape(want.shape)[:done]
    np.testing.assert_array_equal(got, want[:done])
    assert out.memory.written.reshape(count, -1)[:done].all()


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("vector", [4, 8])
@pytest.mark.parametrize("dims", [((2, 1), (3, 0), (2, 2)), ((12, 1),), ((12, 0),)])
def test_masks_that_start_elsewhere(machine, rng, shared, vector, dims):
    if dims[0] == (2, 1):
        dims = ((2, 2), (3, 0), (2, 1))
    length, count = 203, 1 + sum((size - 1) * stride for size, stride in dims)
    ragged = RaggedRows(length, vector, 64, shared, None)
    mask = rng.integers(0, 2, (count, length)).astype(np.uint8)
    ref = machine.ref(np.pad(mask.reshape(-1), MASK_PADDING))
    for row in range(0, 9, 1 if shared else 4):
        for tile in range(3):
            entry, rows = places(ragged, row, tile)
            mask_row, step = np.zeros_like(rows), 1
            for size, stride in reversed(dims):
                mask_row += rows // step % size * stride
                step *= size
            inside = (entry >= 0) & (entry < length)
            want = np.where(inside, mask[mask_row[:, None], entry * inside], 0)
            got = ragged.load_mask(ref, row, tile, dims)
            np.testing.assert_array_equal(got * inside, want)
