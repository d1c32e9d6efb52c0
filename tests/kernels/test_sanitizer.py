"""Memory safety of every Triton kernel, proved without a GPU by triton-viz's symbolic sanitizer.

`triton-sanitizer script.py` runs the launches of a script with symbolic program ids and loop counters and asks a solver whether
any active lane can leave the tensors it was given; the first violation ends the process with status 1. Values are not computed, so
a script checks nothing else. `sanitize/<family>.py` launches every kernel of a family on odd shapes; `sanitize/broken/*.py` are
kernels with a defect that must be found.

What the symbolic run follows: masks, 64-bit offsets, `range` loops in the kernel itself, indices loaded from memory, helpers
without loops. What it does not: `while` with a loaded bound, loops inside a @triton.jit helper, `tl.trans` as a dot operand (load
the tile transposed), block pointers and tensor descriptors. Tensor arguments must be contiguous or have unit inner stride.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytest.importorskip("triton_viz")

FOLDER = Path(__file__).parent / "sanitize"
ROOT = Path(__file__).resolve().parents[2]
REPORT = "ILLEGAL MEMORY ACCESS"


def _sanitize(script: Path) -> subprocess.CompletedProcess[str]:
    command = shutil.which("triton-sanitizer", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    assert command is not None, "triton-viz is installed but its triton-sanitizer command is not on PATH"
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return subprocess.run([command, str(script)], capture_output=True, text=True, env=environment, cwd=ROOT)


@pytest.mark.parametrize("script", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_no_kernel_leaves_its_tensors(script):
    run = _sanitize(script)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-6000:]
    assert REPORT not in run.stdout + run.stderr


@pytest.mark.parametrize("script", sorted((FOLDER / "broken").glob("*.py")), ids=lambda path: path.stem)
def test_the_sanitizer_bites(script):
    run = _sanitize(script)
    assert run.returncode == 1, run.stdout[-6000:] + run.stderr[-6000:]
    assert REPORT in run.stdout
    assert script.name in run.stdout, "the report must name the defective script"


def test_every_triton_module_has_a_script():
    families = {path.name.removesuffix("_triton.py") for path in (ROOT / "kernels").glob("*_triton.py")}
    assert families <= {path.stem for path in FOLDER.glob("*.py")}, "a family with Triton kernels has no sanitize/<family>.py"
