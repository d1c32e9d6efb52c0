"""Which candidate wins, from scores and answers alone: sequential substitution, majority vote, thresholds and weights that fit both."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from llmcore.methods.instance_adaptive.answers import normalise
from torch import Tensor

# Q questions, M candidates of each, N pairs


class Threshold(float):
    """A threshold with the settings under which its scores were measured; a method with other settings refuses it."""

    metadata: dict[str, Any]

    def __new__(cls, value: float, metadata: Mapping[str, Any] | None = None) -> Threshold:
        self = super().__new__(cls, value)
        self.metadata = dict(metadata or {})
        return self


def select_ss(scores: Sequence[float | None], answers: Sequence[str | None], threshold: float) -> tuple[int | None, str]:
    """Sequential substitution: the first score above the threshold; if none passes, the largest. (index, reason)"""
    scored = [(i, score) for i, score in enumerate(scores) if score is not None and answers[i] is not None]
    if not scored:
        return None, "no_score"
    for i, score in scored:
        if score > threshold:
            return i, f"first score above {threshold:g}"
    return max(scored, key=lambda pair: (pair[1], -pair[0]))[0], f"none above {threshold:g}: largest score"


def select_mv(scores: Sequence[float | None], answers: Sequence[str | None], k: int = 3) -> tuple[int | None, str]:
    """Majority vote of the k largest scores; ties go to the answer with the larger best score, then to the earlier candidate. (index,
    reason)"""
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    scored = [(score, -i) for i, score in enumerate(scores) if score is not None and answers[i] is not None]
    if not scored:
        return None, "no_score"
    best = [-i for _, i in sorted(scored, reverse=True)[:k]]
    votes = collections.Counter(normalise(str(answers[i])) for i in best)
    winner = max(best, key=lambda i: (votes[normalise(str(answers[i]))], scores[i], -i))
    return winner, f"{votes[normalise(str(answers[winner]))]} of {len(best)} votes"


def calibrate_threshold(scores: Any, correct: Any, metric: str = "balanced", *, metadata: Mapping[str, Any] | None = None) -> Threshold:
    """The threshold on scores that best separates right from wrong, in O(N log N).

    Args:
        scores: (N,) scores, or (questions, candidates) for metric "downstream". correct: booleans of the same shape.
        metric: "balanced" (mean of both classes' accuracies), "accuracy", or "downstream": the accuracy that sequential substitution would
            reach.
        metadata: what the scores were measured with (`InstanceAdaptivePrompting.metadata()`), kept with the threshold: a method with other
            settings refuses it.
    """
    values, right = torch.as_tensor(scores, dtype=torch.float64), torch.as_tensor(correct).bool()
    if values.shape != right.shape or values.numel() == 0:
        raise ValueError(f"correct must have the shape of scores {tuple(values.shape)}, got {tuple(right.shape)}")
    if not bool(torch.isfinite(values).all()):
        raise ValueError("scores must be finite")
    if bool(right.all()) or not bool(right.any()):
        raise ValueError("correct holds one class only: a threshold needs right and wrong pairs")
    distinct = values.flatten().unique()
    cuts = torch.cat([distinct[:1] - 1, (distinct[1:] + distinct[:-1]) / 2, distinct[-1:] + 1])
    if metric in ("balanced", "accuracy"):
        good, bad = values[right].sort().values, values[~right].sort().values
        kept = len(good) - torch.searchsorted(good, cuts, right=True)
        dropped = torch.searchsorted(bad, cuts, right=True)
        merit = kept / len(good) + dropped / len(bad) if metric == "balanced" else kept + dropped
    elif metric == "downstream":
        if values.dim() != 2:
            raise ValueError(f"scores must be (questions, candidates) for metric='downstream', got {tuple(values.shape)}")
        # Of a question only scores above all earlier ones can be the first to pass some threshold: a step function of the threshold, added
        # up over questions.
        running = values.cummax(1).values
        gain = torch.zeros(len(cuts), dtype=torch.float64)
        for row, top, ok in zip(values, running, right, strict=True):
            records = [0] + [i for i in range(1, len(row)) if row[i] > top[i - 1]]
            low = 0
            for i in records:
                high = int(torch.searchsorted(cuts, row[i]))
                gain[low:high] += float(ok[i])
                low = max(low, high)
            gain[low:] += float(ok[records[-1]])
        merit = gain
    else:
        raise ValueError(f"metric must be 'balanced', 'accuracy' or 'downstream', got {metric!r}")
    return Threshold(float(cuts[int(merit.argmax())]), metadata)


def calibrate_lambdas(flows: Any, correct: Any, *, steps: int = 10) -> tuple[float, float, float]:
    """Weights of I_qp, I_qr, I_pr on a grid of the simplex whose scores best rank right above wrong pairs (area under the ROC curve).

    Args:
        flows: (N, 3) means of the three flows, one row a (question, candidate) pair. correct: (N,) booleans.
        steps: the grid's step is 1 / steps. Among equal areas the weights closest to 1/3 each win.

    Cost: (steps + 1)(steps + 2) / 2 sorts of N numbers.
    """
    values, right = torch.as_tensor(flows, dtype=torch.float64), torch.as_tensor(correct).bool()
    if values.dim() != 2 or values.shape[1] != 3 or values.shape[0] == 0 or right.shape != values.shape[:1]:
        raise ValueError(f"flows must be (N, 3) and correct (N,), got {tuple(values.shape)} and {tuple(right.shape)}")
    if not bool(torch.isfinite(values).all()):
        raise ValueError("flows must be finite")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if bool(right.all()) or not bool(right.any()):
        raise ValueError("correct holds one class only: weights need right and wrong pairs")

    def merit(weights: tuple[float, float, float]) -> tuple[float, float]:
        scores = values @ torch.tensor(weights, dtype=torch.float64)
        return _area(scores[right], scores[~right]), -sum((w - 1 / 3) ** 2 for w in weights)

    grid = [(i / steps, j / steps, (steps - i - j) / steps) for i, j in itertools.product(range(steps + 1), repeat=2) if i + j <= steps]
    return max(grid, key=merit)


def _area(good: Tensor, bad: Tensor) -> float:
    """Share of (right, wrong) pairs in which the right one scores higher; ties count half."""
    bad = bad.sort().values
    below, up_to = torch.searchsorted(bad, good), torch.searchsorted(bad, good, right=True)
    return float((below + up_to).double().sum() / (2 * len(good) * len(bad)))
