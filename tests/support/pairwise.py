"""Thin products of parameters, deterministically."""

import collections
import itertools


def repeated(cases, strength=2, chosen=()):
    """Which of `cases` add no combination of values of any `strength` parameters.

    Greedily; where several would add as many, the one whose values have been rarest.

    Args:
      cases: A dict of hashable values per case.
      strength: 1 for each value once, 2 for each pair.
      chosen: Indices of those that are not left out, whatever they add.

    Returns:
      The indices of those that may be left out.
    """
    strength = min(strength, len(cases[0]))
    left = {
        i: set(itertools.combinations(sorted(case.items()), strength))
        for i, case in enumerate(cases)
    }
    used = collections.Counter()
    missing = set().union(*left.values())
    for i in chosen:
        missing -= left.pop(i)
        used.update(cases[i].items())
    while missing:
        rank = {
            i: (-len(each & missing), sum(used[v] for v in cases[i].items()))
            for i, each in left.items()
        }
        best = min(rank, key=rank.get)
        missing -= left.pop(best)
        used.update(cases[best].items())
    return sorted(left)
