"""Which implementation runs: chosen where a program is lowered, and told by explain.

The kernels here are stand-ins that leave a mark in the program: they round their result
to a precision of their own.
"""

import dataclasses
import functools
import subprocess
import sys
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxsoftmax
from jaxsoftmax import log_softmax, softmax
from jaxsoftmax._core import dispatch
from jaxsoftmax._core.device import (
    Device,
    assumed_device,
    device_of_name,
    target_device,
)
from jaxsoftmax._rows import defaults, xla_loss
from jaxsoftmax._rows.call import ROWS, RowCall

pytestmark = [pytest.mark.versions, pytest.mark.usefixtures("kernels_first")]

X = jax.ShapeDtypeStruct((8, 6), jnp.float32)
H100 = "NVIDIA H100 80GB HBM3"
PRECISIONS = {"mosaic_gpu": "e8m5", "triton": "e8m6", "opaque": "e8m7"}


@dataclasses.dataclass(eq=False)
class Kernels:
    """A stand-in for a kernel module, and what it was asked.

    Attributes:
      calls: Every (call, device) that `refusal` was asked about.
      traced: Every (op, shapes, dtype of an index) of a kernel that was traced.
      reason: Why it refuses, or None.
      broken: Whether its kernels raise where they are lowered.
    """

    name: str
    calls: list = dataclasses.field(default_factory=list)
    traced: list = dataclasses.field(default_factory=list)
    reason: str | None = None
    broken: bool = False

    def refusal(self, call, device):
        self.calls.append((call, device))
        return self.reason

    def run(self, call, arrays):
        mantissa = int(PRECISIONS[self.name][-1])
        shapes = tuple(None if x is None else x.shape for x in arrays)
        self.traced.append((call.op, shapes, jnp.arange(1).dtype))
        if self.broken:
            raise RuntimeError("no such layout")
        return jax.tree.map(
            lambda x: jax.lax.reduce_precision(x, 8, mantissa),
            xla_loss.run(call, arrays),
        )


@pytest.fixture
def stand_in(monkeypatch):
    """Puts a stand-in in the place of an implementation, of that test's own making."""
    jax.clear_caches()

    def put(name, **options):
        kernels = Kernels(name, **options)
        monkeypatch.setitem(ROWS.implementations, name, kernels)
        return kernels

    monkeypatch.setattr(dispatch, "_warned_of", set())
    yield put
    jax.clear_caches()


@pytest.fixture
def mosaic_gpu(stand_in):
    return stand_in("mosaic_gpu")


@pytest.fixture
def triton(stand_in):
    return stand_in("triton")


@pytest.fixture(params=["softmax", "log_softmax"])
def f(request):
    return {"softmax": softmax, "log_softmax": log_softmax}[request.param]


def lowered(f, *args, platforms=("cuda",)):
    return jax.jit(f).trace(*args).lower(lowering_platforms=platforms).as_text()


def run_in(text):
    """The stand-ins whose marks are in a program."""
    return [name for name, mark in PRECISIONS.items() if f"format = {mark}" in text]


# --- which one runs -------------------------------------------------------------------


def test_the_best_for_each_platform(f, mosaic_gpu, triton):
    best = {"cuda": ["mosaic_gpu"], "rocm": ["triton"], "cpu": [], "tpu": []}
    for platform, names in best.items():
        assert run_in(lowered(f, X, platforms=(platform,))) == names
    assert {device.platform for _, device in mosaic_gpu.calls} == {"cuda"}
    assert {device.platform for _, device in triton.calls} == {"rocm"}


def test_the_next_best_when_the_best_refuses(f, mosaic_gpu, triton):
    mosaic_gpu.reason = "rows too short"
    assert run_in(lowered(f, X)) == ["triton"]


