"""What the Mosaic GPU kernels compute: the operations, on tiles of a row.

An operation, `Op`, says what the state of a share of a row is, how states merge, and
what the result is; it sees the share as a `View`. Where shares lie and how states get
from warp to warp is `mosaic_gpu`'s. Semantics and numerics are those of `_rows.xla`;
what differs is noted at each operation.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Tile = jax.Array  # float32, (rows, width)
PerRow = jax.Array  # float32, (rows,) or a scalar
State = tuple[PerRow, ...]


@dataclasses.dataclass(frozen=True)
class Edge:
    """The index of a tile that may begin before what its warps own."""

    index: jax.Array


TileIndex = int | jax.Array | Edge
TilesOf = Callable[[TileIndex], Sequence[jax.Array]]
Reduce = Callable[[Sequence[jax.Array]], jax.Array]

LOG2E = float(np.log2(np.e))
LOWEST = float(np.finfo(np.float32).min)
LARGEST = float(np.finfo(np.float32).max)


# --- arithmetic on tiles --------------------------------------------------------------


def sum_tiles(tiles: Sequence[jax.Array]) -> jax.Array:
    """Entry by entry."""
    return functools.reduce(jnp.add, tiles)


def max_tiles(tiles: Sequence[jax.Array]) -> jax.Array:
    """Entry by entry."""
    return functools.reduce(jnp.maximum, tiles)


def nonzero(x: PerRow) -> PerRow:
    """`x` to divide by: 1 for a row with nothing in it."""
    return jnp.where(x == 0, 1.0, x)


def log1p(x: PerRow) -> PerRow:
    """``log(1 + x)`` for x >= 0; not in Mosaic (`test_not_in_mosaic`).

    Below 1/2 the series of ``2 artanh(s)``, s at most 1/5: its next term is below 1e-9.
    """
    s = x / (2 + x)
    q = s * s
    series = q / 11 + 1 / 9
    for k in (7, 5, 3, 1):
        series = series * q + 1 / k
    return jnp.where(x < 0.5, 2 * s * series, jnp.log(1 + x))


def _rough_log1p(x: PerRow) -> PerRow:
    """`log1p` to 5e-6 of it, without a division: for results of 16 bits.

    Below 1/16 the series, whose next term is below 4e-6 of it; from there on 1 + x has
    enough digits of x, and so has the approximate logarithm.
    """
    series = x * (1 - x * (1 / 2 - x * (1 / 3 - x * (1 / 4))))
    return jnp.where(x < 1 / 16, series, jnp.log(1 + x))


def nearest(x: PerRow) -> PerRow:
    """The nearest whole number, below 2^22."""
    return (x + 1.5 * 2.0**23) - 1.5 * 2.0**23


def _choose_bits(mask: jax.Array, x: jax.Array, fill: float) -> jax.Array:
    """`x` where all bits of the mask are 1, `fill` where all are 0; each has 16.

    One instruction for two entries, where comparisons and selects are several for one.
    """
    constant = np.asarray(fill, x.dtype).view(np.int16)
    other = jnp.full(x.shape, constant, jnp.int16)
    bits = ((_bits(x, jnp.int16) ^ other) & mask) ^ other
    return _bits(bits, x.dtype)


@dataclasses.dataclass(frozen=True)
class Exponential:
    """``exp(scale (x - row_max))``, as `_rows.xla` has it.

    Attributes:
      scale: Multiplies the logits.
      accurate: False where the result is rounded to 16 bits anyway.
    """

    scale: float
    accurate: bool

    def per_row(self, x: PerRow, row_max: PerRow) -> PerRow:
        return self(x, row_max, lambda a: a)

    def __call__(
        self,
        x: jax.Array,
        row_max: PerRow,
        broadcast: Callable[[PerRow], jax.Array],
    ) -> jax.Array:
        return self.of(x - broadcast(row_max))

    def of(self, distance: jax.Array) -> jax.Array:
        """``exp(scale distance)``."""
        if not self.accurate:
            return jnp.exp2(distance * (self.scale * LOG2E))
        return jnp.exp(distance * self.scale)


# --- what a warp sees of its share ----------------------------------------------------


@dataclasses.dataclass(frozen=True)
class View:
    """A share of a row, or a chunk of it, as float32 tiles.

    Attributes:
      load: ``(array, tile) -> raw tile``.
      widen: From a raw tile to float32.
      widen_again: The same, of a tile that was widened before and is kept as it is.
      fold: ``(tile -> tiles, combine) -> tiles``: combines, entry by entry, what the
        function has for each tile of the share.
      mask: ``tile -> tile`` of `where`, or None: 0 where it is False, and if that tile
        has 16 bits, all of them 1 where it is True.
      owned: ``tile -> bool tile``, or None where all are. An entry that two warps have
        is owned by one, whose state it counts in; both write its result.
      broadcast: From one number per row to a tile.
      row_inputs: The inputs with one number per row.
      per_row: From a number for the row, which may be a scalar, to one per row of the
        tile.
      entries: Entries of the share that one of its numbers is for.
      in_registers: Whether the tiles stay in registers from the state to the result.
      layout: How a tile lies in registers.
    """

    load: Callable[[int, TileIndex], jax.Array]
    widen: Callable[[jax.Array], Tile]
    widen_again: Callable[[jax.Array], Tile]
    fold: Callable[[TilesOf, Callable[..., jax.Array]], Sequence[jax.Array]]
    mask: Callable[[TileIndex], jax.Array] | None
    owned: Callable[[TileIndex], jax.Array | None]
    broadcast: Callable[[PerRow], Tile]
    row_inputs: tuple[PerRow, ...]
    per_row: Callable[[PerRow], PerRow]
    entries: int | jax.Array
    in_registers: bool
    layout: Any

    def plain(self, array: int, tile: TileIndex) -> Tile:
        """The tile as it is."""
        return self.widen(self.load(array, tile))

    def in_row(
        self, array: int, tile: TileIndex, *, fill: float, all_: bool = False
    ) -> Tile:
        """The tile with `fill` where masked and, unless `all_`, not owned."""
        x = self.widen(self.hide(tile, self.load(array, tile), fill))
        return x if all_ else self.hide_unowned(tile, x, fill)

    def logits(self, tile: TileIndex, *, all_: bool = False) -> Tile:
        return self.in_row(0, tile, fill=-jnp.inf, all_=all_)

    def logits_again(self, tile: TileIndex) -> Tile:
        """All of `logits`, which were not kept in float32."""
        return self.widen_again(self.hide(tile, self.load(0, tile), -jnp.inf))

    def hide(self, tile: TileIndex, x: jax.Array, fill: float) -> jax.Array:
        """The tile with `fill` where masked, also in a row of NaN."""
        if self.mask is None:
            return x
        mask = self.mask(tile)
        if mask.dtype.itemsize == x.dtype.itemsize == 2:
            return _choose_bits(mask, x, fill)
        return jnp.where(mask != 0, x, fill)

    def result(self, tile: TileIndex, value: Tile, op: "Op", dtype: Any) -> jax.Array:
        """What is written of the operation's result, in its dtype."""
        rounded = value.astype(dtype)
        return rounded if op.masked is None else self.hide(tile, rounded, op.masked)

    def hide_unowned(self, tile: TileIndex, x: jax.Array, fill: float) -> jax.Array:
        """The tile with `fill` where another warp owns the entry."""
        owned = self.owned(tile)
        return x if owned is None else jnp.where(owned, x, fill)

    def row_max(self, tile_of: Callable[[TileIndex], jax.Array]) -> PerRow:
        """The largest entry of the tiles."""
        (largest,) = self.fold(lambda t: (tile_of(t),), jnp.maximum)
        return jnp.max(self.widen(largest), axis=1)

    def row_sums(self, tiles_of: TilesOf) -> list[PerRow]:
        return [jnp.sum(x, axis=1) for x in self.fold(tiles_of, jnp.add)]

    def largest_logit(self, *, all_: bool = True) -> PerRow:
        """The largest logit that is not masked, and unless `all_`, owned.

        Taken in the array's own dtype: in 16 bits, fewer registers are in use at once.
        """

        def shown(t: TileIndex) -> jax.Array:
            x = self.hide(t, self.load(0, t), -jnp.inf)
            return x if all_ else self.hide_unowned(t, x, -jnp.inf)

        return self.row_max(shown)


