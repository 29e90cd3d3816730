"""Programs for several devices: the same values, and nothing moved that need not be.

The devices are simulated. Each program is compiled, and its HLO searched for what it
moves. The implementation "opaque" is a kernel that XLA cannot partition: what is tested
with it is the partitioning rule itself.
"""

import functools
import itertools
import os
import pathlib
import re
import subprocess
import sys
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support import for_gpu, hlo, opaque, oracle
from support.compilation import exact_jit
from support.meshes import KINDS, compiled, make_mesh, run

import jaxsoftmax
from jaxsoftmax import log_softmax, softmax
from jaxsoftmax._core import dispatch
from jaxsoftmax._core.partitioning import Across
from jaxsoftmax._rows import call as row_call
from jaxsoftmax._rows import sharded

pytestmark = [
    pytest.mark.usefixtures("kernels_first"),
    pytest.mark.skipif(
        jax.device_count() < 8, reason="needs 8 devices, simulated or not"
    ),
]

FUNCTIONS = {"softmax": softmax, "log_softmax": log_softmax}
ROWS, N = 16, 64
WHOLE_ROWS = [P("a"), P(("a", "b"))]
SHARED_ROWS = [P(None, "b"), P(None, ("a", "b")), P("a", "b"), P("b", "a")]


def put(mesh, spec, *arrays):
    """The arrays on the mesh; of a mixed mesh, types show the explicit axis alone."""
    return tuple(jax.device_put(x, NamedSharding(mesh, spec)) for x in arrays)


@pytest.fixture(params=list(FUNCTIONS))
def name(request):
    return request.param


OPERANDS = tuple(np.random.default_rng(0).normal(size=(2, ROWS, N)).astype(np.float32))


@pytest.fixture
def operands():
    return OPERANDS


@functools.cache
def on_one_device(name, mode):
    """What a mode gives without a mesh; each is compiled once."""
    f = functools.partial(FUNCTIONS[name], implementation="xla")
    jit = jit_of(mode)
    return jax.device_get(jit(functools.partial(MODES[mode], f))(*OPERANDS))


def jit_of(mode):
    """Two steps of a scan make much of the last digit."""
    return exact_jit if mode == "scan" else jax.jit


def size_on_a_device(spec, mesh, shape=(ROWS, N)):
    return NamedSharding(mesh, spec).shard_shape(shape)


def loss(f, x):
    return jnp.sum(jnp.sin(f(x)))


def through_scan(f, x, v):
    def body(c, _):
        return c + jax.grad(functools.partial(loss, f))(c * v), None

    return lax.scan(body, x, length=2)[0]


def through_vmap(f, x, v):
    """Each row its own call, and the gradient of a mapped loss."""
    return jax.vmap(f)(x), jax.vmap(jax.grad(functools.partial(loss, f)))(x)


MODES = {
    "value": lambda f, x, v: f(x),
    "vjp": lambda f, x, v: jax.vjp(f, x)[1](v)[0],
    "jvp": lambda f, x, v: jax.jvp(f, (x,), (v,))[1],
    "hvp": lambda f, x, v: jax.jvp(jax.grad(functools.partial(loss, f)), (x,), (v,))[1],
    "vmap": through_vmap,
    "checkpoint": lambda f, x, v: jax.grad(jax.checkpoint(functools.partial(loss, f)))(
        x
    ),
    "scan": through_scan,
}


def cases(specs, modes, mixed):
    """(implementation, kind, spec, mode): most of "opaque", some of "xla".

    The first of `specs` with all `modes`; mixed meshes with those in `mixed` alone.
    """
    for kind, spec, mode in itertools.product(KINDS, specs, modes):
        if spec != specs[0] and mode not in ("value", "vjp", "hvp"):
            continue
        if kind != "mixed" or mode in mixed:
            yield "opaque", kind, spec, mode
        if (kind == "auto" and spec == specs[0]) or (kind, mode) == ("explicit", "vjp"):
            yield "xla", kind, spec, mode


def each_of(found):
    found = list(found)
    return pytest.mark.parametrize(
        ("implementation", "kind", "spec", "mode"),
        found,
        ids=["-".join(map(str, case)) for case in found],
    )


def spread(mesh, spec, implementation, name, mode, **options):
    """A mode's program for operands that lie on a mesh, and these."""
    f = functools.partial(FUNCTIONS[name], implementation=implementation)
    args = put(mesh, spec, *OPERANDS)
    return compiled(mesh, functools.partial(MODES[mode], f), *args, **options), args


# --- whole rows on each device --------------------------------------------------------


@each_of(cases(WHOLE_ROWS, MODES, mixed=("value", "vjp", "hvp")))
@pytest.mark.pairwise(1)
def test_whole_rows_move_nothing(implementation, name, kind, spec, mode):
    mesh = make_mesh(kind)
    program, args = spread(mesh, spec, implementation, name, mode)
    assert hlo.collectives(program) == []
    chex.assert_trees_all_close(
        run(mesh, program, *args), on_one_device(name, mode), atol=2e-6, rtol=2e-6
    )


