"""Attention that also returns its log-sum-exp, over the platform's flash kernels, for every mask that saliency flow knows.

    lse_i = log( Σ_j exp(s_ij) + exp(sink) )      o_i = Σ_j exp(s_ij - lse_i) v_j      s_ij = softcap(scale · q_i·k_j), j visible to i

What the flash kernels lack is put together from them exactly, since a softmax over a union of columns is a mix of the parts weighted by
exp(lse_part - lse):
grouped heads are a stride-0 view, a key/value prefix is one rectangular and one square call, padding and documents are dense calls on
slices, a sink rescales the
result. The backward of a part is the flash backward with the *whole* row's o and lse: it recomputes P = exp(s - lse) and needs only Σ_j P
dP = do·o.
Windows on a CPU, soft-caps, holes in a padding mask and float dtypes without a flash kernel take a blocked version, O(block · columns
read) memory.

Bound: 4·n²·d·H FLOP forward (causal half), 2.5 times that backward; q, k, v, o once through memory. Nothing of size n².
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from llmcore.kernels.attention_checks import check_attention, check_masks
from llmcore.kernels.visibility import visible_ranges
from torch import Tensor

# B batch, H query heads, G key/value heads (query head h reads h // (H / G)), n rows, m columns, d / e head sizes of key / value

BLOCK_ROWS = 128
MASK_LIMIT = 1 << 19  # entries of the mask of one call behind a prefix


class Dense(NamedTuple):
    """Rows [q0, q1) of sequences [b0, b1) read columns [k0, k1): all of them, or causally with q1 - q0 = k1 - k0."""

    b0: int
    b1: int
    q0: int
    q1: int
    k0: int
    k1: int
    causal: bool


def _plan(
    query: Tensor,
    key: Tensor,
    causal: bool,
    q_offset: int | None,
    window: int | None,
    key_mask: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> list[Dense] | None:
    """The problem as dense rectangles, those of one row adding up to what it reads; None when its shape is no union of such."""
    batch, rows, cols = query.shape[0], query.shape[2], key.shape[2]
    if cu_seqlens_q is not None:
        starts_q = cu_seqlens_q.expand(batch, -1).tolist()
        starts_k = (cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k).expand(batch, -1).tolist()
        documents = [
            (b, b + 1, q0, q1, k0, k1)
            for b in range(batch)
            for q0, q1, k0, k1 in zip(starts_q[b], starts_q[b][1:], starts_k[b], starts_k[b][1:], strict=False)
            if q1 > q0
        ]
    else:
        documents = [(0, batch, 0, rows, 0, cols)]
    if key_mask is not None:
        if q_offset is not None:
            return None
        mask = key_mask.bool().cpu()
        clipped = []
        for b0, b1, q0, q1, k0, k1 in documents:
            for b in range(b0, b1):
                valid = mask[b, k0:k1].nonzero().flatten().tolist()
                first, last = (valid[0], valid[-1] + 1) if valid else (0, 0)
                if last - first != len(valid):
                    return None
                if causal:  # rows before the first valid column read nothing; rows behind the last valid one read all of them
                    shift = (k1 - k0) - (q1 - q0)
                    start, tail = max(first - shift, 0), max(k1 - k0 - last, 0)
                    body = max((q1 - q0) - tail, start)
                    if body > start:
                        clipped.append((b, b + 1, q0 + start, q0 + body, k0 + first, k0 + body + shift))
                    if q1 - q0 > body and valid:  # b1 = -1: read all of these columns
                        clipped.append((b, -1, q0 + body, q1, k0 + first, k0 + last))
                elif valid:
                    clipped.append((b, b + 1, q0, q1, k0 + first, k0 + last))
        documents = clipped
    parts: list[Dense] = []
    for b0, b1, q0, q1, k0, k1 in documents:
        n, m = q1 - q0, k1 - k0
        offset = m - n if q_offset is None else q_offset
        if not causal or b1 < 0:
            if m:
                parts.append(Dense(b0, b0 + 1 if b1 < 0 else b1, q0, q1, k0, k1, False))
            continue
        if offset != m - n or offset < 0:
            return None
        if n == 1:
            parts.append(Dense(b0, b1, q0, q1, k0, k1, False))
            continue
        if offset:
            parts.append(Dense(b0, b1, q0, q1, k0, k0 + offset, False))
        parts.append(Dense(b0, b1, q0, q1, k0 + offset, k1, True))
    hides = window is not None and any(part.k1 - part.k0 > window or not part.causal for part in parts)
    if hides and not (query.is_cuda and all(part.causal for part in parts)):
        return None  # only the flash kernels of a GPU take a window, and only in square causal parts
    return parts


def _flash_serves(query: Tensor, value: Tensor) -> bool:
    if query.numel() == 0 or value.numel() == 0:  # the CPU kernel divides by the number of rows and ends the process
        return False
    if query.device.type == "cpu":
        return query.dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    return (
        query.device.type == "cuda"
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[3] == value.shape[3]
        and query.shape[3] % 8 == 0
        and query.shape[3] <= 256
    )


def _folded(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B·G, H/G, n, d) queries and stride-0 views of keys and values: grouped heads without repeating them in memory."""
    batch, heads, rows, size = query.shape
    kv = key.shape[1]
    group = heads // kv
    width = max(size, value.shape[3])
    if size != value.shape[3]:  # the flash kernels want one head size; zero columns change neither scores nor the kept part of o
        query, key, value = (torch.nn.functional.pad(t, (0, width - t.shape[3])) for t in (query, key, value))
    fold = (batch * kv, group, rows, width)

    def expand(t):
        return t.reshape(batch * kv, 1, t.shape[2], width).expand(-1, group, -1, -1)

    return query.reshape(fold), expand(key), expand(value)


