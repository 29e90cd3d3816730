"""Attention that keeps no probabilities: the public functions and their derivatives.

What the softmax's backward needs of all keys is one number for each query, the mean of
dP, which is ``rowsum(dO * O)``: so q, k, v, O and lse are all that is kept. What a
block of probabilities is computed with, and when, is in `_attend.xla`, `_attend.cudnn`
and `_attend.triton`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import ArrayLike

from jaxsoftmax._attend import checks as arguments
from jaxsoftmax._attend import kernel_call
from jaxsoftmax._attend.call import ATTENTION, FLOATS, Config, Inputs, Result
from jaxsoftmax._compat import trace
from jaxsoftmax._core import dispatch
from jaxsoftmax._core.autodiff import forward_mode
from jaxsoftmax._core.checks import (
    check_flag,
    check_precision,
    check_softcap,
    floating,
)
from jaxsoftmax._rows.xla import working_dtype

Implementations = str | Sequence[str] | None

# What a policy of `jax.checkpoint` can name: the output and lse, with their low digits.
RESULT_NAME = "jaxsoftmax_attention"

# --- the rule -------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rule(config: Config, *arrays: Any) -> Any:
    return kernel_call.bind("attention", config, Inputs(*arrays))


def _lse_replaced(
    config: Config, x: Inputs, result: Result, *, kept: bool
) -> tuple[Inputs, Result]:
    """What is kept has a finite lse of a query that sees no key; what is used, -inf.

    Residuals are results of a program: for jax_debug_infs an inf among them is one.
    """
    lengths = (x.query_lengths, x.key_lengths)
    optional = (x.mask, x.bias, *lengths, x.query_segments, x.query_offset)
    moved = config.window is not None or config.offset < 0
    if moved or any(a is not None for a in optional):
        pair = (-jnp.inf, float(jnp.finfo(result.lse.dtype).max))
        old, new = pair if kept else pair[::-1]
        lse = jnp.where(result.lse == old, new, result.lse)
        result = result._replace(lse=lse)
    return x, result


def _forward(config: Config, *arrays: Any) -> tuple[Result, tuple[Inputs, Result]]:
    result = _lifted(config, *arrays)
    result = jax.tree.map(lambda a: checkpoint_name(a, RESULT_NAME), result)
    kept = result._replace(max_logits=None)
    return result, _lse_replaced(config, Inputs(*arrays), kept, kept=True)


def _backward(config: Config, residuals: Any, cotangent: Result) -> tuple[Any, ...]:
    x, result = _lse_replaced(config, *residuals, kept=False)
    config = dataclasses.replace(config, uses_max_logits=False)
    cotangent = cotangent._replace(max_logits=None)
    found = kernel_call.bind("attention_gradient", config, x, result, cotangent)
    return tuple(found.get(name) for name in Inputs._fields)


def _pushforward(config: Config, residuals: Any, tangents: Any) -> Any:
    x, result = _lse_replaced(config, *residuals, kept=False)
    asked = config.asked
    if asked is not None and asked != dispatch.DEFINITION and "xla" not in asked:
        # Of what is asked for, none may have a forward mode.
        config = dataclasses.replace(config, asked=(*asked, "xla"))
    tangents = Inputs(*tangents)
    plain = dataclasses.replace(config, uses_max_logits=False)
    found = kernel_call.bind("attention_pushforward", plain, x, result, tangents)
    if not config.uses_max_logits:
        return found
    batch, _, heads, _ = x.query.shape
    none = trace.zeros((batch, heads), result.lse.dtype, *jax.tree.leaves(found))
    return found._replace(max_logits=none)


def _definition(rule: Callable[..., Any]) -> Callable[..., Any]:
    """A rule as what can be differentiated."""

    def definition(config: Config, residuals: Any, moving: Any) -> Any:
        config = dataclasses.replace(config, asked=dispatch.DEFINITION)
        return rule(config, residuals, moving)

    return definition


def _narrow(config: Config, wanted: tuple[int, ...]) -> Config:
    names = tuple(Inputs._fields[i] for i in wanted)
    assert set(names) <= set(FLOATS)
    return dataclasses.replace(config, wanted=names)


_rule.defvjp(_forward, _backward)
_lifted = forward_mode(
    _rule,
    _pushforward,
    pushforward_definition=_definition(_pushforward),
    pullback_definition=_definition(_backward),
    narrow=_narrow,
)


# --- batch dimensions -----------------------------------------------------------------

Found = tuple[jax.Array, jax.Array | None, jax.Array | None]

# The `Inputs` without a batch.
_SHARED = ("sinks", "dropout_key")


@functools.partial(jax.jit, static_argnums=0)
def attend(config: Config, x: Inputs) -> Found:
    """Attention of arguments that are checked, with every derivative.

    Returns the output and, where `config` says that it is of use, lse, and the largest
    logits.

    Args:
      config: What is static.
      x: As `Inputs` says, with at least one batch dimension, or several: [*B] for [B],
        each of a bias, a mask or a scale in full or 1.
    """
    # Inside of `jax.shard_map` a gradient varies as what it is of: that of an array
    # which fewer devices have a share of is added up where the others vary.
    arrays, tree = jax.tree.flatten(x)
    return _over_batch(config, jax.tree.unflatten(tree, trace.varying_alike(arrays)))


def _over_batch(config: Config, x: Inputs) -> Found:
    """Batch dimensions folded into one where that moves nothing, the first ones mapped.

    A mapped dimension does not repeat an array that has 1 there, nor move what devices
    share. In a folded one, blocks beyond all lengths are skipped.
    """
    batch = x.query.shape[:-3]
    given = {n: a for n, a in x._asdict().items() if a is not None and n not in _SHARED}
    # The mask of dropout is one of all entries, in their order.
    drawn_at_once = bool(config.dropout_rate) and config.dropout_dims[0]
    sharded = any(n is not None for n in jax.typeof(x.query).sharding.spec[1:-3])
    ones = (1,) * len(batch)
    whole = all(a.shape[: len(batch)] in (batch, ones) for a in given.values())
    if drawn_at_once or (whole and not sharded):
        folded = {name: _folded(a, batch) for name, a in given.items()}
        result = _lifted(config, *x._replace(**folded))
        lse = result.lse if config.uses_lse else None
        found = (result.out, lse, jax.lax.stop_gradient(result.max_logits))
        return jax.tree.map(lambda a: a.reshape(*batch, *a.shape[1:]), found)
    full = {name: a.shape[0] == batch[0] for name, a in given.items()}
    given = {name: a if full[name] else a[0] for name, a in given.items()}
    axes = Inputs(*(0 if full.get(name) else None for name in Inputs._fields))
    over_others = functools.partial(_over_batch, config)
    return jax.vmap(over_others, in_axes=(axes,))(x._replace(**given))


def _folded(x: jax.Array, batch: tuple[int, ...]) -> jax.Array:
    """`x` with one dimension in place of those of `batch`."""
    lead, rest = x.shape[: len(batch)], x.shape[len(batch) :]
    if len(batch) == 1:
        return x
    if lead != batch and any(n != 1 for n in lead):
        x, lead = jnp.broadcast_to(x, (*batch, *rest)), batch
    return x.reshape(math.prod(lead), *rest)


# --- public functions -----------------------------------------------------------------


@overload
def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: ArrayLike | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: Implementations = None,
    return_residual: Literal[False] = False,
    return_max_logits: Literal[False] = False,
    query_offset: ArrayLike = 0,
    logits_soft_cap: ArrayLike | None = None,
    sinks: ArrayLike | None = None,
    q_segment_ids: ArrayLike | None = None,
    kv_segment_ids: ArrayLike | None = None,
    dropout_rate: ArrayLike = 0.0,
    dropout_key: jax.Array | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> jax.Array: ...


@overload
def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: ArrayLike | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: Implementations = None,
    return_residual: Literal[True],
    return_max_logits: Literal[False] = False,
    query_offset: ArrayLike = 0,
    logits_soft_cap: ArrayLike | None = None,
    sinks: ArrayLike | None = None,
    q_segment_ids: ArrayLike | None = None,
    kv_segment_ids: ArrayLike | None = None,
    dropout_rate: ArrayLike = 0.0,
    dropout_key: jax.Array | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> tuple[jax.Array, jax.Array]: ...


@overload
def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: ArrayLike | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: Implementations = None,
    return_residual: Literal[False] = False,
    return_max_logits: Literal[True],
    query_offset: ArrayLike = 0,
    logits_soft_cap: ArrayLike | None = None,
    sinks: ArrayLike | None = None,
    q_segment_ids: ArrayLike | None = None,
    kv_segment_ids: ArrayLike | None = None,
    dropout_rate: ArrayLike = 0.0,
    dropout_key: jax.Array | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> tuple[jax.Array, jax.Array]: ...


@overload
def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: ArrayLike | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: Implementations = None,
    return_residual: Literal[True],
    return_max_logits: Literal[True],
    query_offset: ArrayLike = 0,
    logits_soft_cap: ArrayLike | None = None,
    sinks: ArrayLike | None = None,
    q_segment_ids: ArrayLike | None = None,
    kv_segment_ids: ArrayLike | None = None,
    dropout_rate: ArrayLike = 0.0,
    dropout_key: jax.Array | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> tuple[jax.Array, jax.Array, jax.Array]: ...


def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: ArrayLike | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: Implementations = None,
    return_residual: bool = False,
    return_max_logits: bool = False,
    query_offset: ArrayLike = 0,
    logits_soft_cap: ArrayLike | None = None,
    sinks: ArrayLike | None = None,
    q_segment_ids: ArrayLike | None = None,
    kv_segment_ids: ArrayLike | None = None,
    dropout_rate: ArrayLike = 0.0,
    dropout_key: jax.Array | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> jax.Array | tuple[jax.Array, ...]:
    r"""Softmax attention in memory that grows with the length, not with its square.

    For each query, with all sums over the keys that it may see,

    .. math::
        s_j &= \mathrm{scale} \; q \cdot k_j + \mathrm{bias}_j, \qquad
        \mathrm{lse} = \log \textstyle\sum_j e^{s_j} \\
        \mathrm{out} &= \textstyle\sum_j P_j v_j, \qquad P_j = e^{s_j - \mathrm{lse}}

    and in the backward :math:`dS = P (dP - D)`, where
    :math:`D = \mathrm{out} \cdot d\mathrm{out} - d\mathrm{lse}`. Neither S nor P is
    ever an array: both are computed block by block, in the backward again. The
    parameters up to `return_residual` are those of `jax.nn.dot_product_attention`.

    Every derivative mode works, at every order, and in such memory.

    Args:
      query: Array ``[*B, T, N, H]``, with any number of batch dimensions \*B, or none.
        Floating.
      key: Array ``[*B, S, K, H]``; K divides N. Query head n sees key head
        ``n // (N // K)`` (grouped-query attention).
      value: Array ``[*B, S, K, Hv]``. All three have one dtype.
      bias: Floating array that broadcasts to ``[*B, N, T, S]``, added to the logits.
        Differentiable, in its own shape.
      mask: Bool array that broadcasts to ``[*B, N, T, S]``; True where a query may see
        a key. Or, outside of a trace, an array of 0 and 1.
      scale: Multiplies the products of queries and keys: a finite number, or a real
        array that broadcasts to ``[*B, N, T, S]``, such as ``[N, 1, 1]`` for one per
        head, which is differentiable, and may be traced. Default: 1 / sqrt(H).
      is_causal: Query t may see keys 0 to t only, or to t + `query_offset`.
      query_seq_lengths: Integers that broadcast to ``[*B]``, such as one for all
        entries: queries from there on see nothing.
      key_value_seq_lengths: Likewise: keys from there on are not seen, whatever they
        and their values are.
      local_window_size: ``(left, right)``: query t, at place p = t + `query_offset`,
        may see keys p - left to p + right. An int stands for both. From 2^31 - 1 on a
        side has no bound.
      implementation: None for the best that can run; ``"xla"``, block by block in
        jax.numpy, on every platform; ``"cudnn"``, the fused kernels of cuDNN, on NVIDIA
        GPUs in 16 bits; ``"mosaic_gpu"``, kernels for most of what cuDNN does not take,
        in 16 bits on Hopper; ``"triton"``, likewise on NVIDIA GPUs from Ampere on; or
        several names in order.
      return_residual: Whether to return lse as well.
      return_max_logits: Whether to return the largest logit of each head as well.
      query_offset: The place of the first query among the keys, for `is_causal` and
        `local_window_size`: an int, or integers that broadcast to ``[*B]``, traced or
        not; may be below 0. Blocks of keys that no query sees are skipped. An int is
        static: each of its values is compiled, unlike those of an array of JAX.
      logits_soft_cap: c in ``c tanh(s / c)``, which is applied to the logits, bias
        included. Above 0.
      sinks: Floating array ``[N]``, or one number for all heads: a further logit, which
        takes part in the sum of lse and has no value. Differentiable.
      q_segment_ids: Integers that broadcast to ``[*B, T]``. A query may see the keys
        with its own id only. Together with `kv_segment_ids`.
      kv_segment_ids: Integers that broadcast to ``[*B, S]``.
      dropout_rate: Fraction of the probabilities set to 0, in [0, 1); the rest
        is divided by 1 - dropout_rate. Drawn again where needed, and not stored. What
        is kept is, for a threefry key, ``jax.random.bernoulli(dropout_key,
        np.float32(1 - dropout_rate), (*B, N, T, S))``.
      dropout_key: A `jax.random.key`.
      precision: Of the matrix products, as in `jax.lax.dot_general`.

    Returns:
      Array ``[*B, T, N, Hv]`` in the dtype of the inputs, computed in float32 (float64
      for float64); all of it, if they have fewer than 16 bits. With `return_residual`
      also lse, ``[*B, T, N]``, in float32 (float64), differentiable. A query that sees
      no key has the output 0, the gradient 0 and lse -inf (with `sinks`: the sink).

      With `return_max_logits`, last, also the largest logit of each head over all pairs
      that see each other, ``[*B, N]``: with scale, bias and cap, without sinks, in
      float32 (float64). It has no gradient; -inf where no query sees a key.

    Raises:
      TypeError: An array has no floating or integer dtype where one is expected;
        `query`, `key` and `value` differ in dtype; `mask` is not bool while tracing.
      ValueError: Shapes do not fit, the heads of `query` are no multiple of those of
        `key`, or a number is out of its range.
      NotImplementedError: None of `implementation` can run; the reason is given.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxsoftmax import dot_product_attention
      >>> query = jnp.zeros((3, 1, 2))  # 3 queries, 1 head of size 2
      >>> key = jnp.ones((3, 1, 2))
      >>> value = jnp.array([2.0, 4.0, 6.0]).reshape(3, 1, 1)
      >>> dot_product_attention(query, key, value, is_causal=True).ravel().tolist()
      [2.0, 3.0, 4.0]
      >>> def loss(query):
      ...     out = dot_product_attention(query, key, value, is_causal=True)
      ...     return jnp.sum(out**2)
      >>> jax.grad(loss)(query).shape
      (3, 1, 2)

    References:
      Dao et al., FlashAttention, https://arxiv.org/abs/2205.14135; Milakov and
      Gimelshein, online softmax, https://arxiv.org/abs/1805.02867; Xiao et al.,
      attention sinks, https://arxiv.org/abs/2309.17453.
    """
    q, k, v, batched = arguments.check_heads(query, key, value)
    dtype = q.dtype
    q, k, v = arguments.widened(q, k, v)
    *batch, _, heads, _ = q.shape
    number, scales, q = arguments.check_attention_scale(scale, q)
    rate, rng = arguments.check_dropout(dropout_rate, dropout_key)
    segments = arguments.check_segments(q_segment_ids, kv_segment_ids, q, k)
    causal, window, offset, offsets = arguments.check_places(
        is_causal, local_window_size, query_offset, tuple(batch)
    )
    x = arguments.as_inputs(
        q,
        k,
        v,
        bias,
        mask,
        scales,
        sinks=arguments.check_sinks(sinks, heads),
        query_lengths=arguments.check_lengths(
            "query_seq_lengths", query_seq_lengths, tuple(batch)
        ),
        key_lengths=arguments.check_lengths(
            "key_value_seq_lengths", key_value_seq_lengths, tuple(batch)
        ),
        query_segments=segments[0],
        key_segments=segments[1],
        query_offset=offsets,
        dropout_key=rng,
    )
    config = Config(
        scale=number,
        causal=causal,
        window=window,
        offset=offset,
        softcap=check_softcap(logits_soft_cap, "logits_soft_cap"),
        dropout_rate=rate,
        precision=check_precision(precision),
        uses_lse=check_flag("return_residual", return_residual),
        uses_max_logits=check_flag("return_max_logits", return_max_logits),
        asked=dispatch.resolve(implementation, ATTENTION),
    )
    out, lse, max_logits = attend(config, x)
    out = out if out.dtype == dtype else out.astype(dtype)
    found = [a for a in (out, lse, max_logits) if a is not None]
    found = found if batched else [a[0] for a in found]
    return found[0] if len(found) == 1 else tuple(found)


def merge_attention(
    out_a: ArrayLike, lse_a: ArrayLike, out_b: ArrayLike, lse_b: ArrayLike
) -> tuple[jax.Array, jax.Array]:
    r"""Attention over two sets of keys, from attention over each.

    .. math::
        \mathrm{lse} = \log(e^{\mathrm{lse}_a} + e^{\mathrm{lse}_b}), \qquad
        \mathrm{out} = e^{\mathrm{lse}_a - \mathrm{lse}} \, \mathrm{out}_a
            + e^{\mathrm{lse}_b - \mathrm{lse}} \, \mathrm{out}_b

    For keys that are split over devices or over time (ring attention, chunks of a
    cache). It is associative, and differentiable in all four.

    Args:
      out_a: Floating array ``[..., Hv]``, as `dot_product_attention` returns it.
      lse_a: Floating array ``[...]``: with ``return_residual=True`` it comes with it.
        -inf where no key was seen.
      out_b: Of the shape and dtype of `out_a`.
      lse_b: Of the shape of `lse_a`.

    Returns:
      The output in the dtype of `out_a`, and lse in that of `lse_a` and `lse_b`. Where
      neither saw a key: 0 and -inf.

    Raises:
      TypeError: One of the arrays is not floating, or an lse has fewer than 16 bits.
      ValueError: The shapes do not fit.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxsoftmax import dot_product_attention, merge_attention
      >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 8, 2, 4))
      >>> def part(keys):
      ...     return dot_product_attention(q, k[keys], v[keys], return_residual=True)
      >>> out, lse = merge_attention(*part(slice(0, 5)), *part(slice(5, 8)))
      >>> bool(jnp.allclose(out, dot_product_attention(q, k, v), atol=1e-6))
      True

    References:
      Liu et al., ring attention, https://arxiv.org/abs/2310.01889.
    """
    given = {"out_a": out_a, "lse_a": lse_a, "out_b": out_b, "lse_b": lse_b}
    arrays = {name: floating(name, x) for name, x in given.items()}
    oa, la, ob, lb = arrays.values()
    for name, lse in (("lse_a", la), ("lse_b", lb)):
        if lse.dtype.itemsize < 2:
            raise TypeError(
                f"{name} must have at least 16 bits, as -inf is a value, got "
                f"{lse.dtype}"
            )
    if oa.shape != ob.shape or la.shape != lb.shape or oa.shape[:-1] != la.shape:
        raise ValueError(
            "out_a and out_b must have one shape, and lse_a and lse_b that shape "
            "without the last dimension, got "
            + ", ".join(f"{name} {x.shape}" for name, x in arrays.items())
        )
    dtype = jnp.result_type(la, lb)
    la, lb = (x.astype(working_dtype(dtype)) for x in (la, lb))
    top = jnp.maximum(la, lb)
    # Of two that are -inf, any number will do: both weights are then 0.
    top = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0.0))
    one, other = jnp.exp(la - top), jnp.exp(lb - top)
    total = one + other
    empty = total == 0
    divisor = jnp.where(empty, 1.0, total)

    def part(out: jax.Array, weight: jax.Array) -> jax.Array:
        return out.astype(total.dtype) * (weight / divisor)[..., None]

    lse = jnp.where(empty, -jnp.inf, top + jnp.log(divisor))
    return (part(oa, one) + part(ob, other)).astype(oa.dtype), lse.astype(dtype)
