"""One training loop for every method: LoRA or full fine-tuning, one process or many, interrupted and resumed without a trace.

    result = train(model, batches, step, config=TrainingConfig(...), output_dir="run")

`batches[i]` is the list of micro-batches of optimiser step i over *all* ranks, a pure function of i; rank r takes every world-th of them.
`step(model, batch, context)` returns a StepOutput whose loss is the micro-batch's *share* of the step's loss: already divided by the
whole step's count, so that the shares add up to the loss whatever the micro-batches and ranks. Accumulating shares keeps per-pair and
per-token normalisers apart inside one combined loss.

A run folder holds metrics.jsonl (one line per step), checkpoint-<step>/ (safetensors; written aside, then renamed) and final/. Killed at
any moment, the same call goes on from the last checkpoint and the finished metrics.jsonl equals that of an undisturbed run, time stamps
aside.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from llmcore.adapters import disable_dropout, unwrap
from llmcore.files import atomic_directory, write_bytes, write_json

SCHEDULES = ("constant", "linear", "cosine")
OPTIMIZERS = ("adamw", "rmsprop")
MAX_SKIPPED = 10  # consecutive steps without a finite gradient after which a run stops instead of burning time


@dataclass(frozen=True)
class TrainingConfig:
    """How to optimise. Defaults suit preference training with LoRA; the over-optimisation study used rmsprop at 5e-7, warm-up 150, clip
    10.
    """

    learning_rate: float = 1e-4
    warmup_steps: int = 0
    schedule: str = "constant"  # after the warm-up: constant, or linear / cosine to 0
    optimizer: str = "adamw"
    weight_decay: float = 0.0
    max_grad_norm: float = 10.0
    mixed_precision: str = "no"  # "bf16" computes under autocast with float32 weights
    gradient_checkpointing: bool = False
    dropout: bool = False  # True leaves the model's dropout on: the first margin is then not 0
    checkpoint_every: int = 50
    keep_checkpoints: int = 2
    eval_every: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, choices in (("schedule", SCHEDULES), ("optimizer", OPTIMIZERS), ("mixed_precision", ("no", "bf16"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        for name in ("learning_rate", "max_grad_norm"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
        for name, least in (("warmup_steps", 0), ("checkpoint_every", 1), ("keep_checkpoints", 1), ("eval_every", 0), ("weight_decay", 0)):
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")

    def rate(self, step: int, num_steps: int) -> float:
        """Learning rate of step 0 … num_steps − 1."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.learning_rate
        done = (step - self.warmup_steps) / max(1, num_steps - self.warmup_steps)
        return self.learning_rate * ((1 - done) if self.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done)))


@dataclass
class StepOutput:
    """A micro-batch's share of the step's loss, and per-item numbers, (batch.num_items,) each, that the step's `summarize` turns into
    metrics.
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
    """What a run did. `history` is metrics.jsonl."""

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


# ---- files


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Lines of a metrics file; a last line cut by a kill is left out."""
    if not path.is_file():
        return []
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def _append(path: Path, record: Mapping[str, Any]) -> None:
    # One write to a file opened for appending: a line is there or not.
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(handle, (json.dumps(record) + "\n").encode())
    finally:
        os.close(handle)


def _full(t: torch.Tensor) -> torch.Tensor:
    t = t.detach()
    return (t.full_tensor() if hasattr(t, "full_tensor") else t).cpu().contiguous()


def _assign(target: torch.Tensor, value: torch.Tensor) -> None:
    if hasattr(target, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
    target.copy_(value)


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in unwrap(model).named_parameters() if p.requires_grad}


