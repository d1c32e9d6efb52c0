"""Which of the three exact algorithms computes the sums of a pair of products fastest, from flops and passes over entries.

    factor   flops of Gram matrices: half of a's and b's own (whole tiles on the diagonal), all of the cross products
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
_TILE_ROWS, _TILE_COLUMNS, _STRIPE = 96, 256, 1024  # of the compiled kernel


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
# in a tile and to write and read two stored entries, seconds to pack an element. avx2: one thread of an AMD EPYC; avx512: two threads of an
# Intel Xeon. `measure_rates` prints such a row, bench/bench_huref.py planner says what it is worth.
_TABLE = {
    "avx2": {"tile_flops": 4.5e10, "stored_flops": 4.8e10, "tile_entry": 0.9e-9, "stored_entry": 2.6e-9, "pack_element": 1.2e-9},
    "avx512": {"tile_flops": 2.2e11, "stored_flops": 3.5e11, "tile_entry": 2.4e-10, "stored_entry": 2.6e-9, "pack_element": 1.4e-9},
}


def table_rates() -> dict[str, float]:
    """The row of the table for the vector instructions of this machine."""
    wide = backends.extension_error() is None and torch.ops.llmcore.extension_info() >= 2
    return dict(_TABLE["avx512" if wide else "avx2"])


def _symmetric_entries(depth: int) -> int:
    """Entries that the tiles on and above the diagonal of a (depth, depth) product hold."""
    total = 0
    for row in range(0, depth, _TILE_ROWS):
        total += min(_TILE_ROWS, depth - row) * (depth - row // _TILE_COLUMNS * _TILE_COLUMNS)
    return total


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
    gram = 4.0 * k * (_symmetric_entries(a) + _symmetric_entries(b) + a * b)  # two products each
    flops = {"factor": gram, "stream": 2.0 * k * k * (a + b), "direct": 2.0 * k * k * (a + b)}

    def packs(rows: int, columns: int, depth: int) -> int:
        """Elements packed for one product: the right side once, the left side once a stripe of columns."""
        return depth * (columns + rows * -(-columns // _STRIPE))

    packed = 2 * (packs(a, a, k) + packs(b, b, k) + packs(a, b, k))
    entries = (a * a + b * b) / 2 + a * b
    seconds = {
        "factor": gram / r["tile_flops"] + entries * r["tile_entry"] + packed * r["pack_element"],
        "stream": flops["stream"] / r["tile_flops"] + k * k * r["tile_entry"] + packs(k, k, a + b) * r["pack_element"],
        "direct": flops["direct"] / r["stored_flops"] + k * k * r["stored_entry"],
    }
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
