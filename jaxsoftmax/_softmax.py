"""softmax and log_softmax: the public functions and their derivative rules."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import ArrayLike, DTypeLike

from jaxsoftmax._core import checks, dispatch
from jaxsoftmax._core.autodiff import forward_mode
from jaxsoftmax._core.checks import Axis
from jaxsoftmax._rows import xla
from jaxsoftmax._rows.call import ROWS, RowCall
from jaxsoftmax._rows.kernel_call import before_cast, call_rows
from jaxsoftmax._rows.scaling import multiply

# What the backward keeps, by the name that policies of jax.checkpoint know it by.
PROBABILITIES_NAME = "jaxsoftmax_probabilities"
ROW_MAX_NAME = "jaxsoftmax_row_max"
# The operation of what log_softmax's derivative needs, without log_softmax.
_STATE = "log_sum_exp_state"


def _absent_is_constant(x: jax.Array) -> jax.Array:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    return jnp.where(x == -jnp.inf, jnp.full_like(x, -jnp.inf), x)


def _defined(rule: Callable[..., Any]) -> Callable[..., Any]:
    """The rule in operations that jax can differentiate."""

    def definition(call: RowCall, residuals: Any, tangents: Any) -> Any:
        plain = dataclasses.replace(call, implementation=dispatch.DEFINITION)
        # An entry of -inf is constant: its tangent, whatever it is, meets no product.
        residuals = jax.tree.map(_absent_is_constant, residuals)
        return rule(plain, residuals, tangents)

    return definition


def _one_kernel_of_xla(call: RowCall, x: jax.Array) -> bool:
    """Whether the call is expected to run on a GPU, as XLA and as one kernel."""
    on_gpu = jax.default_backend() == "gpu"
    return on_gpu and xla.fused_on_gpu(x.shape, call.axis) and call.expects_xla(x)


# --- softmax: keeps P; dx = P (g - sum(P g)) ------------------------------------------
#
# The function of the rules returns (P,), or (P, index): see `_forward_op`. Its
# residuals are these and (), or () and the logits with their mask.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _softmax_rule(
    call: RowCall, x: jax.Array, where: jax.Array | None
) -> tuple[jax.Array, ...]:
    outs = call_rows(call, x, where)
    return outs if isinstance(outs, tuple) else (outs,)


def _keeps_logits(call: RowCall, x: jax.Array) -> bool:
    """Whether P is computed anew in the backward: where XLA for GPUs does, in float32.

    A P that is cast to 16 bits for the product after it would be stored twice. XLA
    reads logits of 16 bits, whose cast and scale it fuses, once in the forward and once
    in the backward. A jitted `jax.nn.softmax` has it keep them too.
    """
    return call.dtype.itemsize > 2 and _one_kernel_of_xla(call, x)


def _softmax_forward(
    call: RowCall, x: jax.Array, where: jax.Array | None
) -> tuple[tuple[jax.Array, ...], Any]:
    outs = _softmax(call, x, where)
    if _keeps_logits(call, x):
        return outs, ((), (checkpoint_name(x, PROBABILITIES_NAME), where))
    outs = checkpoint_name(outs, PROBABILITIES_NAME)
    return outs, (outs, ())


def _softmax_backward(
    call: RowCall, residuals: Any, cotangents: Any
) -> tuple[jax.Array, None]:
    return _softmax_derivative(call, call.cotangent, residuals, cotangents[0]), None


def _softmax_pushforward(
    call: RowCall, residuals: Any, tangents: Any
) -> tuple[jax.Array, ...]:
    p_dot = _softmax_derivative(call, call.tangent, residuals, tangents[0])
    return p_dot, *(jnp.zeros_like(index) for index in residuals[0][1:])


def _not_shared(x: jax.Array) -> jax.Array:
    """Logits of which XLA does not see that they are those of the forward.

    It would store what a backward has in common with that.
    """
    return x * lax.optimization_barrier(np.ones((), x.dtype))


def _softmax_derivative(
    call: RowCall, named: Callable[[str], RowCall], residuals: Any, t: jax.Array
) -> Any:
    outs, logits = residuals
    if logits:
        x, where = logits
        x = _not_shared(x)
        if call.implementation != dispatch.DEFINITION:
            return call_rows(named("softmax_derivative_anew"), x, where, t)
        outs = _softmax(call, x, where)
    p, index = (*outs, None)[:2]
    return call_rows(named("softmax_derivative"), p, t, index)


_softmax_rule.defvjp(_softmax_forward, _softmax_backward)
_softmax = forward_mode(
    _softmax_rule,
    _softmax_pushforward,
    pushforward_definition=_defined(_softmax_pushforward),
    pullback_definition=_defined(_softmax_backward),
    one_rank=True,
)


# --- log_softmax: keeps x; dx = g - P sum(g) ------------------------------------------
#
# The function of the rules returns (y, row_max, excess), or (y,): see `_forward_op`; or
# the last two, see `_log_softmax_without`.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _log_softmax_rule(
    call: RowCall, x: jax.Array, where: jax.Array | None
) -> tuple[jax.Array, ...]:
    outs = call_rows(call, x, where)
    return outs if isinstance(outs, tuple) else (outs,)


def _log_softmax_forward(
    call: RowCall, x: jax.Array, where: jax.Array | None
) -> tuple[tuple[jax.Array, ...], Any]:
    outs = _log_softmax(call, x, where)
    has_y = call.op != _STATE
    state = checkpoint_name(outs[has_y:], ROW_MAX_NAME)
    return (*outs[:has_y], *state), (x, where, state)


def _log_softmax_backward(
    call: RowCall, residuals: Any, cotangents: Any
) -> tuple[jax.Array, None]:
    x, where, state = residuals
    if call.op == _STATE:
        return jnp.zeros_like(x), None
    row_max, excess = state or (None, None)
    call = call.cotangent("log_softmax_pullback")
    x = x if state else _not_shared(x)
    return call_rows(call, x, where, row_max, excess, cotangents[0]), None


def _log_softmax_pushforward(
    call: RowCall, residuals: Any, tangents: Any
) -> tuple[jax.Array, ...]:
    x, where, state = residuals
    # Any derivative of the maximum would cancel in P; 0 is the one that is free. The
    # definition of the pullback computes the excess anew, and uses none of its.
    of_state = tuple(jnp.zeros_like(number) for number in state)
    if call.op == _STATE:
        return of_state
    call = call.tangent("log_softmax_pushforward")
    x = x if state else _not_shared(x)
    y_dot = call_rows(call, x, where, state[0] if state else None, tangents[0])
    return y_dot, *of_state


def _log_softmax_without(call: RowCall, used: Sequence[bool]) -> RowCall | None:
    """A call of y alone, which is not differentiated; or of what a derivative needs.

    The latter where y itself is of no use, as in `jax.grad` of a loss; of rows that are
    last in memory: kernels have no state of others.
    """
    if call.op != "log_softmax":
        return None
    ops: dict[tuple[bool, ...], str] = {(True, False, False): "log_softmax_alone"}
    if call.axis == tuple(range(-len(call.axis), 0)):
        ops[False, True, True] = _STATE
    op = ops.get(tuple(used))
    return None if op is None else dataclasses.replace(call, op=op)


_log_softmax_rule.defvjp(_log_softmax_forward, _log_softmax_backward)
_log_softmax = forward_mode(
    _log_softmax_rule,
    _log_softmax_pushforward,
    pushforward_definition=_defined(_log_softmax_pushforward),
    pullback_definition=_defined(_log_softmax_backward),
    without=_log_softmax_without,
    one_rank=True,
)


# --- the public functions -------------------------------------------------------------


def _forward_op(call: RowCall, x: jax.Array) -> str:
    """The function with what its derivative is expected to need where it will run.

    All derivatives do without, more slowly: here the platform is not known yet. The
    index of the largest entry, which softmax's takes the cotangents relative to, costs
    less on TPUs than to find it. log_softmax's kernels need the maximum and the sum of
    a row, and so does XLA on CPUs and TPUs; XLA on a GPU makes one kernel without, of
    rows that it can.
    """
    if call.implementation == dispatch.DEFINITION:
        return call.op
    if call.op == "softmax":
        on_tpu = jax.default_backend() == "tpu"
        with_index = on_tpu and xla.can_have_index(x.shape, call.axis)
        return "softmax_with_index" if with_index else "softmax"
    return "log_softmax_alone" if _one_kernel_of_xla(call, x) else "log_softmax"


@functools.partial(jax.jit, static_argnums=0)
def _run_softmax(
    call: RowCall, x: jax.Array, where: jax.Array | None, scale: jax.Array | None
) -> jax.Array:
    if scale is not None:
        x = multiply(x, scale, where)
    call = dataclasses.replace(call, op=_forward_op(call, x), logits_dtype=x.dtype)
    return _softmax(call, x, where)[0]


@functools.partial(jax.jit, static_argnums=0)
def _run_log_softmax(
    call: RowCall, x: jax.Array, where: jax.Array | None, scale: jax.Array | None
) -> jax.Array:
    if scale is not None:
        x = multiply(x, scale, where)
    call = dataclasses.replace(call, op=_forward_op(call, x), logits_dtype=x.dtype)
    return _log_softmax(call, x, where)[0]


def _prepare(
    op: str,
    x: ArrayLike,
    axis: Axis,
    where: ArrayLike | None,
    scale: ArrayLike | None,
    dtype: DTypeLike | None,
    implementation: str | Sequence[str] | None,
) -> tuple[RowCall, jax.Array, jax.Array | None, jax.Array | None]:
    """Checks the arguments; returns the static part, logits, mask and scale array."""
    asked = dispatch.resolve(implementation, ROWS)
    x = checks.check_logits(x)
    axes = checks.check_axis(axis, x.shape)
    x, where = checks.check_where(where, x)
    number, array = checks.check_scale(scale, x)
    out_dtype = checks.check_dtype(dtype, x.dtype)
    if array is None and op == "log_softmax":
        x = before_cast(x, asked)
    call = RowCall(op, axes, number, out_dtype, implementation=asked)
    return call, x, where, array


def softmax(
    x: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    *,
    scale: ArrayLike | None = None,
    dtype: DTypeLike | None = None,
    implementation: str | Sequence[str] | None = None,
) -> jax.Array:
    r"""Softmax, ``P = exp(scale x) / sum(exp(scale x))`` over `axis`.

    A drop-in for `jax.nn.softmax`. The backward keeps P in the output's dtype and, on
    TPUs, one float32 per row, with and without `where`; or, with a float32 output that
    XLA computes on a GPU, over last axes of up to 16,384 entries, the logits that P is
    computed from anew, as a jitted `jax.nn.softmax` has XLA keep them. It computes::

        dx = scale P (g - sum(P g)) = scale (diag(P) - P P^T) g

    without the Jacobian. What g is at the row's largest P is taken out of it first, so
    that neither a dominant entry nor a constant offset in g causes cancellation.
    Every derivative mode works: ``grad``, ``jvp``, ``hessian``, and any nesting.

    Arithmetic is float32 inside (float64 for float64) with one rounding at the end. The
    relative error of P is up to ``2 + |x - max| / 2`` eps of it, as `jax.nn.softmax`'s.

    Args:
      x: Logits of any shape; a floating dtype, or integers, which become the default
        float. An entry of -inf has no part in its row.
      axis: What sums to 1: an int, a tuple of ints, or None for all of `x`.
      where: Bool mask that broadcasts with `x`, in its dimensions; False entries have
        no part in their row, whatever their value, NaN included.
      scale: Multiplies `x` first (an inverse temperature): a finite number, or a real
        array, traced or not, that broadcasts to `x`, which is differentiable.
      dtype: The output's floating dtype; default: that of `x`. Before a product in
        bfloat16, ``dtype=jnp.bfloat16`` instead of a cast of the result: the backward
        keeps that one array of 2 bytes per entry, which the product keeps too.
      implementation: None for the best that can run, ``"xla"``, ``"mosaic_gpu"`` or
        ``"triton"``, or a sequence of these to try in order; `explain` says which runs.

    Returns:
      P, of the shape of `x`, or of `where` if that is larger. Masked and -inf entries
      are 0, with gradient 0. A row with no entry left is all 0 (`jax.nn.softmax` gives
      NaN for a row of -inf). A row with NaN or +inf among its unmasked entries is NaN
      in these entries.

    Raises:
      TypeError: an argument of a wrong type or dtype; a `where` that is not bool.
      ValueError: `axis` out of range or repeated, `where` of a shape that does not
        broadcast with that of `x`, `scale` of one that does not broadcast to it, or not
        finite, an unknown `implementation`.
      NotImplementedError: no `implementation` that was asked for can run on the
        platform that the call is compiled for; says why.

    Under `jax.checkpoint`, what the backward keeps has the name
    ``"jaxsoftmax_probabilities"``, for `jax.checkpoint_policies.save_only_these_names`.

    References:
      D = sum(P g), one number per row: Dao et al., FlashAttention, arXiv:2205.14135,
      Appendix B.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxsoftmax import softmax
      >>> x = jnp.array([1.0, 2.0, 3.0])
      >>> with jnp.printoptions(precision=4):
      ...     print(softmax(x))
      ...     print(softmax(x, where=jnp.array([True, True, False])))
      ...     print(jax.grad(lambda x: softmax(x, scale=0.5)[0])(x))
      [0.09   0.2447 0.6652]
      [0.2689 0.7311 0.    ]
      [ 0.0758 -0.0286 -0.0472]
    """
    return _run_softmax(
        *_prepare("softmax", x, axis, where, scale, dtype, implementation)
    )


def log_softmax(
    x: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    *,
    scale: ArrayLike | None = None,
    dtype: DTypeLike | None = None,
    implementation: str | Sequence[str] | None = None,
) -> jax.Array:
    r"""The logarithm of `softmax`, ``y = scale x - log(sum(exp(scale x)))``.

    A drop-in for `jax.nn.log_softmax`. The backward keeps `x` and at most two float32
    per row (the maximum, and the sum relative to it; float64 for float64), and
    computes::

        dx = scale (g - P sum(g)),   P = exp(y)

    Every derivative mode works. Arithmetic is float32 inside (float64 for float64) with
    one rounding at the end; the largest entry of a confident row, -log(1 + rest), keeps
    its digits.

    Args:
      x: Logits of any shape; a floating dtype, or integers, which become the default
        float. An entry of -inf has no part in its row.
      axis: What is normalised: an int, a tuple of ints, or None for all of `x`.
      where: Bool mask that broadcasts with `x`, in its dimensions; False entries have
        no part in their row.
      scale: Multiplies `x` first (an inverse temperature): a finite number, or a real
        array, traced or not, that broadcasts to `x`, which is differentiable.
      dtype: The output's floating dtype; default: that of `x`.
      implementation: None for the best that can run, ``"xla"``, ``"mosaic_gpu"`` or
        ``"triton"``, or a sequence of these to try in order; `explain` says which runs.

    Returns:
      y, of the shape of `x`, or of `where` if that is larger. Masked and -inf entries
      are -inf, with gradient 0; so is every entry of a row with no entry left. A row
      with NaN or +inf among its unmasked entries is NaN in these entries.

    Raises:
      TypeError, ValueError, NotImplementedError: as `softmax`.

    Under `jax.checkpoint`, the two have the name ``"jaxsoftmax_row_max"``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxsoftmax import log_softmax
      >>> x = jnp.array([1.0, 2.0, 3.0])
      >>> with jnp.printoptions(precision=4):
      ...     print(log_softmax(x))
      ...     print(jax.grad(lambda x: log_softmax(x)[2])(x))
      [-2.4076 -1.4076 -0.4076]
      [-0.09   -0.2447  0.3348]
    """
    return _run_log_softmax(
        *_prepare("log_softmax", x, axis, where, scale, dtype, implementation)
    )
