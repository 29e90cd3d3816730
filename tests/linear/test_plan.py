"""The chunks of the linear loss: a table that pins how they were tuned."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from jaxsoftmax._linear.plan import LinearPlan, default_budget, least_budget

F32 = np.dtype(np.float32)

# A call: tokens, features, classes, dtype of the products, budget (None for the
# default), whether the gradient of the weights is wanted. Its plan, as `shown`.
CASES = [
    (
        ((8192,), 1024, 131072, "float32", None, True),
        "2048 by 1, 1024; 131072; yes, 8 x 1 of 1024; 1024, 5 of 16 x 1664; 8388608",
    ),
    (
        ((8192,), 512, 32000, "float32", None, True),
        "4096 by 1, 2048; 32000; yes, 4 x 1 of 2048; 1024, 2 of 16 x 1024; 8388608",
    ),
    (
        ((8192,), 1024, 131072, "float32", 67108864, True),
        "8192 by 64, 64; 131072; no, 128 x 1 of 64; 1024, 74 of 16 x 112; 8388608",
    ),
    (
        ((8192,), 1024, 131072, "bfloat16", None, True),
        "2048 by 1, 1024; 131072; yes, 4 x 2 of 1024; 1024, 3 of 16 x 2752; 6291456",
    ),
    (
        ((8192,), 4096, 128256, "bfloat16", None, True),
        "8192 by 1, 4096; 128256; yes, 1 x 4 of 2048; 1024, 1 of 16 x 8016; 6291456",
    ),
    (
        ((8192,), 4096, 128256, "bfloat16", 450000000, True),
        "8192 by 10, 256; 128256; no, 8 x 4 of 256; 1024, 6 of 16 x 1344; 6291456",
    ),
    (
        ((8192,), 4096, 128256, "bfloat16", 67108864, True),
        "8192 by 63, 64; 128256; no, 64 x 2 of 64; 4096, 63 of 16 x 128; 6291456",
    ),
    (
        ((8192,), 4096, 128256, "bfloat16", None, False),
        "8192 by 1, 4096; 128256; yes, 4 x 1 of 2048; 1024, 1 of 16 x 8016; 6291456",
    ),
    (
        ((4, 2048), 1024, 50257, "float32", None, True),
        "4x512 by 1, 4x256; 50304; yes, 4 x 2 of 4x256; 4x256, 3 of 1 x 17408; 8388608",
    ),
    (
        ((4, 2048), 1024, 50257, "bfloat16", 67108864, True),
        "4x2048 by 25, 4x32; 50304; no, 32 x 2 of 4x32; 4x1024, 25 of 1 x 2048; "
        "6291456",
    ),
    (
        ((1009,), 512, 32000, "float32", 16777216, True),
        "1009 by 8, 64; 32000; no, 16 x 1 of 64; 1009, 16 of 16 x 128; 1033216",
    ),
    (
        ((16, 4096), 2048, 151936, "bfloat16", None, True),
        "16x256 by 1, 16x128; 151936; yes, 16 x 2 of 16x128; 16x512, 11 of 16 x 896; "
        "50331648",
    ),
    (
        ((64, 512), 768, 1000, "float32", 16777216, True),
        "64x64 by 1, 64x32; 1000; yes, 16 x 1 of 64x32; 64x64, 8 of 8 x 16; 33554432",
    ),
    (
        ((16, 1024), 768, 50304, "bfloat16", None, True),
        "16x128 by 1, 16x64; 50304; yes, 4 x 4 of 16x64; 16x128, 4 of 16 x 832; "
        "12582912",
    ),
    (
        ((6, 35), 64, 300, "float32", 100000, True),
        "2x35 by 3, 6x5; 300; yes, 7 x 1 of 6x5; 6x35, 3 of 4 x 32; 215040",
    ),
    (
        ((), 64, 50000, "float32", None, True),
        "1 by 1, 1; 50048; yes, 1 x 1 of 1; 1, 1 of 16 x 3125; 200000",
    ),
    (
        ((1,), 64, 1300, "float16", 5200, True),
        "1 by 1, 1; 1408; yes, 1 x 1 of 1; 1, 2 of 4 x 192; 5200",
    ),
]


def by(sizes):
    return "x".join(map(str, sizes)) or "1"


def shown(plan):
    """The plan in one line.

    - tokens of a chunk of the statistics, by so many chunks of classes; of their
      tangents;
    - classes with padding;
    - whether the forward may compute gradients, and then: groups x chunks of a group,
      of so many tokens;
    - where logits are computed again: tokens of a piece, and the chunks of classes, of
      so many parts x classes of a part;
    - the least budget.
    """
    split, (pieces, classes) = plan.gradient, plan.recomputed
    chunks, parts = plan.forward
    per_group = split.chunks.count // split.groups
    count = math.prod(plan.tokens)
    return "; ".join(
        [
            f"{by(chunks.sizes)} by {parts.count}, {by(plan.pushforward.sizes)}",
            f"{plan.filled.folds * plan.filled.filled}",
            f"{'yes' if plan.gradients_fit else 'no'}, {split.groups} x {per_group} "
            f"of {by(split.chunks.sizes)}",
            f"{by(pieces.sizes)}, {classes.count} of {classes.folds} x {classes.width}",
            f"{least_budget(count, plan.vocabulary, plan.operands, plan.working)}",
        ]
    )


@pytest.mark.parametrize(("call", "want"), CASES, ids=str)
def test_plan(call, want):
    tokens, hidden, vocabulary, dtype, budget, weights_wanted = call
    budget = budget or default_budget(hidden * vocabulary, "mean")
    dtype = np.dtype(jnp.dtype(dtype))
    plan = LinearPlan(tokens, hidden, vocabulary, dtype, F32, budget, weights_wanted)
    assert shown(plan) == want


# Tokens, features, classes. Groups x chunks of a group, of so many tokens; and bytes of
# both arrays of logits, for each entry of the weights.
ON_GPU = [
    ((8192, 4096, 128256), "1 x 4 of 2048", 6.0),
    ((32768, 4096, 128256), "2 x 8 of 2048", 10.0),
    ((16384, 2048, 151936), "2 x 8 of 1024", 10.0),
    ((8192, 2048, 128256), "1 x 8 of 1024", 10.0),
    ((16384, 768, 50304), "1 x 8 of 2048", 53.3),
]


@pytest.mark.parametrize(("shape", "want", "per_weight"), ON_GPU, ids=str)
def test_default_on_a_gpu(shape, want, per_weight, monkeypatch):
    """Few groups: the weights' gradient is added up in float32 for each."""
    tokens, hidden, vocabulary = shape
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    budget = default_budget(hidden * vocabulary, "mean")
    bf16 = np.dtype(jnp.bfloat16)
    split = LinearPlan((tokens,), hidden, vocabulary, bf16, F32, budget).gradient
    size = math.prod(split.chunks.sizes)
    per_group = split.chunks.count // split.groups
    assert f"{split.groups} x {per_group} of {size}" == want
    taken = (4 + 2 * per_group) * size * vocabulary
    assert taken <= budget
    assert taken / (hidden * vocabulary) == pytest.approx(per_weight, abs=0.05)


