"""What a new user gets wrong, once each: the error says which argument, and what came.

A line of a table is a mistake: the call, the exception, and words of its message, in
order. Further cases, of each function alone, are in the test files of the modules.
"""

import functools
import pathlib
import re
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import ShapeDtypeStruct

import jaxsoftmax
from jaxsoftmax import (
    dot_product_attention,
    explain,
    explain_for,
    linear_softmax_cross_entropy,
    linear_token_logprobs_and_entropy,
    log_softmax,
    logsumexp,
    merge_attention,
    softmax,
    softmax_cross_entropy,
    softmax_cross_entropy_with_integer_labels,
    token_logprobs_and_entropy,
)
from jaxsoftmax.flax import attention_fn

PACKAGE = str(pathlib.Path(jaxsoftmax.__file__).parent)

# Any number of words between those that are named.
ANY = ".*"


def f32(*shape):
    return jnp.ones(shape)


def ints(*shape):
    return jnp.zeros(shape, jnp.int32)


def bools(*shape):
    return jnp.ones(shape, bool)


def traced(f, value):
    """What happens where `value` comes from outside of a jit."""
    return jax.jit(f)(value)


def raises(call, exception, words):
    pattern = ANY.join(map(re.escape, words))
    with pytest.raises(exception, match=re.compile(pattern, re.DOTALL)) as info:
        call()
    return info


def ends_in_package(info):
    return traceback.extract_tb(info.value.__traceback__)[-1].filename.startswith(
        PACKAGE
    )


def table(cases, jit=()):
    """The parameters of a test: a name for each case, for its report.

    `jit` may have False and True: the first argument of `f` is traced, too.
    """
    names = ("call", "exception", "words")
    if not jit:
        return pytest.mark.parametrize(names, list(cases.values()), ids=list(cases))
    return pytest.mark.parametrize(
        (*names, "jit"),
        [(*case, traces) for case in cases.values() for traces in jit],
        ids=[f"{name}{', jit' * traces}" for name in cases for traces in jit],
    )


def each(option, exception, expected, *values, args=()):
    """A case for each value of an option: the message has it."""
    return {
        f"{option} {value}": (
            lambda f, value=value: f(*args, **{option: value}),
            exception,
            [f"{option} must be {expected}", f"got {value!r}"],
        )
        for value in values
    }


def first_traced(f):
    """`f` with a traced first argument, if it is an array."""

    @functools.wraps(f)
    def call(x, *args, **kwargs):
        if not isinstance(x, jax.Array) or jnp.issubdtype(x.dtype, jax.dtypes.extended):
            return f(x, *args, **kwargs)
        return jax.jit(lambda x: f(x, *args, **kwargs))(x)

    return call


def raises_in_package(f, call, exception, words, jit):
    f = first_traced(f) if jit else f
    assert ends_in_package(raises(lambda: call(f), exception, words))


X = f32(2, 3)
INF, NAN = float("inf"), float("nan")
NOT_CAPS = 0, -30.0, INF, NAN
STATIC = ["got a traced array of dtype", "known when tracing", "static_argnames"]


class TestSoftmax:
    @pytest.mark.parametrize("f", [softmax, log_softmax])
    @table(
        {
            "None": (lambda f: f(None), TypeError, ["x must be an array", "None"]),
            "text": (lambda f: f("abc"), TypeError, ["x must be an array", "'abc'"]),
            "dict": (lambda f: f({"a": 1}), TypeError, ["x must be", "{'a': 1}"]),
            "ragged list": (
                lambda f: f([[1.0, 2.0], [3.0]]),
                TypeError,
                ["x must be an array, or numbers", "[[1.0, 2.0], [3.0]]"],
            ),
            "objects": (
                lambda f: f(np.array([1.0, None], object)),
                TypeError,
                ["x must be an array", "dtype object and shape (2,)"],
            ),
            "large int": (lambda f: f([2**40]), TypeError, ["x must", "1099511627776"]),
            "struct": (
                lambda f: f(ShapeDtypeStruct((2, 3), jnp.float32)),
                TypeError,
                ["x must be an array", "ShapeDtypeS"],
            ),
            "complex": (
                lambda f: f(X.astype(jnp.complex64)),
                TypeError,
                ["x must", "real", "complex"],
            ),
            "bool": (lambda f: f(X > 0), TypeError, ["x must have a real", "got bool"]),
            "key": (
                lambda f: f(jax.random.key(0)),
                TypeError,
                ["x must have a real", "got key"],
            ),
            "scalar": (
                lambda f: f(1.0),
                ValueError,
                ["x is a scalar", "no axis -1", "pass axis=None"],
            ),
            "axis": (
                lambda f: f(X, axis=2),
                ValueError,
                ["axis 2", "x of shape (2, 3)", "-2 <= axis < 2"],
            ),
            "axis twice": (
                lambda f: f(X, axis=(0, -2)),
                ValueError,
                ["axis=(0, -2) names a dimension", "more than once"],
            ),
            "axis a bool": (
                lambda f: f(X, True),
                TypeError,
                ["axis must be an int, a tuple of ints or None", "got True"],
            ),
            "axis an array": (
                lambda f: f(X, axis=np.array([0, 1])),
                TypeError,
                ["axis must be", "got an array of dtype int64 and shape (2,)"],
            ),
            "axis traced": (
                lambda f: traced(lambda axis: f(X, axis=axis), 1),
                TypeError,
                ["axis must be an int", *STATIC],
            ),
            "where text": (
                lambda f: f(X, where="all"),
                TypeError,
                ["where must be an array", "got 'all'"],
            ),
            "where float": (
                lambda f: f(X, where=X),
                TypeError,
                ["where must be a bool", "float32", "where=mask.astype(bool)"],
            ),
            "where shape": (
                lambda f: f(X, where=bools(2)),
                ValueError,
                ["where of shape (2,)", "x's shape (2, 3)"],
            ),
            "scale a list": (
                lambda f: f(X, scale=[1.0, 2.0, 3.0]),
                TypeError,
                ["scale must be a real number or an array", "got [1.0, 2.0, 3.0]"],
            ),
            "scale NaN": (
                lambda f: f(X, scale=float("nan")),
                ValueError,
                ["scale must be finite", "nan"],
            ),
            "scale complex": (
                lambda f: f(X, scale=X.astype(jnp.complex64)),
                TypeError,
                ["scale must have a real dtype", "complex64"],
            ),
            "scale shape": (
                lambda f: f(X, scale=f32(2)),
                ValueError,
                ["scale of shape (2,)", "x's shape (2, 3)"],
            ),
            "dtype int": (
                lambda f: f(X, dtype=int),
                TypeError,
                ["dtype must be a floating dtype", "int64"],
            ),
            "dtype unknown": (
                lambda f: f(X, dtype="flat"),
                TypeError,
                ["dtype must be a floating dtype", "'flat'"],
            ),
            "dtype of 64 bits": (
                lambda f: f(X, dtype=float),
                ValueError,
                ["dtype=float64", "jax_enable_x64", "jnp.float32"],
            ),
            "implementation unknown": (
                lambda f: f(X, implementation="pallas"),
                ValueError,
                ["implementation", "'pallas'", "['xla', 'mosaic_gpu', 'triton'"],
            ),
            "implementation none": (
                lambda f: f(X, implementation=[]),
                ValueError,
                ["implementation: no name given", "'xla'"],
            ),
            "implementation a set": (
                lambda f: f(X, implementation={"xla"}),
                TypeError,
                ["implementation must be None, a name or a sequence", "{'xla'}"],
            ),
            "axis below range": (
                lambda f: f(X, axis=(0, -3)),
                ValueError,
                ["axis -3 is out of range"],
            ),
            "axis a float": (
                lambda f: f(X, axis=1.0),
                TypeError,
                ["axis must be an int", "got 1.0"],
            ),
            "axis text": (
                lambda f: f(X, axis="0"),
                TypeError,
                ["axis must be an int", "got '0'"],
            ),
            "where int": (
                lambda f: f(X, where=ints(2, 3)),
                TypeError,
                ["where must be a bool", "int32"],
            ),
            "where rank": (
                lambda f: f(X, where=bools(4, 2, 3)),
                ValueError,
                ["where of shape (4, 2, 3)", "in its 2 dimensions"],
            ),
            "scale text": (
                lambda f: f(X, scale="1"),
                TypeError,
                ["scale must be", "got '1'"],
            ),
            "scale a bool": (
                lambda f: f(X, scale=True),
                TypeError,
                ["scale must be", "got True"],
            ),
            "scale infinite": (
                lambda f: f(X, scale=np.inf),
                ValueError,
                ["scale must be finite, got inf"],
            ),
            "implementation an int": (
                lambda f: f(X, implementation=1),
                TypeError,
                ["implementation", "1"],
            ),
        },
        jit=(False, True),
    )
    def test_message(self, f, call, exception, words, jit):
        raises_in_package(f, call, exception, words, jit)

    @pytest.mark.skipif(jax.default_backend() != "cpu", reason="a kernel may run there")
    @pytest.mark.parametrize("jit", [False, True])
    @pytest.mark.parametrize("f", [softmax, log_softmax])
    def test_kernels_that_cannot_run(self, f, jit):
        f = first_traced(f) if jit else f
        words = ["'mosaic_gpu' cannot run", "on cpu ('mosaic_gpu': ", "['xla', "]
        call = lambda: f(X, implementation="mosaic_gpu")
        raises(call, NotImplementedError, words)
        names = ["mosaic_gpu", "triton"]
        words = [f"{names} cannot run", "'mosaic_gpu': ", "; 'triton': ", "'xla'"]
        raises(lambda: f(X, implementation=names), NotImplementedError, words)

    def test_keyword_that_does_not_exist(self):
        raises(lambda: softmax(X, dim=1), TypeError, ["softmax()", "'dim'"])


