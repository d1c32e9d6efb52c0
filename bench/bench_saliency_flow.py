"""Saliency of a whole model beside the two things it is compared with: eager attention with every matrix and its gradient kept, and plain
flash attention forward + backward without any saliency. Each runs in a process of its own, round after round in turn; times are the
process's own and peak memory is that of its first step.

    python -m pytest bench/bench_saliency_flow.py -s                  n = 256 (about a minute)
    python bench/bench_saliency_flow.py [--sizes 256,1024,2048] [--long 8192] [--rounds 3] [--save]
    python bench/bench_saliency_flow.py --gpu [--save]                 the Triton kernels beside the flash forward; needs a GPU

All three freeze the parameters, keep logits at the last token only and sum the same three segments, so the difference is saliency alone.
Eager keeps two matrices a layer and head, A and its gradient, until the bins of the last layer: 30 · 9 · 8 n² bytes, 9.1 GB at n = 2048.
Floor of the bins: 2·n²·d·H FLOP a layer (two products, causal half) at the rate of the library's float32 product, and n²·H/2 exponentials
at the rate of its exp, both measured in the same run, one after the other. The share of the product's rate alone is given beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import harness
import torch

LAYERS, HEADS, KV_HEADS, HEAD_DIM = 30, 9, 3, 64  # SmolLM2-135M


def _segments(n: int) -> dict[str, tuple[int, int]]:
    return {"question": (0, n // 2), "prompt": (n // 2, n // 2 + 16), "rationale": (n // 2 + 16, n)}


def build(way: str, n: int) -> Callable[[], Any]:
    """The step of one way on n tokens of text-like ids; a tiny pass has run before."""
    from llmcore.models import load_model

    network = load_model("smollm2", device="cpu", dtype=torch.float32).model
    generator = torch.Generator().manual_seed(0)

    def inputs(length: int) -> tuple[torch.Tensor, int]:
        return torch.randint(1000, 20000, (1, length), generator=generator), 1234

    def plain(length: int, attentions: bool) -> Any:
        ids, target = inputs(length)
        flags = [p.requires_grad for p in network.parameters()]
        network.requires_grad_(False)
        before = network.config._attn_implementation
        network.set_attn_implementation("eager" if attentions else "sdpa")
        leaf = network.get_input_embeddings().register_forward_hook(lambda _module, _args, out: out.detach().requires_grad_())
        try:
            out = network(input_ids=ids, use_cache=False, logits_to_keep=1, output_attentions=attentions)
            for a in out.attentions or ():
                a.retain_grad()
            torch.nn.functional.cross_entropy(out.logits[:, -1].float(), torch.tensor([target])).backward()
            if not attentions:
                return None
            labels = torch.empty(length, dtype=torch.long)
            for index, (start, end) in enumerate(_segments(length).values()):
                labels[start:end] = index
            onehot = torch.nn.functional.one_hot(labels, 3).float()
            with torch.no_grad():  # else the bins' own graph would keep every product
                return torch.stack([onehot.T @ (a[0] * a.grad[0]).abs() @ onehot for a in out.attentions])
        finally:
            leaf.remove()
            network.set_attn_implementation(before)
            for parameter, flag in zip(network.parameters(), flags, strict=True):
                parameter.requires_grad_(flag)

    def ours(length: int, checkpoint: bool) -> Any:
        from llmcore.attention import FlowRecorder

        ids, target = inputs(length)
        return (
            FlowRecorder(network, _segments(length), checkpoint=checkpoint).run(ids, target_positions=length - 1, target_ids=target).sums[0]
        )

    def step(length: int = n) -> Any:
        generator.manual_seed(length)
        return ours(length, way == "llmcore recomputed") if way.startswith("llmcore") else plain(length, way == "eager")

    step(48)
    return step


def kernel(n: int) -> Callable[[], Any]:
    """The bins of all layers alone, planned once as a recorder does."""
    from llmcore.kernels.saliency_flow import attention_with_lse, plan_saliency_flow, planned_saliency_flow

    q, do = torch.randn(1, HEADS, n, HEAD_DIM), torch.randn(1, HEADS, n, HEAD_DIM)
    k, v = torch.randn(1, KV_HEADS, n, HEAD_DIM), torch.randn(1, KV_HEADS, n, HEAD_DIM)
    _, lse = attention_with_lse(q, k, v)
    ids = (torch.arange(n)[None] * 3) // n

    def step() -> None:
        plan = plan_saliency_flow(ids, num_row_segments=3, num_col_segments=3)
        for _ in range(LAYERS):
            planned_saliency_flow(plan, q, k, v, do, lse)

    return step


def flop(n: int) -> float:
    return 2.0 * n * n * HEAD_DIM * HEADS * LAYERS


def exponentials(n: int) -> float:
    return n * n * HEADS * LAYERS / 2.0


def _exp_step() -> Callable[[], Any]:
    """2^22 exponentials of numbers that stay in the second cache."""
    x = torch.randn(1 << 17)
    out = torch.empty_like(x)

    def step() -> None:
        for _ in range(32):
            torch.exp(x, out=out)

    return step


WAYS = ("flash, no saliency", "llmcore", "eager")


def measure(n: int, *, rounds: int) -> dict[str, Any]:
    with contextlib.ExitStack() as stack:
        ways = {way: stack.enter_context(harness.Remote(build, (way, n), result=way != WAYS[0])) for way in WAYS}
        gemm = harness.gemm_step(2048, 2048, 2048, torch.float32)
        yardsticks = {"bins alone": kernel(n), "product 2048^3": gemm, "exp 2^22": _exp_step()}
        rows = harness.interleaved({**ways, **yardsticks}, rounds=rounds, slow_rounds=rounds)
        first = {way: remote.first for way, remote in ways.items() if remote.first is not None}
    truth, got = first["eager"].result, first["llmcore"].result
    error = ((got - truth).abs().max() / truth.abs().max()).item()
    if not error < 1e-4:
        raise RuntimeError(f"n = {n}: bins differ from eager attention by {error:.1e} of the largest; no times for a wrong result")
    rate = 2 * 2048**3 / rows["product 2048^3"]["median_ms"] / 1e6
    exp_rate = 2**22 / rows["exp 2^22"]["median_ms"] / 1e6
    flash, total, eager, bins = (rows[name]["median_ms"] for name in (*WAYS, "bins alone"))
    peaks = {way: run.peak_bytes for way, run in first.items()}
    return {
        "n": n, "rows": rows, "peak_bytes": peaks, "error_of_largest_bin": error, "bins_flop": flop(n), "product_gflops": rate,
        "exp_giga_per_second": exp_rate, "bins_gflops": flop(n) / bins / 1e6,
        "bins_share_of_product_rate": flop(n) / bins / 1e6 / rate,
        "bins_share_of_floor": (flop(n) / rate + exponentials(n) / exp_rate) / bins / 1e6,
        "added_over_flash_vs_eager": (total - flash) / (eager - flash), "total_vs_eager": total / eager, "total_vs_flash": total / flash,
        "extra_memory_over_flash": peaks["llmcore"] / peaks[WAYS[0]] - 1, "eager_memory_vs_flash": peaks["eager"] / peaks[WAYS[0]],
    }  # fmt: skip


def markdown(content: dict[str, Any]) -> str:
    """The README table of one result file."""
    if "shapes" not in content:
        return (f"n = {content['n']}, SmolLM2-135M, float32, every layer recomputed in the backward: {content['seconds']:.0f} s, "
                f"peak {content['peak_bytes'] / 2**20:.0f} MiB above the weights, one run.")
    rates = f"{content['shapes'][-1]['product_gflops']:.0f} GFLOP/s"
    if "exp_giga_per_second" in content["shapes"][-1]:
        rates += f", {content['shapes'][-1]['exp_giga_per_second']:.1f}e9 exp/s"
    lines = [f"SmolLM2-135M, float32, one sequence, three segments; rates of this machine: {rates}.", "",
             "| n | step | median ms [p20, p80] | rounds | peak MiB | of eager's time |", "|---:|---|---:|---:|---:|---:|"]
    for shape in content["shapes"]:
        eager = shape["rows"]["eager"]["median_ms"]
        for name in WAYS:
            row, peak = shape["rows"][name], shape["peak_bytes"].get(name)
            lines.append(f"| {shape['n']} | {name} | {row['median_ms']:.0f} [{row['p20_ms']:.0f}, {row['p80_ms']:.0f}] | {row['rounds']} "
                         f"| {'' if peak is None else f'{peak / 2**20:.0f}'} | {row['median_ms'] / eager:.2f} |")
    lines.append("")
    for shape in content["shapes"]:
        flash, eager = (shape["rows"][name]["median_ms"] for name in ("flash, no saliency", "eager"))
        added = f"time added over flash {shape['added_over_flash_vs_eager']:.2f} of what eager adds"
        if eager <= flash:
            added = "eager no slower than flash, so shares of added time mean nothing"
        memory = f"memory over flash {shape['extra_memory_over_flash']:+.1%}; " if "extra_memory_over_flash" in shape else ""
        floor = f"{shape['bins_share_of_floor']:.2f} of the floor, " if "bins_share_of_floor" in shape else ""
        lines.append(f"n = {shape['n']}: {added}; {memory}bins at {floor}{shape['bins_share_of_product_rate']:.2f} of the product's rate; "
                     f"largest difference from eager {shape['error_of_largest_bin']:.0e} of the largest bin.\n")
    return "\n".join(lines).rstrip()


def _print(result: dict[str, Any]) -> None:
    print(f"\nn = {result['n']}, bins differ from eager by {result['error_of_largest_bin']:.1e} of the largest")
    for name, row in result["rows"].items():
        peak = result["peak_bytes"].get(name)
        print(
            f"  {name:<20} {row['median_ms']:10.1f} ms [{row['p20_ms']:.1f} {row['p80_ms']:.1f}]  "
            f"{f'{peak / 2**20:8.0f} MiB' if peak else ''}"
        )
    for name, x in result.items():
        if isinstance(x, float):
            print(f"  {name:<28} {x:.3g}")


def run(sizes: list[int], long: int | None, rounds: int, *, save: bool = False) -> dict[str, Any]:
    results: dict[str, Any] = {}
    if long:
        with harness.Remote(build, ("llmcore recomputed", long), result=True) as remote:
            once = remote.run()
        if not bool(once.result.isfinite().all()):
            raise RuntimeError(f"n = {long}: bins that are no numbers")
        results["long"] = {"n": long, "way": "llmcore recomputed", "seconds": once.wall_ms / 1e3, "peak_bytes": once.peak_bytes}
        print(f"n = {long}, layers recomputed: {once.wall_ms / 1e3:.1f} s, peak {once.peak_bytes / 2**20:.0f} MiB, one run", flush=True)
        if save:
            harness.save("saliency_flow_long", results["long"])
    for n in sizes:
        result = results[f"n{n}"] = measure(n, rounds=rounds)
        if save:  # a file a length, so that each length can be measured again alone
            harness.save(f"saliency_flow_{n}", {"shapes": [result]})
        _print(result)
        sys.stdout.flush()
    return results


def gpu(rounds: int = 11, *, save: bool = False) -> dict[str, Any]:
    """One layer, 32 query and 8 key/value heads, bfloat16, causal, three segments: bins and flash forward interleaved, each call
    synchronised (planning on the device included); pruned pairs; a gradient in the last row alone; extra memory at n = 131072."""
    if not torch.cuda.is_available():
        raise SystemExit("bench_saliency_flow --gpu needs a CUDA or ROCm device: none here, nothing measured")
    from llmcore.kernels.saliency_flow import attention_with_lse, saliency_flow, saliency_flow_reference

    heads, kv_heads, device = 32, 8, torch.device("cuda")

    def layer(n: int, size: int) -> tuple[torch.Tensor, ...]:
        generator = torch.Generator(device).manual_seed(n)
        shapes = ((heads, n), (kv_heads, n), (kv_heads, n), (heads, n))
        tensors = [torch.randn(1, *shape, size, generator=generator, device=device, dtype=torch.bfloat16) for shape in shapes]
        ids = torch.arange(n, device=device)[None] * 3 // n
        return *tensors, attention_with_lse(*tensors[:3])[1], ids

    counts: dict[str, Any] = {"num_row_segments": 3, "num_col_segments": 3, "backend": "triton"}
    small = layer(1024, 128)
    wide = [t.double() for t in small[:4]]
    truth = saliency_flow_reference(*wide, None, small[5]).abs_sum
    error = ((saliency_flow(*small, **counts).abs_sum - truth).abs() / truth.clamp(min=1e-30)).max().item()
    if not error < 5e-3:
        raise RuntimeError(f"bins differ from float64 by {error:.1e}; no times for a wrong result")
    results: dict[str, Any] = {"relative_error_at_1024": error, "shapes": []}
    one = torch.zeros(3, 3, dtype=torch.bool, device=device)
    one[2, 0] = True
    for n, size in ((2048, 64), (2048, 128), (8192, 64), (8192, 128), (32768, 64), (32768, 128)):
        query, key, value, grad, lse, ids = layer(n, size)
        last = torch.zeros_like(grad)
        last[:, :, -1] = grad[:, :, -1]
        steps: dict[str, Callable[[], Any]] = {
            "flash forward": lambda q=query, k=key, v=value: attention_with_lse(q, k, v),
            "bins": lambda t=(query, key, value, grad, lse, ids): saliency_flow(*t, **counts),
            "bins, one of six visible pairs": lambda t=(query, key, value, grad, lse, ids): saliency_flow(*t, pairs=one, **counts),
            "bins, gradient in the last row": lambda t=(query, key, value, last, lse, ids): saliency_flow(*t, **counts),
        }
        rows = harness.interleaved(steps, rounds=rounds, warmup=3)
        work = 2.0 * n * n * size * heads
        ratio = rows["bins"]["median_ms"] / rows["flash forward"]["median_ms"]
        results["shapes"].append(
            {"n": n, "head_dim": size, "rows": rows, "bins_tflops": work / rows["bins"]["median_ms"] / 1e9, "bins_vs_flash_forward": ratio}
        )
        print(f"n = {n}, d = {size}: " + ", ".join(f"{name} {row['median_ms']:.3f} ms" for name, row in rows.items()))
        print(f"  bins take {ratio:.2f} of the flash forward's time")
    query, key, value, grad, lse, ids = layer(131072, 128)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    saliency_flow(query, key, value, grad, lse, ids, **counts)
    torch.cuda.synchronize()
    results["extra_bytes_at_131072"] = torch.cuda.max_memory_allocated() - before
    print(f"n = 131072, d = 128: {results['extra_bytes_at_131072'] / 2**20:.0f} MiB above the inputs")
    if save:
        harness.save("saliency_flow_gpu", results)
    return results


def test_saliency_flow_small():
    results = run([256], None, 3)
    assert results["n256"]["total_vs_eager"] < 2


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="256,1024,2048")
    parser.add_argument("--long", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    if options.gpu:
        gpu(save=options.save)
        sys.exit()
    run([int(x) for x in options.sizes.split(",") if x], options.long or None, options.rounds, save=options.save)
