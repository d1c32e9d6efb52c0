"""TRL's DPOTrainer on llmcore's kernel and losses: change one import line.

    from llmcore.integrations.trl import DPOTrainer          # was: from trl import DPOTrainer

Data handling, reference handling, PEFT, checkpoints and logging stay TRL's. Replaced, on the trainer's own model instances only (nothing
in TRL or transformers is patched): the LM head's log-probabilities (`fused_linear_logprob`: only scored rows, float32 statistics, neither
weight gradient nor recomputation for a frozen head), the trunk's input (a pair's prompt is computed once, with sdpa or eager attention and
no sliding window) and the loss (`llmcore.losses`, one implementation, every option acts or raises). The
model still runs through `Module.forward`, so DDP and FSDP synchronise as usual.

Where TRL and this trainer differ on purpose:
    loss_type="ipo"      is ipo_mean (per-token margin, TRL's meaning) and reported under that name; "ipo_sum" is accepted too, as is every
                         paired loss name of llmcore.losses ("rdpo", "simpo", "daa_square", ...)
    label_smoothing      acts on "sigmoid" (it becomes cdpo) and raises for losses without smoothing; TRL ignores it there
    rewards/accuracies   counts a tie as one half, ties are logged as rewards/ties; TRL counts a tie as wrong (0.0 at the first step)
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
import trl
from torch import Tensor
from torch.distributed.tensor import DTensor
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import FusedCausalLMOutput, use_adapter

from llmcore.adapters import accepts_block_mask, attention_inputs
from llmcore.data import Batch
from llmcore.kernels.linear_logprob import fused_linear_logprob
from llmcore.losses import Combine, PairLoss, ld_logps, loss_from_name, segment_sums, wpo_weights

logger = logging.getLogger(__name__)

TRL_NAMES = {"sigmoid": "dpo", "ipo": "ipo_mean", "sigmoid_norm": "dpo_norm"}  # the other names agree
_SMOOTHED = ("dpo", "cdpo", "robust", "exo_pair", "aot", "aot_unpaired", "simpo", "cpo")
_DIVERGENT = ("dpo", "cdpo", "dpo_norm", "hinge", "ipo_sum", "ipo_mean", "daa_square", "exo_pair", "robust", "discopop")


def loss_from_config(args: trl.DPOConfig) -> PairLoss | Combine:
    """The loss that a DPOConfig asks for. Raises ValueError for an option that the loss would ignore."""
    names = [args.loss_type] if isinstance(args.loss_type, str) else list(args.loss_type)
    names = [TRL_NAMES.get(name, name) for name in names]
    weights = list(args.loss_weights) if args.loss_weights else [1.0] * len(names)
    if len(weights) != len(names):
        raise ValueError(f"loss_weights must have one weight per loss_type, got {len(weights)} for {names}")
    deaf = [name for name in names if name not in (*_SMOOTHED, "sft")]
    if args.label_smoothing and deaf:
        raise ValueError(f"label_smoothing={args.label_smoothing} has no meaning for {', '.join(deaf)}; it acts on {', '.join(_SMOOTHED)}")
    if args.label_smoothing and names == ["sft"]:
        raise ValueError("label_smoothing has no meaning for sft")
    terms = []
    for name, weight in zip(names, weights, strict=True):
        options: dict[str, Any] = {}
        if name not in ("sft", "slic_hf"):
            options["beta"] = args.beta
        if name in _SMOOTHED and (args.label_smoothing or name == "exo_pair"):
            name = "cdpo" if name == "dpo" else name
            options["label_smoothing"] = args.label_smoothing
        if name == "robust":
            options["label_smoothing"] = args.label_smoothing
        if name == "discopop":
            options["tau"] = args.discopop_tau
        if args.f_divergence_type != "reverse_kl" and name != "sft":
            if name not in _DIVERGENT:
                raise ValueError(
                    f"f_divergence_type={args.f_divergence_type!r} is not defined for {name}: its prompt normaliser does not cancel"
                )
            options |= {
                "divergence": str(getattr(args.f_divergence_type, "value", args.f_divergence_type)),
                "alpha": args.f_alpha_divergence_coef,
            }
        loss = loss_from_name(name, **options)
        if not isinstance(loss, PairLoss):
            raise ValueError(f"loss_type {name!r} needs unpaired examples, which DPOTrainer does not have")
        if loss.nll_weight and getattr(loss, "nll_over", "completion") == "all":
            raise ValueError(f"{name} over prompt tokens is not available in DPOTrainer: prompts are not scored")
        terms.append((loss, float(weight)))
    if args.use_weighting and any(loss.batch_level for loss, _ in terms):
        raise ValueError("use_weighting (WPO) cannot be combined with aot or aot_unpaired, which couple the pairs of a batch")
    return terms[0][0] if len(terms) == 1 and terms[0][1] == 1.0 else Combine(terms)


def _head_options(config: Any) -> dict[str, Any]:
    """logit_scale and softcap from a model's configuration: Cohere multiplies, Granite divides, None means 1."""
    text = config.get_text_config()
    scale = getattr(text, "logit_scale", None)
    for name in ("output_multiplier", "lm_head_multiplier"):
        scale = getattr(text, name, None) if scale is None else scale
    if scale is None and getattr(text, "logits_scaling", None) is not None:
        scale = text.logits_scaling if text.model_type == "hyperclovax" else 1 / text.logits_scaling
    return {"logit_scale": scale, "softcap": getattr(text, "final_logit_softcapping", None)}


