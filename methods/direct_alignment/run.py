"""Whole runs: configuration, training and scoring from a data source."""
# S sequences, P pairs, N scored rows (tokens), D hidden, V vocab, E examples

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from llmcore.methods.direct_alignment.config import Config
from llmcore.methods.direct_alignment.metrics import summarize
from llmcore.methods.direct_alignment.reference import AdapterOff, CachedRef, RefModel, model_hash, reference_fingerprint
from llmcore.methods.direct_alignment.step import PreferenceStep, Totals, preference_step
from torch import nn

from llmcore import adapters, data, training
from llmcore.losses import LossOutput
from llmcore.training import TrainResult


def trunk_layout(model: Any, config: Config, *, paired: bool) -> tuple[str, bool]:
    """The layout and isolation that "auto" means for this model."""
    base = adapters.base_model(model)
    masks = adapters.accepts_block_mask(base)
    layout = config.layout
    if layout == "auto":
        layout = "shared" if masks and paired else "padded"
    elif layout == "shared" and not masks:
        raise ValueError(
            "layout 'shared' needs an attention that takes a block mask (sdpa or eager, no sliding window), got "
            f"{base.config._attn_implementation!r} of {type(base).__name__}; use 'padded'"
        )
    isolate = config.isolate if config.isolate is not None else next(base.parameters()).device.type == "cpu"
    return layout, isolate


def prepare_examples(source: Any, language_model: Any, config: Config, *, split: str = "train", limit: int | None = None) -> data.Tokenized:
    """Read, check and tokenise rows for the kind of loss in the configuration."""
    loss = config.make_loss()
    rows = data.read_rows(source, "unpaired" if loss.unpaired else "preference", split=split, limit=limit)
    return data.tokenize(
        rows,
        language_model.tokenizer,
        stop_ids=language_model.stop_ids,
        max_length=config.max_length,
        truncation=config.truncation,
        on_empty=config.on_empty,
        vocab_size=adapters.base_model(language_model).get_output_embeddings().weight.shape[0],
    )


def train(
    source: Any,
    *,
    config: Config | None = None,
    model: Any = "smollm2",
    output_dir: str | Path,
    eval_source: Any = None,
    split: str = "train",
    limit: int | None = None,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    ref: Any = None,
    resume: bool = True,
    progress: bool = True,
    stop_after: int | None = None,
) -> TrainResult:
    """Align a model on preference data.

    Args:
        source: rows (see llmcore.data.read_rows). config: Config. model: a name for load_model, or a LanguageModel (adapters are added to
            it).
        output_dir: run folder: metrics.jsonl, checkpoints, reference scores, final model or adapter. The same call resumes an interrupted
            run.
        eval_source: held-out rows, evaluated every config.training.eval_every steps and at the end.
        ref: a CachedRef / RefModel / AdapterOff replacing what config.reference names.

    Returns:
        TrainResult; `history` holds the metrics of each step.

    Raises:
        ValueError: bad rows (file, line, field), bad settings, a model with NaN weights, scores of another reference. All before the
        first step.
    """
    config = config or Config()
    loss = config.make_loss()
    kind = "unpaired" if loss.unpaired else "preference"
    rows = data.read_rows(source, kind, split=split, limit=limit)
    eval_rows = data.read_rows(eval_source, kind, split=split) if eval_source is not None else None
    if isinstance(model, (str, Path)):
        from llmcore.models import load_model

        model = load_model(model, device=device, dtype=dtype)
    base = adapters.base_model(model)
    how: dict[str, Any] = {
        "stop_ids": model.stop_ids,
        "max_length": config.max_length,
        "truncation": config.truncation,
        "on_empty": config.on_empty,
        "vocab_size": base.get_output_embeddings().weight.shape[0],
    }
    tokenized = data.tokenize(rows, model.tokenizer, **how)
    held_out = data.tokenize(eval_rows, model.tokenizer, **how).examples if eval_rows is not None else []
    adapters.check_head(model)
    layout, isolate = trunk_layout(model, config, paired=not loss.unpaired)
    module = adapters.unwrap(model)
    weights = model_hash(module)
    if config.lora_rank and not adapters.has_adapters(module):
        for p in module.parameters():
            p.requires_grad_(False)
        module = adapters.add_lora(module, rank=config.lora_rank, alpha=config.lora_alpha, seed=config.training.seed)
    elif not config.lora_rank and not adapters.has_adapters(module):
        for p in module.parameters():
            p.requires_grad_(True)
    if not config.training.dropout:
        adapters.disable_dropout(module)
    accelerator = training.make_accelerator(config.training, next(module.parameters()).device)
    module.to(accelerator.device)
    output_dir = Path(output_dir)
    given = ref
    ref, eval_ref = _references(
        given, config, loss, module, model.tokenizer, tokenized.examples, held_out, layout, isolate, output_dir, accelerator, progress
    )
    batches = data.Batches(
        tokenized.examples,
        batch_size=config.batch_size,
        micro_batch_size=config.micro_batch_size,
        num_steps=config.num_steps,
        epochs=config.epochs,
        seed=config.training.seed,
        layout=layout,
        isolate=isolate,
    )
    step = PreferenceStep(loss, ref, ld_alpha=config.ld_alpha, wpo=config.wpo, mode=config.head_mode)
    settings = {
        "loss": repr(loss),
        "model": weights,
        "tokenizer": data.tokenizer_hash(model.tokenizer),
        "examples": data.examples_hash(tokenized.examples),
        "batch_size": batches.batch_size,
        "reference": type(given).__name__ if given is not None else config.reference,
        "ld_alpha": config.ld_alpha,
        "wpo": config.wpo,
        "lora": [config.lora_rank, config.lora_alpha],
        "trunk": layout + ("/isolated" if isolate else ""),
        "max_length": config.max_length,
        "truncation": config.truncation,
    }
    evaluate = None
    if held_out:
        eval_step = PreferenceStep(loss, eval_ref, ld_alpha=config.ld_alpha, wpo=config.wpo)

        def evaluate(policy: nn.Module, _done: int) -> Mapping[str, float]:
            return evaluate_examples(policy, held_out, eval_step, batch_size=config.micro_batch_size, layout=layout, isolate=isolate)

    return training.train(
        module,
        batches,
        step,
        config=config.training,
        output_dir=output_dir,
        settings=settings,
        evaluate=evaluate,
        resume=resume,
        accelerator=accelerator,
        progress=progress,
        what=loss.name,
        stop_after=stop_after,
    )


