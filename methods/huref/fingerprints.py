"""A compact fingerprint of one checkpoint: sketches of its invariant terms, their row sums and pooled vector, in one small file.

Sketches (width b numbers a channel, unit norm) compare by dot product; row sums need matrix-vector products only and give the published
512-number vector without any K x K matrix. The file is safetensors with a JSON header that holds every convention the numbers depend on;
fingerprints made under different conventions are refused, never compared.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from llmcore.kernels.invariants import invariant_sums, tensor_sketch
from llmcore.methods.huref.comparison import RELATED, SAME_BASE, ChannelScore, Comparison, mean_known, verdict_of
from llmcore.methods.huref.opening import LAYERS, Tokens, block_bytes, open_model, release_free_memory, resolve_tokens
from llmcore.methods.huref.terms import CHANNELS, check_terms, embedding_rows, layer_factors, row_sums
from llmcore.methods.huref.tokens import TokenList

from llmcore import files

FORMAT = 1
WIDTH, SEED = 1024, 2024
POOLED = 512
_UNLIKE = ("format", "layers", "num_tokens", "token_digest", "gqa", "ff", "compat", "width", "seed")


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """sketches (C, b) float32 of unit norm (zero for a channel without correlation), row_sums (C, K) and squares (C,) float64.

    channels: (terms, name, layer) of each row. header: conventions (layers, K, token digest, gqa, ff, compat, width, seed) and origin.
    """

    sketches: torch.Tensor
    row_sums: torch.Tensor
    squares: torch.Tensor
    channels: tuple[tuple[str, str, int], ...]
    tokens: TokenList
    header: dict[str, Any]

    def settings(self) -> dict[str, Any]:
        """Arguments of `fingerprint` that make another checkpoint's fingerprint comparable with this one."""
        h = self.header
        return {
            "layers": tuple(h["layers"]),
            "tokens": self.tokens,
            "K": h["num_tokens"],
            "terms": tuple(h["terms"]),
            "gqa": h["gqa"],
            "ff": h["ff"],
            "compat": h["compat"] or None,
            "width": h["width"],
            "seed": h["seed"],
        }

    def pooled(self, *, terms: str = "paper", pool: str = "standardised") -> torch.Tensor:
        """The 512-number vector: C · K² entries in 512 runs of whole rows, averaged, then standardised (float64).

        pool: "published" pools the raw entries, so the channel with the largest mean dominates; "standardised" each one after
            standardising it.
        """
        picked = [i for i, (kind, _, _) in enumerate(self.channels) if kind == terms]
        if not picked:
            raise ValueError(f"terms must be among those of the fingerprint ({', '.join(self.header['terms'])}), got {terms!r}")
        if pool not in ("published", "standardised"):
            raise ValueError(f"pool must be 'published' or 'standardised', got {pool!r}")
        sums, num_tokens = self.row_sums[picked], self.row_sums.shape[1]
        if sums.numel() % POOLED:
            raise ValueError(f"pooling needs channels · K divisible by {POOLED}, got {len(picked)} · {num_tokens}")
        if pool == "standardised":
            n = num_tokens**2
            totals = sums.sum(1)
            variance = (self.squares[picked] - totals**2 / n) / (n - 1)
            if not bool((variance > 0).all()):
                raise ValueError("pooled: a channel is constant and cannot be standardised; use pool='published'")
            sums = (sums - totals[:, None] / num_tokens) / variance.sqrt()[:, None]
        vector = sums.reshape(POOLED, -1).mean(1) / num_tokens
        return (vector - vector.mean()) / vector.std()

    def to_json(self) -> dict[str, Any]:
        return {**self.header, "channels": [list(c) for c in self.channels]}

    def save(self, path: str | Path) -> None:
        """Write atomically: safetensors, conventions and tokens in its metadata."""
        tensors = {"sketches": self.sketches.contiguous(), "row_sums": self.row_sums.contiguous(), "squares": self.squares.contiguous()}
        metadata = {"llmcore_huref": json.dumps(self.to_json()), "tokens": json.dumps(self.tokens.to_json())}
        files.write_safetensors(path, tensors, metadata)


