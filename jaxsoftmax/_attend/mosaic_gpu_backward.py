"""The backward of attention as two Mosaic GPU kernels; see `mosaic_gpu_kernel`.

- `query_gradient`: a block owns queries, and reads keys and values.
- `key_gradient`: a block owns keys of a head of keys, and reads queries, cotangents and
  their numbers, of all heads of queries in the group. Its tiles are keys x queries.

Both compute the logits anew. So every result is written once, by one block, and nothing
is added up in memory.

``rows`` is the lse of each query, to the base 2 but for `Program.differs_first`, or
infinity for a query that sees nothing; ``center`` is D. With `differs_first` there is
also ``low``, what rounding took off lse, to the base 2.
"""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxsoftmax._attend.mosaic_gpu_kernel import Kernel
from jaxsoftmax._attend.mosaic_gpu_program import (
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


def query_gradient(p: Program) -> Any:
    """The function that runs the kernel, for the gradient of queries.

    Of query, key, value and cotangent, with as many places as `copied` says, rows,
    center and low, with `Program.padded_queries`, and of what there is of `OTHERS`.
    With `Program.wants_bias` it gives the derivative of the logits before the cap too,
    [B, N, `padded_queries`, `padded_keys`]: in float32, or in the dtype of a bias that
    has no dimension 1. With `Program.sums_bias` its sums, [B, N, `padded_queries`] in
    float32.
    """
    plgpu = _compat.mosaic_gpu()
    own = p.warpgroups, p.block_m
    places = copied(p.queries, p.block_m)
    outs = [jax.ShapeDtypeStruct((p.batch, places, p.heads, p.size), p.dtype)]
    if p.wants_bias:
        pairs = (p.batch, p.heads, p.padded_queries, p.padded_keys)
        dtype = p.bias_dtype if all(p.bias or ()) else np.dtype(np.float32)
        outs.append(jax.ShapeDtypeStruct(pairs, dtype))
    if p.sums_bias:
        outs.append(_sums(p, p.padded_queries))
    scratch = {
        "q_smem": swizzled((*own, p.size), p.dtype),
        "d_out_smem": swizzled((*own, p.value_size), p.dtype),
        "k_smem": swizzled((p.stages, p.block_n, p.size), p.dtype),
        "v_smem": swizzled((p.stages, p.block_n, p.value_size), p.dtype),
        "own_ready": plgpu.Barrier(num_arrivals=2, num_barriers=p.warpgroups),
        **barriers(p, "k", "v"),
        **bias_scratch(p),
        **accumulators(p, **_accumulated(p, d_query=p.size)),
        **_sums_scratch(p),
    }
    return p.kernel(_QueryGradient, tuple(outs), scratch)


def key_gradient(p: Program) -> Any:
    """The same for the gradients of keys and values, those that are wanted.

    The sums of `Program.sums_bias` are [B, N, `padded_keys`].
    """
    plgpu = _compat.mosaic_gpu()
    own = p.warpgroups, p.block_n
    places = copied(p.keys, p.block_n)
    outs = [
        jax.ShapeDtypeStruct((p.batch, places, p.kv_heads, size), p.dtype)
        for size in _sizes(p).values()
    ]
    if p.sums_bias:
        outs.append(_sums(p, p.padded_keys))
    numbers = plgpu.SMEM((p.stages, p.block_m), np.dtype(np.float32))
    scratch = {
        "k_smem": swizzled((*own, p.size), p.dtype),
        "q_smem": swizzled((p.stages, p.block_m, p.size), p.dtype),
        "d_out_smem": swizzled((p.stages, p.block_m, p.value_size), p.dtype),
        "rows_smem": numbers,
        "own_ready": plgpu.Barrier(
            num_arrivals=1 + p.wants_key, num_barriers=p.warpgroups
        ),
        **barriers(p, "q", "d_out", "rows"),
        **bias_scratch(p),
        **accumulators(p, **_accumulated(p, **_sizes(p))),
        **_sums_scratch(p),
    }
    if not p.wants_key and p.value_size != p.size:
        scratch["d_value_smem"] = swizzled((*own, p.value_size), p.dtype)
    if p.wants_key:
        scratch["v_smem"] = swizzled((*own, p.value_size), p.dtype)
        scratch |= {"center_smem": numbers, **barriers(p, "center")}
    if p.differs_first:
        scratch |= {"low_smem": numbers, **barriers(p, "low")}
    return p.kernel(_KeyGradient, tuple(outs), scratch)


def _sums(p: Program, places: int) -> Any:
    return jax.ShapeDtypeStruct((p.batch, p.heads, places), np.dtype(np.float32))


def _sums_scratch(p: Program) -> dict[str, Any]:
    """Shared memory from which sums are written."""
    if not p.sums_bias:
        return {}
    shape = p.warpgroups, p.owners[2]
    return {"sums_smem": _compat.mosaic_gpu().SMEM(shape, np.dtype(np.float32))}


def _sizes(p: Program) -> dict[str, int]:
    """Of the gradients that are wanted."""
    found = {"d_key": p.size} if p.wants_key else {}
    return found | ({"d_value": p.value_size} if p.wants_value else {})


def _numbers(p: Program) -> tuple[str, ...]:
    """Those of queries that there are."""
    return ("rows", "center", "low") if p.differs_first else ("rows", "center")


def _accumulated(p: Program, **sizes: int) -> dict[str, Any]:
    own = p.owners[2]
    found = {"logits": (p.shape, None)}
    if "d_value" not in sizes or p.wants_key:
        found["d_weights"] = (p.shape, None)
    return found | {name: ((own, size), p.shape) for name, size in sizes.items()}


class _Gradient(Kernel):
    @property
    def centers_first(self) -> bool:
        """Whether products are added to the center, negative, instead of 0.

        Dropout multiplies them before. With a mask, a bias or large heads registers are
        too few: heads of 256 took 1.06 times as long.
        """
        return not self.has_pairs and self.p.size + self.p.value_size <= 256

    def start_at_center(self, d_weights: Any, center: Any) -> None:
        """Sets what their products are added to. No other product may be under way."""
        axis = int(self.p.owns_keys)
        d_weights.store(lax.broadcast_in_dim(-center, self.p.shape, [axis]))

    def derivative(
        self,
        weights: Any,
        d_weights: Any,
        kept: Any,
        center: Any,
        slope: Any,
        edge: bool,
    ) -> Any:
        """The derivative of the products, less what `factor` is."""
        p = self.p
        if kept is not None:
            d_weights = self.dropped(d_weights, kept) * p.of_kept
        if not self.centers_first:
            d_weights = d_weights - self.over(center, weights, int(p.owns_keys))
        d = weights * d_weights
        if slope is not None:
            d = d * slope
        if edge or p.segments or p.mask is not None or p.bias is not None:
            # A probability of 0 has the derivative 0, whatever the values there are.
            d = jnp.where(weights == 0.0, 0.0, d)
        return d

    def no_sums(self) -> Any:
        """What the sums of own places are at first; an int where there are none."""
        if not self.p.sums_bias:
            return jnp.int32(0)
        zeros = jnp.zeros((self.p.owners[2],), jnp.float32)
        return self.plgpu.layout_cast(zeros, self.rows)

    def with_sums(self, sums: Any, d: Any) -> Any:
        """With those of a tile."""
        return sums + jnp.sum(d, axis=1) if self.p.sums_bias else sums

    def store_sums(self, sums: Any, head: Any, ref: Any) -> None:
        """Writes them, for a head of queries, as those of logits before the cap."""
        sums = sums if self.p.softcap is None else sums * -4.0
        places = self.pl.ds(self.own, self.p.owners[2])
        memory = self.scratch["sums_smem"].at[self.warpgroup]
        self.store(sums, memory, ref.at[self.batch, head, places])

    @property
    def factor(self) -> float:
        """What is left to multiply the derivatives with."""
        return self.p.scale * (1.0 if self.p.softcap is None else -4.0)


class _QueryGradient(_Gradient):
    name = "jaxsoftmax_attention_gradient_of_queries"

    def __init__(self, p: Program, refs: Any, scratch: dict[str, Any]) -> None:
        self.arrays = dict(zip(("q", "k", "v", "d_out"), refs, strict=False))
        names, outs = _numbers(p), 1 + p.wants_bias + p.sums_bias
        self.number_refs = dict(zip(names, refs[4:], strict=False))
        others = refs[4 + len(names) : -outs]
        self.d_query, *self.d_bias = refs[-outs:]
        super().__init__(p, others, scratch)

    def produce(self) -> None:
        copies = {n: self.tile_of_keys(self.arrays[n]) for n in ("k", "v")}
        if self.p.reads_bias:
            copies["bias"] = self.tile_of_bias
        self.load_tiles(copies)

    def consume(self) -> None:
        p, own = self.p, self.pl.ds(self.own, self.p.block_m)
        self.at = (self.batch, own, self.head)
        self.tiles = [self.load_own(self.arrays[n], n, self.at) for n in ("q", "d_out")]
        at = (self.batch, self.head, own)
        self.numbers = {
            name: _compat.mosaic_load(ref.at[at], self.rows)
            for name, ref in self.number_refs.items()
        }
        ids = self.segment_ids("query", self.own, p.block_m, 0)
        self.queries = self.own, ids
        self.bias_of_own = self.own_bias(self.head)
        self.plgpu.barrier_wait(self.scratch["own_ready"].at[self.warpgroup])
        self.with_accumulators(self._attend, **_accumulated(p, d_query=p.size))

    def _attend(self, logits: Any, d_weights: Any, d_query: Any) -> None:
        def step(tile: Any, sums: Any, edge: bool) -> Any:
            d = self._step(d_query, logits, d_weights, tile, edge)
            return self.with_sums(sums, d)

        sums = self.over_tiles(step, self.no_sums(), self.range.begin)
        if self.p.sums_bias:
            self.store_sums(sums, self.head, *self.d_bias)
        self._clear_bias()
        found = (d_query.load() * self.factor).astype(self.p.dtype)
        self.store(found, self.tiles[0], self.d_query.at[self.at])

    def _step(
        self, d_query: Any, logits: Any, d_weights: Any, tile: Any, edge: bool
    ) -> Any:
        p, s = self.p, self.scratch
        slot = lax.rem(tile - self.range.begin, jnp.int32(p.stages))
        start = tile * p.block_n
        numbers = self.numbers
        k, v = (s[f"{name}_smem"].at[slot] for name in ("k", "v"))
        if self.centers_first:
            self.start_at_center(d_weights, numbers["center"])
        self.ready(slot, "k")
        logits.clear()
        logits.add_product(self.tiles[0], k.transpose((1, 0)))
        self.ready(slot, "v")
        if not self.centers_first:
            d_weights.clear()
        d_weights.add_product(self.tiles[1], v.transpose((1, 0)))
        keys = start, self.segment_ids("key", start, p.block_n, 1)
        words = self.mask_words(self.head, tile)
        kept = self.kept(self.head, self.own, start)
        products = logits.load(running=1)
        pairs = words, slot, self.bias_of_own
        stored, slope = self.logits(products, self.queries, keys, pairs, edge)
        weights = self.powers(stored, numbers["rows"], numbers.get("low"))
        found, center = d_weights.load(), numbers["center"]
        d = self.derivative(weights, found, kept, center, slope, edge)
        self.free(slot, "v")
        if p.wants_bias:
            self._store_bias(tile, d if slope is None else d * -4.0)
        d_query.add_product(d.astype(p.dtype), k)
        d_query.wait()
        self.free(slot, "k")
        return d

    def _store_bias(self, tile: Any, value: Any) -> None:
        """Writes the derivative of a tile of logits."""
        p, ds = self.p, self.pl.ds
        (ref,) = self.d_bias
        own, keys = ds(self.own, p.block_m), ds(tile * p.block_n, p.block_n)
        place = ref.at[self.batch, self.head, own, keys]
        _compat.mosaic_store(place, value.astype(ref.dtype))

    def _clear_bias(self) -> None:
        """Writes 0 for the tiles that nothing in the block meets."""
        p, r = self.p, self.range
        if not p.wants_bias:
            return

        def step(tile: Any, carry: Any) -> Any:
            zeros = jnp.zeros(p.shape, jnp.float32)
            layout = self.plgpu.Layout.WGMMA
            self._store_bias(tile, self.plgpu.layout_cast(zeros, layout))
            return carry

        for bounds in ((jnp.int32(0), r.begin), (r.end, jnp.int32(p.tiles))):
            lax.fori_loop(*bounds, step, jnp.int32(0))


class _KeyGradient(_Gradient):
    name = "jaxsoftmax_attention_gradient_of_keys"

    def __init__(self, p: Program, refs: Any, scratch: dict[str, Any]) -> None:
        self.arrays = dict(zip(("q", "k", "v", "d_out"), refs, strict=False))
        names, wanted = _numbers(p), _sizes(p)
        self.numbers = dict(zip(names, refs[4:], strict=False))
        if not p.wants_key:
            del self.numbers["center"]
        outs = len(wanted) + p.sums_bias
        others, outs = refs[4 + len(names) : -outs], refs[-outs:]
        self.outs = dict(zip(wanted, outs, strict=False))
        self.d_bias = outs[len(wanted) :]
        super().__init__(p, others, scratch)

    def produce(self) -> None:
        m = self.p.block_m

        def place(name: str) -> Any:
            ref = self.arrays[name]
            return lambda member, tile: ref.at[
                self.batch, self.pl.ds(tile * m, m), self.head + member
            ]

        def numbers(name: str) -> Any:
            ref = self.numbers[name]
            return lambda member, tile: ref.at[
                self.batch, self.head + member, self.pl.ds(tile * m, m)
            ]

        copies = {name: place(name) for name in ("q", "d_out")}
        copies |= {name: numbers(name) for name in self.numbers}
        if self.p.reads_bias:
            copies["bias"] = self.tile_of_bias
        self.load_tiles(copies, self.p.group)

    def consume(self) -> None:
        p, own = self.p, self.pl.ds(self.own, self.p.block_n)
        self.at = (self.batch, own, self.kv_head)
        names = ("k", "v") if p.wants_key else ("k",)
        self.tiles = {n: self.load_own(self.arrays[n], n, self.at) for n in names}
        ids = self.segment_ids("key", self.own, p.block_n, 0)
        self.keys = self.own, ids
        self.plgpu.barrier_wait(self.scratch["own_ready"].at[self.warpgroup])
        shapes = _accumulated(p, **_sizes(p))

        def attend(*made: Any) -> None:
            self._attend(dict(zip(shapes, made, strict=True)))

        self.with_accumulators(attend, **shapes)

    def _attend(self, made: dict[str, Any]) -> None:
        p, begin = self.p, self.range.begin
        each = self.range.end - begin

        def of_member(member: Any, carry: Any) -> Any:
            own_bias = self.own_bias(self.head + member)

            def step(tile: Any, sums: Any, edge: bool) -> Any:
                slot = lax.rem(member * each + tile - begin, jnp.int32(p.stages))
                d = self._step(made, (member, own_bias), tile, slot, edge)
                return self.with_sums(sums, d)

            sums = self.over_tiles(step, self.no_sums(), begin)
            if p.sums_bias:
                sums = self._within_length(sums)
                self.store_sums(sums, self.head + member, *self.d_bias)
            return carry

        if p.group == 1:
            of_member(jnp.int32(0), jnp.int32(0))
        else:
            lax.fori_loop(jnp.int32(0), jnp.int32(p.group), of_member, jnp.int32(0))
        for name, ref in self.outs.items():
            value = made[name].load()
            if name == "d_key":
                value = value * self.factor
            elif p.dropout_rate:
                value = value * p.of_kept
            value = self._within_length(value)
            memory = "k" if name == "d_key" or "v" not in self.tiles else "v"
            tile = self.tiles[memory]
            if "d_value_smem" in self.scratch:
                tile = self.scratch["d_value_smem"].at[self.warpgroup]
            self.store(value.astype(p.dtype), tile, ref.at[self.at])

    def _within_length(self, value: Any) -> Any:
        """What there is of own keys, with 0 for those beyond the length."""
        if not self.p.key_lengths:
            return value
        place = self.plgpu.broadcasted_iota(
            jnp.int32, (self.p.block_n,), 0, layout=self.rows
        )
        inside = place < self.key_length - self.own
        if value.ndim > 1:
            inside = self.over(inside, value)
        return jnp.where(inside, value, 0.0)

    def _load_numbers(self, slot: Any, names: Iterable[str]) -> dict[str, Any]:
        """Those of the queries of a tile."""
        self.ready(slot, *names)
        columns = self.plgpu.Layout.WGMMA.reduce(0)
        return {
            name: _compat.mosaic_load(self.scratch[f"{name}_smem"].at[slot], columns)
            for name in names
        }

    def _step(
        self, made: dict[str, Any], of_member: Any, tile: Any, slot: Any, edge: bool
    ) -> Any:
        p, s = self.p, self.scratch
        member, own_bias = of_member
        start = tile * p.block_m
        q, d_out = (s[f"{name}_smem"].at[slot] for name in ("q", "d_out"))
        logits, numbers = made["logits"], {}
        centers_first = p.wants_key and self.centers_first
        if centers_first:
            numbers = self._load_numbers(slot, ["center"])
            self.start_at_center(made["d_weights"], numbers["center"])
        self.ready(slot, "q")
        logits.clear()
        logits.add_product(self.tiles["k"], q.transpose((1, 0)))
        self.ready(slot, "d_out")
        if p.wants_key:
            if not centers_first:
                made["d_weights"].clear()
            made["d_weights"].add_product(self.tiles["v"], d_out.transpose((1, 0)))
        kept = self.kept(self.head + member, start, self.own)
        rest = [name for name in self.numbers if name not in numbers]
        if not self.has_pairs:
            numbers |= self._load_numbers(slot, rest)
        queries = start, self.segment_ids("query", start, p.block_m, 1)
        words = self.mask_words(self.head + member, tile)
        products = logits.load(running=int(p.wants_key))
        pairs = words, slot, own_bias
        stored, slope = self.logits(products, queries, self.keys, pairs, edge)
        if self.has_pairs:
            # After the bias, which takes as many registers.
            numbers |= self._load_numbers(slot, rest)
        weights = self.powers(stored, numbers["rows"], numbers.get("low"), 1)
        d = None
        if p.wants_key:
            d_weights = made["d_weights"].load()
            center = numbers["center"]
            d = self.derivative(weights, d_weights, kept, center, slope, edge)
            # Before, a product was under way.
            weights, d = lax.optimization_barrier((weights, d))
        self.free(slot, *self.numbers)
        if p.wants_value:
            dropped = self.dropped(weights, kept).astype(p.dtype)
            made["d_value"].add_product(dropped, d_out)
        if d is not None:
            made["d_key"].add_product(d.astype(p.dtype), q)
        logits.wait()
        self.free(slot, "q", "d_out")
        return d