def _plain_head(model: Any) -> Any:
    """The model's output embedding, refused when an adapter sits on it: that product is not weight · hidden, and the adapter would stay as
    it is."""
    head = model.get_output_embeddings()
    if type(head) is not torch.nn.Linear:
        raise ValueError(
            f"lm_head must be a plain torch.nn.Linear, got {type(head).__module__}.{type(head).__name__}: the log-probabilities come from "
            "lm_head.weight, so an adapter or a wrapper on it would be ignored; remove 'lm_head' from target_modules and modules_to_save"
        )
    return head


def install_head(model: Any, outputs: tuple[str, ...]) -> None:
    """Let `model(..., labels=labels, fused_lm_head=True)` return per-token results of the fused kernel; other calls keep their forward.

    With `rows` (N,), flat positions among the (B, T) of the input, `labels` (N,) are what those rows predict and the results are (N,);
    without, labels (B, T) are shifted here and the results are (B, T - 1).
    Changes the forward of this instance only, as TRL does with its own head; calling it twice does nothing more.
    """
    _plain_head(model)
    if getattr(model.forward, "_llmcore_outputs", None) is not None:
        return
    inner, options = model.forward, _head_options(model.config)

    def forward(self, *args, fused_lm_head: bool = False, labels: Tensor | None = None, rows: Tensor | None = None, **kwargs):
        if not fused_lm_head:
            return inner(*args, **kwargs) if labels is None else inner(*args, labels=labels, **kwargs)
        if kwargs.pop("shift_labels", None) is not None:
            raise ValueError("shift_labels (context or sequence parallelism) is not supported by llmcore's DPOTrainer; use TRL's")
        kwargs["use_cache"] = False
        hidden_states = self.base_model(*args, **kwargs).last_hidden_state
        if rows is not None:
            hidden_states = hidden_states.flatten(0, 1).index_select(0, rows)
        head = _plain_head(self)
        weight, bias = head.weight, head.bias
        if isinstance(weight, DTensor):  # FSDP2: the whole head is needed once; autograd scatters its gradient back
            weight, bias = weight.full_tensor(), None if bias is None else bias.full_tensor()
        if hidden_states.element_size() < weight.element_size() and torch.is_autocast_enabled(hidden_states.device.type):
            weight = weight.to(hidden_states.dtype)
        scores = fused_linear_logprob(
            hidden_states,
            weight,
            labels.to(hidden_states.device),
            bias=bias,
            shift=1 if rows is None else 0,
            outputs=outputs,
            detach=("entropy",) if "entropy" in outputs else (),
            **options,
        )

        def shifted(x: Tensor | None) -> Tensor | None:
            return x if x is None or rows is not None else x[:, 1:]

        return FusedCausalLMOutput(
            log_probs=shifted(scores.logp),
            entropy=shifted(scores.entropy),
            log_sum_sq_probs=shifted(scores.log_sum_sq),
            mean_logits=shifted(scores.mean_logit),
            is_top1=shifted(scores.is_top1),
            label_mask=shifted(labels != -100),
        )

    # Autocast wrappers read the function behind the bound method; generate() reads its signature through __wrapped__.
    forward.__wrapped__ = type(model).forward
    forward._llmcore_outputs = outputs
    model.forward = types.MethodType(forward, model)


@dataclasses.dataclass
class TokenScores:
    """Flat results of the scored tokens (N,), sequence after sequence, and `counts` (2P,) of each. Only `logp` carries a gradient."""

    logp: Tensor
    counts: Tensor
    entropy: Tensor | None
    mean_logit: Tensor | None
    is_top1: Tensor | None
    log_sum_sq: Tensor | None

    @classmethod
    def of(cls, outputs: list[FusedCausalLMOutput], counts: Tensor, flat: Callable[[list[Tensor]], Tensor]) -> TokenScores:
        def field(name: str) -> Tensor | None:
            parts = [getattr(output, name) for output in outputs]
            return None if parts[0] is None else flat(parts)

        return cls(field("log_probs"), counts, *(field(n) for n in ("entropy", "mean_logits", "is_top1", "log_sum_sq_probs")))


