"""Which kernels a program gets that is lowered for a GPU that is not there.

Run by `make test-for-gpu`, as tests/rows/test_kernel_counts.py.
"""

import functools
import sys
import types

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P
from support import for_gpu

import jaxsoftmax
from jaxsoftmax._core.device import Device
from jaxsoftmax._rows import triton

pytestmark = [
    for_gpu.needed,
    # For an A100 without jax-triton.
    pytest.mark.filterwarnings("ignore::jaxsoftmax.PerformanceWarning"),
]

X = jax.ShapeDtypeStruct((4096, 1024), jnp.bfloat16)
HEADS = jax.ShapeDtypeStruct((2, 64, 4, 64), jnp.bfloat16)
CAPABILITIES = {"A100": (8, 0), "H200": (9, 0), "B200": (10, 0)}
over_all = pytest.mark.parametrize("card", for_gpu.CARDS)


def lowered(f, *shapes, card):
    sharding = jax.sharding.SingleDeviceSharding(for_gpu.device(card))
    given = [x.update(sharding=sharding) for x in shapes]
    return jax.jit(f).trace(*given).lower().as_text()


@over_all
def test_kernels_are_those_of_the_card(card):
    program = lowered(lambda x: jaxsoftmax.softmax(x), X, card=card)
    assert ("mosaic_gpu" in program) == (CAPABILITIES[card] >= (9, 0))


@over_all
def test_explain_knows_the_card(card):
    sharding = jax.sharding.SingleDeviceSharding(for_gpu.device(card))
    explanation = jaxsoftmax.explain(jaxsoftmax.softmax, X.update(sharding=sharding))
    (choice,) = explanation.choices
    assert choice.device == Device("cuda", f"NVIDIA {card}", CAPABILITIES[card])


@over_all
def test_programs_for_other_devices_are_as_before(card):
    """Of the same function, in the same process."""
    f = jax.jit(lambda x: jaxsoftmax.softmax(x))
    lowered(f, X, card=card)
    assert "mosaic_gpu" not in f.lower(X).as_text()
    assert "mosaic_gpu" not in f.trace(X).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("axis_type", [*jax.sharding.AxisType][:2])
def test_shares_of_several_devices(axis_type):
    """Of each the kernel is that of the card."""
    devices = for_gpu.devices("H200", 2)
    mesh = jax.make_mesh((2,), ("x",), (axis_type,), devices=devices)
    x = X.update(sharding=jax.sharding.NamedSharding(mesh, P("x")))
    found = for_gpu.compiled_as_they_lie(lambda x: jaxsoftmax.softmax(x), x)
    (kernel,) = found.kernels
    assert "mosaic_gpu" in kernel.target
    assert kernel.result.startswith("bf16[2048,1024]")


@pytest.mark.parametrize("axis_type", [*jax.sharding.AxisType][:2])
def test_attention_of_several_devices(axis_type):
    """Of each the kernel is that of the card, for half of the heads; nothing moves."""
    devices = for_gpu.devices("H200", 2)
    mesh = jax.make_mesh((2,), ("x",), (axis_type,), devices=devices)
    sharding = jax.sharding.NamedSharding(mesh, P(None, None, "x"))
    x = jax.ShapeDtypeStruct((2, 256, 8, 64), jnp.bfloat16, sharding=sharding)

    def f(q, k, v):
        attention = jaxsoftmax.dot_product_attention
        capped = functools.partial(attention, logits_soft_cap=30.0)
        out, pull = jax.vjp(capped, q, k, v)
        return out, pull(out)

    found = for_gpu.compiled_as_they_lie(f, x, x, x)
    kernels = [kernel for kernel in found.kernels if "mosaic_gpu" in kernel.target]
    assert len(kernels) == 3
    assert all("bf16[2,256,4,64]" in kernel.result for kernel in kernels)
    moving = {"all-reduce", "all-gather", "collective-permute", "all-to-all"}
    assert not moving & {kernel.op for kernel in found.kernels}


