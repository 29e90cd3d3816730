"""A call of attention, as one operation in the program that jax traces.

As in `_kernel_call`, what computes it is decided when the program is lowered. How it is
spread over devices is left to XLA, which follows the batch and the heads, and to
cuDNN's own rules; a Triton kernel runs on what one device has. On a mesh with explicit
axes the results lie as the queries do, and gradients as what they are of.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from jaxsoftmax._attend.call import AttentionCall, Config, Inputs, Result
from jaxsoftmax._compat import partition, trace
from jaxsoftmax._compat.primitive import lower_function
from jaxsoftmax._core import dispatch, partitioning, primitive
from jaxsoftmax._core.device import Device, target_device
from jaxsoftmax._rows import kernel_call
from jaxsoftmax._rows.row_layout import is_known

Arrays = list[jax.Array]

_GRADIENT = "attention_gradient"


@dataclasses.dataclass(frozen=True)
class _Spec:
    """The parameter of the ``attention`` primitive: all of a call but its arrays.

    Attributes:
      op: ``"attention"`` of inputs; ``"attention_gradient"`` of inputs, result and
        cotangent; ``"attention_pushforward"`` of inputs, result and tangents.
      config: Of `_attend.call`.
      asked: Which implementations to try.
      tree: The structure of the arguments.
      definition: Whether it is to be differentiated.
      batch_axes: An entry a vmap, innermost first: the axis that each array is mapped
        over, or None.
    """

    op: str
    config: Config
    asked: dispatch.Asked
    tree: Any
    definition: bool = False
    batch_axes: tuple[tuple[int | None, ...], ...] = ()

    def run(self, implementation: Any, *arrays: jax.Array) -> Arrays:
        static = {"definition": True} if self.definition else {}

        def flat(*arrays: jax.Array) -> Arrays:
            arguments = jax.tree.unflatten(self.tree, arrays)
            function = getattr(implementation, self.op)
            return jax.tree.leaves(function(config, *arguments, **static))

        for axes in self.batch_axes:
            flat = jax.vmap(flat, in_axes=axes)
        _, mapped = self._unmapped(arrays)
        # A size that is symbolic counts as 1: it is for blocks alone.
        mapped = mapped if is_known([mapped]) else 1
        entries = self.config.block_entries // max(mapped, 1)
        config = dataclasses.replace(self.config, block_entries=entries)
        return flat(*arrays)

    def _unmapped(self, arrays: Sequence[Any]) -> tuple[list[tuple[int, ...]], int]:
        """The shapes in one of the calls that it stands for, and how many these are."""
        shapes, size = [tuple(x.shape) for x in arrays], 1
        # The outermost vmap is the last, and its axis is taken off first.
        for axes in reversed(self.batch_axes):
            pairs = list(zip(shapes, axes, strict=True))
            size *= next(shape[axis] for shape, axis in pairs if axis is not None)
            shapes = [_without(shape, axis) for shape, axis in pairs]
        return shapes, size

    def call(self, arrays: Sequence[Any]) -> AttentionCall:
        """What an implementation is asked whether it can run."""
        shapes, _ = self._unmapped(arrays)
        structs = [
            jax.ShapeDtypeStruct(shape, x.dtype)
            for shape, x in zip(shapes, arrays, strict=True)
        ]
        inputs, *_ = jax.tree.unflatten(self.tree, structs)
        return AttentionCall(self.op, self.config, inputs)


def _without(shape: tuple[int, ...], axis: int | None) -> tuple[int, ...]:
    return shape if axis is None else (*shape[:axis], *shape[axis + 1 :])


def _evaluate(spec: _Spec, *arrays: jax.Array) -> Arrays:
    return _on_mesh(spec, _blockwise(), *arrays)


def _evaluate_definition(spec: _Spec, *arrays: jax.Array) -> Arrays:
    return _evaluate(dataclasses.replace(spec, definition=True), *arrays)


def _blockwise() -> Any:
    """`_attend.xla`; not imported before attention is computed."""
    return dispatch.get("xla", dispatch.ATTENTION)


def _on_mesh(spec: _Spec, implementation: Any, *arrays: jax.Array) -> Arrays:
    """Runs it, with explicit axes of a mesh left to XLA within."""
    return partitioning.left_to_compiler(
        functools.partial(spec.run, implementation),
        arrays,
        functools.partial(_specs_of_results, spec),
    )


def _specs_of_results(spec: _Spec, arrays: Sequence[jax.Array]) -> Iterator[list[Any]]:
    """How results lie: gradients as what they are of, others as the queries."""
    inputs, *_ = jax.tree.unflatten(spec.tree, list(range(len(arrays))))

    def entries(index: int) -> list[Any]:
        found = list(jax.typeof(arrays[index]).sharding.spec)
        lead: list[Any] = []
        for axes in reversed(spec.batch_axes):
            axis = axes[index]
            lead.append(None if axis is None else found.pop(axis))
        return [*lead, *found]

    if spec.op != _GRADIENT:
        # All but the last dimension; that of `out` is no longer the queries'.
        return itertools.repeat([*entries(inputs.query)[:-1], None])
    return iter([entries(getattr(inputs, name)) for name in _wanted(spec, inputs)])


def _wanted(spec: _Spec, inputs: Inputs) -> list[str]:
    """In the order in which the leaves of a dict are."""
    return sorted(n for n in spec.config.wanted if getattr(inputs, n) is not None)


# The libraries ask the device about itself while they lower.
_ELSEWHERE = "is lowered only in a process that has a device of platform"


def _lower(context: Any, *operands: Any, spec: _Spec, platform: str) -> Any:
    call, device = spec.call(context.avals_in), target_device(platform)
    choice = dispatch.choose(
        spec.asked,
        call,
        device,
        attempt=functools.partial(_failure_to_lower, spec, call, device),
        unfollowed=_unfollowed(context),
        family=dispatch.ATTENTION,
    )
    kernel_call.report(choice, warn=True)
    name = choice.implementation or "xla"
    if not trace.has_platform(platform):
        if name != "xla" and not kernel_call.recording():
            raise NotImplementedError(
                f"implementation={name!r} {_ELSEWHERE} {platform}"
            )
        name = "xla"  # what is lowered to ask what would run there is thrown away
    implementation = dispatch.get(name, dispatch.ATTENTION)
    if name == "cudnn":
        context = partition.with_devices(context)
    xla = _blockwise()
    entries = xla.BLOCK_ENTRIES.get(platform, xla.BLOCK_ENTRIES_ELSEWHERE)
    config = dataclasses.replace(spec.config, block_entries=entries)
    spec = dataclasses.replace(spec, config=config)
    if name not in dispatch.ATTENTION.partitioned:
        run = functools.partial(spec.run, implementation)
        with trace.one_device():
            return lower_function(context, run, operands, untyped=True)
    run = functools.partial(_on_mesh, spec, implementation)
    return lower_function(context, run, operands)


def _unfollowed(context: Any) -> str | None:
    """Why what XLA cannot partition cannot run here, or None if it can."""
    count = partitioning.devices_of_compiler(context)
    if count == 1:
        return None
    return (
        f"XLA may spread the arrays over {count} devices, which this cannot follow: "
        "put the call in a jax.shard_map over all axes of the mesh"
    )


def _failure_to_lower(
    spec: _Spec, call: AttentionCall, device: Device, name: str
) -> str | None:
    """Why what should run cannot be lowered, or None if it can or no one knows."""
    if name == "xla":
        return None
    if not trace.has_platform(device.platform):
        return None if kernel_call.recording() else f"{_ELSEWHERE} {device.platform}"
    return _try_to_lower(dataclasses.replace(spec, batch_axes=()), call, device, name)


@functools.lru_cache(maxsize=4096)
def _try_to_lower(
    spec: _Spec, call: AttentionCall, device: Device, name: str
) -> str | None:
    arguments: list[Any] = [call.inputs]
    if spec.op == _GRADIENT:
        forward = functools.partial(_blockwise().attention, spec.config)
        arguments += 2 * [jax.eval_shape(forward, call.inputs)]
    implementation = dispatch.get(name, dispatch.ATTENTION)
    try:
        with trace.one_device():
            traced = jax.jit(functools.partial(spec.run, implementation)).trace(
                *jax.tree.leaves(arguments)
            )
            traced.lower(lowering_platforms=(device.platform,))
    except Exception as error:  # whatever the library or a version of jax raises
        return f"{type(error).__name__}: {error}"
    return None


def _batch(
    arrays: Sequence[Any], axes: Sequence[int | None], *, spec: _Spec
) -> tuple[Arrays, list[int]]:
    batched = dataclasses.replace(spec, batch_axes=(*spec.batch_axes, tuple(axes)))
    outs = attention_p.bind(*arrays, spec=batched)
    return outs, [0] * len(outs)


attention_p = primitive.new_primitive(
    "attention", _evaluate, definition=_evaluate_definition, lower=_lower
)
primitive.set_rules(attention_p, batch=_batch)


def _bind(
    op: str, config: Config, asked: dispatch.Asked, *arguments: Any
) -> tuple[_Spec, Arrays]:
    """Binds the primitive; or, as a definition, what can be differentiated."""
    definition = asked == dispatch.DEFINITION
    arrays, tree = jax.tree.flatten(arguments)
    spec = _Spec(op, config, asked, tree, definition)
    return spec, (
        _evaluate(spec, *arrays) if definition else attention_p.bind(*arrays, spec=spec)
    )


def _result(outs: Arrays) -> Result:
    out, *low, lse, lse_low = outs
    return Result(out, low[0] if low else None, lse, lse_low)


def attention(config: Config, asked: dispatch.Asked, x: Inputs) -> Result:
    """As `_attend.xla` has it, in the implementation chosen."""
    return _result(_bind("attention", config, asked, x)[1])


def attention_pushforward(
    config: Config, asked: dispatch.Asked, x: Inputs, result: Result, tangents: Inputs
) -> Result:
    """Likewise; with `dispatch.DEFINITION` it can be differentiated."""
    return _result(
        _bind("attention_pushforward", config, asked, x, result, tangents)[1]
    )


def attention_gradient(
    config: Config, asked: dispatch.Asked, x: Inputs, result: Result, cotangent: Result
) -> dict[str, jax.Array]:
    """Likewise."""
    spec, outs = _bind(_GRADIENT, config, asked, x, result, cotangent)
    return dict(zip(_wanted(spec, x), outs, strict=True))
