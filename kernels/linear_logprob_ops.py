"""The operators of the fused linear log-probability: one per direction, their shapes for the compiler, and the autograd between them."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any

import torch
from llmcore.kernels.linear_logprob_core import ARGMAX, ENTROPY, MEAN, SUM_SQ, VOCAB_BLOCK, Head, all_reduce_statistics, untouched_zeros
from llmcore.kernels.linear_logprob_inputs import _check_labels, _head, _scored
from llmcore.kernels.linear_logprob_results import _live_stats
from torch import Tensor

# N scored rows (tokens), V vocabulary, D hidden, B sequences, T positions

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


def _implementation(backend: str) -> ModuleType:
    return importlib.import_module(f"llmcore.kernels.linear_logprob_{backend}")


def _group(name: str) -> Any:
    from torch.distributed.distributed_c10d import _resolve_process_group

    return _resolve_process_group(name)


# ---- operators ---------------------------------------------------------------------------------------------------------------------------
#
# One opaque operator per direction with data-independent output shapes: compaction happens inside, so torch.compile sees no
# data-dependent size.


def _forward(
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
    in_gradient: int,
    direction: bool,
    grad_filter: float,
    vocab_start: int,
    vocab_total: int,
    group: str,
    backend: str,
    record: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """capacity: rows whose logits are kept. The first in_gradient of them lie in the memory of the weight's gradient to come, the last
    result, which the backward writes its gradient over; 0 makes that result empty."""
    scored_index = _scored(labels, label_mask, cu_seqlens, ignore_index, shift).reshape(-1).nonzero()[:, 0]
    head, _ = _head(hidden, weight, bias, labels, scored_index, shift, vocab_start, logit_scale, softcap, temperature)
    _check_labels(head.labels, 0, vocab_total if vocab_total >= 0 else None)
    num_rows, dtype = len(scored_index), head.stat_dtype
    resident_rows, apart = min(num_rows, capacity), max(0, capacity - in_gradient)
    store = torch.empty(weight.shape if in_gradient else (0, 0), dtype=weight.dtype, device=weight.device)

    def full(values: Tensor | None, of: torch.dtype = dtype) -> Tensor:
        if values is None:
            return labels.new_empty(0, dtype=of)
        return labels.new_zeros(labels.numel(), dtype=of).index_copy_(0, scored_index, values.to(of)).view(labels.shape)

    if num_rows == 0:

        def zeros(asked: int = 1, of: torch.dtype = dtype) -> Tensor:
            return labels.new_zeros(labels.shape if asked else (0,), dtype=of)

        resident, offsets = _resident_like(weight, hidden, apart)
        return (
            zeros(), zeros(), zeros(), zeros(want & ENTROPY), zeros(want & MEAN), zeros(want & ARGMAX, torch.bool), zeros(want & SUM_SQ),
            resident, offsets, labels.new_zeros(labels.numel() if direction else 0, hidden.shape[-1], dtype=dtype),
            labels.new_zeros(labels.numel() if grad_filter else 0, -(-len(weight) // VOCAB_BLOCK), dtype=torch.float32),
            store,
        )  # fmt: skip

    keep_in = {"store": store} if in_gradient else {}
    stats = _implementation(backend).forward(head, want, resident_rows=resident_rows, direction=direction, tiles=grad_filter > 0, **keep_in)
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
    if resident is None or len(resident) != apart:  # shapes promised to the compiler do not depend on the data
        kept, kept_offsets = resident, offsets
        resident, offsets = _resident_like(weight, hidden, apart)
        if kept is not None:
            resident[: len(kept)].copy_(kept)
            if kept_offsets is not None:
                offsets[: len(kept)].copy_(kept_offsets)
    elif offsets is None:
        offsets = labels.new_empty(0, 0, dtype=torch.float32)
    row_direction = labels.new_empty(0, hidden.shape[-1], dtype=dtype)
    if stats.direction is not None:
        scale = (1 / stats.sum_exp) if factor is None else factor / stats.sum_exp
        # In its own precision: a float64 factor would make a float64 copy of all of it.
        row_direction = _pad_rows(stats.direction.mul_(scale.to(stats.direction.dtype)[:, None]), labels.numel())
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
        store,
    )


_op = torch.library.custom_op("llmcore::linear_logprob", _forward, mutates_args=())
_ARGUMENTS = tuple(inspect.signature(_forward).parameters)


def _pad_rows(x: Tensor, rows: int) -> Tensor:
    return x if len(x) == rows else torch.nn.functional.pad(x, (0, 0, 0, rows - len(x)))


def _resident_like(weight: Tensor, hidden: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    half = hidden.dtype.itemsize == 2 and weight.dtype.itemsize == 2
    dtype = torch.bfloat16 if half else torch.float64 if torch.float64 in (hidden.dtype, weight.dtype) else torch.float32
    tiles = (weight.shape[0] + VOCAB_BLOCK - 1) // VOCAB_BLOCK
    resident = weight.new_empty(capacity, weight.shape[0], dtype=dtype)
    return resident, weight.new_empty(capacity if half else 0, tiles if half else 0, dtype=torch.float32)


@_op.register_fake
def _(*arguments):
    given = dict(zip(_ARGUMENTS, arguments, strict=True))
    hidden, weight, labels, want, capacity = (given[name] for name in ("hidden", "weight", "labels", "want", "capacity"))
    dtype = torch.float64 if torch.float64 in (hidden.dtype, weight.dtype) else torch.float32
    tiles = (weight.shape[0] + VOCAB_BLOCK - 1) // VOCAB_BLOCK

    def full(asked: bool, of: torch.dtype = dtype) -> Tensor:
        return labels.new_empty(labels.shape if asked else (0,), dtype=of)

    resident, offsets = _resident_like(weight, hidden, max(0, capacity - given["in_gradient"]))
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
        labels.new_empty(labels.numel() if given["direction"] else 0, hidden.shape[-1], dtype=dtype),
        labels.new_empty(labels.numel() if given["grad_filter"] > 0 else 0, tiles, dtype=torch.float32),
        torch.empty(weight.shape if given["in_gradient"] else (0, 0), dtype=weight.dtype, device=weight.device),
    )


def _gradients(
    accumulate_into: Tensor | None,
    store: Tensor | None,
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
    in_gradient: int,
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
    num_rows = len(alive)
    none = hidden.new_empty(0)
    listener = _live_stats.get(record)
    if listener is not None:
        listener.rows_backward = num_rows
    share = num_rows / max(num_scored, 1)

    grad_hidden = grad_weight = grad_bias = None
    hidden_rows: Iterable[tuple[slice, Tensor]] = ()
    if row_direction.shape[0]:
        hidden_rows = _frozen_head_rows(head, row_target, coefs, row_direction, alive)
    elif num_rows:
        if store is not None and not store.untyped_storage().nbytes():  # LinearLogprob.release
            store = None
        if not resident.untyped_storage().nbytes():
            resident, offsets = resident[:0], offsets[:0]
        in_store = 0 if store is None else in_gradient
        kept = in_store + resident.shape[0]
        slots = torch.where(alive < kept, alive, -1) if kept else None
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
            resident=resident[: max(0, num_scored - in_store)] if resident.shape[0] else None,
            offsets=offsets[:num_scored] if offsets.shape[0] else None,
            slots=slots,
            keep=keep,
            need_hidden=need_hidden,
            need_weight=need_weight,
            need_bias=need_bias,
            grad_weight_out=accumulate_into if need_weight else None,
            **({"store": store} if in_store else {}),
        )
        grad_weight, grad_bias = grads.weight, grads.bias
        hidden_rows = [(slice(None), grads.hidden)]
        if listener is not None:
            recomputed = 1.0 if slots is None else float((slots < 0).sum()) / num_rows
            listener.gemm_units += share * (
                float(need_hidden) + float(need_weight) + (recomputed if need_hidden or need_weight or need_bias else 0.0)
            )
    if need_hidden:
        for part, rows in hidden_rows:
            if group:
                import torch.distributed as dist

                dist.all_reduce(rows, dist.ReduceOp.SUM, _group(group))
            if len(rows) == labels.numel():  # every row, in order
                grad_hidden = rows.to(hidden.dtype).view(hidden.shape)
                break
            if grad_hidden is None:
                grad_hidden = torch.zeros(hidden.shape, dtype=hidden.dtype, device=hidden.device)
            grad_hidden.view(-1, hidden.shape[-1]).index_copy_(0, flat[part], rows.to(hidden.dtype))
        if grad_hidden is None:
            grad_hidden = torch.zeros(hidden.shape, dtype=hidden.dtype, device=hidden.device)
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


def _frozen_head_rows(head: Head, target: Tensor, coefs: list[Tensor], direction: Tensor, alive: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """dH of the rows `alive`, a few at a time: target_coef · (da/dz)_y · w_y - prob_coef · Σ_v p_v (da/dz)_v w_v, the sum of a row
    accumulated by the forward in `direction`. Beside dH and `direction` only one part of them is alive."""
    weight, dtype = head.weight, direction.dtype
    local = head.labels - head.vocab_start
    owned = (local >= 0) & (local < len(weight))
    factor = head.logit_scale / head.temperature
    chain = factor * (1 - (target.to(dtype) * (head.temperature / head.softcap)).square()) if head.softcap else factor
    pull = (torch.where(owned, coefs[0], 0.0) * chain)[:, None]
    local = local.clamp(0, len(weight) - 1)
    step = max(1, (1 << 20 if weight.device.type == "cpu" else 1 << 24) // (weight.shape[1] * dtype.itemsize))
    for start in range(0, len(alive), step):
        part = slice(start, start + step)
        rows = weight.index_select(0, local[part]).to(dtype).mul_(pull[part])
        yield part, rows.addcmul_(coefs[1][part, None], direction.index_select(0, alive[part]), value=-1.0)


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


# The operator and the plain call are one function: an operator may not change its inputs, so `accumulate_into` and `store` are None
# through it.
_grad_op = torch.library.custom_op("llmcore::linear_logprob_grad", _gradients, mutates_args=())


@_grad_op.register_fake
def _(accumulate_into, store, hidden, weight, bias, *others):
    need_hidden, need_weight, need_bias = others[-3:]
    return (
        torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device) if need_hidden else hidden.new_empty(0),
        torch.empty(weight.shape, dtype=weight.dtype, device=weight.device) if need_weight else hidden.new_empty(0),
        torch.empty_like(bias) if need_bias else hidden.new_empty(0),
    )


_SAVED = ("hidden", "weight", "bias", "labels", "label_mask", "cu_seqlens")
_OPTIONS = (
    "ignore_index", "shift", "logit_scale", "softcap", "temperature", "grad_filter", "vocab_start", "in_gradient", "group", "backend",
    "record",
)  # fmt: skip


def _setup_context(ctx, inputs, output):
    given = dict(zip(_ARGUMENTS, inputs, strict=True))
    _logp, lse, target, entropy, _mean, _top1, _sum_sq, *kept = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*(given[name] for name in _SAVED), lse, target, entropy, *kept)
    # Not a saved tensor: gradient accumulation changes the buffer between forward and backward on purpose.
    ctx.accumulate_into = given["accumulate_into"]
    ctx.options = tuple(given[name] for name in _OPTIONS)
    ctx.in_gradient = given["in_gradient"]
    ctx.holds_logits = ctx.in_gradient > 0  # until a backward writes the gradient over them


def _backward(ctx, grad_logp, grad_lse, grad_target, grad_entropy, *_others):
    *operands, lse, target, entropy, resident, offsets, row_direction, tile_lse, store = ctx.saved_tensors
    coefs = row_coefficients(lse, entropy if grad_entropy is not None else None, grad_logp, grad_lse, grad_target, grad_entropy)
    if row_direction.shape[0] and coefs[2] is not None:
        raise RuntimeError("internal: the frozen head's direction cannot serve a gradient of the entropy")
    need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
    need_bias = need_bias and operands[2] is not None
    # The logits in the gradient's memory serve one backward outside create_graph, which goes through the operator; any other recomputes.
    from_store = ctx.holds_logits and not torch.is_grad_enabled()
    if ctx.in_gradient and not from_store:
        resident = resident[:0]
    kept = (resident, offsets, row_direction, tile_lse)
    arguments = (*operands, lse, target, *coefs, *kept, *ctx.options, need_hidden, need_weight, need_bias)
    if from_store:
        ctx.holds_logits = not need_weight
        # `.data`: the saved tensor's version stays, its content is not looked at again.
        grad_hidden, grad_weight, grad_bias = _gradients(None, store.data, *arguments)
    elif ctx.accumulate_into is None:
        grad_hidden, grad_weight, grad_bias = _grad_op(None, None, *arguments)
    else:
        if torch.is_grad_enabled():
            _no_second_derivative(ctx)
        grad_hidden, grad_weight, grad_bias = _gradients(ctx.accumulate_into, None, *arguments)
    return (
        grad_hidden if need_hidden else None,
        grad_weight if need_weight and ctx.accumulate_into is None else None,
        grad_bias if need_bias else None,
        *[None] * (len(_ARGUMENTS) - 3),
    )


_op.register_autograd(_backward, setup_context=_setup_context)


def _no_second_derivative(ctx, *grads):
    raise RuntimeError(
        "fused_linear_logprob has no second derivative; use backend='reference' (linear_logprob_reference) for create_graph=True"
    )


_grad_op.register_autograd(_no_second_derivative)
