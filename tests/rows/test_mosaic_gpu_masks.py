"""The PTX that reads masks of bools, run in `support.ptx`.

Pallas' interpreter does not run it, and reads masks in another way. Where a thread's
entries of a tile are is read off the layout, as Mosaic does.
"""

import numpy as np
import pytest
from support import ptx

from jaxsoftmax._compat import mosaic_gpu as _compat
from jaxsoftmax._compat import mosaic_gpu_masks as masks
from jaxsoftmax._rows.mosaic_gpu_plans import Plan
from jaxsoftmax._rows.mosaic_gpu_problem import tile_layout

usable = pytest.mark.skipif(
    _compat.mosaic_gpu_reason() is not None, reason="no such kernels with this jax"
)


def entries_of_threads(plan):
    """(threads, vector, 2): the row and column, in a tile, of what each thread has."""
    layout = tile_layout(plan).to_mgpu()
    each = np.stack(np.indices(plan.tile), -1)
    for tile in layout.tiling.tiles:
        *outer, rows, columns = each.shape[:-1]
        steps = rows // tile[-2] if len(tile) > 1 else rows, columns // tile[-1]
        height = tile[-2] if len(tile) > 1 else 1
        each = each.reshape(*outer, steps[0], height, steps[1], tile[-1], 2)
        each = np.moveaxis(each, -4, -3)
        if len(tile) == 1:  # of the last dimension alone
            each = each.reshape(*outer, *steps, tile[-1], 2)
    dims = [d - 1 for d in (*layout.warp_dims, *layout.lane_dims, layout.vector_dim)]
    each = np.moveaxis(each, dims, range(-1 - len(dims), -1))
    return each.reshape(ptx.THREADS, plan.vector, 2)


PLANS = [
    Plan("rows", lanes, vector) for lanes in (2, 4, 8, 16, 32) for vector in (4, 8)
]


def loaded(ref, row, entry, stride, length, plan, itemsize, *, staged):
    """The bits of a tile, per thread and entry, as the instructions find them."""
    text = masks._instructions(
        stride, length, plan.lanes, plan.vector, itemsize, staged
    )
    words = [None] * (plan.vector * itemsize // 4)
    group = ptx.Warpgroup([ref])
    found = group.run(text, [*words, ref.address, row, entry])
    bits = np.stack(found, 1).astype(np.uint32).view(np.uint8)
    return bits.view({1: np.uint8, 2: np.uint16}[itemsize])


@usable
@pytest.mark.parametrize("itemsize", [1, 2])
@pytest.mark.parametrize("how", ["rows of the mask", "one row", "one long row"])
@pytest.mark.parametrize("plan", PLANS, ids=lambda p: f"{p.lanes} x {p.vector}")
def test_every_thread_has_its_entries(rng, plan, how, itemsize):
    height, width = plan.tile
    length = 3 * width if how != "one long row" else (height + 2) * width
    stride = {"rows of the mask": length, "one row": 0, "one long row": width}[how]
    mask = rng.integers(0, 2, (height + 2, length)).astype(np.uint8)
    ref = ptx.Memory.of(ptx.REGION, mask)
    for row, entry in ((0, 0), (1, width), (2, 0)):
        place = entries_of_threads(plan)
        where = row * length + entry + place[..., 0] * stride + place[..., 1]
        want = mask.reshape(-1)[where] * np.uint16(1 if itemsize == 1 else 0xFFFF)
        got = loaded(ref, row, entry, stride, length, plan, itemsize, staged=False)
        np.testing.assert_array_equal(got, want)


@usable
@pytest.mark.parametrize("itemsize", [1, 2])
@pytest.mark.parametrize("plan", PLANS, ids=lambda p: f"{p.lanes} x {p.vector}")
def test_a_share_is_staged(monkeypatch, rng, plan, itemsize):
    height, width = plan.tile
    tiles, length = 3, 8 * height * width
    mask = rng.integers(0, 2, (4, length)).astype(np.uint8)
    source = ptx.Memory.of(ptx.REGION, mask)
    share = np.zeros(tiles * height * width, np.uint8)
    buffer = ptx.Memory.of(2 * ptx.REGION, share, readable=False, writable=True)
    barrier = ptx.Memory.of(3 * ptx.REGION, np.zeros(2, np.int32), readable=False)
    group = ptx.Warpgroup([source, buffer, barrier])

    def emit(text, refs, numbers=()):
        assert f"${len(refs) + len(numbers) - 1}" in text
        group.run(text, [*(ref.address for ref in refs), *map(int, numbers)])

    monkeypatch.setattr(masks.ptx, "emit", emit)
    monkeypatch.setattr(
        masks._compat, "mosaic_gpu", lambda: type("", (), {"commit_smem": lambda: 0})
    )
    source.dtype, buffer.shape = np.dtype(bool), share.shape
    staged = masks.StagedMask([buffer, barrier])
    start = 2 * height * width
    staged.start(source, 2, start, length)
    staged.wait()
    np.testing.assert_array_equal(buffer.data, mask[2, start : start + share.size])
    monkeypatch.undo()
    buffer.readable[:] = True
    place = entries_of_threads(plan)
    for tile in range(tiles):
        at = tile * height * width
        want = buffer.data[at + place[..., 0] * width + place[..., 1]]
        got = loaded(buffer, 0, at, width, length, plan, itemsize, staged=True)
        ones = np.uint16(1 if itemsize == 1 else 0xFFFF)
        np.testing.assert_array_equal(got, want * ones)
