"""The attention function and mask function that saliency flow registers with transformers, and who is told of each layer's backward.

The function runs flash attention with log-sum-exp; in the backward it hands (q, k, v, lse, do) to the active `Listener` and then computes
the ordinary flash backward. What it cannot honour (a 4-D mask, dropout, an unknown keyword, a mask that is no range) it refuses by name:
a function that swallows what it does not know returns wrong logits without a word.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from llmcore.kernels.attention_lse import backward_with_lse, forward_with_lse
from llmcore.target_loss import exact_logits

# B batch, H query heads, G key/value heads, n rows that run, m columns (a cached prefix included), d head size

NAME = "llmcore_saliency_flow"
_lock = threading.RLock()  # one listener at a time: the attention function finds it in `_active`, also from autograd's device threads
_active: Listener | None = None
_masks: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # (id of a padding mask, columns) -> that mask, its last columns as bool


@dataclasses.dataclass(frozen=True)
class Packing:
    """Sequences of unequal length: end to end (1, total) in every layer, so that no padding is computed, side by side (B, longest) inside
    attention. A cached prefix of batch 1 stands before all of them."""

    lengths: tuple[int, ...]

    def side_by_side(self, x: Tensor) -> Tensor:
        """(1, H, total, d) -> (B, H, longest, d), zero behind a sequence's end: no earlier row reads there, and its gradient is zero."""
        result = x.new_zeros(len(self.lengths), x.shape[1], max(self.lengths), x.shape[3])
        for row, piece in zip(result, x[0].split(self.lengths, 1), strict=True):
            row[:, : piece.shape[1]] = piece
        return result

    def end_to_end(self, x: Tensor) -> Tensor:
        """(B, H, longest, d) -> (1, H, total, d)."""
        return torch.cat([row[:, :length] for row, length in zip(x, self.lengths, strict=True)], 1)[None]

    def columns(self, x: Tensor, prefix: int) -> Tensor:
        """Keys or values (1, G, prefix + total, d) -> (B, G, prefix + longest, d)."""
        shared = x[:, :, :prefix].expand(len(self.lengths), -1, -1, -1)
        return torch.cat([shared, self.side_by_side(x[:, :, prefix:])], 2)

    def columns_back(self, x: Tensor, prefix: int) -> Tensor:
        """Adjoint of `columns`."""
        return torch.cat([x[:, :, :prefix].sum(0, keepdim=True), self.end_to_end(x[:, :, prefix:])], 2)


class Listener(Protocol):
    """What the attention function needs of a recorder."""

    prefix_length: int
    documents: Tensor | None  # (B, D + 1) borders of packed documents
    packing: Packing | None

    def layer_went_backward(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, lse: Tensor, grad: Tensor, options: dict[str, Any], window: int | None
    ) -> None:
        """options: as `saliency_flow` takes them, one key_mask object a mask, the window left out where it hides nothing.
        window: the layer's own."""
        ...


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """`listener` hears every attention of this block; other threads wait for its end."""
    global _active
    with _lock:
        _active = listener
        try:
            yield
        finally:
            _active = None
            _masks.clear()


def _key_mask(attention_mask: Tensor | None, cols: int) -> Tensor | None:
    """(B, cols) bool, the same tensor for every layer that is given this mask: what is derived from it can be shared."""
    if attention_mask is None:
        return None
    name = id(attention_mask), cols
    if name not in _masks:  # the mask is kept with its id, which nothing else can take then
        _masks[name] = attention_mask, attention_mask[:, -cols:].bool()
    return _masks[name][1]


# Keywords that reach the attention function and do not change what it computes. Any other, when it is set, is an error: a function that
# swallows what it
# does not know (sinks, a position bias, a chunk size) returns wrong logits without a word.
_HARMLESS = frozenset(
    {
        "position_ids",
        "use_cache",
        "cache_position",
        "output_hidden_states",
        "output_router_logits",
        "num_items_in_batch",
        "max_length_q",
        "max_length_k",
        "return_dict",
        "past_key_values",
        "layer_idx",
        "logits_to_keep",
        "seq_idx",
    }
)