def test_a_trace_serves_every_platform(f, mosaic_gpu):
    """Also of a forced implementation that cannot run where it is traced."""
    traced = jax.jit(functools.partial(f, implementation="mosaic_gpu")).trace(X)
    jax.make_jaxpr(functools.partial(f, implementation="mosaic_gpu"))(X)
    assert run_in(traced.lower(lowering_platforms=("cuda",)).as_text()) == [
        "mosaic_gpu"
    ]
    assert not mosaic_gpu.calls[1:]


def test_several_platforms_in_one_program(f, mosaic_gpu, triton):
    """Each has its own branch; the program that it is exported as runs here."""
    platforms = ("cpu", "cuda", "rocm")
    assert run_in(lowered(f, X, platforms=platforms)) == ["mosaic_gpu", "triton"]
    exported = export.export(jax.jit(f), platforms=platforms)(X)
    x = jnp.arange(48.0).reshape(X.shape) % 7
    np.testing.assert_array_equal(exported.call(x), f(x, implementation="xla"))


def test_a_sequence_is_tried_in_its_order(f, mosaic_gpu, triton):
    first = functools.partial(f, implementation=("triton", "mosaic_gpu"))
    assert run_in(lowered(first, X)) == ["triton"]
    triton.reason = "not here"
    jax.clear_caches()
    assert run_in(lowered(first, X)) == ["mosaic_gpu"]


def test_xla_asked_for_by_name(f, mosaic_gpu):
    assert run_in(lowered(functools.partial(f, implementation="xla"), X)) == []
    assert not mosaic_gpu.calls


def test_refusal_of_all_that_was_asked_for(f, mosaic_gpu, triton):
    mosaic_gpu.reason, triton.reason = "rows too short", "no such GPU"
    with pytest.raises(NotImplementedError) as info:
        lowered(functools.partial(f, implementation="mosaic_gpu"), X)
    assert "implementation='mosaic_gpu' cannot run" in str(info.value)
    assert "on cuda ('mosaic_gpu': rows too short)" in str(info.value)
    assert "These can: ['xla', 'opaque'], or None" in str(info.value)
    with pytest.raises(NotImplementedError, match=r"rows too short.*no such GPU"):
        lowered(functools.partial(f, implementation=["mosaic_gpu", "triton"]), X)


def test_where_it_runs_it_is_refused_when_called(f, mosaic_gpu):
    mosaic_gpu.reason = "needs a GPU"
    for call in (f, jax.jit(f, static_argnames="implementation")):
        with pytest.raises(NotImplementedError, match=r"on cpu .*needs a GPU"):
            call(jnp.ones(3), implementation="mosaic_gpu")


def test_an_empty_array_is_no_work_for_a_kernel(f, mosaic_gpu):
    mosaic_gpu.reason = "an array without entries"
    call = functools.partial(f, implementation="mosaic_gpu")
    assert run_in(lowered(call, jax.ShapeDtypeStruct((0, 6), jnp.float32))) == []


def test_sizes_that_are_not_known(f, mosaic_gpu):
    (n,) = export.symbolic_shape("n")
    x = jax.ShapeDtypeStruct((n, 6), jnp.float32)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(f(x)))))
    with pytest.warns(jaxsoftmax.PerformanceWarning, match="symbolic"):
        exported = export.export(gradient, platforms=("cpu", "cuda"))(x)
    assert not mosaic_gpu.calls
    for rows in (2, 5):
        x = jnp.arange(6.0 * rows).reshape(rows, 6) % 5
        np.testing.assert_allclose(exported.call(x), gradient(x), atol=1e-6)


# --- what does not work is passed by --------------------------------------------------


def test_a_kernel_that_fails_to_lower(f, mosaic_gpu, triton):
    """It is passed by, unless it alone is asked for."""
    mosaic_gpu.broken = True
    assert run_in(lowered(f, X)) == ["triton"]
    assert "RuntimeError: no such layout" in str(jaxsoftmax.explain_for("cuda")(f, X))
    with pytest.raises(RuntimeError, match=r"^no such layout") as info:
        lowered(functools.partial(f, implementation="mosaic_gpu"), X)
    assert info.type is RuntimeError  # its own error, where it alone is asked for


