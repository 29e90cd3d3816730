"""Kernel calls on many devices: each device runs the kernel on its share.

XLA cannot partition a custom kernel: it all-gathers a sharded operand and runs the
whole kernel on every device. `placement` says, where a call is lowered, how its arrays
may lie on the devices of the program:

- `InPlace`: on one device, or as one device's share (inside `jax.shard_map` or
  `jax.pmap`). Or in a way that a kernel cannot follow, with the reason: the call is
  left to XLA, in operations that it can partition.
- `ByType`: as their types say, on a mesh with explicit axes: `jax.shard_map`.
- `ByCompiler`: as XLA decides when it compiles: `custom_partitioning`.
"""

import abc
import dataclasses
import hashlib
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from jaxsoftmax._compat import partition, trace
from jaxsoftmax._compat.primitive import lower_function
from jaxsoftmax._core.dispatch import PerformanceWarning

Shape = tuple[int, ...]
# (which devices share rows, where a share is inside the row, *shares) -> results
OnShares = Callable[..., list[jax.Array]]
ByTypes = tuple[Callable[[Any], PartitionSpec], Callable[..., tuple[jax.Array, ...]]]
# Places of devices in the program, as `ByCompiler` has them.
Groups = Sequence[Sequence[int]]
# Of arrays, as XLA gives them: shape, dtype and sharding.
Infos = Sequence[Any]

LINE = "devices"


@dataclasses.dataclass(frozen=True)
class Across:
    """The devices that have the shares of one row, for each row.

    Attributes:
      axis_name: Of the mesh or of all devices in a line.
      groups: In that line, those that share rows; None for all along the axis.
      starts: Where in its rows this device's share starts, along each dimension that a
        row has.
      sizes: Of whole rows, along these dimensions.
    """

    axis_name: Any
    groups: Groups | None = None
    starts: tuple[jax.Array, ...] = ()
    sizes: tuple[int, ...] = ()

    def sum(self, x: jax.Array) -> jax.Array:
        """The sum over the devices, on each: one all-reduce."""
        return lax.psum(x, self.axis_name, axis_index_groups=self.groups)

    def sums(self, *numbers: jax.Array) -> jax.Array:
        """The sums of several numbers per row, stacked: one all-reduce.

        Under vmap those of arrays that are not mapped have size 1 along its axis.
        """
        return self.sum(jnp.stack(jnp.broadcast_arrays(*numbers)))

    def max(self, x: jax.Array) -> jax.Array:
        """The maximum over the devices, on each: one all-reduce."""
        return lax.pmax(x, self.axis_name, axis_index_groups=self.groups)


class Shared(abc.ABC):
    """A call that devices share."""

    function: Callable[..., list[jax.Array]]
    inputs: tuple[Any, ...]
    outputs: tuple[Any, ...]
    name: str

    @property
    @abc.abstractmethod
    def rule(self) -> tuple[str, dict[str, int]]:
        """Which dimensions share a sharding: Shardy's rule, and the sizes in it."""

    @abc.abstractmethod
    def by_type(self, mesh: Any, avals: Sequence[Any]) -> ByTypes:
        """Of arrays of these types, within a `jax.shard_map`.

        The spec of each of `inputs` and `outputs`, and the function of the shares.
        """

    @abc.abstractmethod
    def by_compiler(self, groups: Groups, arguments: Infos, results: Infos) -> Any:
        """As `partition.lower_partitioned` asks; of `groups`, see `ByCompiler`."""