@pytest.mark.versions
@pytest.mark.pairwise(1)
def test_a_mesh_of_one_axis(implementation, name):
    mesh = make_mesh(sizes=(8,), names=("a",))
    for spec, kinds in ((P("a"), set()), (P(None, "a"), {"all-reduce"})):
        for mode in ("value", "vjp"):
            program, args = spread(mesh, spec, implementation, name, mode)
            assert set(hlo.total(hlo.collectives(program))) == kinds
            want = on_one_device(name, mode)
            chex.assert_trees_all_close(program(*args), want, atol=1e-6)


@pytest.mark.parametrize("spec", [P(None, "a"), P("a", None, "b")], ids=str)
@pytest.mark.pairwise(1)
def test_masks_are_not_gathered(implementation, name, rng, spec):
    """A mask of its own for each batch entry, on whole rows and on shared ones."""
    x = rng.normal(size=(8, 4, 6)).astype(np.float32)
    where = rng.random(size=(8, 1, 6)) < 0.7
    where[:, :, 0] = True
    f = functools.partial(FUNCTIONS[name], implementation=implementation)

    def value_and_gradient(x, where):
        def shown(x):
            return jnp.where(jnp.broadcast_to(where, x.shape), f(x, where=where), 0)

        return shown(x), jax.grad(lambda x: jnp.sum(jnp.sin(shown(x))))(x)

    mesh = make_mesh()
    mask_spec = P(spec[0], None, *spec[2:])
    args = (*put(mesh, spec, x), *put(mesh, mask_spec, where))
    program = compiled(mesh, value_and_gradient, *args)
    assert set(hlo.total(hlo.collectives(program))) <= {"all-reduce"}
    chex.assert_trees_all_close(
        program(*args), jax.jit(value_and_gradient)(x, where), atol=1e-6
    )


# --- rows that devices share ----------------------------------------------------------

# Bytes a row of each all-reduce, of what comes on top of the value's in a derivative.
MOVED = {
    ("softmax", "value"): [4, 4],
    ("softmax", "vjp"): [16],
    ("softmax", "jvp"): [16],
    ("log_softmax", "value"): [4, 8],
    ("log_softmax", "vjp"): [8],
    ("log_softmax", "jvp"): [16],
}


