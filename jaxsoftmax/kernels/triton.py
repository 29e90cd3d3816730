"""Softmax, its derivatives and cross-entropy as Triton kernels, through jax-triton.

Takes every shape, axis and mask of bfloat16, float16 and float32 on NVIDIA GPUs from
compute capability 8.0 on. The functions are those of `kernels.xla` and
`kernels.xla_cross_entropy`, with the same meaning; the programs are in
`_triton_source`, which says what a program owns and what it reads and writes. This
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
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxsoftmax import _compat
from jaxsoftmax.kernels import _loss
from jaxsoftmax.kernels._call import Call, Device, function_of, without_kernel
from jaxsoftmax.kernels._loss import Options, State
from jaxsoftmax.kernels._rows import Axes, Dim, count, merge_dims, row_shape, strides

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


def refusal(call: Call, device: Device) -> str | None:
    """Why `call` cannot run on `device`, or None if it can."""
    return refusal_of_device(device) or _refused(call) or unavailable()


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


def _refused(call: Call) -> str | None:
    """What about the call itself has no kernel."""
    reason = without_kernel(call)
    if reason is not None:
        return reason
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
def unavailable() -> str | None:
    """Why no kernel can run here at all; found once, by lowering a small one."""
    try:
        import jax_triton

        version = getattr(jax_triton, "__version__", "of unknown version")
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "jax_triton":
            return "jax-triton is not installed (pip install jaxsoftmax[triton])"
        return f"importing jax-triton failed: {_first_line(error)}"
    try:
        # In a thread of its own: what is traced, and the settings of the thread that
        # asks, have no part in it.
        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            thread.submit(_lower_a_small_one).result()
    except Exception as error:
        return f"lowering with jax-triton {version} failed: {_first_line(error)}"
    return None


def _lower_a_small_one() -> None:
    f = functools.partial(
        softmax, where=None, axis=(-1,), scale=1.0, dtype=np.dtype(np.float32)
    )
    x = jax.ShapeDtypeStruct((8,), np.float32)
    jax.jit(f).trace(x).lower(lowering_platforms=("cuda",))


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
        see `_triton_source`; "edges" in `edges`.
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
        spread, entropy = self.options.spread, self.options.entropy
        present = (True, True, True, self.dense, spread, spread, entropy)
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
            dims, strides(dims), strides(dims, of_mask=True), strict=True
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
    unit = _loss.unit(float(scale), options)
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


def _call(
    op: str,
    arrays: Sequence[jax.Array],
    where: jax.Array | None,
    results: Any,
    *,
    axis: Axes,
    scale: float,
    dtype: np.dtype,
    options: Options = _NO_OPTIONS,
    dense: bool = False,
    form: Form | None = None,
) -> Any:
    """Runs the kernel of `op` on `arrays`, among them a mask or something in its place.

    Args:
      op: The function's name.
      arrays: All pointers that the kernel reads; the first has the shape of all.
      where: The mask, if there is one.
      results: Shapes and dtypes of what the kernel writes.
      axis: What is reduced.
      scale: Multiplies the logits.
      dtype: The result's, or that of the result that a state belongs to.
      options: Of cross-entropy.
      dense: `Program.dense`.
      form: In place of the table's, to measure it.
    """
    from jaxsoftmax.kernels import _triton_source

    x = arrays[0]
    dims = merge_dims(x.shape, axis, None if where is None else where.shape)
    form = form or _form_of(op, dims, x.dtype.itemsize)
    # One row per program: then all its warps have read it before any of them writes.
    in_place = options.in_place and form.rows == 1 and x.dtype == dtype
    in_place = in_place and op == "cross_entropy_with_gradient"
    return _compat.triton_call(
        *arrays,
        kernel=getattr(_triton_source, f"jaxsoftmax_{op}"),
        results=results,
        grid=(_programs(dims, form),),
        name=f"jaxsoftmax_{op}",
        num_warps=form.warps,
        # What must not be contracted is written as an fma in the source.
        enable_fp_fusion=True,
        in_place=in_place,
        C=_program(
            function_of(op),
            dims,
            form,
            vector=_vector([*arrays, *jax.tree.leaves(results)]),
            masked=where is not None,
            scale=scale,
            precise=bool(dtype == np.float32),
            options=dataclasses.replace(options, in_place=in_place),
            dense=dense,
        ),
    )


def softmax(
    x: jax.Array,
    where: jax.Array | None,
    *,
    axis: Axes,
    scale: float,
    dtype: np.dtype,
    **tuning: Any,
) -> jax.Array:
    """``P = exp(scale (x - max)) / sum``: zeros where masked and in empty rows."""
    mask = x if where is None else where
    p = jax.ShapeDtypeStruct(x.shape, dtype)
    options = {"axis": axis, "scale": scale, "dtype": dtype, **tuning}
    return _call("softmax", (x, mask), where, p, **options)


def softmax_derivative(
    p: jax.Array,
    t: jax.Array,
    *,
    axis: Axes,
    scale: float,
    dtype: np.dtype,
    **tuning: Any,
) -> jax.Array:
    """``scale P (t - sum(P t) / sum(P))``; 0 where P is 0, whatever `t` is there."""
    y = jax.ShapeDtypeStruct(p.shape, dtype)
    options = {"axis": axis, "scale": scale, "dtype": dtype, **tuning}
    return _call("softmax_derivative", (p, t), None, y, **options)


def log_softmax(
    x: jax.Array,
    where: jax.Array | None,
    *,
    axis: Axes,
    scale: float,
    dtype: np.dtype,
    **tuning: Any,
) -> tuple[jax.Array, jax.Array]:
    """``log P``, -inf where masked and in empty rows, and the float32 row maximum."""
    mask = x if where is None else where
    y = jax.ShapeDtypeStruct(x.shape, dtype)
    row_max = jax.ShapeDtypeStruct(row_shape(x.shape, axis), np.float32)
    options = {"axis": axis, "scale": scale, "dtype": dtype, **tuning}
    y, row_max = _call("log_softmax", (x, mask), where, (y, row_max), **options)
    return y, row_max


def log_softmax_pushforward(
    x: jax.Array,
    where: jax.Array | None,
    row_max: jax.Array,
    t: jax.Array,
    *,
    axis: Axes,
    scale: float,
    dtype: np.dtype,
    **tuning: Any,
) -> jax.Array:
    """``scale (t - sum(P t))``; 0 where masked or -inf."""
    op = "log_softmax_pushforward"
    return _of_logits(op, x, where, row_max, t, axis, scale, dtype, **tuning)


def log_softmax_pullback(
    x: jax.Array,
    where: jax.Array | None,
    row_max: jax.Array,
    g: jax.Array,
    *,
    axis: Axes,
    scale: float,
    dtype: np.dtype,
    **tuning: Any,
) -> jax.Array:
    """``scale (g - P sum(g))``; 0 where masked or -inf."""
    op = "log_softmax_pullback"
    return _of_logits(op, x, where, row_max, g, axis, scale, dtype, **tuning)


def _of_logits(
    op: str,
    x: jax.Array,
    where: jax.Array | None,
    row_max: jax.Array,
    t: jax.Array,
    axis: Axes,
    scale: float,
    dtype: np.dtype,
    **tuning: Any,
) -> jax.Array:
    """A derivative of log_softmax; both take and give arrays of the same shapes."""
    arrays = (x, x if where is None else where, row_max, t)
    y = jax.ShapeDtypeStruct(x.shape, dtype)
    options = {"axis": axis, "scale": scale, "dtype": dtype, **tuning}
    return _call(op, arrays, where, y, **options)


# --- cross-entropy --------------------------------------------------------------------


def cross_entropy(
    x: jax.Array,
    where: jax.Array | None,
    labels: jax.Array,
    *,
    axis: Axes,
    scale: float,
    dtype: np.dtype,
    options: Options,
    **tuning: Any,
) -> State:
    """The state of each row; labels are int32, one a row, or floats as many as `x`."""
    op, dense = "cross_entropy", _loss.is_dense(labels)
    arrays = (x, x if where is None else where, labels)
    numbers = _numbers(x, axis, options, dense)
    static: Any = {"axis": axis, "scale": scale, "dtype": dtype, "options": options}
    numbers = _call(op, arrays, where, numbers, dense=dense, **static, **tuning)
    return _as_state(numbers, options, dense)


def cross_entropy_with_gradient(
    x: jax.Array,
    where: jax.Array | None,
    labels: jax.Array,
    label_weight: jax.Array,
    weight: jax.Array,
    *,
    axis: Axes,
    scale: float,
    dtype: np.dtype,
    options: Options,
    **tuning: Any,
) -> tuple[jax.Array, State]:
    """The gradient of a weighted sum over rows, and their states.

    Labels are int32, the weights floats, one a row. A row that fits is read once.
    """
    op = "cross_entropy_with_gradient"
    # Not x in place of a mask: what is read besides is copied before it is written.
    mask = labels if where is None else where
    arrays = (x, mask, labels, label_weight, weight)
    results = (
        jax.ShapeDtypeStruct(x.shape, dtype),
        _numbers(x, axis, options, dense=False),
    )
    static: Any = {"axis": axis, "scale": scale, "dtype": dtype, "options": options}
    dx, numbers = _call(op, arrays, where, results, **static, **tuning)
    return dx, _as_state(numbers, options, dense=False)


def _numbers(
    x: jax.Array, axis: Axes, options: Options, dense: bool
) -> jax.ShapeDtypeStruct:
    """What a kernel writes a state to: one array, the first dimension the numbers'."""
    shape = (options.numbers + dense, *row_shape(x.shape, axis))
    return jax.ShapeDtypeStruct(shape, np.float32)


