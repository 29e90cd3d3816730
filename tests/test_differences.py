"""The pages docs/differences_*.md: each line of their tables, run with both sides.

A test of a line says in `@line` which one it is: the page, the heading, and the line's
first cell. Lines and tests must be the same set. What is not in the tables must be the
same in both: signatures, values and gradients, at the end of this file.
"""

import functools
import inspect
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import jaxsoftmax
import jaxsoftmax.flax
from jaxsoftmax import softmax_cross_entropy as dense_loss
from jaxsoftmax import softmax_cross_entropy_with_integer_labels as label_loss

DOCS = pathlib.Path(__file__).parent.parent / "docs"
PAGES = ("jax_nn", "optax", "flax")

nan, inf = np.nan, np.inf
LOWEST = np.finfo(np.float32).min
PROMOTION = jax.dtypes.TypePromotionError


# What the originals, or numpy in them, warn of.
pytestmark = [
    pytest.mark.filterwarnings("ignore:invalid value encountered in cast"),
    pytest.mark.filterwarnings("ignore:Casting from complex to real"),
    pytest.mark.filterwarnings("ignore:divide by zero"),
]


@pytest.fixture(autouse=True)
def as_users_have_it():
    """jax's defaults, where the other tests are strict; values are those of the CPU."""
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        jax.debug_nans(False),
        jax.default_device(jax.devices("cpu")[0]),
    ):
        yield


# --- lines and tests ------------------------------------------------------------------

TESTS = {}


def line(page, heading, *firsts):
    """Registers the test of one line, or of lines that have one test."""

    def register(test):
        for first in firsts:
            assert (page, heading, first) not in TESTS
            TESTS[page, heading, first] = test
        return test

    return register


def lines_of(page):
    """(page, heading, first cell) of every line of the tables."""
    heading, found = "", []
    for text in (DOCS / f"differences_{page}.md").read_text().splitlines():
        if text.startswith("#"):
            heading = text.lstrip("# ")
        elif text.startswith("| ") and not text.startswith(("| |", "| ---")):
            found.append((page, heading, re.split(r" \| ", text[2:])[0]))
    return found


@pytest.mark.parametrize("page", PAGES)
def test_each_line_has_a_test_and_each_test_a_line(page):
    lines = lines_of(page)
    assert len(set(lines)) == len(lines) > 10
    assert {key for key in TESTS if key[0] == page} == set(lines)


def close(got, want, rtol=1e-5, atol=1e-6):
    # As float32, which knows what ml_dtypes does not print or compare.
    got, want = (np.asarray(x).astype(np.float32) for x in (got, want))
    np.testing.assert_allclose(got, want, rtol=rtol, atol=atol)


def is_nan(x):
    return bool(np.isnan(np.asarray(x).astype(np.float32)).all())


@functools.partial(jax.jit, static_argnums=0)
def pulled(f, x, g):
    """The gradient of ``sum(g f(x))``."""
    return jax.vjp(f, x)[1](g)[0]


@functools.partial(jax.jit, static_argnums=0)
def pushed(f, x, t):
    """The derivative along `t`."""
    return jax.jvp(f, (x,), (t,))[1]


def each(*functions):
    """Pairs (jax.nn's, ours) of these names."""
    return [(getattr(jax.nn, f), getattr(jaxsoftmax, f)) for f in functions]


def fails(function, error, *args, **kwargs):
    """It raises this error, and no subclass that another line is about."""
    with pytest.raises(error):
        jax.block_until_ready(function(*args, **kwargs))


# --- jax.nn: softmax and log_softmax --------------------------------------------------

rows = functools.partial(line, "jax_nn", "softmax and log_softmax")
BOTH = ("softmax", "log_softmax")
X = np.array([0.0, 1.0, 2.0], np.float32)
MASK = np.array([True, True, False])


@rows("a row of `-inf`")
def empty_row():
    x, absent = jnp.full(3, -inf), {"softmax": 0.0, "log_softmax": -inf}
    for theirs, ours in each(*BOTH):
        for f, value, gradient in (
            (theirs, nan, nan),
            (ours, absent[ours.__name__], 0.0),
        ):
            close(f(x), np.full(3, value))
            close(pulled(f, x, jnp.ones(3)), np.full(3, gradient))
        nothing = np.zeros(3, bool)
        close(theirs(X, where=nothing), np.full(3, absent[ours.__name__]))
        close(ours(X, where=nothing), np.full(3, absent[ours.__name__]))


@rows("NaN or inf in the cotangent or the tangent, where x is `-inf`")
def poisoned_cotangent():
    x = jnp.array([0.0, 1.0, -inf])
    for theirs, ours in each(*BOTH):
        for bad in (nan, inf):
            t = jnp.array([1.0, 2.0, bad])
            for derivative in (pulled, pushed):
                assert not np.isfinite(derivative(theirs, x, t)[:2]).any()
                clean = derivative(ours, x[:2], t[:2])
                close(derivative(ours, x, t), [*clean, 0])


@rows("the cotangent of `log_softmax` where x is `-inf`, and the tangent there")
def absent_cotangent():
    x, t = jnp.array([0.0, 0.0, -inf]), jnp.array([1.0, 2.0, 4.0])
    f, g = jax.nn.log_softmax, jaxsoftmax.log_softmax
    close(pulled(f, x, t), [-2.5, -1.5, 4])
    close(pulled(g, x, t), [-0.5, 0.5, 0])
    close(pushed(f, x, t), [-0.5, 0.5, 2.5])
    close(pushed(g, x, t), [-0.5, 0.5, 0])
    for h in (f, g):
        masked = functools.partial(h, where=MASK)
        close(pulled(masked, x, t), [-0.5, 0.5, 0])
        close(pushed(masked, x, t), [-0.5, 0.5, 0])


@rows("dtypes of 16 bits and fewer")
def narrow_dtypes():
    exact = {"softmax": lambda x: np.exp(x) / np.exp(x).sum()}
    exact["log_softmax"] = lambda x: np.log(exact["softmax"](x))
    x = np.linspace(0, 3, 50)
    for theirs, ours in each(*BOTH):
        for dtype in (jnp.bfloat16, jnp.float16, jnp.float8_e5m2):
            logits = jnp.asarray(x, dtype)
            want = exact[ours.__name__](np.asarray(logits, np.float64))
            assert ours(logits).dtype == theirs(logits).dtype == dtype
            worst = [
                np.abs(np.asarray(f(logits), np.float64) / want - 1).max()
                for f in (ours, theirs)
            ]
            assert worst[0] < 0.51 * float(jnp.finfo(dtype).eps) < worst[1]


@rows("float8 dtypes without infinities")
def no_infinities():
    names = ["e4m3fn", "e4m3fnuz", "e4m3b11fnuz", "e5m2fnuz"]
    for dtype in (getattr(jnp, f"float8_{name}") for name in names):
        for theirs, ours in each(*BOTH):
            x = jnp.asarray(X, dtype)
            assert is_nan(theirs(x))
            close(ours(x), ours(X), rtol=float(jnp.finfo(dtype).eps))


@rows(
    "gradient of `softmax` in a row that one entry dominates, or for a cotangent with "
    "a large common part"
)
def dominated_row():
    for x, g in (([20.0, 0, 1], [1.0, 2, 4]), ([0.0, 1, 2], [1e6, 1e6 + 1, 1e6 + 4])):
        p = np.exp(np.float64(x)) / np.exp(np.float64(x)).sum()
        # sum(P g), its common part taken out, which p does not hold
        want = p * (np.float64(g) - g[0] - (p * (np.float64(g) - g[0])).sum())
        theirs, ours = (
            jax.vjp(f, jnp.array(x))[1](jnp.array(g))[0]
            for f in (jax.nn.softmax, jaxsoftmax.softmax)
        )
        close(ours, want, atol=0)
        assert np.abs(theirs - want).max() > 1e-3 * np.abs(want).max()


@rows("gradient of `log_softmax` at a sure label")
def sure_label():
    x = jnp.array([20.0, 0, 0])
    want = np.array([-2.0, 1, 1]) / (np.exp(20.0) + 2)
    for f, worst in ((jaxsoftmax.log_softmax, 1e-5), (jax.nn.log_softmax, inf)):
        error = jax.grad(lambda x, f=f: -f(x)[0])(x)[0] / want[0] - 1
        assert abs(error) < worst
    assert abs(error) > 1e-2


@rows("what the backward of `softmax` keeps, with `where`")
def kept():
    x, where = jnp.ones((8, 16)), np.arange(16) < 9

    def count(f):
        _, pull = jax.jit(lambda x: jax.vjp(lambda x: f(x, where=where), x))(x)
        leaves = jax.tree.leaves(pull)
        return [k.size for k in leaves if k.size >= x.size]

    assert count(jaxsoftmax.softmax) == [x.size]
    assert len(count(jax.nn.softmax)) >= 4


@rows("unsigned integers")
def unsigned():
    for theirs, ours in each(*BOTH):
        for dtype in (jnp.uint8, jnp.uint32):
            x = jnp.array([0, 1, 2], dtype)
            close(ours(x), ours(X))
            wrong = np.asarray(theirs(x))
            assert not np.allclose(wrong, ours(X), atol=1e-3)


@rows("integers of 4 bits")
def small_integers():
    x = [0, 1, 1]
    for _, ours in each(*BOTH):
        for dtype in (jnp.int4, jnp.uint4):
            close(ours(jnp.array(x, dtype)), ours(jnp.array(x)))
            fails(jax.nn.log_softmax, PROMOTION, jnp.array(x, dtype))
    close(jax.nn.softmax(jnp.array(x, jnp.int4)), jaxsoftmax.softmax(jnp.array(x)))
    assert jax.nn.softmax(jnp.array(x, jnp.uint4))[0] > 0.9


