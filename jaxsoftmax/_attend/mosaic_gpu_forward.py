"""The forward of attention as a Mosaic GPU kernel, for Hopper.

A block owns `Program.block_m` queries of a head in each of its consumer warpgroups, and
one more warpgroup, the producer, which loads. The producer copies tiles of keys and
values to shared memory (TMA), `Program.stages` ahead; the consumers multiply (wgmma),
with a running maximum and sum for each query (FlashAttention, arXiv 2205.14135).

A consumer starts the product of its queries with the next keys before it waits for that
of the last weights with their values: so the tensor cores work while it computes
exponentials. With `Program.turns` the consumers also take turns (FlashAttention-3,
arXiv 2407.08608): one starts its products where the other begins with exponentials.

Tiles that nothing in a block sees are not loaded. The others are read in three loops:
those at one end of what `causal`, a window or a length leaves, those that lie within,
and those at the other end. Only at the ends are places compared; segment ids count in
every tile.

Logits are stored as products: `Program.factor` makes exponents to the base 2 of them.
With a soft cap ``(tanh - 1) / 2`` is stored in their place, which is one over a sum:
its error is that of 1, and `Program.shift` is added to lse. What is stored of a hidden
pair is -inf.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxsoftmax._compat import mosaic_gpu as _compat

LOG2E = math.log2(math.e)
LN2 = math.log(2)


@dataclasses.dataclass(frozen=True)
class Program:
    """All that is known of a kernel when it is made.

    Attributes:
      batch, queries, keys, heads, kv_heads, size, value_size: The shapes.
      dtype: Of queries, keys, values and output.
      block_m: Queries of a consumer warpgroup.
      block_n: Keys in a tile.
      stages: Tiles of keys, and of values, that are on their way at a time.
      warpgroups: How many consume.
      turns: Whether consumers take turns.
      section: Heads whose blocks follow each other, so that their keys and values stay
        in the L2 cache.
      left, right: How many keys before and after key t query t sees, but for
        `offsets`; below 0, if not key t; None: any.
      scale: Multiplies the products of queries and keys.
      softcap: Bounds the logits; or None.
      total: Whether the sum of exponentials before they are rounded is needed.
      sinks, query_lengths, key_lengths, segments, offsets: Which arrays there are.
      interpreted: Whether Pallas' interpreter runs it.
    """

    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    size: int
    value_size: int
    dtype: Any
    block_m: int
    block_n: int
    stages: int
    warpgroups: int
    turns: bool
    section: int
    left: int | None
    right: int | None
    scale: float
    softcap: float | None
    total: bool
    sinks: bool = False
    query_lengths: bool = False
    key_lengths: bool = False
    segments: bool = False
    offsets: bool = False
    interpreted: bool = False

    @property
    def factor(self) -> float:
        """What makes exponents to the base 2 of logits as they are stored."""
        return LOG2E * (self.scale if self.softcap is None else 2 * self.softcap)

    @property
    def shift(self) -> float:
        """What is then to be added to them."""
        return 0.0 if self.softcap is None else LOG2E * self.softcap

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def owned(self) -> int:
        """Queries of a block."""
        return self.block_m * self.warpgroups

    @property
    def blocks(self) -> int:
        """Blocks of a head."""
        return -(-self.queries // self.owned)

    @property
    def padded_queries(self) -> int:
        return self.blocks * self.owned

    @property
    def tiles(self) -> int:
        """Tiles of keys."""
        return -(-self.keys // self.block_n)


def _divided(n: Any, size: int) -> jax.Array:
    """`n` // `size` of what is not negative."""
    return lax.div(n, jnp.int32(size))


def _divided_up(n: Any, size: int) -> jax.Array:
    return lax.div(n + jnp.int32(size - 1), jnp.int32(size))


@dataclasses.dataclass(frozen=True)
class Range:
    """The tiles that a block reads: from `begin` to `end`, at least one.

    Those from `whole` to `whole_end` are seen in full by all its queries.
    """

    begin: Any
    whole: Any
    whole_end: Any
    end: Any


