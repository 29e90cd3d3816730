"""Every derivative mode for a function that declares its reverse rule alone.

`jax.custom_vjp` keeps the backward we want but refuses ``jvp``, ``jacfwd``,
``hessian`` and ``linearize``. `forward_mode` lifts that with two primitives.
``lifted_call`` stands for the function; its derivative rule runs the custom rule's
forward and gives as tangent a ``linear_map``, which carries the pushforward and, as its
transpose, the pullback that the custom rule declared. All of these may be opaque to
differentiation (a GPU kernel); definitions of the pushforward and the pullback in plain
jax.numpy are what derivatives of derivatives are taken of.

`jax.custom_jvp` would do for the function, were it not that partial evaluation drops
its rule inside ``scan`` and ``cond``: a second derivative there would then go into the
kernel.
"""

import dataclasses
import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxsoftmax._compat import trace
from jaxsoftmax._core import primitive
from jaxsoftmax._core.primitive import (
    Arrays,
    Axes,
    Vmapped,
    mapped_at,
)


@dataclasses.dataclass(frozen=True)
class _Rules:
    """A function's forward, and its derivatives, as `forward_mode` takes them.

    Attributes:
      forward: The result and the residuals.
      push, pull: The pushforward and the pullback; may be opaque to differentiation.
      push_definition, pull_definition: The same in plain jax.numpy.
      narrow: The config for the arguments that have a tangent.
      without: The config for the results that are used.
      has_aux: Whether the result is a pair, whose second has no derivative.
      one_rank: Whether all arguments and results have one rank.
    """

    forward: Callable[..., Any]
    push: Callable[..., Any]
    pull: Callable[..., Any]
    push_definition: Callable[..., Any]
    pull_definition: Callable[..., Any]
    narrow: Callable[[Any, tuple[int, ...]], Any]
    without: Callable[[Any, Sequence[bool]], Any]
    has_aux: bool
    one_rank: bool

    def place(self, axes: Axes) -> int:
        """The axis that the results of a vmap are mapped over, given its arguments'.

        Where the first has it, if all have that many: nothing is transposed then.
        """
        return next(a for a in axes if a is not None) if self.one_rank else 0