# --- the operations -------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Op:
    """An operation on rows.

    Attributes:
      neutral: The state of no entries; empty where nothing is reduced.
      local: ``view -> state``, each with one number per row.
      merge: ``(states, top, total) -> state``: `top` takes the maximum and `total` the
        sum of a list of arrays, and of what is in each where that is to be merged too.
      finish: ``(view, local state, merged state) -> (tile -> tile to write)``; None if
        the result has none. It compares otherwise than `local`, where that is without a
        mask: of the same comparison, the compiler keeps the outcomes from one to the
        other, packed bit by bit, at several times the cost of comparing again.
      row_outputs: ``merged state -> numbers per row`` that are results too.
      row_output_count: How many numbers these are.
      unused: ``row inputs -> whether the result is 0``, whatever the entries are, per
        row; or None.
      masked: What is written where masked in place of the result; None if the result is
        right there.
    """

    neutral: tuple[float, ...]
    local: Callable[[View], State]
    merge: Callable[[Sequence[State], Reduce, Reduce], State]
    finish: Callable[[View, State, State], Callable[[TileIndex], Tile]] | None
    row_outputs: Callable[[State], State] = lambda state: ()
    row_output_count: int = 0
    unused: Callable[[Sequence[PerRow]], jax.Array] | None = None
    masked: float | None = None

    @property
    def elementwise(self) -> bool:
        """Whether nothing is reduced: then the state has no numbers."""
        return not self.neutral

    def alone(self) -> "Op":
        """Without the numbers per row."""
        none: State = ()
        return dataclasses.replace(
            self, row_outputs=lambda state: none, row_output_count=0
        )


