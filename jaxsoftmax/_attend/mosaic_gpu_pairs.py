"""What the Mosaic GPU kernels of attention have of pairs of a query and a key.

A mask is read as bits, a word for each thread and row of a tile. A bias comes in tiles
as keys do: vectors, if it has one number for all that blocks own. If it has one for all
of the others, a block reads a vector once. Both lie transposed where blocks own keys.
What dropout keeps is drawn as such bits, while products run: see `mosaic_gpu_dropout`.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxsoftmax._attend.mosaic_gpu_dropout import advanced, kept_words, largest_kept
from jaxsoftmax._attend.mosaic_gpu_program import Program
from jaxsoftmax._attend.xla import words_of_product
from jaxsoftmax._compat import mosaic_gpu as _compat
from jaxsoftmax._compat import mosaic_gpu_registers as registers


class Pairs:
    """Of one block, a part of its `Kernel`, which says what it owns.

    Attributes:
      p: What the kernel is made for.
      scratch: The references of shared memory and barriers, by name.
      others: Those of arrays, by their names in `OTHERS`.
      pl, plgpu: Pallas, and its part for Mosaic GPU.
      rows: How numbers of own places lie in registers.
      warpgroup: Which of the block.
      batch, head: What the block is of; of a group the first head of queries.
      start, own: The first place of the block, and of the warpgroup.
      dropout_key: Two words, in registers.
    """

    p: Program
    scratch: dict[str, Any]
    others: dict[str, Any]
    pl: Any
    plgpu: Any
    rows: Any
    warpgroup: Any
    batch: Any
    head: Any
    start: Any
    own: Any
    dropout_key: Any

    @property
    def has_pairs(self) -> bool:
        """Whether tiles have numbers or bits of their own, which take registers."""
        p = self.p
        return p.mask is not None or p.bias is not None or p.dropout_rate > 0

    def tile_of_bias(self, member: Any, tile: Any, name: str = "bias") -> Any:
        """Where a tile of the bias is, as `load_tiles` asks; of each warpgroup."""
        p, ds = self.p, self.pl.ds
        lead = self._lead(p.bias, self.head + member)
        (_, _, each), n = p.owners, p.tile
        ref, others = self.others[name], ds(tile * n, n)
        if not p.bias_tiles:
            return ref.at[*lead, others]
        return [
            ref.at[*lead, ds(self.start + w * each, each), others]
            for w in range(p.warpgroups)
        ]

    def _lead(self, full: Any, head: Any) -> tuple[Any, Any]:
        """The batch entry and the head of an array that may have one for all."""
        return self.batch if full[0] else 0, head if full[1] else 0

    def mask_words(self, head: Any, tile: Any) -> Any:
        """The bits of a tile, as `OTHERS` has them; None if there is no mask."""
        p = self.p
        if p.mask is None:
            return None
        own, other = p.own_and_other(p.mask)
        rows = self.pl.ds(self.own if own else 0, p.owners[2])
        at = (*self._lead(p.mask, head), tile if other else 0, rows)
        return _compat.mosaic_load(self.others["mask"].at[at], registers.words_layout())

    def own_bias(self, head: Any, name: str = "bias") -> Any:
        """That of a warpgroup's own places, where it is that of all others; or None."""
        p = self.p
        if p.bias is None or p.reads_bias:
            return None
        at = (*self._lead(p.bias, head), self.pl.ds(self.own, p.owners[2]))
        return _compat.mosaic_load(self.others[name].at[at], self.rows)

    def of_bias(
        self, use: Callable[[Any], Any], slot: Any, own: Any, name: str = "bias"
    ) -> Any:
        """What a function makes of that of a tile, in float32.

        Args:
          use: The function.
          slot: Where in shared memory the tile has its own.
          own: What `own_bias` gave.
          name: Of the bias, or of its tangent.
        """
        p, layout = self.p, self.plgpu.Layout.WGMMA
        if own is not None:
            return use(lax.broadcast_in_dim(own, p.shape, [0]))
        ready, free, memory = (
            self.scratch[f"{name}_{what}"].at[slot]
            for what in ("ready", "free", "smem")
        )
        self.plgpu.barrier_wait(ready)
        if p.bias_tiles:
            memory = memory.at[self.warpgroup]
            bias = _compat.mosaic_load(memory, layout, optimized=True)
            self.plgpu.barrier_arrive(free)
            return use(bias.astype(jnp.float32))
        numbers = _compat.mosaic_load(memory, layout.reduce(0))
        found = use(lax.broadcast_in_dim(numbers, p.shape, [1]))
        # Not before, so that it need not be in registers all at once.
        self.plgpu.barrier_arrive(free)
        return found

    def kept(self, head: Any, query: Any, key: Any) -> Any:
        """The words of what dropout keeps of a tile, or None if that is everything.

        Args:
          head: Of the queries.
          query: The place of the first.
          key: That of the first key.
        """
        p, axis = self.p, int(self.p.owns_keys)
        if not p.dropout_rate:
            return None
        per_entry, per_head = p.dropout_dims
        lead = self.batch if per_entry else jnp.int32(0)
        lead = lead * p.heads + head if per_head else lead
        queries, keys = (
            (
                self.plgpu.broadcasted_iota(
                    jnp.int32, (p.shape[0], 8), k, layout=self.plgpu.Layout.WGMMA
                )
                + start
            ).astype(jnp.uint32)
            for k, start in ((axis, lead * p.queries + query), (1 - axis, key))
        )
        count = (p.batch if per_entry else 1) * (p.heads if per_head else 1)
        if count * p.queries * p.keys <= 2**32:
            place = [queries * np.uint32(p.keys)]
        else:
            place = [*words_of_product(queries, p.keys)][::-1]
        return kept_words(
            advanced(place, keys),
            8 * (p.keys if p.owns_keys else 1),
            [*self.dropout_key, largest_kept(p.dropout_rate)],
            p.shape[1],
        )

    def dropped(self, tile: Any, kept: Any) -> Any:
        """A tile with 0 for what is not kept."""
        if kept is None:
            return tile
        return registers.where_bits(kept, tile, 0.0)
