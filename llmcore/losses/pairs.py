"""The table of paired losses: to add one, write its class here, with its name in the table, its value and its two coefficients.

    rho_w = lw - rw        rho_l = ll - rl        Delta = rho_w - rho_l        l(x) = -log sigmoid(x) = softplus(-x)

Families, in order: losses of the margin (any f-divergence), of margin and lengths, reference-free ones, losses of the two rewards, losses
that sort the batch, and the plain likelihood.
"""

# P pairs; all tensors (P,), float32 or float64 inside

from __future__ import annotations

import abc
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from llmcore.losses.base import PairLoss, Pairs, Terms, _nll, _non_negative, _number, _positive, _smoothed, _smoothing

EXPONENT_LIMIT = 80.0  # exp(80) = 5.5e34 still squares into nothing but fits float32; clamped pairs are counted, their clamp has slope 0
NEAR_CERTAIN = -1e-7   # largest average log-probability ORPO's odds accept: log(1 - e^0) would be -inf


# ---- pieces -----------------------------------------------------------------------------------------------------------------------


def _log1mexp(x: torch.Tensor) -> torch.Tensor:
    """log(1 - e^x) for x < 0, by the branch that keeps all digits: log(-expm1(x)) near 0, log1p(-exp(x)) far from it."""
    near = x > -math.log(2.0)
    return torch.where(near, torch.log(-torch.expm1(torch.where(near, x, -1.0))), torch.log1p(-torch.exp(torch.where(near, -1.0, x))))


_DIVERGENCES = {"reverse_kl": "reverse_kl", "forward_kl": "forward_kl", "js": "js", "js_divergence": "js", "alpha": "alpha",
                "alpha_divergence": "alpha"}


