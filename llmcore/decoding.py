"""Batched decoding in which nothing about a prompt is computed or stored twice.

A `Row` is one prompt (token embeddings behind an optional shared `Prefix`) with N samples. Three levels of sharing:

    prefix   its keys and values exist once, batch 1, and every row of every query attends to them in place
    row      prefilled once; its N samples attend to one copy (the prompt cache is never repeated N times)
    trie     samples of one row with equal tokens so far are one node: one forward row; they split when their draws differ

Layout of a pool (rows prefilled together), per layer: keys and values (S slots, kv heads, prompt + tail, head_dim). The tail takes one
position per trie node; a node sees the prompt, its ancestors and itself (a mask shared by all layers). Attention over the prefix and
over the
slot are two partial softmaxes, merged by their log-sum-exps:   o = Σ_i o_i·exp(lse_i − lse),  lse = log Σ_i exp(lse_i).

The model's own code runs: tokens of all rows are packed into one (1, M) batch with explicit positions, and only the attention function is
replaced, through transformers' AttentionInterface. A family that does not go through it, or for which a short comparison with the
model's own forward fails, is decoded by recomputing the whole sequence each step: slow, right, and reported (`Decoder.path`,
`Decoder.why`).
"""

# S slots (rows) of a pool, M forward rows of a step, H heads, G kv heads, D head_dim, R rows of equal length L

from __future__ import annotations

import contextlib
import inspect
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from llmcore.sampling import MAX_SAMPLES, Sampling, draw, kept_candidates, uniforms

_NAME = "llmcore_shared"
_active = threading.local()

# Families whose packed path and inputs_embeds path tests/llmcore/test_generation.py compares with their own forward; others are probed
# at first use.
VERIFIED = frozenset({"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Gemma2ForCausalLM"})


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


class _Pool:
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
    pool: _Pool | None = None


@dataclass
class _Node:
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
        self.pool: _Pool | None = None
        self.slot = -1
        self.first_logits: torch.Tensor | None = None
        self.counters = Counters()
        self._reset(sampling, num_samples, stop_rule)

    def _reset(self, sampling: Sampling, num_samples: int, stop_rule: StopRule | None) -> None:
        self.sampling, self.num_samples, self.stop_rule = sampling, num_samples, stop_rule
        self.tokens: list[list[int]] = [[] for _ in range(num_samples)]
        self.finish: list[str | None] = [None] * num_samples
        self.nodes: list[_Node] = []
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


