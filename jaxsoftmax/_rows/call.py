"""What a kernel call is, for the modules that run it and the one that chooses."""

import dataclasses
import math
from typing import Any

import numpy as np

from jaxsoftmax._rows.row_loss import Options


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of one of the functions that each kernel module has.

    Attributes:
      op: The function's name, ``"softmax"`` for example.
      arrays: Shape and dtype of each array argument, None for an absent `where`.
      axis: What is reduced, as negative ints.
      scale: Multiplies the logits; finite and above 0.
      dtype: The result's.
      options: Of cross-entropy, else None.
    """

    op: str
    arrays: tuple[Any, ...]
    axis: tuple[int, ...]
    scale: float
    dtype: np.dtype
    options: Options | None = None

    @property
    def static(self) -> dict[str, Any]:
        """Keywords of the functions in `_rows.xla` and `xla_loss`."""
        static = {"axis": self.axis, "scale": self.scale, "dtype": self.dtype}
        return static if self.options is None else {**static, "options": self.options}


FUNCTION_OF_STATE = {
    "log_sum_exp_state": "log_softmax",
    "softmax_derivative_state": "softmax_derivative",
    "log_softmax_pushforward_state": "log_softmax_pushforward",
    "log_softmax_pullback_state": "log_softmax_pullback",
}


def function_of(op: str) -> str:
    """Of a state, what follows from it and has its arguments; else `op` itself."""
    return FUNCTION_OF_STATE.get(op, op)


_DTYPES = ("bfloat16", "float16", "float32")
_NOT_COMPUTED_WITH = (np.bool_, np.int32)  # masks and labels


def without_kernel(call: Call) -> str | None:
    """Why no kernel takes a call, whatever it is made with; None if one may."""
    arrays = [a for a in call.arrays if a is not None]
    dtypes = [np.dtype(a.dtype) for a in arrays if a.dtype not in _NOT_COMPUTED_WITH]
    for dtype in (*dtypes, np.dtype(call.dtype)):
        if dtype.name not in _DTYPES:
            return f"{dtype.name} has no kernel"
    if math.prod(arrays[0].shape) == 0:
        return "an empty array"
    return None
