"""Vectors of rows that start anywhere, in Pallas Mosaic GPU kernels.

Rows of any length lie one after another in a flat array: a row starts and ends anywhere
between the vectors that an array is best read in. A row's *window* begins at the whole
vector that has its first entry. A lane that has a vector of a window reads and writes
it at once where all of it is in the row, entry by entry what is in the row of another,
and nothing outside. So nothing that is another row's, or nobody's, is ever touched.

Pallas has no such accesses: they are PTX. In the interpreter, which has no PTX, they
are plain ones.
"""

import dataclasses
import functools
import importlib
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxsoftmax._compat import mosaic_gpu as _compat

_LANES = 32
# Bytes before and after a mask, so that words around it are in the array.
MASK_PADDING = 16
# Size, and stride in rows of the mask, of each dimension; outermost first.
MaskDims = Sequence[tuple[int, int]]
_BULK = 16  # bytes: what a bulk copy's address and size are multiples of


def _interpreted() -> bool:
    config = importlib.import_module("jax._src.config")
    return config.pallas_tpu_interpret_mode_context_manager.value is not None


def _dialect(name: str) -> Any:
    return importlib.import_module(f"jaxlib.mlir.dialects.{name}")


def _type(text: str) -> Any:
    return importlib.import_module("jaxlib.mlir.ir").Type.parse(text)


def _number(value: int, kind: str = "i32") -> Any:
    return _dialect("arith").constant(_type(kind), value)


def _add(a: Any, b: Any) -> Any:
    return _dialect("arith").addi(a, b)


def _times(a: Any, b: int, kind: str = "i32") -> Any:
    return _dialect("arith").muli(a, _number(b, kind))


def _wide(a: Any) -> Any:
    return _dialect("arith").extsi(_type("i64"), a)


def _address(pointer: Any, kind: str) -> Any:
    return _dialect("llvm").ptrtoint(_type(kind), pointer)


def _thread() -> Any:
    """The place of a thread in its warpgroup."""
    utils = importlib.import_module("jax.experimental.mosaic.gpu.utils")
    return _dialect("arith").andi(utils.thread_idx(), _number(127))


def _run(text: str, outs: int, constraints: Sequence[str], *operands: Any) -> list[Any]:
    """Inline PTX with effects on memory that gives some 32-bit words."""
    llvm = _dialect("llvm")
    ties = any(c.isdigit() for c in constraints)
    words = ", ".join(["i32"] * outs)
    kind = {0: "!llvm.void", 1: "i32"}.get(outs, f"!llvm.struct<({words})>")
    result = llvm.inline_asm(
        _type(kind),
        list(operands),
        "{\n" + text + "}",
        ",".join([*["=r" if ties else "=&r"] * outs, *constraints, "~{memory}"]),
        has_side_effects=True,
    )
    if outs < 2:
        return [result][:outs]
    return [llvm.extractvalue(_type("i32"), result, [k]) for k in range(outs)]


