"""Calls of functions of rows, as the primitive ``kernel_call`` has them."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsoftmax._compat import trace
from jaxsoftmax._compat.primitive import lower_function
from jaxsoftmax._core import dispatch, kernel_call, partitioning, primitive
from jaxsoftmax._core.device import lowering_for, target_device
from jaxsoftmax._core.primitive import Arrays, Axes, batch_size
from jaxsoftmax._rows import sharded, xla
from jaxsoftmax._rows.call import ROWS, RowCall
from jaxsoftmax._version import __version__


@dataclasses.dataclass(frozen=True)
class _RowOperation(kernel_call.Operation):
    """A call of a function of rows, in every transform and on every mesh.

    Attributes:
      rows: The call.
      present: For each array argument, whether it is there (`where` may not be).
    """

    rows: RowCall
    present: tuple[bool, ...]

    @property
    def family(self) -> dispatch.Family:
        return ROWS

    @property
    def implementation(self) -> dispatch.Asked:
        return self.rows.implementation

    def arguments(self, arrays: Sequence[Any]) -> list[Any]:
        """`arrays` with None for what is not there."""
        given = iter(arrays)
        return [next(given) if present else None for present in self.present]

    def call(self, arrays: Sequence[Any]) -> RowCall:
        return self._described(arrays, self._full_shapes(arrays)).kernel_form()

    def _described(self, arrays: Sequence[Any], shapes: Sequence[Any]) -> RowCall:
        structs = [
            jax.ShapeDtypeStruct(shape, x.dtype)
            for shape, x in zip(shapes, arrays, strict=True)
        ]
        # Without what is no matter to a backend: calls that are alike are one call.
        return dataclasses.replace(
            self.rows,
            arrays=tuple(self.arguments(structs)),
            logits_dtype=None,
            implementation=None,
        )

    def _full_shapes(self, arrays: Sequence[Any]) -> list[tuple[int, ...]]:
        """The shapes with every batch dimension in full; that of a mask as it is."""
        sizes = zip(*(x.shape for x in arrays), strict=True)
        batch = [next((size for size in each if size != 1), 1) for each in sizes]

        def full(x: Any) -> tuple[int, ...]:
            if x.dtype == np.bool_:
                return x.shape
            return tuple(
                size if i - x.ndim in self.rows.axis else batch[i]
                for i, size in enumerate(x.shape)
            )

        return [full(x) for x in arrays]

    def _run(self, name: str, *arrays: jax.Array, **options: Any) -> Arrays:
        call = self._described(arrays, [x.shape for x in arrays])
        run = dispatch.get(name, ROWS).run
        return jax.tree.leaves(run(call, self.arguments(arrays), **options))

    def _run_kernel(self, name: str, *arrays: jax.Array, **options: Any) -> Arrays:
        """In a kernel, which finds the largest entry itself."""
        shapes = self._full_shapes(arrays)
        full = [jnp.broadcast_to(x, s) for x, s in zip(arrays, shapes, strict=True)]
        call, given = self.call(arrays), self.arguments(full)
        for i, described in enumerate(call.arrays):
            if described is None:
                given[i] = None
            elif given[i] is None:
                given[i] = xla.log_sum_exp_state(given[0], given[1], call)[i - 2]
        outs = jax.tree.leaves(dispatch.get(name, ROWS).run(call, given, **options))
        return self.rows.from_kernel_form(outs)

    def evaluate(self, *arrays: jax.Array, definition: bool = False) -> Arrays:
        # The definition in any case: only that is plain jax.numpy on every mesh.
        return self._run("xla", *arrays, definition=True)

    def batch(
        self, arrays: Sequence[Any], axes: Axes
    ) -> tuple[Arrays, "_RowOperation", int]:
        """The mapped axis stays where it is, of size 1 where it is not mapped.

        Where the first array that is mapped has it; of a loss it becomes the first, so
        that classes that are last in memory stay last.
        """
        place = 0
        if self.rows.options is None:
            place = next(axis for axis in axes if axis is not None)
        batched = [
            jnp.expand_dims(x, place) if axis is None else jnp.moveaxis(x, axis, place)
            for x, axis in zip(arrays, axes, strict=True)
        ]
        rank = batched[0].ndim - 1
        if self.rows.options is not None and self.rows.op != "label_logits":
            # Some results follow from the logits alone, or from labels that are
            # weights: these have the whole batch.
            _, _, labels, *_ = self.arguments(range(len(arrays)))
            for i in (0, labels):
                x = batched[i]
                if axes[i] is None and jnp.issubdtype(x.dtype, jnp.floating):
                    shape = (batch_size(arrays, axes), *x.shape[1:])
                    batched[i] = jnp.broadcast_to(x, shape)
        axis = tuple(a - (a + rank < place) for a in self.rows.axis)
        spec = dataclasses.replace(self, rows=dataclasses.replace(self.rows, axis=axis))
        return batched, spec, place

    def placement(
        self, context: Any, call: dispatch.Call, platform: str
    ) -> partitioning.Placement:
        return partitioning.placement(context, call.arrays[0], platform)

    def problem(self, context: Any) -> partitioning.Problem:
        digest = partitioning.digest((__version__, self))
        return partitioning.Problem(
            function=self.evaluate,
            on_shares=self._run_on_shares,
            shape=self._full_shapes(context.avals_in)[0],
            axis=self.rows.axis,
            inputs=tuple(x.shape for x in context.avals_in),
            outputs=tuple(x.shape for x in context.avals_out),
            name=f"{self.rows.op}_{digest}",
        )

    def _run_on_shares(
        self,
        across: partitioning.Across | None,
        inside: jax.Array | None,
        *shares: jax.Array,
    ) -> Arrays:
        """What one device does: a call on whole rows, or its part of shared rows.

        Each call in it is lowered, and its implementation chosen, for this device's
        share. XLA may ask for this in a thread of its own, which does not know whether
        64 bits are enabled in the one that compiles.
        """
        if across is None:
            return kernel_call.kernel_call_p.bind(*shares, spec=self)

        def state(op: str, *arrays: jax.Array | None) -> Any:
            return call_rows(dataclasses.replace(self.rows, op=op), *arrays)

        with trace.x64_if(self._needs_x64(shares)):
            return sharded.run(
                self.rows,
                self.arguments(shares),
                state=state,
                across=across,
                inside=inside,
            )

    def trial(
        self, name: str, call: dispatch.Call
    ) -> tuple[Callable[..., Any], list[Any]]:
        def run(*arrays: jax.Array) -> Any:
            each = iter(arrays)
            given = [None if x is None else next(each) for x in call.arrays]
            return dispatch.get(name, ROWS).run(call, given)

        return run, [x for x in call.arrays if x is not None]

    def precision(
        self, arrays: Sequence[Any]
    ) -> contextlib.AbstractContextManager[Any]:
        return jax.enable_x64(self._needs_x64(arrays))

    def lower(
        self, name: str, context: Any, operands: Sequence[Any], platform: str
    ) -> Any:
        arrays = context.avals_in
        if name == "xla":
            # The arrays as they are: XLA broadcasts a batch dimension of size 1. A call
            # that it partitions itself is sums and maxima alone: in a part of a mesh it
            # aborts at a gather (tests/core/test_workarounds.py).
            placement = self.placement(context, self.call(arrays), platform)
            definition = getattr(placement, "reason", None) is not None
            run = functools.partial(self._run, name, definition=definition)
            with trace.x64_if(self._needs_x64(arrays)):
                return lower_function(context, run, operands)
        run = functools.partial(self._run_kernel, name)
        with self.precision(arrays), trace.one_device():
            return lower_function(context, run, operands, untyped=True)

    def lower_into(self, context: Any, operands: Sequence[Any], platform: str) -> Any:
        """Emits a kernel that writes into an array of many results.

        None where another implementation is chosen, or XLA partitions the call.
        """
        arrays = context.avals_in[2:]
        call = self.call(arrays)
        placement = self.placement(context, call, platform)
        if placement != partitioning.InPlace():
            return None
        choice = kernel_call.chosen(self, context, call, platform)
        if choice.implementation != "mosaic_gpu":
            return None
        dispatch.report(choice, warn=True)

        def run(whole: jax.Array, place: jax.Array, *arrays: jax.Array) -> Arrays:
            return self._run_kernel("mosaic_gpu", *arrays, into=(whole, place))

        device = lowering_for(target_device(platform, context))
        with self.precision(arrays), trace.one_device(), device:
            return lower_function(context, run, operands, untyped=True)

    def _needs_x64(self, arrays: Sequence[Any]) -> bool:
        """Whether anything has 64 bits. Else kernels compute with int32 indices."""
        dtypes = (self.rows.dtype, *(x.dtype for x in arrays))
        return any(dtype.itemsize == 8 for dtype in dtypes)


def call_rows(call: RowCall, *arrays: jax.Array | None) -> Any:
    """Calls a function of rows in the implementation that is chosen at lowering.

    It has no derivative: the rules of `forward_mode` stand above it.

    Args:
      call: Which function, and how. With the implementation `dispatch.DEFINITION`, one
        that jax can differentiate.
      *arrays: Its array arguments, of one rank; None for an absent `where`.

    Returns:
      What the function returns.
    """
    given = [x for x in arrays if x is not None]
    spec = _RowOperation(call, tuple(x is not None for x in arrays))
    if call.implementation == dispatch.DEFINITION:
        outs = spec.evaluate(*given, definition=True)
    else:
        outs = kernel_call.kernel_call_p.bind(*given, spec=spec)
    return outs[0] if len(outs) == 1 else tuple(outs)


# --- a result written where it is wanted ----------------------------------------------


def _evaluate_into(
    spec: _RowOperation,
    whole: jax.Array,
    place: jax.Array,
    *arrays: jax.Array,
    definition: bool = False,
) -> Arrays:
    if definition:
        first, *others = spec.evaluate(*arrays, definition=True)
    else:
        first, *others = kernel_call.kernel_call_p.bind(*arrays, spec=spec)
    first = first.astype(whole.dtype)
    return [jax.lax.dynamic_update_index_in_dim(whole, first, place, 0), *others]


def _lower_into(
    context: Any, *operands: Any, spec: _RowOperation, platform: str
) -> Any:
    found = None
    if context.avals_in[0].dtype == spec.rows.dtype:
        found = spec.lower_into(context, operands, platform)
    if found is not None:
        return found
    run = functools.partial(_evaluate_into, spec)
    return lower_function(context, run, operands)


def _batch_into(
    arrays: Sequence[Any], axes: Axes, *, spec: _RowOperation
) -> tuple[Arrays, list[int]]:
    run = functools.partial(_evaluate_into, spec)
    outs = jax.vmap(run, in_axes=tuple(axes))(*arrays)
    return outs, [0] * len(outs)


kernel_call_into_p = primitive.new_primitive(
    "kernel_call_into",
    _evaluate_into,
    definition=functools.partial(_evaluate_into, definition=True),
    lower=_lower_into,
)
primitive.set_rules(kernel_call_into_p, batch=_batch_into)


def call_rows_into(
    whole: jax.Array, place: jax.Array, call: RowCall, *arrays: jax.Array | None
) -> list[jax.Array]:
    """As `call_rows`, but the first result is written to ``whole[place]``.

    In its place is `whole` with that. A kernel writes there itself, if it can.
    """
    given = [x for x in arrays if x is not None]
    spec = _RowOperation(call, tuple(x is not None for x in arrays))
    if call.implementation == dispatch.DEFINITION:
        return _evaluate_into(spec, whole, place, *given, definition=True)
    return list(kernel_call_into_p.bind(whole, place, *given, spec=spec))


def before_cast(x: jax.Array, asked: dispatch.Asked) -> jax.Array:
    """Logits that are a cast of 16 bits as they were before it, where kernels may run.

    What a kernel takes and gives is in memory: the cast, and that of the gradient back,
    would be a kernel each, and arrays of float32. The cast back is exact, and XLA drops
    both, as it does with those of the gradient. It fuses the casts itself otherwise.
    """
    kernels = jax.default_backend() == "gpu" and (asked is None or asked[0] != "xla")
    if not kernels or x.dtype != np.float32:
        return x
    dtype = trace.dtype_before_cast(x)
    return x.astype(dtype) if dtype in (jnp.bfloat16, np.float16) else x
