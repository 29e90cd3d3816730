"""Softmax and its derivatives on NVIDIA GPUs, through Pallas Mosaic GPU.

One kernel per call: every array is read once and the result written once, up to the
longest row that `mosaic_gpu_plans` has a split for; longer ones are read twice.

A row is split over blocks of a cluster, warpgroups of a block and warps of a warpgroup.
Each warp reduces its share to a few numbers, its *state*: for softmax the maximum and
the sum of exponentials relative to it. States merge, as those of an online softmax do,
first in the block and then over the cluster, through (distributed) shared memory; then
each warp computes its share of the result. That is the skeleton, in
`mosaic_gpu_kernel`, `mosaic_gpu_short_rows` and `mosaic_gpu_long_rows`. What the state
of a share is, how states merge and what the result is, is defined by the operation, in
`mosaic_gpu_ops`.

Where a share is kept in between, and over what a row is split, is a `Plan`:

- ``"rows"``: 2 to 32 lanes of a warp have a row, in registers. Nothing is shared.
- ``"warps"``: a warp has a row, in shared memory.
- ``"registers"``, ``"shared"``: a cluster has a row; each warp keeps its share in
  registers or, read by bulk copies, in shared memory, with the last tiles in registers
  if the plan says so. A row that is more than that is read twice, in chunks.
- ``"stream"``: a cluster has a row of which nothing is kept, in chunks in registers.

In memory a share is made of *tiles*: four warps by 32 lanes by a vector of 16 bytes, of
as many rows, or units of a row of `width` entries, as `Plan.height` says. Arrays are
viewed as such units; but as flat where rows start between vectors, or are no whole
tiles (`Plan.ragged`): see `_compat.mosaic_gpu_vectors`.

Semantics and numerics are those of `_rows.xla`; what differs is noted at each `Op`.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxsoftmax._compat import mosaic_gpu as _compat
from jaxsoftmax._compat.mosaic_gpu_vectors import MASK_PADDING
from jaxsoftmax._core.device import Device
from jaxsoftmax._core.shapes import row_shape
from jaxsoftmax._rows import (
    mosaic_gpu_plans,
    mosaic_gpu_strips,
    row_layout,
    row_loss,
    xla_loss,
)
from jaxsoftmax._rows.call import RowCall, without_kernel
from jaxsoftmax._rows.mosaic_gpu_long_rows import long_rows_kernel
from jaxsoftmax._rows.mosaic_gpu_plans import Plan
from jaxsoftmax._rows.mosaic_gpu_problem import Problem, arguments, mask_strides
from jaxsoftmax._rows.mosaic_gpu_short_rows import short_rows_kernel


def problem_of(call: RowCall, plan: Plan | None = None) -> Problem | str:
    """The call as its kernel sees it, or why there is no kernel for it."""
    reason = without_kernel(call)
    if reason is not None:
        return reason
    values, where, row_inputs = arguments(call.op, call.arrays)
    x = values[0]
    dtypes = tuple(np.dtype(v.dtype) for v in values)
    dims = row_layout.merge_dims(
        x.shape, call.axis, where.shape if where is not None else None
    )
    rows, length = (
        row_layout.count(dims, reduced=False),
        row_layout.count(dims, reduced=True),
    )
    reduced = [d for d in dims if d.reduced]
    if any(d.reduced and not e.reduced for d, e in itertools.pairwise(dims)):
        return mosaic_gpu_strips.problem(call, plan)
    masked = any(d.masked for d in dims)
    if masked and not (len(reduced) == 1 and reduced[0].masked):
        return "where varies along part of a row, or along no part of it"
    mask = mask_strides(dims)
    # Labels that are weights: of rows of any length there is no kernel.
    weights = call.op == "cross_entropy" and len(values) > 1
    itemsize = max(d.itemsize for d in (*dtypes, np.dtype(call.dtype)))
    if plan is None:
        found = mosaic_gpu_plans.plan(
            op=call.op,
            rows=rows,
            length=length,
            itemsize=itemsize,
            mask=mask,
            busy=_is_busy(call.options),
            aligned=weights,
        )
        if isinstance(found, str):
            return found
        if found.ragged and weights:
            return f"weights of {length} entries as labels, no multiple of 128"
        plan = found
    return Problem(
        call.op,
        rows,
        length,
        dtypes,
        np.dtype(call.dtype),
        len(row_inputs),
        mask,
        call.scale,
        plan,
        call.options,
        alone=call.alone,
    )


def _is_busy(options: row_loss.Options | None) -> bool:
    """Whether a loss has a soft cap, or a sum over all logits of a row."""
    return options is not None and (options.softcap is not None or options.uniform_nll)


def refusal(call: RowCall, device: Device) -> str | None:
    """Why this call cannot run there; None if it can."""
    if device.platform != "cuda":
        return f"needs an NVIDIA GPU, the platform is {device.platform}"
    if device.compute_capability is None:
        return "the GPU's compute capability is not known"
    if device.compute_capability < (9, 0):
        major, minor = device.compute_capability
        return f"needs compute capability 9.0 or newer, the GPU has {major}.{minor}"
    reason = _compat.mosaic_gpu_reason()
    if reason is not None:
        return reason
    problem = problem_of(call)
    return problem if isinstance(problem, str) else None


class _Label:
    """The label's part of a row where labels are indices, computed outside the kernel.

    Args:
      call: A call of cross-entropy.
      arrays: Its arguments.
    """

    def __init__(self, call: RowCall, arrays: Sequence[Any]) -> None:
        assert call.options is not None
        x, where, self.index, *weights = arrays
        self.call, self.options = call, call.options
        self.logit = row_loss.label_logit(x, where, self.index, call.axis, jnp.float32)
        self.weights = weights
        if weights:
            self.weights = [row_loss.label_weight(weights[0], self.index), weights[1]]

    def read_first(self) -> None:
        """Orders the reads of the logits before a kernel that overwrites them.

        XLA may schedule the reads after it, and copy the logits for that:
        https://github.com/jax-ml/jax/issues/25399
        """
        read = (self.logit, self.weights)
        self.logit, self.weights = lax.optimization_barrier(read)

    def put_into(
        self, results: Sequence[jax.Array], place: jax.Array | None = None
    ) -> list[jax.Array]:
        """The kernel's results, completed by the terms of the label.

        `place` is where the gradient is in the first result, or None if it is that.
        """
        call, options = self.call, self.options
        *dx, row_max, excess = results[: 3 if self.weights else 2]
        others = results[len(dx) + 2 :]
        below = row_loss.below_label(
            self.logit, self.index, row_max, call.scale, options
        )
        numbers = [row_max, excess, below, *others]
        if not dx:
            return numbers
        state = row_loss.state(numbers, options, dense=False)
        label_weight, weight = self.weights
        value = row_loss.label_gradient(
            self.logit, self.index, state, label_weight, weight, call.scale, options
        )
        used = row_loss.used_rows(label_weight, weight)
        index = jnp.where(used, self.index, -1)
        return [row_loss.set_at_label(dx[0], index, value, call.axis, place), *numbers]


def _with_label(call: RowCall, arrays: Sequence[Any], dx: jax.Array) -> jax.Array:
    """The result of a pullback's kernel, completed by that at the label."""
    x, where, index, *numbers = arrays
    logit = row_loss.label_logit(x, where, index, call.axis, jnp.float32)
    only = jnp.zeros_like(index)
    value = xla_loss.cross_entropy_pullback(logit, None, only, *numbers, call=call)
    return row_loss.set_at_label(dx, index, value, call.axis)


