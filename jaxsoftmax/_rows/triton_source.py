"""The Triton programs of `_rows.triton`; importing this module imports triton.

One skeleton, `_run`, for every op. A program owns a few rows. It reads their entries
in tiles of some columns, makes a *state* of each tile (a few float32 numbers
per row), merges the states, and makes results from entries and state.

- With one tile each operand is read once, and stays in registers in between.
- With several, all are read for the state, and again for the results: the last one
  first, because that is the one the caches still have.

Rows that lie whole in memory, but start and end anywhere between the vectors of 16
bytes that it is best read in, have *edges*: what is before the first whole vector and
after the last. The tiles are of whole vectors; the edges are a small tile of their own,
read and written entry by entry. So nothing that is another row's, or nobody's, is ever
touched.

Results are written once. Sums and maxima across the warps of a program go through
shared memory; nothing of a row leaves the program in between.

What the state is:

- ``softmax``, ``log_softmax``: ``(m, s)``, the maximum and the sum of
  ``exp(scale (x - m))``. log_softmax leaves one maximum's own 1 out of the sum.
- ``softmax_derivative``, ``log_softmax_pushforward``: ``(s, pivot, low)``, the sum of
  the weights and the weighted mean of t in two parts: the value at the largest weight,
  and the rest. An entry less the mean is ``(t - pivot) - low``: that keeps its digits
  however large the mean is, and however close to it a dominant entry.
- ``log_softmax_pullback``: ``(g_ties, g_rest)``, the sum of the cotangent, apart for
  the entries that are the row's maximum. With the sum that log_softmax gives, 1 - P of
  a dominant entry is a sum of the others' P, not a difference.
- ``cross_entropy``, ``cross_entropy_with_gradient``: the numbers of
  `_rows.row_loss.State`, 0 where one is not needed. The first two are log_softmax's;
  the others are sums of the distances from the maximum down to the entries, and sums of
  the weights in these sums. Where the label is an index, its distance is that of one
  entry, which the program reads first.

`C` is a `_rows.triton.Program`: all that is known when a program is compiled.
"""

# What Triton compiles has no Python types.
# mypy: ignore-errors

import triton
import triton.language as tl
from triton.language.extra import libdevice

from jaxsoftmax._rows import row_loss

# Subtracted in place of a maximum that is -inf.
LOWEST = tl.constexpr(-3.4028234663852886e38)
LARGEST = tl.constexpr(3.4028234663852886e38)
LN2 = tl.constexpr(0.6931471805599453)
IGNORED = tl.constexpr(row_loss.IGNORED)
INVALID = tl.constexpr(row_loss.INVALID)


@triton.jit
def _offsets(index, COLUMN: tl.constexpr, OF: tl.constexpr, C: tl.constexpr):
    """Where the rows or columns `index` lie: their digits in base sizes, by strides."""
    DIMS: tl.constexpr = C.column if COLUMN else C.row
    offset = index * 0
    for k in tl.static_range(len(DIMS[OF])):
        digit = index
        if k < len(DIMS[0]):
            digit = index % DIMS[0][k]
            index = index // DIMS[0][k]
        if DIMS[OF][k] != 0:
            offset += digit * DIMS[OF][k]
    return offset


@triton.jit
def _tile_offsets(row, column, OF: tl.constexpr, C: tl.constexpr):
    """Offsets of a tile's entries in the array (`OF` 1) or in the mask (`OF` 2)."""
    rows = tl.expand_dims(_offsets(row, False, OF, C), C.axis)
    columns = tl.expand_dims(_offsets(column, True, OF, C), 1 - C.axis)
    return rows + columns


@triton.jit
def _vectors(row, C: tl.constexpr):
    """Start of a program's row, start and end of its whole vectors, end of the row."""
    start = tl.program_id(0).to(row.dtype) * C.n
    end = start + C.n
    # Products: that they are multiples is what the compiler must see.
    first = (start + (C.vector - 1)) // C.vector * C.vector
    last = end // C.vector * C.vector
    return start, first, last, end


