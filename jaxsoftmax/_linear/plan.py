"""Into how many chunks the loss behind a linear layer is cut.

All choices that depend on sizes are here, with the constants they were tuned by. How
arrays are then cut is in `_linear.chunks`.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np

from jaxsoftmax._core.shapes import is_known
from jaxsoftmax._linear.chunks import (
    ClassChunks,
    FilledClasses,
    TokenChunks,
    TokenGroups,
)

# The default budget: bytes for each entry of the weights (8 are two copies in float32),
# and what it is at least. More for a sum of tokens, and most on a GPU: with few of them
# in a group, weights are added up in memory for as long as they are multiplied.
_BUDGET_PER_WEIGHT = 8
_LEAST_BUDGET = 2**28
_LEAST_BUDGET_OF_SUM = 5 * 2**27
_BUDGET_PER_WEIGHT_OF_SUM_ON_GPU = 10
_LEAST_BUDGET_OF_SUM_ON_GPU = 2**31

# Where gradients are computed in the forward: the share of the budget that the float32
# logits of one chunk take, 1 / _PARTS; and the tokens of one at most. The rest is for
# the gradient of more tokens. Products and kernels of more tokens are not faster.
_PARTS = 2
_MOST_ROWS = 2048
# Where logits are computed again: into how many pieces tokens are cut, the first number
# for which a piece has so many logits (with fewer, products do not fill a GPU, and
# kernels are many), or the most; and the least tokens of one.
_PIECES = (8, 4, 2)
_LEAST_LOGITS = 2**23
_LEAST_PIECE = 1024
# The least tokens of a chunk of statistics with the whole vocabulary: a product with
# fewer waits for the weights.
_LEAST_ROWS = 1024

# Above this many tokens, the size of a chunk is a multiple of eight.
_SMALL_CHUNK = 64
# Numbers of devices that may share a dimension of tokens, each with its part of every
# chunk.
_SHARES = (16, 8, 4, 2, 1)

# Kernels and matrix products are made for rows of a multiple of _ALIGNED entries.
# Vocabularies from _LEAST_FILLED on are padded to that, with classes that have no part,
# which costs a copy of the weights.
_ALIGNED = 128
_LEAST_FILLED = 1024
# Up to this many devices may share a vocabulary, and none of it moves.
_MOST_FOLDS = 16
# The least classes of a chunk; the size of a chunk is a multiple of it, or, where it is
# twice as large, of _EVEN_WIDTH: then tiles of matrix products fill a GPU.
_LEAST_WIDTH = 128
_EVEN_WIDTH = 1024


@dataclasses.dataclass(frozen=True)
class LinearPlan:
    """The chunks of one call.

    Attributes:
      tokens: The shape of the tokens; sizes may be symbolic.
      hidden: The number of features of a token.
      vocabulary: The number of classes.
      operands, working, budget: As in `Layer`.
      weights_wanted: Whether the gradient of the weights is computed.
    """

    tokens: tuple[int, ...]
    hidden: int
    vocabulary: int
    operands: np.dtype
    working: np.dtype
    budget: int
    weights_wanted: bool = True

    def _most_tokens(self, arrays: int = 1) -> int:
        """The most tokens for which so many float32 arrays of logits fit the budget."""
        row = arrays * self.vocabulary * self.working.itemsize
        return max(1, self.budget // row)

    @property
    def whole_rows(self) -> tuple[TokenChunks, ClassChunks]:
        """As `forward`, always of all classes."""
        chunks = token_chunks(self.tokens, self._most_tokens())
        return chunks, class_chunks(self.vocabulary, self.vocabulary)

    @property
    def forward(self) -> tuple[TokenChunks, ClassChunks]:
        """Chunks of tokens for the statistics: their logits take the whole budget.

        Of all classes; or, where these would be few tokens, all tokens and some of the
        classes; or, where those would be few, about as many of both.
        """
        most, classes = self._most_tokens(), self.vocabulary
        if is_known(self.tokens) and most < min(math.prod(self.tokens), _LEAST_ROWS):
            entries = self.budget // self.working.itemsize
            most = max(math.isqrt(entries), entries // (2 * _EVEN_WIDTH), 1)
            most = min(math.prod(self.tokens), most)
            classes = entries // most
        return token_chunks(self.tokens, most), class_chunks(self.vocabulary, classes)

    @property
    def pushforward(self) -> TokenChunks:
        """Chunks of tokens for tangents: logits and their tangents take the budget."""
        return token_chunks(self.tokens, self._most_tokens(2))

    @property
    def filled(self) -> FilledClasses:
        """The padding of the vocabulary, if it is padded."""
        padded = self.vocabulary >= _LEAST_FILLED
        return filled_classes(self.vocabulary, _ALIGNED if padded else 1)

    @property
    def recomputed(self) -> tuple[TokenChunks, ClassChunks]:
        """Pieces of tokens, chunks of classes, where the logits are computed again.

        The gradients of all tokens' logits for one chunk of classes are in memory at a
        time, and the float32 logits of one piece. If the number of tokens is symbolic,
        there is one piece, and a chunk has as many classes as there are features: each
        array is as large as `x`.
        """
        if not is_known(self.tokens):
            whole = TokenChunks(self.tokens, self.tokens, (1,) * len(self.tokens))
            return whole, class_chunks(self.vocabulary, self.hidden)
        count = math.prod(self.tokens)
        itemsize = self.operands.itemsize + self.working.itemsize
        if count * self.vocabulary * itemsize <= self.budget:
            return self._recomputed_in(1)
        choices = [self._recomputed_in(pieces) for pieces in _PIECES]

        def logits(choice: tuple[TokenChunks, ClassChunks]) -> int:
            pieces, classes = choice
            return math.prod(pieces.sizes) * classes.folds * classes.width

        large = (choice for choice in choices if logits(choice) >= _LEAST_LOGITS)
        return next(large, choices[0])

    def _recomputed_in(self, count: int) -> tuple[TokenChunks, ClassChunks]:
        """At most so many pieces, and as many classes as the budget then allows."""
        tokens = math.prod(self.tokens)
        pieces = token_chunks(self.tokens, max(-(-tokens // count), _LEAST_PIECE))
        per_class = tokens * self.operands.itemsize
        per_class += math.prod(pieces.sizes) * self.working.itemsize
        return pieces, class_chunks(self.vocabulary, self.budget // per_class)

    @property
    def gradients_fit(self) -> bool:
        """Whether the budget holds gradients that the forward computes.

        Either that of all tokens' logits; or, added up over groups of tokens, the
        float32 gradient of the weights. False if the number of tokens is symbolic.
        """
        if not is_known(self.tokens):
            return False
        weights = self.hidden * self.vocabulary * self.working.itemsize
        return self.budget >= weights or self._groups.groups == 1

    @property
    def gradient(self) -> TokenGroups:
        """Groups and chunks of tokens where the forward computes gradients."""
        if self.weights_wanted:
            return self._groups
        chunks = self._groups.chunks
        return TokenGroups(chunks, chunks.count)

    @property
    def _groups(self) -> TokenGroups:
        """As few as the budget allows: a group is one term of the weights' sum.

        On a GPU of smaller chunks if there are fewer then. On a CPU, which keeps
        gradients in float32, these would take more memory.
        """
        rows = max(1, min(self._most_tokens() // _PARTS, _MOST_ROWS))
        groups = self._groups_of(rows)
        if _on_gpu() and rows > _LEAST_ROWS:
            smaller = self._groups_of(_LEAST_ROWS)
            return min(groups, smaller, key=lambda each: each.groups)
        return groups

    def _groups_of(self, rows: int) -> TokenGroups:
        """Of chunks of at most so many tokens."""
        chunks = token_chunks(self.tokens, rows)
        entries = math.prod(chunks.sizes) * self.vocabulary
        rest = self.budget - entries * self.working.itemsize
        most = max(1, rest // (entries * self.operands.itemsize))
        return TokenGroups(chunks, _divisor(chunks.count, -(-chunks.count // most)))


def _on_gpu() -> bool:
    """Whether that is the default: a plan is made when a function is traced."""
    return jax.default_backend() == "gpu"


def default_budget(weights: int, reduction: str) -> int:
    """Bytes, for so many entries of the weights; on a GPU if that is the default."""
    each, least = _BUDGET_PER_WEIGHT, _LEAST_BUDGET
    if reduction != "none":
        least = _LEAST_BUDGET_OF_SUM
        if _on_gpu():
            each = _BUDGET_PER_WEIGHT_OF_SUM_ON_GPU
            least = _LEAST_BUDGET_OF_SUM_ON_GPU
    return max(each * weights, least)


def least_budget(
    tokens: int, vocabulary: int, operands: np.dtype, working: np.dtype
) -> int:
    """Bytes that any plan takes.

    The logits of one token; or, if more, the logits and their gradient for all tokens
    and the smallest chunk of the vocabulary. If the number of tokens is symbolic, the
    former.
    """
    one_token = vocabulary * working.itemsize
    if not is_known([tokens]):
        return one_token
    itemsize = working.itemsize + operands.itemsize
    return max(one_token, tokens * least_chunk(vocabulary) * itemsize)


def _divisor(n: int, least: int) -> int:
    """The smallest divisor of `n` that is not below `least`, or `n`."""
    return next((d for d in range(least, n) if n % d == 0), n)


# --- tokens ---------------------------------------------------------------------------


def token_chunks(shape: Sequence[int], most: int) -> TokenChunks:
    """Chunks of about `most` tokens, of at least one along each dimension.

    The longest dimension is split first, evenly where some number of chunks up to twice
    as many as are needed divides it. A chunk that 16 devices cannot share evenly, while
    they could share the dimension, is taken only where the others are that small too;
    then one that 8 cannot, and so on.

    Symbolic sizes cannot be compared: then the last dimension is split last.
    """
    if not is_known(shape):
        return _symbolic_chunks(tuple(shape), most)
    sizes, counts = list(shape), [1] * len(shape)
    longest_first = sorted(range(len(shape)), key=lambda d: -shape[d])
    for shares in _SHARES:
        for d in longest_first:
            needed = -(-math.prod(sizes) // most)
            if needed <= 1:
                break
            count = _even_count(sizes[d], needed, math.gcd(shape[d], shares))
            sizes[d], counts[d] = sizes[d] // count, counts[d] * count
    for d in longest_first:
        needed = -(-math.prod(sizes) // most)
        if needed <= 1:
            break
        # No number of chunks is near that divides it.
        count = min(shape[d], counts[d] * needed)
        size = -(-shape[d] // count)
        if shape[d] % count and size > _SMALL_CHUNK:
            size = size // 8 * 8
        sizes[d], counts[d] = size, -(-shape[d] // size)
    return TokenChunks(tuple(shape), tuple(sizes), tuple(counts))


def _symbolic_chunks(shape: tuple[int, ...], most: int) -> TokenChunks:
    """Chunks of about `most` tokens, below twice that; of equal sizes but for the last.

    Symbolic sizes must be seen not to be 0: hence these operations.
    """
    sizes: list[int] = []
    for length in reversed(shape):
        needed = -(-length * math.prod(sizes) // most)
        sizes.insert(0, -(-length // needed))
    counts = [-(-n // size) for n, size in zip(shape, sizes, strict=True)]
    return TokenChunks(shape, tuple(sizes), tuple(counts))


def _even_count(length: int, needed: int, shares: int) -> int:
    """How many chunks of equal sizes, multiples of `shares`, to split into.

    From `needed` to twice as many, or else fewer.
    """
    multiples = length // shares
    least = min(multiples, needed)
    for count in range(least, min(multiples, 2 * least) + 1):
        if multiples % count == 0:
            return count
    return next(n for n in range(least, 0, -1) if multiples % n == 0)


# --- classes --------------------------------------------------------------------------


def filled_classes(vocabulary: int, multiple: int) -> FilledClasses:
    """The padding of a vocabulary to a multiple of `multiple`."""
    folds = math.gcd(vocabulary, _MOST_FOLDS, multiple)
    length, step = vocabulary // folds, multiple // folds
    return FilledClasses(folds, length, -(-length // step) * step)


def least_chunk(vocabulary: int) -> int:
    """The number of classes of the smallest chunk."""
    return min(vocabulary, _LEAST_WIDTH)


def class_chunks(vocabulary: int, most: int) -> ClassChunks:
    """Chunks of about `most` classes, and no more unless that is below the least."""
    folds = math.gcd(vocabulary, _MOST_FOLDS)
    length = vocabulary // folds
    least = _EVEN_WIDTH if most >= 2 * _EVEN_WIDTH else _LEAST_WIDTH
    step = least // math.gcd(folds, least)
    if most < vocabulary:
        most = max(most // folds // step, 1) * step
    if most >= length:
        return ClassChunks(folds, length, length)
    count = -(-length // most)
    width = -(-length // count)
    width = min(-(-width // step) * step, length)
    return ClassChunks(folds, length, width)
