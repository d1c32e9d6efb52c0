"""The operator behind `saliency_flow`: one contract, three implementations (C++, Triton, blocks of plain PyTorch).

A Problem is one layer with its masks as ranges and its segments as ids; nothing of it is checked again but memory safety.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from llmcore.kernels import backends
from torch import Tensor

# B batch, H query heads, G key/value heads, n rows, m columns, d / e head sizes of key / value, R / C row / column segments

KINDS = ("abs", "signed", "pos", "attn")  # bits 0..3 of `outputs`
HEADSUM, ROW_BINS, COLUMN_BINS, MATRIX = 16, 32, 64, 128

SCHEMA = (
    "(Tensor query, Tensor key, Tensor value, Tensor grad, Tensor lse, Tensor low, Tensor high, Tensor? diagonal, Tensor? key_valid, "
    "Tensor row_segment, Tensor column_segment, Tensor pairs, float scale, float softcap, int outputs)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)  # as csrc/bindings.cpp has it


class Problem(NamedTuple):
    """Arguments of the operator. Accumulation is float32, float64 for float64 inputs."""

    query: Tensor  # (B, H, n, d)
    key: Tensor  # (B, G, m, d)
    value: Tensor  # (B, G, m, e)
    grad: Tensor  # (B, H, n, e), dL/do
    lse: Tensor  # (B, H, n) in the accumulation dtype
    low: Tensor  # (B, n) int32: row i reads valid columns [low, high) but its diagonal
    high: Tensor
    diagonal: Tensor | None  # (B, n) int32
    key_valid: Tensor | None  # (B, m) uint8
    row_segment: Tensor  # (B, n) int32 in [-1, R)
    column_segment: Tensor  # (B, m) int32 in [-1, C)
    pairs: Tensor  # (R, C) uint8, what to compute
    scale: float
    softcap: float  # 0 for none
    outputs: int  # bits: KINDS, then HEADSUM, ROW_BINS, COLUMN_BINS, MATRIX; the last three need "abs"


class Sums(NamedTuple):
    """Results; what was not asked for is empty."""

    bins: Tensor  # (kinds, B, H, R, C)
    headsum: Tensor  # (B, R, C)
    row_bins: Tensor  # (B, H, n, C)
    column_bins: Tensor  # (B, H, R, m)
    matrix: Tensor  # (B, H, n, m)

    @classmethod
    def of(cls, problem: Problem, new: str = "new_zeros") -> Sums:
        batch, heads, n, _ = problem.query.shape
        m, (rows, columns), outputs = problem.key.shape[2], problem.pairs.shape, problem.outputs
        dtype = torch.float64 if problem.query.dtype == torch.float64 else torch.float32
        shapes = (
            (bin(outputs & 15).count("1"), batch, heads, rows, columns),
            (batch, rows, columns) if outputs & HEADSUM else (0,),
            (batch, heads, n, columns) if outputs & ROW_BINS else (0,),
            (batch, heads, rows, m) if outputs & COLUMN_BINS else (0,),
            (batch, heads, n, m) if outputs & MATRIX else (0,),
        )
        return cls(*(getattr(problem.query, new)(shape, dtype=dtype) for shape in shapes))


# From the reference to the kernels. A row's range [low, high) and the valid columns are all that a mask is (kernels/visibility.py). With
# lse known, an entry of A
# needs one score, an entry of dA one more product, and both are consumed at once: for a tile of rows R and columns C
#     P = exp(s_RC - lse_R) where visible, else 0;   D = do_R v_C^T;   bins[segment of row, segment of column] += |P · D|
# Nothing flows between tiles, so a tile is skipped when no pair of its segments is wanted, when none of its pairs is visible, or when do_R
# is zero.
# Invariant: after column tile t, row r's bins hold Σ over its visible columns < t · width, split by segment; Σ_j G_rj ends at do_r · o_r.
#
# Outputs that ignore segments (row_sum, col_sum) or keep one side (row_by_seg, col_by_seg) need tokens of no segment too: those get one
# extra bucket at the end.


@torch.library.custom_op("llmcore::saliency_flow_blocked", mutates_args=(), schema=SCHEMA)
def _saliency_flow_blocked(*arguments):
    """Blocks of plain PyTorch: any device, and float64. Peak extra memory: 4 · H · 128 · 512 numbers."""
    return tuple(_blocked(Problem(*arguments)))


def _blocked(problem: Problem) -> Sums:
    query, key, value, grad, lse, low, high, diagonal, key_valid, row_segment, column_segment, pairs, scale, softcap, outputs = problem
    batch, heads, _, d = query.shape
    kv, m, width = key.shape[1], key.shape[2], value.shape[3]
    row_segments, column_segments = pairs.shape
    results = bins, headsum, row_bins, column_bins, matrix = Sums.of(problem)
    dtype = bins.dtype
    kinds = [kind for kind in range(4) if outputs >> kind & 1]
    wanted = pairs.bool()
    for b in range(batch):
        segment = row_segment[b].long()
        live = (segment >= 0) & wanted.any(1)[segment.clamp(min=0)] & (high[b] > low[b])
        if not outputs >> KINDS.index("attn") & 1:
            live &= (grad[b] != 0).any(-1).any(0)
        rows = live.nonzero().flatten()
        columns = torch.nn.functional.one_hot(column_segment[b].long() + 1, column_segments + 1)[:, 1:].to(dtype)
        for at in rows.split(128) if len(rows) else ():
            segments = segment[at]
            by_row = torch.nn.functional.one_hot(segments, row_segments).to(dtype)
            allowed = wanted[segments]
            needed = allowed.any(0)
            q = query[b][:, at].to(dtype).reshape(kv, -1, d)
            do = grad[b][:, at].to(dtype).reshape(kv, -1, width)
            row_lse = lse[b][:, at].to(dtype)
            row_lse = torch.where(row_lse == -torch.inf, torch.inf, row_lse)[..., None]
            sums = query.new_zeros(len(kinds), heads, len(at), column_segments, dtype=dtype)
            head_sums = query.new_zeros(len(at), column_segments, dtype=dtype)
            for start in range(int(low[b, at].min()) // 512 * 512, int(high[b, at].max()), 512):
                cut = slice(start, min(start + 512, m))
                in_segment = columns[cut]
                if not bool((in_segment * needed).any()):
                    continue
                j = torch.arange(cut.start, cut.stop, device=query.device)
                visible = (j >= low[b, at, None]) & (j < high[b, at, None])
                if diagonal is not None:
                    visible &= j != diagonal[b, at, None]
                if key_valid is not None:
                    visible &= key_valid[b, cut] != 0
                scores = (q @ key[b, :, cut].to(dtype).transpose(1, 2)).mul_(scale).view(heads, len(at), -1)
                if softcap > 0:
                    scores = softcap * torch.tanh(scores / softcap)
                p = (scores - row_lse).masked_fill_(~visible, -torch.inf).exp_()
                g = (do @ value[b, :, cut].to(dtype).transpose(1, 2)).view_as(p).mul_(p)
                absolute = g.abs()
                for k, kind in enumerate(kinds):
                    sums[k] += (absolute, g, g.clamp(min=0), p)[kind] @ in_segment
                if outputs & HEADSUM:
                    head_sums += g.sum(0).abs() @ in_segment
                if outputs & COLUMN_BINS:
                    column_bins[b, :, :, cut] += by_row.T @ absolute
                if outputs & MATRIX:
                    matrix[b, :, at, cut] = absolute
            sums, head_sums = sums * allowed, head_sums * allowed
            bins[:, b] += by_row.T @ sums
            if outputs & HEADSUM:
                headsum[b] += by_row.T @ head_sums
            if outputs & ROW_BINS:
                row_bins[b, :, at] = sums[kinds.index(0)]
    return Sums(*results)


@torch.library.custom_op("llmcore::saliency_flow_triton", mutates_args=(), schema=SCHEMA)
def _saliency_flow_triton(*arguments):
    """A GPU (or Triton's interpreter): kernels/saliency_flow_triton.py."""
    from llmcore.kernels import saliency_flow_triton

    return tuple(saliency_flow_triton.forward(Problem(*arguments)))


def _shapes(*arguments):
    return tuple(Sums.of(Problem(*arguments), "new_empty"))


_saliency_flow_blocked.register_fake(_shapes)
_saliency_flow_triton.register_fake(_shapes)
if backends.extension_error() is None:
    torch.library.register_fake("llmcore::saliency_flow_fwd", _shapes)
