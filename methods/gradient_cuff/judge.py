"""Measure, judge, and guard: the detector called on a list of queries, or before one answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llmcore.methods.gradient_cuff import statistic
from llmcore.methods.gradient_cuff.config import Calibration, CuffConfig, CuffScore, CuffVerdict, GuardedAnswer, require_match
from llmcore.methods.gradient_cuff.detector import Detector
from llmcore.methods.gradient_cuff.prompt import Messages
from llmcore.methods.gradient_cuff.query import Query, answer_pieces, start_answer, verdict_of

from llmcore.sampling import Sampling

REJECTION = "I cannot help with that request."


def score(
    model: Any, queries: Sequence[Messages], config: CuffConfig | None = None, *, query_ids: Sequence[int] | None = None, stage2: str =
    "always",
    return_texts: bool = False, on_done: Callable[[Query], None] | None = None,
) -> list[CuffScore]:  # fmt: skip
    """Measure queries without judging them.

    Args:
        model: a LanguageModel. queries: strings or message lists.
        query_ids: select the random numbers (default 0, 1, …): equal id and text give equal samples, whatever else runs.
        stage2: "always", or "after_stage1" to leave out the directions of queries that stage 1 rejects.
        return_texts: keep the sampled responses.
    """
    detector = Detector(model, config or CuffConfig(), stage2=stage2, return_texts=return_texts)
    return [query.score for query in detector.run(queries, query_ids, on_done)]  # type: ignore[misc]


def _threshold(model: Any, calibration: Calibration | float, config: CuffConfig) -> float:
    if isinstance(calibration, Calibration):
        require_match(calibration, model, config)
        return calibration.threshold
    statistic.check_threshold(calibration)
    return float(calibration)


def check(
    model: Any, queries: Sequence[Messages], calibration: Calibration | float, config: CuffConfig | None = None, *,
    query_ids: Sequence[int] | None = None, on_done: Callable[[Query], None] | None = None,
) -> list[CuffVerdict]:  # fmt: skip
    """Judge queries against a calibration (refused when it belongs to another model or configuration) or a bare threshold."""
    config = config or CuffConfig()
    detector = Detector(model, config, threshold=_threshold(model, calibration, config))
    return [verdict_of(query) for query in detector.run(queries, query_ids, on_done)]


def guard(
    model: Any, query: Messages, calibration: Calibration | float, config: CuffConfig | None = None, *, answer: Sampling | None = None,
    message: str = REJECTION, query_id: int = 0,
) -> GuardedAnswer:  # fmt: skip
    """Detect first, then answer; the answer starts from the unperturbed row's cache.

    Fails closed: whatever goes wrong in detection, the result is the fixed message with `error` set, never an answer.
    """
    config = config or CuffConfig()
    answer = answer or Sampling(temperature=config.temperature, top_k=config.top_k, top_p=config.top_p, max_new_tokens=128,
    seed=config.seed)
    try:
        detector = Detector(model, config, threshold=_threshold(model, calibration, config), keep=True)
        prepared = detector.run([query], [query_id])[0]
        verdict = verdict_of(prepared)
    except Exception as error:  # fails closed: an error that passed here would let the query through
        return GuardedAnswer(message, True, None, "error", f"{type(error).__name__}: {error}")
    if verdict.rejected:
        return GuardedAnswer(message, True, verdict, "rejected")
    row = start_answer(prepared, answer)
    while not row.done:
        detector.batch.step()
    text = "".join(answer_pieces(prepared, [row.tokens[0]], answer))
    return GuardedAnswer(text, False, verdict, row.finish[0] or "length", token_ids=tuple(row.tokens[0]))
