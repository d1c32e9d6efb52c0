"""Choose the threshold on benign prompts, with a positive control against a phrase list that does not match the model."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from llmcore.methods.gradient_cuff import statistic
from llmcore.methods.gradient_cuff.config import Calibration, CuffConfig, fingerprint
from llmcore.methods.gradient_cuff.detector import Detector
from llmcore.methods.gradient_cuff.judge import score
from llmcore.methods.gradient_cuff.prompt import Messages
from llmcore.methods.gradient_cuff.query import Query


def calibrate(
    model: Any, benign: Sequence[Messages], config: CuffConfig | None = None, *, sigma: float = 0.05, method: str = "plugin",
    must_refuse: Sequence[Messages] | None = None, on_done: Callable[[Query], None] | None = None,
) -> Calibration:  # fmt: skip
    """A threshold that turns away a share sigma of benign prompts.

    Args:
        benign: prompts of the traffic to be served; at least a few hundred for a narrow interval. method: see `threshold_from_scores`.
        must_refuse: prompts that the model plainly refuses. If fewer than half of them are refused by most samples, the refusal rule
        does not
            match this model, every norm would be 0 and everything would be accepted: ValueError. Without the list that can only be
            warned of.
    """
    config = dataclasses.replace(config or CuffConfig(), early_exit=False)  # censored norms calibrate nothing
    if isinstance(benign, str) or len(benign) == 0:
        raise ValueError("benign must be a non-empty sequence of prompts: a threshold needs benign prompts")
    if not 0 < sigma < 1:
        raise ValueError(f"sigma must lie in (0, 1), got {sigma!r}")
    control = None
    notes: list[str] = []
    if must_refuse:
        base = dataclasses.replace(config, num_directions=0, debias=False, kind="gaussian")
        limit = statistic.stage1_limit(config.num_samples, 0.5)
        scores = score(model, must_refuse, base, query_ids=[2**40 + i for i in range(len(must_refuse))])
        control = sum(s.counts[0] >= limit for s in scores if s.counts) / len(scores)
        if control < 0.5:
            raise ValueError(
                f"must_refuse must be refused: only {control:.0%} of these {len(scores)} prompts reached a refusal count above "
                f"N/2. The refusal "
                "phrases do not match what this model says; print its answers and extend the list (RefusalMatcher, or refusal='extended')"
            )
    else:
        notes.append("no positive control")
        warnings.warn(
            "must_refuse was not given: if the model's refusals do not match the phrase list, every norm is 0 and everything is accepted",
            stacklevel=2,
        )
    detector = Detector(model, config, stage2="after_stage1")
    scores = [query.score for query in detector.run(benign, None, on_done)]  # type: ignore[misc]
    limit = detector.stage1_limit
    if config.num_directions:
        norms = [s.norm for s in scores if s.norm is not None]
    else:
        norms = [0.0 for s in scores if s.count_low[0] < limit]
        notes.append("no directions: stage 1 only")
    result = statistic.threshold_from_scores(norms, len(scores) - len(norms), sigma, method=method)
    return Calibration(
        threshold=result.value, feasible=result.feasible, sigma=sigma, method=method, n=result.n, stage1_rejected=len(scores) - len(norms),
        rejected=result.rejected, rate=result.rejected / result.n, interval=result.interval, distinct_norms=len(set(norms)),
        zero_share=sum(norm == 0 for norm in norms) / len(norms) if norms else math.nan, norms=tuple(norms),
        fingerprint=fingerprint(model, config), positive_control=control, notes=tuple(notes),
    )  # fmt: skip
