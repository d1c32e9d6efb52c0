"""Token sequences become trunk calls: three layouts, the scored rows of each, and the micro-batches of every optimiser step."""

# S sequences, P pairs, N scored rows, B rows of a trunk input, T tokens of its longest row

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from llmcore.data.rows import common_prefix
from llmcore.data.tokens import Example, Tokens

LAYOUTS = ("padded", "packed", "shared")


class TrunkInput(NamedTuple):
    """One forward call of the model: keyword arguments, and the flat positions (into B·T) of the scored rows of its sequences, in
    sequence order.
    """

    inputs: dict[str, torch.Tensor]
    rows: torch.Tensor


@dataclass(frozen=True)
class Batch:
    """Sequences ready for a model: trunk calls, and for the scored rows (N,) their labels and the bounds of each sequence.

    `labels[k]` is the token that row k predicts; sequence s owns rows cu_seqlens[s] … cu_seqlens[s+1]. `pair_index` (P, 2) holds (chosen,
    rejected) sequence numbers; `desirable` (S,) is set for unpaired batches; `ref_logp` (S,) float32 when the reference is already scored.
    """

    calls: tuple[TrunkInput, ...]
    labels: torch.Tensor
    cu_seqlens: torch.Tensor
    pair_index: torch.Tensor | None
    ids: tuple[str, ...]
    index: tuple[int, ...] = ()
    desirable: torch.Tensor | None = None
    ref_logp: torch.Tensor | None = None
    sequences: tuple[Tokens, ...] = field(default=(), repr=False)
    layout: str = "padded"
    isolate: bool = False
    order: torch.Tensor | None = None  # rows of the calls -> rows of `labels`, when they differ

    @property
    def counts(self) -> torch.Tensor:
        """(S,) scored tokens of each sequence."""
        return self.cu_seqlens.diff().long()

    @property
    def num_items(self) -> int:
        """Pairs, or sequences of an unpaired batch: what a mean loss divides by."""
        return len(self.pair_index) if self.pair_index is not None else len(self.cu_seqlens) - 1

    @property
    def trunk_tokens(self) -> int:
        return sum(call.inputs["input_ids"].numel() for call in self.calls)

    def to(self, device: torch.device | str) -> Batch:
        def move(t: torch.Tensor | None) -> torch.Tensor | None:
            return None if t is None else t.to(device, non_blocking=True)

        calls = tuple(
            TrunkInput({k: v.to(device, non_blocking=True) for k, v in c.inputs.items()}, c.rows.to(device, non_blocking=True))
            for c in self.calls
        )
        return replace(
            self,
            calls=calls,
            labels=self.labels.to(device),
            cu_seqlens=self.cu_seqlens.to(device),
            pair_index=move(self.pair_index),
            order=move(self.order),
            desirable=move(self.desirable),
            ref_logp=move(self.ref_logp),
        )

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any], *, layout: str = "padded", isolate: bool = False) -> Batch:
        """From tensors: input_ids (B, T) with attention_mask, or (1, ΣT) with cu_seqlens; completion_mask of the same shape; pair_index
        (P, 2) or, for an even number of sequences without `desirable`, first half chosen and second half rejected; optional desirable,
        ref_logp, ids.
        """
        input_ids, mask = torch.as_tensor(fields["input_ids"]).cpu(), fields.get("completion_mask")
        if mask is None:
            raise ValueError("completion_mask is missing: it marks the completion tokens of input_ids, same shape")
        mask = torch.as_tensor(mask).cpu().bool()
        if mask.shape != input_ids.shape:
            raise ValueError(f"completion_mask must have the shape of input_ids {tuple(input_ids.shape)}, got {tuple(mask.shape)}")
        spans: list[tuple[torch.Tensor, torch.Tensor]] = []
        if fields.get("cu_seqlens") is not None:
            bounds = torch.as_tensor(fields["cu_seqlens"]).tolist()
            spans = [(input_ids.flatten()[a:b], mask.flatten()[a:b]) for a, b in itertools.pairwise(bounds)]
        else:
            attention = fields.get("attention_mask")
            keep = torch.ones_like(mask) if attention is None else torch.as_tensor(attention).cpu().bool()
            spans = [(input_ids[b][keep[b]], mask[b][keep[b]]) for b in range(len(input_ids))]
        scored = [m.numpy() for _, m in spans]
        sequences = [
            Tokens(ids.numpy().astype(np.int64), int(np.argmax(m)) if m.any() else len(m))
            for (ids, _), m in zip(spans, scored, strict=True)
        ]
        pair_index, desirable = fields.get("pair_index"), fields.get("desirable")
        if pair_index is None and desirable is None:
            half, odd = divmod(len(sequences), 2)
            if odd:
                raise ValueError(
                    f"pair_index is missing and {len(sequences)} sequences have no two halves; give pair_index (P, 2) or desirable (S,)"
                )
            pair_index = torch.stack([torch.arange(half), torch.arange(half) + half], dim=1)
        return collate(
            sequences,
            pair_index=pair_index,
            desirable=desirable,
            ref_logp=fields.get("ref_logp"),
            ids=fields.get("ids"),
            masks=scored,
            layout=layout,
            isolate=isolate,
        )


