"""The resident schedule of a preference loss over blocks of whole pairs: three GEMM units whatever the batch size.

dz needs c, c needs both members' sums. So take whole pairs until their rows fill the budget: forward keeps their logits, the sums give c,
the backward reads the kept logits, and the next block reuses the memory. After a block, grad_weight (float32) holds the sum over all
blocks so far of c_s (onehot - p)ᵀ h, and grad_rows its rows' final gradients; only the upstream scalar is missing, which autograd brings.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from llmcore.kernels.linear_logprob import Stats
from llmcore.kernels.linear_logprob_core import ARGMAX, ENTROPY, SUM_SQ
from llmcore.kernels.linear_logprob_inputs import _check_labels, _head
from llmcore.kernels.linear_logprob_ops import _implementation
from llmcore.kernels.preference_layout import _Layout
from torch import Tensor


@dataclasses.dataclass
class _Objective:
    """How sequence sums become a loss: the loss object, who is paired with whom, and the normalisers of the whole batch."""

    loss: Any
    pairs: Tensor | None  # None: unpaired
    desirable: Tensor | None
    z0: Tensor | float
    weights: Tensor | None
    num_pairs: int | None
    num_tokens: int | Tensor | None

    def __call__(self, logp: Tensor, ref: Tensor | None, counts: Tensor, pairs: Tensor | None = None, weights: Tensor | None = None):
        """LossOutput of `pairs` (default: all). For unpaired losses logp, ref, counts and self.desirable cover the same sequences."""
        if self.desirable is not None:
            good, bad = self.desirable.nonzero()[:, 0], (~self.desirable).nonzero()[:, 0]
            assert ref is not None
            return self.loss(logp[good], logp[bad], ref[good], ref[bad], z0=self.z0, num_pairs=self.num_pairs)
        pairs = self.pairs if pairs is None else pairs
        assert pairs is not None
        chosen, rejected = pairs[:, 0], pairs[:, 1]
        refs = (None, None) if ref is None else (ref[chosen], ref[rejected])
        return self.loss(
            logp[chosen],
            logp[rejected],
            *refs,
            counts[chosen],
            counts[rejected],
            weights=self.weights if weights is None else weights,
            num_pairs=self.num_pairs,
            num_tokens=self.num_tokens,
        )


def _wpo(layout: _Layout, logp: Tensor, log_sum_sq: Tensor, pairs: Tensor) -> Tensor:
    mean = layout.sums((logp - log_sum_sq).detach(), weighted=False) / layout.counts.clamp(min=1)
    return (mean[pairs[:, 0]] + mean[pairs[:, 1]]).exp()


class _Precomputed(torch.autograd.Function):
    """The loss, whose gradients for an upstream of 1 are already there. Consumed by the first backward."""

    @staticmethod
    def forward(ctx, loss, hidden, weight, bias, place: Callable[[Tensor], Tensor], grads: list):
        ctx.place, ctx.grads = place, grads
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        if not ctx.grads:
            raise RuntimeError(
                "this loss has been differentiated already and its gradients were handed over; "
                "for a second backward through the same graph use mode='recompute'"
            )
        rows, weight, bias = ctx.grads
        ctx.grads.clear()
        if upstream.device.type != "cpu" or float(upstream) != 1.0:
            for grad in (rows, weight, bias):
                if grad is not None:
                    grad.mul_(upstream.to(grad.dtype))
        return (
            None,
            None if rows is None else ctx.place(rows),
            None if weight is None else weight.to(ctx.dtypes[0]),
            None if bias is None else bias.to(ctx.dtypes[1]),
            None,
            None,
        )


def _components(units: Tensor, num_sequences: int) -> list[list[int]]:
    """Units (pairs, or single sequences) grouped so that units sharing a sequence stay together, in order of first appearance."""
    owner: dict[int, int] = {}
    parent = list(range(len(units)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for i, members in enumerate(units.tolist()):
        for s in members:
            if s in owner:
                parent[root(i)] = root(owner[s])
            owner[s] = i
    groups: dict[int, list[int]] = {}
    for i in range(len(units)):
        groups.setdefault(root(i), []).append(i)
    return list(groups.values())


def _blocks_of_pairs(units: Tensor, counts: Tensor, capacity: int) -> list[list[int]]:
    """Unit numbers of each block: whole components until their rows would exceed `capacity` (a larger component is a block by itself)."""
    blocks: list[list[int]] = []
    filled = capacity + 1
    for group in _components(units, len(counts)):
        rows = int(counts[units[group].unique()].sum())
        if filled + rows > capacity:
            blocks.append([])
            filled = 0
        blocks[-1] += group
        filled += rows
    return blocks


def _pair_blocks(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    layout: _Layout,
    objective: _Objective,
    ref: Tensor | None,
    *,
    shift: int,
    logit_scale: float,
    softcap: float,
    temperature: float,
    want: int,
    wpo: bool,
    capacity: int,
    backend: str,
    stats: Stats,
) -> tuple[Tensor, Any, Tensor, dict[int, Tensor]]:
    """(loss with its gradients attached, merged LossOutput fields, sequence sums, per-position statistics asked for by `want`)."""
    implementation = _implementation(backend)
    device, dtype = hidden.device, torch.float64 if hidden.dtype == torch.float64 else torch.float32
    need = hidden.requires_grad, weight.requires_grad, bias is not None and bias.requires_grad
    units = objective.pairs if objective.pairs is not None else torch.arange(layout.num_sequences, device=device)[:, None]
    sequence, scored = layout.sequence_of(), layout.scored.reshape(-1)
    own_counts = torch.zeros_like(layout.counts).index_add_(0, sequence, scored.long())
    blocks = _blocks_of_pairs(units.cpu(), own_counts.cpu(), capacity)
    num_positions = labels.numel()
    logp = torch.zeros(num_positions, dtype=dtype, device=device)
    extras = {bit: torch.zeros(num_positions, dtype=dtype, device=device) for bit in (ENTROPY, ARGMAX, SUM_SQ) if want & bit}
    grad_weight = torch.zeros(weight.shape, dtype=dtype, device=device) if need[1] else None
    grad_bias = torch.zeros(len(weight), dtype=dtype, device=device) if need[2] else None
    kept_rows, kept_grads, outputs, executed, alive_rows = [], [], [], 0.0, 0

    for block in blocks:
        mine = units[block]
        member = torch.zeros(layout.num_sequences, dtype=torch.bool, device=device)
        member[mine.reshape(-1)] = True
        index = (scored & member[sequence]).nonzero()[:, 0]
        head, flat = _head(hidden, weight, bias, labels, index, shift, 0, logit_scale, softcap, temperature)
        _check_labels(head.labels, 0, len(weight))
        resident_rows = min(capacity, len(index))
        found = implementation.forward(head, want | (SUM_SQ if wpo else 0), resident_rows=resident_rows) if len(index) else None
        if found is not None:
            log_sum = found.sum_exp.double().log()
            logp[index] = (found.target.double() - found.row_max.double() - log_sum).to(dtype)
            if ENTROPY in extras:
                extras[ENTROPY][index] = (log_sum - found.shifted.double() / found.sum_exp.double()).to(dtype)
            if ARGMAX in extras:
                extras[ARGMAX][index] = (found.argmax == head.labels).to(dtype)
            if SUM_SQ in extras:
                extras[SUM_SQ][index] = (found.sum_sq.double().log() - 2 * log_sum).to(dtype)
            executed += len(index)
        sums = layout.sums(logp.view(layout.shape))
        # Coefficients of this block's sequences: autograd through the loss's own coefficients, O(S).
        leaf = sums.detach().requires_grad_()
        if objective.desirable is None:
            factor = _wpo(layout, logp.view(layout.shape), extras[SUM_SQ].view(layout.shape), mine) if wpo else None
            if factor is None and objective.weights is not None:
                factor = objective.weights[block]
            with torch.enable_grad():
                out = objective(leaf, ref, layout.counts, mine, factor)
        else:
            rows = mine[:, 0]
            part = dataclasses.replace(objective, desirable=objective.desirable[rows])
            with torch.enable_grad():
                out = part(leaf[rows], None if ref is None else ref[rows], layout.counts[rows])
        (coef,) = torch.autograd.grad(out.loss, leaf)
        outputs.append((block, out))
        if found is None:
            continue
        row_coef = layout.row_coefficients(coef)[index].to(dtype)
        alive = row_coef.ne(0).nonzero()[:, 0]
        alive_rows += len(alive)
        if len(alive) == 0:
            continue
        if len(alive) < len(index):
            head, flat = dataclasses.replace(head, rows=head.rows[alive], labels=head.labels[alive]), flat[alive]
        row_coef = row_coef[alive]
        grads = implementation.backward(
            head,
            found.lse[alive].to(dtype),
            found.target[alive],
            row_coef,
            row_coef,
            None,
            resident=found.resident if resident_rows else None,
            offsets=found.offsets,
            slots=torch.where(alive < resident_rows, alive, -1) if resident_rows else None,
            need_hidden=need[0],
            need_weight=need[1],
            need_bias=need[2],
            grad_weight_out=grad_weight,
        )
        executed += len(alive) * (float(need[0]) + float(need[1])) + float((alive >= resident_rows).sum())
        if need[0]:
            kept_rows.append(flat)
            kept_grads.append(grads.hidden)
        if grad_bias is not None:
            grad_bias += grads.bias.to(dtype)

    grad_rows = target_rows = None
    if need[0]:
        grad_rows = torch.cat(kept_grads) if kept_grads else torch.zeros(0, hidden.shape[-1], dtype=dtype, device=device)
        target_rows = torch.cat(kept_rows) if kept_rows else torch.zeros(0, dtype=torch.int64, device=device)
    shape, out_dtype = hidden.shape, hidden.dtype

    def place(rows: Tensor) -> Tensor:
        assert target_rows is not None
        full = torch.zeros(shape, dtype=out_dtype, device=device)
        full.view(-1, shape[-1]).index_copy_(0, target_rows, rows.to(out_dtype))
        return full

    order = torch.tensor([i for block, _ in outputs for i in block], device=device)
    value = torch.stack([out.loss.detach() for _, out in outputs]).sum() if outputs else torch.zeros((), dtype=dtype, device=device)
    loss = _Precomputed.apply(value, hidden, weight, bias, place, [grad_rows, grad_weight, grad_bias])
    stats.gemm_units, stats.rows_backward = executed / max(int(scored.sum()), 1), alive_rows
    stats.mode = "resident" if all(int(own_counts[units[b].unique()].sum()) <= capacity for b in blocks) else "mixed"
    return (
        loss,
        (order, [out for _, out in outputs]),
        layout.sums(logp.view(layout.shape)),
        {b: v.view(layout.shape) for b, v in extras.items()},
    )


def _merge_outputs(parts: tuple[Tensor, list], value: Tensor, loss: Any) -> Any:
    """One LossOutput-like record of all blocks, its pairs back in input order."""
    order, outs = parts
    merged = dataclasses.replace(outs[0], loss=value)
    if loss.unpaired:
        return dataclasses.replace(merged, clamped=sum(o.clamped for o in outs))
    back = order.argsort()
    fields = {
        name: torch.cat([getattr(o, name).detach() for o in outs])[back]
        for name in ("per_pair", "coef_w", "coef_l", "rewards_chosen", "rewards_rejected", "grad_w", "grad_l")
    }
    return dataclasses.replace(merged, **fields, clamped=sum(o.clamped for o in outs))
