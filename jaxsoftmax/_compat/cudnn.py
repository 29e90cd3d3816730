"""Attention by cuDNN, with its statistics and with a gradient of its own.

`jax.nn.dot_product_attention` rounds lse to 16 bits (tests/core/test_workarounds.py),
and its gradient cannot be called apart from its forward. What it calls, in the private
`jax._src.cudnn`, does neither.
Checked with jax 0.10.0, 0.10.2, 0.11.2 and 0.12.0.1.
"""

import importlib
import inspect
from typing import Any

import jax
import jax.numpy as jnp


def _cudnn() -> Any:
    return importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")


def _cudnn_mask(causal: bool, padding: bool) -> Any:
    names = {
        (False, False): "NO_MASK",
        (True, False): "CAUSAL",
        (False, True): "PADDING",
        (True, True): "PADDING_CAUSAL",
    }
    return getattr(_cudnn().MaskType, names[causal, padding])


def cudnn_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None,
    query_lengths: jax.Array | None,
    key_lengths: jax.Array | None,
    *,
    keeps_lse: bool,
    scale: float,
    causal: bool,
    window: int | None,
) -> tuple[jax.Array, jax.Array]:
    """Output [B, T, N, H] and lse [B, N, T], float32. Raises where cuDNN refuses.

    Args:
      query: [B, T, N, H].
      key: [B, S, K, H].
      value: [B, S, K, H].
      bias: [B or 1, N or 1, T, S], or None.
      query_lengths: [B]; int32; or None.
      key_lengths: [B]; int32; None together with `query_lengths`.
      keeps_lse: Whether lse is to be computed; else it is 0.
      scale: Of the logits.
      causal: Whether query t sees keys 0 to t only.
      window: How many keys up to its own place a query sees; or None.
    """
    found = _cudnn().dot_product_attention(
        query,
        key,
        value,
        bias,
        None,
        query_lengths,
        key_lengths,
        scale=scale,
        mask_type=_cudnn_mask(causal, key_lengths is not None),
        sliding_window_length=window,
        return_residual=keeps_lse,
    )
    if keeps_lse:
        out, lse = found
        return out, lse
    batch, queries, heads, _ = query.shape
    return found, jnp.zeros((batch, heads, queries), jnp.float32)


def cudnn_attention_gradient(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None,
    query_lengths: jax.Array | None,
    key_lengths: jax.Array | None,
    lse: jax.Array,
    out: jax.Array,
    d_out: jax.Array,
    *,
    scale: float,
    causal: bool,
    window: int | None,
    wants_bias: bool,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """The gradients of `query`, `key`, `value`, and of `bias` or None.

    Args as of `cudnn_attention`, its results, the cotangent of the output, and whether
    `bias` has a gradient.
    """
    cudnn = _cudnn()
    absent = jnp.zeros(0, query.dtype)
    optional = [absent if x is None else x for x in (bias, query_lengths, key_lengths)]
    static = {
        "scale": scale,
        "seed": 42,
        "dropout_rate": 0.0,
        "variadic_args": (bias is not None, wants_bias),
        "mask_type": _cudnn_mask(causal, key_lengths is not None),
        "layout": cudnn.AttentionLayout.BTNH.value,
        "sliding_window_length": window,
    }
    # Since jax 0.12.
    if (
        "score_mod"
        in inspect.signature(cudnn._dot_product_attention_bwd_impl).parameters
    ):
        static["score_mod"] = None
    operands = (query, key, value, *optional, *[absent] * 4, lse, out, d_out)
    grads = cudnn._dot_product_attention_bwd_p_wrapper.bind(*operands, **static)
    return *grads[:3], grads[3] if wants_bias else None
