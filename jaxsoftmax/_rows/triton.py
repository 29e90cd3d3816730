"""Softmax, its derivatives and cross-entropy as Triton kernels, through jax-triton.

Takes every shape, axis and mask of bfloat16, float16 and float32 on NVIDIA GPUs from
compute capability 8.0 on. The functions are those of `_rows.xla` and
`_rows.xla_loss`, with the same meaning; the programs are in
`triton_source`, which says what a program owns and what it reads and writes. This
module decides the layout and the form of each call:

- The array's dimensions are merged and its entries addressed where they lie. Nothing is
  transposed, and a mask is never expanded.
- Where the reduced axis is the last, a program owns whole rows. Elsewhere it owns
  neighbouring rows, whose entries lie side by side.
- `_form` picks how many rows and columns a program holds at a time: rows that fit stay
  in registers and are read once, longer ones are read twice.
- A row that a program has to itself is read and written in vectors of 16 bytes wherever
  it starts; what it has of the vectors at its ends goes entry by entry.

Neither triton nor jax-triton is imported before a kernel is asked for.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxsoftmax._compat import triton as _compat
from jaxsoftmax._core.device import Device, capability_lowered_for, lowering_for
from jaxsoftmax._core.shapes import row_shape
from jaxsoftmax._rows import row_loss
from jaxsoftmax._rows.call import (
    FUNCTION_OF_STATE,
    RowCall,
    function_of,
    without_kernel,
)
from jaxsoftmax._rows.defaults import ELEMENTWISE
from jaxsoftmax._rows.row_layout import Dim, count, merge_dims, strides
from jaxsoftmax._rows.row_loss import Options

# Offsets in int32 up to here: those of entries beyond the array's end fit too.
_LONG = 2**30
_MOST_PROGRAMS = 2**31 - 1
# Outside, scale / log(2) or its rounding error is no normal float32. Of a soft cap and
# of what is capped too: their products then are none.
_SCALES = (1e-25, 1e30)


@dataclasses.dataclass(frozen=True)
class Form:
    """How a program goes through its rows.

    Attributes:
      rows: How many it owns, a power of 2.
      columns: How many entries of each it holds at a time, a power of 2. Fewer than a
        row has: the row is read twice.
      warps: How many run it; 1024 threads are the most.
      edges: Whether a single row that starts and ends between vectors of 16 bytes is
        read in these, and its edges apart. Of no consequence for other rows.
      stages: How many tiles are on their way at a time, through shared memory where
        there are several.
    """

    rows: int
    columns: int
    warps: int
    edges: bool = True
    stages: int = 1


@dataclasses.dataclass(frozen=True)
class _Limits:
    """What a form is made of, in entries, for one op.

    Attributes:
      registers: The most that a program holds of rows that are read once.
      tile: What it holds at a time of longer ones.
      program: What it holds of short rows: several to a program.
      thread: What a thread holds.
      long_row: The form of one longer row to a program, if not by what is above.
    """

    registers: int
    tile: int
    program: int
    thread: int
    long_row: Form | None = None


# The derivatives hold two arrays, and more of what is between them; so does what has a
# gradient or dense labels. `cross_entropy` reads rows once, whatever it holds. Forms of
# a long row: the fastest, or nearly so, on an H100 at 50257 in bfloat16 and float32,
# 1.1 to 1.4 times as fast as what the others would be.
_LIMITS = {
    "softmax": _Limits(registers=32768, tile=8192, program=2048, thread=16),
    "log_softmax": _Limits(registers=32768, tile=8192, program=2048, thread=16),
    "softmax_derivative": _Limits(registers=16384, tile=4096, program=2048, thread=16),
    "log_softmax_pushforward": _Limits(
        registers=16384, tile=4096, program=2048, thread=16
    ),
    "log_softmax_pullback": _Limits(
        registers=16384, tile=4096, program=2048, thread=16
    ),
    "cross_entropy": _Limits(
        registers=16384,
        tile=8192,
        program=2048,
        thread=16,
        long_row=Form(1, 8192, 8),
    ),
    "cross_entropy_with_gradient": _Limits(
        registers=16384,
        tile=8192,
        program=2048,
        thread=16,
        long_row=Form(1, 4096, 8, stages=3),
    ),
}
# Side by side, for rows along an axis that is not the last: bytes of a read.
_SEGMENT = 64


def _form(op: str, rows: int, n: int, itemsize: int, inner: bool) -> Form:
    """The form for `rows` rows of `n` entries, `inner` if the rows lie side by side."""
    limits = _LIMITS[function_of(op)]
    columns = _power_of_2(n)
    if inner:
        block = min(_SEGMENT // itemsize, _power_of_2(rows))
        block = max(block, min(limits.program // columns, _power_of_2(rows)))
    else:
        block = max(1, min(limits.program // columns, _power_of_2(rows)))
    if block * columns > limits.registers:
        if block == 1 and limits.long_row is not None:
            return limits.long_row
        columns = max(1, limits.tile // block)
    warps = block * columns // (32 * limits.thread)
    return Form(block, columns, min(max(warps, 1), 16))


def _power_of_2(n: int) -> int:
    """The least power of 2 that is not less than `n`."""
    return 1 << (n - 1).bit_length()


# --- what can run ---------------------------------------------------------------------


def refusal(call: RowCall, device: Device) -> str | None:
    """Why `call` cannot run on `device`, or None if it can."""
    return refusal_of_device(device) or _refused(call) or unavailable(device)


def refusal_of_device(device: Device) -> str | None:
    """Why no kernel made with Triton runs on `device`, or None."""
    if device.platform == "rocm":
        return "has not been tried on ROCm"
    if device.platform != "cuda":
        return f"needs a GPU, the platform is {device.platform}"
    capability = device.compute_capability
    if capability is not None and capability < (8, 0):
        got = ".".join(map(str, capability))
        return f"needs compute capability 8.0 or more, the GPU has {got}"
    return None


def _refused(call: RowCall) -> str | None:
    """What about the call itself has no kernel."""
    reason = without_kernel(call)
    if reason is not None:
        return reason
    if call.op == ELEMENTWISE:
        return "has no kernel for what is elementwise"
    least, most = _SCALES
    if not least <= call.scale <= most:
        return f"a scale of {call.scale} is outside {least} .. {most}"
    cap = None if call.options is None else call.options.softcap
    if cap is not None and not (
        least <= cap <= most and least <= call.scale / cap <= most
    ):
        return f"a soft cap of {cap}, or the scale by it, is outside {least} .. {most}"
    x = call.arrays[0]
    dims = merge_dims(x.shape, call.axis, None)
    itemsize = np.dtype(x.dtype).itemsize
    if _programs(dims, _form_of(call.op, dims, itemsize)) > _MOST_PROGRAMS:
        return f"needs more than {_MOST_PROGRAMS} programs"
    return None


@functools.cache
def unavailable(device: Device) -> str | None:
    """Why no kernel can run there at all; found once, by lowering a small one."""
    try:
        import jax_triton

        version = getattr(jax_triton, "__version__", "of unknown version")
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "jax_triton":
            return (
                "jax-triton is not installed (jaxsoftmax[cuda12] and [cuda13] bring it)"
            )
        return f"importing jax-triton failed: {_first_line(error)}"
    try:
        # In a thread of its own: what is traced, and the settings of the thread that
        # asks, have no part in it.
        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            thread.submit(_lower_a_small_one, device).result()
    except Exception as error:
        return f"lowering with jax-triton {version} failed: {_first_line(error)}"
    return None


def _lower_a_small_one(device: Device) -> None:
    x = jax.ShapeDtypeStruct((8,), np.float32)
    call = RowCall("softmax", (-1,), 1.0, np.dtype(np.float32), arrays=(x, None))
    with lowering_for(device):
        traced = jax.jit(lambda x: run(call, (x, None))).trace(x)
        traced.lower(lowering_platforms=("cuda",))


def _first_line(error: Exception) -> str:
    text = (str(error).strip() or repr(error)).splitlines()[0]
    return f"{type(error).__name__}: {text}"


# --- calls ----------------------------------------------------------------------------


_NO_OPTIONS = Options()
_Layout = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Program:
    """All that is known of a program when it is compiled.

    Attributes:
      op: The function's name; for a state, that of the function that it belongs to.
      m: How many rows there are.
      n: How many entries a row has.
      rows: `Form.rows`.
      columns: `Form.columns`.
      vector: How many entries 16 bytes hold, of the narrowest array.
      part: Which part of a row the tiles cover: "all", or "vectors" where it has edges,
        see `triton_source`; "edges" in `edges`.
      stages: `Form.stages`.
      axis: Along which axis of a tile a row extends: the other is that of neighbours
        in memory if rows lie side by side.
      row: How rows lie: sizes without the outermost, strides of the array, and of the
        mask; innermost first.
      column: How the entries of a row lie.
      masked: Whether there is a mask.
      long: Whether offsets need 64 bits.
      scale: Multiplies the logits.
      unit: Multiplies the values that a row is computed from: `scale`, or 1 for capped
        logits.
      factor: unit / log(2), in two float32 parts.
      precise: Whether the result is wide enough to show an error of `exp`, and the
        values are exact.
      options: What cross-entropy computes for each row.
      dense: Whether labels are a weight for each entry.
    """

    op: str
    m: int
    n: int
    rows: int
    columns: int
    vector: int
    part: str
    stages: int
    axis: int
    row: _Layout
    column: _Layout
    masked: bool
    long: bool
    scale: float
    unit: float
    factor: tuple[float, float]
    precise: bool
    options: Options
    dense: bool

    @property
    def tiles(self) -> int:
        """How many tiles there are of a row, or of its whole vectors."""
        n = self.n
        if self.part == "vectors":
            n = n // self.vector * self.vector
        return -(-n // self.columns)

    @property
    def edges(self) -> "Program":
        """The program of a row's edges, in one tile.

        It lies along the other axis: else the compiler would lay the tile out like
        those of the vectors, with as many neighbours per thread.
        """
        return dataclasses.replace(
            self, part="edges", columns=2 * self.vector, axis=1 - self.axis
        )

    @property
    def loss(self) -> bool:
        """Whether the op is one of the two of cross-entropy."""
        return self.op in ("cross_entropy", "cross_entropy_with_gradient")

    @property
    def state_places(self) -> tuple[int, ...]:
        """The places in `State` of the numbers that the op gives."""
        uniform_nll, entropy = self.options.uniform_nll, self.options.entropy
        present = (True, True, True, self.dense, uniform_nll, uniform_nll, entropy)
        return tuple(k for k, is_there in enumerate(present) if is_there)


def _vector(arrays: Sequence[Any]) -> int:
    """How many entries 16 bytes hold, of the narrowest of floats."""
    floats = [a.dtype for a in arrays if jnp.issubdtype(a.dtype, jnp.floating)]
    return 16 // min(dtype.itemsize for dtype in floats)


def _layout(dims: Sequence[Dim], *, reduced: bool) -> _Layout:
    """Sizes without the outermost, strides, strides of the mask; innermost first."""
    chosen = [
        (dim.size, stride, mask_stride)
        for dim, stride, mask_stride in zip(
            dims, strides(dims), strides(dims, mask=True), strict=True
        )
        if dim.reduced == reduced
    ][::-1]
    sizes = tuple(size for size, _, _ in chosen[:-1])
    return sizes, tuple(s for _, s, _ in chosen), tuple(m for _, _, m in chosen)


def _side_by_side(dims: Sequence[Dim]) -> bool:
    """Whether neighbouring rows lie side by side: the last dimension is not reduced."""
    return bool(dims) and not dims[-1].reduced


def _has_edges(dims: Sequence[Dim], vector: int) -> bool:
    """Whether rows lie whole in memory, and not all of them in whole vectors."""
    n = count(dims, reduced=True)
    whole = not any(a.reduced and not b.reduced for a, b in itertools.pairwise(dims))
    return whole and not _side_by_side(dims) and n % vector != 0 and n >= 2 * vector


def _form_of(op: str, dims: Sequence[Dim], itemsize: int) -> Form:
    rows, n = count(dims, reduced=False), count(dims, reduced=True)
    return _form(op, rows, n, itemsize, _side_by_side(dims))


def _programs(dims: Sequence[Dim], form: Form) -> int:
    return -(-count(dims, reduced=False) // form.rows)


def _program(
    op: str,
    dims: Sequence[Dim],
    form: Form,
    *,
    vector: int,
    masked: bool,
    scale: float,
    precise: bool,
    options: Options,
    dense: bool,
) -> Program:
    unit = row_loss.unit(float(scale), options)
    factor = unit / math.log(2)
    high = float(np.float32(factor))
    apart = form.edges and form.rows == 1 and _has_edges(dims, vector)
    return Program(
        op=op,
        m=count(dims, reduced=False),
        n=count(dims, reduced=True),
        rows=form.rows,
        columns=form.columns,
        vector=vector,
        part="vectors" if apart else "all",
        stages=form.stages,
        axis=0 if _side_by_side(dims) else 1,
        row=_layout(dims, reduced=False),
        column=_layout(dims, reduced=True),
        masked=masked,
        long=math.prod(dim.size for dim in dims) > _LONG,
        scale=float(scale),
        unit=unit,
        factor=(high, float(np.float32(factor - high))),
        precise=precise and options.softcap is None,
        options=options,
        dense=dense,
    )


def run(call: RowCall, arrays: Sequence[Any], form: Form | None = None) -> Any:
    """Runs the kernel for a call on its arrays.

    Args:
      call: A call that `refusal` does not refuse.
      arrays: The arrays it describes.
      form: In place of the table's, to measure it.
    """
    from jaxsoftmax._rows import triton_source

    op, options = call.op, call.options or _NO_OPTIONS
    x, where = arrays[0], None
    if function_of(op) != "softmax_derivative":
        where = arrays[1]
        # What is read besides x is copied before x is written: not x itself then.
        other = arrays[2] if op == "cross_entropy_with_gradient" else x
        arrays = (x, other if where is None else where, *arrays[2:])
    else:
        arrays = arrays[:2]  # without the index
    dense = op == "cross_entropy" and row_loss.is_dense(arrays[2])
    dims = merge_dims(x.shape, call.axis, None if where is None else where.shape)
    form = form or _form_of(op, dims, x.dtype.itemsize)
    # One row per program: then all its warps have read it before any of them writes.
    in_place = options.in_place and form.rows == 1 and x.dtype == call.dtype
    in_place = in_place and op == "cross_entropy_with_gradient"
    results = _results(call, dense)
    found = _compat.triton_call(
        *arrays,
        kernel=getattr(triton_source, f"jaxsoftmax_{op}"),
        results=results,
        grid=(_programs(dims, form),),
        name=f"jaxsoftmax_{op}",
        num_warps=form.warps,
        # What must not be contracted is written as an fma in the source.
        enable_fp_fusion=True,
        compute_capability=capability_lowered_for(),
        in_place=in_place,
        C=_program(
            function_of(op),
            dims,
            form,
            vector=_vector([*arrays, *jax.tree.leaves(results)]),
            masked=where is not None,
            scale=call.scale,
            precise=bool(call.dtype == np.float32),
            options=dataclasses.replace(options, in_place=in_place),
            dense=dense,
        ),
    )
    if call.options is None:
        return found
    *dx, numbers = jax.tree.leaves(found)
    each = [lax.index_in_dim(numbers, k, keepdims=False) for k in range(len(numbers))]
    return *dx, *each


# How many numbers a row a kernel writes, each as an array of its own, and whether it
# writes an array of x's shape.
_NUMBERS = {
    "log_softmax": 2,
    "log_sum_exp_state": 2,
    "softmax_derivative_state": 3,
    "log_softmax_pushforward_state": 3,
    "log_softmax_pullback_state": 2,
}


def _results(call: RowCall, dense: bool) -> Any:
    """What a kernel writes; of cross-entropy all numbers as one array."""
    x = call.arrays[0]
    a_row = row_shape(x.shape, call.axis)
    full = jax.ShapeDtypeStruct(x.shape, call.dtype)
    if call.options is not None:
        shape = (call.options.numbers + dense, *a_row)
        state = jax.ShapeDtypeStruct(shape, np.float32)
        return (full, state) if call.op == "cross_entropy_with_gradient" else state
    numbers = (jax.ShapeDtypeStruct(a_row, np.float32),) * _NUMBERS.get(call.op, 0)
    if call.op in FUNCTION_OF_STATE:
        return numbers
    return (full, *numbers) if numbers else full
