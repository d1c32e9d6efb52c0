"""Settings and results of instance-adaptive prompting, and the nine default triggers."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

from llmcore.methods.instance_adaptive.answers import PATTERNS

# In order of trial: six that instruct, one that is irrelevant, two that mislead. The order matters for "ss", in accuracy and in time.
CANDIDATES = (
    "Let's think step by step.",
    "First,",
    "The answer comes after the proof.",
    "Before we give the answer,",
    "Let's solve this problem by splitting it into steps.",
    "Let's think about this logically.",
    "It's a lovely day today.",
    "Don't think, just feel.",
    "Because the earth is round,",
)
FLOWS = (("question", "prompt"), ("question", "rationale"), ("prompt", "rationale"))  # (read, reader): I_qp, I_qr, I_pr
PLAIN_TEMPLATE = "Q: {q}\nA: {p}"


@dataclasses.dataclass(frozen=True)
class IAPConfig:
    """Settings; defaults are the paper's where it states them.

    candidates: triggers in order. strategy: "mv" or "ss". k: votes of "mv". threshold: of "ss", no default because it depends on model,
        data and loss.
    lambdas: weights of I_qp, I_qr, I_pr (the paper does not publish its values). layers, heads: indices, or a fraction of the layers from
        the first
    ("shallow" is a third). answer: "number", "option", "yesno" or text -> (start, end) | None. template: "chat", or a format with {q}
    before {p}.
    answer_tokens: "first" token of the answer or "mean" over its tokens. last_number: without a cue, take the text's last number.
    on_no_score: no candidate answered: choose the "first" with reason "no_score", or "raise". share_prefix: run what all texts open
    with once.
    """

    candidates: tuple[str, ...] = CANDIDATES
    strategy: str = "mv"
    k: int = 3
    threshold: float | None = None
    lambdas: tuple[float, float, float] = (1 / 3, 1 / 3, 1 / 3)
    layers: Sequence[int] | float | str | None = None
    heads: Sequence[int] | None = None
    loss: str = "ce"
    answer: str | Callable[[str], tuple[int, int] | None] = "number"
    answer_tokens: str = "first"
    template: str = "chat"
    max_new_tokens: int = 512
    batch: int = 9
    last_number: bool = False
    on_no_score: str = "first"
    share_prefix: bool = True

    def __post_init__(self) -> None:
        if not self.candidates or not all(text.strip() for text in self.candidates):
            raise ValueError("candidates must be at least one non-empty trigger")
        if len(set(self.candidates)) != len(self.candidates):
            raise ValueError(f"candidates must differ, got duplicates in {self.candidates}")
        if self.strategy not in ("mv", "ss"):
            raise ValueError(f"strategy must be 'mv' or 'ss', got {self.strategy!r}")
        if self.k < 1:
            raise ValueError(f"k must be at least 1, got {self.k}")
        if self.strategy == "ss" and self.threshold is None:
            raise ValueError("threshold must be given for strategy='ss'; calibrate_threshold finds one from scored training questions")
        if len(self.lambdas) != 3 or min(self.lambdas) < 0 or abs(sum(self.lambdas) - 1) > 1e-6:
            raise ValueError(f"lambdas must be three weights >= 0 that sum to 1, got {self.lambdas}")
        if self.loss not in ("ce", "margin", "logit"):
            raise ValueError(f"loss must be 'ce', 'margin' or 'logit', got {self.loss!r}")
        if isinstance(self.answer, str) and self.answer not in PATTERNS:
            raise ValueError(f"answer must be one of {tuple(PATTERNS)} or a function, got {self.answer!r}")
        if self.answer_tokens not in ("first", "mean"):
            raise ValueError(f"answer_tokens must be 'first' or 'mean', got {self.answer_tokens!r}")
        if self.on_no_score not in ("first", "raise"):
            raise ValueError(f"on_no_score must be 'first' or 'raise', got {self.on_no_score!r}")
        if self.template != "chat" and not 0 <= self.template.find("{q}") < self.template.find("{p}"):
            raise ValueError(f"template must hold {{q}} before {{p}} (a prompt before the question cannot read it), got {self.template!r}")
        if self.batch < 1 or self.max_new_tokens < 1:
            raise ValueError(f"batch and max_new_tokens must be at least 1, got {self.batch} and {self.max_new_tokens}")


@dataclasses.dataclass(frozen=True)
class Scored:
    """One (question, trigger) pair. flows: means of I_qp, I_qr, I_pr over layers and heads; score: S, None without an answer."""

    candidate: str
    text: str
    answer: str | None = None
    score: float | None = None
    flows: tuple[float, float, float] | None = None
    loss: float | None = None
    p_answer: float | None = None
    status: str = "scored"


@dataclasses.dataclass(frozen=True)
class IAPResult:
    """The chosen answer, the index of the chosen candidate, why, every candidate, and what makes the scores comparable."""

    question: str
    answer: str | None
    chosen: int
    reason: str
    per_candidate: list[Scored]
    metadata: dict[str, Any]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, stored: str | dict[str, Any]) -> IAPResult:
        """The result that `to_json` wrote; JSON knows no tuples, so the flows become tuples again."""
        fields = json.loads(stored) if isinstance(stored, str) else dict(stored)
        fields["per_candidate"] = [
            Scored(**{**one, "flows": None if one["flows"] is None else tuple(one["flows"])}) for one in fields["per_candidate"]
        ]
        return cls(**fields)
