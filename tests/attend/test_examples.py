"""The examples about attention run, in their quick mode."""

import pathlib
import runpy

import jax
import pytest

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"


def test_ring_attention(capsys):
    if jax.device_count() < 2:
        pytest.skip("needs several devices")
    program = runpy.run_path(str(EXAMPLES / "ring_attention.py"))
    assert program["main"](["--quick"]) == 0
    assert capsys.readouterr().out.count("value and gradients agree") == 2
