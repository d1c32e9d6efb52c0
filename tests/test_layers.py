"""The one-way rule of the layers, and a cheap, silent `import llmcore`."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FORBIDDEN = {  # folder -> prefixes of llmcore modules that it must not import
    "kernels": ("llmcore.methods", "llmcore.models", "llmcore.losses", "llmcore.data", "llmcore.training", "llmcore.generation",
                "llmcore.checkpoints", "llmcore.attention", "llmcore.cli", "llmcore.commands", "transformers"),
    "llmcore": ("llmcore.methods",),
}


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("folder", ["kernels", "llmcore", "methods"])
def test_imports_go_down_only(folder):
    for path in (ROOT / folder).rglob("*.py"):
        if folder == "llmcore" and (path.parent.name in ("commands", "demo") or path.name == "cli.py"):
            continue  # the command line stands above the methods
        forbidden = FORBIDDEN.get(folder, ())
        if folder == "methods":
            own = path.relative_to(ROOT / "methods").parts[0].removesuffix(".py")
            others = [p.name.removesuffix(".py") for p in (ROOT / "methods").iterdir() if not p.name.startswith("_")]
            forbidden = tuple(f"llmcore.methods.{name}" for name in others if name != own)
        bad = [name for name in _imports(path) for prefix in forbidden if name == prefix or name.startswith(prefix + ".")]
        assert not bad, f"{path.relative_to(ROOT)} imports {bad}"


def test_import_is_silent_and_light():
    code = ("import sys, torch; before = set(sys.modules); import llmcore, llmcore.kernels.backends; "
            "heavy = {'transformers', 'peft', 'triton', 'matplotlib', 'datasets', 'accelerate'}; "
            "print(sorted(heavy & (set(sys.modules) - before)), end='')")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (run.stdout, run.stderr) == ("[]", "")
