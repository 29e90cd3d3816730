"""``python -m jaxsoftmax``: what a bug report needs.

Versions, devices, and which implementations can run on the default device, by two
calls that are typical: a softmax of 4096 rows of 4096, and causal attention over 4096
positions, in bfloat16.
"""

import importlib.metadata
import platform
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from jaxsoftmax._attend.call import ATTENTION, AttentionCall, Config, Inputs
from jaxsoftmax._compat import trace
from jaxsoftmax._core import dispatch
from jaxsoftmax._core.device import target_device
from jaxsoftmax._rows.call import ROWS, RowCall
from jaxsoftmax._version import __version__

_PACKAGES = ("jax", "jaxlib", "numpy", "jax-triton", "triton", "flax")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _family_lines(
    what: str, call: RowCall | AttentionCall, family: dispatch.Family, platform: str
) -> Iterator[str]:
    device = target_device(platform)
    names = family.preferences.get(platform, ("xla",))
    choice = dispatch.choose(None, call, device, family=family)
    yield f"{what}: {choice.implementation}"
    for name in family.implementations:
        reason = dispatch.refusal(name, call, device, family)
        default = "" if name in names else " (where it is asked for)"
        yield f"  {name}: " + (f"no, {reason}" if reason else f"can run{default}")


def report() -> str:
    """The text that is printed."""
    rows = jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16)
    softmax = RowCall("softmax", (-1,), 1.0, rows.dtype, arrays=(rows, None))
    heads = jax.ShapeDtypeStruct((1, 4096, 16, 64), jnp.bfloat16)
    config = Config(scale=0.125, causal=True, uses_lse=False)
    attention = AttentionCall("attention", config, Inputs(heads, heads, heads))
    backend = jax.default_backend()
    if backend == "gpu":
        backend = "cuda" if trace.has_platform("cuda") else "rocm"
    lines = [
        f"jaxsoftmax {__version__}",
        f"Python {platform.python_version()}, {platform.platform()}",
        *(f"{package} {_version(package)}" for package in _PACKAGES),
        "",
        f"devices: {', '.join(str(d.device_kind) for d in jax.local_devices())}",
        f"platform: {backend}",
        "",
        *_family_lines("softmax", softmax, ROWS, backend),
        *_family_lines("attention", attention, ATTENTION, backend),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
