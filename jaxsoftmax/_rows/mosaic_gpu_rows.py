"""Rows that lie in memory as they are reduced, on NVIDIA GPUs: see `mosaic_gpu`.

Of short rows lanes of a warp have one each, or a warp has; of long ones a cluster.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxsoftmax._compat import mosaic_gpu as _compat
from jaxsoftmax._compat import mosaic_gpu_registers as registers
from jaxsoftmax._compat.mosaic_gpu_cluster import ClusterSlots
from jaxsoftmax._compat.mosaic_gpu_masks import StagedMask, load_mask
from jaxsoftmax._rows.mosaic_gpu_kernel import (
    Part,
    Share,
    Tiles,
    cluster_kernel,
    compiler_params,
    kernel_name,
    take,
    take_many,
)
from jaxsoftmax._rows.mosaic_gpu_ops import (
    Edge,
    Op,
    PerRow,
    State,
    Tile,
    TileIndex,
    View,
    max_tiles,
    sum_tiles,
)
from jaxsoftmax._rows.mosaic_gpu_plans import Plan
from jaxsoftmax._rows.mosaic_gpu_problem import Problem, tile_layout


def rows_kernel(problem: Problem) -> Callable[..., Any]:
    """The function of the arrays that runs the kernel."""
    if problem.plan.place in ("rows", "warps"):
        return _short_rows_kernel(problem)
    return _long_rows_kernel(problem)


def view_shape(problem: Problem) -> tuple[int, ...]:
    """The shape that arrays have in the kernel."""
    if problem.plan.ragged:
        return (problem.rows * problem.length,)
    if problem.plan.place == "rows":
        return problem.rows, problem.length
    return problem.rows, problem.units, problem.plan.width


def _mask_tile(problem: Problem) -> dict[str, Any]:
    """What `load_mask` is to know of the tiles."""
    plan = problem.plan
    return {
        "length": problem.length,
        "lanes": plan.lanes,
        "shape": plan.tile,
        "layout": tile_layout(plan),
        "dtype": problem.mask_dtype,
    }


def _out_types(problem: Problem, shape: tuple[int, ...]) -> Any:
    op = problem.spec
    number = jax.ShapeDtypeStruct((problem.rows,), np.float32)
    numbers = (number,) * op.row_output_count
    if op.finish is None or problem.in_place or problem.into:
        return numbers
    return (jax.ShapeDtypeStruct(shape, problem.out_dtype), *numbers)


def _take_result(
    problem: Problem, whole: Any, inputs: Any, refs: Any
) -> tuple[Any, Any]:
    """The reference the result is written to, or None; and the references after it."""
    if problem.into:
        return whole, refs
    if problem.in_place:
        return inputs[0], refs
    return take(refs, problem.spec.finish is not None)


def _out_row(problem: Problem, row: jax.Array, place: Any) -> jax.Array:
    """Where the result of a row is written."""
    return place[0] * problem.rows + row if problem.into else row


# --- short rows -----------------------------------------------------------------------


class _ShortRows:
    """The rows of a block of one warpgroup: loads, masks, and the result."""

    def __init__(self, problem: Problem, refs: Any) -> None:
        pl, block = _compat.pallas(), problem.block
        self.problem, self.layout = problem, tile_layout(problem.plan)
        self.shape = block, problem.plan.width
        whole, refs = take(refs, problem.into)
        self.inputs, refs = take_many(refs, len(problem.dtypes))
        self.mask, refs = take(refs, problem.mask is not None)
        row_inputs, refs = take_many(refs, problem.row_inputs)
        self.out, refs = _take_result(problem, whole, self.inputs, refs)
        place, self.row_outputs = take(refs, problem.into)
        last = jnp.int32(problem.rows - block)
        first = problem.first_row(lax.axis_index("block"), block)
        self.first = jnp.minimum(first, last)
        self.rows = pl.ds(self.first, block)
        self.out_rows = pl.ds(_out_row(problem, self.first, place), block)
        per_row = self.layout.reduce(1)
        self.tiles = Tiles(problem.plan.tiles, problem.plan.tiles)
        kept = problem.plan.place == "rows"
        once = functools.cache if kept else (lambda load: load)
        self.view = View(
            load=once(self._load),
            widen=self._widen,
            # What stays in registers stays in 16 bits, if it has 16: of 64 entries a
            # lane, log_softmax takes 96 registers in place of 205.
            widen_again=functools.partial(self._widen, again=kept),
            fold=self.tiles.fold,
            mask=once(self._mask) if self.mask is not None else None,
            owned=lambda tile: None,
            broadcast=self._broadcast,
            row_inputs=tuple(
                _compat.mosaic_load(ref.at[self.rows], per_row) for ref in row_inputs
            ),
            per_row=lambda number: number,
            entries=problem.plan.tiles * problem.plan.width,
            in_registers=True,
            layout=self.layout,
        )

    def _at(self, tile: Any) -> Any:
        width = self.problem.plan.width
        return _compat.pallas().ds(tile * width, width)

    def _load(self, array: int, tile: TileIndex) -> jax.Array:
        ref = self.inputs[array].at[self.rows, self._at(tile)]
        return _compat.mosaic_load(ref, self.layout)

    def _mask(self, tile: TileIndex) -> jax.Array:
        problem = self.problem
        assert problem.mask is not None
        assert not isinstance(tile, Edge)
        # The rows of the mask follow each other too, or are one.
        follow = problem.mask[-1][1]
        return load_mask(
            self.mask,
            problem.mask_row(self.first),
            tile * problem.plan.width,
            problem.length if follow else 0,
            **_mask_tile(problem),
        )

    def _widen(self, x: jax.Array, again: bool = False) -> Tile:
        return registers.widened(x, self.layout, again=again)

    def _broadcast(self, x: PerRow) -> Tile:
        tile = lax.broadcast_in_dim(x, self.shape, (0,))
        return _compat.mosaic_gpu().layout_cast(tile, self.layout)

    def write(self, state: State) -> None:
        """The result of the rows, given their state."""
        plgpu, op = _compat.mosaic_gpu(), self.problem.spec
        if op.finish is not None:
            result, unused = op.finish(self.view, state, state), None
            if op.unused is not None:
                number = jnp.where(op.unused(self.view.row_inputs), 1.0, 0.0)
                unused = self._broadcast(number) == 1

            def store(tile: int) -> None:
                value = result(tile)
                if unused is not None:
                    value = jnp.where(unused, 0.0, value)
                value = self.view.result(tile, value, op, self.problem.out_dtype)
                self._store(tile, plgpu.layout_cast(value, self.layout))

            self.tiles.for_each(store)
        for ref, number in zip(self.row_outputs, op.row_outputs(state), strict=True):
            _compat.mosaic_store(ref.at[self.rows], number)

    def _store(self, tile: int, value: jax.Array) -> None:
        # Of few lanes, 64 bytes of a row: from 0.12 on, Mosaic minds.
        _compat.mosaic_store(self.out.at[self.out_rows, self._at(tile)], value)


class _StagedRows(_ShortRows):
    """Rows of any length, each in shared memory for a warp."""

    def __init__(self, problem: Problem, refs: Any) -> None:
        assert problem.ragged is not None
        self.ragged, plan = problem.ragged, problem.plan
        n = len(problem.dtypes)
        refs, scratch = refs[: -n - 2], refs[-n - 2 :]
        self.buffers, (barrier, edges) = take_many(scratch, n)
        self.edges = edges.at[0]
        super().__init__(problem, refs)
        # All at once, the tiles of a short row take up more registers.
        self.tiles = Tiles(plan.tiles, 16 // plan.vector, keep_loop=True)
        self.view = dataclasses.replace(
            self.view, fold=self.tiles.fold, in_registers=False
        )
        self.ragged.stage(
            self.inputs,
            self.buffers,
            barrier.at[0],
            self.first,
            0,
            plan.tiles,
            problem.fills,
        )

    @staticmethod
    def scratch(problem: Problem) -> list[Any]:
        plgpu, ragged = _compat.mosaic_gpu(), problem.ragged
        assert ragged is not None
        shape = ragged.buffer(problem.plan.tiles)
        buffers = [plgpu.SMEM(shape, dtype) for dtype in problem.dtypes]
        return [*buffers, ragged.barriers(1), ragged.edges(1, problem.out_dtype)]

    def _load(self, array: int, tile: TileIndex) -> jax.Array:
        place = self.ragged.staged(self.buffers[array], tile)
        return _compat.mosaic_load(place, self.layout)

    def _mask(self, tile: TileIndex) -> jax.Array:
        dims = self.problem.mask
        assert dims is not None
        return self.ragged.load_mask(self.mask, self.first, tile, dims)

    def write(self, state: State) -> None:
        super().write(state)
        if self.problem.spec.finish is not None:
            tiles = self.problem.plan.tiles
            self.ragged.store_edges(self.out, self.edges, self.first, 0, tiles)

    def _store(self, tile: int, value: jax.Array) -> None:
        self.ragged.store(self.out, self.edges, self.first, tile, value)


def _short_rows_kernel(problem: Problem) -> Callable[..., Any]:
    """A block of one warpgroup has `Plan.height` rows; warps exchange nothing.

    Where the blocks do not divide the rows, the last one starts early and computes some
    rows again.
    """
    staged = problem.plan.place == "warps"
    kind = _StagedRows if staged else _ShortRows

    def body(*refs: Any) -> None:
        rows = kind(problem, refs)
        rows.write(problem.spec.local(rows.view))

    return _compat.mosaic_gpu().kernel(
        body,
        out_type=_out_types(problem, view_shape(problem)),
        scratch_types=_StagedRows.scratch(problem) if staged else [],
        grid=(-(-problem.rows // problem.block),),
        grid_names=("block",),
        kernel_name=kernel_name(problem),
        compiler_params=compiler_params(problem),
    )


# --- long rows ------------------------------------------------------------------------


class _Exchange:
    """Merges the states of a row's warps.

    First in the block: each warp writes its numbers to shared memory and reads all of
    the block's. Then over the cluster: each block sends what came out to every block,
    and reads what it was sent (`ClusterSlots`). A place is used once.
    """

    def __init__(self, op: Op, plan: Plan, refs: Sequence[Any]) -> None:
        self.op, self.plan = op, plan
        self.in_block, refs = take(refs, True)
        slots, refs = take_many(refs, 2 if plan.blocks > 1 else 0)
        self.block_barrier, _ = take(refs, plan.warpgroups > 1)
        if plan.blocks > 1:
            self.slots = ClusterSlots(slots, plan.blocks, op.neutral)

    @staticmethod
    def scratch(op: Op, plan: Plan) -> list[Any]:
        plgpu = _compat.mosaic_gpu()
        count = len(op.neutral)
        refs = [plgpu.SMEM((count, plan.height * plan.warpgroups), jnp.float32)]
        if plan.blocks > 1:
            refs += ClusterSlots.scratch(plan.blocks, count)
        if plan.warpgroups > 1:
            refs.append(plgpu.Barrier(num_arrivals=plan.warpgroups))
        return refs

    def merge(self, state: State, warpgroup: Any) -> State:
        """The state of the row, as scalars."""
        pl, plgpu = _compat.pallas(), _compat.mosaic_gpu()
        height = self.plan.height
        for i, number in enumerate(state):
            mine = self.in_block.at[i, pl.ds(warpgroup * height, height)]
            _compat.mosaic_store(mine, number)
        plgpu.commit_smem()  # synchronises the warps of the warpgroup, too
        if self.block_barrier is not None:
            plgpu.barrier_arrive(self.block_barrier)
            plgpu.barrier_wait(self.block_barrier)
        merged = self._merged(self.in_block, _every_thread_layout())
        if self.plan.blocks == 1:
            return merged
        self.slots.exchange(merged)
        return self._merged(self.slots.slots, _one_per_lane_layout(self.slots.places))

    def _merged(self, ref: Any, layout: Any) -> State:
        states = [_compat.mosaic_load(ref.at[i], layout) for i in range(ref.shape[0])]
        return self.op.merge(
            [tuple(states)],
            lambda xs: jnp.max(max_tiles(xs)),
            lambda xs: jnp.sum(sum_tiles(xs)),
        )


def _one_per_lane_layout(count: int) -> Any:
    """A number in each lane of a warp, in turn; the same in all warps."""
    plgpu = _compat.mosaic_gpu()
    lanes: list[Any] = [-2] if count > 1 else []
    if count < 32:
        lanes.insert(0, plgpu.Replicated(32 // count))
    return plgpu.Layout.TILED(
        plgpu.Tiling(((count,), (1,))),
        warp_dims=(plgpu.Replicated(4),),
        lane_dims=tuple(lanes),
        vector_dim=-1,
    )


def _every_thread_layout() -> Any:
    """Four numbers at a time, all in every thread."""
    plgpu = _compat.mosaic_gpu()
    return plgpu.Layout.TILED(
        plgpu.Tiling(((4,),)),
        warp_dims=(plgpu.Replicated(4),),
        lane_dims=(plgpu.Replicated(32),),
        vector_dim=-1,
    )


class _LongRow(Part):
    """A warpgroup's part of a row that a cluster has.

    Each warpgroup has `tiles` tiles of the row (or, in chunks, that many at a time).
    Where the row does not divide, shares overlap: one of two warpgroups owns an entry
    that both have. In shared memory the other leaves out the tiles of which it owns
    nothing. What both compute both write, each relative to its own maximum: in the last
    bits these may differ, and which stays is by chance.
    """

    def __init__(self, problem: Problem, refs: Any) -> None:
        plan, op = problem.plan, problem.spec
        self.problem, self.op, self.layout = problem, op, tile_layout(plan)
        arrays = len(problem.dtypes)
        staged = arrays if plan.place == "shared" else 0
        whole, refs = take(refs, problem.into)
        self.inputs, refs = take_many(refs, arrays)
        self.mask, refs = take(refs, problem.mask is not None)
        self.row_inputs, refs = take_many(refs, problem.row_inputs)
        self.out, refs = _take_result(problem, whole, self.inputs, refs)
        place, refs = take(refs, problem.into)
        self.row_outputs, refs = take_many(refs, op.row_output_count)
        self.buffers, refs = take_many(refs, staged)
        ragged = problem.plan.ragged
        self.arrived, refs = take_many(refs, 1 if ragged else staged)
        self.edges, refs = take(refs, ragged)
        mask_refs, refs = take_many(refs, 2 if problem.mask_staged else 0)
        if not op.elementwise:
            self.exchange = _Exchange(op, plan, refs)

        self.row = problem.first_row(lax.axis_index("row"), 1)
        self.out_row = _out_row(problem, self.row, place)
        block = lax.axis_index("piece") if plan.blocks > 1 else jnp.int32(0)
        one_warpgroup = plan.warpgroups == 1
        self.warpgroup = jnp.int32(0) if one_warpgroup else lax.axis_index("part")
        self.part = block * plan.warpgroups + self.warpgroup
        self.staged_mask: StagedMask | None = None
        if mask_refs:
            self.staged_mask = StagedMask([r.at[self.warpgroup] for r in mask_refs])

    def share(self, chunk: Any) -> "Share":
        kind = _RaggedShare if self.problem.plan.ragged else _RowShare
        return kind(self, chunk)

    def every(self, x: float) -> PerRow:
        height = self.problem.plan.height
        return self._cast_per_unit(jnp.full((height,), x, jnp.float32))

    def _merge(self, mine: State) -> State:
        merged = self.exchange.merge(mine, self.warpgroup)

        def write() -> None:
            numbers = self.op.row_outputs(merged)
            for out, number in zip(self.row_outputs, numbers, strict=True):
                out[self.row] = number

        if self.op.row_output_count:
            _compat.pallas().when(self.part == 0)(write)
        return merged

    def row_input(self, ref: Any) -> PerRow:
        return ref[self.row]

    def per_unit(self, x: PerRow) -> PerRow:
        if x.ndim:
            return x
        return self._cast_per_unit(lax.broadcast(x, (self.problem.plan.height,)))

    def _cast_per_unit(self, x: jax.Array) -> jax.Array:
        return _compat.mosaic_gpu().layout_cast(x, self.layout.reduce(1))

    def broadcast(self, x: PerRow) -> Tile:
        dimensions = (0,) if x.ndim else ()
        tile = lax.broadcast_in_dim(x, self.problem.plan.tile, dimensions)
        if self.problem.options is None:
            return tile
        # Before jax 0.11, layout inference fails without: `test_layouts_are_found` in
        # tests/rows/test_mosaic_gpu.py.
        return _compat.mosaic_gpu().layout_cast(tile, self.layout)


class _RowShare(Share):
    """A warpgroup's tiles of a row of whole tiles."""

    def __init__(self, part: _LongRow, chunk: Any) -> None:
        self.part = part
        super().__init__(part, chunk)

    def _start_copies(self) -> None:
        plgpu, part = _compat.mosaic_gpu(), self.part
        units = _compat.pallas().ds(self.start, self.problem.staged_units)
        staged = zip(part.inputs, part.buffers, part.arrived, strict=True)
        for ref, buffer, barrier in staged:
            plgpu.copy_gmem_to_smem(
                ref.at[part.row, units],
                buffer.at[part.warpgroup],
                barrier.at[part.warpgroup],
            )
        if part.staged_mask is not None:
            at, length = self.start * self.plan.width, self.problem.length
            part.staged_mask.start(part.mask, self.mask_row, at, length)

    def _await_copies(self) -> None:
        if self.part.staged_mask is not None:
            self.part.staged_mask.wait()
        for barrier in self.part.arrived:
            _compat.mosaic_gpu().barrier_wait(barrier.at[self.part.warpgroup])

    def _at(self, tile: TileIndex) -> Any:
        place = self.start + self._place(tile)
        return _compat.pallas().ds(place, self.plan.height)

    def _read(self, array: int, tile: TileIndex) -> jax.Array:
        ref = self.part.inputs[array].at[self.part.row, self._at(tile)]
        return _compat.mosaic_load(ref, self.layout)

    def _load_staged(self, array: int, tile: TileIndex) -> jax.Array:
        rows = _compat.pallas().ds(self._place(tile), self.plan.height)
        ref = self.part.buffers[array].at[self.part.warpgroup, rows]
        return _compat.mosaic_load(ref, self.layout)

    def _mask(self, tile: TileIndex) -> jax.Array:
        width, options = self.plan.width, _mask_tile(self.problem)
        at, staged = self._place(tile), self.part.staged_mask
        if staged is not None:
            return load_mask(staged.buffer, 0, at * width, width, **options)
        at = (self.start + at) * width
        return load_mask(self.part.mask, self.mask_row, at, width, **options)

    def _put(self, tile: TileIndex, value: jax.Array) -> None:
        self.part.out[self.part.out_row, self._at(tile)] = value


