"""Attention by cuDNN, with its statistics and with a gradient of its own.

`jax.nn.dot_product_attention` rounds lse to 16 bits (tests/core/test_workarounds.py),
and its gradient cannot be called apart from its forward. What it calls, in the private
`jax._src.cudnn`, does neither.
Checked with jax 0.10.0, 0.10.2, 0.11.2 and 0.12.0.1.
"""

import importlib
import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Call(NamedTuple):
    """What cuDNN computes attention of.

    Attributes:
      query: [B, T, N, H].
      key, value: [B, S, K, H].
      bias: [B or 1, N or 1, T, S], or None.
      query_lengths, key_lengths: [B]; int32; both or neither may be None.
      scale: Of the logits.
      causal: Whether query t sees keys 0 to t only.
      window: How many keys up to its own place a query sees; or None.
    """

    query: jax.Array
    key: jax.Array
    value: jax.Array
    bias: jax.Array | None
    query_lengths: jax.Array | None
    key_lengths: jax.Array | None
    scale: float
    causal: bool
    window: int | None


def _cudnn() -> Any:
    return importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")


def _static(call: Call) -> dict[str, Any]:
    names = {
        (False, False): "NO_MASK",
        (True, False): "CAUSAL",
        (False, True): "PADDING",
        (True, True): "PADDING_CAUSAL",
    }
    name = names[call.causal, call.key_lengths is not None]
    return {
        "scale": call.scale,
        "mask_type": getattr(_cudnn().MaskType, name),
        "sliding_window_length": call.window,
    }


def cudnn_attention(call: Call, *, keeps_lse: bool) -> tuple[jax.Array, jax.Array]:
    """Output [B, T, N, H] and lse [B, N, T], float32. Raises where cuDNN refuses.

    Unless it is to be kept, lse is 0.
    """
    query, key, value, bias, *lengths = call[:6]
    found = _cudnn().dot_product_attention(
        *(query, key, value, bias, None, *lengths),
        return_residual=keeps_lse,
        **_static(call),
    )
    if keeps_lse:
        out, lse = found
        return out, lse
    batch, queries, heads, _ = query.shape
    return found, jnp.zeros((batch, heads, queries), jnp.float32)


def cudnn_attention_gradient(
    call: Call, lse: jax.Array, out: jax.Array, d_out: jax.Array, *, wants_bias: bool
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """The gradients of query, key, value, and of the bias or None.

    Given the results of `cudnn_attention`, the cotangent of the output, and whether the
    bias has a gradient.
    """
    cudnn = _cudnn()
    absent = jnp.zeros(0, call.query.dtype)
    optional = [absent if x is None else x for x in call[3:6]]
    static = _static(call) | {
        "seed": 42,
        "dropout_rate": 0.0,
        "variadic_args": (call.bias is not None, wants_bias),
        "layout": cudnn.AttentionLayout.BTNH.value,
    }
    backward = inspect.signature(cudnn._dot_product_attention_bwd_impl)
    if "score_mod" in backward.parameters:  # since jax 0.12
        static["score_mod"] = None
    operands = (*call[:3], *optional, *[absent] * 4, lse, out, d_out)
    grads = cudnn._dot_product_attention_bwd_p_wrapper.bind(*operands, **static)
    return *grads[:3], grads[3] if wants_bias else None
