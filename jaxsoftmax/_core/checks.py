"""Checks what the softmax family is called with; every error names the argument."""

import functools
import math
import numbers
import operator
import reprlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from jaxsoftmax._core.shapes import is_known, row_shape

Axis = int | Sequence[int] | None


def as_array(x: ArrayLike, name: str) -> jax.Array:
    """`x` itself where it is an array.

    While differentiating without jit, jnp.asarray copies even what is an array already,
    and the copy is kept for the backward pass.
    """
    x = unwrapped(x)
    if isinstance(x, jax.Array):
        return x
    try:
        return jnp.asarray(x)
    except (
        OverflowError,
        TypeError,
        ValueError,
        jax.errors.JaxRuntimeError,  # a dtype that is numpy's alone
    ) as error:
        raise must_be(name, "an array, or numbers that make one", x) from error


def unwrapped(value: Any) -> Any:
    """What is in a variable of a library, such as `nnx.Param`; else `value`."""
    if isinstance(value, jax.Array) or not hasattr(value, "__jax_array__"):
        return value
    return value.__jax_array__()


def described(value: object) -> str:
    """What came, as an error says it."""
    if isinstance(value, jax.core.Tracer):
        return (
            f"a traced array of dtype {value.dtype} and shape {value.shape}: it must "
            "be known when tracing, for example by static_argnames of jax.jit"
        )
    if isinstance(value, jax.Array | np.ndarray):
        return f"an array of dtype {value.dtype} and shape {value.shape}"
    return reprlib.repr(value)


def must_be(
    name: str, expected: str, value: object, error: type[Exception] = TypeError
) -> Exception:
    """The error to raise for an argument `name` whose value is not what is expected."""
    return error(f"{name} must be {expected}, got {described(value)}")


# --- checkers of any argument ---------------------------------------------------------


def floating(name: str, x: ArrayLike, hint: str = "") -> jax.Array:
    """`x` as an array of a floating dtype."""
    x = as_array(x, name)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{name} must have a floating dtype, got {x.dtype}{hint}")
    _check_signed(name, x.dtype)
    return x


def integer(name: str, x: ArrayLike, hint: str = "") -> jax.Array:
    """`x` as an array of an integer dtype."""
    x = as_array(x, name)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise TypeError(f"{name} must have an integer dtype, got {x.dtype}{hint}")
    return x


def real(name: str, x: ArrayLike) -> jax.Array:
    """`x` as an array of a floating or integer dtype."""
    x = as_array(x, name)
    if not is_real(x.dtype):
        raise TypeError(
            f"{name} must have a real dtype (floating or integer), got {x.dtype}"
        )
    _check_signed(name, x.dtype)
    return x


def shaped(
    name: str, x: jax.Array, expected: tuple[int, ...], says: str = "{}"
) -> jax.Array:
    """`x`, which has the shape `expected`; `says` is what an error calls the shape."""
    if x.shape != expected:
        raise ValueError(
            f"{name} must have the shape {says.format(expected)}, got {x.shape}"
        )
    return x


def per_class(
    name: str,
    x: ArrayLike | None,
    count: int,
    whose: str,
    kind: Callable[[str, ArrayLike], jax.Array] = real,
) -> jax.Array | None:
    """`x`, which has an entry for each class, of the `kind` that a checker says."""
    if x is None:
        return None
    x = kind(name, x)
    if x.shape != (count,):
        raise ValueError(
            f"{name} of shape {x.shape} does not match the {count} classes of {whose}: "
            f"expected ({count},)"
        )
    return x


def broadcasts(
    name: str, x: jax.Array, to: tuple[int, ...], whose: str = "x's shape"
) -> jax.Array:
    """`x` with the rank of the shape `to`, which it broadcasts to."""
    if broadcast_shape(x.shape, to) != to:
        raise ValueError(
            f"{name} of shape {x.shape} does not broadcast to {whose} {to}"
        )
    return with_rank(x, len(to))


def with_rank(x: jax.Array, ndim: int) -> jax.Array:
    """`x` with leading dimensions of size 1."""
    return x if x.ndim == ndim else x.reshape((1,) * (ndim - x.ndim) + x.shape)


# range -> what a number of it is called, what one outside of it must be, and a test.
_RANGES: dict[str, tuple[str, str, Callable[[float], bool]]] = {
    "[0, 1)": ("in [0, 1)", "in [0, 1)", lambda x: 0 <= x < 1),
    ">= 0": ("of at least 0", "finite and at least 0", lambda x: 0 <= x < math.inf),
    "> 0": (
        "above 0, or None",
        "finite and above 0, or None",
        lambda x: 0 < x < math.inf,
    ),
}


