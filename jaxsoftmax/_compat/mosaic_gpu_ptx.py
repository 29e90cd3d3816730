"""Inline PTX, and the words that it computes with: for Pallas Mosaic GPU kernels."""

import importlib
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxsoftmax._compat import mosaic_gpu as _compat


def assembly(text: str, *operands: Any, outs: int = 0, pure: bool = False) -> list[Any]:
    """Inline PTX with effects on memory, which no other access moves across.

    Gives `outs` words of 32 bits, which are its first operands. If `pure`, it has no
    effects, and reads nothing that the kernel writes.
    """
    ir = importlib.import_module("jaxlib.mlir.ir")
    llvm = importlib.import_module("jaxlib.mlir.dialects.llvm")
    kinds = {0: "!llvm.void", 1: "i32"}
    several = f"!llvm.struct<({', '.join(['i32'] * outs)})>"
    constraints = ["=&r"] * outs + [_constraint(x) for x in operands]
    result = llvm.inline_asm(
        ir.Type.parse(kinds.get(outs, several)),
        list(operands),
        "{\n" + text + "}",
        ",".join(constraints + ["~{memory}"] * (not pure)),
        has_side_effects=not pure,
    )
    if outs < 2:
        return [result][:outs]
    word = ir.Type.parse("i32")
    return [llvm.extractvalue(word, result, [k]) for k in range(outs)]


def _constraint(operand: Any) -> str:
    """Of a float32, of 32 bits or an address in shared memory, or of an address."""
    kind = str(operand.type)
    if "ptr" in kind:
        return "r" if "<3>" in kind else "l"
    return "f" if kind == "f32" else "r"


def _pointer(ref: Any) -> Any:
    """The address of a reference, in what `inline_mgpu` emits."""
    utils = importlib.import_module("jax.experimental.mosaic.gpu.utils")
    return utils.memref_ptr(ref)


def emit(
    text: str,
    refs: Sequence[Any],
    numbers: Sequence[Any] = (),
    *,
    tile: Any = None,
    layout: Any = None,
    result: Any = None,
    pure: bool = False,
) -> Any:
    """Emits PTX in a kernel.

    Args:
      text: Its operands are words of the result, addresses of the references, scalars,
        and words of the tile.
      refs: The references.
      numbers: Scalars of 32 bits.
      tile: A tile of which each thread of a warpgroup has one vector, if any.
      layout: The tile's.
      result: The shape, dtype and layout of such a tile that it gives, if any.
      pure: As in `assembly`.
    """
    plgpu = _compat.mosaic_gpu()
    many, outs = len(refs), 0
    if result is not None:
        entries = math.prod(result.shape) // 128
        outs = entries * np.dtype(result.dtype).itemsize // 4

    def run(context: Any, *operands: Any) -> Any:
        del context
        words = [a.registers.item() for a in operands[many:]]
        if tile is not None:
            words += _unpacked(words.pop(), np.dtype(tile.dtype).itemsize)
        given = [*map(_pointer, operands[:many]), *words]
        found = assembly(text, *given, outs=outs, pure=pure)
        return None if result is None else _tile(found, result)

    types = [plgpu.RefType()] * many + [plgpu.Layout.WG_SPLAT] * len(numbers)
    given = [*refs, *numbers]
    if tile is not None:
        types, given = [*types, layout], [*given, tile]
    inline = plgpu.inline_mgpu(arg_types=tuple(types), return_type=result)
    return inline(run)(*given)


def loop_rounds(count: int) -> Any:
    """The number, as the compiler does not know it: a loop of it stays a loop."""
    if _compat.is_interpreted():
        return jnp.int32(count)
    plgpu = _compat.mosaic_gpu()

    def emit(context: Any) -> Any:
        del context
        # Kernels here have no such dimension.
        (one,) = assembly("mov.u32 $0, %nctaid.z;\n", outs=1)
        return _fragmented_array().splat(one, (), is_signed=True)

    result = plgpu.ShapeDtypeStruct((), np.dtype(np.int32), layout=None)
    return plgpu.inline_mgpu(return_type=result)(emit)() * count


def access(words: int) -> str:
    """What follows ``st.global`` for so many words."""
    return {1: ".b32", 2: ".v2.b32", 4: ".v4.b32"}[words]


def listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else "{" + ", ".join(names) + "}"


def expecting(barrier: str, nbytes: int) -> str:
    """Has the thread ``first`` make a barrier, which expects so many bytes."""
    return (
        f"@first mbarrier.init.shared::cta.b64 [{barrier}], 1;\n"
        "fence.mbarrier_init.release.cluster;\n"
        f"@first mbarrier.arrive.expect_tx.shared::cta.b64 _, [{barrier}], {nbytes};\n"
    )


def awaited(barrier: str, done: str, scope: str) -> str:
    """Waits for the bytes that a barrier expects first; `done` is a predicate."""
    return (
        f"AGAIN: mbarrier.try_wait.parity.acquire.{scope}.shared::cta.b64 "
        f"{done}, [{barrier}], 0;\n@!{done} bra AGAIN;\n"
    )


def _type(text: str) -> Any:
    return importlib.import_module("jaxlib.mlir.ir").Type.parse(text)


def _llvm() -> Any:
    return importlib.import_module("jaxlib.mlir.dialects.llvm")


def _index(k: int) -> Any:
    arith = importlib.import_module("jaxlib.mlir.dialects.arith")
    return arith.constant(_type("i32"), k)


def _packed(words: Sequence[Any], kind: str) -> Any:
    """A vector from its words."""
    llvm = _llvm()
    result = llvm.mlir_undef(_type(f"vector<{len(words)}xi32>"))
    for k, word in enumerate(words):
        result = llvm.insertelement(result, word, _index(k))
    return llvm.bitcast(_type(kind), result)


def _unpacked(vector: Any, itemsize: int) -> list[Any]:
    """The words of a vector."""
    llvm, ir = _llvm(), importlib.import_module("jaxlib.mlir.ir")
    count = ir.VectorType(vector.type).shape[0] * itemsize // 4
    words = llvm.bitcast(_type(f"vector<{count}xi32>"), vector)
    return [llvm.extractelement(words, _index(k)) for k in range(count)]


def _tile(words: Sequence[Any], like: Any) -> Any:
    """A tile of which each thread has one vector, given as words."""
    layout, bits = like.layout.to_mgpu(), 8 * np.dtype(like.dtype).itemsize
    register = _packed(words, f"vector<{32 * len(words) // bits}xi{bits}>")
    registers = np.array([register]).reshape(layout.registers_shape(like.shape))
    return _fragmented_array()(
        _registers=registers,
        _layout=layout,
        _is_signed=bool(np.issubdtype(like.dtype, np.signedinteger)),
    )


def _fragmented_array() -> Any:
    module = "jax.experimental.mosaic.gpu.fragmented_array"
    return importlib.import_module(module).FragmentedArray
