"""A weighted sum of losses on one set of log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llmcore.losses.base import LossOutput, PairLoss, _number


class Combine:
    """A weighted sum of losses evaluated on one set of log-probabilities: values add, coefficients add.

    Each term keeps its own normaliser (pairs, or tokens for SFT): `coef_*` of the sum is P x d loss / d logp, so the gradient is coef / P.
    Rewards are those of the first term. Called like a PairLoss, with the same arguments and results (per_pair (P,), loss ()).
    Example, mixed preference optimisation (Wang et al. 2024): Combine([(DPO(), 0.8), (BCO(), 0.2), (SFT(), 1.0)]).

    Raises:
        ValueError: no term, a term that is no (PairLoss, weight), a negative or infinite weight, a loss twice.
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
