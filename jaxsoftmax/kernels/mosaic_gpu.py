"""Softmax and its derivatives on NVIDIA GPUs, through Pallas Mosaic GPU.

One kernel a call: every array is read once and the result written once, up to the
longest row that `_plans` has a split for; longer ones are read twice.

A row is split over blocks of a cluster, warpgroups of a block and warps of a warpgroup.
Each warp reduces its share to a few numbers, its *state*: for softmax the maximum and
the sum of exponentials relative to it. States merge, as those of an online softmax do,
first in the block and then over the cluster, through (distributed) shared memory; then
each warp computes its share of the result. That is the skeleton, `_Kernel`. An
operation, `_Op`, says what the state of a share is, how states merge and what the
result is.

Where a share is kept in between, and over what a row is split, is a `Plan`:

- ``"rows"``: 2 to 32 lanes of a warp have a row, in registers. Nothing is shared.
- ``"registers"``, ``"shared"``: a cluster has a row; each warp keeps its share in
  registers or, read by bulk copies, in shared memory.
- ``"stream"``: a cluster has a row, in chunks that are read a second time.

In memory a share is made of *tiles*: four warps (or more rows) by 32 lanes by a vector
of 16 bytes. Arrays are viewed as rows of `width` entries, one a warp and tile.

Semantics and numerics are those of `kernels.xla`; what differs is noted at each `_Op`.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxsoftmax import _compat
from jaxsoftmax.kernels import _plans, _rows
from jaxsoftmax.kernels._call import Call, Device
from jaxsoftmax.kernels._plans import Plan

Axes = tuple[int, ...]
Tile = jax.Array  # float32, (rows, width)
PerRow = jax.Array  # float32, (rows,) or a scalar
State = tuple[PerRow, ...]
Reduce = Callable[[Sequence[jax.Array]], jax.Array]

_LOWEST = float(np.finfo(np.float32).min)
_EPS = float(np.finfo(np.float32).eps)


# --- arithmetic on tiles --------------------------------------------------------------


def _sum(tiles: Sequence[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.add, tiles)


def _max(tiles: Sequence[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.maximum, tiles)


def _row_sum(tiles: Sequence[Tile]) -> PerRow:
    return jnp.sum(_sum(tiles), axis=1)


def _row_max(tiles: Sequence[Tile]) -> PerRow:
    return jnp.max(_max(tiles), axis=1)


def _nonzero(x: PerRow) -> PerRow:
    """`x` to divide by: 1 for a row with nothing in it."""
    return jnp.where(x == 0, 1.0, x)


def _log1p(x: PerRow) -> PerRow:
    """``log(1 + x)`` for x >= 0; Mosaic has no log1p.

    Below 1/2 the series of ``2 artanh(s)``, s at most 1/5: its next term is below 1e-9.
    """
    s = x / (2 + x)
    q = s * s
    series = q / 11 + 1 / 9
    for k in (7, 5, 3, 1):
        series = series * q + 1 / k
    return jnp.where(x < 0.5, 2 * s * series, jnp.log(1 + x))


def _round(x: PerRow) -> PerRow:
    """The nearest whole number, below 2^22; Mosaic has no floor."""
    return (x + 1.5 * 2.0**23) - 1.5 * 2.0**23


@dataclasses.dataclass(frozen=True)
class _Exponential:
    """``exp(scale (x - row_max))``, as `kernels.xla` has it.

    Attributes:
      scale: Multiplies the logits.
      accurate: Whether the result is rounded to 16 bits anyway (False).
    """

    scale: float
    accurate: bool

    def of_rows(self, x: PerRow, row_max: PerRow) -> PerRow:
        return self(x, row_max, lambda a: a)

    def __call__(
        self,
        x: jax.Array,
        row_max: PerRow,
        spread: Callable[[PerRow], jax.Array],
    ) -> jax.Array:
        m = spread(row_max)
        if not self.accurate:
            return jnp.exp2((x - m) * (self.scale * float(np.log2(np.e))))
        if self.scale < 1e-20:
            return jnp.exp((x - m) * self.scale)
        below = 128.0 / self.scale + 8 * _EPS * jnp.abs(row_max)
        x = jnp.maximum(x, spread(jnp.maximum(row_max - below, _LOWEST)))
        d = x - m
        minus_m = d - x
        error = (x - (d - minus_m)) - (m + minus_m)
        return jnp.exp(d * self.scale) * (1 + error * self.scale)


# --- what a warp sees of its share ----------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _View:
    """A share of a row, or a chunk of it, as float32 tiles.

    Attributes:
      count: How many tiles there are.
      load: ``(array, tile) -> raw tile``.
      shown: ``tile -> bool tile`` of `where`, or None.
      counted: ``tile -> bool tile``, or None: False where another warp has the entry
        too. It has no part in the state, but in the result.
      spread: From a number a row to a tile.
      row_input: The number a row that is an input, or None.
      exp: The exponential of this problem.
      kept: Whether the tiles stay in registers from the state to the result.
    """

    count: int
    load: Callable[[int, int], jax.Array]
    shown: Callable[[int], jax.Array] | None
    counted: Callable[[int], jax.Array] | None
    spread: Callable[[PerRow], Tile]
    row_input: PerRow | None
    exp: _Exponential
    kept: bool

    def plain(self, array: int) -> list[Tile]:
        """The tiles as they are."""
        return [self.load(array, t).astype(jnp.float32) for t in range(self.count)]

    def in_row(self, array: int, *, fill: float, all_: bool) -> list[Tile]:
        """The tiles with `fill` where masked and, unless `all_`, not counted."""
        tiles = self.plain(array)
        for choice in (self.shown, None if all_ else self.counted):
            if choice is not None:
                tiles = [jnp.where(choice(t), x, fill) for t, x in enumerate(tiles)]
        return tiles

    def logits(self, *, all_: bool = False) -> list[Tile]:
        return self.in_row(0, fill=-jnp.inf, all_=all_)

    def hide(self, tiles: list[Tile], fill: float) -> list[Tile]:
        """What is written: `fill` where masked, also in a row of NaN."""
        if self.shown is None:
            return tiles
        return [jnp.where(self.shown(t), x, fill) for t, x in enumerate(tiles)]

    def exponentials(self, x: list[Tile], row_max: PerRow) -> list[Tile]:
        e = [self.exp(tile, row_max, self.spread) for tile in x]
        if self.shown is None and self.counted is None:
            return e
        # Where the maximum is the lowest float, `exp` takes -inf for that float.
        return [jnp.where(a == -jnp.inf, 0.0, b) for a, b in zip(x, e, strict=True)]


# --- the operations -------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Op:
    """An operation on rows.

    Attributes:
      neutral: The state of no entries.
      local: ``view -> state``, a number a row each.
      merge: ``(states, top, total) -> state``: `top` takes the maximum and `total` the
        sum of a list of arrays, and of what is in each where that is to be merged too.
      finish: ``(view, local state, merged state) -> tiles to write``.
      row_output: ``merged state -> a number a row`` that is a second result, or None.
    """

    neutral: tuple[float, ...]
    local: Callable[[_View], State]
    merge: Callable[[Sequence[State], Reduce, Reduce], State]
    finish: Callable[[_View, State, State], list[Tile]]
    row_output: Callable[[State], PerRow] | None = None


def _softmax_op(exp: _Exponential, exact_center: bool) -> _Op:
    """State: the maximum m and ``sum(exp(x - m))``."""

    def local(view: _View) -> State:
        x = view.logits()
        true_max = _row_max(x)
        m = jnp.maximum(true_max, _LOWEST)
        if view.kept:
            return true_max, _row_sum(view.exponentials(x, m))
        # `finish` computes them again. In the sum the fast form's error of |d| eps in
        # exp(d) does not count: what it is large for is small.
        fast = dataclasses.replace(view.exp, accurate=False)
        return true_max, _row_sum([fast(tile, m, view.spread) for tile in x])

    def merge(states: Sequence[State], top: Reduce, total: Reduce) -> State:
        m = top([m for m, _ in states])
        return m, total([z * factor(mine, m) for mine, z in states])

    def factor(mine: PerRow, m: PerRow) -> PerRow:
        """``exp(mine - m)``, of maxima that may be -inf."""
        mine, m = jnp.maximum(mine, _LOWEST), jnp.maximum(m, _LOWEST)
        return exp.of_rows(mine, m)

    def finish(view: _View, mine: State, merged: State) -> list[Tile]:
        m, z = merged
        # The exponentials of an empty row mean nothing.
        inverse = jnp.where(m == -jnp.inf, 0.0, 1 / z)
        share = view.spread(factor(mine[0], m) * inverse)
        # What `local` computed is taken again where it is still in registers.
        own_max = jnp.maximum(mine[0], _LOWEST)
        e = view.exponentials(view.logits(all_=True), own_max)
        return view.hide([tile * share for tile in e], 0.0)

    return _Op((-np.inf, 0.0), local, merge, finish)


def _log_softmax_op(exp: _Exponential, exact_center: bool) -> _Op:
    """State: the maximum m, how often it occurs, and the others' ``sum(exp(x - m))``.

    A row's maximum itself contributes 1, which log1p adds.
    """

    def local(view: _View) -> State:
        x = view.logits()
        true_max = _row_max(x)
        m = jnp.maximum(true_max, _LOWEST)
        # The clamped one: nothing of an empty row is at its maximum.
        at_max = [tile == view.spread(m) for tile in x]
        e = view.exponentials(x, m)
        # Of the maximum, 0 is left; NaN if it is infinite.
        rest = [jnp.where(a, b - 1, b) for a, b in zip(at_max, e, strict=True)]
        ties = [jnp.where(a, 1.0, 0.0) for a in at_max]
        return true_max, _row_sum(ties), _row_sum(rest)

    def merge(states: Sequence[State], top: Reduce, total: Reduce) -> State:
        true_max = top([s[0] for s in states])
        m = jnp.maximum(true_max, _LOWEST)
        ties, rest = [], []
        for mine, t, r in states:
            below = exp.of_rows(jnp.maximum(mine, _LOWEST), m)
            same = mine == true_max
            ties.append(jnp.where(same, t, 0.0))
            rest.append(jnp.where(same, r, (t + r) * below))
        return true_max, total(ties), total(rest)

    def finish(view: _View, mine: State, merged: State) -> list[Tile]:
        true_max, ties, rest = merged
        # 0 for an empty row, which has no ties: its entries are -inf already.
        log_sum = _log1p(rest + jnp.maximum(ties - 1, 0.0))
        m = view.spread(jnp.maximum(true_max, _LOWEST))
        log_sum = view.spread(log_sum)
        y = [(x - m) * exp.scale - log_sum for x in view.logits(all_=True)]
        return view.hide(y, -jnp.inf)

    return _Op((-np.inf, 0.0, 0.0), local, merge, finish, lambda state: state[0])


def _center(
    weights: list[Tile], t: list[Tile], total: PerRow, view: _View, exact: bool
) -> PerRow:
    """A number near the mean of `t` under `weights`, to compute it relative to.

    Exact: the value of `t` at the largest weight. If that dominates the row, the mean
    differs from it by what the other entries contribute, and that keeps its digits. A
    mean that was rounded does where the weights were rounded to 16 bits.
    """
    if exact:
        largest = view.spread(_row_max(weights))
        at = [
            jnp.where(w == largest, x, -jnp.inf)
            for w, x in zip(weights, t, strict=True)
        ]
        return _row_max(at)
    products = [w * x for w, x in zip(weights, t, strict=True)]
    return _row_sum(products) / _nonzero(total)


def _mean_state(weights: list[Tile], t: list[Tile], view: _View, exact: bool) -> State:
    """``s = sum(w)``, a center c, and ``sum(w (t - c))``: the mean is c + u / s."""
    s = _row_sum(weights)
    center = _center(weights, t, s, view, exact)
    c = view.spread(center)
    u = _row_sum([w * (x - c) for w, x in zip(weights, t, strict=True)])
    return s, center, u


def _merge_means(states: Sequence[State], top: Reduce, total: Reduce) -> State:
    """The center of the heaviest share is everyone's."""
    heaviest = top([s for s, _, _ in states])
    center = top([jnp.where(s == heaviest, c, -jnp.inf) for s, c, _ in states])
    u = total([u + s * (c - center) for s, c, u in states])
    return total([s for s, _, _ in states]), center, u