# ---- attention -------------------------------------------------------------------------------------------------------------------


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    *,
    mask: torch.Tensor | None = None,
    causal: bool = False,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention with its log-sum-exp: query (B, H, Q, D), key and value (B, G, K, D) → (B, H, Q, D), (B, H, Q) float32.

    `mask` is boolean, broadcastable to (B, 1, Q, K); a fully masked query gives zeros and −inf.
    """
    if query.device.type == "cpu" and softcap is None and query.shape[-1] == value.shape[-1]:
        bias = None if mask is None else torch.where(mask, 0.0, float("-inf")).to(query.dtype)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal, attn_mask=bias, scale=scale)
        # The operator's lse of a query that sees nothing is not −inf.
        return out, lse.float() if mask is None else torch.where(mask.any(-1), lse.float(), float("-inf"))
    groups, width = key.shape[1], query.shape[2]
    folded = query.reshape(query.shape[0], groups, -1, query.shape[-1])  # heads of a group become query rows: the cache is read once
    scores = (folded @ key.transpose(-1, -2)).float() * scale
    scores = scores.view(query.shape[0], query.shape[1], width, -1)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if causal:
        lower = torch.ones(width, key.shape[2], dtype=torch.bool, device=query.device).tril()
        mask = lower if mask is None else mask & lower
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    lse = scores.logsumexp(-1)
    weights = (scores - lse.clamp_min(torch.finfo(torch.float32).min)[..., None]).exp().to(value.dtype)
    out = weights.view(query.shape[0], groups, -1, weights.shape[-1]) @ value
    return out.view(*query.shape[:3], value.shape[-1]), lse


def _merge(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """One softmax out of attention over disjoint key sets."""
    if len(parts) == 1:
        return parts[0][0]
    total = torch.logsumexp(torch.stack([lse for _, lse in parts]), 0)
    # Masked-out parts have lse = −inf and may carry NaN rows: their weight is an exact zero.
    return sum(torch.where(w > 0, out * w, 0.0) for out, lse in parts for w in [(lse - total).exp()[..., None].to(out.dtype)])  # type: ignore[return-value]


@dataclass
class _Segment:
    """R rows of equal length L, consecutive in the packed batch from token `start` and in `pool` from `slot`."""

    pool: _Pool
    prefix: Prefix | None
    slot: int
    rows: int
    length: int
    start: int


class _PrefillPlan:
    def __init__(self, segments: list[_Segment]):
        self.segments = segments

    def __call__(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        softcap: float | None,
        window: int | None,
    ) -> torch.Tensor:
        result = []
        for seg in self.segments:
            here = slice(seg.start, seg.start + seg.rows * seg.length)

            def rows(x: torch.Tensor, here: slice = here, seg: _Segment = seg) -> torch.Tensor:
                return x[0, :, here].unflatten(1, (seg.rows, seg.length)).transpose(0, 1)

            own_key, own_value = rows(key), rows(value)
            seg.pool.store(layer, slice(seg.slot, seg.slot + seg.rows), own_key, own_value)
            shift = seg.prefix.length if seg.prefix else 0
            windowed = window is not None and shift + seg.length > window
            at = torch.arange(seg.length, device=query.device)
            near = (at[:, None] - at) < window if windowed else None
            parts = [
                _attend(
                    rows(query),
                    own_key,
                    own_value,
                    scale,
                    causal=near is None,
                    softcap=softcap,
                    mask=None if near is None else near & (at[:, None] >= at),
                )
            ]
            if seg.prefix:
                prefix_key, prefix_value = seg.prefix.pool.layers[layer]  # type: ignore[union-attr]
                near = None
                if windowed:
                    near = ((at + shift)[:, None] - torch.arange(shift, device=query.device) < window).repeat(seg.rows, 1)
                out, lse = _attend(query[:, :, here], prefix_key, prefix_value, scale, softcap=softcap, mask=near)
                parts.append(tuple(x[0].unflatten(1, (seg.rows, seg.length)).transpose(0, 1) for x in (out, lse)))  # type: ignore[arg-type]
            result.append(_merge(parts).transpose(1, 2).reshape(seg.rows * seg.length, query.shape[1], -1))
        return (torch.cat(result) if len(result) > 1 else result[0])[None]


class _DecodePart:
    """The nodes [start, stop) of one step that belong to one pool and one prefix, sorted by slot."""

    def __init__(self, pool: _Pool, prefix: Prefix | None, nodes: list[tuple[Row, _Node]], start: int, device: torch.device):
        self.pool, self.prefix, self.start, self.stop = pool, prefix, start, start + len(nodes)
        slots = np.array([row.slot for row, _ in nodes])
        _, first, per_slot = np.unique(slots, return_index=True, return_counts=True)
        column = np.arange(len(nodes)) - np.repeat(first, per_slot)
        self.width = int(per_slot.max())
        self.dense = len(nodes) == pool.slots * self.width
        entry = pool.next[slots] + column
        pool.reserve(int(entry.max()) + 1)
        self.position = np.array([row.prompt_length + node.depth - 1 for row, node in nodes])
        pool.positions[slots, entry] = self.position
        np.add.at(pool.next, slots, 1)
        used = int(pool.next.max())
        visible = np.zeros((pool.slots, self.width, pool.prompt + used), dtype=bool)
        visible[:, :, : pool.prompt] = (np.arange(pool.prompt) < pool.lengths[:, None])[:, None]
        for (_, node), slot, col, tail in zip(nodes, slots, column, entry, strict=True):
            grown = np.zeros(tail + 1, dtype=bool)
            grown[: len(node.visible)] = node.visible
            grown[tail] = True
            node.visible = grown
            visible[slot, col, pool.prompt : pool.prompt + tail + 1] = grown
        # Nobody reads the outputs of unused columns; they look at everything so that no softmax is empty.
        idle = np.ones((pool.slots, self.width), dtype=bool)
        idle[slots, column] = False
        visible[idle] = True
        self.used = pool.prompt + used
        self.at = torch.from_numpy(slots).to(device), torch.from_numpy(pool.prompt + entry).to(device)
        self.flat = torch.from_numpy(slots * self.width + column).to(device)
        self.visible = None if visible.all() else torch.from_numpy(visible).to(device)[:, None]
        self._slots, self._column, self._device = slots, column, device
        self._windowed: dict[int, tuple[torch.Tensor | None, torch.Tensor | None]] = {}

    def masks(self, window: int | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Visibility of (slot positions, prefix positions) under a sliding window."""
        shift = self.prefix.length if self.prefix else 0
        if window is None or int(self.position.max()) < window:
            return self.visible, None
        if window not in self._windowed:
            pool = self.pool
            query = np.zeros((pool.slots, self.width), dtype=np.int64)
            query[self._slots, self._column] = self.position
            key = np.concatenate(
                [np.broadcast_to(shift + np.arange(pool.prompt), (pool.slots, pool.prompt)), pool.positions[:, : self.used - pool.prompt]],
                axis=1,
            )
            near = torch.from_numpy(query[:, :, None] - key[:, None] < window).to(self._device)[:, None]
            if self.visible is not None:
                near = near & self.visible
            before = torch.from_numpy(self.position[:, None] - np.arange(shift) < window).to(self._device)
            self._windowed[window] = near, before
        return self._windowed[window]

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        softcap: float | None,
        window: int | None,
    ) -> torch.Tensor:
        """query (H, m, D), key and value (G, m, D) of this part's nodes → (m, H, D)."""
        keys, values = self.pool.layers[layer]
        slot, position = self.at
        keys[slot, :, position] = key.transpose(0, 1)
        values[slot, :, position] = value.transpose(0, 1)
        own, before = self.masks(window)
        heads, _count, dim = query.shape
        rows = query.transpose(0, 1)
        if self.dense:
            padded = rows
        else:
            padded = rows.new_zeros(self.pool.slots * self.width, heads, dim)
            padded[self.flat] = rows
        out, lse = _attend(
            padded.unflatten(0, (self.pool.slots, self.width)).transpose(1, 2),
            keys[:, :, : self.used],
            values[:, :, : self.used],
            scale,
            mask=own,
            softcap=softcap,
        )
        out, lse = out.transpose(1, 2).flatten(0, 1), lse.transpose(1, 2).flatten(0, 1)
        if not self.dense:
            out, lse = out[self.flat], lse[self.flat]
        if self.prefix is None:
            return out
        prefix_key, prefix_value = self.prefix.pool.layers[layer]  # type: ignore[union-attr]
        other, other_lse = _attend(query[None], prefix_key, prefix_value, scale, softcap=softcap, mask=before)
        return _merge([(out, lse), (other[0].transpose(0, 1), other_lse[0].transpose(0, 1))])


