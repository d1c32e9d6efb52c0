"""Preference losses straight from hidden states and the output projection: DPO, IPO, KTO, ORPO, ... without the logit matrix.

    L_s = Σ_t logp_t over the scored tokens of sequence s        loss = mean over pairs of f(L_w, L_l, R_w, R_l, n_w, n_l)
    d loss / d z_tv = c_s (1[v = y_t] - p_tv),   c_s = Σ over the pairs of s of d loss / d L_s

The gradient of every logit of a sequence is one scalar times a softmax residual, so only two scalars a pair cross from forward to backward.
Not materialised: logits, softmax and their gradients, N × V each (for 8 pairs of 512 tokens and V = 128256, 1.05 GB apiece in bfloat16).

Bound by arithmetic, U = 2 N D V FLOP with N the scored rows: score only 1 U; frozen head 2 U (row t keeps its direction
w_y - Σ_v p_tv w_v and the backward scales it by c_s); trainable head 3 U when logits are kept ("resident"), 4 U when recomputed. Reference:
1 U, or cached scores. When the kept logits of the whole batch exceed the memory budget, the resident schedule walks over blocks of whole
pairs: forward of both members, c from their two sums, backward from the kept tile, next block; still 3 U, whatever the batch size. A pair
that alone exceeds the budget keeps what fits and recomputes the rest. A pair whose coefficients are 0 (hinge beyond its margin) costs no
backward.

`loss` is any object of llmcore.losses; this module knows none of them and holds no loss formula.
"""

# N scored rows (tokens), V vocabulary, D hidden, S sequences, P pairs

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from llmcore.kernels import backends
from llmcore.kernels.linear_logprob import AUTO_BUDGET, Stats, fused_linear_logprob, linear_logprob_reference
from llmcore.kernels.linear_logprob_core import ARGMAX, ENTROPY, SUM_SQ, VOCAB_BLOCK
from llmcore.kernels.linear_logprob_inputs import _check, _ref_head
from llmcore.kernels.linear_logprob_ops import _implementation
from llmcore.kernels.preference_blocks import _merge_outputs, _Objective, _pair_blocks, _wpo
from llmcore.kernels.preference_layout import (
    _check_pairs,
    _check_reference,
    _common_prefix,
    _default_pairs,
    _Layout,
    _layout,
    _ld_weights,
    _share_prefixes,
)
from torch import Tensor

METRICS = ("entropy", "token_accuracy", "kl")


