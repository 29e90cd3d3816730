"""A module of this folder in a process of its own."""

import os
import pathlib
import subprocess
import sys

TESTS = pathlib.Path(__file__).parents[1]


def run(module, *arguments):
    """Runs ``python -m support.MODULE ARGUMENTS``; fails with what it prints."""
    path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    command = [sys.executable, "-W", "ignore", "-m", f"support.{module}", *arguments]
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr + done.stdout
