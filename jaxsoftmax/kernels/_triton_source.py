"""The Triton programs of `kernels.triton`; importing this module imports triton.

One skeleton, `_run`, for every op. A program owns a few rows. It reads their entries
in tiles of some columns, makes a *state* of each tile (a few float32 numbers a
row), merges the states, and makes results of entries and state.

- With one tile each operand is read once, and stays in registers in between.
- With several, all are read for the state, and again for the results: the last one
  first, because that is the one the caches still have.

Results are written once. Sums and maxima across the warps of a program go through
shared memory; nothing of a row leaves the program in between.

What the state is:

- ``softmax``, ``log_softmax``: ``(m, s)``, the maximum and the sum of
  ``exp(scale (x - m))``. log_softmax leaves one maximum's own 1 out of the sum.
- ``softmax_derivative``, ``log_softmax_pushforward``: ``(s, pivot, low)``, the sum of
  the weights and the weighted mean of t in two parts: a float next to it, and the rest.
  An entry less the mean is ``(t - pivot) - low``: that keeps its digits however large
  the mean is, and however close to it a dominant entry.
- ``log_softmax_pullback``: ``(rest, ties, g_rest, g_ties)``, the sums of the
  exponentials and of the cotangent, each apart for the entries that are the row's
  maximum. So 1 - P of a dominant entry is a sum of the others' P, not a difference.

`C` is a `kernels.triton.Program`: all that is known when a program is compiled.
"""

# What Triton compiles has no Python types.
# mypy: ignore-errors

import triton
import triton.language as tl
from triton.language.extra import libdevice

