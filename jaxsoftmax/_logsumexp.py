"""logsumexp: the public function and its derivative rule."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import ArrayLike

from jaxsoftmax._core import checks, dispatch
from jaxsoftmax._core.autodiff import forward_mode
from jaxsoftmax._core.checks import Axis
from jaxsoftmax._rows import log_sum_exp, row_loss
from jaxsoftmax._rows.call import ROWS, RowCall
from jaxsoftmax._rows.kernel_call import before_cast, call_rows
from jaxsoftmax._rows.log_sum_exp import Terms
from jaxsoftmax._rows.xla import rowwise_sum
from jaxsoftmax._softmax import softmax

# What the backward keeps, by the name that policies of jax.checkpoint know it by.
LOG_SUM_EXP_NAME = "jaxsoftmax_log_sum_exp"


# --- keeps x and two numbers per row; dx = P g ----------------------------------------
#
# The function of the rules returns (log|S|, shift, total) with S = total exp(shift), as
# rows of size 1. The last two have no derivative: no definition makes use of them.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _log_sum_exp_rule(
    call: RowCall, x: jax.Array, where: jax.Array | None, b: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    if b is None:
        numbers = call_rows(call, x, where)
        y, shift, total = row_loss.in_vectors(log_sum_exp.from_excess, *numbers)
    else:
        numbers = call_rows(call, x, where, b)
        y, shift, total = row_loss.in_vectors(log_sum_exp.from_parts, *numbers)
    return y.astype(call.dtype), shift, total


def _log_sum_exp_forward(
    call: RowCall, x: jax.Array, where: jax.Array | None, b: jax.Array | None
) -> tuple[Any, Any]:
    y, *numbers = _log_sum_exp(call, x, where, b)
    numbers = checkpoint_name(numbers, LOG_SUM_EXP_NAME)
    return (y, *numbers), (x, where, b, *numbers)


def _shares(residuals: Any, call: RowCall) -> Terms:
    """Each term's share of its sum: P, and what it is with weights."""
    x, where, b, shift, total = residuals
    return log_sum_exp.terms(x, where, b, shift).over(total)


def _shares_definition(residuals: Any, call: RowCall) -> Terms:
    """The same, with derivatives: without weights those of softmax, which are exact."""
    x, where, b, shift, _ = residuals
    # An entry of -inf is constant: its tangent, whatever it is, meets no product.
    x = jnp.where(x == -jnp.inf, jnp.full_like(x, -jnp.inf), x)
    found = log_sum_exp.terms(x, where, b, shift)
    if b is not None:
        return found.over(rowwise_sum(found.weighted, call.axis))
    p = softmax(x, call.axis, where, dtype=shift.dtype, implementation="xla")
    return Terms(p, p, found.present)


def _backward(
    call: RowCall, residuals: Any, cotangents: Any, shares: Any = _shares
) -> tuple[jax.Array, None, jax.Array | None]:
    call = call.cotangent(call.op)
    found = shares(residuals, call)
    dx, db = log_sum_exp.pullback(found, residuals[2], cotangents[0], call)
    return dx, None, db


def _pushforward(
    call: RowCall, residuals: Any, tangents: Any, shares: Any = _shares
) -> tuple[jax.Array, ...]:
    x_dot, _, b_dot = tangents
    y_dot = log_sum_exp.pushforward(shares(residuals, call), x_dot, b_dot, call)
    return y_dot, *(jnp.zeros_like(number) for number in residuals[3:])


_log_sum_exp_rule.defvjp(_log_sum_exp_forward, _backward)
_log_sum_exp = forward_mode(
    _log_sum_exp_rule,
    _pushforward,
    pushforward_definition=functools.partial(_pushforward, shares=_shares_definition),
    pullback_definition=functools.partial(_backward, shares=_shares_definition),
)


# --- the public function --------------------------------------------------------------


