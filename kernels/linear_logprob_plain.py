"""The reference of the fused linear log-probability: plain PyTorch on the whole logit matrix."""

from __future__ import annotations

import torch
from llmcore.kernels.linear_logprob_inputs import _ref_head, _scored
from llmcore.kernels.linear_logprob_results import OUTPUTS, LinearLogprob, Stats
from torch import Tensor


def linear_logprob_reference(
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    shift: int = 0,
    cu_seqlens: Tensor | None = None,
    logit_scale: float | None = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    outputs: tuple[str, ...] = ("logp",),
    label_mask: Tensor | None = None,
    ref: tuple[Tensor, ...] | None = None,
    vocab_range: tuple[int, int] | None = None,
) -> LinearLogprob:
    """Plain PyTorch: the whole logit matrix, differentiable any number of times, any device and float dtype.

    Arguments and results as in `fused_linear_logprob`. 16-bit inputs are widened to float32 before the product.
    """
    scored = _scored(labels, label_mask, cu_seqlens, ignore_index, shift)
    start = vocab_range[0] if vocab_range is not None else 0

    def logits(hidden: Tensor, head: Tensor, head_bias: Tensor | None) -> Tensor:
        dtype = torch.float64 if torch.float64 in (hidden.dtype, head.dtype) else torch.float32
        z = hidden.reshape(-1, hidden.shape[-1]).to(dtype) @ head.to(dtype).T
        if head_bias is not None:
            z = z + head_bias.to(dtype)
        z = z * (1.0 if logit_scale is None else logit_scale)
        if softcap is not None:
            z = softcap * torch.tanh(z / softcap)
        return z / temperature

    def place(values: Tensor) -> Tensor:  # row i predicts label i + shift
        moved = values if shift == 0 else torch.nn.functional.pad(values, (shift, 0))[: values.shape[0]]
        return torch.where(scored, moved.reshape(labels.shape), torch.zeros((), dtype=values.dtype, device=values.device))

    z = logits(hidden_states, weight, bias)
    log_p = z.log_softmax(dim=-1)
    flat = torch.where(scored, labels, start).reshape(-1).long()
    flat = flat if shift == 0 else torch.nn.functional.pad(flat[shift:], (0, min(shift, len(flat))), value=start)
    local = flat - start
    owned = (local >= 0) & (local < weight.shape[0])
    target = torch.where(owned, z.gather(1, local.clamp(0, weight.shape[0] - 1)[:, None])[:, 0], 0.0)
    lse = z.logsumexp(dim=-1)
    picked = log_p.gather(1, local.clamp(0, weight.shape[0] - 1)[:, None])[:, 0]
    result = dict.fromkeys(OUTPUTS)
    result["logp"] = place(torch.where(owned, picked, -lse))
    if "lse" in outputs:
        result["lse"] = place(lse)
    if "entropy" in outputs:
        result["entropy"] = place(-(log_p.exp() * log_p).sum(dim=-1))
    if "target_logit" in outputs:
        result["target_logit"] = place(target)
    if "mean_logit" in outputs:
        result["mean_logit"] = place(z.mean(dim=-1)).detach()
    if "is_top1" in outputs:
        top = z.max(dim=-1, keepdim=True).values
        first = torch.where(z == top, torch.arange(z.shape[1], device=z.device), z.shape[1]).amin(dim=1)
        result["is_top1"] = place((first == local).to(z.dtype)).bool()
    if "log_sum_sq" in outputs:
        result["log_sum_sq"] = place((2 * log_p).logsumexp(dim=-1)).detach()
    if "kl_full" in outputs:
        log_q = logits(*_ref_head(ref)).log_softmax(dim=-1).detach()
        result["kl_full"] = place((log_p.exp() * (log_p - log_q)).sum(dim=-1))
    if "logp" not in outputs:
        result["logp"] = None
    stats = Stats(
        None if torch.compiler.is_compiling() else int(scored.sum()),
        labels.numel(),
        "reference",
        5 * z.numel() * z.element_size(),
        "reference",
        1.0,
    )
    return LinearLogprob(**result, stats=stats)  # type: ignore[arg-type]