def _softmax_op(exp: Exponential) -> Op:
    """State: the maximum m and ``sum(exp(x - m))``."""

    def local(view: View) -> State:
        # Of all entries, also those another warp owns: `finish` takes them relative
        # to it.
        true_max = view.largest_logit()
        m = jnp.maximum(true_max, LOWEST)
        # Where `finish` computes them again, the fast form will do in the sum: its
        # error of |d| eps in exp(d) is large only where exp(d) is small.
        form = exp if view.in_registers else dataclasses.replace(exp, accurate=False)

        def exponentials(t: TileIndex) -> tuple[Tile]:
            return (form(view.logits(t), m, view.broadcast),)

        return true_max, *view.row_sums(exponentials)

    def merge(states: Sequence[State], top: Reduce, total: Reduce) -> State:
        m = top([m for m, _ in states])
        return m, total([z * factor(mine, m) for mine, z in states])

    def factor(mine: PerRow, m: PerRow) -> PerRow:
        """``exp(mine - m)``, of maxima that may be -inf."""
        mine, m = jnp.maximum(mine, LOWEST), jnp.maximum(m, LOWEST)
        return exp.per_row(mine, m)

    def finish(view: View, mine: State, merged: State) -> Callable[[TileIndex], Tile]:
        m, z = merged
        # The exponentials of an empty row mean nothing.
        inverse = jnp.where(m == -jnp.inf, 0.0, 1 / z)
        share = view.broadcast(factor(mine[0], m) * inverse)
        own_max = jnp.maximum(mine[0], LOWEST)

        def result(t: TileIndex) -> Tile:
            # What `local` computed is taken again where it is still in registers.
            e = exp(view.logits(t, all_=True), own_max, view.broadcast)
            return e * share

        return result

    return Op((-np.inf, 0.0), local, merge, finish, masked=0.0)


