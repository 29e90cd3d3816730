"""The oracle of attention: values, derivatives and error bounds in numpy, in float64.

`forward` takes the arguments of `jaxsoftmax.dot_product_attention`, with the mask of
kept entries in the place of the dropout key. What it returns has the derivatives by
their formulas, and `bounds`: how far a computation in a given dtype may be from them.
"""

import dataclasses

import numpy as np
from ml_dtypes import finfo  # of bfloat16 too


def wide(x):
    return np.asarray(x).astype(np.float64)


def least_of(dtype):
    """The most that one rounding to `dtype` moves a number too small to be normal.

    XLA takes numbers that are subnormal in float32, or float64, for 0.
    """
    info = finfo(dtype)
    return float(info.smallest_subnormal if dtype == "float16" else info.tiny)


def _heads_first(x, groups=1):
    """[B, L, K, H] as [B, N, L, H]: each head of keys once for every query head."""
    return np.repeat(np.swapaxes(x, 1, 2), groups, axis=1)


def _heads_summed(x, groups):
    """The transpose of `_heads_first`."""
    b, n, length, width = x.shape
    summed = x.reshape(b, n // groups, groups, length, width).sum(2)
    return np.swapaxes(summed, 1, 2)


def sum_to(x, shape):
    """The transpose of broadcasting `shape` to that of `x`."""
    x = x.sum(tuple(range(x.ndim - len(shape))))
    ones = tuple(i for i, n in enumerate(shape) if n == 1)
    return x.sum(ones, keepdims=True).reshape(shape)


def window_of(local_window_size):
    if local_window_size is None or isinstance(local_window_size, tuple):
        return local_window_size
    return local_window_size, local_window_size


def allowed_entries(
    shape,
    mask=None,
    is_causal=False,
    query_seq_lengths=None,
    key_value_seq_lengths=None,
    local_window_size=None,
    q_segment_ids=None,
    kv_segment_ids=None,
    query_offset=0,
):
    """Which of the logits, of `shape` [B, N, T, S], take part."""
    _, _, t, s = shape
    q, k = np.arange(t)[:, None], np.arange(s)[None, :]
    allowed = np.ones(shape, bool)
    if mask is not None:
        allowed &= np.broadcast_to(np.asarray(mask) != 0, shape)
    each = lambda x: np.asarray(x).astype(np.int64).reshape(-1, 1, 1, 1)
    place = q + each(query_offset)
    if is_causal:
        allowed &= k <= place
    if local_window_size is not None:
        left, right = window_of(local_window_size)
        allowed &= (k >= place - left) & (k <= place + right)
    if query_seq_lengths is not None:
        allowed &= q < each(query_seq_lengths)
    if key_value_seq_lengths is not None:
        allowed &= k < each(key_value_seq_lengths)
    if q_segment_ids is not None:
        dq = np.asarray(q_segment_ids).reshape(-1, 1, t, 1)
        dk = np.asarray(kv_segment_ids).reshape(-1, 1, 1, s)
        allowed &= dq == dk
    return allowed


@dataclasses.dataclass(frozen=True)
class Attention:
    """A forward pass: [B, N, T, ...] inside, the shapes of the arguments outside.

    Attributes:
      q, k, v: In float64; 0 where no entry that takes part has them.
      s, p: The logits, -inf where absent; P, which sums to 1 with `p_sink`.
      scale: A number, or an array for heads and queries.
      slope: Of a capped logit with respect to the one before the cap.
      dropped: What P is multiplied by: 1, or the kept entries' 1 / (1 - rate).
      size: Of each logit, with absolute values of all that is summed in it.
    """

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    bias: np.ndarray | None
    sinks: np.ndarray | None
    scale: np.ndarray
    cap: float | None
    s: np.ndarray
    slope: np.ndarray
    size: np.ndarray
    p: np.ndarray
    p_sink: np.ndarray
    dropped: np.ndarray
    lse_: np.ndarray
    groups: int
    batched: bool

    # --- values -----------------------------------------------------------------------

    @property
    def out_(self):
        return (self.p * self.dropped) @ self.v

    @property
    def out(self):
        return self._result(self.out_)

    @property
    def lse(self):
        return self._result(self.lse_)

    def _result(self, x):
        x = np.swapaxes(x, 1, 2)
        return x if self.batched else x[0]

    def _cotangents(self, g_out, g_lse):
        lift = lambda g: wide(g) if self.batched else wide(g)[None]
        g = np.swapaxes(lift(g_out), 1, 2)
        if g_lse is None:
            return g, np.zeros(g.shape[:3])
        g_lse = np.swapaxes(lift(g_lse), 1, 2)
        return g, np.where(np.isneginf(self.lse_), 0, g_lse)

    def _arguments(self, dq, dk, dv, dlogits, dsinks):
        """By the names of the arguments, in their shapes."""
        found = {
            "query": np.swapaxes(dq, 1, 2),
            "key": _heads_summed(dk, self.groups),
            "value": _heads_summed(dv, self.groups),
        }
        if not self.batched:
            found = {name: x[0] for name, x in found.items()}
        if self.bias is not None:
            found["bias"] = sum_to(dlogits, self.bias.shape)
        if np.ndim(self.scale):
            dscale = dlogits * (self.q @ np.swapaxes(self.k, -1, -2))
            found["scale"] = sum_to(dscale, self.scale.shape)
        if self.sinks is not None:
            found["sinks"] = dsinks.sum((0, 2))
        return found

    # --- derivatives ------------------------------------------------------------------

    def _vjp(self, g, g_lse):
        dp = (g @ np.swapaxes(self.v, -1, -2)) * self.dropped
        d = (g * self.out_).sum(-1) - g_lse
        ds = self.p * (dp - d[..., None])
        return dp, d, ds, ds * self.slope

    def vjp(self, g_out, g_lse=None):
        """Cotangents of query, key, value and, where given, bias and sinks."""
        g, g_lse = self._cotangents(g_out, g_lse)
        _, d, _, dz = self._vjp(g, g_lse)
        return self._arguments(
            self.scale * dz @ self.k,
            self.scale * np.swapaxes(dz, -1, -2) @ self.q,
            np.swapaxes(self.p * self.dropped, -1, -2) @ g,
            dz,
            -self.p_sink * d,
        )

    def _lift(self, tangent, groups=1):
        t = wide(tangent)
        return _heads_first(t if self.batched else t[None], groups)

    def _jvp(self, tangents):
        """Tangents of the logits and of lse."""

        def lift(name, groups=1):
            return self._lift(tangents[name], groups)

        dz = np.zeros(self.s.shape)
        if "query" in tangents:
            dz = dz + self.scale * lift("query") @ np.swapaxes(self.k, -1, -2)
        if "key" in tangents:
            t = lift("key", self.groups)
            dz = dz + self.scale * self.q @ np.swapaxes(t, -1, -2)
        if "scale" in tangents:
            products = self.q @ np.swapaxes(self.k, -1, -2)
            dz = dz + wide(tangents["scale"]) * products
        if "bias" in tangents:
            dz = dz + wide(tangents["bias"])
        ds = np.where(self.p == 0, 0, dz * self.slope)
        lse = (self.p * ds).sum(-1)
        if "sinks" in tangents:
            lse = lse + self.p_sink * wide(tangents["sinks"])[:, None]
        return ds, lse

    def jvp(self, **tangents):
        """Tangents of out and lse, for those of some arguments by their names."""
        ds, lse = self._jvp(tangents)
        out = (self.p * (ds - lse[..., None]) * self.dropped) @ self.v
        if "value" in tangents:
            t = self._lift(tangents["value"], self.groups)
            out = out + (self.p * self.dropped) @ t
        return self._result(out), self._result(lse)

    # --- errors -----------------------------------------------------------------------

    def _logit_errors(self, c):
        """Of a logit, of lse, and of P relative to it, in units of `c`."""
        finite = np.where(np.isneginf(self.lse_), 0, self.lse_)
        s_error = np.where(self.p == 0, 0, c * self.size)
        lse_error = (self.p * s_error).sum(-1) + c * (1 + np.abs(finite))
        return s_error, lse_error, s_error + lse_error[..., None] + c

    def jvp_bounds(self, dtype, **tangents):
        """How far the tangents of out and lse may be off, as `bounds` has it.

        In 16 bits P times the tangents of the logits is rounded before it is multiplied
        by the values. From the former anything between the least and the largest that a
        query sees may have been taken, from the latter the output; which is added again
        as it was computed, as a mean with weights that are rounded. So of what all keys
        have in common, or all values, no digits are lost. Without dropout.
        """
        info = finfo(dtype)
        eps = float(np.finfo(np.float64 if info.bits == 64 else np.float32).eps)
        c = 8 * eps
        half = float(info.eps) / 2 if info.bits == 16 else 0.0
        least = least_of(dtype) * (self.p != 0)
        ds, lse = self._jvp(tangents)
        size = np.zeros(self.s.shape)
        absolute = lambda x: np.swapaxes(np.abs(x), -1, -2)
        if "query" in tangents:
            t = np.abs(self._lift(tangents["query"]))
            size = size + np.abs(self.scale) * t @ absolute(self.k)
        if "key" in tangents:
            t = self._lift(tangents["key"], self.groups)
            size = size + np.abs(self.scale * self.q) @ absolute(t)
        if "bias" in tangents:
            size = size + np.abs(wide(tangents["bias"]))
        sink = np.zeros(lse.shape)
        if "sinks" in tangents:
            sink = sink + wide(tangents["sinks"])[:, None]
        s_error, lse_error, p_error = self._logit_errors(c)
        ds_error = c * size * self.slope
        if self.cap is not None:
            ds_error = ds_error + np.abs(ds) * (c + 2 * s_error / self.cap)
        ds_error = np.where(self.p == 0, 0, ds_error)
        dlse_error = (self.p * (ds_error + (p_error + c) * np.abs(ds))).sum(-1)
        dlse_error = dlse_error + self.p_sink * (lse_error + 2 * c) * np.abs(sink)
        dlse_error = dlse_error + c * np.abs(lse)

        def extreme(largest):
            reduce, start = (np.max, -np.inf) if largest else (np.min, np.inf)
            found = reduce(np.where(self.p == 0, start, ds), -1, initial=start)
            other = np.where(self.p_sink == 0, start, sink)
            found = np.maximum(found, other) if largest else np.minimum(found, other)
            return np.where(np.isinf(found), 0, found)

        reach = (extreme(True) - extreme(False))[..., None]
        # A column at a time: all would be an array of pairs and columns.
        columns = (np.moveaxis(x, -1, 0)[..., None] for x in (self.v, self.out_))
        spread = [
            (self.p * np.abs(np.swapaxes(v, -1, -2) - out)).sum(-1)
            for v, out in zip(*columns, strict=True)
        ]
        spread = np.stack(spread, -1)
        sizes = self.p @ np.abs(self.v) + np.abs(self.out_)
        rates_error = self.p * (
            ds_error + p_error * (np.abs(ds - lse[..., None]) + reach) + c * reach
        ) + least * (1 + half * reach)
        out_error = rates_error @ np.abs(self.v)
        out_error = out_error + np.abs(self.out_) * rates_error.sum(-1, keepdims=True)
        out_error = out_error + 2 * half * reach * spread
        out_error = out_error + (c + half**2) * reach * sizes
        out_error = out_error + reach * (least @ np.abs(self.v))
        if "value" in tangents:
            t = np.abs(self._lift(tangents["value"], self.groups))
            out_error = out_error + (self.p * (p_error + half + c) + least) @ t
        return self._result(out_error), self._result(dlse_error)

    def bounds(self, dtype, g_out=None, g_lse=None):
        """How far from these the results in `dtype` may be, before they are rounded.

        A first-order analysis, in units of the eps of what is computed in (float32, or
        float64): a sum, a product of rows, exp, log and tanh have an error of 8 eps of
        the sum of the terms' absolute values, as elsewhere in these tests; an error e
        of a logit is one of e P in P. In 16-bit dtypes P and dS may be rounded before
        they are multiplied by v, k and q.

        Returns:
          ``out`` and ``lse``, or with `g_out` the arguments' cotangents, by name.
        """
        info = finfo(dtype)
        eps = float(np.finfo(np.float64 if info.bits == 64 else np.float32).eps)
        c = 8 * eps
        half = float(info.eps) / 2 if info.bits == 16 else 0.0
        # What may be lost of an entry of P or dS that is too small to be normal.
        least = least_of(dtype) * (self.p != 0)
        s_error, lse_error, p_error = self._logit_errors(c)
        kept = self.p * self.dropped
        v = np.abs(self.v)
        out_error = (kept * p_error + least) @ v
        if g_out is None:
            out_error = out_error + half * kept @ v
            if (self.dropped != 1).any():
                # What is dropped is rounded too, in the sum that is divided by; and
                # what is kept once more, when it is divided by 1 - rate.
                out_error = out_error + half * (np.abs(self.out_) + kept @ v)
            return {"out": self._result(out_error), "lse": self._result(lse_error)}
        g_out, g_lse = self._cotangents(g_out, g_lse)
        dp, d, ds, dz = self._vjp(g_out, g_lse)
        g = np.abs(g_out)
        # Of D: out is kept in two numbers of 16 bits, and is a mean of values with
        # weights that may be rounded, but sum to 1 as they are.
        mean = (g_out * self.out_).sum(-1)
        size_d = (g * np.abs(self.out_)).sum(-1) + np.abs(g_lse)
        d_error = (c + half**2) * size_d + (g * (out_error + least_of(dtype))).sum(-1)
        if (self.dropped == 1).all():
            d_error = d_error + half * (self.p * np.abs(dp - mean[..., None])).sum(-1)
        else:
            d_error = (
                d_error + half * (self.p * np.abs(dp)).sum(-1) + half * np.abs(mean)
            )
        dp_error = c * (g @ np.swapaxes(v, -1, -2)) * self.dropped
        ds_error = self.p * (
            p_error * np.abs(dp - d[..., None]) + dp_error + d_error[..., None]
        )
        dz_error = ds_error * self.slope + c * np.abs(dz)
        if self.cap is not None:
            dz_error = dz_error + np.abs(ds) * (c + 2 * s_error / self.cap)
        scores_error = dz_error + half * np.abs(dz) + least
        kept_error = kept * (p_error + half) + least
        found = self._arguments(
            np.abs(self.scale) * scores_error @ np.abs(self.k),
            np.abs(self.scale) * np.swapaxes(scores_error, -1, -2) @ np.abs(self.q),
            np.swapaxes(kept_error, -1, -2) @ g,
            dz_error,
            self.p_sink * (d_error + (lse_error + c) * np.abs(d)),
        )
        if np.ndim(self.scale):
            products = np.abs(self.q) @ np.swapaxes(np.abs(self.k), -1, -2)
            terms = (dz_error + c * np.abs(dz)) * products
            found["scale"] = sum_to(terms, self.scale.shape)
        return found


def forward(
    query,
    key,
    value,
    bias=None,
    mask=None,
    *,
    scale=None,
    logits_soft_cap=None,
    sinks=None,
    keep=None,
    dropout_rate=0.0,
    **masks,
):
    """Of the arguments of the public function; `keep`: [B, N, T, S], which P stay."""
    query, key, value = wide(query), wide(key), wide(value)
    batched = query.ndim == 4
    if not batched:
        query, key, value = query[None], key[None], value[None]
    groups = query.shape[2] // key.shape[2]
    q, k, v = (
        _heads_first(query),
        _heads_first(key, groups),
        _heads_first(value, groups),
    )
    shape = (*q.shape[:3], k.shape[2])
    allowed = allowed_entries(shape, mask, **masks)
    used_queries, used_keys = allowed.any(-1)[..., None], allowed.any(-2)[..., None]
    q = np.where(used_queries, q, 0)
    k, v = np.where(used_keys, k, 0), np.where(used_keys, v, 0)
    scale = 1 / np.sqrt(q.shape[-1]) if scale is None else wide(scale)
    s = scale * q @ np.swapaxes(k, -1, -2)
    size = np.abs(scale) * np.abs(q) @ np.swapaxes(np.abs(k), -1, -2)
    if bias is not None:
        bias = wide(bias)
        allowed &= ~np.isneginf(np.broadcast_to(bias, shape))
        added = np.where(allowed, bias, 0)
        s, size = s + added, size + np.abs(added)
    slope = np.ones(shape)
    if logits_soft_cap is not None:
        # Tanh's own error, of a result below the cap.
        size = size / np.cosh(s / logits_soft_cap) ** 2
        slope = 1 / np.cosh(s / logits_soft_cap) ** 2
        s = logits_soft_cap * np.tanh(s / logits_soft_cap)
    size = size + np.abs(s)
    s = np.where(allowed, s, -np.inf)
    logit = np.full(shape[:3], -np.inf)
    if sinks is not None:
        sinks = wide(sinks)
        logit = np.broadcast_to(sinks[:, None], shape[:3])
    top = np.maximum(s.max(-1, initial=-np.inf), logit)
    base = np.where(np.isneginf(top), 0, top)
    e, e_sink = np.exp(s - base[..., None]), np.exp(logit - base)
    total = e.sum(-1) + e_sink
    with np.errstate(divide="ignore"):
        lse = base + np.log(total)
    total = np.where(total == 0, 1, total)
    dropped = np.ones(shape)
    if keep is not None:
        dropped = np.reshape(np.asarray(keep), shape) / (1 - dropout_rate)
    return Attention(
        q=q,
        k=k,
        v=v,
        bias=bias,
        sinks=sinks,
        scale=scale,
        cap=logits_soft_cap,
        s=s,
        slope=slope,
        size=size,
        p=e / total[..., None],
        p_sink=e_sink / total,
        dropped=dropped,
        lse_=lse,
        groups=groups,
        batched=batched,
    )
