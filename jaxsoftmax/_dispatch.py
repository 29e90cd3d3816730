"""Which implementation runs: the ``implementation=`` argument and its errors."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from jaxsoftmax.kernels import xla


@dataclasses.dataclass(frozen=True)
class Implementation:
    """What computes the softmax family: functions as `kernels.xla` has them."""

    softmax: Callable[..., Any]
    softmax_derivative: Callable[..., Any]
    log_softmax: Callable[..., Any]
    log_softmax_pushforward: Callable[..., Any]
    log_softmax_pullback: Callable[..., Any]


_XLA = Implementation(
    softmax=xla.softmax,
    softmax_derivative=xla.softmax_derivative,
    log_softmax=xla.log_softmax,
    log_softmax_pushforward=xla.log_softmax_pushforward,
    log_softmax_pullback=xla.log_softmax_pullback,
)

# A call carries a name, which is hashed, and is looked up when the call is traced.
IMPLEMENTATIONS: dict[str, Implementation] = {"xla": _XLA}

# Not an implementation to ask for: what derivatives of derivatives are taken of.
DEFINITION = dataclasses.replace(
    _XLA, softmax_derivative=xla.softmax_derivative_definition
)


def get(name: str) -> Implementation:
    """The implementation that a `RowConfig` names."""
    return DEFINITION if name == "definition" else IMPLEMENTATIONS[name]


# Names that are part of the interface and cannot run, with the reason.
UNAVAILABLE: dict[str, str] = {
    "mosaic_gpu": "this version of jaxsoftmax has no GPU kernels yet",
    "triton": "this version of jaxsoftmax has no GPU kernels yet",
}


def resolve(implementation: str | Sequence[str] | None) -> str:
    """The name of the implementation that runs.

    Args:
      implementation: None for the best that can run, a name, or several names to try
        in that order.

    Raises:
      TypeError: `implementation` is none of these.
      ValueError: a name is unknown, or there is none.
      NotImplementedError: none of the names can run here; says why for each.
    """
    if implementation is None:
        return "xla"
    names = (implementation,) if isinstance(implementation, str) else implementation
    if not isinstance(names, Sequence) or not all(isinstance(n, str) for n in names):
        raise TypeError(
            "implementation must be None, a name or a sequence of names, got "
            f"{implementation!r}"
        )
    known = [*IMPLEMENTATIONS, *UNAVAILABLE]
    for name in names:
        if name not in known:
            raise ValueError(
                f"implementation: unknown name {name!r}, expected one of {known}"
            )
    if not names:
        raise ValueError(f"implementation: no name given, expected one of {known}")
    for name in names:
        if name in IMPLEMENTATIONS:
            return name
    reasons = "; ".join(f"{name!r}: {UNAVAILABLE[name]}" for name in names)
    raise NotImplementedError(
        f"implementation={implementation!r} cannot run ({reasons}). These can: "
        f"{list(IMPLEMENTATIONS)}, or None for the best of them"
    )