def collate(
    sequences: Sequence[Tokens],
    *,
    pair_index: Any = None,
    desirable: Any = None,
    ref_logp: Any = None,
    ids: Sequence[str] | None = None,
    index: Sequence[int] = (),
    masks: Sequence[np.ndarray] | None = None,
    layout: str = "padded",
    isolate: bool = False,
) -> Batch:
    """Build a Batch.

    Args:
        sequences: S token sequences. masks: optional per-token completion masks replacing "everything from start".
        pair_index: (P, 2) integer (chosen, rejected) sequence numbers, or None for unpaired data.
        layout: "padded" (right padding), "packed" (one row, positions restart, no padding) or "shared" (a pair's common tokens are
            computed once: prompt + 2 completions instead of 2 prompts + 2 completions; needs an attention that takes a block mask and no
            sliding window).
        isolate: one trunk call per sequence (per pair when shared), so that a score is bit for bit independent of its batch; best on CPU,
            where a batch of one is as fast, and what makes cached reference scores subtract to exactly 0.

    Raises:
        ValueError: pair_index out of range, wrong lengths, unknown layout. Warns when a sequence is in no pair.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}")
    S = len(sequences)
    pairs = None
    if pair_index is not None:
        pairs = torch.as_tensor(pair_index).cpu().long().reshape(-1, 2)
        if pairs.numel() and (int(pairs.min()) < 0 or int(pairs.max()) >= S):
            raise ValueError(f"pair_index must lie in [0, {S}), got values from {int(pairs.min())} to {int(pairs.max())}")
        if len(set(pairs.flatten().tolist())) < S:
            warnings.warn(
                f"{S - len(set(pairs.flatten().tolist()))} of {S} sequences are in no pair and do not enter the loss", stacklevel=2
            )
    for name, value in (("desirable", desirable), ("ref_logp", ref_logp)):
        if value is not None and len(value) != S:
            raise ValueError(f"{name} must have one entry for each of the {S} sequences, got {len(value)}")
    places: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    bounds = [0]
    for i, s in enumerate(sequences):
        if masks is None:
            scored = np.arange(max(s.start, 1), len(s.ids))
        else:
            scored = np.flatnonzero(masks[i])
            scored = scored[scored > 0]
        places.append(scored - 1)
        labels.append(s.ids[scored])
        bounds.append(bounds[-1] + len(scored))
    if layout == "shared" and pairs is not None and len(set(pairs.flatten().tolist())) == pairs.numel() == S:
        listed = pairs.tolist()
        groups = [[pair] for pair in listed] if isolate else [listed]
        calls = [_shared(sequences, places, group) for group in groups]
        used = [s for pair in listed for s in pair]
    else:
        # A sequence without a scored token needs no trunk; one call stays, so that the loss is connected to the model.
        used = [i for i in range(S) if len(places[i])] or [0][:S]
        units = [[i] for i in used] if isolate else [used]
        calls = [(_packed if layout == "packed" else _padded)(sequences, places, unit) for unit in units if unit]
    order: torch.Tensor | None = None
    if used != sorted(used):  # rows leave the trunk in the order of the calls, labels lie in the order of the sequences
        sizes = [len(places[i]) for i in used]
        starts = dict(zip(used, np.cumsum([0, *sizes]).tolist(), strict=False))
        order = torch.cat([torch.arange(starts[i], starts[i] + len(places[i])) for i in sorted(used)])
    return Batch(
        tuple(calls),
        torch.from_numpy(np.concatenate(labels) if labels else np.zeros(0, np.int64)),
        torch.tensor(bounds, dtype=torch.int32),
        pairs,
        tuple(ids) if ids is not None else tuple(str(i) for i in range(S if pairs is None else len(pairs))),
        tuple(index),
        None if desirable is None else torch.as_tensor(desirable).bool(),
        None if ref_logp is None else torch.as_tensor(ref_logp, dtype=torch.float32),
        tuple(sequences),
        layout,
        isolate,
        order,
    )


def _padded(sequences: Sequence[Tokens], places: Sequence[np.ndarray], unit: Sequence[int]) -> TrunkInput:
    T = max(1, *(len(sequences[i].ids) for i in unit))
    input_ids, mask = torch.zeros(len(unit), T, dtype=torch.long), torch.zeros(len(unit), T, dtype=torch.long)
    for b, i in enumerate(unit):
        n = len(sequences[i].ids)
        input_ids[b, :n] = torch.from_numpy(sequences[i].ids)
        mask[b, : max(n, 1)] = 1
    rows = torch.from_numpy(np.concatenate([places[i] + b * T for b, i in enumerate(unit)]))
    inputs = {"input_ids": input_ids} if bool(mask.all()) else {"input_ids": input_ids, "attention_mask": mask}
    return TrunkInput(inputs, rows)


def _packed(sequences: Sequence[Tokens], places: Sequence[np.ndarray], unit: Sequence[int]) -> TrunkInput:
    lengths = [len(sequences[i].ids) for i in unit]
    starts = np.cumsum([0, *lengths])
    inputs = {
        "input_ids": torch.from_numpy(np.concatenate([sequences[i].ids for i in unit]))[None],
        "position_ids": torch.from_numpy(np.concatenate([np.arange(n) for n in lengths]))[None],
    }
    return TrunkInput(inputs, torch.from_numpy(np.concatenate([places[i] + a for a, i in zip(starts, unit, strict=False)])))


def _shared(sequences: Sequence[Tokens], places: Sequence[np.ndarray], pairs: Sequence[Sequence[int]]) -> TrunkInput:
    """One row per pair: chosen whole, then what of rejected follows their common tokens; a mask hides the chosen tail from the rejected
    one.
    """
    common = [common_prefix(sequences[w].ids, sequences[l].ids) for w, l in pairs]
    lengths = [len(sequences[w].ids) + len(sequences[l].ids) - k for (w, l), k in zip(pairs, common, strict=True)]
    T = max(1, *lengths)
    input_ids, position_ids = torch.zeros(len(pairs), T, dtype=torch.long), torch.zeros(len(pairs), T, dtype=torch.long)
    mask = torch.zeros(len(pairs), 1, T, T, dtype=torch.bool)
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    rows = []
    for b, ((w, l), k, length) in enumerate(zip(pairs, common, lengths, strict=True)):
        a = len(sequences[w].ids)
        input_ids[b, :a] = torch.from_numpy(sequences[w].ids)
        input_ids[b, a:length] = torch.from_numpy(sequences[l].ids[k:])
        position_ids[b, :a] = torch.arange(a)
        position_ids[b, a:length] = torch.arange(k, len(sequences[l].ids))
        mask[b, 0] = causal
        mask[b, 0, a:length, k:a] = False
        # Token t of rejected stands at t while shared, behind chosen afterwards.
        rows += [places[w] + b * T, np.where(places[l] < k, places[l], places[l] - k + a) + b * T]
    return TrunkInput(
        {"input_ids": input_ids, "position_ids": position_ids, "attention_mask": mask}, torch.from_numpy(np.concatenate(rows))
    )


class Batches:
    """Micro-batches of each optimiser step: `batches[step]` depends on (seed, step) alone, so that a resumed run sees what the
    interrupted one would have.

    Every epoch is one permutation; the last, smaller step of an epoch is kept. The micro-batches of a step are what data-parallel ranks
    divide.

    Args:
        examples: from tokenize. batch_size: examples per optimiser step, over all ranks. micro_batch_size: examples per forward and
            backward.
        num_steps: optimiser steps, or None for `epochs` passes. shuffle: False keeps the order of the data.
        ref_logp: (len(examples), sequences per example) cached reference scores.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        batch_size: int = 8,
        micro_batch_size: int = 2,
        num_steps: int | None = None,
        epochs: float = 1.0,
        seed: int = 0,
        shuffle: bool = True,
        layout: str = "padded",
        isolate: bool = False,
        ref_logp: torch.Tensor | None = None,
    ) -> None:
        if not examples:
            raise ValueError("examples must not be empty")
        for name, value in (("batch_size", batch_size), ("micro_batch_size", micro_batch_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if num_steps is not None and num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {num_steps}")
        width = len(examples[0].sequences)
        if ref_logp is not None and tuple(ref_logp.shape) != (len(examples), width):
            raise ValueError(f"ref_logp must be ({len(examples)}, {width}), one score per sequence, got {tuple(ref_logp.shape)}")
        self.examples, self.batch_size, self.micro_batch_size = list(examples), min(batch_size, len(examples)), micro_batch_size
        self.seed, self.shuffle, self.layout, self.isolate, self.ref_logp = seed, shuffle, layout, isolate, ref_logp
        self.steps_per_epoch = -(-len(self.examples) // self.batch_size)
        self.num_steps = num_steps if num_steps is not None else max(1, round(epochs * self.steps_per_epoch))

    def __len__(self) -> int:
        return self.num_steps

    def select(self, step: int) -> list[int]:
        """Indices of the examples of one step."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.examples)) if self.shuffle else np.arange(len(self.examples))
        return order[place * self.batch_size : (place + 1) * self.batch_size].tolist()

    def __getitem__(self, step: int) -> list[Batch]:
        if not 0 <= step < self.num_steps:
            raise IndexError(f"step must lie in [0, {self.num_steps}), got {step}")
        chosen = self.select(step)
        return [self.batch(chosen[i : i + self.micro_batch_size]) for i in range(0, len(chosen), self.micro_batch_size)]

    def batch(self, indices: Sequence[int]) -> Batch:
        """The batch of these examples, in this order."""
        examples = [self.examples[i] for i in indices]
        return batch_of(
            examples,
            index=indices,
            layout=self.layout,
            isolate=self.isolate,
            ref_logp=None if self.ref_logp is None else self.ref_logp[list(indices)],
        )


def batch_of(
    examples: Sequence[Example],
    *,
    index: Sequence[int] = (),
    layout: str = "padded",
    isolate: bool = False,
    ref_logp: torch.Tensor | None = None,
) -> Batch:
    """Collate examples: sequences 2p and 2p + 1 are chosen and rejected of pair p; one sequence per example for unpaired and instruction
    rows.
    """
    width = len(examples[0].sequences)
    pairs = torch.arange(2 * len(examples)).reshape(-1, 2) if width == 2 else None
    desirable = None if width == 2 or examples[0].desirable is None else [bool(e.desirable) for e in examples]
    return collate(
        [s for e in examples for s in e.sequences],
        pair_index=pairs,
        desirable=desirable,
        ids=[e.id for e in examples],
        index=index,
        layout=layout,
        isolate=isolate,
        ref_logp=None if ref_logp is None else ref_logp.flatten(),
    )
