"""How to optimise: rate, schedule, optimiser, precision, checkpoints."""

from __future__ import annotations

import math
from dataclasses import dataclass

SCHEDULES = ("constant", "linear", "cosine")
OPTIMIZERS = ("adamw", "rmsprop")


@dataclass(frozen=True)
class TrainingConfig:
    """How to optimise. Defaults suit preference training with LoRA; the over-optimisation study used rmsprop at 5e-7, warm-up 150, clip
    10.

    Rates are per optimiser step, warm-up, checkpoints and evaluations are counted in optimiser steps (eval_every=0: only at the end),
    max_grad_norm is the 2-norm of all gradients together.

    Raises:
        ValueError: a choice that is not in the list, a rate or norm that is not positive and finite, a count below its least value.
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
