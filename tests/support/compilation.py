"""Quick compilation for all tests; the best code for what is about the last digit.

Most of the time of the suite is XLA's: without optimizations it compiles large programs
in a tenth of the time. The operations, their order and what devices exchange are the
same; how sums are ordered and products contracted is not.
"""

import importlib.metadata
import os

QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
BEST = {"xla_backend_optimization_level": 3, "xla_cpu_use_fusion_emitters": True}


def _known(options):
    """Those that the installed XLA has: an unknown one ends the process."""
    version = importlib.metadata.version("jaxlib").split(".")[:2]
    has_emitters = tuple(map(int, version)) < (0, 11)
    return {k: v for k, v in options.items() if "emitters" not in k or has_emitters}


def quick_flags():
    """For a CPU: kernels of a GPU are tested as users have them."""
    if os.environ["JAX_PLATFORMS"] != "cpu":
        return []
    return [f"--{name}={value}".lower() for name, value in _known(QUICK).items()]


def exact_jit(*args, **options):
    """`jax.jit` with the code that users have."""
    import jax

    if os.environ["JAX_PLATFORMS"] == "cpu":
        options["compiler_options"] = _known(BEST)
    return jax.jit(*args, **options)
