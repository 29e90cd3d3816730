"""Several labels per row: their costs, and the derivatives of these.

Labels, and what belongs to each of them, are [*rows, K]: in one more dimension than the
logits have, behind the others. The kernel is given none of them. The logits at the
labels are read apart, and the gradient there is written into that of a row without a
label: no array has K numbers per entry.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsoftmax._core import dispatch
from jaxsoftmax._rows import row_loss, xla_loss
from jaxsoftmax._rows.call import RowCall
from jaxsoftmax._rows.kernel_call import call_rows
from jaxsoftmax._rows.row_loss import Statistics
from jaxsoftmax._rows.xla_loss import Residuals


def several(labels: jax.Array, x: jax.Array) -> bool:
    """Whether rows of the logits `x` have several labels each."""
    return labels.ndim > x.ndim


def _call(call: RowCall, op: str, *arrays: Any) -> Any:
    """A function of rows that takes several labels, and logits and masks as they are.

    There is no kernel: XLA's, or the definition where `call` asks for that.
    """
    definition = call.implementation == dispatch.DEFINITION
    call = dataclasses.replace(
        call,
        op=op,
        axis=tuple(a - 1 for a in call.axis),
        implementation=dispatch.DEFINITION if definition else ("xla",),
        chunks=None,
    )
    x, where, *rest = arrays
    given = [None if a is None else a[..., None] for a in (x, where)]
    return call_rows(call, *given, *rest)


def _logits(
    call: RowCall,
    x: jax.Array,
    where: jax.Array | None,
    labels: jax.Array,
) -> jax.Array:
    """The logit of each label, -inf where that is masked."""
    found: jax.Array = _call(call, "label_logits", x, where, labels)
    return found


def without_labels(labels: jax.Array) -> jax.Array:
    """A label for each row, which is ignored."""
    return jnp.full(labels.shape[:-1], row_loss.IGNORED, np.int32)


def with_costs(
    call: RowCall,
    x: jax.Array,
    where: jax.Array | None,
    labels: jax.Array,
    numbers: Statistics,
) -> Statistics:
    """The statistics of rows without a label, with the costs of several."""
    logits = _logits(call, x, where, labels)
    below = row_loss.below_label(
        logits, labels, numbers.row_max[..., None], call.scale, call.loss
    )
    nll = row_loss.log_sum(numbers)[..., None] + below
    none = (labels == row_loss.IGNORED) | row_loss.is_empty(numbers)[..., None]
    nll = row_loss.nan_where(labels == row_loss.INVALID, jnp.where(none, 0, nll))
    return numbers._replace(nll=nll)


def definition_of(call: RowCall) -> RowCall:
    """The call whose pullback and pushforward jax can differentiate."""
    return dataclasses.replace(call, implementation=dispatch.DEFINITION)


def _of_one_label(
    call: RowCall, residuals: Residuals, cotangents: Statistics, whole_rows: bool
) -> jax.Array:
    """The cotangent of the logits, of rows with one label each."""
    x, where, labels, numbers = residuals
    for_rows = xla_loss.pullback_numbers(numbers, labels, cotangents)
    call, given = xla_loss.for_pullback(call, for_rows), for_rows.given()
    if not whole_rows:
        return xla_loss.cross_entropy_pullback(x, where, labels, *given, call=call)
    if call.implementation not in (None, dispatch.DEFINITION):
        # What is asked for may have no kernel for it.
        asked = (*call.implementation, "xla")
        call = dataclasses.replace(call, implementation=asked)
    dx: jax.Array = call_rows(call, x, where, labels, *given)
    return dx


def pullback(
    call: RowCall,
    residuals: Residuals,
    cotangents: Statistics,
    *,
    whole_rows: bool = True,
) -> tuple[jax.Array, jax.Array | None]:
    """The cotangents of the logits and, where they are weights, of the labels.

    Of several labels, with the cotangents c of their costs, s the sum of those of one
    label, the gradient at it is ``(sum(c) - s) P + s (P - 1)``, where P - 1 is
    ``expm1(-nll)``, and ``sum(c) - s`` the sum of the others': what a dominant label
    leaves keeps its digits. Elsewhere it is ``sum(c) P``, as of a z-loss.

    Not of `whole_rows`, but of chunks of the vocabulary, there is no call of a kernel.
    """
    x, where, labels, numbers = residuals
    if row_loss.is_dense(labels):
        return xla_loss.dense_pullback(
            residuals, cotangents, call, whole_rows=whole_rows
        )
    if not several(labels, x):
        return _of_one_label(call, residuals, cotangents, whole_rows), None
    c = row_loss.label_weight(cotangents.nll, labels)
    total = jnp.sum(c, -1)
    inverse = row_loss.inverse_sum(numbers)
    row = numbers._replace(nll=jnp.zeros_like(numbers.row_max))
    # A 0 may be that of a row of NaN.
    per_e = cotangents.excess + jnp.where(total == 0, 0, total * inverse)
    base = _of_one_label(
        call,
        (x, where, without_labels(labels), row),
        cotangents._replace(excess=per_e, nll=jnp.zeros_like(total)),
        whole_rows,
    )
    # Of cotangents of opposite signs, too, a row has a gradient.
    alive = xla_loss.with_cotangent(cotangents)[..., None]
    logits = _logits(call, x, where, labels)
    same = labels[..., :, None] == labels[..., None, :]
    own = jnp.sum(jnp.where(same, c[..., None, :], 0), -1)
    others = jnp.sum(jnp.where(same, 0, c[..., None, :]), -1)

    def wide(number: jax.Array) -> jax.Array:
        return number[..., None]

    # Absent labels cost +inf: those masked, -inf, and all of an empty row. In a chunk
    # of the vocabulary, what the next one has too is masked, though it costs less.
    present = (numbers.nll != jnp.inf) & ~wide(row_loss.is_empty(numbers))
    present = present & (logits != -jnp.inf)
    nll = jnp.where(present, numbers.nll, jnp.inf)
    below = jnp.where(present, numbers.nll - wide(row_loss.log_sum(numbers)), jnp.inf)
    e = jnp.exp(-below)
    dz = others * (e * wide(inverse)) + own * jnp.where(present, jnp.expm1(-nll), 0)
    dz = dz + wide(cotangents.excess) * e
    if cotangents.uniform_nll is not None:
        assert numbers.entries is not None
        constant = cotangents.uniform_nll / jnp.maximum(numbers.entries, 1)
        dz = dz + wide(cotangents.uniform_nll * inverse) * e - wide(constant)
    if cotangents.entropy is not None:
        assert cotangents.below_mean is not None
        assert numbers.below_mean is not None
        # As in `cross_entropy_pullback`.
        mean_ct = cotangents.below_mean
        dz = dz - wide(jnp.where(mean_ct == 0, 0, mean_ct * inverse)) * e
        e_below = e * jnp.where(below == jnp.inf, 0, below)
        from_mean = e_below - e * wide(numbers.below_mean)
        dz = dz + wide((cotangents.entropy + mean_ct) * inverse) * from_mean
    slope = row_loss.slope(logits, call.scale, call.loss)
    values = jnp.where(alive & present, dz * slope, 0).astype(call.dtype)
    # One of several labels that are the same, which all have the same value.
    first = jnp.any(jnp.tril(same, -1), -1)
    labels = jnp.where(first, row_loss.ELSEWHERE, labels)
    dx = _call(call, "with_labels", base, None, labels, values)
    return jnp.squeeze(dx, -1), None


def pushforward(
    call: RowCall,
    residuals: Residuals,
    x_dot: jax.Array | None,
    labels_dot: jax.Array | None,
) -> Statistics:
    """`xla_loss.cross_entropy_pushforward`, of rows with several labels too."""
    x, where, labels, _ = residuals
    at_labels = None
    if x_dot is not None and several(labels, x):
        wide = dataclasses.replace(call, dtype=x_dot.dtype)
        logits = _logits(call, x, where, labels)
        slope = row_loss.slope(logits, call.scale, call.loss)
        dot = _logits(wide, x_dot, None, labels) * slope
        at_labels = jnp.where(logits == -jnp.inf, 0, dot)
    return xla_loss.cross_entropy_pushforward(
        residuals, x_dot, labels_dot, call, at_labels=at_labels
    )
