"""Which implementation runs: the ``implementation=`` argument and what follows from it.

`resolve` checks the argument where the public function is called. `choose` picks the
implementation later, when the call is lowered: only then are platform and device known.
"""

import dataclasses
import functools
import importlib
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from jaxsoftmax import _standard_primitives
from jaxsoftmax.kernels import xla, xla_cross_entropy
from jaxsoftmax.kernels._attention import AttentionCall
from jaxsoftmax.kernels._call import Call, Device
from jaxsoftmax.kernels._rows import is_known

# The names that were asked for, in this order; None for the best that can run.
Asked = tuple[str, ...] | None

# What runs under None: the first that can. Elsewhere "xla" alone.
PREFERENCES = {
    "cuda": ("mosaic_gpu", "triton", "xla"),
    "rocm": ("triton", "xla"),
}

# Calls of fewer entries run as XLA under None: starting a kernel takes longer.
SMALLEST_CALL_FOR_A_KERNEL = 0

# Not an implementation to ask for: what derivatives of derivatives are taken of.
DEFINITION = ("definition",)


def _refuses_nothing(call: Call, device: Device) -> str | None:
    return None


@dataclasses.dataclass(frozen=True)
class Implementation:
    """What computes the softmax family: functions as `kernels.xla` has them.

    `refusal` gives the reason why a call cannot run on a device, or None if it can.
    """

    softmax: Callable[..., Any]
    softmax_derivative: Callable[..., Any]
    log_softmax: Callable[..., Any]
    log_softmax_pushforward: Callable[..., Any]
    log_softmax_pullback: Callable[..., Any]
    log_sum_exp_state: Callable[..., Any]
    softmax_derivative_state: Callable[..., Any]
    log_softmax_pushforward_state: Callable[..., Any]
    log_softmax_pullback_state: Callable[..., Any]
    cross_entropy: Callable[..., Any]
    cross_entropy_with_gradient: Callable[..., Any]
    refusal: Callable[[Call, Device], str | None] = _refuses_nothing


_XLA = Implementation(
    softmax=xla.softmax,
    softmax_derivative=xla.softmax_derivative,
    log_softmax=xla.log_softmax,
    log_softmax_pushforward=xla.log_softmax_pushforward,
    log_softmax_pullback=xla.log_softmax_pullback,
    log_sum_exp_state=xla.log_sum_exp_state,
    softmax_derivative_state=xla.softmax_derivative_state,
    log_softmax_pushforward_state=xla.log_softmax_pushforward_state,
    log_softmax_pullback_state=xla.log_softmax_pullback_state,
    cross_entropy=xla_cross_entropy.cross_entropy,
    cross_entropy_with_gradient=xla_cross_entropy.cross_entropy_with_gradient,
)

definition = dataclasses.replace(
    _XLA,
    softmax_derivative=xla.softmax_derivative_definition,
    cross_entropy=xla_cross_entropy.cross_entropy_definition,
    cross_entropy_with_gradient=(
        xla_cross_entropy.cross_entropy_with_gradient_definition
    ),
)

_warned_of: set[tuple[str, str]] = set()

# By the name that is asked for. A call carries names, which are hashed, and looks them
# up when it is lowered. A string is a module, not imported before it is needed: it
# needs what not everybody has installed.
IMPLEMENTATIONS: dict[str, Implementation | str] = {
    "xla": _XLA,
    "mosaic_gpu": "jaxsoftmax.kernels.mosaic_gpu",
    "triton": "jaxsoftmax.kernels.triton",
}


@dataclasses.dataclass(frozen=True, eq=False)
class Family:
    """Operations that have the same implementations.

    Attributes:
      implementations: By name; a string is a module.
      preferences: By platform: what runs under None, the first that can.
      whole: Whether a module is the implementation, whatever functions it has.
      partitioned: What the compiler can spread over devices.
    """

    implementations: dict[str, Any]
    preferences: dict[str, tuple[str, ...]]
    whole: bool = False
    partitioned: tuple[str, ...] = ("xla",)


ROWS = Family(IMPLEMENTATIONS, PREFERENCES)
ATTENTION = Family(
    {
        "xla": "jaxsoftmax.kernels.blockwise",
        "cudnn": "jaxsoftmax.kernels.cudnn",
        "triton": "jaxsoftmax.kernels.triton_attention",
    },
    {"cuda": ("cudnn", "triton", "xla"), "rocm": ("triton", "xla")},
    whole=True,
    partitioned=("xla", "cudnn"),
)


def get(name: str, family: Family = ROWS) -> Any:
    """The implementation of that name; imports its module."""
    entry = family.implementations[name]
    if not isinstance(entry, str):
        return entry
    module = importlib.import_module(entry)
    if family.whole:
        return module
    names = [field.name for field in dataclasses.fields(Implementation)]
    return Implementation(**{name: getattr(module, name) for name in names})


def resolve(implementation: str | Sequence[str] | None, family: Family = ROWS) -> Asked:
    """The names that the ``implementation=`` argument asks for, or None.

    `DEFINITION` where nothing but jax's own primitives may be traced.

    Raises:
      TypeError: `implementation` is not None, a name, or several names.
      ValueError: a name is unknown, or there is none.
      NotImplementedError: a kernel is asked for there.
    """
    if implementation is None:
        return DEFINITION if _standard_primitives.are_needed() else None
    names = (implementation,) if isinstance(implementation, str) else implementation
    if not isinstance(names, Sequence) or not all(isinstance(n, str) for n in names):
        raise TypeError(
            "implementation must be None, a name or a sequence of names, got "
            f"{implementation!r}"
        )
    known = list(family.implementations)
    for name in names:
        if name not in known:
            raise ValueError(
                f"implementation: unknown name {name!r}, expected one of {known}"
            )
    if not names:
        raise ValueError(f"implementation: no name given, expected one of {known}")
    if _standard_primitives.are_needed():
        if "xla" not in names:
            raise NotImplementedError(
                f"implementation={implementation!r} cannot run inside a Pallas kernel "
                "or standard_primitives: pass None or 'xla' there"
            )
        return DEFINITION
    return tuple(names)


