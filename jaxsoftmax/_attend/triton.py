"""Attention as Triton kernels, through jax-triton: what cuDNN does not take.

Soft cap, sinks, segment ids, windows to both sides, lengths, a mask and a bias, grouped
heads, float32, the gradient of lse, and forward mode, of cuDNN's results too; for
NVIDIA GPUs from compute capability 8.0 on. No dropout, and no gradient of a bias. The
functions are those of `_attend.xla`, with the same meaning; the programs are in
`triton_source`, which says what a program owns and what it reads and writes.

Arrays are read where they lie, ``[B, T, N, H]``, a bias and a mask without being
expanded. D, one number per query that the backward needs, and the gradient of the
sinks are computed in jax.numpy. A mapped axis (`jax.vmap`) is a further dimension of
the batch: what is not mapped is read again, not repeated in memory.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsoftmax._attend import xla
from jaxsoftmax._attend.call import (
    FARTHEST_OFFSET,
    FLOATS,
    AttentionCall,
    Config,
    Inputs,
    Result,
    seeing_queries,
)
from jaxsoftmax._attend.kernel_limits import (
    product_precision,
    refusal_of_numbers,
    refusal_of_sizes,
)
from jaxsoftmax._compat import triton as _compat
from jaxsoftmax._core.device import Device, capability_lowered_for
from jaxsoftmax._rows import triton as rows

_MOST_PROGRAMS = 2**31 - 1
_LEAST_BLOCK = 16
_LOG2E = math.log2(math.e)

FORWARD = "attention"
KEY_GRADIENT = "attention_gradient_of_keys"
QUERY_GRADIENT = "attention_gradient_of_queries"
PUSHFORWARD = "attention_pushforward"


# --- plans ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Plan:
    """How the work is cut.

    Attributes:
      block_m: Queries in a tile, a power of 2.
      block_n: Keys in a tile, a power of 2.
      warps: How many run a program.
      stages: How many tiles of what is streamed are on their way at a time.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int


# Queries and keys in a tile, warps and stages, as in `Plan`: by the kind of matrix
# product and the larger head size, padded: up to 64, 128, 256.
_PLANS = {
    (FORWARD, "16 bits"): ((64, 64, 4, 3), (64, 64, 4, 3), (128, 64, 8, 2)),
    (KEY_GRADIENT, "16 bits"): ((64, 64, 4, 2), (32, 128, 8, 3), (32, 64, 8, 2)),
    (QUERY_GRADIENT, "16 bits"): ((64, 64, 4, 2), (64, 64, 4, 2), (64, 32, 8, 2)),
    (PUSHFORWARD, "16 bits"): ((64, 32, 4, 3), (128, 64, 8, 2), (128, 32, 8, 1)),
    (FORWARD, "tf32"): ((128, 64, 8, 2), (64, 32, 8, 2), (64, 32, 8, 1)),
    (KEY_GRADIENT, "tf32"): ((32, 64, 8, 1), (32, 64, 8, 1), (16, 32, 8, 1)),
    (QUERY_GRADIENT, "tf32"): ((64, 32, 8, 1), (64, 32, 8, 1), (32, 16, 8, 1)),
    (PUSHFORWARD, "tf32"): ((64, 64, 8, 1), (64, 32, 8, 1), (16, 16, 8, 1)),
    (FORWARD, "ieee"): ((32, 32, 4, 1), (32, 32, 4, 1), (32, 16, 8, 1)),
    (KEY_GRADIENT, "ieee"): ((16, 32, 4, 1), (16, 32, 4, 1), (16, 32, 8, 1)),
    (QUERY_GRADIENT, "ieee"): ((32, 16, 4, 1), (32, 16, 4, 1), (32, 16, 8, 1)),
    (PUSHFORWARD, "ieee"): ((32, 16, 8, 1), (16, 16, 8, 1), (16, 16, 16, 1)),
}


