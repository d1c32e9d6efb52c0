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

from typing import Any

import torch
from llmcore.kernels import backends
from llmcore.kernels.linear_logprob_core import ARGMAX, ENTROPY, MEAN, SUM_SQ, VOCAB_BLOCK
from llmcore.kernels.linear_logprob_inputs import _check, _check_labels, _ref_head, _scored
from llmcore.kernels.linear_logprob_kl import _kl_op
from llmcore.kernels.linear_logprob_ops import _implementation, _op
from llmcore.kernels.linear_logprob_plain import linear_logprob_reference
from llmcore.kernels.linear_logprob_results import DIFFERENTIABLE, OUTPUTS, LinearLogprob, Stats, _live_stats, _stats_ids
from torch import Tensor

# N scored rows (tokens), V vocabulary, D hidden, B sequences, T positions

backends.declare("linear_logprob", cpp="llmcore::linear_logprob_fwd", triton=None, torch=None)

AUTO_BUDGET = 1 << 30  # bytes that mode="auto" may keep between forward and backward when no memory_budget is given


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
        scored_rows · vocab_size · 2). The compiled float32 kernel keeps the logits of the first hidden_size rows in the memory of the
        weight's gradient, which the backward writes over them: they take none of their own.

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
    # Kept rows that lie in the memory of the gradient to come. One operator may not write over another's result inside a compiled graph.
    in_gradient = 0
    if served_by == "cpp" and capacity and need_weight and accumulate_into is None and not compiling:
        in_gradient = min(capacity, _implementation(served_by).rows_in_gradient(hidden_states, weight))
    taken = "score" if not differentiates else "recompute" if not capacity else "resident" if compiling or capacity == num_rows else "mixed"
    stats = Stats(None if compiling else num_rows, num_labels, taken, scratch + capacity * row_bytes, served_by)
    record = 0
    if not compiling:
        record = next(_stats_ids)
        _live_stats[record] = stats

    want = sum(
        bit for name, bit in (("entropy", ENTROPY), ("mean_logit", MEAN), ("is_top1", ARGMAX), ("log_sum_sq", SUM_SQ)) if name in outputs
    )
    logp, lse, target, entropy, mean, top1, sum_sq, resident, _offsets, _direction, _tile_lse, store = _op(
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
        in_gradient,
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
        () if compiling else (resident, store),
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