def _check_weights(
    b: ArrayLike, a: jax.Array, x: jax.Array
) -> tuple[jax.Array, jax.Array, np.dtype]:
    """`x` and `b`, floats that broadcast to it, and the result's dtype.

    As in jax.nn, that is what jax promotes `a` and `b` to, and `b` may be larger than
    `x`, which then gets the shape of both; but not of a higher rank.
    """
    b = checks.as_array(b, "b")
    if b.dtype != np.bool_:
        b = checks.real("b", b)
    shape = checks.broadcast_shape(b.shape, x.shape)
    if shape is None or len(shape) > x.ndim:
        raise ValueError(
            f"b of shape {b.shape} does not broadcast with a's shape {x.shape} in its "
            f"{x.ndim} dimensions"
        )
    with jax.numpy_dtype_promotion("standard"):
        dtype = np.dtype(jnp.result_type(a, b))
    if not jnp.issubdtype(dtype, jnp.floating):
        dtype = x.dtype
    if not jnp.issubdtype(b.dtype, jnp.floating):
        b = b.astype(np.float64 if dtype == np.float64 else np.float32)
    return checks.broadcast(x, shape), checks.with_rank(b, x.ndim), dtype


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _run_logsumexp(
    call: RowCall,
    keepdims: bool,
    return_sign: bool,
    x: jax.Array,
    where: jax.Array | None,
    b: jax.Array | None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    y, _, total = _log_sum_exp(call, x, where, b)
    if b is not None and not return_sign:
        negative = total < 0
        y = row_loss.nan_where(negative, jnp.where(negative, 0, y))
    if not keepdims:
        y, total = (lax.squeeze(each, call.axis) for each in (y, total))
    if not return_sign:
        return y
    return y, jnp.sign(total).astype(call.dtype)


@overload
def logsumexp(
    a: ArrayLike,
    axis: Axis = None,
    b: ArrayLike | None = None,
    keepdims: bool = False,
    return_sign: Literal[False] = False,
    where: ArrayLike | None = None,
    *,
    implementation: str | Sequence[str] | None = None,
) -> jax.Array: ...


@overload
def logsumexp(
    a: ArrayLike,
    axis: Axis = None,
    b: ArrayLike | None = None,
    keepdims: bool = False,
    *,
    return_sign: Literal[True],
    where: ArrayLike | None = None,
    implementation: str | Sequence[str] | None = None,
) -> tuple[jax.Array, jax.Array]: ...


@overload
def logsumexp(
    a: ArrayLike,
    axis: Axis = None,
    b: ArrayLike | None = None,
    keepdims: bool = False,
    return_sign: bool = False,
    where: ArrayLike | None = None,
    *,
    implementation: str | Sequence[str] | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]: ...


def logsumexp(
    a: ArrayLike,
    axis: Axis = None,
    b: ArrayLike | None = None,
    keepdims: bool = False,
    return_sign: bool = False,
    where: ArrayLike | None = None,
    *,
    implementation: str | Sequence[str] | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    r"""The logarithm of a sum of exponentials, ``log(sum(b exp(a)))`` over `axis`.

    A drop-in for `jax.nn.logsumexp`, which is `jax.scipy.special.logsumexp`. The
    backward keeps `a` and `b` as they came, and two numbers per row (float32; float64
    for float64), not P. It computes, with the result's sum S::

        da = g b exp(a) / S,  which is  g softmax(a)  without b
        db = g exp(a) / S

    Every derivative mode works. Arithmetic is float32 inside (float64 for float64) with
    one rounding at the end. Where one entry dominates a row, the others are added to it
    by log1p, so that a result near 0 keeps its digits.

    Args:
      a: Logits of any shape; a floating dtype, or integers, which become the default
        float. An entry of -inf has no part in its row.
      axis: What is summed over: an int, a tuple of ints, or None for all of `a`.
      b: Real weights of the exponentials, of any sign, which broadcast with `a`, in its
        dimensions; differentiable. With terms of both signs the error of S is relative
        to the sum of their sizes. An entry whose weight is 0 has no part in its row,
        and the gradient exp(a) / S for the weight, or 0 where that is no finite number.
        A form of XLA: no kernel takes it.
      keepdims: Keep what is summed over as dimensions of size 1.
      return_sign: Return the pair ``(log|S|, sign of S)``. Else, as in `jax.nn`, the
        result is NaN where S is negative, and its gradient 0.
      where: Bool mask that broadcasts with `a`, in its dimensions; False entries have
        no part in their row, whatever their value, NaN included.
      implementation: None for the best that can run, ``"xla"``, ``"mosaic_gpu"`` or
        ``"triton"``, or a sequence of these to try in order; `explain` says which runs.

    Returns:
      log(S), of the dtype of `a`, or of that which jax promotes `a` and `b` to, and of
      the shape of `a` without `axis`; or the pair, of arrays that are alike.

      A row with no entry left is -inf, sign 0, with gradient 0. So is one whose terms
      cancel exactly, where the derivative is infinite. A row with NaN or +inf among its
      unmasked entries is NaN (`jax.nn` gives +inf for +inf). A row whose cotangent is 0
      has gradient 0, whatever is in it.

    Raises:
      TypeError: an argument of a wrong type or dtype: a complex `a` or `b`, a `where`
        that is not bool.
      ValueError: `axis` out of range or repeated, `where` or `b` of a shape that does
        not broadcast with that of `a`, an unknown `implementation`.
      NotImplementedError: no `implementation` that was asked for can run on the
        platform that the call is compiled for; says why.

    Under `jax.checkpoint`, the numbers per row have the name
    ``"jaxsoftmax_log_sum_exp"``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxsoftmax import logsumexp
      >>> x = jnp.array([[1.0, 2.0, 3.0], [0.0, -30.0, -jnp.inf]])
      >>> print(logsumexp(x, axis=-1))
      [3.407606e+00 9.357623e-14]
      >>> with jnp.printoptions(precision=4, suppress=True):
      ...     print(jax.grad(logsumexp)(x))
      ...     value, sign = logsumexp(x[0], b=jnp.array([1, 1, -1]), return_sign=True)
      ...     print(value, sign)  # of e + e^2 - e^3
      [[0.0871 0.2369 0.6439]
       [0.0321 0.     0.    ]]
      2.3004026 -1.0
    """
    asked = dispatch.resolve(implementation, ROWS)
    a = checks.as_array(a, "a")
    x = checks.check_logits(a, "a")
    axes = checks.check_axis(axis, x.shape, "a")
    keepdims = checks.check_flag("keepdims", keepdims)
    return_sign = checks.check_flag("return_sign", return_sign)
    x, where = checks.check_where(where, x, "a")
    call = RowCall("log_sum_exp", axes, 1.0, x.dtype, implementation=asked)
    if b is None:
        x = before_cast(x, asked)
    else:
        x, b, dtype = _check_weights(b, a, x)
        call = dataclasses.replace(call, op="weighted_log_sum_exp", dtype=dtype)
    call = dataclasses.replace(call, logits_dtype=x.dtype)
    return _run_logsumexp(call, keepdims, return_sign, x, where, b)