def run(
    call: RowCall,
    arrays: Sequence[jax.Array | None],
    plan: Plan | None = None,
    into: tuple[jax.Array, jax.Array] | None = None,
) -> Any:
    """Runs the kernel for a call on its arrays.

    Args:
      call: A call that `refusal` does not refuse.
      arrays: The arrays it describes.
      plan: The plan to use instead of the one in the table.
      into: An array of many such results, and the place of this one: the array, with
        that written, is the first result.
    """
    problem = problem_of(call, plan)
    if isinstance(problem, str):
        raise NotImplementedError(f"mosaic_gpu: {problem}")
    if isinstance(problem, mosaic_gpu_strips.Strips):
        return problem.run(call, arrays)
    if into is not None and problem.plan.ragged:
        # Where a row begins in its vectors, it has to end up, too.
        dx, *others = run(call, arrays, plan)
        return lax.dynamic_update_index_in_dim(into[0], dx, into[1], 0), *others
    problem = dataclasses.replace(problem, into=into is not None)
    values, where, row_inputs = arguments(call.op, arrays)
    x = values[0]
    label = None
    pullback = call.op == "cross_entropy_pullback"
    if call.options is not None and len(values) == 1 and not pullback:
        label = _Label(call, arrays)
        if problem.in_place:
            label.read_first()
        row_inputs = label.weights
    plan, view = problem.plan, problem.view_shape
    operands = [v.reshape(view) for v in values]
    if where is not None and problem.mask is not None:
        mask = where.reshape(-1)
        if plan.ragged:
            mask = jnp.pad(mask.astype(jnp.uint8), MASK_PADDING)
        operands.append(mask)
    operands += [number.reshape(problem.rows) for number in row_inputs]
    short = plan.place in ("rows", "warps")
    kernel = (short_rows_kernel if short else long_rows_kernel)(problem)
    result_shape, place = x.shape, None
    if into is not None:
        whole, place = into
        result_shape = whole.shape
        whole = whole.reshape(-1, *view[1:])
        operands = [whole, *operands, place.reshape(1)]
    if problem.in_place or problem.into:
        outs = _compat.mosaic_over_first(kernel, *operands)
    else:
        outs = kernel(*operands)
    a_row = row_shape(x.shape, call.axis)
    numbers = problem.spec.row_output_count
    results = [
        out.reshape(result_shape if k < len(outs) - numbers else a_row)
        for k, out in enumerate(outs)
    ]
    if where is not None and problem.mask is None:
        # One value for the whole array.
        hidden: dict[str, Any] = {
            "log_softmax": (-np.inf, -np.inf, -1.0),
            "log_sum_exp_state": (-np.inf, -1.0),
            "cross_entropy": (-np.inf, -1.0),
            "cross_entropy_with_gradient": (0.0, -np.inf, -1.0),
        }
        fill = (*hidden.get(call.op, ()), *(0,) * len(results))[: len(results)]
        results = [
            jnp.where(where, out, jnp.asarray(value, out.dtype))
            for out, value in zip(results, fill, strict=True)
        ]
    if pullback:
        results = [_with_label(call, arrays, results[0])]
    if label is not None:
        results = label.put_into(results, place)
    return results[0] if len(results) == 1 else tuple(results)
