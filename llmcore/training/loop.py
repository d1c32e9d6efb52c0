"""The loop itself: shares of the loss from micro-batches and ranks, clipping, skipping what is not finite, saving, resuming."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from llmcore.adapters import disable_dropout, unwrap
from llmcore.errors import CannotRun
from llmcore.files import atomic_directory, write_bytes, write_json
from llmcore.training.config import TrainingConfig
from llmcore.training.folder import append_line, checkpoints, load_checkpoint, read_metrics, save_checkpoint, trainable, whole
from llmcore.training.progress import Interrupt, Progress

MAX_SKIPPED = 10  # consecutive steps without a finite gradient after which a run stops instead of burning time


@dataclass
class StepOutput:
    """What a step returns for one micro-batch.

    loss: () differentiable share of the step's loss. items: name -> (batch.num_items,) detached numbers of any dtype, gathered in float64
    over micro-batches and ranks for `summarize`.
    """

    loss: torch.Tensor
    items: dict[str, torch.Tensor] = field(default_factory=dict)


class Step(Protocol):
    """What `train` calls for each micro-batch.

    Two optional methods: prepare(model, local, everything, reduce) runs once before the gradient passes of a step and returns their
    `context`; `everything` are the step's micro-batches over all ranks, `local` (number, weight) of this rank's, weight 0 for a stand-in
    that keeps ranks in step. summarize(items) gets the per-item numbers of all micro-batches and ranks, in order, and returns the metrics
    to log; without it the means are logged.
    """

    def __call__(self, model: nn.Module, batch: Any, context: Any) -> StepOutput: ...


@dataclass
class TrainResult:
    """What a run did. steps and skipped count from the run's beginning, seconds is this call's; `history` is metrics.jsonl."""

    output_dir: str
    steps: int
    skipped: int
    resumed_from: int | None
    seconds: float
    history: list[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def curve(self, name: str) -> list[float]:
        """One metric over the steps that have it."""
        return [line[name] for line in self.history if name in line]


def make_accelerator(config: TrainingConfig, device: torch.device | None = None) -> Any:
    """An accelerate Accelerator for this configuration; launched by torchrun or `accelerate launch` it spans all ranks (FSDP2 by
    accelerate's own settings).
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState

    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != config.mixed_precision:
        AcceleratorState._reset_state()
    on_cpu = device.type == "cpu" if device is not None else not torch.cuda.is_available()
    # The loss may need several forwards for one backward; buffers are constants, and broadcasting them in between would touch saved
    # tensors.
    return Accelerator(
        mixed_precision=config.mixed_precision, cpu=on_cpu, kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)]
    )


def make_optimizer(parameters: Sequence[nn.Parameter], config: TrainingConfig) -> torch.optim.Optimizer:
    """config.optimizer over the parameters: AdamW (betas 0.9, 0.999) or RMSprop (smoothing 0.99), everything else at torch's defaults."""
    if config.optimizer == "rmsprop":
        return torch.optim.RMSprop(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    return torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)


