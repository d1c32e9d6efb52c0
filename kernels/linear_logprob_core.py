"""What the implementations of the fused linear log-probability share: one call's data, its results, and the merge of partial results.

An implementation is a module with two functions (kernels/linear_logprob_torch.py is the plain one, _cpp and _triton the fast ones):

    forward(head, want, *, resident_rows=0, direction=False, tiles=False) -> Statistics
    backward(head, lse, target, target_coef, prob_coef, slope, *, resident=None, offsets=None, slots=None, keep=None,
             need_hidden=True, need_weight=True, need_bias=True, grad_weight_out=None) -> Gradients
    rows_in_gradient(hidden, weight) -> int                             the compiled one only. store=, given to both functions: the (V, D)
                                                                        memory of the weight's gradient, where forward keeps the logits of
                                                                        so many rows and backward writes the gradient over them
    scratch_bytes(num_rows, hidden_size, vocab_size, half) -> int       upper bound of what a call allocates beside its results

`backward` forms, for row t and vocabulary column v, with z the final logit and p = exp(z - lse),

    dz_tv = target_coef_t 1[v = y_t] - p_tv (prob_coef_t + slope_t z_tv)        da_tv = dz_tv · logit_scale / temperature · (1 - (z τ / κ)²)
    d_hidden = da W        d_weight = daᵀ H        d_bias = Σ_t da_t

which covers every upstream gradient of logp, lse, target_logit and entropy (see `row_coefficients` in linear_logprob.py).
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

# `want` bits of forward
ENTROPY = 1  # shifted = Σ exp(z - m) (z - m)
SUM_SQ = 2  # sum_sq = Σ exp(2 (z - m))
MEAN = 4  # sum_z = Σ z
ARGMAX = 8  # argmax = first column (global id) that holds the row maximum

# Columns that share one offset of the resident exponentials and one entry of the tile masses.
VOCAB_BLOCK = 512


@dataclasses.dataclass(frozen=True)
class Head:
    """One call's operands. hidden (R, D) with unit last stride; rows (M,) int64: which of its rows are scored; labels (M,) int64 global
    token ids, validated; weight (V, D), the vocabulary rows [vocab_start, vocab_start + V); bias (V,) or None; softcap 0.0 means none."""

    hidden: Tensor
    rows: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    vocab_start: int
    logit_scale: float
    softcap: float
    temperature: float

    @property
    def stat_dtype(self) -> torch.dtype:
        """Accumulation dtype: float64 for float64 operands, else float32."""
        return torch.float64 if torch.float64 in (self.hidden.dtype, self.weight.dtype) else torch.float32

    @property
    def half(self) -> bool:
        """Both operands have 16 bits: resident rows are kept as bfloat16 exponentials, else as logits in `stat_dtype`."""
        return self.hidden.dtype.itemsize == 2 and self.weight.dtype.itemsize == 2


@dataclasses.dataclass
class Statistics:
    """Per scored row, in the accumulation dtype: m = row_max, sum_exp = Σ exp(z - m), target = z at the label (0 when this shard
    does not own it).

    Asked for by `want`: shifted, sum_sq, sum_z, argmax (int64, global id). None when not asked for.
    resident (resident_rows, V): logits of the first rows, or bfloat16 exp(z - offset) with offsets (resident_rows, ceil(V /
    VOCAB_BLOCK)) when `half`.
    direction (M, D): Σ_v exp(z - m) · da/dz · w_v, the frozen head's gradient direction. tile_lse (M, ceil(V / VOCAB_BLOCK)):
    log-sum-exp of each block.
    """

    row_max: Tensor
    sum_exp: Tensor
    target: Tensor
    shifted: Tensor | None = None
    sum_sq: Tensor | None = None
    sum_z: Tensor | None = None
    argmax: Tensor | None = None
    resident: Tensor | None = None
    offsets: Tensor | None = None
    direction: Tensor | None = None
    tile_lse: Tensor | None = None

    @property
    def lse(self) -> Tensor:
        """Log-sum-exp; formed in float64 and left there, because logp = target - lse cancels."""
        return self.row_max.double() + self.sum_exp.double().log()


@dataclasses.dataclass
class Gradients:
    """d_hidden (M, D) accumulated in float32 (float64), not yet rounded; d_weight (V, D) and d_bias (V,) rounded once to the
    parameter's dtype.
    None where not needed; d_weight is None when it went into grad_weight_out."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def all_reduce_statistics(stats: Statistics, group) -> Tensor:
    """Turn a shard's statistics into those of the whole vocabulary, in place; returns exp(m_shard - m_global), the factor of
    shard-relative sums."""
    import torch.distributed as dist

    local_max = stats.row_max.clone()
    dist.all_reduce(stats.row_max, dist.ReduceOp.MAX, group)
    shift = torch.where(local_max == stats.row_max, 0.0, local_max - stats.row_max)
    factor = shift.exp()
    if stats.shifted is not None:
        stats.shifted = factor * (stats.shifted + torch.where(factor > 0, shift, 0.0) * stats.sum_exp)
    stats.sum_exp = stats.sum_exp * factor
    if stats.sum_sq is not None:
        stats.sum_sq = stats.sum_sq * factor * factor
    sums = [x for x in (stats.sum_exp, stats.target, stats.shifted, stats.sum_sq, stats.sum_z) if x is not None]
    packed = torch.stack(sums)
    dist.all_reduce(packed, dist.ReduceOp.SUM, group)
    for into, value in zip(sums, packed, strict=True):
        into.copy_(value)
    if stats.argmax is not None:
        candidate = torch.where(local_max == stats.row_max, stats.argmax, torch.iinfo(torch.int64).max)
        dist.all_reduce(candidate, dist.ReduceOp.MIN, group)
        stats.argmax = candidate
    return factor


def untouched_zeros(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that cost nothing until written: on CPU the operating system's zero pages, where torch.zeros would write every byte.

    The gradient of a batch without a single active row is vocab_size x hidden_size of these (113 MB for a 49152 x 576 float32 head).
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    import numpy as np

    return torch.from_numpy(np.zeros(shape.numel() * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)
