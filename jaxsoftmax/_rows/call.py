"""What a call of a function of rows is, from the public function to the kernel."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsoftmax._core.dispatch import Family
from jaxsoftmax._core.shapes import row_shape
from jaxsoftmax._rows import defaults, row_loss
from jaxsoftmax._rows.row_loss import Options

ROWS = Family(
    {
        "xla": "jaxsoftmax._rows.xla_loss",
        "mosaic_gpu": "jaxsoftmax._rows.mosaic_gpu",
        "triton": "jaxsoftmax._rows.triton",
    },
    {"cuda": ("mosaic_gpu", "triton", "xla"), "rocm": ("triton", "xla")},
    reason_for_xla=lambda call: defaults.reason_for_xla(call),
    reason_against=lambda name, call: defaults.reason_against(name, call),
)


@dataclasses.dataclass(frozen=True)
class RowCall:
    """A call of a function of rows: all of it but the arrays' values.

    Made where the public function checks its arguments, and handed on as it is to the
    rules, the primitive and the backends.

    Attributes:
      op: The function's name, ``"softmax"`` for example.
      axis: What is reduced, as negative ints in increasing order: a mapped axis is one
        more dimension.
      scale: Multiplies the logits; finite and above 0.
      dtype: The result's.
      options: Of cross-entropy, else None.
      arrays: Shape and dtype of each array argument, None for an absent `where`. Known
        where a backend is asked; else empty.
      logits_dtype: That of the logits' gradient, where it is not `dtype`.
      implementation: Which implementations to try; None for the best.
      alone: Whether a kernel's first result is all that is used.
      chunks: The chunks of a linear loss, of which this is one; for `explain` alone.
    """

    op: str
    axis: tuple[int, ...]
    scale: float
    dtype: np.dtype
    options: Options | None = None
    arrays: tuple[Any, ...] = ()
    logits_dtype: np.dtype | None = None
    implementation: tuple[str, ...] | None = None
    alone: bool = False
    chunks: str | None = dataclasses.field(default=None, repr=False)

    @property
    def loss(self) -> Options:
        """The options of a call of cross-entropy."""
        assert self.options is not None
        return self.options

    @property
    def unit(self) -> float:
        """See `row_loss.unit`."""
        return row_loss.unit(self.scale, self.loss)

    def tangent(self, op: str) -> "RowCall":
        """The pushforward `op`: a result of this call's dtype."""
        return dataclasses.replace(self, op=op)

    def cotangent(self, op: str) -> "RowCall":
        """The pullback `op`: a result of the logits' dtype."""
        return dataclasses.replace(self, op=op, dtype=self.logits_dtype or self.dtype)

    def expects_xla(self, x: jax.Array) -> bool:
        """Whether the call with these logits is expected to run as XLA on a GPU."""
        if self.implementation is not None:
            return self.implementation[0] == "xla"
        return ROWS.reason_for_xla(dataclasses.replace(self, arrays=(x,))) is not None

    def kernel_form(self) -> "RowCall":
        """The call as kernels have it: without an index, with the row's state."""
        op = {
            "softmax_with_index": "softmax",
            "log_softmax_alone": "log_softmax",
            "log_sum_exp": "log_sum_exp_state",
        }
        arrays = self.arrays
        if function_of(self.op) == "softmax_derivative":
            arrays = (*arrays[:2], None)
        elif function_of(self.op).startswith("log_softmax_p") and arrays[2] is None:
            x, where, *state, t = arrays
            rows = jax.ShapeDtypeStruct(row_shape(x.shape, self.axis), np.float32)
            arrays = (x, where, *(rows for _ in state), t)
        return dataclasses.replace(
            self,
            op=op.get(self.op, self.op),
            arrays=arrays,
            alone=self.op == "log_softmax_alone",
        )

    def from_kernel_form(self, outs: list[jax.Array]) -> list[jax.Array]:
        """The results, given those of `kernel_form`: a 0 for an index."""
        if self.op == "softmax_with_index":
            return [*outs, jnp.zeros(row_shape(outs[0].shape, self.axis), np.float32)]
        return outs[:1] if self.op == "log_softmax_alone" else outs


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


def without_kernel(call: RowCall) -> str | None:
    """Why no kernel takes a call, whatever it is made with; None if one may."""
    if call.op == "weighted_log_sum_exp":
        return "sums of exponentials with weights have no kernel"
    if call.op == "softmax_derivative_anew":
        return "derivatives from the logits have no kernel"
    arrays = [a for a in call.arrays if a is not None]
    dtypes = [np.dtype(a.dtype) for a in arrays if a.dtype not in _NOT_COMPUTED_WITH]
    for dtype in (*dtypes, np.dtype(call.dtype)):
        if dtype.name not in _DTYPES:
            return f"{dtype.name} has no kernel"
    if math.prod(arrays[0].shape) == 0:
        return "an empty array"
    return None
