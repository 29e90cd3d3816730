"""What the Mosaic GPU kernels of short and long rows and of strips share.

Tiles, in a loop; and, of a cluster that has a row or a strip, a warpgroup's part and
the tiles of it that it has, with the order in which states are made, merged and used.
"""

import abc
import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxsoftmax._compat import mosaic_gpu as _compat
from jaxsoftmax._compat import mosaic_gpu_registers as registers
from jaxsoftmax._compat.mosaic_gpu_ptx import loop_rounds
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
from jaxsoftmax._rows.mosaic_gpu_plans import owned_by_last
from jaxsoftmax._rows.mosaic_gpu_problem import Problem

# --- references and names -------------------------------------------------------------


def take(refs: Any, present: bool) -> tuple[Any, Any]:
    return (refs[0], refs[1:]) if present else (None, refs)


def take_many(refs: Sequence[Any], count: int) -> tuple[Any, Any]:
    return refs[:count], refs[count:]


def take_result(
    problem: Problem, whole: Any, inputs: Any, refs: Any
) -> tuple[Any, Any]:
    """The reference the result is written to, or None; and the references after it."""
    if problem.into:
        return whole, refs
    if problem.in_place:
        return inputs[0], refs
    return take(refs, problem.spec.finish is not None)


def kernel_name(problem: Problem) -> str:
    return f"jaxsoftmax_{problem.op}"


def compiler_params(problem: Problem) -> Any:
    plgpu = _compat.mosaic_gpu()
    return plgpu.CompilerParams(
        approx_math=not problem.accurate,
        lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
        # Leaves out the barriers before and after every store. Each warp stores what it
        # has loaded itself; what warps exchange is followed by a barrier of its own.
        unsafe_no_auto_barriers=True,
    )


# --- tiles ----------------------------------------------------------------------------

_Step = Callable[[TileIndex, Any], Any]


@dataclasses.dataclass(frozen=True)
class Tiles:
    """The tiles of a share: the first ones, and others in a loop, `at_once`.

    A loop compiles several times faster than all at once, and needs fewer registers.
    """

    count: Any  # an int; in `OwnTiles`, a scalar of the kernel
    at_once: int
    keep_loop: bool = False  # however short it is
    kept: int = 0  # no fewer are the first ones

    def _first(self) -> Sequence[TileIndex]:
        return range(self.kept + (self.count - self.kept - 1) % self.at_once + 1)

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


class OwnTiles(Tiles):
    """As many tiles as are owned, from the share's end; of the last one maybe a part.

    Args:
      owned: How many units are; none, or fewer, count as one tile. More than `kept`.
      height: Units of a tile.
      at_once, kept: As in `Tiles`.
    """

    def __init__(
        self, owned: jax.Array, height: int, at_once: int, kept: int = 0
    ) -> None:
        tiles = lax.div(owned + (height - 1), jnp.int32(height))
        super().__init__(lax.max(tiles, 1), at_once, kept=kept)

    def _first(self) -> Sequence[TileIndex]:
        return [Edge(self.count - 1), *range(self.kept)]

    def _others(self, step: _Step, carry: Any) -> Any:
        last, begin = self.count - 1, self.kept
        rounds = lax.div(last - begin, jnp.int32(self.at_once))
        carry = lax.fori_loop(0, rounds, self._round(begin, step), carry)
        return lax.fori_loop(begin + rounds * self.at_once, last, step, carry)


# --- of a cluster ---------------------------------------------------------------------


