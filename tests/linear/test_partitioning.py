"""Linear + cross-entropy on several devices: the values of one, and what is moved.

The devices are simulated. The plain form, x @ weights and a log-sum-exp, is the
reference; where a gradient must be added up it is also that for what is moved.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from support import hlo
from support.loss_cases import plain_linear_loss as plain
from support.meshes import compiled, make_mesh, run

from jaxsoftmax import linear_softmax_cross_entropy, linear_token_logprobs_and_entropy
from jaxsoftmax._linear import plan as plans
from jaxsoftmax._linear.plan import LinearPlan, filled_classes, token_chunks

pytestmark = pytest.mark.skipif(
    jax.device_count() < 8, reason="needs 8 devices, simulated or not"
)

# Rows are filled up from 1,040 to 1,152.
TOKENS, H, V, FILLED = (16, 64), 16, 1040, 1152
COUNT = math.prod(TOKENS)
# Several groups of tokens, of several chunks; and several chunks of classes.
SMALL = 2_080_000

_rng = np.random.default_rng(0)
X = _rng.normal(size=(*TOKENS, H)).astype(np.float32)
WEIGHTS = (_rng.normal(size=(H, V)) / 4).astype(np.float32)
BIAS = _rng.normal(size=V).astype(np.float32)
LABELS = _rng.integers(0, V, TOKENS).astype(np.int32)
LABELS[0, :5] = LABELS[7] = -100
CT = _rng.normal(size=TOKENS).astype(np.float32)
ARRAYS = (X, WEIGHTS, BIAS)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Few tokens in pieces, as many are."""
    monkeypatch.setattr(plans, "_LEAST_PIECE", 256)


# How x, labels, weights and bias lie on axes "a" of 4 devices and "b" of 2.
PLACES = {
    "tokens": (P("a"), P("a"), P(), P()),
    "tokens, second": (P(None, "a"), P(None, "a"), P(), P()),
    "tokens, both": (P("a", "b"), P("a", "b"), P(), P()),
    "tokens, 8": (P(("a", "b")), P(("a", "b")), P(), P()),
    "classes": (P(), P(), P(None, "a"), P("a")),
    "classes, 8": (P(), P(), P(None, ("a", "b")), P(("a", "b"))),
    "hidden": (P(None, None, "a"), P(), P("a"), P()),
    "tokens, classes": (P("a"), P("a"), P(None, "b"), P("b")),
    "fsdp": (P("a"), P("a"), P("a"), P()),
    "fsdp, classes": (P("a"), P("a"), P("a", "b"), P("b")),
}


def spread(mesh, place, *, vocab_first=False):
    """x, labels, weights, bias and a cotangent of losses on a mesh."""
    x_spec, labels_spec, weights_spec, bias_spec = PLACES[place]
    weights = WEIGHTS
    if vocab_first:
        weights, weights_spec = WEIGHTS.T, P(*(*weights_spec, None, None)[1::-1])
    arrays = (X, LABELS, weights, BIAS, CT)
    specs = (x_spec, labels_spec, weights_spec, bias_spec, labels_spec)
    return tuple(
        jax.device_put(a, NamedSharding(mesh, spec))
        for a, spec in zip(arrays, specs, strict=True)
    )


def loss(x, labels, weights, bias, reduction, **options):
    return linear_softmax_cross_entropy(
        x,
        labels,
        weights,
        bias=bias,
        ignore_index=-100,
        reduction=reduction,
        **options,
    )


def value_and_gradients(f, x, labels, weights, bias, ct):
    value, pull = jax.vjp(lambda *a: f(a[0], labels, *a[1:]), x, weights, bias)
    return value, pull(ct if value.ndim else jnp.ones_like(value))


def derivatives(f, x, labels, weights, bias, ct):
    """A tangent, and what a Hessian makes of it."""

    def total(*arrays):
        each = f(arrays[0], labels, *arrays[1:])
        return jnp.sum(jnp.sin(each) * ct) if each.ndim else each

    arrays = (x, weights, bias)
    dots = jax.tree.map(jnp.sin, arrays)
    return jax.jvp(jax.value_and_grad(total, (0, 1, 2)), arrays, dots)[1]