def plan(
    kernel: str,
    dtype: np.dtype[Any],
    precision: str,
    size: int,
    queries: int,
    pairs: bool,
) -> Plan:
    """The plan of a kernel.

    Args:
      kernel: `FORWARD`, `KEY_GRADIENT`, `QUERY_GRADIENT` or `PUSHFORWARD`.
      dtype: That of the queries.
      precision: Triton's name for that of the products.
      size: The larger of the sizes of a head of keys and of values.
      queries: How many there are: few make smaller tiles.
      pairs: Whether there is a bias or a mask, of which tiles are read too.
    """
    kind = "16 bits" if dtype.itemsize == 2 else precision
    by_size = _PLANS[kernel, "ieee" if kind == "tf32x3" else kind]
    found = Plan(*by_size[0 if size <= 64 else 1 if size <= 128 else 2])
    if pairs:
        m, n = found.block_m, found.block_n
        m, n = (m // 2, n) if kernel == KEY_GRADIENT else (m, n // 2)
        m, n = max(m, _LEAST_BLOCK), max(n, _LEAST_BLOCK)
        found = Plan(m, n, found.warps, min(found.stages, 2))
    block_m = min(found.block_m, max(_LEAST_BLOCK, _power_of_2(queries)))
    few = block_m < found.block_m
    return dataclasses.replace(
        found, block_m=block_m, warps=min(found.warps, 4) if few else found.warps
    )


def _power_of_2(n: int) -> int:
    """The least power of 2 that is not less than `n`."""
    return 1 << (n - 1).bit_length()


# --- what can run ---------------------------------------------------------------------


def refusal(call: AttentionCall, device: Device) -> str | None:
    """Why a call cannot run on a device, or None if it may."""
    return (
        rows.refusal_of_device(device)
        or _refusal_of_options(call)
        or _refusal_of_arrays(call.inputs)
        or rows.unavailable(device)
    )


def _refusal_of_options(call: AttentionCall) -> str | None:
    config, x = call.config, call.inputs
    if config.dropout_rate:
        return "has no dropout"
    if x.scale is not None:
        return "has no scale that is an array"
    if call.op == "attention_gradient" and "bias" in config.wanted:
        return "it has no gradient of bias"
    return refusal_of_numbers(config, x.query.dtype)


def _refusal_of_arrays(x: Inputs) -> str | None:
    for name in FLOATS:
        array = getattr(x, name)
        if array is None:
            continue
        if array.dtype.name not in ("bfloat16", "float16", "float32"):
            return f"takes no {name} of {array.dtype.name}"
    reason = refusal_of_sizes(x, 8)
    if reason is not None:
        return reason
    batch, queries, heads, _ = x.query.shape
    longest = max(queries, x.key.shape[1])
    if batch * heads * -(-longest // _LEAST_BLOCK) > _MOST_PROGRAMS:
        return f"needs more than {_MOST_PROGRAMS} programs"
    return None


# --- calls ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Tile:
    """The tiles, of `block` places, of an array [places, heads, size]."""

    places: int
    heads: int
    block: int
    size: int

    @property
    def padded_size(self) -> int:
        """`size` rounded up to a power of 2."""
        return max(_LEAST_BLOCK, _power_of_2(self.size))

    @property
    def blocks(self) -> int:
        """How many tiles a head has."""
        return -(-self.places // self.block)

    @property
    def stride(self) -> int:
        """From one place to the next, in entries."""
        return self.heads * self.size


@dataclasses.dataclass(frozen=True)
class Program:
    """All that is known of a program when it is compiled.

    Attributes:
      q, k, v, o: The tiles of query, key, value and output.
      group: The number of heads of queries for each of keys.
      left, right: How many keys before and after key t query t sees, but for
        `offsets`; below 0, if not key t; None: any.
      factor: Multiplies logits as they are stored, to give exponents to the base 2.
      precision: Triton's name for that of float32 products.
      rounds: Whether arrays have 16 bits.
      total: Whether the sum of exponentials before they are rounded is needed.
      biased, masked, sinks, query_lengths, key_lengths, segments, offsets: Which
        arrays there are.
      wants_query, wants_key, wants_value, wants_bias, wants_sinks: Which of them have a
        gradient, or a tangent.
      batch_sizes: Sizes of the batch dimensions, without the outermost; innermost
        first.
      batch_strides: Strides of each array along them, innermost first; 0 where it has 1
        entry for all.
      pair_strides: Strides of bias and mask along heads, queries and keys.
    """

    q: Tile
    k: Tile
    v: Tile
    o: Tile
    group: int
    left: int | None
    right: int | None
    scale: float
    factor: float
    softcap: float | None
    precision: str
    rounds: bool
    total: bool
    biased: bool
    masked: bool
    sinks: bool
    query_lengths: bool
    key_lengths: bool
    segments: bool
    offsets: bool
    wants_query: bool
    wants_key: bool
    wants_value: bool
    wants_bias: bool
    wants_sinks: bool
    batch_sizes: tuple[int, ...]
    batch_strides: tuple[tuple[int, ...], ...]
    pair_strides: tuple[tuple[int, ...], ...]

    @property
    def tiles(self) -> tuple[Tile | None, ...]:
        """By the places of pointers in the source."""
        outs = (self.o, None, self.o, None)  # with numbers of rows between them
        return (self.q, self.k, self.v, *(None,) * 8, *outs, self.q, self.k, self.v)

    @property
    def logits_move(self) -> bool:
        """Whether logits have a tangent, those of keys."""
        return self.wants_query or self.wants_key or self.wants_bias

    @property
    def key_loops(self) -> tuple[bool, bool, bool]:
        """Which loops over keys there are: at one end, within, at the other end."""
        last = self.right is not None or self.key_lengths
        return (
            self.left is not None,
            True,
            last or self.k.places % self.k.block != 0,
        )

    @property
    def query_loops(self) -> tuple[bool, bool, bool]:
        """Which loops over queries there are."""
        last = self.left is not None or self.query_lengths
        return (
            self.right is not None,
            True,
            last or self.q.places % self.q.block != 0,
        )


def _launch(kernel: str, config: Config, *arrays: Any) -> tuple[jax.Array, ...]:
    """Runs a kernel on what it reads, None for what is not there.

    A mapped axis becomes the first dimension of the batch.
    """
    run = jax.custom_batching.custom_vmap(functools.partial(_run, kernel, config))

    @run.def_vmap
    def _mapped(
        size: int, mapped: Sequence[bool | None], *arrays: Any
    ) -> tuple[tuple[jax.Array, ...], tuple[bool, ...]]:
        del size
        each = zip(arrays, mapped, strict=True)
        full = (x if x is None or is_mapped else x[None] for x, is_mapped in each)
        found = _launch(kernel, config, *full)
        return found, (True,) * len(found)

    return tuple(run(*arrays))


def _run(kernel: str, config: Config, *arrays: Any) -> tuple[jax.Array, ...]:
    from jaxsoftmax._attend import triton_source

    batch, program, chosen = _program(kernel, config, arrays)
    query, key, value, *_ = arrays

    def result(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*batch, *shape), query.dtype)

    results = [result(*query.shape[-3:])]
    constants: dict[str, Any] = {}
    owned = program.q
    if kernel in (FORWARD, PUSHFORWARD):
        out = result(*query.shape[-3:-1], value.shape[-1])
        numbers = (*batch, owned.heads, owned.places)
        lse = jax.ShapeDtypeStruct(numbers, np.float32)
        numbers_of_rows = [lse] * (3 if kernel == FORWARD else 1)
        results = [out, *numbers_of_rows, *[out] * program.rounds]
        low = "low" if kernel == FORWARD else "d_low"
        constants = {} if program.rounds else {low: None}
    elif kernel == KEY_GRADIENT:
        results = [result(*key.shape[-3:]), result(*value.shape[-3:])]
        owned = program.k
    name = f"jaxsoftmax_{kernel}"
    found = _compat.triton_call(
        *(query if x is None else x for x in arrays),
        kernel=getattr(triton_source, name),
        results=tuple(results),
        grid=(owned.blocks * owned.heads * math.prod(batch),),
        name=name,
        num_warps=chosen.warps,
        num_stages=chosen.stages,
        enable_fp_fusion=True,
        compute_capability=capability_lowered_for(),
        C=program,
        **constants,
    )
    # Of one result jax-triton may return no tuple.
    return tuple(found) if isinstance(found, tuple | list) else (found,)


def _program(
    kernel: str, config: Config, arrays: Sequence[Any]
) -> tuple[tuple[int, ...], Program, Plan]:
    """The sizes of the batch's dimensions, the program, and how the work is cut."""
    query, _, value, bias, mask, sinks, *_ = arrays
    query_lengths, key_lengths, segments, _, offsets = arrays[6:11]
    lead = query.ndim - 3
    shapes = [(1,) * lead if x is None else x.shape[:lead] for x in arrays]
    batch = tuple(max(sizes) for sizes in zip(*shapes, strict=True))
    queries, heads, size = query.shape[-3:]
    keys, kv_heads, value_size = value.shape[-3:]
    precision = product_precision(query.dtype, config)
    assert precision is not None
    pairs = bias is not None or mask is not None
    largest = max(size, value_size)
    chosen = plan(kernel, query.dtype, precision, largest, queries, pairs)
    rounds = query.dtype.itemsize == 2
    plain = bias is None and config.softcap is None

    farthest = max(queries, keys) + (FARTHEST_OFFSET if offsets is not None else 0)

    def reach(far: float) -> int | None:
        # Farther than there are places is as good as any, but may be no int32.
        return None if far >= farthest else int(far)

    left, right = map(reach, config.reach)
    strides = [
        (0,) * lead if x is None else _strides(x.shape)[:lead][::-1] for x in arrays
    ]
    program = Program(
        q=Tile(queries, heads, chosen.block_m, size),
        k=Tile(keys, kv_heads, chosen.block_n, size),
        v=Tile(keys, kv_heads, chosen.block_n, value_size),
        o=Tile(queries, heads, chosen.block_m, value_size),
        group=heads // kv_heads,
        left=left,
        right=right,
        scale=float(config.scale),
        factor=_LOG2E * float(config.scale) if plain else _LOG2E,
        softcap=config.softcap,
        precision=precision,
        rounds=rounds,
        total=config.keeps or not rounds,
        biased=bias is not None,
        masked=mask is not None,
        sinks=sinks is not None,
        query_lengths=query_lengths is not None,
        key_lengths=key_lengths is not None,
        segments=segments is not None,
        offsets=offsets is not None,
        wants_query="query" in config.wanted,
        wants_key="key" in config.wanted,
        wants_value="value" in config.wanted,
        wants_bias="bias" in config.wanted,
        wants_sinks="sinks" in config.wanted,
        batch_sizes=batch[:0:-1],
        batch_strides=tuple(strides),
        pair_strides=tuple(
            () if a is None else _strides(a.shape)[-3:] for a in (bias, mask)
        ),
    )
    return batch, program, chosen


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    """In entries; 0 where there is one."""
    each = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    return tuple(0 if n == 1 else s for n, s in zip(shape, each, strict=True))


def _inputs(x: Inputs) -> tuple[jax.Array | None, ...]:
    """What each kernel reads, in the order of `triton_source`."""
    sinks = None if x.sinks is None else x.sinks.astype(jnp.float32)[None]
    lengths = (x.query_lengths, x.key_lengths)
    places = (x.query_segments, x.key_segments, x.query_offset)
    return (x.query, x.key, x.value, x.bias, x.mask, sinks, *lengths, *places)


def attention(config: Config, x: Inputs) -> Result:
    """As `_attend.xla` has it."""
    out, lse, lse_low, tops, *low = _launch(FORWARD, config, *_inputs(x))
    lse, lse_low = (jnp.swapaxes(a, 1, 2) for a in (lse, lse_low))
    largest = None
    if config.uses_max_logits:
        # The kernel's maxima have the sinks in them.
        hidden = x.sinks is not None
        largest = xla.max_logits(config, x) if hidden else jnp.max(tops, axis=-1)
    return Result(out, low[0] if low else None, lse, lse_low, largest)


def _rows(x: Inputs, result: Result) -> jax.Array:
    """What exponents are taken less of, as the kernels have it: [B, N, T]."""
    # For a query that sees nothing any finite number will do.
    lse = jnp.where(result.lse == -jnp.inf, 0.0, result.lse)
    return jnp.swapaxes(lse * _LOG2E if x.bias is None else lse, 1, 2)


def _low_of_rows(x: Inputs, result: Result) -> jax.Array | None:
    """What rounding took off them, to the base 2: where there is a bias."""
    return None if x.bias is None else jnp.swapaxes(result.lse_low * _LOG2E, 1, 2)


def attention_gradient(
    config: Config, x: Inputs, result: Result, cotangent: Result
) -> dict[str, jax.Array]:
    """As `_attend.xla` has it."""
    d_out, center = xla.cotangent_and_center(x, result, cotangent)
    x = seeing_queries(config, x, result)
    arrays = (
        *_inputs(x),
        d_out.astype(x.query.dtype),
        _rows(x, result),
        jnp.swapaxes(center, 1, 2),
        _low_of_rows(x, result),
    )
    found = {}
    if "query" in config.wanted:
        (found["query"],) = _launch(QUERY_GRADIENT, config, *arrays)
    if "key" in config.wanted or "value" in config.wanted:
        found["key"], found["value"] = _launch(KEY_GRADIENT, config, *arrays)
    if x.sinks is not None and "sinks" in config.wanted:
        found["sinks"] = xla.gradient_of_sinks(x, result, center)
    return {name: gradient for name, gradient in found.items() if name in config.wanted}


def attention_pushforward(
    config: Config, x: Inputs, result: Result, tangents: Inputs
) -> Result:
    """As `_attend.xla` has it."""
    query, key, value, bias, _, sinks, *_ = _inputs(tangents)
    of_result = (result.out, _rows(x, result), result.low, _low_of_rows(x, result))
    arrays = (*_inputs(x), *of_result, query, key, value, bias, sinks)
    d_out, d_lse, *low = _launch(PUSHFORWARD, config, *arrays)
    d_lse = jnp.swapaxes(d_lse, 1, 2)
    return Result(d_out, low[0] if low else None, d_lse, jnp.zeros_like(d_lse))


def run(call: AttentionCall, arguments: Sequence[Any]) -> Any:
    """What a call computes, of its inputs and what else it takes."""
    functions: dict[str, Callable[..., Any]] = {
        "attention": attention,
        "attention_gradient": attention_gradient,
        "attention_pushforward": attention_pushforward,
    }
    return functions[call.op](call.config, *arguments)