def test_a_module_that_fails_to_import(f, triton, monkeypatch):
    monkeypatch.setitem(ROWS.implementations, "mosaic_gpu", "jaxsoftmax.nowhere")
    assert run_in(lowered(f, X)) == ["triton"]
    text = str(jaxsoftmax.explain_for("cuda")(f, X))
    assert "not mosaic_gpu: its import failed with ModuleNotFoundError" in text


def test_a_kernel_that_fails_under_a_mesh(mosaic_gpu, triton):
    """It is tried apart from the mesh, which is not the kernel's business."""
    mosaic_gpu.broken = True
    mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,))
    each = jax.shard_map(softmax, mesh=mesh, in_specs=P("a"), out_specs=P("a"))
    assert run_in(lowered(each, X)) == ["triton"]
    assert triton.traced[-1][1] == ((1, 6), None)


# --- what a kernel gets ---------------------------------------------------------------


def test_vmaps_leave_arrays_as_they_lie(f, mosaic_gpu):
    """One kernel, whatever is mapped; a mask that is not mapped is not expanded."""
    x, where = jnp.ones((2, 3, 6, 4)), jnp.ones((6,), bool)
    one = lambda x: f(x, axis=1, where=where)  # of 2 rows of 6
    text = lowered(jax.vmap(jax.vmap(one, in_axes=-1), in_axes=1), x)
    assert text.count(f"format = {PRECISIONS['mosaic_gpu']}") in (1, 3)  # results
    (shapes,) = {shapes for _, shapes, _ in mosaic_gpu.traced}
    assert shapes == ((2, 3, 6, 4), (1, 1, 6, 1))


def test_derivatives_in_vmaps_transpose_nothing(f, mosaic_gpu):
    """Of a function of columns: the kernels get them as they lie, and give them so."""
    columns = jax.vmap(f, in_axes=1, out_axes=1)
    x = jax.ShapeDtypeStruct((8, 6), jnp.float32)
    text = lowered(lambda x, g: jax.vjp(columns, x)[1](g)[0], x, x)
    assert "stablehlo.transpose" not in text
    assert {shapes[0] for _, shapes, _ in mosaic_gpu.traced} == {(8, 6)}


def test_vmap_over_the_mask_alone(f, mosaic_gpu):
    masks = jnp.ones((5, 8, 6), bool)
    lowered(jax.vmap(lambda where: f(jnp.ones((8, 6)), where=where)), masks)
    (shapes,) = {shapes for _, shapes, _ in mosaic_gpu.traced}
    assert shapes == ((5, 8, 6), (5, 8, 6))
    x = np.linspace(-1, 1, 48, dtype=np.float32).reshape(8, 6)
    masks = np.arange(240).reshape(5, 8, 6) % 3 > 0
    got = jax.vmap(lambda where: f(x, where=where))(masks)
    want = jnp.stack([f(x, where=where) for where in masks])
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_residuals_that_are_not_mapped_are_repeated_for_a_kernel(f, mosaic_gpu):
    """A Jacobian maps over cotangents alone; the kernel gets whole arrays even so."""
    lowered(jax.jacrev(f), jax.ShapeDtypeStruct((6,), jnp.float32))
    backward = {op: shapes for op, shapes, _ in mosaic_gpu.traced if "_" in op[4:]}
    wide = {
        "softmax_derivative": ((6, 6), (6, 6), None),
        "log_softmax_pullback": ((6, 6), None, (6, 1), (6, 1), (6, 6)),
    }
    name = "softmax_derivative" if f is softmax else "log_softmax_pullback"
    assert backward[name] == wide[name]