@triton.jit
def _places(row, tile, C: tl.constexpr):
    """A tile's columns, its entries' offsets in the array, and which are inside."""
    if C.part == "edges":
        start, first, last, end = _vectors(row, C)
        # Backwards from the end: what the compiler sees to have no order it gives to a
        # thread each, not to a few threads that go through all of it.
        index = tl.arange(0, C.columns).to(row.dtype)
        backwards = end + (C.vector - 1) - index
        offset = tl.where(index < C.vector, start + index, backwards)
        inside = (offset < first) | (offset >= last)
        column = offset - start
        offset = tl.expand_dims(offset, 1 - C.axis)
        return column, offset, tl.expand_dims(inside, 1 - C.axis)
    else:
        column = (tile * C.columns + tl.arange(0, C.columns)).to(row.dtype)
        if C.part == "vectors":
            start, first, last, end = _vectors(row, C)
            inside = tl.expand_dims(column < last - first, 1 - C.axis)
            offset = tl.expand_dims(column, 1 - C.axis) + first
            return column + (first - start), offset, inside
        else:
            inside = tl.full((1, 1), 1, tl.int1)
            if C.m % C.rows != 0:
                inside = inside & tl.expand_dims(row < C.m, C.axis)
            if C.n % C.columns != 0:
                inside = inside & tl.expand_dims(column < C.n, 1 - C.axis)
            return column, _tile_offsets(row, column, 1, C), inside


