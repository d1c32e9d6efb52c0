"""Every Triton configuration compiles for every GPU it is launched on, without unexplained spills, within shared memory."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.parametrize("selection", [["--everyday"], pytest.param([], marks=pytest.mark.slow)])
def test_every_triton_configuration_compiles_ahead_of_time(selection):
    # A fresh process: the interpreter variable must be unset when the kernels are defined.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-m", "llmcore.kernels.aot", *selection], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stdout + run.stderr


LISTED = """
import json
from llmcore.kernels import aot
print(json.dumps([(case.kernel.__module__.rsplit(".", 1)[-1], case.kernel.__name__, case.targets) for case in aot.all_cases()]))
"""


def test_every_kernel_is_compiled_for_every_target():
    """A @triton.jit function that no other one calls is a kernel; each must be in its family's aot_cases()."""
    folder = Path(__file__).resolve().parents[2] / "kernels"
    jitted, called = set(), set()
    for path in folder.glob("*.py"):
        tree = ast.parse(path.read_text())
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        inside = [f for f in functions if any(ast.unparse(d).startswith("triton.jit") for d in f.decorator_list)]
        jitted |= {(path.stem, f.name) for f in inside}
        called |= {node.func.id for f in inside for node in ast.walk(f) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    kernels = {(module, name) for module, name in jitted if name not in called}
    assert len(kernels) >= 10
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", LISTED], capture_output=True, text=True, env=environment, cwd=folder.parent)
    assert run.returncode == 0, run.stderr
    compiled: dict[tuple[str, str], set[str]] = {}
    for module, name, targets in json.loads(run.stdout):
        compiled.setdefault((module, name), set()).update(targets)
    assert set(compiled) == kernels
    from llmcore.kernels.aot import TARGETS

    # Tensor descriptors need Hopper's copy engine.
    expected = {kernel: {"sm_90", "sm_100"} if "persistent" in kernel[1] else set(TARGETS) for kernel in kernels}
    assert compiled == expected