def test_absent_entries_where_the_residual_is_not_mapped(implementation, nans_allowed):
    """Every row of cotangents is cleared of what stands at an absent entry."""
    x = jnp.array([0.0, 1.0, -jnp.inf])
    pull = jax.vjp(functools.partial(softmax, implementation=implementation), x)[1]
    rows = jnp.arange(390.0).reshape(130, 3) % 7
    got = jax.jit(jax.vmap(lambda t: pull(t)[0]))(rows.at[:, 2].set(jnp.nan))
    want = jax.jit(jax.vmap(lambda t: pull(t)[0]))(rows.at[:, 2].set(0))
    np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_indices_have_32_bits_unless_something_has_64(f, mosaic_gpu, dtype):
    with jax.enable_x64(True):
        lowered(f, jax.ShapeDtypeStruct((8, 6), dtype))
        indices = {index.name for _, _, index in mosaic_gpu.traced}
        assert indices == {"int64" if dtype == "float64" else "int32"}
        mosaic_gpu.traced.clear()
        lowered(functools.partial(f, dtype="float64"), X)
        assert {index.name for _, _, index in mosaic_gpu.traced} == {"int64"}


TRANSFORMS = {
    "grad": lambda loss: jax.grad(loss),
    "jit": lambda loss: jax.jit(jax.grad(loss)),
    "hessian": lambda loss: jax.hessian(loss),
    "vmap": lambda loss: jax.vmap(jax.grad(loss)),
    "checkpoint": lambda loss: jax.grad(jax.checkpoint(loss)),
    "scan": lambda loss: (
        lambda x: jax.lax.scan(lambda c, _: (c + jax.grad(loss)(c), None), x, length=3)[
            0
        ]
    ),
}


@pytest.mark.parametrize("transform", list(TRANSFORMS))
def test_kernels_run_under_transforms(f, mosaic_gpu, transform):
    """Values and first derivatives are the kernels' (and lower without an error)."""
    transformed = TRANSFORMS[transform](lambda x: jnp.sum(jnp.sin(f(x))))
    assert run_in(lowered(transformed, X)) == ["mosaic_gpu"]
    derivatives = {"softmax": {"softmax", "softmax_derivative"}}
    expected = derivatives.get(f.__name__, {"log_softmax", "log_softmax_pullback"})
    assert expected <= {op for op, _, _ in mosaic_gpu.traced}


@pytest.mark.parametrize("check_vma", [True, False])
def test_kernels_run_inside_shard_map(f, check_vma):
    """A kernel does not see what shard_map notes in types; it gets a device's share."""
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    x = np.linspace(-2, 2, 48, dtype=np.float32).reshape(8, 6)

    def gradient(implementation):
        local = functools.partial(f, implementation=implementation)
        specs = {"in_specs": P("a"), "out_specs": P("a"), "check_vma": check_vma}
        sharded = jax.shard_map(local, mesh=mesh, **specs)
        return jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(sharded(x)))))(x)

    # The first of two is tried in a program of its own, which has no mesh either.
    with dispatch.recorded_choices() as choices:
        got = gradient(("opaque", "xla"))
    assert {choice.implementation for choice in choices} == {"opaque"}
    np.testing.assert_allclose(got, gradient("xla"), atol=1e-6)


def test_xla_is_emitted_in_place():
    """XLA fuses it with its neighbours, as it would without a primitive around it."""
    call = RowCall("softmax", (-1,), 1.0, np.dtype(np.float32))
    x = jax.ShapeDtypeStruct((256, 512), jnp.float32)
    ours, direct = (
        jax.jit(lambda x, f=f: jnp.sin(f(2 * x))).lower(x).compile()
        for f in (softmax, lambda x: xla_loss.run(call, (x, None)))
    )
    for count in (
        lambda c: c.as_text().count(" fusion("),
        lambda c: c.memory_analysis().temp_size_in_bytes,
    ):
        assert count(ours) == count(direct)


