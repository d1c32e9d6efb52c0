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
from llmcore.kernels.attention_checks import check_attention, check_masks
from llmcore.kernels.attention_lse import attention_with_lse
from llmcore.kernels.saliency_flow_operator import KINDS, Problem, Sums
from llmcore.kernels.saliency_flow_plan import OUTPUTS, FlowPlan, output_names, plan_saliency_flow
from torch import Tensor

__all__ = [
    "KINDS",
    "OUTPUTS",
    "FlowPlan",
    "SaliencyFlow",
    "attention_with_lse",
    "plan_saliency_flow",
    "planned_saliency_flow",
    "saliency_flow",
    "saliency_flow_reference",
]

# B batch, H query heads, G key/value heads, n rows (queries), m columns (keys), d / e head sizes of key / value, Sr / Sc row / column
# segments

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

    chosen = output_names(outputs)
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


@torch.compiler.assume_constant_result
def _backend(backend: str, device_type: str, dtype: torch.dtype) -> str:
    refused = {}
    if dtype == torch.float64:
        refused = {name: f"it sums in float32 and {dtype} was given; use backend='torch'" for name in ("cpp", "triton")}
    return backends.choose("saliency_flow", backend, torch.device(device_type), refused)


def planned_saliency_flow(
    plan: FlowPlan,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_output: Tensor,
    lse: Tensor | None,
    *,
    softmax_scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    backend: str = "auto",
) -> SaliencyFlow:
    """`saliency_flow` of one layer with the masks, segments and outputs of `plan`; its count and box are the plan's own tensors."""
    check_attention(query, key, value, softmax_scale, softcap, sinks)
    shape = (query.shape[0], query.shape[2], key.shape[2])
    planned = (*plan.row_segments.shape, plan.col_segments.shape[1])
    if shape != planned:
        raise ValueError(f"query and key must have the plan's (batch, num_rows, num_cols) = {planned}, got {shape}")
    if plan.row_segments.device != query.device:
        raise ValueError(f"query must be on the plan's device {plan.row_segments.device}, got {query.device}")
    return _flow_of_layer(plan, query, key, value, grad_output, lse, softmax_scale, softcap, sinks, backend)


def _flow_of_layer(
    plan: FlowPlan,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_output: Tensor,
    lse: Tensor | None,
    softmax_scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    backend: str,
) -> SaliencyFlow:
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
    chosen = output_names(plan.outputs)
    if "matrix" in chosen and batch * heads * n * m > MATRIX_LIMIT and "large_matrix" not in plan.outputs:
        raise ValueError(
            f"outputs: 'matrix' would hold {batch * heads * n * m} numbers, more than {MATRIX_LIMIT}; ask for 'large_matrix' if that "
            f"is meant"
        )
    on_cpu = query.device.type == "cpu" and not torch.compiler.is_compiling()
    if on_cpu and grad_output.numel() and not all(math.isfinite(x) for x in grad_output.aminmax()):  # both carry a NaN on; one pass
        raise ValueError("grad_output must be finite, got NaN or infinity; scale the loss or use a wider dtype")
    serving = _backend(backend, query.device.type, query.dtype)
    query, key, value, grad_output = (t.detach() for t in (query, key, value, grad_output))
    if serving == "reference":
        return saliency_flow_reference(
            query,
            key,
            value,
            grad_output,
            lse,
            plan.row_segments,
            plan.col_segments,
            num_row_segments=plan.num_row_segments,
            num_col_segments=plan.num_col_segments,
            softmax_scale=softmax_scale,
            softcap=softcap,
            sinks=sinks,
            key_mask=plan.key_mask,
            pairs=plan.pairs,
            outputs=plan.outputs,
            exclude_diagonal=plan.exclude_diagonal,
            **plan.options,
        )
    if lse is None:
        _, lse = attention_with_lse(
            query, key, value, softmax_scale=softmax_scale, softcap=softcap, sinks=sinks, key_mask=plan.key_mask, **plan.options
        )
    operator = {"cpp": "saliency_flow_fwd", "triton": "saliency_flow_triton", "torch": "saliency_flow_blocked"}[serving]
    accumulation = torch.float64 if query.dtype == torch.float64 else torch.float32
    problem = Problem(
        *(t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value, grad_output)),
        lse=lse.detach().to(accumulation).contiguous(),
        low=plan.visible.low,
        high=plan.visible.high,
        diagonal=plan.visible.diagonal if plan.exclude_diagonal else None,
        key_valid=plan.key_valid,
        row_segment=plan.row_ids,
        column_segment=plan.col_ids,
        pairs=plan.compute,
        scale=float(d**-0.5 if softmax_scale is None else softmax_scale),
        softcap=float(softcap or 0.0),
        outputs=plan.code,
    )
    return _named(plan, chosen, Sums(*getattr(torch.ops.llmcore, operator)(*problem)))


