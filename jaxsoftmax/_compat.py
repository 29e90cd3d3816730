"""The one home of everything in jax that is version-dependent or not fully public.

Each name says what it is used for and for which versions it was checked. Checked with
jax 0.10.0, 0.10.2, 0.11.2 and 0.12.0.1.

`jax.extend.core` and `jax.interpreters` are the documented places for extensions of
jax, with weaker promises of stability than `jax.numpy`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core as jex_core
from jax.interpreters import ad, batching, mlir

# A cotangent or tangent that is zero everywhere and was never materialised.
SymbolicZero: Any = ad.Zero


def new_primitive(name: str, evaluate: Callable[..., list[jax.Array]]) -> Any:
    """Makes a primitive with many results that runs and lowers as `evaluate` does.

    Args:
      name: What the primitive is called in a jaxpr.
      evaluate: ``(spec, *arrays) -> list of arrays``; `spec`, the primitive's only
        parameter, is hashable.
    """
    primitive = jex_core.Primitive(name)
    primitive.multiple_results = True
    compiled = jax.jit(evaluate, static_argnums=0)

    def run(*arrays: jax.Array, spec: Any) -> list[jax.Array]:
        return compiled(spec, *arrays)

    def abstract_eval(*avals: Any, spec: Any) -> Sequence[Any]:
        # Tracing, instead of computing shapes by hand, also carries what shard_map and
        # sharding in types add to an abstract value.
        return compiled.trace(spec, *avals).jaxpr.out_avals

    def lower(*arrays: jax.Array, spec: Any) -> list[jax.Array]:
        return evaluate(spec, *arrays)

    primitive.def_impl(run)
    primitive.def_abstract_eval(abstract_eval)
    mlir.register_lowering(primitive, mlir.lower_fun(lower, multiple_results=True))
    return primitive


def set_rules(
    primitive: Any,
    *,
    jvp: Callable[..., Any],
    batch: Callable[..., Any],
    transpose: Callable[..., Any] | None = None,
) -> None:
    """Registers derivative and batching rules and, of a linear one, the transpose."""
    ad.primitive_jvps[primitive] = jvp
    if transpose is not None:
        ad.primitive_transposes[primitive] = transpose
    batching.primitive_batchers[primitive] = batch


def is_linear_operand(x: Any) -> bool:
    """True for an operand whose cotangent a transpose rule is asked for."""
    return ad.is_undefined_primal(x)


def materialize(x: Any) -> jax.Array:
    """Turns a symbolic zero into an array; leaves an array alone."""
    return ad.instantiate_zeros(x)


def zero_tangent(primal: jax.Array) -> Any:
    """The symbolic zero tangent of `primal`."""
    return SymbolicZero.from_primal_value(primal)


def move_batch_axis_to_front(x: jax.Array, axis: int | None, size: int) -> jax.Array:
    """Moves the mapped axis to the front; repeats an unmapped array `size` times."""
    return batching.bdim_at_front(x, axis, size)