@pytest.mark.parametrize("call", [call for call, _ in CASES], ids=str)
def test_plan_is_within_the_budget(call):
    """The arrays in memory at a time, unless one token's take more."""
    tokens, hidden, vocabulary, dtype, budget, weights_wanted = call
    dtype = np.dtype(jnp.dtype(dtype))
    count = math.prod(tokens)
    least = least_budget(count, vocabulary, dtype, F32)
    budget = max(budget or default_budget(hidden * vocabulary, "mean"), least)
    plan = LinearPlan(tokens, hidden, vocabulary, dtype, F32, budget, weights_wanted)
    most = max(budget, 8 * vocabulary)
    chunks, parts = plan.forward
    entries = math.prod(chunks.sizes) * parts.folds * parts.width
    assert 4 * entries <= max(budget, 4 * 128)
    assert math.prod(plan.pushforward.sizes) * vocabulary * 8 <= most
    pieces, classes = plan.recomputed
    rows = count * dtype.itemsize + math.prod(pieces.sizes) * 4
    assert classes.folds * classes.width * rows <= budget
    if plan.gradients_fit and weights_wanted:
        split = plan.gradient
        per_chunk = math.prod(split.chunks.sizes)
        per_group = per_chunk * split.chunks.count // split.groups
        assert (per_group * dtype.itemsize + per_chunk * 4) * vocabulary <= most


def test_symbolic_tokens():
    """The number of tokens is not compared: logits are computed again at any size."""
    (n,) = export.symbolic_shape("n")
    plan = LinearPlan((n, 128), 1024, 32_000, F32, F32, 2**26)
    assert not plan.gradients_fit
    assert plan.forward[0].sizes[1] == 128
    assert plan.forward[1].count == 1
    pieces, classes = plan.recomputed
    assert pieces.sizes == (n, 128)
    assert classes.folds * classes.width == 1024
    assert least_budget(128 * n, 32_000, F32, F32) == 4 * 32_000
