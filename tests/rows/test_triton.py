"""The Triton kernels on a machine that has no GPU; skipped where triton is missing.

Interpreted (see support/triton_rows_interpreter.py): rows of all kinds that start
anywhere between the vectors that memory is read in, next to rows of NaN and
infinities, in one tile and in several, against `_rows.xla`; and that no program touches
what is not its own.

Compiled: that what a GPU runs reads and writes such rows in vectors of 16 bytes.
"""

import functools
import re
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import process

from jaxsoftmax._compat import triton as _compat
from jaxsoftmax._rows import triton as kernels
from jaxsoftmax._rows.call import RowCall
from jaxsoftmax._rows.row_loss import Options

triton = pytest.importorskip("triton")
backends = pytest.importorskip("triton.backends.compiler")

POINTERS = {
    "bfloat16": "*bf16",
    "float16": "*fp16",
    "float32": "*fp32",
    "int32": "*i32",
}
ROWS = 8192


OPS = [
    "softmax/float32",
    "softmax_derivative/float32",
    "log_softmax/float32",
    "cross_entropy_with_gradient/float32",
    "softmax_derivative_state/float32",
    "log_softmax_pushforward_state/float32",
    "log_softmax_pullback_state/float32",
    "softmax/float16",
    "softmax/bfloat16",
    "softmax_derivative/bfloat16",
    "log_softmax_pushforward/bfloat16",
    "log_softmax_pullback/bfloat16",
    "cross_entropy/bfloat16",
    "cross_entropy_with_gradient/bfloat16",
    "log_sum_exp_state/bfloat16",
]


def interpret(*arguments):
    process.run("triton_rows_interpreter", *arguments)


def test_interpreted():
    interpret(*OPS)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(2))
def test_every_case_interpreted(first):
    """Each with one op of eight: reads and writes are those of all ops."""
    interpret("--step=8", *OPS[first::2])


def arguments(op, x):
    numbers = jax.ShapeDtypeStruct((x.shape[0], 1), np.float32)
    labels = jax.ShapeDtypeStruct((x.shape[0], 1), np.int32)
    return {
        "softmax": (x, None),
        "softmax_derivative": (x, x),
        "log_softmax": (x, None),
        "log_softmax_pushforward": (x, None, numbers, x),
        "log_softmax_pullback": (x, None, numbers, numbers, x),
        "cross_entropy": (x, None, labels),
        "cross_entropy_with_gradient": (x, None, labels, numbers, numbers),
    }[op]


@functools.cache
def compiled_program(op, dtype, n, form=None):
    """What Hopper would run on rows of `n` entries."""
    programs = []

    def compiled(*arrays, kernel, results, grid, name, in_place, C, **options):
        outputs = jax.tree.leaves(results)
        pointers = [POINTERS[a.dtype.name] for a in (*arrays, *outputs)]
        source = triton.compiler.ASTSource(
            kernel,
            {**dict(zip(kernel.arg_names, pointers, strict=False)), "C": "constexpr"},
            constexprs={"C": C},
            # As jax-triton has it.
            attrs={(i,): [["tt.divisibility", 16]] for i in range(len(pointers))},
        )
        target = backends.GPUTarget("cuda", 90, 32)
        programs.append(triton.compile(source, target, options=options))
        return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), results)

    options = Options() if op.startswith("cross_entropy") else None
    given = arguments(op, jax.ShapeDtypeStruct((ROWS, n), jnp.dtype(dtype)))
    row_call = RowCall(op, (-1,), 1.0, jnp.dtype(dtype), options, arrays=given)
    arrays = [a for a in given if a is not None]

    def call(*arrays):
        each = iter(arrays)
        full = [None if a is None else next(each) for a in given]
        return kernels.run(row_call, full, form)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_compat, "triton_call", compiled)
        jax.eval_shape(call, *arrays)
    return programs[0]


def ptx(*arguments):
    return compiled_program(*arguments).asm["ptx"]


