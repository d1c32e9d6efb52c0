"""What the layers of a model share when their saliency flow is binned: masks as ranges, segments, outputs, pair counts.

None of it depends on a layer's numbers, so a recorder makes it once for each kind of mask and uses it for every layer of that kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from llmcore.kernels.attention_checks import check_masks
from llmcore.kernels.saliency_flow_operator import COLUMN_BINS, HEADSUM, KINDS, MATRIX, ROW_BINS
from llmcore.kernels.visibility import Visibility, pair_counts, visible_ranges
from torch import Tensor

# B batch, n rows (queries), m columns (keys), Sr / Sc row / column segments

OUTPUTS = (*KINDS, "headsum_abs", "row_by_seg", "col_by_seg", "row_sum", "col_sum", "matrix")


def output_names(outputs: Sequence[str]) -> set[str]:
    if isinstance(outputs, str):
        raise TypeError(f"outputs must be a sequence of names, got the string {outputs!r}; pass ({outputs!r},)")
    aliases = {**{f"{kind}_sum": kind for kind in KINDS}, "headsum": "headsum_abs", "large_matrix": "matrix"}
    chosen = {aliases.get(name, name) for name in outputs}
    unknown = chosen - set(OUTPUTS)
    if unknown or not chosen:
        raise ValueError(f"outputs must be among {OUTPUTS}, got {tuple(outputs)}")
    return chosen


def _check_segments(name: str, segments: Tensor, shape: tuple[int, int], count: int | None, count_name: str) -> int:
    if segments.is_floating_point() or segments.dtype == torch.bool:
        raise TypeError(f"{name} must be integer ids (-1: in no segment), got {segments.dtype}")
    if segments.shape != shape:
        raise ValueError(f"{name} must be {shape}, one id a token, got {tuple(segments.shape)}")
    if count is not None and count < 0:
        raise ValueError(f"{count_name} must not be negative, got {count}")
    if segments.numel() == 0:
        return count or 0
    if count is None or (segments.device.type == "cpu" and not torch.compiler.is_compiling()):
        smallest, largest = (int(x) for x in segments.aminmax())
        if smallest < -1 or (count is not None and largest >= count):
            bad = smallest if smallest < -1 else largest
            raise ValueError(f"{name} must be -1 or in [0, {count_name}) = [0, {largest + 1 if count is None else count}), got {bad}")
        count = largest + 1 if count is None else count
    return count


class FlowPlan(NamedTuple):
    """What masks, segments and outputs fix whatever a layer's numbers are: made once by `plan_saliency_flow`, used by every layer."""

    options: dict[str, Any]  # causal, q_offset, window, cu_seqlens_q, cu_seqlens_k
    key_mask: Tensor | None
    row_segments: Tensor  # (B, n)
    col_segments: Tensor  # (B, m)
    num_row_segments: int
    num_col_segments: int
    pairs: Tensor | None  # (Sr, Sc) bool
    outputs: tuple[str, ...]
    exclude_diagonal: bool
    visible: Visibility
    visible_count: Tensor  # as in SaliencyFlow
    box: Tensor
    # As the operator takes them; one more segment on a side whose tokens without a segment are needed.
    key_valid: Tensor | None
    row_ids: Tensor
    col_ids: Tensor
    compute: Tensor
    code: int


def plan_saliency_flow(
    row_segments: Tensor,
    col_segments: Tensor | None = None,
    *,
    num_row_segments: int | None = None,
    num_col_segments: int | None = None,
    causal: bool = True,
    q_offset: int | None = None,
    window: int | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    pairs: Tensor | None = None,
    outputs: Sequence[str] = ("abs",),
    exclude_diagonal: bool = False,
) -> FlowPlan:
    """The part of `saliency_flow` that does not depend on query, key, value and gradient. Arguments, errors and device as there.

    Memory: 64 bytes a row and 32 a column, and 64 · 8 a column while pairs are counted.
    """
    chosen = output_names(outputs)
    if row_segments.dim() != 2:
        raise ValueError(f"row_segments must be (batch, num_rows), got {tuple(row_segments.shape)}")
    if col_segments is None:
        col_segments = row_segments
        num_col_segments = num_row_segments if num_col_segments is None else num_col_segments
    batch, n = row_segments.shape
    m = col_segments.shape[-1]
    device = row_segments.device
    rows_in = _check_segments("row_segments", row_segments, (batch, n), num_row_segments, "num_row_segments")
    cols_in = _check_segments("col_segments", col_segments, (batch, m), num_col_segments, "num_col_segments")
    if pairs is not None and pairs.shape != (rows_in, cols_in):
        raise ValueError(f"pairs must be (num_row_segments, num_col_segments) = {(rows_in, cols_in)}, got {tuple(pairs.shape)}")
    for name, t in (("col_segments", col_segments), ("pairs", pairs), ("key_mask", key_mask)):
        if t is not None and t.device != device:
            raise ValueError(f"{name} must be on row_segments' device {device}, got {t.device}")
    check_masks(batch, n, m, window, key_mask, cu_seqlens_q, cu_seqlens_k)
    options: dict[str, Any] = {"causal": causal, "q_offset": q_offset, "window": window}
    options |= {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    visible = visible_ranges(batch, n, m, device=device, **options)
    count, box = pair_counts(visible, row_segments, col_segments, rows_in, cols_in, key_mask=key_mask, exclude_diagonal=exclude_diagonal)
    wanted = None if pairs is None else pairs.bool()

    everything = bool(chosen & {"row_sum", "col_sum", "matrix"})  # then every visible pair is computed, wanted or not
    row_bucket = everything or "row_by_seg" in chosen
    col_bucket = everything or "col_by_seg" in chosen
    compute = torch.zeros(rows_in + row_bucket, cols_in + col_bucket, dtype=torch.bool, device=device)
    if everything:
        compute.fill_(True)
    else:
        compute[:rows_in, :cols_in] = True if wanted is None else wanted
        if wanted is None:
            compute[rows_in:, :cols_in] = "row_by_seg" in chosen
            compute[:rows_in, cols_in:] = "col_by_seg" in chosen
    code = sum(1 << bit for bit, kind in enumerate(KINDS) if kind in chosen)
    code |= (
        HEADSUM * ("headsum_abs" in chosen)
        | ROW_BINS * bool(chosen & {"row_by_seg", "row_sum"})
        | COLUMN_BINS * bool(chosen & {"col_by_seg", "col_sum"})
    )
    code |= MATRIX * ("matrix" in chosen)
    if code & (ROW_BINS | COLUMN_BINS | MATRIX):
        code |= 1
    return FlowPlan(
        options=options,
        key_mask=key_mask,
        row_segments=row_segments,
        col_segments=col_segments,
        num_row_segments=rows_in,
        num_col_segments=cols_in,
        pairs=wanted,
        outputs=tuple(outputs),
        exclude_diagonal=exclude_diagonal,
        visible=visible,
        visible_count=count,
        box=box,
        key_valid=None if key_mask is None else key_mask.bool().to(torch.uint8).contiguous(),
        row_ids=(torch.where(row_segments < 0, rows_in, row_segments) if row_bucket else row_segments).int().contiguous(),
        col_ids=(torch.where(col_segments < 0, cols_in, col_segments) if col_bucket else col_segments).int().contiguous(),
        compute=compute.to(torch.uint8),
        code=code,
    )
