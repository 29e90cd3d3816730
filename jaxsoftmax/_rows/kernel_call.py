"""A call of a kernel, as one operation in the program that jax traces.

Which implementation computes it is decided when the program is lowered, once for each
platform that it is lowered for: tracing is the same everywhere. In a program for
several devices each has a call of its own, for its share of the arrays: see
`_partitioning`.
"""

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsoftmax._compat import trace
from jaxsoftmax._compat.primitive import lower_function
from jaxsoftmax._core import dispatch, partitioning, primitive
from jaxsoftmax._core.device import Device, target_device
from jaxsoftmax._rows import sharded
from jaxsoftmax._rows.call import Call
from jaxsoftmax._rows.row_loss import Options
from jaxsoftmax._version import __version__

Arrays = list[jax.Array]

_recorded: contextvars.ContextVar[list[dispatch.Choice] | None]
_recorded = contextvars.ContextVar("_recorded", default=None)


@dataclasses.dataclass(frozen=True)
class _Spec:
    """The parameter of the ``kernel_call`` primitive: all of a call but its arrays.

    Attributes:
      op: One of the functions that every kernel module has.
      axis: What is reduced, as negative ints: a mapped axis is one more dimension in
        front of the others.
      scale: Multiplies the logits.
      dtype: The result's.
      options: Of cross-entropy, else None.
      asked: Which implementations to try.
      present: For each array argument, whether it is there (`where` may not be).
    """

    op: str
    axis: tuple[int, ...]
    scale: float
    dtype: np.dtype
    options: Options | None
    asked: dispatch.Asked
    present: tuple[bool, ...]

    def arguments(self, arrays: Sequence[Any]) -> list[Any]:
        """`arrays` with None for what is not there."""
        given = iter(arrays)
        return [next(given) if present else None for present in self.present]


def _run(spec: _Spec, implementation: Any, *arrays: jax.Array, **how: Any) -> Arrays:
    call = _call(spec, arrays, [x.shape for x in arrays])
    return jax.tree.leaves(implementation.run(call, spec.arguments(arrays), **how))


def _run_xla(spec: _Spec, *arrays: jax.Array) -> Arrays:
    # The arrays as they are: XLA broadcasts a batch dimension of size 1 as it computes.
    return _run(spec, dispatch.get("xla"), *arrays)


def _run_definition(spec: _Spec, *arrays: jax.Array) -> Arrays:
    """Of the types that the call's results have: on every mesh, in plain jax.numpy."""
    return _run(spec, dispatch.get("xla"), *arrays, definition=True)


def _run_kernel(spec: _Spec, name: str, *arrays: jax.Array) -> Arrays:
    shapes = _full_shapes(spec, arrays)
    full = [jnp.broadcast_to(x, s) for x, s in zip(arrays, shapes, strict=True)]
    return _run(spec, dispatch.get(name), *full)


def _full_shapes(spec: _Spec, arrays: Sequence[Any]) -> list[tuple[int, ...]]:
    """The shapes with every batch dimension in full; that of a mask as it is."""
    sizes = zip(*(x.shape for x in arrays), strict=True)
    batch = [next((size for size in each if size != 1), 1) for each in sizes]

    def full(x: Any) -> tuple[int, ...]:
        if x.dtype == np.bool_:
            return x.shape
        return tuple(
            size if i - x.ndim in spec.axis else batch[i]
            for i, size in enumerate(x.shape)
        )

    return [full(x) for x in arrays]


def _as_call(spec: _Spec, arrays: Sequence[Any]) -> Call:
    """What a kernel module is asked whether it can run."""
    return _call(spec, arrays, _full_shapes(spec, arrays))


def _call(spec: _Spec, arrays: Sequence[Any], shapes: Sequence[Any]) -> Call:
    pairs = zip(shapes, arrays, strict=True)
    structs = [jax.ShapeDtypeStruct(shape, x.dtype) for shape, x in pairs]
    arguments = tuple(spec.arguments(structs))
    return Call(spec.op, arguments, spec.axis, spec.scale, spec.dtype, spec.options)


def _batch(
    arrays: Sequence[Any], axes: Sequence[int | None], *, spec: _Spec
) -> tuple[Arrays, list[int]]:
    """The mapped axis becomes the first dimension, of size 1 where it is not mapped."""
    batched = [
        jnp.expand_dims(x, 0) if axis is None else jnp.moveaxis(x, axis, 0)
        for x, axis in zip(arrays, axes, strict=True)
    ]
    if spec.options is not None:
        # Some results are of the logits alone, or of labels that are weights: these
        # have the whole batch.
        size = next(
            x.shape[axis]
            for x, axis in zip(arrays, axes, strict=True)
            if axis is not None
        )
        _, _, labels, *_ = spec.arguments(range(len(arrays)))
        for i in (0, labels):
            x = batched[i]
            if axes[i] is None and jnp.issubdtype(x.dtype, jnp.floating):
                batched[i] = jnp.broadcast_to(x, (size, *x.shape[1:]))
    outs = kernel_call_p.bind(*batched, spec=spec)
    return outs, [0] * len(outs)


def _lower(context: Any, *operands: Any, spec: _Spec, platform: str) -> Any:
    """Chooses the implementation for one platform and lowers it in place."""
    call, device = _as_call(spec, context.avals_in), target_device(platform)
    placement = partitioning.placement(context, call.arrays[0], platform)
    if isinstance(placement, partitioning.ByType):
        return placement.lower(context, operands, _problem(spec, context))
    if isinstance(placement, partitioning.ByCompiler):
        # What each device runs is chosen for its share, when that is known.
        choice = dispatch.choose(spec.asked, call, device, devices=placement.count)
        report(choice, warn=False)
        return placement.lower(context, operands, _problem(spec, context))
    choice = dispatch.choose(
        spec.asked,
        call,
        device,
        attempt=functools.partial(_failure_to_lower, spec, call, device),
        unfollowed=placement.reason,
    )
    report(choice, warn=True)
    return _lower_as(choice.implementation or "xla", context, operands, spec)


