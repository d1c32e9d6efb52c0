"""Which of the three exact algorithms computes the sums of a pair of products fastest, from flops and passes over entries.

    factor   flops of Gram matrices: half of a's and b's own (and the tiles on the diagonal), all of the cross products
    stream   2 K² (R_A + R_B) flops and five sums for each of K² entries, in cache
    direct   the same flops by the library's product, and K² entries of both matrices written and read again

Only the ratios of the rates decide, so the table serves other machines of its kind and any number of threads; kernels/invariants.py's
`measure_rates` takes them from the machine at hand.
"""

from __future__ import annotations

import dataclasses

import torch
from llmcore.kernels import backends

# K tokens, R depth of a product (R_A, R_B may differ)

ALGORITHMS = ("factor", "stream", "direct")
_ROWS, _EVERY, _STRIPE = 96, 12, 1024  # of the compiled kernel's tiles: rows at most, what they are a multiple of, columns of a task


@dataclasses.dataclass(frozen=True)
class SumsPlan:
    """What each algorithm would cost for one channel of one pair, and the choice. Bytes: peak memory beyond the factors."""

    algorithm: str
    seconds: dict[str, float]
    flops: dict[str, float]
    peak_bytes: dict[str, int]
    reason: str

    def to_json(self) -> dict:
        return dataclasses.asdict(self)


# GEMM flops a second with the sums taken per tile, flops a second of the library's stored product, seconds an entry to add five sums up
# in a tile and to write and read two stored entries, seconds to pack an element. Two threads each, avx2 of an AMD EPYC, avx512 of an Intel
# Xeon (its packing by analogy: not measured since packing changed). `measure_rates` finds such a row, bench/bench_huref.py planner says
# what it is worth.
_TABLE = {
    "avx2": {"tile_flops": 1.2e11, "stored_flops": 1.25e11, "tile_entry": 3.6e-10, "stored_entry": 4.5e-9, "pack_element": 9e-10},
    "avx512": {"tile_flops": 2.5e11, "stored_flops": 3.5e11, "tile_entry": 2.4e-10, "stored_entry": 2.6e-9, "pack_element": 4e-10},
}


def table_rates() -> dict[str, float]:
    """The row of the table for the vector instructions of this machine."""
    wide = backends.extension_error() is None and torch.ops.llmcore.extension_info() >= 2
    return dict(_TABLE["avx512" if wide else "avx2"])


def tile_work(rows: int, columns: int, depth_a: int, depth_b: int, *, symmetric: bool = False) -> tuple[float, float, float]:
    """(flops, entries, packed elements) of the compiled kernel for a pair of products (rows, columns).

    symmetric: tiles begin at the diagonal. The right sides are packed once, the left ones once for each stripe of columns.
    """
    tall = min(_ROWS, -(-rows // (8 * _EVERY)) * _EVERY)
    entries = sum(min(tall, rows - row) * (columns - row) for row in range(0, rows, tall)) if symmetric else rows * columns
    return 2.0 * entries * (depth_a + depth_b), entries, (depth_a + depth_b) * (columns + rows * -(-columns // _STRIPE))


def plan_sums(num_tokens: int, depth_a: int, depth_b: int, *, memory_budget: int | None = None, itemsize: int = 4,
              rates: dict[str, float] | None = None) -> SumsPlan:
    """Choose how to compute the five sums of one pair of products.

    Args:
        num_tokens: K. depth_a, depth_b: R of the two products. itemsize: bytes of an element of the factors.
        memory_budget: bytes that may be taken beside the factors; algorithms above it are left out, as long as one remains.
        rates: as `measure_rates` gives them; a table by vector width by default.
    """
    k, a, b = num_tokens, depth_a, depth_b
    r = {**table_rates(), **(rates or {})}
    work = {"factor": [tile_work(a, a, k, k, symmetric=True), tile_work(b, b, k, k, symmetric=True), tile_work(a, b, k, k)],
            "stream": [tile_work(k, k, a, b)]}
    flops = {name: sum(w[0] for w in parts) for name, parts in work.items()} | {"direct": 2.0 * k * k * (a + b)}
    costs = (1 / r["tile_flops"], r["tile_entry"], r["pack_element"])
    seconds = {name: sum(n * cost for w in parts for n, cost in zip(w, costs, strict=True)) for name, parts in work.items()}
    seconds["direct"] = flops["direct"] / r["stored_flops"] + k * k * r["stored_entry"]
    held = k * (a + b) * itemsize
    peak = {"factor": held, "stream": held, "direct": 2 * k * k * itemsize}
    allowed = [name for name in ALGORITHMS if memory_budget is None or peak[name] <= memory_budget]
    chosen = min(allowed or [min(peak, key=peak.__getitem__)], key=seconds.__getitem__)
    left_out = [name for name in ALGORITHMS if name not in allowed]
    reason = ", ".join(f"{name} {flops[name] / 1e9:.3g} GFLOP {seconds[name] * 1e3:.3g} ms {peak[name] / 1e6:.3g} MB"
                       for name in ALGORITHMS)
    reason += f"; K = {k}, R = {a} and {b}: {chosen}"
    if left_out:
        reason += f" ({', '.join(left_out)} would take more than the budget of {memory_budget} bytes)"
    return SumsPlan(chosen, seconds, flops, peak, reason)