def tile_range(
    first: Any,
    last: Any,
    before: int | None,
    after: int | None,
    limit: Any,
    block: int,
    tiles: int,
) -> Range:
    """The tiles of places that those from first to last meet.

    A place meets those up to `before` places before it and `after` after it (None: any
    number), below `limit`.
    """
    begin = whole = jnp.int32(0)
    end, whole_end = _divided_up(limit, block), _divided(limit, block)
    if after is not None:
        most = jnp.maximum(jnp.minimum(last + jnp.int32(after + 1), limit), 0)
        end = _divided_up(most, block)
        most = jnp.maximum(jnp.minimum(first + jnp.int32(after + 1), limit), 0)
        whole_end = _divided(most, block)
    if before is not None:
        begin = _divided(jnp.maximum(first - jnp.int32(before), 0), block)
        whole = _divided_up(jnp.maximum(last - jnp.int32(before), 0), block)
    begin = jnp.minimum(begin, jnp.int32(tiles - 1))
    end = jnp.maximum(end, begin + 1)
    whole = jnp.minimum(jnp.maximum(whole, begin), end)
    whole_end = jnp.maximum(jnp.minimum(whole_end, end), whole)
    return Range(begin, whole, whole_end, end)


def forward(p: Program, **options: Any) -> Any:
    """The function that runs the kernel.

    Of query, key and value, with as many places as `copied` says, and of what there is
    of `OTHERS`. It returns out and its low digits, and, with `Program.padded_queries`,
    lse, what rounding took off it, and the largest logits.
    """
    plgpu = _compat.mosaic_gpu()
    row = jax.ShapeDtypeStruct((p.batch, p.heads, p.padded_queries), np.float32)
    shape = (p.batch, copied(p.queries, p.block_m), p.heads, p.value_size)
    out = jax.ShapeDtypeStruct(shape, p.dtype)
    sections = p.batch * p.heads // p.section
    return plgpu.kernel(
        lambda *refs, **scratch: _Kernel(p, refs, scratch).run(),
        out_type=(out, out, row, row, row),
        scratch_types=_scratch(p),
        grid=(sections * p.section * p.blocks,),
        grid_names=("block",),
        num_threads=p.warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
        ),
        **options,
    )