def _deviations(view: _View, t: list[Tile], merged: State) -> list[Tile]:
    """`t` less its mean."""
    s, center, u = merged
    c, rest = view.spread(center), view.spread(u / _nonzero(s))
    return [(x - c) - rest for x in t]


def _softmax_derivative_op(exp: _Exponential, exact_center: bool) -> _Op:
    """``scale P (t - mean of t under P)``; 0 where P is 0, whatever t is there."""

    def inputs(view: _View, all_: bool) -> tuple[list[Tile], list[Tile]]:
        p = view.in_row(0, fill=0.0, all_=all_)
        t = view.plain(1)
        return p, [jnp.where(w == 0, 0.0, x) for w, x in zip(p, t, strict=True)]

    def local(view: _View) -> State:
        return _mean_state(*inputs(view, False), view, exact_center)

    def finish(view: _View, mine: State, merged: State) -> list[Tile]:
        p, t = inputs(view, True)
        d = _deviations(view, t, merged)
        if exp.scale != 1.0:
            d = [x * exp.scale for x in d]
        # The select is for the entries of a NaN row that are masked.
        return [jnp.where(w == 0, 0.0, w * x) for w, x in zip(p, d, strict=True)]

    return _Op((0.0, 0.0, 0.0), local, _merge_means, finish)