def train(
    model: Any,
    batches: Any,
    step: Step,
    *,
    config: TrainingConfig | None = None,
    output_dir: str | Path,
    settings: Mapping[str, Any] | None = None,
    evaluate: Callable[[nn.Module, int], Mapping[str, float]] | None = None,
    resume: bool = True,
    accelerator: Any = None,
    progress: bool = True,
    what: str = "training",
    stop_after: int | None = None,
) -> TrainResult:
    """Train until the batches end.

    Args:
        model: a module (or LanguageModel) whose parameters with requires_grad are trained.
        batches: len() is the number of optimiser steps; batches[i] the micro-batches of step i over all ranks, each with .to(device) and
            .ids.
        step: see Step. config: TrainingConfig.
        output_dir: run folder. A run found there is resumed when it was made with equal settings (an error otherwise); resume=False
            starts afresh.
        settings: whatever else decides the result (loss, data); part of the run's identity.
        evaluate: called with (model, steps done) every config.eval_every steps and at the end; its numbers are logged with the prefix
            eval/.
        stop_after: stop with a checkpoint after this many steps in this call, as an interrupt would.

    Returns:
        TrainResult.

    Raises:
        KeyboardInterrupt: interrupted; a checkpoint was saved.
        CannotRun (a RuntimeError): ten consecutive steps (MAX_SKIPPED) without a finite loss and gradient; earlier checkpoints are kept.
        ValueError: output_dir holds a run with other settings, or the model has nothing to train.
    """
    config = config or TrainingConfig()
    output_dir = Path(output_dir)
    began = time.monotonic()
    module = unwrap(model)
    accelerator = accelerator or make_accelerator(config, next(module.parameters()).device)
    main, world, rank = accelerator.is_main_process, accelerator.num_processes, accelerator.process_index
    identity = {
        **{f.name: getattr(config, f.name) for f in fields(config) if f.name not in ("checkpoint_every", "keep_checkpoints", "eval_every")},
        "num_steps": len(batches),
        **(settings or {}),
    }
    metrics_path = output_dir / "metrics.jsonl"
    found = checkpoints(output_dir) if resume else []
    before = output_dir / "run.json"
    if resume and before.is_file():
        old = json.loads(before.read_text())
        differing = sorted(k for k in {*old, *identity} if json.dumps(old.get(k), default=str) != json.dumps(identity.get(k), default=str))
        if differing:
            name = differing[0]
            raise ValueError(
                f"output_dir {output_dir} holds a run with other settings ({name}: {old.get(name)!r} there, {identity.get(name)!r} now); "
                "choose another output_dir, or start afresh with resume=False (--fresh)"
            )
    torch.manual_seed(config.seed)
    if not config.dropout:
        disable_dropout(module)
    if config.gradient_checkpointing:
        module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if hasattr(module, "enable_input_require_grads"):
            module.enable_input_require_grads()
    module.train()
    if not trainable(module):
        raise ValueError("model has no parameter with requires_grad; add adapters (add_lora) or unfreeze it")
    optimizer = make_optimizer(list(trainable(module).values()), config)
    wrapped, optimizer = accelerator.prepare(module, optimizer)
    parameters = list(trainable(wrapped).values())
    inner = optimizer.optimizer
    start, skipped, resumed_from = 0, 0, None
    if found:
        start, folder = found[-1]
        skipped = load_checkpoint(folder, wrapped, inner)["skipped"]
        resumed_from = start
    accelerator.wait_for_everyone()
    if main:
        output_dir.mkdir(parents=True, exist_ok=True)
        if not resume:
            for _, folder in checkpoints(output_dir):
                shutil.rmtree(folder)
            shutil.rmtree(output_dir / "final", ignore_errors=True)
        write_json(before, json.loads(json.dumps(identity, default=str)))
        kept = [line for line in read_metrics(metrics_path) if line["step"] <= start] if resumed_from is not None else []
        write_bytes(metrics_path, "".join(json.dumps(line) + "\n" for line in kept).encode())
    accelerator.wait_for_everyone()

    def save(done: int) -> None:
        save_checkpoint(output_dir / f"checkpoint-{done:06d}", wrapped, inner, {"step": done, "skipped": skipped}, main)
        if main:
            for _, folder in checkpoints(output_dir)[: -config.keep_checkpoints]:
                shutil.rmtree(folder)

    def reduce(t: torch.Tensor) -> torch.Tensor:
        return accelerator.reduce(t.to(accelerator.device), reduction="sum")

    in_a_row = 0
    done = start
    with Progress(len(batches), what, done=start, show=progress and main) as bar, Interrupt() as interrupt:
        for i in range(start, len(batches)):
            clock = time.monotonic()
            everything = batches[i]
            passes = -(-len(everything) // world)
            # Ranks run equally many passes; one without a micro-batch of its own repeats the first with weight 0.
            local = [
                (k, everything[k], 1.0) if k < len(everything) else (0, everything[0], 0.0) for k in range(rank, passes * world, world)
            ]
            local = [(k, batch.to(accelerator.device) if hasattr(batch, "to") else batch, weight) for k, batch, weight in local]
            for group in inner.param_groups:
                group["lr"] = config.rate(i, len(batches))
            context = None
            if hasattr(step, "prepare"):
                context = step.prepare(wrapped, [(k, weight) for k, _, weight in local], everything, reduce)
            sizes = [batch.num_items for batch in everything]
            vectors: dict[str, torch.Tensor] = {}
            losses = torch.zeros(len(everything), dtype=torch.float64, device=accelerator.device)
            for n, (k, batch, weight) in enumerate(local):
                last = n == len(local) - 1
                with contextlib.nullcontext() if last else accelerator.no_sync(wrapped):
                    output = step(wrapped, batch, context)
                    # Data parallel averages gradients over ranks; shares of the loss are meant to add up.
                    accelerator.backward(output.loss * (weight * world))
                if weight:
                    losses[k] += output.loss.detach()
                for name, values in output.items.items():
                    vector = vectors.setdefault(name, torch.zeros(sum(sizes), dtype=torch.float64, device=accelerator.device))
                    if weight:
                        vector[sum(sizes[:k]) : sum(sizes[: k + 1])] = values.detach()
            norm = accelerator.clip_grad_norm_(parameters, config.max_grad_norm)
            norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
            names = sorted(vectors)
            asked = torch.tensor([float(interrupt.asked)], dtype=torch.float64, device=accelerator.device)
            flat = reduce(torch.cat([losses, asked, *(vectors[name] for name in names)])).cpu()
            losses, asked, rest = flat[: len(everything)], flat[len(everything)], flat[len(everything) + 1 :]
            items = dict(zip(names, rest.view(len(names), -1), strict=True)) if names else {}
            means = step.summarize(items) if hasattr(step, "summarize") else {name: values.mean().item() for name, values in items.items()}
            record: dict[str, Any] = {
                "step": i + 1,
                "loss": losses.sum().item(),
                "learning_rate": config.rate(i, len(batches)),
                "grad_norm": float(norm),
                **means,
            }
            if math.isfinite(record["loss"]) and math.isfinite(record["grad_norm"]):
                optimizer.step()
                in_a_row = 0
            else:
                bad = [k for k, value in enumerate(losses.tolist()) if not math.isfinite(value)] or range(len(everything))
                record = {
                    "step": i + 1,
                    "skipped": "loss or gradient is not finite",
                    "ids": [name for k in bad for name in everything[k].ids],
                }
                skipped, in_a_row = skipped + 1, in_a_row + 1
            inner.zero_grad(set_to_none=True)
            done = i + 1
            if evaluate is not None and ((config.eval_every and done % config.eval_every == 0) or done == len(batches)):
                record.update({f"eval/{name}": value for name, value in evaluate(wrapped, done).items()})
            record["seconds"] = time.monotonic() - clock
            if main:
                append_line(metrics_path, record)
            note = f"loss {record['loss']:.4f}" if "loss" in record else "skipped: not finite"
            bar.update(done, note + (f"  margin {record['rewards/margins']:.3f}" if "rewards/margins" in record else ""))
            stop = bool(asked) or (stop_after is not None and done - start >= stop_after)
            if in_a_row >= MAX_SKIPPED:
                raise CannotRun(
                    f"{in_a_row} consecutive steps up to step {done} gave a NaN or infinite loss or gradient (ids in {metrics_path}); "
                    "lower learning_rate or mend the data; earlier checkpoints are kept"
                )
            if (done % config.checkpoint_every == 0 and not in_a_row) or done == len(batches) or stop:
                save(done)
            if bool(asked) and done < len(batches):
                raise KeyboardInterrupt(f"stopped after step {done} of {len(batches)}; the run in {output_dir} resumes from there")
            if stop:
                break
    if done == len(batches) and (resumed_from != done or not (output_dir / "final").is_dir()):
        _save_final(output_dir / "final", wrapped, accelerator)
    accelerator.wait_for_everyone()
    return TrainResult(str(output_dir), done, skipped, resumed_from, time.monotonic() - began, read_metrics(metrics_path))


def _save_final(folder: Path, wrapped: nn.Module, accelerator: Any) -> None:
    """The trained model (or adapter) in transformers' (or peft's) own format."""
    module = unwrap(wrapped)
    if not hasattr(module, "save_pretrained"):
        return
    state = (
        {name: whole(p) for name, p in module.state_dict().items()} if any(hasattr(p, "full_tensor") for p in module.parameters()) else None
    )
    if accelerator.is_main_process:
        with atomic_directory(folder, replace=True) as temporary:
            module.save_pretrained(temporary, **({} if state is None else {"state_dict": state}))
