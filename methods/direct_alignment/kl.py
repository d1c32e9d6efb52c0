"""KL(policy || reference) per sequence, on samples of the policy."""
# S sequences, P pairs, N scored rows (tokens), D hidden, V vocab, E examples

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from llmcore.kernels.linear_logprob import fused_linear_logprob
from llmcore.methods.direct_alignment.reference import AdapterOff, RefModel
from llmcore.methods.direct_alignment.scoring import scored_states, segment_sums

from llmcore import adapters, data


@dataclass
class KLResult:
    """KL(policy ‖ reference) in nats per sequence, over prompts; `standard_error` is a bootstrap over prompts; distance = √max(0, kl)."""

    estimator: str
    kl: float
    standard_error: float
    k1: float
    per_prompt: list[float]
    samples: int
    truncated: int
    mean_tokens: float

    @property
    def distance(self) -> float:
        return math.sqrt(max(0.0, self.kl))

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "distance": self.distance}


ESTIMATORS = ("k1", "k2", "k3", "rb")


def kl_estimate(delta: torch.Tensor, cu_seqlens: torch.Tensor, estimator: str, full: torch.Tensor | None = None) -> torch.Tensor:
    """(S,) per-sequence KL estimates from δ = log policy − log reference of the sampled tokens (N,).

    k1 Σδ (unbiased, may be negative)   k2 Σδ²/2   k3 Σ(e^−δ − 1 + δ) (per token, never of the sum)   rb Σ full, the exact token KL on the
    sampled prefixes.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator must be one of {ESTIMATORS}, got {estimator!r}")
    if estimator == "rb":
        if full is None:
            raise ValueError("estimator 'rb' needs the full token KL of both models")
        return segment_sums(full, cu_seqlens)
    delta = delta.double()
    value = {"k1": lambda: delta, "k2": lambda: 0.5 * delta * delta, "k3": lambda: torch.expm1(-delta) + delta}[estimator]()
    return segment_sums(value, cu_seqlens)


@torch.no_grad()
def kl_to_reference(
    policy: Any,
    ref: RefModel | AdapterOff | Any,
    prompts: Sequence[Any],
    *,
    estimator: str = "rb",
    n_samples: int = 1,
    max_new_tokens: int = 128,
    seed: int = 0,
    tokenizer: Any = None,
    stop_ids: Sequence[int] | None = None,
    batch_size: int = 16,
    backend: str = "auto",
) -> KLResult:
    """KL(policy ‖ reference) per sequence, from samples of the policy at temperature 1 without truncation of the distribution.

    Args:
        policy: LanguageModel, or a module with `tokenizer` and `stop_ids` given. ref: RefModel, AdapterOff() for a LoRA policy, or a
            LanguageModel.
        prompts: texts, message lists or token id lists. estimator: see kl_estimate; k1 is reported beside it.
        n_samples: per prompt. Samples that reach max_new_tokens are kept and counted.

    Raises:
        ValueError: no prompts, unknown estimator, missing stop ids.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator must be one of {ESTIMATORS}, got {estimator!r}")
    if not prompts:
        raise ValueError("prompts must not be empty")
    if n_samples < 1 or max_new_tokens < 1:
        raise ValueError(f"n_samples and max_new_tokens must be at least 1, got {n_samples} and {max_new_tokens}")
    tokenizer = tokenizer if tokenizer is not None else getattr(policy, "tokenizer", None)
    stop_ids = tuple(stop_ids if stop_ids is not None else getattr(policy, "stop_ids", ()))
    if not stop_ids:
        raise ValueError("stop_ids must name the model's end-of-turn token ids (a LanguageModel carries them)")
    if not isinstance(ref, (RefModel, AdapterOff)):
        ref = RefModel(ref)
    prompt_ids = [_prompt_ids(prompt, tokenizer) for prompt in prompts]
    todo = [ids for ids in prompt_ids for _ in range(n_samples)]
    sequences = [
        s
        for i in range(0, len(todo), batch_size)
        for s in sample(policy, todo[i : i + batch_size], stop_ids=stop_ids, max_new_tokens=max_new_tokens, seed=seed + i)
    ]
    truncated = sum(len(s.ids) - s.start == max_new_tokens and int(s.ids[-1]) not in stop_ids for s in sequences)
    device = next(adapters.unwrap(policy).parameters()).device
    values, plain = [], []
    for i in range(0, len(sequences), batch_size):
        part = sequences[i : i + batch_size]
        batch = data.collate(part, desirable=[True] * len(part), isolate=device.type == "cpu").to(device)
        states, head = scored_states(policy, batch), adapters.head_of(policy)
        if isinstance(ref, AdapterOff):
            with adapters.adapter_off(policy):
                ref_states, ref_head = scored_states(policy, batch), adapters.head_of(policy)
        else:
            ref_states, ref_head = scored_states(ref.model, batch), adapters.head_of(ref.model)
        # One pass over both heads gives the sampled tokens' log-probability and the KL of the whole next-token distributions.
        out = fused_linear_logprob(
            states.to(head.weight.dtype),
            head.weight,
            batch.labels,
            bias=head.bias,
            logit_scale=head.logit_scale,
            softcap=head.softcap,
            outputs=("logp", "kl_full") if estimator == "rb" else ("logp",),
            backend=backend,
            ref=(ref_states.to(ref_head.weight.dtype), ref_head.weight, *(() if ref_head.bias is None else (ref_head.bias,)))
            if estimator == "rb"
            else None,
        )
        plain_ref = fused_linear_logprob(
            ref_states.to(ref_head.weight.dtype),
            ref_head.weight,
            batch.labels,
            bias=ref_head.bias,
            logit_scale=ref_head.logit_scale,
            softcap=ref_head.softcap,
            backend=backend,
        )
        assert out.logp is not None
        assert plain_ref.logp is not None
        delta = out.logp.double() - plain_ref.logp.double()
        full = None if out.kl_full is None else out.kl_full.double()
        values.append(kl_estimate(delta, batch.cu_seqlens, estimator, full).cpu())
        plain.append(kl_estimate(delta, batch.cu_seqlens, "k1").cpu())
    per_prompt = torch.cat(values).double().view(len(prompt_ids), n_samples).mean(dim=1)
    generator = torch.Generator().manual_seed(seed)
    draws = per_prompt[torch.randint(len(per_prompt), (1000, len(per_prompt)), generator=generator)].mean(dim=1)
    return KLResult(
        estimator,
        per_prompt.mean().item(),
        draws.std().item() if len(per_prompt) > 1 else float("nan"),
        torch.cat(plain).double().mean().item(),
        per_prompt.tolist(),
        len(sequences),
        truncated,
        sum(len(s.ids) - s.start for s in sequences) / len(sequences),
    )


