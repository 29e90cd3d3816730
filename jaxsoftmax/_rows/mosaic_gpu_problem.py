"""A call as the Mosaic GPU kernels see it: `Problem`, and what it is made from."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxsoftmax._compat import mosaic_gpu as _compat
from jaxsoftmax._compat.mosaic_gpu_vectors import RaggedRows, window
from jaxsoftmax._rows import row_layout, row_loss
from jaxsoftmax._rows.call import function_of
from jaxsoftmax._rows.mosaic_gpu_loss_ops import (
    cross_entropy_op,
    cross_entropy_pullback_op,
)
from jaxsoftmax._rows.mosaic_gpu_ops import OPS, Exponential, Op
from jaxsoftmax._rows.mosaic_gpu_plans import Plan


def arguments(op: str, arrays: Sequence[Any]) -> tuple[list[Any], Any, list[Any]]:
    """The arrays of the logits' shape, `where`, and those with one number per row."""
    if function_of(op) == "softmax_derivative":
        return list(arrays[:2]), None, []
    x, where, *others = arrays
    if op == "cross_entropy":
        # The kernel has no use for an index: see `_Label`.
        return [x, *(a for a in others if row_loss.is_dense(a))], where, []
    if op == "cross_entropy_with_gradient":
        return [x], where, others[1:]
    if op == "cross_entropy_pullback":
        _, row_max, _, *rest = others
        return [x], where, [row_max, *rest]
    if not others:
        return [x], where, []
    *state, t = others
    return [x, t], where, state


def mask_strides(dims: Sequence[row_layout.Dim]) -> tuple[tuple[int, int], ...] | None:
    """Size, and stride in rows of the mask, of each dimension that is not reduced."""
    if not any(d.masked for d in dims):
        return None
    rows = [d for d in dims if not d.reduced]
    strides = row_layout.strides(rows, mask=True)
    return tuple((d.size, s) for d, s in zip(rows, strides, strict=True)) or ((1, 1),)


def tile_layout(plan: Plan) -> Any:
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


# Bytes of logits of a head, while whose mask stays in the cache (docs/tune_masks.md).
_CACHED = 2**22
# Bytes of shared memory of a block, but for what its warps exchange.
_SHARED_MEMORY = 222 * 2**10


@dataclasses.dataclass(frozen=True)
class Problem:
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
      alone: Whether numbers per row that are results too are not written.
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
    alone: bool = False
    into: bool = False

    @property
    def accurate(self) -> bool:
        return bool(self.out_dtype == np.float32)

    @property
    def mask_dtype(self) -> Any:
        """That of the tiles of a mask: see `View.mask`."""
        return jnp.int16 if self.dtypes[0].itemsize == 2 else jnp.uint8

    @property
    def mask_tile(self) -> dict[str, Any]:
        """What `load_mask` is to know of the tiles."""
        return {
            "length": self.length,
            "lanes": self.plan.lanes,
            "shape": self.plan.tile,
            "layout": tile_layout(self.plan),
            "dtype": self.mask_dtype,
        }

    @property
    def view_shape(self) -> tuple[int, ...]:
        """The shape that arrays have in the kernel."""
        if self.plan.ragged:
            return (self.rows * self.length,)
        if self.plan.place == "rows":
            return self.rows, self.length
        return self.rows, self.units, self.plan.width

    @property
    def out_types(self) -> tuple[Any, ...]:
        """Of what the kernel gives."""
        number = jax.ShapeDtypeStruct((self.rows,), np.float32)
        numbers = (number,) * self.spec.row_output_count
        if self.spec.finish is None or self.in_place or self.into:
            return numbers
        return (jax.ShapeDtypeStruct(self.view_shape, self.out_dtype), *numbers)

    def out_row(self, row: jax.Array, place: Any) -> jax.Array:
        """Where the result of a row is written."""
        return place[0] * self.rows + row if self.into else row

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
            tile_layout(plan),
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

    def first_row(self, index: jax.Array, count: int) -> jax.Array:
        """The first of `count` rows that follow each other, of a block or a cluster.

        Heads that share a mask take turns: each with so many rows that the cache still
        has their mask for the next head.
        """
        heads, stride = (1, 0) if self.mask is None else self.mask[0]
        rows = self.rows // heads  # of a head
        if stride or heads == 1 or rows % count:
            return index * count
        most = max(_CACHED // (self.length * self.dtypes[0].itemsize), count)
        turn = max(n for n in range(count, most + 1, count) if rows % n == 0)
        blocks, n = jnp.int32(turn // count), jnp.int32(heads)
        turns, within = lax.div(index, blocks), lax.rem(index, blocks)
        before, head = lax.div(turns, n), lax.rem(turns, n)
        return head * rows + before * turn + within * count

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
    def staged_units(self) -> int:
        """Of them those in shared memory; the last ones are in registers."""
        return self.share - self.height * self.plan.kept

    @property
    def staged_bytes(self) -> int:
        """Bytes of shared memory that the arrays take up."""
        entries = self.plan.warpgroups * self.staged_units * self.unit
        return sum(d.itemsize for d in self.dtypes) * entries

    @property
    def mask_staged(self) -> bool:
        """Whether a mask is in shared memory too, if it is to be and has room there."""
        if self.plan.place != "shared" or self.plan.ragged or self.chunks > 1:
            return False
        mask = self.plan.warpgroups * self.share * self.unit
        return self.mask is not None and self.staged_bytes + mask <= _SHARED_MEMORY

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
        if self.op == "cross_entropy_pullback":
            assert self.options is not None
            return cross_entropy_pullback_op(self.scale, self.accurate, self.options)
        if self.options is not None:
            return cross_entropy_op(
                self.scale,
                self.accurate,
                self.options,
                dense=len(self.dtypes) > 1,
                with_gradient=self.op == "cross_entropy_with_gradient",
            )
        op = OPS[self.op](Exponential(self.scale, self.accurate))
        return op.alone() if self.alone else op

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
