"""Attention saliency of a whole decoder: one forward, one backward, every layer's and head's flow between named segments.

`FlowRecorder` replaces the model's attention function, through transformers' AttentionInterface, by one that keeps (q, k, v, o, lse) and
in the backward
hands do = dL/do to `llmcore.kernels.saliency_flow`. No attention matrix exists at any time, so memory is that of flash attention. Row i of
attention is the
reader: the flow from "question" to "prompt" sums rows of the prompt over columns of the question.

Which scalar L: with z the logits at the position that predicts token y and p = softmax(z),

    "ce"             -log p_y, the papers' choice. It fades as the model gets sure:  I_ce = (1 - p_y) · I_margin, entry by entry
    "margin"         z_y - log Σ_{v≠y} exp z_v, does not fade and ignores a shift common to all logits
    "logit"          z_y
    "ce_restricted"  cross-entropy over a given candidate set (options A-E, label words)

For one target the margin is what goes backward; 1 - p_y multiplies the bins afterwards, so that nothing underflows when the model is sure.
L is summed over
the batch: rows do not interact, so one backward gives every sequence its own saliency.

Exactness of a cached prefix: a gradient at row i never passes through rows < i, so flows into row segments behind the prefix need it only
as constants.
Cost: the model's forward and activation-only backward, plus 2·n²·d·H FLOP a layer. The model is left as found, whatever happens.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmcore.attention_interface import Packing, borrowed, listening
from llmcore.kernels.saliency_flow import KINDS, OUTPUTS, FlowPlan, SaliencyFlow, plan_saliency_flow, planned_saliency_flow
from llmcore.kernels.visibility import pair_counts, visible_ranges
from llmcore.segments import segment_ids, segment_names, token_segments
from llmcore.target_loss import LOSSES, target_loss

# B batch, L recorded layers, H query heads, n tokens, S segments, P prefix tokens, T targets

__all__ = ["LOSSES", "FlowRecorder", "estimate_memory", "prefix_cache", "token_segments"]


def estimate_memory(model: Any, num_tokens: int, batch: int = 1) -> dict[str, int]:
    """Bytes of a saliency pass, before running it.

    Returns: weights; activations (kept for the backward: about 6 hidden + 4 intermediate numbers a token and layer, and q, k, v, o, lse);
        flow (packed
    key and value of one layer); total; eager_attention, what attention matrices and their gradients would add to it.
    """
    model = getattr(model, "model", model) if hasattr(model, "tokenizer") else model
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    kv = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * config.hidden_size
    width = next(model.parameters()).element_size()
    tokens = num_tokens * batch
    per_token = 6 * config.hidden_size + 4 * inner + 2 * (heads + kv) * size
    activations = config.num_hidden_layers * tokens * (per_token * width + 4 * heads)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    flow = tokens * 2 * kv * size * 4
    eager = batch * config.num_hidden_layers * heads * num_tokens**2 * 2 * width + batch * heads * num_tokens**2 * 4
    return {"weights": weights, "activations": activations, "flow": flow, "total": weights + activations + flow, "eager_attention": eager}


def prefix_cache(model: Any, input_ids: Tensor) -> Any:
    """Keys and values of input_ids (1 or B, P), computed without a graph: the constant prefix of `FlowRecorder(prefix_cache=…)`."""
    model = getattr(model, "model", model) if hasattr(model, "tokenizer") else model
    from transformers import DynamicCache

    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        decoder = model.base_model if model.base_model is not model else model
        decoder(input_ids=input_ids, past_key_values=cache, use_cache=True)
    return cache


class FlowRecorder:
    """Records segment flows of one model; `run` may be called again and again.

    Args:
        model: a causal language model of transformers, or a LanguageModel. Left as found after every run, exceptions included.
        segments: name -> token span (start, end) or list of spans; or a list of such mappings, one a sequence; or an id tensor (n,) / (B,
            n), -1 for none.
            Positions count from the start of the sequence, prefix included. Spans must not overlap.
        layers: layer indices to record (negative from the end), all by default; layers below the first run without a graph.
        heads: query heads to report, all by default.
        outputs: as in `saliency_flow`. pairs: (source, destination) names; flows of other pairs are not computed.
        prefix_cache: constant keys and values of the first P tokens (see `prefix_cache`); input_ids then hold what follows. Not modified.
        checkpoint: recompute layer activations in the backward instead of keeping them. Bins are counted once.
        exclude_diagonal, backend: as in `saliency_flow`.

    Example:
        >>> with FlowRecorder(model, {"question": (0, 12), "prompt": (13, 20)}) as rec:
        ...     rec.run(input_ids, target_positions=20, target_ids=answer_id)
        >>> rec.flow("question", "prompt").shape            # (B, L, H)
    """

    def __init__(
        self,
        model: Any,
        segments: Any,
        layers: Sequence[int] | None = None,
        heads: Sequence[int] | None = None,
        outputs: Sequence[str] = ("abs",),
        prefix_cache: Any = None,
        *,
        pairs: Sequence[tuple[str, str]] | None = None,
        checkpoint: bool = False,
        exclude_diagonal: bool = False,
        backend: str = "auto",
    ) -> None:
        self.model = model.model if hasattr(model, "tokenizer") and hasattr(model, "model") else model
        if not hasattr(self.model, "_can_set_attn_implementation") or not self.model._can_set_attn_implementation():
            raise ValueError(f"model must route attention through transformers' AttentionInterface; {type(self.model).__name__} does not")
        config = self.model.config.get_text_config()
        self.num_layers, self.num_heads = config.num_hidden_layers, config.num_attention_heads
        self.layers = _indices("layers", layers, self.num_layers)
        self.heads = _indices("heads", heads, self.num_heads)
        self.segments, self.outputs, self.prefix = segments, tuple(outputs), prefix_cache
        self.checkpoint, self.exclude_diagonal, self.backend = checkpoint, exclude_diagonal, backend
        if checkpoint and prefix_cache is not None:
            raise ValueError("checkpoint=True and prefix_cache exclude each other: transformers drops the cache of a checkpointed layer")
        self.names = segment_names(segments)
        self.pairs = None
        if pairs is not None:
            self.pairs = torch.zeros(len(self.names), len(self.names), dtype=torch.bool)
            for source, destination in pairs:
                self.pairs[self._segment(destination), self._segment(source)] = True
        self.prefix_length = 0
        self.documents: Tensor | None = None
        self.packing: Packing | None = None
        self.loss: Tensor | None = None
        self.one_minus_p: Tensor | None = None
        self.metadata: dict[str, Any] = {}
        self._flows: dict[int, SaliencyFlow] = {}
        self._plans: dict[tuple[Any, ...], FlowPlan] = {}
        self._kinds_of_mask: dict[int, dict[str, Any]] = {}

    def __enter__(self) -> FlowRecorder:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    # ---- results -----------------------------------------------------------------------------------------------------------------------

    @property
    def sums(self) -> Tensor:
        """(B, L, H, S, S) sums of |A · dL/dA|; the fourth axis is the segment of the reader, the last the segment read."""
        return self.bins("abs")

    @property
    def counts(self) -> Tensor:
        """(B, L, S, S) visible pairs; layers differ where some have a window."""
        return torch.stack([self._counts[layer][0] for layer in self.layers], 1)

    @property
    def box(self) -> Tensor:
        """(B, S, S) tokens · tokens, masks ignored."""
        return self._counts[self.layers[0]][1]

    def bins(self, output: str = "abs", loss: str | None = None) -> Tensor:
        """Bins of one output over the recorded layers, for the loss that was run; loss="margin" after a "ce" run (or the reverse) rescales
        exactly."""
        self._ran()
        if output == "headsum_abs":
            result = torch.stack([self._flows[layer].headsum_abs.to(self._device) for layer in self.layers], 1)
        elif output in KINDS or output in ("row_by_seg", "row_sum", "col_by_seg", "col_sum", "matrix"):
            name = f"{output}_sum" if output in KINDS else output
            if getattr(self._flows[self.layers[0]], name) is None:
                raise ValueError(f"output {output!r} was not recorded; FlowRecorder(outputs=({output!r},))")
            result = torch.stack([getattr(self._flows[layer], name).to(self._device) for layer in self.layers], 1)[:, :, self.heads]
        else:
            raise ValueError(f"output must be one of {OUTPUTS}, got {output!r}")
        ran, wanted = self.metadata["loss"], loss or self.metadata["loss"]
        if output == "attn":
            return result
        if wanted != ran and ({wanted, ran} != {"ce", "margin"} or not self._single):
            raise ValueError(
                f"loss={wanted!r} cannot be had from a run with loss={ran!r}; only ce and margin of one target share a backward"
            )
        if wanted != ran and output in ("signed", "pos"):
            raise ValueError(f"output={output!r} changes sign between ce and margin; run with loss={wanted!r}")
        if self._single and wanted in ("ce", "ce_restricted"):
            factor = self.one_minus_p.to(result.dtype)
            result = result * factor.view(-1, *[1] * (result.dim() - 1))
        return result

    def flow(
        self, source: str, destination: str, *, denominator: str = "box", empty: str = "nan", output: str = "abs", loss: str | None = None
    ) -> Tensor:
        """(B, L, H) mean saliency with which `destination` (the reader) read `source`; see SaliencyFlow.mean for denominator and empty."""
        row, col = self._segment(destination), self._segment(source)
        if self.prefix_length and bool((self._ids[:, : self.prefix_length] == row).any()):
            raise ValueError(
                f"destination {destination!r} has tokens in the cached prefix, whose rows were not run; make the prefix shorter"
            )
        if self.pairs is not None and not self.pairs[row, col]:
            raise ValueError(f"the flow {source!r} -> {destination!r} was pruned: pairs does not name it")
        if denominator not in ("box", "visible"):
            raise ValueError(f"denominator must be 'box' or 'visible', got {denominator!r}")
        sums = self.bins(output, loss)[..., row, col]
        pairs = (self.box[:, None] if denominator == "box" else self.counts)[..., row, col].to(sums.device)
        pairs = pairs if output == "headsum_abs" else pairs[..., None]
        if empty not in ("nan", "zero", "raise"):
            raise ValueError(f"empty must be 'nan', 'zero' or 'raise', got {empty!r}")
        if empty == "raise" and bool((pairs == 0).any()):
            raise ValueError(f"empty='raise': no {denominator} pairs {source!r} -> {destination!r}")
        return (sums / pairs.clamp(min=1)).masked_fill(pairs == 0, 0.0 if empty == "zero" else float("nan"))

    def to_json(self) -> str:
        """Sums, counts, loss and the metadata that makes them comparable, as JSON."""
        return json.dumps(
            {
                **self.metadata,
                "sums": self.sums.tolist(),
                "counts": self.counts.tolist(),
                "box": self.box.tolist(),
                "loss_value": self.loss.tolist(),
                "one_minus_p": self.one_minus_p.tolist(),
            }
        )

    def save(self, path: str | Path) -> None:
        """Sums, counts, loss as safetensors, metadata in the header."""
        from safetensors.torch import save_file

        tensors = {"sums": self.sums, "counts": self.counts, "box": self.box, "loss": self.loss, "one_minus_p": self.one_minus_p}
        target = Path(path)
        temporary = target.with_name(target.name + ".part")
        save_file(
            {name: t.detach().cpu().contiguous() for name, t in tensors.items()}, str(temporary), {"llmcore": json.dumps(self.metadata)}
        )
        temporary.replace(target)

    # ---- the pass ----------------------------------------------------------------------------------------------------------------------

    def run(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        target_positions: Any = None,
        target_ids: Any = None,
        loss: str = "ce",
        *,
        candidates: Sequence[int] | Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> FlowRecorder:
        """One forward and backward; results are then in `flow`, `sums`, `counts`, `loss`, `one_minus_p`.

        Args:
            input_ids: (B, n) tokens (behind the prefix, when there is one). Tokens behind the last target position are not run.
            attention_mask: (B, P + n), 0 for padding on either side. position_ids: (B, n); where they jump, packed documents are kept
                apart.
            target_positions: position(s) whose logits predict the target: an int, (B,) or (B, T); the last token by default. Counted from
                the sequence's
                start, prefix included.
            target_ids: the predicted token(s), same shape. With T > 1 the loss is the sum over targets.
            loss: "ce", "margin", "logit" or "ce_restricted" (over `candidates`, which must hold the targets).
        """
        if input_ids.dim() != 2 or input_ids.is_floating_point():
            raise ValueError(f"input_ids must be integers (batch, seq_len), got {input_ids.dtype} {tuple(input_ids.shape)}")
        if loss not in LOSSES:
            raise ValueError(f"loss must be one of {LOSSES}, got {loss!r}")
        if (loss == "ce_restricted") != (candidates is not None):
            raise ValueError("candidates must be given for loss='ce_restricted', and only for it")
        batch, given = input_ids.shape
        device = input_ids.device
        self.prefix_length = self.prefix.get_seq_length() if self.prefix is not None else 0
        total = self.prefix_length + given
        if attention_mask is not None:
            if attention_mask.dim() != 2:
                raise ValueError(
                    f"attention_mask must be a 2-D padding mask (batch, seq_len); a {attention_mask.dim()}-D mask cannot be honoured"
                )
            if attention_mask.shape != (batch, total):
                raise ValueError(f"attention_mask must be (batch, prefix + seq_len) = {(batch, total)}, got {tuple(attention_mask.shape)}")
        positions, targets = self._targets(target_positions, target_ids, batch, total, attention_mask, device)
        vocabulary = self.model.config.get_text_config().vocab_size
        if bool((targets < 0).any()) or bool((targets >= vocabulary).any()):
            raise ValueError(f"target_ids must be in [0, vocab_size) = [0, {vocabulary}), got {targets.tolist()}")
        choice = None
        if candidates is not None:
            choice = torch.as_tensor(candidates, device=device).flatten()
            if not bool((targets[..., None] == choice).any(-1).all()):
                raise ValueError(f"candidates must hold every target id, got {choice.tolist()} for targets {targets.tolist()}")
        self._ids = segment_ids(self.segments, self.names, batch, total, device)
        self._flows, self._counts, self._kinds_of_mask, self._plans, self.metadata = {}, {}, {}, {}, {}
        self._device = device
        kept = int(positions.max()) + 1 - self.prefix_length  # rows behind the last target carry no gradient
        inputs: dict[str, Any] = {"input_ids": input_ids[:, :kept]}
        if attention_mask is not None:
            inputs["attention_mask"] = attention_mask[:, : self.prefix_length + kept]
        if position_ids is not None:
            if position_ids.shape != input_ids.shape:
                raise ValueError(f"position_ids must have input_ids' shape {tuple(input_ids.shape)}, got {tuple(position_ids.shape)}")
            inputs["position_ids"] = position_ids[:, :kept]
        self.documents = self._packed(inputs, total, batch)
        if self.documents is not None:
            self._refuse_shared_segments(self.documents)
        self._inner_ids = self._ids[:, : self.prefix_length + kept]
        rows = positions - self.prefix_length
        spans = self._spans_to_pack(inputs, rows)
        self.packing = None if spans is None else Packing(tuple(end - start for start, end in spans))
        if spans is not None:
            inputs, rows = self._pack(inputs, rows, spans)
        if self.prefix is not None:
            cache = copy.deepcopy(self.prefix)  # the model appends to it
            if spans is None and batch > 1 and cache.layers[0].keys.shape[0] == 1:
                cache.batch_repeat_interleave(batch)
            inputs["past_key_values"] = cache

        with listening(self), borrowed(self.model, self.num_layers, min(self.layers), rows, self.checkpoint) as gathered:
            logits = self.model(**inputs, use_cache=self.prefix is not None).logits
            if not gathered:
                logits = logits.gather(1, rows[..., None].expand(-1, -1, logits.shape[-1]))
            outcome = target_loss(logits.reshape(*targets.shape, -1), targets, loss, choice)
            self.loss, self._single = outcome.value, outcome.single
            self.one_minus_p = outcome.one_minus_p[:, 0] if outcome.single else outcome.one_minus_p
            if not outcome.scalar.requires_grad:
                raise RuntimeError(f"no graph reaches the logits of {type(self.model).__name__}: its layers do not pass gradients")
            outcome.scalar.backward()
        missing = [layer for layer in self.layers if layer not in self._flows]
        if missing:
            raise RuntimeError(
                f"layers {missing} never reached the attention interface of {type(self.model).__name__}; "
                f"recorded {sorted(self._flows)}: leave the missing ones out of layers"
            )
        for layer in self.layers:
            for name in ("abs_sum", "signed_sum", "row_sum"):
                bins = getattr(self._flows[layer], name)
                if bins is not None and not bool(torch.isfinite(bins).all()):
                    raise ValueError(f"layer {layer}: NaN or infinity in the gradient that reached its attention; use a wider dtype")
        self._count(batch, total, attention_mask)
        self.metadata = {
            "quantity": "|A * dL/dA|",
            "loss": loss,
            "target_ids": targets.tolist(),
            "target_positions": positions.tolist(),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "model": type(self.model).__name__,
            "name": getattr(self.model.config, "_name_or_path", ""),
            "layers": self.layers,
            "heads": self.heads,
            "segments": self.names,
            "candidates": None if choice is None else choice.tolist(),
            "exclude_diagonal": self.exclude_diagonal,
            "prefix": self.prefix_length,
        }
        return self

    # ---- sequences of unequal length -----------------------------------------------------------------------------------------------------

    def _spans_to_pack(self, inputs: dict[str, Any], rows: Tensor) -> list[tuple[int, int]] | None:
        """The rows [start, end) that each sequence needs, when running them end to end saves rows and changes nothing; else None.

        Everything but attention must treat tokens one by one (no convolution, no recurrence), and outputs with one entry a token keep the
        caller's layout.
        """
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        batch, kept = ids.shape
        per_token = {"row_by_seg", "col_by_seg", "row_sum", "col_sum", "matrix", "large_matrix"}
        if batch == 1 or self.documents is not None or per_token & set(self.outputs) or not self._token_by_token():
            return None
        if self.prefix is not None and self.prefix.layers[0].keys.shape[0] != 1:
            return None
        starts = torch.zeros(batch, dtype=torch.long, device=ids.device)
        ends = rows.amax(1) + 1
        if mask is not None:
            valid = mask.bool()[:, self.prefix_length :]
            starts = valid.int().argmax(1)
            inside = torch.arange(kept, device=ids.device)
            inside = (inside >= starts[:, None]) & (inside < ends[:, None])
            if not bool(mask[:, : self.prefix_length].all()) or not bool(valid[inside].all()):
                return None
        if int((ends - starts).sum()) == batch * kept:
            return None
        return list(zip(starts.tolist(), ends.tolist(), strict=True))

    def _token_by_token(self) -> bool:
        config = self.model.config.get_text_config()
        kinds = getattr(config, "layer_types", None) or ()
        convolves = any(isinstance(module, torch.nn.modules.conv._ConvNd) for module in self.model.modules())
        takes_positions = "position_ids" in inspect.signature(self.model.forward).parameters
        return takes_positions and not convolves and all(kind in ("full_attention", "sliding_attention") for kind in kinds)

    def _pack(self, inputs: dict[str, Any], rows: Tensor, spans: list[tuple[int, int]]) -> tuple[dict[str, Any], Tensor]:
        """input_ids and position_ids (1, total) and target rows (1, B · T); positions are those the padded batch would have had."""
        ids = inputs["input_ids"]
        batch, kept = ids.shape
        positions = inputs.get("position_ids")
        if positions is None:
            positions = torch.arange(self.prefix_length, self.prefix_length + kept, device=ids.device).expand(batch, -1)
        longest = max(end - start for start, end in spans)
        inner = self._inner_ids.new_full((batch, self.prefix_length + longest), -1)
        inner[:, : self.prefix_length] = self._inner_ids[:, : self.prefix_length]
        offset, moved = 0, rows.clone()
        for b, (start, end) in enumerate(spans):
            inner[b, self.prefix_length : self.prefix_length + end - start] = self._inner_ids[
                b, self.prefix_length + start : self.prefix_length + end
            ]
            moved[b] += offset - start
            offset += end - start
        self._inner_ids = inner

        def flat(x: Tensor) -> Tensor:
            return torch.cat([x[b, start:end] for b, (start, end) in enumerate(spans)])[None]

        return {"input_ids": flat(ids), "position_ids": flat(positions)}, moved.reshape(1, -1)

    # ---- called by the attention function ----------------------------------------------------------------------------------------------

    def layer_went_backward(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, lse: Tensor, grad: Tensor, options: dict[str, Any], window: int | None
    ) -> None:
        """One layer's bins; a layer that was not asked for passes."""
        if layer not in self.layers:
            return
        if layer in self._flows:
            raise RuntimeError(
                f"layer {layer} went backward twice in one pass: {type(self.model).__name__} uses one layer index for several attentions"
            )
        try:
            self._flows[layer] = planned_saliency_flow(
                self._plan(query, key, options),
                query,
                key,
                value,
                grad,
                lse,
                softmax_scale=options["softmax_scale"],
                softcap=options["softcap"],
                backend=self.backend,
            )
        except ValueError as error:
            raise ValueError(f"layer {layer}: {error}") from error
        self._kinds_of_mask[layer] = {"causal": options["causal"], "window": window}

    def _plan(self, query: Tensor, key: Tensor, options: dict[str, Any]) -> FlowPlan:
        """Made once for all layers of a run whose mask, lengths and device are the same."""
        rows, cols, device = query.shape[2], key.shape[2], query.device
        kind = device, rows, cols, options["causal"], options["window"], id(options["key_mask"])  # documents are the run's own
        if kind not in self._plans:
            last = self.prefix_length + rows
            ids = self._inner_ids.to(device)
            self._plans[kind] = plan_saliency_flow(
                ids[:, last - rows : last].contiguous(),
                ids[:, last - cols : last].contiguous(),
                num_row_segments=len(self.names),
                num_col_segments=len(self.names),
                causal=options["causal"],
                window=options["window"],
                key_mask=options["key_mask"],
                cu_seqlens_q=options["cu_seqlens_q"],
                pairs=None if self.pairs is None else self.pairs.to(device),
                outputs=self.outputs,
                exclude_diagonal=self.exclude_diagonal,
            )
        return self._plans[kind]

    def _count(self, batch: int, total: int, attention_mask: Tensor | None) -> None:
        """Counts over the whole sequence, tokens behind the target included, for each kind of mask once."""
        known: dict[Any, tuple[Tensor, Tensor]] = {}
        for layer in self.layers:
            kind = self._kinds_of_mask[layer]
            key = kind["causal"], kind["window"]
            if key not in known:
                visible = visible_ranges(batch, total, total, device=self._device, cu_seqlens_q=self.documents, **kind)
                known[key] = pair_counts(
                    visible,
                    self._ids,
                    self._ids,
                    len(self.names),
                    len(self.names),
                    key_mask=attention_mask,
                    exclude_diagonal=self.exclude_diagonal,
                )
            self._counts[layer] = known[key]

    # ---- reading the arguments -----------------------------------------------------------------------------------------------------------

    def _ran(self) -> None:
        if not self.metadata:
            raise RuntimeError("nothing was recorded: call run first")

    def _segment(self, name: str) -> int:
        if name not in self.names:
            raise ValueError(f"segment must be one of {self.names}, got {name!r}")
        return self.names.index(name)

    def _targets(
        self, target_positions: Any, target_ids: Any, batch: int, total: int, attention_mask: Tensor | None, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        if target_ids is None:
            raise ValueError("target_ids must name the token(s) whose prediction is explained")
        positions = torch.as_tensor(total - 1 if target_positions is None else target_positions, device=device)
        targets = torch.as_tensor(target_ids, device=device)
        shaped = []
        for name, t in (("target_positions", positions), ("target_ids", targets)):
            if t.is_floating_point():
                raise TypeError(f"{name} must be integers, got {t.dtype}")
            if t.dim() == 0:
                t = t.expand(batch, 1)
            elif t.dim() == 1:
                t = t[:, None]
            if t.dim() != 2 or t.shape[0] != batch:
                raise ValueError(f"{name} must be an int, (batch,) or (batch, num_targets) with batch {batch}, got {tuple(t.shape)}")
            shaped.append(t.long())
        positions, targets = torch.broadcast_tensors(*shaped)
        if bool((positions < self.prefix_length).any()) or bool((positions >= total).any()):
            raise ValueError(f"target_positions must be in [{self.prefix_length}, {total}), the tokens that run, got {positions.tolist()}")
        if attention_mask is not None and not bool(attention_mask.bool().gather(1, positions).all()):
            raise ValueError(f"target_positions {positions.tolist()} point at padding")
        return positions.contiguous(), targets.contiguous()

    def _packed(self, inputs: dict[str, Any], total: int, batch: int) -> Tensor | None:
        """(B, D + 1) borders of packed documents, seen only through positions that jump; None for one document a sequence."""
        positions = inputs.get("position_ids")
        if positions is None:
            return None
        jumps = positions[:, 1:] != positions[:, :-1] + 1
        if "attention_mask" in inputs:
            valid = inputs["attention_mask"].bool()[:, self.prefix_length :]
            if bool((jumps & valid[:, 1:] & valid[:, :-1]).any()):
                raise ValueError("position_ids that jump between tokens that attention_mask allows: pack documents or pad them, not both")
            return None
        if not bool(jumps.any()):
            return None
        if self.prefix_length:
            raise ValueError("position_ids jump (packed documents) while prefix_cache is given; run documents with a prefix one by one")
        starts = [[0, *(jumps[b].nonzero().flatten() + 1).tolist()] for b in range(batch)]
        longest = max(len(one) for one in starts) + 1
        length = positions.shape[1]
        return torch.tensor([one + [length] * (longest - len(one)) for one in starts], dtype=torch.int32, device=positions.device)

    def _refuse_shared_segments(self, documents: Tensor) -> None:
        """A segment of two documents would divide by pairs across them, which no row can see."""
        for b, borders in enumerate(documents.tolist()):
            seen: set[int] = set()
            for start, end in itertools.pairwise(borders):
                here = set(self._ids[b, start:end].tolist()) - {-1}
                if here & seen:
                    names = [self.names[i] for i in sorted(here & seen)]
                    raise ValueError(f"segments {names} have tokens in several documents of packed row {b}; name each document's own")
                seen |= here


def _indices(name: str, given: Sequence[int] | None, count: int) -> list[int]:
    if given is None:
        return list(range(count))
    chosen = sorted({index + count if index < 0 else index for index in given})
    if not chosen or chosen[0] < 0 or chosen[-1] >= count:
        raise ValueError(f"{name} must be indices in [-{count}, {count}), got {list(given)}")
    return chosen