def _log_softmax_pushforward_op(exp: _Exponential, exact_center: bool) -> _Op:
    """``scale (t - mean of t under P)``; 0 where masked or -inf."""

    def inputs(view: _View, all_: bool) -> tuple[list[Tile], list[Tile], list[Tile]]:
        x = view.logits(all_=all_)
        assert view.row_input is not None
        e = view.exponentials(x, jnp.maximum(view.row_input, _LOWEST))
        t = [
            jnp.where(a == -jnp.inf, 0.0, b)
            for a, b in zip(x, view.plain(1), strict=True)
        ]
        return x, e, t

    def local(view: _View) -> State:
        _, e, t = inputs(view, False)
        return _mean_state(e, t, view, exact_center)

    def finish(view: _View, mine: State, merged: State) -> list[Tile]:
        x, _, t = inputs(view, True)
        d = _deviations(view, t, merged)
        return [
            jnp.where(a == -jnp.inf, 0.0, b * exp.scale)
            for a, b in zip(x, d, strict=True)
        ]

    return _Op((0.0, 0.0, 0.0), local, _merge_means, finish)


def _log_softmax_pullback_op(exp: _Exponential, exact_center: bool) -> _Op:
    """``scale (g - P sum(g))``; 0 where masked or -inf.

    State: ``sum(exp(x - m))``, the same without the maximum's, and the sums of g with
    and without the maximum's. Kept apart, they give 1 - P of a dominant entry without
    the cancellation: ``g - P sum(g) = (g rest - sum of the others' g) / z``.
    """

    def inputs(view: _View, all_: bool) -> tuple[list[Tile], ...]:
        x = view.logits(all_=all_)
        assert view.row_input is not None
        row_max = jnp.maximum(view.row_input, _LOWEST)
        e = view.exponentials(x, row_max)
        g = [
            jnp.where(a == -jnp.inf, 0.0, b)
            for a, b in zip(x, view.plain(1), strict=True)
        ]
        m = view.spread(row_max)
        return x, e, g, [a == m for a in x]

    def local(view: _View) -> State:
        _, e, g, at_max = inputs(view, False)

        def others(tiles: list[Tile]) -> PerRow:
            return _row_sum(
                [jnp.where(a, 0.0, b) for a, b in zip(at_max, tiles, strict=True)]
            )

        return _row_sum(e), others(e), _row_sum(g), others(g)

    def merge(states: Sequence[State], top: Reduce, total: Reduce) -> State:
        return tuple(total(list(each)) for each in zip(*states, strict=True))

    def finish(view: _View, mine: State, merged: State) -> list[Tile]:
        x, e, g, at_max = inputs(view, True)
        z, rest, g_all, g_rest = merged
        # A whole number: 0 if x was computed anew since its maximum was.
        ties = _round(z - rest)
        z = _nonzero(ties + rest)
        # What tied entries have in common with each other but not with the others.
        several = jnp.where(ties > 1.5, 1.0, 0.0)
        mean_at_max = view.spread((g_all - g_rest) / _nonzero(ties))
        inverse = exp.scale / z
        ratio = view.spread(g_all * inverse)
        a, b = view.spread(rest * inverse), view.spread(g_rest * inverse)
        n = view.spread(several * ties * inverse)
        out = []
        for xx, ee, gg, top in zip(x, e, g, at_max, strict=True):
            largest = (gg * a - b) + (gg - mean_at_max) * n
            dx = jnp.where(top, largest, gg * exp.scale - ee * ratio)
            out.append(jnp.where(xx == -jnp.inf, 0.0, dx))
        return out

    return _Op((0.0,) * 4, local, merge, finish)


