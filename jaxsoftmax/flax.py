"""Attention for Flax that does not store its weights.

`attention_fn` has the parameters both of Flax's attention modules pass, so it
can be given as `attention_fn` to `flax.linen.MultiHeadDotProductAttention` and
to `flax.nnx.MultiHeadAttention`. It is `jaxsoftmax.dot_product_attention` with
Flax's arguments: the weights, an array `[..., query, key]`, are computed in
blocks, used and forgotten, in the forward and in the backward pass. Flax itself
is imported only when weights are sown into a module: the function works on plain
arrays without Flax.

What differs from Flax's own attention:

* Logits, softmax and sums are float32 whatever the inputs are (float64 for
  float64 inputs). Weights are rounded to the dtype of the values for the product
  with them, and the result is rounded.
* A query whose mask allows no key gets an output of zero and a zero gradient.
  Flax gives such a row the same weight `1 / keys` everywhere.
* Integer inputs are refused, where Flax turns them into float32.

Some arguments need the weights themselves: `module`, which they are sown into, the
two einsums, and `force_fp32_for_softmax` for 16-bit inputs, where weights and
result are float32. With any of these the weights are computed whole, by
`jaxsoftmax.softmax`, and rounded once, to the dtype of the inputs unless they are to
be float32; that is the only float array of their size that the backward pass keeps.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from jaxsoftmax import softmax
from jaxsoftmax._attend import checks
from jaxsoftmax._attend.call import ATTENTION, Config, Inputs, both, in_reach
from jaxsoftmax._attention import attend
from jaxsoftmax._core import dispatch
from jaxsoftmax._core.checks import (
    as_array,
    check_dtype,
    check_flag,
    check_precision,
    check_softcap,
    floating,
    is_real,
    number,
    shaped,
    with_rank,
)
from jaxsoftmax._rows.xla import working_dtype

__all__ = ["attention_fn"]

Einsum = Callable[[str, jax.Array, jax.Array], jax.Array]


# Every parameter is named: linen drops, without a word, each argument that is
# not in the signature, so `**kwargs` here would lose the mask.
def attention_fn(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: jax.Array | None = None,
    dropout_rate: ArrayLike = 0.0,
    deterministic: bool = False,
    dtype: DTypeLike | None = None,
    precision: jax.lax.PrecisionLike = None,
    module: Any | None = None,
    force_fp32_for_softmax: bool = False,
    einsum_dot_general: Callable[..., jax.Array] | None = None,
    qk_attn_weights_einsum: Einsum | None = None,
    attn_weights_value_einsum: Einsum | None = None,
    is_causal: bool = False,
    scale: ArrayLike | None = None,
    logits_soft_cap: ArrayLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | Sequence[str] | None = None,
    query_offset: ArrayLike = 0,
) -> jax.Array:
    """Dot-product attention: `softmax(query @ key * scale + bias) @ value`.

    Pass it as `attention_fn=jaxsoftmax.flax.attention_fn` to Flax's attention
    modules, or call it on arrays. Batch axes are optional and may be several.
    With fewer key heads than query heads (grouped-query attention), query head
    `h` reads key head `h // (query_heads // key_heads)`.

    The weights are not stored, see `jaxsoftmax.dot_product_attention`, unless
    `module`, the einsums, or `force_fp32_for_softmax` on 16-bit inputs ask for
    them: then the backward pass keeps them.

    The last five parameters are not Flax's. `functools.partial` gives them to a
    module: `attention_fn=functools.partial(attention_fn, logits_soft_cap=50.0)`.
    So it gives `is_causal` to the module of Linen, which has no such argument; that
    of NNX passes `is_causal` in each call, so there it is
    `layer(x, is_causal=True)`. Positions are counted from the first key of a call:
    with a cache of keys (`decode=True`), where a call has one query, a window is that
    of key 0 unless `query_offset` says where the query stands, as the module does not.

    Args:
      query: Array `[batch..., query_length, heads, depth]`.
      key: Array `[batch..., key_length, key_heads, depth]`; `key_heads` divides
        `heads`.
      value: Array `[batch..., key_length, key_heads, value_depth]`.
      bias: Floating array added to the scaled logits, broadcastable to
        `[batch..., heads, query_length, key_length]`. Differentiable.
      mask: Boolean array, or an integer or floating one where non-zero means
        "attend", as Flax's mask makers return; broadcastable to the shape
        above.
      broadcast_dropout: Draw one dropout mask `[query_length, key_length]` for
        all batch entries and heads, rather than one for each.
      dropout_rng: Random key of the dropout. Same key, same dropped weights as
        Flax's own attention, with what JAX has by default: a key of threefry,
        `jax_threefry_partitionable`, and no 64-bit mode.
      dropout_rate: Probability of dropping a weight, in `[0, 1)`.
      deterministic: If true, nothing is dropped.
      dtype: Floating dtype the inputs are cast to, and of the result. By
        default the common dtype of `query`, `key` and `value`.
      precision: Passed to all matrix products, see `jax.lax.Precision`.
      module: Linen or NNX module that the weights, before dropout, are sown
        into under the name `attention_weights`.
      force_fp32_for_softmax: The softmax is computed in float32 in any case. If
        true the weights also stay float32 (float64 for float64 inputs), and
        so does the result.
      einsum_dot_general: Not supported; anything but None is refused.
      qk_attn_weights_einsum: Used as `f(equation, query, key)` in place of
        `jnp.einsum`. To be given together with the next one, and without
        `precision`.
      attn_weights_value_einsum: Used as `f(equation, weights, value)`.
      is_causal: If true, query `i` attends to keys `0..i + query_offset` only, on
        top of `mask`.
      scale: Multiplies the products of queries and keys: a finite number, or a real
        array broadcastable to the logits, which is differentiable. `1 / sqrt(depth)` by
        default.
      logits_soft_cap: If given, logits `s` become `cap * tanh(s / cap)`, after
        the bias.
      local_window_size: A pair `(left, right)`: query `i`, at `p = i + query_offset`,
        attends to keys `p - left..p + right` only, on top of `mask`. One number stands
        for both.
      implementation: As in `jaxsoftmax.dot_product_attention`. The form that
        stores the weights is `"xla"`.
      query_offset: Where the first query stands among the keys: an int, or integers
        that broadcast to `[batch...]`, such as the index of a cache.

    Returns:
      Array `[batch..., query_length, heads, value_depth]` of the dtype of the
      inputs, or of `dtype`.

    Raises:
      ValueError: If the shapes of `query`, `key`, `value`, `bias` or `mask` do
        not fit together, `dropout_rate` is outside `[0, 1)`, `dropout_rng` is
        missing when weights are to be dropped, only one of the two einsums is
        given, or `precision` is given along with them; if `scale` is a number
        that is not finite, `logits_soft_cap` is not finite and above 0, or
        `local_window_size` is negative.
      TypeError: If an input or `dtype` is not floating, if `bias` is not
        floating, if `mask` is complex, if `logits_soft_cap` or `dropout_rate` is
        traced, or if `module` is no Flax module.
      NotImplementedError: If `einsum_dot_general` is given, or
        `implementation` does not allow what the other arguments need.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoftmax.flax import attention_fn
      >>> query = jnp.zeros((3, 1, 2))  # 3 queries, 1 head, depth 2
      >>> key = jnp.ones((3, 1, 2))
      >>> value = jnp.array([2.0, 4.0, 6.0]).reshape(3, 1, 1)
      >>> attention_fn(query, key, value, is_causal=True).ravel().tolist()
      [2.0, 3.0, 4.0]
    """
    if einsum_dot_general is not None:
        raise NotImplementedError(
            "einsum_dot_general is not supported: pass qk_attn_weights_einsum and "
            "attn_weights_value_einsum instead"
        )
    rate = number("dropout_rate", dropout_rate, "[0, 1)")
    if check_flag("deterministic", deterministic):
        rate = 0.0
    broadcast_dropout = check_flag("broadcast_dropout", broadcast_dropout)
    wide = check_flag("force_fp32_for_softmax", force_fp32_for_softmax)
    query, key, value = _promote(query, key, value, dtype)
    shape = _logits_shape(query, key, value)
    einsums = _given_einsums(
        precision, qk_attn_weights_einsum, attn_weights_value_einsum
    )
    bias = checks.over_pairs("bias", checks.as_bias(bias), shape)
    mask = checks.over_pairs("mask", _as_bool(mask), shape)
    rate, rng = checks.check_dropout(rate, dropout_rng, "dropout_rng")
    factor, scales, query = checks.check_attention_scale(scale, query)
    scales = checks.over_pairs("scale", scales, shape)
    causal, window, offset, offsets = checks.check_places(
        is_causal, local_window_size, query_offset, shape[:-3]
    )
    config = Config(
        scale=factor,
        causal=causal,
        window=window,
        offset=offset,
        softcap=check_softcap(logits_soft_cap, "logits_soft_cap"),
        dropout_rate=rate,
        dropout_dims=(not broadcast_dropout,) * 2,
        precision=check_precision(precision),
        uses_lse=False,
        asked=dispatch.resolve(implementation, ATTENTION),
    )
    x = Inputs(query, key, value, bias, scale=scales, mask=mask, query_offset=offsets)
    wide = wide and query.dtype != working_dtype(query.dtype)
    if module is None and einsums is None and not wide:
        return _attend(config, x, rng, shape[:-3])
    if config.asked is not None and "xla" not in config.asked:
        raise NotImplementedError(
            f"implementation={implementation!r} does not compute the weights that "
            "module, the einsums and force_fp32_for_softmax need; 'xla' does"
        )
    dtype = working_dtype(query.dtype) if wide else query.dtype
    einsums = einsums or _products(query.dtype, precision)
    return _attend_with_weights(config, x, rng, shape, einsums, module, dtype)


def _promote(
    query: ArrayLike, key: ArrayLike, value: ArrayLike, dtype: DTypeLike | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Casts the inputs to `dtype`, or else to their common dtype."""
    q, k, v = floating("query", query), floating("key", key), floating("value", value)
    # result_type obeys jax_numpy_dtype_promotion: "strict" refuses mixed inputs.
    common = jnp.result_type(q, k, v) if dtype is None else check_dtype(dtype, q.dtype)
    return _cast(q, common), _cast(k, common), _cast(v, common)


