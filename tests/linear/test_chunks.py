"""How tokens and classes are split: each in one chunk, in an order that is undone."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsoftmax._linear.chunks import over_chunks, over_chunks_into, over_pieces
from jaxsoftmax._linear.plan import (
    class_chunks,
    filled_classes,
    least_chunk,
    token_chunks,
)

SHAPES = [
    (),
    (1,),
    (7,),
    (12,),
    (97,),
    (1000,),
    (1009,),
    (3, 5),
    (1, 9),
    (16, 24),
    (2, 3, 5),
    (4, 1, 130),
]
MOSTS = [1, 2, 3, 5, 7, 8, 33, 100, 10**9]


class TestTokenChunks:
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("most", [1, 3, 8, 100])
    def test_every_token_is_in_one_chunk(self, shape, most):
        chunks = token_chunks(shape, most)
        tokens = 1 + np.arange(math.prod(shape)).reshape(shape)
        split = np.asarray(jax.jit(chunks.split)(tokens))
        assert split.shape == (chunks.count, *chunks.sizes)
        found, times = np.unique(split[split != 0], return_counts=True)
        np.testing.assert_array_equal(found, tokens.ravel())
        assert (times == 1).all()
        assert (split != 0).reshape(chunks.count, -1).any(-1).all()  # none is empty
        np.testing.assert_array_equal(jax.jit(chunks.join)(split), tokens)

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("most", MOSTS)
    def test_size(self, shape, most):
        """Not above `most`, nor, where chunks are many, far below it."""
        chunks = token_chunks(shape, most)
        size, count = math.prod(chunks.sizes), math.prod(shape)
        assert size <= max(most, 1)
        if len(shape) == 1:
            # Half, for a number of chunks that divides; and what is cut off to a
            # multiple of eight.
            assert 2 * size >= min(most, count) - 8
        if most >= count:
            assert chunks.count == 1
            assert chunks.sizes == shape

    @pytest.mark.parametrize(
        ("shape", "most", "count"),
        [((96,), 16, 6), ((4096,), 300, 16), ((6, 35), 50, 5)],
    )
    def test_even_where_that_can_be(self, shape, most, count):
        chunks = token_chunks(shape, most)
        assert chunks.count == count
        assert chunks.count * math.prod(chunks.sizes) == math.prod(shape)

    def test_long_chunks_are_aligned(self):
        """A prime number of tokens: all chunks but the last of a multiple of eight."""
        chunks = token_chunks((1009,), 300)
        assert chunks.sizes[0] % 8 == 0

    @pytest.mark.parametrize(("shape", "most"), [((7,), 3), ((3, 5), 4), ((2, 3), 6)])
    def test_more_dimensions(self, shape, most):
        """Those of a token come along; `fill` is where there is no token."""
        chunks = token_chunks(shape, most)
        array = jnp.arange(math.prod(shape) * 6.0).reshape(*shape, 2, 3)
        split = chunks.split(array, -1.0)
        assert split.shape == (chunks.count, *chunks.sizes, 2, 3)
        np.testing.assert_array_equal(chunks.join(split), array)
        missing = chunks.count * math.prod(chunks.sizes) - math.prod(shape)
        assert (np.asarray(split) == -1).sum() == 6 * missing

    def test_every_chunk_has_a_share_of_each_part(self):
        """Of each of eight devices, which have a part of a dimension each."""
        chunks = token_chunks((4, 64), 32)
        split = np.asarray(chunks.split(jnp.arange(256).reshape(4, 64)))
        part = split % 64 // (64 // 8)
        for chunk in part.reshape(chunks.count, -1):
            np.testing.assert_array_equal(np.bincount(chunk, minlength=8), 4)


class TestLoops:
    @pytest.mark.parametrize("count", [1, 4])
    def test_over_chunks(self, rng, count):
        """In results that are a number a row and in others; a tree of arrays."""
        a, b = rng.normal(size=(count, 3, 5)), rng.normal(size=(count, 3))
        a, b = jnp.array(a, jnp.float32), jnp.array(b, jnp.float32)

        def body(a, b):
            rows = jnp.sum(a, -1, keepdims=True)
            return {"sum": rows, "product": (a * b[:, None], None, rows * b[:, None])}

        got = jax.jit(lambda *arrays: over_chunks(body, arrays))(a, b)
        want = jax.vmap(body)(a, b)
        jax.tree.map(np.testing.assert_array_equal, got, want)

    @pytest.mark.parametrize("count", [1, 3])
    def test_over_pieces(self, rng, count):
        a = jnp.array(rng.normal(size=(count, 3, 5)), jnp.float32)
        b = jnp.array(rng.normal(size=(count, 3)), jnp.float32)

        def body(a, b):
            rows = jnp.sum(a, -1, keepdims=True)
            return a * b[:, None], (rows, rows * b[:, None])

        got = jax.jit(lambda *arrays: over_pieces(body, arrays))(a, b)
        want = jax.vmap(body)(a, b)
        jax.tree.map(np.testing.assert_array_equal, got, want)

    def test_over_chunks_into(self, rng):
        a = jnp.array(rng.normal(size=(4, 3, 5)), jnp.float32)

        def body(whole, place, a):
            rows = jnp.sum(a, -1, keepdims=True)
            return whole.at[place].set(2 * a), {"sum": rows, "twice": 2 * rows}

        whole = jnp.full(a.shape, 7.0)
        got = jax.jit(lambda a: over_chunks_into(body, whole, (a,)))(a)
        rows = jnp.sum(a, -1, keepdims=True)
        want = 2 * a, {"sum": rows, "twice": 2 * rows}
        jax.tree.map(np.testing.assert_array_equal, got, want)


VOCABULARIES = [1, 5, 127, 128, 129, 300, 1000, 1024, 50257, 151936]


class TestClassChunks:
    @pytest.mark.parametrize("vocabulary", VOCABULARIES)
    @pytest.mark.parametrize("most", [0, 1000, 40000, 10**9])
    def test_every_class_counts_once(self, vocabulary, most):
        chunks = class_chunks(vocabulary, most)
        classes = chunks.fold(jnp.arange(vocabulary), 0)
        assert classes.shape == (chunks.folds, chunks.length)

        @jax.vmap
        def slices(chunk):
            return chunks.slice(chunk, classes, 0), chunks.owned(chunk)

        seen, owned = map(np.asarray, jax.jit(slices)(np.arange(chunks.count)))
        assert seen.shape == (chunks.count, chunks.folds, chunks.width)
        once = seen.swapaxes(1, 2)[owned]
        np.testing.assert_array_equal(np.sort(once.ravel()), np.arange(vocabulary))
        if chunks.even:
            assert owned.all()
        size = chunks.folds * chunks.width
        assert size <= max(most, least_chunk(vocabulary))

    @pytest.mark.parametrize("vocabulary", VOCABULARIES)
    def test_fold(self, vocabulary):
        chunks = class_chunks(vocabulary, 200)
        for axis, shape in ((0, (vocabulary, 2)), (1, (2, vocabulary))):
            array = jnp.arange(2 * vocabulary).reshape(shape)
            folded = chunks.fold(array, axis)
            assert folded.ndim == 3
            assert folded.shape[axis : axis + 2] == (chunks.folds, chunks.length)
            np.testing.assert_array_equal(chunks.unfold(folded, axis), array)

    @pytest.mark.parametrize(("vocabulary", "count"), [(100, 1), (384, 3), (300, 3)])
    @pytest.mark.parametrize("axis", [0, 1])
    def test_put_what_was_sliced(self, vocabulary, count, axis):
        """In order of the chunks: of a class in two, the second stays."""
        chunks = class_chunks(vocabulary, 128)
        assert chunks.count == count
        shape = (vocabulary, 2) if axis == 0 else (2, vocabulary)
        array = jnp.arange(2.0 * vocabulary).reshape(shape)
        folded = chunks.fold(array, axis)
        written = jnp.full_like(folded, -1)
        for i in range(count):
            part = chunks.slice(i, folded, axis)
            owned = chunks.owned(i)
            owned = owned[:, None] if axis == 0 else owned
            part = jnp.where(owned, part, -1)
            written = chunks.put(jnp.int32(i), written, part, axis)
        np.testing.assert_array_equal(chunks.unfold(written, axis), array)

    @pytest.mark.parametrize("most", [512, 1024, 2048])
    def test_no_class_twice_where_that_can_be(self, most):
        chunks = class_chunks(4096, most)
        assert chunks.even
        assert chunks.count == 4096 // most


class TestFilledClasses:
    @pytest.mark.parametrize("vocabulary", VOCABULARIES)
    @pytest.mark.parametrize("multiple", [1, 128])
    def test_every_class_has_a_place(self, vocabulary, multiple):
        filling = filled_classes(vocabulary, multiple)
        size = filling.folds * filling.filled
        assert size % multiple == 0
        assert size - vocabulary < multiple
        assert filling.full == (size == vocabulary)
        classes = np.arange(vocabulary, dtype=np.int32)
        places = np.asarray(filling.place(jnp.array(classes)))
        given = np.asarray(filling.is_class())
        assert given.shape == (size,)
        np.testing.assert_array_equal(np.flatnonzero(given), places)
        filled = np.asarray(filling.fill(jnp.array(classes + 1), 0))
        np.testing.assert_array_equal(filled[places], classes + 1)
        assert (filled[~given] == 0).all()
        missing = jnp.array([-1, -2, -3])
        np.testing.assert_array_equal(filling.place(missing), missing)

    @pytest.mark.parametrize("vocabulary", [5, 300, 1024])
    @pytest.mark.parametrize("axis", [0, 1])
    def test_strip_what_was_filled(self, vocabulary, axis):
        filling = filled_classes(vocabulary, 128)
        shape = (vocabulary, 2) if axis == 0 else (2, vocabulary)
        array = jnp.arange(2.0 * vocabulary).reshape(shape)
        filled = filling.fill(array, axis)
        assert filled.shape[axis] % 128 == 0
        np.testing.assert_array_equal(filling.strip(filled, axis), array)