@triton.jit
def _load(x_ptr, t_ptr, where_ptr, row, tile, C: tl.constexpr):
    """A tile of x (or P) and of t, in float32, and what is needed to store a result.

    Entries that are masked or outside read as -inf, in P as 0, and t there as 0. It is
    0 at an entry of -inf too, unless t is what labels weigh: that counts.
    """
    column, offset, inside = _places(row, tile, C)
    absent = 0.0 if C.op == "softmax_derivative" else float("-inf")
    x = tl.load(x_ptr + offset, mask=inside, other=absent).to(tl.float32)
    valid = inside
    if C.masked:
        at = _tile_offsets(row, column, 2, C)
        valid = inside & (tl.load(where_ptr + at, mask=inside, other=0) != 0)
        x = tl.where(valid, x, absent)
    t = x
    if C.dense:
        t = tl.load(t_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        if C.masked:
            t = tl.where(valid, t, 0.0)
    elif C.op != "softmax" and C.op != "log_softmax" and not C.loss:
        t = tl.load(t_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        t = tl.where(x == absent, 0.0, t)
    return x, t, column, valid, inside, offset


@triton.jit
def _exponentials(x, m, C: tl.constexpr):
    """``exp(scale (x - m))``, m finite or of a row that becomes NaN.

    The factor is scale / log(2) in two parts. If precise, what rounding takes from the
    product with it is added back, as ``2^(y + r) = 2^y (1 + r log 2)``; else the error
    is up to |scale (x - m)| eps.
    """
    d = x - m
    y = d * C.factor[0]
    e = tl.exp2(y)
    if C.precise:
        r = tl.fma(d, C.factor[0], -y) + d * C.factor[1]
        # Where d is -inf, r would be NaN.
        e = tl.fma(e, tl.where(y > -160.0, r, 0.0) * LN2, e)
    return e


@triton.jit
def _one_if_zero(x):
    return tl.where(x == 0.0, 1.0, x)


@triton.jit
def _divide_by(x):
    """1 / x, correctly rounded; of 0, which only an empty row's sum is, 1."""
    return tl.div_rn(tl.full(x.shape, 1.0, tl.float32), _one_if_zero(x))


# --- softmax and log_softmax ----------------------------------------------------------


@triton.jit
def _sum_state(x, C: tl.constexpr):
    m = tl.max(x, C.axis)
    finite = tl.expand_dims(tl.maximum(m, LOWEST), C.axis)
    e = _exponentials(x, finite, C)
    if C.op == "softmax":
        s = tl.sum(e, C.axis)
    else:
        # A difference, not a select: that of +inf must stay NaN.
        at_m = (x == finite).to(tl.float32)
        s = tl.sum(e - at_m, C.axis) + (tl.sum(at_m, C.axis) - 1.0)
    return m, s


@triton.jit
def _merge_sums(m_a, s_a, m_b, s_b, C: tl.constexpr):
    a_high = m_a >= m_b
    m = tl.where(a_high, m_a, m_b)
    low = tl.maximum(tl.where(a_high, m_b, m_a), LOWEST)
    shrink = _exponentials(low, tl.maximum(m, LOWEST), C)
    s_low = tl.where(a_high, s_b, s_a)
    if C.op != "softmax":
        s_low += 1.0  # the lower maximum is an entry as others now; -1 + 1 if empty
    return m, tl.where(a_high, s_a, s_b) + s_low * shrink


@triton.jit
def _probabilities(x, m, s, C: tl.constexpr):
    finite = tl.expand_dims(tl.maximum(m, LOWEST), C.axis)
    e = _exponentials(x, finite, C)
    return e * tl.expand_dims(_divide_by(s), C.axis)


@triton.jit
def _log_sum(m, s):
    """log(1 + s), where 1 is the maximum's own term; 0 for an empty row."""
    log_sum = tl.where(m == float("-inf"), 0.0, libdevice.log1p(s))
    # Only a NaN sum means anything in a row whose maximum is -inf: all is NaN there.
    return tl.where(s == s, log_sum, s)


@triton.jit
def _log_probabilities(x, m, s, C: tl.constexpr):
    finite = tl.expand_dims(tl.maximum(m, LOWEST), C.axis)
    return (x - finite) * C.scale - tl.expand_dims(_log_sum(m, s), C.axis)


# --- derivative and pushforward: the weighted mean ------------------------------------


@triton.jit
def _weighted_sum(w, t, C: tl.constexpr):
    """``sum(w t)``, the same in every lane that has a part of the row.

    A compiler contracts a product with the addition after it. Where that adds another
    lane's product, each lane rounds only the other's, and they get different sums. An
    fma is not contracted.
    """
    return tl.sum(tl.fma(w, t, 0.0), C.axis)


@triton.jit
def _mean_state(w, t, C: tl.constexpr):
    """The pivot is the value of `t` at the largest weight, as in `_rows.xla`."""
    s = tl.sum(w, C.axis)
    largest = tl.expand_dims(tl.max(w, C.axis), C.axis)
    pivot = tl.max(tl.where(w == largest, t, float("-inf")), C.axis)
    low = _weighted_sum(w, t - tl.expand_dims(pivot, C.axis), C) / _one_if_zero(s)
    return s, pivot, low


@triton.jit
def _merge_means(s_a, pivot_a, low_a, s_b, pivot_b, low_b):
    """The mean of both parts, relative to the pivot of the heavier one.

    That part's mean must not lose digits.
    """
    a_heavy = s_a >= s_b
    s = s_a + s_b
    distance = (pivot_b - pivot_a) + (low_b - low_a)
    share = tl.where(a_heavy, s_b, -s_a) / _one_if_zero(s)
    low = tl.where(a_heavy, low_a, low_b) + distance * share
    return s, tl.where(a_heavy, pivot_a, pivot_b), low


# --- pullback -------------------------------------------------------------------------


@triton.jit
def _pullback_state(x, g, row_max, C: tl.constexpr):
    at_max = x == tl.expand_dims(tl.maximum(row_max, LOWEST), C.axis)
    g_ties = tl.sum(tl.where(at_max, g, 0.0), C.axis)
    return g_ties, tl.sum(tl.where(at_max, 0.0, g), C.axis)


@triton.jit
def _pulled_back(x, g, row_max, excess, g_ties, g_rest, C: tl.constexpr):
    """``g - P sum(g)``; at the maximum as ``(g (z - 1) - sum of the others) / z``."""
    finite = tl.expand_dims(tl.maximum(row_max, LOWEST), C.axis)
    e = _exponentials(x, finite, C)
    inverse = tl.expand_dims(_divide_by(1.0 + excess), C.axis)
    g_sum = tl.expand_dims(g_rest + g_ties, C.axis)
    g_rest = tl.expand_dims(g_rest, C.axis)
    g_others = g_rest + (tl.expand_dims(g_ties, C.axis) - g)
    at_max = (g * tl.expand_dims(excess, C.axis) - g_others) * inverse
    return tl.where(x == finite, at_max, g - (e * inverse) * g_sum)


# --- cross-entropy --------------------------------------------------------------------


@triton.jit
def _values(x, C: tl.constexpr):
    """The values of logits, which `C.unit` multiplies: with a soft cap, capped.

    An fma, as in `_weighted_sum`: the maximum is taken off these values, and must be
    one of them to the last digit.
    """
    if C.options.softcap is None:
        return x
    else:
        tanh = libdevice.tanh(x * (C.scale / C.options.softcap))
        return tl.where(x == float("-inf"), x, tl.fma(tanh, C.options.softcap, 0.0))


@triton.jit
def _times_slope(dz, x, C: tl.constexpr):
    """``dz`` times the derivative of z; 1 - tanh^2 without its cancellation near 1."""
    if C.options.softcap is None:
        return dz * C.scale
    else:
        q = tl.exp(tl.abs(x * (C.scale / C.options.softcap)) * -2.0)
        return dz * ((C.scale * 4.0) * q / ((1.0 + q) * (1.0 + q)))


@triton.jit
def _at_label(x_ptr, where_ptr, row, label, C: tl.constexpr):
    """The logit of each row's label, -inf where that is masked or the label none."""
    label = label.to(row.dtype)
    present = label >= 0
    if C.masked:
        at = _offsets(row, False, 2, C) + _offsets(label, True, 2, C)
        present = present & (tl.load(where_ptr + at, mask=present, other=0) != 0)
    offset = _offsets(row, False, 1, C) + _offsets(label, True, 1, C)
    return tl.load(x_ptr + offset, mask=present, other=float("-inf")).to(tl.float32)


@triton.jit
def _below_label(m, label, at_label, C: tl.constexpr):
    below = (tl.maximum(m, LOWEST) - _values(at_label, C)) * C.unit
    return tl.where(label < 0, 0.0, below)


@triton.jit
def _loss_state(x, t, C: tl.constexpr):
    v = _values(x, C)
    m, s = _sum_state(v, C)
    finite = tl.expand_dims(tl.maximum(m, LOWEST), C.axis)
    below = (finite - v) * C.unit
    zero = tl.full((C.rows,), 0.0, tl.float32)
    below_label, label_sum = zero, zero
    below_sum, entries, below_weighted = zero, zero, zero
    # What is infinitely far below counts as nothing where its weight is 0.
    if C.dense:
        below_label = _weighted_sum(t, tl.where(t == 0.0, 0.0, below), C)
        label_sum = tl.sum(t, C.axis)
    if C.options.uniform_nll:
        finite_entry = v != float("-inf")
        below_sum = tl.sum(tl.where(finite_entry, below, 0.0), C.axis)
        entries = tl.sum(finite_entry.to(tl.float32), C.axis)
    if C.options.entropy:
        e = _exponentials(v, finite, C)
        below_weighted = _weighted_sum(e, tl.where(e == 0.0, 0.0, below), C)
    return m, s, below_label, label_sum, below_sum, entries, below_weighted


@triton.jit
def _sum_from(m, below, weight, mine, C: tl.constexpr):
    """``sum(weight below)`` from `m` on, given it from the maximum `mine`.

    A tile without entries has no distance: its weights are on entries that are -inf.
    """
    distance = (tl.maximum(m, LOWEST) - tl.maximum(mine, LOWEST)) * C.unit
    absent = (weight == 0.0) | (mine == float("-inf"))
    return below + tl.where(absent, 0.0, weight * distance)


@triton.jit
def _weighted_from(m, state, C: tl.constexpr):
    """``sum(e below)`` from `m` on, given a state."""
    mine = tl.maximum(state[0], LOWEST)
    shrink = _exponentials(mine, tl.maximum(m, LOWEST), C)
    below = _sum_from(m, state[6], 1.0 + state[1], state[0], C)
    return tl.where(shrink == 0.0, 0.0, shrink * below)


@triton.jit
def _merge_losses(a, b, C: tl.constexpr):
    m, s = _merge_sums(a[0], a[1], b[0], b[1], C)
    _m, _s, below_label, label_sum, below_sum, entries, below_weighted = a
    if C.dense:
        below_label = _sum_from(m, a[2], a[3], a[0], C)
        below_label += _sum_from(m, b[2], b[3], b[0], C)
        label_sum += b[3]
    if C.options.uniform_nll:
        below_sum = _sum_from(m, a[4], a[5], a[0], C)
        below_sum += _sum_from(m, b[4], b[5], b[0], C)
        entries += b[5]
    if C.options.entropy:
        below_weighted = _weighted_from(m, a, C) + _weighted_from(m, b, C)
    return m, s, below_label, label_sum, below_sum, entries, below_weighted


@triton.jit
def _loss_gradient(x, column, given, state, C: tl.constexpr):
    """The gradient, of a row whose two weights are 0 exactly 0.

    At the label ``expm1(-nll)`` stands for P - 1: what a dominant one leaves keeps its
    digits.
    """
    label, label_weight, weight = given[0], given[2], given[3]
    m, s = state[0], state[1]
    inverse = _divide_by(1.0 + s)
    log_sum = _log_sum(m, s)
    alive = (label_weight != 0.0) | (weight != 0.0)
    invalid = (label == INVALID) & (label_weight != 0.0)
    c = tl.where(invalid, float("nan"), tl.where(label == IGNORED, 0.0, label_weight))
    at_label = tl.expand_dims(c * libdevice.expm1(-(log_sum + state[2])), C.axis)
    v = _values(x, C)
    e = _exponentials(v, tl.expand_dims(tl.maximum(m, LOWEST), C.axis), C)
    hit = tl.expand_dims(column, 1 - C.axis) == tl.expand_dims(label, C.axis)
    dz = tl.where(hit, at_label, e * tl.expand_dims(c * inverse, C.axis))
    if C.options.uniform_nll or C.options.z_loss != 0.0:
        row_term = weight * 0.0
        if C.options.uniform_nll:
            smoothed = weight * C.options.label_smoothing
            dz -= tl.expand_dims(smoothed / tl.maximum(state[5], 1.0), C.axis)
            row_term = smoothed
        if C.options.z_loss != 0.0:
            lse = tl.maximum(m, LOWEST) * C.unit
            # An infinite one would be NaN where P is 0.
            lse = tl.minimum(tl.maximum(lse, LOWEST), LARGEST) + log_sum
            lse = tl.where(weight == 0.0, 0.0, lse)
            row_term += weight * (2.0 * C.options.z_loss) * lse
        dz += e * tl.expand_dims(row_term * inverse, C.axis)
    counts = (x != float("-inf")) & tl.expand_dims(alive, C.axis)
    return tl.where(counts, _times_slope(dz, x, C), 0.0)


# --- the skeleton ---------------------------------------------------------------------
#
# `given` is what an op is given for each row: its maximum; or, for cross-entropy, the
# label, the logit there and two weights.


@triton.jit
def _state(x, t, given, C: tl.constexpr):
    """The state of a tile, a tuple."""
    if C.loss:
        return _loss_state(x, t, C)
    elif C.op == "softmax" or C.op == "log_softmax":
        return _sum_state(x, C)
    elif C.op == "log_softmax_pullback":
        return _pullback_state(x, t, given[0], C)
    elif C.op == "log_softmax_pushforward":
        finite = tl.expand_dims(tl.maximum(given, LOWEST), C.axis)
        return _mean_state(_exponentials(x, finite, C), t, C)
    else:
        return _mean_state(x, t, C)


@triton.jit
def _merge(a, b, C: tl.constexpr):
    """The state of the union of two sets of entries."""
    if C.loss:
        return _merge_losses(a, b, C)
    elif C.op == "softmax" or C.op == "log_softmax":
        return _merge_sums(a[0], a[1], b[0], b[1], C)
    elif C.op == "log_softmax_pullback":
        return a[0] + b[0], a[1] + b[1]
    else:
        return _merge_means(a[0], a[1], a[2], b[0], b[1], b[2])


@triton.jit
def _result(x, t, column, valid, given, state, C: tl.constexpr):
    """The results of a tile: exact where an entry is masked, in a NaN row too."""
    if C.loss:
        y = _loss_gradient(x, column, given, state, C)
    elif C.op == "softmax":
        y = _probabilities(x, state[0], state[1], C)
        if C.masked:
            y = tl.where(valid, y, 0.0)
    elif C.op == "log_softmax":
        y = _log_probabilities(x, state[0], state[1], C)
        if C.masked:
            y = tl.where(valid, y, float("-inf"))
    elif C.op == "log_softmax_pullback":
        y = _pulled_back(x, t, given[0], given[1], state[0], state[1], C)
        y = tl.where(x == float("-inf"), 0.0, y * C.scale)
    else:
        pivot = tl.expand_dims(state[1], C.axis)
        low = tl.expand_dims(state[2], C.axis)
        y = ((t - pivot) - low) * C.scale
        if C.op == "softmax_derivative":
            y = tl.where(x == 0.0, 0.0, x * y)
        else:
            y = tl.where(x == float("-inf"), 0.0, y)
    return y


@triton.jit
def _given(x_ptr, where_ptr, given_ptr, row, C: tl.constexpr):
    """What the op is given for each row; a placeholder where that is nothing."""
    inside = row < C.m
    if C.loss and not C.dense:
        label = tl.load(given_ptr[0] + row, mask=inside, other=IGNORED)
        at_label = _at_label(x_ptr, where_ptr, row, label, C)
        label_weight, weight = (
            at_label,
            at_label,
        )  # placeholders where there is no gradient
        if C.op == "cross_entropy_with_gradient":
            label_weight = tl.load(given_ptr[1] + row, mask=inside, other=0.0)
            weight = tl.load(given_ptr[2] + row, mask=inside, other=0.0)
        return label, at_label, label_weight.to(tl.float32), weight.to(tl.float32)
    elif C.op == "log_softmax_pullback":
        row_max = tl.load(given_ptr[0] + row, mask=inside, other=0.0)
        return row_max, tl.load(given_ptr[1] + row, mask=inside, other=0.0)
    elif C.op == "log_softmax_pushforward":
        return tl.load(given_ptr + row, mask=inside, other=0.0)
    else:
        return row


@triton.jit
def _rows(C: tl.constexpr):
    """The rows that a program owns."""
    row = tl.program_id(0).to(tl.int64 if C.long else tl.int32) * C.rows
    return row + tl.arange(0, C.rows)


@triton.jit
def _begin(x_ptr, t_ptr, where_ptr, row, given, C: tl.constexpr):
    """The first tile and the edges, as `_load` has them, and the state of both.

    Where there are no edges, the tile stands in for them.
    """
    tile = _load(x_ptr, t_ptr, where_ptr, row, 0, C)
    if C.part == "vectors":
        EDGES: tl.constexpr = C.edges
        edges = _load(x_ptr, t_ptr, where_ptr, row, 0, EDGES)
        part = _state(edges[0], edges[1], given, EDGES)
        state = _merge(_state(tile[0], tile[1], given, C), part, C)
        return tile, edges, state
    else:
        return tile, tile, _state(tile[0], tile[1], given, C)


@triton.jit
def _whole(state, x_ptr, t_ptr, where_ptr, row, given, C: tl.constexpr):
    """The state of whole rows, given that of what `_begin` reads."""
    for k in tl.range(1, C.tiles, num_stages=C.stages):
        tile = _load(x_ptr, t_ptr, where_ptr, row, k, C)
        part = _state(tile[0], tile[1], given, C)
        state = _merge(state, part, C)
    if C.loss and not C.dense:
        m, s, _none, label_sum, below_sum, entries, below_weighted = state
        below_label = _below_label(m, given[0], given[1], C)
        return m, s, below_label, label_sum, below_sum, entries, below_weighted
    else:
        return state


@triton.jit
def _store(tile, given, state, y_ptr, C: tl.constexpr):
    """Writes the results of a tile."""
    x, t, column, valid, inside, offset = tile
    y = _result(x, t, column, valid, given, state, C)
    tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _run_state(x_ptr, t_ptr, where_ptr, given_ptr, C: tl.constexpr):
    """Runs a program whose result is the state. Returns the rows and their state."""
    row = _rows(C)
    given = _given(x_ptr, where_ptr, given_ptr, row, C)
    _tile, _edges, state = _begin(x_ptr, t_ptr, where_ptr, row, given, C)
    return row, _whole(state, x_ptr, t_ptr, where_ptr, row, given, C)


@triton.jit
def _run(x_ptr, t_ptr, where_ptr, given_ptr, y_ptr, C: tl.constexpr):
    """Runs a program of any op; a pointer that the op does not need may be any.

    Returns the rows and their state.
    """
    row = _rows(C)
    given = _given(x_ptr, where_ptr, given_ptr, row, C)
    tile, edges, state = _begin(x_ptr, t_ptr, where_ptr, row, given, C)
    state = _whole(state, x_ptr, t_ptr, where_ptr, row, given, C)
    if C.part == "vectors":
        EDGES: tl.constexpr = C.edges
        _store(edges, given, state, y_ptr, EDGES)
    if C.tiles == 1:
        _store(tile, given, state, y_ptr, C)
    else:
        for k in tl.range(0, C.tiles, num_stages=C.stages):
            tile = _load(x_ptr, t_ptr, where_ptr, row, C.tiles - 1 - k, C)
            _store(tile, given, state, y_ptr, C)
    return row, state


# --- entry points: what each op reads, in the order of its arguments, and writes ------


@triton.jit
def jaxsoftmax_softmax(x_ptr, where_ptr, p_ptr, C: tl.constexpr):
    """Reads x, writes P."""
    _run(x_ptr, x_ptr, where_ptr, x_ptr, p_ptr, C)


@triton.jit
def jaxsoftmax_softmax_derivative(p_ptr, t_ptr, y_ptr, C: tl.constexpr):
    """Reads P and t, writes ``scale P (t - sum(P t) / sum(P))``."""
    _run(p_ptr, t_ptr, p_ptr, p_ptr, y_ptr, C)


@triton.jit
def jaxsoftmax_log_softmax(
    x_ptr, where_ptr, y_ptr, row_max_ptr, sum_ptr, C: tl.constexpr
):
    """Reads x, writes log P, a row's maximum, and the sum less the maximum's own 1."""
    row, state = _run(x_ptr, x_ptr, where_ptr, x_ptr, y_ptr, C)
    tl.store(row_max_ptr + row, state[0], mask=row < C.m)
    tl.store(sum_ptr + row, state[1], mask=row < C.m)


@triton.jit
def jaxsoftmax_log_softmax_pushforward(
    x_ptr, where_ptr, row_max_ptr, t_ptr, y_ptr, C: tl.constexpr
):
    """Reads x, the maxima and t, writes ``scale (t - sum(P t))``."""
    _run(x_ptr, t_ptr, where_ptr, row_max_ptr, y_ptr, C)


@triton.jit
def jaxsoftmax_log_softmax_pullback(
    x_ptr, where_ptr, row_max_ptr, sum_ptr, g_ptr, y_ptr, C: tl.constexpr
):
    """Reads x, the maxima, the sums and g, writes ``scale (g - P sum(g))``."""
    _run(x_ptr, g_ptr, where_ptr, (row_max_ptr, sum_ptr), y_ptr, C)


@triton.jit
def _store_numbers(row, state, numbers_ptr, C: tl.constexpr):
    """Writes the numbers of `C.state_places`: one array of all rows after the other."""
    for k in tl.static_range(len(C.state_places)):
        tl.store(numbers_ptr + k * C.m + row, state[C.state_places[k]], mask=row < C.m)


@triton.jit
def jaxsoftmax_cross_entropy(
    x_ptr, where_ptr, labels_ptr, numbers_ptr, C: tl.constexpr
):
    """Reads x and the labels, writes some numbers per row."""
    row, state = _run_state(x_ptr, labels_ptr, where_ptr, (labels_ptr,), C)
    _store_numbers(row, state, numbers_ptr, C)


@triton.jit
def jaxsoftmax_cross_entropy_with_gradient(
    x_ptr,
    where_ptr,
    labels_ptr,
    label_weight_ptr,
    weight_ptr,
    dx_ptr,
    numbers_ptr,
    C: tl.constexpr,
):
    """Reads x, the labels and two weights per row, writes the gradient and numbers."""
    given_ptr = (labels_ptr, label_weight_ptr, weight_ptr)
    if C.options.in_place:
        row, state = _run(x_ptr, x_ptr, where_ptr, given_ptr, x_ptr, C)
    else:
        row, state = _run(x_ptr, x_ptr, where_ptr, given_ptr, dx_ptr, C)
    _store_numbers(row, state, numbers_ptr, C)


# --- states alone, as `_rows.xla` has them ------------------------------------------


@triton.jit
def jaxsoftmax_log_sum_exp_state(
    x_ptr, where_ptr, row_max_ptr, sum_ptr, C: tl.constexpr
):
    """Reads x, writes a row's maximum and the sum less the maximum's own 1."""
    row, state = _run_state(x_ptr, x_ptr, where_ptr, x_ptr, C)
    tl.store(row_max_ptr + row, state[0], mask=row < C.m)
    tl.store(sum_ptr + row, state[1], mask=row < C.m)


@triton.jit
def _store_mean(row, state, sum_ptr, pivot_ptr, rest_ptr, C: tl.constexpr):
    """Writes the sum of weights, the pivot, and the weighted sum of t - pivot."""
    tl.store(sum_ptr + row, state[0], mask=row < C.m)
    tl.store(pivot_ptr + row, state[1], mask=row < C.m)
    tl.store(rest_ptr + row, state[2] * state[0], mask=row < C.m)


@triton.jit
def jaxsoftmax_softmax_derivative_state(
    p_ptr, t_ptr, sum_ptr, pivot_ptr, rest_ptr, C: tl.constexpr
):
    """Reads P and t, writes three numbers per row."""
    row, state = _run_state(p_ptr, t_ptr, p_ptr, p_ptr, C)
    _store_mean(row, state, sum_ptr, pivot_ptr, rest_ptr, C)


@triton.jit
def jaxsoftmax_log_softmax_pushforward_state(
    x_ptr, where_ptr, row_max_ptr, t_ptr, sum_ptr, pivot_ptr, rest_ptr, C: tl.constexpr
):
    """Reads x, the maxima and t, writes three numbers per row."""
    row, state = _run_state(x_ptr, t_ptr, where_ptr, row_max_ptr, C)
    _store_mean(row, state, sum_ptr, pivot_ptr, rest_ptr, C)


@triton.jit
def jaxsoftmax_log_softmax_pullback_state(
    x_ptr,
    where_ptr,
    row_max_ptr,
    sum_ptr,
    g_ptr,
    g_ties_ptr,
    g_rest_ptr,
    C: tl.constexpr,
):
    """Reads x, the maxima and g, writes two numbers per row."""
    given_ptr = (row_max_ptr, sum_ptr)
    row, state = _run_state(x_ptr, g_ptr, where_ptr, given_ptr, C)
    tl.store(g_ties_ptr + row, state[0], mask=row < C.m)
    tl.store(g_rest_ptr + row, state[1], mask=row < C.m)
