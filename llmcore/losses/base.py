"""What every loss shares: its inputs and outputs, the checks, normalising, and autograd on closed-form coefficients.

A paired loss gives `_terms` (value and the two coefficients of each pair); `PairLoss.__call__` does the rest, once for all of them.
"""

# P pairs; all tensors (P,), float32 or float64 inside

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from llmcore.losses.combine import Combine

NO_REFERENCE = "{} needs the reference log-probabilities rw and rl, got None; score the reference model or pass cached ones"


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
        """(rewards_chosen, rewards_rejected)."""
        return self.rewards_chosen, self.rewards_rejected


class Pairs(NamedTuple):
    """Detached inputs of one evaluation, each (P,): the four log-probabilities, the two counts clamped to 1, and the log-ratios.

    Without a reference, or for a loss that takes none, rho_w = lw and rho_l = ll.
    """

    lw: torch.Tensor
    ll: torch.Tensor
    rw: torch.Tensor
    rl: torch.Tensor
    nw: torch.Tensor
    nl: torch.Tensor
    rho_w: torch.Tensor
    rho_l: torch.Tensor


class Terms(NamedTuple):
    """One evaluation: value and the two coefficients; `clamped` is a boolean per pair or None.

    c_rw, c_rl: coefficients of rw and rl where they are not the opposite of the policy's, as they are wherever only log-ratios enter.
    """

    value: torch.Tensor
    c_w: torch.Tensor
    c_l: torch.Tensor
    clamped: torch.Tensor | None = None
    c_rw: torch.Tensor | None = None
    c_rl: torch.Tensor | None = None


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


# ---- the base ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PairLoss(abc.ABC):
    """Base of every paired loss: subclasses give `_terms` (value and two coefficients); checking, normalising and autograd are here.

    Class facts that a fused kernel asks for:
        table_name       what loss_from_name knows    needs_reference  rw and rl enter the value
        needs_counts     nw and nl enter the value    margin_only      the value depends on lw - ll (and rw - rl) alone, so that equal
        batch_level      the value of a pair                           completion prefixes cancel
                         depends on other pairs       unpaired         examples, not pairs (KTO)
    """

    table_name: ClassVar[str] = ""
    needs_reference: ClassVar[bool] = True
    needs_counts: ClassVar[bool] = False
    batch_level: ClassVar[bool] = False
    unpaired: ClassVar[bool] = False
    nll_only: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """The name under which metrics file this loss."""
        return self.table_name

    @property
    def margin_only(self) -> bool:
        """Whether the value depends on lw - ll and rw - rl alone, so that equal completion prefixes cancel."""
        return False

    @property
    def nll_weight(self) -> float:
        """Weight of the negative log-likelihood of the chosen completions, averaged over their tokens."""
        return 0.0

    @property
    def reward_scale(self) -> float:
        """Factor of the log-ratios in the logged rewards: beta, or 1 for a loss without one."""
        return getattr(self, "beta", 1.0)

    @property
    def coefficient_bound(self) -> float | None:
        """sup |c_w| over all inputs, or None when it is unbounded."""
        return None

    @abc.abstractmethod
    def _terms(self, p: Pairs) -> Terms:
        """Value and the two coefficients of each pair, (P,) in the dtype of `p`."""

    def __call__(self, lw: torch.Tensor, ll: torch.Tensor, rw: torch.Tensor | None = None, rl: torch.Tensor | None = None,
                 nw: torch.Tensor | None = None, nl: torch.Tensor | None = None, *, weights: torch.Tensor | None = None,
                 nll_logp: torch.Tensor | None = None, nll_count: torch.Tensor | None = None,
                 num_pairs: int | None = None, num_tokens: int | torch.Tensor | None = None) -> LossOutput:
        """Evaluate a batch of pairs. Memory and time O(P).

        Args:
            lw, ll: (P,) summed log-probabilities in nats of the chosen and rejected completions under the policy, any float dtype; computed
                in float32, or float64 when one of them is.
            rw, rl: (P,) the same under the reference; may be None for reference-free losses (rewards are then taken against 0).
            nw, nl: (P,) integer or float numbers of scored tokens; needed by losses that average (0 counts as 1).
            weights: (P,) detached factor on each pair's loss (WPO, see `wpo_weights`); the sum is divided by P, not by their sum.
            nll_logp, nll_count: (P,) log-probability and token count of the chosen sequences that the NLL term averages over, for
                ORPO and CPO with `nll_over="all"`.
            num_pairs, num_tokens: normalisers when this is a part of a larger batch (a micro-batch, a rank, a block): the pairs and the
                tokens of NLL terms in all of it. The losses of the parts then add up to the loss of the whole.

        Returns:
            LossOutput, its tensors in the dtype that was computed in; with P = 0 a zero loss that is still connected to the graph.

        Raises:
            ValueError: a shape does not match, or an input that this loss needs is missing. TypeError: not a tensor.
            RuntimeError: a second derivative is asked for.

        Example:
            >>> lw, ll = torch.tensor([-10.0], requires_grad=True), torch.tensor([-12.0], requires_grad=True)
            >>> out = DPO(beta=0.1)(lw, ll, torch.tensor([-11.0]), torch.tensor([-11.0]))
            >>> out.loss.backward()
            >>> round(out.loss.item(), 4), torch.equal(lw.grad, out.grad_w)
            (0.5981, True)
        """
        lw, ll = _vector("lw", lw), _vector("ll", ll, lw)
        if self.needs_reference and (rw is None or rl is None):
            raise ValueError(NO_REFERENCE.format(self.name))
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
        ratios = (lw_ - rw_, ll_ - rl_) if self.needs_reference else (lw_, ll_)
        terms = self._terms(Pairs(lw_, ll_, rw_, rl_, nw_, nl_, *ratios))
        value, c_w, c_l = terms.value, terms.c_w, terms.c_l
        if self.needs_reference:
            c_rw, c_rl = (-c if given is None else given for c, given in ((c_w, terms.c_rw), (c_l, terms.c_rl)))
        else:
            c_rw, c_rl = torch.zeros_like(c_w), torch.zeros_like(c_l)
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
        from llmcore.losses.combine import Combine

        return Combine(terms)
