"""Programs compiled for an NVIDIA GPU that is not there: kernels, and memory besides.

XLA compiles for the device that it is told about, with neither a GPU nor its driver.
The result is what the device would run, but for what is tuned by running it. Needs the
dependency group `for-gpu`: JAX's plugin alone, without the CUDA libraries.
"""

import dataclasses
import functools
import importlib.util
import re

import jax
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


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What one launch computes, or one copy.

    Attributes:
      op: Its opcode: ``"fusion"``, ``"custom-call"``, ``"copy"``, ...
      result: Dtypes and shapes, with layouts.
      target: Of a custom call what is called, else "".
    """

    op: str
    result: str
    target: str


@dataclasses.dataclass(frozen=True)
class Program:
    """What is known of a compiled program.

    Attributes:
      kernels: In their order; those of a loop's body once.
      temp_bytes: Of device memory, beside arguments and results.
    """

    kernels: tuple[Kernel, ...]
    temp_bytes: int


@functools.cache
def device(card):
    """A device to compile for, which cannot run anything."""
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
        card, platform="cuda", target_config=target, topology="1x1x1"
    )
    return topology.devices[0]


def compiled(f, *shapes, card):
    """`f`, jitted or not, compiled for arguments like `shapes` on a card."""
    sharding = jax.sharding.SingleDeviceSharding(device(card))
    there = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes
    )
    jitted = f if hasattr(f, "trace") else jax.jit(f)
    lowered = jitted.trace(*there).lower(lowering_platforms=("cuda",))
    # Quick machine code, which is most of the time; what is fused is the same.
    program = lowered.compile({"xla_backend_optimization_level": 0})
    memory = program.memory_analysis()
    return Program(tuple(_kernels(program.as_text())), memory.temp_size_in_bytes)


def _kernels(text):
    bodies = {m["name"]: m["body"] for m in _COMPUTATION.finditer(text)}
    entry = re.search(r"^ENTRY %(\S+)", text, re.M)[1]

    def found(name):
        for line in bodies[name].splitlines():
            match = _INSTRUCTION.match(line)
            if match is None or match["op"] in _NO_KERNEL:
                continue
            inner = re.search(r"\b(?:to_apply|body)=%([\w.-]+)", line)
            if match["op"] in ("call", "while"):
                yield from found(inner[1])
            elif not match["op"].endswith("-done"):  # its start was counted
                target = re.search(r'custom_call_target="([^"]*)"', line)
                yield Kernel(match["op"], match["result"], target[1] if target else "")

    return found(entry)
