"""The Triton kernels of attention on a machine that has no GPU.

Interpreted (see triton_attention_interpreter.py), against `_attend.xla`. Compiled
for Hopper: that shared memory and registers are enough. Both are skipped where triton
is missing; what is refused is not.
"""

import functools
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from jaxsoftmax._attend import triton as kernels
from jaxsoftmax._attend.call import AttentionCall, Config, Inputs, Result
from jaxsoftmax._compat import triton as _compat
from jaxsoftmax._core import dispatch
from jaxsoftmax._core.device import Device
from jaxsoftmax._rows import triton as rows

INTERPRETER = pathlib.Path(__file__).with_name("triton_attention_interpreter.py")
POINTERS = {
    "bfloat16": "*bf16",
    "float16": "*fp16",
    "float32": "*fp32",
    "int32": "*i32",
    "bool": "*i1",
}
HOPPER = Device("cuda", "NVIDIA H100 80GB HBM3", (9, 0))
SHARED_MEMORY = 227 * 1024


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_interpreted(dtype):
    pytest.importorskip("triton")
    command = [sys.executable, "-W", "ignore", str(INTERPRETER), dtype]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout


# --- compiled -------------------------------------------------------------------------


def struct(shape, dtype):
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def inputs(shape, dtype, names=()):
    b, t, s, n, k, h, hv = shape
    of_pairs = (b, n, t, s)
    optional = {
        "bias": struct(of_pairs, "float32"),
        "sinks": struct((n,), "float32"),
        "mask": struct((b, 1, t, s), "bool"),
        "query_lengths": struct((b,), "int32"),
        "key_lengths": struct((b,), "int32"),
        "query_segments": struct((b, t), "int32"),
        "key_segments": struct((b, s), "int32"),
    }
    return Inputs(
        struct((b, t, n, h), dtype),
        struct((b, s, k, h), dtype),
        struct((b, s, k, hv), dtype),
        **{name: optional[name] for name in names},
    )


def results(x):
    out = struct((*x.query.shape[:3], x.value.shape[3]), x.query.dtype)
    low = out if x.query.dtype.itemsize == 2 else None
    lse = struct(x.query.shape[:3], "float32")
    return Result(out, low, lse, lse)


def programs(x, config, planner=kernels.plan):
    """What is compiled for Hopper of the forward and the gradient, by kernel."""
    triton = pytest.importorskip("triton")
    backends = pytest.importorskip("triton.backends.compiler")
    found = {}

    def compiled(*arrays, kernel, results, grid, name, num_warps, num_stages, C):
        outputs = jax.tree.leaves(results)
        types = [POINTERS[a.dtype.name] for a in (*arrays, *outputs)]
        assert len(types) == len(kernel.arg_names) - 1
        source = triton.compiler.ASTSource(
            kernel,
            {**dict(zip(kernel.arg_names, types, strict=False)), "C": "constexpr"},
            constexprs={"C": C},
            # As jax-triton has it.
            attrs={(i,): [["tt.divisibility", 16]] for i in range(len(types))},
        )
        target = backends.GPUTarget("cuda", 90, 32)
        options = {"num_warps": num_warps, "num_stages": num_stages}
        found[name] = triton.compile(source, target, options=options)
        return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), results)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_compat, "triton_call", compiled)
        forward = functools.partial(kernels.attention, planner=planner)
        gradient = functools.partial(kernels.attention_gradient, planner=planner)
        # Arrays that no kernel computes, for the types alone.
        jax.eval_shape(functools.partial(forward, config), x)
        if config.wanted:
            y = results(x)
            jax.eval_shape(functools.partial(gradient, config), x, y, y)
    return found