class PerformanceWarning(UserWarning):
    """On a GPU, ``implementation=None`` runs as XLA what a kernel would do faster.

    Given where the program is lowered, once in a process for each reason.

    Example:
      >>> import warnings
      >>> import jax.numpy as jnp
      >>> from jaxsoftmax import PerformanceWarning, softmax
      >>> with warnings.catch_warnings():  # an error instead of a slow program
      ...     warnings.simplefilter("error", PerformanceWarning)
      ...     print(softmax(jnp.zeros(2)))
      [0.5 0.5]
    """


@dataclasses.dataclass(frozen=True)
class Choice:
    """Which implementation a call runs with, and why.

    Attributes:
      call: What is computed: `op`, `arrays` (shapes and dtypes), `axis`, `scale`,
        `dtype`, `options`.
      device: What for: `platform`, `kind`, `compute_capability`.
      asked: The names in ``implementation=``, or None.
      implementation: The name of what runs; None if nothing that was asked for can.
      refusals: For each implementation that comes before it, its name and the reason
        why it does not run.
      devices: Over how many devices the compiler may spread the arrays. If several, the
        choice is made again for the share of each, which is not known before.
      family: Of the operations that have the same implementations.
    """

    call: Call | AttentionCall
    device: Device
    asked: Asked
    implementation: str | None
    refusals: tuple[tuple[str, str], ...] = ()
    devices: int = 1
    family: Family = ROWS


def choose(
    asked: Asked,
    call: Call | AttentionCall,
    device: Device,
    attempt: Callable[[str], str | None] = lambda name: None,
    *,
    unfollowed: str | None = None,
    devices: int = 1,
    family: Family = ROWS,
) -> Choice:
    """The first implementation that can run, of those asked for or of the best.

    Args:
      asked: Which implementations to try, of `resolve`.
      call: What is to be computed.
      device: What for.
      attempt: Tries a name that refuses nothing, and gives the reason if that fails.
        Not used for a name that is asked for alone: there, the failure is the answer.
      unfollowed: Why nothing but `Family.partitioned` can follow how the arrays are
        spread over devices, or None.
      devices: Over how many devices the compiler may spread them.
      family: Of the operations that have the same implementations.
    """
    chosen = functools.partial(
        Choice, call, device, asked, devices=devices, family=family
    )
    if _entries(call) == 0:
        return chosen("xla")  # nothing to run a kernel on
    names = asked or family.preferences.get(device.platform, ("xla",))
    refusals: list[tuple[str, str]] = []
    for name in names:
        reason = refusal(name, call, device, family)
        if name not in family.partitioned:
            reason = reason or unfollowed
        if name != "xla":
            if asked is None:
                reason = too_small(call) or reason
            if reason is None and len(names) > 1:
                reason = attempt(name)
        if reason is None:
            return chosen(name, tuple(refusals))
        refusals.append((name, reason))
    return chosen(None, tuple(refusals))


def refusal(
    name: str, call: Call | AttentionCall, device: Device, family: Family = ROWS
) -> str | None:
    """Why the implementation of that name cannot run a call, or None if it can."""
    if name == "xla":
        return None
    if not all(is_known(x.shape) for x in call.arrays if x is not None):
        return "kernels need sizes that are known, and one here is symbolic"
    try:
        implementation = get(name, family)
    except Exception as error:  # whatever a broken or missing installation raises
        return f"its import failed with {type(error).__name__}: {error}"
    reason: str | None = implementation.refusal(call, device)
    return reason


def too_small(call: Call | AttentionCall) -> str | None:
    """Why a kernel is not worth starting, or None if it is."""
    if _entries(call) >= SMALLEST_CALL_FOR_A_KERNEL:
        return None
    return f"fewer than {SMALLEST_CALL_FOR_A_KERNEL} entries: XLA is as fast"


def _entries(call: Call | AttentionCall) -> Any:
    return math.prod(call.arrays[0].shape)


def warn(choice: Choice) -> None:
    """Warns of every reason, not yet given, that keeps a GPU from running a kernel."""
    # Every kernel refuses ROCm: `explain` says so, and nobody can do anything about it.
    on_cuda = choice.device.platform == "cuda"
    if choice.asked is not None or choice.implementation != "xla" or not on_cuda:
        return
    new = [each for each in choice.refusals if each not in _warned_of]
    if not new or too_small(choice.call):
        return
    reasons = "; ".join(f"{name!r}: {reason}" for name, reason in new)
    warnings.warn(
        f"{choice.call.op} on {choice.device.platform} runs as XLA, not as a kernel "
        f"({reasons}). jaxsoftmax.explain says this of every call; with "
        "implementation='xla' there is no warning",
        PerformanceWarning,
        stacklevel=2,
    )
    _warned_of.update(new)  # after it: as an error it is raised every time


def error(choice: Choice) -> NotImplementedError:
    """What to raise where nothing that was asked for can run."""
    asked = choice.asked or ()
    reasons = "; ".join(f"{name!r}: {reason}" for name, reason in choice.refusals)
    can = [
        name
        for name in choice.family.implementations
        if refusal(name, choice.call, choice.device, choice.family) is None
    ]
    return NotImplementedError(
        f"implementation={asked[0] if len(asked) == 1 else list(asked)!r} cannot run "
        f"{choice.call.op} on {choice.device.platform} ({reasons}). These can: {can}, "
        "or None for the best of them"
    )
