"""Instance-adaptive zero-shot chain of thought: pick the trigger sentence of each question by how information flowed inside the model.

Zero-shot chain of thought appends a trigger ("Let's think step by step.") to a question; the model writes a rationale and an answer. No
trigger
is best for every question. For a question q, trigger p and rationale r the method measures, at the step that produces the answer token,

    I_qp, I_qr, I_pr = mean of |A · dL/dA| over pairs (reader in p, read in q), (r, q), (r, p)        per layer and head
    S = mean over layers and heads of  l1·I_qp + l2·I_qr + l3·I_pr,   l1 + l2 + l3 = 1

and takes the first trigger whose S passes a threshold ("ss", sequential substitution) or votes among the k best ("mv", majority vote). No
label, no
reward model, no training. Paper: Yuan et al., "Instance-adaptive zero-shot chain-of-thought prompting", NeurIPS 2024, arXiv 2409.20441.

With the paper's cross-entropy, S carries the factor 1 - p(answer): flow and confidence mixed. loss="margin" is the same flow without it.

Cost of M triggers: one batched decode, one forward of the tokens that all M texts share (their keys and values are then constants: exact,
since a
gradient at a row never passes through earlier rows), and one forward + activation-only backward of the M suffixes.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmcore.attention import FlowRecorder, prefix_cache

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

_NUMBER = r"[-+]?[^\S\n]*[$€£]?[^\S\n]*\d[\d,]*(?:\.\d+)?(?:[^\S\n]*/[^\S\n]*\d+)?(?:[^\S\n]*%)?"
_CUE = r"(?:answer\s*(?:is|:|=)|####|\\boxed\s*\{)\s*(?:is\b|:)?"
_END = r"(?=[^\d=\n]*(?:\n|$))"  # nothing but a unit or a full stop behind it
# answer family -> expression with one filled group, the answer; a cue is required, a delimiter must follow (never "1" of "18")
PATTERNS = {
    # "=" is a cue only at the end of a line whose left side computes ("3 + 4 = 7"): "x = 3, y = 4" states what is given
    "number": re.compile(
        rf"(?i){_CUE}[^\d\n+\-$€£]{{0,20}}({_NUMBER})(?!\d)|[\d)%]\s*[-+*/x×÷^][^=\n]*=[^\S\n]*({_NUMBER})(?!\d){_END}"
    ),
    "option": re.compile(r"(?i)(?:answer\s*(?:is|:)|####|\\boxed\s*\{)\s*(?:is\b|:)?\s*(?:option\s+)?\(?([A-Z])(?![A-Za-z'])"),
    "yesno": re.compile(r"(?i)(?:answer\s*(?:is|:)|####|\\boxed\s*\{)\s*(?:is\b|:)?\W{0,3}(yes|no|true|false|valid|invalid)\b"),
}


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


def find_answer(text: str, family: str | Callable[[str], tuple[int, int] | None], *, last_number: bool = False) -> tuple[int, int] | None:
    """(start, end) of the answer in the finished text: the last match behind a cue, or None."""
    if callable(family):
        return family(text)
    matches = list(PATTERNS[family].finditer(text))
    if not matches and last_number and family == "number":
        matches = list(re.finditer(rf"({_NUMBER})(?!\d)", text))
    if not matches:
        return None
    start, end = matches[-1].span(matches[-1].lastindex or 0)
    while start < end and text[start] in " +$€£":
        start += 1
    return start, start + len(text[start:end].rstrip(" ,\n"))


def normalise(answer: str) -> str:
    """Equal answers become equal strings: numbers as numbers (5.0 = 5, 1,000 = 1000, 50 % = 50), letters and words in lower case."""
    plain = answer.strip().rstrip(".").lower()
    number = re.sub(r"[\s,$€£%]", "", plain)
    try:
        if "/" in number:
            above, below = number.split("/")
            return f"{float(above) / float(below):.12g}"
        return f"{float(number):.12g}"
    except (ValueError, ZeroDivisionError):
        return plain.strip("() ")


def select_ss(scores: Sequence[float | None], answers: Sequence[str | None], threshold: float) -> tuple[int | None, str]:
    """Sequential substitution: the first score above the threshold; if none passes, the largest. (index, reason)"""
    scored = [(i, score) for i, score in enumerate(scores) if score is not None and answers[i] is not None]
    if not scored:
        return None, "no_score"
    for i, score in scored:
        if score > threshold:
            return i, f"first score above {threshold:g}"
    return max(scored, key=lambda pair: (pair[1], -pair[0]))[0], f"none above {threshold:g}: largest score"


def select_mv(scores: Sequence[float | None], answers: Sequence[str | None], k: int = 3) -> tuple[int | None, str]:
    """Majority vote of the k largest scores; ties go to the answer with the larger best score, then to the earlier candidate. (index,
    reason)"""
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    scored = [(score, -i) for i, score in enumerate(scores) if score is not None and answers[i] is not None]
    if not scored:
        return None, "no_score"
    best = [-i for _, i in sorted(scored, reverse=True)[:k]]
    votes = collections.Counter(normalise(str(answers[i])) for i in best)
    winner = max(best, key=lambda i: (votes[normalise(str(answers[i]))], scores[i], -i))
    return winner, f"{votes[normalise(str(answers[winner]))]} of {len(best)} votes"


def calibrate_threshold(scores: Any, correct: Any, metric: str = "balanced", *, answers_correct: Any = None) -> float:
    """The threshold on scores that best separates right from wrong, in O(N log N).

    Args:
        scores: (N,) scores, or (questions, candidates) for metric "downstream". correct: booleans of the same shape.
        metric: "balanced" (mean of both classes' accuracies), "accuracy", or "downstream": the accuracy that sequential substitution would
            reach.
    """
    values, right = torch.as_tensor(scores, dtype=torch.float64), torch.as_tensor(correct).bool()
    if values.shape != right.shape or values.numel() == 0:
        raise ValueError(f"correct must have the shape of scores {tuple(values.shape)}, got {tuple(right.shape)}")
    if not bool(torch.isfinite(values).all()):
        raise ValueError("scores must be finite")
    if bool(right.all()) or not bool(right.any()):
        raise ValueError("correct holds one class only: a threshold needs right and wrong pairs")
    distinct = values.flatten().unique()
    cuts = torch.cat([distinct[:1] - 1, (distinct[1:] + distinct[:-1]) / 2, distinct[-1:] + 1])
    if metric in ("balanced", "accuracy"):
        good, bad = values[right].sort().values, values[~right].sort().values
        kept = len(good) - torch.searchsorted(good, cuts, right=True)
        dropped = torch.searchsorted(bad, cuts, right=True)
        merit = kept / len(good) + dropped / len(bad) if metric == "balanced" else kept + dropped
    elif metric == "downstream":
        if values.dim() != 2:
            raise ValueError(f"scores must be (questions, candidates) for metric='downstream', got {tuple(values.shape)}")
        # Of a question only scores above all earlier ones can be the first to pass some threshold: a step function of the threshold, added
        # up over questions.
        running = values.cummax(1).values
        gain = torch.zeros(len(cuts), dtype=torch.float64)
        for row, top, ok in zip(values, running, right, strict=True):
            records = [0] + [i for i in range(1, len(row)) if row[i] > top[i - 1]]
            low = 0
            for i in records:
                high = int(torch.searchsorted(cuts, row[i]))
                gain[low:high] += float(ok[i])
                low = max(low, high)
            gain[low:] += float(ok[records[-1]])
        merit = gain
    else:
        raise ValueError(f"metric must be 'balanced', 'accuracy' or 'downstream', got {metric!r}")
    return float(cuts[int(merit.argmax())])


class InstanceAdaptivePrompting:
    """Runs the method on one model.

    Example:
        >>> iap = InstanceAdaptivePrompting(llmcore.load_model("smollm2"), config=IAPConfig(max_new_tokens=64))
        >>> iap.answer("Tom has 3 apples and buys 2 more. How many apples has he?").answer
    """

    def __init__(self, model: Any, tokenizer: Any = None, config: IAPConfig | None = None) -> None:
        self.language_model = model if hasattr(model, "tokenizer") else None
        self.model = model.model if self.language_model is not None else model
        self.tokenizer = tokenizer or getattr(model, "tokenizer", None)
        self.config = config or IAPConfig()
        if self.tokenizer is None:
            raise ValueError("tokenizer must be given when model is not a LanguageModel")
        settings = self.model.config.get_text_config()
        layers = self.config.layers
        if layers == "shallow":
            layers = 1 / 3
        if isinstance(layers, float):
            layers = list(range(max(1, math.ceil(settings.num_hidden_layers * layers))))
        self.layers: list[int] | None = None if layers is None else list(layers)  # type: ignore[arg-type]

    # ---- text and spans ------------------------------------------------------------------------------------------------------------------

    def compose(self, question: str, candidate: str) -> tuple[str, tuple[int, int], tuple[int, int]]:
        """The text up to and including the trigger, and the character spans of question and trigger. The trigger opens the answer's
        turn."""
        question, candidate = question.strip(), candidate.strip()
        if not question:
            raise ValueError("question must not be empty")
        if self.config.template == "chat":
            head = self.tokenizer.apply_chat_template([{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True)
            text = head + candidate
        else:
            before, after = self.config.template.split("{q}", 1)
            head = before + question + after.split("{p}", 1)[0]
            text = head + candidate
        start = head.rfind(question)
        if start < 0:
            raise ValueError("template changed the question's text, so its span cannot be found")
        return text, (start, start + len(question)), (len(head), len(head) + len(candidate))

    def _encode(
        self, text: str, spans: dict[str, tuple[int, int]]
    ) -> tuple[list[int], dict[str, list[tuple[int, int]]], list[tuple[int, int]]]:
        from llmcore.attention import token_segments

        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        offsets = [tuple(pair) for pair in encoded["offset_mapping"]]
        return list(encoded["input_ids"]), token_segments(offsets, spans), offsets

    # ---- scores --------------------------------------------------------------------------------------------------------------------------

    def score(
        self,
        input_ids: Tensor,
        segments: Any,
        target_position: Any,
        target_id: Any,
        *,
        attention_mask: Tensor | None = None,
        prefix: Any = None,
    ) -> tuple[Tensor, Tensor]:
        """Flows (B, L, H, 3) and S (B,) of given sequences: no text, no generation. segments: one mapping, or one a sequence, with the
        names
        question, prompt, rationale. A flow without pairs (an empty rationale) counts as 0."""
        recorder = self._record(input_ids, segments, target_position, target_id, attention_mask, prefix)
        flows = torch.stack([recorder.flow(source, reader, empty="zero") for source, reader in FLOWS], -1)
        if not bool(torch.isfinite(flows).all()):
            raise ValueError("NaN in the flows; use a wider dtype")
        return flows, self._score(flows)

    def _score(self, flows: Tensor) -> Tensor:
        return (flows.double() @ torch.tensor(self.config.lambdas, dtype=torch.float64, device=flows.device)).mean((-1, -2))

    def _record(
        self, input_ids: Tensor, segments: Any, target_position: Any, target_id: Any, attention_mask: Tensor | None, prefix: Any
    ) -> FlowRecorder:
        recorder = FlowRecorder(self.model, segments, layers=self.layers, heads=self.config.heads, pairs=FLOWS, prefix_cache=prefix)
        return recorder.run(input_ids, attention_mask, target_position, target_id, loss=self.config.loss)

    def score_texts(self, items: Sequence[tuple[str, dict[str, tuple[int, int]], tuple[int, int] | None]]) -> list[dict[str, Any]]:
        """Scores of finished texts: (text, character spans of question and prompt, span of the answer). The rationale is what lies between
        the trigger
        and the answer's first token; what follows the answer is cut off. Tokens that all texts share before the first trigger run once,
        without gradient."""
        results: list[dict[str, Any]] = [{"status": "no_answer"} for _ in items]
        ready = []
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        for index, (text, spans, answer) in enumerate(items):
            if answer is None:
                continue
            ids, segments, offsets = self._encode(text, spans)
            first = next((i for i, (a, b) in enumerate(offsets) if b > answer[0] and b > a), None)
            last = max((i for i, (a, b) in enumerate(offsets) if a < answer[1] and b > a), default=-1)
            prompt_end = segments["prompt"][-1][1] if segments["prompt"] else 0
            if first is None or first < prompt_end:
                results[index]["status"] = "answer_in_prompt"
                continue
            if limit is not None and last + 1 > limit:
                results[index]["status"] = f"too long: {last + 1} tokens, the model takes {limit}"
                continue
            segments["rationale"] = [(prompt_end, first)] if first > prompt_end else []
            count = 1 if self.config.answer_tokens == "first" else last + 1 - first
            ready.append((index, ids, segments, first, count))
        for start in range(0, len(ready), self.config.batch):
            self._score_batch(ready[start : start + self.config.batch], results)
        return results

    def _score_batch(self, chunk: list[tuple[int, list[int], dict[str, Any], int, int]], results: list[dict[str, Any]]) -> None:
        device = next(self.model.parameters()).device
        shared = 0
        if self.config.share_prefix:  # no row of a scored reader (prompt, rationale) nor a target's row may lie in the prefix
            bound = min(
                min([first - 1, *(span[0] for name in ("prompt", "rationale") for span in segments[name])])
                for _, _, segments, first, _ in chunk
            )
            while shared < bound and len({ids[shared] for _, ids, _, _, _ in chunk}) == 1:
                shared += 1
        prefix = prefix_cache(self.model, torch.tensor([chunk[0][1][:shared]], device=device)) if shared else None
        counts = max(count for *_, count in chunk)
        rows = range(counts) if counts > 1 else [0]
        totals: list[Tensor] = []
        losses, sure = [], []
        for offset in rows:  # "mean" over answer tokens: one pass a token keeps every pass a single-target one
            length = max(first + min(offset, count - 1) for _, _, _, first, count in chunk)
            batch = torch.zeros(len(chunk), length - shared, dtype=torch.long, device=device)
            mask = torch.zeros(len(chunk), length, dtype=torch.long, device=device)
            positions, targets, segments = [], [], []
            for b, (_, ids, spans, first, count) in enumerate(chunk):
                end = first + min(offset, count - 1)
                batch[b, : end - shared] = torch.tensor(ids[shared:end], device=device)
                mask[b, :end] = 1
                positions.append(end - 1)
                targets.append(ids[end])
                segments.append(spans)
            recorder = self._record(
                batch,
                segments,
                torch.tensor(positions, device=device),
                torch.tensor(targets, device=device),
                None if bool(mask.all()) else mask,
                prefix,
            )
            totals.append(torch.stack([recorder.flow(source, reader, empty="zero") for source, reader in FLOWS], -1))
            losses.append(recorder.loss)
            sure.append(1 - recorder.one_minus_p)
        for b, (index, _, spans, _, count) in enumerate(chunk):
            flows = torch.stack([totals[i][b] for i in range(count)]).mean(0)
            results[index] = {
                "flows": flows, "score": float(self._score(flows[None])[0]),
                "loss": float(torch.stack([losses[i][b] for i in range(count)]).mean()),
                "p_answer": float(sure[0][b]), "status": "scored" if spans["rationale"] else "empty_rationale",
            }  # fmt: skip
            if not math.isfinite(results[index]["score"]):
                raise ValueError(f"the score of candidate {index} is not finite; use a wider dtype")

    # ---- the method ----------------------------------------------------------------------------------------------------------------------

    def answer(self, question: str) -> IAPResult:
        """Generate, score and select for one question."""
        done: list[Scored] = []
        config = self.config
        step = len(config.candidates) if config.strategy == "mv" else config.batch
        choice: tuple[int | None, str] = (None, "no_score")
        for start in range(0, len(config.candidates), step):
            done += self._candidates(question, config.candidates[start : start + step])
            scores, answers = [one.score for one in done], [one.answer for one in done]
            if config.strategy == "ss":
                choice = select_ss(scores, answers, float(config.threshold or 0.0))
                if choice[0] is not None and choice[1].startswith("first"):
                    break  # a chunk is speculative: candidates behind the first that passes change nothing
            else:
                choice = select_mv(scores, answers, config.k)
        index, reason = choice
        return IAPResult(
            question, done[index].answer if index is not None else None, 0 if index is None else index, reason, done, self.metadata()
        )

    def answer_many(self, questions: Iterable[str], path: str | Path | None = None) -> list[IAPResult | dict[str, str]]:
        """Every question; with `path`, one JSON line each as it completes, and questions already there are not run again. A failing
        question is
        recorded with its error and the run goes on."""
        known: dict[str, dict[str, Any]] = {}
        target = Path(path) if path is not None else None
        if target is not None and target.exists():
            for line in target.read_text().splitlines():
                with_metadata = json.loads(line)
                if with_metadata.get("metadata") == json.loads(json.dumps(self.metadata())):
                    known[with_metadata["question"]] = with_metadata
        results: list[IAPResult | dict[str, str]] = []
        for question in questions:
            if question in known:
                stored = known[question]
                results.append(IAPResult.from_json(stored))
                continue
            try:
                result: IAPResult | dict[str, str] = self.answer(question)
            except (ValueError, RuntimeError) as error:
                result = {"question": question, "error": f"{type(error).__name__}: {error}"}
            results.append(result)
            if target is not None:
                with target.open("a") as file:
                    file.write((result.to_json() if isinstance(result, IAPResult) else json.dumps(result)) + "\n")
        return results

    def evaluate(self, questions: Sequence[str], gold: Sequence[str], path: str | Path | None = None) -> dict[str, Any]:
        """Accuracy of the method and of every single trigger on a labelled set."""
        if len(questions) != len(gold):
            raise ValueError(f"gold must have one answer a question ({len(questions)}), got {len(gold)}")
        results = self.answer_many(questions, path)
        right = [
            isinstance(r, IAPResult) and r.answer is not None and normalise(r.answer) == normalise(g)
            for r, g in zip(results, gold, strict=True)
        ]
        singles = {}
        for i, candidate in enumerate(self.config.candidates):
            hits = [
                normalise(str(r.per_candidate[i].answer)) == normalise(g)
                for r, g in zip(results, gold, strict=True)
                if isinstance(r, IAPResult) and i < len(r.per_candidate)
            ]
            singles[candidate] = sum(hits) / len(hits) if hits else None
        return {
            "accuracy": sum(right) / max(len(right), 1),
            "questions": len(right),
            "failed": sum(not isinstance(r, IAPResult) for r in results),
            "single_triggers": singles,
            "results": results,
            "metadata": self.metadata(),
        }

    def _candidates(self, question: str, candidates: Sequence[str]) -> list[Scored]:
        from llmcore.generation import Sampling, complete

        if self.language_model is None:
            raise ValueError(
                "model must be a LanguageModel (llmcore.load_model) to generate; score_texts scores finished texts of any model"
            )
        composed = [self.compose(question, candidate) for candidate in candidates]
        prompts = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text, _, _ in composed]
        completions = complete(
            self.language_model, prompts, Sampling(temperature=0.0, max_new_tokens=self.config.max_new_tokens), max_rows=self.config.batch
        )
        items: list[tuple[str, dict[str, tuple[int, int]], tuple[int, int] | None]] = []
        for (text, asked, trigger), completion in zip(composed, completions, strict=True):
            found = find_answer(completion.text, self.config.answer, last_number=self.config.last_number)
            span = None if found is None else (found[0] + len(text), found[1] + len(text))
            items.append((text + completion.text, {"question": asked, "prompt": trigger}, span))
        scored = []
        for candidate, completion, (text, _, span), result in zip(candidates, completions, items, self.score_texts(items), strict=True):
            flows = result.get("flows")
            scored.append(
                Scored(
                    candidate,
                    completion.text,
                    None if span is None else text[span[0] : span[1]],
                    result.get("score"),
                    None if flows is None else tuple(float(x) for x in flows.double().mean((0, 1))),
                    result.get("loss"),
                    result.get("p_answer"),
                    result["status"],
                )
            )
        return scored

    def metadata(self) -> dict[str, Any]:
        """What must be equal for two scores, or a score and a threshold, to be comparable."""
        config = self.config
        return {
            "method": "instance-adaptive prompting",
            "quantity": "mean |A * dL/dA|",
            "denominator": "box",
            "loss": config.loss,
            "lambdas": list(config.lambdas),
            "layers": self.layers,
            "heads": None if config.heads is None else list(config.heads),
            "template": config.template,
            "answer_tokens": config.answer_tokens,
            "candidates": list(config.candidates),
            "strategy": config.strategy,
            "k": config.k,
            "threshold": config.threshold,
            "max_new_tokens": config.max_new_tokens,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "model": getattr(self.language_model, "name", None) or getattr(self.model.config, "_name_or_path", ""),
        }
