"""What the Mosaic GPU kernels compute: the operations, on tiles of a row.

An operation, `Op`, says what the state of a share of a row is, how states merge, and
what the result is; it sees the share as a `View`. Where shares lie and how states get
from warp to warp is `mosaic_gpu`'s. Semantics and numerics are those of `_rows.xla`;
what differs is noted at each operation.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxsoftmax._rows import row_loss

Tile = jax.Array  # float32, (rows, width)
PerRow = jax.Array  # float32, (rows,) or a scalar
State = tuple[PerRow, ...]
Reduce = Callable[[Sequence[jax.Array]], jax.Array]

_LOWEST = float(np.finfo(np.float32).min)
_LARGEST = float(np.finfo(np.float32).max)


# --- arithmetic on tiles --------------------------------------------------------------


def sum_tiles(tiles: Sequence[jax.Array]) -> jax.Array:
    """Entry by entry."""
    return functools.reduce(jnp.add, tiles)


def max_tiles(tiles: Sequence[jax.Array]) -> jax.Array:
    """Entry by entry."""
    return functools.reduce(jnp.maximum, tiles)


def _row_sum(tiles: Sequence[Tile]) -> PerRow:
    return jnp.sum(sum_tiles(tiles), axis=1)


def _row_max(tiles: Sequence[Tile]) -> PerRow:
    return jnp.max(max_tiles(tiles), axis=1)


def _nonzero(x: PerRow) -> PerRow:
    """`x` to divide by: 1 for a row with nothing in it."""
    return jnp.where(x == 0, 1.0, x)


def _log1p(x: PerRow) -> PerRow:
    """``log(1 + x)`` for x >= 0; not in Mosaic (`test_not_in_mosaic`).

    Below 1/2 the series of ``2 artanh(s)``, s at most 1/5: its next term is below 1e-9.
    """
    s = x / (2 + x)
    q = s * s
    series = q / 11 + 1 / 9
    for k in (7, 5, 3, 1):
        series = series * q + 1 / k
    return jnp.where(x < 0.5, 2 * s * series, jnp.log(1 + x))


def _round(x: PerRow) -> PerRow:
    """The nearest whole number, below 2^22."""
    return (x + 1.5 * 2.0**23) - 1.5 * 2.0**23


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
        m = broadcast(row_max)
        if not self.accurate:
            return jnp.exp2((x - m) * (self.scale * float(np.log2(np.e))))
        return jnp.exp((x - m) * self.scale)


# --- what a warp sees of its share ----------------------------------------------------


@dataclasses.dataclass(frozen=True)
class View:
    """A share of a row, or a chunk of it, as float32 tiles.

    Attributes:
      count: How many tiles there are.
      load: ``(array, tile) -> raw tile``.
      mask: ``tile -> bool tile`` of `where`, or None.
      owned: ``tile -> bool tile``, or None. An entry that two warps have is owned by
        one, whose state it counts in; both write its result.
      broadcast: From one number per row to a tile.
      row_inputs: The inputs with one number per row.
      per_row: From a number for the row, which may be a scalar, to one per row of the
        tile.
      in_registers: Whether the tiles stay in registers from the state to the result.
    """

    count: int
    load: Callable[[int, int], jax.Array]
    mask: Callable[[int], jax.Array] | None
    owned: Callable[[int], jax.Array] | None
    broadcast: Callable[[PerRow], Tile]
    row_inputs: tuple[PerRow, ...]
    per_row: Callable[[PerRow], PerRow]
    in_registers: bool

    def plain(self, array: int) -> list[Tile]:
        """The tiles as they are."""
        return [self.load(array, t).astype(jnp.float32) for t in range(self.count)]

    def in_row(self, array: int, *, fill: float, all_: bool) -> list[Tile]:
        """The tiles with `fill` where masked and, unless `all_`, not owned."""
        tiles = self.hide(self.plain(array), fill)
        return tiles if all_ else self.hide_unowned(tiles, fill)

    def logits(self, *, all_: bool = False) -> list[Tile]:
        return self.in_row(0, fill=-jnp.inf, all_=all_)

    def row_max(self, array: int) -> PerRow:
        """The largest entry that is not masked, whether it is owned or not.

        Taken in the array's own dtype: in 16 bits, fewer registers are in use at once.
        """
        tiles = [self.load(array, t) for t in range(self.count)]
        return _row_max([max_tiles(self.hide(tiles, -jnp.inf)).astype(jnp.float32)])

    def hide(self, tiles: list[Tile], fill: float) -> list[Tile]:
        """The tiles with `fill` where masked, also in a row of NaN."""
        if self.mask is None:
            return tiles
        return [jnp.where(self.mask(t), x, fill) for t, x in enumerate(tiles)]

    def hide_unowned(self, tiles: list[Tile], fill: float) -> list[Tile]:
        """The tiles with `fill` where another warp owns the entry."""
        if self.owned is None:
            return tiles
        return [jnp.where(self.owned(t), x, fill) for t, x in enumerate(tiles)]

    def exponentials(
        self, exp: Exponential, x: list[Tile], row_max: PerRow
    ) -> list[Tile]:
        return [exp(tile, row_max, self.broadcast) for tile in x]


# --- the operations -------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Op:
    """An operation on rows.

    Attributes:
      neutral: The state of no entries.
      local: ``view -> state``, each with one number per row.
      merge: ``(states, top, total) -> state``: `top` takes the maximum and `total` the
        sum of a list of arrays, and of what is in each where that is to be merged too.
      finish: ``(view, local state, merged state) -> tiles to write``; None if the
        result has none.
      row_outputs: ``merged state -> numbers per row`` that are results too.
      row_output_count: How many numbers these are.
      unused: ``row inputs -> whether the result is 0``, whatever the entries are, per
        row; or None.
    """

    neutral: tuple[float, ...]
    local: Callable[[View], State]
    merge: Callable[[Sequence[State], Reduce, Reduce], State]
    finish: Callable[[View, State, State], list[Tile]] | None
    row_outputs: Callable[[State], State] = lambda state: ()
    row_output_count: int = 0
    unused: Callable[[Sequence[PerRow]], jax.Array] | None = None


def _softmax_op(exp: Exponential) -> Op:
    """State: the maximum m and ``sum(exp(x - m))``."""

    def local(view: View) -> State:
        every = view.logits(all_=True)
        # Of all entries, also those another warp owns: `finish` takes them relative
        # to it.
        true_max = _row_max(every)
        m = jnp.maximum(true_max, _LOWEST)
        x = view.hide_unowned(every, -jnp.inf)
        if view.in_registers:
            return true_max, _row_sum(view.exponentials(exp, x, m))
        # `finish` computes them again. In the sum the fast form will do: its error of
        # |d| eps in exp(d) is large only where exp(d) is small.
        fast = dataclasses.replace(exp, accurate=False)
        return true_max, _row_sum([fast(tile, m, view.broadcast) for tile in x])

    def merge(states: Sequence[State], top: Reduce, total: Reduce) -> State:
        m = top([m for m, _ in states])
        return m, total([z * factor(mine, m) for mine, z in states])

    def factor(mine: PerRow, m: PerRow) -> PerRow:
        """``exp(mine - m)``, of maxima that may be -inf."""
        mine, m = jnp.maximum(mine, _LOWEST), jnp.maximum(m, _LOWEST)
        return exp.per_row(mine, m)

    def finish(view: View, mine: State, merged: State) -> list[Tile]:
        m, z = merged
        # The exponentials of an empty row mean nothing.
        inverse = jnp.where(m == -jnp.inf, 0.0, 1 / z)
        share = view.broadcast(factor(mine[0], m) * inverse)
        # What `local` computed is taken again where it is still in registers.
        own_max = jnp.maximum(mine[0], _LOWEST)
        e = view.exponentials(exp, view.logits(all_=True), own_max)
        return view.hide([tile * share for tile in e], 0.0)

    return Op((-np.inf, 0.0), local, merge, finish)


def _log_softmax_op(exp: Exponential) -> Op:
    """State: the maximum m, how often it occurs, and the others' ``sum(exp(x - m))``.

    A row's maximum itself contributes 1, which log1p adds.
    """

    def local(view: View) -> State:
        x = view.logits()
        true_max = _row_max(x)
        m = jnp.maximum(true_max, _LOWEST)
        # The clamped one: nothing of an empty row is at its maximum.
        at_max = [tile == view.broadcast(m) for tile in x]
        e = view.exponentials(exp, x, m)
        # 0 at the maximum; NaN if it is infinite.
        rest = [jnp.where(a, b - 1, b) for a, b in zip(at_max, e, strict=True)]
        ties = [jnp.where(a, 1.0, 0.0) for a in at_max]
        return true_max, _row_sum(ties), _row_sum(rest)

    def merge(states: Sequence[State], top: Reduce, total: Reduce) -> State:
        true_max = top([s[0] for s in states])
        m = jnp.maximum(true_max, _LOWEST)
        ties, rest = [], []
        for mine, t, r in states:
            below = exp.per_row(jnp.maximum(mine, _LOWEST), m)
            same = mine == true_max
            ties.append(jnp.where(same, t, 0.0))
            rest.append(jnp.where(same, r, (t + r) * below))
        return true_max, total(ties), total(rest)

    def finish(view: View, mine: State, merged: State) -> list[Tile]:
        true_max, ties, rest = merged
        # 0 for an empty row, which has no ties: its entries are -inf already.
        log_sum = _log1p(rest + jnp.maximum(ties - 1, 0.0))
        m = view.broadcast(jnp.maximum(true_max, _LOWEST))
        log_sum = view.broadcast(log_sum)
        y = [(x - m) * exp.scale - log_sum for x in view.logits(all_=True)]
        return view.hide(y, -jnp.inf)

    return Op((-np.inf, 0.0, 0.0), local, merge, finish, lambda state: state[:1], 1)


def _bits(x: jax.Array, dtype: np.dtype) -> jax.Array:
    return lax.bitcast_convert_type(x, dtype)


def _paired(w: Tile, t: Tile, dtype: np.dtype) -> Tile:
    """A float whose upper half is `w`, at least 0, and whose lower half is `t`.

    Both are numbers of the 16-bit `dtype`. Positive floats have the order of their
    bits, so the largest one has the `t` of the largest `w`.
    """
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


def _pivot(
    weights: list[Tile], t: list[Tile], view: View, narrow: np.dtype | None
) -> PerRow:
    """The `t` at the largest weight, as in `_rows.xla`.

    Where both are numbers of the 16-bit dtype `narrow`, by one maximum instead of two
    and a select.
    """
    pairs = list(zip(weights, t, strict=True))
    if narrow is not None:
        return _second(_row_max([_paired(w, x, narrow) for w, x in pairs]), narrow)
    largest = view.broadcast(_row_max(weights))
    return _row_max([jnp.where(w == largest, x, -jnp.inf) for w, x in pairs])


def _mean_state(
    weights: list[Tile], t: list[Tile], view: View, narrow: np.dtype | None = None
) -> State:
    """``s = sum(w)``, a pivot c, and ``sum(w (t - c))``: the mean is c + u / s."""
    s = _row_sum(weights)
    pivot = _pivot(weights, t, view, narrow)
    c = view.broadcast(pivot)
    u = _row_sum([w * (x - c) for w, x in zip(weights, t, strict=True)])
    return s, pivot, u


def _merge_means(states: Sequence[State], top: Reduce, total: Reduce) -> State:
    """All shares change to the pivot of the heaviest one."""
    heaviest = top([s for s, _, _ in states])
    pivot = top([jnp.where(s == heaviest, c, -jnp.inf) for s, c, _ in states])
    u = total([u + s * (c - pivot) for s, c, u in states])
    return total([s for s, _, _ in states]), pivot, u


def _deviations(view: View, t: list[Tile], merged: State) -> list[Tile]:
    """`t` less its mean."""
    s, pivot, u = merged
    c, rest = view.broadcast(pivot), view.broadcast(u / _nonzero(s))
    return [(x - c) - rest for x in t]


def _softmax_derivative_op(exp: Exponential) -> Op:
    """``scale P (t - mean of t under P)``; 0 where P is 0, whatever t is there."""

    def inputs(view: View, all_: bool) -> tuple[list[Tile], list[Tile]]:
        p = view.in_row(0, fill=0.0, all_=all_)
        t = view.plain(1)
        return p, [jnp.where(w == 0, 0.0, x) for w, x in zip(p, t, strict=True)]

    def local(view: View) -> State:
        dtypes = {view.load(array, 0).dtype for array in (0, 1)}
        one = dtypes.pop() if len(dtypes) == 1 else None
        narrow = one if one in (jnp.bfloat16, jnp.float16) else None
        return _mean_state(*inputs(view, False), view, narrow)

    def finish(view: View, mine: State, merged: State) -> list[Tile]:
        p, t = inputs(view, True)
        d = _deviations(view, t, merged)
        if exp.scale != 1.0:
            d = [x * exp.scale for x in d]
        # Without the select, masked entries of a NaN row would be NaN.
        return [jnp.where(w == 0, 0.0, w * x) for w, x in zip(p, d, strict=True)]

    return Op((0.0, 0.0, 0.0), local, _merge_means, finish)


def _inputs_from_logits(
    exp: Exponential, view: View, all_: bool
) -> tuple[list[Tile], PerRow, list[Tile], list[Tile]]:
    """The logits, their row maximum, their exponentials, and the other array.

    The other array is 0 where the logits are -inf, whatever it is there.
    """
    x = view.logits(all_=all_)
    row_max = jnp.maximum(view.row_inputs[0], _LOWEST)
    e = view.exponentials(exp, x, row_max)
    t = [
        jnp.where(a == -jnp.inf, 0.0, b) for a, b in zip(x, view.plain(1), strict=True)
    ]
    return x, row_max, e, t


def _log_softmax_pushforward_op(exp: Exponential) -> Op:
    """``scale (t - mean of t under P)``; 0 where masked or -inf."""

    def local(view: View) -> State:
        _, _, e, t = _inputs_from_logits(exp, view, False)
        return _mean_state(e, t, view)

    def finish(view: View, mine: State, merged: State) -> list[Tile]:
        x, _, _, t = _inputs_from_logits(exp, view, True)
        d = _deviations(view, t, merged)
        return [
            jnp.where(a == -jnp.inf, 0.0, b * exp.scale)
            for a, b in zip(x, d, strict=True)
        ]

    return Op((0.0, 0.0, 0.0), local, _merge_means, finish)


def _add_states(states: Sequence[State], top: Reduce, total: Reduce) -> State:
    return tuple(total(list(each)) for each in zip(*states, strict=True))


def _log_softmax_pullback_op(exp: Exponential) -> Op:
    """``scale (g - P sum(g))``; 0 where masked or -inf.

    State: ``sum(exp(x - m))``, the same without the maximum's, and the sums of g with
    and without the maximum's. Kept apart, they give 1 - P of a dominant entry without
    the cancellation: ``g - P sum(g) = (g rest - sum of the others' g) / z``.
    """

    def inputs(view: View, all_: bool) -> tuple[list[Tile], ...]:
        x, row_max, e, g = _inputs_from_logits(exp, view, all_)
        m = view.broadcast(row_max)
        return x, e, g, [a == m for a in x]

    def local(view: View) -> State:
        _, e, g, at_max = inputs(view, False)

        def others(tiles: list[Tile]) -> PerRow:
            return _row_sum(
                [jnp.where(a, 0.0, b) for a, b in zip(at_max, tiles, strict=True)]
            )

        return _row_sum(e), others(e), _row_sum(g), others(g)

    def finish(view: View, mine: State, merged: State) -> list[Tile]:
        x, e, g, at_max = inputs(view, True)
        z, rest, g_all, g_rest = merged
        # A whole number; 0 if x was recomputed after its maximum, and differs from it.
        ties = _round(z - rest)
        z = _nonzero(ties + rest)
        # A term of tied entries only: 0 where the maximum occurs once.
        several = jnp.where(ties > 1.5, 1.0, 0.0)
        mean_at_max = view.broadcast((g_all - g_rest) / _nonzero(ties))
        inverse = exp.scale / z
        ratio = view.broadcast(g_all * inverse)
        a, b = view.broadcast(rest * inverse), view.broadcast(g_rest * inverse)
        n = view.broadcast(several * ties * inverse)
        out = []
        for xx, ee, gg, top in zip(x, e, g, at_max, strict=True):
            largest = (gg * a - b) + (gg - mean_at_max) * n
            dx = jnp.where(top, largest, gg * exp.scale - ee * ratio)
            out.append(jnp.where(xx == -jnp.inf, 0.0, dx))
        return out

    return Op((0.0,) * 4, local, _add_states, finish)


# --- states alone ---------------------------------------------------------------------


def _log_sum_exp_state(exp: Exponential) -> Op:
    def outputs(state: State) -> State:
        true_max, ties, rest = state
        excess = jnp.where(true_max == -jnp.inf, -1.0, rest + (ties - 1.0))
        return true_max, excess

    op = _log_softmax_op(exp)
    return dataclasses.replace(op, finish=None, row_outputs=outputs, row_output_count=2)


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
    """The sums of the exponentials and of g, each at the maximum and elsewhere."""

    def local(view: View) -> State:
        x, row_max, e, g = _inputs_from_logits(exp, view, False)
        m = view.broadcast(row_max)
        at_max = [a == m for a in x]

        def split(tiles: list[Tile]) -> State:
            pairs = list(zip(at_max, tiles, strict=True))
            return (
                _row_sum([jnp.where(a, b, 0.0) for a, b in pairs]),
                _row_sum([jnp.where(a, 0.0, b) for a, b in pairs]),
            )

        return (*split(e), *split(g))

    return Op((0.0,) * 4, local, _add_states, None, lambda state: state, 4)


# --- cross-entropy --------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Values:
    """The values v of logits as in `_rows.row_loss`, with ``z = unit v``."""

    scale: float
    softcap: float | None
    accurate: bool

    @property
    def exp(self) -> Exponential:
        if self.softcap is None:
            return Exponential(self.scale, self.accurate)
        # Capped values are rounded, so that an exact difference of two gains nothing.
        return Exponential(1.0, False)

    def _logistic(self, x: Tile) -> tuple[Tile, Tile]:
        """``q = exp(2 y)`` and ``1 / (1 + q)``, y = scale x / softcap.

        tanh(y) is 1 less twice the second. Not as a quotient, which costs much more.
        """
        assert self.softcap is not None
        factor = 2 * float(np.log2(np.e)) * self.scale / self.softcap
        q = jnp.exp2(jnp.minimum(x * factor, 120.0))
        root = lax.rsqrt(1 + q)
        return q, root * root

    def __call__(self, x: Tile) -> Tile:
        if self.softcap is None:
            return x
        _, r = self._logistic(x)
        capped = self.softcap - (2 * self.softcap) * r
        if self.accurate:
            # Below 1/4, where that cancels, the series: its next term is below 2e-9.
            y = x * (self.scale / self.softcap)
            s = y * y
            series = s * (62 / 2835) - 17 / 315
            series = series * s + 2 / 15
            series = series * s - 1 / 3
            small = (y + y * s * series) * self.softcap
            capped = jnp.where(s < 0.0625, small, capped)
        return jnp.where(x == -jnp.inf, -jnp.inf, capped)

    def slope(self, x: Tile) -> Tile:
        """``(dz / dx) / scale``: ``1 - tanh^2`` without its cancellation."""
        q, r = self._logistic(x)
        return (4 * q * r) * r


@dataclasses.dataclass(frozen=True)
class _CrossEntropy:
    """The methods of `cross_entropy_op`'s operation.

    A state is the maximum m, ``sum(e)``, the same without the entries that are m, and
    then what `row_loss.State` has that is relative to m, `row_loss.State.below_label`
    only where labels are weights.

    Attributes:
      scale: Multiplies the logits.
      accurate: False where the result is rounded to 16 bits anyway.
      options: What is computed besides the cross-entropy.
      dense: Whether labels are weights, a second array.
    """

    scale: float
    accurate: bool
    options: row_loss.Options
    dense: bool

    @property
    def values(self) -> _Values:
        return _Values(self.scale, self.options.softcap, self.accurate)

    @property
    def exp(self) -> Exponential:
        return self.values.exp

    def local(self, view: View) -> State:
        values, exp = self.values, self.exp
        every = [values(tile) for tile in view.logits(all_=True)]
        # Of all entries, also those another warp owns: `finish` takes them relative
        # to it.
        capped = self.options.softcap is not None
        true_max = _row_max(every) if capped else view.row_max(0)
        m = jnp.maximum(true_max, _LOWEST)
        v = view.hide_unowned(every, -jnp.inf)
        # As for softmax: where `finish` computes them again, the fast form will do.
        if not view.in_registers:
            exp = dataclasses.replace(exp, accurate=False)
        e = view.exponentials(exp, v, m)
        # Exactly 1 at the maximum. A NaN is in the sum of all.
        rest = [jnp.where(tile < 1, tile, 0.0) for tile in e]
        state = [true_max, _row_sum(e), _row_sum(rest)]
        below = [view.broadcast(m) - tile for tile in v]
        return (*state, *self._terms(view, v, e, below))

    def _terms(
        self, view: View, v: list[Tile], e: list[Tile], below: list[Tile]
    ) -> list[PerRow]:
        """The sums of ``below = m - v`` under weights, and of the weights."""
        unit, terms = self.exp.scale, []
        if self.dense:
            t = view.in_row(1, fill=0.0, all_=False)
            costs = [
                jnp.where(a == 0, 0.0, a * b) for a, b in zip(t, below, strict=True)
            ]
            terms += [_row_sum(costs) * unit, _row_sum(t)]
        if self.options.uniform_nll:
            finite = [
                jnp.where(a == -jnp.inf, 0.0, b) for a, b in zip(v, below, strict=True)
            ]
            is_entry = [jnp.where(tile == -jnp.inf, 0.0, 1.0) for tile in v]
            terms += [_row_sum(finite) * unit, _row_sum(is_entry)]
        if self.options.entropy:
            # Where an entry is masked, or further below than a float can say, e is 0.
            weighted = [
                a * jnp.where(b == jnp.inf, 0.0, b)
                for a, b in zip(e, below, strict=True)
            ]
            terms.append(_row_sum(weighted) * unit)
        return terms

    def merge(self, states: Sequence[State], top: Reduce, total: Reduce) -> State:
        true_max = top([s[0] for s in states])
        parts = [self._relative(s, true_max) for s in states]
        return true_max, *(total(list(each)) for each in zip(*parts, strict=True))

    def _relative(self, state: State, true_max: PerRow) -> list[PerRow]:
        """All but the maximum, relative to that of more entries."""
        mine, z, rest, *others = state
        own, m = jnp.maximum(mine, _LOWEST), jnp.maximum(true_max, _LOWEST)
        factor = self.exp.per_row(own, m)
        # An empty share adds nothing, however far its maximum is below.
        distance = jnp.where(mine == -jnp.inf, 0.0, (m - own) * self.exp.scale)
        # The distance may overflow where the weight that it multiplies is 0: where
        # another warp owns all of the share's entries, for one.
        finite = jnp.minimum(distance, _LARGEST)
        parts = [z * factor, jnp.where(mine == true_max, rest, z * factor)]
        if self.dense:
            cost, weight, *others = others
            parts += [cost + weight * finite, weight]
        if self.options.uniform_nll:
            below, entries, *others = others
            parts += [below + entries * finite, entries]
        if self.options.entropy:
            (weighted,) = others
            parts.append(weighted * factor + (z * factor) * finite)
        return parts

    @staticmethod
    def _excess(merged: State) -> PerRow:
        """``sum(e) - 1``, to the digits that the sum without the maximum has."""
        _, z, rest, *_ = merged
        # How often the maximum occurs; beyond what `_round` takes, about that.
        ties = z - rest
        return rest + (jnp.where(ties < 4e6, _round(ties), ties) - 1.0)

    def row_outputs(self, merged: State) -> State:
        true_max, z, _, *others = merged
        # -1 for an empty row: its `exp` counts -inf as the lowest float.
        number = jnp.where(true_max == -jnp.inf, -1.0, self._excess(merged))
        return true_max, jnp.where(z == z, number, z), *others

    def finish(self, view: View, mine: State, merged: State) -> list[Tile]:
        values, exp, options = self.values, self.exp, self.options
        label_weight, weight = (view.per_row(x) for x in view.row_inputs)
        merged = tuple(view.per_row(x) for x in merged)
        true_max, z, _, *others = merged
        empty = true_max == -jnp.inf
        m = jnp.maximum(true_max, _LOWEST)
        p_weight, constant = label_weight, None
        if options.z_loss:
            z_max = jnp.minimum(jnp.maximum(m * exp.scale, _LOWEST), _LARGEST)
            lse = z_max + _log1p(jnp.maximum(self._excess(merged), 0.0))
            lse_weight = weight * (2 * options.z_loss)
            p_weight = p_weight + lse_weight * jnp.where(empty, 0.0, lse)
        if options.uniform_nll:
            smoothed = weight * options.label_smoothing
            p_weight = p_weight + smoothed
            constant = smoothed * self.scale / _nonzero(others[1])
            constant = view.broadcast(constant)
        own_max = jnp.maximum(mine[0], _LOWEST)
        inverse = jnp.where(empty, 0.0, 1 / z)
        per_e = view.broadcast(
            exp.per_row(own_max, m) * inverse * p_weight * self.scale
        )
        x = view.logits(all_=True)
        e = view.exponentials(exp, [values(tile) for tile in x], own_max)
        dx = [tile * per_e for tile in e]
        if constant is not None:
            dx = [
                jnp.where(a == -jnp.inf, 0.0, b - constant)
                for a, b in zip(x, dx, strict=True)
            ]
        if options.softcap is not None:
            dx = [b * values.slope(a) for a, b in zip(x, dx, strict=True)]
        return view.hide(dx, 0.0)

    def unused(self, row_inputs: Sequence[PerRow]) -> jax.Array:
        label_weight, weight = row_inputs
        return (label_weight == 0) & (weight == 0)


def cross_entropy_op(
    scale: float,
    accurate: bool,
    options: row_loss.Options,
    *,
    dense: bool,
    with_gradient: bool,
) -> Op:
    """The state of rows of `_rows.xla_loss` and, if wanted, the gradient.

    A label that is an index is handled outside the kernel: neither ``below_label`` nor
    the gradient at the label is computed here.
    """
    loss = _CrossEntropy(scale, accurate, options, dense)
    numbers = options.numbers + (1 if dense else -1)
    return Op(
        neutral=(-np.inf,) + (0.0,) * numbers,
        local=loss.local,
        merge=loss.merge,
        finish=loss.finish if with_gradient else None,
        row_outputs=loss.row_outputs,
        row_output_count=numbers,
        unused=loss.unused if with_gradient else None,
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
