"""What the tests of losses have in common: cases that cover options, and tolerances.

Tolerances, in units of the eps of a dtype:

- A gradient of float32, worst error relative to its row's largest entry: 8, as exp and
  the sums round at every step, and what `amplification` adds. One of a 16-bit dtype:
  0.5 for its one rounding, or 1 for the two of a finished gradient that is multiplied
  by a scalar; and the float32 error below it.
- A cost -log P: 8 of itself where it is small (its digits are those of exp), 8 of 1
  plus itself otherwise.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

EPS, TINY = float(jnp.finfo(jnp.float32).eps), float(jnp.finfo(jnp.float32).tiny)


def covering(factors, strength):
    """Cases with every combination of values of any `strength` factors, greedily."""
    rng = np.random.default_rng(0)
    sets = list(itertools.combinations(range(len(factors)), strength))
    values = list(factors.values())
    missing = {
        (at, each)
        for at in sets
        for each in itertools.product(*(range(len(values[i])) for i in at))
    }
    cases = []
    while missing:
        at, each = min(missing)
        tries = rng.integers([len(v) for v in values], size=(20, len(values)))
        tries[:, at] = each
        hits = [{(at, tuple(t[list(at)])) for at in sets} & missing for t in tries]
        best = max(range(len(tries)), key=lambda i: len(hits[i]))
        missing -= hits[best]
        chosen = (v[i] for v, i in zip(values, tries[best], strict=True))
        cases.append(dict(zip(factors, chosen, strict=True)))
    return cases


def name_of(case):
    return "-".join(f"{k}={v}" for k, v in case.items() if v not in (None, False, 0.0))


def amplification(x, scale, softcap):
    """What a row's errors in P are beyond 8 eps, in eps: those of ``max - z``.

    With no scale it is exact, or compensated. A number multiplies the difference: up to
    100 of it shows, as P is 0 beyond that. An array multiplies the logits themselves.
    A cap rounds z, of at most its size, and tanh has an error of a few eps.
    """
    if softcap is not None:
        return np.full(x.shape[:-1], 8 * softcap)
    if scale is None:
        return np.zeros(x.shape[:-1])
    z = np.abs(np.where(np.isneginf(x), 0, x)) * np.max(scale)
    return z.max(-1) if np.ndim(scale) else np.minimum(2 * z.max(-1), 100)


def cost_bar(cost, amplified, eps=EPS):
    """How far a cost may be from the oracle's, of which the finite ones count."""
    cost = np.where(np.isinf(cost), 0, cost).astype(np.float64)
    return eps * np.minimum((8 + amplified) * cost, 8 * (1 + cost) + amplified)


def gradient_bar(dtype, roundings=1, amplified=0.0):
    bar = (8 + amplified) * EPS
    return bar if dtype == "float32" else bar + roundings / 2 * eps_of(dtype)


def eps_of(dtype):
    return float(jnp.finfo(dtype).eps)


def assert_rows_close(got, want, bar, dtype):
    """Each row's error within `bar` of its largest entry, or both subnormal."""
    got, want = np.asarray(got, np.float64), np.asarray(want)
    largest = np.abs(want).max(-1)
    # Of a row of numbers near the least normal one no more than that is asked.
    bound = bar * largest + float(jnp.finfo(dtype).tiny)
    error = np.abs(got - want).max(-1)
    assert (error <= bound).all(), (error / bound, np.argmax(error / bound))


def assert_within(got, want, bound):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    finite = np.isfinite(want)
    np.testing.assert_array_equal(got[~finite], want[~finite])
    error = np.abs(got[finite] - want[finite])
    bound = np.broadcast_to(np.asarray(bound, np.float64), want.shape)[finite]
    # XLA takes subnormal numbers for 0: up to 18 * 7 terms of a sum.
    assert (error <= bound + 200 * TINY).all(), error / bound


def plain_linear_loss(x, labels, weights, bias, reduction):
    """In jax.numpy; -100 is the label of tokens that are ignored."""
    logits = jnp.matmul(x, weights) + bias.reshape(*(1,) * (x.ndim - 1), -1)
    at = jnp.maximum(labels, 0)[..., None]
    label_logit = jnp.take_along_axis(logits, at, -1)[..., 0]
    counted = labels != -100
    each = jnp.where(counted, jax.nn.logsumexp(logits, -1) - label_logit, 0)
    if reduction == "none":
        return each
    count = jnp.maximum(jnp.sum(counted).astype(each.dtype), 1)
    return jnp.sum(each) / (count if reduction == "mean" else 1)


# Of every loss: (arguments, exception, message).
