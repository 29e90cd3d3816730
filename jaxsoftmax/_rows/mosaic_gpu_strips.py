"""Rows along an axis that is not last, on NVIDIA GPUs, through Pallas Mosaic GPU.

Neighbouring rows lie side by side in memory: an array is seen as (outer, length,
inner), and a cluster has a *strip*, the rows of `Plan.width` neighbours of the inner
dimension. It is read in segments of that width, of 32 to 256 bytes, and nothing is
transposed. The skeleton is that of `mosaic_gpu_kernel`: warps reduce their shares of a
strip to states, which merge in the block and over the cluster; one that shared memory
and registers hold is read once, a longer one twice.

What differs: of everything that there is one of per row there is one per column here. A
tile is four *units*, one for each warp, of ``32 / lanes`` entries of each of the rows;
a warp's number per column is what its lanes have in common. A block is one warpgroup.

The operations are those of `mosaic_gpu_ops`, to which a tile is (4, 32 / lanes, width),
reduced over its second axis, and a number per row (4, width).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxsoftmax._compat import mosaic_gpu as _compat
from jaxsoftmax._compat.mosaic_gpu_cluster import ClusterVectors
from jaxsoftmax._core.shapes import row_shape
from jaxsoftmax._rows import mosaic_gpu_strip_plans, row_layout
from jaxsoftmax._rows.call import RowCall
from jaxsoftmax._rows.mosaic_gpu_kernel import Part, Share, cluster_kernel, take_many
from jaxsoftmax._rows.mosaic_gpu_ops import (
    PerRow,
    State,
    Tile,
    TileIndex,
    max_tiles,
    sum_tiles,
)
from jaxsoftmax._rows.mosaic_gpu_plans import Plan
from jaxsoftmax._rows.mosaic_gpu_problem import Problem, arguments, mask_strides

PerColumn = jax.Array  # float32, (width,)
_WARPS = 4


@dataclasses.dataclass(frozen=True)
class Strips(Problem):
    """A call as its kernel sees it; `rows` is the outer dimension alone.

    Attributes:
      inner: How many rows lie side by side.
      mask_inner: Whether `where` varies along the inner dimension.
    """

    inner: int = 0
    mask_inner: bool = False

    @property
    def unit(self) -> int:
        """Entries of each row in a unit."""
        return 32 // self.plan.lanes

    @property
    def height(self) -> int:
        return _WARPS

    @property
    def tile(self) -> tuple[int, int, int]:
        return _WARPS, self.unit, self.plan.width

    @property
    def strips(self) -> int:
        """Strips side by side; the last one starts early where they do not divide."""
        return -(-self.inner // self.plan.width)

    def run(self, call: RowCall, arrays: Sequence[jax.Array | None]) -> Any:
        """Runs the kernel for the call on its arrays."""
        values, where, row_inputs = arguments(call.op, arrays)
        x = values[0]
        operands = [v.reshape(-1, self.unit, self.inner) for v in values]
        if where is not None:
            shape = (-1, self.unit, self.inner) if self.mask_inner else (-1, self.unit)
            # As bytes: Mosaic fails to load bools (`test_not_in_mosaic`).
            operands.append(where.reshape(shape).astype(jnp.uint8))
        operands += [number.reshape(self.rows, self.inner) for number in row_inputs]
        outs = _kernel(self)(*operands)
        a_row = row_shape(x.shape, call.axis)
        results = [out.reshape(x.shape if out.ndim == 3 else a_row) for out in outs]
        return results[0] if len(results) == 1 else tuple(results)


def problem(call: RowCall, plan: Plan | None = None) -> Strips | str:
    """The call as its kernel sees it, or why there is no kernel for it.

    Args:
      call: A call whose rows do not extend along the last dimension.
      plan: The plan to use instead of the one in the table.
    """
    values, where, row_inputs = arguments(call.op, call.arrays)
    if call.options is not None:
        return "the classes are not last in memory"
    x = values[0]
    where_shape = None if where is None else where.shape
    dims = row_layout.merge_dims(x.shape, call.axis, where_shape)
    if where is not None and not any(d.reduced and d.masked for d in dims):
        return "where varies along no part of a row"
    if sum(d.reduced for d in dims) > 1 or dims[-1].reduced or not dims[-2].reduced:
        return "what is reduced, or masked, is in several places in memory"
    *outer, reduced, inner = dims
    dtypes = tuple(np.dtype(v.dtype) for v in values)
    itemsizes = [d.itemsize for d in (*dtypes, np.dtype(call.dtype))]
    if plan is None:
        found = mosaic_gpu_strip_plans.plan(
            op=call.op,
            length=reduced.size,
            inner=inner.size,
            itemsize=max(itemsizes),
            narrowest=min(itemsizes),
        )
        if isinstance(found, str):
            return found
        plan = found
    reason = _compat.mosaic_strips_reason()
    if reason is not None:
        return reason
    return Strips(
        op=call.op,
        rows=row_layout.count(outer, reduced=False),
        length=reduced.size,
        dtypes=dtypes,
        out_dtype=np.dtype(call.dtype),
        row_inputs=len(row_inputs),
        mask=mask_strides([*outer, reduced]),
        scale=call.scale,
        plan=plan,
        alone=call.alone,
        inner=inner.size,
        mask_inner=inner.masked,
    )


def _tile_layout(problem: Strips) -> Any:
    """A unit for each warp; in it lanes side by side, and then along the rows."""
    plgpu, plan = _compat.mosaic_gpu(), problem.plan
    return plgpu.Layout.TILED(
        plgpu.Tiling((problem.tile, (plan.vector,))),
        warp_dims=(-4,),
        lane_dims=(-3, -2),
        vector_dim=-1,
    )


def _states_layout(problem: Strips) -> Any:
    """States of a unit's height, (unit, width); the same in all warps."""
    plgpu, plan = _compat.mosaic_gpu(), problem.plan
    return plgpu.Layout.TILED(
        plgpu.Tiling((problem.tile[1:], (plan.vector,))),
        warp_dims=(plgpu.Replicated(_WARPS),),
        lane_dims=(-3, -2),
        vector_dim=-1,
    )


