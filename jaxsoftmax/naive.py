"""The textbook formulas as plain code, for tests, comparison and teaching.

Nothing here is fast, small or guarded: the Jacobian takes N x N numbers for a row of N.
`jaxsoftmax.softmax` computes the same derivative from P alone.
"""

import jax
import jax.numpy as jnp


def softmax(x: jax.Array) -> jax.Array:
    """``P = exp(x) / sum(exp(x))`` over the last axis.

    Overflows where an entry of `x` is large: the usual shift by the maximum is left out
    so that this stays the definition.

    Args:
      x: Logits, [..., N].

    Returns:
      Probabilities, [..., N].

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoftmax import naive
      >>> with jnp.printoptions(precision=4):
      ...     print(naive.softmax(jnp.array([1.0, 2.0, 3.0])))
      [0.09   0.2447 0.6652]
    """
    e = jnp.exp(x)
    return e / jnp.sum(e, axis=-1, keepdims=True)


def log_softmax(x: jax.Array) -> jax.Array:
    """``y = x - log(sum(exp(x)))`` over the last axis.

    Args:
      x: Logits, [..., N].

    Returns:
      The logarithms of the probabilities, [..., N].

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoftmax import naive
      >>> with jnp.printoptions(precision=4):
      ...     print(naive.log_softmax(jnp.array([1.0, 2.0, 3.0])))
      [-2.4076 -1.4076 -0.4076]
    """
    return x - jnp.log(jnp.sum(jnp.exp(x), axis=-1, keepdims=True))


def softmax_jacobian(p: jax.Array) -> jax.Array:
    """The Jacobian ``J[i, j] = dP[i] / dx[j]``, which is ``diag(P) - P P^T``.

    Args:
      p: Probabilities, [..., N].

    Returns:
      [..., N, N]; symmetric, and every row sums to 0.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoftmax import naive
      >>> with jnp.printoptions(precision=2):
      ...     print(naive.softmax_jacobian(jnp.array([0.1, 0.5, 0.4])))
      [[ 0.09 -0.05 -0.04]
       [-0.05  0.25 -0.2 ]
       [-0.04 -0.2   0.24]]
    """
    diagonal = jnp.vectorize(jnp.diag, signature="(n)->(n,n)")(p)
    return diagonal - p[..., :, None] * p[..., None, :]


def softmax_vjp(p: jax.Array, g: jax.Array) -> jax.Array:
    """The backward with the Jacobian in memory: ``dx = J^T g``.

    Args:
      p: Probabilities, [..., N].
      g: Cotangent of the probabilities, [..., N].

    Returns:
      Cotangent of the logits, [..., N]; the same as ``p * (g - sum(p * g))``.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoftmax import naive
      >>> p, g = jnp.array([0.1, 0.5, 0.4]), jnp.array([1.0, 0.0, 0.0])
      >>> with jnp.printoptions(precision=2):
      ...     print(naive.softmax_vjp(p, g))
      ...     print(p * (g - jnp.sum(p * g)))
      [ 0.09 -0.05 -0.04]
      [ 0.09 -0.05 -0.04]
    """
    return jnp.einsum("...ij,...i->...j", softmax_jacobian(p), g)
