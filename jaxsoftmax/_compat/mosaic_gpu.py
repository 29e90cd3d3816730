"""What Pallas Mosaic GPU kernels need and what differs between versions of jax.

`jax.experimental` makes no promise of stability. Checked with jax 0.10.2, 0.11.2 and
0.12.0.1; 0.10.0 cannot run such kernels. Pallas is imported when it is first used: it
is slow to import, and some builds of jaxlib lack what it needs.
"""

import functools
import importlib
import importlib.metadata
import inspect
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxsoftmax._compat.trace import run_over_first

# One thread at a time: of three that traced kernels at once, one has met a module of
# Pallas that was not whole yet.
_importing = threading.RLock()


def pallas() -> Any:
    """The module jax.experimental.pallas."""
    with _importing:
        return importlib.import_module("jax.experimental.pallas")


def mosaic_gpu() -> Any:
    """The module jax.experimental.pallas.mosaic_gpu."""
    with _importing:
        return importlib.import_module("jax.experimental.pallas.mosaic_gpu")


@functools.cache
def mosaic_gpu_reason() -> str | None:
    """Why Mosaic GPU kernels cannot be made with this jax, or None if they can."""
    if jax.__version_info__ < (0, 10, 2):
        # It takes neither `out_type` nor the layouts that the kernels need.
        return f"needs jax 0.10.2 or newer, this is {jax.__version__}"
    try:
        mosaic_gpu()
    except Exception as error:  # whatever a build without it raises
        return (
            f"importing Pallas Mosaic GPU failed with {type(error).__name__}: {error}"
        )
    return None


@functools.cache
def ptxas_reason() -> str | None:
    """Why the assembler that is installed is not to be used for attention, or None.

    That of CUDA 12.8.0 to 12.9.0 miscompiles kernels with masks of this kind: so says
    jax.experimental.pallas.ops.gpu.attention_mgpu, of the same version.
    """
    try:
        version = importlib.metadata.version("nvidia-cuda-nvcc-cu12")
    except importlib.metadata.PackageNotFoundError:
        return None
    parts = tuple(int(part) for part in version.split(".") if part.isdigit())
    if (12, 8) <= parts < (12, 9, 86):
        return f"ptxas of CUDA {version} miscompiles it: install 12.9.86 or newer"
    return None


def mosaic_strips_reason() -> str | None:
    """Why no kernel of rows side by side can be made with this jax, or None."""
    if jax.__version_info__ < (0, 11):
        # Its layout inference searches for minutes, and finds nothing for some plans.
        return f"rows side by side need jax 0.11 or newer, this is {jax.__version__}"
    return None


@functools.cache
def _mosaic_load_needs_index() -> bool:
    index = inspect.signature(mosaic_gpu().load).parameters.get("idx")
    return index is not None and index.default is inspect.Parameter.empty


def mosaic_load(ref: Any, layout: Any, *, optimized: bool = False) -> jax.Array:
    """Loads all of `ref` in `layout`. Until 0.11 an index must be given, later not."""
    index = (Ellipsis,) if _mosaic_load_needs_index() else ()
    return mosaic_gpu().load(ref, *index, layout=layout, optimized=optimized)


def mosaic_store(ref: Any, value: jax.Array) -> None:
    """Stores all of `ref`. From 0.12 on, a store that is not coalesced must say so."""
    plgpu = mosaic_gpu()
    if hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value


def _of_each_register(x: jax.Array, layout: Any, compute: Any) -> jax.Array:
    """[...] in float32: what `compute` makes of each of the vectors of `x`."""
    plgpu = mosaic_gpu()
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


def mosaic_widened(
    x: jax.Array, layout: Any = None, *, again: bool = False
) -> jax.Array:
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
    if is_interpreted() or by_conversion or x.dtype.itemsize != 2:
        return x.astype(np.float32)
    layout = mosaic_gpu().Layout.WGMMA if layout is None else layout
    return _of_each_register(x, layout, _widened_again if again else _widened)


def is_interpreted() -> bool:
    """Whether what is traced is for Pallas' interpreter."""
    config = importlib.import_module("jax._src.config")
    return config.pallas_tpu_interpret_mode_context_manager.value is not None


# Columns for which it is decided at once: their squares are in registers.
_PART = 32


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


def mosaic_by_size(
    power: float,
    small: Any,
    large: Any,
    x: jax.Array,
    *others: jax.Array,
    results: int,
    layout: Any = None,
) -> Any:
    """`small` of a tile where its squares are below `power`, or `large`.

    Decided for each warp, of all that it has of `_PART` columns as wgmma has them, or
    of the tile. The sum of a square below it and the power, which is one of two, has
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
    """
    if is_interpreted():
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
    plgpu = mosaic_gpu()
    part = x.shape[1] if layout is not None else _PART
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
            columns = slice(start, min(start + part, tile.shape[1]))
            parts = [tile[:, columns] for tile in tiles]
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