class TestLogSumExp:
    @table(
        {
            "None": (lambda f: f(None), TypeError, ["a must be an array", "None"]),
            "complex": (
                lambda f: f(X.astype(jnp.complex64)),
                TypeError,
                ["a must have a real dtype", "got complex64"],
            ),
            "bool": (lambda f: f(X > 0), TypeError, ["a must have a real", "got bool"]),
            "scalar": (
                lambda f: f(1.0, -1),
                ValueError,
                ["a is a scalar", "no axis -1", "pass axis=None"],
            ),
            "axis": (
                lambda f: f(X, 2),
                ValueError,
                ["axis 2", "a of shape (2, 3)", "-2 <= axis < 2"],
            ),
            "axis twice": (
                lambda f: f(X, (0, -2)),
                ValueError,
                ["axis=(0, -2) names a dimension of a", "more than once"],
            ),
            "b text": (lambda f: f(X, b="1"), TypeError, ["b must be an array", "'1'"]),
            "b complex": (
                lambda f: f(X, b=X.astype(jnp.complex64)),
                TypeError,
                ["b must have a real dtype", "complex64"],
            ),
            "b shape": (
                lambda f: f(X, -1, f32(2)),
                ValueError,
                ["b of shape (2,) does not broadcast with a's shape (2, 3)"],
            ),
            "b rank": (
                lambda f: f(X, -1, f32(1, 2, 3)),
                ValueError,
                ["b of shape (1, 2, 3)", "in its 2 dimensions"],
            ),
            "b unsigned": (
                lambda f: f(X, b=X.astype(jnp.float8_e8m0fnu)),
                TypeError,
                ["b must have a floating dtype that holds 0", "float8_e8m0fnu"],
            ),
            **each("keepdims", TypeError, "True or False", 1, None, args=(X,)),
            **each("return_sign", TypeError, "True or False", "yes", args=(X,)),
            "where for keepdims": (
                lambda f: f(X, -1, None, bools(2, 3)),
                TypeError,
                ["keepdims must be True or False", "dtype bool and shape (2, 3)"],
            ),
            "where float": (
                lambda f: f(X, where=X),
                TypeError,
                ["where must be a bool", "float32"],
            ),
            "where shape": (
                lambda f: f(X, where=bools(2)),
                ValueError,
                ["where of shape (2,)", "a's shape (2, 3) in its 2 dimensions"],
            ),
            "implementation unknown": (
                lambda f: f(X, implementation="pallas"),
                ValueError,
                ["implementation", "'pallas'", "['xla', 'mosaic_gpu', 'triton'"],
            ),
        },
        jit=(False, True),
    )
    def test_message(self, call, exception, words, jit):
        raises_in_package(logsumexp, call, exception, words, jit)

    @pytest.mark.skipif(jax.default_backend() != "cpu", reason="a kernel may run there")
    def test_kernels_that_cannot_run(self):
        words = ["'triton' cannot run log_sum_exp_state on cpu ('triton': "]
        call = lambda: logsumexp(X, implementation="triton")
        raises(call, NotImplementedError, words)


LABELS = ints(2)
OF_LABELS = (softmax_cross_entropy_with_integer_labels, token_logprobs_and_entropy)
OF_LOGITS = (*OF_LABELS, softmax_cross_entropy)


def several_loss(labels, weights, **options):
    return softmax_cross_entropy_with_integer_labels(
        X, labels, label_weights=weights, **options
    )


def labels_of(f):
    return X if f.__name__ == "softmax_cross_entropy" else LABELS


