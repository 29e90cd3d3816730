"""What a compiled program moves between devices, read from its HLO."""

import dataclasses
import math
import re

_KINDS = (
    "all-gather|all-reduce|all-to-all|collective-permute|collective-broadcast|"
    "ragged-all-to-all|reduce-scatter"
)
# "%y = (f32[4,1]{1,0}, f32[]) all-reduce(", or "all-reduce-start(" on a GPU.
_COLLECTIVE = re.compile(rf"= (?P<type>.*?) (?P<kind>{_KINDS})(?P<start>-start)?\(")
_ARRAY = re.compile(r"\b([a-z]+\d+)(?:\w*)?\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation.

    Attributes:
      kind: ``"all-reduce"``, ``"all-gather"``, ...
      nbytes: Of its result on one device.
    """

    kind: str
    nbytes: int


def _nbytes(dtype, sizes):
    bits = int(re.search(r"\d+", dtype).group())
    return math.prod(int(n) for n in sizes.split(",") if n) * max(bits, 8) // 8


def collectives(compiled):
    """Every collective of a compiled program, in its order."""
    found = []
    for match in _COLLECTIVE.finditer(compiled.as_text()):
        arrays = [_nbytes(*each) for each in _ARRAY.findall(match["type"])]
        if match["start"] and match["kind"] != "all-reduce":
            arrays = arrays[len(arrays) // 2 :]  # operands, then results
        found.append(Collective(match["kind"], sum(arrays)))
    return found


def total(found):
    """Bytes by kind."""
    kinds = {each.kind for each in found}
    return {k: sum(each.nbytes for each in found if each.kind == k) for k in kinds}
