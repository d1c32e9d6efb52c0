"""Triton kernels of the zeroth-order family: directions, perturbed embeddings, combined rows, drawn in registers from (seed, row, element).

Normals are float32: Philox words are exact, Box-Muller is within 2e-6 of the float64 reference. One program of the perturbation owns a
block of D for one (query, direction), draws it once and streams the tokens of its share past it; reads of the embeddings are shared
through L2 by the P programs of a block. Bound: (1 + P)·B·T·D·itemsize bytes. Combined rows and their squared norms accumulate in float64,
D block by D block, partial norms summed in block order.
"""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl
from llmcore.kernels.aot import AotCase
from torch import Tensor

# B queries, P directions a query, T tokens, D embedding size, S seeds (B, or 1 shared by all queries)

BLOCK_D = 1024  # elements of D a program draws
TOKENS = 16  # tokens it streams: enough to pay for the draw, small enough to fill the device at B = 1


@triton.jit
def _round(c0, c1, c2, c3, k0, k1):
    """One Philox round. Products are formed in 64 bits: the high word of a 32 × 32 bit product has no portable primitive."""
    even = c0.to(tl.uint64) * 0xD2511F53
    odd = c2.to(tl.uint64) * 0xCD9E8D57
    return (
        (odd >> 32).to(tl.uint32) ^ c1 ^ k0,
        odd.to(tl.uint32),
        (even >> 32).to(tl.uint32) ^ c3 ^ k1,
        even.to(tl.uint32),
        k0 + 0x9E3779B9,
        k1 + 0xBB67AE85,
    )


