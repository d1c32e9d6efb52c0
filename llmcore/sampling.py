"""Random sampling of tokens that depends on (seed, query, row, sample, step) and on nothing else.

Numbers come from Philox4x32-10 (Salmon et al., SC 2011) in counter mode: key = the two halves of the seed, counter =
(step, row·2^16 + sample, query id, stream). No generator is shared, so batch composition, chunking and order change nothing.
A token is drawn by inverse CDF, in ascending token id, from the kept distribution

    z / temperature  →  keep every value ≥ the k-th largest  →  softmax  →  drop the tail whose mass ≤ 1 − top_p  →  renormalise

which is what transformers' warpers keep. With top-k on, only k values of a row are ever sorted.
"""

# M distributions (trie nodes), V vocab, K kept candidates, A samples

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

import numpy as np
import torch

SAMPLE_STREAM = 0x47435331
MAX_SAMPLES = 1 << 16
_SLACK = 1e-12  # cumulative masses that tie with 1 - top_p in exact arithmetic stay tied after rounding


@dataclass(frozen=True)
class Sampling:
    """How to draw one completion.

    temperature 0 is greedy; top_k 0 and top_p 1 keep the whole vocabulary. A completion ends at one of the model's end-of-sequence
    ids (all of its generation configuration), at one of `stop_token_ids`, before the first of the strings in `stop`, or after
    `max_new_tokens`.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_new_tokens: int = 128
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if not (np.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature must be finite and >= 0 (0 is greedy), got {self.temperature!r}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be >= 0 (0 keeps every token), got {self.top_k!r}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p!r}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be >= 1, got {self.max_new_tokens!r}")
        if isinstance(self.stop, str) or not all(isinstance(text, str) and text for text in self.stop):
            raise ValueError(f"stop must be a sequence of non-empty strings, got {self.stop!r}")


def philox4x32(counter: Sequence[np.ndarray | int], seed: int) -> list[np.ndarray]:
    """Ten rounds of Philox4x32 on four broadcastable counter words: four arrays of 32-bit integers held in uint64."""
    mask = np.uint64(0xFFFFFFFF)
    shift = np.uint64(32)
    c0, c1, c2, c3 = np.broadcast_arrays(*(np.asarray(word).astype(np.uint64) & mask for word in counter))
    key = [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]
    for _ in range(10):
        p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (p1 >> shift) ^ c1 ^ np.uint64(key[0]), p1 & mask, (p0 >> shift) ^ c3 ^ np.uint64(key[1]), p0 & mask
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return [c0, c1, c2, c3]


def uniforms(seed: int, query_id: np.ndarray | int, row: np.ndarray | int, sample: np.ndarray | int, step: np.ndarray | int) -> np.ndarray:
    """The float64 uniforms in (0, 1) that draw token `step` of sample `sample` of row `row` of query `query_id`."""
    where = np.asarray(row, dtype=np.int64) * MAX_SAMPLES + np.asarray(sample, dtype=np.int64)
    x = philox4x32((step, where, np.asarray(query_id).astype(np.uint64), SAMPLE_STREAM), seed)
    return (((x[0] << np.uint64(20)) + (x[1] >> np.uint64(12))).astype(np.float64) + 0.5) * 2.0**-52


def kept_candidates(logits: torch.Tensor, temperature: float, top_k: int, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, probabilities), both (M, K), ids ascending in each row, for logits (M, V); dropped candidates have probability 0.

    NaN logits give NaN probabilities: topk and logsumexp both carry them through.
    """
    scaled = logits.float()
    if temperature == 0:
        best, ids = scaled.max(dim=-1, keepdim=True)
        return ids, torch.where(best.isnan(), best, 1.0).double()
    vocab = scaled.shape[-1]
    cut = float(1 - Decimal(repr(float(top_p)))) * (1 + _SLACK)
    if 0 < top_k < vocab:
        # One candidate more than k shows whether the k-th value is tied; ties are all kept.
        # Dividing keeps the order, so the largest of the logits are the largest of the quotients: only those are divided.
        width = min(top_k + 1, vocab)
        values, ids = scaled.topk(width, dim=-1)
        values = values / temperature
        while width < vocab and bool((values[:, -1] == values[:, top_k - 1]).any()):
            width = min(2 * width, vocab)
            values, ids = scaled.topk(width, dim=-1)
            values = values / temperature
        values = torch.where(values < values[:, top_k - 1 : top_k], float("-inf"), values)
        log_norm = values.double().logsumexp(-1, keepdim=True)
    else:
        scaled = scaled / temperature
        # Widen the selection until its mass reaches top_p: everything below it is dropped by definition, no full sort is needed.
        log_norm = scaled.double().logsumexp(-1, keepdim=True)
        width = vocab if top_p >= 1 else min(256, vocab)
        while True:
            values, ids = (
                scaled.topk(width, dim=-1) if width < vocab else (scaled, torch.arange(vocab, device=scaled.device).expand_as(scaled))
            )
            if width == vocab:
                break
            # The candidate above the cut must be inside with all its ties, so ask for strictly more mass than top_p and an untied edge.
            mass = (values.double() - log_norm).exp().sum(-1)
            if bool(((mass - (values[:, -1].double() - log_norm[:, 0]).exp() >= 1 - cut) | mass.isnan()).all()):
                break
            width = min(8 * width, vocab)
    ids, order = ids.sort(dim=-1)
    probs = (values.gather(-1, order).double() - log_norm).exp()
    if top_p < 1:
        ascending, rank = probs.sort(dim=-1, stable=True)
        outside = (1 - probs.sum(-1, keepdim=True)).clamp_min(0) if width < vocab and not 0 < top_k < vocab else 0.0
        dropped = (ascending.cumsum(-1) + outside) <= cut
        dropped[:, -1] = False
        probs = probs.masked_fill(torch.zeros_like(dropped).scatter(-1, rank, dropped), 0.0)
    return ids, probs / probs.sum(-1, keepdim=True)


