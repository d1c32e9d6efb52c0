"""Fused linear log-probability beside its peers: DPO loss and both gradients from given hidden states, one process, interleaved rounds.

    python -m pytest bench/bench_linear_logprob.py -s                 the default shape (about a minute)
    python bench/bench_linear_logprob.py [--shapes half,all,qwen] [--dtypes float32,bfloat16] [--rounds 7] [--only llmcore,cce] [--save]

FLOP of one GEMM unit: 2·N·D·V with N scored rows; floor of the full step = 3 units at the rate the library's own product
of the same dtype reaches on this machine at this shape, into memory that is there already, measured in the same rounds. Peak memory counts
the two gradients; "scratch" subtracts them. --save keeps one result file a shape.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import harness
import peers
import torch

SHAPES = {
    "half": {"batch": 8, "length": 128, "prompt": 64, "hidden_size": 576, "vocab_size": 49152},
    "all": {"batch": 8, "length": 128, "prompt": 0, "hidden_size": 576, "vocab_size": 49152},
    "qwen": {"batch": 8, "length": 256, "prompt": 0, "hidden_size": 896, "vocab_size": 151936},
    "small": {"batch": 4, "length": 32, "prompt": 16, "hidden_size": 256, "vocab_size": 8192},
}
SLOW_S = 20.0  # a step that takes longer, and six times the fastest, is timed once and its memory is not measured
UNITS = {"llmcore recompute": 4, "llmcore frozen head": 2, "llmcore score only": 1}  # 3 for everything else


def _check(results: dict[str, Any], name: str, step, truth) -> str | None:
    """Why a step's result is wrong, or None. Loose on purpose for 16-bit peers: they are listed with their error, not hidden."""
    loss, grad_hidden, grad_weight = step()
    errors = {"loss": abs(float(loss) - float(truth[0])) / abs(float(truth[0]))}
    for key, value, expected in (("grad_hidden", grad_hidden, truth[1]), ("grad_weight", grad_weight, truth[2])):
        if value is not None:
            errors[key] = float((value.float() - expected.float()).norm() / expected.float().norm())
    results["relative_errors"] = errors
    return None if errors["loss"] < 0.05 else f"loss is off by {errors['loss']:.1%}"


def measure(problem: peers.Problem, *, rounds: int, only: list[str] | None, memory: bool) -> dict[str, Any]:
    """Every candidate on one problem: times, errors, memory, shares of the floor, ratios to the fastest peer."""
    candidates: dict[str, Any] = {}
    missing: dict[str, str] = {}
    for name in [*peers.OURS, *peers.PEERS]:
        if only and not any(part in name for part in only):
            continue
        try:
            candidates[name] = peers.build(name, problem)
        except peers.Missing as reason:
            missing[name] = str(reason)
    hidden, weight, labels = problem.tensors
    keep = labels != -100
    rows = hidden[keep].detach().float().requires_grad_()
    head = weight.detach().float().requires_grad_()
    logp = torch.zeros(labels.shape).masked_scatter(keep, (rows @ head.T).log_softmax(-1).gather(1, labels[keep][:, None])[:, 0])
    loss = peers.dpo(logp, problem.beta)
    grads = torch.autograd.grad(loss, (rows, head))
    truth = (loss.detach(), torch.zeros(hidden.shape).masked_scatter(keep[..., None], grads[0]), grads[1])
    del logp, grads, loss
    table: dict[str, dict[str, Any]] = {name: {} for name in candidates}
    for name in list(candidates):
        try:
            fault = _check(table[name], name, candidates[name], truth)
        except Exception as error:  # a peer that breaks is reported, it does not end the run
            fault = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
        if fault:
            missing[name] = fault
            del candidates[name], table[name]
    del truth
    n, d, v = problem.rows, problem.hidden_size, problem.vocab_size
    dtype = getattr(torch, problem.dtype)
    gemms = {"gemm forward": harness.gemm_step(n, v, d, dtype), "gemm grad_hidden": harness.gemm_step(n, d, v, dtype),
             "gemm grad_weight": harness.gemm_step(v, d, n, dtype)}  # fmt: skip
    # "score only" is a quarter of a whole step. Every step has run once in the check. A CPU without 16-bit products computes them so slowly
    # in the library (minutes a step) that one timed run has to do.
    times = harness.interleaved({**candidates, **gemms}, rounds=rounds, slow_factor=6.0, once_above_s=SLOW_S)
    floor = sum(times[name]["median_ms"] for name in gemms)
    reference = [times[name]["median_ms"] for name in candidates if not name.startswith("llmcore")]
    fastest_peer = min(reference) if reference else None
    gradients = (hidden.numel() + weight.numel()) * weight.element_size()
    for name in candidates:
        row = table[name]
        row.update(times[name])
        units = UNITS.get(name, 3)
        row["gflop"] = units * problem.unit_flop / 1e9
        row["gflops_per_second"] = row["gflop"] / (row["median_ms"] / 1e3)
        row["share_of_gemm_floor"] = (times["gemm forward"]["median_ms"] if units == 1 else floor * units / 3) / row["median_ms"]
        if fastest_peer:
            row["ratio_to_fastest_peer"] = row["median_ms"] / fastest_peer
        if memory and row["rounds"] >= min(rounds, 2):  # in a fresh process: two more runs, too many for a step timed once
            row["peak_bytes"] = harness.peak_memory(peers.build, (name, problem), threads=torch.get_num_threads())
            row["scratch_bytes"] = row["peak_bytes"] - (
                gradients if units >= 3 else hidden.numel() * hidden.element_size() if units == 2 else 0
            )
    return {
        "shape": {**SHAPES[problem.name], "rows": n},
        "dtype": problem.dtype,
        "unit_gflop": problem.unit_flop / 1e9,
        "gradient_bytes": gradients,
        "gemm_floor_ms_3_units": floor,
        "gemm": {name: times[name] for name in gemms},
        "results": table,
        "missing": missing,
    }


