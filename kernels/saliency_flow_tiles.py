"""Tile lists of the GPU kernels of saliency flow, made on the device: no value is read back, every length follows from shapes.

Tokens are sorted by segment, then position, and dealt into tiles of `block`. Where segments are few (`cut`), tiles end at segment borders:
one tile, one segment, and no binning inside a tile; a run of tokens stays a run, so its tiles are contiguous in memory. Where they are many
(sentences, single tokens), tiles are dealt without looking at borders and a kernel splits each by the segments in it. Tokens that cannot
contribute (no segment, padding, rows that see nothing or whose gradient is zero, segments without a wanted pair) are sorted behind the
end: they are in no tile and cost nothing.

At most N // block + S tiles are cut from N tokens of S segments; lists have that length, and what is not needed is empty (count 0).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# B batch, n rows, m columns, N tokens of one side, R / C row / column segments, S segments of one side, T tiles

FEW = 8  # so many segments are always cut, however short the sequence


class Side(NamedTuple):
    """Rows or columns in tiles. `first` > `last` for an empty tile; tiles [tile_begin, tile_end) hold the tokens of a segment."""

    order: Tensor  # (B, N) int32, tokens by segment and position
    segment: Tensor  # (B, N) int32, their segments; S for those left out
    begin: Tensor  # (B, S + 1) int64, where each segment begins in `order`
    start: Tensor  # (B, T) int32, where a tile begins in `order`
    length: Tensor  # (B, T) int32, its tokens
    first: Tensor  # (B, T) int64, segment of its first token
    last: Tensor  # (B, T) int64, segment of its last token
    tile_begin: Tensor  # (B, S) int64
    tile_end: Tensor  # (B, S) int64
    members: Tensor  # (B, T · block) int64, tokens of the tiles; a filler where `inside` is False
    inside: Tensor  # (B, T, block) bool
    block: int
    cut: bool

    @property
    def tiles(self) -> int:
        return self.start.shape[1]

    def extremes(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Smallest and largest of `values` (B, N) in each tile, (B, T) int64; of an empty tile 2^30 and -1."""
        of_tile = values.long().gather(1, self.members).view(self.inside.shape)
        return of_tile.masked_fill(~self.inside, 1 << 30).amin(2), of_tile.masked_fill(~self.inside, -1).amax(2)

    def pieces(self) -> tuple[Tensor, Tensor]:
        """[begin, end) of a segment's slots, (B, S) int32, when the part of segment s in tile t has slot t + s.

        Tiles and segments both only grow along `order` and a step changes at least one of them, so no two parts share a slot.
        """
        segment = torch.arange(self.tile_begin.shape[1], device=self.begin.device)
        return (self.tile_begin + segment).int(), (self.tile_end + segment).int()


