"""``python -m jaxsoftmax`` says what a bug report needs."""

import subprocess
import sys

import jax
import pytest

import jaxsoftmax
from jaxsoftmax import __main__ as main
from jaxsoftmax._attend.call import ATTENTION
from jaxsoftmax._rows.call import ROWS


def test_the_command_prints_the_report():
    command = [sys.executable, "-W", "error", "-m", "jaxsoftmax"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True)
    assert printed.stderr == ""
    assert printed.stdout.splitlines()[0] == f"jaxsoftmax {jaxsoftmax.__version__}"
    assert f"jax {jax.__version__}" in printed.stdout.splitlines()


def test_every_implementation_is_there_with_its_reason():
    lines = main.report().splitlines()
    for what, family in (
        ("softmax", ROWS),
        ("attention", ATTENTION),
    ):
        start = lines.index(f"{what}: xla")
        rows = lines[start + 1 : start + 1 + len(family.implementations)]
        found = dict(row.strip().split(": ", 1) for row in rows)
        assert list(found) == list(family.implementations)
        assert found.pop("xla") == "can run"
        found.pop("opaque", None)  # of the tests
        assert all(reason.startswith("no, ") for reason in found.values()), found


def test_a_package_that_is_missing(monkeypatch):
    monkeypatch.setattr(main, "_PACKAGES", ("jax", "no-such-package"))
    assert "no-such-package not installed" in main.report()


@pytest.mark.parametrize("name", ["jax", "jaxlib", "numpy"])
def test_versions(name):
    assert any(line.startswith(f"{name} ") for line in main.report().splitlines())
