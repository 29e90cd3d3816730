"""Attention in jax.numpy, block by block: no array of queries x keys.

A block is some queries and some keys, of all batch entries and heads. The forward goes
through the blocks with a running maximum and sum for each query (online softmax, arXiv
1805.02867); the backward and the forward mode compute the logits of a block again and
have the probabilities from the log-sum-exp (FlashAttention, arXiv 2205.14135). Blocks
that ``causal`` or a window leaves empty are not in the list of blocks; blocks beyond
all lengths are skipped in the loop.

In this module queries and results are [B, K, G, T, ...], keys and values
[B, K, S, ...].
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxsoftmax._attend.call import (
    AttentionCall,
    Config,
    Inputs,
    Result,
    both,
    in_reach,
    low_digits,
    rounded_to,
    sum_in_two,
    with_low_digits,
)
from jaxsoftmax._compat import trace
from jaxsoftmax._core.device import Device
from jaxsoftmax._core.shapes import is_known
from jaxsoftmax._rows.xla import working_dtype

# The most queries and keys in a block.
QUERY_BLOCK = 2048
KEY_BLOCK = 8192
_LEAST_BLOCK = 128
# The logits that are computed at once. On a CPU they fit its caches; a GPU wants
# kernels that run longer than their launch.
BLOCK_ENTRIES = {"cpu": 2**20}
BLOCK_ENTRIES_ELSEWHERE = 2**26


def refusal(call: AttentionCall, device: Device) -> str | None:
    """It runs everything, everywhere."""
    return None


# --- blocks ---------------------------------------------------------------------------


def _power_of_two(most: float) -> int:
    """The largest power of two up to `most`, and at least the least block."""
    return max(_LEAST_BLOCK, 2 ** math.floor(math.log2(max(most, 1))))


def _even_blocks(length: int, most: int) -> int:
    """The size of a block: as many as are needed, of nearly the same size."""
    if length <= most:
        return length  # also of an empty array
    size = -(-length // -(-length // most))
    return min(length, -(-size // 16) * 16)


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """How queries and keys are cut; what is in a block is sliced by its methods.

    Where the size does not divide the length, the last block starts early: what it has
    in common with the one before is masked in it. A length that is symbolic, as in a
    program for `jax.export`, is one block.
    """

    config: Config
    rows: int  # batch entries and heads
    queries: int
    keys: int

    @property
    def query_block(self) -> int:
        if not is_known([self.queries]):
            return self.queries
        each = self.config.block_entries / max(self.rows, 1)
        most = min(QUERY_BLOCK, _power_of_two(math.sqrt(each)))
        return _even_blocks(self.queries, most)

    @property
    def key_block(self) -> int:
        if not is_known([self.keys]):
            return self.keys
        each = self.config.block_entries / max(self.rows, 1)
        most = math.sqrt(each)
        if is_known([self.queries]):  # few queries leave room for more keys
            most = min(most, self.queries)
        most = min(KEY_BLOCK, _power_of_two(each / max(most, 1)))
        return _even_blocks(self.keys, most)

    @property
    def whole_queries(self) -> bool:
        """Whether they are all in one block."""
        return self.query_block == self.queries

    @property
    def whole_keys(self) -> bool:
        return self.key_block == self.keys

    def pairs(self) -> np.ndarray:
        """[count, 2]: the blocks with something in them, by queries, then by keys."""
        bq, bk = self.query_block, self.key_block
        if 0 in (bq, bk):
            return np.zeros((0, 2), np.int32)
        if not is_known([bq, bk]):
            count = 1 if self.whole_queries else -(-self.queries // bq)
            count *= 1 if self.whole_keys else -(-self.keys // bk)
            each = np.arange(count, dtype=np.int32)
            return np.stack(
                [each * (not self.whole_queries), each * (not self.whole_keys)], axis=1
            )
        left, right = self.config.reach
        i, j = np.meshgrid(
            np.arange(-(-self.queries // bq)),
            np.arange(-(-self.keys // bk)),
            indexing="ij",
        )
        last_query = np.minimum((i + 1) * bq, self.queries) - 1
        last_key = np.minimum((j + 1) * bk, self.keys) - 1
        near = (j * bk <= last_query + right) & (last_key >= i * bq - left)
        return np.stack([i[near], j[near]], axis=1).astype(np.int32)

    def first_query(self, pair: jax.Array) -> jax.Array:
        """The first query that no earlier block has."""
        return jnp.int32(0) if self.whole_queries else pair[0] * self.query_block

    def first_key(self, pair: jax.Array) -> jax.Array:
        return jnp.int32(0) if self.whole_keys else pair[1] * self.key_block

    def query_start(self, pair: jax.Array) -> jax.Array:
        first = self.first_query(pair)
        if self.whole_queries:
            return first
        return jnp.minimum(first, self.queries - self.query_block)

    def key_start(self, pair: jax.Array) -> jax.Array:
        first = self.first_key(pair)
        return (
            first if self.whole_keys else jnp.minimum(first, self.keys - self.key_block)
        )

    def slice_queries(self, x: jax.Array, pair: jax.Array, axis: int) -> jax.Array:
        if self.whole_queries:
            return x
        return lax.dynamic_slice_in_dim(
            x, self.query_start(pair), self.query_block, axis
        )

    def slice_keys(self, x: jax.Array, pair: jax.Array, axis: int) -> jax.Array:
        if self.whole_keys:
            return x
        return lax.dynamic_slice_in_dim(x, self.key_start(pair), self.key_block, axis)

    def with_queries(
        self, x: jax.Array, part: jax.Array, pair: jax.Array, axis: int
    ) -> jax.Array:
        """`x` with `part` in the place of the block's queries."""
        if self.whole_queries:
            return part
        start = self.query_start(pair)
        return lax.dynamic_update_slice_in_dim(x, part, start, axis)

    def slice_pairs(self, x: jax.Array, pair: jax.Array) -> jax.Array:
        """The block of an array whose last dimensions are [T or 1, S or 1]."""
        if x.shape[-2] != 1:
            x = self.slice_queries(x, pair, x.ndim - 2)
        return x if x.shape[-1] == 1 else self.slice_keys(x, pair, x.ndim - 1)

    def places(self, pair: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The places of the block's queries and keys in their sequences."""
        queries = jnp.arange(self.query_block, dtype=jnp.int32)
        keys = jnp.arange(self.key_block, dtype=jnp.int32)
        return queries + self.query_start(pair), keys + self.key_start(pair)

    def owned(self, pair: jax.Array) -> jax.Array | None:
        """[queries, keys]: pairs that no earlier block has; None if that is all."""
        query_places, key_places = self.places(pair)
        owned = None
        if not self.whole_queries and self.queries % self.query_block:
            owned = (query_places >= self.first_query(pair))[:, None]
        if not self.whole_keys and self.keys % self.key_block:
            new = (key_places >= self.first_key(pair))[None, :]
            owned = new if owned is None else owned & new
        return owned


def _loop(
    blocks: _Blocks,
    x: Inputs,
    carry: Any,
    step: Callable[[Any, jax.Array], Any],
    *,
    skip: bool = True,
) -> Any:
    """`step` for each block, in order; blocks beyond all lengths are skipped."""
    pairs = blocks.pairs()
    if not len(pairs):
        return carry
    if len(pairs) == 1:
        return step(carry, jnp.asarray(pairs[0]))
    lengths = x.query_lengths is not None or x.key_lengths is not None

    def within(pair: jax.Array) -> jax.Array:
        inside = jnp.ones((x.query.shape[0],), bool)
        if x.query_lengths is not None:
            inside &= x.query_lengths > blocks.first_query(pair)
        if x.key_lengths is not None:
            inside &= x.key_lengths > blocks.first_key(pair)
        return jnp.any(inside)

    def body(carry: Any, pair: jax.Array) -> tuple[Any, None]:
        if skip and lengths:
            return lax.cond(within(pair), step, lambda c, _: c, carry, pair), None
        return step(carry, pair), None

    return lax.scan(body, carry, jnp.asarray(pairs))[0]


# --- layouts --------------------------------------------------------------------------


def _heads_of(x: Inputs) -> tuple[int, int]:
    """K and G."""
    kv_heads = x.key.shape[2]
    return kv_heads, x.query.shape[2] // kv_heads


def _by_head(x: Inputs, array: jax.Array) -> jax.Array:
    """[B, T, N, ...] as [B, K, G, T, ...]."""
    batch, queries, _, *rest = array.shape
    grouped = array.reshape(batch, queries, *_heads_of(x), *rest)
    return jnp.moveaxis(grouped, 1, 3)


def _by_place(array: jax.Array) -> jax.Array:
    """[B, K, G, T, ...] as [B, T, N, ...]."""
    batch, kv_heads, group, queries, *rest = array.shape
    moved = jnp.moveaxis(array, 3, 1)
    return moved.reshape(batch, queries, kv_heads * group, *rest)


def _pairs_by_head(x: Inputs, array: jax.Array | None) -> jax.Array | None:
    """[B, N, T, S] as [B, K, G, T, S], each dimension in full or 1."""
    if array is None:
        return None
    batch, heads, *rest = array.shape
    kv_heads, group = (1, 1) if heads == 1 else _heads_of(x)
    return array.reshape(batch, kv_heads, group, *rest)


def _within_lengths(array: jax.Array, lengths: jax.Array | None) -> jax.Array:
    """[B, places, ...] with 0 beyond the lengths, whatever is there."""
    if lengths is None:
        return array
    places = jnp.arange(array.shape[1], dtype=jnp.int32)
    inside = places[None, :] < lengths[:, None]
    inside = inside.reshape(inside.shape + (1,) * (array.ndim - 2))
    return jnp.where(inside, array, jnp.zeros((), array.dtype))


def _queries_by_head(x: Inputs, array: jax.Array) -> jax.Array:
    """The queries, or what is like them, as blocks have them; 0 beyond the lengths."""
    return _by_head(x, _within_lengths(array, x.query_lengths))


def _keys_by_head(x: Inputs, array: jax.Array) -> jax.Array:
    """Keys or values as blocks have them; 0 beyond the lengths."""
    return jnp.swapaxes(_within_lengths(array, x.key_lengths), 1, 2)


class _Lse(NamedTuple):
    """The log-sum-exp in two numbers, [B, K, G, T]: `low` is what rounding took off.

    `high` of a query that sees nothing is 0: any finite number will do.
    """

    high: jax.Array
    low: jax.Array


def _lse_by_head(x: Inputs, result: Result) -> _Lse:
    high = jnp.where(result.lse == -jnp.inf, 0.0, result.lse)
    # Derivatives are those of `high`: as of `Result`.
    low = lax.stop_gradient(result.lse_low)
    return _Lse(_by_head(x, high), _by_head(x, low))


@dataclasses.dataclass(frozen=True)
class _Prepared:
    """A call's arrays by head, and what follows from them for a block."""

    config: Config
    x: Inputs
    blocks: _Blocks
    query: jax.Array
    key: jax.Array
    value: jax.Array
    bias: jax.Array | None
    mask: jax.Array | None
    scale: jax.Array | None

    def einsum(self, equation: str, *operands: jax.Array) -> jax.Array:
        return jnp.einsum(
            equation,
            *operands,
            precision=self.config.precision,
            preferred_element_type=working_dtype(operands[0].dtype),
        )

    def products(self, pair: jax.Array) -> jax.Array:
        """The block's products of queries and keys: [B, K, G, queries, keys]."""
        q = self.blocks.slice_queries(self.query, pair, 3)
        k = self.blocks.slice_keys(self.key, pair, 2)
        return self.einsum("bkgqh,bksh->bkgqs", q, k)

    def scaled(self, s: jax.Array, pair: jax.Array) -> jax.Array:
        """`s` of the block, by the number and by the array that scale the logits."""
        s = s * self.config.scale
        if self.scale is not None:
            s = s * self.blocks.slice_pairs(self.scale, pair).astype(s.dtype)
        return s

    def raw(self, pair: jax.Array) -> jax.Array:
        """The block's logits before the cap: [B, K, G, queries, keys]."""
        s = self.scaled(self.products(pair), pair)
        if self.bias is not None:
            bias = self.blocks.slice_pairs(self.bias, pair).astype(s.dtype)
            # The product of a hidden pair may be NaN.
            s = jnp.where(bias == -jnp.inf, -jnp.inf, s + bias)
        return s

    def capped(self, s: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """The logits, and what the cap multiplies their derivative with."""
        cap = self.config.softcap
        if cap is None:
            return s, None
        t = jnp.tanh(s / cap)
        return jnp.where(s == -jnp.inf, -jnp.inf, cap * t), 1 - t * t

    def visible(self, pair: jax.Array) -> jax.Array | None:
        """The mask of the block: which query sees which key; None for all."""
        x, blocks = self.x, self.blocks
        query_places, key_places = blocks.places(pair)
        visible = both(
            blocks.owned(pair),
            in_reach(self.config, query_places, key_places),
        )
        if self.mask is not None:
            visible = both(visible, blocks.slice_pairs(self.mask, pair))

        def over_heads(a: jax.Array) -> jax.Array:
            return a[:, None, None, :, :]

        if x.query_lengths is not None:
            inside = query_places[None, :] < x.query_lengths[:, None]
            visible = both(visible, over_heads(inside[:, :, None]))
        if x.key_lengths is not None:
            inside = key_places[None, :] < x.key_lengths[:, None]
            visible = both(visible, over_heads(inside[:, None, :]))
        if x.query_segments is not None:
            query_ids = blocks.slice_queries(x.query_segments, pair, 1)
            key_ids = blocks.slice_keys(x.key_segments, pair, 1)
            same = query_ids[:, :, None] == key_ids[:, None, :]
            visible = both(visible, over_heads(same))
        return visible

    def dropout_factors(self, pair: jax.Array) -> jax.Array | None:
        """What dropout multiplies the block's probabilities with, or None."""
        rate = self.config.dropout_rate
        if not rate:
            return None
        keep = _dropout_mask(self.config, self.x, *self.blocks.places(pair))
        return jnp.where(keep, 1 / (1 - rate), 0.0).astype(
            working_dtype(self.query.dtype)
        )

    def probabilities(
        self, pair: jax.Array, lse: _Lse
    ) -> tuple[jax.Array, jax.Array | None]:
        """P of the block, and the slope of the cap."""
        s, slope = self.capped(self.raw(pair))
        high, low = (self.blocks.slice_queries(part, pair, 3) for part in lse)
        exponents = (s - high[..., None]) - low[..., None]
        visible = self.visible(pair)
        if visible is not None:
            exponents = jnp.where(visible, exponents, -jnp.inf)
        return jnp.exp(exponents), slope


def _rows_and_lengths(x: Inputs) -> tuple[int, int, int]:
    batch, queries, heads, _ = x.query.shape
    # A batch that is symbolic counts as one entry.
    rows = batch * heads if is_known([batch]) else heads
    return rows, queries, x.key.shape[1]


def _seen_keys(config: Config, x: Inputs) -> jax.Array | None:
    """[B or 1, K or 1, S]: those that some query may see, as far as that is free.

    From masks and biases that are the same for all queries, and from the place.
    """
    given = [(x.mask, None), (x.bias, -jnp.inf)]
    found = []
    for array, hidden in given:
        if array is not None and array.shape[2] == 1 and array.shape[3] != 1:
            by_head = _pairs_by_head(x, array)
            assert by_head is not None
            seen = by_head if hidden is None else by_head != hidden
            found.append(jnp.any(seen, axis=(2, 3)))
    queries, keys = x.query.shape[1], x.key.shape[1]
    _, right = config.reach
    if right < math.inf and is_known([queries, keys]) and queries + right < keys:
        places = jnp.arange(keys, dtype=jnp.int32)
        found.append((places < queries + int(right)).reshape(1, 1, -1))
    return both(*found)


def _prepare(config: Config, x: Inputs) -> _Prepared:
    key, value = _keys_by_head(x, x.key), _keys_by_head(x, x.value)
    seen = _seen_keys(config, x)
    if seen is not None:
        key, value = (
            jnp.where(seen[..., None], a, jnp.zeros((), a.dtype)) for a in (key, value)
        )
    return _Prepared(
        config,
        x,
        _Blocks(config, *_rows_and_lengths(x)),
        _queries_by_head(x, x.query),
        key,
        value,
        _pairs_by_head(x, x.bias),
        _pairs_by_head(x, x.mask),
        _pairs_by_head(x, x.scale),
    )


# --- dropout --------------------------------------------------------------------------


def _dropout_mask(
    config: Config, x: Inputs, query_places: jax.Array, key_places: jax.Array
) -> jax.Array:
    """Where dropout keeps a block: [B or 1, K or 1, G or 1, queries, keys].

    Entry i of ``jax.random.bernoulli(key, 1 - rate, shape)`` depends on the key and on
    i alone (with jax_threefry_partitionable, jax's default). So a block's entries of
    that mask can be computed without the others.
    """
    batch, queries, heads, _ = x.query.shape
    keys = x.key.shape[1]
    per_entry, per_head = config.dropout_dims
    entries, own_heads = batch if per_entry else 1, heads if per_head else 1
    kv_heads, group = _heads_of(x) if per_head else (1, 1)
    lead = jnp.arange(entries * own_heads, dtype=jnp.uint32)
    lead = lead.reshape(entries, kv_heads, group, 1, 1)
    slice_queries = query_places.astype(jnp.uint32).reshape(1, 1, 1, -1, 1)
    row = lead * _unsigned(queries) + slice_queries
    high, low = _product(row, keys)
    index = low + key_places.astype(jnp.uint32).reshape(1, 1, 1, 1, -1)
    high = high + (index < low).astype(jnp.uint32)
    # The larger half of a float32 in [1, 2) is what bernoulli compares.
    bits = trace.threefry(x.dropout_key, high, index) >> np.uint32(9)
    ones = np.float32(1).view(np.uint32)
    uniform = lax.bitcast_convert_type(bits | ones, jnp.float32) - np.float32(1)
    return uniform < np.float32(1 - config.dropout_rate)


def _unsigned(size: int) -> Any:
    """A size, which may be symbolic, in 32 bits."""
    return np.uint32(size) if is_known([size]) else jnp.asarray(size).astype(jnp.uint32)


def _product(a: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """The upper and the lower 32 bits of a product of 32 bits each."""
    b = _unsigned(size)
    b_low, b_high = b & np.uint32(0xFFFF), b >> np.uint32(16)
    a_low, a_high = a & np.uint32(0xFFFF), a >> np.uint32(16)
    middle = a_high * b_low + ((a_low * b_low) >> np.uint32(16))
    carried = (middle & np.uint32(0xFFFF)) + a_low * b_high
    high = a_high * b_high + (middle >> np.uint32(16)) + (carried >> np.uint32(16))
    return high, a * b


# --- the forward ----------------------------------------------------------------------


def attention(config: Config, x: Inputs, *, definition: bool = False) -> Result:
    """Out and lse, each with its low digits."""
    p = _prepare(config, x)
    blocks, dtype = p.blocks, working_dtype(x.query.dtype)
    rows = p.query.shape[:-1]
    like = jax.tree.leaves(x)
    if x.sinks is None:
        top = trace.zeros(rows, dtype, *like) - jnp.inf
        total = trace.zeros(rows, dtype, *like)
    else:
        sinks = x.sinks.astype(dtype).reshape(1, *_heads_of(x), 1)
        top = trace.zeros(rows, dtype, *like) + sinks
        total = trace.zeros(rows, dtype, *like) + jnp.where(sinks == -jnp.inf, 0, 1)
    rounds = p.value.dtype.itemsize < dtype.itemsize
    # With weights that are rounded, their own sum: then `out` is a mean of values.
    weight = total if rounds else None
    sums = trace.zeros((*rows, p.value.shape[-1]), dtype, *like)

    def step(carry: Any, pair: jax.Array) -> Any:
        old_top, old_total, old_weight, old_sums = jax.tree.map(
            lambda a: blocks.slice_queries(a, pair, 3), carry
        )
        s, _ = p.capped(p.raw(pair))
        visible = p.visible(pair)
        if visible is not None:
            s = jnp.where(visible, s, -jnp.inf)
        new_top = jnp.maximum(old_top, jnp.max(s, axis=-1))
        # Any number will do for a query that has seen nothing yet.
        m = jnp.where(new_top == -jnp.inf, 0.0, new_top)
        e = jnp.exp(s - m[..., None])
        before = jnp.exp(old_top - m)
        new_total = old_total * before + jnp.sum(e, axis=-1)
        new_weight = None
        if old_weight is not None:
            e = rounded_to(p.value.dtype, e)
            new_weight = old_weight * before + jnp.sum(e, axis=-1)
        factors = p.dropout_factors(pair)
        weights = (e if factors is None else e * factors).astype(p.value.dtype)
        v = blocks.slice_keys(p.value, pair, 2)
        product = p.einsum("bkgqs,bksv->bkgqv", weights, v)
        new_sums = old_sums * before[..., None] + product
        new = (new_top, new_total, new_weight, new_sums)
        return jax.tree.map(lambda a, b: blocks.with_queries(a, b, pair, 3), carry, new)

    start = (top, total, weight, sums)
    top, total, weight, sums = _loop(blocks, x, start, step, skip=not definition)
    divisor = total if weight is None else weight
    out = sums / jnp.where(divisor == 0, 1.0, divisor)[..., None]
    # 0 keys seen: -inf. The sum is at least 1, or NaN.
    empty = top == -jnp.inf
    lse, lse_low = sum_in_two(
        jnp.where(empty, 0.0, top), jnp.log(jnp.where(empty, 1.0, total))
    )
    lse = jnp.where(empty, -jnp.inf, lse)
    lse = jnp.where(jnp.isnan(total), total, lse)
    rounded, low = low_digits(_by_place(out), x.query.dtype)
    return Result(rounded, low, _by_place(lse), _by_place(lse_low))


# --- what derivatives are made of -----------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Sum:
    """An array that blocks are added up in.

    Attributes:
      shape: Of the array.
      queries, keys: The axes that a block has a part of, or None.
    """

    shape: tuple[int, ...]
    queries: int | None = None
    keys: int | None = None

    def add(
        self, blocks: _Blocks, total: jax.Array, part: jax.Array, pair: jax.Array
    ) -> jax.Array:
        if part.shape == total.shape:
            return total + part
        starts = [jnp.int32(0)] * total.ndim
        if self.queries is not None:
            starts[self.queries] = blocks.query_start(pair)
        if self.keys is not None:
            starts[self.keys] = blocks.key_start(pair)
        before = lax.dynamic_slice(total, starts, part.shape)
        return lax.dynamic_update_slice(total, before + part, starts)


def _add_up(
    p: _Prepared,
    sums: dict[str, _Sum],
    parts: Callable[[jax.Array], dict[str, jax.Array]],
    like: Sequence[Any],
    *,
    definition: bool,
) -> dict[str, jax.Array]:
    """The sums of all blocks' parts, in at least float32.

    As a definition, it can be differentiated, and what jax then keeps of a block are
    its operands, which all blocks share.
    """
    dtype = working_dtype(p.query.dtype)
    block_parts = jax.checkpoint(parts) if definition else parts

    def step(carry: dict[str, jax.Array], pair: jax.Array) -> dict[str, jax.Array]:
        found = block_parts(pair)
        return {
            name: each.add(p.blocks, carry[name], found[name], pair)
            for name, each in sums.items()
        }

    zeros = {name: trace.zeros(each.shape, dtype, *like) for name, each in sums.items()}
    return _loop(p.blocks, p.x, zeros, step, skip=not definition)


def _summed_to(part: jax.Array, shape: Sequence[int]) -> jax.Array:
    """`part` added up over the axes that are 1 in `shape`."""
    axes = [i for i, size in enumerate(shape) if size == 1 and part.shape[i] != 1]
    return jnp.sum(part, axis=axes, keepdims=True) if axes else part


# --- the backward ---------------------------------------------------------------------


def _gradient_sums(p: _Prepared) -> dict[str, _Sum]:
    """The gradients of what `config` wants, as sums over blocks."""
    sums = {
        "query": _Sum(p.query.shape, queries=3),
        "key": _Sum(p.key.shape, keys=2),
        "value": _Sum(p.value.shape, keys=2),
    }
    for name, array in (("bias", p.bias), ("scale", p.scale)):
        if array is not None:
            full = tuple(array.shape)
            sums[name] = _Sum(
                full,
                queries=None if full[3] == 1 else 3,
                keys=None if full[4] == 1 else 4,
            )
    return {name: each for name, each in sums.items() if name in p.config.wanted}


def attention_gradient(
    config: Config,
    x: Inputs,
    result: Result,
    cotangent: Result,
    *,
    definition: bool = False,
) -> dict[str, jax.Array]:
    """The gradients of what `config` wants, by name.

    ``dS = P (dP - D)``, where dP = dO V^T, and D = sum(dO O) - d lse of a query is what
    sum(P dP) is, to the digits of `result.low`.
    """
    # The logits of a query that sees nothing have the derivative 0, and the query adds
    # nothing to the gradients of keys, whatever it contains.
    x = x._replace(query=_of_queries_with_keys(result, x.query))
    p = _prepare(config, x)
    blocks = p.blocks
    d_out, d = cotangent_and_center(x, result, cotangent)
    center_by_head = _by_head(x, d)
    lse = _lse_by_head(x, result)
    d_out_by_head = _by_head(x, d_out.astype(x.query.dtype))

    like = (*jax.tree.leaves(x), *jax.tree.leaves(cotangent))
    sums = _gradient_sums(p)

    def parts(pair: jax.Array) -> dict[str, jax.Array]:
        found = {}
        probabilities, slope = p.probabilities(pair, lse)
        factors = p.dropout_factors(pair)
        d_o = blocks.slice_queries(d_out_by_head, pair, 3)
        if "value" in sums:
            weights = probabilities if factors is None else probabilities * factors
            weights = weights.astype(p.value.dtype)
            found["value"] = p.einsum("bkgqs,bkgqv->bksv", weights, d_o)
        if sums.keys() <= {"value"}:
            return found
        v = blocks.slice_keys(p.value, pair, 2)
        d_p = p.einsum("bkgqv,bksv->bkgqs", d_o, v)
        if factors is not None:
            d_p = d_p * factors
        center = blocks.slice_queries(center_by_head, pair, 3)[..., None]
        d_s = probabilities * (d_p - center)
        if slope is not None:
            d_s = d_s * slope
        # A probability of 0 has the derivative 0, whatever the values there are.
        d_s = jnp.where(probabilities == 0, 0.0, d_s)
        if "bias" in sums:
            assert p.bias is not None
            found["bias"] = _summed_to(d_s, p.bias.shape)
        if "scale" in sums:
            assert p.scale is not None
            terms = jnp.where(d_s == 0, 0.0, d_s * p.products(pair) * config.scale)
            found["scale"] = _summed_to(terms, p.scale.shape)
        # A scale of what is hidden has no influence either.
        d_products = p.scaled(d_s, pair)
        if p.scale is not None:
            d_products = jnp.where(d_s == 0, 0.0, d_products)
        d_s = d_products.astype(x.query.dtype)
        if "query" in sums:
            k = blocks.slice_keys(p.key, pair, 2)
            found["query"] = p.einsum("bkgqs,bksh->bkgqh", d_s, k)
        if "key" in sums:
            q = blocks.slice_queries(p.query, pair, 3)
            found["key"] = p.einsum("bkgqs,bkgqh->bksh", d_s, q)
        return found

    found = _add_up(p, sums, parts, like, definition=definition)
    gradients = {}
    if "query" in found:
        gradients["query"] = _by_place(found["query"])
    for name in ("key", "value"):
        if name in found:
            gradients[name] = jnp.swapaxes(found[name], 1, 2)
    for name in ("bias", "scale"):
        if name in found:
            gradients[name] = found[name].reshape(getattr(x, name).shape)
    if x.sinks is not None and "sinks" in config.wanted:
        gradients["sinks"] = gradient_of_sinks(x, result, d)
    return {
        name: gradient.astype(getattr(x, name).dtype)
        for name, gradient in gradients.items()
    }


def cotangent_and_center(
    x: Inputs, result: Result, cotangent: Result
) -> tuple[jax.Array, jax.Array]:
    """dO, in at least float32, 0 of a query that sees nothing, and D [B, T, N]."""
    d_out = cotangent.out.astype(working_dtype(cotangent.out.dtype))
    d_out = _within_lengths(d_out, x.query_lengths)
    d_out = _of_queries_with_keys(result, d_out)
    out = with_low_digits(result.out, result.low)
    return d_out, jnp.sum(d_out * out, axis=-1) - cotangent.lse


def _of_queries_with_keys(result: Result, array: jax.Array) -> jax.Array:
    """[B, T, N, ...] with 0 of a query that sees nothing, whatever is there."""
    empty = (result.lse == -jnp.inf)[..., None]
    return jnp.where(empty, jnp.zeros((), array.dtype), array)


def gradient_of_sinks(x: Inputs, result: Result, center: jax.Array) -> jax.Array:
    """[N], given D [B, T, N]."""
    probabilities = _sink_probabilities(x, _lse_by_head(x, result))
    each = jnp.where(probabilities == 0, 0.0, -probabilities * _by_head(x, center))
    return jnp.sum(each, axis=(0, 3)).reshape(-1)


def _sink_probabilities(x: Inputs, lse: _Lse) -> jax.Array:
    """What the sinks have of the rows: [B, K, G, T]."""
    sinks = x.sinks.astype(lse.high.dtype).reshape(1, *_heads_of(x), 1)
    return jnp.exp((sinks - lse.high) - lse.low)


# --- forward mode ---------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Tangents:
    """A call's tangents by head, in the working dtype; None where there is none."""

    p: _Prepared
    lse: _Lse
    query: jax.Array | None
    key: jax.Array | None
    value: jax.Array | None
    bias: jax.Array | None
    scale: jax.Array | None

    @property
    def reach_logits(self) -> bool:
        """Whether the logits have a tangent."""
        moving = (self.query, self.key, self.bias, self.scale)
        return any(a is not None for a in moving)

    def logits(self, pair: jax.Array, slope: jax.Array | None) -> jax.Array:
        """The tangent of the block's logits, given the slope of the cap."""
        p, blocks = self.p, self.p.blocks
        wide = working_dtype(p.query.dtype)
        terms = []
        if self.query is not None:
            a = blocks.slice_queries(self.query, pair, 3)
            b = blocks.slice_keys(p.key, pair, 2).astype(wide)
            terms.append(p.scaled(p.einsum("bkgqh,bksh->bkgqs", a, b), pair))
        if self.key is not None:
            a = blocks.slice_queries(p.query, pair, 3).astype(wide)
            b = blocks.slice_keys(self.key, pair, 2)
            terms.append(p.scaled(p.einsum("bkgqh,bksh->bkgqs", a, b), pair))
        if self.bias is not None:
            terms.append(blocks.slice_pairs(self.bias, pair))
        if self.scale is not None:
            products = p.products(pair) * p.config.scale
            terms.append(products * blocks.slice_pairs(self.scale, pair))
        s_dot = functools.reduce(jnp.add, terms)
        return s_dot if slope is None else s_dot * slope

    def lse_part(self, pair: jax.Array) -> dict[str, jax.Array]:
        """The block's part of ``d lse``."""
        probabilities, slope = self.p.probabilities(pair, self.lse)
        s_dot = self.logits(pair, slope)
        terms = jnp.where(probabilities == 0, 0.0, probabilities * s_dot)
        return {"lse": jnp.sum(terms, axis=-1)}

    def out_part(self, lse_dot: jax.Array, pair: jax.Array) -> dict[str, jax.Array]:
        """The block's part of ``dO``."""
        p, blocks = self.p, self.p.blocks
        wide = working_dtype(p.query.dtype)
        probabilities, slope = p.probabilities(pair, self.lse)
        factors = p.dropout_factors(pair)
        if factors is None:
            factors = jnp.ones((), wide)
        rates = -blocks.slice_queries(lse_dot, pair, 3)[..., None]
        if self.reach_logits:
            rates = self.logits(pair, slope) + rates
        rates = jnp.where(probabilities == 0, 0.0, probabilities * rates) * factors
        v = blocks.slice_keys(p.value, pair, 2)
        out = p.einsum("bkgqs,bksv->bkgqv", rates, v.astype(wide))
        if self.value is not None:
            v_dot = blocks.slice_keys(self.value, pair, 2)
            out = out + p.einsum("bkgqs,bksv->bkgqv", probabilities * factors, v_dot)
        return {"out": out}


def attention_pushforward(
    config: Config,
    x: Inputs,
    result: Result,
    tangents: Inputs,
    *,
    definition: bool = False,
) -> Result:
    """The tangents of the result; those of `x` may be None.

    ``d lse = sum(P dS)`` first, then ``dO = sum(P (dS - d lse) V + P dV)``: taken
    together, what is common to a row would cancel.
    """
    p = _prepare(config, x)
    wide = working_dtype(x.query.dtype)
    t = Inputs(*(None if a is None else a.astype(wide) for a in tangents))
    lse = _lse_by_head(x, result)
    by_head = _Tangents(
        p,
        lse,
        query=None if t.query is None else _queries_by_head(x, t.query),
        key=None if t.key is None else _keys_by_head(x, t.key),
        value=None if t.value is None else _keys_by_head(x, t.value),
        bias=_pairs_by_head(x, t.bias),
        scale=_pairs_by_head(x, t.scale),
    )
    like = (*jax.tree.leaves(x), *jax.tree.leaves(tangents))
    add_up = functools.partial(_add_up, p, like=like, definition=definition)
    rows = p.query.shape[:-1]
    if by_head.reach_logits:
        lse_dot = add_up({"lse": _Sum(rows, queries=3)}, by_head.lse_part)["lse"]
    else:
        lse_dot = trace.zeros(rows, wide, *like)
    if t.sinks is not None:
        probabilities = _sink_probabilities(x, lse)
        sinks = t.sinks.reshape(1, *_heads_of(x), 1)
        terms = jnp.where(probabilities == 0, 0.0, probabilities * sinks)
        lse_dot = lse_dot + terms
    sums = {"out": _Sum((*rows, p.value.shape[-1]), queries=3)}
    found = add_up(sums, functools.partial(by_head.out_part, lse_dot))
    out, low = low_digits(_by_place(found["out"]), x.query.dtype)
    none = trace.zeros(result.lse.shape, wide, *like)
    return Result(out, low, _by_place(lse_dot), none)


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "attention": attention,
    "attention_gradient": attention_gradient,
    "attention_pushforward": attention_pushforward,
}


def run(
    call: AttentionCall, arguments: Sequence[Any], *, definition: bool = False
) -> Any:
    """What a call computes, of its inputs and what else it takes."""
    return _FUNCTIONS[call.op](call.config, *arguments, definition=definition)
