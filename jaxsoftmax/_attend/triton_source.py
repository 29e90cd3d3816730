"""The Triton programs of `_attend.triton`; importing it imports triton.

Three kernels; each computes the logits of a tile again, of some queries and some keys
of one head, and none writes them:

- `jaxsoftmax_attention`: a program owns some queries of a head. It reads the keys and
  values that these may see, a tile at a time, with a running maximum and sum for each
  query (FlashAttention, arXiv 2205.14135), and writes the output, what rounding took
  off it, and lse.
- `jaxsoftmax_attention_gradient_of_keys`: a program owns some keys of a head of keys.
  It reads the queries that may see them, of all heads of queries in the group, and
  writes the gradients of its keys and values. Its tiles are keys x queries: then what
  it multiplies with queries and cotangents stays in registers.
- `jaxsoftmax_attention_gradient_of_queries`: a program owns some queries and reads the
  keys again.

So every result is written once, by one program, and nothing is added up in memory.

What a program reads goes in three loops: tiles at one end of what `causal`, a window or
a length leaves, tiles that lie within, and tiles at the other end. Only at the ends are
places compared. Masks, segment ids and a bias count in every tile.

Logits are kept as what `C.factor` multiplies to the base 2: products as they are where
nothing but the scale is applied to them. Of a hidden pair they are -inf.
`rows` is, for each query, lse, or 0 where that is -inf: without a bias to the base 2.

With a bias, all logits of a query may share a number that is large beside their
differences, as large as the lowest float: the difference of a logit and a maximum, or
lse, is taken first, and then to the base 2, and `low` is what rounding took off lse, to
the base 2. Products of that size have errors as large as what lse lost: without a bias
there is no need of it, and one instruction less for each logit.

`C` is a `_attend.triton.Program`: all that is known when a program is
compiled. Pointers come in one order, the first of `C.batch_strides`; what is absent has
some other in its place.
"""

# What Triton compiles has no Python types.
# mypy: ignore-errors

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)
# Places in a tuple of pointers, and in `C.batch_strides`.
QUERY = tl.constexpr(0)
KEY = tl.constexpr(1)
VALUE = tl.constexpr(2)
BIAS = tl.constexpr(3)
MASK = tl.constexpr(4)
SINKS = tl.constexpr(5)
QUERY_LENGTHS = tl.constexpr(6)
KEY_LENGTHS = tl.constexpr(7)
QUERY_SEGMENTS = tl.constexpr(8)
KEY_SEGMENTS = tl.constexpr(9)
D_OUT = tl.constexpr(10)
ROWS = tl.constexpr(11)
CENTER = tl.constexpr(12)
LOW = tl.constexpr(13)


# --- places ---------------------------------------------------------------------------


@triton.jit
def _batch_offset(batch, OF: tl.constexpr, C: tl.constexpr):
    """Where a batch entry lies: the digits of its number by strides."""
    STRIDES: tl.constexpr = C.batch_strides[OF]
    offset = batch.to(tl.int64) * 0
    for k in tl.static_range(len(STRIDES)):
        digit = batch
        if k < len(C.batch_sizes):
            digit = batch % C.batch_sizes[k]
            batch = batch // C.batch_sizes[k]
        if STRIDES[k] != 0:
            offset += digit.to(tl.int64) * STRIDES[k]
    return offset


@triton.jit
def _length(x, batch, OF: tl.constexpr, PLACES: tl.constexpr, C: tl.constexpr):
    """How many queries or keys of a batch entry there are."""
    length = batch * 0 + PLACES
    if OF == QUERY_LENGTHS and C.query_lengths:
        given = tl.load(x[QUERY_LENGTHS] + _batch_offset(batch, QUERY_LENGTHS, C))
        length = tl.maximum(tl.minimum(given, PLACES), 0)
    if OF == KEY_LENGTHS and C.key_lengths:
        given = tl.load(x[KEY_LENGTHS] + _batch_offset(batch, KEY_LENGTHS, C))
        length = tl.maximum(tl.minimum(given, PLACES), 0)
    return length


