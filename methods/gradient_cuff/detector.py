"""Run Gradient Cuff: rows of many queries through one batch, one scheduler turn at a time.

Cost of a query with a tokens before the user's text, n of it and b after it: a once a process, (P + 1)(n + b) prompt tokens, and at most
N(P + 1)(T − 1) decode rows, fewer by per-sample stop (a refused sample is over), by sharing equal beginnings, and by early exit.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from llmcore.kernels.zeroth_order import direction_gram, query_seeds
from llmcore.methods.gradient_cuff import statistic
from llmcore.methods.gradient_cuff.config import CuffConfig
from llmcore.methods.gradient_cuff.prompt import Messages, assemble
from llmcore.methods.gradient_cuff.query import Query
from llmcore.methods.gradient_cuff.refusals import stop_rule

from llmcore.decoding import Batch, Row, decoder_for
from llmcore.generation import memory_limit


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
        """Detect all, in the order of the input."""
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