def number(name: str, value: object, within: str) -> float:
    """`value` as a float, which lies in a range of `_RANGES`."""
    value = unwrapped(value)
    kind, expected, holds = _RANGES[within]
    x = as_number(value)
    if x is None:
        raise must_be(name, f"a number {kind}", value)
    if not holds(x):
        raise ValueError(f"{name} must be {expected}, got {value}")
    return x


def coefficient(
    name: str, value: object, within: str
) -> tuple[float, jax.Array | None]:
    """`number`; or, where `value` is traced, 0 and an array of one number."""
    value = unwrapped(value)
    if not isinstance(value, jax.core.Tracer):
        return number(name, value, within), None
    if value.shape or not is_real(value.dtype):
        raise TypeError(
            f"{name} must be a number {_RANGES[within][0]}, got a traced array of "
            f"dtype {value.dtype} and shape {value.shape}: a traced one must be real "
            "and without dimensions; several are for jax.vmap"
        )
    return 0.0, value


def check_flag(name: str, value: object) -> bool:
    """`value`, which is True or False: "no" or a mask would count as True."""
    if not isinstance(value, bool | np.bool_):
        raise must_be(name, "True or False", value)
    return bool(value)


# --- the arguments, by name -----------------------------------------------------------


def check_logits(x: ArrayLike, name: str = "x") -> jax.Array:
    """`x` as a float array: integers are promoted as by jnp.exp."""
    x = as_array(x, name)
    if jnp.issubdtype(x.dtype, jnp.integer):
        return x.astype(jax.eval_shape(jnp.exp, x).dtype)
    return real(name, x)


def check_axis(axis: Axis, shape: tuple[int, ...], name: str = "x") -> tuple[int, ...]:
    """`axis` as a sorted tuple of negative ints."""
    return check_axis_in_order(axis, shape, name)[0]