@triton.jit
def _minus_log(x):
    """-ln((x + 1/2) 2^-32) for 32-bit x. Next to 1 the rounded uniform loses the argument: there the series in 1 - u, exact in float32."""
    u = (x.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    t = ((0xFFFFFFFF - x).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    near_one = t * (1.0 + t * (0.5 + t * (0.33333333 + t * (0.25 + t * 0.2))))
    return tl.where(t < 0.015625, near_one, -tl.log(u))


@triton.jit
def _cos_turn(x):
    """cos(2π (x + 1/2) 2^-32): the nearest quarter turn is split off in integers, so the angle is reduced without error."""
    quarter = (x + 0x20000000) >> 30
    angle = ((x - (quarter << 30)).to(tl.int32, bitcast=True).to(tl.float32) + 0.5) * 1.4629180792671596e-09
    s = angle * angle
    sine = angle * (1.0 + s * (-0.16666667 + s * (0.0083333333 + s * (-0.00019841270 + s * 2.7557319e-06))))
    cosine = 1.0 + s * (-0.5 + s * (0.041666667 + s * (-0.0013888889 + s * (2.4801587e-05 + s * -2.7557319e-07))))
    value = tl.where((quarter & 1) == 1, sine, cosine)
    return tl.where(((quarter + 1) & 2) == 2, -value, value)


@triton.jit
def _normal(seed, row, element):
    """N(0, 1) number `element` (int32 block) of direction `row` of `seed`: lane element % 4 of counter (element / 4, row, 0, stream).

    Every element runs its own counter: the fourfold arithmetic hides behind the memory it feeds and the layout stays that of the stores.
    """
    k0 = (seed & 0xFFFFFFFF).to(tl.uint32)
    k1 = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    c0 = (element // 4).to(tl.uint32)
    c1 = (c0 * 0) + row.to(tl.uint32)
    c2 = c0 * 0
    c3 = c2 + 0x47434431
    c0, c1, c2, c3, k0, k1 = _round(c0, c1, c2, c3, k0, k1)
    c0, c1, c2, c3, k0, k1 = _round(c0, c1, c2, c3, k0, k1)
    c0, c1, c2, c3, k0, k1 = _round(c0, c1, c2, c3, k0, k1)
    c0, c1, c2, c3, k0, k1 = _round(c0, c1, c2, c3, k0, k1)
    c0, c1, c2, c3, k0, k1 = _round(c0, c1, c2, c3, k0, k1)
    c0, c1, c2, c3, k0, k1 = _round(c0, c1, c2, c3, k0, k1)
    c0, c1, c2, c3, k0, k1 = _round(c0, c1, c2, c3, k0, k1)
    c0, c1, c2, c3, k0, k1 = _round(c0, c1, c2, c3, k0, k1)
    c0, c1, c2, c3, k0, k1 = _round(c0, c1, c2, c3, k0, k1)
    c0, c1, c2, c3, k0, k1 = _round(c0, c1, c2, c3, k0, k1)
    lane = element % 4
    second = lane >= 2
    radius = tl.sqrt(2.0 * _minus_log(tl.where(second, c2, c0)))
    # sin(φ) is cos(φ - quarter turn): odd lanes step back by 2^30, modulo 2^32.
    turn = tl.where(second, c3, c1) - tl.where(lane % 2 == 1, 0x40000000, 0).to(tl.uint32)
    return radius * _cos_turn(turn)


@triton.jit
def _directions_kernel(seeds, out, num_directions, dim, half, BLOCK: tl.constexpr):
    """Rows j >= half are the negatives of rows j - half; half = num_directions when there is no mirror."""
    j = tl.program_id(1)
    s = tl.program_id(2).to(tl.int64)
    d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mirrored = j >= half
    value = _normal(tl.load(seeds + s), tl.where(mirrored, j - half, j), d)
    tl.store(out + (s * num_directions + j) * dim + d, tl.where(mirrored, -value, value), mask=d < dim)


@triton.jit
def _perturb_kernel(
    embeddings,
    moves,
    seeds,
    table,
    out,
    length,
    dim,
    num_directions,
    half,
    smoothing,
    smoothing_rest,  #
    stride_eb,
    stride_et,
    stride_ob,
    stride_op,
    stride_ot,
    stride_seed,
    stride_table,  #
    STORED: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[b, j, t, block] for TOKENS tokens. STORED: directions are read from table (S, P, D), not drawn.

    Grid (D blocks · token shares, P, B).
    """
    shares = tl.cdiv(length, TOKENS)
    block = tl.program_id(0) // shares
    first = (tl.program_id(0) % shares) * TOKENS
    j = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    d = block * BLOCK + tl.arange(0, BLOCK)
    inside = d < dim
    if STORED:
        u = tl.load(table + b * stride_table + j.to(tl.int64) * dim + d, mask=inside, other=0.0)
    else:
        mirrored = j >= half
        u = _normal(tl.load(seeds + b * stride_seed), tl.where(mirrored, j - half, j), d)
        u = tl.where(mirrored, -u, u)
    shift = smoothing * u
    shift_wide = u.to(tl.float64) * smoothing + u.to(tl.float64) * smoothing_rest  # float64 embeddings only
    for i in tl.static_range(TOKENS):
        t = first + i
        here = inside & (t < length)
        e = tl.load(embeddings + b * stride_eb + t.to(tl.int64) * stride_et + d, mask=here, other=0.0)
        moved = tl.load(moves + b * length + t, mask=t < length, other=0) != 0
        wide = e.to(tl.float64) + shift_wide if embeddings.dtype.element_ty == tl.float64 else e.to(tl.float32) + shift
        # A row outside the mask keeps its bits, those of NaN and -0 included.
        value = tl.where(moved, wide.to(e.dtype), e)
        tl.store(out + b * stride_ob + j.to(tl.int64) * stride_op + t.to(tl.int64) * stride_ot + d, value, mask=here)


@triton.jit
def _combine_kernel(
    seeds, coefficients, partial, gradient, dim, num_blocks, P: tl.constexpr, HALF: tl.constexpr, WRITE: tl.constexpr, BLOCK: tl.constexpr
):
    """One D block of sum_j c_bj u_bj in float64, and its share of the squared norm."""
    b = tl.program_id(1).to(tl.int64)
    d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = d < dim
    seed = tl.load(seeds + b)
    total = tl.zeros((BLOCK,), dtype=tl.float64)
    for j in range(0, HALF):
        c = tl.load(coefficients + b * P + j)
        if HALF < P:
            c -= tl.load(coefficients + b * P + j + HALF)
        total += c * _normal(seed, j + 0 * tl.program_id(0), d).to(tl.float64)
    total = tl.where(inside, total, 0.0)
    tl.store(partial + b * num_blocks + tl.program_id(0), tl.sum(total * total, 0))
    if WRITE:
        tl.store(gradient + b * dim + d, total, mask=inside)


def _half(num_directions: int, kind: str) -> int:
    return num_directions // 2 if kind == "antithetic" else num_directions


def _block(dim: int) -> int:
    return min(BLOCK_D, max(32, triton.next_power_of_2(dim)))


def directions(seeds: Tensor, num_directions: int, dim: int, kind: str) -> Tensor:
    """(S, P, D) float32; sphere rows are scaled by their float64 norms afterwards. Orthogonal rows are made by the caller."""
    out = torch.empty(len(seeds), num_directions, dim, dtype=torch.float32, device=seeds.device)
    block = _block(dim)
    _directions_kernel[(triton.cdiv(dim, block), num_directions, len(seeds))](
        seeds, out, num_directions, dim, _half(num_directions, kind), BLOCK=block, num_warps=4
    )
    if kind == "sphere":
        out.mul_((dim**0.5 / out.double().norm(dim=-1, keepdim=True)).float())
    return out


def perturb(embeddings: Tensor, token_mask: Tensor, seeds: Tensor, table: Tensor | None, smoothing: float, kind: str, out: Tensor) -> None:
    """Write out[b, j] = embeddings[b] + smoothing · mask · u_bj; directions from `table` (S, P, D) float32 when it is given."""
    batch, length, dim = embeddings.shape
    num_directions, block = out.shape[1], _block(dim)
    high = struct.unpack("f", struct.pack("f", smoothing))[0]  # scalars reach a kernel as float32: the rest travels beside
    grid = (triton.cdiv(dim, block) * triton.cdiv(length, TOKENS), num_directions, batch)
    _perturb_kernel[grid](
        embeddings, token_mask.contiguous().view(torch.uint8), seeds, table, out, length, dim, num_directions, _half(num_directions, kind),
        high, smoothing - high, embeddings.stride(0), embeddings.stride(1), out.stride(0), out.stride(1), out.stride(2),
        int(len(seeds) > 1),
        0 if table is None or len(table) == 1 else table.stride(0), STORED=table is not None, TOKENS=TOKENS, BLOCK=block, num_warps=4,
    )  # fmt: skip


def combine(seeds: Tensor, coefficients: Tensor, dim: int, kind: str, want_gradient: bool) -> tuple[Tensor, Tensor]:
    """(B,) squared norm and (B, D) or (B, 0) value of sum_j coefficients_bj u_bj, float64."""
    batch, num_directions = coefficients.shape
    block = _block(dim)
    num_blocks = triton.cdiv(dim, block)
    partial = torch.empty(batch, num_blocks, dtype=torch.float64, device=seeds.device)
    gradient = torch.empty(batch, dim if want_gradient else 0, dtype=torch.float64, device=seeds.device)
    _combine_kernel[(num_blocks, batch)](
        seeds,
        coefficients,
        partial,
        gradient,
        dim,
        num_blocks,
        P=num_directions,
        HALF=_half(num_directions, kind),
        WRITE=want_gradient,
        BLOCK=block,
        num_warps=4,
    )
    return partial.sum(dim=1), gradient


def aot_cases() -> list[AotCase]:
    """Directions, the perturbation of the three widths (drawn and stored), combined rows."""
    integers = {
        name: "i32"
        for name in (
            "num_directions",
            "dim",
            "half",
            "length",
            "num_blocks",
            "stride_eb",
            "stride_et",
            "stride_ob",
            "stride_op",
            "stride_ot",
            "stride_seed",
            "stride_table",
        )
    }
    pointers = {"seeds": "*i64", "table": "*fp32", "moves": "*u8", "coefficients": "*fp64", "partial": "*fp64", "gradient": "*fp64"}
    kinds = {**integers, **pointers, "smoothing": "fp32", "smoothing_rest": "fp32"}
    wide = ("dim", "stride_eb", "stride_et", "stride_ob", "stride_op", "stride_ot")

    def case(name, kernel, constants, types=None, divisible=()):
        known = {**kinds, **(types or {})}
        signature = {argument: "constexpr" if argument in constants else known[argument] for argument in kernel.arg_names}
        return AotCase(f"zeroth_order.{name}", kernel, signature, constants, num_warps=4, num_stages=2, divisible=divisible)

    cases = [
        case("directions", _directions_kernel, {"BLOCK": BLOCK_D}, {"out": "*fp32"}, ("dim",)),
        case("combine", _combine_kernel, {"P": 10, "HALF": 10, "WRITE": True, "BLOCK": BLOCK_D}, divisible=("dim",)),
    ]
    for short in ("bf16", "fp32", "fp64"):
        types = {"embeddings": f"*{short}", "out": f"*{short}"}
        cases.append(
            case(
                f"perturb.{short}.drawn", _perturb_kernel, {"STORED": False, "table": None, "TOKENS": TOKENS, "BLOCK": BLOCK_D}, types, wide
            )
        )
    cases.append(
        case(
            "perturb.bf16.stored",
            _perturb_kernel,
            {"STORED": True, "TOKENS": TOKENS, "BLOCK": BLOCK_D},
            {"embeddings": "*bf16", "out": "*bf16"},
            wide,
        )
    )
    return cases
