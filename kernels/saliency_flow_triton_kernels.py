"""Triton device code of saliency flow; what launches it and what the tiles are: kernels/saliency_flow_triton.py.

    P = exp(s_RC - lse_R) where visible, else 0;   D = do_R v_C^T;   bins[segment of row, segment of column] += |P · D|

Work comes as records of tile lists (kernels/saliency_flow_tiles.py). Every program writes slots that are its own: no atomics.
"""

from __future__ import annotations

import numpy as np
import triton
import triton.language as tl
from llmcore.kernels.backends import interpreting

# B batch, H query heads, G key/value heads, n rows, m columns, d / e head sizes of key / value, R / C row / column segments

LOG2E = tl.constexpr(1.4426950408889634)

if interpreting():
    from triton.runtime import interpreter

    _patch = interpreter._patch_lang_tensor

    def _patch_lang_tensor(tensor, scope):
        """NumPy 2.4 has no int() of the one-element arrays that Triton 3.6's interpreter keeps scalars in; loop bounds need it."""
        _patch(tensor, scope)

        def index(self):
            data = self.handle.data
            return int(data.item() if isinstance(data, np.ndarray) else data)

        scope.set_attr(tensor, "__index__", index)

    interpreter._patch_lang_tensor = _patch_lang_tensor


@triton.jit
def _log2_scores(s, scale, softcap, CAPPED: tl.constexpr):
    """softcap(scale · s) · log2 e. Near zero 1 - e^-2x cancels: there the odd series, good to 4e-9 below 0.4."""
    if CAPPED:
        y = s * (scale / softcap)
        x = tl.abs(y)
        t = tl.exp2(x * -2.8853900817779268)
        z = x * x
        series = x * (
            1.0
            + z * (-0.3333333333 + z * (0.1333333333 + z * (-0.0539682540 + z * (0.0218694885 + z * (-0.0088632355 + z * 0.0035921280)))))
        )
        value = tl.where(x < 0.4, series, (1.0 - t) / (1.0 + t))
        return tl.where(y < 0, -value, value) * (softcap * LOG2E)
    else:
        return s * (scale * LOG2E)


@triton.jit
def _row_lse(lse, row, present):
    """lse in base 2; a row that sees nothing (-inf) and a lane without a row get +inf, so that P = 0 there."""
    value = tl.load(lse + row, mask=present, other=float("-inf"))
    return tl.where(value == float("-inf"), float("inf"), value * LOG2E)