@triton.jit
def _range(
    first, last, BEFORE: tl.constexpr, AFTER: tl.constexpr, limit, BLOCK: tl.constexpr
):
    """What those from first to last meet, as begin, whole, whole's end, and end.

    That is what lies up to `BEFORE` places before and `AFTER` after (None: any number)
    any of them, below `limit`. From whole to its end, in tiles of `BLOCK`, all of them
    meet all.
    """
    begin = limit * 0
    end = limit
    whole = begin
    whole_end = limit // BLOCK * BLOCK
    if AFTER is not None:
        end = tl.minimum(last + (AFTER + 1), limit)
        whole_end = tl.minimum(first + (AFTER + 1), limit)
        whole_end = tl.maximum(whole_end, 0) // BLOCK * BLOCK
    if BEFORE is not None:
        begin = tl.maximum(first - BEFORE, 0) // BLOCK * BLOCK
        whole = tl.maximum(last - BEFORE, 0) + (BLOCK - 1)
        whole = tl.minimum(whole // BLOCK * BLOCK, end)
    whole_end = tl.maximum(tl.minimum(whole_end, end), whole)
    return begin, whole, whole_end, end


@triton.jit
def _tile(
    pointer,
    start,
    limit,
    STRIDE: tl.constexpr,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    EDGE: tl.constexpr,
):
    """[BLOCK, PADDED] from a place on: 0 beyond `SIZE`, at an edge beyond `limit`."""
    place = tl.arange(0, BLOCK)
    column = tl.arange(0, PADDED)
    at = pointer + start.to(tl.int64) * STRIDE
    at = at + (place[:, None] * STRIDE + column[None, :])
    if EDGE and SIZE != PADDED:
        inside = (start + place < limit)[:, None] & (column < SIZE)[None, :]
        return tl.load(at, mask=inside, other=0.0)
    elif EDGE:
        return tl.load(at, mask=(start + place < limit)[:, None], other=0.0)
    elif SIZE != PADDED:
        return tl.load(at, mask=(column < SIZE)[None, :], other=0.0)
    else:
        return tl.load(at)


@triton.jit
def _store_tile(
    pointer,
    value,
    start,
    STRIDE: tl.constexpr,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    PLACES: tl.constexpr,
):
    """Of a tile what lies within the array."""
    place = tl.arange(0, BLOCK)
    column = tl.arange(0, PADDED)
    at = pointer + start.to(tl.int64) * STRIDE
    at = at + (place[:, None] * STRIDE + column[None, :])
    inside = (start + place < PLACES)[:, None] & (column < SIZE)[None, :]
    tl.store(at, value, mask=inside)


@triton.jit
def _numbers(pointer, start, limit, BLOCK: tl.constexpr, EDGE: tl.constexpr):
    """[BLOCK] from a place on; 0 beyond `limit` at an edge."""
    place = start + tl.arange(0, BLOCK)
    if EDGE:
        return tl.load(pointer + place, mask=place < limit, other=0)
    else:
        return tl.load(pointer + place)


@triton.jit
def _dot(a, b, C: tl.constexpr):
    return tl.dot(a, b, input_precision=C.precision)


@triton.jit
def _add_dot(total, a, b, C: tl.constexpr):
    return tl.dot(a, b, total, input_precision=C.precision)


# --- logits ---------------------------------------------------------------------------


@triton.jit
def _of_pairs(
    pointer,
    batch,
    head,
    start_query,
    start_key,
    query_place,
    key_place,
    OF: tl.constexpr,
    C: tl.constexpr,
):
    """A tile of the bias or the mask, given the places in it."""
    STRIDES: tl.constexpr = C.pair_strides[OF - BIAS]
    at = pointer + _batch_offset(batch, OF, C) + head.to(tl.int64) * STRIDES[0]
    at += start_query.to(tl.int64) * STRIDES[1] + start_key.to(tl.int64) * STRIDES[2]
    inside = (query_place < C.queries - start_query) & (key_place < C.keys - start_key)
    offset = query_place * STRIDES[1] + key_place * STRIDES[2]
    return tl.load(at + offset, mask=inside, other=0)


@triton.jit
def _logits(
    product,
    x,
    batch,
    head,
    start_query,
    start_key,
    query_length,
    key_length,
    query_segments,
    key_segments,
    AXIS: tl.constexpr,
    EDGE: tl.constexpr,
    C: tl.constexpr,
):
    """A tile's logits given the products, and the slope of the cap, or anything.

    Queries are along `AXIS` of the tile, keys along the other.
    """
    QUERIES: tl.constexpr = product.shape[AXIS]
    KEYS: tl.constexpr = product.shape[1 - AXIS]
    query_place = tl.expand_dims(tl.arange(0, QUERIES), 1 - AXIS)
    key_place = tl.expand_dims(tl.arange(0, KEYS), AXIS)
    s = product
    if C.biased or C.softcap is not None:
        s = s * C.scale
    if C.biased:
        bias = _of_pairs(
            x[BIAS],
            batch,
            head,
            start_query,
            start_key,
            query_place,
            key_place,
            BIAS,
            C,
        )
        bias = bias.to(tl.float32)
        # Of what is hidden so the product may be NaN.
        s = tl.where(bias == float("-inf"), bias, s + bias)
    slope = s
    if C.softcap is not None:
        # tanh, and 1 - tanh^2 without its cancellation.
        e = tl.exp2(tl.abs(s) * (-2.0 * LOG2E / C.softcap))
        inverse = 1.0 / (1.0 + e)
        size = (1.0 - e) * inverse * C.softcap
        slope = 4.0 * e * inverse * inverse
        capped = tl.where(s < 0.0, -size, size)
        s = tl.where(s == float("-inf"), s, capped)
    if EDGE:
        seen = query_place < query_length - start_query
        seen = seen & (key_place < key_length - start_key)
        distance = key_place - query_place
        if C.right is not None:
            seen = seen & (distance <= start_query - start_key + C.right)
        if C.left is not None:
            seen = seen & (distance >= start_query - start_key - C.left)
        s = tl.where(seen, s, float("-inf"))
    if C.segments:
        same = tl.expand_dims(query_segments, 1 - AXIS) == tl.expand_dims(
            key_segments, AXIS
        )
        s = tl.where(same, s, float("-inf"))
    if C.masked:
        mask = _of_pairs(
            x[MASK],
            batch,
            head,
            start_query,
            start_key,
            query_place,
            key_place,
            MASK,
            C,
        )
        s = tl.where(mask != 0, s, float("-inf"))
    return s, slope


@triton.jit
def _powers(s, rows, C: tl.constexpr):
    """exp(logits - rows)."""
    if not C.biased:
        return tl.exp2(s * C.factor - rows)
    else:
        return tl.exp2((s - rows) * C.factor)


@triton.jit
def _probabilities(s, rows, low, AXIS: tl.constexpr, C: tl.constexpr):
    """P of a tile, given the numbers of its queries, which are along `AXIS`."""
    rows = tl.expand_dims(rows, 1 - AXIS)
    if not C.biased:
        return tl.exp2(s * C.factor - rows)
    else:
        return tl.exp2((s - rows) * C.factor - tl.expand_dims(low, 1 - AXIS))


# --- the forward ----------------------------------------------------------------------


@triton.jit
def _forward_tiles(
    sums,
    top,
    total,
    weight,
    q,
    query_segments,
    x,
    key_ptr,
    value_ptr,
    key_segments_ptr,
    batch,
    head,
    start_query,
    query_length,
    key_length,
    begin,
    end,
    EDGE: tl.constexpr,
    C: tl.constexpr,
):
    """What a program has of its queries, after the keys from begin to end."""
    BLOCK: tl.constexpr = C.block_n
    for start in range(begin, end, BLOCK):
        start = tl.multiple_of(start, BLOCK)
        k = _tile(
            key_ptr,
            start,
            key_length,
            C.kv_heads * C.size,
            C.size,
            C.padded_size,
            C.block_n,
            EDGE,
        )
        key_segments = start
        if C.segments:
            key_segments = _numbers(
                key_segments_ptr, start, key_length, C.block_n, EDGE
            )
        s, _ = _logits(
            _dot(q, tl.trans(k), C),
            x,
            batch,
            head,
            start_query,
            start,
            query_length,
            key_length,
            query_segments,
            key_segments,
            0,
            EDGE,
            C,
        )
        largest = tl.max(s, 1)
        if not C.biased:
            largest = largest * C.factor
        new_top = tl.maximum(top, largest)
        # Of a query that has seen nothing yet any number will do.
        m = tl.where(new_top == float("-inf"), 0.0, new_top)
        e = _powers(s, m[:, None], C)
        shrink = tl.exp2((top - m) * C.factor if C.biased else top - m)
        if C.total:
            total = total * shrink + tl.sum(e, 1)
        v = _tile(
            value_ptr,
            start,
            key_length,
            C.kv_heads * C.value_size,
            C.value_size,
            C.padded_value_size,
            C.block_n,
            EDGE,
        )
        weights = e.to(v.dtype)
        if C.rounds:
            weight = weight * shrink + tl.sum(weights.to(tl.float32), 1)
        sums = _add_dot(sums * shrink[:, None], weights, v, C)
        top = new_top
    return sums, top, total, weight


@triton.jit
def _forward(x, out_ptr, low_ptr, lse_ptr, lse_low_ptr, C: tl.constexpr):
    BLOCKS: tl.constexpr = (C.queries + C.block_m - 1) // C.block_m
    program = tl.program_id(0)
    # The last queries first: under `causal` they take longest.
    start_query = (BLOCKS - 1 - program % BLOCKS) * C.block_m
    head = program // BLOCKS % C.heads
    batch = program // BLOCKS // C.heads
    kv_head = head // C.group
    query_length = _length(x, batch, QUERY_LENGTHS, C.queries, C)
    key_length = _length(x, batch, KEY_LENGTHS, C.keys, C)
    q = _tile(
        x[QUERY] + _batch_offset(batch, QUERY, C) + head * C.size,
        start_query,
        query_length,
        C.heads * C.size,
        C.size,
        C.padded_size,
        C.block_m,
        True,
    )
    key_ptr = x[KEY] + _batch_offset(batch, KEY, C) + kv_head * C.size
    value_ptr = x[VALUE] + _batch_offset(batch, VALUE, C) + kv_head * C.value_size
    key_segments_ptr = x[KEY_SEGMENTS]
    query_segments = start_query
    if C.segments:
        key_segments_ptr += _batch_offset(batch, KEY_SEGMENTS, C)
        at = x[QUERY_SEGMENTS] + _batch_offset(batch, QUERY_SEGMENTS, C)
        query_segments = _numbers(at, start_query, query_length, C.block_m, True)

    top = tl.full((C.block_m,), float("-inf"), tl.float32)
    total = tl.full((C.block_m,), 0.0, tl.float32)
    if C.sinks:
        sink = tl.load(x[SINKS] + _batch_offset(batch, SINKS, C) + head)
        top = total + (sink if C.biased else sink * LOG2E)
        total += tl.where(sink == float("-inf"), 0.0, 1.0)
    sink_top = top
    sink_total = total
    weight = total
    sums = tl.full((C.block_m, C.padded_value_size), 0.0, tl.float32)

    begin, whole, whole_end, end = _range(
        start_query,
        start_query + (C.block_m - 1),
        C.left,
        C.right,
        key_length,
        C.block_n,
    )
    # Queries beyond the length see nothing.
    end = tl.where(start_query < query_length, end, begin)
    whole = tl.minimum(whole, end)
    whole_end = tl.maximum(tl.minimum(whole_end, end), whole)
    if C.left is not None:
        sums, top, total, weight = _forward_tiles(
            sums,
            top,
            total,
            weight,
            q,
            query_segments,
            x,
            key_ptr,
            value_ptr,
            key_segments_ptr,
            batch,
            head,
            start_query,
            query_length,
            key_length,
            begin,
            whole,
            True,
            C,
        )
    sums, top, total, weight = _forward_tiles(
        sums,
        top,
        total,
        weight,
        q,
        query_segments,
        x,
        key_ptr,
        value_ptr,
        key_segments_ptr,
        batch,
        head,
        start_query,
        query_length,
        key_length,
        whole,
        whole_end,
        False,
        C,
    )
    if C.right is not None or C.key_lengths or C.keys % C.block_n != 0:
        sums, top, total, weight = _forward_tiles(
            sums,
            top,
            total,
            weight,
            q,
            query_segments,
            x,
            key_ptr,
            value_ptr,
            key_segments_ptr,
            batch,
            head,
            start_query,
            query_length,
            key_length,
            whole_end,
            end,
            True,
            C,
        )

    if not C.rounds:
        weight = total
    if not C.total:
        total = weight
    place = start_query + tl.arange(0, C.block_m)
    if C.query_lengths:
        inside = place < query_length
        top = tl.where(inside, top, sink_top)
        total = tl.where(inside, total, sink_total)
        weight = tl.where(inside, weight, sink_total)
        sums = tl.where(inside[:, None], sums, 0.0)
    out = sums / tl.where(weight == 0.0, 1.0, weight)[:, None]
    rounded = out.to(out_ptr.dtype.element_ty)
    at = (batch.to(tl.int64) * C.queries * C.heads + head) * C.value_size
    _store_tile(
        out_ptr + at,
        rounded,
        start_query,
        C.heads * C.value_size,
        C.value_size,
        C.padded_value_size,
        C.block_m,
        C.queries,
    )
    if C.rounds:
        low = (out - rounded.to(tl.float32)).to(rounded.dtype)
        _store_tile(
            low_ptr + at,
            low,
            start_query,
            C.heads * C.value_size,
            C.value_size,
            C.padded_value_size,
            C.block_m,
            C.queries,
        )
    # 0 keys seen: -inf. The sum is at least 1, or NaN.
    if not C.biased:
        top = top * LN2
    rest = tl.log2(total) * LN2
    lse = top + rest
    part = lse - top
    lse_low = (top - (lse - part)) + (rest - part)  # Knuth's TwoSum
    lse_low = tl.where(tl.abs(lse) < float("inf"), lse_low, 0.0)
    lse = tl.where(top == float("-inf"), top, lse)
    lse = tl.where(total == total, lse, total)
    at = (batch.to(tl.int64) * C.heads + head) * C.queries + place
    tl.store(lse_ptr + at, lse, mask=place < C.queries)
    tl.store(lse_low_ptr + at, lse_low, mask=place < C.queries)


@triton.jit
def jaxsoftmax_attention(
    query_ptr,
    key_ptr,
    value_ptr,
    bias_ptr,
    mask_ptr,
    sinks_ptr,
    query_lengths_ptr,
    key_lengths_ptr,
    query_segments_ptr,
    key_segments_ptr,
    out_ptr,
    low_ptr,
    lse_ptr,
    lse_low_ptr,
    C: tl.constexpr,
):
    """Writes out [B, T, N, Hv] and lse [B, N, T], in float32, with their low digits."""
    x = (
        query_ptr,
        key_ptr,
        value_ptr,
        bias_ptr,
        mask_ptr,
        sinks_ptr,
        query_lengths_ptr,
        key_lengths_ptr,
        query_segments_ptr,
        key_segments_ptr,
    )
    _forward(x, out_ptr, low_ptr, lse_ptr, lse_low_ptr, C)


@triton.jit
def jaxsoftmax_attention_wide(
    query_ptr,
    key_ptr,
    value_ptr,
    bias_ptr,
    mask_ptr,
    sinks_ptr,
    query_lengths_ptr,
    key_lengths_ptr,
    query_segments_ptr,
    key_segments_ptr,
    out_ptr,
    lse_ptr,
    lse_low_ptr,
    C: tl.constexpr,
):
    """The same for float32: out has no low digits."""
    x = (
        query_ptr,
        key_ptr,
        value_ptr,
        bias_ptr,
        mask_ptr,
        sinks_ptr,
        query_lengths_ptr,
        key_lengths_ptr,
        query_segments_ptr,
        key_segments_ptr,
    )
    _forward(x, out_ptr, out_ptr, lse_ptr, lse_low_ptr, C)


# --- the backward ---------------------------------------------------------------------


@triton.jit
def _derivative(p, d_p, center, slope, AXIS: tl.constexpr, EDGE: tl.constexpr, C):
    """Of the products, but for the scale."""
    d_s = p * (d_p - tl.expand_dims(center, 1 - AXIS))
    if C.softcap is not None:
        d_s = d_s * slope
    if EDGE or C.masked or C.segments or C.biased:
        # A probability of 0 has the derivative 0, whatever the values there are.
        d_s = tl.where(p == 0.0, 0.0, d_s)
    return d_s


@triton.jit
def _key_tiles(
    d_k,
    d_v,
    k,
    v,
    key_segments,
    x,
    batch,
    head,
    start_key,
    query_length,
    key_length,
    begin,
    end,
    EDGE: tl.constexpr,
    C: tl.constexpr,
):
    """What a program has of its keys, after the queries from begin to end of a head."""
    query_ptr = x[QUERY] + _batch_offset(batch, QUERY, C) + head * C.size
    d_out_ptr = x[D_OUT] + _batch_offset(batch, D_OUT, C) + head * C.value_size
    of_head = head.to(tl.int64) * C.queries
    rows_ptr = x[ROWS] + _batch_offset(batch, ROWS, C) + of_head
    center_ptr = x[CENTER] + _batch_offset(batch, CENTER, C) + of_head
    low_ptr = x[LOW]
    if C.biased:
        low_ptr += _batch_offset(batch, LOW, C) + of_head
    query_segments_ptr = x[QUERY_SEGMENTS]
    if C.segments:
        query_segments_ptr += _batch_offset(batch, QUERY_SEGMENTS, C)
    BLOCK: tl.constexpr = C.block_m
    for start in range(begin, end, BLOCK):
        start = tl.multiple_of(start, BLOCK)
        q = _tile(
            query_ptr,
            start,
            query_length,
            C.heads * C.size,
            C.size,
            C.padded_size,
            C.block_m,
            EDGE,
        )
        rows = _numbers(rows_ptr, start, query_length, C.block_m, EDGE)
        low = rows
        if C.biased:
            low = _numbers(low_ptr, start, query_length, C.block_m, EDGE)
        query_segments = start
        if C.segments:
            query_segments = _numbers(
                query_segments_ptr, start, query_length, C.block_m, EDGE
            )
        s, slope = _logits(
            _dot(k, tl.trans(q), C),
            x,
            batch,
            head,
            start,
            start_key,
            query_length,
            key_length,
            query_segments,
            key_segments,
            1,
            EDGE,
            C,
        )
        p = _probabilities(s, rows, low, 1, C)
        d_o = _tile(
            d_out_ptr,
            start,
            query_length,
            C.heads * C.value_size,
            C.value_size,
            C.padded_value_size,
            C.block_m,
            EDGE,
        )
        if C.wants_value:
            d_v = _add_dot(d_v, p.to(d_o.dtype), d_o, C)
        if C.wants_key:
            center = _numbers(center_ptr, start, query_length, C.block_m, EDGE)
            d_p = _dot(v, tl.trans(d_o), C)
            d_s = _derivative(p, d_p, center, slope, 1, EDGE, C)
            d_k = _add_dot(d_k, d_s.to(q.dtype), q, C)
    return d_k, d_v


@triton.jit
def jaxsoftmax_attention_gradient_of_keys(
    query_ptr,
    key_ptr,
    value_ptr,
    bias_ptr,
    mask_ptr,
    sinks_ptr,
    query_lengths_ptr,
    key_lengths_ptr,
    query_segments_ptr,
    key_segments_ptr,
    d_out_ptr,
    rows_ptr,
    center_ptr,
    low_ptr,
    d_key_ptr,
    d_value_ptr,
    C: tl.constexpr,
):
    """Writes the gradients of keys and values: of both, or of what is wanted."""
    x = (
        query_ptr,
        key_ptr,
        value_ptr,
        bias_ptr,
        mask_ptr,
        sinks_ptr,
        query_lengths_ptr,
        key_lengths_ptr,
        query_segments_ptr,
        key_segments_ptr,
        d_out_ptr,
        rows_ptr,
        center_ptr,
        low_ptr,
    )
    BLOCKS: tl.constexpr = (C.keys + C.block_n - 1) // C.block_n
    # The first keys first: under `causal` they take longest.
    program = tl.program_id(0)
    start_key = program % BLOCKS * C.block_n
    kv_head = program // BLOCKS % C.kv_heads
    batch = program // BLOCKS // C.kv_heads
    query_length = _length(x, batch, QUERY_LENGTHS, C.queries, C)
    key_length = _length(x, batch, KEY_LENGTHS, C.keys, C)
    k = _tile(
        x[KEY] + _batch_offset(batch, KEY, C) + kv_head * C.size,
        start_key,
        key_length,
        C.kv_heads * C.size,
        C.size,
        C.padded_size,
        C.block_n,
        True,
    )
    v = _tile(
        x[VALUE] + _batch_offset(batch, VALUE, C) + kv_head * C.value_size,
        start_key,
        key_length,
        C.kv_heads * C.value_size,
        C.value_size,
        C.padded_value_size,
        C.block_n,
        True,
    )
    key_segments = start_key
    if C.segments:
        at = x[KEY_SEGMENTS] + _batch_offset(batch, KEY_SEGMENTS, C)
        key_segments = _numbers(at, start_key, key_length, C.block_n, True)
    d_k = tl.full((C.block_n, C.padded_size), 0.0, tl.float32)
    d_v = tl.full((C.block_n, C.padded_value_size), 0.0, tl.float32)
    # A query sees up to `C.right` keys after its place: a key is seen by as many
    # queries before its own.
    begin, whole, whole_end, end = _range(
        start_key, start_key + (C.block_n - 1), C.right, C.left, query_length, C.block_m
    )
    end = tl.where(start_key < key_length, end, begin)
    whole = tl.minimum(whole, end)
    whole_end = tl.maximum(tl.minimum(whole_end, end), whole)
    for member in range(C.group):
        head = kv_head * C.group + member
        if C.right is not None:
            d_k, d_v = _key_tiles(
                d_k,
                d_v,
                k,
                v,
                key_segments,
                x,
                batch,
                head,
                start_key,
                query_length,
                key_length,
                begin,
                whole,
                True,
                C,
            )
        d_k, d_v = _key_tiles(
            d_k,
            d_v,
            k,
            v,
            key_segments,
            x,
            batch,
            head,
            start_key,
            query_length,
            key_length,
            whole,
            whole_end,
            False,
            C,
        )
        if C.left is not None or C.query_lengths or C.queries % C.block_m != 0:
            d_k, d_v = _key_tiles(
                d_k,
                d_v,
                k,
                v,
                key_segments,
                x,
                batch,
                head,
                start_key,
                query_length,
                key_length,
                whole_end,
                end,
                True,
                C,
            )
    inside = (start_key + tl.arange(0, C.block_n) < key_length)[:, None]
    if C.wants_key:
        at = (batch.to(tl.int64) * C.keys * C.kv_heads + kv_head) * C.size
        d_k = tl.where(inside, d_k * C.scale, 0.0).to(d_key_ptr.dtype.element_ty)
        _store_tile(
            d_key_ptr + at,
            d_k,
            start_key,
            C.kv_heads * C.size,
            C.size,
            C.padded_size,
            C.block_n,
            C.keys,
        )
    if C.wants_value:
        at = (batch.to(tl.int64) * C.keys * C.kv_heads + kv_head) * C.value_size
        d_v = tl.where(inside, d_v, 0.0).to(d_value_ptr.dtype.element_ty)
        _store_tile(
            d_value_ptr + at,
            d_v,
            start_key,
            C.kv_heads * C.value_size,
            C.value_size,
            C.padded_value_size,
            C.block_n,
            C.keys,
        )


@triton.jit
def _query_tiles(
    d_q,
    q,
    d_o,
    rows,
    low,
    center,
    query_segments,
    x,
    key_ptr,
    value_ptr,
    key_segments_ptr,
    batch,
    head,
    start_query,
    query_length,
    key_length,
    begin,
    end,
    EDGE: tl.constexpr,
    C: tl.constexpr,
):
    """What a program has of its queries, after the keys from begin to end."""
    BLOCK: tl.constexpr = C.block_n
    for start in range(begin, end, BLOCK):
        start = tl.multiple_of(start, BLOCK)
        k = _tile(
            key_ptr,
            start,
            key_length,
            C.kv_heads * C.size,
            C.size,
            C.padded_size,
            C.block_n,
            EDGE,
        )
        key_segments = start
        if C.segments:
            key_segments = _numbers(
                key_segments_ptr, start, key_length, C.block_n, EDGE
            )
        s, slope = _logits(
            _dot(q, tl.trans(k), C),
            x,
            batch,
            head,
            start_query,
            start,
            query_length,
            key_length,
            query_segments,
            key_segments,
            0,
            EDGE,
            C,
        )
        p = _probabilities(s, rows, low, 0, C)
        v = _tile(
            value_ptr,
            start,
            key_length,
            C.kv_heads * C.value_size,
            C.value_size,
            C.padded_value_size,
            C.block_n,
            EDGE,
        )
        d_p = _dot(d_o, tl.trans(v), C)
        d_s = _derivative(p, d_p, center, slope, 0, EDGE, C)
        d_q = _add_dot(d_q, d_s.to(k.dtype), k, C)
    return d_q


@triton.jit
def jaxsoftmax_attention_gradient_of_queries(
    query_ptr,
    key_ptr,
    value_ptr,
    bias_ptr,
    mask_ptr,
    sinks_ptr,
    query_lengths_ptr,
    key_lengths_ptr,
    query_segments_ptr,
    key_segments_ptr,
    d_out_ptr,
    rows_ptr,
    center_ptr,
    low_ptr,
    d_query_ptr,
    C: tl.constexpr,
):
    """Writes the gradient of the queries."""
    x = (
        query_ptr,
        key_ptr,
        value_ptr,
        bias_ptr,
        mask_ptr,
        sinks_ptr,
        query_lengths_ptr,
        key_lengths_ptr,
        query_segments_ptr,
        key_segments_ptr,
        d_out_ptr,
        rows_ptr,
        center_ptr,
        low_ptr,
    )
    BLOCKS: tl.constexpr = (C.queries + C.block_m - 1) // C.block_m
    program = tl.program_id(0)
    start_query = (BLOCKS - 1 - program % BLOCKS) * C.block_m
    head = program // BLOCKS % C.heads
    batch = program // BLOCKS // C.heads
    kv_head = head // C.group
    query_length = _length(x, batch, QUERY_LENGTHS, C.queries, C)
    key_length = _length(x, batch, KEY_LENGTHS, C.keys, C)
    q = _tile(
        x[QUERY] + _batch_offset(batch, QUERY, C) + head * C.size,
        start_query,
        query_length,
        C.heads * C.size,
        C.size,
        C.padded_size,
        C.block_m,
        True,
    )
    d_o = _tile(
        x[D_OUT] + _batch_offset(batch, D_OUT, C) + head * C.value_size,
        start_query,
        query_length,
        C.heads * C.value_size,
        C.value_size,
        C.padded_value_size,
        C.block_m,
        True,
    )
    at = head.to(tl.int64) * C.queries
    rows = _numbers(
        x[ROWS] + _batch_offset(batch, ROWS, C) + at,
        start_query,
        query_length,
        C.block_m,
        True,
    )
    low = rows
    if C.biased:
        low = _numbers(
            x[LOW] + _batch_offset(batch, LOW, C) + at,
            start_query,
            query_length,
            C.block_m,
            True,
        )
    center = _numbers(
        x[CENTER] + _batch_offset(batch, CENTER, C) + at,
        start_query,
        query_length,
        C.block_m,
        True,
    )
    key_ptr = x[KEY] + _batch_offset(batch, KEY, C) + kv_head * C.size
    value_ptr = x[VALUE] + _batch_offset(batch, VALUE, C) + kv_head * C.value_size
    key_segments_ptr = x[KEY_SEGMENTS]
    query_segments = start_query
    if C.segments:
        key_segments_ptr += _batch_offset(batch, KEY_SEGMENTS, C)
        at = x[QUERY_SEGMENTS] + _batch_offset(batch, QUERY_SEGMENTS, C)
        query_segments = _numbers(at, start_query, query_length, C.block_m, True)
    d_q = tl.full((C.block_m, C.padded_size), 0.0, tl.float32)
    begin, whole, whole_end, end = _range(
        start_query,
        start_query + (C.block_m - 1),
        C.left,
        C.right,
        key_length,
        C.block_n,
    )
    end = tl.where(start_query < query_length, end, begin)
    whole = tl.minimum(whole, end)
    whole_end = tl.maximum(tl.minimum(whole_end, end), whole)
    if C.left is not None:
        d_q = _query_tiles(
            d_q,
            q,
            d_o,
            rows,
            low,
            center,
            query_segments,
            x,
            key_ptr,
            value_ptr,
            key_segments_ptr,
            batch,
            head,
            start_query,
            query_length,
            key_length,
            begin,
            whole,
            True,
            C,
        )
    d_q = _query_tiles(
        d_q,
        q,
        d_o,
        rows,
        low,
        center,
        query_segments,
        x,
        key_ptr,
        value_ptr,
        key_segments_ptr,
        batch,
        head,
        start_query,
        query_length,
        key_length,
        whole,
        whole_end,
        False,
        C,
    )
    if C.right is not None or C.key_lengths or C.keys % C.block_n != 0:
        d_q = _query_tiles(
            d_q,
            q,
            d_o,
            rows,
            low,
            center,
            query_segments,
            x,
            key_ptr,
            value_ptr,
            key_segments_ptr,
            batch,
            head,
            start_query,
            query_length,
            key_length,
            whole_end,
            end,
            True,
            C,
        )
    if C.query_lengths:
        inside = start_query + tl.arange(0, C.block_m) < query_length
        d_q = tl.where(inside[:, None], d_q, 0.0)
    d_q = (d_q * C.scale).to(d_query_ptr.dtype.element_ty)
    at = (batch.to(tl.int64) * C.queries * C.heads + head) * C.size
    _store_tile(
        d_query_ptr + at,
        d_q,
        start_query,
        C.heads * C.size,
        C.size,
        C.padded_size,
        C.block_m,
        C.queries,
    )
