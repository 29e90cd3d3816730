"""Which implementation runs: the ``implementation=`` argument and what follows from it.

`resolve` checks the argument where the public function is called. `choose` picks the
implementation later, when the call is lowered: only then are platform and device known.
"""

import contextlib
import contextvars
import dataclasses
import functools
import importlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from jaxsoftmax._core import primitive
from jaxsoftmax._core.device import Device
from jaxsoftmax._core.shapes import is_known

# The names that were asked for, in this order; None for the best that can run.
Asked = tuple[str, ...] | None

# Not an implementation to ask for: what derivatives of derivatives are taken of.
DEFINITION = ("definition",)


_recorded: contextvars.ContextVar[list["Choice"] | None]
_recorded = contextvars.ContextVar("_recorded", default=None)
_warned_of: set[tuple[str, str]] = set()


class Call(Protocol):
    """What an implementation is asked whether it can run; frozen.

    Attributes:
      op: What is computed.
      arrays: Shape and dtype of each array, None for an absent one.
      axis: What is reduced, as negative ints.
    """

    def __hash__(self) -> int: ...
    @property
    def op(self) -> str: ...
    @property
    def arrays(self) -> tuple[Any, ...]: ...
    @property
    def axis(self) -> tuple[int, ...]: ...


@dataclasses.dataclass(frozen=True, eq=False)
class Family:
    """Operations that have the same implementations.

    Attributes:
      implementations: By the name that is asked for: modules with two functions,
        `refusal` and `run`. As strings: they are imported when first needed, because
        what they import may not be installed; and a call carries names, which are
        hashed.
      preferences: By platform: what runs under None, the first that can. Elsewhere
        "xla" alone.
      partitioned: What the compiler can spread over devices.
      reason_for_xla: Why "xla" comes first for a call that every implementation can
        run, or None.
      reason_against: The same for one of them by name, where others may come first.
      order: The names of `preferences`, in the order they are tried for a call.
    """

    implementations: dict[str, Any]
    preferences: dict[str, tuple[str, ...]]
    partitioned: tuple[str, ...] = ("xla",)
    reason_for_xla: Callable[[Any], str | None] = lambda call: None
    reason_against: Callable[[str, Any], str | None] = lambda name, call: None
    order: Callable[[Any, tuple[str, ...]], tuple[str, ...]] = lambda call, names: names


def get(name: str, family: Family) -> Any:
    """The implementation of that name; imports its module."""
    entry = family.implementations[name]
    return importlib.import_module(entry) if isinstance(entry, str) else entry


def resolve(implementation: str | Sequence[str] | None, family: Family) -> Asked:
    """The names that the ``implementation=`` argument asks for, or None.

    `DEFINITION` where nothing but jax's own primitives may be traced.
    """
    if implementation is None:
        return DEFINITION if primitive.standard_primitives_needed() else None
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
    if primitive.standard_primitives_needed():
        if "xla" not in names:
            raise NotImplementedError(
                f"implementation={implementation!r} cannot run inside a Pallas kernel "
                "or standard_primitives: pass None or 'xla' there"
            )
        return DEFINITION
    return tuple(names)


class PerformanceWarning(UserWarning):
    """``implementation=None`` falls back to XLA on a GPU: no kernel takes the call.

    Issued where the program is lowered, once per process and reason.

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
      is_faster: Whether "xla" runs because it is the faster, by
        `Family.reason_for_xla` or `Family.reason_against`, and not because nothing else
        can.
    """

    call: Call
    device: Device
    asked: Asked
    family: Family
    implementation: str | None
    refusals: tuple[tuple[str, str], ...] = ()
    devices: int = 1
    is_faster: bool = False


def choose(
    asked: Asked,
    call: Call,
    device: Device,
    attempt: Callable[[str], str | None] = lambda name: None,
    *,
    family: Family,
    unfollowed: str | None = None,
    devices: int = 1,
) -> Choice:
    """The first implementation that can run, of those asked for or of the best.

    `attempt` tries a name that refuses nothing, and gives the reason if that fails. Not
    used for a name that is asked for alone: there, the failure is the answer.
    `unfollowed` is why nothing but `Family.partitioned` can follow how the arrays are
    spread over devices, or None. The others are those of the `Choice`.
    """
    chosen = functools.partial(Choice, call, device, asked, family, devices=devices)
    if math.prod(call.arrays[0].shape) == 0:
        return chosen("xla")  # nothing to run a kernel on
    preferred = family.preferences.get(device.platform, ("xla",))
    names = asked or family.order(call, preferred)
    refusals: list[tuple[str, str]] = []
    faster = None if asked else family.reason_for_xla(call)
    if faster is not None:
        others = tuple((name, faster) for name in names if name != "xla")
        return chosen("xla", others, is_faster=True)
    is_faster = False
    for name in names:
        reason = None if asked else family.reason_against(name, call)
        is_faster = is_faster or reason is not None
        reason = reason or refusal(name, call, device, family)
        if name not in family.partitioned:
            reason = reason or unfollowed
        if name != "xla" and reason is None and len(names) > 1:
            reason = attempt(name)
        if reason is None:
            is_faster = is_faster and name == "xla"
            return chosen(name, tuple(refusals), is_faster=is_faster)
        refusals.append((name, reason))
    return chosen(None, tuple(refusals))


def refusal(name: str, call: Call, device: Device, family: Family) -> str | None:
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


@contextlib.contextmanager
def recorded_choices() -> Iterator[list[Choice]]:
    """Collects what is chosen, and for now neither raises nor warns of it."""
    choices: list[Choice] = []
    token = _recorded.set(choices)
    try:
        yield choices
    finally:
        _recorded.reset(token)


def recording() -> bool:
    """Whether choices are recorded: a program is lowered to ask what would run."""
    return _recorded.get() is not None


def report(choice: Choice, *, warn: bool) -> None:
    """Records a choice, or raises or warns of what it says."""
    choices = _recorded.get()
    if choices is not None:
        choices.append(choice)
    elif choice.implementation is None:
        raise error(choice)
    elif warn:
        _warn(choice)


def _warn(choice: Choice) -> None:
    """Warns of every reason, not yet given, that keeps a GPU from running a kernel."""
    platform = choice.device.platform
    if choice.is_faster:
        return
    # Every kernel refuses ROCm: `explain` says so, and nobody can do anything about it.
    if choice.asked is not None or choice.implementation != "xla" or platform == "rocm":
        return
    new = [each for each in choice.refusals if each not in _warned_of]
    if not new:
        return
    reasons = "; ".join(f"{name!r}: {reason}" for name, reason in new)
    warnings.warn(
        f"{choice.call.op} on {platform} runs as XLA, not as a kernel "
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
