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

To add a loss: one class in pairs.py. loss_from_name finds it there; a line here exports it.

    base.py      inputs, outputs, checks, autograd      pairs.py     the table           unpaired.py  KTO
    combine.py   weighted sums of losses                names.py     loss_from_name      tokens.py    WPO and LD-DPO from per-token values
"""

from llmcore.losses.base import LossOutput, PairLoss, Pairs, Terms
from llmcore.losses.combine import Combine
from llmcore.losses.names import LOSS_NAMES, loss_from_name
from llmcore.losses.pairs import (
    AOT,
    BCO,
    CPO,
    DPO,
    EXO,
    EXPONENT_LIMIT,
    NCA,
    NEAR_CERTAIN,
    ORPO,
    RDPO,
    SFT,
    SPPO,
    AOTUnpaired,
    APODown,
    APOZero,
    DAASquare,
    DiscoPOP,
    DPONorm,
    Hinge,
    IPOMean,
    IPOSum,
    Robust,
    SimPO,
    SLiC,
)
from llmcore.losses.tokens import ld_logps, ld_weights, segment_sums, wpo_weights
from llmcore.losses.unpaired import KTO, APOZeroUnpaired, kto_baseline

__all__ = [
    "AOT",
    "BCO",
    "CPO",
    "DPO",
    "EXO",
    "EXPONENT_LIMIT",
    "KTO",
    "LOSS_NAMES",
    "NCA",
    "NEAR_CERTAIN",
    "ORPO",
    "RDPO",
    "SFT",
    "SPPO",
    "AOTUnpaired",
    "APODown",
    "APOZero",
    "APOZeroUnpaired",
    "Combine",
    "DAASquare",
    "DPONorm",
    "DiscoPOP",
    "Hinge",
    "IPOMean",
    "IPOSum",
    "LossOutput",
    "PairLoss",
    "Pairs",
    "Robust",
    "SLiC",
    "SimPO",
    "Terms",
    "kto_baseline",
    "ld_logps",
    "ld_weights",
    "loss_from_name",
    "segment_sums",
    "wpo_weights",
]
