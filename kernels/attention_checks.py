"""What every attention function of this family takes: shapes, devices, dtypes and ranges, checked once at the public boundary."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def check_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    softmax_scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> None:
    """Shapes, devices, dtypes and ranges of one layer's tensors."""
    for name, t in (("query", query), ("key", key), ("value", value)):
        if t.dim() != 4:
            raise ValueError(f"{name} must be (batch, heads, seq_len, head_dim), got {tuple(t.shape)}")
        if not t.is_floating_point():
            raise TypeError(f"{name} must be a float tensor, got {t.dtype}")
        if t.dtype != query.dtype or t.device != query.device:
            raise ValueError(f"{name} must match query's dtype and device ({query.dtype}, {query.device}), got ({t.dtype}, {t.device})")
    batch, heads, _, size = query.shape
    kv = key.shape[1]
    if key.shape[0] != batch or key.shape[3] != size:
        raise ValueError(
            f"key must be (batch, num_kv_heads, num_cols, head_dim) with batch {batch} and head_dim {size}, got {tuple(key.shape)}"
        )
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(f"value must agree with key in batch, heads and length {tuple(key.shape[:3])}, got {tuple(value.shape)}")
    if kv == 0 or heads % kv:
        raise ValueError(f"query's num_heads must be a multiple of key's num_kv_heads, got {heads} and {kv}")
    if softmax_scale is not None and not math.isfinite(softmax_scale):
        raise ValueError(f"softmax_scale must be finite, got {softmax_scale}")
    if softcap is not None and not (softcap > 0 and math.isfinite(softcap)):
        raise ValueError(f"softcap must be positive and finite, got {softcap}; pass None for no soft-cap")
    if sinks is not None and sinks.shape != (heads,):
        raise ValueError(f"sinks must be (num_heads,) = ({heads},), got {tuple(sinks.shape)}")


def check_masks(
    batch: int,
    rows: int,
    cols: int,
    window: int | None,
    key_mask: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> None:
    """What says which of `cols` columns a row may read. Values are read where that is free (CPU tensors outside a compiled graph)."""
    if window is not None and window <= 0:
        raise ValueError(f"window must be positive (the number of columns a row sees, itself included), got {window}")
    if key_mask is not None:
        if key_mask.shape != (batch, cols):
            raise ValueError(f"key_mask must be (batch, num_cols) = ({batch}, {cols}), got {tuple(key_mask.shape)}")
        if key_mask.is_floating_point():
            raise TypeError(f"key_mask must be bool or integer (non-zero: may be read), got {key_mask.dtype}")
    if cu_seqlens_k is not None and cu_seqlens_q is None:
        raise ValueError("cu_seqlens_k needs cu_seqlens_q")
    for name, borders, length in (("cu_seqlens_q", cu_seqlens_q, rows), ("cu_seqlens_k", cu_seqlens_k, cols)):
        if borders is None:
            continue
        if borders.dim() not in (1, 2) or borders.shape[-1] < 2 or borders.is_floating_point():
            raise ValueError(
                f"{name} must be integers of shape (num_documents + 1,) or (batch, num_documents + 1), got {borders.dtype} "
                f"{tuple(borders.shape)}"
            )
        if borders.dim() == 1 and batch != 1:
            raise ValueError(
                f"{name} of one dimension packs one row of the batch: batch must be 1, got {batch}; pass (batch, num_documents + 1)"
            )
        if borders.dim() == 2 and borders.shape[0] != batch:
            raise ValueError(f"{name} must have one row a sequence ({batch}), got {tuple(borders.shape)}")
        readable = borders.device.type == "cpu" and not torch.compiler.is_compiling()
        if readable and ((borders[..., 0] != 0).any() or (borders.diff(dim=-1) < 0).any() or (borders[..., -1] > length).any()):
            raise ValueError(f"{name} must start at 0, not decrease and end within {length}, got {borders.tolist()}")
    if cu_seqlens_q is not None and (cu_seqlens_k if cu_seqlens_k is not None else cu_seqlens_q).shape != cu_seqlens_q.shape:
        raise ValueError(f"cu_seqlens_k must have cu_seqlens_q's shape {tuple(cu_seqlens_q.shape)}")
    if cu_seqlens_q is not None and cu_seqlens_k is None and rows != cols:
        raise ValueError(f"cu_seqlens_k is needed when query and key differ in length ({rows}, {cols})")
