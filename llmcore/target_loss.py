"""The scalar whose gradient is followed: a function of the logits that predict one token, formed in float64.

    margin = z_y - log Σ_{v≠y} exp z_v       ce = log(1 + exp(-margin))       d ce = -(1 - p_y) d margin,  1 - p_y = sigmoid(-margin)

A gradient that enters the decoder is Wᵀ(e_y - q), q the softmax over the other tokens: a difference of vectors close to each other when
the model is sure. Logits of size 20 in float32 give q a relative error of 1e-6 to 1e-5, which every bin inherits, so the head and the
softmax of the few target rows run in float64: 2 · V · D FLOP a row, twice, over the weight in blocks of 8 MB.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

# B sequences, T targets, V vocabulary, D hidden size

LOSSES = ("ce", "margin", "logit", "ce_restricted")
_BLOCK_NUMBERS = 1 << 20


class _ExactLinear(torch.autograd.Function):
    """hidden (..., D) times weight (V, D) in float64, differentiable in hidden; the weight is widened a block of rows at a time."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight, ctx.dtype = weight, hidden.dtype
        rows = hidden.reshape(-1, hidden.shape[-1]).double()
        logits = rows.new_empty(len(rows), len(weight))
        for start, block in _wide_blocks(weight):
            torch.mm(rows, block.T, out=logits[:, start : start + len(block)])
        if bias is not None:
            logits += bias.double()
        return logits.view(*hidden.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        rows = grad.reshape(-1, grad.shape[-1])
        total = rows.new_zeros(len(rows), ctx.weight.shape[1])
        for start, block in _wide_blocks(ctx.weight):
            total.addmm_(rows[:, start : start + len(block)], block)
        return total.to(ctx.dtype).view(*grad.shape[:-1], -1), None, None


def _wide_blocks(weight: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows in float64), all in one buffer that is used again and again."""
    count = max(1, _BLOCK_NUMBERS // weight.shape[1])
    buffer = weight.new_empty(min(count, len(weight)), weight.shape[1], dtype=torch.float64)
    for start in range(0, len(weight), count):
        rows = weight[start : start + count]
        yield start, buffer[: len(rows)].copy_(rows)


def exact_logits(head: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
    """Forward hook of a language model's head: its output in float64 where it is a plain linear layer and the device has float64."""
    if type(head) is not torch.nn.Linear or output.device.type not in ("cpu", "cuda") or not head.weight.is_floating_point():
        return None
    return _ExactLinear.apply(args[0], head.weight, head.bias)


class TargetLoss(NamedTuple):
    """scalar: what goes backward, summed over the batch. value (B,): the loss itself. one_minus_p (B, T). single: T is 1, and for "ce" the
    scalar is -margin, whose bins the caller multiplies by one_minus_p, so that nothing underflows when the model is sure."""

    scalar: Tensor
    value: Tensor
    one_minus_p: Tensor
    single: bool


def target_loss(logits: Tensor, targets: Tensor, loss: str, candidates: Tensor | None = None) -> TargetLoss:
    """logits (B, T, V) that predict targets (B, T). loss: one of LOSSES; "ce_restricted" over the token ids `candidates`, which hold every
    target. Several targets of a sequence are summed."""
    if logits.dtype != torch.float64:
        logits = logits.float()
    if candidates is not None:
        targets = (targets[..., None] == candidates).int().argmax(-1)
        logits = logits[..., candidates]
    chosen = logits.gather(-1, targets[..., None])[..., 0]
    others = logits.scatter(-1, targets[..., None], -torch.inf).logsumexp(-1)
    margin = chosen - others
    name = "ce" if loss == "ce_restricted" else loss
    with torch.no_grad():
        value = {"ce": torch.nn.functional.softplus(-margin), "margin": margin, "logit": chosen}[name].sum(-1)
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"the logits at the target position are not finite (loss {value.tolist()}); use a wider dtype")
        one_minus_p = torch.sigmoid(-margin).float()
    single = targets.shape[1] == 1
    scalar = {"logit": chosen, "margin": margin, "ce": -margin if single else torch.nn.functional.softplus(-margin)}[name].sum()
    return TargetLoss(scalar, value.float(), one_minus_p, single)
