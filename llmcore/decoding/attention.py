"""Attention of packed tokens over caches that are read in place: prefill of rows behind a shared prefix, one step of trie nodes.

A plan knows where each packed token belongs; it is what the attention function given to transformers calls (`llmcore.decoding.decoder`).
"""

# S slots (rows) of a pool, M forward rows of a step, H heads, G kv heads, D head_dim, R rows of equal length L

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from llmcore.decoding.rows import Node, Pool, Prefix, Row


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    *,
    mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    causal: bool = False,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention with its log-sum-exp: query (B, H, Q, D), key and value (B, G, K, D) → (B, H, Q, D), (B, H, Q) float32.

    `mask` is boolean, broadcastable to (B, 1, Q, K); a fully masked query gives zeros and −inf. `bias` is the same mask as 0 and −inf in
    the query's dtype, given beside it when it serves many layers and every query sees something.
    """
    if query.device.type == "cpu" and softcap is None and query.shape[-1] == value.shape[-1]:
        if bias is not None:
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, False, attn_mask=bias, scale=scale)
        bias = None if mask is None else torch.where(mask, 0.0, float("-inf")).to(query.dtype)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal, attn_mask=bias, scale=scale)
        # The operator's lse of a query that sees nothing is not −inf.
        return out, lse.float() if mask is None else torch.where(mask.any(-1), lse.float(), float("-inf"))
    groups, width = key.shape[1], query.shape[2]
    folded = query.reshape(query.shape[0], groups, -1, query.shape[-1])  # heads of a group become query rows: the cache is read once
    scores = (folded @ key.transpose(-1, -2)).float() * scale
    scores = scores.view(query.shape[0], query.shape[1], width, -1)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if causal:
        lower = torch.ones(width, key.shape[2], dtype=torch.bool, device=query.device).tril()
        mask = lower if mask is None else mask & lower
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    lse = scores.logsumexp(-1)
    weights = (scores - lse.clamp_min(torch.finfo(torch.float32).min)[..., None]).exp().to(value.dtype)
    out = weights.view(query.shape[0], groups, -1, weights.shape[-1]) @ value
    return out.view(*query.shape[:3], value.shape[-1]), lse


def merge(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """One softmax out of attention over disjoint key sets."""
    if len(parts) == 1:
        return parts[0][0]
    total = torch.logsumexp(torch.stack([lse for _, lse in parts]), 0)
    # Masked-out parts have lse = −inf and may carry NaN rows: their weight is an exact zero.
    return sum(torch.where(w > 0, out * w, 0.0) for out, lse in parts for w in [(lse - total).exp()[..., None].to(out.dtype)])  # type: ignore[return-value]


@dataclass
class Segment:
    """R rows of equal length L, consecutive in the packed batch from token `start` and in `pool` from `slot`."""

    pool: Pool
    prefix: Prefix | None
    slot: int
    rows: int
    length: int
    start: int


class PrefillPlan:
    def __init__(self, segments: list[Segment]):
        self.segments = segments

    def __call__(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        softcap: float | None,
        window: int | None,
    ) -> torch.Tensor:
        result = []
        for seg in self.segments:
            here = slice(seg.start, seg.start + seg.rows * seg.length)

            def rows(x: torch.Tensor, here: slice = here, seg: Segment = seg) -> torch.Tensor:
                return x[0, :, here].unflatten(1, (seg.rows, seg.length)).transpose(0, 1)

            own_key, own_value = rows(key), rows(value)
            seg.pool.store(layer, slice(seg.slot, seg.slot + seg.rows), own_key, own_value)
            shift = seg.prefix.length if seg.prefix else 0
            windowed = window is not None and shift + seg.length > window
            at = torch.arange(seg.length, device=query.device)
            near = (at[:, None] - at) < window if windowed else None
            if seg.prefix and not windowed and softcap is None and shift <= seg.length and query.device.type == "cpu":
                result.append(self._behind(rows(query), own_key, own_value, seg.prefix, layer, scale))
                continue
            parts = [
                attend(
                    rows(query),
                    own_key,
                    own_value,
                    scale,
                    causal=near is None,
                    softcap=softcap,
                    mask=None if near is None else near & (at[:, None] >= at),
                )
            ]
            if seg.prefix:
                prefix_key, prefix_value = seg.prefix.pool.layers[layer]  # type: ignore[union-attr]
                near = None
                if windowed:
                    near = ((at + shift)[:, None] - torch.arange(shift, device=query.device) < window).repeat(seg.rows, 1)
                out, lse = attend(query[:, :, here], prefix_key, prefix_value, scale, softcap=softcap, mask=near)
                parts.append(tuple(x[0].unflatten(1, (seg.rows, seg.length)).transpose(0, 1) for x in (out, lse)))  # type: ignore[arg-type]
            result.append(merge(parts).transpose(1, 2).reshape(seg.rows * seg.length, query.shape[1], -1))
        return (torch.cat(result) if len(result) > 1 else result[0])[None]

    @staticmethod
    def _behind(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, prefix: Prefix, layer: int, scale: float) -> torch.Tensor:
        """Rows (R, ·, L, D) behind a prefix of a ≤ L tokens as one causal square of a + L: (R·L, H, D).

        The first a queries are fillers that nobody reads; a square costs less than a second, rectangular softmax and its merge.
        """
        rows, heads, length, dim = query.shape
        opening = prefix.pool.layers[layer]  # type: ignore[union-attr]
        key, value = (torch.cat([old.expand(rows, -1, -1, -1), new], 2) for old, new in zip(opening, (key, value), strict=True))
        square = torch.cat([query.new_zeros(rows, heads, prefix.length, dim), query], 2)
        return attend(square, key, value, scale, causal=True)[0][:, :, prefix.length :].transpose(1, 2).reshape(rows * length, heads, -1)


class DecodePart:
    """The nodes [start, stop) of one step that belong to one pool and one prefix, sorted by slot."""

    def __init__(self, pool: Pool, prefix: Prefix | None, nodes: list[tuple[Row, Node]], start: int, device: torch.device):
        self.pool, self.prefix, self.start, self.stop = pool, prefix, start, start + len(nodes)
        slots = np.array([row.slot for row, _ in nodes])
        _, first, per_slot = np.unique(slots, return_index=True, return_counts=True)
        column = np.arange(len(nodes)) - np.repeat(first, per_slot)
        self.width = int(per_slot.max())
        self.dense = len(nodes) == pool.slots * self.width
        entry = pool.next[slots] + column
        pool.reserve(int(entry.max()) + 1)
        self.position = np.array([row.prompt_length + node.depth - 1 for row, node in nodes])
        pool.positions[slots, entry] = self.position
        np.add.at(pool.next, slots, 1)
        used = int(pool.next.max())
        visible = np.zeros((pool.slots, self.width, pool.prompt + used), dtype=bool)
        visible[:, :, : pool.prompt] = (np.arange(pool.prompt) < pool.lengths[:, None])[:, None]
        for (_, node), slot, col, tail in zip(nodes, slots, column, entry, strict=True):
            grown = np.zeros(tail + 1, dtype=bool)
            grown[: len(node.visible)] = node.visible
            grown[tail] = True
            node.visible = grown
            visible[slot, col, pool.prompt : pool.prompt + tail + 1] = grown
        # Nobody reads the outputs of unused columns; they look at everything so that no softmax is empty.
        idle = np.ones((pool.slots, self.width), dtype=bool)
        idle[slots, column] = False
        visible[idle] = True
        self.used = pool.prompt + used
        self.at = torch.from_numpy(slots).to(device), torch.from_numpy(pool.prompt + entry).to(device)
        self.flat = torch.from_numpy(slots * self.width + column).to(device)
        self.visible = None if visible.all() else torch.from_numpy(visible).to(device)[:, None]
        self._bias: torch.Tensor | None = None
        self._slots, self._column, self._device = slots, column, device
        self._windowed: dict[int, tuple[torch.Tensor | None, torch.Tensor | None]] = {}

    def masks(self, window: int | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Visibility of (slot positions, prefix positions) under a sliding window."""
        shift = self.prefix.length if self.prefix else 0
        if window is None or int(self.position.max()) < window:
            return self.visible, None
        if window not in self._windowed:
            pool = self.pool
            query = np.zeros((pool.slots, self.width), dtype=np.int64)
            query[self._slots, self._column] = self.position
            key = np.concatenate(
                [np.broadcast_to(shift + np.arange(pool.prompt), (pool.slots, pool.prompt)), pool.positions[:, : self.used - pool.prompt]],
                axis=1,
            )
            near = torch.from_numpy(query[:, :, None] - key[:, None] < window).to(self._device)[:, None]
            if self.visible is not None:
                near = near & self.visible
            before = torch.from_numpy(self.position[:, None] - np.arange(shift) < window).to(self._device)
            self._windowed[window] = near, before
        return self._windowed[window]

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        softcap: float | None,
        window: int | None,
    ) -> torch.Tensor:
        """query (H, m, D), key and value (G, m, D) of this part's nodes → (m, H, D)."""
        keys, values = self.pool.layers[layer]
        slot, position = self.at
        keys[slot, :, position] = key.transpose(0, 1)
        values[slot, :, position] = value.transpose(0, 1)
        own, before = self.masks(window)
        if own is not None and own is self.visible and self._bias is None:
            self._bias = torch.where(own, 0.0, float("-inf")).to(query.dtype)  # once a step: every layer sees the same
        heads, _count, dim = query.shape
        rows = query.transpose(0, 1)
        if self.dense:
            padded = rows
        else:
            padded = rows.new_zeros(self.pool.slots * self.width, heads, dim)
            padded[self.flat] = rows
        out, lse = attend(
            padded.unflatten(0, (self.pool.slots, self.width)).transpose(1, 2),
            keys[:, :, : self.used],
            values[:, :, : self.used],
            scale,
            mask=own,
            bias=self._bias if own is self.visible else None,
            softcap=softcap,
        )
        out, lse = out.transpose(1, 2).flatten(0, 1), lse.transpose(1, 2).flatten(0, 1)
        if not self.dense:
            out, lse = out[self.flat], lse[self.flat]
        if self.prefix is None:
            return out
        prefix_key, prefix_value = self.prefix.pool.layers[layer]  # type: ignore[union-attr]
        other, other_lse = attend(query[None], prefix_key, prefix_value, scale, softcap=softcap, mask=before)
        if before is None:  # both parts see something: two exponentials are one logistic function
            return torch.lerp(out, other[0].transpose(0, 1), torch.sigmoid(other_lse[0].t() - lse)[..., None].to(out.dtype))
        return merge([(out, lse), (other[0].transpose(0, 1), other_lse[0].transpose(0, 1))])


class DecodePlan:
    def __init__(self, parts: list[DecodePart]):
        self.parts = parts

    def __call__(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        softcap: float | None,
        window: int | None,
    ) -> torch.Tensor:
        result = [
            part.attend(layer, *(x[0, :, part.start : part.stop] for x in (query, key, value)), scale, softcap, window)
            for part in self.parts
        ]
        return (torch.cat(result) if len(result) > 1 else result[0])[None]