# --- for which device -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "capability"),
    [
        ("NVIDIA A100-SXM4-80GB", (8, 0)),
        ("NVIDIA A10G", (8, 6)),
        ("NVIDIA GeForce RTX 3090", (8, 6)),
        ("NVIDIA L4", (8, 9)),
        ("NVIDIA L40S", (8, 9)),
        ("NVIDIA GeForce RTX 4090", (8, 9)),
        (H100, (9, 0)),
        ("NVIDIA H200", (9, 0)),
        ("NVIDIA GH200 480GB", (9, 0)),
        ("NVIDIA B200", (10, 0)),
        ("NVIDIA GB200", (10, 0)),
        ("Tesla V100-SXM2-16GB", (7, 0)),
        ("Tesla T4", (7, 5)),
        ("Quadro RTX 4000", None),
        ("a device of the future", None),
    ],
)
def test_compute_capability_of_a_name(kind, capability):
    assert device_of_name("cuda", kind) == Device("cuda", kind, capability)


def test_device_without_a_name(f, mosaic_gpu):
    """A program may be lowered where there is no GPU, for one that is not known."""
    lowered(f, X)
    assert [device for _, device in mosaic_gpu.calls] == [Device("cuda")]


named_platform = pytest.mark.skipif(
    jax.__version_info__ < (0, 10, 2), reason="an AbstractDevice has no platform"
)


@named_platform
@pytest.mark.parametrize("platform", ["cuda", "gpu"])
def test_device_of_the_abstract_mesh(f, mosaic_gpu, platform):
    device = jax.sharding.AbstractDevice(
        device_kind=H100, num_cores=None, platform=platform
    )
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        lowered(f, X)
    assert [device for _, device in mosaic_gpu.calls] == [Device("cuda", H100, (9, 0))]


def context_of(here=(), **client):
    """A lowering rule's, for a client of one device, of which `here` are local."""
    device = types.SimpleNamespace(device_kind=H100, **client.pop("device", {}))
    calls = {"devices": lambda: [device], "local_devices": lambda: list(here)}
    client = types.SimpleNamespace(platform="gpu", **calls, **client)
    return types.SimpleNamespace(module_context=types.SimpleNamespace(backend=client))


@named_platform
@pytest.mark.parametrize("device", [{}, {"compute_capability": "9.0"}])
@pytest.mark.parametrize("client", [{}, {"_raw_platform": "cuda"}])
def test_device_that_is_compiled_for_and_not_there(device, client):
    """Before that of the abstract mesh; an assumed one before both."""
    context = context_of(device=device, **client)
    other = jax.sharding.AbstractDevice(
        device_kind="NVIDIA A100", num_cores=None, platform="gpu"
    )
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=other)
    with jax.sharding.use_abstract_mesh(mesh):
        assert target_device("cuda", context) == Device("cuda", H100, (9, 0))
    with assumed_device("NVIDIA A100"):
        assert target_device("cuda", context).compute_capability == (8, 0)


def test_device_of_another_client_is_not_compiled_for():
    """One that is there, and one of another platform than a rule lowers for."""
    assert target_device("cuda", context_of(here=["a GPU"])) == Device("cuda")
    assert target_device("cuda", context_of(_raw_platform="rocm")) == Device("cuda")


def test_device_of_this_process(f, stand_in):
    opaque = stand_in("opaque")
    f(jnp.ones(3), implementation="opaque")
    assert {device.platform for _, device in opaque.calls} == {jax.default_backend()}
    assert {device.kind for _, device in opaque.calls} == {jax.devices()[0].device_kind}


# What is slow to import or optional: each is loaded where it is first needed.
NOT_IMPORTED = (
    "chex",
    "flax",
    "jax._src.pallas",
    "jax.experimental.mosaic",
    "jax.experimental.pallas",
    "jax.extend",  # imports Pallas
    "jax_triton",
    "jaxsoftmax.flax",
    "jaxsoftmax._attend.xla",
    "jaxsoftmax._attend.cudnn",
    "jaxsoftmax._rows.mosaic_gpu",
    "jaxsoftmax._rows.triton",
    "jaxsoftmax._attend.triton",
    "optax",
    "triton",
)


