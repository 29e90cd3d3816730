"""The Triton kernels of attention on a machine that has no GPU.

Interpreted (see support/triton_attention_interpreter.py), against the oracle. Compiled
for Hopper: that shared memory and registers are enough. Both are skipped where triton
is missing; what is refused is not.
"""

import dataclasses
import functools
import os
import pathlib
import re
import subprocess

import jax
import jax.numpy as jnp
import pytest
from support import process

from jaxsoftmax._attend import triton as kernels
from jaxsoftmax._attend.call import (
    ATTENTION,
    FLOATS,
    AttentionCall,
    Config,
    Inputs,
    Result,
)
from jaxsoftmax._attend.kernel_limits import product_precision
from jaxsoftmax._compat import mosaic_gpu as mosaic_gpu_compat
from jaxsoftmax._compat import triton as _compat
from jaxsoftmax._core import dispatch
from jaxsoftmax._core.device import Device
from jaxsoftmax._rows import triton as rows

POINTERS = {
    "bfloat16": "*bf16",
    "float16": "*fp16",
    "float32": "*fp32",
    "int32": "*i32",
    "bool": "*i1",
}
HOPPER = Device("cuda", "NVIDIA H100 80GB HBM3", (9, 0))
AMPERE = Device("cuda", "NVIDIA A100-SXM4-80GB", (8, 0))
SHARED_MEMORY = 227 * 1024


DTYPES = ["float32", "bfloat16", "float16"]


def interpret(*arguments):
    pytest.importorskip("triton")
    process.run("triton_attention_interpreter", *arguments)


@pytest.mark.parametrize(
    "dtype", [*DTYPES[:2], pytest.param(DTYPES[2], marks=pytest.mark.slow)]
)
def test_interpreted(dtype):
    interpret(dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_every_case_interpreted(dtype):
    interpret(dtype, "--every")


# --- compiled -------------------------------------------------------------------------


def struct(shape, dtype):
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def inputs(shape, dtype, names=()):
    b, t, s, n, k, h, hv = shape
    pairs = (b, n, t, s)
    optional = {
        "bias": struct(pairs, "float32"),
        "sinks": struct((n,), "float32"),
        "mask": struct((b, 1, t, s), "bool"),
        "query_lengths": struct((b,), "int32"),
        "key_lengths": struct((b,), "int32"),
        "query_segments": struct((b, t), "int32"),
        "key_segments": struct((b, s), "int32"),
        "query_offset": struct((b,), "int32"),
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


def programs(x, config):
    """What is compiled for Hopper of forward, gradient and forward mode, by kernel."""
    triton = pytest.importorskip("triton")
    backends = pytest.importorskip("triton.backends.compiler")
    found = {}

    def compiled(*arrays, kernel, results, grid, name, **options):
        names = kernel.arg_names
        constants = {k: options.pop(k) for k in names if k in options}
        outputs = jax.tree.leaves(results)
        types = [POINTERS[a.dtype.name] for a in (*arrays, *outputs)]
        assert len(types) == len(names) - len(constants)
        source = triton.compiler.ASTSource(
            kernel,
            dict(zip(names, types, strict=False))
            | dict.fromkeys(constants, "constexpr"),
            constexprs=constants,
            # As jax-triton has it.
            attrs={(i,): [["tt.divisibility", 16]] for i in range(len(types))},
        )
        target = backends.GPUTarget("cuda", 90, 32)
        found[name] = triton.compile(source, target, options=options)
        return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), results)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_compat, "triton_call", compiled)
        # Arrays that no kernel computes, for the types alone.
        jax.eval_shape(functools.partial(kernels.attention, config), x)
        if config.wanted:
            y = results(x)
            gradient = functools.partial(kernels.attention_gradient, config)
            jax.eval_shape(gradient, x, y, y)
            names = [name for name in Inputs._fields if name not in FLOATS]
            tangents = x._replace(**dict.fromkeys(names))
            moving = tuple(n for n in FLOATS if getattr(x, n) is not None)
            wanted = dataclasses.replace(config, wanted=moving)
            push = functools.partial(kernels.attention_pushforward, wanted)
            jax.eval_shape(push, x, y, tangents)
    return found


def spilled(ptx):
    """Bytes of registers that are kept in memory."""
    import triton.backends.nvidia as nvidia

    # Triton brings one for older and one for newer GPUs, and in 3.9 the former does not
    # take its PTX: https://github.com/triton-lang/triton/issues/10331.
    folder = pathlib.Path(nvidia.__file__).parent / "bin"
    for ptxas in sorted(folder.glob("ptxas*"), reverse=True):  # the newest first
        command = [ptxas, "-v", "--gpu-name", "sm_90a", "-o", os.devnull, "/dev/stdin"]
        done = subprocess.run(command, input=ptx, capture_output=True, text=True)
        if done.returncode == 0:
            break
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
    "query_offset",
)
WANTED = ("query", "key", "value")