_OPS: dict[str, Callable[[_Exponential, bool], _Op]] = {
    "softmax": _softmax_op,
    "softmax_derivative": _softmax_derivative_op,
    "log_softmax": _log_softmax_op,
    "log_softmax_pushforward": _log_softmax_pushforward_op,
    "log_softmax_pullback": _log_softmax_pullback_op,
}


# --- the skeleton ---------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Problem:
    """A call as its kernel sees it.

    Attributes:
      op: The operation's name.
      rows, length: The arrays' shape.
      dtypes: Of the arrays that have an entry per entry of a row, in order.
      out_dtype: The result's.
      has_row_input: Whether there is a float32 input of a number a row.
      mask: Of `where`: the merged dimensions of the rows as (size, stride in rows of
        the mask), outermost first; or None.
      scale: Multiplies the logits.
      plan: How the work is split.
    """

    op: str
    rows: int
    length: int
    dtypes: tuple[np.dtype, ...]
    out_dtype: np.dtype
    has_row_input: bool
    mask: tuple[tuple[int, int], ...] | None
    scale: float
    plan: Plan

    @property
    def accurate(self) -> bool:
        return bool(self.out_dtype == np.float32)

    @property
    def spec(self) -> _Op:
        exp = _Exponential(self.scale, self.accurate)
        # Weights that are rounded to 16 bits need no exact center.
        exact = self.dtypes[0] == np.float32 or self.op != "softmax_derivative"
        return _OPS[self.op](exp, bool(exact and self.accurate))

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
    if problem.plan.place == "rows":
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
        # Else there is a barrier before and after every store. Each warp stores what it
        # has loaded itself; what warps exchange is followed by `_Exchange.sync`.
        unsafe_no_auto_barriers=True,
    )


