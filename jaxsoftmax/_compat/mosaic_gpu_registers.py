"""Tiles in registers, number by number: for Pallas Mosaic GPU kernels.

Pallas computes with tiles. What takes fewer instructions if it is written for the
vectors that a thread has of one, or for pairs of their numbers, is here. In the
interpreter it is computed with tiles.
"""

import functools
import importlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxsoftmax._compat import mosaic_gpu as _compat


def _of_each_register(x: jax.Array, layout: Any, compute: Any) -> jax.Array:
    """[...] in float32: what `compute` makes of each of the vectors of `x`."""
    plgpu = _compat.mosaic_gpu()
    wide = plgpu.ShapeDtypeStruct(x.shape, np.dtype(np.float32), layout=layout)

    def run(context: Any, tile: Any) -> Any:
        del context
        registers = np.empty_like(tile.registers)
        for index, register in np.ndenumerate(tile.registers):
            registers[index] = compute(register)
        return type(tile)(_registers=registers, _layout=tile.layout, _is_signed=None)

    return plgpu.inline_mgpu(arg_types=(layout,), return_type=wide)(run)(x)


def _widened(numbers: Any) -> Any:
    """In float32, a vector of an even count of bfloat16."""
    ir = importlib.import_module("jaxlib.mlir.ir")
    arith = importlib.import_module("jaxlib.mlir.dialects.arith")
    vector = importlib.import_module("jaxlib.mlir.dialects.vector")
    word, number = ir.IntegerType.get_signless(32), ir.F32Type.get()
    upper, by = (
        arith.constant(word, ir.IntegerAttr.get(word, n)) for n in (-65536, 16)
    )
    (count,) = ir.VectorType(numbers.type).shape
    pairs = vector.bitcast(ir.VectorType.get((count // 2,), word), numbers)
    halves = []
    for i in range(count // 2):
        both = vector.extract(pairs, [], [i])
        halves += [arith.shli(both, by), arith.andi(both, upper)]
    wide = [arith.bitcast(number, half) for half in halves]
    return vector.from_elements(ir.VectorType.get((count,), number), wide)


def _widened_again(numbers: Any) -> Any:
    """In float32, by what neither LLVM nor ptxas knows to be the same as before."""
    ir = importlib.import_module("jaxlib.mlir.ir")
    llvm = importlib.import_module("jaxlib.mlir.dialects.llvm")
    vector = importlib.import_module("jaxlib.mlir.dialects.vector")
    word, number = ir.IntegerType.get_signless(32), ir.F32Type.get()
    kind = ir.VectorType(numbers.type)
    (count,) = kind.shape
    if kind.element_type == ir.BF16Type.get():
        # Bytes from the lowest on: two zeros, two of the pair.
        lower, upper = ("prmt.b32 $0, $1, 0, " + b for b in ("0x1044;", "0x3244;"))
    else:
        swapped = (
            "{.reg .b16 l, u; .reg .b32 p; prmt.b32 p, $1, 0, 0x1032; "
            "mov.b32 {u, l}, p; cvt.f32.f16 $0, "
        )
        lower, upper = swapped + "l;}", swapped + "u;}"
    pairs = vector.bitcast(ir.VectorType.get((count // 2,), word), numbers)
    wide = []
    for i in range(count // 2):
        both = vector.extract(pairs, [], [i])
        wide += [llvm.inline_asm(number, [both], a, "=f,r") for a in (lower, upper)]
    return vector.from_elements(ir.VectorType.get((count,), number), wide)


def widened(x: jax.Array, layout: Any = None, *, again: bool = False) -> jax.Array:
    """A tile in float32.

    Of bfloat16 a number is the upper half of its float32: one instruction each, where a
    conversion takes up to two, or keeps pairs from being rounded together.

    Args:
      x: The tile.
      layout: How it lies in registers, pairs side by side; if None, as for wgmma.
      again: By other instructions, so that what a tile was widened to before is not
        kept until now: in 16 bits it takes half the registers.
    """
    by_conversion = x.dtype != jax.numpy.bfloat16 and not again
    if _compat.is_interpreted() or by_conversion or x.dtype.itemsize != 2:
        return x.astype(np.float32)
    layout = _compat.mosaic_gpu().Layout.WGMMA if layout is None else layout
    return _of_each_register(x, layout, _widened_again if again else _widened)


class _TileFunctions(NamedTuple):
    """Functions of tiles, in a kernel or in the interpreter.

    Attributes:
      exp2: Approximate.
      reciprocal: Within 1 ulp; 0 of infinity.
      minimum: Of a tile and a number.
    """

    exp2: Any
    reciprocal: Any
    minimum: Any


def by_size(
    power: float,
    small: Any,
    large: Any,
    x: jax.Array,
    *others: jax.Array,
    results: int,
    layout: Any,
    columns: int,
) -> Any:
    """`small` of a tile where its squares are below `power`, or `large`.

    Decided for each warp, of all that it has of some columns as wgmma has them, or of
    the tile. The sum of a square below it and the power, which is one of two, has
    the power's exponent. So what one instruction makes of a number, for `small` too, is
    looked at by another, two numbers at a time.

    Args:
      power: A power of two.
      small: A function of the sums of squares and the power, of `large`'s first
        argument, and of the tiles; it gives a tuple of tiles.
      large: A function of `_TileFunctions` and of the tiles, with the same results.
      x: The tile, in float32.
      *others: More tiles like it.
      results: How many.
      layout: How the tiles lie in registers; if None, as for wgmma.
      columns: For how many it is decided at once, with no layout: their squares are in
        registers.
    """
    if _compat.is_interpreted():
        do = _TileFunctions(
            jax.numpy.exp2,
            functools.partial(jax.numpy.divide, 1),
            jax.numpy.minimum,
        )
        squares = x * x + power
        return jax.lax.cond(
            jax.numpy.all(squares < 2 * power),
            lambda *tiles: small(squares, do, *tiles),
            lambda *tiles: large(do, *tiles),
            *(x, *others),
        )
    plgpu = _compat.mosaic_gpu()
    part = x.shape[1] if layout is not None else columns
    layout = plgpu.Layout.WGMMA if layout is None else layout
    like = plgpu.ShapeDtypeStruct(x.shape, np.dtype(np.float32), layout=layout)
    do = _TileFunctions(
        lambda tile: tile.exp2(approx=True),
        # A division takes eight instructions even where it may be approximate.
        lambda tile: tile._pointwise(tile._lift_fast_instr("rcp.approx.ftz.f32")),
        lambda tile, number: tile.min(number),
    )

    def run(context: Any, *tiles: Any) -> Any:
        del context
        ir = importlib.import_module("jaxlib.mlir.ir")
        scf = importlib.import_module("jaxlib.mlir.dialects.scf")
        tile, found = tiles[0], []
        # Each part by itself: all at once would need registers for both outcomes.
        for start in range(0, tile.shape[1], part):
            own = slice(start, min(start + part, tile.shape[1]))
            parts = [tile[:, own] for tile in tiles]
            squares = parts[0] * parts[0] + power
            is_small = _have_exponent(squares.registers.flat, power)
            types = [register.type for register in squares.registers.flat] * results
            chosen = scf.IfOp(is_small, types, has_else=True)
            for block, f in (
                (chosen.then_block, functools.partial(small, squares)),
                (chosen.else_block, large),
            ):
                with ir.InsertionPoint(block):
                    outcome = [r for y in f(do, *parts) for r in y.registers.flat]
                    scf.yield_(outcome)
            registers = np.empty((results, *squares.registers.shape), object)
            registers.flat[:] = list(chosen.results)
            found.append(registers)
        registers = np.concatenate(found, axis=2)
        return tuple(
            type(tile)(_registers=each, _layout=tile.layout, _is_signed=None)
            for each in registers
        )

    types = (layout,) * (1 + len(others))
    inline = plgpu.inline_mgpu(arg_types=types, return_type=(like,) * results)
    return inline(run)(x, *others)


def _have_exponent(registers: Any, power: float) -> Any:
    """Whether all numbers of a warp have a power's, none being below it.

    Args:
      registers: Vectors of its own, of an even count.
      power: A power of two.
    """
    ir = importlib.import_module("jaxlib.mlir.ir")
    arith = importlib.import_module("jaxlib.mlir.dialects.arith")
    llvm = importlib.import_module("jaxlib.mlir.dialects.llvm")
    vector = importlib.import_module("jaxlib.mlir.dialects.vector")
    word = ir.IntegerType.get_signless(32)
    exponent = int(np.float32(power).view(np.int32))
    # Several chains: each instruction waits for the one before it in its own.
    chains = [arith.constant(word, ir.IntegerAttr.get(word, 0))] * 4
    numbers = [
        vector.extract(register, [], [k])
        for register in registers
        for k in range(ir.VectorType(register.type).shape[0])
    ]
    for i, two in enumerate(zip(numbers[::2], numbers[1::2], strict=True)):
        chains[i % 4] = llvm.inline_asm(
            word, [chains[i % 4], *two], "lop3.b32 $0, $1, $2, $3, 0xfe;", "=r,r,f,f"
        )
    differs = (
        "{.reg .pred p; .reg .b32 e; and.b32 e, $1, 0x7f800000; "
        f"setp.ne.u32 p, e, {exponent}; "
        "vote.sync.any.pred p, p, 0xffffffff; selp.s32 $0, 0, 1, p;}"
    )
    bits = functools.reduce(arith.ori, chains)
    found = llvm.inline_asm(word, [bits], differs, "=r,r", has_side_effects=True)
    return arith.trunci(ir.IntegerType.get_signless(1), found)


def words_layout() -> Any:
    """That of (64, 4) words: each with the thread that wgmma gives its bits' numbers.

    Of a tile of logits a thread has, in each of its rows, the columns 8 j + 2 c and
    8 j + 2 c + 1, where c is its place among four.
    """
    plgpu = _compat.mosaic_gpu()
    return plgpu.Layout.TILED(
        plgpu.Tiling(((64, 4), (16, 4), (8, 4), (1,))),
        warp_dims=(-7,),
        lane_dims=(-3, -2),
        vector_dim=-1,
    )


def bits(
    condition: Any, advance: Any, first: Sequence[jax.Array], columns: int
) -> jax.Array:
    """Words, as `where_bits` has them, of where a condition holds on a tile.

    In registers, a loop computes it of eight columns after eight: all at once would
    need too many, and be a long program.

    Args:
      condition: Of the numbers of eight columns, a comparison. Computed as `advance` by
        Python's operators, of nothing else but scalars that are arguments.
      advance: From these numbers to those of the next eight columns.
      first: Those of the first, each (64, 8) in 32 bits as wgmma has it, and scalars.
      columns: How many, up to 128.
    """
    rows = first[0].shape[0]
    if _compat.is_interpreted():
        found, now = [], list(first)
        for _ in range(columns // 8):
            found.append(condition(now).reshape(rows, 4, 2))
            now = advance(now)
        bits = jax.numpy.stack(found, 1).swapaxes(2, 3).reshape(rows, columns // 4, 4)
        index = jax.lax.broadcasted_iota(np.int32, bits.shape, 1)
        shifted = bits.astype(np.int32) << index
        return jax.numpy.sum(shifted, axis=1, dtype=np.int32)
    plgpu = _compat.mosaic_gpu()
    of_words = words_layout()
    like = plgpu.ShapeDtypeStruct((rows, 4), np.dtype(np.int32), layout=of_words)

    def run(context: Any, *first: Any) -> Any:
        del context
        ir = importlib.import_module("jaxlib.mlir.ir")
        arith = importlib.import_module("jaxlib.mlir.dialects.arith")
        scf = importlib.import_module("jaxlib.mlir.dialects.scf")
        vector = importlib.import_module("jaxlib.mlir.dialects.vector")
        word = ir.IntegerType.get_signless(32)

        def constant(number: int) -> Any:
            return arith.constant(word, ir.IntegerAttr.get(word, number))

        bounds = [constant(n) for n in (0, columns // 8, 1)]
        carry = [constant(n) for n in (0, 0, 1)]  # the words, and the next bit
        carry += [r for a in first if a.shape for r in a.registers.flat]
        loop = scf.ForOp(*bounds, carry)
        with ir.InsertionPoint(loop.body):
            *words, bit = loop.inner_iter_args[:3]
            registers = iter(loop.inner_iter_args[3:])
            now = []
            for a in first:
                if a.shape:
                    own = np.empty_like(a.registers)
                    own.flat[:] = [next(registers) for _ in range(own.size)]
                    a = type(a)(_registers=own, _layout=a.layout, _is_signed=False)
                now.append(a)
            bits = bit, arith.shli(bit, constant(1))
            for index, register in np.ndenumerate(condition(now).registers):
                row = index[4]
                for k in range(2):
                    holds = vector.extract(register, [], [k])
                    own = arith.select(holds, bits[k], constant(0))
                    words[row] = arith.ori(words[row], own)
            later = [r for a in advance(now) if a.shape for r in a.registers.flat]
            scf.yield_([*words, arith.shli(bit, constant(2)), *later])
        tiled = of_words.to_mgpu()
        registers = np.empty(tiled.registers_shape((rows, 4)), object)
        kind = ir.VectorType.get((1,), word)
        registers.flat[:] = [vector.from_elements(kind, [w]) for w in loop.results[:2]]
        return type(first[0])(_registers=registers, _layout=tiled, _is_signed=True)

    layouts = plgpu.Layout.WGMMA, plgpu.Layout.WG_SPLAT
    operands = [jax.numpy.asarray(a) for a in first]
    types = tuple(layouts[not a.shape] for a in operands)
    return plgpu.inline_mgpu(arg_types=types, return_type=like)(run)(*operands)


def where_bits(words: jax.Array, x: jax.Array, otherwise: float = -np.inf) -> jax.Array:
    """A tile where its bits are 1, and a number elsewhere.

    Args:
      words: (64, 4) in int32, as `words_layout` has them: bit 2 j + e of word c
        is that of column 8 j + 2 c + e.
      x: (64, up to 128) in float32, as wgmma has it.
      otherwise: The number.
    """
    if _compat.is_interpreted():
        rows, columns = x.shape
        shape = rows, columns // 4, 4
        words = jax.lax.broadcast_in_dim(words, shape, [0, 2])
        found = (words >> jax.lax.broadcasted_iota(np.int32, shape, 1)) & 1
        found = found.reshape(rows, columns // 8, 2, 4).swapaxes(2, 3)
        return jax.numpy.where(found.reshape(x.shape) != 0, x, otherwise)
    plgpu = _compat.mosaic_gpu()
    layout = plgpu.Layout.WGMMA
    like = plgpu.ShapeDtypeStruct(x.shape, np.dtype(np.float32), layout=layout)

    def run(context: Any, words: Any, tile: Any) -> Any:
        del context
        ir = importlib.import_module("jaxlib.mlir.ir")
        arith = importlib.import_module("jaxlib.mlir.dialects.arith")
        vector = importlib.import_module("jaxlib.mlir.dialects.vector")
        word, number = ir.IntegerType.get_signless(32), ir.F32Type.get()
        zero = arith.constant(word, ir.IntegerAttr.get(word, 0))
        hidden = arith.constant(number, ir.FloatAttr.get(number, otherwise))
        own = [vector.extract(r, [], [0]) for r in words.registers.flat]
        registers = np.empty_like(tile.registers)
        for index, register in np.ndenumerate(tile.registers):
            # Which columns, and which of the thread's two rows.
            column, row, two = index[1], index[4], []
            for k in range(2):
                bit = ir.IntegerAttr.get(
                    word, int(np.uint32(1 << 2 * column + k).view(np.int32))
                )
                masked = arith.andi(own[row], arith.constant(word, bit))
                shown = arith.cmpi(arith.CmpIPredicate.ne, masked, zero)
                each = vector.extract(register, [], [k])
                two.append(arith.select(shown, each, hidden))
            registers[index] = vector.from_elements(register.type, two)
        return type(tile)(_registers=registers, _layout=tile.layout, _is_signed=None)

    types = (words_layout(), layout)
    return plgpu.inline_mgpu(arg_types=types, return_type=like)(run)(words, x)