def _log_softmax_op(exp: Exponential) -> Op:
    """State: the maximum m, how often it occurs, and the others' ``sum(exp(x - m))``.

    A row's maximum itself contributes 1, which log1p adds.
    """

    def local(view: View) -> State:
        true_max = view.largest_logit(all_=False)
        # The clamped one: nothing of an empty row is at its maximum.
        m = jnp.maximum(true_max, LOWEST)
        largest = view.broadcast(m)

        def sums(t: TileIndex) -> tuple[Tile, Tile]:
            x = view.logits(t)
            # A number, for a multiply-add per entry. NaN if the maximum is infinite.
            below = jnp.where(x == largest, 0.0, 1.0)
            return below, exp(x, m, view.broadcast) * below

        others, rest = view.row_sums(sums)
        return true_max, jnp.float32(view.entries) - others, rest

    def merge(states: Sequence[State], top: Reduce, total: Reduce) -> State:
        true_max = top([s[0] for s in states])
        m = jnp.maximum(true_max, LOWEST)
        ties, rest = [], []
        for mine, t, r in states:
            below = exp.per_row(jnp.maximum(mine, LOWEST), m)
            same = mine == true_max
            ties.append(jnp.where(same, t, 0.0))
            rest.append(jnp.where(same, r, (t + r) * below))
        return true_max, total(ties), total(rest)

    def finish(view: View, mine: State, merged: State) -> Callable[[TileIndex], Tile]:
        true_max, ties, rest = merged
        # 0 for an empty row, which has no ties: its entries are -inf already.
        log = log1p if exp.accurate else _rough_log1p
        log_sum = log(rest + jnp.maximum(ties - 1, 0.0))
        m = view.broadcast(jnp.maximum(true_max, LOWEST))
        log_sum = view.broadcast(log_sum)

        def result(t: TileIndex) -> Tile:
            return (view.logits_again(t) - m) * exp.scale - log_sum

        return result

    def outputs(state: State) -> State:
        true_max, ties, rest = state
        excess = jnp.where(true_max == -jnp.inf, -1.0, rest + (ties - 1.0))
        return true_max, excess

    return Op((-np.inf, 0.0, 0.0), local, merge, finish, outputs, 2, masked=-np.inf)


def _bits(x: jax.Array, dtype: np.dtype) -> jax.Array:
    return lax.bitcast_convert_type(x, dtype)


def _paired(weighted: Sequence[Tile], dtype: np.dtype) -> Tile:
    """Of (w, t), a float whose upper half is w, at least 0, and whose lower half is t.

    Both are numbers of the 16-bit `dtype`. Positive floats have the order of their
    bits, so the largest one has the `t` of the largest `w`.
    """
    w, t = weighted
    if dtype == jnp.bfloat16:  # the upper half of a float32
        upper, lower = _bits(w, jnp.int32), _bits(t, jnp.int32)
        lower = lax.shift_right_logical(lower, jnp.full(t.shape, 16, jnp.int32))
    else:
        upper, lower = (
            _bits(x.astype(dtype), jnp.int16).astype(jnp.int32) for x in (w, t)
        )
        upper = lax.shift_left(upper, jnp.full(w.shape, 16, jnp.int32))
        lower = lower & jnp.full(t.shape, 0xFFFF, jnp.int32)
    return _bits(upper | lower, jnp.float32)


def _second(pair: PerRow, dtype: np.dtype) -> PerRow:
    """The `t` of `_paired`."""
    upper = lax.shift_left(_bits(pair, jnp.int32), jnp.full(pair.shape, 16, jnp.int32))
    if dtype == jnp.bfloat16:
        return _bits(upper, jnp.float32)
    lower = lax.shift_right_logical(upper, jnp.full(pair.shape, 16, jnp.int32))
    return _bits(lower.astype(jnp.int16), jnp.float16).astype(jnp.float32)