def _cast(x: jax.Array, dtype: np.dtype[Any]) -> jax.Array:
    return x if x.dtype == dtype else x.astype(dtype)  # copies as jnp.asarray does


def _logits_shape(
    query: jax.Array, key: jax.Array, value: jax.Array
) -> tuple[int, ...]:
    """Checks the inputs against each other; `[batch..., heads, queries, keys]`."""
    if query.ndim < 3:
        raise ValueError(
            "query must have the shape (batch..., length, heads, head size), got "
            f"{query.shape}"
        )
    *batch, length, heads, depth = query.shape
    key_heads = key.shape[-2] if key.ndim >= 2 else 0
    checks.check_groups(heads, key_heads)
    key_length = key.shape[-3] if key.ndim >= 3 else 0
    shaped("key", key, (*batch, key_length, key_heads, depth))
    value_depth = value.shape[-1] if value.ndim else 0
    shaped("value", value, (*batch, key_length, key_heads, value_depth))
    return (*batch, heads, length, key_length)


def _given_einsums(
    precision: jax.lax.PrecisionLike,
    for_logits: Einsum | None,
    for_values: Einsum | None,
) -> tuple[Einsum, Einsum] | None:
    """The caller's pair of matrix products, or None."""
    if for_logits is None and for_values is None:
        return None
    if for_logits is None or for_values is None:
        raise ValueError(
            "qk_attn_weights_einsum and attn_weights_value_einsum must be given "
            "together"
        )
    if precision is not None:
        raise ValueError(
            "precision cannot be given together with qk_attn_weights_einsum and "
            "attn_weights_value_einsum"
        )
    return for_logits, for_values