class TestCrossEntropy:
    @pytest.mark.parametrize("f", OF_LOGITS)
    @table(
        {
            "logits None": (
                lambda f: f(None, LABELS),
                TypeError,
                ["logits must be an array", "None"],
            ),
            "logits int": (
                lambda f: f(ints(2, 3), LABELS),
                TypeError,
                ["logits must have a floating dtype", "int32"],
            ),
            "logits scalar": (
                lambda f: f(jnp.float32(1), jnp.int32(0)),
                ValueError,
                ["logits is a scalar", "axis=None"],
            ),
            "labels None": (
                lambda f: f(X, None),
                TypeError,
                ["labels must be an array", "None"],
            ),
            "axis": (
                lambda f: f(X, LABELS, axis=3),
                ValueError,
                ["axis 3 is out of range for logits of shape (2, 3)"],
            ),
            "where rank": (
                lambda f: f(X, labels_of(f), where=bools(1, 2, 3)),
                ValueError,
                ["where of shape (1, 2, 3)", "(2, 3)", "that of the labels, (2,)"],
            ),
            "where shape": (
                lambda f: f(X, labels_of(f), where=bools(4)),
                ValueError,
                ["where of shape (4,)", "the labels' shape (2,)"],
            ),
            "logits complex": (
                lambda f: f(X.astype(jnp.complex64), labels_of(f)),
                TypeError,
                ["logits must have a floating dtype", "complex64"],
            ),
            "axis twice": (
                lambda f: f(X, labels_of(f), axis=(1, -1)),
                ValueError,
                ["axis=(1, -1) names a dimension of logits"],
            ),
            "axis a float": (
                lambda f: f(X, labels_of(f), axis=1.0),
                TypeError,
                ["axis must be an int"],
            ),
            "where float": (
                lambda f: f(X, labels_of(f), where=X),
                TypeError,
                ["where must be a bool", "float32"],
            ),
            "where shape of entries": (
                lambda f: f(X, labels_of(f), where=bools(2, 2)),
                ValueError,
                ["where of shape (2, 2)", "the logits' shape (2, 3)"],
            ),
            "scale NaN": (
                lambda f: f(X, labels_of(f), scale=np.nan),
                ValueError,
                ["scale must be finite", "nan"],
            ),
            "scale shape": (
                lambda f: f(X, labels_of(f), scale=f32(2)),
                ValueError,
                ["scale of shape (2,)", "the logits' shape (2, 3)"],
            ),
            "cap of 0": (
                lambda f: f(X, labels_of(f), logits_soft_cap=0),
                ValueError,
                ["logits_soft_cap must be finite and above 0"],
            ),
        },
        jit=(False, True),
    )
    def test_message(self, f, call, exception, words, jit):
        raises_in_package(f, call, exception, words, jit)

    @pytest.mark.parametrize("f", OF_LABELS)
    @table(
        {
            "floats for indices": (
                lambda f: f(X, f32(2)),
                TypeError,
                ["labels must have an integer dtype", "float32", "labels.astype(int)"],
            ),
            "one-hot": (
                lambda f: f(X, f32(2, 3)),
                TypeError,
                ["labels must have an integer dtype", "softmax_cross_entropy takes"],
            ),
            "one dimension less": (
                lambda f: f(X, ints()),
                ValueError,
                ["labels of shape ()", "logits of shape (2, 3)", "expected (2,)"],
            ),
            "two dimensions more": (
                lambda f: f(X, ints(2, 1, 1)),
                ValueError,
                ["labels of shape (2, 1, 1)", "logits of shape (2, 3)", "expected (2,"],
            ),
            "ignore_index a float": (
                lambda f: f(X, LABELS, ignore_index=-1.0),
                TypeError,
                ["ignore_index must be an int or None", "-1.0"],
            ),
            "ignore_index traced": (
                lambda f: traced(lambda i: f(X, LABELS, ignore_index=i), 0),
                TypeError,
                ["ignore_index must be an int or None", *STATIC],
            ),
            "ignore_index too low": (
                lambda f: f(X, LABELS.astype(jnp.uint8), ignore_index=-100),
                ValueError,
                ["ignore_index=-100", "uint8", "0 to 255"],
            ),
            "labels bool": (
                lambda f: f(X, LABELS > 0),
                TypeError,
                ["labels must have an integer dtype", "bool"],
            ),
            "labels of another length": (
                lambda f: f(X, ints(3)),
                ValueError,
                ["labels of shape (3,)", "expected (2,)"],
            ),
            "several labels for other rows": (
                lambda f: f(X, ints(3, 3)),
                ValueError,
                ["labels of shape (3, 3)", "expected (2,"],
            ),
            "ignore_index a bool": (
                lambda f: f(X, LABELS, ignore_index=True),
                TypeError,
                ["ignore_index must be", "True"],
            ),
            "ignore_index text": (
                lambda f: f(X, LABELS, ignore_index="-1"),
                TypeError,
                ["ignore_index must be", "'-1'"],
            ),
            "ignore_index too high": (
                lambda f: f(X, LABELS.astype(jnp.int8), ignore_index=128),
                ValueError,
                ["ignore_index=128", "int8"],
            ),
        },
        jit=(False, True),
    )
    def test_message_of_indices(self, f, call, exception, words, jit):
        raises_in_package(f, call, exception, words, jit)

    @table(
        {
            "indices": (
                lambda: softmax_cross_entropy(X, LABELS),
                ValueError,
                ["labels of shape (2,)", "softmax_cross_entropy_with_integer_labels"],
            ),
            "indices along another axis": (
                lambda: softmax_cross_entropy(X, ints(3), axis=0),
                ValueError,
                ["labels of shape (3,)", "softmax_cross_entropy_with_integer_labels"],
            ),
            "complex": (
                lambda: softmax_cross_entropy(X, X.astype(jnp.complex64)),
                TypeError,
                ["labels must have a real dtype", "complex64"],
            ),
            "shape": (
                lambda: softmax_cross_entropy(X, f32(2, 4)),
                ValueError,
                ["labels of shape (2, 4)", "the logits' shape (2, 3)"],
            ),
            "logits with one class": (
                lambda: softmax_cross_entropy(X[:, :1], X),
                ValueError,
                ["labels of shape (2, 3)", "(2, 1)", "other axes than (-1,)"],
            ),
            "overwrite_logits": (
                lambda: softmax_cross_entropy_with_integer_labels(
                    X, LABELS, overwrite_logits="yes"
                ),
                TypeError,
                ["overwrite_logits must be True or False", "'yes'"],
            ),
            "one-hot ints": (
                lambda: softmax_cross_entropy_with_integer_labels(X, ints(2, 3)),
                ValueError,
                ["labels of shape (2, 3)", "expected (2,)", "label_weights"],
            ),
            "label_weights for one label": (
                lambda: several_loss(ints(2), f32(2)),
                ValueError,
                ["labels of shape (2,)", "expected (2, K)", "K class indices"],
            ),
            "label_weights of another shape": (
                lambda: several_loss(ints(2, 3), f32(2)),
                ValueError,
                ["label_weights of shape (2,)", "the labels' shape (2, 3)"],
            ),
            "label_weights bool": (
                lambda: several_loss(ints(2, 3), bools(2, 3)),
                TypeError,
                ["label_weights must have a real dtype", "bool"],
            ),
            "label_weights and weighted_mean": (
                lambda: several_loss(ints(2, 3), f32(2, 3), reduction="weighted_mean"),
                ValueError,
                ["reduction='weighted_mean'", "one class index for each row"],
            ),
            "more dimensions": (
                lambda: softmax_cross_entropy(X, f32(1, 4, 3)),
                ValueError,
                ["labels of shape (1, 4, 3)", "the logits' shape (2, 3)"],
            ),
            **{
                f"overwrite_logits {value!r}": (
                    lambda value=value: softmax_cross_entropy_with_integer_labels(
                        X, LABELS, overwrite_logits=value
                    ),
                    TypeError,
                    ["overwrite_logits must be True or False"],
                )
                for value in (1, None, jnp.bool_(True))
            },
        }
    )
    def test_message_of_one_function(self, call, exception, words):
        assert ends_in_package(raises(call, exception, words))

    def test_what_cannot_be_known_while_tracing_is_nan(self):
        """A label that is no class: documented, not an error."""
        with jax.debug_nans(False):
            loss = softmax_cross_entropy_with_integer_labels(X, jnp.array([0, 3]))
        np.testing.assert_array_equal(np.isnan(loss), [False, True])


