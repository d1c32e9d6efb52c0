"""Triton kernels of saliency flow: NVIDIA and AMD GPUs, CPU tensors in the interpreter. Contract: `saliency_flow_blocked`.

    P = exp(s_RC - lse_R) where visible, else 0;   D = do_R v_C^T;   bins[segment of row, segment of column] += |P · D|

A program owns a row tile R and one column segment, walks that segment's column tiles C (`_spans_kernel`) and adds |P · D| over columns in
registers: two products a tile pair, nothing of size n × m in memory, no binning inside a tile. Full tiles are read by arithmetic on
contiguous columns and unmasked; tiles on an edge of the visible range, or of scattered columns, through the order list and a mask. What
the mask features mean is in low / high / order alone (kernels/visibility.py, kernels/saliency_flow_plan.py): none costs a variant.
Many short segments: one program a tile pair splits its tile by the segments in it (`_pieces_kernel`), which also serves sums over heads,
its loop over heads inside. Column outputs are the transposed walk (`_columns_kernel`).

Every program writes slots that are its own, and `_reduce_kernel` adds the slots of a segment in list order: no atomics, the same bits in
every run, whatever else is in the batch. Products of 16-bit inputs run on tensor cores with float32 sums; P is never rounded.
No value is read back to the host. Scratch: (n / 128 + Sr) · Sc · H numbers a kind of sum; n · Sc · H where rows are kept apart.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import torch
import triton
import triton.language as tl
from llmcore.kernels import saliency_flow_plan as plan
from llmcore.kernels.aot import AotCase
from llmcore.kernels.backends import interpreting
from torch import Tensor

# B batch, H query heads, G key/value heads, n rows, m columns, d / e head sizes of key / value, R / C row / column segments

HEADSUM, ROW_BINS, COLUMN_BINS, MATRIX = 16, 32, 64, 128  # bits of `outputs` behind the four kinds
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
def _spans_kernel(
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
            score = _chunked_product(
                queries, row, loaded, stride_qn, keys, j, there, stride_kn, SIZE, COMPUTE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D
            )
            slope = _chunked_product(
                grads, row, loaded, stride_gn, values, j, there, stride_vn, VALUE_SIZE, COMPUTE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_E
            )
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
def _pieces_kernel(
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
                score = _chunked_product(
                    queries, row, present, stride_qn, keys, j, there, stride_kn, SIZE, COMPUTE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D
                )
                slope = _chunked_product(
                    grads, row, present, stride_gn, values, j, there, stride_vn, VALUE_SIZE, COMPUTE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_E
                )
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
def _columns_kernel(
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
                score = _chunked_product(
                    queries, row, present, stride_qn, keys, j, there, stride_kn, SIZE, COMPUTE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D
                )
                slope = _chunked_product(
                    grads, row, present, stride_gn, values, j, there, stride_vn, VALUE_SIZE, COMPUTE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_E
                )
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
def _reduce_kernel(
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


@dataclasses.dataclass(frozen=True)
class Config:
    """One row of the table: tile of rows and columns, warps, pipeline stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# Keyed by what changes the code: step, padded head size ("chunked": by chunks of it), architecture. "lean" is the default sum alone over
# few segments, without cap and diagonal; "rich" anything else. Not measured: chosen by the registers and shared memory of the compiled
# binary (python -m llmcore.kernels.aot); replace a row together with the device, date and figures that justify it.
_ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
_CONFIGS: dict[tuple[str, int | str, str], Config] = {
    **{("lean", 64, target): Config(128, 128, 8, 3) for target in ("sm_90", "sm_100")},
    **{("lean", 128, target): Config(128, 128, 8, 2) for target in ("sm_90", "sm_100")},
    **{("lean", 256, target): Config(64, 64, 8, 2) for target in ("sm_90", "sm_100")},
    **{("lean", size, "sm_80"): Config(128, 64, 8, 2) for size in (64, 128)},
    ("lean", 256, "sm_80"): Config(64, 32, 8, 2),
    **{("rich", size, target): Config(64, 64, 8, 2) for size in (64, 128) for target in ("sm_90", "sm_100")},
    **{("rich", 256, target): Config(64, 32, 8, 2) for target in ("sm_90", "sm_100")},
    **{("rich", size, "sm_80"): Config(64, 64, 8, 1) for size in (64, 128)},
    ("rich", 256, "sm_80"): Config(64, 32, 8, 1),
    **{(step, size, "gfx942"): Config(64, 64, 4, 2) for step in ("lean", "rich") for size in (64, 128)},
    **{(step, 256, "gfx942"): Config(64, 32, 4, 1) for step in ("lean", "rich")},
    **{(step, "chunked", target): Config(32, 32, 4, 1) for step in ("lean", "rich") for target in _ARCHITECTURES},
}
_CHUNK = {2: 64, 4: 32}  # part of the head size that one step of a chunked product takes, by the operands' width
LARGEST_WHOLE = 256  # of the head sizes that fit a tile of 16-bit operands


