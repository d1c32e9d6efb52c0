"""The numbers of Gradient Cuff: norm, its exact bounds while samples are still open, and thresholds from benign scores.

With refusal counts k = (K_0 … K_P) of N samples, v_j = (K_0 − K_j)/N and the Gram matrix G of the directions,

    ‖g‖ = sqrt(vᵀ G v) / (P μ)          scale="mean" (the published program); scale="sum" leaves out 1/P

Counts are integers and are subtracted as integers; everything after is float64, on one code path for calibration and serving, because a
calibrated threshold equals one of the norms and ties must stay ties.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np

MARGIN = 1e-12  # a bound decides only when it clears the threshold by more than rounding
_MAX_FREE = 16  # vertices of the box are enumerated up to 2^16


def _matrix(gram: Any, size: int) -> np.ndarray:
    matrix = np.asarray(gram.detach().cpu() if hasattr(gram, "detach") else gram, dtype=np.float64)
    if matrix.shape != (size, size):
        raise ValueError(f"gram must be (P, P) = ({size}, {size}) to match counts, got {matrix.shape}")
    return matrix


def _factor(num_samples: int, size: int, smoothing: float, scale: str) -> float:
    if scale not in ("mean", "sum"):
        raise ValueError(f"scale must be 'mean' or 'sum', got {scale!r}")
    if num_samples < 1:
        raise ValueError(f"num_samples must be >= 1, got {num_samples}")
    if not (math.isfinite(smoothing) and smoothing > 0):
        raise ValueError(f"smoothing must be finite and > 0, got {smoothing!r}")
    return num_samples * smoothing * (size if scale == "mean" else 1)


def norm_from_counts(
    base_count: int, counts: Sequence[int], num_samples: int, gram: Any, smoothing: float, *, scale: str = "mean"
) -> float:
    """‖g‖ from integer refusal counts.

    Args:
        base_count: K_0. counts: (P,) K_j. num_samples: N. gram: (P, P) Gram matrix of the directions. smoothing: μ.
        scale: "mean" averages over the P directions, "sum" does not.
    """
    difference = int(base_count) - np.asarray(counts, dtype=np.int64)
    if difference.ndim != 1 or difference.size == 0:
        raise ValueError(f"counts must hold at least one direction, got shape {difference.shape}")
    matrix = _matrix(gram, len(difference))
    flips = difference.astype(np.float64)
    return math.sqrt(max(float(flips @ matrix @ flips), 0.0)) / _factor(num_samples, len(difference), smoothing, scale)


def norm_bounds(
    count_low: Sequence[int], count_high: Sequence[int], num_samples: int, gram: Any, smoothing: float, *, scale: str = "mean"
) -> tuple[float, float]:
    """Bounds of ‖g‖ over all counts in a box; index 0 is the unperturbed row.

    Upper: a convex function is largest at a vertex; all vertices are tried while at most 16 counts are open, else Vᵀ|G|V. Lower: at a
    point k* near
    the minimum (20 sweeps of coordinate descent), convexity gives Q(k) ≥ Q(k*) + Σ_i min over [l_i, h_i] of ∂Q_i·(k_i − k*_i), for
    every k of the box.
    """
    low, high = np.asarray(count_low, dtype=np.float64), np.asarray(count_high, dtype=np.float64)
    if low.ndim != 1 or low.shape != high.shape or low.size < 2:
        raise ValueError(f"count_low and count_high must both be (P + 1,) with P >= 1, got {low.shape} and {high.shape}")
    if (low > high).any() or low.min() < 0 or high.max() > num_samples:
        raise ValueError(f"counts must satisfy 0 <= count_low <= count_high <= num_samples = {num_samples}")
    size = len(low) - 1
    if (low == high).all():
        exact = norm_from_counts(int(low[0]), low[1:].astype(np.int64), num_samples, gram, smoothing, scale=scale)  # type: ignore[arg-type]
        return exact, exact
    matrix = _matrix(gram, size)
    factor = _factor(num_samples, size, smoothing, scale)
    # Q(k) = kᵀ H k with H = Aᵀ G A, A = [1, −I].
    hessian = np.empty((size + 1, size + 1))
    hessian[0, 0], hessian[0, 1:], hessian[1:, 0], hessian[1:, 1:] = matrix.sum(), -matrix.sum(0), -matrix.sum(1), matrix
    free = np.flatnonzero(low < high)
    if len(free) <= _MAX_FREE:
        corners = np.tile(low, (1 << len(free), 1))
        chosen = (np.arange(1 << len(free))[:, None] >> np.arange(len(free))) & 1
        corners[:, free] = np.where(chosen == 1, high[free], low[free])
        steps = corners[:, :1] - corners[:, 1:]
        upper = float(((steps @ matrix) * steps).sum(1).max())
    else:
        widest = np.maximum(np.abs(low[0] - high[1:]), np.abs(high[0] - low[1:]))
        upper = float(widest @ np.abs(matrix) @ widest)
    point = (low + high) / 2
    slope = hessian @ point
    for _ in range(20):
        moved = 0.0
        for i in free:
            target = min(max(point[i] - slope[i] / hessian[i, i], low[i]), high[i]) if hessian[i, i] > 0 else point[i]
            step = target - point[i]
            if step:
                slope += hessian[:, i] * step
                point[i] = target
                moved = max(moved, abs(step))
        if moved < 1e-10:
            break
    slope = 2 * (hessian @ point)
    below, above = slope * (low - point), slope * (high - point)
    lower = float(point @ hessian @ point + np.minimum(below, above).sum())
    # Differences of large terms: take their rounding off, so that the bound holds in float64 too.
    lower -= MARGIN * float(np.abs(point) @ np.abs(hessian) @ np.abs(point) + np.abs(below).sum() + np.abs(above).sum())
    return math.sqrt(max(lower * (1 - MARGIN), 0.0)) / factor, math.sqrt(max(upper, 0.0) * (1 + MARGIN)) / factor


def displacement(counts: Sequence[int], num_samples: int) -> float:
    """‖v‖₂ = sqrt(Σ_j (f_j − f_0)²): comparable across embedding sizes, P and μ."""
    return math.sqrt(sum((counts[0] - k) ** 2 for k in counts[1:])) / num_samples


def noise_floor(
    counts: Sequence[int], num_samples: int, dim: int, smoothing: float, *, scale: str = "mean", antithetic: bool = False
) -> float:
    """Root of the expected ‖g‖² that sampling noise alone gives: d/(P μ²) · (mean_j s_j² + s_0²), s² = r(1 − r)/(N − 1)."""
    size = len(counts) - 1
    rates = np.asarray(counts, dtype=np.float64) / num_samples
    variance = rates * (1 - rates) / max(num_samples - 1, 1)
    floor = dim / (size * smoothing**2) * (variance[1:].mean() + (0.0 if antithetic else variance[0]))
    return math.sqrt(floor) * (1 if scale == "mean" else size)


def debiased_norm(counts: Sequence[int], num_samples: int, gram: Any, smoothing: float, *, scale: str = "mean") -> float:
    """Signed root of ‖g‖² minus its sampling noise, an unbiased estimate of the noise-free second moment (N ≥ 2); negative when noise
    wins.
    """
    if num_samples < 2:
        raise ValueError(f"num_samples must be >= 2 for a debiased norm, got {num_samples}")
    size = len(counts) - 1
    matrix = _matrix(gram, size)
    factor = _factor(num_samples, size, smoothing, scale) / num_samples
    rates = np.asarray(counts, dtype=np.float64) / num_samples
    variance = rates * (1 - rates) / (num_samples - 1)
    square = norm_from_counts(counts[0], counts[1:], num_samples, matrix, smoothing, scale=scale) ** 2
    square -= (float(matrix.diagonal() @ variance[1:]) + float(matrix.sum()) * variance[0]) / factor**2
    return math.copysign(math.sqrt(abs(square)), square)


def stage1_limit(num_samples: int, stage1_threshold: float = 0.5) -> int:
    """Smallest K_0 that stage 1 rejects: f_0 = 1 − K_0/N < threshold, in exact arithmetic; a tie passes."""
    return int(num_samples * (1 - Decimal(repr(float(stage1_threshold)))) // 1) + 1


def decide(f0: float, norm: float | None, threshold: float, *, stage1_threshold: float = 0.5) -> str | None:
    """"stage1" when f0 < 1/2, "stage2" when norm > threshold (strict), None when the prompt is accepted; norm None: stage 1 only."""
    check_threshold(threshold)
    if math.isnan(f0) or (norm is not None and math.isnan(norm)):
        raise ValueError(f"f0 and norm must be numbers, got {f0!r} and {norm!r}")
    if f0 < stage1_threshold:
        return "stage1"
    return "stage2" if norm is not None and norm > threshold else None


def check_threshold(threshold: float) -> None:
    """Raise ValueError unless the threshold is a number ≥ 0; +∞ leaves stage 1 alone."""
    if not isinstance(threshold, (int, float)) or math.isnan(threshold) or threshold < 0:
        raise ValueError(f"threshold must be a number >= 0 (infinity: stage 1 only), got {threshold!r}")


@dataclass(frozen=True)
class Threshold:
    """A threshold and the benign rejections it causes: `rejected` of `n`, with the Clopper–Pearson 95 % interval of that rate."""

    value: float
    feasible: bool
    rejected: int
    n: int
    interval: tuple[float, float]


def clopper_pearson(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Exact binomial interval of a rate, by bisection on the binomial tails."""
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"successes must lie in 0 … trials = {trials}, got {successes}")
    tail = (1 - confidence) / 2

    def at_least(k: int, p: float) -> float:
        if k <= 0 or p >= 1:
            return 1.0
        if p <= 0:
            return 0.0
        terms = [
            math.lgamma(trials + 1) - math.lgamma(i + 1) - math.lgamma(trials - i + 1) + i * math.log(p) + (trials - i) * math.log1p(-p)
            for i in range(k, trials + 1)
        ]
        top = max(terms)
        return math.exp(top) * math.fsum(math.exp(term - top) for term in terms)

    def solve(function, target: float) -> float:
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if function(middle) < target else (low, middle)
        return (low + high) / 2

    lower = 0.0 if successes == 0 else solve(lambda p: at_least(successes, p), tail)
    upper = 1.0 if successes == trials else solve(lambda p: at_least(successes + 1, p), 1 - tail)
    return lower, upper


