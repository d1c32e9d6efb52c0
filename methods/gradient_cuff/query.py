"""One query inside a Detector: its rows, when they start, the box of its counts, and its verdict once it is known."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from llmcore.kernels.zeroth_order import perturb_embeddings
from llmcore.methods.gradient_cuff import statistic
from llmcore.methods.gradient_cuff.config import CuffScore, CuffVerdict
from llmcore.methods.gradient_cuff.prompt import Assembled

from llmcore.decoding import Counters, Row
from llmcore.generation import pieces
from llmcore.phrases import PhraseMatcher, decode, phrase_rule
from llmcore.sampling import Sampling

if TYPE_CHECKING:
    from llmcore.methods.gradient_cuff.detector import Detector

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


def verdict_of(query: Query) -> CuffVerdict:
    """The verdict of a finished query."""
    assert query.score is not None
    assert query.detector.threshold is not None
    return CuffVerdict(query.rejected_at is not None, query.rejected_at, query.detector.threshold, query.score)


def start_answer(query: Query, answer: Sampling) -> Row:
    """Begin the answer to an accepted query in its detector's batch; step the batch until the row is done."""
    row = query.rows[0]
    assert row is not None
    query.detector.batch.restart(row, answer, stop_rule=query.answer_rule(answer), stream=(query.query_id, query.answer_stream))
    return row


def answer_pieces(query: Query, states: Any, answer: Sampling) -> Iterator[str]:
    """Text of an answer in pieces, from the growing token lists in `states`."""
    return pieces(query.detector.model.tokenizer, iter(states), answer.stop)
