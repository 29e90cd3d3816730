"""How the primitives of this package are made, given their rules, and vmapped."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax.interpreters import mlir

from jaxsoftmax._compat import primitive as compat
from jaxsoftmax._compat import trace
from jaxsoftmax._compat.primitive import lower_function


def new_primitive(
    name: str,
    evaluate: Callable[..., list[jax.Array]],
    *,
    definition: Callable[..., list[jax.Array]] | None = None,
    lower: Callable[..., Any] | None = None,
) -> Any:
    """Makes a primitive with many results that runs and lowers as `evaluate` does.

    Args:
      name: What the primitive is called in a jaxpr.
      evaluate: ``(spec, *arrays) -> list of arrays``; `spec`, the primitive's only
        parameter, is hashable.
      definition: The same in operations that jax can differentiate, for
        `jax.experimental.jet`. Default: `evaluate`.
      lower: Lowers it in another way, called once for each platform that a program is
        lowered for: ``(context, *operands, spec, platform) -> results``, made with
        `lower_function`. Types are still those of `evaluate`.
    """
    primitive = compat.Primitive(name)
    primitive.multiple_results = True

    def bind(spec: Any, *arrays: jax.Array) -> list[jax.Array]:
        if not any(isinstance(x, jax.core.Tracer) for x in arrays):
            # Not traced: jax.disable_jit, or jax_debug_nans, which runs what gave a
            # NaN again without jit. To bind would come back here.
            return evaluate(spec, *arrays)
        return primitive.bind(*arrays, spec=spec)

    evaluated = jax.jit(evaluate, static_argnums=0)
    compiled = evaluated if lower is None else jax.jit(bind, static_argnums=0)

    def run(*arrays: jax.Array, spec: Any) -> list[jax.Array]:
        return compiled(spec, *arrays)

    def abstract_eval(*avals: Any, spec: Any) -> Sequence[Any]:
        # Tracing, instead of computing shapes by hand, also carries what shard_map and
        # sharding in types add to an abstract value.
        return evaluated.trace(spec, *avals).jaxpr.out_avals

    def lower_evaluated(context: Any, *operands: Any, spec: Any) -> Any:
        return lower_function(context, functools.partial(evaluate, spec), operands)

    primitive.def_impl(run)
    primitive.def_abstract_eval(abstract_eval)
    if lower is None:
        mlir.register_lowering(primitive, lower_evaluated)
    else:
        compat.register_by_platform(primitive, lower)
    compat.register_interpreters(primitive, definition or evaluate)
    return primitive


def set_rules(
    primitive: Any,
    *,
    batch: Callable[..., Any],
    jvp: Callable[..., Any] | None = None,
    transpose: Callable[..., Any] | None = None,
    without: Callable[[Any, Sequence[bool]], Any] | None = None,
) -> None:
    """Registers the batching rule and, where there are, derivative and transpose.

    `without` is as in `compat.register_unused_results`.
    """
    compat.BATCH_RULES[primitive] = batch
    if jvp is not None:
        compat.JVP_RULES[primitive] = jvp
    if transpose is not None:
        compat.TRANSPOSE_RULES[primitive] = transpose
    if without is not None:
        compat.register_unused_results(primitive, without)


# --- calls under several vmaps --------------------------------------------------------

Arrays = list[jax.Array]
Axes = Sequence[int | None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vmapped:
    """A primitive's parameter that keeps the vmaps around a call.

    Attributes:
      batch_axes: An entry per vmap, innermost first: the axis that each array is mapped
        over, or None.
      batch_places: The axis that the results are mapped over.
    """

    batch_axes: tuple[tuple[int | None, ...], ...] = ()
    batch_places: tuple[int, ...] = ()

    def under_vmap(self, axes: Axes, place: int = 0) -> Self:
        """The same under one more vmap."""
        return dataclasses.replace(
            self,
            batch_axes=(*self.batch_axes, tuple(axes)),
            batch_places=(*self.batch_places, place),
        )

    def vmapped(self, f: Callable[..., Any]) -> Callable[..., Any]:
        """A function of the arrays of one call, under all vmaps."""
        for axes, place in zip(self.batch_axes, self.batch_places, strict=True):
            f = jax.vmap(f, in_axes=axes, out_axes=place)
        return f

    def unmapped(
        self, arrays: Sequence[Any]
    ) -> tuple[list[tuple[int, ...]], list[Any]]:
        """The arrays' shapes in one of the calls, and the size of each vmap."""
        shapes = [tuple(x.shape) for x in arrays]
        sizes: list[Any] = []
        # The outermost vmap is the last, and its axis is taken off first.
        for axes in reversed(self.batch_axes):
            pairs = list(zip(shapes, axes, strict=True))
            size = next(shape[axis] for shape, axis in pairs if axis is not None)
            sizes.insert(0, size)
            shapes = [
                shape if axis is None else (*shape[:axis], *shape[axis + 1 :])
                for shape, axis in pairs
            ]
        return shapes, sizes


def mapped_at(
    place: int, some: Sequence[Any], some_axes: Axes, arrays: Sequence[Any], axes: Axes
) -> Arrays:
    """`some` of the arrays of a call, all mapped over the axis `place`."""
    size, mesh_axis = batch_size(arrays, axes), trace.mapped_mesh_axis(arrays, axes)

    def mapped(x: Any, axis: int | None) -> Any:
        if axis == place:
            return x
        x = trace.batch_axis_at_front(x, axis, size, mesh_axis)
        return jnp.moveaxis(x, 0, place) if place else x

    return [mapped(x, axis) for x, axis in zip(some, some_axes, strict=True)]


def batch_size(arrays: Sequence[Any], axes: Axes) -> int:
    """The size of the axis that some arrays are mapped over."""
    pairs = zip(arrays, axes, strict=True)
    return next(x.shape[axis] for x, axis in pairs if axis is not None)


# --- calls as plain operations, for what knows jax's own primitives only -------------

# Part of what jax.jit knows a trace by: within the context functions are traced anew.
_requested = jax.make_user_context(False)


def standard_primitives_needed() -> bool:
    """Whether what is traced now must consist of jax's own primitives."""
    return bool(_requested.value) or compat.inside_kernel()


@contextlib.contextmanager
def standard_primitives() -> Iterator[None]:
    """Within this context the functions of this package are plain jax.numpy operations.

    Elsewhere each call is one equation of a jaxpr, with a primitive of this package,
    which says nothing to an interpreter of jaxprs that does not know it: a counter of
    operations, `jax.experimental.roofline`, one of your own. Trace the function that it
    is to read within this context::

        with standard_primitives():
            jaxpr = jax.make_jaxpr(f)(x)

    `jax.experimental.jet`, `checkify` and the bodies of Pallas kernels need no context.

    No kernel runs then, and derivatives are those that jax takes of the operations:
    they keep more, and lose digits where the rules of this package do not.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxsoftmax import softmax, standard_primitives
      >>> def primitives(f, x):
      ...     call = jax.make_jaxpr(f)(x).eqns[0].params["jaxpr"]
      ...     return [eqn.primitive.name for eqn in call.eqns]
      >>> primitives(softmax, jnp.zeros(3))
      ['lifted_call']
      >>> with standard_primitives():
      ...     print("exp" in primitives(softmax, jnp.zeros(3)))
      True
    """
    with _requested(True):
        yield
