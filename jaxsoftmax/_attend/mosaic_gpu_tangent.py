"""The forward mode of attention as a Mosaic GPU kernel; see `mosaic_gpu_kernel`.

A block owns queries and their tangents, and reads keys, values and the tangents of
both. It computes the logits anew, and with the lse of the forward their probabilities
P: there is no running maximum, and what is added up is not rescaled. The tangents of
the logits, dS, are one sum of up to two products. With ``rates = P (dS - pivot)`` the
tangent of out is the sum of rates times values, and of P times their tangents, less
the sum of the rates, as they are rounded, times out: of values that are alike nothing
is left, whatever the rates are. The pivot of a query is the mean of dS in the first
tile where the query has a probability.

Tensor cores have work while a consumer computes: P beside the products of dS, and rates
beside that of P. (The next products of queries and keys beside those of values as well
were slower on an H200, or spilled registers.) What has no tangent (`Program.moving`) is
neither read nor multiplied.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxsoftmax._attend.mosaic_gpu_kernel import Kernel
from jaxsoftmax._attend.mosaic_gpu_program import (
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


def tangent(p: Program) -> Any:
    """The function that runs the kernel.

    Of the arrays that `arguments` names: query, key, value and their tangents, and
    out and its low digits, with as many places as `copied` says; rows, the lse of each
    query as `mosaic_gpu_backward` has it, and low, with `Program.padded_queries`; the
    tangents of the bias, as `OTHERS` has the bias, and of the sinks. Then of what there
    is of `OTHERS`. It returns the tangent of out, its low digits, and the tangent of
    lse, with `padded_queries`.
    """
    plgpu = _compat.mosaic_gpu()
    places = copied(p.queries, p.block_m)
    out = jax.ShapeDtypeStruct((p.batch, places, p.heads, p.value_size), p.dtype)
    row = jax.ShapeDtypeStruct((p.batch, p.heads, p.padded_queries), np.float32)
    own = p.warpgroups, p.block_m
    names = _own(p)
    scratch = {f"{n}_smem": swizzled((*own, p.size), p.dtype) for n in names}
    scratch["own_ready"] = plgpu.Barrier(
        num_arrivals=len(names), num_barriers=p.warpgroups
    )
    for name in _read(p):
        of_values = name in ("v", "v_dot")
        shape = p.stages, p.block_n, p.value_size if of_values else p.size
        most = p.block_n if of_values else 64
        scratch[f"{name}_smem"] = swizzled(shape, p.dtype, most)
    scratch |= {
        "row_smem": plgpu.SMEM(own, np.dtype(np.float32)),
        "out_ready": plgpu.Barrier(
            num_arrivals=len(_through(p)), num_barriers=p.warpgroups
        ),
        **barriers(p, *_read(p)),
        **bias_scratch(p),
        **(bias_scratch(p, "bias_dot") if "bias" in p.moving else {}),
        **accumulators(p, **_accumulated(p)),
    }
    if p.value_size != p.size:
        scratch["out_smem"] = swizzled((*own, p.value_size), p.dtype)
    return p.kernel(_Tangent, (out, out, row), scratch)


def logits_move(p: Program) -> bool:
    """Whether logits have a tangent, those of keys."""
    return bool({"query", "key", "bias"} & set(p.moving))


def _products_move(p: Program) -> bool:
    return bool({"query", "key"} & set(p.moving))


def _own(p: Program) -> list[str]:
    """What a warpgroup has of its queries."""
    return ["q", "q_dot"] if "query" in p.moving else ["q"]


def _read(p: Program) -> list[str]:
    """What tiles are read of, but for a bias; in the order of their use."""
    found = {
        "k": logits_move(p) or "value" in p.moving,
        "k_dot": "key" in p.moving,
        "v_dot": "value" in p.moving,
        "v": logits_move(p),
    }
    return [name for name, is_read in found.items() if is_read]


def _through(p: Program) -> list[str]:
    """Memory of the size of outputs, by way of which they are read and written."""
    return _own(p) if p.value_size == p.size else ["out"]


def arguments(p: Program) -> list[str]:
    """The arrays before `OTHERS`."""
    found = _own(p) + _read(p) + ["rows"] + ["low"] * p.differs_first
    if logits_move(p) or "sinks" in p.moving:
        found += ["out", "out_low"]
    return found + [f"{name}_dot" for name in ("bias", "sinks") if name in p.moving]


def _accumulated(p: Program) -> dict[str, Any]:
    found = {"logits": (p.shape, None), "out": ((p.block_m, p.value_size), p.shape)}
    return found | ({"moved": (p.shape, None)} if _products_move(p) else {})


class _Tangent(Kernel):
    name = "jaxsoftmax_attention_tangent"

    def __init__(self, p: Program, refs: Any, scratch: dict[str, Any]) -> None:
        names = arguments(p)
        self.arrays = dict(zip(names, refs, strict=False))
        *others, self.d_out, self.d_low, self.d_lse = refs[len(names) :]
        super().__init__(p, others, scratch)
        if "bias" in p.moving:
            self.others["bias_dot"] = self.arrays["bias_dot"]

    def produce(self) -> None:
        copies: dict[str, Any] = {
            name: self.tile_of_keys(self.arrays[name]) for name in _read(self.p)
        }
        if copies and self.p.reads_bias:
            copies["bias"] = self.tile_of_bias
            if "bias" in self.p.moving:
                of_tangent = functools.partial(self.tile_of_bias, name="bias_dot")
                copies["bias_dot"] = of_tangent
        if copies:
            self.load_tiles(copies)

    def consume(self) -> None:
        p, own = self.p, self.pl.ds(self.own, self.p.block_m)
        self.at = self.batch, own, self.head
        self.row_at = self.batch, self.head, own
        self.tiles = {n: self.load_own(self.arrays[n], n, self.at) for n in _own(p)}
        self.queries = self.own, self.segment_ids("query", self.own, p.block_m, 0)
        self.bias_of_own = self.own_bias(self.head)
        self.bias_dot_of_own = None
        if "bias" in p.moving:
            self.bias_dot_of_own = self.own_bias(self.head, "bias_dot")
        self.plgpu.barrier_wait(self.scratch["own_ready"].at[self.warpgroup])
        shapes = _accumulated(p)

        def attend(*made: Any) -> None:
            self._attend(dict(zip(shapes, made, strict=True)))

        self.with_accumulators(attend, **shapes)

    def _numbers(self, name: str) -> Any:
        """[block_m] of the queries; None if there are none."""
        if name not in self.arrays:
            return None
        return _compat.mosaic_load(self.arrays[name].at[self.row_at], self.rows)

    def _attend(self, made: dict[str, Any]) -> None:
        p = self.p
        zeros = jnp.zeros((p.block_m,), jnp.float32)
        carry = (self.plgpu.layout_cast(zeros, self.rows),) * 4
        if _read(p):
            self.numbers = self._numbers("rows"), self._numbers("low")
            step = functools.partial(self._step, made)
            carry = self.over_tiles(step, carry, self.range.begin)
        sums = made["out"].load()
        self._store(sums, *carry)

    def _slot(self, tile: Any) -> Any:
        return lax.rem(tile - self.range.begin, jnp.int32(self.p.stages))

    def _step(self, made: dict[str, Any], tile: Any, carry: Any, edge: bool) -> Any:
        p = self.p
        slot, start = self._slot(tile), tile * p.block_n
        read = {n: self.scratch[f"{n}_smem"].at[slot] for n in _read(p)}
        logits, out = made["logits"], made["out"]
        self.ready(slot, "k")
        logits.clear()
        logits.add_product(self.tiles["q"], read["k"].transpose((1, 0)))
        running = self._move(made, read, slot)
        keys = start, self.segment_ids("key", start, p.block_n, 1)
        words = self.mask_words(self.head, tile)
        products = logits.load(running=running)
        pairs = words, slot, self.bias_of_own
        stored, slope = self.logits(products, self.queries, keys, pairs, edge)
        weights = self.powers(stored, *self.numbers)
        if "value" in p.moving:
            self.ready(slot, "v_dot")
            out.add_product(weights.astype(p.dtype), read["v_dot"])
        of_keys = [name for name in read if name in ("k", "k_dot")]
        of_values = [name for name in read if name not in of_keys]
        if logits_move(p):
            t, factor = self._tangents(made, slot, slope)
            self.free(slot, *of_keys)
            if edge or p.segments or p.mask is not None or p.bias is not None:
                t = jnp.where(weights == 0.0, 0.0, t)
            carry, rates = self._rates(carry, weights, t, factor)
            self.ready(slot, "v")
            out.add_product(rates, read["v"])
        else:
            self.free(slot, *of_keys)
        out.wait()
        self.free(slot, *of_values)
        return carry

    def _move(self, made: dict[str, Any], read: dict[str, Any], slot: Any) -> int:
        """Starts the products of the logits' tangents; gives how many there are."""
        p = self.p
        if not _products_move(p):
            return 0
        moved = made["moved"]
        moved.clear()
        if "query" in p.moving:
            moved.add_product(self.tiles["q_dot"], read["k"].transpose((1, 0)))
        if "key" in p.moving:
            self.ready(slot, "k_dot")
            moved.add_product(self.tiles["q"], read["k_dot"].transpose((1, 0)))
        return ("query" in p.moving) + ("key" in p.moving)

    def _tangents(
        self, made: dict[str, Any], slot: Any, slope: Any
    ) -> tuple[Any, float]:
        """A tile of the logits' tangents, but for the factor that is left."""
        p, t, factor = self.p, None, 1.0
        if _products_move(p):
            t, factor = made["moved"].load(running=int("value" in p.moving)), p.scale
        if "bias" in p.moving:
            products, factor = t, 1.0

            def added(bias_dot: Any) -> Any:
                return bias_dot if products is None else products * p.scale + bias_dot

            t = self.of_bias(added, slot, self.bias_dot_of_own, "bias_dot")
        if slope is not None:
            t, factor = t * slope, -4.0 * factor
        return t, factor

    def _rates(self, carry: Any, weights: Any, t: Any, factor: float) -> Any:
        """The carry after a tile, and its rates as they are multiplied."""
        mass, moment, shift, pivot = carry
        part = jnp.sum(weights, axis=1)
        part_moment = jnp.sum(weights * t, axis=1) * factor
        mean = part_moment / jnp.where(part == 0.0, 1.0, part)
        pivot = jnp.where(mass == 0.0, mean, pivot)
        rates = weights * (t * factor - self.over(pivot, t))
        # Two are converted at once, if the compiler does not see each one used.
        rounded = lax.optimization_barrier(rates.astype(self.p.dtype))
        wide = registers.widened(rounded)
        shift = shift + jnp.sum(wide, axis=1)
        return (mass + part, moment + part_moment, shift, pivot), rounded

    def _sinks(self) -> tuple[Any, Any]:
        """What the queries have of the sink, and its tangent."""
        p, rows, low = self.p, self._numbers("rows"), self._numbers("low")
        sink = self.others["sinks"][self.head]
        power = sink * LOG2E - rows
        if p.differs_first:
            power = (sink - rows) * LOG2E - low
        t = self.arrays["sinks_dot"][self.head] if "sinks" in p.moving else 0.0
        return jnp.exp2(power), t

    def _store(self, sums: Any, mass: Any, moment: Any, shift: Any, pivot: Any) -> None:
        p, w = self.p, self.warpgroup
        if p.query_lengths:
            place = self.plgpu.broadcasted_iota(
                jnp.int32, (p.block_m,), 0, layout=self.rows
            )
            inside = place < self.query_length - self.own
            mass, moment, shift, pivot = (
                jnp.where(inside, a, 0.0) for a in (mass, moment, shift, pivot)
            )
            sums = jnp.where(self.over(inside, sums), sums, 0.0)
        if p.sinks:
            weight, t = self._sinks()
            mass = mass + weight
            moment = moment + jnp.where(weight == 0.0, 0.0, weight * t)
            shift = shift + jnp.where(weight == 0.0, 0.0, weight * (t - pivot))
        if logits_move(p):
            moment = moment / jnp.where(mass == 0.0, 1.0, mass)
        wide = sums
        tiles = [self.scratch[f"{name}_smem"].at[w] for name in _through(p)]
        if "out" in self.arrays:
            for part in self._output(tiles):
                wide = wide - part.astype(jnp.float32) * self.over(shift, sums)
        rounded = wide.astype(p.dtype)
        low = (wide - rounded.astype(jnp.float32)).astype(p.dtype)
        row = self.scratch["row_smem"].at[w]
        first = [(rounded, tiles[0], self.d_out.at[self.at])]
        others = [(low, tiles[-1], self.d_low.at[self.at])]
        others.append((moment, row, self.d_lse.at[self.row_at]))
        for together in [first + others] if len(tiles) > 1 else [first, others]:
            self.store_all(together)

    def _output(self, tiles: list[Any]) -> Iterator[Any]:
        """That of the forward in two parts, by way of tiles that nothing else uses."""
        ready = self.scratch["out_ready"].at[self.warpgroup]
        names = ["out", "out_low"]
        for i in range(0, len(names), len(tiles)):
            self.plgpu.commit_smem()  # all of the warpgroup have read what was there
            for name, tile in zip(names[i:], tiles, strict=False):
                ref = self.arrays[name].at[self.at]
                self.plgpu.copy_gmem_to_smem(ref, tile, ready)
            self.plgpu.barrier_wait(ready)
            layout = self.plgpu.Layout.WGMMA
            for tile in tiles:
                yield _compat.mosaic_load(tile, layout, optimized=True)
