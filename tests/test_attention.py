"""Attention: every option against the oracle, edge rows, dropout, merging, errors."""

import functools
import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import attention_oracle as oracle
from support.attention_cases import (
    IMPLEMENTATIONS,
    arrays,
    assert_within,
    attention,
    check,
    exact_vjp,
    full_shape,
    quick_vjp,
    reference,
)
from support.loss_cases import covering, name_of

import jaxsoftmax
from jaxsoftmax._attend import xla
from jaxsoftmax._core import dispatch
from jaxsoftmax.flax import attention_fn

DTYPES = ["float32", "bfloat16", "float16"]
# Where what is about 16 bits is the same for both.
WITH_ONE_OF_16_BITS = [*DTYPES[:2], pytest.param("float16", marks=pytest.mark.slow)]


@pytest.fixture(params=IMPLEMENTATIONS if jax.default_backend() == "gpu" else ["xla"])
def implementation(request):
    """Every implementation that can run here; all pass the same tests.

    On a CPU None is "xla" too, and is among `FACTORS`.
    """
    return request.param


# --- the options ----------------------------------------------------------------------

# Which dimensions are full: the others are 1.
DIMENSIONS = ("batch", "heads", "queries", "keys")
BROADCASTS = [
    dict(zip(DIMENSIONS, which, strict=True))
    for which in itertools.product((False, True), repeat=4)
]

FACTORS = {
    "implementation": IMPLEMENTATIONS,
    "dtype": [*DTYPES, "float64"],
    "batch": [(), (2,)],
    "heads": [(2, 2), (4, 2), (4, 1)],
    "widths": [(8, 8), (8, 5), (3, 8)],
    "lengths": [(21, 21), (5, 37), (37, 5), (1, 19)],
    "bias": [None, "full", "keys"],
    "mask": [None, "full", "queries"],
    "is_causal": [False, True],
    "local_window_size": [None, 3, (6, 0), (0, 9)],
    "query_offset": [0, 4, "array"],
    "seq_lengths": [None, "q", "kv", "both"],
    "segments": [False, True],
    "logits_soft_cap": [None, 2.0],
    "sinks": [False, True],
    "dropout_rate": [0.0, 0.3],
    "scale": [None, 0.7],
}

SHAPES = {
    "full": (True, True, True, True),
    "keys": (True, False, False, True),
    "queries": (True, True, True, False),
}


def broadcast_shape(full, which):
    return tuple(n if w else 1 for n, w in zip(full, which, strict=True))