def _mean_state(weighted: TilesOf, view: View, narrow: np.dtype | None = None) -> State:
    """``s = sum(w)``, a pivot c, and ``sum(w (t - c))``: the mean is c + u / s.

    The pivot is the `t` at the largest weight, as in `_rows.xla`. Where both are
    numbers of the 16-bit dtype `narrow`, by one maximum instead of two and a select.

    Args:
      weighted: ``tile -> (w, t)``.
      view: The share.
      narrow: The dtype of both, if it has 16 bits.
    """
    if narrow is not None:
        dtype = narrow
        pair = view.row_max(lambda i: _paired(weighted(i), dtype))
        pivot = _second(pair, narrow)
    else:
        largest = view.broadcast(view.row_max(lambda i: weighted(i)[0]))

        def at_largest(i: TileIndex) -> Tile:
            w, t = weighted(i)
            return jnp.where(w == largest, t, -jnp.inf)

        pivot = view.row_max(at_largest)
    c = view.broadcast(pivot)

    def sums(i: TileIndex) -> tuple[Tile, Tile]:
        w, t = weighted(i)
        return w, w * (t - c)

    s, u = view.row_sums(sums)
    return s, pivot, u


def _merge_means(states: Sequence[State], top: Reduce, total: Reduce) -> State:
    """All shares change to the pivot of the heaviest one."""
    heaviest = top([s for s, _, _ in states])
    pivot = top([jnp.where(s == heaviest, c, -jnp.inf) for s, c, _ in states])
    u = total([u + s * (c - pivot) for s, c, u in states])
    return total([s for s, _, _ in states]), pivot, u


def _deviation(view: View, merged: State) -> Callable[[Tile], Tile]:
    """From t to t less its mean."""
    s, pivot, u = merged
    c, rest = view.broadcast(pivot), view.broadcast(u / nonzero(s))
    return lambda t: (t - c) - rest


def _softmax_derivative_op(exp: Exponential) -> Op:
    """``scale P (t - mean of t under P)``; 0 where P is 0, whatever t is there."""

    def local(view: View) -> State:
        def inputs(i: TileIndex) -> tuple[Tile, Tile]:
            p = view.in_row(0, i, fill=0.0)
            return p, jnp.where(p == 0, 0.0, view.plain(1, i))

        dtypes = {view.load(array, 0).dtype for array in (0, 1)}
        one = dtypes.pop() if len(dtypes) == 1 else None
        narrow = one if one in (jnp.bfloat16, jnp.float16) else None
        return _mean_state(inputs, view, narrow)

    def finish(view: View, mine: State, merged: State) -> Callable[[TileIndex], Tile]:
        deviation = _deviation(view, merged)

        def result(i: TileIndex) -> Tile:
            p = view.in_row(0, i, fill=0.0, all_=True)
            d = deviation(view.plain(1, i))
            # The select is for what t is there, and for masked entries of a NaN row.
            return jnp.where(p <= 0, 0.0, p * (d * exp.scale))

        return result

    return Op((0.0, 0.0, 0.0), local, _merge_means, finish)


def _clamped_row_max(view: View) -> PerRow:
    """The maximum of the row's logits, which is an input."""
    return jnp.maximum(view.row_inputs[0], LOWEST)


def _log_softmax_pushforward_op(exp: Exponential) -> Op:
    """``scale (t - mean of t under P)``; 0 where masked or -inf."""

    def local(view: View) -> State:
        row_max = _clamped_row_max(view)

        def inputs(i: TileIndex) -> tuple[Tile, Tile]:
            x = view.logits(i)
            t = jnp.where(x == -jnp.inf, 0.0, view.plain(1, i))
            return exp(x, row_max, view.broadcast), t

        return _mean_state(inputs, view)

    def finish(view: View, mine: State, merged: State) -> Callable[[TileIndex], Tile]:
        deviation = _deviation(view, merged)

        def result(i: TileIndex) -> Tile:
            x = view.logits(i, all_=True)
            d = deviation(view.plain(1, i))
            return jnp.where(x < LOWEST, 0.0, d * exp.scale)

        return result

    return Op((0.0, 0.0, 0.0), local, _merge_means, finish)