@rows('`log_softmax` of integers with `jax_numpy_dtype_promotion="strict"`')
def strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        x = jnp.arange(3)
        fails(jax.nn.log_softmax, PROMOTION, x)
        close(jaxsoftmax.log_softmax(x), jaxsoftmax.log_softmax(X))
        close(jax.nn.softmax(x), jaxsoftmax.softmax(x))


@rows("complex x")
def complex_x():
    for theirs, ours in each(*BOTH):
        assert theirs(X + 0j).dtype == np.complex64
        fails(ours, TypeError, X + 0j)


@rows("x or `where` a list")
def lists():
    for theirs, ours in each(*BOTH):
        fails(theirs, TypeError, [0.0, 1.0, 2.0])
        fails(theirs, TypeError, X, where=[True, True, False])
        want = theirs(X, where=MASK)
        close(ours([0.0, 1.0, 2.0], where=[True, True, False]), want)


@rows("`where` of more dimensions than x")
def where_of_higher_rank():
    where = np.stack([MASK, ~MASK])
    for theirs, ours in each(*BOTH):
        want = theirs(np.stack([X, X]), where=where)
        assert np.abs(theirs(X, where=where) - want)[where].max() > 0.1
        fails(ours, ValueError, X, where=where)
        close(ours(X[None], where=where), want)


@rows("`where` that is not bool")
def where_of_numbers():
    for theirs, ours in each(*BOTH):
        for dtype in (np.int32, np.float32):
            fails(theirs, ValueError, X, where=MASK.astype(dtype))
            fails(ours, TypeError, X, where=MASK.astype(dtype))


@rows("`axis` of `log_softmax` a list, or an array of one integer")
def axis_a_list():
    x = np.ones((2, 3), np.float32)
    for axis in ([0, 1], jnp.int32(1)):
        fails(jax.nn.log_softmax, ValueError, x, axis)
        theirs = jax.nn.softmax(x, axis)
        close(jaxsoftmax.softmax(x, axis), theirs)
        close(jaxsoftmax.log_softmax(x, axis), np.log(theirs))


@rows("`axis=True`")
def axis_a_bool():
    x = np.ones((2, 3), np.float32)
    for theirs, ours in each(*BOTH):
        close(theirs(x, True), theirs(x, 1))
        fails(ours, TypeError, x, True)


@rows("an array of random keys")
def keys():
    for theirs, ours in each(*BOTH):
        fails(theirs, ValueError, jax.random.key(0))
        fails(ours, TypeError, jax.random.key(0))


@rows("`scale`, `dtype`, `implementation`")
def more_arguments():
    given = {"scale": 2.0, "dtype": jnp.float32, "implementation": "xla"}
    for theirs, ours in each(*BOTH):
        for name, value in given.items():
            fails(theirs, TypeError, X, **{name: value})
            assert ours(X, **{name: value}).shape == X.shape
        fails(ours, TypeError, X, -1, None, 2.0)


# --- jax.nn: logsumexp ----------------------------------------------------------------

sums = functools.partial(line, "jax_nn", "logsumexp")
LSES = (jax.nn.logsumexp, jaxsoftmax.logsumexp)


def of_weights(f, x, b):
    """The gradient in the weights, of ``log|S|``."""
    return jax.grad(lambda b: f(x, b=b, return_sign=True)[0])(jnp.asarray(b))


@sums("gradient of a row of `-inf`")
def lse_of_empty_row():
    x = jnp.full(3, -inf)
    for f, gradient in zip(LSES, (nan, 0.0), strict=True):
        assert f(x) == -inf
        close(jax.grad(f)(x), np.full(3, gradient))
        masked = functools.partial(f, where=np.zeros(3, bool))
        assert masked(X) == -inf
        close(jax.grad(masked)(X), np.zeros(3))


@sums("a row with +inf in `a` or `b`")
def lse_of_inf():
    x, b = changed_one(X, 1, inf), changed_one(np.ones(3, np.float32), 1, inf)
    for f, value in zip(LSES, (inf, nan), strict=True):
        close(f(x), value)
        close(f(X, b=b), value)


def changed_one(x, i, value):
    return np.where(np.arange(x.size) == i, np.float32(value), x)


@sums("a row with NaN whose cotangent is 0")
def lse_of_unused_nan():
    x, g = jnp.array([[0.0, nan], [0.0, 0.0]]), jnp.array([0.0, 1.0])
    for f, value in zip(LSES, (nan, 0.0), strict=True):
        gradient = pulled(functools.partial(f, axis=-1), x, g)
        close(gradient, [[value, value], [0.5, 0.5]])


@sums("NaN or inf in the tangent, where `a` is `-inf`")
def lse_of_poisoned_tangent():
    x, t = jnp.array([0.0, 0.0, -inf]), jnp.array([1.0, 2.0, nan])
    for f, value in zip(LSES, (nan, 1.5), strict=True):
        close(pushed(f, x, t), value)


@sums("a result near 0, in a row that one entry dominates")
def lse_near_0():
    x = np.array([0, -20], np.float32)
    close(jax.nn.logsumexp(x), 0, atol=0)
    close(jaxsoftmax.logsumexp(x), np.exp(-20), atol=0)


@sums("dtypes of 16 bits")
def lse_of_16_bits():
    x = np.random.default_rng(0).normal(size=(64, 50))
    for dtype in (jnp.bfloat16, jnp.float16):
        logits = jnp.asarray(x, dtype)
        want = np.log(np.exp(np.asarray(logits, np.float64)).sum(-1))
        worst = [
            np.abs(np.asarray(f(logits, -1), np.float64) / want - 1).max() for f in LSES
        ]
        assert worst[1] < 0.51 * float(jnp.finfo(dtype).eps) < worst[0]


@sums("weights so large that S is no float")
def lse_of_large_weights():
    x, b = np.zeros(2, np.float32), np.full(2, 3e38, np.float32)
    assert jax.nn.logsumexp(x, b=b) == inf
    close(jaxsoftmax.logsumexp(x, b=b), np.log(6e38))


@sums("gradient where the terms of a row cancel exactly")
def lse_that_cancels():
    x, b = jnp.ones(2), jnp.array([1.0, -1.0])
    for f, finite in zip(LSES, (False, True), strict=True):
        value, sign = f(x, b=b, return_sign=True)
        assert (value, sign) == (-inf, 0)
        gradient = jax.grad(lambda x, f=f: f(x, b=b, return_sign=True)[0])(x)
        assert (np.isfinite(gradient) == finite).all()
        assert (gradient == 0).all() == finite


@sums("gradient of `b` where it is 0")
def lse_of_weight_0():
    b = np.array([1, 0, 1], np.float32)
    want = np.exp(X) / (1 + np.exp(2))
    close(of_weights(jax.nn.logsumexp, X, b), np.where(b == 0, 0, want))
    close(of_weights(jaxsoftmax.logsumexp, X, b), want)
    for hidden in (nan, inf, 200):
        x = changed_one(X, 1, hidden)
        close(of_weights(jaxsoftmax.logsumexp, x, b), np.where(b == 0, 0, want))


@sums("what the backward keeps, with `where`")
def lse_keeps():
    x, where = jnp.ones((8, 16)), np.arange(16) < 9

    def kept(f):
        g = functools.partial(f, axis=-1, where=where)
        leaves = jax.tree.leaves(jax.jit(lambda x: jax.vjp(g, x))(x)[1])
        return sorted((k.dtype.name, k.size) for k in leaves)

    numbers = [("float32", 8)] * 2
    assert kept(LSES[1]) == [("bool", 16), *numbers, ("float32", 128)]
    theirs = [each for each in kept(LSES[0]) if each[1] == 128]
    assert theirs == [("bool", 128)] * 2 + [("float32", 128)] * 3


@sums("complex `a` or `b`")
def lse_of_complex():
    assert jax.nn.logsumexp(X + 0j).dtype == np.complex64
    assert jax.nn.logsumexp(X, b=X + 0j).dtype == np.complex64
    fails(jaxsoftmax.logsumexp, TypeError, X + 0j)
    fails(jaxsoftmax.logsumexp, TypeError, X, b=X + 0j)


@sums("bools as `a`")
def lse_of_bools():
    close(jax.nn.logsumexp(MASK), jax.nn.logsumexp(MASK.astype(int)))
    fails(jaxsoftmax.logsumexp, TypeError, MASK)


@sums("`a`, `b` or `where` a list")
def lse_of_lists():
    for given in ({"a": [0.0, 1.0]}, {"b": [1, 2, 3]}, {"where": [True, True, False]}):
        arrays = {k: np.array(v) for k, v in given.items()}
        fails(jax.nn.logsumexp, TypeError, **{"a": X, **given})
        want = jax.nn.logsumexp(**{"a": X, **arrays})
        close(jaxsoftmax.logsumexp(**{"a": X, **given}), want)


@sums("`b` or `where` of more dimensions than a")
def lse_of_higher_rank():
    masks = np.stack([MASK, ~MASK])
    for given in ({"where": masks}, {"b": masks.astype(np.float32)}):
        want = jax.nn.logsumexp(np.stack([X, X]), -1, **given)
        close(jax.nn.logsumexp(X, -1, **given), want)
        fails(jaxsoftmax.logsumexp, ValueError, X, -1, **given)
        close(jaxsoftmax.logsumexp(X[None], -1, **given), want)
        close(jax.nn.logsumexp(X[None], -1, **given), want)


@sums("`where` that is not bool")
def lse_where_of_numbers():
    fails(jax.nn.logsumexp, ValueError, X, where=MASK.astype(int))
    fails(jaxsoftmax.logsumexp, TypeError, X, where=MASK.astype(int))