def rare(*arguments):
    return pytest.param(*arguments, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("dtype", "precision", "size"),
    [
        ("bfloat16", None, 128),
        ("float32", "highest", 64),
        rare("bfloat16", None, 64),
        rare("bfloat16", None, 256),
        rare("float16", None, 64),
        rare("float16", None, 128),
        rare("float16", None, 256),
        rare("float32", None, 64),
        rare("float32", None, 128),
        rare("float32", None, 256),
        rare("float32", "highest", 128),
        rare("float32", "highest", 256),
    ],
)
def test_compiled(dtype, precision, size):
    x = inputs((2, 1000, 1024, 4, 2, size, size), dtype)
    config = Config(0.1, causal=True, wanted=WANTED, precision=precision)
    found = programs(x, config)
    assert len(found) == 4
    for name, program in found.items():
        assert program.metadata.enable_fp_fusion, name
        assert program.metadata.shared <= SHARED_MEMORY, name
        spills = spilled(program.asm["ptx"])
        # In full precision there are no tensor cores, and more in registers.
        assert spills <= (8192 if precision else 2048), name


@pytest.mark.parametrize(
    ("dtype", "sizes"),
    [
        ("bfloat16", (72, 64)),
        rare("float32", (72, 64)),
        rare("bfloat16", (128, 128)),
        rare("bfloat16", (64, 256)),
        rare("float32", (128, 128)),
        rare("float32", (64, 256)),
    ],
)
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
    monkeypatch.setattr(rows, "unavailable", lambda device: None)
    assert reason in kernels.refusal(call, device)


@pytest.mark.parametrize("names", [(), EVERYTHING])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_not_refused(dtype, names, monkeypatch):
    x = inputs(SHAPE, dtype, names)
    call = call_of(x, causal=True, window=(3, 4), softcap=1.0, wanted=WANTED)
    monkeypatch.setattr(rows, "unavailable", lambda device: None)
    assert kernels.refusal(call, HOPPER) is None
    monkeypatch.setattr(rows, "unavailable", lambda device: "no jax-triton here")
    assert kernels.refusal(call, HOPPER) == "no jax-triton here"


def test_bias_without_a_gradient_is_not_refused(monkeypatch):
    monkeypatch.setattr(rows, "unavailable", lambda device: None)
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
    assert product_precision(jnp.dtype(dtype), config) == found


def test_precision_of_the_configuration():
    with jax.default_matmul_precision("highest"):
        assert product_precision(jnp.dtype("float32"), Config(1.0)) == "ieee"


@pytest.mark.parametrize(
    ("asked", "dtype", "device", "found"),
    [
        (None, "bfloat16", HOPPER, "mosaic_gpu"),
        (None, "float16", HOPPER, "mosaic_gpu"),
        (None, "float32", HOPPER, "triton"),
        (None, "bfloat16", AMPERE, "triton"),
        (("cudnn", "xla"), "bfloat16", HOPPER, "xla"),
        (("triton", "xla"), "float32", HOPPER, "triton"),
        (("cudnn", "triton"), "bfloat16", HOPPER, "triton"),
    ],
)
def test_forward_mode_by_default(asked, dtype, device, found, monkeypatch):
    """Of whichever forward; where cuDNN would be first too."""
    monkeypatch.setattr(rows, "unavailable", lambda device: None)
    for reason in ("mosaic_gpu_reason", "ptxas_reason"):
        monkeypatch.setattr(mosaic_gpu_compat, reason, lambda: None)
    x = inputs((2, 24, 40, 4, 2, 16, 16), dtype)
    call = call_of(x, "attention_pushforward", wanted=WANTED)
    choice = dispatch.choose(asked, call, device, family=ATTENTION)
    assert choice.implementation == found


def test_over_several_devices_xla_runs(monkeypatch):
    monkeypatch.setattr(rows, "unavailable", lambda device: None)
    call = call_of(inputs(SHAPE, "float32"))
    choose = functools.partial(dispatch.choose, None, call, HOPPER, family=ATTENTION)
    assert choose().implementation == "triton"
    choice = choose(unfollowed="several devices")
    assert choice.implementation == "xla"
    assert dict(choice.refusals)["triton"] == "several devices"
    # cuDNN's kernels have rules for that.
    half = call_of(inputs((2, 24, 40, 4, 2, 16, 16), "bfloat16"))
    choice = dispatch.choose(None, half, HOPPER, unfollowed="several", family=ATTENTION)
    assert choice.implementation == "cudnn"
