"""Named segments of a sequence: character spans to token spans, token spans to one id a token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Spans = Sequence[tuple[int, int]] | tuple[int, int]


def token_segments(offsets: Sequence[tuple[int, int]], spans: Mapping[str, Spans]) -> dict[str, list[tuple[int, int]]]:
    """Token spans of character spans: a token belongs to the segment in which it starts. offsets: (start, end) of every token, as
    tokenizers return them."""
    result: dict[str, list[tuple[int, int]]] = {}
    for name, given in spans.items():
        chosen: list[tuple[int, int]] = []
        for start, end in span_list(given):
            inside = [i for i, (a, b) in enumerate(offsets) if start <= a < end and b > a]
            for i in inside:
                if chosen and chosen[-1][1] == i:
                    chosen[-1] = (chosen[-1][0], i + 1)
                else:
                    chosen.append((i, i + 1))
        result[name] = chosen
    return result


def segment_names(segments: Any) -> list[str]:
    """Names in the order of their ids: those of the mappings, or "0", "1", … of an id tensor."""
    if isinstance(segments, Tensor):
        return [str(i) for i in range(int(segments.max()) + 1)] if segments.numel() else []
    if isinstance(segments, str) or not isinstance(segments, (Mapping, Sequence)):
        raise TypeError(f"segments must be a mapping, a list of mappings or an id tensor, got {type(segments).__name__}")
    given = [segments] if isinstance(segments, Mapping) else list(segments)
    if not given or not all(isinstance(one, Mapping) for one in given):
        raise TypeError("segments must be a mapping name -> spans, a list of such mappings (one a sequence) or an id tensor")
    return list(dict.fromkeys(name for one in given for name in one))


def segment_ids(segments: Any, names: Sequence[str], batch: int, total: int, device: torch.device) -> Tensor:
    """(batch, total) int64 ids, -1 for no segment."""
    if isinstance(segments, Tensor):
        ids = segments.to(device).long()
        ids = ids.expand(batch, -1) if ids.dim() == 1 else ids
        if ids.shape != (batch, total) or bool((ids < -1).any()):
            raise ValueError(f"segments must be ids ≥ -1 of shape {(batch, total)} or ({total},), got {tuple(segments.shape)}")
        return ids.contiguous()
    given = [segments] * batch if isinstance(segments, Mapping) else list(segments)
    if len(given) != batch:
        raise ValueError(f"segments must be one mapping a sequence ({batch}), got {len(given)}")
    ids = torch.full((batch, total), -1, dtype=torch.long)
    for b, one in enumerate(given):
        for name, spans in one.items():
            for start, end in span_list(spans):
                if not 0 <= start <= end <= total:
                    raise ValueError(f"segments[{name!r}]: the span ({start}, {end}) leaves the sequence of {total} tokens")
                if bool((ids[b, start:end] >= 0).any()):
                    raise ValueError(f"segments[{name!r}]: the span ({start}, {end}) overlaps another; a token is in one segment")
                ids[b, start:end] = names.index(name)
    return ids.to(device)


def span_list(spans: Any) -> list[tuple[int, int]]:
    spans = list(spans)
    if len(spans) == 2 and all(isinstance(x, int) for x in spans):
        return [(spans[0], spans[1])]
    return [(int(start), int(end)) for start, end in spans]
