"""Calls of attention, as the primitive ``kernel_call`` has them.

How they are spread over devices is left to XLA, which follows the batch and the heads,
and to cuDNN's own rules. Another kernel runs on what each device has of batch and
heads, and gradients of what these share are added up. On a mesh with explicit axes the
results lie as the queries do, and gradients as their arguments.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from jaxsoftmax._attend.call import ATTENTION, AttentionCall, Config, Inputs, Result
from jaxsoftmax._compat import partition, trace
from jaxsoftmax._compat.primitive import lower_function
from jaxsoftmax._core import dispatch, kernel_call, partitioning
from jaxsoftmax._core.independent import IndependentCalls
from jaxsoftmax._core.primitive import Arrays, Axes, Vmapped
from jaxsoftmax._core.shapes import is_known
from jaxsoftmax._version import __version__

_GRADIENT = "attention_gradient"
# Of `Inputs` and `Result`: b, batch; n and k, heads of queries and of keys; the others
# are not split.
_DIMENSIONS = {
    **{"query": "btnh", "key": "bskh", "value": "bskh", "sinks": "n"},
    **dict.fromkeys(("bias", "scale", "mask"), "bnts"),
    **dict.fromkeys(("query_lengths", "key_lengths", "query_offset"), "b"),
    **{"query_segments": "bt", "key_segments": "bs"},
    **{"out": "btnh", "low": "btnh", "lse": "btn", "lse_low": "btn"},
    "max_logits": "bn",
}
# What devices may share; a group is the heads of queries for one of keys.
_FACTORS = {"b": ("batch",), "k": ("kv_heads",), "n": ("kv_heads", "group")}
_FACTORS |= dict.fromkeys("tsh", ())
# Libraries that ask the device about itself while they lower.
_ELSEWHERE = "is lowered only in a process that has a device of platform"


@dataclasses.dataclass(frozen=True)
class _AttentionOperation(Vmapped, kernel_call.Operation):
    """A call of attention, in every transform and on every mesh.

    Attributes:
      op: ``"attention"`` of inputs; ``"attention_gradient"`` of inputs, result and
        cotangent; ``"attention_pushforward"`` of inputs, result and tangents.
      config: What is static in it.
      tree: The structure of these arguments.
    """

    op: str
    config: Config
    tree: Any

    @property
    def family(self) -> dispatch.Family:
        return ATTENTION

    @property
    def implementation(self) -> dispatch.Asked:
        return self.config.asked

    def call(self, arrays: Sequence[Any]) -> AttentionCall:
        shapes, _ = self.unmapped(arrays)
        structs = [
            jax.ShapeDtypeStruct(shape, x.dtype)
            for shape, x in zip(shapes, arrays, strict=True)
        ]
        inputs, *_ = jax.tree.unflatten(self.tree, structs)
        return AttentionCall(self.op, self.config, inputs)

    def _run(self, name: str, *arrays: jax.Array, **options: Any) -> Arrays:
        def flat(*arrays: jax.Array) -> Arrays:
            arguments = jax.tree.unflatten(self.tree, arrays)
            call = AttentionCall(self.op, config, arguments[0])
            return jax.tree.leaves(run(call, arguments, **options))

        run = dispatch.get(name, ATTENTION).run
        _, mapped = self.unmapped(arrays)
        # A size that is symbolic counts as 1: it is for blocks alone.
        calls = math.prod(mapped) if is_known(mapped) else 1
        entries = self.config.block_entries // max(calls, 1)
        config = dataclasses.replace(self.config, block_entries=entries)
        return self.vmapped(flat)(*arrays)

    def _run_on_mesh(self, name: str, *arrays: jax.Array, **options: Any) -> Arrays:
        """Runs it, with explicit axes of a mesh left to XLA within."""
        run = functools.partial(self._run, name, **options)
        return partitioning.left_to_compiler(run, arrays, self._result_specs)

    def _result_specs(self, arrays: Sequence[jax.Array]) -> Iterator[list[Any]]:
        """How results lie: gradients as their arguments, others as the queries."""
        inputs, *_ = jax.tree.unflatten(self.tree, list(range(len(arrays))))
        specs = [list(jax.typeof(x).sharding.spec) for x in arrays]
        lead = []
        for axes in reversed(self.batch_axes):
            pairs = zip(specs, axes, strict=True)
            # Those of all arrays that are mapped are alike.
            *_, along = (spec.pop(i) for spec, i in pairs if i is not None)
            lead.append(along)

        def entries(index: int) -> list[Any]:
            return [*lead, *specs[index]]

        if self.op != _GRADIENT:
            # All but the last dimension; that of `out` is no longer the queries'.
            rows = [*entries(inputs.query)[:-1], None]
            if not self.config.uses_max_logits:
                return itertools.repeat(rows)
            *batch, _, heads, _ = rows
            low = [] if arrays[inputs.query].dtype.itemsize > 2 else [rows]
            return iter([rows, *low, rows, rows, [*batch, heads]])
        names = wanted_names(self.config, inputs)
        return iter([entries(getattr(inputs, name)) for name in names])

    def evaluate(self, *arrays: jax.Array, definition: bool = False) -> Arrays:
        options = {"definition": True} if definition else {}
        return self._run_on_mesh("xla", *arrays, **options)

    def batch(
        self, arrays: Sequence[Any], axes: Axes
    ) -> tuple[Arrays, "_AttentionOperation", int]:
        return list(arrays), self.under_vmap(axes), 0

    def placement(
        self, context: Any, call: dispatch.Call, platform: str
    ) -> partitioning.Placement:
        count = partitioning.devices_of_compiler(context)
        if count == 1:
            return partitioning.InPlace()
        several = f"XLA may spread the arrays over {count} devices"
        # A kernel is tried for the share of a device, when that is known.
        choice = kernel_call.chosen(
            self, context, call, platform, tried=ATTENTION.partitioned
        )
        if choice.implementation in (None, *ATTENTION.partitioned):
            return partitioning.InPlace(f"{several}, which it follows itself")
        if self.config.dropout_rate:
            return partitioning.InPlace(
                f"{several}, and dropout is by places: put the call in a "
                "jax.shard_map over all axes of the mesh"
            )
        return partitioning.placement(context, call.arrays[0], platform)

    def problem(self, context: Any) -> IndependentCalls:
        shapes, mapped = self.unmapped(context.avals_in)
        arguments = jax.tree.unflatten(self.tree, shapes)
        inputs = arguments[0]
        batch, _, heads, _ = inputs.query
        kv_heads = inputs.key[2]
        sizes = {"batch": batch, "kv_heads": kv_heads, "group": heads // kv_heads}
        sizes |= {f"mapped{i}": size for i, size in enumerate(mapped)}
        # Of size 1 there is nothing to split.
        sizes = {name: size for name, size in sizes.items() if size > 1}

        def factors(name: str, shape: Sequence[int]) -> list[tuple[str, ...]]:
            found = []
            for letter, size in zip(_DIMENSIONS[name], shape, strict=True):
                names = _FACTORS[letter] if size > 1 else ()
                found.append(tuple(name for name in names if name in sizes))
            return found

        names = [
            name
            for argument in arguments
            for name, shape in argument._asdict().items()
            if shape is not None
        ]
        of_inputs = list(map(factors, names, shapes))
        shapes = [x.shape for x in context.avals_out]
        for place in reversed(self.batch_places):
            shapes = [(*shape[:place], *shape[place + 1 :]) for shape in shapes]
        if self.op == _GRADIENT:
            names = wanted_names(self.config, inputs)
        else:
            low = "low" if context.avals_out[0].dtype.itemsize == 2 else None
            names = [n for n in ("out", low, "lse", "lse_low", "max_logits") if n]
        of_outputs = list(map(factors, names, shapes))
        shared = {name for names in _FACTORS.values() for name in names} & sizes.keys()
        sums = [tuple(sorted(shared.difference(*found))) for found in of_outputs]
        for i, (axes, place) in enumerate(
            zip(self.batch_axes, self.batch_places, strict=True)
        ):
            of_mapped = (f"mapped{i}",) if f"mapped{i}" in sizes else ()
            for found, axis in zip(of_inputs, axes, strict=True):
                if axis is not None:
                    found.insert(axis, of_mapped)
            for found in of_outputs:
                found.insert(place, of_mapped)
        digest = partitioning.digest((__version__, self))
        return IndependentCalls(
            function=self.evaluate,
            on_shares=self._run_on_shares,
            sizes=sizes,
            inputs=tuple(map(tuple, of_inputs)),
            outputs=tuple(map(tuple, of_outputs)),
            sums=tuple(sums),
            name=f"{self.op}_{digest}",
        )

    def _run_on_shares(self, *shares: jax.Array) -> Arrays:
        # XLA may ask for this in a thread that does not know of 64 bits.
        with trace.x64_if(any(x.dtype.itemsize == 8 for x in shares)):
            return kernel_call.kernel_call_p.bind(*shares, spec=self)

    def refusal_to_lower(self, name: str, context: Any, platform: str) -> str | None:
        if trace.compile_only_device(context, platform) is not None:
            # XLA makes cuDNN's plans on the device that is compiled for. A program
            # that is compiled without has none, and fails where it runs.
            return "needs the device itself to compile for" if name == "cudnn" else None
        if trace.has_platform(platform) or name == "mosaic_gpu":
            return None
        return f"{_ELSEWHERE} {platform}"

    def trial(
        self, name: str, call: dispatch.Call
    ) -> tuple[Callable[..., Any], list[Any]]:
        assert isinstance(call, AttentionCall)
        arguments: list[Any] = [call.inputs]
        if self.op != "attention":
            xla = dispatch.get("xla", ATTENTION)
            forward = functools.partial(xla.attention, self.config)
            result = jax.eval_shape(forward, call.inputs)
            absent = {n: None for n in Inputs._fields if n not in self.config.wanted}
            tangents = call.inputs._replace(**absent)
            arguments += [result, result if self.op == _GRADIENT else tangents]
        one = dataclasses.replace(self, batch_axes=(), batch_places=())
        return functools.partial(one._run, name), jax.tree.leaves(arguments)

    def lower(
        self, name: str, context: Any, operands: Sequence[Any], platform: str
    ) -> Any:
        reason = self.refusal_to_lower(name, context, platform)
        if name != "xla" and reason is not None:
            if not dispatch.recording():
                raise NotImplementedError(f"implementation={name!r} {reason}")
            name = "xla"  # what is lowered to ask what would run is thrown away
        if name == "cudnn":
            context = partition.with_devices(context)
        xla = dispatch.get("xla", ATTENTION)
        entries = xla.BLOCK_ENTRIES.get(platform, xla.BLOCK_ENTRIES_ELSEWHERE)
        config = dataclasses.replace(self.config, block_entries=entries)
        spec = dataclasses.replace(self, config=config)
        if name in ATTENTION.partitioned:
            run = functools.partial(spec._run_on_mesh, name)
            return lower_function(context, run, operands)
        with trace.one_device():
            run = functools.partial(spec._run, name)
            return lower_function(context, run, operands, untyped=True)


def wanted_names(config: Config, inputs: Inputs) -> list[str]:
    """The inputs that have a gradient, in the order of the leaves of a dict."""
    return sorted(n for n in config.wanted if getattr(inputs, n) is not None)


def bind(op: str, config: Config, *arguments: Any) -> Any:
    """A call in the implementation that is chosen at lowering.

    Returns a `Result`; of a gradient, those that `config` wants by name. As
    `dispatch.DEFINITION` it can be differentiated.
    """
    arrays, tree = jax.tree.flatten(arguments)
    spec = _AttentionOperation(op, config, tree)
    if config.asked == dispatch.DEFINITION:
        outs = spec.evaluate(*arrays, definition=True)
    else:
        outs = kernel_call.kernel_call_p.bind(*arrays, spec=spec)
    if op == _GRADIENT:
        return dict(zip(wanted_names(config, arguments[0]), outs, strict=True))
    top = None
    if config.uses_max_logits:
        *outs, top = outs
    out, *low, lse, lse_low = outs
    return Result(out, low[0] if low else None, lse, lse_low, top)