class Part(abc.ABC):
    """A warpgroup's part of what a cluster has: its references and its place.

    Subclasses say what that is, and how its states merge.
    """

    problem: Problem
    op: Op
    part: Any  # which, of all in the cluster
    row: Any
    inputs: Sequence[Any]
    row_inputs: Sequence[Any]
    row_outputs: Sequence[Any]
    mask: Any
    layout: Any

    def run(self) -> None:
        if self.op.elementwise:
            lax.fori_loop(0, self.problem.chunks, self._write_chunk, 0)
        elif self.problem.chunks == 1:
            self._run_once()
        else:
            self._run_in_chunks()

    def write_numbers(self, merged: State, store: Callable[[Any, Any], None]) -> None:
        """Stores the results with one number per row, in one part of the cluster."""

        def write() -> None:
            numbers = self.op.row_outputs(merged)
            for out, number in zip(self.row_outputs, numbers, strict=True):
                store(out, number)

        if self.op.row_output_count:
            _compat.pallas().when(self.part == 0)(write)

    def _write_chunk(self, chunk: Any, carry: Any) -> Any:
        """The result of a chunk, where nothing is reduced."""
        self.share(chunk).write((), ())
        return carry

    def _run_once(self) -> None:
        """Of one chunk: its tiles stay where they are for the result."""
        share = self.share(jnp.int32(0))
        mine = self.op.local(share.view)
        merged = self._merge(mine)
        if self.op.finish is not None:
            share.write(mine, merged)

    def _run_in_chunks(self) -> None:
        """The state of all chunks, then the result of each, from the last one.

        That stays where it is; the others are read again.
        """
        chunks = self.problem.chunks
        if self.op.finish is None:
            self._merge(self._state_of(chunks))
            return
        others = chunks - 1
        state, last = self._state_of(others), self.share(jnp.int32(others))
        merged = self._merge(self._with_share(state, last))

        def write(chunk: Any, carry: Any) -> Any:
            # What was read last may still be in the cache.
            # Relative to the whole row, so that the chunk's state is not needed.
            self.share(others - 1 - chunk).write(merged, merged)
            return carry

        last.write(merged, merged)
        lax.fori_loop(0, others, write, 0)

    def _state_of(self, chunks: int) -> State:
        """The state of the first chunks."""
        neutral = tuple(self.every(x) for x in self.op.neutral)

        def add(chunk: Any, state: State) -> State:
            return self._with_share(state, self.share(chunk))

        return lax.fori_loop(0, chunks, add, neutral)

    def _with_share(self, state: State, share: "Share") -> State:
        both = [state, self.op.local(share.view)]
        return self.op.merge(both, max_tiles, sum_tiles)

    @abc.abstractmethod
    def share(self, chunk: Any) -> "Share":
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


