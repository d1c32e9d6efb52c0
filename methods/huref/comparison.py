"""Compare two checkpoints by their invariant terms, without loading a model.

ICS = mean over the channels of the Pearson correlation of A_c and B_c over all K² entries (equal to the cosine of the standardised,
flattened terms that the paper uses). A score near 1 says: same base model. A low score is no acquittal: models trained further on trillions
of tokens can fall to 0.01 … 0.3. Channels without a correlation (a layer whose output weights are zero) are reported and left out of the
mean.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llmcore.kernels.invariants import invariant_sums, permuted_dots, plan_sums
from llmcore.methods.huref import terms as term_module
from llmcore.methods.huref.matching import layer_pairs
from llmcore.methods.huref.opening import LAYERS, Tokens, block_bytes, open_model, release_free_memory, resolve_tokens
from llmcore.methods.huref.terms import CHANNELS, Factors, check_terms, embedding_rows, layer_factors
from llmcore.methods.huref.tokens import align

from llmcore import files

# K tokens, C channels, L layers

SAME_BASE, RELATED = 0.75, 0.10
VERDICTS = ("same base", "related", "no evidence")
_NULL_TOKENS, _NULL_DRAWS = 256, 32


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
    bytes_read: of both checkpoints, for everything asked. needed_bytes: what the weights of the terms take in the files.
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
        return plain_json(dataclasses.asdict(self))

    def save(self, path: str | Path) -> None:
        files.write_json(path, self.to_json())


def plain_json(value: Any) -> Any:
    """JSON has no NaN: null stands for it."""
    if isinstance(value, dict):
        return {k: plain_json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_json(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def verdict_of(score: float, *, same_base: float = SAME_BASE, related: float = RELATED) -> str:
    return VERDICTS[0] if score >= same_base else VERDICTS[1] if score >= related else VERDICTS[2]


def mean_known(values: Sequence[float]) -> float:
    known = [v for v in values if not math.isnan(v)]
    return sum(known) / len(known) if known else math.nan


def _degenerate(a: float, b: float) -> str:
    sides = [side for side, square in (("a", a), ("b", b)) if square == 0.0]
    return f"all zero in {' and '.join(sides)}" if sides else "constant"


class _Null:
    """ICS of the pair with the rows of b permuted: standardised matrices on a few tokens, summed over the channels."""

    def __init__(self, num_tokens: int, seed: int):
        self.count = min(num_tokens, _NULL_TOKENS)
        generator = np.random.default_rng(seed)  # not torch.Generator: see llmcore/commands/startup.py
        self.orders = torch.from_numpy(np.stack([generator.permutation(self.count) for _ in range(_NULL_DRAWS)]))
        self.totals: dict[str, torch.Tensor] = {}
        self.channels: dict[str, int] = {}

    def add(self, terms: str, a: Factors, b: Factors) -> None:
        k = self.count
        x, y = (f.left[:k] @ f.right[:k].mT for f in (a, b))
        x -= x.mean()
        y -= y.mean()
        scale = float(x.norm()) * float(y.norm())
        if scale == 0.0:
            return
        self.channels[terms] = self.channels.get(terms, 0) + 1
        self.totals[terms] = permuted_dots(x, y, self.orders) / scale + self.totals.get(terms, 0.0)

    def result(self, terms: str, score: float) -> tuple[float, float, float]:
        if terms not in self.totals or self.count < 4:
            return math.nan, math.nan, math.nan
        draws = self.totals[terms] / self.channels[terms]
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
        pairs = layer_pairs(left, right, aligned, layers, chosen, gqa, ff, match_layers, notes)
        # Ids are all that is needed from here on: 50,000 strings a side are dropped before the weights come.
        source = listed.source
        del listed
        left.forget_vocabulary()
        right.forget_vocabulary()
        release_free_memory()
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
        means = {t: mean_known([s.correlation for s in scores if s.terms == t]) for t in CHANNELS}
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
        cosine, skipped, read = found.value, found.skipped, read + found.bytes_read
    overlap = {
        "common": aligned.common,
        "dropped_a": aligned.dropped_a,
        "dropped_b": aligned.dropped_b,
        "digest": aligned.digest,
        "source": source,
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
