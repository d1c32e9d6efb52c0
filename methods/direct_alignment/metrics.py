"""The logged metrics, computed from per-pair numbers of a whole step."""
# S sequences, P pairs, N scored rows (tokens), D hidden, V vocab, E examples

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def summarize(items: Mapping[str, torch.Tensor], loss: Any) -> dict[str, float]:
    """The logged metrics, from per-pair numbers of a whole step (all micro-batches and ranks): every mean is global.

    rewards/*: beta x summed log-ratio; rewards/accuracies: share with chosen > rejected, a tie counting one half (a NaN margin counts as
    wrong); rewards/ties: share of ties. logps/*: mean of sequence sums; logps_mean/*: per token. grad_coef/active: share of pairs whose
    coefficient exceeds 1 % of its maximum. logratio/*: mean log policy − log reference on the data, which is not a KL divergence.
    likelihood/chosen_drop < 0: the chosen likelihood fell below the reference.
    """
    if "desirable" in items:
        return _summarize_unpaired(items, loss)
    chosen, rejected = items["reward_w"], items["reward_l"]
    ties = (chosen == rejected).double()
    tokens_w, tokens_l = items["nw"].sum().clamp(min=1), items["nl"].sum().clamp(min=1)
    coef = items["coef"].abs()
    bound = loss.coefficient_bound or (coef.max().item() if coef.numel() else 0.0)
    values = {
        "per_pair_loss": items["per_pair"].mean(),
        "rewards/chosen": chosen.mean(),
        "rewards/rejected": rejected.mean(),
        "rewards/margins": (chosen - rejected).mean(),
        "rewards/accuracies": ((chosen > rejected).double() + 0.5 * ties).mean(),
        "rewards/ties": ties.mean(),
        "logps/chosen": items["lw"].mean(),
        "logps/rejected": items["ll"].mean(),
        "logps_mean/chosen": items["lw"].sum() / tokens_w,
        "logps_mean/rejected": items["ll"].sum() / tokens_l,
        "counts/chosen": items["nw"].mean(),
        "counts/rejected": items["nl"].mean(),
        "entropy": (items["entropy_w"].sum() + items["entropy_l"].sum()) / (items["nw"].sum() + items["nl"].sum()).clamp(min=1),
        "mean_token_accuracy": items["top1_w"].sum() / tokens_w,
        "grad_coef/mean": coef.mean(),
        "grad_coef/active": (coef > 0.01 * bound).double().mean() if bound else torch.zeros(()),
        "clamped": items["clamped"].sum(),
    }
    if "rho_w" in items:
        values |= {
            "logratio/chosen": items["rho_w"].mean(),
            "logratio/rejected": items["rho_l"].mean(),
            "likelihood/chosen_drop": items["rho_w"].mean(),
        }
    else:
        values["rewards/reference_free"] = torch.ones(())
    return {name: float(value) for name, value in values.items()}


def _summarize_unpaired(items: Mapping[str, torch.Tensor], loss: Any) -> dict[str, float]:
    good = items["desirable"].bool()
    coef = items["coef"].abs()
    tokens = items["n"].sum().clamp(min=1)
    bound = loss.coefficient_bound or coef.max().item()
    weigh_good, weigh_bad = loss.desirable_weight * good.sum(), loss.undesirable_weight * (~good).sum()
    values = {
        "per_pair_loss": items["per_pair"].mean(),
        "entropy": items["entropy"].sum() / tokens,
        "kto/z0": items["z0"].mean(),
        "kto/desirable": good.sum(),
        "grad_coef/mean": coef.mean(),
        "grad_coef/active": (coef > 0.01 * bound).double().mean(),
    }
    for name, mask in (("chosen", good), ("rejected", ~good)):
        if bool(mask.any()):
            values |= {
                f"rewards/{name}": items["reward"][mask].mean(),
                f"logps/{name}": items["logp"][mask].mean(),
                f"counts/{name}": items["n"][mask].mean(),
                f"logratio/{name}": items["rho"][mask].mean(),
            }
    if bool(good.any()) and bool((~good).any()):
        values |= {
            "rewards/margins": values["rewards/chosen"] - values["rewards/rejected"],
            "kto/weight_ratio": weigh_good / weigh_bad.clamp(min=1e-12),
        }
    return {name: float(value) for name, value in values.items()}