def _short_prefix(query: Tensor, key: Tensor, parts: list[Dense]) -> Tensor | None:
    """(1, 1, n, m) mask to add, when rows behind a common prefix are few enough for one masked call instead of a rectangle and a square."""
    batch, rows, cols = query.shape[0], query.shape[2], key.shape[2]
    whole = [(0, batch, 0, rows, 0, cols - rows, False), (0, batch, 0, rows, cols - rows, cols, True)]
    if query.is_cuda or rows * cols > MASK_LIMIT or [tuple(part) for part in parts] != whole:
        return None
    return torch.full((rows, cols), -math.inf, dtype=query.dtype, device=query.device).triu_(cols - rows + 1)[None, None]


def _flash_fwd(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float, window: int | None, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    batch, heads, rows, _ = query.shape
    if query.is_cuda:
        left = -1 if window is None else window - 1
        output, lse, *_ = torch.ops.aten._flash_attention_forward(
            *(t.transpose(1, 2) for t in (query, key, value)),
            None,
            None,
            rows,
            key.shape[2],
            0.0,
            causal,
            False,
            scale=scale,
            window_size_left=left,
            window_size_right=0 if causal else -1,
        )
        return output.transpose(1, 2), lse
    q, k, v = _folded(query, key, value)
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
    return output.reshape(batch, heads, rows, -1)[..., : value.shape[3]], lse.reshape(batch, heads, rows)


def _flash_bwd(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
    window: int | None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, rows, size = query.shape
    kv, cols, value_size = key.shape[1], key.shape[2], value.shape[3]
    if query.is_cuda:
        left = -1 if window is None else window - 1
        state = torch.empty(2, dtype=torch.uint64, device=query.device), torch.empty((), dtype=torch.uint64, device=query.device)
        grads = torch.ops.aten._flash_attention_backward(
            *(t.transpose(1, 2) for t in (grad.contiguous(), query, key, value, output)),
            lse.contiguous(),
            None,
            None,
            rows,
            cols,
            0.0,
            causal,
            *state,
            scale=scale,
            window_size_left=left,
            window_size_right=0 if causal else -1,
        )
        return tuple(t.transpose(1, 2) for t in grads)
    q, k, v = _folded(query, key, value)
    pad = (0, q.shape[3] - value_size)
    fold = (*q.shape[:3], -1)
    g, o = (torch.nn.functional.pad(t, pad).reshape(fold) if pad[1] else t.reshape(fold) for t in (grad, output))
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        g, q, k, v, o, lse.reshape(fold[:3]), 0.0, causal, attn_mask=mask, scale=scale
    )
    dk, dv = (t.sum(1).view(batch, kv, cols, -1) for t in (dk, dv))
    return dq.reshape(batch, heads, rows, -1)[..., :size], dk[..., :size], dv[..., :value_size]


def _cut(t: Tensor, part: Dense, rows: bool) -> Tensor:
    return t[part.b0 : part.b1, :, part.q0 : part.q1] if rows else t[part.b0 : part.b1, :, part.k0 : part.k1]


def _accumulation(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _block(
    query: Tensor,
    key: Tensor,
    b: int,
    start: int,
    stop: int,
    low: Tensor,
    high: Tensor,
    valid: Tensor | None,
    scale: float,
    softcap: float | None,
) -> tuple[slice, Tensor, Tensor, Tensor] | None:
    """Scores (G, H/G, rows, cols) of rows [start, stop) against the columns any of them reads, the tanh (or scores) before the cap's
    scale, and the visible mask."""
    lo, hi = low[b, start:stop], high[b, start:stop]
    live = hi > lo
    if not bool(live.any()):
        return None
    cols = slice(int(lo[live].min()), int(hi[live].max()))
    heads, kv, size = query.shape[1], key.shape[1], query.shape[3]
    acc = _accumulation(query.dtype)
    q = query[b, :, start:stop].to(acc).reshape(kv, heads // kv * (stop - start), size)
    scores = (q @ key[b, :, cols].to(acc).transpose(1, 2)).mul_(scale).view(kv, heads // kv, stop - start, -1)
    capped = scores
    if softcap is not None:
        capped = torch.tanh(scores / softcap)
        scores = capped * softcap
    j = torch.arange(cols.start, cols.stop, device=query.device)
    visible = (j >= lo[:, None]) & (j < hi[:, None])
    if valid is not None:
        visible &= valid[b, cols]
    return cols, scores, capped, visible


def _blocked_fwd(
    query: Tensor, key: Tensor, value: Tensor, low: Tensor, high: Tensor, valid: Tensor | None, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    batch, heads, rows, _ = query.shape
    kv = key.shape[1]
    acc = _accumulation(query.dtype)
    output = query.new_zeros(batch, heads, rows, value.shape[3])
    lse = torch.full((batch, heads, rows), -math.inf, dtype=acc, device=query.device)
    for b in range(batch):
        for start in range(0, rows, BLOCK_ROWS):
            stop = min(start + BLOCK_ROWS, rows)
            block = _block(query, key, b, start, stop, low, high, valid, scale, softcap)
            if block is None:
                continue
            cols, scores, _, visible = block
            scores.masked_fill_(~visible, -math.inf)
            row_lse = scores.logsumexp(-1)
            p = (scores - row_lse.nan_to_num(neginf=0.0)[..., None]).exp_()
            p = p.view(kv, -1, p.shape[-1]) @ value[b, :, cols].to(acc)
            output[b, :, start:stop] = p.view(heads, stop - start, -1).to(query.dtype)
            lse[b, :, start:stop] = row_lse.view(heads, stop - start)
    return output, lse


def _blocked_bwd(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    low: Tensor,
    high: Tensor,
    valid: Tensor | None,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, rows, size = query.shape
    kv = key.shape[1]
    acc = _accumulation(query.dtype)
    dq = torch.zeros_like(query, memory_format=torch.contiguous_format)
    dk, dv = (torch.zeros(t.shape, dtype=acc, device=t.device) for t in (key, value))
    delta = (grad.to(acc) * output.to(acc)).sum(-1)
    for b in range(batch):
        for start in range(0, rows, BLOCK_ROWS):
            stop = min(start + BLOCK_ROWS, rows)
            block = _block(query, key, b, start, stop, low, high, valid, scale, softcap)
            if block is None:
                continue
            cols, scores, capped, visible = block
            shape = (kv, heads // kv, stop - start)
            row_lse = lse[b, :, start:stop].reshape(*shape, 1)
            p = (scores - row_lse.nan_to_num(neginf=0.0)).masked_fill_(~visible, -math.inf).exp_()
            g = grad[b, :, start:stop].to(acc).reshape(kv, -1, value.shape[3])
            dv[b, :, cols] += p.view(kv, -1, p.shape[-1]).transpose(1, 2) @ g
            dp = (g @ value[b, :, cols].to(acc).transpose(1, 2)).view_as(p)
            ds = p * (dp - delta[b, :, start:stop].reshape(*shape, 1)) * scale
            if softcap is not None:
                ds = ds * (1 - capped * capped)
            ds = ds.view(kv, -1, ds.shape[-1])
            dq[b, :, start:stop] = (ds @ key[b, :, cols].to(acc)).view(heads, stop - start, size).to(query.dtype)
            dk[b, :, cols] += ds.transpose(1, 2) @ query[b, :, start:stop].to(acc).reshape(kv, -1, size)
    return dq, dk.to(key.dtype), dv.to(value.dtype)


def forward_with_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    causal: bool,
    q_offset: int | None,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    key_mask: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    blocked: bool,
) -> tuple[Tensor, Tensor]:
    """(output, lse) of one layer; no checks, no graph."""
    batch, heads, rows, _ = query.shape
    parts = None
    if not blocked and softcap is None and _flash_serves(query, value):
        parts = _plan(query, key, causal, q_offset, window, key_mask, cu_seqlens_q, cu_seqlens_k)
    if parts is None:
        low, high, _ = visible_ranges(
            batch,
            rows,
            key.shape[2],
            device=query.device,
            causal=causal,
            q_offset=q_offset,
            window=window,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
        )
        output, lse = _blocked_fwd(query, key, value, low, high, None if key_mask is None else key_mask.bool(), scale, softcap)
    elif len(parts) == 1 and parts[0][:6] == (0, batch, 0, rows, 0, key.shape[2]):
        output, lse = _flash_fwd(query, key, value, parts[0].causal, scale, window)
    elif (mask := _short_prefix(query, key, parts)) is not None:
        output, lse = _flash_fwd(query, key, value, False, scale, window, mask)
    else:
        output = query.new_zeros(batch, heads, rows, value.shape[3])
        lse = torch.full((batch, heads, rows), -math.inf, dtype=_accumulation(query.dtype), device=query.device)
        for part in parts:
            piece, piece_lse = _flash_fwd(
                _cut(query, part, True), _cut(key, part, False), _cut(value, part, False), part.causal, scale, window
            )
            o, l = _cut(output, part, True), _cut(lse, part, True)
            total = torch.logaddexp(l, piece_lse)
            o.copy_(o * (l - total).exp()[..., None] + piece * (piece_lse - total).exp()[..., None])
            l.copy_(total)
    if sinks is not None:
        total = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
        output = (output * (lse - total).exp()[..., None]).to(query.dtype)
        lse = total
    return output.contiguous(), lse.contiguous()


attention_lse_fwd = torch.library.custom_op("llmcore::attention_lse_fwd", forward_with_lse, mutates_args=())


@attention_lse_fwd.register_fake
def _(query, key, value, scale, causal, q_offset, window, softcap, sinks, key_mask, cu_seqlens_q, cu_seqlens_k, blocked):
    return query.new_empty(*query.shape[:3], value.shape[3]), query.new_empty(query.shape[:3], dtype=_accumulation(query.dtype))


def backward_with_lse(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
    q_offset: int | None,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    key_mask: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    blocked: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and sinks (empty without) from what the forward kept; no checks, no graph."""
    batch, _, rows, _ = query.shape
    parts = None
    if not blocked and softcap is None and _flash_serves(query, value):
        parts = _plan(query, key, causal, q_offset, window, key_mask, cu_seqlens_q, cu_seqlens_k)
    if parts is None:
        low, high, _ = visible_ranges(
            batch,
            rows,
            key.shape[2],
            device=query.device,
            causal=causal,
            q_offset=q_offset,
            window=window,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
        )
        grads = _blocked_bwd(grad, query, key, value, output, lse, low, high, None if key_mask is None else key_mask.bool(), scale, softcap)
    elif len(parts) == 1 and parts[0][:6] == (0, batch, 0, rows, 0, key.shape[2]):
        grads = _flash_bwd(grad, query, key, value, output, lse, parts[0].causal, scale, window)
    elif (mask := _short_prefix(query, key, parts)) is not None:
        grads = _flash_bwd(grad, query, key, value, output, lse, False, scale, window, mask)
    else:
        grads = tuple(torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (query, key, value))
        for part in parts:
            piece = _flash_bwd(
                *(_cut(t, part, True) for t in (grad, query)),
                *(_cut(t, part, False) for t in (key, value)),
                *(_cut(t, part, True) for t in (output, lse)),
                part.causal,
                scale,
                window,
            )
            for total, term, is_row in zip(grads, piece, (True, False, False), strict=True):
                _cut(total, part, is_row).add_(term)
    if sinks is None:
        dsinks = query.new_zeros(0)
    else:
        delta = (grad.to(lse.dtype) * output.to(lse.dtype)).sum(-1)
        dsinks = -((sinks.to(lse.dtype)[:, None] - lse).exp() * delta).sum((0, 2)).to(sinks.dtype)
    return (*(t.contiguous() for t in grads), dsinks)


attention_lse_bwd = torch.library.custom_op("llmcore::attention_lse_bwd", backward_with_lse, mutates_args=())


@attention_lse_bwd.register_fake
def _(grad, query, key, value, output, lse, scale, causal, q_offset, window, softcap, sinks, key_mask, cu_seqlens_q, cu_seqlens_k, blocked):
    dsinks = query.new_empty(0) if sinks is None else torch.empty_like(sinks)
    return (*(t.new_empty(t.shape) for t in (query, key, value)), dsinks)


def _setup(ctx, inputs, output):
    query, key, value, *options = inputs
    tensors = [t for t in options if isinstance(t, Tensor)]
    ctx.where = [isinstance(t, Tensor) for t in options]
    ctx.plain = [None if isinstance(t, Tensor) else t for t in options]
    ctx.save_for_backward(query, key, value, *output, *tensors)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad, _):
    query, key, value, output, lse, *tensors = ctx.saved_tensors
    rest = iter(tensors)
    options = [next(rest) if there else plain for there, plain in zip(ctx.where, ctx.plain, strict=True)]
    dq, dk, dv, dsinks = attention_lse_bwd(grad, query, key, value, output, lse, *options)
    return (dq, dk, dv, None, None, None, None, None, dsinks if options[5] is not None else None, None, None, None, None)


attention_lse_fwd.register_autograd(_backward, setup_context=_setup)


def attention_with_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = True,
    q_offset: int | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention output and the log-sum-exp of every row, differentiable in query, key, value and sinks.

    Args:
        query: (B, H, n, d). key: (B, G, m, d), H a multiple of G. value: (B, G, m, e). Any float dtype, one device.
        softmax_scale: multiplies q·k; d^-1/2 by default. causal, q_offset, window, softcap, key_mask, cu_seqlens_*: as in `saliency_flow`.
        sinks: (H,) logits of one extra softmax column a head; they enter lse and take weight from all columns.
        backend: "auto" (flash kernels where they serve, else blocked), "torch" (always blocked).

    Returns:
        output (B, H, n, e) in query's dtype, 0 for a row that sees nothing; lse (B, H, n) float32 (float64 for float64), -inf there. lse
        carries no gradient.

    Memory: the output and lse; blocked: plus 3 · H · 128 · columns · 4 bytes.

    Example:
        >>> q, k, v = torch.randn(1, 4, 10, 16), torch.randn(1, 2, 10, 16), torch.randn(1, 2, 10, 16)
        >>> output, lse = attention_with_lse(q, k, v)
        >>> output.shape, lse.shape
        (torch.Size([1, 4, 10, 16]), torch.Size([1, 4, 10]))
    """
    check_attention(query, key, value, softmax_scale, softcap, sinks)
    check_masks(query.shape[0], query.shape[2], key.shape[2], window, key_mask, cu_seqlens_q, cu_seqlens_k)
    if backend not in ("auto", "torch"):
        raise ValueError(f"backend must be 'auto' or 'torch', got {backend!r}")
    scale = query.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    if window is not None and causal and q_offset is None and window >= key.shape[2]:
        window = None  # it hides nothing, and the flash kernels serve the call
    return attention_lse_fwd(
        query, key, value, float(scale), causal, q_offset, window, softcap, sinks, key_mask, cu_seqlens_q, cu_seqlens_k, backend == "torch"
    )
