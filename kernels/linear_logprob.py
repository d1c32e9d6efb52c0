"""Log-probabilities of given tokens straight from hidden states and the output projection, without the logit matrix.

    a_tv = h_t · w_v + b_v        z_tv = cap_κ(s · a_tv) / τ,  cap_κ(x) = κ tanh(x / κ)        logp_t = z_t,y(t) - log Σ_v exp z_tv

Not materialised: the N × V logits, their softmax and their gradient. At N = 8192, V = 128256 the bfloat16 logits alone are 2.1 GB and an
eager float32 log-softmax holds five such matrices; here the forward keeps one float per row. Rows whose label is ignored are dropped before
any GEMM, rows whose upstream gradient is zero before the backward ones, and a frozen head or hidden state costs no gradient of it.

Bound by arithmetic: one GEMM unit U = 2 N D V FLOP with N the scored rows. Score only 1 U; frozen head 2 U; both gradients 4 U recomputing
the logits in backward, 3 U with them kept ("resident", N · V · 2 bytes for 16-bit operands). Minimum time = units · U / measured GEMM rate;
below about 256 rows the weight's bytes / bandwidth. Reductions accumulate in float32 (float64 for float64), 16-bit logits are never rounded
before the softmax, and each gradient is rounded once. A row's result does not depend on the other rows of the batch, bit for bit.

The online reduction over a projected vocabulary follows Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models" (2024).
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import math
import weakref
from types import ModuleType
from typing import Any

import torch
from llmcore.kernels import backends
from llmcore.kernels.linear_logprob_core import ARGMAX, ENTROPY, MEAN, SUM_SQ, VOCAB_BLOCK, Head, all_reduce_statistics, untouched_zeros
from torch import Tensor

# N scored rows (tokens), V vocabulary, D hidden, B sequences, T positions

backends.declare("linear_logprob", cpp="llmcore::linear_logprob_fwd", triton=None, torch=None)

OUTPUTS = ("logp", "lse", "entropy", "target_logit", "mean_logit", "is_top1", "log_sum_sq", "kl_full")
DIFFERENTIABLE = ("logp", "lse", "entropy", "target_logit", "kl_full")
AUTO_BUDGET = 1 << 30  # bytes that mode="auto" may keep between forward and backward when no memory_budget is given


@dataclasses.dataclass
class Stats:
    """What a call did; the backward adds its share when it runs. Fields that need the data are None under torch.compile.

    rows_scored / rows_total: labels scored, labels given. rows_backward: rows that had a gradient. mode: "score" (no gradient asked for),
    "recompute", "resident", or "mixed" (the budget held some rows). scratch_bytes: what the call kept for backward plus the upper
    bound of its temporaries.
    gemm_units: multiples of 2·N·D·V FLOP executed so far. kept_tile_fraction, dropped_mass: of grad_filter (1 and 0 when off;
    dropped_mass is the largest probability any row lost). backend: what served.
    """

    rows_scored: int | None
    rows_total: int
    mode: str
    scratch_bytes: int
    backend: str
    gemm_units: float = 0.0
    rows_backward: int | None = None
    kept_tile_fraction: float = 1.0
    dropped_mass: float = 0.0


@dataclasses.dataclass
class LinearLogprob:
    """Per-label results, shaped like `labels`, float32 (float64 for float64 inputs), 0 (False) at labels that are not scored; None
    when not requested."""

    logp: Tensor | None
    lse: Tensor | None
    entropy: Tensor | None
    target_logit: Tensor | None
    mean_logit: Tensor | None
    is_top1: Tensor | None
    log_sum_sq: Tensor | None
    kl_full: Tensor | None
    stats: Stats


_live_stats: weakref.WeakValueDictionary[int, Stats] = weakref.WeakValueDictionary()
_stats_ids = itertools.count(1)  # 0 stands for "nobody listens"


# ---- reference ---------------------------------------------------------------------------------------------------------------------------


def linear_logprob_reference(
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    shift: int = 0,
    cu_seqlens: Tensor | None = None,
    logit_scale: float | None = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    outputs: tuple[str, ...] = ("logp",),
    label_mask: Tensor | None = None,
    ref: tuple[Tensor, ...] | None = None,
    vocab_range: tuple[int, int] | None = None,
) -> LinearLogprob:
    """Plain PyTorch: the whole logit matrix, differentiable any number of times, any device and float dtype.

    Arguments and results as in `fused_linear_logprob`. 16-bit inputs are widened to float32 before the product.
    """
    scored = _scored(labels, label_mask, cu_seqlens, ignore_index, shift)
    start = vocab_range[0] if vocab_range is not None else 0

    def logits(hidden: Tensor, head: Tensor, head_bias: Tensor | None) -> Tensor:
        dtype = torch.float64 if torch.float64 in (hidden.dtype, head.dtype) else torch.float32
        z = hidden.reshape(-1, hidden.shape[-1]).to(dtype) @ head.to(dtype).T
        if head_bias is not None:
            z = z + head_bias.to(dtype)
        z = z * (1.0 if logit_scale is None else logit_scale)
        if softcap is not None:
            z = softcap * torch.tanh(z / softcap)
        return z / temperature

    def place(values: Tensor) -> Tensor:  # row i predicts label i + shift
        moved = values if shift == 0 else torch.nn.functional.pad(values, (shift, 0))[: values.shape[0]]
        return torch.where(scored, moved.reshape(labels.shape), torch.zeros((), dtype=values.dtype, device=values.device))

    z = logits(hidden_states, weight, bias)
    log_p = z.log_softmax(dim=-1)
    flat = torch.where(scored, labels, start).reshape(-1).long()
    flat = flat if shift == 0 else torch.nn.functional.pad(flat[shift:], (0, min(shift, len(flat))), value=start)
    local = flat - start
    owned = (local >= 0) & (local < weight.shape[0])
    target = torch.where(owned, z.gather(1, local.clamp(0, weight.shape[0] - 1)[:, None])[:, 0], 0.0)
    lse = z.logsumexp(dim=-1)
    picked = log_p.gather(1, local.clamp(0, weight.shape[0] - 1)[:, None])[:, 0]
    result = dict.fromkeys(OUTPUTS)
    result["logp"] = place(torch.where(owned, picked, -lse))
    if "lse" in outputs:
        result["lse"] = place(lse)
    if "entropy" in outputs:
        result["entropy"] = place(-(log_p.exp() * log_p).sum(dim=-1))
    if "target_logit" in outputs:
        result["target_logit"] = place(target)
    if "mean_logit" in outputs:
        result["mean_logit"] = place(z.mean(dim=-1)).detach()
    if "is_top1" in outputs:
        top = z.max(dim=-1, keepdim=True).values
        first = torch.where(z == top, torch.arange(z.shape[1], device=z.device), z.shape[1]).amin(dim=1)
        result["is_top1"] = place((first == local).to(z.dtype)).bool()
    if "log_sum_sq" in outputs:
        result["log_sum_sq"] = place((2 * log_p).logsumexp(dim=-1)).detach()
    if "kl_full" in outputs:
        log_q = logits(*_ref_head(ref)).log_softmax(dim=-1).detach()
        result["kl_full"] = place((log_p.exp() * (log_p - log_q)).sum(dim=-1))
    if "logp" not in outputs:
        result["logp"] = None
    stats = Stats(
        None if torch.compiler.is_compiling() else int(scored.sum()),
        labels.numel(),
        "reference",
        5 * z.numel() * z.element_size(),
        "reference",
        1.0,
    )
    return LinearLogprob(**result, stats=stats)  # type: ignore[arg-type]


# ---- from the reference to the kernel ----------------------------------------------------------------------------------------------------
#
# Forward, over vocabulary tiles: m' = max(m, m_tile), s' = s e^{m-m'} + Σ_tile e^{z-m'}; second-order sums carry the squared rescale, and
# T = Σ e^{z-m}(z-m) moves as T' = e^{m-m'} (T + (m-m') s), which keeps the entropy log s - T/s free of the cancellation of lse - E[z].
# Invariant after tile j: m = max and s = Σ exp(z - m) over the columns of tiles <= j; the target logit comes from the same accumulator.
#
# Backward: with upstream g for logp, l for lse, t for target_logit, e for entropy (∂entropy/∂z_v = -p_v (log p_v + entropy)),
#     dz_v = (g + t) 1[v=y] - p_v (g - l + e (entropy - lse) + e z_v)
# that is two coefficients and a slope per row, whatever the mixture of losses on top.


def row_coefficients(
    lse: Tensor,
    entropy: Tensor | None,
    grad_logp: Tensor | None,
    grad_lse: Tensor | None,
    grad_target: Tensor | None,
    grad_entropy: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(target_coef, prob_coef, slope) of the backward from the upstream gradients; None stands for zero."""
    zero = torch.zeros_like(lse)
    grad_logp = zero if grad_logp is None else grad_logp
    target_coef = grad_logp if grad_target is None else grad_logp + grad_target
    prob_coef = grad_logp if grad_lse is None else grad_logp - grad_lse
    if grad_entropy is None:
        return target_coef, prob_coef, None
    assert entropy is not None, "a gradient of the entropy needs the entropy"
    return target_coef, prob_coef + grad_entropy * (entropy - lse), grad_entropy


