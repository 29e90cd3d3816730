"""The primitive ``kernel_call``: one operation in the program that jax traces.

Which implementation computes it is decided when the program is lowered, once for each
platform that it is lowered for: tracing is the same everywhere. In a program for
several devices each may have a call of its own, for its share of the arrays: see
`partitioning`.
"""

import abc
import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxsoftmax._compat import trace
from jaxsoftmax._core import dispatch, primitive
from jaxsoftmax._core.device import Device, lowering_for, target_device
from jaxsoftmax._core.partitioning import ByCompiler, InPlace, Placement, Shared
from jaxsoftmax._core.primitive import Arrays, Axes


class Operation(abc.ABC):
    """What a kernel call computes: hashable, the primitive's only parameter."""

    @property
    @abc.abstractmethod
    def family(self) -> dispatch.Family:
        """The implementations to choose from."""

    @property
    @abc.abstractmethod
    def implementation(self) -> dispatch.Asked:
        """Those of them to try."""

    @abc.abstractmethod
    def call(self, arrays: Sequence[Any]) -> dispatch.Call:
        """What an implementation is asked whether it can run."""

    @abc.abstractmethod
    def evaluate(self, *arrays: jax.Array, definition: bool = False) -> Arrays:
        """The results, in plain jax.numpy, of the types that they have on any mesh.

        `definition` says that jax is to differentiate it.
        """

    @abc.abstractmethod
    def batch(
        self, arrays: Sequence[Any], axes: Axes
    ) -> tuple[Arrays, "Operation", int]:
        """The call under a vmap, and the axis that its results are mapped over."""

    @abc.abstractmethod
    def placement(self, context: Any, call: dispatch.Call, platform: str) -> Placement:
        """How the arrays may lie on the devices of the program."""

    def problem(self, context: Any) -> Shared:
        """The call as devices share it; of what is not left in place."""
        raise NotImplementedError

    @abc.abstractmethod
    def lower(
        self, name: str, context: Any, operands: Sequence[Any], platform: str
    ) -> Any:
        """Emits the implementation of that name."""

    @abc.abstractmethod
    def trial(
        self, name: str, call: dispatch.Call
    ) -> tuple[Callable[..., Any], list[Any]]:
        """The implementation as a function, and arrays to lower it for."""

    def refusal_to_lower(self, name: str, context: Any, platform: str) -> str | None:
        """Why this process cannot lower that implementation, or None if it may."""
        return None

    def precision(
        self, arrays: Sequence[Any]
    ) -> contextlib.AbstractContextManager[Any]:
        """The context in which a kernel is lowered."""
        return contextlib.nullcontext()


def _evaluate(spec: Operation, *arrays: jax.Array, definition: bool = False) -> Arrays:
    return spec.evaluate(*arrays, definition=definition)


def chosen(
    spec: Operation,
    context: Any,
    call: dispatch.Call,
    platform: str,
    unfollowed: str | None = None,
    tried: Sequence[str] | None = None,
) -> dispatch.Choice:
    """What is chosen for a call that is emitted in place, on one platform.

    `tried` are the implementations that a first attempt is made to lower; None: all.
    """
    device = target_device(platform, context)

    def attempt(name: str) -> str | None:
        if tried is not None and name not in tried:
            return None
        return _failure_to_lower(spec, context, call, device, name)

    return dispatch.choose(
        spec.implementation,
        call,
        device,
        attempt,
        family=spec.family,
        unfollowed=unfollowed,
    )


def _lower(context: Any, *operands: Any, spec: Operation, platform: str) -> Any:
    """Chooses the implementation for one platform and lowers it in place."""
    call, device = spec.call(context.avals_in), target_device(platform, context)
    placement = spec.placement(context, call, platform)
    if not isinstance(placement, InPlace):
        if isinstance(placement, ByCompiler):
            # What each device runs is chosen for its share, when that is known.
            choice = dispatch.choose(
                spec.implementation,
                call,
                device,
                family=spec.family,
                devices=placement.count,
            )
            dispatch.report(choice, warn=False)
        return placement.lower(context, operands, spec.problem(context))
    choice = chosen(spec, context, call, platform, placement.reason)
    dispatch.report(choice, warn=True)
    with lowering_for(device):
        return spec.lower(choice.implementation or "xla", context, operands, platform)


def _failure_to_lower(
    spec: Operation, context: Any, call: dispatch.Call, device: Device, name: str
) -> str | None:
    """Why what should run cannot be lowered, or None if it can or no one knows."""
    reason = spec.refusal_to_lower(name, context, device.platform)
    if reason is not None:
        return None if dispatch.recording() else reason
    return _try_to_lower(spec, call, device, name, dispatch.get(name, spec.family))


@functools.lru_cache(maxsize=4096)
def _try_to_lower(
    spec: Operation,
    call: dispatch.Call,
    device: Device,
    name: str,
    implementation: Any,  # looked up again: a part of what the answer is known by
) -> str | None:
    """Lowers a kernel in a program of its own, in place of the one that needs it.

    A rule that fails half-way would leave a program that XLA does not take.
    """
    try:
        f, arrays = spec.trial(name, call)
        with spec.precision(arrays), trace.one_device(), lowering_for(device):
            traced = jax.jit(lambda *arrays: f(*arrays)).trace(*arrays)
            traced.lower(lowering_platforms=(device.platform,))
    except Exception as error:  # whatever a version that does not fit raises
        return f"its lowering failed with {type(error).__name__}: {error}"
    return None


def _batch(
    arrays: Sequence[Any], axes: Axes, *, spec: Operation
) -> tuple[Arrays, list[int]]:
    batched, spec, place = spec.batch(arrays, axes)
    outs = kernel_call_p.bind(*batched, spec=spec)
    return outs, [place] * len(outs)


kernel_call_p = primitive.new_primitive(
    "kernel_call",
    _evaluate,
    definition=functools.partial(_evaluate, definition=True),
    lower=_lower,
)
primitive.set_rules(kernel_call_p, batch=_batch)
