"""Run Gradient Cuff: rows of many queries through one batch, stages, waves of directions, verdicts.

Cost of a query with a tokens before the user's text, n of it and b after it: a once a process, (P + 1)(n + b) prompt tokens, and at most
N(P + 1)(T − 1) decode rows, fewer by per-sample stop (a refused sample is over), by sharing equal beginnings, and by early exit.
"""

from __future__ import annotations

import dataclasses
import math
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from llmcore.kernels.zeroth_order import direction_gram, directions, perturb_embeddings, query_seeds
from llmcore.methods.gradient_cuff import statistic
from llmcore.methods.gradient_cuff.config import (
    Calibration,
    CuffConfig,
    CuffScore,
    CuffVerdict,
    GuardedAnswer,
    fingerprint,
    require_match,
)
from llmcore.methods.gradient_cuff.prompt import Assembled, Messages, assemble
from llmcore.methods.gradient_cuff.refusals import stop_rule

from llmcore.decoding import Batch, Counters, Row, decoder_for
from llmcore.generation import memory_limit
from llmcore.phrases import PhraseMatcher, decode, phrase_rule
from llmcore.sampling import Sampling

REJECTION = "I cannot help with that request."
_PATIENCE = 4  # decode steps after which a wave of directions has shown most of its refusals


