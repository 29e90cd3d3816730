"""The arguments of attention: what they must be, and what is said where they are not.

Letters of shapes are those of `_attend.call`.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxsoftmax._attend.call import FARTHEST_OFFSET, Inputs, bounded
from jaxsoftmax._core.checks import (
    as_array,
    as_int,
    broadcast,
    broadcasts,
    check_flag,
    floating,
    integer,
    must_be,
    number,
    number_at_hand,
    real,
    unwrapped,
)
from jaxsoftmax._core.shapes import is_known


def check_heads(
    query: ArrayLike, key: ArrayLike, value: ArrayLike
) -> tuple[jax.Array, jax.Array, jax.Array, bool]:
    """The three as [*B, places, heads, size], and whether they have a batch."""
    q, k, v = floating("query", query), floating("key", key), floating("value", value)
    arrays = {"query": q, "key": k, "value": v}
    shapes = ", ".join(f"{name} {x.shape}" for name, x in arrays.items())
    for name, x in arrays.items():
        if x.dtype != q.dtype:
            raise TypeError(
                f"query, key and value must have one dtype, got query {q.dtype} and "
                f"{name} {x.dtype}; cast one of them"
            )
        if x.ndim < 3 or x.ndim != q.ndim:
            raise ValueError(
                "query, key and value must all have the shape (batch..., length, "
                "heads, head size), with as many batch dimensions, or none, got "
                f"{shapes}"
            )
    batched = q.ndim > 3
    if not batched:
        q, k, v = (x[None] for x in (q, k, v))
    if k.shape[:-1] != v.shape[:-1] or k.shape[:-3] != q.shape[:-3]:
        raise ValueError(
            "key and value must have the same batch, length and heads, and the batch "
            f"of query, got {shapes}"
        )
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"query and key must have the same head size, got {q.shape[-1]} of query "
            f"and {k.shape[-1]} of key"
        )
    heads, kv_heads = q.shape[-2], k.shape[-2]
    if not is_known([heads, kv_heads, q.shape[-1], v.shape[-1]]):
        raise ValueError(
            "the heads of query, key and value, and their sizes, must be known when "
            f"tracing; symbolic may be the batch and the lengths, got {shapes}"
        )
    check_groups(heads, kv_heads)
    return q, k, v, batched


def check_groups(heads: int, kv_heads: int) -> None:
    """Each head of keys serves the same number of heads of queries."""
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(
            f"the heads of query must be a multiple of those of key and value, got "
            f"{heads} and {kv_heads}"
        )


def widened(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """`arrays`, in float32 if they have fewer than 16 bits."""
    return tuple(x.astype(jnp.float32) if x.dtype.itemsize < 2 else x for x in arrays)


def _per_pair(
    name: str, x: jax.Array | None, shape: tuple[int, ...]
) -> jax.Array | None:
    if x is not None and x.ndim > len(shape):
        raise ValueError(
            f"{name} must have at most {len(shape)} dimensions, got {x.shape}"
        )
    return over_pairs(name, x, shape)


def over_pairs(
    name: str, x: jax.Array | None, shape: tuple[int, ...]
) -> jax.Array | None:
    """`x`, if there is one, with the rank of the logits."""
    what = "(batch..., heads, query length, key length) ="
    return None if x is None else broadcasts(name, x, shape, what)


def as_bias(bias: ArrayLike | None) -> jax.Array | None:
    """A floating array, or None."""
    if bias is None:
        return None
    bias = as_array(bias, "bias")
    hint = "; pass a bool array as mask" if bias.dtype == np.bool_ else ""
    return floating("bias", bias, hint)


def _as_mask(mask: ArrayLike | None) -> jax.Array | None:
    """A bool array, or None."""
    if mask is None:
        return None
    mask = as_array(mask, "mask")
    if mask.dtype == np.bool_:
        return mask
    hint = (
        "pass mask != 0 for a 0/1 mask, and what is to be added to the logits as bias"
    )
    if isinstance(mask, jax.core.Tracer):
        raise TypeError(f"mask must be bool while tracing, got {mask.dtype}; {hint}")
    values = np.asarray(mask)
    if not np.all((values == 0) | (values == 1)):
        raise ValueError(
            f"mask must be bool, or have only 0 and 1, got {mask.dtype} with other "
            f"values; {hint}"
        )
    return mask != 0


def check_lengths(
    name: str, lengths: ArrayLike | None, batch: tuple[int, ...]
) -> jax.Array | None:
    """[*B] as int32."""
    if lengths is None:
        return None
    lengths = broadcasts(name, integer(name, lengths), batch, "(batch...,) =")
    return broadcast(lengths.astype(jnp.int32), batch)


def check_segments(
    q_segment_ids: ArrayLike | None,
    kv_segment_ids: ArrayLike | None,
    q: jax.Array,
    k: jax.Array,
) -> tuple[jax.Array | None, jax.Array | None]:
    """[*B, T] and [*B, S], or None for both."""
    given = {"q_segment_ids": q_segment_ids, "kv_segment_ids": kv_segment_ids}
    missing = [name for name, ids in given.items() if ids is None]
    if len(missing) == 2:
        return None, None
    if missing:
        raise ValueError(
            f"q_segment_ids and kv_segment_ids go together, but {missing[0]} is None"
        )
    found = []
    for (name, ids), x in zip(given.items(), (q, k), strict=True):
        assert ids is not None
        shape = x.shape[:-2]
        array = broadcasts(name, integer(name, ids), shape, "(batch..., length) =")
        found.append(broadcast(array, shape))
    return found[0], found[1]


def check_window(
    local_window_size: int | Sequence[int] | None,
) -> tuple[float, float] | None:
    """(left, right), both at least 0; infinity for a side without a bound."""
    if local_window_size is None:
        return None
    pair = isinstance(local_window_size, Sequence) and len(local_window_size) == 2
    sides: Any = local_window_size if pair else [local_window_size] * 2
    left, right = map(as_int, sides)
    if left is None or right is None:
        expected = "an int, a pair (left, right) of ints, or None"
        raise must_be("local_window_size", expected, local_window_size)
    if left < 0 or right < 0:
        raise ValueError(
            f"local_window_size must not be negative, got {local_window_size}; for a "
            "side without a bound pass the length of the sequence"
        )
    bounds = bounded(left), bounded(right)
    return None if bounds == (math.inf, math.inf) else bounds


def check_places(
    is_causal: bool,
    local_window_size: int | Sequence[int] | None,
    query_offset: ArrayLike,
    batch: tuple[int, ...],
) -> tuple[bool, tuple[float, float] | None, int, jax.Array | None]:
    """Whether it is causal, the window, and the offset, as `_check_offset` has it."""
    causal = check_flag("is_causal", is_causal)
    window = check_window(local_window_size)
    offset, offsets = _check_offset(query_offset, batch)
    if not causal and window is None:  # no place is of use
        offset, offsets = 0, None
    return causal, window, offset, offsets


def _check_offset(
    query_offset: ArrayLike, batch: tuple[int, ...]
) -> tuple[int, jax.Array | None]:
    """A number that is static, and int32, each dimension that of `batch` or 1; or None.

    An array of jax is not static: as a number, each of its values would be compiled.
    """
    query_offset = unwrapped(query_offset)
    known = None if isinstance(query_offset, jax.Array) else as_int(query_offset)
    if known is None:
        array = integer("query_offset", query_offset)
        array = broadcasts("query_offset", array, batch, "(batch...,) =")
        return 0, array.astype(jnp.int32)
    if abs(known) > FARTHEST_OFFSET:
        raise ValueError(
            f"query_offset must be between -{FARTHEST_OFFSET} and {FARTHEST_OFFSET}, "
            f"got {known}"
        )
    return known, None


def check_attention_scale(
    scale: ArrayLike | None, query: jax.Array
) -> tuple[float, jax.Array | None, jax.Array]:
    """A finite number, not below 0; an array that is more than one, or None; queries.

    A number below 0 changes the sign of the queries: so every kernel takes it.
    """
    if scale is None:
        return 1 / math.sqrt(max(query.shape[-1], 1)), None, query
    scale = unwrapped(scale)
    known = number_at_hand(scale)
    if known is None:
        if not isinstance(scale, jax.Array | np.ndarray):
            raise must_be("scale", "a real number, an array, or None", scale)
        array = real("scale", scale)
        if jnp.issubdtype(array.dtype, jnp.integer):
            array = array.astype(jnp.float32)
        return 1.0, array, query
    if not math.isfinite(known):
        raise ValueError(f"scale must be finite, or None, got {scale}")
    return (known, None, query) if known >= 0 else (-known, None, -query)


def check_sinks(sinks: ArrayLike | None, heads: int) -> jax.Array | None:
    """[N], floating."""
    if sinks is None:
        return None
    sinks = broadcasts("sinks", floating("sinks", sinks), (heads,), "(heads,) =")
    return broadcast(sinks, (heads,))


def check_dropout(
    dropout_rate: ArrayLike, key: jax.Array | None, name: str = "dropout_key"
) -> tuple[float, jax.Array | None]:
    """The rate, and the key; None where nothing is dropped."""
    rate = number("dropout_rate", dropout_rate, "[0, 1)")
    if rate == 0:
        return 0.0, None
    if key is None:
        raise ValueError(
            f"{name} must be given with dropout_rate={dropout_rate}: pass a "
            "jax.random.key"
        )
    return rate, check_key(name, key)


def check_key(name: str, key: Any) -> jax.Array:
    """One key, with a type of its own."""
    try:
        typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        key = key if typed else jax.random.wrap_key_data(key)
    except Exception as error:
        raise must_be(name, "a key as of jax.random.key", key) from error
    if key.shape != ():
        raise ValueError(f"{name} must be one key, got an array of {key.shape}")
    return key


def _threefry_words(key: jax.Array) -> jax.Array:
    if str(jax.random.key_impl(key)) == "threefry2x32":
        return jax.random.key_data(key)
    # Keys of other generators have no place to look up: one is drawn from them.
    return jax.random.bits(key, (2,), jnp.uint32)


def as_inputs(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bias: ArrayLike | None,
    mask: ArrayLike | None,
    scale: jax.Array | None,
    *,
    dropout_key: jax.Array | None,
    **others: Any,
) -> Inputs:
    """All arrays; bias, mask and scale are checked here."""
    shape = (*q.shape[:-3], q.shape[-2], q.shape[-3], k.shape[-3])
    return Inputs(
        q,
        k,
        v,
        bias=_per_pair("bias", as_bias(bias), shape),
        mask=_per_pair("mask", _as_mask(mask), shape),
        scale=_per_pair("scale", scale, shape),
        dropout_key=None if dropout_key is None else _threefry_words(dropout_key),
        **others,
    )
