"""What a fingerprint or a comparison will cost, before anything is read: bytes, arithmetic, memory, and the algorithm of each channel."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmcore.kernels.invariants import SumsPlan, plan_sums
from llmcore.methods.huref.layouts import Layout, Reader, layer_indices, rows_of_block
from llmcore.methods.huref.opening import LAYERS, block_bytes, open_model
from llmcore.methods.huref.terms import check_terms, square_form_is_cheaper, used_bytes

# K tokens, D hidden size, F feed-forward width, R = G·d depth of the attention chains


@dataclasses.dataclass(frozen=True)
class Plan:
    """read_bytes of total_bytes leave the disk. flops: chains (forming the factors) and sums (one pair, or one model's norms).

    peak_bytes: largest sum of tensors alive at once, beyond the interpreter and torch. largest_tokens: the largest K that keeps peak_bytes
    within max_memory (0: none does). channels: algorithm and cost of each kind of channel.
    """

    path: str
    model_type: str
    num_tokens: int
    layers: list[int]
    terms: list[str]
    read_bytes: int
    total_bytes: int
    chain_flops: float
    sum_flops: float
    peak_bytes: int
    largest_tokens: int
    channels: dict[str, SumsPlan]

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def seconds(self, *, bytes_per_second: float = 2e9, flops_per_second: float = 1e11) -> float:
        """The larger of reading and arithmetic at the given rates."""
        return max(self.read_bytes / bytes_per_second, (self.chain_flops + self.sum_flops) / flops_per_second)


def _chain_flops(layout: Layout, num_tokens: int, widths: Sequence[int], terms: tuple[str, ...]) -> float:
    k, d, depth, n = num_tokens, layout.hidden_size, layout.num_kv_heads * layout.head_dim, len(terms)
    attention = n * 4 * 2.0 * k * d * depth
    feed = 0.0
    for width in widths:
        square = square_form_is_cheaper(k, d, width, 4)
        feed += n * (2.0 * d * d * width + 2.0 * k * d * d if square else 4.0 * k * d * width)
    return attention + feed


def _peak(layout: Layout, num_tokens: int, width: int, experts: int, terms: tuple[str, ...], block: int, sides: int) -> int:
    """The largest of the two phases of a layer, float32: attention (four factors), feed-forward ((K, F) and two of size (K, D))."""
    k, d, depth, n = num_tokens, layout.hidden_size, layout.num_kv_heads * layout.head_dim, len(terms)
    views = k * d * (1 + 2 * (n > 1 or terms == ("hardened",)))  # X, and X with either gain
    attention = views + n * 4 * k * depth + 2 * k * depth
    feed = views + n * (k * width + 2 * k * d) + 2 * k * d
    widest = max(d, width) * 4
    group = d * 4 * (layout.num_heads // layout.num_kv_heads) * layout.head_dim  # stays whole
    largest = max(max(1, rows_of_block(widest, block)) * widest, group)
    return sides * (4 * max(attention, feed) + 4 * largest)


def plan(
    path: str | Path,
    b: str | Path | None = None,
    *,
    K: int = 512,
    layers: Sequence[int] = LAYERS,
    terms: str | Sequence[str] = ("paper", "hardened"),
    max_memory: int | None = None,
    base: str | Path | None = None,
    layout: str | None = None,
) -> Plan:
    """Cost of fingerprinting `path`, or of comparing it with `b` (its own shape when b is a copy of it). Reads headers only.

    Example:
        print(plan("model-dir", K=4096).read_bytes)
    """
    chosen = check_terms(terms)
    if K < 2:
        raise ValueError(f"K must be at least 2, got {K}")
    block = block_bytes(max_memory)
    read = total = peak = 0
    chains = 0.0
    depths: list[tuple[int, int]] = []
    largest = 1 << 30
    first: tuple[str, str, list[int]] | None = None
    for side in [path] if b is None else [path, b]:
        with open_model(side, base=base if side is path else None, layout=layout) as model:
            shape, reader = model.layout, model.reader
            indices = layer_indices(shape, layers)
            tokens = min(K, shape.vocab_size)
            found = shape.layer(indices[-1])
            widths = [up.out_size for _, up, _ in found.experts]
            read += used_bytes(reader, shape, indices, tokens)
            total += _stored(reader)
            chains += len(indices) * _chain_flops(shape, tokens, widths, chosen)
            peak += _peak(shape, tokens, max(widths), len(widths), chosen, block, 1)
            depths.append((shape.num_kv_heads * shape.head_dim, shape.hidden_size))
            fits = 0
            if max_memory is not None:
                low, high = 0, shape.vocab_size
                while low < high:  # the largest K whose peak fits
                    middle = (low + high + 1) // 2
                    if _peak(shape, middle, max(widths), len(widths), chosen, block, 1 if b is None else 2) <= max_memory:
                        low = middle
                    else:
                        high = middle - 1
                fits = low
            largest = min(largest, fits if max_memory is not None else shape.vocab_size)
            first = first or (str(side), shape.model_type, indices)
    a_depth, b_depth = depths[0], depths[-1]
    channels = {
        name: plan_sums(K, x, y, memory_budget=max_memory)
        for name, x, y in (("qk, vo", a_depth[0], b_depth[0]), ("ff", a_depth[1], b_depth[1]))
    }
    assert first is not None
    count = len(first[2]) * len(chosen)
    sums = count * (2 * channels["qk, vo"].flops[channels["qk, vo"].algorithm] + channels["ff"].flops[channels["ff"].algorithm])
    peak += max(p.peak_bytes[p.algorithm] for p in channels.values())
    return Plan(first[0], first[1], K, first[2], list(chosen), read, total, chains, sums, peak, largest, channels)


def _stored(reader: Reader) -> int:
    return sum(reader.nbytes(name) for name in reader.names())
