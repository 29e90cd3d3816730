"""The one home of everything in jax that is version-dependent or not fully public.

Each name says what it is used for and for which versions it was checked. Checked with
jax 0.10.0, 0.10.2, 0.11.2 and 0.12.0.1.

`jax.extend` and `jax.interpreters` are the documented places for extensions of jax,
with weaker promises of stability than `jax.numpy`. But `jax.extend` imports Pallas,
which takes half as long as importing all of jaxsoftmax: it waits until it is needed.
"""

import contextlib
import dataclasses
import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src import ad_checkpoint, checkify, config, sharding_impls
from jax._src.core import Primitive  # that of jax.extend.core
from jax._src.lib import xla_client  # type: ignore[attr-defined]
from jax.experimental import jet
from jax.experimental.custom_partitioning import custom_partitioning
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType

# A cotangent or tangent that is zero everywhere and was never materialised.
SymbolicZero: Any = ad.Zero

_GPU_PLATFORMS = ("cuda", "rocm")
# Where `lower_partitioned` has been run.
PARTITIONED_PLATFORMS = ("cpu", "cuda")


def new_primitive(
    name: str,
    evaluate: Callable[..., list[jax.Array]],
    *,
    definition: Callable[..., list[jax.Array]] | None = None,
    lower: Callable[..., Any] | None = None,
) -> Any:
    """Makes a primitive with many results that runs and lowers as `evaluate` does.

    Args:
      name: What the primitive is called in a jaxpr.
      evaluate: ``(spec, *arrays) -> list of arrays``; `spec`, the primitive's only
        parameter, is hashable.
      definition: The same in operations that jax can differentiate, for
        `jax.experimental.jet`. Default: `evaluate`.
      lower: Lowers it in another way, called once for each platform that a program is
        lowered for: ``(context, *operands, spec, platform) -> results``, which
        `lower_function` makes. Types are still those of `evaluate`.
    """
    primitive = Primitive(name)
    primitive.multiple_results = True

    def bind(spec: Any, *arrays: jax.Array) -> list[jax.Array]:
        if not any(isinstance(x, jax.core.Tracer) for x in arrays):
            # Not traced: jax.disable_jit, or jax_debug_nans, which runs what gave a
            # NaN again without jit. To bind would come back here.
            return evaluate(spec, *arrays)
        return primitive.bind(*arrays, spec=spec)

    evaluated = jax.jit(evaluate, static_argnums=0)
    compiled = evaluated if lower is None else jax.jit(bind, static_argnums=0)

    def run(*arrays: jax.Array, spec: Any) -> list[jax.Array]:
        return compiled(spec, *arrays)

    def abstract_eval(*avals: Any, spec: Any) -> Sequence[Any]:
        # Tracing, instead of computing shapes by hand, also carries what shard_map and
        # sharding in types add to an abstract value.
        return evaluated.trace(spec, *avals).jaxpr.out_avals

    def lower_evaluated(context: Any, *operands: Any, spec: Any) -> Any:
        return lower_function(context, functools.partial(evaluate, spec), operands)

    primitive.def_impl(run)
    primitive.def_abstract_eval(abstract_eval)
    if lower is None:
        mlir.register_lowering(primitive, lower_evaluated)
    else:
        _register_by_platform(primitive, lower)
    _register_interpreters(primitive, definition or evaluate)
    return primitive


_JET_RULES: dict[Any, Callable[..., Any]] = jet.jet_rules


def _register_interpreters(
    primitive: Any, definition: Callable[..., list[jax.Array]]
) -> None:
    """What `jax.experimental.jet` and `checkify` do where they meet the primitive.

    Both look rules up by primitive, in tables that are private in all versions.
    """

    def jet_rule(primals: Any, series: Any, *, spec: Any) -> Any:
        # Without jit a scan is a loop of Python's: jet has no rule for it.
        with jax.disable_jit():
            return _jet(functools.partial(definition, spec), primals, series)

    _JET_RULES[primitive] = jet_rule
    # NaN is looked for in the results: a definition may have some on the way to them.
    checkify.error_checks[primitive] = functools.partial(
        checkify.nan_error_check, primitive
    )