def show(content: dict[str, Any]) -> None:
    print(f"\n{content['dtype']} {content['shape']}  3-unit GEMM floor {content['gemm_floor_ms_3_units']:.0f} ms")
    print(
        f"{'':32} {'median ms':>10} {'p20':>8} {'p80':>8} {'GFLOP/s':>8} {'of floor':>8} {'vs best peer':>12} {'scratch MiB':>12}"
        f" {'err dW':>9}"
    )
    for name, row in sorted(content["results"].items(), key=lambda item: item[1]["median_ms"]):
        scratch = f"{row['scratch_bytes'] / 2**20:12.0f}" if "scratch_bytes" in row else f"{'':12}"
        print(
            f"{name:32} {row['median_ms']:10.0f} {row['p20_ms']:8.0f} {row['p80_ms']:8.0f} {row['gflops_per_second']:8.1f}"
            f" {row['share_of_gemm_floor']:8.2f} "
            f"{row.get('ratio_to_fastest_peer', float('nan')):12.2f} {scratch}"
            f" {row['relative_errors'].get('grad_weight', float('nan')):9.1e}"
        )
    for name, reason in content["missing"].items():
        print(f"{name:32} missing: {reason}")


def markdown(content: dict[str, Any]) -> str:
    """The README tables of one result file: a table for each shape and dtype, what could not run below it."""
    parts = []
    for table in content["tables"]:
        shape = table["shape"]
        lines = [f"**{table['dtype']}, {shape['rows']} scored rows of {shape['batch'] * shape['length']}, D = {shape['hidden_size']}, "
                 f"V = {shape['vocab_size']}** (3-unit GEMM floor {table['gemm_floor_ms_3_units']:.0f} ms)", "",
                 "| path | median ms [p20, p80] | of its GEMM floor | against fastest peer | scratch MiB |", "|---|---:|---:|---:|---:|"]
        for name, row in sorted(table["results"].items(), key=lambda item: item[1]["median_ms"]):
            scratch = f"{row['scratch_bytes'] / 2**20:.0f}" if "scratch_bytes" in row else ""
            spread = f"[{row['p20_ms']:.0f}, {row['p80_ms']:.0f}]" if row["rounds"] > 1 else "(one run)"
            lines.append(f"| {name} | {row['median_ms']:.0f} {spread} | {row['share_of_gemm_floor']:.2f} "
                         f"| {row.get('ratio_to_fastest_peer', float('nan')):.2f} | {scratch} |")
        lines += [f"\n{name}: not in the table ({reason})." for name, reason in table["missing"].items()]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def test_linear_logprob():
    """The small shape beside every peer that runs here."""
    show(measure(peers.Problem("small", **SHAPES["small"], dtype="float32"), rounds=3, only=None, memory=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="half,all,qwen")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default=None, help="comma-separated parts of names")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    for shape in options.shapes.split(","):
        tables: list[dict[str, Any]] = []
        for dtype in options.dtypes.split(","):
            problem = peers.Problem(shape, **SHAPES[shape], dtype=dtype)
            tables.append(
                measure(
                    problem, rounds=options.rounds, only=options.only.split(",") if options.only else None, memory=not options.no_memory
                )
            )
            show(tables[-1])
            sys.stdout.flush()
            if options.save:  # each finished table is kept, whatever happens to the next
                print(harness.save(f"linear_logprob_{shape}", {"tables": tables}))


if __name__ == "__main__":
    main()