@sums('`a` and `b` of two dtypes with `jax_numpy_dtype_promotion="strict"`')
def lse_of_two_dtypes():
    x, b = jnp.asarray(X), jnp.asarray(X, jnp.bfloat16)
    want = jax.nn.logsumexp(x, b=b)
    with jax.numpy_dtype_promotion("strict"):
        fails(jax.nn.logsumexp, PROMOTION, x, b=b)
        got = jaxsoftmax.logsumexp(x, b=b)
    assert got.dtype == want.dtype == np.float32
    close(got, want)


@sums("`axis=True`")
def lse_of_a_bool():
    x = np.ones((2, 3), np.float32)
    close(jax.nn.logsumexp(x, True), jax.nn.logsumexp(x, 1))
    fails(jaxsoftmax.logsumexp, TypeError, x, True)


@sums("`keepdims` and `return_sign` that are not bools")
def lse_of_flags():
    for name in ("keepdims", "return_sign"):
        jax.nn.logsumexp(X, **{name: 1})
        fails(jaxsoftmax.logsumexp, TypeError, X, **{name: 1})


@sums("`implementation`")
def lse_implementation():
    fails(jax.nn.logsumexp, TypeError, X, implementation="xla")
    close(jaxsoftmax.logsumexp(X, implementation="xla"), jax.nn.logsumexp(X))


# --- jax.nn: attention ----------------------------------------------------------------

pairs = functools.partial(line, "jax_nn", "dot_product_attention")
theirs, ours = jax.nn.dot_product_attention, jaxsoftmax.dot_product_attention
residual = functools.partial(functools.partial, return_residual=True)
RNG = np.random.default_rng(0)
# [batch, length, heads, head size]
Q, K, V = RNG.normal(size=(3, 2, 3, 4, 2)).astype(np.float32)
ALL = np.ones((2, 4, 3, 3), bool)
NOTHING_FOR_0 = ALL & (np.arange(3) > 0)[:, None]  # the first query sees no key


@pairs("a query without an allowed key")
def unseeing():
    out, lse = theirs(Q, K, V, mask=NOTHING_FOR_0, return_residual=True)
    close(out[:, 0], V.mean(1))
    assert np.all(lse[:, 0] < -2e38)
    assert np.all(np.isfinite(lse))

    def gradient(f):
        run = lambda v: f(Q, K, v, mask=NOTHING_FOR_0)[:, 0].sum()
        return jax.grad(run)(V)

    close(gradient(theirs), np.full_like(V, 1 / 3))
    close(gradient(ours), np.zeros_like(V))
    out, lse = ours(Q, K, V, mask=NOTHING_FOR_0, return_residual=True)
    close(out[:, 0], np.zeros_like(V[:, 0]))
    assert np.all(lse[:, 0] == -inf)
    short = {"key_value_seq_lengths": jnp.array([0, -1], jnp.int32)}
    close(theirs(Q, K, V, **short), np.broadcast_to(V.mean(1)[:, None], V.shape))
    close(ours(Q, K, V, **short), np.zeros_like(V))


@pairs("a query beyond `query_seq_lengths`")
def padded_query():
    lengths = jnp.array([1, 3], jnp.int32)
    for f, below in ((theirs, -2e38), (ours, -inf)):
        out, lse = f(Q, K, V, query_seq_lengths=lengths, return_residual=True)
        assert np.all(out[0, 1:] == 0)
        assert np.all(lse[0, 1:] <= below)
        assert np.all(np.isfinite(lse[0, 1:])) == (f is theirs)


@pairs("a bias of `-inf` for all keys of a query")
def infinite_bias():
    bias = np.where(NOTHING_FOR_0, 0, -inf).astype(np.float32)
    assert is_nan(theirs(Q, K, V, bias)[:, 0])
    out, lse = ours(Q, K, V, bias, return_residual=True)
    assert np.all(out[:, 0] == 0)
    assert np.all(lse[:, 0] == -inf)
    gradient = jax.grad(lambda q: ours(q, K, V, bias)[:, 0].sum())(Q)
    assert np.all(gradient == 0)


@pairs("NaN among keys and values beyond `key_value_seq_lengths`")
def padded_keys():
    lengths = jnp.array([2, 2], jnp.int32)
    k, v = K.copy(), V.copy()
    k[:, 2] = v[:, 2] = nan
    assert is_nan(theirs(Q, k, v, key_value_seq_lengths=lengths))
    close(ours(Q, k, v, key_value_seq_lengths=lengths), ours(Q, K[:, :2], V[:, :2]))


@pairs("`lse`")
def lse_dtype():
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in (Q, K, V))
    assert theirs(q, k, v, return_residual=True)[1].dtype == jnp.bfloat16
    assert ours(q, k, v, return_residual=True)[1].dtype == jnp.float32
    with jax.enable_x64(True):
        q, k, v = (jnp.asarray(x, jnp.float64) for x in (Q, K, V))
        for f in (theirs, ours):
            assert f(q, k, v, return_residual=True)[1].dtype == jnp.float64


@pairs("gradient of `lse`")
def lse_gradient():
    gradient = lambda f: jax.grad(lambda q: f(q, K, V, return_residual=True)[1].sum())
    assert np.all(gradient(theirs)(Q) == 0)
    logits = lambda q: jnp.einsum("btnh,bsnh->btns", q, K) / np.sqrt(2)
    want = jax.grad(lambda q: jax.nn.logsumexp(logits(q), axis=-1).sum())(Q)
    close(gradient(ours)(Q), want)


@pairs("dtypes of 16 bits")
def narrow_attention():
    wide = [3 * RNG.normal(size=(1, 64, 1, 8)) for _ in range(3)]
    wide = [np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32) for x in wide]
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in wide)
    assert theirs(q, k, v).dtype == ours(q, k, v).dtype == jnp.bfloat16
    want = theirs(*wide)
    error = lambda f: np.abs(np.asarray(f(q, k, v), np.float32) - want).mean()
    assert error(ours) < error(theirs)


@pairs("float8 dtypes")
def attention_in_8_bits():
    for dtype in (jnp.float8_e4m3fn, jnp.float8_e5m2):
        q, k, v = (jnp.asarray(x, dtype) for x in (Q, K, V))
        fails(theirs, PROMOTION, q, k, v)
        assert ours(q, k, v).dtype == dtype
        want = ours(*(jnp.asarray(x, jnp.float32) for x in (q, k, v)))
        close(ours(q, k, v), want, rtol=2 * float(jnp.finfo(dtype).eps), atol=0.05)


@pairs("integers, bools and complex numbers as `query`, `key` and `value`")
def other_numbers():
    for dtype in (np.int32, np.bool_, np.complex64):
        arrays = [x.astype(dtype) for x in (Q, K, V)]
        assert theirs(*arrays).dtype == dtype
        fails(ours, TypeError, *arrays)
    # weights below 1 are 0, so the mean of twos is 0
    ones = np.ones((1, 2, 1, 1), np.int32)
    assert np.all(theirs(ones, ones, 2 * ones) == 0)


@pairs("`query`, `key` and `value` of two dtypes")
def two_dtypes():
    q = jnp.asarray(Q, jnp.bfloat16)
    fails(theirs, ValueError, q, K, V)
    fails(ours, TypeError, q, K, V)


@pairs("a batch for some of the three only, or fewer than three dimensions")
def ranks():
    for q, k, v in ((Q[:1], K[0], V[0]), (Q[0], K[:1], V[:1]), (Q[0, 0],) * 3):
        assert theirs(q, k, v).shape == q.shape
        fails(ours, ValueError, q, k, v)


@pairs("`value` of another head size than `key`")
def head_sizes():
    fails(theirs, ValueError, Q, K, V[..., :1])
    close(ours(Q, K, V[..., :1]), ours(Q, K, V)[..., :1])


@pairs("no heads at all")
def no_heads():
    arrays = [x[:, :, :0] for x in (Q, K, V)]
    fails(theirs, ZeroDivisionError, *arrays)
    fails(ours, ValueError, *arrays)


@pairs("a head size of 0")
def no_head_size():
    arrays = [x[..., :0] for x in (Q, K, V)]
    out, lse = theirs(*arrays, return_residual=True)
    assert is_nan(lse)
    out, lse = ours(*arrays, return_residual=True)
    assert out.shape == (2, 3, 4, 0)
    close(lse, np.full((2, 3, 4), np.log(3)))


@pairs("a bias of integers, bools or complex numbers")
def other_bias():
    close(theirs(Q, K, V, NOTHING_FOR_0), ours(Q, K, V, 1.0 * NOTHING_FOR_0))
    for dtype in (np.int32, np.bool_, np.complex64):
        bias = ALL.astype(dtype)
        assert theirs(Q, K, V, bias).dtype == np.float32
        fails(ours, TypeError, Q, K, V, bias)


@pairs("`mask` that is not bool")
def other_mask():
    mask = NOTHING_FOR_0.astype(np.int32)
    fails(theirs, ValueError, Q, K, V, mask=mask)
    close(ours(Q, K, V, mask=mask), ours(Q, K, V, mask=NOTHING_FOR_0))
    fails(ours, ValueError, Q, K, V, mask=2 * mask)
    fails(jax.jit(lambda m: theirs(Q, K, V, mask=m)), ValueError, mask)
    fails(jax.jit(lambda m: ours(Q, K, V, mask=m)), TypeError, mask)


@pairs("a mask or a bias that does not broadcast")
def shapes_of_pairs():
    for error, x in ((AssertionError, ALL[:, :2]), (TypeError, ALL[:, :, :2])):
        fails(theirs, (error, ValueError), Q, K, V, mask=x)
        fails(ours, ValueError, Q, K, V, mask=x)
        fails(theirs, (error, ValueError), Q, K, V, 1.0 * x)
        fails(ours, ValueError, Q, K, V, 1.0 * x)


