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
from jaxsoftmax._attend import xla
from jaxsoftmax._attend.call import ATTENTION

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


# --- kernels on the shares of devices -------------------------------------------------


@pytest.fixture
def shares(monkeypatch):
    """What an implementation that XLA cannot partition was given, by operation.

    `implementation="kernel"`.
    """
    seen = {}

    class Kernel:
        @staticmethod
        def refusal(call, device):
            return None

        @staticmethod
        def run(call, arguments):
            x = arguments[0]
            seen.setdefault(call.op, []).append((x.query.shape, x.key.shape))
            return xla.run(call, arguments)

    monkeypatch.setitem(ATTENTION.implementations, "kernel", Kernel)
    yield seen
    jax.clear_caches()


def run_as_kernel(floats, others, implementation="kernel"):
    """Results, gradients, and tangents."""

    def f(floats):
        return attention(
            **floats,
            **others,
            **OPTIONS,
            return_residual=True,
            implementation=implementation,
        )

    def loss(floats):
        out, lse = f(floats)
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(lse))

    return f(floats), jax.grad(loss)(floats), jax.jvp(f, (floats,), (floats,))[1]


def everything(kv_heads, batch=B):
    """Of all arrays that lie with the batch or with the heads."""
    rng = np.random.default_rng(1)
    floats = arrays(rng, T, T, N, kv_heads, H, batch=(batch,))
    floats["sinks"] = jnp.array(rng.normal(size=N), jnp.float32)
    floats["bias"] = jnp.array(rng.normal(size=(1, N, T, T)), jnp.float32)
    others = {
        "mask": jnp.array(rng.random((batch, 1, T, T)) < 0.8),
        "key_value_seq_lengths": jnp.array([32, 20, 7, 31] * (batch // 4), jnp.int32),
        "query_offset": jnp.array([0, 3, 1, 0] * (batch // 4), jnp.int32),
        "q_segment_ids": jnp.array(np.sort(rng.integers(0, 2, (batch, T)))),
        "kv_segment_ids": jnp.array(np.sort(rng.integers(0, 2, (batch, T)))),
    }
    return floats, others


LIES = {"sinks": (1,), "bias": (None, 1), "mask": (0,)}


def spread(mesh, spec, given):
    """`spec` is that of batch and of heads."""
    put = {}
    for name, x in given.items():
        ways = LIES.get(name, (0, None, 1) if x.ndim == 4 else (0,))
        entries = [spec[way] if way is not None else None for way in ways]
        put[name] = jax.device_put(x, NamedSharding(mesh, P(*entries)))
    return put


SHARES = {  # of batch and heads, and what a device then has of B, N and K
    "batch": (("a", None), 4, (1, 8, 4)),
    "heads": ((None, "a"), 4, (4, 2, 1)),
    "both": (("a", "b"), 4, (1, 4, 2)),
    "heads of a group": ((None, ("a", "b")), 4, (4, 1, 1)),
    "one head of keys": (("b", "a"), 1, (2, 2, 1)),
    "as many heads": (("b", "a"), 8, (2, 2, 2)),
}


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("name", list(SHARES))
def test_kernel_of_shares(kind, name, shares):
    """Each device runs it on its own; what is shared is added up, and nothing moves."""
    spec, kv_heads, (b, n, k) = SHARES[name]
    mesh, given = make_mesh(kind), everything(kv_heads)
    keys = spec
    if name in ("heads of a group", "one head of keys"):
        keys = (spec[0], "a" if kv_heads == 4 else None)
    ways = {"key": keys, "value": keys}
    args = [
        {k: spread(mesh, ways.get(k, spec), {k: x})[k] for k, x in each.items()}
        for each in given
    ]
    with jax.set_mesh(mesh):
        program = jax.jit(run_as_kernel).lower(*args).compile()
        got = program(*args)
    want = jax.jit(functools.partial(run_as_kernel, implementation="xla"))(*given)
    chex.assert_trees_all_close(got, want, atol=3e-5, rtol=3e-5)
    assert set(hlo.total(hlo.collectives(program))) <= {"all-reduce"}
    for op in ("attention", "attention_gradient", "attention_pushforward"):
        assert {(q[0], q[2], k[2]) for q, k in shares[op]} == {(b, n, k)}
    for x, like in ((got[0][0], "query"), (got[1]["query"], "query")):
        assert x.sharding.is_equivalent_to(args[0][like].sharding, 4)


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("dimension", [1, 3])
def test_kernel_of_what_is_not_to_be_split(kind, dimension, shares):
    """Sequences and features are gathered; and a batch of 3 among 4 devices."""
    mesh = make_mesh(kind)
    floats, others = everything(4)
    lies = [None] * 4
    lies[dimension] = "a"
    args = jax.device_put(floats, NamedSharding(mesh, P()))
    for name in ("query", "key", "value"):
        args[name] = jax.device_put(floats[name], NamedSharding(mesh, P(*lies)))
    with jax.set_mesh(mesh):
        got = jax.jit(run_as_kernel)(args, others)
    want = jax.jit(functools.partial(run_as_kernel, implementation="xla"))
    chex.assert_trees_all_close(got, want(floats, others), atol=3e-5, rtol=3e-5)
    assert {q for q, _ in shares["attention"]} == {(B, T, N, H)}


@pytest.mark.parametrize("kind", list(KINDS))
def test_kernel_under_vmap(kind, shares):
    """A mapped axis is spread as batch entries are; keys are not mapped."""
    mesh = make_mesh(kind)
    floats, others = everything(4)
    several = {**floats, "query": jnp.stack([floats["query"], -floats["query"]] * 2)}
    axes = {name: 0 if name == "query" else None for name in several}

    def run(several, implementation):
        f = functools.partial(run_as_kernel, implementation=implementation)
        return jax.vmap(lambda x: f(x, others)[:2], in_axes=(axes,))(several)

    args = jax.device_put(several, NamedSharding(mesh, P()))
    args["query"] = jax.device_put(several["query"], NamedSharding(mesh, P("a")))
    with jax.set_mesh(mesh):
        program = jax.jit(functools.partial(run, implementation="kernel"))
        program = program.lower(args).compile()
        got = program(args)
    want = run(several, "xla")
    chex.assert_trees_all_close(got, want, atol=3e-5, rtol=3e-5)
    assert not hlo.total(hlo.collectives(program))
    assert {q for q, _ in shares["attention"]} == {(B, T, N, H)}


def test_kernel_in_part_of_a_mesh(shares):
    """Over the batch by a shard_map; over the heads by the compiler."""
    mesh = make_mesh("auto")
    floats = {name: operands()[0][name] for name in ("query", "key", "value")}
    f = functools.partial(attention, implementation="kernel", **OPTIONS)
    mapped = jax.shard_map(
        lambda x: f(**x),
        mesh=mesh,
        in_specs=P("a"),
        out_specs=P("a"),
        axis_names={"a"},
        check_vma=False,
    )
    sharding = NamedSharding(mesh, P("a", None, "b"))
    args = {name: jax.device_put(x, sharding) for name, x in floats.items()}
    program = jax.jit(mapped).lower(args).compile()
    got = program(args)
    want = attention(**floats, **OPTIONS)
    np.testing.assert_allclose(got, want, atol=2e-5, rtol=2e-5)
    assert {q for q, _ in shares["attention"]} == {(1, T, N // 2, H)}


def test_dropout_is_not_for_shares(shares):
    mesh = make_mesh("auto")
    floats, _ = operands()
    sharding = NamedSharding(mesh, P("a"))
    qkv = [jax.device_put(floats[n], sharding) for n in ("query", "key", "value")]
    f = functools.partial(
        jaxsoftmax.dot_product_attention,
        dropout_rate=0.1,
        dropout_key=jax.random.key(0),
        implementation="kernel",
    )
    with pytest.raises(NotImplementedError, match="dropout is by places"):
        jax.jit(f)(*qkv)
