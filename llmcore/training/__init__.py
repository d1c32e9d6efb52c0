"""One training loop for every method: LoRA or full fine-tuning, one process or many, interrupted and resumed without a trace.

    result = train(model, batches, step, config=TrainingConfig(...), output_dir="run")

`batches[i]` is the list of micro-batches of optimiser step i over *all* ranks, a pure function of i; rank r takes every world-th of them.
`step(model, batch, context)` returns a StepOutput whose loss is the micro-batch's *share* of the step's loss: already divided by the
whole step's count, so that the shares add up to the loss whatever the micro-batches and ranks. Accumulating shares keeps per-pair and
per-token normalisers apart inside one combined loss.

A run folder holds metrics.jsonl (one line per step), checkpoint-<step>/ (safetensors; written aside, then renamed) and final/. Killed at
any moment, the same call goes on from the last checkpoint and the finished metrics.jsonl equals that of an undisturbed run, time stamps
aside.

    config.py     what to optimise with                 folder.py   metrics.jsonl and checkpoints: whole or not there
    loop.py       steps, shares, skipping, resuming     progress.py bars, plain lines, Ctrl-C
"""

from llmcore.training.config import OPTIMIZERS, SCHEDULES, TrainingConfig
from llmcore.training.folder import append_line, checkpoints, read_metrics
from llmcore.training.loop import MAX_SKIPPED, Step, StepOutput, TrainResult, make_accelerator, make_optimizer, train
from llmcore.training.progress import Progress

__all__ = [
    "MAX_SKIPPED",
    "OPTIMIZERS",
    "SCHEDULES",
    "Progress",
    "Step",
    "StepOutput",
    "TrainResult",
    "TrainingConfig",
    "append_line",
    "checkpoints",
    "make_accelerator",
    "make_optimizer",
    "read_metrics",
    "train",
]