# Subtracted in place of a maximum that is -inf.
LOWEST = tl.constexpr(-3.4028234663852886e38)
LN2 = tl.constexpr(0.6931471805599453)


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
def _load(x_ptr, t_ptr, where_ptr, row, tile, C: tl.constexpr):
    """A tile of x (or P) and of t, in float32, and what is needed to store a result.

    Entries that are masked or outside read as -inf, in P as 0, and t there as 0.
    """
    column = (tile * C.columns + tl.arange(0, C.columns)).to(row.dtype)
    offset = _tile_offsets(row, column, 1, C)
    inside = tl.full((1, 1), 1, tl.int1)
    if C.m % C.rows != 0:
        inside = inside & tl.expand_dims(row < C.m, C.axis)
    if C.n % C.columns != 0:
        inside = inside & tl.expand_dims(column < C.n, 1 - C.axis)
    absent = 0.0 if C.op == "softmax_derivative" else float("-inf")
    x = tl.load(x_ptr + offset, mask=inside, other=absent).to(tl.float32)
    valid = inside
    if C.masked:
        at = _tile_offsets(row, column, 2, C)
        valid = inside & (tl.load(where_ptr + at, mask=inside, other=0) != 0)
        x = tl.where(valid, x, absent)
    t = x
    if C.op != "softmax" and C.op != "log_softmax":
        t = tl.load(t_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        t = tl.where(x == absent, 0.0, t)
    return x, t, valid, inside, offset


@triton.jit
def _exponentials(x, m, C: tl.constexpr):
    """``exp(scale (x - m))``, m finite or of a row that becomes NaN.

    The factor is scale / log(2) in two parts. If precise, what rounding takes from
    ``x - m`` (Knuth's TwoSum) and from its product with the factor is added back, as
    ``2^(y + r) = 2^y (1 + r log 2)``; else the error is up to |scale (x - m)| eps.
    """
    d = x - m
    y = d * C.factor[0]
    e = tl.exp2(y)
    if C.precise:
        minus_m = d - x
        lost = (x - (d - minus_m)) - (m + minus_m)
        r = tl.fma(d, C.factor[0], -y) + (d * C.factor[1] + lost * C.factor[0])
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
    if C.op == "log_softmax":
        # A difference, not a select: that of +inf must stay NaN.
        at_m = (x == finite).to(tl.float32)
        s = tl.sum(e - at_m, C.axis) + (tl.sum(at_m, C.axis) - 1.0)
    else:
        s = tl.sum(e, C.axis)
    return m, s


@triton.jit
def _merge_sums(m_a, s_a, m_b, s_b, C: tl.constexpr):
    a_high = m_a >= m_b
    m = tl.where(a_high, m_a, m_b)
    low = tl.maximum(tl.where(a_high, m_b, m_a), LOWEST)
    shrink = _exponentials(low, tl.maximum(m, LOWEST), C)
    s_low = tl.where(a_high, s_b, s_a)
    if C.op == "log_softmax":
        s_low += 1.0  # the lower maximum is an entry as others now; -1 + 1 if empty
    return m, tl.where(a_high, s_a, s_b) + s_low * shrink


@triton.jit
def _probabilities(x, m, s, C: tl.constexpr):
    finite = tl.expand_dims(tl.maximum(m, LOWEST), C.axis)
    e = _exponentials(x, finite, C)
    return e * tl.expand_dims(_divide_by(s), C.axis)


@triton.jit
def _log_probabilities(x, m, s, C: tl.constexpr):
    finite = tl.expand_dims(tl.maximum(m, LOWEST), C.axis)
    log_sum = tl.where(m == float("-inf"), 0.0, libdevice.log1p(s))
    # Only a NaN sum means anything in a row whose maximum is -inf: all is NaN there.
    log_sum = tl.where(s == s, log_sum, s)
    return (x - finite) * C.scale - tl.expand_dims(log_sum, C.axis)


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
    """Each round takes out what the one before left: a factor of eps of it."""
    s = tl.sum(w, C.axis)
    divisor = _one_if_zero(s)
    pivot = _weighted_sum(w, t, C) / divisor
    pivot += _weighted_sum(w, t - tl.expand_dims(pivot, C.axis), C) / divisor
    low = _weighted_sum(w, t - tl.expand_dims(pivot, C.axis), C) / divisor
    return s, pivot, low


@triton.jit
def _merge_means(s_a, pivot_a, low_a, s_b, pivot_b, low_b):
    """About the pivot of the heavier part, whose mean must not lose digits."""
    a_heavy = s_a >= s_b
    s = s_a + s_b
    distance = (pivot_b - pivot_a) + (low_b - low_a)
    share = tl.where(a_heavy, s_b, -s_a) / _one_if_zero(s)
    low = tl.where(a_heavy, low_a, low_b) + distance * share
    return s, tl.where(a_heavy, pivot_a, pivot_b), low


# --- pullback -------------------------------------------------------------------------


@triton.jit
def _pullback_state(x, g, row_max, C: tl.constexpr):
    finite = tl.expand_dims(tl.maximum(row_max, LOWEST), C.axis)
    e = _exponentials(x, finite, C)
    at_max = x == finite
    ties = at_max.to(tl.float32)
    g_ties = tl.where(at_max, g, 0.0)
    return (
        tl.sum(e - ties, C.axis),
        tl.sum(ties, C.axis),
        tl.sum(tl.where(at_max, 0.0, g), C.axis),
        tl.sum(g_ties, C.axis),
    )


@triton.jit
def _pulled_back(x, g, row_max, rest, ties, g_rest, g_ties, C: tl.constexpr):
    """``g - P sum(g)``; at the maximum as ``(g (z - 1) - sum of the others) / z``."""
    finite = tl.expand_dims(tl.maximum(row_max, LOWEST), C.axis)
    e = _exponentials(x, finite, C)
    inverse = tl.expand_dims(_divide_by(rest + ties), C.axis)
    g_sum = tl.expand_dims(g_rest + g_ties, C.axis)
    g_rest = tl.expand_dims(g_rest, C.axis)
    g_others = g_rest + (tl.expand_dims(g_ties, C.axis) - g)
    rest = tl.expand_dims(rest + (ties - 1.0), C.axis)
    at_max = (g * rest - g_others) * inverse
    return tl.where(x == finite, at_max, g - (e * inverse) * g_sum)


# --- the skeleton ---------------------------------------------------------------------


@triton.jit
def _state(x, t, row_max, C: tl.constexpr):
    """The state of a tile, a tuple."""
    if C.op == "softmax" or C.op == "log_softmax":
        return _sum_state(x, C)
    elif C.op == "log_softmax_pullback":
        return _pullback_state(x, t, row_max, C)
    elif C.op == "log_softmax_pushforward":
        finite = tl.expand_dims(tl.maximum(row_max, LOWEST), C.axis)
        return _mean_state(_exponentials(x, finite, C), t, C)
    else:
        return _mean_state(x, t, C)


@triton.jit
def _merge(a, b, C: tl.constexpr):
    """The state of two sets of entries together."""
    if C.op == "softmax" or C.op == "log_softmax":
        return _merge_sums(a[0], a[1], b[0], b[1], C)
    elif C.op == "log_softmax_pullback":
        return a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3]
    else:
        return _merge_means(a[0], a[1], a[2], b[0], b[1], b[2])


