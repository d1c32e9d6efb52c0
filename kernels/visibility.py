"""Which columns a row of attention may read, as one half-open range a row, and pair counts from those ranges without a loop over pairs.

Causal order, windows, packed documents and key/value prefixes all leave a row a contiguous range [low, high) of columns; padding removes
single columns from it
(`key_mask`). Every kernel of the saliency family works on (low, high, key_mask), so a mask feature is implemented once, here.

    count[s, t] = Σ over rows i of s:  c_t(high_i) - c_t(low_i),   c_t(j) = number of valid columns < j in segment t          O(n · S)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# B batch, n rows (queries), m columns (keys), Sr / Sc row / column segments, D documents


class Visibility(NamedTuple):
    """low, high, diagonal: (B, n) int32; row i reads valid columns low ≤ j < high, and `diagonal` is the column of its own position (may
    be outside)."""

    low: Tensor
    high: Tensor
    diagonal: Tensor


def visible_ranges(
    batch: int,
    num_rows: int,
    num_cols: int,
    *,
    device: torch.device,
    causal: bool = True,
    q_offset: int | None = None,
    window: int | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> Visibility:
    """Ranges of every row, on `device`, without reading a tensor back.

    Row i of a document stands at position i + offset of that document's columns, offset = q_offset, or columns - rows of the document
    (bottom-right aligned).
    causal: j ≤ position. window: 0 ≤ position - j < window. cu_seqlens_*: (D + 1,) or (B, D + 1) document borders; rows behind the last
        border read nothing.
    """
    rows = torch.arange(num_rows, device=device).expand(batch, num_rows)
    if cu_seqlens_q is None:
        first = torch.zeros_like(rows)
        last = torch.full_like(rows, num_cols)
        position = rows + (num_cols - num_rows if q_offset is None else q_offset)
    else:
        starts_q = cu_seqlens_q.to(device=device, dtype=torch.int64)
        starts_k = starts_q if cu_seqlens_k is None else cu_seqlens_k.to(device=device, dtype=torch.int64)
        starts_q, starts_k = (starts.expand(batch, -1).contiguous() for starts in (starts_q, starts_k))
        document = torch.searchsorted(starts_q, rows.contiguous(), right=True) - 1
        outside = document >= starts_q.shape[-1] - 1
        document = document.clamp(max=starts_q.shape[-1] - 2)
        begin_q, end_q = starts_q.gather(1, document), starts_q.gather(1, document + 1)
        first, last = starts_k.gather(1, document), starts_k.gather(1, document + 1)
        last = torch.where(outside, first, last)
        offset = last - first - (end_q - begin_q) if q_offset is None else q_offset
        position = first + rows - begin_q + offset
    low, high = first, last
    if causal or window is not None:
        high = torch.minimum(high, position + 1)
    if window is not None:
        low = torch.maximum(low, position - window + 1)
    high = torch.maximum(high, low)
    return Visibility(low.int().contiguous(), high.int().contiguous(), position.int().contiguous())


def pair_counts(
    visible: Visibility,
    row_segments: Tensor,
    col_segments: Tensor,
    num_row_segments: int,
    num_col_segments: int,
    *,
    key_mask: Tensor | None = None,
    exclude_diagonal: bool = False,
) -> tuple[Tensor, Tensor]:
    """(count, box), each (B, Sr, Sc) int64: visible pairs, and rows · columns with masks ignored. Excluded diagonals leave both."""
    batch, _num_rows = row_segments.shape
    num_cols = col_segments.shape[1]
    row_ids, col_ids = row_segments.long(), col_segments.long()
    low, high, diagonal = (t.long() for t in visible)
    valid = torch.ones_like(col_ids, dtype=torch.bool) if key_mask is None else key_mask.bool()
    group = (row_ids + 1) + torch.arange(batch, device=row_ids.device)[:, None] * (
        num_row_segments + 1
    )  # bucket 0 of each sequence: no segment

    def by_row_segment(values: Tensor) -> Tensor:  # (B, n, S) -> (B, Sr, S)
        sums = values.new_zeros(batch * (num_row_segments + 1), values.shape[2]).index_add_(
            0, group.reshape(-1), values.reshape(-1, values.shape[2])
        )
        return sums.view(batch, num_row_segments + 1, -1)[:, 1:]

    on_diagonal = (diagonal >= 0) & (diagonal < num_cols)
    own = torch.where(on_diagonal, diagonal, 0)
    own_segment = torch.where(on_diagonal, col_ids.gather(1, own), -1) if num_cols else torch.full_like(diagonal, -1)
    own_visible = on_diagonal & (diagonal >= low) & (diagonal < high) & (valid.gather(1, own) if num_cols else on_diagonal)
    rows_in = by_row_segment(torch.ones_like(row_ids)[..., None])
    counts, boxes = [], []
    for start in range(0, num_col_segments, 64):  # bounds the prefix counts to 64 · m numbers a sequence
        segments = torch.arange(start, min(start + 64, num_col_segments), device=col_ids.device)
        member = col_ids[..., None] == segments
        prefix = torch.nn.functional.pad((member & valid[..., None]).long().cumsum(1), (0, 0, 1, 0))
        index = high[..., None].expand(-1, -1, len(segments)), low[..., None].expand(-1, -1, len(segments))
        seen = prefix.gather(1, index[0]) - prefix.gather(1, index[1])
        box = rows_in * member.sum(1)[:, None]
        if exclude_diagonal:
            at = own_segment[..., None] == segments
            seen = seen - (at & own_visible[..., None]).long()
            box = box - by_row_segment(at.long())
        counts.append(by_row_segment(seen))
        boxes.append(box)
    empty = row_ids.new_zeros(batch, num_row_segments, 0)
    return torch.cat([empty, *counts], 2), torch.cat([empty, *boxes], 2)