@pairs("lengths of other integers than int32")
def lengths_dtype():
    lengths = jnp.array([2, 1], jnp.int8)
    fails(theirs, ValueError, Q, K, V, key_value_seq_lengths=lengths)
    want = theirs(Q, K, V, key_value_seq_lengths=lengths.astype(jnp.int32))
    close(ours(Q, K, V, key_value_seq_lengths=lengths), want)


@pairs("lengths that are not integers")
def lengths_of_floats():
    lengths = jnp.array([2.0, 1.0])
    fails(theirs, ValueError, Q, K, V, key_value_seq_lengths=lengths)
    fails(ours, TypeError, Q, K, V, key_value_seq_lengths=lengths)


@pairs("more than one batch dimension")
def batch_dimensions():
    arrays = [x[None] for x in (Q, K, V)]
    fails(theirs, ValueError, *arrays)
    close(ours(*arrays)[0], ours(Q, K, V))


@pairs("one length for the whole batch")
def one_length():
    given = {"key_value_seq_lengths": jnp.int32(2)}
    fails(theirs, ValueError, Q, K, V, **given)
    close(ours(Q, K, V, **given), ours(Q, K[:, :2], V[:, :2]))


@pairs("`scale` that is inf or NaN")
def scale_not_finite():
    for scale in (inf, nan):
        assert is_nan(theirs(Q, K, V, scale=scale))
        fails(ours, ValueError, Q, K, V, scale=scale)


@pairs("`scale` for each head, with grouped heads")
def scale_of_grouped_heads():
    heads = K.shape[2]
    scales = np.linspace(0.2, 1, heads, dtype=np.float32)
    grouped = jnp.repeat(jnp.asarray(Q), 2, axis=2)
    want = theirs(grouped, K, V, scale=scales.reshape(heads, 1, 1))
    close(ours(grouped, K, V, scale=np.repeat(scales, 2).reshape(-1, 1, 1)), want)
    fails(ours, ValueError, grouped, K, V, scale=scales.reshape(heads, 1, 1))


@pairs("`scale=True`")
def scale_a_bool():
    close(theirs(Q, K, V, scale=True), theirs(Q, K, V, scale=1.0))
    fails(ours, TypeError, Q, K, V, scale=True)


@pairs("a negative side of `local_window_size`")
def negative_window():
    mean = np.broadcast_to(V.mean(1)[:, None], V.shape)
    close(theirs(Q, K, V, local_window_size=(-1, 0)), mean)
    fails(ours, ValueError, Q, K, V, local_window_size=(-1, 0))


@pairs("`local_window_size=2**31 - 1`")
def wide_window():
    given = {"local_window_size": 2**31 - 1}
    close(ours(Q, K, V, **given), ours(Q, K, V))
    assert np.abs(theirs(Q, K, V, **given) - ours(Q, K, V)).max() > 1e-2


@pairs("`local_window_size=sys.maxsize`")
def widest_window():
    fails(theirs, OverflowError, Q, K, V, local_window_size=sys.maxsize)
    close(ours(Q, K, V, local_window_size=sys.maxsize), ours(Q, K, V))


@pairs("`local_window_size` an integer of numpy")
def window_of_numpy():
    fails(theirs, TypeError, Q, K, V, local_window_size=np.int64(1))
    want = theirs(Q, K, V, local_window_size=1)
    close(ours(Q, K, V, local_window_size=np.int64(1)), want)


@pairs("`local_window_size` an array, or traced")
def window_an_array():
    want = theirs(Q, K, V, local_window_size=(1, 0))
    close(theirs(Q, K, V, local_window_size=jnp.array([1, 0])), want)
    fails(ours, TypeError, Q, K, V, local_window_size=jnp.array([1, 0]))
    traced = lambda f: jax.jit(lambda n: f(Q, K, V, local_window_size=(n, 0)))
    close(traced(theirs)(1), want)
    fails(traced(ours), TypeError, 1)


@pairs("`local_window_size=True`")
def window_a_bool():
    want = theirs(Q, K, V, local_window_size=1)
    close(theirs(Q, K, V, local_window_size=True), want)
    fails(ours, TypeError, Q, K, V, local_window_size=True)


@pairs("`is_causal` and `return_residual` that are not bools")
def flags():
    close(theirs(Q, K, V, is_causal="no"), theirs(Q, K, V, is_causal=True))
    assert len(theirs(Q, K, V, return_residual=1)) == 2
    fails(ours, TypeError, Q, K, V, is_causal="no")
    fails(ours, TypeError, Q, K, V, return_residual=1)


@pairs("`implementation` by default")
def default_implementation():
    texts = [
        jax.jit(lambda *x, o=o: theirs(*x, **o)).lower(*QKV).as_text()
        for o in ({}, {"implementation": "xla"})
    ]
    assert texts[0] == texts[1]
    x = jax.ShapeDtypeStruct((1, 128, 2, 64), jnp.bfloat16)
    on_gpu = jaxsoftmax.explain_for("cuda", "NVIDIA H100 80GB HBM3")(ours, x, x, x)
    assert "cudnn" in str(on_gpu)


@pairs("several names as `implementation`")
def several_implementations():
    fails(theirs, ValueError, Q, K, V, implementation=("cudnn", "xla"))
    close(ours(Q, K, V, implementation=("cudnn", "xla")), theirs(Q, K, V))


@pairs('`implementation="cudnn"` where it cannot run')
def no_cudnn():
    fails(theirs, RuntimeError, Q, K, V, implementation="cudnn")
    fails(ours, NotImplementedError, Q, K, V, implementation="cudnn")