def _jet(f: Callable[..., Any], primals: Sequence[Any], series: Sequence[Any]) -> Any:
    """A rule of jet: the series of ``f(*primals)``.

    Integers have none: rules of jet's own would divide those that it gives them.
    """
    places = [i for i, x in enumerate(primals) if jnp.issubdtype(x.dtype, jnp.floating)]

    def function(*floats: Any) -> Any:
        given = dict(zip(places, floats, strict=True))
        return f(*(given.get(i, x) for i, x in enumerate(primals)))

    moving, terms = ([given[i] for i in places] for given in (primals, series))
    return jet.jet(function, tuple(moving), tuple(terms), factorial_scaled=False)


def _evaluate_plainly(jaxpr: Any, *arrays: Any) -> list[Any]:
    """`jax.core.eval_jaxpr`, and a `jax.custom_jvp` function without its rule."""
    values = dict(zip(jaxpr.invars, arrays, strict=True))

    def value(x: Any) -> Any:
        return x.val if hasattr(x, "val") else values[x]

    for eqn in jaxpr.eqns:
        operands = [value(x) for x in eqn.invars]
        if "call_jaxpr" in eqn.params:
            outs = _evaluate_plainly(eqn.params["call_jaxpr"].jaxpr, *operands)
        else:
            outs = eqn.primitive.bind(*operands, **eqn.params)
            outs = outs if eqn.primitive.multiple_results else [outs]
        values.update(zip(eqn.outvars, outs, strict=True))
    return [value(x) for x in jaxpr.outvars]


def _complete_jet() -> None:
    """The rules that jet lacks in all versions, of what surrounds our primitives.

    ``jet.jet(jax.checkpoint(jnp.sin), (1.0,), ([1.0],))`` is a KeyError; so is it with
    `jax.ad_checkpoint.checkpoint_name` in the function. One with a `jax.custom_jvp`
    function is an UnexpectedTracerError.
    """

    def checkpoint_rule(primals: Any, series: Any, *, jaxpr: Any, **_: Any) -> Any:
        return _jet(functools.partial(_evaluate_plainly, jaxpr), primals, series)

    if ad_checkpoint.name_p not in _JET_RULES:
        jet.deflinear(ad_checkpoint.name_p)
    _JET_RULES.setdefault(ad_checkpoint.remat_p, checkpoint_rule)


_complete_jet()


def inside_kernel() -> bool:
    """Whether the body of a Pallas kernel is traced, which knows jax's operations only.

    The grid that its primitives ask for is private in all versions.
    """
    core: Any = sys.modules.get("jax._src.pallas.core")
    if core is None:
        return False
    try:
        core.axis_frame()
    except AssertionError:
        return False
    return True


def _register_by_platform(primitive: Any, lower: Callable[..., Any]) -> None:
    # jax branches on the platform, where there are several, between rules only.
    for platform in _GPU_PLATFORMS:
        rule = functools.partial(lower, platform=platform)
        mlir.register_lowering(primitive, rule, platform=platform)

    def elsewhere(context: Any, *operands: Any, spec: Any) -> Any:
        platforms = context.platforms or context.module_context.platforms
        # Under compute_on("device_host") the program's platform may still be a GPU.
        other = [p for p in platforms if p not in _GPU_PLATFORMS]
        platform = other[0] if other else "cpu"
        return lower(context, *operands, spec=spec, platform=platform)

    mlir.register_lowering(primitive, elsewhere)