@dataclasses.dataclass(frozen=True)
class Problem(Shared):
    """Functions of rows: arrays of one rank, each with sizes of `shape` or 1.

    Attributes:
      function: Of the arrays, in operations that XLA can partition.
      on_shares: ``(across, inside, *shares) -> results`` for one device. `across` is
        None where it has whole rows; `inside` is False where a share lies beyond the
        row's end, or None.
      shape: That of the arrays with an entry for every entry of a row.
      axis: What is reduced, as negative ints.
      inputs, outputs: The arrays' own shapes.
      name: An identifier. Of two problems that are not the same, it is not the same.
    """

    function: Callable[..., list[jax.Array]]
    on_shares: OnShares
    shape: Shape
    axis: tuple[int, ...]
    inputs: tuple[Shape, ...]
    outputs: tuple[Shape, ...]
    name: str = "jaxsoftmax"

    @property
    def reduced(self) -> list[int]:
        """The reduced dimensions, counted from the front."""
        return [len(self.shape) + a for a in self.axis]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of the reduced dimensions."""
        return tuple(self.shape[i] for i in self.reduced)

    @property
    def rule(self) -> tuple[str, dict[str, int]]:
        return sharding_rule(self), {}

    def by_type(self, mesh: Any, avals: Sequence[Any]) -> ByTypes:
        del mesh
        specs = [aval.sharding.spec for aval in avals]
        specs = [
            (*spec, *[None] * len(self.shape))[: len(self.shape)] for spec in specs
        ]
        common = [
            next((s for s in each if s is not None), None)
            for each in zip(*specs, strict=True)
        ]

        def spec_of(shape: Shape) -> PartitionSpec:
            pairs = zip(shape, self.shape, common, strict=True)
            return PartitionSpec(*(s if n == full else None for n, full, s in pairs))

        row_axes = [names_of(common[i]) for i in self.reduced]

        def on_shares(*shares: jax.Array) -> tuple[jax.Array, ...]:
            across = None
            if any(row_axes):
                starts = tuple(
                    jnp.int32(shares[0].shape[i]) * lax.axis_index(names)
                    if names
                    else jnp.int32(0)
                    for i, names in zip(self.reduced, row_axes, strict=True)
                )
                names = tuple(name for each in row_axes for name in each)
                across = Across(names, starts=starts, sizes=self.sizes)
            return tuple(self.on_shares(across, None, *shares))

        return spec_of, on_shares

    def by_compiler(self, groups: Groups, arguments: Infos, results: Infos) -> Any:
        tiles = self._tiles(groups, [*arguments, *results])
        count = sum(map(len, groups))
        split = tiles.shape[:-1]

        def sharding(array: Any) -> Any:
            whole = [i for i, size in enumerate(self.shape) if array.shape[i] != size]
            own = np.moveaxis(tiles, whole, range(-1 - len(whole), -1))
            own = own.reshape(
                *(1 if i in whole else n for i, n in enumerate(split)), -1
            )
            return partition.sharding_of(own, array.sharding)

        shared = math.prod(split[i] for i in self.reduced) > 1

        def on_shares(*shares: jax.Array) -> tuple[jax.Array, ...]:
            with trace.one_device():  # else a mesh in use would show in types
                across = inside = None
                if shared:
                    starts = self._starts(groups, tiles)
                    inside = self._inside(tiles, starts)
                    across = Across(
                        LINE, self._sharing(groups, tiles), starts, self.sizes
                    )
                return tuple(self.on_shares(across, inside, *shares))

        line = partition.devices_in_a_line(count, LINE)
        return (
            line,
            on_shares,
            tuple(map(sharding, results)),
            tuple(map(sharding, arguments)),
        )

    def _tiles(self, groups: Groups, arrays: Sequence[Any]) -> np.ndarray:
        """How all arrays are sharded: as the one that is split most, inputs first."""
        ndim, size = len(self.shape), len(groups[0])
        full = [a for a in arrays if a.shape == self.shape]
        # With several labels per row, logits have one entry for all of these.
        full = full or [
            a for a in arrays if all(a.shape[i] == self.shape[i] for i in self.reduced)
        ]
        tiles = max(
            (partition.tiles_of(a.sharding, ndim) for a in full),
            key=lambda tiles: math.prod(tiles.shape[:-1]),
        )
        row = math.prod(tiles.shape[i] for i in self.reduced)
        if len(groups) > 1 and row not in (1, size):
            # Which of a group's devices share a row is known if all or none do.
            warnings.warn(
                f"inside a shard_map over part of a mesh, rows of {self.shape} are "
                f"split over {row} of {size} devices: they are gathered first, because "
                "which devices share a row is known only if all of them do",
                PerformanceWarning,
                stacklevel=2,
            )
            return np.arange(size).reshape((1,) * ndim + (size,))
        return tiles

    def _sharing(self, groups: Groups, tiles: np.ndarray) -> list[list[int]]:
        """The devices that share rows, by their places in the program."""
        rows = np.moveaxis(tiles, self.reduced, range(-len(self.reduced), 0))
        in_group = rows.reshape(-1, math.prod(tiles.shape[i] for i in self.reduced))
        return [
            np.asarray(group)[each].tolist() for group in groups for each in in_group
        ]

    def _starts(self, groups: Groups, tiles: np.ndarray) -> tuple[jax.Array, ...]:
        """Where this device's share of a row starts, along each reduced dimension."""
        starts = []
        for i in self.reduced:
            start = np.zeros(tiles.size * len(groups), np.int32)
            part = np.indices(tiles.shape)[i]
            for group in groups:
                start[np.asarray(group)[tiles]] = part * _share(self, tiles, i)
            starts.append(jnp.asarray(start)[lax.axis_index(LINE)])
        return tuple(starts)

    def _inside(
        self, tiles: np.ndarray, starts: Sequence[jax.Array]
    ) -> jax.Array | None:
        """False where a share lies beyond the row's end; None if none does."""
        ndim = len(self.shape)
        inside = None
        for i, start in zip(self.reduced, starts, strict=True):
            size, share = self.shape[i], _share(self, tiles, i)
            if share * tiles.shape[i] == size:
                continue
            entry = lax.broadcasted_iota(
                np.int32, (1,) * i + (share,) + (1,) * (ndim - i - 1), i
            )
            within = start + entry < size
            inside = within if inside is None else inside & within
        return inside