@each_of(cases(SHARED_ROWS, ["value", "vjp", "jvp"], mixed=("vjp",)))
@pytest.mark.pairwise(1)
def test_shared_rows_move_a_few_numbers(implementation, name, kind, spec, mode):
    mesh = make_mesh(kind)
    program, args = spread(mesh, spec, implementation, name, mode)
    found = hlo.collectives(program)
    a_row = MOVED[name, "value"] + (MOVED[name, mode] if mode != "value" else [])
    rows = size_on_a_device(spec, mesh)[0]
    assert hlo.total(found) == {"all-reduce": rows * sum(a_row)}
    assert len(found) <= len(a_row)
    got = run(mesh, program, *args)
    assert got.sharding.is_equivalent_to(NamedSharding(mesh, spec), 2)
    chex.assert_trees_all_close(got, on_one_device(name, mode), atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("mode", ["vjp", "jvp"])
@pytest.mark.parametrize("spec", [P("a"), P(None, "b"), P("a", "b")], ids=str)
@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_what_is_computed_anew(name, kind, spec, mode):
    """Where a GPU is the default XLA keeps logits, and what the value moves twice."""
    mesh, both = make_mesh(kind), lambda f, x, v: (f(x), MODES[mode](f, x, v))
    f = functools.partial(FUNCTIONS[name], implementation="xla")
    with for_gpu.gpu_by_default():
        args = put(mesh, spec, *OPERANDS)
        program = compiled(mesh, functools.partial(both, f), *args)
        got = run(mesh, program, *args)
    rows = size_on_a_device(spec, mesh)[0] * (len(spec) > 1)
    a_row = [*2 * MOVED[name, "value"], *MOVED[name, mode]]
    assert sum(each.nbytes for each in hlo.collectives(program)) == rows * sum(a_row)
    want = on_one_device(name, "value"), on_one_device(name, mode)
    chex.assert_trees_all_close(got, want, atol=2e-6, rtol=2e-6)


@each_of(cases([P("a", "b")], ["hvp", "vmap", "checkpoint", "scan"], mixed=()))
@pytest.mark.pairwise(1)
def test_shared_rows_under_transforms(implementation, name, kind, spec, mode):
    """No entry of a row leaves its device in any mode."""
    mesh = make_mesh(kind)
    jit = jit_of(mode)
    program, args = spread(mesh, spec, implementation, name, mode, jit=jit)
    found = hlo.collectives(program)
    assert {each.kind for each in found} == {"all-reduce"}
    rows = size_on_a_device(spec, mesh)[0]
    assert max(each.nbytes for each in found) <= 48 * rows  # of several at once
    # Two steps through the sine of logarithms: 2e-4 from float64 on one device, too.
    bar = 1e-4 if (name, mode) == ("log_softmax", "scan") else 4e-6
    chex.assert_trees_all_close(
        run(mesh, program, *args), on_one_device(name, mode), atol=bar, rtol=bar
    )


JACOBIANS = {
    "jacrev": jax.jacrev,
    "jacfwd": jax.jacfwd,
    "hessian": lambda f: jax.hessian(functools.partial(loss, f)),
    "mapped pullback": lambda f: (
        lambda x: jax.vmap(lambda g: jax.vjp(f, x)[1](g)[0], in_axes=-1)(
            jnp.stack([jnp.cos(x), jnp.sin(x)], -1)
        )
    ),
}


@pytest.mark.parametrize("kind", ["auto", "explicit"])
@pytest.mark.parametrize(
    ("shared", "mode"),
    [
        *itertools.product(FUNCTIONS, JACOBIANS),
        ("cross_entropy", "jacfwd"),
        ("cross_entropy", "hessian"),
    ],
)
@pytest.mark.pairwise(1)
def test_a_mapped_cotangent_of_shared_rows(shared, mode, kind):
    """Where residuals are not mapped: they have one entry for all of the batch."""
    functions = {
        **FUNCTIONS,
        "cross_entropy": lambda x: jaxsoftmax.softmax_cross_entropy_with_integer_labels(
            x, jnp.array([3])
        ),
    }
    x = OPERANDS[0][:1, :8]
    program = JACOBIANS[mode](functions[shared])
    expected = jax.jit(program)(x)
    mesh = make_mesh(kind, (2,), ("a",))
    (placed,) = put(mesh, P(None, "a"), x)
    found = run(mesh, jax.jit(program), placed)
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("axis", [0, (0, 2), None])
@pytest.mark.pairwise(1)
def test_other_axes(implementation, name, rng, axis):
    x = rng.normal(size=(8, 4, 6)).astype(np.float32)
    f = functools.partial(FUNCTIONS[name], axis=axis, implementation=implementation)
    g = lambda x: (f(x), jax.grad(functools.partial(loss, f))(x))
    want = jax.jit(g)(x)
    for kind in ("auto", "explicit"):
        mesh = make_mesh(kind)
        (given,) = put(mesh, P("a", None, "b"), x)
        program = compiled(mesh, g, given)
        assert set(hlo.total(hlo.collectives(program))) == {"all-reduce"}
        chex.assert_trees_all_close(run(mesh, program, given), want, atol=1e-6)


@pytest.mark.parametrize(
    "scale", [0.5, np.full((1, 1), 0.5, np.float32)], ids=["number", "array"]
)
@pytest.mark.pairwise(1)
def test_dtypes_and_scale(implementation, name, operands, scale):
    """float32 logits to bfloat16 results, with a number and with a learned scale."""
    mesh = make_mesh()
    x, v = operands
    v = v.astype(jnp.bfloat16)
    options = {"dtype": jnp.bfloat16, "scale": scale, "implementation": implementation}
    f = functools.partial(FUNCTIONS[name], **options)
    g = lambda x, v: (f(x), jax.vjp(f, x)[1](v)[0])
    args = put(mesh, P("a", "b"), x, v)
    program = compiled(mesh, g, *args)
    assert set(hlo.total(hlo.collectives(program))) == {"all-reduce"}
    got, want = program(*args), jax.jit(g)(x, v)
    assert [y.dtype for y in got] == [jnp.bfloat16, jnp.float32]
    bar = 8e-3 * float(jnp.abs(want[1]).max())
    np.testing.assert_allclose(got[1], want[1], atol=bar)
    chex.assert_trees_all_close(got[0], want[0], rtol=2**-7)


@pytest.mark.pairwise(1)
def test_float64(implementation, name, operands):
    with jax.enable_x64(True):
        mesh = make_mesh()
        x, v = (a.astype(np.float64) for a in operands)
        f = functools.partial(FUNCTIONS[name], implementation=implementation)
        g = functools.partial(MODES["vjp"], f)
        program = compiled(mesh, g, *put(mesh, P("a", "b"), x, v))
        got = program(*put(mesh, P("a", "b"), x, v))
        assert got.dtype == np.float64
        np.testing.assert_allclose(got, jax.jit(g)(x, v), atol=1e-14)


# --- sizes that do not divide ---------------------------------------------------------


@pytest.mark.parametrize("shape", [(10, 61), (3, 5)])
@pytest.mark.parametrize(
    "spec", [P("a"), P(None, "a"), P("b", "a"), P("a", "b")], ids=str
)
@pytest.mark.pairwise(1)
def test_sizes_that_do_not_divide(implementation, name, rng, shape, spec):
    """Some devices have less, or nothing. A row's end is no part of the row."""
    x, v, w = rng.normal(size=(3, *shape)).astype(np.float32)
    f = functools.partial(FUNCTIONS[name], implementation=implementation)
    mesh = make_mesh()
    place = lambda x: lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    def numbers(x, v, w, f=f, place=place):
        y, pull = jax.vjp(f, place(x))
        (dx,) = pull(place(v))
        pushed = jax.jvp(f, (place(x),), (place(v),))[1]
        # Results leave a program in shares of one size: so numbers alone do.
        return [jnp.sum(place(each) * place(w)) for each in (y, dx, pushed)]

    program = compiled(mesh, numbers, x, v, w)
    kinds = {each.kind for each in hlo.collectives(program)}
    # What XLA moves anyway, to cut an array into such shares.
    anyway = compiled(mesh, functools.partial(numbers, f=jnp.tanh), x, v, w)
    assert kinds - {each.kind for each in hlo.collectives(anyway)} <= {"all-reduce"}
    assert "all-gather" not in kinds
    want = jax.jit(functools.partial(numbers, place=lambda x: x))(x, v, w)
    chex.assert_trees_all_close(program(x, v, w), want, atol=2e-5, rtol=2e-5)


# --- numerics -------------------------------------------------------------------------


def rows_of_every_kind(rng, dtype):
    """Ordinary rows and those that a formula alone gets wrong; a cotangent for them."""
    x = 3 * rng.normal(size=(ROWS, N))
    t = rng.normal(size=(ROWS, N))
    x[1], t[1] = -np.inf, np.nan  # empty: 0, whatever the cotangent
    x[2, 1::3] = -np.inf
    t[2, 1::3] = np.nan
    x[3, 5] = np.nan
    x[4, -1] = np.inf
    x[5] = float(jnp.finfo(dtype).min)  # uniform: a finite number is no mask
    x[6, 7] = 40
    x[7, :-3] = -np.inf  # all shares but one are empty
    x[8, [3, 60]] = 30  # a tie between two shares
    x[9] = 0
    return jnp.array(x, dtype), jnp.array(t, dtype)


def check(got, want, dtype, bar, least=0.0):
    got = oracle._wide(got)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    exact = (want == 0) | np.isinf(want)
    np.testing.assert_array_equal(got[exact], want[exact])
    counted = np.isfinite(want).all(-1)
    assert oracle.row_error(got[counted], want[counted], dtype, least=least) <= bar


# Of values in units of eps; of gradients, relative to the row's largest entry.
GRADIENT_BAR = {"float32": 1e-6, "bfloat16": 8e-3}


@np.errstate(all="ignore")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("spec", [P("a"), P(None, ("a", "b"))], ids=str)
@pytest.mark.pairwise(1)
def test_rows_of_every_kind(implementation, name, rng, nans_allowed, dtype, spec):
    """Each means the same on shares: with NaN, with nothing in them, with ties."""
    f = functools.partial(FUNCTIONS[name], implementation=implementation)
    x, t = rows_of_every_kind(rng, dtype)
    mesh = make_mesh()
    both = lambda x, t: (f(x), jax.vjp(f, x)[1](t)[0])
    args = put(mesh, spec, x, t)
    y, dx = compiled(mesh, both, *args, jit=exact_jit)(*args)
    value = getattr(oracle, name)(x)
    ordinary = np.isfinite(value) & (value != 0)
    np.testing.assert_array_equal(np.isnan(y), np.isnan(value))
    limit = 8 if dtype == "float32" else 1
    y = oracle._wide(y)
    assert oracle.ulps(y[ordinary], value[ordinary], dtype, flushed=N) <= limit
    # The gradient of the P that was rounded: of what the backward keeps.
    if name == "softmax":
        want = oracle.softmax_derivative(y, t)
    else:
        want = oracle.log_softmax_vjp(x, t)
    least = 1e-9 * 6  # of the cotangent: its mean is rounded to float64
    check(dx, want, dtype, GRADIENT_BAR[dtype], least)


@pytest.mark.parametrize("merge", [sharded.merge_sums, sharded.merge_excess])
def test_a_maximum_that_passes_nan_by(nans_allowed, merge):
    """As an all-reduce may: the row's sum still has it, and the row is NaN."""

    class PassesNanBy(Across):
        def sum(self, x):
            return jnp.sum(x, -1, keepdims=True)

        def max(self, x):
            return jnp.nanmax(x, -1, keepdims=True)

    row_max = jnp.array([[1.0, jnp.nan], [1.0, 2.0], [1.0, jnp.inf]])
    excess = jnp.array([[0.5, jnp.nan], [0.5, 0.5], [0.5, jnp.nan]])
    merged, total = merge((row_max, excess), PassesNanBy("devices"), 1.0)
    np.testing.assert_array_equal(merged, [[np.nan], [2.0], [np.inf]])
    np.testing.assert_array_equal(np.isnan(total), [[True], [False], [True]])


@pytest.mark.parametrize("scale", [1.0, 20.0, 60.0])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.pairwise(1)
def test_stress(implementation, name, rng, scale, offset):
    """Dominant entries and a common part of the cotangent, on 8 shares of a row."""
    f = functools.partial(FUNCTIONS[name], implementation=implementation)
    x = (scale * rng.normal(size=(256, N))).astype(np.float32)
    t = offset + rng.normal(size=x.shape)
    if name == "log_softmax":  # one-hot, as a cross-entropy's
        t = t * np.eye(N)[x.argmax(-1)] if offset else rng.normal(size=x.shape)
    t = t.astype(np.float32)
    mesh = make_mesh()
    args = put(mesh, P(None, ("b", "a")), x, t)
    g = lambda x, t: (
        f(x),
        jax.vjp(f, x)[1](t)[0],
        jax.jvp(f, (x,), (t,))[1],
    )
    y, dx, dy = compiled(mesh, g, *args, jit=exact_jit)(*args)
    want = getattr(oracle, name)(x)
    assert oracle.ulps(y, want, "float32", flushed=N) <= 8
    least = 1e-9 * float(np.abs(t).max())
    if name == "softmax":
        want = oracle.softmax_vjp(x, t)
        assert oracle.row_error(dx, want, "float32", least=least) <= 1e-6
        assert oracle.row_error(dy, want, "float32", least=least) <= 1e-6
    else:
        want = oracle.log_softmax_vjp(x, t)
        assert oracle.row_error(dx, want, "float32", least=least) <= 4e-6


# --- inside shard_map -----------------------------------------------------------------


def in_part(mesh, f, spec, **options):
    """`f` inside a shard_map over "a" alone; the rest of `spec` is for inside."""

    def each(x, v):
        if mesh.axis_types[1] == AxisType.Auto:
            here = NamedSharding(jax.sharding.get_abstract_mesh(), P(None, spec[1]))
            x, v = (lax.with_sharding_constraint(a, here) for a in (x, v))
        return f(x, v)

    return jax.shard_map(
        each, mesh=mesh, in_specs=P("a"), out_specs=P("a"), axis_names={"a"}, **options
    )


# Explicit axes inside a part are new in 0.10.2, where jax gathers results: of tanh too.
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("spec", [P("a", None), P("a", "b")], ids=str)
@pytest.mark.parametrize("kind", ["auto", "explicit"])
@pytest.mark.pairwise(1)
def test_part_of_a_mesh(implementation, name, operands, kind, spec, check_vma):
    """One axis is manual; the other is left to the compiler, or in the types."""
    if implementation == "opaque" and check_vma:
        pytest.skip("its interpreter's constants carry no mesh axes")
    f = functools.partial(FUNCTIONS[name], implementation=implementation)
    g = functools.partial(MODES["vjp"], f)
    mesh = make_mesh(kind)
    args = put(mesh, spec if kind == "explicit" else P("a"), *operands)
    program = compiled(mesh, in_part(mesh, g, spec, check_vma=check_vma), *args)
    found = hlo.total(hlo.collectives(program))
    if kind == "auto" or jax.__version_info__ >= (0, 11):
        assert set(found) == ({"all-reduce"} if spec[1] else set())
    if spec[1]:
        a_row = MOVED[name, "value"] + MOVED[name, "vjp"]
        assert found["all-reduce"] == ROWS // 4 * sum(a_row)
    chex.assert_trees_all_close(
        run(mesh, program, *args), on_one_device(name, "vjp"), atol=2e-6
    )


# --- a kernel for each share ----------------------------------------------------------


@pytest.fixture
def chosen(monkeypatch):
    """The choices that are made, in their order."""
    choices = []
    choose = dispatch.choose

    def recording(*args, **options):
        choices.append(choose(*args, **options))
        return choices[-1]

    monkeypatch.setattr(dispatch, "choose", recording)
    return choices


@pytest.mark.versions
@pytest.mark.parametrize("kind", list(KINDS))
def test_each_share_is_chosen_for(name, operands, kind, chosen):
    mesh = make_mesh(kind)
    (x,) = put(mesh, P("a", "b"), operands[0])
    compiled(mesh, functools.partial(FUNCTIONS[name], implementation="opaque"), x)
    call = chosen[-1].call
    assert (call.op, call.arrays[0].shape) == (
        "log_sum_exp_state",
        (ROWS // 4, N // 2),
    )
    assert chosen[-1].implementation == "opaque"


@pytest.fixture
def refusing(monkeypatch):
    """ "opaque" as the best on a CPU; it takes rows of N entries alone."""

    def refusal(call, device):
        n = call.arrays[0].shape[-1]
        return None if n == N else f"rows of {n} entries"

    jax.clear_caches()
    monkeypatch.setattr(opaque, "refusal", refusal)
    monkeypatch.setitem(row_call.ROWS.preferences, "cpu", ("opaque", "xla"))
    monkeypatch.setattr(dispatch, "_warned_of", set())
    yield
    jax.clear_caches()


def test_a_share_that_no_kernel_takes(name, operands, refusing):
    """It runs as XLA, with a warning; if the kernel was asked for, an error."""
    mesh, f = make_mesh(), FUNCTIONS[name]
    (x,) = put(mesh, P(None, "a"), operands[0])
    with pytest.warns(jaxsoftmax.PerformanceWarning, match="rows of 16 entries"):
        program = compiled(mesh, f, x)
    chex.assert_trees_all_close(program(x), f(operands[0]), atol=1e-6)
    asked = functools.partial(f, implementation="opaque")
    with pytest.raises(Exception, match=r"NotImplementedError: .*rows of 16 entries"):
        compiled(mesh, asked, x)
    jax.clear_caches()
    explicit = make_mesh("explicit")
    (x,) = put(explicit, P(None, "a"), operands[0])
    with pytest.raises(NotImplementedError, match="rows of 16 entries"):
        compiled(explicit, asked, x)


# --- what a kernel cannot follow ------------------------------------------------------


@pytest.mark.versions
def test_a_part_that_leaves_several_axes_to_the_compiler(name, operands, refusing):
    f = FUNCTIONS[name]
    mesh = jax.make_mesh((2, 2, 2), ("a", "b", "c"), axis_types=(AxisType.Auto,) * 3)

    def each(x):
        here = jax.sharding.get_abstract_mesh()
        spread = lax.with_sharding_constraint(x, NamedSharding(here, P("c", "b")))
        return f(spread), jax.grad(functools.partial(loss, f))(spread)

    part = jax.shard_map(
        each,
        mesh=mesh,
        in_specs=P("a"),
        out_specs=P("a"),
        axis_names={"a"},
        check_vma=False,
    )
    x = operands[0]
    with pytest.warns(jaxsoftmax.PerformanceWarning, match="axes 'b', 'c' are left to"):
        got = jax.jit(part)(x)
    want = jax.jit(lambda x: (f(x), jax.grad(functools.partial(loss, f))(x)))(x)
    chex.assert_trees_all_close(got, want, atol=1e-6)


def test_rows_on_some_of_the_devices_left_to_the_compiler(name, operands):
    """Inside a part of a mesh, XLA does not say which: gathered, with a warning."""
    f = FUNCTIONS[name]
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=KINDS["auto"])

    def each(x):
        here = jax.sharding.get_abstract_mesh()
        x = lax.with_sharding_constraint(x, NamedSharding(here, P(None, "b")))
        return f(x.reshape(-1, 2, N // 2)).reshape(x.shape)  # two halves, of two each

    options = {"axis_names": {"a"}, "check_vma": False}
    part = jax.shard_map(each, mesh=mesh, in_specs=P("a"), out_specs=P("a"), **options)
    with pytest.warns(jaxsoftmax.PerformanceWarning, match="split over 2 of 4 devices"):
        got = jax.jit(part)(operands[0])
    want = f(operands[0].reshape(-1, 2, N // 2)).reshape(ROWS, N)
    chex.assert_trees_all_close(got, want, atol=1e-6)


@pytest.mark.versions
@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_export(name, operands, refusing, kind):
    """A program that cannot ask how its arrays lie; with explicit axes it need not."""
    f, mesh = FUNCTIONS[name], make_mesh(kind)
    (x,) = put(mesh, P("a"), operands[0])
    with jax.set_mesh(mesh), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", jaxsoftmax.PerformanceWarning)
        exported = export.export(jax.jit(f))(x)
        got = jax.jit(exported.call)(x)
    messages = [str(w.message) for w in caught]
    assert len(messages) == (kind == "auto")
    assert all("an exported program cannot ask" in m for m in messages)
    chex.assert_trees_all_close(got, f(operands[0], implementation="xla"), atol=1e-6)


@pytest.mark.versions
def test_platforms_where_it_was_not_tried(name):
    """Plain operations, which any partitioner takes."""
    mesh = make_mesh()
    x = jax.ShapeDtypeStruct(
        (ROWS, N), jnp.float32, sharding=NamedSharding(mesh, P("a"))
    )
    text = {
        platform: jax.jit(FUNCTIONS[name])
        .trace(x)
        .lower(lowering_platforms=(platform,))
        .as_text()
        for platform in ("cpu", "tpu")
    }
    assert "CustomSPMDPartitioning" in text["cpu"]
    assert "CustomSPMDPartitioning" not in text["tpu"]


@pytest.mark.versions
def test_abstract_mesh(name):
    """A program may be lowered for devices that are not there."""
    mesh = AbstractMesh((16, 2), ("a", "b"))
    f = jax.jit(FUNCTIONS[name], in_shardings=NamedSharding(mesh, P("a")))
    x = jax.ShapeDtypeStruct((ROWS, N), jnp.float32)
    text = f.trace(x).lower(lowering_platforms=("cuda",)).as_text()
    assert "CustomSPMDPartitioning" in text


# --- explain --------------------------------------------------------------------------


@pytest.mark.versions
def test_explain(operands):
    """With explicit axes the shares are known, else that there will be some."""
    for kind, shape in (("auto", (ROWS, N)), ("explicit", (ROWS // 4, N))):
        mesh = make_mesh(kind)
        (x,) = put(mesh, P("a"), operands[0])
        with jax.set_mesh(mesh):
            explanation = jaxsoftmax.explain(softmax, x)
        (choice,) = explanation.choices
        assert choice.call.arrays[0].shape == shape
        assert choice.devices == (8 if kind == "auto" else 1)
        assert ("on 8 devices" in str(explanation)) == (kind == "auto")


# --- in a program ---------------------------------------------------------------------


def test_vocabulary_parallel_loss(implementation, rng):
    """W split over the vocabulary, tokens over the batch: logits are never gathered."""
    mesh = make_mesh()
    x = rng.normal(size=(32, 8)).astype(np.float32)
    w = rng.normal(size=(8, 96)).astype(np.float32)
    labels = rng.integers(0, 96, size=32)
    one_hot = np.eye(96, dtype=np.float32)[labels]

    def step(x, w, one_hot):
        def mean_loss(w):
            y = log_softmax(x @ w, implementation=implementation)
            return -jnp.sum(y * one_hot) / len(x)

        return jax.value_and_grad(mean_loss)(w)

    args = (
        *put(mesh, P("a"), x),
        *put(mesh, P(None, "b"), w),
        *put(mesh, P("a", "b"), one_hot),
    )
    program = compiled(mesh, step, *args)
    found = hlo.collectives(program)
    assert {each.kind for each in found} == {"all-reduce"}
    # The gradient of W, over the batch; the rest is numbers a row, and the loss.
    row_bytes = 32 // 4 * (4 + 8 + 16)
    assert (
        hlo.total(found)["all-reduce"] <= w.nbytes // 2 + row_bytes + 8
    )  # and the loss
    chex.assert_trees_all_close(program(*args), jax.jit(step)(x, w, one_hot), atol=1e-6)


@pytest.mark.versions
def test_calls_that_differ_have_other_keys_in_the_compilation_cache():
    """Where jax leaves the address of the call's object out of the key."""
    mesh = make_mesh("auto")
    (x,) = put(mesh, P("a"), np.ones((8, 8), np.float32))
    labels = jnp.zeros(8, int)

    def key(f, **options):
        text = jax.jit(lambda x: f(x, **options)).lower(x).as_text()
        assert "@CustomSPMDPartitioning" in text
        return re.sub(r'backend_config = "\d+"', "", text)

    def nll(x, **options):
        return jaxsoftmax.softmax_cross_entropy_with_integer_labels(
            x, labels, **options
        )

    for f in (softmax, log_softmax, nll):
        others = [{}, {"scale": 3.0}, {"axis": 0}, {"implementation": "xla"}]
        keys = [key(f, **options) for options in others]
        assert len(set(keys)) == len(others)
        assert keys == [key(f, **options) for options in others]
    assert key(nll) != key(nll, logits_soft_cap=2.0) != key(nll, logits_soft_cap=3.0)


def test_the_example_in_the_docs():
    page = pathlib.Path(__file__).parents[2] / "docs" / "many_devices.md"
    code = page.read_text().split("```python")[1].split("```")[0]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert ran.stdout.split("\n")[1] == "0"
    assert "'data', 'vocab'" in ran.stdout


# --- cross-entropy --------------------------------------------------------------------

LABELS = np.random.default_rng(1).integers(0, N, ROWS).astype(np.int32)
LABELS[3] = -100
WEIGHTS = np.random.default_rng(2).normal(size=ROWS).astype(np.float32)
EVERY = {"label_smoothing": 0.1, "z_loss": 1e-2, "logits_soft_cap": 6.0, "scale": 0.7}


def loss_mean(x, y, w, **options):
    """In one pass."""
    f = functools.partial(
        jaxsoftmax.softmax_cross_entropy_with_integer_labels,
        ignore_index=-100,
        reduction="mean",
        **EVERY,
        **options,
    )
    return jax.value_and_grad(f)(x, y)


def loss_each(x, y, w, **options):
    f = functools.partial(
        jaxsoftmax.softmax_cross_entropy_with_integer_labels,
        ignore_index=-100,
        **options,
    )
    value, pull = jax.vjp(lambda x: f(x, y), x)
    return value, pull(w)[0]


def loss_hvp(x, y, w, **options):
    gradient = lambda x: loss_mean(x, y, w, **options)[1]
    return jax.jvp(gradient, (x,), (jnp.sin(x),))[1]


def loss_statistics(x, y, w, **options):
    f = functools.partial(jaxsoftmax.token_logprobs_and_entropy, **options)
    value, pull = jax.vjp(lambda x: f(x, jnp.maximum(y, 0)), x)
    return value, pull(value)[0]


def loss_alternatives(x, y, w, **options):
    """Of two labels per row, of which one may be in another device's share."""
    f = functools.partial(jaxsoftmax.token_logprobs_and_entropy, **options)
    labels = jnp.stack([y, (y + N // 2) % N], -1)
    value, pull = jax.vjp(lambda x: f(x, labels, ignore_index=-100).logprobs, x)
    return value, pull(w[:, None] * jnp.array([1.0, -2.0])[None])[0]


def loss_dense(x, y, w, **options):
    f = functools.partial(jaxsoftmax.softmax_cross_entropy, **EVERY, **options)
    labels = jnp.abs(x) / 40
    return jax.value_and_grad(lambda x, t: jnp.sum(f(x, t) * w), (0, 1))(x, labels)


def log_sum_exp(x, y, w, **options):
    f = functools.partial(jaxsoftmax.logsumexp, axis=-1, **options)
    value, pull = jax.vjp(f, x)
    return value, pull(w)[0], jax.jvp(f, (x,), (jnp.sin(x),))[1]


def log_sum_exp_hvp(x, y, w, **options):
    f = functools.partial(jaxsoftmax.logsumexp, axis=-1, **options)
    gradient = jax.grad(lambda x: jnp.sum(f(x) * w))
    return jax.jvp(gradient, (x,), (jnp.sin(x),))[1]


def signed_log_sum_exp(x, y, w, **options):
    """With weights of both signs, a mask, and the gradients of both arrays."""

    def f(x, b):
        where = b > -1.5
        return jaxsoftmax.logsumexp(x, -1, b, where=where, return_sign=True, **options)

    value, pull, sign = jax.vjp(f, x, 0.5 + jnp.cos(x), has_aux=True)
    return value, sign, pull(w)


# By their most bytes of all-reduces a row that devices share.
LOSSES = {
    log_sum_exp: 28,  # twice the maximum and the sum in two parts; the tangent
    log_sum_exp_hvp: 48,
    signed_log_sum_exp: 12,
    loss_each: 16,  # the maximum; the sum in two parts and the label's logit
    loss_mean: 24,
    loss_hvp: 48,
    loss_statistics: 20,
    loss_alternatives: 36,  # the labels' logits, forward and backward
    loss_dense: 32,  # the sum of the gradient, besides
}
SCALARS = 16  # bytes: a loss, a count


@functools.cache
def loss_on_one_device(mode):
    return jax.device_get(
        jax.jit(functools.partial(mode, implementation="xla"))(
            OPERANDS[0], LABELS, WEIGHTS
        )
    )


@pytest.mark.parametrize("mode", LOSSES, ids=lambda mode: mode.__name__)
@pytest.mark.parametrize(
    ("implementation", "kind", "spec"),
    [
        ("opaque", "auto", P("a")),
        ("opaque", "auto", P("a", "b")),
        ("opaque", "auto", P(None, ("a", "b"))),
        ("opaque", "explicit", P(("a", "b"))),
        ("opaque", "explicit", P("a", "b")),
        ("xla", "auto", P("b", "a")),
    ],
    ids=str,
)
@pytest.mark.pairwise(1)
def test_cross_entropy_moves_numbers_of_rows_alone(implementation, kind, spec, mode):
    mesh = make_mesh(kind)
    args = (
        *put(mesh, spec, OPERANDS[0]),
        *put(mesh, P(spec[0]), LABELS, WEIGHTS),
    )
    program = compiled(
        mesh, functools.partial(mode, implementation=implementation), *args
    )
    moved = hlo.total(hlo.collectives(program))
    assert set(moved) <= {"all-reduce"}
    rows, columns = size_on_a_device(spec, mesh)
    shared = LOSSES[mode] * rows if columns < N else 0
    assert moved.get("all-reduce", 0) <= shared + SCALARS
    chex.assert_trees_all_close(
        run(mesh, program, *args), loss_on_one_device(mode), atol=4e-6, rtol=4e-6
    )


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", ["auto", "explicit"])
@pytest.mark.pairwise(1)
def test_each_share_is_overwritten(kind, overwrite, chosen):
    """The kernel that a device runs is asked for it; what it computes is the same."""
    mesh = make_mesh(kind)
    args = (
        *put(mesh, P("a"), OPERANDS[0]),
        *put(mesh, P("a"), LABELS, WEIGHTS),
    )
    step = functools.partial(
        loss_mean, implementation="opaque", overwrite_logits=overwrite
    )
    program = compiled(mesh, step, *args)
    call = chosen[-1].call
    assert (call.op, call.arrays[0].shape) == (
        "cross_entropy_with_gradient",
        (ROWS // 4, N),
    )
    assert call.options.in_place == overwrite
    chex.assert_trees_all_close(
        run(mesh, program, *args), loss_on_one_device(loss_mean), atol=4e-6, rtol=4e-6
    )


def test_a_label_is_found_in_shares_of_several_dimensions(rng):
    """A flat index over two axes, both of them split."""
    x = rng.normal(size=(4, 6, 8)).astype(np.float32)
    y = rng.integers(0, 48, 4).astype(np.int32)
    y[0], y[1] = 47, 6
    mesh = make_mesh()
    f = functools.partial(
        jaxsoftmax.softmax_cross_entropy_with_integer_labels,
        axis=(1, 2),
        implementation="opaque",
    )

    def both(x, y):
        return f(x, y), jax.grad(lambda x: jnp.sum(jnp.sin(f(x, y))))(x)

    args = (*put(mesh, P(None, "b", "a"), x), y)
    program = compiled(mesh, both, *args)
    assert set(hlo.total(hlo.collectives(program))) == {"all-reduce"}
    flat = functools.partial(
        jaxsoftmax.softmax_cross_entropy_with_integer_labels, implementation="xla"
    )
    want = flat(x.reshape(4, 48), y)
    slope = jax.grad(lambda x: jnp.sum(jnp.sin(flat(x, y))))(x.reshape(4, 48))
    got = run(mesh, program, *args)
    chex.assert_trees_all_close(got, (want, slope.reshape(x.shape)), atol=2e-6)


def test_a_dimension_of_one_example_on_an_explicit_axis():
    """A number a row keeps it: only what was reduced may be left out and put back."""
    mesh = make_mesh("explicit", (8, 1))
    x = np.random.default_rng(0).normal(size=(16, 8, 1)).astype(np.float32)
    y = np.zeros((8, 1), np.int32)
    f = functools.partial(
        jaxsoftmax.softmax_cross_entropy_with_integer_labels,
        axis=0,
        label_smoothing=0.1,
        z_loss=1e-3,
    )
    gradient = jax.jit(jax.grad(lambda x, y: jnp.sum(jnp.sin(f(x, y)))))
    args = (*put(mesh, P(None, "a", "b"), x), *put(mesh, P("a", "b"), y))
    got = run(mesh, gradient, *args)
    assert got.sharding.spec == P(None, "a", "b")
    chex.assert_trees_all_close(got, gradient(x, y), atol=1e-6)
