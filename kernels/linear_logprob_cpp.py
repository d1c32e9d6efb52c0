"""Compiled CPU implementation of the fused linear log-probability: contract in linear_logprob_core.py, code in
csrc/cpu/linear_logprob.cpp."""

from __future__ import annotations

import torch
from llmcore.kernels.linear_logprob_core import ARGMAX, ENTROPY, MEAN, SUM_SQ, VOCAB_BLOCK, Gradients, Head, Statistics
from torch import Tensor

_WAVE, _KEPT_PANELS, _ROWS_IN_GRADIENT = 512, 8 << 20, 4096  # kWave, kHiddenPanelBytes, kRowsInGradient


def rows_in_gradient(hidden: Tensor, weight: Tensor) -> int:
    """Kept rows whose logits lie in the memory of the weight's gradient to come: kept logits and gradient must be of one dtype, and a
    vocabulary block's part of the gradient, block · hidden_size elements, holds the block's logits of hidden_size rows."""
    same = torch.promote_types(hidden.dtype, weight.dtype) == weight.dtype and weight.dtype in (torch.float32, torch.float64)
    return min(weight.shape[1], _ROWS_IN_GRADIENT) if same else 0


def scratch_bytes(num_rows: int, hidden_size: int, vocab_size: int, half: bool) -> int:
    """What one call allocates beside its results: a weight block packed twice, a wave of logits, the hidden rows packed (all of them while
    that is small, else a wave), kept logits moved out of the gradient's memory, a gradient block and one hidden gradient for 16-bit
    operands, per-thread panels and per-row sums."""
    threads, width = torch.get_num_threads(), -(-hidden_size // 32) * 32
    packed_rows = num_rows if 4 * num_rows * width <= _KEPT_PANELS else min(_WAVE, num_rows)
    wave = min(_WAVE, num_rows) * VOCAB_BLOCK
    shared = VOCAB_BLOCK * width * (3 if half else 2) + wave + packed_rows * width + 16 * (width + VOCAB_BLOCK)
    private = threads * 33 * width
    moved = max(0, min(num_rows, hidden_size, _ROWS_IN_GRADIENT) - _WAVE) * VOCAB_BLOCK
    widened = 4 * (shared + private + (num_rows * hidden_size if half else moved)) + 160 * num_rows
    return max(widened, _bfloat16_scratch_bytes(num_rows, hidden_size, vocab_size, threads)) if half else widened


def _bfloat16_scratch_bytes(num_rows: int, hidden_size: int, vocab_size: int, threads: int) -> int:
    """The same for the bfloat16 kernel: two packed copies of the hidden rows, the hidden gradient in float32 twice (once when rows and
    columns fill their panels), a transposed weight block, one vocabulary block of da, per-thread tiles, partial sums, the bias."""
    panels = -(-num_rows // 32)
    rows, width = 32 * panels, -(-hidden_size // 32) * 32
    shared = 12 * rows * width + 2 * (VOCAB_BLOCK + 32) * width + 2 * VOCAB_BLOCK * (rows + 32) + 4 * vocab_size
    private = threads * 4 * (VOCAB_BLOCK * 48 + 48 * width + 2048) + 1280 * (5 * panels + 64 + 8 * threads)
    return shared + private + 160 * num_rows


def _operands(head: Head) -> tuple:
    return (
        head.hidden,
        head.rows.contiguous(),
        head.weight,
        None if head.bias is None else head.bias.contiguous(),
        head.labels.contiguous(),
        head.vocab_start,
        head.logit_scale,
        head.softcap,
        head.temperature,
    )


def _widened(head: Head) -> Head:
    """The kernel takes 16-bit operands or the accumulation dtype; a float32 bias beside float64 operands is neither."""
    if head.bias is None or head.bias.dtype in (head.stat_dtype, torch.bfloat16, torch.float16):
        return head
    return Head(
        head.hidden,
        head.rows,
        head.weight,
        head.bias.to(head.stat_dtype),
        head.labels,
        head.vocab_start,
        head.logit_scale,
        head.softcap,
        head.temperature,
    )


def forward(
    head: Head, want: int, *, resident_rows: int = 0, direction: bool = False, tiles: bool = False, store: Tensor | None = None
) -> Statistics:
    """See the contract. `tiles` (the gradient filter's block masses) is refused by the public function."""
    assert not tiles, "the compiled backend keeps no tile masses"
    num_rows, dtype, vocab_size = len(head.rows), head.stat_dtype, len(head.weight)
    stats = torch.empty(6, num_rows, dtype=torch.float64)
    argmax = torch.empty(num_rows if want & ARGMAX else 0, dtype=torch.int64)
    apart = resident_rows - (0 if store is None else min(resident_rows, rows_in_gradient(head.hidden, head.weight)))
    resident = torch.empty(apart, vocab_size, dtype=torch.bfloat16 if head.half else dtype) if apart else None
    offsets = torch.empty(resident_rows, -(-vocab_size // VOCAB_BLOCK), dtype=torch.float32) if resident_rows and head.half else None
    kept = torch.empty(num_rows, head.weight.shape[1], dtype=dtype) if direction else None
    torch.ops.llmcore.linear_logprob_fwd(*_operands(_widened(head)), want, stats, argmax, resident, offsets, kept, store, resident_rows)
    # Sums stay in float64; they are relative to the maximum, which is exact in either.
    return Statistics(
        stats[0].to(dtype),
        stats[1],
        stats[2].to(dtype),
        stats[3] if want & ENTROPY else None,
        stats[4] if want & SUM_SQ else None,
        stats[5] if want & MEAN else None,
        argmax if want & ARGMAX else None,
        resident,
        offsets,
        kept,
    )


def backward(
    head: Head,
    lse: Tensor,
    target: Tensor,
    target_coef: Tensor,
    prob_coef: Tensor,
    slope: Tensor | None,
    *,
    resident: Tensor | None = None,
    offsets: Tensor | None = None,
    slots: Tensor | None = None,
    keep: Tensor | None = None,
    need_hidden: bool = True,
    need_weight: bool = True,
    need_bias: bool = True,
    grad_weight_out: Tensor | None = None,
    store: Tensor | None = None,
) -> Gradients:
    """See the contract. `keep` (the gradient filter) is refused by the public function."""
    assert keep is None, "the compiled backend has no gradient filter"
    dtype = head.stat_dtype

    def column(x: Tensor) -> Tensor:
        return x.to(dtype).contiguous()

    grad_hidden = torch.empty(len(head.rows), head.hidden.shape[1], dtype=dtype) if need_hidden else None
    into = grad_weight_out if store is None else store
    if need_weight and (into is None or into.stride(-1) != 1):
        into = torch.empty(head.weight.shape, dtype=head.weight.dtype)
    grad_bias = torch.empty(len(head.weight), dtype=dtype) if need_bias else None
    torch.ops.llmcore.linear_logprob_bwd(
        *_operands(_widened(head)),
        column(lse),
        column(target),
        column(target_coef),
        column(prob_coef),
        None if slope is None else column(slope),
        resident,
        offsets,
        slots,
        grad_hidden,
        into if need_weight else None,
        grad_weight_out is not None and into is grad_weight_out,
        grad_bias,
        store,
    )
    if grad_weight_out is not None and into is not grad_weight_out:
        grad_weight_out += into
    return Gradients(
        grad_hidden,
        into if need_weight and grad_weight_out is None else None,
        None if grad_bias is None or head.bias is None else grad_bias.to(head.bias.dtype),
    )
