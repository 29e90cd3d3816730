"""Softmax and its derivatives on NVIDIA GPUs, through Pallas Mosaic GPU.

One kernel per call: every array is read once and the result written once, up to the
longest row that `mosaic_gpu_plans` has a split for; longer ones are read twice.

A row is split over blocks of a cluster, warpgroups of a block and warps of a warpgroup.
Each warp reduces its share to a few numbers, its *state*: for softmax the maximum and
the sum of exponentials relative to it. States merge, as those of an online softmax do,
first in the block and then over the cluster, through (distributed) shared memory; then
each warp computes its share of the result. That is the skeleton, in this module. What
the state of a share is, how states merge and what the result is, is defined by the
operation, in `mosaic_gpu_ops`.

Where a share is kept in between, and over what a row is split, is a `Plan`:

- ``"rows"``: 2 to 32 lanes of a warp have a row, in registers. Nothing is shared.
- ``"warps"``: a warp has a row, in shared memory.
- ``"registers"``, ``"shared"``: a cluster has a row; each warp keeps its share in
  registers or, read by bulk copies, in shared memory.
- ``"stream"``: a cluster has a row, in chunks that are read a second time.

In memory a share is made of *tiles*: four warps by 32 lanes by a vector of 16 bytes, of
as many rows, or units of a row of `width` entries, as `Plan.height` says. Arrays are
viewed as such units; but as flat where rows start between vectors, or are no whole
tiles (`Plan.ragged`): see `_compat.mosaic_gpu_vectors`.

Semantics and numerics are those of `_rows.xla`; what differs is noted at each `Op`.
"""

import abc
import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxsoftmax._compat import mosaic_gpu as _compat
from jaxsoftmax._compat.mosaic_gpu_vectors import (
    MASK_PADDING,
    RaggedRows,
    loop_rounds,
    window,
)
from jaxsoftmax._core.device import Device
from jaxsoftmax._core.shapes import row_shape
from jaxsoftmax._rows import mosaic_gpu_plans, row_layout, row_loss
from jaxsoftmax._rows.call import RowCall, function_of, without_kernel
from jaxsoftmax._rows.mosaic_gpu_ops import (
    OPS,
    Edge,
    Exponential,
    Op,
    PerRow,
    State,
    Tile,
    TileIndex,
    View,
    cross_entropy_op,
    max_tiles,
    sum_tiles,
)
from jaxsoftmax._rows.mosaic_gpu_plans import Plan