def _as_state(numbers: jax.Array, options: Options, dense: bool) -> State:
    each = [
        lax.index_in_dim(numbers, k, keepdims=False) for k in range(numbers.shape[0])
    ]
    return _loss.state(each, options, dense=dense)


# --- states ---------------------------------------------------------------------------


def _state(op: str, count: int) -> Callable[..., tuple[jax.Array, ...]]:
    """The state `op` of `kernels.xla`, which is `count` numbers a row."""

    def state(
        x: jax.Array,
        *others: Any,  # where, which may be None, among them
        axis: Axes,
        scale: float,
        dtype: np.dtype,
        **tuning: Any,
    ) -> tuple[jax.Array, ...]:
        where = None
        if function_of(op) != "softmax_derivative":
            where, *rest = others
            others = (x if where is None else where, *rest)
        number = jax.ShapeDtypeStruct(row_shape(x.shape, axis), np.float32)
        options = {"axis": axis, "scale": scale, "dtype": dtype, **tuning}
        return tuple(_call(op, (x, *others), where, (number,) * count, **options))

    state.__name__ = state.__qualname__ = op
    state.__doc__ = f"As `kernels.xla.{op}`."
    return state


log_sum_exp_state = _state("log_sum_exp_state", 2)
softmax_derivative_state = _state("softmax_derivative_state", 3)
log_softmax_pushforward_state = _state("log_softmax_pushforward_state", 3)
log_softmax_pullback_state = _state("log_softmax_pullback_state", 4)
