"""What the fused linear log-probability is given: checks at the boundary, which labels are scored, the operands of a call."""

from __future__ import annotations

import math
from typing import Any

import torch
from llmcore.kernels.linear_logprob_core import Head
from torch import Tensor

# N scored rows (tokens), V vocabulary, D hidden, B sequences, T positions

# ---- checks ------------------------------------------------------------------------------------------------------------------------------


def _ref_head(ref: tuple[Tensor, ...] | None) -> tuple[Tensor, Tensor, Tensor | None]:
    if ref is None:
        raise ValueError(
            "ref must be (ref_hidden_states, ref_weight) or (ref_hidden_states, ref_weight, ref_bias) when outputs holds 'kl_full', "
            "got None"
        )
    if not isinstance(ref, tuple | list) or len(ref) not in (2, 3):
        raise ValueError(
            f"ref must be a tuple of 2 or 3 tensors, got {type(ref).__name__}" + (f" of {len(ref)}" if hasattr(ref, "__len__") else "")
        )
    return ref[0], ref[1], ref[2] if len(ref) == 3 else None


def _check_tensor(name: str, value: Any, floating: bool = True) -> None:
    if not isinstance(value, Tensor):
        hint = "; pass its .weight, and merge adapters first" if isinstance(value, torch.nn.Module) else ""
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}{hint}")
    if hasattr(value, "placements") and hasattr(value, "device_mesh"):
        raise TypeError(
            f"{name} is a DTensor, whose shards this kernel would read as the whole; pass {name}.full_tensor(), or {name}.to_local() of a "
            "row-sharded weight with process_group= and vocab_range="
        )
    if floating and value.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {value.dtype}")


def _check(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    label_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    shift: int,
    softcap: float | None,
    temperature: float,
    logit_scale: float | None,
) -> None:
    _check_tensor("hidden_states", hidden)
    _check_tensor("weight", weight)
    _check_tensor("labels", labels, floating=False)
    if labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"labels must be int64 or int32, got {labels.dtype}")
    if hidden.dim() < 2 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden_states (…, hidden_size) and weight (vocab_size, hidden_size) must agree in hidden_size, got {tuple(hidden.shape)} and "
            f"{tuple(weight.shape)}"
        )
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"labels must be {tuple(hidden.shape[:-1])} to match hidden_states {tuple(hidden.shape)}, got {tuple(labels.shape)}; pass "
            "unshifted "
            "tensors with shift=1, or shift both yourself"
        )
    if weight.shape[0] == 0:
        raise ValueError("weight must have at least one vocabulary row, got (0, …)")
    if {torch.float64} & {hidden.dtype, weight.dtype} and hidden.dtype != weight.dtype:
        raise TypeError(f"hidden_states and weight must both be float64 or neither, got {hidden.dtype} and {weight.dtype}")
    for name, value in (("weight", weight), ("labels", labels), ("bias", bias), ("label_mask", label_mask)):
        if value is not None and value.device != hidden.device:
            raise ValueError(f"{name} must be on {hidden.device} like hidden_states, got {value.device}")
    if bias is not None:
        _check_tensor("bias", bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias must be ({weight.shape[0]},) to match weight, got {tuple(bias.shape)}")
    if label_mask is not None and (label_mask.dtype != torch.bool or label_mask.shape != labels.shape):
        raise ValueError(f"label_mask must be bool {tuple(labels.shape)}, got {label_mask.dtype} {tuple(label_mask.shape)}")
    if not isinstance(shift, int) or shift < 0:
        raise ValueError(f"shift must be an int >= 0, got {shift!r}")
    if cu_seqlens is not None:
        if cu_seqlens.dim() != 1 or len(cu_seqlens) < 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"cu_seqlens must be (num_sequences + 1,) int32, got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}")
        readable = not torch.compiler.is_compiling() and cu_seqlens.device.type == "cpu"
        if readable and (int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != labels.numel() or bool((cu_seqlens.diff() < 0).any())):
            raise ValueError(f"cu_seqlens must rise from 0 to the number of labels {labels.numel()}, got {cu_seqlens.tolist()[:8]}…")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive or None, got {softcap!r}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature!r}")
    if logit_scale is not None and not math.isfinite(logit_scale):
        raise ValueError(f"logit_scale must be finite or None (= 1), got {logit_scale!r}")


# ---- rows --------------------------------------------------------------------------------------------------------------------------------


def _scored(labels: Tensor, label_mask: Tensor | None, cu_seqlens: Tensor | None, ignore_index: int, shift: int) -> Tensor:
    """Which labels are scored: not ignored, and with a predicting position inside their own sequence."""
    scored = label_mask.clone() if label_mask is not None else labels != ignore_index
    if shift and cu_seqlens is None:
        scored = scored & (torch.arange(labels.shape[-1], device=labels.device) >= shift)
    elif shift:
        assert cu_seqlens is not None
        position = torch.arange(labels.numel(), device=labels.device)
        cu = cu_seqlens.to(device=labels.device, dtype=torch.int64)
        begin = cu[torch.searchsorted(cu, position, right=True) - 1]
        scored = scored & (position - begin >= shift).reshape(labels.shape)
    return scored


def _rows_of(hidden: Tensor) -> tuple[Tensor, int, int]:
    """(hidden2d, T, step): flat position b·T + t of a (…, T, D) tensor is row b·step + t of hidden2d. A sequence slice is not copied."""
    size = hidden.shape[-1]
    if hidden.dim() == 2:
        return (hidden if hidden.stride(-1) == 1 and hidden.stride(0) >= size else hidden.contiguous()), hidden.shape[0], hidden.shape[0]
    if hidden.dim() == 3 and hidden.stride(2) == 1 and hidden.stride(1) >= size and hidden.stride(0) % hidden.stride(1) == 0:
        batch, length, pitch = hidden.shape[0], hidden.shape[1], hidden.stride(1)
        step = hidden.stride(0) // pitch
        if step >= length and batch and length:
            return hidden.as_strided(((batch - 1) * step + length, size), (pitch, 1)), length, step
    flat = hidden.contiguous().view(-1, size)
    return flat, max(len(flat), 1), max(len(flat), 1)


def _head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    scored_index: Tensor,
    shift: int,
    vocab_start: int,
    logit_scale: float,
    softcap: float,
    temperature: float,
) -> tuple[Head, Tensor]:
    """The call's operands, and the flat hidden row of each scored label."""
    hidden2d, length, step = _rows_of(hidden)
    flat = scored_index - shift
    rows = flat if step == length else flat // length * step + flat % length
    picked = labels.reshape(-1).index_select(0, scored_index).long()
    weight = weight if weight.stride(-1) == 1 else weight.contiguous()
    return Head(hidden2d, rows, weight, bias, picked, vocab_start, logit_scale, softcap, temperature), flat


def _check_labels(labels: Tensor, low: int, high: int | None) -> None:
    if labels.numel() == 0:
        return
    bad = (labels < low) if high is None else (labels < low) | (labels >= high)
    if labels.device.type != "cpu":
        torch._assert_async(~bad.any(), "labels out of the vocabulary's range")
    elif bool(bad.any()):
        at = int(bad.nonzero()[0, 0])
        limit = "" if high is None else f" and below the vocabulary size {high}"
        raise ValueError(
            f"labels must be at least {low}{limit} or equal ignore_index, got {int(labels[at])} (scored label number {at}); mark positions "
            "that are not scored with ignore_index or label_mask"
        )
