"""Preference losses on sequence log-probabilities: the value and two coefficients per pair, one implementation for every path.

A loss sees a pair only through four numbers, the summed log-probabilities of the chosen and the rejected completion under the policy
(lw, ll) and under the frozen reference (rw, rl), and the two counts of scored tokens (nw, nl):

    rho_w = lw - rw        rho_l = ll - rl        Delta = rho_w - rho_l        l(x) = -log sigmoid(x) = softplus(-x)

It returns, per pair, the value and c_w = d value / d lw, c_l = d value / d ll in closed form. That is all a fused backward needs: the
gradient of logits row t of sequence s is c_s (onehot - p_t), so two scalars a pair cross from forward to backward. Autograd uses the same
coefficients (no second copy of the mathematics), hence fused, unfused and CPU paths cannot drift apart. Work and memory are O(P).

The batch loss is the mean over pairs, with one exception that has its own normaliser: negative log-likelihood terms (SFT, and those inside
ORPO and CPO) are averaged over scored tokens of the batch. `LossOutput.grad_w`/`grad_l` are d loss / d lw and d loss / d ll with every
normaliser applied; `coef_w`/`coef_l` are per pair, not divided by P.

To add a loss: one class here and its line in `_TABLE`.
"""

# P pairs; all tensors (P,), float32 or float64 inside

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F

_NO_REFERENCE = "{} needs the reference log-probabilities rw and rl, got None; score the reference model or pass cached ones"
EXPONENT_LIMIT = 80.0  # exp(80) = 5.5e34 still squares into nothing but fits float32; clamped pairs are counted, their clamp has slope 0
NEAR_CERTAIN = -1e-7   # largest average log-probability ORPO's odds accept: log(1 - e^0) would be -inf


