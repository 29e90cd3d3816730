"""What a program is compiled for: the `Device` that decides which kernels can run."""

import contextlib
import contextvars
import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import jax

from jaxsoftmax._compat import trace


@dataclasses.dataclass(frozen=True)
class Device:
    """What a program is compiled for.

    Attributes:
      platform: ``"cpu"``, ``"cuda"``, ``"rocm"``, ``"tpu"``, ...
      kind: The device's own name, or None where it is not known.
      compute_capability: Of an NVIDIA GPU, as (9, 0), or None where it is not known.
    """

    platform: str
    kind: str | None = None
    compute_capability: tuple[int, int] | None = None


# Of a device that is known by its name alone, as in an abstract mesh.
_COMPUTE_CAPABILITIES = {
    r"\bG?B200\b": (10, 0),
    r"\bG?H[12]00\b": (9, 0),
    r"\bL40?S?\b|\bGeForce RTX 40\d\d\b": (8, 9),
    r"\bA10G?\b|\bGeForce RTX 30\d\d\b": (8, 6),
    r"\bA100\b": (8, 0),
    r"\bT4\b": (7, 5),
    r"\bV100\b": (7, 0),
}


_assumed_kind: contextvars.ContextVar[str | None]
_assumed_kind = contextvars.ContextVar("_assumed_kind", default=None)


@contextlib.contextmanager
def assumed_device(kind: str | None) -> Iterator[None]:
    """Takes programs to be for a device that calls itself `kind`, unless None."""
    token = _assumed_kind.set(kind)
    try:
        yield
    finally:
        _assumed_kind.reset(token)


def device_of_name(platform: str, kind: str) -> Device:
    """The device of a platform that calls itself `kind`."""
    for pattern, capability in _COMPUTE_CAPABILITIES.items():
        if platform == "cuda" and re.search(pattern, kind):
            return Device(platform, kind, capability)
    return Device(platform, kind)


def target_device(platform: str, context: Any = None) -> Device:
    """The device of `platform` that a program lowered now is for.

    The one that is assumed; the one that is not there but compiled for, given the
    context of a lowering rule; that of the abstract mesh in use; this process's first;
    or one of which only the platform is known: a program may be lowered where there is
    no such device.

    What is decided when a function is traced cannot know it, and asks
    `jax.default_backend()`: what softmax and log_softmax compute for their derivatives.
    """
    kind = _assumed_kind.get()
    if kind is not None:
        return device_of_name(platform, kind)
    if context is not None:
        device = trace.compile_only_device(context, platform)
        if device is not None:
            return _described(platform, device)
    kind = trace.abstract_device_kind(platform)
    if kind is not None:
        return device_of_name(platform, kind)
    if not trace.has_platform(platform):
        return Device(platform)
    return _described(platform, jax.local_devices(backend=platform)[0])


def _described(platform: str, device: Any) -> Device:
    # A device that is not there says of itself what it was made from.
    capability = getattr(device, "compute_capability", None)
    if platform != "cuda" or capability is None:
        return device_of_name(platform, device.device_kind)
    major, minor = capability.split(".")
    return Device(platform, device.device_kind, (int(major), int(minor)))


_lowered_for: contextvars.ContextVar[Device | None]
_lowered_for = contextvars.ContextVar("_lowered_for", default=None)


@contextlib.contextmanager
def lowering_for(device: Device) -> Iterator[None]:
    """Lowers kernels for a device; within, `capability_lowered_for` is its."""
    token = _lowered_for.set(device)
    try:
        yield
    finally:
        _lowered_for.reset(token)


def capability_lowered_for() -> tuple[int, int] | None:
    """The compute capability to compile a kernel for, or None where none is known."""
    device = _lowered_for.get()
    return None if device is None else device.compute_capability