@dataclasses.dataclass(frozen=True)
class InPlace:
    """The call is emitted as it is.

    Attributes:
      reason: Why XLA has to partition it, so that no kernel can run; None if the arrays
        are what one device has.
    """

    reason: str | None = None


@dataclasses.dataclass(frozen=True)
class ByType:
    """The types say how the arrays lie over the axes `names` of `mesh`."""

    mesh: Any
    names: frozenset[Any]

    def lower(self, context: Any, operands: Sequence[Any], problem: Shared) -> Any:
        spec_of, on_shares = problem.by_type(self.mesh, context.avals_in)
        in_specs = tuple(map(spec_of, problem.inputs))
        mapped: Any = jax.shard_map(
            on_shares,
            in_specs=in_specs,
            out_specs=tuple(map(spec_of, problem.outputs)),
            axis_names=self.names,
            check_vma=False,
        )

        def run(*arrays: jax.Array) -> list[jax.Array]:
            # An array that is not split where the others are, such as zeros; or one
            # that is split where nothing can be.
            reshard: Any = jax.sharding.reshard
            placed = map(reshard, arrays, in_specs)
            types = [aval.sharding.spec for aval in context.avals_out]
            return list(map(reshard, mapped(*placed), types))

        with jax.sharding.use_abstract_mesh(self.mesh):
            return lower_function(context, run, operands)


def names_of(entry: Any) -> tuple[Any, ...]:
    """The mesh axes in an entry of a PartitionSpec."""
    if entry is None:
        return ()
    return entry if isinstance(entry, tuple) else (entry,)


@dataclasses.dataclass(frozen=True)
class ByCompiler:
    """XLA decides how the arrays lie.

    Attributes:
      groups: The places in the program of the devices that the arrays are sharded over:
        one group, or one for each place along the axes that are manual.
    """

    groups: tuple[tuple[int, ...], ...]

    def lower(self, context: Any, operands: Sequence[Any], problem: Shared) -> Any:
        def shares(mesh: Any, arguments: Any, results: Any) -> Any:
            return problem.by_compiler(self.groups, list(arguments), list(results))

        rule, sizes = problem.rule
        return partition.lower_partitioned(
            context,
            problem.function,
            operands,
            partition=shares,
            rule=rule,
            sizes=sizes,
            count=self.count,
            name=f"{problem.name}_{digest(self.groups)}",
        )

    @property
    def count(self) -> int:
        return sum(map(len, self.groups))