class _Attention(torch.autograd.Function):
    """Flash attention whose backward also bins A · dA. Bins are made in the backward only, so a checkpointed layer, whose forward runs
    twice, counts once."""

    @staticmethod
    def forward(
        ctx,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        listener: Listener,
        layer: int,
        options: dict[str, Any],
        window: int | None,
    ) -> Tensor:
        packing, prefix = listener.packing, key.shape[2] - query.shape[2]
        q, k, v = _inside(packing, prefix, query, key, value)
        output, lse = forward_with_lse(q, k, v, *_masks_and_scale(options, sinks))
        if packing is not None:
            output = packing.end_to_end(output)
        ctx.save_for_backward(query, key, value, output, lse, sinks)
        ctx.listener, ctx.layer, ctx.options, ctx.window, ctx.packing, ctx.prefix = listener, layer, options, window, packing, prefix
        return output

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        query, key, value, output, lse, sinks = ctx.saved_tensors
        options, packing = ctx.options, ctx.packing
        query, key, value = _inside(packing, ctx.prefix, query, key, value)
        if packing is not None:
            grad, output = packing.side_by_side(grad), packing.side_by_side(output)
        ctx.listener.layer_went_backward(ctx.layer, query, key, value, lse, grad, options, ctx.window)
        if not any(ctx.needs_input_grad[:4]):
            return (None,) * 8
        dq, dk, dv, dsinks = backward_with_lse(grad, query, key, value, output, lse, *_masks_and_scale(options, sinks))
        if packing is not None:
            dq, dk, dv = packing.end_to_end(dq), packing.columns_back(dk, ctx.prefix), packing.columns_back(dv, ctx.prefix)
        return dq, dk, dv, dsinks if sinks is not None else None, None, None, None, None


def _masks_and_scale(options: dict[str, Any], sinks: Tensor | None) -> tuple[Any, ...]:
    """The arguments behind the tensors of `forward_with_lse` and `backward_with_lse`."""
    return (
        options["softmax_scale"],
        options["causal"],
        None,
        options["window"],
        options["softcap"],
        sinks,
        options["key_mask"],
        options["cu_seqlens_q"],
        None,
        False,
    )