def copied(places: int, block: int) -> int:
    """How many places an array must have for copies of blocks: they may reach beyond.

    But its rows are taken by eight.
    """
    return max(block, -(-places // 8) * 8)


def swizzled(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory of tiles that wgmma reads."""
    plgpu = _compat.mosaic_gpu()
    columns = next(n for n in (64, 32, 16) if shape[-1] % n == 0)
    transforms = (
        plgpu.TilingTransform((8, columns)),
        plgpu.SwizzleTransform(2 * columns),
    )
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def _scratch(p: Program) -> dict[str, Any]:
    plgpu = _compat.mosaic_gpu()
    row = plgpu.SMEM((p.warpgroups, p.block_m), np.dtype(np.float32))
    found = {
        "q_smem": swizzled((p.warpgroups, p.block_m, p.size), p.dtype),
        "k_smem": swizzled((p.stages, p.block_n, p.size), p.dtype),
        "v_smem": swizzled((p.stages, p.block_n, p.value_size), p.dtype),
        "row_smem": row,
        "q_ready": plgpu.Barrier(num_barriers=p.warpgroups),
        "k_ready": plgpu.Barrier(num_barriers=p.stages),
        "v_ready": plgpu.Barrier(num_barriers=p.stages),
        "k_free": plgpu.Barrier(num_arrivals=p.warpgroups, num_barriers=p.stages),
        "v_free": plgpu.Barrier(num_arrivals=p.warpgroups, num_barriers=p.stages),
    }
    if p.turns:
        found["turn"] = plgpu.Barrier(num_arrivals=p.warpgroups)
    if p.value_size != p.size:
        out = (p.warpgroups, p.block_m, p.value_size)
        found["out_smem"] = swizzled(out, p.dtype)
    if p.interpreted:
        weights = (p.warpgroups, p.block_m, p.block_n)
        found["weights_smem"] = swizzled(weights, p.dtype)
        found["logits_smem"] = plgpu.SMEM(weights, np.dtype(np.float32))
        sums = (p.warpgroups, p.block_m, p.value_size)
        found["acc_smem"] = plgpu.SMEM(sums, np.dtype(np.float32))
    return found


OTHERS = (
    "sinks",
    "query_lengths",
    "key_lengths",
    "query_segments",
    "key_segments",
    "offsets",
)


class _Kernel:
    """What one block does; its references by name."""

    def __init__(self, p: Program, refs: tuple[Any, ...], scratch: dict[str, Any]):
        self.p = p
        self.pl, self.plgpu = _compat.pallas(), _compat.mosaic_gpu()
        given = {
            "sinks": p.sinks,
            "query_lengths": p.query_lengths,
            "key_lengths": p.key_lengths,
            "query_segments": p.segments,
            "key_segments": p.segments,
            "offsets": p.offsets,
        }
        self.q, self.k, self.v, *others = refs
        *others, self.out, self.low, self.lse, self.lse_low, self.tops = others
        names = [name for name in OTHERS if given[name]]
        self.others = dict(zip(names, others, strict=True))
        self.scratch = scratch
        self.warpgroup = lax.axis_index("warpgroup")
        # The last queries first: under `causal` they take longest.
        index = lax.axis_index("block")
        of_section = p.section * p.blocks
        section, index = _divided(index, of_section), lax.rem(index, of_section)
        block = p.blocks - 1 - _divided(index, p.section)
        head = section * p.section + lax.rem(index, p.section)
        self.batch, self.head = _divided(head, p.heads), lax.rem(head, p.heads)
        self.kv_head = _divided(self.head, p.group)
        self.start = block * p.owned
        self.query_length = self._length("query_lengths", p.queries)
        self.key_length = self._length("key_lengths", p.keys)
        self.offset = self._number("offsets", jnp.int32(0))
        first = self.start + self.offset
        r = tile_range(
            first,
            first + (p.owned - 1),
            p.left,
            p.right,
            self.key_length,
            p.block_n,
            p.tiles,
        )
        if p.query_lengths:
            # Queries beyond the length see nothing.
            end = jnp.where(self.start < self.query_length, r.end, r.begin + 1)
            r = Range(
                r.begin, jnp.minimum(r.whole, end), jnp.minimum(r.whole_end, end), end
            )
        self.range = r

    def _number(self, name: str, otherwise: Any) -> Any:
        return self.others[name][self.batch] if name in self.others else otherwise

    def _length(self, name: str, places: int) -> Any:
        given = self._number(name, jnp.int32(places))
        return jnp.maximum(jnp.minimum(given, places), 0)

    def run(self) -> None:
        p = self.p
        self.pl.when(self.warpgroup < p.warpgroups)(self._consume)
        self.pl.when(self.warpgroup == p.warpgroups)(self._produce)

    # The producer.

    def _produce(self) -> None:
        p, s = self.p, self.scratch
        self.plgpu.set_max_registers(40 if p.warpgroups == 2 else 32, action="decrease")

        def copy(ref: Any, name: str, tile: Any, slot: Any) -> None:
            at = (self.batch, self.pl.ds(tile * p.block_n, p.block_n), self.kv_head)
            self.plgpu.copy_gmem_to_smem(
                ref.at[at], s[f"{name}_smem"].at[slot], s[f"{name}_ready"].at[slot]
            )

        count = self.range.end - self.range.begin

        def step(i: Any, _: Any) -> Any:
            slot = lax.rem(i, jnp.int32(p.stages))
            for ref, name in ((self.k, "k"), (self.v, "v")):
                wait = functools.partial(
                    self.plgpu.barrier_wait, s[f"{name}_free"].at[slot]
                )
                tile = self.range.begin + i
                self.pl.when(i >= p.stages)(wait)
                self.pl.when(i < count)(functools.partial(copy, ref, name, tile, slot))
            return _

        # It stays until all that it loaded was read.
        lax.fori_loop(jnp.int32(0), count + jnp.int32(p.stages), step, None)

    # The consumers.

    def _consume(self) -> None:
        p, s, plgpu = self.p, self.scratch, self.plgpu
        plgpu.set_max_registers(232 if p.warpgroups == 2 else 160, action="increase")
        w = self.warpgroup
        self.own = self.start + w * p.block_m
        self.q_own = s["q_smem"].at[w]
        at = (self.batch, self.pl.ds(self.own, p.block_m), self.head)
        plgpu.copy_gmem_to_smem(self.q.at[at], self.q_own, s["q_ready"].at[w])
        self.rows = plgpu.Layout.WGMMA.reduce(1)
        if p.segments:
            ids = self.others["query_segments"].at[self.batch, at[1]]
            self.ids = _compat.mosaic_load(ids, self.rows)
        plgpu.barrier_wait(s["q_ready"].at[w])
        if p.interpreted:
            names = ("acc_smem", "logits_smem")
            staging = s["weights_smem"].at[w]
            refs = (_compat.Accumulator(s[name].at[w], staging) for name in names)
            acc, logits = refs
            acc.clear()
            self._attend(acc, logits)
            return
        shapes = (p.block_m, p.value_size), (p.block_m, p.block_n)
        self.pl.run_scoped(
            lambda *refs: self._attend(*map(_compat.Accumulator, refs)),
            *(plgpu.ACC(shape, np.dtype(np.float32)) for shape in shapes),
        )

    def _full(self, value: Any) -> jax.Array:
        """[block_m] of the queries."""
        full = jnp.full((self.p.block_m,), value, jnp.float32)
        return self.plgpu.layout_cast(full, self.rows)

    @staticmethod
    def _over(numbers: jax.Array, tile: jax.Array) -> jax.Array:
        """The numbers of queries, along the keys of a tile."""
        return lax.broadcast_in_dim(numbers, tile.shape, [0])

    def _turn(self) -> None:
        if self.p.turns:
            self.plgpu.barrier_arrive(self.scratch["turn"])
            self.plgpu.barrier_wait(self.scratch["turn"])

    def _slot(self, tile: Any) -> jax.Array:
        return lax.rem(tile - self.range.begin, jnp.int32(self.p.stages))

    def _sink(self) -> tuple[jax.Array, jax.Array]:
        """The maximum and the sum of exponentials of queries that see no key."""
        if not self.p.sinks:
            return self._full(-jnp.inf), self._full(0.0)
        sink = self.others["sinks"][self.head]
        empty = jnp.where(sink == -jnp.inf, 0.0, 1.0)
        return self._full(sink * LOG2E - self.p.shift), self._full(empty)

    def _attend(self, acc: Any, logits: Any) -> None:
        p, s, plgpu = self.p, self.scratch, self.plgpu
        top, total = self._sink()
        begin, end = self.range.begin, self.range.end
        r = self.range
        if p.turns:
            self.pl.when(self.warpgroup == 1)(self._turn)
        plgpu.barrier_wait(s["k_ready"].at[0])
        self._multiply_keys(logits, 0)
        self._turn()
        products = logits.load()
        plgpu.barrier_arrive(s["k_free"].at[0])
        weight = total
        top, total, e, shrink = self._softmax(top, total, products, begin, True)
        carry = (top, total, *self._weights(weight * shrink, e))
        self._turn()

        def step(edge: bool) -> Any:
            return lambda tile, carry: self._step(acc, logits, tile, carry, edge)

        first = begin + 1
        whole = jnp.maximum(r.whole, first)
        if p.left is not None:
            carry = lax.fori_loop(first, whole, step(True), carry)
        else:
            whole = first
        whole_end = jnp.maximum(r.whole_end, whole)
        carry = lax.fori_loop(whole, whole_end, step(False), carry)
        if p.right is not None or p.key_lengths or p.keys % p.block_n:
            carry = lax.fori_loop(whole_end, end, step(True), carry)
        top, total, weight, weights = carry
        slot = self._slot(end - 1)
        plgpu.barrier_wait(s["v_ready"].at[slot])
        acc.add_product(weights, s["v_smem"].at[slot])
        if p.turns:
            self.pl.when(self.warpgroup == 0)(self._turn)
        sums = acc.load()
        plgpu.barrier_arrive(s["v_free"].at[slot])
        self._store(sums, top, total, weight)

    def _multiply_keys(self, logits: Any, slot: Any) -> None:
        keys = self.scratch["k_smem"].at[slot]
        logits.clear()
        logits.add_product(self.q_own, keys.transpose((1, 0)))

    def _step(self, acc: Any, logits: Any, tile: Any, carry: Any, edge: bool) -> Any:
        s, plgpu = self.scratch, self.plgpu
        top, total, weight, used = carry
        slot, before = self._slot(tile), self._slot(tile - 1)
        plgpu.barrier_wait(s["k_ready"].at[slot])
        self._multiply_keys(logits, slot)
        plgpu.barrier_wait(s["v_ready"].at[before])
        acc.add_product(used, s["v_smem"].at[before])
        self._turn()
        products = logits.load(running=1)
        plgpu.barrier_arrive(s["k_free"].at[slot])
        top, total, e, shrink = self._softmax(top, total, products, tile, edge)
        sums = acc.load()
        plgpu.barrier_arrive(s["v_free"].at[before])
        # While a product reads its weights, the next may not be in their registers.
        weight, weights = self._weights(weight * shrink, lax.optimization_barrier(e))
        acc.store(sums * self._over(shrink, sums))
        self._turn()
        return top, total, weight, weights

    def _softmax(
        self, top: Any, total: Any, products: Any, tile: Any, edge: bool
    ) -> Any:
        p = self.p

        s = self._logits(products, tile, edge)
        new_top = jnp.maximum(top, jnp.max(s, axis=1) * p.factor)
        # For a query that has seen nothing yet any finite number will do.
        m = jnp.where(new_top == -jnp.inf, 0.0, new_top)
        e = jnp.exp2(s * p.factor - self._over(m, s))
        shrink = jnp.exp2(top - m)
        if p.total:
            total = total * shrink + jnp.sum(e, axis=1)
        return new_top, total, e, shrink

    def _weights(self, weight: Any, e: Any) -> Any:
        """The exponentials as they are multiplied, and their sum added to `weight`."""
        # Two are converted at once, if the compiler does not see each one used.
        weights = lax.optimization_barrier(e.astype(self.p.dtype))
        wide = _compat.mosaic_widened(weights, interpreted=self.p.interpreted)
        return weight + jnp.sum(wide, axis=1), weights

    def _logits(self, s: Any, tile: Any, edge: bool) -> Any:
        p, plgpu = self.p, self.plgpu
        if p.softcap is not None:
            t = jnp.exp2(s * (2 * LOG2E * p.scale / p.softcap))
            s = _compat.mosaic_reciprocal(-1.0 - t, interpreted=p.interpreted)

        def places(axis: int) -> Any:
            return plgpu.broadcasted_iota(
                jnp.int32, s.shape, axis, layout=plgpu.Layout.WGMMA
            )

        start = tile * p.block_n
        if edge:
            key = places(1)
            visible = key < self.key_length - start
            if p.left is not None or p.right is not None:
                distance = key - places(0)
                between = self.own + self.offset - start
                if p.right is not None:
                    visible &= distance <= between + p.right
                if p.left is not None:
                    visible &= distance >= between - p.left
            s = jnp.where(visible, s, -jnp.inf)
        if p.segments:
            at = (self.batch, self.pl.ds(start, p.block_n))
            layout = plgpu.Layout.WGMMA.reduce(0)
            ids = _compat.mosaic_load(self.others["key_segments"].at[at], layout)
            same = self._over(self.ids, s) == lax.broadcast_in_dim(ids, s.shape, [1])
            s = jnp.where(same, s, -jnp.inf)
        return s

    def _store(self, sums: Any, top: Any, total: Any, weight: Any) -> None:
        p, w = self.p, self.warpgroup
        if not p.total:
            total = weight
        if p.query_lengths:
            place = self.plgpu.broadcasted_iota(
                jnp.int32, (p.block_m,), 0, layout=self.rows
            )
            inside = place < self.query_length - self.own
            sink_top, sink_total = self._sink()
            top = jnp.where(inside, top, sink_top)
            total = jnp.where(inside, total, sink_total)
            weight = jnp.where(inside, weight, sink_total)
            sums = jnp.where(self._over(inside, sums), sums, 0.0)
        inverse = 1.0 / jnp.where(weight == 0.0, 1.0, weight)
        wide = sums * self._over(inverse, sums)
        rounded = wide.astype(p.dtype)
        low = (wide - rounded.astype(jnp.float32)).astype(p.dtype)
        at = (self.batch, self.pl.ds(self.own, p.block_m), self.head)
        name = "q_smem" if p.value_size == p.size else "out_smem"
        tile = self.scratch[name].at[w]
        for value, ref in ((rounded, self.out), (low, self.low)):
            self._copy_out(value, tile, ref.at[at])
        rest = jnp.log(total)
        high = (top + p.shift) * LN2
        lse = high + rest
        part = lse - high
        lse_low = (high - (lse - part)) + (rest - part)  # Knuth's TwoSum
        lse_low = jnp.where(jnp.abs(lse) < jnp.inf, lse_low, 0.0)
        # The sum is at least 1, or NaN, where a key is seen.
        lse = jnp.where(top == -jnp.inf, top, lse)
        lse = jnp.where(total == total, lse, total)
        at = (self.batch, self.head, self.pl.ds(self.own, p.block_m))
        tile = self.scratch["row_smem"].at[w]
        for value, ref in ((lse, self.lse), (lse_low, self.lse_low), (high, self.tops)):
            self._copy_out(value, tile, ref.at[at])

    def _copy_out(self, value: Any, tile: Any, ref: Any) -> None:
        tile[...] = value
        self.plgpu.commit_smem()
        self.plgpu.copy_smem_to_gmem(tile, ref)
        self.plgpu.wait_smem_to_gmem(0)