@pairs('memory of `"xla"`')
def memory():
    def temporary(f, length):
        x = jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32)
        f = functools.partial(f, implementation="xla")
        compiled = jax.jit(lambda *qkv: f(*qkv)).lower(x, x, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(theirs, 2048) > 3.5 * temporary(theirs, 1024)
    assert temporary(ours, 2048) < 2.2 * temporary(ours, 1024)


@pairs('forward mode with `"cudnn"`')
def forward_mode_of_cudnn():
    if "cuda" not in {device.platform for device in jax.devices()}:
        pytest.skip("cuDNN needs an NVIDIA GPU")
    with jax.default_device(jax.devices("cuda")[0]):
        x = tuple(jnp.ones((1, 64, 1, 64), jnp.bfloat16) for _ in range(3))
        run = lambda f: jax.jvp(functools.partial(f, implementation="cudnn"), x, x)
        with pytest.raises(TypeError):
            run(theirs)
        assert run(ours)[1].shape == x[0].shape


@pairs(
    "`return_max_logits`, `query_offset`, `logits_soft_cap`, `sinks`, segment ids, "
    "dropout, `precision`"
)
def more_of_attention():
    assert len(ours(Q, K, V, return_max_logits=True)) == 2
    fails(theirs, TypeError, Q, K, V, return_max_logits=True)
    ids = jnp.zeros((2, 3), jnp.int32)
    for given in (
        {"query_offset": 3},
        {"logits_soft_cap": 30.0},
        {"sinks": jnp.zeros(4)},
        {"q_segment_ids": ids, "kv_segment_ids": ids},
        {"dropout_rate": 0.5, "dropout_key": jax.random.key(0)},
        {"precision": "highest"},
    ):
        fails(theirs, TypeError, Q, K, V, **given)
        assert ours(Q, K, V, **given).shape == Q.shape


# --- jax.nn: functions of other names -------------------------------------------------

other = functools.partial(line, "jax_nn", "Functions of other names")


@other("`jax.scipy.special.softmax` and `log_softmax`")
def scipy():
    x = np.ones((2, 3), np.float32)
    for name in BOTH:
        scipy_function, f = getattr(jax.scipy.special, name), getattr(jaxsoftmax, name)
        close(scipy_function(x), f(x, axis=None))
        close(scipy_function(x, axis=1), f(x))
        assert abs(scipy_function(x)[0, 0] - f(x)[0, 0]) > 0.1


# --- optax ----------------------------------------------------------------------------

LOGITS = np.array([[1.2, -0.8, -0.5], [0.9, -1.2, 1.1]], np.float32)
LABELS = np.array([0, 1])
ONE_HOT = np.eye(3, dtype=np.float32)[LABELS]
LOSSES = (
    (optax.softmax_cross_entropy_with_integer_labels, label_loss, LABELS),
    (optax.softmax_cross_entropy, dense_loss, ONE_HOT),
)
losses = functools.partial(line, "optax", "Both losses")
integer = functools.partial(line, "optax", "Integer labels")
dense = functools.partial(line, "optax", "Dense labels")
THEIR_LABELS, OUR_LABELS, _ = LOSSES[0]
THEIR_DENSE, OUR_DENSE, _ = LOSSES[1]


def changed(row, entry, value, of=LOGITS):
    array = of.copy()
    array[row, entry] = value
    return array


@functools.partial(jax.jit, static_argnums=0)
def slope(loss, logits, labels, **given):
    """The gradient of the sum of losses."""
    return jax.grad(lambda x: loss(x, labels, **given).sum())(jnp.asarray(logits))


@losses("dtype of the loss, logits of 16 bits")
def loss_dtype():
    for dtype in (jnp.bfloat16, jnp.float16):
        logits = jnp.asarray(LOGITS, dtype)
        narrow = jnp.asarray(ONE_HOT, dtype)
        assert THEIR_LABELS(logits, LABELS).dtype == dtype
        assert THEIR_DENSE(logits, narrow).dtype == dtype
        assert THEIR_DENSE(logits, ONE_HOT).dtype == jnp.float32
        assert OUR_LABELS(logits, LABELS).dtype == jnp.float32
        assert OUR_DENSE(logits, narrow).dtype == jnp.float32
        for loss, labels in ((OUR_LABELS, LABELS), (OUR_DENSE, ONE_HOT)):
            assert slope(loss, logits, labels).dtype == dtype


@losses("arithmetic, logits of 16 bits")
def loss_arithmetic():
    logits = jnp.asarray(LOGITS, jnp.bfloat16)
    want = OUR_LABELS(jnp.asarray(logits, jnp.float32), LABELS)
    for optax_loss, mine, labels in LOSSES:
        close(mine(logits, labels), want)
        assert np.abs(optax_loss(logits, labels) - want).max() > 1e-3
    with jax.enable_x64(True):
        for optax_loss, mine, labels in LOSSES:
            logits = jnp.asarray(LOGITS, jnp.float64)
            close(optax_loss(logits, labels), mine(logits, labels))
            assert mine(logits, labels).dtype == np.float64


@losses("float8 logits")
def loss_in_8_bits():
    for dtype in (jnp.float8_e4m3fn, jnp.float8_e5m2):
        logits = jnp.asarray(LOGITS, dtype)
        assert THEIR_LABELS(logits, LABELS).dtype == dtype
        fails(THEIR_DENSE, PROMOTION, logits, ONE_HOT)
        want = OUR_LABELS(jnp.asarray(logits, jnp.float32), LABELS)
        for _, mine, labels in LOSSES:
            assert mine(logits, labels).dtype == jnp.float32
            close(mine(logits, labels), want)


@losses("a row of `-inf`")
def empty_example():
    logits = changed(0, slice(None), -inf)
    for optax_loss, mine, labels in LOSSES:
        assert is_nan(optax_loss(logits, labels)[0])
        assert mine(logits, labels)[0] == 0
        assert np.all(slope(mine, logits, labels)[0] == 0)
    assert is_nan(slope(THEIR_LABELS, logits, LABELS)[0])


@losses("a label on a logit of `-inf`")
def absent_label():
    logits = changed(0, 0, -inf)
    for optax_loss, mine, labels in LOSSES:
        assert optax_loss(logits, labels)[0] == mine(logits, labels)[0] == inf
        gradients = [slope(f, logits, labels) for f in (optax_loss, mine)]
        assert gradients[0][0, 0] == -1
        assert gradients[1][0, 0] == 0
        close(gradients[0][:, 1:], gradients[1][:, 1:])


@losses("gradient at the label where it dominates")
def sure_example():
    logits = np.array([[20.0, 0, 0]], np.float32)
    want = -2 / (np.exp(20.0) + 2)
    for optax_loss, mine, labels in LOSSES:
        errors = [
            slope(f, logits, labels[:1])[0, 0] / want - 1 for f in (optax_loss, mine)
        ]
        assert abs(errors[1]) < 1e-5 < 1e-2 < abs(errors[0])


@losses("`where` that is not bool")
def loss_where_of_numbers():
    for optax_loss, mine, labels in LOSSES:
        fails(optax_loss, ValueError, LOGITS, labels, where=np.ones((2, 3), np.int32))
        fails(mine, TypeError, LOGITS, labels, where=np.ones((2, 3), np.int32))


@losses("a mask of classes that is larger than the logits")
def larger_mask():
    where = np.array([[True, True, True], [True, True, False]])
    for optax_loss, mine, labels in LOSSES:
        assert optax_loss(LOGITS[:1], labels[:1], where=where).shape == (2,)
        fails(mine, ValueError, LOGITS[:1], labels[:1], where=where)


@losses("lists")
def loss_of_lists():
    for optax_loss, mine, labels in LOSSES:
        want = mine(LOGITS, labels)
        fails(optax_loss, TypeError, LOGITS.tolist(), labels)
        # A list times an array of numpy is none: what comes is jax's.
        fails(optax_loss, TypeError, jnp.asarray(LOGITS), labels.tolist())
        close(mine(LOGITS.tolist(), labels.tolist()), want)
        fails(optax_loss, AttributeError, LOGITS, labels, where=[True, False])
        close(mine(LOGITS, labels, where=[True, False]), [want[0], 0])


@losses(
    "`ignore_index`, `label_smoothing`, `z_loss`, `logits_soft_cap`, `scale`, "
    "`class_weights`, `sample_weights`, `reduction`, `return_lse`, `return_aux`, "
    "`implementation`"
)
def more_of_losses():
    given = {
        "ignore_index": -1,
        "label_smoothing": 0.1,
        "z_loss": 0.1,
        "logits_soft_cap": 30.0,
        "scale": 2.0,
        "class_weights": np.ones(3, np.float32),
        "reduction": "sum",
        "sample_weights": np.ones(2, np.float32),
        "return_lse": True,
        "return_aux": True,
        "implementation": "xla",
    }
    for optax_loss, mine, labels in LOSSES:
        for name, value in given.items():
            fails(optax_loss, TypeError, LOGITS, labels, **{name: value})
            if name == "ignore_index" and mine is OUR_DENSE:
                fails(mine, TypeError, LOGITS, labels, **{name: value})
            else:
                mine(LOGITS, labels, **{name: value})
        fails(mine, TypeError, LOGITS, labels, -1, None, 0.1)


@integer("a negative label")
def negative_label():
    labels = np.array([-1, 1])
    close(THEIR_LABELS(LOGITS, labels), THEIR_LABELS(LOGITS, np.array([2, 1])))
    loss = OUR_LABELS(LOGITS, labels)
    assert is_nan(loss[0])
    assert np.isfinite(loss[1])
    assert OUR_LABELS(LOGITS, labels, ignore_index=-1)[0] == 0


@integer("gradient for a label that is no class")
def gradient_of_no_class():
    labels = np.array([3, 1])
    assert is_nan(THEIR_LABELS(LOGITS, labels)[0])
    assert is_nan(OUR_LABELS(LOGITS, labels)[0])
    close(slope(THEIR_LABELS, LOGITS, labels)[0], jaxsoftmax.softmax(LOGITS[0]))
    assert is_nan(slope(OUR_LABELS, LOGITS, labels)[0])
    chosen = lambda x: OUR_LABELS(x, labels)[1]
    assert np.all(jax.grad(chosen)(LOGITS)[0] == 0)


@integer("a label whose class `where` masks")
def masked_label():
    where = np.array([[False, True, True], [True, True, True]])
    assert THEIR_LABELS(LOGITS, LABELS, where=where)[0] < 0
    assert OUR_LABELS(LOGITS, LABELS, where=where)[0] == inf
    assert slope(THEIR_LABELS, LOGITS, LABELS, where=where)[0, 0] == -1
    assert slope(OUR_LABELS, LOGITS, LABELS, where=where)[0, 0] == 0


@integer("`+inf` at another class than the label's")
def infinite_class():
    logits = changed(0, 2, inf)
    assert THEIR_LABELS(logits, LABELS)[0] == inf
    assert is_nan(OUR_LABELS(logits, LABELS)[0])
    for optax_loss, mine, labels in LOSSES:
        at_label = changed(0, 0, inf)
        assert is_nan(optax_loss(at_label, labels)[0])
        assert is_nan(mine(at_label, labels)[0])


@integer("no classes")
def no_classes():
    logits = np.ones((2, 0), np.float32)
    assert np.all(THEIR_LABELS(logits, LABELS) == -inf)
    assert is_nan(OUR_LABELS(logits, LABELS))


@integer("logits that share a large number")
def large_logits():
    logits = np.full((1, 3), LOWEST, np.float32)
    assert THEIR_LABELS(logits, LABELS[:1]) == 0
    close(OUR_LABELS(logits, LABELS[:1]), [np.log(3)])
    logits = np.full((1, 3), 1e6, np.float32)
    assert abs(THEIR_LABELS(logits, LABELS[:1])[0] - np.log(3)) > 1e-2
    close(OUR_LABELS(logits, LABELS[:1]), [np.log(3)])


@integer("`axis=None`, a list or an integer of numpy as `axis`")
def other_axis():
    for axis, label in ((None, 4), ([0, 1], 4), (np.int64(1), LABELS)):
        fails(THEIR_LABELS, ValueError, LOGITS, jnp.array(label), axis)
        same = 1 if isinstance(axis, np.int64) else (0, 1)
        want = THEIR_LABELS(LOGITS, jnp.array(label), same)
        close(OUR_LABELS(LOGITS, label, axis), want)


@integer("`axis=True`")
def loss_axis_a_bool():
    close(THEIR_LABELS(LOGITS, LABELS, True), THEIR_LABELS(LOGITS, LABELS, 1))
    fails(OUR_LABELS, TypeError, LOGITS, LABELS, True)


@dense("a logit of `-inf` with the label 0")
def weightless_class():
    logits = changed(0, 2, -inf)
    assert is_nan(THEIR_DENSE(logits, ONE_HOT)[0])
    close(OUR_DENSE(logits, ONE_HOT), OUR_LABELS(logits, LABELS))


@dense("gradient for labels behind `where`")
def masked_weights():
    where = np.array([[False, True, True], [True, True, True]])
    gradient = lambda f: jax.grad(lambda t: f(LOGITS, t, where=where).sum())(ONE_HOT)
    assert is_nan(gradient(THEIR_DENSE)[0, 0])
    assert gradient(OUR_DENSE)[0, 0] == 0
    close(gradient(THEIR_DENSE)[1], gradient(OUR_DENSE)[1])


@dense("labels of the batch's shape, where that is also the classes'")
def labels_like_indices():
    logits, labels = LOGITS[:, :2], np.array([0.5, 0.5], np.float32)
    want = THEIR_DENSE(logits, np.stack([labels, labels]))
    close(THEIR_DENSE(logits, labels), want)
    fails(OUR_DENSE, ValueError, logits, labels)
    close(OUR_DENSE(logits, labels[None]), want)


@dense("labels that have more classes than the logits")
def more_classes():
    assert np.all(THEIR_DENSE(LOGITS[:, :1], ONE_HOT) == 0)
    fails(OUR_DENSE, ValueError, LOGITS[:, :1], ONE_HOT)


@dense("complex labels")
def complex_labels():
    assert THEIR_DENSE(LOGITS, ONE_HOT + 0j).dtype == np.complex64
    fails(OUR_DENSE, TypeError, LOGITS, ONE_HOT + 0j)


elsewhere = functools.partial(line, "optax", "Functions of other names")


@elsewhere("`optax.safe_softmax_cross_entropy`")
def safe():
    logits = changed(0, 2, -inf)
    close(optax.safe_softmax_cross_entropy(logits, ONE_HOT), OUR_DENSE(logits, ONE_HOT))
    parameters = inspect.signature(optax.safe_softmax_cross_entropy).parameters
    assert list(parameters) == ["logits", "labels"]
    logits = changed(0, slice(None), -inf)
    assert is_nan(optax.safe_softmax_cross_entropy(logits, ONE_HOT)[0])
    assert OUR_DENSE(logits, ONE_HOT)[0] == 0


@elsewhere("`optax.ranking_softmax_loss`, `optax.losses.sparsemax_loss` and the others")
def not_replaced():
    names = [name for name in dir(optax.losses) if name[0] != "_"]
    shared = [name for name in names if hasattr(jaxsoftmax, name)]
    assert sorted(shared) == sorted(f.__name__ for f, _, _ in LOSSES)


# --- Flax -----------------------------------------------------------------------------

flax_line = functools.partial(line, "flax", "Differences from Flax")
attention_fn = jaxsoftmax.flax.attention_fn
LINEN, NNX = linen.dot_product_attention, nnx.dot_product_attention
OF_FLAX = (LINEN, NNX)
QKV = (Q, K, V)
NARROW = tuple(jnp.asarray(x, jnp.bfloat16) for x in QKV)
CHECKS_RATE = "dropout_rate must be" in inspect.getsource(sys.modules[NNX.__module__])


@flax_line("a query that may attend to no key")
def unseeing_in_flax():
    run = lambda f, v: f(Q, K, v, mask=NOTHING_FOR_0)[:, 0]
    for f in OF_FLAX:
        close(run(f, V), V.mean(1))
    assert np.all(run(attention_fn, V) == 0)
    assert np.all(jax.grad(lambda v: run(attention_fn, v).sum())(V) == 0)


@flax_line("a bias of `-inf` for all keys of a query")
def infinite_bias_in_flax():
    bias = np.where(NOTHING_FOR_0, 0, -inf).astype(np.float32)
    for f in OF_FLAX:
        assert is_nan(f(Q, K, V, bias)[:, 0])
    assert np.all(attention_fn(Q, K, V, bias)[:, 0] == 0)
    gradient = jax.grad(lambda q: attention_fn(q, K, V, bias)[:, 0].sum())(Q)
    assert np.all(gradient == 0)


def kept_of(f, *arrays):
    """How many arrays of a weight for each pair the backward keeps."""
    _, pull = jax.jit(lambda *qkv: jax.vjp(f, *qkv))(*arrays)
    return sum(x.size >= 64 * 64 for x in jax.tree.leaves(pull))


@flax_line("what the backward keeps")
def kept_in_flax():
    arrays = [jnp.ones((1, 64, 1, 2))] * 3
    for f in OF_FLAX:
        assert kept_of(f, *arrays) > 0
    assert kept_of(attention_fn, *arrays) == 0


@flax_line(
    "... with `module`, einsums of one's own, or `force_fp32_for_softmax` on 16-bit "
    "inputs"
)
def kept_weights():
    einsums = ("qk_attn_weights_einsum", "attn_weights_value_einsum")
    given = dict.fromkeys(einsums, jnp.einsum)
    arrays = [jnp.ones((1, 64, 1, 2), jnp.bfloat16)] * 3
    for options in (given, {"force_fp32_for_softmax": True}):
        assert kept_of(functools.partial(LINEN, **options), *arrays) > 0
        assert kept_of(functools.partial(attention_fn, **options), *arrays) == 1


@flax_line("logits of 16-bit inputs")
def narrow_in_flax():
    arrays = [3 * RNG.normal(size=(1, 64, 1, 8)) for _ in range(3)]
    narrow = [jnp.asarray(x, jnp.bfloat16) for x in arrays]
    want = attention_fn(*(jnp.asarray(x, jnp.float32) for x in narrow))
    error = lambda f: np.abs(np.asarray(f(*narrow), np.float32) - want).mean()
    for f in OF_FLAX:
        assert error(attention_fn) < error(f)


@flax_line("integer inputs")
def integers_in_flax():
    arrays = [x.astype(np.int32) for x in QKV]
    for f in OF_FLAX:
        assert f(*arrays).dtype == np.float32
    fails(attention_fn, TypeError, *arrays)


@flax_line("complex inputs")
def complex_in_flax():
    arrays = [x + 0j for x in QKV]
    for f in OF_FLAX:
        assert f(*arrays).dtype == np.complex64
    fails(attention_fn, TypeError, *arrays)


@flax_line("`dtype` that is not floating")
def dtype_in_flax():
    for f, error in ((LINEN, ValueError), (NNX, ValueError), (attention_fn, TypeError)):
        fails(f, error, *QKV, dtype=jnp.int32)


@flax_line("a bias of integers or bools")
def bias_in_flax():
    for dtype in (np.int32, np.bool_):
        for f in OF_FLAX:
            want = attention_fn(*QKV, 1.0 * NOTHING_FOR_0)
            close(f(*QKV, NOTHING_FOR_0.astype(dtype)), want)
        fails(attention_fn, TypeError, *QKV, NOTHING_FOR_0.astype(dtype))


@flax_line("a complex mask")
def complex_mask():
    for f in OF_FLAX:
        close(f(*QKV, mask=ALL * 1j), f(*QKV))
    fails(attention_fn, TypeError, *QKV, mask=ALL * 1j)


@flax_line("a mask or a bias for a larger batch")
def larger_batch():
    arrays = [x[:1] for x in QKV]
    for given in ({"mask": ALL}, {"bias": 1.0 * ALL}):
        assert LINEN(*arrays, **given).shape == Q.shape
        fails(NNX, TypeError, *arrays, **given)
        fails(attention_fn, ValueError, *arrays, **given)


@flax_line("fewer key heads than query heads")
def grouped_heads():
    k, v = K[:, :, :2], V[:, :, :2]
    fails(LINEN, AssertionError, Q, k, v)
    close(attention_fn(Q, k, v), NNX(Q, k, v))


@flax_line("`value` of another depth than `key`")
def other_depth():
    fails(NNX, ValueError, Q, K, V[..., :1])
    close(attention_fn(Q, K, V[..., :1]), LINEN(Q, K, V[..., :1]))
    dropped = {"dropout_rate": 0.5, "dropout_rng": jax.random.key(0)}
    close(attention_fn(Q, K, V[..., :1], **dropped), NNX(Q, K, V[..., :1], **dropped))


@flax_line("shapes that do not fit")
def shapes_in_flax():
    for arrays in ((Q, K, V[:, :2]), (Q[:1], K, V), (Q[..., :1], K, V)):
        fails(LINEN, AssertionError, *arrays)
        fails(NNX, ValueError, *arrays)
        fails(attention_fn, ValueError, *arrays)
    for f, error in (
        (LINEN, IndexError),
        (NNX, IndexError),
        (attention_fn, ValueError),
    ):
        fails(f, error, *(x[0, 0] for x in QKV))


@flax_line("`is_causal` in Linen")
def causal_linen():
    fails(LINEN, TypeError, *QKV, is_causal=True)
    causal = functools.partial(attention_fn, is_causal=True)
    close(causal(*QKV), NNX(*QKV, is_causal=True))


@flax_line("`is_causal` with dropout and a mask that queries share")
def causal_dropout():
    given = {"dropout_rate": 0.5, "dropout_rng": jax.random.key(0), "is_causal": True}
    fails(NNX, ValueError, *QKV, mask=ALL[:1, :1, :1], **given)
    want = NNX(*QKV, mask=ALL[:1, :1], **given)
    close(attention_fn(*QKV, mask=ALL[:1, :1, :1], **given), want)


@flax_line("`precision` without dropout")
def precision():
    text = lambda f: jax.jit(functools.partial(f, precision="highest")).lower(*QKV)
    assert "HIGHEST" not in text(NNX).as_text()
    assert "HIGHEST" in text(LINEN).as_text()
    assert "HIGHEST" in text(attention_fn).as_text()


@flax_line("`promote_dtype`")
def promote_dtype():
    given = {"promote_dtype": lambda arrays, dtype: arrays}
    close(NNX(*QKV, **given), attention_fn(*QKV))
    fails(LINEN, TypeError, *QKV, **given)
    fails(attention_fn, TypeError, *QKV, **given)


@flax_line("`einsum_dot_general`")
def einsum_dot_general():
    given = {"einsum_dot_general": jax.lax.dot_general}
    close(LINEN(*QKV, **given), attention_fn(*QKV))
    fails(NNX, TypeError, *QKV, **given)
    fails(attention_fn, NotImplementedError, *QKV, **given)


@flax_line("`deterministic` and `broadcast_dropout` that are not bools")
def flags_in_flax():
    dropped = {"dropout_rate": 0.5, "dropout_rng": jax.random.key(0)}
    for f in OF_FLAX:
        close(f(*QKV, deterministic=1, **dropped), f(*QKV))
        f(*QKV, broadcast_dropout=1, **dropped)
    fails(attention_fn, TypeError, *QKV, deterministic=1, **dropped)
    fails(attention_fn, TypeError, *QKV, broadcast_dropout=1, **dropped)


@flax_line("`dropout_rate` outside of [0, 1)")
def dropout_rates():
    rng = jax.random.key(0)
    for rate in (-1.0, 1.0, 2.0):
        fails(attention_fn, ValueError, *QKV, dropout_rate=rate, dropout_rng=rng)
        if CHECKS_RATE:
            fails(NNX, ValueError, *QKV, dropout_rate=rate, dropout_rng=rng)
    for f in (LINEN,) if CHECKS_RATE else OF_FLAX:
        run = functools.partial(f, *QKV, dropout_rng=rng)
        close(run(dropout_rate=-1.0), f(*QKV))
        assert is_nan(run(dropout_rate=1.0))
        assert np.all(run(dropout_rate=2.0) == 0)


@flax_line("dropout without a key")
def no_key():
    fails(LINEN, TypeError, *QKV, dropout_rate=0.5)
    fails(NNX, ValueError if CHECKS_RATE else TypeError, *QKV, dropout_rate=0.5)
    fails(attention_fn, ValueError, *QKV, dropout_rate=0.5)


@flax_line("weights that dropout drops")
def dropped_weights():
    for f in OF_FLAX:
        for shared in (True, False):
            given = {"dropout_rate": 0.5, "broadcast_dropout": shared}
            rng = jax.random.key(1)
            want = f(*QKV, dropout_rng=rng, **given)
            close(attention_fn(*QKV, dropout_rng=rng, **given), want)
        rng = jax.random.key(1, impl="rbg")
        want = f(*QKV, dropout_rng=rng, **given)
        got = attention_fn(*QKV, dropout_rng=rng, **given)
        assert np.abs(got - want).max() > 1e-2


@flax_line(
    "`scale`, `logits_soft_cap`, `local_window_size`, `query_offset`, `implementation`"
)
def more_in_flax():
    for given in (
        {"scale": 2.0},
        {"logits_soft_cap": 30.0},
        {"local_window_size": 1},
        {"query_offset": 1},
        {"implementation": "xla"},
    ):
        for f in OF_FLAX:
            fails(f, TypeError, *QKV, **given)
        assert functools.partial(attention_fn, **given)(*QKV).shape == Q.shape


@pytest.mark.parametrize("key", TESTS, ids=lambda key: f"{key[0]}-{key[2]}")
def test_line(key):
    TESTS[key]()


# --- signatures -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("original", "mine"),
    [
        *each(*BOTH, "logsumexp", "dot_product_attention"),
        *((a, b) for a, b, _ in LOSSES),
    ],
    ids=lambda f: f"{f.__module__.split('.')[0]}.{f.__name__}",
)
def test_the_leading_parameters_are_the_originals(original, mine):
    """Names, order, kinds and defaults; what is added is keyword-only."""
    wanted, found = (
        list(inspect.signature(f).parameters.values()) for f in (original, mine)
    )
    leading = [(p.name, p.kind, p.default) for p in found[: len(wanted)]]
    assert leading == [(p.name, p.kind, p.default) for p in wanted]
    added = found[len(wanted) :]
    assert {p.kind for p in added} == {inspect.Parameter.KEYWORD_ONLY}
    assert all(p.default is not inspect.Parameter.empty for p in added)


