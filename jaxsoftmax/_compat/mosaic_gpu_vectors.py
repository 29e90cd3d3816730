"""Rows that start anywhere, in vectors: for Pallas Mosaic GPU kernels.

Rows of any length lie one after another in a flat array: a row starts and ends anywhere
between the vectors of 16 bytes that an array is best read in. A row's *window* begins
at a multiple of so many entries, at or before the row. What is whole in the row comes
to shared memory by a bulk copy, and leaves registers in vectors. The two vectors at its
ends, its *edges*, are read and written entry by entry, each by another lane. So nothing
that is another row's, or nobody's, is ever touched.

Pallas has no such accesses: they are PTX. In the interpreter, which has no PTX, they
are plain ones.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxsoftmax._compat import mosaic_gpu as _compat
from jaxsoftmax._compat import mosaic_gpu_ptx as ptx

_BULK = 16  # bytes: what a bulk copy's address and size are multiples of
# Bytes before and after a mask, so that words around it are in the array.
MASK_PADDING = 16
# Size, and stride in rows of the mask, of each dimension; outermost first.
MaskDims = Sequence[tuple[int, int]]

_REGISTERS = """\
.reg .pred whole, edge, inside, tail, used;
.reg .b64 start, address, source;
.reg .b32 lane, warp, row, lead, entry, at, k, place, begin, count, total;
"""


def window(length: int, align: int) -> int:
    """The most entries of a window that begins at a multiple of `align`."""
    return length + align - math.gcd(length, align)


@dataclasses.dataclass(frozen=True)
class RaggedRows:
    """Where the lanes of a warpgroup have vectors of rows, and their accesses.

    Attributes:
      length: Entries of a row, at least those of a vector.
      vector: Entries of a vector.
      align: Entries that the start of a window is a multiple of.
      shared: Whether all warps have one row: a tile's units are those of a row, one
        after another. Else each warp has a row.
      layout: A tile's: four warps by 32 lanes by a vector.
    """

    length: int
    vector: int
    align: int
    shared: bool
    layout: Any

    @property
    def shape(self) -> tuple[int, int]:
        """A tile's."""
        return 4, 32 * self.vector

    @property
    def step(self) -> int:
        """Entries of a row that a tile has."""
        return (4 if self.shared else 1) * 32 * self.vector

    # --- shared memory ----------------------------------------------------------------

    @staticmethod
    def barriers(warpgroups: int) -> Any:
        """Barriers, those at each index for one use of `stage`."""
        return _compat.mosaic_gpu().SMEM((warpgroups, 8), np.dtype(np.int32))

    def edges(self, warpgroups: int, dtype: np.dtype) -> Any:
        """Places for edges of results, those at each index for one warpgroup."""
        shape = (warpgroups, 4, 2 * self.vector)
        return _compat.mosaic_gpu().SMEM(shape, dtype)

    def buffer(self, tiles: int) -> tuple[int, int]:
        """The shape of the place of so many tiles."""
        height, width = self.shape
        return (tiles * height, width) if self.shared else (height, tiles * width)

    def staged(self, buffer: Any, tile: Any) -> Any:
        """The reference to a tile in shared memory."""
        pl, (height, width) = _compat.pallas(), self.shape
        if self.shared:
            return buffer.at[pl.ds(tile * height, height)]
        return buffer.at[:, pl.ds(tile * width, width)]

    def stage(
        self,
        refs: Sequence[Any],
        buffers: Sequence[Any],
        barrier: Any,
        row: Any,
        first: Any,
        tiles: int,
        fills: Sequence[float],
    ) -> None:
        """Brings a warpgroup's tiles to shared memory.

        Args:
          refs: The arrays.
          buffers: For each its place, of the shape of `buffer`.
          barrier: A reference to one of `barriers`.
          row: The row; the first of four, where each warp has one.
          first: The first tile.
          tiles: How many tiles, one after another.
          fills: For each array, what entries of the tiles are that the row has not.
        """
        each = list(zip(refs, buffers, fills, strict=True))
        if _compat.is_interpreted():
            for ref, buffer, fill in each:
                for k in range(tiles):
                    place = self.staged(buffer, k)
                    place[...] = self._gather(ref, row, first + k, fill)
            return
        dtypes = [np.dtype(ref.dtype) for ref in refs]
        text = self._stage(dtypes, tiles, fills)
        self._inline(text, [*refs, *buffers, barrier], row, first)
        for buffer, dtype, fill in zip(buffers, dtypes, fills, strict=True):
            self._fill(buffer, dtype, row, first, tiles, fill)
        # So that all lanes know of the barrier, and see the edges.
        text = ""
        if self.shared:
            _compat.mosaic_gpu().commit_smem()
        else:
            text = "bar.warp.sync 0xffffffff;\n"
        text += (
            self._begin("0")
            + self._own("place", "$0", 8)
            + ptx.awaited("place", "used", "cta")
        )
        self._inline(text, [barrier])

    def _stage(
        self, dtypes: Sequence[np.dtype], tiles: int, fills: Sequence[float]
    ) -> str:
        """Starts the copies, and brings the edges.

        Operands: the arrays, their places, the barrier, the row, the first tile.
        """
        n, share = len(dtypes), tiles * self.step
        barrier, row, first = (f"${2 * n + k}" for k in range(3))
        text = (
            self._begin(row)
            + self._own("begin", barrier, 8)
            + (
                ".reg .b32 here;\n"
                f"mul.lo.u32 here, {first}, {self.step};\n"
                "setp.eq.u32 used, lane, 0;\nmov.u32 total, 0;\n"
                "@used mbarrier.init.shared::cta.b64 [begin], 1;\n"
                "fence.mbarrier_init.release.cluster;\n"
            )
        )
        for k, dtype in enumerate(dtypes):
            size, chunk = dtype.itemsize, _BULK // dtype.itemsize
            # From the first to the last multiple of the chunk in the row and the share.
            text += (
                f".reg .b32 bytes{k}, into{k};\n.reg .b64 from{k};\n"
                f"add.u32 at, lead, {chunk - 1};\nand.b32 at, at, {-chunk};\n"
                "max.s32 at, at, here;\n"
                f"add.u32 count, lead, {self.length};\n"
                f"and.b32 count, count, {-chunk};\n"
                f"add.u32 place, here, {share};\nmin.s32 count, count, place;\n"
                "sub.u32 count, count, at;\nmax.s32 count, count, 0;\n"
                f"mul.lo.u32 bytes{k}, count, {size};\n"
                f"add.u32 total, total, bytes{k};\n"
                + self._own(f"into{k}", f"${n + k}", share * size)
                + "sub.u32 place, at, here;\n"
                f"mad.lo.u32 into{k}, place, {size}, into{k};\n"
                "sub.u32 entry, at, lead;\n" + self._address(f"from{k}", size, f"${k}")
            )
        text += "@used mbarrier.arrive.expect_tx.shared::cta.b64 _, [begin], total;\n"
        for k in range(n):
            text += (
                f"setp.ne.and.u32 edge, bytes{k}, 0, used;\n"
                "@edge cp.async.bulk.shared::cluster.global"
                ".mbarrier::complete_tx::bytes "
                f"[into{k}], [from{k}], bytes{k}, [begin];\n"
            )
        store = ""
        for k, (dtype, fill) in enumerate(zip(dtypes, fills, strict=True)):
            size, chunk = dtype.itemsize, _BULK // dtype.itemsize
            if self.length % chunk == 0:
                continue
            bits = 8 * size
            text += (
                f".reg .b{bits} value{k};\n.reg .b32 slot{k};\n.reg .pred used{k};\n"
            )
            text += self._edge(chunk, "lane") + (
                # Only what is in the share.
                f"add.u32 at, entry, lead;\nsub.u32 place, at, here;\n"
                f"setp.lt.and.u32 used{k}, place, {share}, used;\n"
                f"setp.lt.and.u32 inside, entry, {self.length}, used{k};\n"
                f"mov.b{bits} value{k}, {_bits(fill, dtype)};\n"
                + self._address("source", size, f"${k}")
                + f"@inside ld.global.b{bits} value{k}, [source];\n"
                + self._own(f"slot{k}", f"${n + k}", share * size)
                + f"mad.lo.u32 slot{k}, place, {size}, slot{k};\n"
            )
            store += f"@used{k} st.shared.b{bits} [slot{k}], value{k};\n"
        return text + store

    def _fill(
        self,
        buffer: Any,
        dtype: np.dtype,
        row: Any,
        first: Any,
        tiles: int,
        fill: float,
    ) -> None:
        """Fills the vectors of tiles that are outside of the row."""
        size, chunk = dtype.itemsize, _BULK // dtype.itemsize
        words = self.vector * size // 4
        outside = self.length + chunk - 1
        text = self._begin("$1") + (
            f"add.u32 entry, $2, $3;\nmul.lo.u32 entry, entry, {self.step};\n"
            f"mad.lo.u32 entry, lane, {self.vector}, entry;\n"
            # By what a bulk copy brings, of which the vector may be a part.
            f"and.b32 entry, entry, {-chunk};\nsub.u32 entry, entry, lead;\n"
            f"add.u32 entry, entry, {chunk - 1};\n"
            f"setp.ge.u32 used, entry, {outside};\n"
            + self._own("place", "$0", tiles * self.step * size)
            + f"mad.lo.u32 place, $3, {self.step * size}, place;\n"
            f"mad.lo.u32 place, lane, {self.vector * size}, place;\n"
            f"mov.b32 total, {_bits(fill, dtype) * (0x10001 if size == 2 else 1)};\n"
            f"@used st.shared{ptx.access(words)} [place], "
            f"{ptx.listed(['total'] * words)};\n"
        )

        def at(k: Any) -> None:
            self._inline(text, [buffer], row, first, k)

        def each(k: Any, carry: Any) -> Any:
            at(k)
            return carry

        # The row's first tile, and those from the first that may not be whole.
        whole = self.length // self.step
        if not self.shared:
            for k in sorted({0, *range(whole, tiles)}):
                at(k)
            return
        _compat.pallas().when(first == 0)(lambda: at(0))
        begin = lax.max(jnp.int32(whole) - first, jnp.int32(0))
        begin = jnp.where(first == 0, lax.max(begin, 1), begin)
        lax.fori_loop(begin, jnp.int32(tiles), each, 0)

    # --- results ----------------------------------------------------------------------

    def store(
        self, ref: Any, edges: Any, row: Any, tile: Any, value: jax.Array
    ) -> None:
        """Writes the vectors of a tile that are whole in a row; keeps its edges.

        Args:
          ref: The array.
          edges: A reference to one of `edges`.
          row: As for `stage`.
          tile: Which tile.
          value: What it is.
        """
        if _compat.is_interpreted():
            self._scatter(ref, row, tile, value)
            return
        size = np.dtype(ref.dtype).itemsize
        count = self.vector * size // 4
        words = ptx.listed([f"${4 + k}" for k in range(count)])
        text = self._begin("$2") + (
            f"mul.lo.u32 entry, $3, {self.step};\n"
            f"mad.lo.u32 entry, lane, {self.vector}, entry;\n"
            "sub.u32 entry, entry, lead;\n"
            + self._address("address", size, "$0")
            + f"setp.le.u32 whole, entry, {self.length - self.vector};\n"
            f"@whole st.global{ptx.access(count)} [address], {words};\n"
        )
        if self.length % self.vector:
            text += (
                f"add.u32 at, entry, {self.vector - 1};\n"
                f"setp.lt.and.u32 edge, at, {self.length + self.vector - 1}, !whole;\n"
                + self._own("place", "$1", 2 * self.vector * size)
                # The edge at the end after that at the start.
                + "shr.s32 at, entry, 31;\nnot.b32 at, at;\n"
                f"and.b32 at, at, {self.vector * size};\nadd.u32 place, place, at;\n"
                f"@edge st.shared{ptx.access(count)} [place], {words};\n"
            )
        self._inline(text, [ref, edges], row, tile, value=value)

    def store_edges(
        self, ref: Any, edges: Any, row: Any, first: Any, tiles: int
    ) -> None:
        """Writes what `store` kept of tiles, one after another from the first."""
        if _compat.is_interpreted() or self.length % self.vector == 0:
            return
        size = np.dtype(ref.dtype).itemsize
        text = "bar.warp.sync 0xffffffff;\n" + self._begin("$2")
        text += "and.b32 k, lane, 31;\n" + self._edge(self.vector, "k")
        if self.shared:
            # Only by the warp that has it, which need not wait for others.
            shift = self.vector.bit_length() - 1
            text += (
                "add.u32 at, entry, lead;\n"
                f"shr.u32 at, at, {shift};\nshr.u32 place, at, 5;\n"
                "and.b32 place, place, 3;\nsetp.eq.and.u32 used, place, warp, used;\n"
                "shr.u32 at, at, 7;\nsub.u32 at, at, $3;\n"
                f"setp.lt.and.u32 used, at, {tiles}, used;\n"
            )
        text += (
            f".reg .b{8 * size} value;\n"
            f"setp.lt.and.u32 used, entry, {self.length}, used;\n"
            + self._own("place", "$1", 2 * self.vector * size)
            + f"mad.lo.u32 place, k, {size}, place;\n"
            + self._address("address", size, "$0")
            + f"@used ld.shared.b{8 * size} value, [place];\n"
            f"@used st.global.b{8 * size} [address], value;\n"
        )
        self._inline(text, [ref, edges], row, first)

    # --- masks ------------------------------------------------------------------------

    def load_mask(self, ref: Any, row: Any, tile: Any, dims: MaskDims) -> jax.Array:
        """A tile of a mask of bytes, 0 outside of the rows.

        Args:
          ref: The mask, flat, with `MASK_PADDING` before and after it.
          row: As for `stage`.
          tile: Which tile.
          dims: Size, and stride in rows of the mask, of each dimension of the rows.
        """
        if _compat.is_interpreted():
            return self._gather_mask(ref, row, tile, dims)
        n, wide = self.vector // 4, self.vector == 8
        pointer, row_, tile_ = (f"${n + k}" for k in range(3))
        text = self._begin(row_) + (
            f"mul.lo.u32 entry, {tile_}, {self.step};\n"
            f"mad.lo.u32 entry, lane, {self.vector}, entry;\n"
            "sub.u32 entry, entry, lead;\nmov.u64 start, 0;\n"
        )
        step = 1
        for size, stride in reversed(dims):
            if stride:
                text += (
                    f"div.u32 at, row, {step};\nrem.u32 at, at, {size};\n"
                    "cvt.u64.u32 source, at;\n"
                    f"mad.lo.u64 start, source, {stride * self.length}, start;\n"
                )
            step *= size
        bits = 8 * self.vector
        # Of the two words that have the entries, the bits from the first entry on.
        text += (
            f".reg .b{bits} low, high;\nmov.b{bits} low, 0;\nmov.b{bits} high, 0;\n"
            f"add.u32 at, entry, {self.vector - 1};\n"
            f"setp.lt.u32 inside, at, {self.length + self.vector - 1};\n"
            "cvt.s64.s32 source, entry;\nadd.s64 source, source, start;\n"
            f"add.s64 source, source, {MASK_PADDING};\ncvt.u32.u64 at, source;\n"
            f"and.b32 at, at, {self.vector - 1};\nshl.b32 at, at, 3;\n"
            f"and.b64 source, source, {-self.vector};\n"
            f"add.s64 source, source, {pointer};\n"
            f"@inside ld.global.b{bits} low, [source];\n"
            f"@inside ld.global.b{bits} high, [source+{self.vector}];\n"
            f"sub.u32 place, {bits}, at;\n"
            f"shr.b{bits} low, low, at;\nshl.b{bits} high, high, place;\n"
            f"or.b{bits} low, low, high;\n"
            + ("mov.b64 {$0, $1}, low;\n" if wide else "mov.b32 $0, low;\n")
        )
        return self._inline(text, [ref], row, tile, result=np.dtype(np.uint8))

    # --- pieces of PTX ----------------------------------------------------------------

    def _begin(self, row: str) -> str:
        """Sets ``lane``, ``warp``, ``row``, its ``start``, and ``lead`` in its window.

        `lane` counts those of all warps where these have one row.
        """
        text = (
            "mov.u32 lane, %tid.x;\nand.b32 lane, lane, 127;\nshr.u32 warp, lane, 5;\n"
        )
        if self.shared:
            text += f"mov.u32 row, {row};\n"
        else:
            text += f"and.b32 lane, lane, 31;\nadd.u32 row, warp, {row};\n"
        return (
            _REGISTERS
            + text
            + (
                f"mul.wide.s32 start, row, {self.length};\ncvt.u32.u64 lead, start;\n"
                f"and.b32 lead, lead, {self.align - 1};\n"
            )
        )

    def _own(self, name: str, pointer: str, nbytes: int) -> str:
        """Sets the address of the row's own part, of so many bytes."""
        if self.shared:
            return f"mov.u32 {name}, {pointer};\n"
        return f"mad.lo.u32 {name}, warp, {nbytes}, {pointer};\n"

    @staticmethod
    def _address(name: str, itemsize: int, pointer: str) -> str:
        """Sets the address of the row's ``entry``."""
        return (
            f"cvt.s64.s32 {name}, entry;\nadd.s64 {name}, {name}, start;\n"
            f"mad.lo.s64 {name}, {name}, {itemsize}, {pointer};\n"
        )

    def _edge(self, vector: int, lane: str) -> str:
        """Sets ``entry``, of an edge of the row, and ``used``, if there is one.

        The first lanes have the entries of the edge at the start, the next those of
        that at the end; some are another row's.
        """
        return (
            f"setp.lt.u32 used, {lane}, {2 * vector};\n"
            f"setp.ge.u32 tail, {lane}, {vector};\n"
            f"mov.u32 at, lead;\n@tail add.u32 at, lead, {self.length};\n"
            f"and.b32 entry, at, {vector - 1};\n"
            "setp.ne.and.u32 used, entry, 0, used;\n"
            f"and.b32 at, at, {-vector};\nand.b32 entry, {lane}, {vector - 1};\n"
            "add.u32 entry, entry, at;\nsub.u32 entry, entry, lead;\n"
        )

    def _inline(
        self,
        text: str,
        refs: Sequence[Any],
        *scalars: Any,
        value: jax.Array | None = None,
        result: np.dtype | None = None,
    ) -> Any:
        """Emits PTX.

        Args:
          text: Its operands are words of the result, addresses of the references,
            scalars, and words of the value.
          refs: The references.
          *scalars: int32.
          value: A tile.
          result: The dtype of a tile, if there is a result.
        """
        tile = None
        if result is not None:
            struct = _compat.mosaic_gpu().ShapeDtypeStruct
            tile = struct(self.shape, result, layout=self.layout)
        numbers = [jnp.int32(x) for x in scalars]
        return ptx.emit(
            text, refs, numbers, tile=value, layout=self.layout, result=tile
        )

    # --- in the interpreter -----------------------------------------------------------

    def _entries(self, row: Any, tile: Any) -> tuple[Any, Any]:
        """Of the tile's rows: where each starts in the array, and its first entry."""
        units = jnp.arange(self.shape[0], dtype=jnp.int32)
        if self.shared:
            start = jnp.broadcast_to(row * self.length, units.shape)
            place = (tile * self.shape[0] + units) * self.shape[1]
        else:
            start = (row + units) * self.length
            place = jnp.broadcast_to(tile * self.shape[1], units.shape)
        return start, place - start % self.align

    def _inside(self, first: Any) -> tuple[Any, Any]:
        """Of a tile: the entries, and which are in the row."""
        entry = first[:, None] + jnp.arange(self.shape[1], dtype=jnp.int32)[None]
        return entry, (entry >= 0) & (entry < self.length)

    def _gather(self, ref: Any, row: Any, tile: Any, fill: float) -> jax.Array:
        start, first = self._entries(row, tile)
        entry, inside = self._inside(first)
        place = jnp.where(inside, start[:, None] + entry, 0)
        return jnp.where(inside, ref[...][place], jnp.asarray(fill, ref.dtype))

    def _gather_mask(self, ref: Any, row: Any, tile: Any, dims: MaskDims) -> jax.Array:
        start, first = self._entries(row, tile)
        rows, step, mask_row = start // self.length, 1, jnp.zeros_like(start)
        for size, stride in reversed(dims):
            mask_row += rows // step % size * stride
            step *= size
        entry, inside = self._inside(first)
        place = mask_row[:, None] * self.length + entry + MASK_PADDING
        return jnp.where(inside, ref[...][jnp.where(inside, place, 0)], 0)

    def _scatter(self, ref: Any, row: Any, tile: Any, value: jax.Array) -> None:
        pl, width = _compat.pallas(), self.shape[1]
        start, first = self._entries(row, tile)
        for unit in range(self.shape[0]):
            whole = (first[unit] >= 0) & (first[unit] + width <= self.length)

            def write(unit: int = unit) -> None:
                ref[pl.ds(start[unit] + first[unit], width)] = value[unit]

            pieces = functools.partial(
                self._pieces, ref, start[unit], first[unit], value[unit]
            )
            pl.when(whole)(write)
            pl.when(~whole)(pieces)

    def _pieces(self, ref: Any, start: Any, first: Any, value: jax.Array) -> None:
        """Writes what is in the row in powers of two: sizes must be known."""
        pl = _compat.pallas()
        begin = jnp.maximum(first, 0)
        end = jnp.minimum(first + value.size, self.length)
        for size in (1 << bit for bit in range(value.size.bit_length())):

            def write(begin: Any = begin, size: int = size) -> None:
                part = lax.dynamic_slice(value, (begin - first,), (size,))
                ref[pl.ds(start + begin, size)] = part

            there = (lax.max(end - begin, 0) & size) != 0
            pl.when(there)(write)
            begin = jnp.where(there, begin + size, begin)


def _bits(number: float, dtype: np.dtype) -> int:
    return int(np.asarray(number, dtype).view(f"u{dtype.itemsize}"))