def threshold_from_scores(norms: Sequence[float], stage1_rejected: int, sigma: float, *, method: str = "plugin") -> Threshold:
    """Threshold for a target false-positive rate.

    Args:
        norms: of the benign prompts that passed stage 1. stage1_rejected: r, how many did not. sigma: target rate in (0, 1).
        method: "plugin", t = min{τ ∈ {0} ∪ norms : r + #{norm > τ} ≤ ⌊σn⌋}; "conformal", t = k-th smallest score with k = ⌈(n+1)(1−σ)⌉ and
            stage-1 rejections at +∞: an exchangeable benign prompt is rejected with probability ≤ σ when t is finite.

    Returns: Threshold; +∞ and feasible=False, with a warning, when no threshold can keep the target. ⌊σn⌋ is exact for the decimal σ.
    """
    if not 0 < sigma < 1:
        raise ValueError(f"sigma must lie in (0, 1), got {sigma!r}")
    if method not in ("plugin", "conformal"):
        raise ValueError(f"method must be 'plugin' or 'conformal', got {method!r}")
    scores = sorted(float(norm) for norm in norms)
    if any(math.isnan(score) for score in scores):
        raise ValueError("norms must not contain NaN")
    if stage1_rejected < 0:
        raise ValueError(f"stage1_rejected must be >= 0, got {stage1_rejected}")
    n = len(scores) + stage1_rejected
    if n == 0:
        raise ValueError("norms must not be empty: a threshold needs benign prompts")
    exact = Decimal(repr(float(sigma)))
    value, feasible = math.inf, False
    if method == "plugin":
        allowed = int(exact * n // 1)
        if stage1_rejected > allowed:
            warnings.warn(
                f"stage 1 alone rejects {stage1_rejected} of {n} benign prompts, more than the target of {sigma:.3g}: no "
                f"threshold can repair that",
                stacklevel=2,
            )
        else:
            # At most `spare` norms may lie above t: t is the largest norm outside that many, or 0.
            spare = allowed - stage1_rejected
            value, feasible = (max(0.0, scores[len(scores) - spare - 1]) if spare < len(scores) else 0.0), True
    else:
        rank = math.ceil((n + 1) * (1 - exact))
        if rank > n:
            warnings.warn(
                f"{n} benign prompts are too few for a conformal threshold at {sigma:.3g}: at least {math.ceil(1 / exact) - 1} are needed",
                stacklevel=2,
            )
        elif rank > len(scores):
            warnings.warn(
                f"stage 1 alone rejects {stage1_rejected} of {n} benign prompts, more than the target of {sigma:.3g}: no threshold can "
                f"repair that",
                stacklevel=2,
            )
        else:
            value, feasible = max(0.0, scores[rank - 1]), True
    rejected = stage1_rejected + sum(score > value for score in scores)
    return Threshold(value, feasible, rejected, n, clopper_pearson(rejected, n))
