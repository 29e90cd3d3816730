"""Programs compiled for an NVIDIA GPU that is not there: kernels, and memory besides.

XLA compiles for the device that it is told about, with neither a GPU nor its driver.
The result is what the device would run, but for what is tuned by running it. Needs the
dependency group `for-gpu`: JAX's plugin alone, without the CUDA libraries.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import math
import re
from unittest import mock

import jax
import pytest
from jax.experimental import topologies

# As a device reports itself. XLA decides by these what is fused.
_EVERY_CARD = {
    "threads_per_warp": 32,
    "threads_per_block_limit": 1024,
    "threads_per_core_limit": 2048,
    "block_dim_limit_x": 2**31 - 1,
    "block_dim_limit_y": 2**16 - 1,
    "block_dim_limit_z": 2**16 - 1,
    "registers_per_core_limit": 2**16,
    "registers_per_block_limit": 2**16,
    "shared_memory_per_block": 48 * 1024,
}
CARDS = {
    "A100": {
        "cuda_compute_capability": "{ major: 8 minor: 0 }",
        "core_count": 108,
        "fpus_per_core": 64,
        "clock_rate_ghz": 1.41,
        "memory_bandwidth": 2_039_000_000_000,
        "device_memory_size": 85_174_583_296,
        "l2_cache_size": 40 * 2**20,
        "shared_memory_per_core": 164 * 1024,
        "shared_memory_per_block_optin": 163 * 1024,
    },
    "H200": {
        "cuda_compute_capability": "{ major: 9 minor: 0 }",
        "core_count": 132,
        "fpus_per_core": 128,
        "clock_rate_ghz": 1.98,
        "memory_bandwidth": 4_800_000_000_000,
        "device_memory_size": 151_397_597_184,
        "l2_cache_size": 50 * 2**20,
        "shared_memory_per_core": 228 * 1024,
        "shared_memory_per_block_optin": 227 * 1024,
    },
    "B200": {
        "cuda_compute_capability": "{ major: 10 minor: 0 }",
        "core_count": 148,
        "fpus_per_core": 128,
        "clock_rate_ghz": 1.965,
        "memory_bandwidth": 8_000_000_000_000,
        "device_memory_size": 191_491_014_656,
        "l2_cache_size": 132_644_864,
        "shared_memory_per_core": 228 * 1024,
        "shared_memory_per_block_optin": 227 * 1024,
    },
}
# Not run: parts of the program that name or group what is there.
_NO_KERNEL = {"parameter", "constant", "bitcast", "tuple", "get-tuple-element"}
_INSTRUCTION = re.compile(
    r"^ +(?:ROOT )?%\S+ = (?P<result>\(.*?\)|\S+) (?P<op>[\w-]+)\(", re.M
)
_COMPUTATION = re.compile(
    r"^(?:ENTRY )?%(?P<name>\S+) .*\{\n(?P<body>(?:  .*\n)*)", re.M
)


def installed():
    """Whether the plugin is; importing it is left to jax."""
    parent = importlib.util.find_spec("jax_plugins")
    return bool(parent and importlib.util.find_spec("jax_plugins.xla_cuda12"))


needed = pytest.mark.skipif(
    not installed(), reason="JAX's plugin for CUDA is not installed"
)


@contextlib.contextmanager
def gpu_by_default():
    """What is traced is what a process with a GPU would trace."""
    jax.clear_caches()
    with mock.patch.object(jax, "default_backend", return_value="gpu"):
        yield
    jax.clear_caches()


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What one launch computes, or one copy.

    Attributes:
      op: Its opcode: ``"fusion"``, ``"custom-call"``, ``"copy"``, ...
      result: Dtypes and shapes, with layouts.
      target: Of a custom call what is called, else "".
      operations: The opcodes in it, of a fusion those that are fused.
    """

    op: str
    result: str
    target: str
    operations: frozenset[str]

    @property
    def entries(self):
        """Of the largest result."""
        shapes = re.findall(r"\[([\d,]*)\]", self.result)
        return max(math.prod(map(int, filter(None, s.split(",")))) for s in shapes)

    @property
    def is_product(self):
        """Whether it is a product of matrices, with whatever is fused into it."""
        return "dot" in self.operations or "gemm" in self.target

    @property
    def is_copy(self):
        """Whether it computes nothing: a copy, or the same in another order."""
        return self.operations - _NO_KERNEL <= {"copy", "transpose", "reshape"}


@dataclasses.dataclass(frozen=True)
class Program:
    """What is known of a compiled program.

    Attributes:
      kernels: In their order; those of a loop's body once.
      temp_bytes: Of device memory, beside arguments and results.
    """

    kernels: tuple[Kernel, ...]
    temp_bytes: int


def device(card):
    """A device to compile for, which cannot run anything."""
    return devices(card, 1)[0]


@functools.cache
def devices(card, count):
    """So many of them, of one host."""
    jax.devices()  # has jax find the plugin
    fields = (_EVERY_CARD | CARDS[card]).items()
    info = " ".join(
        f"{name} {value}" if str(value).startswith("{") else f"{name}: {value}"
        for name, value in fields
    )
    target = (
        f'gpu_device_info {{ {info} }} platform_name: "CUDA" '
        f'device_description_str: "NVIDIA {card}"'
    )
    topology = topologies.get_topology_desc(
        card, platform="cuda", target_config=target, topology=f"1x1x{count}"
    )
    return topology.devices


def compiled(f, *shapes, card):
    """`f`, jitted or not, compiled for arguments like `shapes` on a card."""
    sharding = jax.sharding.SingleDeviceSharding(device(card))
    there = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes
    )
    return compiled_as_they_lie(f, *there)


def compiled_as_they_lie(f, *shapes):
    """`f` compiled for the devices that the shardings of its arguments name."""
    jitted = f if hasattr(f, "trace") else jax.jit(f)
    with jax.debug_nans(False):  # with its checks jax donates nothing
        lowered = jitted.trace(*shapes).lower()
    # Quick machine code, which is most of the time; what is fused is the same.
    program = lowered.compile({"xla_backend_optimization_level": 0})
    memory = program.memory_analysis()
    return Program(tuple(_kernels(program.as_text())), memory.temp_size_in_bytes)


def _kernels(text):
    bodies = {m["name"]: m["body"] for m in _COMPUTATION.finditer(text)}
    entry = re.search(r"^ENTRY %(\S+)", text, re.M)[1]

    def instructions(name):
        matches = (_INSTRUCTION.match(line) for line in bodies[name].splitlines())
        return (match for match in matches if match is not None)

    def operations(match):
        """The opcode, or those of what a fusion calls."""
        inner = re.search(r"\bcalls=%([\w.-]+)", match.string)
        if match["op"] != "fusion" or inner is None:
            return {match["op"]}
        return set().union(*map(operations, instructions(inner[1])))

    def found(name):
        for match in instructions(name):
            op, line = match["op"], match.string
            if op in _NO_KERNEL:
                continue
            if op in ("call", "while"):
                inner = re.search(r"\b(?:to_apply|body)=%([\w.-]+)", line)
                yield from found(inner[1])
            elif not op.endswith("-done"):  # its start was counted
                target = re.search(r'custom_call_target="([^"]*)"', line)
                target = target[1] if target else ""
                yield Kernel(op, match["result"], target, frozenset(operations(match)))

    return found(entry)
