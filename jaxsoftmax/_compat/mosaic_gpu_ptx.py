"""Inline PTX, and the words that it computes with: for Pallas Mosaic GPU kernels."""

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxsoftmax._compat import mosaic_gpu as _compat


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


def emit(
    text: str,
    constraints: Sequence[str],
    refs: Sequence[Any],
    numbers: Sequence[Any] = (),
) -> None:
    """`assembly` of the addresses of references, and of scalars, in a kernel."""
    plgpu = _compat.mosaic_gpu()
    types = [plgpu.RefType()] * len(refs) + [plgpu.Layout.WG_SPLAT] * len(numbers)

    def run(context: Any, *operands: Any) -> None:
        del context
        pointers = map(pointer, operands[: len(refs)])
        scalars = (a.registers.item() for a in operands[len(refs) :])
        assembly(text, constraints, *pointers, *scalars)

    plgpu.inline_mgpu(arg_types=tuple(types))(run)(*refs, *numbers)


def access(words: int) -> str:
    """What follows ``st.global`` for so many words."""
    return {1: ".b32", 2: ".v2.b32", 4: ".v4.b32"}[words]


def listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else "{" + ", ".join(names) + "}"


def _type(text: str) -> Any:
    return importlib.import_module("jaxlib.mlir.ir").Type.parse(text)


def _llvm() -> Any:
    return importlib.import_module("jaxlib.mlir.dialects.llvm")


def _index(k: int) -> Any:
    arith = importlib.import_module("jaxlib.mlir.dialects.arith")
    return arith.constant(_type("i32"), k)


def packed(words: Sequence[Any], kind: str) -> Any:
    """A vector from its words."""
    llvm = _llvm()
    result = llvm.mlir_undef(_type(f"vector<{len(words)}xi32>"))
    for k, word in enumerate(words):
        result = llvm.insertelement(result, word, _index(k))
    return llvm.bitcast(_type(kind), result)


def tile_of_words(words: Sequence[Any], like: Any) -> Any:
    """A tile of which each lane has one vector, given as words."""
    module = "jax.experimental.mosaic.gpu.fragmented_array"
    layout, bits = like.layout.to_mgpu(), 8 * np.dtype(like.dtype).itemsize
    register = packed(words, f"vector<{32 * len(words) // bits}xi{bits}>")
    registers = np.array([register]).reshape(layout.registers_shape(like.shape))
    return importlib.import_module(module).FragmentedArray(
        _registers=registers,
        _layout=layout,
        _is_signed=bool(np.issubdtype(like.dtype, np.signedinteger)),
    )


def unpacked(vector: Any, count: int) -> list[Any]:
    llvm = _llvm()
    words = llvm.bitcast(_type(f"vector<{count}xi32>"), vector)
    return [llvm.extractelement(words, _index(k)) for k in range(count)]
