"""Sequence log-probabilities: the trunk over a batch, the head over its scored rows only."""
# S sequences, P pairs, N scored rows (tokens), D hidden, V vocab, E examples

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from llmcore.kernels.linear_logprob import fused_linear_logprob

from llmcore import adapters, data
from llmcore.losses import ld_weights


@dataclass
class Scores:
    """Log-probabilities of a batch: logp (S,) float32 sequence sums; counts (S,); per scored row (N,): token_logp, entropy, is_top1,
    log_sum_sq.
    """

    logp: torch.Tensor
    counts: torch.Tensor
    token_logp: torch.Tensor
    entropy: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None
    log_sum_sq: torch.Tensor | None = None


def segment_sums(values: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """(S,) sums of values[cu_seqlens[s] : cu_seqlens[s + 1]], each accumulated in float64 on its own: independent of what else is in the
    batch.
    """
    if values.numel() == 0:
        return values.sum() + torch.zeros(cu_seqlens.numel() - 1, dtype=values.dtype, device=values.device)
    return torch.segment_reduce(values.double(), "sum", offsets=cu_seqlens.long(), unsafe=True).to(values.dtype)


def scored_states(model: Any, batch: data.Batch) -> torch.Tensor:
    """(N, D) hidden states that predict the scored tokens, in the order of batch.labels."""
    rows = []
    for call in batch.calls:
        states = adapters.hidden_states(model, call.inputs)
        rows.append(states.reshape(-1, states.shape[-1]).index_select(0, call.rows))
    states = rows[0] if len(rows) == 1 else torch.cat(rows)
    return states if batch.order is None else states.index_select(0, batch.order)


def sequence_scores(
    model: Any, batch: data.Batch, *, outputs: Sequence[str] = (), ld_alpha: float | None = None, backend: str = "auto", mode: str = "auto"
) -> Scores:
    """Log-probability of each sequence of a batch, differentiable in the model's weights.

    Args:
        model: causal language model, wrapped or not. batch: from llmcore.data. outputs: further per-row outputs ("entropy", "is_top1",
            "log_sum_sq").
        ld_alpha: weight of the tokens beyond the shorter partner's length.
    """
    head = adapters.head_of(model)
    states = scored_states(model, batch)
    if states.dtype != head.weight.dtype and states.dtype in (torch.float16, torch.bfloat16) and head.weight.dtype == torch.float32:
        states = states.float()  # under autocast the trunk ends in half precision while the master weight is float32
    elif states.dtype != head.weight.dtype:
        states = states.to(head.weight.dtype)
    out = fused_linear_logprob(
        states,
        head.weight,
        batch.labels,
        bias=head.bias,
        logit_scale=head.logit_scale,
        softcap=head.softcap,
        outputs=("logp", *outputs),
        mode=mode,
        backend=backend,
    )
    assert out.logp is not None
    token_logp = out.logp
    weighted = token_logp
    if ld_alpha is not None:
        weighted = token_logp * ld_weights(batch.counts, ld_alpha, batch.pair_index).to(token_logp.dtype)
    return Scores(
        segment_sums(weighted, batch.cu_seqlens),
        batch.counts,
        token_logp.detach(),
        *(getattr(out, name) if name in outputs else None for name in ("entropy", "is_top1", "log_sum_sq")),
    )
