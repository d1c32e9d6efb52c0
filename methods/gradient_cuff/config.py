"""Configuration and result records of Gradient Cuff."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from llmcore.methods.gradient_cuff.refusals import Refusal, describe, refusal_matcher

from llmcore.files import write_json
from llmcore.sampling import MAX_SAMPLES, Sampling

KINDS = ("gaussian", "sphere", "antithetic", "orthogonal")


@dataclass(frozen=True)
class CuffConfig:
    """Settings of a detection; defaults are the published program's (top_k 50 is active there without being written down).

    num_samples N, num_directions P (0: stage 1 only), smoothing μ (absolute, or in standard deviations of the embedding table with
    smoothing_relative_to="embedding_std"), kind and scale of the directions. `seed` selects directions and draws: the published 13 lets
    an attacker
    optimise against the very directions in use, so a service sets a secret one. schedule: "sequential" starts stage 2 after stage 1 is
    passed,
    "fused" runs both at once. early_exit (in `check` and `guard`): stop a query as soon as its verdict is certain; the verdict
    never changes.
    share_samples: run equal beginnings of samples once. answer_after: marker behind which a thinking model answers.
    """

    num_samples: int = 10
    num_directions: int = 10
    smoothing: float = 0.02
    smoothing_relative_to: str | None = None
    kind: str = "gaussian"
    scale: str = "mean"
    seed: int = 13
    fresh_directions: bool = False
    temperature: float = 0.6
    top_k: int = 50
    top_p: float = 0.9
    max_new_tokens: int = 16
    stage1_threshold: float = 0.5
    refusal: Refusal = "official"
    schedule: str = "sequential"
    early_exit: bool = False
    share_samples: bool = True
    span: str = "last_user"
    parse_user_specials: bool = False
    answer_after: str | None = None
    memory_budget: int | None = None
    debias: bool = False
    common_random_numbers: bool = False
    max_thinking_tokens: int = 512

    def __post_init__(self) -> None:
        def need(good: bool, name: str, expected: str) -> None:
            if not good:
                raise ValueError(f"{name} must be {expected}, got {getattr(self, name)!r}")

        need(_whole(self.num_samples) and 1 <= self.num_samples < MAX_SAMPLES, "num_samples", f"an integer in 1 … {MAX_SAMPLES - 1}")
        need(_whole(self.num_directions) and self.num_directions >= 0, "num_directions", "an integer >= 0")
        need(_number(self.smoothing) and self.smoothing > 0, "smoothing", "finite and > 0")
        need(self.smoothing_relative_to in (None, "embedding_std"), "smoothing_relative_to", "None or 'embedding_std'")
        need(self.kind in KINDS, "kind", f"one of {KINDS}")
        need(self.kind != "antithetic" or self.num_directions % 2 == 0, "num_directions", "even for kind='antithetic'")
        need(self.scale in ("mean", "sum"), "scale", "'mean' or 'sum'")
        need(_whole(self.seed) and -(2**63) <= self.seed < 2**64, "seed", "an integer of at most 64 bits")
        need(_number(self.temperature) and self.temperature > 0, "temperature", "finite and > 0 (top_k=1 is greedy)")
        need(_whole(self.top_k) and self.top_k >= 0, "top_k", "an integer >= 0 (0 keeps every token)")
        need(_number(self.top_p) and 0 < self.top_p <= 1, "top_p", "in (0, 1]")
        need(_whole(self.max_new_tokens) and self.max_new_tokens >= 1, "max_new_tokens", "an integer >= 1")
        need(_number(self.stage1_threshold) and 0 <= self.stage1_threshold <= 1, "stage1_threshold", "in [0, 1]")
        need(self.schedule in ("sequential", "fused"), "schedule", "'sequential' or 'fused'")
        need(self.span in ("last_user", "all_user"), "span", "'last_user' or 'all_user'")
        need(self.memory_budget is None or self.memory_budget > 0, "memory_budget", "None or a positive number of bytes")
        need(not self.debias or self.num_samples >= 2, "num_samples", ">= 2 for debias=True")
        need(not (self.debias and self.early_exit), "early_exit", "False with debias=True (the bounds are those of the plain norm)")
        refusal_matcher(self.refusal)

    @property
    def sampling(self) -> Sampling:
        """How detection draws its responses."""
        length = self.max_new_tokens + (self.max_thinking_tokens if self.answer_after else 0)
        return Sampling(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, max_new_tokens=length, seed=self.seed)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; a judge function is named, not stored."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values["refusal"] = self.refusal if isinstance(self.refusal, str) else describe(self.refusal)
        return values


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class CuffScore:
    """What detection measured of one query.

    f0 = 1 − K_0/N and counts = (K_0 … K_P) when all samples ran; norm (signed with debias=True), displacement ‖v‖₂, and noise_floor,
    the norm that
    sampling noise alone would give on average. A query that stopped early has None there, and [count_low, count_high] and `bounds` (of the
    norm) instead. `stage` is the last stage that ran (1 or 2). prompt_tokens went through the model for this query, decode_rows are its
    single-token forward rows. smoothing is the μ that was added, smoothing_in_std the same in standard deviations of the embedding table.
    """

    query_id: int
    f0: float | None
    counts: tuple[int, ...] | None
    norm: float | None
    displacement: float | None
    noise_floor: float | None
    stage: int
    count_low: tuple[int, ...]
    count_high: tuple[int, ...]
    bounds: tuple[float, float] | None
    smoothing: float
    smoothing_in_std: float
    prompt_tokens: int
    decode_rows: int
    seconds: float
    texts: tuple[tuple[str, ...], ...] | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return _plain(dataclasses.asdict(self))


@dataclass(frozen=True)
class CuffVerdict:
    """Whether a query is rejected, at which stage ("stage1", "stage2" or None), against which threshold, and the score behind it."""

    rejected: bool
    stage: str | None
    threshold: float
    score: CuffScore

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return _plain({**dataclasses.asdict(self), "score": self.score.to_json()})


@dataclass(frozen=True)
class GuardedAnswer:
    """What a guarded model says: `text` is its answer, or the fixed message when the query was rejected or detection failed (`error`)."""

    text: str
    rejected: bool
    verdict: CuffVerdict | None
    finish_reason: str
    error: str | None = None
    token_ids: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return _plain({**dataclasses.asdict(self), "verdict": self.verdict.to_json() if self.verdict else None})


@dataclass(frozen=True)
class Calibration:
    """A threshold for one model, template and configuration (`fingerprint`), and how it came about.

    rejected of n benign prompts (stage1_rejected of them at stage 1) are turned away; interval is the Clopper–Pearson 95 % interval of
    that rate:
    read it before quoting the target sigma as a fact.
    """

    threshold: float
    feasible: bool
    sigma: float
    method: str
    n: int
    stage1_rejected: int
    rejected: int
    rate: float
    interval: tuple[float, float]
    distinct_norms: int
    zero_share: float
    norms: tuple[float, ...]
    fingerprint: dict[str, Any]
    positive_control: float | None = None
    notes: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """Plain values; an infinite threshold is the string "inf"."""
        return _plain(dataclasses.asdict(self))

    def save(self, path: str | os.PathLike) -> None:
        """Write atomically as JSON."""
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike) -> Calibration:
        """Read what `save` wrote."""
        try:
            with open(path) as file:
                data = json.load(file)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} must be a calibration profile in JSON: {error}") from None
        names = {f.name for f in dataclasses.fields(cls)}
        if not isinstance(data, dict) or set(data) != names:
            raise ValueError(f"{path} must be a calibration profile with the fields {sorted(names)}")
        data["threshold"] = float(data["threshold"])
        for name in ("interval", "norms", "notes"):
            data[name] = tuple(data[name])
        return cls(**data)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and math.isinf(value):
        return "inf" if value > 0 else "-inf"
    return value


_digests: weakref.WeakKeyDictionary[torch.nn.Module, tuple[tuple, str]] = weakref.WeakKeyDictionary()


def _weights(model: Any) -> str:
    """Digest of the live weights, computed again only when a parameter was written to."""
    inner = model.model
    state = tuple((p.data_ptr(), p._version) for p in inner.parameters())
    if inner not in _digests or _digests[inner][0] != state:
        _digests[inner] = state, model.fingerprint()
    return _digests[inner][1]


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True, default=str).encode(), digest_size=12).hexdigest()


def fingerprint(model: Any, config: CuffConfig) -> dict[str, Any]:
    """Everything that a threshold depends on. The seed enters as a digest, because a service keeps it secret."""
    tokenizer = model.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    values = {
        "model": _weights(model),
        "dtype": str(next(model.model.parameters()).dtype),
        "template": _digest(tokenizer.chat_template),
        "tokenizer": _digest(backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())),
        "refusal": _digest(describe(config.refusal)),
        "directions": _digest([config.seed, "fresh" if config.fresh_directions else "shared"]),
    }
    for name in (
        "num_samples", "num_directions", "smoothing", "smoothing_relative_to", "kind", "scale", "temperature", "top_k", "top_p",
        "max_new_tokens",
        "stage1_threshold", "span", "parse_user_specials", "answer_after", "debias", "common_random_numbers",
    ):  # fmt: skip
        values[name] = getattr(config, name)
    return values


def require_match(calibration: Calibration, model: Any, config: CuffConfig) -> None:
    """Raise ValueError naming the fields in which a calibration does not belong to this model and configuration."""
    now = fingerprint(model, config)
    different = [name for name in now if calibration.fingerprint.get(name) != now[name]]
    if different:
        detail = ", ".join(f"{name} (calibrated {calibration.fingerprint.get(name)!r}, now {now[name]!r})" for name in different)
        raise ValueError(f"calibration must belong to this model and configuration, it differs in: {detail}; calibrate again")