def _shape(itemsize: int, size: int, value_size: int) -> tuple[int | str, int, int]:
    """(key of the table, BLOCK_D, BLOCK_E) of a pair of head sizes."""
    block_d, block_e = (max(16, triton.next_power_of_2(x)) for x in (size, value_size))
    if itemsize == 2 and max(block_d, block_e) <= LARGEST_WHOLE:
        return max(64, block_d, block_e), block_d, block_e
    return "chunked", min(block_d, _CHUNK[itemsize]), min(block_e, _CHUNK[itemsize])


@functools.cache
def _architecture(device: torch.device) -> str:
    """The row of the table that serves a device; the interpreter takes the Hopper one."""
    if device.type == "cpu":
        return "sm_90"
    if torch.version.hip is not None:
        return "gfx942"
    major = torch.cuda.get_device_capability(device)[0]
    return "sm_100" if major >= 10 else "sm_90" if major == 9 else "sm_80"


def _reduce(source: Tensor, out: Tensor, begin: Tensor, end: Tensor, batch: int, order: Tensor | None = None) -> None:
    """source (kinds, B, H, slots, width) into out (kinds, B, H, segments, width), any strides of the last two dimensions."""
    kinds, _, heads, segments, width = out.shape
    if out.numel() == 0:
        return
    block = min(32, triton.next_power_of_2(width))
    _reduce_kernel[(segments, heads, kinds * batch)](
        source, out, order, begin.repeat(kinds, 1), end.repeat(kinds, 1),
        width, segments, batch, 0 if order is None else order.shape[1],
        source.stride(2), source.stride(3), source.stride(4), out.stride(2), out.stride(3), out.stride(4),
        GATHER=order is not None, BLOCK_S=128, BLOCK_I=block, num_warps=4,
    )  # fmt: skip


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad: Tensor,
    lse: Tensor,
    low: Tensor,
    high: Tensor,
    diagonal: Tensor | None,
    key_valid: Tensor | None,
    row_segment: Tensor,
    column_segment: Tensor,
    pairs: Tensor,
    scale: float,
    softcap: float,
    outputs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(bins, headsum, row_bins, column_bins, matrix) of the operators' contract; what was not asked for is empty."""
    batch, heads, n, size = query.shape
    m, value_size, device = key.shape[2], value.shape[3], query.device
    row_segments, segments = pairs.shape
    kinds = [kind for kind in range(4) if outputs >> kind & 1]
    planes = {name: kinds.index(kind) if kind in kinds else -1 for kind, name in enumerate(("ABS", "SIGNED", "POS", "ATTN"))}

    def zeros(wanted: int, *shape: int) -> Tensor:
        return torch.zeros(shape if wanted else (0,), dtype=torch.float32, device=device)

    bins = zeros(1, len(kinds), batch, heads, row_segments, segments)
    headsum = zeros(outputs & HEADSUM, batch, row_segments, segments)
    row_bins = zeros(outputs & ROW_BINS, batch, heads, n, segments)
    column_bins = zeros(outputs & COLUMN_BINS, batch, heads, row_segments, m)
    matrix = zeros(outputs & MATRIX, batch, heads, n, m)
    results = bins, headsum, row_bins, column_bins, matrix
    if batch * heads * n * m * row_segments * segments == 0:
        return results

    bucket, block_d, block_e = _shape(query.dtype.itemsize, size, value_size)
    architecture = _architecture(device)
    config = _CONFIGS["lean", bucket, architecture]
    short = plan.few(row_segments, n, config.block_m) and plan.few(segments, m, config.block_n)
    if outputs != 1 or softcap > 0 or diagonal is not None or not short:
        config = _CONFIGS["rich", bucket, architecture]
    wanted = pairs != 0
    # Attention mass is there where the gradient is zero; everything else is zero with it.
    by_gradient = None if planes["ATTN"] >= 0 else grad
    rows_cut = plan.few(row_segments, n, config.block_m)
    columns_cut = plan.few(segments, m, config.block_n)
    columns = plan.column_side(column_segment, key_valid, wanted, config.block_n, columns_cut)
    rows = plan.row_side(row_segment, low, high, wanted, by_gradient, config.block_m, rows_cut)
    row_slots, column_slots = rows.tiles + row_segments, columns.tiles + segments
    by_row = bool(outputs & ROW_BINS)
    spans = columns_cut and (rows_cut or by_row or n * segments <= row_slots * column_slots)

    strides = [t.stride(dim) for t in (query, key, value, grad) for dim in range(3)]
    common = {
        "CAPPED": softcap > 0, "DIAGONAL": diagonal is not None, "SIZE": size, "VALUE_SIZE": value_size,
        "COMPUTE": _compute(query.dtype), "PRECISION": _precision(query.dtype), "CHUNKED": bucket == "chunked",
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_D": block_d, "BLOCK_E": block_e,
        "num_warps": config.num_warps, "num_stages": config.num_stages,
    }  # fmt: skip
    tensors = query, key, value, grad, lse, low, high, diagonal
    group = heads // key.shape[1]
    numbers = float(scale), float(softcap)

    if kinds and spans:
        apart = by_row or not rows_cut
        slots = n if apart else rows.tiles
        partial = (torch.zeros if apart else torch.empty)(len(kinds), batch, heads, slots, segments, dtype=torch.float32, device=device)
        _spans_kernel[(rows.tiles * segments, heads, batch)](
            *tensors, rows.order, rows.segment, rows.start, rows.length, columns.order, columns.start, columns.length,
            plan.row_spans(rows, columns, low, high, diagonal, wanted, m, bucket != "chunked"), pairs, partial, matrix,
            n, m, group, rows.tiles, columns.tiles, segments, batch * heads * slots * segments, *strides, *numbers,
            **planes, ROWS=apart, STORE=bool(outputs & MATRIX), **common,
        )  # fmt: skip
        if apart:
            _reduce(partial, bins, rows.begin[:, :-1].int(), rows.begin[:, 1:].int(), batch, rows.order)
        else:
            _reduce(partial, bins, rows.tile_begin.int(), rows.tile_end.int(), batch)
        if by_row:
            row_bins = partial[planes["ABS"]]

    def pieces(planes: dict[str, int], count: int, over_heads: bool, into: Tensor) -> None:
        inner = 1 if over_heads else heads
        partial = torch.zeros(count, batch, inner, row_slots, column_slots, dtype=torch.float32, device=device)
        separate = not over_heads and by_row
        parts = zeros(separate, 1, batch, heads, n, column_slots)
        _pieces_kernel[(rows.tiles * columns.tiles, inner, batch)](
            *tensors, rows.order, rows.segment, rows.start, rows.length, rows.first.int(), (rows.last + 1).int(),
            columns.order, columns.segment, columns.start, columns.length, columns.first.int(), (columns.last + 1).int(),
            plan.tile_pairs(rows, columns, low, high, wanted, m), pairs, partial, parts, matrix,
            n, m, heads, heads if over_heads else 1, group, rows.tiles, columns.tiles, row_segments, segments, partial.stride(0),
            *strides, *numbers,
            **planes, BY_ROW=separate, STORE=bool(outputs & MATRIX) and not over_heads, **common,
        )  # fmt: skip
        by_segment = torch.empty(count, batch, inner, row_segments, column_slots, dtype=torch.float32, device=device)
        _reduce(partial, by_segment, *rows.pieces(), batch)
        _reduce(by_segment.mT, into.view(count, batch, inner, row_segments, segments).mT, *columns.pieces(), batch)
        if separate:
            _reduce(parts.mT, row_bins[None].mT, *columns.pieces(), batch)

    if kinds and not spans:
        pieces(planes, len(kinds), False, bins)
    if outputs & HEADSUM:
        pieces({"ABS": 0, "SIGNED": -1, "POS": -1, "ATTN": -1}, 1, True, headsum)
    if outputs & COLUMN_BINS:
        if not rows.cut:
            rows = plan.row_side(row_segment, low, high, wanted, by_gradient, config.block_m, True)
        _columns_kernel[(columns.tiles * row_segments, heads, batch)](
            *tensors, rows.order, rows.start, rows.length, columns.order, columns.segment, columns.start, columns.length,
            plan.column_spans(rows, columns, low, high, wanted, m), pairs, column_bins,
            n, m, group, rows.tiles, columns.tiles, row_segments, segments, *strides, *numbers, **common,
        )  # fmt: skip
    return bins, headsum, row_bins, column_bins, matrix