def linear_loss(shape, budget):
    """The mean in bfloat16, with its gradients, compiled for an H200."""
    tokens, hidden, vocabulary = shape

    def loss(x, weights, labels):
        return jaxsoftmax.linear_softmax_cross_entropy(
            x, labels, weights, reduction="mean", memory_budget=budget
        )

    return for_gpu.compiled(
        jax.value_and_grad(loss, (0, 1)),
        jax.ShapeDtypeStruct((tokens, hidden), jnp.bfloat16),
        jax.ShapeDtypeStruct((hidden, vocabulary), jnp.bfloat16),
        jax.ShapeDtypeStruct((tokens,), jnp.int32),
        card="H200",
    )


def test_gradients_of_chunks_are_written_where_they_stay():
    """Behind a linear layer: no copy of the array of all, nor of one chunk's.

    The budget has room for four chunks' gradients and one chunk's logits.
    """
    tokens, hidden, vocabulary = 1024, 128, 4096
    chunk = tokens // 4 * vocabulary
    budget = 4 * (2 * chunk) + 4 * chunk

    found = linear_loss((tokens, hidden, vocabulary), budget)
    large = [k for k in found.kernels if k.entries >= chunk and not k.is_product]
    copies = {"copy", "dynamic-update-slice"}
    assert not any(copies & kernel.operations for kernel in large)


@pytest.mark.parametrize(
    ("shape", "budget", "most"),
    [
        ((8192, 4096, 128256), None, 2.3e9),
        ((8192, 4096, 128256), 2**26, 0.35e9),
        ((16384, 2048, 151936), None, 4e9),
    ],
)
def test_memory_of_linear_losses(shape, budget, most):
    """Of bfloat16; dense logits and their gradient would take 4.2 and 10 GB."""
    with for_gpu.gpu_by_default():
        found = linear_loss(shape, budget)
    assert found.temp_bytes <= most


def test_cudnn_needs_the_device():
    """A program with its calls would compile, and fail where it runs."""
    attention = jaxsoftmax.dot_product_attention

    def gradient(implementation):
        f = functools.partial(attention, implementation=implementation)
        return jax.grad(lambda *x: jnp.sum(f(*x).astype(jnp.float32)), (0, 1, 2))

    with pytest.raises(NotImplementedError, match="needs the device itself"):
        lowered(gradient("cudnn"), *[HEADS] * 3, card="H200")
    program = lowered(gradient(("cudnn", "xla")), *[HEADS] * 3, card="H200")
    assert "cudnn" not in program


@pytest.mark.parametrize(
    "size", [128, *(pytest.param(n, marks=pytest.mark.slow) for n in (64, 96, 256))]
)
def test_attention_in_mosaic_gpu(size):
    """Its kernels are compiled to the end, soft cap and sinks with them."""
    heads = jax.ShapeDtypeStruct((2, 300, 4, size), jnp.bfloat16)
    sinks = jax.ShapeDtypeStruct((4,), jnp.float32)

    def f(*arrays):
        call = lambda q, k, v, sinks: jaxsoftmax.dot_product_attention(
            *(q, k, v),
            is_causal=True,
            logits_soft_cap=30.0,
            sinks=sinks,
            implementation="mosaic_gpu",
        )
        out, pull = jax.vjp(call, *arrays)
        return out, pull(out), jax.linearize(call, *arrays)[1](*arrays)

    found = for_gpu.compiled(f, heads, heads, heads, sinks, card="H200")
    kernels = sum("mosaic_gpu" in kernel.target for kernel in found.kernels)
    assert kernels == (5 if size == 256 else 4)


