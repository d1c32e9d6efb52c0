"""One micro-batch: policy and reference scores, the loss's share, per-pair numbers for the metrics; KTO's baseline."""
# S sequences, P pairs, N scored rows (tokens), D hidden, V vocab, E examples

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from llmcore.methods.direct_alignment.metrics import summarize
from llmcore.methods.direct_alignment.reference import AdapterOff, CachedRef, RefModel, reference_logp
from llmcore.methods.direct_alignment.scoring import Scores, segment_sums, sequence_scores
from torch import nn

from llmcore import adapters, data
from llmcore.losses import LossOutput, wpo_weights
from llmcore.training import StepOutput


@dataclass
class PreferenceOutput:
    """What one micro-batch gives. `loss` is differentiable and is this micro-batch's share of the step's loss; the rest is detached.

    per_pair, coef_w, coef_l (P,) in input order (for unpaired losses: per example, coef_l empty); logp, ref_logp, counts (S,);
    rewards_chosen, rewards_rejected (P,); items: per-pair numbers that `summarize` turns into the logged metrics.
    """

    loss: torch.Tensor
    per_pair: torch.Tensor
    coef_w: torch.Tensor
    coef_l: torch.Tensor
    logp: torch.Tensor
    ref_logp: torch.Tensor | None
    counts: torch.Tensor
    rewards_chosen: torch.Tensor
    rewards_rejected: torch.Tensor
    items: dict[str, torch.Tensor]
    loss_object: Any

    @property
    def metrics(self) -> dict[str, float]:
        return {"loss": self.loss.item(), **summarize({k: v.double().cpu() for k, v in self.items.items()}, self.loss_object)}


@dataclass(frozen=True)
class Totals:
    """Normalisers of a whole optimiser step: pairs (or examples) and scored tokens of the chosen sequences; z0 is KTO's baseline."""

    items: int
    chosen_tokens: int
    z0: torch.Tensor | float | None = None


