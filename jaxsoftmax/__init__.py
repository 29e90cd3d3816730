"""Softmax for JAX with a memory-efficient, accurate backward in every derivative mode.

- `softmax`, `log_softmax`: drop-in for `jax.nn`'s.
- `explain`, `explain_for`: which implementation runs, and why not a faster one.
- `jaxsoftmax.naive`: the textbook formulas, full Jacobian included, for comparison.
- `jaxsoftmax.flax`: an ``attention_fn`` for Flax.
"""

from jaxsoftmax import naive as naive
from jaxsoftmax._dispatch import PerformanceWarning as PerformanceWarning
from jaxsoftmax._explain import explain as explain
from jaxsoftmax._explain import explain_for as explain_for
from jaxsoftmax._softmax import log_softmax as log_softmax
from jaxsoftmax._softmax import softmax as softmax
from jaxsoftmax._version import __version__ as __version__
