"""Calls that are independent of each other along some dimensions, on many devices.

Such as attention, along batch entries and heads: each device computes its own. Along
all other dimensions each has the whole arrays.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from jaxsoftmax._compat import partition, trace
from jaxsoftmax._core import partitioning
from jaxsoftmax._core.partitioning import ByTypes, Groups, Infos

# Of an array: for each dimension, the factors that its size is a product of, the first
# the major one; none of a dimension that is not split.
Factors = tuple[tuple[str, ...], ...]


@dataclasses.dataclass(frozen=True)
class IndependentCalls(partitioning.Shared):
    """What devices share.

    Attributes:
      function: Of the arrays, in operations that XLA can partition.
      on_shares: The same of what one device has.
      sizes: Of the factors.
      inputs, outputs: The factors of each array.
      sums: For each result, the factors that it is added up over.
      name: An identifier. Of two problems that are not the same, it is not the same.
    """

    function: Callable[..., list[jax.Array]]
    on_shares: Callable[..., list[jax.Array]]
    sizes: Mapping[str, int]
    inputs: tuple[Factors, ...]
    outputs: tuple[Factors, ...]
    sums: tuple[tuple[str, ...], ...]
    name: str = "jaxsoftmax"

    @property
    def rule(self) -> tuple[str, dict[str, int]]:
        """As `Shared` has it.

        Example:
          >>> from jaxsoftmax._core.independent import IndependentCalls
          >>> batch, heads = ("b",), ("k", "g")
          >>> sizes, arrays = {"b": 2, "k": 2, "g": 4}, ((batch, (), heads),)
          >>> IndependentCalls(None, None, sizes, arrays, arrays, ((),)).rule
          ('b n0x1 (k g) -> b n1x1 (k g)', {'g': 4, 'k': 2})
        """
        arrays = (*self.inputs, *self.outputs)
        named = [
            " ".join(
                f"({' '.join(of)})" if len(of) > 1 else of[0] if of else f"n{i}x{dim}"
                for dim, of in enumerate(factors)
            )
            for i, factors in enumerate(arrays)
        ]
        count = len(self.inputs)
        dimensions = [of for factors in arrays for of in factors]
        inner = {name for of in dimensions if len(of) > 1 for name in of}
        # Those of whole dimensions are known, and may not be said.
        inner -= {of[0] for of in dimensions if len(of) == 1}
        sizes = {name: self.sizes[name] for name in sorted(inner)}
        return f"{', '.join(named[:count])} -> {', '.join(named[count:])}", sizes

    def _split(self, of: Sequence[str], parts: Sequence[int]) -> dict[str, list[int]]:
        """Which parts of a dimension each of its factors is split into.

        A dimension that is split into ``prod(parts)``: the major factor first. Nothing
        is split if not all of it divides the factors.
        """
        found: dict[str, list[int]] = {name: [] for name in of}
        rest, names = dict(self.sizes), list(of)
        for part in parts:
            while names and rest[names[0]] % part:
                names.pop(0)  # nor does what follows split this one
            if not names:
                return {name: [] for name in of}
            found[names[0]].append(part)
            rest[names[0]] //= part
        return found

    # --- by types ---------------------------------------------------------------------

    def by_type(self, mesh: Any, avals: Sequence[Any]) -> ByTypes:
        along: dict[str, tuple[Any, ...]] = {}
        for aval, factors in zip(avals, self.inputs, strict=True):
            for entry, of in zip(aval.sharding.spec, factors, strict=False):
                names = partitioning.names_of(entry)
                used = {name for each in along.values() for name in each}
                if not of or not names or used & {*names} or along.keys() & {*of}:
                    continue
                split = self._split(of, [mesh.shape[name] for name in names])
                given = iter(names)
                along |= {n: tuple(next(given) for _ in p) for n, p in split.items()}

        def spec_of(factors: Factors) -> PartitionSpec:
            entries = [
                tuple(name for factor in of for name in along.get(factor, ()))
                for of in factors
            ]
            return PartitionSpec(*(entry or None for entry in entries))

        def on_shares(*shares: jax.Array) -> tuple[jax.Array, ...]:
            def total(x: jax.Array, over: Sequence[str]) -> jax.Array:
                names = tuple(n for factor in over for n in along.get(factor, ()))
                return lax.psum(x, names) if names else x

            return tuple(map(total, self.on_shares(*shares), self.sums))

        return spec_of, on_shares

    # --- by the compiler --------------------------------------------------------------

    def by_compiler(self, groups: Groups, arguments: Infos, results: Infos) -> Any:
        arrays = [
            *zip(arguments, self.inputs, strict=True),
            *zip(results, self.outputs, strict=True),
        ]
        # As the array that is split most, arguments first.
        tiles = max(
            (self._tiles(array.sharding, factors) for array, factors in arrays),
            key=lambda tiles: math.prod(tiles.shape[:-1]),
        )
        names = list(self.sizes)

        def shardings(arrays: Sequence[Any], factors: Sequence[Factors]) -> Any:
            found = []
            for array, of_array in zip(arrays, factors, strict=True):
                order = [names.index(name) for of in of_array for name in of]
                rest = [i for i in range(tiles.ndim) if i not in order]
                shape = [
                    math.prod(tiles.shape[names.index(name)] for name in of)
                    for of in of_array
                ]
                own = tiles.transpose(*order, *rest).reshape(*shape, -1)
                found.append(partition.sharding_of(own, array.sharding))
            return tuple(found)

        def on_shares(*shares: jax.Array) -> tuple[jax.Array, ...]:
            def total(x: jax.Array, over: Sequence[str]) -> jax.Array:
                last = [names.index(name) for name in over]
                count = math.prod(tiles.shape[i] for i in last)
                if count == 1:
                    return x
                own = np.moveaxis(tiles, last, range(-len(last), 0)).reshape(-1, count)
                alike = [
                    np.asarray(group)[each].tolist() for group in groups for each in own
                ]
                return lax.psum(x, partitioning.LINE, axis_index_groups=alike)

            with trace.one_device():  # else a mesh in use would show in types
                return tuple(map(total, self.on_shares(*shares), self.sums))

        count = sum(map(len, groups))
        line = partition.devices_in_a_line(count, partitioning.LINE)
        return (
            line,
            on_shares,
            shardings(results, self.outputs),
            shardings(arguments, self.inputs),
        )

    def _tiles(self, sharding: Any, factors: Factors) -> np.ndarray:
        """`partition.tiles_of`, but with an axis for each factor, in their order."""
        tiles = partition.tiles_of(sharding, len(factors))
        shape: list[int] = []
        places: dict[str, int] = {}
        for parts, of in zip(tiles.shape, factors, strict=False):
            split = self._split(of, _primes(parts)) if of else {}
            if math.prod(math.prod(p) for p in split.values()) != parts:
                shape.append(parts)  # each device has the whole
                continue
            for name, of_name in split.items():
                places[name] = len(shape)
                shape.append(math.prod(of_name))
        tiles = tiles.reshape(*shape, tiles.shape[-1])
        for name in self.sizes:
            if name not in places:
                places[name] = tiles.ndim
                tiles = tiles[..., None]
        order = [places[name] for name in self.sizes]
        rest = [i for i in range(tiles.ndim) if i not in order]
        tiles = tiles.transpose(*order, *rest)
        return tiles.reshape(*tiles.shape[: len(order)], -1)


def _primes(n: int) -> list[int]:
    """The prime factors of a number of devices."""
    found, prime = [], 2
    while n > 1:
        while n % prime == 0:
            found.append(prime)
            n //= prime
        prime += 1
    return found
