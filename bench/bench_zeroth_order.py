"""Perturbed embeddings and the norm of the finite-difference gradient: bytes moved, and the share of the machine's copy bandwidth.

    python -m pytest bench/bench_zeroth_order.py -s            tables, and bench/results/<device>/zeroth_order.json

Bytes by formula. Perturbation: (1 + P)·B·T·D·itemsize + 4·P·D, the embeddings read once, every shifted copy written once, one table.
Norm of shared directions: the P×P Gram matrix is at hand, 8·B·(P + 1) bytes come in, O(P²) operations. Norm of per-query directions:
nothing is read but seeds; B·P·D normals are drawn, so its rate is normals a second, not a bandwidth. The copy that sets the bandwidth is
torch's own of a tensor of the output's size, interleaved with the rest; it reads as much as it writes, a perturbation only 1/P of that,
so more than 100 % is possible. Peers: plain torch's broadcast add, and the same with the shifts stored.
"""

from __future__ import annotations

from typing import Any

import harness
import torch
from llmcore.kernels.zeroth_order import directions, perturb_embeddings, zeroth_order_gradient

# name, queries, directions, tokens, embedding size
SHAPES = [("one query, SmolLM2", 1, 10, 100, 576), ("one query, 7B", 1, 10, 100, 4096), ("8 queries, 7B", 8, 10, 64, 4096)]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SMOOTHING = 0.02
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def perturbation(shape: tuple[int, int, int, int], dtype: torch.dtype) -> dict[str, Any]:
    """Ours, its peers and the copy, in turn."""
    batch, num_directions, length, dim = shape
    embeddings = torch.randn(batch, length, dim, device=DEVICE).to(dtype)
    mask = torch.ones(batch, length, dtype=torch.bool, device=DEVICE)
    out = torch.empty(batch, num_directions, length, dim, dtype=dtype, device=DEVICE)
    source = torch.empty_like(out).copy_(torch.randn(out.shape, device=DEVICE))
    table = directions(13, num_directions, dim, device=DEVICE)
    shifts = (SMOOTHING * table).to(dtype)[:, :, None, :]

    def ours() -> Any:
        return perturb_embeddings(embeddings, mask, seeds=13, num_directions=num_directions, smoothing=SMOOTHING, out=out)

    def add() -> Any:
        return torch.add(embeddings[:, None], shifts, out=out)

    def add_float32() -> Any:
        return (embeddings.float()[:, None] + SMOOTHING * table[:, :, None, :] * mask[:, None, :, None]).to(dtype)

    truth = embeddings.double()[:, None] + SMOOTHING * table.double()[:, :, None, :]
    assert ((ours().double() - truth).abs() <= torch.finfo(dtype).eps * (truth.abs() + 0.1)).all(), "no time for a wrong result"
    rows = harness.interleaved({"llmcore": ours, "torch add, shifts rounded": add, "torch add in float32": add_float32,
                                "copy": lambda: out.copy_(source)}, rounds=15, slow_rounds=7)  # fmt: skip
    item = embeddings.element_size()
    moved = (1 + num_directions) * batch * length * dim * item + 4 * num_directions * dim
    copied = 2 * out.numel() * item
    bandwidth = copied / rows["copy"]["median_ms"] / 1e6
    for name, row in rows.items():
        row["gb_per_second"] = (copied if name == "copy" else moved) / row["median_ms"] / 1e6
        row["share_of_copy"] = row["gb_per_second"] / bandwidth
    return {"bytes": moved, "rows": rows}


def norm(shape: tuple[int, int, int, int]) -> dict[str, Any]:
    """Shared directions through the cached Gram matrix, and per-query directions in one regenerating pass, beside stored rows."""
    batch, num_directions, _, dim = shape
    batch = max(batch, 8)
    losses, base = torch.rand(batch, num_directions, device=DEVICE).double(), torch.rand(batch, device=DEVICE).double()
    seeds = torch.arange(batch, device=DEVICE)

    def shared() -> Any:
        return zeroth_order_gradient(losses, base, smoothing=SMOOTHING, seeds=13, dim=dim)

    def own() -> Any:
        return zeroth_order_gradient(losses, base, smoothing=SMOOTHING, seeds=seeds, dim=dim)

    def stored() -> Any:
        rows = directions(seeds, num_directions, dim)
        return torch.einsum("bp,bpd->bd", (losses - base[:, None]).float(), rows).norm(dim=1)

    torch.testing.assert_close(own().norm * num_directions * SMOOTHING, stored().double(), rtol=1e-4, atol=0)
    rows = harness.interleaved({"shared, Gram": shared, "per query, regenerated": own, "per query, rows stored": stored}, rounds=15)
    normals = batch * num_directions * dim
    rate = normals / rows["per query, regenerated"]["median_ms"] * 1e3
    return {"queries": batch, "rows": rows, "normals": normals, "normals_per_second": rate}


def markdown(content: dict[str, Any]) -> str:
    """The tables of a result."""
    lines = ["| perturbation | dtype | MB moved | llmcore µs | share of copy | torch add, shifts rounded | torch add in float32 |",
             "|---|---|---:|---:|---:|---:|---:|"]
    for case in content["perturbation"]:
        rows = case["rows"]
        ours, add, wide = (rows[name]["median_ms"] * 1e3 for name in ("llmcore", "torch add, shifts rounded", "torch add in float32"))
        lines.append(f"| {case['shape']} | {case['dtype']} | {case['bytes'] / 1e6:.1f} | {ours:.0f} | "
                     f"{rows['llmcore']['share_of_copy']:.0%} | {add:.0f} | {wide:.0f} |")
    lines += ["", "| norm | queries | shared, Gram µs | per query µs | rows stored µs | normals/s |", "|---|---:|---:|---:|---:|---:|"]
    for case in content["norm"]:
        shared, own, stored = (case["rows"][name]["median_ms"] * 1e3
                               for name in ("shared, Gram", "per query, regenerated", "per query, rows stored"))  # fmt: skip
        lines.append(f"| {case['shape']} | {case['queries']} | {shared:.0f} | {own:.0f} | {stored:.0f} "
                     f"| {case['normals_per_second'] / 1e6:.0f}·10⁶ |")
    return "\n".join(lines)


def test_zeroth_order(capsys):
    content: dict[str, Any] = {"perturbation": [], "norm": []}
    for name, *shape in SHAPES:
        for dtype_name, dtype in DTYPES.items():
            content["perturbation"].append({"shape": name, "dtype": dtype_name, **perturbation(tuple(shape), dtype)})
        content["norm"].append({"shape": name, **norm(tuple(shape))})
    path = harness.save("zeroth_order", content)
    with capsys.disabled():
        print("\n" + markdown(content))
        print(path)
