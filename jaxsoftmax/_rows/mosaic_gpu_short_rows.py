"""Short rows, on NVIDIA GPUs: lanes of a warp have one each, or a warp has."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxsoftmax._compat import mosaic_gpu as _compat
from jaxsoftmax._compat import mosaic_gpu_registers as registers
from jaxsoftmax._compat.mosaic_gpu_masks import load_mask
from jaxsoftmax._rows.mosaic_gpu_kernel import (
    Tiles,
    compiler_params,
    kernel_name,
    take,
    take_many,
    take_result,
)
from jaxsoftmax._rows.mosaic_gpu_ops import (
    Edge,
    PerRow,
    State,
    Tile,
    TileIndex,
    View,
)
from jaxsoftmax._rows.mosaic_gpu_problem import Problem, tile_layout


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
        self.out, refs = take_result(problem, whole, self.inputs, refs)
        place, self.row_outputs = take(refs, problem.into)
        last = jnp.int32(problem.rows - block)
        first = problem.first_row(lax.axis_index("block"), block)
        self.first = jnp.minimum(first, last)
        self.rows = pl.ds(self.first, block)
        self.out_rows = pl.ds(problem.out_row(self.first, place), block)
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
            **problem.mask_tile,
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


def short_rows_kernel(problem: Problem) -> Callable[..., Any]:
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
        out_type=problem.out_types,
        scratch_types=_StagedRows.scratch(problem) if staged else [],
        grid=(-(-problem.rows // problem.block),),
        grid_names=("block",),
        kernel_name=kernel_name(problem),
        compiler_params=compiler_params(problem),
    )