def arguments(rng, case):
    """Of a case of `FACTORS`: float arrays, others, and what is static."""
    o = dict(case)
    (t, s), (n, k), (h, hv) = (o.pop(x) for x in ("lengths", "heads", "widths"))
    batch, dtype = o.pop("batch"), o.pop("dtype")
    floats = arrays(rng, t, s, n, k, h, hv, batch, dtype)
    shape, others = full_shape(floats), {}
    b = shape[0]
    which = o.pop("bias")
    if which:
        bias_dtype = "float32" if which == "keys" else dtype
        x = rng.normal(size=broadcast_shape(shape, SHAPES[which]))
        floats["bias"] = jnp.array(x, bias_dtype)
    which = o.pop("mask")
    if which:
        others["mask"] = rng.random(size=broadcast_shape(shape, SHAPES[which])) < 0.7
    which = o.pop("seq_lengths")
    if which in ("q", "both"):
        others["query_seq_lengths"] = np.array([t // 2, t][-b:], np.int32)
    if which in ("kv", "both"):
        others["key_value_seq_lengths"] = np.array([s, s // 2 + 1][-b:], np.int32)
    if o.pop("segments"):
        q_ids = np.arange(t) // 4 + rng.integers(2, size=(*batch, 1))
        k_ids = np.arange(s) // 4 + rng.integers(2, size=(*batch, 1))
        q_ids, k_ids = (x.astype(np.int32) for x in (q_ids, k_ids))
        others["q_segment_ids"], others["kv_segment_ids"] = q_ids, k_ids
    if o["query_offset"] == "array":
        del o["query_offset"]
        others["query_offset"] = np.array([7, -3][-b:], np.int32)
    if o.pop("sinks"):
        floats["sinks"] = jnp.array(rng.normal(size=n), "float32")
    if o["dropout_rate"]:
        others["dropout_key"] = jax.random.key(7)
    return floats, others, o


@pytest.mark.parametrize("case", covering(FACTORS, 2), ids=name_of)
@pytest.mark.pairwise(1)
def test_any_two_options(small_blocks, rng, case):
    with jax.enable_x64(case["dtype"] == "float64"):
        floats, others, static = arguments(rng, case)
        check(rng, floats, others, **static)


ALL = {
    "batch": (2,),
    "heads": (4, 2),
    "widths": (8, 5),
    "lengths": (37, 41),
    "bias": "full",
    "mask": "full",
    "is_causal": True,
    "local_window_size": (20, 3),
    "query_offset": "array",
    "seq_lengths": "both",
    "segments": False,
    "logits_soft_cap": 2.0,
    "sinks": True,
    "dropout_rate": 0.3,
    "scale": 0.7,
}


@pytest.mark.parametrize("dtype", WITH_ONE_OF_16_BITS)
def test_all_options_together(small_blocks, implementation, rng, dtype):
    case = {**ALL, "dtype": dtype, "implementation": implementation}
    floats, others, static = arguments(rng, case)
    others["q_segment_ids"] = (np.arange(37) // 15 * np.ones((2, 1))).astype(np.int32)
    others["kv_segment_ids"] = (np.arange(41) // 15 * np.ones((2, 1))).astype(np.int32)
    check(rng, floats, others, **static)


@pytest.mark.parametrize("dtype", WITH_ONE_OF_16_BITS)
def test_tangents(small_blocks, implementation, rng, dtype):
    """Of all arguments at once, within the oracle's bounds."""
    case = {**ALL, "dtype": dtype, "implementation": implementation, "dropout_rate": 0}
    floats, others, static = arguments(rng, case)
    tangents = {
        k: jnp.array(rng.normal(size=x.shape), x.dtype) for k, x in floats.items()
    }
    f = lambda x: attention(**x, **others, **static, return_residual=True)
    pushed = jax.jit(lambda x, t: jax.jvp(f, (x,), (t,))[1])(floats, tangents)
    of = reference(floats, others, static)
    want, bounds = of.jvp(**tangents), of.jvp_bounds(dtype, **tangents)
    for name, *each in zip(("out", "lse"), pushed, want, bounds, strict=True):
        assert_within(*each, f"tangent of {name}")


@pytest.mark.parametrize("which", BROADCASTS, ids=name_of)
@pytest.mark.pairwise(2)
def test_shapes_of_bias_and_mask(small_blocks, rng, which):
    """Whatever is broadcast; the gradient of a bias is summed to its own shape."""
    floats = arrays(rng, 11, 13, 4, 2)
    shape = broadcast_shape(full_shape(floats), which.values())
    floats["bias"] = jnp.array(rng.normal(size=shape), jnp.float32)
    mask = rng.random(size=shape) < 0.8
    mask.flat[0] = True
    check(rng, floats, {"mask": mask}, is_causal=True)


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
def test_bias_and_mask_of_lower_rank(small_blocks, rng, rank):
    floats = arrays(rng, 11, 13, 4, 2)
    shape = full_shape(floats)[4 - rank :]
    floats["bias"] = jnp.array(rng.normal(size=shape), jnp.float32)
    check(rng, floats, {"mask": np.array(rng.random(size=shape) < 2)})


def test_mask_of_numbers(rng):
    """Concrete numbers that are 0 or 1 are taken as a mask; no others are."""
    floats = arrays(rng, 5, 6)
    mask = rng.random(size=(5, 6)) < 0.5
    want = attention(**floats, mask=mask)
    for dtype in ("int32", "float32", "uint8"):
        got = attention(**floats, mask=mask.astype(dtype))
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("t", "s", "is_causal"),
    [
        (1, 700, False),
        (700, 1, True),
        (700, 130, True),
        (700, 700, True),
        *(
            pytest.param(*sizes, marks=pytest.mark.slow)
            for sizes in ((130, 700, True), (700, 700, False), (5, 1030, False))
        ),
    ],
)
def test_sizes_beyond_a_block(rng, t, s, is_causal):
    """With the blocks as they are: in part, one, and more than one."""
    floats = arrays(rng, t, s, 2, 1, batch=(1,))
    check(rng, floats, is_causal=is_causal, implementation="xla")


@pytest.mark.parametrize(
    ("window", "same"),
    [
        (sys.maxsize, None),
        (np.int64(2**31), None),
        (2**31 - 1, None),
        (2**31 - 2, None),
        ((2**63, 3), (100, 3)),
        ((3, sys.maxsize), (3, 100)),
    ],
)
def test_windows_without_a_bound(small_blocks, rng, window, same):
    """As large as the length, or no window; for the kernels too."""
    floats = arrays(rng, 20, 30)
    got = attention(**floats, local_window_size=window)
    np.testing.assert_array_equal(got, attention(**floats, local_window_size=same))


SCALES = {
    "number of numpy": (np.float32(0.3), 0.3),
    "array of a number": (np.array(0.3), 0.3),
    "array of jax": (jnp.float32(0.3), 0.3),
    "integers": (np.array([1, 2, 3, 0]).reshape(4, 1, 1), None),
    "negative": (-0.4, -0.4),
    "0": (0, 0.0),
}


@pytest.mark.parametrize("case", list(SCALES))
def test_scales(small_blocks, implementation, rng, case):
    """What jax.nn multiplies logits with; other arrays are in the transforms' tests."""
    scale, oracles = SCALES[case]
    floats = arrays(rng, 20, 30, 4, 2)
    static = {"scale": scale, "implementation": implementation}
    q = floats["query"].shape

    @jax.jit
    def run(floats, g):
        f = lambda x: attention(**x, **static, return_residual=True)
        y, pull = jax.vjp(f, floats)
        return y, pull(g)[0]

    g = jnp.array(rng.normal(size=q), "float32"), jnp.ones(q[:-1])
    (out, lse), d = run(floats, g)
    of = reference(floats, {}, {"scale": scale if oracles is None else oracles})
    bounds = of.bounds("float32")
    assert_within(out, of.out, bounds["out"], "out")
    assert_within(lse, of.lse, bounds["lse"], "lse")
    want, bounds = of.vjp(*g), of.bounds("float32", *g)
    for name in floats:
        assert_within(d[name], want[name], bounds[name], f"gradient of {name}")


def test_scale_in_16_bits(small_blocks, rng):
    """It is applied to the logits in float32: a learned one is as good as a number."""
    floats = arrays(rng, 20, 30, 4, 2, dtype="bfloat16")
    f = lambda scale: attention(**floats, scale=scale)
    np.testing.assert_array_equal(jax.jit(f)(0.7), f(np.float32(0.7)))


def test_numbers_in_arrays(rng):
    """Of numpy or of jax, without dimensions: they are numbers that are known."""
    floats = arrays(rng, 5, 6)
    given = {"logits_soft_cap": 2.0, "dropout_rate": 0.5}
    key = {"dropout_key": jax.random.key(0)}
    want = attention(**floats, **given, **key)
    for make in (np.array, jnp.array, np.float32):
        arrays_of = {name: make(x) for name, x in given.items()}
        got = attention(**floats, **arrays_of, **key)
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    "window",
    [
        (0, 0),
        (9, 33),
        *(pytest.param(w, marks=pytest.mark.slow) for w in ((40, 0), 16)),
    ],
)
def test_windows_beyond_a_block(small_blocks, monkeypatch, rng, window):
    """Blocks of keys are larger here than those of queries."""
    monkeypatch.setattr(xla, "KEY_BLOCK", 48)
    floats = arrays(rng, 130, 130, 1, 1, batch=(1,))
    for causal in (False, True):
        check(
            rng,
            floats,
            is_causal=causal,
            local_window_size=window,
            implementation="xla",
        )


@pytest.mark.parametrize(
    ("t", "s", "window"),
    [(130, 40, 5), (40, 130, (0, 20))]
    + [
        pytest.param(*case, marks=pytest.mark.slow)
        for case in ((130, 40, (20, 0)), (40, 130, 5))
    ],
)
def test_windows_that_leave_the_keys(small_blocks, implementation, rng, t, s, window):
    """Rows past the last key that their window has see nothing; some keys neither."""
    floats = arrays(rng, t, s, 2, 2, batch=(1,))
    static = {"local_window_size": window, "implementation": implementation}
    check(rng, floats, is_causal=True, **static)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1), (6, 2)])
def test_groups_of_heads(small_blocks, implementation, rng, heads):
    """Query head n reads the keys of n // (N // K): as with keys that are repeated."""
    n, k = heads
    floats = arrays(rng, 9, 12, n, k)
    (out, _), _ = check(rng, floats, implementation=implementation)
    repeated = {x: jnp.repeat(floats[x], n // k, 2) for x in ("key", "value")}
    again = attention(**{**floats, **repeated}, implementation=implementation)
    np.testing.assert_allclose(out, again, atol=1e-6)


def test_without_batch(small_blocks, implementation, rng):
    """As a batch of one; segment ids come without a batch too."""
    floats = arrays(rng, 9, 12, 4, 2, batch=())
    ids = np.arange(12, dtype=np.int32) // 5
    segments = {"q_segment_ids": ids[:9], "kv_segment_ids": ids}
    (out, lse), _ = check(rng, floats, segments, implementation=implementation)
    batched = {name: x[None] for name, x in floats.items()}
    segments = {name: x[None] for name, x in segments.items()}
    want = attention(
        **batched, **segments, return_residual=True, implementation=implementation
    )
    np.testing.assert_allclose(out, want[0][0], atol=1e-6)
    np.testing.assert_allclose(lse, want[1][0], atol=1e-6)


# The batch, and which of its dimensions a bias, a mask and a scale have in full.
BATCHES = [
    ((2, 3), {}),
    ((2, 3), {"bias": (1, 1), "mask": (0, 0), "scale": (1, 1)}),
    ((2, 3), {"bias": (1, 0), "mask": (0, 1), "scale": (0, 0)}),
    ((2, 1, 3), {"bias": (0, 0, 1), "mask": (1, 0, 0), "scale": (1, 0, 1)}),
    ((2, 2, 2), {"bias": (0, 1, 1), "mask": (1, 0, 1), "scale": (1, 1, 0)}),
    ((0, 3), {"bias": (1, 0)}),
    ((1, 1), {"bias": (0, 0), "mask": (1, 0)}),
]
# The dimensions of an argument that follow those of its batch.
WITHOUT_BATCH = {"sinks": None, "dropout_key": None, "query_seq_lengths": 0}
WITHOUT_BATCH |= {"key_value_seq_lengths": 0, "q_segment_ids": 1, "kv_segment_ids": 1}


def in_one_batch(arguments, batch):
    """With one batch dimension, whatever is in full: what the oracle takes."""
    found = {}
    for name, x in arguments.items():
        rank = WITHOUT_BATCH.get(name, 3)
        if rank is not None:
            rest = x.shape[x.ndim - rank :]
            x = jnp.broadcast_to(x, (*batch, *rest)).reshape(-1, *rest)
        found[name] = x
    return found


@pytest.mark.parametrize(
    ("batch", "full", "dropout"),
    [(*case, False) for case in BATCHES[:4]]
    + [(*BATCHES[2], True)]
    + [pytest.param(*case, True, marks=pytest.mark.slow) for case in BATCHES[3:]],
    ids=str,
)
def test_several_batch_dimensions(
    small_blocks, implementation, rng, batch, full, dropout
):
    """As one that has all entries; of what is 1 in some, the gradient is summed."""
    floats = arrays(rng, 20, 30, 4, 2, batch=batch)
    others = {
        "query_seq_lengths": jnp.array(rng.integers(0, 21, size=batch), jnp.int32),
        "key_value_seq_lengths": jnp.array(rng.integers(0, 31, size=batch), jnp.int32),
    }
    if dropout:
        others["dropout_key"] = jax.random.key(3)
    for name, which in full.items():
        lead = [n if whole else 1 for n, whole in zip(batch, which, strict=True)]
        x = rng.normal(size=(*lead, 4, *((1, 1) if name == "scale" else (20, 30))))
        if name == "mask":
            others[name] = jnp.array(x > -0.5)
        else:
            floats[name] = jnp.array(x, "float32")
    static = {"is_causal": True, "implementation": implementation}
    static |= {"dropout_rate": 0.3} if dropout else {}
    q = floats["query"].shape
    g = jnp.array(rng.normal(size=q), "float32"), jnp.ones(q[:-1])
    (out, lse), d = quick_vjp(tuple(static.items()), floats, others, g)
    assert (out.shape, lse.shape) == (q, q[:-1])
    folded = [in_one_batch(x, batch) for x in (floats, others)]
    flat = tuple(x.reshape(-1, *x.shape[len(batch) :]) for x in g)
    (want, want_lse), d_want = check(rng, *folded, g=flat, **static)
    np.testing.assert_allclose(out, want.reshape(q), atol=1e-6)
    np.testing.assert_allclose(lse, want_lse.reshape(q[:-1]), atol=1e-6)
    for name, x in floats.items():
        all_of_it = d_want[name].reshape(*batch, *d_want[name].shape[1:])
        expected = oracle.sum_to(np.asarray(all_of_it), x.shape)
        np.testing.assert_allclose(d[name], expected, atol=1e-5, err_msg=name)


def test_batches_in_16_bits(small_blocks, rng):
    """With the low digits of the result, and of merged parts."""
    floats = arrays(rng, 20, 30, 4, 2, batch=(2, 3), dtype="bfloat16")
    floats["bias"] = jnp.array(rng.normal(size=(2, 1, 4, 20, 30)), "bfloat16")
    g = jnp.ones((2, 3, 20, 4, 8), "bfloat16"), jnp.ones((2, 3, 20, 4))
    (out, lse), _ = quick_vjp((), floats, {}, g)
    folded = in_one_batch(floats, (2, 3))
    want = check(rng, folded)[0]
    np.testing.assert_array_equal(out.reshape(want[0].shape), want[0])
    np.testing.assert_array_equal(lse.reshape(want[1].shape), want[1])
    merged = jaxsoftmax.merge_attention(out, lse, out, lse)
    assert merged[0].shape == out.shape


SHORT = {
    "lengths": {"query_seq_lengths": 15, "key_value_seq_lengths": np.int32(17)},
    "lengths in an array": {"key_value_seq_lengths": np.full(1, 17)},
    "segments": {
        "q_segment_ids": np.arange(20) // 7,
        "kv_segment_ids": np.arange(30) // 9,
    },
    "segments of one": {"q_segment_ids": 0, "kv_segment_ids": np.arange(30) // 9},
    "sinks": {"sinks": jnp.float32(0.5)},
    "a sink in an array": {"sinks": jnp.full(1, 0.5)},
}


@pytest.mark.parametrize("batch", [(), (2, 3)])
@pytest.mark.parametrize("case", list(SHORT))
def test_lengths_segments_and_sinks_that_broadcast(small_blocks, rng, case, batch):
    """As in full; the gradient of a sink for all heads is one number."""
    floats = arrays(rng, 20, 30, 4, 2, batch=batch)
    short = SHORT[case]
    lead = batch or (1,)

    def in_full(name, x):
        shape = {"sinks": (4,), "q_segment_ids": (*lead, 20)}
        shape |= {"kv_segment_ids": (*lead, 30)}
        return jnp.broadcast_to(x, shape.get(name, lead))

    full = {name: in_full(name, x) for name, x in short.items()}
    given = {name: jnp.asarray(x) for name, x in short.items()}

    @jax.jit
    def run(floats, given):
        f = lambda x: attention(**x, **given, return_residual=True)
        out, pull = jax.vjp(f, floats)
        return out, pull(jax.tree.map(jnp.ones_like, out))

    got, want = run(floats, given), run(floats, full)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    np.testing.assert_array_equal(attention(**floats, **short), got[0][0])
    if "sinks" in given:
        loss = lambda sinks: jnp.sum(jnp.sin(attention(**floats, sinks=sinks)))
        d, d_full = jax.grad(loss)(given["sinks"]), jax.grad(loss)(full["sinks"])
        assert d.shape == given["sinks"].shape
        np.testing.assert_allclose(jnp.sum(d), jnp.sum(d_full), rtol=1e-5)


@pytest.mark.parametrize("shape", [(0, 5, 7), (2, 0, 7), (2, 5, 0), (2, 0, 0)])
def test_empty_sizes(implementation, rng, shape):
    """No keys: each row is empty. Gradients have the shapes of the arguments."""
    b, t, s = shape
    floats = arrays(rng, t, s, 4, 2, batch=(b,))
    floats["bias"] = jnp.zeros((t, s), jnp.float32)
    floats["sinks"] = jnp.zeros(4, jnp.float32)
    for names in (FLOATS_WITHOUT_SINKS, tuple(floats)):
        given = {name: floats[name] for name in names}
        check(rng, given, is_causal=True, implementation=implementation)


FLOATS_WITHOUT_SINKS = ("query", "key", "value", "bias")


def test_decode(small_blocks, implementation, rng):
    """One query, over a cache that is filled in part."""
    floats = arrays(rng, 1, 100, 4, 1, batch=(3,))
    lengths = np.array([1, 37, 100], np.int32)
    others = {"key_value_seq_lengths": lengths}
    (out, _), d = check(rng, floats, others, implementation=implementation)
    for b, n in enumerate(lengths):
        cut = {x: a[b, : n if x != "query" else 1] for x, a in floats.items()}
        np.testing.assert_allclose(
            out[b], attention(**cut, implementation=implementation), atol=1e-6
        )
        np.testing.assert_array_equal(d["key"][b, n:], 0)
        np.testing.assert_array_equal(d["value"][b, n:], 0)


# --- positions ------------------------------------------------------------------------

OFFSETS = [
    (7, {"is_causal": True}),
    (-5, {"is_causal": True}),
    (24, {"local_window_size": (6, 0)}),
    (-60, {"local_window_size": 3}),
    (np.array(7), {"is_causal": True, "local_window_size": (5, 5)}),
    (np.array([3, -9]), {"is_causal": True}),
    (np.array([100, 16]), {"local_window_size": (4, 2)}),
    (np.array([-30]), {"is_causal": True}),
]


@pytest.mark.parametrize(("offset", "static"), OFFSETS, ids=str)
def test_query_offset(small_blocks, implementation, rng, offset, static):
    """A number, which is static, and an array, for all entries or for each."""
    floats, others = arrays(rng, 21, 37, 4, 2), {}
    if isinstance(offset, int):
        static = {**static, "query_offset": offset}
    else:
        others["query_offset"] = jnp.asarray(offset)
    check(rng, floats, others, implementation=implementation, **static)


def test_offsets_without_positions(rng):
    """Neither causal nor a window: it is of no use, and refuses no kernel."""
    floats = arrays(rng, 5, 6)
    got = attention(**floats, query_offset=jnp.array([3, 4]))
    np.testing.assert_array_equal(got, attention(**floats))
    text = str(jax.make_jaxpr(lambda: attention(**floats, query_offset=3))())
    assert text == str(jax.make_jaxpr(lambda: attention(**floats))())


def test_chunks_of_queries_are_the_whole(small_blocks, rng):
    """As a prefill in chunks has them: one program for all chunks."""
    floats = arrays(rng, 40, 40, 4, 2)
    options = {"is_causal": True, "local_window_size": (25, 0)}

    @jax.jit
    def chunk(query, start):
        x = {**floats, "query": query}
        return attention(**x, **options, query_offset=start, return_residual=True)

    starts = range(0, 40, 8)
    found = [chunk(floats["query"][:, i : i + 8], i) for i in starts]
    want = attention(**floats, **options, return_residual=True)
    for got, whole in zip(zip(*found, strict=True), want, strict=True):
        np.testing.assert_allclose(jnp.concatenate(got, 1), whole, atol=1e-6)
    assert chunk._cache_size() == 1


def test_chunks_of_queries_and_keys_are_the_whole(small_blocks, rng):
    """As devices have them that share a sequence: an offset may be below 0."""
    floats = arrays(rng, 32, 32, 2, 2)
    part = lambda name, i, floats: floats[name][:, 8 * i : 8 * i + 8]

    @jax.jit
    def parts(floats):
        outs = []
        for i in range(4):
            merged = None
            for j in range(4):
                x = {"query": part("query", i, floats)}
                x |= {name: part(name, j, floats) for name in ("key", "value")}
                offset = jnp.int32(8 * (i - j))
                options = {"is_causal": True, "query_offset": offset}
                found = attention(**x, **options, return_residual=True)
                if merged is not None:
                    found = jaxsoftmax.merge_attention(*merged, *found)
                merged = found
            outs.append(merged[0])
        return jnp.concatenate(outs, 1)

    def both(f):
        return f(floats), jax.grad(lambda x: jnp.sum(jnp.sin(f(x))))(floats)

    got, want = both(parts), both(lambda x: attention(**x, is_causal=True))
    for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_decode_with_a_window(small_blocks, nans_allowed, rng):
    """Over a cache whose rest is not written yet, each entry at its own place."""
    floats = arrays(rng, 1, 50, 4, 1, batch=(3,))
    places = np.array([4, 30, 49])
    spoiled = dict(floats)
    for name in ("key", "value"):
        x = np.array(floats[name])
        for b, n in enumerate(places):
            x[b, n + 1 :] = np.nan
            x[b, : max(n - 10, 0)] = np.nan
        spoiled[name] = jnp.asarray(x)

    @jax.jit
    def run(floats, places):
        options = {"local_window_size": (10, 0), "query_offset": places}
        return attention(**floats, **options)

    got = run(spoiled, places)
    for b, n in enumerate(places):
        seen = slice(max(n - 10, 0), n + 1)
        cut = {x: a[b] if x == "query" else a[b, seen] for x, a in floats.items()}
        np.testing.assert_allclose(got[b], attention(**cut), atol=1e-6)


# --- the largest logits ---------------------------------------------------------------

# Some with all pairs of some entry hidden.
LARGEST = {
    "plain": {},
    "bfloat16": {"dtype": "bfloat16"},
    "float64": {"dtype": "float64"},
    "no batch": {"batch": (), "is_causal": True},
    "offset": {"is_causal": True, "query_offset": np.array([5, -40])},
    "lengths": {"key_value_seq_lengths": np.array([9, 0])},
    "cap and sinks": {"logits_soft_cap": 2.0, "sinks": jnp.full(4, 50.0)},
    "bias": {"bias": np.where(np.arange(30) < 20, 3.0, -np.inf).astype("f4")},
    "mask": {"mask": np.arange(30) % 7 == 3, "scale": -2.0},
    "dropout": {"dropout_rate": 0.6, "dropout_key": jax.random.key(0)},
}


@pytest.mark.parametrize("case", list(LARGEST))
def test_max_logits(small_blocks, implementation, rng, case):
    """Of all pairs that see each other, per head; the other results stay."""
    options = dict(LARGEST[case])
    dtype, batch = options.pop("dtype", "float32"), options.pop("batch", (2,))
    with jax.enable_x64(dtype == "float64"):
        floats = arrays(rng, 20, 30, 4, 2, batch=batch, dtype=dtype)
        f = functools.partial(attention, **options, implementation=implementation)
        run = jax.jit(lambda x: f(**x, return_residual=True, return_max_logits=True))
        out, lse, largest = run(floats)
        want = jax.jit(lambda x: f(**x, return_residual=True))(floats)
        again = jax.jit(lambda x: f(**x, return_max_logits=True))(floats)
    jax.tree.map(np.testing.assert_array_equal, (out, lse), want)
    np.testing.assert_array_equal(again[1], largest)
    options = {n: x for n, x in options.items() if not n.startswith("dropout")}
    logits = oracle.forward(**floats, **options).s
    assert largest.dtype == lse.dtype
    assert largest.shape == (*batch, 4)
    expected = logits.max((2, 3)).reshape(largest.shape)
    # Sums of 8 products.
    eps = float(jnp.finfo(largest.dtype).eps)
    np.testing.assert_allclose(largest, expected, rtol=16 * eps, atol=16 * eps)


def test_max_logits_of_batches_and_of_nothing(small_blocks, rng):
    floats = arrays(rng, 20, 30, 4, 2, batch=(2, 3))
    floats["bias"] = jnp.array(rng.normal(size=(2, 1, 4, 20, 30)), jnp.float32)
    _, largest = attention(**floats, return_max_logits=True)
    logits = oracle.forward(**in_one_batch(floats, (2, 3))).s
    np.testing.assert_allclose(largest, logits.max((2, 3)).reshape(2, 3, 4), rtol=1e-5)
    for t, s in ((0, 5), (5, 0)):
        _, largest = attention(**arrays(rng, t, s, 4, 2), return_max_logits=True)
        np.testing.assert_array_equal(largest, np.full((2, 4), -np.inf))


def test_max_logits_of_nan(nans_allowed, rng):
    """A NaN shows in its own head."""
    floats = arrays(rng, 5, 6)
    floats["query"] = floats["query"].at[0, 1, 1].set(jnp.nan)
    _, largest = attention(**floats, return_max_logits=True)
    np.testing.assert_array_equal(jnp.isnan(largest), [[False, True], [False, False]])


# --- rows and entries that are special ------------------------------------------------

EMPTY = {
    "mask": {"mask": np.arange(20)[:, None] % 4 != 1},
    "query lengths": {"query_seq_lengths": np.array([0, 20], np.int32)},
    "key lengths": {"key_value_seq_lengths": np.array([0, 30], np.int32)},
    "segments": {
        "q_segment_ids": np.where(np.arange(20) % 4 == 1, 9, 0)[None].repeat(2, 0),
        "kv_segment_ids": np.zeros((2, 30), np.int32),
    },
    "causal": {
        "mask": np.arange(30) >= 7,
        "is_causal": True,
    },
}


@pytest.mark.parametrize(
    ("kind", "sinks"),
    [(kind, False) for kind in (*EMPTY, "bias")]
    + [("mask", True)]
    + [
        pytest.param(kind, True, marks=pytest.mark.slow)
        for kind in ("query lengths", "bias")
    ],
)
def test_rows_without_keys(small_blocks, implementation, rng, kind, sinks):
    """They give 0, -inf or the sink, and gradients of 0, as do keys without queries."""
    floats = arrays(rng, 20, 30, 4, 2)
    others = dict(EMPTY.get(kind, {}))
    causal = others.pop("is_causal", False)
    if kind == "bias":
        x = np.where(np.arange(20)[:, None] % 4 == 1, -np.inf, rng.normal(size=(20, 1)))
        floats["bias"] = jnp.array(x, jnp.float32)
    if sinks:
        floats["sinks"] = jnp.array(rng.normal(size=4), jnp.float32)
    static = {"is_causal": causal, "implementation": implementation}
    (out, lse), d = check(rng, floats, others, **static)
    bare = {name: x for name, x in floats.items() if name != "sinks"}
    empty = np.isneginf(reference(bare, others, static).lse)
    assert empty.any()
    np.testing.assert_array_equal(np.asarray(out)[empty], 0)
    np.testing.assert_array_equal(np.asarray(d["query"])[empty], 0)
    want = np.broadcast_to(floats["sinks"] if sinks else -np.inf, empty.shape)
    np.testing.assert_array_equal(np.asarray(lse)[empty], want[empty])
    if kind == "bias":
        np.testing.assert_array_equal(np.asarray(d["bias"])[1::4], 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_keys_beyond_their_length_do_not_leak(small_blocks, rng, nans_allowed, bad):
    """Whatever they, their values and their bias are."""
    floats = arrays(rng, 20, 30, 4, 2)
    floats["bias"] = jnp.array(rng.normal(size=(20, 30)), jnp.float32)
    others = {"key_value_seq_lengths": np.array([20, 17], np.int32)}
    spoiled = {
        "query": floats["query"],
        "key": floats["key"].at[:, 20:].set(bad).at[1, 17:].set(bad),
        "value": floats["value"].at[:, 20:].set(bad).at[1, 17:].set(bad),
        "bias": floats["bias"].at[:, 20:].set(bad),
    }
    g = (jnp.ones((2, 20, 4, 8)), jnp.ones((2, 20, 4)))
    static = (("implementation", "xla"),)
    want = quick_vjp(static, floats, others, g)
    got = quick_vjp(static, spoiled, others, g)
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_masked_bias_does_not_leak(small_blocks, rng, nans_allowed, bad):
    """Entry by entry: there are seen ones in its row and in its column."""
    floats = arrays(rng, 20, 30, 4, 2)
    bias = rng.normal(size=(2, 1, 20, 30))
    mask = rng.random(size=(20, 30)) < 0.6
    floats["bias"] = jnp.array(np.where(mask, bias, bad), jnp.float32)
    of = {**floats, "bias": jnp.array(np.where(mask, bias, 0), jnp.float32)}
    static = (("implementation", "xla"),)
    g = (jnp.ones((2, 20, 4, 8)), jnp.ones((2, 20, 4)))
    want = quick_vjp(static, of, {"mask": mask}, g)
    got = quick_vjp(static, floats, {"mask": mask}, g)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_queries_beyond_their_length_do_not_leak(small_blocks, rng, nans_allowed):
    """Nor do their cotangents: a loss that divides by nothing there gives NaN."""
    floats = arrays(rng, 20, 30, 4, 2)
    others = {"query_seq_lengths": np.array([11, 20], np.int32)}
    static = (("implementation", "xla"),)
    g = (jnp.ones((2, 20, 4, 8)), jnp.ones((2, 20, 4)))
    want, d = quick_vjp(static, floats, others, g)
    spoiled = {**floats, "query": floats["query"].at[0, 11:].set(np.nan)}
    got, d_got = quick_vjp(static, spoiled, others, g)
    jax.tree.map(np.testing.assert_array_equal, (got, d_got), (want, d))


PLACES = np.arange(20)[:, None], np.arange(24)[None, :]
# name -> (what hides, which pairs it leaves).
HIDING = {
    "mask of keys": ({"mask": PLACES[1] < 17}, PLACES[1] < 17),
    "bias of keys": ({"bias": np.where(PLACES[1] < 17, 0, -np.inf)}, PLACES[1] < 17),
    "mask of queries": ({"mask": PLACES[0] < 15}, PLACES[0] < 15),
    "causal": ({"is_causal": True}, PLACES[1] <= PLACES[0]),
    "a mask": ({"mask": (PLACES[0] + PLACES[1]) % 3 > 0}, sum(PLACES) % 3 > 0),
    "segments": (
        {
            "q_segment_ids": np.arange(40).reshape(2, 20) % 20 // 7,
            "kv_segment_ids": np.arange(48).reshape(2, 24) % 24 // 7,
        },
        PLACES[0] // 7 == PLACES[1] // 7,
    ),
}
HIDING |= {
    "offset": ({"is_causal": True, "query_offset": -3}, PLACES[1] <= PLACES[0] - 3),
    "offset of a window": (
        {"local_window_size": (4, 0), "query_offset": 6},
        (PLACES[1] <= PLACES[0] + 6) & (PLACES[1] >= PLACES[0] + 2),
    ),
}
# By what hides single pairs too.
RARELY_HIDDEN = ("bias of keys", "mask of queries")


@pytest.mark.parametrize(
    ("kind", "capped"),
    [
        *((kind, True) for kind in HIDING if kind not in RARELY_HIDDEN),
        *(pytest.param(kind, True, marks=pytest.mark.slow) for kind in RARELY_HIDDEN),
        pytest.param("a mask", False, marks=pytest.mark.slow),
    ],
)
def test_what_is_hidden_has_no_influence(small_blocks, rng, nans_allowed, kind, capped):
    """NaN and inf in it, on values and derivatives, of both orders: bit for bit.

    In a pair that is hidden: its bias and scale. In a key that no query sees, by the
    place or by what hides it from all alike: also the key and its value. In a query
    that sees nothing: also the query and its cotangent.
    """
    given, seen = HIDING[kind]
    names = ("is_causal", "local_window_size")
    static = {name: a for name, a in given.items() if name in names}
    given = {x: jnp.asarray(a) for x, a in given.items() if x not in names}
    seen = np.broadcast_to(seen, (20, 24))
    floats = arrays(rng, 20, 24, 4, 2)
    floats["scale"] = jnp.array(rng.normal(size=(4, 20, 24)), jnp.float32)
    if "bias" in given:
        floats["bias"] = given.pop("bias").astype(jnp.float32)
    else:
        floats["bias"] = jnp.array(rng.normal(size=(4, 20, 24)), jnp.float32)
    if capped:
        static |= {"logits_soft_cap": 2.0, "dropout_rate": 0.3}
        given["dropout_key"] = jax.random.key(1)

    @jax.jit
    def run(floats, g):
        f = lambda x: attention(**x, **given, **static, return_residual=True)
        y, pull = jax.vjp(f, floats)
        v = jax.tree.map(jnp.ones_like, floats)
        second = lambda x: jax.vjp(f, x)[1](g)[0]
        return y, pull(g), jax.jvp(f, (floats,), (v,)), jax.jvp(second, (floats,), (v,))

    g = (jnp.array(rng.normal(size=(2, 20, 4, 8)), "float32"), jnp.ones((2, 20, 4)))
    want = run(floats, g)
    keys, queries = ~seen.any(0), ~seen.any(1)
    if kind == "segments":
        keys[:] = False
    for bad in (np.nan, np.inf):
        spoiled = {
            "query": floats["query"].at[:, queries].set(bad),
            "key": floats["key"].at[:, keys].set(bad),
            "value": floats["value"].at[:, keys].set(bad),
            "scale": jnp.where(seen, floats["scale"], bad),
            "bias": floats["bias"],
        }
        if floats["bias"].shape == floats["scale"].shape:
            spoiled["bias"] = jnp.where(seen, floats["bias"], bad)
        got = run(spoiled, tuple(a.at[:, queries].set(bad) for a in g))
        jax.tree.map(np.testing.assert_array_equal, got, want)


def test_bias_of_minus_infinity(small_blocks, implementation, rng):
    """It masks: with no gradient, in a cap too."""
    floats = arrays(rng, 20, 30, 4, 2)
    bias = rng.normal(size=(1, 4, 20, 30))
    masked = rng.random(size=bias.shape) < 0.4
    floats["bias"] = jnp.array(np.where(masked, -np.inf, bias), jnp.float32)
    for cap in (None, 2.0):
        _, d = check(rng, floats, logits_soft_cap=cap, implementation=implementation)
        np.testing.assert_array_equal(np.asarray(d["bias"])[masked], 0)


@pytest.mark.parametrize("dtype", WITH_ONE_OF_16_BITS)
def test_large_logits(small_blocks, implementation, rng, dtype):
    """Of 1e4: in each row some few entries are all of P, or one is."""
    floats = arrays(rng, 20, 30, 4, 2, dtype=dtype)
    floats["query"] = (60 * floats["query"]).astype(dtype)
    floats["key"] = (60 * floats["key"]).astype(dtype)
    check(rng, floats, compiled=exact_vjp, implementation=implementation)


@pytest.mark.parametrize("dtype", WITH_ONE_OF_16_BITS)
def test_dominated_rows(small_blocks, implementation, rng, dtype):
    """One key has nearly all of a row; what is left for the others is exact too.

    The bias moves it through the blocks, so that the maximum is found early and late.
    """
    floats = arrays(rng, 40, 40, 2, 2, dtype=dtype)
    bias = np.zeros((40, 40))
    bias[np.arange(40), np.arange(40) * 7 % 40] = np.linspace(6, 40, 40)
    floats["bias"] = jnp.array(bias, jnp.float32)
    check(rng, floats, compiled=exact_vjp, implementation=implementation)


def test_common_offset_of_logits(small_blocks, implementation, rng):
    """Bits do not change where the shifted logits are exact, but for lse."""
    floats = arrays(rng, 20, 30, 2, 2, batch=(1,))
    floats = {x: jnp.round(2 * a) / 2 for x, a in floats.items()}
    run = functools.partial(attention, scale=1.0, implementation=implementation)
    out, lse = run(**floats, bias=jnp.float32(0), return_residual=True)
    moved, moved_lse = run(**floats, bias=jnp.float32(4096), return_residual=True)
    np.testing.assert_array_equal(out, moved)
    np.testing.assert_allclose(moved_lse, lse + 4096, rtol=2**-23)


LOWEST = {name: float(jnp.finfo(name).min) for name in DTYPES}


@pytest.mark.parametrize(
    ("dtype", "number"),
    [("float32", LOWEST["float32"]), ("bfloat16", LOWEST["bfloat16"])]
    + [
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (
            ("float32", 1024.0),
            ("float32", 1e6),
            ("float16", LOWEST["float16"]),
        )
    ],
)
def test_logits_that_share_a_large_number(small_blocks, rng, dtype, number):
    """The bias of all keys, and the sink: derivatives are those without it.

    P is exp(s - lse), and lse has no digits left for the logarithm of the sum.
    """
    floats = arrays(rng, 20, 30, 4, 2, dtype=dtype)
    # Products of a query are equal, and small: beside the number they are lost.
    floats["key"] = jnp.ones_like(floats["key"])
    floats["bias"] = jnp.zeros((20, 30), dtype)
    floats["sinks"] = jnp.zeros(4, jnp.float32)
    v = {x: jnp.array(rng.normal(size=a.shape), a.dtype) for x, a in floats.items()}
    mask = np.arange(30) >= np.arange(20)[:, None] % 7
    scale = 2.0 ** (-24 if dtype == "float32" else -8)

    @jax.jit
    def run(floats, number):
        moved = {x: floats[x] + number.astype(floats[x].dtype) for x in EVERY_LOGIT}
        f = lambda x: attention(**x, mask=mask, scale=scale, return_residual=True)

        def loss(x):
            out, lse = f(x)
            return jnp.sum(jnp.sin(out.astype(jnp.float32))) + 1e-2 * jnp.sum(lse)

        x = {**floats, **moved}
        out, tangents = jax.jvp(f, (x,), (v,))
        return out[0], tangents, jax.jvp(jax.grad(loss), (x,), (v,))

    want = run(floats, jnp.float32(0))
    got = run(floats, jnp.float32(number))
    bar = 8 * float(jnp.finfo(dtype).eps)
    for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        a, b = _float64(a), _float64(b)
        # Of the query it is a sum of terms as large as the scale.
        np.testing.assert_allclose(a, b, atol=bar * max(np.abs(b).max(), scale))


EVERY_LOGIT = ("bias", "sinks")


@pytest.mark.parametrize("dtype", WITH_ONE_OF_16_BITS)
def test_values_with_a_common_offset(small_blocks, implementation, rng, dtype):
    """Which cancels in dP - D: what is left is exact to the rounding of P and dS.

    Were D the product of dO with an out of 16 bits alone, the error of the gradient of
    query and key would be the offset times eps, as large as the gradient in bfloat16.
    """
    floats = arrays(rng, 40, 40, 2, 2, batch=(1,), dtype=dtype)
    offset = 64.0 if dtype == "bfloat16" else 512.0
    step = 0.5 if dtype == "bfloat16" else 1.0
    value = offset + step * rng.integers(-4, 5, size=floats["value"].shape)
    floats["value"] = jnp.array(value, dtype)
    _, d = check(rng, floats, compiled=exact_vjp, implementation=implementation)
    # The same in a norm: not of what is summed, but of the gradient itself.
    g = (jnp.ones((1, 40, 2, 8), dtype), jnp.zeros((1, 40, 2)))
    _, d = exact_vjp((("implementation", implementation),), floats, {}, g)
    want = reference(floats, {}, {}).vjp(*g)
    for name in ("query", "key"):
        error = np.linalg.norm(np.asarray(d[name], np.float64) - want[name])
        # Roundings of dS and of the result; of the offset's products in float32.
        bar = 2 * float(jnp.finfo(dtype).eps) + 8 * offset * 2.0**-23
        assert error <= bar * np.linalg.norm(want[name]), name


def test_values_that_are_subnormal(small_blocks, implementation, rng):
    """In float16, with a loss scale: out is too, and D has to be out's product."""
    floats = arrays(rng, 40, 40, 2, 2, batch=(1,), dtype="float16")
    floats["value"] = (2.0**-16 * floats["value"]).astype(jnp.float16)
    g = rng.normal(size=(1, 40, 2, 8)), np.zeros((1, 40, 2))
    g = jnp.array(2.0**12 * g[0], jnp.float16), jnp.array(g[1], jnp.float32)
    check(rng, floats, g=g, compiled=exact_vjp, implementation=implementation)


# One with infinities, and of each kind without; of the others, rarely.
SMALL = ("float8_e4m3fn", "float8_e5m2", "float4_e2m1fn")
RARE = ("float8_e3m4", "float8_e4m3", "float8_e4m3fnuz", "float8_e5m2fnuz")
RARE += ("float8_e4m3b11fnuz",)
SMALL = [
    pytest.param(getattr(jnp, name), marks=[pytest.mark.slow] * (name in RARE), id=name)
    for name in SMALL + RARE
    if hasattr(jnp, name)
]


@pytest.mark.parametrize("dtype", SMALL)
def test_fewer_than_16_bits(rng, dtype):
    """As in float32, with one rounding at the end: also where there is no infinity."""
    floats = {name: x.astype(dtype) for name, x in arrays(rng, 5, 6).items()}
    wide = {name: x.astype(jnp.float32) for name, x in floats.items()}
    mask = np.arange(6) < np.arange(5)[:, None]  # the first query sees nothing

    @jax.jit
    def run(floats):
        f = lambda x: attention(**x, mask=mask, return_residual=True)
        (out, lse), pull = jax.vjp(f, floats)
        g = jnp.ones(out.shape).astype(out.dtype), jnp.zeros(lse.shape)
        flax_out = attention_fn(**floats, mask=mask)
        return out, lse, pull(g)[0], flax_out

    for got, want in zip(*map(jax.tree.leaves, (run(floats), run(wide))), strict=True):
        want = want if got.dtype == want.dtype else want.astype(dtype)
        np.testing.assert_array_equal(_float64(got), _float64(want))


@pytest.mark.parametrize("dtype", DTYPES)
def test_mass_of_many_small_probabilities(implementation, dtype):
    """Each of 2000 keys has 2^-15 of what the first has: in all it is 6% of P."""
    s = 2001
    key = jnp.zeros((s, 1, 1), dtype).at[0].set(float(np.log(2.0**15)))
    floats = {
        "query": jnp.ones((1, 1, 1), dtype),
        "key": key,
        "value": jnp.ones((s, 1, 1), dtype).at[0].set(0),
    }
    out = attention(**floats, scale=1.0, implementation=implementation)
    want = reference(floats, {}, {"scale": 1.0}).out
    np.testing.assert_allclose(
        _float64(out), want, rtol=float(jnp.finfo(dtype).eps) + 1e-5
    )


def test_keys_with_a_common_offset(small_blocks, implementation, rng):
    """Which moves all logits of a row: P stays; the gradient of query sums dS to 0."""
    floats = arrays(rng, 40, 40, 2, 2, batch=(1,))
    floats["key"] = floats["key"] + 16
    check(rng, floats, compiled=exact_vjp, implementation=implementation)


# --- jax.nn ---------------------------------------------------------------------------

OF_JAX_NN = {
    "plain": {},
    "groups": {"k": 1},
    "causal": {"is_causal": True},
    "window": {"local_window_size": (3, 2)},
    "lengths": {
        "query_seq_lengths": np.array([5, 9], np.int32),
        "key_value_seq_lengths": np.array([4, 12], np.int32),
    },
    "bias and mask": {"bias": True, "mask": True, "scale": 0.3},
}


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("bias and mask", "float32"), ("groups", "bfloat16")]
    + [
        pytest.param(kind, "float32", marks=pytest.mark.slow)
        for kind in OF_JAX_NN
        if kind != "bias and mask"
    ],
)
def test_agrees_with_jax_nn(implementation, rng, kind, dtype):
    """Where both define a result: rows without keys are 0 here, a mean there."""
    o = dict(OF_JAX_NN[kind])
    floats = arrays(rng, 9, 12, 4, o.pop("k", 4), dtype=dtype)
    if o.pop("bias", False):
        floats["bias"] = jnp.array(rng.normal(size=(1, 4, 9, 12)), dtype)
        mask = rng.random(size=(2, 1, 9, 12)) < 0.7
        mask[..., 0] = True
        o["mask"] = mask
    g = jnp.array(rng.normal(size=(2, 9, 4, 8)), dtype)

    def run(f, name):
        def vjp(floats):
            y, pull = jax.vjp(lambda x: f(**x, **o, implementation=name), floats)
            return y, pull(g)[0]

        return jax.jit(vjp)(floats)

    out, d = run(jaxsoftmax.dot_product_attention, implementation)
    with jax.numpy_dtype_promotion("standard"):
        want, d_want = run(jax.nn.dot_product_attention, "xla")
    assert out.dtype == want.dtype
    # There P is rounded, and what is returned, in 16 bits; sums of 12 to 36 entries.
    bar = {"float32": 1e-5, "bfloat16": 6e-2}[dtype]
    np.testing.assert_allclose(*map(_float64, (out, want)), atol=bar, rtol=bar)
    for name in floats:
        got, expected = _float64(d[name]), _float64(d_want[name])
        bound = bar * np.abs(expected).max()
        np.testing.assert_allclose(got, expected, atol=bound, err_msg=name)


def _float64(x):
    return np.asarray(x).astype(np.float64)


# --- dropout --------------------------------------------------------------------------


@pytest.mark.parametrize("typed", [False, True])
def test_dropout_has_the_bits_of_bernoulli(small_blocks, implementation, rng, typed):
    """Seen one by one: with an identity for the values, out is P times what is kept."""
    key = jax.random.key(3) if typed else jax.random.PRNGKey(3)
    b, n, t, s = 2, 3, 37, 41
    q, k = (jnp.zeros((b, x, n, 8)) for x in (t, s))
    v = jnp.broadcast_to(jnp.eye(s)[:, None], (b, s, n, s))
    out = attention(
        query=q,
        key=k,
        value=v,
        dropout_rate=0.25,
        dropout_key=key,
        implementation=implementation,
    )
    keep = jax.random.bernoulli(key, 0.75, (b, n, t, s))
    want = np.swapaxes(np.asarray(keep) / 0.75 / s, 1, 2)
    np.testing.assert_allclose(out, want, rtol=1e-6)


@pytest.mark.parametrize("batch", [(), (2,)])
def test_dropout_is_the_same_in_the_backward(small_blocks, implementation, rng, batch):
    floats = arrays(rng, 37, 41, 4, 2, batch=batch)
    floats["sinks"] = jnp.array(rng.normal(size=4), jnp.float32)
    static = {"dropout_rate": 0.4, "implementation": implementation}
    check(rng, floats, {"dropout_key": jax.random.key(5)}, **static)


def test_dropout_leaves_lse(rng):
    floats = arrays(rng, 7, 9)
    _, want = attention(**floats, return_residual=True)
    options = {"dropout_rate": 0.5, "dropout_key": jax.random.key(0)}
    _, lse = attention(**floats, **options, return_residual=True)
    np.testing.assert_array_equal(lse, want)


def test_dropout_keeps_the_mean(rng):
    """Within 5 standard errors, of entries whose variance is known."""
    floats = arrays(rng, 5, 9, batch=(1,))
    rate, draws = 0.3, 512

    @jax.jit
    def mean(keys):
        f = lambda key: attention(**floats, dropout_rate=rate, dropout_key=key)
        return jnp.mean(jax.vmap(f)(keys), 0)

    of = reference(floats, {}, {})
    variance = of.p**2 @ of.v**2 * rate / (1 - rate)
    bar = 5 * np.swapaxes(np.sqrt(variance / draws), 1, 2)
    got = mean(jax.random.split(jax.random.key(1), draws))
    assert (np.abs(got - of.out) <= bar).all()


def test_dropout_of_another_generator(small_blocks, rng):
    """The backward drops what the forward dropped: out is linear in the values."""
    floats = arrays(rng, 21, 37, batch=(1,))
    key = jax.random.key(3, impl="rbg")
    q, k = floats["query"], floats["key"]
    f = lambda v: attention(query=q, key=k, value=v, dropout_rate=0.5, dropout_key=key)
    g = jnp.array(rng.normal(size=(1, 21, 2, 8)), jnp.float32)

    @jax.jit
    def run(v):
        out, pull = jax.vjp(f, v)
        return out, pull(g)[0], f(2 * v)

    v = floats["value"]
    out, d, twice = run(v)
    np.testing.assert_allclose(jnp.vdot(out, g), jnp.vdot(v, d), rtol=1e-4)
    np.testing.assert_allclose(twice, 2 * out, atol=1e-5)


def test_no_dropout(rng):
    """A rate of 0 takes a key or none, and is the same."""
    floats = arrays(rng, 5, 6)
    want = attention(**floats)
    for key in (None, jax.random.key(0)):
        got = attention(**floats, dropout_rate=0.0, dropout_key=key)
        np.testing.assert_array_equal(got, want)


# --- merging --------------------------------------------------------------------------


def parts(floats, at, **options):
    """Attention to the keys before `at`, and to the others."""
    cut = lambda part: {
        x: a if x == "query" else a[..., part, :, :] for x, a in floats.items()
    }
    halves = (cut(slice(0, at)), cut(slice(at, None)))
    return [attention(**half, return_residual=True, **options) for half in halves]


@pytest.mark.parametrize(
    ("dtype", "batch", "at"),
    [
        ("float32", (), 5),
        pytest.param("float32", (2,), 5, marks=pytest.mark.slow),
        ("float32", (2,), 0),
        pytest.param("float32", (2,), 12, marks=pytest.mark.slow),
        ("bfloat16", (2,), 5),
    ],
)
def test_merged_parts_are_the_whole(rng, dtype, batch, at):
    """Values and gradients; a part may have no keys at all."""
    floats = arrays(rng, 7, 12, 4, 2, batch=batch, dtype=dtype)
    wide = jnp.float32

    def merged(floats):
        (out_a, lse_a), (out_b, lse_b) = parts(floats, at, implementation="xla")
        return jaxsoftmax.merge_attention(out_a, lse_a, out_b, lse_b)

    q = floats["query"].shape
    g = jnp.array(rng.normal(size=q), dtype), jnp.array(rng.normal(size=q[:-1]), wide)

    @jax.jit
    def run(floats, g):
        y, pull = jax.vjp(merged, floats)
        return y, pull(g)[0]

    (out, lse), d = run(floats, g)
    assert (out.dtype, lse.dtype) == (dtype, wide)
    of = reference(floats, {}, {})
    # Each part is rounded, and then the whole: as much as the bounds of one pass again.
    bounds = of.bounds(dtype)
    extra = float(jnp.finfo(dtype).eps) * ((of.p * of.dropped) @ np.abs(of.v))
    assert_within(out, of.out, 2 * bounds["out"] + of._result(extra), "out")
    assert_within(lse, of.lse, 2 * bounds["lse"], "lse")
    want = of.vjp(*g)
    bar = {"float32": 3e-6, "bfloat16": 4e-2}[dtype]
    for name in floats:
        got = _float64(d[name])
        assert np.abs(got - want[name]).max() <= bar * np.abs(want[name]).max(), name


def test_merging_a_masked_part(rng):
    """Bit for bit the other part; and the gradient is that part's alone."""
    floats = arrays(rng, 7, 12)
    whole = attention(**floats, return_residual=True)
    nothing = attention(**floats, mask=np.False_, return_residual=True)
    for a, b in ((whole, nothing), (nothing, whole)):
        out, lse = jaxsoftmax.merge_attention(*a, *b)
        np.testing.assert_array_equal(out, whole[0])
        np.testing.assert_array_equal(lse, whole[1])
        _, pull = jax.vjp(jaxsoftmax.merge_attention, *a, *b)
        g = (jnp.ones_like(out), jnp.ones_like(lse))
        d = pull(g)
        d_whole, d_nothing = (d[:2], d[2:]) if a is whole else (d[2:], d[:2])
        np.testing.assert_array_equal(d_whole[0], 1)
        np.testing.assert_allclose(d_whole[1], 1, rtol=1e-6)
        for each in d_nothing:
            np.testing.assert_array_equal(each, 0)


def test_merging_two_masked_parts(rng):
    floats = arrays(rng, 7, 12)

    def merged(floats):
        a = attention(**floats, mask=np.False_, return_residual=True)
        return jaxsoftmax.merge_attention(*a, *a)

    (out, lse), pull = jax.vjp(merged, floats)
    np.testing.assert_array_equal(out, 0)
    np.testing.assert_array_equal(lse, -np.inf)
    (d,) = pull((jnp.ones_like(out), jnp.ones_like(lse)))
    for each in d.values():
        np.testing.assert_array_equal(each, 0)


def test_merging_is_symmetric_and_stable(rng):
    """Logsumexps of any size: the weights are of their difference."""
    floats = arrays(rng, 7, 12)
    (out_a, lse_a), (out_b, lse_b) = parts(floats, 5)
    out, lse = jaxsoftmax.merge_attention(out_a, lse_a, out_b, lse_b)
    again = jaxsoftmax.merge_attention(out_b, lse_b, out_a, lse_a)
    np.testing.assert_allclose(out, again[0], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(lse, again[1], rtol=1e-6)
    for offset in (-1e4, 1e4):
        moved = jaxsoftmax.merge_attention(out_a, lse_a + offset, out_b, lse_b + offset)
        # An lse of 1e4 has an error of 2^-11.
        np.testing.assert_allclose(moved[0], out, atol=4e-3)
    # Far from each other: the larger alone.
    far = jaxsoftmax.merge_attention(out_a, lse_a + 1e4, out_b, lse_b)
    np.testing.assert_array_equal(far[0], out_a)


# --- errors ---------------------------------------------------------------------------

Q, K, V = (2, 5, 4, 8), (2, 7, 2, 8), (2, 7, 2, 8)


def zeros(shape, dtype="float32"):
    return jnp.zeros(shape, dtype)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="cuDNN may run there")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cudnn_is_refused_where_it_cannot_run(dtype):
    """When lowered: that it is asked for is no error while tracing."""
    given = [zeros(x, dtype) for x in (Q, K, V)]
    f = functools.partial(jaxsoftmax.dot_product_attention, implementation="cudnn")
    jax.eval_shape(f, *given)
    with pytest.raises(NotImplementedError, match="cudnn"):
        jax.jit(f)(*given)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="cuDNN may run there")
def test_lowered_for_a_gpu_where_there_is_none(monkeypatch):
    """The libraries are not there: an error, or a warning that it is XLA."""
    monkeypatch.setattr(dispatch, "_warned_of", set())
    given = [zeros(x, "bfloat16") for x in (Q, K, V)]

    def lower(**options):
        f = functools.partial(jaxsoftmax.dot_product_attention, **options)
        return jax.jit(f).trace(*given).lower(lowering_platforms=("cuda",))

    why = "is lowered only in a process that has a device of platform cuda"
    with pytest.raises(NotImplementedError, match=f"implementation='cudnn' {why}"):
        lower(implementation="cudnn")
    with pytest.warns(jaxsoftmax.PerformanceWarning, match=why):
        lower()
    lower(implementation="xla")
    explained = jaxsoftmax.explain_for("cuda", "NVIDIA H100 80GB HBM3")(
        jaxsoftmax.dot_product_attention, *given
    )
    assert explained.choices[0].implementation == "cudnn"


def test_oracle_against_differences(rng):
    """Its formulas against central differences of its own forward, all in float64."""
    case = {**ALL, "dtype": "float64", "implementation": None}
    with jax.enable_x64(True):
        floats, others, static = arguments(rng, case)
        floats = {name: np.asarray(x) for name, x in floats.items()}
        of = reference(floats, others, static)
        g = rng.normal(size=of.out.shape), rng.normal(size=of.lse.shape)
        d = of.vjp(*g)
        tangents = {name: rng.normal(size=x.shape) for name, x in floats.items()}

        def at(step):
            moved = {name: x + step * tangents[name] for name, x in floats.items()}
            of = reference(moved, others, static)
            return of.out, np.where(np.isneginf(of.lse), 0, of.lse)

        h = 1e-5
        numeric = [(a - b) / (2 * h) for a, b in zip(at(h), at(-h), strict=True)]
    for x, y in zip(of.jvp(**tangents), numeric, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-8)
    pushed = sum((a * b).sum() for a, b in zip(g, of.jvp(**tangents), strict=True))
    pulled = sum((d[name] * tangents[name]).sum() for name in d)
    np.testing.assert_allclose(pushed, pulled, rtol=1e-12)
    assert set(oracle.forward(**floats).vjp(*g)) == set(floats)
