"""The Triton programs of `_attend.triton`; importing it imports triton.

Four kernels. Each computes the logits anew, a tile of queries and keys of one head at
a time, and none writes them:

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
- `jaxsoftmax_attention_pushforward`: a program owns some queries, reads the keys and
  values again, and their tangents, and writes the tangents of output and lse. Of
  tangents that are not there it has neither reads nor products.

So every result is written once, by one program, and nothing is added up in memory.

A program reads its tiles in three loops: those at one end of what `causal`, a window or
a length leaves, those that lie within, and those at the other end. Only at the ends are
places compared. Masks, segment ids and a bias count in every tile.

Logits are stored as products where nothing but the scale is applied to them: `C.factor`
makes exponents to the base 2 of them. The logit of a hidden pair is -inf. `rows` is the
lse of each query, or 0 where that is -inf; without a bias to the base 2.

With a bias, all logits of a query may share a number that is large beside their
differences, as large as the lowest float: the difference of a logit and a maximum, or
lse, is taken first, and then to the base 2, and `low` is what rounding took off lse, to
the base 2. Products of that size have errors as large as what lse lost: without a bias
there is no need of it, and one instruction less for each logit.

`C` is a `_attend.triton.Program`: all that is known when a program is compiled. It is
passed whole, and a tile by its place: to Triton before 3.9 an attribute of a constant
is no constant, as an argument. `x` is a tuple of pointers in the order of
`C.batch_strides`, with any pointer in the place of an absent one. `at` is a batch
entry, a head there, and the offset of its queries that is no constant (those that are,
`C.left` and `C.right` have). `queries` and `keys` of a tile are where it starts, how
many there are in all, and its segment ids.
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
OFFSETS = tl.constexpr(10)
D_OUT = tl.constexpr(11)
ROWS = tl.constexpr(12)
CENTER = tl.constexpr(13)
LOW = tl.constexpr(14)
# In forward mode the output is in the place of its cotangent, and what rounding took
# off it in that of the center.
OUT = tl.constexpr(11)
OUT_LOW = tl.constexpr(13)
QUERY_DOT = tl.constexpr(15)
KEY_DOT = tl.constexpr(16)
VALUE_DOT = tl.constexpr(17)
BIAS_DOT = tl.constexpr(18)
SINKS_DOT = tl.constexpr(19)


# --- places ---------------------------------------------------------------------------


@triton.jit
def _batch_entry(x, batch, ARRAY: tl.constexpr, C: tl.constexpr):
    """Where a batch entry begins: the digits of its number times the strides."""
    STRIDES: tl.constexpr = C.batch_strides[ARRAY]
    offset = batch.to(tl.int64) * 0
    for k in tl.static_range(len(STRIDES)):
        digit = batch
        if k < len(C.batch_sizes):
            digit = batch % C.batch_sizes[k]
            batch = batch // C.batch_sizes[k]
        if STRIDES[k] != 0:
            offset += digit.to(tl.int64) * STRIDES[k]
    return x[ARRAY] + offset


@triton.jit
def _length(x, batch, ARRAY: tl.constexpr, GIVEN, PLACES: tl.constexpr, C):
    """How many queries or keys a batch entry has."""
    length = batch * 0 + PLACES
    if GIVEN:
        given = tl.load(_batch_entry(x, batch, ARRAY, C))
        length = tl.maximum(tl.minimum(given, PLACES), 0)
    return length


@triton.jit
def _range(
    first, last, BEFORE: tl.constexpr, AFTER: tl.constexpr, limit, BLOCK: tl.constexpr
):
    """The places that those from first to last meet: begin, whole, whole_end, end.

    A place meets those up to `BEFORE` places before it and `AFTER` after it (None: any
    number), below `limit`. From whole to whole_end, in tiles of `BLOCK`, each is met by
    all from first to last.
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
        begin = tl.minimum(tl.maximum(first - BEFORE, 0) // BLOCK * BLOCK, end)
        whole = tl.maximum(last - BEFORE, 0) + (BLOCK - 1)
        whole = tl.minimum(whole // BLOCK * BLOCK, end)
    whole_end = tl.maximum(tl.minimum(whole_end, end), whole)
    return begin, whole, whole_end, end


@triton.jit
def _base(x, at, ARRAY: tl.constexpr, C: tl.constexpr):
    """Where the tiles of a head begin, in an array with heads."""
    return _batch_entry(x, at[0], ARRAY, C) + at[1] * C.tiles[ARRAY].size


@triton.jit
def _row_base(x, at, ARRAY: tl.constexpr, C: tl.constexpr):
    """Where the numbers of a head's queries begin."""
    return _batch_entry(x, at[0], ARRAY, C) + at[1].to(tl.int64) * C.q.places


@triton.jit
def _entries(base, start, T: tl.constexpr):
    """Pointers to the entries of a tile `T`, their places and their columns.

    `base + start * stride` stays a scalar pointer, and the offsets within the tile
    int32: a tile of int64 offsets takes a third more registers.
    """
    place = tl.arange(0, T.block)
    column = tl.arange(0, T.padded_size)
    first = base + start.to(tl.int64) * T.stride
    pointers = first + (place[:, None] * T.stride + column[None, :])
    return pointers, start + place, column


@triton.jit
def _tile(base, start, limit, ARRAY: tl.constexpr, EDGE: tl.constexpr, C: tl.constexpr):
    """The tile at a place: 0 beyond the size of a head, at an edge beyond `limit`."""
    T: tl.constexpr = C.tiles[ARRAY]
    pointers, place, column = _entries(base, start, T)
    if EDGE and T.size != T.padded_size:
        inside = (place < limit)[:, None] & (column < T.size)[None, :]
        return tl.load(pointers, mask=inside, other=0.0)
    elif EDGE:
        return tl.load(pointers, mask=(place < limit)[:, None], other=0.0)
    elif T.size != T.padded_size:
        return tl.load(pointers, mask=(column < T.size)[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def _store_tile(pointer, value, at, start, ARRAY: tl.constexpr, C: tl.constexpr):
    """Writes what lies within a contiguous array that has the shape of `ARRAY`."""
    batch, head, _offset = at
    T: tl.constexpr = C.tiles[ARRAY]
    first = (batch.to(tl.int64) * T.places * T.heads + head) * T.size
    pointers, place, column = _entries(pointer + first, start, T)
    inside = (place < T.places)[:, None] & (column < T.size)[None, :]
    tl.store(pointers, value.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def _numbers(pointer, start, limit, BLOCK: tl.constexpr, EDGE: tl.constexpr):
    """[BLOCK] from a place on; 0 beyond `limit` at an edge."""
    place = start + tl.arange(0, BLOCK)
    if EDGE:
        return tl.load(pointer + place, mask=place < limit, other=0)
    else:
        return tl.load(pointer + place)


@triton.jit
def _numbers_if(GIVEN, pointer, start, limit, BLOCK: tl.constexpr, EDGE: tl.constexpr):
    """`_numbers`; where there are none, what nothing uses."""
    if GIVEN:
        return _numbers(pointer, start, limit, BLOCK, EDGE)
    else:
        return start


@triton.jit
def _dot(a, b, C: tl.constexpr, total=None):
    return tl.dot(a, b, total, input_precision=C.precision)


# --- what a program owns, and what it loops over --------------------------------------


@triton.jit
def _own(x, ARRAY: tl.constexpr, C: tl.constexpr):
    """A program's tile of an array, where that is, and the lengths there."""
    T: tl.constexpr = C.tiles[ARRAY]
    program = tl.program_id(0)
    batch = program // T.blocks // T.heads
    query_length = _length(x, batch, QUERY_LENGTHS, C.query_lengths, C.q.places, C)
    key_length = _length(x, batch, KEY_LENGTHS, C.key_lengths, C.k.places, C)
    offset = batch * 0
    if C.offsets:
        offset = tl.load(_batch_entry(x, batch, OFFSETS, C))
    at = (batch, program // T.blocks % T.heads, offset)
    return program % T.blocks, at, query_length, key_length


@triton.jit
def _own_queries(x, C: tl.constexpr):
    """A program's queries, where they are, and how many keys are there."""
    block, at, query_length, key_length = _own(x, QUERY, C)
    # The last queries first: under `causal` they take longest.
    start = (C.q.blocks - 1 - block) * C.q.block
    base = _batch_entry(x, at[0], QUERY_SEGMENTS, C)
    ids = _numbers_if(C.segments, base, start, query_length, C.q.block, True)
    return (start, query_length, ids), at, key_length


@triton.jit
def _bounds(own, moved, limit, BEFORE: tl.constexpr, AFTER: tl.constexpr, OWN, BLOCK):
    """The bounds of the three loops over what a program's `OWN` places meet.

    `moved` is added to these places.
    """
    start, length, _ids = own
    first = start + moved
    begin, whole, whole_end, end = _range(
        first, first + (OWN - 1), BEFORE, AFTER, limit, BLOCK
    )
    # Places beyond the length meet nothing.
    end = tl.where(start < length, end, begin)
    whole = tl.minimum(whole, end)
    whole_end = tl.maximum(tl.minimum(whole_end, end), whole)
    return begin, whole, whole_end, end


# --- logits ---------------------------------------------------------------------------


@triton.jit
def _pair_tile(x, at, starts, places, ARRAY: tl.constexpr, C: tl.constexpr):
    """A tile of the bias, its tangent or the mask; `places` are within the tile."""
    batch, head, _offset = at
    start_query, start_key = starts
    query_place, key_place = places
    STRIDES: tl.constexpr = C.pair_strides[1 if ARRAY == MASK else 0]
    base = _batch_entry(x, batch, ARRAY, C) + head.to(tl.int64) * STRIDES[0]
    base += start_query.to(tl.int64) * STRIDES[1] + start_key.to(tl.int64) * STRIDES[2]
    inside = (query_place < C.q.places - start_query) & (
        key_place < C.k.places - start_key
    )
    offset = query_place * STRIDES[1] + key_place * STRIDES[2]
    return tl.load(base + offset, mask=inside, other=0)


@triton.jit
def _logits(product, x, at, queries, keys, AXIS: tl.constexpr, EDGE: tl.constexpr, C):
    """A tile's logits, from the products, and the slope of the cap if there is one.

    Queries are along `AXIS` of the tile, keys along the other.
    """
    start_query, query_length, query_segments = queries
    start_key, key_length, key_segments = keys
    query_place = tl.expand_dims(tl.arange(0, product.shape[AXIS]), 1 - AXIS)
    key_place = tl.expand_dims(tl.arange(0, product.shape[1 - AXIS]), AXIS)
    starts = (start_query, start_key)
    places = (query_place, key_place)
    s = product
    if C.biased or C.softcap is not None:
        s = s * C.scale
    if C.biased:
        bias = _pair_tile(x, at, starts, places, BIAS, C).to(tl.float32)
        # The product of a hidden pair may be NaN.
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
        visible = query_place < query_length - start_query
        visible = visible & (key_place < key_length - start_key)
        distance = key_place - query_place
        between = start_query + at[2] - start_key
        if C.right is not None:
            visible = visible & (distance <= between + C.right)
        if C.left is not None:
            visible = visible & (distance >= between - C.left)
        s = tl.where(visible, s, float("-inf"))
    if C.segments:
        ids = tl.expand_dims(query_segments, 1 - AXIS)
        s = tl.where(ids == tl.expand_dims(key_segments, AXIS), s, float("-inf"))
    if C.masked:
        mask = _pair_tile(x, at, starts, places, MASK, C)
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
    """P of a tile, from the numbers of its queries, which are along `AXIS`."""
    rows = tl.expand_dims(rows, 1 - AXIS)
    if not C.biased:
        return tl.exp2(s * C.factor - rows)
    else:
        return tl.exp2((s - rows) * C.factor - tl.expand_dims(low, 1 - AXIS))


# --- the forward ----------------------------------------------------------------------


@triton.jit
def _forward_tiles(carry, q, x, at, queries, key_length, bounds, PART, C: tl.constexpr):
    """The carry of a program's queries after one of its loops over keys."""
    sums, top, total, weight = carry
    batch, head, _offset = at
    kv_at = (batch, head // C.group)
    key_base = _base(x, kv_at, KEY, C)
    value_base = _base(x, kv_at, VALUE, C)
    segment_base = _batch_entry(x, batch, KEY_SEGMENTS, C)
    BLOCK: tl.constexpr = C.k.block
    EDGE: tl.constexpr = PART != 1
    for start in range(bounds[PART], bounds[PART + 1], BLOCK):
        start = tl.multiple_of(start, BLOCK)
        k = _tile(key_base, start, key_length, KEY, EDGE, C)
        ids = _numbers_if(C.segments, segment_base, start, key_length, BLOCK, EDGE)
        keys = (start, key_length, ids)
        s, _ = _logits(_dot(q, tl.trans(k), C), x, at, queries, keys, 0, EDGE, C)
        largest = tl.max(s, 1)
        if not C.biased:
            largest = largest * C.factor
        new_top = tl.maximum(top, largest)
        # For a query that has seen nothing yet any finite number will do.
        m = tl.where(new_top == float("-inf"), 0.0, new_top)
        e = _powers(s, m[:, None], C)
        shrink = tl.exp2((top - m) * C.factor if C.biased else top - m)
        if C.total:
            total = total * shrink + tl.sum(e, 1)
        v = _tile(value_base, start, key_length, VALUE, EDGE, C)
        weights = e.to(v.dtype)
        if C.rounds:
            weight = weight * shrink + tl.sum(weights.to(tl.float32), 1)
        sums = _dot(weights, v, C, sums * shrink[:, None])
        top = new_top
    return sums, top, total, weight


@triton.jit
def _store_lse(top, total, entry, place, lse_ptr, lse_low_ptr, C: tl.constexpr):
    """Writes lse and what rounding took off it; -inf where no key is seen."""
    rest = tl.log2(total) * LN2
    lse = top + rest
    part = lse - top
    lse_low = (top - (lse - part)) + (rest - part)  # Knuth's TwoSum
    lse_low = tl.where(tl.abs(lse) < float("inf"), lse_low, 0.0)
    # The sum is at least 1, or NaN, where a key is seen.
    lse = tl.where(top == float("-inf"), top, lse)
    lse = tl.where(total == total, lse, total)
    tl.store(lse_ptr + entry, lse, mask=place < C.q.places)
    tl.store(lse_low_ptr + entry, lse_low, mask=place < C.q.places)


@triton.jit
def jaxsoftmax_attention(
    q,
    k,
    v,
    bias,
    mask,
    sinks,
    q_lengths,
    k_lengths,
    q_segments,
    k_segments,
    offsets,
    out,
    lse,
    lse_low,
    tops,
    low,
    C: tl.constexpr,
):
    """Writes out [B, T, N, Hv] and lse [B, N, T], each with its low digits.

    `tops` are the maxima of the logits, and the sink, of the queries, [B, N, T]. `low`
    is what rounding to 16 bits takes off `out`; None for float32.
    """
    x = (q, k, v, bias, mask, sinks, q_lengths, k_lengths, q_segments, k_segments)
    x += (offsets,)
    queries, at, key_length = _own_queries(x, C)
    start, query_length, _ids = queries
    batch, head, _offset = at
    q_tile = _tile(_base(x, at, QUERY, C), start, query_length, QUERY, True, C)
    top = tl.full((C.q.block,), float("-inf"), tl.float32)
    total = tl.full((C.q.block,), 0.0, tl.float32)
    if C.sinks:
        sink = tl.load(_batch_entry(x, batch, SINKS, C) + head)
        top = total + (sink if C.biased else sink * LOG2E)
        total += tl.where(sink == float("-inf"), 0.0, 1.0)
    sink_top = top
    sink_total = total
    sums = tl.full((C.q.block, C.v.padded_size), 0.0, tl.float32)
    carry = (sums, top, total, total)
    bounds = _bounds(queries, at[2], key_length, C.left, C.right, C.q.block, C.k.block)
    for part in tl.static_range(3):
        if C.key_loops[part]:
            carry = _forward_tiles(
                carry, q_tile, x, at, queries, key_length, bounds, part, C
            )
    sums, top, total, weight = carry
    if not C.rounds:
        weight = total
    if not C.total:
        total = weight
    place = start + tl.arange(0, C.q.block)
    if C.query_lengths:
        inside = place < query_length
        top = tl.where(inside, top, sink_top)
        total = tl.where(inside, total, sink_total)
        weight = tl.where(inside, weight, sink_total)
        sums = tl.where(inside[:, None], sums, 0.0)
    wide = sums / tl.where(weight == 0.0, 1.0, weight)[:, None]
    rounded = wide.to(out.dtype.element_ty)
    _store_tile(out, rounded, at, start, D_OUT, C)
    if C.rounds:
        _store_tile(low, wide - rounded.to(tl.float32), at, start, D_OUT, C)
    if not C.biased:
        top = top * LN2
    entry = (batch.to(tl.int64) * C.q.heads + head) * C.q.places + place
    tl.store(tops + entry, top, mask=place < C.q.places)
    _store_lse(top, total, entry, place, lse, lse_low, C)


# --- the backward ---------------------------------------------------------------------


@triton.jit
def _derivative(p, d_p, center, slope, AXIS: tl.constexpr, EDGE: tl.constexpr, C):
    """The derivative of the products, less the scale."""
    d_s = p * (d_p - tl.expand_dims(center, 1 - AXIS))
    if C.softcap is not None:
        d_s = d_s * slope
    if EDGE or C.masked or C.segments or C.biased:
        # A probability of 0 has the derivative 0, whatever the values there are.
        d_s = tl.where(p == 0.0, 0.0, d_s)
    return d_s


@triton.jit
def _key_tiles(carry, own, x, at, keys, query_length, bounds, PART, C: tl.constexpr):
    """The gradients of a program's keys after one of its loops over queries."""
    d_k, d_v = carry
    k, v = own
    query_base = _base(x, at, QUERY, C)
    d_out_base = _base(x, at, D_OUT, C)
    rows_base = _row_base(x, at, ROWS, C)
    center_base = _row_base(x, at, CENTER, C)
    low_base = _row_base(x, at, LOW, C)
    segment_base = _batch_entry(x, at[0], QUERY_SEGMENTS, C)
    BLOCK: tl.constexpr = C.q.block
    EDGE: tl.constexpr = PART != 1
    for start in range(bounds[PART], bounds[PART + 1], BLOCK):
        start = tl.multiple_of(start, BLOCK)
        q = _tile(query_base, start, query_length, QUERY, EDGE, C)
        rows = _numbers(rows_base, start, query_length, BLOCK, EDGE)
        low = _numbers_if(C.biased, low_base, start, query_length, BLOCK, EDGE)
        ids = _numbers_if(C.segments, segment_base, start, query_length, BLOCK, EDGE)
        queries = (start, query_length, ids)
        s, slope = _logits(_dot(k, tl.trans(q), C), x, at, queries, keys, 1, EDGE, C)
        p = _probabilities(s, rows, low, 1, C)
        d_o = _tile(d_out_base, start, query_length, D_OUT, EDGE, C)
        if C.wants_value:
            d_v = _dot(p.to(d_o.dtype), d_o, C, d_v)
        if C.wants_key:
            center = _numbers(center_base, start, query_length, BLOCK, EDGE)
            d_p = _dot(v, tl.trans(d_o), C)
            d_s = _derivative(p, d_p, center, slope, 1, EDGE, C)
            d_k = _dot(d_s.to(q.dtype), q, C, d_k)
    return d_k, d_v


@triton.jit
def jaxsoftmax_attention_gradient_of_keys(
    q,
    k,
    v,
    bias,
    mask,
    sinks,
    q_lengths,
    k_lengths,
    q_segments,
    k_segments,
    offsets,
    d_out,
    rows,
    center,
    low,
    d_key,
    d_value,
    C: tl.constexpr,
):
    """Writes the gradients of keys and values: of both, or of what is wanted."""
    x = (q, k, v, bias, mask, sinks, q_lengths, k_lengths, q_segments, k_segments)
    x += (offsets, d_out, rows, center, low)
    # The first keys first: under `causal` they take longest.
    block, at, query_length, key_length = _own(x, KEY, C)
    start = block * C.k.block
    k_tile = _tile(_base(x, at, KEY, C), start, key_length, KEY, True, C)
    v_tile = _tile(_base(x, at, VALUE, C), start, key_length, VALUE, True, C)
    segment_base = _batch_entry(x, at[0], KEY_SEGMENTS, C)
    ids = _numbers_if(C.segments, segment_base, start, key_length, C.k.block, True)
    own, keys = (k_tile, v_tile), (start, key_length, ids)
    d_k = tl.full((C.k.block, C.q.padded_size), 0.0, tl.float32)
    d_v = tl.full((C.k.block, C.v.padded_size), 0.0, tl.float32)
    carry = (d_k, d_v)
    # A query sees up to `C.right` keys after its place: a key is seen by as many
    # queries before its own.
    bounds = _bounds(keys, -at[2], query_length, C.right, C.left, C.k.block, C.q.block)
    for member in range(C.group):
        q_at = (at[0], at[1] * C.group + member, at[2])
        for part in tl.static_range(3):
            if C.query_loops[part]:
                carry = _key_tiles(
                    carry, own, x, q_at, keys, query_length, bounds, part, C
                )
    d_k, d_v = carry
    inside = (start + tl.arange(0, C.k.block) < key_length)[:, None]
    if C.wants_key:
        _store_tile(d_key, tl.where(inside, d_k * C.scale, 0.0), at, start, KEY, C)
    if C.wants_value:
        _store_tile(d_value, tl.where(inside, d_v, 0.0), at, start, VALUE, C)


@triton.jit
def _query_tiles(d_q, own, x, at, queries, key_length, bounds, PART, C: tl.constexpr):
    """The gradient of a program's queries after one of its loops over keys."""
    q, d_o, rows, low, center = own
    batch, head, _offset = at
    kv_at = (batch, head // C.group)
    key_base = _base(x, kv_at, KEY, C)
    value_base = _base(x, kv_at, VALUE, C)
    segment_base = _batch_entry(x, batch, KEY_SEGMENTS, C)
    BLOCK: tl.constexpr = C.k.block
    EDGE: tl.constexpr = PART != 1
    for start in range(bounds[PART], bounds[PART + 1], BLOCK):
        start = tl.multiple_of(start, BLOCK)
        k = _tile(key_base, start, key_length, KEY, EDGE, C)
        ids = _numbers_if(C.segments, segment_base, start, key_length, BLOCK, EDGE)
        keys = (start, key_length, ids)
        s, slope = _logits(_dot(q, tl.trans(k), C), x, at, queries, keys, 0, EDGE, C)
        p = _probabilities(s, rows, low, 0, C)
        v = _tile(value_base, start, key_length, VALUE, EDGE, C)
        d_p = _dot(d_o, tl.trans(v), C)
        d_s = _derivative(p, d_p, center, slope, 0, EDGE, C)
        d_q = _dot(d_s.to(k.dtype), k, C, d_q)
    return d_q


@triton.jit
def jaxsoftmax_attention_gradient_of_queries(
    q,
    k,
    v,
    bias,
    mask,
    sinks,
    q_lengths,
    k_lengths,
    q_segments,
    k_segments,
    offsets,
    d_out,
    rows,
    center,
    low,
    d_query,
    C: tl.constexpr,
):
    """Writes the gradient of the queries."""
    x = (q, k, v, bias, mask, sinks, q_lengths, k_lengths, q_segments, k_segments)
    x += (offsets, d_out, rows, center, low)
    queries, at, key_length = _own_queries(x, C)
    start, length, _ids = queries
    row_numbers = _numbers(_row_base(x, at, ROWS, C), start, length, C.q.block, True)
    own = (
        _tile(_base(x, at, QUERY, C), start, length, QUERY, True, C),
        _tile(_base(x, at, D_OUT, C), start, length, D_OUT, True, C),
        row_numbers,
        _numbers_if(C.biased, _row_base(x, at, LOW, C), start, length, C.q.block, True),
        _numbers(_row_base(x, at, CENTER, C), start, length, C.q.block, True),
    )
    d_q = tl.full((C.q.block, C.q.padded_size), 0.0, tl.float32)
    bounds = _bounds(queries, at[2], key_length, C.left, C.right, C.q.block, C.k.block)
    for part in tl.static_range(3):
        if C.key_loops[part]:
            d_q = _query_tiles(d_q, own, x, at, queries, key_length, bounds, part, C)
    if C.query_lengths:
        inside = start + tl.arange(0, C.q.block) < length
        d_q = tl.where(inside[:, None], d_q, 0.0)
    _store_tile(d_query, d_q * C.scale, at, start, QUERY, C)


# --- forward mode ---------------------------------------------------------------------


@triton.jit
def _logits_dot(own, k, x, at, queries, keys, slope, EDGE: tl.constexpr, C):
    """The tangent of a tile's logits."""
    q, q_dot = own
    batch, head, _offset = at
    start_query, _length, _ids = queries
    start_key, key_length, _key_ids = keys
    t = tl.full((C.q.block, C.k.block), 0.0, tl.float32)
    if C.wants_query:
        t = _dot(q_dot, tl.trans(k), C)
    if C.wants_key:
        base = _base(x, (batch, head // C.group), KEY_DOT, C)
        k_dot = _tile(base, start_key, key_length, KEY_DOT, EDGE, C)
        t = _dot(q, tl.trans(k_dot), C, t)
    t = t * C.scale
    if C.wants_bias:
        query_place = tl.arange(0, C.q.block)[:, None]
        key_place = tl.arange(0, C.k.block)[None, :]
        starts, places = (start_query, start_key), (query_place, key_place)
        t += _pair_tile(x, at, starts, places, BIAS_DOT, C).to(tl.float32)
    if C.softcap is not None:
        t = t * slope
    return t


@triton.jit
def _pushed_tiles(
    carry, own, numbers, x, at, queries, key_length, bounds, PART, C: tl.constexpr
):
    """The carry of a program's queries after one of its loops over keys.

    The pivot of a query is the mean of the logits' tangents in the first tile where the
    query has a probability: what all of them share is not in the rates then.
    """
    sums, mass, moment, shift, pivot = carry
    q, _q_dot = own
    rows, low = numbers
    batch, head, _offset = at
    kv_at = (batch, head // C.group)
    key_base = _base(x, kv_at, KEY, C)
    value_base = _base(x, kv_at, VALUE, C)
    value_dot_base = _base(x, kv_at, VALUE_DOT, C)
    segment_base = _batch_entry(x, batch, KEY_SEGMENTS, C)
    BLOCK: tl.constexpr = C.k.block
    EDGE: tl.constexpr = PART != 1
    for start in range(bounds[PART], bounds[PART + 1], BLOCK):
        start = tl.multiple_of(start, BLOCK)
        k = _tile(key_base, start, key_length, KEY, EDGE, C)
        ids = _numbers_if(C.segments, segment_base, start, key_length, BLOCK, EDGE)
        keys = (start, key_length, ids)
        s, slope = _logits(_dot(q, tl.trans(k), C), x, at, queries, keys, 0, EDGE, C)
        p = _probabilities(s, rows, low, 0, C)
        if C.logits_move:
            t = _logits_dot(own, k, x, at, queries, keys, slope, EDGE, C)
            if EDGE or C.masked or C.segments or C.biased:
                t = tl.where(p == 0.0, 0.0, t)
            part, part_moment = tl.sum(p, 1), tl.sum(p * t, 1)
            mean = part_moment / tl.where(part == 0.0, 1.0, part)
            pivot = tl.where(mass == 0.0, mean, pivot)
            mass += part
            moment += part_moment
            v = _tile(value_base, start, key_length, VALUE, EDGE, C)
            rates = (p * (t - pivot[:, None])).to(v.dtype)
            shift += tl.sum(rates.to(tl.float32), 1)
            sums = _dot(rates, v, C, sums)
        if C.wants_value:
            v_dot = _tile(value_dot_base, start, key_length, VALUE_DOT, EDGE, C)
            sums = _dot(p.to(v_dot.dtype), v_dot, C, sums)
    return sums, mass, moment, shift, pivot


@triton.jit
def jaxsoftmax_attention_pushforward(
    q,
    k,
    v,
    bias,
    mask,
    sinks,
    q_lengths,
    k_lengths,
    q_segments,
    k_segments,
    offsets,
    out,
    rows,
    out_low,
    low,
    q_dot,
    k_dot,
    v_dot,
    bias_dot,
    sinks_dot,
    d_out,
    d_lse,
    d_low,
    C: tl.constexpr,
):
    """Writes the tangents of out [B, T, N, Hv] and of lse [B, N, T].

    ``d_low`` is what rounding to 16 bits takes off ``d_out``; None for float32. With
    rates P (dS - pivot) the tangent of out is the sum of rates times values, and of P
    times their tangents, less the sum of the rates, as they are rounded, times out: of
    values that are alike nothing is left, whatever the rates are.
    """
    x = (q, k, v, bias, mask, sinks, q_lengths, k_lengths, q_segments, k_segments)
    x += (offsets, out, rows, out_low, low, q_dot, k_dot, v_dot, bias_dot, sinks_dot)
    queries, at, key_length = _own_queries(x, C)
    start, length, _ids = queries
    batch, head, _offset = at
    q_tile = _tile(_base(x, at, QUERY, C), start, length, QUERY, True, C)
    own = (q_tile, q_tile)
    if C.wants_query:
        q_dot_base = _base(x, at, QUERY_DOT, C)
        own = (q_tile, _tile(q_dot_base, start, length, QUERY_DOT, True, C))
    # Those of queries beyond the length too: their lse is the sink.
    row = _numbers(_row_base(x, at, ROWS, C), start, C.q.places, C.q.block, True)
    row_low = _numbers_if(
        C.biased, _row_base(x, at, LOW, C), start, C.q.places, C.q.block, True
    )
    sums = tl.full((C.q.block, C.v.padded_size), 0.0, tl.float32)
    zeros = tl.full((C.q.block,), 0.0, tl.float32)
    carry = (sums, zeros, zeros, zeros, zeros)
    bounds = _bounds(queries, at[2], key_length, C.left, C.right, C.q.block, C.k.block)
    for part in tl.static_range(3):
        if C.key_loops[part] and (C.logits_move or C.wants_value):
            numbers = (row, row_low)
            carry = _pushed_tiles(
                carry, own, numbers, x, at, queries, key_length, bounds, part, C
            )
    sums, mass, moment, shift, pivot = carry
    place = start + tl.arange(0, C.q.block)
    if C.query_lengths:
        inside = place < length
        sums = tl.where(inside[:, None], sums, 0.0)
        mass = tl.where(inside, mass, 0.0)
        moment = tl.where(inside, moment, 0.0)
        shift = tl.where(inside, shift, 0.0)
        pivot = tl.where(inside, pivot, 0.0)
    if C.sinks:
        sink = tl.load(_batch_entry(x, batch, SINKS, C) + head)
        if C.biased:
            of_sink = tl.exp2((sink - row) * LOG2E - row_low)
        else:
            of_sink = tl.exp2(sink * LOG2E - row)
        mass += of_sink
        t = zeros
        if C.wants_sinks:
            t += tl.load(_batch_entry(x, batch, SINKS_DOT, C) + head)
        moment += tl.where(of_sink == 0.0, 0.0, of_sink * t)
        shift += tl.where(of_sink == 0.0, 0.0, of_sink * (t - pivot))
    wide = sums
    if C.logits_move or C.wants_sinks:
        y = _tile(_base(x, at, OUT, C), start, length, OUT, True, C).to(tl.float32)
        if C.rounds:
            y_low_base = _base(x, at, OUT_LOW, C)
            y += _tile(y_low_base, start, length, OUT_LOW, True, C).to(tl.float32)
        wide = sums - shift[:, None] * y
    rounded = wide.to(d_out.dtype.element_ty)
    _store_tile(d_out, rounded, at, start, OUT, C)
    if C.rounds:
        _store_tile(d_low, wide - rounded.to(tl.float32), at, start, OUT, C)
    entry = (batch.to(tl.int64) * C.q.heads + head) * C.q.places + place
    mean = moment
    if C.logits_move:
        mean = moment / tl.where(mass == 0.0, 1.0, mass)
    tl.store(d_lse + entry, mean, mask=place < C.q.places)
