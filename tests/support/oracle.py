"""The oracle: softmax, cross-entropy and derivatives in numpy, in at least float64.

Long double where the platform has it (x86: 64-bit mantissa): the gradient of a
dominated row cancels in float64 too, and the oracle must not be the one that errs.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np


def _wide(x):
    return np.asarray(x).astype(np.float64).astype(np.longdouble)


def _logits(x, where, scale):
    z = _wide(x) * np.longdouble(scale)
    if where is not None:
        z = np.where(np.broadcast_to(np.asarray(where), z.shape), z, -np.inf)
    return z


def _exponentials(x, axis, where, scale):
    z = _logits(x, where, scale)
    row_max = np.max(z, axis=axis, keepdims=True, initial=-np.inf)
    d = z - np.where(np.isneginf(row_max), 0, row_max)
    return d, np.exp(d)


def softmax(x, axis=-1, where=None, scale=1.0):
    """P; zeros in an empty row."""
    _, e = _exponentials(x, axis, where, scale)
    total = e.sum(axis=axis, keepdims=True)
    return e / np.where(total == 0, 1, total)


def log_softmax(x, axis=-1, where=None, scale=1.0):
    """log P; the largest entry's own 1 is added by log1p."""
    d, e = _exponentials(x, axis, where, scale)
    ties = (d == 0).sum(axis=axis, keepdims=True)
    rest = np.where(d == 0, 0, e).sum(axis=axis, keepdims=True) + np.maximum(
        ties - 1, 0
    )
    return d - np.log1p(rest)


class LogSumExp(NamedTuple):
    """log-sum-exp with weights, and what its errors are relative to.

    Attributes:
      value, sign: ``log|S|`` and the sign of ``S = sum(b exp(x))``, without `axis`.
      weighted, each: ``b exp(x) / S`` and ``exp(x) / S``: the gradients for x and b; 0
        of what is absent, and in a row whose S is 0.
      second: How far the logarithm of the second term is below that of the largest.
      condition: ``sum(|b| exp(x)) / |S|``.
    """

    value: np.ndarray
    sign: np.ndarray
    weighted: np.ndarray
    each: np.ndarray
    second: np.ndarray
    condition: np.ndarray


@np.errstate(all="ignore")
def logsumexp(x, axis=None, where=None, b=None):
    """Relative to the largest term, whose own 1 is added by log1p."""
    z = _logits(x, where, 1)
    b = np.broadcast_to(1 if b is None else _wide(b), z.shape)
    b = np.where(np.isneginf(z), 0, b)

    def largest_of(terms):
        return np.max(terms, axis=axis, keepdims=True, initial=-np.inf)

    # Relative to the largest x first: log b may be nothing beside it.
    x_max = largest_of(np.where(b == 0, -np.inf, z))
    d = z - np.where(np.isneginf(x_max), 0, x_max)
    y = np.where(b == 0, -np.inf, d + np.log(np.abs(b)))
    top = largest_of(y)
    shift = np.where(np.isneginf(top), 0, top)
    w = np.sign(b) * np.exp(y - shift)
    largest = (_largest(np.abs(w), axis) if w.size else w != 0) & (w != 0)

    def total(terms):
        return terms.sum(axis=axis, keepdims=True)

    first, rest = total(np.where(largest, w, 0)), total(np.where(largest, 0, w))
    s, excess = first + rest, first * rest
    log_s = np.where(excess > -0.5, np.log1p(excess), np.log(np.abs(s)))
    value = x_max + (top + log_s)
    second = largest_of(np.where(largest, -np.inf, y))

    def share(terms):
        return np.where((s == 0) | np.isneginf(z), 0, terms / np.where(s == 0, 1, s))

    value = np.where(s == 0, -np.inf, value)
    condition = total(np.abs(w)) / np.abs(s)
    reduced = tuple(range(z.ndim)) if axis is None else axis
    value, sign, second, condition = (
        each.squeeze(reduced) for each in (value, np.sign(s), top - second, condition)
    )
    return LogSumExp(value, sign, share(w), share(np.exp(d - shift)), second, condition)


def _largest(p, axis):
    """A mask of one entry a row: the (first) largest."""
    flat = p if axis is not None else p.reshape(-1)
    axes = axis if isinstance(axis, tuple) else (-1,) if axis is None else (axis,)
    moved = np.moveaxis(flat, axes, range(-len(axes), 0))
    rows = moved.reshape(*moved.shape[: moved.ndim - len(axes)], -1)
    one = np.zeros(rows.shape, bool)
    np.put_along_axis(one, rows.argmax(-1)[..., None], True, -1)
    one = np.moveaxis(one.reshape(moved.shape), range(-len(axes), 0), axes)
    return one.reshape(p.shape)


