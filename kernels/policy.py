"""Policy-gradient losses on completions from hidden states and the output projection: clipped ratios with a KL penalty, imitation.

    lp_b = (1/n_b) Σ_t logp_t over the scored tokens of row b       k_b = lp_b - ref_b       ρ_b = e^{k_b}       A_b = r_b - kl · k_b
    pg_b = -min(A_b ρ_b, A_b clip(ρ_b, 1 - clip, 1 + clip))
    loss = Σ_{b sample} w_b pg_b / N_sample + sft_coeff · Σ_{b sft} w_b (-lp_b) / N_sft

The ratio is the geometric mean of the token ratios (a length-normalised sequence ratio); with ratio="token" the same expression is taken
token by token and averaged over the row. The gradient of every logit of a row is one scalar times a softmax residual, so nothing of size
rows x vocabulary outlives a tile: cost and memory are those of `fused_linear_logprob` (4 GEMM units recomputed, 3 resident, 2 frozen head).

A_b is not detached by default: at the first step (ρ = 1) d pg / d lp = -(r - kl), so a winning row with r < kl is pushed down. This
reproduces published self-play training; kl_grad="detached" keeps the penalty out of the gradient. Cheng et al., "Self-playing Adversarial
Language Game Enhances LLM Reasoning" (2024), equations of the imitation and the self-play stage.
"""

# N scored rows (tokens), V vocabulary, D hidden, B sequences

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from llmcore.kernels.linear_logprob import Stats, fused_linear_logprob
from llmcore.kernels.preference_layout import _layout
from torch import Tensor


@dataclasses.dataclass
class PolicyResult:
    """`loss` () is differentiable; the rest is detached.

    logp_mean (B,): per-token mean log-probability of each row. coef, ratio (B,), for token ratios the shape of labels: d loss / d logp_mean
    and ρ. clip_fraction (): share of the sample rows' ratios outside the clip range. counts (B,): scored tokens. stats: what was done.
    """

    loss: Tensor
    logp_mean: Tensor
    coef: Tensor
    ratio: Tensor
    clip_fraction: Tensor
    counts: Tensor
    stats: Stats


class _Attach(torch.autograd.Function):
    """`value` () with derivative `coef` in the input."""

    @staticmethod
    def forward(ctx, value, coef, logp):
        ctx.save_for_backward(coef)
        ctx.dtype = logp.dtype
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        (coef,) = ctx.saved_tensors
        return None, None, (upstream * coef).to(ctx.dtype)


def clipped_objective(
    logp: Tensor, ref_logp: Tensor, rewards: Tensor, *, kl: float, clip: float, kl_grad: str = "through"
) -> tuple[Tensor, Tensor]:
    """(pg, d pg / d logp) in closed form, elementwise.

    -d pg / d logp = G with  g_u = A ρ - c ρ,  g_c = -c clip(ρ) + [1 - ε <= ρ <= 1 + ε] A ρ,  c = kl when the gradient goes through A, else
    0:
    G = g_u where A ρ < A clip(ρ), g_c where it is larger, their mean on a tie (the subgradient that autograd of `min` takes).
    """
    k = logp - ref_logp
    ratio = k.exp()
    advantage = rewards - kl * k
    clipped = ratio.clamp(1 - clip, 1 + clip)
    inside = (ratio >= 1 - clip) & (ratio <= 1 + clip)
    through = kl if kl_grad == "through" else 0.0
    free, bound = advantage * ratio, advantage * clipped
    slope_free = free - through * ratio
    slope_bound = -through * clipped + inside * free
    slope = torch.where(free < bound, slope_free, torch.where(free > bound, slope_bound, 0.5 * (slope_free + slope_bound)))
    return -torch.minimum(free, bound), -slope


def policy_loss_reference(
    logp: Tensor,
    ref_logp: Tensor,
    rewards: Tensor,
    weights: Tensor,
    sft_mask: Tensor,
    *,
    kl: float = 0.2,
    clip: float = 0.2,
    sft_coeff: float = 0.5,
    kl_grad: str = "through",
) -> Tensor:
    """The loss of (B,) mean log-probabilities by plain differentiable arithmetic."""
    k = logp - ref_logp
    advantage = rewards - kl * (k if kl_grad == "through" else k.detach())
    pg = -torch.minimum(advantage * k.exp(), advantage * k.exp().clamp(1 - clip, 1 + clip))
    samples, sft = (~sft_mask).sum().clamp(min=1), sft_mask.sum().clamp(min=1)
    return (weights * pg)[~sft_mask].sum() / samples - sft_coeff * (weights * logp)[sft_mask].sum() / sft


