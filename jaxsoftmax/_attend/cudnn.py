"""Attention by the fused kernels of cuDNN, which jax calls as XLA custom calls.

What cuDNN takes is in `refusal`, as far as it is known without asking; the rest jax
says when the call is lowered. Queries that see no key are given the results that
`_attend.xla` gives them: cuDNN takes a mask as large numbers to be added
(https://github.com/jax-ml/jax/pull/22078), so such a query would see all keys alike. A
large negative number in the bias of all keys that a query sees would make cuDNN's lse,
one float32, lose the logarithm of the sum, and the gradient too large by that sum, if
not NaN (https://github.com/pytorch/pytorch/issues/196678): such a number is taken out
of the bias, and added to lse after.

The gradient takes D from the rounded output, with nothing of its low digits: where all
values of a row have much in common, `_attend.xla` is more accurate.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxsoftmax._attend import xla
from jaxsoftmax._attend.call import (
    AttentionCall,
    Config,
    Inputs,
    Result,
    both,
    in_reach,
    queries_with_keys,
    sum_in_two,
    within,
    within_lengths,
)
from jaxsoftmax._compat import cudnn as _compat
from jaxsoftmax._core.device import Device

# Added to the logits of what is masked: finite, so that nothing becomes NaN.
_MASKED = -0.7


def refusal(call: AttentionCall, device: Device) -> str | None:
    """Why a call cannot run on a device, or None if it may."""
    config, x = call.config, call.inputs
    if device.platform != "cuda":
        return "needs an NVIDIA GPU"
    capability = device.compute_capability
    if capability is not None and capability < (8, 0):
        return f"needs compute capability 8.0, this is {capability[0]}.{capability[1]}"
    if call.op == "attention_pushforward":
        return "it has no forward mode"
    if call.op == "attention_gradient" and config.uses_lse:
        return "it has no gradient of lse, which return_residual=True returns"
    return _refusal_of_options(config, x) or _refusal_of_shapes(x, device)


def _refusal_of_options(config: Config, x: Inputs) -> str | None:
    if x.query.dtype.name not in ("bfloat16", "float16"):
        return f"takes bfloat16 and float16, not {x.query.dtype.name}"
    absent = {
        "logits_soft_cap": config.softcap is None,
        "sinks": x.sinks is None,
        "scale that is an array, or 0": x.scale is None and config.scale > 0,
        "segment ids": x.query_segments is None,
        "query_offset": x.query_offset is None and not config.offset,
        "dropout as it is defined here": not config.dropout_rate,
        "precision": config.precision is None,
    }
    given = [name for name, is_absent in absent.items() if not is_absent]
    if given:
        return f"has no {given[0]}"
    left, right = config.reach
    if config.window is not None and right != 0:
        return "has no window to the right"
    if left < math.inf and x.query.shape[1] != x.key.shape[1]:
        return "a window with different numbers of queries and keys is left out"
    if x.bias is not None and x.bias.dtype != x.query.dtype:
        return f"would round a bias of {x.bias.dtype.name} to {x.query.dtype.name}"
    return None


def _refusal_of_shapes(x: Inputs, device: Device) -> str | None:
    _, queries, _, size = x.query.shape
    keys = x.key.shape[1]
    sizes = (size, x.value.shape[-1])
    hopper = device.compute_capability is None or device.compute_capability >= (9, 0)
    largest = 256 if hopper else 128
    if math.prod(x.query.shape) * keys == 0:
        return "an empty array"
    for n in sizes:
        if n % 8 or n > largest:
            return f"takes head sizes up to {largest} that are multiples of 8, not {n}"
    if sizes[0] != sizes[1]:
        return f"values of size {sizes[1]} with keys of size {size} are left out"
    if (x.bias is not None or x.mask is not None) and (queries % 2 or keys % 2):
        return "takes a bias or mask with even numbers of queries and keys only"
    return None


def _combined(
    x: Inputs, bias: jax.Array | None, shared: jax.Array | None
) -> jax.Array | None:
    """Bias and mask as one array to be added, full in queries and keys.

    `shared`, [B or 1, N or 1, T, 1], is taken out of the bias.
    """
    if bias is None and x.mask is None:
        return None
    dtype = x.query.dtype
    masked = jnp.asarray(_MASKED * float(jnp.finfo(dtype).max), dtype)
    if bias is None:
        added = jnp.where(x.mask, jnp.zeros((), dtype), masked)
    else:
        added = bias if shared is None else _without_shared(bias, shared)
        added = jnp.maximum(added, masked)
        if x.mask is not None:
            added = jnp.where(x.mask, added, masked)
    shape = (*added.shape[:2], x.query.shape[1], x.key.shape[1])
    return jnp.broadcast_to(added, shape)


def _without_shared(bias: jax.Array, shared: jax.Array) -> jax.Array:
    moved = bias.astype(jnp.float32) - shared
    # Above 0 only for a key that cuDNN hides itself.
    moved = jnp.where((shared < 0) & (moved > 0), 0.0, moved)
    return moved.astype(bias.dtype)


def _call(config: Config, x: Inputs, added: jax.Array | None) -> _compat.Call:
    """The call of cuDNN, given what is added to the logits."""
    lengths = (x.query_lengths, x.key_lengths)
    if any(a is not None for a in lengths):
        batch, queries, *_ = x.query.shape
        query_lengths, key_lengths = (
            jnp.full((batch,), n, jnp.int32) if given is None else given
            for n, given in zip((queries, x.key.shape[1]), lengths, strict=True)
        )
        lengths = (query_lengths, key_lengths)
    left, right = config.reach
    return _compat.Call(
        *(x.query, x.key, x.value, added, *lengths),
        scale=config.scale,
        causal=right == 0,
        window=None if left == math.inf else int(left) + 1,
    )


def _in_one_batch(
    f: Callable[..., Any],
    call: _compat.Call,
    *others: jax.Array,
    wants_bias: bool = False,
) -> Any:
    """`f(call, *others)`, in which the entries of a vmap are entries of the batch.

    The rules that jax has for its primitives take all arrays to be mapped alike, and
    add up the gradients of a bias that is not mapped.
    """
    static: tuple[Any, ...] = call[6:]

    @jax.custom_batching.custom_vmap
    def run(*arrays: Any) -> Any:
        return f(_compat.Call(*arrays[:6], *static), *arrays[6:])

    @run.def_vmap
    def under_vmap(size: int, mapped: Sequence[Any], *arrays: Any) -> Any:
        batch, bias = arrays[0].shape[int(mapped[0])], arrays[3]
        bias_batch = None if bias is None else bias.shape[int(mapped[3])]

        def folded(x: jax.Array, is_mapped: bool) -> jax.Array:
            x = x if is_mapped else x[None]
            x = jnp.broadcast_to(x, (size, batch, *x.shape[2:]))
            return x.reshape(size * batch, *x.shape[2:])

        given = jax.tree.map(folded, list(arrays), list(mapped))
        if bias_batch == 1 and not mapped[3] and not wants_bias:
            given[3] = bias  # which all entries share: one array, as it is
        outs = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), run(*given))
        if bias_batch == 1 and wants_bias:
            *first, d_bias = outs
            wide = jnp.sum(d_bias, axis=1, keepdims=True, dtype=jnp.float32)
            outs = (*first, wide.astype(d_bias.dtype))
        return outs, jax.tree.map(lambda _: True, outs)

    return run(*call[:6], *others)


def _largest(config: Config, x: Inputs) -> jax.Array | None:
    """[B or 1, N or 1, T or 1]: the largest bias that a query sees, or 0; or -inf.

    None without a bias or a mask of keys: then each query sees some key. Masks of pairs
    are combined and reduced at once, which XLA fuses.
    """
    if x.mask is None and x.bias is None and x.key_lengths is None:
        return None
    query_places, key_places = (
        jnp.arange(n, dtype=jnp.int32) for n in (x.query.shape[1], x.key.shape[1])
    )
    inside = within(key_places, x.key_lengths)
    pairs = both(
        jnp.ones((1, 1, 1, 1), bool),
        x.mask,
        None if inside is None else inside[:, None, None, :],
        in_reach(config, query_places, key_places),
    )
    assert pairs is not None
    bias = 0.0 if x.bias is None else x.bias.astype(jnp.float32)
    return jnp.max(jnp.where(pairs, bias, -jnp.inf), axis=-1)


# A difference of two numbers of 16 bits, of which one is as far from 0 as this, is
# exact, or so large that its exponential is 0.
_FAR = -64.0


def _shared(x: Inputs, largest: jax.Array | None) -> jax.Array | None:
    """[B or 1, N or 1, T, 1]: far below 0 what all keys of a query share; else 0.

    None where there is no bias, or where to take it out would repeat the bias for each
    batch entry, of lengths alone.
    """
    if x.bias is None or largest is None:
        return None
    entries = max(x.bias.shape[0], 1 if x.mask is None else x.mask.shape[0])
    if largest.shape[0] > entries:
        return None
    far = (largest < _FAR) & (largest > -jnp.inf)
    return jnp.where(far, largest, 0.0)[..., None]


def _by_place(shared: jax.Array) -> jax.Array:
    """As lse lies: [B or 1, T or 1, N or 1]."""
    return jnp.swapaxes(shared[..., 0], 1, 2)


def _without_keys(x: Inputs, largest: jax.Array | None) -> jax.Array | None:
    """[B, T, N]: the queries that see no key; None where each sees one."""
    batch, queries, heads, _ = x.query.shape
    inside = within(jnp.arange(queries, dtype=jnp.int32), x.query_lengths)
    some = both(
        None if largest is None else jnp.swapaxes(largest != -jnp.inf, 1, 2),
        None if inside is None else inside[:, :, None],
    )
    return None if some is None else ~jnp.broadcast_to(some, (batch, queries, heads))


def attention(config: Config, x: Inputs) -> Result:
    """As `_attend.xla` has it; the low digits of out are 0."""
    largest = _largest(config, x)
    # For lse alone: out has its digits without.
    shared = _shared(x, largest) if config.keeps else None
    call = _call(config, x, _combined(x, x.bias, shared))
    forward = functools.partial(_compat.cudnn_attention, keeps_lse=config.keeps)
    out, lse = _in_one_batch(forward, call)
    lse = jnp.swapaxes(lse, 1, 2)
    lse_low = jnp.zeros_like(lse)
    if shared is not None:
        lse, lse_low = sum_in_two(_by_place(shared), lse)
    empty = _without_keys(x, largest)
    if empty is not None:
        out = jnp.where(empty[..., None], jnp.zeros((), out.dtype), out)
        lse = jnp.where(empty, -jnp.inf, lse)
    top = xla.max_logits(config, x) if config.uses_max_logits else None
    return Result(out, jnp.zeros_like(out), lse, lse_low, top)


def attention_gradient(
    config: Config, x: Inputs, result: Result, cotangent: Result
) -> dict[str, jax.Array]:
    """As `_attend.xla` has it, but for the cotangent of lse."""
    d_out = cotangent.out.astype(x.query.dtype)
    # The same computation as in the forward: within one program XLA does it once.
    shared = _shared(x, _largest(config, x)) if x.bias is not None else None
    lse = result.lse
    if shared is not None:
        lse = (lse - _by_place(shared)) + result.lse_low
    # Reach alone leaves each query its own place, or key 0.
    optional = (x.mask, x.bias, x.query_lengths, x.key_lengths)
    may_see_no_key = any(a is not None for a in optional)
    if may_see_no_key:
        # exp(s - lse) is to be 0 for a query that sees no key, and so is its cotangent.
        lse = jnp.where(result.lse == -jnp.inf, 1e30, lse)
        d_out = queries_with_keys(result, d_out)
    lse = jnp.swapaxes(lse, 1, 2)
    wants_bias = x.bias is not None and "bias" in config.wanted
    if wants_bias:
        added, pull = jax.vjp(lambda bias: _combined(x, bias, shared), x.bias)
    else:
        added, pull = _combined(x, x.bias, shared), None
    backward = functools.partial(
        _compat.cudnn_attention_gradient, wants_bias=wants_bias
    )
    *found, d_added = _in_one_batch(
        *(backward, _call(config, x, added), lse, result.out, d_out),
        wants_bias=wants_bias,
    )
    gradients = dict(zip(("query", "key", "value"), found, strict=True))
    # Beyond the lengths cuDNN writes nothing (tests/core/test_workarounds.py).
    if may_see_no_key:
        gradients["query"] = queries_with_keys(result, gradients["query"])
    for name in ("key", "value"):
        gradients[name] = within_lengths(gradients[name], x.key_lengths)
    if pull is not None:
        (gradients["bias"],) = pull(d_added)
    return {name: g for name, g in gradients.items() if name in config.wanted}


def run(call: AttentionCall, arguments: Sequence[Any]) -> Any:
    """What a call computes, of its inputs and what else it takes."""
    function = attention if call.op == "attention" else attention_gradient
    return function(call.config, *arguments)
