"""What jax keeps by primitive: rules for derivatives, vmap, lowering, jet and checkify.

Checked with jax 0.10.0, 0.10.2, 0.11.2 and 0.12.0.1, which are alike in all of this.
`jax.extend.core` has `Primitive` too, but imports Pallas, which takes half as long as
all of jaxsoftmax.
"""

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax._src import ad_checkpoint, checkify
from jax._src.core import Primitive as Primitive
from jax._src.interpreters import partial_eval
from jax.experimental import jet
from jax.interpreters import ad, batching, mlir

from jaxsoftmax._compat.trace import GPU_PLATFORMS

BATCH_RULES: Any = batching.primitive_batchers
JVP_RULES: dict[Any, Callable[..., Any]] = ad.primitive_jvps
TRANSPOSE_RULES: dict[Any, Callable[..., Any]] = ad.primitive_transposes
_JET_RULES: dict[Any, Callable[..., Any]] = jet.jet_rules


def register_interpreters(
    primitive: Any, definition: Callable[..., list[jax.Array]]
) -> None:
    """What `jax.experimental.jet` and `checkify` do where they meet the primitive.

    Both look rules up by primitive, in tables that are private in all versions.
    """

    def jet_rule(primals: Any, series: Any, *, spec: Any) -> Any:
        # Without jit a scan is a loop of Python's: jet has no rule for it.
        with jax.disable_jit():
            return _jet(functools.partial(definition, spec), primals, series)

    _JET_RULES[primitive] = jet_rule
    # NaN is looked for in the results: a definition may have some on the way to them.
    checkify.error_checks[primitive] = functools.partial(
        checkify.nan_error_check, primitive
    )


def register_unused_results(
    primitive: Any, without: Callable[[Any, Sequence[bool]], Any]
) -> None:
    """Leaves out results that nothing uses, where jax looks for such: before lowering.

    Args:
      primitive: One with many results, and without effects.
      without: ``(spec, used) -> spec`` of a call that has the results that are used
        alone, or None where there is none. Some are used.
    """

    def rule(used: Sequence[bool], *live_and_equation: Any) -> tuple[list[bool], Any]:
        equation = live_and_equation[-1]  # from 0.12 on after which inputs are live
        if not any(used):
            return [False] * len(equation.invars), None
        spec = without(equation.params["spec"], used)
        if spec is not None:
            kept = [
                v for v, is_used in zip(equation.outvars, used, strict=True) if is_used
            ]
            params = equation.params | {"spec": spec}
            equation = equation.replace(outvars=kept, params=params)
        return [True] * len(equation.invars), equation

    partial_eval.dce_rules[primitive] = rule


def _jet(f: Callable[..., Any], primals: Sequence[Any], series: Sequence[Any]) -> Any:
    """A rule of jet: the series of ``f(*primals)``.

    Integers have none: rules of jet's own would divide those that it gives them.
    """
    places = [i for i, x in enumerate(primals) if jnp.issubdtype(x.dtype, jnp.floating)]

    def function(*floats: Any) -> Any:
        given = dict(zip(places, floats, strict=True))
        return f(*(given.get(i, x) for i, x in enumerate(primals)))

    moving, terms = ([given[i] for i in places] for given in (primals, series))
    return jet.jet(function, tuple(moving), tuple(terms), factorial_scaled=False)


def _evaluate_plainly(jaxpr: Any, *arrays: Any) -> list[Any]:
    """`jax.core.eval_jaxpr`, and a `jax.custom_jvp` function without its rule."""
    values = dict(zip(jaxpr.invars, arrays, strict=True))

    def value(x: Any) -> Any:
        return x.val if hasattr(x, "val") else values[x]

    for eqn in jaxpr.eqns:
        operands = [value(x) for x in eqn.invars]
        if "call_jaxpr" in eqn.params:
            outs = _evaluate_plainly(eqn.params["call_jaxpr"].jaxpr, *operands)
        else:
            outs = eqn.primitive.bind(*operands, **eqn.params)
            outs = outs if eqn.primitive.multiple_results else [outs]
        values.update(zip(eqn.outvars, outs, strict=True))
    return [value(x) for x in jaxpr.outvars]


def _complete_jet() -> None:
    """Adds rules that jet lacks for what surrounds our primitives.

    It has none for `jax.checkpoint` and `checkpoint_name` (tests/core/
    test_workarounds.py), and raises an UnexpectedTracerError at a `jax.custom_jvp`
    function (https://github.com/jax-ml/jax/issues/30352).
    """

    def checkpoint_rule(primals: Any, series: Any, *, jaxpr: Any, **_: Any) -> Any:
        return _jet(functools.partial(_evaluate_plainly, jaxpr), primals, series)

    if ad_checkpoint.name_p not in _JET_RULES:
        jet.deflinear(ad_checkpoint.name_p)
    _JET_RULES.setdefault(ad_checkpoint.remat_p, checkpoint_rule)


_complete_jet()


def inside_kernel() -> bool:
    """Whether the body of a Pallas kernel is traced, which knows jax's operations only.

    The grid that its primitives ask for is private in all versions.
    """
    core: Any = sys.modules.get("jax._src.pallas.core")
    # Another thread may be importing it: then it is there, but not whole yet.
    axis_frame = getattr(core, "axis_frame", None)
    if axis_frame is None:
        return False
    try:
        axis_frame()
    except AssertionError:
        return False
    return True


def register_by_platform(primitive: Any, lower: Callable[..., Any]) -> None:
    # jax branches on the platform, where there are several, between rules only.
    for platform in GPU_PLATFORMS:
        rule = functools.partial(lower, platform=platform)
        mlir.register_lowering(primitive, rule, platform=platform)

    def elsewhere(context: Any, *operands: Any, spec: Any) -> Any:
        platforms = context.platforms or context.module_context.platforms
        # Under compute_on("device_host") the program's platform may still be a GPU.
        other = [p for p in platforms if p not in GPU_PLATFORMS]
        platform = other[0] if other else "cpu"
        return lower(context, *operands, spec=spec, platform=platform)

    mlir.register_lowering(primitive, elsewhere)


def lower_function(
    context: Any,
    f: Callable[..., list[jax.Array]],
    operands: Sequence[Any],
    *,
    untyped: bool = False,
) -> Any:
    """Traces `f` and emits it in place, so that XLA can fuse it with its neighbours.

    `untyped` gives `f` arrays whose types say nothing about a mesh.
    """
    if untyped:
        avals = [jax.core.ShapedArray(x.shape, x.dtype) for x in context.avals_in]
        context = context.replace(avals_in=avals)

    def emitted(*arrays: jax.Array) -> list[jax.Array]:
        return f(*arrays)

    return mlir.lower_fun(emitted, multiple_results=True)(context, *operands)