def kept_distribution(logits: torch.Tensor, temperature: float, top_k: int, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The distribution a token is drawn from: (ids, probabilities), ids ascending.

    Args:
        logits: (V,) or (M, V), any float dtype; arithmetic in float32 up to the division by temperature, float64 after it.
        temperature: > 0 divides the logits, 0 keeps the largest. top_k: 0 keeps all; ties with the k-th largest are kept. top_p: in (0, 1].

    Returns:
        ids int64 and probabilities float64: (K,) for (V,) logits; (M, K) for (M, V), where a dropped candidate has probability 0.

    Example:
        >>> ids, p = kept_distribution(torch.tensor([2.0, 0.0, 1.0]), 1.0, 2, 1.0)
        >>> ids.tolist()
        [0, 2]
    """
    Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    if logits.ndim not in (1, 2) or logits.shape[-1] == 0:
        raise ValueError(f"logits must be (vocab_size,) or (rows, vocab_size), got {tuple(logits.shape)}")
    if bool(logits.isnan().any()):
        raise ValueError("logits must not contain NaN")
    ids, probs = kept_candidates(logits.reshape(-1, logits.shape[-1]), temperature, top_k, top_p)
    if logits.ndim == 2:
        return ids, probs
    kept = probs[0] > 0
    return ids[0][kept], probs[0][kept]


def draw(ids: torch.Tensor, probs: torch.Tensor, which: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Token of each of A samples: the first id of its distribution `which[a]` whose cumulative probability exceeds u[a].

    Args: ids, probs (M, K) as kept_candidates gives them; which (A,) indices into M; u (A,) in (0, 1).
    """
    if ids.shape[1] == 1:
        return ids[:, 0].cpu().numpy()[which]
    cumulative = probs.cumsum(-1)
    where = torch.from_numpy(which).to(ids.device)
    threshold = torch.from_numpy(u).to(ids.device)[:, None] * cumulative[:, -1:][where]
    index = (cumulative[where] <= threshold).sum(-1)
    last = (probs > 0).to(torch.uint8).cumsum(-1).argmax(-1)  # u·total may round up to the total
    return ids[where, torch.minimum(index, last[where])].cpu().numpy()