class Query:
    """One query inside a Detector: its rows (0 = unperturbed), the box of its counts, and its verdict once it is known."""

    def __init__(self, detector: Detector, prompt: Assembled, query_id: int):
        self.detector, self.prompt, self.query_id = detector, prompt, query_id
        config = detector.config
        self.rows: list[Row | None] = [None] * (config.num_directions + 1)
        self.low = np.zeros(config.num_directions + 1, dtype=np.int64)
        self.high = np.full(config.num_directions + 1, config.num_samples, dtype=np.int64)
        self.admitted = 0  # rows handed to the batch
        self.waited = 0  # decode steps since the last of them
        self.stage = 1
        self.bounds: tuple[float, float] | None = None
        self.score: CuffScore | None = None
        self.rejected_at: str | None = None
        self.begin = time.perf_counter()
        self.prefix_tokens = 0
        self._shifted: torch.Tensor | None = None
        self._seen: tuple | None = None

    @property
    def done(self) -> bool:
        return self.score is not None

    def embeddings(self, row: int) -> torch.Tensor:
        """(n + b, d) of a row: the user's tokens shifted by μ u_row, the suffix as it is."""
        detector, config = self.detector, self.detector.config
        behind = self.prompt.query_ids + self.prompt.suffix_ids
        plain = detector.decoder.embed(behind)
        if row == 0:
            return plain
        if self._shifted is None:
            mask = torch.zeros(1, len(behind), dtype=torch.bool, device=plain.device)
            mask[0, : len(self.prompt.mask)] = torch.tensor(self.prompt.mask, device=plain.device)
            with torch.no_grad():
                self._shifted = perturb_embeddings(
                    plain[None], mask, seeds=detector.seed_of(self.query_id), num_directions=config.num_directions,
                    smoothing=detector.smoothing,
                    kind=config.kind,
                )[0]  # fmt: skip
        shifted = self._shifted[row - 1]
        if row == config.num_directions:
            self._shifted = None  # rows are prefilled in order: this was the last
        return shifted

    def full_embeddings(self) -> torch.Tensor:
        """(a + n + b, d) of the unperturbed prompt."""
        return self.detector.decoder.embed(self.prompt.input_ids)

    @property
    def answer_stream(self) -> int:
        """Rows 0 … P belong to detection: the answer draws from a row of its own."""
        return self.detector.config.num_directions + 1

    def answer_rule(self, answer: Sampling) -> Any:
        """What ends the answer besides its length."""
        return phrase_rule(PhraseMatcher(answer.stop), self.detector.model.tokenizer) if answer.stop else None

    def wanted(self) -> int:
        """How many more rows should start now."""
        config, detector = self.detector.config, self.detector
        left = config.num_directions + 1 - self.admitted
        if self.done or left == 0:
            return 0
        if detector.stage2 == "always" or (config.schedule == "fused" and not detector.early_exit):
            return left
        # Waves: a verdict of rejection often needs few directions. Without a single refusal so far there is nothing to gain by waiting.
        wave = max(2, -(-3 * config.num_directions // 10))
        fused = config.schedule == "fused"
        if self.admitted == 0:
            return min(left, 1 + wave) if fused else 1
        if self.stage == 1 and not fused:
            return 0
        if not detector.early_exit:
            return left
        running = [row for row in self.rows[1 : self.admitted] if row is not None and not row.done]
        if running and self.waited < _PATIENCE:
            return 0
        quiet = self.admitted > 1 and not self.low.any()
        return left if quiet else min(left, wave)

    def admit(self, number: int) -> list[Row]:
        """The next rows to prefill."""
        detector, config = self.detector, self.detector.config
        if self.admitted == 0:
            counters = Counters()
            self.prefix = detector.decoder.prefix(self.prompt.prefix_ids, counters)
            self.prefix_tokens = counters.prefilled_tokens
        length = len(self.prompt.query_ids) + len(self.prompt.suffix_ids)
        new = []
        for i in range(self.admitted, self.admitted + number):
            self.rows[i] = Row(
                lambda i=i: self.embeddings(i), length, prefix=self.prefix, num_samples=config.num_samples, sampling=config.sampling,
                stream=(self.query_id, i), stop_rule=detector.rule, share=config.share_samples, keep=detector.keep and i == 0,
                common_uniforms=config.common_random_numbers,
            )  # fmt: skip
            new.append(self.rows[i])
        self.admitted += number
        self.waited = 0
        return new  # type: ignore[return-value]

    def update(self) -> None:
        """Read the counts, and finish the query when nothing more is needed."""
        if self.done:
            return
        detector, config = self.detector, self.detector.config
        total = config.num_samples
        for i, row in enumerate(self.rows):
            if row is not None:
                self.low[i] = row.count("match")
                self.high[i] = total - row.count("eos") - row.count("length")
        limit = detector.stage1_limit
        base = self.rows[0]
        if base is None:
            return
        if detector.stage2 == "always":
            if all(row is not None and row.done for row in self.rows):
                self.stage = 2 if config.num_directions else 1
                self.finish("stage1" if self.low[0] >= limit else self.compare())
            return
        if self.low[0] >= limit and (detector.early_exit or base.done):
            self.finish("stage1")
            return
        if self.stage == 1 and self.high[0] < limit:
            self.stage = 2
        if self.stage == 1:
            return
        if config.num_directions == 0:
            if base.done or detector.early_exit:
                self.stage = 1
                self.finish(None)
            return
        if all(row is not None and row.done for row in self.rows):
            self.finish(self.compare())
        elif detector.early_exit and self._seen != (state := (self.low.tobytes(), self.high.tobytes())):
            self._seen = state
            self.bounds = statistic.norm_bounds(
                self.low.tolist(), self.high.tolist(), total, detector.gram_of(self.query_id), detector.smoothing, scale=config.scale
            )
            if self.bounds[0] > detector.threshold * (1 + statistic.MARGIN):
                self.finish("stage2")
            elif self.bounds[1] <= detector.threshold * (1 - statistic.MARGIN):
                self.finish(None)

    def compare(self) -> str | None:
        """Stage 2 on complete counts."""
        if self.detector.threshold is None or not self.detector.config.num_directions:
            return None
        return "stage2" if self.norm() > self.detector.threshold else None

    def norm(self) -> float:
        detector, config = self.detector, self.detector.config
        gram = detector.gram_of(self.query_id)
        if config.debias:
            return statistic.debiased_norm(self.low.tolist(), config.num_samples, gram, detector.smoothing, scale=config.scale)
        return statistic.norm_from_counts(
            int(self.low[0]), self.low[1:].tolist(), config.num_samples, gram, detector.smoothing, scale=config.scale
        )

    def finish(self, rejected_at: str | None) -> None:
        """Record verdict and score, and end what still runs."""
        detector, config = self.detector, self.detector.config
        self.rejected_at = rejected_at
        whole = [row is not None and row.done and (self.low[i] == self.high[i]) for i, row in enumerate(self.rows)]
        complete = all(whole)
        two = complete and config.num_directions > 0
        counts = tuple(self.low.tolist()) if complete else None
        rows = [row for row in self.rows if row is not None]
        for row in rows:
            if not (row.kept and rejected_at is None):
                detector.batch.release(row)
            elif not row.done:
                row.cancel()
        texts = None
        if detector.return_texts:
            tokenizer = detector.model.tokenizer
            texts = tuple(tuple(decode(tokenizer, ids) for ids in row.tokens) for row in rows)
        low, high = tuple(self.low.tolist()), tuple(self.high.tolist())
        if self.bounds is None and not complete and config.num_directions and self.stage == 2:
            self.bounds = statistic.norm_bounds(
                low, high, config.num_samples, detector.gram_of(self.query_id), detector.smoothing, scale=config.scale
            )
        self.score = CuffScore(
            query_id=self.query_id,
            f0=(config.num_samples - low[0]) / config.num_samples if whole[0] else None,
            counts=counts if two or config.num_directions == 0 else None,
            norm=self.norm() if two else None,
            displacement=statistic.displacement(low, config.num_samples) if two else None,
            noise_floor=statistic.noise_floor(
                low, config.num_samples, detector.dim, detector.smoothing, scale=config.scale, antithetic=config.kind == "antithetic"
            )
            if two
            else None,
            stage=self.stage,
            count_low=low,
            count_high=high,
            bounds=None if complete else self.bounds,
            smoothing=detector.smoothing,
            smoothing_in_std=detector.smoothing / detector.embedding_std,
            prompt_tokens=self.prefix_tokens + sum(row.counters.prefilled_tokens for row in rows),
            decode_rows=sum(row.counters.decode_rows for row in rows),
            seconds=time.perf_counter() - self.begin,
            texts=texts,
        )


class Detector:
    """Detection of any number of queries on one model, one scheduler turn at a time; queries may be submitted while others run.

    Args:
        threshold: for verdicts; None measures only. stage2: "always", or "after_stage1".
        keep: keep the unperturbed row of accepted queries so that the answer costs no prefill.
    """

    def __init__(
        self, model: Any, config: CuffConfig, *, threshold: float | None = None, stage2: str = "after_stage1", keep: bool = False,
        return_texts: bool = False,
    ):  # fmt: skip
        if not hasattr(model, "tokenizer"):
            raise TypeError(f"model must be a LanguageModel (llmcore.load_model), got {type(model).__name__}")
        if stage2 not in ("always", "after_stage1"):
            raise ValueError(f"stage2 must be 'always' or 'after_stage1', got {stage2!r}")
        if threshold is not None:
            statistic.check_threshold(threshold)
        self.model, self.config, self.threshold, self.stage2 = model, config, threshold, stage2
        self.keep, self.return_texts = keep, return_texts
        self.decoder = decoder_for(model)
        weight = self.decoder.embedding.weight
        self.dim = weight.shape[1]
        if config.kind == "orthogonal" and config.num_directions > self.dim:
            raise ValueError(
                f"num_directions must be at most the embedding size for kind='orthogonal', got {config.num_directions} > {self.dim}"
            )
        self.embedding_std = self.decoder.embedding_std
        self.smoothing = config.smoothing * (self.embedding_std if config.smoothing_relative_to else 1.0)
        self.early_exit = config.early_exit and threshold is not None and stage2 != "always"
        self.stage1_limit = statistic.stage1_limit(config.num_samples, config.stage1_threshold)
        self.rule = stop_rule(config.refusal, model.tokenizer, config.answer_after, config.max_new_tokens)
        self.batch = Batch(self.decoder)
        self.limit = memory_limit(self.decoder.device, config.memory_budget)
        self.max_samples = 256 if self.decoder.device.type == "cpu" else 8192
        self.live: list[Query] = []
        self.waiting: deque[Query] = deque()

    def seed_of(self, query_id: int) -> int:
        """Seed of a query's directions."""
        if not self.config.fresh_directions:
            return self.config.seed
        return int(query_seeds(self.config.seed, torch.tensor([query_id]))[0]) % 2**64

    def gram_of(self, query_id: int) -> np.ndarray:
        """(P, P) float64 Gram matrix of the rows that are really added."""
        gram = direction_gram(self.seed_of(query_id), self.config.num_directions, self.dim, kind=self.config.kind,
        device=self.decoder.device)
        return gram[0].cpu().numpy()

    def prepare(self, query: Messages, query_id: int) -> Query:
        """Assemble and check a query; nothing runs yet."""
        config = self.config
        prompt = assemble(self.model.tokenizer, query, span=config.span, parse_user_specials=config.parse_user_specials)
        length, limit = len(prompt.input_ids), self.decoder.context_length
        if limit is not None and length + config.sampling.max_new_tokens > limit:
            raise ValueError(
                f"query must fit the model's context: {length} prompt tokens + {config.sampling.max_new_tokens} sampled = "
                f"{length + config.sampling.max_new_tokens} > {limit}; a prompt is never truncated before it is judged"
            )
        if not prompt.suffix_ids and not prompt.query_ids:
            raise ValueError("query must not be empty: nothing to perturb")
        return Query(self, prompt, query_id)

    def submit(self, query: Query) -> None:
        """Queue a prepared query."""
        query.begin = time.perf_counter()
        self.waiting.append(query)

    def cancel(self, query: Query) -> None:
        """Let go of a query's rows, whether it is running, waiting or finished."""
        for row in query.rows:
            if row is not None:
                self.batch.release(row)
        self.live = [other for other in self.live if other is not query]
        if query in self.waiting:
            self.waiting.remove(query)

    @property
    def idle(self) -> bool:
        return not self.live and not self.waiting

    def advance(self) -> list[Query]:
        """One turn: start rows while memory and batch allow, or decode one step. Returns the queries that it finished."""
        config = self.config
        rows: list[Row] = []
        used = self.batch.kv_bytes()
        samples = sum(len(node.samples) for row in self.batch.active for node in row.nodes)
        candidates: Iterator[Query] = iter([*self.live, *self.waiting])
        for query in candidates:
            number = query.wanted()
            length = len(query.prompt.query_ids) + len(query.prompt.suffix_ids)
            cost = self.batch.row_bytes(length, config.num_samples, config.sampling.max_new_tokens)
            fit = 0
            while fit < number:
                busy = bool(rows) or fit > 0 or bool(self.batch.active)
                if busy and (used + cost > self.limit or samples + config.num_samples > max(self.max_samples, config.num_samples)):
                    break
                used, samples, fit = used + cost, samples + config.num_samples, fit + 1
            if fit:
                if query not in self.live:
                    self.waiting.remove(query)
                    self.live.append(query)
                rows += query.admit(fit)
            if fit < number:
                break
        if rows:
            self.batch.admit(rows)
        else:
            self.batch.step()
            for query in self.live:
                query.waited += 1
        for query in self.live:
            query.update()
        finished = [query for query in self.live if query.done]
        self.live = [query for query in self.live if not query.done]
        return finished

    def run(
        self, queries: Sequence[Messages], query_ids: Sequence[int] | None, on_done: Callable[[Query], None] | None = None
    ) -> list[Query]:
        """Detect all, in order of "
        ""
        "the
        input.
        """
        if isinstance(queries, str):
            raise TypeError("queries must be a sequence of queries, got one str; wrap it in a list")
        ids = list(range(len(queries))) if query_ids is None else [int(i) for i in query_ids]
        if len(ids) != len(queries):
            raise ValueError(f"query_ids must name every query: expected {len(queries)}, got {len(ids)}")
        if any(not 0 <= i < 2**64 for i in ids):
            raise ValueError("query_ids must be integers in 0 … 2^64 − 1")
        prepared = [self.prepare(query, i) for query, i in zip(queries, ids, strict=True)]
        for query in prepared:
            self.submit(query)
        while not self.idle:
            for query in self.advance():
                if on_done:
                    on_done(query)
        return prepared


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


def verdict_of(query: Query) -> CuffVerdict:
    """The verdict of a finished query."""
    assert query.score is not None
    assert query.detector.threshold is not None
    return CuffVerdict(query.rejected_at is not None, query.rejected_at, query.detector.threshold, query.score)


def check(
    model: Any, queries: Sequence[Messages], calibration: Calibration | float, config: CuffConfig | None = None, *,
    query_ids: Sequence[int] | None = None, on_done: Callable[[Query], None] | None = None,
) -> list[CuffVerdict]:  # fmt: skip
    """Judge queries against a calibration (refused when it belongs to another model or configuration) or a bare threshold."""
    config = config or CuffConfig()
    detector = Detector(model, config, threshold=_threshold(model, calibration, config))
    return [verdict_of(query) for query in detector.run(queries, query_ids, on_done)]


def calibrate(
    model: Any, benign: Sequence[Messages], config: CuffConfig | None = None, *, sigma: float = 0.05, method: str = "plugin",
    must_refuse: Sequence[Messages] | None = None, on_done: Callable[[Query], None] | None = None,
) -> Calibration:  # fmt: skip
    """A threshold that turns away a share sigma of benign prompts.

    Args:
        benign: prompts of the traffic to be served; at least a few hundred for a narrow interval. method: see `threshold_from_scores`.
        must_refuse: prompts that the model plainly refuses. If fewer than half of them are refused by most samples, the refusal rule
        does not
            match this model, every norm would be 0 and everything would be accepted: ValueError. Without the list that can only be
            warned of.
    """
    config = dataclasses.replace(config or CuffConfig(), early_exit=False)  # censored norms calibrate nothing
    if isinstance(benign, str) or len(benign) == 0:
        raise ValueError("benign must be a non-empty sequence of prompts: a threshold needs benign prompts")
    if not 0 < sigma < 1:
        raise ValueError(f"sigma must lie in (0, 1), got {sigma!r}")
    control = None
    notes: list[str] = []
    if must_refuse:
        base = dataclasses.replace(config, num_directions=0, debias=False, kind="gaussian")
        limit = statistic.stage1_limit(config.num_samples, 0.5)
        scores = score(model, must_refuse, base, query_ids=[2**40 + i for i in range(len(must_refuse))])
        control = sum(s.counts[0] >= limit for s in scores if s.counts) / len(scores)
        if control < 0.5:
            raise ValueError(
                f"must_refuse must be refused: only {control:.0%} of these {len(scores)} prompts reached a refusal count above "
                f"N/2. The refusal "
                "phrases do not match what this model says; print its answers and extend the list (RefusalMatcher, or refusal='extended')"
            )
    else:
        notes.append("no positive control")
        warnings.warn(
            "must_refuse was not given: if the model's refusals do not match the phrase list, every norm is 0 and everything is accepted",
            stacklevel=2,
        )
    detector = Detector(model, config, stage2="after_stage1")
    scores = [query.score for query in detector.run(benign, None, on_done)]  # type: ignore[misc]
    limit = detector.stage1_limit
    if config.num_directions:
        norms = [s.norm for s in scores if s.norm is not None]
    else:
        norms = [0.0 for s in scores if s.count_low[0] < limit]
        notes.append("no directions: stage 1 only")
    result = statistic.threshold_from_scores(norms, len(scores) - len(norms), sigma, method=method)
    return Calibration(
        threshold=result.value, feasible=result.feasible, sigma=sigma, method=method, n=result.n, stage1_rejected=len(scores) - len(norms),
        rejected=result.rejected, rate=result.rejected / result.n, interval=result.interval, distinct_norms=len(set(norms)),
        zero_share=sum(norm == 0 for norm in norms) / len(norms) if norms else math.nan, norms=tuple(norms),
        fingerprint=fingerprint(model, config), positive_control=control, notes=tuple(notes),
    )  # fmt: skip


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
    except Exception as error:
        return GuardedAnswer(message, True, None, "error", f"{type(error).__name__}: {error}")
    if verdict.rejected:
        return GuardedAnswer(message, True, verdict, "rejected")
    row = start_answer(prepared, answer)
    while not row.done:
        detector.batch.step()
    text = "".join(answer_pieces(prepared, [row.tokens[0]], answer))
    return GuardedAnswer(text, False, verdict, row.finish[0] or "length", token_ids=tuple(row.tokens[0]))


def start_answer(query: Query, answer: Sampling) -> Row:
    """Begin the answer to an accepted query in its detector's batch; step the batch until the row is done."""
    row = query.rows[0]
    assert row is not None
    query.detector.batch.restart(row, answer, stop_rule=query.answer_rule(answer), stream=(query.query_id, query.answer_stream))
    return row


def answer_pieces(query: Query, states: Any, answer: Sampling) -> Iterator[str]:
    """Text of an answer in pieces, from the growing token lists in `states`."""
    from llmcore.generation import pieces

    return pieces(query.detector.model.tokenizer, iter(states), answer.stop)


def landscape(
    model: Any, query: Messages, config: CuffConfig | None = None, *, extent: float = 0.1, resolution: int = 7
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """f on the plane E + α u_1 + β u_2 around a query: (alphas, betas, f), f[i, j] at alphas[i], betas[j].

    Args: extent: half width of the square, in units of the directions (the detector looks at distance μ). resolution: points a side.
    """
    config = config or CuffConfig()
    if not (math.isfinite(extent) and extent > 0):
        raise ValueError(f"extent must be finite and > 0, got {extent!r}")
    if resolution < 1 or resolution**2 >= 2**15:
        raise ValueError(f"resolution must lie in 1 … 181, got {resolution}")
    detector = Detector(model, config)
    prompt = detector.prepare(query, 0).prompt
    decoder = detector.decoder
    plain = decoder.embed(prompt.query_ids + prompt.suffix_ids)
    first, second = directions(config.seed, 2, detector.dim, device=decoder.device)[0]
    mask = torch.zeros(len(plain), 1, device=plain.device)
    mask[: len(prompt.mask), 0] = torch.tensor(prompt.mask, device=plain.device, dtype=mask.dtype)
    alphas = np.linspace(-extent, extent, resolution)
    prefix = decoder.prefix(prompt.prefix_ids)
    rows = []
    for i, alpha in enumerate(alphas):
        for j, beta in enumerate(alphas):

            def shifted(alpha: float = alpha, beta: float = beta) -> torch.Tensor:
                return (plain.float() + mask * (alpha * first + beta * second)).to(plain.dtype)

            rows.append(
                Row(shifted, len(plain), prefix=prefix, num_samples=config.num_samples, sampling=config.sampling, stream=(0, i *
                resolution + j),
                    stop_rule=detector.rule, share=config.share_samples)
            )  # fmt: skip
    from llmcore.generation import run_rows

    run_rows(decoder, rows, max_rows=max(1, detector.max_samples // config.num_samples), memory_budget=config.memory_budget)
    refusals = np.array([row.count("match") for row in rows]).reshape(resolution, resolution)
    return alphas, alphas.copy(), (config.num_samples - refusals) / config.num_samples