class Share(abc.ABC):
    """The tiles of one chunk that a warpgroup has: loads, masks, and the result."""

    def __init__(self, part: Part, chunk: Any) -> None:
        problem = part.problem
        plan = problem.plan
        self.problem, self.plan, self.layout = problem, plan, part.layout
        self.shared = plan.place == "shared"
        self.owned_from = (chunk * problem.parts + part.part) * problem.share
        self.start = self.owned_from
        if problem.overlapping:
            last = jnp.int32(problem.units - problem.share)
            self.start = jnp.minimum(self.owned_from, last)
        self.tiles = self._tiles()
        mask = None
        if part.mask is not None:
            self.mask_row = problem.mask_row(part.row)
            mask = self._mask if self.shared else functools.cache(self._mask)
        if self.shared:
            self._copy()
        self.view = View(
            load=self._load if self.shared else functools.cache(self._load),
            widen=self._widen,
            widen_again=functools.partial(self._widen, again=plan.kept > 0),
            fold=self.tiles.fold,
            mask=mask,
            owned=self._owned,
            broadcast=part.broadcast,
            row_inputs=tuple(part.row_input(ref) for ref in part.row_inputs),
            per_row=part.per_unit,
            entries=self.tiles.count * problem.unit,
            in_registers=plan.place == "registers" and not problem.overlapping,
            layout=self.layout,
        )

    def _copy(self) -> None:
        """Copies the share to shared memory and registers, and waits for the former."""
        if self.problem.chunks > 1:  # all warps have read the chunk before
            _compat.mosaic_gpu().commit_smem()
        self._start_copies()
        arrays = range(len(self.problem.dtypes))
        kept = itertools.product(arrays, range(self.plan.kept))
        self.kept = {place: self._read(*place) for place in kept}
        self._await_copies()

    @abc.abstractmethod
    def _start_copies(self) -> None:
        """Begins to copy what is in shared memory, `Problem.staged_units`."""

    @abc.abstractmethod
    def _await_copies(self) -> None:
        """Waits for them."""

    def _tiles(self) -> Tiles:
        plan, problem = self.plan, self.problem
        if not self.shared:
            return Tiles(plan.tiles, plan.tiles)
        at_once = 16 // plan.vector
        if not problem.overlapping:
            return Tiles(plan.tiles, at_once, kept=plan.kept)
        owned = self.start + (problem.share - self.owned_from)
        return OwnTiles(owned, problem.height, at_once, plan.kept)

    def _place(self, tile: TileIndex) -> Any:
        """Where the tile begins in the share."""
        index = tile.index if isinstance(tile, Edge) else tile
        if isinstance(self.tiles, OwnTiles) or self.plan.kept:
            index = self.plan.tiles - 1 - index
        return self.problem.height * index

    def _load(self, array: int, tile: TileIndex) -> jax.Array:
        """A tile of an array."""
        if not self.shared:
            return self._read(array, tile)
        if isinstance(tile, int) and tile < self.plan.kept:
            return self.kept[array, tile]
        return self._load_staged(array, tile)

    @abc.abstractmethod
    def _read(self, array: int, tile: TileIndex) -> jax.Array:
        """A tile, from the array itself."""

    @abc.abstractmethod
    def _load_staged(self, array: int, tile: TileIndex) -> jax.Array:
        """A tile, from shared memory."""

    def _widen(self, x: jax.Array, again: bool = False) -> Tile:
        return registers.widened(x, self.layout, again=again)

    def _owned(self, tile: TileIndex) -> jax.Array | None:
        if not self.problem.overlapping:
            return None
        if isinstance(self.tiles, OwnTiles) and not isinstance(tile, Edge):
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
        pl, op, dtype = _compat.pallas(), self.problem.spec, self.problem.out_dtype
        finish = op.finish
        assert finish is not None

        def result() -> None:
            value = finish(self.view, mine, merged)

            def store(tile: TileIndex) -> None:
                self._store(tile, self.view.result(tile, value(tile), op, dtype))

            self.tiles.for_each(store)

        def zeros() -> None:
            zero = jnp.zeros(self.problem.tile, jnp.float32)
            self.tiles.for_each(lambda tile: self._store(tile, zero.astype(dtype)))

        if op.unused is None:
            result()
        else:
            unused = op.unused(self.view.row_inputs)
            pl.when(unused)(zeros)
            pl.when(~unused)(result)

    def _store(self, tile: Any, value: jax.Array) -> None:
        self._put(tile, _compat.mosaic_gpu().layout_cast(value, self.layout))

    @abc.abstractmethod
    def _put(self, tile: Any, value: jax.Array) -> None:
        """Writes a tile of the result."""


def cluster_kernel(
    problem: Problem,
    part: Callable[[Any, Any], Part],
    out_type: Any,
    scratch: list[Any],
    **grid: int,
) -> Callable[..., Any]:
    """A kernel whose clusters each have one of a grid's places, in parts."""
    plgpu, plan = _compat.mosaic_gpu(), problem.plan
    assert problem.units >= problem.share, problem
    # A share's last tiles are in registers, and a warpgroup owns the last of its share.
    owned = owned_by_last(plan, problem.units, problem.height)
    assert not plan.kept or owned > problem.height * plan.kept, problem

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
        kernel_name=kernel_name(problem),
        compiler_params=compiler_params(problem),
        **mesh,
    )


# --- calls ----------------------------------------------------------------------------
