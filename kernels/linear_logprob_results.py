"""What the fused linear log-probability returns, and the counters that its backward fills in later."""

from __future__ import annotations

import dataclasses
import itertools
import weakref

from torch import Tensor

OUTPUTS = ("logp", "lse", "entropy", "target_logit", "mean_logit", "is_top1", "log_sum_sq", "kl_full")
DIFFERENTIABLE = ("logp", "lse", "entropy", "target_logit", "kl_full")
@dataclasses.dataclass
class Stats:
    """What a call did; the backward adds its share when it runs. Fields that need the data are None under torch.compile.

    rows_scored / rows_total: labels scored, labels given. rows_backward: rows that had a gradient. mode: "score" (no gradient asked for),
    "recompute", "resident", or "mixed" (the budget held some rows). scratch_bytes: what the call kept for backward plus the upper
    bound of its temporaries.
    gemm_units: multiples of 2·N·D·V FLOP executed so far. kept_tile_fraction, dropped_mass: of grad_filter (1 and 0 when off;
    dropped_mass is the largest probability any row lost). backend: what served.
    """

    rows_scored: int | None
    rows_total: int
    mode: str
    scratch_bytes: int
    backend: str
    gemm_units: float = 0.0
    rows_backward: int | None = None
    kept_tile_fraction: float = 1.0
    dropped_mass: float = 0.0


@dataclasses.dataclass
class LinearLogprob:
    """Per-label results, shaped like `labels`, float32 (float64 for float64 inputs), 0 (False) at labels that are not scored; None
    when not requested."""

    logp: Tensor | None
    lse: Tensor | None
    entropy: Tensor | None
    target_logit: Tensor | None
    mean_logit: Tensor | None
    is_top1: Tensor | None
    log_sum_sq: Tensor | None
    kl_full: Tensor | None
    stats: Stats
    _kept: tuple[Tensor, ...] = ()  # logits kept for the backward

    def release(self) -> None:
        """Give the kept logits back to the system now: for a caller who knows that no row will have a gradient. A backward that finds one
        recomputes."""
        for logits in self._kept:
            logits.untyped_storage().resize_(0)


_live_stats: weakref.WeakValueDictionary[int, Stats] = weakref.WeakValueDictionary()
_stats_ids = itertools.count(1)  # 0 stands for "nobody listens"