@triton.jit
def _rows(tensor, token, present, stride, at, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """(tokens, BLOCK) from column `at` of a matrix with unit inner stride, zero outside."""
    d = at + tl.arange(0, BLOCK)
    mask = present[:, None]
    if SIZE % BLOCK != 0:
        mask = mask & (d < SIZE)[None, :]
    return tl.load(tensor + token[:, None].to(tl.int64) * stride + d[None, :], mask=mask, other=0.0)


@triton.jit
def _columns(tensor, token, present, stride, at, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """(BLOCK, tokens): `_rows` transposed, as the second operand of a product."""
    d = at + tl.arange(0, BLOCK)
    mask = present[None, :]
    if SIZE % BLOCK != 0:
        mask = mask & (d < SIZE)[:, None]
    return tl.load(tensor + token[None, :].to(tl.int64) * stride + d[:, None], mask=mask, other=0.0)


@triton.jit
def _chunked_product(
    left, row, row_present, stride_left, right, column, column_present, stride_right, SIZE: tl.constexpr, COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(rows, columns) of left rightᵀ by chunks of the head size: float32 products on scalar units would unroll a whole head otherwise."""
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for at in range(0, SIZE, BLOCK):
        x = _rows(left, row, row_present, stride_left, at, SIZE, BLOCK).to(COMPUTE)
        y = _columns(right, column, column_present, stride_right, at, SIZE, BLOCK).to(COMPUTE)
        total = tl.dot(x, y, total, input_precision=PRECISION)
    return total


@triton.jit
def _chunked_products(
    queries, grads, keys, values, row, row_present, column, column_present, stride_qn, stride_gn, stride_kn, stride_vn,
    SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Both products of a tile pair, q_R k_Cᵀ and do_R v_Cᵀ."""
    score = _chunked_product(
        queries, row, row_present, stride_qn, keys, column, column_present, stride_kn, SIZE, COMPUTE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D
    )
    slope = _chunked_product(
        grads, row, row_present, stride_gn, values, column, column_present, stride_vn, VALUE_SIZE, COMPUTE, PRECISION, BLOCK_M, BLOCK_N,
        BLOCK_E,
    )  # fmt: skip
    return score, slope


@triton.jit
def spans_kernel(
    query, key, value, grad, lse, low, high, diagonal, row_order, row_segment, row_start, row_count, column_order, column_start,
    column_count, spans, pairs, partial, matrix, n, m, group, row_tiles, column_tiles, segments, plane, stride_qb, stride_qh,
    stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, stride_gb, stride_gh, stride_gn, scale, softcap,
    CAPPED: tl.constexpr, DIAGONAL: tl.constexpr, ABS: tl.constexpr, SIGNED: tl.constexpr, POS: tl.constexpr, ATTN: tl.constexpr,
    ROWS: tl.constexpr, STORE: tl.constexpr, SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr, COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr, CHUNKED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Row tile × column segment. Grid (row tiles · segments, H, B), later tiles first: under a causal mask they have most to do.

    partial (kinds, B, H, slots, segments) float32, `plane` = B · H · slots · segments; ABS … ATTN: a kind's plane, or -1. A slot is a row
    tile, or with ROWS a row (then zero where nobody writes). STORE: |P · D| into matrix (B, H, n, m) too.
    """
    h = tl.program_id(1)
    wide_b = tl.program_id(2).to(tl.int64)
    head = wide_b * tl.num_programs(1) + h
    span = spans + ((wide_b + 1) * row_tiles * segments - 1 - tl.program_id(0)) * 7
    edges = tl.load(span)
    fulls = tl.load(span + 1)
    first = tl.load(span + 2)
    before = tl.load(span + 3)
    column = tl.load(span + 4)
    tile = tl.load(span + 5)
    segment = tl.load(span + 6)
    lane = tl.arange(0, BLOCK_M)
    at = tl.load(row_start + wide_b * row_tiles + tile)
    present = lane < tl.load(row_count + wide_b * row_tiles + tile)
    # A program without columns loads no rows; its slot gets the zeros it starts with.
    loaded = present & (edges + fulls > 0)
    row = tl.load(row_order + wide_b * n + at + lane, mask=loaded, other=0)
    row_low = tl.load(low + wide_b * n + row, mask=loaded, other=0)
    row_high = tl.load(high + wide_b * n + row, mask=loaded, other=0)
    if DIAGONAL:
        own = tl.load(diagonal + wide_b * n + row, mask=loaded, other=-1)
    log_sum = _row_lse(lse, head * n + row, loaded)
    queries = query + wide_b * stride_qb + h.to(tl.int64) * stride_qh
    grads = grad + wide_b * stride_gb + h.to(tl.int64) * stride_gh
    if not CHUNKED:
        q = _rows(queries, row, loaded, stride_qn, 0, SIZE, BLOCK_D).to(COMPUTE)
        g = _rows(grads, row, loaded, stride_gn, 0, VALUE_SIZE, BLOCK_E).to(COMPUTE)
    keys = key + wide_b * stride_kb + (h // group).to(tl.int64) * stride_kh
    values = value + wide_b * stride_vb + (h // group).to(tl.int64) * stride_vh
    absolute = tl.zeros((BLOCK_M,), tl.float32)
    signed = tl.zeros((BLOCK_M,), tl.float32)
    positive = tl.zeros((BLOCK_M,), tl.float32)
    attention = tl.zeros((BLOCK_M,), tl.float32)
    c = tl.arange(0, BLOCK_N)

    # Tiles on an edge of what the rows see, and tiles of scattered columns.
    for i in range(0, edges):
        t = wide_b * column_tiles + first + i + (before <= i).to(tl.int32) * fulls
        there = c < tl.load(column_count + t)
        j = tl.load(column_order + wide_b * m + tl.load(column_start + t) + c, mask=there, other=0)
        if CHUNKED:
            score, slope = _chunked_products(
                queries, grads, keys, values, row, loaded, j, there, stride_qn, stride_gn, stride_kn, stride_vn, SIZE, VALUE_SIZE,
                COMPUTE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_E,
            )  # fmt: skip
        else:
            k = _columns(keys, j, there, stride_kn, 0, SIZE, BLOCK_D).to(COMPUTE)
            v = _columns(values, j, there, stride_vn, 0, VALUE_SIZE, BLOCK_E).to(COMPUTE)
            score = tl.dot(q, k, input_precision=PRECISION)
            slope = tl.dot(g, v, input_precision=PRECISION)
        s = _log2_scores(score, scale, softcap, CAPPED)
        visible = there[None, :] & (j[None, :] >= row_low[:, None]) & (j[None, :] < row_high[:, None])
        if DIAGONAL:
            visible = visible & (j[None, :] != own[:, None])
        p = tl.exp2(tl.where(visible, s - log_sum[:, None], float("-inf")))
        x = p * slope
        if ABS >= 0:
            absolute += tl.sum(tl.abs(x), 1)
        if SIGNED >= 0:
            signed += tl.sum(x, 1)
        if POS >= 0:
            positive += tl.sum(tl.where(x < 0, 0.0, x), 1)
        if ATTN >= 0:
            attention += tl.sum(p, 1)
        if STORE:
            tl.store(matrix + (head * n + row[:, None]) * m + j[None, :], tl.abs(x), mask=loaded[:, None] & there[None, :])

    # Tiles that every row sees whole, contiguous in memory: no mask, no index.
    if not CHUNKED:
        d = tl.arange(0, BLOCK_D)
        e = tl.arange(0, BLOCK_E)
        key_tile = keys + c[None, :].to(tl.int64) * stride_kn + d[:, None]
        value_tile = values + c[None, :].to(tl.int64) * stride_vn + e[:, None]
        for i in range(0, fulls):
            start = (column + i * BLOCK_N).to(tl.int64)
            if SIZE == BLOCK_D:
                k = tl.load(key_tile + start * stride_kn).to(COMPUTE)
            else:
                k = tl.load(key_tile + start * stride_kn, mask=(d < SIZE)[:, None], other=0.0).to(COMPUTE)
            if VALUE_SIZE == BLOCK_E:
                v = tl.load(value_tile + start * stride_vn).to(COMPUTE)
            else:
                v = tl.load(value_tile + start * stride_vn, mask=(e < VALUE_SIZE)[:, None], other=0.0).to(COMPUTE)
            s = _log2_scores(tl.dot(q, k, input_precision=PRECISION), scale, softcap, CAPPED)
            p = tl.exp2(s - log_sum[:, None])
            x = p * tl.dot(g, v, input_precision=PRECISION)
            if ABS >= 0:
                absolute += tl.sum(tl.abs(x), 1)
            if SIGNED >= 0:
                signed += tl.sum(x, 1)
            if POS >= 0:
                positive += tl.sum(tl.where(x < 0, 0.0, x), 1)
            if ATTN >= 0:
                attention += tl.sum(p, 1)
            if STORE:
                tl.store(matrix + (head * n + row[:, None]) * m + start + c[None, :], tl.abs(x), mask=loaded[:, None])

    if ROWS:
        id = tl.load(row_segment + wide_b * n + at + lane, mask=loaded, other=0)
        wanted = tl.load(pairs + id.to(tl.int64) * segments + segment, mask=loaded, other=0) != 0
        out = partial + (head * n + row) * segments + segment
        if ABS >= 0:
            tl.store(out + ABS * plane, tl.where(wanted, absolute, 0.0), mask=loaded)
        if SIGNED >= 0:
            tl.store(out + SIGNED * plane, tl.where(wanted, signed, 0.0), mask=loaded)
        if POS >= 0:
            tl.store(out + POS * plane, tl.where(wanted, positive, 0.0), mask=loaded)
        if ATTN >= 0:
            tl.store(out + ATTN * plane, tl.where(wanted, attention, 0.0), mask=loaded)
    else:
        out = partial + (head * row_tiles + tile) * segments + segment
        if ABS >= 0:
            tl.store(out + ABS * plane, tl.sum(absolute, 0))
        if SIGNED >= 0:
            tl.store(out + SIGNED * plane, tl.sum(signed, 0))
        if POS >= 0:
            tl.store(out + POS * plane, tl.sum(positive, 0))
        if ATTN >= 0:
            tl.store(out + ATTN * plane, tl.sum(attention, 0))


# `count` stays a number at run time: with a loop of one round folded away, Triton 3.6 cannot lay out the tile for sm_100.
@triton.jit(do_not_specialize=["count"])
def pieces_kernel(
    query, key, value, grad, lse, low, high, diagonal, row_order, row_segment, row_start, row_count, row_first, row_end,
    column_order, column_segment, column_start, column_count, column_first, column_end, active, pairs, partial, by_row, matrix, n, m,
    heads, count, group, row_tiles, column_tiles, row_segments, segments, plane, stride_qb, stride_qh, stride_qn, stride_kb,
    stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, stride_gb, stride_gh, stride_gn, scale, softcap, CAPPED: tl.constexpr,
    DIAGONAL: tl.constexpr, ABS: tl.constexpr, SIGNED: tl.constexpr, POS: tl.constexpr, ATTN: tl.constexpr, BY_ROW: tl.constexpr,
    STORE: tl.constexpr, SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
    CHUNKED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Row tile × column tile, split by the segments of both. Grid (row tiles · column tiles, H / count, B), `count` = 1 or H heads each.

    The part of row segment s in row tile r and column segment t in column tile c has slot (r + s, c + t) of partial (kinds, B, H / count,
    row tiles + R, column tiles + C), zero where nobody writes; `plane` is one kind's size. Kinds are those of Σ_h P · D over the heads.
    BY_ROW: by_row (B, H, n, column tiles + C) receives each row's |P · D| by part.
    """
    b = tl.program_id(2).to(tl.int64)
    first_head = tl.program_id(1)
    record = active + (b * row_tiles * column_tiles + tl.program_id(0)) * 3
    if tl.load(record) != 0:
        r = tl.load(record + 1)
        t = tl.load(record + 2)
        row_tile = b * row_tiles + r
        column_tile = b * column_tiles + t
        lane = tl.arange(0, BLOCK_M)
        present = lane < tl.load(row_count + row_tile)
        at = b * n + tl.load(row_start + row_tile) + lane
        row = tl.load(row_order + at, mask=present, other=0)
        row_id = tl.load(row_segment + at, mask=present, other=0)
        row_low = tl.load(low + b * n + row, mask=present, other=0)
        row_high = tl.load(high + b * n + row, mask=present, other=0)
        c = tl.arange(0, BLOCK_N)
        there = c < tl.load(column_count + column_tile)
        place = b * m + tl.load(column_start + column_tile) + c
        j = tl.load(column_order + place, mask=there, other=0)
        column_id = tl.load(column_segment + place, mask=there, other=-1)
        visible = there[None, :] & (j[None, :] >= row_low[:, None]) & (j[None, :] < row_high[:, None])
        if DIAGONAL:
            visible = visible & (j[None, :] != tl.load(diagonal + b * n + row, mask=present, other=-1)[:, None])
        x = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        p = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for i in range(0, count):
            h = (first_head + i).to(tl.int64)
            log_sum = _row_lse(lse, (b * heads + h) * n + row, present)
            queries = query + b * stride_qb + h * stride_qh
            grads = grad + b * stride_gb + h * stride_gh
            keys = key + b * stride_kb + (h // group) * stride_kh
            values = value + b * stride_vb + (h // group) * stride_vh
            if CHUNKED:
                score, slope = _chunked_products(
                    queries, grads, keys, values, row, present, j, there, stride_qn, stride_gn, stride_kn, stride_vn, SIZE, VALUE_SIZE,
                    COMPUTE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_E,
                )  # fmt: skip
            else:
                q = _rows(queries, row, present, stride_qn, 0, SIZE, BLOCK_D).to(COMPUTE)
                k = _columns(keys, j, there, stride_kn, 0, SIZE, BLOCK_D).to(COMPUTE)
                score = tl.dot(q, k, input_precision=PRECISION)
                g = _rows(grads, row, present, stride_gn, 0, VALUE_SIZE, BLOCK_E).to(COMPUTE)
                v = _columns(values, j, there, stride_vn, 0, VALUE_SIZE, BLOCK_E).to(COMPUTE)
                slope = tl.dot(g, v, input_precision=PRECISION)
            p = tl.exp2(tl.where(visible, _log2_scores(score, scale, softcap, CAPPED) - log_sum[:, None], float("-inf")))
            x += p * slope

        head = b * tl.num_programs(1) + first_head
        if STORE:
            tl.store(matrix + (head * n + row[:, None]) * m + j[None, :], tl.abs(x), mask=present[:, None] & there[None, :])
        slots = column_tiles + segments
        row_from = tl.load(row_first + row_tile)
        row_to = tl.load(row_end + row_tile)
        column_from = tl.load(column_first + column_tile)
        column_to = tl.load(column_end + column_tile)
        for column in range(column_from, column_to):
            mine = (column_id == column)[None, :]
            absolute = tl.sum(tl.where(mine, tl.abs(x), 0.0), 1)
            if BY_ROW:
                wanted = tl.load(pairs + row_id.to(tl.int64) * segments + column, mask=present, other=0) != 0
                tl.store(by_row + (head * n + row) * slots + t + column, tl.where(wanted, absolute, 0.0), mask=present)
            if SIGNED >= 0:
                signed = tl.sum(tl.where(mine, x, 0.0), 1)
            if POS >= 0:
                positive = tl.sum(tl.where(mine & (x >= 0), x, 0.0), 1)
            if ATTN >= 0:
                attention = tl.sum(tl.where(mine, p, 0.0), 1)
            for id in range(row_from, row_to):
                keep = present & (row_id == id) & (tl.load(pairs + tl.cast(id, tl.int64) * segments + column) != 0)
                out = partial + (head * (row_tiles + row_segments) + r + id) * slots + t + column
                if ABS >= 0:
                    tl.store(out + ABS * plane, tl.sum(tl.where(keep, absolute, 0.0), 0))
                if SIGNED >= 0:
                    tl.store(out + SIGNED * plane, tl.sum(tl.where(keep, signed, 0.0), 0))
                if POS >= 0:
                    tl.store(out + POS * plane, tl.sum(tl.where(keep, positive, 0.0), 0))
                if ATTN >= 0:
                    tl.store(out + ATTN * plane, tl.sum(tl.where(keep, attention, 0.0), 0))


@triton.jit
def columns_kernel(
    query, key, value, grad, lse, low, high, diagonal, row_order, row_start, row_count, column_order, column_segment, column_start,
    column_count, spans, pairs, column_bins, n, m, group, row_tiles, column_tiles, row_segments, segments, stride_qb, stride_qh,
    stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, stride_gb, stride_gh, stride_gn, scale, softcap,
    CAPPED: tl.constexpr, DIAGONAL: tl.constexpr, SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr, COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr, CHUNKED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Column tile × row segment: column_bins (B, H, R, m), zero where nobody writes. Grid (column tiles · R, H, B), early columns first."""
    h = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    head = b * tl.num_programs(1) + h
    span = spans + (b * column_tiles * row_segments + tl.program_id(0)) * 4
    first = tl.load(span)
    end = tl.load(span + 1)
    column_tile = b * column_tiles + tl.load(span + 2)
    segment = tl.load(span + 3)
    if first < end:
        c = tl.arange(0, BLOCK_N)
        there = c < tl.load(column_count + column_tile)
        place = b * m + tl.load(column_start + column_tile) + c
        j = tl.load(column_order + place, mask=there, other=0)
        queries = query + b * stride_qb + h * stride_qh
        grads = grad + b * stride_gb + h * stride_gh
        keys = key + b * stride_kb + (h // group) * stride_kh
        values = value + b * stride_vb + (h // group) * stride_vh
        if not CHUNKED:
            k = _columns(keys, j, there, stride_kn, 0, SIZE, BLOCK_D).to(COMPUTE)
            v = _columns(values, j, there, stride_vn, 0, VALUE_SIZE, BLOCK_E).to(COMPUTE)
        lane = tl.arange(0, BLOCK_M)
        total = tl.zeros((BLOCK_N,), tl.float32)
        for i in range(first, end):
            present = lane < tl.load(row_count + b * row_tiles + i)
            row = tl.load(row_order + b * n + tl.load(row_start + b * row_tiles + i) + lane, mask=present, other=0)
            if CHUNKED:
                score, slope = _chunked_products(
                    queries, grads, keys, values, row, present, j, there, stride_qn, stride_gn, stride_kn, stride_vn, SIZE, VALUE_SIZE,
                    COMPUTE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_E,
                )  # fmt: skip
            else:
                q = _rows(queries, row, present, stride_qn, 0, SIZE, BLOCK_D).to(COMPUTE)
                g = _rows(grads, row, present, stride_gn, 0, VALUE_SIZE, BLOCK_E).to(COMPUTE)
                score = tl.dot(q, k, input_precision=PRECISION)
                slope = tl.dot(g, v, input_precision=PRECISION)
            log_sum = _row_lse(lse, head * n + row, present)
            row_low = tl.load(low + b * n + row, mask=present, other=0)
            row_high = tl.load(high + b * n + row, mask=present, other=0)
            visible = there[None, :] & (j[None, :] >= row_low[:, None]) & (j[None, :] < row_high[:, None])
            if DIAGONAL:
                visible = visible & (j[None, :] != tl.load(diagonal + b * n + row, mask=present, other=-1)[:, None])
            p = tl.exp2(tl.where(visible, _log2_scores(score, scale, softcap, CAPPED) - log_sum[:, None], float("-inf")))
            total += tl.sum(tl.abs(p * slope), 0)
        id = tl.load(column_segment + place, mask=there, other=0)
        wanted = tl.load(pairs + segment.to(tl.int64) * segments + id, mask=there, other=0) != 0
        tl.store(column_bins + (head * row_segments + segment) * m + j, tl.where(wanted, total, 0.0), mask=there)


@triton.jit
def reduce_kernel(
    source, out, order, begin, end, width, segments, batch, tokens, source_plane, source_slot, source_inner, out_plane,
    out_segment, out_inner, GATHER: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """out[plane, s, i] = Σ over slots [begin_s, end_s) of source[plane, slot, i], in slot order; with GATHER a slot is order[slot].

    Grid (segments, heads, kinds · B); a plane is (kind, b, head), begin and end are (kinds · B, segments).
    """
    s = tl.program_id(0)
    plane = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    first = tl.load(begin + tl.program_id(2) * segments + s)
    last = tl.load(end + tl.program_id(2) * segments + s)
    sequence = (tl.program_id(2) % batch).to(tl.int64) * tokens
    for block in range(0, width, BLOCK_I):
        i = block + tl.arange(0, BLOCK_I)
        total = tl.zeros((BLOCK_I,), tl.float32)
        for start in range(first, last, BLOCK_S):
            slot = start + tl.arange(0, BLOCK_S)
            there = slot < last
            if GATHER:
                slot = tl.load(order + sequence + slot, mask=there, other=0)
            at = source + plane * source_plane + slot[:, None].to(tl.int64) * source_slot + i[None, :].to(tl.int64) * source_inner
            total += tl.sum(tl.load(at, mask=there[:, None] & (i < width)[None, :], other=0.0), 0)
        to = out + plane * out_plane + s.to(tl.int64) * out_segment + i.to(tl.int64) * out_inner
        tl.store(to, total, mask=i < width)
