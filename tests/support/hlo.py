"""What a compiled program moves between devices, and a lowered one has: from HLO."""

import dataclasses
import math
import re

_KINDS = (
    "all-gather|all-reduce|all-to-all|collective-permute|collective-broadcast|"
    "ragged-all-to-all|reduce-scatter"
)
# "%y = (f32[4,1]{1,0}, f32[]) all-reduce(", or "all-reduce-start(" on a GPU.
_COLLECTIVE = re.compile(rf"= (?P<type>.*?) (?P<kind>{_KINDS})(?P<start>-start)?\(")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
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


def trips(compiled):
    """How often each loop runs whose number of rounds is known when it is compiled."""
    return [int(n) for n in _TRIPS.findall(compiled.as_text())]


# --- what a program is lowered to -----------------------------------------------------

_FUNCTION = re.compile(r"func\.func (?:public|private) @(\w+)")
_CALL = re.compile(r"\bcall @(\w+)\(")


def products(lowered):
    """How many matrix products a program has; one of a loop counts once."""
    parts = _FUNCTION.split(lowered.as_text())[1:]
    bodies = dict(zip(parts[::2], parts[1::2], strict=True))

    def of(name):
        own = bodies[name].count("stablehlo.dot_general")
        return own + sum(map(of, _CALL.findall(bodies[name])))

    return of("main")


def largest(lowered):
    """Elements of the largest array of a program."""
    found = re.findall(r"\btensor<((?:\d+x)+)", lowered.as_text())
    return max(math.prod(int(n) for n in sizes.split("x") if n) for sizes in found)
