"""Attention as Mosaic GPU kernels, for Hopper: what cuDNN does not take, at its speed.

Soft cap, sinks, segment ids, windows to both sides, lengths and offsets, grouped heads;
bfloat16 and float16. The functions are those of `_attend.xla`, with the same meaning;
the kernel is in `mosaic_gpu_forward`.

Arrays are read where they lie, ``[B, T, N, H]``. A mapped axis (`jax.vmap`) is one more
dimension of the kernel's grid: what is not mapped is read again.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxsoftmax._attend import mosaic_gpu_forward, triton, xla
from jaxsoftmax._attend.call import (
    FARTHEST_OFFSET,
    AttentionCall,
    Config,
    Inputs,
    Result,
    within_lengths,
)
from jaxsoftmax._attend.mosaic_gpu_kernel import Program, copied
from jaxsoftmax._compat import mosaic_gpu as _compat
from jaxsoftmax._core.device import Device

_LARGEST_HEAD = 256
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
    if call.op == "attention_gradient":
        return "it has no gradient"
    if config.dropout_rate:
        return "has no dropout"
    for name in ("bias", "mask", "scale"):
        if getattr(x, name) is not None:
            what = "scale that is an array" if name == "scale" else name
            return f"has no {what}"
    if triton._precision(x.query.dtype, config) is None:
        return f"has no precision {triton._requested_precision(config)}"
    least, most = triton._SCALES
    if not least <= config.scale <= most:
        return f"a scale of {config.scale} is outside {least} .. {most}"
    cap = config.softcap
    if cap is not None and not (
        least <= cap <= most and least <= config.scale / cap <= most
    ):
        return f"a soft cap of {cap}, or the scale by it, is outside {least} .. {most}"
    return None


def _refusal_of_arrays(x: Inputs) -> str | None:
    if x.query.dtype.name not in ("bfloat16", "float16"):
        return f"takes bfloat16 and float16, not {x.query.dtype.name}"
    if 0 in (*x.query.shape, *x.key.shape, *x.value.shape):
        return "an empty array"
    for size in (x.query.shape[-1], x.value.shape[-1]):
        if size % 16 or size > _LARGEST_HEAD:
            return (
                f"takes head sizes up to {_LARGEST_HEAD} that are multiples of 16, "
                f"not {size}"
            )
    return None


def program(config: Config, x: Inputs, **plan: Any) -> Program:
    """The kernel for a call; `plan` replaces what is in the table."""
    batch, queries, heads, size = x.query.shape
    keys, kv_heads, value_size = x.value.shape[1:]
    farthest = max(queries, keys)
    farthest += FARTHEST_OFFSET if x.query_offset is not None else 0

    def reach(far: float) -> int | None:
        # Farther than there are places is as good as any, but may be no int32.
        return None if far >= farthest else int(far)

    left, right = map(reach, config.reach)
    each = 2 * keys * (size + value_size) * kv_heads / heads
    most = max(1, _SECTION_BYTES // each)
    section = max(
        n for n in range(1, batch * heads + 1) if not batch * heads % n and n <= most
    )
    largest = max(size, value_size)
    found = {
        "block_m": 64,
        "block_n": 128 if largest <= 128 else 64,
        "stages": 2,
        "warpgroups": 2,
        "turns": largest > 64,
        "section": section,
    }
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
        total=config.keeps,
        sinks=x.sinks is not None,
        query_lengths=x.query_lengths is not None,
        key_lengths=x.key_lengths is not None,
        segments=x.query_segments is not None,
        offsets=x.query_offset is not None,
        **(found | plan),
    )


def _padded(x: jax.Array, places: int) -> jax.Array:
    """[B, places at least, ...], with 0 beyond."""
    missing = max(0, places - x.shape[1])
    return (
        jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2)) if missing else x
    )


def attention(config: Config, x: Inputs, **plan: Any) -> Result:
    """As `_attend.xla` has it."""
    p = program(config, x, **plan)
    batch, queries = x.query.shape[:2]
    # What is hidden is multiplied by 0, which must not be NaN.
    value = within_lengths(x.value, x.key_lengths)
    query = _padded(x.query, copied(p.queries, p.block_m))
    key, value = (_padded(a, copied(p.keys, p.block_n)) for a in (x.key, value))
    others: list[Any] = [
        None if x.sinks is None else x.sinks.astype(jnp.float32),
        x.query_lengths,
        x.key_lengths,
        None,
        None,
        x.query_offset,
    ]
    if x.query_segments is not None:
        # What is beyond is hidden by its place.
        others[3] = _padded(x.query_segments.astype(jnp.int32), p.padded_queries)
        others[4] = _padded(x.key_segments.astype(jnp.int32), p.tiles * p.block_n)
    if x.query_offset is not None:
        others[5] = jnp.broadcast_to(x.query_offset, (batch,))
    given = (a for a in others if a is not None)
    out, low, *rows = mosaic_gpu_forward.forward(p)(query, key, value, *given)
    lse, lse_low, tops = (a[..., :queries] for a in rows)
    largest = None
    if config.uses_max_logits:
        # The kernel's maxima have the sinks in them.
        hidden = x.sinks is not None
        largest = xla.max_logits(config, x) if hidden else jnp.max(tops, axis=-1)
    lse, lse_low = (jnp.swapaxes(a, 1, 2) for a in (lse, lse_low))
    return Result(out[:, :queries], low[:, :queries], lse, lse_low, largest)


def run(call: AttentionCall, arguments: Sequence[Any]) -> Any:
    """What a call computes, of its inputs and what else it takes."""
    return attention(call.config, *arguments)