def test_importing_starts_nothing():
    """No device is started, nothing slow is loaded, before one is needed."""
    code = f"""
import sys
import jaxsoftmax
from jax._src import xla_bridge
assert not xla_bridge._backends, xla_bridge._backends
for name in {NOT_IMPORTED}:
    assert name not in sys.modules, name
import jax.numpy as jnp
jaxsoftmax.softmax(jnp.ones(3))
for name in {NOT_IMPORTED}:
    assert name not in sys.modules, name
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=120)


# --- explain --------------------------------------------------------------------------


def explained(explanation):
    return [(c.call.op, c.implementation) for c in explanation.choices]


def test_explain_a_call():
    explanation = jaxsoftmax.explain(softmax, X, axis=0, scale=0.5)
    (choice,) = explanation.choices
    assert choice == dispatch.Choice(
        RowCall("softmax", (-2,), 0.5, np.dtype(np.float32), arrays=(X, None)),
        target_device(jax.default_backend()),
        None,
        ROWS,
        "xla",
    )
    header, row = str(explanation).splitlines()
    assert header.split() == ["call", "runs", "device", "axis", "arrays"]
    assert row.split() == ["softmax", "xla", "cpu", "-2", "float32[8,6]"]
    assert repr(explanation) == str(explanation)


def test_explain_a_training_step(f, mosaic_gpu, triton):
    """Jitted, with derivatives, twice: what jax has in its caches is told as well."""
    mosaic_gpu.reason = "rows too short"

    @jax.jit
    def step(params, batch):
        loss = lambda w: jnp.sum(jnp.sin(f(batch["x"] @ w, where=batch["mask"])))
        return params - 0.1 * jax.grad(loss)(params)

    w = jnp.ones((6, 4))
    batch = {"x": X, "mask": np.ones((8, 1), bool)}
    step(w, {"x": jnp.ones(X.shape), "mask": batch["mask"]})
    name = "softmax_derivative" if f is softmax else "log_softmax_pullback"
    for _ in range(2):
        explanation = jaxsoftmax.explain_for("cuda", H100)(step, w, batch)
        ops = dict(explained(explanation))
        assert ops == {f.__name__: "triton", name: "triton"}
        assert {c.device for c in explanation.choices} == {Device("cuda", H100, (9, 0))}
        text = str(explanation)
        assert text.count("not mosaic_gpu: rows too short") == 1
        assert "bool[8,1]" in text
        assert f"triton  cuda ({H100})" in text
    assert explained(jaxsoftmax.explain(step, w, batch)) == [(op, "xla") for op in ops]


def test_explain_shows_each_different_call_once(f):
    twice = lambda x: f(f(x)) + f(x, axis=0)
    ops = explained(jaxsoftmax.explain(twice, X))
    assert ops == [(f.__name__, "xla")] * 2


def test_explain_what_cannot_run(f, mosaic_gpu):
    mosaic_gpu.reason = "needs a GPU"
    explanation = jaxsoftmax.explain(f, X, implementation="mosaic_gpu")
    assert explained(explanation) == [(f.__name__, None)]
    assert str(explanation).endswith("not mosaic_gpu: needs a GPU")
    assert "nothing" in str(explanation)


def test_explain_shows_the_chunks_of_a_linear_loss():
    """Also where jax has the trace in its caches."""
    struct = jax.ShapeDtypeStruct
    x, w = struct((2, 512, 8), jnp.float32), struct((8, 2048), jnp.float32)
    labels, options = struct((2, 512), jnp.int32), {"memory_budget": 2**21}
    loss = functools.partial(jaxsoftmax.linear_softmax_cross_entropy, **options)
    mean = jax.grad(functools.partial(loss, reduction="mean"), 2)
    lines = {
        loss: "2 x 512 tokens by 4 x 512 classes; backward 1 x 1024 tokens by "
        "8 x 256 classes",
        mean: "8 x 1 x 128 tokens (groups x chunks)",
    }
    for f, line in lines.items():
        for _ in range(2):
            *_, last = str(jaxsoftmax.explain(f, x, labels, w)).splitlines()
            assert last == f"  linear loss in chunks: {line}"


def test_explain_runs_nothing():
    def callback(x):
        raise AssertionError("executed")

    def g(x):
        return jax.pure_callback(callback, X, softmax(x))

    assert explained(jaxsoftmax.explain(g, jnp.ones(X.shape))) == [("softmax", "xla")]
    assert str(jaxsoftmax.explain(jnp.sin, X)) == "no call of jaxsoftmax"


# --- warnings -------------------------------------------------------------------------


def test_one_warning_a_reason(f, mosaic_gpu, triton):
    mosaic_gpu.reason, triton.reason = "rows too short", "not installed"
    both = lambda x: (f(x), jax.grad(lambda x: jnp.sum(jnp.sin(f(x))))(x))
    with pytest.warns(jaxsoftmax.PerformanceWarning) as caught:
        lowered(both, X)
    (warning,) = caught
    assert "'mosaic_gpu': rows too short; 'triton': not installed" in str(
        warning.message
    )
    jax.clear_caches()
    mosaic_gpu.reason = "no float64"
    with pytest.warns(jaxsoftmax.PerformanceWarning) as caught:
        lowered(f, X)
    (warning,) = caught
    assert "('mosaic_gpu': no float64)" in str(warning.message)


def test_rocm_is_refused_without_a_warning(f):
    """No kernel runs there, whatever a user does."""
    explained = jaxsoftmax.explain_for("rocm", "MI300")(f, X)
    assert "has not been tried on ROCm" in str(explained)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run_in(lowered(f, X, platforms=("rocm",))) == []
    with pytest.raises(NotImplementedError, match="has not been tried on ROCm"):
        lowered(functools.partial(f, implementation="triton"), X, platforms=("rocm",))


def test_a_warning_that_is_an_error_comes_again(f, mosaic_gpu, triton):
    mosaic_gpu.reason, triton.reason = "rows too short", "not installed"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            with pytest.raises(jaxsoftmax.PerformanceWarning, match="rows too short"):
                lowered(f, X)


def test_no_warning(f, mosaic_gpu, triton):
    """On the CPU, where a kernel runs, where XLA was asked for, from explain."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mosaic_gpu.reason = "rows too short"
        lowered(f, X)  # triton takes it
        triton.reason = "not installed"
        jax.clear_caches()
        lowered(f, X, platforms=("cpu",))
        f(jnp.ones(3))
        lowered(functools.partial(f, implementation="xla"), X)
        lowered(functools.partial(f, implementation=("mosaic_gpu", "xla")), X)
        jaxsoftmax.explain_for("cuda")(f, X)