def _add_states(states: Sequence[State], top: Reduce, total: Reduce) -> State:
    return tuple(total(list(each)) for each in zip(*states, strict=True))


def _log_softmax_pullback_op(exp: Exponential) -> Op:
    """``scale (g - P sum(g))``; 0 where masked or -inf.

    State: the sums of g at the maximum and elsewhere. Kept apart, and with the excess
    ``z - 1`` of the forward, they give what becomes of an entry that has most of the
    row without cancellation: ``g - P sum(g) = (g (z - 1) - sum of the others' g) / z``.
    """

    def local(view: View) -> State:
        largest = view.broadcast(_clamped_row_max(view))

        def sums(i: TileIndex) -> tuple[Tile, ...]:
            x, g = view.logits(i), view.plain(1, i)
            below = (x < largest) & (x > -jnp.inf)
            return jnp.where(x >= largest, g, 0.0), jnp.where(below, g, 0.0)

        return tuple(view.row_sums(sums))

    def finish(view: View, mine: State, merged: State) -> Callable[[TileIndex], Tile]:
        row_max = _clamped_row_max(view)
        g_max, g_rest = merged
        excess = view.row_inputs[1]
        inverse = exp.scale / nonzero(1 + excess)
        ratio = view.broadcast((g_max + g_rest) * inverse)
        # Such an entry is alone at the maximum: its g is known. Otherwise no P is above
        # 1/2, and little cancels.
        dominant = view.broadcast((g_max * excess - g_rest) * inverse)
        dominant_from = view.broadcast(jnp.where(excess < 1, row_max, jnp.inf))

        def result(i: TileIndex) -> Tile:
            x, g = view.logits(i, all_=True), view.plain(1, i)
            e = exp(x, row_max, view.broadcast)
            plain = g * exp.scale - e * ratio
            dx = jnp.where(x >= dominant_from, dominant, plain)
            return jnp.where(x < LOWEST, 0.0, dx)

        return result

    return Op((0.0, 0.0), local, _add_states, finish)


# --- states alone ---------------------------------------------------------------------


def _log_sum_exp_state(exp: Exponential) -> Op:
    return dataclasses.replace(_log_softmax_op(exp), finish=None)


def _mean_state_of(make: Callable[[Exponential], Op]) -> Callable[..., Op]:
    """The operation's state alone: the mean's ``(s, pivot, u)``."""

    def op(exp: Exponential) -> Op:
        return dataclasses.replace(
            make(exp),
            finish=None,
            row_outputs=lambda state: state,
            row_output_count=3,
        )

    return op


def _log_softmax_pullback_state(exp: Exponential) -> Op:
    return dataclasses.replace(
        _log_softmax_pullback_op(exp),
        finish=None,
        row_outputs=lambda state: state,
        row_output_count=2,
    )


OPS: dict[str, Callable[[Exponential], Op]] = {
    "softmax": _softmax_op,
    "softmax_derivative": _softmax_derivative_op,
    "log_softmax": _log_softmax_op,
    "log_softmax_pushforward": _log_softmax_pushforward_op,
    "log_softmax_pullback": _log_softmax_pullback_op,
    "log_sum_exp_state": _log_sum_exp_state,
    "softmax_derivative_state": _mean_state_of(_softmax_derivative_op),
    "log_softmax_pushforward_state": _mean_state_of(_log_softmax_pushforward_op),
    "log_softmax_pullback_state": _log_softmax_pullback_state,
}