@pytest.mark.parametrize(
    ("size", "length"),
    [
        (64, 40_000),
        *(pytest.param(n, 300, marks=pytest.mark.slow) for n in (128, 256)),
    ],
)
def test_attention_with_dropout_in_mosaic_gpu(size, length):
    """Its bits are not in memory; if there are many, places have 64. A bias of keys."""
    heads = jax.ShapeDtypeStruct((2, length, 4, size), jnp.bfloat16)
    bias = jax.ShapeDtypeStruct((2, 1, 1, length), jnp.float32)
    key = jax.ShapeDtypeStruct((2,), jnp.uint32)

    def f(key, bias, *arrays):
        out, pull = jax.vjp(
            lambda *x: jaxsoftmax.dot_product_attention(
                *(*x, bias),
                dropout_rate=0.1,
                dropout_key=key,
                implementation="mosaic_gpu",
            ),
            *arrays,
        )
        return out, pull(out)

    found = for_gpu.compiled(f, key, bias, heads, heads, heads, card="H200")
    kernels = sum("mosaic_gpu" in kernel.target for kernel in found.kernels)
    assert kernels == (4 if size == 256 else 3)
    if length > 300:
        assert found.temp_bytes < 8 * length**2 / 8


@pytest.mark.parametrize(
    ("size", "dtype"),
    [
        (128, "bfloat16"),
        *(
            pytest.param(size, dtype, marks=pytest.mark.slow)
            for size in (64, 128, 256)
            for dtype in ("bfloat16", "float32")
            if (size, dtype) != (128, "bfloat16")
        ),
    ],
)
def test_attention_with_pairs_in_mosaic_gpu(size, dtype):
    """A mask and a bias, which has a gradient: in shared memory and registers too."""
    heads = jax.ShapeDtypeStruct((2, 300, 4, size), jnp.bfloat16)
    bias = jax.ShapeDtypeStruct((4, 300, 300), jnp.dtype(dtype))
    mask = jax.ShapeDtypeStruct((2, 1, 300, 300), bool)

    def f(mask, *arrays):
        out, pull = jax.vjp(
            lambda q, k, v, bias: jaxsoftmax.dot_product_attention(
                *(q, k, v, bias, mask), implementation="mosaic_gpu"
            ),
            *arrays,
        )
        return out, pull(out)

    found = for_gpu.compiled(f, mask, heads, heads, heads, bias, card="H200")
    kernels = sum("mosaic_gpu" in kernel.target for kernel in found.kernels)
    assert kernels == (4 if size == 256 else 3)


@over_all
@pytest.mark.parametrize(
    "names", [["softmax"], ["attention"], ["attention", "attention_pushforward"]]
)
def test_triton_compiles_for_the_card(card, names, monkeypatch):
    """Told its compute capability, jax-triton asks no driver."""
    seen = set()

    def triton_call(*arrays, out_shape, name, compute_capability, **others):
        seen.add((name, compute_capability))
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), out_shape)

    stand_in = types.SimpleNamespace(triton_call=triton_call)
    monkeypatch.setitem(sys.modules, "jax_triton", stand_in)
    for source in ("jaxsoftmax._rows", "jaxsoftmax._attend"):
        every = ("softmax", "attention", "attention_pushforward")
        kernels = types.SimpleNamespace(**{f"jaxsoftmax_{name}": 0 for name in every})
        monkeypatch.setitem(sys.modules, f"{source}.triton_source", kernels)
        monkeypatch.setattr(
            sys.modules[source], "triton_source", kernels, raising=False
        )
    triton.unavailable.cache_clear()
    if names == ["softmax"]:
        f, given = jaxsoftmax.softmax, [X]
    else:
        f, given = jaxsoftmax.dot_product_attention, [HEADS] * 3
    f = functools.partial(f, implementation="triton")
    forward_mode = lambda *x: jax.jvp(f, x, x)
    lowered(forward_mode if len(names) > 1 else f, *given, card=card)
    triton.unavailable.cache_clear()
    major, minor = CAPABILITIES[card]
    kernels, capabilities = map(set, zip(*seen, strict=True))
    assert kernels >= {f"jaxsoftmax_{name}" for name in names}
    assert capabilities == {10 * major + minor}