@functools.cache
def on_one_device(mode, reduction):
    f = functools.partial(plain, reduction=reduction)
    return jax.device_get(
        jax.jit(functools.partial(mode, f))(X, LABELS, WEIGHTS, BIAS, CT)
    )


def check(got, want, tolerance=4e-6):
    """Relative to the largest entry of each array."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a = a.T if a.shape != b.shape else a
        np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max(), rtol=0)


def sizes_of_kind(found, kind):
    return [each.nbytes for each in found if each.kind == kind]


# Bytes of the gradients of weights and bias, filled up, on one device.
GRADIENT = 4 * FILLED * (H + 1)
SCALARS = 32
PER_TOKEN = 4 * 3  # the sum in two parts and the label's logit; or the maximum


def check_moved(place, reduction, found):
    """Nothing but what must be."""
    reduced, gathered = (
        sizes_of_kind(found, "all-reduce"),
        sizes_of_kind(found, "all-gather"),
    )
    kinds = {each.kind for each in found}
    if place == "hidden":
        assert kinds == {"all-reduce"}  # of logits: x and weights are not whole
    elif place.startswith("tokens") and "classes" not in place:
        assert kinds == {"all-reduce"}
        assert max(reduced) <= GRADIENT + SCALARS
        # One; XLA for CPUs adds up over each axis of the mesh on its own.
        large = [n for n in reduced if n > SCALARS]
        assert len(large) == (2 if "both" in place else 1)
    elif place.startswith("classes"):
        assert kinds == {"all-reduce"}
        # Two of statistics, of all tokens or of a chunk, and the gradient of x.
        *statistics, x_gradient = sorted(reduced)
        assert len(statistics) == 2
        assert max(statistics) <= PER_TOKEN * COUNT
        assert x_gradient <= 4 * H * COUNT
    else:
        assert kinds <= {"all-reduce", "all-gather"}
        share = 4 * COUNT // 4 * H
        class_parts = 2 if "classes" in place else 1
        assert max(reduced) <= max(share, GRADIENT // class_parts + SCALARS)
        if "fsdp" in place:
            # The weights, for each product with them, and nothing of tokens.
            assert len(gathered) <= (2 if reduction == "mean" else 3)
            assert max(gathered) <= 4 * H * FILLED // class_parts
        else:
            assert not gathered


def cases():
    """(place, kind, reduction, vocab_first, budget)."""
    for place, reduction in itertools.product(PLACES, ["mean", "none"]):
        # A chunk of a small budget has fewer than 8 of a batch.
        budget = None if "tokens, 8" in place else SMALL
        yield place, "auto", reduction, True, budget
        yield place, "explicit", reduction, False, budget
        if place in ("tokens, both", "classes", "fsdp, classes"):
            yield place, "auto", reduction, False, None
            yield place, "mixed", reduction, True, SMALL


@pytest.mark.parametrize(
    ("place", "kind", "reduction", "vocab_first", "budget"),
    list(cases()),
    ids=str,
)
@pytest.mark.pairwise(1)
def test_values_and_what_is_moved(place, kind, reduction, vocab_first, budget):
    mesh = make_mesh(kind)
    args = spread(mesh, place, vocab_first=vocab_first)
    f = functools.partial(
        loss,
        reduction=reduction,
        vocab_axis=0 if vocab_first else 1,
        memory_budget=budget,
    )
    program = compiled(mesh, functools.partial(value_and_gradients, f), *args)
    check_moved(place, reduction, hlo.collectives(program))
    got = run(mesh, program, *args)
    check(got, on_one_device(value_and_gradients, reduction))
    if kind == "explicit":
        for gradient, array in zip(got[1], (args[0], *args[2:4]), strict=True):
            assert gradient.sharding.is_equivalent_to(array.sharding, array.ndim)


@pytest.mark.parametrize("kind", ["auto", "explicit"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.pairwise(1)
def test_kernels_run_on_shares(kind, reduction):
    """Of a kernel that XLA cannot partition: by its own rule, in each chunk."""
    mesh = make_mesh(kind)
    args = spread(mesh, "tokens, classes")
    f = functools.partial(loss, reduction=reduction, implementation="opaque")
    program = compiled(mesh, functools.partial(value_and_gradients, f), *args)
    assert {each.kind for each in hlo.collectives(program)} == {"all-reduce"}
    check(run(mesh, program, *args), on_one_device(value_and_gradients, reduction))


@pytest.mark.parametrize(
    ("place", "kind", "reduction"),
    [
        ("tokens, classes", "auto", "mean"),
        pytest.param("tokens, both", "explicit", "none", marks=pytest.mark.slow),
        pytest.param("tokens, both", "auto", "mean", marks=pytest.mark.slow),
    ],
)
def test_other_derivatives(place, kind, reduction):
    mesh = make_mesh(kind)
    args = spread(mesh, place)
    f = functools.partial(loss, reduction=reduction, memory_budget=SMALL)
    program = compiled(mesh, functools.partial(derivatives, f), *args)
    assert {each.kind for each in hlo.collectives(program)} == {"all-reduce"}
    got = run(mesh, program, *args)
    check(got, on_one_device(derivatives, reduction), 2e-5)


def everything(x, labels, weights, bias, ct, where, scale, class_weights):
    """All that a token and a class may have, and all results."""
    layer = {"bias": bias, "where": where, "scale": scale}

    def total(x, weights, bias, scale):
        layer.update(bias=bias, scale=scale)
        each, lse = linear_softmax_cross_entropy(
            x,
            labels,
            weights,
            **layer,
            ignore_index=-100,
            class_weights=class_weights,
            label_smoothing=0.1,
            z_loss=1e-2,
            logits_soft_cap=6.0,
            return_lse=True,
            reduction="mean",
        )
        found = linear_token_logprobs_and_entropy(
            x, jnp.maximum(labels, 0), weights, **layer
        )
        finite = jnp.where(where, lse, 0)
        return each + jnp.sum((finite + found.entropy + found.logprobs) * ct)

    arrays = (x, weights, bias, scale)
    return jax.value_and_grad(total, (0, 1, 2, 3))(*arrays)


@pytest.mark.parametrize(
    "kind", ["auto", pytest.param("explicit", marks=pytest.mark.slow)]
)
def test_everything_that_a_token_may_have(kind):
    rng = np.random.default_rng(1)
    per_token = (
        rng.random(TOKENS) < 0.7,
        rng.uniform(0.5, 2, TOKENS).astype(np.float32),
    )
    class_weights = rng.uniform(0.5, 2, V).astype(np.float32)
    want = jax.jit(everything)(X, LABELS, WEIGHTS, BIAS, CT, *per_token, class_weights)
    mesh = make_mesh(kind)
    put = lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec))
    args = (
        *spread(mesh, "tokens, classes"),
        *(put(a, P("a")) for a in per_token),
        put(class_weights, P("b")),
    )
    program = compiled(mesh, everything, *args)
    found = hlo.collectives(program)
    assert {each.kind for each in found} <= {"all-reduce", "all-gather"}
    assert (
        max(sizes_of_kind(found, "all-gather"), default=0) <= 4 * V
    )  # the class weights
    check(run(mesh, program, *args), want, 1e-5)


def soft_and_several(x, labels, weights, bias, ct, targets, own):
    """A loss with a weight for each class, one of two labels, and their costs."""
    several = jnp.stack([labels, (labels + V // 2) % V], -1)

    def total(x, weights, bias):
        f = functools.partial(
            linear_softmax_cross_entropy, bias=bias, memory_budget=SMALL
        )
        soft = f(x, targets, weights, reduction="mean")
        weighed = f(x, several, weights, label_weights=own, ignore_index=-100)
        found = linear_token_logprobs_and_entropy(
            x, several, weights, bias=bias, ignore_index=-100, memory_budget=SMALL
        )
        return soft + jnp.sum((weighed + jnp.sum(found.logprobs, -1)) * ct)

    return jax.value_and_grad(total, (0, 1, 2))(x, weights, bias)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_soft_targets_and_several_labels(kind):
    """Neither logits nor targets are moved; of the labels, numbers per token."""
    rng = np.random.default_rng(1)
    targets = rng.random((*TOKENS, V)).astype(np.float32)
    own = rng.normal(size=(*TOKENS, 2)).astype(np.float32)
    arrays = (X, LABELS, WEIGHTS, BIAS, CT, targets, own)
    want = jax.jit(soft_and_several)(*arrays)
    mesh = make_mesh(kind)
    put = lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec))
    args = (
        *spread(mesh, "tokens, classes"),
        put(targets, P("a", None, "b")),
        put(own, P("a")),
    )
    program = compiled(mesh, soft_and_several, *args)
    found = hlo.collectives(program)
    assert {each.kind for each in found} <= {"all-reduce", "all-gather"}
    assert max(sizes_of_kind(found, "all-gather"), default=0) <= 4 * V
    check(run(mesh, program, *args), want, 1e-5)


# --- inside shard_map -----------------------------------------------------------------

MANUAL = (P("a", "b"), P("a", "b"), P(), P())


def mean_within(f, x, labels, weights, bias):
    """The mean of what each device has."""
    return lax.pmean(jnp.sum(f(x, labels, weights, bias)), ("a", "b"))


def gradients_within(f, x, labels, weights, bias):
    """Taken on each device; what is of the layer is added up there."""
    mean = lambda x, w, b: mean_within(f, x, labels, w, b)
    return jax.value_and_grad(mean, (0, 1, 2))(x, weights, bias)


def gradients_around(mesh, check_vma, f, x, labels, weights, bias):
    """Taken of the mapped function."""
    within = functools.partial(mean_within, f)
    options = {"out_specs": P(), "check_vma": check_vma}
    mapped = jax.shard_map(within, mesh=mesh, in_specs=MANUAL, **options)
    mean = lambda x, w, b: mapped(x, labels, w, b)
    return jax.value_and_grad(mean, (0, 1, 2))(x, weights, bias)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("where", ["within", "around", "around, unchecked"])
@pytest.mark.pairwise(1)
def test_inside_shard_map(where, reduction):
    """As of the plain form: the same values, and the same is moved, once."""
    mesh = make_mesh()
    budget = SMALL // 8

    def of(f):
        if where == "within":
            return jax.shard_map(
                functools.partial(gradients_within, f),
                mesh=mesh,
                in_specs=MANUAL,
                out_specs=(P(), (P("a", "b"), P(), P())),
            )
        return functools.partial(gradients_around, mesh, where == "around", f)

    ours = functools.partial(loss, reduction=reduction, memory_budget=budget)
    args = spread(mesh, "tokens, both")[:4]
    programs = [
        compiled(mesh, of(f), *args)
        for f in (ours, functools.partial(plain, reduction=reduction))
    ]
    moved, want = (hlo.total(hlo.collectives(program)) for program in programs)
    assert moved == want
    assert moved["all-reduce"] <= 4 * V * (H + 1) + SCALARS
    check(programs[0](*args), programs[1](*args))


@pytest.mark.versions
@pytest.mark.parametrize("reduction", ["mean"])
def test_inside_shard_map_over_part_of_a_mesh(reduction):
    """Tokens over a manual axis; classes over one that is left to XLA."""
    mesh = make_mesh()

    def within(f, x, labels, weights, bias):
        here = jax.sharding.get_abstract_mesh()
        place = lambda a, spec: lax.with_sharding_constraint(
            a, NamedSharding(here, spec)
        )
        weights, bias = place(weights, P(None, "b")), place(bias, P("b"))
        mean = lambda x, w, b: lax.pmean(jnp.sum(f(x, labels, w, b)), "a")
        return jax.value_and_grad(mean, (0, 1, 2))(x, weights, bias)

    def of(f):
        return jax.shard_map(
            functools.partial(within, f),
            mesh=mesh,
            in_specs=(P("a"), P("a"), P(), P()),
            out_specs=(P(), (P("a"), P(), P())),
            axis_names={"a"},
        )

    args = spread(mesh, "tokens, classes")[:4]
    ours = functools.partial(loss, reduction=reduction, memory_budget=SMALL // 4)
    program = compiled(mesh, of(ours), *args)
    found = hlo.collectives(program)
    assert {each.kind for each in found} == {"all-reduce"}
    assert max(each.nbytes for each in found) <= GRADIENT // 2 + SCALARS
    want = jax.jit(of(functools.partial(plain, reduction=reduction)))(*args)
    check(program(*args), want)


# --- under vmap -----------------------------------------------------------------------


@pytest.mark.versions
@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_a_mapped_axis_that_devices_share(kind):
    """The mean of each example on its own; the gradient of weights is added up once."""
    mesh = make_mesh(kind)
    args = spread(mesh, "tokens, classes")

    def step(f, x, labels, weights, bias, ct):
        each = jax.vmap(lambda x, y, w, b: f(x, y, w, b, "mean"), (0, 0, None, None))
        total = lambda x, w, b: jnp.sum(each(x, labels, w, b) * ct[:, 0])
        return jax.value_and_grad(total, (0, 1, 2))(x, weights, bias)

    program = compiled(mesh, functools.partial(step, loss), *args)
    check_moved("tokens, classes", "none", hlo.collectives(program))
    want = jax.jit(functools.partial(step, plain))(X, LABELS, WEIGHTS, BIAS, CT)
    check(run(mesh, program, *args), want)


# --- how dimensions are split ---------------------------------------------------------


def test_the_budget_here_asks_for_chunks_of_each_kind():
    dtype = np.dtype(np.float32)
    plan = LinearPlan(TOKENS, H, V, dtype, dtype, SMALL)
    split, (pieces, classes) = plan.gradient, plan.recomputed
    assert 1 < split.groups < split.chunks.count
    assert min(pieces.count, classes.count) > 1
    assert plan.forward[1].count > 1


@pytest.mark.parametrize(
    ("shape", "most", "sizes"),
    [
        ((8192,), 600, (512,)),
        ((64, 4096), 256, (16, 16)),  # not (64, 4)
        ((4, 4096), 128, (4, 32)),
        ((16, 128), 32, (8, 4)),
        ((1000,), 150, (100,)),  # 4 devices can share it, not (125,)
        ((6, 6), 7, (2, 2)),
    ],
)
def test_chunks_per_token_that_devices_share(shape, most, sizes):
    assert token_chunks(shape, most).sizes == sizes


def test_a_vocabulary_is_filled_up_in_parts():
    """Each device fills its own: 16 could share these."""
    filling = filled_classes(48, 64)
    classes = np.arange(48, dtype=np.float32)
    filled = filling.fill(classes[None], 1)
    parts = np.concatenate([classes.reshape(16, 3), np.zeros((16, 1))], 1)
    np.testing.assert_array_equal(filled, parts.reshape(1, 64))
    np.testing.assert_array_equal(filling.strip(filled, 1), classes[None])
    np.testing.assert_array_equal(filling.is_class(), np.arange(64) % 4 != 3)
    places = filling.place(jnp.array([-3, 0, 2, 3, 47]))
    np.testing.assert_array_equal(places, [-3, 0, 2, 4, 62])
    assert filled_classes(64, 64).full
    # One that no number of devices shares is filled up at its end.
    whole = filled_classes(51, 64)
    np.testing.assert_array_equal(whole.fill(np.ones(51), 0), np.arange(64) < 51)
    assert whole.place(jnp.int32(50)) == 50