@dataclasses.dataclass
class PreferenceResult:
    """`loss` () is differentiable in hidden_states, weight and bias; everything else is detached, float32 (float64 for float64).

    per_pair, chosen_logp, rejected_logp, rewards_chosen, rewards_rejected, margins (P,) in the order of pair_index; for unpaired losses
    per_pair has one entry per sequence and chosen/rejected hold the desirable/undesirable ones. ref_*_logp (P,) or None.
    coef_w, coef_l (P,): the loss's coefficients. counts (S,) scored tokens, logp (S,) sequence sums. accuracy (), ties (): share of pairs
    with
    r_w > r_l, ties counted half, and share of ties. entropy () token mean, token_accuracy () of the chosen, kl (S,) Σ_t KL(π_t || ref_t)
    over
    the vocabulary: when asked for, else None. identical: pairs whose two completions are the same ids. dropped: pairs removed as empty.
    clamped: pairs whose exponent was clamped. stats: rows, mode, GEMM units (see linear_logprob.Stats).
    """

    loss: Tensor
    per_pair: Tensor
    chosen_logp: Tensor
    rejected_logp: Tensor
    ref_chosen_logp: Tensor | None
    ref_rejected_logp: Tensor | None
    counts: Tensor
    chosen_counts: Tensor
    rejected_counts: Tensor
    logp: Tensor
    rewards_chosen: Tensor
    rewards_rejected: Tensor
    margins: Tensor
    accuracy: Tensor
    ties: Tensor
    coef_w: Tensor
    coef_l: Tensor
    entropy: Tensor | None
    token_accuracy: Tensor | None
    kl: Tensor | None
    identical: Tensor
    dropped: int
    clamped: Tensor
    name: str
    coefficient_bound: float | None
    stats: Stats

    @property
    def rewards(self) -> tuple[Tensor, Tensor]:
        return self.rewards_chosen, self.rewards_rejected

    def metrics(self, *, process_group: Any = None) -> dict[str, float]:
        """One flat dictionary for a logger; with `process_group` the means run over all its ranks, weighted by pairs and tokens.

        rewards/* use summed log-probabilities; logps/* are means of sequence sums and logps_mean/* are per token; rewards/accuracies
        counts a tie
        as one half; grad_coef/active is the share of pairs whose |coefficient| exceeds 1 % of its bound (of the batch maximum when the
        loss has
        none); likelihood/chosen_drop = mean(L_w - R_w), negative when the chosen completions became less likely than under the reference.
        Everything comes from the forward pass already done.
        """
        size = self.coef_w.abs()
        bound = self.coefficient_bound if self.coefficient_bound is not None else size.max() if size.numel() else 1.0
        correct = (self.margins > 0).double() + 0.5 * (self.margins == 0).double()
        means = {  # name -> (sum, count)
            "loss": (self.loss.detach() * self.per_pair.numel(), self.per_pair.numel()),
            "per_pair_loss": (self.per_pair.sum(), self.per_pair.numel()),
            "rewards/chosen": (self.rewards_chosen.sum(), self.rewards_chosen.numel()),
            "rewards/rejected": (self.rewards_rejected.sum(), self.rewards_rejected.numel()),
            "rewards/accuracies": (correct.sum(), correct.numel()),
            "rewards/ties": ((self.margins == 0).sum(), self.margins.numel()),
            "logps/chosen": (self.chosen_logp.sum(), self.chosen_logp.numel()),
            "logps/rejected": (self.rejected_logp.sum(), self.rejected_logp.numel()),
            "logps_mean/chosen": (self.chosen_logp.sum(), self.chosen_counts.sum()),
            "logps_mean/rejected": (self.rejected_logp.sum(), self.rejected_counts.sum()),
            "grad_coef/mean": (size.sum(), size.numel()),
            "grad_coef/active": ((size > 0.01 * bound).sum(), size.numel()),
        }
        if self.ref_chosen_logp is not None and self.ref_rejected_logp is not None:
            drop, other = self.chosen_logp - self.ref_chosen_logp, self.rejected_logp - self.ref_rejected_logp
            means["likelihood/chosen_drop"] = means["logratio/chosen"] = (drop.sum(), drop.numel())
            means["logratio/rejected"] = (other.sum(), other.numel())
        if self.entropy is not None:
            means["entropy"] = (self.entropy * self.counts.sum(), self.counts.sum())
        if self.token_accuracy is not None:
            means["mean_token_accuracy"] = (self.token_accuracy * self.chosen_counts.sum(), self.chosen_counts.sum())
        if self.kl is not None:
            means["kl/dataset_prefixes"] = (self.kl.sum(), self.kl.numel())
        totals = {
            "counts/pairs": self.per_pair.numel(),
            "counts/chosen_tokens": self.chosen_counts.sum(),
            "counts/rejected_tokens": self.rejected_counts.sum(),
            "counts/identical": self.identical,
            "counts/dropped": self.dropped,
            "counts/clamped": self.clamped,
        }
        device = self.loss.device
        flat = torch.stack(
            [torch.as_tensor(x, device=device).double() for pair in means.values() for x in pair]
            + [torch.as_tensor(x, device=device).double() for x in totals.values()]
        )
        if process_group is not None:
            torch.distributed.all_reduce(flat, group=process_group)
        values = flat.tolist()
        out = {name: values[2 * i] / values[2 * i + 1] if values[2 * i + 1] else 0.0 for i, name in enumerate(means)}
        out["rewards/margins"] = out["rewards/chosen"] - out["rewards/rejected"]
        return out | dict(zip(totals, values[2 * len(means) :], strict=True))


# ---- reference -------------------------------------------------------------------------------------------------------------------------


