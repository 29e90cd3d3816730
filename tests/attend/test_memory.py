"""What attention keeps, needs and computes: nothing that grows with queries times keys.

Programs are compiled for shapes alone; the large ones are never run.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import hlo
from support.attention_cases import arrays, attention
from support.residuals import kept

from jaxsoftmax._attend import xla
from jaxsoftmax._attend.call import Config, Inputs, in_reach

HEADS, SIZE = 2, 64

on_cpu = pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="blocks have other sizes elsewhere"
)


def struct(length, dtype="float32"):
    return jax.ShapeDtypeStruct((1, length, HEADS, SIZE), dtype)


def loss(options, *qkv):
    q, k, v = qkv
    out = attention(query=q, key=k, value=v, **options)
    return jnp.sum(jnp.sin(out.astype(jnp.float32)))


def gradient(options, *qkv):
    return jax.grad(functools.partial(loss, options), (0, 1, 2))(*qkv)


def jvp(options, *qkv):
    f = lambda q, k, v: attention(query=q, key=k, value=v, **options)
    return jax.jvp(f, qkv, qkv)[1]


def hvp(options, *qkv):
    return jax.jvp(functools.partial(gradient, options), qkv, qkv)[1]


PROGRAMS = {
    "forward": lambda options, *qkv: attention(
        **dict(zip(("query", "key", "value"), qkv, strict=True)), **options
    ),
    "gradient": gradient,
    "jvp": jvp,
    "hvp": hvp,
}


@functools.cache
def compiled(name, length, dtype="float32", **options):
    program = functools.partial(PROGRAMS[name], options)
    return jax.jit(program).lower(*[struct(length, dtype)] * 3).compile()


def temp_bytes(*args, **options):
    return compiled(*args, **options).memory_analysis().temp_size_in_bytes


@on_cpu
@pytest.mark.parametrize("name", list(PROGRAMS))
def test_memory_grows_with_the_length(name):
    """Not with its square, which would be 4 times as much for each doubling."""
    temp = [temp_bytes(name, length) for length in (1024, 2048, 4096)]
    assert temp[1] <= 2.3 * temp[0]
    assert temp[2] <= 2.3 * temp[1]


@on_cpu
@pytest.mark.parametrize("name", ["forward", "gradient"])
def test_memory_of_max_logits(name):
    """They come from maxima that are there: a number per query, and no further loop."""

    def program(*qkv):
        options = {"return_max_logits": True}
        if name == "forward":
            return PROGRAMS[name](options, *qkv)
        run = lambda *x: PROGRAMS["forward"](options, *x)
        loss = lambda *x: jnp.sum(jnp.sin(run(*x)[0]))
        return jax.grad(loss, (0, 1, 2))(*qkv)

    found = jax.jit(program).lower(*[struct(4096)] * 3).compile()
    rows = 4096 * HEADS * 4
    temp = found.memory_analysis().temp_size_in_bytes
    assert temp <= temp_bytes(name, 4096) + 2 * rows
    assert hlo.trips(found) == hlo.trips(compiled(name, 4096))


@on_cpu
def test_memory_of_the_options():
    """Nor do a window, a cap and dropout need more: each block has its own mask."""
    options = {"is_causal": True, "local_window_size": (512, 0), "logits_soft_cap": 9.0}
    key = {"dropout_rate": 0.1, "dropout_key": jax.random.PRNGKey(0)}
    program = functools.partial(gradient, {**options, **key})
    temp = jax.jit(program).lower(*[struct(4096)] * 3).compile().memory_analysis()
    # Of logits in float32, some blocks of 2^20: far from 2^25.
    assert temp.temp_size_in_bytes <= temp_bytes("gradient", 4096) + 2**25


@on_cpu
@pytest.mark.parametrize("name", ["forward", "gradient"])
def test_memory_with_an_offset(name):
    """Linear in the length too, where it is traced; keys are copied once more."""

    def temp(length):
        def program(offset, *qkv):
            return PROGRAMS[name]({"is_causal": True, "query_offset": offset}, *qkv)

        offset = jax.ShapeDtypeStruct((1,), "int32")
        lowered = jax.jit(program).lower(offset, *[struct(length)] * 3)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    found = [temp(length) for length in (1024, 2048, 4096)]
    assert found[1] <= 2.3 * found[0]
    assert found[2] <= 2.3 * found[1]
    like_q = 4096 * HEADS * SIZE * 4
    assert found[2] <= temp_bytes(name, 4096, is_causal=True) + 4 * like_q


@on_cpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_of_a_long_sequence(dtype):
    """32768: one array of float32 logits would be 8 GiB; an array like q is 16 MiB."""
    like_q = 32768 * HEADS * SIZE * 4
    bound = 12 * like_q + 2**25
    assert bound < 32768**2 * HEADS * 4 / 30
    assert temp_bytes("gradient", 32768, dtype) <= bound


# --- what is kept ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("jit", [False, True])
def test_keeps_inputs_out_and_lse(rng, dtype, jit):
    """With what rounding took off lse, and in 16 bits what it took off out."""
    b, t, s, n, k = 1, 96, 80, 4, 2
    floats = arrays(rng, t, s, n, k, 8, 16, (b,), dtype)
    f = lambda x: attention(**x, is_causal=True, implementation="xla")
    out, leaves = kept(jax.jit(f) if jit else f, floats)
    for name, x in floats.items():
        assert leaves.pop(x.unsafe_buffer_pointer()).shape == x.shape, name
    assert out.unsafe_buffer_pointer() in leaves  # out is stored once
    shapes = sorted((x.size, x.dtype.name) for x in leaves.values() if x.size > 16)
    low = [] if dtype == "float32" else [(out.size, dtype)]
    lse = [(b * t * n, "float32")] * 2
    assert shapes == sorted([*lse, (out.size, dtype), *low])


def test_max_logits_are_not_kept(rng):
    floats = arrays(rng, 96, 80, 4, 2)
    f = lambda x: attention(**x, return_max_logits=True, implementation="xla")[0]
    plain = lambda x: attention(**x, implementation="xla")
    sizes = [sorted(x.size for x in kept(g, floats)[1].values()) for g in (f, plain)]
    assert sizes[0] == sizes[1]


def test_keeps_a_bias_and_masks_as_they_are(rng):
    """In their own shapes, not in that of the logits."""
    t, s = 96, 80
    floats = arrays(rng, t, s, 4, 2, batch=(2,))
    floats["bias"] = jnp.array(rng.normal(size=(4, 1, s)), jnp.float32)
    floats["sinks"] = jnp.zeros(4, jnp.float32)
    others = {
        "mask": jnp.array(rng.random(size=(2, 1, 1, s)) < 0.8),
        "key_value_seq_lengths": jnp.array([80, 40], jnp.int32),
        "dropout_key": jax.random.key(0),
    }
    f = lambda x: attention(**x, **others, dropout_rate=0.1, implementation="xla")
    _, leaves = kept(f, floats)
    largest = max(x.size for x in floats.values())
    assert all(x.size <= largest for x in leaves.values())
    given = sum(x.nbytes for x in (*floats.values(), others["mask"]))
    out_and_lse = 4 * (2 * t * 4 * 8 + 2 * 2 * t * 4)
    numbers = 64  # lengths and the key
    assert sum(x.nbytes for x in leaves.values()) <= given + out_and_lse + numbers


def test_a_bias_of_some_batch_dimensions_is_not_expanded(rng):
    """Pair bias: one for all rows of an alignment, beside a mask for each row."""
    b, rows, t = 2, 64, 96
    floats = arrays(rng, t, t, 2, 2, batch=(b, rows))
    floats["bias"] = jnp.array(rng.normal(size=(b, 1, 2, t, t)), jnp.float32)
    mask = jnp.array(rng.random(size=(b, rows, 1, 1, t)) < 0.8)
    f = lambda x: attention(**x, mask=mask, implementation="xla")
    _, leaves = kept(f, floats)
    largest = max(x.size for x in floats.values())
    assert all(x.size <= largest for x in leaves.values())


# --- what is computed -----------------------------------------------------------------


def blocks(name, **options):
    """Rounds of all loops, each of a block of the same size: a count of the products.

    cost_analysis counts the body of a loop once, however often it runs.
    """
    return sum(hlo.trips(compiled(name, 4096, **options)))


# How often each block is gone through: for a gradient also for the means of dP, and for
# what is made of them.
LOOPS = {"forward": 1, "gradient": 3}


@on_cpu
@pytest.mark.parametrize("name", list(LOOPS))
def test_causal_computes_half(name):
    rows = 8  # blocks of 512 of 4096
    assert blocks("forward") == rows**2
    assert blocks(name, is_causal=True) == LOOPS[name] * rows * (rows + 1) / 2


@on_cpu
def test_whole_rows_in_one_loop():
    """Where no block is left out, the backward takes its products once."""
    whole = 2**20 / (HEADS * 4096)  # queries with all keys in a block
    assert blocks("gradient") == blocks("forward") + 4096 / whole


@on_cpu
@pytest.mark.parametrize("name", list(LOOPS))
def test_window_computes_what_it_reaches(name):
    """T * w: with each query block, that of its own keys and the one before."""
    loops = LOOPS[name]
    assert blocks(name, local_window_size=(256, 0)) == loops * (2 * 8 - 1)
    assert blocks(name, local_window_size=(256, 256)) == loops * (3 * 8 - 2)
    # A right side is nothing beside causal.
    both = {"local_window_size": (256, 256), "is_causal": True}
    assert blocks(name, **both) == loops * (2 * 8 - 1)


@on_cpu
def test_offset_moves_the_blocks():
    """Chunks of queries with a window, far from key 0, have those of the whole."""
    window = {"local_window_size": (256, 0)}
    q, kv = struct(1024), struct(4096)

    def rounds(**options):
        program = functools.partial(PROGRAMS["forward"], options)
        found = jax.jit(program).lower(q, kv, kv).compile()
        return sum(hlo.trips(found))

    chunks = [rounds(query_offset=i, **window) for i in range(0, 4096, 1024)]
    assert sum(chunks) == blocks("forward", **window)
    assert rounds(query_offset=-2048, is_causal=True) == 0


def test_blocks_that_an_offset_leaves(monkeypatch, rng):
    """Where it is traced: those that have a pair are computed, and none else."""
    monkeypatch.setattr(xla, "QUERY_BLOCK", 16)
    monkeypatch.setattr(xla, "KEY_BLOCK", 32)
    floats = arrays(rng, 70, 130, batch=(3,))
    for offset in ([5, 60, -90], [-200, -300, 400], [120]):
        x = Inputs(*floats.values(), query_offset=jnp.array(offset, jnp.int32))
        for options in ({"causal": True}, {"window": (9, 4)}, {"window": (0, np.inf)}):
            p = xla._prepare(Config(1.0, **options), x)
            assert len(p.pairs()) == 25
            for pair in jnp.asarray(p.pairs()):
                reached = in_reach(p.config, *p.places(pair), x.query_offset)
                want = np.asarray(reached).any((1, 2))
                np.testing.assert_array_equal(p.near(pair), want)


@on_cpu
def test_causal_with_more_keys_than_queries():
    """Keys that no query reaches are in no block that is computed."""
    q, kv = struct(1024), struct(4096)

    def rounds(**options):
        program = functools.partial(PROGRAMS["forward"], options)
        found = jax.jit(program).lower(q, kv, kv).compile()
        return sum(hlo.trips(found))

    assert rounds(is_causal=True) * 4 <= rounds()
