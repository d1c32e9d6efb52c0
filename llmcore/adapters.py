"""What a fused loss needs from a causal language model: the states below its head, the head itself, and LoRA without a second model.

The head's weight is read, not called, so everything that hides in calling it must be known here: bias, logit scale, soft-cap, a sharded
or adapted weight. `check_head` compares one small forward of the model with the formula z = cap(scale · (W h + b)); a model that computes
anything else is refused.
"""
# B sequences, T tokens, D hidden, V vocab

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn


class Head(NamedTuple):
    """The output projection: logits = cap(scale · (hidden_states weightᵀ + bias)), cap(z) = softcap · tanh(z / softcap) or nothing."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    logit_scale: float
    softcap: float | None


def add_lora(
    model: nn.Module,
    *,
    rank: int = 16,
    alpha: float | None = None,
    targets: str | list[str] = "all-linear",
    dropout: float = 0.0,
    seed: int = 0,
) -> nn.Module:
    """Put trainable low-rank adapters on the trunk's linear layers; everything else is frozen.

    Args:
        model: a transformers causal language model. rank, alpha: W + (alpha / rank) B A; alpha defaults to 2 · rank.
        targets: module names, or "all-linear" for every linear layer but the head. dropout: on the adapters' input; 0 keeps the first
            margin at 0.

    Returns:
        The peft model. Raises ValueError when the targets include the head, whose weight a fused loss reads without its adapter.
    """
    import peft

    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        scale: Any = 2 * rank if alpha is None else alpha  # any number: peft divides it by the rank
        config = peft.LoraConfig(r=rank, lora_alpha=scale, target_modules=targets, lora_dropout=dropout, task_type="CAUSAL_LM")
        adapted = peft.get_peft_model(model, config)
    refuse_adapted_head(adapted)
    return adapted


def unwrap(model: Any) -> Any:
    """The module inside LanguageModel, DistributedDataParallel, accelerate and torch.compile wrappers; adapters stay."""
    while True:
        if not isinstance(model, nn.Module) and hasattr(model, "model"):
            model = model.model
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return model


def base_model(model: Any) -> Any:
    """The transformers model below wrappers and adapters."""
    model = unwrap(model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # peft marks the wrapped model too with its settings


def backbone(model: Any) -> nn.Module:
    """The module that ends with the final norm, whose output the head reads."""
    base = base_model(model)
    name = getattr(base, "base_model_prefix", "")
    if not name or not hasattr(base, name) or base.get_output_embeddings() is None:
        raise ValueError(f"model must be a causal language model with an output head, got {type(base).__name__}")
    return getattr(base, name)


def has_adapters(model: Any) -> bool:
    return hasattr(unwrap(model), "peft_config")


def refuse_adapted_head(model: Any) -> None:
    """Raise ValueError when an adapter changes the head or the sequence in a way that reading the head's weight would miss."""
    model = unwrap(model)
    if not hasattr(model, "peft_config"):
        return
    for name, config in model.peft_config.items():
        if getattr(config, "is_prompt_learning", False):
            raise ValueError(
                f"adapter {name!r} prepends virtual tokens ({type(config).__name__}), which would shift every scored position; use LoRA"
            )
    base = model.get_base_model()
    head = base.get_output_embeddings()
    tied = getattr(base.get_input_embeddings(), "weight", None) is getattr(head, "weight", object())
    adapted = [
        part
        for part, module in (("output head", head), ("input embedding tied to the head", base.get_input_embeddings() if tied else None))
        if module is not None and (hasattr(module, "base_layer") or hasattr(module, "modules_to_save"))
    ]
    if adapted:
        raise ValueError(
            f"model has an adapter on its {adapted[0]}: the fused loss reads the weight without it and would never train it; "
            "take lm_head out of the adapter's target_modules / modules_to_save, or merge the adapter first"
        )


def head_of(model: Any) -> Head:
    """The head's weight and the transformations around it, from the model's configuration. Sharded weights (FSDP2) are gathered."""
    base = base_model(model)
    module = base.get_output_embeddings()
    weight, bias = module.weight, getattr(module, "bias", None)
    if not weight.is_floating_point():
        raise ValueError(f"the output head is quantised ({weight.dtype}); load the model with the head in a float dtype")
    if hasattr(weight, "full_tensor"):
        weight = weight.full_tensor()
        bias = bias.full_tensor() if bias is not None else None
    config = base.config.get_text_config()
    scale = getattr(config, "logit_scale", None)  # Cohere multiplies; None means 1
    scale = 1.0 if scale is None else float(scale)
    divide = getattr(config, "logits_scaling", None)  # Granite divides
    scale = scale / float(divide) if divide else scale
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(weight, bias, scale, float(softcap) if softcap else None)


