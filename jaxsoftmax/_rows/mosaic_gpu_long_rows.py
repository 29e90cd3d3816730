"""Long rows, on NVIDIA GPUs: the blocks of a cluster, or one block, have one."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxsoftmax._compat import mosaic_gpu as _compat
from jaxsoftmax._compat.mosaic_gpu_cluster import ClusterSlots
from jaxsoftmax._compat.mosaic_gpu_masks import StagedMask, load_mask
from jaxsoftmax._rows.mosaic_gpu_kernel import (
    Part,
    Share,
    cluster_kernel,
    take,
    take_many,
    take_result,
)
from jaxsoftmax._rows.mosaic_gpu_ops import (
    Op,
    PerRow,
    State,
    Tile,
    TileIndex,
    max_tiles,
    sum_tiles,
)
from jaxsoftmax._rows.mosaic_gpu_plans import Plan
from jaxsoftmax._rows.mosaic_gpu_problem import Problem, tile_layout


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
        self.out, refs = take_result(problem, whole, self.inputs, refs)
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
        self.out_row = problem.out_row(self.row, place)
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

        def store(out: Any, number: Any) -> None:
            out[self.row] = number

        self.write_numbers(merged, store)
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
        width, options = self.plan.width, self.problem.mask_tile
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


def long_rows_kernel(problem: Problem) -> Callable[..., Any]:
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
    out_type = problem.out_types
    return cluster_kernel(problem, _LongRow, out_type, scratch, row=problem.rows)