def _as_bool(mask: ArrayLike | None) -> jax.Array | None:
    """`mask`, in which any number but 0 is True, as Flax's mask makers return them."""
    if mask is None:
        return None
    mask = as_array(mask, "mask")
    if mask.dtype == jnp.bool_:
        return mask
    if not is_real(mask.dtype):
        raise TypeError(f"mask must be boolean, integer or floating, got {mask.dtype}")
    return mask != 0


# --- without weights ------------------------------------------------------------------


def _attend(
    config: Config, x: Inputs, rng: jax.Array | None, batch: tuple[int, ...]
) -> jax.Array:
    """`dot_product_attention` of checked arguments."""
    query, key, value = checks.widened(x.query, x.key, x.value)
    arrays: Any = (query, key, value, x.bias, x.mask, x.scale, x.query_offset)
    if not batch:
        arrays = jax.tree.map(lambda a: a[None], arrays)
    *others, offset = arrays
    given = checks.as_inputs(*others, query_offset=offset, dropout_key=rng)
    out, *_ = attend(config, given)
    out = _cast(out, x.query.dtype)
    return out if batch else out[0]


# --- with weights ---------------------------------------------------------------------


def _attend_with_weights(
    config: Config,
    x: Inputs,
    rng: jax.Array | None,
    shape: tuple[int, ...],
    einsums: tuple[Einsum, Einsum],
    module: Any | None,
    dtype: np.dtype[Any],
) -> jax.Array:
    """Attention that computes the weights whole, of a shape, in `dtype`."""
    heads, key_heads = shape[-3], x.key.shape[-2]

    def group(a: jax.Array, axis: int = -3) -> jax.Array:
        """Splits the axis of heads in two: key heads, and the query heads of each.

        The softmax then runs on the logits in the very layout both matrix products use,
        so that the weights are kept for the backward pass once, not once in each.
        """
        if heads == key_heads:
            return a
        split = (1, 1) if a.shape[axis] == 1 else (key_heads, heads // key_heads)
        return a.reshape(*a.shape[:axis], *split, *a.shape[axis + 1 :])

    queries, keys = (jnp.arange(n, dtype=jnp.int32) for n in shape[-2:])
    near = in_reach(config, queries, keys, x.query_offset)
    if near is not None and near.ndim > 2:  # the same for all heads
        near = near[..., None, :, :]
    mask = both(x.mask, None if near is None else with_rank(near, len(shape)))
    bias, mask, scale = jax.tree.map(group, (x.bias, mask, x.scale))  # None stays None
    grouped = x._replace(query=group(x.query, -2), bias=bias, mask=mask, scale=scale)
    weights = _weights(config, grouped, einsums[0], dtype)
    if module is not None:
        _sow(module, weights.reshape(shape))
    if rng is not None:
        rate = config.dropout_rate
        one_mask = not config.dropout_dims[0]
        drawn = (*(1,) * (len(shape) - 2), *shape[-2:]) if one_mask else shape
        keep = group(jax.random.bernoulli(rng, 1.0 - rate, drawn))
        # Flax rounds the factor to the inputs' dtype; so does this, to drop alike.
        # The backward keeps `keep`, one byte per entry, rather than a float factor.
        kept = jnp.asarray(1.0 - rate, x.query.dtype)
        factor = jnp.ones((), x.query.dtype) / kept
        weights = jnp.where(keep, weights * factor.astype(weights.dtype), 0.0)
    value = _cast(x.value, weights.dtype)
    if heads == key_heads:
        return einsums[1]("...hqk,...khd->...qhd", weights, value)
    out = einsums[1]("...hgqk,...khd->...qhgd", weights, value)
    return out.reshape(*out.shape[:-3], heads, out.shape[-1])


def _products(
    dtype: np.dtype[Any], precision: jax.lax.PrecisionLike
) -> tuple[Einsum, Einsum]:
    """The two matrix products as `jnp.einsum` computes them."""
    einsum = functools.partial(jnp.einsum, precision=precision)
    # The logits leave the product in float32, not rounded to the inputs' dtype.
    wide = functools.partial(einsum, preferred_element_type=working_dtype(dtype))
    return wide, einsum


def _weights(
    config: Config, x: Inputs, einsum: Einsum, dtype: np.dtype[Any]
) -> jax.Array:
    """The attention weights `[batch..., heads, queries, keys]` in `dtype`.

    Of `x` all but the keys come with their heads grouped, if there are fewer key heads;
    so go the weights.
    """
    grouped = x.query.ndim != x.key.ndim
    equation = "...qhgd,...khd->...hgqk" if grouped else "...qhd,...khd->...hqk"
    logits = _cast(einsum(equation, x.query, x.key), working_dtype(x.key.dtype))
    if x.bias is None and config.softcap is None and x.scale is None:
        return softmax(logits, where=x.mask, scale=config.scale, dtype=dtype)
    # These need scaled logits, so the softmax cannot do the scaling.
    logits = logits * config.scale
    if x.scale is not None:
        logits = logits * _cast(x.scale, logits.dtype)
    if x.bias is not None:
        logits = logits + _cast(x.bias, logits.dtype)
    if config.softcap is not None:
        capped = config.softcap * jnp.tanh(logits / config.softcap)
        logits = jnp.where(logits == -jnp.inf, logits, capped)
    return softmax(logits, where=x.mask, dtype=dtype)


def _sow(module: Any, weights: jax.Array) -> None:
    """Sows the weights into a Linen or NNX module."""
    from flax import linen, nnx  # Flax is optional: only this needs it.

    if isinstance(module, nnx.Module):
        module.sow(nnx.Intermediate, "attention_weights", weights)
    elif isinstance(module, linen.Module):
        module.sow("intermediates", "attention_weights", weights)
    else:
        raise TypeError(f"module must be a Flax module, got {type(module).__name__}")
