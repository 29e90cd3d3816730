"""Attention on 8 devices: batch, heads and sequence, on every kind of mesh."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support import hlo
from support.attention_cases import arrays, attention

import jaxsoftmax

pytestmark = [
    pytest.mark.skipif(
        jax.device_count() < 8, reason="needs 8 devices, simulated or not"
    ),
    pytest.mark.versions,
]

KINDS = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
B, T, N, K, H = 4, 32, 8, 4, 8
OPTIONS = {"is_causal": True}


def make_mesh(kind):
    return jax.make_mesh((4, 2), ("a", "b"), axis_types=(KINDS[kind],) * 2)


@functools.cache
def operands():
    rng = np.random.default_rng(0)
    floats = arrays(rng, T, T, N, K, H, batch=(B,))
    floats["sinks"] = jnp.array(rng.normal(size=N), jnp.float32)
    lengths = jnp.array([32, 20, 7, 31], jnp.int32)
    return jax.device_get(floats), jax.device_get(lengths)


def value_and_gradient(floats, lengths, tangents=False):
    def f(floats):
        return attention(
            **floats, key_value_seq_lengths=lengths, return_residual=True, **OPTIONS
        )

    def loss(floats):
        out, lse = f(floats)
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(lse))

    found = f(floats), jax.grad(loss)(floats)
    if not tangents:
        return found
    return found, jax.jvp(jax.grad(loss), (floats,), (floats,))[1]


@functools.cache
def on_one_device(tangents=False):
    run = functools.partial(value_and_gradient, tangents=tangents)
    return jax.device_get(jax.jit(run)(*operands()))


def placed(mesh, spec):
    """Spec of [B, T, N, H]; lengths lie with the batch, sinks with the heads."""
    floats, lengths = operands()
    put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    heads_spec = spec[2] if len(spec) > 2 else None
    specs = {name: spec if x.ndim == 4 else P(heads_spec) for name, x in floats.items()}
    return {n: put(x, specs[n]) for n, x in floats.items()}, put(lengths, P(spec[0]))


SPECS = {
    "batch": P("a"),
    "heads": P(None, None, "a"),
    "batch and heads": P("a", None, "b"),
    "sequence": P(None, "a"),
}


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("name", list(SPECS))
def test_sharded(kind, name):
    """The same results and gradients, which lie as what they are of.

    Batch entries and heads have nothing in common, but for the sum over the batch of
    the gradient of sinks.
    """
    mesh, spec = make_mesh(kind), SPECS[name]
    args = placed(mesh, spec)
    with jax.set_mesh(mesh):
        program = jax.jit(value_and_gradient).lower(*args).compile()
        (out, lse), d = program(*args)
    want = on_one_device()
    chex.assert_trees_all_close(((out, lse), d), want, atol=2e-5, rtol=2e-5)
    if name == "sequence":
        return
    found = hlo.total(hlo.collectives(program))
    assert "all-gather" not in found
    assert set(found) <= {"all-reduce"}, found
    assert sum(found.values()) <= 64 * N
    for x, like in ((out, "query"), (d["query"], "query"), (d["key"], "key")):
        assert x.sharding.is_equivalent_to(args[0][like].sharding, 4)


def test_second_order_on_a_mesh():
    mesh = make_mesh("explicit")
    args = placed(mesh, SPECS["batch and heads"])
    run = functools.partial(value_and_gradient, tangents=True)
    with jax.set_mesh(mesh):
        program = jax.jit(run).lower(*args).compile()
        got = program(*args)
    assert "all-gather" not in hlo.total(hlo.collectives(program))
    chex.assert_trees_all_close(got, on_one_device(True), atol=2e-4, rtol=2e-5)


@pytest.mark.parametrize("whole", ["query", "key"])
def test_vmap_of_some_on_an_explicit_mesh(whole):
    """Results lie along the mapped axis as the arrays do that are mapped."""
    mesh = make_mesh("explicit")
    floats = {name: operands()[0][name] for name in ("query", "key", "value")}
    floats[whole] = floats[whole][0]
    axes = {name: None if name == whole else 0 for name in floats}

    @jax.jit
    def run(floats):
        f = jax.vmap(lambda x: attention(**x, **OPTIONS), in_axes=(axes,))
        return f(floats), jax.grad(lambda x: jnp.sum(jnp.sin(f(x))))(floats)

    shardings = {
        name: NamedSharding(mesh, P() if name == whole else P("a")) for name in floats
    }
    with jax.set_mesh(mesh):
        out, d = run(jax.device_put(floats, shardings))
    chex.assert_trees_all_close((out, d), run(floats), atol=2e-5, rtol=2e-5)
    for x, name in ((out, "value"), (d["value"], "value"), (d[whole], whole)):
        assert x.sharding.is_equivalent_to(shardings[name], x.ndim)


@pytest.mark.parametrize(
    ("kind", "spec"),
    [
        ("auto", P("a")),
        ("auto", P("a", "b")),
        ("explicit", P("a")),
        ("explicit", P("a", "b")),
        ("explicit", P(None, "a")),
    ],
)
def test_several_batch_dimensions(kind, spec):
    """Nothing moves; results and gradients lie as the arguments, if that is explicit.

    XLA follows a batch that is folded only if its first dimension is spread.
    """
    mesh = make_mesh(kind)
    floats = {name: operands()[0][name] for name in ("query", "key", "value")}
    floats = {name: np.stack([x] * 4).astype("f4") for name, x in floats.items()}

    @jax.jit
    def run(floats):
        f = lambda x: attention(**x, **OPTIONS)
        return f(floats), jax.grad(lambda x: jnp.sum(jnp.sin(f(x))))(floats)

    sharding = NamedSharding(mesh, spec)
    with jax.set_mesh(mesh):
        args = jax.device_put(floats, sharding)
        program = run.lower(args).compile()
        out, d = program(args)
    assert not hlo.total(hlo.collectives(program))
    chex.assert_trees_all_close((out, d), run(floats), atol=2e-5, rtol=2e-5)
    for x in (out, *d.values()):
        assert kind == "auto" or x.sharding.is_equivalent_to(sharding, x.ndim)


@pytest.mark.parametrize("check_vma", [True, False])
def test_in_shard_map(check_vma):
    """Over batch and heads; the sinks' gradient is summed by the shard_map."""
    mesh = make_mesh("auto")
    floats, lengths = operands()
    spec = P("a", None, "b")
    specs = {name: spec if x.ndim == 4 else P("b") for name, x in floats.items()}

    def each(floats, lengths):
        (out, lse), d = value_and_gradient(floats, lengths)
        if not check_vma:
            d["sinks"] = jax.lax.psum(d["sinks"], "a")
        return (out, lse), d

    rows = P("a", None, "b")
    mapped = jax.shard_map(
        each,
        mesh=mesh,
        in_specs=(specs, P("a")),
        out_specs=((spec, rows), specs),
        check_vma=check_vma,
    )
    got = jax.jit(mapped)(floats, lengths)
    chex.assert_trees_all_close(got, on_one_device(), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("kind", list(KINDS))
def test_offsets_on_a_mesh(kind):
    """They lie with the batch; those of shares of queries are of the device."""
    mesh = make_mesh(kind)
    floats, lengths = operands()
    offsets = 11 - lengths

    @jax.jit
    def run(floats, offsets):
        options = {**OPTIONS, "local_window_size": (9, 0), "query_offset": offsets}
        f = lambda x: attention(**x, **options)
        return f(floats), jax.grad(lambda x: jnp.sum(jnp.sin(f(x))))(floats)

    args = placed(mesh, SPECS["batch and heads"])[0]
    with jax.set_mesh(mesh):
        placed_offsets = jax.device_put(offsets, NamedSharding(mesh, P("a")))
        program = run.lower(args, placed_offsets).compile()
        got = program(args, placed_offsets)
    assert "all-gather" not in hlo.total(hlo.collectives(program))
    chex.assert_trees_all_close(got, run(floats, offsets), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_max_logits_on_a_mesh(kind, dtype):
    """They lie as the batch and the heads do."""
    mesh = make_mesh(kind)
    floats = {name: x.astype(dtype) for name, x in operands()[0].items()}

    @jax.jit
    def run(floats):
        f = lambda x: attention(**x, **OPTIONS, return_max_logits=True)
        return f(floats), jax.grad(lambda x: jnp.sum(f(x)[0], dtype="f4"))(floats)

    args = {
        name: jax.device_put(
            x, NamedSharding(mesh, P("a", None, "b") if x.ndim == 4 else P("b"))
        )
        for name, x in floats.items()
    }
    with jax.set_mesh(mesh):
        program = run.lower(args).compile()
        got = program(args)
    assert "all-gather" not in hlo.total(hlo.collectives(program))
    (out, largest), d = run(floats)
    np.testing.assert_allclose(got[0][1], largest, rtol=1e-6)
    if dtype == "float32":
        chex.assert_trees_all_close(got, ((out, largest), d), atol=2e-5, rtol=2e-5)
    along = NamedSharding(mesh, P("a", "b"))
    assert got[0][1].sharding.is_equivalent_to(along, 2)


def test_max_logits_in_shard_map():
    mesh = make_mesh("auto")
    floats = {name: operands()[0][name] for name in ("query", "key", "value")}
    f = lambda x: attention(**x, **OPTIONS, return_max_logits=True)[1]
    spec = P("a", None, "b")
    specs = {"in_specs": (spec,), "out_specs": P("a", "b")}
    got = jax.jit(jax.shard_map(f, mesh=mesh, **specs))(floats)
    np.testing.assert_allclose(got, f(floats), rtol=1e-6)


def test_shares_of_queries_by_their_offset():
    mesh = make_mesh("auto")
    floats, _ = operands()
    qkv = [floats[name] for name in ("query", "key", "value")]

    def each(q, k, v):
        offset = jax.lax.axis_index("a") * q.shape[1]
        return jaxsoftmax.dot_product_attention(
            q, k, v, is_causal=True, query_offset=offset
        )

    spec = P(None, "a")
    specs = {"in_specs": (spec, P(), P()), "out_specs": spec}
    shared = jax.shard_map(each, mesh=mesh, **specs)
    whole = functools.partial(jaxsoftmax.dot_product_attention, is_causal=True)

    def both(f, qkv):
        return f(*qkv), jax.grad(lambda qkv: jnp.sum(jnp.sin(f(*qkv))))(qkv)

    got, want = (jax.jit(functools.partial(both, f))(qkv) for f in (shared, whole))
    chex.assert_trees_all_close(got, want, atol=2e-5, rtol=2e-5)


def test_ring_of_merged_parts():
    """Keys on 4 devices go round; each device merges what it has of its queries."""
    mesh = jax.make_mesh((4,), ("a",), axis_types=(AxisType.Auto,))
    floats, _ = operands()
    qkv = [floats[name] for name in ("query", "key", "value")]

    def each(q, k, v):
        part = functools.partial(jaxsoftmax.dot_product_attention, return_residual=True)
        out, lse = part(q, k, v)
        for _ in range(3):
            turn = [(i, (i + 1) % 4) for i in range(4)]
            k, v = (jax.lax.ppermute(x, "a", turn) for x in (k, v))
            out, lse = jaxsoftmax.merge_attention(out, lse, *part(q, k, v))
        return out, lse

    spec = P(None, "a")
    ring = jax.shard_map(each, mesh=mesh, in_specs=spec, out_specs=spec)
    whole = functools.partial(jaxsoftmax.dot_product_attention, return_residual=True)

    def both(f, qkv):
        loss = lambda qkv: jnp.sum(jnp.sin(f(*qkv)[0])) + jnp.sum(jnp.cos(f(*qkv)[1]))
        return f(*qkv), jax.grad(loss)(qkv)

    got, want = (jax.jit(functools.partial(both, f))(qkv) for f in (ring, whole))
    chex.assert_trees_all_close(got, want, atol=2e-5, rtol=2e-5)
