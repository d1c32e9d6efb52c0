"""Ahead-of-time compilation of Triton kernels, without a GPU: registers, spills and shared memory of every configuration.

Each `kernels/<family>_triton.py` lists what it launches in `aot_cases()`. `compile_case` compiles one case for one target and reads the
resources from the binary with the tools that ship inside the triton package (cuobjdump for NVIDIA, the code object's metadata for AMD).
A case fails its target when it spills, unless it states why that is acceptable, or when its shared memory exceeds the device's limit.

    python -m llmcore.kernels.aot [--everyday]      compile everything (or what tests compile) for every target, print the table
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# target -> (backend, architecture, warp size, shared memory limit of one block in bytes: vendor's programming guides)
TARGETS = {
    "sm_80": ("cuda", 80, 32, 163 * 1024),
    "sm_90": ("cuda", 90, 32, 227 * 1024),
    "sm_100": ("cuda", 100, 32, 227 * 1024),
    "gfx942": ("hip", "gfx942", 64, 64 * 1024),
}
FAMILIES = ("linear_logprob", "zeroth_order", "invariants", "saliency_flow")


@dataclasses.dataclass(frozen=True)
class AotCase:
    """One kernel configuration as it is launched.

    kernel: the @triton.jit function. signature: argument -> type ("*bf16", "i32", "i64", "fp32", "constexpr").
    constexprs: argument -> value. divisible: arguments known to be multiples of 16 (pointers always are).
    targets: which of TARGETS launch this configuration. spills_allowed: target -> the reason, when a spill is accepted.
    everyday: compiled by `--everyday` too, the selection that every test run can afford.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    divisible: tuple[str, ...] = ()
    targets: tuple[str, ...] = tuple(TARGETS)
    spills_allowed: dict[str, str] = dataclasses.field(default_factory=dict)
    everyday: bool = True


@dataclasses.dataclass(frozen=True)
class AotReport:
    """Resources of one compiled kernel. spill_bytes: local memory a thread (NVIDIA STACK+LOCAL, AMD private segment)."""

    name: str
    target: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    shared_limit: int


def compile_case(case: AotCase, target: str) -> AotReport:
    """Compile `case` for `target` and read its resources from the binary. Needs triton, no GPU, and TRITON_INTERPRET unset."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    backend, arch, warp_size, shared_limit = TARGETS[target]
    names = list(case.signature)
    constexprs = {(names.index(name),): value for name, value in case.constexprs.items()}
    aligned = [name for name, kind in case.signature.items() if kind.startswith("*")] + list(case.divisible)
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(case.kernel, case.signature, constexprs, attrs)
    options = {"num_warps": case.num_warps, "num_stages": min(case.num_stages, 2) if backend == "hip" else case.num_stages}
    binary = triton.compile(source, target=GPUTarget(backend, arch, warp_size), options=options)
    if backend == "cuda":
        registers, spills = _nvidia_resources(binary.asm["cubin"])
    else:
        registers, spills = _amd_resources(binary.asm["amdgcn"])
    return AotReport(case.name, target, registers, spills, binary.metadata.shared, shared_limit)


def _nvidia_resources(cubin: bytes) -> tuple[int, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([str(tool), "--dump-resource-usage", file.name], check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {text!r}")
    return int(found[1]), int(found[2]) + int(found[3])


def _amd_resources(assembly: str) -> tuple[int, int]:
    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        if found is None:
            raise RuntimeError(f"the AMD code object states no .{name}")
        return int(found[1])

    return field("vgpr_count"), field("private_segment_fixed_size")


def all_cases() -> list[AotCase]:
    """Every configuration of every family that has Triton kernels."""
    cases: list[AotCase] = []
    for family in FAMILIES:
        if importlib.util.find_spec(f"llmcore.kernels.{family}_triton") is not None:
            cases += importlib.import_module(f"llmcore.kernels.{family}_triton").aot_cases()
    return cases


def fault(case: AotCase, report: AotReport) -> str | None:
    """What is wrong with a compiled case, or None."""
    if report.shared_bytes > report.shared_limit:
        return f"{report.name} on {report.target}: {report.shared_bytes} bytes of shared memory, the limit is {report.shared_limit}"
    if report.spill_bytes and report.target not in case.spills_allowed:
        return f"{report.name} on {report.target}: {report.spill_bytes} bytes spilled a thread and no reason stated"
    return None


def main() -> int:
    faults = []
    print(f"{'kernel':<56} {'target':<8} {'registers':>9} {'spill B':>8} {'shared B':>9}")
    for case in all_cases():
        if "--everyday" in sys.argv[1:] and not case.everyday:
            continue
        for target in case.targets:
            report = compile_case(case, target)
            print(f"{case.name:<56} {target:<8} {report.registers:>9} {report.spill_bytes:>8} {report.shared_bytes:>9}", flush=True)
            problem = fault(case, report)
            if problem:
                faults.append(problem)
    print("\n".join(faults) if faults else "no spills without a reason, shared memory within every limit")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
