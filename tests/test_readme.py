"""The README stays true: its Python examples and those of docs/ run, its links lead somewhere, its tables are the committed results."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
RUN_ALL = """
import json, sys
for name, code in json.load(sys.stdin):
    print(f"--- {name}", flush=True)
    exec(compile(code, name, "exec"), {"__name__": "__main__"})
"""


def test_examples_run(tmp_path):
    """Every Python block of every page, in one process, in a folder of its own."""
    examples = [(f"{page}, example {n + 1}", code) for page in PAGES
                for n, code in enumerate(re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL))]  # fmt: skip
    assert len(examples) > 8
    run = subprocess.run([sys.executable, "-c", RUN_ALL], input=json.dumps(examples), cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-500:] + run.stderr[-2000:]
    assert run.stdout.count("--- ") == len(examples)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text()
    for link in re.findall(r"\]\(([^)#]+)", text):
        if not link.startswith("http"):
            assert ((ROOT / page).parent / link).exists(), f"{page} links to {link}, which is not there"


def test_tables_are_rendered_from_the_committed_results():
    run = subprocess.run([sys.executable, "bench/render.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
