"""What blocks of a cluster send each other: for Pallas Mosaic GPU kernels."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxsoftmax._compat import mosaic_gpu as _compat
from jaxsoftmax._compat import mosaic_gpu_ptx as ptx


def _expecting(nbytes: int) -> str:
    """Has thread ``first`` make the barrier at $0, which expects so many bytes."""
    return (
        ".reg .pred first;\n.reg .b32 thread;\n"
        "mov.u32 thread, %tid.x;\nsetp.eq.u32 first, thread, 0;\n"
        + ptx.expecting("$0", nbytes)
    )


# Whoever sends waits for it. Relaxed: only the barrier that was made must be seen.
_BEGUN = "barrier.cluster.arrive.relaxed.aligned;\n"
_ALL_HAVE_BEGUN = "barrier.cluster.wait.acquire.aligned;\n"
# Until the bytes that the barrier at $0 expects are there.
_AWAITED = ptx.awaited("$0", "done", "cluster")


class ClusterSlots:
    """Numbers of all blocks of a cluster, in the shared memory of each.

    A block sends its own to all. A store and its arrival are one operation (st.async),
    which PTX orders over the cluster: what has arrived is whole. Each block waits for
    all before it leaves, so that none sends to a block that is gone; and it waits for
    all to have begun before it sends. All that once.

    Mosaic's own barrier of a cluster orders memory for a block alone, by the letter of
    PTX. An arrival that releases at the scope of the cluster compiles to a fence for
    the whole GPU (MEMBAR.ALL.GPU, with CUDA 12.9), which st.async does without.

    Args:
      refs: The references that `scratch` is for.
      blocks: Blocks of the cluster.
      neutral: A number for each row of `slots`, for places that no block has.
    """

    def __init__(
        self, refs: Sequence[Any], blocks: int, neutral: Sequence[float]
    ) -> None:
        self.barrier, self.slots = refs
        self.blocks = blocks
        self.places = self.scratch(blocks, len(neutral))[1].shape[1]
        begin = _expecting(4 * blocks * len(neutral))
        for i, number in enumerate(neutral):
            bits = np.float32(number).view(np.uint32)
            for place in range(blocks, self.places):
                at = 4 * (i * self.places + place)
                begin += f"@first st.shared::cta.b32 [$1+{at}], {bits};\n"
        ptx.emit(begin + _BEGUN, refs)

    @staticmethod
    def scratch(blocks: int, count: int) -> list[Any]:
        """The barrier and `count` numbers of each block; a power of two of places."""
        plgpu = _compat.mosaic_gpu()
        places = 1 << (blocks - 1).bit_length()
        return [
            plgpu.SMEM((2,), np.dtype(np.int32)),
            plgpu.SMEM((count, places), np.dtype(np.float32)),
        ]

    def exchange(self, numbers: Sequence[jax.Array]) -> None:
        """Sends scalars, the same in all threads; waits for those of all blocks."""
        send = (
            ".reg .pred sends, done;\n.reg .b32 block, place, barrier;\n"
            f"mov.u32 block, %tid.x;\nsetp.lt.u32 sends, block, {self.blocks};\n"
            "mov.u32 place, %cluster_ctarank;\nmad.lo.u32 place, place, 4, $1;\n"
            + _ALL_HAVE_BEGUN
            + "@sends mapa.shared::cluster.u32 place, place, block;\n"
            "@sends mapa.shared::cluster.u32 barrier, $0, block;\n"
        )
        for i in range(len(numbers)):
            send += (
                "@sends st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32 "
                f"[place+{4 * i * self.places}], ${i + 2}, [barrier];\n"
            )
        ptx.emit(send + _AWAITED, [self.barrier, self.slots], numbers)


class ClusterVectors:
    """Numbers of all blocks of a cluster, one of each per column: see `ClusterSlots`.

    Args:
      refs: The references that `scratch` is for.
      blocks: Blocks of the cluster.
    """

    def __init__(self, refs: Sequence[Any], blocks: int) -> None:
        self.barrier, self.slots = refs
        self.blocks = blocks
        self.count, _, self.width = self.slots.shape
        begin = _expecting(4 * self.count * self.width * blocks) + _BEGUN
        ptx.emit(begin, [self.barrier])

    @staticmethod
    def scratch(blocks: int, count: int, width: int) -> list[Any]:
        """The barrier, and `count` numbers per column of each block."""
        plgpu = _compat.mosaic_gpu()
        return [
            plgpu.SMEM((2,), np.dtype(np.int32)),
            plgpu.SMEM((count, blocks, width), np.dtype(np.float32)),
        ]

    def exchange(self, numbers: Any) -> None:
        """Sends what is in shared memory, (count, width); waits for that of all blocks.

        Written by the first warpgroup, whose threads have each seen all of it.
        """
        vectors = self.count * self.width // 4
        send = (
            ".reg .pred sends, done;\n.reg .f32 a, b, c, d;\n"
            ".reg .b32 thread, index, block, vector, number, from, to, barrier;\n"
            "mov.u32 thread, %tid.x;\n" + _ALL_HAVE_BEGUN
        )
        for start in range(0, vectors * self.blocks, 128):
            send += (
                f"add.u32 index, thread, {start};\nsetp.lt.u32 sends, thread, 128;\n"
                f"setp.lt.and.u32 sends, index, {vectors * self.blocks}, sends;\n"
                f"div.u32 block, index, {vectors};\nrem.u32 vector, index, {vectors};\n"
                f"div.u32 number, vector, {self.width // 4};\n"
                "mad.lo.u32 from, vector, 16, $2;\nmov.u32 to, %cluster_ctarank;\n"
                f"mad.lo.u32 to, number, {self.blocks - 1}, to;\n"
                f"mad.lo.u32 to, to, {4 * self.width}, $1;\n"
                "mad.lo.u32 to, vector, 16, to;\n"
                "@sends ld.shared::cta.v4.f32 {a, b, c, d}, [from];\n"
                "@sends mapa.shared::cluster.u32 to, to, block;\n"
                "@sends mapa.shared::cluster.u32 barrier, $0, block;\n"
                "@sends st.async.weak.shared::cluster.mbarrier::complete_tx::bytes"
                ".v4.f32 [to], {a, b, c, d}, [barrier];\n"
            )
        ptx.emit(send + _AWAITED, [self.barrier, self.slots, numbers])