def _scored(labels: Tensor, label_mask: Tensor | None, cu_seqlens: Tensor | None, ignore_index: int, shift: int) -> Tensor:
    """Which labels are scored: not ignored, and with a predicting position inside their own sequence."""
    scored = label_mask.clone() if label_mask is not None else labels != ignore_index
    if shift and cu_seqlens is None:
        scored = scored & (torch.arange(labels.shape[-1], device=labels.device) >= shift)
    elif shift:
        assert cu_seqlens is not None
        position = torch.arange(labels.numel(), device=labels.device)
        cu = cu_seqlens.to(device=labels.device, dtype=torch.int64)
        begin = cu[torch.searchsorted(cu, position, right=True) - 1]
        scored = scored & (position - begin >= shift).reshape(labels.shape)
    return scored


def _rows_of(hidden: Tensor) -> tuple[Tensor, int, int]:
    """(hidden2d, T, step): flat position b·T + t of a (…, T, D) tensor is row b·step + t of hidden2d. A sequence slice is not copied."""
    size = hidden.shape[-1]
    if hidden.dim() == 2:
        return (hidden if hidden.stride(-1) == 1 and hidden.stride(0) >= size else hidden.contiguous()), hidden.shape[0], hidden.shape[0]
    if hidden.dim() == 3 and hidden.stride(2) == 1 and hidden.stride(1) >= size and hidden.stride(0) % hidden.stride(1) == 0:
        batch, length, pitch = hidden.shape[0], hidden.shape[1], hidden.stride(1)
        step = hidden.stride(0) // pitch
        if step >= length and batch and length:
            return hidden.as_strided(((batch - 1) * step + length, size), (pitch, 1)), length, step
    flat = hidden.contiguous().view(-1, size)
    return flat, max(len(flat), 1), max(len(flat), 1)


def _implementation(backend: str) -> ModuleType:
    return importlib.import_module(f"llmcore.kernels.linear_logprob_{backend}")


def _group(name: str) -> Any:
    from torch.distributed.distributed_c10d import _resolve_process_group

    return _resolve_process_group(name)


def _head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    scored_index: Tensor,
    shift: int,
    vocab_start: int,
    logit_scale: float,
    softcap: float,
    temperature: float,
) -> tuple[Head, Tensor]:
    """The call's operands, and the flat hidden row of each scored label."""
    hidden2d, length, step = _rows_of(hidden)
    flat = scored_index - shift
    rows = flat if step == length else flat // length * step + flat % length
    picked = labels.reshape(-1).index_select(0, scored_index).long()
    weight = weight if weight.stride(-1) == 1 else weight.contiguous()
    return Head(hidden2d, rows, weight, bias, picked, vocab_start, logit_scale, softcap, temperature), flat


def _check_labels(labels: Tensor, low: int, high: int | None) -> None:
    if labels.numel() == 0:
        return
    bad = (labels < low) if high is None else (labels < low) | (labels >= high)
    if labels.device.type != "cpu":
        torch._assert_async(~bad.any(), "labels out of the vocabulary's range")
    elif bool(bad.any()):
        at = int(bad.nonzero()[0, 0])
        limit = "" if high is None else f" and below the vocabulary size {high}"
        raise ValueError(
            f"labels must be at least {low}{limit} or equal ignore_index, got {int(labels[at])} (scored label number {at}); mark positions "
            "that are not scored with ignore_index or label_mask"
        )


# ---- operators ---------------------------------------------------------------------------------------------------------------------------
#
# One opaque operator per direction with data-independent output shapes: compaction happens inside, so torch.compile sees no
# data-dependent size.