def preference_loss_reference(
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    loss: Any,
    ref_logp: Tensor | None = None,
    pair_index: Tensor | None = None,
    **head: Any,
) -> Tensor:
    """The loss of (S, T) labels with full logits: `linear_logprob_reference`, a sum per row, the loss object. `head`: bias, shift, ..."""
    loss = _as_one_loss(loss)
    logp = linear_logprob_reference(hidden_states, weight, labels, **head).logp
    assert logp is not None
    shift, ignore_index = head.get("shift", 0), head.get("ignore_index", -100)
    scored = (labels != ignore_index) & (torch.arange(labels.shape[1], device=labels.device) >= shift)
    sums, counts = logp.sum(dim=1), scored.sum(dim=1)
    pairs = _default_pairs(len(labels), labels.device) if pair_index is None else pair_index
    chosen, rejected = pairs[:, 0], pairs[:, 1]
    ref = (None, None) if ref_logp is None else (ref_logp[chosen], ref_logp[rejected])
    return loss(sums[chosen], sums[rejected], *ref, counts[chosen], counts[rejected]).loss


def _as_one_loss(loss: Any) -> Any:
    if isinstance(loss, Sequence) and not isinstance(loss, str):
        first = loss[0][0] if len(loss) and isinstance(loss[0], Sequence) and len(loss[0]) == 2 else None
        if first is None or not hasattr(first, "combined"):
            raise TypeError(f"loss must be a loss object or a list of (loss, weight), got {loss!r}")
        return first.combined(loss)
    if not callable(loss) or not hasattr(loss, "needs_reference"):
        raise TypeError(f"loss must be a loss object of llmcore.losses such as DPO(beta=0.1), got {loss!r}")
    return loss


# ---- public function -------------------------------------------------------------------------------------------------------------------


