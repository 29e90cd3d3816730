"""Masks of bools, which Mosaic does not load: for Pallas Mosaic GPU kernels."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsoftmax._compat import mosaic_gpu as _compat
from jaxsoftmax._compat import mosaic_gpu_ptx as ptx


class StagedMask:
    """A warpgroup's share of a row of a mask of bools, in shared memory.

    Args:
      refs: The references that `scratch` is for, each at the warpgroup's index.
    """

    def __init__(self, refs: Sequence[Any]) -> None:
        self.buffer, self.barrier = refs

    @staticmethod
    def scratch(warpgroups: int, entries: int) -> list[Any]:
        """Places of so many entries, and barriers."""
        smem = _compat.mosaic_gpu().SMEM
        return [
            smem((warpgroups, entries), np.dtype(np.uint8)),
            smem((warpgroups, 2), np.dtype(np.int32)),
        ]

    def start(self, ref: Any, row: Any, entry: Any, length: int) -> None:
        """Begins to copy the share.

        Args:
          ref: The mask, flat.
          row: Its row, of `length` entries.
          entry: Where in that the share begins, a multiple of 16 as the others are.
          length: See above.
        """
        (count,) = self.buffer.shape
        if _compat.is_interpreted():
            at = row * length + entry
            self.buffer[...] = ref[_compat.pallas().ds(at, count)].astype(np.uint8)
            return
        text = (
            ".reg .b64 address, offset;\n.reg .b32 at;\n.reg .pred first;\n"
            "mov.u32 at, %tid.x;\nand.b32 at, at, 127;\nsetp.eq.u32 first, at, 0;\n"
            f"mul.wide.u32 address, $3, {length};\ncvt.u64.u32 offset, $4;\n"
            "add.u64 address, address, offset;\nadd.u64 address, address, $0;\n"
            + ptx.expecting("$2", count)
            + "@first cp.async.bulk.shared::cluster.global"
            f".mbarrier::complete_tx::bytes [$1], [address], {count}, [$2];\n"
        )
        refs = [ref, self.buffer, self.barrier]
        ptx.emit(text, refs, [jnp.int32(row), jnp.int32(entry)])
        _compat.mosaic_gpu().commit_smem()  # all threads know of the barrier

    def wait(self) -> None:
        """Waits for the copy."""
        if not _compat.is_interpreted():
            text = ".reg .pred done;\n" + ptx.awaited("$0", "done", "cta")
            ptx.emit(text, [self.barrier])


def load_mask(
    ref: Any,
    row: Any,
    entry: Any,
    stride: int,
    *,
    length: int,
    lanes: int,
    shape: tuple[int, int],
    layout: Any,
    dtype: Any,
) -> jax.Array:
    """A tile of a mask of bools, which Mosaic does not load.

    1 where it is True; in 16 bits, all of them are.

    Args:
      ref: The mask, flat; or `StagedMask.buffer`.
      row: The row of it that the tile begins in, of `length` entries.
      entry: Where in that.
      stride: Entries from a row of the tile to the next.
      length: See above.
      lanes: That have a row of the tile.
      shape: The tile's, of a warpgroup.
      layout: The tile's.
      dtype: uint8 or int16.
    """
    height, width = shape
    dtype = np.dtype(dtype)
    if _compat.is_interpreted():
        rows = row * length + entry + jnp.arange(height) * stride
        mask = ref[...][rows[:, None] + jnp.arange(width)[None]].astype(dtype)
        return -mask if dtype.itemsize == 2 else mask
    vector, staged = width // lanes, ref.dtype == np.uint8
    return ptx.emit(
        _instructions(stride, length, lanes, vector, dtype.itemsize, staged),
        [ref],
        [jnp.int32(row), jnp.int32(entry)],
        result=_compat.mosaic_gpu().ShapeDtypeStruct(shape, dtype, layout=layout),
        pure=not staged,
    )


def _instructions(
    stride: int, length: int, lanes: int, vector: int, itemsize: int, staged: bool
) -> str:
    """The PTX of `load_mask`: of a vector's words, the address, row and entry."""
    per_warp, count = 32 // lanes, vector // 4
    words = [f"word{k}" for k in range(count)]
    mask, row, entry = (f"${count * itemsize + k}" for k in range(3))
    text = (
        ".reg .b64 address, offset;\n.reg .b32 lane, line, at;\n"
        f".reg .b32 {', '.join(words)};\n"
        # Neighbouring lanes have neighbouring rows of the tile.
        "mov.u32 at, %tid.x;\nand.b32 lane, at, 31;\n"
        "shr.u32 line, at, 5;\nand.b32 line, line, 3;\n"
        f"rem.u32 at, lane, {per_warp};\nmad.lo.u32 line, line, {per_warp}, at;\n"
        f"div.u32 at, lane, {per_warp};\nmul.lo.u32 at, at, {vector};\n"
        f"mad.lo.u32 at, line, {stride}, at;\nadd.u32 at, at, {entry};\n"
    )
    into = f"{ptx.access(count)} {ptx.listed(words)}"
    if staged:
        text += f"add.u32 at, at, {mask};\nld.shared{into}, [at];\n"
    else:
        text += (
            f"mul.wide.u32 address, {row}, {length};\ncvt.u64.u32 offset, at;\n"
            f"add.u64 address, address, offset;\nadd.u64 address, address, {mask};\n"
            f"ld.global.nc{into}, [address];\n"
        )
    for k, word in enumerate(words):
        if itemsize == 1:
            text += f"mov.b32 ${k}, {word};\n"
        else:
            text += (
                f"mul.lo.u32 {word}, {word}, 255;\n"
                f"prmt.b32 ${2 * k}, {word}, 0, 0x1100;\n"
                f"prmt.b32 ${2 * k + 1}, {word}, 0, 0x3322;\n"
            )
    return text