def _inside(packing: Packing | None, prefix: int, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if packing is None:
        return query, key, value
    return packing.side_by_side(query), packing.columns(key, prefix), packing.columns(value, prefix)


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    listener = _active
    if listener is None:
        raise RuntimeError(f"the attention implementation {NAME!r} works inside FlowRecorder.run only")
    name = type(module).__name__
    unknown = sorted(key for key, x in kwargs.items() if key not in _HARMLESS and x is not None and x is not False)
    if unknown:
        raise ValueError(f"{name} passes {unknown} to its attention, which saliency flow does not know how to honour")
    if dropout:
        raise ValueError(f"{name} asks for attention dropout {dropout}; saliency needs none: call model.eval()")
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(f"{name} was given a {attention_mask.dim()}-D attention mask, which cannot be honoured; give the 2-D padding mask")
    layer = getattr(module, "layer_idx", None)
    if layer is None:
        raise ValueError(f"{name} has no layer_idx, so its layer is unknown")
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if sliding_window is not None and not causal:
        raise ValueError(f"{name} combines a window with bidirectional attention, which is not supported")
    rows, cols = query.shape[2], key.shape[2]
    if cols > listener.prefix_length + rows:
        raise ValueError(
            f"{name} attends to {cols} keys for {listener.prefix_length + rows} tokens; static caches and cross-attention are not supported"
        )
    documents = listener.documents
    if documents is not None and documents.shape[0] == 1:
        documents = documents[0]
    window = int(sliding_window) if sliding_window else None
    longest = cols if listener.packing is None else cols - rows + max(listener.packing.lengths)
    options = {
        "softmax_scale": float(query.shape[-1] ** -0.5 if scaling is None else scaling),
        "causal": causal,
        "window": None if window is None or window >= longest else window,
        "softcap": softcap,
        "key_mask": _key_mask(attention_mask, cols),
        "cu_seqlens_q": documents,
    }
    sinks = s_aux.to(query.dtype) if s_aux is not None else None
    output = _Attention.apply(query, key, value, sinks, listener, layer, options, window)
    return output.transpose(1, 2).contiguous(), None


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The 2-D padding mask, or None without padding. Masks of a form that ranges and windows cannot express (chunks, image blocks) are
    refused."""
    listener = _active
    if mask_function is not None and listener is not None and listener.documents is None and kv_length:
        if listener.packing is not None:  # rows and columns of the first sequence
            behind = sum(listener.packing.lengths[1:])
            q_length, kv_length = q_length - behind, kv_length - behind
        check_mask_form(mask_function, q_length, kv_length, int(q_offset), kv_offset)
    if attention_mask is not None:
        attention_mask = attention_mask[:, -kv_length:]
        if bool(attention_mask.all()):
            attention_mask = None
    return attention_mask


def check_mask_form(mask_function: Any, q_length: int, kv_length: int, q_offset: int, kv_offset: int) -> None:
    """Three rows of the mask, O(n): each must read one contiguous run that fits causal order, a window, or bidirectional attention."""
    columns = torch.arange(kv_offset, kv_offset + kv_length)
    zero = torch.tensor(0)
    spans = []
    for row in sorted({0, q_length // 2, q_length - 1}):
        position = q_offset + row
        seen = columns[torch.as_tensor(mask_function(zero, zero, torch.tensor(position), columns)).cpu().expand(kv_length)].tolist()
        if not seen or seen != list(range(seen[0], seen[-1] + 1)) or position not in seen:
            raise ValueError(
                f"the model's attention mask is neither causal, windowed nor bidirectional (row {position}); saliency flow cannot "
                f"express it"
            )
        spans.append((position, seen[0], seen[-1]))
    if all(last == position for position, _, last in spans):
        window = max(position - first + 1 for position, first, _ in spans)
        if any(position - first + 1 != min(window, position + 1 - kv_offset) for position, first, _ in spans):
            raise ValueError(
                "the model's attention mask is chunked (rows of different chunks read different lengths), which is not supported"
            )


def register() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)  # without it the mask would be None, silently, and padding would be read


@contextlib.contextmanager
def borrowed(model: Any, num_layers: int, first_layer: int, positions: Tensor, checkpoint: bool) -> Iterator[list[bool]]:
    """The model with our attention, frozen parameters and a leaf below the first recorded layer; everything is put back afterwards.

    The head sees only the rows `positions` (B, T) and, where it is a plain linear layer, answers in float64 (`exact_logits`). Yields a list
    that is non-empty once that has happened.
    """
    register()
    configs: dict[int, tuple[Any, Any]] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        for one in [config, *(getattr(config, key, None) for key in (getattr(config, "sub_configs", None) or {}))]:
            if one is not None and hasattr(one, "_attn_implementation_internal"):
                configs[id(one)] = (one, one._attn_implementation_internal)
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    layers = _decoder_layers(model, num_layers)
    handles = []
    kept: list[tuple[Any, dict[str, Any]]] = []
    gathered: list[bool] = []

    def leaf(hidden: Tensor) -> Tensor:
        return hidden.detach().requires_grad_()

    def enter(_: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if "hidden_states" in kwargs:
            return args, {**kwargs, "hidden_states": leaf(kwargs["hidden_states"])}
        return (leaf(args[0]), *args[1:]), kwargs

    def only_targets(_: Any, args: tuple) -> tuple:
        gathered.append(True)
        return (args[0].gather(1, positions.to(args[0].device)[..., None].expand(-1, -1, args[0].shape[-1])), *args[1:])

    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        model.set_attn_implementation(NAME)
        if model.config.get_text_config()._attn_implementation != NAME:
            raise ValueError(
                f"{type(model).__name__} refused the attention implementation; it does not use transformers' AttentionInterface"
            )
        if first_layer > 0 and layers is not None:
            handles.append(layers[first_layer].register_forward_pre_hook(enter, with_kwargs=True))
        else:
            handles.append(model.get_input_embeddings().register_forward_hook(lambda _module, _args, output: leaf(output)))
        head = model.get_output_embeddings()
        if head is not None:
            handles.append(head.register_forward_pre_hook(only_targets))
            handles.append(head.register_forward_hook(exact_logits))
        if checkpoint:
            for layer in layers or ():
                kept.append(
                    (
                        layer,
                        {name: layer.__dict__.get(name) for name in ("training", "gradient_checkpointing", "_gradient_checkpointing_func")},
                    )
                )
                layer.training = True  # this module alone: its children stay in eval mode, so no dropout wakes up
                layer.gradient_checkpointing = True
                layer._gradient_checkpointing_func = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
        yield gathered
    finally:
        for layer, state in kept:
            for name, old in state.items():
                if old is None:
                    layer.__dict__.pop(name, None)
                else:
                    layer.__dict__[name] = old
        for handle in handles:
            handle.remove()
        for config, implementation in configs.values():
            config._attn_implementation_internal = implementation
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _decoder_layers(model: Any, num_layers: int) -> Any:
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == num_layers:
            return module
    return None
