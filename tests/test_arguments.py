"""Bad input: the error names the argument, what came and what was expected."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoftmax
from jaxsoftmax._core import dispatch
from jaxsoftmax._rows.call import ROWS

X = jnp.ones((2, 3))
X_COMPLEX = X.astype(jnp.complex64)

CASES = {
    "axis out of range": ({"axis": 2}, ValueError, "axis 2 .*(2, 3).*-2 <= axis < 2"),
    "axis below range": ({"axis": (0, -3)}, ValueError, "axis -3 is out of range"),
    "axis repeated": ({"axis": (1, -1)}, ValueError, r"axis=(1, -1) .*more than once"),
    "axis a float": ({"axis": 1.0}, TypeError, "axis must be an int, .* got 1.0"),
    "axis a string": ({"axis": "0"}, TypeError, "axis must be an int, .* got '0'"),
    "float mask": (
        {"where": jnp.ones((2, 3))},
        TypeError,
        "where must be a bool array .* got dtype float32; .*where=mask.astype(bool)",
    ),
    "int mask": ({"where": np.ones((2, 3), np.int32)}, TypeError, "where .* int32"),
    "mask shape": (
        {"where": jnp.ones((2,), bool)},
        ValueError,
        "where of shape (2,) does not broadcast with x's shape (2, 3)",
    ),
    "mask of more dimensions": (
        {"where": jnp.ones((4, 2, 3), bool)},
        ValueError,
        "where of shape (4, 2, 3) does not broadcast .* in its 2 dimensions",
    ),
    "scale infinite": ({"scale": np.inf}, ValueError, "scale must be finite, got inf"),
    "scale a string": ({"scale": "1"}, TypeError, "scale must be .* got '1'"),
    "scale a bool": ({"scale": True}, TypeError, "scale must be .* got True"),
    "scale complex": ({"scale": X_COMPLEX}, TypeError, "scale .* real .* complex64"),
    "scale shape": (
        {"scale": jnp.ones(2)},
        ValueError,
        "scale of shape (2,) does not",
    ),
    "dtype an int": ({"dtype": jnp.int32}, TypeError, "dtype .* floating .* int32"),
    "dtype nonsense": ({"dtype": "flat"}, TypeError, "dtype must .* got 'flat'"),
    "dtype of 64 bits": ({"dtype": "float64"}, ValueError, "float64 .*jax_enable_x64"),
    "implementation unknown": (
        {"implementation": "cuda"},
        ValueError,
        "implementation: unknown name 'cuda', expected one of ['xla', ",
    ),
    "implementation an int": ({"implementation": 1}, TypeError, "implementation .* 1"),
    "implementation empty": ({"implementation": ()}, ValueError, "no name given"),
    "no GPU": (
        {"implementation": "mosaic_gpu"},
        NotImplementedError,
        "implementation='mosaic_gpu' cannot run .* on cpu ('mosaic_gpu': .*['xla', ",
    ),
    "none of several": (
        {"implementation": ["mosaic_gpu", "triton"]},
        NotImplementedError,
        "['mosaic_gpu', 'triton'] cannot run .*'mosaic_gpu': .*; 'triton': .*'xla'",
    ),
}


@pytest.fixture(params=["softmax", "log_softmax"])
def f(request):
    return getattr(jaxsoftmax, request.param)


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("jit", [False, True])
def test_error(f, case, jit):
    kwargs, error, message = CASES[case]
    pattern = re.escape(message).replace(r"\.\*", ".*")
    pattern = pattern.replace(r"\ ", " ")
    call = lambda x: f(x, **kwargs)
    with pytest.raises(error, match=pattern):
        (jax.jit(call) if jit else call)(X)


@pytest.mark.parametrize("x", [X_COMPLEX, X > 0])
def test_dtype_of_x(f, x):
    with pytest.raises(TypeError, match=f"x must have a real dtype .*{x.dtype}"):
        f(x)


def test_first_of_several_that_can_run(f):
    np.testing.assert_array_equal(f(X, implementation=("triton", "xla")), f(X))
    np.testing.assert_array_equal(f(X, implementation="xla"), f(X))


def test_resolve():
    assert dispatch.resolve(None, ROWS) is None
    assert dispatch.resolve("triton", ROWS) == ("triton",)
    assert dispatch.resolve(["mosaic_gpu", "xla"], ROWS) == ("mosaic_gpu", "xla")


@pytest.mark.parametrize("mask", [True, np.bool_(True), np.ones((1, 3), bool)])
def test_masks_that_are_taken(f, mask):
    np.testing.assert_array_equal(f(X, where=mask), f(X))


@pytest.mark.parametrize("scale", [2, 2.0, np.float32(2), np.array(2), np.int32(2)])
def test_numbers_that_are_taken_as_scale(f, scale):
    x = jnp.arange(6.0).reshape(2, 3)
    np.testing.assert_array_equal(f(x, scale=scale), f(x, scale=2.0))