def less_mean(p, t):
    """`t` less its mean under rows of `p`, relative to that of the largest entry."""
    t = t - np.where(_largest(p, -1), t, 0).sum(-1, keepdims=True)
    total = p.sum(-1, keepdims=True)
    return t - (p * t).sum(-1, keepdims=True) / np.where(total == 0, 1, total)


def softmax_derivative(p, t, scale=1.0):
    """``scale P (t - mean of t)`` along rows of the P that was rounded."""
    p = _wide(p)
    t = np.where(p == 0, 0, _wide(t))
    return np.where(p == 0, 0, np.longdouble(scale) * p * less_mean(p, t))


def softmax_vjp(x, g, axis=-1, where=None, scale=1.0):
    """``scale P (g - sum(P g))``, g taken relative to that of the largest entry."""
    p = softmax(x, axis, where, scale)
    g = np.where(p == 0, 0, _wide(g))
    if p.size:
        at_largest = np.where(_largest(p, axis), g, 0)
        g = g - at_largest.sum(axis=axis, keepdims=True)
    return np.longdouble(scale) * p * (g - (p * g).sum(axis=axis, keepdims=True))


def log_softmax_vjp(x, g, axis=-1, where=None, scale=1.0):
    """``scale (g - P sum(g))``, with 1 - P of the largest entry from the others."""
    p = softmax(x, axis, where, scale)
    valid = ~np.isneginf(_logits(x, where, scale))
    g = np.where(valid, _wide(g), 0)
    largest = _largest(p, axis) if p.size else np.zeros(p.shape, bool)
    rest = np.where(largest, 0, p).sum(axis=axis, keepdims=True)
    others = g.sum(axis=axis, keepdims=True) - g
    dx = np.where(largest, g * rest - p * others, g - p * (g + others))
    return np.longdouble(scale) * np.where(valid, dx, 0)


def log_softmax_vjp_terms(x, g):
    """Per row, what the errors of `log_softmax_vjp` are relative to, and in what units.

    Returns:
      The largest ``|g| (1 - P) + P sum(|g| of the others)``, the size of the terms that
      a gradient is the difference of; and how far the second entry is below the
      largest, of which half, in eps, is the relative error of its P.
    """
    p, g = softmax(x), np.abs(_wide(g))
    largest = _largest(p, -1)
    rest = np.where(largest, 0, p).sum(-1, keepdims=True)
    others = np.where(largest, rest, 1 - p)
    second = np.where(largest, -np.inf, _wide(x)).max(-1)
    terms = g * others + p * (g.sum(-1, keepdims=True) - g)
    return terms.max(-1), _wide(x).max(-1) - second


class Rows(NamedTuple):
    """What cross-entropy and its derivatives need of rows along the last axis.

    Attributes:
      p, others: P, and 1 - P from the other entries of the row.
      below: How far below the largest entry; 0 of what is absent.
      cost: -log P, +inf of what is absent.
      lse: Log-sum-exp, -inf of an empty row.
      slope: Derivative of the entry with respect to the logit.
      valid: Whether there is an entry: neither masked nor -inf.
    """

    p: np.ndarray
    others: np.ndarray
    below: np.ndarray
    cost: np.ndarray
    lse: np.ndarray
    slope: np.ndarray
    valid: np.ndarray


def rows(x, where=None, scale=1.0, softcap=None):
    """The `Rows` of logits, scaled and, with a soft cap, capped."""
    z = _logits(x, where, scale)
    valid = ~np.isneginf(z)
    slope = np.broadcast_to(np.longdouble(scale), z.shape)
    if softcap is not None:
        u = np.where(valid, z, 0) / np.longdouble(softcap)
        z = np.where(valid, softcap * np.tanh(u), -np.inf)
        slope = slope / np.cosh(u) ** 2
    row_max = np.max(z, axis=-1, keepdims=True, initial=-np.inf)
    d = z - np.where(np.isneginf(row_max), 0, row_max)
    e = np.exp(d)
    largest = _largest(e, -1) & valid
    rest = np.where(largest, 0, e).sum(-1, keepdims=True)
    total = 1 + rest
    others = np.where(largest, rest, total - e) / total
    below = np.where(valid, -d, 0)
    cost = np.where(valid, np.log1p(rest) + below, np.inf)
    lse = (row_max + np.log1p(rest))[..., 0]
    return Rows(e / total, others, below, cost, lse, slope, valid)