def preference_step(
    model: Any,
    batch: data.Batch | Mapping[str, Any],
    loss: Any,
    ref: CachedRef | RefModel | AdapterOff | None = None,
    *,
    totals: Totals | None = None,
    ld_alpha: float | None = None,
    wpo: bool = False,
    backend: str = "auto",
    mode: str = "auto",
) -> PreferenceOutput:
    """Loss and metrics of one batch; call `.loss.backward()` on the result.

    Args:
        model: the policy: a causal language model, adapted or wrapped for data parallelism (its own forward is called, so gradients
            synchronise).
        batch: a Batch, or a mapping with input_ids, attention_mask, completion_mask (B, T) or packed with cu_seqlens, and pair_index or
            desirable.
        loss: an object of llmcore.losses.
        ref: where reference scores come from; None takes batch.ref_logp, which a loss that needs a reference must then have.
        totals: normalisers when this batch is one of several in a step; by default its own.

    Returns:
        PreferenceOutput.

    Raises:
        ValueError: the loss needs a reference and there is none, scores are not finite, or batch and loss do not fit.

    Example:
        out = preference_step(model, batch, DPO(beta=0.1), ref=AdapterOff())
        out.loss.backward()
    """
    if not isinstance(batch, data.Batch):
        batch = data.Batch.from_fields(batch)
    batch = batch.to(next(adapters.unwrap(model).parameters()).device)
    if loss.unpaired != (batch.pair_index is None):
        raise ValueError(
            f"{loss.name} works on {'unpaired examples with labels' if loss.unpaired else 'pairs'}, "
            f"the batch holds {'pairs' if batch.pair_index is not None else 'single sequences'}"
        )
    if batch.pair_index is None and batch.desirable is None:
        raise ValueError("desirable (S,) is missing: an unpaired loss needs each example's label")
    # The reference runs first: switching adapters off and on must not happen between the policy's forward and backward.
    ref_logp = reference_logp(ref, model, batch, ld_alpha=ld_alpha, backend=backend) if loss.needs_reference or ref is not None else None
    if ref_logp is None and loss.needs_reference:
        raise ValueError(
            f"ref_logp is missing: {loss.name} compares with a reference; pass ref=CachedRef(...), RefModel(...) or AdapterOff()"
        )
    if totals is None:
        totals = _totals([batch])
        if loss.unpaired and getattr(loss, "uses_baseline", False):
            totals = replace(totals, z0=mismatched_baseline(model, ref, [batch], backend=backend))
    outputs = ("entropy", "is_top1", *(["log_sum_sq"] if wpo else []))
    scores = sequence_scores(model, batch, outputs=outputs, ld_alpha=ld_alpha, backend=backend, mode=mode)
    counts = scores.counts
    with torch.no_grad():
        assert scores.entropy is not None
        assert scores.is_top1 is not None
        entropy, top1 = segment_sums(scores.entropy.float(), batch.cu_seqlens), segment_sums(scores.is_top1.float(), batch.cu_seqlens)
    if batch.pair_index is None:
        return _unpaired(loss, batch, scores, ref_logp, totals, entropy)
    w, l = batch.pair_index[:, 0], batch.pair_index[:, 1]
    lw, ll, nw, nl = scores.logp[w], scores.logp[l], counts[w], counts[l]
    rw, rl = (ref_logp[w], ref_logp[l]) if ref_logp is not None else (None, None)
    weights = None
    if wpo:
        assert scores.log_sum_sq is not None
        weights = wpo_weights(scores.token_logp, scores.log_sum_sq, counts, batch.pair_index)
    # Pair terms divide by the step's pairs and token-averaged terms by its chosen tokens, so that micro-batches' shares add up to the loss.
    used = (rw, rl) if loss.needs_reference else (None, None)
    out: LossOutput = loss(lw, ll, *used, nw, nl, weights=weights, num_pairs=totals.items, num_tokens=totals.chosen_tokens)
    chosen = out.rewards_chosen if rw is None else loss.reward_scale * (lw - rw).detach()
    rejected = out.rewards_rejected if rl is None else loss.reward_scale * (ll - rl).detach()
    items = {
        "per_pair": out.per_pair,
        "reward_w": chosen,
        "reward_l": rejected,
        "lw": lw,
        "ll": ll,
        "nw": nw,
        "nl": nl,
        "coef": out.coef_w,
        "entropy_w": entropy[w],
        "entropy_l": entropy[l],
        "top1_w": top1[w],
        "clamped": out.clamped / max(1, len(w)) + torch.zeros_like(lw),
    }
    if rw is not None and rl is not None:
        items |= {"rho_w": lw - rw, "rho_l": ll - rl}
    return PreferenceOutput(
        out.loss,
        out.per_pair.detach(),
        out.coef_w,
        out.coef_l,
        scores.logp.detach(),
        ref_logp,
        counts,
        chosen,
        rejected,
        {k: v.detach() for k, v in items.items()},
        loss,
    )


def _unpaired(
    loss: Any, batch: data.Batch, scores: Scores, ref_logp: torch.Tensor | None, totals: Totals, entropy: torch.Tensor
) -> PreferenceOutput:
    assert ref_logp is not None
    assert batch.desirable is not None
    good, bad = batch.desirable.nonzero()[:, 0], (~batch.desirable).nonzero()[:, 0]
    order = torch.cat([good, bad]).argsort()
    logp = scores.logp
    z0 = 0.0 if totals.z0 is None else totals.z0
    out = loss(logp[good], logp[bad], ref_logp[good], ref_logp[bad], num_pairs=totals.items, z0=z0)
    coef = torch.cat([out.coef_w, out.coef_l])[order]
    reward = loss.reward_scale * (logp - ref_logp).detach()
    items = {
        "per_pair": out.per_pair[order],
        "reward": reward,
        "logp": logp,
        "n": scores.counts,
        "desirable": batch.desirable.float(),
        "coef": coef,
        "entropy": entropy,
        "rho": logp - ref_logp,
        "z0": torch.as_tensor(z0, dtype=logp.dtype, device=logp.device).expand_as(logp),
    }
    return PreferenceOutput(
        out.loss,
        out.per_pair.detach()[order],
        coef,
        coef[:0],
        logp.detach(),
        ref_logp,
        scores.counts,
        reward[good],
        reward[bad],
        {k: v.detach() for k, v in items.items()},
        loss,
    )


