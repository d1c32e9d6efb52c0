"""Every Triton configuration compiles for every GPU it is launched on, without unexplained spills, within shared memory."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")


@pytest.mark.parametrize("selection", [["--everyday"], pytest.param([], marks=pytest.mark.slow)])
def test_every_triton_configuration_compiles_ahead_of_time(selection):
    # A fresh process: the interpreter variable must be unset when the kernels are defined.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-m", "llmcore.kernels.aot", *selection], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stdout + run.stderr
