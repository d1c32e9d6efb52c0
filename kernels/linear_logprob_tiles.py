"""Triton kernels of the fused linear log-probability. Launched by linear_logprob_triton.py, which says how they fit together."""

from __future__ import annotations

import triton
import triton.language as tl
from llmcore.kernels.backends import interpreting

# M scored rows, V vocabulary rows of this shard, D hidden size, C columns of one chunk

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# What a launch keeps of the logits, or reads instead of computing them. PRODUCT: h · w by the vendor's GEMM, before bias and cap.
NONE, LOGITS, EXPONENTIALS, PRODUCT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
# A kept exponential is float16 2^(z log2 e - 8 q + LIFT), q the least integer that keeps a block's largest at 2^LIFT or below: 11 bits for
# everything within 2^21 of the block's maximum, where bfloat16 has 8.
LIFT = tl.constexpr(15.0)
INTERPRETING = tl.constexpr(interpreting())


@triton.jit
def _rounded(x, dtype: tl.constexpr):
    """x in `dtype`, to nearest even. The interpreter truncates float32 to bfloat16, which the hardware does not: round the bits first."""
    if INTERPRETING and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        nearest = ((bits + 32767 + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
        x = tl.where(tl.abs(x) < 1.1754944e-38, 0.0, tl.where(x == x, nearest, x))
    return x.to(dtype)


@triton.jit
def _softcapped(a, softcap):
    """κ tanh(a / κ) = κ t / (t + 2) with t = e^{2x} - 1 = 2^k expm1(r) + (2^k - 1), 2x = k ln 2 + r: within two ulps everywhere."""
    x2 = tl.minimum(tl.abs(a / softcap) * 2.0, 40.0)
    k = tl.floor(x2 * LOG2E + 0.5)
    # ln 2 in two parts, the first with 15 bits: k times it is exact.
    r = (x2 - k * 0.693145751953125) - k * 1.428606820309417e-06
    series = 8.3333333e-3 + r * (1.3888889e-3 + r * (1.9841270e-4 + r * 2.4801587e-5))
    small = r + r * r * (0.5 + r * (0.16666667 + r * (4.1666667e-2 + r * series)))
    power = ((k.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    t = power * small + (power - 1.0)
    value = t / (t + 2.0)
    return tl.where(a == a, softcap * tl.where(a < 0, -value, value), a)


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
def _accumulate(acc, lost, h, w, COMPUTE: tl.constexpr, PRECISION: tl.constexpr, COMPENSATED: tl.constexpr):
    """acc += h · w. float32 operands keep what each addition loses (Kahan): the logit's error then does not grow with the hidden size."""
    if COMPENSATED:
        piece = tl.dot(h.to(COMPUTE), w.to(COMPUTE), input_precision=PRECISION) - lost
        total = acc + piece
        lost = (total - acc) - piece
        acc = total
    else:
        acc = tl.dot(h.to(COMPUTE), w.to(COMPUTE), acc, input_precision=PRECISION)
    return acc, lost


@triton.jit
def _write_partials(
    acc, bias, labels, partial, argmax, target, kept, offsets, r, v, block_in_chunk,  #
    num_rows, vocab_size, first_column, vocab_start, kept_rows, num_blocks, stride_kept, stride_offsets,  #
    logit_scale, softcap, inverse_temperature,  #
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, SHIFTED: tl.constexpr, SUMSQ: tl.constexpr, SUMZ: tl.constexpr,
    FIRST: tl.constexpr, KEEP: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """From the products of rows r and columns v to the tile's partials; see `_stats_kernel` for the layouts."""
    inside = r < num_rows
    bias_value = tl.load(bias + tl.minimum(v, vocab_size - 1).to(tl.int64)).to(tl.float32) if HAS_BIAS else 0.0
    z = _final_logits(acc, bias_value, logit_scale, softcap, inverse_temperature, HAS_BIAS, HAS_CAP)
    label = tl.load(labels + r, mask=inside, other=-1) - vocab_start
    at_label = label[:, None] == v[None, :]
    begin = first_column + block_in_chunk * BLOCK_V
    owned = inside & (label >= begin) & (label < begin + BLOCK_V)
    tl.store(target + r, tl.sum(tl.where(at_label, z, 0.0), 1), mask=owned & (label < vocab_size))

    present = (v < vocab_size)[None, :]
    z = tl.where(present, z, float("-inf"))
    m = tl.max(z, 1)
    # A tile of -inf (a bias that bans its tokens) contributes nothing: keep (-inf) - (-inf) out of the exponent.
    finite_m = tl.where(m == float("-inf"), 0.0, m)
    block = (first_column // BLOCK_V + block_in_chunk).to(tl.int64)
    plane = num_blocks * num_rows.to(tl.int64)
    into = partial + block * num_rows + r
    tl.store(into, m, mask=inside)
    # What needs the logits themselves comes before the exponentials: no option holds two tiles in registers for longer than it must.
    if SUMZ >= 0:
        tl.store(into + SUMZ * plane, tl.sum(tl.where(present, z, 0.0), 1), mask=inside)
    if FIRST:
        tl.store(argmax + block * num_rows + r, tl.min(tl.where(z == m[:, None], v[None, :], 2147483647), 1), mask=inside)
    delta = z - finite_m[:, None]
    e = tl.exp(delta)
    tl.store(into + plane, tl.sum(e, 1), mask=inside)
    if SHIFTED >= 0:
        tl.store(into + SHIFTED * plane, tl.sum(tl.where(e > 0, e * delta, e), 1), mask=inside)  # 0 · (-inf) counts 0, NaN stays
    if SUMSQ >= 0:
        tl.store(into + SUMSQ * plane, tl.sum(e * e, 1), mask=inside)
    if KEEP != NONE:
        keep = inside & (r < kept_rows)
        address = kept + r[:, None].to(tl.int64) * stride_kept + (v - first_column)[None, :]
        if KEEP == LOGITS:
            tl.store(address, z, mask=keep[:, None] & present)
        else:
            q = tl.minimum(tl.maximum(tl.ceil(finite_m * (LOG2E / 8.0)), -32768.0), 32767.0)
            tl.store(address, tl.exp2(z * LOG2E - (8.0 * q - LIFT)[:, None]).to(tl.float16), mask=keep[:, None] & present)
            tl.store(offsets + r.to(tl.int64) * stride_offsets + block_in_chunk, q.to(tl.int16), mask=keep)


@triton.jit
def _stats_kernel(
    hidden, rows, labels, weight, bias, partial, argmax, target, kept, offsets,  #
    num_rows, vocab_size, first_column, vocab_start, kept_rows, num_blocks,  #
    stride_hidden, stride_weight, stride_kept, stride_offsets,  #
    logit_scale, softcap, inverse_temperature,  #
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, SHIFTED: tl.constexpr, SUMSQ: tl.constexpr, SUMZ: tl.constexpr,
    FIRST: tl.constexpr, KEEP: tl.constexpr, HIDDEN: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Partials of one tile. Grid (row blocks of a group, column blocks, groups): neighbours in time share weight and hidden tiles in L2.

    partial (statistics, num_blocks, num_rows) float32: plane 0 max, 1 Σexp, then SHIFTED, SUMSQ, SUMZ where >= 0. argmax (num_blocks,
    num_rows) int32.
    """
    r = (tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)) * BLOCK_M + tl.arange(0, BLOCK_M)
    v = first_column + tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    # Out-of-range rows and columns read a valid neighbour and are dropped after the product: the loop needs no mask for them.
    row = tl.load(rows + r, mask=r < num_rows, other=0).to(tl.int64)
    column = tl.minimum(v, vocab_size - 1).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_V), dtype=tl.float32)
    lost = tl.zeros((BLOCK_M, BLOCK_V), dtype=tl.float32)
    for start in range(0, HIDDEN, BLOCK_K):
        if HIDDEN % BLOCK_K == 0:
            h = tl.load(hidden + row[:, None] * stride_hidden + (start + k)[None, :])
            w = tl.load(weight + column[None, :] * stride_weight + (start + k)[:, None])
        else:
            valid = start + k < HIDDEN
            h = tl.load(hidden + row[:, None] * stride_hidden + (start + k)[None, :], mask=valid[None, :], other=0.0)
            w = tl.load(weight + column[None, :] * stride_weight + (start + k)[:, None], mask=valid[:, None], other=0.0)
        acc, lost = _accumulate(acc, lost, h, w, COMPUTE, PRECISION, PRECISION == "ieee")
    _write_partials(
        acc, bias, labels, partial, argmax, target, kept, offsets, r, v, tl.program_id(1),
        num_rows, vocab_size, first_column, vocab_start, kept_rows, num_blocks, stride_kept, stride_offsets,
        logit_scale, softcap, inverse_temperature,
        HAS_BIAS, HAS_CAP, SHIFTED, SUMSQ, SUMZ, FIRST, KEEP, BLOCK_V,
    )  # fmt: skip


@triton.jit
def _stats_persistent_kernel(
    hidden, weight, labels, bias, partial, argmax, target, kept, offsets,  #
    num_rows, vocab_size, first_column, vocab_start, kept_rows, num_blocks, row_blocks, column_blocks, num_tiles,  #
    stride_kept, stride_offsets,  #
    logit_scale, softcap, inverse_temperature,  #
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, SHIFTED: tl.constexpr, SUMSQ: tl.constexpr, SUMZ: tl.constexpr,
    FIRST: tl.constexpr, KEEP: tl.constexpr, HIDDEN: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`_stats_kernel` with operands fetched by descriptor (TMA) and one program per processor walking over the tiles.

    hidden (num_rows, HIDDEN) compacted, weight (V, HIDDEN): tensor descriptors of (BLOCK_M, BLOCK_K) and (BLOCK_V, BLOCK_K) boxes, zero
    past their ends. Tile t: row block t mod row_blocks (of one group), then column blocks, then groups, as the grid of `_stats_kernel`.
    """
    begin, end, step = tl.program_id(0), num_tiles, tl.num_programs(0)
    if INTERPRETING:  # its ranges take Python integers
        begin, end, step = begin.handle.data.item(), end.handle.data.item(), step.handle.data.item()
    for tile in tl.range(begin, end, step, flatten=True):
        column_block = tile // row_blocks % column_blocks
        row_block = tile // row_blocks // column_blocks * row_blocks + tile % row_blocks
        acc = tl.zeros((BLOCK_M, BLOCK_V), dtype=tl.float32)
        for start in range(0, HIDDEN, BLOCK_K):
            h = hidden.load([row_block * BLOCK_M, start])
            w = weight.load([first_column + column_block * BLOCK_V, start])
            acc = tl.dot(h.to(COMPUTE), w.to(COMPUTE).T, acc, input_precision=PRECISION)
        r = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
        v = first_column + column_block * BLOCK_V + tl.arange(0, BLOCK_V)
        _write_partials(
            acc, bias, labels, partial, argmax, target, kept, offsets, r, v, column_block,
            num_rows, vocab_size, first_column, vocab_start, kept_rows, num_blocks, stride_kept, stride_offsets,
            logit_scale, softcap, inverse_temperature,
            HAS_BIAS, HAS_CAP, SHIFTED, SUMSQ, SUMZ, FIRST, KEEP, BLOCK_V,
        )  # fmt: skip


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
    hidden, rows, labels, weight, bias, kept, offsets, slots,  #
    lse, lse_rest, target, target_coef, prob_coef, slope, scale, grad, bias_partial,  #
    num_rows, vocab_size, first_column, vocab_start,  #
    stride_hidden, stride_weight, stride_kept, stride_offsets, stride_grad,  #
    logit_scale, softcap, inverse_temperature,  #
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, HAS_SLOPE: tl.constexpr, HAS_SCALE: tl.constexpr, NEED_BIAS: tl.constexpr,
    SOURCE: tl.constexpr, HIDDEN: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """da of one tile into grad (num_rows, columns of the chunk), and its column sums into bias_partial (row blocks, columns)."""
    block = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
    r = block * BLOCK_M + tl.arange(0, BLOCK_M)
    v = first_column + tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = r < num_rows
    present = (v < vocab_size)[None, :]
    row_lse = tl.load(lse + r, mask=inside, other=0.0)
    row_rest = tl.load(lse_rest + r, mask=inside, other=0.0)
    if SOURCE == NONE or SOURCE == PRODUCT:  # noqa: SIM109 - no membership test in Triton
        column = tl.minimum(v, vocab_size - 1).to(tl.int64)
        if SOURCE == PRODUCT:
            here = kept + r[:, None].to(tl.int64) * stride_kept + (v - first_column)[None, :]
            acc = tl.load(here, mask=inside[:, None] & present, other=0.0)
        else:
            row = tl.load(rows + r, mask=inside, other=0).to(tl.int64)
            k = tl.arange(0, BLOCK_K)
            acc = tl.zeros((BLOCK_M, BLOCK_V), dtype=tl.float32)
            lost = tl.zeros((BLOCK_M, BLOCK_V), dtype=tl.float32)
            for start in range(0, HIDDEN, BLOCK_K):
                if HIDDEN % BLOCK_K == 0:
                    h = tl.load(hidden + row[:, None] * stride_hidden + (start + k)[None, :])
                    w = tl.load(weight + column[None, :] * stride_weight + (start + k)[:, None])
                else:
                    valid = start + k < HIDDEN
                    h = tl.load(hidden + row[:, None] * stride_hidden + (start + k)[None, :], mask=valid[None, :], other=0.0)
                    w = tl.load(weight + column[None, :] * stride_weight + (start + k)[:, None], mask=valid[:, None], other=0.0)
                acc, lost = _accumulate(acc, lost, h, w, COMPUTE, PRECISION, PRECISION == "ieee")
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
            exponent = 8.0 * tl.load(offsets + slot * stride_offsets + at, mask=inside, other=0).to(tl.float32) - LIFT
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
    tl.store(address, _rounded(da, grad.dtype.element_ty), mask=inside[:, None] & present)


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

    reference (num_rows,) float32 is an integer exponent, so rescaling kept exponentials is exact until they underflow.
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
        exponent -= LIFT
        e = stored * tl.exp2(exponent - base)[:, None]
        z = tl.where(stored > 0, (tl.log2(stored) + exponent[:, None]) * LN2, 0.0) if HAS_CAP else e
    if HAS_CAP:
        t = z / (softcap * inverse_temperature)
        e = tl.where(e > 0, e * (1.0 - t * t), e)
    tl.store(kept_out + address, _rounded(e * factor, kept_out.dtype.element_ty), mask=mask)