def few(segments: int, tokens: int, block: int) -> bool:
    """Whether cutting at borders adds at most about as many tiles as there are without it."""
    return segments <= max(FEW, tokens // block)


def deal(segment: Tensor, segments: int, block: int, cut: bool) -> Side:
    """Tiles of one side. segment: (B, N) int64 in [0, segments]; `segments` itself marks tokens to leave out. N and segments ≥ 1."""
    batch, tokens = segment.shape
    device = segment.device
    ordered, order = segment.sort(dim=1, stable=True)
    borders = torch.arange(segments + 1, device=device).expand(batch, -1).contiguous()
    begin = torch.searchsorted(ordered, borders)
    groups = begin if cut else begin[:, ::segments]
    tile_groups = torch.nn.functional.pad(((groups.diff(dim=1) + block - 1) // block).cumsum(1), (1, 0))
    number = groups.shape[1] - 1
    tile = torch.arange(min(tokens, tokens // block + number), device=device).expand(batch, -1).contiguous()
    group = torch.searchsorted(tile_groups[:, 1:].contiguous(), tile, right=True)
    used, group = group < number, group.clamp(max=number - 1)
    start = groups.gather(1, group) + (tile - tile_groups.gather(1, group)) * block
    count = torch.where(used, (groups.gather(1, group + 1) - start).clamp(max=block), 0)
    start = torch.where(used, start, 0)
    lane = torch.arange(block, device=device)
    inside = lane < count[..., None]
    members = order.gather(1, (start[..., None] + lane).clamp(max=tokens - 1).view(batch, -1))
    first = torch.where(used, ordered.gather(1, start), segments)
    last = torch.where(used, ordered.gather(1, (start + count - 1).clamp(min=0)), segments - 1)
    if cut:
        tile_begin, tile_end = tile_groups[:, :-1], tile_groups[:, 1:]
    else:
        tile_begin = begin[:, :-1] // block
        tile_end = torch.where(begin[:, 1:] > begin[:, :-1], (begin[:, 1:] + block - 1) // block, tile_begin)
    return Side(order.int(), ordered.int(), begin, start.int(), count.int(), first, last, tile_begin, tile_end, members, inside, block, cut)


def row_side(
    row_segment: Tensor, low: Tensor, high: Tensor, pairs: Tensor, grad: Tensor | None, block: int, cut: bool
) -> Side:
    """Rows that see a column, have a segment with a wanted pair and, where `grad` (B, H, n, e) is given, a gradient that is not zero."""
    segments = pairs.shape[0]
    live = (high > low) & (row_segment >= 0) & pairs.any(1)[row_segment.clamp(min=0).long()]
    if grad is not None:
        live &= torch.linalg.vector_norm(grad, torch.inf, dim=(1, 3), dtype=torch.float32) != 0  # of NaN it is NaN, and NaN != 0
    return deal(torch.where(live, row_segment.long(), segments), segments, block, cut)


def column_side(column_segment: Tensor, key_valid: Tensor | None, pairs: Tensor, block: int, cut: bool) -> Side:
    """Columns that may be read and have a segment with a wanted pair."""
    segments = pairs.shape[1]
    live = (column_segment >= 0) & pairs.any(0)[column_segment.clamp(min=0).long()]
    if key_valid is not None:
        live &= key_valid != 0
    return deal(torch.where(live, column_segment.long(), segments), segments, block, cut)


def row_spans(
    rows: Side, columns: Side, low: Tensor, high: Tensor, diagonal: Tensor | None, pairs: Tensor, m: int, whole: bool = True
) -> Tensor:
    """Work of `spans_kernel`: for each row tile [5] and column segment [6] the column tiles it reads, (B, T · C, 7) int32.

    Tiles [2], [2] + 1, … hold its visible pairs: [3] edge tiles, then [1] full ones, then the rest of the [0] edge tiles. Full: visible to
    every row of the tile, free of the diagonal, together one contiguous range from column [4] (none without `whole`). Needs `columns.cut`:
    tiles of a segment are then in the order of their columns, and each bound is one binary search over (segment, column) keys.
    """
    batch, number = rows.start.shape[0], pairs.shape[1]
    low_min, low_max = rows.extremes(low)
    high_min, high_max = rows.extremes(high)
    if diagonal is not None:
        high_min = torch.minimum(high_min, rows.extremes(diagonal)[0].clamp(min=0))
    first_column, last_column = columns.extremes(torch.arange(m, device=low.device).expand(batch, m))
    width = m + 1
    first_key = columns.first * width + first_column.clamp(max=m)
    last_key = columns.first * width + last_column.clamp(min=0)
    segment = torch.arange(number, device=low.device)

    def find(keys: Tensor, column: Tensor) -> Tensor:
        return torch.searchsorted(keys, (segment * width + column.clamp(0, m)[..., None]).view(batch, -1)).view(batch, rows.tiles, number)

    begin = find(last_key, low_min)
    end = torch.maximum(find(first_key, high_max), begin)
    wanted = (rows.length > 0)[..., None]
    if rows.cut:
        wanted = wanted & pairs[rows.first.clamp(max=pairs.shape[0] - 1)]
    end = torch.where(wanted, end, begin)
    whole_tiles = columns.tile_begin + columns.begin.diff(dim=1) // columns.block
    full_begin = torch.minimum(torch.maximum(find(first_key, low_max), begin), end)
    full_end = torch.minimum(find(last_key, high_min), whole_tiles[:, None])
    full_end = torch.minimum(torch.maximum(full_end, full_begin), end)
    limit = max(columns.tiles - 1, 0)
    from_column = first_column.gather(1, full_begin.clamp(max=limit).view(batch, -1)).view_as(begin)
    to_column = last_column.gather(1, (full_end - 1).clamp(0, limit).view(batch, -1)).view_as(begin)
    contiguous = to_column - from_column + 1 == (full_end - full_begin) * columns.block
    full = torch.where(contiguous, full_end - full_begin, 0) if whole else torch.zeros_like(begin)
    return _records(end - begin - full, full, begin, full_begin - begin, from_column.clamp(max=m))


def _records(*fields: Tensor) -> Tensor:
    """Fields (B, x, y) of every cell and its two indices, (B, x · y, fields + 2) int32: a program finds all it needs in its own record."""
    batch, x, y = fields[0].shape
    device = fields[0].device
    index = torch.arange(x, device=device)[:, None].expand(batch, x, y), torch.arange(y, device=device).expand(batch, x, y)
    return torch.stack([*fields, *index], -1).int().view(batch, x * y, -1)


def tile_pairs(rows: Side, columns: Side, low: Tensor, high: Tensor, pairs: Tensor, m: int) -> Tensor:
    """Work of `pieces_kernel`: [0] whether row tile [1] and column tile [2] may share a wanted pair, (B, T · T_columns, 3) int32."""
    batch = rows.start.shape[0]
    low_min, high_max = rows.extremes(low)[0], rows.extremes(high)[1]
    first_column, last_column = columns.extremes(torch.arange(m, device=low.device).expand(batch, m))
    meet = (high_max[:, :, None] > first_column[:, None]) & (low_min[:, :, None] <= last_column[:, None])
    area = torch.nn.functional.pad(pairs.long().cumsum(0).cumsum(1), (1, 0, 1, 0))  # wanted pairs below and left of a corner
    row_last, row_first = (rows.last + 1)[:, :, None], rows.first[:, :, None]
    col_last, col_first = (columns.last + 1)[:, None], columns.first[:, None]
    wanted = area[row_last, col_last] - area[row_first, col_last] - area[row_last, col_first] + area[row_first, col_first]
    occupied = (rows.length > 0)[:, :, None] & (columns.length > 0)[:, None]
    return _records(meet & occupied & (wanted > 0))


def column_spans(rows: Side, columns: Side, low: Tensor, high: Tensor, pairs: Tensor, m: int) -> Tensor:
    """Work of `columns_kernel`: row tiles [0], [1) hold all of row segment [3] that read column tile [2], (B, T_columns · R, 4) int32.

    Needs `rows.cut`. Running extremes over (segment, bound) keys make the searches exact without assuming that ranges grow with the row.
    """
    batch, number = rows.start.shape[0], pairs.shape[0]
    low_min, high_max = rows.extremes(low)[0], rows.extremes(high)[1]
    first_column, last_column = columns.extremes(torch.arange(m, device=low.device).expand(batch, m))
    width = m + 2
    reach = (rows.first * width + high_max.clamp(min=0)).cummax(1).values
    floor = (rows.first * width + low_min.clamp(max=m + 1)).flip(1).cummin(1).values.flip(1).contiguous()
    segment = torch.arange(number, device=low.device)

    def find(keys: Tensor, column: Tensor) -> Tensor:
        keyed = (segment * width + column.clamp(0, m)[..., None]).view(batch, -1)
        return torch.searchsorted(keys, keyed, right=True).view(batch, columns.tiles, number)

    begin = find(reach, first_column)
    end = torch.maximum(find(floor, last_column), begin)
    along = torch.nn.functional.pad(pairs.long().cumsum(1), (1, 0))  # (R, C + 1)
    wanted = (along[:, columns.last + 1] - along[:, columns.first]).permute(1, 2, 0) > 0
    end = torch.where(wanted & (columns.length > 0)[..., None], end, begin)
    return _records(begin, end)