def load(path: str | Path) -> Fingerprint:
    """Read a fingerprint that `Fingerprint.save` wrote."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as stored:
            metadata = stored.metadata() or {}
            if "llmcore_huref" not in metadata:
                raise ValueError(f"{path}: is not a fingerprint (no llmcore_huref in its metadata)")
            tensors = {name: stored.get_tensor(name) for name in ("sketches", "row_sums", "squares")}
    except SafetensorError as error:
        raise ValueError(f"{path}: is not a fingerprint: {error}") from None
    header = json.loads(metadata["llmcore_huref"])
    if header.get("format") != FORMAT:
        raise ValueError(f"{path}: fingerprint format {header.get('format')!r}, this version reads {FORMAT}")
    channels = tuple((kind, name, layer) for kind, name, layer in header.pop("channels"))
    tokens = TokenList.from_json(json.loads(metadata["tokens"]))
    if tensors["sketches"].shape != (len(channels), header["width"]) or tensors["row_sums"].shape != (len(channels), header["num_tokens"]):
        raise ValueError(f"{path}: tensors do not fit the header")
    return Fingerprint(tensors["sketches"], tensors["row_sums"], tensors["squares"], channels, tokens, header)


def fingerprint(
    path: str | Path,
    *,
    layers: Sequence[int] = LAYERS,
    tokens: Tokens = None,
    K: int = 4096,
    terms: str | Sequence[str] = ("paper", "hardened"),
    gqa: str = "interleave",
    ff: str = "gate_times_up",
    compat: str | None = None,
    width: int = WIDTH,
    seed: int = SEED,
    base: str | Path | None = None,
    layout: str | None = None,
    max_memory: int | None = None,
) -> Fingerprint:
    """Fingerprint one checkpoint, reading the last layers' matrices and K embedding rows only. Nothing of size K x K is formed.

    Args: as in compare; tokens may come from another model: its byte strings are looked up in this one's vocabulary, and a model that lacks
        some of them is refused. width, seed: of the sketches. max_memory: bytes; refused before reading when the factors alone need more.
    """
    from llmcore.methods.huref.plans import plan

    started, chosen = time.perf_counter(), check_terms(terms)
    with open_model(path, base=base, layout=layout, compat=compat) as model:
        listed = resolve_tokens(tokens, model).last(K)
        if isinstance(tokens, TokenList) and listed.strings and model.vocabulary is not None:
            table = model.vocabulary.ids
            missing = [s for s in listed.strings if s not in table]
            if missing:
                raise ValueError(
                    f"tokens: {len(missing)} of the {len(listed)} tokens are not in the vocabulary of {path} "
                    f"(the first is {missing[0]!r}); compare the checkpoints directly, which uses the common tokens"
                )
            listed = TokenList(tuple(table[s] for s in listed.strings), listed.strings, listed.source)
        if max_memory is not None:
            needed = plan(path, K=len(listed), layers=layers, terms=chosen, max_memory=max_memory, base=base, layout=layout)
            if needed.peak_bytes > max_memory:
                raise ValueError(
                    f"max_memory = {max_memory} bytes is too little: factors and blocks take {needed.peak_bytes} bytes at "
                    f"K = {len(listed)}; K = {needed.largest_tokens} fits"
                )
        model.forget_vocabulary()
        release_free_memory()
        embeddings = embedding_rows(model.reader, model.layout, listed.ids)
        rows: list[torch.Tensor] = []
        sketches: list[torch.Tensor] = []
        squares: list[float] = []
        channels: list[tuple[str, str, int]] = []
        kept = [i for i in layers if -model.layout.num_layers <= i < model.layout.num_layers]
        if not kept:
            raise ValueError(f"layers {tuple(layers)} do not exist in a model of {model.layout.num_layers} layers")
        for index in kept:
            found = {}
            for f in layer_factors(
                model.reader, model.layout, index, embeddings, terms=chosen, gqa=gqa, ff=ff, block_bytes=block_bytes(max_memory)
            ):
                sums = invariant_sums(f.left, f.right, f.left, f.right, memory_budget=max_memory)
                found[f.name] = (tensor_sketch(f.left, f.right, width=width, seed=seed), row_sums(f), sums.dot_aa)
            for kind in chosen:
                for name in CHANNELS[kind]:
                    channels.append((kind, name, index))
                    sketches.append(found[name][0])
                    rows.append(found[name][1])
                    squares.append(found[name][2])
        header = {
            "format": FORMAT,
            "model": str(path),
            "model_type": model.layout.model_type,
            "layers": kept,
            "num_tokens": len(listed),
            "token_digest": listed.digest,
            "terms": list(chosen),
            "gqa": gqa,
            "ff": ff,
            "compat": compat or "",
            "width": width,
            "seed": seed,
            "bytes_read": model.reader.bytes_read,
            "seconds": time.perf_counter() - started,
        }
    return Fingerprint(
        torch.stack(sketches), torch.stack(rows), torch.tensor(squares, dtype=torch.float64), tuple(channels), listed, header
    )


def check_alike(a: dict[str, Any], b: dict[str, Any]) -> None:
    """Refuse to compare numbers made under different conventions."""
    for key in _UNLIKE:
        if a.get(key) != b.get(key):
            raise ValueError(
                f"fingerprints differ in {key} ({a.get(key)!r} and {b.get(key)!r}) and cannot be compared; make both with the same"
            )


def compare_fingerprints(
    a: Fingerprint, b: Fingerprint, *, same_base: float = SAME_BASE, related: float = RELATED, started: float | None = None
) -> Comparison:
    """Comparison of two fingerprints: each correlation is estimated with an error of about (1 - c²) / sqrt(width)."""
    started = time.perf_counter() if started is None else started
    check_alike(a.header, b.header)
    scores, notes = [], [f"estimated from sketches of width {a.header['width']}"]
    place = {channel: i for i, channel in enumerate(b.channels)}
    for i, channel in enumerate(a.channels):
        if channel not in place:
            continue
        kind, name, layer = channel
        x, y = a.sketches[i].double(), b.sketches[place[channel]].double()
        value = float(x @ y) if bool(x.any()) and bool(y.any()) else math.nan
        reason = "a constant channel has no correlation" if math.isnan(value) else ""
        if reason:
            notes.append(f"channel {name} of layer {layer} left out of the mean: {reason}")
        scores.append(ChannelScore(kind, name, layer, layer, value, "sketch", reason))
    if not scores:
        raise ValueError(f"fingerprints have no terms in common ({a.header['terms']} and {b.header['terms']})")
    means = {t: mean_known([s.correlation for s in scores if s.terms == t]) for t in CHANNELS}
    known = [m for m in means.values() if not math.isnan(m)]
    score = max(known, default=math.nan)
    # The sketches of unrelated matrices have correlations of standard deviation 1 / sqrt(width), independent between channels.
    deviation = 1 / math.sqrt(a.header["width"] * max(1, sum(1 for s in scores if s.terms == "paper") or len(scores)))
    overlap = {
        "common": a.header["num_tokens"],
        "dropped_a": 0,
        "dropped_b": 0,
        "digest": a.header["token_digest"],
        "source": a.tokens.source,
    }
    return Comparison(
        a.header["model"],
        b.header["model"],
        means["paper"],
        means["hardened"],
        scores,
        verdict_of(-1.0 if math.isnan(score) else score, same_base=same_base, related=related),
        score / deviation,
        0.0,
        deviation,
        None,
        [],
        overlap,
        a.header["num_tokens"],
        {k: a.header[k] for k in (*_UNLIKE, "terms")},
        notes,
        a.header["bytes_read"] + b.header["bytes_read"],
        0,
        time.perf_counter() - started,
        exact=False,
    )
