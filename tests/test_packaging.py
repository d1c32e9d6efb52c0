"""What is installed: import names, a pure-Python build that says so, a compiled module on the stable ABI."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_the_folders_never_shadow_the_kernels_package():
    # transformers imports from a package called `kernels` when it finds a regular one: a bare folder must stay bare.
    for folder in ("kernels", "methods"):
        assert not (ROOT / folder / "__init__.py").exists()


def test_a_build_without_compiler_is_pure_python_and_says_so(tmp_path):
    copy = tmp_path / "checkout"
    copy.mkdir()
    for name in ("llmcore", "kernels", "methods", "csrc"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    environment = {**os.environ, "CXX": "no-such-compiler", "CC": "no-such-compiler", "LLMCORE_BUILD_EXT": "auto"}
    build = subprocess.run([sys.executable, "setup.py", "-q", "build", "--build-lib", str(tmp_path / "lib")], cwd=copy, env=environment,
                           capture_output=True, text=True)
    assert build.returncode == 0, build.stderr
    assert "installing pure Python" in build.stderr
    # The finder of an editable install would answer for the compiled module that this build lacks.
    code = ("import sys; sys.meta_path = [f for f in sys.meta_path if 'Editable' not in repr(f)]; "
            "from llmcore.kernels import backends; import llmcore; "
            "assert 'checkout' not in llmcore.__file__; assert 'is not built' in backends.extension_error(); print('ok')")
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path / "lib")},
                         capture_output=True, text=True)
    assert run.stdout.strip() == "ok", run.stderr


def test_the_operators_use_the_stable_abi_only():
    try:
        module = importlib.import_module("llmcore._C")
    except ImportError as error:
        pytest.skip(f"no compiled module: {error}")
    if shutil.which("nm") is None:
        pytest.skip("nm (binutils) is not installed")
    symbols = subprocess.run(["nm", "-DC", "--undefined-only", module.__file__], capture_output=True, text=True, check=True).stdout
    unstable = [line for line in symbols.splitlines() if " at::" in line or " c10::" in line]
    assert not unstable, f"symbols outside the stable ABI: {unstable[:5]}"
