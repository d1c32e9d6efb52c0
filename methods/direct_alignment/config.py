"""What to optimise and on what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llmcore import data
from llmcore.losses import loss_from_name
from llmcore.training import TrainingConfig

REFERENCES = ("auto", "cached", "adapter", "model", "none")


@dataclass(frozen=True)
class Config:
    """What to optimise and on what. Defaults are common practice with LoRA on one machine; `study()` is the over-optimisation paper's
    recipe.
    """

    loss: Any = "dpo"  # a name of llmcore.losses or a loss object
    loss_options: Mapping[str, Any] = field(default_factory=dict)  # beta, label_smoothing, …
    max_length: int | None = 512
    truncation: str = "reject"  # the study's code cut the prompt to 256 tokens, then responses silently
    on_empty: str = "error"
    batch_size: int = 8  # pairs per optimiser step over all ranks (study: 64)
    micro_batch_size: int = 2  # pairs per forward and backward
    epochs: float = 1.0
    num_steps: int | None = None
    reference: str = "auto"  # cached scores; adapter = the model without its adapters; model = a frozen copy; none = reference-free
    ld_alpha: float | None = None  # LD-DPO: weight of the tokens beyond the shorter side's length, in policy and reference
    wpo: bool = False  # weight pairs by how likely the policy is to write them
    lora_rank: int = 16  # 0 trains all weights (the study did)
    lora_alpha: float | None = None
    layout: str = "auto"  # padded, packed, shared (a pair's common prefix is computed once)
    isolate: bool | None = None  # one trunk call per pair: scores independent of the batch bit for bit; default on CPU
    head_mode: str = "auto"  # passed to the head kernel: recompute (least memory) or resident (fewest FLOPs)
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(learning_rate=5e-5, warmup_steps=5))

    def __post_init__(self) -> None:
        if self.reference not in REFERENCES:
            raise ValueError(f"reference must be one of {REFERENCES}, got {self.reference!r}")
        if self.layout not in ("auto", *data.LAYOUTS):
            raise ValueError(f"layout must be 'auto' or one of {data.LAYOUTS}, got {self.layout!r}")
        if self.lora_rank < 0:
            raise ValueError(f"lora_rank must be 0 (train all weights) or more, got {self.lora_rank}")
        if self.ld_alpha is not None and not 0 <= self.ld_alpha <= 1:
            raise ValueError(f"ld_alpha must lie in [0, 1], got {self.ld_alpha}")
        loss = self.make_loss()
        if loss.unpaired and (self.ld_alpha is not None or self.wpo):
            raise ValueError(f"ld_alpha and wpo are defined for pairs, not for {loss.name}")
        if getattr(loss, "nll_over", "completion") == "all":
            raise ValueError(f"{loss.name}: nll_over='all' scores prompt tokens, which batches do not carry; use nll_over='completion'")
        if loss.batch_level and self.micro_batch_size < self.batch_size:
            raise ValueError(
                f"{loss.name} couples the pairs of a batch: micro_batch_size {self.micro_batch_size} would change the loss; "
                f"set micro_batch_size to batch_size {self.batch_size}"
            )
        if self.wpo and loss.batch_level:
            raise ValueError(f"wpo cannot be combined with {loss.name}: it couples the pairs of a batch")

    @classmethod
    def study(cls, **changes: Any) -> Config:
        """The recipe of the over-optimisation study: all weights, 64 pairs, RMSprop at 5e-7 after 150 warm-up steps, clip 10, one epoch."""
        return cls(
            **{
                "batch_size": 64,
                "lora_rank": 0,
                "training": TrainingConfig(learning_rate=5e-7, warmup_steps=150, optimizer="rmsprop"),
                **changes,
            }
        )

    def make_loss(self) -> Any:
        if not isinstance(self.loss, str):
            if self.loss_options:
                raise ValueError("loss_options belong to a loss given by name; a loss object already has its own")
            return self.loss
        return loss_from_name(self.loss, **self.loss_options)
