"""Compare two checkpoints, or many, by their invariant terms, without loading a model.

ICS = mean over the channels of the Pearson correlation of A_c and B_c over all K² entries (equal to the cosine of the standardised,
flattened
terms that the paper uses). A score near 1 says: same base model. A low score is no acquittal: models trained further on trillions of tokens
can fall to 0.01 … 0.3. Channels without a correlation (a layer whose output weights are zero) are reported and left out of the mean.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from llmcore.kernels.invariants import invariant_matrix, invariant_sums, plan_sums
from llmcore.methods.huref import terms as term_module
from llmcore.methods.huref.layouts import AdaptedReader, Layout, Reader, find_layout, layer_indices, open_checkpoint
from llmcore.methods.huref.terms import CHANNELS, Factors, check_terms, embedding_rows, layer_factors
from llmcore.methods.huref.tokens import Alignment, TokenList, Vocabulary, align, read_vocabulary

from llmcore import files

# K tokens, C channels, L layers

LAYERS = (-2, -1)
SAME_BASE, RELATED = 0.75, 0.10
VERDICTS = ("same base", "related", "no evidence")
_NULL_TOKENS, _NULL_DRAWS = 256, 32

Tokens = TokenList | Sequence[int] | str | Path | None


@dataclasses.dataclass
class Opened:
    """A checkpoint made ready: reader, layout, vocabulary (None without tokenizer files)."""

    reader: Reader
    layout: Layout
    vocabulary: Vocabulary | None
    path: Path

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.reader.close()


def open_model(path: str | Path, *, base: str | Path | None = None, layout: str | None = None, compat: str | None = None) -> Opened:
    reader = open_checkpoint(path, base=base)
    try:
        found = find_layout(reader, layout=layout, compat=compat)
        metadata = getattr(reader, "metadata", None)
        vocabulary = read_vocabulary(reader.path, metadata)
        if vocabulary is None and isinstance(reader, AdaptedReader):
            vocabulary = read_vocabulary(reader.base_path, metadata)
    except BaseException:
        reader.close()
        raise
    return Opened(reader, found, vocabulary, Path(path))


def resolve_tokens(tokens: Tokens, model: Opened) -> TokenList:
    """A token list of a model: given, from a file, from explicit ids, or ranked from its own tokenizer."""
    if isinstance(tokens, TokenList):
        return tokens
    if isinstance(tokens, (str, Path)):
        return TokenList.from_file(tokens, model.vocabulary)
    if tokens is not None:
        ids = tokens.tolist() if isinstance(tokens, torch.Tensor) else list(tokens)
        return TokenList.of(ids, model.vocabulary)
    if model.vocabulary is None:
        raise ValueError(f"tokens: {model.path} has no tokenizer file to rank tokens by; pass tokens= (a TokenList, ids, or a file of ids)")
    found = TokenList.from_tokenizer(model.vocabulary)
    keep = [i for i, token in enumerate(found.ids) if token < model.layout.vocab_size]
    if len(keep) == len(found):
        return found
    return TokenList(tuple(found.ids[i] for i in keep), tuple(found.strings[i] for i in keep), found.source)


def invariant_terms(
    path: str | Path,
    *,
    layers: Sequence[int] = LAYERS,
    tokens: Tokens = None,
    K: int = 4096,
    terms: str | Sequence[str] = "paper",
    gqa: str = "interleave",
    ff: str = "gate_times_up",
    compat: str | None = None,
    layout: str | None = None,
    base: str | Path | None = None,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """The invariant terms themselves, (C, K, K): channels (qk, vo, ff) of the first layer, then of the next, not standardised.

    Args:
        layers: layer indices, negative from the end. tokens: a TokenList, ids in order, a file, or None for the model's own ranking; the
        last K
            are used. terms: "paper", "hardened" (qk*, vo*, up*), or both (then the paper's three channels come first in each layer).
        gqa: "interleave" (query head h meets key/value head h // (H / G), as models compute it) or "tile" (published: h mod G).
        compat: "published" for the published splits of fused tensors. dtype: of arithmetic and result; float64 makes this the exact form.

    Memory: C · K² numbers for the result. Comparisons and fingerprints never need it: see compare and fingerprint.
    """
    chosen = check_terms(terms)
    with open_model(path, base=base, layout=layout, compat=compat) as model:
        listed = resolve_tokens(tokens, model).last(K)
        embeddings = embedding_rows(model.reader, model.layout, listed.ids, dtype)
        result = []
        for index in layer_indices(model.layout, layers):
            found = {
                f.name: invariant_matrix(f.left, f.right)
                for f in layer_factors(model.reader, model.layout, index, embeddings, terms=chosen, gqa=gqa, ff=ff)
            }
            result += [found[name] for t in chosen for name in CHANNELS[t]]
    return torch.stack(result)


@dataclasses.dataclass(frozen=True)
class ChannelScore:
    """Correlation of one channel. layer_a, layer_b: indices in either model. reason: why there is none, when correlation is NaN."""

    terms: str
    name: str
    layer_a: int
    layer_b: int
    correlation: float
    algorithm: str
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What two checkpoints have in common.

    ics, ics_hardened: mean correlation over the channels of the paper's and of the hardened terms (NaN when not computed).
    null_mean, null_std, null_z: ICS of this very pair with the token rows of one side permuted, and how many standard deviations the best
    ICS lies above. verdict: by the better of the two scores. pcs: the parameter cosine when asked for.
    """

    a: str
    b: str
    ics: float
    ics_hardened: float
    per_channel: list[ChannelScore]
    verdict: str
    null_z: float
    null_mean: float
    null_std: float
    pcs: float | None
    skipped: list[tuple[str, int, str]]
    token_overlap: dict[str, Any]
    num_tokens: int
    conventions: dict[str, Any]
    notes: list[str]
    bytes_read: int
    needed_bytes: int
    seconds: float
    exact: bool = True

    def to_json(self) -> dict[str, Any]:
        return _plain(dataclasses.asdict(self))

    def save(self, path: str | Path) -> None:
        files.write_json(path, self.to_json())


def _plain(value: Any) -> Any:
    """JSON has no NaN: null stands for it."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def verdict_of(score: float, *, same_base: float = SAME_BASE, related: float = RELATED) -> str:
    return VERDICTS[0] if score >= same_base else VERDICTS[1] if score >= related else VERDICTS[2]


def _mean(values: Sequence[float]) -> float:
    known = [v for v in values if not math.isnan(v)]
    return sum(known) / len(known) if known else math.nan


def _degenerate(a: float, b: float) -> str:
    sides = [side for side, square in (("a", a), ("b", b)) if square == 0.0]
    return f"all zero in {' and '.join(sides)}" if sides else "constant"


class _Null:
    """ICS of the pair with the rows of b permuted: standardised matrices on a few tokens are summed over the channels as they come."""

    def __init__(self, num_tokens: int, seed: int):
        self.count = min(num_tokens, _NULL_TOKENS)
        generator = torch.Generator().manual_seed(seed)
        self.orders = [torch.randperm(self.count, generator=generator) for _ in range(_NULL_DRAWS)]
        self.totals: dict[str, list[float]] = {}
        self.channels: dict[str, int] = {}

    def add(self, terms: str, a: Factors, b: Factors) -> None:
        k = self.count
        x, y = (f.left[:k] @ f.right[:k].mT for f in (a, b))
        x, y = x - x.mean(), y - y.mean()
        scale = float(x.norm()) * float(y.norm())
        if scale == 0.0:
            return
        totals = self.totals.setdefault(terms, [0.0] * len(self.orders))
        for i, order in enumerate(self.orders):
            totals[i] += float(torch.dot(x.view(-1), y[order][:, order].view(-1))) / scale
        self.channels[terms] = self.channels.get(terms, 0) + 1

    def result(self, terms: str, score: float) -> tuple[float, float, float]:
        if terms not in self.totals or self.count < 4:
            return math.nan, math.nan, math.nan
        draws = torch.tensor(self.totals[terms], dtype=torch.float64) / self.channels[terms]
        mean, std = float(draws.mean()), float(draws.std())
        return mean, std, (score - mean) / std if std > 0 else math.nan


def compare(
    a: Any,
    b: Any,
    *,
    K: int = 512,
    layers: Sequence[int] = LAYERS,
    tokens: Tokens = None,
    terms: str | Sequence[str] = ("paper", "hardened"),
    gqa: str = "interleave",
    ff: str = "gate_times_up",
    compat: str | None = None,
    normalize: str = "channel",
    exact: bool = True,
    algorithm: str = "auto",
    pcs: bool = False,
    match_layers: bool = False,
    base_a: str | Path | None = None,
    base_b: str | Path | None = None,
    layout: str | None = None,
    max_memory: int | None = None,
    same_base: float = SAME_BASE,
    related: float = RELATED,
    seed: int = 0,
) -> Comparison:
    """Compare two checkpoints (paths) or stored fingerprints.

    Args:
        a, b: paths of checkpoints, or Fingerprint objects (both, for a comparison by sketches; K, layers and tokens are then theirs). With
        a
            Fingerprint and a path, the path is fingerprinted the same way first.
        K: tokens; 512 decides, 4096 is what published scores use. tokens: the base's list (default: a's tokenizer ranks it).
        terms, gqa, ff, compat: as in invariant_terms. normalize: "channel" (Pearson) or "none" (plain cosine of each channel).
        exact: False compares fingerprints (sketches) of the two paths. pcs: also read everything for the parameter cosine.
        match_layers: find the corresponding layers first (depth-pruned or extended models), on 64 tokens, by a monotone alignment.
        base_a, base_b: the base of an adapter directory. max_memory: bytes for blocks and factors; smaller blocks are read when tight.

    Returns: Comparison. Reads the matrices of the layers and K embedding rows of either side, nothing else.
    Example:
        print(compare("base-dir", "suspect-dir").verdict)
    """
    from llmcore.methods.huref.fingerprints import Fingerprint, compare_fingerprints, fingerprint

    started = time.perf_counter()
    chosen = check_terms(terms)
    if isinstance(a, Fingerprint) or isinstance(b, Fingerprint) or not exact:
        if isinstance(a, Fingerprint) and not isinstance(b, Fingerprint):
            b = fingerprint(b, **a.settings(), base=base_b, layout=layout)
        elif isinstance(b, Fingerprint) and not isinstance(a, Fingerprint):
            a = fingerprint(a, **b.settings(), base=base_a, layout=layout)
        elif not isinstance(a, Fingerprint):
            a = fingerprint(a, layers=layers, tokens=tokens, K=K, terms=chosen, gqa=gqa, ff=ff, compat=compat, base=base_a, layout=layout)
            b = fingerprint(b, **a.settings(), base=base_b, layout=layout)
        return compare_fingerprints(a, b, same_base=same_base, related=related, started=started)

    with (
        open_model(a, base=base_a, layout=layout, compat=compat) as left,
        open_model(b, base=base_b, layout=layout, compat=compat) as right,
    ):
        listed = resolve_tokens(tokens, left)
        aligned = align(listed, right.vocabulary, K, size_a=left.layout.vocab_size, size_b=right.layout.vocab_size)
        notes = list(aligned.notes)
        pairs = _layer_pairs(left, right, aligned, layers, chosen, gqa, ff, match_layers, notes)
        x_a = embedding_rows(left.reader, left.layout, aligned.ids_a)
        x_b = embedding_rows(right.reader, right.layout, aligned.ids_b)
        settings = {"terms": chosen, "gqa": gqa, "ff": ff, "block_bytes": block_bytes(max_memory)}
        scores: list[ChannelScore] = []
        null = _Null(len(aligned.ids_a), seed)
        for index_a, index_b in pairs:
            stream_a = layer_factors(left.reader, left.layout, index_a, x_a, **settings)
            stream_b = layer_factors(right.reader, right.layout, index_b, x_b, **settings)
            for f, g in zip(stream_a, stream_b, strict=True):
                kind = "hardened" if f.name.endswith("*") else "paper"
                how = algorithm
                if how == "auto":
                    how = plan_sums(len(x_a), f.left.shape[1], g.left.shape[1], memory_budget=max_memory).algorithm
                sums = invariant_sums(f.left, f.right, g.left, g.right, algorithm=how)
                value = sums.correlation(normalize)
                reason = _degenerate(sums.dot_aa, sums.dot_bb) if math.isnan(value) else ""
                scores.append(ChannelScore(kind, f.name, index_a, index_b, value, how, reason))
                if reason:
                    notes.append(f"channel {f.name} of layers {index_a}/{index_b} left out of the mean: {reason}")
                else:
                    null.add(kind, f, g)
        means = {t: _mean([s.correlation for s in scores if s.terms == t]) for t in CHANNELS}
        best = max(chosen, key=lambda t: -math.inf if math.isnan(means[t]) else means[t])
        null_mean, null_std, null_z = null.result(best, means[best])
        read = left.reader.bytes_read + right.reader.bytes_read
        needed = sum(
            term_module.used_bytes(m.reader, m.layout, sorted({p[i] for p in pairs}), len(x_a)) for i, m in enumerate((left, right))
        )
    cosine, skipped = None, []
    if pcs:
        from llmcore.methods.huref.cosine import pcs as parameter_cosine

        found = parameter_cosine(a, b, base_a=base_a, base_b=base_b)
        cosine, skipped = found.value, found.skipped
    overlap = {
        "common": aligned.common,
        "dropped_a": aligned.dropped_a,
        "dropped_b": aligned.dropped_b,
        "digest": aligned.digest,
        "source": listed.source,
    }
    conventions = {
        "layers": list(layers),
        "terms": list(chosen),
        "gqa": gqa,
        "ff": ff,
        "compat": compat,
        "normalize": normalize,
        "model_types": [left.layout.model_type, right.layout.model_type],
    }
    score = means[best]
    return Comparison(
        str(a),
        str(b),
        means["paper"],
        means["hardened"],
        scores,
        verdict_of(-1.0 if math.isnan(score) else score, same_base=same_base, related=related),
        null_z,
        null_mean,
        null_std,
        cosine,
        skipped,
        overlap,
        len(aligned.ids_a),
        conventions,
        notes,
        read,
        needed,
        time.perf_counter() - started,
    )


def block_bytes(max_memory: int | None) -> int:
    """Size of the blocks of rows that are read: an eighth of the budget, at most the default."""
    if max_memory is None:
        return term_module.BLOCK_BYTES
    if max_memory < 1 << 20:
        raise ValueError(f"max_memory must be at least 1 MiB (1048576 bytes), got {max_memory}")
    return max(1 << 16, min(term_module.BLOCK_BYTES, max_memory // 8))


def _layer_pairs(
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
        return _plain(dataclasses.asdict(self))

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
