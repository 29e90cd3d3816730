"""What is known of a Mosaic GPU kernel of attention when it is made, and its tiles."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxsoftmax._compat import mosaic_gpu as _compat

LOG2E = math.log2(math.e)
LN2 = math.log(2)


@dataclasses.dataclass(frozen=True)
class Program:
    """All that is known of a kernel when it is made.

    Attributes:
      batch, queries, keys, heads, kv_heads, size, value_size: The shapes.
      dtype: Of queries, keys, values and output.
      block_m: Queries of a consumer warpgroup; in a tile, where blocks own keys.
      block_n: Keys in a tile; of a consumer warpgroup, where blocks own them.
      stages: Tiles of each array that are on their way at a time.
      warpgroups: How many consume.
      turns: Whether consumers take turns.
      section: Heads whose blocks follow each other, so that what they all read stays in
        the L2 cache.
      left, right: How many keys before and after key t query t sees, but for
        `offsets`; below 0, if not key t; None: any.
      scale: Multiplies the products of queries and keys.
      softcap: Bounds the logits; or None.
      keeps: Whether lse is of use, and what rounding took off it and off the output.
      wants_max: Whether the forward writes the largest logits.
      bounded: Whether the forward adds up exponentials of the logits as they are, which
        the soft cap keeps from overflow.
      owns_keys: Whether blocks own keys and read queries, as for the gradients of keys.
      wants_key, wants_value: Which of these gradients are computed.
      wants_bias: Whether the derivative of the logits is written, before the cap.
      sums_bias: Whether it is added up for each place that blocks own, and the sums
        are written; with `wants_key`, where they own keys.
      sinks, query_lengths, key_lengths, segments, offsets: Which arrays there are.
      mask, bias: Which of its dimensions, [B, N, T, S], an array has in full; or None.
      bias_dtype: That of the bias, or None.
      dropout_rate, dropout_dims: As `Config` has them.
      moving: Of `call.FLOATS` those that have a tangent, in forward mode.
    """

    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    size: int
    value_size: int
    dtype: Any
    block_m: int
    block_n: int
    stages: int
    warpgroups: int
    turns: bool
    section: int
    left: int | None
    right: int | None
    scale: float
    softcap: float | None
    keeps: bool = False
    wants_max: bool = False
    bounded: bool = False
    owns_keys: bool = False
    wants_key: bool = True
    wants_value: bool = True
    wants_bias: bool = False
    sums_bias: bool = False
    sinks: bool = False
    query_lengths: bool = False
    key_lengths: bool = False
    segments: bool = False
    offsets: bool = False
    mask: tuple[bool, bool, bool, bool] | None = None
    bias: tuple[bool, bool, bool, bool] | None = None
    bias_dtype: Any = None
    dropout_rate: float = 0.0
    dropout_dims: tuple[bool, bool] = (True, True)
    moving: tuple[str, ...] = ()

    @property
    def factor(self) -> float:
        """What makes exponents to the base 2 of logits as they are stored."""
        if self.softcap is not None:
            return LOG2E * (2 * self.softcap)
        return LOG2E * (self.scale if self.bias is None else 1.0)

    @property
    def differs_first(self) -> bool:
        """Whether maxima and lse are of logits as they are, not to the base 2."""
        return self.bias is not None and self.softcap is None

    @property
    def columns_of_cap(self) -> int:
        """For how many it is decided at once whether a soft cap's tanh is of small."""
        return 64 if max(self.size, self.value_size) <= 64 else 32

    @property
    def of_kept(self) -> float:
        """What dropout multiplies what it keeps with."""
        return 1 / (1 - self.dropout_rate)

    @property
    def shares_bias(self) -> bool:
        """Whether a head of all batch entries has the same tiles of a bias.

        Then their blocks follow each other, and find these in the L2 cache.
        """
        return self.bias == (False, True, True, True)

    def own_and_other(self, pairs: Sequence[Any]) -> tuple[Any, Any]:
        """What is of blocks' own places and of the others, from [B, N, T, S]."""
        *_, queries, keys = pairs
        return (keys, queries) if self.owns_keys else (queries, keys)

    @property
    def bias_tiles(self) -> bool:
        """Whether the bias has numbers of pairs."""
        return self.bias is not None and self.bias[2] and self.bias[3]

    @property
    def reads_bias(self) -> bool:
        """Whether tiles have numbers of the bias that others have not."""
        return self.bias is not None and self.own_and_other(self.bias)[1]

    @property
    def group(self) -> int:
        """Heads of queries for each of keys."""
        return self.heads // self.kv_heads

    @property
    def owners(self) -> tuple[int, int, int]:
        """Heads, places and places of a warpgroup of what blocks own."""
        if self.owns_keys:
            return self.kv_heads, self.keys, self.block_n
        return self.heads, self.queries, self.block_m

    @property
    def owned(self) -> int:
        """Places of a block."""
        return self.owners[2] * self.warpgroups

    @property
    def blocks(self) -> int:
        """Blocks of a head."""
        return -(-self.owners[1] // self.owned)

    @property
    def grid(self) -> tuple[int]:
        return (self.batch * self.owners[0] * self.blocks,)

    @property
    def tile(self) -> int:
        """Places of a tile that is read."""
        return self.block_m if self.owns_keys else self.block_n

    @property
    def tiles(self) -> int:
        """Tiles of a head."""
        return -(-(self.queries if self.owns_keys else self.keys) // self.tile)

    @property
    def shape(self) -> tuple[int, int]:
        """Of a tile of logits."""
        shape = self.block_m, self.block_n
        return shape[::-1] if self.owns_keys else shape

    @property
    def padded_queries(self) -> int:
        """Queries, as far as blocks reach."""
        each = self.block_m if self.owns_keys else self.owned
        return -(-self.queries // each) * each

    @property
    def padded_keys(self) -> int:
        """Keys, as far as blocks reach."""
        each = self.owned if self.owns_keys else self.block_n
        return -(-self.keys // each) * each

    def kernel(self, kernel: Any, out_type: Any, scratch: dict[str, Any]) -> Any:
        """The function that runs a kernel, `Kernel`, on arrays."""
        plgpu = _compat.mosaic_gpu()

        def body(*refs: Any, **scratch: Any) -> None:
            kernel(self, refs, scratch).run()

        body.__name__ = kernel.name
        return plgpu.kernel(
            body,
            out_type=out_type,
            scratch_types=scratch,
            grid=self.grid,
            grid_names=("block",),
            num_threads=self.warpgroups + 1,
            thread_name="warpgroup",
            compiler_params=plgpu.CompilerParams(
                approx_math=True,
                lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
            ),
        )


def divided(n: Any, size: int) -> jax.Array:
    """`n` // `size` of what is not negative."""
    return lax.div(n, jnp.int32(size))


def divided_up(n: Any, size: int) -> jax.Array:
    return lax.div(n + jnp.int32(size - 1), jnp.int32(size))


@dataclasses.dataclass(frozen=True)
class Range:
    """The tiles that a block reads: from `begin` to `end`, at least one.

    Those from `whole` to `whole_end` are seen in full by all its queries.
    """

    begin: Any
    whole: Any
    whole_end: Any
    end: Any


def tile_range(
    first: Any,
    last: Any,
    before: int | None,
    after: int | None,
    limit: Any,
    block: int,
    tiles: int,
) -> Range:
    """The tiles of places that those from first to last meet.

    A place meets those up to `before` places before it and `after` after it (None: any
    number), below `limit`.
    """
    begin = whole = jnp.int32(0)
    end, whole_end = divided_up(limit, block), divided(limit, block)
    if after is not None:
        most = jnp.maximum(jnp.minimum(last + jnp.int32(after + 1), limit), 0)
        end = divided_up(most, block)
        most = jnp.maximum(jnp.minimum(first + jnp.int32(after + 1), limit), 0)
        whole_end = divided(most, block)
    if before is not None:
        begin = divided(jnp.maximum(first - jnp.int32(before), 0), block)
        whole = divided_up(jnp.maximum(last - jnp.int32(before), 0), block)
    begin = jnp.minimum(begin, jnp.int32(tiles - 1))
    end = jnp.maximum(end, begin + 1)
    whole = jnp.minimum(jnp.maximum(whole, begin), end)
    whole_end = jnp.maximum(jnp.minimum(whole_end, end), whole)
    return Range(begin, whole, whole_end, end)


def copied(places: int, block: int) -> int:
    """How many places an array must have for copies of blocks: they may reach beyond.

    But its rows are taken by eight.
    """
    return max(block, -(-places // 8) * 8)