def check_axis_in_order(
    axis: Axis, shape: tuple[int, ...], name: str
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """`axis` as a tuple of negative ints: sorted, and in the order that was given."""
    ndim = len(shape)
    if axis is None:
        return tuple(range(-ndim, 0)), tuple(range(-ndim, 0))
    given = axis if isinstance(axis, Sequence) else [axis]
    axes = tuple(a for a in map(as_int, given) if a is not None)
    if len(axes) < len(given):
        raise must_be("axis", "an int, a tuple of ints or None", axis)
    for a in axes:
        if ndim == 0:
            raise ValueError(
                f"{name} is a scalar, which has no axis {a}: pass axis=None"
            )
        if not -ndim <= a < ndim:
            raise ValueError(
                f"axis {a} is out of range for {name} of shape {shape}, which has "
                f"{ndim} dimensions: expected {-ndim} <= axis < {ndim}"
            )
    negative = tuple(a if a < 0 else a - ndim for a in axes)
    if len(set(negative)) != len(negative):
        raise ValueError(
            f"axis={axis!r} names a dimension of {name}, of shape {shape}, more than "
            "once"
        )
    return tuple(sorted(negative)), negative


def as_int(value: Any) -> int | None:
    """`value` as an int, or None if it is none, or a bool."""
    if isinstance(value, bool | np.bool_):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def check_where(
    where: ArrayLike | None, x: jax.Array, name: str = "x"
) -> tuple[jax.Array, jax.Array | None]:
    """`x` and `where`, a bool array of x's rank that is not expanded.

    As in jax.nn, a mask may be larger than `x`, which then gets the shape of both; but
    not of a higher rank, where `axis` could be one of either.
    """
    if where is None:
        return x, None
    where = _as_mask(where)
    shape = broadcast_shape(where.shape, x.shape)
    if shape is None or len(shape) > x.ndim:
        raise ValueError(
            f"where of shape {where.shape} does not broadcast with {name}'s shape "
            f"{x.shape} in its {x.ndim} dimensions"
        )
    return broadcast(x, shape), with_rank(where, x.ndim)


def _as_mask(where: ArrayLike) -> jax.Array:
    where = as_array(where, "where")
    if where.dtype != np.bool_:
        raise TypeError(
            f"where must be a bool array (True: use the entry), got dtype "
            f"{where.dtype}; for a 0/1 mask pass where=mask.astype(bool)"
        )
    return where


def _batch_shape(shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, ...]:
    """`shape` without the dimensions of `axes`."""
    return tuple(n for i, n in enumerate(shape) if i - len(shape) not in axes)


def check_where_or_examples(
    where: ArrayLike | None, shape: tuple[int, ...], axes: tuple[int, ...]
) -> tuple[jax.Array | None, jax.Array | None]:
    """A mask of entries and one of rows, either of which may be None.

    Both have the logits' rank. As in optax, a mask of one value per row may have the
    logits' shape without the dimensions of `axes`.
    """
    if where is None:
        return None, None
    where = _as_mask(where)
    batch = _batch_shape(shape, axes)
    rows = row_shape(shape, axes)
    if where.ndim not in (len(shape), len(batch)):
        raise ValueError(
            f"where of shape {where.shape} must broadcast to the logits' shape {shape} "
            f"with as many dimensions, or to that of the labels, {batch}"
        )
    if where.ndim < len(shape):
        where = broadcasts("where", where, batch, "the labels' shape")
        where = jnp.expand_dims(where, [a + len(shape) for a in axes])
    where = broadcasts("where", where, shape, "the logits' shape")
    if all(where.shape[a] == 1 for a in axes):
        return None, jnp.broadcast_to(where, rows)
    return where, None


def check_labels(
    labels: ArrayLike,
    shape: tuple[int, ...],
    axes: tuple[int, ...],
    of: str | None = None,
    *,
    several: bool = False,
) -> tuple[jax.Array, tuple[int, ...]]:
    """Indices, one per row, and the shape of logits that have these rows.

    As in optax, labels and rows may have size 1 where the other is larger. `shape` is
    that of the logits; `of` says in an error what has rows. With `several` each row has
    a number of labels, in one more dimension behind the others.
    """
    labels = as_array(labels, "labels")
    batch = _batch_shape(shape, axes)
    hint = "; softmax_cross_entropy takes the weight of each class instead"
    if labels.shape == batch:
        hint = "; for class indices pass labels.astype(int)"
    labels = integer("labels", labels, hint)
    count = labels.shape[-1:] if several else ()
    both = broadcast_shape(labels.shape, (*batch, *count))
    if both is None or labels.ndim != len(batch) + several:
        of = of or f"logits of shape {shape}"
        expected = f"{batch}, one class index for each row"
        if several:
            listed = ", ".join(map(str, (*batch, "K")))
            expected = f"({listed}), K class indices for each row"
        elif labels.ndim == len(batch) + 1:
            expected += "; several take their weights as label_weights"
        raise ValueError(
            f"labels of shape {labels.shape} do not match {of}: expected {expected}"
        )
    sizes = iter(both)
    full = tuple(
        n if i - len(shape) in axes else next(sizes) for i, n in enumerate(shape)
    )
    return broadcast(labels, both).reshape(*row_shape(full, axes), *count), full


def check_label_weights(
    weights: ArrayLike | None, labels: jax.Array, axes: tuple[int, ...]
) -> jax.Array | None:
    """What each of several labels weighs, given these with size 1 in `axes`."""
    if weights is None:
        return None
    weights = real("label_weights", weights)
    shape = _batch_shape(labels.shape, tuple(a - 1 for a in axes))
    weights = broadcasts("label_weights", weights, shape, "the labels' shape")
    return jnp.broadcast_to(weights, shape).reshape(labels.shape)


def check_dense_labels(
    labels: ArrayLike, x: jax.Array | jax.ShapeDtypeStruct, axes: tuple[int, ...]
) -> tuple[jax.Array, tuple[int, ...]]:
    """The weight of each class, floats, and the shape of logits that have these rows.

    As in optax, labels and logits are broadcast, but for the logits' classes.
    """
    labels = as_array(labels, "labels")
    if labels.dtype == np.bool_:
        labels = labels.astype(x.dtype)
    elif jnp.issubdtype(labels.dtype, jnp.integer):
        labels = labels.astype(np.float64 if x.dtype == np.float64 else np.float32)
    elif not jnp.issubdtype(labels.dtype, jnp.floating):
        raise TypeError(
            f"labels must have a real dtype (floating, integer or bool), got "
            f"{labels.dtype}"
        )
    _check_signed("labels", labels.dtype)
    if labels.ndim < x.ndim and labels.shape == _batch_shape(x.shape, axes):
        raise ValueError(
            f"labels of shape {labels.shape} for logits of shape {x.shape} look like "
            "one index a row: softmax_cross_entropy_with_integer_labels takes these"
        )
    full = broadcast_shape(labels.shape, x.shape)
    if full is None or any(full[a] != x.shape[a] for a in axes):
        raise ValueError(
            f"labels of shape {labels.shape} do not broadcast to the logits' shape "
            f"{x.shape}, nor the logits, along other axes than {axes}, to theirs"
        )
    return broadcast(labels, full), full


def check_ignore_index(ignore_index: int | None, dtype: np.dtype) -> int | None:
    """`ignore_index` as an int that a label can be."""
    if ignore_index is None:
        return None
    index = as_int(ignore_index)
    if index is None:
        raise must_be("ignore_index", "an int or None", ignore_index)
    info = jnp.iinfo(dtype)
    if not info.min <= index <= info.max:
        raise ValueError(
            f"ignore_index={index} is no value of the labels' dtype {dtype}, which "
            f"holds {info.min} to {info.max}: no label could be ignored"
        )
    return index


def as_number(value: object) -> float | None:
    """`value` as a float, or None if it is no real number that is known.

    A Python number, a scalar of numpy, or an array of one number without dimensions.
    """
    if isinstance(value, bool | np.bool_ | jax.core.Tracer):
        return None
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        if value.ndim or not is_real(value.dtype):
            return None
        return float(np.asarray(value))
    return float(value) if isinstance(value, numbers.Real) else None


def number_at_hand(value: object) -> float | None:
    """`as_number`, but for an array of jax, whose value may still be computed."""
    return None if isinstance(value, jax.Array) else as_number(value)


def check_softcap(
    softcap: ArrayLike | None, name: str = "logits_soft_cap"
) -> float | None:
    """`softcap`, a finite number above 0, or None."""
    return None if softcap is None else number(name, softcap, "> 0")


REDUCTIONS = ("none", "sum", "mean", "weighted_mean")


def check_reduction(reduction: str) -> str:
    """One of `REDUCTIONS`."""
    if reduction not in REDUCTIONS:
        expected = f"one of {', '.join(map(repr, REDUCTIONS))}"
        raise must_be("reduction", expected, reduction, ValueError)
    return reduction


def check_scale(
    scale: ArrayLike | None,
    x: jax.Array | jax.ShapeDtypeStruct,
    whose: str = "x's shape",
) -> tuple[float, jax.Array | None]:
    """`scale` as a number above 0 for the kernels and, else, an array of x's rank."""
    if scale is None:
        return 1.0, None
    scale = unwrapped(scale)
    known = number_at_hand(scale)
    if known is not None:
        if not math.isfinite(known):
            raise ValueError(f"scale must be finite, got {scale}")
        if known > 0:
            return known, None
        # The kernels subtract the largest x, so theirs must be positive.
        scale = np.asarray(known, np.float64 if x.dtype == np.float64 else np.float32)
    if not isinstance(scale, jax.Array | np.ndarray):
        raise must_be("scale", "a real number or an array", scale)
    return 1.0, broadcasts("scale", real("scale", scale), x.shape, whose)


def check_layer(
    x: ArrayLike, weights: ArrayLike, vocab_axis: int
) -> tuple[jax.Array, jax.Array, bool]:
    """`x` and `weights` of a linear layer, and whether the vocabulary comes first."""
    axis = as_int(vocab_axis)
    if axis not in (0, 1, -1, -2):
        raise must_be(
            "vocab_axis",
            "1 for weights of shape (hidden, vocabulary) or 0 for (vocabulary, hidden)",
            vocab_axis,
            ValueError,
        )
    first = axis in (0, -2)
    expected = "(vocabulary, hidden)" if first else "(hidden, vocabulary)"
    x, weights = floating("x", x), floating("weights", weights)
    if x.ndim == 0:
        raise ValueError("x must have the hidden dimension as its last, got a scalar")
    if weights.ndim != 2:
        raise ValueError(
            f"weights must have the shape {expected}, as vocab_axis={vocab_axis} says, "
            f"got {weights.shape}"
        )
    if not is_known(weights.shape):
        raise ValueError(
            f"weights of shape {weights.shape} must have sizes that are known when "
            "tracing, as chunks are made of them: symbolic ones are for tokens, in x "
            "and labels"
        )
    hidden = weights.shape[1 if first else 0]
    if x.shape[-1] != hidden:
        raise ValueError(
            f"x of shape {x.shape} and weights of shape {weights.shape} do not match: "
            f"the last dimension of x has {x.shape[-1]} entries, the hidden one of "
            f"weights {hidden} (vocab_axis={vocab_axis}: weights are {expected})"
        )
    return x, weights, first


def check_examples(
    where: ArrayLike | None, tokens: tuple[int, ...]
) -> jax.Array | None:
    """A mask of the labels' shape, with one more dimension of size 1."""
    if where is None:
        return None
    where = broadcasts("where", _as_mask(where), tokens, "the labels' shape")
    return jnp.broadcast_to(where, tokens)[..., None]


def check_sample_weights(
    weights: ArrayLike | None, shape: tuple[int, ...], axes: tuple[int, ...]
) -> jax.Array | None:
    """Weights of the losses, with the logits' rank and size 1 in `axes`.

    They broadcast to the shape of the losses, that of the logits without `axes`.
    """
    if weights is None:
        return None
    weights = real("sample_weights", weights)
    batch = _batch_shape(shape, axes)
    weights = broadcasts("sample_weights", weights, batch, "the shape of the losses")
    weights = jnp.broadcast_to(weights, batch)
    return jnp.expand_dims(weights, [a + len(shape) for a in axes])


def check_memory_budget(budget: int | None, *, least: int, default: int) -> int:
    """`budget` in bytes, or what it is by default."""
    if budget is None:
        return max(default, least)
    given = as_int(budget)
    if given is None:
        raise must_be("memory_budget", "an int (bytes) or None", budget)
    if given < least:
        raise ValueError(
            f"memory_budget={given} is too little: these tokens and classes need at "
            f"least {least} bytes"
        )
    return given


def check_dtype(dtype: DTypeLike | None, in_dtype: np.dtype) -> np.dtype:
    """The result's dtype: `dtype`, or the logits' own."""
    if dtype is None:
        return in_dtype
    try:
        wanted = np.dtype(jnp.dtype(dtype))
    except TypeError:
        raise TypeError(f"dtype must be a floating dtype, got {dtype!r}") from None
    if not jnp.issubdtype(wanted, jnp.floating):
        raise TypeError(f"dtype must be a floating dtype, got {wanted}")
    _check_signed("dtype", wanted)
    if jax.dtypes.canonicalize_dtype(wanted) != wanted:
        raise ValueError(
            f"dtype={wanted} needs 64-bit mode: set jax.config.update"
            "('jax_enable_x64', True), or pass jnp.float32"
        )
    if not _has_arrays(wanted):
        raise TypeError(f"dtype={wanted}: this jax has no arrays of that dtype")
    return wanted


def check_precision(precision: Any) -> Any:
    """`precision` of matrix products, hashable."""
    if isinstance(precision, list):  # jnp.matmul takes one; what is static is hashed
        precision = tuple(precision)
    try:
        _try_precision(precision)
    except (TypeError, ValueError) as error:
        expected = (
            "None, a jax.lax.Precision or its name, a pair of these, or another that "
            "jax.lax.dot_general takes"
        )
        raise must_be("precision", expected, precision, ValueError) from error
    return precision


@functools.cache
def _try_precision(precision: Any) -> None:
    """Raises what jax raises for it: once, as it takes jax a trace to find out."""
    x = jax.ShapeDtypeStruct((1, 1), jnp.float32)
    jax.eval_shape(lambda x: jax.lax.dot(x, x, precision=precision), x)


def _check_signed(name: str, dtype: np.dtype) -> None:
    """Refuses a float that is a power of 2 and nothing else."""
    if jnp.issubdtype(dtype, jnp.floating) and float(jnp.finfo(dtype).min) >= 0:
        raise TypeError(
            f"{name} must have a floating dtype that holds 0 and negative numbers, got "
            f"{dtype}; jnp.float32 holds all of its values"
        )


@functools.cache
def _has_arrays(dtype: np.dtype) -> bool:
    """Whether jax can make one, as not of every dtype that it has a name for."""
    try:
        with jax.ensure_compile_time_eval():
            jnp.zeros((), dtype)
    except jax.errors.JaxRuntimeError:
        return False
    return True


def is_real(dtype: np.dtype) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)


def broadcast_shape(*shapes: tuple[int, ...]) -> tuple[int, ...] | None:
    """What `shapes`, whose sizes may be symbolic, broadcast to; or None."""
    try:
        return jnp.broadcast_shapes(*shapes)
    except ValueError:
        return None


def broadcast(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """`x` itself where it has that shape."""
    return x if x.shape == shape else jnp.broadcast_to(x, shape)