@dataclass(frozen=True)
class LossOutput:
    """What a loss returns. `loss` and `per_pair` are differentiable in all four log-probabilities; everything else is detached.

    loss            ()      batch loss: per_pair.mean(), or sum / number of examples for unpaired losses
    per_pair        (P,)    in input order (unpaired losses: the desirable examples, then the undesirable ones)
    coef_w, coef_l  (P,)    d per_pair / d lw, d per_pair / d ll; SFT alone has d loss / d lw = -1 / (number of scored tokens)
    rewards_chosen, rewards_rejected  (P,)  beta (lw - rw), beta (ll - rl) with summed log-probabilities whatever the loss normalises by
    grad_w, grad_l  (P,)    d loss / d lw, d loss / d ll, every normaliser applied
    clamped         ()      pairs whose exponent or probability was clamped, int64
    name            str     the name under which metrics file it
    """

    loss: torch.Tensor
    per_pair: torch.Tensor
    coef_w: torch.Tensor
    coef_l: torch.Tensor
    rewards_chosen: torch.Tensor
    rewards_rejected: torch.Tensor
    grad_w: torch.Tensor
    grad_l: torch.Tensor
    clamped: torch.Tensor
    name: str

    @property
    def rewards(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.rewards_chosen, self.rewards_rejected


class Pairs(NamedTuple):
    """Detached inputs of one evaluation: the four log-probabilities, the two counts clamped to 1, and the log-ratios."""

    lw: torch.Tensor
    ll: torch.Tensor
    nw: torch.Tensor
    nl: torch.Tensor
    rho_w: torch.Tensor
    rho_l: torch.Tensor


class Terms(NamedTuple):
    """One evaluation: value and the two coefficients; `clamped` is a boolean per pair or None."""

    value: torch.Tensor
    c_w: torch.Tensor
    c_l: torch.Tensor
    clamped: torch.Tensor | None = None


class _Attach(torch.autograd.Function):
    """Returns `value`, whose derivative with respect to the i-th input is the i-th coefficient."""

    @staticmethod
    def forward(ctx, value, *coefficients_and_inputs):
        half = len(coefficients_and_inputs) // 2
        ctx.save_for_backward(*coefficients_and_inputs[:half])
        ctx.dtypes = [None if x is None else x.dtype for x in coefficients_and_inputs[half:]]
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        half = len(ctx.dtypes)
        wanted = ctx.needs_input_grad[1 + half:]
        return (None, *[None] * half,
                *((grad * c).to(d) if w and c is not None else None for c, d, w in zip(ctx.saved_tensors, ctx.dtypes, wanted, strict=True)))


# ---- argument checks --------------------------------------------------------------------------------------------------------------


def _number(loss: object, name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{type(loss).__name__}: {name} must be a finite number, got {value!r}")
    return float(value)


def _positive(loss: object, *names: str) -> None:
    for name in names:
        if _number(loss, name, getattr(loss, name)) <= 0:
            raise ValueError(f"{type(loss).__name__}: {name} must be > 0, got {getattr(loss, name)!r}")


def _non_negative(loss: object, *names: str) -> None:
    for name in names:
        if _number(loss, name, getattr(loss, name)) < 0:
            raise ValueError(f"{type(loss).__name__}: {name} must be >= 0, got {getattr(loss, name)!r}")


def _smoothing(loss: Any, *, below_half: bool = False, above_zero: bool = False) -> None:
    eps = _number(loss, "label_smoothing", loss.label_smoothing)
    low, high = eps > 0 if above_zero else eps >= 0, eps < 0.5 if below_half else eps <= 0.5
    if not (low and high):
        bounds = f"{'0 <' if above_zero else '0 <='} label_smoothing {'< 0.5' if below_half else '<= 0.5'}"
        raise ValueError(f"{type(loss).__name__}: needs {bounds} (the probability that a label is flipped), got {eps!r}")


def _vector(name: str, value: Any, like: torch.Tensor | None = None) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a tensor of shape (P,), got {type(value).__name__}")
    if value.dim() != 1 or (like is not None and value.shape != like.shape):
        expected = "(P,)" if like is None else f"(P,) = {tuple(like.shape)} to match lw"
        raise ValueError(f"{name} must be {expected}, got {tuple(value.shape)}")
    return value


def _working_dtype(*tensors: torch.Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


# ---- the pieces -------------------------------------------------------------------------------------------------------------------


def _nll(x: torch.Tensor) -> torch.Tensor:
    """l(x) = -log sigmoid(x), exact in both tails (softplus switches to the identity at 20, which costs 2e-9 in float64)."""
    return -F.logsigmoid(x)


def _smoothed(x: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(1 - eps) l(x) + eps l(-x) and its derivative: the logistic loss when a label is flipped with probability eps."""
    if eps == 0.0:
        return _nll(x), -torch.sigmoid(-x)
    return (1 - eps) * _nll(x) + eps * _nll(-x), eps * torch.sigmoid(x) - (1 - eps) * torch.sigmoid(-x)


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


# ---- the base ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PairLoss:
    """Base of every paired loss: subclasses give `_terms` (value and two coefficients); checking, normalising and autograd are here.

    Class facts that a fused kernel asks for:
        name             the table's name             needs_reference  rw and rl enter the value
        needs_counts     nw and nl enter the value    margin_only      the value depends on lw - ll (and rw - rl) alone, so that equal
        batch_level      the value of a pair                           completion prefixes cancel
                         depends on other pairs       unpaired         examples, not pairs (KTO)
    """

    needs_reference: ClassVar[bool] = True
    needs_counts: ClassVar[bool] = False
    batch_level: ClassVar[bool] = False
    unpaired: ClassVar[bool] = False
    nll_only: ClassVar[bool] = False

    @property
    def name(self) -> str:
        return _NAME_OF[type(self)]

    @property
    def margin_only(self) -> bool:
        return False

    @property
    def nll_weight(self) -> float:
        """Weight of the negative log-likelihood of the chosen completions, averaged over their tokens."""
        return 0.0

    @property
    def reward_scale(self) -> float:
        return getattr(self, "beta", 1.0)

    @property
    def coefficient_bound(self) -> float | None:
        """sup |c_w| over all inputs, or None when it is unbounded."""
        return None

    def _terms(self, p: Pairs) -> Terms:
        raise NotImplementedError

    def _evaluate(self, p: Pairs, rw: torch.Tensor, rl: torch.Tensor) -> tuple[Terms, torch.Tensor, torch.Tensor]:
        """Terms and the coefficients of rw, rl: the opposite of the policy's wherever only log-ratios enter."""
        terms = self._terms(p)
        if self.needs_reference:
            return terms, -terms.c_w, -terms.c_l
        return terms, torch.zeros_like(terms.c_w), torch.zeros_like(terms.c_l)

    def __call__(self, lw: torch.Tensor, ll: torch.Tensor, rw: torch.Tensor | None = None, rl: torch.Tensor | None = None,
                 nw: torch.Tensor | None = None, nl: torch.Tensor | None = None, *, weights: torch.Tensor | None = None,
                 nll_logp: torch.Tensor | None = None, nll_count: torch.Tensor | None = None,
                 num_pairs: int | None = None, num_tokens: int | torch.Tensor | None = None) -> LossOutput:
        """Evaluate a batch of pairs.

        Args:
            lw, ll: (P,) summed log-probabilities of the chosen and rejected completions under the policy.
            rw, rl: (P,) the same under the reference; may be None for reference-free losses (rewards are then taken against 0).
            nw, nl: (P,) numbers of scored tokens; needed by losses that average (0 counts as 1).
            weights: (P,) detached factor on each pair's loss (WPO, see `wpo_weights`); the sum is divided by P, not by their sum.
            nll_logp, nll_count: (P,) log-probability and token count of the chosen sequences that the NLL term averages over, for
                ORPO and CPO with `nll_over="all"`.
            num_pairs, num_tokens: normalisers when this is a part of a larger batch (a micro-batch, a rank, a block): the pairs and the
                tokens of NLL terms in all of it. The losses of the parts then add up to the loss of the whole.

        Raises:
            ValueError: a shape does not match, or an input that this loss needs is missing. TypeError: not a tensor.
        """
        lw, ll = _vector("lw", lw), _vector("ll", ll, lw)
        if self.needs_reference and (rw is None or rl is None):
            raise ValueError(_NO_REFERENCE.format(self.name))
        if (rw is None) != (rl is None):
            raise ValueError("rw and rl must both be given or both be None")
        reads_counts = self.needs_counts or self.nll_only or (self.nll_weight > 0 and nll_logp is None)
        if reads_counts and (nw is None or nl is None):
            raise ValueError(f"{self.name} needs the scored-token counts nw and nl, got None")
        zero = torch.zeros_like(lw)
        rw, rl = (zero, zero) if rw is None or rl is None else (_vector("rw", rw, lw), _vector("rl", rl, lw))
        work = _working_dtype(lw, ll)
        nw, nl = (torch.ones_like(lw) if n is None else _vector(label, n, lw) for label, n in (("nw", nw), ("nl", nl)))
        lw_, ll_, rw_, rl_, nw_, nl_ = (t.detach().to(work) for t in (lw, ll, rw, rl, nw, nl))
        nw_, nl_ = nw_.clamp(min=1), nl_.clamp(min=1)
        num_pairs = max(lw.numel() if num_pairs is None else num_pairs, 1)
        pairs = Pairs(lw_, ll_, nw_, nl_, lw_ - rw_ if self.needs_reference else lw_, ll_ - rl_ if self.needs_reference else ll_)

        terms, c_rw, c_rl = self._evaluate(pairs, rw_, rl_)
        value, c_w, c_l = terms.value, terms.c_w, terms.c_l
        nll_input, c_nll = None, None
        if self.nll_weight > 0:
            share, nll_input = self._nll_share(lw_, nw, nll_logp, nll_count, num_pairs, num_tokens, work)
            logp = lw_ if nll_input is None else nll_input.detach().to(work)
            value = value - share * logp
            if nll_input is None:
                c_w = c_w - share
            else:
                c_nll = -share
        elif nll_logp is not None:
            raise ValueError(f"nll_logp has no meaning for {self.name}: it has no NLL term over all tokens")
        if weights is not None:
            if self.batch_level:
                raise ValueError(f"weights (WPO) cannot be combined with {self.name}: it couples the pairs of a batch")
            factor = _vector("weights", weights, lw).detach().to(work)
            value, c_w, c_l, c_rw, c_rl = (factor * t for t in (value, c_w, c_l, c_rw, c_rl))
            c_nll = None if c_nll is None else factor * c_nll

        per_pair = _Attach.apply(value, c_w, c_l, c_rw, c_rl, c_nll, lw, ll, rw, rl, nll_input)
        scale = self.reward_scale
        clamped = terms.clamped.sum() if terms.clamped is not None else torch.zeros((), dtype=torch.int64, device=lw.device)
        reported = c_w / num_pairs if self.nll_only else c_w
        return LossOutput(per_pair.sum() / num_pairs, per_pair, reported, c_l, scale * (lw_ - rw_), scale * (ll_ - rl_),
                          c_w / num_pairs, c_l / num_pairs, clamped, self.name)

    def _nll_share(self, lw, nw, nll_logp, nll_count, num_pairs, num_tokens, work):
        """P x weight / tokens: a chosen sequence's part of P x mean NLL per unit of log-probability."""
        if getattr(self, "nll_over", "completion") == "all":
            if nll_logp is None or nll_count is None:
                raise ValueError(f"{self.name} with nll_over='all' needs nll_logp and nll_count: the log-probability and the number of "
                                 "tokens of prompt and completion of the chosen sequences")
            nll_logp, counts = _vector("nll_logp", nll_logp, lw), _vector("nll_count", nll_count, lw)
        elif nll_logp is not None:
            raise ValueError("nll_logp is only read with nll_over='all'")
        else:
            counts = nw
        tokens = counts.to(work).sum() if num_tokens is None else torch.as_tensor(num_tokens, device=lw.device).to(work)
        return self.nll_weight * num_pairs / tokens.clamp(min=1), nll_logp

    @staticmethod
    def combined(terms: Sequence[tuple[PairLoss, float]]) -> Combine:
        """The weighted sum of `terms`; how a kernel that knows no loss class joins a list of (loss, weight)."""
        return Combine(terms)


@dataclass(frozen=True)
class _Margin(PairLoss):
    """Losses of x = beta (f'(e^rho_w) - f'(e^rho_l)), f' the identity for the reverse KL divergence.

    With another divergence only the difference matters: the prompt's normaliser cancels, so the substitution is legal exactly for losses
    that depend on the margin alone. `alpha` is the order of the alpha-divergence.
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

    def _of_margin(self, delta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Value, derivative in the margin, clamped."""
        raise NotImplementedError

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
    """l(beta Delta); with label_smoothing eps > 0 the conservative (1-eps) l(beta Delta) + eps l(-beta Delta), named cdpo in metrics."""

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
    """[(1-eps) l(beta Delta) - eps l(-beta Delta)] / (1-2 eps): unbiased when a label is flipped with probability eps < 1/2."""

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
    """(Delta - 1/(2 beta))^2 on whole sequences: a target margin of 1/(2 beta) nats per sequence."""

    def _of_margin(self, delta):
        miss = delta - 1 / (2 * self.beta)
        return miss * miss, 2 * miss, None


@dataclass(frozen=True)
class IPOMean(IPOSum):
    """(rho_w/n_w - rho_l/n_l - 1/(2 beta))^2: a target margin of 1/(2 beta) nats per token."""

    averaged: ClassVar[bool] = True
    needs_counts: ClassVar[bool] = True


@dataclass(frozen=True)
class DAASquare(_Margin):
    """(beta Delta - 1)^2: the square member of the family E g(beta Delta); beta^2 times ipo_sum with beta/2."""

    def _of_margin(self, delta):
        miss = self.beta * delta - 1
        return miss * miss, 2 * self.beta * miss, None


@dataclass(frozen=True)
class Hinge(_Margin):
    """max(0, 1 - beta Delta). A pair at or beyond the margin has coefficient exactly 0."""

    @property
    def coefficient_bound(self) -> float | None:
        return self.beta if self.divergence == "reverse_kl" else None

    def _of_margin(self, delta):
        slack = 1 - self.beta * delta
        return slack.clamp(min=0), -self.beta * (slack > 0).to(delta.dtype), None


@dataclass(frozen=True)
class DPONorm(_Margin):
    """l(beta (rho_w/n_w - rho_l/n_l)): length-normalised DPO."""

    averaged: ClassVar[bool] = True
    needs_counts: ClassVar[bool] = True

    def _of_margin(self, delta):
        x = self.beta * delta
        return _nll(x), -self.beta * torch.sigmoid(-x), None


@dataclass(frozen=True)
class EXO(_Margin):
    """KL((q, 1-q) || (1-eps, eps)) with q = sigmoid(beta Delta), eps > 0."""

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
    """l(x)(1-mu) + e^{-x} mu with x = beta Delta, mu = sigmoid(x/tau)."""

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
    """l(beta Delta - alpha (n_w - n_l)): DPO with a penalty of alpha per token of extra length; alpha = 0 is DPO."""

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
    """max(0, delta - lw + ll) - lam lw: sequence likelihood calibration, reference-free, with a summed likelihood term."""

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
    """l(beta (lw/n_w - ll/n_l) - gamma), reference-free; useful beta is 2 to 10 and gamma/beta 0.3 to 0.5."""

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
    """l(beta (lw - ll)) + alpha NLL_w, reference-free; NLL_w averages over the scored tokens of all chosen sequences of the batch."""

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
    """

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
    """l(r_w) + l(-r_w)/2 + l(-r_l)/2: noise-contrastive alignment."""

    def _terms(self, p):
        rw, rl = self.beta * p.rho_w, self.beta * p.rho_l
        return Terms(_nll(rw) + 0.5 * _nll(-rw) + 0.5 * _nll(-rl),
                     self.beta * (0.5 * torch.sigmoid(rw) - torch.sigmoid(-rw)), 0.5 * self.beta * torch.sigmoid(rl))


@dataclass(frozen=True)
class BCO(_Rewards):
    """l(r_w) + l(-r_l): a binary classifier on the rewards (the paired form has no running shift)."""

    def _terms(self, p):
        rw, rl = self.beta * p.rho_w, self.beta * p.rho_l
        return Terms(_nll(rw) + _nll(-rl), -self.beta * torch.sigmoid(-rw), self.beta * torch.sigmoid(rl))


@dataclass(frozen=True)
class SPPO(_Rewards):
    """(rho_w - 1/(2 beta))^2 + (rho_l + 1/(2 beta))^2: self-play preference optimisation with hard win probabilities."""

    def _terms(self, p):
        win, lose = p.rho_w - 1 / (2 * self.beta), p.rho_l + 1 / (2 * self.beta)
        return Terms(win * win + lose * lose, 2 * win, 2 * lose)


@dataclass(frozen=True)
class APOZero(_Rewards):
    """sigmoid(-r_w) + sigmoid(r_l): raise the chosen, lower the rejected."""

    def _terms(self, p):
        rw, rl = self.beta * p.rho_w, self.beta * p.rho_l
        return Terms(torch.sigmoid(-rw) + torch.sigmoid(rl), -self.beta * torch.sigmoid(rw) * torch.sigmoid(-rw),
                     self.beta * torch.sigmoid(rl) * torch.sigmoid(-rl))


@dataclass(frozen=True)
class APODown(_Rewards):
    """sigmoid(r_w) + sigmoid(-beta Delta): lower both, the rejected more; for a model better than its chosen data."""

    def _terms(self, p):
        rw, x = self.beta * p.rho_w, self.beta * (p.rho_w - p.rho_l)
        pull = self.beta * torch.sigmoid(x) * torch.sigmoid(-x)
        return Terms(torch.sigmoid(rw) + torch.sigmoid(-x), self.beta * torch.sigmoid(rw) * torch.sigmoid(-rw) - pull, pull)


@dataclass(frozen=True)
class AOT(PairLoss):
    """Distributional alignment: sort lw-ll and rw-rl over the batch, pair them by rank, smoothed logistic loss of beta x difference.

    The value of a pair depends on the whole batch, so micro-batching changes the loss.
    """

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

    def _evaluate(self, p, rw, rl):
        value, slope, ref_slope = self._ranked(p.lw - p.ll, rw - rl)
        return Terms(value, slope, -slope), -ref_slope, ref_slope


@dataclass(frozen=True)
class AOTUnpaired(AOT):
    """AOT on the sorted log-ratios: rho_w against rho_l by rank."""

    def _evaluate(self, p, rw, rl):
        value, slope, lower_slope = self._ranked(p.rho_w, p.rho_l)
        return Terms(value, slope, -lower_slope), -slope, lower_slope


@dataclass(frozen=True)
class SFT(PairLoss):
    """- sum lw / sum n_w: token-mean negative log-likelihood of the chosen completions. `coef_w` is -1 / sum n_w."""

    needs_reference: ClassVar[bool] = False
    nll_only: ClassVar[bool] = True

    @property
    def nll_weight(self) -> float:
        return 1.0

    def _terms(self, p):
        zero = torch.zeros_like(p.lw)
        return Terms(zero, zero, zero)


# ---- unpaired ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KTO:
    """Binary feedback: w_D sigmoid(-beta (h - z0)) for desirable, w_U sigmoid(-beta (z0 - h)) for undesirable examples, h = L - R.

    z0 = max(0, mean log-ratio of mismatched completions over the global batch), detached: see `kto_baseline`; without such examples z0 = 0.
    Called as `loss(lw, ll, rw, rl, nw, nl, z0=...)` the first list holds the desirable examples and the second the undesirable ones; the
    two may have different lengths, also 0. The batch loss is the sum over all examples divided by their number (`num_pairs` when this is
    a part of a larger batch).
    """

    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    needs_reference: ClassVar[bool] = True
    needs_counts: ClassVar[bool] = False
    batch_level: ClassVar[bool] = False
    unpaired: ClassVar[bool] = True
    nll_only: ClassVar[bool] = False
    margin_only: ClassVar[bool] = False
    nll_weight: ClassVar[float] = 0.0
    uses_baseline: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _positive(self, "beta")
        _non_negative(self, "desirable_weight", "undesirable_weight")

    @property
    def name(self) -> str:
        return _NAME_OF[type(self)]

    @property
    def reward_scale(self) -> float:
        return self.beta

    @property
    def coefficient_bound(self) -> float | None:
        return self.beta * max(self.desirable_weight, self.undesirable_weight) / 4

    def __call__(self, lw: torch.Tensor, ll: torch.Tensor, rw: torch.Tensor, rl: torch.Tensor, nw: torch.Tensor | None = None,
                 nl: torch.Tensor | None = None, *, z0: torch.Tensor | float = 0.0, weights: torch.Tensor | None = None,
                 num_pairs: int | None = None) -> LossOutput:
        if weights is not None:
            raise ValueError(f"weights (WPO) are defined for pairs, not for {self.name}")
        if rw is None or rl is None:
            raise ValueError(_NO_REFERENCE.format(self.name))
        lw, ll = _vector("lw", lw), _vector("ll", ll)
        rw, rl = _vector("rw", rw, lw), _vector("rl", rl, ll)
        work = _working_dtype(lw, ll)
        if not self.uses_baseline and isinstance(z0, int | float) and z0 != 0:
            raise ValueError(f"z0 has no meaning for {self.name}: its baseline is 0")
        z0 = z0.detach().to(work) if isinstance(z0, torch.Tensor) else torch.tensor(float(z0), dtype=work, device=lw.device)
        if not self.uses_baseline:
            z0 = torch.zeros_like(z0)

        def side(logp, ref, sign, weight):
            x = sign * self.beta * (logp.detach().to(work) - ref.detach().to(work) - z0)
            return weight * torch.sigmoid(-x), -sign * weight * self.beta * torch.sigmoid(x) * torch.sigmoid(-x)

        value_w, c_w = side(lw, rw, 1.0, self.desirable_weight)
        value_l, c_l = side(ll, rl, -1.0, self.undesirable_weight)
        per_example = torch.cat([_Attach.apply(value_w, c_w, -c_w, lw, rw), _Attach.apply(value_l, c_l, -c_l, ll, rl)])
        count = max(per_example.numel() if num_pairs is None else num_pairs, 1)
        rewards = self.beta * (lw - rw).detach().to(work), self.beta * (ll - rl).detach().to(work)
        return LossOutput(per_example.sum() / count, per_example, c_w, c_l, *rewards, c_w / count, c_l / count,
                          torch.zeros((), dtype=torch.int64, device=lw.device), self.name)


@dataclass(frozen=True)
class APOZeroUnpaired(KTO):
    """KTO with z0 = 0."""

    uses_baseline: ClassVar[bool] = False


def kto_baseline(kl_logp: torch.Tensor, ref_kl_logp: torch.Tensor, *, process_group: Any = None) -> torch.Tensor:
    """z0 = max(0, mean(log pi - log pi_ref)) over mismatched completions (prompt j with completion j+1), detached.

    The mean runs over all ranks of `process_group` (sum and count are reduced, then clamped); an empty list counts as nothing, and with no
    example anywhere z0 = 0.
    """
    ratio = (kl_logp - ref_kl_logp).detach().to(_working_dtype(kl_logp))
    total = torch.stack([ratio.sum(), torch.tensor(float(ratio.numel()), dtype=ratio.dtype, device=ratio.device)])
    if process_group is not None:
        torch.distributed.all_reduce(total, group=process_group)
    return (total[0] / total[1].clamp(min=1)).clamp(min=0)


# ---- combination and names --------------------------------------------------------------------------------------------------------


class Combine:
    """A weighted sum of losses evaluated on one set of log-probabilities: values add, coefficients add.

    Each term keeps its own normaliser (pairs, or tokens for SFT): `coef_*` of the sum is P x d loss / d logp, so the gradient is coef / P.
    Rewards are those of the first term. Example: Combine([(DPO(), 0.8), (BCO(), 0.2), (SFT(), 1.0)]).
    """

    unpaired = False
    nll_only = False

    def __init__(self, terms: Sequence[tuple[PairLoss, float]]):
        if not terms:
            raise ValueError("Combine: terms must hold at least one (loss, weight), got none")
        checked = []
        for item in terms:
            if not isinstance(item, tuple | list) or len(item) != 2 or not isinstance(item[0], PairLoss):
                raise ValueError(f"Combine: every term must be (paired loss, weight), got {item!r}")
            weight = _number(self, f"the weight of {item[0].name}", item[1])
            if weight < 0:
                raise ValueError(f"Combine: the weight of {item[0].name} must be >= 0, got {weight}")
            checked.append((item[0], weight))
        names = [loss.name for loss, _ in checked]
        if len(set(names)) < len(names):
            raise ValueError(f"Combine: each loss may appear once, got {names}; add the weights instead")
        self.terms = tuple(checked)

    @property
    def name(self) -> str:
        return "+".join(loss.name for loss, _ in self.terms)

    @property
    def needs_reference(self) -> bool:
        return any(loss.needs_reference for loss, _ in self.terms)

    @property
    def needs_counts(self) -> bool:
        return any(loss.needs_counts or loss.nll_weight > 0 for loss, _ in self.terms)

    @property
    def batch_level(self) -> bool:
        return any(loss.batch_level for loss, _ in self.terms)

    @property
    def margin_only(self) -> bool:
        return all(loss.margin_only for loss, _ in self.terms)

    @property
    def nll_weight(self) -> float:
        return sum(weight * loss.nll_weight for loss, weight in self.terms)

    @property
    def nll_over(self) -> str:
        return "all" if any(getattr(loss, "nll_over", "") == "all" for loss, _ in self.terms) else "completion"

    @property
    def reward_scale(self) -> float:
        return self.terms[0][0].reward_scale

    coefficient_bound = None

    def __repr__(self) -> str:
        return f"Combine({list(self.terms)!r})"

    def __call__(self, lw, ll, rw=None, rl=None, nw=None, nl=None, *, weights=None, nll_logp=None, nll_count=None, num_pairs=None,
                 num_tokens=None) -> LossOutput:
        outs = []
        for loss, _ in self.terms:
            extra = {"nll_logp": nll_logp, "nll_count": nll_count} if getattr(loss, "nll_over", "") == "all" else {}
            outs.append(loss(lw, ll, rw, rl, nw, nl, weights=weights, num_pairs=num_pairs, num_tokens=num_tokens, **extra))
        factors = [weight for _, weight in self.terms]

        def total(attribute):
            return sum(f * getattr(o, attribute) for f, o in zip(factors, outs, strict=True))

        num_pairs, first = max(lw.numel() if num_pairs is None else num_pairs, 1), outs[0]
        grad_w, grad_l = total("grad_w"), total("grad_l")
        return LossOutput(total("loss"), total("per_pair"), grad_w * num_pairs, grad_l * num_pairs, *first.rewards, grad_w, grad_l,
                          torch.stack([o.clamped for o in outs]).sum(), self.name)


_TABLE: dict[str, type] = {
    "dpo": DPO, "cdpo": DPO, "robust": Robust, "ipo_sum": IPOSum, "ipo_mean": IPOMean, "daa_square": DAASquare, "hinge": Hinge,
    "slic_hf": SLiC, "rdpo": RDPO, "dpo_norm": DPONorm, "simpo": SimPO, "cpo": CPO, "orpo": ORPO, "exo_pair": EXO, "nca_pair": NCA,
    "bco_pair": BCO, "sppo_hard": SPPO, "apo_zero": APOZero, "apo_down": APODown, "discopop": DiscoPOP, "aot": AOT,
    "aot_unpaired": AOTUnpaired, "sft": SFT, "kto": KTO, "apo_zero_unpaired": APOZeroUnpaired,
}
_NAME_OF = {loss: name for name, loss in _TABLE.items() if name != "cdpo"}
LOSS_NAMES = tuple(_TABLE)

_IPO = ("there is no loss named 'ipo', because two conventions share that name and differ by the completion's length: 'ipo_sum' pulls the "
        "margin of whole sequences to 1/(2 beta) nats (the DPO authors' code), 'ipo_mean' pulls the margin per token to 1/(2 beta) nats "
        "(TRL, HALOs); for 30-token completions the second asks for a 30 times larger sequence margin at the same beta. Name one of them")


def loss_from_name(name: str, **options: Any) -> PairLoss | KTO:
    """The loss that the table calls `name`, with its defaults replaced by `options`.

    Example: loss_from_name("simpo", beta=2.5, gamma=1.0). Names: see `LOSS_NAMES`.

    Raises:
        ValueError: unknown name ('ipo' among them: say 'ipo_sum' or 'ipo_mean'), an option that this loss does not have, or a bad value.
    """
    if name == "ipo":
        raise ValueError(_IPO)
    if name not in _TABLE:
        raise ValueError(f"loss name must be one of {', '.join(LOSS_NAMES)}; got {name!r}")
    loss = _TABLE[name]
    if name == "cdpo":
        options = {"label_smoothing": 0.1, **options}
        if options["label_smoothing"] == 0:
            raise ValueError("cdpo needs label_smoothing > 0; without smoothing it is 'dpo'")
    known = [f.name for f in fields(loss)]
    if "label_smoothing" in options and (name == "dpo" or "label_smoothing" not in known):
        if options["label_smoothing"] != 0:
            remedy = "ask for 'cdpo'" if name == "dpo" else "it acts on cdpo, robust, exo_pair, aot, aot_unpaired, simpo and cpo only"
            raise ValueError(f"label_smoothing has no meaning for {name!r}: {remedy}; got {options['label_smoothing']!r}")
        options = {k: v for k, v in options.items() if k != "label_smoothing"}
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"{name!r} has no option {', '.join(unknown)}; it has {', '.join(known) or 'none'}")
    return loss(**options)


# ---- per-token helpers ------------------------------------------------------------------------------------------------------------


def _segment_sums(values: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Sums of consecutive groups of `counts` values, accumulated in float64 (hundreds of log-probabilities keep float32's last bit)."""
    bounds = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    running = torch.cat([values.new_zeros(1, dtype=torch.float64), values.double().cumsum(0)])
    return (running[bounds[1:]] - running[bounds[:-1]]).to(values.dtype)


def wpo_weights(logp: torch.Tensor, log_sum_sq: torch.Tensor, counts: torch.Tensor, pair_index: torch.Tensor | None = None) -> torch.Tensor:
    """Weights of weighted preference optimisation: w_w w_l with w_s = exp(mean over scored t of (logp_t - log sum_v p_tv^2)), detached.

    Args:
        logp, log_sum_sq: (N,) per scored token, sequence after sequence.
        counts: (S,) int64 scored tokens of each sequence, sum N.
        pair_index: (P, 2) sequences of each pair; default: first half chosen, second half rejected.

    Returns: (P,) weights, for the `weights` argument of a loss.
    """
    if logp.shape != log_sum_sq.shape or logp.dim() != 1:
        raise ValueError(f"log_sum_sq must be (N,) like logp {tuple(logp.shape)}, got {tuple(log_sum_sq.shape)}")
    pair_index = _halves(counts.numel(), counts.device) if pair_index is None else pair_index
    mean = _segment_sums((logp - log_sum_sq).detach(), counts) / counts.clamp(min=1)
    return torch.exp(mean[pair_index[:, 0]] + mean[pair_index[:, 1]])


def ld_weights(counts: torch.Tensor, alpha: float, pair_index: torch.Tensor | None = None) -> torch.Tensor:
    """Per-token weights of length-desensitised DPO: 1 for the first n* = min(n_w, n_l) scored tokens of a sequence, `alpha` for the rest.

    The same weights apply to the policy and to the reference; a cached reference score is only valid for the same alpha and partner.

    Args:
        counts: (S,) int64 scored tokens of each sequence.  alpha: 0 <= alpha <= 1.  pair_index: (P, 2), as in `wpo_weights`.

    Returns: (N,) float32, sequence after sequence; each sequence must be in exactly one pair.
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
    """Sequence log-probabilities of length-desensitised DPO from per-token ones: sum of the first n* tokens + alpha x the rest. (S,)"""
    return _segment_sums(logp * ld_weights(counts, alpha, pair_index).to(logp.dtype), counts)


def _halves(num_sequences: int, device: torch.device) -> torch.Tensor:
    if num_sequences % 2:
        raise ValueError(f"without pair_index the first half of the sequences is chosen, the second rejected; got {num_sequences}")
    return torch.arange(num_sequences, device=device).view(2, -1).T