class DPOTrainer(trl.DPOTrainer):
    """`trl.DPOTrainer` with llmcore's fused head and losses; same arguments. See the module's docstring for what differs.

    `trainer.preference_loss` is the loss object in use. Raises ValueError for what is not supported: vision data, prompt-learning adapters,
    an adapter on the LM head, MoE auxiliary losses, DeepSpeed ZeRO-3, use_liger_kernel.
    """

    _tag_names = ["trl", "dpo", "llmcore"]  # noqa: RUF012 (TRL reads a list)

    def __init__(self, *arguments, **keywords):
        config = keywords.get("args", arguments[2] if len(arguments) > 2 else None)
        if config is not None:
            self.preference_loss = loss_from_config(config)
            if getattr(config, "use_liger_kernel", False):
                raise ValueError("use_liger_kernel=True replaces the layers' code that this trainer's head follows; set it to False")
            if getattr(config, "deepspeed_plugin", None) is not None and config.deepspeed_plugin.zero_stage == 3:
                raise ValueError(
                    "DeepSpeed ZeRO-3 keeps the head's weight partitioned between forward and backward; use FSDP2 or TRL's own trainer"
                )
        super().__init__(*arguments, **keywords)
        if config is None:
            self.preference_loss = loss_from_config(self.args)
        if self._is_vision_dataset or self.aux_loss_enabled:
            raise ValueError("vision data and MoE auxiliary losses are not supported by llmcore's DPOTrainer; use TRL's")
        self._install_heads()
        logger.info("preference loss: %s", self.preference_loss.name)

    def _policy(self) -> Any:
        return self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model

    def _install_heads(self) -> None:
        peft = getattr(self.model, "active_peft_config", None)
        if peft is not None and getattr(peft, "is_prompt_learning", False):
            raise ValueError(
                "prompt-learning adapters prepend virtual tokens, which llmcore's DPOTrainer does not score; use LoRA or TRL's trainer"
            )
        wanted = ("logp", "entropy", "mean_logit", "is_top1") + (("log_sum_sq",) if self.use_weighting else ())
        install_head(self._policy(), wanted)
        if self.ref_model is not None:
            install_head(self.accelerator.unwrap_model(self.ref_model), ("logp",))

    def _shared_calls(self, inputs: dict[str, Any]) -> Batch | None:
        """The batch with each pair's prompt computed once and no padding between pairs, or None where the model cannot take that.

        It needs attention that accepts a block mask (sdpa or eager, no sliding window) and inputs of plain text. Several trunk calls a
        step, one for each pair, are as fast as one on a CPU and save the padding; data parallel ranks and GPUs get a single call.
        """
        known = {"input_ids", "attention_mask", "completion_mask", "ref_chosen_logps", "ref_rejected_logps"}
        if set(inputs) - known or not accepts_block_mask(self._policy()):
            return None
        device = inputs["input_ids"].device
        fields = {name: inputs[name] for name in ("input_ids", "attention_mask", "completion_mask")}
        return Batch.from_fields(fields, layout="shared", isolate=device.type == "cpu" and self.accelerator.num_processes == 1).to(device)

    def _score(self, model: Any, inputs: dict[str, Any]) -> TokenScores:
        """Scores of the scored tokens of a batch, sequence after sequence, chosen before rejected."""
        batch = self._shared_calls(inputs)
        if batch is None:
            keywords = {name: inputs[name] for name in set(inputs) - {"completion_mask", "ref_chosen_logps", "ref_rejected_logps"}}
            labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
            output = model(**keywords, use_cache=False, labels=labels, fused_lm_head=True)
            mask = inputs["completion_mask"][:, 1:].bool()
            return TokenScores.of([output], mask.sum(dim=1), lambda parts: parts[0][mask])
        # Rows leave the calls pair after pair; `order` brings them into the order of the sequences.
        order = torch.arange(len(batch.labels), device=batch.labels.device) if batch.order is None else batch.order
        labels = torch.empty_like(batch.labels).index_copy_(0, order, batch.labels).split([len(call.rows) for call in batch.calls])
        outputs = [
            model(**attention_inputs(model, call.inputs), labels=own, rows=call.rows, use_cache=False, fused_lm_head=True)
            for call, own in zip(batch.calls, labels, strict=True)
        ]
        return TokenScores.of(outputs, batch.counts, lambda parts: torch.cat(parts).index_select(0, order))

    def _sums(self, scores: TokenScores) -> Tensor:
        """(2P,) log-probabilities of the sequences, length-desensitised when ld_alpha is set."""
        if self.ld_alpha is None:
            return segment_sums(scores.logp, scores.counts)
        return ld_logps(scores.logp, scores.counts, self.ld_alpha)

    def compute_ref_log_probs(self, model, inputs):
        """(P,), (P,) reference log-probabilities of a batch, by the same arithmetic as the policy's: equal models give equal numbers."""
        self._install_heads()  # TRL precomputes reference scores inside its constructor
        adapter = contextlib.nullcontext()
        if self.ref_model is None and hasattr(self.model, "peft_config"):
            unwrapped = self.accelerator.unwrap_model(self.model)
            adapter = use_adapter(unwrapped, adapter_name="ref" if "ref" in unwrapped.peft_config else None)
        checkpointing = disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs)
        with torch.no_grad(), checkpointing, adapter, self.accelerator.autocast():
            logps = self._sums(self._score(model, inputs))
        return logps.chunk(2, dim=0)

    def _compute_loss(self, model, inputs, return_outputs):
        scores = self._score(model, inputs)
        counts = scores.counts
        if self.precompute_ref_logps:
            references = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        elif self.preference_loss.needs_reference:
            references = self.compute_ref_log_probs(self.model if self.ref_model is None else self.ref_model, inputs)
        else:
            references = None, None
        lw, ll = self._sums(scores).chunk(2)
        nw, nl = counts.chunk(2)
        weights = wpo_weights(scores.logp, scores.log_sum_sq, counts) if self.use_weighting else None
        out = self.preference_loss(lw, ll, *references, nw, nl, weights=weights)
        self._record(out, scores, lw, ll, nw, nl, references, inputs)
        if not return_outputs:
            return out.loss
        warnings.warn("return_outputs=True recomputes the logits with an extra forward pass", stacklevel=2)
        with torch.no_grad():
            names = {"completion_mask", "ref_chosen_logps", "ref_rejected_logps"}
            return out.loss, model(**{k: v for k, v in inputs.items() if k not in names}, use_cache=False)

    def _record(self, out, scores, lw, ll, nw, nl, references, inputs) -> None:
        """Metrics of the step: sums and counts of all ranks in one gather, one copy to the host."""
        with torch.no_grad():
            chosen = int(nw.sum())  # of the flat tokens, the first ones are the chosen completions
            rewards_w, rewards_l = (self.beta * (x if r is None else x - r) for x, r in zip((lw, ll), references, strict=True))
            margins = rewards_w - rewards_l
            size = out.coef_w.abs()
            bound = self.preference_loss.coefficient_bound
            pairs = torch.tensor(float(len(lw)), device=lw.device)
            sums = {
                "rewards/chosen": (rewards_w.sum(), pairs),
                "rewards/rejected": (rewards_l.sum(), pairs),
                "rewards/margins": (margins.sum(), pairs),
                "rewards/accuracies": ((margins > 0).sum() + 0.5 * (margins == 0).sum(), pairs),
                "rewards/ties": ((margins == 0).sum(), pairs),
                "logps/chosen": (lw.sum(), pairs),
                "logps/rejected": (ll.sum(), pairs),
                "logps_mean/chosen": (lw.sum(), nw.sum()),
                "logps_mean/rejected": (ll.sum(), nl.sum()),
                "entropy": (scores.entropy.sum(), scores.counts.sum()),
                "logits/chosen": (scores.mean_logit[:chosen].sum(), nw.sum()),
                "logits/rejected": (scores.mean_logit[chosen:].sum(), nl.sum()),
                "mean_token_accuracy": (scores.is_top1[:chosen].sum(), nw.sum()),
                "grad_coef/mean": (size.sum(), pairs),
                "grad_coef/active": ((size > 0.01 * (size.max() if bound is None else bound)).sum(), pairs),
            }
            if references[0] is not None:
                sums["likelihood/chosen_drop"] = ((lw - references[0]).sum(), pairs)
            flat = torch.stack(
                [torch.as_tensor(x, device=lw.device).double() for pair in sums.values() for x in pair]
                + [inputs["attention_mask"].sum().double()]
            )
            values = self.accelerator.gather(flat[None]).sum(dim=0).tolist()
        mode = "train" if self.model.training else "eval"
        record = self._metrics[mode]
        for i, name in enumerate(sums):
            record[name].append(values[2 * i] / values[2 * i + 1] if values[2 * i + 1] else 0.0)
        if mode == "train":
            self._total_train_tokens += values[-1] // self._tp_size
        record["num_tokens"] = [self._total_train_tokens]