LOSSES = {
    "integer": lambda **options: softmax_cross_entropy_with_integer_labels(
        X, LABELS, **options
    ),
    "dense": lambda **options: softmax_cross_entropy(X, X, **options),
    "linear": lambda **options: linear_softmax_cross_entropy(
        X, LABELS, f32(3, 3), **options
    ),
}


@pytest.mark.parametrize("loss", LOSSES)
@table(
    {
        "smoothing of an array": (
            lambda f: f(label_smoothing=np.float32(1)),
            ValueError,
            ["label_smoothing must be in [0, 1)", "1.0"],
        ),
        "smoothings": (
            lambda f: f(label_smoothing=f32(2)),
            TypeError,
            ["label_smoothing must be a number", "dtype float32 and shape (2,)"],
        ),
        "smoothings traced": (
            lambda f: traced(lambda s: f(label_smoothing=s), f32(2)),
            TypeError,
            ["label_smoothing must be a number", "traced", "shape (2,)", "jax.vmap"],
        ),
        "z_loss traced, a bool": (
            lambda f: traced(lambda z: f(z_loss=z), True),
            TypeError,
            ["z_loss must be a number of at least 0", "dtype bool", "must be real"],
        ),
        "cap an array": (
            lambda f: f(logits_soft_cap=f32(2)),
            TypeError,
            ["logits_soft_cap must be", "an array of dtype float32 and shape (2,)"],
        ),
        "cap traced": (
            lambda f: traced(lambda c: f(logits_soft_cap=c), 30.0),
            TypeError,
            ["logits_soft_cap must be a number above 0, or None", *STATIC],
        ),
        "reduction": (
            lambda f: f(reduction="avg"),
            ValueError,
            ["reduction must be one of 'none', 'sum', 'mean'", "'avg'"],
        ),
        "reduction None": (
            lambda f: f(reduction=None),
            ValueError,
            ["reduction must be one of", "None"],
        ),
        "class_weights shape": (
            lambda f: f(class_weights=f32(2)),
            ValueError,
            ["class_weights of shape (2,)", "3 classes", "(3,)"],
        ),
        "class_weights bool": (
            lambda f: f(class_weights=bools(3)),
            TypeError,
            ["class_weights must have a real dtype", "bool"],
        ),
        "class_weights text": (
            lambda f: f(class_weights="balanced"),
            TypeError,
            ["class_weights must be an array", "'balanced'"],
        ),
        "sample_weights bool": (
            lambda f: f(sample_weights=bools(2)),
            TypeError,
            ["sample_weights must have a real dtype", "bool"],
        ),
        "sample_weights shape": (
            lambda f: f(sample_weights=f32(7)),
            ValueError,
            ["sample_weights of shape (7,)", "the shape of the losses"],
        ),
        "sample_weights text": (
            lambda f: f(sample_weights="balanced"),
            TypeError,
            ["sample_weights must be an array", "'balanced'"],
        ),
        "return_aux text": (
            lambda f: f(return_aux="no"),
            TypeError,
            ["return_aux must be True or False", "'no'"],
        ),
        "return_lse text": (
            lambda f: f(return_lse="no"),
            TypeError,
            ["return_lse must be True or False", "'no'"],
        ),
        "return_lse traced": (
            lambda f: traced(lambda r: f(return_lse=r), True),
            TypeError,
            ["return_lse must be True or False", *STATIC],
        ),
        "z_loss an array": (
            lambda f: f(z_loss=f32(1)),
            TypeError,
            ["z_loss must be a number of at least 0"],
        ),
        "scale text": (lambda f: f(scale="1"), TypeError, ["scale must be", "'1'"]),
        "class_weights per row": (
            lambda f: f(class_weights=f32(1, 3)),
            ValueError,
            ["class_weights of shape (1, 3)"],
        ),
        "class_weights complex": (
            lambda f: f(class_weights=f32(3).astype(jnp.complex64)),
            TypeError,
            ["class_weights must have a real dtype", "complex64"],
        ),
        **each("label_smoothing", ValueError, "in [0, 1)", 1.0, -0.1, NAN),
        **each("label_smoothing", TypeError, "a number in [0, 1)", "0", True, None),
        **each("z_loss", ValueError, "finite and at least 0", -1, INF, NAN),
        **each("z_loss", TypeError, "a number of at least 0", "0"),
        **each("logits_soft_cap", ValueError, "finite and above 0, or None", *NOT_CAPS),
        **each("logits_soft_cap", TypeError, "a number above 0, or None", "30", True),
    }
)
def test_options_of_a_loss(loss, call, exception, words):
    assert ends_in_package(raises(lambda: call(LOSSES[loss]), exception, words))


W = f32(3, 5)


