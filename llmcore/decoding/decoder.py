"""One causal language model as a decoder of packed tokens: its own forward with the attention function replaced, or recomputation."""

# M packed tokens, L tokens of a row, a of a prefix

from __future__ import annotations

import contextlib
import inspect
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from llmcore.decoding.attention import DecodePart, DecodePlan, PrefillPlan, Segment
from llmcore.decoding.rows import Counters, Node, Pool, Prefix, Row
from llmcore.sampling import Sampling

_NAME = "llmcore_shared"
_active = threading.local()

# Families whose packed path and inputs_embeds path tests/llmcore/test_generation.py compares with their own forward; others are probed
# at first use.
VERIFIED = frozenset({"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Gemma2ForCausalLM"})


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
        raise NotImplementedError("the shared path has no attention sinks (s_aux)")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return plan(module.layer_idx, query, key, value, scale, softcap, sliding_window), None


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
        self._std: tuple[tuple[int, int], float] | None = None
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
        self.prefill_tokens = 1280 if self.device.type == "cpu" else 16384
        self.path, self.why = "shared", ""
        with self.lock:
            if path == "auto" and type(base).__name__ in VERIFIED and type(base).__module__.startswith("transformers."):
                return
            self._compare_inputs()
            if path == "recompute":
                self.path, self.why = "recompute", "asked for"
            elif reason := self._compare_paths():
                self.path, self.why = "recompute", reason

    @property
    def embedding_std(self) -> float:
        """Standard deviation of the embedding table's entries; computed again only when the table was written to."""
        weight = self.embedding.weight
        state = weight.data_ptr(), weight._version
        if self._std is None or self._std[0] != state:
            self._std = state, float(weight.detach().float().std())
        return self._std[1]

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
            prefix.pool = Pool(1, len(embeddings), 0)
            plan = PrefillPlan([Segment(prefix.pool, None, 0, 1, len(embeddings), 0)])
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
        except Exception as error:  # the forward is the model's own code and may refuse in any way
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
            pool = Pool(2, 6, 2)
            pool.lengths[:] = 6
            embeddings = self.embed(ids[3:9]).repeat(2, 1)
            positions = torch.arange(3, 9, device=self.device).repeat(2)
            self.forward(embeddings, positions, PrefillPlan([Segment(pool, prefix, 0, 2, 6, 0)]), torch.tensor([11], device=self.device))
            rows = [Row(embeddings[:6], 6, sampling=Sampling(), prefix=prefix) for _ in range(2)]
            nodes = [Node([0], ids[9], 1, None, np.zeros(0, dtype=bool)) for _ in rows]
            for slot, row in enumerate(rows):
                row.slot = slot
            for token in ids[9:]:
                for node in nodes:
                    node.token = token
                part = DecodePart(pool, prefix, list(zip(rows, nodes, strict=True)), 0, self.device)
                logits = self.forward(
                    self.embed([token, token]),
                    torch.from_numpy(part.position).to(self.device),
                    DecodePlan([part]),
                    torch.arange(2, device=self.device),
                )
                for node in nodes:
                    node.depth += 1
            gap = float((logits.float() - self._probe.float()).abs().max())
        except Exception as error:  # whatever breaks in the model's own code, its own forward serves it; the reason is reported
            return f"{type(self.model).__name__} cannot run on the shared path ({type(error).__name__}: {error})"
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