def _rows(name: str, value: Any, size: int, device: torch.device, default: float | None = None) -> Tensor:
    if value is None and default is not None:
        return torch.full((size,), default, device=device)
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor ({size},), got {type(value).__name__}")
    if value.shape != (size,):
        raise ValueError(f"{name} must be ({size},), one entry per row of labels, got {tuple(value.shape)}")
    if value.is_floating_point() and value.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(value.isfinite().all()):
        raise ValueError(f"{name} must be finite, row {int((~value.isfinite()).nonzero()[0, 0])} is not")
    return value.detach().to(device)


def _score(hidden_states: Tensor, weight: Tensor, labels: Tensor, options: dict[str, Any]):
    """Per-token log-probabilities, their row layout and the float64 per-row means."""
    layout = _layout(
        labels, options.get("label_mask"), options.get("cu_seqlens"), options.get("ignore_index", -100), options.get("shift", 0)
    )
    if not torch.compiler.is_compiling() and labels.device.type == "cpu" and bool((layout.counts == 0).any()):
        row = int((layout.counts == 0).nonzero()[0, 0])
        raise ValueError(f"labels of row {row} have no scored token, so its mean log-probability is undefined; remove the row")
    out = fused_linear_logprob(hidden_states, weight, labels, **options)
    assert out.logp is not None
    return layout, out.logp, layout.sums(out.logp) / layout.counts.clamp(min=1), out.stats


def fused_policy_loss(
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ref_logp: Tensor,
    rewards: Tensor,
    weights: Tensor | None = None,
    sft_mask: Tensor | None = None,
    kl: float = 0.2,
    clip: float = 0.2,
    sft_coeff: float = 0.5,
    kl_grad: str = "through",
    normalize: str = "batch",
    num_samples: int | None = None,
    num_sft: int | None = None,
    ratio: str = "sequence",
    **options: Any,
) -> PolicyResult:
    """Clipped policy-gradient loss with a KL penalty on sampled rows, plus a likelihood term on supervised rows.

    Args:
        hidden_states, weight, labels, and `options` (bias, shift, cu_seqlens, label_mask, ignore_index, logit_scale, softcap, temperature,
        mode,
            memory_budget, process_group, vocab_range, accumulate_into, grad_filter, backend): as in `fused_linear_logprob`.
        ref_logp: (B,) mean log-probability per scored token under the model that sampled the rows; with ratio="token" the shape of labels.
        rewards: (B,). weights: (B,), default 1. sft_mask: (B,) bool, True = supervised row; default none.
        kl, clip, sft_coeff: the penalty's weight, the half width of the clip range, the weight of the supervised term; all >= 0.
        kl_grad: "through" differentiates the penalty inside A, "detached" does not.
        normalize: "batch" divides by num_samples and num_sft, the counts of the whole optimiser batch (default: those of this call);
            "microbatch" divides by this call's counts whatever the batch, as the published code does.
        ratio: "sequence" (geometric mean of token ratios) or "token" (PPO's ratio, averaged over the row's tokens).

    Returns: PolicyResult(loss, logp_mean, ...). A missing group contributes 0.
    Raises: ValueError / TypeError naming the argument; a row without scored tokens is an error.

        >>> h, w, y = torch.randn(4, 9, 32, requires_grad=True), torch.randn(100, 32), torch.randint(100, (4, 9))
        >>> result = fused_policy_loss(h, w, y, ref_logp=torch.full((4,), -5.0), rewards=torch.tensor([1.0, 0.5, 0.2, 0.0]), shift=1)
        >>> result.loss.backward()
    """
    for name, number in (("kl", kl), ("clip", clip), ("sft_coeff", sft_coeff)):
        if not 0 <= number < float("inf"):
            raise ValueError(f"{name} must be a finite number >= 0, got {number!r}")
    for name, choice, known in (
        ("kl_grad", kl_grad, ("through", "detached")),
        ("normalize", normalize, ("batch", "microbatch")),
        ("ratio", ratio, ("sequence", "token")),
    ):
        if choice not in known:
            raise ValueError(f"{name} must be one of {known}, got {choice!r}")
    if normalize == "microbatch" and (num_samples is not None or num_sft is not None):
        raise ValueError("num_samples and num_sft are the whole batch's counts, which normalize='microbatch' does not use")
    if "outputs" in options or "detach" in options:
        raise ValueError("outputs and detach have no meaning here; call fused_linear_logprob for other per-token results")
    if ratio == "token" and getattr(ref_logp, "shape", None) != labels.shape:
        raise ValueError(
            f"ref_logp must be {tuple(labels.shape)}, one per label, for ratio='token', got {tuple(getattr(ref_logp, 'shape', ()))}"
        )
    size = labels.shape[0] if options.get("cu_seqlens") is None else len(options["cu_seqlens"]) - 1
    device = labels.device
    rewards, weights = _rows("rewards", rewards, size, device), _rows("weights", weights, size, device, 1.0)
    ref_logp = ref_logp.detach().to(device) if ratio == "token" else _rows("ref_logp", ref_logp, size, device)
    sft = torch.zeros(size, dtype=torch.bool, device=device) if sft_mask is None else _rows("sft_mask", sft_mask, size, device)
    if sft.dtype != torch.bool:
        raise TypeError(f"sft_mask must be bool, got {sft.dtype}")

    layout, logp, mean, stats = _score(hidden_states, weight, labels, options)
    work = mean.dtype
    samples = (~sft).sum() if num_samples is None else torch.tensor(num_samples, device=device)
    supervised = sft.sum() if num_sft is None else torch.tensor(num_sft, device=device)
    share = torch.where(sft, 0.0, weights.to(work) / samples.clamp(min=1))
    sft_share = torch.where(sft, sft_coeff * weights.to(work) / supervised.clamp(min=1), 0.0)
    current = mean.detach()
    if ratio == "sequence":
        pg, slope = clipped_objective(current, ref_logp.to(work), rewards.to(work), kl=kl, clip=clip, kl_grad=kl_grad)
        # A supervised row's ratio may overflow: it has no part in the loss, and 0 · inf would be NaN.
        pg, slope = (torch.where(sft, 0.0, t) for t in (pg, slope))
        value, coef = (share * pg - sft_share * current).sum(), share * slope - sft_share
        loss = _Attach.apply(value, coef, mean)
        ratios, counted = (current - ref_logp.to(work)).exp(), ~sft
    else:
        rows = layout.sequence_of().view(labels.shape)
        scored = layout.scored
        token_share = torch.where(scored, (share / layout.counts.clamp(min=1))[rows], 0.0)
        sft_token = torch.where(scored, (sft_share / layout.counts.clamp(min=1))[rows], 0.0)
        now = logp.detach()
        pg, slope = clipped_objective(
            now, torch.where(scored, ref_logp.to(work), now), rewards.to(work)[rows], kl=kl, clip=clip, kl_grad=kl_grad
        )
        counted = scored & ~sft[rows]
        pg, slope = (torch.where(counted, t, 0.0) for t in (pg, slope))
        value, coef = (token_share * pg - sft_token * now).double().sum().to(work), token_share * slope - sft_token
        loss = _Attach.apply(value, coef, logp)
        ratios = torch.where(scored, (now - ref_logp.to(work)).exp(), 1.0)
    outside = ((ratios < 1 - clip) | (ratios > 1 + clip)) & counted
    return PolicyResult(loss, current, coef, ratios, outside.sum() / counted.sum().clamp(min=1), layout.counts, stats)