class TestLinear:
    @pytest.mark.parametrize(
        "f", [linear_softmax_cross_entropy, linear_token_logprobs_and_entropy]
    )
    @table(
        {
            "order": (
                lambda f: f(X, W, LABELS),
                TypeError,
                ["weights must have a floating dtype", "int32"],
            ),
            "x None": (
                lambda f: f(None, LABELS, W),
                TypeError,
                ["x must be an array", "None"],
            ),
            "x int": (
                lambda f: f(ints(2, 3), LABELS, W),
                TypeError,
                ["x must have a floating dtype", "int32"],
            ),
            "x scalar": (
                lambda f: f(jnp.float32(1), LABELS, W),
                ValueError,
                ["x must have the hidden dimension", "scalar"],
            ),
            "weights text": (
                lambda f: f(X, LABELS, "w"),
                TypeError,
                ["weights must be an array", "'w'"],
            ),
            "weights of an embedding": (
                lambda f: f(X, LABELS, W.T),
                ValueError,
                ["x of shape (2, 3)", "weights of shape (5, 3)", "vocab_axis=1"],
            ),
            "weights of one dimension": (
                lambda f: f(X, LABELS, f32(3)),
                ValueError,
                ["weights must have the shape (hidden, vocabulary)", "(3,)"],
            ),
            "vocab_axis": (
                lambda f: f(X, LABELS, W, vocab_axis=2),
                ValueError,
                ["vocab_axis must be 1 for", "or 0 for", "got 2"],
            ),
            "vocab_axis traced": (
                lambda f: traced(lambda v: f(X, LABELS, W, vocab_axis=v), 1),
                ValueError,
                ["vocab_axis must be", *STATIC],
            ),
            "labels shape": (
                lambda f: f(X, ints(3), W),
                ValueError,
                ["labels of shape (3,)", "x of shape (2, 3)", "expected (2,)"],
            ),
            "bias shape": (
                lambda f: f(X, LABELS, W, bias=f32(3)),
                ValueError,
                ["bias of shape (3,)", "5 classes", "(5,)"],
            ),
            "bias int": (
                lambda f: f(X, LABELS, W, bias=ints(5)),
                TypeError,
                ["bias must have a floating dtype", "int32"],
            ),
            "where shape": (
                lambda f: f(X, LABELS, W, where=bools(2, 3)),
                ValueError,
                ["where of shape (2, 3)", "the labels' shape (2,)"],
            ),
            "scale shape": (
                lambda f: f(X, LABELS, W, scale=f32(2, 5)),
                ValueError,
                ["scale of shape (2, 5)", "the labels' shape (2,)"],
            ),
            "budget text": (
                lambda f: f(X, LABELS, W, memory_budget="1GB"),
                TypeError,
                ["memory_budget must be an int (bytes) or None", "'1GB'"],
            ),
            "budget of 1": (
                lambda f: f(X, LABELS, W, memory_budget=1),
                ValueError,
                ["memory_budget=1 is too little", "at least 80 bytes"],
            ),
            "precision": (
                lambda f: f(X, LABELS, W, precision="best"),
                ValueError,
                ["precision must be None, a jax.lax.Precision", "'best'"],
            ),
            "x complex": (
                lambda f: f(X.astype(jnp.complex64), LABELS, W),
                TypeError,
                ["x must have a floating dtype", "complex64"],
            ),
            "weights of three dimensions": (
                lambda f: f(X, LABELS, f32(1, 3, 5), vocab_axis=0),
                ValueError,
                [
                    "weights must have the shape (vocabulary, hidden)",
                    "vocab_axis=0",
                    "(1, 3, 5)",
                ],
            ),
            "the other axis": (
                lambda f: f(X, LABELS, W, vocab_axis=0),
                ValueError,
                [
                    "x of shape (2, 3)",
                    "(3, 5)",
                    " 5 ",
                    "vocab_axis=0",
                    "(vocabulary, hidden)",
                ],
            ),
            "vocab_axis a bool": (
                lambda f: f(X, LABELS, W, vocab_axis=True),
                ValueError,
                ["vocab_axis must be", "True"],
            ),
            "vocab_axis text": (
                lambda f: f(X, LABELS, W, vocab_axis="V"),
                ValueError,
                ["vocab_axis must be", "'V'"],
            ),
            "bias of two dimensions": (
                lambda f: f(X, LABELS, W, bias=f32(1, 5)),
                ValueError,
                ["bias of shape (1, 5)", "5 classes"],
            ),
            "labels bool": (
                lambda f: f(X, LABELS > 0, W),
                TypeError,
                ["labels must have an integer dtype", "bool"],
            ),
            "several labels for other tokens": (
                lambda f: f(X, ints(3, 5), W),
                ValueError,
                ["labels of shape (3, 5)", "x of shape (2, 3)", "expected (2,"],
            ),
            "labels of floats without classes": (
                lambda f: f(X, f32(2), W),
                TypeError,
                ["labels must have an integer dtype", "labels.astype(int)"],
            ),
            "ignore_index a float": (
                lambda f: f(X, LABELS, W, ignore_index=-1.0),
                TypeError,
                ["ignore_index", "-1.0"],
            ),
            "ignore_index too high": (
                lambda f: f(X, LABELS.astype(jnp.int8), W, ignore_index=200),
                ValueError,
                ["ignore_index=200", "int8"],
            ),
            "where float": (
                lambda f: f(X, LABELS, W, where=f32(2)),
                TypeError,
                ["where must be a bool", "float32"],
            ),
            "where length": (
                lambda f: f(X, LABELS, W, where=bools(3)),
                ValueError,
                ["where of shape (3,)", "the labels' shape (2,)"],
            ),
            "cap of 0": (
                lambda f: f(X, LABELS, W, logits_soft_cap=0.0),
                ValueError,
                ["logits_soft_cap must be", "0.0"],
            ),
            "scale NaN": (
                lambda f: f(X, LABELS, W, scale=np.nan),
                ValueError,
                ["scale must be finite", "nan"],
            ),
            "budget a float": (
                lambda f: f(X, LABELS, W, memory_budget=1e6),
                TypeError,
                ["memory_budget must be an int", "1000000.0"],
            ),
            "budget a bool": (
                lambda f: f(X, LABELS, W, memory_budget=True),
                TypeError,
                ["memory_budget must be", "True"],
            ),
            "budget negative": (
                lambda f: f(X, LABELS, W, memory_budget=-1),
                ValueError,
                ["memory_budget=-1 is too little"],
            ),
            "implementation unknown": (
                lambda f: f(X, LABELS, W, implementation="cuda"),
                ValueError,
                ["implementation", "'cuda'"],
            ),
        },
        jit=(False, True),
    )
    def test_message(self, f, call, exception, words, jit):
        raises_in_package(f, call, exception, words, jit)

    @table(
        {
            "one-hot ints": (
                lambda: linear_softmax_cross_entropy(X, ints(2, 5), W),
                ValueError,
                ["labels of shape (2, 5)", "expected (2,)", "label_weights"],
            ),
            "soft targets of another length": (
                lambda: linear_softmax_cross_entropy(X, f32(2, 4), W),
                ValueError,
                ["labels of shape (2, 4)", "the logits' shape (2, 5)"],
            ),
            "soft targets with an ignore_index": (
                lambda: linear_softmax_cross_entropy(X, f32(2, 5), W, ignore_index=-1),
                ValueError,
                ["ignore_index is for labels that are class indices", "where"],
            ),
            "soft targets and label_weights": (
                lambda: linear_softmax_cross_entropy(
                    X, f32(2, 5), W, label_weights=f32(2, 5)
                ),
                TypeError,
                ["labels must have an integer dtype", "float32"],
            ),
            "soft targets and weighted_mean": (
                lambda: linear_softmax_cross_entropy(
                    X, f32(2, 5), W, reduction="weighted_mean"
                ),
                ValueError,
                ["reduction='weighted_mean'", "one class index for each row"],
            ),
            "soft targets for log-probabilities": (
                lambda: linear_token_logprobs_and_entropy(X, f32(2, 5), W),
                TypeError,
                ["labels must have an integer dtype", "float32"],
            ),
        }
    )
    def test_message_of_one_function(self, call, exception, words):
        assert ends_in_package(raises(call, exception, words))

    @pytest.mark.skipif(jax.default_backend() != "cpu", reason="a kernel may run there")
    def test_kernels_that_cannot_run(self):
        names = ["triton", "mosaic_gpu"]
        call = lambda: linear_softmax_cross_entropy(X, LABELS, W, implementation=names)
        words = ["['triton', 'mosaic_gpu'] cannot run", "These can: ['xla'"]
        assert ends_in_package(raises(call, NotImplementedError, words))

    def test_a_list_of_precisions_is_taken(self):
        """As jnp.matmul does."""
        loss = linear_softmax_cross_entropy
        pair = ["high", "highest"]
        np.testing.assert_array_equal(
            loss(X, LABELS, W, precision=pair), loss(X, LABELS, W)
        )