AS_MEASURED = defaults.reason_for_xla
AGAINST_AS_MEASURED = defaults.reason_against


@pytest.fixture
def as_measured(monkeypatch):
    """The defaults as they are, undoing `kernels_first`."""
    monkeypatch.setattr(defaults, "reason_for_xla", AS_MEASURED)
    monkeypatch.setattr(defaults, "reason_against", AGAINST_AS_MEASURED)


@pytest.mark.parametrize(
    ("shape", "axis", "dtypes", "runs"),
    [
        ((512, 2048), -1, "bfloat16", "xla"),  # small
        ((1024, 512), 0, "bfloat16", "xla"),
        ((4096, 128), 0, "bfloat16", "xla"),
        ((4, 4096), -1, "bfloat16", "mosaic_gpu"),  # long rows
        ((512, 4096), -1, "bfloat16", "mosaic_gpu"),
        ((2048, 4096), -1, "bfloat16", "mosaic_gpu"),
        ((2**17, 64), -1, "bfloat16", "softmax as xla"),  # short rows
        ((2**17, 16), -1, "bfloat16", "xla"),
        ((2**16, 256), -1, "bfloat16", "mosaic_gpu"),
        ((2**16, 8, 128), (-2, -1), "bfloat16", "mosaic_gpu"),
        # Not the last axis: in strips.
        ((1024, 4096), 0, "bfloat16", "mosaic_gpu"),
        ((4, 1024, 2048), 1, "float16", "mosaic_gpu"),
        ((8192, 4096), 0, "bfloat16", "mosaic_gpu"),
        ((2048, 64, 64), 1, "bfloat16", "mosaic_gpu"),
        ((8192, 4096), 0, "float32", "mosaic_gpu"),
        ((8192, 4096), 0, "bfloat16 float32", "xla"),
        ((16384, 4096), 0, "bfloat16", "mosaic_gpu"),
        ((1000, 4096), 0, "bfloat16", "mosaic_gpu"),  # little twice
        ((66, 2**16), 0, "bfloat16", "xla"),
        ((65536, 64), 0, "bfloat16", "mosaic_gpu"),  # read twice
        ((2**19, 64), 0, "bfloat16", "xla"),
        ((2048, 1024, 8), 1, "bfloat16", "xla"),
        ((2048, 32, 64), 1, "bfloat16", "xla"),
        ((64, 1024, 64), (0, 2), "bfloat16", "xla"),
        ((4096, 8192, 1), 1, "bfloat16", "mosaic_gpu"),  # it is the last
        ((4096, 8192, 1), 1, "float32", "mosaic_gpu"),  # which XLA does not see
        ((2048, 4096), -1, "float32", "softmax as xla"),  # casts are fused
        ((2048, 8192), -1, "float32", "softmax as xla"),
        ((2048, 4096), -1, "float32 bfloat16", "softmax as xla"),
        ((2048, 4096), -1, "bfloat16 float32", "softmax as xla"),
        ((2048, 8192), -1, "float32 bfloat16", "mosaic_gpu"),
        ((2048, 32768), -1, "float32", "mosaic_gpu"),
    ],
)
def test_default_on_a_gpu(f, as_measured, mosaic_gpu, shape, axis, dtypes, runs):
    """Nothing is warned of where XLA was measured to be as fast; `explain` says why."""
    if runs.endswith(" as xla"):
        runs = "xla" if runs == f"{f.__name__} as xla" else "mosaic_gpu"
    dtype, out = (dtypes + " " + dtypes).split()[:2]
    x, g = jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct(shape, out)
    of = functools.partial(f, axis=axis, dtype=out)

    def both(x, g):
        y, pull = jax.vjp(of, x)
        return y, pull(g)

    explanation = jaxsoftmax.explain_for("cuda", H100)(both, x, g)
    choices = list(explanation.choices)
    assert {choice.implementation for choice in choices} == {runs}
    assert ("XLA's form is" in str(explanation)) == (runs == "xla")
    # No one need be told, nor where Triton's kernels are slower than XLA's form.
    assert all(c.is_faster == (runs == "xla") for c in choices)
    named = functools.partial(f, axis=axis, implementation="mosaic_gpu")
    (choice,) = jaxsoftmax.explain_for("cuda", H100)(named, x).choices
    assert choice.asked == ("mosaic_gpu",)


def test_default_for_rows_of_any_length(f, as_measured, mosaic_gpu):
    """They are Mosaic GPU's too."""
    x = jax.ShapeDtypeStruct((2048, 50257), jnp.bfloat16)
    (choice,) = jaxsoftmax.explain_for("cuda", H100)(f, x).choices
    assert choice.implementation == "mosaic_gpu"


def test_default_over_columns_with_a_mask(f, as_measured, mosaic_gpu):
    """XLA's form: the kernel was not timed with one."""
    x = jax.ShapeDtypeStruct((8192, 4096), jnp.bfloat16)
    where = jax.ShapeDtypeStruct((8192, 1), bool)
    explain = jaxsoftmax.explain_for("cuda", H100)
    columns = functools.partial(f, axis=0)
    (choice,) = explain(columns, x).choices
    assert choice.implementation == "mosaic_gpu"
    (choice,) = explain(lambda x, w: columns(x, where=w), x, where).choices
    assert choice.implementation == "xla"