class _RaggedShare(_RowShare):
    """A warpgroup's tiles of a row of any length, in shared memory."""

    def __init__(self, part: _LongRow, chunk: Any) -> None:
        assert part.problem.ragged is not None
        self.ragged = part.problem.ragged
        super().__init__(part, chunk)

    @property
    def first(self) -> Any:
        return self.part.part * self.plan.tiles

    @property
    def edges(self) -> Any:
        return self.part.edges.at[self.part.warpgroup]

    def _copy(self) -> None:  # which waits for them too
        part, own = self.part, self.part.warpgroup
        self.ragged.stage(
            part.inputs,
            [buffer.at[own] for buffer in part.buffers],
            part.arrived[0].at[own],
            part.row,
            self.first,
            self.plan.tiles,
            part.problem.fills,
        )

    def _mask(self, tile: TileIndex) -> jax.Array:
        part, dims = self.part, self.part.problem.mask
        assert dims is not None
        return self.ragged.load_mask(part.mask, part.row, self.first + tile, dims)

    def _put(self, tile: TileIndex, value: jax.Array) -> None:
        part = self.part
        self.ragged.store(part.out, self.edges, part.row, self.first + tile, value)

    def write(self, mine: State, merged: State) -> None:
        super().write(mine, merged)
        part, tiles = self.part, self.plan.tiles
        self.ragged.store_edges(part.out, self.edges, part.row, self.first, tiles)


def _long_rows_kernel(problem: Problem) -> Callable[..., Any]:
    """A cluster of `blocks` blocks of `warpgroups` warpgroups has a row: `_LongRow`."""
    plgpu, plan = _compat.mosaic_gpu(), problem.plan
    scratch: list[Any] = []
    if plan.place == "shared":
        shape = (plan.warpgroups, problem.staged_units, plan.width)
        scratch += [plgpu.SMEM(shape, dtype) for dtype in problem.dtypes]
        if problem.ragged is not None:
            scratch.append(problem.ragged.barriers(plan.warpgroups))
            scratch.append(problem.ragged.edges(plan.warpgroups, problem.out_dtype))
        else:
            scratch += [
                plgpu.Barrier(num_arrivals=1, num_barriers=plan.warpgroups)
                for _ in problem.dtypes
            ]
        if problem.mask_staged:
            entries = problem.share * plan.width
            scratch += StagedMask.scratch(plan.warpgroups, entries)
    if not problem.spec.elementwise:
        scratch += _Exchange.scratch(problem.spec, plan)
    out_type = _out_types(problem, view_shape(problem))
    return cluster_kernel(problem, _LongRow, out_type, scratch, row=problem.rows)
