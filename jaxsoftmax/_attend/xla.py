"""Attention in jax.numpy, block by block: no array of queries x keys.

A block is some queries and some keys, of all batch entries and heads. The forward goes
through the blocks with a running maximum and sum for each query (online softmax, arXiv
1805.02867); the backward and the forward mode compute the logits of a block again and
have the probabilities from the log-sum-exp (FlashAttention, arXiv 2205.14135). Blocks
that ``causal`` or a window leaves empty are not in the list of blocks; those beyond all
lengths are skipped in the loop, as are those that it leaves empty by an offset of the
queries that is an array.

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
    queries_with_keys,
    rounded_to,
    sum_in_two,
    within,
    within_lengths,
)
from jaxsoftmax._compat import trace
from jaxsoftmax._core.device import Device
from jaxsoftmax._core.shapes import is_known
from jaxsoftmax._rows.xla import working_dtype

# The most queries and keys in a block.
QUERY_BLOCK = 2048
KEY_BLOCK = 8192
_LEAST_BLOCK = 128
# The fewest queries in a block of whole rows: the gradients of all keys, which each
# block is added to, are then not most of what is moved.
_LEAST_OF_WHOLE_ROWS = 32
# The logits that are computed at once. On a CPU they fit its caches; a GPU wants
# kernels that run longer than their launch.
BLOCK_ENTRIES = {"cpu": 2**20}
BLOCK_ENTRIES_ELSEWHERE = 2**26
# The part of them with a dropout mask of each head or batch entry, whose random bits
# are arrays of a block's size too: a block of all would take more than jax.nn does.
_DROPOUT_PART = 4


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
class _Cut:
    """How a sequence is cut into blocks.

    Where the size does not divide the length, the last block starts early: what it has
    in common with the one before is masked in it.
    """

    length: int
    block: int

    @property
    def whole(self) -> bool:
        """Whether it is all in one block."""
        return self.block == self.length

    @property
    def count(self) -> int:
        return 1 if self.whole else -(-self.length // self.block)

    def first(self, i: jax.Array) -> jax.Array:
        """The first place that no earlier block has."""
        return jnp.int32(0) if self.whole else i * self.block

    def start(self, i: jax.Array) -> jax.Array:
        first = self.first(i)
        return first if self.whole else jnp.minimum(first, self.length - self.block)

    def places(self, i: jax.Array) -> jax.Array:
        return jnp.arange(self.block, dtype=jnp.int32) + self.start(i)

    def owned(self, i: jax.Array) -> jax.Array | None:
        """Places that no earlier block has; None if that is all."""
        if self.whole or not self.length % self.block:
            return None
        return self.places(i) >= self.first(i)

    def slice(self, x: jax.Array, i: jax.Array, axis: int) -> jax.Array:
        if self.whole:
            return x
        return lax.dynamic_slice_in_dim(x, self.start(i), self.block, axis)


def _block_sizes(
    entries: int, rows: int, queries: int, keys: int, *, whole_rows: int
) -> tuple[int, int]:
    """Queries and keys of a block that has so many logits, of so many rows.

    A length that is symbolic, as in a program for `jax.export`, is one block.

    Args:
      entries: Logits of a block.
      rows: Batch entries and heads.
      queries: How many there are.
      keys: How many there are.
      whole_rows: If a block rather has all keys, of fewer queries, how many of these
        it has at least; else 0.
    """
    each = entries / max(rows, 1)
    if whole_rows and is_known([queries, keys]) and keys <= KEY_BLOCK:
        most = each // max(keys, 1)
        if most >= min(whole_rows, queries):
            return _even_blocks(queries, int(min(QUERY_BLOCK, most))), keys
    most = math.sqrt(each)
    query_block, key_block = queries, keys
    if is_known([queries]):
        query_block = _even_blocks(queries, min(QUERY_BLOCK, _power_of_two(most)))
        most = min(most, queries)  # few queries leave room for more keys
    if is_known([keys]):
        most = _power_of_two(each / max(most, 1))
        key_block = _even_blocks(keys, min(KEY_BLOCK, most))
    return query_block, key_block


def _loop(
    p: "_Prepared",
    carry: Any,
    step: Callable[[Any, jax.Array], Any],
    *,
    skip: bool = True,
) -> Any:
    """`step` for each block, in order; those that no batch entry sees are skipped."""
    x, pairs = p.x, p.pairs()
    if not len(pairs):
        return carry
    if len(pairs) == 1:
        return step(carry, jnp.asarray(pairs[0]))
    arrays = (x.query_lengths, x.key_lengths, x.query_offset)
    bounded = any(a is not None for a in arrays)

    def within(pair: jax.Array) -> jax.Array:
        inside = jnp.ones((x.query.shape[0],), bool)
        if x.query_lengths is not None:
            inside &= x.query_lengths > p.queries.first(pair[0])
        if x.key_lengths is not None:
            inside &= x.key_lengths > p.keys.first(pair[1])
        if x.query_offset is not None:
            inside &= p.near(pair)
        return jnp.any(inside)

    def body(carry: Any, pair: jax.Array) -> tuple[Any, None]:
        if skip and bounded:
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


def _inputs_by_head(x: Inputs, given: Inputs) -> Inputs:
    """`given`, arrays like those of `x` or None, as blocks have them.

    Queries [B, K, G, T, H], keys and values [B, K, S, ...], both 0 beyond the lengths;
    bias, mask and scale [B, K, G, T, S], each dimension in full or 1.
    """

    def keys(array: jax.Array | None) -> jax.Array | None:
        if array is None:
            return None
        return jnp.swapaxes(within_lengths(array, x.key_lengths), 1, 2)

    def pairs(array: jax.Array | None) -> jax.Array | None:
        if array is None:
            return None
        batch, heads, *rest = array.shape
        return array.reshape(batch, *((1, 1) if heads == 1 else _heads_of(x)), *rest)

    query = given.query
    if query is not None:
        query = _by_head(x, within_lengths(query, x.query_lengths))
    return given._replace(
        query=query,
        key=keys(given.key),
        value=keys(given.value),
        bias=pairs(given.bias),
        mask=pairs(given.mask),
        scale=pairs(given.scale),
    )


def _lse_by_head(x: Inputs, result: Result) -> tuple[jax.Array, jax.Array]:
    """The log-sum-exp and its low digits, [B, K, G, T].

    0 of a query that sees nothing: any finite number will do.
    """
    high = jnp.where(result.lse == -jnp.inf, 0.0, result.lse)
    # Derivatives are those of `high`: as of `Result`.
    low = lax.stop_gradient(result.lse_low)
    return _by_head(x, high), _by_head(x, low)


@dataclasses.dataclass(frozen=True)
class _Prepared:
    """A call's arrays by head, and what follows from them for a block.

    A block is a pair of numbers: which one of the queries, and which one of the keys.
    """

    config: Config
    queries: _Cut
    keys: _Cut
    x: Inputs

    @property
    def dtype(self) -> np.dtype[Any]:
        """That of all that is computed."""
        return working_dtype(self.x.query.dtype)

    def pairs(self) -> np.ndarray:
        """[count, 2]: the blocks with something in them, by queries, then by keys."""
        sizes = bq, bk = self.queries.block, self.keys.block
        if 0 in sizes:
            return np.zeros((0, 2), np.int32)
        pairs = np.indices((self.queries.count, self.keys.count)).reshape(2, -1)
        if is_known(sizes) and self.x.query_offset is None:
            left, right = self.config.reach
            i, j = pairs
            last_query = np.minimum((i + 1) * bq, self.queries.length) - 1
            last_key = np.minimum((j + 1) * bk, self.keys.length) - 1
            near = (j * bk <= last_query + right) & (last_key >= i * bq - left)
            pairs = pairs[:, near]
        return pairs.T.astype(np.int32)

    def near(self, pair: jax.Array) -> jax.Array:
        """[B or 1]: whether `causal` and the window leave something of the block."""
        query_places, key_places = self.places(pair)
        left, right = self.config.reach
        # Those of the first query and the last key, and of the last and the first.
        most = key_places[-1] - query_places[0] - self.x.query_offset
        least = key_places[0] - query_places[-1] - self.x.query_offset
        sides = both(
            jnp.full_like(most, True, bool),
            least <= int(right) if right < math.inf else None,
            most >= -int(left) if left < math.inf else None,
        )
        assert sides is not None
        return sides

    def slice_queries(self, x: jax.Array, pair: jax.Array, axis: int = 3) -> jax.Array:
        return self.queries.slice(x, pair[0], axis)

    def sliced_queries(self, whole: Any, pair: jax.Array) -> Any:
        """The block's part of arrays of all queries."""
        return jax.tree.map(lambda a: self.slice_queries(a, pair), whole)

    def updated_queries(self, whole: Any, block: Any, pair: jax.Array) -> Any:
        """Arrays of all queries, with those of the block replaced."""
        if self.queries.whole:
            return block
        start = self.queries.start(pair[0])
        update = functools.partial(lax.dynamic_update_slice_in_dim, axis=3)
        return jax.tree.map(lambda a, b: update(a, b, start), whole, block)

    def slice_keys(self, x: jax.Array, pair: jax.Array, axis: int = 2) -> jax.Array:
        return self.keys.slice(x, pair[1], axis)

    def slice_pairs(self, x: jax.Array, pair: jax.Array) -> jax.Array:
        """The block of an array [..., T or 1, S or 1]."""
        if x.shape[3] != 1:
            x = self.slice_queries(x, pair)
        return x if x.shape[4] == 1 else self.slice_keys(x, pair, 4)

    def places(self, pair: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The places of the block's queries and keys in their sequences."""
        return self.queries.places(pair[0]), self.keys.places(pair[1])

    def einsum(self, equation: str, *operands: jax.Array) -> jax.Array:
        return jnp.einsum(
            equation,
            *operands,
            precision=self.config.precision,
            preferred_element_type=self.dtype,
        )

    def products(self, query: jax.Array, key: jax.Array, pair: jax.Array) -> jax.Array:
        """The block's products of queries and keys: [B, K, G, queries, keys]."""
        q, k = self.slice_queries(query, pair), self.slice_keys(key, pair)
        if q.dtype != k.dtype:  # one is a tangent, which is wide
            q, k = q.astype(self.dtype), k.astype(self.dtype)
        return self.einsum("bkgqh,bksh->bkgqs", q, k)

    def scaled(self, s: jax.Array, pair: jax.Array) -> jax.Array:
        """`s` of the block, by the number and by the array that scale the logits."""
        return self.scaled_by_array(s * self.config.scale, pair)

    def scaled_by_array(self, s: jax.Array, pair: jax.Array) -> jax.Array:
        if self.x.scale is not None:
            s = s * self.slice_pairs(self.x.scale, pair).astype(s.dtype)
        return s

    def logits(self, pair: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """The block's logits, [B, K, G, queries, keys], and the slope of the cap."""
        s = self.scaled(self.products(self.x.query, self.x.key, pair), pair)
        if self.x.bias is not None:
            bias = self.slice_pairs(self.x.bias, pair).astype(s.dtype)
            # The product of a hidden pair may be NaN.
            s = jnp.where(bias == -jnp.inf, -jnp.inf, s + bias)
        cap = self.config.softcap
        if cap is None:
            return s, None
        t = jnp.tanh(s / cap)
        return jnp.where(s == -jnp.inf, -jnp.inf, cap * t), 1 - t * t

    def visible(self, pair: jax.Array) -> jax.Array | None:
        """The mask of the block: which query sees which key; None for all."""
        x, (query_places, key_places) = self.x, self.places(pair)
        new_queries, new_keys = self.queries.owned(pair[0]), self.keys.owned(pair[1])
        near = in_reach(self.config, query_places, key_places, x.query_offset)
        if x.query_offset is not None and near is not None:
            near = near[:, None, None]
        masks = [
            None if new_queries is None else new_queries[:, None],
            None if new_keys is None else new_keys[None, :],
            near,
            None if x.mask is None else self.slice_pairs(x.mask, pair),
        ]
        inside = within(query_places, x.query_lengths)
        if inside is not None:
            masks.append(inside[:, None, None, :, None])
        inside = within(key_places, x.key_lengths)
        if inside is not None:
            masks.append(inside[:, None, None, None, :])
        if x.query_segments is not None:
            query_ids = self.slice_queries(x.query_segments, pair, 1)
            key_ids = self.slice_keys(x.key_segments, pair, 1)
            same = query_ids[:, :, None] == key_ids[:, None, :]
            masks.append(same[:, None, None])
        return both(*masks)

    def visible_logits(self, pair: jax.Array) -> jax.Array:
        """The block's logits; -inf of pairs that are hidden."""
        s, _ = self.logits(pair)
        visible = self.visible(pair)
        return s if visible is None else jnp.where(visible, s, -jnp.inf)

    def dropout_factors(self, pair: jax.Array) -> jax.Array | None:
        """What dropout multiplies the block's probabilities with, or None."""
        rate = self.config.dropout_rate
        if not rate:
            return None
        keep = _dropout_mask(self.config, self.x, *self.places(pair))
        return jnp.where(keep, 1 / (1 - rate), 0.0).astype(self.dtype)

    def probabilities(
        self, pair: jax.Array, lse: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array | None]:
        """P of the block, and the slope of the cap."""
        s, slope = self.logits(pair)
        high, low = (self.slice_queries(part, pair) for part in lse)
        exponents = (s - high[..., None]) - low[..., None]
        visible = self.visible(pair)
        if visible is not None:
            exponents = jnp.where(visible, exponents, -jnp.inf)
        return jnp.exp(exponents), slope


def _seen_keys(config: Config, x: Inputs) -> jax.Array | None:
    """[B or 1, K or 1, S]: those that some query may see, as far as that is free.

    From masks and biases that are the same for all queries, and from the place.
    """
    found = []
    for name in ("mask", "bias"):
        array = getattr(x, name)
        if array is not None and array.shape[3] == 1 and array.shape[4] != 1:
            seen = array if name == "mask" else array != -jnp.inf
            found.append(jnp.any(seen, axis=(2, 3)))
    queries, keys = x.query.shape[3], x.key.shape[2]
    left, right = config.reach
    if not is_known([queries, keys]):
        return both(*found)
    places = jnp.arange(keys, dtype=jnp.int32).reshape(1, 1, -1)
    if x.query_offset is not None:
        places = places - x.query_offset[:, None, None]
    if right < math.inf and (x.query_offset is not None or queries + right < keys):
        found.append(places < queries + int(right))
    if left < math.inf and (x.query_offset is not None or left < 0):
        found.append(places >= -int(left))
    return both(*found)


def _prepare(config: Config, x: Inputs, *, whole_rows: bool = False) -> _Prepared:
    """The call's arrays in blocks; all keys in one, unless some blocks are left out."""
    drawn = bool(config.dropout_rate) and any(config.dropout_dims)
    part = _DROPOUT_PART if drawn else 1
    # Without whole rows a block of short sequences would be all of them.
    whole_rows |= drawn
    whole_rows &= config.reach == (math.inf, math.inf) and x.key_lengths is None
    batch, queries, heads, _ = x.query.shape
    keys = x.key.shape[1]
    # A batch that is symbolic counts as one entry.
    rows = batch * heads if is_known([batch]) else heads
    block, key_block = _block_sizes(
        config.block_entries // part,
        rows,
        queries,
        keys,
        whole_rows=_LEAST_OF_WHOLE_ROWS // part if whole_rows else 0,
    )
    x = _inputs_by_head(x, x)
    seen = _seen_keys(config, x)
    if seen is not None:
        key, value = (
            jnp.where(seen[..., None], a, jnp.zeros((), a.dtype))
            for a in (x.key, x.value)
        )
        x = x._replace(key=key, value=value)
    return _Prepared(config, _Cut(queries, block), _Cut(keys, key_block), x)


# --- dropout --------------------------------------------------------------------------


def _dropout_mask(
    config: Config, x: Inputs, query_places: jax.Array, key_places: jax.Array
) -> jax.Array:
    """Where dropout keeps a block: [B or 1, K or 1, G or 1, queries, keys].

    Entry i of ``jax.random.bernoulli(key, 1 - rate, shape)`` depends on the key and on
    i alone (with jax_threefry_partitionable, jax's default). So a block's entries of
    that mask can be computed without the others.
    """
    batch, kv_heads, group, queries, _ = x.query.shape
    per_entry, per_head = config.dropout_dims
    shape = (batch if per_entry else 1, *((kv_heads, group) if per_head else (1, 1)))
    lead = jnp.arange(math.prod(shape), dtype=jnp.uint32).reshape(*shape, 1, 1)
    places = query_places.astype(jnp.uint32).reshape(1, 1, 1, -1, 1)
    high, low = words_of_product(lead * _unsigned(queries) + places, x.key.shape[2])
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


def words_of_product(a: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
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
    """Out and lse, each with its low digits, and the largest logits."""
    p, value_dtype = _prepare(config, x), x.value.dtype
    *rows, _ = p.x.query.shape
    like = jax.tree.leaves(x)
    top = total = trace.zeros(rows, p.dtype, *like)
    if x.sinks is None:
        top = top - jnp.inf
    else:
        sinks = _sinks_by_head(x, x.sinks.astype(p.dtype))
        top = top + sinks
        total = total + jnp.where(sinks == -jnp.inf, 0, 1)
    # With weights that are rounded, their own sum: then `out` is a mean of values.
    weight = total if value_dtype.itemsize < p.dtype.itemsize else None
    sums = trace.zeros((*rows, x.value.shape[-1]), p.dtype, *like)
    # Without the sinks, which the running maximum has.
    apart = config.uses_max_logits and x.sinks is not None
    seen = jnp.full_like(top, -jnp.inf) if apart else None

    def step(carry: Any, pair: jax.Array) -> Any:
        top, total, weight, sums, seen = p.sliced_queries(carry, pair)
        s = p.visible_logits(pair)
        largest = jnp.max(s, axis=-1)
        seen = None if seen is None else jnp.maximum(seen, largest)
        new_top = jnp.maximum(top, largest)
        # Any number will do for a query that has seen nothing yet.
        m = jnp.where(new_top == -jnp.inf, 0.0, new_top)
        e = jnp.exp(s - m[..., None])
        before = jnp.exp(top - m)
        total = total * before + jnp.sum(e, axis=-1)
        if weight is not None:
            e = rounded_to(value_dtype, e)
            weight = weight * before + jnp.sum(e, axis=-1)
        factors = p.dropout_factors(pair)
        weights = (e if factors is None else e * factors).astype(value_dtype)
        v = p.slice_keys(p.x.value, pair)
        sums = sums * before[..., None] + p.einsum("bkgqs,bksv->bkgqv", weights, v)
        new = (new_top, total, weight, sums, seen)
        return p.updated_queries(carry, new, pair)

    start = (top, total, weight, sums, seen)
    top, total, weight, sums, seen = _loop(p, start, step, skip=not definition)
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
    largest = None
    if config.uses_max_logits:
        largest = _of_heads(top if seen is None else seen)
    return Result(rounded, low, _by_place(lse), _by_place(lse_low), largest)


def max_logits(config: Config, x: Inputs) -> jax.Array:
    """[B, N]: the largest logits, in a pass of its own, for kernels without them."""
    p = _prepare(config, x)
    top = trace.zeros(p.x.query.shape[:-1], p.dtype, *jax.tree.leaves(x)) - jnp.inf

    def step(top: jax.Array, pair: jax.Array) -> jax.Array:
        before = p.sliced_queries(top, pair)
        largest = jnp.max(p.visible_logits(pair), axis=-1)
        return p.updated_queries(top, jnp.maximum(before, largest), pair)

    return _of_heads(_loop(p, top, step))


def _of_heads(tops: jax.Array) -> jax.Array:
    """[B, N]: the largest of [B, K, G, T]."""
    largest = jnp.max(tops, axis=-1, initial=-jnp.inf)
    return largest.reshape(largest.shape[0], -1)


# --- what derivatives are made of -----------------------------------------------------

# The axes, by head, of the queries and of the keys in what blocks are added up to.
_AXES: dict[str, tuple[int | None, int | None]] = {
    "query": (3, None),
    "key": (None, 2),
    "value": (None, 2),
    "bias": (3, 4),
    "scale": (3, 4),
    "lse": (3, None),
    "out": (3, None),
}


def _add_up(
    p: _Prepared,
    shapes: dict[str, tuple[int, ...]],
    parts: Callable[[jax.Array], dict[str, jax.Array]],
    like: Sequence[Any],
    *,
    definition: bool,
) -> dict[str, jax.Array]:
    """The sums of all blocks' parts, by name, in at least float32.

    As a definition, it can be differentiated, and what jax then keeps of a block are
    its operands, which all blocks share.
    """
    block_parts = jax.checkpoint(parts) if definition else parts

    def added(
        name: str, total: jax.Array, part: jax.Array, pair: jax.Array
    ) -> jax.Array:
        if part.shape == total.shape:
            return total + part
        starts = [jnp.int32(0)] * total.ndim
        cuts = (p.queries, p.keys)
        for axis, cut, i in zip(_AXES[name], cuts, pair, strict=True):
            if axis is not None and part.shape[axis] != total.shape[axis]:
                starts[axis] = cut.start(i)
        before = lax.dynamic_slice(total, starts, part.shape)
        return lax.dynamic_update_slice(total, before + part, starts)

    def step(carry: dict[str, jax.Array], pair: jax.Array) -> dict[str, jax.Array]:
        found = block_parts(pair)
        return {n: added(n, total, found[n], pair) for n, total in carry.items()}

    zeros = {n: trace.zeros(shape, p.dtype, *like) for n, shape in shapes.items()}
    return _loop(p, zeros, step, skip=not definition)


def _summed_to(part: jax.Array, shape: Sequence[int]) -> jax.Array:
    """`part` added up over the axes that are 1 in `shape`."""
    axes = [i for i, size in enumerate(shape) if size == 1 and part.shape[i] != 1]
    return jnp.sum(part, axis=axes, keepdims=True) if axes else part


# --- means of rows --------------------------------------------------------------------


class _Mean(NamedTuple):
    """The mean under P of what the keys have, for each query: [B, K, G, queries].

    It is ``pivot + excess / mass``. The pivot is what the key of the largest P has:
    where that key dominates, or much is common to all keys, deviations from a mean that
    is one number would have no digits left.

    Attributes:
      top: The largest P.
      mass: The sum of P, 1 but for roundings; 0 of a query that sees nothing.
      pivot: What the key of the largest P has.
      excess: The sum of P times what the keys have less the pivot.
    """

    top: jax.Array
    mass: jax.Array
    pivot: jax.Array
    excess: jax.Array

    def merged(self, other: "_Mean") -> "_Mean":
        """The mean over the keys of both."""
        pivot = jnp.where(other.top > self.top, other.pivot, self.pivot)
        mine, others = (
            part.excess + part.mass * (part.pivot - pivot) for part in (self, other)
        )
        return _Mean(
            jnp.maximum(self.top, other.top),
            self.mass + other.mass,
            pivot,
            mine + others,
        )

    @property
    def beyond_pivot(self) -> jax.Array:
        """The mean less the pivot."""
        return self.excess / jnp.where(self.mass == 0, 1.0, self.mass)

    def deviations(self, t: jax.Array, shift: jax.Array | None = None) -> jax.Array:
        """What keys have, [B, K, G, queries, keys], less the mean, plus `shift`."""
        beyond = self.beyond_pivot
        if shift is not None:
            beyond = beyond - shift
        return (t - self.pivot[..., None]) - beyond[..., None]


def _block_mean(probabilities: jax.Array, t: jax.Array) -> _Mean:
    """The mean of `t` over the keys of a block, whatever it is where P is 0."""
    top = jnp.max(probabilities, axis=-1, keepdims=True)
    # A key with nearly the largest P will do, and XLA may compute P anew beside each
    # reduction. In arithmetic: XLA for CPUs is slow at selects and at argmax.
    near = jnp.floor(probabilities / jnp.where(top == 0, 1.0, top) + 0.1)
    places = lax.broadcasted_iota(near.dtype, near.shape, near.ndim - 1)
    index = jnp.max(near * places, axis=-1, keepdims=True).astype(jnp.int32)
    pivot = jnp.take_along_axis(t, index, axis=-1, mode="clip")
    pivot = jnp.where(top == 0, 0.0, pivot)
    # The mean does not depend on what its pivot is, nor do its derivatives.
    top, pivot = lax.stop_gradient((top, pivot))
    terms = jnp.where(probabilities == 0, 0.0, probabilities * (t - pivot))
    mass, excess = (jnp.sum(a, axis=-1) for a in (probabilities, terms))
    return _Mean(top[..., 0], mass, pivot[..., 0], excess)


def _row_means(
    p: _Prepared,
    start: _Mean,
    weighted: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
    *,
    definition: bool,
) -> _Mean:
    """The means of all rows: `start`, and those of P and what it weighs in a block."""

    def block_mean(pair: jax.Array) -> _Mean:
        return _block_mean(*weighted(pair))

    if definition:
        block_mean = jax.checkpoint(block_mean)

    def step(means: _Mean, pair: jax.Array) -> _Mean:
        new = p.sliced_queries(means, pair).merged(block_mean(pair))
        return p.updated_queries(means, new, pair)

    return _loop(p, start, step, skip=not definition)


def _mean_of_sinks(
    p: _Prepared, x: Inputs, result: Result, t: jax.Array | None, like: Sequence[Any]
) -> _Mean:
    """The mean over the sink alone, which has `t`, or 0; without one, over nothing."""
    zeros = trace.zeros(p.x.query.shape[:-1], p.dtype, *like)
    if x.sinks is None:
        return _Mean(zeros, zeros, zeros, zeros)
    mass = zeros + _times_sinks(x, result, jnp.ones((), p.dtype))
    pivot = zeros if t is None else zeros + t
    return _Mean(lax.stop_gradient(mass), mass, pivot, zeros)


def _without_common(config: Config, x: Inputs) -> Inputs:
    """Inputs by head, with what the values of a head have in common taken out of them.

    It is their mean. It moves dP of a row by one number, and so no derivative of the
    logits; but products keep the digits of what is left. In 16 bits it is taken out of
    those columns alone where that is exact. Not if P does not sum to 1 over the values.
    """
    if config.dropout_rate or x.sinks is not None:
        return x
    v = lax.stop_gradient(x.value)
    wide = v.astype(working_dtype(v.dtype))
    # Those that are hidden from all queries are 0.
    given = jnp.any(v != 0, axis=3, keepdims=True)
    count = jnp.sum(given, axis=2, keepdims=True, dtype=wide.dtype)
    total = jnp.sum(wide, axis=2, keepdims=True)
    center = rounded_to(v.dtype, total / jnp.maximum(count, 1.0))
    moved = wide - center
    exact = jnp.isfinite(moved)
    if v.dtype != wide.dtype:
        exact &= rounded_to(v.dtype, moved) == moved
    center = jnp.where(jnp.all(exact, axis=2, keepdims=True), center, 0.0)
    return x._replace(value=x.value - center.astype(v.dtype))


# --- the backward ---------------------------------------------------------------------


def attention_gradient(
    config: Config,
    x: Inputs,
    result: Result,
    cotangent: Result,
    *,
    definition: bool = False,
) -> dict[str, jax.Array]:
    """The gradients of what `config` wants, by name.

    ``dS = P (dP - D)``, where dP = dO V^T, and D is the mean of dP less d lse: the mean
    of dP as it was computed. ``sum(dO O)`` is that with other roundings, and where one
    key dominates, no more than these would be left of dP - D.
    """
    # The logits of a query that sees nothing have the derivative 0, and the query adds
    # nothing to the gradients of keys, whatever it contains.
    x = x._replace(query=queries_with_keys(result, x.query))
    p = _prepare(config, x, whole_rows=True)
    by_head = _without_common(config, p.x)
    d_out, d = cotangent_and_center(x, result, cotangent)
    d_lse = _by_head(x, cotangent.lse)
    lse = _lse_by_head(x, result)
    d_out_by_head = _by_head(x, d_out.astype(x.query.dtype))

    like = (*jax.tree.leaves(x), *jax.tree.leaves(cotangent))
    arrays = {n: getattr(by_head, n) for n in config.wanted if n in _AXES}
    shapes = {n: a.shape for n, a in arrays.items() if a is not None}
    through_logits = not shapes.keys() <= {"value"}
    whole_rows = p.keys.whole

    def d_probabilities(pair: jax.Array, factors: jax.Array | None) -> jax.Array:
        d_o = p.slice_queries(d_out_by_head, pair)
        v = p.slice_keys(by_head.value, pair)
        d_p = p.einsum("bkgqv,bksv->bkgqs", d_o, v)
        return d_p if factors is None else d_p * factors

    def weighted(pair: jax.Array) -> tuple[jax.Array, jax.Array]:
        probabilities, _ = p.probabilities(pair, lse)
        return probabilities, d_probabilities(pair, p.dropout_factors(pair))

    def parts(pair: jax.Array) -> dict[str, jax.Array]:
        found = {}
        probabilities, slope = p.probabilities(pair, lse)
        factors = p.dropout_factors(pair)
        d_o = p.slice_queries(d_out_by_head, pair)
        if "value" in shapes:
            weights = probabilities if factors is None else probabilities * factors
            weights = weights.astype(x.value.dtype)
            found["value"] = p.einsum("bkgqs,bkgqv->bksv", weights, d_o)
        if not through_logits:
            return found
        d_p = d_probabilities(pair, factors)
        mean = p.sliced_queries(means, pair)
        if whole_rows:
            mean = mean.merged(_block_mean(probabilities, d_p))
        d_s = probabilities * mean.deviations(d_p, p.slice_queries(d_lse, pair))
        if slope is not None:
            d_s = d_s * slope
        # A probability of 0 has the derivative 0, whatever the values there are.
        d_s = jnp.where(probabilities == 0, 0.0, d_s)
        if "bias" in shapes:
            found["bias"] = _summed_to(d_s, shapes["bias"])
        if "scale" in shapes:
            products = p.products(by_head.query, by_head.key, pair)
            terms = jnp.where(d_s == 0, 0.0, d_s * products * config.scale)
            found["scale"] = _summed_to(terms, shapes["scale"])
        # A scale of what is hidden has no influence either.
        d_products = p.scaled(d_s, pair)
        if x.scale is not None:
            d_products = jnp.where(d_s == 0, 0.0, d_products)
        d_s = d_products.astype(x.query.dtype)
        if "query" in shapes:
            k = p.slice_keys(by_head.key, pair)
            found["query"] = p.einsum("bkgqs,bksh->bkgqh", d_s, k)
        if "key" in shapes:
            q = p.slice_queries(by_head.query, pair)
            found["key"] = p.einsum("bkgqs,bkgqh->bksh", d_s, q)
        return found

    if through_logits:
        means = _mean_of_sinks(p, x, result, None, like)
        if not whole_rows:
            # That takes the products of P and of dP once more.
            means = _row_means(p, means, weighted, definition=definition)
    gradients = _add_up(p, shapes, parts, like, definition=definition)
    for name, gradient in gradients.items():
        array = getattr(x, name)
        if name == "query":
            gradient = jnp.moveaxis(gradient, 3, 1)
        elif name in ("key", "value"):
            gradient = jnp.swapaxes(gradient, 1, 2)
        gradients[name] = gradient.reshape(array.shape).astype(array.dtype)
    if x.sinks is not None and "sinks" in config.wanted:
        gradients["sinks"] = gradient_of_sinks(x, result, d)
    return gradients


def cotangent_and_center(
    x: Inputs, result: Result, cotangent: Result
) -> tuple[jax.Array, jax.Array]:
    """dO, in at least float32, 0 of a query that sees nothing, and D [B, T, N]."""
    dtype = working_dtype(result.out.dtype)
    d_out = within_lengths(cotangent.out.astype(dtype), x.query_lengths)
    d_out = queries_with_keys(result, d_out)
    out = result.out.astype(dtype)
    if result.low is not None:
        out = out + result.low.astype(dtype)
    return d_out, jnp.sum(d_out * out, axis=-1) - cotangent.lse


def gradient_of_sinks(x: Inputs, result: Result, center: jax.Array) -> jax.Array:
    """[N], given D [B, T, N]."""
    terms = _times_sinks(x, result, -_by_head(x, center))
    return jnp.sum(terms, axis=(0, 3)).reshape(-1).astype(x.sinks.dtype)


def _sinks_by_head(x: Inputs, sinks: jax.Array) -> jax.Array:
    return sinks.reshape(1, *_heads_of(x), 1)


def _times_sinks(x: Inputs, result: Result, factor: jax.Array) -> jax.Array:
    """`factor` times what the sinks have of the rows: [B, K, G, T]."""
    high, low = _lse_by_head(x, result)
    sinks = _sinks_by_head(x, x.sinks.astype(high.dtype))
    probabilities = jnp.exp((sinks - high) - low)
    return jnp.where(probabilities == 0, 0.0, probabilities * factor)


# --- forward mode ---------------------------------------------------------------------


def attention_pushforward(
    config: Config,
    x: Inputs,
    result: Result,
    tangents: Inputs,
    *,
    definition: bool = False,
) -> Result:
    """The tangents of the result; those of `x` may be None.

    ``d lse``, the mean of dS, first, then ``dO = sum(P (dS - d lse) V + P dV)``: taken
    together, what is common to a row would cancel.
    """
    p = _prepare(config, x)
    by_head, dtype = _without_common(config, p.x), p.dtype
    lse = _lse_by_head(x, result)
    wide = jax.tree.map(lambda a: a.astype(dtype), tangents)
    dots = _inputs_by_head(x, wide)
    moving = (dots.query, dots.key, dots.bias, dots.scale)
    logits_move = any(a is not None for a in moving)

    def logits_dot(pair: jax.Array, slope: jax.Array | None) -> jax.Array:
        """The tangent of the block's logits, given the slope of the cap.

        Scaled before the product: a factor after it would be contracted with what is
        subtracted, and the pivot of a mean not be exactly what its key has.
        """
        terms, scale = [], config.scale
        if dots.query is not None:
            products = p.products(dots.query * scale, by_head.key, pair)
            terms.append(p.scaled_by_array(products, pair))
        if dots.key is not None:
            products = p.products(by_head.query, dots.key * scale, pair)
            terms.append(p.scaled_by_array(products, pair))
        if dots.bias is not None:
            terms.append(p.slice_pairs(dots.bias, pair))
        if dots.scale is not None:
            products = p.products(by_head.query, by_head.key, pair) * config.scale
            terms.append(products * p.slice_pairs(dots.scale, pair))
        s_dot = functools.reduce(jnp.add, terms)
        return s_dot if slope is None else s_dot * slope

    def weighted(pair: jax.Array) -> tuple[jax.Array, jax.Array]:
        probabilities, slope = p.probabilities(pair, lse)
        return probabilities, logits_dot(pair, slope)

    def out_part(pair: jax.Array) -> dict[str, jax.Array]:
        """The block's part of ``dO``."""
        probabilities, slope = p.probabilities(pair, lse)
        factors = p.dropout_factors(pair)
        if factors is None:
            factors = jnp.ones((), dtype)
        mean = p.sliced_queries(means, pair)
        if logits_move:
            rates = mean.deviations(logits_dot(pair, slope))
        else:
            rates = mean.deviations(jnp.zeros((), dtype))
        rates = jnp.where(probabilities == 0, 0.0, probabilities * rates) * factors
        v = p.slice_keys(by_head.value, pair)
        out = p.einsum("bkgqs,bksv->bkgqv", rates, v.astype(dtype))
        if dots.value is not None:
            v_dot = p.slice_keys(dots.value, pair)
            out = out + p.einsum("bkgqs,bksv->bkgqv", probabilities * factors, v_dot)
        return {"out": out}

    like = (*jax.tree.leaves(x), *jax.tree.leaves(tangents))
    sink_dot = None
    if wide.sinks is not None:
        sink_dot = _sinks_by_head(x, wide.sinks)
    means = _mean_of_sinks(p, x, result, sink_dot, like)
    if logits_move:
        means = _row_means(p, means, weighted, definition=definition)
    else:  # the keys have 0
        alike = {"mass": jnp.ones_like(means.mass), "pivot": jnp.zeros_like(means.mass)}
        means = means._replace(**alike, excess=means.mass * means.pivot)
    shape = (*by_head.query.shape[:-1], x.value.shape[-1])
    found = _add_up(p, {"out": shape}, out_part, like, definition=definition)
    out, low = low_digits(_by_place(found["out"]), x.query.dtype)
    none = trace.zeros(result.lse.shape, dtype, *like)
    return Result(out, low, _by_place(means.pivot + means.beyond_pivot), none)


def run(
    call: AttentionCall, arguments: Sequence[Any], *, definition: bool = False
) -> Any:
    """What a call computes, of its inputs and what else it takes."""
    functions: dict[str, Callable[..., Any]] = {
        "attention": attention,
        "attention_gradient": attention_gradient,
        "attention_pushforward": attention_pushforward,
    }
    return functions[call.op](call.config, *arguments, definition=definition)
