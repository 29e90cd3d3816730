"""Attention as Mosaic GPU kernels, for Hopper: what cuDNN does not take, at its speed.

Soft cap, sinks, segment ids, windows to both sides, lengths and offsets, grouped heads,
a mask, a bias, dropout, the gradient of lse, and forward mode, of cuDNN's results too;
bfloat16 and float16. The functions are those of `_attend.xla`, with the same meaning;
the kernels are in `mosaic_gpu_forward`, `mosaic_gpu_backward` and `mosaic_gpu_tangent`.
D, one number per query that the backward needs, and the gradient of the sinks are
computed in jax.numpy.

Arrays are read where they lie, ``[B, T, N, H]``; but XLA makes bits of a mask, and
transposes a bias for the gradients of keys and values. A mapped axis (`jax.vmap`) is
one more dimension of the kernel's grid: what is not mapped is read again.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxsoftmax._attend import (
    mosaic_gpu_backward,
    mosaic_gpu_forward,
    mosaic_gpu_tangent,
    xla,
)
from jaxsoftmax._attend.call import (
    FARTHEST_OFFSET,
    AttentionCall,
    Config,
    Inputs,
    Result,
    differs_by_pairs,
    seeing_queries,
    within,
    within_lengths,
)
from jaxsoftmax._attend.kernel_limits import refusal_of_numbers, refusal_of_sizes
from jaxsoftmax._attend.mosaic_gpu_program import LOG2E, Program, copied
from jaxsoftmax._compat import mosaic_gpu as _compat
from jaxsoftmax._core.device import Device
from jaxsoftmax._core.mosaic_gpu_tanh import FACTORS

# Of the gradients of keys and values, what fits the registers together.
_LARGEST_PAIR = 256
# Of shared memory, without barriers; numbers of rows take up to 1 KiB of it.
_SHARED_BYTES = 224 * 1024
_EVERYTHING = (math.inf, math.inf)
# Bytes of the derivative of all pairs' logits, of a bias that has fewer numbers.
_LARGEST_BIAS_GRADIENT = 2**32
# Of a soft cap, to the base 2, for sums of its exponentials: those of 2^24 keys, with
# values below 2^24, are below 2^128; and where all logits are as far below 0, products
# with values from 2^-46 on are normal float32.
_LARGEST_EXPONENT = 80
# Of keys and values of heads whose blocks run together: a part of the L2 cache.
_SECTION_BYTES = 16 * 2**20


def refusal(call: AttentionCall, device: Device) -> str | None:
    """Why a call cannot run on a device, or None if it may."""
    if device.platform != "cuda":
        return f"needs an NVIDIA GPU, the platform is {device.platform}"
    if device.compute_capability is None:
        return "the GPU's compute capability is not known"
    if device.compute_capability[0] != 9:
        major, minor = device.compute_capability
        return f"needs compute capability 9.0, the GPU has {major}.{minor}"
    return (
        _refusal_of_options(call)
        or _refusal_of_arrays(call.inputs)
        or _refusal_of_bias_gradient(call)
        or _compat.mosaic_gpu_reason()
        or _compat.ptxas_reason()
    )


def _refusal_of_options(call: AttentionCall) -> str | None:
    config, x = call.config, call.inputs
    if call.op == "attention_pushforward" and config.dropout_rate:
        return "has no dropout in forward mode"
    if x.scale is not None:
        return "has no scale that is an array"
    cap, (least, most) = config.softcap, FACTORS
    if cap is not None and not least < config.scale / cap < most:
        return f"takes a scale of {least} to {most} by the soft cap"
    if cap is not None and x.bias is not None and not least < 1 / cap < most:
        return f"takes a soft cap of {1 / most} to {1 / least} with a bias"
    return refusal_of_numbers(config, x.query.dtype)


def _refusal_of_arrays(x: Inputs) -> str | None:
    if x.query.dtype.name not in ("bfloat16", "float16"):
        return f"takes bfloat16 and float16, not {x.query.dtype.name}"
    names = ("bfloat16", "float16", "float32")
    if x.bias is not None and x.bias.dtype.name not in names:
        return f"takes no bias of {x.bias.dtype.name}"
    return refusal_of_sizes(x, 16)


def _refusal_of_bias_gradient(call: AttentionCall) -> str | None:
    x = call.inputs
    wanted = call.op == "attention_gradient" and "bias" in call.config.wanted
    if not wanted or not differs_by_pairs(x.bias):
        return None
    batch, queries, heads, _ = x.query.shape
    pairs = batch * heads * queries * x.key.shape[1]
    if pairs == math.prod(x.bias.shape) or 4 * pairs <= _LARGEST_BIAS_GRADIENT:
        return None
    return f"the gradient of the bias would take {4 * pairs / 2**30:.1f} GiB"


# What a program is for, and how its work is cut: see `Program`.
_PLANS: dict[str, dict[str, Any]] = {
    "forward": {"block_m": 64, "block_n": 128},
    "query_gradient": {"block_m": 64, "block_n": 128},
    "key_gradient": {"block_m": 64, "block_n": 64, "owns_keys": True},
    "tangent": {"block_m": 64, "block_n": 64},
}


def _plan(kind: str, config: Config, x: Inputs) -> dict[str, Any]:
    batch, queries, heads, size = x.query.shape
    keys, kv_heads, value_size = x.value.shape[1:]
    found = _PLANS[kind] | {"stages": 2, "warpgroups": 2, "turns": kind == "forward"}
    if kind == "forward" and _is_bounded(config, x):
        found |= {"bounded": True, "turns": False}
    small = size + value_size <= 128
    if kind == "forward" and small and config.reach == _EVERYTHING:
        # More blocks of small heads at once; at an end they would wait for each other.
        found |= {"warpgroups": 3, "turns": False}
    if kind == "key_gradient" and small and not _has_more_in_registers(config, x):
        found["warpgroups"] = 3
    if max(size, value_size) > 128:
        found["block_n"] = 64
    # What shared memory has room for, two tiles of each at a time.
    largest = 384 if kind != "forward" else 512 if size == value_size else 432
    if size + value_size > largest:
        found["stages"] = 1
    if kind == "tangent":
        found |= _plan_of_tangent(config, x)
    elif x.bias is not None:
        found |= _plan_with_bias(kind, found, x)
    if config.dropout_rate:
        # Random bits take most of the time, of all consumers at once.
        found |= {"turns": False, "block_n": 64}
    each = (4 if kind == "tangent" else 2) * (size + value_size)
    if found.get("owns_keys"):
        owners, each = batch * kv_heads, each * queries * heads // kv_heads
    else:
        owners, each = batch * heads, each * keys * kv_heads // heads
    most = max(1, _SECTION_BYTES // each)
    section = max(n for n in range(1, min(owners, most) + 1) if owners % n == 0)
    return found | {"section": section}


def _has_more_in_registers(config: Config, x: Inputs) -> bool:
    """Whether tiles have more than products, or more is computed of them."""
    arrays = x.mask, x.bias, x.query_segments
    options = config.softcap, config.dropout_rate or None
    return any(given is not None for given in (*arrays, *options))


def _is_bounded(config: Config, x: Inputs) -> bool:
    """Whether exponentials of logits need no maximum: no sum of them overflows."""
    return (
        config.softcap is not None
        and config.softcap * LOG2E <= _LARGEST_EXPONENT
        and x.query.dtype == jnp.bfloat16
        and x.bias is None
        and x.sinks is None
        and not config.dropout_rate
        and not config.uses_max_logits
    )


def _full(array: Any) -> tuple[bool, bool, bool, bool] | None:
    """Which dimensions of an array of pairs are not 1."""
    if array is None:
        return None
    batch, heads, queries, keys = (size != 1 for size in array.shape)
    return batch, heads, queries, keys


def _plan_with_bias(kind: str, plan: dict[str, Any], x: Inputs) -> dict[str, Any]:
    """What a bias changes of a plan: its numbers take registers and shared memory."""
    size, value_size = x.query.shape[-1], x.value.shape[-1]
    m, n = plan["block_m"], plan["block_n"]
    if max(size, value_size) > 64 or kind == "query_gradient":
        n = 64
    own, read = (n, m) if plan.get("owns_keys") else (m, n)
    # Bytes of a place that blocks own, and of a pair.
    each = 2 * (size + value_size)
    if kind == "forward" and size == value_size:
        each = 2 * size  # the output is put where queries were
    of_pair = 0 if 1 in x.bias.shape[2:] else x.bias.dtype.itemsize
    of_other = 0 if of_pair else 4
    room = _SHARED_BYTES - (0 if kind == "query_gradient" else 1024)

    def fits(stages: int, warpgroups: int) -> bool:
        owned = own * warpgroups
        tile = read * (2 * (size + value_size) + owned * of_pair + of_other)
        return owned * each + stages * tile <= room

    cuts = ((2, 2), (1, 2), (1, 1))
    stages, warpgroups = next(cut for cut in cuts if fits(*cut))
    turns = kind == "forward" and warpgroups == 2
    return {"block_n": n, "stages": stages, "warpgroups": warpgroups, "turns": turns}


def _plan_of_tangent(config: Config, x: Inputs) -> dict[str, Any]:
    """The largest tiles that the registers and shared memory have room for."""
    size, value_size = x.query.shape[-1], x.value.shape[-1]
    names = ("query", "key", "value", "bias")
    query, key, value, bias = (name in config.wanted for name in names)
    # Bytes of a place that blocks own, of one that they read, and of a pair. The output
    # is put where queries were.
    each = 2 * size * (1 + query) + 2 * value_size * (size != value_size)
    read = 2 * size * (1 + key) + 2 * value_size * (1 + value)
    of_pair = 0
    if x.bias is not None and 1 not in x.bias.shape[2:]:
        of_pair = x.bias.dtype.itemsize * (1 + bias)
    elif x.bias is not None:
        read += 4 * (1 + bias)

    def fits(warpgroups: int, n: int, stages: int) -> bool:
        owned = 64 * warpgroups
        tile = n * (read + owned * of_pair)
        return owned * each + stages * tile <= _SHARED_BYTES - 1024

    registers = x.bias is None and config.softcap is None
    largest = 128 if max(size, value_size) <= 64 and registers else 64
    cuts = itertools.product((2, 1), (largest, 64, 32), (2, 1))
    warpgroups, n, stages = next(cut for cut in cuts if fits(*cut))
    return {"block_n": n, "stages": stages, "warpgroups": warpgroups}


def _adding_up(config: Config, x: Inputs) -> str | None:
    """Which kernel adds up the gradient of a bias, if one does."""
    if x.bias is None or "bias" not in config.wanted or differs_by_pairs(x.bias):
        return None
    return "query_gradient" if x.bias.shape[3] == 1 else "key_gradient"


def program(kind: str, config: Config, x: Inputs, **plan: Any) -> Program:
    """The kernel for a call; `plan` replaces what is in the table."""
    batch, queries, heads, size = x.query.shape
    keys, kv_heads, value_size = x.value.shape[1:]
    farthest = max(queries, keys)
    farthest += FARTHEST_OFFSET if x.query_offset is not None else 0

    def reach(far: float) -> int | None:
        # Farther than there are places is as good as any, but may be no int32.
        return None if far >= farthest else int(far)

    left, right = map(reach, config.reach)
    pairs = "bias" in config.wanted and differs_by_pairs(x.bias)
    sums = kind == _adding_up(config, x)
    found = _plan(kind, config, x) | {"sums_bias": sums} | plan
    return Program(
        batch=batch,
        queries=queries,
        keys=keys,
        heads=heads,
        kv_heads=kv_heads,
        size=size,
        value_size=value_size,
        dtype=x.query.dtype,
        left=left,
        right=right,
        scale=float(config.scale),
        softcap=config.softcap,
        keeps=config.keeps,
        wants_max=config.uses_max_logits,
        sinks=kind in ("forward", "tangent") and x.sinks is not None,
        query_lengths=x.query_lengths is not None,
        key_lengths=x.key_lengths is not None,
        segments=x.query_segments is not None,
        offsets=x.query_offset is not None,
        mask=_full(x.mask),
        bias=_full(x.bias),
        bias_dtype=None if x.bias is None else x.bias.dtype,
        dropout_rate=config.dropout_rate,
        dropout_dims=config.dropout_dims,
        moving=config.wanted if kind == "tangent" else (),
        wants_bias=kind == "query_gradient" and pairs,
        **found,
    )


def _padded(x: jax.Array, places: int, value: float = 0) -> jax.Array:
    """[B, places at least, ...], with `value` beyond."""
    missing = max(0, places - x.shape[1])
    if not missing:
        return x
    widths = [(0, missing) if k == 1 else (0, 0) for k in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=value)


def _heads(p: Program, x: Inputs) -> list[jax.Array]:
    """Query, key and value, as the kernels take them."""
    # What is hidden is multiplied by 0, which must not be NaN.
    query = within_lengths(x.query, x.query_lengths)
    key, value = (within_lengths(a, x.key_lengths) for a in (x.key, x.value))
    return [
        _padded(query, copied(p.queries, p.block_m)),
        *(_padded(a, copied(p.keys, p.block_n)) for a in (key, value)),
    ]


def _places(array: jax.Array, axis: int, places: int) -> jax.Array:
    """With so many along an axis: repeated if there is one, or with 0 beyond."""
    shape = list(array.shape)
    if shape[axis] == 1:
        shape[axis] = places
        return jnp.broadcast_to(array, shape)
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, max(0, places - shape[axis]))
    return jnp.pad(array, widths) if widths[axis][1] else array


def _mask_words(p: Program, mask: jax.Array) -> jax.Array:
    """The mask as `OTHERS` has it."""
    own, other = p.own_and_other(_full(mask) or ())
    if p.owns_keys:
        mask = jnp.swapaxes(mask, 2, 3)
    n, (_, _, each) = p.tile, p.owners
    mask = _places(mask, 2, p.blocks * p.owned if own else each)
    mask = _places(mask, 3, p.tiles * n if other else n)
    batch, heads, places, _ = mask.shape
    bits = mask.reshape(batch, heads, places, -1, n // 8, 4, 2).astype(jnp.uint32)
    index = jnp.arange(n // 4, dtype=jnp.uint32).reshape(1, 1, 1, 1, n // 8, 1, 2)
    words = jnp.sum(bits << index, axis=(4, 6), dtype=jnp.uint32)
    return lax.bitcast_convert_type(jnp.swapaxes(words, 2, 3), jnp.int32)


def _bias(p: Program, bias: jax.Array) -> jax.Array:
    """The bias as `OTHERS` has it."""
    if p.owns_keys:
        bias = jnp.swapaxes(bias, 2, 3)
    if p.bias_tiles:
        bias = _places(bias, 2, copied(bias.shape[2], p.owners[2]))
        # Rows of shared memory are copied whole: up to 64 numbers.
        return _places(bias, 3, max(p.tile, -(-bias.shape[3] // 64) * 64))
    axis = 3 if p.reads_bias else 2
    vector = jnp.squeeze(bias.astype(jnp.float32), 5 - axis)
    return _places(vector, 2, p.blocks * p.owned if axis == 2 else p.tiles * p.tile)


def _summed_to(x: Inputs, pairs: jax.Array) -> jax.Array:
    """The gradient of the bias, from the derivative of the logits, padded.

    Or from that added up for each query, or each key.
    """
    queries, keys = x.query.shape[1], x.key.shape[1]
    if pairs.ndim == 3:
        axis = 3 if x.bias.shape[3] == 1 else 2
        pairs = jnp.expand_dims(pairs, axis)
    pairs = pairs[..., :queries, :keys]
    axes = [i for i, size in enumerate(x.bias.shape) if pairs.shape[i] != size]
    return jnp.sum(pairs, axis=axes, keepdims=True).astype(x.bias.dtype)


def _others(p: Program, x: Inputs) -> list[jax.Array]:
    """What there is of `OTHERS`."""
    found = [
        x.sinks.astype(jnp.float32) if p.sinks else None,
        x.query_lengths,
        x.key_lengths,
        *[None] * 5,
    ]
    if x.query_segments is not None:
        # What is beyond is hidden by its place.
        found[3] = _padded(x.query_segments.astype(jnp.int32), p.padded_queries)
        found[4] = _padded(x.key_segments.astype(jnp.int32), p.padded_keys)
    if x.query_offset is not None:
        found[5] = jnp.broadcast_to(x.query_offset, (p.batch,))
    if x.mask is not None:
        found[6] = _mask_words(p, x.mask)
    if x.bias is not None:
        found[7] = _bias(p, x.bias)
    if p.dropout_rate:
        found.append(x.dropout_key)
    return [a for a in found if a is not None]


def attention(config: Config, x: Inputs, **plan: Any) -> Result:
    """As `_attend.xla` has it."""
    p = program("forward", config, x, **plan)
    kernel = mosaic_gpu_forward.forward(p)
    out, *kept = kernel(*_heads(p, x), *_others(p, x))
    out, largest = out[:, : p.queries], None
    if p.wants_max:
        tops, *kept = kept
        # The kernel's maxima have the sinks in them.
        hidden = x.sinks is not None
        tops = tops[..., : p.queries]
        largest = xla.max_logits(config, x) if hidden else jnp.max(tops, axis=-1)
    if not kept:  # nothing uses them
        row = jnp.zeros(out.shape[:3], jnp.float32)
        return Result(out, jnp.zeros_like(out), row, row, largest)
    low, *rows = kept
    lse, lse_low = (jnp.swapaxes(a[..., : p.queries], 1, 2) for a in rows)
    return Result(out, low[:, : p.queries], lse, lse_low, largest)


def attention_gradient(
    config: Config, x: Inputs, result: Result, cotangent: Result, **plan: Any
) -> dict[str, jax.Array]:
    """As `_attend.xla` has it."""
    d_out, center = xla.cotangent_and_center(x, result, cotangent)
    x = seeing_queries(config, x, result)
    # A query that sees nothing, and one beyond the length, has the probabilities 0.
    lse = jnp.where(result.lse == -jnp.inf, jnp.inf, result.lse)
    inside = within(jnp.arange(lse.shape[1], dtype=jnp.int32), x.query_lengths)
    if inside is not None:
        lse = jnp.where(inside[..., None], lse, jnp.inf)

    def run(kind: str, kernel: Any, **wants: bool) -> Any:
        p = program(kind, config, x, **plan, **wants)
        d = _padded(d_out.astype(x.query.dtype), copied(p.queries, p.block_m))
        rows = lse if p.differs_first else lse * LOG2E
        given = [_padded(rows, p.padded_queries, jnp.inf)]
        given.append(_padded(center, p.padded_queries))
        if p.differs_first:
            given.append(_padded(result.lse_low * LOG2E, p.padded_queries))
        numbers = (jnp.swapaxes(a, 1, 2) for a in given)
        return kernel(p)(*_heads(p, x), d, *numbers, *_others(p, x))

    found = {}
    adding_up = _adding_up(config, x)
    of_bias = x.bias is not None and "bias" in config.wanted
    if "query" in config.wanted or (of_bias and adding_up != "key_gradient"):
        d_query, *pairs = run("query_gradient", mosaic_gpu_backward.query_gradient)
        if "query" in config.wanted:
            found["query"] = d_query[:, : x.query.shape[1]]
        if pairs:
            found["bias"] = _summed_to(x, *pairs)
    names = [name for name in ("key", "value") if name in config.wanted]
    if adding_up == "key_gradient" and "key" not in names:
        names.insert(0, "key")  # it has the derivatives that are added up
    # Two of these fit the registers up to a size.
    apart = x.query.shape[-1] + x.value.shape[-1] > _LARGEST_PAIR
    for wanted in [[name] for name in names] if apart else [names] * bool(names):
        wants = {f"wants_{name}": name in wanted for name in ("key", "value")}
        wants["sums_bias"] = adding_up == "key_gradient" and "key" in wanted
        outs = run("key_gradient", mosaic_gpu_backward.key_gradient, **wants)
        if wants["sums_bias"]:
            *outs, sums = outs
            found["bias"] = _summed_to(x, sums)
        for name, gradient in zip(wanted, outs, strict=True):
            if name in config.wanted:
                found[name] = gradient[:, : x.key.shape[1]]
    if x.sinks is not None and "sinks" in config.wanted:
        found["sinks"] = xla.gradient_of_sinks(x, result, center)
    return found


def attention_pushforward(
    config: Config, x: Inputs, result: Result, tangents: Inputs, **plan: Any
) -> Result:
    """As `_attend.xla` has it."""
    p = program("tangent", config, x, **plan)
    names = [name for name in ("query", "key", "value") if name in p.moving]
    moving = x._replace(**{name: getattr(tangents, name) for name in names})
    # A query that sees nothing has the probabilities 0.
    lse = jnp.where(result.lse == -jnp.inf, jnp.inf, result.lse)
    rows = lse if p.differs_first else lse * LOG2E

    def of_queries(numbers: jax.Array, beyond: float = 0) -> jax.Array:
        return jnp.swapaxes(_padded(numbers, p.padded_queries, beyond), 1, 2)

    given = {
        **dict(zip(("q", "k", "v"), _heads(p, x), strict=True)),
        **dict(zip(("q_dot", "k_dot", "v_dot"), _heads(p, moving), strict=True)),
        "rows": of_queries(rows, jnp.inf),
        "low": of_queries(result.lse_low * LOG2E),
        "out": _padded(result.out, copied(p.queries, p.block_m)),
        "out_low": _padded(result.low, copied(p.queries, p.block_m)),
    }
    if "bias" in p.moving:
        given["bias_dot"] = _bias(p, tangents.bias)
    if "sinks" in p.moving:
        given["sinks_dot"] = tangents.sinks.astype(jnp.float32)
    arrays = [given[name] for name in mosaic_gpu_tangent.arguments(p)]
    out, low, mean = mosaic_gpu_tangent.tangent(p)(*arrays, *_others(p, x))
    out, low = (a[:, : p.queries] for a in (out, low))
    mean = jnp.swapaxes(mean[..., : p.queries], 1, 2)
    return Result(out, low, mean, jnp.zeros_like(mean))


def run(call: AttentionCall, arguments: Sequence[Any]) -> Any:
    """What a call computes, of its inputs and what else it takes."""
    functions: dict[str, Callable[..., Any]] = {
        "attention": attention,
        "attention_gradient": attention_gradient,
        "attention_pushforward": attention_pushforward,
    }
    return functions[call.op](call.config, *arguments)