def fused_preference_loss(
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    loss: Any,
    bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ref_logp: Tensor | None = None,
    ref: tuple[Tensor, ...] | None = None,
    pair_index: Tensor | None = None,
    desirable: Tensor | None = None,
    z0: Tensor | float = 0.0,
    weights: Tensor | None = None,
    wpo: bool = False,
    ld_alpha: float | None = None,
    shared_prefix: bool = False,
    on_empty: str = "error",
    num_pairs: int | None = None,
    num_tokens: int | Tensor | None = None,
    outputs: tuple[str, ...] = (),
    ignore_index: int = -100,
    label_mask: Tensor | None = None,
    shift: int = 0,
    logit_scale: float | None = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    mode: str = "auto",
    memory_budget: int | None = None,
    grad_filter: float | None = None,
    accumulate_into: Tensor | None = None,
    process_group: Any = None,
    vocab_range: tuple[int, int] | None = None,
    backend: str = "auto",
) -> PreferenceResult:
    """Preference loss of a batch of completions from hidden states and the output projection.

    Args:
        hidden_states: (S, T, hidden_size), or packed (num_tokens, hidden_size) with cu_seqlens. weight: (vocab_size, hidden_size).
        labels: (S, T) or (num_tokens,) int64; ignore_index (or label_mask False) marks prompt and padding. shift=0: row t predicts label t;
            shift=1: unshifted labels, row t predicts label t + 1 of the same sequence.
        loss: a loss of llmcore.losses, or a list of (loss, weight) such as [(DPO(beta=0.1), 0.8), (SFT(), 1.0)].
        ref_logp: (S,) summed log-probability of each sequence under the reference, finite (with the same ld_alpha and partner, if any).
        ref: (hidden_states, weight[, bias]) of the reference, scored here without gradient; instead of ref_logp.
        pair_index: (P, 2) int64 sequences of each pair (chosen, rejected); a sequence may be in several pairs. Default: first half chosen,
            second half rejected.
        desirable: (S,) bool, for unpaired losses (KTO) instead of pairs. z0: their detached baseline.
        weights: (P,) detached factor on each pair's loss. wpo: compute the factor of weighted preference optimisation instead.
        ld_alpha: weight in [0, 1] of the tokens beyond the shorter completion of a pair (LD-DPO).
        shared_prefix: True asserts that both completions of a pair follow the same prompt in the same way, so that the hidden rows of their
            common prefix are the same function of the model: those rows (verified equal bit for bit) are scored once, and leave the
            backward when the loss depends on the margin alone. The gradient of the second copy's rows is then carried by the first.
        on_empty: a sequence without scored tokens is an "error"; "zero" lets it count as log-probability 0; "drop" removes its pairs.
        num_pairs, num_tokens: normalisers of the whole batch when this call is a part of it (gradient accumulation, ranks).
        outputs: extra detached results: "entropy", "token_accuracy", "kl" (needs ref and two more GEMM units).
        bias, ignore_index, logit_scale, softcap, temperature, grad_filter, accumulate_into, process_group, vocab_range, backend: as in
            `fused_linear_logprob`.
        mode: "recompute" keeps nothing (4 GEMM units), "resident" keeps logits within memory_budget (3 units), "auto" is resident within
            memory_budget, or 1 GiB. Batches beyond the budget go in blocks of whole pairs, whose loss can be differentiated once.

    Returns:
        PreferenceResult; `.metrics()` gives the logger's dictionary.

    Raises:
        ValueError / TypeError: naming the argument, an empty completion's sequence among them.

    Peak extra memory: that of `fused_linear_logprob`; blocks of pairs add vocab_size · hidden_size · 4 bytes for 16-bit weights (the
    float32
        accumulator of the weight's gradient).

        >>> from llmcore.losses import DPO
        >>> h, w, y = torch.randn(4, 9, 32), torch.randn(100, 32), torch.randint(100, (4, 9))
        >>> result = fused_preference_loss(h.requires_grad_(), w, y, loss=DPO(beta=0.1), ref_logp=torch.full((4,), -60.0), shift=1)
        >>> result.loss.backward()
        >>> result.chosen_logp.shape, result.metrics()["counts/pairs"]
        (torch.Size([2]), 2.0)
    """
    loss = _as_one_loss(loss)
    _check(hidden_states, weight, labels, bias, label_mask, cu_seqlens, shift, softcap, temperature, logit_scale)
    if isinstance(outputs, str) or set(outputs) - set(METRICS):
        raise ValueError(f"outputs must be a tuple of names among {METRICS}, got {outputs!r}")
    if mode not in ("auto", "recompute", "resident"):
        raise ValueError(f"mode must be 'auto', 'recompute' or 'resident', got {mode!r}")
    if on_empty not in ("error", "zero", "drop"):
        raise ValueError(f"on_empty must be 'error', 'zero' or 'drop', got {on_empty!r}")
    if ref is not None and ref_logp is not None:
        raise ValueError("ref and ref_logp are two ways to give the reference; pass one of them")
    if "kl" in outputs and ref is None:
        raise ValueError("outputs=('kl',) needs ref=(hidden_states, weight[, bias]); cached ref_logp does not hold the distribution")
    if loss.needs_reference and ref is None and ref_logp is None:
        raise ValueError(
            f"ref_logp is missing: {loss.name} compares the policy with a reference; pass ref_logp (S,) or ref=(hidden_states, weight)"
        )
    if getattr(loss, "nll_over", "completion") == "all":
        raise ValueError(
            f"loss {loss.name} with nll_over='all' averages over prompt tokens, which labels mark as unscored here; "
            "use nll_over='completion', or fused_linear_logprob and the loss object"
        )
    if loss.unpaired != (desirable is not None):
        raise ValueError(f"desirable (S,) bool must be given for unpaired losses and only for them; the loss is {loss.name}")
    if desirable is not None and (weights is not None or wpo or ld_alpha is not None or shared_prefix or pair_index is not None):
        raise ValueError(f"weights, wpo, ld_alpha, shared_prefix and pair_index are defined for pairs, not for {loss.name}")
    if weights is not None and wpo:
        raise ValueError("weights and wpo both scale the pairs' losses; pass one of them")
    if ld_alpha is not None and not 0.0 <= ld_alpha <= 1.0:
        raise ValueError(f"ld_alpha must be in [0, 1], got {ld_alpha!r}")
    eager = not torch.compiler.is_compiling()
    if shared_prefix and not eager:
        raise RuntimeError("shared_prefix depends on the data, which torch.compile cannot express; call it outside the compiled region")

    layout = _layout(labels, label_mask, cu_seqlens, ignore_index, shift)
    device, num_sequences = labels.device, layout.num_sequences
    pairs, dropped, identical = None, 0, torch.zeros((), dtype=torch.int64, device=device)
    if desirable is None:
        pairs = _default_pairs(num_sequences, device) if pair_index is None else _check_pairs(pair_index, num_sequences, device)
        if weights is not None and weights.shape != (len(pairs),):
            raise ValueError(f"weights must be ({len(pairs)},), one factor per pair, got {tuple(weights.shape)}")
    elif desirable.dtype != torch.bool or desirable.shape != (num_sequences,):
        raise ValueError(f"desirable must be bool ({num_sequences},), got {desirable.dtype} {tuple(desirable.shape)}")
    if on_empty == "error" and eager and device.type == "cpu" and num_sequences and bool((layout.counts == 0).any()):
        used = layout.counts == 0
        if pairs is not None:
            used &= torch.zeros_like(used).index_fill_(0, pairs.reshape(-1), True)
        if bool(used.any()) and int(layout.counts.sum()):
            raise ValueError(
                f"labels of sequence {int(used.nonzero()[0, 0])} have no scored token (an empty completion, or one cut off by truncation);"
                " remove the example, or pass on_empty='zero' or 'drop'"
            )
    if on_empty == "drop":
        if pairs is None:
            raise ValueError("on_empty='drop' removes pairs; filter the examples of an unpaired loss beforehand")
        keep = (layout.counts[pairs] > 0).all(dim=1)
        dropped = int((~keep).sum())
        pairs = pairs[keep]
        weights = None if weights is None else weights[keep]
        in_use = torch.zeros(num_sequences, dtype=torch.bool, device=device).index_fill_(0, pairs.reshape(-1), True)
        layout.scored = layout.scored & (in_use[layout.sequence_of()]).view(labels.shape)
        layout.counts = torch.where(in_use, layout.counts, 0)
    if pairs is not None and eager:
        length = _common_prefix(hidden_states, labels, layout, pairs, shift, check_hidden=False)
        both = layout.counts[pairs]
        identical = ((length == both[:, 0]) & (length == both[:, 1]) & (length > 0)).sum()
        if device.type == "cpu" and int(identical):
            warnings.warn(
                f"{int(identical)} of {len(pairs)} pairs have identical chosen and rejected completions; they teach nothing", stacklevel=2
            )
    if ld_alpha is not None:
        assert pairs is not None
        layout.token_weight = _ld_weights(layout, pairs, ld_alpha)
    if shared_prefix:
        assert pairs is not None
        _share_prefixes(hidden_states, labels, layout, pairs, shift)

    head = {
        "shift": shift,
        "cu_seqlens": cu_seqlens,
        "logit_scale": logit_scale,
        "softcap": softcap,
        "temperature": temperature,
        "process_group": process_group,
        "vocab_range": vocab_range,
        "backend": backend,
        "label_mask": layout.scored,
    }
    asked = ["logp"] + ["entropy"] * ("entropy" in outputs) + ["is_top1"] * ("token_accuracy" in outputs) + ["log_sum_sq"] * wpo
    objective = _Objective(loss, pairs, desirable, z0, weights, num_pairs, num_tokens)

    # The reference, unless its rows can ride in the policy's launch.
    grad_on = torch.is_grad_enabled()
    need_weight, need_any = (
        grad_on and weight.requires_grad,
        grad_on and any(t is not None and t.requires_grad for t in (hidden_states, weight, bias)),
    )
    ref_sums = None if ref_logp is None else _check_reference(ref_logp, num_sequences, device)
    ref_stats, together = None, False
    if ref is not None:
        ref_hidden, ref_weight, ref_bias = _ref_head(ref)
        _check(ref_hidden, ref_weight, labels, ref_bias, label_mask, cu_seqlens, shift, softcap, temperature, logit_scale)
        same_bias = (bias is None and ref_bias is None) or (
            bias is not None and ref_bias is not None and bias.data_ptr() == ref_bias.data_ptr()
        )
        # A frozen head keeps the direction of every row it scores with gradient: reference rows in that launch would cost 2 units, not 1.
        together = (
            eager
            and same_bias
            and weight.data_ptr() == ref_weight.data_ptr()
            and ref_hidden.dtype == hidden_states.dtype
            and cu_seqlens is None
            and (need_weight or not need_any)
            and layout.extra_rows is None
        )
        if not together:
            with torch.no_grad():
                scored_ref = fused_linear_logprob(ref_hidden, ref_weight, labels, bias=ref_bias, mode="recompute", **head)
            ref_stats = scored_ref.stats
            ref_sums = layout.sums(scored_ref.logp)

    blocks = _blocks_capacity(
        hidden_states,
        weight,
        layout,
        loss,
        mode,
        memory_budget,
        backend,
        eager
        and need_weight
        and not together
        and process_group is None
        and vocab_range is None
        and grad_filter is None
        and accumulate_into is None,
    )
    found: dict[str, Tensor | None] = {}
    if blocks is not None:
        capacity, served_by, scratch = blocks
        want = ENTROPY * ("entropy" in outputs) | ARGMAX * ("token_accuracy" in outputs) | SUM_SQ * wpo
        stats = Stats(int(layout.scored.sum()), labels.numel(), "resident", scratch, served_by)
        total_tokens = num_tokens
        if total_tokens is None and pairs is not None:
            total_tokens = layout.counts[pairs[:, 0]].sum()
        whole = dataclasses.replace(
            objective,
            num_tokens=total_tokens,
            num_pairs=num_pairs if num_pairs is not None else len(pairs) if pairs is not None else num_sequences,
        )
        value, parts, sums, extras = _pair_blocks(
            hidden_states,
            weight,
            bias,
            labels,
            layout,
            whole,
            ref_sums,
            shift=shift,
            logit_scale=1.0 if logit_scale is None else float(logit_scale),
            softcap=0.0 if softcap is None else float(softcap),
            temperature=float(temperature),
            want=want,
            wpo=wpo,
            capacity=capacity,
            backend=served_by,
            stats=stats,
        )
        found = {"entropy": extras.get(ENTROPY), "is_top1": extras.get(ARGMAX)}
        out = _merge_outputs(parts, value, loss)
    else:
        rows, row_labels, joint = hidden_states, labels, dict(head)
        if together:
            rows, row_labels = torch.cat([hidden_states, ref_hidden.detach()]), torch.cat([labels, labels])
            joint["label_mask"] = torch.cat([layout.scored, layout.scored])
        scores = fused_linear_logprob(
            rows,
            weight,
            row_labels,
            bias=bias,
            outputs=tuple(asked),
            mode=mode,
            memory_budget=memory_budget,
            grad_filter=grad_filter,
            accumulate_into=accumulate_into,
            detach=("entropy",),
            **joint,
        )
        stats = scores.stats
        size = len(labels)
        logp, entropy, top1, log_sum_sq = (
            None if t is None else t[:size] if together else t for t in (scores.logp, scores.entropy, scores.is_top1, scores.log_sum_sq)
        )
        assert logp is not None
        if together:
            assert scores.logp is not None
            ref_sums = layout.sums(scores.logp[size:].detach())
        sums = layout.sums(logp)
        found = {"entropy": entropy, "is_top1": top1}
        if wpo:
            assert log_sum_sq is not None
            assert pairs is not None
            objective.weights = _wpo(layout, logp, log_sum_sq, pairs)
        out = objective(sums, ref_sums, layout.counts)
        value = out.loss
        sums = sums.detach()
        # Kept logits that nothing will read go before the backward of the model. A kernel of a GPU does not ask: the host would wait.
        may_ask = eager and device.type == "cpu" and stats.backend != "triton"
        if may_ask and not bool(out.grad_w.any()) and not bool(out.grad_l.any()):
            scores.release()
    if ref_stats is not None:
        stats.gemm_units += ref_stats.gemm_units
    value = value * (layout.counts.sum() > 0)  # a rank without a scored row has loss 0, still connected to the graph

    kl = None
    if "kl" in outputs:
        with torch.no_grad():
            kl_rows = fused_linear_logprob(
                hidden_states,
                weight,
                labels,
                bias=bias,
                outputs=("kl_full",),
                ref=ref,
                mode="recompute",
                **{k: v for k, v in head.items() if k not in ("process_group", "vocab_range")},
            ).kl_full
        assert kl_rows is not None
        kl = layout.sums(kl_rows.detach(), weighted=False)
    return _result(value, out, layout, objective, sums, ref_sums, found, kl, identical, dropped, loss, stats)