def _save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any], writes: bool) -> None:
    from safetensors.torch import save_file

    parameters = _trainable(model)
    tensors = {f"model.{name}": _full(p) for name, p in parameters.items()}
    for name, p in parameters.items():
        for key, value in optimizer.state.get(p, {}).items():
            tensors[f"optimizer.{key}.{name}"] = _full(value) if isinstance(value, torch.Tensor) else torch.tensor(value)
    tensors["rng.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    if writes:
        with atomic_directory(folder, replace=True) as temporary:
            save_file(tensors, temporary / "state.safetensors")
            write_json(temporary / "state.json", state)


def _load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    from safetensors import safe_open

    parameters = _trainable(model)
    with safe_open(folder / "state.safetensors", "pt") as file, torch.no_grad():
        names = set(file.keys())
        missing = [name for name in parameters if f"model.{name}" not in names]
        if missing:
            raise ValueError(f"{folder} does not hold parameter {missing[0]}: it belongs to another model; choose another output_dir")
        for name, p in parameters.items():
            _assign(p, file.get_tensor(f"model.{name}"))
        for entry in sorted(n for n in names if n.startswith("optimizer.")):
            _, key, name = entry.split(".", 2)
            value, p = file.get_tensor(entry), parameters[name]
            slot = optimizer.state[p]
            if value.shape == p.shape and value.dim() > 0:
                slot[key] = torch.zeros_like(p, dtype=value.dtype)
                _assign(slot[key], value)
            else:
                slot[key] = value
        torch.set_rng_state(file.get_tensor("rng.cpu"))
        if "rng.cuda" in names and torch.cuda.is_available():
            torch.cuda.set_rng_state(file.get_tensor("rng.cuda"))
    return json.loads((folder / "state.json").read_text())


def checkpoints(output_dir: Path) -> list[tuple[int, Path]]:
    """Complete checkpoints of a run folder, oldest first."""
    found = [(int(p.name.split("-")[1]), p) for p in output_dir.glob("checkpoint-*") if (p / "state.json").is_file()]
    return sorted(found)


# ---- progress


class Progress:
    """A bar with time left on a terminal, plain lines at most every few seconds otherwise, nothing when not shown."""

    def __init__(self, total: int, what: str, *, done: int = 0, show: bool = True, every_seconds: float = 10.0) -> None:
        self.total, self.what, self.show, self.every = total, what, show, every_seconds
        self.begin, self.base, self.last = time.monotonic(), done, 0.0
        self.bar: Any = None
        if show and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self.bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
            )
            self.task = self.bar.add_task(what, total=total, completed=done, note="")
            self.bar.start()

    def update(self, done: int, note: str = "") -> None:
        if not self.show:
            return
        if self.bar is not None:
            self.bar.update(self.task, completed=done, note=note)
            return
        now = time.monotonic()
        if done >= self.total or now - self.last >= self.every:
            left = (now - self.begin) / max(1, done - self.base) * (self.total - done)
            print(
                f"{self.what} {done}/{self.total}  {now - self.begin:.0f} s, {left:.0f} s left  {note}".rstrip(),
                file=sys.stderr,
                flush=True,
            )
            self.last = now

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Interrupt:
    """The first Ctrl-C or SIGTERM asks for a checkpoint at the end of the step; the second one stops at once."""

    def __init__(self) -> None:
        self.asked = False
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> _Interrupt:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.previous[number] = signal.signal(number, self._ask)
        return self

    def _ask(self, number: int, _frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("stopping after this step; again to stop at once", file=sys.stderr, flush=True)

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)


# ---- the loop


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
        KeyboardInterrupt after saving a checkpoint, when interrupted. RuntimeError after ten consecutive steps without a finite gradient.
        ValueError: output_dir holds a run with other settings.
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
    if not _trainable(module):
        raise ValueError("model has no parameter with requires_grad; add adapters (add_lora) or unfreeze it")
    optimizer = make_optimizer(list(_trainable(module).values()), config)
    wrapped, optimizer = accelerator.prepare(module, optimizer)
    parameters = list(_trainable(wrapped).values())
    inner = optimizer.optimizer
    start, skipped, resumed_from = 0, 0, None
    if found:
        start, folder = found[-1]
        skipped = _load(folder, wrapped, inner)["skipped"]
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
        _save(output_dir / f"checkpoint-{done:06d}", wrapped, inner, {"step": done, "skipped": skipped}, main)
        if main:
            for _, folder in checkpoints(output_dir)[: -config.keep_checkpoints]:
                shutil.rmtree(folder)

    def reduce(t: torch.Tensor) -> torch.Tensor:
        return accelerator.reduce(t.to(accelerator.device), reduction="sum")

    in_a_row = 0
    done = start
    with Progress(len(batches), what, done=start, show=progress and main) as bar, _Interrupt() as interrupt:
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
                _append(metrics_path, record)
            note = f"loss {record['loss']:.4f}" if "loss" in record else "skipped: not finite"
            bar.update(done, note + (f"  margin {record['rewards/margins']:.3f}" if "rewards/margins" in record else ""))
            stop = bool(asked) or (stop_after is not None and done - start >= stop_after)
            if in_a_row >= MAX_SKIPPED:
                raise RuntimeError(
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
        {name: _full(p) for name, p in module.state_dict().items()} if any(hasattr(p, "full_tensor") for p in module.parameters()) else None
    )
    if accelerator.is_main_process:
        with atomic_directory(folder, replace=True) as temporary:
            module.save_pretrained(temporary, **({} if state is None else {"state_dict": state}))
