"""Attention as Mosaic GPU kernels, for Hopper: what cuDNN does not take, at its speed.

Soft cap, sinks, segment ids, windows to both sides, lengths and offsets, grouped heads,
the gradient of lse; bfloat16 and float16. The functions are those of `_attend.xla`,
with the same meaning; the kernels are in `mosaic_gpu_forward` and
`mosaic_gpu_backward`. D, one number per query that the backward needs, and the gradient
of the sinks are computed in jax.numpy.

Arrays are read where they lie, ``[B, T, N, H]``. A mapped axis (`jax.vmap`) is one more
dimension of the kernel's grid: what is not mapped is read again.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxsoftmax._attend import mosaic_gpu_backward, mosaic_gpu_forward, xla
from jaxsoftmax._attend.call import (
    FARTHEST_OFFSET,
    AttentionCall,
    Config,
    Inputs,
    Result,
    within,
    within_lengths,
)
from jaxsoftmax._attend.kernel_limits import refusal_of_numbers, refusal_of_sizes
from jaxsoftmax._attend.mosaic_gpu_kernel import LOG2E, Program, copied
from jaxsoftmax._compat import mosaic_gpu as _compat
from jaxsoftmax._core.device import Device

# Of the gradients of keys and values, what fits the registers together.
_LARGEST_PAIR = 256
_EVERYTHING = (math.inf, math.inf)
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
        or _compat.mosaic_gpu_reason()
        or _compat.ptxas_reason()
    )


def _refusal_of_options(call: AttentionCall) -> str | None:
    config, x = call.config, call.inputs
    if call.op == "attention_pushforward":
        return "it has no forward mode"
    if config.dropout_rate:
        return "has no dropout"
    for name in ("bias", "mask", "scale"):
        if getattr(x, name) is not None:
            what = "scale that is an array" if name == "scale" else name
            return f"has no {what}"
    return refusal_of_numbers(config, x.query.dtype)


def _refusal_of_arrays(x: Inputs) -> str | None:
    if x.query.dtype.name not in ("bfloat16", "float16"):
        return f"takes bfloat16 and float16, not {x.query.dtype.name}"
    return refusal_of_sizes(x, 16)


# What a program is for, and how its work is cut: see `Program`.
_PLANS: dict[str, dict[str, Any]] = {
    "forward": {"block_m": 64, "block_n": 128},
    "query_gradient": {"block_m": 64, "block_n": 128},
    "key_gradient": {"block_m": 64, "block_n": 64, "owns_keys": True},
}


def _plan(kind: str, config: Config, x: Inputs) -> dict[str, Any]:
    batch, queries, heads, size = x.query.shape
    keys, kv_heads, value_size = x.value.shape[1:]
    found = _PLANS[kind] | {"stages": 2, "warpgroups": 2, "turns": kind == "forward"}
    if kind == "forward" and size + value_size <= 128 and config.reach == _EVERYTHING:
        # More blocks of small heads at once; at an end they would wait for each other.
        found |= {"warpgroups": 3, "turns": False}
    if max(size, value_size) > 128:
        found["block_n"] = 64
    # What shared memory has room for, two tiles of each at a time.
    largest = 384 if kind != "forward" else 512 if size == value_size else 432
    if size + value_size > largest:
        found["stages"] = 1
    each = 2 * (size + value_size)
    if found.get("owns_keys"):
        owners, each = batch * kv_heads, each * queries * heads // kv_heads
    else:
        owners, each = batch * heads, each * keys * kv_heads // heads
    most = max(1, _SECTION_BYTES // each)
    section = max(n for n in range(1, min(owners, most) + 1) if owners % n == 0)
    return found | {"section": section}


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
        sinks=kind == "forward" and x.sinks is not None,
        query_lengths=x.query_lengths is not None,
        key_lengths=x.key_lengths is not None,
        segments=x.query_segments is not None,
        offsets=x.query_offset is not None,
        **(_plan(kind, config, x) | plan),
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


def _others(p: Program, x: Inputs) -> list[jax.Array]:
    """What there is of `OTHERS`."""
    found = [
        x.sinks.astype(jnp.float32) if p.sinks else None,
        x.query_lengths,
        x.key_lengths,
        None,
        None,
        None,
    ]
    if x.query_segments is not None:
        # What is beyond is hidden by its place.
        found[3] = _padded(x.query_segments.astype(jnp.int32), p.padded_queries)
        found[4] = _padded(x.key_segments.astype(jnp.int32), p.padded_keys)
    if x.query_offset is not None:
        found[5] = jnp.broadcast_to(x.query_offset, (p.batch,))
    return [a for a in found if a is not None]


def attention(config: Config, x: Inputs, **plan: Any) -> Result:
    """As `_attend.xla` has it."""
    p = program("forward", config, x, **plan)
    kernel = mosaic_gpu_forward.forward(p)
    out, tops, *kept = kernel(*_heads(p, x), *_others(p, x))
    out, tops = out[:, : p.queries], tops[..., : p.queries]
    largest = None
    if config.uses_max_logits:
        # The kernel's maxima have the sinks in them.
        hidden = x.sinks is not None
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
    # A query that sees nothing, and one beyond the length, has the probabilities 0.
    lse = jnp.where(result.lse == -jnp.inf, jnp.inf, result.lse)
    inside = within(jnp.arange(lse.shape[1], dtype=jnp.int32), x.query_lengths)
    if inside is not None:
        lse = jnp.where(inside[..., None], lse, jnp.inf)

    def run(kind: str, kernel: Any, **wants: bool) -> Any:
        p = program(kind, config, x, **plan, **wants)
        d = _padded(d_out.astype(x.query.dtype), copied(p.queries, p.block_m))
        rows = _padded(lse * LOG2E, p.padded_queries, jnp.inf)
        both = rows, _padded(center, p.padded_queries)
        numbers = (jnp.swapaxes(a, 1, 2) for a in both)
        return kernel(p)(*_heads(p, x), d, *numbers, *_others(p, x))

    found = {}
    if "query" in config.wanted:
        (d_query,) = run("query_gradient", mosaic_gpu_backward.query_gradient)
        found["query"] = d_query[:, : x.query.shape[1]]
    names = tuple(name for name in ("key", "value") if name in config.wanted)
    # Two of these fit the registers up to a size.
    apart = x.query.shape[-1] + x.value.shape[-1] > _LARGEST_PAIR
    for wanted in [(name,) for name in names] if apart else [names] * bool(names):
        wants = {f"wants_{name}": name in wanted for name in ("key", "value")}
        outs = run("key_gradient", mosaic_gpu_backward.key_gradient, **wants)
        for name, gradient in zip(wanted, outs, strict=True):
            found[name] = gradient[:, : x.key.shape[1]]
    if x.sinks is not None and "sinks" in config.wanted:
        found["sinks"] = xla.gradient_of_sinks(x, result, center)
    return found


def run(call: AttentionCall, arguments: Sequence[Any]) -> Any:
    """What a call computes, of its inputs and what else it takes."""
    function = attention if call.op == "attention" else attention_gradient
    return function(call.config, *arguments)
