"""Which implementation a function of rows runs with by default on a GPU.

The rule is what is fastest where a function usually stands: a softmax between two
matrix products, where XLA fuses its form of it with the elementwise operations around
it, casts to and from 16 bits among them; a log_softmax between a product and the choice
of the labels' entries, where XLA stores more than the kernels do. The figures are those
of docs/gpu_forms.md, of an H200.
"""

import math
from typing import TYPE_CHECKING

import numpy as np

from jaxsoftmax._core.shapes import is_known, row_size
from jaxsoftmax._rows import row_layout

if TYPE_CHECKING:
    from jaxsoftmax._rows.call import RowCall

# Entries up to which a launch is most of the time: the forms differ little between
# products, and in one program of forward and backward one kernel is worth more. But of
# few rows that are long, of which XLA has each by one block: alone, kernels take 0.37
# to 0.85 of jax.nn's time for them, and between products 0.89 to 1.04.
_SMALL = 2**20
_LONG_ROW = 4096
# The longest rows for which XLA's form is as fast as the kernels; of softmax also in
# float32, where it fuses a cast before or after, and with a cast of its own.
_SHORT_ROW = {"softmax": 127, "log_softmax": 31}
_FLOAT32_ROW = 16384
_CAST_ROW = 4096
# Rows along an axis that is not last: the shortest and longest, and the fewest side by
# side, of which the strips of `mosaic_gpu` were measured, alone (docs/gpu_softmax.md):
# they took less time than XLA's form. Of what the last block has this much may be in
# another too.
_STRIP_LENGTHS = (64, 2**18)
_STRIP_ROWS = 16
_MOST_TWICE = 0.06
# What of a loss is elementwise, given the numbers of its rows: XLA's form of it is at
# the roof in float32, and at 0.73 of it in 16 bits.
ELEMENTWISE = "cross_entropy_pullback"
_ELEMENTWISE_BY_XLA = "nothing is reduced: XLA's form is as fast"
_OVER_OTHER_AXES = "XLA's form is as fast over axes that are not last"


def reason_for_xla(call: "RowCall") -> str | None:
    """Why "xla" comes before the kernels for a call, or None."""
    if call.op == "weighted_log_sum_exp":
        return "sums of exponentials with weights have XLA's form alone"
    x = call.arrays[0]
    if call.op == ELEMENTWISE and np.float32 in (x.dtype, call.dtype):
        return _ELEMENTWISE_BY_XLA
    function = _function(call)
    if (function is None and call.op != ELEMENTWISE) or not is_known(x.shape):
        return None
    length = row_size(x.shape, call.axis)
    dims = row_layout.merge_dims(x.shape, call.axis, None)
    last = row_layout.last_in_memory(dims)
    long = function is not None and last and length >= _LONG_ROW
    if math.prod(x.shape) <= _SMALL and not long:
        return f"XLA's form is as fast for arrays of up to {_SMALL} entries"
    if function is None:
        return None
    if not last:
        return None if _in_strips(call, dims) else _OVER_OTHER_AXES
    if length <= _SHORT_ROW[function]:
        return f"XLA's form is as fast for rows of up to {_SHORT_ROW[function]} entries"
    if function == "log_softmax":
        return None
    arrays = [a.dtype for a in call.arrays if a is not None and a.dtype != np.bool_]
    wide = [dtype == np.float32 for dtype in (call.dtype, *arrays)]
    longest = _FLOAT32_ROW if all(wide) else _CAST_ROW if any(wide) else 0
    # With a dimension of 1 behind them, XLA makes no one kernel of their derivative.
    if length <= longest and call.axis[-1] == -1:
        return "XLA's form is faster between products, where it fuses casts of float32"
    return None


def reason_against(name: str, call: "RowCall") -> str | None:
    """Why "xla" comes before one of the kernels for a call, or None."""
    x = call.arrays[0]
    if name == "triton" and call.op == ELEMENTWISE:
        return _ELEMENTWISE_BY_XLA
    if name != "triton" or _function(call) is None or not is_known(x.shape):
        return None
    dims = row_layout.merge_dims(x.shape, call.axis, None)
    return None if row_layout.last_in_memory(dims) else _OVER_OTHER_AXES


def _function(call: "RowCall") -> str | None:
    """What of softmax and log_softmax the call has a part in."""
    return next((f for f in _SHORT_ROW if call.op.startswith(f)), None)


def _in_strips(call: "RowCall", dims: tuple[row_layout.Dim, ...]) -> bool:
    """Whether strips of `mosaic_gpu` like these were measured to be faster.

    All arrays of one dtype, without a mask.
    """
    x = call.arrays[0]
    full = [a.dtype for a in call.arrays if a is not None and a.shape == x.shape]
    masked = any(a is not None and a.dtype == np.bool_ for a in call.arrays)
    itemsizes = {np.dtype(dtype).itemsize for dtype in (*full, call.dtype)}
    if masked or len(itemsizes) > 1:
        return False
    *outer, reduced, inner = dims
    if inner.reduced or any(dim.reduced for dim in outer):
        return False
    (itemsize,) = itemsizes
    shortest, longest = _STRIP_LENGTHS
    if not shortest <= reduced.size <= longest or inner.size < _STRIP_ROWS:
        return False
    from jaxsoftmax._rows import mosaic_gpu_strip_plans  # which needs this module

    plan = mosaic_gpu_strip_plans.plan(
        op=call.op,
        length=reduced.size,
        inner=inner.size,
        itemsize=itemsize,
        narrowest=itemsize,
    )
    if isinstance(plan, str):
        return False
    entries = mosaic_gpu_strip_plans.entries(plan, reduced.size)
    return entries <= (1 + _MOST_TWICE) * reduced.size