@dataclasses.dataclass(frozen=True)
class _Words:
    """PTX for a vector of entries as words of 32 bits.

    Attributes:
      vector: Entries of the vector.
      itemsize: Bytes of an entry.
      length: Entries of a row.
    """

    vector: int
    itemsize: int
    length: int

    @property
    def count(self) -> int:
        return self.vector * self.itemsize // 4

    @property
    def halves(self) -> bool:
        return self.itemsize == 2

    @property
    def access(self) -> str:
        """What follows ``ld.global`` for all of a vector."""
        return {1: ".b32", 2: ".v2.b32", 4: ".v4.b32"}[self.count]

    def names(self, first: int) -> list[str]:
        return [f"${first + k}" for k in range(self.count)]

    def listed(self, first: int) -> str:
        names = self.names(first)
        return names[0] if len(names) == 1 else "{" + ", ".join(names) + "}"

    def filler(self, fill: float, dtype: np.dtype) -> int:
        """The word of two, or one, entries `fill`."""
        bits = np.full(4 // self.itemsize, fill, dtype).view(np.uint32)
        return int(bits[0])

    def whole(self, entry: str = "entry") -> str:
        """Sets ``whole``: a vector that begins at this entry of the row is in it."""
        if self.length < self.vector:
            return "setp.ne.u32 whole, 0, 0;\n"
        return f"setp.le.u32 whole, {entry}, {self.length - self.vector};\n"

    @property
    def edge(self) -> str:
        """Sets ``edge``: some of the vector is in the row, but not all."""
        most = self.length + self.vector - 1
        return (
            f"add.u32 at, entry, {self.vector - 1};\n"
            f"setp.lt.u32 edge, at, {most};\n"
            "not.pred whole, whole;\nand.pred edge, edge, whole;\n"
        )

    def _entries(self, access: str, first: int, *, load: bool) -> str:
        """`access` to each entry of the vector that is in the row."""
        text, size = "", 8 * self.itemsize
        for k in range(self.vector):
            place = f"[address+{k * self.itemsize}]"
            register = f"half{k}" if self.halves else f"${first + k}"
            both = f"{register}, {place}" if load else f"{place}, {register}"
            text += f"add.u32 at, entry, {k};\n"
            text += f"setp.lt.u32 inside, at, {self.length};\n"
            text += f"@inside {access}.global.b{size} {both};\n"
        return text

    def _halves(self, first: int, *, split: bool) -> str:
        """Between words and entries of 16 bits."""
        text = ""
        for k, word in enumerate(self.names(first) if self.halves else []):
            pair = f"{{half{2 * k}, half{2 * k + 1}}}"
            text += f"mov.b32 {f'{pair}, {word}' if split else f'{word}, {pair}'};\n"
        return text

    def read_entries(self, first: int) -> str:
        entries = self._entries("ld", first, load=True)
        joined = self._halves(first, split=False)
        return self._halves(first, split=True) + entries + joined

    def write_entries(self, first: int) -> str:
        split = self._halves(first, split=True)
        return split + self._entries("st", first, load=False)


def window(length: int, align: int) -> int:
    """The most entries of a window that begins at a multiple of `align`."""
    return length + align - math.gcd(length, align)


@dataclasses.dataclass(frozen=True)
class RaggedRows:
    """Where a warpgroup's lanes have vectors of rows, and their accesses.

    Attributes:
      length: Entries of a row.
      vector: Entries of a vector.
      align: Entries that the start of a window is a multiple of.
      lanes: Lanes of a warp that share a row; 32 where one or more warps do.
      shared: Whether all warps have the same row, in turn a tile's units of it.
      layout: A tile's.
      shape: A tile's.
    """

    length: int
    vector: int
    align: int
    lanes: int
    shared: bool
    layout: Any
    shape: tuple[int, int]

    @property
    def _step(self) -> int:
        """Entries of a row that a tile has."""
        width = self.lanes * self.vector
        return 4 * width if self.shared else width

    def has_edges(self, tile: Any) -> bool:
        """Whether a tile may have vectors of which only a part is in a row."""
        if self.length % self.vector == 0:
            return False
        if self.shared or not isinstance(tile, int):
            return True
        return tile == 0 or (tile + 1) * self._step > self.length

    def words(self, dtype: Any) -> _Words:
        return _Words(self.vector, np.dtype(dtype).itemsize, self.length)

    # What follows is emitted into the kernel, per thread. As PTX wherever it is emitted
    # often: with fewer operations, kernels take less time to lower.

    def _locate(self, itemsize: int, pointer: str, row: str, tile: str) -> str:
        """Sets ``entry``, where in the row a lane's vector begins, and ``address``.

        Also ``lead``, where the row begins in its window, and ``lane``, the vector's
        place among those of a row in the tile.
        """
        text = (
            ".reg .pred whole, edge, inside;\n.reg .b64 start, address;\n"
            ".reg .b32 at, lane, warp, row, lead, entry;\n"
            f".reg .b16 half<{self.vector}>;\n"
            "mov.u32 lane, %tid.x;\nand.b32 lane, lane, 127;\n"
            "shr.u32 warp, lane, 5;\n"
        )
        if self.shared:
            text += f"mov.u32 row, {row};\n"
        else:
            per_warp = _LANES // self.lanes
            text += f"and.b32 lane, lane, 31;\nand.b32 row, lane, {per_warp - 1};\n"
            text += f"mad.lo.u32 row, warp, {per_warp}, row;\nadd.u32 row, row, {row};\n"
            text += f"shr.u32 lane, lane, {per_warp.bit_length() - 1};\n"
        return text + (
            f"mul.wide.s32 start, row, {self.length};\n"
            "cvt.u32.u64 lead, start;\n"
            f"and.b32 lead, lead, {self.align - 1};\n"
            f"mad.lo.u32 entry, lane, {self.vector}, 0;\n"
            f"mad.lo.u32 entry, {tile}, {self._step}, entry;\n"
            "sub.u32 entry, entry, lead;\n"
            "cvt.s64.s32 address, entry;\nadd.s64 address, address, start;\n"
            f"mad.lo.s64 address, address, {itemsize}, {pointer};\n"
        )

    def _lead(self, row: Any) -> tuple[Any, Any]:
        """Where a row starts in the array (64 bits), and in its window."""
        arith = _dialect("arith")
        start = _times(_wide(row), self.length, "i64")
        lead = arith.andi(arith.trunci(_type("i32"), start), _number(self.align - 1))
        return start, lead

    def load(
        self, ref: Any, row: jax.Array, tiles: int, fill: float
    ) -> list[jax.Array]:
        """All tiles of rows of a flat array, `fill` outside of the rows.

        Args:
          ref: The array.
          row: The first row.
          tiles: How many tiles a window has.
          fill: What entries are that are in the tile but not in the row.
        """
        if _interpreted():
            return [self._gather(ref, row, k, fill) for k in range(tiles)]
        plgpu, dtype = _compat.mosaic_gpu(), np.dtype(ref.dtype)
        words = self.words(dtype)

        n = words.count

        def emit(context: Any, ref: Any, row: Any) -> list[Any]:
            del context
            operands = _pointer(ref), _scalar(row)
            places = [
                self._locate(dtype.itemsize, f"${n}", f"${n + 1}", str(k))
                + words.whole()
                for k in range(tiles)
            ]
            fills = words.filler(fill, dtype)
            loaded = [_load_whole(words, fills, text, *operands) for text in places]
            edges = [
                _load_edge(words, found, text, *operands)
                if self.has_edges(k)
                else found
                for k, (found, text) in enumerate(zip(loaded, places, strict=True))
            ]
            return [self._fragments(found, dtype) for found in edges]

        tile = plgpu.ShapeDtypeStruct(self.shape, dtype, layout=self.layout)
        splat = plgpu.Layout.WG_SPLAT
        return list(
            plgpu.inline_mgpu(
                arg_types=(plgpu.RefType(), splat), return_type=[tile] * tiles
            )(emit)(ref, jnp.int32(row))
        )

    def anew(self, tile: jax.Array) -> jax.Array:
        """The tile, as if it had been loaded once more.

        What is computed from it is computed again, not kept since the last time.
        """
        if _interpreted():
            return tile
        plgpu, dtype = _compat.mosaic_gpu(), np.dtype(tile.dtype)
        n = self.words(dtype).count

        def emit(context: Any, tile: Any) -> Any:
            del context
            values = _unpack(tile.registers.item(), n)
            same = _run("", n, [str(k) for k in range(n)], *values)
            return self._fragments(same, dtype)

        result = plgpu.ShapeDtypeStruct(self.shape, dtype, layout=self.layout)
        run = plgpu.inline_mgpu(arg_types=(self.layout,), return_type=result)
        return run(emit)(tile)

    def _fragments(self, words: Sequence[Any], dtype: np.dtype) -> Any:
        """A tile of which each lane has one vector."""
        register = _pack(words, _vector_type(self.vector, dtype))
        layout = self.layout.to_mgpu()
        registers = np.array([register]).reshape(layout.registers_shape(self.shape))
        fragmented = importlib.import_module(_FRAGMENTS).FragmentedArray
        signed = False if dtype == np.uint8 else None
        return fragmented(_registers=registers, _layout=layout, _is_signed=signed)

    def store(self, ref: Any, row: jax.Array, tile: Any, value: jax.Array) -> None:
        """Writes what is in the rows of a tile."""
        if _interpreted():
            return self._scatter(ref, row, tile, value)
        plgpu, dtype = _compat.mosaic_gpu(), np.dtype(ref.dtype)
        words = self.words(dtype)
        text = self._locate(dtype.itemsize, "$0", "$1", "$2") + words.whole()
        text += f"@whole st.global{words.access} [address], {words.listed(3)};\n"
        if self.has_edges(tile):
            text += words.edge + "@!edge bra DONE;\n"
            text += words.write_entries(3) + "DONE:\n"

        def emit(context: Any, ref: Any, row: Any, tile: Any, value: Any) -> None:
            del context
            values = _unpack(value.registers.item(), words.count)
            operands = _pointer(ref), _scalar(row), _scalar(tile), *values
            _run(text, 0, ["l", "r", "r", *["r"] * words.count], *operands)

        splat = plgpu.Layout.WG_SPLAT
        plgpu.inline_mgpu(arg_types=(plgpu.RefType(), splat, splat, self.layout))(emit)(
            ref, jnp.int32(row), jnp.int32(tile), value
        )
        return None

    def load_mask(self, ref: Any, row: Any, tile: Any, dims: MaskDims) -> jax.Array:
        """A tile of a mask of bytes, 0 outside of the rows.

        Args:
          ref: The mask, flat, with `MASK_PADDING` before and after it.
          row: The first row.
          tile: Which tile.
          dims: Size, and stride in rows of the mask, of each dimension of the rows.
        """
        if _interpreted():
            return self._gather_mask(ref, row, tile, dims)
        plgpu, dtype, wide = _compat.mosaic_gpu(), np.dtype(np.uint8), self.vector == 8
        n = 2 if wide else 1
        text = self._locate(1, f"${n}", f"${n + 1}", f"${n + 2}")
        text += ".reg .b32 shift, digit;\n.reg .b64 place;\nmov.u64 start, 0;\n"
        step = 1
        for size, stride in reversed(dims):
            if stride:
                text += f"div.u32 digit, row, {step};\nrem.u32 digit, digit, {size};\n"
                text += "cvt.u64.u32 place, digit;\n"
                text += f"mad.lo.u64 start, place, {stride * self.length}, start;\n"
            step *= size
        most = self.length + self.vector - 1
        # Of the words that have the entries, the bits that come first.
        text += (
            f"add.u32 at, entry, {self.vector - 1};\nsetp.lt.u32 inside, at, {most};\n"
            "cvt.s64.s32 place, entry;\nadd.s64 place, place, start;\n"
            f"add.s64 place, place, {MASK_PADDING};\ncvt.u32.u64 shift, place;\n"
            f"and.b32 shift, shift, {self.vector - 1};\nshl.b32 shift, shift, 3;\n"
            f"and.b64 place, place, {-self.vector};\n"
            f"add.s64 address, place, ${n};\n"
        )
        if wide:
            text += (
                ".reg .b64 first, second;\n.reg .b32 rest;\n"
                "mov.b64 first, 0;\nmov.b64 second, 0;\n"
                "@inside ld.global.b64 first, [address];\n"
                "@inside ld.global.b64 second, [address+8];\n"
                "sub.u32 rest, 64, shift;\n"
                "shr.u64 first, first, shift;\nshl.b64 second, second, rest;\n"
                "or.b64 first, first, second;\nmov.b64 {$0, $1}, first;\n"
            )
        else:
            text += (
                ".reg .b32 first, second;\nmov.b32 first, 0;\nmov.b32 second, 0;\n"
                "@inside ld.global.b32 first, [address];\n"
                "@inside ld.global.b32 second, [address+4];\n"
                "shf.r.wrap.b32 $0, first, second, shift;\n"
            )

        def emit(context: Any, ref: Any, row: Any, tile: Any) -> Any:
            del context
            operands = _pointer(ref), _scalar(row), _scalar(tile)
            return self._fragments(_run(text, n, ["l", "r", "r"], *operands), dtype)

        splat = plgpu.Layout.WG_SPLAT
        result = plgpu.ShapeDtypeStruct(self.shape, dtype, layout=self.layout)
        types = plgpu.RefType(), splat, splat
        run = plgpu.inline_mgpu(arg_types=types, return_type=result)
        found: jax.Array = run(emit)(ref, jnp.int32(row), jnp.int32(tile))
        return found

    def stage(
        self,
        refs: Sequence[Any],
        buffers: Sequence[Any],
        barrier: Any,
        row: jax.Array,
        first: Any,
        tiles: int,
        fills: Sequence[float],
    ) -> None:
        """Brings a warpgroup's tiles to shared memory, as `load` has them.

        What is whole in a row comes by one bulk copy of each array; the lanes that read
        the rest later put it there.

        Args:
          refs: The arrays.
          buffers: For each its place: the tiles one after another if all warps have
            the same row, else side by side.
          barrier: A reference to one of `barriers`.
          row: The first row.
          first: The first tile.
          tiles: How many tiles, one after another.
          fills: For each array, what entries are that are not in the row.
        """
        each = list(zip(refs, buffers, fills, strict=True))
        if _interpreted():
            for ref, buffer, fill in each:
                for k in range(tiles):
                    place = self.staged(buffer, k)
                    place[...] = self._gather(ref, row, first + k, fill)
            return
        self._copy(refs, buffers, barrier, row, first, tiles)
        for ref, buffer, fill in each:
            self._fill(ref, buffer, row, first, tiles, fill)
        plgpu = _compat.mosaic_gpu()
        # From here on, all know of the barrier.
        sync = ""
        if self.shared:
            plgpu.commit_smem()
        else:
            sync = "bar.warp.sync 0xffffffff;\n"
        wait = (
            ".reg .pred done;\n" + sync + ""
            "AGAIN: mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 "
            "done, [$0], 0;\n@!done bra AGAIN;\n"
        )

        def emit(context: Any, barrier: Any) -> None:
            del context
            _run(wait, 0, ["r"], self._own(_pointer(barrier), 8))

        plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))(emit)(barrier)

    @staticmethod
    def barriers(warpgroups: int) -> Any:
        """Barriers, those at each index for one use of `stage`."""
        return _compat.mosaic_gpu().SMEM((warpgroups, 8), np.dtype(np.int32))

    def staged(self, buffer: Any, tile: Any) -> Any:
        """The reference to a tile in shared memory."""
        pl, (height, width) = _compat.pallas(), self.shape
        if self.shared:
            return buffer.at[pl.ds(tile * height, height)]
        return buffer.at[:, pl.ds(tile * width, width)]

    def buffer(self, tiles: int) -> tuple[int, int]:
        """The shape of the place of so many tiles."""
        height, width = self.shape
        return (tiles * height, width) if self.shared else (height, tiles * width)

    def _own(self, pointer: Any, nbytes: int) -> Any:
        """The address of a warp's part, of so many bytes, in shared memory."""
        address = _address(pointer, "i32")
        if self.shared:
            return address
        warp = _dialect("arith").shrui(_thread(), _number(5))
        return _add(address, _times(warp, nbytes))

    def _copy(
        self,
        refs: Sequence[Any],
        buffers: Sequence[Any],
        barrier: Any,
        row: jax.Array,
        first: jax.Array,
        tiles: int,
    ) -> None:
        plgpu = _compat.mosaic_gpu()
        sizes = [np.dtype(ref.dtype).itemsize for ref in refs]
        n = len(sizes)

        def emit(context: Any, *operands: Any) -> None:
            del context
            pointers = [_pointer(ref) for ref in operands[: 2 * n + 1]]
            row, first = map(_scalar, operands[2 * n + 1 :])
            barrier = self._own(pointers.pop(), 8)
            arith, thread = _dialect("arith"), _thread()
            if not self.shared:
                row = _add(row, arith.shrui(thread, _number(5)))
                thread = arith.andi(thread, _number(_LANES - 1))
            start, lead = self._lead(row)
            here = _times(first, self._step)
            each = [
                self._copied(a, b, size, start, lead, here, tiles)
                for a, b, size in zip(pointers[:n], pointers[n:], sizes, strict=True)
            ]
            total = functools.reduce(_add, [nbytes for *_, nbytes in each])
            text = (
                ".reg .pred one, any;\nsetp.eq.u32 one, $0, 0;\n"
                "@one mbarrier.init.shared::cta.b64 [$1], 1;\n"
                "fence.mbarrier_init.release.cluster;\n"
                "@one mbarrier.arrive.expect_tx.shared::cta.b64 _, [$1], $2;\n"
            )
            for k in range(n):
                to, source, nbytes = (f"${3 + 3 * k + i}" for i in range(3))
                text += (
                    f"setp.ne.and.u32 any, {nbytes}, 0, one;\n"
                    "@any cp.async.bulk.shared::cluster.global.mbarrier::"
                    f"complete_tx::bytes [{to}], [{source}], {nbytes}, [$1];\n"
                )
            flat = [x for three in each for x in three]
            constraints = ["r", "r", "r", *["r", "l", "r"] * n]
            _run(text, 0, constraints, thread, barrier, total, *flat)

        ref, splat = plgpu.RefType(), plgpu.Layout.WG_SPLAT
        types = (*[ref] * (2 * n + 1), splat, splat)
        plgpu.inline_mgpu(arg_types=types)(emit)(
            *refs, *buffers, barrier, jnp.int32(row), jnp.int32(first)
        )

    def _copied(
        self,
        pointer: Any,
        buffer: Any,
        itemsize: int,
        start: Any,
        lead: Any,
        here: Any,
        tiles: int,
    ) -> tuple[Any, Any, Any]:
        """Destination, source and bytes of what is whole in a row; none may be."""
        arith, chunk = _dialect("arith"), _BULK // itemsize
        down = _number(-chunk)
        begin = arith.andi(_add(lead, _number(chunk - 1)), down)
        end = arith.andi(_add(lead, _number(self.length)), down)
        share = tiles * self._step
        begin = arith.maxsi(begin, here)
        end = arith.minsi(end, _add(here, _number(share)))
        count = arith.maxsi(arith.subi(end, begin), _number(0))
        into = _times(arith.subi(begin, here), itemsize)
        offset = _add(start, _wide(arith.subi(begin, lead)))
        return (
            _add(self._own(buffer, share * itemsize), into),
            _add(_address(pointer, "i64"), _times(offset, itemsize, "i64")),
            _times(count, itemsize),
        )

    def _fill(
        self, ref: Any, buffer: Any, row: Any, first: Any, tiles: int, fill: float
    ) -> None:
        """Puts what no bulk copy brings into shared memory."""
        plgpu, dtype = _compat.mosaic_gpu(), np.dtype(ref.dtype)
        words, chunk = self.words(dtype), _BULK // np.dtype(dtype).itemsize
        n, filler = words.count, words.filler(fill, dtype)
        pointer, place, row_, first_, tile = (f"${n + k}" for k in range(5))
        text = f".reg .b32 tile, copied;\nadd.u32 tile, {first_}, {tile};\n"
        text += self._locate(dtype.itemsize, pointer, row_, "tile")
        # Where what may be copied at once begins, of which the vector is a part.
        text += (
            f"add.u32 copied, entry, lead;\nand.b32 copied, copied, {-chunk};\n"
            "sub.u32 copied, copied, lead;\n"
        )
        text += dataclasses.replace(words, vector=chunk).whole("copied")
        text += "@whole bra DONE;\n"
        text += "".join(f"mov.b32 {name}, {filler};\n" for name in words.names(0))
        if self.length % chunk:
            text += words.read_entries(0)
        nbytes = dtype.itemsize
        text += f"mad.lo.u32 at, {tile}, {self._step * nbytes}, {place};\n"
        text += f"mad.lo.u32 at, lane, {self.vector * nbytes}, at;\n"
        if not self.shared:
            text += f"mad.lo.u32 at, warp, {tiles * self._step * nbytes}, at;\n"
        text += f"st.shared{words.access} [at], {words.listed(0)};\nDONE:\n"

        def emit(context: Any, ref: Any, buffer: Any, *scalars: Any) -> None:
            del context
            operands = _pointer(ref), _pointer(buffer), *map(_scalar, scalars)
            _run(text, n, ["l", "r", "r", "r", "r"], *operands)

        ref_, splat = plgpu.RefType(), plgpu.Layout.WG_SPLAT
        run = plgpu.inline_mgpu(arg_types=(ref_, ref_, *[splat] * 3))(emit)

        def at(k: Any) -> None:
            run(ref, buffer, jnp.int32(row), jnp.int32(first), jnp.int32(k))

        # Only the row's first tile, and those from the last that may be whole.
        whole = self.length // self._step
        if not self.shared:
            for k in sorted({0, *range(whole, tiles)}):
                at(k)
            return
        _compat.pallas().when(first == 0)(lambda: at(0))
        begin = lax.max(jnp.int32(whole) - first, jnp.int32(0))
        begin = jnp.where(first == 0, lax.max(begin, 1), begin)
        lax.fori_loop(begin, jnp.int32(tiles), lambda k, _: (at(k), _)[1], 0)

    # In the interpreter.

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

    def _gather(self, ref: Any, row: Any, tile: Any, fill: float) -> jax.Array:
        start, first = self._entries(row, tile)
        entry = first[:, None] + jnp.arange(self.shape[1], dtype=jnp.int32)[None]
        inside = (entry >= 0) & (entry < self.length)
        place = jnp.where(inside, start[:, None] + entry, 0)
        return jnp.where(inside, ref[...][place], jnp.asarray(fill, ref.dtype))

    def _gather_mask(
        self, ref: Any, row: Any, tile: Any, dims: MaskDims
    ) -> jax.Array:
        start, first = self._entries(row, tile)
        rows, step, mask_row = start // self.length, 1, jnp.zeros_like(start)
        for size, stride in reversed(dims):
            mask_row += rows // step % size * stride
            step *= size
        entry = first[:, None] + jnp.arange(self.shape[1], dtype=jnp.int32)[None]
        inside = (entry >= 0) & (entry < self.length)
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