def _references(
    ref: Any,
    config: Config,
    loss: Any,
    module: nn.Module,
    tokenizer: Any,
    examples: Sequence[data.Example],
    held_out: Sequence[data.Example],
    layout: str,
    isolate: bool,
    output_dir: Path,
    accelerator: Any,
    progress: bool,
) -> tuple[Any, Any]:
    if not loss.needs_reference or config.reference == "none":
        if loss.needs_reference:
            raise ValueError(f"{loss.name} compares with a reference; reference 'none' serves reference-free losses only")
        return None, None
    if ref is not None:
        if isinstance(ref, CachedRef):
            ref.check(reference_fingerprint(module, tokenizer, examples, config, layout=layout, isolate=isolate))
        return ref, ref
    choice = config.reference
    baseline = loss.unpaired and getattr(loss, "uses_baseline", False)
    if choice == "auto":
        choice = ("adapter" if adapters.has_adapters(module) else "model") if baseline else "cached"
    if choice == "adapter":
        if not adapters.has_adapters(module):
            raise ValueError("reference 'adapter' needs LoRA (lora_rank > 0); use 'cached' or 'model'")
        return AdapterOff(), AdapterOff()
    if choice == "model":
        import copy

        frozen = copy.deepcopy(adapters.base_model(module)) if not adapters.has_adapters(module) else None
        if frozen is None:
            return AdapterOff(), AdapterOff()  # the frozen base already is that model
        return (RefModel(frozen.requires_grad_(False).eval()),) * 2
    how: dict[str, Any] = {
        "batch_size": max(4, config.micro_batch_size),
        "layout": layout,
        "isolate": isolate,
        "ld_alpha": config.ld_alpha,
        "accelerator": accelerator,
        "progress": progress,
    }
    # A run that does not see every example once scores what it sees, as it goes: the same rows of the same frozen weights.
    short = config.num_steps is not None and config.num_steps * config.batch_size < len(examples)
    live = short and config.reference == "auto" and adapters.has_adapters(module)
    cached = []
    for name, part in (("reference", [] if live else examples), ("reference-eval", held_out)):
        mark = reference_fingerprint(module, tokenizer, part, config, layout=layout, isolate=isolate)
        cached.append(CachedRef.compute(module, part, fingerprint=mark, path=output_dir / f"{name}.safetensors", **how) if part else None)
    return AdapterOff() if live else cached[0], cached[1]


