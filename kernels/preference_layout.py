"""Sequences and pairs of a preference batch: which rows belong to whom, which two prefixes are one, how much a token counts."""

from __future__ import annotations

import dataclasses
import warnings

import torch
from llmcore.kernels.linear_logprob_inputs import _scored
from torch import Tensor

# S sequences, P pairs


def _default_pairs(num_sequences: int, device: torch.device) -> Tensor:
    if num_sequences % 2:
        raise ValueError(
            f"labels hold {num_sequences} sequences: without pair_index the first half is chosen and the second half rejected, "
            "which needs an even number; pass pair_index (P, 2)"
        )
    return torch.arange(num_sequences, device=device).view(2, -1).T


@dataclasses.dataclass
class _Layout:
    """Which label positions are scored and to which sequence each belongs.

    scored: bool, shape of labels, the rows that enter the GEMMs. extra_rows/extra_seq: positions (flat) that also count for another
    sequence,
    because that sequence starts with the same tokens. token_weight: shape of labels or None (LD-DPO).
    """

    shape: torch.Size
    cu: Tensor | None
    scored: Tensor
    counts: Tensor
    extra_rows: Tensor | None = None
    extra_seq: Tensor | None = None
    token_weight: Tensor | None = None

    @property
    def num_sequences(self) -> int:
        return len(self.counts)

    def sequence_of(self) -> Tensor:
        """(labels.numel(),) sequence of each position."""
        if self.cu is None:
            return torch.arange(self.shape[0], device=self.scored.device).repeat_interleave(self.shape[1])
        return torch.repeat_interleave(torch.arange(len(self.cu) - 1, device=self.scored.device), self.cu.diff())

    def sums(self, values: Tensor, weighted: bool = True) -> Tensor:
        """Per-sequence sums of a per-position tensor that is 0 where not scored, accumulated in float64 and rounded once."""
        out_dtype = values.dtype if values.dtype == torch.float64 else torch.float32
        values = values.double()
        if weighted and self.token_weight is not None:
            values = values * self.token_weight
        if self.cu is None:
            total = values.sum(dim=1)
        else:
            total = torch.segment_reduce(values.reshape(-1), "sum", lengths=self.cu.diff())
        if self.extra_rows is not None and self.extra_seq is not None:
            total = total.index_add(0, self.extra_seq, values.reshape(-1).index_select(0, self.extra_rows))
        return total.to(out_dtype)

    def row_coefficients(self, per_sequence: Tensor) -> Tensor:
        """The transpose of `sums`: the coefficient of each position (flat) from those of the sequences."""
        rows = per_sequence.double().index_select(0, self.sequence_of())
        if self.extra_rows is not None and self.extra_seq is not None:
            rows = rows.index_add(0, self.extra_rows, per_sequence.double().index_select(0, self.extra_seq))
        return rows if self.token_weight is None else rows * self.token_weight.reshape(-1)


def _layout(labels: Tensor, label_mask: Tensor | None, cu_seqlens: Tensor | None, ignore_index: int, shift: int) -> _Layout:
    if labels.dim() not in (1, 2) or (labels.dim() == 1 and cu_seqlens is None):
        raise ValueError(
            f"labels must be (num_sequences, seq_len), or packed with cu_seqlens; got {tuple(labels.shape)} and cu_seqlens="
            f"{'None' if cu_seqlens is None else tuple(cu_seqlens.shape)}"
        )
    scored = _scored(labels, label_mask, cu_seqlens, ignore_index, shift)
    if cu_seqlens is None:
        return _Layout(labels.shape, None, scored, scored.sum(dim=1))
    cu = cu_seqlens.to(device=labels.device, dtype=torch.int64)
    counts = torch.segment_reduce(scored.reshape(-1).double(), "sum", lengths=cu.diff()).long()
    return _Layout(labels.shape, cu, scored, counts)


def _scored_positions(layout: _Layout) -> tuple[Tensor, Tensor]:
    """Flat positions of the scored rows, sequence after sequence, and where each sequence starts among them."""
    return layout.scored.reshape(-1).nonzero()[:, 0], layout.counts.cumsum(0) - layout.counts


def _check_pairs(pair_index: Tensor, num_sequences: int, device: torch.device) -> Tensor:
    if not isinstance(pair_index, Tensor) or pair_index.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"pair_index must be an int64 tensor (P, 2), got {getattr(pair_index, 'dtype', type(pair_index).__name__)}")
    if pair_index.dim() != 2 or pair_index.shape[1] != 2:
        raise ValueError(f"pair_index must be (P, 2) of (chosen, rejected), got {tuple(pair_index.shape)}")
    if pair_index.device.type == "cpu" and not torch.compiler.is_compiling():
        bad = ((pair_index < 0) | (pair_index >= num_sequences)).any(dim=1)
        if bool(bad.any()):
            at = int(bad.nonzero()[0, 0])
            raise ValueError(f"pair_index must point at sequences 0 to {num_sequences - 1}, pair {at} is {pair_index[at].tolist()}")
        unused = num_sequences - pair_index.unique().numel()
        if unused:
            warnings.warn(f"{unused} of {num_sequences} sequences are in no pair of pair_index; they are scored for nothing", stacklevel=3)
    return pair_index.to(device=device, dtype=torch.int64)


