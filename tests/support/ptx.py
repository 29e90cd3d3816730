"""Runs inline PTX of a warpgroup without a GPU, with memory watched to the byte.

A subset: what `_compat.mosaic_gpu_vectors` and `_compat.mosaic_gpu_masks` emit. All
threads run a program together, an instruction at a time, so that it must not depend on
their order; what it orders by barriers is not looked at. A bulk copy is done when it is
issued.
"""

import dataclasses
import re

import numpy as np

THREADS = 128
# Bytes of address space that each memory has for itself.
REGION = 2**24
_WIDTHS = {"pred": 1, "b16": 16, "b32": 32, "b64": 64}
_COMPARE = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
_NOTHING = ("fence.mbarrier_init.release.cluster", "bar.warp.sync", "bra")


@dataclasses.dataclass
class Memory:
    """Bytes from an address on; what may be read and written, and what was written."""

    address: int
    data: np.ndarray
    readable: np.ndarray
    writable: np.ndarray
    written: np.ndarray

    @staticmethod
    def of(address, array, *, readable=True, writable=False):
        data = np.ascontiguousarray(array).view(np.uint8).reshape(-1).copy()
        each = (np.full(data.size, value) for value in (readable, writable, False))
        return Memory(address, data, *each)

    def _place(self, address, size):
        first = address - self.address
        assert first >= 0, f"{size} bytes before an array, at {first}"
        assert first + size <= self.data.size, f"{size} bytes at {first}, beyond it"
        return slice(first, first + size)

    def read(self, address, size):
        place = self._place(address, size)
        assert self.readable[place].all(), f"read of {size} bytes at {place.start}"
        return self.data[place]

    def write(self, address, values):
        place = self._place(address, len(values))
        assert self.writable[place].all(), f"write at {place.start}"
        assert not self.written[place].any(), f"second write at {place.start}"
        self.data[place], self.written[place] = values, True