@pytest.mark.parametrize("original", OF_FLAX, ids=["linen", "nnx"])
def test_attention_fn_has_the_parameters_of_flax(original):
    """The common ones in order; not `promote_dtype`, which no module passes."""
    wanted, found = (inspect.signature(f).parameters for f in (original, attention_fn))
    assert list(found)[:12] == list(wanted)[:12]
    for name, parameter in wanted.items():
        if name != "promote_dtype":
            assert found[name].default == parameter.default
            assert found[name].kind == parameter.kind


# --- values and gradients -------------------------------------------------------------

LARGE = RNG.normal(size=(2, 3, 4)).astype(np.float32)
ROW_CASES = {
    "default": (X,),
    "positional": (X, -1, MASK),
    "by name": {"x": X, "axis": 0, "where": MASK},
    "axis in front": (LARGE, 0),
    "axis from the end": (LARGE, -2),
    "two axes": (LARGE, (0, -1)),
    "all axes": (LARGE, None),
    "no axes": (LARGE, ()),
    "a mask that broadcasts": (LARGE, 1, np.array([[True], [False], [True]])),
    "a mask larger than x": (X[None], -1, np.stack([MASK, ~MASK])),
    "... along axis": (X[:1], 0, MASK),
    "a mask of one value": (X, -1, True),
    "nothing present": (X, -1, False),
    "NaN behind the mask": (np.array([0, 1, nan], np.float32), -1, MASK),
    "inf behind the mask": (np.array([0, 1, inf], np.float32), -1, MASK),
    "-inf": (np.array([0, 1, -inf], np.float32),),
    "NaN in one row": (np.array([[0, nan], [0, 1]], np.float32),),
    "inf in one row": (np.array([[0, inf], [0, 1]], np.float32),),
    "inf and a masked entry": (np.array([inf, 0, 0], np.float32), -1, MASK),
    "lowest numbers": (np.full(3, LOWEST, np.float32),),
    "large numbers": (np.array([1e30, 1, -1e30], np.float32),),
    "no entries": (np.ones((2, 0), np.float32),),
    "no rows": (np.ones((0, 2), np.float32),),
    "a scalar": (np.float32(2), None),
    "a Python number": (2.0, None),
    "a variable of Flax": (nnx.Param(jnp.asarray(X)), -1, nnx.Param(jnp.asarray(MASK))),
    "integers": (np.arange(3),),
    "small integers": (np.arange(3, dtype=np.int8),),
}