# --- the skeleton ---------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Problem:
    """A call as its kernel sees it.

    Attributes:
      op: The operation's name.
      rows, length: The arrays' shape.
      dtypes: Dtypes of the arrays that have the shape of the logits, in order.
      out_dtype: The result's.
      row_inputs: How many inputs have one number per row.
      mask: The merged dimensions of the rows as (size, stride in rows of the mask),
        outermost first; None without `where`.
      scale: Multiplies the logits.
      plan: How the work is split.
      options: Options of cross-entropy, else None.
      into: Whether the result is written into the first argument, from the row on that
        the last one says times `rows`.
    """

    op: str
    rows: int
    length: int
    dtypes: tuple[np.dtype, ...]
    out_dtype: np.dtype
    row_inputs: int
    mask: tuple[tuple[int, int], ...] | None
    scale: float
    plan: Plan
    options: row_loss.Options | None = None
    into: bool = False

    @property
    def accurate(self) -> bool:
        return bool(self.out_dtype == np.float32)

    @property
    def ragged(self) -> RaggedRows | None:
        """Where rows of any length lie, if not in whole tiles."""
        if not self.plan.ragged:
            return None
        plan = self.plan
        tile = plan.width * (plan.height if plan.place == "shared" else 1)
        held = self.parts * plan.tiles * tile
        itemsize = min(d.itemsize for d in (*self.dtypes, self.out_dtype))
        aligns = [n // itemsize for n in (128, 64, 32, 16)]
        fitting = [n for n in aligns if window(self.length, n) <= held]
        assert fitting, (self.length, plan)
        return RaggedRows(
            self.length,
            plan.vector,
            fitting[0],
            plan.place == "shared",
            _tile_layout(plan),
        )

    @property
    def fills(self) -> list[float]:
        """For each array what stands for entries outside of a row."""
        first = 0.0 if function_of(self.op) == "softmax_derivative" else -np.inf
        return [first, *[0.0] * (len(self.dtypes) - 1)]

    @property
    def block(self) -> int:
        """Rows of a block, where lanes of a warp have a row."""
        return self.plan.height

    # Where a cluster has a row, it is made of units: a tile has `Plan.height` of them.

    @property
    def height(self) -> int:
        """Units of a tile."""
        return self.plan.height

    @property
    def unit(self) -> int:
        """Entries of a row in a unit."""
        return self.plan.width

    @property
    def tile(self) -> tuple[int, ...]:
        return self.plan.tile

    @property
    def units(self) -> int:
        """Units of a row; of a ragged one, what its shares have."""
        if self.plan.ragged:
            return self.parts * self.share
        return self.length // self.unit

    @property
    def share(self) -> int:
        """Units of a chunk that a warpgroup has."""
        return self.height * self.plan.tiles

    @property
    def parts(self) -> int:
        """Warpgroups that share a row."""
        return self.plan.blocks * self.plan.warpgroups

    @property
    def chunks(self) -> int:
        """Chunks of a row."""
        return -(-self.units // (self.parts * self.share))

    @property
    def overlapping(self) -> bool:
        """Whether the shares are more than the row, so that some overlap."""
        return self.chunks * self.parts * self.share != self.units

    @property
    def in_place(self) -> bool:
        """Whether the result is written where the first array is.

        True if that is requested, and all of a row is read before any of it is written.
        Warps that share a row exchange their states in between, which depend on all
        that they read. But a row in chunks is read twice; and two blocks that both have
        a short row do not wait for each other.
        """
        if self.options is None or not self.options.in_place or self.into:
            return False
        if self.op != "cross_entropy_with_gradient":
            return False
        if self.dtypes[0] != self.out_dtype:
            return False
        if self.plan.place in ("rows", "warps"):
            return self.rows % self.block == 0
        return self.chunks == 1

    @property
    def spec(self) -> Op:
        if self.options is not None:
            return cross_entropy_op(
                self.scale,
                self.accurate,
                self.options,
                dense=len(self.dtypes) > 1,
                with_gradient=self.op == "cross_entropy_with_gradient",
            )
        return OPS[self.op](Exponential(self.scale, self.accurate))

    def mask_row(self, row: jax.Array) -> jax.Array:
        """The mask's row for a row of the arrays."""
        assert self.mask is not None
        result: Any = jnp.int32(0)
        step = 1
        for size, stride in reversed(self.mask):
            if stride:
                place = lax.rem(lax.div(row, jnp.int32(step)), jnp.int32(size))
                result = result + place * jnp.int32(stride)
            step *= size
        return result


def _kernel(problem: _Problem) -> Callable[..., Any]:
    """The function of the arrays that runs the kernel."""
    if problem.plan.place in ("rows", "warps"):
        return _short_rows_kernel(problem)
    return _long_rows_kernel(problem)


def _tile_layout(plan: Plan) -> Any:
    """Four warps by `lanes` by `vector`; a warp has ``32 / lanes`` rows."""
    plgpu = _compat.mosaic_gpu()
    if plan.lanes == 32:
        return plgpu.Layout.TILED(
            plgpu.Tiling(((4, plan.width), (plan.vector,))),
            warp_dims=(-3,),
            lane_dims=(-2,),
            vector_dim=-1,
        )
    per_warp = 32 // plan.lanes
    return plgpu.Layout.TILED(
        plgpu.Tiling(((4 * per_warp, plan.width), (per_warp, plan.vector))),
        warp_dims=(-4,),
        lane_dims=(-3, -2),
        vector_dim=-1,
    )


def _compiler_params(problem: _Problem) -> Any:
    plgpu = _compat.mosaic_gpu()
    return plgpu.CompilerParams(
        approx_math=not problem.accurate,
        lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
        # Leaves out the barriers before and after every store. Each warp stores what it
        # has loaded itself; what warps exchange is followed by a barrier of its own.
        unsafe_no_auto_barriers=True,
    )


_Step = Callable[[TileIndex, Any], Any]


@dataclasses.dataclass(frozen=True)
class _Tiles:
    """The tiles of a share: the first ones, and others in a loop, `at_once`.

    A loop compiles several times faster than all at once, and needs fewer registers.
    """

    count: Any  # an int; in `_OwnTiles`, a scalar of the kernel
    at_once: int
    keep_loop: bool = False  # however short it is

    def _first(self) -> Sequence[TileIndex]:
        return range((self.count - 1) % self.at_once + 1)

    def _others(self, step: _Step, carry: Any) -> Any:
        begin = len(self._first())
        if begin == self.count:
            return carry
        rounds = (self.count - begin) // self.at_once
        rounds = loop_rounds(rounds) if self.keep_loop else rounds
        return lax.fori_loop(0, rounds, self._round(begin, step), carry)

    def _round(self, begin: int, step: _Step) -> Callable[[jax.Array, Any], Any]:
        def run(i: jax.Array, carry: Any) -> Any:
            for k in range(self.at_once):
                carry = step(begin + i * self.at_once + k, carry)
            return carry

        return run

    def fold(
        self,
        tiles_of: Callable[[TileIndex], Sequence[jax.Array]],
        combine: Callable[..., jax.Array],
    ) -> Sequence[jax.Array]:
        """Combines what the function has for each tile; see `View`."""

        def step(tile: TileIndex, carry: Sequence[jax.Array]) -> list[jax.Array]:
            return [combine(a, b) for a, b in zip(carry, tiles_of(tile), strict=True)]

        first, *more = self._first()
        carry = list(tiles_of(first))
        for tile in more:
            carry = step(tile, carry)
        return list(self._others(step, carry))

    def for_each(self, run: Callable[[Any], None]) -> None:
        def step(tile: TileIndex, carry: Any) -> Any:
            run(tile)
            return carry

        for tile in self._first():
            run(tile)
        self._others(step, 0)


class _OwnTiles(_Tiles):
    """As many tiles as are owned, from the share's end; of the last one maybe a part.

    Args:
      owned: How many units are; none, or fewer, count as one tile.
      height: Units of a tile.
      at_once: As in `_Tiles`.
    """

    def __init__(self, owned: jax.Array, height: int, at_once: int) -> None:
        tiles = lax.div(owned + (height - 1), jnp.int32(height))
        super().__init__(lax.max(tiles, 1), at_once)

    def _first(self) -> Sequence[TileIndex]:
        return [Edge(self.count - 1)]

    def _others(self, step: _Step, carry: Any) -> Any:
        whole = self.count - 1
        rounds = lax.div(whole, jnp.int32(self.at_once))
        carry = lax.fori_loop(0, rounds, self._round(0, step), carry)
        return lax.fori_loop(rounds * self.at_once, whole, step, carry)


class _ShortRows:
    """The rows of a block of one warpgroup: loads, masks, and the result."""

    def __init__(self, problem: _Problem, refs: Any) -> None:
        pl, block = _compat.pallas(), problem.block
        self.problem, self.layout = problem, _tile_layout(problem.plan)
        self.shape = block, problem.plan.width
        whole, refs = _take(refs, problem.into)
        self.inputs, refs = _take_many(refs, len(problem.dtypes))
        self.mask, refs = _take(refs, problem.mask is not None)
        row_inputs, refs = _take_many(refs, problem.row_inputs)
        self.out, refs = _take_result(problem, whole, self.inputs, refs)
        place, self.row_outputs = _take(refs, problem.into)
        last = jnp.int32(problem.rows - block)
        self.first = jnp.minimum(lax.axis_index("block") * block, last)
        self.rows = pl.ds(self.first, block)
        self.out_rows = pl.ds(_out_row(problem, self.first, place), block)
        per_row = self.layout.reduce(1)
        # In 16 bits, log_softmax would keep all entries as float32. Read once more,
        # from the cache, they leave room for more warps.
        again = problem.op == "log_softmax" and problem.plan.vector == 8
        self.tiles = _Tiles(problem.plan.tiles, 2 if again else problem.plan.tiles)
        kept = problem.plan.place == "rows" and not again
        once = functools.cache if kept else (lambda load: load)
        self.view = View(
            load=once(self._load),
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
        )

    def _at(self, tile: Any) -> Any:
        width = self.problem.plan.width
        return _compat.pallas().ds(tile * width, width)

    def _load(self, array: int, tile: TileIndex) -> jax.Array:
        ref = self.inputs[array].at[self.rows, self._at(tile)]
        return _compat.mosaic_load(ref, self.layout)

    def _mask(self, tile: TileIndex) -> jax.Array:
        at, mask = self._at(tile), self.problem.mask
        row = self.problem.mask_row(self.first)
        assert mask is not None
        if mask[-1][1]:  # the rows of the mask follow each other too
            rows = _compat.pallas().ds(row, self.problem.block)
            m = _compat.mosaic_load(self.mask.at[rows, at], self.layout)
        else:
            m = _compat.mosaic_load(self.mask.at[row, at], self.layout.reduce(0))
            m = lax.broadcast_in_dim(m, self.shape, (1,))
        return m

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
                value = value.astype(self.problem.out_dtype)
                if op.masked is not None:
                    value = self.view.hide(tile, value, op.masked)
                self._store(tile, plgpu.layout_cast(value, self.layout))

            self.tiles.for_each(store)
        for ref, number in zip(self.row_outputs, op.row_outputs(state), strict=True):
            _compat.mosaic_store(ref.at[self.rows], number)

    def _store(self, tile: int, value: jax.Array) -> None:
        self.out[self.out_rows, self._at(tile)] = value


class _StagedRows(_ShortRows):
    """Rows of any length, each in shared memory for a warp."""

    def __init__(self, problem: _Problem, refs: Any) -> None:
        assert problem.ragged is not None
        self.ragged, plan = problem.ragged, problem.plan
        n = len(problem.dtypes)
        refs, scratch = refs[: -n - 2], refs[-n - 2 :]
        self.buffers, (barrier, edges) = _take_many(scratch, n)
        self.edges = edges.at[0]
        super().__init__(problem, refs)
        # All at once, the tiles of a short row take up more registers.
        self.tiles = _Tiles(plan.tiles, 16 // plan.vector, keep_loop=True)
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
    def scratch(problem: _Problem) -> list[Any]:
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


def _short_rows_kernel(problem: _Problem) -> Callable[..., Any]:
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
        out_type=_out_types(problem, _view(problem)),
        scratch_types=_StagedRows.scratch(problem) if staged else [],
        grid=(-(-problem.rows // problem.block),),
        grid_names=("block",),
        kernel_name=_kernel_name(problem),
        compiler_params=_compiler_params(problem),
    )


def _take_result(
    problem: _Problem, whole: Any, inputs: Any, refs: Any
) -> tuple[Any, Any]:
    """The reference the result is written to, or None; and the references after it."""
    if problem.into:
        return whole, refs
    if problem.in_place:
        return inputs[0], refs
    return _take(refs, problem.spec.finish is not None)


def _out_row(problem: _Problem, row: jax.Array, place: Any) -> jax.Array:
    """Where the result of a row is written."""
    return place[0] * problem.rows + row if problem.into else row


def _take(refs: Any, present: bool) -> tuple[Any, Any]:
    return (refs[0], refs[1:]) if present else (None, refs)


def _kernel_name(problem: _Problem) -> str:
    return f"jaxsoftmax_{problem.op}"


def _view(problem: _Problem) -> tuple[int, ...]:
    """The shape that arrays have in the kernel."""
    if problem.plan.ragged:
        return (problem.rows * problem.length,)
    if problem.plan.place == "rows":
        return problem.rows, problem.length
    return problem.rows, problem.units, problem.plan.width


def _out_types(problem: _Problem, shape: tuple[int, ...]) -> Any:
    op = problem.spec
    number = jax.ShapeDtypeStruct((problem.rows,), np.float32)
    numbers = (number,) * op.row_output_count
    if op.finish is None or problem.in_place or problem.into:
        return numbers
    return (jax.ShapeDtypeStruct(shape, problem.out_dtype), *numbers)


class _Exchange:
    """Merges the states of a row's warps.

    First in the block: each warp writes its numbers to shared memory and reads all of
    the block's. Then over the cluster: each block sends what came out to every block,
    and reads what it was sent (`ClusterSlots`). A place is used once.
    """

    def __init__(self, op: Op, plan: Plan, refs: Sequence[Any]) -> None:
        self.op, self.plan = op, plan
        self.in_block, refs = _take(refs, True)
        slots, refs = _take_many(refs, 2 if plan.blocks > 1 else 0)
        self.block_barrier, _ = _take(refs, plan.warpgroups > 1)
        if plan.blocks > 1:
            self.slots = _compat.ClusterSlots(slots, plan.blocks, op.neutral)

    @staticmethod
    def scratch(op: Op, plan: Plan) -> list[Any]:
        plgpu = _compat.mosaic_gpu()
        count = len(op.neutral)
        refs = [plgpu.SMEM((count, plan.height * plan.warpgroups), jnp.float32)]
        if plan.blocks > 1:
            refs += _compat.ClusterSlots.scratch(plan.blocks, count)
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


def _take_many(refs: Sequence[Any], count: int) -> tuple[Any, Any]:
    return refs[:count], refs[count:]


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


class _Part(abc.ABC):
    """A warpgroup's part of what a cluster has: its references and its place.

    Subclasses say what that is, and how its states merge.
    """

    problem: _Problem
    op: Op
    part: Any  # which, of all in the cluster
    row: Any
    inputs: Sequence[Any]
    row_inputs: Sequence[Any]
    mask: Any
    layout: Any

    def run(self) -> None:
        if self.problem.chunks == 1:
            self._run_once()
        else:
            self._run_in_chunks()

    def _run_once(self) -> None:
        """Of one chunk: its tiles stay where they are for the result."""
        share = self.share(jnp.int32(0))
        mine = self.op.local(share.view)
        merged = self._merge(mine)
        if self.op.finish is not None:
            share.write(mine, merged)

    def _run_in_chunks(self) -> None:
        """The state of all chunks, then the result of each, which is read again."""
        chunks, op = self.problem.chunks, self.op

        def accumulate(chunk: Any, state: State) -> State:
            both = [state, op.local(self.share(chunk).view)]
            return op.merge(both, max_tiles, sum_tiles)

        def write(chunk: Any, carry: Any) -> Any:
            # From the end: what was read last may still be in the cache.
            # Relative to the whole row, so that the chunk's state is not needed.
            self.share(chunks - 1 - chunk).write(merged, merged)
            return carry

        neutral = tuple(self.every(x) for x in op.neutral)
        merged = self._merge(lax.fori_loop(0, chunks, accumulate, neutral))
        if op.finish is not None:
            lax.fori_loop(0, chunks, write, 0)

    @abc.abstractmethod
    def share(self, chunk: Any) -> "_Share":
        """The tiles of a chunk."""

    @abc.abstractmethod
    def every(self, x: float) -> PerRow:
        """The same number wherever a state has one."""

    @abc.abstractmethod
    def _merge(self, mine: State) -> State:
        """The state of all parts; its row outputs are written."""

    @abc.abstractmethod
    def row_input(self, ref: Any) -> PerRow:
        """What a row input has for the rows."""

    @abc.abstractmethod
    def per_unit(self, x: PerRow) -> PerRow:
        """A number for the row, once per unit of a tile."""

    @abc.abstractmethod
    def broadcast(self, x: PerRow) -> Tile:
        """As a `View` has it."""


class _LongRow(_Part):
    """A warpgroup's part of a row that a cluster has.

    Each warpgroup has `tiles` tiles of the row (or, streaming, that many at a time).
    Where the row does not divide, shares overlap: one of two warpgroups owns an entry
    that both have. In shared memory the other leaves out the tiles of which it owns
    nothing. What both compute both write, each relative to its own maximum: in the last
    bits these may differ, and which stays is by chance.
    """

    def __init__(self, problem: _Problem, refs: Any) -> None:
        plan, op = problem.plan, problem.spec
        self.problem, self.op, self.layout = problem, op, _tile_layout(plan)
        arrays = len(problem.dtypes)
        staged = arrays if plan.place == "shared" else 0
        whole, refs = _take(refs, problem.into)
        self.inputs, refs = _take_many(refs, arrays)
        self.mask, refs = _take(refs, problem.mask is not None)
        self.row_inputs, refs = _take_many(refs, problem.row_inputs)
        self.out, refs = _take_result(problem, whole, self.inputs, refs)
        place, refs = _take(refs, problem.into)
        self.row_outputs, refs = _take_many(refs, op.row_output_count)
        self.buffers, refs = _take_many(refs, staged)
        ragged = problem.plan.ragged
        self.arrived, refs = _take_many(refs, 1 if ragged else staged)
        self.edges, refs = _take(refs, ragged)
        self.exchange = _Exchange(op, plan, refs)

        self.row = lax.axis_index("row")
        self.out_row = _out_row(problem, self.row, place)
        block = lax.axis_index("piece") if plan.blocks > 1 else jnp.int32(0)
        one_warpgroup = plan.warpgroups == 1
        self.warpgroup = jnp.int32(0) if one_warpgroup else lax.axis_index("part")
        self.part = block * plan.warpgroups + self.warpgroup

    def share(self, chunk: Any) -> "_Share":
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


class _Share(abc.ABC):
    """The tiles of one chunk that a warpgroup has: loads, masks, and the result."""

    def __init__(self, part: _Part, chunk: Any) -> None:
        problem = part.problem
        plan = problem.plan
        self.problem, self.plan, self.layout = problem, plan, part.layout
        self.shared = plan.place == "shared"
        self.owned_from = (chunk * problem.parts + part.part) * problem.share
        self.start = self.owned_from
        if problem.overlapping:
            last = jnp.int32(problem.units - problem.share)
            self.start = jnp.minimum(self.owned_from, last)
        if self.shared:
            self._copy()
        mask = None
        if part.mask is not None:
            self.mask_row = problem.mask_row(part.row)
            mask = self._mask if self.shared else functools.cache(self._mask)
        self.tiles = self._tiles()
        self.view = View(
            load=self._load if self.shared else functools.cache(self._load),
            fold=self.tiles.fold,
            mask=mask,
            owned=self._owned,
            broadcast=part.broadcast,
            row_inputs=tuple(part.row_input(ref) for ref in part.row_inputs),
            per_row=part.per_unit,
            entries=self.tiles.count * problem.unit,
            in_registers=plan.place == "registers" and not problem.overlapping,
        )

    @abc.abstractmethod
    def _copy(self) -> None:
        """Copies the share to shared memory, and waits for it."""

    def _tiles(self) -> _Tiles:
        plan, problem = self.plan, self.problem
        if not self.shared:
            return _Tiles(plan.tiles, plan.tiles)
        at_once = 16 // plan.vector
        if not problem.overlapping:
            return _Tiles(plan.tiles, at_once)
        owned = self.start + (problem.share - self.owned_from)
        return _OwnTiles(owned, problem.height, at_once)

    def _place(self, tile: TileIndex) -> Any:
        """Where the tile begins in the share."""
        index = tile.index if isinstance(tile, Edge) else tile
        if isinstance(self.tiles, _OwnTiles):
            index = self.plan.tiles - 1 - index
        return self.problem.height * index

    @abc.abstractmethod
    def _load(self, array: int, tile: TileIndex) -> jax.Array:
        """A tile of an array."""

    def _owned(self, tile: TileIndex) -> jax.Array | None:
        if not self.problem.overlapping:
            return None
        if isinstance(self.tiles, _OwnTiles) and not isinstance(tile, Edge):
            return None
        unit = _compat.mosaic_gpu().broadcasted_iota(
            jnp.int32, self.problem.tile, 0, layout=self.layout
        )
        return unit + (self.start + self._place(tile)) >= self.owned_from

    @abc.abstractmethod
    def _mask(self, tile: TileIndex) -> jax.Array:
        """What `where` has for a tile."""

    def write(self, mine: State, merged: State) -> None:
        """The result of the share, given its state (or another's) and the row's."""
        pl, op = _compat.pallas(), self.problem.spec
        finish = op.finish
        assert finish is not None

        def result() -> None:
            value = finish(self.view, mine, merged)
            self.tiles.for_each(lambda tile: self._store(tile, value(tile)))

        def zeros() -> None:
            zero = jnp.zeros(self.problem.tile, jnp.float32)
            self.tiles.for_each(lambda tile: self._put(tile, self._cast(zero)))

        if op.unused is None:
            result()
        else:
            unused = op.unused(self.view.row_inputs)
            pl.when(unused)(zeros)
            pl.when(~unused)(result)

    def _store(self, tile: Any, value: Tile) -> None:
        masked = self.problem.spec.masked
        value = value.astype(self.problem.out_dtype)
        if masked is not None:
            value = self.view.hide(tile, value, masked)
        self._put(tile, self._cast(value))

    def _cast(self, value: Tile) -> jax.Array:
        value = value.astype(self.problem.out_dtype)
        return _compat.mosaic_gpu().layout_cast(value, self.layout)

    @abc.abstractmethod
    def _put(self, tile: Any, value: jax.Array) -> None:
        """Writes a tile of the result."""


class _RowShare(_Share):
    """A warpgroup's tiles of a row of whole tiles."""

    def __init__(self, part: _LongRow, chunk: Any) -> None:
        self.part = part
        super().__init__(part, chunk)

    def _copy(self) -> None:
        plgpu, part = _compat.mosaic_gpu(), self.part
        source = part.row, _compat.pallas().ds(self.start, self.problem.share)
        staged = zip(part.inputs, part.buffers, part.arrived, strict=True)
        for ref, buffer, barrier in staged:
            plgpu.copy_gmem_to_smem(
                ref.at[source], buffer.at[part.warpgroup], barrier.at[part.warpgroup]
            )
        for barrier in part.arrived:
            plgpu.barrier_wait(barrier.at[part.warpgroup])

    def _at(self, tile: TileIndex) -> Any:
        place = self.start + self._place(tile)
        return _compat.pallas().ds(place, self.plan.height)

    def _load(self, array: int, tile: TileIndex) -> jax.Array:
        part = self.part
        if self.shared:
            rows = _compat.pallas().ds(self._place(tile), self.plan.height)
            ref = part.buffers[array].at[part.warpgroup, rows]
        else:
            ref = part.inputs[array].at[part.row, self._at(tile)]
        return _compat.mosaic_load(ref, self.layout)

    def _mask(self, tile: TileIndex) -> jax.Array:
        ref = self.part.mask.at[self.mask_row, self._at(tile)]
        return _compat.mosaic_load(ref, self.layout)

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

    def _copy(self) -> None:
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


def _long_rows_kernel(problem: _Problem) -> Callable[..., Any]:
    """A cluster of `blocks` blocks of `warpgroups` warpgroups has a row: `_LongRow`."""
    plgpu, plan = _compat.mosaic_gpu(), problem.plan
    scratch: list[Any] = []
    if plan.place == "shared":
        shape = (plan.warpgroups, problem.share, plan.width)
        scratch += [plgpu.SMEM(shape, dtype) for dtype in problem.dtypes]
        if problem.ragged is not None:
            scratch.append(problem.ragged.barriers(plan.warpgroups))
            scratch.append(problem.ragged.edges(plan.warpgroups, problem.out_dtype))
        else:
            scratch += [
                plgpu.Barrier(num_arrivals=1, num_barriers=plan.warpgroups)
                for _ in problem.dtypes
            ]
    scratch += _Exchange.scratch(problem.spec, plan)
    out_type = _out_types(problem, _view(problem))
    return _cluster_kernel(problem, _LongRow, out_type, scratch, row=problem.rows)


def _cluster_kernel(
    problem: _Problem,
    part: Callable[[Any, Any], _Part],
    out_type: Any,
    scratch: list[Any],
    **grid: int,
) -> Callable[..., Any]:
    """A kernel whose clusters each have one of a grid's places, in parts."""
    plgpu, plan = _compat.mosaic_gpu(), problem.plan
    assert plan.place != "shared" or problem.chunks == 1
    assert problem.units >= problem.share, problem

    def body(*refs: Any) -> None:
        part(problem, refs).run()

    mesh: dict[str, Any] = {}
    if plan.blocks > 1:
        mesh.update(cluster=(plan.blocks,), cluster_names=("piece",))
    if plan.warpgroups > 1:
        mesh.update(num_threads=plan.warpgroups, thread_name="part")
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        kernel_name=_kernel_name(problem),
        compiler_params=_compiler_params(problem),
        **mesh,
    )


# --- calls ----------------------------------------------------------------------------


def _mask_strides(dims: Sequence[row_layout.Dim]) -> tuple[tuple[int, int], ...] | None:
    """Size, and stride in rows of the mask, of each dimension that is not reduced."""
    if not any(d.masked for d in dims):
        return None
    rows = [d for d in dims if not d.reduced]
    strides = row_layout.strides(rows, mask=True)
    return tuple((d.size, s) for d, s in zip(rows, strides, strict=True)) or ((1, 1),)


def mask_operand(where: jax.Array, x: jax.Array) -> jax.Array:
    """`where` as the kernels read it: see `View.mask`.

    Not as bools, which Mosaic fails to load (`test_not_in_mosaic`). In 16 bits the mask
    takes the fewest instructions, and twice the bytes: where many rows have one of it.
    """
    if x.dtype.itemsize == 2 and 4 * where.size <= x.size:
        return -where.astype(jnp.int16)
    return where.astype(jnp.uint8)


def _arguments(op: str, arrays: Sequence[Any]) -> tuple[list[Any], Any, list[Any]]:
    """The arrays of the logits' shape, `where`, and those with one number per row."""
    if function_of(op) == "softmax_derivative":
        return list(arrays[:2]), None, []
    x, where, *others = arrays
    if op == "cross_entropy":
        # The kernel has no use for an index: see `_Label`.
        return [x, *(a for a in others if row_loss.is_dense(a))], where, []
    if op == "cross_entropy_with_gradient":
        return [x], where, others[1:]
    if not others:
        return [x], where, []
    *state, t = others
    return [x, t], where, state


def _problem(call: RowCall, plan: Plan | None = None) -> _Problem | str:
    """The call as its kernel sees it, or why there is no kernel for it."""
    reason = without_kernel(call)
    if reason is not None:
        return reason
    values, where, row_inputs = _arguments(call.op, call.arrays)
    x = values[0]
    dtypes = tuple(np.dtype(v.dtype) for v in values)
    dims = row_layout.merge_dims(
        x.shape, call.axis, where.shape if where is not None else None
    )
    rows, length = (
        row_layout.count(dims, reduced=False),
        row_layout.count(dims, reduced=True),
    )
    reduced = [d for d in dims if d.reduced]
    if any(d.reduced and not e.reduced for d, e in itertools.pairwise(dims)):
        from jaxsoftmax._rows import mosaic_gpu_strips  # which needs this module

        return mosaic_gpu_strips.problem(call, plan)
    masked = any(d.masked for d in dims)
    if masked and not (len(reduced) == 1 and reduced[0].masked):
        return "where varies along part of a row, or along no part of it"
    mask = _mask_strides(dims)
    itemsize = max(d.itemsize for d in (*dtypes, np.dtype(call.dtype)))
    if plan is None:
        found = mosaic_gpu_plans.plan(
            op=call.op,
            rows=rows,
            length=length,
            itemsize=itemsize,
            mask=mask,
            capped=call.options is not None and call.options.softcap is not None,
        )
        if isinstance(found, str):
            return found
        plan = found
    return _Problem(
        call.op,
        rows,
        length,
        dtypes,
        np.dtype(call.dtype),
        len(row_inputs),
        mask,
        call.scale,
        plan,
        call.options,
    )


def refusal(call: RowCall, device: Device) -> str | None:
    """Why this call cannot run there; None if it can."""
    if device.platform != "cuda":
        return f"needs an NVIDIA GPU, the platform is {device.platform}"
    if device.compute_capability is None:
        return "the GPU's compute capability is not known"
    if device.compute_capability < (9, 0):
        major, minor = device.compute_capability
        return f"needs compute capability 9.0 or newer, the GPU has {major}.{minor}"
    reason = _compat.mosaic_gpu_reason()
    if reason is not None:
        return reason
    problem = _problem(call)
    return problem if isinstance(problem, str) else None


class _Label:
    """The label's part of a row where labels are indices, computed outside the kernel.

    Args:
      call: A call of cross-entropy.
      arrays: Its arguments.
    """

    def __init__(self, call: RowCall, arrays: Sequence[Any]) -> None:
        assert call.options is not None
        x, where, self.index, *weights = arrays
        self.call, self.options = call, call.options
        self.logit = row_loss.label_logit(x, where, self.index, call.axis, jnp.float32)
        self.weights = weights
        if weights:
            self.weights = [row_loss.label_weight(weights[0], self.index), weights[1]]

    def read_first(self) -> None:
        """Orders the reads of the logits before a kernel that overwrites them.

        XLA may schedule the reads after it, and copy the logits for that:
        https://github.com/jax-ml/jax/issues/25399
        """
        read = (self.logit, self.weights)
        self.logit, self.weights = lax.optimization_barrier(read)

    def put_into(
        self, results: Sequence[jax.Array], place: jax.Array | None = None
    ) -> list[jax.Array]:
        """The kernel's results, completed by the terms of the label.

        `place` is where the gradient is in the first result, or None if it is that.
        """
        call, options = self.call, self.options
        *dx, row_max, excess = results[: 3 if self.weights else 2]
        others = results[len(dx) + 2 :]
        below = row_loss.below_label(
            self.logit, self.index, row_max, call.scale, options
        )
        numbers = [row_max, excess, below, *others]
        if not dx:
            return numbers
        state = row_loss.state(numbers, options, dense=False)
        label_weight, weight = self.weights
        value = row_loss.label_gradient(
            self.logit, self.index, state, label_weight, weight, call.scale, options
        )
        used = row_loss.used_rows(label_weight, weight)
        index = jnp.where(used, self.index, -1)
        return [row_loss.set_at_label(dx[0], index, value, call.axis, place), *numbers]


def run(
    call: RowCall,
    arrays: Sequence[jax.Array | None],
    plan: Plan | None = None,
    into: tuple[jax.Array, jax.Array] | None = None,
) -> Any:
    """Runs the kernel for a call on its arrays.

    Args:
      call: A call that `refusal` does not refuse.
      arrays: The arrays it describes.
      plan: The plan to use instead of the one in the table.
      into: An array of many such results, and the place of this one: the array, with
        that written, is the first result.
    """
    problem = _problem(call, plan)
    if isinstance(problem, str):
        raise NotImplementedError(f"mosaic_gpu: {problem}")
    from jaxsoftmax._rows import mosaic_gpu_strips  # which needs this module

    if isinstance(problem, mosaic_gpu_strips.Strips):
        return problem.run(call, arrays)
    if into is not None and problem.plan.ragged:
        # Where a row begins in its vectors, it has to end up, too.
        dx, *others = run(call, arrays, plan)
        return lax.dynamic_update_index_in_dim(into[0], dx, into[1], 0), *others
    problem = dataclasses.replace(problem, into=into is not None)
    values, where, row_inputs = _arguments(call.op, arrays)
    x = values[0]
    label = None
    if call.options is not None and len(values) == 1:
        label = _Label(call, arrays)
        if problem.in_place:
            label.read_first()
        row_inputs = label.weights
    plan, view = problem.plan, _view(problem)
    operands = [v.reshape(view) for v in values]
    if where is not None and problem.mask is not None:
        if plan.ragged:
            mask = where.astype(jnp.uint8).reshape(-1)
            operands.append(jnp.pad(mask, MASK_PADDING))
        else:
            operands.append(mask_operand(where, x).reshape(-1, *view[1:]))
    operands += [number.reshape(problem.rows) for number in row_inputs]
    kernel, result_shape, place = _kernel(problem), x.shape, None
    if into is not None:
        whole, place = into
        result_shape = whole.shape
        whole = whole.reshape(-1, *view[1:])
        operands = [whole, *operands, place.reshape(1)]
    if problem.in_place or problem.into:
        outs = _compat.mosaic_over_first(kernel, *operands)
    else:
        outs = kernel(*operands)
    a_row = row_shape(x.shape, call.axis)
    numbers = problem.spec.row_output_count
    results = [
        out.reshape(result_shape if k < len(outs) - numbers else a_row)
        for k, out in enumerate(outs)
    ]
    if where is not None and problem.mask is None:
        # One value for the whole array.
        hidden: dict[str, Any] = {
            "log_softmax": (-np.inf, -np.inf, -1.0),
            "log_sum_exp_state": (-np.inf, -1.0),
            "cross_entropy": (-np.inf, -1.0),
            "cross_entropy_with_gradient": (0.0, -np.inf, -1.0),
        }
        fill = (*hidden.get(call.op, ()), *(0,) * len(results))[: len(results)]
        results = [
            jnp.where(where, out, jnp.asarray(value, out.dtype))
            for out, value in zip(results, fill, strict=True)
        ]
    if label is not None:
        results = label.put_into(results, place)
    return results[0] if len(results) == 1 else tuple(results)