@triton.jit
def _result(x, t, valid, row_max, state, C: tl.constexpr):
    """The results of a tile: exact where an entry is masked, in a NaN row too."""
    if C.op == "softmax":
        y = _probabilities(x, state[0], state[1], C)
        if C.masked:
            y = tl.where(valid, y, 0.0)
    elif C.op == "log_softmax":
        y = _log_probabilities(x, state[0], state[1], C)
        if C.masked:
            y = tl.where(valid, y, float("-inf"))
    elif C.op == "log_softmax_pullback":
        y = _pulled_back(x, t, row_max, state[0], state[1], state[2], state[3], C)
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
def _rows(row_max_ptr, C: tl.constexpr):
    """The rows that a program owns, and their maxima if the op is given them."""
    row = tl.program_id(0).to(tl.int64 if C.long else tl.int32) * C.rows
    row = row + tl.arange(0, C.rows)
    row_max = row  # for the ops that have no use for one
    if C.op == "log_softmax_pullback" or C.op == "log_softmax_pushforward":
        row_max = tl.load(row_max_ptr + row, mask=row < C.m, other=0.0)
    return row, row_max


@triton.jit
def _merge_tiles(state, x_ptr, t_ptr, where_ptr, row, row_max, C: tl.constexpr):
    """The state of whole rows, given that of their first tile."""
    TILES: tl.constexpr = (C.n + C.columns - 1) // C.columns
    for tile in range(1, TILES):
        x, t, _valid, _inside, _offset = _load(x_ptr, t_ptr, where_ptr, row, tile, C)
        part = _state(x, t, row_max, C)
        state = _merge(state, part, C)
    return state


@triton.jit
def _run_state(x_ptr, t_ptr, where_ptr, row_max_ptr, C: tl.constexpr):
    """What a program does whose result is the state: rows and their state."""
    row, row_max = _rows(row_max_ptr, C)
    x, t, _valid, _inside, _offset = _load(x_ptr, t_ptr, where_ptr, row, 0, C)
    state = _state(x, t, row_max, C)
    return row, _merge_tiles(state, x_ptr, t_ptr, where_ptr, row, row_max, C)


@triton.jit
def _run(x_ptr, t_ptr, where_ptr, row_max_ptr, y_ptr, C: tl.constexpr):
    """What a program does, for every op; a pointer that it has no use for is any."""
    TILES: tl.constexpr = (C.n + C.columns - 1) // C.columns
    row, row_max = _rows(row_max_ptr, C)
    x, t, valid, inside, offset = _load(x_ptr, t_ptr, where_ptr, row, 0, C)
    state = _state(x, t, row_max, C)
    if TILES == 1:
        y = _result(x, t, valid, row_max, state, C)
        tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=inside)
    else:
        state = _merge_tiles(state, x_ptr, t_ptr, where_ptr, row, row_max, C)
        for k in range(0, TILES):
            x, t, valid, inside, offset = _load(
                x_ptr, t_ptr, where_ptr, row, TILES - 1 - k, C
            )
            y = _result(x, t, valid, row_max, state, C)
            tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=inside)
    if C.op == "log_softmax":
        tl.store(row_max_ptr + row, state[0], mask=row < C.m)


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
def jaxsoftmax_log_softmax(x_ptr, where_ptr, y_ptr, row_max_ptr, C: tl.constexpr):
    """Reads x, writes log P and a row's maximum."""
    _run(x_ptr, x_ptr, where_ptr, row_max_ptr, y_ptr, C)


