"""Softmax for JAX with a memory-efficient, accurate backward in every derivative mode.

- `softmax`, `log_softmax`: drop-in for `jax.nn`'s.
- `jaxsoftmax.naive`: the textbook formulas, full Jacobian included, for comparison.
- `jaxsoftmax.flax`: an ``attention_fn`` for Flax.
"""

from jaxsoftmax import naive as naive
from jaxsoftmax._softmax import log_softmax as log_softmax
from jaxsoftmax._softmax import softmax as softmax
from jaxsoftmax._version import __version__ as __version__