def _check_reference(ref_logp: Tensor, num_sequences: int, device: torch.device) -> Tensor:
    if not isinstance(ref_logp, Tensor) or not ref_logp.is_floating_point():
        raise TypeError(f"ref_logp must be a floating tensor (num_sequences,), got {getattr(ref_logp, 'dtype', type(ref_logp).__name__)}")
    if ref_logp.shape != (num_sequences,):
        raise ValueError(f"ref_logp must be ({num_sequences},), one summed log-probability per sequence, got {tuple(ref_logp.shape)}")
    if ref_logp.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(ref_logp.isfinite().all()):
        at = int((~ref_logp.isfinite()).nonzero()[0, 0])
        raise ValueError(f"ref_logp must be finite, sequence {at} has {float(ref_logp[at])}; score the reference again")
    return ref_logp.detach().to(device)


def _common_prefix(hidden: Tensor, labels: Tensor, layout: _Layout, pairs: Tensor, shift: int, check_hidden: bool) -> Tensor:
    """(P,) number of leading scored tokens on which both members agree, and (when asked) whose hidden rows are equal bit for bit."""
    positions, start = _scored_positions(layout)
    chosen, rejected = pairs[:, 0], pairs[:, 1]
    shorter = torch.minimum(layout.counts[chosen], layout.counts[rejected])
    longest = int(shorter.max()) if len(shorter) else 0
    step = torch.arange(longest, device=labels.device)
    inside = step < shorter[:, None]
    if not len(positions) or not longest:
        return torch.zeros_like(shorter)
    limit = len(positions) - 1
    at_w = positions[(start[chosen, None] + step).clamp(max=limit)]
    at_l = positions[(start[rejected, None] + step).clamp(max=limit)]
    flat = labels.reshape(-1)
    same = (inside & (flat[at_w] == flat[at_l])).cumprod(dim=1).bool()
    if check_hidden:
        rows = hidden.detach().reshape(-1, hidden.shape[-1])
        candidates = same.nonzero()
        w, other = at_w[same] - shift, at_l[same] - shift
        equal = (rows[w] == rows[other]).all(dim=1)
        same[candidates[:, 0], candidates[:, 1]] = equal
        same = same.cumprod(dim=1).bool()
    return same.sum(dim=1)


def _share_prefixes(hidden: Tensor, labels: Tensor, layout: _Layout, pairs: Tensor, shift: int) -> None:
    """Score the rows of a common completion prefix once: the rejected member's copies leave `scored` and point at the chosen member's.

    The shared row then carries c_w + c_l, which is exactly 0 for losses of the margin alone: such rows leave the backward too.
    """
    if pairs[:, 1].unique().numel() < len(pairs) or bool(torch.isin(pairs[:, 1], pairs[:, 0]).any()):
        raise ValueError("shared_prefix needs every rejected sequence in exactly one pair and never chosen; pass shared_prefix=False")
    length = _common_prefix(hidden, labels, layout, pairs, shift, check_hidden=True)
    positions, start = _scored_positions(layout)
    which = torch.arange(len(pairs), device=labels.device).repeat_interleave(length)
    offset = torch.arange(int(length.sum()), device=labels.device) - (length.cumsum(0) - length).repeat_interleave(length)
    layout.extra_rows = positions[start[pairs[which, 0]] + offset]
    layout.extra_seq = pairs[which, 1]
    duplicate = positions[start[pairs[which, 1]] + offset]
    flat = layout.scored.reshape(-1).clone()
    flat[duplicate] = False
    layout.scored = flat.view(layout.shape)


def _ld_weights(layout: _Layout, pairs: Tensor, alpha: float) -> Tensor:
    """1 for the first min(n_w, n_l) scored tokens of a sequence, alpha for the rest; shape of labels, 0 where not scored."""
    if pairs.numel() != layout.num_sequences or pairs.flatten().unique().numel() != layout.num_sequences:
        raise ValueError("ld_alpha needs every sequence in exactly one pair: a token's weight depends on its partner's length")
    limit = torch.empty_like(layout.counts)
    shorter = layout.counts[pairs].amin(dim=1)
    limit[pairs[:, 0]], limit[pairs[:, 1]] = shorter, shorter
    flat = layout.scored.reshape(-1)
    sequence = layout.sequence_of()
    rank = flat.long().cumsum(0) - 1 - (layout.counts.cumsum(0) - layout.counts)[sequence]
    weight = torch.where(rank < limit[sequence], 1.0, alpha) * flat
    return weight.double().view(layout.shape)
