"""Fill the result tables of README.md and docs/*.md from the committed result files.

A page marks a place with `<!-- results NAME -->` … `<!-- end -->`; what lies between is replaced, for each
bench/results/<device>/NAME.json, by `markdown(content)` of the bench whose name NAME starts with (bench_preference.py serves
preference_step_lora_2), under one line that says device, versions, commit and date. A table that no run produced is not written.

    python bench/render.py [--check]        --check changes nothing and fails when a page is not up to date
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
PLACE = re.compile(r"(<!-- results (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def tables(name: str) -> str:
    """Every device's table of one bench."""
    benches = [path.stem for path in (ROOT / "bench").glob("bench_*.py") if f"bench_{name}_".startswith(f"{path.stem}_")]
    module = importlib.import_module(max(benches, key=len))
    parts = []
    for path in sorted((ROOT / "bench" / "results").glob(f"*/{name}.json")):
        content = json.loads(path.read_text())
        stated = content.get("versions") or {package: content[package] for package in ("torch", "transformers")}
        versions = ", ".join(f"{package} {version}" for package, version in stated.items())
        threads = f", {content['threads']} threads" if "threads" in content else ""
        head = f"{content['device']}{threads}; {versions}; commit {content['commit']}, {content['date']}."
        parts.append(f"{head}\n\n{module.markdown(content)}")
    return "\n\n".join(parts) or "No result file yet."


def main() -> int:
    check = "--check" in sys.argv[1:]
    stale = []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = page.read_text()
        filled = PLACE.sub(lambda found: f"{found[1]}\n{tables(found[2])}\n\n{found[3]}", text)
        if filled != text:
            stale.append(page.name)
            if not check:
                page.write_text(filled)
    print(f"{'out of date' if check else 'written'}: {', '.join(stale) or 'nothing'}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
