"""An implementation that differentiation cannot see into, as a GPU kernel is one.

Each function is an interpreted Pallas kernel over the whole array, and refuses to be
differentiated by an error of its own (pallas_call has a jvp rule for simple kernels).
The arithmetic inside is `_rows.xla`'s: what is tested with it is how the rules,
the transforms and the kernels go together.
"""

import functools
import os

import jax
from jax.experimental import pallas as pl

from jaxsoftmax._rows import xla_loss
from jaxsoftmax._rows.call import ROWS

GPU_KERNELS = (
    ["mosaic_gpu", "triton"] if "cuda" in os.environ.get("JAX_PLATFORMS", "") else []
)
# What differentiation cannot see into.
KERNELS = ["opaque", *GPU_KERNELS]


def _opaque(function):
    """`function(*arrays, **static)` as a kernel call without derivatives."""

    @functools.wraps(function)
    def call(*args, **static):
        places = [i for i, a in enumerate(args) if a is not None]

        def whole(*arrays):
            full = [None] * len(args)
            for i, a in zip(places, arrays, strict=True):
                full[i] = a
            return function(*full, **static)

        @jax.custom_jvp
        def kernel_call(*arrays):
            shapes = jax.eval_shape(whole, *arrays)
            if any(a.size == 0 or a.ndim == 0 for a in arrays):
                return whole(*arrays)  # no block to run a kernel on
            leaves, tree = jax.tree.flatten(shapes)
            out_shape = [jax.ShapeDtypeStruct(s.shape, s.dtype) for s in leaves]

            def body(*refs):
                ins, outs = refs[: len(arrays)], refs[len(arrays) :]
                results = jax.tree.leaves(whole(*(ref[...] for ref in ins)))
                for ref, result in zip(outs, results, strict=True):
                    ref[...] = result

            call = pl.pallas_call(
                body, out_shape=out_shape, interpret=True, name=function.__name__
            )
            return jax.tree.unflatten(tree, call(*arrays))

        @kernel_call.defjvp
        def jvp(primals, tangents):
            raise AssertionError(f"{function.__name__}: differentiated a kernel")

        return kernel_call(*(args[i] for i in places))

    return call


def refusal(call, device):
    return None


def run(call, arrays):
    def function(*arrays):
        return xla_loss.run(call, arrays, definition=True)

    function.__name__ = call.op
    return _opaque(function)(*arrays)


def register():
    """Makes ``implementation="opaque"`` known."""
    ROWS.implementations["opaque"] = __name__