@torch.library.custom_op("llmcore::linear_logprob", mutates_args=())
def _op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    label_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    accumulate_into: Tensor | None,
    ignore_index: int,
    shift: int,
    logit_scale: float,
    softcap: float,
    temperature: float,
    want: int,
    capacity: int,
    direction: bool,
    grad_filter: float,
    vocab_start: int,
    vocab_total: int,
    group: str,
    backend: str,
    record: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    scored_index = _scored(labels, label_mask, cu_seqlens, ignore_index, shift).reshape(-1).nonzero()[:, 0]
    head, _ = _head(hidden, weight, bias, labels, scored_index, shift, vocab_start, logit_scale, softcap, temperature)
    _check_labels(head.labels, 0, vocab_total if vocab_total >= 0 else None)
    num_rows, dtype = len(scored_index), head.stat_dtype
    resident_rows = min(num_rows, capacity)

    def full(values: Tensor | None, of: torch.dtype = dtype) -> Tensor:
        if values is None:
            return labels.new_empty(0, dtype=of)
        return labels.new_zeros(labels.numel(), dtype=of).index_copy_(0, scored_index, values.to(of)).view(labels.shape)

    if num_rows == 0:

        def zeros(asked: int = 1, of: torch.dtype = dtype) -> Tensor:
            return labels.new_zeros(labels.shape if asked else (0,), dtype=of)

        resident, offsets = _resident_like(weight, hidden, capacity)
        return (
            zeros(), zeros(), zeros(), zeros(want & ENTROPY), zeros(want & MEAN), zeros(want & ARGMAX, torch.bool), zeros(want & SUM_SQ),
            resident, offsets, labels.new_zeros(labels.numel() if direction else 0, hidden.shape[-1], dtype=dtype),
            labels.new_zeros(labels.numel() if grad_filter else 0, -(-len(weight) // VOCAB_BLOCK), dtype=torch.float32),
        )  # fmt: skip

    stats = _implementation(backend).forward(head, want, resident_rows=resident_rows, direction=direction, tiles=grad_filter > 0)
    factor = None
    if group:
        owned = ((head.labels >= vocab_start) & (head.labels < vocab_start + len(weight))).to(dtype)
        factor = all_reduce_statistics(stats, _group(group))
        import torch.distributed as dist

        dist.all_reduce(owned, dist.ReduceOp.SUM, _group(group))
        if not bool((owned == 1).all()):
            at = int((owned != 1).nonzero()[0, 0])
            raise ValueError(
                f"labels must each be owned by exactly one rank's vocab_range, label {int(head.labels[at])} is owned by {int(owned[at])}"
            )
    lse = stats.lse
    log_sum = stats.sum_exp.double().log()
    # target - m and log s are each exact to half an ulp; going through the rounded lse would cost two more.
    logp = (stats.target.double() - stats.row_max.double()) - log_sum
    entropy = None if stats.shifted is None else log_sum - stats.shifted.double() / stats.sum_exp.double()
    total = vocab_total if vocab_total > 0 else len(weight)
    mean = None if stats.sum_z is None else stats.sum_z.double() / total
    sum_sq = None if stats.sum_sq is None else stats.sum_sq.double().log() - 2 * log_sum
    top1 = None if stats.argmax is None else stats.argmax == head.labels

    resident, offsets = stats.resident, stats.offsets
    if resident is None or len(resident) != capacity:  # shapes promised to the compiler do not depend on the data
        kept, kept_offsets = resident, offsets
        resident, offsets = _resident_like(weight, hidden, capacity)
        if kept is not None:
            resident[:resident_rows].copy_(kept)
            if kept_offsets is not None:
                offsets[:resident_rows].copy_(kept_offsets)
    elif offsets is None:
        offsets = labels.new_empty(0, 0, dtype=torch.float32)
    row_direction = labels.new_empty(0, hidden.shape[-1], dtype=dtype)
    if stats.direction is not None:
        scale = (1 / stats.sum_exp) if factor is None else factor / stats.sum_exp
        row_direction = _pad_rows(stats.direction.mul_(scale[:, None]), labels.numel())
    tile_lse = labels.new_empty(0, -(-len(weight) // VOCAB_BLOCK), dtype=torch.float32)
    if stats.tile_lse is not None:
        tile_lse = _pad_rows(stats.tile_lse, labels.numel())

    listener = _live_stats.get(record)
    if listener is not None:
        listener.gemm_units += 2.0 if direction else 1.0
    return (
        full(logp),
        full(lse),
        full(stats.target),
        full(entropy),
        full(mean),
        full(top1, torch.bool),
        full(sum_sq),
        resident,
        offsets,
        row_direction,
        tile_lse,
    )


def _pad_rows(x: Tensor, rows: int) -> Tensor:
    return x if len(x) == rows else torch.nn.functional.pad(x, (0, 0, 0, rows - len(x)))


def _resident_like(weight: Tensor, hidden: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    half = hidden.dtype.itemsize == 2 and weight.dtype.itemsize == 2
    dtype = torch.bfloat16 if half else torch.float64 if torch.float64 in (hidden.dtype, weight.dtype) else torch.float32
    tiles = (weight.shape[0] + VOCAB_BLOCK - 1) // VOCAB_BLOCK
    resident = weight.new_empty(capacity, weight.shape[0], dtype=dtype)
    return resident, weight.new_empty(capacity if half else 0, tiles if half else 0, dtype=torch.float32)


@_op.register_fake
def _(
    hidden,
    weight,
    bias,
    labels,
    label_mask,
    cu_seqlens,
    accumulate_into,
    ignore_index,
    shift,
    logit_scale,
    softcap,
    temperature,
    want,
    capacity,
    direction,
    grad_filter,
    vocab_start,
    vocab_total,
    group,
    backend,
    record,
):
    dtype = torch.float64 if torch.float64 in (hidden.dtype, weight.dtype) else torch.float32
    tiles = (weight.shape[0] + VOCAB_BLOCK - 1) // VOCAB_BLOCK

    def full(asked: bool, of: torch.dtype = dtype) -> Tensor:
        return labels.new_empty(labels.shape if asked else (0,), dtype=of)

    resident, offsets = _resident_like(weight, hidden, capacity)
    return (
        full(True),
        full(True),
        full(True),
        full(bool(want & ENTROPY)),
        full(bool(want & MEAN)),
        full(bool(want & ARGMAX), torch.bool),
        full(bool(want & SUM_SQ)),
        resident,
        offsets,
        labels.new_empty(labels.numel() if direction else 0, hidden.shape[-1], dtype=dtype),
        labels.new_empty(labels.numel() if grad_filter > 0 else 0, tiles, dtype=torch.float32),
    )


@torch.library.custom_op("llmcore::linear_logprob_grad", mutates_args=())
def _grad_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    label_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    lse: Tensor,
    target: Tensor,
    target_coef: Tensor,
    prob_coef: Tensor,
    slope: Tensor | None,
    resident: Tensor,
    offsets: Tensor,
    row_direction: Tensor,
    tile_lse: Tensor,
    ignore_index: int,
    shift: int,
    logit_scale: float,
    softcap: float,
    temperature: float,
    grad_filter: float,
    vocab_start: int,
    group: str,
    backend: str,
    record: int,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients(
        None,
        hidden,
        weight,
        bias,
        labels,
        label_mask,
        cu_seqlens,
        lse,
        target,
        target_coef,
        prob_coef,
        slope,
        resident,
        offsets,
        row_direction,
        tile_lse,
        ignore_index,
        shift,
        logit_scale,
        softcap,
        temperature,
        grad_filter,
        vocab_start,
        group,
        backend,
        record,
        need_hidden,
        need_weight,
        need_bias,
    )


def _gradients(
    accumulate_into: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    label_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    lse: Tensor,
    target: Tensor,
    target_coef: Tensor,
    prob_coef: Tensor,
    slope: Tensor | None,
    resident: Tensor,
    offsets: Tensor,
    row_direction: Tensor,
    tile_lse: Tensor,
    ignore_index: int,
    shift: int,
    logit_scale: float,
    softcap: float,
    temperature: float,
    grad_filter: float,
    vocab_start: int,
    group: str,
    backend: str,
    record: int,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    scored_index = _scored(labels, label_mask, cu_seqlens, ignore_index, shift).reshape(-1).nonzero()[:, 0]
    num_scored = len(scored_index)

    def take(x: Tensor) -> Tensor:
        return x.reshape(-1).index_select(0, scored_index)

    coefs = [take(target_coef), take(prob_coef)] + ([] if slope is None else [take(slope)])
    alive = torch.stack(coefs).ne(0).any(dim=0).nonzero()[:, 0]  # NaN coefficients stay and propagate
    kept_index = scored_index[alive]
    head, flat = _head(hidden, weight, bias, labels, kept_index, shift, vocab_start, logit_scale, softcap, temperature)
    row_lse, row_target = take(lse)[alive], take(target)[alive]
    coefs = [c[alive] for c in coefs]
    num_rows, dtype = len(alive), head.stat_dtype
    none = hidden.new_empty(0)
    listener = _live_stats.get(record)
    if listener is not None:
        listener.rows_backward = num_rows
    share = num_rows / max(num_scored, 1)

    grad_hidden = grad_weight = grad_bias = None
    if row_direction.shape[0]:
        # Frozen head: dH = target_coef · (da/dz)_y · w_y - prob_coef · Σ_v p_v (da/dz)_v w_v, the sum accumulated by the forward.
        local = head.labels - vocab_start
        owned = (local >= 0) & (local < len(weight))
        factor = logit_scale / temperature
        chain = factor * (1 - (row_target.to(dtype) * (temperature / softcap)).square()) if softcap else torch.full_like(row_target, factor)
        picked = weight.index_select(0, local.clamp(0, len(weight) - 1)).to(dtype)
        grad_rows = picked.mul_((torch.where(owned, coefs[0], 0.0) * chain)[:, None]).addcmul_(
            coefs[1][:, None], row_direction[alive], value=-1.0
        )
    elif num_rows:
        position = alive if resident.shape[0] else None
        slots = None if position is None else torch.where(position < resident.shape[0], position, -1)
        keep = None
        if grad_filter > 0:
            keep, dropped = _filter_tiles(tile_lse[alive], row_lse, coefs, head, grad_filter)
            share *= float(keep.float().mean())
            if listener is not None:
                listener.kept_tile_fraction, listener.dropped_mass = float(keep.float().mean()), float(dropped.max())
        grads = _implementation(backend).backward(
            head,
            row_lse,
            row_target,
            coefs[0],
            coefs[1],
            coefs[2] if slope is not None else None,
            resident=resident if resident.shape[0] else None,
            offsets=offsets if offsets.shape[0] else None,
            slots=slots,
            keep=keep,
            need_hidden=need_hidden,
            need_weight=need_weight,
            need_bias=need_bias,
            grad_weight_out=accumulate_into if need_weight else None,
        )
        grad_rows, grad_weight, grad_bias = grads.hidden, grads.weight, grads.bias
        if listener is not None:
            recomputed = 1.0 if slots is None else float((slots < 0).sum()) / num_rows
            listener.gemm_units += share * (
                float(need_hidden) + float(need_weight) + (recomputed if need_hidden or need_weight or need_bias else 0.0)
            )
    else:
        grad_rows = torch.zeros(0, hidden.shape[-1], dtype=dtype, device=hidden.device)
    if need_hidden:
        if group:
            import torch.distributed as dist

            dist.all_reduce(grad_rows, dist.ReduceOp.SUM, _group(group))
        if num_rows == labels.numel():  # every row, in order
            grad_hidden = grad_rows.to(hidden.dtype).view(hidden.shape)
        else:
            grad_hidden = torch.zeros(hidden.shape, dtype=hidden.dtype, device=hidden.device)
            grad_hidden.view(-1, hidden.shape[-1]).index_copy_(0, flat, grad_rows.to(hidden.dtype))
    if need_weight and grad_weight is None and accumulate_into is None:
        grad_weight = untouched_zeros(weight.shape, weight.dtype, weight.device)
    if need_bias and grad_bias is None:
        assert bias is not None
        grad_bias = torch.zeros_like(bias)
    return (
        none if grad_hidden is None else grad_hidden,
        none.clone() if grad_weight is None else grad_weight,
        none.clone() if grad_bias is None else grad_bias,
    )


def _filter_tiles(tile_lse: Tensor, lse: Tensor, coefs: list[Tensor], head: Head, bound: float) -> tuple[Tensor, Tensor]:
    """Blocks each row must keep, and the probability it gives up: its lightest blocks go while their mass stays within
    bound · min(1, mean|c| / |c_row|)."""
    weight_of_row = torch.stack(coefs).abs().amax(dim=0)
    allowed = bound * (weight_of_row.mean() / weight_of_row).clamp(max=1.0)
    mass = (tile_lse.double() - lse[:, None].double()).exp()
    own = ((head.labels - head.vocab_start) // VOCAB_BLOCK)[:, None]
    inside = (own >= 0) & (own < mass.shape[1])
    order = torch.where(torch.arange(mass.shape[1], device=mass.device) == own, torch.inf, mass) if bool(inside.any()) else mass
    ranked, by = order.sort(dim=1)
    droppable = ranked.cumsum(dim=1) <= allowed[:, None]
    keep = torch.ones_like(droppable).scatter_(1, by, ~droppable)
    return keep, torch.where(keep, 0.0, mass).sum(dim=1)


@_grad_op.register_fake
def _(
    hidden,
    weight,
    bias,
    labels,
    label_mask,
    cu_seqlens,
    lse,
    target,
    target_coef,
    prob_coef,
    slope,
    resident,
    offsets,
    row_direction,
    tile_lse,
    ignore_index,
    shift,
    logit_scale,
    softcap,
    temperature,
    grad_filter,
    vocab_start,
    group,
    backend,
    record,
    need_hidden,
    need_weight,
    need_bias,
):
    return (
        torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device) if need_hidden else hidden.new_empty(0),
        torch.empty(weight.shape, dtype=weight.dtype, device=weight.device) if need_weight else hidden.new_empty(0),
        torch.empty_like(bias) if need_bias else hidden.new_empty(0),
    )


def _setup_context(ctx, inputs, output):
    (
        hidden,
        weight,
        bias,
        labels,
        label_mask,
        cu_seqlens,
        accumulate_into,
        ignore_index,
        shift,
        logit_scale,
        softcap,
        temperature,
        _want,
        _capacity,
        _direction,
        grad_filter,
        vocab_start,
        _vocab_total,
        group,
        backend,
        record,
    ) = inputs
    _logp, lse, target, entropy, _mean, _top1, _sum_sq, resident, offsets, row_direction, tile_lse = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        hidden, weight, bias, labels, label_mask, cu_seqlens, lse, target, entropy, resident, offsets, row_direction, tile_lse
    )
    # Not a saved tensor: gradient accumulation changes the buffer between forward and backward on purpose.
    ctx.accumulate_into = accumulate_into
    ctx.options = (ignore_index, shift, logit_scale, softcap, temperature, grad_filter, vocab_start, group, backend, record)


def _backward(ctx, grad_logp, grad_lse, grad_target, grad_entropy, *_others):
    hidden, weight, bias, labels, label_mask, cu_seqlens, lse, target, entropy, resident, offsets, row_direction, tile_lse = (
        ctx.saved_tensors
    )
    coefs = row_coefficients(lse, entropy if grad_entropy is not None else None, grad_logp, grad_lse, grad_target, grad_entropy)
    if row_direction.shape[0] and coefs[2] is not None:
        raise RuntimeError("internal: the frozen head's direction cannot serve a gradient of the entropy")
    need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
    need_bias = need_bias and bias is not None
    operands = (
        hidden,
        weight,
        bias,
        labels,
        label_mask,
        cu_seqlens,
        lse,
        target,
        *coefs,
        resident,
        offsets,
        row_direction,
        tile_lse,
        *ctx.options,
        need_hidden,
        need_weight,
        need_bias,
    )
    if ctx.accumulate_into is None:
        grad_hidden, grad_weight, grad_bias = _grad_op(*operands)
    else:
        if torch.is_grad_enabled():
            _no_second_derivative(ctx)
        grad_hidden, grad_weight, grad_bias = _gradients(ctx.accumulate_into, *operands)
    return (
        grad_hidden if need_hidden else None,
        grad_weight if need_weight and ctx.accumulate_into is None else None,
        grad_bias if need_bias else None,
        *[None] * 18,
    )


_op.register_autograd(_backward, setup_context=_setup_context)


def _no_second_derivative(ctx, *grads):
    raise RuntimeError(
        "fused_linear_logprob has no second derivative; use backend='reference' (linear_logprob_reference) for create_graph=True"
    )


_grad_op.register_autograd(_no_second_derivative)


# ---- KL divergence over the whole vocabulary
# ----------------------------------------------------------------------------------------------
#
# KL(p || q) = Σ_v p_v (z_v - z'_v) - lse + lse'. The weighted sum is carried online like the others, so p == q gives exactly 0.


@torch.library.custom_op("llmcore::linear_kl", mutates_args=())
def _kl_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    scored: Tensor,
    shift: int,
    logit_scale: float,
    softcap: float,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    index = scored.reshape(-1).nonzero()[:, 0]
    outs = [torch.zeros(scored.numel(), dtype=torch.float64, device=hidden.device) for _ in range(3)]
    dtype = torch.float32
    for begin, end, tiles in _kl_blocks(
        hidden, weight, bias, ref_hidden, ref_weight, ref_bias, scored, index, shift, logit_scale, softcap, temperature
    ):
        state = None
        for _start, _w, _h, p_logits, q_logits in tiles:
            dtype = p_logits.dtype
            z, other, gap = p_logits.double(), q_logits.double(), (p_logits - q_logits).double()
            m, n = z.amax(dim=1), other.amax(dim=1)
            e = (z - m[:, None]).exp()
            piece = (m, e.sum(dim=1), (e * gap).sum(dim=1), n, (other - n[:, None]).exp().sum(dim=1))
            if state is not None:
                m, n = torch.maximum(m, state[0]), torch.maximum(n, state[3])
                a, b, c, d = (state[0] - m).exp(), (piece[0] - m).exp(), (state[3] - n).exp(), (piece[3] - n).exp()
                piece = (m, a * state[1] + b * piece[1], a * state[2] + b * piece[2], n, c * state[4] + d * piece[4])
            state = piece
        assert state is not None
        m, s, weighted, n, r = state
        lse, ref_lse = m + s.log(), n + r.log()
        for into, value in zip(outs, (weighted / s - lse + ref_lse, lse, ref_lse), strict=True):
            into[index[begin:end]] = value[: end - begin]
    if not len(index):
        dtype = torch.float64 if torch.float64 in (hidden.dtype, weight.dtype) else torch.float32
    kl, lse, ref_lse = outs
    return kl.to(dtype).view(scored.shape), lse.view(scored.shape), ref_lse.view(scored.shape)


def _kl_blocks(hidden, weight, bias, ref_hidden, ref_weight, ref_bias, scored, index, shift, logit_scale, softcap, temperature):
    """Row blocks, each with an iterator over vocabulary chunks of (start, weight chunk, hidden block, logits, reference logits)."""
    from llmcore.kernels import linear_logprob_torch as chunked

    dummy = torch.zeros(scored.shape, dtype=torch.int64, device=scored.device)
    head, _ = _head(hidden, weight, bias, dummy, index, shift, 0, logit_scale, softcap, temperature)
    ref_head, _ = _head(ref_hidden, ref_weight, ref_bias, dummy, index, shift, 0, logit_scale, softcap, temperature)
    block = chunked._row_block(hidden.device)

    def tiles(h, ref_h):
        for start in range(0, len(weight), chunked.CHUNK):
            w, ref_w = (x.weight[start : start + chunked.CHUNK].to(x.stat_dtype) for x in (head, ref_head))
            yield start, w, h, chunked._tile_logits(head, h, w, start), chunked._tile_logits(ref_head, ref_h, ref_w, start)

    for begin in range(0, len(index), block):
        end = min(begin + block, len(index))
        yield begin, end, tiles(chunked._gather(head, begin, end, block), chunked._gather(ref_head, begin, end, block))


@_kl_op.register_fake
def _(hidden, weight, bias, ref_hidden, ref_weight, ref_bias, scored, shift, logit_scale, softcap, temperature):
    dtype = torch.float64 if torch.float64 in (hidden.dtype, weight.dtype) else torch.float32
    return tuple(scored.new_empty(scored.shape, dtype=of) for of in (dtype, torch.float64, torch.float64))


@torch.library.custom_op("llmcore::linear_kl_grad", mutates_args=())
def _kl_grad_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    scored: Tensor,
    kl: Tensor,
    lse: Tensor,
    ref_lse: Tensor,
    upstream: Tensor,
    shift: int,
    logit_scale: float,
    softcap: float,
    temperature: float,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from llmcore.kernels.linear_logprob_torch import logit_chain

    index = (scored & (upstream != 0)).reshape(-1).nonzero()[:, 0]
    dtype = torch.float64 if torch.float64 in (hidden.dtype, weight.dtype) else torch.float32
    none = hidden.new_empty(0)
    grad_hidden = torch.zeros(hidden.shape, dtype=hidden.dtype, device=hidden.device) if need_hidden else none
    grad_weight = torch.zeros(weight.shape, dtype=dtype, device=hidden.device) if need_weight else none.clone()
    grad_bias = torch.zeros(len(weight), dtype=dtype, device=hidden.device) if need_bias else none.clone()
    options = Head(hidden, index, weight, bias, index, 0, logit_scale, softcap, temperature)
    for begin, end, tiles in _kl_blocks(
        hidden, weight, bias, ref_hidden, ref_weight, ref_bias, scored, index, shift, logit_scale, softcap, temperature
    ):
        part = index[begin:end]
        taken = [x.reshape(-1)[part][:, None].to(dtype) for x in (lse, ref_lse, kl, upstream)]
        rows = torch.zeros(end - begin, hidden.shape[-1], dtype=dtype, device=hidden.device)
        for start, w, h, p_logits, q_logits in tiles:
            z, other = p_logits[: end - begin], q_logits[: end - begin]
            log_p = z - taken[0]
            da = taken[3] * log_p.exp() * (log_p - (other - taken[1]) - taken[2]) * logit_chain(options, z)
            rows += da @ w
            if need_weight:
                grad_weight[start : start + len(w)].addmm_(da.T, h[: end - begin])
            if need_bias:
                grad_bias[start : start + len(w)] += da.sum(dim=0)
        if need_hidden:
            grad_hidden.view(-1, hidden.shape[-1]).index_copy_(0, part - shift, rows.to(hidden.dtype))
    return grad_hidden, grad_weight.to(weight.dtype), grad_bias if bias is None else grad_bias.to(bias.dtype)


@_kl_grad_op.register_fake
def _(
    hidden,
    weight,
    bias,
    ref_hidden,
    ref_weight,
    ref_bias,
    scored,
    kl,
    lse,
    ref_lse,
    upstream,
    shift,
    logit_scale,
    softcap,
    temperature,
    need_hidden,
    need_weight,
    need_bias,
):
    return (
        torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device) if need_hidden else hidden.new_empty(0),
        torch.empty(weight.shape, dtype=weight.dtype, device=weight.device) if need_weight else weight.new_empty(0),
        torch.empty_like(bias) if need_bias else (hidden if bias is None else bias).new_empty(0),
    )


def _kl_setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:7], *output)
    ctx.options = inputs[7:]


def _kl_backward(ctx, upstream, *_others):
    saved = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    grads = (None,) * 3
    if upstream is not None:
        made = _kl_grad_op(*saved, upstream, *ctx.options, *needs)
        grads = tuple(g if needed else None for g, needed in zip(made, needs, strict=True))
    return (*grads, *[None] * 8)


_kl_op.register_autograd(_kl_backward, setup_context=_kl_setup)
_kl_grad_op.register_autograd(_no_second_derivative)


# ---- public functions ---------------------------------------------------------------------------------------------


def _ref_head(ref: tuple[Tensor, ...] | None) -> tuple[Tensor, Tensor, Tensor | None]:
    if ref is None:
        raise ValueError(
            "ref must be (ref_hidden_states, ref_weight) or (ref_hidden_states, ref_weight, ref_bias) when outputs holds 'kl_full', "
            "got None"
        )
    if not isinstance(ref, tuple | list) or len(ref) not in (2, 3):
        raise ValueError(
            f"ref must be a tuple of 2 or 3 tensors, got {type(ref).__name__}" + (f" of {len(ref)}" if hasattr(ref, "__len__") else "")
        )
    return ref[0], ref[1], ref[2] if len(ref) == 3 else None


def _check_tensor(name: str, value: Any, floating: bool = True) -> None:
    if not isinstance(value, Tensor):
        hint = "; pass its .weight, and merge adapters first" if isinstance(value, torch.nn.Module) else ""
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}{hint}")
    if hasattr(value, "placements") and hasattr(value, "device_mesh"):
        raise TypeError(
            f"{name} is a DTensor, whose shards this kernel would read as the whole; pass {name}.full_tensor(), or {name}.to_local() of a "
            "row-sharded weight with process_group= and vocab_range="
        )
    if floating and value.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {value.dtype}")


def _check(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    label_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    shift: int,
    softcap: float | None,
    temperature: float,
    logit_scale: float | None,
) -> None:
    _check_tensor("hidden_states", hidden)
    _check_tensor("weight", weight)
    _check_tensor("labels", labels, floating=False)
    if labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"labels must be int64 or int32, got {labels.dtype}")
    if hidden.dim() < 2 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden_states (…, hidden_size) and weight (vocab_size, hidden_size) must agree in hidden_size, got {tuple(hidden.shape)} and "
            f"{tuple(weight.shape)}"
        )
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"labels must be {tuple(hidden.shape[:-1])} to match hidden_states {tuple(hidden.shape)}, got {tuple(labels.shape)}; pass "
            "unshifted "
            "tensors with shift=1, or shift both yourself"
        )
    if weight.shape[0] == 0:
        raise ValueError("weight must have at least one vocabulary row, got (0, …)")
    if {torch.float64} & {hidden.dtype, weight.dtype} and hidden.dtype != weight.dtype:
        raise TypeError(f"hidden_states and weight must both be float64 or neither, got {hidden.dtype} and {weight.dtype}")
    for name, value in (("weight", weight), ("labels", labels), ("bias", bias), ("label_mask", label_mask)):
        if value is not None and value.device != hidden.device:
            raise ValueError(f"{name} must be on {hidden.device} like hidden_states, got {value.device}")
    if bias is not None:
        _check_tensor("bias", bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias must be ({weight.shape[0]},) to match weight, got {tuple(bias.shape)}")
    if label_mask is not None and (label_mask.dtype != torch.bool or label_mask.shape != labels.shape):
        raise ValueError(f"label_mask must be bool {tuple(labels.shape)}, got {label_mask.dtype} {tuple(label_mask.shape)}")
    if not isinstance(shift, int) or shift < 0:
        raise ValueError(f"shift must be an int >= 0, got {shift!r}")
    if cu_seqlens is not None:
        if cu_seqlens.dim() != 1 or len(cu_seqlens) < 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"cu_seqlens must be (num_sequences + 1,) int32, got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}")
        readable = not torch.compiler.is_compiling() and cu_seqlens.device.type == "cpu"
        if readable and (int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != labels.numel() or bool((cu_seqlens.diff() < 0).any())):
            raise ValueError(f"cu_seqlens must rise from 0 to the number of labels {labels.numel()}, got {cu_seqlens.tolist()[:8]}…")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive or None, got {softcap!r}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature!r}")
    if logit_scale is not None and not math.isfinite(logit_scale):
        raise ValueError(f"logit_scale must be finite or None (= 1), got {logit_scale!r}")