_FRAGMENTS = "jax.experimental.mosaic.gpu.fragmented_array"


def _pointer(ref: Any) -> Any:
    utils = importlib.import_module("jax.experimental.mosaic.gpu.utils")
    return utils.memref_ptr(ref)


def _scalar(array: Any) -> Any:
    return array.registers.item()


def _vector_type(vector: int, dtype: np.dtype) -> Any:
    names = {"bfloat16": "bf16", "float16": "f16", "float32": "f32", "uint8": "i8"}
    name = names[dtype.name]
    return _type(f"vector<{vector}x{name}>")


def _pack(words: Sequence[Any], kind: Any) -> Any:
    """A register of the vector from its words."""
    llvm = _dialect("llvm")
    many = _type(f"vector<{len(words)}xi32>")
    result = llvm.mlir_undef(many)
    for k, word in enumerate(words):
        result = llvm.insertelement(result, word, _number(k))
    return llvm.bitcast(kind, result)


def _unpack(register: Any, count: int) -> list[Any]:
    llvm = _dialect("llvm")
    many = llvm.bitcast(_type(f"vector<{count}xi32>"), register)
    return [llvm.extractelement(many, _number(k)) for k in range(count)]


def _load_whole(words: _Words, fill: int, place: str, *operands: Any) -> list[Any]:
    text = place
    text += "".join(f"mov.b32 {name}, {fill};\n" for name in words.names(0))
    text += f"@whole ld.global{words.access} {words.listed(0)}, [address];\n"
    return _run(text, words.count, ["l", "r"], *operands)


def _load_edge(
    words: _Words, loaded: Sequence[Any], place: str, *operands: Any
) -> list[Any]:
    text = place + words.edge + "@!edge bra DONE;\n"
    text += words.read_entries(0) + "DONE:\n"
    ties = [str(k) for k in range(words.count)]
    return _run(text, words.count, ["l", "r", *ties], *operands, *loaded)
