"""The forward of attention as a Mosaic GPU kernel; see `mosaic_gpu_kernel`.

A block owns queries, and has a running maximum and sum for each (FlashAttention, arXiv
2205.14135). A consumer starts the product of its queries with the next keys before it
waits for that of the last weights with their values: so the tensor cores work while it
computes exponentials. With `Program.turns` the consumers also take turns
(FlashAttention-3, arXiv 2407.08608): one starts its products where the other begins
with exponentials.

With `Program.bounded` there is no maximum, and nothing to multiply when it grows. Then
a tile is computed in parts, each with products of its own, which run while the others
are computed; and the tensor cores add up the weights too: they multiply them with ones.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxsoftmax._attend.mosaic_gpu_kernel import Kernel
from jaxsoftmax._attend.mosaic_gpu_program import (
    LN2,
    LOG2E,
    Program,
    copied,
)
from jaxsoftmax._attend.mosaic_gpu_scratch import (
    accumulators,
    barriers,
    bias_scratch,
    swizzled,
)
from jaxsoftmax._compat import mosaic_gpu as _compat
from jaxsoftmax._compat import mosaic_gpu_registers as registers
from jaxsoftmax._core.mosaic_gpu_tanh import HalfTanh

# Columns of ones, the fewest that shared memory has tiles for; and keys of a part, the
# fewest that weights are multiplied with.
_ONES = 16
_FEWEST = 64


def forward(p: Program) -> Any:
    """The function that runs the kernel.

    Of query, key and value, with as many places as `copied` says, and of what there is
    of `OTHERS`. It returns out; with `Program.wants_max`, and `Program.padded_queries`,
    the largest logits; with `Program.keeps` the low digits of out, lse, and what
    rounding took off it.
    """
    shape = (p.batch, copied(p.queries, p.block_m), p.heads, p.value_size)
    row = jax.ShapeDtypeStruct((p.batch, p.heads, p.padded_queries), np.float32)
    out = jax.ShapeDtypeStruct(shape, p.dtype)
    plgpu = _compat.mosaic_gpu()
    scratch = {
        "q_smem": swizzled((p.warpgroups, p.block_m, p.size), p.dtype),
        "k_smem": swizzled((p.stages, p.block_n, p.size), p.dtype),
        "v_smem": swizzled((p.stages, p.block_n, p.value_size), p.dtype),
        "row_smem": plgpu.SMEM((p.warpgroups, p.block_m), np.dtype(np.float32)),
        "q_ready": plgpu.Barrier(num_barriers=p.warpgroups),
        **barriers(p, "k", "v"),
        **bias_scratch(p),
        **accumulators(p, **_accumulated(p)),
    }
    if p.turns:
        scratch["turn"] = plgpu.Barrier(num_arrivals=p.warpgroups)
    if p.value_size != p.size:
        of_values = (p.warpgroups, p.block_m, p.value_size)
        scratch["out_smem"] = swizzled(of_values, p.dtype)
    if p.bounded:
        scratch["ones_smem"] = swizzled((p.warpgroups, _part(p)[1], _ONES), p.dtype)
    results = (out, *[row] * p.wants_max, *[out, row, row] * p.keeps)
    return p.kernel(_Forward, results, scratch)


def _parts(p: Program) -> int:
    """In how many parts a tile is computed."""
    return p.block_n // _FEWEST if p.bounded else 1


def _part(p: Program) -> tuple[int, int]:
    """The shape of one."""
    return p.block_m, p.block_n // _parts(p)


def _accumulated(p: Program) -> dict[str, Any]:
    part = _part(p)
    found = {"out": ((p.block_m, p.value_size), part)}
    if p.bounded:
        found["weights"] = ((p.block_m, _ONES), part)
    return found | {f"logits_{i}": (part, None) for i in range(_parts(p))}


class _Forward(Kernel):
    name = "jaxsoftmax_attention"
    from_end = True

    def __init__(self, p: Program, refs: Any, scratch: dict[str, Any]) -> None:
        self.q, self.k, self.v, *others = refs
        if p.keeps:
            *others, self.low, self.lse, self.lse_low = others
        if p.wants_max:
            *others, self.tops = others
        *others, self.out = others
        self.parts, self.part = _parts(p), _part(p)
        super().__init__(p, others, scratch)

    def produce(self) -> None:
        arrays = {"k": self.k, "v": self.v}
        copies = {name: self.tile_of_keys(ref) for name, ref in arrays.items()}
        if self.p.reads_bias:
            copies["bias"] = self.tile_of_bias
        self.load_tiles(copies)

    def consume(self) -> None:
        p, s, w = self.p, self.scratch, self.warpgroup
        self.at = (self.batch, self.pl.ds(self.own, p.block_m), self.head)
        self.q_own = s["q_smem"].at[w]
        self.plgpu.copy_gmem_to_smem(self.q.at[self.at], self.q_own, s["q_ready"].at[w])
        self.queries = self.own, self.segment_ids("query", self.own, p.block_m, 0)
        self.bias_of_own = self.own_bias(self.head)
        if p.bounded:
            self.ones = s["ones_smem"].at[w]
            ones = jnp.ones(self.ones.shape, p.dtype)
            self.ones[...] = self.plgpu.layout_cast(ones, self.plgpu.Layout.WGMMA)
            self.plgpu.commit_smem()
        self.plgpu.barrier_wait(s["q_ready"].at[w])
        self.with_accumulators(self._attend, **_accumulated(p))

    def _full(self, value: Any) -> jax.Array:
        """[block_m] of the queries."""
        full = jnp.full((self.p.block_m,), value, jnp.float32)
        return self.plgpu.layout_cast(full, self.rows)

    def _turn(self) -> None:
        if self.p.turns:
            self.plgpu.barrier_arrive(self.scratch["turn"])
            self.plgpu.barrier_wait(self.scratch["turn"])

    def _slot(self, turn: Any) -> jax.Array:
        return lax.rem(turn - self.range.begin, jnp.int32(self.p.stages))

    def _sink(self) -> tuple[jax.Array, jax.Array]:
        """The maximum and the sum of exponentials of queries that see no key."""
        if not self.p.sinks:
            return self._full(0.0 if self.p.bounded else -jnp.inf), self._full(0.0)
        sink = self.others["sinks"][self.head]
        empty = jnp.where(sink == -jnp.inf, 0.0, 1.0)
        top = sink if self.p.differs_first else sink * LOG2E
        return self._full(top), self._full(empty)

    def _attend(self, *made: Any) -> None:
        p, s, plgpu = self.p, self.scratch, self.plgpu
        sums, logits = made[: -self.parts], made[-self.parts :]
        top, total = self._sink()
        begin, end = self.range.begin, self.range.end
        if p.turns:
            self.pl.when(self.warpgroup == 1)(self._turn)
        step = functools.partial(self._step, sums, logits)
        carry = step(begin, (top, total, total, None), True)
        carry = self.over_tiles(step, carry, begin + 1)
        top, total, weight, weights = carry
        slot = self._slot(end - 1)
        self._add(sums, weights, slot, self.parts - 1)
        if p.turns:
            self.pl.when(self.warpgroup == 0)(self._turn)
        out, *added = (acc.load() for acc in sums)
        plgpu.barrier_arrive(s["v_free"].at[slot])
        if p.bounded:
            weight = jnp.max(added[0], axis=1)  # all columns are the same
        self._store(out, top, total, weight)

    def _multiply_keys(self, logits: Any, slot: Any) -> None:
        """Starts the products of queries and keys."""
        for i, part in enumerate(logits):
            keys = self._part_of(self.scratch["k_smem"].at[slot], i)
            part.clear()
            part.add_product(self.q_own, keys.transpose((1, 0)))

    def _part_of(self, places: Any, part: int) -> Any:
        """What a reference to the places of a tile has of a part."""
        n = self.part[1]
        return places if self.parts == 1 else places.at[self.pl.ds(part * n, n)]

    def _words_of(self, words: Any, part: int) -> Any:
        """What `mask_words` gave, of a part."""
        if words is None or part == 0:
            return words
        return lax.shift_right_logical(words, jnp.int32(part * self.part[1] // 4))

    def _add(self, sums: Any, weights: Any, slot: Any, part: int) -> None:
        """Starts those of a part's weights and values, and of weights and ones."""
        if part == 0:
            self.ready(slot, "v")
        values = self._part_of(self.scratch["v_smem"].at[slot], part)
        sums[0].add_product(weights, values)
        if self.p.bounded:
            sums[1].add_product(weights, self.ones)

    def _step(self, sums: Any, logits: Any, turn: Any, carry: Any, edge: bool) -> Any:
        p = self.p
        top, total, weight, used = carry
        slot, before, tile = self._slot(turn), self._slot(turn - 1), self.tile_at(turn)
        self.ready(slot, "k")
        self._multiply_keys(logits, slot)
        if used is not None:
            self._add(sums, used, before, self.parts - 1)
        words = self.mask_words(self.head, tile)
        kept = self.kept(self.head, self.own, tile * p.block_n)
        self._turn()
        out = None
        for i, part in enumerate(logits):
            last = i == self.parts - 1
            # All but the products of later keys, and of the weights before these.
            running = self.parts - 1 - i
            if i > 0 or used is not None:
                running += len(sums)
            products = part.load(running=running)
            if last:
                self.free(slot, "k")
            if i == 1 and used is not None:
                self.free(before, "v")
            pairs = self._words_of(words, i), slot, self.bias_of_own
            start = tile * p.block_n + i * self.part[1]
            found = self._softmax(top, total, products, pairs, start, edge)
            top, total, e, shrink = found
            if self.parts == 1 and used is not None:
                out = sums[0].load()
                self.free(before, "v")
            if shrink is not None:
                weight = weight * shrink
            # While a product reads its weights, the next may not be in their registers.
            e = lax.optimization_barrier(e)
            weight, weights = self._weights(weight, e, kept)
            if not last:
                self._add(sums, weights, slot, i)
        if self.parts > 1:
            sums[0].wait()
        elif out is not None and shrink is not None:
            sums[0].store(out * self.over(shrink, out))
        self._turn()
        return top, total, weight, weights

    def _softmax(
        self, top: Any, total: Any, products: Any, pairs: Any, start: Any, edge: bool
    ) -> Any:
        """Maximum and sum with those of a part, its exponentials, and their factor.

        By it what was computed of earlier keys is to be multiplied, if it is not None.
        """
        p = self.p
        cap = self._cap_alone(edge)
        if cap is None:
            keys = start, self.segment_ids("key", start, products.shape[1], 1)
            s, _ = self.logits(products, self.queries, keys, pairs, edge)
        if p.bounded:
            e = cap.powers(products, p.factor) if cap else jnp.exp2(s * p.factor)
            if p.keeps:
                total = total + jnp.sum(e, axis=1)
            return top, total, e, None
        if cap is not None:
            largest = cap.of_rows(jnp.max(products, axis=1))
        else:
            largest = jnp.max(s, axis=1)
        if not p.differs_first:
            largest = largest * p.factor
        new_top = jnp.maximum(top, largest)
        # For a query that has seen nothing yet any finite number will do.
        m = jnp.where(new_top == -jnp.inf, 0.0, new_top)
        if cap is not None:
            e = cap.powers(products, p.factor, self.over(m, products))
        else:
            e = self.powers(s, m)
        shrink = jnp.exp2((top - m) * p.factor if p.differs_first else top - m)
        if p.keeps:
            total = total * shrink + jnp.sum(e, axis=1)
        return new_top, total, e, shrink

    def _cap_alone(self, edge: bool) -> HalfTanh | None:
        """That of the soft cap, where all that makes logits of products is the cap.

        Then a query's largest logit is that of its largest product.
        """
        p = self.p
        if p.softcap is None or edge or p.segments or p.mask or p.bias:
            return None
        cap = HalfTanh(p.scale / p.softcap, columns=p.columns_of_cap)
        return cap if cap.folds(p.factor) else None

    def _weights(self, weight: Any, e: Any, kept: Any) -> Any:
        """The exponentials as they are multiplied, and their sum added to `weight`.

        That is of all of them, and dropout multiplies by 0. With `Program.bounded` the
        sum is a product, too.
        """
        # Two are converted at once, if the compiler does not see each one used.
        weights = lax.optimization_barrier(e.astype(self.p.dtype))
        if not self.p.bounded:
            wide = registers.widened(weights)
            weight = weight + jnp.sum(wide, axis=1)
        if kept is not None:
            dropped = self.dropped(e, kept).astype(self.p.dtype)
            weights = lax.optimization_barrier(dropped)
        return weight, weights

    def _store(self, sums: Any, top: Any, total: Any, weight: Any) -> None:
        p, w = self.p, self.warpgroup
        if not p.keeps:
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
            sums = jnp.where(self.over(inside, sums), sums, 0.0)
        inverse = p.of_kept / jnp.where(weight == 0.0, 1.0, weight)
        wide = sums * self.over(inverse, sums)
        rounded = wide.astype(p.dtype)
        name = "q_smem" if p.value_size == p.size else "out_smem"
        tile, row = self.scratch[name].at[w], self.scratch["row_smem"].at[w]
        self.store(rounded, tile, self.out.at[self.at])
        at = (self.batch, self.head, self.pl.ds(self.own, p.block_m))
        high = top if p.differs_first else top * LN2
        if p.wants_max:
            self.store(high, row, self.tops.at[at])
        if not p.keeps:
            return
        low = (wide - rounded.astype(jnp.float32)).astype(p.dtype)
        self.store(low, tile, self.low.at[self.at])
        rest = jnp.log(total)
        lse = high + rest
        part = lse - high
        lse_low = (high - (lse - part)) + (rest - part)  # Knuth's TwoSum
        lse_low = jnp.where(jnp.abs(lse) < jnp.inf, lse_low, 0.0)
        # The sum is at least 1, or NaN, where a key is seen.
        lse = jnp.where(top == -jnp.inf, top, lse)
        lse = jnp.where(total == total, lse, total)
        for value, ref in ((lse, self.lse), (lse_low, self.lse_low)):
            self.store(value, row, ref.at[at])
