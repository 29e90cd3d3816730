"""The forward of attention as a Mosaic GPU kernel; see `mosaic_gpu_kernel`.

A block owns queries, and has a running maximum and sum for each (FlashAttention, arXiv
2205.14135). A consumer starts the product of its queries with the next keys before it
waits for that of the last weights with their values: so the tensor cores work while it
computes exponentials. With `Program.turns` the consumers also take turns
(FlashAttention-3, arXiv 2407.08608): one starts its products where the other begins
with exponentials.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxsoftmax._attend.mosaic_gpu_kernel import (
    Kernel,
    accumulators,
    barriers,
    bias_scratch,
    swizzled,
)
from jaxsoftmax._attend.mosaic_gpu_program import (
    LN2,
    LOG2E,
    Program,
    copied,
)
from jaxsoftmax._compat import mosaic_gpu as _compat
from jaxsoftmax._compat import mosaic_gpu_registers as registers
from jaxsoftmax._core.mosaic_gpu_tanh import HalfTanh


def forward(p: Program) -> Any:
    """The function that runs the kernel.

    Of query, key and value, with as many places as `copied` says, and of what there is
    of `OTHERS`. It returns out and, with `Program.padded_queries`, the largest logits;
    with `Program.keeps` then the low digits of out, lse, and what rounding took off it.
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
    kept = (out, row, row) if p.keeps else ()
    return p.kernel(_Forward, (out, row, *kept), scratch)


def _accumulated(p: Program) -> dict[str, Any]:
    return {"out": ((p.block_m, p.value_size), p.shape), "logits": (p.shape, None)}


class _Forward(Kernel):
    name = "jaxsoftmax_attention"

    def __init__(self, p: Program, refs: Any, scratch: dict[str, Any]) -> None:
        self.q, self.k, self.v, *others = refs
        if p.keeps:
            *others, self.low, self.lse, self.lse_low = others
        *others, self.out, self.tops = others
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

    def _slot(self, tile: Any) -> jax.Array:
        return lax.rem(tile - self.range.begin, jnp.int32(self.p.stages))

    def _sink(self) -> tuple[jax.Array, jax.Array]:
        """The maximum and the sum of exponentials of queries that see no key."""
        if not self.p.sinks:
            return self._full(-jnp.inf), self._full(0.0)
        sink = self.others["sinks"][self.head]
        empty = jnp.where(sink == -jnp.inf, 0.0, 1.0)
        top = sink if self.p.differs_first else sink * LOG2E
        return self._full(top), self._full(empty)

    def _attend(self, acc: Any, logits: Any) -> None:
        p, s, plgpu = self.p, self.scratch, self.plgpu
        top, total = self._sink()
        begin, end = self.range.begin, self.range.end
        if p.turns:
            self.pl.when(self.warpgroup == 1)(self._turn)
        plgpu.barrier_wait(s["k_ready"].at[0])
        self._multiply_keys(logits, 0)
        words = self.mask_words(self.head, begin)
        kept = self.kept(self.head, self.own, begin * p.block_n)
        self._turn()
        products = logits.load()
        plgpu.barrier_arrive(s["k_free"].at[0])
        weight = total
        pairs = words, 0, self.bias_of_own
        top, total, e, shrink = self._softmax(top, total, products, pairs, begin, True)
        carry = (top, total, *self._weights(weight * shrink, e, kept))
        self._turn()

        step = functools.partial(self._step, acc, logits)
        carry = self.over_tiles(step, carry, begin + 1)
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
        words = self.mask_words(self.head, tile)
        kept = self.kept(self.head, self.own, tile * self.p.block_n)
        self._turn()
        products = logits.load(running=1)
        plgpu.barrier_arrive(s["k_free"].at[slot])
        pairs = words, slot, self.bias_of_own
        top, total, e, shrink = self._softmax(top, total, products, pairs, tile, edge)
        sums = acc.load()
        plgpu.barrier_arrive(s["v_free"].at[before])
        # While a product reads its weights, the next may not be in their registers.
        e = lax.optimization_barrier(e)
        weight, weights = self._weights(weight * shrink, e, kept)
        acc.store(sums * self.over(shrink, sums))
        self._turn()
        return top, total, weight, weights

    def _softmax(
        self, top: Any, total: Any, products: Any, pairs: Any, tile: Any, edge: bool
    ) -> Any:
        p, start = self.p, tile * self.p.block_n
        cap = self._cap_alone(edge)
        if cap is not None:
            largest = cap.of_rows(jnp.max(products, axis=1))
        else:
            keys = start, self.segment_ids("key", start, p.block_n, 1)
            s, _ = self.logits(products, self.queries, keys, pairs, edge)
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
        cap = HalfTanh(p.scale / p.softcap)
        return cap if cap.folds(p.factor) else None

    def _weights(self, weight: Any, e: Any, kept: Any) -> Any:
        """The exponentials as they are multiplied, and their sum added to `weight`.

        That is of all of them, and dropout multiplies by 0.
        """
        # Two are converted at once, if the compiler does not see each one used.
        weights = lax.optimization_barrier(e.astype(self.p.dtype))
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
