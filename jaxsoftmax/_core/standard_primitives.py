"""Calls as plain operations, for what knows jax's own primitives only."""

import contextlib
from collections.abc import Iterator

import jax

from jaxsoftmax._compat import primitive

# Part of what jax.jit knows a trace by: within the context functions are traced anew.
_requested = jax.make_user_context(False)


def are_needed() -> bool:
    """Whether what is traced now must consist of jax's own primitives."""
    return bool(_requested.value) or primitive.inside_kernel()


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
