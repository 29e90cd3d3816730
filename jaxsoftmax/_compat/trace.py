"""What a function meets while it is traced: zeros, mesh axes, vmapped axes, bits.

Checked with jax 0.10.0, 0.10.2, 0.11.2 and 0.12.0.1; a function whose body depends on
the version says so.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src import config
from jax.interpreters import ad, batching

GPU_PLATFORMS = ("cuda", "rocm")

# A cotangent or tangent that is zero everywhere and was never materialised.
SymbolicZero: Any = ad.Zero


def symbolic_zero(x: jax.Array) -> Any:
    """The tangent of a result that has none."""
    return ad.Zero(jax.typeof(x).to_tangent_aval())


# Turns one into an array; leaves an array alone.
materialize: Callable[[Any], jax.Array] = ad.instantiate_zeros
# Whether a transpose rule is asked for the cotangent of an operand.
is_linear_operand: Callable[[Any], bool] = ad.is_undefined_primal


def unwritten(shape: Sequence[int], dtype: Any, *like: Any) -> jax.Array:
    """An array of any values, to be written by a loop: on a GPU it costs nothing.

    Inside of `jax.shard_map` it varies over the axes of the mesh that any of `like`
    varies over, as what the loop carries must.
    """
    return _as_varying(lax.empty(tuple(shape), dtype), like)


def zeros(shape: Sequence[int], dtype: Any, *like: Any) -> jax.Array:
    """As `unwritten`, but of zeros."""
    return _as_varying(jnp.zeros(tuple(shape), dtype), like)


def varying_alike(arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """`arrays`, inside of `jax.shard_map` each varying where any of them does."""
    return [_as_varying(x, arrays) for x in arrays]


def _as_varying(x: jax.Array, like: Sequence[Any]) -> jax.Array:
    axes = frozenset[Any]().union(*(_varying(a) for a in jax.tree.leaves(like)))
    missing = tuple(axes - _varying(x))
    return lax.pcast(x, missing, to="varying") if missing else x


def _varying(x: Any) -> frozenset[Any]:
    """The manual axes of a mesh that the type of `x` says it varies over."""
    kind = getattr(jax.typeof(x), "manual_axis_type", None)
    if kind is None:  # before 0.10.2
        return getattr(jax.typeof(x), "vma", frozenset())
    return kind.varying


# (x, axis, size, mesh axis): the mapped axis at the front; or, where that is None, x so
# many times, spread over an axis of the mesh, or None.
batch_axis_at_front: Callable[..., jax.Array] = batching.bdim_at_front


def mapped_mesh_axis(arrays: Sequence[Any], axes: Sequence[int | None]) -> Any:
    """The explicit mesh axis that the types spread the mapped axis over, or None."""
    specs = [jax.typeof(x).sharding.spec for x in arrays]
    entries = [
        spec[axis]
        for spec, axis in zip(specs, axes, strict=True)
        if axis is not None and axis < len(spec)
    ]
    return next((entry for entry in entries if entry is not None), None)


def mesh_of(types: Iterable[Any]) -> Any:
    """The mesh that types of arrays name, or None."""
    meshes = [each.sharding.mesh for each in types]
    return next((mesh for mesh in meshes if not mesh.empty), None)


@contextlib.contextmanager
def one_device() -> Iterator[None]:
    """Traces as if there were no mesh, but keeps its abstract device.

    Inside `jax.shard_map` a Pallas kernel would otherwise have to say how its results
    vary over the mesh (``check_vma``, private in all versions; jax itself turns the
    check off within such kernels: https://github.com/jax-ml/jax/pull/36180).
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh), config._check_vma(False):
        yield


def x64_if(needed: bool) -> contextlib.AbstractContextManager[Any]:
    """Enables 64 bits if they are needed, and else leaves that as it is."""
    return jax.enable_x64(True) if needed else contextlib.nullcontext()


# What has the entries of its first operand, in other places.
_MOVEMENTS = frozenset(
    [
        "reshape",
        "squeeze",
        "transpose",
        "broadcast_in_dim",
        "slice",
        "dynamic_slice",
        "rev",
        "sharding_constraint",
    ]
)


def dtype_before_cast(x: Any) -> np.dtype | None:
    """The dtype that the entries of a traced array had before a cast to its own.

    None where there was no cast, or none is seen: where it is outside of a function
    that is traced by itself, as by `jax.jit`. Tracers have the equation that they are
    the result of, which is private in all versions.
    """
    for name in ("primal", "val"):  # of a transformation that it is traced for
        inner = getattr(x, name, None)
        if isinstance(inner, jax.core.Tracer):
            return dtype_before_cast(inner)
    equation = getattr(x, "parent", None)
    operands = getattr(equation, "in_tracers", ())
    if equation is None or not operands:
        return None
    if equation.primitive.name == "convert_element_type":
        return np.dtype(operands[0].dtype)
    moved = equation.primitive.name in _MOVEMENTS
    return dtype_before_cast(operands[0]) if moved else None


def has_platform(platform: str) -> bool:
    """Whether this process has a device of the platform."""
    try:
        return bool(jax.local_devices(backend=platform))
    except RuntimeError:
        return False


def compile_only_device(context: Any, platform: str) -> Any:
    """The device that is not there, but lowered for; None where there is one, or none.

    `jax.experimental.topologies` makes such devices, and a program is for them where
    the shardings of its arguments say so. A lowering rule then finds their client in
    its `context`, which is private in all versions: it has devices, none of them local.
    """
    client = context.module_context.backend
    if client is None or client.local_devices():
        return None
    name = getattr(client, "_raw_platform", client.platform)
    return client.devices()[0] if name in _names_of(platform) else None


def abstract_device_kind(platform: str) -> str | None:
    """What the device of the abstract mesh in use calls itself, if it has one.

    Before jax 0.10.2 it does not say of which platform it is, and is ignored.
    """
    device: Any = jax.sharding.get_abstract_mesh().abstract_device
    if device is None or getattr(device, "platform", None) not in _names_of(platform):
        return None
    return device.device_kind


def _names_of(platform: str) -> tuple[str, ...]:
    """Its name, and ``"gpu"``, which stands for both kinds of GPU."""
    return (platform, "gpu") if platform in GPU_PLATFORMS else (platform,)


def threefry(key: jax.Array, high: jax.Array, low: jax.Array) -> jax.Array:
    """The 32 bits that `jax.random.bits` has at a place of 64 bits, high and low.

    Where jax_threefry_partitionable is on, as by default.
    """
    from jax.extend import random as jex_random

    first, second = (jnp.broadcast_to(key[i], high.shape) for i in range(2))
    one, other = jex_random.threefry2x32_p.bind(first, second, high, low)
    return one ^ other


def run_over_first(
    f: Callable[..., Any], x: jax.Array, *others: Any
) -> tuple[jax.Array, ...]:
    """Runs a kernel that writes a result where its first argument is.

    XLA copies `x` first where it is used again. A program that keeps nothing of it has
    one array less: the kernel's result is one with its operand. `f` is ``(reference to
    x, *others) -> the other results``; what is then in the place of `x` comes first.
    """
    ref = jax.new_ref(x)
    results = f(ref, *others)
    return jax.freeze(ref), *results
