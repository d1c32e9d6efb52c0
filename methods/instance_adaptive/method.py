"""The method on one model: compose, decode, find the answers, score from inside the model, choose."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from llmcore.methods.instance_adaptive.answers import find_answer, normalise
from llmcore.methods.instance_adaptive.config import FLOWS, IAPConfig, IAPResult, Scored
from llmcore.methods.instance_adaptive.selection import Threshold, select_mv, select_ss
from torch import Tensor

from llmcore.attention import FlowRecorder, prefix_cache, token_segments

# What a threshold and a score must share.
_COMPARABLE = ("quantity", "denominator", "loss", "lambdas", "layers", "heads", "template", "answer_tokens", "dtype", "model")


def flow_map(flows: Tensor) -> tuple[Tensor, Tensor]:
    """Maps for plots from the flows of one or more sequences, (L, H, 3) or (N, L, H, 3): the mean over heads (L, 3) and the map of heads
    (L, H, 3), both averaged over sequences. The last axis is I_qp, I_qr, I_pr."""
    if flows.dim() not in (3, 4) or flows.shape[-1] != 3 or flows.numel() == 0:
        raise ValueError(f"flows must be (layers, heads, 3) or (sequences, layers, heads, 3), got {tuple(flows.shape)}")
    heads = flows if flows.dim() == 3 else flows.mean(0)
    return heads.mean(1), heads


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
        threshold = self.config.threshold
        if isinstance(threshold, Threshold) and threshold.metadata:
            mine = json.loads(json.dumps(self.metadata()))
            there = json.loads(json.dumps(threshold.metadata))
            differ = [key for key in _COMPARABLE if mine.get(key) != there.get(key)]
            if differ:
                raise ValueError(
                    f"threshold was calibrated with other {', '.join(differ)}: {[there.get(key) for key in differ]}, now "
                    f"{[mine.get(key) for key in differ]}; calibrate again"
                )

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
        """Flows (B, L, H, 3) and S (B,) of given sequences, or (L, H, 3) and S () of one sequence (n,): no text, no generation.

        segments: one mapping, or one a sequence, with the names question, prompt, rationale. A flow without pairs (an empty rationale)
        counts as 0."""
        if input_ids.dim() == 1:
            mask = None if attention_mask is None else attention_mask[None]
            flows, scores = self.score(input_ids[None], segments, target_position, target_id, attention_mask=mask, prefix=prefix)
            return flows[0], scores[0]
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
        if index is None and config.on_no_score == "raise":
            raise ValueError(f"no candidate of {len(done)} has a score: {[one.status for one in done]}")
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
