"""Triton kernels of the fused linear log-probability (contract in linear_logprob_core.py): NVIDIA and AMD GPUs, CPU in the interpreter.

Forward, one GEMM unit: every program owns a (BLOCK_M scored rows) × (BLOCK_V columns) tile, contracts over D into float32 registers,
applies bias, scale, cap and temperature there, and writes one partial per row: maximum, Σexp and what else was asked for; the tile that
owns the label writes the target logit from the same accumulator. A second kernel merges the partials of a row in a fixed order. The
logits never reach memory. Scratch: rows · ceil(V / BLOCK_V) · 4 bytes a statistic; 33 MB at 8192 rows, V = 128256, BLOCK_V = 256 and two.

Backward, in waves of vocabulary columns: a Triton kernel turns the logits of a wave into da in the GEMM's dtype (recomputed in the kernel,
read from the resident rows, or from products that the library's GEMM wrote: `schedule` of linear_logprob_configs.py), then two dense
library GEMMs with float32 results: d_hidden += da W_wave, and d_weight_wave = daᵀ H, complete over all rows, so it is rounded once and
no V × D float32 buffer exists. Waves of columns move rows·D·8 bytes each for d_hidden where waves of rows would move V·D·8 for d_weight.
Under the gradient filter a wave is one block of VOCAB_BLOCK columns and the rows that keep it.

A row's result depends on its own operands and the tile configuration only, never on its neighbours: no atomics, no split over D, no
choice by row count. Gathering is index arithmetic in the loads.

Resident exponentials are float16 2^(z·log2 e - 8 q + 15) with one int16 q per row and 256 columns, two of them in each float32 cell of
`offsets`: the scale is exact, the rounding is 2^-12, and |z| < 1.8e5 is covered. They travel in the contract's bfloat16 buffer.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from llmcore.kernels import linear_logprob_configs as configs
from llmcore.kernels.backends import interpreting
from llmcore.kernels.linear_logprob_cases import aot_cases as aot_cases
from llmcore.kernels.linear_logprob_configs import Config
from llmcore.kernels.linear_logprob_core import ARGMAX, ENTROPY, MEAN, SUM_SQ, VOCAB_BLOCK, Gradients, Head, Statistics
from llmcore.kernels.linear_logprob_tiles import (
    EXPONENTIALS,
    LOGITS,
    NONE,
    PRODUCT,
    _direction_kernel,
    _dlogits_kernel,
    _merge_kernel,
    _stats_kernel,
    _stats_persistent_kernel,
)
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

# M scored rows, V vocabulary rows of this shard, D hidden size, C columns of one chunk


def _gemm_dtype(head: Head) -> torch.dtype:
    """Operands of one dtype are contracted as they are; a mixture is widened to float32."""
    if torch.float64 in (head.hidden.dtype, head.weight.dtype):
        raise RuntimeError("backend 'triton' serves float32, bfloat16 and float16 operands, got float64; use backend='torch'")
    return head.hidden.dtype if head.hidden.dtype == head.weight.dtype else torch.float32


def _compute(dtype: torch.dtype) -> tl.dtype:
    """Operand type of tl.dot. The interpreter has no bfloat16 product; widening first gives the same exact products."""
    if dtype == torch.bfloat16:
        return tl.float32 if interpreting() else tl.bfloat16
    return {torch.float32: tl.float32, torch.float16: tl.float16}[dtype]


def scratch_bytes(num_rows: int, hidden_size: int, vocab_size: int, half: bool) -> int:
    """Upper bound of the temporaries: forward partials (six planes), or backward's wave, gathered rows and float32 d_hidden."""
    itemsize = 2 if half else 4
    partials = 6 * 4 * num_rows * triton.cdiv(vocab_size, configs.config("forward", half, "sm_90").block_v)
    wave = configs.chunk_columns(num_rows, hidden_size, vocab_size, itemsize)
    return max(partials, wave * (num_rows * itemsize + hidden_size * 4) + num_rows * hidden_size * (itemsize + 4) + num_rows * 64)


def _addressable(x: Tensor) -> bool:
    """Whether a TMA descriptor can be made of a matrix: base and row stride in multiples of 16 bytes."""
    return x.stride(1) == 1 and x.stride(0) * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0