def accesses(text):
    """How many instructions load and store 16 bytes a thread, and how many less."""
    found = re.findall(r"\b(ld|st)\.global[\w.:]*?(?:\.(v\d))?\.[bfu](\d+)\b", text)
    sizes = [(kind, int(v[1:] or 1) * int(b) // 8) for kind, v, b in found]
    return {
        (kind, vector): sum(k == kind and (size == 16) == vector for k, size in sizes)
        for kind in ("ld", "st")
        for vector in (True, False)
    }


COMPILED = [
    "softmax",
    "softmax_derivative",
    "log_softmax",
    "log_softmax_pullback",
    "cross_entropy",
    "cross_entropy_with_gradient",
]


@pytest.mark.parametrize(
    ("dtype", "n"),
    [
        ("bfloat16", 50257),
        *(
            pytest.param(*rare, marks=pytest.mark.slow)
            for rare in (("bfloat16", 30522), ("float32", 30522), ("float32", 50257))
        ),
    ],
)
@pytest.mark.parametrize("op", COMPILED)
def test_ragged_rows_are_read_and_written_in_vectors(op, dtype, n):
    ragged = accesses(ptx(op, dtype, n))
    even = accesses(ptx(op, dtype, -(-n // 8) * 8))
    assert ragged["ld", True] == even["ld", True] > 0
    assert ragged["st", True] == even["st", True]
    # The edges, of two arrays at most, one entry a thread; and of cross-entropy, what
    # it is given of a row, and that again in the layout of the edges.
    assert ragged["ld", False] <= 2 * even["ld", False] + 2
    assert ragged["st", False] <= even["st", False] + 1


@pytest.mark.parametrize("n", [50257, 65536])
@pytest.mark.parametrize("op", COMPILED)
def test_tiles_on_their_way_through_shared_memory(op, n):
    text = ptx(op, "bfloat16", n, kernels.Form(1, 4096, 8, stages=3))
    copies = re.findall(r"cp\.async\.c\w\.shared\.global .*?, (0x\w+)", text)
    assert copies
    assert set(copies) == {"0x10"}


@pytest.mark.parametrize("op", COMPILED)
def test_even_rows_have_no_edges(op):
    n = 32768
    with_edges = kernels.Form(1, 8192, 8)
    without = kernels.Form(1, 8192, 8, edges=False)
    assert accesses(ptx(op, "bfloat16", n, with_edges)) == accesses(
        ptx(op, "bfloat16", n, without)
    )
    assert accesses(ptx(op, "bfloat16", n + 1, without))["ld", True] == 0


@pytest.mark.parametrize(
    ("n", "dtype", "out", "possible"),
    [
        (50257, "bfloat16", "bfloat16", True),
        (256, "bfloat16", "bfloat16", False),  # a program has several rows
        (50257, "float32", "bfloat16", False),  # of another size
    ],
)
def test_gradient_in_the_memory_of_the_logits(monkeypatch, n, dtype, out, possible):
    """Where nothing is read after another program, or this, has written there."""
    x = jax.ShapeDtypeStruct((ROWS, n), dtype)
    op, options = "cross_entropy_with_gradient", Options(in_place=True)
    x, mask, *others = arguments(op, x)
    call = RowCall(op, (-1,), 1.0, jnp.dtype(out), options, arrays=(x, mask, *others))
    asked = []

    def triton_call(x, where, *others, results, in_place, C, **launch):
        asked.append((in_place, C.options.in_place, where is x))
        return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), results)

    monkeypatch.setattr(_compat, "triton_call", triton_call)
    jax.eval_shape(lambda x, *others: kernels.run(call, (x, None, *others)), x, *others)
    # In the place of a mask that is absent, what is copied before x is written.
    assert asked == [(possible, possible, False)]


def test_contraction_is_asked_for():
    """Else it is up to the version of Triton: 3.10 turns it off by default."""
    program = compiled_program("softmax_derivative", "float32", 1024)
    assert program.metadata.enable_fp_fusion
    assert "fma.rn.f32" in program.asm["ptx"]


# `triton_call` of jax-triton 0.3.1 and of 0.4.1.
def _with_shapes(*arrays, out_shape, enable_fp_fusion=None, **others):
    return {"enable_fp_fusion": enable_fp_fusion}


def _with_types(*arrays, out_type, backend_options=None, **others):
    return backend_options


@pytest.mark.parametrize("triton_call", [_with_shapes, _with_types])
@pytest.mark.parametrize("fusion", [True, False])
def test_contraction_is_passed_on(triton_call, fusion, monkeypatch):
    module = types.SimpleNamespace(triton_call=triton_call)
    monkeypatch.setitem(sys.modules, "jax_triton", module)
    passed = _compat.triton_call(
        kernel=None,
        results=None,
        grid=(1,),
        name="",
        num_warps=4,
        enable_fp_fusion=fusion,
    )
    assert passed == {"enable_fp_fusion": fusion}
