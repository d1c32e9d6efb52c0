"""Saliency flow: sums of |A · dL/dA| over pairs of token segments, for every attention head, without an attention matrix.

    A_ij = exp(s_ij - lse_i), s_ij = softcap(scale · q_i·k_j), j visible to i      dA_ij = dL/dA_ij = do_i·v_j      G = A · dA      I = |G|
    abs_sum[b, h, s, t] = Σ I_ij over rows i of segment s, columns j of segment t

Row i is the reader, column j what is read. dA is the gradient of the softmax *output*; the gradient of the scores is another quantity.

Not stored: A, dA and their product, 4 · n² · H numbers each. Llama-3-8B's attention (H = 32) at n = 8192 in bf16: 4.3 GB a matrix and
layer, of which the usual way
keeps two or three; here the extra memory of a layer is one packed copy of k and v and a few bins.
Bound: two products, 2·n²·d·H FLOP a layer when causal, and n²·H/2 exponentials: the shape of a flash-attention forward without its output.

"Attention times gradient" as importance: Michel et al. 2019; its segment form: Wang et al., "Label words are anchors", EMNLP 2023.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from llmcore.kernels import backends
from llmcore.kernels.attention_lse import attention_with_lse, check_attention
from llmcore.kernels.visibility import pair_counts, visible_ranges
from torch import Tensor

__all__ = ["OUTPUTS", "SaliencyFlow", "attention_with_lse", "saliency_flow", "saliency_flow_reference"]

# B batch, H query heads, G key/value heads, n rows (queries), m columns (keys), d / e head sizes of key / value, Sr / Sc row / column
# segments

OUTPUTS = ("abs", "signed", "pos", "attn", "headsum_abs", "row_by_seg", "col_by_seg", "row_sum", "col_sum", "matrix")
KINDS = ("abs", "signed", "pos", "attn")  # bits 0..3 of the operators' `outputs`
HEADSUM, ROW_BINS, COLUMN_BINS, MATRIX = 16, 32, 64, 128
MATRIX_LIMIT = 1 << 26  # entries of `matrix` beyond which it must be asked for as "large_matrix"

backends.declare("saliency_flow", cpp="llmcore::saliency_flow_fwd", triton=None, torch=None)


@dataclasses.dataclass(frozen=True)
class SaliencyFlow:
    """Bins of one attention layer. What was not asked for is None; sums are float32 (float64 for float64 inputs), counts int64.

    abs_sum, signed_sum, pos_sum, attn_sum (B, H, Sr, Sc): sums of |G|, G, max(G, 0), A. headsum_abs (B, Sr, Sc): sums of |Σ_h G|.
    count (B, Sr, Sc): visible pairs. box (B, Sr, Sc): rows · columns, masks ignored. row_by_seg (B, H, n, Sc), col_by_seg (B, H, Sr, m):
    one side unsummed.
    row_sum (B, H, n), col_sum (B, H, m): over all visible pairs, segments ignored. matrix (B, H, n, m): I itself. pairs (Sr, Sc) bool:
    what was computed.
    """

    count: Tensor
    box: Tensor
    pairs: Tensor | None = None
    abs_sum: Tensor | None = None
    signed_sum: Tensor | None = None
    pos_sum: Tensor | None = None
    attn_sum: Tensor | None = None
    headsum_abs: Tensor | None = None
    row_by_seg: Tensor | None = None
    col_by_seg: Tensor | None = None
    row_sum: Tensor | None = None
    col_sum: Tensor | None = None
    matrix: Tensor | None = None

    def mean(self, denominator: str = "box", empty: str = "nan", output: str = "abs") -> Tensor:
        """Sums divided by the number of pairs, shape of the sums.

        Args:
            denominator: "box" (rows · columns, the papers' choice) or "visible" (pairs the mask lets through).
            empty: a segment pair without pairs gives "nan" or "zero", or is an error ("raise"). Pairs that were pruned count as empty, but
                never raise.
            output: "abs", "signed", "pos", "attn" or "headsum_abs".
        """
        if denominator not in ("box", "visible"):
            raise ValueError(f"denominator must be 'box' or 'visible', got {denominator!r}")
        if empty not in ("nan", "zero", "raise"):
            raise ValueError(f"empty must be 'nan', 'zero' or 'raise', got {empty!r}")
        name = output if output == "headsum_abs" else f"{output}_sum"
        sums = getattr(self, name, None)
        if output not in (*KINDS, "headsum_abs") or sums is None:
            raise ValueError(f"output must be one of the computed sums, got {output!r}; ask saliency_flow for outputs=({output!r},)")
        pairs = self.box if denominator == "box" else self.count
        if empty == "raise":
            hollow = (pairs == 0) & (True if self.pairs is None else self.pairs)
            if bool(hollow.any()):
                raise ValueError(
                    f"empty='raise': segment pairs (batch, row segment, column segment) without {denominator} pairs: "
                    f"{hollow.nonzero().tolist()[:8]}"
                )
        if self.pairs is not None:
            pairs = torch.where(self.pairs, pairs, 0)
        if sums.dim() == 4:
            pairs = pairs[:, None]
        result = sums / pairs.clamp(min=1)
        return result.masked_fill(pairs == 0, 0.0 if empty == "zero" else float("nan"))


def saliency_flow_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_output: Tensor,
    lse: Tensor | None,
    row_segments: Tensor,
    col_segments: Tensor | None = None,
    *,
    num_row_segments: int | None = None,
    num_col_segments: int | None = None,
    softmax_scale: float | None = None,
    causal: bool = True,
    q_offset: int | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    pairs: Tensor | None = None,
    outputs: Sequence[str] = ("abs",),
    exclude_diagonal: bool = False,
) -> SaliencyFlow:
    """The definition, with every n × m matrix in memory, in the dtype of the inputs. Arguments and result as in `saliency_flow`."""
    batch, heads, n, d = query.shape
    m, group = key.shape[2], heads // key.shape[1]
    if col_segments is None:
        col_segments = row_segments
    num_row_segments = int(row_segments.max()) + 1 if num_row_segments is None else num_row_segments
    num_col_segments = int(col_segments.max()) + 1 if num_col_segments is None else num_col_segments
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)

    i, j = torch.arange(n, device=query.device)[:, None], torch.arange(m, device=query.device)[None]
    document_starts = torch.tensor([[0, n]]) if cu_seqlens_q is None else cu_seqlens_q.view(-1, cu_seqlens_q.shape[-1])
    column_starts = (
        torch.tensor([[0, m]])
        if cu_seqlens_q is None
        else (cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k).view_as(document_starts)
    )
    visible = torch.zeros(batch, n, m, dtype=torch.bool, device=query.device)
    diagonal = torch.zeros_like(visible)
    for b in range(batch):
        starts_q, starts_k = document_starts[b % len(document_starts)].tolist(), column_starts[b % len(document_starts)].tolist()
        for q0, q1, k0, k1 in zip(starts_q, starts_q[1:], starts_k, starts_k[1:], strict=False):
            inside = (i >= q0) & (i < q1) & (j >= k0) & (j < k1)
            distance = (i - q0 + ((k1 - k0) - (q1 - q0) if q_offset is None else q_offset)) - (j - k0)
            see = inside.clone()
            if causal:
                see &= distance >= 0
            if window is not None:
                see &= (distance >= 0) & (distance < window)
            visible[b] |= see
            diagonal[b] |= (i >= q0) & (i < q1) & (distance == 0)
    if key_mask is not None:
        visible = visible & key_mask.bool()[:, None]
    scores = query @ key.transpose(-1, -2) * (d**-0.5 if softmax_scale is None else softmax_scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if lse is None:
        lse = scores.masked_fill(~visible[:, None], -torch.inf).logsumexp(-1)
        if sinks is not None:
            lse = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
    if exclude_diagonal:
        visible = visible & ~diagonal
    attention = (scores - lse.to(scores.dtype)[..., None]).masked_fill(~visible[:, None], -torch.inf).exp()
    attention = attention.masked_fill(~visible[:, None], 0.0)
    signed = attention * (grad_output @ value.transpose(-1, -2))

    rows = torch.nn.functional.one_hot(row_segments.long() + 1, num_row_segments + 1)[..., 1:].to(query.dtype)
    cols = torch.nn.functional.one_hot(col_segments.long() + 1, num_col_segments + 1)[..., 1:].to(query.dtype)
    wanted = None if pairs is None else pairs.bool().to(query.device)

    def bins(x: Tensor) -> Tensor:
        sums = rows.transpose(1, 2)[:, None] @ x @ cols[:, None]
        return sums if wanted is None else sums.masked_fill(~wanted, 0.0)

    chosen = _names(outputs)
    result: dict[str, Tensor] = {}
    for name, x in (("abs", signed.abs()), ("signed", signed), ("pos", signed.clamp(min=0)), ("attn", attention)):
        if name in chosen:
            result[f"{name}_sum"] = bins(x)
    if "headsum_abs" in chosen:
        result["headsum_abs"] = bins(signed.sum(1, keepdim=True).abs())[:, 0]
    if "row_by_seg" in chosen:
        x = signed.abs() @ cols[:, None]
        result["row_by_seg"] = x if wanted is None else x * (rows @ wanted.to(rows.dtype))[:, None]
    if "col_by_seg" in chosen:
        x = rows.transpose(1, 2)[:, None] @ signed.abs()
        result["col_by_seg"] = x if wanted is None else x * (wanted.to(cols.dtype) @ cols.transpose(1, 2))[:, None]
    for name, x in (("row_sum", lambda: signed.abs().sum(-1)), ("col_sum", lambda: signed.abs().sum(-2)), ("matrix", signed.abs)):
        if name in chosen:
            result[name] = x()
    count = torch.einsum("bns,bnm,bmt->bst", rows.double(), visible.double(), cols.double()).round().long()
    box = (
        torch.einsum(
            "bns,bnm,bmt->bst", rows.double(), (~diagonal if exclude_diagonal else torch.ones_like(diagonal)).double(), cols.double()
        )
        .round()
        .long()
    )
    return SaliencyFlow(count=count, box=box, pairs=wanted, **result)


# From the reference to the kernels. A row's range [low, high) and the valid columns are all that a mask is (kernels/visibility.py). With
# lse known, an entry of A
# needs one score, an entry of dA one more product, and both are consumed at once: for a tile of rows R and columns C
#     P = exp(s_RC - lse_R) where visible, else 0;   D = do_R v_C^T;   bins[segment of row, segment of column] += |P · D|
# Nothing flows between tiles, so a tile is skipped when no pair of its segments is wanted, when none of its pairs is visible, or when do_R
# is zero.
# Invariant: after column tile t, row r's bins hold Σ over its visible columns < t · width, split by segment; Σ_j G_rj ends at do_r · o_r.
#
# Outputs that ignore segments (row_sum, col_sum) or keep one side (row_by_seg, col_by_seg) need tokens of no segment too: those get one
# extra bucket at the end.


@torch.library.custom_op("llmcore::saliency_flow_blocked", mutates_args=())
def _saliency_flow_blocked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad: Tensor,
    lse: Tensor,
    low: Tensor,
    high: Tensor,
    diagonal: Tensor | None,
    key_valid: Tensor | None,
    row_segment: Tensor,
    column_segment: Tensor,
    pairs: Tensor,
    scale: float,
    softcap: float,
    outputs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The compiled operator's contract in blocks of plain PyTorch: any device, and float64. Peak extra memory: 4 · H · 128 · 512
    numbers."""
    batch, heads, n, d = query.shape
    kv, m, width = key.shape[1], key.shape[2], value.shape[3]
    row_segments, column_segments = pairs.shape
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    kinds = [kind for kind in range(4) if outputs >> kind & 1]

    def zeros(wanted, *shape):
        return query.new_zeros(shape if wanted else (0,), dtype=dtype)

    bins = query.new_zeros(len(kinds), batch, heads, row_segments, column_segments, dtype=dtype)
    headsum = zeros(outputs & HEADSUM, batch, row_segments, column_segments)
    row_bins = zeros(outputs & ROW_BINS, batch, heads, n, column_segments)
    column_bins = zeros(outputs & COLUMN_BINS, batch, heads, row_segments, m)
    matrix = zeros(outputs & MATRIX, batch, heads, n, m)
    wanted = pairs.bool()
    for b in range(batch):
        segment = row_segment[b].long()
        live = (segment >= 0) & wanted.any(1)[segment.clamp(min=0)] & (high[b] > low[b])
        if not outputs >> KINDS.index("attn") & 1:
            live &= (grad[b] != 0).any(-1).any(0)
        rows = live.nonzero().flatten()
        columns = torch.nn.functional.one_hot(column_segment[b].long() + 1, column_segments + 1)[:, 1:].to(dtype)
        for at in rows.split(128) if len(rows) else ():
            segments = segment[at]
            by_row = torch.nn.functional.one_hot(segments, row_segments).to(dtype)
            allowed = wanted[segments]
            needed = allowed.any(0)
            q = query[b][:, at].to(dtype).reshape(kv, -1, d)
            do = grad[b][:, at].to(dtype).reshape(kv, -1, width)
            row_lse = lse[b][:, at].to(dtype)
            row_lse = torch.where(row_lse == -torch.inf, torch.inf, row_lse)[..., None]
            sums = query.new_zeros(len(kinds), heads, len(at), column_segments, dtype=dtype)
            head_sums = query.new_zeros(len(at), column_segments, dtype=dtype)
            for start in range(int(low[b, at].min()) // 512 * 512, int(high[b, at].max()), 512):
                cut = slice(start, min(start + 512, m))
                in_segment = columns[cut]
                if not bool((in_segment * needed).any()):
                    continue
                j = torch.arange(cut.start, cut.stop, device=query.device)
                visible = (j >= low[b, at, None]) & (j < high[b, at, None])
                if diagonal is not None:
                    visible &= j != diagonal[b, at, None]
                if key_valid is not None:
                    visible &= key_valid[b, cut] != 0
                scores = (q @ key[b, :, cut].to(dtype).transpose(1, 2)).mul_(scale).view(heads, len(at), -1)
                if softcap > 0:
                    scores = softcap * torch.tanh(scores / softcap)
                p = (scores - row_lse).masked_fill_(~visible, -torch.inf).exp_()
                g = (do @ value[b, :, cut].to(dtype).transpose(1, 2)).view_as(p).mul_(p)
                absolute = g.abs()
                for k, kind in enumerate(kinds):
                    sums[k] += (absolute, g, g.clamp(min=0), p)[kind] @ in_segment
                if outputs & HEADSUM:
                    head_sums += g.sum(0).abs() @ in_segment
                if outputs & COLUMN_BINS:
                    column_bins[b, :, :, cut] += by_row.T @ absolute
                if outputs & MATRIX:
                    matrix[b, :, at, cut] = absolute
            sums, head_sums = sums * allowed, head_sums * allowed
            bins[:, b] += by_row.T @ sums
            if outputs & HEADSUM:
                headsum[b] += by_row.T @ head_sums
            if outputs & ROW_BINS:
                row_bins[b, :, at] = sums[kinds.index(0)]
    return bins, headsum, row_bins, column_bins, matrix


def _shapes(query, key, value, grad, lse, low, high, diagonal, key_valid, row_segment, column_segment, pairs, scale, softcap, outputs):
    batch, heads, n, _ = query.shape
    m, (rows, columns) = key.shape[2], pairs.shape
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32

    def new(wanted, *shape):
        return query.new_empty(shape if wanted else (0,), dtype=dtype)

    return (
        query.new_empty(bin(outputs & 15).count("1"), batch, heads, rows, columns, dtype=dtype),
        new(outputs & HEADSUM, batch, rows, columns),
        new(outputs & ROW_BINS, batch, heads, n, columns),
        new(outputs & COLUMN_BINS, batch, heads, rows, m),
        new(outputs & MATRIX, batch, heads, n, m),
    )


@torch.library.custom_op("llmcore::saliency_flow_triton", mutates_args=())
def _saliency_flow_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad: Tensor,
    lse: Tensor,
    low: Tensor,
    high: Tensor,
    diagonal: Tensor | None,
    key_valid: Tensor | None,
    row_segment: Tensor,
    column_segment: Tensor,
    pairs: Tensor,
    scale: float,
    softcap: float,
    outputs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The same contract on a GPU (or in Triton's interpreter): kernels/saliency_flow_triton.py."""
    from llmcore.kernels import saliency_flow_triton

    return saliency_flow_triton.forward(
        query, key, value, grad, lse, low, high, diagonal, key_valid, row_segment, column_segment, pairs, scale, softcap, outputs
    )


_saliency_flow_blocked.register_fake(_shapes)
_saliency_flow_triton.register_fake(_shapes)
if backends.extension_error() is None:
    torch.library.register_fake("llmcore::saliency_flow_fwd", _shapes)


def _names(outputs: Sequence[str]) -> set[str]:
    if isinstance(outputs, str):
        raise TypeError(f"outputs must be a sequence of names, got the string {outputs!r}; pass ({outputs!r},)")
    aliases = {**{f"{kind}_sum": kind for kind in KINDS}, "headsum": "headsum_abs", "large_matrix": "matrix"}
    chosen = {aliases.get(name, name) for name in outputs}
    unknown = chosen - set(OUTPUTS)
    if unknown or not chosen:
        raise ValueError(f"outputs must be among {OUTPUTS}, got {tuple(outputs)}")
    return chosen


@torch.compiler.assume_constant_result
def _backend(backend: str, device_type: str, dtype: torch.dtype) -> str:
    refused = {}
    if dtype == torch.float64:
        refused = {name: f"it sums in float32 and {dtype} was given; use backend='torch'" for name in ("cpp", "triton")}
    return backends.choose("saliency_flow", backend, torch.device(device_type), refused)


def _check_segments(name: str, segments: Tensor, shape: tuple[int, int], count: int | None, count_name: str) -> int:
    if segments.is_floating_point() or segments.dtype == torch.bool:
        raise TypeError(f"{name} must be integer ids (-1: in no segment), got {segments.dtype}")
    if segments.shape != shape:
        raise ValueError(f"{name} must be {shape}, one id a token, got {tuple(segments.shape)}")
    if count is not None and count < 0:
        raise ValueError(f"{count_name} must not be negative, got {count}")
    if segments.numel() == 0:
        return count or 0
    if count is None or (segments.device.type == "cpu" and not torch.compiler.is_compiling()):
        smallest, largest = (int(x) for x in segments.aminmax())
        if smallest < -1 or (count is not None and largest >= count):
            bad = smallest if smallest < -1 else largest
            raise ValueError(f"{name} must be -1 or in [0, {count_name}) = [0, {largest + 1 if count is None else count}), got {bad}")
        count = largest + 1 if count is None else count
    return count


def saliency_flow(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_output: Tensor,
    lse: Tensor | None,
    row_segments: Tensor,
    col_segments: Tensor | None = None,
    *,
    num_row_segments: int | None = None,
    num_col_segments: int | None = None,
    softmax_scale: float | None = None,
    causal: bool = True,
    q_offset: int | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    pairs: Tensor | None = None,
    outputs: Sequence[str] = ("abs",),
    exclude_diagonal: bool = False,
    backend: str = "auto",
) -> SaliencyFlow:
    """Sums of |A · dL/dA| by segment of the reader (row) and of what is read (column), one layer, per query head.

    Args:
        query: (B, H, n, d) as it enters attention (after rotary embedding). key: (B, G, m, d). value: (B, G, m, e). H a multiple of G;
            grouped heads are not repeated.
        grad_output: (B, H, n, e), gradient of the loss with respect to softmax(...) @ value, before the output projection. Rows of zeros
            cost nothing.
        lse: (B, H, n) float32, the forward's own (with its soft-cap, window and sinks; -inf where a row sees nothing), or None: computed
            here.
        row_segments: (B, n) integer ids in [-1, num_row_segments), -1 for no segment. col_segments: (B, m); row_segments when omitted and
            n = m.
        num_row_segments, num_col_segments: largest id + 1 when omitted (reads the ids back from a GPU).
        softmax_scale: d^-1/2 by default. causal: row i stands at column i + q_offset and reads up to it; q_offset is m - n by default.
        window: only 0 ≤ position - column < window is visible. softcap: scores become c · tanh(s / c). sinks: (H,); part of lse, used only
            when lse is None.
        key_mask: (B, m), columns that may be read (padding is 0). cu_seqlens_q, cu_seqlens_k: (D + 1,) or (B, D + 1) borders of packed
            documents.
        pairs: (Sr, Sc) bool; other segment pairs are neither computed nor summed (their sums are 0), and their tiles cost nothing.
        outputs: names among "abs", "signed", "pos", "attn", "headsum_abs", "row_by_seg", "col_by_seg", "row_sum", "col_sum", "matrix"
            ("large_matrix" beyond 2^26 entries).
        exclude_diagonal: drop the pairs of a token with itself from sums and both counts.
        backend: "auto", "cpp" (CPU tensors), "triton" (GPU tensors), "torch" (blocked; every device), "reference".

    Returns:
        SaliencyFlow. Deterministic, and independent of the other sequences of the batch.

    Raises:
        ValueError, TypeError for shapes, dtypes, devices or ids that disagree and for NaN or infinity in grad_output (checked for CPU
        tensors).

    Memory: cpp: one float32 copy of key and value and 8 · Sr · Sc · H · n / 96 bytes. triton: 4 · Sc · H · (n / 128 + Sr)
        bytes, 4 · Sc · H · n where rows are kept apart. torch: 4 · H · 128 · 512 numbers. reference: 5 · B ·
        H · n · m.

    Example:
        >>> q, k, v, do = torch.randn(1, 4, 8, 16), torch.randn(1, 2, 8, 16), torch.randn(1, 2, 8, 16), torch.randn(1, 4, 8, 16)
        >>> _, lse = attention_with_lse(q, k, v)
        >>> saliency_flow(q, k, v, do, lse, torch.tensor([[0, 0, 0, 1, 1, -1, 2, 2]])).mean().shape
        torch.Size([1, 4, 3, 3])
    """
    check_attention(query, key, value, softmax_scale, window, softcap, sinks, key_mask, cu_seqlens_q, cu_seqlens_k)
    chosen = _names(outputs)
    batch, heads, n, d = query.shape
    m = key.shape[2]
    if grad_output.shape != (batch, heads, n, value.shape[3]):
        raise ValueError(
            f"grad_output must be (batch, num_heads, num_rows, value_dim) = {(batch, heads, n, value.shape[3])}, got "
            f"{tuple(grad_output.shape)}"
        )
    if grad_output.dtype != query.dtype or grad_output.device != query.device:
        raise ValueError(
            f"grad_output must match query's dtype and device ({query.dtype}, {query.device}), got ({grad_output.dtype}, "
            f"{grad_output.device})"
        )
    if lse is not None and (lse.shape != (batch, heads, n) or not lse.is_floating_point() or lse.device != query.device):
        raise ValueError(
            f"lse must be float (batch, num_heads, num_rows) = {(batch, heads, n)} on {query.device}, got {lse.dtype} "
            f"{tuple(lse.shape)} on {lse.device}"
        )
    for name, t in (("row_segments", row_segments), ("col_segments", col_segments), ("pairs", pairs), ("key_mask", key_mask)):
        if t is not None and t.device != query.device:
            raise ValueError(f"{name} must be on query's device {query.device}, got {t.device}")
    if col_segments is None:
        if n != m:
            raise ValueError(f"col_segments must be given when rows and columns differ in number, got {n} rows and {m} columns")
        col_segments = row_segments
        num_col_segments = num_row_segments if num_col_segments is None else num_col_segments
    rows_in = _check_segments("row_segments", row_segments, (batch, n), num_row_segments, "num_row_segments")
    cols_in = _check_segments("col_segments", col_segments, (batch, m), num_col_segments, "num_col_segments")
    if pairs is not None and pairs.shape != (rows_in, cols_in):
        raise ValueError(f"pairs must be (num_row_segments, num_col_segments) = {(rows_in, cols_in)}, got {tuple(pairs.shape)}")
    if "matrix" in chosen and batch * heads * n * m > MATRIX_LIMIT and "large_matrix" not in outputs:
        raise ValueError(
            f"outputs: 'matrix' would hold {batch * heads * n * m} numbers, more than {MATRIX_LIMIT}; ask for 'large_matrix' if that "
            f"is meant"
        )
    on_cpu = query.device.type == "cpu" and not torch.compiler.is_compiling()
    if on_cpu and grad_output.numel() and not all(math.isfinite(x) for x in grad_output.aminmax()):  # both carry a NaN on; one pass
        raise ValueError("grad_output must be finite, got NaN or infinity; scale the loss or use a wider dtype")
    serving = _backend(backend, query.device.type, query.dtype)
    query, key, value, grad_output = (t.detach() for t in (query, key, value, grad_output))
    options = {"causal": causal, "q_offset": q_offset, "window": window, "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    if serving == "reference":
        return saliency_flow_reference(
            query,
            key,
            value,
            grad_output,
            lse,
            row_segments,
            col_segments,
            num_row_segments=rows_in,
            num_col_segments=cols_in,
            softmax_scale=softmax_scale,
            softcap=softcap,
            sinks=sinks,
            key_mask=key_mask,
            pairs=pairs,
            outputs=outputs,
            exclude_diagonal=exclude_diagonal,
            **options,
        )
    if lse is None:
        _, lse = attention_with_lse(
            query, key, value, softmax_scale=softmax_scale, softcap=softcap, sinks=sinks, key_mask=key_mask, **options
        )

    visible = visible_ranges(batch, n, m, device=query.device, **options)
    count, box = pair_counts(visible, row_segments, col_segments, rows_in, cols_in, key_mask=key_mask, exclude_diagonal=exclude_diagonal)
    wanted = None if pairs is None else pairs.bool()

    everything = bool(chosen & {"row_sum", "col_sum", "matrix"})  # then every visible pair is computed, wanted or not
    row_bucket = everything or "row_by_seg" in chosen
    col_bucket = everything or "col_by_seg" in chosen
    compute = torch.zeros(rows_in + row_bucket, cols_in + col_bucket, dtype=torch.bool, device=query.device)
    if everything:
        compute.fill_(True)
    else:
        compute[:rows_in, :cols_in] = True if wanted is None else wanted
        if wanted is None:
            compute[rows_in:, :cols_in] = "row_by_seg" in chosen
            compute[:rows_in, cols_in:] = "col_by_seg" in chosen
    rows = torch.where(row_segments < 0, rows_in, row_segments) if row_bucket else row_segments
    cols = torch.where(col_segments < 0, cols_in, col_segments) if col_bucket else col_segments

    code = sum(1 << bit for bit, kind in enumerate(KINDS) if kind in chosen)
    code |= (
        HEADSUM * ("headsum_abs" in chosen)
        | ROW_BINS * bool(chosen & {"row_by_seg", "row_sum"})
        | COLUMN_BINS * bool(chosen & {"col_by_seg", "col_sum"})
    )
    code |= MATRIX * ("matrix" in chosen)
    if code & (ROW_BINS | COLUMN_BINS | MATRIX):
        code |= 1
    operator = {"cpp": "saliency_flow_fwd", "triton": "saliency_flow_triton", "torch": "saliency_flow_blocked"}[serving]
    accumulation = torch.float64 if query.dtype == torch.float64 else torch.float32
    flat = [t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value, grad_output)]
    bins, headsum, row_bins, column_bins, matrix = getattr(torch.ops.llmcore, operator)(
        *flat,
        lse.detach().to(accumulation).contiguous(),
        visible.low,
        visible.high,
        visible.diagonal if exclude_diagonal else None,
        None if key_mask is None else key_mask.bool().to(torch.uint8).contiguous(),
        rows.int().contiguous(),
        cols.int().contiguous(),
        compute.to(torch.uint8),
        float(d**-0.5 if softmax_scale is None else softmax_scale),
        float(softcap or 0.0),
        code,
    )

    result: dict[str, Tensor] = {}
    kinds = [kind for bit, kind in enumerate(KINDS) if code >> bit & 1]
    hide = ~wanted if wanted is not None and everything else None
    for index, kind in enumerate(kinds):
        if kind in chosen:
            sums = bins[index, :, :, :rows_in, :cols_in]
            result[f"{kind}_sum"] = sums.clone() if hide is None else sums.masked_fill(hide, 0.0)
    if "headsum_abs" in chosen:
        sums = headsum[:, :rows_in, :cols_in]
        result["headsum_abs"] = sums.clone() if hide is None else sums.masked_fill(hide, 0.0)
    if "row_by_seg" in chosen:
        x = row_bins[..., :cols_in]
        if wanted is not None:
            readers = torch.cat([wanted, wanted.new_zeros(1, cols_in)])[torch.where(row_segments < 0, rows_in, row_segments).long()]
            x = x.masked_fill(~readers[:, None], 0.0)
        result["row_by_seg"] = x.clone()
    if "col_by_seg" in chosen:
        x = column_bins[:, :, :rows_in]
        if wanted is not None:
            read = torch.cat([wanted, wanted.new_zeros(rows_in, 1)], 1)[
                :, torch.where(col_segments < 0, cols_in, col_segments).long()
            ].transpose(0, 1)
            x = x.masked_fill(~read[:, None], 0.0)
        result["col_by_seg"] = x.clone()
    if "row_sum" in chosen:
        result["row_sum"] = row_bins.sum(-1)
    if "col_sum" in chosen:
        result["col_sum"] = column_bins.sum(-2)
    if "matrix" in chosen:
        result["matrix"] = matrix
    return SaliencyFlow(count=count, box=box, pairs=wanted, **result)