def _short_rows_kernel(problem: _Problem) -> Callable[..., Any]:
    """A block of one warpgroup has ``4 * 32 / lanes`` rows; nothing is shared.

    The last block starts early if the rows do not divide: it computes some rows again.
    """
    plgpu, pl = _compat.mosaic_gpu(), _compat.pallas()
    plan, op = problem.plan, problem.spec
    block = 4 * 32 // plan.lanes
    layout = _tile_layout(plan)
    arrays = len(problem.dtypes)

    def body(*refs: Any) -> None:
        inputs, refs = refs[:arrays], refs[arrays:]
        mask, refs = _take(refs, problem.mask is not None)
        row_in, refs = _take(refs, problem.has_row_input)
        out, row_out = refs[0], refs[-1]
        first = jnp.minimum(
            lax.axis_index("block") * block, jnp.int32(problem.rows - block)
        )
        rows = pl.ds(first, block)

        def at(tile: int) -> Any:
            return pl.ds(tile * plan.width, plan.width)

        def load(array: int, tile: int) -> jax.Array:
            return _compat.mosaic_load(inputs[array].at[rows, at(tile)], layout)

        def shown(tile: int) -> jax.Array:
            row = problem.mask_row(first)
            assert problem.mask is not None
            if problem.mask[-1][1]:  # the rows of the mask follow each other too
                m = _compat.mosaic_load(mask.at[pl.ds(row, block), at(tile)], layout)
            else:
                m = _compat.mosaic_load(mask.at[row, at(tile)], layout.reduce(0))
                m = lax.broadcast_in_dim(m, (block, plan.width), (1,))
            return m != 0

        def spread(x: PerRow) -> Tile:
            tile = lax.broadcast_in_dim(x, (block, plan.width), (0,))
            return plgpu.layout_cast(tile, layout)

        row_input = None
        if row_in is not None:
            row_input = _compat.mosaic_load(row_in.at[rows], layout.reduce(1))
        view = _View(
            count=problem.length // plan.width,
            load=load,
            shown=shown if mask is not None else None,
            counted=None,
            spread=spread,
            row_input=row_input,
            exp=_Exponential(problem.scale, problem.accurate),
            kept=True,
        )
        state = op.local(view)
        for tile, value in enumerate(op.finish(view, state, state)):
            value = value.astype(problem.out_dtype)
            out[rows, at(tile)] = plgpu.layout_cast(value, layout)
        if op.row_output is not None:
            _compat.mosaic_store(row_out.at[rows], op.row_output(state))

    return _compat.mosaic_kernel(
        body,
        out_type=_out_types(problem, (problem.rows, problem.length)),
        grid=(-(-problem.rows // block),),
        grid_names=("block",),
        kernel_name=_kernel_name(problem),
        compiler_params=_compiler_params(problem),
    )


def _take(refs: Any, present: bool) -> tuple[Any, Any]:
    return (refs[0], refs[1:]) if present else (None, refs)


def _kernel_name(problem: _Problem) -> str:
    return f"jaxsoftmax_{problem.op}"


def _out_types(problem: _Problem, shape: tuple[int, ...]) -> Any:
    out = jax.ShapeDtypeStruct(shape, problem.out_dtype)
    if problem.spec.row_output is None:
        return (out,)
    return (out, jax.ShapeDtypeStruct((problem.rows,), np.float32))


class _Exchange:
    """Merges the states of a row's warps.

    First in the block: each warp writes its numbers to shared memory and reads all of
    the block's. Then over the cluster: each block writes what came out, and every block
    reads that of every other. Each number has a reference of its own, used once.

    The cluster's barrier is Mosaic's, whose arrival orders memory for the block, by the
    letter of PTX. What it orders here is shared memory, which has one place that all
    read. NVIDIA's racecheck does not follow it from block to block, and reports the
    reads. With the hardware's cluster barrier, which fences memory for the whole GPU,
    softmax's backward took 24 to 32 % longer (H200, rows of 16384 to 65536, bfloat16).
    """

    def __init__(self, op: _Op, plan: Plan, refs: Sequence[Any], layout: Any) -> None:
        count = len(op.neutral)
        self.op, self.plan, self.layout = op, plan, layout
        self.in_block, refs = refs[:count], refs[count:]
        self.in_cluster, refs = _take_many(refs, count if plan.blocks > 1 else 0)
        self.block_barrier, refs = _take(refs, plan.warpgroups > 1)
        self.cluster_barrier, refs = _take(refs, plan.blocks > 1)
        self.row_output, refs = _take(refs, _needs_row_output_ref(op, plan))

    @staticmethod
    def scratch(op: _Op, plan: Plan) -> list[Any]:
        plgpu = _compat.mosaic_gpu()
        f32 = jnp.float32
        refs = [plgpu.SMEM((4 * plan.warpgroups,), f32) for _ in op.neutral]
        if plan.blocks > 1:
            refs += [plgpu.SMEM((4,), f32) for _ in op.neutral]
        if plan.warpgroups > 1:
            refs.append(plgpu.Barrier(num_arrivals=plan.warpgroups))
        if plan.blocks > 1:
            refs.append(
                plgpu.ClusterBarrier(
                    collective_axes=("piece",), num_arrivals=plan.warpgroups
                )
            )
        if _needs_row_output_ref(op, plan):
            refs.append(plgpu.SMEM((4,), f32))
        return refs

    def _sync(self, barrier: Any) -> None:
        """All warps of the warpgroup, then all that share `barrier`."""
        plgpu = _compat.mosaic_gpu()
        plgpu.commit_smem()
        if barrier is not None:
            plgpu.barrier_arrive(barrier)
            plgpu.barrier_wait(barrier)

    def merge(self, state: State, warpgroup: Any) -> State:
        """The state of the row: scalars or, over a cluster, a number a warp."""
        pl = _compat.pallas()
        for ref, number in zip(self.in_block, state, strict=True):
            ref[pl.ds(warpgroup * 4, 4)] = number
        self._sync(self.block_barrier)
        every = _every_thread_layout()
        of_block = tuple(_compat.mosaic_load(ref, every) for ref in self.in_block)
        merged = self.op.merge(
            [of_block], lambda xs: jnp.max(_max(xs)), lambda xs: jnp.sum(_sum(xs))
        )
        if self.plan.blocks == 1:
            return merged
        return self._merge_over_cluster(merged, warpgroup)

    def _merge_over_cluster(self, state: State, warpgroup: Any) -> State:
        plgpu, pl = _compat.mosaic_gpu(), _compat.pallas()
        a_warp = self.layout.reduce(1)

        def write() -> None:
            for ref, number in zip(self.in_cluster, state, strict=True):
                ref[...] = plgpu.layout_cast(lax.broadcast(number, (4,)), a_warp)

        pl.when(warpgroup == 0)(write)
        self._sync(self.cluster_barrier)
        states = [
            tuple(
                _compat.mosaic_load(
                    plgpu.cluster_ref(ref, {"piece": jnp.int32(j)}), a_warp
                )
                for ref in self.in_cluster
            )
            for j in range(self.plan.blocks)
        ]
        return self.op.merge(states, _max, _sum)

    def leave(self) -> None:
        """Keeps the block until no other reads its shared memory."""
        if self.plan.blocks > 1:
            self._sync(self.cluster_barrier)

    def write_row_output(self, out: Any, row: Any, number: PerRow, piece: Any) -> None:
        """Once a row, by the first warpgroup of its first block."""
        plgpu, pl = _compat.mosaic_gpu(), _compat.pallas()

        def write() -> None:
            if self.row_output is None:
                out[row] = number
                return
            self.row_output[...] = number
            plgpu.commit_smem()
            out[row] = self.row_output[0]

        pl.when(piece == 0)(write)


def _needs_row_output_ref(op: _Op, plan: Plan) -> bool:
    return op.row_output is not None and plan.blocks > 1


def _take_many(refs: Sequence[Any], count: int) -> tuple[Any, Any]:
    return refs[:count], refs[count:]


def _every_thread_layout() -> Any:
    """Four numbers at a time, all in every thread."""
    plgpu = _compat.mosaic_gpu()
    return plgpu.Layout.TILED(
        plgpu.Tiling(((4,),)),
        warp_dims=(plgpu.Replicated(4),),
        lane_dims=(plgpu.Replicated(32),),
        vector_dim=-1,
    )


def _long_rows_kernel(problem: _Problem) -> Callable[..., Any]:
    """A cluster of `blocks` blocks of `warpgroups` warpgroups has a row.

    Each warpgroup has `tiles` tiles of it (or, streaming, that many at a time). Where
    the row does not divide, shares overlap: what two warpgroups have counts for one.
    """
    plgpu, pl = _compat.mosaic_gpu(), _compat.pallas()
    plan, op = problem.plan, problem.spec
    layout = _tile_layout(plan)
    arrays = len(problem.dtypes)
    units = problem.length // plan.width  # of one warp and tile
    parts, share = plan.blocks * plan.warpgroups, 4 * plan.tiles
    chunks = -(-units // (parts * share))
    overlapping = chunks * parts * share != units
    shared = plan.place == "shared"
    assert shared is False or chunks == 1
    assert units >= share, (problem, units, share)

    def body(*refs: Any) -> None:
        inputs, refs = refs[:arrays], refs[arrays:]
        mask, refs = _take(refs, problem.mask is not None)
        row_in, refs = _take(refs, problem.has_row_input)
        out, refs = refs[0], refs[1:]
        row_out, refs = _take(refs, op.row_output is not None)
        buffers, refs = _take_many(refs, arrays if shared else 0)
        arrived, refs = _take_many(refs, arrays if shared else 0)
        exchange = _Exchange(op, plan, refs, layout)

        row = lax.axis_index("row")
        block = lax.axis_index("piece") if plan.blocks > 1 else jnp.int32(0)
        warpgroup = lax.axis_index("part") if plan.warpgroups > 1 else jnp.int32(0)
        part = block * plan.warpgroups + warpgroup

        def view_of(chunk: Any) -> tuple[_View, Callable[[int], Any]]:
            own = (chunk * parts + part) * share
            start = jnp.minimum(own, jnp.int32(units - share)) if overlapping else own

            def at(tile: int) -> Any:
                return pl.ds(start + 4 * tile, 4)

            if shared:
                for ref, buffer, barrier in zip(inputs, buffers, arrived, strict=True):
                    plgpu.copy_gmem_to_smem(
                        ref.at[row, pl.ds(start, share)],
                        buffer.at[warpgroup],
                        barrier.at[warpgroup],
                    )
                for barrier in arrived:
                    plgpu.barrier_wait(barrier.at[warpgroup])

            def load(array: int, tile: int) -> jax.Array:
                if shared:
                    ref = buffers[array].at[warpgroup, pl.ds(4 * tile, 4)]
                else:
                    ref = inputs[array].at[row, at(tile)]
                return _compat.mosaic_load(ref, layout)

            def counted(tile: int) -> jax.Array:
                unit = plgpu.broadcasted_iota(
                    jnp.int32, (4, plan.width), 0, layout=layout
                )
                return unit + (start + 4 * tile) >= own

            mask_row = problem.mask_row(row) if mask is not None else None

            def shown(tile: int) -> jax.Array:
                return _compat.mosaic_load(mask.at[mask_row, at(tile)], layout) != 0

            view = _View(
                count=plan.tiles,
                load=load if shared else functools.cache(load),
                shown=functools.cache(shown) if mask is not None else None,
                counted=counted if overlapping else None,
                spread=spread,
                row_input=row_in[row] if row_in is not None else None,
                exp=_Exponential(problem.scale, problem.accurate),
                kept=plan.place == "registers" and not overlapping,
            )
            return view, at

        def spread(x: PerRow) -> Tile:
            dimensions = (0,) if x.ndim else ()
            return lax.broadcast_in_dim(x, (4, plan.width), dimensions)

        def write(view: _View, at: Any, mine: State, merged: State) -> None:
            for tile, value in enumerate(op.finish(view, mine, merged)):
                value = value.astype(problem.out_dtype)
                out[row, at(tile)] = plgpu.layout_cast(value, layout)

        if chunks == 1:
            view, at = view_of(jnp.int32(0))
            mine = op.local(view)
            merged = exchange.merge(mine, warpgroup)
            write(view, at, mine, merged)
        else:
            a_warp = layout.reduce(1)

            def accumulate(chunk: Any, state: State) -> State:
                both = [state, op.local(view_of(chunk)[0])]
                return op.merge(both, _max, _sum)

            neutral = tuple(
                plgpu.layout_cast(jnp.full((4,), x, jnp.float32), a_warp)
                for x in op.neutral
            )
            mine = lax.fori_loop(0, chunks, accumulate, neutral)
            merged = exchange.merge(mine, warpgroup)

            def write_chunk(chunk: Any, carry: Any) -> Any:
                # From the end: what was read last may still be in the cache.
                view, at = view_of(chunks - 1 - chunk)
                # Relative to the whole row, so that the chunk's state is not needed.
                write(view, at, merged, merged)
                return carry

            lax.fori_loop(0, chunks, write_chunk, 0)
        if op.row_output is not None:
            exchange.write_row_output(
                out=row_out, row=row, number=op.row_output(merged), piece=part
            )
        exchange.leave()

    scratch: list[Any] = []
    if shared:
        shape = (plan.warpgroups, share, plan.width)
        scratch += [plgpu.SMEM(shape, dtype) for dtype in problem.dtypes]
        scratch += [
            plgpu.Barrier(num_arrivals=1, num_barriers=plan.warpgroups)
            for _ in problem.dtypes
        ]
    scratch += _Exchange.scratch(op, plan)
    mesh: dict[str, Any] = {}
    if plan.blocks > 1:
        mesh.update(cluster=(plan.blocks,), cluster_names=("piece",))
    if plan.warpgroups > 1:
        mesh.update(num_threads=plan.warpgroups, thread_name="part")
    return _compat.mosaic_kernel(
        body,
        out_type=_out_types(problem, (problem.rows, units, plan.width)),
        scratch_types=scratch,
        grid=(problem.rows,),
        grid_names=("row",),
        kernel_name=_kernel_name(problem),
        compiler_params=_compiler_params(problem),
        **mesh,
    )


# --- calls ----------------------------------------------------------------------------


def _mask_strides(dims: Sequence[_rows.Dim]) -> tuple[tuple[int, int], ...] | None:
    """Of the dimensions of the rows: size, and stride in rows of the mask."""
    if not any(d.masked for d in dims):
        return None
    kept = [d for d in dims if not d.reduced]
    strides = _rows.strides(kept, of_mask=True)
    return tuple((d.size, s) for d, s in zip(kept, strides, strict=True)) or ((1, 1),)


def _problem(call: Call, plan: Plan | None = None) -> _Problem | str:
    """The call as its kernel sees it, or why there is no kernel for it."""
    x = call.arrays[0]
    takes_where = call.op != "softmax_derivative"
    where = call.arrays[1] if takes_where else None
    if call.op == "softmax_derivative":
        values = list(call.arrays)
    else:
        values = [x, *call.arrays[3:]]
    if any(0 in v.shape for v in values):
        return "an empty array"
    dtypes = tuple(np.dtype(v.dtype) for v in values)
    for dtype in (*dtypes, np.dtype(call.dtype)):
        if dtype.name not in ("bfloat16", "float16", "float32"):
            return f"{dtype.name} has no kernel"
    dims = _rows.merge_dims(
        x.shape, call.axis, where.shape if where is not None else None
    )
    rows, length = _rows.count(dims, reduced=False), _rows.count(dims, reduced=True)
    reduced = [d for d in dims if d.reduced]
    if any(d.reduced and not e.reduced for d, e in itertools.pairwise(dims)):
        return "what is reduced is not last in memory"
    masked = any(d.masked for d in dims)
    if masked and not (len(reduced) == 1 and reduced[0].masked):
        return "where varies along part of a row, or along no part of it"
    mask = _mask_strides(dims)
    itemsize = max(d.itemsize for d in (*dtypes, np.dtype(call.dtype)))
    if plan is None:
        found = _plans.plan(
            op=call.op,
            rows=rows,
            length=length,
            itemsize=itemsize,
            mask=mask,
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
        "log_softmax_pu" in call.op,
        mask,
        call.scale,
        plan,
    )


def refusal(call: Call, device: Device) -> str | None:
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


def run(
    call: Call, arrays: Sequence[jax.Array | None], plan: Plan | None = None
) -> Any:
    """Runs the kernel for a call on its arrays.

    Args:
      call: A call that `refusal` does not refuse.
      arrays: The arrays it describes.
      plan: Instead of the one in the table.
    """
    problem = _problem(call, plan)
    if isinstance(problem, str):
        raise NotImplementedError(f"mosaic_gpu: {problem}")
    x, *others = arrays
    assert x is not None
    where = row_max = None
    if call.op != "softmax_derivative":
        where, *others = others
    if problem.has_row_input:
        row_max, *others = others
    plan = problem.plan
    view: tuple[int, ...] = (problem.rows, problem.length)
    if plan.place != "rows":
        view = (problem.rows, problem.length // plan.width, plan.width)
    operands = [v.reshape(view) for v in (x, *others) if v is not None]
    if where is not None and problem.mask is not None:
        # As bytes: Mosaic takes bools for single bits.
        operands.append(where.reshape(-1, *view[1:]).astype(jnp.uint8))
    if row_max is not None:
        operands.append(row_max.reshape(problem.rows))
    outs = _kernel(problem)(*operands)
    kept = [1 if i - x.ndim in call.axis else n for i, n in enumerate(x.shape)]
    results = [out.reshape(s) for out, s in zip(outs, (x.shape, kept), strict=False)]
    if where is not None and problem.mask is None:
        # One value for the whole array.
        hidden = -np.inf if call.op == "log_softmax" else 0.0
        results = [jnp.where(where, out, hidden) for out in results]
    return results[0] if len(results) == 1 else tuple(results)


def _function(op: str) -> Callable[..., Any]:
    def function(
        *arrays: jax.Array | None, axis: Axes, scale: float, dtype: np.dtype
    ) -> Any:
        structs = tuple(
            None if a is None else jax.ShapeDtypeStruct(a.shape, a.dtype)
            for a in arrays
        )
        return run(Call(op, structs, axis, scale, np.dtype(dtype)), arrays)

    function.__name__ = function.__qualname__ = op
    function.__doc__ = f"As `kernels.xla.{op}`."
    return function


softmax = _function("softmax")
softmax_derivative = _function("softmax_derivative")
log_softmax = _function("log_softmax")
log_softmax_pushforward = _function("log_softmax_pushforward")
log_softmax_pullback = _function("log_softmax_pullback")