def accepts_block_mask(model: Any) -> bool:
    """Whether the model's attention takes a mask (B, 1, T, T), so that a pair's common prompt can be computed once."""
    config = base_model(model).config
    text = config.get_text_config()
    window = getattr(text, "sliding_window", None) or any("sliding" in kind for kind in getattr(text, "layer_types", None) or ())
    return config._attn_implementation in ("sdpa", "eager") and not window


def attention_inputs(module: nn.Module, inputs: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """A block mask (B, 1, T, T) bool in the form that the model's attention adds up: eager attention takes it as a number to add."""
    mask = inputs.get("attention_mask")
    base = base_model(module)
    if mask is None or mask.dim() != 4 or base.config._attn_implementation != "eager":
        return inputs
    dtype = next(base.parameters()).dtype
    return {**inputs, "attention_mask": torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)}


def hidden_states(model: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """(B, T, D) states that the head reads, through the outermost module's own forward.

    Calling the wrapper (data parallel, sharded, autocast, adapters) keeps its gradient synchronisation and gathers in force; the model's
    own logits are asked for no position, so they cost nothing.
    """
    module = model.model if not isinstance(model, nn.Module) and hasattr(model, "model") else model
    inputs = attention_inputs(module, inputs)
    caught: list[torch.Tensor] = []

    def catch(_module: nn.Module, _args: Any, output: Any) -> None:
        caught.append(output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0])

    handle = backbone(module).register_forward_hook(catch)
    try:
        module(**inputs, use_cache=False, logits_to_keep=torch.empty(0, dtype=torch.long, device=inputs["input_ids"].device))
    finally:
        handle.remove()
    if len(caught) != 1:
        raise RuntimeError(f"the model's backbone ran {len(caught)} times in one forward, expected once")
    return caught[0]


@torch.no_grad()
def check_head(model: Any) -> None:
    """Compare the model's own logits with the formula of head_of on three tokens; also refuse NaN weights and adapted heads.

    Raises:
        ValueError: a parameter is not finite (named), or the model does something between its last norm and its logits that head_of does
        not know.
    """
    refuse_adapted_head(model)
    module = unwrap(model)
    for name, parameter in module.named_parameters():
        if parameter.is_floating_point() and not hasattr(parameter, "full_tensor") and not bool(parameter.isfinite().all()):
            bad = int((~parameter.isfinite()).sum())
            raise ValueError(f"model parameter {name} holds {bad} NaN or infinite values; load an undamaged checkpoint")
    if getattr(base_model(model).config.get_text_config(), "output_router_logits", False):
        raise ValueError("config.output_router_logits adds an auxiliary loss that is not part of the preference loss; set it to False")
    was_training = module.training
    module.eval()
    try:
        ids = torch.tensor([[1, 2, 3]], device=next(module.parameters()).device)
        theirs = module(input_ids=ids, use_cache=False).logits[0].float()
        head = head_of(module)
        h = hidden_states(module, {"input_ids": ids})[0]
        z = (h.to(head.weight.dtype) @ head.weight.T).float() + (0 if head.bias is None else head.bias.float())
        z = z * head.logit_scale
        if head.softcap is not None:
            z = head.softcap * torch.tanh(z / head.softcap)
        error = (z - theirs).abs().max().item() / max(1.0, theirs.abs().max().item())
    finally:
        module.train(was_training)
    if not error < 0.02:
        raise ValueError(
            f"{type(base_model(model)).__name__} computes other logits than soft-cap(scale · (W h + b)), off by {error:.2g} (relative): "
            "its head does something this library does not know"
        )


@contextlib.contextmanager
def adapter_off(model: Any) -> Iterator[None]:
    """The model without its adapters: the reference of a LoRA run, with no second copy of the weights."""
    module = unwrap(model)
    if not hasattr(module, "peft_config"):
        raise ValueError("ref=AdapterOff() needs a model with adapters, got none; use a CachedRef or a RefModel")
    with module.disable_adapter():
        yield


def disable_dropout(model: Any) -> int:
    """Set every dropout probability of the model to 0 (modules and attention); returns how many were on."""
    count = 0
    for module in unwrap(model).modules():
        if isinstance(module, (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)) and module.p > 0:
            module.p = 0.0
            count += 1
        for name in ("attention_dropout", "dropout"):
            value = getattr(module, name, None)
            if isinstance(value, float) and value > 0:
                setattr(module, name, 0.0)
                count += 1
    return count
