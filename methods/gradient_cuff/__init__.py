"""Gradient Cuff: reject prompts that a chat model mostly refuses, or around which its refusal rate changes steeply.

Hu, Chen, Ho, "Gradient Cuff: Detecting Jailbreak Attacks on Large Language Models by Exploring Refusal Loss Landscapes", NeurIPS 2024
(arXiv 2403.00867). For whoever serves an open-weight chat model: no training, no second model, no backward pass.

    f(E) = 1 − K/N                                   K refusals in N sampled responses to the embedded prompt E
    stage 1   reject when f(E) < 1/2
    stage 2   g = 1/(P μ) Σ_j (f(E ⊕ μ u_j) − f(E)) u_j,   reject when ‖g‖ > t

⊕ adds the same vector to every token of the user's text. t comes from benign prompts (`calibrate`) for a target false-positive rate.

    config       CuffConfig, CuffScore, CuffVerdict, GuardedAnswer, Calibration and its fingerprint
    prompt       assemble: prefix, user text, suffix
    refusals     phrase lists, RefusalMatcher, refused
    statistic    decide, norm_from_counts, norm_bounds, threshold_from_scores
    query        one query's rows, waves of directions, verdict
    detector     Detector: many queries in one batch
    judge        score, check, guard
    calibration  calibrate: threshold for a false-positive rate, positive control
    picture      landscape
"""

from llmcore.methods.gradient_cuff.calibration import calibrate
from llmcore.methods.gradient_cuff.config import Calibration, CuffConfig, CuffScore, CuffVerdict, GuardedAnswer, fingerprint
from llmcore.methods.gradient_cuff.detector import Detector
from llmcore.methods.gradient_cuff.judge import REJECTION, check, guard, score
from llmcore.methods.gradient_cuff.picture import landscape
from llmcore.methods.gradient_cuff.prompt import Assembled, assemble
from llmcore.methods.gradient_cuff.refusals import OFFICIAL_PHRASES, RefusalMatcher, refused
from llmcore.methods.gradient_cuff.statistic import Threshold, decide, norm_bounds, norm_from_counts, threshold_from_scores

from llmcore.generation import kept_distribution

__all__ = [
    "OFFICIAL_PHRASES", "REJECTION", "Assembled", "Calibration", "CuffConfig", "CuffScore", "CuffVerdict", "Detector", "GuardedAnswer",
    "RefusalMatcher", "Threshold", "assemble", "calibrate", "check", "decide", "fingerprint", "guard", "kept_distribution", "landscape",
    "norm_bounds", "norm_from_counts", "refused", "score", "threshold_from_scores",
]  # fmt: skip