@torch.no_grad()
def evaluate_examples(
    model: Any, examples: Sequence[data.Example], step: PreferenceStep, *, batch_size: int = 4, layout: str = "padded", isolate: bool = True
) -> dict[str, float]:
    """Metrics of held-out examples, as one step over all of them."""
    batches = [data.batch_of(examples[i : i + batch_size], layout=layout, isolate=isolate) for i in range(0, len(examples), batch_size)]
    totals = step.prepare(adapters.unwrap(model), [(k, 1.0) for k in range(len(batches))], batches, lambda t: t)
    outputs = [step(model, batch, totals) for batch in batches]
    items = {name: torch.cat([o.items[name].double().cpu() for o in outputs]) for name in outputs[0].items}
    return {"loss": float(sum(o.loss.item() for o in outputs)), **step.summarize(items)}


@dataclass
class ScoreResult:
    """Scores of preference data. Per example: chosen and rejected log-probability, reference ones (0 without a reference), margin, ids.
    Means as in training.
    """

    ids: list[str]
    logp: list[list[float]]
    ref_logp: list[list[float]] | None
    counts: list[list[int]]
    metrics: dict[str, float]
    data_counts: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def score(
    source: Any,
    *,
    model: Any = "smollm2",
    reference: Any = None,
    adapter: str | Path | None = None,
    config: Config | None = None,
    split: str = "train",
    limit: int | None = None,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> ScoreResult:
    """Log-probabilities, margins and accuracy of a model on preference data.

    Args:
        model: name for load_model or LanguageModel. adapter: folder of a trained adapter (a run's final/), whose base then serves as the
            reference.
        reference: a second model; without one and without an adapter margins are against 0 and labelled reference-free.
    """
    config = config or Config()
    loss = config.make_loss()
    if loss.unpaired:
        raise ValueError(f"score works on pairs; {loss.name} is an unpaired loss")
    from llmcore.models import load_model

    if isinstance(model, (str, Path)):
        model = load_model(model, device=device, dtype=dtype)
    tokenized = prepare_examples(source, model, config, split=split, limit=limit)
    examples = tokenized.examples
    module = adapters.unwrap(model)
    ref: RefModel | AdapterOff | None = None
    if adapter is not None:
        import peft

        module = peft.PeftModel.from_pretrained(module, str(adapter))
        ref = AdapterOff()
    if reference is not None:
        ref = RefModel(load_model(reference, device=device, dtype=dtype) if isinstance(reference, (str, Path)) else reference)
    adapters.check_head(module)
    layout, isolate = trunk_layout(module, config, paired=True)
    logp: list[list[float]] = []
    ref_logp: list[list[float]] = []
    counts: list[list[int]] = []
    items: dict[str, list[torch.Tensor]] = {}
    total = 0.0
    size = config.micro_batch_size
    with training.Progress(len(examples), "scoring", show=progress) as bar:
        for i in range(0, len(examples), size):
            batch = data.batch_of(examples[i : i + size], layout=layout, isolate=isolate)
            measure = loss if ref is not None or not loss.needs_reference else _Unreferenced(loss)
            out = preference_step(
                module,
                batch,
                measure,
                ref,
                totals=Totals(len(examples), sum(e.sequences[0].scored for e in examples)),
                ld_alpha=config.ld_alpha,
            )
            logp += out.logp.view(-1, 2).tolist()
            counts += out.counts.view(-1, 2).tolist()
            if out.ref_logp is not None:
                ref_logp += out.ref_logp.view(-1, 2).tolist()
            for name, value in out.items.items():
                items.setdefault(name, []).append(value.double().cpu())
            total += out.loss.item()
            bar.update(i + len(out.per_pair))
    metrics = {"loss": total, **summarize({k: torch.cat(v) for k, v in items.items()}, loss)}
    return ScoreResult([e.id for e in examples], logp, ref_logp or None, counts, metrics, tokenized.counts)


class _Unreferenced:
    """A loss evaluated against a reference of 0, for scoring a model on its own."""

    unpaired, needs_reference, batch_level = False, False, False

    def __init__(self, loss: Any) -> None:
        self.loss, self.name, self.nll_weight = loss, loss.name, loss.nll_weight
        self.reward_scale, self.coefficient_bound = loss.reward_scale, loss.coefficient_bound

    def __call__(
        self, lw: torch.Tensor, ll: torch.Tensor, rw: None, rl: None, nw: torch.Tensor, nl: torch.Tensor, **options: Any
    ) -> LossOutput:
        zero = torch.zeros_like(lw)
        return self.loss(lw, ll, zero, zero, nw, nl, **options)
