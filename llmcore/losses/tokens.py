"""From per-token log-probabilities to what a loss takes: weights of WPO, weights and sums of LD-DPO."""

# N scored tokens, S sequences, P pairs

from __future__ import annotations

import torch


def segment_sums(values: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """(S,) sums of consecutive groups of `counts` (S,) int64 values (N,), accumulated in float64 and returned in the dtype of `values`
    (hundreds of log-probabilities keep float32's last bit). Differentiable in `values`.
    """
    bounds = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    running = torch.cat([values.new_zeros(1, dtype=torch.float64), values.double().cumsum(0)])
    return (running[bounds[1:]] - running[bounds[:-1]]).to(values.dtype)


def wpo_weights(logp: torch.Tensor, log_sum_sq: torch.Tensor, counts: torch.Tensor, pair_index: torch.Tensor | None = None) -> torch.Tensor:
    """Weights of weighted preference optimisation: w_w w_l with w_s = exp(mean over scored t of (logp_t - log sum_v p_tv^2)), detached.

    Zhou et al., "WPO: Enhancing RLHF with Weighted Preference Optimization" (2024).

    Args:
        logp, log_sum_sq: (N,) float, per scored token, sequence after sequence.
        counts: (S,) int64 scored tokens of each sequence, sum N.
        pair_index: (P, 2) sequences of each pair; default: first half chosen, second half rejected.

    Returns: (P,) weights in the dtype of logp, for the `weights` argument of a loss.

    Raises:
        ValueError: shapes do not match, or there is no pair_index and the number of sequences is odd.
    """
    if logp.shape != log_sum_sq.shape or logp.dim() != 1:
        raise ValueError(f"log_sum_sq must be (N,) like logp {tuple(logp.shape)}, got {tuple(log_sum_sq.shape)}")
    pair_index = _halves(counts.numel(), counts.device) if pair_index is None else pair_index
    mean = segment_sums((logp - log_sum_sq).detach(), counts) / counts.clamp(min=1)
    return torch.exp(mean[pair_index[:, 0]] + mean[pair_index[:, 1]])


def ld_weights(counts: torch.Tensor, alpha: float, pair_index: torch.Tensor | None = None) -> torch.Tensor:
    """Per-token weights of length-desensitised DPO: 1 for the first n* = min(n_w, n_l) scored tokens of a sequence, `alpha` for the rest.

    The same weights apply to the policy and to the reference; a cached reference score is only valid for the same alpha and partner.
    Liu et al., "Length Desensitization in Direct Preference Optimization" (2024).

    Args:
        counts: (S,) int64 scored tokens of each sequence.  alpha: 0 <= alpha <= 1.  pair_index: (P, 2), as in `wpo_weights`.

    Returns: (N,) float32, sequence after sequence.

    Raises:
        ValueError: alpha outside [0, 1], or a sequence that is not in exactly one pair.
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha must be in [0, 1], got {alpha!r}")
    pair_index = _halves(counts.numel(), counts.device) if pair_index is None else pair_index
    if pair_index.numel() != counts.numel() or pair_index.flatten().unique().numel() != counts.numel():
        raise ValueError("ld_weights needs every sequence in exactly one pair: the weight of a token depends on its partner's length")
    shared = torch.empty_like(counts)
    smaller = counts[pair_index].amin(dim=1)
    shared[pair_index[:, 0]], shared[pair_index[:, 1]] = smaller, smaller
    start = counts.cumsum(0) - counts
    position = torch.arange(int(counts.sum()), device=counts.device) - start.repeat_interleave(counts)
    return torch.where(position < shared.repeat_interleave(counts), 1.0, alpha)


def ld_logps(logp: torch.Tensor, counts: torch.Tensor, alpha: float, pair_index: torch.Tensor | None = None) -> torch.Tensor:
    """(S,) sequence log-probabilities of length-desensitised DPO from per-token ones (N,): sum of the first n* tokens + alpha x the rest.

    Arguments and errors as in `ld_weights`; differentiable in logp.
    """
    return segment_sums(logp * ld_weights(counts, alpha, pair_index).to(logp.dtype), counts)


def _halves(num_sequences: int, device: torch.device) -> torch.Tensor:
    if num_sequences % 2:
        raise ValueError(f"without pair_index the first half of the sequences is chosen, the second rejected; got {num_sequences}")
    return torch.arange(num_sequences, device=device).view(2, -1).T
