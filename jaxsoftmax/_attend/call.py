"""What a call of attention is, for the modules that compute it.

Letters of shapes, as jax.nn has them: B batch entries, T queries, S keys, N heads of
queries, K of keys, G = N // K, H and Hv the sizes of a head of keys and of values.
"""

import dataclasses
import functools
import math
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsoftmax._core.checks import with_rank
from jaxsoftmax._core.dispatch import Asked, Family


def _order(call: "AttentionCall", names: tuple[str, ...]) -> tuple[str, ...]:
    """With a mask or a bias Mosaic GPU's kernels come before cuDNN.

    On an H200 they took 0.39 to 0.93 of its time, forward and gradient, heads of 64,
    128 and 256, and 0.53 to 0.90 with the gradient of a bias of keys; without mask and
    bias 0.94 to 1.17 (docs/attention.md). With the gradient of a bias of pairs it was
    0.79 to 1.11, and they write it for each batch entry first, which takes memory.
    """
    x = call.inputs
    written = differs_by_pairs(x.bias) and "bias" in call.config.wanted
    if (x.bias is None and x.mask is None) or written:
        return names
    return tuple(sorted(names, key=lambda name: name != "mosaic_gpu"))


ATTENTION = Family(
    {
        "xla": "jaxsoftmax._attend.xla",
        "cudnn": "jaxsoftmax._attend.cudnn",
        "mosaic_gpu": "jaxsoftmax._attend.mosaic_gpu",
        "triton": "jaxsoftmax._attend.triton",
    },
    {"cuda": ("cudnn", "mosaic_gpu", "triton", "xla"), "rocm": ("triton", "xla")},
    partitioned=("xla", "cudnn"),
    order=_order,
)


# As far as sums of places and sides stay in int32.
FARTHEST_OFFSET = 2**29


def bounded(side: float) -> float:
    """A side of a window; infinity as far as places go, which are int32."""
    return side if side < 2**31 - 1 else math.inf


def differs_by_pairs(bias: Any) -> bool:
    """Whether a bias, or None, has a number for each pair of a query and a key."""
    return bias is not None and 1 not in bias.shape[2:]


class Inputs(NamedTuple):
    """The arrays of a call; what is optional may be None.

    Attributes:
      query: [B, T, N, H].
      key: [B, S, K, H].
      value: [B, S, K, Hv].
      bias: Each dimension 1 or that of [B, N, T, S]; floating.
      sinks: [N]; floating.
      scale: As `bias`; multiplies the products of queries and keys, beside the number
        of `Config`.
      mask: As `bias`; bool.
      query_lengths, key_lengths: [B]; int32.
      query_segments: [B, T]; integers.
      key_segments: [B, S]; integers.
      query_offset: [B] or [1]; int32. Where the first query stands among the keys,
        beside the number of `Config`.
      dropout_key: [2]; uint32, of a threefry generator.
    """

    query: Any
    key: Any
    value: Any
    bias: Any = None
    sinks: Any = None
    scale: Any = None
    mask: Any = None
    query_lengths: Any = None
    key_lengths: Any = None
    query_segments: Any = None
    key_segments: Any = None
    query_offset: Any = None
    dropout_key: Any = None


# The `Inputs` that have a derivative.
FLOATS = ("query", "key", "value", "bias", "sinks", "scale")


class Result(NamedTuple):
    """What the forward gives, or its tangents or cotangents.

    Attributes:
      out: [B, T, N, Hv], in the dtype of the query.
      low: What rounding took off `out`, in that dtype; None if it has 32 bits or more.
      lse: [B, T, N], the logarithm of what the exponentials are divided by.
      lse_low: What rounding took off `lse`. Where the logits of a query share a large
        number, these are all the digits that its probabilities have.
      max_logits: [B, N], the largest logit of each head that a query sees, or -inf;
        None if that is not asked for. It has no derivative, and is not kept.

    In tangents and cotangents `low` and `lse_low` have no part of their own: a result
    and what rounding took off it are one number, whose cotangent is that of the result.
    """

    out: Any
    low: Any
    lse: Any
    lse_low: Any
    max_logits: Any = None


@dataclasses.dataclass(frozen=True)
class Config:
    """What is static in a call.

    Attributes:
      scale: Multiplies the products of queries and keys.
      causal: Whether a query sees keys up to its own place only.
      window: (left, right): a query at place p sees keys p - left to p + right; or
        None. A side without a bound is infinity.
      offset: The place of the first query among the keys, as far as it is static; 0
        where neither `causal` nor `window` asks for places.
      softcap: Bounds the logits; or None.
      dropout_rate: 0 for none.
      dropout_dims: Whether each batch entry, and each head, has a mask of its own.
      precision: Of the matrix products.
      uses_lse: Whether lse may have a cotangent other than 0.
      uses_max_logits: Whether the forward is to return these.
      wanted: Those of `FLOATS` that a derivative is computed for.
      asked: Which implementations to try.
      block_entries: Logits that are computed at once, of all batch entries and heads.
    """

    scale: float
    causal: bool = False
    window: tuple[float, float] | None = None
    offset: int = 0
    softcap: float | None = None
    dropout_rate: float = 0.0
    dropout_dims: tuple[bool, bool] = (True, True)
    precision: Any = None
    uses_lse: bool = True
    uses_max_logits: bool = False
    wanted: tuple[str, ...] = ()
    asked: Asked = None
    block_entries: int = 2**20

    @property
    def keeps(self) -> bool:
        """Whether lse is of use: to the caller, or for derivatives."""
        return self.uses_lse or bool(self.wanted)

    @property
    def reach(self) -> tuple[float, float]:
        """How many keys before and after key t query t sees; below 0, if not key t.

        But for `Inputs.query_offset`, which is not static.
        """
        left, right = self.window or (math.inf, math.inf)
        right = min(right, 0) if self.causal else right
        left, right = left - self.offset, right + self.offset
        return bounded(left), bounded(right)


