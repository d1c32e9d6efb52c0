"""What is decoded: rows with N samples, their tries, the caches they share, and what they cost."""

# S slots (rows) of a pool, G kv heads, D head_dim, R rows of equal length L

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from llmcore.sampling import MAX_SAMPLES, Sampling


class StopRule(Protocol):
    """Decides from the tokens of one sample whether it is over; states are values, because samples with equal tokens share one."""

    def begin(self) -> Any: ...

    def advance(self, state: Any, token_id: int) -> tuple[Any, str | None]:
        """State after one more token, and None to go on or the reason to stop ("match", or "stop" for any other)."""
        ...

    def end(self, state: Any) -> str | None:
        """Last word on a sample that ends at end-of-sequence or at its length: "match" or None."""
        ...


@dataclass
class Counters:
    """Tokens through the model, by purpose. `reused` are prompt tokens that samples needed and that were not computed again."""

    prefilled_tokens: int = 0
    reused_tokens: int = 0
    generated_tokens: int = 0
    decode_rows: int = 0
    steps: int = 0

    def add(self, other: Counters) -> None:
        for name in vars(other):
            setattr(self, name, getattr(self, name) + getattr(other, name))


class Pool:
    """Keys and values of rows prefilled together. After `store` and `extend`, position [slot, :, p] holds prompt token p (p < prompt)
    or a trie node.
    """

    def __init__(self, slots: int, prompt: int, tail: int):
        self.slots, self.prompt, self.tail = slots, prompt, tail
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.lengths = np.zeros(slots, dtype=np.int64)  # valid prompt tokens of each slot
        self.next = np.zeros(slots, dtype=np.int64)  # next free tail position of each slot
        self.positions = np.zeros((slots, tail), dtype=np.int64)  # sequence position of each tail entry
        self.rows: list[Row] = []

    def store(self, layer: int, slots: slice, key: torch.Tensor, value: torch.Tensor) -> None:
        """Write prompt keys and values (R, G, L, D) of a run of slots."""
        if layer not in self.layers:
            # Zeros, not empty: masked positions enter the product with weight 0, and 0 · NaN is NaN.
            self.layers[layer] = tuple(x.new_zeros(self.slots, x.shape[1], self.prompt + self.tail, x.shape[3]) for x in (key, value))  # type: ignore[assignment]
        for target, source in zip(self.layers[layer], (key, value), strict=True):
            target[slots, :, : source.shape[2]] = source

    def reserve(self, tail: int) -> None:
        """Make room for `tail` positions behind the prompt (at least doubling, so that growth costs amortised O(1) a token)."""
        if tail <= self.tail:
            return
        grown = max(tail, 2 * self.tail)
        for layer, pair in self.layers.items():
            self.layers[layer] = tuple(torch.nn.functional.pad(x, (0, 0, 0, grown - self.tail)) for x in pair)  # type: ignore[assignment]
        self.positions = np.pad(self.positions, ((0, 0), (0, grown - self.tail)))
        self.tail = grown

    def keep(self, slots: list[int]) -> None:
        """Drop all slots but these."""
        index = torch.tensor(slots, dtype=torch.long)
        for layer, pair in self.layers.items():
            self.layers[layer] = tuple(x.index_select(0, index.to(x.device)) for x in pair)  # type: ignore[assignment]
        self.lengths, self.next, self.positions = self.lengths[slots], self.next[slots], self.positions[slots]
        self.slots = len(slots)


@dataclass
class Prefix:
    """Keys and values of tokens that open several rows, shared by all of them. `length` tokens; `embeddings` (length, d)."""

    length: int
    embeddings: torch.Tensor
    pool: Pool | None = None


@dataclass
class Node:
    """A trie node: the samples of one row that have drawn the same tokens so far."""

    samples: list[int]
    token: int
    depth: int  # tokens drawn, this one included
    state: Any
    visible: np.ndarray  # tail positions it attends to, bool


class Row:
    """One prompt with N samples.

    Args:
        embeddings: (L, d) of the tokens behind the prefix, L >= 1, or a function that makes them when the row is prefilled.
        length: L.
        stream: (query id, row index), which select the uniforms.
        share: merge samples with equal tokens (the samples themselves are the same either way).
        keep: keep prompt cache and first logits for `Batch.restart`.
    """

    def __init__(
        self,
        embeddings: torch.Tensor | Callable[[], torch.Tensor],
        length: int,
        *,
        sampling: Sampling,
        num_samples: int = 1,
        prefix: Prefix | None = None,
        stream: tuple[int, int] = (0, 0),
        stop_rule: StopRule | None = None,
        share: bool = True,
        keep: bool = False,
        common_uniforms: bool = False,
    ):
        if num_samples < 1 or num_samples >= MAX_SAMPLES:
            raise ValueError(f"num_samples must lie in 1 … {MAX_SAMPLES - 1}, got {num_samples}")
        if length < 1:
            raise ValueError("embeddings must hold at least one token behind the prefix, got 0")
        self.embeddings, self.length, self.prefix = embeddings, length, prefix
        self.stream, self.share, self.kept, self.common_uniforms = stream, share, keep, common_uniforms
        self.pool: Pool | None = None
        self.slot = -1
        self.first_logits: torch.Tensor | None = None
        self.counters = Counters()
        self._reset(sampling, num_samples, stop_rule)

    def _reset(self, sampling: Sampling, num_samples: int, stop_rule: StopRule | None) -> None:
        self.sampling, self.num_samples, self.stop_rule = sampling, num_samples, stop_rule
        self.tokens: list[list[int]] = [[] for _ in range(num_samples)]
        self.finish: list[str | None] = [None] * num_samples
        self.nodes: list[Node] = []
        self.started = False

    @property
    def prompt_length(self) -> int:
        return self.length + (self.prefix.length if self.prefix else 0)

    @property
    def done(self) -> bool:
        return self.started and not self.nodes

    def count(self, reason: str) -> int:
        """Samples that ended for this reason: "eos", "match", "stop", "length" or "cancelled"."""
        return self.finish.count(reason)

    def cancel(self) -> None:
        """End the row's open samples."""
        self.started, self.nodes = True, []
        self.finish = [reason or "cancelled" for reason in self.finish]