def recording() -> bool:
    """Whether choices are recorded: a program is lowered to ask what would run."""
    return _recorded.get() is not None


def report(choice: dispatch.Choice, *, warn: bool) -> None:
    """Records a choice, or raises or warns of what it says."""
    choices = _recorded.get()
    if choices is not None:
        choices.append(choice)
    elif choice.implementation is None:
        raise dispatch.error(choice)
    elif warn:
        dispatch.warn(choice)


def _problem(spec: _Spec, context: Any) -> partitioning.Problem:
    """The call as it is spread over devices."""
    return partitioning.Problem(
        function=functools.partial(_run_definition, spec),
        on_shares=functools.partial(_run_on_shares, spec),
        shape=_full_shapes(spec, context.avals_in)[0],
        axis=spec.axis,
        inputs=tuple(x.shape for x in context.avals_in),
        outputs=tuple(x.shape for x in context.avals_out),
        name=f"{spec.op}_{partitioning.digest((__version__, spec))}",
    )


def _run_on_shares(
    spec: _Spec,
    across: sharded.Across | None,
    inside: jax.Array | None,
    *shares: jax.Array,
) -> Arrays:
    """What one device does: a call on whole rows, or its part of rows that are shared.

    Each call in it is lowered, and its implementation chosen, for this device's share.
    XLA may ask for this in a thread of its own, which does not know whether 64 bits are
    enabled in the one that compiles.
    """
    if across is None:
        return kernel_call_p.bind(*shares, spec=spec)

    def state(op: str, *arrays: jax.Array | None) -> Arrays:
        present = tuple(x is not None for x in arrays)
        of_share = dataclasses.replace(spec, op=op, present=present)
        given = (x for x in arrays if x is not None)
        return kernel_call_p.bind(*given, spec=of_share)

    with trace.x64_if(_needs_x64(spec, shares)):
        return sharded.run(
            spec.op,
            spec.arguments(shares),
            state=state,
            across=across,
            inside=inside,
            **_call(spec, shares, [x.shape for x in shares]).static,
        )


def _failure_to_lower(spec: _Spec, call: Call, device: Device, name: str) -> str | None:
    """Why a kernel that should run cannot be lowered, or None if it can."""
    return _try_to_lower(spec, call, device, name, dispatch.get(name))


@functools.lru_cache(maxsize=4096)
def _try_to_lower(
    spec: _Spec, call: Call, device: Device, name: str, implementation: Any
) -> str | None:
    """Lowers a kernel in a program of its own, in place of the one that needs it.

    A rule that fails half-way would leave a program that XLA does not take.
    """
    arrays = [x for x in call.arrays if x is not None]
    run = functools.partial(_run_kernel, spec, name)
    try:
        with jax.enable_x64(_needs_x64(spec, arrays)), trace.one_device():
            traced = jax.jit(lambda *arrays: run(*arrays)).trace(*arrays)
            traced.lower(lowering_platforms=(device.platform,))
    except Exception as error:  # whatever a version that does not fit raises
        return f"its lowering failed with {type(error).__name__}: {error}"
    return None


def _lower_as(name: str, context: Any, operands: Sequence[Any], spec: _Spec) -> Any:
    needs_x64 = _needs_x64(spec, context.avals_in)
    if name == "xla":
        run = functools.partial(_run_xla, spec)
        with trace.x64_if(needs_x64):
            return lower_function(context, run, operands)
    run = functools.partial(_run_kernel, spec, name)
    with jax.enable_x64(needs_x64), trace.one_device():
        return lower_function(context, run, operands, untyped=True)


def _needs_x64(spec: _Spec, arrays: Sequence[Any]) -> bool:
    """Whether anything has 64 bits. Else kernels are to compute with int32 indices."""
    return any(d.itemsize == 8 for d in (spec.dtype, *(x.dtype for x in arrays)))


@contextlib.contextmanager
def recorded_choices() -> Iterator[list[dispatch.Choice]]:
    """Collects what is chosen, and for now neither raises nor warns of it."""
    choices: list[dispatch.Choice] = []
    token = _recorded.set(choices)
    try:
        yield choices
    finally:
        _recorded.reset(token)


kernel_call_p = primitive.new_primitive("kernel_call", _run_definition, lower=_lower)
primitive.set_rules(kernel_call_p, batch=_batch)


def kernel_call(
    op: str,
    *arrays: jax.Array | None,
    axis: tuple[int, ...],
    scale: float,
    dtype: np.dtype,
    asked: dispatch.Asked,
    options: Options | None = None,
) -> Any:
    """Calls a function that every kernel module has, in the implementation chosen.

    It has no derivative: the rules of `forward_mode` stand above it.

    Args:
      op: The function's name.
      *arrays: Its array arguments, of one rank; None for an absent `where`.
      axis: What is reduced, as negative ints.
      scale: Multiplies the logits; finite and above 0.
      dtype: The result's.
      asked: Which implementations to try, of `dispatch.resolve`; or
        `dispatch.DEFINITION` for one that jax can differentiate.
      options: Of cross-entropy, else None.

    Returns:
      What the function returns.
    """
    present = tuple(x is not None for x in arrays)
    spec = _Spec(op, axis, scale, dtype, options, asked, present)
    given = [x for x in arrays if x is not None]
    if asked == dispatch.DEFINITION:
        outs = _run_definition(spec, *given)
    else:
        outs = kernel_call_p.bind(*given, spec=spec)
    return outs[0] if len(outs) == 1 else tuple(outs)
