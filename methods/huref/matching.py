"""Which layer of one model belongs to which of another: the same place from the end, or a monotone alignment of all layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from llmcore.methods.huref.opening import Opened
from llmcore.methods.huref.terms import embedding_rows, layer_factors
from llmcore.methods.huref.tokens import Alignment


def layer_pairs(
    left: Opened,
    right: Opened,
    aligned: Alignment,
    layers: Sequence[int],
    terms: tuple[str, ...],
    gqa: str,
    ff: str,
    match: bool,
    notes: list[str],
) -> list[tuple[int, int]]:
    if not match:
        kept = [i for i in layers if all(-m.layout.num_layers <= i < m.layout.num_layers for m in (left, right))]
        if len(kept) < len(layers):
            notes.append(f"layers {sorted(set(layers) - set(kept))} do not exist in both models and are left out")
        if not kept:
            raise ValueError(f"layers {tuple(layers)} do not exist in both models ({left.layout.num_layers} and {right.layout.num_layers})")
        return [(i % left.layout.num_layers, i % right.layout.num_layers) for i in kept]
    grid = layer_grid(left, right, aligned, terms=terms, gqa=gqa, ff=ff)
    path = monotone_alignment(grid)
    best = sorted(sorted(path, key=lambda p: -grid[p].item())[: len(layers)])
    notes.append("layers matched by a monotone alignment: " + ", ".join(f"{i}-{j}" for i, j in best))
    return best


def layer_grid(
    left: Opened,
    right: Opened,
    aligned: Alignment,
    *,
    num_tokens: int = 64,
    terms: tuple[str, ...] = ("paper",),
    gqa: str = "interleave",
    ff: str = "gate_times_up",
) -> torch.Tensor:
    """(L_a, L_b) mean correlation of every layer of a with every layer of b, on few tokens. Reads all layers of both."""
    features = []
    for model, ids in ((left, aligned.ids_a), (right, aligned.ids_b)):
        x = embedding_rows(model.reader, model.layout, ids[-num_tokens:])
        rows = []
        for index in range(model.layout.num_layers):
            channels = []
            for f in layer_factors(model.reader, model.layout, index, x, terms=terms, gqa=gqa, ff=ff):
                m = (f.left @ f.right.mT).flatten().double()
                m = m - m.mean()
                channels.append(m / m.norm() if float(m.norm()) > 0 else torch.zeros_like(m))
            rows.append(torch.stack(channels))
        features.append(torch.stack(rows))  # (L, C, K²)
    return torch.einsum("ack,bck->ab", *features) / features[0].shape[1]


def monotone_alignment(grid: torch.Tensor) -> list[tuple[int, int]]:
    """Pairs (i, j), both increasing, with the largest sum of positive scores (dynamic programming)."""
    score = grid.clamp_min(0).tolist()
    rows, columns = grid.shape
    best = [[0.0] * (columns + 1) for _ in range(rows + 1)]
    for i in range(rows):
        for j in range(columns):
            best[i + 1][j + 1] = max(best[i][j + 1], best[i + 1][j], best[i][j] + score[i][j])
    path, i, j = [], rows, columns
    while i and j:
        if best[i][j] == best[i - 1][j]:
            i -= 1
        elif best[i][j] == best[i][j - 1]:
            j -= 1
        else:
            i, j = i - 1, j - 1
            path.append((i, j))
    return path[::-1]
