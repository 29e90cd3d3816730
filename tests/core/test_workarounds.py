"""Faults of jax and XLA that the package works around, a test for each.

A test passes while the fault is there. One that fails says that the workaround which it
names can go, once no supported version of jax has the fault.
"""

import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import jet

# In a process of its own: here the package has added its rules to jet's table.
_JET = """
import jax, jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import jet
"""


def _gone(workaround: str) -> str:
    return f"jax {jax.__version__} no longer has the fault: see {workaround}"


class TestJet:
    """`_compat.primitive` adds the rules; `row_loss.within_range` avoids a clamp."""

    @pytest.mark.parametrize(
        ("call", "error"),
        [
            ("jax.checkpoint(jnp.sin)", "KeyError"),
            ("lambda x: checkpoint_name(jnp.sin(x), 'sin')", "KeyError"),
            # https://github.com/jax-ml/jax/issues/30352
            ("jax.nn.relu", "UnexpectedTracerError"),
        ],
    )
    def test_without_rules(self, call, error):
        program = f"{_JET}\njet.jet({call}, (1.0,), ([1.0],))"
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True
        )
        assert error in done.stderr, _gone("_complete_jet")

    @pytest.mark.skipif(jax.__version_info__ >= (0, 12), reason="mended in jax 0.12")
    def test_bound_without_dimensions(self):
        with pytest.raises(TypeError, match="same shapes"):
            jet.jet(
                lambda x: jnp.minimum(x, jnp.float32(3)),
                (jnp.ones(3),),
                ([jnp.ones(3)],),
            )


@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="mended in jax 0.11")
def test_cpu_converts_all_of_what_a_piece_is_written_to():
    """XLA for CPU: `_linear.rules` computes weights' gradients in float32 there."""
    if jax.default_backend() != "cpu":
        pytest.skip("a fault of XLA for CPU")
    whole, part = jnp.ones((8, 64, 16), jnp.bfloat16), jnp.ones((64, 16), jnp.bfloat16)

    def write(whole, part, i):
        return jax.lax.dynamic_update_slice(whole, part[None], (i, 0, 0))

    program = jax.jit(write, donate_argnums=0).lower(whole, part, 0).compile()
    assert re.search(r"f32\[8,64,16\]\S* convert", program.as_text()), _gone(
        "_with_gradients_rule"
    )