def _blocks_capacity(
    hidden: Tensor, weight: Tensor, layout: _Layout, loss: Any, mode: str, memory_budget: int | None, backend: str, possible: bool
) -> tuple[int, str, int] | None:
    """(resident rows a block may keep, backend, bytes kept and scratch) when the pair-block schedule is the one to take, else None."""
    limit = memory_budget if memory_budget is not None else AUTO_BUDGET if mode == "auto" else None
    if not possible or mode == "recompute" or loss.batch_level or limit is None:
        return None
    refused = {"triton": "it has no float64 path"} if hidden.dtype == torch.float64 else {}
    served_by = backends.choose("linear_logprob", backend, hidden.device, refused)
    if served_by == "reference":
        return None
    num_rows = int(layout.scored.sum())
    half = hidden.dtype.itemsize == 2 and weight.dtype.itemsize == 2
    row_bytes = len(weight) * (2 if half else 8 if hidden.dtype == torch.float64 else 4) + (
        4 * -(-len(weight) // VOCAB_BLOCK) if half else 0
    )
    scratch = _implementation(served_by).scratch_bytes(num_rows, hidden.shape[-1], len(weight), half)
    capacity = max(0, limit - scratch) // row_bytes
    if capacity == 0 or capacity >= num_rows:
        return None
    return capacity, served_by, scratch + capacity * row_bytes


def _result(
    value: Tensor,
    out: Any,
    layout: _Layout,
    objective: _Objective,
    sums: Tensor,
    ref: Tensor | None,
    found: dict[str, Tensor | None],
    kl: Tensor | None,
    identical: Tensor,
    dropped: int,
    loss: Any,
    stats: Stats,
) -> PreferenceResult:
    counts = layout.counts
    if objective.desirable is not None:
        chosen, rejected = objective.desirable.nonzero()[:, 0], (~objective.desirable).nonzero()[:, 0]
        full = objective(sums, ref, counts)  # O(S): per-example values in one piece whatever the schedule was
        per_pair = torch.empty_like(full.per_pair)
        per_pair[torch.cat([chosen, rejected])] = full.per_pair
        out = dataclasses.replace(full, per_pair=per_pair)
        baseline = loss.reward_scale * objective.z0 if getattr(loss, "uses_baseline", False) else 0.0
        margins = torch.cat([out.rewards_chosen - baseline, baseline - out.rewards_rejected])
    else:
        assert objective.pairs is not None
        chosen, rejected = objective.pairs[:, 0], objective.pairs[:, 1]
        margins = out.rewards_chosen - out.rewards_rejected
    ties = (margins == 0).to(margins.dtype)
    number = max(margins.numel(), 1)
    entropy, accuracy = found.get("entropy"), found.get("is_top1")
    if entropy is not None:
        entropy = layout.sums(entropy.detach(), weighted=False).sum() / counts.sum().clamp(min=1)
    if accuracy is not None:
        per_sequence = layout.sums(accuracy.to(sums.dtype), weighted=False)
        accuracy = per_sequence[chosen].sum() / counts[chosen].sum().clamp(min=1)
    return PreferenceResult(
        value,
        out.per_pair.detach(),
        sums[chosen],
        sums[rejected],
        None if ref is None else ref[chosen],
        None if ref is None else ref[rejected],
        counts,
        counts[chosen],
        counts[rejected],
        sums,
        out.rewards_chosen,
        out.rewards_rejected,
        margins,
        ((margins > 0).to(margins.dtype) + 0.5 * ties).sum() / number,
        ties.sum() / number,
        out.coef_w,
        out.coef_l,
        entropy,
        accuracy,
        kl,
        identical,
        dropped,
        out.clamped,
        out.name,
        loss.coefficient_bound,
        stats,
    )