class Warpgroup:
    """Runs programs on memory."""

    def __init__(self, memories):
        self.memories = {memory.address // REGION: memory for memory in memories}
        self.expected, self.copied = {}, {}

    def run(self, text, operands):
        """Runs a program.

        Args:
          text: The program.
          operands: For each, a number or one for each thread. Words of a result are
            None.

        Returns:
          What the words of the result are, per thread.
        """
        self.registers, self.widths = {}, {}
        for k, value in enumerate(operands):
            number = 0 if value is None else np.asarray(value)
            self.registers[f"${k}"] = np.broadcast_to(number, THREADS).astype(object)
            self.widths[f"${k}"] = 64
        for statement in text.replace("AGAIN:", "").split(";"):
            if words := statement.split(None, 1):
                self._statement(*words)
        results = [f"${k}" for k, value in enumerate(operands) if value is None]
        return [self.registers[name].astype(np.int64) for name in results]

    def _statement(self, opcode, rest=""):
        active = np.ones(THREADS, bool)
        if opcode.startswith("@"):
            active = self._predicate(opcode[1:])
            opcode, _, rest = rest.partition(" ")
        if opcode == ".reg":
            kind, _, names = rest.partition(" ")
            for name in names.split(","):
                self.widths[name.strip()] = _WIDTHS[kind[1:]]
            return
        if opcode in _NOTHING:
            return
        operands = re.findall(r"\{[^}]*\}|\[[^]]*\]|[^,\s]+", rest)
        name, *kinds = opcode.split(".")
        getattr(self, f"_{name}")(active, kinds, *operands)

    # --- operands ---------------------------------------------------------------------

    def _predicate(self, name):
        return ~self._predicate(name[1:]) if name[0] == "!" else self.registers[name]

    def _value(self, name):
        """Per thread, as Python's integers."""
        if name == "%tid.x":
            return np.arange(THREADS).astype(object)
        if name not in self.widths:
            return np.broadcast_to(int(name), THREADS).astype(object)
        return self._as(self.registers[name], self.widths[name], False)

    @staticmethod
    def _as(value, width, signed):
        value = value & ((1 << width) - 1)
        if not signed:
            return value
        return value - ((value >> (width - 1)) << width)

    def _set(self, active, name, value):
        width = self.widths[name]
        width = 32 if name[0] == "$" else width
        old = self.registers.get(name, np.zeros(THREADS, object))
        self.registers[name] = np.where(active, self._as(value, width, False), old)

    def _read(self, kinds, name):
        """By the type of an instruction: its last part."""
        width, signed = int(kinds[-1][1:]), kinds[-1][0] == "s"
        return self._as(self._value(name), width, signed)

    def _address(self, operand):
        name, _, offset = operand.strip("[]").partition("+")
        return self._value(name) + int(offset or 0)

    def _memory(self, address):
        """Each has a region of its own."""
        return self.memories[address // REGION]

    # --- instructions -----------------------------------------------------------------

    def _mov(self, active, kinds, to, source):
        if to[0] == "{":
            value = self._value(source)
            for k, name in enumerate(to.strip("{}").split(",")):
                self._set(active, name.strip(), value >> (32 * k))
        else:
            self._set(active, to, self._value(source))

    def _binary(self, active, kinds, to, a, b, f):
        self._set(active, to, f(self._read(kinds, a), self._read(kinds, b)))

    def _add(self, *args):
        self._binary(*args, f=np.add)

    def _sub(self, *args):
        self._binary(*args, f=np.subtract)

    def _and(self, *args):
        self._binary(*args, f=np.bitwise_and)

    def _or(self, *args):
        self._binary(*args, f=np.bitwise_or)

    def _min(self, *args):
        self._binary(*args, f=np.minimum)

    def _max(self, *args):
        self._binary(*args, f=np.maximum)

    def _div(self, *args):
        self._binary(*args, f=np.floor_divide)

    def _rem(self, *args):
        self._binary(*args, f=np.remainder)

    def _mul(self, active, kinds, to, a, b):
        assert kinds[0] in ("lo", "wide")
        self._binary(active, kinds, to, a, b, f=np.multiply)

    def _not(self, active, kinds, to, a):
        self._set(active, to, ~self._read(kinds, a))

    def _mad(self, active, kinds, to, a, b, c):
        product = self._read(kinds, a) * self._read(kinds, b)
        self._set(active, to, product + self._read(kinds, c))

    def _shr(self, active, kinds, to, a, b):
        amount = np.minimum(self._as(self._value(b), 32, False), 63)
        self._set(active, to, self._read(kinds, a) >> amount)

    def _shl(self, active, kinds, to, a, b):
        self._set(
            active, to, self._read(kinds, a) << self._as(self._value(b), 32, False)
        )

    def _cvt(self, active, kinds, to, a):
        self._set(active, to, self._read(kinds, a))

    def _setp(self, active, kinds, to, a, b, other=None):
        result = _COMPARE[kinds[0]](self._read(kinds, a), self._read(kinds, b))
        result = result.astype(bool)
        if other is not None:
            assert kinds[1] == "and"
            result = result & self._predicate(other)
        assert active.all()
        self.registers[to] = result

    def _prmt(self, active, kinds, to, a, b, selector):
        both, found = self._value(a) + (self._value(b) << 32), 0
        for k in range(4):
            place = int(selector, 16) >> 4 * k & 15
            assert place < 8, "the sign of a byte"
            found = found + ((both >> 8 * place & 255) << 8 * k)
        self._set(active, to, found)

    def _ld(self, active, kinds, to, source):
        size = int(kinds[-1][1:]) // 8
        names = [name.strip() for name in to.strip("{}").split(",")]
        addresses, value = self._address(source), np.zeros(THREADS, object)
        for thread in np.flatnonzero(active):
            address, nbytes = addresses[thread], size * len(names)
            assert address % nbytes == 0, "a load that is not aligned"
            read = self._memory(address).read(address, nbytes)
            value[thread] = int.from_bytes(read.tobytes(), "little")
        for k, name in enumerate(names):
            self._set(active, name, value >> 8 * size * k & (1 << 8 * size) - 1)

    def _st(self, active, kinds, to, source):
        size = int(kinds[-1][1:]) // 8
        names = [name.strip() for name in source.strip("{}").split(",")]
        values = [self._value(name) for name in names]
        addresses = self._address(to)
        for thread in np.flatnonzero(active):
            address = addresses[thread]
            assert address % (size * len(names)) == 0, "a store that is not aligned"
            mask = (1 << 8 * size) - 1
            each = [int(v[thread] & mask).to_bytes(size, "little") for v in values]
            memory = self._memory(address)
            memory.write(address, np.frombuffer(b"".join(each), np.uint8))

    def _mbarrier(self, active, kinds, *operands):
        if kinds[0] == "init":
            assert operands[1] == "1"
            for address in self._address(operands[0])[active]:
                self.expected[address], self.copied[address] = None, 0
        elif kinds[0] == "arrive":
            addresses, nbytes = self._address(operands[1]), self._value(operands[2])
            for thread in np.flatnonzero(active):
                assert self.expected[addresses[thread]] is None
                self.expected[addresses[thread]] = nbytes[thread]
        else:
            for address in self._address(operands[1]):
                assert self.copied[address] == self.expected[address], "would hang"
            self._set(active, operands[0], np.ones(THREADS, object))

    def _cp(self, active, kinds, to, source, nbytes, barrier):
        addresses = [self._address(x) for x in (to, source, barrier)]
        sizes = self._value(nbytes)
        for thread in np.flatnonzero(active):
            into, start, arrived = (each[thread] for each in addresses)
            size = sizes[thread]
            assert into % 16 == start % 16 == size % 16 == 0 < size, "a bulk copy"
            read = self._memory(start).read(start, size)
            self._memory(into).write(into, read)
            self.copied[arrived] += size