def fused_imitation_loss(
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ref_logp: Tensor,
    weights: Tensor | None = None,
    kl: float = 0.1,
    num_rows: int | None = None,
    **options: Any,
) -> PolicyResult:
    """mean_b w_b (-lp_b + kl · e^{lp_b} (lp_b - ref_b)): likelihood with a one-sample stand-in for the KL divergence from the reference.

    The gradient goes through both factors: d / d lp = w (-1 + kl e^{lp} (1 + lp - ref)). Arguments as in `fused_policy_loss`; num_rows:
    rows of
    the whole optimiser batch (default: this call's).
    """
    if not 0 <= kl < float("inf"):
        raise ValueError(f"kl must be a finite number >= 0, got {kl!r}")
    if "outputs" in options or "detach" in options:
        raise ValueError("outputs and detach have no meaning here; call fused_linear_logprob for other per-token results")
    size = labels.shape[0] if options.get("cu_seqlens") is None else len(options["cu_seqlens"]) - 1
    weights = _rows("weights", weights, size, labels.device, 1.0)
    ref_logp = _rows("ref_logp", ref_logp, size, labels.device)
    layout, _, mean, stats = _score(hidden_states, weight, labels, options)
    current, ref = mean.detach(), ref_logp.to(mean.dtype)
    share = weights.to(mean.dtype) / max(size if num_rows is None else num_rows, 1)
    penalty = kl * current.exp()
    coef = share * (-1 + penalty * (1 + current - ref))
    value = (share * (-current + penalty * (current - ref))).sum()
    return PolicyResult(
        _Attach.apply(value, coef, mean), current, coef, (current - ref).exp(), torch.zeros_like(value), layout.counts, stats
    )