@triton.jit
def jaxsoftmax_log_softmax_pushforward(
    x_ptr, where_ptr, row_max_ptr, t_ptr, y_ptr, C: tl.constexpr
):
    """Reads x, the maxima and t, writes ``scale (t - sum(P t))``."""
    _run(x_ptr, t_ptr, where_ptr, row_max_ptr, y_ptr, C)


@triton.jit
def jaxsoftmax_log_softmax_pullback(
    x_ptr, where_ptr, row_max_ptr, g_ptr, y_ptr, C: tl.constexpr
):
    """Reads x, the maxima and g, writes ``scale (g - P sum(g))``."""
    _run(x_ptr, g_ptr, where_ptr, row_max_ptr, y_ptr, C)


# --- states alone, as `kernels.xla` has them ------------------------------------------


@triton.jit
def jaxsoftmax_log_sum_exp_state(
    x_ptr, where_ptr, row_max_ptr, sum_ptr, C: tl.constexpr
):
    """Reads x, writes a row's maximum and the sum less the maximum's own 1."""
    row, state = _run_state(x_ptr, x_ptr, where_ptr, x_ptr, C)
    tl.store(row_max_ptr + row, state[0], mask=row < C.m)
    tl.store(sum_ptr + row, state[1], mask=row < C.m)


@triton.jit
def _store_mean(row, state, sum_ptr, center_ptr, rest_ptr, C: tl.constexpr):
    """The sum of the weights, the center, and the weighted sum of what is beside it."""
    tl.store(sum_ptr + row, state[0], mask=row < C.m)
    tl.store(center_ptr + row, state[1], mask=row < C.m)
    tl.store(rest_ptr + row, state[2] * state[0], mask=row < C.m)


@triton.jit
def jaxsoftmax_softmax_derivative_state(
    p_ptr, t_ptr, sum_ptr, center_ptr, rest_ptr, C: tl.constexpr
):
    """Reads P and t, writes three numbers a row."""
    row, state = _run_state(p_ptr, t_ptr, p_ptr, p_ptr, C)
    _store_mean(row, state, sum_ptr, center_ptr, rest_ptr, C)


@triton.jit
def jaxsoftmax_log_softmax_pushforward_state(
    x_ptr, where_ptr, row_max_ptr, t_ptr, sum_ptr, center_ptr, rest_ptr, C: tl.constexpr
):
    """Reads x, the maxima and t, writes three numbers a row."""
    row, state = _run_state(x_ptr, t_ptr, where_ptr, row_max_ptr, C)
    _store_mean(row, state, sum_ptr, center_ptr, rest_ptr, C)


@triton.jit
def jaxsoftmax_log_softmax_pullback_state(
    x_ptr,
    where_ptr,
    row_max_ptr,
    g_ptr,
    ties_ptr,
    rest_ptr,
    g_ties_ptr,
    g_rest_ptr,
    C: tl.constexpr,
):
    """Reads x, the maxima and g, writes four numbers a row."""
    row, state = _run_state(x_ptr, g_ptr, where_ptr, row_max_ptr, C)
    tl.store(ties_ptr + row, state[1], mask=row < C.m)
    tl.store(rest_ptr + row, state[0], mask=row < C.m)
    tl.store(g_ties_ptr + row, state[3], mask=row < C.m)
    tl.store(g_rest_ptr + row, state[2], mask=row < C.m)