def _share(problem: Problem, tiles: np.ndarray, i: int) -> int:
    """The size of a share along dimension `i`."""
    return -(-problem.shape[i] // tiles.shape[i])


def digest(value: object) -> str:
    """A few letters that stand for `value`, the same in every process."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def sharding_rule(problem: Problem) -> str:
    """The Shardy rule: full-size dimensions share a factor, others have their own.

    Example:
      >>> from jaxsoftmax._core.partitioning import Problem, sharding_rule
      >>> sizes = {"inputs": ((8, 6), (1, 6)), "outputs": ((8, 6), (8, 1))}
      >>> sharding_rule(Problem(None, None, (8, 6), (-1,), **sizes))
      'd0 d1, n1x0 d1 -> d0 d1, d0 n3x1'
    """
    arrays = (*problem.inputs, *problem.outputs)
    names = [
        " ".join(
            f"d{i}" if n == full else f"n{k}x{i}"
            for i, (n, full) in enumerate(zip(shape, problem.shape, strict=True))
        )
        for k, shape in enumerate(arrays)
    ]
    count = len(problem.inputs)
    return ", ".join(names[:count]) + " -> " + ", ".join(names[count:])


Placement = InPlace | ByType | ByCompiler


def placement(context: Any, x: Any, platform: str) -> Placement:
    """How the arrays of a call that is lowered may lie on the program's devices.

    `x` has the shape of the arrays with an entry for every entry of a row.
    """
    count, over, free = _spread(context)
    if count == 1 or (count is None and over is None):
        return InPlace()
    if x.ndim == 0 or 0 in x.shape:
        return InPlace()  # nothing to shard, and no kernel either
    mesh = trace.mesh_of(context.avals_in)
    explicit = mesh is not None and all(kind == AxisType.Explicit for *_, kind in free)
    if over is None:
        if free and explicit:
            return ByType(mesh, frozenset(mesh.axis_names))
        return _by_compiler(context, platform, (tuple(range(count or 1)),))
    if not free:
        return InPlace()
    if explicit:
        return ByType(mesh, frozenset(name for name, _, _ in free))
    if len(free) > 1:
        names = ", ".join(repr(name) for name, _, _ in free)
        return InPlace(
            f"inside a shard_map over part of a mesh, whose axes {names} are left to "
            "the compiler: a kernel can follow one such axis"
        )
    (name, size, _) = free[0]
    places = np.arange(over.size).reshape(tuple(over.shape.values()))
    places = np.moveaxis(places, over.axis_names.index(name), -1).reshape(-1, size)
    groups = tuple(tuple(group) for group in places.tolist())
    return _by_compiler(context, platform, groups)


def devices_of_compiler(context: Any) -> int:
    """Over how many devices XLA may shard the arrays of a call that is lowered."""
    count, over, free = _spread(context)
    return (count or 1) if over is None else math.prod(size for _, size, _ in free)


def _spread(context: Any) -> tuple[int | None, Any, list[tuple[Any, int, AxisType]]]:
    """Over what the arrays of a call may be spread.

    The number of the program's devices, or None inside a map; the mesh of a
    `jax.shard_map`, or None; and the axes of more than one device, in types or around
    the call, that are not manual: name, size and type.
    """
    count, over, manual = partition.devices_of(context)
    # The types know of every shard_map around this one; before jax 0.10.2, the context
    # knows of the innermost alone.
    mesh = trace.mesh_of(context.avals_in)
    mesh = over if mesh is None else mesh
    if mesh is None:
        return count, None, []
    axes = zip(mesh.shape.items(), mesh.axis_types, strict=True)
    free = [
        (name, size, kind)
        for (name, size), kind in axes
        if name not in manual and size > 1 and kind != AxisType.Manual
    ]
    return count, over, free


def left_to_compiler(
    f: Callable[..., list[jax.Array]],
    arrays: Sequence[jax.Array],
    entries: Callable[[Sequence[jax.Array]], Iterable[list[Any]]],
) -> list[jax.Array]:
    """Runs `f` with the explicit axes of a mesh left to XLA, then reshards each result.

    Inside `jax.shard_map` all arrays vary over the axes that any varies over. Where
    there are explicit axes, `entries` says for each result, in turn, over which axes of
    the mesh its dimensions are sharded; it may have more than the result has.
    """
    arrays = trace.varying_alike(arrays)
    mesh = trace.mesh_of(map(jax.typeof, arrays))
    if mesh is None or AxisType.Explicit not in mesh.axis_types:
        return f(*arrays)
    pairs = zip(mesh.axis_names, mesh.axis_types, strict=True)
    names = [name for name, kind in pairs if kind == AxisType.Explicit]
    reshard: Any = jax.sharding.reshard
    found = entries(arrays)
    automatic = mesh.update_axis_types(dict.fromkeys(names, AxisType.Auto))
    with jax.sharding.use_abstract_mesh(automatic):
        outs = f(*(reshard(x, PartitionSpec()) for x in arrays))
    with jax.sharding.use_abstract_mesh(mesh):
        return [
            reshard(x, PartitionSpec(*each[: x.ndim]))
            for x, each in zip(outs, found, strict=False)
        ]


def _by_compiler(
    context: Any, platform: str, groups: tuple[tuple[int, ...], ...]
) -> ByCompiler | InPlace:
    if platform not in partition.PARTITIONED_PLATFORMS:
        return InPlace(f"partitioning kernels has not been tried on {platform}")
    if partition.for_export(context):
        return InPlace(
            "an exported program cannot ask how its arrays lie on several devices: use "
            "a mesh with explicit axes, or jax.shard_map"
        )
    if not partition.uses_shardy():
        return InPlace("needs the Shardy partitioner (jax_use_shardy_partitioner)")
    return ByCompiler(groups)