@dataclasses.dataclass(frozen=True)
class _Spec(Vmapped):
    """The parameter of the ``linear_map`` primitive: all of a call but its arrays.

    These are the residuals, and the tangents of those arguments that have one; or, in
    the transpose, the cotangents of the results. Tangents and cotangents are mapped
    over the same axis as results.

    Attributes:
      rules, config: What is computed.
      wanted: The places of the arguments that have a tangent.
      count: The number of arguments.
      residual_tree, out_tree: The structures of residuals and results.
      transposed: Whether this is the pullback.
    """

    rules: _Rules
    config: Hashable
    wanted: tuple[int, ...]
    count: int
    residual_tree: Any
    out_tree: Any
    transposed: bool = False

    @property
    def transpose(self) -> "_Spec":
        outs = len(self.wanted) if self.transposed else self.out_tree.num_leaves
        return dataclasses.replace(
            self,
            transposed=not self.transposed,
            batch_axes=tuple(
                (*self.split(axes)[0], *[place] * outs)
                for axes, place in zip(self.batch_axes, self.batch_places, strict=True)
            ),
        )

    def split(self, arrays: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """Separates the residual arrays from the tangent arrays."""
        count = self.residual_tree.num_leaves
        return list(arrays[:count]), list(arrays[count:])

    def function(self, *, definition: bool) -> Callable[..., Arrays]:
        """This call as a function of the residual arrays and the tangent arrays."""
        rules = self.rules
        push = rules.push_definition if definition else rules.push
        pull = rules.pull_definition if definition else rules.pull

        def flat(*arrays: jax.Array) -> Arrays:
            leaves, given = self.split(arrays)
            residuals = jax.tree.unflatten(self.residual_tree, leaves)
            if self.transposed:
                cotangents = jax.tree.unflatten(self.out_tree, given)
                every = pull(self.config, residuals, cotangents)
                return [every[i] for i in self.wanted]
            places = dict(zip(self.wanted, given, strict=True))
            tangents = tuple(places.get(i) for i in range(self.count))
            return self.out_tree.flatten_up_to(push(self.config, residuals, tangents))

        return self.vmapped(flat)


def _evaluate(spec: _Spec, *arrays: jax.Array, definition: bool = False) -> Arrays:
    return spec.function(definition=definition)(*arrays)


_linear_map_p = primitive.new_primitive(
    "linear_map", _evaluate, definition=functools.partial(_evaluate, definition=True)
)


def _jvp(
    primals: Sequence[Any], tangents: Sequence[Any], *, spec: _Spec
) -> tuple[Arrays, list[Any]]:
    """Linear in the tangents: bind again. In the residuals: use the definition."""
    residuals, ts = spec.split(primals)
    residuals_dot, ts_dot = spec.split(tangents)
    outs = _linear_map_p.bind(*primals, spec=spec)
    terms = []
    if any(type(t) is not trace.SymbolicZero for t in ts_dot):
        ts_dot = [trace.materialize(t) for t in ts_dot]
        terms.append(_linear_map_p.bind(*residuals, *ts_dot, spec=spec))
    moving = {
        i: t for i, t in enumerate(residuals_dot) if type(t) is not trace.SymbolicZero
    }
    if moving:

        def function(*arrays: jax.Array) -> Arrays:
            return spec.function(definition=True)(*arrays, *ts)

        _, term = jvp_of_some(function, residuals, moving)
        terms.append(term)
    return outs, [functools.reduce(jnp.add, each) for each in zip(*terms, strict=True)]


def _transpose(
    cotangents: Sequence[Any], *arrays: Any, spec: _Spec
) -> list[jax.Array | None]:
    residuals, ts = spec.split(arrays)
    # Zeros are passed on as arrays: a cotangent that is all zero never gets here.
    cotangents = [trace.materialize(ct) for ct in cotangents]
    outs = _linear_map_p.bind(*residuals, *cotangents, spec=spec.transpose)
    # A tangent that is no linear operand is a zero that was materialised.
    wanted: list[jax.Array | None] = [
        out if trace.is_linear_operand(t) else None
        for out, t in zip(outs, ts, strict=True)
    ]
    return [*(None for _ in residuals), *wanted]


def _batch(
    arrays: Sequence[Any], axes: Axes, *, spec: _Spec
) -> tuple[Arrays, list[int]]:
    (residuals, ts), (residual_axes, t_axes) = spec.split(arrays), spec.split(axes)
    place = spec.rules.place(axes)
    ts = mapped_at(place, ts, t_axes, arrays, axes)
    batched = spec.under_vmap((*residual_axes, *[place] * len(ts)), place)
    outs = _linear_map_p.bind(*residuals, *ts, spec=batched)
    return outs, [place] * len(outs)


primitive.set_rules(_linear_map_p, jvp=_jvp, transpose=_transpose, batch=_batch)


@dataclasses.dataclass(frozen=True)
class _CallSpec(Vmapped):
    """The parameter of the ``lifted_call`` primitive: all of a call but its arrays."""

    function: jax.custom_vjp[Any]
    rules: _Rules
    config: Hashable
    in_tree: Any


def _evaluate_call(spec: _CallSpec, *arrays: jax.Array) -> Arrays:
    def flat(*arrays: jax.Array) -> Arrays:
        args = jax.tree.unflatten(spec.in_tree, arrays)
        # Without the rule, which is never reached here, and which jet does not get by.
        return jax.tree.leaves(spec.function.fun(spec.config, *args))

    return spec.vmapped(flat)(*arrays)


_lifted_call_p = primitive.new_primitive("lifted_call", _evaluate_call)


def _call_derivative(
    spec: _CallSpec, primals: Sequence[Any], moving: dict[int, jax.Array]
) -> tuple[Arrays, Arrays]:
    """Outputs, and the tangents of those that have a derivative, the first ones.

    `moving` has the float leaves' tangents by place.
    """
    if spec.batch_axes:
        # Of a vmapped call: the derivative, vmapped.
        *inner, axes = spec.batch_axes
        *places, place = spec.batch_places
        one = dataclasses.replace(
            spec, batch_axes=tuple(inner), batch_places=tuple(places)
        )
        return jax.vmap(
            functools.partial(_call_derivative, one),
            in_axes=(list(axes), {i: axes[i] for i in moving}),
            out_axes=place,
        )(list(primals), moving)
    args = jax.tree.unflatten(spec.in_tree, primals)
    # Leaves are args: each is an array or None.
    places = [i for i, x in enumerate(args) if x is not None]
    wanted = tuple(places[i] for i in moving)
    static = spec.rules.narrow(spec.config, wanted)
    out, residuals = spec.rules.forward(static, *args)
    leaves, tree = jax.tree.flatten(residuals)
    out_tree = jax.tree.structure(out[0] if spec.rules.has_aux else out)
    linear = _Spec(spec.rules, static, wanted, len(args), tree, out_tree)
    out_dot = _linear_map_p.bind(*leaves, *moving.values(), spec=linear)
    return jax.tree.leaves(out), out_dot


def moving_floats(
    primals: Sequence[Any], tangents: Sequence[Any]
) -> dict[int, jax.Array]:
    """The tangents that are there, of what can have one, by their places.

    There are some: jax asks no derivative of a call whose arrays do not move.
    """
    return {
        i: t
        for i, (x, t) in enumerate(zip(primals, tangents, strict=True))
        if type(t) is not trace.SymbolicZero
        and jnp.issubdtype(jnp.result_type(x), jnp.floating)
    }


def jvp_of_some(
    f: Callable[..., Any], primals: Sequence[Any], tangents: dict[int, jax.Array]
) -> tuple[Any, Any]:
    """`jax.jvp` of ``f(*primals)`` in those that have a tangent, by their places."""

    def function(moving: dict[int, jax.Array]) -> Any:
        return f(*(moving.get(i, x) for i, x in enumerate(primals)))

    return jax.jvp(function, ({i: primals[i] for i in tangents},), (tangents,))


def _call_jvp(
    primals: Sequence[Any], tangents: Sequence[Any], *, spec: _CallSpec
) -> tuple[Arrays, Arrays]:
    outs, outs_dot = _call_derivative(spec, primals, moving_floats(primals, tangents))
    aux = outs[len(outs_dot) :]
    return outs, [*outs_dot, *map(trace.symbolic_zero, aux)]


def _batch_call(
    arrays: Sequence[Any], axes: Axes, *, spec: _CallSpec
) -> tuple[Arrays, list[int]]:
    place = spec.rules.place(axes)
    outs = _lifted_call_p.bind(*arrays, spec=spec.under_vmap(axes, place))
    return outs, [place] * len(outs)


def _call_without(spec: _CallSpec, used: Sequence[bool]) -> _CallSpec | None:
    config = None if all(used) else spec.rules.without(spec.config, used)
    return None if config is None else dataclasses.replace(spec, config=config)


primitive.set_rules(
    _lifted_call_p, jvp=_call_jvp, batch=_batch_call, without=_call_without
)


def forward_mode(
    f: jax.custom_vjp[Any],
    pushforward: Callable[..., Any],
    *,
    pushforward_definition: Callable[..., Any] | None = None,
    pullback_definition: Callable[..., Any] | None = None,
    narrow: Callable[[Any, tuple[int, ...]], Any] | None = None,
    without: Callable[[Any, Sequence[bool]], Any] | None = None,
    has_aux: bool = False,
    one_rank: bool = False,
) -> Callable[..., Any]:
    r"""Adds forward mode, and all that follows from it, to a `jax.custom_vjp` function.

    Reverse mode stays the rule that `f` declared. ``jvp``, ``linearize``, ``jacfwd``,
    ``hessian``, and derivatives of derivatives in any order come on top, under
    ``vmap``, ``jit``, ``checkpoint``, ``scan``, ``pmap`` and ``shard_map``.

    Args:
      f: ``f(config, *args) -> out`` with ``nondiff_argnums=(0,)`` and its ``defvjp``
        called: ``forward(config, *args) -> (out, residuals)`` and
        ``backward(config, residuals, cotangents) -> a cotangent, or None, per arg``.
        Each of `args` is an array or None; `config` is hashable. So that
        derivatives of derivatives see how the residuals depend on the arguments,
        ``forward`` must compute them with the lifted function that this call returns
        (or with operations that jax can differentiate).
      pushforward: ``(config, residuals, tangents) -> tangents of out``, where
        `tangents` has an entry per arg, None for one without a derivative.
      pushforward_definition: The same in plain jax.numpy, needed where `pushforward`
        cannot be differentiated in its residuals. Default: `pushforward`.
      pullback_definition: The same of ``backward``. Default: `f`'s backward.
      narrow: ``(config, wanted) -> config`` for ``forward``, ``backward`` and
        `pushforward`, given the places of the args that have a tangent: what is for the
        others alone need not be computed. Default: the config as it is.
      without: ``(config, used) -> config``, given which leaves of `out` a program uses,
        some but not all: of a call that has these alone; or None, the default.
      has_aux: Whether `f` and ``forward`` give pairs (out, aux), whose second has no
        derivative: no rule is asked for it.
      one_rank: Whether all arguments and results have one rank. A mapped axis stays
        where it is then; else the results have it first.

    Returns:
      A function of the signature of `f`.

    Example:
      >>> import functools, jax, jax.numpy as jnp
      >>> from jaxsoftmax._core.autodiff import forward_mode
      >>> @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
      ... def cube(config, x):
      ...     return x**3
      >>> def forward(config, x):
      ...     return lifted(config, x), (x,)
      >>> def backward(config, residuals, ct):
      ...     return (3 * residuals[0] ** 2 * ct,)
      >>> cube.defvjp(forward, backward)
      >>> def push(config, residuals, tangents):
      ...     return 3 * residuals[0] ** 2 * tangents[0]
      >>> lifted = forward_mode(cube, push)
      >>> float(jax.grad(jax.grad(lambda x: lifted(None, x)))(2.0))
      12.0
      >>> float(jax.jvp(lambda x: lifted(None, x), (2.0,), (1.0,))[1])
      12.0
    """
    forward, backward = f.fwd, f.bwd
    if forward is None or backward is None:
        raise ValueError("forward_mode: f must have its defvjp called first")
    rules = _Rules(
        forward,
        pushforward,
        backward,
        pushforward_definition or pushforward,
        pullback_definition or backward,
        narrow or (lambda config, wanted: config),
        without or (lambda config, used: None),
        has_aux,
        one_rank,
    )
    out_shape: Any = jax.jit(f, static_argnums=0).eval_shape

    @functools.wraps(f)
    def lifted(config: Hashable, *args: Any) -> Any:
        if primitive.standard_primitives_needed():
            return f.fun(config, *args)
        leaves, in_tree = jax.tree.flatten(args)
        out_tree = jax.tree.structure(out_shape(config, *args))
        spec = _CallSpec(f, rules, config, in_tree)
        return jax.tree.unflatten(out_tree, _lifted_call_p.bind(*leaves, spec=spec))

    return lifted


def lift_definition(
    f: Callable[..., Any], definition: Callable[..., Any]
) -> Callable[..., Any]:
    """Lifts a function whose derivatives, of every order, are those of a definition.

    That is ``f(config, *args) -> out`` in operations that jax can differentiate. Each
    of `args` is an array or None.
    """

    def restricted(
        config: Any, args: Any
    ) -> tuple[Callable[..., Any], dict[int, jax.Array]]:
        """The definition as a function of what has a derivative; and that, by place."""

        def function(floats: dict[int, jax.Array]) -> Any:
            return definition(config, *(floats.get(i, x) for i, x in enumerate(args)))

        return function, {
            i: x
            for i, x in enumerate(args)
            if x is not None and jnp.issubdtype(x.dtype, jnp.floating)
        }

    def forward(config: Any, *args: Any) -> tuple[Any, Any]:
        return lifted(config, *args), args

    def backward(config: Any, args: Any, cotangents: Any) -> tuple[Any, ...]:
        (found,) = jax.vjp(*restricted(config, args))[1](cotangents)
        return tuple(found.get(i) for i in range(len(args)))

    def pushforward(config: Any, args: Any, tangents: Any) -> Any:
        function, floats = restricted(config, args)
        given = {
            i: jnp.zeros_like(x) if tangents[i] is None else tangents[i]
            for i, x in floats.items()
        }
        return jax.jvp(function, (floats,), (given,))[1]

    rule = jax.custom_vjp(f, nondiff_argnums=(0,))
    rule.defvjp(forward, backward)
    lifted = forward_mode(rule, pushforward)
    return lifted


def lift_gradients(
    f: Callable[..., Any],
    forward: Callable[..., Any],
    *,
    narrow: Callable[[Any, tuple[int, ...]], Any] | None = None,
) -> Callable[..., Any]:
    """Lifts a function to a scalar whose forward computes its gradients.

    Args:
      f: ``f(config, *args) -> (scalar, aux)``; each of `args` is an array or None, and
        `aux` a tree of arrays, which have no derivative.
      forward: ``(config, *args) -> ((scalar, aux), gradients)``, one for each arg, or
        None. The gradients are the residuals. Compute them with lifted functions or
        with operations that jax can differentiate.
      narrow: As for `forward_mode`.
    """

    def backward(config: Any, gradients: Any, g: jax.Array) -> Any:
        def times(a: jax.Array) -> jax.Array:
            return (a.astype(g.dtype) * g).astype(a.dtype)

        return jax.tree.map(times, gradients)

    def pushforward(config: Any, gradients: Any, tangents: Any) -> jax.Array:
        dtypes = [a.dtype for a in jax.tree.leaves(gradients)]
        dtype = max(dtypes, key=lambda dtype: dtype.itemsize)
        y_dot = jnp.zeros((), dtype)
        for gradient, t in zip(gradients, tangents, strict=True):
            if t is not None:
                # Of what is left out, whose gradient is 0, the tangent may be anything.
                left_out = (gradient == 0) & ~jnp.isfinite(t)
                t = jnp.where(left_out, jnp.zeros_like(t), t)
                y_dot = y_dot + jnp.sum(gradient.astype(dtype) * t.astype(dtype))
        return y_dot

    rule = jax.custom_vjp(f, nondiff_argnums=(0,))
    rule.defvjp(forward, backward)
    return forward_mode(rule, pushforward, narrow=narrow, has_aux=True)