def _shard(weight: Tensor, process_group: Any, vocab_range: tuple[int, int] | None) -> tuple[int, int, str]:
    """(first vocabulary id, total size or -1 when unknown, group name) of this rank's shard."""
    size = weight.shape[0]
    if vocab_range is not None and (len(vocab_range) != 2 or vocab_range[0] < 0 or vocab_range[1] - vocab_range[0] != size):
        raise ValueError(f"vocab_range must be (start, end) with end - start = {size} rows of weight, got {vocab_range!r}")
    if process_group is None:
        return (0, size, "") if vocab_range is None else (vocab_range[0], -1, "")
    import torch.distributed as dist

    sizes = torch.zeros(dist.get_world_size(process_group), dtype=torch.int64, device=weight.device)
    rank = dist.get_rank(process_group)
    sizes[rank] = size
    dist.all_reduce(sizes, group=process_group)
    start = int(sizes[:rank].sum()) if vocab_range is None else vocab_range[0]
    return start, int(sizes.sum()), process_group.group_name


def fused_linear_logprob(
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    shift: int = 0,
    cu_seqlens: Tensor | None = None,
    logit_scale: float | None = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    outputs: tuple[str, ...] = ("logp",),
    mode: str = "auto",
    memory_budget: int | None = None,
    grad_filter: float | None = None,
    accumulate_into: Tensor | None = None,
    process_group: Any = None,
    vocab_range: tuple[int, int] | None = None,
    backend: str = "auto",
    label_mask: Tensor | None = None,
    ref: tuple[Tensor, ...] | None = None,
    detach: tuple[str, ...] = (),
) -> LinearLogprob:
    """Log-probability of each label under softmax(cap(logit_scale · (hidden_states · weightᵀ + bias)) / temperature).

    Args:
        hidden_states: (…, hidden_size) float32, bfloat16, float16 or float64, any strides (a sequence slice is not copied).
        weight: (vocab_size, hidden_size), same dtype or a float32 master. bias: (vocab_size,) or None.
        labels: (…) int64 or int32, the shape of hidden_states without its last dimension.
        ignore_index: label value that is not scored. When it is also a valid token id, pass label_mask instead.
        label_mask: (…) bool, True = score; replaces ignore_index entirely.
        shift: 0 = row i predicts label i (the caller aligned them); s > 0 = the row s positions earlier in the same sequence predicts a
            label, so
            unshifted tensors go in as they are and the first s labels of a sequence are not scored. Results stay at their label's position.
        cu_seqlens: (num_sequences + 1,) int32, sequence bounds of a packed input; the shift never crosses them.
        logit_scale (None = 1), softcap (None = off), temperature: applied in this order.
        outputs: any of "logp", "lse", "entropy", "target_logit" (differentiable), "mean_logit", "is_top1" (the first maximum wins),
            "log_sum_sq"
            (log Σ p²), "kl_full" (Σ p (log p - log q), differentiable in p, with q from `ref`).
        ref: (hidden_states, weight[, bias]) of q, never differentiated; logit_scale, softcap and temperature apply to it too.
        mode: "recompute" keeps nothing between forward and backward, "resident" keeps the logits of as many rows as memory_budget allows
            (16-bit operands: 2 bytes each), "auto" is resident within memory_budget, or within 1 GiB.
        memory_budget: bytes for kept logits and scratch together; rows that do not fit are recomputed.
        grad_filter: largest probability a row may lose when backward skips its lightest vocabulary blocks (1e-3, say); None = exact.
        accumulate_into: (vocab_size, hidden_size) buffer, float32 or weight's dtype, that receives the weight's gradient instead of
            weight.grad.
        process_group, vocab_range: vocabulary-parallel: weight holds rows [start, end) of the vocabulary on this rank (default: shards
            in rank order).
            With vocab_range alone the results are this shard's: its lse, and target_logit 0 where it does not own the label.
        backend: "auto", "cpp", "triton", "torch" or "reference".
        detach: differentiable outputs to return without gradient: an entropy that is only logged leaves a frozen head its 2-unit path.

    Returns:
        LinearLogprob; every tensor has the shape of labels, float32 (float64 for float64), 0 where not scored. `.stats` says what was done.

    Raises:
        ValueError / TypeError: naming the argument. A label outside the vocabulary is an error (checked asynchronously on a GPU).
        RuntimeError: a backend asked for by name cannot serve the call.

    Peak extra memory: scored_rows · (hidden_size · 4 + 64) bytes and a fixed number of tiles, plus the kept rows: min(budget,
        scored_rows · vocab_size · 2).

        >>> h, w, y = torch.randn(2, 8, 64), torch.randn(1000, 64), torch.randint(1000, (2, 8))
        >>> out = fused_linear_logprob(h.requires_grad_(), w, y, shift=1, outputs=("logp", "entropy"))
        >>> out.logp.sum().backward()
        >>> out.logp.shape, out.stats.rows_scored
        (torch.Size([2, 8]), 14)
    """
    _check(hidden_states, weight, labels, bias, label_mask, cu_seqlens, shift, softcap, temperature, logit_scale)
    unknown = [name for name in outputs if name not in OUTPUTS]
    if isinstance(outputs, str) or unknown:
        raise ValueError(f"outputs must be a tuple of names among {OUTPUTS}, got {outputs!r}")
    if mode not in ("auto", "recompute", "resident"):
        raise ValueError(f"mode must be 'auto', 'recompute' or 'resident', got {mode!r}")
    if memory_budget is not None and memory_budget < 0:
        raise ValueError(f"memory_budget must be a number of bytes >= 0, got {memory_budget!r}")
    if grad_filter is not None and not 0 < grad_filter < 1:
        raise ValueError(f"grad_filter must be a probability between 0 and 1, or None, got {grad_filter!r}")
    compiling = torch.compiler.is_compiling()
    grad_on = torch.is_grad_enabled()
    need_hidden, need_weight = grad_on and hidden_states.requires_grad, grad_on and weight.requires_grad
    need_bias = grad_on and bias is not None and bias.requires_grad
    if accumulate_into is not None:
        if (
            accumulate_into.shape != weight.shape
            or accumulate_into.dtype not in (torch.float32, weight.dtype)
            or accumulate_into.device != weight.device
        ):
            raise ValueError(
                f"accumulate_into must be {tuple(weight.shape)} float32 or {weight.dtype} on {weight.device}, got "
                f"{tuple(accumulate_into.shape)} {accumulate_into.dtype} on {accumulate_into.device}"
            )
        if grad_on and not weight.requires_grad:
            raise ValueError("accumulate_into needs weight.requires_grad; a frozen weight has no gradient to accumulate")
        if compiling:
            raise RuntimeError(
                "accumulate_into changes a buffer in backward, which torch.compile cannot express; call the kernel outside the "
                "compiled region"
            )
    wants_kl = "kl_full" in outputs
    if wants_kl:
        ref_hidden, ref_weight, ref_bias = _ref_head(ref)
        _check(ref_hidden, ref_weight, labels, ref_bias, None, None, shift, softcap, temperature, logit_scale)
        if ref_weight.shape[0] != weight.shape[0]:
            raise ValueError(f"ref weight must have the vocabulary of weight, {weight.shape[0]}, got {ref_weight.shape[0]}")
        if process_group is not None or vocab_range is not None:
            raise ValueError("kl_full needs the whole vocabulary; drop process_group and vocab_range")
    elif ref is not None:
        raise ValueError("ref is only used by outputs=('kl_full',); request it or drop ref")

    refused = {}
    if grad_filter is not None:
        refused["cpp"] = "it has no grad_filter; the torch and triton backends do"
        refused["reference"] = "it computes the exact gradient and has no grad_filter"
    if process_group is not None or accumulate_into is not None:
        refused["reference"] = "it has no process_group or accumulate_into"
    if hidden_states.dtype == torch.float64:
        refused["triton"] = "it has no float64 path"
    elif {hidden_states.dtype, weight.dtype} == {torch.bfloat16, torch.float16}:
        refused["triton"] = "it has no product of bfloat16 with float16"
    served_by = backends.choose("linear_logprob", backend, hidden_states.device, refused)
    scale, cap = 1.0 if logit_scale is None else float(logit_scale), 0.0 if softcap is None else float(softcap)
    if served_by == "reference":
        if not compiling:
            scored = _scored(labels, label_mask, cu_seqlens, ignore_index, shift)
            _check_labels(labels[scored], 0, weight.shape[0] if vocab_range is None else None)
        return linear_logprob_reference(
            hidden_states,
            weight,
            labels,
            bias=bias,
            ignore_index=ignore_index,
            shift=shift,
            cu_seqlens=cu_seqlens,
            logit_scale=scale,
            softcap=softcap,
            temperature=temperature,
            outputs=outputs,
            label_mask=label_mask,
            ref=ref,
            vocab_range=vocab_range,
        )

    vocab_start, vocab_total, group = _shard(weight, process_group, vocab_range)
    num_labels = labels.numel()
    scored = _scored(labels, label_mask, cu_seqlens, ignore_index, shift) if wants_kl or not compiling else None
    num_rows = num_labels if compiling or scored is None else int(scored.sum())
    half = hidden_states.dtype.itemsize == 2 and weight.dtype.itemsize == 2
    row_bytes = weight.shape[0] * (2 if half else 8 if hidden_states.dtype == torch.float64 else 4)
    row_bytes += 4 * (-(-weight.shape[0] // VOCAB_BLOCK)) if half else 0
    scratch = 0 if compiling else _implementation(served_by).scratch_bytes(num_rows, hidden_states.shape[-1], weight.shape[0], half)
    differentiates = need_hidden or need_weight or need_bias
    direction = need_hidden and not need_weight and not need_bias and ("entropy" not in outputs or "entropy" in detach)
    capacity = 0
    if differentiates and not direction and mode != "recompute":
        limit = memory_budget if memory_budget is not None else AUTO_BUDGET if mode == "auto" else None
        capacity = num_rows if limit is None else min(num_rows, max(0, limit - scratch) // row_bytes)
    taken = "score" if not differentiates else "recompute" if not capacity else "resident" if compiling or capacity == num_rows else "mixed"
    stats = Stats(None if compiling else num_rows, num_labels, taken, scratch + capacity * row_bytes, served_by)
    record = 0
    if not compiling:
        record = next(_stats_ids)
        _live_stats[record] = stats

    want = sum(
        bit for name, bit in (("entropy", ENTROPY), ("mean_logit", MEAN), ("is_top1", ARGMAX), ("log_sum_sq", SUM_SQ)) if name in outputs
    )
    logp, lse, target, entropy, mean, top1, sum_sq, *_kept = _op(
        hidden_states,
        weight,
        bias,
        labels,
        label_mask,
        cu_seqlens,
        accumulate_into,
        ignore_index,
        shift,
        scale,
        cap,
        float(temperature),
        want,
        capacity,
        direction,
        0.0 if grad_filter is None or not differentiates else float(grad_filter),
        vocab_start,
        vocab_total,
        group,
        served_by,
        record,
    )
    kl = None
    if wants_kl:
        kl = _kl_op(
            hidden_states,
            weight,
            bias,
            ref_hidden.detach(),
            ref_weight.detach(),
            None if ref_bias is None else ref_bias.detach(),
            scored,
            shift,
            scale,
            cap,
            float(temperature),
        )[0]

    def asked(name: str, value: Tensor) -> Tensor | None:
        return None if name not in outputs else value if name in DIFFERENTIABLE and name not in detach else value.detach()

    return LinearLogprob(
        asked("logp", logp),
        asked("lse", lse),
        asked("entropy", entropy),
        asked("target_logit", target),
        asked("mean_logit", mean),
        asked("is_top1", top1),
        asked("log_sum_sq", sum_sq),
        kl,
        stats,
    )


def fused_linear_cross_entropy(
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    reduction: str = "mean",
    bias: Tensor | None = None,
    ignore_index: int = -100,
    shift: int = 0,
    cu_seqlens: Tensor | None = None,
    logit_scale: float | None = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    mode: str = "auto",
    memory_budget: int | None = None,
    grad_filter: float | None = None,
    accumulate_into: Tensor | None = None,
    process_group: Any = None,
    vocab_range: tuple[int, int] | None = None,
    backend: str = "auto",
    label_mask: Tensor | None = None,
) -> Tensor:
    """Cross-entropy -logp of each label: "none" shaped like labels (0 where not scored), "sum", or "mean" over the scored labels.

    Arguments as in `fused_linear_logprob`. With no scored label the mean is 0, connected to the graph (its gradients are zeros).

        >>> loss = fused_linear_cross_entropy(torch.randn(8, 64), torch.randn(1000, 64), torch.randint(1000, (8,)))
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    out = fused_linear_logprob(
        hidden_states,
        weight,
        labels,
        bias=bias,
        ignore_index=ignore_index,
        shift=shift,
        cu_seqlens=cu_seqlens,
        logit_scale=logit_scale,
        softcap=softcap,
        temperature=temperature,
        mode=mode,
        memory_budget=memory_budget,
        grad_filter=grad_filter,
        accumulate_into=accumulate_into,
        process_group=process_group,
        vocab_range=vocab_range,
        backend=backend,
        label_mask=label_mask,
    )
    assert out.logp is not None
    if reduction == "none":
        return -out.logp
    total = -out.logp.sum()
    if reduction == "sum":
        return total
    return total / _scored(labels, label_mask, cu_seqlens, ignore_index, shift).sum().clamp(min=1)