def spilled(ptx):
    """Bytes of registers that are kept in memory."""
    import triton.backends.nvidia as nvidia

    ptxas = pathlib.Path(nvidia.__file__).parent / "bin" / "ptxas"
    command = [ptxas, "-v", "--gpu-name", "sm_90a", "-o", os.devnull, "/dev/stdin"]
    done = subprocess.run(command, input=ptx, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    stores = re.findall(r"(\d+) bytes spill stores", done.stderr)
    return sum(map(int, stores))


EVERYTHING = (
    "bias",
    "sinks",
    "mask",
    "query_lengths",
    "key_lengths",
    "query_segments",
    "key_segments",
)
WANTED = ("query", "key", "value")


@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize("precision", [None, "highest"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_compiled(dtype, precision, size):
    if precision and dtype != "float32":
        pytest.skip("no difference")
    x = inputs((2, 1000, 1024, 4, 2, size, size), dtype)
    config = Config(0.1, causal=True, wanted=WANTED, precision=precision)
    found = programs(x, config)
    assert len(found) == 3
    for name, program in found.items():
        assert program.metadata.shared <= SHARED_MEMORY, name
        spills = spilled(program.asm["ptx"])
        # In full precision there are no tensor cores, and more in registers.
        assert spills <= (8192 if precision else 2048), name


@pytest.mark.parametrize("sizes", [(72, 64), (128, 128), (64, 256)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_compiled_with_everything(dtype, sizes):
    x = inputs((2, 1000, 1024, 4, 2, *sizes), dtype, EVERYTHING)
    config = Config(0.1, window=(100, 20), softcap=30.0, wanted=WANTED)
    for name, program in programs(x, config).items():
        assert program.metadata.shared <= SHARED_MEMORY, name
        assert spilled(program.asm["ptx"]) <= 4096, name


def test_hopper_multiplies_by_groups_of_warps_from_shared_memory():
    x = inputs((2, 1024, 1024, 4, 4, 64, 64), "bfloat16")
    for name, program in programs(x, Config(0.1, causal=True, wanted=WANTED)).items():
        text = program.asm["ptx"]
        assert "wgmma.mma_async" in text, name
        copies = re.findall(r"cp\.async\.c\w\.shared\.global .*?, (0x\w+)", text)
        assert "0x10" in copies, name


# --- what is refused ------------------------------------------------------------------


def call_of(x, op="attention", **static):
    return AttentionCall(op, Config(0.1, **static), x)


SHAPE = (2, 24, 40, 4, 2, 16, 8)


@pytest.mark.parametrize(
    ("call", "device", "reason"),
    [
        (call_of(inputs(SHAPE, "bfloat16")), Device("cpu"), "needs a GPU"),
        (call_of(inputs(SHAPE, "bfloat16")), Device("rocm"), "not been tried on ROCm"),
        (
            call_of(inputs(SHAPE, "bfloat16")),
            Device("cuda", "T4", (7, 5)),
            "needs compute capability 8.0 or more, the GPU has 7.5",
        ),
        (call_of(inputs(SHAPE, "float64")), HOPPER, "takes no query of float64"),
        (call_of(inputs(SHAPE, "bfloat16"), dropout_rate=0.1), HOPPER, "no dropout"),
        (
            call_of(inputs(SHAPE, "bfloat16"), "attention_pushforward"),
            HOPPER,
            "no forward mode",
        ),
        (
            call_of(
                inputs(SHAPE, "bfloat16", ["bias"]),
                "attention_gradient",
                wanted=("query", "bias"),
            ),
            HOPPER,
            "no gradient of bias",
        ),
        (
            call_of(inputs((2, 24, 40, 4, 2, 20, 8), "bfloat16")),
            HOPPER,
            "multiples of 8, not 20",
        ),
        (
            call_of(inputs((2, 24, 40, 4, 2, 16, 264), "bfloat16")),
            HOPPER,
            "up to 256 that are multiples of 8, not 264",
        ),
        (call_of(inputs((2, 24, 0, 4, 2, 16, 8), "float32")), HOPPER, "an empty array"),
        (
            call_of(inputs(SHAPE, "float32"), precision="BF16_BF16_F32_X9"),
            HOPPER,
            "has no precision",
        ),
        (call_of(inputs(SHAPE, "float32"), softcap=1e-35), HOPPER, "a soft cap of"),
    ],
)
def test_refused(call, device, reason, monkeypatch):
    monkeypatch.setattr(rows, "unavailable", lambda: None)
    assert reason in kernels.refusal(call, device)


@pytest.mark.parametrize("names", [(), EVERYTHING])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_not_refused(dtype, names, monkeypatch):
    x = inputs(SHAPE, dtype, names)
    call = call_of(x, causal=True, window=(3, 4), softcap=1.0, wanted=WANTED)
    monkeypatch.setattr(rows, "unavailable", lambda: None)
    assert kernels.refusal(call, HOPPER) is None
    monkeypatch.setattr(rows, "unavailable", lambda: "no jax-triton here")
    assert kernels.refusal(call, HOPPER) == "no jax-triton here"


def test_bias_without_a_gradient_is_not_refused(monkeypatch):
    monkeypatch.setattr(rows, "unavailable", lambda: None)
    x = inputs(SHAPE, "bfloat16", ["bias"])
    call = call_of(x, "attention_gradient", wanted=("query",))
    assert kernels.refusal(call, HOPPER) is None


@pytest.mark.parametrize(
    ("dtype", "asked", "found"),
    [
        ("float32", None, "tf32"),
        ("float32", "high", "tf32"),
        ("float32", "highest", "ieee"),
        ("float32", jax.lax.Precision.HIGHEST, "ieee"),
        ("float32", (jax.lax.Precision.DEFAULT, jax.lax.Precision.HIGHEST), "ieee"),
        ("float32", jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3, "tf32x3"),
        ("float32", jax.lax.DotAlgorithmPreset.BF16_BF16_F32, None),
        ("bfloat16", "highest", "tf32"),
        ("bfloat16", jax.lax.DotAlgorithmPreset.BF16_BF16_F32, "tf32"),
        ("bfloat16", jax.lax.DotAlgorithmPreset.F16_F16_F32, "tf32"),
        ("bfloat16", jax.lax.DotAlgorithmPreset.F64_F64_F64, None),
    ],
)
def test_precision(dtype, asked, found):
    config = Config(1.0, precision=asked)
    assert kernels._precision(jnp.dtype(dtype), config) == found


def test_precision_of_the_configuration():
    with jax.default_matmul_precision("highest"):
        assert kernels._precision(jnp.dtype("float32"), Config(1.0)) == "ieee"


def test_over_several_devices_xla_runs(monkeypatch):
    monkeypatch.setattr(rows, "unavailable", lambda: None)
    call = call_of(inputs(SHAPE, "float32"))
    choose = functools.partial(
        dispatch.choose, None, call, HOPPER, family=dispatch.ATTENTION
    )
    assert choose().implementation == "triton"
    choice = choose(unfollowed="several devices")
    assert choice.implementation == "xla"
    assert dict(choice.refusals)["triton"] == "several devices"
    # cuDNN's kernels have rules for that.
    half = call_of(inputs((2, 24, 40, 4, 2, 16, 16), "bfloat16"))
    choice = dispatch.choose(
        None, half, HOPPER, unfollowed="several", family=dispatch.ATTENTION
    )
    assert choice.implementation == "cudnn"
