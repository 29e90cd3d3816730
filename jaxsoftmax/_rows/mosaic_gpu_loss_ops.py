"""Cross-entropy on tiles of a row, as one of `mosaic_gpu_ops`' operations.

Semantics and numerics are those of `_rows.xla_loss`; what differs is noted.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxsoftmax._core.mosaic_gpu_tanh import FACTORS, HalfTanh
from jaxsoftmax._rows import row_loss
from jaxsoftmax._rows.mosaic_gpu_ops import (
    LARGEST,
    LOG2E,
    LOWEST,
    Exponential,
    Op,
    PerRow,
    Reduce,
    State,
    Tile,
    TileIndex,
    View,
    log1p,
    nearest,
    nonzero,
)


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

    @property
    def _cap(self) -> float:
        assert self.softcap is not None
        return self.softcap

    def _logistic(self, x: Tile) -> tuple[Tile, Tile]:
        """``q = exp(2 y)`` and ``1 / (1 + q)``, y = scale x / softcap.

        tanh(y) is 1 less twice the second. Not as a quotient, which costs much more.
        """
        factor = 2 * LOG2E * self.scale / self._cap
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

    def _tanh(self, view: View) -> HalfTanh | None:
        """The cap's, with few of the slow functions; None where it is out of range."""
        if self.softcap is None:
            return None
        factor, (least, most) = self.scale / self.softcap, FACTORS
        if not least < factor < most:
            return None
        tanh = HalfTanh(factor, view.layout, accurate=self.accurate)
        return tanh if tanh.folds(LOG2E * 2 * self.softcap) else None

    # Of tiles. With a cap, 2e-7 of it off what numbers per row have.

    def of_tile(self, view: View, x: Tile) -> Tile:
        """The values."""
        return self.with_slope(view, x)[0]

    def with_slope(self, view: View, x: Tile) -> tuple[Tile, Tile | None]:
        """`of_tile`, and ``(dz / dx) / scale``, or None for 1.

        That is ``1 - tanh^2`` without its cancellation, 0 where x is -inf.
        """
        if self.softcap is None:
            return x, None
        tanh = self._tanh(view)
        if tanh is not None:
            return tanh.values(x, 2 * self._cap)
        q, r = self._logistic(x)
        return self(x), (4 * q * r) * r

    def above_max(self, v: Tile, row_max: Tile) -> Tile:
        """As in `_rows.row_loss`, but for `stop_gradient`, which is not in Mosaic."""
        above = v - row_max
        if self.softcap is None:
            return above
        return above - row_loss.rounding_of_cap(above, self.softcap)

    def exponentials(self, view: View, x: Tile, m: PerRow) -> Tile:
        """``exp(v - m)``."""
        tanh = self._tanh(view)
        if tanh is None:
            return self.exp(self(x), m, view.broadcast)
        return tanh.value_powers(x, *self._in_exponents(view, m))

    def sloped_exponentials(self, view: View, x: Tile, m: PerRow, factor: Tile) -> Tile:
        """The same by the factor and the slope."""
        tanh = self._tanh(view)
        if tanh is not None:
            return tanh.sloped_powers(x, *self._in_exponents(view, m), factor)
        v, slope = self.with_slope(view, x)
        e = self.exp(v, m, view.broadcast) * factor
        return e if slope is None else e * slope

    def _in_exponents(self, view: View, m: PerRow) -> tuple[float, Tile]:
        rows = jnp.maximum(m * LOG2E, LOWEST)
        return LOG2E * 2 * self._cap, view.broadcast(rows)


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
        # Of all entries, also those another warp owns: `finish` takes them relative
        # to it.
        largest = view.largest_logit()
        true_max = values(largest)  # a cap keeps the order
        m = jnp.maximum(true_max, LOWEST)
        # As for softmax: where `finish` computes them again, the fast form will do.
        if not view.in_registers:
            exp = dataclasses.replace(exp, accurate=False)

        capped, options = values.softcap is not None, self.options
        alone = not (self.dense or options.uniform_nll or options.entropy)

        def sums(t: TileIndex) -> list[Tile]:
            x, terms = view.logits(t, all_=True), []
            if capped and alone:
                e = view.hide_unowned(t, values.exponentials(view, x, m), 0.0)
            else:
                v = view.hide_unowned(t, values.of_tile(view, x), -jnp.inf)
                above = values.above_max(v, view.broadcast(m))
                e = exp.of(above)
                terms = self._terms(view, t, v, above, e)
            # Exactly 1 at the maximum, but for a cap's rounding. A number, for a
            # multiply-add per entry.
            below = x < view.broadcast(largest) if capped else e < 1
            return [e, e * jnp.where(below, 1.0, 0.0), *terms]

        z, rest, *terms = view.row_sums(sums)
        return (true_max, z, rest, *self._in_units(terms))

    def _terms(
        self, view: View, tile: TileIndex, v: Tile, above: Tile, e: Tile
    ) -> list[Tile]:
        """``above = v - m`` under weights, and the weights; to be summed.

        Of entries, not above the lowest float: a number to multiply with 0.
        """
        terms, finite = [], jnp.maximum(above, LOWEST)
        if self.dense:
            t = view.in_row(1, tile, fill=0.0)
            terms += [jnp.where(t == 0, 0.0, t * above), t]
        if self.options.uniform_nll:
            present = jnp.where(v > -jnp.inf, 1.0, 0.0)
            terms += [finite * present, present]
        if self.options.entropy:
            # Where an entry is masked, or further below than a float can say, e is 0.
            terms.append(finite * e)
        return terms

    def _in_units(self, sums: list[PerRow]) -> list[PerRow]:
        """The sums of `_terms`, those of ``v - m`` times what a unit of v is below."""
        unit, rest, found = -self.exp.scale, list(sums), []
        if self.dense:
            found += [rest.pop(0) * unit, rest.pop(0)]
        if self.options.uniform_nll:
            # The lowest float stands for what is further below than a float can say.
            above = rest.pop(0)
            above = jnp.where(above <= LOWEST, -jnp.inf, above)
            found += [above * unit, rest.pop(0)]
        return found + [x * unit for x in rest]

    def merge(self, states: Sequence[State], top: Reduce, total: Reduce) -> State:
        true_max = top([s[0] for s in states])
        parts = [self._relative(s, true_max) for s in states]
        return true_max, *(total(list(each)) for each in zip(*parts, strict=True))

    def _relative(self, state: State, true_max: PerRow) -> list[PerRow]:
        """All but the maximum, relative to that of more entries."""
        mine, z, rest, *others = state
        own, m = jnp.maximum(mine, LOWEST), jnp.maximum(true_max, LOWEST)
        factor = self.exp.per_row(own, m)
        # An empty share adds nothing, however far its maximum is below.
        distance = jnp.where(mine == -jnp.inf, 0.0, (m - own) * self.exp.scale)
        # The distance may overflow where the weight that it multiplies is 0: where
        # another warp owns all of the share's entries, for one.
        finite = jnp.minimum(distance, LARGEST)
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
        # How often the maximum occurs; beyond what `nearest` takes, about that.
        ties = z - rest
        return rest + (jnp.where(ties < 4e6, nearest(ties), ties) - 1.0)

    def row_outputs(self, merged: State) -> State:
        true_max, z, _, *others = merged
        # -1 for an empty row: its `exp` counts -inf as the lowest float.
        number = jnp.where(true_max == -jnp.inf, -1.0, self._excess(merged))
        return true_max, jnp.where(z == z, number, z), *others

    def finish(
        self, view: View, mine: State, merged: State
    ) -> Callable[[TileIndex], Tile]:
        values, exp, options = self.values, self.exp, self.options
        label_weight, weight = (view.per_row(x) for x in view.row_inputs)
        merged = tuple(view.per_row(x) for x in merged)
        true_max, z, _, *others = merged
        empty = true_max == -jnp.inf
        m = jnp.maximum(true_max, LOWEST)
        p_weight, constant = label_weight, None
        if options.z_loss:
            z_max = jnp.minimum(jnp.maximum(m * exp.scale, LOWEST), LARGEST)
            lse = z_max + log1p(jnp.maximum(self._excess(merged), 0.0))
            lse_weight = weight * (2 * options.z_loss)
            p_weight = p_weight + lse_weight * jnp.where(empty, 0.0, lse)
        if options.uniform_nll:
            smoothed = weight * options.label_smoothing
            p_weight = p_weight + smoothed
            constant = smoothed * self.scale / nonzero(others[1])
            constant = view.broadcast(constant)
        own_max = jnp.maximum(mine[0], LOWEST)
        inverse = jnp.where(empty, 0.0, 1 / z)
        per_e = view.broadcast(
            exp.per_row(own_max, m) * inverse * p_weight * self.scale
        )

        def result(t: TileIndex) -> Tile:
            x = view.logits(t, all_=True)
            if constant is None:
                return values.sloped_exponentials(view, x, own_max, per_e)
            v, slope = values.with_slope(view, x)
            dx = exp(v, own_max, view.broadcast) * per_e
            return self._through(x, dx, constant, slope)

        return result

    @staticmethod
    def _through(x: Tile, dz: Tile, constant: Tile | None, slope: Tile | None) -> Tile:
        """The gradient of logits, from that of what is made of them."""
        if constant is not None:
            dz = jnp.where(x < LOWEST, 0.0, dz - constant)
        return dz if slope is None else dz * slope

    def unused(self, row_inputs: Sequence[PerRow]) -> jax.Array:
        label_weight, weight = row_inputs
        return (label_weight == 0) & (weight == 0)

    def pullback(
        self, view: View, mine: State, merged: State
    ) -> Callable[[TileIndex], Tile]:
        """The gradient of `_rows.xla_loss.cross_entropy_pullback`, not at the label."""
        values, exp, options = self.values, self.exp, self.options
        numbers = [view.per_row(x) for x in view.row_inputs]
        row_max, per_e, *rest = numbers
        m, per_e = jnp.maximum(row_max, LOWEST), view.broadcast(per_e * self.scale)
        largest, constant = view.broadcast(m), None
        # Below it e is 0: a number that stays one where terms multiply it.
        far = -min(128 / exp.scale, LARGEST)
        if options.uniform_nll:
            constant = view.broadcast(rest.pop(0) * self.scale)
        if options.entropy:
            per_e_below = view.broadcast(rest[0] * (self.scale * exp.scale))
            mean = view.broadcast(rest[1] * (1 / exp.scale))

        def result(t: TileIndex) -> Tile:
            x = view.logits(t, all_=True)
            if constant is None and not options.entropy:
                return values.sloped_exponentials(view, x, m, per_e)
            v, slope = values.with_slope(view, x)
            above = values.above_max(v, largest)
            if options.entropy:
                from_mean = jnp.maximum(above, far) + mean
                dx = exp.of(above) * (per_e - per_e_below * from_mean)
            else:
                dx = exp.of(above) * per_e
            return self._through(x, dx, constant, slope)

        return result

    def no_terms(self, row_inputs: Sequence[PerRow]) -> jax.Array:
        """`Op.unused` of the pullback."""
        terms = row_inputs[1 : 2 + self.options.uniform_nll + self.options.entropy]
        return functools.reduce(jnp.logical_and, [x == 0 for x in terms])


def cross_entropy_pullback_op(
    scale: float, accurate: bool, options: row_loss.Options
) -> Op:
    """The gradient of logits, given `_rows.xla_loss.PullbackNumbers`.

    All but `at_label`: as for `cross_entropy_op`, the label is handled outside.
    """
    loss = _CrossEntropy(scale, accurate, options, dense=False)
    return Op(
        neutral=(),
        local=lambda view: (),
        merge=lambda states, top, total: (),
        finish=loss.pullback,
        unused=loss.no_terms,
        masked=0.0,
    )


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
        masked=0.0,
    )
