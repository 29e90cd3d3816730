"""What the Mosaic GPU kernels of attention have in common.

A block owns places of a head, `Program.owners`, as many in each of its consumer
warpgroups, and reads tiles of what these meet, by one more warpgroup, the producer. It
copies them to shared memory (TMA), `Program.stages` ahead; the consumers multiply
(wgmma).

Tiles that nothing in a block meets are not loaded. The others are read in three loops:
those at one end of what `causal`, a window or a length leaves, those that lie within,
and those at the other end. Only at the ends are places compared; segment ids count in
every tile.

Logits are stored as products, or with a soft cap as ``tanh / 2``: `Program.factor`
makes exponents to the base 2 of them. What is stored of a hidden pair is -inf.

With a bias and no cap, all logits of a query may share a number that is large beside
their differences, as large as the lowest float. They are stored as they are, and so are
maxima and lse: the difference of the two is taken first, and then to the base 2.

What pairs of a query and a key have, a mask, a bias or dropout, is in
`mosaic_gpu_pairs`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxsoftmax._attend.mosaic_gpu_pairs import Pairs
from jaxsoftmax._attend.mosaic_gpu_program import (
    Program,
    Range,
    divided,
    tile_range,
)
from jaxsoftmax._compat import mosaic_gpu as _compat
from jaxsoftmax._compat import mosaic_gpu_registers as registers
from jaxsoftmax._core.mosaic_gpu_tanh import HalfTanh

# What a kernel may read after its other arrays, in this order. The mask is [B, N,
# tiles, places, 4], words as `registers.where_bits` has them: places are those of
# blocks, or if it has 1 for all of them, as many as a warpgroup has; and there is one
# tile if it has 1 for all of these. The bias is [B, N, places, places], those of blocks
# first, or a vector [B, N, places] in float32: of those of tiles, or if it has 1 there,
# of those of blocks.
OTHERS = (
    "sinks",
    "query_lengths",
    "key_lengths",
    "query_segments",
    "key_segments",
    "offsets",
    "mask",
    "bias",
    "dropout_key",
)


class Kernel(Pairs):
    """What one block does.

    Args:
      p: What it is made for.
      others: The references that there are of `OTHERS`.
      scratch: Those of shared memory and barriers, by name.

    Attributes:
      name: What a profiler shows.
      from_end: Whether tiles are read from the last to the first. Then the first one
        under `causal` is that whose places are compared.
    """

    name: str
    from_end = False

    def __init__(
        self, p: Program, others: Sequence[Any], scratch: dict[str, Any]
    ) -> None:
        self.p, self.scratch = p, scratch
        self.pl, self.plgpu = _compat.pallas(), _compat.mosaic_gpu()
        given = {
            "sinks": p.sinks,
            "query_lengths": p.query_lengths,
            "key_lengths": p.key_lengths,
            "query_segments": p.segments,
            "key_segments": p.segments,
            "offsets": p.offsets,
            "mask": p.mask is not None,
            "bias": p.bias is not None,
            "dropout_key": p.dropout_rate > 0,
        }
        names = [name for name in OTHERS if given[name]]
        self.others = dict(zip(names, others, strict=True))
        self.warpgroup = lax.axis_index("warpgroup")
        self.rows = self.plgpu.Layout.WGMMA.reduce(1)
        heads, _, each = p.owners
        index = lax.axis_index("block")
        of_section = p.section * p.blocks
        section, index = divided(index, of_section), lax.rem(index, of_section)
        block = divided(index, p.section)
        # What takes longest under `causal` first: the first keys, the last queries.
        block = block if p.owns_keys else p.blocks - 1 - block
        head = section * p.section + lax.rem(index, p.section)
        if p.shares_bias:
            head, self.batch = divided(head, p.batch), lax.rem(head, p.batch)
        else:
            self.batch, head = divided(head, heads), lax.rem(head, heads)
        self.kv_head = head if p.owns_keys else divided(head, p.group)
        self.head = head * p.group if p.owns_keys else head
        self.start = block * p.owned
        self.own = self.start + self.warpgroup * each
        self.query_length = self._length("query_lengths", p.queries)
        self.key_length = self._length("key_lengths", p.keys)
        self.offset = self._number("offsets", jnp.int32(0))
        self.range = self._range()

    def _number(self, name: str, otherwise: Any) -> Any:
        return self.others[name][self.batch] if name in self.others else otherwise

    def _length(self, name: str, places: int) -> Any:
        given = self._number(name, jnp.int32(places))
        return jnp.maximum(jnp.minimum(given, places), 0)

    def _range(self) -> Range:
        p = self.p
        first, sides = self.start + self.offset, (p.left, p.right)
        own, limit = self.query_length, self.key_length
        if p.owns_keys:
            # A query sees up to `right` keys after its place: a key is seen by as many
            # queries before its own.
            first, sides = self.start - self.offset, (p.right, p.left)
            own, limit = limit, own
        r = tile_range(first, first + (p.owned - 1), *sides, limit, p.tile, p.tiles)
        # Places beyond the length meet nothing.
        end = jnp.where(self.start < own, r.end, r.begin + 1)
        whole, whole_end = (jnp.minimum(a, end) for a in (r.whole, r.whole_end))
        if self.from_end:
            both = r.begin + end
            whole, whole_end = both - whole_end, both - whole
        return Range(r.begin, whole, whole_end, end)

    def tile_at(self, turn: Any) -> Any:
        """Which tile is read at a turn of `range`."""
        if not self.from_end:
            return turn
        return self.range.begin + self.range.end - 1 - turn

    def run(self) -> None:
        """All of it."""
        consumers = self.p.warpgroups
        most, fewest = (240, 24) if consumers <= 2 else (160, 32)

        def consume() -> None:
            self.plgpu.set_max_registers(most, action="increase")
            if self.p.dropout_rate:
                self.dropout_key = [self.others["dropout_key"][i] for i in range(2)]
            self.consume()

        def produce() -> None:
            self.plgpu.set_max_registers(fewest, action="decrease")
            self.produce()

        self.pl.when(self.warpgroup < consumers)(consume)
        self.pl.when(self.warpgroup == consumers)(produce)

    def consume(self) -> None:
        """What a warpgroup does with its places."""
        raise NotImplementedError

    def produce(self) -> None:
        """What loads for the others."""
        raise NotImplementedError

    def load_tiles(
        self, copies: dict[str, Callable[[Any, Any], Any]], rounds: int = 1
    ) -> None:
        """Copies all tiles, once each round, as soon as there is room.

        Args:
          copies: By the name of the array: where a tile is, given round and tile. What
            is copied is complete by the barrier ``name_ready``, and may be replaced by
            ``name_free``.
          rounds: How often.
        """
        s, stages = self.scratch, jnp.int32(self.p.stages)
        each = self.range.end - self.range.begin
        count = each * jnp.int32(rounds)

        def step(i: Any, _: Any) -> Any:
            slot = lax.rem(i, stages)
            turn = self.range.begin + lax.rem(i, each)
            of = divided(i, each), self.tile_at(turn)
            for name, place in copies.items():
                ready, free = (
                    s[f"{name}_{what}"].at[slot] for what in ("ready", "free")
                )
                memory = s[f"{name}_smem"].at[slot]

                wait = functools.partial(self.plgpu.barrier_wait, free)
                self.pl.when(i >= stages)(wait)
                copy = functools.partial(self.copy, place, of, memory, ready)
                self.pl.when(i < count)(copy)
            return _

        # It stays until all that it loaded was read.
        lax.fori_loop(jnp.int32(0), count + stages, step, None)

    def tile_of_keys(self, ref: Any) -> Callable[[Any, Any], Any]:
        """Where a tile of keys or values is, as `load_tiles` asks."""
        n = self.p.block_n
        return lambda _, tile: ref.at[self.batch, self.pl.ds(tile * n, n), self.kv_head]

    def load_own(self, ref: Any, name: str, at: Any) -> Any:
        """The warpgroup's tile of an array, which is on its way."""
        tile = self.scratch[f"{name}_smem"].at[self.warpgroup]
        ready = self.scratch["own_ready"].at[self.warpgroup]
        self.plgpu.copy_gmem_to_smem(ref.at[at], tile, ready)
        return tile

    def ready(self, slot: Any, *names: str) -> None:
        """Waits until what `load_tiles` copies is there."""
        for name in names:
            self.plgpu.barrier_wait(self.scratch[f"{name}_ready"].at[slot])

    def free(self, slot: Any, *names: str) -> None:
        """Says that it may be replaced."""
        for name in names:
            self.plgpu.barrier_arrive(self.scratch[f"{name}_free"].at[slot])

    def copy(self, place: Any, of: Any, memory: Any, ready: Any) -> None:
        """Starts a copy to shared memory of what `place` says of round and tile."""
        found = place(*of)
        if not isinstance(found, list):
            self.plgpu.copy_gmem_to_smem(found, memory, ready)
            return
        for w, part in enumerate(found):
            self.plgpu.copy_gmem_to_smem(part, memory.at[w], ready)

    def over_tiles(
        self, step: Callable[[Any, Any, bool], Any], carry: Any, first: Any
    ) -> Any:
        """The carry after `step` of each turn, carry, and whether places are compared.

        Args:
          step: The function.
          carry: Before the first turn.
          first: That turn.
        """
        p, r = self.p, self.range
        before, after = p.left is not None, p.right is not None
        if not p.owns_keys:
            # Queries beyond the length have probabilities of 0 anyway.
            after |= p.key_lengths or p.keys % p.tile != 0
        # Queries that see keys before them are after these.
        forward = p.owns_keys == self.from_end
        at_begin, at_end = (before, after) if forward else (after, before)
        edge, inner = (lambda i, c, e=e: step(i, c, e) for e in (True, False))
        whole, whole_end = first, r.end
        if at_begin:
            whole = jnp.maximum(r.whole, first)
            carry = lax.fori_loop(first, whole, edge, carry)
        if at_end:
            whole_end = jnp.maximum(r.whole_end, whole)
        carry = lax.fori_loop(whole, whole_end, inner, carry)
        return lax.fori_loop(whole_end, r.end, edge, carry) if at_end else carry

    def with_accumulators(self, run: Any, **shapes: Any) -> None:
        """Runs a function of accumulators that are 0, as `accumulators` has them."""
        if not _compat.is_interpreted():
            memory = (
                self.plgpu.ACC(shape, np.dtype(np.float32))
                for shape, _ in shapes.values()
            )
            self.pl.run_scoped(
                lambda *refs: run(*map(_compat.Accumulator, refs)), *memory
            )
            return

        def accumulator(name: str) -> _compat.Accumulator:
            own = {
                kind: self.scratch[f"{name}_{kind}"].at[self.warpgroup]
                for kind in ("sums", "factor")
                if f"{name}_{kind}" in self.scratch
            }
            made = _compat.Accumulator(own["sums"], own.get("factor"))
            made.clear()
            return made

        run(*map(accumulator, shapes))

    def over(self, numbers: jax.Array, tile: jax.Array, axis: int = 0) -> jax.Array:
        """The numbers of a tile's places along `axis`, for each of the others."""
        return lax.broadcast_in_dim(numbers, tile.shape, [axis])

    def segment_ids(self, name: str, start: Any, count: int, axis: int) -> Any:
        """Those of places along `axis` of a tile; None if there are none."""
        if not self.p.segments:
            return None
        ids = self.others[f"{name}_segments"].at[self.batch, self.pl.ds(start, count)]
        return _compat.mosaic_load(ids, self.plgpu.Layout.WGMMA.reduce(1 - axis))

    def logits(
        self, products: Any, queries: Any, keys: Any, pairs: Any, edge: bool
    ) -> tuple[Any, Any]:
        """A tile as it is stored, and the slope of the cap, by -1/4, if there is one.

        Args:
          products: Of queries and keys; keys and queries where blocks own keys.
          queries: Where those of the tile start, and their segment ids.
          keys: The same of the keys.
          pairs: What the tile has of the mask, or None, and the last two of `of_bias`.
          edge: Whether places are compared.
        """
        p, s, slope = self.p, products, None
        scale, (words, slot, own_bias) = p.scale, pairs
        if p.bias is not None:

            def added(bias: Any) -> Any:
                # The product of a hidden pair may be NaN.
                return jnp.where(bias == -jnp.inf, -jnp.inf, products * p.scale + bias)

            s, scale = self.of_bias(added, slot, own_bias), 1.0
        if p.softcap is not None:
            uncapped = s
            s = HalfTanh(scale / p.softcap, columns=p.columns_of_cap).of(s)
            slope = s * s - 0.25
            if p.bias is not None:
                s = jnp.where(uncapped == -jnp.inf, -jnp.inf, s)
        axis = int(p.owns_keys)
        (start_query, query_ids), (start_key, key_ids) = queries, keys
        if edge:
            query, key = (
                self.plgpu.broadcasted_iota(
                    jnp.int32, s.shape, k, layout=self.plgpu.Layout.WGMMA
                )
                for k in (axis, 1 - axis)
            )
            visible = key < self.key_length - start_key
            if p.left is not None or p.right is not None:
                distance = key - query
                between = start_query + self.offset - start_key
                if p.right is not None:
                    visible &= distance <= between + p.right
                if p.left is not None:
                    visible &= distance >= between - p.left
            s = jnp.where(visible, s, -jnp.inf)
        if p.segments:
            same = self.over(query_ids, s, axis) == self.over(key_ids, s, 1 - axis)
            s = jnp.where(same, s, -jnp.inf)
        if words is not None:
            s = registers.where_bits(words, s)
        return s, slope

    def powers(self, s: Any, rows: Any, low: Any = None, axis: int = 0) -> Any:
        """exp(logits - rows) of a tile as it is stored.

        Args:
          s: The tile.
          rows: Of its queries, along `axis`; but for `differs_first` to the base 2.
          low: What rounding took off them, to the base 2, or None.
          axis: Of the queries.
        """
        p = self.p
        rows = self.over(rows, s, axis)
        if p.differs_first:
            powers = (s - rows) * p.factor
            if low is not None:
                powers = powers - self.over(low, s, axis)
        else:
            powers = s * p.factor - rows
        if p.bias is not None and p.query_lengths:
            # The bias of a query beyond the length may be NaN.
            powers = jnp.where(rows == jnp.inf, -jnp.inf, powers)
        return jnp.exp2(powers)

    def store(self, value: Any, tile: Any, ref: Any) -> None:
        """Writes a tile, by way of shared memory that nothing else uses."""
        self.store_all([(value, tile, ref)])

    def store_all(self, each: Sequence[tuple[Any, Any, Any]]) -> None:
        """Writes several tiles at once, as `store` does one."""
        for value, tile, _ in each:
            tile[...] = value
        self.plgpu.commit_smem()
        for _, tile, ref in each:
            self.plgpu.copy_smem_to_gmem(tile, ref)
        self.plgpu.wait_smem_to_gmem(0)
