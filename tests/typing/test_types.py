"""The types of public results, which mypy checks in `make lint` by `assert_type`.

That does nothing at run time: there each result is compared with its type. The calls
are traced, and nothing is compiled.
"""

import functools
from collections.abc import Callable
from typing import Any, assert_type

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoftmax
from jaxsoftmax import Explanation, LossAux, TokenStatistics, flax, naive

Array = jax.Array
Pair = tuple[Array, Array]
Logged = tuple[Array, LossAux]

X = np.ones((2, 3), np.float32)
LABELS = np.array([0, 2])
WEIGHTS = np.ones((3, 5), np.float32)
HEADS = np.ones((1, 2, 1, 4), np.float32)


def traced(test: Callable[[], None]) -> Callable[[], None]:
    @functools.wraps(test)
    def run() -> None:
        jax.eval_shape(test)

    return run


def is_array(x: Any) -> None:
    assert isinstance(x, jax.Array)


def is_pair(pair: Any) -> None:
    assert isinstance(pair, tuple)
    assert len(pair) == 2
    assert all(isinstance(x, jax.Array) for x in pair)


@traced
def test_softmax() -> None:
    is_array(assert_type(jaxsoftmax.softmax(X, scale=2), Array))
    is_array(assert_type(jaxsoftmax.log_softmax(X, -1, where=X > 0), Array))
    p = assert_type(naive.softmax(jnp.array(X)), Array)
    is_array(assert_type(naive.softmax_vjp(p, p), Array))


@traced
def test_logsumexp() -> None:
    lse, flag = jaxsoftmax.logsumexp, bool(LABELS[0])
    is_array(assert_type(lse(X, -1, keepdims=True, where=X > 0), Array))
    is_array(assert_type(lse(X, None, X, False, False), Array))
    is_pair(assert_type(lse(X, b=X, return_sign=True, implementation="xla"), Pair))
    assert_type(lse(X, return_sign=flag), Array | Pair)


@traced
def test_integer_labels() -> None:
    loss = jaxsoftmax.softmax_cross_entropy_with_integer_labels
    flag: bool = bool(LABELS[0])
    is_array(assert_type(loss(X, LABELS, -1, None, reduction="mean"), Array))
    is_array(assert_type(loss(X, LABELS, return_lse=False, z_loss=1e-3), Array))
    is_pair(assert_type(loss(X, LABELS, return_lse=True, ignore_index=-1), Pair))
    is_array(assert_type(loss(X, LABELS, return_lse=flag), Array | Pair))
    value, aux = assert_type(loss(X, LABELS, return_aux=True), Logged)
    is_array(value)
    is_array(assert_type(aux.accuracy, Array))
    value, lse, aux = loss(X, LABELS, return_lse=True, return_aux=True)
    assert_type((value, lse, aux), tuple[Array, Array, LossAux])
    found = assert_type(
        jaxsoftmax.token_logprobs_and_entropy(X, LABELS), TokenStatistics
    )
    is_array(assert_type(found.entropy, Array))


@traced
def test_dense_labels() -> None:
    loss = jaxsoftmax.softmax_cross_entropy
    is_array(assert_type(loss(X, X, where=X > 0), Array))
    is_pair(assert_type(loss(X, X, return_lse=True, scale=X), Pair))


@traced
def test_linear() -> None:
    loss = jaxsoftmax.linear_softmax_cross_entropy
    is_array(assert_type(loss(X, LABELS, WEIGHTS, memory_budget=1000), Array))
    is_pair(assert_type(loss(X, LABELS, WEIGHTS, return_lse=True), Pair))
    assert_type(loss(X, LABELS, WEIGHTS, return_aux=True), Logged)
    empty = loss(X[:0], LABELS[:0], WEIGHTS, return_lse=True)
    is_pair(assert_type(empty, Pair))
    statistics = jaxsoftmax.linear_token_logprobs_and_entropy
    assert_type(statistics(X, LABELS, WEIGHTS), TokenStatistics)


@traced
def test_attention() -> None:
    attention = jaxsoftmax.dot_product_attention
    is_array(assert_type(attention(HEADS, HEADS, HEADS, is_causal=True), Array))
    is_array(
        assert_type(attention(HEADS, HEADS, HEADS, query_offset=LABELS[:1]), Array)
    )
    pair = attention(HEADS, HEADS, HEADS, return_residual=True, query_offset=3)
    is_pair(assert_type(pair, Pair))
    also = attention(HEADS, HEADS, HEADS, return_max_logits=True)
    is_pair(assert_type(also, Pair))
    three = attention(HEADS, HEADS, HEADS, return_residual=True, return_max_logits=True)
    assert_type(three, tuple[Array, Array, Array])
    assert len(three) == 3
    is_pair(assert_type(jaxsoftmax.merge_attention(*pair, *pair), Pair))
    is_array(assert_type(flax.attention_fn(HEADS, HEADS, HEADS), Array))


def test_explain() -> None:
    found = assert_type(jaxsoftmax.explain(jaxsoftmax.softmax, X), Explanation)
    assert isinstance(found, Explanation)
    explain = jaxsoftmax.explain_for("cuda")
    assert_type(explain(jaxsoftmax.softmax, X), Explanation)


def test_wrong_keyword() -> None:
    """An option that a loss does not have is an error of types, not only of calls."""
    with pytest.raises(TypeError, match="ignore_index"):
        jaxsoftmax.softmax_cross_entropy(X, X, ignore_index=-1)  # type: ignore[call-overload]