def label_weights(of, labels, smoothing=0.0, where=None):
    """The weight of each entry: of an index, or of weights that are not masked."""
    labels = np.asarray(labels)
    if np.issubdtype(labels.dtype, np.integer):
        t = np.arange(of.p.shape[-1]) == labels[..., None].astype(np.int64)
    else:
        t = np.broadcast_to(_wide(labels), of.p.shape)
        t = t if where is None else np.where(where, t, 0)
    n = np.maximum(of.valid.sum(-1, keepdims=True), 1)
    smoothing = np.longdouble(smoothing)
    return (1 - smoothing) * t + smoothing / n * of.valid


def weighted_cost(t, cost):
    """``t cost``, 0 where t is, whatever the cost."""
    return np.where(t == 0, 0, t * np.where(t == 0, 0, cost))


def cross_entropy(of, t, z_loss=0.0):
    """``sum(-t log P) + z_loss lse^2``; 0 of an empty row."""
    empty = np.isneginf(of.lse)
    z = np.longdouble(z_loss) * np.where(empty, 0, of.lse) ** 2
    return np.where(empty, 0, weighted_cost(t, of.cost).sum(-1) + z)


def cross_entropy_vjp(of, t, g, g_lse=0.0, z_loss=0.0):
    """The gradient for the logits, the part of -t from 1 - P; g is one a row."""
    total = t.sum(-1, keepdims=True)
    dz = (total - t) * of.p - t * of.others
    lse = np.where(np.isneginf(of.lse), 0, of.lse)
    d_lse = 2 * np.longdouble(z_loss) * lse * _wide(g) + _wide(g_lse)
    dz = _wide(g)[..., None] * dz + d_lse[..., None] * of.p
    return np.where(of.valid, dz * of.slope, 0)


def entropy(of):
    """``-sum(P log P)``; 0 of an empty row."""
    return weighted_cost(of.p, of.cost).sum(-1)


def entropy_vjp(of, g):
    """``-P (log P + entropy)``, both relative to the largest entry."""
    mean = (of.p * of.below).sum(-1, keepdims=True)
    return _wide(g)[..., None] * of.p * (of.below - mean) * of.slope


class Terms(NamedTuple):
    """What the errors of a row's gradient are relative to; see `entropy_terms`.

    Attributes:
      each: Of each entry, the larger of its terms.
      distance: How far below the maximum an entry is: half of it, in eps, is the error
        of that entry's P.
    """

    each: np.ndarray
    distance: np.ndarray


def entropy_terms(of):
    """The `Terms` of `entropy_vjp`, ``P below`` and ``P mean``, where they matter."""
    weighted = of.p * of.below
    mean = weighted.sum(-1, keepdims=True)
    terms = np.maximum(weighted, of.p * mean)
    at = weighted.argmax(-1)[:, None]
    return Terms(terms, np.take_along_axis(of.below, at, -1)[:, 0])


def row_error(got, want, dtype, axis=-1, least=0.0):
    """Worst row error: max |got - want| over the row's max |want|.

    Counted are rows whose largest entry is a finite number of `dtype` and at least its
    tiny / eps: all that is within eps of it is normal, and the row can be represented;
    and at least `least`.
    """
    got, want = _wide(got), np.asarray(want)
    info = jnp.finfo(dtype)
    largest = np.abs(want).max(axis=axis, keepdims=True)
    counted = (largest >= float(info.tiny) / float(info.eps)) & (largest < info.max)
    counted &= largest >= least
    assert counted.any(), "no row of this case can be represented"
    error = np.abs(got - want).max(axis=axis, keepdims=True)
    return float((error[counted] / largest[counted]).max())


def ulps(got, want, dtype, flushed=0):
    """Worst relative error in units of eps, over the entries that are normal numbers.

    Less what rounding ``x - max`` takes from a probability, and from the logarithm of
    one next to 1, which is the sum of the others: half of |log P| (at most log N above
    |x - max|) in units of the eps that is computed with. `flushed` is how many terms of
    a sum may have been too small for float32: XLA takes subnormal numbers for 0.
    """
    got, want = _wide(got), np.asarray(want)
    info = jnp.finfo(dtype)
    normal = np.abs(want) >= float(info.tiny)
    got, want = got[normal], want[normal]
    lost = flushed * float(np.finfo(np.float32).tiny)
    error = np.maximum(np.abs(got - want) - lost, 0) / np.abs(want)
    working = min(float(info.eps), float(np.finfo(np.float32).eps))
    rounded = -np.log(np.clip(np.abs(want), float(info.tiny), 1)) / 2
    error = np.maximum(error - rounded * working, 0)
    return float(error.max(initial=0)) / float(info.eps)
