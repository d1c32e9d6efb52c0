"""All pairs of several checkpoints, each read once, and their heat map."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from llmcore.kernels.invariants import invariant_matrix
from llmcore.methods.huref.comparison import plain_json
from llmcore.methods.huref.layouts import layer_indices
from llmcore.methods.huref.opening import LAYERS, Tokens, block_bytes, open_model, resolve_tokens
from llmcore.methods.huref.terms import CHANNELS, check_terms, embedding_rows, layer_factors
from llmcore.methods.huref.tokens import TokenList, Vocabulary, align

from llmcore import files


@dataclasses.dataclass(frozen=True)
class ComparisonMatrix:
    """All pairs of several checkpoints. scores, scores_hardened: (N, N), NaN for checkpoints that failed. errors: path -> what went
    wrong."""

    paths: list[str]
    scores: list[list[float]]
    scores_hardened: list[list[float]]
    errors: dict[str, str]
    num_tokens: int
    conventions: dict[str, Any]
    bytes_read: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return plain_json(dataclasses.asdict(self))

    def save(self, path: str | Path) -> None:
        files.write_json(path, self.to_json())

    def picture(self, path: str | Path) -> None:
        """Write a heat map of the better score of each pair as PNG."""
        heat_map(self, Path(path))


def compare_many(
    paths: Sequence[str | Path],
    *,
    K: int = 512,
    layers: Sequence[int] = LAYERS,
    tokens: Tokens = None,
    terms: str | Sequence[str] = ("paper", "hardened"),
    gqa: str = "interleave",
    ff: str = "gate_times_up",
    max_memory: int = 2 << 30,
    progress: Callable[[str], None] | None = None,
) -> ComparisonMatrix:
    """ICS of every pair of checkpoints, each read once.

    Rows stand for the last K tokens that all readable checkpoints share. Every channel is standardised once and the pairs are one Gram
    matrix
    of the flattened channels, 2 K² flops a channel and pair; C · K² numbers a checkpoint are kept and, above max_memory, put on disk.
    A checkpoint that fails is reported in `errors` and costs the others nothing.
    """
    import tempfile

    import numpy as np

    started, chosen = time.perf_counter(), check_terms(terms)
    if len(paths) < 2:
        raise ValueError(f"paths must name at least 2 checkpoints, got {len(paths)}")
    errors: dict[str, str] = {}
    vocabularies: dict[int, Vocabulary | None] = {}
    sizes: dict[int, int] = {}
    listed: TokenList | None = None
    read = 0
    for i, path in enumerate(paths):
        try:
            with open_model(path) as model:
                vocabularies[i], sizes[i] = model.vocabulary, model.layout.vocab_size
                if listed is None:
                    listed = resolve_tokens(tokens, model)
        except (ValueError, OSError, KeyError, TypeError, RuntimeError) as error:
            errors[str(path)] = str(error)
    if listed is None:
        raise ValueError("paths: none of the checkpoints can be read: " + "; ".join(f"{p}: {e}" for p, e in errors.items()))
    first = next(iter(sizes))
    for i in list(sizes):
        try:
            align(listed, vocabularies[i], K, size_a=sizes[first], size_b=sizes[i])
        except ValueError as error:
            errors[str(paths[i])] = str(error)
            del sizes[i]
    known = [vocabularies[i] for i in sizes]
    if listed.strings and all(v is not None for v in known):
        keep = [
            n for n, s in enumerate(listed.strings) if all(s in v.ids and v.ids[s] < sizes[i] for v, i in zip(known, sizes, strict=True))
        ]  # type: ignore[union-attr]
        listed = TokenList(tuple(listed.ids[n] for n in keep), tuple(listed.strings[n] for n in keep), listed.source)
    listed = listed.last(K)
    channels = 3 * len(chosen) * len(layers)
    per_model = channels * len(listed) ** 2
    with tempfile.TemporaryDirectory() as scratch:
        shape = (len(paths), channels, len(listed) ** 2)
        if len(paths) * per_model * 4 > max_memory:
            features = torch.from_numpy(np.memmap(Path(scratch) / "terms", dtype=np.float32, mode="w+", shape=shape))
        else:
            features = torch.zeros(shape)
        valid = torch.zeros(len(paths), channels, dtype=torch.bool)
        for i in list(sizes):
            if progress is not None:
                progress(str(paths[i]))
            try:
                with open_model(paths[i]) as model:
                    ids = align(listed, model.vocabulary, len(listed), size_a=sizes[first], size_b=sizes[i]).ids_b
                    x = embedding_rows(model.reader, model.layout, ids)
                    place = 0
                    for n in layer_indices(model.layout, layers):
                        found = {
                            f.name: f
                            for f in layer_factors(
                                model.reader, model.layout, n, x, terms=chosen, gqa=gqa, ff=ff, block_bytes=block_bytes(max_memory)
                            )
                        }
                        for name in (name for t in chosen for name in CHANNELS[t]):
                            m = invariant_matrix(found[name].left, found[name].right)
                            m = m - m.double().mean().float()
                            norm = float(m.double().norm())
                            if norm > 0:
                                features[i, place] = (m / norm).view(-1)
                                valid[i, place] = True
                            place += 1
                    read += model.reader.bytes_read
            except (ValueError, OSError, KeyError, TypeError, RuntimeError) as error:
                errors[str(paths[i])] = str(error)
                valid[i] = False
        correlations = torch.stack([features[:, c] @ features[:, c].mT for c in range(channels)]).double()  # (C, N, N)
    both = (valid[:, None, :] & valid[None, :, :]).permute(2, 0, 1)
    matrices = {}
    for t in CHANNELS:
        names = [name for _ in layers for u in chosen for name in CHANNELS[u]]
        picked = torch.tensor([name in CHANNELS[t] for name in names])
        count = both[picked].sum(0)
        total = torch.where(both[picked], correlations[picked], 0.0).sum(0)
        matrices[t] = torch.where(count > 0, total / count.clamp_min(1), math.nan).tolist()
    conventions = {"layers": list(layers), "terms": list(chosen), "gqa": gqa, "ff": ff, "token_digest": listed.digest}
    return ComparisonMatrix(
        [str(p) for p in paths],
        matrices["paper"],
        matrices["hardened"],
        errors,
        len(listed),
        conventions,
        read,
        time.perf_counter() - started,
    )


def heat_map(matrix: ComparisonMatrix, path: Path) -> None:
    """PNG of the better of the two scores of each pair, written atomically."""
    import io
    import os

    os.environ.setdefault("MPLBACKEND", "Agg")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    scores = torch.tensor([matrix.scores, matrix.scores_hardened], dtype=torch.float64)
    best = torch.where(scores.isnan().all(0), math.nan, scores.nan_to_num(nan=-math.inf).amax(0))
    count = len(matrix.paths)
    names = [Path(p).name for p in matrix.paths]
    size = max(4.0, 0.55 * count + 2.0)
    figure, axes = plt.subplots(figsize=(size + 1, size), layout="constrained")
    image = axes.imshow(best.numpy(), vmin=0, vmax=1, cmap="viridis")
    axes.set_xticks(range(count), names, rotation=60, ha="right", fontsize=8)
    axes.set_yticks(range(count), names, fontsize=8)
    if count <= 20:
        for i in range(count):
            for j in range(count):
                value = best[i, j].item()
                text = "failed" if math.isnan(value) else f"{value:.3f}"
                axes.text(j, i, text, ha="center", va="center", fontsize=7, color="white" if not value > 0.6 else "black")
    figure.colorbar(image, label="ICS", shrink=0.8)
    axes.set_title(f"Invariant-term similarity, K = {matrix.num_tokens}", fontsize=10)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=140)
    plt.close(figure)
    files.write_bytes(path, buffer.getvalue())