class _Exchange:
    """Merges the states of a strip's warps, as `mosaic_gpu` does those of a row's."""

    def __init__(self, problem: Strips, refs: Sequence[Any]) -> None:
        self.problem, self.op, plan = problem, problem.spec, problem.plan
        self.warp_states, *refs = refs
        if plan.blocks > 1:
            self.block_state, *refs = refs
            self.cluster = ClusterVectors(refs, plan.blocks)
        self.per_column = _tile_layout(problem).reduce((0, 1))

    @staticmethod
    def scratch(problem: Strips) -> list[Any]:
        plgpu, plan = _compat.mosaic_gpu(), problem.plan
        count, width = len(problem.spec.neutral), plan.width
        refs = [plgpu.SMEM((count, _WARPS, width), jnp.float32)]
        if plan.blocks > 1:
            refs.append(plgpu.SMEM((count, width), jnp.float32))
            refs += ClusterVectors.scratch(plan.blocks, count, width)
        return refs

    def merge(self, state: State) -> tuple[PerColumn, ...]:
        """The state of the strip, in all warps."""
        plgpu = _compat.mosaic_gpu()
        for i, number in enumerate(state):
            _compat.mosaic_store(self.warp_states.at[i], number)
        plgpu.commit_smem()  # synchronises the warps, too
        merged = self._merged(self.warp_states)
        if self.problem.plan.blocks == 1:
            return merged
        for i, number in enumerate(merged):
            _compat.mosaic_store(self.block_state.at[i], number)
        plgpu.commit_smem()
        self.cluster.exchange(self.block_state)
        slots = self.cluster.slots
        if self.problem.plan.blocks % self.problem.unit:
            return self._merged(slots)
        return self._merged_by_lanes(slots)

    def _merged(self, ref: Any) -> tuple[PerColumn, ...]:
        """Of states (count, states, width), each by all lanes that have its columns.

        One by one: as a whole they would be loaded in another shape than stored, and
        Mosaic may choose a swizzle that is not the same in both.
        """
        count, states, _ = ref.shape

        def state(k: int) -> State:
            loads = (ref.at[i, k] for i in range(count))
            return tuple(_compat.mosaic_load(x, self.per_column) for x in loads)

        return self.op.merge([state(k) for k in range(states)], max_tiles, sum_tiles)

    def _merged_by_lanes(self, ref: Any) -> tuple[PerColumn, ...]:
        """The same where the states fill a unit: each by a lane of its own."""
        layout = _states_layout(self.problem)
        every = tuple(
            _compat.mosaic_load(ref.at[i], layout) for i in range(ref.shape[0])
        )

        def top(xs: Sequence[jax.Array]) -> jax.Array:
            largest = jnp.max(max_tiles(xs), axis=0)
            full = lax.broadcast_in_dim(largest, every[0].shape, (1,))
            return _compat.mosaic_gpu().layout_cast(full, layout)

        def total(xs: Sequence[jax.Array]) -> jax.Array:
            return jnp.sum(sum_tiles(xs), axis=0)

        merged = self.op.merge([every], top, total)
        # What `top` gives is the same for all states.
        return tuple(x if x.ndim == 1 else jnp.max(x, axis=0) for x in merged)