def lower_function(
    context: Any,
    f: Callable[..., list[jax.Array]],
    operands: Sequence[Any],
    *,
    untyped: bool = False,
) -> Any:
    """Traces `f` and emits it in place, so that XLA can fuse it with its neighbours.

    Args:
      context: Of the lowering rule.
      f: A function of the arrays.
      operands: Their values in the program.
      untyped: Gives `f` arrays whose types say nothing about a mesh.
    """
    if untyped:
        avals = [jax.core.ShapedArray(x.shape, x.dtype) for x in context.avals_in]
        context = context.replace(avals_in=avals)

    def emitted(*arrays: jax.Array) -> list[jax.Array]:
        return f(*arrays)

    return mlir.lower_fun(emitted, multiple_results=True)(context, *operands)


# --- programs for several devices -----------------------------------------------------
#
# Of all versions. For which devices an operation is lowered stands in the lowering
# rule's context, whose classes are private: sharding_impls.ShardingContext under jit,
# SPMDAxisContext inside shard_map, ReplicaAxisContext inside pmap.


def device_count(context: Any) -> int | None:
    """Over how many devices the compiler may spread the arrays; None inside a map."""
    axis_context = context.module_context.axis_context
    if isinstance(axis_context, sharding_impls.ShardingContext):
        return axis_context.num_devices
    return None


def mapped_mesh(context: Any) -> tuple[Any, frozenset[Any]] | None:
    """Inside `jax.shard_map`: the mesh, and the names of those axes that are manual."""
    axis_context = context.module_context.axis_context
    if not isinstance(axis_context, sharding_impls.SPMDAxisContext):
        return None
    return axis_context.mesh, frozenset(axis_context.manual_axes)


def typed_mesh(context: Any) -> Any:
    """The mesh that the operands' types name, or None."""
    return _mesh_of_types(context.avals_in)


def mesh_of(arrays: Sequence[jax.Array]) -> Any:
    """The mesh that the arrays' types name, or None."""
    return _mesh_of_types([jax.typeof(x) for x in arrays])


def _mesh_of_types(types: Sequence[Any]) -> Any:
    meshes = [each.sharding.mesh for each in types]
    return next((mesh for mesh in meshes if not mesh.empty), None)


def explicit_axes(mesh: Any) -> list[Any]:
    """The names of a mesh's axes that are in the types of arrays."""
    pairs = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return [name for name, kind in pairs if kind == AxisType.Explicit]


def has_platform(platform: str) -> bool:
    """Whether this process has a device of the platform."""
    try:
        return bool(jax.local_devices(backend=platform))
    except RuntimeError:
        return False


def uses_shardy() -> bool:
    """Whether programs are partitioned by Shardy: the flag is on by default."""
    return bool(getattr(jax.config, "jax_use_shardy_partitioner", True))


def for_export(context: Any) -> bool:
    """Whether the program is to be serialized: it then must not call back."""
    return bool(context.module_context.lowering_parameters.for_export)


def lower_partitioned(
    context: Any,
    f: Callable[..., list[jax.Array]],
    operands: Sequence[Any],
    *,
    partition: Callable[[Any, Sequence[Any], Sequence[Any]], Any],
    rule: str,
    count: int,
    name: str,
) -> Any:
    """Emits `f` as one operation that XLA asks `partition` how to spread.

    Under Shardy, through `custom_partitioning`. Its own lowering rule wants the devices
    of the program, which a primitive is told of if it is in
    ``jax._src.dispatch.prim_requires_devices_during_lowering``; jax then refuses to
    lower for an abstract mesh. But it only hands them on: here, `count` of any.

    Args:
      context: Of the lowering rule.
      f: A function of the arrays, for the types.
      operands: Their values in the program.
      partition: ``(mesh, arguments, results) -> (mesh, function of the shares,
        shardings of the results, shardings of the arguments)``. Each argument and
        result has a shape, a dtype and, for `tiles_of`, a sharding.
      rule: Which dimensions are spread alike, in the notation of `custom_partitioning`.
      count: How many devices there are.
      name: Of the function in the program that holds the operation. Nothing else there
        says what is computed, but an address that differs from start to start: where
        jax is told to leave that out of the key of its compilation cache
        (``jax_remove_custom_partitioning_ptr_from_cache_key``), calls that differ must
        differ in this, or one would run as the other.
    """
    operation = custom_partitioning(lambda *arrays: tuple(f(*arrays)))
    operation.def_partition(
        partition=partition, sharding_rule=rule, decode_shardings=False
    )
    module_context = context.module_context.replace(
        axis_context=sharding_impls.ShardingContext(count, _any_devices(count))
    )
    context = context.replace(module_context=module_context)

    def named(*arrays: Any) -> list[Any]:
        return list(operation(*arrays))

    named.__name__ = named.__qualname__ = name
    with one_device():
        return lower_function(context, jax.jit(named), operands, untyped=True)