def value_and_gradient(f, case):
    """And the gradient, in the first argument, of a weighted sum; None of integers."""
    args, named = (case, {}) if isinstance(case, tuple) else ((), case)
    value = f(*args, **named)
    if named:
        args, named = (case["x"],), {k: v for k, v in case.items() if k != "x"}
    first = args[0][...] if isinstance(args[0], nnx.Param) else args[0]
    if not jnp.issubdtype(jnp.result_type(first), jnp.floating):
        return value, None
    weight = jnp.arange(1.0, value.size + 1, dtype=value.dtype).reshape(value.shape)
    weight = jnp.where(jnp.isneginf(value), 0, weight)  # has lines of its own
    _, pull = jax.vjp(lambda x: f(x, *args[1:], **named), jnp.asarray(first))
    return value, pull(weight)[0]


@functools.cache
def in_one_program(f, group):
    """What a function makes of all cases, or the error: compiled once, to be quick."""
    cases, run = GROUPS[group]
    errors = {}

    @jax.jit
    def program():
        found = {}
        for name, case in cases.items():
            try:
                found[name] = run(f, case)
            except Exception as error:  # one case must not hide the others
                errors[name] = error
        return found

    return program() | errors


def same(got, want, **tolerances):
    if isinstance(got, Exception):
        raise got
    for mine, original in zip(got, want, strict=True):
        if original is not None:
            assert (mine.dtype, mine.shape) == (original.dtype, original.shape)
            close(mine, original, **tolerances)
    assert got[0].weak_type == want[0].weak_type


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("case", ROW_CASES)
def test_softmax_is_that_of_jax(name, case):
    pair = each(name)[0]
    want, got = (in_one_program(f, "rows")[case] for f in pair)
    same(got, want, atol=1e-5)


@pytest.mark.parametrize("name", BOTH)
def test_errors_of_softmax_are_those_of_jax(name):
    for f in (getattr(jax.nn, name), getattr(jaxsoftmax, name)):
        for error, *args in (
            (TypeError, np.array([True, False])),
            (TypeError, None),
            (TypeError, "text"),
            (TypeError, X, 1.0),
            (ValueError, X, 1),
            (ValueError, X, (0, -1)),
            (ValueError, 1.0),
            (ValueError, X, -1, np.ones(2, bool)),
        ):
            fails(f, error, *args)


def test_logsumexp_of_scipy_is_that_of_nn():
    assert jax.scipy.special.logsumexp is jax.nn.logsumexp


