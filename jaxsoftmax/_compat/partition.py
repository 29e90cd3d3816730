"""Programs for several devices: for which a call is lowered, and how arrays lie there.

Checked with jax 0.10.0, 0.10.2, 0.11.2 and 0.12.0.1, which are alike in all of this.
The devices that an operation is lowered for are in the context of its lowering rule,
whose classes are private: `ShardingContext` under jit, `SPMDAxisContext` inside
shard_map, `ReplicaAxisContext` inside pmap.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax._src import sharding_impls
from jax._src.lib import xla_client  # type: ignore[attr-defined]
from jax.experimental.custom_partitioning import custom_partitioning

from jaxsoftmax._compat import trace
from jaxsoftmax._compat.primitive import lower_function

# Where `lower_partitioned` has been run.
PARTITIONED_PLATFORMS = ("cpu", "cuda")


def devices_of(context: Any) -> tuple[int | None, Any, frozenset[Any]]:
    """Over how many devices the compiler may spread the arrays; None inside a map.

    Inside `jax.shard_map` also the mesh and the names of its manual axes, else None.
    """
    axis_context = context.module_context.axis_context
    if isinstance(axis_context, sharding_impls.ShardingContext):
        return axis_context.num_devices, None, frozenset()
    if isinstance(axis_context, sharding_impls.SPMDAxisContext):
        return None, axis_context.mesh, frozenset(axis_context.manual_axes)
    return None, None, frozenset()


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
    sizes: dict[str, int],
    count: int,
    name: str,
) -> Any:
    """Emits `f` as one operation that XLA asks `partition` how to spread.

    Under Shardy, through `custom_partitioning`. Its own lowering rule wants the devices
    of the program, which a primitive is told of if it is in
    ``jax._src.dispatch.prim_requires_devices_during_lowering``; jax then refuses to
    lower for an abstract mesh. But it only hands them on: here, `count` of any.

    `partition` is ``(mesh, arguments, results) -> (mesh, function of the shares,
    shardings of the results, shardings of the arguments)``. Each argument and result
    has a shape, a dtype and, for `tiles_of`, a sharding. `rule` says which
    dimensions share a sharding, in `custom_partitioning`'s notation, and `sizes` how
    large they are where several make one dimension.

    `name` is that of the function in the program that holds the operation. Nothing else
    there says what is computed, but an address that differs from start to start: where
    jax is told to leave that out of the key of its compilation cache
    (``jax_remove_custom_partitioning_ptr_from_cache_key``,
    https://github.com/jax-ml/jax/issues/21159), calls that differ must differ in this,
    or one would run as the other.
    """
    with trace.one_device():
        traced = jax.make_jaxpr(lambda *arrays: tuple(f(*arrays)))(*context.avals_in)
    given = len(context.avals_in)
    # Arrays that it has from elsewhere: `custom_partitioning` takes them as arguments.
    constants = traced.consts

    def evaluate(*arrays: jax.Array) -> Any:
        arrays, own = arrays[:given], arrays[given:]
        return tuple(jax.core.eval_jaxpr(traced.jaxpr, own, *arrays))

    def partition_all(
        mesh: Any, arguments: Sequence[Any], results: Sequence[Any]
    ) -> Any:
        mesh, run, outs, ins = partition(mesh, arguments[:given], results)
        tiles = [np.arange(count).reshape((1,) * x.ndim + (count,)) for x in constants]
        whole = map(sharding_of, tiles, [x.sharding for x in arguments[given:]])
        return mesh, lambda *shares: run(*shares[:given]), outs, (*ins, *whole)

    names = [
        " ".join(f"c{i}x{dim}" for dim in range(x.ndim))
        for i, x in enumerate(constants)
    ]
    arguments, results = rule.split(" -> ")
    operation = custom_partitioning(evaluate)
    operation.def_partition(
        partition=partition_all,
        sharding_rule=f"{', '.join([arguments, *names])} -> {results}",
        decode_shardings=False,
        **sizes,
    )
    module_context = context.module_context.replace(
        axis_context=sharding_impls.ShardingContext(count, _any_devices(count))
    )
    context = context.replace(module_context=module_context)

    def named(*arrays: Any) -> list[Any]:
        return list(operation(*arrays, *constants))

    named.__name__ = named.__qualname__ = name
    with trace.one_device():
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