def _prompt_ids(prompt: Any, tokenizer: Any) -> list[int]:
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    prompt = list(prompt)
    if prompt and isinstance(prompt[0], Mapping):
        return list(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=False))
    return [int(i) for i in prompt]


@torch.no_grad()
def sample(
    model: Any,
    prompt_ids: Sequence[Sequence[int]],
    *,
    stop_ids: Sequence[int],
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
) -> list[data.Tokens]:
    """One continuation of each prompt, drawn from the model's own distribution at `temperature`; the stop token, when drawn, is part of
    it.
    """
    module = adapters.unwrap(model)
    device = next(module.parameters()).device
    T = max(len(ids) for ids in prompt_ids)
    input_ids, mask = torch.full((len(prompt_ids), T), int(stop_ids[0])), torch.zeros(len(prompt_ids), T, dtype=torch.long)
    for b, ids in enumerate(prompt_ids):
        input_ids[b, T - len(ids) :], mask[b, T - len(ids) :] = torch.as_tensor(ids), 1
    was_training = module.training
    module.eval()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            out = module.generate(
                input_ids=input_ids.to(device),
                attention_mask=mask.to(device),
                do_sample=True,
                temperature=temperature,
                top_k=0,
                top_p=1.0,
                max_new_tokens=max_new_tokens,
                eos_token_id=list(stop_ids),
                pad_token_id=int(stop_ids[0]),
            ).cpu()
    finally:
        module.train(was_training)
    sequences = []
    for ids, row in zip(prompt_ids, out[:, T:].tolist(), strict=True):
        end = next((i + 1 for i, token in enumerate(row) if token in stop_ids), len(row))
        sequences.append(data.Tokens(torch.tensor([*ids, *row[:end]]).numpy(), len(ids)))
    return sequences