def _compute(dtype: torch.dtype) -> tl.dtype:
    """Operand type of the products. The interpreter has no bfloat16 product; widening first gives the same exact products."""
    if dtype == torch.bfloat16:
        return tl.float32 if interpreting() else tl.bfloat16
    return {torch.float32: tl.float32, torch.float16: tl.float16}[dtype]


def _precision(dtype: torch.dtype) -> str:
    """float32 products are exact ones unless PyTorch was told that TF32 will do."""
    return "ieee" if dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest" else "tf32"


def aot_cases() -> list[AotCase]:
    """Head sizes × dtypes × options. What a mask does is in the data, so causal, window, padding and documents are no variants."""
    pointers = {
        name: kind
        for kind, names in {
            "*i32": (
                "low high diagonal row_order row_segment row_start row_count row_first row_end column_order column_segment column_start "
                "column_count column_first column_end spans active order begin end"
            ),
            "*u8": "pairs",
            "*fp32": "lse partial by_row matrix column_bins source out",
        }.items()
        for name in names.split()
    }
    wide = ("plane", "source_plane", "out_plane", "source_slot", "out_segment")
    off = {"CAPPED": False, "DIAGONAL": False, "diagonal": None}
    on = {"CAPPED": True, "DIAGONAL": True}
    first = {"ABS": 0, "SIGNED": -1, "POS": -1, "ATTN": -1}
    every = {"ABS": 0, "SIGNED": 1, "POS": 2, "ATTN": 3}
    plain = {"STORE": False, "matrix": None}
    cases = []

    def case(name, kernel, config, constants, target, kind):
        tensors = {name: f"*{kind}" for name in ("query", "key", "value", "grad")}
        signature = {}
        for argument in kernel.arg_names:
            if argument in constants or argument.isupper():
                signature[argument] = "constexpr"
            elif argument in ("scale", "softcap"):
                signature[argument] = "fp32"
            else:
                signature[argument] = {**pointers, **tensors}.get(argument, "i64" if argument in wide else "i32")
        divisible = tuple(argument for argument in signature if argument.startswith("stride_") and signature[argument] == "i32")
        stack = "float32 on scalar units, or head sizes beyond 256: tens of bytes of stack beside hundreds of products an entry"
        spills = dict.fromkeys(("sm_80", "sm_90", "sm_100"), stack) if constants.get("CHUNKED") else {}
        everyday = "bf16 128" in name or (target == "sm_90" and "fp32 64" in name)
        cases.append(
            AotCase(f"saliency_flow {name}", kernel, signature, constants, config.num_warps, config.num_stages, divisible, (target,),
                    spills, everyday)
        )  # fmt: skip

    sizes = [(kind, size, size) for kind in ("bf16", "fp16", "fp32") for size in (64, 128, 256)] + [("bf16", 576, 512)]
    dtypes = {"bf16": (2, tl.bfloat16), "fp16": (2, tl.float16), "fp32": (4, tl.float32)}
    for target in _ARCHITECTURES:
        for kind, size, value_size in sizes:
            itemsize, compute = dtypes[kind]
            bucket, block_d, block_e = _shape(itemsize, size, value_size)

            def add(name, kernel, constants, step="rich", target=target, kind=kind, size=size, value_size=value_size, compute=compute,
                    bucket=bucket, block_d=block_d, block_e=block_e):  # fmt: skip
                config = _CONFIGS[step, bucket, target]
                shape = {
                    "SIZE": size, "VALUE_SIZE": value_size, "BLOCK_D": block_d, "BLOCK_E": block_e, "BLOCK_M": config.block_m,
                    "BLOCK_N": config.block_n, "COMPUTE": compute, "PRECISION": "ieee", "CHUNKED": bucket == "chunked",
                }  # fmt: skip
                case(f"{name} {kind} {size}", kernel, config, {**shape, **constants}, target, kind)

            rows = {"ROWS": False, "row_segment": None, "pairs": None}
            add("spans", _spans_kernel, {**off, **first, **plain, **rows}, "lean")
            add("spans.all_options", _spans_kernel, {**on, **every, "STORE": True, "ROWS": True})
            add("pieces.heads", _pieces_kernel, {**off, **first, **plain, "BY_ROW": False, "by_row": None})
            add("pieces.all_options", _pieces_kernel, {**on, **every, "STORE": True, "BY_ROW": True})
            add("columns", _columns_kernel, on)
        for name, constants in (("reduce", {"GATHER": False, "order": None}), ("reduce.gather", {"GATHER": True})):
            case(name, _reduce_kernel, Config(0, 0, 4, 1), {**constants, "BLOCK_S": 128, "BLOCK_I": 32}, target, "fp32")
    return cases