class _DecodePlan:
    def __init__(self, parts: list[_DecodePart]):
        self.parts = parts

    def __call__(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        softcap: float | None,
        window: int | None,
    ) -> torch.Tensor:
        result = [
            part.attend(layer, *(x[0, :, part.start : part.stop] for x in (query, key, value)), scale, softcap, window)
            for part in self.parts
        ]
        return (torch.cat(result) if len(result) > 1 else result[0])[None]


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: Any = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function registered with transformers; the running plan knows where each packed token belongs."""
    plan = getattr(_active, "plan", None)
    if plan is None:
        raise RuntimeError("this model is being decoded by llmcore in another thread; give each thread its own copy or its turn")
    if s_aux is not None:  # met while the model is probed (`_compare_paths`): such a model takes the recompute path
        raise NotImplementedError("attention sinks")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return plan(module.layer_idx, query, key, value, scale, softcap, sliding_window), None


# ---- the model -------------------------------------------------------------------------------------------------------------------


class Decoder:
    """Runs one causal language model for any number of batches (one thread at a time).

    `path` is "shared" (described above) or "recompute" (the generic one), `why` the reason for the second.
    """

    def __init__(self, model: torch.nn.Module, *, path: str = "auto"):
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        if "inputs_embeds" not in inspect.signature(base.forward).parameters:
            raise TypeError(
                f"model must accept inputs_embeds, and {type(base).__name__}.forward does not: decoding from embeddings is impossible"
            )
        self.model = base
        self.embedding = base.get_input_embeddings()
        self.device = self.embedding.weight.device
        self.vocab_size = self.embedding.weight.shape[0]
        self.eos_ids = stop_ids(base)
        self.lock = threading.RLock()
        self._prefixes: OrderedDict[tuple[int, ...], Prefix] = OrderedDict()
        self._configs = list(
            {id(m.config): m.config for m in base.modules() if hasattr(m, "config") and hasattr(m.config, "_attn_implementation")}.values()
        )
        config = base.config.get_text_config() if hasattr(base.config, "get_text_config") else base.config
        self.context_length: int | None = getattr(config, "max_position_embeddings", None)
        heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", 1)
        head_dim = getattr(config, "head_dim", None) or getattr(config, "hidden_size", 0) // max(
            1, getattr(config, "num_attention_heads", 1)
        )
        self.kv_bytes_per_token = 2 * heads * head_dim * getattr(config, "num_hidden_layers", 1) * self.embedding.weight.element_size()
        self.prefill_tokens = 512 if self.device.type == "cpu" else 16384
        self.path, self.why = "shared", ""
        with self.lock:
            if path == "auto" and type(base).__name__ in VERIFIED and type(base).__module__.startswith("transformers."):
                return
            self._compare_inputs()
            if path == "recompute":
                self.path, self.why = "recompute", "asked for"
            elif reason := self._compare_paths():
                self.path, self.why = "recompute", reason

    def embed(self, ids: Sequence[int] | torch.Tensor) -> torch.Tensor:
        """(L, d) input embeddings of token ids."""
        with torch.no_grad():
            return self.embedding(torch.as_tensor(ids, dtype=torch.long, device=self.device))

    def prefix(self, ids: Sequence[int], counters: Counters | None = None) -> Prefix | None:
        """The shared cache of these opening tokens: computed once, the latest few are kept. None for no tokens."""
        if len(ids) == 0:
            return None
        key = tuple(int(i) for i in ids)
        with self.lock:
            if key not in self._prefixes:
                self._prefixes[key] = self.make_prefix(self.embed(key))
                if counters is not None:
                    counters.prefilled_tokens += len(key)
                while len(self._prefixes) > 4:
                    self._prefixes.popitem(last=False)
            self._prefixes.move_to_end(key)
            return self._prefixes[key]

    @torch.inference_mode()
    def make_prefix(self, embeddings: torch.Tensor) -> Prefix:
        """Shared cache of opening embeddings (a, d)."""
        prefix = Prefix(len(embeddings), embeddings)
        if self.path == "shared":
            prefix.pool = _Pool(1, len(embeddings), 0)
            plan = _PrefillPlan([_Segment(prefix.pool, None, 0, 1, len(embeddings), 0)])
            self.forward(
                embeddings, torch.arange(len(embeddings), device=self.device), plan, torch.tensor([len(embeddings) - 1], device=self.device)
            )
        return prefix

    def clear(self) -> None:
        """Forget the shared prefixes (after the model's weights have changed)."""
        self._prefixes.clear()

    @contextlib.contextmanager
    def _attached(self, plan: Callable) -> Iterator[None]:
        from transformers import AttentionInterface

        AttentionInterface.register(_NAME, _attention)
        with self.lock:
            before = [config._attn_implementation_internal for config in self._configs]
            training = self.model.training
            for config in self._configs:
                config._attn_implementation_internal = _NAME
            _active.plan = plan
            if training:
                self.model.eval()
            try:
                yield
            finally:
                _active.plan = None
                for config, name in zip(self._configs, before, strict=True):
                    config._attn_implementation_internal = name
                if training:
                    self.model.train()

    def forward(self, embeddings: torch.Tensor, positions: torch.Tensor, plan: Callable, keep: torch.Tensor) -> torch.Tensor:
        """Logits (len(keep), vocab) of the packed tokens `keep`; embeddings (M, d), positions (M,)."""
        with self._attached(plan):
            return self.model(inputs_embeds=embeddings[None], position_ids=positions[None], use_cache=False, logits_to_keep=keep).logits[0]

    @torch.inference_mode()
    def recompute(self, sequences: list[torch.Tensor]) -> torch.Tensor:
        """Logits (len(sequences), vocab) after each embedded sequence (L_i, d), by a plain forward: right-padded, which causality makes
        harmless.
        """
        result = []
        limit = max(1, 4 * self.prefill_tokens // max(len(s) for s in sequences))
        with self.lock:
            for begin in range(0, len(sequences), limit):
                part = sequences[begin : begin + limit]
                lengths = torch.tensor([len(s) for s in part], device=self.device)
                padded = torch.nn.utils.rnn.pad_sequence(part, batch_first=True)
                mask = (torch.arange(padded.shape[1], device=self.device) < lengths[:, None]).long()
                logits = self.model(inputs_embeds=padded, attention_mask=mask, use_cache=False).logits
                result.append(logits[torch.arange(len(part), device=self.device), lengths - 1])
        return torch.cat(result)

    # Probes: eleven tokens through the model, once, for families not in VERIFIED.

    def _tolerance(self, logits: torch.Tensor) -> float:
        return {torch.float64: 1e-9, torch.float32: 1e-3}.get(logits.dtype, 5e-2) * max(1.0, float(logits.float().abs().max()))

    @torch.inference_mode()
    def _compare_inputs(self) -> None:
        ids = (torch.arange(11, device=self.device) * 7 + 5) % self.vocab_size
        self._probe_ids = ids
        self._probe = self.model(input_ids=ids[None], use_cache=False).logits[0, -1]
        try:
            other = self.model(inputs_embeds=self.embedding(ids)[None], use_cache=False).logits[0, -1]
        except Exception as error:
            raise TypeError(f"model must accept inputs_embeds, and {type(self.model).__name__} failed on them: {error}") from error
        gap = float((other.float() - self._probe.float()).abs().max())
        if not gap <= self._tolerance(self._probe):
            raise ValueError(
                f"model must give the same logits for input_ids and for their embeddings, got a difference of {gap:.3g}: "
                f"{type(self.model).__name__} scales or extends embeddings inside its forward, so a shift of them would not mean "
                f"what it says"
            )

    @torch.inference_mode()
    def _compare_paths(self) -> str:
        """Why the shared path cannot serve this model, or "" when prefix, row and node agree with the model's own forward."""
        ids = [int(i) for i in self._probe_ids]
        try:
            prefix = self.make_prefix(self.embed(ids[:3]))
            pool = _Pool(2, 6, 2)
            pool.lengths[:] = 6
            embeddings = self.embed(ids[3:9]).repeat(2, 1)
            positions = torch.arange(3, 9, device=self.device).repeat(2)
            self.forward(embeddings, positions, _PrefillPlan([_Segment(pool, prefix, 0, 2, 6, 0)]), torch.tensor([11], device=self.device))
            rows = [Row(embeddings[:6], 6, sampling=Sampling(), prefix=prefix) for _ in range(2)]
            nodes = [_Node([0], ids[9], 1, None, np.zeros(0, dtype=bool)) for _ in rows]
            for slot, row in enumerate(rows):
                row.slot = slot
            for token in ids[9:]:
                for node in nodes:
                    node.token = token
                part = _DecodePart(pool, prefix, list(zip(rows, nodes, strict=True)), 0, self.device)
                logits = self.forward(
                    self.embed([token, token]),
                    torch.from_numpy(part.position).to(self.device),
                    _DecodePlan([part]),
                    torch.arange(2, device=self.device),
                )
                for node in nodes:
                    node.depth += 1
            gap = float((logits.float() - self._probe.float()).abs().max())
        except Exception as error:
            return f"{type(self.model).__name__} does not go through transformers' attention interface ({type(error).__name__}: {error})"
        if not gap <= self._tolerance(self._probe):
            return f"{type(self.model).__name__} disagrees with its own forward by {gap:.3g} on the shared path"
        return ""


def stop_ids(model: torch.nn.Module) -> tuple[int, ...]:
    """Ids that end a generation, from the model's generation configuration (the tokenizer may name another id)."""
    for config in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        ids = getattr(config, "eos_token_id", None)
        if ids is not None:
            return (int(ids),) if isinstance(ids, int) else tuple(int(i) for i in ids)
    return ()


_decoders: weakref.WeakKeyDictionary[torch.nn.Module, Decoder] = weakref.WeakKeyDictionary()


def decoder_for(model: Any) -> Decoder:
    """The decoder of a language model (a LanguageModel or a transformers model), made once for each model."""
    if isinstance(model, Decoder):
        return model
    inner = model.model if hasattr(model, "tokenizer") else model
    if not isinstance(inner, torch.nn.Module):
        raise TypeError(f"model must be a LanguageModel or a transformers model, got {type(model).__name__}")
    if inner not in _decoders:
        _decoders[inner] = Decoder(inner)
    return _decoders[inner]


# ---- live rows -------------------------------------------------------------------------------------------------------------------


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
            pool = _Pool(len(rows), rows[-1].length, min(256, max(row.num_samples * (row.sampling.max_new_tokens - 1) for row in rows)))
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
            (row, _Node(list(range(row.num_samples)), -1, 0, row.stop_rule.begin() if row.stop_rule else None, np.zeros(0, dtype=bool)))
            for row in rows
        ]
        self._advance(roots, logits)

    def _prefill(self, pool: _Pool, rows: list[Row], begin: int, stop: int) -> torch.Tensor:
        segments: list[_Segment] = []
        start = 0
        for slot in range(begin, stop):
            row = rows[slot]
            row.pool, row.slot = pool, slot
            pool.lengths[slot] = row.length
            if segments and segments[-1].length == row.length:
                segments[-1].rows += 1
            else:
                segments.append(_Segment(pool, row.prefix, slot, 1, row.length, start))
            start += row.length
        here = rows[begin:stop]
        device = self.decoder.device
        positions = torch.cat([torch.arange(row.prompt_length - row.length, row.prompt_length, device=device) for row in here])
        last = torch.tensor(np.cumsum([row.length for row in here]) - 1, device=device)
        embeddings = torch.cat([row.embeddings for row in here]) if len(here) > 1 else here[0].embeddings
        return self.decoder.forward(embeddings, positions, _PrefillPlan(segments), last)  # type: ignore[arg-type]

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
        root = _Node(list(range(num_samples)), -1, 0, stop_rule.begin() if stop_rule else None, np.zeros(0, dtype=bool))
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
            parts: list[_DecodePart] = []
            begin = 0
            for stop in range(1, len(nodes) + 1):
                if stop == len(nodes) or nodes[stop][0].pool is not nodes[begin][0].pool:
                    row = nodes[begin][0]
                    parts.append(_DecodePart(row.pool, row.prefix, nodes[begin:stop], begin, decoder.device))  # type: ignore[arg-type]
                    begin = stop
            positions = torch.from_numpy(np.concatenate([part.position for part in parts])).to(decoder.device)
            embeddings = decoder.embed([node.token for _, node in nodes])
            logits = decoder.forward(embeddings, positions, _DecodePlan(parts), torch.arange(len(nodes), device=decoder.device))
        for row, _ in nodes:
            row.counters.decode_rows += 1
        self.counters.decode_rows += len(nodes)
        self.counters.steps += 1
        self._advance(nodes, logits)

    def _advance(self, nodes: list[tuple[Row, _Node]], logits: torch.Tensor) -> None:
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
                raise RuntimeError(
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
        children: dict[int, list[_Node]] = {}
        for (row, node), drawn in zip(nodes, tokens, strict=True):
            split: dict[int, _Node] = {}
            for sample, token in zip(node.samples, drawn.tolist(), strict=True):
                self.counters.generated_tokens += 1
                row.counters.generated_tokens += 1
                if token in split and row.share:
                    split[token].samples.append(sample)
                else:
                    split[token if row.share else -1 - sample] = _Node([sample], token, node.depth + 1, node.state, node.visible)
            for child in split.values():
                if self._open(row, child):
                    children.setdefault(id(row), []).append(child)
        for row in {id(row): row for row, _ in nodes}.values():
            row.started = True
            row.nodes = children.get(id(row), [])

    def _open(self, row: Row, node: _Node) -> bool:
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