POSITIVE = np.array([0.5, 2, 3], np.float32)
LSE_CASES = {
    "default": (X,),
    "axis in front": (LARGE, 0),
    "two axes": (LARGE, (0, -1)),
    "axis a list": (LARGE, [0, 1]),
    "all axes": (LARGE,),
    "no axes": (LARGE, ()),
    "weights": (X, None, POSITIVE),
    "weights of both signs": (X, -1, np.array([1, -2, 3], np.float32)),
    "a negative sum": (X, -1, np.array([1, 2, -3], np.float32)),
    "a weight of 0": (X, -1, np.array([1, 0, 2], np.float32)),
    "weights of 0": (X, -1, np.zeros(3, np.float32), False, True),
    "NaN of weight 0": (changed_one(X, 1, nan), 0, np.array([1, 0, 1], np.float32)),
    "a number as weight": (X, -1, 2.0),
    "integers as weights": (X, -1, np.array([1, 2, 3])),
    "bools as weights": (X, -1, MASK),
    "weights that broadcast": (LARGE, 1, np.array([[1.0], [2], [-3]], np.float32)),
    "weights larger than x": (X[None], -1, np.stack([POSITIVE, 2 * POSITIVE])),
    "weights in another dtype": (X, -1, jnp.asarray(POSITIVE, jnp.bfloat16)),
    "keepdims": (LARGE, 1, None, True),
    "sign": (X, -1, np.array([1, 2, -3], np.float32), False, True),
    "sign alone": (LARGE, 1, None, True, True),
    "where": (X, -1, None, False, False, MASK),
    "a mask larger than x": (X[None], -1, None, False, False, np.stack([MASK, ~MASK])),
    "everything": (LARGE, (0, 2), LARGE - 1, True, True, LARGE < 0.5),
    "by name": {"a": X, "where": MASK, "b": POSITIVE, "keepdims": True},
    "nothing present": (X, -1, None, False, True, False),
    "NaN behind the mask": (changed_one(X, 2, nan), -1, None, False, False, MASK),
    "NaN weight behind the mask": (X, 0, changed_one(X, 2, nan), False, False, MASK),
    "-inf": (np.array([0, 1, -inf], np.float32),),
    "NaN in one row": (np.array([[0, nan], [0, 1]], np.float32), -1),
    "lowest numbers": (np.full(3, LOWEST, np.float32),),
    "large numbers": (np.array([1e30, 1, -1e30], np.float32),),
    "no entries": (np.ones((2, 0), np.float32), -1),
    "no rows": (np.ones((0, 2), np.float32), -1),
    "a scalar": (np.float32(2),),
    "a Python number": (2.0,),
    "integers": (np.arange(3),),
    "unsigned integers": (np.arange(3, dtype=np.uint8),),
}


def sums_and_gradients(f, case):
    """The value, with its sign where that is asked for, and gradients in a and b."""
    args, named = (case, {}) if isinstance(case, tuple) else ((), case)
    names = ("a", "axis", "b", "keepdims", "return_sign", "where")
    given = dict(zip(names, args, strict=False)) | named
    found = jax.tree.leaves(f(*args, **named))
    arrays = {k: a for k, a in given.items() if k in ("a", "b") and hasattr(a, "dtype")}
    moving = [k for k, a in arrays.items() if jnp.issubdtype(a.dtype, jnp.floating)]

    def value(arrays):
        return jax.tree.leaves(f(**(given | arrays)))[0]

    _, pull = jax.vjp(value, {k: jnp.asarray(given[k]) for k in moving})
    y = found[0]
    weight = jnp.arange(1.0, y.size + 1, dtype=y.dtype).reshape(y.shape)
    pulled = pull(jnp.where(jnp.isneginf(y), 0, weight))[0]
    if "b" in pulled:  # where that is 0 has a line of its own
        pulled["b"] = jnp.where(given["b"] == 0, 0, pulled["b"])
    return *found, *(pulled[k] for k in moving)


@pytest.mark.parametrize("case", LSE_CASES)
def test_logsumexp_is_that_of_jax(case):
    want, got = (in_one_program(f, "logsumexp")[case] for f in LSES)
    same(got, want, atol=1e-5)


SCALES = np.array([0.0, 0.5, -1.0, 2.0], np.float32)
ATTENTION_CASES = {
    "default": {},
    "causal": {"is_causal": True},
    "bias": {"bias": RNG.normal(size=(1, 4, 3, 3)).astype(np.float32)},
    "mask": {"mask": ALL & (np.arange(3) > 0)},
    "mask of three dimensions": {"mask": ALL[0] & (np.arange(3) > 0)},
    "lengths": {"key_value_seq_lengths": jnp.array([2, 1], jnp.int32)},
    "window": {"local_window_size": (1, 0)},
    "scale": {"scale": 2},
    "scale, an array": {"scale": jnp.float32(0.3)},
    "scale of 0": {"scale": 0.0},
    "scale below 0": {"scale": -1.0},
    "a scale for each head": {"scale": SCALES.reshape(4, 1, 1)},
    "a scale for each key": {"scale": SCALES[1:]},
    "grouped heads, no batch": {"arrays": (Q[0], K[0, :, :2], V[0, :, :2])},
    "a bias of the lowest numbers": {
        "bias": np.where(NOTHING_FOR_0, 0, LOWEST / 2).astype(np.float32)
    },
}


def attended(f, options):
    """The result, lse and the gradients of a sum in all three arrays."""
    arrays = options.get("arrays", QKV)
    options = {k: v for k, v in options.items() if k != "arrays"}
    attend = functools.partial(f, **options, return_residual=True)
    out, pull, lse = jax.vjp(attend, *map(jnp.asarray, arrays), has_aux=True)
    return out, lse, *pull(jnp.ones_like(out))


@pytest.mark.parametrize("case", ATTENTION_CASES)
def test_attention_is_that_of_jax(case):
    want, got = (in_one_program(f, "attention")[case] for f in (theirs, ours))
    same(got, want, rtol=1e-4, atol=1e-5)


def test_a_scale_of_attention_is_differentiable():
    for scale in (0.3, SCALES.reshape(4, 1, 1)):
        gradients = [
            pulled(lambda s, f=f: f(*QKV, scale=s), jnp.float32(scale), Q)
            for f in (theirs, ours)
        ]
        close(gradients[1], gradients[0], rtol=1e-4)


WHERE = np.array([[True, True, False], [True, True, True]])
LABEL_CASES = {
    "default": (LOGITS, LABELS),
    "axis 0": (LOGITS, np.array([0, 1, 0]), 0),
    "two axes": (LOGITS, np.array(4), (0, 1)),
    "two axes in reverse": (LOGITS, np.array(4), (1, 0)),
    "classes masked": (LOGITS, LABELS, -1, WHERE),
    "examples masked": (LOGITS, LABELS, -1, np.array([True, False])),
    "examples masked, two dimensions": (
        LOGITS,
        LABELS,
        -1,
        np.array([[True], [False]]),
    ),
    "nothing present": (LOGITS, LABELS, -1, np.zeros((2, 3), bool)),
    "NaN in a masked example": (
        changed(0, 1, nan),
        LABELS,
        -1,
        np.array([False, True]),
    ),
    "NaN in a masked class": (changed(0, 2, nan), LABELS, -1, WHERE),
    "a class of -inf": (changed(0, 2, -inf), LABELS),
    "labels of one number": (LOGITS, np.array([1])),
    "labels for one row": (LOGITS[:1], LABELS),
    "unsigned labels": (LOGITS, LABELS.astype(np.uint8)),
    "a Python label": (LOGITS[0], 0),
    "no examples": (np.ones((0, 3), np.float32), np.zeros(0, np.int32)),
}
DENSE_CASES = {
    "default": (LOGITS, ONE_HOT),
    "axis 0": (LOGITS, ONE_HOT, 0),
    "all axes": (LOGITS, ONE_HOT, None),
    "weights that do not sum to 1": (LOGITS, -2 * ONE_HOT + 1),
    "one row of weights": (LOGITS, ONE_HOT[0]),
    "one row of logits": (LOGITS[:1], ONE_HOT),
    "more dimensions of weights": (LOGITS, np.stack([ONE_HOT, 1 - ONE_HOT])),
    "a number": (LOGITS, np.float32(0.5)),
    "bools": (LOGITS, ONE_HOT > 0),
    "integers": (LOGITS, ONE_HOT.astype(np.int32)),
    "classes masked": (LOGITS, ONE_HOT, -1, WHERE),
    "a label masked": (LOGITS, ONE_HOT, -1, ~WHERE | (np.arange(3) == 1)),
    "examples masked": (LOGITS, ONE_HOT, -1, np.array([True, False])),
    "NaN in a masked class": (changed(0, 2, nan), ONE_HOT, -1, WHERE),
}


@pytest.mark.parametrize("case", LABEL_CASES)
def test_loss_of_labels_is_that_of_optax(case):
    want, got = (in_one_program(f, "labels")[case] for f in LOSSES[0][:2])
    same(got, want, atol=1e-5)


@pytest.mark.parametrize("case", DENSE_CASES)
def test_loss_of_weights_is_that_of_optax(case):
    want, got = (in_one_program(f, "weights")[case] for f in LOSSES[1][:2])
    same(got, want, atol=1e-5)


GROUPS = {
    "rows": (ROW_CASES, value_and_gradient),
    "logsumexp": (LSE_CASES, sums_and_gradients),
    "attention": (ATTENTION_CASES, attended),
    "labels": (LABEL_CASES, value_and_gradient),
    "weights": (DENSE_CASES, value_and_gradient),
}


# --- without jit ----------------------------------------------------------------------

PLAIN = {
    "softmax": (jax.nn.softmax, jaxsoftmax.softmax, (LOGITS, -1, WHERE)),
    "log_softmax": (jax.nn.log_softmax, jaxsoftmax.log_softmax, (LOGITS,)),
    "logsumexp": (*LSES, (LOGITS, -1)),
    "dot_product_attention": (theirs, ours, QKV),
    "integer labels": (THEIR_LABELS, OUR_LABELS, (LOGITS, LABELS)),
    "dense labels": (THEIR_DENSE, OUR_DENSE, (LOGITS, ONE_HOT)),
    "attention_fn, linen": (LINEN, attention_fn, QKV),
    "attention_fn, nnx": (NNX, attention_fn, QKV),
}
# The others' functions are run without jit by tests/core/test_debugging.py too.
OFTEN_PLAIN = ("attention_fn, linen",)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=[pytest.mark.slow] * (case not in OFTEN_PLAIN))
        for case in PLAIN
    ],
)
def test_values_and_gradients_without_jit(case):
    original, mine, arguments = PLAIN[case]
    want = jax.jit(lambda: value_and_gradient(original, arguments))()
    with jax.disable_jit():
        got = value_and_gradient(mine, arguments)
    same(got, want, rtol=1e-4, atol=1e-5)
