"""Registers, spills and shared memory of every Triton configuration, compiled ahead of time: no device takes part.

    python bench/bench_aot.py       compile every case of every family (`make test` compiles the everyday ones), write
                                    bench/results/aot/aot.json; exit status as llmcore.kernels.aot
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
RESULT = ROOT / "bench" / "results" / "aot" / "aot.json"


def markdown(content: dict[str, Any]) -> str:
    """One line a configuration; a target's cell is registers / spilled bytes a thread / shared bytes a block."""
    targets = list(content["targets"])
    cells: dict[str, dict[str, str]] = {}
    for row in content["rows"]:
        spill = f"**{row['spill_bytes']}**" if row["spill_bytes"] else "0"
        cells.setdefault(row["name"], {})[row["target"]] = f"{row['registers']} / {spill} / {row['shared_bytes']}"
    head = f"| kernel | {' | '.join(targets)} |\n|---|{'---:|' * len(targets)}\n"
    body = "\n".join(f"| `{name}` | {' | '.join(found.get(t, '') for t in targets)} |" for name, found in cells.items())
    spilling: dict[str, list[str]] = {}
    for row in content["rows"]:
        if row["spill_bytes"]:
            spilling.setdefault(row["reason"], []).append(f"`{row['name']}` on {row['target']}")
    reasons = [f"{', '.join(names)}: {reason}." for reason, names in spilling.items()]
    limits = ", ".join(f"{name} {limit}" for name, limit in content["targets"].items())
    return f"{head}{body}\n\nShared memory of one block is limited to (bytes): {limits}.\n\nSpills: {' '.join(reasons) or 'none.'}"


def main() -> int:
    from harness import header
    from llmcore.kernels import aot

    rows, faults = [], []
    for case in aot.all_cases():
        for target in case.targets:
            report = aot.compile_case(case, target)
            problem = aot.fault(case, report)
            faults += [problem] if problem else []
            entry = dataclasses.asdict(report) | {"num_warps": case.num_warps, "num_stages": case.num_stages}
            rows.append(entry | {"reason": case.spills_allowed.get(target) if report.spill_bytes else None})
    stated = header()
    content = {
        "device": "no device: compiled ahead of time",
        "versions": {name: stated["versions"][name] for name in ("torch", "triton")},
        "commit": stated["commit"],
        "date": stated["date"],
        "targets": {name: limit for name, (_backend, _arch, _warp, limit) in aot.TARGETS.items()},
        "rows": rows,
    }
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(content, indent=1) + "\n")
    print("\n".join(faults) or f"{len(rows)} binaries, no spill without a reason, shared memory within every limit")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
