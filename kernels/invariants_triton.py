"""Triton kernels of kernels/invariants.py: a pair of products tile by tile with five sums each, one product written once, count sketch.

A tile (BLOCK_M, BLOCK_N) of A = a_left a_rightᵀ and the same tile of B are accumulated one after the other and summed in float64 in the
# epilogue. Each program writes its own five numbers, added afterwards in program order: no atomics, so results repeat exactly.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK_M, _BLOCK_N, _BLOCK_R = 64, 64, 32


@triton.jit
def _pair_kernel(a_left, a_right, b_left, b_right, sums, m, n, DEPTH_A: tl.constexpr, DEPTH_B: tl.constexpr,
                 BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr):
    """sums (programs, 5): ΣA, ΣB, ΣA², ΣB², ΣAB of tile (pid 0, pid 1); factors are row-major (rows, depth)."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok, column_ok = rows < m, columns < n
    rows64, columns64 = rows.to(tl.int64), columns.to(tl.int64)
    acc_a = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, DEPTH_A, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        left = tl.load(a_left + rows64[:, None] * DEPTH_A + r[None, :], mask=row_ok[:, None] & (r < DEPTH_A)[None, :], other=0.0)
        right = tl.load(a_right + columns64[None, :] * DEPTH_A + r[:, None], mask=column_ok[None, :] & (r < DEPTH_A)[:, None], other=0.0)
        acc_a = tl.dot(left, right, acc_a, input_precision="ieee")
    acc_b = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, DEPTH_B, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        left = tl.load(b_left + rows64[:, None] * DEPTH_B + r[None, :], mask=row_ok[:, None] & (r < DEPTH_B)[None, :], other=0.0)
        right = tl.load(b_right + columns64[None, :] * DEPTH_B + r[:, None], mask=column_ok[None, :] & (r < DEPTH_B)[:, None], other=0.0)
        acc_b = tl.dot(left, right, acc_b, input_precision="ieee")
    # Rows and columns beyond the edge are exact zeros in both tiles and add nothing.
    a = tl.reshape(acc_a, (BLOCK_M * BLOCK_N,)).to(tl.float64)
    b = tl.reshape(acc_b, (BLOCK_M * BLOCK_N,)).to(tl.float64)
    out = sums + (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * 5
    tl.store(out, tl.sum(a))
    tl.store(out + 1, tl.sum(b))
    tl.store(out + 2, tl.sum(a * a))
    tl.store(out + 3, tl.sum(b * b))
    tl.store(out + 4, tl.sum(a * b))


@triton.jit
def _product_kernel(left, right, mean, scale, out, m, n, DEPTH: tl.constexpr,
                    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr):
    """out (m, n) = (left rightᵀ - mean) · scale; mean and scale are float64 scalars in memory, so that no value crosses to the host."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok, column_ok = rows < m, columns < n
    rows64, columns64 = rows.to(tl.int64), columns.to(tl.int64)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, DEPTH, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        x = tl.load(left + rows64[:, None] * DEPTH + r[None, :], mask=row_ok[:, None] & (r < DEPTH)[None, :], other=0.0)
        y = tl.load(right + columns64[None, :] * DEPTH + r[:, None], mask=column_ok[None, :] & (r < DEPTH)[:, None], other=0.0)
        acc = tl.dot(x, y, acc, input_precision="ieee")
    value = (acc - tl.load(mean).to(tl.float32)) * tl.load(scale).to(tl.float32)
    tl.store(out + rows64[:, None] * n + columns64[None, :], value.to(out.dtype.element_ty), mask=row_ok[:, None] & column_ok[None, :])


@triton.jit
def _stored_kernel(a, b, sums, count, BLOCK: tl.constexpr):
    """sums (programs, 5) of BLOCK stored entries."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(a + index, mask=index < count, other=0.0).to(tl.float64)
    y = tl.load(b + index, mask=index < count, other=0.0).to(tl.float64)
    out = sums + tl.program_id(0).to(tl.int64) * 5
    tl.store(out, tl.sum(x, 0))
    tl.store(out + 1, tl.sum(y, 0))
    tl.store(out + 2, tl.sum(x * x, 0))
    tl.store(out + 3, tl.sum(y * y, 0))
    tl.store(out + 4, tl.sum(x * y, 0))


@triton.jit
def _count_sketch_kernel(rows, members, signs, out, num_rows, depth, LONGEST: tl.constexpr, BLOCK: tl.constexpr):
    """out (width, depth): one program a bin and a block of columns; `members` (width, LONGEST) lists each bin's rows, then -1."""
    bin = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    places = bin * LONGEST + tl.arange(0, LONGEST)
    row = tl.load(members + places)
    sign = tl.load(signs + places)
    wanted = (row >= 0) & (row < num_rows)
    values = tl.load(rows + row[:, None] * depth + columns[None, :], mask=wanted[:, None] & (columns < depth)[None, :], other=0.0)
    total = tl.sum(values.to(tl.float32) * sign[:, None], 0)
    tl.store(out + bin * depth + columns, total, mask=columns < depth)


def _pair_warps(dtype: torch.dtype) -> int:
    """Two float32 accumulators and their operands fill the registers of four warps (8 bytes spilled on sm_80): eight there."""
    return 8 if dtype == torch.float32 else 4


def tile_sums(a_left: torch.Tensor, a_right: torch.Tensor, b_left: torch.Tensor, b_right: torch.Tensor) -> torch.Tensor:
    """(5,) float64 sums of the pair of products; transposed views are copied to row-major."""
    a_left, a_right, b_left, b_right = (t.contiguous() for t in (a_left, a_right, b_left, b_right))
    m, n = a_left.shape[0], a_right.shape[0]
    if m == 0 or n == 0:
        return torch.zeros(5, dtype=torch.float64, device=a_left.device)
    grid = (triton.cdiv(m, _BLOCK_M), triton.cdiv(n, _BLOCK_N))
    sums = torch.empty(grid[0] * grid[1], 5, dtype=torch.float64, device=a_left.device)
    _pair_kernel[grid](a_left, a_right, b_left, b_right, sums, m, n, a_left.shape[1], b_left.shape[1],
                       BLOCK_M=_BLOCK_M, BLOCK_N=_BLOCK_N, BLOCK_R=_BLOCK_R, num_warps=_pair_warps(a_left.dtype), num_stages=3)
    return sums.sum(0)


def product(left: torch.Tensor, right: torch.Tensor, mean: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> None:
    """out = (left rightᵀ - mean) · scale."""
    if out.numel() == 0:
        return
    grid = (triton.cdiv(out.shape[0], _BLOCK_M), triton.cdiv(out.shape[1], _BLOCK_N))
    _product_kernel[grid](left.contiguous(), right.contiguous(), mean, scale, out, out.shape[0], out.shape[1], left.shape[1],
                          BLOCK_M=_BLOCK_M, BLOCK_N=_BLOCK_N, BLOCK_R=_BLOCK_R, num_warps=4, num_stages=3)


def stored_sums(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(5,) float64 sums of two stored matrices."""
    if a.numel() == 0:
        return torch.zeros(5, dtype=torch.float64, device=a.device)
    grid = (triton.cdiv(a.numel(), 4096),)
    sums = torch.empty(grid[0], 5, dtype=torch.float64, device=a.device)
    _stored_kernel[grid](a, b, sums, a.numel(), BLOCK=4096, num_warps=8)
    return sums.sum(0)


def count_sketch(rows: torch.Tensor, bins: torch.Tensor, signs: torch.Tensor, width: int) -> torch.Tensor:
    """(width, depth) float32. Rows are listed by bin on the host, so that each bin is summed by one program in row order."""
    order = torch.sort(bins, stable=True).indices
    counts = torch.bincount(bins, minlength=width)
    longest = triton.next_power_of_2(max(1, int(counts.max()) if len(bins) else 0))
    place = torch.arange(len(bins)) - (counts.cumsum(0) - counts)[bins[order]]
    members = torch.full((width, longest), -1, dtype=torch.int64)
    members[bins[order], place] = order
    member_signs = torch.zeros(width, longest)
    member_signs[bins[order], place] = signs[order]
    out = torch.empty(width, rows.shape[1], dtype=torch.float32, device=rows.device)
    if out.numel():
        block = max(16, min(128, 8192 // longest))
        _count_sketch_kernel[(width, triton.cdiv(rows.shape[1], block))](
            rows, members.to(rows.device), member_signs.to(rows.device), out, rows.shape[0], rows.shape[1],
            LONGEST=longest, BLOCK=block, num_warps=4)
    return out


def aot_cases():
    from llmcore.kernels.aot import AotCase

    blocks = {"BLOCK_M": _BLOCK_M, "BLOCK_N": _BLOCK_N, "BLOCK_R": _BLOCK_R}
    constexpr = dict.fromkeys(blocks, "constexpr")
    cases = []
    for kind in ("fp32", "bf16", "fp16"):
        pair = {"a_left": f"*{kind}", "a_right": f"*{kind}", "b_left": f"*{kind}", "b_right": f"*{kind}", "sums": "*fp64",
                "m": "i32", "n": "i32", "DEPTH_A": "constexpr", "DEPTH_B": "constexpr", **constexpr}
        cases.append(AotCase(f"invariants pair {kind}", _pair_kernel, pair, {"DEPTH_A": 1024, "DEPTH_B": 1024, **blocks},
                             num_warps=8 if kind == "fp32" else 4))
        single = {"left": f"*{kind}", "right": f"*{kind}", "mean": "*fp64", "scale": "*fp64", "out": f"*{kind}",
                  "m": "i32", "n": "i32", "DEPTH": "constexpr", **constexpr}
        cases.append(AotCase(f"invariants product {kind}", _product_kernel, single, {"DEPTH": 1024, **blocks}, divisible=("n",)))
    cases.append(AotCase("invariants stored fp32", _stored_kernel,
                         {"a": "*fp32", "b": "*fp32", "sums": "*fp64", "count": "i32", "BLOCK": "constexpr"}, {"BLOCK": 4096}, num_warps=8))
    cases.append(AotCase("invariants count sketch fp32", _count_sketch_kernel,
                         {"rows": "*fp32", "members": "*i64", "signs": "*fp32", "out": "*fp32", "num_rows": "i32", "depth": "i32",
                          "LONGEST": "constexpr", "BLOCK": "constexpr"}, {"LONGEST": 16, "BLOCK": 128}, divisible=("depth",)))
    return cases