def _mm_float32(left: Tensor, right: Tensor, into: Tensor | None = None) -> Tensor:
    """left @ right with a float32 result, or added into a float32 matrix."""
    if left.dtype == torch.float32 or left.device.type == "cpu":
        left, right = left.float(), right.float()
        return left @ right if into is None else into.addmm_(left, right)
    if into is None:
        return torch.mm(left, right, out_dtype=torch.float32)
    return torch.ops.aten.addmm.dtype_out(into, left, right, torch.float32, out=into)


def forward(head: Head, want: int, *, resident_rows: int = 0, direction: bool = False, tiles: bool = False) -> Statistics:
    """Online statistics in one pass; see the contract."""
    dtype, device = _gemm_dtype(head), head.hidden.device
    num_rows, (vocab_size, hidden_size) = len(head.rows), head.weight.shape
    config = configs.config("forward", dtype.itemsize == 2, configs.architecture(device))
    num_blocks = triton.cdiv(vocab_size, config.block_v)
    planes = {name: -1 for name in ("SHIFTED", "SUMSQ", "SUMZ")}
    count = 2
    for name, bit in (("SHIFTED", ENTROPY), ("SUMSQ", SUM_SQ), ("SUMZ", MEAN)):
        if want & bit:
            planes[name], count = count, count + 1
    first = bool(want & ARGMAX)
    partial = torch.empty(count, num_blocks, num_rows, dtype=torch.float32, device=device)
    argmax = torch.empty(num_blocks if first else 0, num_rows, dtype=torch.int32, device=device)
    target = torch.zeros(num_rows, dtype=torch.float32, device=device)
    in_group, groups = configs.row_grid(num_rows, config)
    # Chosen by layout alone: the same weight takes the same kernel whatever the batch.
    persistent = config.schedule == "persistent" and dtype == head.weight.dtype and hidden_size * dtype.itemsize % 16 == 0
    persistent = persistent and _addressable(head.weight)
    if persistent:
        compact = head.hidden.index_select(0, head.rows)
        operands = (
            TensorDescriptor.from_tensor(compact, [config.block_m, config.block_k]),
            TensorDescriptor.from_tensor(head.weight, [config.block_v, config.block_k]),
        )

    def launch(start: int, columns: int, kept: Tensor | None, offsets: Tensor | None, kept_rows: int) -> None:
        column_blocks = triton.cdiv(columns, config.block_v)
        common = {
            "HAS_BIAS": head.bias is not None, "HAS_CAP": head.softcap != 0.0, **planes, "FIRST": first,
            "KEEP": NONE if kept is None else LOGITS if offsets is None else EXPONENTIALS,
            "HIDDEN": hidden_size, "COMPUTE": _compute(dtype), "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
            "BLOCK_M": config.block_m, "BLOCK_V": config.block_v, "BLOCK_K": config.block_k,
            "num_warps": config.num_warps, "num_stages": config.num_stages,
        }  # fmt: skip
        results = (partial, argmax, target, kept, offsets)
        sizes = (num_rows, vocab_size, start, head.vocab_start, kept_rows, num_blocks)
        kept_strides = (0 if kept is None else kept.stride(0), 0 if offsets is None else offsets.stride(0))
        scalars = (float(head.logit_scale), float(head.softcap), 1.0 / head.temperature)
        if persistent:
            num_tiles = in_group * groups * column_blocks
            _stats_persistent_kernel[(min(configs.processors(device), num_tiles),)](
                *operands, head.labels, head.bias, *results, *sizes, in_group, column_blocks, num_tiles, *kept_strides, *scalars, **common
            )
        else:
            _stats_kernel[(in_group, column_blocks, groups)](
                head.hidden, head.rows, head.labels, head.weight, head.bias, *results, *sizes,
                head.hidden.stride(0), head.weight.stride(0), *kept_strides, *scalars, **common,
            )  # fmt: skip

    resident = offsets = row_direction = None
    if resident_rows:
        resident = torch.empty(resident_rows, vocab_size, dtype=torch.bfloat16 if head.half else torch.float32, device=device)
        if head.half:
            offsets = torch.zeros(resident_rows, -(-vocab_size // VOCAB_BLOCK), dtype=torch.float32, device=device)
    if direction:
        row_direction, exponent = _forward_with_direction(head, launch, dtype, config)
    elif resident is not None and offsets is not None:
        launch(0, vocab_size, resident.view(torch.float16), offsets.view(torch.int16), resident_rows)
    else:
        launch(0, vocab_size, resident, None, resident_rows)

    merged = torch.empty(count, num_rows, dtype=torch.float32, device=device)
    at = torch.empty(num_rows if first else 0, dtype=torch.int64, device=device)
    _merge_kernel[(triton.cdiv(num_rows, 32),)](
        partial, argmax, merged, at, num_rows, head.vocab_start,
        **planes, FIRST=first, NUM_BLOCKS=num_blocks, BLOCK_R=32, BLOCK_C=32, num_warps=4,
    )  # fmt: skip
    if row_direction is not None:
        row_direction.mul_(torch.exp2(exponent - merged[0].double() / 0.6931471805599453).float()[:, None])

    def plane(name: str) -> Tensor | None:
        return merged[planes[name]] if planes[name] >= 0 else None

    return Statistics(
        merged[0],
        merged[1],
        target,
        plane("SHIFTED"),
        plane("SUMSQ"),
        plane("SUMZ"),
        at if first else None,
        resident,
        offsets,
        row_direction,
        _tile_masses(partial, config.block_v) if tiles else None,
    )


def _tile_masses(partial: Tensor, block_v: int) -> Tensor:
    """(M, ceil(V / VOCAB_BLOCK)) log-sum-exp of each block, from the forward's partials."""
    pieces = partial[0] + partial[1].log()
    together = VOCAB_BLOCK // block_v
    pieces = torch.nn.functional.pad(pieces, (0, 0, 0, -len(pieces) % together), value=-torch.inf)
    return pieces.view(-1, together, pieces.shape[1]).logsumexp(dim=1).T.contiguous()


def _forward_with_direction(head: Head, launch, dtype: torch.dtype, config: Config) -> tuple[Tensor, Tensor]:
    """Statistics chunk by chunk, each chunk's exponentials contracted with its weight rows while they are at hand: 2 units, not 3.

    Returns Σ_v 2^(z·log2 e - exponent) · da/dz · w_v (M, D) float32 and the integer exponent (M,) it is relative to, float64.
    """
    device, num_rows, (vocab_size, hidden_size) = head.hidden.device, len(head.rows), head.weight.shape
    half = dtype.itemsize == 2
    chunk = configs.chunk_columns(num_rows, hidden_size, vocab_size, 2 * dtype.itemsize)
    total = torch.zeros(num_rows, hidden_size, dtype=torch.float32, device=device)
    exponent = torch.full((num_rows,), -torch.inf, dtype=torch.float32, device=device)
    # float16 operands: exponentials in [0, 1] are lifted to use the subnormal range.
    lift = 2.0**14 if dtype == torch.float16 else 1.0
    for start in range(0, vocab_size, chunk):
        columns = min(chunk, vocab_size - start)
        kept = torch.empty(num_rows, columns, dtype=torch.float16 if half else torch.float32, device=device)
        offsets = torch.empty(num_rows, triton.cdiv(columns, config.block_v), dtype=torch.int16, device=device) if half else None
        launch(start, columns, kept, offsets, num_rows)
        top = 8.0 * offsets.amax(dim=1).float() if offsets is not None else (kept.amax(dim=1) * 1.4426950408889634).ceil()
        new = torch.maximum(exponent, torch.where(torch.isneginf(top), 0.0, top))
        total.mul_(torch.exp2(exponent - new)[:, None])
        operand = torch.empty(num_rows, columns, dtype=dtype, device=device)
        _direction_kernel[(triton.cdiv(num_rows, 16), triton.cdiv(columns, config.block_v))](
            kept, offsets, new, operand, num_rows, start, vocab_size, columns, 0 if offsets is None else offsets.stride(0),
            float(head.softcap), 1.0 / head.temperature, lift * head.logit_scale / head.temperature,
            HAS_CAP=head.softcap != 0.0, SOURCE=EXPONENTIALS if half else LOGITS, BLOCK_M=16, BLOCK_V=config.block_v, num_warps=8,
        )  # fmt: skip
        _mm_float32(operand, head.weight[start : start + columns].to(dtype), total)
        exponent = new
    return total.mul_(1.0 / lift), exponent.double()


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
) -> Gradients:
    """Gradients by recomputation, or from the resident rows (slots[i] >= 0, which come first); see the contract.

    keep (M, ceil(V / VOCAB_BLOCK)) bool, of the gradient filter: a row takes part in a block only where it is True.
    """
    dtype, device = _gemm_dtype(head), head.hidden.device
    num_rows, (vocab_size, hidden_size) = len(head.rows), head.weight.shape
    config = configs.config("backward", dtype.itemsize == 2, configs.architecture(device))
    vendor = config.schedule == "vendor"
    need_bias = need_bias and head.bias is not None
    need_weight = need_weight or grad_weight_out is not None
    stored = int((slots >= 0).sum()) if resident is not None and slots is not None else 0
    kept, packed = resident, None
    if resident is not None and offsets is not None:
        kept, packed = resident.view(torch.float16), offsets.view(torch.int16)
    high = lse.float()
    rest = (lse.double() - high.double()).float()
    columns_of_rows = [head.rows, head.labels, slots, high, rest, target.float(), target_coef.float(), prob_coef.float()]
    columns_of_rows.append(None if slope is None else slope.float())
    scale = _float16_scale(columns_of_rows[6:], high, head.logit_scale / head.temperature) if dtype == torch.float16 else None

    grad_hidden = torch.zeros(num_rows, hidden_size, dtype=torch.float32, device=device) if need_hidden else None
    grad_weight = torch.empty_like(head.weight, memory_format=torch.contiguous_format) if need_weight and grad_weight_out is None else None
    grad_bias = torch.empty(vocab_size, dtype=torch.float32, device=device) if need_bias else None
    hidden_rows = head.hidden.index_select(0, head.rows).to(dtype) if need_weight or vendor else None
    wave = configs.chunk_columns(num_rows, hidden_size, vocab_size, dtype.itemsize + (4 if vendor else 0))
    members = None
    if keep is not None:
        wave = VOCAB_BLOCK
        members = keep.T.nonzero()[:, 1].split(keep.sum(dim=0).tolist())  # rows of each block, one transfer for all of them
    buffer = torch.empty(num_rows * min(wave, vocab_size), dtype=dtype, device=device)
    correction = _LabelCorrection(head, columns_of_rows, scale, wave) if dtype.itemsize == 2 else None

    def logit_gradients(chosen: list[Tensor | None], start: int, columns: int, kept_count: int, hidden_chosen: Tensor | None):
        """da (rows, columns) of one wave, and the partial column sums of its bias gradient."""
        count = len(chosen[0])
        grad = buffer[: count * columns].view(count, columns)
        sums = []
        for begin, end, from_store in ((0, kept_count, True), (kept_count, count, False)):
            if begin == end:
                continue
            rows, labels, row_slots, *numbers = (None if x is None else x[begin:end] for x in chosen)
            tile = configs.RESIDENT if from_store else config
            source, logits, stride = NONE, None, 0
            if from_store:
                source, logits, stride = LOGITS if packed is None else EXPONENTIALS, kept, kept.stride(0)
            elif vendor:
                source, stride = PRODUCT, columns
                logits = _mm_float32(hidden_chosen[begin:end], head.weight[start : start + columns].to(dtype).T)
            in_group, groups = configs.row_grid(end - begin, tile)
            sums.append(torch.empty(in_group * groups if need_bias else 0, columns, dtype=torch.float32, device=device))
            _dlogits_kernel[(in_group, triton.cdiv(columns, tile.block_v), groups)](
                head.hidden, rows, labels, head.weight, head.bias, logits, packed if from_store else None,
                row_slots if from_store else None, *numbers, scale, grad[begin:end], sums[-1],
                end - begin, vocab_size, start, head.vocab_start,
                head.hidden.stride(0), head.weight.stride(0), stride, 0 if packed is None else packed.stride(0), columns,
                float(head.logit_scale), float(head.softcap), 1.0 / head.temperature,
                HAS_BIAS=head.bias is not None, HAS_CAP=head.softcap != 0.0, HAS_SLOPE=slope is not None, HAS_SCALE=scale is not None,
                NEED_BIAS=need_bias, SOURCE=source, HIDDEN=hidden_size, COMPUTE=_compute(dtype),
                PRECISION="ieee" if dtype == torch.float32 else "tf32", BLOCK_M=tile.block_m, BLOCK_V=tile.block_v,
                BLOCK_K=tile.block_k, num_warps=tile.num_warps, num_stages=tile.num_stages,
            )  # fmt: skip
        return grad, sums

    for start in range(0, vocab_size, wave):
        columns = min(wave, vocab_size - start)
        part = slice(start, start + columns)
        chosen, kept_count, hidden_chosen, index = columns_of_rows, stored, hidden_rows, None
        if members is not None:
            index = members[start // VOCAB_BLOCK]
            chosen = [None if x is None else x[index] for x in columns_of_rows]
            kept_count = int((index < stored).sum()) if stored else 0
            hidden_chosen = None if hidden_rows is None else hidden_rows[index]
        grad, bias_sums = logit_gradients(chosen, start, columns, kept_count, hidden_chosen)
        if correction is not None:
            correction.read(grad, start, columns, index)
        if grad_hidden is not None and index is None:
            _mm_float32(grad, head.weight[part].to(dtype), grad_hidden)
        elif grad_hidden is not None:
            grad_hidden.index_add_(0, index, _mm_float32(grad, head.weight[part].to(dtype)))
        if need_weight:
            grad_wave = _mm_float32(grad.T, hidden_chosen)
            if correction is not None:
                correction.add_to_weight(grad_wave, start, hidden_rows)
            if scale is not None:
                grad_wave /= scale
            if grad_weight is not None:
                grad_weight[part] = grad_wave
            else:
                into = grad_weight_out[part]
                into.copy_(grad_wave.add_(into))
        if grad_bias is not None:
            grad_bias[part] = torch.cat(bias_sums).sum(dim=0) if bias_sums else 0.0
    if grad_hidden is not None and correction is not None:
        correction.add_to_hidden(grad_hidden)
    if grad_hidden is not None and scale is not None:
        grad_hidden /= scale
    return Gradients(grad_hidden, grad_weight, None if grad_bias is None else grad_bias.to(head.bias.dtype))


class _LabelCorrection:
    """What rounding da to 16 bits took from each row's label entry, given back to both gradients in float32.

    That entry is the largest of its row, by orders of magnitude when the model is sure of other tokens: its rounding alone is up to 2^-9 of
    the row's gradient, where the roundings of the other entries average out. Costs rows · D, no GEMM.
    """

    def __init__(self, head: Head, columns_of_rows: list[Tensor | None], scale: Tensor | None, wave: int):
        _rows, labels, _slots, high, rest, target, wanted, spread, bend = columns_of_rows
        p = ((target - high) - rest).exp()
        due = (wanted - p * (spread if bend is None else spread + bend * target)) * (head.logit_scale / head.temperature)
        if head.softcap:
            due *= 1 - (target * (head.temperature / head.softcap)).square()
        self.due = due if scale is None else due * scale
        self.head, self.wave, self.missed = head, wave, torch.zeros_like(due)
        self.local = labels - head.vocab_start
        self.order = self.local.argsort()
        # Ends stop at this shard's last row: labels of other shards lie outside every wave.
        ends = torch.arange(0, len(head.weight) + wave, wave, device=labels.device).clamp_(max=len(head.weight))
        self.edges = torch.searchsorted(self.local[self.order], ends).tolist()

    def read(self, grad: Tensor, start: int, columns: int, index: Tensor | None) -> None:
        """Note the stored label entries of one wave; index: the rows of `grad`, None for all."""
        local, due = (self.local, self.due) if index is None else (self.local[index], self.due[index])
        local = local - start
        owned = (local >= 0) & (local < columns)
        stored = grad.gather(1, local.clamp(0, columns - 1)[:, None])[:, 0].float()
        short = torch.where(owned, due - stored, 0.0)
        self.missed = self.missed + short if index is None else self.missed.index_add(0, index, short)

    def add_to_weight(self, grad_wave: Tensor, start: int, hidden_rows: Tensor) -> None:
        block = start // self.wave
        mine = self.order[self.edges[block] : self.edges[block + 1]]
        # index_put_ sorts its indices: the same sum every time, where index_add_ on a GPU would not promise one.
        grad_wave.index_put_((self.local[mine] - start,), self.missed[mine, None] * hidden_rows[mine].float(), accumulate=True)

    def add_to_hidden(self, grad_hidden: Tensor) -> None:
        own = self.head.weight.index_select(0, self.local.clamp(0, len(self.head.weight) - 1))
        grad_hidden.addcmul_(own.float(), self.missed[:, None])


def _float16_scale(coefs: list[Tensor | None], lse: Tensor, chain: float) -> Tensor:
    """An exact power of two that lifts da into float16's range, taken out again after the GEMMs: mean-normalised losses put it below."""
    wanted, spread, bend = coefs
    largest = (wanted.abs() + spread.abs() + (0.0 if bend is None else bend.abs() * lse.abs())).max() * chain
    usable = torch.isfinite(largest) & (largest > 0)
    return torch.where(usable, torch.exp2(-torch.frexp(torch.where(usable, largest, 1.0)).exponent.float()), 1.0)
