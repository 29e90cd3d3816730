"""What `xla` computes on a GPU, computed on a CPU: the tests of softmax once more.

There it has other forms, which XLA for GPUs makes one kernel of; `test_kernel_counts`
looks at these. What is traced is what a process with a GPU would trace.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_softmax
from jax import lax
from support import for_gpu, oracle

from jaxsoftmax import softmax
from jaxsoftmax._rows import xla

pytestmark = pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="for machines without a GPU"
)


@pytest.fixture
def implementation():
    return "xla"


@pytest.fixture(params=["softmax", pytest.param("log_softmax", marks=pytest.mark.slow)])
def functions(request):
    return test_softmax.FUNCTIONS[request.param]


@pytest.fixture(autouse=True, scope="module")
def forms_for_gpu():
    def cuda(*arrays, cuda=None, default=None, **others):
        return (cuda or default)(*arrays)

    with for_gpu.gpu_by_default(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(lax, "platform_dependent", cuda)
        yield


class TestDominatedRows:
    test = test_softmax.TestAgainstOracle.test_dominated_rows_and_offsets


@pytest.mark.slow
class TestAgainstOracle(test_softmax.TestAgainstOracle):
    test_dominated_rows_and_offsets = None  # above
    # On a CPU one reduction for all adds up entry by entry: see below.
    test_constant_rows_of_131072_in_f16 = None


class TestEdgeRows(test_softmax.TestEdgeRows):
    pass


def reduced_in_halves(operands, inits, merge, dims):
    """`lax.reduce` as a tree, as on a GPU; on a CPU it is entry by entry."""
    kept = [i for i in range(operands[0].ndim) if i not in dims]
    shape = [operands[0].shape[i] for i in kept]
    size = 2 ** (math.prod(operands[0].shape[i] for i in dims) - 1).bit_length()

    def rows(x, init):
        x = jnp.transpose(x, (*kept, *dims)).reshape(*shape, -1)
        more = jnp.full((*shape, size - x.shape[-1]), init)
        return jnp.concatenate((x, more), -1)

    state = [rows(x, init) for x, init in zip(operands, inits, strict=True)]
    while state[0].shape[-1] > 1:
        halves = [jnp.split(x, 2, -1) for x in state]
        state = merge(*zip(*halves, strict=True))
    return [x[..., 0] for x in state]


@pytest.fixture(scope="class")
def few_are_fused():
    """The derivatives take the forms of rows too long for one kernel."""
    jax.clear_caches()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(xla, "_LONGEST_FUSED", 4)
        patch.setattr(lax, "reduce", reduced_in_halves)
        yield
    jax.clear_caches()


@pytest.mark.usefixtures("few_are_fused")
class TestLongDominatedRows(TestDominatedRows):
    pass


@pytest.mark.usefixtures("few_are_fused")
class TestLongEdgeRows(TestEdgeRows):
    pass


@pytest.mark.usefixtures("few_are_fused")
class TestLongConstantRows:
    test = test_softmax.TestAgainstOracle.test_constant_rows_of_131072_in_f16


@pytest.mark.parametrize("axis", [(1,), (0, 2), (-1,)])
def test_one_reduction_for_the_state_of_a_mean(rng, axis):
    """Whatever the pivot is, the mean; at a weight of more than half, its value."""
    w = rng.random((5, 40, 6)).astype(np.float32)
    t = (1000 + rng.normal(size=w.shape)).astype(np.float32)
    s, pivot, u = xla._mean_state_at_once(jnp.array(w), jnp.array(t), axis)
    want = (oracle._wide(w) * t).sum(axis, keepdims=True) / w.sum(axis, keepdims=True)
    np.testing.assert_allclose(pivot + u / s, want, rtol=1e-6)
    rows = tuple(slice(None) if a in [b % 3 for b in axis] else 0 for a in range(3))
    w[rows] *= 1e-6
    largest = tuple(
        7 % n if isinstance(r, slice) else r for r, n in zip(rows, w.shape, strict=True)
    )
    w[largest] = 1
    _, pivot, _ = xla._mean_state_at_once(jnp.array(w), jnp.array(t), axis)
    assert pivot[tuple(r if r == 0 else 0 for r in rows)] == t[largest]


@pytest.mark.slow
class TestAgainstNaive(test_softmax.TestAgainstNaive):
    pass


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounded_results_are_those_of_a_cast(rng, dtype, nans_allowed):
    """Subnormal ones, 0 and NaN too."""
    x = 12 * rng.normal(size=(64, 40)).astype(np.float32)
    x[3, 5], x[4] = np.nan, -np.inf
    want = softmax(x).astype(dtype)
    got = softmax(x, dtype=dtype)
    np.testing.assert_array_equal(got.astype(np.float32), want.astype(np.float32))


@pytest.mark.parametrize(
    "where", [(1, 1, 5, 7), (2, 1, 1, 7), (2, 3, 1, 1), (1, 3, 5, 1), (1, 1, 1, 1)]
)
@pytest.mark.parametrize("axis", [-1, (-2, -1), -3])
def test_masks_that_dimensions_have_in_common(rng, where, axis):
    x = jnp.array(rng.normal(size=(2, 3, 5, 7)), jnp.float32)
    mask = rng.random(size=where) < 0.7
    want = oracle.softmax(x, axis, mask)
    np.testing.assert_allclose(softmax(x, axis, mask), want, rtol=2e-6)
    got = jax.vmap(lambda x: softmax(x, axis, mask[0]))(x[:, None])
    want = oracle.softmax(x[:, None], axis, mask[0])
    np.testing.assert_allclose(got, want, rtol=2e-6)


def test_kept_of_a_cast():
    """The logits, as they are; and of rows too long for one kernel, P."""

    def kept(shape, **options):
        x = jnp.zeros(shape, jnp.bfloat16)
        f = lambda x: softmax(x, implementation="xla", **options)
        return {(a.shape, a.dtype.name) for a in jax.tree.leaves(jax.vjp(f, x)[1])}

    assert kept((8, 64), dtype="float32") == {((8, 64), "bfloat16")}
    assert kept((8, 64)) == {((8, 64), "bfloat16")}
    assert kept((2, 16384), dtype="float32") == {((2, 16384), "bfloat16")}
    assert kept((2, 16385), dtype="float32") == {((2, 16385), "float32")}
