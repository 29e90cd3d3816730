"""Thinned products: what is left holds each value, or each pair of values."""

import itertools

import pytest
from support import pairwise

CASES = [
    dict(zip("abc", values, strict=True))
    for values in itertools.product(range(3), range(2), "xyz")
]


def combinations(cases, strength):
    return {each for c in cases for each in itertools.combinations(c.items(), strength)}


@pytest.mark.parametrize(("strength", "most"), [(1, 3), (2, 10), (3, 18)])
def test_nothing_is_lost(strength, most):
    out = pairwise.repeated(CASES, strength)
    left = [case for i, case in enumerate(CASES) if i not in out]
    assert combinations(left, strength) == combinations(CASES, strength)
    assert len(left) <= most


def test_what_is_chosen_stays():
    first = set(range(len(CASES))).difference(pairwise.repeated(CASES, 1))
    assert first.isdisjoint(pairwise.repeated(CASES, 2, first))


def test_one_parameter():
    assert pairwise.repeated([{"a": 1}, {"a": 1}, {"a": 2}], 2) == [1]
