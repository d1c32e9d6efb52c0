"""What the tests of Triton kernels share: their second run in Triton's interpreter, which must be chosen before Python starts."""

from __future__ import annotations

import functools
import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    from triton.runtime import interpreter

    @functools.cache
    def _builtins(package: Any) -> list[str]:
        return [name for name, member in inspect.getmembers(package) if interpreter.tl.core.is_builtin(member)]

    def _patch_builtin(package: Any, builder: Any, scope: Any) -> None:
        """As the interpreter's own, which lists all members of triton.language at every call of every jit function."""
        for name in _builtins(package):
            if interpreter.tl.core.is_builtin(member := getattr(package, name)):
                interpreter._patch_attr(package, name, member, builder, scope)

    interpreter._patch_builtin = _patch_builtin


@pytest.fixture
def in_the_interpreter() -> Callable[..., str]:
    """Runs a test file again with TRITON_INTERPRET=1; it must pass, and something in it must have run. Returns the output."""

    def run(file: str, *options: str) -> str:
        environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", *options, file]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).resolve().parents[2])
        assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
        assert " passed" in done.stdout
        return done.stdout

    return run


@pytest.fixture
def quiet_numpy():
    """The interpreter computes both branches of every `where` in NumPy; the discarded one may divide by zero or overflow."""
    with np.errstate(all="ignore"):
        yield