def rounded_to(dtype: Any, wide: jax.Array) -> jax.Array:
    """`wide` rounded to `dtype`, in its own dtype.

    XLA removes a conversion there and back on a GPU:
    https://github.com/openxla/xla/issues/41605.
    """
    info = jnp.finfo(dtype)
    rounded = jax.lax.reduce_precision(wide, info.nexp, info.nmant)
    if info.nexp == jnp.finfo(wide.dtype).nexp:
        return rounded
    # reduce_precision flushes float16 subnormals to 0 (tests/core/test_workarounds.py):
    # small weights would be lost.
    step = float(info.smallest_subnormal)
    small = jnp.abs(wide) < float(info.tiny)
    return jnp.where(small, jnp.round(wide / step) * step, rounded)


def low_digits(
    wide: jax.Array, dtype: np.dtype[Any]
) -> tuple[jax.Array, jax.Array | None]:
    """`wide` rounded to `dtype`, and what that took off, or None."""
    if np.dtype(dtype).itemsize > 2:
        return wide.astype(dtype), None
    rounded = rounded_to(dtype, wide)
    return rounded.astype(dtype), (wide - rounded).astype(dtype)


def sum_in_two(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The sum as it is rounded, and what that took off; 0 of what is not finite."""
    total = a + b
    part = total - a
    error = (a - (total - part)) + (b - part)  # Knuth's TwoSum
    return total, jnp.where(jnp.isfinite(total), error, 0.0)


def in_reach(
    config: Config,
    query_places: jax.Array,
    key_places: jax.Array,
    offset: jax.Array | None = None,
) -> jax.Array | None:
    """[queries, keys]: what `causal` and `window` leave; None if that is everything.

    With an array of offsets, the dimensions of that first.
    """
    left, right = config.reach
    distance = key_places[None, :] - query_places[:, None]
    if offset is not None:
        distance = with_rank(distance, offset.ndim + 2) - offset[..., None, None]
    return both(
        distance <= int(right) if right < math.inf else None,
        distance >= -int(left) if left < math.inf else None,
    )


def both(*masks: jax.Array | None) -> jax.Array | None:
    """Where all are true; None stands for everywhere."""
    given = [mask for mask in masks if mask is not None]
    if not given:
        return None
    rank = max(mask.ndim for mask in given)
    return functools.reduce(operator.and_, (with_rank(mask, rank) for mask in given))


def within(places: jax.Array, lengths: jax.Array | None) -> jax.Array | None:
    """[B, places]: which lie within the lengths; None for all."""
    return None if lengths is None else places[None, :] < lengths[:, None]


def within_lengths(array: jax.Array, lengths: jax.Array | None) -> jax.Array:
    """[B, places, ...] with 0 beyond the lengths, whatever is there."""
    inside = within(jnp.arange(array.shape[1], dtype=jnp.int32), lengths)
    if inside is None:
        return array
    inside = inside.reshape(inside.shape + (1,) * (array.ndim - 2))
    return jnp.where(inside, array, jnp.zeros((), array.dtype))


def queries_with_keys(result: Result, array: jax.Array) -> jax.Array:
    """[B, T, N, ...] with 0 of a query that sees nothing, whatever is there."""
    empty = (result.lse == -jnp.inf)[..., None]
    return jnp.where(empty, jnp.zeros((), array.dtype), array)


def seeing_queries(config: Config, x: Inputs, result: Result) -> Inputs:
    """`x`, but 0 for a query that sees nothing, whatever is there; for kernels.

    The derivative of its logits is 0, and is multiplied by it for the gradient of keys.
    """
    left, right = config.reach
    given = (x.mask, x.bias, x.key_lengths, x.query_segments, x.query_offset)
    all_see = right >= 0 and left >= x.query.shape[1] - x.key.shape[1]
    if all_see and all(array is None for array in given):
        return x
    return x._replace(query=queries_with_keys(result, x.query))


@dataclasses.dataclass(frozen=True)
class AttentionCall:
    """A call, as `_rows.call.Call` is one of a function of rows.

    Attributes:
      op: ``"attention"``, ``"attention_gradient"`` or ``"attention_pushforward"``.
      config: What is static.
      inputs: Shape and dtype of each array, or None.
    """

    op: str
    config: Config
    inputs: Inputs
    axis: tuple[int, ...] = (-1,)

    @property
    def arrays(self) -> tuple[Any, ...]:
        return tuple(self.inputs)