def with_devices(context: Any) -> Any:
    """The context, naming devices: jax's own custom_partitioning wants some.

    As in `lower_partitioned`, only how many there are plays a part.
    """
    axis_context = context.module_context.axis_context
    if not isinstance(axis_context, sharding_impls.ShardingContext):
        return context
    if axis_context.device_assignment is not None:
        return context
    devices = _any_devices(axis_context.num_devices)
    named = dataclasses.replace(axis_context, device_assignment=devices)
    module_context = context.module_context.replace(axis_context=named)
    return context.replace(module_context=module_context)


def _any_devices(count: int) -> tuple[Any, ...]:
    """So many devices, where only how many there are plays a part."""
    here = jax.devices()
    return tuple((here * -(-count // len(here)))[:count])


def devices_in_a_line(count: int, name: str) -> Any:
    """A mesh of one axis, for the collectives of a program that `partition` returns.

    Collectives name devices by their place in the program; which they are plays no
    part.
    """
    return jax.sharding.Mesh(np.array(_any_devices(count)), (name,))


def tiles_of(sharding: Any, ndim: int) -> np.ndarray:
    """Which device has which tile of an array, as `partition` is told.

    Args:
      sharding: A GSPMDSharding.
      ndim: The array's rank.

    Returns:
      The places of the devices in the program: an axis for each dimension, as long as
      that is split, and one for the copies of a tile.
    """
    hlo = sharding._to_xla_hlo_sharding(ndim)
    count = len(sharding._device_assignment)
    if hlo.is_replicated():
        return np.arange(count).reshape((1,) * ndim + (count,))
    sizes = hlo.tile_assignment_dimensions()[:ndim]
    return np.array(hlo.tile_assignment_devices()).reshape(*sizes, -1)


def sharding_of(tiles: np.ndarray, like: Any) -> Any:
    """The sharding whose `tiles_of` is `tiles`, over the devices of `like`."""
    proto = xla_client.OpSharding()
    proto.type = xla_client.OpSharding.Type.OTHER
    proto.tile_assignment_dimensions = list(tiles.shape)
    proto.tile_assignment_devices = tiles.ravel().tolist()
    proto.replicate_on_last_tile_dim = True
    hlo = xla_client.HloSharding.from_proto(proto)
    return type(like)(like._device_assignment, hlo)


# --- the device -----------------------------------------------------------------------


def abstract_device_kind(platform: str) -> str | None:
    """What the device of the abstract mesh in use calls itself, if it has one.

    Before jax 0.10.2 it does not say of which platform it is, and is ignored. The
    platform may be ``"gpu"`` for both kinds of GPU.
    """
    device: Any = jax.sharding.get_abstract_mesh().abstract_device
    alias = "gpu" if platform in _GPU_PLATFORMS else platform
    if device is None or getattr(device, "platform", None) not in (platform, alias):
        return None
    return device.device_kind


def x64_if(needed: bool) -> contextlib.AbstractContextManager[Any]:
    """Enables 64 bits if they are needed, and else leaves that as it is."""
    return jax.enable_x64(True) if needed else contextlib.nullcontext()


@contextlib.contextmanager
def one_device() -> Iterator[None]:
    """Traces as if there were no mesh, but keeps its abstract device.

    Inside `jax.shard_map` a Pallas kernel would otherwise have to say how its results
    vary over the mesh (``check_vma``, private in all versions).
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh), config._check_vma(False):
        yield


def set_rules(
    primitive: Any,
    *,
    batch: Callable[..., Any],
    jvp: Callable[..., Any] | None = None,
    transpose: Callable[..., Any] | None = None,
) -> None:
    """Registers the batching rule and, where there is one, derivative and transpose."""
    batching.primitive_batchers[primitive] = batch
    if jvp is not None:
        ad.primitive_jvps[primitive] = jvp
    if transpose is not None:
        ad.primitive_transposes[primitive] = transpose


def is_linear_operand(x: Any) -> bool:
    """True for an operand whose cotangent a transpose rule is asked for."""
    return ad.is_undefined_primal(x)


def materialize(x: Any) -> jax.Array:
    """Turns a symbolic zero into an array; leaves an array alone."""
    return ad.instantiate_zeros(x)


def zero_tangent(primal: jax.Array) -> Any:
    """The symbolic zero tangent of `primal`."""
    return SymbolicZero.from_primal_value(primal)


def mapped_mesh_axis(arrays: Sequence[Any], axes: Sequence[int | None]) -> Any:
    """The explicit mesh axis that the types spread the mapped axis over, or None."""
    specs = [jax.typeof(x).sharding.spec for x in arrays]
    entries = [
        spec[axis]
        for spec, axis in zip(specs, axes, strict=True)
        if axis is not None and axis < len(spec)
    ]
    return next((entry for entry in entries if entry is not None), None)


def move_batch_axis_to_front(
    x: jax.Array, axis: int | None, size: int, mesh_axis: Any = None
) -> jax.Array:
    """Moves the mapped axis to the front; repeats an unmapped array `size` times.

    Args:
      x: The array.
      axis: The mapped axis, or None.
      size: Of the mapped axis.
      mesh_axis: Of `mapped_mesh_axis`: what is repeated is spread over it.
    """
    return batching.bdim_at_front(x, axis, size, mesh_axis)


def unwritten(shape: Sequence[int], dtype: Any, *like: Any) -> jax.Array:
    """An array of any values, to be written by a loop: on a GPU it costs nothing.

    Inside of `jax.shard_map` it varies over the axes of the mesh that any of `like`
    varies over, as what the loop carries must.
    """
    return _as_varying(lax.empty(tuple(shape), dtype), like)


def zeros(shape: Sequence[int], dtype: Any, *like: Any) -> jax.Array:
    """As `unwritten`, but of zeros."""
    return _as_varying(jnp.zeros(tuple(shape), dtype), like)


def threefry(key: jax.Array, high: jax.Array, low: jax.Array) -> jax.Array:
    """The 32 bits that `jax.random.bits` has at a place of 64 bits, high and low.

    Where jax_threefry_partitionable is on, as by default.
    """
    from jax.extend import random as jex_random

    first, second = (jnp.broadcast_to(key[i], high.shape) for i in range(2))
    one, other = jex_random.threefry2x32_p.bind(first, second, high, low)
    return one ^ other


def varying_alike(arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """`arrays`, inside of `jax.shard_map` each varying where any of them does."""
    return [_as_varying(x, arrays) for x in arrays]


def _as_varying(x: jax.Array, like: Sequence[Any]) -> jax.Array:
    axes = frozenset[Any]().union(*(_varying(a) for a in jax.tree.leaves(like)))
    missing = tuple(axes - _varying(x))
    return lax.pcast(x, missing, to="varying") if missing else x


def _varying(x: Any) -> frozenset[Any]:
    """The manual axes of a mesh that the type of `x` says it varies over."""
    kind = getattr(jax.typeof(x), "manual_axis_type", None)
    if kind is None:  # before 0.10.2
        return getattr(jax.typeof(x), "vma", frozenset())
    return kind.varying


def run_over_first(
    f: Callable[..., Any], x: jax.Array, *others: Any
) -> tuple[jax.Array, ...]:
    """Runs a kernel that writes a result where its first argument is.

    XLA copies `x` first where it is used again. A program that keeps nothing of it has
    one array less: the kernel's result is one with its operand.

    Args:
      f: ``(reference to x, *others) -> the other results``.
      x: What is written over.
      *others: Further arguments.

    Returns:
      What is then in the place of `x`, and the other results.
    """
    ref = jax.new_ref(x)
    results = f(ref, *others)
    return jax.freeze(ref), *results


def triton_call(
    *arrays: jax.Array,
    kernel: Any,
    results: Any,
    grid: tuple[int, ...],
    name: str,
    num_warps: int,
    enable_fp_fusion: bool,
    in_place: bool = False,
    **constants: Any,
) -> Any:
    """Calls a Triton kernel: pointers to `arrays`, then to the results; `constants`.

    With `enable_fp_fusion` the compiler may contract a product and an addition to an
    fma. Always passed: Triton 3.9 contracts by default and warns that 3.10 will not, so
    results would change with its version.

    With `in_place` it writes the first of several results where the first array is, and
    has no use for the pointer to that result.

    For jax-triton 0.3.1, which names the results' types `out_shape` and takes
    `enable_fp_fusion` itself, and 0.4.1, which takes it in `backend_options`, and a
    reference to what is written in place, and no type of it.
    """
    import jax_triton

    call = functools.partial(
        jax_triton.triton_call,
        kernel=kernel,
        grid=grid,
        name=name,
        num_warps=num_warps,
        **constants,
    )
    fusion = {"enable_fp_fusion": enable_fp_fusion}
    if "out_type" not in inspect.signature(jax_triton.triton_call).parameters:
        aliases = {"input_output_aliases": {0: 0}} if in_place else {}
        return call(*arrays, out_shape=results, **fusion, **aliases)
    call = functools.partial(call, backend_options=fusion)
    if not in_place:
        return call(*arrays, out_type=results)
    # Any pointer stands for that to the first result.
    others = functools.partial(call, out_type=tuple(results[1:]))
    return run_over_first(others, *arrays, arrays[-1])


# --- Pallas Mosaic GPU ----------------------------------------------------------------
#
# jax.experimental: no promise of stability. What differs between 0.10.2 and 0.12.0.1 of
# what the kernels use is here. Imported when first used: it is slow to import, and some
# builds of jaxlib lack what it needs.


def pallas() -> Any:
    """The module jax.experimental.pallas."""
    return importlib.import_module("jax.experimental.pallas")


def mosaic_gpu() -> Any:
    """The module jax.experimental.pallas.mosaic_gpu."""
    return importlib.import_module("jax.experimental.pallas.mosaic_gpu")


@functools.cache
def mosaic_gpu_reason() -> str | None:
    """Why Mosaic GPU kernels cannot be made with this jax, or None if they can."""
    if jax.__version_info__ < (0, 10, 2):
        # It takes neither `out_type` nor the layouts that the kernels need.
        return f"needs jax 0.10.2 or newer, this is {jax.__version__}"
    try:
        mosaic_gpu()
    except Exception as error:  # whatever a build without it raises
        return (
            f"importing Pallas Mosaic GPU failed with {type(error).__name__}: {error}"
        )
    return None


@functools.cache
def _mosaic_load_needs_index() -> bool:
    index = inspect.signature(mosaic_gpu().load).parameters.get("idx")
    return index is not None and index.default is inspect.Parameter.empty


def mosaic_load(ref: Any, layout: Any) -> jax.Array:
    """Loads all of `ref` in `layout`. Until 0.11 an index must be given, later not."""
    index = (Ellipsis,) if _mosaic_load_needs_index() else ()
    return mosaic_gpu().load(ref, *index, layout=layout, optimized=False)


def mosaic_over_first(kernel: Any, *operands: jax.Array) -> tuple[jax.Array, ...]:
    """`run_over_first` of what `plgpu.kernel` makes.

    Before 0.11 a reference does not get through the batching rule that is around it.
    """
    if jax.__version_info__ < (0, 11):
        kernel = inspect.unwrap(kernel)
    return run_over_first(kernel, *operands)


def mosaic_store(ref: Any, value: jax.Array) -> None:
    """Stores all of `ref`. From 0.12 on, a store that is not coalesced must say so."""
    plgpu = mosaic_gpu()
    if hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value


# --- cuDNN ----------------------------------------------------------------------------
#
# The public `jax.nn.dot_product_attention` rounds lse to 16 bits, and its gradient is
# one with its forward. What it calls, in jax._src.cudnn in all versions, does neither.


def _cudnn() -> Any:
    return importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")


def _cudnn_mask(causal: bool, padding: bool) -> Any:
    names = {
        (False, False): "NO_MASK",
        (True, False): "CAUSAL",
        (False, True): "PADDING",
        (True, True): "PADDING_CAUSAL",
    }
    return getattr(_cudnn().MaskType, names[causal, padding])


def cudnn_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None,
    query_lengths: jax.Array | None,
    key_lengths: jax.Array | None,
    *,
    keeps_lse: bool,
    scale: float,
    causal: bool,
    window: int | None,
) -> tuple[jax.Array, jax.Array]:
    """Output [B, T, N, H] and lse [B, N, T], float32. Raises where cuDNN refuses.

    Args:
      query: [B, T, N, H].
      key: [B, S, K, H].
      value: [B, S, K, H].
      bias: [B or 1, N or 1, T, S], or None.
      query_lengths: [B]; int32; or None.
      key_lengths: [B]; int32; None together with `query_lengths`.
      keeps_lse: Whether lse is to be computed; else it is 0.
      scale: Of the logits.
      causal: Whether query t sees keys 0 to t only.
      window: How many keys up to its own place a query sees; or None.
    """
    found = _cudnn().dot_product_attention(
        query,
        key,
        value,
        bias,
        None,
        query_lengths,
        key_lengths,
        scale=scale,
        mask_type=_cudnn_mask(causal, key_lengths is not None),
        sliding_window_length=window,
        return_residual=keeps_lse,
    )
    if keeps_lse:
        out, lse = found
        return out, lse
    batch, queries, heads, _ = query.shape
    return found, jnp.zeros((batch, heads, queries), jnp.float32)


def cudnn_attention_gradient(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None,
    query_lengths: jax.Array | None,
    key_lengths: jax.Array | None,
    lse: jax.Array,
    out: jax.Array,
    d_out: jax.Array,
    *,
    scale: float,
    causal: bool,
    window: int | None,
    wants_bias: bool,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """The gradients of `query`, `key`, `value`, and of `bias` or None.

    Args as of `cudnn_attention`, its results, the cotangent of the output, and whether
    `bias` has a gradient.
    """
    cudnn = _cudnn()
    absent = jnp.zeros(0, query.dtype)
    optional = [absent if x is None else x for x in (bias, query_lengths, key_lengths)]
    static = {
        "scale": scale,
        "seed": 42,
        "dropout_rate": 0.0,
        "variadic_args": (bias is not None, wants_bias),
        "mask_type": _cudnn_mask(causal, key_lengths is not None),
        "layout": cudnn.AttentionLayout.BTNH.value,
        "sliding_window_length": window,
    }
    # Since jax 0.12.
    if (
        "score_mod"
        in inspect.signature(cudnn._dot_product_attention_bwd_impl).parameters
    ):
        static["score_mod"] = None
    operands = (query, key, value, *optional, *[absent] * 4, lse, out, d_out)
    grads = cudnn._dot_product_attention_bwd_p_wrapper.bind(*operands, **static)
    return *grads[:3], grads[3] if wants_bias else None