Q, K = f32(2, 4, 6, 8), f32(2, 5, 3, 8)
QKV = Q, K, K


def key_of(f):
    return "dropout_rng" if f.__name__ == "attention_fn" else "dropout_key"


class TestAttention:
    @pytest.mark.parametrize("f", [dot_product_attention, attention_fn])
    @table(
        {
            "None": (
                lambda f: f(Q, None, K),
                TypeError,
                ["key must be an array", "None"],
            ),
            "int": (
                lambda f: f(Q.astype(jnp.int32), K, K),
                TypeError,
                ["query must", "floating dtype", "int32"],
            ),
            "rank": (
                lambda f: f(Q[0, 0], K[0, 0], K[0, 0]),
                ValueError,
                ["query", "(6, 8)"],
            ),
            "heads": (
                lambda f: f(Q, f32(2, 5, 4, 8), f32(2, 5, 4, 8)),
                ValueError,
                ["heads", "4"],
            ),
            "lengths": (
                lambda f: f(Q, K, K[:, 1:]),
                ValueError,
                ["value", "(2, 4, 3, 8)"],
            ),
            "head size": (lambda f: f(Q, K[..., 1:], K), ValueError, ["key", "7"]),
            "bias bool": (
                lambda f: f(Q, K, K, bias=bools(4, 5)),
                TypeError,
                ["bias must", "floating dtype", "bool"],
            ),
            "bias shape": (
                lambda f: f(Q, K, K, bias=f32(5, 4)),
                ValueError,
                ["bias", "shape (5, 4)", "does not broadcast", "= (2, 6, 4, 5)"],
            ),
            "mask shape": (
                lambda f: f(Q, K, K, mask=bools(5, 4)),
                ValueError,
                ["mask", "shape (5, 4)", "does not broadcast", "= (2, 6, 4, 5)"],
            ),
            "mask text": (
                lambda f: f(Q, K, K, mask="causal"),
                TypeError,
                ["mask must be an array", "'causal'"],
            ),
            "is_causal text": (
                lambda f: f(Q, K, K, is_causal="no"),
                TypeError,
                ["is_causal must be True or False", "'no'"],
            ),
            "is_causal traced": (
                lambda f: traced(lambda c: f(Q, K, K, is_causal=c), True),
                TypeError,
                ["is_causal must be True or False", *STATIC],
            ),
            "is_causal a mask": (
                lambda f: f(Q, K, K, is_causal=bools(4, 5)),
                TypeError,
                ["is_causal must be True or False", "shape (4, 5)"],
            ),
            "cap traced": (
                lambda f: traced(lambda c: f(Q, K, K, logits_soft_cap=c), 0.1),
                TypeError,
                ["logits_soft_cap must be a number above 0, or None", *STATIC],
            ),
            "window negative": (
                lambda f: f(Q, K, K, local_window_size=(-1, 0)),
                ValueError,
                ["local_window_size", "not be negative", "(-1, 0)", "the length"],
            ),
            "window a float": (
                lambda f: f(Q, K, K, local_window_size=2.0),
                TypeError,
                ["local_window_size must be an int, a pair", "2.0"],
            ),
            "window a bool": (
                lambda f: f(Q, K, K, local_window_size=True),
                TypeError,
                ["local_window_size must be an int, a pair", "True"],
            ),
            "rate traced": (
                lambda f: traced(lambda r: f(Q, K, K, dropout_rate=r), 0.1),
                TypeError,
                ["dropout_rate must be", *STATIC],
            ),
            "no key": (
                lambda f: f(Q, K, K, dropout_rate=0.1),
                ValueError,
                ["dropout_", "dropout_rate=0.1", "ass a jax.random.key"],
            ),
            "key a seed": (
                lambda f: f(Q, K, K, dropout_rate=0.1, **{key_of(f): 0}),
                TypeError,
                ["must be a key as of jax.random.key", "got 0"],
            ),
            "precision": (
                lambda f: f(Q, K, K, precision="best"),
                ValueError,
                ["precision must be None", "'best'"],
            ),
            "implementation": (
                lambda f: f(Q, K, K, implementation="pallas"),
                ValueError,
                ["implementation", "'pallas'", "['xla', 'cudnn', 'mosaic_gpu'"],
            ),
            "complex": (
                lambda f: f(Q.astype(jnp.complex64), K, K),
                TypeError,
                ["query must have a floating dtype", "complex64"],
            ),
            "no sign": (
                lambda f: f(Q.astype(jnp.float8_e8m0fnu), K, K),
                TypeError,
                ["query must have a floating dtype that holds 0", "float8_e8m0fnu"],
            ),
            "rank of key": (lambda f: f(Q, K[0], K), ValueError, ["key"]),
            "rank of value": (lambda f: f(Q, K, K[0]), ValueError, ["value"]),
            "batch of key": (
                lambda f: f(Q, f32(3, 5, 3, 8), K),
                ValueError,
                ["key", "(3, 5, 3, 8)"],
            ),
            "value heads": (
                lambda f: f(Q, K, f32(2, 5, 6, 8)),
                ValueError,
                ["value", "(2, 5, 6, 8)"],
            ),
            "int value": (
                lambda f: f(Q, K, K.astype(jnp.int32)),
                TypeError,
                ["value must have a floating dtype", "int32"],
            ),
            "bias rank": (
                lambda f: f(Q, K, K, bias=f32(1, 1, 1, 4, 5)),
                ValueError,
                ["bias", "(1, 1, 1, 4, 5)"],
            ),
            "bias batch": (
                lambda f: f(Q, K, K, bias=f32(3, 1, 4, 5)),
                ValueError,
                ["bias of shape (3, 1, 4, 5)", "= (2, 6, 4, 5)"],
            ),
            "mask heads": (
                lambda f: f(Q, K, K, mask=bools(2, 2, 4, 5)),
                ValueError,
                ["mask of shape (2, 2, 4, 5)", "= (2, 6, 4, 5)"],
            ),
            "mask rank": (
                lambda f: f(Q, K, K, mask=bools(1, 1, 1, 4, 5)),
                ValueError,
                ["mask", "(1, 1, 1, 4, 5)"],
            ),
            "scale bool": (
                lambda f: f(Q, K, K, scale=bools(5)),
                TypeError,
                ["scale must have a real dtype", "bool"],
            ),
            "scale shape": (
                lambda f: f(Q, K, K, scale=f32(4)),
                ValueError,
                ["scale of shape (4,)", "= (2, 6, 4, 5)"],
            ),
            "window an int": (
                lambda f: f(Q, K, K, local_window_size=-1),
                ValueError,
                ["local_window_size", "-1"],
            ),
            "window of three": (
                lambda f: f(Q, K, K, local_window_size=(3, 2, 1)),
                TypeError,
                ["local_window_size must be", "(3, 2, 1)"],
            ),
            "offset of floats": (
                lambda f: f(Q, K, K, query_offset=2.0),
                TypeError,
                ["query_offset must have an integer dtype", "float"],
            ),
            "offset a bool": (
                lambda f: f(Q, K, K, query_offset=True),
                TypeError,
                ["query_offset must have an integer dtype", "bool"],
            ),
            "offsets of another batch": (
                lambda f: f(Q, K, K, query_offset=ints(3)),
                ValueError,
                ["query_offset of shape (3,)", "(batch...,) = (2,)"],
            ),
            "offset too far": (
                lambda f: f(Q, K, K, is_causal=True, query_offset=2**31),
                ValueError,
                ["query_offset must be between -536870912 and", "got 2147483648"],
            ),
            **each("scale", ValueError, "finite, or None", INF, NAN, args=QKV),
            **each("scale", TypeError, "a real number, an array", [1.0], args=QKV),
            **each("logits_soft_cap", ValueError, "finite", *NOT_CAPS, args=QKV),
            **each("dropout_rate", ValueError, "in [0, 1)", 1.0, -0.1, NAN, args=QKV),
        },
        jit=(False, True),
    )
    def test_message(self, f, call, exception, words, jit):
        raises_in_package(f, call, exception, words, jit)

    @pytest.mark.parametrize("f", [dot_product_attention, attention_fn])
    def test_keys_by_their_name(self, f):
        keys = jax.random.split(jax.random.key(0))
        call = lambda: f(Q, K, K, dropout_rate=0.1, **{key_of(f): keys})
        raises(call, ValueError, [f"{key_of(f)} must be one key", "(2,)"])

    @table(
        {
            "dtypes": (
                lambda f: f(Q, K.astype(jnp.bfloat16), K),
                TypeError,
                ["must have one dtype", "query float32", "key bfloat16", "cast"],
            ),
            "bias of 5 dimensions": (
                lambda f: f(Q, K, K, bias=f32(1, 1, 1, 4, 5)),
                ValueError,
                ["bias must have at most 4 dimensions", "(1, 1, 1, 4, 5)"],
            ),
            "mask to be added": (
                lambda f: f(Q, K, K, mask=jnp.full((4, 5), -1e9)),
                ValueError,
                ["mask must be bool", "float32", "as bias"],
            ),
            "mask to be added, traced": (
                lambda f: traced(lambda m: f(Q, K, K, mask=m), f32(4, 5)),
                TypeError,
                ["mask must be bool while tracing", "float32", "as bias"],
            ),
            "lengths of floats": (
                lambda f: f(Q, K, K, query_seq_lengths=f32(2)),
                TypeError,
                ["query_seq_lengths must have an integer dtype", "float32"],
            ),
            "a length too many": (
                lambda f: f(Q, K, K, key_value_seq_lengths=ints(3)),
                ValueError,
                ["key_value_seq_lengths of shape (3,)", "(batch...,) = (2,)"],
            ),
            "lengths of more dimensions": (
                lambda f: f(Q, K, K, key_value_seq_lengths=ints(1, 2)),
                ValueError,
                ["key_value_seq_lengths of shape (1, 2)", "(batch...,) = (2,)"],
            ),
            "another batch, of two dimensions": (
                lambda f: f(Q[None], K[:, None], K[:, None]),
                ValueError,
                ["the batch of query", "query (1, 2, 4, 6, 8)", "key (2, 1, 5, 3, 8)"],
            ),
            "bias for a batch of two dimensions": (
                lambda f: f(Q[None], K[None], K[None], f32(2, 1, 1, 4, 5)),
                ValueError,
                ["bias of shape (2, 1, 1, 4, 5)", "= (1, 2, 6, 4, 5)"],
            ),
            "segments of the queries alone": (
                lambda f: f(Q, K, K, q_segment_ids=ints(2, 4)),
                ValueError,
                ["q_segment_ids and kv_segment_ids", "kv_segment_ids is None"],
            ),
            "segments shape": (
                lambda f: f(
                    Q, K, K, q_segment_ids=ints(2, 4), kv_segment_ids=ints(2, 4)
                ),
                ValueError,
                ["kv_segment_ids of shape (2, 4)", "(batch..., length) = (2, 5)"],
            ),
            "sinks shape": (
                lambda f: f(Q, K, K, sinks=f32(3)),
                ValueError,
                ["sinks of shape (3,) does not broadcast", "(heads,) = (6,)"],
            ),
            "sinks int": (
                lambda f: f(Q, K, K, sinks=ints(6)),
                TypeError,
                ["sinks must have a floating dtype", "int32"],
            ),
            "return_residual": (
                lambda f: f(Q, K, K, return_residual="no"),
                TypeError,
                ["return_residual must be True or False", "'no'"],
            ),
            "return_max_logits": (
                lambda f: f(Q, K, K, return_max_logits="no"),
                TypeError,
                ["return_max_logits must be True or False", "'no'"],
            ),
            "cannot run": (
                lambda f: f(Q, K, K, implementation="cudnn"),
                NotImplementedError,
                ["implementation='cudnn' cannot run attention", "These can: ['xla'"],
            ),
            "mask of twos": (
                lambda f: f(Q, K, K, mask=jnp.full((4, 5), 2)),
                ValueError,
                ["mask must be bool", "int32"],
            ),
            "dtype of value": (
                lambda f: f(Q, K, K.astype(jnp.float16)),
                TypeError,
                ["one dtype", "value float16"],
            ),
            "key lengths of floats": (
                lambda f: f(Q, K, K, key_value_seq_lengths=f32(2)),
                TypeError,
                ["key_value_seq_lengths must", "float32"],
            ),
            "three lengths": (
                lambda f: f(Q, K, K, query_seq_lengths=ints(3)),
                ValueError,
                ["query_seq_lengths", "(3,)"],
            ),
            "two lengths without batch": (
                lambda f: f(Q[0], K[0], K[0], query_seq_lengths=ints(2)),
                ValueError,
                ["query_seq_lengths", "(2,)"],
            ),
            "segments of the keys alone": (
                lambda f: f(Q, K, K, kv_segment_ids=ints(2, 5)),
                ValueError,
                ["q_segment_ids is None"],
            ),
            "segments of floats": (
                lambda f: f(
                    Q, K, K, q_segment_ids=f32(2, 4), kv_segment_ids=ints(2, 5)
                ),
                TypeError,
                ["q_segment_ids must", "float32"],
            ),
            "sinks rank": (
                lambda f: f(Q, K, K, sinks=f32(1, 6)),
                ValueError,
                ["sinks", "(1, 6)"],
            ),
        }
    )
    @pytest.mark.skipif(jax.default_backend() != "cpu", reason="cuDNN may run there")
    def test_message_of_one_function(self, call, exception, words):
        call_ = lambda: call(dot_product_attention)
        assert ends_in_package(raises(call_, exception, words))

    @table(
        {
            "einsum_dot_general": (
                {"einsum_dot_general": jax.lax.dot_general},
                NotImplementedError,
                ["einsum_dot_general is not supported: pass"],
            ),
            "one einsum": (
                {"qk_attn_weights_einsum": jnp.einsum},
                ValueError,
                ["qk_attn_weights_einsum", "given together"],
            ),
            "einsums with precision": (
                {
                    "qk_attn_weights_einsum": jnp.einsum,
                    "attn_weights_value_einsum": jnp.einsum,
                    "precision": "high",
                },
                ValueError,
                ["precision cannot be given together with"],
            ),
            "mask complex": (
                {"mask": f32(4, 5).astype(jnp.complex64)},
                TypeError,
                ["mask must be boolean, integer or floating", "complex64"],
            ),
            "dtype unknown": (
                {"dtype": "flat"},
                TypeError,
                ["dtype must be a floating dtype", "'flat'"],
            ),
            "dtype of 64 bits": (
                {"dtype": "float64"},
                ValueError,
                ["dtype=float64", "jax_enable_x64"],
            ),
            "module": (
                {"module": "attention"},
                TypeError,
                ["module must be a Flax module", "str"],
            ),
            "module and implementation": (
                {"module": "attention", "implementation": "cudnn"},
                NotImplementedError,
                ["'cudnn' does not compute the weights", "'xla' does"],
            ),
            "deterministic": (
                {"deterministic": "no"},
                TypeError,
                ["deterministic must be True or False", "'no'"],
            ),
            "broadcast_dropout": (
                {"broadcast_dropout": 2},
                TypeError,
                ["broadcast_dropout must be True or False", "2"],
            ),
            "force_fp32_for_softmax": (
                {"force_fp32_for_softmax": "yes"},
                TypeError,
                ["force_fp32_for_softmax must be True or False", "'yes'"],
            ),
            "the other einsum": (
                {"attn_weights_value_einsum": jnp.einsum},
                ValueError,
                ["attn_weights_value_einsum", "given together"],
            ),
            "key of one dimension": ({"key": f32(3)}, ValueError, ["heads", "0"]),
            "value of no dimension": ({"value": f32()}, ValueError, ["value", "()"]),
            "dtype int": ({"dtype": int}, TypeError, ["dtype must be a floating"]),
            "cannot run": (
                {"implementation": "cudnn"},
                NotImplementedError,
                ["cannot run attention"],
            ),
            "einsums and implementation": (
                {
                    "qk_attn_weights_einsum": jnp.einsum,
                    "attn_weights_value_einsum": jnp.einsum,
                    "implementation": "cudnn",
                },
                NotImplementedError,
                ["'cudnn' does not compute the weights"],
            ),
        }
    )
    def test_message_in_flax(self, call, exception, words):
        assert ends_in_package(
            raises(
                lambda: attention_fn(**{"query": Q, "key": K, "value": K, **call}),
                exception,
                words,
            )
        )

    @table(
        {
            "order": (
                (Q, Q, f32(2, 4, 6), f32(2, 4, 6)),
                ValueError,
                ["out_a and out_b must have one shape", "lse_a (2, 4, 6, 8)"],
            ),
            "int": (
                (Q.astype(jnp.int32), f32(2, 4, 6), Q, f32(2, 4, 6)),
                TypeError,
                ["out_a must have a floating dtype", "int32"],
            ),
            "no lse": (
                (Q, None, Q, f32(2, 4, 6)),
                TypeError,
                ["lse_a must be an array", "None"],
            ),
            "shape of out_b": (
                (Q, f32(2, 4, 6), f32(2, 5, 6, 8), f32(2, 4, 6)),
                ValueError,
                ["out_b (2, 5, 6, 8)"],
            ),
            "shape of lse_b": (
                (Q, f32(2, 4, 6), Q, f32(2, 4)),
                ValueError,
                ["lse_b (2, 4)"],
            ),
        }
    )
    def test_message_of_merge(self, call, exception, words):
        assert ends_in_package(raises(lambda: merge_attention(*call), exception, words))


class TestExplain:
    @table(
        {
            "result": (
                lambda: explain(softmax(X)),
                TypeError,
                ["explain(softmax, x)", "got an array of dtype float32"],
            ),
            "axis": (
                lambda: explain(softmax, X, axis=2),
                ValueError,
                ["axis 2 is out of range"],
            ),
            "gpu": (
                lambda: explain_for("gpu"),
                ValueError,
                ["platform must be one of", "'cuda', 'rocm'", "got 'gpu'"],
            ),
            "upper case": (
                lambda: explain_for("CUDA"),
                ValueError,
                ["platform must be one of", "'CUDA'"],
            ),
            "a device": (
                lambda: explain_for(jax.devices()[0]),
                TypeError,
                ["names of a platform", "explain_for('cuda')(softmax, x)"],
            ),
            "all in one call": (
                lambda: explain_for("cuda", softmax),
                TypeError,
                ["explain_for('cuda')(softmax, x)", "device_kind <function"],
            ),
        }
    )
    def test_message(self, call, exception, words):
        assert ends_in_package(raises(call, exception, words))