def _totals(batches: Sequence[data.Batch]) -> Totals:
    tokens = sum(int(b.counts[b.pair_index[:, 0]].sum()) if b.pair_index is not None else int(b.counts.sum()) for b in batches)
    return Totals(max(1, sum(b.num_items for b in batches)), tokens)


def mismatched(batches: Sequence[data.Batch]) -> list[data.Tokens]:
    """Prompt j followed by completion j + 1 (cyclic) over the examples of a step: what KTO's baseline is measured on."""
    sequences = [s for batch in batches for s in batch.sequences]
    return [
        data.Tokens(torch.cat([torch.from_numpy(s.ids[: s.start]), torch.from_numpy(t.ids[t.start :])]).numpy(), s.start)
        for s, t in zip(sequences, sequences[1:] + sequences[:1], strict=True)
    ]


def mismatched_baseline(
    model: Any,
    ref: Any,
    batches: Sequence[data.Batch],
    *,
    local: Sequence[tuple[int, float]] | None = None,
    reduce: Callable[[torch.Tensor], torch.Tensor] | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """KTO's z0 = max(0, mean over the step of log policy − log reference of mismatched completions): one scoring pass each, no gradient.

    Sum and count are added over ranks before the clamp. With fewer than two examples there is nothing to mismatch and z0 = 0.
    """
    device = next(adapters.unwrap(model).parameters()).device
    sequences = mismatched(batches)
    if len(sequences) < 2:
        warnings.warn("KTO's baseline needs two examples in a step; it is 0 here", stacklevel=2)
        return torch.zeros((), device=device)
    if ref is None or isinstance(ref, CachedRef):
        raise ValueError(
            "KTO scores mismatched completions under the reference, which cached scores do not cover; use reference 'adapter' or 'model', "
            "or the loss apo_zero_unpaired, whose baseline is 0"
        )
    first = batches[0]
    sizes = [len(b.sequences) for b in batches]
    total = torch.zeros(2, dtype=torch.float64, device=device)
    with torch.no_grad():
        for k, weight in local if local is not None else [(k, 1.0) for k in range(len(batches))]:
            begin = sum(sizes[:k])
            part = data.collate(
                sequences[begin : begin + sizes[k]], desirable=[True] * sizes[k], layout=first.layout, isolate=first.isolate
            ).to(device)
            ratio = sequence_scores(model, part, backend=backend).logp.double() - _z0_reference(ref, model, part, backend).double()
            total += weight * torch.stack([ratio.sum(), torch.tensor(float(sizes[k]), dtype=torch.float64, device=device)])
    if reduce is not None:
        total = reduce(total)
    return (total[0] / total[1].clamp(min=1)).clamp(min=0).float()


def _z0_reference(ref: Any, model: Any, batch: data.Batch, backend: str) -> torch.Tensor:
    scores = reference_logp(ref, model, batch, backend=backend)
    assert scores is not None
    return scores


class PreferenceStep:
    """The step of llmcore.training.train for a preference loss."""

    def __init__(
        self,
        loss: Any,
        ref: CachedRef | RefModel | AdapterOff | None,
        *,
        ld_alpha: float | None = None,
        wpo: bool = False,
        backend: str = "auto",
        mode: str = "auto",
    ) -> None:
        self.loss, self.ref, self.ld_alpha, self.wpo, self.backend, self.mode = loss, ref, ld_alpha, wpo, backend, mode

    def prepare(
        self,
        model: nn.Module,
        local: Sequence[tuple[int, float]],
        everything: Sequence[data.Batch],
        reduce: Callable[[torch.Tensor], torch.Tensor],
    ) -> Totals:
        totals = _totals(everything)
        if self.loss.unpaired and getattr(self.loss, "uses_baseline", False):
            totals = replace(totals, z0=mismatched_baseline(model, self.ref, everything, local=local, reduce=reduce, backend=self.backend))
        return totals

    def __call__(self, model: nn.Module, batch: data.Batch, context: Totals | None) -> StepOutput:
        out = preference_step(
            model, batch, self.loss, self.ref, totals=context, ld_alpha=self.ld_alpha, wpo=self.wpo, backend=self.backend, mode=self.mode
        )
        return StepOutput(out.loss, out.items)

    def summarize(self, items: Mapping[str, torch.Tensor]) -> dict[str, float]:
        return summarize(items, self.loss)