def _divergence_score(rho: torch.Tensor, divergence: str, alpha: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """f'(e^rho) of an f-divergence (minus its constant), the derivative in rho, and which entries were clamped."""
    if divergence == "reverse_kl" or (divergence == "alpha" and abs(alpha - 1.0) < 1e-6):
        return rho, torch.ones_like(rho), None
    if divergence == "js":
        return math.log(2.0) + F.logsigmoid(rho), torch.sigmoid(-rho), None
    slope = -1.0 if divergence == "forward_kl" else alpha - 1.0
    exponent = slope * rho
    clamped = exponent > EXPONENT_LIMIT
    power = torch.exp(exponent.clamp(max=EXPONENT_LIMIT))
    return (power - 1.0) / slope, torch.where(clamped, 0.0, power), clamped


# ---- losses of the margin ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Margin(PairLoss):
    """Losses of x = beta (f'(e^rho_w) - f'(e^rho_l)), f' the identity for the reverse KL divergence.

    With another divergence only the difference matters: the prompt's normaliser cancels, so the substitution is legal exactly for losses
    that depend on the margin alone. `alpha` is the order of the alpha-divergence. Wang et al., "Beyond Reverse KL" (2023).
    """

    beta: float = 0.1
    divergence: str = field(default="reverse_kl", kw_only=True)
    alpha: float = field(default=0.5, kw_only=True)

    averaged: ClassVar[bool] = False  # divide each score by its sequence's token count

    def __post_init__(self) -> None:
        _positive(self, "beta")
        _number(self, "alpha", self.alpha)
        if self.divergence not in _DIVERGENCES:
            known = sorted(set(_DIVERGENCES.values()))
            raise ValueError(f"{type(self).__name__}: divergence must be one of {known}, got {self.divergence!r}")
        object.__setattr__(self, "divergence", _DIVERGENCES[self.divergence])

    @property
    def margin_only(self) -> bool:
        return self.divergence == "reverse_kl" and not self.averaged

    @abc.abstractmethod
    def _of_margin(self, delta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Value, derivative in the margin, clamped."""

    def _terms(self, p: Pairs) -> Terms:
        score_w, slope_w, clamped_w = _divergence_score(p.rho_w, self.divergence, self.alpha)
        score_l, slope_l, clamped_l = _divergence_score(p.rho_l, self.divergence, self.alpha)
        if self.averaged:
            score_w, slope_w, score_l, slope_l = score_w / p.nw, slope_w / p.nw, score_l / p.nl, slope_l / p.nl
        value, slope, clamped = self._of_margin(score_w - score_l)
        for more in (clamped_w, clamped_l):
            clamped = more if clamped is None else clamped if more is None else clamped | more
        return Terms(value, slope * slope_w, -slope * slope_l, clamped)


@dataclass(frozen=True)
class DPO(_Margin):
    """l(beta Delta); with label_smoothing eps > 0 the conservative (1-eps) l(beta Delta) + eps l(-beta Delta), named cdpo in metrics.

    Rafailov et al., "Direct Preference Optimization" (2023); smoothing: Mitchell, "A note on DPO with noisy preferences" (2023).
    """

    table_name: ClassVar[str] = "dpo"
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _smoothing(self)

    @property
    def name(self) -> str:
        return "cdpo" if self.label_smoothing > 0 else "dpo"

    @property
    def coefficient_bound(self) -> float | None:
        return self.beta * (1 - self.label_smoothing) if self.divergence == "reverse_kl" else None

    def _of_margin(self, delta):
        value, slope = _smoothed(self.beta * delta, self.label_smoothing)
        return value, self.beta * slope, None


@dataclass(frozen=True)
class Robust(_Margin):
    """[(1-eps) l(beta Delta) - eps l(-beta Delta)] / (1-2 eps): unbiased when a label is flipped with probability eps < 1/2.

    Chowdhury, Kini, Natarajan, "Provably Robust DPO" (2024).
    """

    table_name: ClassVar[str] = "robust"
    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        _smoothing(self, below_half=True)

    @property
    def coefficient_bound(self) -> float | None:
        return self.beta * (1 - self.label_smoothing) / (1 - 2 * self.label_smoothing) if self.divergence == "reverse_kl" else None

    def _of_margin(self, delta):
        eps, x = self.label_smoothing, self.beta * delta
        value = ((1 - eps) * _nll(x) - eps * _nll(-x)) / (1 - 2 * eps)
        return value, -self.beta * ((1 - eps) * torch.sigmoid(-x) + eps * torch.sigmoid(x)) / (1 - 2 * eps), None


@dataclass(frozen=True)
class IPOSum(_Margin):
    """(Delta - 1/(2 beta))^2 on whole sequences: a target margin of 1/(2 beta) nats per sequence.

    Azar et al., "A General Theoretical Paradigm to Understand Learning from Human Preferences" (2023).
    """

    table_name: ClassVar[str] = "ipo_sum"

    def _of_margin(self, delta):
        miss = delta - 1 / (2 * self.beta)
        return miss * miss, 2 * miss, None


@dataclass(frozen=True)
class IPOMean(IPOSum):
    """(rho_w/n_w - rho_l/n_l - 1/(2 beta))^2: a target margin of 1/(2 beta) nats per token.

    The form of TRL and HALOs, not in the paper's formula.
    """

    table_name: ClassVar[str] = "ipo_mean"
    averaged: ClassVar[bool] = True
    needs_counts: ClassVar[bool] = True


@dataclass(frozen=True)
class DAASquare(_Margin):
    """(beta Delta - 1)^2: the square member of the family E g(beta Delta); beta^2 times ipo_sum with beta/2.

    Rafailov et al., "Scaling Laws for Reward Model Overoptimization in Direct Alignment Algorithms" (2024).
    """

    table_name: ClassVar[str] = "daa_square"

    def _of_margin(self, delta):
        miss = self.beta * delta - 1
        return miss * miss, 2 * self.beta * miss, None


@dataclass(frozen=True)
class Hinge(_Margin):
    """max(0, 1 - beta Delta). A pair at or beyond the margin has coefficient exactly 0.

    Liu et al., "Statistical Rejection Sampling Improves Preference Optimization" (2023).
    """

    table_name: ClassVar[str] = "hinge"

    @property
    def coefficient_bound(self) -> float | None:
        return self.beta if self.divergence == "reverse_kl" else None

    def _of_margin(self, delta):
        slack = 1 - self.beta * delta
        return slack.clamp(min=0), -self.beta * (slack > 0).to(delta.dtype), None


@dataclass(frozen=True)
class DPONorm(_Margin):
    """l(beta (rho_w/n_w - rho_l/n_l)): length-normalised DPO.

    Lambert et al., "Tülu 3" (2024).
    """

    table_name: ClassVar[str] = "dpo_norm"
    averaged: ClassVar[bool] = True
    needs_counts: ClassVar[bool] = True

    def _of_margin(self, delta):
        x = self.beta * delta
        return _nll(x), -self.beta * torch.sigmoid(-x), None


@dataclass(frozen=True)
class EXO(_Margin):
    """KL((q, 1-q) || (1-eps, eps)) with q = sigmoid(beta Delta), eps > 0.

    Ji et al., "Towards Efficient Exact Optimization of Language Model Alignment" (2024).
    """

    table_name: ClassVar[str] = "exo_pair"
    label_smoothing: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        _smoothing(self, below_half=True, above_zero=True)

    def _of_margin(self, delta):
        x, eps = self.beta * delta, self.label_smoothing
        q, p = torch.sigmoid(x), torch.sigmoid(-x)
        win, lose = F.logsigmoid(x) - math.log1p(-eps), F.logsigmoid(-x) - math.log(eps)
        return q * win + p * lose, self.beta * q * p * (win - lose), None


@dataclass(frozen=True)
class DiscoPOP(_Margin):
    """l(x)(1-mu) + e^{-x} mu with x = beta Delta, mu = sigmoid(x/tau).

    Lu et al., "Discovering Preference Optimization Algorithms with and for Large Language Models" (2024).
    """

    table_name: ClassVar[str] = "discopop"
    tau: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive(self, "tau")

    def _of_margin(self, delta):
        x = self.beta * delta
        mu, not_mu = torch.sigmoid(x / self.tau), torch.sigmoid(-x / self.tau)
        clamped = x < -EXPONENT_LIMIT
        decay = torch.exp(-x.clamp(min=-EXPONENT_LIMIT))
        logistic = _nll(x)
        slope = -torch.sigmoid(-x) * not_mu - torch.where(clamped, 0.0, decay) * mu + (mu * not_mu / self.tau) * (decay - logistic)
        return logistic * not_mu + decay * mu, self.beta * slope, clamped


@dataclass(frozen=True)
class RDPO(PairLoss):
    """l(beta Delta - alpha (n_w - n_l)): DPO with a penalty of alpha per token of extra length; alpha = 0 is DPO.

    Park et al., "Disentangling Length from Quality in Direct Preference Optimization" (2024).
    """

    table_name: ClassVar[str] = "rdpo"
    beta: float = 0.1
    alpha: float = 0.01

    needs_counts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _positive(self, "beta")
        _number(self, "alpha", self.alpha)

    @property
    def margin_only(self) -> bool:
        return True

    @property
    def coefficient_bound(self) -> float | None:
        return self.beta

    def _terms(self, p):
        x = self.beta * (p.rho_w - p.rho_l) - self.alpha * (p.nw - p.nl)
        c = -self.beta * torch.sigmoid(-x)
        return Terms(_nll(x), c, -c)


@dataclass(frozen=True)
class SLiC(PairLoss):
    """max(0, delta - lw + ll) - lam lw: sequence likelihood calibration, reference-free, with a summed likelihood term.

    Zhao et al., "SLiC-HF" (2023); there the likelihood term is of the fine-tuning target, here of the chosen completion.
    """

    table_name: ClassVar[str] = "slic_hf"
    delta: float = 1.0
    lam: float = 0.1

    needs_reference: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _positive(self, "delta")
        _non_negative(self, "lam")

    def _terms(self, p):
        slack = self.delta - p.lw + p.ll
        active = (slack > 0).to(p.lw.dtype)
        return Terms(slack.clamp(min=0) - self.lam * p.lw, -active - self.lam, active)


@dataclass(frozen=True)
class SimPO(PairLoss):
    """l(beta (lw/n_w - ll/n_l) - gamma), reference-free; useful beta is 2 to 10 and gamma/beta 0.3 to 0.5.

    Meng, Xia, Chen, "SimPO" (2024).
    """

    table_name: ClassVar[str] = "simpo"
    beta: float = 2.0
    gamma: float = 0.5
    label_smoothing: float = 0.0

    needs_reference: ClassVar[bool] = False
    needs_counts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _positive(self, "beta")
        _number(self, "gamma", self.gamma)
        _smoothing(self)

    def _terms(self, p):
        value, slope = _smoothed(self.beta * (p.lw / p.nw - p.ll / p.nl) - self.gamma, self.label_smoothing)
        return Terms(value, self.beta * slope / p.nw, -self.beta * slope / p.nl)


def _check_nll_over(loss: Any) -> None:
    if loss.nll_over not in ("completion", "all"):
        raise ValueError(f"{type(loss).__name__}: nll_over must be 'completion' or 'all' (prompt tokens too), got {loss.nll_over!r}")


@dataclass(frozen=True)
class CPO(PairLoss):
    """l(beta (lw - ll)) + alpha NLL_w, reference-free; NLL_w averages over the scored tokens of all chosen sequences of the batch.

    Xu et al., "Contrastive Preference Optimization" (2024).
    """

    table_name: ClassVar[str] = "cpo"
    beta: float = 0.1
    alpha: float = 1.0
    label_smoothing: float = 0.0
    nll_over: str = "completion"

    needs_reference: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _positive(self, "beta")
        _non_negative(self, "alpha")
        _smoothing(self)
        _check_nll_over(self)

    @property
    def nll_weight(self) -> float:
        return self.alpha

    def _terms(self, p):
        value, slope = _smoothed(self.beta * (p.lw - p.ll), self.label_smoothing)
        return Terms(value, self.beta * slope, -self.beta * slope)


@dataclass(frozen=True)
class ORPO(PairLoss):
    """NLL_w + beta l(o), o the log odds ratio of the average log-probabilities; reference-free, NLL_w as in CPO.

    o = [a - log(1 - e^a)] - [b - log(1 - e^b)] with a = lw/n_w, b = ll/n_l, d/da [a - log(1 - e^a)] = 1 / (1 - e^a).
    Hong, Lee, Thorne, "ORPO: Monolithic Preference Optimization without Reference Model" (2024).
    """

    table_name: ClassVar[str] = "orpo"
    beta: float = 0.1
    nll_over: str = "completion"

    needs_reference: ClassVar[bool] = False
    needs_counts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _positive(self, "beta")
        _check_nll_over(self)

    @property
    def nll_weight(self) -> float:
        return 1.0

    def _terms(self, p):
        def log_odds(mean):
            clamped = mean > NEAR_CERTAIN
            mean = mean.clamp(max=NEAR_CERTAIN)
            return mean - _log1mexp(mean), torch.where(clamped, 0.0, -1.0 / torch.expm1(mean)), clamped

        (odds_w, slope_w, clamped_w), (odds_l, slope_l, clamped_l) = log_odds(p.lw / p.nw), log_odds(p.ll / p.nl)
        o = odds_w - odds_l
        slope = -self.beta * torch.sigmoid(-o)
        return Terms(self.beta * _nll(o), slope * slope_w / p.nw, -slope * slope_l / p.nl, clamped_w | clamped_l)


@dataclass(frozen=True)
class _Rewards(PairLoss):
    """Losses of the two implicit rewards r_w = beta rho_w and r_l = beta rho_l, each seen on its own."""

    beta: float = 0.1

    def __post_init__(self) -> None:
        _positive(self, "beta")


@dataclass(frozen=True)
class NCA(_Rewards):
    """l(r_w) + l(-r_w)/2 + l(-r_l)/2: noise-contrastive alignment.

    Chen et al., "Noise Contrastive Alignment of Language Models with Explicit Rewards" (2024).
    """

    table_name: ClassVar[str] = "nca_pair"

    def _terms(self, p):
        rw, rl = self.beta * p.rho_w, self.beta * p.rho_l
        return Terms(_nll(rw) + 0.5 * _nll(-rw) + 0.5 * _nll(-rl),
                     self.beta * (0.5 * torch.sigmoid(rw) - torch.sigmoid(-rw)), 0.5 * self.beta * torch.sigmoid(rl))


@dataclass(frozen=True)
class BCO(_Rewards):
    """l(r_w) + l(-r_l): a binary classifier on the rewards (the paired form has no running shift).

    Jung et al., "Binary Classifier Optimization for Large Language Model Alignment" (2024).
    """

    table_name: ClassVar[str] = "bco_pair"

    def _terms(self, p):
        rw, rl = self.beta * p.rho_w, self.beta * p.rho_l
        return Terms(_nll(rw) + _nll(-rl), -self.beta * torch.sigmoid(-rw), self.beta * torch.sigmoid(rl))


@dataclass(frozen=True)
class SPPO(_Rewards):
    """(rho_w - 1/(2 beta))^2 + (rho_l + 1/(2 beta))^2: self-play preference optimisation with hard win probabilities.

    Wu et al., "Self-Play Preference Optimization for Language Model Alignment" (2024).
    """

    table_name: ClassVar[str] = "sppo_hard"

    def _terms(self, p):
        win, lose = p.rho_w - 1 / (2 * self.beta), p.rho_l + 1 / (2 * self.beta)
        return Terms(win * win + lose * lose, 2 * win, 2 * lose)


@dataclass(frozen=True)
class APOZero(_Rewards):
    """sigmoid(-r_w) + sigmoid(r_l): raise the chosen, lower the rejected.

    D'Oosterlinck et al., "Anchored Preference Optimization and Contrastive Revisions" (2024).
    """

    table_name: ClassVar[str] = "apo_zero"

    def _terms(self, p):
        rw, rl = self.beta * p.rho_w, self.beta * p.rho_l
        return Terms(torch.sigmoid(-rw) + torch.sigmoid(rl), -self.beta * torch.sigmoid(rw) * torch.sigmoid(-rw),
                     self.beta * torch.sigmoid(rl) * torch.sigmoid(-rl))


@dataclass(frozen=True)
class APODown(_Rewards):
    """sigmoid(r_w) + sigmoid(-beta Delta): lower both, the rejected more; for a model better than its chosen data.

    D'Oosterlinck et al. (2024), as apo_zero.
    """

    table_name: ClassVar[str] = "apo_down"

    def _terms(self, p):
        rw, x = self.beta * p.rho_w, self.beta * (p.rho_w - p.rho_l)
        pull = self.beta * torch.sigmoid(x) * torch.sigmoid(-x)
        return Terms(torch.sigmoid(rw) + torch.sigmoid(-x), self.beta * torch.sigmoid(rw) * torch.sigmoid(-rw) - pull, pull)


@dataclass(frozen=True)
class AOT(PairLoss):
    """Distributional alignment: sort lw-ll and rw-rl over the batch, pair them by rank, smoothed logistic loss of beta x difference.

    The value of a pair depends on the whole batch, so micro-batching changes the loss. Melnyk et al., "Distributional Preference Alignment
    of LLMs via Optimal Transport" (2024).
    """

    table_name: ClassVar[str] = "aot"
    beta: float = 0.1
    label_smoothing: float = 0.0

    batch_level: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _positive(self, "beta")
        _smoothing(self)

    def _ranked(self, upper: torch.Tensor, lower: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Value and slope in the order of `upper`, and the slope in the order of `lower` (equal values keep their order)."""
        upper_sorted, upper_order = torch.sort(upper, stable=True)
        lower_sorted, lower_order = torch.sort(lower, stable=True)
        value, slope = _smoothed(self.beta * (upper_sorted - lower_sorted), self.label_smoothing)
        slope = self.beta * slope
        out = [torch.empty_like(slope).index_copy_(0, order, t) for order, t in
               ((upper_order, value), (upper_order, slope), (lower_order, slope))]
        return out[0], out[1], out[2]

    def _terms(self, p):
        value, slope, ref_slope = self._ranked(p.lw - p.ll, p.rw - p.rl)
        return Terms(value, slope, -slope, c_rw=-ref_slope, c_rl=ref_slope)


@dataclass(frozen=True)
class AOTUnpaired(AOT):
    """AOT on the sorted log-ratios: rho_w against rho_l by rank."""

    table_name: ClassVar[str] = "aot_unpaired"

    def _terms(self, p):
        value, slope, lower_slope = self._ranked(p.rho_w, p.rho_l)
        return Terms(value, slope, -lower_slope)


@dataclass(frozen=True)
class SFT(PairLoss):
    """- sum lw / sum n_w: token-mean negative log-likelihood of the chosen completions. `coef_w` is -1 / sum n_w."""

    table_name: ClassVar[str] = "sft"
    needs_reference: ClassVar[bool] = False
    nll_only: ClassVar[bool] = True

    @property
    def nll_weight(self) -> float:
        return 1.0

    def _terms(self, p):
        zero = torch.zeros_like(p.lw)
        return Terms(zero, zero, zero)