class _Strip(Part):
    """A block's part of a strip."""

    problem: Strips

    def __init__(self, problem: Strips, refs: Any) -> None:
        take, plan = take_many, problem.plan
        self.problem, self.op = problem, problem.spec
        self.layout = _tile_layout(problem)
        arrays = len(problem.dtypes)
        self.inputs, refs = take(refs, arrays)
        mask, refs = take(refs, int(problem.mask is not None))
        self.mask: Any = mask[0] if mask else None
        self.row_inputs, refs = take(refs, problem.row_inputs)
        (self.out,), refs = take(refs, 1)
        self.row_outputs, refs = take(refs, self.op.row_output_count)
        self.buffers, refs = take(refs, arrays)
        self.arrived, refs = take(refs, arrays)
        self.exchange = _Exchange(problem, refs)

        strip = lax.axis_index("strip")
        strips = jnp.int32(problem.strips)
        self.row = lax.div(strip, strips)
        column = lax.rem(strip, strips) * plan.width
        column = jnp.minimum(column, problem.inner - plan.width)
        self.columns = _compat.pallas().ds(column, plan.width)
        one_block = plan.blocks == 1
        self.part = jnp.int32(0) if one_block else lax.axis_index("piece")

    def at(self, ref: Any, start: Any, count: int) -> Any:
        """Some units of the strip, in an array's (units, unit, inner)."""
        units = _compat.pallas().ds(self.row * self.problem.units + start, count)
        return ref.at[units, :, self.columns]

    def share(self, chunk: Any) -> Share:
        return _StripShare(self, chunk)

    def every(self, x: float) -> PerRow:
        shape = (_WARPS, self.problem.plan.width)
        return self._cast_per_warp(jnp.full(shape, x, jnp.float32))

    def _merge(self, mine: State) -> State:
        merged = self.exchange.merge(mine)

        def store(out: Any, number: Any) -> None:
            _compat.mosaic_store(out.at[self.row, self.columns], number)

        self.write_numbers(merged, store)
        return tuple(self._per_warp(x) for x in merged)

    def row_input(self, ref: Any) -> PerRow:
        per_column = self.layout.reduce((0, 1))
        number = _compat.mosaic_load(ref.at[self.row, self.columns], per_column)
        return self._per_warp(number)

    def per_unit(self, x: PerRow) -> PerRow:
        return x

    def _per_warp(self, x: PerColumn) -> PerRow:
        """A number per column, once for each warp."""
        shape = (_WARPS, self.problem.plan.width)
        return self._cast_per_warp(lax.broadcast_in_dim(x, shape, (1,)))

    def _cast_per_warp(self, x: jax.Array) -> PerRow:
        return _compat.mosaic_gpu().layout_cast(x, self.layout.reduce((1,)))

    def broadcast(self, x: PerRow) -> Tile:
        tile = lax.broadcast_in_dim(x, self.problem.tile, (0, 2))
        return _compat.mosaic_gpu().layout_cast(tile, self.layout)


class _StripShare(Share):
    """The tiles of one chunk that a block has."""

    def __init__(self, strip: _Strip, chunk: Any) -> None:
        self.strip = strip
        super().__init__(strip, chunk)

    def _start_copies(self) -> None:
        strip = self.strip
        staged = zip(strip.inputs, strip.buffers, strip.arrived, strict=True)
        for ref, buffer, barrier in staged:
            source = strip.at(ref, self.start, self.problem.staged_units)
            _compat.mosaic_gpu().copy_gmem_to_smem(source, buffer, barrier)

    def _await_copies(self) -> None:
        for barrier in self.strip.arrived:
            _compat.mosaic_gpu().barrier_wait(barrier)

    def _at(self, ref: Any, tile: TileIndex) -> Any:
        return self.strip.at(ref, self.start + self._place(tile), _WARPS)

    def _read(self, array: int, tile: TileIndex) -> jax.Array:
        ref = self._at(self.strip.inputs[array], tile)
        return _compat.mosaic_load(ref, self.layout)

    def _load_staged(self, array: int, tile: TileIndex) -> jax.Array:
        units = _compat.pallas().ds(self._place(tile), _WARPS)
        return _compat.mosaic_load(self.strip.buffers[array].at[units], self.layout)

    def _mask(self, tile: TileIndex) -> jax.Array:
        strip, problem = self.strip, self.strip.problem
        start = self.mask_row * problem.units + self.start + self._place(tile)
        units = _compat.pallas().ds(start, _WARPS)
        if problem.mask_inner:
            ref = strip.mask.at[units, :, strip.columns]
            return _compat.mosaic_load(ref, self.layout)
        mask = _compat.mosaic_load(strip.mask.at[units], self.layout.reduce((2,)))
        tile_mask = lax.broadcast_in_dim(mask, problem.tile, (0, 1))
        return _compat.mosaic_gpu().layout_cast(tile_mask, self.layout)

    def _put(self, tile: Any, value: jax.Array) -> None:
        _compat.mosaic_store(self._at(self.strip.out, tile), value)


def _kernel(problem: Strips) -> Callable[..., Any]:
    """A cluster of `blocks` blocks has a strip: `_Strip`."""
    plgpu = _compat.mosaic_gpu()
    assert problem.plan.place == "shared", problem
    shape = (problem.staged_units, *problem.tile[1:])
    scratch: list[Any] = [plgpu.SMEM(shape, dtype) for dtype in problem.dtypes]
    scratch += [plgpu.Barrier(num_arrivals=1) for _ in problem.dtypes]
    scratch += _Exchange.scratch(problem)
    shape = (problem.rows * problem.units, problem.unit, problem.inner)
    number = jax.ShapeDtypeStruct((problem.rows, problem.inner), np.float32)
    out_type = (
        jax.ShapeDtypeStruct(shape, problem.out_dtype),
        *(number,) * problem.spec.row_output_count,
    )
    strips = problem.rows * problem.strips
    return cluster_kernel(problem, _Strip, out_type, scratch, strip=strips)
