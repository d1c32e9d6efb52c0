"""Losses of single examples with a label, desirable or not."""

# all tensors (E,) of one label, float32 or float64 inside

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from llmcore.losses.base import NO_REFERENCE, LossOutput, _Attach, _non_negative, _positive, _vector, _working_dtype


@dataclass(frozen=True)
class KTO:
    """Binary feedback: w_D sigmoid(-beta (h - z0)) for desirable, w_U sigmoid(-beta (z0 - h)) for undesirable examples, h = L - R.

    z0 = max(0, mean log-ratio of mismatched completions over the global batch), detached: see `kto_baseline`; without such examples z0 = 0.
    Called as `loss(lw, ll, rw, rl, nw, nl, z0=...)` the first list holds the desirable examples and the second the undesirable ones; the
    two may have different lengths, also 0. The batch loss is the sum over all examples divided by their number (`num_pairs` when this is
    a part of a larger batch). Ethayarajh et al., "KTO: Model Alignment as Prospect Theoretic Optimization" (2024).
    """

    table_name: ClassVar[str] = "kto"
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
        return self.table_name

    @property
    def reward_scale(self) -> float:
        return self.beta

    @property
    def coefficient_bound(self) -> float | None:
        return self.beta * max(self.desirable_weight, self.undesirable_weight) / 4

    def __call__(self, lw: torch.Tensor, ll: torch.Tensor, rw: torch.Tensor, rl: torch.Tensor, nw: torch.Tensor | None = None,
                 nl: torch.Tensor | None = None, *, z0: torch.Tensor | float = 0.0, weights: torch.Tensor | None = None,
                 num_pairs: int | None = None) -> LossOutput:
        """Evaluate a batch of single examples.

        Args:
            lw, rw: (E_w,) summed log-probabilities in nats of the desirable completions under policy and reference, any float dtype.
            ll, rl: (E_l,) of the undesirable ones. nw, nl: not read; there so that every loss is called alike.
            z0: the baseline, a number or a () tensor. num_pairs: examples of the whole step, when this is a part of it.

        Returns:
            LossOutput with per_pair (E_w + E_l,), desirable first; coef_w, rewards_chosen, grad_w (E_w,), the others (E_l,).

        Raises:
            ValueError: no reference, shapes that do not match, weights (WPO), or z0 where the baseline is 0. TypeError: not a tensor.
        """
        if weights is not None:
            raise ValueError(f"weights (WPO) are defined for pairs, not for {self.name}")
        if rw is None or rl is None:
            raise ValueError(NO_REFERENCE.format(self.name))
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
    """KTO with z0 = 0: the unpaired form of anchored preference optimisation (D'Oosterlinck et al. 2024)."""

    table_name: ClassVar[str] = "apo_zero_unpaired"
    uses_baseline: ClassVar[bool] = False


def kto_baseline(kl_logp: torch.Tensor, ref_kl_logp: torch.Tensor, *, process_group: Any = None) -> torch.Tensor:
    """z0 = max(0, mean(log pi - log pi_ref)) over mismatched completions (prompt j with completion j+1), detached.

    The mean runs over all ranks of `process_group` (sum and count are reduced, then clamped); an empty list counts as nothing, and with no
    example anywhere z0 = 0.

    Args:
        kl_logp, ref_kl_logp: (E,) summed log-probabilities of the mismatched completions under policy and reference.

    Returns: () tensor, float32 (float64 for float64), for the `z0` argument of KTO.
    """
    ratio = (kl_logp - ref_kl_logp).detach().to(_working_dtype(kl_logp))
    total = torch.stack([ratio.sum(), torch.tensor(float(ratio.numel()), dtype=ratio.dtype, device=ratio.device)])
    if process_group is not None:
        torch.distributed.all_reduce(total, group=process_group)
    return (total[0] / total[1].clamp(min=1)).clamp(min=0)
