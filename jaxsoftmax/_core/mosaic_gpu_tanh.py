"""tanh on tiles of the Mosaic GPU kernels, with few of the slow functions."""

import functools
import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsoftmax._compat import mosaic_gpu_registers as registers

# tanh(x) / x as a polynomial of x^2: |x| up to the bound, 2.3e-7 off tanh; and, in the
# second, 2.5e-8 of it. Of squares, what counts as small is a power of two: of a cap of
# 30, all logits up to 16.
_TANH = (0.9999962, -0.333151, 0.13095065, -0.04211881)
_ACCURATE_TANH = (0.999999976, -0.333329013, 0.133210346, -0.0527259083, 0.0165804332)
_TANH_BOUND = 0.534
# Of `HalfTanh`, for coefficients that are normal float32.
FACTORS = (2.0**-16, 2.0**10)
_LOG2E = float(np.log2(np.e))
_LARGEST = float(np.finfo(np.float32).max)


class HalfTanh:
    """``tanh(factor x) / 2`` of tiles.

    Its two slow functions, an exponential and a reciprocal, would take longer than all
    else. Where what a warp has of the tile is small, a polynomial does: of ``x^2`` and
    a power of two, by whose sum `registers.by_size` sees that it is small.

    Args:
      factor: Within `FACTORS`.
      layout: How tiles lie in registers; if None, as for wgmma.
      accurate: With all digits of float32 where it is small.
      columns: For how many it is decided at once, of tiles that lie as for wgmma.
    """

    def __init__(
        self,
        factor: float,
        layout: Any = None,
        *,
        accurate: bool = False,
        columns: int = 32,
    ) -> None:
        self.factor, self.layout, self.columns = factor, layout, columns
        _, exponent = math.frexp((_TANH_BOUND / factor) ** 2)
        self.power = math.ldexp(0.5, exponent)
        series = _ACCURATE_TANH if accurate else _TANH
        of_square = [c * factor ** (2 * i + 1) / 2 for i, c in enumerate(series)]
        less: Any = np.polynomial.Polynomial([-self.power, 1.0])
        self.coefficients = np.polynomial.Polynomial(of_square)(less).coef.tolist()

    def _quotient(self, squares: Any, times: float = 1.0) -> Any:
        """The polynomial, which is that by x, multiplied."""
        coefficients = [c * times for c in reversed(self.coefficients)]
        return functools.reduce(lambda q, c: q * squares + c, coefficients)

    def _exponential(self, x: Any, exp2: Any, reciprocal: Any) -> Any:
        return reciprocal(exp2(x * (2 * _LOG2E * self.factor)) * -1.0 - 1.0) + 0.5

    def _by_size(self, small: Any, large: Any, *tiles: jax.Array, results: int) -> Any:
        return registers.by_size(
            self.power,
            small,
            large,
            *tiles,
            results=results,
            layout=self.layout,
            columns=self.columns,
        )

    def of(self, x: jax.Array) -> jax.Array:
        """That of a tile."""
        (result,) = self._by_size(
            lambda squares, do, x: (x * self._quotient(squares),),
            lambda do, x: (self._exponential(x, do.exp2, do.reciprocal),),
            x,
            results=1,
        )
        return result

    def of_rows(self, x: jax.Array) -> jax.Array:
        """That of a vector."""
        return self._exponential(x, jnp.exp2, lambda y: 1.0 / y)

    def folds(self, times: float) -> bool:
        """Whether coefficients of so many times that are normal float32."""
        info = np.finfo(np.float32)
        sizes = [abs(c * times) for c in self.coefficients]
        return float(info.tiny) <= min(sizes) and max(sizes) <= float(info.max)

    def powers(
        self, x: jax.Array, times: float, rows: jax.Array | None = None
    ) -> jax.Array:
        """2 to the power of ``times * of(x) - rows``, of tiles; see `folds`."""

        def large(do: Any, x: Any) -> Any:
            return self._exponential(x, do.exp2, do.reciprocal) * times

        return self._powers(large, x, times, rows)

    def _powers(
        self, large: Any, x: jax.Array, times: float, rows: jax.Array | None
    ) -> Any:
        """``2^(large(x) - rows)``, or by the polynomial, of tiles."""
        others = () if rows is None else (rows,)

        def power(do: Any, exponent: Any, *rows: Any) -> Any:
            return (do.exp2(functools.reduce(operator.sub, rows, exponent)),)

        (result,) = self._by_size(
            lambda squares, do, x, *rows: power(
                do, x * self._quotient(squares, times), *rows
            ),
            lambda do, x, *rows: power(do, large(do, x), *rows),
            *(x, *others),
            results=1,
        )
        return result

    # Of values ``v = times * of(x)``, where -inf has -inf, and of the slope, which is
    # ``1 - tanh^2`` without its cancellation, and 0 there.

    def values(self, x: jax.Array, times: float) -> tuple[jax.Array, jax.Array]:
        """Those and the slope, of a tile; see `folds`."""

        def small(squares: Any, do: Any, x: Any) -> Any:
            v = x * self._quotient(squares, times)
            return v, v * v * (-4 / times**2) + 1.0

        def large(do: Any, x: Any) -> Any:
            return self._value_and_slope(do, x, times)

        v, slope = self._by_size(small, large, x, results=2)
        return v, slope

    def value_powers(self, x: jax.Array, times: float, rows: jax.Array) -> jax.Array:
        """``2^(v - rows)``, of tiles; see `folds`."""

        def large(do: Any, x: Any) -> Any:
            return self._value_and_slope(do, x, times)[0]

        return self._powers(large, x, times, rows)

    def sloped_powers(
        self, x: jax.Array, times: float, rows: jax.Array, factor: jax.Array
    ) -> jax.Array:
        """``2^(v - rows)`` times the factor and the slope, of tiles; see `folds`."""
        of_square = factor * (-4 / times**2)

        def small(
            squares: Any, do: Any, x: Any, rows: Any, factor: Any, of_square: Any
        ) -> Any:
            v = x * self._quotient(squares, times)
            return (do.exp2(v - rows) * (v * v * of_square + factor),)

        def large(do: Any, x: Any, rows: Any, factor: Any, of_square: Any) -> Any:
            del of_square
            v, slope = self._value_and_slope(do, x, times)
            return (do.exp2(v - rows) * factor * slope,)

        (result,) = self._by_size(small, large, x, rows, factor, of_square, results=1)
        return result

    def _value_and_slope(self, do: Any, x: Any, times: float) -> tuple[Any, Any]:
        q = do.exp2(do.minimum(x * (2 * _LOG2E * self.factor), 60.0))
        r = do.reciprocal(q + 1.0)
        # The last term is -inf of -inf, and else 0.
        v = r * -times + times / 2 + do.minimum(x + _LARGEST, 0.0)
        return v, q * r * r * 4.0
