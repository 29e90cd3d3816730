"""Input that is taken; what is not is in `test_error_messages.py`."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoftmax
from jaxsoftmax._core import dispatch
from jaxsoftmax._rows.call import ROWS

X = jnp.ones((2, 3))


@pytest.fixture(params=["softmax", "log_softmax"])
def f(request):
    return getattr(jaxsoftmax, request.param)


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
