"""explain: which implementation each call of a program would run with, and why."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxsoftmax._compat import trace
from jaxsoftmax._core import dispatch
from jaxsoftmax._core.checks import described
from jaxsoftmax._core.device import assumed_device
from jaxsoftmax._core.dispatch import Choice


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What `explain` found; prints as a table.

    Attributes:
      choices: One for each different call, in the order in which they are compiled. A
        choice has the `call` (`op`, `arrays`, `axis`), the `device` (`platform`,
        `kind`), the `implementation` that runs, None if nothing can, and `refusals`:
        pairs of a name that comes before it and the reason why it does not run.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoftmax import explain_for, softmax
      >>> [choice] = explain_for("tpu")(softmax, jnp.zeros((8, 128))).choices
      >>> choice.call.op, choice.device.platform, choice.implementation
      ('softmax', 'tpu', 'xla')
    """

    choices: tuple[Choice, ...]

    def __str__(self) -> str:
        if not self.choices:
            return "no call of jaxsoftmax"
        header = ("call", "runs", "device", "axis", "arrays")
        heading, *rows = _aligned([header, *map(_row, self.choices)])
        lines = [heading]
        pairs = zip(self.choices, rows, strict=True)
        for notes, group in itertools.groupby(pairs, lambda pair: _notes(pair[0])):
            lines += [row for _, row in group]
            lines += notes
        return "\n".join(lines)

    __repr__ = __str__


def _notes(choice: Choice) -> list[str]:
    notes = [f"  not {name}: {why}" for name, why in choice.refusals]
    chunks = getattr(choice.call, "chunks", None)
    if chunks:
        notes.append(f"  linear loss in chunks: {chunks}")
    if choice.devices > 1:
        notes.append(
            f"  on {choice.devices} devices: if they share the arrays, chosen for each "
            "share when compiled"
        )
    return notes


def _row(choice: Choice) -> tuple[str, ...]:
    call, device = choice.call, choice.device
    given = [x for x in call.arrays if x is not None]
    arrays = [f"{x.dtype}[{','.join(map(str, x.shape))}]" for x in given]
    kind = "" if device.kind in (None, device.platform) else f" ({device.kind})"
    runs = choice.implementation or "nothing: an error"
    axis = ",".join(map(str, call.axis)) or "none"
    return call.op, runs, device.platform + kind, axis, " ".join(arrays)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(f"{x:{w}}" for x, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def explain(fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Explanation:
    """Which implementation each softmax in ``fn(*args, **kwargs)`` would run with.

    `fn` is traced and lowered for the platform that jax would run it on. Nothing is
    compiled or executed, and an ``implementation=`` that cannot run is not an error but
    part of the answer. `explain_for` answers for another platform.

    Args:
      fn: Any function that jax can trace: `softmax` itself, the `jax.grad` of a loss, a
        jitted training step. What it does not return is not seen: of a step that
        updates a Flax NNX model in place, return the new state too.
      *args: Its arguments. Arrays may be given as `jax.ShapeDtypeStruct`.
      **kwargs: Its keyword arguments.

    Returns:
      An `Explanation`, whose `choices` have an entry for each different call, the
      derivatives' included, with the `call`, the `device`, the `implementation` that
      runs, and for each one before it in preference the reason why it does not
      (`refusals`). Where the compiler may spread the arrays over several `devices`, the
      choice is made again for each share. It prints as a table. Second and higher
      derivatives run as plain jax.numpy and are not listed.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxsoftmax import explain, softmax
      >>> x = jax.ShapeDtypeStruct((8, 128), jnp.bfloat16)
      >>> explain(softmax, x, axis=0)  # doctest: +SKIP
      call     runs  device  axis  arrays
      softmax  xla   cpu     -2    bfloat16[8,128]
    """
    return _explain(fn, args, kwargs, None)


_PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def explain_for(
    platform: str, device_kind: str | None = None
) -> Callable[..., Explanation]:
    """`explain` for another platform than that of this process.

    Args:
      platform: ``"cuda"``, ``"rocm"``, ``"cpu"``, ``"tpu"``.
      device_kind: What the device calls itself (the `device_kind` of a `jax.Device`),
        ``"NVIDIA H100 80GB HBM3"`` for example. Default: the device of this process, if
        it has one of that platform, else an unknown one.

    Returns:
      A function with the parameters of `explain`.

    Raises:
      TypeError: `platform` or `device_kind` is not a name.
      ValueError: `platform` is unknown.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxsoftmax import explain_for, softmax
      >>> x = jax.ShapeDtypeStruct((8, 128), jnp.float32)
      >>> explanation = explain_for("tpu")(softmax, x)
      >>> explanation.choices[0].implementation
      'xla'
    """
    if not isinstance(platform, str) or not isinstance(device_kind, str | None):
        raise TypeError(
            "explain_for takes the names of a platform and of a device, and returns a "
            "function that takes what explain does, as in explain_for('cuda')(softmax, "
            f"x); got platform {described(platform)}, device_kind "
            f"{described(device_kind)}"
        )
    # "gpu" stands for two platforms, which have different kernels.
    other = platform != "gpu" and trace.has_platform(platform)
    if platform not in _PLATFORMS and not other:
        raise ValueError(f"platform must be one of {_PLATFORMS}, got {platform!r}")

    def explain(fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Explanation:
        with assumed_device(device_kind):
            return _explain(fn, args, kwargs, (platform,))

    return explain


def _explain(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    platforms: tuple[str, ...] | None,
) -> Explanation:
    if not callable(fn):
        raise TypeError(
            "explain takes a function, then its arguments, as in explain(softmax, x), "
            f"got {described(fn)} as the function"
        )
    leaves, tree = jax.tree.flatten((args, kwargs))
    places = [i for i, leaf in enumerate(leaves) if _is_array(leaf)]

    # Arguments other than arrays may be parameters that jax cannot trace, such as axis.
    # A new function each time, or jax would take the lowering from its cache.
    def call(arrays: list[jax.Array]) -> Any:
        full = list(leaves)
        for i, array in zip(places, arrays, strict=True):
            full[i] = array
        args, kwargs = jax.tree.unflatten(tree, full)
        return fn(*args, **kwargs)

    with dispatch.recorded_choices() as choices:
        traced = jax.jit(call).trace([leaves[i] for i in places])
        traced.lower(lowering_platforms=platforms)
    return Explanation(tuple(dict.fromkeys(choices)))


def _is_array(leaf: Any) -> bool:
    if isinstance(leaf, np.ndarray):
        return leaf.ndim > 0  # a scalar may be a constant, as scale may be
    return isinstance(leaf, jax.Array | jax.ShapeDtypeStruct)
