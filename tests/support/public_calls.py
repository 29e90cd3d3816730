"""A small call of every public function, as a function of one float array.

Each comes with the same computed by jax.nn, optax or jax.numpy alone.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsoftmax

TOKENS, HIDDEN, VOCABULARY = 4, 3, 5

X = np.random.default_rng(0).normal(size=(TOKENS, VOCABULARY)).astype(np.float32)
SIGNED = np.random.default_rng(5).normal(size=(TOKENS, VOCABULARY)).astype("f4")
LABELS = np.array([1, 0, 4, 2], np.int32)
SAMPLE_WEIGHTS = np.array([1, 2, 0, 0.5], np.float32)
WHERE = np.arange(TOKENS * VOCABULARY).reshape(TOKENS, VOCABULARY) % 3 != 1
DENSE = np.asarray(jax.nn.softmax(X[::-1]))
HIDDEN_STATES = np.random.default_rng(1).normal(size=(TOKENS, HIDDEN)).astype("f4")
WEIGHTS = np.random.default_rng(2).normal(size=(HIDDEN, VOCABULARY)).astype("f4")
# [T, N, H] and [S, K, H]
QUERY = np.random.default_rng(3).normal(size=(4, 2, 4)).astype("f4")
KEY = np.random.default_rng(4).normal(size=(6, 1, 4)).astype("f4")


def _attention(query: jax.Array) -> jax.Array:
    s = jnp.einsum("tnh,skh->nts", query, jnp.asarray(KEY)) / 2
    p = jax.nn.softmax(s, axis=-1)
    return jnp.einsum("nts,skh->tnh", p, jnp.asarray(KEY))


def _lse(x: jax.Array) -> jax.Array:
    return jax.scipy.special.logsumexp(x, axis=-1)


def _statistics(x: jax.Array) -> jax.Array:
    y = jax.nn.log_softmax(x)
    entropy = -jnp.sum(jnp.exp(y) * y, axis=-1)
    logprobs = jnp.take_along_axis(y, LABELS[:, None], axis=-1)[:, 0]
    return jnp.stack([logprobs, entropy, _lse(x)])


def _linear(x: jax.Array) -> jax.Array:
    return jnp.matmul(x, WEIGHTS, precision="highest")


def _merged(out: jax.Array, *, merge: Callable[..., tuple[jax.Array, jax.Array]]):
    return merge(out, jnp.ones(out.shape[:-1]), out[::-1], jnp.zeros(out.shape[:-1]))[0]


def _merge(out_a, lse_a, out_b, lse_b):
    a, b = jax.nn.softmax(jnp.stack([lse_a, lse_b]), axis=0)
    return a[..., None] * out_a + b[..., None] * out_b, None


@dataclasses.dataclass(frozen=True)
class PublicCall:
    """`ours` and `theirs` compute the same of an array like `x`."""

    ours: Callable[[jax.Array], jax.Array]
    theirs: Callable[[jax.Array], jax.Array]
    x: np.ndarray = dataclasses.field(default_factory=lambda: X)


_integer = jaxsoftmax.softmax_cross_entropy_with_integer_labels
_optax_integer = optax.losses.softmax_cross_entropy_with_integer_labels
_linear_loss = jaxsoftmax.linear_softmax_cross_entropy

CALLS = {
    "softmax": PublicCall(jaxsoftmax.softmax, jax.nn.softmax),
    "softmax where": PublicCall(
        lambda x: jaxsoftmax.softmax(x, where=WHERE),
        lambda x: jax.nn.softmax(x, where=WHERE),
    ),
    "softmax scaled": PublicCall(
        lambda x: jaxsoftmax.softmax(x, scale=WHERE[:, :1] + np.float32(1)),
        lambda x: jax.nn.softmax(x * (WHERE[:, :1] + np.float32(1))),
    ),
    "log_softmax": PublicCall(jaxsoftmax.log_softmax, jax.nn.log_softmax),
    "logsumexp": PublicCall(
        lambda x: jaxsoftmax.logsumexp(x, axis=-1, where=WHERE),
        lambda x: jax.nn.logsumexp(x, axis=-1, where=WHERE),
    ),
    "logsumexp signed": PublicCall(
        lambda x: jaxsoftmax.logsumexp(x, -1, SIGNED, return_sign=True)[0],
        lambda x: jax.nn.logsumexp(x, -1, SIGNED, return_sign=True)[0],
    ),
    "cross_entropy": PublicCall(
        lambda x: _integer(x, LABELS), lambda x: _optax_integer(x, LABELS)
    ),
    "cross_entropy mean": PublicCall(
        lambda x: _integer(x, LABELS, reduction="mean"),
        lambda x: _optax_integer(x, LABELS).mean(),
    ),
    "cross_entropy weighted": PublicCall(
        lambda x: _integer(x, LABELS, sample_weights=SAMPLE_WEIGHTS, reduction="mean"),
        lambda x: jnp.average(_optax_integer(x, LABELS), weights=SAMPLE_WEIGHTS),
    ),
    "dense cross_entropy": PublicCall(
        lambda x: jaxsoftmax.softmax_cross_entropy(x, DENSE),
        lambda x: optax.losses.softmax_cross_entropy(x, DENSE),
    ),
    "token statistics": PublicCall(
        lambda x: jnp.stack(jaxsoftmax.token_logprobs_and_entropy(x, LABELS)),
        _statistics,
    ),
    "linear": PublicCall(
        lambda x: _linear_loss(x, LABELS, WEIGHTS, precision="highest"),
        lambda x: _optax_integer(_linear(x), LABELS),
        HIDDEN_STATES,
    ),
    "linear mean": PublicCall(
        lambda x: _linear_loss(
            x, LABELS, WEIGHTS, reduction="mean", precision="highest"
        ),
        lambda x: _optax_integer(_linear(x), LABELS).mean(),
        HIDDEN_STATES,
    ),
    "linear weighted": PublicCall(
        lambda x: _linear_loss(
            x,
            LABELS,
            WEIGHTS,
            sample_weights=SAMPLE_WEIGHTS,
            reduction="mean",
            precision="highest",
        ),
        lambda x: jnp.average(
            _optax_integer(_linear(x), LABELS), weights=SAMPLE_WEIGHTS
        ),
        HIDDEN_STATES,
    ),
    "linear token statistics": PublicCall(
        lambda x: jnp.stack(
            jaxsoftmax.linear_token_logprobs_and_entropy(
                x, LABELS, WEIGHTS, precision="highest"
            )
        ),
        lambda x: _statistics(_linear(x)),
        HIDDEN_STATES,
    ),
    "attention": PublicCall(
        lambda q: jaxsoftmax.dot_product_attention(q, KEY, KEY), _attention, QUERY
    ),
    "merge_attention": PublicCall(
        lambda q: _merged(q, merge=jaxsoftmax.merge_attention),
        lambda q: _merged(q, merge=_merge),
        QUERY,
    ),
}

# One of each kind of rule.
KINDS = ("softmax where", "cross_entropy mean", "linear mean", "attention")


def each_call(*without):
    """The names, those of `KINDS` for both versions of jax."""
    return pytest.mark.parametrize(
        "name",
        [
            pytest.param(name, marks=[pytest.mark.versions] * (name in KINDS))
            for name in CALLS
            if name not in without
        ],
    )