def mosaic_words_layout() -> Any:
    """That of (64, 4) words: each with the thread that wgmma gives its bits' numbers.

    Of a tile of logits a thread has, in each of its rows, the columns 8 j + 2 c and
    8 j + 2 c + 1, where c is its place among four.
    """
    plgpu = mosaic_gpu()
    return plgpu.Layout.TILED(
        plgpu.Tiling(((64, 4), (16, 4), (8, 4), (1,))),
        warp_dims=(-7,),
        lane_dims=(-3, -2),
        vector_dim=-1,
    )


def mosaic_bits(
    condition: Any, advance: Any, first: Sequence[jax.Array], columns: int
) -> jax.Array:
    """Words, as `mosaic_where_bits` has them, of where a condition holds on a tile.

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
    if is_interpreted():
        found, now = [], list(first)
        for _ in range(columns // 8):
            found.append(condition(now).reshape(rows, 4, 2))
            now = advance(now)
        bits = jax.numpy.stack(found, 1).swapaxes(2, 3).reshape(rows, columns // 4, 4)
        index = jax.lax.broadcasted_iota(np.int32, bits.shape, 1)
        shifted = bits.astype(np.int32) << index
        return jax.numpy.sum(shifted, axis=1, dtype=np.int32)
    plgpu = mosaic_gpu()
    of_words = mosaic_words_layout()
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


def mosaic_where_bits(
    words: jax.Array, x: jax.Array, otherwise: float = -np.inf
) -> jax.Array:
    """A tile where its bits are 1, and a number elsewhere.

    Args:
      words: (64, 4) in int32, as `mosaic_words_layout` has them: bit 2 j + e of word c
        is that of column 8 j + 2 c + e.
      x: (64, up to 128) in float32, as wgmma has it.
      otherwise: The number.
    """
    if is_interpreted():
        rows, columns = x.shape
        shape = rows, columns // 4, 4
        words = jax.lax.broadcast_in_dim(words, shape, [0, 2])
        found = (words >> jax.lax.broadcasted_iota(np.int32, shape, 1)) & 1
        found = found.reshape(rows, columns // 8, 2, 4).swapaxes(2, 3)
        return jax.numpy.where(found.reshape(x.shape) != 0, x, otherwise)
    plgpu = mosaic_gpu()
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

    types = (mosaic_words_layout(), layout)
    return plgpu.inline_mgpu(arg_types=types, return_type=like)(run)(words, x)


class Accumulator:
    """Registers of a warpgroup that products are added to (wgmma).

    Pallas' interpreter neither stores to such registers nor multiplies what is in
    registers: there, shared memory stands for both.

    Args:
      ref: The registers, `plgpu.ACC`, or for the interpreter shared memory in float32.
      staging: For the interpreter: where factors in registers are put.
    """

    def __init__(self, ref: Any, staging: Any = None) -> None:
        self.ref, self.staging = ref, staging

    def load(self, running: int = 0) -> jax.Array:
        """What is in it, when but the last `running` products are done."""
        if is_interpreted():
            return self.ref[...]
        primitives = importlib.import_module("jax._src.pallas.mosaic_gpu.primitives")
        value = primitives.wgmma_accumulator_load(self.ref, wait_n=running)
        # Nothing that is computed of it may move before the wait.
        return jax.lax.optimization_barrier(value)

    def wait(self) -> None:
        """Waits until all products are done."""
        if not is_interpreted():
            mosaic_gpu().wgmma_wait(0)

    def store(self, value: jax.Array) -> None:
        """Replaces what is in it; no product may be under way."""
        self.ref[...] = value

    def clear(self) -> None:
        """Sets it to 0."""
        plgpu = mosaic_gpu()
        zeros = jax.numpy.zeros(self.ref.shape, self.ref.dtype)
        self.store(plgpu.layout_cast(zeros, plgpu.Layout.WGMMA))

    def add_product(self, a: Any, b: Any) -> None:
        """Starts to add `a` @ `b`: `a` in registers or shared memory, `b` there."""
        plgpu = mosaic_gpu()
        if not is_interpreted():
            plgpu.wgmma(self.ref, a, b)
            return
        if isinstance(a, jax.Array):
            self.staging[...] = a
            plgpu.commit_smem()
            a = self.staging

        def product(acc: Any) -> jax.Array:
            plgpu.wgmma(acc, a, b)
            return acc[...]

        shape = tuple(self.ref.shape)
        found = pallas().run_scoped(product, plgpu.ACC(shape, np.dtype(np.float32)))
        self.ref[...] += found


def mosaic_over_first(kernel: Any, *operands: jax.Array) -> tuple[jax.Array, ...]:
    """`run_over_first` of what `plgpu.kernel` makes.

    Before 0.11 a reference does not get through the batching rule that is around it.
    """
    if jax.__version_info__ < (0, 11):
        kernel = inspect.unwrap(kernel)
    return run_over_first(kernel, *operands)


def assembly(
    text: str,
    constraints: Sequence[str],
    *operands: Any,
    outs: int = 0,
    pure: bool = False,
) -> list[Any]:
    """Inline PTX with effects on memory, which no other access moves across.

    Gives `outs` words of 32 bits, which are its first operands. If `pure`, it has no
    effects, and reads nothing that the kernel writes.
    """
    ir = importlib.import_module("jaxlib.mlir.ir")
    llvm = importlib.import_module("jaxlib.mlir.dialects.llvm")
    kinds = {0: "!llvm.void", 1: "i32"}
    several = f"!llvm.struct<({', '.join(['i32'] * outs)})>"
    result = llvm.inline_asm(
        ir.Type.parse(kinds.get(outs, several)),
        list(operands),
        "{\n" + text + "}",
        ",".join([*["=&r"] * outs, *constraints, *["~{memory}"] * (not pure)]),
        has_side_effects=not pure,
    )
    if outs < 2:
        return [result][:outs]
    word = ir.Type.parse("i32")
    return [llvm.extractvalue(word, result, [k]) for k in range(outs)]


def pointer(ref: Any) -> Any:
    """The address of a reference, in what `inline_mgpu` emits."""
    utils = importlib.import_module("jax.experimental.mosaic.gpu.utils")
    return utils.memref_ptr(ref)


def _inline(emit: Any, refs: Sequence[Any], numbers: Sequence[Any] = ()) -> None:
    """Has `emit` write code, given the addresses of the references and the scalars."""
    plgpu = mosaic_gpu()
    types = [plgpu.RefType()] * len(refs) + [plgpu.Layout.WG_SPLAT] * len(numbers)

    def run(context: Any, *operands: Any) -> None:
        del context
        scalars = [a.registers.item() for a in operands[len(refs) :]]
        emit(*map(pointer, operands[: len(refs)]), *scalars)

    plgpu.inline_mgpu(arg_types=tuple(types))(run)(*refs, *numbers)


def _expecting(nbytes: int) -> str:
    """Has thread ``first`` make the barrier at $0, which expects so many bytes."""
    return (
        ".reg .pred first;\n.reg .b32 thread;\n"
        "mov.u32 thread, %tid.x;\nsetp.eq.u32 first, thread, 0;\n"
        "@first mbarrier.init.shared::cta.b64 [$0], 1;\n"
        "fence.mbarrier_init.release.cluster;\n"
        f"@first mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], {nbytes};\n"
    )


# Whoever sends waits for it. Relaxed: only the barrier that was made must be seen.
_BEGUN = "barrier.cluster.arrive.relaxed.aligned;\n"
_ALL_HAVE_BEGUN = "barrier.cluster.wait.acquire.aligned;\n"
# Until the bytes that the barrier at $0 expects are there; ``done`` is a predicate.
_AWAITED = (
    "AGAIN: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 "
    "done, [$0], 0;\n@!done bra AGAIN;\n"
)


class ClusterSlots:
    """Numbers of all blocks of a cluster, in the shared memory of each.

    A block sends its own to all. A store and its arrival are one operation (st.async),
    which PTX orders over the cluster: what has arrived is whole. Each block waits for
    all before it leaves, so that none sends to a block that is gone; and it waits for
    all to have begun before it sends. All that once.

    Mosaic's own barrier of a cluster orders memory for a block alone, by the letter of
    PTX. An arrival that releases at the scope of the cluster compiles to a fence for
    the whole GPU (MEMBAR.ALL.GPU, with CUDA 12.9), which st.async does without.

    Args:
      refs: The references that `scratch` is for.
      blocks: Blocks of the cluster.
      neutral: A number for each row of `slots`, for places that no block has.
    """

    def __init__(
        self, refs: Sequence[Any], blocks: int, neutral: Sequence[float]
    ) -> None:
        self.barrier, self.slots = refs
        self.blocks = blocks
        self.places = self.scratch(blocks, len(neutral))[1].shape[1]
        begin = _expecting(4 * blocks * len(neutral))
        for i, number in enumerate(neutral):
            bits = np.float32(number).view(np.uint32)
            for place in range(blocks, self.places):
                at = 4 * (i * self.places + place)
                begin += f"@first st.shared::cta.b32 [$1+{at}], {bits};\n"
        _inline(functools.partial(assembly, begin + _BEGUN, ["r", "r"]), refs)

    @staticmethod
    def scratch(blocks: int, count: int) -> list[Any]:
        """The barrier and `count` numbers of each block; a power of two of places."""
        plgpu = mosaic_gpu()
        places = 1 << (blocks - 1).bit_length()
        return [
            plgpu.SMEM((2,), np.dtype(np.int32)),
            plgpu.SMEM((count, places), np.dtype(np.float32)),
        ]

    def exchange(self, numbers: Sequence[jax.Array]) -> None:
        """Sends scalars, the same in all threads; waits for those of all blocks."""
        send = (
            ".reg .pred sends, done;\n.reg .b32 block, place, barrier;\n"
            f"mov.u32 block, %tid.x;\nsetp.lt.u32 sends, block, {self.blocks};\n"
            "mov.u32 place, %cluster_ctarank;\nmad.lo.u32 place, place, 4, $1;\n"
            + _ALL_HAVE_BEGUN
            + "@sends mapa.shared::cluster.u32 place, place, block;\n"
            "@sends mapa.shared::cluster.u32 barrier, $0, block;\n"
        )
        for i in range(len(numbers)):
            send += (
                "@sends st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32 "
                f"[place+{4 * i * self.places}], ${i + 2}, [barrier];\n"
            )
        constraints = ["r", "r"] + ["f"] * len(numbers)
        emit = functools.partial(assembly, send + _AWAITED, constraints)
        _inline(emit, [self.barrier, self.slots], numbers)


class ClusterVectors:
    """Numbers of all blocks of a cluster, one of each per column: see `ClusterSlots`.

    Args:
      refs: The references that `scratch` is for.
      blocks: Blocks of the cluster.
    """

    def __init__(self, refs: Sequence[Any], blocks: int) -> None:
        self.barrier, self.slots = refs
        self.blocks = blocks
        self.count, _, self.width = self.slots.shape
        begin = _expecting(4 * self.count * self.width * blocks) + _BEGUN
        _inline(functools.partial(assembly, begin, ["r"]), [self.barrier])

    @staticmethod
    def scratch(blocks: int, count: int, width: int) -> list[Any]:
        """The barrier, and `count` numbers per column of each block."""
        plgpu = mosaic_gpu()
        return [
            plgpu.SMEM((2,), np.dtype(np.int32)),
            plgpu.SMEM((count, blocks, width), np.dtype(np.float32)),
        ]

    def exchange(self, numbers: Any) -> None:
        """Sends what is in shared memory, (count, width); waits for that of all blocks.

        Written by the first warpgroup, whose threads have each seen all of it.
        """
        vectors = self.count * self.width // 4
        send = (
            ".reg .pred sends, done;\n.reg .f32 a, b, c, d;\n"
            ".reg .b32 thread, index, block, vector, number, from, to, barrier;\n"
            "mov.u32 thread, %tid.x;\n" + _ALL_HAVE_BEGUN
        )
        for start in range(0, vectors * self.blocks, 128):
            send += (
                f"add.u32 index, thread, {start};\nsetp.lt.u32 sends, thread, 128;\n"
                f"setp.lt.and.u32 sends, index, {vectors * self.blocks}, sends;\n"
                f"div.u32 block, index, {vectors};\nrem.u32 vector, index, {vectors};\n"
                f"div.u32 number, vector, {self.width // 4};\n"
                "mad.lo.u32 from, vector, 16, $2;\nmov.u32 to, %cluster_ctarank;\n"
                f"mad.lo.u32 to, number, {self.blocks - 1}, to;\n"
                f"mad.lo.u32 to, to, {4 * self.width}, $1;\n"
                "mad.lo.u32 to, vector, 16, to;\n"
                "@sends ld.shared::cta.v4.f32 {a, b, c, d}, [from];\n"
                "@sends mapa.shared::cluster.u32 to, to, block;\n"
                "@sends mapa.shared::cluster.u32 barrier, $0, block;\n"
                "@sends st.async.weak.shared::cluster.mbarrier::complete_tx::bytes"
                ".v4.f32 [to], {a, b, c, d}, [barrier];\n"
            )
        emit = functools.partial(assembly, send + _AWAITED, ["r", "r", "r"])
        _inline(emit, [self.barrier, self.slots, numbers])