def _named(plan: FlowPlan, chosen: set[str], sums: Sums) -> SaliencyFlow:
    """The operator's results without the extra segments, pruned pairs hidden."""
    rows_in, cols_in, wanted = plan.num_row_segments, plan.num_col_segments, plan.pairs
    everything = bool(chosen & {"row_sum", "col_sum", "matrix"})
    hide = ~wanted if wanted is not None and everything else None

    def inside(x: Tensor) -> Tensor:
        cut = x[..., :rows_in, :cols_in]
        if hide is not None:
            return cut.masked_fill(hide, 0.0)
        return x if cut.shape == x.shape else cut.clone()

    result: dict[str, Tensor] = {}
    for index, kind in enumerate(kind for bit, kind in enumerate(KINDS) if plan.code >> bit & 1):
        if kind in chosen:
            result[f"{kind}_sum"] = inside(sums.bins[index])
    if "headsum_abs" in chosen:
        result["headsum_abs"] = inside(sums.headsum)
    if "row_by_seg" in chosen:
        x = sums.row_bins[..., :cols_in]
        if wanted is not None:
            readers = torch.cat([wanted, wanted.new_zeros(1, cols_in)])[plan.row_ids.long()]
            x = x.masked_fill(~readers[:, None], 0.0)
        result["row_by_seg"] = x.clone()
    if "col_by_seg" in chosen:
        x = sums.column_bins[:, :, :rows_in]
        if wanted is not None:
            read = torch.cat([wanted, wanted.new_zeros(rows_in, 1)], 1)[:, plan.col_ids.long()].transpose(0, 1)
            x = x.masked_fill(~read[:, None], 0.0)
        result["col_by_seg"] = x.clone()
    if "row_sum" in chosen:
        result["row_sum"] = sums.row_bins.sum(-1)
    if "col_sum" in chosen:
        result["col_sum"] = sums.column_bins.sum(-2)
    if "matrix" in chosen:
        result["matrix"] = sums.matrix
    return SaliencyFlow(count=plan.visible_count, box=plan.box, pairs=wanted, **result)


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

    Layers that share masks and segments share a plan: `plan_saliency_flow` once, `planned_saliency_flow` a layer.

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
    check_attention(query, key, value, softmax_scale, softcap, sinks)
    batch, n, m = query.shape[0], query.shape[2], key.shape[2]
    check_masks(batch, n, m, window, key_mask, cu_seqlens_q, cu_seqlens_k)
    for name, t in (("row_segments", row_segments), ("col_segments", col_segments), ("pairs", pairs), ("key_mask", key_mask)):
        if t is not None and t.device != query.device:
            raise ValueError(f"{name} must be on query's device {query.device}, got {t.device}")
    if col_segments is None and n != m:
        raise ValueError(f"col_segments must be given when rows and columns differ in number, got {n} rows and {m} columns")
    for name, t, length in (("row_segments", row_segments, n), ("col_segments", col_segments, m)):
        if t is not None and t.shape != (batch, length):
            raise ValueError(f"{name} must be {(batch, length)}, one id a token, got {tuple(t.shape)}")
    plan = plan_saliency_flow(
        row_segments,
        col_segments,
        num_row_segments=num_row_segments,
        num_col_segments=num_col_segments,
        causal=causal,
        q_offset=q_offset,
        window=window,
        key_mask=key_mask,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        pairs=pairs,
        outputs=outputs,
        exclude_diagonal=exclude_diagonal,
    )
    return _flow_of_layer(plan, query, key, value, grad_output, lse, softmax_scale, softcap, sinks, backend)
