"""Softmax for JAX with a memory-efficient, accurate backward in every derivative mode.

- `softmax`, `log_softmax`: drop-in for `jax.nn`'s.
- `logsumexp`: drop-in for `jax.nn`'s and `jax.scipy.special`'s.
- `softmax_cross_entropy_with_integer_labels`, `softmax_cross_entropy`: drop-in for
  optax's, with every option that is usually added.
- `token_logprobs_and_entropy`: for policy gradients.
- `linear_softmax_cross_entropy`, `linear_token_logprobs_and_entropy`: the same behind a
  linear layer, without storing the logits.
- `dot_product_attention`: drop-in for `jax.nn`'s, in memory linear in the length;
  `merge_attention`: from attention over two sets of keys.
- `explain`, `explain_for`: which implementation runs, and why not a faster one, as an
  `Explanation`.
- `standard_primitives`: calls as plain operations, for interpreters of jaxprs.
- `jaxsoftmax.naive`: the textbook formulas, full Jacobian included, for comparison.
- `jaxsoftmax.flax`: an ``attention_fn`` for Flax.
"""

from jaxsoftmax import naive as naive
from jaxsoftmax._attention import dot_product_attention as dot_product_attention
from jaxsoftmax._attention import merge_attention as merge_attention
from jaxsoftmax._core.dispatch import PerformanceWarning as PerformanceWarning
from jaxsoftmax._core.primitive import standard_primitives as standard_primitives
from jaxsoftmax._cross_entropy import softmax_cross_entropy as softmax_cross_entropy
from jaxsoftmax._cross_entropy import (
    softmax_cross_entropy_with_integer_labels as softmax_cross_entropy_with_integer_labels,  # noqa: E501
)
from jaxsoftmax._cross_entropy import (
    token_logprobs_and_entropy as token_logprobs_and_entropy,
)
from jaxsoftmax._explain import Explanation as Explanation
from jaxsoftmax._explain import explain as explain
from jaxsoftmax._explain import explain_for as explain_for
from jaxsoftmax._linear_cross_entropy import (
    linear_softmax_cross_entropy as linear_softmax_cross_entropy,
)
from jaxsoftmax._linear_cross_entropy import (
    linear_token_logprobs_and_entropy as linear_token_logprobs_and_entropy,
)
from jaxsoftmax._logsumexp import logsumexp as logsumexp
from jaxsoftmax._rows.loss_terms import LossAux as LossAux
from jaxsoftmax._rows.loss_terms import TokenStatistics as TokenStatistics
from jaxsoftmax._softmax import log_softmax as log_softmax
from jaxsoftmax._softmax import softmax as softmax
from jaxsoftmax._version import __version__ as __version__
