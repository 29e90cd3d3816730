"""Which implementation a function of rows runs with by default on a GPU.

XLA's form of a call is one kernel, as a kernel's is, and XLA can fuse it with the
elementwise operations around it. A kernel is the default where it was measured to be
faster; docs/performance.md has the measurements.
"""

import math

from jaxsoftmax._core.dispatch import Call
from jaxsoftmax._core.shapes import is_known

# Entries up to which all launches take about as long, and a fusion is worth more.
_SMALL = 2**22
_SHORT_ROW = 128
_FUNCTIONS = ("softmax", "log_softmax")


def reason_for_xla(call: Call) -> str | None:
    """Why "xla" comes before the kernels for a call, or None."""
    x = call.arrays[0]
    if not call.op.startswith(_FUNCTIONS) or not is_known(x.shape):
        return None
    if math.prod(x.shape) <= _SMALL:
        return f"XLA's form is as fast for arrays of up to {_SMALL} entries"
    if math.prod(x.shape[a] for a in call.axis) <= _SHORT_ROW:
        return f"XLA's form is as fast for rows of up to {_SHORT_ROW} entries"
    if call.axis != tuple(range(-len(call.axis), 0)):
        return "XLA's form is as fast over axes that are not last"
    return None
