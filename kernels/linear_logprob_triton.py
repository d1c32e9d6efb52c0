"""Triton kernels of the fused linear log-probability (contract in linear_logprob_core.py): NVIDIA and AMD GPUs, CPU in the interpreter.

Forward, one GEMM unit: every program owns a (BLOCK_M scored rows) × (BLOCK_V columns) tile, contracts over D into float32 registers,
applies bias, scale, cap and temperature there, and writes one partial per row: maximum, Σexp and what else was asked for; the tile that
owns the label writes the target logit from the same accumulator. A second kernel merges the partials of a row in a fixed order. The
logits never reach memory. Scratch: rows · ceil(V / BLOCK_V) · 4 bytes a statistic; 33 MB at 8192 rows, V = 128256, BLOCK_V = 256 and two.

Backward, vocabulary chunk by chunk: a Triton kernel recomputes the tile (or reads the resident one) and writes da in the GEMM's dtype,
then two dense library GEMMs with float32 results: d_hidden += da W_chunk, and d_weight_chunk = daᵀ H, complete over all rows, so it is
rounded once and no V × D float32 buffer exists. Chunking over columns moves rows·D·8 bytes a chunk for d_hidden where chunking over rows
would move V·D·8 for d_weight.

A row's result depends on its own operands and the tile configuration only, never on its neighbours: no atomics, no split over D, no
choice by row count. Gathering is index arithmetic in the loads.

Resident exponentials are bfloat16 2^(z·log2 e - 8 q) with one int16 q per row and 256 columns, two of them in each float32 cell of
`offsets`: the scale is exact and covers |z| < 1.8e5.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
import triton
import triton.language as tl
from llmcore.kernels.aot import AotCase
from llmcore.kernels.backends import interpreting
from llmcore.kernels.linear_logprob_core import ARGMAX, ENTROPY, MEAN, SUM_SQ, VOCAB_BLOCK, Gradients, Head, Statistics
from torch import Tensor

# M scored rows, V vocabulary rows of this shard, D hidden size, C columns of one chunk

OFFSET_BLOCK = 256  # columns that share one int16 offset: BLOCK_V of every configuration for 16-bit operands
CHUNK_BYTES = 320 << 20  # da chunk and float32 d_weight chunk of backward, together

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NONE, LOGITS, EXPONENTIALS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # what a launch keeps of, or reads instead of, the logits


@triton.jit
def _softcapped(a, softcap):
    """κ tanh(a / κ). Near zero 1 - e^{-2x} cancels: there the odd series, good to 4e-9 below 0.4."""
    x = tl.abs(a / softcap)
    t = tl.exp(-2.0 * x)
    x2 = x * x
    series = x * (
        1.0
        + x2 * (-0.3333333333 + x2 * (0.1333333333 + x2 * (-0.0539682540 + x2 * (0.0218694885 + x2 * (-0.0088632355 + x2 * 0.0035921280)))))
    )
    value = tl.where(x < 0.4, series, (1.0 - t) / (1.0 + t))
    return softcap * tl.where(a < 0, -value, value)


@triton.jit
def _final_logits(acc, bias_value, logit_scale, softcap, inverse_temperature, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr):
    z = acc
    if HAS_BIAS:
        z += bias_value[None, :]
    z *= logit_scale
    if HAS_CAP:
        z = _softcapped(z, softcap)
    return z * inverse_temperature


@triton.jit
def _stats_kernel(
    hidden,
    rows,
    labels,
    weight,
    bias,
    partial,
    argmax,
    target,
    kept,
    offsets,  #
    num_rows,
    vocab_size,
    first_column,
    vocab_start,
    kept_rows,
    num_blocks,  #
    stride_hidden,
    stride_weight,
    stride_kept,
    stride_offsets,  #
    logit_scale,
    softcap,
    inverse_temperature,  #
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    SHIFTED: tl.constexpr,
    SUMSQ: tl.constexpr,
    SUMZ: tl.constexpr,
    FIRST: tl.constexpr,
    KEEP: tl.constexpr,
    HIDDEN: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Partials of one tile. Grid (row blocks of a group, column blocks, groups): neighbours in time share weight and hidden tiles in L2.

    partial (statistics, num_blocks, num_rows) float32: plane 0 max, 1 Σexp, then SHIFTED, SUMSQ, SUMZ where >= 0. argmax (num_blocks,
    num_rows) int32.
    """
    r = (tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)) * BLOCK_M + tl.arange(0, BLOCK_M)
    v = first_column + tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = r < num_rows
    # Out-of-range rows and columns read a valid neighbour and are dropped after the product: the loop needs no mask for them.
    row = tl.load(rows + r, mask=inside, other=0).to(tl.int64)
    column = tl.minimum(v, vocab_size - 1).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_V), dtype=tl.float32)
    for start in range(0, HIDDEN, BLOCK_K):
        if HIDDEN % BLOCK_K == 0:
            h = tl.load(hidden + row[:, None] * stride_hidden + (start + k)[None, :])
            w = tl.load(weight + column[None, :] * stride_weight + (start + k)[:, None])
        else:
            valid = start + k < HIDDEN
            h = tl.load(hidden + row[:, None] * stride_hidden + (start + k)[None, :], mask=valid[None, :], other=0.0)
            w = tl.load(weight + column[None, :] * stride_weight + (start + k)[:, None], mask=valid[:, None], other=0.0)
        acc = tl.dot(h.to(COMPUTE), w.to(COMPUTE), acc, input_precision=PRECISION)
    bias_value = tl.load(bias + column).to(tl.float32) if HAS_BIAS else 0.0
    z = _final_logits(acc, bias_value, logit_scale, softcap, inverse_temperature, HAS_BIAS, HAS_CAP)

    label = tl.load(labels + r, mask=inside, other=-1) - vocab_start
    at_label = label[:, None] == v[None, :]
    owned = inside & (label >= first_column + tl.program_id(1) * BLOCK_V) & (label < first_column + (tl.program_id(1) + 1) * BLOCK_V)
    tl.store(target + r, tl.sum(tl.where(at_label, z, 0.0), 1), mask=owned & (label < vocab_size))

    present = (v < vocab_size)[None, :]
    z = tl.where(present, z, float("-inf"))
    m = tl.max(z, 1)
    # A tile of -inf (a bias that bans its tokens) contributes nothing: keep (-inf) - (-inf) out of the exponent.
    finite_m = tl.where(m == float("-inf"), 0.0, m)
    delta = z - finite_m[:, None]
    e = tl.exp(delta)
    block = (first_column // BLOCK_V + tl.program_id(1)).to(tl.int64)
    plane = num_blocks * num_rows.to(tl.int64)
    into = partial + block * num_rows + r
    tl.store(into, m, mask=inside)
    tl.store(into + plane, tl.sum(e, 1), mask=inside)
    if SHIFTED >= 0:
        tl.store(into + SHIFTED * plane, tl.sum(tl.where(e > 0, e * delta, e), 1), mask=inside)  # 0 · (-inf) counts 0, NaN stays
    if SUMSQ >= 0:
        tl.store(into + SUMSQ * plane, tl.sum(e * e, 1), mask=inside)
    if SUMZ >= 0:
        tl.store(into + SUMZ * plane, tl.sum(tl.where(present, z, 0.0), 1), mask=inside)
    if FIRST:
        tl.store(argmax + block * num_rows + r, tl.min(tl.where(z == m[:, None], v[None, :], 2147483647), 1), mask=inside)
    if KEEP != NONE:
        keep = inside & (r < kept_rows)
        address = kept + r[:, None].to(tl.int64) * stride_kept + (v - first_column)[None, :]
        if KEEP == LOGITS:
            tl.store(address, z, mask=keep[:, None] & present)
        else:
            q = tl.minimum(tl.maximum(tl.ceil(finite_m * (LOG2E / 8.0)), -32768.0), 32767.0)
            tl.store(address, tl.exp2(z * LOG2E - 8.0 * q[:, None]).to(tl.bfloat16), mask=keep[:, None] & present)
            tl.store(offsets + r.to(tl.int64) * stride_offsets + tl.program_id(1), q.to(tl.int16), mask=keep)


@triton.jit
def _merge_kernel(
    partial,
    argmax,
    merged,
    first,
    num_rows,
    vocab_start,  #
    SHIFTED: tl.constexpr,
    SUMSQ: tl.constexpr,
    SUMZ: tl.constexpr,
    FIRST: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,  #
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One row's partials into merged (statistics, num_rows), in block order: the same sum whatever the batch."""
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = r < num_rows
    plane = NUM_BLOCKS * num_rows.to(tl.int64)
    m = tl.full((BLOCK_R,), float("-inf"), dtype=tl.float32)
    for start in range(0, NUM_BLOCKS, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        valid = (c < NUM_BLOCKS)[:, None] & inside[None, :]
        m = tl.maximum(m, tl.max(tl.load(partial + c[:, None].to(tl.int64) * num_rows + r[None, :], mask=valid, other=float("-inf")), 0))
    finite_m = tl.where(m == float("-inf"), 0.0, m)
    total = tl.zeros((BLOCK_R,), dtype=tl.float32)
    shifted = tl.zeros((BLOCK_R,), dtype=tl.float32)
    sum_sq = tl.zeros((BLOCK_R,), dtype=tl.float32)
    sum_z = tl.zeros((BLOCK_R,), dtype=tl.float32)
    at = tl.full((BLOCK_R,), 2147483647, dtype=tl.int32)
    for start in range(0, NUM_BLOCKS, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        valid = (c < NUM_BLOCKS)[:, None] & inside[None, :]
        here = partial + c[:, None].to(tl.int64) * num_rows + r[None, :]
        tile_m = tl.load(here, mask=valid, other=float("-inf"))
        s = tl.load(here + plane, mask=valid, other=0.0)
        moved = tile_m - finite_m[None, :]
        f = tl.exp(moved)
        total += tl.sum(f * s, 0)
        if SHIFTED >= 0:
            # T moves by (m_tile - m) s; a tile that underflowed has f = 0 and moved = -inf.
            t = tl.load(here + SHIFTED * plane, mask=valid, other=0.0)
            shifted += tl.sum(tl.where(f > 0, f * (t + moved * s), f), 0)
        if SUMSQ >= 0:
            sum_sq += tl.sum(f * f * tl.load(here + SUMSQ * plane, mask=valid, other=0.0), 0)
        if SUMZ >= 0:
            sum_z += tl.sum(tl.load(here + SUMZ * plane, mask=valid, other=0.0), 0)
        if FIRST:
            # Blocks are ordered by column: the smallest index among the tiles that hold the maximum is the first maximum.
            own = tl.load(argmax + c[:, None].to(tl.int64) * num_rows + r[None, :], mask=valid, other=2147483647)
            at = tl.minimum(at, tl.min(tl.where(valid & (tile_m == m[None, :]), own, 2147483647), 0))
    tl.store(merged + r, m, mask=inside)
    wide = num_rows.to(tl.int64)
    tl.store(merged + wide + r, total, mask=inside)
    if SHIFTED >= 0:
        tl.store(merged + SHIFTED * wide + r, shifted, mask=inside)
    if SUMSQ >= 0:
        tl.store(merged + SUMSQ * wide + r, sum_sq, mask=inside)
    if SUMZ >= 0:
        tl.store(merged + SUMZ * wide + r, sum_z, mask=inside)
    if FIRST:
        tl.store(first + r, at.to(tl.int64) + vocab_start, mask=inside)


@triton.jit
def _dlogits_kernel(
    hidden,
    rows,
    labels,
    weight,
    bias,
    kept,
    offsets,
    slots,  #
    lse,
    lse_rest,
    target,
    target_coef,
    prob_coef,
    slope,
    scale,
    grad,
    bias_partial,  #
    num_rows,
    vocab_size,
    first_column,
    vocab_start,  #
    stride_hidden,
    stride_weight,
    stride_kept,
    stride_offsets,
    stride_grad,  #
    logit_scale,
    softcap,
    inverse_temperature,  #
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_SLOPE: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    NEED_BIAS: tl.constexpr,
    SOURCE: tl.constexpr,
    HIDDEN: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """da of one tile into grad (num_rows, columns of the chunk), and its column sums into bias_partial (row blocks, columns)."""
    block = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
    r = block * BLOCK_M + tl.arange(0, BLOCK_M)
    v = first_column + tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = r < num_rows
    present = (v < vocab_size)[None, :]
    row_lse = tl.load(lse + r, mask=inside, other=0.0)
    row_rest = tl.load(lse_rest + r, mask=inside, other=0.0)
    if SOURCE == NONE:
        row = tl.load(rows + r, mask=inside, other=0).to(tl.int64)
        column = tl.minimum(v, vocab_size - 1).to(tl.int64)
        k = tl.arange(0, BLOCK_K)
        acc = tl.zeros((BLOCK_M, BLOCK_V), dtype=tl.float32)
        for start in range(0, HIDDEN, BLOCK_K):
            if HIDDEN % BLOCK_K == 0:
                h = tl.load(hidden + row[:, None] * stride_hidden + (start + k)[None, :])
                w = tl.load(weight + column[None, :] * stride_weight + (start + k)[:, None])
            else:
                valid = start + k < HIDDEN
                h = tl.load(hidden + row[:, None] * stride_hidden + (start + k)[None, :], mask=valid[None, :], other=0.0)
                w = tl.load(weight + column[None, :] * stride_weight + (start + k)[:, None], mask=valid[:, None], other=0.0)
            acc = tl.dot(h.to(COMPUTE), w.to(COMPUTE), acc, input_precision=PRECISION)
        bias_value = tl.load(bias + column).to(tl.float32) if HAS_BIAS else 0.0
        z = _final_logits(acc, bias_value, logit_scale, softcap, inverse_temperature, HAS_BIAS, HAS_CAP)
        p = tl.exp((z - row_lse[:, None]) - row_rest[:, None])
    else:
        slot = tl.load(slots + r, mask=inside, other=0).to(tl.int64)
        stored = tl.load(kept + slot[:, None] * stride_kept + v[None, :], mask=inside[:, None] & present, other=0.0).to(tl.float32)
        if SOURCE == LOGITS:
            z = stored
            p = tl.exp((z - row_lse[:, None]) - row_rest[:, None])
        else:
            at = first_column // BLOCK_V + tl.program_id(1)
            exponent = 8.0 * tl.load(offsets + slot * stride_offsets + at, mask=inside, other=0).to(tl.float32)
            # Both exponents are near each other where p matters: subtract them before the exponential.
            p = stored * tl.exp2((exponent - row_lse * LOG2E) - row_rest * LOG2E)[:, None]
            z = p
            if HAS_SLOPE or HAS_CAP:
                z = tl.where(stored > 0, (tl.log2(stored) + exponent[:, None]) * LN2, row_lse[:, None])
    wanted = tl.load(target_coef + r, mask=inside, other=0.0)
    spread = tl.load(prob_coef + r, mask=inside, other=0.0)
    exact = tl.load(target + r, mask=inside, other=0.0)
    p_exact = tl.exp((exact - row_lse) - row_rest)
    if HAS_SLOPE:
        bend = tl.load(slope + r, mask=inside, other=0.0)
        # p (c + e z) with z = -inf and p = 0 is 0.
        dz = -tl.where(p > 0, p * (spread[:, None] + bend[:, None] * z), p)
        dz_target = wanted - p_exact * (spread + bend * exact)
    else:
        dz = -p * spread[:, None]
        dz_target = wanted - p_exact * spread
    # The target entry comes from the exact target logit: 1 - p cancels, a rounded p would not do.
    label = tl.load(labels + r, mask=inside, other=-1) - vocab_start
    at_label = label[:, None] == v[None, :]
    dz = tl.where(at_label, dz_target[:, None], dz)
    da = dz * (logit_scale * inverse_temperature)
    if HAS_CAP:
        z = tl.where(at_label, exact[:, None], z)
        t = z / (softcap * inverse_temperature)
        da = tl.where(dz == 0, 0.0, da * (1.0 - t * t))
    da = tl.where(inside[:, None] & present, da, 0.0)
    if NEED_BIAS:
        width = stride_grad
        tl.store(bias_partial + block.to(tl.int64) * width + (v - first_column), tl.sum(da, 0), mask=v < vocab_size)
    if HAS_SCALE:
        da *= tl.load(scale)
    address = grad + r[:, None].to(tl.int64) * stride_grad + (v - first_column)[None, :]
    tl.store(address, da.to(grad.dtype.element_ty), mask=inside[:, None] & present)


@triton.jit
def _direction_kernel(
    kept,
    offsets,
    reference,
    kept_out,
    num_rows,
    first_column,
    vocab_size,
    stride_kept,
    stride_offsets,  #
    softcap,
    inverse_temperature,
    factor,  #
    HAS_CAP: tl.constexpr,
    SOURCE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """kept -> exp(z - reference · ln 2) · da/dz in the GEMM's dtype: the operand of the frozen head's direction.

    reference (num_rows,) float32 is an integer exponent, so rescaling bfloat16 exponentials is exact until they underflow.
    """
    r = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    v = first_column + tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = r < num_rows
    mask = inside[:, None] & (v < vocab_size)[None, :]
    address = r[:, None].to(tl.int64) * stride_kept + (v - first_column)[None, :]
    stored = tl.load(kept + address, mask=mask, other=0.0).to(tl.float32)
    base = tl.load(reference + r, mask=inside, other=0.0)
    if SOURCE == LOGITS:
        z = stored
        e = tl.exp2(z * LOG2E - base[:, None])
    else:
        exponent = 8.0 * tl.load(offsets + r.to(tl.int64) * stride_offsets + tl.program_id(1), mask=inside, other=0).to(tl.float32)
        e = stored * tl.exp2(exponent - base)[:, None]
        z = tl.where(stored > 0, (tl.log2(stored) + exponent[:, None]) * LN2, 0.0) if HAS_CAP else e
    if HAS_CAP:
        t = z / (softcap * inverse_temperature)
        e = tl.where(e > 0, e * (1.0 - t * t), e)
    tl.store(kept_out + address, (e * factor).to(kept_out.dtype.element_ty), mask=mask)


@dataclasses.dataclass(frozen=True)
class Config:
    """Tile of a GEMM kernel. group: row blocks that sweep the vocabulary together."""

    block_m: int
    block_v: int
    block_k: int
    num_warps: int
    num_stages: int
    group: int = 16


# Keyed by what changes the code: pass, operand width, architecture. Not measured: chosen by tile traffic and by the registers and shared
# memory of the compiled binary (python -m llmcore.kernels.aot); replace a row together with the device, date and figures that justify it.
# Every option of the forward shares one tile, or the options would change the last bits of a row.
_CONFIGS = {
    ("forward", "half", "sm_80"): Config(64, 256, 32, 8, 3),
    ("forward", "half", "sm_90"): Config(64, 256, 64, 8, 4),
    ("forward", "half", "sm_100"): Config(64, 256, 64, 8, 4),
    ("forward", "half", "gfx942"): Config(64, 256, 32, 8, 2),
    ("backward", "half", "sm_80"): Config(128, 128, 64, 8, 3),
    ("backward", "half", "sm_90"): Config(128, 128, 64, 8, 4),
    ("backward", "half", "sm_100"): Config(128, 128, 64, 8, 4),
    ("backward", "half", "gfx942"): Config(64, 128, 32, 8, 2),
    **{
        (step, "full", target): Config(64, 64, 32, 4, 2)
        for step in ("forward", "backward")
        for target in ("sm_80", "sm_90", "sm_100", "gfx942")
    },
}
_RESIDENT = Config(8, 256, 64, 8, 1)  # elementwise over the resident tile; block_k is not used


@functools.cache
def _architecture(device: torch.device) -> str:
    """The row of the table that serves a device; the interpreter takes the Hopper one."""
    if device.type == "cpu":
        return "sm_90"
    if torch.version.hip is not None:
        return "gfx942"
    major = torch.cuda.get_device_capability(device)[0]
    return "sm_100" if major >= 10 else "sm_90" if major == 9 else "sm_80"


def _config(step: str, half: bool, architecture: str) -> Config:
    return _CONFIGS[step, "half" if half else "full", architecture]


def _gemm_dtype(head: Head) -> torch.dtype:
    """Operands of one dtype are contracted as they are; a mixture is widened to float32."""
    if torch.float64 in (head.hidden.dtype, head.weight.dtype):
        raise RuntimeError("backend 'triton' serves float32, bfloat16 and float16 operands, got float64; use backend='torch'")
    return head.hidden.dtype if head.hidden.dtype == head.weight.dtype else torch.float32


def _compute(dtype: torch.dtype) -> tl.dtype:
    """Operand type of tl.dot. The interpreter has no bfloat16 product; widening first gives the same exact products."""
    if dtype == torch.bfloat16:
        return tl.float32 if interpreting() else tl.bfloat16
    return {torch.float32: tl.float32, torch.float16: tl.float16}[dtype]


def _row_grid(num_rows: int, config: Config) -> tuple[int, int]:
    """(row blocks in a group, groups): groups of equal size cover at least every row block."""
    blocks = triton.cdiv(num_rows, config.block_m)
    groups = triton.cdiv(blocks, config.group)
    return triton.cdiv(blocks, groups), groups


def _chunk_columns(num_rows: int, hidden_size: int, vocab_size: int, itemsize: int) -> int:
    """Columns of one chunk: multiples of VOCAB_BLOCK whose da and float32 d_weight fit CHUNK_BYTES, at least one."""
    fitting = CHUNK_BYTES // (num_rows * itemsize + hidden_size * 4) // VOCAB_BLOCK * VOCAB_BLOCK
    return min(max(fitting, VOCAB_BLOCK), -(-vocab_size // VOCAB_BLOCK) * VOCAB_BLOCK)


def scratch_bytes(num_rows: int, hidden_size: int, vocab_size: int, half: bool) -> int:
    """Upper bound of the temporaries: forward partials (six planes), or backward's chunk, gathered rows and float32 d_hidden."""
    itemsize = 2 if half else 4
    partials = 6 * 4 * num_rows * triton.cdiv(vocab_size, _config("forward", half, "sm_90").block_v)
    chunk = _chunk_columns(num_rows, hidden_size, vocab_size, itemsize)
    return max(partials, chunk * (num_rows * itemsize + hidden_size * 4) + num_rows * hidden_size * (itemsize + 4) + num_rows * 64)


def _mm_float32(left: Tensor, right: Tensor, into: Tensor | None = None) -> Tensor:
    """left @ right with a float32 result, or added into a float32 matrix."""
    if left.dtype == torch.float32 or left.device.type == "cpu":
        left, right = left.float(), right.float()
        return left @ right if into is None else into.addmm_(left, right)
    if into is None:
        return torch.mm(left, right, out_dtype=torch.float32)
    return torch.ops.aten.addmm.dtype_out(into, left, right, torch.float32, out=into)


def forward(head: Head, want: int, *, resident_rows: int = 0, direction: bool = False, tiles: bool = False) -> Statistics:
    """Online statistics in one pass; see the contract. `tiles` (the gradient filter) is served by the torch backend."""
    if tiles:
        raise RuntimeError("backend 'triton' has no gradient filter; use backend='torch'")
    dtype, device = _gemm_dtype(head), head.hidden.device
    num_rows, (vocab_size, hidden_size) = len(head.rows), head.weight.shape
    config = _config("forward", dtype.itemsize == 2, _architecture(device))
    num_blocks = triton.cdiv(vocab_size, config.block_v)
    planes = {name: -1 for name in ("SHIFTED", "SUMSQ", "SUMZ")}
    count = 2
    for name, bit in (("SHIFTED", ENTROPY), ("SUMSQ", SUM_SQ), ("SUMZ", MEAN)):
        if want & bit:
            planes[name], count = count, count + 1
    first = bool(want & ARGMAX)
    partial = torch.empty(count, num_blocks, num_rows, dtype=torch.float32, device=device)
    argmax = torch.empty(num_blocks if first else 0, num_rows, dtype=torch.int32, device=device)
    target = torch.zeros(num_rows, dtype=torch.float32, device=device)
    in_group, groups = _row_grid(num_rows, config)

    def launch(start: int, columns: int, kept: Tensor | None, offsets: Tensor | None, kept_rows: int) -> None:
        keep = NONE if kept is None else LOGITS if offsets is None else EXPONENTIALS
        _stats_kernel[(in_group, triton.cdiv(columns, config.block_v), groups)](
            head.hidden, head.rows, head.labels, head.weight, head.bias, partial, argmax, target, kept, offsets,
            num_rows, vocab_size, start, head.vocab_start, kept_rows, num_blocks,
            head.hidden.stride(0), head.weight.stride(0),
            0 if kept is None else kept.stride(0), 0 if offsets is None else offsets.stride(0),
            float(head.logit_scale), float(head.softcap), 1.0 / head.temperature,
            HAS_BIAS=head.bias is not None, HAS_CAP=head.softcap != 0.0, **planes, FIRST=first, KEEP=keep,
            HIDDEN=hidden_size, COMPUTE=_compute(dtype), PRECISION="ieee" if dtype == torch.float32 else "tf32",
            BLOCK_M=config.block_m, BLOCK_V=config.block_v, BLOCK_K=config.block_k,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip

    resident = offsets = row_direction = None
    if resident_rows:
        resident = torch.empty(resident_rows, vocab_size, dtype=torch.bfloat16 if head.half else torch.float32, device=device)
        if head.half:
            offsets = torch.zeros(resident_rows, -(-vocab_size // VOCAB_BLOCK), dtype=torch.float32, device=device)
    if direction:
        row_direction, exponent = _forward_with_direction(head, launch, dtype, config)
    else:
        packed = None if offsets is None or dtype.itemsize != 2 else offsets.view(torch.int16)
        launch(0, vocab_size, resident, packed, resident_rows)

    merged = torch.empty(count, num_rows, dtype=torch.float32, device=device)
    at = torch.empty(num_rows if first else 0, dtype=torch.int64, device=device)
    _merge_kernel[(triton.cdiv(num_rows, 32),)](
        partial,
        argmax,
        merged,
        at,
        num_rows,
        head.vocab_start,
        **planes,
        FIRST=first,
        NUM_BLOCKS=num_blocks,
        BLOCK_R=32,
        BLOCK_C=32,
        num_warps=4,
    )
    if row_direction is not None:
        row_direction.mul_(torch.exp2(exponent - merged[0].double() / 0.6931471805599453).float()[:, None])

    def plane(name: str) -> Tensor | None:
        return merged[planes[name]] if planes[name] >= 0 else None

    return Statistics(
        merged[0],
        merged[1],
        target,
        plane("SHIFTED"),
        plane("SUMSQ"),
        plane("SUMZ"),
        at if first else None,
        resident,
        offsets,
        row_direction,
        None,
    )


def _forward_with_direction(head: Head, launch, dtype: torch.dtype, config: Config) -> tuple[Tensor, Tensor]:
    """Statistics chunk by chunk, each chunk's exponentials contracted with its weight rows while they are at hand: 2 units, not 3.

    Returns Σ_v 2^(z·log2 e - exponent) · da/dz · w_v (M, D) float32 and the integer exponent (M,) it is relative to, float64.
    """
    device, num_rows, (vocab_size, hidden_size) = head.hidden.device, len(head.rows), head.weight.shape
    half = dtype.itemsize == 2
    chunk = _chunk_columns(num_rows, hidden_size, vocab_size, 2 * dtype.itemsize)
    total = torch.zeros(num_rows, hidden_size, dtype=torch.float32, device=device)
    exponent = torch.full((num_rows,), -torch.inf, dtype=torch.float32, device=device)
    # float16 operands: exponentials in [0, 1] are lifted to use the subnormal range.
    lift = 2.0**14 if dtype == torch.float16 else 1.0
    for start in range(0, vocab_size, chunk):
        columns = min(chunk, vocab_size - start)
        kept = torch.empty(num_rows, columns, dtype=torch.bfloat16 if half else torch.float32, device=device)
        offsets = torch.empty(num_rows, triton.cdiv(columns, config.block_v), dtype=torch.int16, device=device) if half else None
        launch(start, columns, kept, offsets, num_rows)
        top = 8.0 * offsets.amax(dim=1).float() if offsets is not None else (kept.amax(dim=1) * 1.4426950408889634).ceil()
        new = torch.maximum(exponent, torch.where(torch.isneginf(top), 0.0, top))
        total.mul_(torch.exp2(exponent - new)[:, None])
        operand = torch.empty(num_rows, columns, dtype=dtype, device=device)
        _direction_kernel[(triton.cdiv(num_rows, 16), triton.cdiv(columns, config.block_v))](
            kept, offsets, new, operand, num_rows, start, vocab_size, columns, 0 if offsets is None else offsets.stride(0),
            float(head.softcap), 1.0 / head.temperature, lift * head.logit_scale / head.temperature,
            HAS_CAP=head.softcap != 0.0, SOURCE=EXPONENTIALS if half else LOGITS, BLOCK_M=16, BLOCK_V=config.block_v, num_warps=8,
        )  # fmt: skip
        _mm_float32(operand, head.weight[start : start + columns].to(dtype), total)
        exponent = new
    return total.mul_(1.0 / lift), exponent.double()


def backward(
    head: Head,
    lse: Tensor,
    target: Tensor,
    target_coef: Tensor,
    prob_coef: Tensor,
    slope: Tensor | None,
    *,
    resident: Tensor | None = None,
    offsets: Tensor | None = None,
    slots: Tensor | None = None,
    keep: Tensor | None = None,
    need_hidden: bool = True,
    need_weight: bool = True,
    need_bias: bool = True,
    grad_weight_out: Tensor | None = None,
) -> Gradients:
    """Gradients by recomputation, or from the resident rows (slots[i] >= 0, which come first); see the contract."""
    if keep is not None:
        raise RuntimeError("backend 'triton' has no gradient filter; use backend='torch'")
    dtype, device = _gemm_dtype(head), head.hidden.device
    num_rows, (vocab_size, hidden_size) = len(head.rows), head.weight.shape
    config = _config("backward", dtype.itemsize == 2, _architecture(device))
    need_bias = need_bias and head.bias is not None
    need_weight = need_weight or grad_weight_out is not None
    stored = int((slots >= 0).sum()) if resident is not None and slots is not None else 0
    packed = offsets.view(torch.int16) if offsets is not None else None
    high = lse.float()
    rest = (lse.double() - high.double()).float()
    row_target, wanted, spread = target.float(), target_coef.float(), prob_coef.float()
    bend = None if slope is None else slope.float()

    scale = None
    if dtype == torch.float16:
        # Mean-normalised losses put da below float16's range: an exact power of two, taken out again after the GEMMs.
        largest = (wanted.abs() + spread.abs() + (0.0 if bend is None else bend.abs() * high.abs())).max() * (
            head.logit_scale / head.temperature
        )
        usable = torch.isfinite(largest) & (largest > 0)
        scale = torch.where(usable, torch.exp2(-torch.frexp(torch.where(usable, largest, 1.0)).exponent.float()), 1.0)

    grad_hidden = torch.zeros(num_rows, hidden_size, dtype=torch.float32, device=device) if need_hidden else None
    grad_weight = torch.empty_like(head.weight, memory_format=torch.contiguous_format) if need_weight and grad_weight_out is None else None
    grad_bias = torch.empty(vocab_size, dtype=torch.float32, device=device) if need_bias else None
    hidden_rows = head.hidden.index_select(0, head.rows).to(dtype) if need_weight else None
    chunk = _chunk_columns(num_rows, hidden_size, vocab_size, dtype.itemsize)
    buffer = torch.empty(num_rows * min(chunk, vocab_size), dtype=dtype, device=device)
    for start in range(0, vocab_size, chunk):
        columns = min(chunk, vocab_size - start)
        grad = buffer[: num_rows * columns].view(num_rows, columns)
        bias_sums = []
        for begin, end, from_store in ((0, stored, True), (stored, num_rows, False)):
            if begin == end:
                continue
            part = slice(begin, end)
            tile = _RESIDENT if from_store else config
            in_group, groups = _row_grid(end - begin, tile)
            sums = torch.empty(in_group * groups if need_bias else 0, columns, dtype=torch.float32, device=device)
            bias_sums.append(sums)
            source = NONE if not from_store else LOGITS if offsets is None else EXPONENTIALS
            _dlogits_kernel[(in_group, triton.cdiv(columns, tile.block_v), groups)](
                head.hidden, head.rows[part], head.labels[part], head.weight, head.bias,
                resident if from_store else None, packed if from_store else None, slots[part] if from_store else None,
                high[part], rest[part], row_target[part], wanted[part], spread[part], None if bend is None else bend[part], scale,
                grad[part], sums,
                end - begin, vocab_size, start, head.vocab_start,
                head.hidden.stride(0), head.weight.stride(0), 0 if resident is None else resident.stride(0),
                0 if packed is None else packed.stride(0), columns,
                float(head.logit_scale), float(head.softcap), 1.0 / head.temperature,
                HAS_BIAS=head.bias is not None, HAS_CAP=head.softcap != 0.0, HAS_SLOPE=slope is not None, HAS_SCALE=scale is not None,
                NEED_BIAS=need_bias, SOURCE=source, HIDDEN=hidden_size, COMPUTE=_compute(dtype),
                PRECISION="ieee" if dtype == torch.float32 else "tf32", BLOCK_M=tile.block_m, BLOCK_V=tile.block_v,
                BLOCK_K=tile.block_k, num_warps=tile.num_warps, num_stages=tile.num_stages,
            )  # fmt: skip
        if grad_hidden is not None:
            _mm_float32(grad, head.weight[start : start + columns].to(dtype), grad_hidden)
        if need_weight:
            grad_chunk = _mm_float32(grad.T, hidden_rows)
            if scale is not None:
                grad_chunk /= scale
            if grad_weight is not None:
                grad_weight[start : start + columns] = grad_chunk
            else:
                into = grad_weight_out[start : start + columns]
                into.copy_(grad_chunk.add_(into))
        if grad_bias is not None:
            torch.sum(torch.cat(bias_sums), dim=0, out=grad_bias[start : start + columns])
    if grad_hidden is not None and scale is not None:
        grad_hidden /= scale
    return Gradients(grad_hidden, grad_weight, None if grad_bias is None else grad_bias.to(head.bias.dtype))


def aot_cases() -> list[AotCase]:
    """The launched configurations: both GEMM kernels for 16-bit and float32 operands, bare and with every option, and the small kernels."""
    cases = []
    sizes = {name: "i32" for name in ("num_rows", "vocab_size", "first_column", "vocab_start")}
    strides = {name: "i32" for name in ("stride_hidden", "stride_weight", "stride_kept", "stride_offsets")}
    scalars = {name: "fp32" for name in ("logit_scale", "softcap", "inverse_temperature")}
    planes = {"SHIFTED": 2, "SUMSQ": 3, "SUMZ": 4}

    def case(name, kernel, arguments, constants, target, config, spill=None):
        signature = {argument: "constexpr" if argument in constants else arguments[argument] for argument in kernel.arg_names}
        cases.append(
            AotCase(
                f"linear_logprob.{name}",
                kernel,
                signature,
                constants,
                config.num_warps,
                config.num_stages,
                divisible=("stride_hidden", "stride_weight") if "hidden" in arguments else (),
                targets=(target,),
                spills_allowed={target: spill} if spill and name.endswith("bf16.metrics") else {},
            )
        )

    for target in ("sm_80", "sm_90", "sm_100", "gfx942"):
        for dtype, short in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
            half = dtype.itemsize == 2
            tiles = {step: _config(step, half, target) for step in ("forward", "backward")} | {"resident": _RESIDENT}
            common = {"HIDDEN": 4096, "COMPUTE": _compute(dtype), "PRECISION": "tf32" if half else "ieee"}
            gemm = {
                step: {**common, "BLOCK_M": tile.block_m, "BLOCK_V": tile.block_v, "BLOCK_K": tile.block_k} for step, tile in tiles.items()
            }
            operands = {
                "hidden": f"*{short}",
                "rows": "*i64",
                "labels": "*i64",
                "weight": f"*{short}",
                "bias": f"*{short}",
                "kept": f"*{short}",
                "offsets": "*i16",
                **sizes,
                **strides,
                **scalars,
            }
            forward = {**operands, "partial": "*fp32", "argmax": "*i32", "target": "*fp32", "kept_rows": "i32", "num_blocks": "i32"}
            bare = {
                "HAS_BIAS": False,
                "HAS_CAP": False,
                "SHIFTED": -1,
                "SUMSQ": -1,
                "SUMZ": -1,
                "FIRST": False,
                "KEEP": 0,
                "bias": None,
                "kept": None,
                "offsets": None,
            }
            keep = {"KEEP": 2} if half else {"KEEP": 1, "offsets": None}
            metrics = {**bare, "HAS_BIAS": True, "HAS_CAP": True, "bias": ..., **planes, "FIRST": True}
            trained = {**bare, "HAS_BIAS": True, "HAS_CAP": True, "bias": ..., "kept": ..., "offsets": ..., **keep}
            for suffix, options in (("plain", bare), ("metrics", metrics), ("resident", trained)):
                constants = {name: value for name, value in options.items() if value is not ...}
                case(
                    f"stats.{short}.{suffix}",
                    _stats_kernel,
                    forward,
                    {**gemm["forward"], **constants},
                    target,
                    tiles["forward"],
                    spill="every statistic at once, after the contraction: the spilled tile is read back once",
                )
            backward = {
                **operands,
                "slots": "*i64",
                **{name: "*fp32" for name in ("lse", "lse_rest", "target", "target_coef", "prob_coef", "slope", "scale", "bias_partial")},
                "grad": f"*{short}",
                "stride_grad": "i32",
            }
            recompute = {"SOURCE": 0, "kept": None, "offsets": None, "slots": None}
            off = {
                "HAS_BIAS": False,
                "HAS_CAP": False,
                "HAS_SLOPE": False,
                "HAS_SCALE": False,
                "NEED_BIAS": False,
                "bias": None,
                "slope": None,
                "scale": None,
            }
            on = {"HAS_BIAS": True, "HAS_CAP": True, "HAS_SLOPE": True, "HAS_SCALE": True, "NEED_BIAS": True}
            case(f"dlogits.{short}.plain", _dlogits_kernel, backward, {**gemm["backward"], **recompute, **off}, target, tiles["backward"])
            case(
                f"dlogits.{short}.all_options",
                _dlogits_kernel,
                backward,
                {**gemm["backward"], **recompute, **on},
                target,
                tiles["backward"],
            )
            stored = {"SOURCE": 2} if half else {"SOURCE": 1, "offsets": None}
            case(f"dlogits.{short}.resident", _dlogits_kernel, backward, {**gemm["resident"], **stored, **on}, target, _RESIDENT)
            direction = {
                "kept": f"*{short}",
                "kept_out": f"*{short}",
                "offsets": "*i16",
                "reference": "*fp32",
                "factor": "fp32",
                **sizes,
                **strides,
                **scalars,
            }
            case(
                f"direction.{short}",
                _direction_kernel,
                direction,
                {"HAS_CAP": True, **stored, "BLOCK_M": 16, "BLOCK_V": tiles["forward"].block_v},
                target,
                _RESIDENT,
            )
        merge = {"partial": "*fp32", "argmax": "*i32", "merged": "*fp32", "first": "*i64", **sizes}
        case(
            "merge",
            _merge_kernel,
            merge,
            {**planes, "FIRST": True, "NUM_BLOCKS": 501, "BLOCK_R": 32, "BLOCK_C": 32},
            target,
            Config(32, 32, 1, 4, 1),
        )
    return cases
