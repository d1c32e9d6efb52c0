"""Live rows: which are prefilled together, one more token for every trie node, when pools shrink."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from llmcore.decoding.attention import DecodePart, DecodePlan, PrefillPlan, Segment
from llmcore.decoding.decoder import Decoder
from llmcore.decoding.rows import Counters, Node, Pool, Row, StopRule
from llmcore.errors import CannotRun
from llmcore.sampling import Sampling, draw, kept_candidates, uniforms


@dataclass
class Batch:
    """Rows being decoded together. `admit` prefills and draws first tokens, `step` draws one more token for every open sample."""

    decoder: Decoder
    rows: list[Row] = field(default_factory=list)
    counters: Counters = field(default_factory=Counters)

    @property
    def active(self) -> list[Row]:
        return [row for row in self.rows if row.nodes]

    def kv_bytes(self) -> int:
        """Bytes of keys and values that live rows hold."""
        pools = {id(row.pool): row.pool for row in self.rows if row.pool is not None}
        return sum(pool.slots * (pool.prompt + pool.tail) for pool in pools.values()) * self.decoder.kv_bytes_per_token

    def row_bytes(self, length: int, num_samples: int, max_new_tokens: int) -> int:
        """Bytes that one more row would take: its prompt, its tail, and its share of the logits."""
        logits = 2 * 4 * num_samples * self.decoder.vocab_size
        return self.decoder.kv_bytes_per_token * (length + num_samples * max_new_tokens) + logits

    def admit(self, rows: Sequence[Row]) -> None:
        """Prefill rows, packed without padding, and draw their first tokens."""
        limit = self.decoder.context_length
        for row in rows:
            total = row.prompt_length + row.sampling.max_new_tokens
            if limit is not None and total > limit:
                raise ValueError(
                    f"prompt must fit the model's context: {row.prompt_length} prompt tokens + {row.sampling.max_new_tokens} new tokens = "
                    f"{total} > {limit}; shorten the prompt or max_new_tokens (a prompt is never truncated)"
                )
        by_prefix: dict[int, list[Row]] = {}
        for row in rows:
            by_prefix.setdefault(id(row.prefix), []).append(row)
        for group in by_prefix.values():
            group = sorted(group, key=lambda row: row.length)
            while group:
                # Rows of one pool are padded to the longest in attention (never in the model): keep lengths within a quarter.
                size = next((i for i, row in enumerate(group) if row.length > 1.25 * group[0].length + 32), len(group))
                self._admit_pool(group[:size])
                group = group[size:]

    @torch.inference_mode()
    def _admit_pool(self, rows: list[Row]) -> None:
        decoder = self.decoder
        self.rows.extend(rows)
        for row in rows:
            row.counters.prefilled_tokens += row.length
            row.counters.reused_tokens += row.num_samples * row.prompt_length - row.length
            if callable(row.embeddings):
                row.embeddings = row.embeddings()
        if decoder.path == "recompute":
            logits = decoder.recompute([self._full(row, []) for row in rows])
        else:
            pool = Pool(len(rows), rows[-1].length, min(256, max(row.num_samples * (row.sampling.max_new_tokens - 1) for row in rows)))
            pool.rows = list(rows)
            pieces, begin = [], 0
            while begin < len(rows):
                stop, tokens = begin, 0
                while stop < len(rows) and (stop == begin or tokens + rows[stop].length <= decoder.prefill_tokens):
                    tokens += rows[stop].length
                    stop += 1
                pieces.append(self._prefill(pool, rows, begin, stop))
                begin = stop
            logits = torch.cat(pieces)
        for row, first in zip(rows, logits, strict=True):
            row.first_logits = first.clone() if row.kept else None
            if not row.kept and decoder.path == "shared":
                row.embeddings = torch.empty(0)  # the cache holds all that is needed from here on
        roots = [
            (row, Node(list(range(row.num_samples)), -1, 0, row.stop_rule.begin() if row.stop_rule else None, np.zeros(0, dtype=bool)))
            for row in rows
        ]
        self._advance(roots, logits)

    def _prefill(self, pool: Pool, rows: list[Row], begin: int, stop: int) -> torch.Tensor:
        segments: list[Segment] = []
        start = 0
        for slot in range(begin, stop):
            row = rows[slot]
            row.pool, row.slot = pool, slot
            pool.lengths[slot] = row.length
            if segments and segments[-1].length == row.length:
                segments[-1].rows += 1
            else:
                segments.append(Segment(pool, row.prefix, slot, 1, row.length, start))
            start += row.length
        here = rows[begin:stop]
        device = self.decoder.device
        positions = torch.cat([torch.arange(row.prompt_length - row.length, row.prompt_length, device=device) for row in here])
        last = torch.tensor(np.cumsum([row.length for row in here]) - 1, device=device)
        embeddings = torch.cat([row.embeddings for row in here]) if len(here) > 1 else here[0].embeddings
        return self.decoder.forward(embeddings, positions, PrefillPlan(segments), last)  # type: ignore[arg-type]

    def _full(self, row: Row, tokens: list[int]) -> torch.Tensor:
        parts = ([row.prefix.embeddings] if row.prefix else []) + [row.embeddings] + ([self.decoder.embed(tokens)] if tokens else [])
        return torch.cat(parts)  # type: ignore[arg-type]

    def restart(
        self,
        row: Row,
        sampling: Sampling,
        *,
        num_samples: int = 1,
        stop_rule: StopRule | None = None,
        stream: tuple[int, int] | None = None,
    ) -> None:
        """Draw other samples from a row admitted with keep=True; its prompt is not computed again."""
        if row.first_logits is None:
            raise ValueError("row must have been admitted with keep=True to be restarted")
        limit = self.decoder.context_length
        if limit is not None and row.prompt_length + sampling.max_new_tokens > limit:
            raise ValueError(
                f"max_new_tokens must fit the context: {row.prompt_length} prompt tokens + {sampling.max_new_tokens} > {limit}"
            )
        row._reset(sampling, num_samples, stop_rule)
        row.stream = stream or row.stream
        row.counters.reused_tokens += num_samples * row.prompt_length
        if row.pool is not None:
            row.pool.next[row.slot] = 0
        root = Node(list(range(num_samples)), -1, 0, stop_rule.begin() if stop_rule else None, np.zeros(0, dtype=bool))
        with torch.inference_mode():
            self._advance([(row, root)], row.first_logits[None])

    def release(self, row: Row) -> None:
        """Let go of a row, and of its pool's memory once no other row needs it."""
        row.cancel()
        row.kept, row.first_logits, row.embeddings = False, None, torch.empty(0)
        self.rows = [other for other in self.rows if other is not row]
        if row.pool is not None:
            row.pool.rows = [other for other in row.pool.rows if other is not row]
            row.pool = None

    @torch.inference_mode()
    def step(self) -> None:
        """One decode step: one forward row for each trie node of each live row."""
        for pool in {id(row.pool): row.pool for row in self.rows if row.pool is not None}.values():
            live = [row for row in pool.rows if row.nodes or row.kept]
            if len(live) <= pool.slots // 2:
                pool.keep([row.slot for row in live])
                for slot, row in enumerate(live):
                    row.slot = slot
                for row in pool.rows:
                    if row not in live:
                        row.pool = None
                pool.rows = live
        self.rows = [row for row in self.rows if row.nodes or row.kept]
        rows = sorted(self.active, key=lambda row: (id(row.pool), row.slot))
        if not rows:
            return
        nodes = [(row, node) for row in rows for node in row.nodes]
        decoder = self.decoder
        if decoder.path == "recompute":
            logits = decoder.recompute([self._full(row, row.tokens[node.samples[0]]) for row, node in nodes])
        else:
            parts: list[DecodePart] = []
            begin = 0
            for stop in range(1, len(nodes) + 1):
                if stop == len(nodes) or nodes[stop][0].pool is not nodes[begin][0].pool:
                    row = nodes[begin][0]
                    parts.append(DecodePart(row.pool, row.prefix, nodes[begin:stop], begin, decoder.device))  # type: ignore[arg-type]
                    begin = stop
            positions = torch.from_numpy(np.concatenate([part.position for part in parts])).to(decoder.device)
            embeddings = decoder.embed([node.token for _, node in nodes])
            logits = decoder.forward(embeddings, positions, DecodePlan(parts), torch.arange(len(nodes), device=decoder.device))
        for row, _ in nodes:
            row.counters.decode_rows += 1
        self.counters.decode_rows += len(nodes)
        self.counters.steps += 1
        self._advance(nodes, logits)

    def _advance(self, nodes: list[tuple[Row, Node]], logits: torch.Tensor) -> None:
        """Draw the next token of every sample and replace each row's nodes by their children."""
        tokens: list[np.ndarray] = [np.empty(0)] * len(nodes)
        groups: dict[tuple, list[int]] = {}
        for index, (row, _) in enumerate(nodes):
            how = row.sampling
            groups.setdefault((how.temperature, how.top_k, how.top_p, how.seed), []).append(index)
        for (temperature, top_k, top_p, seed), members in groups.items():
            part = logits if len(members) == len(nodes) else logits[torch.tensor(members, device=logits.device)]
            ids, probs = kept_candidates(part, temperature, top_k, top_p)
            broken = probs.isnan().any(-1)
            if bool(broken.any()):
                row = nodes[members[int(broken.to(torch.uint8).argmax())]][0]
                raise CannotRun(
                    f"the model gave NaN logits for query {row.stream[0]}, row {row.stream[1]}: no verdict or text can be made of them"
                )
            sizes = [len(nodes[i][1].samples) for i in members]
            which = np.repeat(np.arange(len(members)), sizes)
            query = np.repeat([nodes[i][0].stream[0] & 0xFFFFFFFF for i in members], sizes)
            where = np.repeat([0 if nodes[i][0].common_uniforms else nodes[i][0].stream[1] for i in members], sizes)
            step = np.repeat([nodes[i][1].depth for i in members], sizes)
            sample = np.concatenate([nodes[i][1].samples for i in members])
            drawn = draw(ids, probs, which, uniforms(seed, query, where, sample, step))
            for index, piece in zip(members, np.split(drawn, np.cumsum(sizes)[:-1]), strict=True):
                tokens[index] = piece
        children: dict[int, list[Node]] = {}
        for (row, node), drawn in zip(nodes, tokens, strict=True):
            split: dict[int, Node] = {}
            for sample, token in zip(node.samples, drawn.tolist(), strict=True):
                self.counters.generated_tokens += 1
                row.counters.generated_tokens += 1
                if token in split and row.share:
                    split[token].samples.append(sample)
                else:
                    split[token if row.share else -1 - sample] = Node([sample], token, node.depth + 1, node.state, node.visible)
            for child in split.values():
                if self._open(row, child):
                    children.setdefault(id(row), []).append(child)
        for row in {id(row): row for row, _ in nodes}.values():
            row.started = True
            row.nodes = children.get(id(row), [])

    def _open(self, row: Row, node: Node) -> bool:
        """Record the node's token for its samples; False when it ends them."""
        rule, how = row.stop_rule, row.sampling
        reason: str | None = None
        if (not how.ignore_eos and node.token in self.decoder.eos_ids) or node.token in how.stop_token_ids:
            reason = (rule.end(node.state) if rule else None) or "eos"
        else:
            for sample in node.samples:
                row.tokens[sample].append(node.token)
            if rule:
                node.state, reason = rule.advance(node.state, node.token)
            if reason is None and node.depth >= how.max_new_tokens:
                reason = (rule.end(node.state) if rule else None) or "length"
        if reason is None:
            return True
        for sample in node.samples:
            row.finish[sample] = reason
        return False
