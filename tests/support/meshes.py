"""Meshes of simulated devices, and programs for them."""

import jax
from jax.sharding import AxisType

KINDS = {
    "auto": (AxisType.Auto, AxisType.Auto),
    "explicit": (AxisType.Explicit, AxisType.Explicit),
    "mixed": (AxisType.Explicit, AxisType.Auto),
}


def make_mesh(kind="auto", sizes=(4, 2), names=("a", "b")):
    return jax.make_mesh(sizes, names, axis_types=KINDS[kind][: len(sizes)])


def compiled(mesh, f, *args, jit=jax.jit):
    with jax.set_mesh(mesh):
        return jit(f).lower(*args).compile()


def run(mesh, program, *args):
    with jax.set_mesh(mesh):
        return program(*args)
